import numpy as np
import pytest
import torch

from fedrecsk.engine import mixing
from fedrecsk.engine.mixing import (
    RowSums,
    csc_product,
    csr_product,
    row_offsets,
    scatter_sum,
    weighted_mean,
)


def plain_scatter_sum(values, index, n_rows, weights):
    out = [[0.0] * values.shape[1] for _ in range(n_rows)]
    for k, row in enumerate(index.tolist()):
        for column in range(values.shape[1]):
            out[row][column] += float(weights[k]) * float(values[k, column])
    return torch.tensor(out).reshape(n_rows, values.shape[1])


def test_few_and_many_rows_are_summed_alike(monkeypatch):
    values, index = torch.randn(300, 4), torch.randint(20, (300,))
    weights = torch.rand(300)
    few = scatter_sum(values, index, 20, weights)
    monkeypatch.setattr(mixing, "FEW_ROWS", 0)
    many = scatter_sum(values, index, 20, weights)
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n_values", "n_rows", "width"), [(200, 17, 4), (3, 50, 1), (60, 1, 3), (5000, 40, 2)]
)
def test_scatter_sum_is_a_loop_over_rows(n_values, n_rows, width, weighted):
    generator = torch.Generator().manual_seed(n_values)
    values = torch.randn(n_values, width, generator=generator)
    index = torch.randint(n_rows, (n_values,), generator=generator)
    weights = torch.rand(n_values, generator=generator)
    found = scatter_sum(values, index, n_rows, weights if weighted else None)
    used = weights if weighted else torch.ones(n_values)
    torch.testing.assert_close(
        found, plain_scatter_sum(values, index, n_rows, used), rtol=1e-5, atol=1e-5
    )
    added = torch.zeros(n_rows, width).index_add_(0, index, used[:, None] * values)
    torch.testing.assert_close(found, added, rtol=1e-5, atol=1e-5)


def test_scatter_sum_leaves_untouched_rows_at_zero():
    found = scatter_sum(torch.ones(2, 3), torch.tensor([4, 4]), 6)
    assert found.sum(1).tolist() == [0.0, 0.0, 0.0, 0.0, 6.0, 0.0]


def test_scatter_sum_of_nothing_is_zero():
    found = scatter_sum(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 5)
    assert torch.equal(found, torch.zeros(5, 3))


def test_scatter_sum_keeps_double_precision():
    values = torch.tensor([[1.0], [1e-12]], dtype=torch.float64)
    found = scatter_sum(values, torch.tensor([0, 0]), 1, torch.ones(2))
    assert found.dtype == torch.float64
    assert float(found) == 1.0 + 1e-12


def test_scatter_sum_does_not_change_its_arguments():
    values, index, weights = torch.randn(9, 2), torch.arange(9) % 4, torch.rand(9)
    copies = [values.clone(), index.clone(), weights.clone()]
    scatter_sum(values, index, 4, weights)
    assert all(map(torch.equal, copies, [values, index, weights]))


def test_row_sums_are_prepared_once_and_used_again():
    index = torch.tensor([2, 0, 2, 4])
    sums = RowSums(index, 5)
    for width in (1, 3):
        values, weights = torch.rand(4, width), torch.rand(4)
        expected = plain_scatter_sum(values, index, 5, weights)
        torch.testing.assert_close(sums.add(values, weights), expected)
        expected = plain_scatter_sum(values, index, 5, torch.ones(4))
        torch.testing.assert_close(sums.add(values), expected)


def test_products_by_column_and_by_row_are_the_same():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(7, (50,), generator=generator)
    values, weights = torch.randn(50, 3, generator=generator), torch.rand(50, generator=generator)
    order = torch.argsort(index, stable=True)
    by_row = csr_product(row_offsets(index, 7), order, weights[order], values, 7)
    by_column = csc_product(torch.arange(51), index, weights, values, 7)
    torch.testing.assert_close(by_column, by_row)
    assert by_column.dtype == values.dtype


def test_columns_may_have_several_entries_or_none():
    indptr, rows = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 0, 1])
    found = csc_product(indptr, rows, torch.tensor([2.0, 3.0, 5.0]), torch.eye(3), 2)
    assert found.tolist() == [[3.0, 0.0, 0.0], [2.0, 0.0, 5.0]]


def test_row_offsets_count_entries():
    assert row_offsets(torch.tensor([3, 0, 3, 1]), 5).tolist() == [0, 1, 2, 2, 4, 4]
    assert row_offsets(torch.zeros(0, dtype=torch.int64), 2).tolist() == [0, 0, 0]


def test_csr_product_is_the_dense_product():
    rng = np.random.default_rng(0)
    dense = torch.from_numpy(rng.normal(size=(6, 3)))
    matrix = torch.from_numpy(rng.normal(size=(4, 6)) * (rng.random((4, 6)) < 0.5))
    rows, columns = torch.nonzero(matrix, as_tuple=True)
    found = csr_product(row_offsets(rows, 4), columns, matrix[rows, columns], dense, 4)
    torch.testing.assert_close(found, matrix @ dense)


def test_weighted_mean_divides_touched_rows_only():
    total = torch.tensor([[2.0, 4.0], [0.0, 0.0], [3.0, 3.0]])
    mean = weighted_mean(total, torch.tensor([2.0, 0.0, 0.5]))
    assert mean.tolist() == [[1.0, 2.0], [0.0, 0.0], [6.0, 6.0]]
