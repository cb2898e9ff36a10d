import numpy as np
import pytest

from fedrecsk.engine.sampling import (
    cohort_size,
    epoch_cohort,
    stratified_cohort,
    uniform_cohort,
)


@pytest.mark.parametrize(
    ("asked", "n_clients", "size"),
    [
        (1, 10, 1),
        (10, 10, 10),
        (11, 10, 10),
        (np.int64(3), 10, 3),
        (1.0, 10, 10),
        (0.25, 10, 2),
        (0.29, 10, 3),
        (1e-6, 10, 1),
        (1, 1, 1),
    ],
)
def test_cohort_size(asked, n_clients, size):
    assert cohort_size(asked, n_clients) == size


@pytest.mark.parametrize("size", [1, 7, 19, 20])
def test_uniform_cohort_is_distinct_and_ascending(size):
    chosen = uniform_cohort(20, size, np.random.default_rng(size))
    assert chosen.dtype == np.int64
    assert len(chosen) == size
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen.min() <= chosen.max() < 20


def assert_equally_often(counts, trials, share):
    """Every entry of `counts` is binomial(trials, share); five standard deviations are allowed."""
    spread = np.sqrt(trials * share * (1 - share))
    assert np.abs(counts - trials * share).max() < 5 * spread


def test_uniform_cohort_takes_all_clients_and_pairs_equally_often():
    n_clients, size, trials = 12, 4, 4000
    rng = np.random.default_rng(0)
    together = np.zeros((n_clients, n_clients))
    for _ in range(trials):
        chosen = uniform_cohort(n_clients, size, rng)
        together[np.ix_(chosen, chosen)] += 1
    assert_equally_often(np.diag(together), trials, size / n_clients)
    pairs = together[np.triu_indices(n_clients, 1)]
    assert_equally_often(pairs, trials, size * (size - 1) / (n_clients * (n_clients - 1)))


@pytest.mark.parametrize(
    ("n_clients", "size"), [(23, 7), (10, 4), (9, 3), (5, 5), (6, 1), (7, 6), (1, 1)]
)
def test_epoch_cohort_takes_everybody_once_before_anybody_twice(n_clients, size):
    turns, rng = np.zeros(n_clients, dtype=np.int64), np.random.default_rng(size)
    for t in range(60):
        before = turns.copy()
        chosen = epoch_cohort(turns, size, rng)
        assert np.array_equal(turns, before)
        assert chosen.dtype == np.int64
        assert len(chosen) == size
        assert (np.diff(chosen) > 0).all()
        turns[chosen] += 1
        # The turns that were given out, dealt as evenly as whole numbers allow.
        each, left = divmod((t + 1) * size, n_clients)
        assert sorted(turns) == [each] * (n_clients - left) + [each + 1] * left


def test_epoch_cohort_is_random_among_those_with_equal_turns():
    turns = np.array([1, 0, 1, 2, 1, 0, 1, 5])
    trials, rng = 3000, np.random.default_rng(3)
    together = np.zeros((len(turns), len(turns)))
    for _ in range(trials):
        chosen = epoch_cohort(turns, 4, rng)
        together[np.ix_(chosen, chosen)] += 1
    counts = np.diag(together)
    assert counts[[1, 5]].tolist() == [trials] * 2  # nobody has had fewer turns
    assert counts[[3, 7]].tolist() == [0] * 2
    middle = np.array([0, 2, 4, 6])  # two of four, each pair alike
    assert_equally_often(counts[middle], trials, 2 / 4)
    pairs = together[np.ix_(middle, middle)][np.triu_indices(4, 1)]
    assert_equally_often(pairs, trials, 1 / 6)


def fair_quotas(sizes, size):
    """Deal places out one by one, round after round, to the clusters that have members left."""
    quotas = [0] * len(sizes)
    while sum(quotas) < size:
        for cluster, members in enumerate(sizes):
            if sum(quotas) < size and quotas[cluster] < members:
                quotas[cluster] += 1
    return sorted(quotas)


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ((10, 10, 10), 9),
        ((10, 10, 10), 10),
        ((20, 1, 2), 9),
        ((1, 1, 1, 30), 12),
        ((5, 5), 10),
        ((7,), 3),
        ((3, 0, 4), 5),  # a cluster without members
    ],
)
def test_stratified_quotas_are_as_equal_as_the_clusters_allow(sizes, size):
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    for _ in range(20):
        chosen = stratified_cohort(labels, size, rng)
        assert len(chosen) == size
        assert (np.diff(chosen) > 0).all()
        quotas = np.bincount(labels[chosen], minlength=len(sizes))
        assert (quotas <= sizes).all()
        assert sorted(quotas.tolist()) == fair_quotas(sizes, size)


def test_stratified_cohort_draws_members_equally_often():
    labels = np.array([0] * 8 + [1] * 3 + [2] * 8)
    trials, rng = 3000, np.random.default_rng(2)
    counts = np.zeros(len(labels))
    for _ in range(trials):
        counts[stratified_cohort(labels, 7, rng)] += 1
    # Two places for each cluster and the seventh to any of the three alike.
    for cluster, members in enumerate((8, 3, 8)):
        assert_equally_often(counts[labels == cluster], trials, 7 / 3 / members)
