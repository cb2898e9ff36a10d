"""Groups by number of interactions, sizes that a caller sets, and sizes chosen by quality."""

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fedrecsk.data import (
    auto_ratio,
    auto_sizes,
    client_capacities,
    cluster_clients,
    encode,
    size_groups,
)
from fedrecsk.datasets import make_interactions


@pytest.fixture(scope="module")
def power_law():
    """Interactions of 500 clients, few of which have many; many have equally many."""
    data = make_interactions(
        500, 400, mean_interactions=20, activity_exponent=1.5, return_X_y=True, random_state=0
    )
    counts = np.diff(encode(*data).client_indptr)
    assert counts.max() > 4 * np.median(counts)
    assert len(np.unique(counts)) < 100
    return counts


def plain_groups(counts, ratio):
    """Sort the clients one by one, and cut the list at exact fractions."""
    n = len(counts)
    order = sorted(range(n), key=lambda c: (counts[c], c))
    groups = [None] * n
    ends = [
        int(Fraction(n) * sum(map(Fraction, ratio[: g + 1])) / sum(map(Fraction, ratio))
            + Fraction(1, 2))
        for g in range(len(ratio))
    ]  # fmt: skip
    for place, client in enumerate(order):
        groups[client] = next(g for g, end in enumerate(ends) if place < end)
    return groups


RATIOS = [(5, 3, 2), (1, 1, 1), (2, 3, 5), (1,), (1, 2, 3, 2, 1), (0, 1, 0, 2), (3, 0)]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7, 10, 101])
def test_groups_are_those_of_a_sorted_list(ratio, n):
    counts = np.random.default_rng(n).integers(1, 9, n)  # with ties
    groups = size_groups(counts, ratio)
    assert groups.dtype == np.int64
    assert groups.tolist() == plain_groups(counts.tolist(), ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_groups_of_a_power_law(power_law, ratio):
    groups = size_groups(power_law, ratio)
    assert groups.tolist() == plain_groups(power_law.tolist(), ratio)
    sizes = np.bincount(groups, minlength=len(ratio))
    assert sizes.sum() == 500
    assert (np.abs(sizes - 500 * np.array(ratio) / sum(ratio)) < 1).all()
    most = [power_law[groups == g].max(initial=0) for g in range(len(ratio))]
    least = [power_law[groups == g].min(initial=10**9) for g in range(len(ratio))]
    for lower, upper in itertools.combinations(range(len(ratio)), 2):
        assert most[lower] <= least[upper]


def test_ties_go_by_the_order_of_clients():
    assert size_groups([4] * 6, (1, 1, 1)).tolist() == [0, 0, 1, 1, 2, 2]
    assert size_groups([9, 4, 4, 1, 4], (2, 3)).tolist() == [1, 0, 1, 0, 1]


def test_the_scale_of_a_ratio_does_not_matter():
    counts = np.arange(45)[::-1]
    expected = size_groups(counts, (1, 2, 3))
    for ratio in [(0.1, 0.2, 0.3), (1e-300, 2e-300, 3e-300), (5e307, 1e308, 1.5e308)]:
        np.testing.assert_array_equal(size_groups(counts, ratio), expected)
    # The half client goes to the lower group, also at shares that floats hold inexactly.
    for ratio in [(1, 1), (0.1, 0.1), (0.3, 0.1 + 0.2), (1e308, 1e308), (1e-300, 1e-300)]:
        assert size_groups(range(5), ratio).tolist() == [0, 0, 0, 1, 1]


def test_fewer_clients_than_groups():
    assert size_groups([7], (5, 3, 2)).tolist() == [0]
    assert size_groups([7], (2, 3, 5)).tolist() == [1]
    assert size_groups([7, 5], (1, 1, 1)).tolist() == [2, 0]
    assert size_groups([], (1, 1)).tolist() == []


def test_size_groups_refuses():
    for ratio in [(), [[1, 2]], 3]:
        with pytest.raises(ValueError, match="ratio must hold one number a group"):
            size_groups([1, 2], ratio)
    for ratio in [(1, -1), (0, 0), (1, float("nan")), (1, float("inf"))]:
        with pytest.raises(ValueError, match="ratio must hold finite numbers of at least 0"):
            size_groups([1, 2], ratio)
    with pytest.raises(ValueError, match=r"one number a client; got shape \(1, 2\)"):
        size_groups([[1, 2]], (1, 1))
    with pytest.raises(ValueError, match="counts must be finite"):
        size_groups([1, np.nan], (1, 1))
    with pytest.raises(ValueError, match="counts must be numbers"):
        size_groups(["a", "b"], (1, 1))


def test_capacities_follow_the_ids():
    sizes = {"c": 32, "a": 8, "b": 1, "elsewhere": "not read"}
    for ids in (["a", "b", "c"], np.array(["c", "a", "c"])):
        found = client_capacities(sizes, ids)
        assert found.dtype == np.int64
        assert found.tolist() == [sizes[each] for each in ids]
    for given in ([8, 1, 32], (8, 1, 32), np.array([8, 1, 32], dtype=np.uint8)):
        assert client_capacities(given, ["c", "a", "b"]).tolist() == [32, 8, 1]
        assert client_capacities(given, ["c", "c", "a", "b"]).tolist() == [32, 32, 8, 1]


def test_capacities_of_numbered_clients():
    assert client_capacities({3: 8, 7: np.int32(16)}, np.array([7, 3])).tolist() == [16, 8]
    assert client_capacities({np.int64(3): 8, 7: 16}, [3.0, 7.0]).tolist() == [8, 16]
    data = encode([["bob", 8], ["ann", 7], ["ann", 8]], ["east", "west", "west"])
    assert client_capacities({"west": 4, "east": 2}, data.clients.ids).tolist() == [2, 4]


def test_capacities_refuse():
    with pytest.raises(ValueError, match="no entry for 2 of the 3 clients, such as 'b'"):
        client_capacities({"a": 8}, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"3 entries, but the data have 2 clients.*or a mapping"):
        client_capacities([8, 8, 8], ["a", "b"])
    with pytest.raises(ValueError, match=r"one size a client; got shape \(\)"):
        client_capacities(8, ["a", "b"])
    with pytest.raises(ValueError, match=r"one size a client; got shape \(2, 1\)"):
        client_capacities([[8], [8]], ["a", "b"])
    for bad in (0, -1, 8.0, 8.5, float("nan"), None, True, "8", 2**63):
        for given in ({"a": 8, "b": bad}, [8, bad]):
            with pytest.raises(ValueError, match=r"client 'b' the size .*an integer of at least 1"):
                client_capacities(given, ["a", "b"])
    with pytest.raises(ValueError, match=r"client 'a' the size 8\.0"):
        client_capacities(np.array([8, 8.5]), ["b", "a"])


def plain_choice(quality, counts, sizes, n_sizes):
    """Try every assignment by thresholds, and apply the rule of one standard error literally.

    Returns the sums of sizes and the mean qualities of the best assignments and of the cheapest
    that are not clearly worse.
    """
    n, values = len(counts), sorted(set(counts))
    every = []
    for columns in itertools.combinations_with_replacement(range(len(sizes)), len(values)):
        if len(set(columns)) <= n_sizes:
            column = [columns[values.index(count)] for count in counts]
            served = quality[np.arange(n), column]
            every.append((served.mean(), sum(sizes[c] for c in column), served))
    best = max(mean for mean, _, _ in every)
    best = min((each for each in every if each[0] > best - 1e-12), key=lambda each: each[1])
    near = []
    for mean, cost, served in every:
        d = best[2] - served
        error = d.std(ddof=1) / np.sqrt(n)
        if d.mean() <= error + 1e-12:
            near.append((cost, -mean))
    cost, mean = min(near)
    return cost, -mean


def served(quality, counts, sizes, chosen, shares):
    """Sum of sizes and mean quality where the shares are applied to the clients themselves."""
    group = size_groups(counts, shares)
    size = np.array(chosen)[group]
    column = np.searchsorted(sizes, size)
    return size.sum(), quality[np.arange(len(counts)), column].mean()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("slope", [0.0, 0.03, 0.1])
def test_choices_are_those_of_a_full_search(seed, slope):
    rng = np.random.default_rng(seed)
    counts = rng.choice([3, 4, 6, 9, 20, 70], 24)
    sizes = (2, 3, 8, 9)
    taste = slope * np.log(counts)[:, None] * np.arange(4)
    quality = taste / 3 + 0.3 * rng.random((24, 1)) + 0.1 * rng.random((24, 4))
    shares = auto_ratio(quality, counts, sizes)
    assert sum(shares) == pytest.approx(1)
    assert served(quality, counts, sizes, sizes, shares) == pytest.approx(
        plain_choice(quality, counts, sizes, 4)
    )
    for n_sizes in (1, 2, 3, 7):
        chosen, some = auto_sizes(quality, counts, sizes, n_sizes)
        assert len(chosen) == len(some) <= n_sizes
        assert set(chosen) <= set(sizes)
        assert list(chosen) == sorted(chosen)
        assert min(some) > 0
        assert sum(some) == pytest.approx(1)
        assert served(quality, counts, sizes, chosen, some) == pytest.approx(
            plain_choice(quality, counts, sizes, n_sizes)
        )


def test_one_standard_error():
    counts = [1] * 4 + [2] * 4
    quality = np.zeros((8, 2))
    quality[4:, 1] = [3, -1, -1, 0.9]  # 1.9 in all, and the root of the squares is 3.4
    assert auto_ratio(quality, counts, (8, 16)) == (1.0, 0.0)
    quality[4:, 1] = [1, 1, 1, 0.1]  # 3.1 and 1.7
    assert auto_ratio(quality, counts, (8, 16)) == (0.5, 0.5)


def test_no_difference_takes_the_smallest(power_law):
    quality = np.repeat(np.random.default_rng(0).random((500, 1)), 4, axis=1)
    assert auto_ratio(quality, power_law, (4, 8, 16, 32)) == (1.0, 0.0, 0.0, 0.0)
    assert auto_sizes(quality, power_law, (4, 8, 16, 32)) == ((4,), (1.0,))


def test_one_client_cannot_tell():
    assert auto_ratio([[0.1, 0.9]], [5], (8, 16)) == (1.0, 0.0)


def test_larger_always_better(power_law):
    rng = np.random.default_rng(0)
    quality = rng.random((500, 1)) + 0.1 * np.arange(4) + rng.normal(0, 0.02, (500, 4))
    assert auto_ratio(quality, power_law, (4, 8, 16, 32)) == (0.0, 0.0, 0.0, 1.0)
    assert auto_sizes(quality, power_law, (4, 8, 16, 32)) == ((32,), (1.0,))


def test_size_of_use_to_active_clients_only(power_law):
    order = np.random.default_rng(0).permutation(500)
    counts = power_law[order]
    active = counts >= 20
    noise = np.random.default_rng(1).normal(0, 0.01, (500, 3))
    quality = 0.3 + 0.2 * active[:, None] * np.array([0, 1, 1]) + noise / 10
    quality -= 0.2 * ~active[:, None] * np.array([0, 1, 2])
    share = active.mean()
    assert 0.05 < share < 0.5
    small, medium, large = auto_ratio(quality, counts, (8, 16, 32))
    assert (small, medium, large) == pytest.approx((1 - share, share, 0), abs=0.02)
    sizes, shares = auto_sizes(quality, counts, (8, 16, 32), n_sizes=2)
    assert sizes == (8, 16)
    assert shares == pytest.approx((1 - share, share), abs=0.02)
    groups = size_groups(counts, shares)
    assert np.mean(groups == active) > 0.98


def test_planted_boundaries_in_noise():
    """Three groups, 5:3:2, each best served at its own size; single clients vary far more."""
    rng = np.random.default_rng(0)
    counts = (5 + 20 * rng.pareto(1.5, 6000)).astype(int)
    need = size_groups(counts, (5, 3, 2))
    quality = 0.4 - 0.05 * np.abs(np.arange(3) - need[:, None]) + rng.normal(0, 0.1, (6000, 3))
    assert auto_ratio(quality, counts, (8, 16, 32)) == pytest.approx((0.5, 0.3, 0.2), abs=0.03)


def test_order_of_clients_does_not_matter(power_law):
    rng = np.random.default_rng(0)
    quality = rng.random((500, 3)) * np.log(power_law)[:, None]
    shares = auto_ratio(quality, power_law, (8, 16, 32))
    order = rng.permutation(500)
    assert auto_ratio(quality[order], power_law[order], (8, 16, 32)) == pytest.approx(shares)


def test_shares_never_part_equal_counts():
    rng = np.random.default_rng(3)
    counts = np.repeat([2, 5], [70, 30])
    for _ in range(20):
        shares = auto_ratio(rng.normal(size=(100, 3)), counts, (8, 16, 32))
        assert set(np.round(np.cumsum(shares), 9)) <= {0.0, 0.7, 1.0}


def test_many_clients_and_sizes_are_quick():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 5000, 100_000)
    began = time.process_time()
    shares = auto_ratio(rng.random((100_000, 6)), counts, (2, 4, 8, 16, 32, 64))
    assert time.process_time() - began < 10  # about half a second
    assert sum(shares) == pytest.approx(1)


def test_choices_refuse():
    good = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"row for each of the 3 clients.*got shape \(2, 2\)"):
        auto_ratio(good, [1, 2, 3], (8, 16))
    with pytest.raises(ValueError, match=r"column for each of the 3 sizes; got shape \(2, 2\)"):
        auto_ratio(good, [1, 2], (8, 16, 32))
    with pytest.raises(ValueError, match=r"1 of the 2 clients have NaN.*nothing held out"):
        auto_ratio([[0.0, np.nan], [0, 1]], [1, 2], (8, 16))
    with pytest.raises(ValueError, match="no client to choose by"):
        auto_ratio(np.zeros((0, 2)), [], (8, 16))
    for sizes in [(16, 8), (8, 8), (0, 8)]:
        with pytest.raises(ValueError, match="must be positive and ascending"):
            auto_ratio(good, [1, 2], sizes)
    for sizes in [(8.0, 16.0), (), ("a", "b")]:
        with pytest.raises(ValueError, match="The sizes must be integers"):
            auto_ratio(good[:, : len(sizes)], [1, 2], sizes)
    for n_sizes in (0, 1.5):
        with pytest.raises(ValueError, match="n_sizes must be a positive integer"):
            auto_sizes(good, [1, 2], (8, 16), n_sizes=n_sizes)
    with pytest.raises(ValueError, match="too many ways to choose 15 of 40 sizes"):
        auto_sizes(np.zeros((2, 40)), [1, 2], range(1, 41), n_sizes=15)


@pytest.fixture(scope="module")
def tastes():
    """Interactions of 200 users of 4 groups, each user a client; and the groups."""
    bunch = make_interactions(200, 120, 4, mean_interactions=15, taste=4.0, random_state=0)
    return bunch, bunch.user_clusters


def test_clusters_are_those_of_tastes(tastes):
    bunch, groups = tastes
    found = cluster_clients(encode(bunch.data, bunch.target), 4, random_state=0)
    assert found.dtype == np.int64
    assert found.shape == (200,)
    assert set(found.tolist()) == {0, 1, 2, 3}
    assert adjusted_rand_score(groups, found) > 0.8


def test_clusters_of_clients_with_several_users(tastes):
    bunch, groups = tastes
    users = bunch.data[:, 0]
    # Five users of one group share a client, whose name tells nothing.
    places = np.empty(200, dtype=np.int64)
    for group in range(4):
        mine = np.flatnonzero(groups == group)
        places[mine] = np.arange(len(mine)) // 5
    names = np.array([f"{place}-{group}" for place, group in zip(places, groups, strict=True)])
    data = encode(bunch.data, names[users])
    found = cluster_clients(data, 4, random_state=0)
    assert found.shape == (data.n_clients,)
    theirs = [name.split("-")[1] for name in data.clients.ids]
    assert adjusted_rand_score(theirs, found) > 0.95


def test_clusters_do_not_depend_on_the_order_of_rows(tastes):
    bunch, _ = tastes
    rng = np.random.default_rng(0)
    order = rng.permutation(len(bunch.data))
    one = cluster_clients(encode(bunch.data, bunch.target), 4, random_state=3)
    other = cluster_clients(encode(bunch.data[order], bunch.target[order]), 4, random_state=3)
    np.testing.assert_array_equal(one, other)


def test_clusters_of_few_clients():
    rows = [["ann", 1], ["ann", 2], ["bob", 7], ["bob", 8], ["eve", 1], ["eve", 2]]
    data = encode(rows)
    assert cluster_clients(data, 1, random_state=0).tolist() == [0, 0, 0]
    # Ann and Eve cannot be told apart, so there are two clusters and no warning.
    ann, bob, eve = cluster_clients(data, 3, random_state=0).tolist()
    assert {ann, bob} == {0, 1}
    assert ann == eve
    assert cluster_clients(encode([["ann", 1]]), 1).tolist() == [0]
    assert cluster_clients(encode([["ann", 1], ["bob", 1]]), 2).tolist() == [0, 0]
    for n_clusters in (0, 4):
        with pytest.raises(ValueError, match=f"n_clusters={n_clusters} .* number of clients, 3"):
            cluster_clients(data, n_clusters)
