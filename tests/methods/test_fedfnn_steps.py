from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.rounds import read_logs
from fedrecsk.engine.sampling import epoch_cohort, uniform_cohort
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.fedfnn import (
    FactorState,
    PredictionWatch,
    bce_step,
    draw_delegates,
    prediction_step,
    public_inputs,
    refit_bce,
    refit_whole_data,
    served_factors,
    whole_data_step,
)
from fedrecsk.methods.meta_network import predict_updates
from fedrecsk.models import whole_data
from fedrecsk.models.factors import random_factors
from fedrecsk.models.head import init_head
from tests.reference import bce_newton_reference, ncf_reference, whole_data_reference
from tests.reference.federations import federation_of, items_by_user, random_federation
from tests.reference.sampled_bce_reference import (
    ClientUpdate,
    aggregate,
    torch_optimizer,
    train_cohort,
)

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
    "anchor": True,
    "extra_inputs": True,
    "n_clusters": 3,
    "monitored": None,  # the loss
}
LITERAL = {"gate": False, "anchor": False, "extra_inputs": False}


def start(shards, *, item_bias=False, server=ADD, first_round=0, neural=False):
    users, table = random_factors(
        shards.n_users,
        shards.n_items,
        N_FACTORS,
        item_bias=item_bias,
        init_scale=0.6,
        streams=STREAMS,
        device=shards.device,
    )
    head = init_head(N_FACTORS, hidden=(3, 3), streams=STREAMS) if neural else None
    return FactorState.start(
        users, table, server, n_clients=shards.n_clients, head=head, first_round=first_round
    )


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
    """The second half of a round, if there is one, with what the loop over rounds reads."""
    logs = read_logs(logs)
    if predictor is None:
        return trained, logs
    prediction = dict(prediction)
    monitored = prediction.pop("monitored")
    kept = {name: value.clone() for name, value in tensors_of(trained).items()}
    state, more = prediction_step(
        before,
        trained,
        shards,
        delegates,
        t,
        monitored=logs["loss"] if monitored is None else monitored,
        streams=streams,
        predictor=predictor,
        **prediction,
    )
    for name, value in tensors_of(trained).items():
        assert torch.equal(value, kept[name]), name  # prediction leaves its arguments alone
    return state, {**logs, **more}


# The quasi-Newton step is for clients of one user.
newton = partial(bce, server_optimizer=None)
STEPS = pytest.mark.parametrize("step", [bce, exact, newton], ids=["bce", "whole-data", "newton"])
STEPS_ON_FEDERATIONS = pytest.mark.parametrize(
    ("step", "shards"),
    [(bce, SINGLE), (bce, SHARED), (exact, SINGLE), (exact, SHARED), (newton, SINGLE)],
    ids=["bce-single", "bce-shared", "whole-data-single", "whole-data-shared", "newton"],
)


def delegates_of(shards, t):
    """Clients of a round by default."""
    return sampled(shards, t, STREAMS, None).tolist()


def users_of(shards, clients):
    return shards.users_of(np.asarray(clients)).tolist()


def tensors_of(state):
    """Every tensor in a state, by name."""
    moments, statistics = state.moments, state.statistics
    head = state.head_moments
    served = {} if state.served is None else {"served": state.served}
    return {
        "user_factors": state.user_factors,
        **served,
        **{f"head {name}": value for name, value in state.head.items()},
        **({f"head first {name}": value for name, value in head.first.items()} if head else {}),
        "turns": torch.from_numpy(state.turns),
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
    assert tensors_of(found).keys() == tensors_of(expected).keys()
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
    for t in range(2):
        users, table = state.user_factors.clone(), state.item_table.clone()
        clients = sampled(shards, t, STREAMS, 6).tolist()
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
        state, logs = bce(state, shards, t, n_sampled=6, item_weighting=item_weighting)
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
        turns = before.turns.copy()
        turns[clients] += 1
        assert state.turns.tolist() == turns.tolist()


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


@pytest.mark.parametrize(
    ("n_sampled", "forgetting", "item_bias", "rows"),
    [
        (None, None, False, None),
        (None, None, True, 40),
        (None, 0.3, True, None),
        (None, 1.0, False, 40),
        (3, None, True, None),
        (30, None, False, None),  # everybody
    ],
)
def test_newton_rounds_are_loops_over_clients_and_items(
    n_sampled, forgetting, item_bias, rows, monkeypatch
):
    """Three delegates span less than all columns."""
    if rows is not None:
        monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)
    shards, first_round = SINGLE, 5
    state = start(shards, item_bias=item_bias, server=None, first_round=first_round)
    evidence = bce_newton_reference.Evidence.none(shards.n_items)
    share = (shards.n_clients // 2 if n_sampled is None else n_sampled) / shards.n_clients
    local = {"optimizer": Optimizer("sgd", 0.1), "local_epochs": 2}
    for t in range(first_round, first_round + 2):
        users, table = state.user_factors.clone(), state.item_table.double().numpy()
        updates = train_cohort(
            shards,
            sampled(shards, t, STREAMS, n_sampled).tolist(),
            users,
            state.item_table,
            item_bias=item_bias,
            n_negatives=2,
            batch_size=9,
            l2=0.02,
            key=STREAMS.key("examples", t),
            **local,
        )
        rho = whole_data.steady_rate(share, t) if forgetting is None else forgetting
        bce_newton_reference.collect(evidence, updates, table, item_bias=item_bias, forgetting=rho)
        table = bce_newton_reference.dense_step(
            table,
            bce_newton_reference.gradient(updates, table, **local),
            gram=bce_newton_reference.mean_gram(evidence.grams, 0.7),
            counts=evidence.counts,
            curvature=evidence.curvature,
            l2=0.02,
        )
        for update in updates.values():
            for user, vector in update.user_vectors.items():
                users[user] = vector

        state, logs = newton(
            state, shards, t, n_sampled=n_sampled, forgetting=forgetting, decay=0.7, **local
        )
        torch.testing.assert_close(state.user_factors, users, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.item_table, table, rtol=1e-5, atol=1e-5)
        statistics = state.statistics
        np.testing.assert_allclose(statistics.counts, evidence.counts, rtol=1e-5)
        np.testing.assert_allclose(statistics.curvature, evidence.curvature, rtol=1e-5)
        loss = sum(update.loss for update in updates.values())
        n_examples = sum(update.n_examples for update in updates.values())
        assert logs["loss"] == pytest.approx(loss / n_examples, rel=1e-5)


def test_newton_rounds_leave_an_item_alone_that_no_client_has_examples_of():
    shards = random_federation(2, n_users=20, n_items=60, max_rows=3)
    state, ever = start(shards, server=None), set()
    first = state.item_table
    for t in range(3):
        before = state.item_table
        state, _ = newton(state, shards, t, n_sampled=5)
        updates = train_cohort(
            shards,
            sampled(shards, t, STREAMS, 5).tolist(),
            torch.zeros(shards.n_users, N_FACTORS),
            before,
            item_bias=False,
            n_negatives=2,
            batch_size=9,
            local_epochs=0,
            optimizer=ADD,
            l2=0.0,
            key=STREAMS.key("examples", t),
        )
        touched = {item for update in updates.values() for item in update.deltas}
        ever |= touched
        moved = torch.nonzero((state.item_table != before).any(1))[:, 0].tolist()
        assert set(moved) == touched
    never = sorted(set(range(shards.n_items)) - ever)
    assert never
    assert torch.equal(state.item_table[never], first[never])
    assert not state.statistics.counts[never].any()
    assert not state.statistics.curvature[never].any()
    assert state.statistics.counts[sorted(ever)].all()


@FEDERATIONS
@pytest.mark.parametrize(("item_weighting", "item_bias"), [("magnitude", True), ("fedavg", False)])
def test_rounds_with_a_head_are_loops_over_clients(shards, item_weighting, item_bias):
    """The head moves by the clients' mean change, weighted by interactions."""
    state = start(shards, item_bias=item_bias, neural=True)
    client_rows = dict(enumerate(shards.client_rows.tolist()))
    for t in range(2):
        users, table = state.user_factors.clone(), state.item_table.clone()
        clients = delegates_of(shards, t)
        updates = head_updates(state, shards, t, item_bias=item_bias)
        changed = {client: change_of(update, table) for client, update in updates.items()}
        total = sum(client_rows[client] for client in clients)
        head = {name: torch.zeros_like(value) for name, value in state.head.items()}
        for client, update in updates.items():
            for name, value in update.head.items():
                head[name] += client_rows[client] / total * value
            for user, vector in update.user_vectors.items():
                users[user] = vector
        for item, change in aggregate(changed, client_rows, table, item_weighting).items():
            table[item] += change

        before = state
        state, logs = bce(state, shards, t, item_weighting=item_weighting)
        torch.testing.assert_close(state.user_factors, users, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.item_table, table, rtol=1e-5, atol=1e-5)
        for name, value in head.items():
            torch.testing.assert_close(state.head[name], value, rtol=1e-5, atol=1e-5)
            assert not torch.equal(state.head[name], before.head[name])
        n_examples = sum(update.n_examples for update in updates.values())
        loss = sum(update.loss for update in updates.values()) / n_examples
        assert logs["loss"] == pytest.approx(loss, rel=1e-5)


def head_updates(state, shards, t, *, item_bias):
    """What the clients of a round hold after training on their own with a head."""
    return ncf_reference.train_cohort(
        shards,
        delegates_of(shards, t),
        state.user_factors,
        state.item_table,
        state.head,
        item_bias=item_bias,
        n_negatives=2,
        batch_size=9,
        local_epochs=2,
        optimizer=Optimizer("sgd", 0.1),
        l2=0.02,
        key=STREAMS.key("examples", t),
    )


def change_of(update, table):
    """An update as `aggregate` wants it."""
    deltas = {item: row - table[item] for item, row in update.rows.items()}
    return ClientUpdate(update.user_vectors, deltas, update.loss, update.n_examples)


@pytest.mark.parametrize(
    "server", [Optimizer("sgd", 0.4), Optimizer("momentum", 0.7), Optimizer("adam", 0.05)], ids=str
)
def test_the_server_optimiser_steps_the_head(server):
    """It takes the mean change as a negative gradient, as torch's own does."""
    shards = SHARED
    state = start(shards, server=server, neural=True)
    head = {name: value.clone().requires_grad_(True) for name, value in state.head.items()}
    optimizer = torch_optimizer(list(head.values()), server)
    for t in range(2):
        updates = head_updates(state, shards, t, item_bias=False)
        rows = {client: float(shards.client_rows[client]) for client in updates}
        for name, value in head.items():
            value.grad = torch.zeros_like(value)
            for client, update in updates.items():
                change = update.head[name] - state.head[name]
                value.grad -= rows[client] / sum(rows.values()) * change
        optimizer.step()
        state, _ = bce(state, shards, t, server_optimizer=server)
        for name, value in head.items():
            torch.testing.assert_close(
                state.head[name], value.detach(), rtol=1e-5, atol=2e-5, msg=name
            )


@FEDERATIONS
@pytest.mark.parametrize("neural", [False, True], ids=["mf", "ncf"])
def test_fedavg_is_no_predictor_and_the_mean_of_whole_models(shards, neural):
    """Each client sends back all that it got; the server weighs by interactions."""
    state = start(shards, item_bias=True, neural=neural)
    for t in range(2):
        clients = delegates_of(shards, t)
        rows = shards.client_rows[clients]
        table = torch.zeros_like(state.item_table)
        head = {name: torch.zeros_like(value) for name, value in state.head.items()}
        for client, share in zip(clients, rows / rows.sum(), strict=True):
            alone, _ = bce_step(state, shards, np.array([client]), t, streams=STREAMS, **FEDAVG)
            table += share * alone.item_table
            for name, value in alone.head.items():
                head[name] += share * value
        state, logs = bce_step(state, shards, np.array(clients), t, streams=STREAMS, **FEDAVG)
        torch.testing.assert_close(state.item_table, table, rtol=1e-5, atol=1e-5)
        for name, value in head.items():
            torch.testing.assert_close(state.head[name], value, rtol=1e-5, atol=1e-5)
        assert state.served is None
        assert state.watch == PredictionWatch()
        assert not [name for name in logs if "predict" in name]


FEDAVG = {
    "item_weighting": "fedavg",
    "item_bias": True,
    "n_negatives": 2,
    "batch_size": 9,
    "local_epochs": 2,
    "optimizer": Optimizer("sgd", 0.1),
    "l2": 0.02,
    "server_optimizer": ADD,
}


@FEDERATIONS
def test_the_default_server_rate_follows_the_participation_of_users(shards):
    """And all rounds so far, also where a fit goes on."""
    state = start(shards, first_round=4)
    for t in (4, 5):
        share = len(users_of(shards, delegates_of(shards, t))) / shards.n_users
        rate = whole_data.default_rate(share, t)
        expected, _ = exact(state, shards, t, server_learning_rate=rate)
        state, _ = exact(state, shards, t, server_learning_rate=None)
        assert torch.equal(state.item_table, expected.item_table)


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


@FEDERATIONS
def test_rounds_with_a_head_do_not_depend_on_chunks(shards, monkeypatch):
    states, logs = [], []
    for rows in (10_000, 40):
        monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)
        state, log = bce(start(shards, neural=True), shards, 0)
        states.append(state)
        logs.append(log)
    assert_states_close(*states)
    assert logs[0]["bytes_up"] == logs[1]["bytes_up"]


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
    assert state.served is None
    assert served_factors(state) is state.user_factors


# Who takes part --------------------------------------------------------------------------


@FEDERATIONS
def test_uniform_and_epoch_delegates_are_drawn_from_the_rounds_stream(shards):
    turns = np.arange(shards.n_clients) % 3
    state = replace(start(shards), turns=turns)
    for t in range(3):
        for size in (1, 4, shards.n_clients):
            found = draw_delegates(state, shards, size, t, "uniform", 3, STREAMS)
            assert found.tolist() == sampled(shards, t, STREAMS, size).tolist()
            found = draw_delegates(state, shards, size, t, "epoch", 3, STREAMS)
            rng = STREAMS.numpy("sampling", t)
            assert found.tolist() == epoch_cohort(turns, size, rng).tolist()


@STEPS_ON_FEDERATIONS
def test_an_epoch_of_rounds_visits_every_client_once(step, shards):
    state, size = start(shards), 4
    arguments = ("epoch", 3, STREAMS)
    for t in range(12):
        chosen = draw_delegates(state, shards, size, t, *arguments)
        assert len(chosen) == size
        if step is exact:
            state, _ = whole_data_step(state, shards, chosen, t, **EXACT)
        else:
            server = {} if step is bce else {"server_optimizer": None}
            changes = {**FEDAVG, "item_bias": False, "item_weighting": "count", **server}
            state, _ = bce_step(state, shards, chosen, t, streams=STREAMS, **changes)
        each, left = divmod((t + 1) * size, shards.n_clients)
        expected = [each] * (shards.n_clients - left) + [each + 1] * left
        assert sorted(state.turns) == expected
    # Users have taken part as often as their clients.
    for client in range(shards.n_clients):
        times = state.times_sampled[users_of(shards, [client])]
        assert times.tolist() == [state.turns[client]] * len(times)


EXACT = {
    "unobserved_weight": W0,
    "penalty": PENALTY,
    "server_learning_rate": 0.5,
    "decay": 0.8,
    "item_curvature": True,
}


def clustered(sizes):
    """Clients of 1 to 3 users whose mean, and nothing else of them, tells the cluster."""
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    client_of = rng.permutation(np.repeat(np.arange(len(label)), 1 + np.arange(len(label)) % 3))
    shards = federation_of(
        [[int(user) % 5] for user in range(len(client_of))], 5, client_of.tolist()
    )
    users = 0.01 * torch.randn(
        shards.n_users, N_FACTORS, generator=torch.Generator().manual_seed(0)
    )
    for client in range(shards.n_clients):
        own = users_of(shards, [client])
        users[own, label[client]] += 10.0
        # Users of a client are far apart, and in the middle between them is their cluster.
        users[own, N_FACTORS - 1] += 60.0 * torch.linspace(-1, 1, len(own)) * (len(own) > 1)
    return shards, users, label


@pytest.mark.parametrize("size", [1, 6, 7, 11, 12])
def test_stratified_delegates_come_in_equal_quotas_from_clusters_of_clients(size):
    sizes = (6, 3, 3)
    shards, users, label = clustered(sizes)
    state = replace(start(shards), user_factors=users)
    quotas = {1: [0, 0, 1], 6: [2, 2, 2], 7: [2, 2, 3], 11: [3, 3, 5], 12: [3, 3, 6]}[size]
    draws = set()
    for t in range(10):
        chosen = draw_delegates(state, shards, size, t, "stratified", 3, STREAMS)
        assert len(set(chosen.tolist())) == len(chosen) == size
        assert chosen.tolist() == sorted(chosen)
        assert sorted(np.bincount(label[chosen], minlength=3)) == quotas
        again = draw_delegates(state, shards, size, t, "stratified", 3, STREAMS)
        assert chosen.tolist() == again.tolist()
        draws.add(tuple(chosen.tolist()))
    assert len(draws) > 1 or size == 12
    assert torch.equal(state.user_factors, users)


def test_stratified_delegates_with_one_cluster_or_more_clusters_than_clients():
    shards, users, _ = clustered((6, 3, 3))
    state = replace(start(shards), user_factors=users)
    for n_clusters in (1, 12, 50):
        chosen = draw_delegates(state, shards, 5, 0, "stratified", n_clusters, STREAMS)
        assert len(set(chosen.tolist())) == 5


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


@pytest.mark.parametrize("item_bias", [False, True])
def test_bytes_of_a_quasi_newton_round_count_curvatures_and_products(item_bias):
    _, plain = bce(start(SINGLE, item_bias=item_bias), SINGLE, 1)
    _, logs = newton(start(SINGLE, item_bias=item_bias), SINGLE, 1)
    width, n_delegates = N_FACTORS + item_bias, len(delegates_of(SINGLE, 1))
    n_rows = plain["bytes_up"] // (4 * (width + 1))
    assert logs["bytes_down"] == plain["bytes_down"]
    assert logs["bytes_up"] == plain["bytes_up"] + 4 * (n_rows + n_delegates * width**2)


@FEDERATIONS
@pytest.mark.parametrize("item_bias", [False, True])
def test_bytes_of_a_round_with_a_head_are_those_without_and_the_head_both_ways(shards, item_bias):
    _, without = bce(start(shards, item_bias=item_bias), shards, 1)
    state = start(shards, item_bias=item_bias, neural=True)
    _, logs = bce(state, shards, 1)
    d = N_FACTORS
    n_weights = (2 * d * 3 + 3) + (3 * 3 + 3) + (3 + 1)
    head = len(delegates_of(shards, 1)) * 4 * n_weights
    assert logs["bytes_down"] == without["bytes_down"] + head
    assert logs["bytes_up"] == without["bytes_up"] + head


@STEPS
@pytest.mark.parametrize("predictor", ["linear", "cluster"])
def test_prediction_sends_nothing(step, predictor):
    """It happens on the server; of plain BCE rounds the bytes are those of FedAvg."""
    plain, more = start(SINGLE), start(SINGLE)
    fedavg = {"item_weighting": "fedavg", "server_optimizer": ADD} if step is bce else {}
    for t in range(2):
        plain, without = step(plain, SINGLE, t, **fedavg)
        more, logs = step(more, SINGLE, t, predictor=predictor, **LITERAL)
        assert logs["predicted_share"] > 0
        for name in ("bytes_up", "bytes_down"):
            assert logs[name] == without[name] > 0


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


@pytest.mark.parametrize("neural", [False, True], ids=["mf", "ncf"])
def test_refit_of_bce_starts_from_what_users_are_served_with(neural):
    shards = SINGLE
    state = start(shards, neural=neural)
    served = state.user_factors.flip(0)
    arguments = {"item_bias": False, "n_negatives": 3, "n_steps": 2, "l2": 0.05, "streams": STREAMS}
    clients = np.arange(0, shards.n_clients, 2)
    found = refit_bce(replace(state, served=served), shards, clients, **arguments)
    expected = refit_bce(replace(state, user_factors=served), shards, clients, **arguments)
    assert torch.equal(found, expected)
    assert torch.equal(found[1::2], served[1::2])
    assert (found[::2] != served[::2]).any(1).all()


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
