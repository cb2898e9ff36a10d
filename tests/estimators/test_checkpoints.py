"""Fits that are interrupted go on from their checkpoint to the same result, to the last bit."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

import fedrecsk
from fedrecsk import (
    CentralizedRecommender,
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
)
from fedrecsk.model_selection import PerUserHoldout

N_ROUNDS = 5


def away_at_first(number, client_ids):
    """Nobody is there in the first round, and a half in each of the others."""
    return np.full(len(client_ids), 0.5 * (number > 1))


FAST = {"n_factors": 4, "n_rounds": N_ROUNDS, "random_state": 0, "device": "cpu"}
SIZES = {"sizes": (2, 4), "group_ratio": (1, 1), **FAST}
SIZES.pop("n_factors")
STOPPING = {"early_stopping": True, "n_iter_no_change": 2, "tol": 0.0}
FEDFNN = FedFNNRecommender(**FAST)
NCF_SIZES = HeteFedRecRecommender(
    "ncf", **SIZES, local_epochs=1, clients_per_round=0.5, distill_fraction=0.5, distill_every=1
)
VARIANTS = {
    "fedfnn-whole-data": FEDFNN,
    "fedfnn-whole-data-stopping": clone(FEDFNN).set_params(**STOPPING),
    # Prediction ends in the third round: what was served by then stays, apart from the vectors
    # that users trained.
    "fedfnn-patience": clone(FEDFNN).set_params(
        refit=False, gate=False, patience_on="ndcg", patience=1, sampling="uniform",
        clients_per_round=0.15, random_state=1,
    ),
    "fedfnn-bce-newton": clone(FEDFNN).set_params(objective="bce"),
    "fedfnn-bce-mlp": clone(FEDFNN).set_params(
        objective="bce", predictor="mlp", cv=2, gate=False, anchor=False, discount_decay=0.5,
        **STOPPING,
    ),
    "fedavg-bce": FedAvgRecommender(**FAST, server_optimizer="momentum"),
    "fedavg-ncf": FedAvgRecommender("ncf", **FAST, server_optimizer="adam", local_epochs=1),
    "fedavg-lightgcn": FedAvgRecommender("lightgcn", **FAST, local_epochs=1),
    "fedavg-top-k": FedAvgRecommender(
        **FAST, compression="top-k", compression_level=0.3, sampling="epoch", clients_per_round=0.6
    ),
    "fedavg-ncf-quantised": FedAvgRecommender(
        "ncf", **FAST, local_epochs=1, compression="quantised", clients_per_round=0.6
    ),
    "fedfnn-secure": clone(FEDFNN).set_params(secure_aggregation=True),
    "fedfast": FedFastRecommender(**FAST, n_clusters=2, server_optimizer="adam"),
    "fedfnn-faults": clone(FEDFNN).set_params(
        dropout_rate=0.3, over_selection=0.3, client_seconds=0.1, deadline=1.0
    ),
    "fedavg-faults": FedAvgRecommender(
        **FAST, availability=away_at_first, sampling="epoch", **STOPPING
    ),
    "centralized-whole-data": CentralizedRecommender(**FAST),
    "centralized-bce": CentralizedRecommender(**FAST, objective="bce", **STOPPING),
    "centralized-ncf": CentralizedRecommender("ncf", **FAST, optimizer="momentum"),
    "hetefedrec-mf": HeteFedRecRecommender(**SIZES, **STOPPING),
    "hetefedrec-clustered": HeteFedRecRecommender(**SIZES, aggregation="clustered"),
    "hetefedrec-faults": clone(NCF_SIZES).set_params(
        availability=away_at_first, dropout_rate=0.3, distill_every="epoch"
    ),
    "hetefedrec-distilled": NCF_SIZES,
    "hetefedrec-distilled-stopping": clone(NCF_SIZES).set_params(**STOPPING),
}  # fmt: skip
ALONE = clone(NCF_SIZES).set_params(aggregation="standalone")


def interrupted_after(estimator, n_rounds, folder, X, interrupt, client_ids=None):
    """Leave a checkpoint in a folder, of a fit that ends in an error after some rounds."""
    estimator = clone(estimator).set_params(checkpoint=folder)
    with pytest.raises(KeyboardInterrupt):
        estimator.set_callbacks(interrupt(n_rounds)).fit(X, client_ids)
    assert not hasattr(estimator, "item_factors_")


def assert_goes_on(estimator, folder, X, interrupt, assert_same_fit, client_ids=None):
    """Interrupt a fit, go on, and ask once more when nothing is left to do."""
    whole = clone(estimator).fit(X, client_ids)
    assert whole.n_rounds_ > 2
    interrupted_after(estimator, 2, folder, X, interrupt, client_ids)
    for n_left in (whole.n_rounds_ - 2, 0):
        callback = interrupt()
        again = clone(estimator).set_params(checkpoint=folder).set_callbacks(callback)
        assert_same_fit(again.fit(X, client_ids), whole)
        assert len(callback.seen) == n_left


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_fit_goes_on_to_the_same_result(
    variant, tmp_path, obvious, interrupt, assert_same_fit
):
    assert_goes_on(VARIANTS[variant], tmp_path, obvious, interrupt, assert_same_fit)


def test_prediction_ends_after_the_interruption(obvious):
    history = clone(VARIANTS["fedfnn-patience"]).fit(obvious).history_
    assert [record["prediction_active"] for record in history] == [True] * 2 + [False] * 3


FELLREC = {
    "plain": {},
    "stopping": {"early_stopping": True, "n_iter_no_change": 3},
    "ditto": {"aggregation": "ditto", "proximal": 0.1},
    "slow clients": {"client_periods": [1, 2, 3], "learning_rate": 0.1},
    "faults": {"availability": away_at_first, "dropout_rate": 0.1, "learning_rate": 0.1},
}


@pytest.fixture
def fellrec(tiny_backbones):
    """Give a function that makes a fast language model."""

    def make(**changes):
        settings = {
            "item_text": {item: str(item) for item in range(20)},
            "n_rounds": N_ROUNDS,
            "local_epochs": 1,
            "target_modules": "all-linear",
            "popularity_weight": 0.0,
            "early_stopping": False,
            "random_state": 0,
            "device": "cpu",
        }
        return FELLRecRecommender(tiny_backbones["tiny_encoder"], **settings | changes)

    return make


@pytest.mark.parametrize("variant", FELLREC)
def test_an_interrupted_language_model_goes_on_to_the_same_result(
    fellrec, variant, tmp_path, obvious, interrupt, assert_same_fit
):
    model, clients = fellrec(**FELLREC[variant]), obvious[:, 0] % 3
    assert_goes_on(model, tmp_path, obvious, interrupt, assert_same_fit, clients)


def test_clients_that_are_alone_have_one_round(tmp_path, obvious, interrupt, assert_same_fit):
    whole = clone(ALONE).fit(obvious)
    interrupted_after(ALONE, 1, tmp_path, obvious, interrupt)
    callback = interrupt()
    again = clone(ALONE).set_params(checkpoint=tmp_path).set_callbacks(callback).fit(obvious)
    assert_same_fit(again, whole)
    assert (len(again.private_rows_) > 0, callback.seen) == (True, [])
    # That round is as long as all others together.
    longer = clone(ALONE).set_params(checkpoint=tmp_path, n_rounds=N_ROUNDS + 1)
    with pytest.raises(ValueError, match="n_rounds: 5 there, 6 here"):
        longer.fit(obvious)


def test_the_best_round_is_kept_over_an_interruption(tmp_path, obvious, interrupt, assert_same_fit):
    """The best round is before the interruption, and rounds after it are waited for in vain."""
    estimator = clone(FEDFNN).set_params(
        objective="bce", learning_rate=0.5, n_rounds=20, server_optimizer="sgd", **STOPPING
    )
    whole = clone(estimator).fit(obvious)
    values = [record["validation_ndcg"] for record in whole.history_]
    best = int(np.argmax(values)) + 1
    assert best + 2 == len(values) < 20
    interrupted_after(estimator, best + 1, tmp_path, obvious, interrupt)
    assert_same_fit(clone(estimator).set_params(checkpoint=tmp_path).fit(obvious), whole)
    last = clone(estimator).set_params(early_stopping=False, n_rounds=len(values)).fit(obvious)
    assert not np.array_equal(last.item_factors_, whole.item_factors_)


KILLED = """
import time
import numpy as np
from fedrecsk import FedFNNRecommender
from fedrecsk.estimators import _fedfnn_simulation

step = _fedfnn_simulation.whole_data_step

def stuck(state, shards, delegates, t, **parameters):
    found = step(state, shards, delegates, t, **parameters)
    if t == 3:
        print("inside", flush=True)
        time.sleep(600)
    return found

_fedfnn_simulation.whole_data_step = stuck
FedFNNRecommender(**{parameters!r}).fit(np.array({rows!r}))
"""


def test_a_killed_process_leaves_what_another_goes_on_from(
    tmp_path, obvious, interrupt, assert_same_fit
):
    parameters = {**FAST, **STOPPING, "n_iter_no_change": 9, "checkpoint": str(tmp_path / "fit")}
    script = KILLED.format(parameters=parameters, rows=obvious.tolist())
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fedrecsk.__file__).parents[1]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    with process:
        try:
            assert process.stdout.readline() == "inside\n"
        finally:
            process.kill()
    assert process.returncode != 0
    whole = FedFNNRecommender(**parameters | {"checkpoint": None}).fit(obvious)
    callback = interrupt()
    again = FedFNNRecommender(**parameters).set_callbacks(callback)
    assert_same_fit(again.fit(obvious), whole)
    assert len(callback.seen) == whole.n_rounds_ - 3 > 0  # the fourth was not finished


def test_every_third_round_is_written(tmp_path, obvious, interrupt, assert_same_fit, capsys):
    estimator = clone(FEDFNN).set_params(n_rounds=8, checkpoint_every=3)
    whole = clone(estimator).fit(obvious)
    interrupted_after(estimator, 5, tmp_path, obvious, interrupt)
    callback = interrupt()
    again = clone(estimator).set_params(checkpoint=tmp_path, verbose=2).set_callbacks(callback)
    assert_same_fit(again.fit(obvious), whole)
    # Rounds 4 and 5 are run once more, and all say which they are.
    rounds = range(4, 9)
    assert [model.n_rounds_ for model in callback.seen] == list(rounds)
    assert [model.history_[-1]["round"] for model in callback.seen] == list(rounds)
    assert [len(model.history_) for model in callback.seen] == list(rounds)
    assert callback.tasks == [number - 1 for number in rounds]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed] == [f"{number}/8" for number in rounds]
    # Another interval is no other fit.
    again.set_params(checkpoint_every=1, verbose=0).set_callbacks(interrupt(1)).fit(obvious)


def test_a_fit_goes_on_with_more_rounds_but_not_with_fewer(tmp_path, obvious, assert_same_fit):
    whole = clone(FEDFNN).fit(obvious)
    clone(FEDFNN).set_params(checkpoint=tmp_path, n_rounds=3).fit(obvious)
    estimator = clone(FEDFNN).set_params(checkpoint=str(tmp_path))
    assert_same_fit(estimator.fit(obvious), whole)
    with pytest.raises(ValueError, match=r"is 5 rounds on, and n_rounds=3\. Raise n_rounds"):
        estimator.set_params(n_rounds=3).fit(obvious)


# ---------------------------------------------------------------- another fit

ALLOWED = {"checkpoint", "checkpoint_every", "device", "n_rounds", "verbose", "warm_start"}


@pytest.mark.parametrize(
    "cls",
    [
        CentralizedRecommender,
        FedAvgRecommender,
        FedFNNRecommender,
        FedFastRecommender,
        HeteFedRecRecommender,
    ],
)
def test_every_parameter_that_decides_something_is_compared(cls):
    estimator = cls()
    assert estimator.get_params().keys() - estimator._settings().keys() == ALLOWED


def test_every_parameter_of_a_language_model_is_compared():
    estimator = FELLRecRecommender(learning_rate_schedule="constant")
    left_out = estimator.get_params().keys() - estimator._settings().keys()
    assert left_out == ALLOWED | {"item_text"}  # which is compared as data


def refuses(estimator, folder, X, client_ids=None):
    """Fit over the checkpoint of another fit, and give what is said to differ."""
    with pytest.raises(ValueError, match="is of another fit than this one") as caught:
        clone(estimator).set_params(checkpoint=folder).fit(X, client_ids)
    return str(caught.value).split("than this one: ")[1].split(". Give the same")[0]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"l2": 0.3}, "l2: 'auto' there, 0.3 here"),
        ({"n_factors": 6}, "n_factors: 4 there, 6 here"),
        ({"random_state": 1}, "random_state: 0 there, 1 here"),
        ({"clients_per_round": 1.0}, "clients_per_round: 0.2 there, 1.0 here"),
        (
            {"early_stopping": True, "predictor": None},
            "early_stopping: False there, True here; predictor: 'linear' there, None here",
        ),
    ],
)
def test_another_parameter_is_named(changes, difference, tmp_path, obvious):
    clone(FEDFNN).set_params(checkpoint=tmp_path).fit(obvious)
    assert refuses(clone(FEDFNN).set_params(**changes), tmp_path, obvious) == difference


def test_other_data_are_named(tmp_path, obvious):
    X = np.column_stack([obvious, np.ones(len(obvious)), np.arange(len(obvious))])
    clients = X[:, 0] // 4
    estimator = clone(FEDFNN).set_params(n_rounds=1)
    clone(estimator).set_params(checkpoint=tmp_path).fit(X, clients)

    def changed(row, column, value):
        other = X.copy()
        other[row, column] = value
        return refuses(estimator, tmp_path, other, clients)

    assert changed(X[:, 0] == 39, 0, 39.5) == "the users differ"
    assert changed(X[:, 1] == 19, 1, 19.5) == "the items differ"
    assert changed(0, 1, 1) == "the interactions differ"
    assert changed(0, 3, 99) == "the interactions differ"  # the timestamp
    assert refuses(estimator, tmp_path, X, X[:, 0] // 8) == "the clients differ"
    assert refuses(estimator, tmp_path, X[:, :2], clients) == "the interactions differ"
    fewer = X[X[:, 0] > 0]
    found = refuses(estimator, tmp_path, fewer, fewer[:, 0] // 4)
    assert found == "the clients and the interactions and the users differ"


def test_another_estimator_is_named(tmp_path, obvious):
    clone(VARIANTS["fedfast"]).set_params(checkpoint=tmp_path).fit(obvious)
    found = refuses(VARIANTS["fedavg-bce"], tmp_path, obvious)
    assert "estimator: 'FedFastRecommender' there, 'FedAvgRecommender' here" in found


def test_other_sizes_of_clients_are_named(tmp_path, obvious):
    sizes = {user: 2 + 2 * (user % 2) for user in range(40)}
    estimator = HeteFedRecRecommender(**SIZES | {"client_sizes": sizes, "n_rounds": 1})
    clone(estimator).set_params(checkpoint=tmp_path).fit(obvious)
    again = clone(estimator).set_params(client_sizes=dict(reversed(sizes.items())))
    again.set_params(checkpoint=tmp_path).fit(obvious)
    estimator.set_params(client_sizes=sizes | {7: 2})
    assert refuses(estimator, tmp_path, obvious) == "client_sizes: other values"


def test_other_texts_of_items_are_named(fellrec, tmp_path, obvious):
    clients = obvious[:, 0] % 3
    fellrec(checkpoint=tmp_path, n_rounds=1).fit(obvious, clients)
    texts = {item: str(item) for item in range(20)}
    for other in (texts | {3: "11"}, texts | {20: "20"}):
        model = fellrec(item_text=other, n_rounds=1)
        assert refuses(model, tmp_path, obvious, clients) == "the item texts differ"
    # A mapping in another order is the same.
    same = fellrec(item_text=dict(reversed(texts.items())), checkpoint=tmp_path, n_rounds=1)
    assert same.fit(obvious, clients).n_rounds_ == 1


def test_a_rate_that_falls_with_the_rounds_goes_by_their_number(fellrec, tmp_path, obvious):
    clients = obvious[:, 0] % 3
    fellrec(checkpoint=tmp_path, n_rounds=2).fit(obvious, clients)
    longer = fellrec(n_rounds=3)
    assert refuses(longer, tmp_path, obvious, clients) == "n_rounds: 2 there, 3 here"
    folder = tmp_path / "constant"
    constant = fellrec(checkpoint=folder, n_rounds=2, learning_rate_schedule="constant")
    constant.fit(obvious, clients)
    assert constant.set_params(n_rounds=3).fit(obvious, clients).n_rounds_ == 3


def test_another_model_behind_the_same_name_is_refused(fellrec, tiny_backbones, tmp_path, obvious):
    clients = obvious[:, 0] % 3

    def backbone():
        return tiny_backbones[which]()

    which = "tiny_encoder"
    fellrec(checkpoint=tmp_path, n_rounds=1).set_params(backbone=backbone).fit(obvious, clients)
    which = "deep_encoder"
    model = fellrec(checkpoint=tmp_path, n_rounds=1).set_params(backbone=backbone)
    with pytest.raises(ValueError, match=r"is of another model, though .* a backbone's, may have"):
        model.fit(obvious, clients)


def test_candidates_of_a_search_want_folders_of_their_own(tmp_path, obvious):
    def search(**parameters):
        return GridSearchCV(
            clone(FEDFNN).set_params(checkpoint=tmp_path / "shared", n_rounds=2),
            parameters,
            cv=PerUserHoldout(random_state=0),
            refit=False,
            error_score="raise",
        )

    with pytest.raises(ValueError, match=r"l2: 0\.1 there, 0\.2 here"):
        search(l2=[0.1, 0.2]).fit(obvious)
    folds = search(l2=[0.1]).set_params(cv=PerUserHoldout(n_splits=2, random_state=0))
    with pytest.raises(ValueError, match="this one: the interactions differ"):
        folds.fit(obvious)
    found = search(l2=[0.1], checkpoint=[None]).fit(obvious)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("name", ["fedfnn-bce-newton", "centralized-bce", "hetefedrec-mf"])
def test_a_fit_that_goes_on_from_another_is_interrupted(
    name, tmp_path, obvious, interrupt, assert_same_fit
):
    first = clone(VARIANTS[name]).set_params(early_stopping=False).fit(obvious)
    new = np.array([[99, 0], [99, 2], [0, 98]])
    whole = pickle.loads(pickle.dumps(first)).partial_fit(new)
    stored = pickle.dumps(first)
    going_on = first.set_params(checkpoint=tmp_path).set_callbacks(interrupt(2))
    with pytest.raises(KeyboardInterrupt):
        going_on.partial_fit(new)
    again = pickle.loads(stored).set_params(checkpoint=tmp_path)
    callback = interrupt()
    assert_same_fit(again.set_callbacks(callback).partial_fit(new), whole)
    numbers = [2 * N_ROUNDS - 2, 2 * N_ROUNDS - 1, 2 * N_ROUNDS]
    assert [model.history_[-1]["round"] for model in callback.seen] == numbers
    assert [model.n_rounds_ for model in callback.seen] == numbers


@pytest.mark.parametrize("estimator", [FEDFNN, ALONE], ids=["fedfnn", "standalone"])
def test_a_fit_that_goes_on_is_not_the_one_in_the_checkpoint(estimator, tmp_path, obvious):
    model = clone(estimator).set_params(checkpoint=tmp_path / "a", warm_start=True)
    n_rounds = model.fit(obvious).n_rounds_
    difference = "another fit than this one: the fitted attributes to go on from differ"
    with pytest.raises(ValueError, match=difference):
        model.fit(obvious)
    assert model.n_rounds_ == n_rounds
    model.set_params(checkpoint=tmp_path / "b").fit(obvious)
    assert model.n_rounds_ == 2 * n_rounds
    # Nor is a fit from elsewhere.
    other = clone(estimator).set_params(random_state=1).fit(obvious)
    other.set_params(checkpoint=tmp_path / "b", random_state=0, warm_start=True)
    with pytest.raises(ValueError, match=difference):
        other.fit(obvious)


def test_a_language_model_that_goes_on(fellrec, tmp_path, obvious):
    clients = obvious[:, 0] % 3
    model = fellrec(checkpoint=tmp_path / "a", warm_start=True, n_rounds=1).fit(obvious, clients)
    with pytest.raises(ValueError, match="the fitted attributes to go on from differ"):
        model.fit(obvious, clients)
    assert model.set_params(checkpoint=tmp_path / "b").fit(obvious, clients).n_rounds_ == 2


# ---------------------------------------------------------------- refused at once


@pytest.mark.parametrize("state", [None, np.random.RandomState(0)], ids=["None", "RandomState"])
@pytest.mark.parametrize("name", ["fedfnn-whole-data", "centralized-bce", "hetefedrec-mf"])
def test_a_checkpoint_needs_a_seed(name, state, tmp_path, obvious):
    model = clone(VARIANTS[name]).set_params(checkpoint=tmp_path / "fit", random_state=state)
    with pytest.raises(ValueError, match="checkpoint needs an int as random_state, got"):
        model.fit(obvious)
    assert not (tmp_path / "fit").exists()


def test_a_path_that_is_a_file_is_refused_before_the_first_round(tmp_path, obvious, interrupt):
    file = tmp_path / "model.json"
    file.write_text("mine")
    callback = interrupt()
    model = clone(FEDFNN).set_params(checkpoint=file).set_callbacks(callback)
    with pytest.raises(ValueError, match=r"checkpoint must be a folder .*model\.json cannot be"):
        model.fit(obvious)
    assert (callback.seen, file.read_text()) == ([], "mine")
