"""Sums of clients' uploads with differential privacy.

The unit of privacy is a client, with all that it holds: a device with one user in most
federations. What a client sends in a round is one long vector x in a space that does not depend on
its data: a row for every item, zero for those that it has not touched, and its numbers. It has
parts of different scale, x = (x_1, ..., x_P), such as gradients, counts and curvatures. Each client
shortens its upload by one factor, so that every part p has length at most b_p:

    x  <-  x * min(1, b_1 / |x_1|, ..., b_P / |x_P|)

and noise is added to the sum of part p with standard deviation σ b_p / s_p, where Σ s_p² = 1. That
is one Gaussian mechanism with noise multiplier σ: divide part p by b_p / s_p. A client then sends
a vector of squared length Σ s_p² |x_p|² / b_p² <= Σ s_p² = 1, so a client more or less changes the
sum by at most 1, and the noise has standard deviation σ everywhere. What is done with the noised
sums afterwards costs nothing.

All weights are 1. Weights by numbers of interactions would be claims of clients, and denominators
made of them would tell of single ones.

Bounds are learned (Andrew, Thakkar, McMahan, Ramaswamy, NeurIPS 2021): each client also sends, for
each part, whether it would have fitted, as +1/2 or -1/2. These P numbers have length √P / 2 and are
one more part of the upload, with a share s of its own, so the round costs the same. The server
moves a bound up where fewer clients fit than wanted, and down where more do.

Noise is central, added once by a server that is trusted with the uploads, or local, added by each
client to its own. The sum of n independent Gaussian noises is Gaussian noise of n times the
variance, and nothing here looks at single noised uploads, so that sum is drawn at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uploads import Uploads, UploadSums, add_uploads

PrivacyName = Literal["central", "local"]

# Share of clients that shall fit into each bound. Of 0.05 to 0.7 the best on validation rows of
# MovieLens-100K: a short bound means little noise, and those who hold most lose most by it.
FITTING = 0.3
# Squared share of the first part, which moves the model; the others, which divide the rest, are
# averaged over many rounds. As good as 0.95, and better than 0.4 to 0.8.
MAIN = 0.9
# Standard deviation of the noise in a share of clients that fit, unless that took more than a
# tenth of the squared shares.
SHARE_NOISE, MOST_OF_INDICATORS = 0.1, 0.1


@dataclass(frozen=True, eq=False)
class Release:
    """What may be known of a round.

    Attributes
    ----------
    sums : UploadSums
        Noised; its weights are numbers of clients expected.
    bounds : Tensor of shape (P,), float64
        For the next round.
    clip_norm : float
        What the first part was shortened to, or the whole upload.
    noise : float
        Standard deviation of the noise in the numbers of the first part.
    """

    sums: UploadSums
    bounds: Tensor
    clip_norm: float
    noise: float


@dataclass(frozen=True)
class Privacy:
    """How uploads are shortened and noised.

    Attributes
    ----------
    name : {"central", "local"}
        Who adds noise.
    noise_multiplier : float
        σ.
    clip_norm : float or None
        Length that a whole upload is shortened to; None learns a bound for each part.
    cohort : int
        Clients expected in a round; public, as are the parameters.
    streams : Streams
    """

    name: PrivacyName
    noise_multiplier: float
    clip_norm: float | None
    cohort: int
    streams: Streams

    def add(
        self,
        uploads: Uploads,
        n_items: int,
        widths: Sequence[int],
        bounds: Tensor,
        t: int,
        n_clients: int,
    ) -> Release:
        """Add uploads up with privacy.

        Parameters
        ----------
        uploads : Uploads
            Finite; their weights are not read.
        n_items : int
            Rows of the table.
        widths : sequence of int
            Columns of each part of the rows; numbers are one part more, where there are any.
        bounds : Tensor of shape (P,), float64
            One for each part.
        t : int
            Number of the round.
        n_clients : int
            Who take part, those included whose uploads are not here; they send noise alone.

        Returns
        -------
        Release
        """
        part = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
        part = part.to(uploads.rows.device)
        n_parts = len(widths) + int(uploads.numbers.shape[1] > 0)
        lengths = part_lengths(uploads, part, n_parts)  # (C, P)
        if self.clip_norm is None:
            limit = bounds.to(lengths.device)
            shares, learning = self._shares(n_parts)
            scale = limit.cpu() / torch.tensor(shares, dtype=torch.float64)
        else:
            # One part with all that there is.
            lengths = lengths.square().sum(1, keepdim=True).sqrt()
            limit = lengths.new_full((1,), self.clip_norm)
            scale, learning = limit.cpu().expand(n_parts), 0.0
        factor = (limit / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).amin(1)
        sums = add_uploads(_shortened(uploads, factor.clamp_max(1.0)), n_items)
        n_noises = n_clients if self.name == "local" else 1
        spread = self.noise_multiplier * math.sqrt(n_noises) * scale
        if not self.noise_multiplier:  # an infinite bound times no noise is no noise
            spread = torch.zeros_like(scale)
        sums = self._noised(sums, part, spread, t)
        if self.clip_norm is None:
            fit = (lengths <= limit).double().sub(0.5).sum(0).cpu()
            length = math.sqrt(n_parts) / 2.0
            own = self.noise_multiplier * math.sqrt(n_noises) * length / learning
            generator = self.streams.torch("privacy bounds", t)
            fit += own * torch.randn(n_parts, dtype=torch.float64, generator=generator)
            bounds = moved_bounds(bounds, fit / self.cohort + 0.5, own / self.cohort, t)
        return Release(sums, bounds, float(limit[0]), float(spread[0]))

    def _shares(self, n_parts: int) -> tuple[list[float], float]:
        """Divide the upload's squared length of 1 among its parts and the indicators."""
        wanted = n_parts * (self.noise_multiplier / (2.0 * SHARE_NOISE * self.cohort)) ** 2
        learning = min(MOST_OF_INDICATORS, max(wanted, 1e-6))
        rest = 1.0 - learning
        others = (1.0 - MAIN) / max(n_parts - 1, 1)
        main = MAIN if n_parts > 1 else 1.0
        squares = [main * rest, *[others * rest] * (n_parts - 1)]
        return [math.sqrt(square) for square in squares], math.sqrt(learning)

    def _noised(self, sums: UploadSums, part: Tensor, spread: Tensor, t: int) -> UploadSums:
        """Add noise to all rows and numbers, with a standard deviation (P,) for each part."""
        device, dtype = sums.rows.device, sums.rows.dtype
        generator = self.streams.torch("privacy", t, device=device)
        spread = spread.to(device, dtype)
        rows = torch.randn(sums.rows.shape, generator=generator, device=device, dtype=dtype)
        numbers = torch.randn(sums.numbers.shape, generator=generator, device=device, dtype=dtype)
        return replace(
            sums,
            rows=sums.rows + spread[part] * rows,
            row_weights=sums.row_weights.new_full(sums.row_weights.shape, self.cohort),
            numbers=sums.numbers + spread[-1] * numbers,
            weight=sums.weight.new_tensor(float(self.cohort)),
        )


def part_lengths(uploads: Uploads, part: Tensor, n_parts: int) -> Tensor:
    """Measure the parts of each client's upload.

    Parameters
    ----------
    uploads : Uploads
    part : Tensor of shape (w,), int64
        Part that each column of the rows belongs to; numbers are the last one.
    n_parts : int

    Returns
    -------
    Tensor of shape (C, n_parts), float64
    """
    # In double precision: squares of numbers that are finite in single overflow there.
    of_rows = uploads.rows.new_zeros(len(uploads.rows), n_parts, dtype=torch.float64)
    of_rows.index_add_(1, part, uploads.rows.double().square())
    squares = of_rows.new_zeros(len(uploads.clients), n_parts)
    squares.index_add_(0, uploads.row_clients, of_rows)
    if uploads.numbers.shape[1]:
        squares[:, -1] += uploads.numbers.double().square().sum(1)
    return squares.sqrt()


def _shortened(uploads: Uploads, factor: Tensor) -> Uploads:
    """Multiply each client's upload by its factor (C,), and give all the same weight."""
    factor = factor.to(uploads.rows.dtype)
    return replace(
        uploads,
        rows=uploads.rows * factor[uploads.row_clients][:, None],
        row_weights=torch.ones_like(uploads.row_weights),
        numbers=uploads.numbers * factor[:, None],
        weights=torch.ones_like(uploads.weights),
    )


def moved_bounds(bounds: Tensor, fitting: Tensor, noise: float, t: int) -> Tensor:
    """Move bounds (P,) towards those that the wanted share of clients fit into.

    Parameters
    ----------
    bounds : Tensor of shape (P,)
    fitting : Tensor of shape (P,)
        Share of clients that fit, as far as noise lets it be known.
    noise : float
        Standard deviation of the noise in it. The more there is, the smaller the steps.
    t : int
        Number of the round. The first rounds take large steps, from a start that knows nothing.

    Returns
    -------
    Tensor of shape (P,)

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.privacy import moved_bounds
    >>> moved_bounds(torch.ones(3), torch.tensor([0.0, 0.3, 1.0]), 0.0, 9)
    tensor([1.3499, 1.0000, 0.4966])
    """
    rate = max(1.0, 3.0 / (t + 1)) / (1.0 + (noise / SHARE_NOISE) ** 2)
    # Not cut to [0, 1]: what noise adds must be zero in the mean, lest bounds run away.
    moved: Tensor = bounds * torch.exp((-rate * (fitting - FITTING)).clamp(-3.0, 3.0))
    return moved
