"""Dimensional decorrelation: keep the columns of an item table from saying the same thing.

Yuan, Qu, Cui, Tong, Zhou, Yin. "HeteFedRec: Federated Recommender Systems with Model
Heterogeneity", ICDE 2024, arXiv:2307.12810. With V (n, N) and C the correlation matrix of its
columns over the items,

    loss of a client   + alpha * ||C||_F / N

The eigenvalues λ of C are the squared singular values of the standardised table divided by n.
They sum to N and Σ (λ - 1)^2 = ||C||_F^2 - N, so the penalty shrinks their variance: without it
a wide table spends its columns on few directions.

The gradient has a closed form. With z_i = D (v_i - mean), D = diag(1 / std), B = C / ||C||_F,

    gradient of ||C||_F by v_i  =  (2 / n) D (B - diag((B C)_kk)) D (v_i - mean),

one N x N matrix for all items: a client can apply it to the rows that it trains.

Only a summary of the paper could be read. It does not say whether the norm is squared, nor how
deviations are counted; here the norm is plain and statistics are those of the population, which
C does not depend on. A column without spread correlates with nothing and gets no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A column whose spread is this many rounding errors of its largest value is constant: the mean of
# equal numbers is rounded as well.
ROUNDING_ERRORS = 16.0


def correlation(table: Tensor) -> Tensor:
    """Correlation matrix of the columns of a table over its rows.

    Parameters
    ----------
    table : Tensor of shape (n, N)
        Item vectors, without a bias column; n >= 1.

    Returns
    -------
    Tensor of shape (N, N)
        Symmetric with ones on the diagonal. A constant column correlates with nothing, so one
        row alone gives the identity.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.decorrelation import correlation
    >>> correlation(torch.tensor([[1.0, -2.0, 5.0], [3.0, -6.0, 5.0]]))
    tensor([[ 1., -1.,  0.],
            [-1.,  1.,  0.],
            [ 0.,  0.,  1.]])
    """
    mean, inverse = _moments(table)
    return _correlation((table - mean) * inverse)


def decorrelation_loss(table: Tensor) -> Tensor:
    """Return ||C||_F / N: 1 / √N for uncorrelated columns, 1 for columns that are all the same.

    Parameters
    ----------
    table : Tensor of shape (n, N)

    Returns
    -------
    Tensor of shape ()

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.decorrelation import decorrelation_loss
    >>> column = torch.tensor([[1.0], [2.0], [6.0]])
    >>> round(float(decorrelation_loss(torch.cat([column, -column], 1))), 4)
    1.0
    >>> float(decorrelation_loss(torch.zeros(3, 4)))
    0.5
    """
    loss: Tensor = torch.linalg.matrix_norm(correlation(table)) / table.shape[1]
    return loss


def decorrelation_pull(table: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return what gives the gradient of alpha * ||C||_F / N by any row of the table.

    Parameters
    ----------
    table : Tensor of shape (n, N)
    alpha : float

    Returns
    -------
    mean : Tensor of shape (N,)
    matrix : Tensor of shape (N, N)
        Symmetric. The gradient by row v is ``(v - mean) @ matrix``.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.decorrelation import decorrelation_loss, decorrelation_pull
    >>> table = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]])
    >>> mean, matrix = decorrelation_pull(table, alpha=1.0)
    >>> moved = table - 0.1 * (table - mean) @ matrix
    >>> bool(decorrelation_loss(moved) < decorrelation_loss(table))
    True
    """
    n, width = table.shape
    mean, inverse = _moments(table)
    correlated = _correlation((table - mean) * inverse)
    norm = torch.linalg.matrix_norm(correlated)
    inner = correlated / norm
    # B and C are symmetric: (B C)_kk is the sum of a row of their elementwise product.
    inner = inner - torch.diag((inner * correlated).sum(1))
    scale = 2.0 * alpha / (n * width)
    return mean, scale * inverse[:, None] * inner * inverse


@dataclass(frozen=True, eq=False)
class Spectrum:
    """How a table spreads over its dimensions.

    Attributes
    ----------
    eigenvalues : Tensor of shape (N,), float64
        λ of the correlation matrix, the largest first, never negative; they sum to N. The
        singular values of the standardised table are √(n λ), with a constant column, which
        cannot be standardised, counted as a direction of its own.
    variance : float
        Mean of (λ - 1)^2 = (||C||_F^2 - N) / N; 0 for uncorrelated columns.
    effective_rank : float
        exp(entropy of λ / N), between 1 and N. Roy and Vetterli (EUSIPCO 2007) take the
        singular values' shares; these are the shares of variance.
    """

    eigenvalues: Tensor
    variance: float
    effective_rank: float


def spectrum(table: Tensor) -> Spectrum:
    """Measure how evenly a table uses its dimensions, whatever their scales.

    Parameters
    ----------
    table : Tensor of shape (n, N)

    Returns
    -------
    Spectrum

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.decorrelation import spectrum
    >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> even, flat = spectrum(corners), spectrum(corners[:, :1].repeat(1, 2))
    >>> round(even.effective_rank, 3), round(flat.effective_rank, 3)
    (2.0, 1.0)
    >>> round(even.variance, 3), round(flat.variance, 3)
    (0.0, 1.0)
    """
    values = torch.linalg.eigvalsh(correlation(table.double())).flip(0).clamp_min(0.0)
    share = values / values.sum()
    entropy = -float(torch.special.xlogy(share, share).sum())
    return Spectrum(values, float((values - 1.0).square().mean()), math.exp(entropy))


def _moments(table: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std (N,) of the columns; 0 for the latter where a column is constant."""
    mean = table.mean(0)
    spread = (table - mean).square().mean(0).sqrt()
    unit = torch.finfo(table.dtype).eps * table.abs().amax(0)
    varies = spread > ROUNDING_ERRORS * unit
    return mean, torch.where(varies, 1.0 / spread, torch.zeros_like(spread))


def _correlation(standard: Tensor) -> Tensor:
    """Correlation matrix of standard scores (n, N); constant columns are zero there."""
    correlated = standard.T @ standard / len(standard)
    # Not 1 but for rounding already, and 0 for constant columns.
    correlated.fill_diagonal_(1.0)
    return correlated
