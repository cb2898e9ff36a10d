import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedrecsk.engine import checkpoints
from fedrecsk.engine.checkpoints import (
    RECORD,
    TENSORS,
    Checkpoint,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)

MARK = "a" * 64


def checkpoint_after(n_rounds):
    tensors = {
        "adapters/q.lora_A": torch.full((2, 3), float(n_rounds)),
        "moments": torch.tensor([n_rounds, -1]),
        "best": torch.tensor([-torch.inf, torch.nan], dtype=torch.float64),
    }
    return Checkpoint(tensors, [{"round": t + 1, "loss": 0.1 * t} for t in range(n_rounds)])


def assert_same(found, expected):
    assert found.history == expected.history
    assert found.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert found.tensors[name].dtype == value.dtype
        torch.testing.assert_close(found.tensors[name], value, rtol=0, atol=0, equal_nan=True)


def test_what_is_saved_is_loaded(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert load_checkpoint(folder, MARK) is None
    for n_rounds in (1, 2, 10):
        save_checkpoint(folder, checkpoint_after(n_rounds), MARK)
        assert_same(load_checkpoint(str(folder), MARK), checkpoint_after(n_rounds))
        assert sorted(path.name for path in folder.iterdir()) == [f"{n_rounds}.{TENSORS}", RECORD]
    save_checkpoint(folder, checkpoint_after(10), MARK)  # again
    assert_same(load_checkpoint(folder, MARK), checkpoint_after(10))


def test_tensors_may_share_memory_or_be_views(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    tensors = {"one": whole, "same": whole, "part": whole[1], "turned": whole.T}
    save_checkpoint(tmp_path, Checkpoint(tensors, []), MARK)
    assert_same(load_checkpoint(tmp_path, MARK), Checkpoint(tensors, []))


def test_numbers_that_json_has_no_name_for(tmp_path):
    history = [{"round": 1, "loss": 0.1 + 0.2, "client_losses": [float("nan"), 1e-300]}]
    save_checkpoint(tmp_path, Checkpoint({"a": torch.ones(1)}, history), MARK)
    found = load_checkpoint(tmp_path, MARK).history
    assert found[0]["loss"] == history[0]["loss"]
    assert np.isnan(found[0]["client_losses"][0])
    assert found[0]["client_losses"][1] == 1e-300


@pytest.mark.parametrize("fatal", range(6))
def test_a_fit_killed_while_it_writes_leaves_the_one_before(tmp_path, monkeypatch, fatal):
    """Kill it before each of its changes to the disk, from the first to the last."""
    save_checkpoint(tmp_path, checkpoint_after(1), MARK)
    changes = []

    def dying(function):
        def call(*args, **kwargs):
            if len(changes) == fatal:
                raise KeyboardInterrupt
            changes.append(function.__name__)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", dying(checkpoints.save_file))
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(checkpoints.Path, "write_text", dying(checkpoints.Path.write_text))
        patch.setattr(checkpoints.Path, "unlink", dying(checkpoints.Path.unlink))
        try:
            save_checkpoint(tmp_path, checkpoint_after(2), MARK)
        except KeyboardInterrupt:
            survived = False
        else:
            survived = True
    assert changes == ["save_file", "replace", "write_text", "replace", "unlink"][:fatal]
    assert survived == (fatal == 5)
    after = 2 if fatal >= 4 else 1  # once the new record is in its place
    assert_same(load_checkpoint(tmp_path, MARK), checkpoint_after(after))
    # It goes on, and leaves nothing of the failed attempt.
    save_checkpoint(tmp_path, checkpoint_after(2), MARK)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"2.{TENSORS}", RECORD]


def test_half_a_file_written_is_not_the_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint_after(1), MARK)

    def half(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, checkpoint_after(2), MARK)
    assert_same(load_checkpoint(tmp_path, MARK), checkpoint_after(1))


def test_files_of_others_stay(tmp_path):
    other = tmp_path / f"my.{TENSORS}"
    other.write_text("mine")
    save_checkpoint(tmp_path, checkpoint_after(1), MARK)
    assert other.read_text() == "mine"


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    save_checkpoint(tmp_path, checkpoint_after(1), MARK)
    with pytest.raises(ValueError, match="other data, parameters or random state"):
        load_checkpoint(tmp_path, "b" * 64)
    assert_same(load_checkpoint(tmp_path, MARK), checkpoint_after(1))


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"mark": "' + MARK.encode() + b'"}',
        b'{"mark": "' + MARK.encode() + b'", "tensors": "1.state.safetensors", "history": 3}',
    ],
)
def test_a_damaged_record_says_so(tmp_path, record):
    save_checkpoint(tmp_path, checkpoint_after(1), MARK)
    (tmp_path / RECORD).write_bytes(record)
    with pytest.raises(ValueError, match=r"cannot be read.*Remove the folder"):
        load_checkpoint(tmp_path, MARK)


@pytest.mark.parametrize("kept", [0, 3, 60, -1])
def test_damaged_tensors_say_so(tmp_path, kept):
    save_checkpoint(tmp_path, checkpoint_after(1), MARK)
    path = tmp_path / f"1.{TENSORS}"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cannot be read.*Remove the folder"):
        load_checkpoint(tmp_path, MARK)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "", "gone.safetensors", 5])
def test_no_path_leads_out_of_the_folder(tmp_path, name):
    save_file({"secret": torch.ones(1)}, tmp_path / "secret")
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, checkpoint_after(1), MARK)
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "tensors": name}))
    with pytest.raises(ValueError, match="which is not there"):
        load_checkpoint(folder, MARK)


def test_fingerprints_tell_fits_apart():
    settings = {"rank": 8, "name": "x"}
    arrays = {"user": np.arange(6), "text": np.array(["ab", "c"])}
    mark = fingerprint(settings, arrays)
    assert mark == fingerprint(dict(reversed(settings.items())), dict(reversed(arrays.items())))
    assert mark == fingerprint(settings, {**arrays, "user": np.arange(12)[::2] // 2})
    others = [
        ({**settings, "rank": 4}, arrays),
        ({**settings, "rank": "8"}, arrays),
        (settings, {**arrays, "user": np.arange(6)[::-1]}),
        (settings, {**arrays, "user": np.arange(6).reshape(2, 3)}),
        (settings, {**arrays, "user": np.arange(6).astype(np.int32)}),
        (settings, {**arrays, "text": np.array(["a", "bc"])}),
        (settings, {"user": arrays["user"]}),
        (settings, {"item": arrays["user"], "text": arrays["text"]}),
    ]
    marks = {fingerprint(*other) for other in others}
    assert len(marks) == len(others)
    assert mark not in marks


def test_fingerprints_of_objects_are_those_of_their_texts():
    ids = np.array(["ann", "bob"], dtype=object)
    assert fingerprint({}, {"users": ids}) == fingerprint({}, {"users": ids.astype(str)})
