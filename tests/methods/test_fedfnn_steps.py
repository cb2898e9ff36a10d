from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.sampling import uniform_cohort
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.fedfnn import (
    FactorState,
    PredictionWatch,
    bce_step,
    prediction_step,
    random_factors,
    refit_bce,
    refit_whole_data,
    whole_data_step,
)
from fedrecsk.methods.meta_network import predict_updates
from fedrecsk.models import whole_data
from tests.reference import whole_data_reference
from tests.reference.federations import federation_of, items_by_user, random_federation
from tests.reference.sampled_bce_reference import aggregate, torch_optimizer, train_cohort

N_FACTORS = 4
ADD = Optimizer("sgd", 1.0)  # on the server: add the aggregated change
PENALTY = whole_data.Penalty(0.2, 0.5)
W0 = 0.15
STREAMS = Streams(11)
SINGLE = random_federation(0, n_users=30, n_items=25)
SHARED = random_federation(1, n_users=24, n_items=20, n_clients=9)
FEDERATIONS = pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["single", "shared"])
PREDICTION = {
    "discount": 0.5,
    "discount_decay": 0.9,
    "cv": 5,
    "patience": 3,
    "gate": True,
    "n_clusters": 3,
}


def start(shards, *, item_bias=False, server=ADD, first_round=0):
    users, table = random_factors(
        shards.n_users,
        shards.n_items,
        N_FACTORS,
        item_bias=item_bias,
        init_scale=0.6,
        streams=STREAMS,
        device=shards.device,
    )
    return FactorState.start(users, table, server, first_round=first_round)


def sampled(shards, t, streams, n_sampled):
    size = shards.n_clients // 2 if n_sampled is None else n_sampled
    return uniform_cohort(shards.n_clients, size, streams.numpy("sampling", t))


def bce(state, shards, t, *, streams=STREAMS, n_sampled=None, predictor=None, **changes):
    """One round of BCE, by default of half of the clients and without prediction."""
    delegates = sampled(shards, t, streams, n_sampled)
    prediction = {name: changes.pop(name, value) for name, value in PREDICTION.items()}
    arguments = {
        "item_weighting": "count",
        "item_bias": state.item_table.shape[1] > N_FACTORS,
        "n_negatives": 2,
        "batch_size": 9,
        "local_epochs": 2,
        "optimizer": Optimizer("sgd", 0.1),
        "l2": 0.02,
        "server_optimizer": ADD,
        **changes,
    }
    trained, logs = bce_step(state, shards, delegates, t, streams=streams, **arguments)
    return predicted(state, trained, logs, shards, delegates, t, streams, predictor, prediction)


def exact(state, shards, t, *, streams=STREAMS, n_sampled=None, predictor=None, **changes):
    """One round of the whole-data objective, likewise."""
    delegates = sampled(shards, t, streams, n_sampled)
    prediction = {name: changes.pop(name, value) for name, value in PREDICTION.items()}
    arguments = {
        "unobserved_weight": W0,
        "penalty": PENALTY,
        "server_learning_rate": 0.5,
        "decay": 0.8,
        "item_curvature": True,
        **changes,
    }
    trained, logs = whole_data_step(state, shards, delegates, t, **arguments)
    return predicted(state, trained, logs, shards, delegates, t, streams, predictor, prediction)


def predicted(before, trained, logs, shards, delegates, t, streams, predictor, prediction):
    """The second half of a round, if there is one."""
    if predictor is None:
        return trained, logs
    kept = {name: value.clone() for name, value in tensors_of(trained).items()}
    state, more = prediction_step(
        before,
        trained,
        shards,
        delegates,
        t,
        loss=logs["loss"],
        streams=streams,
        predictor=predictor,
        **prediction,
    )
    for name, value in tensors_of(trained).items():
        assert torch.equal(value, kept[name]), name  # prediction leaves its arguments alone
    return state, {**logs, **more}


STEPS = pytest.mark.parametrize("step", [bce, exact], ids=["bce", "whole-data"])


def delegates_of(shards, t):
    """Clients of a round by default."""
    return sampled(shards, t, STREAMS, None).tolist()


def users_of(shards, clients):
    return shards.users_of(np.asarray(clients)).tolist()


def tensors_of(state):
    """Every tensor in a state, by name."""
    moments, statistics = state.moments, state.statistics
    return {
        "user_factors": state.user_factors,
        "item_table": state.item_table,
        "times_sampled": state.times_sampled,
        "steps": moments.steps,
        **{f"first {name}": value for name, value in moments.first.items()},
        **{f"second {name}": value for name, value in moments.second.items()},
        "gram": statistics.gram,
        "counts": statistics.counts,
        "curvature": statistics.curvature,
    }


def assert_states_close(found, expected, tolerance=1e-5):
    """Compare states, relative to the largest value of each tensor."""
    for (name, ours), theirs in zip(
        tensors_of(found).items(), tensors_of(expected).values(), strict=True
    ):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(
            ours, theirs, rtol=0.0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# Rounds against loops over clients --------------------------------------------------------


@FEDERATIONS
@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("item_weighting", ["count", "magnitude", "interactions", "fedavg"])
def test_bce_rounds_are_loops_over_clients(shards, item_weighting, item_bias):
    """With ``item_weighting="fedavg"`` and no predictor this is FedAvg."""
    state = start(shards, item_bias=item_bias)
    client_rows = dict(enumerate(shards.client_rows.tolist()))
    for t in range(3):
        users, table = state.user_factors.clone(), state.item_table.clone()
        clients = delegates_of(shards, t)
        updates = train_cohort(
            shards,
            clients,
            users,
            table,
            item_bias=item_bias,
            n_negatives=2,
            batch_size=9,
            local_epochs=2,
            optimizer=Optimizer("sgd", 0.1),
            l2=0.02,
            key=STREAMS.key("examples", t),
        )
        for update in updates.values():
            for user, vector in update.user_vectors.items():
                users[user] = vector
        for item, change in aggregate(updates, client_rows, table, item_weighting).items():
            table[item] += change

        before = state
        state, logs = bce(state, shards, t, item_weighting=item_weighting)
        torch.testing.assert_close(state.user_factors, users, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.item_table, table, rtol=1e-5, atol=1e-5)
        assert not torch.equal(state.item_table, before.item_table)
        n_examples = sum(update.n_examples for update in updates.values())
        loss = sum(update.loss for update in updates.values()) / n_examples
        assert logs["loss"] == pytest.approx(loss, rel=1e-5)
        assert logs["clients"] == len(clients)
        times = before.times_sampled.clone()
        times[users_of(shards, clients)] += 1
        assert torch.equal(state.times_sampled, times)


@pytest.mark.parametrize("server", [Optimizer("adam", 0.05), Optimizer("momentum", 0.7)], ids=str)
def test_the_server_optimiser_steps_the_rows_that_were_touched(server):
    """One optimiser of torch's own for each item; only touched items make a step."""
    shards = random_federation(2, n_users=20, n_items=60, max_rows=3)
    state = start(shards, server=server)
    rows = [row.clone().requires_grad_(True) for row in state.item_table]
    optimizers = [torch_optimizer([row], server) for row in rows]
    client_rows = dict(enumerate(shards.client_rows.tolist()))
    touched = []
    for t in range(3):
        updates = train_cohort(
            shards,
            delegates_of(shards, t),
            state.user_factors,
            state.item_table,
            item_bias=False,
            n_negatives=2,
            batch_size=9,
            local_epochs=2,
            optimizer=Optimizer("sgd", 0.1),
            l2=0.02,
            key=STREAMS.key("examples", t),
        )
        changes = aggregate(updates, client_rows, state.item_table, "count")
        for item, change in changes.items():
            rows[item].grad = -change
            optimizers[item].step()
        touched.append(set(changes))
        state, _ = bce(state, shards, t, server_optimizer=server)
        expected = torch.stack([row.detach() for row in rows])
        torch.testing.assert_close(state.item_table, expected, rtol=1e-5, atol=2e-5)
    assert touched[0] != touched[1]
    assert set.union(*touched) != set(range(shards.n_items))


@FEDERATIONS
@pytest.mark.parametrize("item_curvature", [True, False])
def test_whole_data_rounds_are_loops_over_users(shards, item_curvature):
    state = start(shards)
    items = items_by_user(shards)
    mean_user, mean_item = (len(shards.items) / n for n in (shards.n_users, shards.n_items))
    smooth, weight = {"gram": 0.0, "counts": 0.0, "curvature": 0.0}, 0.0
    for t in range(3):
        users = state.user_factors.double().numpy().copy()
        table = state.item_table.double().numpy()
        chosen = users_of(shards, delegates_of(shards, t))
        own = [items[user] for user in chosen]
        users[chosen] = whole_data_reference.solve_users(
            own, table, W0, PENALTY.l2, PENALTY.exponent, mean_user
        )
        sums = whole_data_reference.totals(own, users[chosen], table, W0)
        scale = shards.n_users / len(chosen)
        weight = 0.8 * weight + 0.2
        for name in smooth:
            smooth[name] = 0.8 * smooth[name] + 0.2 * scale * getattr(sums, name)
        mean = {name: value / weight for name, value in smooth.items()}
        ridge = np.array(
            [
                whole_data_reference.strength(count, mean_item, PENALTY.l2, PENALTY.exponent)
                for count in mean["counts"]
            ]
        )
        table = whole_data_reference.dense_step(
            table,
            whole_data_reference.gradient(table, sums, scale, W0, ridge),
            **mean,
            n_users=shards.n_users,
            w0=W0,
            ridge=ridge,
            rate=0.5,
            item_curvature=item_curvature,
        )

        times = state.times_sampled.clone()
        times[chosen] += 1
        state, logs = exact(state, shards, t, item_curvature=item_curvature)
        np.testing.assert_allclose(state.user_factors, users, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.item_table, table, rtol=1e-5, atol=1e-5)
        n_rows = sum(len(rows) for rows in own)
        assert logs["loss"] == pytest.approx(sums.loss / n_rows, rel=1e-5)
        assert logs["clients"] == len(delegates_of(shards, t))
        assert torch.equal(state.times_sampled, times)


@FEDERATIONS
def test_the_default_server_rate_follows_the_participation_of_users(shards):
    state = start(shards, first_round=4)
    for t in (4, 5):
        share = len(users_of(shards, delegates_of(shards, t))) / shards.n_users
        rate = whole_data.default_rate(share, t - 4)
        expected, _ = exact(state, shards, t, server_learning_rate=rate)
        state, _ = exact(state, shards, t, server_learning_rate=None)
        assert torch.equal(state.item_table, expected.item_table)


# What must not matter ---------------------------------------------------------------------


@STEPS
@FEDERATIONS
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


@STEPS
@FEDERATIONS
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


@STEPS
@FEDERATIONS
@pytest.mark.parametrize("predictor", [None, "mean", "mlp"])
def test_a_step_leaves_its_state_alone(shards, step, predictor):
    server = Optimizer("adam", 0.05)
    state = start(shards, server=server)
    changes = {"server_optimizer": server} if step is bce else {}
    for t in range(2):
        copies = {name: value.clone() for name, value in tensors_of(state).items()}
        watch, weight = state.watch, state.statistics.weight
        after, _ = step(state, shards, t, predictor=predictor, gate=False, **changes)
        for name, value in tensors_of(state).items():
            assert torch.equal(value, copies[name]), name
        assert (state.watch, state.statistics.weight) == (watch, weight)
        assert not torch.equal(after.user_factors, state.user_factors)
        state = after


@pytest.mark.threads
@STEPS
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


def with_watch(state, **changes):
    return replace(state, watch=PredictionWatch(**changes))


@STEPS
@FEDERATIONS
def test_no_discount_is_no_prediction(shards, step):
    plain, _ = step(start(shards), shards, 0)
    found, logs = step(start(shards), shards, 0, predictor="mean", discount=0.0, gate=False)
    assert_states_close(found, plain, tolerance=0.0)
    assert logs["predicted_share"] > 0


@STEPS
@pytest.mark.parametrize("predictor", ["mean", "cluster", "linear", "mlp"])
def test_subordinates_move_by_the_discounted_prediction(step, predictor):
    shards, t, first_round = SINGLE, 6, 4
    state = start(shards, first_round=first_round)
    plain, _ = step(state, shards, t)
    found, logs = step(state, shards, t, predictor=predictor, gate=False)
    delegates = delegates_of(shards, t)
    others = [user for user in range(shards.n_users) if user not in delegates]
    before = state.user_factors
    prediction = predict_updates(
        predictor,
        before[delegates],
        plain.user_factors[delegates] - before[delegates],
        before[others],
        cv=5,
        gate=False,
        n_clusters=3,
        seed=STREAMS.key("meta_network", t) % 2**32,
    )
    moved = found.user_factors - before
    expected = 0.5 * 0.9 ** (t - first_round) * prediction.deltas
    torch.testing.assert_close(moved[others], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.user_factors[delegates], plain.user_factors[delegates])
    assert torch.equal(found.item_table, plain.item_table)
    assert logs["predictor_r2"] == prediction.r2
    assert logs["predictor_cosine"] == prediction.cosine
    assert logs["predictor_candidate"] == prediction.candidate
    assert logs["prediction_active"]
    assert logs["predicted_share"] == len(others) / shards.n_users


@STEPS
def test_the_gate_weighs_by_confidence_and_by_how_often_a_user_took_part(step):
    shards, t = SINGLE, 0
    state = start(shards)
    # Delegates that start alike move alike: an update that the mean explains well.
    delegates = delegates_of(shards, t)
    users = state.user_factors.clone()
    users[delegates] = 3.0
    times = torch.arange(shards.n_users, dtype=torch.float32) % 4
    state = replace(state, user_factors=users, times_sampled=times)
    literal, _ = step(state, shards, t, predictor="mean", gate=False)
    gated, logs = step(state, shards, t, predictor="mean", gate=True)
    assert 0.2 < logs["predictor_r2"] < 1.0
    others = [user for user in range(shards.n_users) if user not in delegates]
    confidence = logs["predictor_r2"] / (1.0 + times[others])
    expected = confidence[:, None] * (literal.user_factors - users)[others]
    torch.testing.assert_close((gated.user_factors - users)[others], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(gated.user_factors[delegates], literal.user_factors[delegates])


@STEPS
def test_with_few_delegates_nobody_is_predicted(step):
    plain, _ = step(start(SINGLE), SINGLE, 0, n_sampled=4)
    found, logs = step(start(SINGLE), SINGLE, 0, n_sampled=4, predictor="mean", gate=False)
    assert_states_close(found, plain, tolerance=0.0)
    assert logs["predicted_share"] == 0.0
    assert logs["predictor_candidate"] == "none: 4 delegates"


@STEPS
def test_with_full_participation_nobody_is_left_to_predict_for(step):
    size = SINGLE.n_clients
    plain, _ = step(start(SINGLE), SINGLE, 0, n_sampled=size)
    found, logs = step(start(SINGLE), SINGLE, 0, n_sampled=size, predictor="linear")
    assert_states_close(found, plain, tolerance=0.0)
    assert "nobody" in logs["predictor_candidate"]


@STEPS
def test_patience_ends_prediction_for_good(step):
    # No loss can be lower than this one, so every round counts as one without improvement.
    state = with_watch(start(SINGLE), best_loss=-1.0)
    arguments = {"predictor": "mean", "gate": False, "patience": 2}
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
    assert torch.equal(found.user_factors, plain.user_factors)


def test_the_watch_counts_rounds_without_a_lower_loss():
    watch = PredictionWatch()
    waited, active = [], []
    for loss in [1.0, 1.0, 0.9, 0.95, 0.9, 0.8, 0.8, 0.85, 0.9, 0.1, 0.2]:
        watch = watch.after(loss, patience=3)
        waited.append(watch.waited)
        active.append(watch.active)
    assert waited == [0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert active == [True] * 8 + [False] * 3
    assert watch.best_loss == 0.1


@STEPS
def test_without_a_predictor_the_watch_and_the_log_say_nothing_of_it(step):
    state, logs = step(start(SINGLE), SINGLE, 0)
    assert state.watch == PredictionWatch()
    assert not [name for name in logs if name.startswith("predict")]


# Traffic ----------------------------------------------------------------------------------


@FEDERATIONS
@pytest.mark.parametrize("optimizer", [Optimizer("sgd", 0.1), Optimizer("adam", 0.1)], ids=str)
@pytest.mark.parametrize("item_bias", [False, True])
def test_bytes_of_a_bce_round(shards, optimizer, item_bias):
    t = 1
    _, logs = bce(start(shards, item_bias=item_bias), shards, t, optimizer=optimizer)
    updates = train_cohort(
        shards,
        delegates_of(shards, t),
        torch.zeros(shards.n_users, N_FACTORS),
        torch.zeros(shards.n_items, N_FACTORS),
        item_bias=False,
        n_negatives=2,
        batch_size=9,
        local_epochs=0,
        optimizer=optimizer,
        l2=0.0,
        key=STREAMS.key("examples", t),
    )
    width = N_FACTORS + item_bias
    # Down: the table to each delegate. Up: each private row, with its number.
    assert logs["bytes_down"] == len(updates) * 4 * shards.n_items * width
    rows = sum(len(update.deltas) for update in updates.values())
    assert logs["bytes_up"] == rows * 4 * (width + 1)


@FEDERATIONS
@pytest.mark.parametrize("item_curvature", [True, False])
def test_bytes_of_a_whole_data_round(shards, item_curvature):
    _, logs = exact(start(shards), shards, 1, item_curvature=item_curvature)
    delegates, items = delegates_of(shards, 1), items_by_user(shards)
    square = N_FACTORS**2
    down = 4 * (shards.n_items * N_FACTORS + square)
    assert logs["bytes_down"] == len(delegates) * down
    up = 0
    for client in delegates:
        # One row per distinct item: pull, count and perhaps curvature, and the row's number.
        distinct = {item for user in users_of(shards, [client]) for item in items[user]}
        up += len(distinct) * 4 * (N_FACTORS + 2 + item_curvature) + 4 * square
    assert logs["bytes_up"] == up


# Starting and refitting -------------------------------------------------------------------


@pytest.mark.parametrize("item_bias", [False, True])
def test_random_factors_have_the_scale_asked_for_and_no_bias(item_bias):
    arguments = {
        "item_bias": item_bias,
        "init_scale": 0.3,
        "device": torch.device("cpu"),
    }
    users, table = random_factors(400, 300, 8, streams=Streams(0), **arguments)
    assert users.shape == (400, 8)
    assert table.shape == (300, 8 + item_bias)
    for values in (users, table[:, :8]):
        assert values.std() == pytest.approx(0.3, rel=0.05)
        assert abs(values.mean()) < 5 * 0.3 / np.sqrt(values.numel())
    assert torch.equal(table[:, 8:], torch.zeros(300, int(item_bias)))
    again, _ = random_factors(400, 300, 8, streams=Streams(0), **arguments)
    other, _ = random_factors(400, 300, 8, streams=Streams(1), **arguments)
    assert torch.equal(users, again)
    assert not torch.equal(users, other)
    assert abs(np.corrcoef(users[:300].flatten(), table[:, :8].flatten())[0, 1]) < 0.1


@FEDERATIONS
def test_refit_solves_the_asked_clients_against_the_final_table(shards):
    state, _ = exact(start(shards), shards, 0)
    clients = np.arange(0, shards.n_clients, 2)
    mean_rows = len(shards.items) / shards.n_users
    found = refit_whole_data(
        state, shards, clients, unobserved_weight=W0, penalty=PENALTY, mean_rows=mean_rows
    )
    expected = state.user_factors.double().numpy().copy()
    chosen, items = users_of(shards, clients), items_by_user(shards)
    expected[chosen] = whole_data_reference.solve_users(
        [items[user] for user in chosen],
        state.item_table.double().numpy(),
        W0,
        PENALTY.l2,
        PENALTY.exponent,
        mean_rows,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@FEDERATIONS
def test_refit_of_bce_moves_the_asked_clients_only_whatever_the_chunks(shards, monkeypatch):
    state, _ = bce(start(shards, item_bias=True), shards, 0)
    before = state.user_factors.clone()
    arguments = {"item_bias": True, "n_negatives": 3, "n_steps": 5, "l2": 0.05, "streams": STREAMS}
    clients = np.arange(0, shards.n_clients, 2)
    found = refit_bce(state, shards, clients, **arguments)
    asked = users_of(shards, clients)
    moved = (found != before).any(1)
    assert torch.nonzero(moved)[:, 0].tolist() == sorted(asked)
    assert torch.equal(state.user_factors, before)
    monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", 1)
    torch.testing.assert_close(refit_bce(state, shards, clients, **arguments), found)


# Data with an obvious answer --------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "n_rounds", "changes"),
    [
        (bce, 40, {"optimizer": Optimizer("sgd", 0.3), "local_epochs": 3}),
        (bce, 40, {"optimizer": Optimizer("sgd", 0.3), "predictor": "mlp"}),
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
