"""No step of matrix factorisation waits for the device.

Tensors on torch's "meta" device have shapes and no values, like those of a GPU that has not got so
far. A step that wants to know a value, or how many there are of something, fails on them; so they
stand for a GPU where there is none, and take the paths that are not the CPU's.
"""

import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedrecsk.engine import mixing
from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.device import to_device
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.bce_rounds import bce_step
from fedrecsk.methods.factor_state import FactorState, draw_delegates
from fedrecsk.methods.nested_state import NestedState, Sizes
from fedrecsk.methods.nested_whole_data import whole_data_step as nested_step
from fedrecsk.methods.whole_data_rounds import whole_data_step
from fedrecsk.models import whole_data
from fedrecsk.models.factors import random_factors

META, CPU = torch.device("meta"), torch.device("cpu")
STREAMS, N_CLIENTS, N_ITEMS, N_FACTORS = Streams(5), 12, 30, 4
# What a GPU runs and then asks for its status; "meta" does not.
CHECKED = ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_lstsq")


class WaitingError(AssertionError):
    """The host would wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuse operations that wait for the device; `checked` names those that torch checks."""

    def __init__(self):
        super().__init__()
        self.copies, self.checked = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in flat((args, kwargs)) if isinstance(x, torch.Tensor)]
        away = [x for x in tensors if x.device == META]
        if name in CHECKED and away:
            self.checked.append(name)
        by_mask = name.startswith(("index", "_index")) and isinstance(args[1], (list, tuple))
        if by_mask and any(x.dtype == torch.bool for x in flat(args[1])):
            raise WaitingError(f"{name} by a mask")
        if name in ("_to_copy", "copy_", "_copy_from"):
            self.copied(func, args, kwargs)
        return func(*args, **kwargs)

    def copied(self, func, args, kwargs):
        """Let copies to the device come from the one function that does not wait."""
        source = args[1] if len(args) > 1 else args[0]
        to = args[0].device if len(args) > 1 else kwargs.get("device", source.device)
        if source.device == CPU and torch.device(to or CPU) == META:
            if not any(frame == "to_device" for frame in callers()):
                raise WaitingError("a copy to the device that waits")
            self.copies += 1


def flat(values):
    if isinstance(values, dict):
        values = values.values()
    if isinstance(values, (list, tuple)) or type(values).__name__ == "dict_values":
        for value in values:
            yield from flat(value)
    elif values is not None:
        yield values


def callers():
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


@contextmanager
def no_waiting(monkeypatch):
    """Fail where the host would wait, and hand out what was seen."""
    made = torch.tensor

    def tensor(*args, device=None, **kwargs):
        # No operation that a mode would see.
        if device is not None and torch.device(device) == META:
            raise WaitingError("torch.tensor on the device")
        return made(*args, device=device, **kwargs)

    def product(indptr, columns, data, dense, n_rows):
        # "meta" has no sparse products; those of a GPU are launched like any other.
        assert indptr.shape == (n_rows + 1,)
        assert columns.shape == data.shape
        return dense.new_zeros(n_rows, dense.shape[1])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(mixing, "csr_product", product)
        patch.setattr(whole_data, "csr_product", product)
        with NoWaiting() as seen:
            yield seen


def shards_on(device):
    """Make one user a client, of many sizes."""
    rng = np.random.default_rng(3)
    counts = 2 + np.arange(N_CLIENTS) % 7
    user = np.repeat(np.arange(N_CLIENTS), counts)
    item = np.concatenate([rng.choice(N_ITEMS, n, replace=False) for n in counts])
    return ClientShards.from_codes(
        user, item, np.arange(N_CLIENTS), N_CLIENTS, N_ITEMS, device=device
    )


def n_chunks_of(shards, clients, rows_per_interaction):
    """Count the chunks that these clients make on a GPU."""
    sizes = shards.client_rows[clients] * rows_per_interaction
    return len(list(shards._by_size(sizes)))


def state_on(device, server):
    users, table = random_factors(
        N_CLIENTS,
        N_ITEMS,
        N_FACTORS,
        item_bias=False,
        init_scale=0.3,
        streams=STREAMS,
        device=device,
    )
    return FactorState.start(users, table, server, n_clients=N_CLIENTS)


def bce(state, shards, delegates, t, server, **changes):
    arguments = {
        "item_weighting": "count",
        "item_bias": False,
        "n_negatives": 3,
        "batch_size": 16,
        "local_epochs": 2,
        "optimizer": Optimizer("sgd", 0.1),
        "l2": 0.01,
        **changes,
    }
    return bce_step(
        state, shards, delegates, t, streams=STREAMS, server_optimizer=server, **arguments
    )


def exact(state, shards, delegates, t, server, **changes):
    return whole_data_step(
        state,
        shards,
        delegates,
        t,
        unobserved_weight=0.1,
        penalty=whole_data.Penalty(0.1, 0.5),
        server_learning_rate=None,
        decay=0.9,
        item_curvature=True,
        **changes,
    )


SERVERS = {
    "sgd": Optimizer("sgd", 1.0),
    "adam": Optimizer("adam", 0.01),
    "newton": None,
}
STEPS = {
    **{f"bce-{name}": (bce, server) for name, server in SERVERS.items()},
    "whole-data": (exact, SERVERS["sgd"]),
}
# The quasi-Newton steps turn into the eigenbasis of one d x d matrix, at the end of a round.
EIGENBASES = {"bce-newton": ["_linalg_eigh"], "whole-data": ["_linalg_eigh"]}


@pytest.mark.parametrize("several", [False, True], ids=["one-chunk", "several-chunks"])
@pytest.mark.parametrize("name", STEPS)
def test_a_round_does_not_wait_for_the_device(name, several, monkeypatch):
    step, server = STEPS[name]
    few = 80 if step is bce else 20
    monkeypatch.setattr(shards_module, "GPU_CHUNK_ROWS", few if several else 10**6)
    state, shards = state_on(META, server), shards_on(META)
    expected = 0
    with no_waiting(monkeypatch) as seen:
        for t, size in enumerate((N_CLIENTS, 7)):
            delegates = draw_delegates(state, shards, size, t, "epoch", 3, STREAMS)
            state, logs = step(state, shards, delegates, t, server, in_place=several)
            assert logs["loss"].shape == ()
            # The plan of a chunk, for BCE its layout, and for the round who took part.
            n_chunks = n_chunks_of(shards, delegates, 4 if step is bce else 1)
            expected += n_chunks * (2 if step is bce else 1) + 1
            assert (n_chunks > 1) == several
    assert state.item_table.device == state.user_factors.device == META
    assert seen.checked == EIGENBASES.get(name, []) * 2
    assert seen.copies == expected


@pytest.mark.parametrize("weighting", ["magnitude", "interactions", "fedavg"])
def test_other_weights_do_not_wait_either(weighting, monkeypatch):
    state, shards = state_on(META, SERVERS["sgd"]), shards_on(META)
    with no_waiting(monkeypatch) as seen:
        bce(state, shards, np.arange(N_CLIENTS), 0, SERVERS["sgd"], item_weighting=weighting)
    assert not seen.checked


def test_nested_solves_do_not_wait_for_the_device(monkeypatch):
    shards, sizes = shards_on(META), Sizes.of(np.repeat([2, N_FACTORS], N_CLIENTS // 2))
    users, table = (torch.zeros(n, N_FACTORS, device=META) for n in (N_CLIENTS, N_ITEMS))
    state = NestedState.start(users, table, [], sizes, np.arange(N_CLIENTS))
    with no_waiting(monkeypatch) as seen:
        _, logs = nested_step(
            state,
            shards,
            np.arange(N_CLIENTS),
            0,
            sizes=sizes,
            dual_task=True,
            aggregation="padded",
            unobserved_weight=0.1,
            penalty=whole_data.Penalty(0.1, 0.5),
            server_learning_rate=None,
            decay=0.9,
            item_curvature=True,
        )
    assert logs["loss"].device == META
    assert seen.checked == ["_linalg_eigh"] * 2  # of each block of columns


WAITING = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "list": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.index_put_((x > 0,), x),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.bincount(minlength=9),
    "repeat": lambda x: x.repeat_interleave(x),
    "copy": lambda x: torch.from_numpy(np.arange(3)).to(x.device),
    "copy into": lambda x: x.copy_(torch.arange(len(x))),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_found(name, monkeypatch):
    x = torch.zeros(4, dtype=torch.int64, device=META)
    with pytest.raises((WaitingError, RuntimeError)), no_waiting(monkeypatch):
        WAITING[name](x)


def test_what_does_not_wait_is_let_through(monkeypatch):
    x = torch.zeros(4, dtype=torch.int64, device=META)
    with no_waiting(monkeypatch) as seen:
        x[to_device(np.array([0, 2]), META)] = 1
        torch.repeat_interleave(x, x, output_size=9)
        torch.arange(3).tolist()  # of the host's own
        torch.linalg.cholesky_ex(torch.zeros(3, 3, device=META))
        assert (seen.copies, seen.checked) == (1, [])
        torch.linalg.cholesky(torch.zeros(3, 3, device=META))
    assert seen.checked == ["_linalg_check_errors"]
