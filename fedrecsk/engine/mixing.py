"""Aggregation. Whatever its name, it is a weighted sum over clients.

Rows of many clients meet in one table. Scattering them one by one (``index_add_``) is bound by
random writes; a sparse matrix with one row per table row turns the same sum into a streaming
product, and carries the weights for free.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

# Up to here the random writes of index_add_ cost less than preparing a sparse product. Only on
# a CPU: a GPU adds in no fixed order.
FEW_ROWS = 4_096


@dataclass(frozen=True, eq=False)
class RowSums:
    """Where the rows of many clients go in a table; sorts once, sums as often as wanted.

    Attributes
    ----------
    order : Tensor of shape (K,)
        The rows by the table row they belong to.
    offsets : Tensor of shape (n_rows + 1,)
        Where each table row starts in `order`.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.mixing import RowSums
    >>> sums = RowSums.of(torch.tensor([2, 0, 2]), 3)
    >>> sums.add(torch.tensor([[1.0], [2.0], [4.0]])).flatten().tolist()
    [2.0, 0.0, 5.0]
    """

    order: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, index: Tensor, n_rows: int) -> RowSums:
        """Prepare sums of rows that belong to the table rows `index` (K,)."""
        return cls(torch.argsort(index, stable=True), row_offsets(index, n_rows))

    def add(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum weighted rows into the rows of the table.

        Parameters
        ----------
        values : Tensor of shape (K, d)
            One row per (client, table row).
        weights : Tensor of shape (K,), optional
            Default: ones.

        Returns
        -------
        Tensor of shape (n_rows, d)
            ``out[i] = sum of weights[k] * values[k] over index[k] == i``; zero for untouched
            rows.
        """
        if weights is None:
            data = values.new_ones(len(self.order))
        else:
            data = weights.index_select(0, self.order).to(values.dtype)
        return csr_product(self.offsets, self.order, data, values, len(self.offsets) - 1)


def scatter_sum(
    values: Tensor, index: Tensor, n_rows: int, weights: Tensor | None = None
) -> Tensor:
    """Sum weighted rows into the rows of a table, once; see `RowSums.add`.

    Parameters
    ----------
    values : Tensor of shape (K, d)
    index : Tensor of shape (K,), int64
        The table row that each one belongs to.
    n_rows : int
        Rows of the table.
    weights : Tensor of shape (K,), optional

    Returns
    -------
    Tensor of shape (n_rows, d)

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.mixing import scatter_sum
    >>> scatter_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), 3)
    tensor([[2.],
            [0.],
            [5.]])
    """
    if len(index) <= FEW_ROWS and values.device.type == "cpu":
        weighted = values if weights is None else values * weights[:, None]
        return values.new_zeros(n_rows, values.shape[1]).index_add_(0, index, weighted)
    return RowSums.of(index, n_rows).add(values, weights)


def row_offsets(index: Tensor, n_rows: int) -> Tensor:
    """Offsets (n_rows + 1,) of the rows of a CSR matrix whose entries lie in rows `index`."""
    # Not torch.bincount, whose length depends on the values, for which a GPU would be waited.
    one = torch.ones((), dtype=torch.int64, device=index.device)
    counts = one.new_zeros(n_rows).scatter_add_(0, index, one.expand(len(index)))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def csr_product(
    indptr: Tensor, columns: Tensor, data: Tensor, dense: Tensor, n_rows: int
) -> Tensor:
    """Product of a CSR matrix (n_rows, len(dense)) with a dense one, on any device."""
    size = (n_rows, len(dense))
    matrix = torch.sparse_csr_tensor(indptr, columns, data, size=size, check_invariants=False)
    return matrix @ dense


def weighted_mean(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide rows by their total weight; rows that nobody touched stay zero.

    Parameters
    ----------
    numerator : Tensor of shape (n_rows, d)
    denominator : Tensor of shape (n_rows,)

    Returns
    -------
    Tensor of shape (n_rows, d)
    """
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return numerator / safe[:, None]


def _hear_out_torch() -> None:
    """Make the first CSR tensor of the process, on which torch says that they are in beta.

    It says so once. We use the product alone, and the tests compare it with a loop.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse", category=UserWarning)
        one = torch.ones(1)
        csr_product(torch.tensor([0, 1]), torch.tensor([0]), one, one[:, None], 1)


_hear_out_torch()
