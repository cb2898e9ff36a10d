"""Data that callers may have, and data that they should not have, for Hypothesis to draw."""

import datetime as dt
import os
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from hypothesis import strategies as st
from scipy.sparse import coo_array, csr_array

# A multiple of the examples of every property, for runs that may take long.
MULTIPLE = float(os.environ.get("FEDRECSK_EXAMPLES", "1"))


def examples(n: int) -> int:
    """How many examples to draw where a change in CI can afford `n`."""
    return max(1, round(n * MULTIPLE))


# Ids ----------------------------------------------------------------------------------------

ODD_TEXTS = [
    "", " ", "a", "a ", " a", "A", "á", "á", "1", "01", "1.0", "1_0", "nan", "NaT", "None",
    "now", "inf", "x" * 300, "‮a", "💧", "a\tb", "a\nb", "\r\n", "\ufeff", "\ud800", "a\0b",
    "9" * 30, "::", "|", ",", '"', "../x", "２", "2020-01-01",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=5))
INTEGERS = st.one_of(st.integers(-3, 9), st.integers(-(2**63), 2**63 - 1))
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0**53, 2.0**64, 1e300, -1e300, 5e-324, 1 / 3]),
    st.floats(allow_nan=False, allow_infinity=False),
)
BYTES = st.binary(max_size=4)


def ends_in_nul(value: object) -> bool:
    """Say whether NumPy would lose the end of a text."""
    return isinstance(value, str | bytes) and value[-1:] in ("\0", b"\0")


KINDS = {
    "integers": INTEGERS,
    "unsigned": st.integers(0, 2**64 - 1),
    "text": TEXTS.filter(lambda text: not ends_in_nul(text)),
    "floats": FLOATS,
    "bytes": BYTES.filter(lambda text: not ends_in_nul(text)),
    "flags": st.booleans(),
}


@st.composite
def ids(draw, max_size=6, kinds=tuple(KINDS)):
    """Distinct ids of one kind."""
    kind = draw(st.sampled_from(kinds))
    return draw(st.lists(KINDS[kind], min_size=1, max_size=max_size, unique=True))


# Tables -------------------------------------------------------------------------------------


@st.composite
def tables(draw, n_columns=None, max_rows=15, kinds=tuple(KINDS)):
    """Rows ``user, item[, rating[, timestamp]]`` with repeats, as a list of tuples."""
    users, items = draw(ids(kinds=kinds)), draw(ids(kinds=kinds))
    n_columns = draw(st.integers(2, 4)) if n_columns is None else n_columns
    columns = [
        st.sampled_from(users),
        st.sampled_from(items),
        st.sampled_from([-1.0, 0.5, 1, 3, 4.5]),
        st.integers(-3, 5),
    ]
    return draw(st.lists(st.tuples(*columns[:n_columns]), min_size=1, max_size=max_rows))


@st.composite
def client_of_user(draw, rows):
    """Give the users of rows to clients: client ids by row."""
    clients = draw(ids(max_size=3))
    users = list(dict.fromkeys(row[0] for row in rows))
    chosen = draw(st.lists(st.sampled_from(clients), min_size=len(users), max_size=len(users)))
    return [dict(zip(users, chosen, strict=True))[row[0]] for row in rows]


NAMES = ["user_id", "item_id", "rating", "timestamp"]


def as_array_of_objects(rows):
    array = np.empty((len(rows), len(rows[0])), dtype=object)
    array[:] = rows
    return array


def as_pandas(rows):
    return pd.DataFrame(as_array_of_objects(rows), columns=NAMES[: len(rows[0])])


CONTAINERS = {
    "list of tuples": lambda rows: rows,
    "list of lists": lambda rows: [list(row) for row in rows],
    "array of objects": as_array_of_objects,
    "array in the order of columns": lambda rows: np.asfortranarray(as_array_of_objects(rows)),
    "pandas, objects": as_pandas,
    "pandas, inferred": lambda rows: as_pandas(rows).infer_objects(),
    "pandas, nullable": lambda rows: as_pandas(rows).convert_dtypes(),
    "polars": lambda rows: pl.DataFrame(rows, schema=NAMES[: len(rows[0])], orient="row"),
    "pyarrow": lambda rows: pa.table(
        dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=False))
    ),
}


@st.composite
def contained(draw, rows):
    """Put rows into a container that can hold them without changing a value."""
    name = draw(st.sampled_from(list(CONTAINERS)))
    try:
        found = CONTAINERS[name](rows)
    # What a library cannot hold, such as half a surrogate pair, no caller can pass through it.
    except (ValueError, TypeError, OverflowError, UnicodeError, pa.ArrowException):
        return rows
    if name == "polars" and not all(
        left == right for row, own in zip(rows, found.rows(), strict=True)
        for left, right in zip(row, own, strict=True)
    ):  # fmt: skip
        return rows
    return found


# What nobody should pass ---------------------------------------------------------------------

ODD_CELLS = st.one_of(
    st.sampled_from(
        [
            None, float("nan"), float("inf"), -float("inf"), pd.NA, pd.NaT, True, 1j, b"a", "a\0",
            b"a\0", 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, Decimal("NaN"),
            Decimal("sNaN"), Decimal("Infinity"), Decimal("1e999"), Decimal("0.1"),
            Fraction(1, 3), Fraction(10**400, 3), dt.datetime(2020, 1, 1), dt.datetime.min,
            dt.datetime.max, dt.datetime.min.replace(tzinfo=dt.timezone(dt.timedelta(hours=9))),
            dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-9))),
            dt.date(1, 1, 1), dt.time(1), dt.timedelta(days=1), [], [1], (1, 2), {}, {"a": 1},
            {1}, object(), print, np.int8(3), np.float16(0.5), np.longdouble(1) / 3,
            np.longdouble("1e4000"), np.datetime64("2020"), np.datetime64("NaT"),
            np.timedelta64(1, "D"), np.str_("a"), np.bytes_(b"a"), np.arange(2), np.array(3),
            "1e400", "0x10", "1,5", "99999999-01-01", "-1000000-01-01", "2020-13-01", "today",
            "2020-01-01T00:00:00+99:99", "１", "1e5", " 5 ",
        ]
    ),
    TEXTS,
    INTEGERS,
    st.floats(),
)  # fmt: skip
# Mostly plain cells, so that the odd ones come one at a time.
CELLS = st.one_of(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), ODD_CELLS)


@st.composite
def odd_rows(draw):
    """Nested lists of 0 to 5 columns, some ragged."""
    width = draw(st.integers(0, 5))
    spread = draw(st.sampled_from([0, 0, 0, 1]))
    row = st.lists(CELLS, min_size=max(0, width - spread), max_size=width + spread)
    rows = draw(st.lists(row, max_size=4))
    return draw(st.sampled_from([rows, tuple(map(tuple, rows))]))


ODD_DTYPES = [
    "?", "i1", "u8", "f2", "f4", "g", "c16", "S3", "U2", "M8[s]", "M8[Y]", "m8[D]", "O", "V4",
    [("user_id", "i8"), ("item_id", "i8")],
]  # fmt: skip


@st.composite
def odd_arrays(draw):
    """Arrays of 0 to 3 dimensions and of any dtype."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype = np.dtype(draw(st.sampled_from(ODD_DTYPES)))
    raw = draw(st.binary(max_size=64))
    size = int(np.prod(shape))
    if dtype.hasobject:
        array = np.empty(size, dtype=object)
        array[:] = draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    else:
        n_bytes = size * dtype.itemsize
        array = np.frombuffer(
            (raw * (n_bytes // max(len(raw), 1) + 1)).ljust(n_bytes, b"\0")[:n_bytes], dtype
        )
    array = array.reshape(shape).copy()
    wrap = draw(
        st.sampled_from(
            [
                np.asarray,
                np.asarray,
                np.ma.masked_invalid if dtype.kind == "f" else np.asarray,
                np.asfortranarray,
            ]
        )
    )
    return wrap(array)


@st.composite
def odd_frames(draw):
    """DataFrames whose columns have odd names, types or values."""
    names = draw(
        st.lists(
            st.sampled_from([*NAMES, "client_id", "extra", "User_id", 3]), max_size=5, unique=True
        )
    )
    n = draw(st.integers(0, 3))
    frame = pd.DataFrame(
        {
            name: pd.Series(draw(st.lists(CELLS, min_size=n, max_size=n)), dtype=object)
            for name in names
        }
    )
    kind = draw(
        st.sampled_from(
            ["plain", "inferred", "nullable", "category", "string", "index", "twice", "polars"]
        )
    )
    try:
        if kind == "inferred":
            frame = frame.infer_objects()
        elif kind == "nullable":
            frame = frame.convert_dtypes()
        elif kind in ("category", "string"):
            frame = frame.astype(kind)
        elif kind == "index":
            frame.index = ["x"] * len(frame)
        elif kind == "twice":
            frame = pd.concat([frame, frame], axis=1)
        elif kind == "polars":
            frame = pl.from_pandas(frame)
    # What a library cannot make, no caller can pass.
    except Exception:
        return frame
    return frame


ANYTHING = st.one_of(
    odd_rows(),
    odd_rows(),
    odd_arrays(),
    odd_frames(),
    ODD_CELLS,
    st.lists(CELLS, max_size=4),
    st.dictionaries(st.sampled_from([*NAMES, 1]), st.lists(CELLS, max_size=3), max_size=3),
    st.sampled_from(
        [csr_array((2, 2)), coo_array(([1.0], ([0], [1]))), range(4), iter([[1, 2]]),
         pd.Series([1])]
    ),
)  # fmt: skip
