"""Ids and codes: any sortable ids on the outside, ``0 .. n - 1`` on the inside."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

IdArray = NDArray[Any]
Text = TypeVar("Text", str, bytes)

# Told apart by name, because pandas must not be imported for its two missing values.
_MISSING_TYPE_NAMES = frozenset({"NoneType", "NAType", "NaTType"})

# An array of text is as wide everywhere as its longest entry. Where one is longer than this, an
# array of more than so many bytes is not made.
_LONG_TEXT = 256
_MOST_BYTES = 2**32


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The distinct ids of one kind (users, items or clients) and their codes.

    The code of an id is its position in ``ids``, so codes do not depend on the order in
    which the ids were met.

    Parameters
    ----------
    ids : ndarray of shape (n_ids,)
        Distinct ids in ascending order: bool, int64, uint64, float64, str or bytes. Build
        it with :meth:`from_values`, which checks and sorts.

    Examples
    --------
    >>> from fedrecsk.data.vocabulary import Vocabulary
    >>> vocabulary, codes = Vocabulary.from_values([30, 10, 30, 20])
    >>> vocabulary.ids
    array([10, 20, 30])
    >>> codes
    array([2, 0, 2, 1])
    >>> codes, known = vocabulary.encode([20, 99])
    >>> codes
    array([ 1, -1])
    >>> known
    array([ True, False])
    """

    ids: IdArray

    @classmethod
    def from_values(
        cls, values: ArrayLike, *, source: str = "ids", column: str | None = None
    ) -> tuple[Vocabulary, NDArray[np.int64]]:
        """Collect the distinct values and code every value.

        Parameters
        ----------
        values : array-like of shape (n,)
            Ids, with repeats.
        source : str, default="ids"
            What error messages call the argument that the values came in.
        column : str, default=None
            What error messages call the column of ``source``, if it has columns.

        Returns
        -------
        vocabulary : Vocabulary
            The distinct values.
        codes : ndarray of shape (n,), int64
            ``vocabulary.ids[codes]`` equals ``values``.

        Raises
        ------
        ValueError
            If a value is missing or infinite, or ``values`` is not one-dimensional.
        TypeError
            If the values are neither all text nor all numbers.
        """
        array = as_ids(values, source=source, column=column)
        if _dense(array):
            ids, codes = _looked_up(array)
        else:
            ids, codes = np.unique(array, return_inverse=True)
        return cls(ids), codes.astype(np.int64, copy=False)

    def encode(
        self, values: ArrayLike, *, source: str = "ids", column: str | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Look up the codes of ids, some of which may be new.

        Numbers are compared by value, so 3, 3.0 and ``np.int8(3)`` are one id. Text never
        equals a number, nor bytes a str: such values are unknown.

        Parameters
        ----------
        values : array-like of shape (n,)
            Ids to look up.
        source, column : str
            As in :meth:`from_values`.

        Returns
        -------
        codes : ndarray of shape (n,), int64
            Position in ``ids``, or -1 where the id is unknown.
        known : ndarray of shape (n,), bool
            Whether the id is in the vocabulary.

        Raises
        ------
        ValueError
            If a value is missing or infinite, or ``values`` is not one-dimensional.
        TypeError
            If the values are neither all text nor all numbers.
        """
        array = as_ids(values, source=source, column=column)
        known = np.zeros(array.shape, dtype=np.bool_)
        codes = np.full(array.shape, -1, dtype=np.int64)
        if not len(self) or _family(array) != _family(self.ids):
            return codes, known
        ids = self.ids.astype(np.int64) if self.ids.dtype.kind == "b" else self.ids
        wanted, exact = _convert(array, ids.dtype)
        positions = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
        known = exact & (ids[positions] == wanted)
        codes[known] = positions[known]
        return codes, known

    def decode(self, codes: ArrayLike) -> IdArray:
        """Give the ids of codes.

        Parameters
        ----------
        codes : array-like of int
            Codes, of any shape, each in ``0 .. n_ids - 1``.

        Returns
        -------
        ids : ndarray of the shape of ``codes``
            The ids.

        Raises
        ------
        ValueError
            If a code is outside the vocabulary, as -1 (unknown) is.
        """
        codes = np.asarray(codes)
        if not codes.size:
            codes = codes.astype(np.int64)
        elif codes.min() < 0 or codes.max() >= len(self):
            raise ValueError(
                f"Codes must lie between 0 and {len(self) - 1}; got {codes.min()} to "
                f"{codes.max()}. Mask the unknown ids before decoding."
            )
        decoded: IdArray = self.ids[codes]
        return decoded

    def extend(
        self, values: ArrayLike, *, source: str = "ids", column: str | None = None
    ) -> Vocabulary:
        """Make a vocabulary that has further ids as well.

        Codes may move: ``new.encode(old.ids)[0]`` gives the new code of each old one.

        Parameters
        ----------
        values : array-like of shape (n,)
            Ids, known or new, with repeats.
        source, column : str
            As in :meth:`from_values`.

        Returns
        -------
        vocabulary : Vocabulary
            The union, sorted. The dtype of the old ids is kept where it can hold the new.

        Raises
        ------
        ValueError
            If no dtype holds old and new ids without rounding, or as in
            :meth:`from_values`.
        TypeError
            If text meets numbers.

        Examples
        --------
        >>> from fedrecsk.data.vocabulary import Vocabulary
        >>> old, _ = Vocabulary.from_values([10, 30])
        >>> new = old.extend([20.0, 30.0])
        >>> new.ids
        array([10, 20, 30])
        >>> new.encode(old.ids)[0]
        array([0, 2])
        """
        array = as_ids(values, source=source, column=column)
        if not len(array):
            return self
        if not len(self):
            return Vocabulary(distinct(array))
        if _family(array) != _family(self.ids):
            raise TypeError(
                f"New ids in {_place(source, column)} are {_family(array)}, such as "
                f"{array[0].item()!r}, but the known ids are {_family(self.ids)}, such as "
                f"{self.ids[0].item()!r}. Convert the new ids to the kind of the known ones."
            )
        for dtype in _extended_dtypes(self.ids, array):
            old, old_exact = _convert(self.ids, dtype)
            new, new_exact = _convert(array, dtype)
            if old_exact.all() and new_exact.all():
                return Vocabulary(distinct(np.concatenate([old, new])))
        raise ValueError(
            f"The ids in {_place(source, column)} and the known ids cannot be kept together "
            "without rounding: integers beyond 2**53 meet fractions or negative ids. Pass the "
            "ids as strings."
        )

    def __len__(self) -> int:
        return len(self.ids)


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Sort values and leave out repeats.

    Parameters
    ----------
    values : ndarray of shape (n,)

    Returns
    -------
    ndarray of shape (m,)
        Ascending.

    Notes
    -----
    Does what ``numpy.unique`` does. That one looks integers up in a hash table, and took 70 times
    as long for a million large ones (NumPy 2.4).

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.data.vocabulary import distinct
    >>> distinct(np.array([3, 1, 3])).tolist()
    [1, 3]
    """
    ordered = np.sort(values)
    is_first = np.ones(len(ordered), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first]


def _dense(array: IdArray) -> bool:
    """Tell whether integers lie so close that a table over their range is no larger than they."""
    if array.dtype != np.int64 or not array.size:
        return False
    return int(array.max()) - int(array.min()) < array.size


def _looked_up(array: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct ids and the code of each value, as ``numpy.unique``, by a table over their range.

    Nothing is sorted: a tenth of the time for millions of rows.
    """
    low = int(array.min())
    place = array - low
    occurs = np.zeros(int(place.max()) + 1, dtype=bool)
    occurs[place] = True
    code = np.cumsum(occurs) - 1
    return np.flatnonzero(occurs) + low, code[place]


def as_ids(values: ArrayLike, *, source: str = "ids", column: str | None = None) -> IdArray:
    """Check a column of ids and bring it to one of the dtypes that a vocabulary keeps.

    Parameters
    ----------
    values : array-like of shape (n,)
        Strings, bytes, or numbers; a list may not mix text with numbers.
    source : str, default="ids"
        What error messages call the argument that the values came in.
    column : str, default=None
        What error messages call the column of ``source``, if it has columns.

    Returns
    -------
    ids : ndarray of shape (n,)
        bool, int64, uint64 (only where int64 is too small), float64, str or bytes.

    Raises
    ------
    ValueError
        If a value is missing, infinite or complex, an integer needs more than 64 bits, a text ends
        in a NUL character or is so much longer than the others that their table would not fit
        into memory, or ``values`` is not one-dimensional.
    TypeError
        If the values are neither all text nor all numbers.

    Examples
    --------
    >>> from fedrecsk.data.vocabulary import as_ids
    >>> as_ids(["b", "a"])
    array(['b', 'a'], dtype='<U1')
    >>> as_ids([1, "a"], source="X", column="user_id")
    Traceback (most recent call last):
    TypeError: Numbers and text are mixed in column 'user_id' of X, such as 1 and 'a'. Convert...
    """
    place = _place(source, column)
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise missing_error(np.ma.getmaskarray(values).ravel(), source, column)
    # A list goes through object: NumPy would turn the numbers of a mixed list into strings.
    array = (
        np.array(values, dtype=object) if isinstance(values, list | tuple) else np.asarray(values)
    )
    if array.ndim != 1:
        raise ValueError(
            f"Expected {place} to be a 1d array, got an array of shape {array.shape}. "
            "Pass one value per entry; put a single value into a list."
        )
    if array.dtype.kind in "OT":
        array = _from_objects(array.astype(object).tolist(), source, column)
    match array.dtype.kind:
        case "b" | "U" | "S":
            return array
        case "i" | "u":
            return _narrow_integers(array)
        case "f":
            # What is too large for double precision becomes infinite, and that is refused.
            with np.errstate(over="ignore"):
                array = array.astype(np.float64, copy=False)
            check_finite(array, source, column)
            return array
        case "c":
            raise ValueError(f"Complex data not supported: {place} holds complex numbers.")
    raise TypeError(
        f"Expected strings or numbers, but {place} has dtype {array.dtype}. Convert it, for "
        "example with astype(str)."
    )


def one_or_many(values: ArrayLike, *, source: str) -> IdArray:
    """Check ids of which there may be one alone.

    Parameters
    ----------
    values : array-like of shape (n,), or one id
    source : str
        What error messages call the argument.

    Returns
    -------
    ids : ndarray of shape (n,)
        As of :func:`as_ids`.

    Raises
    ------
    ValueError, TypeError
        As :func:`as_ids`.

    Examples
    --------
    >>> from fedrecsk.data.vocabulary import one_or_many
    >>> one_or_many("ann", source="users"), one_or_many([3, 5], source="users")
    (array(['ann'], dtype='<U3'), array([3, 5]))
    """
    # Not numpy.atleast_1d, which makes text of numbers beside text, and cuts the ends of text.
    if isinstance(values, list | tuple) or np.ndim(values):
        return as_ids(values, source=source)
    one: Any = values.item() if isinstance(values, np.ndarray) else values
    return as_ids([one], source=source)


def check_finite(array: NDArray[np.float64], source: str, column: str | None = None) -> None:
    """Raise ValueError where a float column has a NaN or an infinity, and say where.

    Parameters
    ----------
    array : ndarray of shape (n,)
        The column.
    source, column : str
        As in :func:`as_ids`.
    """
    if np.isfinite(array).all():
        return
    missing = np.isnan(array)
    if missing.any():
        raise missing_error(missing, source, column)
    rows = np.flatnonzero(np.isinf(array))
    raise ValueError(
        f"Input {source} contains infinity: {len(rows)} of {len(array)} values"
        f"{_in_column(column)}, the first in row {rows[0]}. Drop these rows or repair the values."
    )


def missing_error(missing: NDArray[np.bool_], source: str, column: str | None = None) -> ValueError:
    """Make the error that says how many values are missing, and where.

    Parameters
    ----------
    missing : ndarray of shape (n,)
        Mask of the missing values.
    source, column : str
        As in :func:`as_ids`.
    """
    rows = np.flatnonzero(missing)
    return ValueError(
        f"Input {source} contains NaN: {len(rows)} of {len(missing)} values"
        f"{_in_column(column)} are missing (NaN or None), the first in row {rows[0]}. Drop these "
        "rows or fill in the values."
    )


def _place(source: str, column: str | None) -> str:
    return source if column is None else f"column '{column}' of {source}"


def _in_column(column: str | None) -> str:
    return "" if column is None else f" in column '{column}'"


def _family(array: IdArray) -> str:
    """Name what ids may be compared with: numbers only meet numbers."""
    return {"U": "text", "S": "bytes"}.get(array.dtype.kind, "numbers")


def _from_objects(values: list[Any], source: str, column: str | None) -> IdArray:
    """Find the one dtype that all Python values of a column share."""
    types = set(map(type, values))
    kinds = {_kind_of(kind, source, column) for kind in types}
    if (
        "missing" in kinds
        or kinds >= {"text", "float"}
        or any(issubclass(kind, Decimal) for kind in types)
    ):
        missing = np.array([is_missing(value) for value in values])
        if missing.any():
            raise missing_error(missing, source, column)
    if len(families := {"numbers" if k in ("int", "float", "bool") else k for k in kinds}) > 1:
        first: dict[str, Any] = {}
        for value in values:
            kind = _kind_of(type(value), source, column)
            first.setdefault("numbers" if kind in ("int", "float", "bool") else kind, value)
        names = sorted(families)
        raise TypeError(
            f"{' and '.join(names).capitalize()} are mixed in {_place(source, column)}, such as "
            f"{' and '.join(repr(first[name]) for name in names)}. Convert all to one kind, for "
            "example with astype(str)."
        )
    if kinds <= {"bool"}:
        return np.array(values, dtype=np.bool_ if kinds else np.int64)
    if kinds <= {"text"}:
        if types != {str}:  # what is text by inheritance may call itself something else
            values = [str.__str__(value) for value in values]
        _check_text(values, source, column, empty="", nul="\0", width=4)
        return np.array(values, dtype=np.str_)
    if kinds <= {"bytes"}:
        _check_text(values, source, column, empty=b"", nul=b"\0", width=1)
        return np.array(values, dtype=np.bytes_)
    return _numbers_from_objects(values, kinds, source, column)


def _check_text(
    values: list[Text], source: str, column: str | None, *, empty: Text, nul: Text, width: int
) -> None:
    """Refuse text that an array would cut or blow up; a character has `width` bytes there."""
    longest = max(map(len, values), default=0)
    n_bytes = longest * len(values) * width
    if longest > _LONG_TEXT and n_bytes > _MOST_BYTES:
        raise ValueError(
            f"The longest text in {_place(source, column)} has {longest} characters, so an array "
            f"of all {len(values)} would take {n_bytes / 2**30:.1f} GiB. Shorten the longest, for "
            "example to a hash."
        )
    if nul in empty.join(values):
        cut = next((value for value in values if value.endswith(nul)), None)
        if cut is not None:
            raise ValueError(
                f"Text in {_place(source, column)} ends in a NUL character, {cut!r}, which an "
                "array of text cannot keep. Remove it."
            )


def _numbers_from_objects(
    values: list[Any], kinds: set[str], source: str, column: str | None
) -> IdArray:
    """Make int64 or uint64 of integers, and float64 where there is a float."""
    place = _place(source, column)
    if "float" in kinds:
        large = [v for v in values if isinstance(v, numbers.Integral) and abs(int(v)) >= 2**53]
        if large:
            raise ValueError(
                f"Floats are mixed with integers of 2**53 and more in {place}, such as "
                f"{large[0]!r}, which floats cannot tell apart. Pass them as strings."
            )
        try:
            with np.errstate(over="ignore"):
                return np.array(values, dtype=np.float64)
        # A fraction or decimal beyond all floats.
        except OverflowError as error:
            raise ValueError(
                f"A number in {place} is too large for double precision. Pass such numbers as "
                "strings."
            ) from error
    low, high = min(values), max(values)
    if low < -(2**63) or high >= 2**64 or (low < 0 and high >= 2**63):
        raise ValueError(
            f"The integers in {place} run from {low} to {high}, which does not fit 64 bits. Pass "
            "them as strings."
        )
    return np.array(values, dtype=np.int64 if high < 2**63 else np.uint64)


def _kind_of(kind: type, source: str, column: str | None) -> str:
    """Sort a Python type into the kinds that a column of ids may have."""
    if kind.__name__ in _MISSING_TYPE_NAMES:
        return "missing"
    if issubclass(kind, bool | np.bool_):
        return "bool"
    if issubclass(kind, str):
        return "text"
    if issubclass(kind, bytes):
        return "bytes"
    is_duration = issubclass(kind, np.timedelta64)  # which NumPy counts among the integers
    if issubclass(kind, numbers.Integral) and not is_duration:
        return "int"
    if issubclass(kind, numbers.Real | Decimal) and not is_duration:
        return "float"
    if issubclass(kind, numbers.Complex) and not is_duration:
        raise ValueError(
            f"Complex data not supported: {_place(source, column)} holds complex numbers."
        )
    # The opening words are those of float() itself, which scikit-learn's checks look for.
    raise TypeError(
        f"argument must be a string or a number, not '{kind.__name__}': found in "
        f"{_place(source, column)}. Convert its entries to strings or numbers."
    )


def is_missing(value: Any) -> bool:
    """Say whether a Python value is None, a NaN or a missing value of pandas."""
    if isinstance(value, Decimal):
        return value.is_nan()  # a signalling NaN lets nobody compare it
    return type(value).__name__ in _MISSING_TYPE_NAMES or (
        isinstance(value, numbers.Real) and bool(value != value)
    )


def _narrow_integers(array: IdArray) -> IdArray:
    """Bring integers to int64 unless they need the upper half of uint64."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size:
        return array.astype(np.int64 if array.max() < 2**63 else np.uint64, copy=False)
    return array.astype(np.int64, copy=False)


def _extended_dtypes(old: IdArray, new: IdArray) -> list[DTypeLike]:
    if old.dtype.kind in "US":
        return [np.promote_types(old.dtype, new.dtype)]
    return [old.dtype, np.int64, np.uint64, np.float64]


def _convert(array: IdArray, dtype: DTypeLike) -> tuple[IdArray, NDArray[np.bool_]]:
    """Convert ids to a dtype of their family; the mask is False where the value changed."""
    target = np.dtype(dtype)
    if array.dtype == target or target.kind in "US":
        # Text is left as wide as it is: cutting it to the target's width would make
        # unknown ids equal to known ones.
        return array, np.ones(array.shape, dtype=np.bool_)
    within = _within(array, target)
    converted = np.where(within, array, np.zeros((), dtype=array.dtype)).astype(target)
    returns = _within(converted, array.dtype)
    back = np.where(returns, converted, np.zeros((), dtype=target)).astype(array.dtype)
    return converted, within & (back == array)


def _within(array: IdArray, target: np.dtype[Any]) -> NDArray[np.bool_]:
    """Mask the numbers inside the range of a dtype; a cast from outside is undefined."""
    if target.kind not in "iu" or array.dtype.kind == "b":
        return np.ones(array.shape, dtype=np.bool_)
    low, high = (-(2**63), 2**63 - 1) if target.kind == "i" else (0, 2**64 - 1)
    if array.dtype.kind == "f":
        inside: NDArray[np.bool_] = (array >= float(low)) & (array < float(high + 1))
        return inside
    limits = np.iinfo(array.dtype)
    return (array >= max(low, int(limits.min))) & (array <= min(high, int(limits.max)))
