"""The whole-data objective in double precision: one user, one interaction, one item at a time.

for each user u with items P:
    u = (sum over P of v v' + w0 V'V + lambda_u I)^-1 (sum over P of v)
for each item i with users Q:
    gradient_i = sum over Q of (1 - u.v_i) u  -  w0 (sum over all u u') v_i  -  lambda_i v_i
    H_i = w0 G + n_i/N G + missing v_i v_i'/|v_i|^2 + lambda_i I,   G = sum over all u u'
    v_i += rate * H_i^-1 gradient_i
where H_i uses G with small eigenvalues raised to a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
JITTER = 1e-6
FLOOR = 1e-4
NOTHING = 1e-5


@dataclass
class Totals:
    """Sums over users that the server sees."""

    pull: Array  # (n_items, d)
    counts: Array  # (n_items,)
    curvature: Array  # (n_items,)
    gram: Array  # (d, d)
    loss: float


def strength(count: float, mean: float, l2: float, exponent: float) -> float:
    """Return the penalty of one row with `count` interactions."""
    return float(l2 * count**exponent * mean ** (1 - exponent) + JITTER)


def solve_user(items: Sequence[int], V: Array, w0: float, ridge: float) -> Array:
    """Solve the normal equations of one user."""
    d = V.shape[1]
    left, right = ridge * np.eye(d), np.zeros(d)
    for j in range(len(V)):
        left += w0 * np.outer(V[j], V[j])
    for i in items:
        left += np.outer(V[i], V[i])
        right += V[i]
    return np.asarray(np.linalg.solve(left, right), dtype=np.float64)


def solve_users(
    items_of: Sequence[Sequence[int]], V: Array, w0: float, l2: float, exponent: float, mean: float
) -> Array:
    """Solve users one by one; shape (n_users, d)."""
    return np.array(
        [solve_user(p, V, w0, strength(len(p), mean, l2, exponent)) for p in items_of]
    ).reshape(len(items_of), V.shape[1])


def totals(items_of: Sequence[Sequence[int]], U: Array, V: Array, w0: float) -> Totals:
    """Add up what the users send, interaction by interaction."""
    out = Totals(
        np.zeros_like(V), np.zeros(len(V)), np.zeros(len(V)), np.zeros((V.shape[1],) * 2), 0.0
    )
    for u, items in zip(U, items_of, strict=True):
        out.gram += np.outer(u, u)
        out.loss += w0 * sum(float(u @ v) ** 2 for v in V)
        for i in items:
            score = float(u @ V[i])
            out.pull[i] += (1 - score) * u
            out.counts[i] += 1
            out.curvature[i] += score**2
            out.loss += (1 - score) ** 2
    return out


def gradient(V: Array, sums: Totals, scale: float, w0: float, ridge: Array) -> Array:
    """Return minus half the gradient of the objective by the item table, from scaled-up sums."""
    return scale * sums.pull - w0 * scale * V @ sums.gram - ridge[:, None] * V


def dense_step(
    V: Array,
    grad: Array,
    *,
    gram: Array,
    counts: Array,
    curvature: Array,
    n_users: int,
    w0: float,
    ridge: Array,
    rate: float,
    item_curvature: bool = True,
) -> Array:
    """Solve the d x d system of every item; the curvatures are smoothed ones."""
    values, basis = np.linalg.eigh(gram)
    gram = basis @ np.diag(np.maximum(values, FLOOR * values.max())) @ basis.T
    moved = V.copy()
    nothing = (NOTHING * np.linalg.norm(V, axis=1).max()) ** 2
    for i, v in enumerate(V):
        shape = counts[i] / n_users * gram
        hessian = w0 * gram + shape + ridge[i] * np.eye(len(v))
        squared = float(v @ v)
        if squared > nothing and item_curvature:
            missing = max(curvature[i] / squared - float(v @ shape @ v) / squared, 0.0)
            hessian = hessian + missing * np.outer(v, v) / squared
        moved[i] = v + rate * np.linalg.solve(hessian, grad[i])
    return moved


def objective(
    items_of: Sequence[Sequence[int]],
    U: Array,
    V: Array,
    w0: float,
    user_ridge: Array,
    item_ridge: Array,
) -> float:
    """Return the objective, from the full matrix of scores."""
    scores = U @ V.T
    value = w0 * float((scores**2).sum())
    for u, items in enumerate(items_of):
        value += sum((1 - scores[u, i]) ** 2 for i in items)
    value += float((user_ridge * (U**2).sum(1)).sum() + (item_ridge * (V**2).sum(1)).sum())
    return value
