"""Rounds on sampled negatives against loops over clients, their traffic, and refits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.methods.bce_rounds import bce_step, refit_bce
from fedrecsk.methods.factor_state import (
    PredictionWatch,
)
from fedrecsk.models import whole_data
from tests.methods.factor_rounds import (
    ADD,
    FEDAVG,
    FEDERATIONS,
    N_FACTORS,
    SHARED,
    SINGLE,
    STREAMS,
    assert_states_close,
    bce,
    delegates_of,
    newton,
    sampled,
    start,
    users_of,
)
from tests.reference import bce_newton_reference, ncf_reference
from tests.reference.federations import random_federation
from tests.reference.sampled_bce_reference import (
    ClientUpdate,
    aggregate,
    torch_optimizer,
    train_cohort,
)


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


# Refitting --------------------------------------------------------------------------------


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
