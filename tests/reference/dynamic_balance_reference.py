"""Dynamic balance one client, one pair and one tensor at a time.

A client is a dictionary of its own tensors, without a client axis; weights are Python numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Client = dict[str, Tensor]
Matrix = list[list[float]]


def vector(client: Client, start: Client, on: str) -> Tensor:
    """Flatten what is compared of a client."""
    parts = []
    for name in client:
        if on == "params":
            parts.append(client[name])
        elif on == "update":
            parts.append(client[name].double() - start[name].double())
        elif name.endswith(".lora_A"):
            b = client[name.removesuffix(".lora_A") + ".lora_B"]
            parts.append(b.double() @ client[name].double())
    return torch.cat([part.double().flatten() for part in parts])


def similarity(clients: Sequence[Client], starts: Sequence[Client], on: str) -> Matrix:
    """(cosine + 1) / 2 of every pair."""
    vectors = [vector(client, start, on) for client, start in zip(clients, starts, strict=True)]
    matrix = []
    for c, one in enumerate(vectors):
        row = []
        for j, other in enumerate(vectors):
            lengths = float(one.norm()) * float(other.norm())
            cosine = float(one.dot(other)) / lengths if lengths > 0 else 0.0
            row.append(1.0 if c == j else (cosine + 1) / 2)
        matrix.append(row)
    return matrix


def heat(
    losses: Sequence[float | None],
    t: int,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    exponent: str,
) -> list[float]:
    """tanh(alpha / p^exponent); a loss that is not known (None) has no share and heat 1."""
    known = [loss for loss in losses if loss is not None]
    weights = []
    for loss in losses:
        if loss is None:
            weights.append(1.0)
            continue
        share = 1 / sum(math.exp((other - loss) / temperature) for other in known)
        power = t + 1 / beta if exponent == "t+1/beta" else (t + 1) / beta
        weights.append(math.tanh(alpha / share**power))
    return weights


def row(c: int, alike: Sequence[float], heat: float, factors: Sequence[float]) -> list[float]:
    """What client c mixes of every client; `factors` are those of the uploads' ages."""
    counts = []
    for j, (s, factor) in enumerate(zip(alike, factors, strict=True)):
        counts.append(1.0 if j == c else s * heat * factor)
    return [count / sum(counts) for count in counts]


def fedavg_row(counts: Sequence[float], factors: Sequence[float]) -> list[float]:
    """What anybody mixes of every client in FedAvg."""
    aged = [count * factor for count, factor in zip(counts, factors, strict=True)]
    return [count / sum(aged) for count in aged]


def mixed(clients: Sequence[Client], weights: Sequence[float]) -> Client:
    """One weighted mean, tensor by tensor."""
    result = {}
    for name, like in clients[0].items():
        total = torch.zeros(like.shape, dtype=torch.float64)
        for client, weight in zip(clients, weights, strict=True):
            if weight > 0:
                total += weight * client[name].double()
        result[name] = total.to(like.dtype)
    return result


def simultaneous(clients: Sequence[Client], weights: Matrix) -> list[Client]:
    """Let everybody mix what everybody has trained."""
    return [mixed(clients, each) for each in weights]


def in_place(clients: Sequence[Client], weights: Matrix) -> list[Client]:
    """Let one client after another overwrite itself, as the authors' scripts do."""
    current = list(clients)
    for c, each in enumerate(weights):
        current[c] = mixed(current, each)
    return current


@dataclass
class Upload:
    """What the server has of one client."""

    adapter: Client
    start: Client
    loss: float | None = None
    moment: int | None = None


def run_with_clock(
    start: Client,
    train: Callable[[int, Client], tuple[Client, float]],
    periods: Sequence[int],
    n_rounds: int,
    *,
    aggregation: str,
    n_examples: Sequence[float],
    on: str,
    staleness_exponent: float,
    alpha: float = 0.7,
    beta: float = 5.0,
    temperature: float = 0.05,
    exponent: str = "t+1/beta",
) -> list[Client]:
    """Tick: whoever is done uploads, and then mixes what there is of the others.

    `train` takes the number of a client and what it holds, and gives what it has then, and its
    loss.
    """
    clients = [start for _ in periods]
    uploads = [Upload(start, start) for _ in periods]
    for t in range(n_rounds):
        due = [c for c, period in enumerate(periods) if (t + 1) % period == 0]
        for c in due:
            adapter, loss = train(c, clients[c])
            uploads[c] = Upload(adapter, clients[c], loss, t)
        sent = [upload.adapter for upload in uploads]
        alike = similarity(sent, [upload.start for upload in uploads], on)
        weights = heat(
            [upload.loss for upload in uploads],
            t,
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            exponent=exponent,
        )
        factors = [
            0.0 if upload.moment is None else (1 + t - upload.moment) ** -staleness_exponent
            for upload in uploads
        ]
        for c in due:
            if aggregation == "fellrec":
                clients[c] = mixed(sent, row(c, alike[c], weights[c], factors))
            elif aggregation == "fedavg":
                clients[c] = mixed(sent, fedavg_row(n_examples, factors))
            else:
                clients[c] = sent[c]
    return clients
