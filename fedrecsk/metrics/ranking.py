"""Top-k lists and how good they are.

Ranking is the expensive step, so it is done once: scores become a top-k list (:func:`top_k`),
the list becomes a boolean matrix of hits (:func:`hits_of`), and each metric is a few operations
on the hits (``*_from_hits``). The public ``*_at_k`` functions chain the three steps.

``U`` users, ``I`` items, ``L`` places of a ranked list.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, issparse

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# argpartition makes an int64 index for every score; blocks of this many scores keep that to
# some 32 MB and are no slower than one big call.
_BLOCK = 1 << 22


def top_k(scores: npt.ArrayLike, k: int) -> IntArray:
    """Columns of the k highest scores of each row, best first.

    Equal scores are ordered by column, so the answer does not depend on how many rows are
    ranked together. NaN counts as -inf.

    Parameters
    ----------
    scores : array-like of shape (U, I)
        Scores, higher is better.
    k : int
        Length of the lists, at least 1; at most ``I`` places are filled.

    Returns
    -------
    columns : ndarray of shape (U, min(k, I)), int64
        Column indices by descending score; columns that score -inf come last.

    Raises
    ------
    ValueError
        If ``scores`` is not two-dimensional or ``k`` is not a positive integer.

    Examples
    --------
    >>> from fedrecsk.metrics import top_k
    >>> top_k([[0.1, 0.7, 0.7], [3.0, 1.0, 2.0]], k=2)
    array([[1, 2],
           [0, 2]])
    """
    k = check_k(k)
    values = as_numbers(scores, "scores")
    if values.ndim != 2:
        raise ValueError(f"scores must have shape (n_users, n_items), got {values.shape}.")
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    n_users, n_items = values.shape
    k = min(k, n_items)
    columns = np.empty((n_users, k), dtype=np.int64)
    if columns.size == 0:
        return columns
    rows = max(1, _BLOCK // n_items)
    for start in range(0, n_users, rows):
        columns[start : start + rows] = _top_k_block(values[start : start + rows], k)
    return columns


def _top_k_block(scores: npt.NDArray[Any], k: int) -> IntArray:
    n_items = scores.shape[1]
    columns = np.argpartition(scores, n_items - k, axis=1)[:, n_items - k :]
    best = np.take_along_axis(scores, columns, axis=1)
    if np.isnan(best).any():  # NaN sorts above every number, so it shows up here or nowhere
        return _top_k_block(np.where(np.isnan(scores), -np.inf, scores), k)
    boundary = best.min(axis=1, keepdims=True)
    tied = np.flatnonzero(np.count_nonzero(scores >= boundary, axis=1) > k)
    if tied.size:
        # argpartition picks among equal scores as it likes; redo these rows by the rule.
        above = scores[tied] > boundary[tied]
        equal = scores[tied] == boundary[tied]
        wanted = k - np.count_nonzero(above, axis=1, keepdims=True)
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= wanted))
        columns[tied] = np.nonzero(chosen)[1].reshape(-1, k)
    columns.sort(axis=1)  # so that the stable sort below leaves ties in column order
    best = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def hits_of(top: npt.NDArray[np.integer[Any]], truth: csr_array) -> BoolArray:
    """Mark the entries of ranked lists that are true items of their user.

    Parameters
    ----------
    top : ndarray of shape (U, L)
        Item codes of each list; a negative entry is padding and never a hit.
    truth : csr_array of shape (U, I)
        Stored entries are the true items, whatever their value.

    Returns
    -------
    hits : ndarray of shape (U, L), bool
        Whether each entry is true.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse import csr_array
    >>> from fedrecsk.metrics.ranking import hits_of
    >>> hits_of(np.array([[2, 0], [1, -1]]), csr_array([[1, 0, 0], [0, 1, 0]]))
    array([[False,  True],
           [ True, False]])
    """
    n_users, n_items = truth.shape
    users = np.arange(n_users, dtype=np.int64)[:, None]
    return stored_in(truth.indptr, truth.indices, n_items, users, top)


def stored_in(
    indptr: npt.NDArray[np.integer[Any]],
    indices: npt.NDArray[np.integer[Any]],
    n_columns: int,
    rows: npt.NDArray[np.integer[Any]],
    columns: npt.NDArray[np.integer[Any]],
) -> BoolArray:
    """Tell which (row, column) entries a CSR structure stores; negative columns never.

    ``rows`` and ``columns`` broadcast to the shape of the answer.
    """
    # One sorted key per stored entry: a single binary search answers every question.
    stored_rows = np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr))
    keys = stored_rows * n_columns + indices
    if (keys[1:] < keys[:-1]).any():
        keys.sort()
    asked = rows.astype(np.int64) * n_columns + columns
    if keys.size == 0:
        return np.zeros(asked.shape, dtype=np.bool_)
    place = np.minimum(np.searchsorted(keys, asked), keys.size - 1)
    found: BoolArray = (keys[place] == asked) & (columns >= 0)
    return found


# Metrics of one user each, from hits (U, L), the number of true items n_true (U,) and the
# length k of the list that is judged. L may exceed k (the rest is cut off) or fall short of
# it (too few items to rank: the missing places are misses). Users without true items get 0.


def ndcg_from_hits(hits: BoolArray, n_true: IntArray, k: int) -> FloatArray:
    """NDCG with gain 1 a hit; the ideal list has min(k, n_true) hits in front. Shape (U,)."""
    discount = 1.0 / np.log2(np.arange(k) + 2.0)
    hits = hits[:, :k]
    ideal = np.cumsum(discount)[np.clip(n_true, 1, k) - 1]
    gain: FloatArray = hits.astype(np.float64) @ discount[: hits.shape[1]]
    result: FloatArray = gain / ideal
    return result


def recall_from_hits(hits: BoolArray, n_true: IntArray, k: int) -> FloatArray:
    """Share of the true items that are in the list. Shape (U,)."""
    result: FloatArray = np.count_nonzero(hits[:, :k], axis=1) / np.maximum(n_true, 1)
    return result


def precision_from_hits(hits: BoolArray, n_true: IntArray, k: int) -> FloatArray:
    """Share of the k places that hold a true item. Shape (U,)."""
    result: FloatArray = np.count_nonzero(hits[:, :k], axis=1) / k
    return result


def hit_rate_from_hits(hits: BoolArray, n_true: IntArray, k: int) -> FloatArray:
    """1 where the list holds a true item, else 0. Shape (U,)."""
    return np.asarray(hits[:, :k].any(axis=1), dtype=np.float64)


def mrr_from_hits(hits: BoolArray, n_true: IntArray, k: int) -> FloatArray:
    """One over the rank of the first true item, 0 if the list has none. Shape (U,)."""
    hits = hits[:, :k]
    if hits.shape[1] == 0:
        return np.zeros(len(hits))
    return np.where(hits.any(axis=1), 1.0 / (np.argmax(hits, axis=1) + 1.0), 0.0)


def map_from_hits(hits: BoolArray, n_true: IntArray, k: int) -> FloatArray:
    """Sum of the precisions at the ranks of the hits over min(k, n_true). Shape (U,)."""
    hits = hits[:, :k]
    precision = np.cumsum(hits, axis=1) / (np.arange(hits.shape[1]) + 1.0)
    result: FloatArray = (precision * hits).sum(axis=1) / np.clip(n_true, 1, k)
    return result


USER_METRICS: Mapping[str, Callable[[BoolArray, IntArray, int], FloatArray]] = MappingProxyType(
    {
        "ndcg": ndcg_from_hits,
        "recall": recall_from_hits,
        "precision": precision_from_hits,
        "hit_rate": hit_rate_from_hits,
        "mrr": mrr_from_hits,
        "map": map_from_hits,
    }
)


def ndcg_at_k(
    y_true: Any, y_score: npt.ArrayLike, k: int = 20, *, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Mean normalised discounted cumulative gain of the top k.

    A true item at rank r adds 1 / log2(r + 1). The sum is divided by its largest possible
    value, that of a list with min(k, number of true items) true items in front.

    Parameters
    ----------
    y_true : array-like or scipy.sparse of shape (n_users, n_items)
        1 where the item is relevant to the user, else 0.
    y_score : array-like of shape (n_users, n_items)
        Scores, higher is better. -inf takes an item out of the ranking; if it is true it
        stays in the number of true items and is a miss.
    k : int, default=20
        Length of the list.
    sample_weight : array-like of shape (n_users,), default=None
        Weight of each user in the mean.

    Returns
    -------
    ndcg : float
        In [0, 1]: the mean over the users with a true item, nan if there is no such user.

    Raises
    ------
    ValueError
        If the shapes differ, ``y_true`` is not binary, ``y_score`` has NaN, ``k`` is not a
        positive integer or a weight is negative.

    Examples
    --------
    >>> from fedrecsk.metrics import ndcg_at_k
    >>> round(ndcg_at_k([[0, 1, 0]], [[0.9, 0.5, 0.1]], k=2), 4)
    0.6309
    """
    return _mean_at_k(ndcg_from_hits, y_true, y_score, k, sample_weight)


def recall_at_k(
    y_true: Any, y_score: npt.ArrayLike, k: int = 20, *, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Mean share of a user's true items that are in the top k.

    The divisor is the number of true items, so a user with more than k of them cannot
    reach 1.

    Parameters
    ----------
    y_true, y_score, k, sample_weight
        As in :func:`ndcg_at_k`.

    Returns
    -------
    recall : float
        In [0, 1]: the mean over the users with a true item, nan if there is no such user.

    Raises
    ------
    ValueError
        As :func:`ndcg_at_k`.

    Examples
    --------
    >>> from fedrecsk.metrics import recall_at_k
    >>> recall_at_k([[0, 1, 1]], [[0.9, 0.5, 0.1]], k=2)
    0.5
    """
    return _mean_at_k(recall_from_hits, y_true, y_score, k, sample_weight)


def precision_at_k(
    y_true: Any, y_score: npt.ArrayLike, k: int = 20, *, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Mean share of the k places that hold a true item.

    The divisor is k, also where fewer than k items can be ranked.

    Parameters
    ----------
    y_true, y_score, k, sample_weight
        As in :func:`ndcg_at_k`.

    Returns
    -------
    precision : float
        In [0, 1]: the mean over the users with a true item, nan if there is no such user.

    Raises
    ------
    ValueError
        As :func:`ndcg_at_k`.

    Examples
    --------
    >>> from fedrecsk.metrics import precision_at_k
    >>> precision_at_k([[0, 1, 1, 0]], [[0.9, 0.5, 0.1, 0.0]], k=4)
    0.5
    """
    return _mean_at_k(precision_from_hits, y_true, y_score, k, sample_weight)


def hit_rate_at_k(
    y_true: Any, y_score: npt.ArrayLike, k: int = 20, *, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Share of the users with at least one true item in the top k.

    Parameters
    ----------
    y_true, y_score, k, sample_weight
        As in :func:`ndcg_at_k`.

    Returns
    -------
    hit_rate : float
        In [0, 1]: the mean over the users with a true item, nan if there is no such user.

    Raises
    ------
    ValueError
        As :func:`ndcg_at_k`.

    Examples
    --------
    >>> from fedrecsk.metrics import hit_rate_at_k
    >>> hit_rate_at_k([[0, 1, 1], [0, 0, 1]], [[0.9, 0.5, 0.1]] * 2, k=2)
    0.5
    """
    return _mean_at_k(hit_rate_from_hits, y_true, y_score, k, sample_weight)


def mrr_at_k(
    y_true: Any, y_score: npt.ArrayLike, k: int = 20, *, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Mean reciprocal rank of the first true item in the top k.

    A user with no true item in the top k counts 0.

    Parameters
    ----------
    y_true, y_score, k, sample_weight
        As in :func:`ndcg_at_k`.

    Returns
    -------
    mrr : float
        In [0, 1]: the mean over the users with a true item, nan if there is no such user.

    Raises
    ------
    ValueError
        As :func:`ndcg_at_k`.

    Examples
    --------
    >>> from fedrecsk.metrics import mrr_at_k
    >>> mrr_at_k([[0, 1, 1]], [[0.9, 0.5, 0.1]], k=3)
    0.5
    """
    return _mean_at_k(mrr_from_hits, y_true, y_score, k, sample_weight)


def map_at_k(
    y_true: Any, y_score: npt.ArrayLike, k: int = 20, *, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Mean average precision of the top k.

    A user's average precision is the sum, over the true items in the list, of the precision
    at their ranks, divided by min(k, number of true items).

    Parameters
    ----------
    y_true, y_score, k, sample_weight
        As in :func:`ndcg_at_k`.

    Returns
    -------
    map : float
        In [0, 1]: the mean over the users with a true item, nan if there is no such user.

    Raises
    ------
    ValueError
        As :func:`ndcg_at_k`.

    Examples
    --------
    >>> from fedrecsk.metrics import map_at_k
    >>> map_at_k([[1, 0, 1, 0]], [[0.9, 0.5, 0.1, 0.0]], k=2)
    0.5
    """
    return _mean_at_k(map_from_hits, y_true, y_score, k, sample_weight)


def coverage_at_k(y_score: npt.ArrayLike, k: int = 20) -> float:
    """Share of the items that are in the top k of at least one user.

    Parameters
    ----------
    y_score : array-like of shape (n_users, n_items)
        Scores, higher is better. -inf takes an item out of that user's ranking.
    k : int, default=20
        Length of the list.

    Returns
    -------
    coverage : float
        In [0, 1]; nan without items.

    Raises
    ------
    ValueError
        If ``y_score`` is not two-dimensional or has NaN, or ``k`` is not a positive integer.

    Examples
    --------
    >>> from fedrecsk.metrics import coverage_at_k
    >>> coverage_at_k([[0.9, 0.5, 0.1, 0.0], [0.1, 0.5, 0.2, 0.0]], k=1)
    0.5
    """
    scores = _check_scores(y_score)
    n_items = scores.shape[1]
    if n_items == 0:
        return float("nan")
    top = _ranked(scores, check_k(k))
    return float(np.unique(top[top >= 0]).size / n_items)


def check_k(k: Any) -> int:
    """Return k as int; ValueError unless it is a positive integer."""
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or int(k) < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}.")
    return int(k)


def weighted_mean(values: FloatArray, weights: FloatArray | None) -> float:
    """Mean of values (n,); nan where there is nothing, or only zero weight, to average."""
    if values.size == 0 or (weights is not None and not weights.any()):
        return float("nan")
    return float(np.average(values, weights=weights))


def check_weights(
    weights: npt.ArrayLike, n: int, of: str, name: str = "sample_weight"
) -> FloatArray:
    """Return the weights as float64 (n,); ValueError if the length or a value is wrong."""
    array = as_numbers(weights, name).astype(np.float64)
    if array.shape != (n,):
        raise ValueError(
            f"{name} must hold one weight for each of the {n} {of}, got shape {array.shape}."
        )
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} must be finite and not negative.")
    return array


def as_numbers(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """Return an array of real numbers, as it is if it is one; ValueError if there are others."""
    try:
        array = np.asarray(values)
        if array.dtype.kind == "c":
            raise TypeError("complex numbers have no order")
        return array if array.dtype.kind in "biuf" else array.astype(np.float64)
    # Also what NumPy says of rows of different lengths.
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold real numbers only: {error}.") from error


def _mean_at_k(
    from_hits: Callable[[BoolArray, IntArray, int], FloatArray],
    y_true: Any,
    y_score: npt.ArrayLike,
    k: int,
    sample_weight: npt.ArrayLike | None,
) -> float:
    """Rank, find the hits and average the metric over the users with a true item."""
    k = check_k(k)
    scores = _check_scores(y_score)
    truth = _check_truth(y_true)
    if truth.shape != scores.shape:
        raise ValueError(
            f"y_true and y_score must have the same shape (n_users, n_items), got {truth.shape} "
            f"and {scores.shape}."
        )
    weights = None
    if sample_weight is not None:
        weights = check_weights(sample_weight, len(scores), "users (rows of y_true)")
    n_true = np.diff(truth.indptr).astype(np.int64)
    values = from_hits(hits_of(_ranked(scores, k), truth), n_true, k)
    judged = n_true > 0
    return weighted_mean(values[judged], None if weights is None else weights[judged])


def _ranked(scores: npt.NDArray[Any], k: int) -> IntArray:
    """Top k columns, with -1 in the places that only excluded items could fill."""
    top = top_k(scores, k)
    top[np.take_along_axis(scores, top, axis=1) == -np.inf] = -1
    return top


def _check_scores(y_score: npt.ArrayLike) -> npt.NDArray[Any]:
    scores = as_numbers(y_score, "y_score")
    if scores.ndim != 2:
        raise ValueError(f"y_score must have shape (n_users, n_items), got {scores.shape}.")
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        raise ValueError(
            "y_score has NaN, which cannot be ranked; use -inf for items to leave out of the "
            "ranking."
        )
    return scores


def _check_truth(y_true: Any) -> csr_array:
    """Return binary y_true as CSR whose stored entries are the ones, in sorted order."""
    if not issparse(y_true):
        y_true = as_numbers(y_true, "y_true")
    if y_true.ndim != 2:
        raise ValueError(f"y_true must have shape (n_users, n_items), got {y_true.shape}.")
    truth = csr_array(y_true, copy=True)
    truth.sum_duplicates()
    truth.eliminate_zeros()
    if truth.nnz and not (truth.data == 1).all():
        wrong = truth.data[truth.data != 1][0]
        raise ValueError(
            f"y_true must hold 0 and 1 only, found {wrong!r}; turn graded relevance into 0 and 1 "
            "first, for example with y_true >= 4."
        )
    return truth
