from collections import Counter

import numpy as np
import pytest
import torch
from scipy.special import expit

from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.models import sampled_bce
from tests.reference.federations import federation_of, items_by_user, random_federation
from tests.reference.sampled_bce_reference import examples_of, train_cohort

SGD, MOMENTUM, ADAM = (
    Optimizer("sgd", 0.1),
    Optimizer("momentum", 0.03),
    Optimizer("adam", 0.02),
)
N_FACTORS = 5


def start(shards, *, item_bias, seed=0):
    """User factors and an item table of a scale at which the loss bends."""
    generator = torch.Generator().manual_seed(seed)
    users = 0.7 * torch.randn(shards.n_users, N_FACTORS, generator=generator)
    width = N_FACTORS + item_bias
    return users, 0.7 * torch.randn(shards.n_items, width, generator=generator)


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


def trained(shards, cohort, users, table, **arguments):
    """Train one cohort; per user its vector, per (client, item) its delta, per client the rest."""
    result = sampled_bce.train(cohort, users[cohort.users], table, **arguments)
    return unpacked(cohort, result)


def unpacked(cohort, result):
    vectors = dict(zip(cohort.users.tolist(), result.user_vectors, strict=True))
    deltas = {}
    for k in torch.nonzero(result.row_valid)[:, 0].tolist():
        pair = int(cohort.clients[result.row_clients[k]]), int(result.row_items[k])
        assert pair not in deltas  # one private row per (client, item)
        deltas[pair] = result.row_delta[k]
    clients = cohort.clients.tolist()
    losses = dict(zip(clients, result.losses.tolist(), strict=True))
    n_examples = dict(zip(clients, result.n_examples.tolist(), strict=True))
    return vectors, deltas, losses, n_examples


def assert_same_training(found, expected, tolerance=1e-5):
    """Compare two results of `unpacked`; tolerance is relative to values of about 1."""
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance)
    assert found[2] == pytest.approx(expected[2], rel=tolerance, abs=tolerance)
    assert found[3] == expected[3]


def by_reference(shards, clients, users, table, **arguments):
    updates = train_cohort(shards, clients, users, table, **arguments)
    vectors, deltas = {}, {}
    for client, update in updates.items():
        vectors |= update.user_vectors
        deltas |= {(client, item): delta for item, delta in update.deltas.items()}
    losses = {client: update.loss for client, update in updates.items()}
    return vectors, deltas, losses, {c: update.n_examples for c, update in updates.items()}


def by_size(shards):
    return np.argsort(shards.client_rows, kind="stable")


# Training ---------------------------------------------------------------------------------

SINGLE = random_federation(0, n_users=14, n_items=25)
SHARED = random_federation(1, n_users=7, n_items=20, n_clients=3)
TIGHT = random_federation(2, n_users=6, n_items=8, n_clients=2, max_rows=8)  # few unseen items


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=lambda o: o.name)
@pytest.mark.parametrize("batch_size", [None, 6])
@pytest.mark.parametrize(("item_bias", "l2"), [(True, 0.05), (True, 0.0), (False, 0.05)])
@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
def test_training_is_that_of_each_client_alone(shards, item_bias, l2, batch_size, optimizer):
    users, table = start(shards, item_bias=item_bias)
    arguments = hyper(item_bias=item_bias, l2=l2, batch_size=batch_size, optimizer=optimizer)
    clients = by_size(shards)
    found = trained(shards, shards.cohort(clients), users, table, **arguments)
    expected = by_reference(shards, clients.tolist(), users, table, **arguments)
    assert_same_training(found, expected)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=lambda o: o.name)
@pytest.mark.parametrize("shards", [SINGLE, TIGHT], ids=["plenty", "few"])
def test_training_where_negatives_run_out(shards, optimizer):
    users, table = start(shards, item_bias=True)
    arguments = hyper(n_negatives=6, batch_size=10, optimizer=optimizer)
    clients = by_size(shards)
    found = trained(shards, shards.cohort(clients), users, table, **arguments)
    expected = by_reference(shards, clients.tolist(), users, table, **arguments)
    assert_same_training(found, expected)


@pytest.mark.parametrize("batch_size", [None, 3, 6])
@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_fused_and_pooled_paths_agree(batch_size, item_bias, l2):
    cohort = SINGLE.cohort(by_size(SINGLE))
    users, table = start(SINGLE, item_bias=item_bias)
    examples = sampled_bce.draw_examples(
        cohort, SINGLE.n_items, n_negatives=2, batch_size=batch_size, key=1
    )
    fused, pooled = (
        unpacked(
            cohort,
            path(
                cohort,
                examples,
                users[cohort.users],
                table,
                item_bias=item_bias,
                local_epochs=4,
                optimizer=SGD,
                l2=l2,
            ),
        )
        for path in (sampled_bce._train_fused, sampled_bce._train_pooled)
    )
    assert_same_training(fused, pooled)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=lambda o: o.name)
def test_clients_may_come_in_any_order(optimizer):
    users, table = start(SINGLE, item_bias=True)
    ascending = by_size(SINGLE)
    expected = trained(SINGLE, SINGLE.cohort(ascending), users, table, **hyper(optimizer=optimizer))
    for order in (ascending[::-1], np.random.default_rng(0).permutation(ascending)):
        found = trained(SINGLE, SINGLE.cohort(order), users, table, **hyper(optimizer=optimizer))
        assert_same_training(found, expected)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=lambda o: o.name)
@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
def test_a_larger_neighbour_changes_nothing(shards, optimizer):
    users, table = start(shards, item_bias=True)
    clients = by_size(shards)
    arguments = hyper(optimizer=optimizer)
    together = trained(shards, shards.cohort(clients), users, table, **arguments)
    apart = trained(shards, shards.cohort(clients[:-1]), users, table, **arguments)
    largest = int(clients[-1])
    vectors, deltas, losses, n_examples = together
    for user in shards.users_of(clients[-1:]).tolist():
        del vectors[user]
    for pair in [pair for pair in deltas if pair[0] == largest]:
        del deltas[pair]
    del losses[largest], n_examples[largest]
    assert_same_training(together, apart, tolerance=1e-6)


def test_padding_is_never_touched():
    # Padding points at item 0. Whoever has no example with item 0 must not notice its row.
    shards = federation_of([range(1, 2 + n) for n in range(8)] + [[0, 3]], 60)
    users, table = start(shards, item_bias=True)
    poisoned = table.clone()
    poisoned[0] = 1e4
    clients = by_size(shards)
    arguments = hyper(batch_size=None)
    cohort = shards.cohort(clients)
    clean = sampled_bce.train(cohort, users[cohort.users], table, **arguments)
    dirty = sampled_bce.train(cohort, users[cohort.users], poisoned, **arguments)
    touching = set(clean.row_clients[clean.row_valid & (clean.row_items == 0)].tolist())
    spared = [c for c in range(len(clients)) if c not in touching]
    assert touching
    assert len(spared) >= 4
    assert not clean.row_valid.all()
    assert torch.equal(clean.user_vectors[spared], dirty.user_vectors[spared])
    assert torch.equal(clean.losses[spared], dirty.losses[spared])
    changed = (clean.user_vectors != dirty.user_vectors).any(1)
    assert changed[sorted(touching)].all()  # the poison does work
    padding = ~clean.row_valid
    assert torch.equal(clean.row_delta[padding], torch.zeros_like(clean.row_delta[padding]))


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=lambda o: o.name)
def test_clients_without_rows_keep_their_vectors(optimizer):
    shards = federation_of([[], [2, 3], []], 9)
    users, table = start(shards, item_bias=True)
    for clients in ([0, 2], [0, 2, 1]):
        cohort = shards.cohort(np.array(clients))
        result = sampled_bce.train(cohort, users[cohort.users], table, **hyper(optimizer=optimizer))
        assert torch.equal(result.user_vectors[:2], users[[0, 2]])
        assert result.n_examples.tolist() == [0.0, 0.0, 6.0][: len(clients)]
        assert result.losses[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
def test_training_leaves_its_arguments_alone(shards):
    users, table = start(shards, item_bias=True)
    cohort = shards.cohort(by_size(shards))
    vectors = users[cohort.users]
    copies = vectors.clone(), table.clone(), cohort.items.clone()
    result = sampled_bce.train(cohort, vectors, table, **hyper())
    assert all(map(torch.equal, copies, (vectors, table, cohort.items)))
    assert not torch.equal(result.user_vectors, vectors)


@pytest.mark.parametrize("rows", [1, 30, 10_000])
def test_training_does_not_depend_on_chunks(rows, monkeypatch):
    monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)
    for shards in (SINGLE, SHARED):
        users, table = start(shards, item_bias=True)
        expected = by_reference(shards, range(shards.n_clients), users, table, **hyper())
        found = ({}, {}, {}, {})
        for chunk in shards.chunks(np.arange(shards.n_clients), rows_per_interaction=3):
            for whole, part in zip(
                found, trained(shards, chunk, users, table, **hyper()), strict=True
            ):
                whole |= part
        assert_same_training(found, expected)


# Drawing examples -------------------------------------------------------------------------


def draw(shards, clients=None, **changes):
    arguments = {"n_negatives": 3, "batch_size": 8, "key": 5, **changes}
    chosen = np.arange(shards.n_clients) if clients is None else np.asarray(clients)
    cohort = shards.cohort(chosen)
    return cohort, sampled_bce.draw_examples(cohort, shards.n_items, **arguments)


def negatives_by_user(cohort, drawn):
    """All negatives of each user, with repetitions."""
    found = {user: [] for user in cohort.users.tolist()}
    for row, user in enumerate(cohort.users[cohort.row_user].tolist()):
        found[user] += drawn.items[row, 1:][drawn.valid[row, 1:]].tolist()
    return found


EDGES = federation_of(
    [
        range(12),  # has seen everything
        range(1, 12),  # one unseen item
        range(0, 12, 2),  # as many seen as unseen
        [11],
        [],
        [0, 1, 2, 9, 10, 11],
    ],
    12,
)


@pytest.mark.parametrize("n_negatives", [1, 2, 5, 40])
@pytest.mark.parametrize("shards", [SINGLE, SHARED, TIGHT, EDGES])
def test_negatives_are_distinct_and_unseen_and_as_many_as_there_are(shards, n_negatives):
    for key in range(5):
        cohort, drawn = draw(shards, n_negatives=n_negatives, key=key)
        assert torch.equal(drawn.items[:, 0], cohort.items)
        assert drawn.valid[:, 0].all()
        assert 0 <= drawn.items.min() <= drawn.items.max() < shards.n_items
        seen = items_by_user(shards)
        for user, negatives in negatives_by_user(cohort, drawn).items():
            assert len(set(negatives)) == len(negatives)
            assert not set(negatives) & set(seen[user])
            unseen = shards.n_items - len(seen[user])
            assert len(negatives) == min(n_negatives * len(seen[user]), unseen)


@pytest.mark.parametrize("n_negatives", [1, 5, 40])
@pytest.mark.parametrize("shards", [SINGLE, SHARED, TIGHT, EDGES])
def test_listing_what_is_unseen_draws_what_a_search_does(shards, n_negatives, monkeypatch):
    drawn = []
    for pairs_per_negative in (0, 1_000_000):  # never and always listed
        monkeypatch.setattr(sampled_bce, "LISTED", pairs_per_negative)
        drawn.append(draw(shards, n_negatives=n_negatives, key=3)[1])
    searched, listed = drawn
    assert torch.equal(searched.items, listed.items)
    assert torch.equal(searched.valid, listed.valid)


def test_a_catalogue_of_one_item_has_no_negatives():
    shards = federation_of([[0], [0]], 1)
    cohort, drawn = draw(shards)
    assert drawn.valid.tolist() == [[True, False, False, False]] * 2
    users, table = start(shards, item_bias=True)
    result = sampled_bce.train(cohort, users, table, **hyper())
    assert result.n_examples.tolist() == [1.0, 1.0]
    assert torch.isfinite(result.user_vectors).all()


def test_negatives_are_spread_evenly_over_the_positives():
    # Where they run out, no positive gets two more than another.
    cohort, drawn = draw(TIGHT, n_negatives=4)
    per_row = drawn.valid[:, 1:].sum(1)
    for user in range(cohort.n_users):
        own = per_row[cohort.row_user == user]
        assert own.max() - own.min() <= 1


def assert_equally_often(counts, trials, share):
    """Every entry of `counts` is binomial(trials, share); five standard deviations are allowed."""
    spread = np.sqrt(trials * share * (1 - share))
    assert np.abs(np.asarray(counts) - trials * share).max() < 5 * spread


@pytest.mark.parametrize("n_negatives", [1, 2, 4])
def test_every_unseen_item_is_drawn_equally_often(n_negatives):
    trials, n_items, positives = 3000, 16, [1, 4, 5]
    shards = federation_of([positives] * trials, n_items)
    _, drawn = draw(shards, n_negatives=n_negatives)
    unseen = [item for item in range(n_items) if item not in positives]
    wanted = min(3 * n_negatives, 13)
    found = np.bincount(drawn.items[:, 1:][drawn.valid[:, 1:]], minlength=n_items)
    assert found[positives].tolist() == [0, 0, 0]
    assert_equally_often(found[unseen], trials, wanted / 13)
    for column in range(1, 1 + n_negatives):  # and so is each draw by itself
        for position in range(3):
            mine = drawn.items[position::3, column][drawn.valid[position::3, column]]
            counts = np.bincount(mine, minlength=n_items)
            assert len(mine) in (0, trials)
            assert_equally_often(counts[unseen], len(mine), 1 / 13)


def test_every_unseen_item_is_drawn_equally_often_over_the_rounds():
    shards = federation_of([[0, 2]], 9)
    rounds = 800
    counts = np.zeros(9)
    for key in range(rounds):
        _, drawn = draw(shards, n_negatives=1, key=key)
        counts[drawn.items[:, 1]] += 1
    assert_equally_often(counts[[1, 3, 4, 5, 6, 7, 8]], rounds, 2 / 7)


@pytest.mark.parametrize("shards", [SINGLE, SHARED, EDGES])
@pytest.mark.parametrize(("n_negatives", "batch_size"), [(3, 8), (3, 4), (4, 2), (1, 5)])
def test_batches_cut_each_clients_rows_and_stay_within_the_size(shards, n_negatives, batch_size):
    cohort, drawn = draw(shards, n_negatives=n_negatives, batch_size=batch_size)
    # A positive stays with its negatives, even where they alone exceed the size.
    per_batch = max(1, batch_size // (1 + n_negatives))
    assert drawn.per_batch == per_batch
    owner = cohort.owner[cohort.row_user]
    for client, n_rows in enumerate(shards.client_rows):
        sizes = Counter(drawn.batch[owner == client].tolist())
        full, rest = divmod(int(n_rows), per_batch)
        assert [sizes[b] for b in sorted(sizes)] == [per_batch] * full + [rest] * (rest > 0)
        assert sorted(sizes) == list(range(len(sizes)))
    assert drawn.n_batches == -(-int(shards.client_rows.max()) // per_batch)


def test_no_batch_size_puts_all_rows_of_a_client_in_one_batch():
    _, drawn = draw(SINGLE, batch_size=None)
    assert drawn.n_batches == 1
    assert drawn.batch.tolist() == [0] * len(SINGLE.items)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_slots_are_the_places_within_a_batch(batch_size):
    cohort, drawn = draw(SINGLE, batch_size=batch_size)
    places = set(
        zip(cohort.row_user.tolist(), drawn.batch.tolist(), drawn.slot.tolist(), strict=True)
    )
    assert len(places) == cohort.n_rows
    assert 0 <= drawn.slot.min() <= drawn.slot.max() < drawn.per_batch


def test_batches_are_shuffled_anew_for_every_client_and_key():
    trials = 2000
    shards = federation_of([range(4)] * trials, 10)
    _, drawn = draw(shards, n_negatives=1, batch_size=4)  # two positives a batch
    batch = drawn.batch.reshape(trials, 4)
    for position in range(4):
        assert_equally_often((batch[:, position] == 0).sum().item(), trials, 0.5)
    same = (batch[:, 0] == batch[:, 1]).sum().item()
    assert_equally_often(same, trials, 1 / 3)
    _, again = draw(shards, n_negatives=1, batch_size=4, key=6)
    assert_equally_often((again.batch == drawn.batch).reshape(trials, 4)[:, 0].sum(), trials, 0.5)


def test_batches_do_not_tell_the_negatives():
    trials, n_items = 3000, 502
    shards = federation_of([[0, 1]] * trials, n_items)
    _, drawn = draw(shards, n_negatives=1, batch_size=2)
    first_batch = drawn.batch.reshape(trials, 2)[:, 0].numpy()
    negatives = drawn.items[:, 1].reshape(trials, 2)
    gap = ((negatives[:, 1] - negatives[:, 0]) % (n_items - 2)).numpy()
    bound = 5 / np.sqrt(trials)
    assert abs(np.corrcoef(first_batch, gap)[0, 1]) < bound
    assert abs(np.corrcoef(first_batch, negatives[:, 0])[0, 1]) < bound


@pytest.mark.parametrize("shards", [SINGLE, SHARED, EDGES])
def test_draws_do_not_depend_on_who_shares_the_cohort(shards):
    alone = {
        client: examples_of(shards, client, n_negatives=3, batch_size=8, key=5)
        for client in range(shards.n_clients)
    }
    rng = np.random.default_rng(0)
    for _ in range(3):
        clients = rng.permutation(shards.n_clients)[: 1 + shards.n_clients // 2]
        cohort, drawn = draw(shards, clients)
        owner = cohort.clients[cohort.owner[cohort.row_user]]
        for client in clients:
            rows = np.flatnonzero(owner == client)
            items = [item for row in rows for item in drawn.items[row][drawn.valid[row]].tolist()]
            batches = drawn.batch[rows].repeat_interleave(drawn.valid[rows].sum(1)).tolist()
            expected = alone[int(client)]
            assert items == [example.item for example in expected]
            assert batches == [example.batch for example in expected]


def test_the_same_key_gives_the_same_draws_and_another_key_others():
    first, again, other = (draw(SINGLE, key=key)[1] for key in (5, 5, 6))
    assert torch.equal(first.items, again.items)
    assert torch.equal(first.batch, again.batch)
    assert not torch.equal(first.items, other.items)
    assert not torch.equal(first.batch, other.batch)


# Refitting users --------------------------------------------------------------------------


def refitted(shards, users, table, n_steps, **arguments):
    """Refit all users; return their vectors in double precision."""
    vectors = users.double().numpy().copy()
    for cohort in shards.user_chunks(np.arange(shards.n_clients)):
        found = sampled_bce.refit_users(
            cohort, users[cohort.users], table, n_steps=n_steps, **arguments
        )
        vectors[cohort.users] = found
    return vectors


def loss_and_gradient(u, examples, table, *, item_bias, l2):
    """One user's penalised logistic loss, in double precision."""
    rows = table[[example.item for example in examples]].double().numpy()
    labels = np.array([example.label for example in examples])
    factors, bias = rows[:, :N_FACTORS], rows[:, N_FACTORS] if item_bias else 0.0
    score, penalty = factors @ u + bias, max(l2, 1e-3) * len(examples)
    value = (np.logaddexp(0, score) - labels * score).sum() + penalty / 2 * u @ u
    return value, factors.T @ (expit(score) - labels) + penalty * u


@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("shards", [SINGLE, SHARED, TIGHT])
def test_refit_descends_to_each_users_optimum_against_the_frozen_table(shards, item_bias, l2):
    users, table = start(shards, item_bias=item_bias)
    penalised = {"item_bias": item_bias, "l2": l2}
    own = {user: [] for user in range(shards.n_users)}
    for client in range(shards.n_clients):
        for example in examples_of(shards, client, n_negatives=3, batch_size=None, key=5):
            own[example.user].append(example)
    values, gradients = [], []
    for n_steps in (0, 1, 5, 20, 400):
        vectors = refitted(shards, users, table, n_steps, n_negatives=3, key=5, **penalised)
        pairs = [
            loss_and_gradient(vectors[user], examples, table, **penalised)
            for user, examples in own.items()
        ]
        values.append([value for value, _ in pairs])
        gradients.append([gradient for _, gradient in pairs])
    assert (np.diff(values, axis=0) <= 1e-5).all()
    assert np.abs(gradients[-1]).max() < 1e-3
    # "20 come close to the optimum": the start's excess over the optimum is all but gone.
    excess = np.sum(values, axis=1) - np.sum(values[-1])
    assert excess[3] < 0.1 * excess[0]


def test_refit_leaves_users_without_rows_where_they_are():
    shards = federation_of([[], [1, 2]], 6)
    users, table = start(shards, item_bias=True)
    found = sampled_bce.refit_users(
        shards.cohort(np.arange(2)),
        users,
        table,
        item_bias=True,
        n_negatives=2,
        n_steps=5,
        l2=0.1,
        key=0,
    )
    assert torch.equal(found[0], users[0])
    assert not torch.equal(found[1], users[1])
