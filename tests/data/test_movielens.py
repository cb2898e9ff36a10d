"""MovieLens archives: the real ones where they are at hand, tiny ones made here otherwise."""

import hashlib
import io
import os
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest

from fedrecsk.data import movielens
from fedrecsk.datasets import fetch_movielens, load_movielens

DATA = Path(os.environ.get("FEDRECSK_DATA") or Path(__file__).parents[3] / "shared" / "data")

U_DATA = "196\t242\t3\t881250949\n186\t302\t3\t891717742\n196\t302\t5\t881250950\n"
U_ITEM = (
    "242|Kolya (1996)|24-Jan-1997||http://us.imdb.com/|" + "|".join("0" * 5 + "1" + "0" * 13) + "\n"
    "302|Misérables, Les (1995)|01-Jan-1997|||" + "|".join("0" * 6 + "101" + "0" * 10) + "\n"
)
RATINGS = "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n"
MOVIES = "661::James: a Peach::Animation|Musical\n1193::Coup de Torchon à la carte::Drama\n"

FILES_100K = {"u.data": U_DATA, "u.item": U_ITEM}
FILES_1M = {"ratings.dat": RATINGS, "movies.dat": MOVIES}


def write_zip(path, files, folder="ml/", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, text in files.items():
            archive.writestr(folder + name, text.encode("latin-1"))
    return path


def write_folder(path, files):
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_bytes(text.encode("latin-1"))
    return path


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is missing; set FEDRECSK_DATA to a folder that has {name}")
    return path


def check_100k(bunch):
    assert bunch.data.dtype == np.int64
    expected = [line.split("\t") for line in U_DATA.splitlines()]
    assert bunch.data.tolist() == [list(map(int, fields)) for fields in expected]
    assert bunch.target.tolist() == [196, 186, 196]
    assert bunch.feature_names == ["user_id", "item_id", "rating", "timestamp"]
    assert bunch.item_text == {242: "Kolya (1996)", 302: "Misérables, Les (1995)"}
    assert bunch.genres == {242: ("Comedy",), 302: ("Crime", "Drama")}


def check_1m(bunch):
    assert bunch.data.dtype == np.int64
    expected = [line.split("::") for line in RATINGS.splitlines()]
    assert bunch.data.tolist() == [list(map(int, fields)) for fields in expected]
    assert bunch.item_text == {661: "James: a Peach", 1193: "Coup de Torchon à la carte"}
    assert bunch.genres == {661: ("Animation", "Musical"), 1193: ("Drama",)}


@pytest.mark.parametrize("folder", ["", "ml-100k/", "some/where/deep/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_are_read_wherever_the_files_lie(tmp_path, folder, method):
    check_100k(load_movielens(write_zip(tmp_path / "a.zip", FILES_100K, folder, method)))
    check_1m(load_movielens(str(write_zip(tmp_path / "b.zip", FILES_1M, folder, method))))


def test_nothing_is_unpacked(tmp_path):
    load_movielens(write_zip(tmp_path / "a.zip", FILES_100K))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("folder", ["", "ml"])
def test_folders_are_read(tmp_path, folder):
    write_folder(tmp_path / "a" / folder, FILES_100K)
    check_100k(load_movielens(tmp_path / "a"))
    write_folder(tmp_path / "b" / folder, FILES_1M)
    check_1m(load_movielens(tmp_path / "b"))


def test_windows_line_ends_and_blank_last_lines(tmp_path):
    files = {name: text.replace("\n", "\r\n") + "\r\n" for name, text in FILES_100K.items()}
    check_100k(load_movielens(write_zip(tmp_path / "a.zip", files)))
    files = {name: text.rstrip("\n") for name, text in FILES_1M.items()}
    check_1m(load_movielens(write_zip(tmp_path / "b.zip", files)))


def test_the_file_nearest_to_the_top_counts(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/u.data", "rubbish")
        archive.writestr("old/copy/u.data", "rubbish")
        for name, text in FILES_100K.items():
            archive.writestr(f"ml/{name}", text.encode("latin-1"))
        archive.writestr("ml/copy/u.data", "rubbish")
    check_100k(load_movielens(path))


def test_a_letter_that_unicode_takes_for_a_line_end(tmp_path):
    # 0x85 is a line end to str.splitlines.
    movies = MOVIES.replace("James", "Ja\x85mes")
    bunch = load_movielens(write_folder(tmp_path / "a", {**FILES_1M, "movies.dat": movies}))
    assert bunch.item_text[661] == "Ja\x85mes: a Peach"


def test_half_stars_are_floats(tmp_path):
    files = {**FILES_1M, "ratings.dat": "1::2::3.5::9\n"}
    bunch = load_movielens(write_folder(tmp_path / "a", files))
    assert bunch.data.tolist() == [[1, 2, 3.5, 9]]


def test_return_x_y_and_as_frame(tmp_path):
    path = write_folder(tmp_path / "a", FILES_1M)
    bunch = load_movielens(path)
    X, client_ids = load_movielens(path, return_X_y=True)
    np.testing.assert_array_equal(X, bunch.data)
    np.testing.assert_array_equal(client_ids, bunch.data[:, 0])
    frame, clients = load_movielens(path, return_X_y=True, as_frame=True)
    expected = pd.DataFrame(bunch.data, columns=bunch.feature_names)
    pd.testing.assert_frame_equal(frame, expected)
    assert clients.name == "client_id"
    assert clients.tolist() == client_ids.tolist()
    assert isinstance(load_movielens(path, as_frame=True).data, pd.DataFrame)


def test_as_frame_without_pandas_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="as_frame=True needs pandas"):
        load_movielens(write_folder(tmp_path / "a", FILES_1M), as_frame=True)


def test_description_has_sizes_and_terms(tmp_path):
    description = load_movielens(write_folder(tmp_path / "a", FILES_1M)).DESCR
    assert "3 ratings by 2 users of 2 of 2 movies" in description
    assert "GroupLens" in description


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": "hello"}, "is not a MovieLens data set: it has neither u.data"),
        ({}, "is not a MovieLens data set"),
        ({"u.item": U_ITEM}, "is not a MovieLens data set"),
        ({"u.data": U_DATA}, "has u.data but lacks u.item"),
        ({"ratings.dat": RATINGS, "u.item": U_ITEM}, "has ratings.dat but lacks movies.dat"),
        ({**FILES_1M, "ratings.dat": ""}, "ratings.dat in .* is empty"),
        ({**FILES_1M, "ratings.dat": "\n \n"}, "ratings.dat in .* is empty"),
        ({**FILES_1M, "ratings.dat": RATINGS[:-15]}, "ratings.dat in .* four numbers .*row 3"),
        (
            {**FILES_1M, "ratings.dat": RATINGS + "3::4::5\n"},
            "four numbers .* from 4 to 3 at row 4",
        ),
        ({**FILES_1M, "ratings.dat": "1::x::3::4\n"}, "four numbers .*'x'"),
        ({**FILES_1M, "ratings.dat": "1::2::3\n"}, "four numbers .* first line is '1::2::3'"),
        ({**FILES_1M, "ratings.dat": "1::2::nan::4\n"}, "four numbers .* first line"),
        ({**FILES_1M, "ratings.dat": "1::2::inf::4\n"}, "four numbers .* first line"),
        ({**FILES_1M, "ratings.dat": "\x00\x01\x02"}, "four numbers"),
        ({**FILES_1M, "movies.dat": MOVIES + "7::No genre\n"}, "Line 3 of movies.dat .* has 2 fie"),
        (
            {**FILES_1M, "movies.dat": "x::Title::Drama\n"},
            "Line 1 of movies.dat .* begins with 'x'",
        ),
        ({**FILES_100K, "u.item": U_ITEM[:-9]}, "Line 2 of u.item .* fields instead of 24"),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_foreign_and_damaged_files_are_refused_by_name(tmp_path, files, message, write):
    path = write(tmp_path / "a.zip", files)
    with pytest.raises(ValueError, match=message) as caught:
        load_movielens(path)
    assert str(path) in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no MovieLens archive or folder at .*fetch_movie"):
        load_movielens(tmp_path / "absent.zip")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x00" * 1000])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip is not a zip archive that can be read"):
        load_movielens(path)


def test_every_truncation_is_refused(tmp_path):
    whole = write_zip(tmp_path / "a.zip", FILES_1M).read_bytes()
    path = tmp_path / "b.zip"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"b\.zip"):
            load_movielens(path)


def test_damage_never_gives_another_kind_of_error(tmp_path):
    whole = write_zip(tmp_path / "a.zip", FILES_1M).read_bytes()
    path = tmp_path / "b.zip"
    rng = random.Random(0)
    messages = []
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            # Damage outside the two files, to a date for one, does no harm.
            check_1m(load_movielens(path))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 300
    assert all("b.zip" in message for message in messages)


def test_encrypted_archives_are_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES_1M)
    raw = bytearray(path.read_bytes())
    # The first bit of the flags, in the local header and in the directory.
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"ml/ratings.dat in .*a\.zip is encrypted"):
        load_movielens(path)


def test_absurd_sizes_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "_LARGEST_FILE", 1000)
    bomb = {**FILES_1M, "ratings.dat": RATINGS * 100}
    size = len(RATINGS) * 100
    path = write_zip(tmp_path / "a.zip", bomb)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("was unpacked"))
    with pytest.raises(ValueError, match=rf"ratings.dat in .*a\.zip has {size} bytes, far more"):
        load_movielens(path)
    with pytest.raises(ValueError, match=rf"ratings\.dat has {size} bytes, far more"):
        load_movielens(write_folder(tmp_path / "b", bomb))


def test_a_size_that_lies_unpacks_no_more_than_it_says(tmp_path):
    path = write_zip(tmp_path / "a.zip", {**FILES_1M, "ratings.dat": RATINGS * 1000})
    raw = bytearray(path.read_bytes())
    true_size = (len(RATINGS) * 1000).to_bytes(4, "little")
    raw = raw.replace(true_size, len(RATINGS).to_bytes(4, "little"))
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="cut off or damaged"):
        load_movielens(path)


@pytest.mark.parametrize("declared", [90, 2**20])
def test_a_bomb_that_lies_is_not_unpacked_into_memory(tmp_path, monkeypatch, declared):
    """32 MB in 32 kB: no more is unpacked than was declared, and that is bounded."""
    monkeypatch.setattr(movielens, "_LARGEST_FILE", 2**20)
    files = {**FILES_1M, "ratings.dat": "\0" * 2**25}
    path = write_zip(tmp_path / "a.zip", files)
    raw = path.read_bytes().replace(struct.pack("<I", 2**25), struct.pack("<I", declared))
    path.write_bytes(raw)
    del files, raw
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.zip is not a zip archive that can be read"):
            load_movielens(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_whose_unpacking_has_no_bound_are_refused(tmp_path, method):
    path = write_zip(tmp_path / "a.zip", FILES_1M, method=method)
    with pytest.raises(ValueError, match=rf"ml/ratings.dat in .*a\.zip is packed .*{method}\)"):
        load_movielens(path)


def test_an_archive_of_absurd_size_is_refused_unread(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", FILES_1M)
    monkeypatch.setattr(movielens, "_LARGEST_ARCHIVE", 100)
    with pytest.raises(ValueError, match=rf"a\.zip has {path.stat().st_size} bytes, far more"):
        load_movielens(path)


@pytest.mark.parametrize("large", ["9007199254740993", "-9007199254740992", "9" * 25, "1e300"])
def test_numbers_that_floats_cannot_tell_apart_are_refused(tmp_path, large):
    files = {**FILES_1M, "ratings.dat": f"1::2::3::4\n{large}::661::5::978300760\n"}
    path = write_folder(tmp_path / "a", files)
    with pytest.raises(ValueError, match=r"ratings.dat in .* numbers of 2\*\*53 and more in row 1"):
        load_movielens(path)


def test_the_real_100k_archive():
    bunch = load_movielens(real("ml-100k/ml-100k.zip"))
    assert bunch.data.shape == (100_000, 4)
    assert bunch.data.dtype == np.int64
    assert [len(np.unique(column)) for column in bunch.data[:, :3].T] == [943, 1682, 5]
    assert len(bunch.item_text) == len(bunch.genres) == 1682
    assert bunch.item_text[1] == "Toy Story (1995)"
    assert bunch.genres[1] == ("Animation", "Children's", "Comedy")
    assert bunch.item_text[1633] == "Á köldum klaka (Cold Fever) (1994)"


def test_the_real_1m_archive():
    bunch = load_movielens(real("ml-1m/ml-1m.zip"))
    assert bunch.data.shape == (1_000_209, 4)
    assert [len(np.unique(column)) for column in bunch.data[:, :3].T] == [6040, 3706, 5]
    assert len(bunch.item_text) == 3883
    assert bunch.item_text[1] == "Toy Story (1995)"
    assert set(np.unique(bunch.data[:, 1]).tolist()) <= set(bunch.item_text)


@pytest.fixture
def grouplens(tmp_path, monkeypatch):
    """Answer requests with a tiny archive whose sum is the published one."""
    content = write_zip(tmp_path / "published.zip", FILES_100K).read_bytes()
    requests = []

    def answer(url):
        requests.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(movielens, "_open", answer)
    monkeypatch.setitem(movielens._MD5, "ml-100k.zip", hashlib.md5(content).hexdigest())
    monkeypatch.setenv("FEDRECSK_DATA_HOME", str(tmp_path / "env_home"))
    return requests


def test_fetch_downloads_once(grouplens, tmp_path):
    home = tmp_path / "new" / "home"
    check_100k(fetch_movielens("100k", data_home=home))
    check_100k(fetch_movielens(data_home=str(home), download_if_missing=False))
    assert grouplens == ["https://files.grouplens.org/datasets/movielens/ml-100k.zip"]
    assert [path.name for path in home.iterdir()] == ["ml-100k.zip"]


def test_fetch_passes_its_options_on(grouplens, tmp_path):
    X, client_ids = fetch_movielens(data_home=tmp_path, return_X_y=True, as_frame=True)
    assert list(X.columns) == ["user_id", "item_id", "rating", "timestamp"]
    assert client_ids.tolist() == [196, 186, 196]


def test_data_home_comes_from_the_environment_or_the_home_folder(grouplens, tmp_path, monkeypatch):
    fetch_movielens()
    assert (tmp_path / "env_home" / "ml-100k.zip").exists()
    monkeypatch.delenv("FEDRECSK_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    fetch_movielens()
    assert (tmp_path / "me" / "fedrecsk_data" / "ml-100k.zip").exists()


def test_fetch_may_be_forbidden_to_download(grouplens, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ml-100k\.zip is not there .* put it at"):
        fetch_movielens(data_home=tmp_path / "home", download_if_missing=False)
    assert grouplens == []


@pytest.mark.parametrize(
    "error",
    [URLError("no route to host"), TimeoutError("timed out"), ConnectionResetError("reset")],
)
def test_no_network_says_where_to_put_the_file(tmp_path, monkeypatch, error):
    def refuse(url):
        raise error

    monkeypatch.setattr(movielens, "_open", refuse)
    with pytest.raises(
        ConnectionError, match=r"Could not download https://files\.grouplens.*"
    ) as e:
        fetch_movielens("1m", data_home=tmp_path)
    assert f"put it at {tmp_path / 'ml-1m.zip'}" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_a_wrong_sum_is_not_kept(grouplens, tmp_path, monkeypatch):
    monkeypatch.setitem(movielens._MD5, "ml-100k.zip", "0" * 32)
    with pytest.raises(OSError, match=f"MD5 sum .*, but GroupLens publishes {'0' * 32}; nothing"):
        fetch_movielens(data_home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_file_at_hand_with_a_wrong_sum_is_refused_and_left(grouplens, tmp_path):
    path = write_zip(tmp_path / "ml-100k.zip", FILES_1M)
    with pytest.raises(OSError, match="is not the archive that GroupLens publishes"):
        fetch_movielens(data_home=tmp_path)
    assert path.exists()
    assert grouplens == []


def test_an_endless_download_is_cut_and_refused(grouplens, tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "_LARGEST_DOWNLOAD", 10)
    with pytest.raises(OSError, match="nothing was kept"):
        fetch_movielens(data_home=tmp_path / "home")


def test_a_disk_that_fails_leaves_no_part_behind(grouplens, tmp_path, monkeypatch):
    home = tmp_path / "home"

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        fetch_movielens(data_home=home)
    assert list(home.iterdir()) == []


def test_only_https_is_followed(monkeypatch):
    class Elsewhere(io.BytesIO):
        def geturl(self):
            return "http://example.org/ml-100k.zip"

    monkeypatch.setattr(movielens.urllib.request, "urlopen", lambda url, timeout: Elsewhere())
    with pytest.raises(ConnectionError, match=r"leads to http://example\.org.*not https"):
        movielens._open("https://files.grouplens.org/x")


def test_published_sums_and_names():
    assert movielens._FILE_NAMES == {"100k": "ml-100k.zip", "1m": "ml-1m.zip"}
    assert movielens._MD5.keys() == set(movielens._FILE_NAMES.values())
    with pytest.raises(ValueError, match="name must be one of '100k', '1m', got '20m'"):
        fetch_movielens("20m")
