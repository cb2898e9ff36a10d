"""The server's mechanisms of HeteFedRec as their definitions say, with loops and autograd.

decorrelation: ||C||_F / N, C one correlation coefficient at a time
distillation:  cosine of every pair of items, the mean over tables detached, torch's Adam
aggregation:   every client's matrix padded with zeros, one client after another
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def correlation(table: Tensor) -> Tensor:
    """Correlation matrix (N, N) of the columns; the caller's constant columns are exactly so."""
    width = table.shape[1]
    rows = []
    for j in range(width):
        row = []
        for k in range(width):
            a, b = table[:, j] - table[:, j].mean(), table[:, k] - table[:, k].mean()
            constant = any(bool((table[:, c] == table[0, c]).all()) for c in (j, k))
            if j == k or constant:
                row.append(table.new_tensor(float(j == k)))
            else:
                row.append((a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def decorrelation_gradient(table: Tensor, alpha: float) -> Tensor:
    """Gradient (n, N) of alpha * ||C||_F / N by the table."""
    leaf = table.detach().clone().requires_grad_()
    loss = alpha * correlation(leaf).square().sum().sqrt() / table.shape[1]
    # With constant columns alone, the loss does not depend on the table.
    (gradient,) = torch.autograd.grad(loss + 0.0 * leaf.sum(), leaf)
    return gradient


def relations(rows: Tensor) -> Tensor:
    """Cosine similarities (m, m); those of a zero row are 0."""
    directions = [row / row.norm() if bool(row.any()) else 0.0 * row for row in rows]
    return torch.stack([torch.stack([(a * b).sum() for b in directions]) for a in directions])


def relation_loss(tables: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of relations to their mean over the tables, by distances."""
    distances = [1.0 - relations(table) for table in tables]
    target = torch.stack(distances).mean(0).detach()
    pairs = ~torch.eye(len(target), dtype=torch.bool)
    return torch.stack([(d - target)[pairs].square().mean() for d in distances]).mean()


def distill(
    tables: Sequence[Tensor], items: Tensor, n_steps: int, learning_rate: float
) -> tuple[list[Tensor], list[float]]:
    """Train the chosen rows of all tables; returns the tables and the loss before every step."""
    leaves = [table[items].clone().requires_grad_() for table in tables]
    optimizer = torch.optim.Adam(leaves, lr=learning_rate)
    losses = []
    for _ in range(n_steps):
        loss = relation_loss(leaves)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        optimizer.step()
    trained = [table.clone() for table in tables]
    for table, leaf in zip(trained, leaves, strict=True):
        table[items] = leaf.detach()
    return trained, losses


def combine(
    updates: Sequence[Tensor],
    touched: Sequence[Tensor],
    weights: Sequence[float],
    *,
    width: int,
    denominator: str,
    item_bias: bool,
) -> Tensor:
    """Pad the clients' updates (n_items, their width [+ 1]) one by one, add and divide.

    `touched` (n_items,), bool, says which rows a client has trained.
    """
    n_items, columns = len(updates[0]), width + int(item_bias)
    total, owners = torch.zeros(n_items, columns).double(), torch.zeros(n_items, columns).double()
    for update, rows, weight in zip(updates, touched, weights, strict=True):
        own = update.shape[1] - int(item_bias)
        for i in range(n_items):
            if rows[i]:
                for k in range(columns):
                    is_bias = item_bias and k == width
                    if k < own or is_bias:
                        total[i, k] += weight * float(update[i, -1 if is_bias else k])
                        owners[i, k] += weight
    if denominator == "owners":
        for i in range(n_items):
            for k in range(columns):
                if owners[i, k] > 0:
                    total[i, k] /= owners[i, k]
    elif denominator == "clients":
        total /= sum(weights)
    return total
