"""Neural collaborative filtering, one client at a time, with autograd and torch.optim.

for each client k of the cohort:
    take a private copy of its users' vectors, of the rows it has examples for, and of the head
    repeat for each local epoch and mini-batch:
        loss = mean of  BCE(MLP([u ; v_i]) + b_i, y) + l2/2 (|u|^2 + |v_i|^2)  over the examples
        one step of the optimiser
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards
from tests.reference.sampled_bce_reference import Example, examples_of, torch_optimizer


@dataclass(frozen=True)
class ClientUpdate:
    """What one client holds after local training."""

    user_vectors: dict[int, Tensor]  # user -> (d,)
    rows: dict[int, Tensor]  # item -> (width,)
    head: dict[str, Tensor]
    loss: float
    n_examples: int


def logit(vector: Tensor, row: Tensor, head: Mapping[str, Tensor], *, item_bias: bool) -> Tensor:
    """Return the logit of one user (d,) and one item (d,) or (d + 1,)."""
    d = len(vector)
    x = torch.cat([vector, row[:d]])
    n_layers = len(head) // 2
    for k in range(n_layers):
        x = linear(x, head[f"weight_{k}"].T, head[f"bias_{k}"])
        x = torch.relu(x) if k < n_layers - 1 else x
    return x[0] + row[d] if item_bias else x[0]


def train_client(
    examples: list[Example],
    users: list[int],
    user_factors: Tensor,
    item_table: Tensor,
    head: Mapping[str, Tensor],
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
    own = {name: value.clone().requires_grad_(True) for name, value in head.items()}
    optim = torch_optimizer([u, v, *own.values()], optimizer)
    first_loss = 0.0
    for epoch in range(local_epochs):
        for number in sorted({example.batch for example in examples}):
            batch = [example for example in examples if example.batch == number]
            total = u.new_zeros(())
            for example in batch:
                vector, row = u[users.index(example.user)], v[items.index(example.item)]
                score = logit(vector, row, own, item_bias=item_bias)
                loss = binary_cross_entropy_with_logits(score, score.new_tensor(example.label))
                first_loss += float(loss.detach()) if epoch == 0 else 0.0
                total = total + loss + l2 / 2 * (vector.square().sum() + row.square().sum())
            optim.zero_grad()
            torch.autograd.backward([total / len(batch)])
            optim.step()
    return ClientUpdate(
        user_vectors=dict(zip(users, u.detach(), strict=True)),
        rows=dict(zip(items, v.detach(), strict=True)),
        head={name: value.detach() for name, value in own.items()},
        loss=first_loss,
        n_examples=len(examples),
    )


def train_cohort(
    shards: ClientShards,
    clients: list[int],
    user_factors: Tensor,
    item_table: Tensor,
    head: Mapping[str, Tensor],
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
            head,
            item_bias=item_bias,
            local_epochs=local_epochs,
            optimizer=optimizer,
            l2=l2,
        )
        for client in clients
    }
