from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.streams import Streams
from fedrecsk.models import ncf, private_rows, sampled_bce
from fedrecsk.models.head import init_head
from tests.reference.federations import federation_of, random_federation
from tests.reference.ncf_reference import (
    assert_same_training,
    by_reference,
    by_size,
    logit,
    random_server,
    unpacked,
)
from tests.reference.sampled_bce_reference import examples_of

SGD, MOMENTUM, ADAM = (
    Optimizer("sgd", 0.3),
    Optimizer("momentum", 0.1),
    Optimizer("adam", 0.02),
)
N_FACTORS = 5


def start(shards, **changes):
    """User factors, an item table and a head."""
    users, table, [head] = random_server(shards, [N_FACTORS], **changes)
    return users, table, head


def hyper(**changes):
    """Arguments of `train`, some of them changed."""
    return {
        "item_bias": True,
        "n_negatives": 2,
        "batch_size": 6,
        "local_epochs": 3,
        "optimizer": SGD,
        "l2": 0.05,
        "key": 17,
        **changes,
    }


def trained(cohort, server, **arguments):
    users, table, head = server
    return unpacked(cohort, *ncf.train(cohort, users[cohort.users], table, [head], **arguments))


def expected_of(shards, server, **arguments):
    users, table, head = server
    return by_reference(shards, users, table, [head], **arguments)


def named(value):
    return getattr(value, "name", None)


# Training ---------------------------------------------------------------------------------

SINGLE = random_federation(0, n_users=9, n_items=25)
SHARED = random_federation(1, n_users=6, n_items=20, n_clients=3)
TIGHT = random_federation(2, n_users=5, n_items=8, n_clients=2, max_rows=8)  # few unseen items
# No row, one row, all items seen, one unseen, and mini-batches that only the largest have.
EDGES = federation_of([[], [4], range(7), range(1, 7), [0, 6]], 7)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=named)
@pytest.mark.parametrize("batch_size", [None, 6])
@pytest.mark.parametrize(("item_bias", "l2"), [(True, 0.05), (False, 0.0)])
@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
def test_training_is_that_of_each_client_alone(shards, item_bias, l2, batch_size, optimizer):
    server = start(shards, item_bias=item_bias)
    arguments = hyper(item_bias=item_bias, l2=l2, batch_size=batch_size, optimizer=optimizer)
    found = trained(shards.cohort(by_size(shards)), server, **arguments)
    assert_same_training(found, expected_of(shards, server, **arguments))


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=named)
@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
def test_training_in_single_precision(shards, optimizer):
    server = start(shards, dtype=torch.float32)
    found = trained(shards.cohort(by_size(shards)), server, **hyper(optimizer=optimizer))
    expected = expected_of(shards, server, **hyper(optimizer=optimizer))
    assert_same_training(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=named)
@pytest.mark.parametrize("shards", [EDGES, TIGHT], ids=["a user each", "several users each"])
def test_training_where_negatives_or_batches_run_out(shards, optimizer):
    server = start(shards)
    arguments = hyper(n_negatives=3, batch_size=8, optimizer=optimizer)
    found = trained(shards.cohort(by_size(shards)), server, **arguments)
    assert_same_training(found, expected_of(shards, server, **arguments))


def test_edges_are_what_they_are_meant_to_be():
    cohort = EDGES.cohort(by_size(EDGES))
    drawn = sampled_bce.draw_examples(cohort, 7, n_negatives=3, batch_size=8, key=17)
    assert drawn.n_batches == 4
    found = trained(cohort, start(EDGES), **hyper(n_negatives=3, batch_size=8))
    # All that a user has seen and up to three unseen items for each.
    assert [int(found[4][client]) for client in range(5)] == [0, 4, 7, 7, 7]


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=named)
@pytest.mark.parametrize(("batch_size", "item_bias"), [(None, True), (3, False), (6, True)])
@pytest.mark.parametrize("shards", [SINGLE, EDGES])
def test_fused_and_pooled_paths_agree(shards, batch_size, item_bias, optimizer):
    cohort = shards.cohort(by_size(shards))
    users, table, head = start(shards, item_bias=item_bias)
    examples = sampled_bce.draw_examples(
        cohort, shards.n_items, n_negatives=2, batch_size=batch_size, key=1
    )
    fused, pooled = (
        unpacked(
            cohort,
            *path(
                cohort,
                examples,
                users[cohort.users],
                table,
                [head],
                item_bias=item_bias,
                local_epochs=4,
                optimizer=optimizer,
                l2=0.1,
            ),
        )
        for path in (ncf._train_fused, ncf._train_pooled)
    )
    assert_same_training(fused, pooled)


@pytest.mark.parametrize("hidden", [(), (3,), (4, 3, 2)])
@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
def test_any_number_of_layers(shards, hidden):
    users, table, _ = start(shards)
    drawn = init_head(N_FACTORS, hidden=hidden, streams=Streams(3))
    server = users, table, {name: value.double() for name, value in drawn.items()}
    found = trained(shards.cohort(by_size(shards)), server, **hyper(optimizer=ADAM))
    assert_same_training(found, expected_of(shards, server, **hyper(optimizer=ADAM)))


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99), (0.9, 0.3)])
def test_adam_with_other_decays(betas):
    # A second moment that decays fast is left to the path that makes every step.
    shards = federation_of([[2], [0, 3], range(24)], 60)
    server, optimizer = start(shards), replace(ADAM, betas=betas)
    arguments = hyper(optimizer=optimizer, batch_size=3, local_epochs=2)
    found = trained(shards.cohort(by_size(shards)), server, **arguments)
    assert_same_training(found, expected_of(shards, server, **arguments))


@pytest.mark.parametrize("optimizer", [MOMENTUM, replace(MOMENTUM, momentum=1.0), ADAM])
@pytest.mark.parametrize("length", [1, 2, 7, 60, 700])
@pytest.mark.parametrize("step", [1, 2, 30])
def test_drift_is_the_sum_of_the_moves_it_stands_for(optimizer, length, step):
    moves = private_rows.drift(np.array([[step]]), np.array([[length]]), optimizer)[0, :, 0]
    if optimizer.name == "momentum":
        expected = optimizer.learning_rate * sum(optimizer.momentum**j for j in range(length))
        assert moves[0] == pytest.approx(expected, rel=1e-9)
        return
    beta1, beta2 = optimizer.betas
    # Moments of one gradient of step `step`; its size against eps, 1e-8, is what matters.
    cases = ((1.0, 1e-9), (1e-6, 1e-6), (1e-7, 5e-4), (1e-9, 0.1), (0.0, 0.0))
    for gradient, tolerance in cases:
        mean, square = (1 - beta1) * gradient, (1 - beta2) * gradient**2
        expected = 0.0
        for t in range(step, step + length):
            corrected = np.sqrt(square / (1 - beta2**t)) + optimizer.eps
            expected += optimizer.learning_rate * mean / (1 - beta1**t) / corrected
            mean, square = beta1 * mean, beta2 * square
        root = np.sqrt((1 - beta2) * gradient**2)
        near, near_by, far, far_by = moves
        if length <= 2:
            tolerance = 1e-9
        found = (1 - beta1) * gradient * (near / (root + near_by) + far / (root + near_by + far_by))
        assert found == pytest.approx(expected, rel=tolerance, abs=0.0)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=named)
def test_clients_may_come_in_any_order(optimizer):
    server, ascending = start(SINGLE), by_size(SINGLE)
    expected = trained(SINGLE.cohort(ascending), server, **hyper(optimizer=optimizer))
    for order in (ascending[::-1], np.random.default_rng(0).permutation(ascending)):
        found = trained(SINGLE.cohort(order), server, **hyper(optimizer=optimizer))
        assert_same_training(found, expected)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=named)
@pytest.mark.parametrize("shards", [SINGLE, SHARED, EDGES])
@pytest.mark.parametrize("rows", [1, 30])
def test_training_does_not_depend_on_chunks(rows, shards, optimizer, monkeypatch):
    server = start(shards)
    expected = trained(shards.cohort(by_size(shards)), server, **hyper(optimizer=optimizer))
    monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)
    found, n_chunks = ({}, {}, {}, {}, {}), 0
    for chunk in shards.chunks(np.arange(shards.n_clients), rows_per_interaction=3):
        n_chunks += 1
        for whole, part in zip(
            found, trained(chunk, server, **hyper(optimizer=optimizer)), strict=True
        ):
            whole |= part
    assert n_chunks > 1
    assert rows > 1 or n_chunks == shards.n_clients
    assert_same_training(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=named)
def test_padding_is_never_touched(optimizer):
    # Padding points at item 0. Whoever has no example with item 0 must not notice its row.
    shards = federation_of([range(1, 2 + n) for n in range(8)] + [[0, 3]], 60)
    users, table, head = start(shards)
    poisoned = table.clone()
    poisoned[0] = 1e4
    cohort = shards.cohort(by_size(shards))
    arguments = hyper(batch_size=15, optimizer=optimizer)
    clean, [heads] = ncf.train(cohort, users[cohort.users], table, [head], **arguments)
    dirty, [other_heads] = ncf.train(cohort, users[cohort.users], poisoned, [head], **arguments)
    touching = set(clean.row_clients[clean.row_valid & (clean.row_items == 0)].tolist())
    spared = [c for c in range(shards.n_clients) if c not in touching]
    assert touching
    assert len(spared) >= 4
    assert not clean.row_valid[torch.isin(clean.row_clients, torch.tensor(spared))].all()
    assert torch.equal(clean.user_vectors[spared], dirty.user_vectors[spared])
    assert torch.equal(clean.losses[spared], dirty.losses[spared])
    for name, value in heads.items():
        assert torch.equal(value[spared], other_heads[name][spared])
    changed = (clean.losses != dirty.losses)[sorted(touching)]
    assert changed.all()  # the poison does work
    padding = ~clean.row_valid
    for result in (clean, dirty):
        assert torch.equal(result.row_delta[padding], torch.zeros_like(result.row_delta[padding]))
    n_valid = torch.zeros(shards.n_clients, dtype=torch.float64)
    n_valid.index_add_(0, clean.row_clients, clean.row_valid.double())
    assert torch.equal(n_valid, clean.n_examples)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=named)
@pytest.mark.parametrize("client_of", [None, [0, 1, 2, 2]], ids=["fused", "pooled"])
def test_clients_without_rows_stay_as_they_are(optimizer, client_of):
    items_of = [[], [2, 3], []] + ([[]] if client_of else [])
    shards = federation_of(items_of, 9, client_of)
    users, table, head = start(shards)
    for clients in ([0, 2], [0, 2, 1]):
        cohort = shards.cohort(np.array(clients))
        result, [heads] = ncf.train(
            cohort, users[cohort.users], table, [head], **hyper(optimizer=optimizer)
        )
        idle = cohort.owner < 2
        assert torch.equal(result.user_vectors[idle], users[cohort.users][idle])
        assert result.n_examples.tolist() == [0.0, 0.0, 6.0][: len(clients)]
        assert result.losses[:2].tolist() == [0.0, 0.0]
        for name, value in heads.items():
            assert value.shape == (len(clients), *head[name].shape)
            assert torch.equal(value[:2], torch.stack([head[name]] * 2))
            assert len(clients) == 2 or not torch.equal(value[2], head[name])


@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=named)
def test_training_leaves_its_arguments_alone(shards, optimizer):
    users, table, head = start(shards)
    cohort = shards.cohort(by_size(shards))
    arguments = [users[cohort.users], table, cohort.items, *head.values()]
    copies = [value.clone() for value in arguments]
    result, _ = ncf.train(cohort, arguments[0], table, [head], **hyper(optimizer=optimizer))
    assert all(map(torch.equal, copies, arguments))
    assert not torch.equal(result.user_vectors, arguments[0])


# Scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("pairs", [1, 7, 40, 65_536])
def test_scores_of_all_items_and_of_pairs_are_those_of_a_plain_loop(item_bias, pairs, monkeypatch):
    monkeypatch.setattr(ncf, "SCORE_PAIRS", pairs)
    users, table, head = start(SINGLE, item_bias=item_bias)
    users, table = users[:6], table[:13]
    copies = [value.clone() for value in (users, table, *head.values())]
    found = ncf.score_items(users, table, head, item_bias=item_bias)
    expected = torch.stack(
        [torch.stack([logit(u, row, head, item_bias=item_bias) for row in table]) for u in users]
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found = ncf.score_pairs(
        users.repeat_interleave(13, 0), table.repeat(6, 1), head, item_bias=item_bias
    )
    torch.testing.assert_close(found, expected.reshape(-1), rtol=1e-10, atol=1e-12)
    assert all(map(torch.equal, copies, (users, table, *head.values())))


@pytest.mark.parametrize("pairs", [4, 100])
def test_a_chunk_of_scores_holds_few_pairs(pairs, monkeypatch):
    monkeypatch.setattr(ncf, "SCORE_PAIRS", pairs)
    seen, forward = [], ncf.forward
    monkeypatch.setattr(
        ncf, "forward", lambda first, layers: seen.append(first.shape) or forward(first, layers)
    )
    users, table, head = start(SINGLE)
    ncf.score_items(users, table, head, item_bias=True)
    assert max(shape[0] * shape[1] for shape in seen) <= pairs
    assert sum(shape[0] * shape[1] for shape in seen) == len(users) * len(table)


def test_scores_of_nobody_and_of_nothing():
    users, table, head = start(SINGLE)
    assert ncf.score_items(users[:0], table, head, item_bias=True).shape == (0, 25)
    assert ncf.score_items(users, table[:0], head, item_bias=True).shape == (9, 0)
    assert ncf.score_pairs(users[:0], table[:0], head, item_bias=True).shape == (0,)


# Refitting users --------------------------------------------------------------------------


def own_loss(vector, examples, table, head, *, item_bias, l2):
    """One user's mean loss with the penalty of its vector."""
    rows = table[[example.item for example in examples]]
    labels = vector.new_tensor([example.label for example in examples])
    scores = torch.stack([logit(vector, row, head, item_bias=item_bias) for row in rows])
    loss = binary_cross_entropy_with_logits(scores, labels)
    return loss + l2 / 2 * vector.square().sum()


def refitted_by_torch(vector, examples, table, head, n_steps, **penalised):
    """Fit one vector with torch's Adam; return it where its loss was lowest."""
    u = vector.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([u], lr=0.05)
    best, lowest = vector, float("inf")
    for _ in range(n_steps + 1):
        optimizer.zero_grad()
        loss = own_loss(u, examples, table, head, **penalised)
        if float(loss.detach()) < lowest:
            best, lowest = u.detach().clone(), float(loss.detach())
        torch.autograd.backward([loss])
        optimizer.step()
    return best


@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("shards", [SHARED, TIGHT])
def test_refit_is_that_of_each_user_alone_and_never_worsens_its_loss(shards, item_bias, l2):
    server = start(shards, item_bias=item_bias)
    users, table, head = server
    penalised = {"item_bias": item_bias, "l2": l2}
    own = {user: [] for user in range(shards.n_users)}
    for client in range(shards.n_clients):
        for example in examples_of(shards, client, n_negatives=3, batch_size=None, key=5):
            own[example.user].append(example)
    losses = []
    for n_steps in (0, 3, 12):
        vectors = users.clone()
        for cohort in shards.user_chunks(np.arange(shards.n_clients)):
            vectors[cohort.users] = ncf.refit_users(
                cohort,
                users[cohort.users],
                *server[1:],
                n_negatives=3,
                n_steps=n_steps,
                key=5,
                **penalised,
            )
        if n_steps < 12:
            expected = [
                refitted_by_torch(users[user], own[user], table, head, n_steps, **penalised)
                for user in own
            ]
            torch.testing.assert_close(vectors, torch.stack(expected), rtol=1e-6, atol=1e-6)
        losses.append([own_loss(vectors[u], own[u], table, head, **penalised) for u in own])
    assert (np.diff(losses, axis=0) <= 1e-12).all()
    assert np.mean(losses[-1]) < 0.99 * np.mean(losses[0])


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_refit_keeps_the_start_where_every_step_is_worse(n_steps):
    # A silent head leaves the penalty, and steps of .05 overshoot its optimum, zero.
    shards = federation_of([[0, 1]], 2)
    _, table, head = start(shards)
    close = torch.full((1, N_FACTORS), 1e-3, dtype=torch.float64)
    found = ncf.refit_users(
        shards.cohort(np.arange(1)),
        close,
        table,
        {name: torch.zeros_like(value) for name, value in head.items()},
        item_bias=False,
        n_negatives=1,
        n_steps=n_steps,
        l2=1.0,
        key=0,
    )
    assert torch.equal(found, close)


def test_refit_leaves_users_without_rows_where_they_are():
    shards = federation_of([[], [1, 2]], 6)
    users, table, head = start(shards)
    found = ncf.refit_users(
        shards.cohort(np.arange(2)),
        users,
        table,
        head,
        item_bias=True,
        n_negatives=2,
        n_steps=5,
        l2=0.1,
        key=0,
    )
    assert torch.equal(found[0], users[0])
    assert not torch.equal(found[1], users[1])
