"""A quasi-Newton server step for sampled-negative matrix factorisation.

A client has one or two examples of an item, so its local steps barely move the item's row, and
the mean of many such moves is a plain gradient step. Gradient steps are slow here: the curvature
of an item along a direction is σ'(s) times the users' spread in that direction, which is small
and uneven. With g_i = Σ_k (change of row i by client k) / (-learning rate x local epochs), the
gradient that the clients' changes amount to, the server makes the step

    v_i -= H_i^-1 g_i,     H_i = h_i Gram + l2 c_i I + I,

    c_i = (1 - ρ) c_i + clients that sent row i        h_i = (1 - ρ) h_i + Σ_k σ'(u_k · v_i)

with Gram the mean of u uᵀ over the delegates (a running average) and ρ the rate of forgetting.
So an item's first clients move it far, like the first terms of an average, and later ones by
about ρ of a Newton step: every row has the step size that suits what is known of it. The identity
is the evidence that a row's start stands for, so that one client does not decide.

The server needs the delegates' user vectors and the rows they send, nothing else. Ours; the idea
of one accumulated precision per row is that of online Newton methods and Kalman filters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedrecsk.engine.mixing import RowSums
from fedrecsk.models.sampled_bce import LocalResult
from fedrecsk.models.whole_data import FLOOR, ServerStatistics

# Weight of a row's start against one client of curvature 1.
PRIOR = 1.0


def curvature_sums(
    result: LocalResult, sums: RowSums, user_vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a chunk of clients adds to the curvature.

    Parameters
    ----------
    result : LocalResult
        Of clients with one user each.
    sums : RowSums
        Of its private rows into the table.
    user_vectors : Tensor of shape (C, width)
        After training, one per client; with the constant 1 where there is an item bias.

    Returns
    -------
    rows : Tensor of shape (n_items,)
        Σ σ'(u_k · v_i) over the clients that sent row i.
    gram : Tensor of shape (width, width)
        Σ u uᵀ.
    """
    weight = row_curvature(result, user_vectors)
    return sums.add(weight[:, None])[:, 0], user_vectors.T @ user_vectors


def row_curvature(result: LocalResult, user_vectors: Tensor) -> Tensor:
    """Give σ'(u_k · v_i) (K,) of each private row, zero for padding; see `curvature_sums`."""
    rows = result.item_table.index_select(0, result.row_items)
    rows *= user_vectors.index_select(0, result.row_clients)
    share = torch.sigmoid(rows.sum(1))
    return share * (1.0 - share) * result.row_valid


def newton_step(
    item_table: Tensor,
    statistics: ServerStatistics,
    *,
    gradient: Tensor,
    counts: Tensor,
    curvature: Tensor,
    gram: Tensor,
    l2: float,
    forgetting: float,
    decay: float,
) -> tuple[Tensor, ServerStatistics]:
    """Move the item table by one quasi-Newton step.

    Parameters
    ----------
    item_table : Tensor of shape (n_items, width)
    statistics : ServerStatistics
        ``counts`` is c, ``curvature`` is h.
    gradient : Tensor of shape (n_items, width)
        Sum over the clients.
    counts, curvature : Tensor of shape (n_items,)
        This round's, see `curvature_sums`.
    gram : Tensor of shape (width, width)
        Mean over this round's delegates.
    l2 : float
    forgetting : float in (0, 1]
        ρ.
    decay : float
        Of the running Gram matrix.

    Returns
    -------
    item_table, statistics
        New objects.
    """
    weight = decay * statistics.weight + (1 - decay)
    new = ServerStatistics(
        gram=decay * statistics.gram + (1 - decay) * gram,
        counts=(1 - forgetting) * statistics.counts + counts,
        curvature=(1 - forgetting) * statistics.curvature + curvature,
        weight=weight,
    )
    values, basis = torch.linalg.eigh(new.gram / weight)
    values = values.clamp_min(FLOOR * values[-1])
    diagonal = new.curvature[:, None] * values + (l2 * new.counts + PRIOR)[:, None]
    return item_table - (gradient @ basis / diagonal) @ basis.T, new
