"""Which clients take part in a round."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cohort_size(clients_per_round: int | float, n_clients: int) -> int:
    """Return the number of clients that take part in a round.

    Parameters
    ----------
    clients_per_round : int or float
        An int is the number itself (capped at `n_clients`), a float in (0, 1] a share of all
        clients, rounded, and at least one.
    n_clients : int
        Size of the federation.

    Returns
    -------
    int

    Examples
    --------
    >>> from fedrecsk.engine.sampling import cohort_size
    >>> cohort_size(0.2, 943), cohort_size(50, 943), cohort_size(50, 10)
    (189, 50, 10)
    """
    if isinstance(clients_per_round, (int, np.integer)):
        return min(int(clients_per_round), n_clients)
    return max(1, min(n_clients, round(float(clients_per_round) * n_clients)))


def uniform_cohort(n_clients: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `size` distinct clients uniformly, in ascending order.

    Parameters
    ----------
    n_clients, size : int
        Population and sample, ``size <= n_clients``.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of shape (size,), dtype int64
    """
    if size == n_clients:
        return np.arange(n_clients, dtype=np.int64)
    chosen = rng.choice(n_clients, size=size, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)


def poisson_cohort(n_clients: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw every client with probability ``size / n_clients``, each for itself.

    Parameters
    ----------
    n_clients, size : int
        Population and expected sample, ``size <= n_clients``.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of int64
        Ascending; there may be none.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.sampling import poisson_cohort
    >>> poisson_cohort(4, 4, np.random.default_rng(0)).tolist()
    [0, 1, 2, 3]
    """
    return np.flatnonzero(rng.random(n_clients) * n_clients < size).astype(np.int64)


def epoch_cohort(
    turns: NDArray[np.int64], size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw the clients that have had the fewest turns, at random among equals.

    Everybody takes part once before anybody does so twice, in cohorts of exactly `size`.

    Parameters
    ----------
    turns : ndarray of shape (n_clients,)
        Rounds in which each client took part.
    size : int
        Cohort size, at most ``len(turns)``.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of shape (size,), dtype int64
        Ascending.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.sampling import epoch_cohort
    >>> epoch_cohort(np.array([1, 0, 1, 0, 2]), 2, np.random.default_rng(0)).tolist()
    [1, 3]
    """
    chance = rng.random(len(turns))
    chosen = [np.zeros(0, dtype=np.int64)]
    missing, level = size, int(turns.min(initial=0))
    while missing:
        # Nearly always one level or two: a sort of all clients would cost more than their round.
        among = np.flatnonzero(turns == level)
        if missing < len(among):
            among = among[np.argpartition(chance[among], missing - 1)[:missing]]
        chosen.append(among)
        missing -= len(among)
        if missing:  # another pass over all clients, which most rounds do without
            level = int(np.min(turns, where=turns > level, initial=np.iinfo(np.int64).max))
    return np.sort(np.concatenate(chosen))


def stratified_cohort(
    labels: NDArray[np.int64], size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw clients with equal quotas from clusters; the quotas sum to exactly `size`.

    Clusters smaller than their quota give all they have and the others share what is left over.

    Parameters
    ----------
    labels : ndarray of shape (n_clients,)
        Cluster of each client.
    size : int
        Cohort size, at most ``len(labels)``.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of shape (size,), dtype int64
        Ascending.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.sampling import stratified_cohort
    >>> labels = np.array([0] * 8 + [1] * 2)
    >>> chosen = stratified_cohort(labels, 4, np.random.default_rng(0))
    >>> np.bincount(labels[chosen]).tolist()
    [2, 2]
    """
    # Rank the members of each cluster at random; taking clients by rank, and by a random order
    # of clusters within a rank, deals the places out as evenly as the cluster sizes allow.
    n_clients = len(labels)
    order = np.lexsort((rng.random(n_clients), labels))
    sizes = np.bincount(labels)
    rank = np.empty(n_clients, dtype=np.int64)
    rank[order] = np.arange(n_clients) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = rng.permutation(len(sizes))[labels]
    return np.sort(np.lexsort((turn, rank))[:size]).astype(np.int64)
