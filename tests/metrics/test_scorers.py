import pickle

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError, UnsetMetadataPassedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from fedrecsk.metrics import client_balance, evaluate, ranking_scorer
from fedrecsk.metrics.scorers import rank_users, score_ranking

N_USERS, N_ITEMS = 12, 9
TASTE = np.random.default_rng(3).integers(0, 5, (N_USERS + 5, N_ITEMS)).astype(float)


class TableRecommender(BaseEstimator):
    """Scores come from a table of (user, item); only fit's users and items are known."""

    __metadata_request__fit = {"client_ids": True}  # noqa: RUF012

    def __init__(self, sign=1.0, min_rating=None):
        self.sign = sign
        self.min_rating = min_rating

    def fit(self, X, client_ids=None):
        X = np.asarray(X)[:, :2].astype(int)
        self.n_client_ids_ = None if client_ids is None else len(client_ids)
        self.user_ids_, self.item_ids_ = np.unique(X[:, 0]), np.unique(X[:, 1])
        seen = [np.unique(np.searchsorted(self.item_ids_, X[X[:, 0] == u, 1]))
                for u in self.user_ids_]  # fmt: skip
        self.seen_indptr_ = np.cumsum([0, *map(len, seen)])
        self.seen_indices_ = np.concatenate(seen)
        self.batches_ = []
        return self

    def recommend(self, users=None, k=10, *, exclude_seen=True, candidates=None):
        self.batches_.append(len(users))
        scores = np.stack([self._scores(user) for user in users])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, order, axis=1)
        # The id beside a -inf is arbitrary: put one there that would be a hit for many.
        ids = np.where(scores > -np.inf, self.item_ids_[order], self.item_ids_[0])
        return ids, scores

    def _scores(self, user):
        scores = self.sign * TASTE[user, self.item_ids_]
        if user in self.user_ids_:
            code = np.searchsorted(self.user_ids_, user)
            scores[
                self.seen_indices_[self.seen_indptr_[code] : self.seen_indptr_[code + 1]]
            ] = -np.inf
        return scores


def plain_lists(train, test, sign=1.0, k=4):
    """For each user with something to find: (user, its truth, its list of at most k items)."""
    known = sorted({item for _, item in train})
    result = []
    for user in sorted({u for u, _ in test}):
        seen = {i for u, i in train if u == user}
        truth = {i for u, i in test if u == user} - seen
        unseen = [i for i in known if i not in seen]
        ranked = sorted(unseen, key=lambda i: (-sign * TASTE[user, i], i))
        if truth:
            result.append((user, truth, ranked[:k]))
    return result


def random_rows(rng, n, users=N_USERS, items=N_ITEMS):
    return np.column_stack([rng.integers(0, users, n), rng.integers(0, items, n)])


@pytest.fixture
def data():
    """Train and test rows with repeats, overlap, new users (12..) and a new item (8)."""
    rng = np.random.default_rng(0)
    train = random_rows(rng, 40, items=N_ITEMS - 1)
    test = random_rows(rng, 60, users=N_USERS + 3)
    assert (test[:, 1] == N_ITEMS - 1).any()
    return train, test


def as_pairs(rows):
    return [tuple(row) for row in rows.tolist()]


def recalls(lists):
    return np.array([len(truth & set(ranked)) / len(truth) for _, truth, ranked in lists])


def test_evaluate_matches_plain_loop(data):
    train, test = data
    est = TableRecommender().fit(train)
    result = evaluate(est, test, metrics=("recall", "mrr", "coverage"), k=(2, 4))
    lists = plain_lists(as_pairs(train), as_pairs(test))
    assert result.user_ids.tolist() == [user for user, _, _ in lists]
    for k in (2, 4):
        cut = [(u, t, r[:k]) for u, t, r in lists]
        mrr = [next((1 / n for n, i in enumerate(r, 1) if i in t), 0.0) for _, t, r in cut]
        listed = {i for _, _, r in cut for i in r}
        np.testing.assert_allclose(result.per_user[f"recall@{k}"], recalls(cut))
        np.testing.assert_allclose(result.per_user[f"mrr@{k}"], mrr)
        assert result.overall[f"recall@{k}"] == pytest.approx(recalls(cut).mean())
        assert result.overall[f"mrr@{k}"] == pytest.approx(np.mean(mrr))
        assert result.overall[f"coverage@{k}"] == len(listed) / len(est.item_ids_)
    assert set(result.per_user) == {"recall@2", "recall@4", "mrr@2", "mrr@4"}


def test_every_user_is_ranked_once(data):
    est = TableRecommender().fit(data[0])
    result = evaluate(est, data[1], metrics=("ndcg", "recall", "map"), k=(1, 3, 5))
    assert est.batches_ == [result.n_users]


def test_batches_change_nothing(data):
    train, test = data
    est = TableRecommender().fit(train)
    whole = evaluate(est, test, metrics=("ndcg", "coverage"), k=3)
    est.batches_.clear()
    parts = evaluate(est, test, metrics=("ndcg", "coverage"), k=3, batch_size=4)
    assert max(est.batches_) == 4
    assert parts.overall == whole.overall
    np.testing.assert_array_equal(parts.per_user["ndcg@3"], whole.per_user["ndcg@3"])


def test_lists_longer_than_the_catalogue(data):
    train, test = data
    est = TableRecommender().fit(train)
    result = evaluate(est, test, metrics=("recall", "precision", "coverage"), k=50)
    lists = plain_lists(as_pairs(train), as_pairs(test), k=50)
    assert result.overall["recall@50"] == pytest.approx(recalls(lists).mean())
    hits = [len(truth & set(ranked)) for _, truth, ranked in lists]
    assert result.overall["precision@50"] == pytest.approx(np.mean(hits) / 50)
    assert result.overall["coverage@50"] == 1.0


def test_padding_is_never_a_hit():
    # User 0 has seen all but item 1, so its list is [1] and padding that names item 0.
    train = np.array([[0, 0], [0, 2], [1, 1]])
    est = TableRecommender().fit(train)
    result = evaluate(est, np.array([[0, 1], [0, 7]]), metrics=("recall", "hit_rate"), k=3)
    assert result.overall == {"recall@3": 0.5, "hit_rate@3": 1.0}


def test_unknown_item_is_a_miss_but_counts():
    est = TableRecommender().fit(np.array([[0, 0], [1, 1]]))
    assert evaluate(est, np.array([[0, 5]]), metrics="recall", k=2).overall == {"recall@2": 0.0}


def test_seen_items_leave_the_truth_and_users_without_truth_the_mean():
    est = TableRecommender().fit(np.array([[0, 0], [1, 1]]))
    result = evaluate(est, np.array([[0, 0], [1, 1], [1, 0]]), metrics="recall", k=2)
    assert result.user_ids.tolist() == [1]
    assert result.overall == {"recall@2": 1.0}


def test_nothing_to_find_is_an_error_that_says_so():
    train = np.array([[0, 0], [1, 1]])
    est = TableRecommender().fit(train)
    with pytest.raises(ValueError, match="No user has an item left to find: the 2 rows of X"):
        evaluate(est, train)


def test_weak_ratings_are_not_truth():
    train = np.array([[0, 0], [1, 1], [2, 2]])
    test = np.array([[0, 1, 5], [0, 2, 1], [1, 2, 1]])
    assert evaluate(TableRecommender().fit(train), test, k=1).user_ids.tolist() == [0, 1]
    est = TableRecommender(min_rating=4).fit(train)
    result = evaluate(est, test, metrics="recall", k=2)
    assert result.user_ids.tolist() == [0]
    assert result.overall == {"recall@2": 1.0}
    assert evaluate(est, test[:, :2], k=1).user_ids.tolist() == [0, 1]  # no ratings to judge by
    with pytest.raises(ValueError, match="1 of the rows are below min_rating"):
        evaluate(est, test[2:])


def test_weights_of_users_are_means_over_rows(data):
    train, test = data
    est = TableRecommender().fit(train)
    row_weight = np.random.default_rng(1).random(len(test))
    result = evaluate(est, test, metrics="recall", k=3, sample_weight=row_weight)
    weights = [row_weight[test[:, 0] == user].mean() for user in result.user_ids]
    expected = np.average(result.per_user["recall@3"], weights=weights)
    assert result.overall["recall@3"] == pytest.approx(expected)
    assert result.overall["recall@3"] != pytest.approx(result.per_user["recall@3"].mean())


def test_clients_and_groups(data):
    train, test = data
    est = TableRecommender().fit(train)
    clients = np.array(["north", "south", "east"])[test[:, 0] % 3]
    weights = 1.0 + test[:, 0]
    activity = {user: "heavy" if user < 5 else "light" for user in range(20)}
    result = evaluate(
        est, test, clients, metrics=("ndcg", "coverage"), k=3, groups=activity,
        sample_weight=weights,
    )  # fmt: skip
    values = dict(zip(result.user_ids.tolist(), result.per_user["ndcg@3"], strict=True))
    assert result.client_ids.tolist() == ["east", "north", "south"]
    for name, mean in zip(result.client_ids, result.per_client["ndcg@3"], strict=True):
        users = [u for u in values if ["north", "south", "east"][u % 3] == name]
        expected = np.average([values[u] for u in users], weights=[1.0 + u for u in users])
        assert mean == pytest.approx(expected)
    assert result.balance == {"ndcg@3": client_balance(result.per_client["ndcg@3"])}
    light = [u for u in values if u >= 5]
    assert list(result.per_group) == ["heavy", "light"]
    assert result.per_group["light"]["n_users"] == len(light)
    assert result.per_group["light"]["ndcg@3"] == pytest.approx(
        np.average([values[u] for u in light], weights=[1.0 + u for u in light])
    )
    by_row = evaluate(
        est, test, clients, metrics=("ndcg", "coverage"), k=3, sample_weight=weights,
        groups=["heavy" if u < 5 else "light" for u in test[:, 0]],
    )  # fmt: skip
    assert by_row.per_group == result.per_group


def test_without_clients_every_user_is_one(data):
    est = TableRecommender().fit(data[0])
    result = evaluate(est, data[1], k=3)
    np.testing.assert_array_equal(result.client_ids, result.user_ids)
    np.testing.assert_array_equal(result.per_client["ndcg@3"], result.per_user["ndcg@3"])
    assert result.per_group == {}


def test_data_frames_bring_their_clients(data):
    train, test = data
    est = TableRecommender().fit(train)
    clients = np.where(test[:, 0] % 2, "odd", "even")
    expected = evaluate(est, test, clients, k=3)
    columns = {"item_id": test[:, 1], "client_id": clients, "user_id": test[:, 0]}
    for frame in (pd.DataFrame(columns), pl.DataFrame(columns)):
        result = evaluate(est, frame, k=3)
        assert result.overall == expected.overall
        assert result.client_ids.tolist() == ["even", "odd"]
        np.testing.assert_array_equal(result.per_client["ndcg@3"], expected.per_client["ndcg@3"])


def test_clients_without_judged_users_are_absent():
    est = TableRecommender().fit(np.array([[0, 0], [1, 1]]))
    result = evaluate(est, np.array([[0, 0], [1, 0]]), ["a", "b"], k=1)
    assert result.client_ids.tolist() == ["b"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"client_ids": ["a", "b"]}, "client_ids has 2 entries, but X has 3 rows"),
        ({"client_ids": ["a", "b", "a"]}, "User 1 has rows under two clients, 'a' and 'b'"),
        ({"groups": ["x", "x", "y"]}, "User 1 has rows under two groups, 'x' and 'y'"),
        ({"groups": {0: "x"}}, "no entry for 1 of the 2 users .* such as 1"),
        ({"metrics": "auc"}, "Unknown metric 'auc'; choose from ndcg, recall"),
        ({"metrics": ()}, "metrics is empty"),
        ({"k": ()}, "k is empty"),
        ({"k": 0}, "k must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"sample_weight": [1.0]}, "each of the 3 rows of X"),
        ({"sample_weight": [0, 0, 0]}, "0 for every user"),
    ],
)
def test_bad_arguments(argument, message):
    est = TableRecommender().fit(np.array([[0, 0], [1, 1]]))
    test = np.array([[0, 1], [1, 0], [1, 2]])
    with pytest.raises(ValueError, match=message):
        evaluate(est, test, **argument)


def test_no_recommender():
    with pytest.raises(TypeError, match="FunctionTransformer has no recommend"):
        evaluate(FunctionTransformer(), np.array([[0, 1]]))
    with pytest.raises(TypeError, match="GridSearchCV has no recommend"):
        evaluate(GridSearchCV(TableRecommender(), {}), np.array([[0, 1]]))
    with pytest.raises(NotFittedError):
        evaluate(TableRecommender(), np.array([[0, 1]]))


def test_pipelines_and_searches_are_seen_through(data):
    train, test = data
    raw_train, raw_test = train + 100, test + 100
    expected = evaluate(TableRecommender().fit(train), test).overall
    shift = FunctionTransformer(lambda X: X - 100)
    pipeline = make_pipeline("passthrough", shift, TableRecommender()).fit(raw_train)
    assert evaluate(pipeline, raw_test).overall == expected
    scorer = ranking_scorer("ndcg", k=10)
    assert scorer(pipeline, raw_test) == expected["ndcg@10"]
    grid = GridSearchCV(
        make_pipeline(shift, TableRecommender()), {"tablerecommender__sign": [1.0]},
        scoring=scorer, cv=KFold(2, shuffle=True, random_state=0),
    ).fit(raw_train)  # fmt: skip
    assert evaluate(grid, raw_test).overall == expected


def test_score_ranking_is_the_mean(data):
    est = TableRecommender().fit(data[0])
    result = evaluate(est, data[1])
    assert score_ranking(est, data[1]) == result.overall["ndcg@20"]


def test_rank_users_describes_the_rows(data):
    train, test = data
    ranked = rank_users(TableRecommender().fit(train), test, 3)
    kept = ranked.user_of_row >= 0
    np.testing.assert_array_equal(ranked.user_ids[ranked.user_of_row[kept]], test[kept, 0])
    assert not np.isin(test[~kept, 0], ranked.user_ids).any()
    assert ranked.n_true.min() >= 1
    assert ranked.client_of_row is None


# --- the scorer inside scikit-learn ---------------------------------------------------------


def test_scorer_is_a_well_behaved_object(data):
    scorer = ranking_scorer("recall", k=5)
    assert repr(scorer) == "RankingScorer(k=5, metric='recall')"
    est = TableRecommender().fit(data[0])
    value = scorer(est, data[1])
    assert value == evaluate(est, data[1], metrics="recall", k=5).overall["recall@5"]
    assert type(value) is float
    with config_context(enable_metadata_routing=True):
        asking = clone(ranking_scorer("map").set_score_request(sample_weight=True))
        assert asking.get_metadata_routing().score.requests == {
            "client_ids": True,
            "sample_weight": True,
        }
    for twin in (clone(scorer), pickle.loads(pickle.dumps(scorer))):
        assert twin is not scorer
        assert twin(est, data[1]) == value
    clients = np.zeros(len(data[1]))
    assert scorer(est, data[1], clients) == value
    weights = np.arange(len(data[1])) + 1.0
    weighted = evaluate(est, data[1], metrics="recall", k=5, sample_weight=weights)
    assert scorer(est, data[1], clients, sample_weight=weights) == weighted.overall["recall@5"]


def test_scorer_of_coverage(data):
    est = TableRecommender().fit(data[0])
    one_user = data[1][data[1][:, 0] == data[1][0, 0]]
    assert ranking_scorer("coverage", k=2)(est, one_user) == 2 / len(est.item_ids_)


def test_scorer_refuses_nonsense_at_once():
    with pytest.raises(ValueError, match="Unknown metric 'auc'"):
        ranking_scorer("auc")
    with pytest.raises(ValueError, match="k must be a positive integer"):
        ranking_scorer("ndcg", k=0)


@pytest.fixture
def rows():
    rows = np.unique(random_rows(np.random.default_rng(5), 90), axis=0)
    return rows, rows[:, 0] // 3


CV = KFold(3, shuffle=True, random_state=0)


def expected_scores(rows, metric, k, sign=1.0):
    est = TableRecommender(sign)
    return [
        evaluate(est.fit(rows[a]), rows[b], metrics=metric, k=k).overall[f"{metric}@{k}"]
        for a, b in CV.split(rows)
    ]


def test_cross_val_score(rows):
    X, clients = rows
    scorer = ranking_scorer("hit_rate", k=2)
    scores = cross_val_score(TableRecommender(), X, clients, scoring=scorer, cv=CV)
    np.testing.assert_array_equal(scores, expected_scores(X, "hit_rate", 2))
    without = cross_val_score(TableRecommender(), X, scoring=scorer, cv=CV)
    np.testing.assert_array_equal(without, scores)


def test_several_metrics_in_a_grid_search(rows):
    X, clients = rows
    scoring = {"r": ranking_scorer("recall", k=3), "n": ranking_scorer("ndcg", k=3)}
    grid = GridSearchCV(
        TableRecommender(), {"sign": [-1.0, 1.0]}, scoring=scoring, refit="n", cv=CV
    ).fit(X, clients)
    for position, sign in enumerate([-1.0, 1.0]):
        for key, metric in (("r", "recall"), ("n", "ndcg")):
            mean = grid.cv_results_[f"mean_test_{key}"][position]
            assert mean == pytest.approx(np.mean(expected_scores(X, metric, 3, sign)))
    assert grid.best_estimator_.n_client_ids_ == len(X)
    clone(grid)


def test_metadata_routing_by_name(rows):
    X, clients = rows
    scorer = ranking_scorer("recall", k=3)
    with config_context(enable_metadata_routing=True):
        for scoring in (scorer, {"recall": scorer}):
            grid = GridSearchCV(
                TableRecommender(), {"sign": [1.0]}, scoring=scoring, cv=CV,
                refit="recall" if isinstance(scoring, dict) else True,
            ).fit(X, client_ids=clients)  # fmt: skip
            assert grid.best_estimator_.n_client_ids_ == len(X)
            assert grid.best_score_ == pytest.approx(np.mean(expected_scores(X, "recall", 3)))
        positional = cross_val_score(TableRecommender(), X, clients, scoring=scorer, cv=CV)
        by_name = cross_val_score(
            TableRecommender(), X, scoring=scorer, cv=CV, params={"client_ids": clients}
        )
    np.testing.assert_array_equal(positional, by_name)


def test_sample_weight_is_routed_on_request(rows):
    X, _ = rows
    weights = np.random.default_rng(0).random(len(X))
    expected = [
        evaluate(
            TableRecommender().fit(X[a]), X[b], metrics="recall", k=3, sample_weight=weights[b]
        ).overall["recall@3"]
        for a, b in CV.split(X)
    ]
    with config_context(enable_metadata_routing=True):
        asking = ranking_scorer("recall", k=3).set_score_request(sample_weight=True)
        scores = cross_validate(
            TableRecommender(), X, scoring=asking, cv=CV, params={"sample_weight": weights}
        )["test_score"]
        np.testing.assert_allclose(scores, expected)
        with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
            cross_validate(
                TableRecommender(), X, scoring=ranking_scorer("recall", k=3), cv=CV,
                params={"sample_weight": weights},
            )  # fmt: skip
