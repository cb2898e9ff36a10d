"""Whole rounds, whatever they train with, and the prediction in them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.bce_rounds import refit_bce
from fedrecsk.methods.factor_state import (
    FactorState,
    PredictionWatch,
    served_factors,
)
from fedrecsk.methods.fedfnn import fedfnn_step, prediction_step, public_inputs
from fedrecsk.methods.meta_network import predict_updates
from fedrecsk.methods.whole_data_rounds import refit_whole_data
from tests.methods.factor_rounds import (
    FEDERATIONS,
    LITERAL,
    N_FACTORS,
    PENALTY,
    PREDICTION,
    SINGLE,
    STEPS,
    STEPS_ON_FEDERATIONS,
    STREAMS,
    W0,
    assert_states_close,
    bce,
    delegates_of,
    exact,
    newton,
    sampled,
    start,
    tensors_of,
    users_of,
)
from tests.reference.federations import federation_of, items_by_user, random_federation

# What must not matter ---------------------------------------------------------------------


@STEPS_ON_FEDERATIONS
@pytest.mark.parametrize("rows", [1, 40])
def test_rounds_do_not_depend_on_chunks(shards, step, rows, monkeypatch):
    whole, whole_logs = step(start(shards), shards, 0)
    whole, whole_logs = step(whole, shards, 1)
    monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)
    parts, logs = step(start(shards), shards, 0)
    parts, logs = step(parts, shards, 1)
    assert_states_close(parts, whole)
    for name in ("bytes_up", "bytes_down", "clients"):
        assert logs[name] == whole_logs[name]
    assert logs["loss"] == pytest.approx(whole_logs["loss"], rel=1e-5)


@STEPS_ON_FEDERATIONS
def test_rounds_do_not_depend_on_the_names_of_clients(shards, step):
    """Draws are functions of users and items, so another order of clients changes nothing."""
    items = items_by_user(shards)
    client_of = np.empty(shards.n_users, dtype=np.int64)
    client_of[shards.users] = np.repeat(np.arange(shards.n_clients), np.diff(shards.client_offsets))
    renamed = federation_of(
        items,
        shards.n_items,
        np.random.default_rng(0).permutation(shards.n_clients)[client_of].tolist(),
    )
    assert renamed.users.tolist() != shards.users.tolist()
    results = []
    for federation in (shards, renamed):
        state = start(federation)
        for t in range(2):
            state, _ = step(state, federation, t, n_sampled=federation.n_clients)
        results.append(state)
    assert_states_close(*results)


@STEPS
def test_the_same_seed_gives_identical_rounds_and_another_seed_others(step):
    first, again = (step(start(SINGLE), SINGLE, 2)[0] for _ in range(2))
    assert torch.equal(first.user_factors, again.user_factors)
    assert torch.equal(first.item_table, again.item_table)
    for state in (
        step(start(SINGLE), SINGLE, 3)[0],
        step(start(SINGLE), SINGLE, 2, streams=Streams(12))[0],
    ):
        assert not torch.equal(state.user_factors, first.user_factors)
        assert not torch.equal(state.item_table, first.item_table)


@STEPS_ON_FEDERATIONS
@pytest.mark.parametrize(
    ("predictor", "anchor"), [(None, False), ("mean", False), ("mean", True), ("mlp", True)]
)
def test_a_step_leaves_its_state_alone(shards, step, predictor, anchor):
    server = Optimizer("adam", 0.05)
    state = start(shards, server=server, neural=step is bce)
    changes = {"server_optimizer": server} if step is bce else {}
    for t in range(2):
        copies = {name: value.clone() for name, value in tensors_of(state).items()}
        watch, weight = state.watch, state.statistics.weight
        after, _ = step(state, shards, t, predictor=predictor, gate=False, anchor=anchor, **changes)
        assert tensors_of(state).keys() == copies.keys()
        for name, value in tensors_of(state).items():
            assert torch.equal(value, copies[name]), name
        assert (state.watch, state.statistics.weight) == (watch, weight)
        assert not torch.equal(after.user_factors, state.user_factors)
        state = after


@STEPS_ON_FEDERATIONS
def test_a_step_in_place_is_the_same_step(shards, step):
    server = Optimizer("adam", 0.05)
    changes = {"server_optimizer": server} if step is bce else {}
    copying, writing = (start(shards, server=server, neural=step is bce) for _ in range(2))
    for t in range(3):
        before = writing
        copying, logs = step(copying, shards, t, **changes)
        writing, same = step(writing, shards, t, in_place=True, **changes)
        assert logs == same
        for name, value in tensors_of(copying).items():
            assert torch.equal(value, tensors_of(writing)[name]), name
        # Where nothing depends on the clients that took no part, nothing is copied.
        assert writing.user_factors is before.user_factors
        assert writing.times_sampled is before.times_sampled
        assert writing.turns is before.turns


@pytest.mark.threads
@pytest.mark.parametrize("step", [bce, exact], ids=["bce", "whole-data"])
def test_one_and_two_threads_agree(step):
    # Large enough for torch to share the work out.
    shards = random_federation(3, n_users=500, n_items=400, max_rows=60)
    states = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = start(shards)
        for t in range(2):
            state, _ = step(state, shards, t)
        states.append(state)
    assert_states_close(*states)


# Prediction -------------------------------------------------------------------------------


def test_a_round_trains_and_then_predicts_from_what_was_before_and_after():
    before, trained, moved = (start(SINGLE) for _ in range(3))
    delegates, seen = np.array([2, 5]), []

    def train(state, clients, t):
        seen.append(("train", state, clients, t))
        return trained, {"loss": 0.5, "bytes_up": 10}

    def predict(*arguments):
        seen.append(("predict", *arguments))
        return moved, {"prediction_active": True, "bytes_up": 3}

    def monitor(state, logs):
        return -logs["loss"] if state is trained else None

    state, logs = fedfnn_step(before, delegates, 7, train=train, predict=None, monitor=monitor)
    assert state is trained
    assert logs == {"loss": 0.5, "bytes_up": 10}
    state, logs = fedfnn_step(before, delegates, 7, train=train, predict=predict, monitor=monitor)
    assert state is moved
    assert logs == {"loss": 0.5, "bytes_up": 13, "prediction_active": True}
    one = ("train", before, delegates, 7)
    assert seen == [one, one, ("predict", before, trained, delegates, 7, -0.5)]


def with_watch(state, **changes):
    return replace(state, watch=PredictionWatch(**changes))


def others_of(shards, t):
    """Users of a round by default that do not take part in it."""
    delegates = set(users_of(shards, delegates_of(shards, t)))
    return [user for user in range(shards.n_users) if user not in delegates]


@STEPS_ON_FEDERATIONS
@pytest.mark.parametrize("anchor", [False, True])
def test_no_discount_is_no_prediction(shards, step, anchor):
    plain, _ = step(start(shards), shards, 0)
    found, logs = step(
        start(shards), shards, 0, predictor="mean", discount=0.0, gate=False, anchor=anchor
    )
    assert_states_close(replace(found, served=None), plain, tolerance=0.0)
    assert torch.equal(served_factors(found), plain.user_factors)
    assert logs["predicted_share"] > 0
    assert logs["predicted_norm"] == 0.0


@STEPS
@pytest.mark.parametrize("predictor", ["mean", "cluster", "linear", "mlp"])
@pytest.mark.parametrize(("anchor", "extra_inputs"), [(False, False), (True, True)])
def test_subordinates_move_by_the_discounted_prediction(step, predictor, anchor, extra_inputs):
    shards, t, first_round = SINGLE, 6, 4
    state = start(shards, first_round=first_round)
    times = torch.arange(shards.n_users, dtype=torch.float32) % 3
    state = replace(state, times_sampled=times)
    plain, _ = step(state, shards, t)
    found, logs = step(
        state, shards, t, predictor=predictor, gate=False, anchor=anchor, extra_inputs=extra_inputs
    )
    delegates, others = delegates_of(shards, t), others_of(shards, t)
    before = inputs = state.user_factors
    if extra_inputs:
        known = [
            [np.log(1 + len(items)), float(n > 0), np.log(1 + n)]
            for items, n in zip(items_by_user(shards), times.tolist(), strict=True)
        ]
        inputs = torch.cat([before, torch.tensor(known, dtype=torch.float32)], 1)
    prediction = predict_updates(
        predictor,
        inputs[delegates],
        plain.user_factors[delegates] - before[delegates],
        inputs[others],
        cv=5,
        gate=False,
        n_clusters=3,
        seed=STREAMS.key("meta_network", t) % 2**32,
    )
    served = served_factors(found)
    expected = 0.5 * 0.9 ** (t - first_round) * prediction.deltas
    torch.testing.assert_close((served - before)[others], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(served[delegates], plain.user_factors[delegates])
    if anchor:
        assert torch.equal(found.user_factors, plain.user_factors)
    else:
        assert found.served is None
    assert torch.equal(found.item_table, plain.item_table)
    assert logs["predictor_r2"] == pytest.approx(prediction.r2, abs=1e-4)
    assert logs["predictor_cosine"] == pytest.approx(prediction.cosine, abs=1e-4)
    assert logs["predictor_candidate"] == prediction.candidate
    assert logs["prediction_active"]
    assert logs["predicted_share"] == len(others) / shards.n_users
    lengths = [float(vector.norm()) for vector in expected]
    assert logs["predicted_norm"] == pytest.approx(np.mean(lengths), rel=1e-5)
    lengths = [float(vector.norm()) for vector in served]
    assert logs["user_norm"] == pytest.approx(np.mean(lengths), rel=1e-5)


@FEDERATIONS
def test_public_inputs_are_the_rows_of_a_user_and_how_often_it_took_part(shards):
    times = torch.arange(shards.n_users, dtype=torch.float32) % 4
    found = public_inputs(replace(start(shards), times_sampled=times), shards)
    assert found.shape == (shards.n_users, 3)
    for user, items in enumerate(items_by_user(shards)):
        expected = [np.log(1 + len(items)), float(user % 4 > 0), np.log(1 + user % 4)]
        assert found[user].tolist() == pytest.approx(expected, rel=1e-6)


@STEPS_ON_FEDERATIONS
def test_literal_predictions_pile_up_in_the_vectors_that_training_starts_from(step, shards):
    """Round by round from plain steps and the mean change of the delegates."""
    literal = {"predictor": "mean", **LITERAL, "patience": 100}
    state = expected = start(shards)
    for t in range(4):
        state, _ = step(state, shards, t, **literal)
        before = expected.user_factors
        expected, _ = step(expected, shards, t)
        delegates = users_of(shards, delegates_of(shards, t))
        changes = [expected.user_factors[user] - before[user] for user in delegates]
        users = expected.user_factors.clone()
        for user in others_of(shards, t):
            users[user] += 0.5 * 0.9**t * sum(changes) / len(changes)
        expected = replace(expected, user_factors=users, watch=state.watch)
        assert_states_close(state, expected)
        assert state.served is None


@STEPS_ON_FEDERATIONS
def test_anchored_predictions_are_served_and_never_trained_from(step, shards):
    """Training goes on as if there were no prediction; what is served starts from its vectors."""
    anchored = {"predictor": "mean", "gate": False, "patience": 100}
    state = plain = start(shards)
    for t in range(4):
        before = plain.user_factors
        state, _ = step(state, shards, t, **anchored)
        plain, _ = step(plain, shards, t)
        assert_states_close(replace(state, served=None), plain, tolerance=0.0)
        delegates = users_of(shards, delegates_of(shards, t))
        changes = [plain.user_factors[user] - before[user] for user in delegates]
        served = plain.user_factors.clone()
        for user in others_of(shards, t):
            # Not from what was served before: yesterday's error is not today's start.
            served[user] = before[user] + 0.5 * 0.9**t * sum(changes) / len(changes)
        torch.testing.assert_close(state.served, served, rtol=1e-5, atol=1e-5)


@STEPS
@pytest.mark.parametrize("reason", ["patience", "delegates", "gate"])
def test_served_predictions_last_when_a_later_round_predicts_nothing(step, reason):
    shards = SINGLE
    state, logs = step(start(shards), shards, 0, predictor="mean", gate=False)
    assert logs["predicted_share"] > 0
    served = state.served
    later = {
        "patience": {"patience": 1, "monitored": np.inf},
        "delegates": {"n_sampled": 4},
        "gate": {"gate": True},
    }[reason]
    if reason == "gate":  # nobody is left whom it would move
        state = replace(state, times_sampled=torch.ones(shards.n_users))
    after, logs = step(state, shards, 1, predictor="mean", **later)
    assert logs["prediction_active"] == (reason != "patience")
    assert logs.get("predicted_share", 0.0) == 0.0
    chosen = users_of(shards, sampled(shards, 1, STREAMS, later.get("n_sampled")))
    others = [user for user in range(shards.n_users) if user not in chosen]
    assert torch.equal(after.served[others], served[others])
    assert torch.equal(after.served[chosen], after.user_factors[chosen])
    assert (served[others] != after.user_factors[others]).any()
    length = float(after.served.norm(dim=1).mean())
    assert logs["user_norm"] == pytest.approx(length, rel=1e-6)


@STEPS
@pytest.mark.parametrize("anchor", [False, True])
def test_the_gate_weighs_by_confidence_and_moves_only_users_who_never_took_part(step, anchor):
    shards, t = SINGLE, 0
    state = start(shards)
    # Delegates that start alike move alike: an update that the mean explains well.
    delegates, others = delegates_of(shards, t), others_of(shards, t)
    users = state.user_factors.clone()
    users[delegates] = 3.0
    times = torch.arange(shards.n_users, dtype=torch.float32) % 3
    state = replace(state, user_factors=users, times_sampled=times)
    literal, _ = step(state, shards, t, predictor="mean", **LITERAL)
    gated, logs = step(state, shards, t, predictor="mean", gate=True, anchor=anchor)
    assert 0.2 < logs["predictor_r2"] < 1.0
    never = [user for user in others if times[user] == 0]
    rest = [user for user in others if times[user] > 0]
    assert never
    assert rest
    served = served_factors(gated)
    expected = logs["predictor_r2"] * (literal.user_factors - users)[never]
    torch.testing.assert_close((served - users)[never], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(served[rest], users[rest])
    assert (literal.user_factors[rest] != users[rest]).any(1).all()
    assert torch.equal(served[delegates], literal.user_factors[delegates])
    assert logs["predicted_share"] == len(never) / shards.n_users
    lengths = [float(vector.norm()) for vector in expected]
    assert logs["predicted_norm"] == pytest.approx(np.mean(lengths), rel=1e-4)


@STEPS
def test_the_gate_closes_where_the_predictor_explains_nothing(step):
    state = start(SINGLE)
    trained, _ = step(state, SINGLE, 0)
    delegates = np.array(delegates_of(SINGLE, 0))
    # Changes that cancel out: their mean, held out, is worse than zero.
    users = state.user_factors.clone()
    noise = torch.randn(len(delegates), N_FACTORS, generator=torch.Generator().manual_seed(0))
    users[delegates] += noise - noise.mean(0)
    arguments = {**PREDICTION, "monitored": 0.0, "predictor": "mean", "streams": STREAMS}
    found, logs = prediction_step(
        state, replace(trained, user_factors=users), SINGLE, delegates, 0, **arguments
    )
    assert logs["predictor_r2"] <= 0.0
    assert logs["predicted_share"] == logs["predicted_norm"] == 0.0
    assert torch.equal(found.served, users)


@STEPS_ON_FEDERATIONS
@pytest.mark.parametrize("changes", [LITERAL, {}], ids=["literal", "ours"])
def test_one_cluster_is_the_mean_in_whole_rounds(step, shards, changes):
    mean = cluster = start(shards)
    for t in range(3):
        arguments = {"n_clusters": 1, "patience": 100, **changes}
        mean, of_mean = step(mean, shards, t, predictor="mean", **arguments)
        cluster, of_cluster = step(cluster, shards, t, predictor="cluster", **arguments)
        assert_states_close(cluster, mean, tolerance=0.0)
        for logs in (of_mean, of_cluster):
            del logs["predictor_candidate"]
        assert of_cluster == of_mean
    assert changes == {} or of_mean["predicted_share"] > 0


@STEPS
def test_with_few_delegates_nobody_is_predicted(step):
    plain, _ = step(start(SINGLE), SINGLE, 0, n_sampled=4)
    found, logs = step(start(SINGLE), SINGLE, 0, n_sampled=4, predictor="mean", **LITERAL)
    assert_states_close(found, plain, tolerance=0.0)
    assert logs["predicted_share"] == logs["predicted_norm"] == 0.0
    assert logs["predictor_candidate"] == "none: 4 delegates"


@STEPS
@pytest.mark.parametrize("anchor", [False, True])
def test_with_full_participation_nobody_is_left_to_predict_for(step, anchor):
    size = SINGLE.n_clients
    plain, _ = step(start(SINGLE), SINGLE, 0, n_sampled=size)
    found, logs = step(start(SINGLE), SINGLE, 0, n_sampled=size, predictor="linear", anchor=anchor)
    assert_states_close(replace(found, served=None), plain, tolerance=0.0)
    assert torch.equal(served_factors(found), plain.user_factors)
    assert "nobody" in logs["predictor_candidate"]


@STEPS
@pytest.mark.parametrize("anchor", [False, True])
def test_patience_ends_prediction_for_good(step, anchor):
    # No loss can be lower than this one, so every round counts as one without improvement.
    state = with_watch(start(SINGLE), best_loss=-1.0)
    arguments = {"predictor": "mean", **LITERAL, "anchor": anchor, "patience": 2}
    state, logs = step(state, SINGLE, 0, **arguments)
    assert logs["prediction_active"]
    assert logs["predicted_share"] > 0
    state, logs = step(state, SINGLE, 1, **arguments)
    assert not logs["prediction_active"]
    assert "predicted_share" not in logs
    # A lower loss afterwards does not bring it back.
    state = replace(state, watch=replace(state.watch, best_loss=1e9))
    plain, _ = step(state, SINGLE, 2)
    found, logs = step(state, SINGLE, 2, **arguments)
    assert not logs["prediction_active"]
    assert logs["user_norm"] == pytest.approx(
        float(served_factors(found).norm(dim=1).mean()), rel=1e-6
    )
    assert torch.equal(found.user_factors, plain.user_factors)


@STEPS
def test_patience_watches_whatever_number_it_is_given(step):
    """A ranking metric times -1, say, that stops to fall while the loss still does."""
    state, active, waited, losses = start(SINGLE), [], [], []
    for t, monitored in enumerate([-0.1, -0.3, -0.3, -0.2, -0.9, -0.95]):
        state, logs = step(
            state, SINGLE, t, predictor="mean", gate=False, patience=2, monitored=monitored
        )
        active.append(logs["prediction_active"])
        waited.append(state.watch.waited)
        losses.append(logs["loss"])
    assert active == [True] * 3 + [False] * 3
    assert waited == [0, 0, 1, 2, 0, 0]
    assert state.watch.best_loss == -0.95
    assert min(losses) > 0  # and none of them is what was watched


@STEPS
def test_without_a_predictor_the_watch_and_the_log_say_nothing_of_it(step):
    state, logs = step(start(SINGLE), SINGLE, 0)
    assert state.watch == PredictionWatch()
    assert not [name for name in logs if name.startswith("predict")]
    assert state.served is None
    assert served_factors(state) is state.user_factors


@STEPS
@pytest.mark.parametrize("predictor", ["linear", "cluster"])
def test_prediction_costs_the_delegates_vectors(step, predictor):
    """It happens on the server; of plain BCE rounds the other bytes are those of FedAvg."""
    plain, more = start(SINGLE), start(SINGLE)
    fedavg = {"item_weighting": "fedavg"} if step is bce else {}
    for t in range(2):
        plain, without = step(plain, SINGLE, t, **fedavg)
        more, logs = step(more, SINGLE, t, predictor=predictor, **LITERAL)
        assert logs["predicted_share"] > 0
        vectors = 4 * len(delegates_of(SINGLE, t)) * N_FACTORS
        assert logs["bytes_up"] == without["bytes_up"] + vectors
        assert logs["bytes_down"] == without["bytes_down"] > 0


def test_when_prediction_is_over_no_vectors_are_sent():
    state, found = start(SINGLE), []
    for t in range(3):
        _, without = bce(state, SINGLE, t)
        state, logs = bce(
            state, SINGLE, t, predictor="linear", patience=1, monitored=0.5, **LITERAL
        )
        found.append((logs["prediction_active"], logs["bytes_up"] > without["bytes_up"]))
    assert found == [(True, True), (False, False), (False, False)]


# Data with an obvious answer --------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "n_rounds", "changes"),
    [
        (bce, 40, {"optimizer": Optimizer("sgd", 0.3), "local_epochs": 3}),
        (bce, 40, {"optimizer": Optimizer("sgd", 0.3), "predictor": "mlp"}),
        (bce, 40, {"optimizer": Optimizer("sgd", 0.3), "predictor": "mlp", **LITERAL}),
        (newton, 15, {"optimizer": Optimizer("sgd", 0.3)}),
        (newton, 15, {"optimizer": Optimizer("sgd", 0.3), "predictor": "linear"}),
        (exact, 15, {"server_learning_rate": None}),
        (exact, 15, {"server_learning_rate": None, "predictor": "mlp"}),
    ],
)
def test_even_users_like_even_items(step, n_rounds, changes):
    n_users, n_items = 40, 30
    rng = np.random.default_rng(0)
    taste = [np.arange(user % 2, n_items, 2) for user in range(n_users)]
    items = [rng.choice(own, 8, replace=False) for own in taste]
    shards = federation_of([own.tolist() for own in items], n_items)
    state = start(shards)
    losses = []
    for t in range(n_rounds):
        state, logs = step(state, shards, t, **changes)
        losses.append(logs["loss"])
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    users = refitted(state, shards, step)
    scores = (users @ state.item_table[:, :N_FACTORS].T).numpy()
    right = 0
    for user in range(n_users):
        unseen = np.setdiff1d(np.arange(n_items), items[user])
        liked = np.isin(unseen, taste[user])
        best = unseen[np.argsort(-scores[user, unseen])[: liked.sum()]]
        right += np.isin(best, taste[user]).mean()
    assert right / n_users > 0.9


def refitted(state: FactorState, shards: ClientShards, step):
    everybody = np.arange(shards.n_clients)
    if step is exact:
        return refit_whole_data(
            state, shards, everybody, unobserved_weight=W0, penalty=PENALTY, mean_rows=8.0
        )
    return refit_bce(
        state,
        shards,
        everybody,
        item_bias=False,
        n_negatives=3,
        n_steps=20,
        l2=0.02,
        streams=STREAMS,
    )
