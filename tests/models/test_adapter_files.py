import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedrecsk.models.adapter_files import load_adapters, save_adapters
from fedrecsk.models.stacked_lora import StackedLoRA, flat, unflat
from tests.reference.lora_reference import MODELS, VOCABULARY, adapter_of, tiny_model

# PEFT still calls transformers' attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"bert": "FEATURE_EXTRACTION", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}


def adapters_of(n_clients=3):
    """Adapters of two layers, 6 -> 4 and 4 -> 6 wide, of rank 2."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"layers.1.q": (6, 4), "layers.0.q": (4, 6)}
    adapters = {}
    for path, (n_in, n_out) in sizes.items():
        adapters[f"{path}.lora_A"] = torch.randn(n_clients, 2, n_in, generator=generator)
        adapters[f"{path}.lora_B"] = torch.randn(n_clients, n_out, 2, generator=generator)
    return adapters


SETTINGS = {
    "base_model": "someone/model",
    "rank": 2,
    "alpha": 5.0,
    "dropout": 0.05,
    "targets": ("layers.0.q", "layers.1.q"),
    "task_type": "CAUSAL_LM",
    "fan_in_fan_out": False,
}


def save(folder, clients=(10, 20, 30), adapters=None, **changes):
    adapters = adapters_of(len(clients)) if adapters is None else adapters
    return save_adapters(folder, adapters, clients, **{**SETTINGS, **changes})


def files(folder):
    return {
        path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()
    }


# PEFT reads what is written ----------------------------------------------------------------


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("kind", MODELS)
def test_peft_gives_the_same_outputs_from_the_files(tmp_path, kind, targets):
    model = tiny_model(kind)
    lora = StackedLoRA(model, target_modules=targets, rank=3, alpha=5, dropout=0.1)
    generator = torch.Generator().manual_seed(0)
    adapters = {
        name: 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in lora.init(2, generator).items()
    }
    rows = torch.randint(3, VOCABULARY, (4, 6), generator=generator)
    folders = save_adapters(
        tmp_path,
        adapters,
        ["games", "film"],
        base_model="tiny",
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        task_type=TASKS[kind],
        fan_in_fan_out=lora.fan_in_fan_out,
    )
    with lora.using(adapters):
        together = model(input_ids=rows)[0]
    for client, folder in enumerate(folders):
        alone = PeftModel.from_pretrained(tiny_model(kind), folder)
        own = adapter_of(alone, adapters)
        assert all(torch.equal(own[name], value[client]) for name, value in adapters.items())
        expected = alone(input_ids=rows[2 * client : 2 * client + 2])[0]
        torch.testing.assert_close(
            together[2 * client : 2 * client + 2], expected, rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(expected, tiny_model(kind)(input_ids=rows[:2])[0], atol=1e-2)
    again, clients, settings = load_adapters(tmp_path)
    assert list(again) == list(adapters)
    assert clients.tolist() == ["games", "film"]
    other = StackedLoRA(
        tiny_model(kind),
        target_modules=settings["targets"],
        rank=settings["rank"],
        alpha=settings["alpha"],
    )
    with other.using(again) as same:
        assert torch.equal(same(input_ids=rows)[0], together)


def test_names_in_the_files_are_those_of_peft(tmp_path):
    folders = save(tmp_path)
    assert folders == [tmp_path / f"client-{client}" for client in (10, 20, 30)]
    assert files(tmp_path) == {"clients.json"} | {
        f"client-{client}/{name}" for client in (10, 20, 30) for name in (CONFIG, WEIGHTS)
    }
    tensors = load_file(folders[1] / WEIGHTS)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "base_model.model.layers.0.q.lora_A.weight": (2, 4),
        "base_model.model.layers.0.q.lora_B.weight": (6, 2),
        "base_model.model.layers.1.q.lora_A.weight": (2, 6),
        "base_model.model.layers.1.q.lora_B.weight": (4, 2),
    }
    config = json.loads((folders[1] / CONFIG).read_text())
    expected = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.05,
        "target_modules": ["layers.0.q", "layers.1.q"],
        "base_model_name_or_path": "someone/model",
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
    }
    assert {key: config[key] for key in expected} == expected


def test_layers_are_listed_in_order(tmp_path):
    """PEFT makes a set of their names, which differs from process to process."""
    names = [f"layer.{n}.q" for n in (5, 3, 1, 4, 2, 0)]
    adapters = {f"{name}.lora_{part}": torch.ones(1, 1, 1) for name in names for part in "AB"}
    (folder,) = save(tmp_path, [1], adapters=adapters, rank=1, targets=names)
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == sorted(names)
    assert list(load_adapters(tmp_path)[0]) == list(adapters)


# There and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"base_model": None, "task_type": None, "alpha": 0.5}])
def test_what_is_saved_is_loaded(tmp_path, changes):
    adapters = adapters_of()
    save(tmp_path / "deep" / "er", adapters=adapters, **changes)
    again, clients, settings = load_adapters(str(tmp_path / "deep" / "er"))
    assert list(again) == list(adapters)  # the order of the layers as well
    for name, value in adapters.items():
        assert torch.equal(again[name], value)
    assert clients.tolist() == [10, 20, 30]
    assert settings == {**SETTINGS, **changes}
    save_adapters(tmp_path / "again", again, clients, **settings)
    assert torch.equal(flat(load_adapters(tmp_path / "again")[0]), flat(adapters))


@pytest.mark.parametrize(
    ("clients", "dtype"),
    [
        ([3, 1], "int64"),
        (np.array([3, 1], dtype=np.int32), "int32"),
        (np.array([3, 2**64 - 1], dtype=np.uint64), "uint64"),
        ([-3, 10**30], "object"),
        ([0.5, 1e300], "float64"),
        (np.array([0.1, 3], dtype=np.float32), "float32"),
        (["b", "äöü 漢字"], "<U6"),
        (np.array(["1", "a/b"], dtype=object), "object"),
        ((np.str_("x"), ""), "<U1"),
        ((np.int64(4), 5), "int64"),
    ],
)
def test_client_ids_come_back_as_they_were(tmp_path, clients, dtype):
    save(tmp_path, clients)
    found = load_adapters(tmp_path)[1]
    assert found.dtype == np.dtype(dtype)
    assert found.tolist() == [getattr(client, "tolist", lambda c=client: c)() for client in clients]
    json.loads((tmp_path / "clients.json").read_text())


def test_tensors_of_any_layout_are_written(tmp_path):
    """Views of one vector with gradients, and tensors whose rows lie apart."""
    adapters = adapters_of()
    views = unflat(flat(adapters).requires_grad_(True), adapters)
    turned = {name: value.mT.contiguous().mT for name, value in adapters.items()}
    for given in (views, turned):
        save(tmp_path, adapters=given)
        assert torch.equal(flat(load_adapters(tmp_path)[0]), flat(adapters))


def test_saving_again_writes_over(tmp_path):
    save(tmp_path)
    later = {name: value + 1 for name, value in adapters_of(2).items()}
    save(tmp_path, (20, 40), adapters=later)
    adapters, clients, _ = load_adapters(tmp_path)
    assert clients.tolist() == [20, 40]
    assert torch.equal(flat(adapters), flat(later))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    calls = []

    def full_disk(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    later = {name: value + 1 for name, value in adapters_of().items()}
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, adapters=later)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


# Folder names ------------------------------------------------------------------------------

STRANGE = [
    "../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "a", "A", "a ", "con", "x" * 300,
    "x" * 301, "a\0b", "a\nb", "äöü", "-", "~", "a~b", "c:", "client-a", "1", "1.5", "a.", ".a",
    "\ud800",
]  # fmt: skip


def test_any_id_makes_a_folder_of_its_own_inside(tmp_path):
    folder = tmp_path / "saved"
    paths = save(folder, STRANGE)
    assert all(path.parent == folder and path.is_dir() for path in paths)
    # Also where capitals do not count.
    assert len({path.name.lower() for path in paths}) == len(STRANGE)
    assert all(len(path.name) < 100 and path.name.isascii() for path in paths)
    assert os.listdir(tmp_path) == ["saved"]
    adapters, clients, _ = load_adapters(folder)
    assert clients.tolist() == STRANGE
    assert torch.equal(flat(adapters), flat(adapters_of(len(STRANGE))))


def test_plain_ids_can_be_read_in_the_folders(tmp_path):
    paths = save(tmp_path, ["games", "film_2", "b-3.5"])
    assert [path.name for path in paths] == ["client-games", "client-film_2", "client-b-3.5"]
    assert [path.name for path in save(tmp_path, [-1, 0, 7])] == [
        "client--1",
        "client-0",
        "client-7",
    ]


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([1, 2, 1], "The client id 1 comes more than once"),
        ([1, 2], "2 client ids for the adapters of 3 clients"),
        ([1, "2", 3], r"of one kind; got \['int', 'str'\]"),
        ([1, 2.0, 3], r"of one kind; got \['float', 'int'\]"),
        ([True, False, 1], r"got \['bool', 'int'\]"),
        ([(1,), (2,), (3,)], r"got \['tuple'\]"),
        ([1.0, float("nan"), 2.0], "not a number"),
        ([], "got none"),
    ],
)
def test_ids_that_are_none(tmp_path, clients, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "new", clients, adapters=adapters_of())
    assert not (tmp_path / "new").exists()


def test_adapters_that_do_not_fit_are_not_written(tmp_path):
    good = adapters_of()
    half = {name: value for name, value in good.items() if name != "layers.0.q.lora_B"}
    fewer = {**good, "layers.0.q.lora_B": good["layers.0.q.lora_B"][:2]}
    for changes, message in [
        ({"rank": 3}, r"layers.1.q have the shapes \(2, 6\) and \(4, 2\), .* rank 3"),
        ({"targets": ("layers.0.q",)}, r"adapters of 'layers.1.q', which targets=.* miss"),
        ({"targets": ("1.q", "ayers.0.q")}, "adapters of 'layers.0.q'"),
        ({"adapters": half}, r"pairs of lora_A and lora_B; got \['layers.0.q.lora_B'\]"),
        ({"adapters": {**good, "x": good["layers.0.q.lora_B"]}}, r"got \['x'\]"),
        ({"adapters": fewer}, "layers.0.q are not matrices, one for every client"),
        ({"adapters": {}}, "got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()
    save(tmp_path / "new", targets=["q"])  # by the end of the path, as PEFT has it


# Files that are not what they should be ----------------------------------------------------


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"clients.json is missing; is .* of save_adapters"):
        load_adapters(tmp_path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_adapters(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files(tmp_path, name):
    save(tmp_path)
    (tmp_path / "client-20" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"client-20.{name} is missing"):
        load_adapters(tmp_path)


@pytest.mark.parametrize("name", ["clients.json", f"client-20/{CONFIG}", f"client-20/{WEIGHTS}"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x04}.", b"{", b"\xff\xfe"])
def test_damaged_files(tmp_path, name, content):
    save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.* is damaged"):
        load_adapters(tmp_path)


@pytest.mark.parametrize("folder", ["../client-20", "/tmp", "..", "client-30", "", None, 3])
def test_folders_in_the_index_are_those_of_the_ids(tmp_path, folder):
    save(tmp_path / "saved")
    save(tmp_path)  # so that there is something to read outside
    edit(tmp_path / "saved/clients.json", lambda index: index["clients"][1].update(folder=folder))
    with pytest.raises(ValueError, match=r"for the client 20; expected 'client-20'"):
        load_adapters(tmp_path / "saved")


@pytest.mark.parametrize("name", ["clients.json", "client-20", f"client-20/{WEIGHTS}"])
def test_links_that_lead_out_are_not_followed(tmp_path, name):
    save(tmp_path / "saved")
    (tmp_path / "saved" / name).rename(tmp_path / "outside")
    (tmp_path / "saved" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="leads out of"):
        load_adapters(tmp_path / "saved")


def test_a_linked_folder_is_read(tmp_path):
    save(tmp_path / "saved")
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    assert load_adapters(tmp_path / "link")[1].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(version=2), "version 2; this release reads 1"),
        (lambda index: index.pop("layers"), "damaged: KeyError"),
        (lambda index: index.update(clients=[]), "damaged: .*got none"),
        (lambda index: index.update(clients=[3]), "damaged: TypeError"),
        (lambda index: index["clients"].append(index["clients"][0]), "10 comes more than once"),
        (lambda index: index["clients"][0].update(id=[1]), r"got \['int', 'list'\]"),
        (lambda index: index.update(dtype="str"), "10 cannot be of the dtype 'str'"),
        (lambda index: index.update(dtype="V1000000"), "cannot be of the dtype 'V1000000'"),
        (lambda index: index.update(dtype=["int64"]), "cannot be of the dtype"),
        (
            lambda index: (index.update(dtype="int8"), index["clients"][0].update(id=300)),
            "damaged: OverflowError",
        ),
        (lambda index: index["layers"].pop(), "2 entries are missing or too many"),
        (lambda index: index["layers"].append("x"), "too many, such as 'base_model.model.x"),
    ],
)
def test_an_index_that_is_not_right(tmp_path, change, message):
    save(tmp_path)
    edit(tmp_path / "clients.json", change)
    with pytest.raises(ValueError, match=message):
        load_adapters(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 7}, "has 7.0 for alpha, but the first client, client-10, has 5.0"),
        ({"r": 4}, "has 4 for rank, but the first"),
        ({"lora_dropout": 0.1}, "has 0.1 for dropout"),
        ({"target_modules": ["q"]}, r"has \('q',\) for targets"),
        ({"target_modules": "q"}, "no list of target_modules"),
        ({"base_model_name_or_path": "x"}, "has 'x' for base_model"),
        ({"task_type": None}, "has None for task_type"),
        ({"peft_type": "IA3"}, "type 'IA3'; expected 'LORA'"),
        ({"use_dora": True}, r"has {'use_dora': True}; only plain"),
        ({"use_rslora": True}, r"has {'use_rslora': True}"),
        ({"bias": "all"}, r"has {'bias': 'all'}"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern"),
        ({"r": "many"}, "damaged: ValueError"),
        ({"r": 10**400, "lora_alpha": 10**400}, "damaged: OverflowError"),
        ({"r": float("inf")}, "damaged: OverflowError"),
        ({"lora_alpha": float("nan")}, "lora_alpha or lora_dropout is not finite"),
        ({"lora_dropout": float("inf")}, "lora_alpha or lora_dropout is not finite"),
    ],
)
def test_settings_that_are_not_right(tmp_path, change, message):
    save(tmp_path)
    edit(tmp_path / "client-20" / CONFIG, lambda config: config.update(change))
    with pytest.raises(ValueError, match=f"client-20/{CONFIG} .*{message}"):
        load_adapters(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.q.lora_A": (2, 5)}, r"has \(2, 5\) for layers.1.q.lora_A, but the first.*\(2, 6\)"),
        ({"1.q.lora_A": (3, 6)}, r"shapes \(3, 6\) and \(4, 2\), which are not of rank 2"),
        ({"1.q.lora_A": (3, 6), "1.q.lora_B": (4, 3)}, "not of rank 2"),
        ({"1.q.lora_B": (8,)}, "are not matrices"),
        ({"1.q.lora_A": None}, "2 entries are missing|1 entries are missing"),
        ({"2.q.lora_A": (2, 6)}, "too many, such as 'base_model.model.layers.2.q"),
    ],
)
def test_weights_that_are_not_right(tmp_path, change, message):
    save(tmp_path)
    path = tmp_path / "client-20" / WEIGHTS
    tensors = load_file(path)
    for name, shape in change.items():
        key = f"base_model.model.layers.{name}.weight"
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = torch.ones(shape)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"client-20/{WEIGHTS} .*({message})"):
        load_adapters(tmp_path)


@pytest.mark.parametrize("name", ["clients.json", f"client-20/{CONFIG}"])
@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000])
def test_files_that_no_parser_takes(tmp_path, name, text):
    save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.* is damaged: it is no JSON"):
        load_adapters(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, bad):
    """Everything that such an adapter predicts would be nan."""
    adapters = adapters_of()
    adapters["layers.1.q.lora_B"][1, 2, 1] = bad
    save(tmp_path, adapters=adapters)
    message = f"client-20/{WEIGHTS} is damaged: layers.1.q.lora_B has numbers that are not finite"
    with pytest.raises(ValueError, match=message):
        load_adapters(tmp_path)


def test_other_precisions_are_read_as_float32(tmp_path):
    save(tmp_path)
    for client in (10, 20, 30):
        path = tmp_path / f"client-{client}" / WEIGHTS
        save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    adapters = load_adapters(tmp_path)[0]
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    torch.testing.assert_close(flat(adapters), flat(adapters_of()), rtol=1e-2, atol=1e-2)
