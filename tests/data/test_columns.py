"""What may be passed as X, and what each column becomes."""

import datetime as dt
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import scipy.sparse as sp

from fedrecsk.data import Columns, read_columns

ROWS = [["ann", 7, 5.0, 100], ["bob", 8, 3.5, 90], ["ann", 9, 1.0, 110]]
NAMES = ["user_id", "item_id", "rating", "timestamp"]


class OnlyArray:
    """Something that is an array through ``__array__`` alone."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


def assert_same_columns(found, expected):
    assert found.user.tolist() == expected.user.tolist()
    assert found.item.tolist() == expected.item.tolist()
    for name in ("rating", "timestamp", "client"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or one.tolist() == other.tolist(), name


def test_mixed_rows_keep_numbers_as_numbers():
    columns = read_columns(ROWS)
    assert columns.user.tolist() == ["ann", "bob", "ann"]
    assert columns.item.dtype == np.int64
    assert columns.item.tolist() == [7, 8, 9]
    assert columns.rating.dtype == np.float64
    assert columns.rating.tolist() == [5.0, 3.5, 1.0]
    assert columns.timestamp.dtype == np.int64
    assert columns.timestamp.tolist() == [100, 90, 110]
    assert columns.client is None
    assert columns.n_columns == 4
    assert columns.feature_names is None
    assert len(columns) == 3


@pytest.mark.parametrize(
    "X",
    [
        tuple(map(tuple, ROWS)),
        np.array(ROWS, dtype=object),
        np.array(ROWS, dtype=object, order="F"),
        pd.DataFrame(ROWS),
        pd.DataFrame(ROWS, columns=NAMES),
        pd.DataFrame(ROWS, columns=NAMES)[NAMES[::-1]],
        pd.DataFrame(ROWS, columns=NAMES, index=[9, 9, 4]),
        pl.DataFrame(ROWS, schema=NAMES, orient="row"),
        pa.Table.from_pandas(pd.DataFrame(ROWS, columns=NAMES)),
        pd.DataFrame(ROWS, columns=NAMES).astype({"user_id": "category"}),
        pl.DataFrame(ROWS, schema=NAMES, orient="row").cast({"user_id": pl.Categorical}),
        pd.DataFrame(ROWS, columns=NAMES).convert_dtypes(),
    ],
)
def test_every_container_gives_the_same_columns(X):
    assert_same_columns(read_columns(X), read_columns(ROWS))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint64, np.float32, np.float64])
@pytest.mark.parametrize("n_columns", [2, 3, 4])
def test_numeric_arrays_of_any_dtype(dtype, n_columns):
    X = np.arange(12, dtype=dtype).reshape(3, 4)[:, :n_columns]
    columns = read_columns(X)
    assert columns.user.tolist() == [0, 4, 8]
    assert columns.item.tolist() == [1, 5, 9]
    assert columns.user.dtype == (np.float64 if np.dtype(dtype).kind == "f" else np.int64)
    assert (columns.rating is None) == (n_columns < 3)
    assert (columns.timestamp is None) == (n_columns < 4)


def test_memmaps_and_things_with_array_are_arrays(tmp_path):
    X = np.arange(8.0).reshape(2, 4)
    stored = np.memmap(tmp_path / "X", dtype=np.float64, mode="w+", shape=X.shape)
    stored[:] = X
    stored.flush()
    read_only = np.memmap(tmp_path / "X", dtype=np.float64, mode="r", shape=X.shape)
    for container in (read_only, OnlyArray(X)):
        columns = read_columns(container)
        assert type(columns.user) is np.ndarray
        assert_same_columns(columns, read_columns(X))


def test_an_array_of_text_has_its_numbers_read():
    columns = read_columns(np.array([["ann", "x", "4.5", "100"], ["bob", "y", "3", "90"]]))
    assert columns.item.tolist() == ["x", "y"]
    assert columns.rating.tolist() == [4.5, 3.0]
    assert columns.timestamp.tolist() == [100, 90]


def test_client_ids_come_out_of_a_frame_by_name():
    frame = pd.DataFrame({"client_id": ["x", "y"], "item_id": [1, 2], "user_id": [5, 6]})
    columns = read_columns(frame)
    assert columns.client.tolist() == ["x", "y"]
    assert columns.user.tolist() == [5, 6]
    assert columns.n_columns == 3
    assert columns.feature_names == ("client_id", "item_id", "user_id")


def test_columns_pass_through():
    columns = read_columns(ROWS)
    assert read_columns(columns) is columns


def test_take_gives_the_rows_of_every_column():
    frame = pd.DataFrame([[*row, "c"] for row in ROWS], columns=[*NAMES, "client_id"])
    for rows in (np.array([2, 0]), np.array([True, False, True])):
        assert_same_columns(read_columns(frame).take(rows), read_columns(frame.loc[rows]))
    two = read_columns([[1, 2], [3, 4]]).take(np.array([1]))
    assert (two.rating, two.timestamp, two.client) == (None, None, None)


MOMENTS = [dt.datetime(2020, 1, 1), dt.datetime(1969, 12, 31, 23, 59, 59, 999_999)]
MICROSECONDS = [1_577_836_800_000_000, -1]


@pytest.mark.parametrize(
    "moments",
    [
        pd.Series(MOMENTS),
        pd.Series(MOMENTS).astype("datetime64[ns]"),
        pd.Series(MOMENTS).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"),
        pd.Series(MOMENTS, dtype=object),
    ],
)
def test_datetimes_become_microseconds_in_utc(moments):
    frame = pd.DataFrame({"user_id": [1, 2], "item_id": [3, 4], "timestamp": moments})
    by_name = [frame] if moments.dtype == object else [frame, pl.from_pandas(frame)]
    for X in by_name:
        timestamp = read_columns(X).timestamp
        assert timestamp.dtype == np.int64
        assert timestamp.tolist() == MICROSECONDS
    rows = [[1, 3, 1.0, moments[0]], [2, 4, 1.0, moments[1]]]
    assert read_columns(rows).timestamp.tolist() == MICROSECONDS


def test_dates_and_far_years_and_text_are_moments():
    frame = pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": [dt.date(1970, 1, 2)]})
    assert read_columns(frame).timestamp.tolist() == [86_400_000_000]
    far = [[1, 2, 1, dt.datetime(9999, 1, 1)]]
    assert read_columns(far).timestamp.tolist() == [253_370_764_800_000_000]
    text = [["a", "b", "1", "1970-01-01T01:00:00+01:00"], ["a", "c", "1", "1970-01-02 00:00:00"]]
    assert read_columns(text).timestamp.tolist() == [0, 86_400_000_000]


FAR = np.array(["1000000-01-01"], dtype="datetime64[s]")


@pytest.mark.parametrize(
    "moments",
    [
        pd.Series(FAR),
        pd.Series(FAR).dt.tz_localize("UTC"),
        pd.Series(FAR).astype(object),
        pl.Series(FAR.astype("int64") * 1000).cast(pl.Datetime("ms")),
        pl.Series([2**31 - 1], dtype=pl.Int32).cast(pl.Date),
        pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),
    ],
)
def test_moments_that_would_turn_into_others_are_refused(moments):
    """In microseconds they wrap around to a year that nobody wrote."""
    columns = {"user_id": [1], "item_id": [2], "timestamp": moments}
    make = pl.DataFrame if isinstance(moments, pl.Series) else pa.table
    frame = pd.DataFrame(columns) if isinstance(moments, pd.Series) else make(columns)
    with pytest.raises(
        ValueError, match=r"'timestamp' of X has the year \d+ in row 0, and moments"
    ):
        read_columns(frame)


@pytest.mark.parametrize(
    "text", ["300000-01-01", "-1000000-01-01", "9" * 25 + "-01-01", "now", "Today", " now"]
)
def test_texts_that_numpy_takes_for_some_other_moment_are_none(text):
    with pytest.raises(ValueError, match="'timestamp' of X holds text that is no number, such as"):
        read_columns([[1, 2, 3, text]])


def test_moments_in_zones_at_the_ends_of_time():
    zones = [dt.timezone(dt.timedelta(hours=hours)) for hours in (9, -9)]
    ends = [dt.datetime.min.replace(tzinfo=zones[0]), dt.datetime.max.replace(tzinfo=zones[1])]
    found = read_columns([[1, 2, 3, moment] for moment in ends]).timestamp
    hour = 3_600_000_000
    plain = read_columns([[1, 2, 3, moment.replace(tzinfo=None)] for moment in ends]).timestamp
    assert (found - plain).tolist() == [-9 * hour, 9 * hour]


def test_integers_beyond_64_bits():
    """As text they are ratings and times like other numbers; as ids they are looked at."""
    rows = np.array([["a", "b", "9" * 30, "1" + "0" * 25]])
    columns = read_columns(rows)
    assert (columns.rating[0], columns.timestamp[0]) == (1e30, 1e25)
    frame = pl.DataFrame({"user_id": [5, 2**63], "item_id": [1, 2]}).cast({"user_id": pl.Int128})
    assert read_columns(frame).user.tolist() == [5, 2**63]
    with pytest.raises(ValueError, match="does not fit 64 bits"):
        read_columns(frame.with_columns(user_id=pl.lit(2**70)))


def test_text_in_a_frame_keeps_its_end_or_is_refused():
    for column in (["a\0", "a"], [b"a\0", b"a"]):
        columns = {"user_id": column, "item_id": [1, 1]}
        for frame in (pd.DataFrame(columns), pl.DataFrame(columns), pa.table(columns)):
            with pytest.raises(ValueError, match="'user_id' of X ends in a NUL character"):
                read_columns(frame)


def test_fractional_and_boolean_numbers():
    columns = read_columns([[1, 2, True, 0.5], [1, 3, False, 2]])
    assert columns.rating.tolist() == [1.0, 0.0]
    assert columns.timestamp.tolist() == [0.5, 2.0]
    assert read_columns([[1, 2, Decimal("3.5")]]).rating.tolist() == [3.5]


def test_prediction_looks_at_two_columns_only():
    rows = [["ann", 7, "no rating", None], ["bob", 8, float("nan"), None]]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "split", "client_id"])
    for X in (rows, frame, np.array(rows, dtype=object)):
        columns = read_columns(X, first_two_suffice=True)
        assert columns.user.tolist() == ["ann", "bob"]
        assert columns.item.tolist() == [7, 8]
        assert (columns.rating, columns.timestamp, columns.client) == (None, None, None)
        assert columns.n_columns == 4
    # Nor is the caller warned of columns that prediction never reads.
    assert read_columns(np.ones((2, 7)), first_two_suffice=True).n_columns == 7


@pytest.mark.parametrize("n_columns", [5, 9])
def test_columns_after_the_fourth_are_ignored_with_a_warning(n_columns):
    X = np.tile(np.arange(float(n_columns)), (2, 1))
    X[0, 4] = np.nan
    with pytest.warns(UserWarning, match=f"X has {n_columns} columns; those after the fourth"):
        columns = read_columns(X)
    assert columns.timestamp.tolist() == [3.0, 3.0]
    assert columns.n_columns == n_columns


def test_a_frame_without_our_names_is_read_by_position_with_a_warning():
    frame = pd.DataFrame({"who": ["ann"], "what": [7]})
    with pytest.warns(UserWarning, match="'who' as user_id, 'what' as item_id"):
        columns = read_columns(frame)
    assert_same_columns(columns, read_columns([["ann", 7]]))
    assert columns.feature_names == ("who", "what")


ONE = {"user_id": [1], "item_id": [2]}


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ([1, 2, 3], ValueError, "Expected 2D array, got 1D array instead(.|\n)*Reshape your data"),
        (5, ValueError, "got scalar array instead(.|\n)*Reshape your data"),
        ([], ValueError, "Reshape your data"),
        (pd.Series([1, 2]), ValueError, "2-dimensional container"),
        (np.ones((2, 2, 2)), ValueError, "Found array with dim 3"),
        (np.empty((0, 3)), ValueError, r"0 sample\(s\) \(shape=\(0, 3\)\) while a minimum of 1"),
        (np.empty((12, 0)), ValueError, r"0 feature\(s\) \(shape=\(12, 0\)\) while a minimum of 2"),
        (np.ones((3, 1)), ValueError, r"1 feature\(s\) \(shape=\(3, 1\)\) while a minimum of 2"),
        (pd.DataFrame({"a": [1]}), ValueError, r"1 feature\(s\)"),
        (pd.DataFrame(columns=NAMES), ValueError, r"0 sample\(s\) \(shape=\(0, 4\)\)"),
        (np.ones((3, 1)) * 1j, ValueError, "Complex data not supported"),
        ([[1j, 2]], ValueError, "Complex data not supported: column 'user_id'"),
        ([[1, 2], [3, np.nan]], ValueError, "Input X contains NaN: .* column 'item_id' .* row 1"),
        ([[1, 2], [3, np.inf]], ValueError, "Input X contains infinity: .* column 'item_id'"),
        ([[1, 2, np.nan]], ValueError, "Input X contains NaN: .* column 'rating'"),
        ([[1, 2, -np.inf]], ValueError, "Input X contains infinity: .* column 'rating'"),
        ([[1, 2, 3, np.nan]], ValueError, "Input X contains NaN: .* column 'timestamp'"),
        ([[1, 2, 3, np.inf]], ValueError, "Input X contains infinity: .* column 'timestamp'"),
        ([[None, 2], [3, 4]], ValueError, "Input X contains NaN: .* column 'user_id' .* row 0"),
        (np.array([["a", "1", "nan"]]), ValueError, "Input X contains NaN: .* column 'rating'"),
        ([[1, 2], [3, 4, 5]], ValueError, "rows of X have different lengths: 2, 3"),
        ([[1, 2], ["a", 4]], TypeError, "mixed in column 'user_id' of X, such as 1 and 'a'"),
        ([[1, 2, "good"]], ValueError, "Column 'rating' of X holds text .* such as 'good'"),
        ([[1, 2, 3, "x"]], ValueError, "'timestamp' of X holds text .* numbers or datetimes"),
        (
            [[1, 2, 3, dt.datetime(2020, 1, 1)], [1, 2, 3, pd.NaT]],
            ValueError,
            "'timestamp' are mis",
        ),
        ([[1, 2, 3, dt.datetime(2020, 1, 1)], [1, 2, 3, 4]], TypeError, "not 'datetime'"),
        ([[1, 2, dt.datetime(2020, 1, 1)]], TypeError, "not 'datetime': found in column 'rating'"),
        ([[{"foo": "bar"}, 2]], TypeError, "argument must be .* string.* number, not 'dict'"),
        ([[[1], 2], [[3, 4], 5]], TypeError, "argument must be .* string.* number, not 'list'"),
        (sp.csr_array(np.eye(3)), TypeError, "Sparse .*interactions_from_sparse"),
        (sp.coo_matrix(np.eye(3)), TypeError, "Sparse .*interactions_from_sparse"),
        (np.array([[1, 2]]).view(np.matrix), TypeError, "np.matrix is not supported"),
        (np.ma.masked_equal([[1, 2], [3, 4]], 2), ValueError, "X has 1 masked values"),
        (pd.DataFrame({"user_id": [1]}), ValueError, "lacks the column item_id; it has user_id"),
        (
            pd.DataFrame({"rating": [1]}),
            ValueError,
            "lacks the columns user_id, item_id; it has ra",
        ),
        (pd.DataFrame({**ONE, "split": ["a"], 3: [0]}), ValueError, "mean nothing here: split, 3"),
        (pd.DataFrame([[1, 2]], columns=["user_id"] * 2), ValueError, "of the same name: user_id"),
        (pl.DataFrame(ONE).lazy(), TypeError, r"lazy frame.*X.collect\(\)"),
        (pl.DataFrame({**ONE, "user_id": [None]}), ValueError, "column 'user_id' are missing"),
        (pa.table({**ONE, "item_id": [None]}), ValueError, "column 'item_id' are missing"),
        (
            pd.DataFrame({**ONE, "rating": pd.array([None], "Int64")}),
            ValueError,
            "'rating' are mis",
        ),
        (pd.DataFrame({**ONE, "timestamp": [pd.NaT]}), ValueError, "column 'timestamp' are missin"),
        (
            pl.DataFrame({**ONE, "timestamp": [None]}, schema_overrides={"timestamp": pl.Datetime}),
            ValueError,
            "column 'timestamp' are missing",
        ),
        (
            pl.DataFrame({"user_id": ["a", None], "item_id": [1, 2]}).cast(
                {"user_id": pl.Categorical}
            ),
            ValueError,
            "1 of 2 values in column 'user_id' are missing",
        ),
        (
            pa.table({"user_id": [True, None], "item_id": [1, 2]}),
            ValueError,
            "1 of 2 values in column 'user_id' are missing",
        ),
        (
            pa.table({"user_id": pa.array(["a", None]).dictionary_encode(), "item_id": [1, 2]}),
            ValueError,
            "1 of 2 values in column 'user_id' are missing",
        ),
        (
            pa.table({**ONE, "timestamp": pa.nulls(1, pa.int64()).dictionary_encode()}),
            ValueError,
            "1 of 1 values in column 'timestamp' are missing",
        ),
        (pd.DataFrame({**ONE, "client_id": [None]}), ValueError, "column 'client_id' are missing"),
        (
            pl.DataFrame({**ONE, "user_id": [dt.date(2020, 1, 1)]}),
            TypeError,
            "has dtype datetime64",
        ),
        (pl.DataFrame({**ONE, "rating": ["4 stars"]}), ValueError, "'rating' of X holds text"),
        (pl.DataFrame({**ONE, "rating": [float("nan")]}), ValueError, "column 'rating' are missin"),
    ],
)
def test_bad_input_is_refused_by_name(X, error, message):
    with pytest.raises(error, match=message):
        read_columns(X)


@pytest.mark.parametrize(
    "X", [[[np.nan, 1.0]], pd.DataFrame({"user_id": [None], "item_id": [1]}), [1, 2], [[1]]]
)
def test_prediction_still_checks_user_and_item(X):
    with pytest.raises(ValueError, match=r"NaN|Reshape|1 feature"):
        read_columns(X, first_two_suffice=True)


def test_the_estimator_is_named():
    with pytest.raises(
        ValueError, match=r"0 feature\(s\) .* minimum of 2 is required by Popular\."
    ):
        read_columns(np.empty((3, 0)), estimator="Popular")


def test_the_argument_is_not_changed():
    array = np.array([[3.0, 1.0, 5.0, 9.0], [2.0, 1.0, 4.0, 8.0]])
    array.flags.writeable = False
    frame = pd.DataFrame(array, columns=NAMES)
    before = frame.copy()
    read_columns(array)
    read_columns(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_no_dataframe_library_is_needed():
    # None in sys.modules makes every import of the name fail, as if it were not installed.
    code = (
        "import sys; sys.modules.update(pandas=None, polars=None, pyarrow=None);"
        "from fedrecsk.data import encode; print(encode([['a', 1], ['b', 1]]).n_users)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "2", result.stderr


def test_columns_are_frozen():
    columns = read_columns(ROWS)
    assert isinstance(columns, Columns)
    with pytest.raises(AttributeError):
        columns.user = columns.item
