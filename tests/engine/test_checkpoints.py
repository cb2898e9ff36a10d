import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedrecsk.engine import checkpoints
from fedrecsk.engine.checkpoints import RECORD, TENSORS, Checkpoints, describe, fingerprint
from fedrecsk.engine.rounds import Progress

SETTINGS = {"rate": 0.1, "sizes": (8, 16), "share": 1.0, "kind": "bce"}
DATA = {"users": np.arange(4), "items": np.array(["a", "b"]), "interactions": [np.arange(6)]}
START = {"table": torch.zeros(2, 3), "steps": torch.zeros(2, dtype=torch.int64)}


def open_folder(folder, settings=SETTINGS, data=DATA):
    return Checkpoints(folder, settings, data)


def progress_after(n_rounds):
    state = {
        "table": torch.full((2, 3), float(n_rounds)),
        "steps": torch.tensor([n_rounds, -1]),
    }
    history = [{"round": t + 1, "loss": 0.1 * t, "r2": math.nan} for t in range(n_rounds)]
    return Progress(state, START, -math.inf, n_rounds - 1, history)


def load(folder, **changes):
    return open_folder(folder, **changes).load(START, 10)


def assert_same(found, expected):
    assert str(found.history) == str(expected.history)  # nan is not equal to itself
    assert (found.best_value, found.waited) == (expected.best_value, expected.waited)
    for one, other in (
        (found.state, expected.state),
        (found.best_state, expected.best_state),
    ):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name].dtype == value.dtype
            assert torch.equal(one[name], value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert load(folder) is None
    writer = open_folder(folder)
    for n_rounds in (1, 2, 10):
        writer.save(progress_after(n_rounds))
        assert_same(load(str(folder)), progress_after(n_rounds))
        tensors, record = names(folder)
        assert tensors.startswith(f"{n_rounds}-")
        assert (tensors[-len(TENSORS) :], record) == (TENSORS, RECORD)


def test_the_files_are_json_and_safetensors(tmp_path):
    open_folder(tmp_path).save(progress_after(2))

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    record = json.loads((tmp_path / RECORD).read_text(), parse_constant=refuse)
    assert record["settings"] == {"rate": 0.1, "sizes": [8, 16], "share": 1.0, "kind": "bce"}
    assert record["data"].keys() == DATA.keys()
    assert record["format"] == checkpoints.FORMAT
    assert record["versions"].keys() == {"fedrecsk", "numpy", "torch"}
    assert record["progress"]["$fields"]["history"][1]["round"] == 2


CHANGES = ["save_file", "fsync", "replace", "fsync", "write_text", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("fatal", range(len(CHANGES) + 2))
def test_a_fit_killed_while_it_writes_leaves_the_one_before(tmp_path, monkeypatch, fatal):
    """Kill it before each of its changes to the disk, from the first to the last."""
    writer = open_folder(tmp_path)
    writer.save(progress_after(1))
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
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(Path, "write_text", dying(Path.write_text))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        try:
            writer.save(progress_after(2))
        except KeyboardInterrupt:
            survived = False
        else:
            survived = True
    assert changes == [*CHANGES, "unlink"][:fatal]
    assert survived == (fatal == len(CHANGES) + 1)
    after = 2 if fatal >= 7 else 1  # once the new record is in its place
    assert_same(load(tmp_path), progress_after(after))
    # Another process goes on, and leaves nothing of the failed attempt.
    again = open_folder(tmp_path)
    again.load(START, 10)
    again.save(progress_after(2))
    assert len(names(tmp_path)) == 2
    assert_same(load(tmp_path), progress_after(2))


def test_half_a_file_written_is_not_the_checkpoint(tmp_path, monkeypatch):
    writer = open_folder(tmp_path)
    writer.save(progress_after(1))

    def half(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        writer.save(progress_after(2))
    assert_same(load(tmp_path), progress_after(1))


def test_files_of_others_stay(tmp_path):
    others = [tmp_path / f"my.{TENSORS}", tmp_path / "1-notes.txt"]
    for other in others:
        other.write_text("mine")
    open_folder(tmp_path).save(progress_after(1))
    assert [other.read_text() for other in others] == ["mine", "mine"]


def test_two_fits_do_not_write_into_one_folder(tmp_path):
    one, other = open_folder(tmp_path), open_folder(tmp_path)
    assert one.load(START, 10) is other.load(START, 10) is None
    one.save(progress_after(1))
    with pytest.raises(RuntimeError, match=r"Another fit writes .* a folder of its own"):
        other.save(progress_after(1))
    one.save(progress_after(2))
    # Nor do two that go on from the same checkpoint.
    third, fourth = open_folder(tmp_path), open_folder(tmp_path)
    for each in (third, fourth):
        assert_same(each.load(START, 10), progress_after(2))
    third.save(progress_after(3))
    with pytest.raises(RuntimeError, match="Another fit writes"):
        fourth.save(progress_after(3))
    assert_same(load(tmp_path), progress_after(3))


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path):
    writer = open_folder(tmp_path / "fit")
    writer.save(progress_after(1))
    for path in (tmp_path / "fit").iterdir():
        path.unlink()
    (tmp_path / "fit").rmdir()
    writer.save(progress_after(2))
    assert_same(load(tmp_path / "fit"), progress_after(2))


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_path_that_is_no_folder_is_refused_at_once(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoint must be a folder .*file.* Give another"):
        open_folder(file / below)
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(**where):
        raise PermissionError(13, "Permission denied", str(where["dir"]))

    monkeypatch.setattr(checkpoints.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot be \(PermissionError.*Permission denied"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "data", "difference"),
    [
        ({"rate": 0.05}, {}, "rate: 0.1 there, 0.05 here"),
        ({"share": 1}, {}, "share: 1.0 there, 1 here"),
        ({"kind": None}, {}, "kind: 'bce' there, None here"),
        ({"sizes": (8, 32)}, {}, r"sizes: \[8, 16\] there, \[8, 32\] here"),
        ({"sizes": np.arange(1000)}, {}, "sizes: other values"),
        ({"gate": True}, {}, "gate: not set there, True here"),
        ({}, {"interactions": [np.arange(5)]}, "another fit than this one: the interactions diff"),
        ({}, {"users": 1, "items": 2}, "the items and the users differ"),
        ({}, {"item texts": ["x"]}, "the item texts differ"),
        ({"rate": 1.0}, {"users": 1}, "rate: 0.1 there, 1.0 here; the users differ. Give the same"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused_with_the_difference(
    tmp_path, settings, data, difference
):
    open_folder(tmp_path).save(progress_after(1))
    with pytest.raises(ValueError, match=difference):
        load(tmp_path, settings=SETTINGS | settings, data=DATA | data)
    assert_same(load(tmp_path), progress_after(1))


def test_a_part_of_the_data_may_be_identified_later(tmp_path):
    writer = open_folder(tmp_path)
    writer.identify("item texts", ("x", "y"))
    writer.save(progress_after(1))
    reader = open_folder(tmp_path)
    with pytest.raises(ValueError, match="the item texts differ"):
        reader.load(START, 10)
    reader.identify("item texts", ("x", "y"))
    assert_same(reader.load(START, 10), progress_after(1))


def test_other_versions_are_named_with_a_difference_but_are_none(tmp_path, monkeypatch):
    open_folder(tmp_path).save(progress_after(1))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert_same(load(tmp_path), progress_after(1))
    with pytest.raises(ValueError, match=r"rate: .*; and it was written by .*'2\.99\.0' here"):
        load(tmp_path, settings=SETTINGS | {"rate": 1.0})


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise checkpoints.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checkpoints.importlib.metadata, "version", missing)
    assert checkpoints.library_versions()["fedrecsk"] == "unknown"


def test_more_rounds_than_wanted_are_refused(tmp_path):
    open_folder(tmp_path).save(progress_after(3))
    assert open_folder(tmp_path).load(START, 3).waited == 2
    with pytest.raises(ValueError, match=r"is 3 rounds on, and n_rounds=2\. Raise n_rounds, or"):
        open_folder(tmp_path).load(START, 2)


def test_another_model_is_refused(tmp_path):
    open_folder(tmp_path).save(progress_after(1))
    for start in ({**START, "table": torch.zeros(2, 4)}, {"other": START["table"]}):
        with pytest.raises(ValueError, match=r"is of another model.*state\.state.* there and"):
            open_folder(tmp_path).load(start, 10)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"a": 1}'])
def test_a_damaged_record_says_so(tmp_path, text):
    writer = open_folder(tmp_path)
    writer.save(progress_after(1))
    (tmp_path / RECORD).write_bytes(text)
    with pytest.raises(ValueError, match=r"cannot be read.*Remove the folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read.*Remove the folder"):
        writer.save(progress_after(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "is in format 1, and this version of fedrecsk reads format 2"),
        ({"settings": 3}, "cannot be read"),
        ({"progress": None}, "is of another model"),
        ({"progress": []}, "is of another model"),
        ({"progress": {"$fields": 5}}, "cannot be read"),
        ({"progress": {"$fields": {"state": 1}}}, "is of another model"),
        ({"progress": {"$tensor": "gone"}}, "cannot be read"),
    ],
)
def test_a_record_that_was_tampered_with_says_so(tmp_path, changes, message):
    open_folder(tmp_path).save(progress_after(1))
    record = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps(record | changes))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 60, -1])
def test_damaged_tensors_say_so(tmp_path, kept):
    open_folder(tmp_path).save(progress_after(1))
    path = next(tmp_path.glob(f"*.{TENSORS}"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cannot be read.*Remove the folder"):
        load(tmp_path)


def test_tensors_that_lack_say_so(tmp_path):
    open_folder(tmp_path).save(progress_after(1))
    save_file({"x": torch.ones(1)}, next(tmp_path.glob(f"*.{TENSORS}")))
    with pytest.raises(ValueError, match=r"cannot be read \(KeyError"):
        load(tmp_path)


def test_values_that_changed_on_the_disk_are_refused(tmp_path):
    """Still JSON, still tensors of the right shapes, but not what was written."""
    open_folder(tmp_path).save(progress_after(2))
    path = next(tmp_path.glob(f"*.{TENSORS}"))
    record = (tmp_path / RECORD).read_text()
    (tmp_path / RECORD).write_text(record.replace('"loss": 0.1', '"loss": 0.3'))
    with pytest.raises(ValueError, match=r"cannot be read .*checksums.*Remove the folder"):
        load(tmp_path)
    (tmp_path / RECORD).write_text(record)
    assert_same(load(tmp_path), progress_after(2))
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 16  # in the last of the numbers
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"cannot be read .*checksums.*Remove the folder"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "9" * 5_000])
def test_records_that_no_parser_takes_say_so(tmp_path, text):
    writer = open_folder(tmp_path)
    writer.save(progress_after(1))
    (tmp_path / RECORD).write_text(text)
    for call in (lambda: load(tmp_path), lambda: writer.save(progress_after(2))):
        with pytest.raises(ValueError, match=r"cannot be read.*Remove the folder"):
            call()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "..", "", "gone.safetensors", 5, "x" * 5_000, "a\0"]
)
def test_no_path_leads_out_of_the_folder(tmp_path, name):
    save_file({"secret": torch.ones(1)}, tmp_path / "secret")
    folder = tmp_path / "checkpoint"
    open_folder(folder).save(progress_after(1))
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "tensors": name}))
    with pytest.raises(ValueError, match="which is not there"):
        load(folder)


def test_parameters_are_told_apart():
    values = [
        None, True, 1, 1.0, "1", 0.1, float("inf"), (8, 16), (8, 16.0), {1: 2}, {"1": 2},
        {1: 2, 3: 4}, [[1, 2]], np.arange(2000), np.arange(2000) + 1, print, len, Path,
        functools.partial(print, 1), functools.partial(print, 2),
        functools.partial(print, end=""),
    ]  # fmt: skip
    texts = [json.dumps(describe(value)) for value in values]
    same = {(9, 12)}  # a mapping and a list of pairs are no alternatives of one parameter
    for first, one in enumerate(texts):
        assert json.loads(one) == describe(values[first])
        for second in range(first):
            assert (one == texts[second]) == ((second, first) in same)


def test_parameters_that_mean_the_same_are_the_same():
    assert describe(np.float64(0.1)) == describe(0.1)
    assert describe([8, 16]) == describe((8, 16)) == describe(np.array([8, 16]))
    assert describe({"a": 1, "b": 2}) == describe({"b": 2, "a": 1})
    assert describe(Path("x") / "y") == describe(str(Path("x/y")))


def test_fingerprints_tell_data_apart():
    parts = {"user": np.arange(6), "text": np.array(["ab", "c"]), "n": 8}
    mark = fingerprint(parts)
    assert mark == fingerprint(dict(reversed(parts.items())))
    assert mark == fingerprint({**parts, "user": np.arange(12)[::2] // 2})
    assert mark == fingerprint({**parts, "user": torch.arange(6)})
    others = [
        {**parts, "n": 4},
        {**parts, "n": 8.0},
        {**parts, "n": "8"},
        {**parts, "n": [8]},
        {**parts, "n": None},
        {**parts, "user": np.arange(6)[::-1]},
        {**parts, "user": np.arange(6).reshape(2, 3)},
        {**parts, "user": np.arange(6).astype(np.int32)},
        {**parts, "text": np.array(["a", "bc"])},
        {**parts, "text": ("ab", "c")},
        {**parts, "text": ("a", "bc")},
        {"user": parts["user"], "n": 8},
        {"item": parts["user"], "text": parts["text"], "n": 8},
        progress_after(1),
        progress_after(2),
    ]
    marks = {fingerprint(other) for other in others}
    assert len(marks) == len(others)
    assert mark not in marks
    with pytest.raises(TypeError, match="A set cannot be hashed"):
        fingerprint([{1, 2}])


def test_fingerprints_of_objects_are_those_of_their_texts():
    ids = np.array(["ann", "bob"], dtype=object)
    assert fingerprint(ids) == fingerprint(ids.astype(str))
