"""Padded aggregation: add item updates of different widths in one table.

Yuan, Qu, Cui, Tong, Zhou, Yin. "HeteFedRec: Federated Recommender Systems with Model
Heterogeneity", ICDE 2024, arXiv:2307.12810. With widths N_1 <= ... <= N_l:

    every client      sends the changes of the rows that it trained, N_x columns each
    server            pads them with zeros to N_l columns, adds them up and divides
    table of width N  <- itself + the first N columns of the result

Tables that start as slices of one another stay so, as each takes its slice of the same change.

Only a summary of the paper could be read, and it does not say what the sum is divided by:

- ``"owners"``: for each row and column, the weight of the clients that trained the row and have
  the column. A column learns at the same rate whoever owns it.
- ``"clients"``: the weight of all participants, as the mean of the padded matrices. The columns
  that only large clients own, and rows that few have trained, move little.
- ``"sum"``: nothing.

An item bias, the last column of every table whatever its width, is owned by all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Denominator = Literal["owners", "clients", "sum"]


def combine(
    sums: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    total_weight: float,
    denominator: Denominator,
    item_bias: bool,
) -> Tensor:
    """Combine the item updates of clients of several sizes in one change of the widest table.

    Parameters
    ----------
    sums : sequence of Tensor of shape (n_items, N_x [+ 1])
        One entry per size, the widest last, zeros for a size without clients: the sum over the
        clients of the size of weight * (their row - the server's row). With the bias as the last
        column if `item_bias`.
    weights : sequence of Tensor of shape (n_items,)
        For each size, the summed weight of its clients that trained the row.
    total_weight : float
        Of all participants, whatever rows they trained; read by ``"clients"`` alone.
    denominator : {"owners", "clients", "sum"}
        See the module's head.
    item_bias : bool

    Returns
    -------
    Tensor of shape (n_items, N_l [+ 1])
        Zero where nobody trained; every table takes its part with `slice_of`.

    Examples
    --------
    Three clients of width 1 and one of width 2 have trained the one item there is:

    >>> import torch
    >>> from fedrecsk.methods.padded_aggregation import combine
    >>> sums = torch.tensor([[6.0]]), torch.tensor([[2.0, 2.0]])
    >>> weights = torch.tensor([3.0]), torch.tensor([1.0])
    >>> for denominator in ("owners", "clients", "sum"):
    ...     change = combine(
    ...         sums, weights, total_weight=4.0, denominator=denominator, item_bias=False
    ...     )
    ...     print(denominator, change.tolist())
    owners [[2.0, 2.0]]
    clients [[2.0, 0.5]]
    sum [[8.0, 2.0]]
    """
    total = torch.zeros_like(sums[-1])
    for change in sums:
        _add(total, change, item_bias)
    if denominator == "sum":
        return total
    if denominator == "clients":
        # Nobody took part: nothing to divide.
        return total / total_weight if total_weight > 0 else total
    owned = torch.zeros_like(total)
    for change, weight in zip(sums, weights, strict=True):
        _add(owned, weight[:, None].expand_as(change), item_bias)
    return torch.where(owned > 0, total / owned, torch.zeros_like(total))


def slice_of(change: Tensor, n_factors: int, *, item_bias: bool) -> Tensor:
    """Return the part of a change (or of a table) that a table of fewer factors takes.

    Parameters
    ----------
    change : Tensor of shape (n_items, N_l [+ 1])
    n_factors : int
        N <= N_l.
    item_bias : bool
        Whether the last column is a bias.

    Returns
    -------
    Tensor of shape (n_items, N [+ 1])
        The first N columns, and the bias. Without a bias, a view.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.padded_aggregation import slice_of
    >>> slice_of(torch.tensor([[1.0, 2.0, 3.0, 9.0]]), 2, item_bias=True)
    tensor([[1., 2., 9.]])
    """
    factors = change[:, :n_factors]
    return torch.cat([factors, change[:, -1:]], 1) if item_bias else factors


def _add(total: Tensor, part: Tensor, item_bias: bool) -> None:
    """Add a narrower matrix in place, as if padded with zeros before the bias column."""
    width = part.shape[1] - int(item_bias)
    total[:, :width] += part[:, :width]
    if item_bias:
        total[:, -1] += part[:, -1]
