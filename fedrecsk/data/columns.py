"""From what the caller passed as ``X`` to one checked array per column."""

from __future__ import annotations

import datetime as dt
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_array

from fedrecsk.data.vocabulary import IdArray, as_ids, check_finite, is_missing, missing_error

POSITIONS = ("user_id", "item_id", "rating", "timestamp")
NAMES = (*POSITIONS, "client_id")

# Years from 1970 within which microseconds fit 64 bits.
_MOST_YEARS = 290_000


@dataclass(frozen=True, eq=False)
class Columns:
    """The checked columns of an argument ``X``, row for row as the caller passed them.

    Parameters
    ----------
    user, item : ndarray of shape (n,)
        Ids: bool, int64, uint64, float64, str or bytes.
    rating : ndarray of shape (n,), float64, or None
        Ratings, finite.
    timestamp : ndarray of shape (n,), int64 or float64, or None
        Moments, finite. Datetimes are microseconds since 1970 in UTC.
    client : ndarray of shape (n,), or None
        Client ids of a ``client_id`` column.
    n_columns : int
        How many columns ``X`` has, read or not.
    feature_names : tuple of str, or None
        Column names of ``X`` if it is a DataFrame whose names are all strings.
    """

    user: IdArray
    item: IdArray
    rating: NDArray[np.float64] | None
    timestamp: NDArray[Any] | None
    client: IdArray | None
    n_columns: int
    feature_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: NDArray[Any]) -> Columns:
        """Give the columns of some rows.

        Parameters
        ----------
        rows : ndarray
            Row numbers, or a mask of shape (n,).

        Returns
        -------
        columns : Columns
            The same columns with these rows only.
        """
        return Columns(
            user=self.user[rows],
            item=self.item[rows],
            rating=None if self.rating is None else self.rating[rows],
            timestamp=None if self.timestamp is None else self.timestamp[rows],
            client=None if self.client is None else self.client[rows],
            n_columns=self.n_columns,
            feature_names=self.feature_names,
        )


def read_columns(
    X: Any, *, first_two_suffice: bool = False, estimator: object | None = None
) -> Columns:
    """Check interactions and take their columns apart.

    Parameters
    ----------
    X : array-like of shape (n, 2..4), DataFrame, or Columns
        Positions ``user, item[, rating[, timestamp]]``, or a DataFrame (pandas, polars,
        pyarrow, ...) with the columns ``user_id, item_id[, rating][, timestamp][, client_id]``
        in any order. A DataFrame with none of these names is read by position. An object that
        this function returned is given back as it is.
    first_two_suffice : bool, default=False
        Look at user and item only, as prediction does; other columns may hold anything.
    estimator : str or estimator, default=None
        Named in scikit-learn's messages.

    Returns
    -------
    columns : Columns
        One array per column.

    Raises
    ------
    TypeError
        If X is sparse, or a cell is neither text nor a number.
    ValueError
        If X is not two-dimensional, is empty, has fewer than two columns, lacks a required
        name or has an unknown one, or has NaN, None, infinity or complex numbers.

    Warns
    -----
    UserWarning
        If there are more than four columns by position, or a DataFrame's names had to be
        ignored.

    Examples
    --------
    >>> from fedrecsk.data import read_columns
    >>> columns = read_columns([["ann", 7, 5.0], ["bob", 8, 3.0]])
    >>> columns.user
    array(['ann', 'bob'], dtype='<U3')
    >>> columns.item
    array([7, 8])
    >>> columns.rating
    array([5., 3.])
    """
    if isinstance(X, Columns):
        return X
    if sp.issparse(X):
        raise TypeError(
            f"Sparse input is not supported here: got {type(X).__name__}. Turn a "
            "user x item matrix into rows with fedrecsk.data.interactions_from_sparse(X)."
        )
    frame = _as_frame(X)
    if frame is not None:
        if set(frame.columns) & set(NAMES):
            return _read_by_name(frame, first_two_suffice)
        return _read_frame_by_position(frame, first_two_suffice, estimator)
    array = _as_2d(X, estimator)
    columns = [array[:, position] for position in range(min(array.shape[1], len(POSITIONS)))]
    return _read_by_position(columns, array.shape[1], None, first_two_suffice)


def stack_columns(columns: list[NDArray[Any]]) -> NDArray[Any]:
    """Put columns side by side without changing a value.

    Parameters
    ----------
    columns : list of ndarray of shape (n,)
        Ids, ratings, timestamps.

    Returns
    -------
    array : ndarray of shape (n, n_columns)
        int64 or float64 if all columns are numbers that fit, else object.
    """
    if all(column.dtype.kind in "biuf" for column in columns):
        dtype = np.result_type(np.int64, *columns)
        integers = [column.astype(np.float64) for column in columns if column.dtype.kind in "iu"]
        # In an array of floats, integers from 2**53 on would be rounded.
        if dtype.kind == "i" or all((np.abs(column) < 2.0**53).all() for column in integers):
            return np.column_stack([column.astype(dtype) for column in columns])
    stacked = np.empty((len(columns[0]), len(columns)), dtype=object)
    for position, column in enumerate(columns):
        stacked[:, position] = column
    return stacked


def _as_frame(X: Any) -> nw.DataFrame[Any] | None:
    """Wrap a DataFrame of any library; None for everything else."""
    try:
        frame = nw.from_native(X, pass_through=True)
        if isinstance(frame, nw.DataFrame):
            _ = frame.columns
            return frame
    except nw.exceptions.DuplicateError as error:
        repeated = [str(name) for name, n in Counter(X.columns).items() if n > 1]
        raise ValueError(
            f"X has several columns of the same name: {', '.join(repeated)}. Rename or drop them."
        ) from error
    if isinstance(frame, nw.LazyFrame):
        raise TypeError("X is a lazy frame, whose rows are not there yet. Pass X.collect().")
    return None


def _as_2d(X: Any, estimator: object | None) -> NDArray[Any]:
    """Make a two-dimensional array, with scikit-learn's own messages where that fails."""
    if isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
        raise ValueError(f"X has {np.ma.getmaskarray(X).sum()} masked values. Drop their rows.")
    if isinstance(X, list | tuple):
        # Through object, or NumPy would turn the numbers of mixed rows into strings.
        array = np.array(X, dtype=object)
        if array.ndim == 1 and all(isinstance(row, list | tuple) for row in X) and len(X):
            lengths = sorted({len(row) for row in X})
            raise ValueError(
                f"The rows of X have different lengths: {', '.join(map(str, lengths))}. Give "
                "every row the same columns: user, item[, rating[, timestamp]]."
            )
        X = array
    array = check_array(
        X, dtype=None, ensure_all_finite=False, ensure_min_features=2, estimator=estimator
    )
    return np.asarray(array)


def _read_by_name(frame: nw.DataFrame[Any], first_two_suffice: bool) -> Columns:
    required = POSITIONS[:2]
    missing = [name for name in required if name not in frame.columns]
    if missing:
        raise ValueError(
            f"X lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
            f"{', '.join(map(str, frame.columns))}. Rename its columns to user_id, item_id[, "
            "rating][, timestamp][, client_id]."
        )
    wanted = required if first_two_suffice else NAMES
    extra = [str(name) for name in frame.columns if name not in NAMES]
    if extra and not first_two_suffice:
        raise ValueError(
            f"X has columns that mean nothing here: {', '.join(extra)}. Keep user_id, item_id[, "
            "rating][, timestamp][, client_id] and drop the others."
        )
    _refuse_no_rows(frame)
    arrays = {name: _to_numpy(frame[name], name) for name in wanted if name in frame.columns}
    return _columns(arrays, len(frame.columns), _feature_names(frame))


def _read_frame_by_position(
    frame: nw.DataFrame[Any], first_two_suffice: bool, estimator: object | None
) -> Columns:
    n_columns = len(frame.columns)
    if n_columns < 2:
        # For scikit-learn's message on too few columns.
        _as_2d(np.empty((len(frame), n_columns)), estimator)
    _refuse_no_rows(frame)
    names = _feature_names(frame)
    if names is not None:
        read = ", ".join(
            f"{name!r} as {meaning}" for name, meaning in zip(names, POSITIONS, strict=False)
        )
        warnings.warn(
            f"X has none of the columns {', '.join(NAMES)}, so its columns are read by position: "
            f"{read}. Rename them to be safe.",
            UserWarning,
            stacklevel=3,
        )
    series = list(frame.iter_columns())[: len(POSITIONS)]
    columns = [_to_numpy(column, name) for column, name in zip(series, POSITIONS, strict=False)]
    return _read_by_position(columns, n_columns, names, first_two_suffice)


def _read_by_position(
    columns: list[NDArray[Any]],
    n_columns: int,
    names: tuple[str, ...] | None,
    first_two_suffice: bool,
) -> Columns:
    if first_two_suffice:
        columns = columns[:2]
    elif n_columns > len(POSITIONS):
        warnings.warn(
            f"X has {n_columns} columns; those after the fourth (timestamp) are ignored.",
            UserWarning,
            stacklevel=3,
        )
    return _columns(dict(zip(POSITIONS, columns, strict=False)), n_columns, names)


def _columns(
    arrays: dict[str, NDArray[Any]], n_columns: int, names: tuple[str, ...] | None
) -> Columns:
    """Check each column for what it means."""
    rating, timestamp, client = (arrays.get(name) for name in NAMES[2:])
    return Columns(
        user=as_ids(arrays["user_id"], source="X", column="user_id"),
        item=as_ids(arrays["item_id"], source="X", column="item_id"),
        rating=None if rating is None else as_rating(rating),
        timestamp=None if timestamp is None else as_timestamp(timestamp),
        client=None if client is None else as_ids(client, source="X", column="client_id"),
        n_columns=n_columns,
        feature_names=names,
    )


def _refuse_no_rows(frame: nw.DataFrame[Any]) -> None:
    if not len(frame):
        raise ValueError(
            f"Found array with 0 sample(s) (shape={frame.shape}) while a minimum of 1 is required."
        )


def _feature_names(frame: nw.DataFrame[Any]) -> tuple[str, ...] | None:
    names = tuple(frame.columns)
    return names if all(isinstance(name, str) for name in names) else None


def _to_numpy(series: Any, column: str) -> NDArray[Any]:
    """Take a column out of a DataFrame; a null arrives as None, NaN or NaT and is refused later."""
    if isinstance(series.dtype, nw.String | nw.Int128 | nw.UInt128) or series.null_count():
        # As Python's own: an array may cut the ends of text, has no integers of 128 bits, and of
        # a null in a dictionary of pyarrow it makes one of the values.
        found = np.empty(len(series), dtype=object)
        found[:] = series.to_list()
        return found
    array: NDArray[Any] = series.to_numpy()
    return array


def as_rating(
    values: ArrayLike, *, source: str = "X", column: str | None = "rating"
) -> NDArray[np.float64]:
    """Give finite float64 ratings; numbers that are written as text are read."""
    array = as_ids(values, source=source, column=column)
    if array.dtype.kind in "US":
        # An array has one dtype: next to ids that are text, ratings arrive as text.
        array = _parse_numbers(array, source, column)
    rating = array.astype(np.float64)
    check_finite(rating, source, column)
    return rating


def as_timestamp(values: NDArray[Any], *, source: str = "X") -> NDArray[Any]:
    """Give int64 or float64; datetimes become microseconds since 1970 in UTC."""
    if values.dtype.kind == "O" and any(isinstance(value, dt.date) for value in values):
        values = _from_moments(values, source)
    if values.dtype.kind == "M":
        return _microseconds(values, source)
    array = as_ids(values, source=source, column="timestamp")
    if array.dtype.kind in "US":
        try:
            array = _parse_numbers(array, source, "timestamp")
        except ValueError:
            if (moments := _parse_moments(array)) is None:
                raise
            return _microseconds(moments, source)
    if array.dtype.kind in "bi":
        return array.astype(np.int64)
    timestamp = array.astype(np.float64)
    check_finite(timestamp, source, "timestamp")
    return timestamp


def _microseconds(moments: NDArray[Any], source: str) -> NDArray[np.int64]:
    if np.isnat(moments).any():
        raise missing_error(np.isnat(moments), source, "timestamp")
    _refuse_far_years(moments.astype("datetime64[Y]").astype(np.int64) + 1970, source)
    return moments.astype("datetime64[us]").astype(np.int64)


def _refuse_far_years(years: NDArray[np.int64], source: str) -> None:
    """Raise where NumPy would wrap a moment around to some other year."""
    far = np.flatnonzero(np.abs(years - 1970) > _MOST_YEARS)
    if far.size:
        raise ValueError(
            f"Column 'timestamp' of {source} has the year {years[far[0]]} in row {far[0]}, and "
            f"moments are kept for {_MOST_YEARS} years around 1970. Drop or repair these rows."
        )


def _parse_moments(array: IdArray) -> NDArray[Any] | None:
    """Read dates in the notation of ISO 8601, or None."""
    with warnings.catch_warnings():
        # NumPy warns that it turns an offset into UTC, which is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        try:
            texts = array.astype(np.str_)
            # NumPy takes "now" for a date, and turns years of many digits into others.
            if re.search(r"(?i)now|today|^\s*[+-]?\d{7}", "\n".join(texts.tolist()), re.MULTILINE):
                return None
            far = np.abs(texts.astype("datetime64[Y]").astype(np.int64)) > _MOST_YEARS
            return None if far.any() else texts.astype("datetime64[us]")
        except ValueError:
            return None


def _from_moments(values: NDArray[Any], source: str) -> NDArray[Any]:
    """Make a datetime array of Python datetimes; other things beside them are left to fail."""
    missing = np.array([is_missing(value) for value in values])
    if missing.any():
        raise missing_error(missing, source, "timestamp")
    if not all(isinstance(value, dt.date) for value in values):
        return values
    _refuse_far_years(np.array([value.year for value in values]), source)
    return np.array([_microseconds_of(value) for value in values], dtype="datetime64[us]")


def _microseconds_of(moment: dt.date) -> np.datetime64:
    """Bring a moment to UTC; in NumPy, since the years of Python end with 1 and 9999."""
    if isinstance(moment, dt.datetime) and moment.tzinfo is not None:
        offset = moment.utcoffset() or dt.timedelta(0)
        return np.datetime64(moment.replace(tzinfo=None), "us") - np.timedelta64(offset, "us")
    return np.datetime64(moment, "us")


def _parse_numbers(array: IdArray, source: str, column: str | None) -> NDArray[Any]:
    """Read numbers that are written as text."""
    for dtype in (np.int64, np.float64):
        try:
            return array.astype(dtype)
        except (ValueError, OverflowError):  # an integer of more than 64 bits is read as a float
            continue
    example = next(value for value in array.tolist() if not _is_number(value))
    raise ValueError(
        f"Column '{column}' of {source} holds text that is no number, such as {example!r}. "
        f"Convert the column to numbers{' or datetimes' * (column == 'timestamp')}."
    )


def _is_number(text: str | bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
