"""Relation-based ensemble self-distillation: tables of different widths agree on what is alike.

Yuan, Qu, Cui, Tong, Zhou, Yin. "HeteFedRec: Federated Recommender Systems with Model
Heterogeneity", ICDE 2024, arXiv:2307.12810. On the server, without any client's data:

    draw a random subset of m items
    repeat n_steps times:
        S_x    <- cosine similarities of the m items in table x, for every table
        target <- mean of the S_x, held fixed
        one step of Adam on the m rows of every table, down
            mean over tables, and over pairs of items, of (S_x - target)^2

Vectors of different widths cannot be compared; the relations between items can. The cosine
distance is 1 - S, so that distances differ by what similarities differ.

Only a summary of the paper could be read. Left open there and decided here: pairs are all ordered
pairs of two different items (an item's similarity to itself is no relation), the target follows
the tables from step to step, and Adam starts afresh in every call. Adam's steps do not shrink with
the gradient: once the tables agree, they tremble by about the learning rate.

With Z_x the rows of unit length, D_x = S_x - target (diagonal zero, symmetric), T tables and
P = m (m - 1) pairs, the gradient by Z_x is 4 / (T P) D_x Z_x. It is taken in blocks of rows of
D_x, so no items x items matrix is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments

# Similarities per table held at a time: 16 MB in single precision.
MAX_PAIRS = 2**22


def draw_items(
    n_items: int, fraction: float, rng: np.random.Generator, minimum: int = 256
) -> Tensor:
    """Draw the items whose relations are distilled.

    Parameters
    ----------
    n_items : int
        Size of the catalogue.
    fraction : float in [0, 1]
        Share of the catalogue, rounded up.
    rng : numpy.random.Generator
    minimum : int, default=256
        Draw at least so many, as far as there are.

    Returns
    -------
    Tensor of shape (m,), int64
        Distinct and ascending.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.methods.self_distillation import draw_items
    >>> len(draw_items(3_706, 0.1, np.random.default_rng(0)))
    371
    >>> draw_items(4, 0.1, np.random.default_rng(0)).tolist()
    [0, 1, 2, 3]
    """
    # A tenth of 30 items is three, although 0.1 * 30 may be rounded up to more.
    wanted = math.ceil(fraction * n_items - 1e-9)
    size = min(n_items, max(minimum, wanted))
    drawn = rng.choice(n_items, size, replace=False).astype(np.int64)
    return torch.from_numpy(np.sort(drawn))


def distill(
    tables: Sequence[Tensor],
    items: Tensor,
    *,
    n_steps: int,
    learning_rate: float,
    max_pairs: int = MAX_PAIRS,
) -> tuple[tuple[Tensor, ...], float]:
    """Bring the relations between some items closer to their mean over the tables.

    Parameters
    ----------
    tables : sequence of Tensor of shape (n_items, N_x)
        Item vectors without a bias column; widths may differ.
    items : Tensor of shape (m,), int64
        Distinct rows to train, see `draw_items`; the others stay as they are. A row that is zero
        has no direction: its similarities are 0 and it stays.
    n_steps : int
        0 only measures the loss.
    learning_rate : float
        Of Adam.
    max_pairs : int, default=MAX_PAIRS
        Similarities per table that are held at a time, at least those of one item. Bounds the
        memory; the result does not depend on it but for rounding.

    Returns
    -------
    tables : tuple of Tensor
        New ones; the given ones where there is nothing to learn from (a single table, or fewer
        than two items).
    loss : float
        Before the first step.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.methods.self_distillation import distill
    >>> narrow = torch.tensor([[1.0], [1.0], [-1.0]])
    >>> wide = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> items = torch.arange(3)
    >>> tables, before = distill([narrow, wide], items, n_steps=50, learning_rate=0.01)
    >>> _, after = distill(tables, items, n_steps=0, learning_rate=0.01)
    >>> after < before
    True
    """
    if len(tables) < 2 or len(items) < 2:
        return tuple(tables), 0.0
    names = [str(number) for number in range(len(tables))]
    rows = {name: table[items] for name, table in zip(names, tables, strict=True)}
    optimizer = Optimizer("adam", learning_rate=learning_rate)
    moments = init_moments(rows, optimizer)
    active = torch.ones(len(items), dtype=torch.bool, device=items.device)
    first_loss, grads = _gradients(list(rows.values()), max_pairs)
    for step in range(n_steps):
        if step:
            _, grads = _gradients(list(rows.values()), max_pairs)
        named = dict(zip(names, grads, strict=True))
        rows, moments = apply_gradients(rows, named, moments, active, optimizer)
    trained = tuple(
        table.index_copy(0, items, rows[name]) for name, table in zip(names, tables, strict=True)
    )
    return trained, float(first_loss)


def _gradients(rows: Sequence[Tensor], max_pairs: int) -> tuple[Tensor, list[Tensor]]:
    """Loss (), and its gradient by the rows (m, N_x) of every table."""
    m, n_tables = len(rows[0]), len(rows)
    norms = [table.norm(dim=1, keepdim=True) for table in rows]
    # Where a row is zero, so is its inverse: no direction, no similarity, no gradient.
    inverses = [torch.where(norm > 0, 1.0 / norm, torch.zeros_like(norm)) for norm in norms]
    units = [table * inverse for table, inverse in zip(rows, inverses, strict=True)]
    by_unit = [torch.empty_like(unit) for unit in units]
    loss = torch.zeros((), dtype=torch.float64, device=rows[0].device)
    height = max(1, max_pairs // m)
    for start in range(0, m, height):
        block = slice(start, min(start + height, m))
        differences = _differences(units, block)
        for gradient, difference, unit in zip(by_unit, differences, units, strict=True):
            loss += torch.linalg.vector_norm(difference).double().square()
            torch.matmul(difference, unit, out=gradient[block])
    pairs = n_tables * m * (m - 1)
    grads = []
    for gradient, unit, inverse in zip(by_unit, units, inverses, strict=True):
        # Only what is orthogonal to a row turns it.
        along = (gradient * unit).sum(1, keepdim=True)
        grads.append((4.0 / pairs) * inverse * (gradient - along * unit))
    return loss / pairs, grads


def _differences(units: Sequence[Tensor], block: slice) -> list[Tensor]:
    """Similarities of the rows of a block to all rows, less the tables' mean: (b, m) each."""
    similarities = [unit[block] @ unit.T for unit in units]
    # Relative to the first table, so that tables which agree differ from their mean by nothing.
    first, others = similarities[0], similarities[1:]
    offset = torch.zeros_like(first)
    for other in others:
        other -= first
        offset += other
    offset /= len(units)
    for other in others:
        other -= offset
    torch.neg(offset, out=first)
    for difference in similarities:
        difference.diagonal(block.start).zero_()
    return similarities
