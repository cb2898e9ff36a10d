"""Files of the caller: CSV, Parquet, folders."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedrecsk.data import encode
from fedrecsk.datasets import load_interactions, load_movielens

DATA = Path(os.environ.get("FEDRECSK_DATA") or Path(__file__).parents[3] / "shared" / "data")

FRAME = pd.DataFrame(
    {
        "timestamp": [30, 10, 20],
        "item_id": [5, 6, 5],
        "user_id": ["ann", "ann", "bob"],
        "client_id": ["x", "x", "y"],
        "rating": [4.0, 3.5, 5.0],
        "split": ["train", None, "test"],
    }
)
ROWS = [["ann", 5, 4.0, 30], ["ann", 6, 3.5, 10], ["bob", 5, 5.0, 20]]


def write(frame, path):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return path


@pytest.fixture(params=[".csv", ".parquet"])
def suffix(request):
    return request.param


def test_all_columns_in_the_order_of_the_contract(tmp_path, suffix):
    bunch = load_interactions(write(FRAME, tmp_path / f"a{suffix}"))
    assert bunch.data.dtype == object
    assert bunch.data.tolist() == ROWS
    assert [type(value) for value in bunch.data[0]] == [str, int, float, int]
    assert bunch.target.tolist() == ["x", "x", "y"]
    assert bunch.feature_names == ["user_id", "item_id", "rating", "timestamp"]
    assert bunch.item_text == {}
    assert "3 interactions read from" in bunch.DESCR
    # What was read goes straight into an encoder.
    assert encode(bunch.data, bunch.target).clients.ids.tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("columns", "names", "first"),
    [
        (["item_id", "user_id"], ["user_id", "item_id"], ["ann", 5]),
        (["rating", "item_id", "user_id"], ["user_id", "item_id", "rating"], ["ann", 5, 4.0]),
        (
            ["timestamp", "item_id", "user_id"],
            ["user_id", "item_id", "rating", "timestamp"],
            ["ann", 5, 1, 30],
        ),
    ],
)
def test_columns_that_are_left_out(tmp_path, suffix, columns, names, first):
    bunch = load_interactions(write(FRAME[columns], tmp_path / f"a{suffix}"))
    assert bunch.feature_names == names
    assert bunch.data[0].tolist() == first
    assert bunch.target is None


def test_whole_numbers_are_integers(tmp_path, suffix):
    frame = pd.DataFrame({"user_id": [7, 8], "item_id": [1, 2], "rating": [4.0, 5.0]})
    bunch = load_interactions(write(frame, tmp_path / f"a{suffix}"))
    assert bunch.data.dtype == np.int64
    assert bunch.data.tolist() == [[7, 1, 4], [8, 2, 5]]
    half = load_interactions(write(frame.assign(rating=[4.5, 5.0]), tmp_path / f"b{suffix}"))
    assert half.data.dtype == np.float64
    assert half.data.tolist() == [[7, 1, 4.5], [8, 2, 5]]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["1", "20"], [1, 20]),
        (["-1", "0"], [-1, 0]),
        (["007", "7"], ["007", "7"]),
        (["1", "1.0"], ["1", "1.0"]),
        (["1", " 2"], ["1", " 2"]),
        (["+1", "2"], ["+1", "2"]),
        (["1", "a"], ["1", "a"]),
        (["1_000", "2"], ["1_000", "2"]),
        ([str(10**30), "1"], [str(10**30), "1"]),
        (["日本", "x,y"], ["日本", "x,y"]),
    ],
)
def test_csv_ids_are_integers_only_where_all_are_written_so(tmp_path, written, read):
    frame = pd.DataFrame({"user_id": written, "item_id": ["a", "b"]})
    assert load_interactions(write(frame, tmp_path / "a.csv")).data[:, 0].tolist() == read


def test_datetimes(tmp_path, suffix):
    moments = pd.to_datetime(["1970-01-02 00:00:00", "1970-01-01 00:00:01"])
    frame = pd.DataFrame({"user_id": [1, 2], "item_id": [3, 4], "timestamp": moments})
    bunch = load_interactions(write(frame, tmp_path / f"a{suffix}"))
    assert bunch.data[:, 3].tolist() == [86_400_000_000, 1_000_000]


def test_csv_details(tmp_path):
    path = tmp_path / "a.CSV"
    # A byte-order mark, spaces around names, quotes, blank lines, an index without a name.
    text = '\ufeff, user_id ,item_id\r\n0,"a,b",1\r\n\r\n1,"c ""d""",2\r\n'
    path.write_bytes(text.encode())
    assert load_interactions(str(path)).data.tolist() == [["a,b", 1], ['c "d"', 2]]


def test_csv_needs_neither_pandas_nor_pyarrow(tmp_path, monkeypatch):
    path = write(FRAME, tmp_path / "a.csv")
    for name in ("pandas", "polars", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load_interactions(path).data.tolist() == ROWS


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write(FRAME, tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow.*fedrecsk\[benchmark\]"):
        load_interactions(path)


def test_folders_with_titles(tmp_path):
    write(FRAME, tmp_path / "interactions.parquet")
    assert load_interactions(tmp_path).item_text == {}
    items = pd.DataFrame({"item_id": [5, 6, 9], "title": ["Five", None, "Nine"], "genre": "x"})
    write(items, tmp_path / "items.parquet")
    bunch = load_interactions(tmp_path)
    assert bunch.data.tolist() == ROWS
    assert bunch.item_text == {5: "Five", 6: "", 9: "Nine"}
    write(items[["item_id"]], tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=r"items\.parquet should have .* title; it has item_id\."):
        load_interactions(tmp_path)


def test_movielens_folders_have_no_client_column(tmp_path):
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml" / "ratings.dat").write_text("1::2::3::4\n")
    (tmp_path / "ml" / "movies.dat").write_text("2::Title::Drama\n")
    bunch = load_interactions(tmp_path)
    assert bunch.data.tolist() == [[1, 2, 3, 4]]
    assert bunch.target is None
    assert bunch.item_text == {2: "Title"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the columns user_id, item_id; it has none"),
        ("user_id,title\n1,a\n", r"a\.csv lacks the column item_id; it has user_id, title\."),
        ("user_id;item_id\n1;2\n", "lacks the columns user_id, item_id; it has user_id;item_id"),
        ("user_id,item_id\n", "has a header but no rows"),
        ("user_id,item_id,user_id\n1,2,3\n", "more than one column named user_id"),
        ("user_id,item_id\n1,2\n3\n", r"Line 3 of .*a\.csv has 1 fields, but the header has 2"),
        ("user_id,item_id\n1,2\n3,\n", r"Line 3 of .*a\.csv has no item_id"),
        ("user_id,item_id,rating\n1,2,good\n", r"'rating' of .*a\.csv holds text .*'good'"),
        ("user_id,item_id,rating\n1,2,nan\n", r"a\.csv contains NaN: .* column 'rating'"),
        ("user_id,item_id,rating\n1,2,inf\n", r"a\.csv contains infinity: .* column 'rating'"),
        ("user_id,item_id,timestamp\n1,2,soon\n", r"'timestamp' of .*a\.csv holds text .*'soon'"),
        ("user_id,item_id\n" + "x" * 200_000 + ",1\n", "is not a CSV file in UTF-8: field larger"),
    ],
)
def test_bad_csv_is_refused(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_interactions(path)


def test_csv_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("user_id,item_id\nRené,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv is not a CSV file in UTF-8"):
        load_interactions(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_damaged_parquet_is_refused(tmp_path, content):
    for path in (tmp_path / "a.parquet", tmp_path / "folder" / "interactions.parquet"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is not a Parquet file"):
            load_interactions(path.parent if path.parent.name == "folder" else path)


def test_truncated_parquet_is_refused(tmp_path):
    path = write(FRAME, tmp_path / "a.parquet")
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.parquet"):
            load_interactions(path)


def test_parquet_whose_rows_come_from_nowhere_is_refused_unread(tmp_path, monkeypatch):
    """Two million equal rows take 2 kB, and would take 32 MB here."""
    rows = pa.table({"user_id": np.zeros(2**21, np.int64), "item_id": np.zeros(2**21, np.int64)})
    path = tmp_path / "a.parquet"
    pq.write_table(rows, path)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(ValueError, match=r"a\.parquet claims 2097152 rows in \d+ bytes, more"):
        load_interactions(path)


def test_parquet_with_damaged_pages_is_refused_where_it_has_sums(tmp_path):
    path = tmp_path / "a.parquet"
    rows = {"user_id": np.arange(999), "item_id": np.arange(999)}
    pq.write_table(
        pa.table(rows), path, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<q", 500), struct.pack("<q", 600)))
    with pytest.raises(ValueError, match=r"not a Parquet file that can be read: .*CRC"):
        load_interactions(path)


def test_long_text_that_many_rows_share_does_not_fill_the_memory(tmp_path):
    """A dictionary of one text of 10 MB; its ten thousand rows would take 100 GB each in full."""
    path = tmp_path / "a.parquet"
    texts = pa.DictionaryArray.from_arrays(np.zeros(10_000, np.int32), ["x" * 10_000_000])
    rows = pa.table({"user_id": texts, "item_id": np.arange(10_000)})
    pq.write_table(rows, path, store_schema=False)
    with pytest.raises(ValueError, match=r"longest text in column 'user_id' of X has 10000000"):
        load_interactions(path)
    write(FRAME, tmp_path / "interactions.parquet")
    titles = rows.rename_columns(["title", "item_id"])
    pq.write_table(titles, tmp_path / "items.parquet", store_schema=False)
    assert len(load_interactions(tmp_path).item_text) == 10_000


def test_parquet_with_text_that_is_none_is_refused(tmp_path):
    path = write(FRAME.assign(user_id="Zoë"), tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes().replace("Zoë".encode(), b"Zo\xc3a"))
    with pytest.raises(ValueError, match=r"not a Parquet file that can be read: .*UTF"):
        load_interactions(path)


def test_csv_that_would_be_cut_or_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id\na\0,1\na,1\n")
    with pytest.raises(ValueError, match=r"'user_id' of .*a\.csv ends in a NUL character"):
        load_interactions(path)
    path.write_text(f"user_id,item_id\n{'x' * 100_000},1\n" + "a,1\n" * 12_000)
    with pytest.raises(ValueError, match=r"longest text in column 'user_id' of .*a\.csv has"):
        load_interactions(path)
    path.write_text(f"user_id,item_id,rating\na,1,{'9' * 30}\n")
    assert load_interactions(path).data[0, 2] == 1e30


def test_parquet_without_a_column_or_with_gaps(tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet lacks the column user_id"):
        load_interactions(write(FRAME.drop(columns="user_id"), tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"b\.parquet cannot be .* column 'item_id' are missing"):
        load_interactions(write(FRAME.assign(item_id=[1, None, 2]), tmp_path / "b.parquet"))
    with pytest.raises(
        ValueError, match=r"c\.parquet cannot be read .* not 'ndarray': .*'user_id'"
    ):
        load_interactions(write(FRAME.assign(user_id=[[1], [2], [3]]), tmp_path / "c.parquet"))


def test_what_cannot_be_read_is_refused_with_what_can(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent\.csv\. Pass a CSV"):
        load_interactions(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match=r"cannot be read as interactions\. Pass a CSV or Parquet"):
        load_interactions(tmp_path)
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.xlsx cannot be read as interactions"):
        load_interactions(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    ("folder", "n_rows", "n_users", "n_items", "kind"),
    [
        ("ml-100k", 100_000, 943, 1682, "i"),
        ("amazon-games", 342_329, 49_156, 17_332, "O"),
        ("microlens-50k", 359_048, 49_887, 19_217, "O"),
    ],
)
def test_real_folders(folder, n_rows, n_users, n_items, kind):
    path = DATA / folder
    if not (path / "interactions.parquet").exists():
        pytest.skip(f"{path} is missing; set FEDRECSK_DATA to a folder that has {folder}")
    bunch = load_interactions(path)
    assert bunch.data.shape == (n_rows, 4)
    assert bunch.data.dtype.kind == kind
    data = encode(bunch.data)
    assert (data.n_users, data.n_items) == (n_users, n_items)
    assert set(data.items.ids.tolist()) <= set(bunch.item_text)


def test_the_archive_and_the_table_of_movielens_agree():
    path = DATA / "ml-100k"
    if not (path / "ml-100k.zip").exists():
        pytest.skip(f"{path} is missing; set FEDRECSK_DATA to a folder that has ml-100k")
    archive, table = load_movielens(path / "ml-100k.zip"), load_interactions(path)
    np.testing.assert_array_equal(archive.data, table.data)
    assert archive.item_text == table.item_text
    np.testing.assert_array_equal(load_interactions(path / "ml-100k.zip").data, table.data)
