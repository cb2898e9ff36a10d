"""Who takes part in a round, and how patience is counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine.sampling import epoch_cohort
from fedrecsk.methods.bce_rounds import bce_step
from fedrecsk.methods.factor_state import (
    PredictionWatch,
    draw_delegates,
)
from fedrecsk.methods.whole_data_rounds import whole_data_step
from tests.methods.factor_rounds import (
    EXACT,
    FEDAVG,
    FEDERATIONS,
    N_FACTORS,
    STEPS_ON_FEDERATIONS,
    STREAMS,
    bce,
    exact,
    sampled,
    start,
    users_of,
)
from tests.reference.federations import federation_of


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
