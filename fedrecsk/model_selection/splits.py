"""Cross-validation splitters for interactions, in scikit-learn's form.

A random split of rows would put copies of one (user, item) pair on both sides and leave some users
without training rows. The splitters here deal out distinct pairs, all rows of a pair together, and
each says which users it leaves whole.

All of them work on :class:`_Pairs`, the distinct pairs sorted by user and item. Random draws are
made in that order, so a seed holds out the same pairs whatever the order of the rows.
"""

from __future__ import annotations

import numbers
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils import check_random_state

from fedrecsk.data.interactions import read_columns
from fedrecsk.data.vocabulary import Vocabulary

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
RandomState = int | np.random.RandomState | None


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The distinct (user, item) pairs of n rows, P of them, sorted by user and item."""

    user: IntArray  # (P,) codes 0 .. n_users - 1
    of_row: IntArray  # (n,) pair of each row
    n_users: int
    first_row: IntArray  # (P,) where the pair is met first
    timestamp: npt.NDArray[Any] | None  # (P,) the pair's latest

    @property
    def of_user(self) -> IntArray:
        """Number of pairs of each user, (n_users,)."""
        return np.bincount(self.user, minlength=self.n_users)

    def rank_within_user(self, *keys: npt.NDArray[Any]) -> IntArray:
        """Place of each pair, from 0, among its user's pairs sorted by the keys, (P,)."""
        order = np.lexsort((*reversed(keys), self.user))
        starts = np.cumsum(self.of_user) - self.of_user
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(starts, self.of_user)
        return rank


def _read_pairs(X: Any, with_time: bool) -> _Pairs:
    # Without need for the time nothing else is looked at, so a DataFrame may have columns that
    # only the first steps of a pipeline know.
    columns = read_columns(X, first_two_suffice=not with_time)
    users, user = Vocabulary.from_values(columns.user)
    items, item = Vocabulary.from_values(columns.item)
    keys, first_row, of_row = np.unique(
        user * len(items) + item, return_index=True, return_inverse=True
    )
    timestamp = None
    if columns.timestamp is not None:
        # The last of a pair's rows sorted by time: assignment keeps the last value written.
        by_time = np.argsort(columns.timestamp, kind="stable")
        timestamp = np.empty(len(keys), dtype=columns.timestamp.dtype)
        timestamp[of_row[by_time]] = columns.timestamp[by_time]
    return _Pairs(keys // max(len(items), 1), of_row, len(users), first_row, timestamp)


class _PairSplitter(BaseCrossValidator):
    """Reads the rows, lets a subclass choose pairs, and turns the choice into row indices."""

    n_splits: int = 1
    _needs_time: bool = False

    @abstractmethod
    def _held_out(self, pairs: _Pairs) -> Iterator[BoolArray]:
        """Yield for each split the mask (P,) of the pairs that go to test."""

    def split(
        self, X: Any, y: Any = None, groups: Any = None
    ) -> Iterator[tuple[IntArray, IntArray]]:
        """Generate the row indices of each split.

        Parameters
        ----------
        X : interactions
            Array of shape (n_rows, 2..4) or DataFrame.
        y : ignored
            The slot that carries ``client_ids``; the split does not depend on them.
        groups : ignored
            Here because scikit-learn's splitters have it.

        Yields
        ------
        train : ndarray of shape (n_train,), int64
            Rows to fit on, ascending.
        test : ndarray of shape (n_test,), int64
            Rows held out, ascending.

        Raises
        ------
        ValueError
            If nothing can be held out, or the rows lack what the splitter needs.
        """
        if groups is not None:
            warnings.warn(
                f"The groups parameter is ignored by {type(self).__name__}", UserWarning, 2
            )
        pairs = _read_pairs(X, self._needs_time)
        for held_out in self._held_out(pairs):
            test = held_out[pairs.of_row]
            yield np.flatnonzero(~test), np.flatnonzero(test)

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Return the number of splits.

        Parameters
        ----------
        X, y, groups : ignored
            Here because scikit-learn's splitters have them.

        Returns
        -------
        n_splits : int
            Number of (train, test) pairs that ``split`` yields.
        """
        return self.n_splits


class LeaveLastOut(_PairSplitter):
    """Hold out the latest items of each user: the past predicts the future.

    Needs timestamps. A pair that occurs several times counts at its latest time, and all its
    rows are held out together. Of equal times the later row is the later one. Users with at most
    ``n`` distinct items stay wholly in train.

    Parameters
    ----------
    n : int, default=1
        Items of each user to hold out.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.model_selection import LeaveLastOut
    >>> X = np.array([  # user, item, rating, timestamp
    ...     [1, 10, 1, 300], [1, 11, 1, 100], [1, 12, 1, 200], [2, 10, 1, 100]])
    >>> for train, test in LeaveLastOut().split(X):
    ...     print(train, test)
    [1 2 3] [0]
    """

    _needs_time = True

    def __init__(self, n: int = 1) -> None:
        self.n = _positive_int("n", n)

    def _held_out(self, pairs: _Pairs) -> Iterator[BoolArray]:
        if pairs.timestamp is None:
            raise ValueError(
                "LeaveLastOut needs the time of each row, and X has none: pass a DataFrame with a "
                "'timestamp' column or an array with four columns (user, item, rating, timestamp)."
            )
        last_row = np.empty(len(pairs.user), dtype=np.int64)
        last_row[pairs.of_row] = np.arange(len(pairs.of_row))
        rank = pairs.rank_within_user(pairs.timestamp, last_row)
        size = pairs.of_user[pairs.user]
        n = min(self.n, int(size.max()))  # an int of any size becomes one of an array
        held_out = (rank >= size - n) & (size > n)
        if not held_out.any():
            raise ValueError(
                f"No user has more than n={self.n} distinct items, so nothing can be held out "
                f"(the largest of the {pairs.n_users} users has {size.max()}); lower n."
            )
        yield held_out


class PerUserHoldout(_PairSplitter):
    """Hold out a random share of each user's items.

    A user with m distinct items gives test_size · m of them, rounded to the nearest whole number
    (halves up), but never the last one: at least one stays in train. So a user with one item stays
    in train, and so does a user whose share rounds to 0 (with ``test_size=0.2``, two items).

    Parameters
    ----------
    test_size : float or int, default=0.2
        Share in (0, 1), or number of items of each user.
    n_splits : int, default=1
        Number of independent splits.
    random_state : int, RandomState or None, default=None
        An int holds out the same pairs each time, whatever the order of the rows.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.model_selection import PerUserHoldout
    >>> X = np.array([[user, item] for user in (1, 2) for item in range(5)])
    >>> train, test = next(PerUserHoldout(random_state=0).split(X))
    >>> X[test, 0]
    array([1, 2])
    """

    def __init__(
        self, test_size: float = 0.2, n_splits: int = 1, random_state: RandomState = None
    ) -> None:
        self.test_size = _check_test_size(test_size)
        self.n_splits = _positive_int("n_splits", n_splits)
        self.random_state = random_state

    def _held_out(self, pairs: _Pairs) -> Iterator[BoolArray]:
        size = pairs.of_user
        n_test = np.minimum(_share(self.test_size, size), size - 1)[pairs.user]
        if not n_test.any():
            raise ValueError(
                f"test_size={self.test_size} holds out nothing: the largest of the "
                f"{pairs.n_users} users has {size.max(initial=0)} distinct items. Raise test_size, "
                "or pass users with more items."
            )
        rng = check_random_state(self.random_state)
        for _ in range(self.n_splits):
            yield pairs.rank_within_user(rng.random_sample(len(pairs.user))) < n_test


class PerUserKFold(_PairSplitter):
    """Deal each user's items out to folds, each fold being the test set once.

    Users follow one another in the deal, so the folds of one user differ by at most one item, and
    so do the folds as wholes. Users with one distinct item stay in train in every split; no user
    ever loses all its items.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, at least 2.
    shuffle : bool, default=True
        Whether to deal users and their items in random order. False: items in the order in which
        they appear in ``X``.
    random_state : int, RandomState or None, default=None
        An int gives the same folds each time, whatever the order of the rows. Needs ``shuffle``.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.model_selection import PerUserKFold
    >>> X = np.array([[user, item] for user in (1, 2) for item in range(3)])
    >>> for train, test in PerUserKFold(3, shuffle=False).split(X):
    ...     print(train, test)
    [1 2 4 5] [0 3]
    [0 2 3 5] [1 4]
    [0 1 3 4] [2 5]
    """

    def __init__(
        self, n_splits: int = 5, *, shuffle: bool = True, random_state: RandomState = None
    ) -> None:
        self.n_splits = _positive_int("n_splits", n_splits)
        if self.n_splits < 2:
            raise ValueError(
                f"n_splits={n_splits} leaves no training rows; k-fold needs n_splits=2 or more."
            )
        if not isinstance(shuffle, bool | np.bool_):
            raise TypeError(f"shuffle must be True or False; got {shuffle!r}")
        if not shuffle and random_state is not None:
            raise ValueError(
                "random_state has no effect since shuffle is False; leave it at None, or set "
                "shuffle=True."
            )
        self.shuffle = shuffle
        self.random_state = random_state

    def _held_out(self, pairs: _Pairs) -> Iterator[BoolArray]:
        dealt = np.flatnonzero(pairs.of_user[pairs.user] > 1)
        if len(dealt) < self.n_splits:
            raise ValueError(
                f"n_splits={self.n_splits} is more than the {len(dealt)} (user, item) pairs of "
                "users with at least two distinct items; lower n_splits."
            )
        if self.shuffle:
            rng = check_random_state(self.random_state)
            user_order = rng.permutation(pairs.n_users)
            item_order = rng.random_sample(len(pairs.user))
        else:
            user_order = np.arange(pairs.n_users)
            item_order = pairs.first_row
        order = np.lexsort((item_order[dealt], user_order[pairs.user[dealt]]))
        fold = np.full(len(pairs.user), -1, dtype=np.int64)
        fold[dealt[order]] = np.arange(len(dealt)) % self.n_splits
        for split in range(self.n_splits):
            yield fold == split


class ColdUserSplit(_PairSplitter):
    """Hold out whole users, to see what a recommender does for people it never met.

    Parameters
    ----------
    test_size : float or int, default=0.2
        Share of the users in (0, 1), rounded to the nearest whole number but to at least one on
        each side, or number of users.
    n_splits : int, default=1
        Number of independent splits.
    random_state : int, RandomState or None, default=None
        An int holds out the same users each time, whatever the order of the rows.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.model_selection import ColdUserSplit
    >>> X = np.array([[user, item] for user in range(5) for item in range(3)])
    >>> train, test = next(ColdUserSplit(random_state=0).split(X))
    >>> set(X[test, 0]) & set(X[train, 0])
    set()
    >>> len(test)
    3
    """

    def __init__(
        self, test_size: float = 0.2, n_splits: int = 1, random_state: RandomState = None
    ) -> None:
        self.test_size = _check_test_size(test_size)
        self.n_splits = _positive_int("n_splits", n_splits)
        self.random_state = random_state

    def _held_out(self, pairs: _Pairs) -> Iterator[BoolArray]:
        n_test = int(_share(self.test_size, np.array([pairs.n_users]))[0])
        if isinstance(self.test_size, float):
            n_test = min(max(n_test, 1), pairs.n_users - 1)
        if not 0 < n_test < pairs.n_users:
            raise ValueError(
                f"test_size={self.test_size} cannot be held out of {pairs.n_users} users: at least "
                "one user must stay in train and one go to test."
            )
        rng = check_random_state(self.random_state)
        for _ in range(self.n_splits):
            cold = np.zeros(pairs.n_users, dtype=np.bool_)
            cold[rng.permutation(pairs.n_users)[:n_test]] = True
            yield cold[pairs.user]


def _share(test_size: float, sizes: IntArray) -> IntArray:
    """How many of each size to hold out: a share rounded half up, or the number itself."""
    if isinstance(test_size, int):
        # At most all there are, since an int may be too large for an array.
        return np.full(len(sizes), min(test_size, sizes.max(initial=0)), dtype=np.int64)
    # 0.15 * 10 is a hair above 1.5 and 0.35 * 10 a hair below 3.5; a half is meant by both.
    return np.floor(np.round(test_size * sizes, 9) + 0.5).astype(np.int64)


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return int(value)


def _check_test_size(value: Any) -> float:
    """Return test_size as int or float; ValueError unless it is a count or a share."""
    if isinstance(value, bool):
        pass
    elif isinstance(value, numbers.Integral):
        if (count := int(value)) >= 1:
            return count
    elif isinstance(value, numbers.Real) and 0.0 < (share := float(value)) < 1.0:
        return share
    raise ValueError(
        f"test_size={value!r} must be a positive integer or a float strictly between 0 and 1."
    )
