"""NCF with several heads, over ego graphs, and under a pull; `test_ncf` has the plain model."""

import re

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.streams import Streams
from fedrecsk.models import ncf, sampled_bce
from fedrecsk.models.ego_graph import EgoGraphs, Propagation
from fedrecsk.models.head import init_head
from tests.reference.federations import federation_of, items_by_user, random_federation
from tests.reference.ncf_reference import (
    assert_same_training,
    by_reference,
    by_size,
    logit,
    propagated,
    random_server,
    unpacked,
)
from tests.reference.sampled_bce_reference import examples_of

SGD, MOMENTUM, ADAM = Optimizer("sgd", 0.3), Optimizer("momentum", 0.1), Optimizer("adam", 0.02)
SINGLE = random_federation(0, n_users=7, n_items=22, max_rows=7)
SHARED = random_federation(1, n_users=6, n_items=14, n_clients=3, max_rows=6)
# No row, one row, all items seen, one unseen, and more than any other.
EDGES = federation_of([[], [4], range(7), range(1, 7), [0, 6]], 7)

PULL = (
    torch.tensor([0.3, -0.2, 0.1, 0.5, -0.4], dtype=torch.float64),
    0.3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(9)).double(),
)
optimizers = pytest.mark.parametrize(
    "optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"]
)
federations = pytest.mark.parametrize(
    "shards", [SINGLE, SHARED, EDGES], ids=["a user each", "several users each", "edges"]
)


def hyper(**changes):
    """Arguments of `train`, some of them changed."""
    return {
        "item_bias": True,
        "n_negatives": 2,
        "batch_size": None,
        "local_epochs": 2,
        "optimizer": SGD,
        "l2": 0.05,
        "key": 17,
        **changes,
    }


def trained(cohort, server, **arguments):
    users, table, heads = server
    return unpacked(cohort, *ncf.train(cohort, users[cohort.users], table, heads, **arguments))


def assert_trains_like_each_client_alone(shards, server, tolerance=1e-6, **arguments):
    found = trained(shards.cohort(by_size(shards)), server, **arguments)
    expected = by_reference(shards, *server, **arguments)
    assert_same_training(found, expected, tolerance)


# Training ---------------------------------------------------------------------------------


@optimizers
@federations
@pytest.mark.parametrize(
    ("widths", "batch_size", "item_bias", "l2"),
    [((2, 5), 6, True, 0.05), ((1, 3, 5), None, False, 0.0), ((1, 3, 5), 6, True, 0.0)],
)
def test_nested_heads(widths, batch_size, item_bias, l2, shards, optimizer):
    server = random_server(shards, widths, item_bias=item_bias)
    arguments = hyper(batch_size=batch_size, item_bias=item_bias, l2=l2, optimizer=optimizer)
    assert_trains_like_each_client_alone(shards, server, **arguments)


@optimizers
@federations
@pytest.mark.parametrize(
    ("n_graph_layers", "item_bias", "l2"),
    [(1, True, 0.05), (2, False, 0.05), (3, True, 0.0)],
)
@pytest.mark.parametrize("item_propagation", [False, True])
def test_graph_layers(n_graph_layers, item_propagation, item_bias, l2, shards, optimizer):
    server = random_server(shards, (5,), item_bias=item_bias)
    arguments = hyper(item_bias=item_bias, l2=l2, optimizer=optimizer, local_epochs=3)
    arguments |= {"n_graph_layers": n_graph_layers, "item_propagation": item_propagation}
    assert_trains_like_each_client_alone(shards, server, **arguments)


@optimizers
@federations
@pytest.mark.parametrize(("batch_size", "item_bias"), [(6, True), (None, False)])
def test_a_pull(batch_size, item_bias, shards, optimizer):
    server = random_server(shards, (5,), item_bias=item_bias)
    arguments = hyper(batch_size=batch_size, item_bias=item_bias, optimizer=optimizer, pull=PULL)
    assert_trains_like_each_client_alone(shards, server, **arguments)


@optimizers
@federations
@pytest.mark.parametrize("local_epochs", [1, 4])
@pytest.mark.parametrize("item_propagation", [False, True])
def test_all_of_it_together(item_propagation, local_epochs, shards, optimizer):
    server = random_server(shards, (2, 4, 5))
    arguments = hyper(optimizer=optimizer, local_epochs=local_epochs, n_graph_layers=2, pull=PULL)
    arguments["item_propagation"] = item_propagation
    assert_trains_like_each_client_alone(shards, server, **arguments)


@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
@pytest.mark.parametrize("n_graph_layers", [0, 1])
def test_single_precision(shards, n_graph_layers):
    server = random_server(shards, (1, 3, 5), dtype=torch.float32)
    arguments = hyper(optimizer=MOMENTUM, n_graph_layers=n_graph_layers)
    arguments["pull"] = tuple(value.float() for value in PULL)
    assert_trains_like_each_client_alone(shards, server, 1e-5, **arguments)


@pytest.mark.parametrize("hidden", [(), (3,), (4, 3, 2)])
def test_any_number_of_layers(hidden):
    users, table, _ = random_server(SINGLE, (5,))
    heads = [
        {n: v.double() for n, v in init_head(d, hidden=hidden, key=d, streams=Streams(3)).items()}
        for d in (2, 5)
    ]
    arguments = hyper(optimizer=ADAM, n_graph_layers=1)
    assert_trains_like_each_client_alone(SINGLE, (users, table, heads), **arguments)


def test_heads_with_different_numbers_of_units():
    users, table, _ = random_server(SINGLE, (5,))
    heads = [
        {n: v.double() for n, v in init_head(d, hidden=h, key=d, streams=Streams(3)).items()}
        for d, h in ((2, (3, 4)), (5, (6, 2)))
    ]
    arguments = hyper(optimizer=ADAM, batch_size=6)
    assert_trains_like_each_client_alone(SINGLE, (users, table, heads), **arguments)


def test_the_shared_federation_has_what_makes_it_hard():
    """Rows that are positive for one user of a client and negative for another, in one batch."""
    both, often = 0, 0
    for client in range(SHARED.n_clients):
        examples = examples_of(SHARED, client, n_negatives=2, batch_size=None, key=17)
        labels = {}
        for example in examples:
            labels.setdefault(example.item, []).append(example.label)
        both += sum(len(set(seen)) == 2 for seen in labels.values())
        often += sum(seen.count(1.0) > 1 for seen in labels.values())
    assert both >= 3
    assert often >= 3


@optimizers
@pytest.mark.parametrize(
    ("n_graph_layers", "items"), [(0, False), (1, False), (2, False), (1, True), (2, True)]
)
@pytest.mark.parametrize("shards", [SINGLE, EDGES])
def test_fused_and_pooled_paths_agree(shards, n_graph_layers, items, optimizer):
    cohort = shards.cohort(by_size(shards))
    users, table, heads = random_server(shards, (2, 5))
    examples = sampled_bce.draw_examples(
        cohort, shards.n_items, n_negatives=3, batch_size=None if n_graph_layers else 4, key=1
    )
    fused, pooled = (
        unpacked(
            cohort,
            *path(
                cohort,
                examples,
                users[cohort.users],
                table,
                heads,
                item_bias=True,
                local_epochs=5,
                optimizer=optimizer,
                l2=0.1,
                graph=Propagation.of(n_graph_layers, items=items) if n_graph_layers else None,
                pull=ncf._Pull.of(*PULL, table.shape[1]),
            ),
        )
        for path in (ncf._train_fused, ncf._train_pooled)
    )
    assert_same_training(fused, pooled)


@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["a user each", "several users each"])
def test_each_addition_matters(shards):
    cohort = shards.cohort(by_size(shards))
    server = random_server(shards, (2, 5))
    users, table, heads = server
    plain = trained(cohort, (users, table, heads[1:]), **hyper())
    literal = hyper(n_graph_layers=1, item_propagation=True)
    others = [
        trained(cohort, server, **hyper()),
        trained(cohort, (users, table, heads[1:]), **hyper(n_graph_layers=1)),
        trained(cohort, (users, table, heads[1:]), **literal),
        trained(cohort, (users, table, heads[1:]), **hyper(pull=PULL)),
    ]
    for other in others:
        distances = [float((other[1][pair] - row).abs().max()) for pair, row in plain[1].items()]
        assert min(distances) > 1e-5


@optimizers
@pytest.mark.parametrize(("n_graph_layers", "items"), [(0, False), (2, False), (2, True)])
def test_padding_is_never_touched(optimizer, n_graph_layers, items):
    # Padding points at item 0. Whoever has no example with item 0 must not notice its row.
    shards = federation_of([range(1, 2 + n) for n in range(8)] + [[0, 3]], 60)
    users, table, heads = random_server(shards, (2, 5))
    poisoned = table.clone()
    poisoned[0] = 1e4
    cohort = shards.cohort(by_size(shards))
    arguments = hyper(optimizer=optimizer, n_graph_layers=n_graph_layers, pull=PULL)
    arguments["item_propagation"] = items
    clean, own = ncf.train(cohort, users[cohort.users], table, heads, **arguments)
    dirty, other = ncf.train(cohort, users[cohort.users], poisoned, heads, **arguments)
    touching = set(clean.row_clients[clean.row_valid & (clean.row_items == 0)].tolist())
    spared = [c for c in range(shards.n_clients) if c not in touching]
    assert touching
    assert len(spared) >= 4
    assert not clean.row_valid[torch.isin(clean.row_clients, torch.tensor(spared))].all()
    assert torch.equal(clean.user_vectors[spared], dirty.user_vectors[spared])
    for head, same in zip(own, other, strict=True):
        assert all(torch.equal(head[name][spared], same[name][spared]) for name in head)
    for result in (clean, dirty):
        assert not result.row_delta[~result.row_valid].any()


def test_training_leaves_its_arguments_alone():
    for shards in (SINGLE, SHARED):
        users, table, heads = random_server(shards, (2, 5))
        cohort = shards.cohort(by_size(shards))
        given = [users[cohort.users], table, *PULL, *(v for head in heads for v in head.values())]
        copies = [value.clone() for value in given]
        arguments = hyper(optimizer=ADAM, n_graph_layers=1, pull=PULL)
        ncf.train(cohort, given[0], table, heads, **arguments)
        assert all(map(torch.equal, copies, given))


# What does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(), (2, 3), (5, 2), (2, 2, 5), (5, 8)])
def test_heads_that_are_not_nested_in_the_vectors(widths):
    users, table, _ = random_server(SINGLE, (5,))
    heads = [init_head(width, streams=Streams(0)) for width in widths]
    message = f"must ascend up to the 5 columns of the user vectors, found {[*widths]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        ncf.train(SINGLE.cohort(np.arange(7)), users, table, heads, **hyper())


def test_heads_of_different_depth():
    users, table, _ = random_server(SINGLE, (5,))
    heads = [init_head(d, hidden=(8,) * d, streams=Streams(0)) for d in (2, 5)]
    with pytest.raises(ValueError, match="same number of layers"):
        ncf.train(SINGLE.cohort(np.arange(7)), users, table, heads, **hyper())


def test_graph_layers_and_mini_batches():
    with pytest.raises(ValueError, match="n_graph_layers=2 needs batch_size=None, found 6"):
        trained(
            SINGLE.cohort(np.arange(7)),
            random_server(SINGLE, (5,)),
            **hyper(n_graph_layers=2, batch_size=6),
        )


# Scores -----------------------------------------------------------------------------------


def csr(items_of):
    counts = [len(items) for items in items_of]
    indices = torch.tensor([item for items in items_of for item in items], dtype=torch.int64)
    return torch.tensor(np.cumsum([0, *counts])), indices


@pytest.mark.parametrize("n_graph_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("pairs", [5, 40, 65_536])
def test_scores_are_those_of_a_plain_loop(n_graph_layers, items, item_bias, pairs, monkeypatch):
    monkeypatch.setattr(ncf, "SCORE_PAIRS", pairs)
    shards = federation_of([[], [4], range(12), [11, 3], [0, 6, 7]], 12)
    users, table, [head] = random_server(shards, (5,), item_bias=item_bias)
    liked = items_by_user(shards)
    expected = []
    for user in range(5):
        vector, rows = propagated(users[user], table, liked[user], n_graph_layers, items=items)
        expected.append([float(logit(vector, row, head, item_bias=item_bias)) for row in rows])
    expected = torch.tensor(expected, dtype=torch.float64)
    found = ncf.score_items(
        users,
        table,
        head,
        item_bias=item_bias,
        n_graph_layers=n_graph_layers,
        item_propagation=items,
        positives=csr(liked),
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    graphs = EgoGraphs.of(users, table, *csr(liked), n_layers=n_graph_layers, items=items)
    who, what = torch.arange(5).repeat_interleave(12), torch.arange(12).repeat(5)
    is_positive = torch.tensor([item in liked[user] for user, item in zip(who, what, strict=True)])
    vectors, rows = graphs.pairs(who, table[what], is_positive)
    found = ncf.score_pairs(vectors, rows, head, item_bias=item_bias)
    torch.testing.assert_close(found, expected.reshape(-1), rtol=1e-10, atol=1e-12)


def test_scores_of_a_smaller_size_read_the_first_columns():
    users, table, [small, _] = random_server(SINGLE, (2, 5))
    columns = [0, 1, 5]
    found = ncf.score_items(
        users[:, :2],
        table[:, columns],
        small,
        item_bias=True,
        n_graph_layers=1,
        positives=csr(items_by_user(SINGLE)),
    )
    for user, liked in enumerate(items_by_user(SINGLE)):
        vector, rows = propagated(users[user], table, liked, 1)
        expected = torch.stack([logit(vector, row, small, item_bias=True) for row in rows])
        torch.testing.assert_close(found[user], expected)


def test_scores_over_graph_layers_need_positives():
    users, table, [head] = random_server(SINGLE, (5,))
    with pytest.raises(ValueError, match="positives"):
        ncf.score_items(users, table, head, item_bias=True, n_graph_layers=1)


def test_scores_of_nobody():
    users, table, [head] = random_server(SINGLE, (5,))
    found = ncf.score_items(
        users[:0], table, head, item_bias=True, n_graph_layers=1, positives=csr([])
    )
    assert found.shape == (0, 22)


# Refitting users --------------------------------------------------------------------------


@pytest.mark.parametrize("n_graph_layers", [1, 2, 3])
@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("shards", [SHARED, EDGES])
def test_refit_is_that_of_each_user_alone(shards, item_bias, items, n_graph_layers):
    users, table, [head] = random_server(shards, (5,), item_bias=item_bias)
    n_steps, l2 = 4, 0.1
    found = users.clone()
    for cohort in shards.user_chunks(np.arange(shards.n_clients)):
        found[cohort.users] = ncf.refit_users(
            cohort,
            users[cohort.users],
            table,
            head,
            item_bias=item_bias,
            n_negatives=3,
            n_steps=n_steps,
            l2=l2,
            key=5,
            n_graph_layers=n_graph_layers,
            item_propagation=items,
        )
    own = {user: [] for user in range(shards.n_users)}
    for client in range(shards.n_clients):
        for example in examples_of(shards, client, n_negatives=3, batch_size=None, key=5):
            own[example.user].append(example)
    for user, examples in own.items():
        if not examples:
            assert torch.equal(found[user], users[user])
            continue
        rows = table[[example.item for example in examples]]
        labels = users.new_tensor([example.label for example in examples])
        liked = torch.nonzero(labels)[:, 0].tolist()
        u = users[user].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([u], lr=0.05)
        best, lowest = users[user], float("inf")
        for _ in range(n_steps + 1):
            optimizer.zero_grad()
            vector, moved = propagated(u, rows, liked, n_graph_layers, items=items)
            scores = torch.stack([logit(vector, row, head, item_bias=item_bias) for row in moved])
            loss = binary_cross_entropy_with_logits(scores, labels) + l2 / 2 * u.square().sum()
            if float(loss.detach()) < lowest:
                best, lowest = u.detach().clone(), float(loss.detach())
            torch.autograd.backward([loss])
            optimizer.step()
        torch.testing.assert_close(found[user], best, rtol=1e-6, atol=1e-6)
        assert not torch.equal(found[user], users[user])
