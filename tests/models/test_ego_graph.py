import numpy as np
import pytest
import torch

from fedrecsk.models.ego_graph import (
    EgoGraphs,
    Propagation,
    StarsInList,
    StarsInRows,
    neighbourhoods,
)
from tests.reference.ncf_reference import propagated

LIKED = [[0, 3, 4], [], [2], [5, 6, 0, 1]]


def drawn(width=3, n_items=7, item_bias=True):
    """Users and items, and the items that the users like as CSR."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(len(LIKED), width, generator=generator).double()
    table = torch.randn(n_items, width + item_bias, generator=generator).double()
    indptr = torch.tensor(np.cumsum([0] + [len(items) for items in LIKED]))
    return users, table, indptr, torch.tensor([item for items in LIKED for item in items])


@pytest.mark.parametrize("n_layers", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("items", [False, True])
def test_propagation_is_that_of_the_adjacency_matrix(n_layers, item_bias, items):
    users, table, indptr, indices = drawn(item_bias=item_bias)
    graphs = EgoGraphs.of(users, table, indptr, indices, n_layers=n_layers, items=items)
    for user, liked in enumerate(LIKED):
        vector, rows = propagated(users[user], table, liked, n_layers, items=items)
        torch.testing.assert_close(graphs.users[user], vector)
        who = torch.full((len(table),), user)
        is_positive = torch.isin(torch.arange(len(table)), torch.tensor(liked, dtype=torch.int64))
        vectors, found = graphs.pairs(who, table, is_positive)
        torch.testing.assert_close(found, rows)
        torch.testing.assert_close(vectors, vector.expand(len(table), -1))


def test_one_layer_is_the_formula_of_lightgcn():
    users, table, indptr, indices = drawn(item_bias=False)
    graphs = EgoGraphs.of(users, table, indptr, indices, n_layers=1, items=True)
    n, liked = 4, [5, 6, 0, 1]
    expected = (users[3] + table[liked].sum(0) / np.sqrt(n)) / 2
    torch.testing.assert_close(graphs.users[3], expected)
    _, rows = graphs.pairs(torch.tensor([3, 3]), table[[6, 2]], torch.tensor([True, False]))
    expected = torch.stack([(table[6] + users[3] / np.sqrt(n)) / 2, table[2] / 2])
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_without_items_nothing_tells_a_positive_from_others(n_layers):
    users, table, indptr, indices = drawn()
    graphs, full = (
        EgoGraphs.of(users, table, indptr, indices, n_layers=n_layers, items=items)
        for items in (False, True)
    )
    assert torch.equal(graphs.users, full.users)
    who = torch.full((len(table),), 3)
    for is_positive in (torch.zeros(len(table), dtype=bool), torch.ones(len(table), dtype=bool)):
        _, rows = graphs.pairs(who, table, is_positive)
        torch.testing.assert_close(rows[:, :-1], table[:, :-1] / (n_layers + 1))
        assert torch.equal(rows[:, -1], table[:, -1])
    assert not torch.allclose(full.pairs(who, table, is_positive)[1], rows)


@pytest.mark.parametrize("items", [False, True])
def test_no_layer_propagates_nothing(items):
    users, table, indptr, indices = drawn()
    graphs = EgoGraphs.of(users, table, indptr, indices, n_layers=0, items=items)
    assert torch.equal(graphs.users, users)
    everything = torch.ones(len(users), dtype=torch.bool)
    _, rows = graphs.pairs(torch.arange(len(users)), table[: len(users)], everything)
    assert torch.equal(rows, table[: len(users)])


def test_a_negative_number_of_layers():
    with pytest.raises(ValueError, match="n_graph_layers must not be negative, found -1"):
        Propagation.of(-1, items=False)


def test_a_neighbourhood_rounds_the_same_whoever_else_is_there():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(500, 8, generator=generator)
    counts = torch.tensor([300, 0, 5, 200])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    indices = torch.cat([torch.randperm(500, generator=generator)[:n] for n in counts.tolist()])
    total, root = neighbourhoods(table, indptr, indices)
    for user in range(4):
        own = indices[indptr[user] : indptr[user + 1]]
        alone, its_root = neighbourhoods(table, torch.tensor([0, len(own)]), own)
        assert torch.equal(alone[0], total[user])
        assert torch.equal(its_root[0], root[user])
    assert not total[1].any()
    assert root[1] == 0
    nobody, no_root = neighbourhoods(table, torch.tensor([0]), indices[:0])
    assert (nobody.shape, no_root.shape) == ((0, 8), (0, 1))


def by_autograd(users, rows, examples, n_layers, by_users, by_rows, *, items):
    """Gradients by users (U, d) and by the row of each example, through the adjacency matrix."""
    u, v = users.clone().requires_grad_(True), rows.clone().requires_grad_(True)
    total = u.new_zeros(())
    for user in range(len(users)):
        own = [k for k, (who, _) in enumerate(examples) if who == user]
        liked = [place for place, k in enumerate(own) if examples[k][1]]
        vector, moved = propagated(u[user], v[own], liked, n_layers, items=items)
        total = total + (moved * by_rows[own]).sum() + (vector * by_users[own]).sum()
    return torch.autograd.grad(total, [u, v])


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("items", [False, True])
def test_gradients_of_a_list_of_examples(n_layers, items):
    generator = torch.Generator().manual_seed(4)
    examples = [(2, 1), (0, 0), (0, 1), (2, 0), (0, 1), (3, 0), (2, 1), (0, 1), (3, 1)]
    users = torch.randn(4, 3, generator=generator).double()
    rows = torch.randn(len(examples), 4, generator=generator).double()
    by_users = torch.randn(len(examples), 3, generator=generator).double()
    by_rows = torch.randn(len(examples), 4, generator=generator).double()
    user, positive = torch.tensor(examples).T
    stars = StarsInList.of(user, positive.double(), 4, Propagation.of(n_layers, items=items))
    expected = by_autograd(users, rows, examples, n_layers, by_users, by_rows, items=items)
    by_user, by_row = stars.backward(by_users, by_rows)
    summed = torch.zeros_like(users).index_add_(0, user, by_user)
    torch.testing.assert_close(summed, expected[0])
    torch.testing.assert_close(by_row, expected[1])


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("items", [False, True])
def test_rows_of_a_block_are_the_same_graphs_as_a_list(n_layers, items):
    # Two clients, a positive and two negatives each time; the second client has padding.
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(2, 9, dtype=torch.float64)
    mask[1, 5] = mask[1, 6] = mask[1, 7] = mask[1, 8] = 0.0
    item = torch.randn(2, 9, 4, generator=generator).double()
    user = torch.randn(2, 1, 3, generator=generator).double()
    layers = Propagation.of(n_layers, items=items)
    stars = StarsInRows.of(mask, 3, layers)
    moved, gain = stars.forward(user, item)
    assert (gain is not None) == items

    positive = torch.zeros_like(mask)
    positive[:, ::3] = mask[:, ::3]
    valid = mask.reshape(-1) > 0
    owner = torch.arange(2).repeat_interleave(9)[valid]
    same = StarsInList.of(owner, positive.reshape(-1)[valid], 2, layers)
    vectors, rows = same.forward(user[:, 0], item.reshape(-1, 4)[valid])
    torch.testing.assert_close(moved[owner, 0], vectors)
    found = layers.item * item[:, :, :3]
    if items:
        found = found + positive[:, :, None] * gain
    torch.testing.assert_close(found.reshape(-1, 3)[valid], rows[:, :3])

    by_vectors = torch.randn(len(owner), 3, generator=generator).double()
    by_rows = torch.randn(len(owner), 4, generator=generator).double()
    by_user, by_row = same.backward(by_vectors, by_rows)
    padded = torch.zeros(18, 3, dtype=torch.float64)
    padded[valid] = by_rows[:, :3]
    padded = padded.reshape(2, 9, 3)
    summed = torch.zeros(2, 3, dtype=torch.float64)
    by_gain = stars.positives(padded).sum(1, keepdim=True) if items else None
    ours, through = stars.backward(summed.index_add(0, owner, by_vectors)[:, None], by_gain)
    torch.testing.assert_close(ours[:, 0], summed.index_add(0, owner, by_user))
    grad = layers.item * padded
    stars.positives(grad).add_(through)
    torch.testing.assert_close(grad.reshape(-1, 3)[valid], by_row[:, :3])
    assert not grad.reshape(-1, 3)[~valid].any()
