"""The generator keeps its promises: planted taste, power law, sizes, seeds."""

import inspect
import time

import numpy as np
import pytest

from fedrecsk.data import encode
from fedrecsk.data.synthetic import make_interactions


@pytest.fixture(scope="module")
def bunch():
    return make_interactions(random_state=0)


def own_share(bunch):
    user, item = bunch.data[:, 0], bunch.data[:, 1]
    return np.mean(bunch.user_clusters[user] == bunch.item_clusters[item])


def test_columns(bunch):
    data = bunch.data
    assert data.dtype == np.int64
    assert data.shape[1] == len(bunch.feature_names) == 4
    assert set(data[:, 0].tolist()) == set(range(500))
    assert set(data[:, 1].tolist()) <= set(range(300))
    assert set(data[:, 2].tolist()) == {1, 2, 3, 4, 5}
    assert len(np.unique(data[:, :2], axis=0)) == len(data)
    np.testing.assert_array_equal(bunch.target, data[:, 0])
    assert len(encode(data, bunch.target)) == len(data)


def test_time_goes_on(bunch):
    user, timestamp = bunch.data[:, 0], bunch.data[:, 3]
    assert (np.diff(timestamp) >= 0).all()
    by_user = np.lexsort((timestamp, user))
    same_user = user[by_user][1:] == user[by_user][:-1]
    assert (np.diff(timestamp[by_user])[same_user] > 0).all()


def test_taste_is_not_told_by_time(bunch):
    # Draws come likeliest first; a split by time must not find the unlikely ones at the end.
    order = np.lexsort((bunch.data[:, 3], bunch.data[:, 0]))
    user, item = bunch.data[order, 0], bunch.data[order, 1]
    own = bunch.user_clusters[user] == bunch.item_clusters[item]
    ends = user[1:] != user[:-1]
    first, last = np.append(True, ends), np.append(ends, True)
    assert abs(own[first].mean() - own[last].mean()) < 0.08


def test_same_seed_same_data(bunch):
    again = make_interactions(random_state=0)
    np.testing.assert_array_equal(again.data, bunch.data)
    assert again.item_text == bunch.item_text
    state = make_interactions(random_state=np.random.RandomState(0))
    np.testing.assert_array_equal(state.data, bunch.data)
    other = make_interactions(random_state=1)
    assert other.data.shape != bunch.data.shape or (other.data != bunch.data).any()
    X, client_ids = make_interactions(return_X_y=True, random_state=0)
    np.testing.assert_array_equal(X, bunch.data)
    np.testing.assert_array_equal(client_ids, bunch.target)


def test_chunks_do_not_change_the_data(bunch, monkeypatch):
    monkeypatch.setattr("fedrecsk.data.synthetic._CELLS_AT_ONCE", 1000)
    np.testing.assert_array_equal(make_interactions(random_state=0).data, bunch.data)


def test_draws_are_in_proportion_to_the_weights():
    # One draw a user: the share of an item is its weight. 40,000 users, so the error is ~ 0.002.
    made = make_interactions(
        40_000, 4, 2, mean_interactions=1, min_interactions=1, taste=1.5, random_state=0,
        popularity_exponent=0.0,
    )  # fmt: skip
    user, item = made.data[:, 0], made.data[:, 1]
    assert len(user) == 40_000
    for cluster in (0, 1):
        weights = np.exp(1.5 * (made.item_clusters == cluster))
        counts = np.bincount(item[made.user_clusters[user] == cluster], minlength=4)
        np.testing.assert_allclose(counts / counts.sum(), weights / weights.sum(), atol=0.02)


def test_taste_grows_with_its_parameter():
    shares = [
        own_share(make_interactions(taste=taste, random_state=0)) for taste in (0.0, 1.5, 3.0)
    ]
    assert abs(shares[0] - 1 / 5) < 0.05
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.1


def test_ratings_follow_taste(bunch):
    user, item, rating, _ = bunch.data.T
    own = bunch.user_clusters[user] == bunch.item_clusters[item]
    assert rating[own].mean() > rating[~own].mean() + 1
    indifferent = make_interactions(taste=0.0, random_state=0)
    user, item, rating, _ = indifferent.data.T
    own = indifferent.user_clusters[user] == indifferent.item_clusters[item]
    assert abs(rating[own].mean() - rating[~own].mean()) < 0.1


def test_a_personal_ranking_beats_popularity(bunch):
    """Rank each user's last item by neighbours in the other rows, and by popularity."""
    order = np.lexsort((bunch.data[:, 3], bunch.data[:, 0]))
    user, item = bunch.data[order, :2].T
    last = np.append(user[1:] != user[:-1], True)
    seen = np.zeros((500, 300))
    seen[user[~last], item[~last]] = 1
    popularity = np.tile(seen.sum(axis=0), (500, 1))
    together = seen.T @ seen
    np.fill_diagonal(together, 0)
    norm = np.sqrt(seen.sum(axis=0)) + 1e-9
    personal = seen @ (together / norm / norm[:, None])

    def hit_rate(scores):
        scores = np.where(seen > 0, -np.inf, scores)
        wanted = scores[user[last], item[last]]
        return np.mean((scores[user[last]] > wanted[:, None]).sum(axis=1) < 20)

    assert hit_rate(personal) > 1.3 * hit_rate(popularity)


def test_activity_has_a_minimum_and_a_long_tail(bunch):
    counts = np.bincount(bunch.data[:, 0])
    assert counts.min() == 5
    assert counts.max() <= 150
    assert 24 < counts.mean() < 33
    assert counts.max() > 3 * np.median(counts)
    # Beyond the minimum, activity follows a Lomax law: its mean of ten thousand is as asked.
    many = make_interactions(
        10_000, 200, 2, mean_interactions=8, min_interactions=3, activity_exponent=4,
        random_state=0, return_X_y=True,
    )[0]  # fmt: skip
    counts = np.bincount(many[:, 0])
    assert counts.min() == 3
    # Counts are cut down to integers, which takes half an interaction on average.
    assert abs(counts.mean() - 7.5) < 0.3


def test_popularity_falls_with_rank():
    def top_share(exponent):
        made = make_interactions(popularity_exponent=exponent, taste=0.0, random_state=0)
        counts = np.sort(np.bincount(made.data[:, 1], minlength=300))
        return counts[-30:].sum() / counts.sum()

    assert top_share(0.0) < 0.15
    assert top_share(1.2) > top_share(0.6) > 0.2


def test_clusters_are_even(bunch):
    assert np.bincount(bunch.user_clusters).tolist() == [100] * 5
    assert np.bincount(bunch.item_clusters).tolist() == [60] * 5


def test_clients_hold_whole_users_evenly():
    X, client_ids = make_interactions(100, 50, 2, n_clients=8, return_X_y=True, random_state=0)
    users_of = [set(X[client_ids == client, 0].tolist()) for client in range(8)]
    assert sorted(map(len, users_of)) == [12] * 4 + [13] * 4
    assert sum(map(len, users_of)) == len(set.union(*users_of)) == 100


def test_titles_tell_the_group(bunch):
    assert sorted(bunch.item_text) == list(range(300))
    titles = list(bunch.item_text.values())
    assert len(set(titles)) == 300
    words = [set(title.split(",")[0].split()) for title in titles]
    # The words that mark a group are those that no other group has.
    of_group = [
        set.union(*(words[i] for i in np.flatnonzero(bunch.item_clusters == c))) for c in range(5)
    ]
    for item, cluster in enumerate(bunch.item_clusters):
        others = set.union(*(of_group[c] for c in range(5) if c != cluster))
        assert len(words[item] - others) >= 2, titles[item]


def test_more_groups_than_words_still_tell_groups_apart():
    made = make_interactions(60, 60, 30, random_state=0)
    for item, cluster in enumerate(made.item_clusters):
        ends_in_digit = made.item_text[item].split()[2][-1].isdigit()
        assert ends_in_digit == (cluster >= 12)


def test_description_says_that_it_is_made_up(bunch):
    assert "Made-up" in bunch.DESCR
    assert f"{len(bunch.data)} interactions of 500 users" in bunch.DESCR


def test_the_default_is_fast():
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        make_interactions(random_state=0)
        best = min(best, time.perf_counter() - start)
    assert best < 0.2


def test_smallest_data():
    X, client_ids = make_interactions(
        1, 1, 1, mean_interactions=1, min_interactions=1, return_X_y=True
    )
    assert X[:, :2].tolist() == [[0, 0]]
    assert client_ids.tolist() == [0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_clusters": 0}, "n_clusters=0 must lie between 1"),
        ({"n_clusters": 301}, r"users \(500\) and of items \(300\)"),
        ({"min_interactions": 0}, "min_interactions=0, mean_interactions=30"),
        ({"min_interactions": 31}, "min_interactions=31, mean_interactions=30"),
        ({"mean_interactions": 301}, "mean_interactions=301 and n_items=300"),
        ({"n_clients": 0}, "n_clients=0 must lie between 1 and n_users=500"),
        ({"n_clients": 501}, "n_clients=501 must lie between 1 and n_users=500"),
        ({"activity_exponent": 1.0}, r"activity_exponent must be above 1, got 1\.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_interactions(**sizes)


def test_every_parameter_is_documented():
    for name in inspect.signature(make_interactions).parameters:
        assert f"    {name} : " in make_interactions.__doc__
