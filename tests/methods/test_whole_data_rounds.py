"""Rounds on all data against loops over users, their traffic, and refits."""

import numpy as np
import pytest
import torch

from fedrecsk.methods.whole_data_rounds import refit_whole_data
from fedrecsk.models import whole_data
from tests.methods.factor_rounds import (
    FEDERATIONS,
    N_FACTORS,
    PENALTY,
    W0,
    delegates_of,
    exact,
    start,
    users_of,
)
from tests.reference import whole_data_reference
from tests.reference.federations import items_by_user


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
    """And all rounds so far, also where a fit goes on."""
    state = start(shards, first_round=4)
    for t in (4, 5):
        share = len(users_of(shards, delegates_of(shards, t))) / shards.n_users
        rate = whole_data.default_rate(share, t)
        expected, _ = exact(state, shards, t, server_learning_rate=rate)
        state, _ = exact(state, shards, t, server_learning_rate=None)
        assert torch.equal(state.item_table, expected.item_table)


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
