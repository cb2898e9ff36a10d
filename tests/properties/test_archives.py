"""Files of strangers: damaged, cut off, hostile. What is read is right, or refused by name."""

import json
import stat
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrecsk.datasets import load_interactions, load_movielens
from fedrecsk.engine.checkpoints import Checkpoints, fingerprint
from fedrecsk.engine.rounds import Progress
from fedrecsk.models.adapter_files import load_adapters, save_adapters
from tests.properties.documented import TALLY, Refused, outcome
from tests.properties.strategies import examples

FILE_ERRORS = (ValueError, TypeError, OSError)

# Damage --------------------------------------------------------------------------------------


@st.composite
def damage(draw):
    """Give a function that damages bytes: flips, cuts, and other bytes in their place."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "flip", "cut", "drop", "repeat", "write", "zeros"]),
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 7),
                st.binary(min_size=1, max_size=8),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def apply(whole: bytes) -> bytes:
        found = bytearray(whole)
        for kind, where, bit, content in steps:
            if not found:
                break
            place = int(where * len(found))
            TALLY["archives / faults"] += 1
            if kind == "flip":
                found[place] ^= 1 << bit
            elif kind == "cut":
                del found[place:]
            elif kind == "drop":
                del found[place : place + len(content)]
            elif kind == "repeat":
                found[place:place] = found[place : place + 8 * (bit + 1)]
            else:
                found[place : place + len(content)] = (
                    content if kind == "write" else bytes(len(content))
                )
        return bytes(found)

    return apply


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def loaded(load, path, *, outside):
    """Load a file; nothing may be written anywhere near it."""
    before = tree(outside)
    found = outcome("archives", lambda: load(path), FILE_ERRORS, ())
    assert tree(outside) == before
    if isinstance(found, Refused):
        assert Path(path).name in str(found)
    return found


def check_bunch(bunch):
    """A result has the documented shape, whatever its numbers are."""
    assert bunch.data.ndim == 2
    assert 2 <= bunch.data.shape[1] <= 4
    assert len(bunch.data) > 0
    assert bunch.data.dtype.kind in "ifO"
    assert bunch.data.dtype.kind != "f" or np.isfinite(bunch.data).all()
    assert bunch.target is None or len(bunch.target) == len(bunch.data)
    assert all(isinstance(text, str) for text in bunch.item_text.values())


# MovieLens -----------------------------------------------------------------------------------

RATINGS = "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n"
MOVIES = "661::James: a Peach::Animation|Musical\n1193::Coup à la carte::Drama\n"
U_DATA = "196\t242\t3\t881250949\n186\t302\t3\t891717742\n196\t302\t5\t881250950\n"
U_ITEM = "242|Kolya|24-Jan-1997|||" + "|".join("0" * 5 + "1" + "0" * 13) + "\n"
LAYOUTS = {
    "1m": {"ratings.dat": RATINGS, "movies.dat": MOVIES},
    "100k": {"u.data": U_DATA, "u.item": U_ITEM},
}
ODD_LINES = [
    "", " ", "::", "1::2::3", "1::2::3::4::5", "1::2::3::x", "1::2::nan::4", "1::2::1e400::4",
    "1::2::1e300::4", "9007199254740993::2::3::4", "9" * 40 + "::2::3::4", "-1::-2::-3::-4",
    "1.5::2.5::3.5::4.5", "0x10::2::3::4", "1_0::2::3::4", "\x00", "\ufeff1::2::3::4",
    "#1::2::3::4", '"1"::2::3::4', "1::2::3::4 # x", "\xa0", "\x85", "\x0b", "1\t2::3\t4",
    "661::A::B::C", "662::Tïtle::", "x::Title::Drama", "9" * 5000 + "::Title::Drama",
    "663|T||||" + "0|" * 19,
]  # fmt: skip
ENCODINGS = ["latin-1", "latin-1", "utf-8", "utf-16", "utf-8-sig", "cp037"]


@st.composite
def texts(draw, plain):
    """A file of a data set with odd lines, line ends and encodings."""
    lines = plain.splitlines()
    for _ in range(draw(st.integers(0, 2))):
        TALLY["archives / faults"] += 1
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(ODD_LINES)))
    end = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    text = end.join(lines) + draw(st.sampled_from(["", end, end * 2]))
    return text.encode(draw(st.sampled_from(ENCODINGS)), errors="replace")


@settings(max_examples=examples(40))
@given(st.data())
def test_movielens_of_odd_lines(tmp_path_factory, data):
    outside = tmp_path_factory.mktemp("odd")
    folder = outside / "files"
    folder.mkdir()
    for name, plain in LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))].items():
        (folder / name).write_bytes(data.draw(texts(plain)))
    found = loaded(load_movielens, folder, outside=outside)
    if not isinstance(found, Refused):
        check_bunch(found)
        assert found.data.shape[1] == 4


MEMBERS = [
    "ml/ratings.dat", "ratings.dat", "ml/movies.dat", "movies.dat", "u.data", "u.item", "ml/u.data",
    "../ratings.dat", "../../movies.dat", "/etc/ratings.dat", "C:\\ratings.dat", "..\\movies.dat",
    "ml/", "ratings.dat/", "__MACOSX/ratings.dat", "ml/./ratings.dat", "r\u0301atings.dat",
    "ratings.dat\0.txt", "a" * 300 + "/movies.dat",
]  # fmt: skip
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@st.composite
def members(draw):
    """Name, content, method, and whether it is a link."""
    name = draw(st.sampled_from(MEMBERS))
    plain = RATINGS if "ratings" in name else U_DATA if "u.data" in name else MOVIES
    content = draw(
        st.one_of(st.just(plain.encode("latin-1")), texts(plain), st.binary(max_size=40))
    )
    is_link = draw(st.sampled_from([False, False, False, True]))
    return name, b"/etc/passwd" if is_link else content, draw(st.sampled_from(METHODS)), is_link


def write_zip(path, found):
    """Write an archive; two members may have one name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")
        with zipfile.ZipFile(path, "w") as archive:
            for name, content, method, is_link in found:
                info = zipfile.ZipInfo(name)
                info.compress_type = method
                if is_link:
                    info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, content)
    return path


@settings(max_examples=examples(30))
@given(found=st.lists(members(), min_size=1, max_size=4), harm=st.none() | damage())
def test_archives_of_odd_members(tmp_path_factory, found, harm):
    """Paths that lead out, links, twins, other methods, and damage on top."""
    outside = tmp_path_factory.mktemp("members")
    path = write_zip(outside / "a.zip", found)
    TALLY["archives / faults"] += len(found)
    if harm is not None:
        path.write_bytes(harm(path.read_bytes()))
    bunch = loaded(load_movielens, path, outside=outside)
    if not isinstance(bunch, Refused):
        check_bunch(bunch)


# Tables --------------------------------------------------------------------------------------

FRAME = pd.DataFrame(
    {
        "user_id": ["ann", "bob", "ann", "cem"],
        "item_id": [3, 5, 5, 2**40],
        "rating": [1.0, 4.5, 2.0, 3.0],
        "timestamp": pd.to_datetime(["2020-01-01", "2021-01-01", "2020-06-01", "1969-01-01"]),
        "client_id": ["x", "y", "x", "y"],
    }
)
CSV_LINES = [
    "", ",", "a", "a,b,c,d,e,f", '"', '"a', 'a"b,1,2,3,4', "ann,1,x,3,x", "ann,1,1e400,3,x",
    "ann,1,99999999999999999999,3,x", "ann,1,1,99999999999999999999,x", "ann,1,1,now,x",
    "ann,1,1,99999999-01-01,x", "ann,1,1,2020-01-01,y", "ann,,1,2,x", "a\0,1,1,2,x",
    "ann,1,1_0,2,x",
    "\ud7ff,9999999999999999999999,1,1,x", "ann,1,1,NaT,x", "ann,-0,1,1,x", "\x00,1,1,1,x",
    "x" * 2000 + ",1,1,1,x",
]  # fmt: skip


@settings(max_examples=examples(40))
@given(
    data=st.data(),
    encoding=st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]),
    harm=st.none() | damage(),
)
def test_csv_of_odd_lines(tmp_path_factory, data, encoding, harm):
    outside = tmp_path_factory.mktemp("csv")
    lines = FRAME.astype({"timestamp": "int64"}).to_csv(index=False).splitlines()
    for line in data.draw(st.lists(st.sampled_from(CSV_LINES), max_size=2)):
        TALLY["archives / faults"] += 1
        lines.insert(data.draw(st.integers(0, len(lines))), line)
    raw = "\n".join(lines).encode(encoding, errors="replace")
    path = outside / "shop.csv"
    path.write_bytes(raw if harm is None else harm(raw))
    found = loaded(load_interactions, path, outside=outside)
    if not isinstance(found, Refused):
        check_bunch(found)


def parquet_bytes(folder, frame, **options):
    path = folder / "whole.parquet"
    pq.write_table(pa.Table.from_pandas(frame), path, **options)
    raw = path.read_bytes()
    path.unlink()
    return raw


@settings(max_examples=examples(40))
@given(harm=damage(), compression=st.sampled_from(["none", "snappy", "zstd"]), sums=st.booleans())
def test_parquet_that_is_damaged(tmp_path_factory, harm, compression, sums):
    outside = tmp_path_factory.mktemp("parquet")
    raw = parquet_bytes(outside, FRAME, compression=compression, write_page_checksum=sums)
    for name in ("a.parquet", "interactions.parquet"):
        (outside / name).write_bytes(harm(raw))
    titles = pd.DataFrame({"item_id": [3, 5], "title": ["Tea", "Jam"]})
    (outside / "items.parquet").write_bytes(harm(parquet_bytes(outside, titles)))
    found = loaded(load_interactions, outside / "a.parquet", outside=outside)
    if not isinstance(found, Refused):
        check_bunch(found)
    before = tree(outside)
    found = outcome("archives", lambda: load_interactions(outside), FILE_ERRORS, ())
    assert tree(outside) == before
    if not isinstance(found, Refused):
        check_bunch(found)


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


# Checkpoints ---------------------------------------------------------------------------------

START = {"table": torch.zeros(3, 4), "steps": torch.zeros(2, dtype=torch.int64), "none": None}


def checkpoint_of(folder):
    history = [{"round": t + 1, "loss": 0.1 * t, "seconds": 0.25} for t in range(3)]
    state = {
        "table": torch.arange(12.0).reshape(3, 4) / 7,
        "steps": torch.tensor([3, -1]),
        "none": np.arange(3),
    }
    Checkpoints(folder, {"rate": 0.1}, {"users": np.arange(4)}).save(
        Progress(state, state, 0.5, 1, history)
    )


def resume(folder):
    return Checkpoints(folder, {"rate": 0.1}, {"users": np.arange(4)}).load(START, 10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a folder of a fit, by name; and the mark of what is in it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint_of(folder)
    return tree(folder), fingerprint(resume(folder))


@settings(max_examples=examples(60))
@given(harm=damage(), name=st.sampled_from([0, 1]))
def test_checkpoints_come_back_whole_or_not_at_all(tmp_path_factory, checkpoint, harm, name):
    """Damage that leaves a file readable must not become another fit."""
    files, expected = checkpoint
    folder = tmp_path_factory.mktemp("fit")
    name = sorted(files)[name]
    put(folder, {**files, name: harm(files[name])})
    before = tree(folder)
    found = outcome("archives", lambda: resume(folder), warned=())
    assert tree(folder) == before
    if isinstance(found, Refused):
        assert folder.name in str(found)
    else:
        assert fingerprint(found) == expected


# Adapters ------------------------------------------------------------------------------------

ABOUT = {"base_model": "tiny", "rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q"]}
ADAPTERS = {
    "0.q.lora_A": torch.arange(24.0).reshape(2, 2, 6) / 7,
    "0.q.lora_B": torch.arange(16.0).reshape(2, 4, 2) / 7,
}
ADAPTER_FILES = [
    "clients.json", "client-7/adapter_config.json", "client-7/adapter_model.safetensors"
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a folder of adapters, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder, ADAPTERS, [7, 8], **ABOUT)
    return {name: content for name, content in tree(folder).items() if content is not None}


def load_in(folder):
    before = tree(folder)
    found = outcome("archives", lambda: load_adapters(folder), FILE_ERRORS, ())
    assert tree(folder) == before
    if not isinstance(found, Refused):
        adapters, clients, settings = found
        assert {name: tuple(value.shape) for name, value in adapters.items()} == {
            name: tuple(value.shape) for name, value in ADAPTERS.items()
        }
        assert all(value.isfinite().all() for value in adapters.values())
        assert len(clients) == 2
        assert settings.keys() >= {"rank", "alpha"}
        assert all(map(np.isfinite, (settings["alpha"], settings["dropout"])))
    return found


@settings(max_examples=examples(40))
@given(harm=damage(), name=st.sampled_from(ADAPTER_FILES))
def test_adapters_that_are_damaged(tmp_path_factory, saved, harm, name):
    folder = tmp_path_factory.mktemp("adapters")
    put(folder, {**saved, name: harm(saved[name])})
    load_in(folder)


ODD_VALUES = st.sampled_from(
    [None, True, -1, 0, 0.5, 10**400, float("inf"), float("nan"), "", "x", "1", [], [1], ["q", 3],
     {}, {"a": 1}, "../x", "float16", "object", "uint8"]
)  # fmt: skip


@settings(max_examples=examples(40))
@given(data=st.data(), name=st.sampled_from(ADAPTER_FILES[:2]), value=ODD_VALUES)
def test_adapters_with_odd_settings(tmp_path_factory, saved, data, name, value):
    """Another value at any place of the JSON."""
    folder = tmp_path_factory.mktemp("adapters")
    found = json.loads(saved[name])
    owner, key = data.draw(st.sampled_from(list(places(found))))
    owner[key] = value
    TALLY["archives / faults"] += 1
    put(folder, {**saved, name: json.dumps(found).encode()})
    load_in(folder)


def places(found):
    """Every place of a JSON value: what holds it, and its key."""
    pairs = found.items() if isinstance(found, dict) else enumerate(found)
    for key, value in pairs:
        yield found, key
        if isinstance(value, dict | list):
            yield from places(value)
