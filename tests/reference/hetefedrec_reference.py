"""The server's mechanisms of HeteFedRec as their definitions say, with loops and autograd.

decorrelation: ||C||_F / N, C one correlation coefficient at a time
distillation:  cosine of every pair of items, the mean over tables detached, torch's Adam
aggregation:   every client's matrix padded with zeros, one client after another
rounds:        one client, or one user, after another; an optimiser of torch's for every row
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards
from fedrecsk.models.decorrelation import decorrelation_pull
from tests.reference import whole_data_reference
from tests.reference.ncf_reference import ClientUpdate, train_client
from tests.reference.sampled_bce_reference import examples_of, torch_optimizer

Array = NDArray[np.float64]


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


# Rounds -------------------------------------------------------------------------------------------


@dataclass
class Held:
    """What everybody holds; rounds change it in place."""

    users: Tensor  # (n_users, N_l)
    tables: list[Tensor]  # one for each size
    heads: list[dict[str, Tensor]]
    optimizers: dict[Hashable, torch.optim.Optimizer] = field(default_factory=dict)


def network_round(
    held: Held,
    shards: ClientShards,
    participants: Iterable[int],
    *,
    widths: Sequence[int],
    size_of: Sequence[int],
    federations: Sequence[Sequence[int]],
    dual_task: bool,
    alpha: float,
    denominator: str,
    client_weights: str,
    item_bias: bool,
    server: Optimizer,
    **local: Any,
) -> float:
    """Train one client after another, pad, average, and step on the server; returns the loss.

    `local` are the remaining arguments of `ncf_reference.train_client`, and those of `examples_of`.
    """
    drawing = {name: local.pop(name) for name in ("n_negatives", "batch_size", "key")}
    updates: dict[int, ClientUpdate] = {}
    for client in participants:
        x = size_of[client]
        width = widths[x]
        pull = None
        if alpha and x > 0:
            pull = decorrelation_pull(held.tables[x][:, :width], alpha)
            # The pull on a row as it was sent is the gradient of the definition.
            expected = decorrelation_gradient(held.tables[x][:, :width], alpha)
            sent = (held.tables[x][:, :width] - pull[0]) @ pull[1]
            torch.testing.assert_close(sent, expected, rtol=1e-6, atol=1e-9)
        updates[client] = train_client(
            examples_of(shards, client, **drawing),
            [int(user) for user in shards.users_of(np.array([client]))],
            held.users[:, :width],
            held.tables[x],
            held.heads[: x + 1] if dual_task else [held.heads[x]],
            item_bias=item_bias,
            pull=pull,
            **local,
        )
    rows = shards.client_rows.tolist()
    weight = {k: float(rows[k]) if client_weights == "interactions" else 1.0 for k in updates}

    moves = {}
    for number, federation in enumerate(federations):
        members = [client for client in updates if size_of[client] in federation]
        if not members:
            continue
        changes, touched = [], []
        for client in members:
            table = held.tables[size_of[client]]
            change, trained = torch.zeros_like(table), torch.zeros(len(table), dtype=torch.bool)
            for item, row in updates[client].rows.items():
                change[item], trained[item] = row - table[item], True
            changes.append(change)
            touched.append(trained)
        width = widths[federation[-1]]
        mean = combine(
            changes,
            touched,
            [weight[client] for client in members],
            width=width,
            denominator=denominator,
            item_bias=item_bias,
        )
        ends = [0, *(widths[x] for x in federation)]
        blocks = [(x, slice(a, b)) for x, a, b in zip(federation, ends, ends[1:], strict=False)]
        if item_bias:
            blocks.append((federation[0], slice(width, width + 1)))
        move = torch.zeros_like(mean)
        for owner, block in blocks:
            for item in range(len(mean)):
                trained_by = [k for k, t in zip(members, touched, strict=True) if t[item]]
                if any(size_of[client] >= owner for client in trained_by):
                    name = (number, block.start, item)
                    row = held.tables[federation[-1]][item, block]
                    (new,) = _stepped(held, name, [row], [-mean[item, block]], server)
                    move[item, block] = new - row
        for x in federation:
            moves[x] = torch.cat([move[:, : widths[x]], move[:, width:]], 1)

    for y, head in enumerate(held.heads):
        trained_heads = {
            client: update.heads[y if dual_task else 0]
            for client, update in updates.items()
            if size_of[client] == y or (dual_task and size_of[client] > y)
        }
        if trained_heads:
            total = sum(weight[client] for client in trained_heads)
            grads = [
                -sum(
                    weight[k] / total * (own[name] - head[name]) for k, own in trained_heads.items()
                )
                for name in head
            ]
            new = _stepped(held, ("head", y), list(head.values()), grads, server)
            held.heads[y] = dict(zip(head, new, strict=True))
    for x, move in moves.items():
        held.tables[x] = held.tables[x] + move
    for client, update in updates.items():
        for user, vector in update.user_vectors.items():
            held.users[user, : widths[size_of[client]]] = vector
    n_examples = sum(update.n_examples for update in updates.values())
    return sum(update.loss for update in updates.values()) / n_examples


def _stepped(
    held: Held, name: Hashable, values: list[Tensor], grads: list[Tensor], server: Optimizer
) -> list[Tensor]:
    """Let torch's own optimiser of that name make a step from these values."""
    if name not in held.optimizers:
        held.optimizers[name] = torch_optimizer(
            [value.clone().requires_grad_(True) for value in values], server
        )
    optimizer = held.optimizers[name]
    leaves = optimizer.param_groups[0]["params"]
    for leaf, value, grad in zip(leaves, values, grads, strict=True):
        leaf.data.copy_(value)
        leaf.grad = grad.to(leaf)
    optimizer.step()
    return [leaf.detach().clone() for leaf in leaves]


@dataclass
class HeldExactly:
    """The same for the whole-data objective, of one federation; float64."""

    users: Array  # (n_users, N_l)
    table: Array  # (n_items, N_l)
    # For each block of columns: Gram matrix, counts, curvature and weight, running averages.
    statistics: list[tuple[Array, Array, Array, float]]


def whole_data_round(
    held: HeldExactly,
    items_of: Sequence[Sequence[int]],
    users_of_client: Sequence[Sequence[int]],
    participants: Iterable[int],
    *,
    widths: Sequence[int],
    size_of: Sequence[int],
    dual_task: bool,
    w0: float,
    l2: float,
    exponent: float,
    rate: float,
    decay: float,
    item_curvature: bool,
) -> float:
    """Solve one user after another, pad, add up, and step each block of columns by itself."""
    V, widest = held.table, widths[-1]
    n_rows, n_blocks = sum(len(items) for items in items_of), len(widths)
    blocks = [slice(a, b) for a, b in zip([0, *widths], widths, strict=False)]
    sums = whole_data_reference.Totals(
        np.zeros_like(V), np.zeros(len(V)), np.zeros(len(V)), np.zeros((widest, widest)), 0.0
    )
    counts, curvature = np.zeros((n_blocks, len(V))), np.zeros((n_blocks, len(V)))
    solved, rows_solved, owners = 0, 0, [0] * n_blocks
    for client in participants:
        own = size_of[client]
        for y in range(own + 1) if dual_task else [own]:
            for user in users_of_client[client]:
                items = items_of[user]
                ridge = whole_data_reference.strength(
                    len(items), n_rows / len(items_of), l2, exponent
                )
                u = np.zeros(widest)
                u[: widths[y]] = whole_data_reference.solve_user(
                    items, V[:, : widths[y]], w0, ridge
                )
                if y == own:
                    held.users[user] = u
                one = whole_data_reference.totals([items], u[None], V, w0)
                sums.pull += one.pull
                sums.gram += one.gram
                sums.loss += one.loss
                solved, rows_solved = solved + 1, rows_solved + len(items)
                for b in range(y + 1):
                    owners[b] += 1
                    for i in items:
                        counts[b, i] += 1
                        curvature[b, i] += float(u[blocks[b]] @ V[i, blocks[b]]) ** 2
    everybody = [0] * n_blocks  # users that have each block, those that stay away included
    times = 0
    for client, users in enumerate(users_of_client):
        for y in range(size_of[client] + 1) if dual_task else [size_of[client]]:
            times += len(users)
            for b in range(y + 1):
                everybody[b] += len(users)
    scale = times / solved
    moved = V.copy()
    for b, block in enumerate(blocks):
        if not owners[b]:
            continue
        gram, n, c, weight = held.statistics[b]
        gram = decay * gram + (1 - decay) * scale * sums.gram[block, block]
        n = decay * n + (1 - decay) * scale * counts[b]
        c = decay * c + (1 - decay) * scale * curvature[b]
        weight = decay * weight + (1 - decay)
        held.statistics[b] = gram, n, c, weight
        mean = n_rows / len(V) * times / len(items_of)
        ridge = np.array(
            [whole_data_reference.strength(each, mean, l2, exponent) for each in n / weight]
        )
        grad = scale * sums.pull[:, block] - w0 * scale * V @ sums.gram[:, block]
        moved[:, block] = whole_data_reference.dense_step(
            V[:, block],
            grad - ridge[:, None] * V[:, block],
            gram=gram / weight,
            counts=n / weight,
            curvature=c / weight,
            n_users=everybody[b],
            w0=w0,
            ridge=ridge,
            rate=rate,
            item_curvature=item_curvature,
        )
    held.table = moved
    return sums.loss / rows_solved
