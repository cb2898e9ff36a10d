import pickle
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate

from fedrecsk.model_selection import ColdUserSplit, LeaveLastOut, PerUserHoldout, PerUserKFold

SPLITTERS = [
    LeaveLastOut(),
    LeaveLastOut(3),
    PerUserHoldout(random_state=0),
    PerUserHoldout(0.5, n_splits=3, random_state=0),
    PerUserHoldout(2, random_state=0),
    PerUserKFold(random_state=0),
    PerUserKFold(2, shuffle=False),
    ColdUserSplit(n_splits=2, random_state=0),
    ColdUserSplit(4, random_state=0),
]
KEEP_USERS = [cv for cv in SPLITTERS if not isinstance(cv, ColdUserSplit)]


def random_rows(seed, n=300, n_users=30, n_items=12):
    """Rows with repeated pairs, users of all sizes (one has a single row) and distinct times."""
    rng = np.random.default_rng(seed)
    user = (n_users * rng.random(n) ** 2).astype(int)
    rows = np.column_stack([user, rng.integers(0, n_items, n), rng.integers(1, 6, n)])
    rows = np.vstack([rows, [[n_users, 0, 5]]])
    return np.column_stack([rows, rng.permutation(len(rows)) + 1000])


def test_the_rows_have_what_the_tests_need():
    X = random_rows(0)
    pairs = Counter(map(tuple, X[:, :2].tolist()))
    assert max(pairs.values()) > 1
    sizes = Counter(user for user, _ in pairs)
    assert min(sizes.values()) == 1
    assert max(sizes.values()) > 5


def pairs_of(X, rows):
    return set(map(tuple, np.asarray(X)[rows, :2].tolist()))


@pytest.mark.parametrize("cv", SPLITTERS, ids=repr)
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_disjoint_complete_and_leak_no_pair(cv, seed):
    X = random_rows(seed)
    splits = list(cv.split(X))
    assert len(splits) == cv.get_n_splits(X) == cv.get_n_splits()
    for train, test in splits:
        assert len(test)
        assert sorted([*train, *test]) == list(range(len(X)))
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()
        assert not pairs_of(X, train) & pairs_of(X, test)


@pytest.mark.parametrize("cv", KEEP_USERS, ids=repr)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_user_is_lost(cv, seed):
    X = random_rows(seed)
    for train, _ in cv.split(X):
        assert set(X[train, 0]) == set(X[:, 0])


# PerUserKFold without shuffle goes by row order on purpose.
@pytest.mark.parametrize("cv", [cv for cv in SPLITTERS if getattr(cv, "shuffle", True)], ids=repr)
def test_row_order_does_not_matter(cv):
    X = random_rows(0)
    order = np.random.default_rng(1).permutation(len(X))
    for (_, test), (_, moved) in zip(cv.split(X), cv.split(X[order]), strict=True):
        assert pairs_of(X, test) == pairs_of(X[order], moved)


@pytest.mark.parametrize("cv", SPLITTERS, ids=repr)
def test_same_seed_same_split(cv):
    X = random_rows(0)
    once = [test.tolist() for _, test in cv.split(X)]
    again = [test.tolist() for _, test in pickle.loads(pickle.dumps(cv)).split(X)]
    assert once == again


@pytest.mark.parametrize("make", [PerUserHoldout, PerUserKFold, ColdUserSplit])
def test_other_seed_other_split(make):
    X = random_rows(0)
    tests = {tuple(next(make(random_state=seed).split(X))[1].tolist()) for seed in range(3)}
    assert len(tests) == 3


@pytest.mark.parametrize("make", [PerUserHoldout, ColdUserSplit])
def test_repeated_splits_differ(make):
    X = random_rows(0)
    tests = {tuple(test.tolist()) for _, test in make(n_splits=4, random_state=0).split(X)}
    assert len(tests) == 4


@pytest.mark.parametrize("cv", SPLITTERS, ids=repr)
def test_data_frames_and_text_ids(cv):
    X = random_rows(0)
    users = np.array([f"u{user:03}" for user in X[:, 0]])  # sorts like the numbers
    columns = {"user_id": users, "item_id": X[:, 1], "rating": X[:, 2], "timestamp": X[:, 3]}
    expected = [(a.tolist(), b.tolist()) for a, b in cv.split(X)]
    moments = {**columns, "timestamp": pd.to_datetime(X[:, 3], unit="s")}
    for frame in (pd.DataFrame(columns), pl.DataFrame(columns), pd.DataFrame(moments)):
        assert [(a.tolist(), b.tolist()) for a, b in cv.split(frame)] == expected
    assert [(a.tolist(), b.tolist()) for a, b in cv.split(X.tolist())] == expected


def test_columns_that_only_a_pipeline_knows_are_no_obstacle():
    frame = pd.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [1, 2, 1, 2], "genre": list("abcd")})
    train, test = next(PerUserHoldout(1, random_state=0).split(frame))
    assert len(train) == len(test) == 2


# --- LeaveLastOut ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_leave_last_out_matches_plain_loop(n):
    X = random_rows(2)
    latest = defaultdict(dict)
    for user, item, _, time in X.tolist():
        latest[user][item] = max(time, latest[user].get(item, 0))
    expected = {
        (user, item)
        for user, times in latest.items()
        if len(times) > n
        for item in sorted(times, key=times.get)[-n:]
    }
    [(_, test)] = LeaveLastOut(n).split(X)
    assert pairs_of(X, test) == expected


def test_leave_last_out_breaks_ties_by_row_order():
    X = np.array([[1, 12, 1, 7], [1, 11, 1, 7], [1, 10, 1, 3]])
    assert next(LeaveLastOut().split(X))[1].tolist() == [1]
    assert next(LeaveLastOut().split(X[[1, 0, 2]]))[1].tolist() == [1]


def test_leave_last_out_keeps_repeats_of_a_pair_together():
    X = np.array([[1, 10, 1, 1], [1, 11, 1, 2], [1, 10, 1, 3]])
    assert next(LeaveLastOut().split(X))[1].tolist() == [0, 2]


def test_leave_last_out_needs_times_and_enough_items():
    X = random_rows(0)
    with pytest.raises(ValueError, match="needs the time of each row, and X has none"):
        next(LeaveLastOut().split(X[:, :3]))
    with pytest.raises(ValueError, match="No user has more than n=50 distinct items"):
        next(LeaveLastOut(50).split(X))


# --- PerUserHoldout -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test_size", "expected"),
    [
        (0.2, {1: 0, 2: 0, 3: 1, 7: 1, 8: 2, 10: 2}),
        (0.5, {1: 0, 2: 1, 3: 2, 7: 4, 8: 4, 10: 5}),
        (0.35, {1: 0, 2: 1, 3: 1, 7: 2, 8: 3, 10: 4}),
        (0.99, {1: 0, 2: 1, 3: 2, 7: 6, 8: 7, 10: 9}),
        (3, {1: 0, 2: 1, 3: 2, 7: 3, 8: 3, 10: 3}),
    ],
)
def test_holdout_takes_its_share_of_each_user(test_size, expected):
    X = np.array([[size, item] for size in expected for item in range(size)])
    _, test = next(PerUserHoldout(test_size, random_state=0).split(X))
    counts = Counter(X[test, 0].tolist())
    assert {size: counts[size] for size in expected} == expected


def test_holdout_is_random_within_users():
    X = np.array([[0, item] for item in range(10)])
    tests = [test for _, test in PerUserHoldout(0.3, n_splits=400, random_state=0).split(X)]
    share = np.bincount(np.concatenate(tests), minlength=10) / 400
    # 400 draws at 0.3 have a standard error of 0.023.
    np.testing.assert_allclose(share, 0.3, atol=0.1)


def test_holdout_with_nothing_to_hold_out():
    with pytest.raises(ValueError, match=r"test_size=0\.2 holds out nothing: the largest .* 2 "):
        next(PerUserHoldout().split(np.array([[0, 0], [0, 1], [1, 0]])))


# --- PerUserKFold ---------------------------------------------------------------------------


@pytest.mark.parametrize("cv", [PerUserKFold(4, random_state=1), PerUserKFold(4, shuffle=False)])
def test_folds_are_even_and_cover_all_but_single_items(cv):
    X = random_rows(3)
    sizes = Counter(user for user, _ in pairs_of(X, slice(None)))
    folds = [pairs_of(X, test) for _, test in cv.split(X)]
    assert sum(map(len, folds)) == len(set().union(*folds))
    expected = {pair for pair in pairs_of(X, slice(None)) if sizes[pair[0]] > 1}
    assert set().union(*folds) == expected
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    for user in sizes:
        counts = [sum(u == user for u, _ in fold) for fold in folds]
        assert max(counts) - min(counts) <= 1


def test_folds_without_shuffle_follow_the_rows():
    X = np.array([[0, 5], [0, 3], [0, 9], [0, 3], [0, 1]])
    tests = [test.tolist() for _, test in PerUserKFold(2, shuffle=False).split(X)]
    assert tests == [[0, 2], [1, 3, 4]]


def test_first_fold_is_not_always_the_first_users():
    # Users with two items and ten folds: a fold holds few users, and which ones must be random.
    X = np.array([[user, item] for user in range(20) for item in range(2)])
    users = [set(X[next(PerUserKFold(10, random_state=s).split(X))[1], 0]) for s in range(3)]
    assert users[0] != users[1] or users[1] != users[2]


def test_more_folds_than_pairs():
    X = np.array([[0, 0], [0, 1], [1, 0]])
    with pytest.raises(ValueError, match="n_splits=3 is more than the 2 "):
        next(PerUserKFold(3).split(X))


# --- ColdUserSplit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test_size", "n_users", "n_cold"), [(0.2, 10, 2), (0.25, 10, 3), (0.01, 10, 1), (0.99, 4, 3),
                                         (3, 10, 3)]
)  # fmt: skip
def test_cold_users_are_whole(test_size, n_users, n_cold):
    X = np.array([[user, item] for user in range(n_users) for item in range(user % 3 + 1)])
    train, test = next(ColdUserSplit(test_size, random_state=0).split(X))
    assert len(set(X[test, 0])) == n_cold
    assert not set(X[train, 0]) & set(X[test, 0])


@pytest.mark.parametrize(("test_size", "n_users"), [(2, 2), (5, 2), (0.5, 1)])
def test_cold_users_need_warm_ones(test_size, n_users):
    X = np.array([[user, item] for user in range(n_users) for item in range(3)])
    with pytest.raises(ValueError, match=f"cannot be held out of {n_users} users"):
        next(ColdUserSplit(test_size).split(X))


# --- parameters and scikit-learn ------------------------------------------------------------


@pytest.mark.parametrize("make", [PerUserHoldout, ColdUserSplit])
@pytest.mark.parametrize("test_size", [0, -1, 0.0, 1.0, 1.5, -0.2, True, "half", None, np.nan])
def test_bad_test_size(make, test_size):
    with pytest.raises(ValueError, match=r"test_size=.* must be a positive integer or a float"):
        make(test_size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerUserKFold(1), "n_splits=1 leaves no training rows"),
        (lambda: PerUserKFold(0), "n_splits must be at least 1, got 0"),
        (lambda: PerUserKFold(2.5), r"n_splits must be an integer, got 2\.5"),
        (lambda: PerUserKFold(shuffle=False, random_state=0), "shuffle is False"),
        (lambda: PerUserHoldout(n_splits=0), "n_splits must be at least 1"),
        (lambda: ColdUserSplit(n_splits=True), "n_splits must be an integer"),
        (lambda: LeaveLastOut(0), "n must be at least 1"),
        (lambda: LeaveLastOut(1.0), "n must be an integer"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_beyond_all_arrays_are_just_large():
    X = random_rows(0)
    with pytest.raises(ValueError, match=f"No user has more than n={10**30} distinct items"):
        next(LeaveLastOut(10**30).split(X))
    with pytest.raises(ValueError, match=f"test_size={10**30} cannot be held out of"):
        next(ColdUserSplit(10**30).split(X))
    train, _ = next(PerUserHoldout(10**30, random_state=0).split(X))
    assert len(pairs_of(X, train)) == len(set(X[:, 0]))


def test_shuffle_is_a_flag():
    with pytest.raises(TypeError, match="shuffle must be True or False"):
        PerUserKFold(shuffle="yes")


def test_repr_is_scikit_learns():
    assert repr(LeaveLastOut(2)) == "LeaveLastOut(n=2)"
    assert repr(PerUserHoldout(3)) == "PerUserHoldout(n_splits=1, random_state=None, test_size=3)"
    assert repr(PerUserKFold(4)) == "PerUserKFold(n_splits=4, random_state=None, shuffle=True)"


def test_groups_are_ignored_aloud():
    X = random_rows(0)
    with pytest.warns(UserWarning, match="groups parameter is ignored by PerUserHoldout"):
        next(PerUserHoldout().split(X, groups=X[:, 0]))


class CountingEstimator(BaseEstimator):
    """Scores by how many rows it was fitted on; checks that clients stay with their rows."""

    __metadata_request__fit = {"client_ids": True}  # noqa: RUF012
    __metadata_request__score = {"client_ids": True}  # noqa: RUF012

    def __init__(self, factor=1):
        self.factor = factor

    def fit(self, X, client_ids=None):
        assert client_ids is None or (np.asarray(X)[:, 0] % 3 == client_ids).all()
        self.n_rows_ = len(X)
        return self

    def score(self, X, client_ids=None):
        assert client_ids is None or (np.asarray(X)[:, 0] % 3 == client_ids).all()
        return self.factor * self.n_rows_ + len(X) / 1000


@pytest.mark.parametrize("cv", SPLITTERS, ids=repr)
def test_inside_scikit_learn(cv):
    X = random_rows(0)
    clients = X[:, 0] % 3
    expected = [len(train) + len(test) / 1000 for train, test in cv.split(X)]
    np.testing.assert_allclose(cross_val_score(CountingEstimator(), X, clients, cv=cv), expected)
    frame = pl.DataFrame(X, schema=["user_id", "item_id", "rating", "timestamp"])
    np.testing.assert_allclose(cross_val_score(CountingEstimator(), frame, cv=cv), expected)
    grid = GridSearchCV(CountingEstimator(), {"factor": [1, 2]}, cv=cv).fit(X, clients)
    assert grid.best_params_ == {"factor": 2}
    assert grid.n_splits_ == len(expected)


@pytest.mark.parametrize("cv", SPLITTERS, ids=repr)
def test_with_metadata_routing(cv):
    X = random_rows(0)
    clients = X[:, 0] % 3
    expected = [len(train) + len(test) / 1000 for train, test in cv.split(X)]
    with config_context(enable_metadata_routing=True):
        result = cross_validate(CountingEstimator(), X, cv=cv, params={"client_ids": clients})
        grid = GridSearchCV(CountingEstimator(), {"factor": [1, 2]}, cv=cv)
        grid.fit(X, client_ids=clients)
    np.testing.assert_allclose(result["test_score"], expected)
    assert grid.best_params_ == {"factor": 2}
