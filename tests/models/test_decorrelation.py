import pytest
import torch

from fedrecsk.models.decorrelation import (
    correlation,
    decorrelation_loss,
    decorrelation_pull,
    spectrum,
)
from tests.reference import hetefedrec_reference as reference


def mixed(n, width, seed=0, rank=None):
    """Correlated columns of different scales and means."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, rank or width), (rank or width, width)
    taste, mixing = (torch.randn(*s, generator=generator).double() for s in shape)
    scale = torch.logspace(-1, 1, width).double()
    return taste @ mixing * scale + 3.0 * scale


def with_constants(table):
    """Replace the second and the last column by constants whose mean is rounded."""
    changed = table.clone()
    changed[:, 1], changed[:, -1] = 0.1, 0.0
    return changed


TABLES = {
    "correlated": mixed(9, 4),
    "constants": with_constants(mixed(9, 5)),
    "all constant": torch.full((7, 3), 0.1).double(),
    "wider than long": mixed(3, 6),
    "one column": mixed(9, 1),
    "one row": mixed(1, 4),
    "rank one": mixed(9, 4, rank=1),
}
CASES = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


@CASES
def test_correlations_are_those_of_the_definition(table):
    torch.testing.assert_close(correlation(table), reference.correlation(table))


def test_correlations_are_those_of_torch():
    table = mixed(30, 6)
    torch.testing.assert_close(correlation(table), torch.corrcoef(table.T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e-30])
def test_a_constant_column_correlates_with_nothing(value, dtype):
    table = mixed(1_001, 3).to(dtype)
    table[:, 1] = value
    found = correlation(table)
    assert found[1].tolist() == found[:, 1].tolist() == [0.0, 1.0, 0.0]
    assert found[0, 2] != 0.0
    mean, matrix = decorrelation_pull(table, 1.0)
    assert torch.isfinite(mean).all()
    assert torch.isfinite(matrix).all()
    assert not matrix[1].any()
    assert not matrix[:, 1].any()
    assert matrix[0].any()


@CASES
def test_the_pull_is_the_gradient_of_the_definition(table):
    mean, matrix = decorrelation_pull(table, 0.7)
    assert (mean.shape, matrix.shape) == ((table.shape[1],), (table.shape[1],) * 2)
    expected = reference.decorrelation_gradient(table, 0.7)
    torch.testing.assert_close((table - mean) @ matrix, expected, rtol=1e-9, atol=1e-12)


def test_single_precision_is_enough():
    table = mixed(400, 16)
    mean, matrix = decorrelation_pull(table.float(), 1.0)
    found = (table.float() - mean) @ matrix
    expected = reference.decorrelation_gradient(table, 1.0)
    error = (found.double() - expected).abs().max(0).values
    assert (error < 1e-4 * expected.abs().max(0).values).all()


@CASES
def test_the_loss_is_the_norm_per_column(table):
    expected = reference.correlation(table).square().sum().sqrt() / table.shape[1]
    torch.testing.assert_close(decorrelation_loss(table), expected)


def test_alpha_scales_the_pull_and_the_scale_of_a_column_does_not_matter():
    table = mixed(12, 3)
    matrix = decorrelation_pull(table, 1.0)[1]
    torch.testing.assert_close(decorrelation_pull(table, 2.5)[1], 2.5 * matrix)
    scaled = table * torch.tensor([1.0, 10.0, 0.1]).double() - 4.0
    torch.testing.assert_close(decorrelation_loss(scaled), decorrelation_loss(table))


def test_steps_down_the_pull_evens_out_the_dimensions():
    table = mixed(60, 6, rank=2) + 0.3 * mixed(60, 6, seed=1)
    table = (table - table.mean(0)) / table.std(0)
    before = spectrum(table)
    for _ in range(200):
        mean, matrix = decorrelation_pull(table, 1.0)
        table = table - 20.0 * (table - mean) @ matrix
    after = spectrum(table)
    assert after.variance < 0.2 * before.variance
    assert after.effective_rank > before.effective_rank + 1.0


@CASES
def test_eigenvalues_sum_to_the_width_and_the_norm_tells_their_variance(table):
    width = table.shape[1]
    found = spectrum(table)
    assert found.eigenvalues.shape == (width,)
    assert found.eigenvalues.tolist() == sorted(found.eigenvalues.tolist(), reverse=True)
    assert float(found.eigenvalues.sum()) == pytest.approx(width)
    norm = reference.correlation(table).square().sum()
    assert float((found.eigenvalues - 1.0).square().sum()) == pytest.approx(float(norm) - width)
    assert found.variance * width == pytest.approx(float(norm) - width)


@pytest.mark.parametrize("name", ["correlated", "wider than long", "one column", "rank one"])
def test_eigenvalues_are_squared_singular_values_of_the_standardised_table(name):
    table = TABLES[name]
    standard = (table - table.mean(0)) / table.std(0, correction=0)
    singular = torch.linalg.svdvals(standard).square() / len(table)
    found = spectrum(table).eigenvalues
    torch.testing.assert_close(found[: len(singular)], singular, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[len(singular) :].sum(), torch.tensor(0.0).double())


def test_effective_rank_by_hand():
    assert spectrum(TABLES["one column"]).effective_rank == 1.0
    assert spectrum(TABLES["rank one"]).effective_rank == pytest.approx(1.0)
    orthogonal = torch.linalg.qr(mixed(40, 5) - mixed(40, 5).mean(0)).Q
    assert spectrum(orthogonal).effective_rank == pytest.approx(5.0)
    # Two columns that are one, and one apart: eigenvalues 2, 1, 0.
    pair = torch.cat([orthogonal[:, :1], -3.0 * orthogonal[:, :1], orthogonal[:, 1:2]], 1)
    assert spectrum(pair).effective_rank == pytest.approx((3 / 2) ** (2 / 3) * 3 ** (1 / 3))
    assert spectrum(pair.float()).effective_rank == pytest.approx(1.8899, abs=1e-4)


def test_arguments_stay():
    table = mixed(9, 4)
    copy = table.clone()
    decorrelation_pull(table, 1.0)
    spectrum(table)
    assert torch.equal(table, copy)
