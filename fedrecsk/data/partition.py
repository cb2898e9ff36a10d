"""Which client gets which size: groups by number of interactions, and sizes that a caller sets.

A method with several model sizes needs a size for every client. `size_groups` cuts the clients,
sorted by their interactions, into groups of given shares. `client_capacities` reads sizes that
the caller gives client by client. `auto_ratio` and `auto_sizes` find the shares, and the sizes,
from what validation clients got out of each size.

A method whose clients are platforms, groups of users, needs such groups where the data have none:
`cluster_clients` makes them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, diags_array

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.vocabulary import Vocabulary

__all__ = ["auto_ratio", "auto_sizes", "client_capacities", "cluster_clients", "size_groups"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Intervals of the number of interactions that one size may end at.
_MAX_INTERVALS = 50
# Assignments that are compared; with many sizes the intervals get wider so that it holds.
_MAX_ASSIGNMENTS = 1_000_000
# Sums over clients that differ by less, relative to their size, differ by rounding alone.
_ROUNDING = 1e-9


def size_groups(counts: ArrayLike, ratio: Sequence[float]) -> IntArray:
    """Cut clients into groups by how many interactions they have.

    Parameters
    ----------
    counts : array-like of shape (n_clients,)
        Interactions of each client.
    ratio : sequence of float
        Relative sizes of the groups, from the clients with the fewest interactions to those
        with the most, such as ``(5, 3, 2)``. A zero makes an empty group.

    Returns
    -------
    groups : ndarray of shape (n_clients,), int64
        Number of each client's group, from 0. Groups 0 to g together hold the share
        ``sum(ratio[:g + 1]) / sum(ratio)`` of the clients, rounded to whole clients, half up.
        So every group is less than one client off its share; where there are fewer clients than
        groups, some are empty. Of clients with equal counts the first go to the lower group.

    Raises
    ------
    ValueError
        If ``counts`` is not one-dimensional or not finite, or ``ratio`` is empty, has negative,
        infinite or NaN entries, or only zeros.

    Examples
    --------
    >>> from fedrecsk.data import size_groups
    >>> size_groups([40, 3, 7, 3, 100], ratio=(3, 1, 1))
    array([1, 0, 0, 0, 2])
    """
    count = _check_counts(counts)
    shares = np.asarray(ratio, dtype=np.float64)
    if shares.ndim != 1 or shares.size == 0:
        raise ValueError(f"ratio must hold one number a group, such as (5, 3, 2); got {ratio!r}.")
    if not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
        raise ValueError(
            f"ratio must hold finite numbers of at least 0, one of them positive; got {ratio!r}."
        )
    summed = np.cumsum(shares / shares.max())
    # Rounded twice: 0.1 + 0.2 must fall on the same side of a half as 1 + 2 does.
    ends = np.floor(np.round(len(count) * summed / summed[-1], 6) + 0.5).astype(np.int64)
    groups = np.empty(len(count), dtype=np.int64)
    by_count = np.argsort(count, kind="stable")
    groups[by_count] = np.searchsorted(ends, np.arange(len(count)), side="right")
    return groups


def client_capacities(
    client_sizes: Mapping[Any, int] | ArrayLike, client_ids: ArrayLike
) -> IntArray:
    """Read the sizes that a caller gives client by client.

    Parameters
    ----------
    client_sizes : mapping of client id to int, or array-like of shape (n_clients,)
        Size of each client, a positive integer. A mapping may name further clients, so that one
        mapping serves fits on parts of the data. An array is in the order of the sorted distinct
        client ids.
    client_ids : array-like of shape (n,)
        Clients to look up; ``n_clients`` of them are distinct.

    Returns
    -------
    sizes : ndarray of shape (n,), int64
        Size of each entry of ``client_ids``.

    Raises
    ------
    ValueError
        If a mapping lacks a client, an array has another length or is not one-dimensional, or a
        size of one of the clients is no integer of at least 1.

    Examples
    --------
    >>> from fedrecsk.data import client_capacities
    >>> client_capacities({"phone": 8, "laptop": 32}, ["laptop", "phone"])
    array([32,  8])
    >>> client_capacities([32, 8], ["laptop", "phone"])
    array([32,  8])
    """
    clients, code = Vocabulary.from_values(client_ids, source="client_ids")
    names = clients.ids.tolist()
    sizes: list[Any]
    if isinstance(client_sizes, Mapping):
        missing = [name for name in names if name not in client_sizes]
        if missing:
            raise ValueError(
                f"client_sizes has no entry for {len(missing)} of the {len(names)} clients, such "
                f"as {missing[0]!r}; give every client a size."
            )
        sizes = [client_sizes[name] for name in names]
    else:
        sizes = _sizes_in_order(client_sizes, len(names))
    for name, size in zip(names, sizes, strict=True):
        whole = isinstance(size, numbers.Integral) and not isinstance(size, bool | np.bool_)
        if not whole or not 1 <= size < 2**63:
            raise ValueError(
                f"client_sizes gives client {name!r} the size {size!r}; a size is the number of "
                "factors, an integer of at least 1."
            )
    capacities: IntArray = np.array(sizes, dtype=np.int64)[code]
    return capacities


def cluster_clients(
    data: Interactions,
    n_clusters: int = 5,
    *,
    n_factors: int = 32,
    random_state: int | np.random.RandomState | None = None,
) -> IntArray:
    """Group clients by what their users choose.

    K-means on user vectors of a matrix factorisation: the truncated singular value decomposition
    of the interactions, in which active users and popular items weigh less, scaled to length 1.
    A client with several users has the mean of their vectors. In a federation this is a step of
    the server that sees all interactions; it stands in for platforms that are there already.

    Parameters
    ----------
    data : Interactions
    n_clusters : int, default=5
        At most the number of clients.
    n_factors : int, default=32
        Length of the vectors; less where users or items are fewer.
    random_state : int, RandomState or None, default=None

    Returns
    -------
    clusters : ndarray of shape (n_clients,), int64
        0 to ``n_clusters - 1``; fewer where the clients are too much alike.

    Raises
    ------
    ValueError
        If there are fewer clients than clusters.

    Examples
    --------
    >>> from fedrecsk.data import cluster_clients, encode
    >>> rows = [["ann", 1], ["ann", 2], ["bob", 7], ["bob", 8], ["eve", 1], ["eve", 2]]
    >>> ann, bob, eve = cluster_clients(encode(rows), 2, random_state=0).tolist()
    >>> ann == eve, ann == bob
    (True, False)
    """
    # Here, since they take longer to import than the rest of the package.
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD

    if not 1 <= n_clusters <= data.n_clients:
        raise ValueError(
            f"n_clusters={n_clusters} must lie between 1 and the number of clients, "
            f"{data.n_clients}."
        )
    matrix = data.matrix().astype(np.float64)
    rows = np.maximum(data.user_counts, 1) ** -0.5
    columns = np.maximum(data.item_counts, 1) ** -0.25
    weighted = csr_array(diags_array(rows) @ matrix @ diags_array(columns))
    width = min(n_factors, data.n_users - 1, data.n_items - 1)
    if width >= 1:
        vectors = TruncatedSVD(width, random_state=random_state).fit_transform(weighted)
    else:
        vectors = weighted.toarray()
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    means = np.zeros((data.n_clients, vectors.shape[1]))
    np.add.at(means, data.user_client, vectors)
    means /= np.bincount(data.user_client, minlength=data.n_clients)[:, None]
    n_clusters = min(n_clusters, len(np.unique(means, axis=0)))
    labels = KMeans(n_clusters, n_init=3, random_state=random_state).fit_predict(means)
    clusters: IntArray = labels.astype(np.int64)
    return clusters


def auto_ratio(quality: ArrayLike, counts: ArrayLike, sizes: Sequence[int]) -> tuple[float, ...]:
    """Find the shares of clients that are best served at each of the given sizes.

    Looked at are the assignments by number of interactions: a client with more interactions
    never gets a smaller size, and clients with equally many get the same. One of them has the
    highest mean quality. To serve a client at a larger size than it needs costs traffic, so
    among the assignments that are not clearly worse the one with the smallest sum of sizes over
    clients is taken.

    Not clearly worse means within one standard error: with ``d`` the differences, client by
    client, between the quality under the best assignment and under the other, ``mean(d)`` is at
    most ``std(d, ddof=1) / sqrt(n_clients)``. That is the same as ``sum(d) <= sqrt(sum(d**2))``,
    which also covers a single client. The best of many assignments is partly luck, though: where
    quality is noise alone, some clients are usually given a larger size than they need.

    Parameters
    ----------
    quality : array-like of shape (n_clients, n_sizes)
        What each validation client gets when it is served at each size, such as its NDCG@20;
        higher is better.
    counts : array-like of shape (n_clients,)
        Interactions of each of these clients.
    sizes : sequence of int
        The sizes, ascending.

    Returns
    -------
    shares : tuple of float, of length n_sizes
        Shares of the clients for :func:`size_groups`, from the smallest size to the largest.
        They sum to 1; sizes that are of no use have 0. The search is complete where few counts
        are distinct; else neighbouring counts are taken together in at most 50 intervals of
        about equally many clients, fewer from six sizes on.

    Raises
    ------
    ValueError
        If shapes do not fit together, there is no client, a number is NaN or infinite, or the
        sizes are not ascending positive integers.

    Examples
    --------
    >>> from fedrecsk.data import auto_ratio
    >>> counts = [5] * 30 + [80] * 10
    >>> quality = [[0.3, 0.2]] * 30 + [[0.3, 0.5]] * 10  # the larger size suits active clients
    >>> auto_ratio(quality, counts, sizes=(8, 32))
    (0.75, 0.25)
    """
    trial = _trial(quality, counts, sizes, len(sizes))
    return _shares(trial, _search(trial, len(sizes)))


def auto_sizes(
    quality: ArrayLike, counts: ArrayLike, candidates: Sequence[int], n_sizes: int = 3
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Find the sizes, out of several candidates, and the shares of clients to serve at each.

    The rule is that of :func:`auto_ratio`, over all assignments that use at most ``n_sizes`` of
    the candidates.

    Parameters
    ----------
    quality : array-like of shape (n_clients, n_candidates)
        What each validation client gets when it is served at each candidate.
    counts : array-like of shape (n_clients,)
        Interactions of each of these clients.
    candidates : sequence of int
        The sizes to choose from, ascending.
    n_sizes : int, default=3
        How many to choose at most.

    Returns
    -------
    sizes : tuple of int
        The chosen sizes, ascending; fewer than ``n_sizes`` where fewer do.
    shares : tuple of float
        Share of the clients at each of them, positive, for :func:`size_groups`.

    Raises
    ------
    ValueError
        As in :func:`auto_ratio`; or if ``n_sizes`` is not a positive integer, or there are too
        many ways to choose.

    Examples
    --------
    >>> from fedrecsk.data import auto_sizes
    >>> counts = [5] * 30 + [80] * 10
    >>> quality = [[0.3, 0.3, 0.2]] * 30 + [[0.3, 0.5, 0.5]] * 10
    >>> auto_sizes(quality, counts, candidates=(8, 16, 32), n_sizes=2)
    ((8, 16), (0.75, 0.25))
    """
    if not isinstance(n_sizes, int | np.integer) or n_sizes < 1:
        raise ValueError(f"n_sizes must be a positive integer, got {n_sizes!r}.")
    n_chosen = min(int(n_sizes), len(candidates))
    trial = _trial(quality, counts, candidates, n_chosen)
    found = _search(trial, n_chosen)
    served = [
        (int(trial.sizes[column]), share)
        for column, share in zip(found.chosen, _shares(trial, found), strict=True)
        if share > 0
    ]
    return tuple(size for size, _ in served), tuple(share for _, share in served)


@dataclass(frozen=True, eq=False)
class _Trial:
    """Validation clients in the order of their counts, cut into G intervals.

    Attributes
    ----------
    quality : ndarray of shape (n_clients, n_sizes)
        Rows sorted by count.
    sizes : ndarray of shape (n_sizes,), int64
        Ascending.
    edges : ndarray of shape (G + 1,), int64
        Interval g holds the rows ``edges[g] : edges[g + 1]``; no count is in two intervals.
    """

    quality: FloatArray
    sizes: IntArray
    edges: IntArray

    def running(self, values: FloatArray) -> FloatArray:
        """Add up values (n_clients, n_sizes) over the clients below each edge: (G + 1, n_sizes)."""
        summed = np.zeros((len(self.edges), values.shape[1]))
        summed[1:] = np.add.reduceat(values, self.edges[:-1], axis=0).cumsum(axis=0)
        return summed


@dataclass(frozen=True, eq=False)
class _Assignment:
    """Which columns of `quality` are used, ascending, and for which of the sorted clients.

    Size ``sizes[chosen[j]]`` goes to the clients ``edges[bounds[j]] : edges[bounds[j + 1]]``.
    """

    chosen: tuple[int, ...]
    bounds: IntArray  # (len(chosen) + 1,)


def _trial(quality: ArrayLike, counts: ArrayLike, sizes: Sequence[int], n_chosen: int) -> _Trial:
    """Check the arguments of a search that uses at most `n_chosen` sizes, and sort them."""
    size = np.asarray(sizes)
    if size.ndim != 1 or not size.size or size.dtype.kind not in "iu":
        raise ValueError(f"The sizes must be integers, such as (8, 16, 32); got {sizes!r}.")
    size = size.astype(np.int64)
    if size[0] < 1 or (np.diff(size) <= 0).any():
        raise ValueError(f"The sizes must be positive and ascending; got {sizes!r}.")
    count = _check_counts(counts)
    values = np.asarray(quality, dtype=np.float64)
    if values.shape != (len(count), len(size)):
        raise ValueError(
            f"quality must have a row for each of the {len(count)} clients and a column for each "
            f"of the {len(size)} sizes; got shape {values.shape}."
        )
    if not len(count):
        raise ValueError("There is no client to choose by; pass at least one.")
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad:
        raise ValueError(
            f"quality must be finite, but {bad} of the {len(count)} clients have NaN or infinity. "
            "Leave out the clients that have nothing held out."
        )
    by_count = np.argsort(count, kind="stable")
    edges = _edges(count[by_count], _n_intervals(len(size), n_chosen))
    return _Trial(values[by_count], size, edges)


def _search(trial: _Trial, n_chosen: int) -> _Assignment:
    """Find the cheapest assignment of `n_chosen` columns within one standard error of the best."""
    bounds = _all_bounds(len(trial.edges) - 1, n_chosen)
    subsets = list(combinations(range(len(trial.sizes)), n_chosen))
    gained = trial.running(trial.quality)
    top = max(_totals(gained, chosen, bounds).max() for chosen in subsets)
    top -= _ROUNDING * np.abs(trial.quality).sum(axis=0).max()
    best = _cheapest(
        trial, bounds, ((each, _totals(gained, each, bounds) >= top) for each in subsets)
    )

    column = np.repeat(best.chosen, np.diff(trial.edges[best.bounds]))[:, None]
    loss = np.take_along_axis(trial.quality, column, axis=1) - trial.quality
    lost, squared = trial.running(loss), trial.running(loss**2)
    slack = _ROUNDING * np.abs(loss).sum(axis=0).max()
    return _cheapest(
        trial,
        bounds,
        (
            (each, _totals(lost, each, bounds) <= np.sqrt(_totals(squared, each, bounds)) + slack)
            for each in subsets
        ),
    )


def _cheapest(
    trial: _Trial,
    bounds: IntArray,
    allowed: Iterator[tuple[tuple[int, ...], NDArray[np.bool_]]],
) -> _Assignment:
    """Take the smallest sum of sizes among the allowed assignments; of equals the best quality.

    `allowed` gives, for each choice of columns, a mask over the rows of `bounds`.
    """
    sent = np.multiply.outer(trial.edges, trial.sizes).astype(np.float64)
    gained = trial.running(trial.quality)
    found: list[tuple[float, float, tuple[int, ...], int]] = []
    for chosen, mask in allowed:
        rows = np.flatnonzero(mask)
        if rows.size:
            cost = _totals(sent, chosen, bounds[rows])
            rows = rows[cost == cost.min()]
            quality = _totals(gained, chosen, bounds[rows])
            found.append((float(cost.min()), -float(quality.max()), chosen, rows[quality.argmax()]))
    _, _, chosen, row = min(found)
    return _Assignment(chosen, bounds[row])


def _totals(running: FloatArray, chosen: tuple[int, ...], bounds: IntArray) -> FloatArray:
    """Turn running sums over clients into the sums under each of A assignments: (A,)."""
    totals = np.zeros(len(bounds))
    for place, column in enumerate(chosen):
        line = running[:, column]
        totals += line[bounds[:, place + 1]] - line[bounds[:, place]]
    return totals


def _shares(trial: _Trial, assignment: _Assignment) -> tuple[float, ...]:
    """Share of the clients at each chosen size."""
    n_clients = np.diff(trial.edges[assignment.bounds])
    return tuple((n_clients / len(trial.quality)).tolist())


def _all_bounds(n_intervals: int, n_chosen: int) -> IntArray:
    """All ways to cut the intervals into `n_chosen` runs, empty ones too: (A, n_chosen + 1)."""
    n_ways = math.comb(n_intervals + n_chosen - 1, n_chosen - 1)
    inner = np.fromiter(
        chain.from_iterable(combinations_with_replacement(range(n_intervals + 1), n_chosen - 1)),
        dtype=np.int64,
        count=n_ways * (n_chosen - 1),
    )
    bounds = np.zeros((n_ways, n_chosen + 1), dtype=np.int64)
    bounds[:, 1:-1] = inner.reshape(n_ways, n_chosen - 1)
    bounds[:, -1] = n_intervals
    return bounds


def _n_intervals(n_sizes: int, n_chosen: int) -> int:
    """How finely counts are told apart, so that the number of assignments stays bounded."""
    for n_intervals in range(_MAX_INTERVALS, 0, -1):
        ways = math.comb(n_intervals + n_chosen - 1, n_chosen - 1)
        if ways * math.comb(n_sizes, n_chosen) <= _MAX_ASSIGNMENTS:
            return n_intervals
    raise ValueError(
        f"There are too many ways to choose {n_chosen} of {n_sizes} sizes; pass fewer candidates, "
        "or ask for fewer."
    )


def _edges(counts: NDArray[Any], n_intervals: int) -> IntArray:
    """Cut sorted counts, between distinct ones, into intervals of about equally many clients."""
    n = len(counts)
    starts = np.concatenate([[0], np.flatnonzero(counts[1:] != counts[:-1]) + 1, [n]])
    if len(starts) - 1 > n_intervals:
        wanted = np.arange(n_intervals + 1) * n / n_intervals
        after = np.clip(np.searchsorted(starts, wanted), 1, len(starts) - 1)
        nearer_before = wanted - starts[after - 1] < starts[after] - wanted
        starts = starts[np.unique(after - nearer_before)]
    return starts


def _check_counts(counts: ArrayLike) -> NDArray[Any]:
    """See that counts are a one-dimensional array of finite numbers."""
    count = np.asarray(counts)
    if count.ndim != 1:
        raise ValueError(f"counts must hold one number a client; got shape {count.shape}.")
    if count.size and count.dtype.kind not in "iuf":
        raise ValueError(f"counts must be numbers; got dtype {count.dtype}.")
    if count.dtype.kind == "f" and not np.isfinite(count).all():
        raise ValueError("counts must be finite; found NaN or infinity.")
    return count


def _sizes_in_order(client_sizes: ArrayLike, n_clients: int) -> list[Any]:
    """Entries of an array of sizes, one for each of the clients in the order of their ids."""
    # A list goes through object: NumPy would turn its True into 1 and its integers into floats.
    array = (
        np.array(client_sizes, dtype=object)
        if isinstance(client_sizes, list | tuple)
        else np.asarray(client_sizes)
    )
    if array.ndim != 1:
        raise ValueError(
            f"client_sizes must hold one size a client; got shape {array.shape}. Pass a 1d array "
            "or a mapping from client id to size."
        )
    if len(array) != n_clients:
        raise ValueError(
            f"client_sizes has {len(array)} entries, but the data have {n_clients} clients. Pass "
            "one size for each, in the order of the sorted client ids; or a mapping from client "
            "id to size, which also serves for parts of the data, as in a grid search."
        )
    entries: list[Any] = array.tolist()
    return entries
