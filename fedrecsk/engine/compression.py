"""Uploads made smaller on the client, and what that leaves for later.

- ``"top-k"``: of the rows that a client would send, the longest; of a network's weights, the
  largest.
- ``"quantised"``: every row as a scale and small whole numbers, in the manner of QSGD (Alistarh et
  al., NeurIPS 2017), and a network's weights likewise.
- ``"low-rank"``: the client's rows as the product of two thin matrices, the best of their rank.

With error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019) a client keeps
what it has not sent and adds it to what it would send the next time it takes part. Whatever a
client ever wanted to say then arrives, or is in its `Residual`. Quantising goes to the nearest
level in that case; without, at random to one of the two around, so as to be right on average.

Columns of a row beyond those of the table (counts, curvature) go along as they are. Numbers may
be a matrix Σ u uᵀ (`Uploads.products`), which is symmetric, so only one half of it is sent; as
``"low-rank"`` its leading eigenvectors, as ``"quantised"`` in at least 8 bits. ``"top-k"`` leaves
it whole: a matrix without its small entries is another one, with directions turned around, and so
is one of few bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedrecsk.engine.mixing import weighted_mean
from fedrecsk.engine.streams import Streams, counter_uniform, derived_key
from fedrecsk.engine.traffic import FLOAT_BYTES, INDEX_BYTES, dense_bytes, sparse_row_bytes
from fedrecsk.engine.uploads import Residual, Uploads

CompressionName = Literal["top-k", "quantised", "low-rank"]
# With fewer, sums over small cohorts have negative eigenvalues that matter, and training diverges.
MATRIX_BITS = 8


@dataclass(frozen=True)
class Compression:
    """How clients make their uploads smaller.

    Parameters
    ----------
    name : {"top-k", "quantised", "low-rank"}
    level : float
        Of ``"top-k"``, the share of its rows that a client sends, rounded up; of ``"quantised"``,
        the bits of a number, at least 2; of ``"low-rank"``, the rank.
    error_feedback : bool
    streams : Streams
    """

    name: CompressionName
    level: float
    error_feedback: bool
    streams: Streams

    def apply(
        self, uploads: Uploads, residual: Residual | None, n_items: int, width: int, t: int
    ) -> tuple[Uploads, Residual | None, int]:
        """Compress what clients send.

        Parameters
        ----------
        uploads : Uploads
        residual : Residual or None
            What all clients have kept so far.
        n_items, width : int
            Shape of the table.
        t : int
            Number of the round.

        Returns
        -------
        sent : Uploads
            As the server unpacks them.
        residual : Residual or None
            What all clients keep now; None without error feedback.
        n_bytes : int
            Of all clients of the round.
        """
        before: Residual = residual or {}
        wanted, left = uploads, None
        if self.error_feedback and before:
            wanted, left = _with_residual(uploads, before, n_items, whole=self.name == "top-k")
        key = self.streams.key("compression", t)
        counts = torch.bincount(uploads.row_clients, minlength=len(uploads.clients))
        if self.name == "top-k":
            sent, kept, n_bytes = _longest(wanted, counts, self.level, width)
        else:
            kept = torch.ones(len(wanted.rows), dtype=torch.bool, device=wanted.rows.device)
            if self.name == "quantised":
                draw = None if self.error_feedback else _draws(wanted, n_items, key)
                sent, n_bytes = _quantised(wanted, int(self.level), width, draw)
            else:
                sent, n_bytes = _low_rank(wanted, int(self.level), width)
        after = None
        if self.error_feedback:
            after = before | _after(wanted, sent, kept, left, n_items)
        return (
            replace(
                sent,
                row_clients=sent.row_clients[kept],
                row_items=sent.row_items[kept],
                rows=sent.rows[kept],
                row_weights=sent.row_weights[kept],
            ),
            after,
            n_bytes,
        )


# Error feedback ----------------------------------------------------------------------------------


def _with_residual(
    uploads: Uploads, residual: Residual, n_items: int, *, whole: bool
) -> tuple[Uploads, tuple[Tensor, Tensor]]:
    """Add what clients have kept to what they send, and return what they go on keeping.

    With `whole`, also rows that a client does not send this time. They weigh as much as its
    others do on average; a client without any keeps them.

    Returns
    -------
    wanted : Uploads
    left : tuple of Tensor (K,) and Tensor (K, w)
        Rows by ``place * n_items + item``, the place being that of the client in the round.
    """
    numbers = uploads.numbers.clone()
    old_keys, old_rows = uploads.row_items[:0], uploads.rows[:0]
    known = [
        (place, *residual[str(code)])
        for place, code in enumerate(uploads.clients.tolist())
        if str(code) in residual
    ]
    if known:
        old_keys = torch.cat([place * n_items + items for place, items, _, _ in known])
        old_rows = torch.cat([rows for _, _, rows, _ in known])
        for place, _, _, own in known:
            if len(own):
                numbers[place] += own
    keys = uploads.row_clients * n_items + uploads.row_items
    added, found = _looked_up(keys, old_keys, old_rows)
    wanted = replace(uploads, rows=uploads.rows + added, numbers=numbers)
    left = torch.ones(len(old_keys), dtype=torch.bool, device=keys.device)
    left[found] = False
    if whole:
        sends = torch.zeros(len(numbers), dtype=torch.bool, device=keys.device)
        sends[uploads.row_clients] = True
        more = left & sends[old_keys // n_items]
        by = old_keys[more] // n_items
        wanted = replace(
            wanted,
            row_clients=torch.cat([uploads.row_clients, by]),
            row_items=torch.cat([uploads.row_items, old_keys[more] % n_items]),
            rows=torch.cat([wanted.rows, old_rows[more]]),
            row_weights=torch.cat([uploads.row_weights, _mean_weights(uploads)[by]]),
        )
        left &= ~more
    return wanted, (old_keys[left], old_rows[left])


def _after(
    wanted: Uploads,
    sent: Uploads,
    kept: Tensor,
    left: tuple[Tensor, Tensor] | None,
    n_items: int,
) -> Residual:
    """Keep the difference of what clients wanted to send (K, w) and sent, of rows that are kept."""
    keys = wanted.row_clients * n_items + wanted.row_items
    rows = wanted.rows - torch.where(kept[:, None], sent.rows, 0.0)
    numbers = wanted.numbers - sent.numbers
    some = _beyond_rounding(rows, wanted.rows)
    keys, rows = keys[some], rows[some]
    if left is not None:
        keys, rows = torch.cat([left[0], keys]), torch.cat([left[1], rows])
    order = torch.argsort(keys)
    keys, rows = keys[order], rows[order]
    n_clients = len(wanted.clients)
    ends = torch.searchsorted(keys, n_items * torch.arange(n_clients + 1, device=keys.device))
    items, bounds = keys % n_items, ends.tolist()
    some_number = _beyond_rounding(numbers, wanted.numbers).tolist()
    # Copies: views would keep the rows of the whole round in memory.
    return {
        str(code): (
            items[start:end].clone(),
            rows[start:end].clone(),
            numbers[place, : None if some_number[place] else 0].clone(),
        )
        for place, (code, start, end) in enumerate(
            zip(wanted.clients.tolist(), bounds, bounds[1:], strict=False)
        )
    }


def _beyond_rounding(difference: Tensor, values: Tensor) -> Tensor:
    """Rows (n,) in which a difference is more than the rounding of the values."""
    if not values.numel():
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    tiny = 4.0 * torch.finfo(values.dtype).eps
    # Not <=, which what is not a number would not be, and nobody keeps that.
    return difference.abs().amax(1) > tiny * values.abs().amax(1)


def _looked_up(keys: Tensor, known: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (n, w) of keys (n,), zero where one is not among the sorted ones; those found."""
    if not len(known):
        return values.new_zeros(len(keys), values.shape[1]), keys[:0]
    place = torch.searchsorted(known, keys).clamp_max(len(known) - 1)
    found = known[place] == keys
    return torch.where(found[:, None], values[place], 0.0), place[found]


def _mean_weights(uploads: Uploads) -> Tensor:
    """Mean weight (C,) of each client's rows."""
    total, count = (
        torch.zeros_like(uploads.weights).index_add_(0, uploads.row_clients, values)
        for values in (uploads.row_weights, torch.ones_like(uploads.row_weights))
    )
    return weighted_mean(total[:, None], count)[:, 0]


# What is sent ------------------------------------------------------------------------------------


def _longest(
    wanted: Uploads, counts: Tensor, share: float, width: int
) -> tuple[Uploads, Tensor, int]:
    """Keep of each client's rows a share of as many (C,) as it has touched; mask (K,), bytes."""
    allowed = (counts.double() * share - 1e-9).ceil().to(torch.int64)
    lengths = wanted.rows[:, :width].square().sum(1)
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[torch.argsort(wanted.row_clients[order], stable=True)]
    sizes = torch.bincount(wanted.row_clients, minlength=len(counts))
    rank = torch.arange(len(order), device=order.device)
    rank -= (sizes.cumsum(0) - sizes)[wanted.row_clients[order]]
    kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    kept[order] = rank < allowed[wanted.row_clients[order]]
    n_bytes = sparse_row_bytes(int(kept.sum()), wanted.rows.shape[1])
    n_clients, n_numbers = wanted.numbers.shape
    if wanted.products:
        return wanted, kept, n_bytes + n_clients * dense_bytes((_half(width),))
    n_kept = math.ceil(n_numbers * share - 1e-9)
    if n_kept * (FLOAT_BYTES + INDEX_BYTES) >= dense_bytes((n_numbers,)):
        return wanted, kept, n_bytes + n_clients * dense_bytes((n_numbers,))
    places = wanted.numbers.abs().topk(n_kept, dim=1).indices
    numbers = torch.zeros_like(wanted.numbers).scatter(1, places, wanted.numbers.gather(1, places))
    n_bytes += n_clients * n_kept * (FLOAT_BYTES + INDEX_BYTES)
    return replace(wanted, numbers=numbers), kept, n_bytes


def _quantised(
    wanted: Uploads, bits: int, width: int, draw: Callable[[int], tuple[Tensor, Tensor]] | None
) -> tuple[Uploads, int]:
    """Write rows and numbers with few bits; `draw` gives the random part for a width."""
    n_rows, n_columns = wanted.rows.shape
    n_clients = len(wanted.numbers)
    numbers = wanted.numbers
    if wanted.products:
        upper = torch.triu_indices(width, width, device=numbers.device)
        numbers = numbers.reshape(-1, width, width)[:, upper[0], upper[1]]
    of_rows, of_numbers = (None, None) if draw is None else draw(numbers.shape[1])
    rows = rounded(wanted.rows[:, :width], bits, None if of_rows is None else of_rows[:, :width])
    bits_of_numbers = max(bits, MATRIX_BITS) if wanted.products else bits
    numbers = rounded(numbers, bits_of_numbers, of_numbers)
    n_sent = numbers.shape[1]
    if wanted.products:
        whole = wanted.numbers.new_zeros(n_clients, width, width)
        whole[:, upper[0], upper[1]] = numbers
        whole[:, upper[1], upper[0]] = numbers
        numbers = whole.flatten(1)
    # A row: its number, its scale, the small numbers, and the columns beyond the table's.
    n_bytes = n_rows * (INDEX_BYTES + _packed(width, bits) + FLOAT_BYTES * (n_columns - width))
    n_bytes += n_clients * (_packed(n_sent, bits_of_numbers) if n_sent else 0)
    rows = torch.cat([rows, wanted.rows[:, width:]], 1)
    return replace(wanted, rows=rows, numbers=numbers), n_bytes


def _packed(n: int, bits: int) -> int:
    """Bytes of a scale and n numbers of some bits."""
    return FLOAT_BYTES + math.ceil(n * bits / 8)


def rounded(values: Tensor, bits: int, draws: Tensor | None = None) -> Tensor:
    """Round each row to whole multiples of a fraction of its largest number.

    Parameters
    ----------
    values : Tensor of shape (n, w)
    bits : int
        Of a multiple, its sign among them: there are ``2**(bits - 1) - 1`` on either side of 0.
    draws : Tensor of shape (n, w), optional
        Uniform in [0, 1): round at random, so as to be right on average; default: to the nearest.

    Returns
    -------
    Tensor of shape (n, w)

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.compression import rounded
    >>> rounded(torch.tensor([[3.0, -1.2, 0.4]]), bits=3)
    tensor([[ 3., -1.,  0.]])
    """
    if not values.numel():
        return values
    levels = 2 ** (bits - 1) - 1
    scale = values.abs().amax(1, keepdim=True).double()
    steps = values.double() * (levels / torch.where(scale > 0, scale, 1.0))
    steps = steps.round() if draws is None else (steps + draws).floor()
    near: Tensor = (steps * (scale / levels)).to(values.dtype)
    return near


def _draws(wanted: Uploads, n_items: int, key: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Give uniform numbers by client, item and column, whatever the order of the rows."""
    device = wanted.rows.device
    codes = torch.from_numpy(wanted.clients).to(device)

    def draw(n_numbers: int) -> tuple[Tensor, Tensor]:
        rows = (codes[wanted.row_clients] * n_items + wanted.row_items)[:, None]
        columns = torch.arange(wanted.rows.shape[1], device=device)
        numbers = torch.arange(n_numbers, device=device)
        return (
            counter_uniform(key, rows, columns),
            counter_uniform(derived_key(key, "numbers"), codes[:, None], numbers),
        )

    return draw


def _low_rank(wanted: Uploads, rank: int, width: int) -> tuple[Uploads, int]:
    """Put the best approximation of a rank in the place of each client's rows, and of matrices."""
    n_columns = wanted.rows.shape[1]
    n_clients, n_numbers = wanted.numbers.shape
    counts = torch.bincount(wanted.row_clients, minlength=n_clients)
    order = torch.argsort(wanted.row_clients, stable=True)
    # In double precision: the squares below halve the digits.
    vectors = wanted.rows[order, :width].double()
    parts = torch.split(vectors, counts.tolist())
    grams = torch.stack([part.T @ part for part in parts])
    # Where two factors take less than what they stand for; of what is not finite there are none.
    smaller = torch.tensor([rank * (len(part) + width) < len(part) * width for part in parts])
    smaller &= grams.isfinite().all(2).all(1).cpu()
    rows = wanted.rows.clone()
    if bool(smaller.any()):
        grams = torch.where(smaller.to(grams.device)[:, None, None], grams, 0.0)
        leading = torch.linalg.eigh(grams).eigenvectors[:, :, -rank:]  # (C, width, rank)
        near = torch.cat(
            [
                part @ basis @ basis.T if small else part
                for part, basis, small in zip(parts, leading, smaller.tolist(), strict=True)
            ]
        )
        rows[order, :width] = near.to(rows.dtype)
    n_bytes = sparse_row_bytes(len(rows), n_columns - width)
    for n, small in zip(counts.tolist(), smaller.tolist(), strict=True):
        n_bytes += dense_bytes((rank, n + width) if small else (n, width))
    numbers = wanted.numbers
    if not wanted.products:
        return replace(wanted, rows=rows), n_bytes + dense_bytes((n_clients, n_numbers))
    # Eigenvectors, and an eigenvalue each.
    if rank * (width + 1) >= _half(width):
        return replace(wanted, rows=rows), n_bytes + dense_bytes((n_clients, _half(width)))
    numbers = leading_part(numbers.reshape(-1, width, width), rank).flatten(1)
    n_bytes += dense_bytes((n_clients, rank, width + 1))
    return replace(wanted, rows=rows, numbers=numbers), n_bytes


def leading_part(matrices: Tensor, rank: int) -> Tensor:
    """Best approximations of a rank to symmetric matrices.

    Parameters
    ----------
    matrices : Tensor of shape (C, w, w)
    rank : int

    Returns
    -------
    Tensor of shape (C, w, w)
        Matrices that are not finite stay as they are.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.compression import leading_part
    >>> leading_part(torch.diag(torch.tensor([1.0, -4.0, 2.0]))[None], rank=2)[0].diagonal()
    tensor([ 0., -4.,  2.])
    """
    finite = matrices.isfinite().all(2).all(1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, matrices, 0.0).double())
    chosen = values.abs().topk(rank, dim=1).indices
    values = values.gather(1, chosen)
    vectors = vectors.gather(2, chosen[:, None, :].expand(-1, vectors.shape[1], -1))
    near = ((vectors * values[:, None, :]) @ vectors.mT).to(matrices.dtype)
    return torch.where(finite, near, matrices)


def _half(width: int) -> int:
    """Numbers in one half of a symmetric matrix, the diagonal included."""
    return width * (width + 1) // 2
