import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.snapshots import assemble, dismantle


@dataclass(frozen=True, eq=False)
class Inner:
    rows: NDArray[np.float32]
    weight: float


@dataclass(frozen=True, eq=False)
class Outer:
    table: Tensor
    served: Tensor | None
    heads: tuple[dict[str, Tensor], ...]
    turns: NDArray[np.int64]
    private: Inner | None
    best: float
    active: bool
    note: str | None


START = Outer(
    table=torch.zeros(2, 3),
    served=None,
    heads=({"w": torch.zeros(2)}, {}),
    turns=np.zeros(4, dtype=np.int64),
    private=None,
    best=-np.inf,
    active=True,
    note=None,
)
LATER = Outer(
    table=torch.rand(2, 3),
    served=torch.tensor([torch.nan, -0.0, 1e-45]),
    heads=({"w": torch.ones(2)}, {}),
    turns=np.arange(4),
    private=Inner(np.ones((0, 3), dtype=np.float32), 0.1 + 0.2),
    best=float("inf"),
    active=False,
    note="na\u00efve \u2028 \ud800",
)


def through_disk(value, like):
    """Take apart and put together with the plan as it comes back from a file."""
    plan, tensors = dismantle(value)
    return assemble(json.loads(json.dumps(plan, allow_nan=False)), tensors, like)


def assert_bits(one, other):
    assert type(one) is type(other)
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_state_comes_back_as_it_was():
    found = through_disk(LATER, START)
    assert type(found) is Outer
    assert_bits(found.table, LATER.table)
    assert_bits(found.served, LATER.served)
    assert_bits(found.heads[0]["w"], LATER.heads[0]["w"])
    assert found.heads[1] == {}
    assert_bits(found.turns, LATER.turns)
    assert type(found.private) is Inner
    assert_bits(found.private.rows, LATER.private.rows)
    assert found.private.weight == 0.1 + 0.2
    assert (found.best, found.active, found.note) == (np.inf, False, LATER.note)
    assert found.table.data_ptr() != LATER.table.data_ptr()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (2, 3, 4)])
def test_tensors_of_all_kinds(dtype, shape):
    value = torch.ones(shape, dtype=dtype)
    found = through_disk({"a": value}, {"a": torch.zeros(shape, dtype=dtype)})["a"]
    assert found.dtype == dtype
    assert found.shape == shape
    assert torch.equal(found, value)


def test_the_layout_in_memory_comes_back():
    wide = torch.rand(4, 6)
    values = {
        "turned": wide.T,
        "narrow": wide[:, :2],
        "steps": wide[::2],
        "repeated": wide[:1].expand(3, 6),
        "plain": wide.clone(),
    }
    found = through_disk(values, values)
    for name, value in values.items():
        assert torch.equal(found[name], value)
        if name != "repeated":  # writing into it would change all rows at once
            assert found[name].stride() == value.stride()
    turned = through_disk({"a": np.asfortranarray(np.arange(6.0).reshape(2, 3))}, None)["a"]
    assert turned.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_one_tensor_in_two_places_is_saved_once():
    table = torch.rand(2)
    plan, tensors = dismantle({"a": table, "b": {"c": table}, "d": table.clone()})
    assert tensors.keys() == {"a", "d"}
    found = assemble(plan, tensors, None)
    assert found["a"] is found["b"]["c"]
    assert found["a"] is not found["d"]


def test_names_of_tensors_do_not_run_into_each_other():
    values = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1), "b'": torch.full((1,), 2.0)}}
    found = through_disk(values, values)
    assert found["a.b"].item() == 0
    assert (found["a"]["b"].item(), found["a"]["b'"].item()) == (1, 2)


def test_history_comes_back_as_plain_values():
    history = [
        {"round": np.int64(1), "loss": np.float32(0.5), "r2": None, "ok": np.bool_(True)},
        {"losses": [float("nan"), 1e-300], "pair": (1, "x"), "nested": [{"a": [()]}]},
    ]
    found = through_disk(history, [])
    assert found[0] == {"round": 1, "loss": 0.5, "r2": None, "ok": True}
    assert type(found[0]["round"]) is int
    assert type(found[0]["ok"]) is bool
    assert np.isnan(found[1]["losses"][0])
    assert found[1]["losses"][1] == 1e-300
    assert (found[1]["pair"], found[1]["nested"]) == ((1, "x"), [{"a": [()]}])


@pytest.mark.parametrize("value", [{1, 2}, {3: 4}, {"$tensor": 1}, b"x", np.array(["x"]), object()])
def test_what_cannot_be_saved_is_refused(value):
    with pytest.raises(TypeError, match=r"cannot be saved|can't convert"):
        dismantle({"part": value})


@pytest.mark.parametrize(
    ("start", "place"),
    [
        (replace(START, table=torch.zeros(2, 4)), r"state.table has tensor \(2, 3\) .* \(2, 4\)"),
        (replace(START, table=torch.zeros(2, 3).double()), "of float32 there .* of float64 here"),
        (replace(START, turns=np.zeros(5, dtype=np.int64)), r"state.turns has array \(4,\)"),
        (replace(START, turns=torch.zeros(4).long()), "has array .* there and tensor"),
        (replace(START, heads=({"w": torch.zeros(2)},)), "state.heads has 2 parts there and 1"),
        (replace(START, heads=({"v": torch.zeros(2)}, {})), r"state.heads.0 has the keys \['w'\]"),
        (replace(START, note=torch.zeros(2)), "state.note has no tensor there"),
        (replace(START, best=Inner(START.turns, 0.0)), "state.best has no fields there"),
        (Inner(START.turns, 0.0), "state has the fields .* there and Inner here"),
    ],
)
def test_another_state_is_refused_by_its_place(start, place):
    plan, tensors = dismantle(LATER)
    with pytest.raises(ValueError, match=place):
        assemble(plan, tensors, start)


def test_a_class_is_never_looked_up_by_a_name_in_the_file():
    plan = {"$fields": {"rows": 1, "weight": 2.0}}
    with pytest.raises(ValueError, match="and others here"):
        assemble({"free": plan}, {}, {"free": None})
