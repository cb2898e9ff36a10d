"""What every estimator owes its caller when it fits; the neighbours of this file do the rest."""

import dataclasses
import itertools
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
from sklearn.model_selection import GridSearchCV
from sklearn.utils._param_validation import InvalidParameterError

from fedrecsk import (
    CentralizedRecommender,
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
    NothingHeldOutError,
    NothingHeldOutWarning,
    PopularityRecommender,
    UnknownIdWarning,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.model_selection import PerUserHoldout

FAST = {"n_factors": 4, "n_rounds": 3, "random_state": 0, "device": "cpu"}


# ---------------------------------------------------------------- the obvious answer


def test_the_withheld_item_comes_first(trainable, obvious):
    ids, _ = trainable.fit(obvious).recommend(k=1)
    assert ids[:, 0].tolist() == [user % 20 for user in range(40)]


def test_the_own_parity_is_likelier_than_the_other(trainable, obvious):
    every_pair = np.array(list(itertools.product(range(40), range(20))))
    table = trainable.fit(obvious).predict(every_pair).reshape(40, 20)
    own = np.equal.outer(np.arange(40) % 2, np.arange(20) % 2)
    assert (np.where(own, table, 1).min(axis=1) > np.where(own, 0, table).max(axis=1)).all()


def test_popularity_counts_users():
    X = [[1, "a"], [1, "b"], [1, "b"], [2, "b"], [2, "c"], [3, "b"], [3, "c"], [4, "d"]]
    model = PopularityRecommender().fit(X)
    assert model.item_ids_.tolist() == ["a", "b", "c", "d"]
    assert model.item_counts_.tolist() == [1, 3, 2, 1]
    ids, scores = model.recommend([1, 4], k=2)
    assert ids.tolist() == [["c", "d"], ["b", "c"]]
    assert scores.tolist() == [[0.5, 0.25], [0.75, 0.5]]
    ids, _ = model.recommend([4], k=4, exclude_seen=False)
    assert ids.tolist() == [["b", "c", "a", "d"]]  # equal counts: the smaller id first


def test_predictors_are_at_work(trainable, obvious):
    if getattr(trainable, "predictor", None) is None:
        return
    history = trainable.fit(obvious).history_
    if trainable.refit and (trainable.objective == "whole-data" or trainable.anchor):
        # Every vector is fitted anew at the end: nobody would read a prediction.
        assert "predicted_share" not in history[0]
    else:
        assert max(record.get("predicted_share", 0) for record in history) > 0


# ---------------------------------------------------------------- randomness


def test_same_seed_same_arrays(estimator, obvious, assert_same_fit):
    assert_same_fit(clone(estimator).fit(obvious), clone(estimator).fit(obvious))


def test_random_state_instance_works_like_a_seed(trainable, obvious, assert_same_fit):
    one, other, third = (
        clone(trainable).set_params(n_rounds=2, random_state=np.random.RandomState(seed))
        for seed in (7, 7, 8)
    )
    assert_same_fit(one.fit(obvious), other.fit(obvious))
    assert not np.array_equal(one.item_factors_, third.fit(obvious).item_factors_)


def test_other_seed_other_arrays(trainable, obvious):
    one = clone(trainable).set_params(n_rounds=2).fit(obvious)
    other = clone(trainable).set_params(n_rounds=2, random_state=1).fit(obvious)
    names = ["user_factors_", "item_factors_", "times_sampled_"]
    if isinstance(trainable, CentralizedRecommender):  # which samples nobody
        names.remove("times_sampled_")
    for name in names:
        if hasattr(one, name):
            assert not np.array_equal(getattr(one, name), getattr(other, name)), name


def test_global_generators_and_threads_are_left_alone(estimator, obvious):
    if not isinstance(estimator, PopularityRecommender):
        estimator.set_params(n_rounds=2)
    numpy_before, python_before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    torch_before, threads_before = torch.get_rng_state(), torch.get_num_threads()
    estimator.fit(obvious)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert random.getstate() == python_before
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert torch.get_num_threads() == threads_before


# ---------------------------------------------------------------- purity


def test_refit_forgets(estimator, obvious, assert_same_fit):
    other_data = np.column_stack([obvious[:120, 0] + 100, 50 - obvious[:120, 1]])
    refitted = clone(estimator).fit(obvious).fit(other_data)
    assert_same_fit(refitted, clone(estimator).fit(other_data))


def test_fit_changes_neither_inputs_nor_parameters(estimator, obvious):
    X, client_ids = obvious.copy(), obvious[:, 0] // 2
    before = estimator.get_params()
    assert estimator.fit(X, client_ids) is estimator
    np.testing.assert_array_equal(X, obvious)
    np.testing.assert_array_equal(client_ids, obvious[:, 0] // 2)
    assert estimator.get_params() == before


def test_predicting_changes_nothing(estimator, obvious, assert_same_fit):
    untouched = clone(estimator).fit(obvious)
    used = clone(estimator).fit(obvious)
    used.predict(obvious)
    used.recommend(k=30)
    used.similar_items([3, 4])
    used.score([[0, 0], [1, 1]])
    assert_same_fit(used, untouched)


def test_row_order_does_not_matter(estimator, obvious, assert_same_fit):
    order = np.random.default_rng(0).permutation(len(obvious))
    client_ids = obvious[:, 0] // 3
    one = clone(estimator).fit(obvious, client_ids)
    other = clone(estimator).fit(obvious[order], client_ids[order])
    assert_same_fit(one, other)


def test_clients_by_place_or_by_name(estimator, obvious, assert_same_fit):
    clients = obvious[:, 0] // 4
    expected = clone(estimator).fit(obvious, clients)
    assert_same_fit(clone(estimator).fit(obvious, client_ids=clients), expected)
    assert_same_fit(clone(estimator).fit(interactions=obvious, client_ids=clients), expected)
    # As a pipeline calls it when metadata are routed: None takes the place of y.
    assert_same_fit(clone(estimator).fit(obvious, None, client_ids=clients), expected)
    assert_same_fit(clone(estimator).partial_fit(obvious, None, client_ids=clients), expected)
    assert expected.score([[0, 0]], None, [2.0], client_ids=[0]) == expected.score([[0, 0]])
    with pytest.raises(TypeError, match="multiple values for argument 'client_ids'"):
        estimator.fit(obvious, clients, client_ids=clients)


# ---------------------------------------------------------------- what fit leaves


def plain(value):
    """Say whether a value is NumPy or plain Python all the way down."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    if dataclasses.is_dataclass(value):
        return all(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    if type(value) is np.ndarray:
        return value.dtype.kind in "biufU" or all(type(each) is str for each in value)
    return value is None or type(value) in (bool, int, float, str)


def test_fitted_attributes_are_numpy_or_plain_python(estimator, obvious):
    X = pd.DataFrame(obvious, columns=["user_id", "item_id"])
    estimator.fit(X)
    left = {name: value for name, value in vars(estimator).items() if name.endswith("_")}
    left["_interactions"] = estimator._interactions
    assert set(vars(estimator)) == set(left) | set(estimator.get_params())
    for name, value in left.items():
        assert plain(value), f"{name} is a {type(value)}"


def test_shapes_of_fitted_attributes(estimator, obvious, n_columns):
    estimator.fit(obvious, [f"client {user // 4}" for user in obvious[:, 0]])
    assert estimator.user_ids_.tolist() == list(range(40))
    assert estimator.item_ids_.tolist() == list(range(20))
    assert estimator.client_ids_.tolist() == sorted(f"client {c}" for c in range(10))
    assert estimator.n_features_in_ == 2
    assert not hasattr(estimator, "feature_names_in_")
    for user in range(40):
        start, stop = estimator.seen_indptr_[user : user + 2]
        assert estimator.seen_indices_[start:stop].tolist() == [
            item for item in range(20) if item % 2 == user % 2 and item != user % 20
        ]
    if isinstance(estimator, PopularityRecommender):
        return
    assert estimator.user_factors_.shape == (40, n_columns(estimator))
    assert estimator.item_factors_.shape == (20, n_columns(estimator))
    if isinstance(estimator, FELLRecRecommender):
        n_platforms = len(estimator.platform_ids_)
        assert n_platforms == 10  # few enough to stay as they are
        assert all(len(each) == n_platforms for each in estimator.adapters_.values())
        assert estimator.item_vectors_.shape == (n_platforms + 1, 20, n_columns(estimator))
        assert estimator.item_counts_.shape == (n_platforms + 1, 20)
        assert estimator.user_platforms_.tolist() == [user // 4 for user in range(40)]
        return
    assert estimator.item_bias_.shape == (20,)
    if not hasattr(estimator, "times_sampled_"):
        return
    assert estimator.times_sampled_.shape == (40,)
    # All users of a client take part together.
    of_client = estimator.times_sampled_.reshape(10, 4)
    assert (of_client == of_client[:, :1]).all()
    share = getattr(estimator, "clients_per_round", 1.0)
    assert of_client[:, 0].sum() == 10 * share * estimator.n_rounds


def test_history_is_a_table(estimator, obvious):
    estimator.fit(obvious)
    n_rounds = getattr(estimator, "n_rounds", 1)
    table = pd.DataFrame(estimator.history_)
    assert len(table) == estimator.n_rounds_ == n_rounds
    assert {"round", "loss", "seconds", "clients", "bytes_up", "bytes_down"} <= set(table)
    assert table["round"].tolist() == list(range(1, n_rounds + 1))
    assert np.isfinite(table["loss"]).all()
    assert (table["seconds"] >= 0).all()
    central = isinstance(estimator, CentralizedRecommender)
    # All data lie there from the start.
    assert ((table["bytes_up"] == 0) if central else (table["bytes_up"] > 0)).all()
    assert "validation_ndcg" not in table
    if isinstance(estimator, PopularityRecommender):
        assert table["clients"].tolist() == [40]
    elif isinstance(estimator, FELLRecRecommender):
        # Users were grouped, and every platform sends its adapter in single floats.
        assert (table["clients"] == 5).all()
        assert (table["bytes_down"] == sum(a.nbytes for a in estimator.adapters_.values())).all()
        assert table["loss"].iloc[-1] < table["loss"].iloc[0]
    else:
        assert (table["clients"] == 40 * getattr(estimator, "clients_per_round", 1.0)).all()
        # 20 vectors of single floats, and of two columns at least.
        narrowest = min(getattr(estimator, "sizes", None) or (estimator.n_factors,))
        item_table = 0 if central else 20 * narrowest * 4
        assert (table["bytes_down"] >= table["clients"] * item_table).all()
        assert table["loss"].iloc[-1] < table["loss"].iloc[0]


def test_min_rating_drops_weaker_rows_first(estimator, obvious, assert_same_fit):
    ratings = np.random.default_rng(0).integers(1, 6, len(obvious))
    X = np.column_stack([obvious, ratings])
    one = clone(estimator).set_params(min_rating=3).fit(X)
    other = clone(estimator).fit(X[ratings >= 3])
    assert_same_fit(one, other)
    with pytest.raises(ValueError, match=r"min_rating=3 needs ratings, but X has none"):
        one.fit(obvious)
    with pytest.raises(ValueError, match=r"min_rating=9 leaves none of the 360 interactions"):
        one.set_params(min_rating=9).fit(X)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("objective", ["whole-data", "bce"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("server_optimizer", ["sgd", "momentum", "adam"])
def test_clients_of_several_users(objective, optimizer, server_optimizer, obvious):
    adam = {"learning_rate": 0.01} if optimizer == "adam" else {}
    clients = obvious[:, 0] // 4
    for estimator in (
        FedFNNRecommender(predictor="mean", objective=objective, clients_per_round=5),
        FedAvgRecommender(objective=objective, clients_per_round=1.0),
    ):
        estimator.set_params(
            **FAST | adam | {"n_rounds": 12},
            optimizer=optimizer,
            server_optimizer=server_optimizer,
        ).fit(obvious, clients)
        ids, _ = estimator.recommend(k=1)
        assert ids[:, 0].tolist() == [user % 20 for user in range(40)]


@pytest.mark.parametrize("item_weighting", ["count", "magnitude", "interactions", "fedavg"])
@pytest.mark.parametrize("item_bias", [True, False])
@pytest.mark.parametrize("batch_size", [1, 16, None])
def test_weightings_biases_and_batches(item_weighting, item_bias, batch_size, obvious):
    estimator = FedFNNRecommender(
        **FAST | {"n_rounds": 12},
        objective="bce",
        predictor=None,
        item_weighting=item_weighting,
        item_bias=item_bias,
        batch_size=batch_size,
    ).fit(obvious)
    ids, _ = estimator.recommend(k=1)
    assert (ids[:, 0] == np.arange(40) % 20).mean() > 0.9
    assert item_bias == estimator.item_bias_.any()


FITTED = ("user_factors_", "item_factors_", "item_bias_", "times_sampled_", "network_")


@pytest.mark.parametrize(
    "shared", [{"objective": "whole-data"}, {"objective": "bce"}, {"model": "ncf"}], ids=str
)
def test_fedavg_is_fedfnn_without_its_ideas(obvious, shared):
    shared = {**FAST, "objective": "bce", "refit": False, **shared}
    fedavg = FedAvgRecommender(**shared).fit(obvious)
    fedfnn = FedFNNRecommender(
        **shared,
        predictor=None,
        item_weighting="fedavg",
        sampling="uniform",
        server_optimizer="sgd",
    ).fit(obvious)
    for name in FITTED:
        np.testing.assert_array_equal(getattr(fedavg, name), getattr(fedfnn, name))
    assert [record["bytes_up"] for record in fedavg.history_] == [
        record["bytes_up"] for record in fedfnn.history_
    ]


def test_fedfast_is_fedfnn_with_other_arguments(obvious):
    shared = {**FAST, "item_weighting": "magnitude", "item_bias": False, "n_clusters": 3}
    fedfast = FedFastRecommender(**shared).fit(obvious)
    arguments = {
        "objective": "bce",
        "sampling": "stratified",
        "predictor": "cluster",
        "gate": False,
        "anchor": False,
        "extra_inputs": False,
        "patience": 1000,
        "discount_decay": 0.95,
    }
    fedfnn = FedFNNRecommender(**shared, **arguments).fit(obvious)
    for name in FITTED:
        np.testing.assert_array_equal(getattr(fedfast, name), getattr(fedfnn, name))
    assert max(record["predicted_share"] for record in fedfast.history_) == 0.8
    one = FedFNNRecommender(**shared | {"n_clusters": 1}, **arguments).fit(obvious)
    mean = FedFNNRecommender(**shared | {"n_clusters": 1}, **arguments | {"predictor": "mean"})
    for name in FITTED:
        np.testing.assert_array_equal(getattr(one, name), getattr(mean.fit(obvious), name))


@pytest.mark.parametrize("predictor", ["mlp", "linear", "mean", "cluster"])
def test_clients_send_their_vectors_to_be_predicted_from_and_nothing_else(obvious, predictor):
    arguments = {**FAST, "objective": "bce", "refit": False, "server_optimizer": "sgd"}
    arguments |= {"sampling": "uniform", "anchor": False, "gate": False}
    predicting = FedFNNRecommender(**arguments, predictor=predictor).fit(obvious)
    fedavg = FedAvgRecommender(**FAST, refit=False).fit(obvious)
    for name in ("bytes_down", "clients"):
        assert [r[name] for r in predicting.history_] == [r[name] for r in fedavg.history_]
    for record, plain in zip(predicting.history_, fedavg.history_, strict=True):
        vectors = 4 * record["clients"] * predicting.n_factors * record["prediction_active"]
        assert record["bytes_up"] == plain["bytes_up"] + vectors


@pytest.mark.parametrize("sampling", ["epoch", "uniform", "stratified"])
def test_epochs_visit_everybody_once(obvious, sampling):
    arguments = {**FAST | {"n_rounds": 4}, "clients_per_round": 10}
    model = FedFNNRecommender(**arguments, sampling=sampling).fit(obvious)
    assert model.times_sampled_.sum() == 40
    assert (model.times_sampled_ == 1).all() == (sampling == "epoch")


def test_newton_says_what_it_needs(obvious):
    platforms = obvious[:, 0] // 2
    newton = FedFNNRecommender(**FAST, objective="bce", server_optimizer="newton")
    newton.fit(obvious)
    for changes in ({"optimizer": "adam"}, {"item_weighting": "magnitude"}, {"model": "ncf"}):
        with pytest.raises(ValueError, match="one user per client"):
            clone(newton).set_params(**changes).fit(obvious)
    with pytest.raises(ValueError, match="one user per client"):
        clone(newton).fit(obvious, platforms)
    # "auto" takes what fits.
    clone(newton).set_params(server_optimizer="auto").fit(obvious, platforms)


def test_prediction_works_on_the_vectors_of_a_network(obvious):
    arguments = {**FAST, "model": "ncf", "objective": "bce", "refit": False, "gate": False}
    model = FedFNNRecommender(**arguments, discount=0.5).fit(obvious)
    assert model.history_[0]["predicted_share"] == 0.8
    without = FedFNNRecommender(**arguments, discount=0.0).fit(obvious)
    # Kept apart: what training makes is the same, what users are served with is not.
    np.testing.assert_array_equal(model.item_factors_, without.item_factors_)
    np.testing.assert_array_equal(model.network_, without.network_)
    assert not np.array_equal(model.user_factors_, without.user_factors_)


def test_ncf_cannot_be_solved_for(obvious):
    with pytest.raises(ValueError, match='needs objective="bce"'):
        FedFNNRecommender(**FAST, model="ncf").fit(obvious)


def test_patience_on_a_ranking_metric_holds_rows_out(obvious):
    arguments = {**FAST | {"n_rounds": 30}, "objective": "bce", "refit": False, "gate": False}
    model = FedFNNRecommender(**arguments, patience_on="ndcg", patience=2).fit(obvious)
    active = [record["prediction_active"] for record in model.history_]
    assert active == sorted(active, reverse=True)  # once ended, ended for good
    assert active[0]
    assert not active[-1]
    assert "validation_ndcg" not in model.history_[0]


def test_clients_per_round_is_a_number_or_a_share(obvious):
    for given, drawn in ((1, 1), (1.0, 40), (0.25, 10), (39, 39), (1000, 40), (1e-9, 1)):
        estimator = FedAvgRecommender(**FAST, clients_per_round=given).fit(obvious)
        assert {record["clients"] for record in estimator.history_} == {drawn}


def test_verbose_prints_lines(estimator, obvious, capsys):
    estimator.fit(obvious)
    assert capsys.readouterr().out == ""
    n_rounds = getattr(estimator, "n_rounds", 1)
    for verbose in (1, 2):
        estimator.set_params(verbose=verbose).fit(obvious)
        lines = capsys.readouterr().out.splitlines()
        if n_rounds <= 10 or verbose == 2:
            assert len(lines) == n_rounds
        else:
            assert 6 <= len(lines) <= 12
        name = type(estimator).__name__
        for line in lines:
            assert re.match(rf"\[{name}\] round \d+/{n_rounds}  loss \d+\.\d+  \d+ clients  ", line)
        assert f"round {n_rounds}/{n_rounds}" in lines[-1]


SHARED_BAD = {
    "n_factors": 0,
    "n_rounds": 0.5,
    "clients_per_round": 1.5,
    "availability": 0.0,
    "dropout_rate": 1.0,
    "client_seconds": -1,
    "deadline": 0.0,
    "over_selection": -0.1,
    "local_epochs": 0,
    "learning_rate": 0,
    "batch_size": 0,
    "n_negatives": 0,
    "l2": -1,
    "l2_exponent": 1.5,
    "unobserved_weight": 0,
    "init_scale": "big",
    "optimizer": "rmsprop",
    "objective": "hinge",
    "item_bias": "yes",
    "n_graph_layers": 0,
    "item_propagation": "yes",
    "item_curvature": "yes",
    "server_optimizer": None,
    "server_learning_rate": -0.1,
    "refit": "no",
    "min_rating": "3",
    "early_stopping": "yes",
    "validation_fraction": 1.0,
    "n_iter_no_change": 0,
    "tol": -1e-9,
    "warm_start": "no",
    "checkpoint": 3,
    "checkpoint_every": 0,
    "device": None,
    "random_state": "seed",
    "verbose": -1,
}
UPLINK_BAD = {
    "defence": "mean",
    "assumed_malicious": 0.5,
    "clip_quantile": 0,
    "malicious_fraction": 1.0,
    "attack": "shout",
    "attack_strength": 0,
    "check_uploads": "sometimes",
    "compression": "zip",
    "compression_level": 0,
    "error_feedback": "yes",
    "secure_aggregation": "perhaps",
    "secure_bits": 33,
}
PRIVACY_BAD = {
    "privacy": "total",
    "noise_multiplier": -1.0,
    "clip_norm": 0.0,
    "target_epsilon": 0.0,
    "delta": 1.0,
    "accountant": "moments",
}
BAD = {
    FedFNNRecommender: SHARED_BAD
    | UPLINK_BAD
    | PRIVACY_BAD
    | {
        "item_weighting": "sum",
        "predictor": "forest",
        "discount": 1.5,
        "discount_decay": -0.5,
        "n_clusters": 0,
        "cv": 1,
        "patience": 0,
        "patience_on": "recall",
        "gate": "yes",
        "anchor": 2,
        "extra_inputs": "no",
        "model": "svd",
        "sampling": "all",
    },
    FedFastRecommender: {
        name: value
        for name, value in (SHARED_BAD | UPLINK_BAD).items()
        if name
        not in {
            "objective",
            "l2_exponent",
            "unobserved_weight",
            "item_curvature",
            "n_graph_layers",
            "item_propagation",
            "check_uploads",
            "secure_aggregation",
            "secure_bits",
        }
    }
    | {
        "item_weighting": "sum",
        "discount": 1.5,
        "discount_decay": -0.5,
        "n_clusters": 0,
        "patience": 0,
    },
    CentralizedRecommender: {
        name: value
        for name, value in SHARED_BAD.items()
        if name
        not in {
            "clients_per_round",
            "availability",
            "dropout_rate",
            "client_seconds",
            "deadline",
            "over_selection",
            "local_epochs",
            "batch_size",
            "item_curvature",
            "server_optimizer",
            "server_learning_rate",
            "refit",
        }
    }
    | {"model": "svd", "batch_users": 0},
    FedAvgRecommender: SHARED_BAD | UPLINK_BAD | PRIVACY_BAD | {"model": "svd", "sampling": "all"},
    HeteFedRecRecommender: {
        name: value
        for name, value in (SHARED_BAD | UPLINK_BAD).items()
        if name not in {"n_factors", "objective"}
    }
    | {
        "base_model": "svd",
        "sizes": "small",
        "group_ratio": 5,
        "client_sizes": 8,
        "dual_task": "yes",
        "alpha": -0.1,
        "distill_fraction": 1.5,
        "distill_every": 0,
        "distill_steps": 0,
        "distill_learning_rate": 0,
        "aggregation": "mean",
        "denominator": "rows",
        "client_weights": "equal",
        "contributors": "small",
        "sampling": "stratified",
        "report_every": 0,
    },
    FELLRecRecommender: {
        name: value
        for name, value in SHARED_BAD.items()
        if name
        in {
            "n_rounds",
            "availability",
            "dropout_rate",
            "local_epochs",
            "learning_rate",
            "batch_size",
            "min_rating",
            "early_stopping",
            "validation_fraction",
            "n_iter_no_change",
            "tol",
            "warm_start",
            "checkpoint",
            "checkpoint_every",
            "device",
            "random_state",
            "verbose",
        }
    }
    | {
        "backbone": 3,
        "backend": "decoder",
        "n_platforms": 0,
        "inference": "sample",
        "pooling": "max",
        "lora_rank": 0,
        "lora_alpha": 0,
        "lora_dropout": 1.0,
        "target_modules": 3,
        "aggregation": "mean",
        "client_weights": "equal",
        "proximal": -1,
        "similarity_on": "losses",
        "use_similarity": "yes",
        "similarity_power": -1,
        "objective": "both",
        "use_heating": "yes",
        "alpha": 0,
        "beta": 0,
        "heating_temperature": 0,
        "heating_exponent": "t",
        "client_periods": 3,
        "staleness_exponent": -1,
        "client_layers": -1,
        "max_risk": 0,
        "max_history": 0,
        "max_item_tokens": 0,
        "max_tokens": 0,
        "examples_per_user": 0,
        "learning_rate_schedule": "cosine",
        "weight_decay": -1,
        "gradient_accumulation": 0,
        "negatives": "hard",
        "n_negatives": -1,
        "prompt_loss": "yes",
        "temperature": 0,
        "popularity_counts": "none",
        "popularity_weight": -1,
        "num_beams": 0,
        "dtype": "int8",
        "quantization": "2bit",
    },
    PopularityRecommender: {"min_rating": "3", "verbose": -1},
}
# Read with everything else that the caller says about items, and refused there.
READ_AS_DATA = {"target_item", "item_text"}


@pytest.mark.parametrize("cls", BAD)
def test_bad_parameters_are_refused(cls, obvious):
    parameters = cls().get_params().keys() - READ_AS_DATA
    assert BAD[cls].keys() == parameters, "one bad value for every parameter"
    for name, value in BAD[cls].items():
        for method in ("fit", "partial_fit"):
            pattern = rf"The '{name}' parameter of {cls.__name__} must be"
            with pytest.raises(InvalidParameterError, match=pattern):
                getattr(cls(**{name: value}), method)(obvious)


def test_a_device_that_is_not_there_is_named(obvious):
    with pytest.raises(ValueError, match=r"device='abacus' cannot be used on this machine"):
        FedAvgRecommender(**FAST | {"device": "abacus"}).fit(obvious)


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("n_rounds", [1, 8])
@pytest.mark.parametrize(
    "wild",
    [
        {"objective": "bce", "learning_rate": 1e4, "refit": False},
        {"objective": "bce", "learning_rate": 1e4},
        {"objective": "bce", "learning_rate": 1e4, "early_stopping": True},
        {"objective": "whole-data", "server_learning_rate": 1e30},
        {"objective": "whole-data", "init_scale": 1e30},
    ],
    ids=repr,
)
def test_divergence_names_round_and_parameter(wild, n_rounds, obvious):
    for cls in (FedFNNRecommender, FedAvgRecommender):
        estimator = cls(**FAST | {"n_rounds": n_rounds} | wild)
        message = r"Training diverged.* round [1-8]\b.*Lower learning_rate"
        with pytest.raises(FloatingPointError, match=message):
            estimator.fit(obvious)
        assert not hasattr(estimator, "item_factors_")


def test_divergence_is_nan_in_a_search():
    X, client_ids = make_interactions(30, 20, 2, mean_interactions=8, return_X_y=True,
                                      random_state=0)  # fmt: skip
    search = GridSearchCV(
        FedFNNRecommender(**FAST, objective="bce", predictor=None),
        {"learning_rate": [0.1, 1e4]},
        cv=PerUserHoldout(random_state=0),
        error_score=np.nan,
    )
    with (
        pytest.warns(FitFailedWarning, match=r"(?s)1 fits failed.*Training diverged"),
        # The search adds a warning of its own about the nan that it found.
        pytest.warns(UserWarning, match="One or more of the test scores are non-finite"),
    ):
        search.fit(X, client_ids)
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] > 0
    assert np.isnan(scores[1])
    assert search.best_params_ == {"learning_rate": 0.1}


def test_warnings_and_errors_are_of_kinds_that_callers_know():
    assert issubclass(UnknownIdWarning, UserWarning)
    assert issubclass(NothingHeldOutWarning, UserWarning)
    assert issubclass(NothingHeldOutError, ValueError)
