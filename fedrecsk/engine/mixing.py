"""Aggregation. Whatever its name, it is a weighted sum over clients.

Rows of many clients meet in one table. torch's ``index_add_`` takes them one tensor at a time. A
sparse matrix times a dense one is the same sum and carries the weights for free: on a CPU with one
column for each row that comes in, which reads them in order and adds each into a table that stays
in the cache; on a GPU, which adds in no fixed order, with one row for each row of the table, and
that wants them sorted.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.sparse import csc_array
from torch import Tensor

# Up to here index_add_ costs less than preparing a sparse product. Only on a CPU: a GPU adds in
# no fixed order.
FEW_ROWS = 4_096


@dataclass(frozen=True, eq=False)
class RowSums:
    """Where the rows of many clients go in a table; prepares once, sums as often as wanted.

    Attributes
    ----------
    index : Tensor of shape (K,)
        The table row that each one belongs to.
    n_rows : int
        Rows of the table.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.mixing import RowSums
    >>> sums = RowSums(torch.tensor([2, 0, 2]), 3)
    >>> sums.add(torch.tensor([[1.0], [2.0], [4.0]])).flatten().tolist()
    [2.0, 0.0, 5.0]
    """

    index: Tensor
    n_rows: int

    @cached_property
    def _one_each(self) -> Tensor:
        """Offsets (K + 1,) of a CSC matrix with one entry in each column."""
        return torch.arange(len(self.index) + 1)

    @cached_property
    def _by_row(self) -> tuple[Tensor, Tensor]:
        """The rows by the table row they belong to (K,), and where each of those starts."""
        return torch.argsort(self.index, stable=True), row_offsets(self.index, self.n_rows)

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
        data = values.new_ones(len(self.index)) if weights is None else weights.to(values.dtype)
        if values.device.type == "cpu":
            return csc_product(self._one_each, self.index, data, values, self.n_rows)
        order, offsets = self._by_row
        return csr_product(offsets, order, data.index_select(0, order), values, self.n_rows)


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
    return RowSums(index, n_rows).add(values, weights)


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


def csc_product(indptr: Tensor, rows: Tensor, data: Tensor, dense: Tensor, n_rows: int) -> Tensor:
    """Product of a CSC matrix (n_rows, len(dense)) with a dense one, on a CPU.

    Of columns in any order nothing needs to be sorted, and sums are in the order of the columns.
    """
    matrix = csc_array(
        (data.numpy(), rows.numpy(), indptr.numpy()), shape=(n_rows, len(dense)), copy=False
    )
    return torch.from_numpy(matrix @ dense.numpy())


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


def mean_rows(values: Tensor, index: Tensor, n_rows: int) -> Tensor:
    """Mean (n_rows, d) of the rows (K, d) that belong to each place, told by `index` (K,)."""
    ones = values.new_ones(len(index), 1)
    return weighted_mean(scatter_sum(values, index, n_rows), scatter_sum(ones, index, n_rows)[:, 0])


def _hear_out_torch() -> None:
    """Make the first CSR tensor of the process, on which torch says that they are in beta.

    It says so once. We use the product alone, and the tests compare it with a loop.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse", category=UserWarning)
        one = torch.ones(1)
        csr_product(torch.tensor([0, 1]), torch.tensor([0]), one, one[:, None], 1)


_hear_out_torch()
