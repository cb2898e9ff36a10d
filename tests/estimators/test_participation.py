"""Fits whose clients are away, drop out or are late."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone

from fedrecsk import (
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.engine.participation import SPREAD
from fedrecsk.estimators import _fedfnn_simulation, _hetefedrec
from fedrecsk.model_selection import PerUserHoldout
from fedrecsk.plotting import ConvergenceDisplay

FAST = {"n_factors": 4, "n_rounds": 5, "random_state": 0, "device": "cpu"}
SIZES = {"sizes": (2, 4), "group_ratio": (1, 1), **FAST}
SIZES.pop("n_factors")
MODELS = {
    "fedfnn": FedFNNRecommender(**FAST),
    "fedfnn-predicting": FedFNNRecommender(
        **FAST, objective="bce", gate=False, anchor=False, sampling="uniform"
    ),
    "fedavg": FedAvgRecommender(**FAST, server_optimizer="momentum"),
    "fedfast": FedFastRecommender(**FAST, n_clusters=3),
    "hetefedrec": HeteFedRecRecommender(**SIZES),
    "hetefedrec-clustered": HeteFedRecRecommender(**SIZES, aggregation="clustered"),
    "hetefedrec-ncf": HeteFedRecRecommender(
        "ncf", **SIZES, local_epochs=1, distill_fraction=0.5, sampling="uniform"
    ),
}
COUNTS = ("asked", "dropped", "late", "unavailable")
NEW = {*COUNTS, "waited"}
N_CLIENTS = 40


@pytest.fixture(params=MODELS)
def model(request):
    """An unfitted estimator, one of all that draw clients."""
    return clone(MODELS[request.param])


@pytest.fixture(params=["fedfnn-predicting", "fedavg", "hetefedrec"])
def typical(request):
    """An unfitted estimator, one of a few, for what all of them share."""
    return clone(MODELS[request.param])


def column(estimator, name):
    return [record[name] for record in estimator.history_]


def odd_in_odd_rounds(number, client_ids):
    """Whether clients are there: those whose id is as odd as the number of the round."""
    return client_ids % 2 == number % 2


def nobody(number, client_ids):
    return np.zeros(len(client_ids), dtype=bool)


def nobody_in_the_second(number, client_ids):
    return np.full(len(client_ids), number != 2)


# ---------------------------------------------------------------- as without


def test_where_all_are_there_and_deliver_a_fit_is_as_without(model, obvious, assert_same_fit):
    plain = clone(model).fit(obvious)
    assert all(not NEW & record.keys() for record in plain.history_)
    same = clone(model).set_params(availability=1.0, client_seconds=0.5, deadline=1e6).fit(obvious)
    for record in same.history_:
        assert record["asked"] == record["clients"]
        assert record["dropped"] == record["late"] == record["unavailable"] == 0
        assert record["waited"] > 0
        for name in NEW:
            del record[name]
    assert_same_fit(same, plain)


def test_same_seed_same_faults(typical, obvious, assert_same_fit):
    typical.set_params(availability=0.7, dropout_rate=0.3, client_seconds=1.0, over_selection=0.2)
    typical.set_params(deadline=12.0, local_epochs=1)
    one, again = clone(typical).fit(obvious), clone(typical).fit(obvious)
    assert_same_fit(one, again)
    other = clone(typical).set_params(random_state=1).fit(obvious)
    assert [column(other, name) for name in COUNTS] != [column(one, name) for name in COUNTS]


def test_ways_to_say_who_is_there(typical, obvious, assert_same_fit):
    chances = np.linspace(0.2, 1.0, N_CLIENTS)
    expected = clone(typical).set_params(availability=chances).fit(obvious)
    by_id = dict(enumerate(chances.tolist())) | {99: 0.0}
    for given in (chances.tolist(), by_id, lambda number, client_ids: chances):
        assert_same_fit(clone(typical).set_params(availability=given).fit(obvious), expected)
    assert 0 < sum(column(expected, "unavailable")) < N_CLIENTS * 5


@pytest.mark.parametrize("name", ["fedfnn", "fedavg", "hetefedrec"])
def test_only_those_who_deliver_are_trained(name, obvious, monkeypatch, assert_same_fit):
    """A fit is that of a sampling which draws those and nobody else."""
    model = clone(MODELS[name]).set_params(clients_per_round=1.0, n_rounds=4)
    found = clone(model).set_params(availability=odd_in_odd_rounds).fit(obvious)
    assert column(found, "asked") == column(found, "clients") == [20] * 4
    assert column(found, "unavailable") == [20] * 4

    def those_there(t):
        return np.flatnonzero(odd_in_odd_rounds(t + 1, np.arange(N_CLIENTS)))

    monkeypatch.setattr(
        _fedfnn_simulation, "draw_delegates", lambda state, shards, size, t, *_: those_there(t)
    )
    rounds = iter(range(4))
    monkeypatch.setattr(_hetefedrec, "epoch_cohort", lambda *_: those_there(next(rounds)))
    expected = clone(model).fit(obvious)
    for record in found.history_:
        for key in COUNTS:
            del record[key]
    assert_same_fit(found, expected)


# ---------------------------------------------------------------- history


def test_history_says_what_became_of_those_asked(model, obvious):
    shared = {"client_seconds": 1.0, "deadline": 10.0, "over_selection": 0.5, "n_rounds": 12}
    model.set_params(availability=0.8, dropout_rate=0.3, clients_per_round=10, **shared)
    model.set_params(local_epochs=1).fit(obvious)
    for record in model.history_:
        delivered = record["asked"] - record["dropped"] - record["late"]
        assert record["asked"] == min(15, N_CLIENTS - record["unavailable"])
        assert record["clients"] == min(10, delivered)
        assert 0 < record["waited"] <= 10.0
        assert (record["waited"] == 10.0) == (record["clients"] < 10)
    for name in COUNTS:
        assert sum(column(model, name)) > 0, name
    if hasattr(model, "times_sampled_"):
        assert model.times_sampled_.sum() == sum(column(model, "clients"))


def test_all_who_were_asked_are_sent_the_model(model, obvious):
    plain = clone(model).set_params(clients_per_round=1.0, n_rounds=1).fit(obvious)
    model.set_params(clients_per_round=1.0, n_rounds=1, dropout_rate=0.6).fit(obvious)
    (record,), (without,) = model.history_, plain.history_
    assert record["asked"] == without["clients"] == N_CLIENTS
    assert record["bytes_down"] == without["bytes_down"]
    assert record["clients"] < N_CLIENTS
    assert 0 < record["bytes_up"] < without["bytes_up"]


def test_what_masks_cost_is_counted_where_clients_fail(obvious):
    model = clone(MODELS["fedavg"]).set_params(secure_aggregation=True, n_rounds=1)
    (without,) = clone(model).fit(obvious).history_
    (record,) = clone(model).set_params(client_seconds=1.0).fit(obvious).history_
    assert record["bytes_down"] == without["bytes_down"]
    # All who drop out got the model, and nothing of the protocol.
    model.set_params(dropout_rate=0.5, clients_per_round=1.0)
    (record,) = clone(model).fit(obvious).history_
    there = record["clients"]
    (plain,) = clone(model).set_params(secure_aggregation=False).fit(obvious).history_
    (fewer,) = (
        clone(model).set_params(dropout_rate=0, clients_per_round=there).fit(obvious).history_
    )
    (no_masks,) = (
        clone(model)
        .set_params(dropout_rate=0, clients_per_round=there, secure_aggregation=False)
        .fit(obvious)
        .history_
    )
    assert there < N_CLIENTS
    protocol = fewer["bytes_down"] - no_masks["bytes_down"]
    assert record["bytes_down"] - plain["bytes_down"] == protocol > 0


def test_cohorts_that_vary_in_size_are_not_cut_where_nobody_fails(obvious, assert_same_fit):
    model = clone(MODELS["fedavg"]).set_params(sampling="poisson", clients_per_round=8, n_rounds=8)
    plain = clone(model).fit(obvious)
    assert max(column(plain, "clients")) > 8
    same = clone(model).set_params(client_seconds=0.5, deadline=1e6).fit(obvious)
    for record in same.history_:
        for name in NEW:
            del record[name]
    assert_same_fit(same, plain)


@pytest.mark.parametrize("name", ["fedfnn", "fedavg", "hetefedrec", "hetefedrec-ncf"])
def test_seconds_are_rows_times_epochs_where_there_are_epochs(name, obvious):
    """Nine rows each; the noise stays within four standard deviations."""
    epochs = {"fedfnn": 1, "fedavg": 3, "hetefedrec": 1, "hetefedrec-ncf": 3}[name]
    model = clone(MODELS[name]).set_params(local_epochs=3, n_rounds=2, clients_per_round=1.0)
    model.set_params(client_seconds=0.1)
    slack = np.exp(4 * SPREAD)
    middle = 0.9 * epochs
    waited = column(model.fit(obvious), "waited")
    assert (np.array(waited) > middle).all()
    assert (np.array(waited) < middle * slack).all()
    late = column(clone(model).set_params(deadline=middle).fit(obvious), "late")
    assert all(8 < count < 32 for count in late)


def test_held_out_rows_are_not_trained_on(obvious):
    model = FedFNNRecommender(**FAST, clients_per_round=1.0, client_seconds=1.0)
    ratio = np.divide(
        column(clone(model).set_params(early_stopping=True).fit(obvious), "waited"),
        column(clone(model).fit(obvious), "waited"),
    )
    np.testing.assert_allclose(ratio, 8 / 9)


def test_slow_clients_are_lost(obvious):
    seconds = {user: 1.0 if user % 4 == 0 else 0.01 for user in range(N_CLIENTS)}
    model = FedFNNRecommender(**FAST | {"n_rounds": 16}, client_seconds=seconds, deadline=1.0)
    model.fit(obvious)
    times = model.times_sampled_
    assert (times[::4] == 0).all()
    # The others have their turns, one more or one less, and the slow ones theirs twice.
    fast = np.delete(times, np.s_[::4])
    assert fast.min() >= 1
    assert fast.max() - fast.min() <= 2
    assert sum(column(model, "late")) == pytest.approx(16 * 8 * 0.5 / 1.25, abs=8)


def test_contributors_alone_are_asked(obvious):
    model = HeteFedRecRecommender(**SIZES, contributors="largest", clients_per_round=1.0)
    model.set_params(availability=odd_in_odd_rounds).fit(obvious)
    largest = model.client_ids_[model.client_groups_ == 1]
    for record in model.history_:
        there = int((largest % 2 == record["round"] % 2).sum())
        assert (record["asked"], record["unavailable"]) == (there, len(largest) - there)


# ---------------------------------------------------------------- nobody delivers


def test_a_round_without_anybody_changes_nothing(model, obvious, interrupt, capsys):
    callback = interrupt()
    model.set_params(availability=nobody_in_the_second, verbose=2).set_callbacks(callback)
    model.fit(obvious)
    first, second, third = (vars(seen) for seen in callback.seen[:3])
    assert model.n_rounds_ == len(model.history_) == 5
    record = second["history_"][1]
    assert (record["round"], record["loss"], record["clients"], record["asked"]) == (2, None, 0, 0)
    assert (record["bytes_up"], record["bytes_down"], record["rejected"]) == (0, 0, 0)
    assert record["unavailable"] == N_CLIENTS
    if "distillation_loss" in first["history_"][0]:
        assert record["distillation_loss"] is None
    for name in ("user_factors_", "item_factors_", "network_", "item_evidence_", "user_gram_"):
        assert first[name] is not second[name]
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert not np.array_equal(second["item_factors_"], third["item_factors_"])
    assert [loss is None for loss in column(model, "loss")] == [False, True, False, False, False]
    lines = capsys.readouterr().out.splitlines()
    assert "round 2/5  0 of 0 clients  " in lines[1]
    assert "round 3/5  loss 0." in lines[2]
    assert "8 of 8 clients" in lines[2]
    # Nor does it disturb those that read the history.
    ConvergenceDisplay.from_estimators({"one": model})


@pytest.mark.parametrize("name", ["fedfnn", "fedavg", "hetefedrec"])
def test_early_stopping_does_not_count_rounds_without_anybody(name, obvious):
    def away_at_first(number, client_ids):
        return np.full(len(client_ids), number > 4)

    model = clone(MODELS[name]).set_params(
        early_stopping=True, n_iter_no_change=2, n_rounds=8, availability=away_at_first
    )
    model.fit(obvious)
    found = column(model, "validation_ndcg")
    assert found[:4] == [None] * 4
    assert all(value is not None for value in found[4:])
    assert model.n_rounds_ > 6
    ConvergenceDisplay.from_estimators({"one": model}, y="validation_ndcg")


def test_nobody_ever_is_an_error(model, obvious):
    model.set_params(availability=nobody, n_rounds=3)
    message = (
        r"Nobody delivered in any of 3 rounds: 0 times a client was asked.* 120 times a client"
    )
    with pytest.raises(ValueError, match=message):
        model.fit(obvious)
    assert not hasattr(model, "item_factors_")
    model.set_params(availability=None, client_seconds=1.0, deadline=1e-3)
    with pytest.raises(ValueError, match=r"24 times a client was asked, .* 24 times it was late"):
        model.fit(obvious)


def test_nobody_who_goes_on_is_a_warning(typical, obvious):
    typical.fit(obvious)
    items = typical.item_factors_.copy()
    typical.set_params(availability=nobody, n_rounds=2)
    with pytest.warns(UserWarning, match=r"The model stays as it was\. Nobody delivered"):
        typical.partial_fit([[0, 1], [77, 3]])
    np.testing.assert_array_equal(typical.item_factors_, items)
    assert typical.n_rounds_ == 7
    assert 77 in typical.user_ids_
    # And on from there.
    typical.set_params(availability=None).partial_fit([[78, 5]])
    assert not np.array_equal(typical.item_factors_, items)


# ---------------------------------------------------------------- fits in parts


def test_rounds_count_on_where_a_fit_does(typical, obvious):
    numbers = []

    def note(number, client_ids):
        numbers.append((number, len(client_ids)))
        return np.full(len(client_ids), 0.9)

    typical.set_params(availability=note, n_rounds=2).fit(obvious)
    typical.partial_fit([[50, 2], [51, 3]])
    assert numbers == [(1, 40), (2, 40), (3, 42), (4, 42)]
    assert column(typical, "round") == [1, 2, 3, 4]
    typical.set_params(warm_start=True).fit(obvious)
    assert numbers[4:] == [(5, 40), (6, 40)]


def test_a_fitted_model_is_pickled_and_cloned_with_its_function(obvious, assert_same_fit):
    model = FedFNNRecommender(**FAST, availability=odd_in_odd_rounds).fit(obvious)
    assert clone(model).availability is odd_in_odd_rounds
    assert_same_fit(pickle.loads(pickle.dumps(model)), model)
    again = pickle.loads(pickle.dumps(clone(model))).fit(obvious)
    assert_same_fit(again, model)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"deadline": 2.0}, r"deadline=2 needs client_seconds"),
        ({"availability": [0.5] * 3}, r"availability is of shape \(3,\), but there are 40 clients"),
        ({"availability": {0: 0.5}}, r"availability has no entry for 39 of the 40 clients, .* 1;"),
        ({"availability": [2.0] * 40}, r"gives client 0 the probability 2"),
        ({"availability": lambda number, ids: 1.0}, r"in round 1 it returned an array of shape"),
        ({"client_seconds": [0.0] * 40}, r"gives client 0 0 seconds for an interaction"),
    ],
)
def test_what_is_refused(typical, given, message, obvious):
    with pytest.raises(ValueError, match=message):
        typical.set_params(**given).fit(obvious)
    assert not hasattr(typical, "item_factors_")


@pytest.mark.parametrize(
    "given",
    [
        {"availability": 0.5},
        {"dropout_rate": 0.5},
        {"client_seconds": 1.0},
        {"over_selection": 0.5},
    ],
)
def test_clients_that_are_alone_miss_no_round(given, obvious):
    model = HeteFedRecRecommender("ncf", **SIZES, aggregation="standalone", **given)
    with pytest.raises(ValueError, match="has no rounds that a client could miss"):
        model.fit(obvious)


# ---------------------------------------------------------------- platforms


@pytest.fixture
def platforms(tiny_backbones):
    """A fast language model for three platforms, of which one misses the second round."""

    def make(**changes):
        settings = {
            "item_text": {item: str(item) for item in range(20)},
            "n_rounds": 3,
            "local_epochs": 1,
            "target_modules": "all-linear",
            "popularity_weight": 0.0,
            "early_stopping": False,
            "random_state": 0,
            "device": "cpu",
            "lora_rank": 2,
        }
        return FELLRecRecommender(tiny_backbones["tiny_encoder"], **settings | changes)

    return make


def second_misses_the_second(number, platform_ids):
    return (platform_ids != 1) | (number != 2)


@pytest.mark.parametrize("aggregation", ["fellrec", "fedavg", "ditto"])
def test_a_platform_that_misses_a_round_keeps_its_adapter(
    platforms, aggregation, obvious, interrupt
):
    clients, callback = obvious[:, 0] % 3, interrupt()
    model = platforms(aggregation=aggregation, availability=second_misses_the_second)
    model.set_callbacks(callback).fit(obvious, clients)
    first, second, third = (seen.adapters_ for seen in callback.seen)
    for name in first:
        np.testing.assert_array_equal(first[name][1], second[name][1])
        if name.endswith("lora_B"):
            assert not np.array_equal(second[name][1], third[name][1])
            assert not np.array_equal(first[name][0], second[name][0])
    assert column(model, "clients") == [3, 2, 3]
    assert [record["unavailable"] for record in model.history_] == [0, 1, 0]
    assert np.isnan(model.history_[1]["client_losses"][1])
    assert model.history_[1]["bytes_down"] * 3 == model.history_[0]["bytes_down"] * 2
    # The others have mixed in nothing of it: its share is what they have not of each other.
    if aggregation == "fedavg":
        for value in second.values():
            np.testing.assert_array_equal(value[0], value[2])
            assert not np.array_equal(value[0], value[1]) or not value[1].any()


def test_platforms_that_are_always_there(platforms, obvious, assert_same_fit):
    clients = obvious[:, 0] % 3
    plain = platforms().fit(obvious, clients)
    same = platforms(availability=1.0).fit(obvious, clients)
    for record in same.history_:
        for name in COUNTS:
            del record[name]
    assert_same_fit(same, plain)


def test_platforms_that_all_miss_a_round(platforms, obvious, interrupt):
    clients, callback = obvious[:, 0] % 3, interrupt()
    model = platforms(availability=nobody_in_the_second, early_stopping=True, n_iter_no_change=1)
    model.set_params(tol=0.0).set_callbacks(callback).fit(obvious, clients)
    assert column(model, "loss")[1] is None
    assert column(model, "validation_ndcg")[1] is None
    for name, value in callback.seen[0].adapters_.items():
        np.testing.assert_array_equal(value, callback.seen[1].adapters_[name])
    with pytest.raises(ValueError, match="Nobody delivered in any of 3 rounds"):
        platforms(availability=nobody).fit(obvious, clients)
    with pytest.warns(UserWarning, match="The model stays as it was"):
        model.set_params(availability=nobody, early_stopping=False).partial_fit([[0, 0]], [0])


# ---------------------------------------------------------------- what is lost


@pytest.mark.parametrize("model", [FedFNNRecommender(), FedAvgRecommender()], ids=repr)
def test_a_third_that_drops_out_costs_little(model):
    """NDCG@20 with 30% dropout is within 5% of that without, over three seeds."""
    X, _ = make_interactions(200, 120, 4, mean_interactions=20, random_state=0, return_X_y=True)
    scores = {0.0: [], 0.3: []}
    for seed in range(3):
        train, test = next(PerUserHoldout(random_state=seed).split(X))
        for rate, found in scores.items():
            estimator = clone(model).set_params(n_factors=8, random_state=seed, dropout_rate=rate)
            found.append(estimator.fit(X[train]).score(X[test]))
    assert np.mean(scores[0.3]) > 0.95 * np.mean(scores[0.0])
    assert scores[0.3] != scores[0.0]
