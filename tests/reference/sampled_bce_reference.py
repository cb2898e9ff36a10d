"""Sampled-negative matrix factorisation, one client at a time, with autograd and torch.optim.

for each client k of the cohort:
    take a private copy of its users' vectors and of the rows it has examples for
    repeat for each local epoch and mini-batch:
        loss = sum of  BCE(u . v_i, y) + l2/2 (|u|^2 + |v_i|^2)  over the examples
        one step of the optimiser
    send back the change of every private row
server: table_i += sum_k w_ki delta_ki / sum_k w_ki
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards
from fedrecsk.models.sampled_bce import draw_examples


@dataclass(frozen=True)
class Example:
    """One labelled pair in one local mini-batch."""

    user: int
    item: int
    label: float
    batch: int


@dataclass(frozen=True)
class ClientUpdate:
    """What one client holds after local training."""

    user_vectors: dict[int, Tensor]  # user -> (d,)
    deltas: dict[int, Tensor]  # item -> (width,)
    loss: float
    n_examples: int


def torch_optimizer(parameters: list[Tensor], optimizer: Optimizer) -> torch.optim.Optimizer:
    """Return torch's own optimiser of the same name."""
    if optimizer.name == "adam":
        return torch.optim.Adam(
            parameters, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps
        )
    momentum = optimizer.momentum if optimizer.name == "momentum" else 0.0
    return torch.optim.SGD(parameters, lr=optimizer.learning_rate, momentum=momentum)


def examples_of(
    shards: ClientShards, client: int, *, n_negatives: int, batch_size: int | None, key: int
) -> list[Example]:
    """Return the examples that a client draws when it is alone."""
    cohort = shards.cohort(np.array([client]))
    drawn = draw_examples(
        cohort, shards.n_items, n_negatives=n_negatives, batch_size=batch_size, key=key
    )
    return [
        Example(
            user=int(cohort.users[cohort.row_user[row]]),
            item=int(drawn.items[row, column]),
            label=1.0 if column == 0 else 0.0,
            batch=int(drawn.batch[row]),
        )
        for row in range(cohort.n_rows)
        for column in range(1 + n_negatives)
        if drawn.valid[row, column]
    ]


def train_client(
    examples: list[Example],
    users: list[int],
    user_factors: Tensor,
    item_table: Tensor,
    *,
    item_bias: bool,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
) -> ClientUpdate:
    """Train one client on its examples from the server's arrays, which stay as they are."""
    items = sorted({example.item for example in examples})
    u = user_factors[users].clone().requires_grad_(True)  # (users, d)
    v = item_table[items].clone().requires_grad_(True)  # (items, width)
    start = v.detach().clone()
    d = u.shape[1]
    optim = torch_optimizer([u, v], optimizer)
    first_loss = 0.0
    for epoch in range(local_epochs):
        for batch in sorted({example.batch for example in examples}):
            total = torch.zeros(())
            for example in (e for e in examples if e.batch == batch):
                vector, row = u[users.index(example.user)], v[items.index(example.item)]
                score = vector @ row[:d]
                if item_bias:
                    score = score + row[d]
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    score, torch.tensor(example.label)
                )
                first_loss += float(loss.detach()) if epoch == 0 else 0.0
                total = total + loss + l2 / 2 * (vector.square().sum() + row.square().sum())
            optim.zero_grad()
            torch.autograd.backward([total])
            optim.step()
    return ClientUpdate(
        user_vectors=dict(zip(users, u.detach(), strict=True)),
        deltas=dict(zip(items, v.detach() - start, strict=True)),
        loss=first_loss,
        n_examples=len(examples),
    )


def train_cohort(
    shards: ClientShards,
    clients: list[int],
    user_factors: Tensor,
    item_table: Tensor,
    *,
    item_bias: bool,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    key: int,
) -> dict[int, ClientUpdate]:
    """Train the clients one after another."""
    return {
        client: train_client(
            examples_of(shards, client, n_negatives=n_negatives, batch_size=batch_size, key=key),
            [int(user) for user in shards.users_of(np.array([client]))],
            user_factors,
            item_table,
            item_bias=item_bias,
            local_epochs=local_epochs,
            optimizer=optimizer,
            l2=l2,
        )
        for client in clients
    }


def aggregate(
    updates: Mapping[int, ClientUpdate],
    client_rows: Mapping[int, int],
    item_table: Tensor,
    item_weighting: str,
) -> dict[int, Tensor]:
    """Return the change (width,) of every item that some client touched."""
    total_rows = sum(client_rows[client] for client in updates)
    changes: dict[int, Tensor] = {}
    for item in range(len(item_table)):
        weighted, weights = torch.zeros(item_table.shape[1]), 0.0
        for client, update in updates.items():
            if item not in update.deltas:
                continue
            delta = update.deltas[item]
            weight = {
                "count": 1.0,
                "magnitude": float(delta.abs().sum()),
                "interactions": float(client_rows[client]),
                "fedavg": float(client_rows[client]),
            }[item_weighting]
            weighted += weight * delta
            weights += weight
        if weights > 0:
            changes[item] = weighted / (total_rows if item_weighting == "fedavg" else weights)
    return changes
