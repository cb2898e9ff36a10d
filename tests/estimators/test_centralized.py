"""Training in one place, and LightGCN, which it shares with the federated estimators."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.base import clone

from fedrecsk import (
    CentralizedRecommender,
    FedAvgRecommender,
    FedFNNRecommender,
    PopularityRecommender,
    UnknownIdWarning,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.model_selection import PerUserHoldout
from fedrecsk.models.head import head_of
from fedrecsk.models.whole_data import default_l2, default_unobserved_weight
from tests.reference.ncf_reference import logit, propagated
from tests.reference.whole_data_reference import solve_user, strength

FAST = {"n_factors": 4, "n_rounds": 6, "random_state": 0, "device": "cpu"}
EVERY_PAIR = np.array(list(itertools.product(range(40), range(20))))


# ---------------------------------------------------------------- quality


@pytest.fixture(scope="module")
def tastes():
    """Rows to fit on and rows held out, of users with planted tastes."""
    X, _ = make_interactions(400, 200, 5, mean_interactions=20, return_X_y=True, random_state=0)
    train, test = next(PerUserHoldout(random_state=0).split(X))
    return X[train], X[test]


@pytest.fixture(scope="module")
def popularity(tastes):
    return PopularityRecommender().fit(tastes[0]).score(tastes[1])


@pytest.mark.parametrize(
    ("arguments", "gain"),
    [
        ({}, 1.5),
        ({"objective": "bce"}, 1.4),
        ({"model": "ncf"}, 1.2),
        ({"model": "lightgcn"}, 1.2),
    ],
    ids=str,
)
def test_it_beats_popularity_and_federated_averaging(arguments, gain, tastes, popularity):
    train, test = tastes
    central = CentralizedRecommender(**arguments, random_state=0, device="cpu").fit(train)
    assert central.score(test) > gain * popularity
    same = {**arguments, "objective": central._objective()}
    federated = FedAvgRecommender(**same, random_state=0, device="cpu").fit(train)
    assert central.score(test) > federated.score(test) - 0.01


# ---------------------------------------------------------------- what it does with data


@pytest.mark.parametrize("model", ["mf", "ncf", "lightgcn"])
def test_who_holds_the_data_makes_no_difference(model, obvious, assert_same_fit):
    one = CentralizedRecommender(model, **FAST).fit(obvious)
    other = CentralizedRecommender(model, **FAST).fit(obvious, obvious[:, 0] // 4)
    assert {record["clients"] for record in one.history_} == {40}
    assert {record["clients"] for record in other.history_} == {10}
    for name in ("user_factors_", "item_factors_", "item_bias_", "network_"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for record in other.history_:
        assert record["bytes_up"] == record["bytes_down"] == 0


def test_auto_is_whole_data_for_what_can_be_solved(obvious, assert_same_fit):
    auto = CentralizedRecommender(**FAST).fit(obvious)
    assert not auto.item_bias_.any()
    explicit = CentralizedRecommender(**FAST, objective="whole-data").fit(obvious)
    assert_same_fit(auto, explicit)
    np.testing.assert_array_equal(auto.predict(EVERY_PAIR), explicit.predict(EVERY_PAIR))
    for model in ("ncf", "lightgcn"):
        auto = CentralizedRecommender(model, **FAST).fit(obvious)
        explicit = CentralizedRecommender(model, **FAST, objective="bce").fit(obvious)
        assert auto.item_bias_.any()
        assert_same_fit(auto, explicit)
        np.testing.assert_array_equal(auto.predict(EVERY_PAIR), explicit.predict(EVERY_PAIR))
        with pytest.raises(ValueError, match=rf'model="{model}" needs objective="bce"'):
            CentralizedRecommender(model, **FAST, objective="whole-data").fit(obvious)


def test_fitted_users_are_solved_against_the_final_items(obvious):
    model = CentralizedRecommender(**FAST, l2_exponent=0.5).fit(obvious)
    sizes = len(obvious), 40, 20
    w0, l2 = default_unobserved_weight(*sizes), default_l2(*sizes)
    items = model.item_factors_.astype(float)
    for user in range(40):
        held = obvious[obvious[:, 0] == user, 1].tolist()
        expected = solve_user(held, items, w0, strength(len(held), 9.0, l2, 0.5))
        np.testing.assert_allclose(model.user_factors_[user], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["mf", "ncf", "lightgcn"])
def test_early_stopping_returns_the_best(model, tastes):
    X = tastes[0]
    arguments = {**FAST | {"n_rounds": 60}, "objective": "bce", "learning_rate": 0.05}
    arguments |= {"early_stopping": True, "n_iter_no_change": 4, "tol": 0.0}
    stopped = CentralizedRecommender(model, **arguments).fit(X)
    values = [record["validation_ndcg"] for record in stopped.history_]
    best = int(np.argmax(values)) + 1
    assert stopped.n_rounds_ == min(best + 4, 60)
    assert (stopped.times_sampled_ == best).all()
    exact = CentralizedRecommender(model, **arguments | {"n_rounds": best}).fit(X)
    np.testing.assert_array_equal(exact.user_factors_, stopped.user_factors_)


@pytest.mark.parametrize("model", ["mf", "ncf", "lightgcn"])
def test_divergence_names_round_and_parameter(model, obvious):
    wild = CentralizedRecommender(
        model, **FAST, objective="bce", optimizer="sgd", learning_rate=1e8
    )
    with pytest.raises(FloatingPointError, match=r"Training diverged.* round [1-6]\b.*Lower"):
        wild.fit(obvious)
    assert not hasattr(wild, "item_factors_")


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_each_optimizer_learns(optimizer, obvious):
    rate = {"sgd": 30.0, "momentum": 3.0, "adam": 0.1}[optimizer]
    model = CentralizedRecommender(
        **FAST | {"n_rounds": 20}, objective="bce", optimizer=optimizer, learning_rate=rate,
        batch_users=8,
    ).fit(obvious)  # fmt: skip
    assert model.score([[user, user % 20] for user in range(40)]) > 0.95


# ---------------------------------------------------------------- LightGCN


LIGHTGCN = {
    "centralized": CentralizedRecommender("lightgcn", **FAST),
    "fedavg": FedAvgRecommender("lightgcn", **FAST),
    "fedfnn": FedFNNRecommender(**FAST, model="lightgcn", objective="bce"),
    "fedfnn-predicting": FedFNNRecommender(
        **FAST, model="lightgcn", objective="bce", refit=False, gate=False, patience_on="ndcg"
    ),
}


@pytest.fixture(params=LIGHTGCN)
def lightgcn(request):
    return clone(LIGHTGCN[request.param])


@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("n_graph_layers", [1, 2])
def test_scores_are_those_of_the_graph_of_a_user_and_its_items(
    lightgcn, n_graph_layers, items, obvious
):
    lightgcn.set_params(n_graph_layers=n_graph_layers, item_propagation=items)
    model = lightgcn.fit(obvious)
    assert model.n_graph_layers_ == n_graph_layers
    assert model.item_propagation_ is items
    users = torch.from_numpy(model.user_factors_).double()
    table = torch.from_numpy(np.column_stack([model.item_factors_, model.item_bias_])).double()
    head = {n: v.double() for n, v in head_of(torch.from_numpy(model.network_), 4).items()}
    expected = np.empty((40, 20))
    for user in range(40):
        held = obvious[obvious[:, 0] == user, 1].tolist()
        vector, rows = propagated(users[user], table, held, n_graph_layers, items=items)
        expected[user] = [float(logit(vector, row, head, item_bias=True)) for row in rows]
    found = model.predict(EVERY_PAIR).reshape(40, 20)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-expected)), atol=1e-12)
    ids, scores = model.recommend(k=20, exclude_seen=False)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, ids, axis=1), atol=1e-5)


@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("n_graph_layers", [1, 2])
def test_the_crowd_is_the_mean_of_propagated_users(n_graph_layers, items, obvious):
    model = CentralizedRecommender(
        "lightgcn", **FAST, n_graph_layers=n_graph_layers, item_propagation=items
    ).fit(obvious)
    users = torch.from_numpy(model.user_factors_).double()
    table = torch.from_numpy(np.column_stack([model.item_factors_, model.item_bias_])).double()
    head = {n: v.double() for n, v in head_of(torch.from_numpy(model.network_), 4).items()}
    mean = torch.stack(
        [
            propagated(
                users[u], table, obvious[obvious[:, 0] == u, 1].tolist(), n_graph_layers
            )[0]
            for u in range(40)
        ]
    ).mean(0)  # fmt: skip
    _, rows = propagated(users[0], table, [], n_graph_layers)
    expected = [float(logit(mean, row, head, item_bias=True)) for row in rows]
    with pytest.warns(UnknownIdWarning):
        ids, scores = model.recommend([999], k=20)
    np.testing.assert_allclose(scores[0], np.array(expected)[ids[0]], atol=1e-5)


def test_lightgcn_takes_all_of_a_clients_examples_at_once(obvious):
    for cls in (FedAvgRecommender, FedFNNRecommender):
        arguments = {**FAST, "model": "lightgcn", "objective": "bce"}
        model = cls(**arguments).fit(obvious)
        explicit = cls(**arguments, batch_size=None).fit(obvious)
        np.testing.assert_array_equal(model.item_factors_, explicit.item_factors_)
        with pytest.raises(ValueError, match="n_graph_layers=1 needs batch_size=None, found 64"):
            cls(**arguments, batch_size=64).fit(obvious)
        with pytest.raises(ValueError, match='model="lightgcn" needs objective="bce"'):
            cls(**arguments | {"objective": "whole-data"}).fit(obvious)
    auto = FedAvgRecommender("ncf", **FAST).fit(obvious)
    explicit = FedAvgRecommender("ncf", **FAST, batch_size=64).fit(obvious)
    np.testing.assert_array_equal(auto.item_factors_, explicit.item_factors_)


def test_fedavg_is_fedfnn_without_its_ideas_on_graphs(obvious):
    shared = {**FAST, "model": "lightgcn", "objective": "bce", "n_graph_layers": 2}
    fedavg = FedAvgRecommender(**shared).fit(obvious)
    fedfnn = FedFNNRecommender(
        **shared,
        predictor=None,
        item_weighting="fedavg",
        sampling="uniform",
        server_optimizer="sgd",
    ).fit(obvious)
    for name in ("user_factors_", "item_factors_", "item_bias_", "network_"):
        np.testing.assert_array_equal(getattr(fedavg, name), getattr(fedfnn, name))
    plain = FedAvgRecommender(**shared | {"model": "ncf"}, batch_size=None).fit(obvious)
    assert plain.n_graph_layers_ == 0
    other = FedAvgRecommender("ncf", **FAST, batch_size=None, item_propagation=True).fit(obvious)
    assert other.item_propagation_ is False
    np.testing.assert_array_equal(other.item_factors_, plain.item_factors_)
    assert not np.allclose(plain.item_factors_, fedavg.item_factors_)


def test_going_on_with_other_layers_is_refused(lightgcn, obvious):
    lightgcn.fit(obvious)
    for other in ({"n_graph_layers": 3}, {"item_propagation": True}, {"model": "ncf"}):
        changed = copy.deepcopy(lightgcn).set_params(**other)
        with pytest.raises(ValueError, match="model, n_graph_layers or item_propagation changed"):
            changed.partial_fit(obvious)
