"""Federations at the edge: hardly any delegates, one giant client, drift, no variety at all."""

import numpy as np
import pytest
from sklearn.base import clone

from fedrecsk import FedAvgRecommender, FedFNNRecommender, PopularityRecommender
from fedrecsk.datasets import make_interactions

FAST = {"n_factors": 4, "n_rounds": 4, "random_state": 0, "device": "cpu"}
LITERAL = {
    "server_optimizer": "sgd",
    "sampling": "uniform",
    "gate": False,
    "anchor": False,
    "extra_inputs": False,
    "item_bias": False,
    "refit": False,
    "item_weighting": "magnitude",
}
OURS = {"refit": False}  # a refit would hide what predictions did
VARIANTS = {
    "fedfnn-whole-data": FedFNNRecommender(**FAST),
    "fedfnn-whole-data-predicted": FedFNNRecommender(**FAST, **OURS),
    "fedfnn-bce": FedFNNRecommender(**FAST, objective="bce"),
    "fedfnn-literal": FedFNNRecommender(**FAST, objective="bce", predictor="mlp", **LITERAL),
    "fedavg": FedAvgRecommender(**FAST),
}


@pytest.fixture(params=VARIANTS)
def model(request):
    """An unfitted estimator, one of several ways to learn."""
    return clone(VARIANTS[request.param])


def assert_sound(model, X):
    """Everything a caller can ask for is finite, and every record of the history, too."""
    for name in ("user_factors_", "item_factors_", "item_bias_"):
        assert np.isfinite(getattr(model, name)).all(), name
    assert all(np.isfinite(record["loss"]) for record in model.history_)
    probability = model.predict(X[:, :2])
    assert ((probability >= 0) & (probability <= 1)).all()
    ids, _ = model.recommend(k=3)
    assert ids.shape == (len(model.user_ids_), min(3, len(model.item_ids_)))


# ---------------------------------------------------------------- one or two delegates


@pytest.mark.parametrize("n_delegates", [1, 2])
@pytest.mark.parametrize("objective", ["whole-data", "bce"])
@pytest.mark.parametrize("variant", [OURS, LITERAL], ids=["ours", "literal"])
@pytest.mark.parametrize("predictor", ["linear", "mlp", "mean", "cluster"])
def test_too_few_delegates_predict_nothing(obvious, predictor, variant, objective, n_delegates):
    model = FedFNNRecommender(
        **FAST | variant,
        objective=objective,
        predictor=predictor,
        clients_per_round=n_delegates,
    ).fit(obvious)
    assert_sound(model, obvious)
    assert [record["clients"] for record in model.history_] == [n_delegates] * 4
    active = [record for record in model.history_ if record["prediction_active"]]
    assert active
    for record in active:
        assert record["predictor_candidate"] == f"none: {n_delegates} delegates"
        assert record["predicted_share"] == 0
    assert model.times_sampled_.sum() == 4 * n_delegates
    # Nobody was moved but the delegates.
    start = clone(model).set_params(n_rounds=1).fit(obvious)
    moved = (model.user_factors_ != start.user_factors_).any(axis=1)
    assert moved.sum() <= 4 * n_delegates


@pytest.mark.parametrize("n_delegates", [1, 2])
def test_a_delegate_at_a_time_learns_the_obvious_in_the_end(obvious, model, n_delegates):
    model.set_params(clients_per_round=n_delegates, n_rounds=240 // n_delegates).fit(obvious)
    withheld = np.array([[user, user % 20] for user in range(40)])
    popularity = PopularityRecommender().fit(obvious).score(withheld)
    assert model.score(withheld) > 1.5 * popularity


@pytest.mark.parametrize("n_delegates", [1, 2])
def test_going_on_with_hardly_any_delegates_keeps_what_was_learned(obvious, model, n_delegates):
    withheld = np.array([[user, user % 20] for user in range(40)])
    model.set_params(n_rounds=60, clients_per_round=0.5).fit(obvious)
    before = model.score(withheld)
    model.set_params(n_rounds=2, clients_per_round=n_delegates).partial_fit(obvious)
    assert model.score(withheld) > 0.9 * before


# ---------------------------------------------------------------- unequal clients


def test_one_user_with_half_of_all_rows(model):
    """The others get the lists that they would have got without it, or nearly."""
    X, _ = make_interactions(
        120, 600, 4, mean_interactions=10, random_state=0, return_X_y=True
    )  # fmt: skip
    held = np.random.default_rng(0).random(len(X)) < 0.2
    train, test = X[~held, :2], X[held, :2]
    test = test[np.isin(test[:, 0], train[:, 0]) & np.isin(test[:, 1], train[:, 1])]
    # As many rows as all others have together: every item, and some that only this user has.
    giant = np.column_stack([np.full(len(train), 999), np.arange(len(train))])
    model.set_params(n_factors=8, n_rounds=60, clients_per_round=0.2)
    without = clone(model).fit(train).score(test)
    model.fit(np.concatenate([train, giant]))
    assert_sound(model, train)
    assert np.diff(model.seen_indptr_)[-1] * 2 == model.seen_indptr_[-1]
    assert model.score(test) > 0.85 * without


def test_users_with_one_row(model):
    """Nothing tells which items go together."""
    rng = np.random.default_rng(0)
    items = rng.choice(12, 50, p=np.arange(12, 0, -1) / 78)
    X = np.column_stack([np.arange(50), items])
    assert_sound(model.fit(X), X)


@pytest.mark.parametrize("n_items", [1, 3])
def test_three_users_with_an_item_each(model, n_items):
    X = np.column_stack([np.arange(3), np.arange(3) % n_items])
    assert_sound(model.fit(X), X)
    assert model.item_ids_.tolist() == list(range(n_items))


def test_identical_users(model):
    """All have the same five items of ten; one lone user has the rest."""
    X = np.array([[user, item] for user in range(30) for item in range(5)])
    X = np.concatenate([X, [[30, item] for item in range(5, 10)]])
    model.set_params(n_rounds=30).fit(X)
    assert_sound(model, X)
    every = np.array([[user, item] for user in range(30) for item in range(10)])
    table = model.predict(every).reshape(30, 10)
    assert (table[:, :5].mean(axis=1) > table[:, 5:].mean(axis=1)).all()
    if model.refit and getattr(model, "objective", "") == "whole-data":
        np.testing.assert_allclose(table, np.broadcast_to(table[0], table.shape), atol=1e-5)


def test_users_who_have_every_item(model):
    """No unseen item is left to draw a negative from."""
    X = np.array([[user, item] for user in range(8) for item in range(6)])
    assert_sound(model.fit(X), X)
    assert (model.recommend(k=6)[1] == -np.inf).all()


# ---------------------------------------------------------------- drift


def drifting(seed):
    """Rows before a change of taste, and training and held-out rows after it.

    From then on every user likes what a user of another cluster liked.
    """
    made = make_interactions(150, 100, 3, mean_interactions=24, random_state=seed)
    X, clusters = made.data[:, :2], made.user_clusters
    rng = np.random.default_rng(seed)
    by_cluster = [rng.permutation(np.flatnonzero(clusters == c)) for c in range(3)]
    partner = np.empty(150, dtype=np.int64)
    for cluster, users in enumerate(by_cluster):
        partner[users] = by_cluster[(cluster + 1) % 3]
    part = rng.choice(3, len(X), p=[0.4, 0.4, 0.2])
    before, after, held_out = (X[part == place].copy() for place in range(3))
    for rows in (after, held_out):
        rows[:, 0] = partner[rows[:, 0]]
    known = np.isin(held_out[:, 0], before[:, 0]) & np.isin(held_out[:, 1], before[:, 1])
    return before, after, held_out[known]


def test_partial_fit_follows_a_drift_of_taste(model):
    stale, adapted = [], []
    for seed in range(2):
        before, after, held_out = drifting(seed)
        one = clone(model).set_params(
            n_factors=8, n_rounds=30, clients_per_round=0.2, random_state=seed
        )
        one.fit(before)
        stale.append(one.score(held_out))
        one.set_params(n_rounds=10).partial_fit(after)
        adapted.append(one.score(held_out))
    assert np.mean(adapted) > 1.3 * np.mean(stale)


# ---------------------------------------------------------------- degenerate settings


@pytest.mark.parametrize("predictor", ["linear", "mlp", "mean", "cluster"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("n_delegates", [5, 6, 7])
def test_more_folds_than_delegates(obvious, predictor, gate, n_delegates):
    model = FedFNNRecommender(
        **FAST | OURS | {"n_rounds": 2},
        objective="bce",
        predictor=predictor,
        gate=gate,
        cv=50,
        clients_per_round=n_delegates,
    ).fit(obvious)
    assert_sound(model, obvious)
    for record in model.history_:
        assert np.isfinite(record["predictor_r2"])
        if not gate:
            assert record["predicted_share"] > 0


@pytest.mark.parametrize("n_users", [3, 7])
@pytest.mark.parametrize("cls", [FedFNNRecommender, FedAvgRecommender])
def test_fewer_users_than_clusters(cls, n_users):
    X = np.array([[user, item] for user in range(n_users) for item in range(4) if user % 4 != item])
    model = cls(**FAST, sampling="stratified", clients_per_round=2)
    if cls is FedFNNRecommender:
        model.set_params(n_clusters=20, predictor="cluster")
    assert_sound(model.fit(X), X)
    assert model.times_sampled_.sum() == 8


def test_identical_vectors_have_one_cluster(obvious):
    """Every user alike: k-means finds fewer clusters than asked for, quietly."""
    X = np.array([[user, item] for user in range(12) for item in range(3)])
    X = np.concatenate([X, [[12, 3]]])
    model = FedFNNRecommender(
        **FAST, sampling="stratified", n_clusters=6, predictor="cluster", clients_per_round=6,
        refit=False,
    )  # fmt: skip
    assert_sound(model.fit(X), X)
