import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedrecsk.methods.self_distillation import distill, draw_items
from tests.reference import hetefedrec_reference as reference

N_ITEMS, WIDTHS = 12, (2, 3, 5)
ITEMS = torch.tensor([0, 2, 3, 5, 7, 8, 11])


def random_tables(n_items=N_ITEMS, widths=WIDTHS, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(n_items, width, generator=generator) for width in widths]
    return [0.1 * draw.to(dtype) for draw in draws]


def loss_of(tables, items):
    return distill(tables, items, n_steps=0, learning_rate=0.1)[1]


def with_zero_rows(tables):
    """One row is zero in one table, another in all of them."""
    for table in tables:
        table[7] = 0.0
    tables[1][3] = 0.0
    return tables


@pytest.mark.parametrize("n_steps", [1, 6])
@pytest.mark.parametrize("widths", [(2, 3, 5), (4, 4), (1, 6)], ids=str)
def test_steps_are_those_of_autograd_and_adam(widths, n_steps):
    tables = random_tables(widths=widths)
    found, loss = distill(tables, ITEMS, n_steps=n_steps, learning_rate=0.01)
    expected, losses = reference.distill(tables, ITEMS, n_steps, 0.01)
    assert loss == pytest.approx(losses[0], rel=1e-10)
    for table, other in zip(found, expected, strict=True):
        torch.testing.assert_close(table, other, rtol=1e-7, atol=1e-9)


def test_zero_rows_stay_and_do_no_harm():
    tables = with_zero_rows(random_tables())
    found, loss = distill(tables, ITEMS, n_steps=5, learning_rate=0.01)
    expected, losses = reference.distill(tables, ITEMS, 5, 0.01)
    assert loss == pytest.approx(losses[0], rel=1e-10)
    for table, other in zip(found, expected, strict=True):
        torch.testing.assert_close(table, other, rtol=1e-7, atol=1e-9)
        assert not table[7].any()
    assert not found[1][3].any()


@pytest.mark.parametrize("max_pairs", [1, 7, 20, 48, 49, 10**9])
def test_chunks_do_not_matter(max_pairs):
    tables = random_tables(dtype=torch.float32)
    whole, loss = distill(tables, ITEMS, n_steps=20, learning_rate=1e-3)
    found, other = distill(tables, ITEMS, n_steps=20, learning_rate=1e-3, max_pairs=max_pairs)
    assert other == pytest.approx(loss, rel=1e-5)
    for table, expected, start in zip(found, whole, tables, strict=True):
        torch.testing.assert_close(table, expected, rtol=0.0, atol=1e-5)
        assert (expected - start).abs().max() > 1e-3


def test_chunks_do_not_matter_for_many_items():
    tables = random_tables(700, (8, 16, 32), dtype=torch.float32)
    items = torch.arange(0, 700, 2)
    whole, _ = distill(tables, items, n_steps=5, learning_rate=1e-3)
    found, _ = distill(tables, items, n_steps=5, learning_rate=1e-3, max_pairs=1_000)
    for table, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(table, expected, rtol=0.0, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remember the most elements that any result of torch has had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        several = result if isinstance(result, (list, tuple)) else [result]
        counts = [value.numel() for value in several if isinstance(value, torch.Tensor)]
        self.numel = max([self.numel, *counts])
        return result


def test_no_matrix_of_all_pairs_is_held():
    tables = random_tables(3_000, (2, 4, 8), dtype=torch.float32)
    items = torch.arange(3_000)
    with LargestTensor() as chunked:
        distill(tables, items, n_steps=1, learning_rate=1e-3, max_pairs=30_000)
    assert chunked.numel == 30_000
    with LargestTensor() as whole:
        distill(tables, items[:500], n_steps=1, learning_rate=1e-3)
    assert whole.numel == 500 * 500


def test_tables_become_alike_in_their_relations():
    items = torch.arange(40)
    tables = random_tables(50, (8, 16, 32))
    trained, before = distill(tables, items, n_steps=60, learning_rate=1e-2)
    assert loss_of(trained, items) < 0.3 * before

    def spread(tables, of):
        return torch.stack([reference.relations(table[of]) for table in tables]).var(0).mean()

    assert spread(trained, items) < 0.3 * spread(tables, items)
    others = torch.arange(40, 50)
    assert spread(trained, others) == spread(tables, others)


def test_other_rows_and_the_arguments_stay():
    tables = random_tables()
    copies = [table.clone() for table in tables]
    trained, _ = distill(tables, ITEMS, n_steps=3, learning_rate=0.01)
    others = [i for i in range(N_ITEMS) if i not in ITEMS.tolist()]
    for table, copy, new in zip(tables, copies, trained, strict=True):
        assert torch.equal(table, copy)
        assert torch.equal(new[others], copy[others])
        assert (new[ITEMS] != copy[ITEMS]).all()
        assert new.dtype == table.dtype


@pytest.mark.parametrize("n", [0, 1])
def test_one_table_or_one_item_teach_nothing(n):
    tables = random_tables()
    for given, items in [(tables[:1], ITEMS), (tables, ITEMS[:n])]:
        same, loss = distill(given, items, n_steps=3, learning_rate=0.1)
        assert loss == 0.0
        assert all(map(torch.equal, same, given))


def test_tables_that_agree_stay_to_the_bit():
    table = random_tables(dtype=torch.float32)[2]
    same, loss = distill([table] * 3, ITEMS, n_steps=3, learning_rate=0.1)
    assert loss == 0.0
    assert all(torch.equal(other, table) for other in same)


def test_wider_tables_with_the_same_relations_stay():
    """Zeros in further columns, and the length of vectors, change no relation."""
    table = random_tables()[1]
    wide = torch.cat([3.0 * table, torch.zeros(N_ITEMS, 2)], 1)
    # One step: Adam would blow up from step to step what rounding leaves of the gradient.
    trained, loss = distill([table, wide], ITEMS, n_steps=1, learning_rate=1e-3)
    assert loss < 1e-30
    torch.testing.assert_close(trained[0], table, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(trained[1], wide, rtol=0.0, atol=1e-9)


# The draw ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_items", "fraction", "minimum", "size"),
    [
        (10_000, 0.1, 256, 1_000),
        (10_001, 0.1, 256, 1_001),
        (1_000, 0.1, 256, 256),
        (100, 0.1, 256, 100),
        (30, 0.1, 0, 3),
        (100, 0.07, 0, 7),
        (50, 1.0, 0, 50),
        (1, 0.1, 256, 1),
    ],
)
def test_as_many_items_as_asked_for(n_items, fraction, minimum, size):
    items = draw_items(n_items, fraction, np.random.default_rng(0), minimum)
    assert items.dtype == torch.int64
    assert len(items) == size
    assert items.tolist() == sorted(set(items.tolist()))
    assert items[0] >= 0
    assert items[-1] < n_items


def test_draws_are_uniform_and_depend_on_the_generator_alone():
    first, again, other = (draw_items(60, 0.5, np.random.default_rng(s), 0) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rng = np.random.default_rng(0)
    counts = sum(torch.bincount(draw_items(60, 0.5, rng, 0), minlength=60) for _ in range(400))
    assert 150 < counts.min() <= counts.max() < 250  # expected 200 each, deviation 10
