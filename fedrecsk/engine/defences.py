"""Aggregation that a minority of dishonest clients cannot steer.

A mean follows whoever shouts. The rules here put something else in its place, row by row of the
table, over the clients that sent the row:

- ``"clip"``: rows and numbers are shortened to what most clients send, then added. Changes, which
  add up to a step, are all lengthened again by what shortening has taken from honest ones.
- ``"median"``: the median of each column.
- ``"trimmed-mean"``: the mean of each column without its largest and smallest values.
  Of clients' numbers both take the mean of those nearest to the median, half of them or all but a
  few.
- ``"krum"``: of all uploads, the one whose neighbours are nearest (Blanchard et al., NeurIPS 2017).
- ``"multi-krum"``: the mean of those uploads that are nearest to their neighbours.

All of them clip first. Medians and trimmed means follow Yin et al., ICML 2018.

What clients do not send is not a zero. A recommender's clients send few rows each, and most rows
are sent by few: the median over all clients of a table padded with zeros is zero everywhere. So
a rule looks at the clients that sent a row, and its result counts as often as there are such
clients, as if each had sent it. Two things follow. All dishonest clients may have sent the same
row, so as many values are cut from either end as there may be dishonest clients in the whole
cohort, and not a share of those who sent the row. And a row that hardly anybody else sends is
theirs whatever the rule: there clipping alone limits what they can do.

Clients may lie about how much data they hold, so all rules but ``"clip"`` count heads and not
weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedrecsk.engine.uploads import Uploads, UploadSums, add_uploads

DefenceName = Literal["clip", "median", "trimmed-mean", "krum", "multi-krum"]
# Rows sorted at a time, padding included, 64 MiB in single precision with 32 columns.
SORTED_NUMBERS = 1 << 24
# Numbers of clients' tables laid out densely at a time, 64 MiB in double precision.
DENSE_NUMBERS = 1 << 23


@dataclass(frozen=True)
class Defence:
    """How a server adds up uploads that it does not trust.

    Parameters
    ----------
    name : {"clip", "median", "trimmed-mean", "krum", "multi-krum"}
    assumed_malicious : float in [0, 0.5)
        Largest share of dishonest clients in a cohort that the rule has to withstand.
    clip_quantile : float in (0, 1]
        Rows longer than this quantile of the lengths of all rows of the round are shortened to
        it, and likewise clients' numbers; see `clip`.
    checks : bool, default=True
        Whether uploads that no data would explain are dropped, where that can be told.
    """

    name: DefenceName
    assumed_malicious: float
    clip_quantile: float
    checks: bool = True

    def add(self, uploads: Uploads, n_items: int) -> UploadSums:
        """Add uploads up.

        Parameters
        ----------
        uploads : Uploads
            Of at least one client.
        n_items : int

        Returns
        -------
        UploadSums
        """
        clipped = clip(uploads, self.clip_quantile, self.assumed_malicious)
        if self.name == "clip":
            return add_uploads(clipped, n_items)
        n_clients = len(clipped.clients)
        n_malicious = math.ceil(self.assumed_malicious * n_clients)
        if self.name in ("krum", "multi-krum"):
            n_chosen = 1 if self.name == "krum" else n_clients - n_malicious
            return add_uploads(krum(clipped, n_items, n_malicious, n_chosen), n_items)
        cut = n_clients if self.name == "median" else n_malicious
        sums = add_uploads(clipped, n_items)
        counts = torch.zeros(n_items, dtype=torch.int64, device=sums.rows.device)
        counts.index_add_(0, clipped.row_items, torch.ones_like(clipped.row_items))
        rows = trimmed_mean(clipped.rows, clipped.row_items, counts, cut)
        return replace(
            sums,
            rows=rows * sums.row_weights[:, None],
            numbers=central_mean(clipped.numbers, cut) * sums.weight,
        )


def clip(uploads: Uploads, quantile: float, assumed_malicious: float = 0.0) -> Uploads:
    """Shorten rows, and clients' numbers, to a quantile of the lengths that the round has.

    Changes would add up to a shorter step then, and training would be slower; so they are all
    lengthened by one factor, which makes up for what was taken from honest ones. It looks at no
    length beyond those of the dishonest, so nothing ends up longer than the longest honest change.
    Beside products (`Uploads.products`) rows are sums that the server solves for, and not changes.

    Parameters
    ----------
    uploads : Uploads
    quantile : float in (0, 1]
        Read from all rows together; 1 leaves everything as it is.
    assumed_malicious : float in [0, 0.5), default=0.0
        Share of the longest that the factor does not believe.

    Returns
    -------
    Uploads
        A count or a curvature beside the vector of a row is bounded on its own: were it shortened
        along, few would seem to have sent what pulls hard.
    """
    n, width = uploads.n_directions, uploads.rows.shape[1]
    believed = None if uploads.products else 1.0 - assumed_malicious
    sizes = [_shortened(uploads.rows[:, k : k + 1], quantile) for k in range(n, width)]
    return replace(
        uploads,
        rows=torch.cat([_shortened(uploads.rows[:, :n], quantile, believed), *sizes], 1),
        numbers=_shortened(uploads.numbers, quantile, believed),
    )


def _shortened(vectors: Tensor, quantile: float, believed: float | None = None) -> Tensor:
    """Scale vectors (n, w) down to a quantile of their lengths.

    With `believed`, all are scaled up again, so that the lengths have the sum that they would
    have, were they shortened to that quantile.
    """
    if quantile >= 1.0 or not vectors.numel():
        return vectors
    lengths = vectors.norm(dim=1)
    bound = _quantile(lengths, quantile)
    factor = (bound / lengths.clamp_min(torch.finfo(vectors.dtype).tiny)).clamp_max(1.0)
    if believed is not None and believed > quantile and bool(bound > 0):
        wanted = lengths.clamp_max(_quantile(lengths, believed))
        factor = factor * (wanted.sum() / lengths.clamp_max(bound).sum())
    return vectors.mul(factor[:, None])


def _quantile(lengths: Tensor, quantile: float) -> Tensor:
    """Smallest of the lengths (n,) that a share of them do not exceed."""
    # Not torch.quantile, which refuses more than 16 million numbers.
    found: Tensor = lengths.kthvalue(max(1, math.ceil(quantile * len(lengths)))).values
    return found


def trimmed_mean(values: Tensor, place: Tensor, counts: Tensor, cut: int) -> Tensor:
    """Mean of each column without its extreme values, place by place.

    Parameters
    ----------
    values : Tensor of shape (n, w)
    place : Tensor of shape (n,), int64
        Place that each row of values belongs to.
    counts : Tensor of shape (n_places,), int64
        How many belong to each.
    cut : int
        Values left out at either end; fewer where fewer than ``2 * cut + 1`` are there, so that
        the median is left: with a large `cut` it is the median.

    Returns
    -------
    Tensor of shape (n_places, w)
        Zero for places without values.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.defences import trimmed_mean
    >>> values = torch.tensor([[1.0], [2.0], [3.0], [90.0], [5.0], [7.0]])
    >>> place = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> trimmed_mean(values, place, torch.tensor([4, 2]), cut=1).flatten().tolist()
    [2.5, 6.0]
    """
    out = values.new_zeros(len(counts), values.shape[1])
    order = torch.argsort(place, stable=True)
    starts = counts.cumsum(0) - counts
    by_size = torch.argsort(counts, stable=True)
    by_size = by_size[counts[by_size] > 0]
    start = 0
    while start < len(by_size):
        # Places of similar counts together, so that padding stays small and memory bounded.
        sizes = counts[by_size[start:]]
        padded = sizes * torch.arange(1, len(sizes) + 1, device=sizes.device) * values.shape[1]
        n = max(1, int(torch.searchsorted(padded, SORTED_NUMBERS, right=True)))
        chosen, size = by_size[start : start + n], sizes[:n]
        longest = int(size[-1])
        column = torch.arange(longest, device=size.device)
        inside = column < size[:, None]  # (n, longest)
        source = torch.where(inside, starts[chosen][:, None] + column, 0)
        table = values[order[source]].masked_fill(~inside[:, :, None], torch.inf)
        table = _sorted(table)
        left_out = torch.minimum(torch.full_like(size, cut), (size - 1) // 2)[:, None]
        kept = (column >= left_out) & (column < size[:, None] - left_out)
        table = table.masked_fill(~kept[:, :, None], 0.0)
        out[chosen] = table.sum(1) / kept.sum(1, keepdim=True)
        start += n
    return out


def _sorted(table: Tensor) -> Tensor:
    """Sort a tensor (n, longest, w) along its middle axis; NumPy takes a thirtieth on a CPU."""
    if table.device.type == "cpu":
        return torch.from_numpy(np.sort(table.numpy(), axis=1))
    return table.sort(dim=1).values


def central_mean(vectors: Tensor, cut: int) -> Tensor:
    """Mean of the vectors nearest to the median of each column.

    Whole vectors are kept or left out: column by column, what is left of matrices with positive
    eigenvalues, such as u uᵀ, would be no such matrix.

    Parameters
    ----------
    vectors : Tensor of shape (n, m)
    cut : int
        How many are left out; less than half.

    Returns
    -------
    Tensor of shape (m,)

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.defences import central_mean
    >>> central_mean(torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0], [2.0, 90.0]]), cut=1)
    tensor([2., 1.])
    """
    distance = (vectors - vectors.median(dim=0).values).norm(dim=1)
    n_kept = max(len(vectors) - cut, len(vectors) // 2 + 1)
    return vectors[torch.argsort(distance, stable=True)[:n_kept]].mean(0)


def krum(uploads: Uploads, n_items: int, n_malicious: int, n_chosen: int) -> Uploads:
    """Choose the uploads that have near neighbours.

    The distance of two clients is that of the rows both have sent, for each such row on average,
    and of their numbers; clients without a row in common are as far as the median pair. A client's
    score is the sum over its ``C - n_malicious - 2`` nearest.

    Parameters
    ----------
    uploads : Uploads
    n_items : int
    n_malicious : int
        As many dishonest clients may be among them.
    n_chosen : int

    Returns
    -------
    Uploads
        Of the clients with the lowest scores.
    """
    n_clients = len(uploads.clients)
    distance = _distances(uploads, n_items)
    distance.fill_diagonal_(torch.inf)
    n_nearest = min(max(1, n_clients - n_malicious - 2), max(1, n_clients - 1))
    scores = distance.sort(dim=1).values[:, :n_nearest].sum(1)
    chosen = torch.argsort(scores, stable=True)[: max(1, n_chosen)]
    kept = torch.zeros(n_clients, dtype=torch.bool, device=scores.device)
    kept[chosen] = True
    return uploads.of(kept)


def _distances(uploads: Uploads, n_items: int) -> Tensor:
    """Mean squared distances (C, C) of the rows that two clients share, plus of their numbers."""
    n_clients, width = len(uploads.clients), max(1, uploads.rows.shape[1])
    # In double precision: a difference of sums of squares loses digits.
    zero = uploads.rows.new_zeros(n_clients, n_clients, dtype=torch.float64)
    products, own, common = zero.clone(), zero.clone(), zero.clone()
    order = torch.argsort(uploads.row_items, stable=True)
    items = uploads.row_items[order]
    at_once = max(1, DENSE_NUMBERS // (n_clients * width))
    for start in range(0, n_items, at_once):
        stop = min(start + at_once, n_items)
        ends = torch.searchsorted(items, torch.tensor([start, stop], device=items.device)).tolist()
        part = order[slice(*ends)]
        client, item = uploads.row_clients[part], uploads.row_items[part] - start
        rows = zero.new_zeros(n_clients, stop - start, width)
        rows[client, item] = uploads.rows[part].double()
        sent = zero.new_zeros(n_clients, stop - start)
        sent[client, item] = 1.0
        products += rows.flatten(1) @ rows.flatten(1).T
        own += rows.square().sum(2) @ sent.T
        common += sent @ sent.T
    apart = (own + own.T - 2.0 * products).clamp_min(0.0) / common.clamp_min(1.0)
    strangers = common == 0
    # Without the diagonal: where few pairs have rows in common, its zeros would be the median.
    known = apart[~strangers & ~torch.eye(n_clients, dtype=torch.bool, device=apart.device)]
    if len(known):
        apart = torch.where(strangers, known.median(), apart)
    numbers = uploads.numbers.double()
    if numbers.shape[1]:
        apart += torch.cdist(numbers, numbers).square() / numbers.shape[1]
    return apart
