"""The quasi-Newton server step for sampled negatives, in double precision: one item at a time.

for each client k of a round, trained alone as in `sampled_bce_reference`, and each of its items i:
    g_i += (change of row i) / (-learning rate x local epochs)
    n_i += 1
    s_i += p (1 - p),  p = σ(u_k . v_i) with u_k after and v_i before training
c_i = (1 - ρ) c_i + n_i
h_i = (1 - ρ) h_i + s_i
G   = running mean of  mean over k of u_k u_k'
v_i -= (h_i G + (l2 c_i + 1) I)^-1 g_i,  G with small eigenvalues raised to a floor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedrecsk.engine.local import Optimizer
from tests.reference.sampled_bce_reference import ClientUpdate
from tests.reference.whole_data_reference import FLOOR, Array


@dataclass
class Evidence:
    """What the server has learned of the items so far; updated in place."""

    counts: Array  # (n_items,)
    curvature: Array  # (n_items,)
    grams: list[Array]  # (width, width), one a round

    @classmethod
    def none(cls, n_items: int) -> Evidence:
        """Return the evidence before the first round."""
        return cls(np.zeros(n_items), np.zeros(n_items), [])


def vector_of(update: ClientUpdate, *, item_bias: bool) -> Array:
    """Return the vector of a client's only user, with the constant that meets an item bias."""
    (vector,) = update.user_vectors.values()
    return np.append(vector.double().numpy(), [1.0] * item_bias)


def gradient(
    updates: Mapping[int, ClientUpdate], table: Array, optimizer: Optimizer, local_epochs: int
) -> Array:
    """Return the gradient (n_items, width) that the clients' changes amount to."""
    total = np.zeros_like(table)
    for update in updates.values():
        for item, change in update.deltas.items():
            total[item] -= change.double().numpy() / optimizer.learning_rate / local_epochs
    return total


def collect(
    evidence: Evidence,
    updates: Mapping[int, ClientUpdate],
    table: Array,
    *,
    item_bias: bool,
    forgetting: float,
) -> None:
    """Forget a share of the evidence and add that of a round, client by client."""
    evidence.counts *= 1 - forgetting
    evidence.curvature *= 1 - forgetting
    gram = np.zeros((table.shape[1],) * 2)
    for update in updates.values():
        vector = vector_of(update, item_bias=item_bias)
        gram += np.outer(vector, vector)
        for item in update.deltas:
            p = 1 / (1 + np.exp(-float(vector @ table[item])))
            evidence.counts[item] += 1
            evidence.curvature[item] += p * (1 - p)
    evidence.grams.append(gram / len(updates))


def mean_gram(grams: list[Array], decay: float) -> Array:
    """Average the rounds' matrices, a round's weight falling by `decay` with each later one."""
    weights = [decay**age for age in reversed(range(len(grams)))]
    total = sum((weight * gram for weight, gram in zip(weights, grams, strict=True)), 0 * grams[0])
    return np.asarray(total / sum(weights), dtype=np.float64)


def dense_step(
    table: Array,
    grad: Array,
    *,
    gram: Array,
    counts: Array,
    curvature: Array,
    l2: float,
) -> Array:
    """Solve the system of every item."""
    values, basis = np.linalg.eigh(gram)
    gram = basis @ np.diag(np.maximum(values, FLOOR * values.max())) @ basis.T
    moved = table.copy()
    for i in range(len(table)):
        hessian = curvature[i] * gram + (l2 * counts[i] + 1.0) * np.eye(len(gram))
        moved[i] -= np.linalg.solve(hessian, grad[i])
    return moved
