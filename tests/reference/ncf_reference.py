"""Neural collaborative filtering, one client at a time, with autograd and torch.optim.

for each client k of the cohort:
    take a private copy of its users' vectors, of the rows it has examples for, and of the heads
    repeat for each local epoch and mini-batch:
        propagate each user over its ego graph: mean over k = 0 ... K of (D^-1/2 A D^-1/2)^k X
            (its items too, or these only keep their share of X in that mean)
        loss = mean of  Σ_j BCE(MLP_j([u ; v_i], first N_j columns) + b_i, y)
                        + l2/2 (|u|^2 + |v_i|^2)  over the examples
        add the pull (v_i - mean) matrix to the gradient of each row in the mini-batch
        one step of the optimiser
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards, Cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.models.head import init_head
from fedrecsk.models.sampled_bce import LocalResult
from tests.reference.sampled_bce_reference import Example, examples_of, torch_optimizer


@dataclass(frozen=True)
class ClientUpdate:
    """What one client holds after local training."""

    user_vectors: dict[int, Tensor]  # user -> (d,)
    rows: dict[int, Tensor]  # item -> (width,)
    heads: list[dict[str, Tensor]]
    loss: float  # of the last head
    n_examples: int

    @property
    def head(self) -> dict[str, Tensor]:
        """The only head, or the widest."""
        return self.heads[-1]


def logit(vector: Tensor, row: Tensor, head: Mapping[str, Tensor], *, item_bias: bool) -> Tensor:
    """Return the logit of one user (d,) and one item (d,) or (d + 1,), by a head of width <= d."""
    d, width = len(vector), len(head["weight_0"]) // 2
    x = torch.cat([vector[:width], row[:width]])
    n_layers = len(head) // 2
    for k in range(n_layers):
        x = linear(x, head[f"weight_{k}"].T, head[f"bias_{k}"])
        x = torch.relu(x) if k < n_layers - 1 else x
    return x[0] + row[d] if item_bias else x[0]


def propagated(
    vector: Tensor,
    rows: Tensor,
    positives: Iterable[int],
    n_layers: int,
    *,
    items: bool = False,
) -> tuple[Tensor, Tensor]:
    """Propagate one user (d,) and items (m, d or d + 1) over the graph of user and positives.

    Without `items` every item's vector is that of an item outside of the graph.
    """
    d = len(vector)
    adjacency = torch.zeros(1 + len(rows), 1 + len(rows), dtype=vector.dtype)
    for k in positives:
        adjacency[0, 1 + k] = adjacency[1 + k, 0] = 1.0
    degree = adjacency.sum(1)
    root = torch.where(degree > 0, degree.clamp_min(1) ** -0.5, 0.0)
    adjacency = torch.diag(root) @ adjacency @ torch.diag(root)
    layers = [torch.cat([vector[None], rows[:, :d]])]
    for _ in range(n_layers):
        layers.append(adjacency @ layers[-1])
    mean = torch.stack(layers).mean(0)
    moved = mean[1:] if items else rows[:, :d] / (n_layers + 1)
    return mean[0], torch.cat([moved, rows[:, d:]], dim=1)


def train_client(
    examples: list[Example],
    users: list[int],
    user_factors: Tensor,
    item_table: Tensor,
    heads: Sequence[Mapping[str, Tensor]],
    *,
    item_bias: bool,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    n_graph_layers: int = 0,
    item_propagation: bool = False,
    pull: tuple[Tensor, Tensor] | None = None,
) -> ClientUpdate:
    """Train one client on its examples from the server's arrays, which stay as they are."""
    items = sorted({example.item for example in examples})
    u = user_factors[users].clone().requires_grad_(True)  # (users, d)
    v = item_table[items].clone().requires_grad_(True)  # (items, width)
    own = [{name: value.clone().requires_grad_(True) for name, value in h.items()} for h in heads]
    optim = torch_optimizer([u, v, *(value for head in own for value in head.values())], optimizer)
    first_loss = 0.0
    for epoch in range(local_epochs):
        for number in sorted({example.batch for example in examples}):
            batch = [example for example in examples if example.batch == number]
            graphs = {}
            for user in users:
                liked = [items.index(e.item) for e in batch if e.user == user and e.label]
                graphs[user] = propagated(
                    u[users.index(user)], v, liked, n_graph_layers, items=item_propagation
                )
            total = u.new_zeros(())
            for example in batch:
                k = items.index(example.item)
                vector, rows = graphs[example.user]
                for head in own:
                    score = logit(vector, rows[k], head, item_bias=item_bias)
                    loss = binary_cross_entropy_with_logits(score, score.new_tensor(example.label))
                    total = total + loss
                first_loss += float(loss.detach()) if epoch == 0 else 0.0
                norms = u[users.index(example.user)].square().sum() + v[k].square().sum()
                total = total + l2 / 2 * norms
            optim.zero_grad()
            torch.autograd.backward([total / len(batch)])
            if pull is not None:
                mean, matrix = pull
                for item in {example.item for example in batch}:
                    k = items.index(item)
                    v.grad[k, : len(mean)] += (v.detach()[k, : len(mean)] - mean) @ matrix
            optim.step()
    return ClientUpdate(
        user_vectors=dict(zip(users, u.detach(), strict=True)),
        rows=dict(zip(items, v.detach(), strict=True)),
        heads=[{name: value.detach() for name, value in head.items()} for head in own],
        loss=first_loss,
        n_examples=len(examples),
    )


def train_cohort(
    shards: ClientShards,
    clients: Iterable[int],
    user_factors: Tensor,
    item_table: Tensor,
    head: Mapping[str, Tensor],
    *,
    smaller: Sequence[Mapping[str, Tensor]] = (),
    item_bias: bool,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    key: int,
    n_graph_layers: int = 0,
    item_propagation: bool = False,
    pull: tuple[Tensor, Tensor] | None = None,
) -> dict[int, ClientUpdate]:
    """Train the clients one after another, with a head and smaller ones nested in it."""
    return {
        client: train_client(
            examples_of(shards, client, n_negatives=n_negatives, batch_size=batch_size, key=key),
            [int(user) for user in shards.users_of(np.array([client]))],
            user_factors,
            item_table,
            [*smaller, head],
            item_bias=item_bias,
            local_epochs=local_epochs,
            optimizer=optimizer,
            l2=l2,
            n_graph_layers=n_graph_layers,
            item_propagation=item_propagation,
            pull=pull,
        )
        for client in clients
    }


# Comparing it with `fedrecsk.models.ncf` ----------------------------------------------------------

# By user the vector, by (client, item) the row, by (client, head, name) the weights, by client the
# loss, and by client the number of examples.
Training = tuple[dict, dict, dict, dict, dict]


def unpacked(cohort: Cohort, result: LocalResult, heads: list[dict[str, Tensor]]) -> Training:
    """Take apart what `ncf.train` returns."""
    rows = {}
    for k in torch.nonzero(result.row_valid)[:, 0].tolist():
        pair = int(cohort.clients[result.row_clients[k]]), int(result.row_items[k])
        assert pair not in rows  # one private row per (client, item)
        rows[pair] = result.row_values[k]
    clients = cohort.clients.tolist()
    return (
        dict(zip(cohort.users.tolist(), result.user_vectors, strict=True)),
        rows,
        {
            (client, number, name): value[k]
            for number, head in enumerate(heads)
            for name, value in head.items()
            for k, client in enumerate(clients)
        },
        dict(zip(clients, result.losses, strict=True)),
        dict(zip(clients, result.n_examples, strict=True)),
    )


def by_reference(
    shards: ClientShards,
    user_factors: Tensor,
    item_table: Tensor,
    heads: Sequence[Mapping[str, Tensor]],
    **arguments: object,
) -> Training:
    """Train all clients by the reference."""
    vectors, rows, parts, losses, n_examples = {}, {}, {}, {}, {}
    updates = train_cohort(
        shards,
        range(shards.n_clients),
        user_factors,
        item_table,
        heads[-1],
        smaller=heads[:-1],
        **arguments,
    )
    for client, update in updates.items():
        vectors |= update.user_vectors
        rows |= {(client, item): row for item, row in update.rows.items()}
        for number, head in enumerate(update.heads):
            parts |= {(client, number, name): value for name, value in head.items()}
        losses[client] = user_factors.new_tensor(update.loss)
        n_examples[client] = user_factors.new_tensor(update.n_examples)
    return vectors, rows, parts, losses, n_examples


def assert_same_training(found: Training, expected: Training, tolerance: float = 1e-6) -> None:
    """Compare two trainings; tolerance is relative to values of about 1."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        names = list(ours)
        if names and ours[names[0]].dim() < 2:
            ours = {0: torch.cat([ours[name].reshape(-1) for name in names])}
            theirs = {0: torch.cat([theirs[name].reshape(-1) for name in names])}
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance)


def by_size(shards: ClientShards) -> np.ndarray:
    """Return the clients by ascending size, as the fast path wants them."""
    return np.argsort(shards.client_rows, kind="stable")


def random_server(
    shards: ClientShards,
    widths: Sequence[int],
    *,
    item_bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Draw user factors, an item table and heads of a scale at which the loss bends."""
    generator = torch.Generator().manual_seed(seed)
    users = 0.7 * torch.randn(shards.n_users, widths[-1], generator=generator)
    table = 0.7 * torch.randn(shards.n_items, widths[-1] + item_bias, generator=generator)
    heads = []
    for width in widths:
        head = init_head(width, key=width if len(widths) > 1 else None, streams=Streams(seed))
        for name in head:
            if name.startswith("bias"):
                head[name] = 0.2 * torch.randn(head[name].shape, generator=generator)
        heads.append({name: value.to(dtype) for name, value in head.items()})
    return users.to(dtype), table.to(dtype), heads
