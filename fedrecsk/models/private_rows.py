"""What clients with one user each hold in local training, side by side and updated in place.

A private row is in exactly one mini-batch, so between its steps an optimiser moves it by what is
left of its moments alone, and all those moves are made at once (`drift`). What moves at every step
of a client, its user's vector and its network, is in one row of `Own`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import Cohort
from fedrecsk.models.sampled_bce import LocalExamples, _side_by_side

# A decay below this is over.
NEGLIGIBLE = 1e-12


class Own:
    """What moves at every step of a client (C, P), updated in place; `apply_gradients` copies."""

    def __init__(self, values: Tensor, optimizer: Optimizer) -> None:
        self.values, self.grad = values, torch.zeros_like(values)
        self._optimizer = optimizer
        nothing = values[:0]
        self._mean = torch.zeros_like(values if optimizer.name != "sgd" else nothing)
        self._square = torch.zeros_like(values if optimizer.name == "adam" else nothing)
        self._work = torch.empty(2, *values.shape, dtype=values.dtype, device=values.device)
        self._steps = values.new_zeros(len(values), 1)

    def move(self, first: int) -> None:
        """Make one step of the clients from number `first` on by their gradients."""
        values, grad, optimizer = self.values[first:], self.grad[first:], self._optimizer
        mean, square = self._mean[first:], self._square[first:]
        step, root = self._work[:, first:]
        rate = optimizer.learning_rate
        if optimizer.name == "sgd":
            values.sub_(torch.mul(grad, rate, out=step))
            return
        if optimizer.name == "momentum":
            mean.mul_(optimizer.momentum).add_(grad)
            values.sub_(torch.mul(mean, rate, out=step))
            return
        beta1, beta2 = optimizer.betas
        made = self._steps[first:].add_(1)
        mean.mul_(beta1).add_(torch.mul(grad, 1 - beta1, out=step))
        square.mul_(beta2).add_(torch.mul(grad, 1 - beta2, out=step).mul_(grad))
        torch.div(square, 1 - beta2**made, out=root).sqrt_().add_(optimizer.eps)
        values.sub_(torch.div(mean, 1 - beta1**made, out=step).mul_(rate).div_(root))


@dataclass(frozen=True, eq=False)
class PrivateRows:
    """The private rows of a cohort, by mini-batch and then by client.

    Attributes
    ----------
    items, clients : Tensor of shape (K,), int64
    valid : Tensor of shape (K,), bool
        False for padding.
    values : Tensor of shape (K, d or d + 1)
    parts : list of _Part
        One for each number of mini-batch; their blocks are views of `values`.
    """

    items: Tensor
    clients: Tensor
    valid: Tensor
    values: Tensor
    parts: list[_Part]

    @classmethod
    def of(
        cls,
        cohort: Cohort,
        examples: LocalExamples,
        item_table: Tensor,
        local_epochs: int,
        optimizer: Optimizer,
    ) -> PrivateRows:
        """Copy the clients' rows of the server's table."""
        fan = examples.items.shape[1]
        spans, place = _side_by_side(cohort, examples)
        n_places = spans[-1].stop if spans else 0
        items = examples.items.new_zeros(n_places, fan)
        items[place] = examples.items
        valid = examples.valid.new_zeros(n_places, fan)
        valid[place] = examples.valid
        clients = place.new_zeros(n_places)
        clients[place] = cohort.row_user
        values = item_table.index_select(0, items.reshape(-1))
        mask = valid.reshape(-1).to(values.dtype)
        widest = max((span.stop - span.start for span in spans), default=0)
        scratch = values.new_empty(2, widest * fan, values.shape[1])
        n_steps = -(-cohort.counts // examples.per_batch)  # of each client in an epoch
        parts = []
        for number, span in enumerate(spans):
            own = slice(span.start * fan, span.stop * fan)
            block = values[own].reshape(-1, span.longest * fan, values.shape[1])
            inside = mask[own].reshape(block.shape[:2])
            steps = _Steps(number, n_steps[span.first :], local_epochs)
            work = scratch[:, : inside.numel()].reshape(2, *block.shape)
            parts.append(_Part.of(span.first, block, inside, work, steps, optimizer))
        return cls(
            items=items.reshape(-1),
            clients=clients.repeat_interleave(fan),
            valid=valid.reshape(-1),
            values=values,
            parts=parts,
        )


@dataclass(frozen=True, eq=False)
class _Steps:
    """When a mini-batch comes: it is `number` of the `per_epoch` (c,) steps of its clients."""

    number: int
    per_epoch: NDArray[np.int64]
    local_epochs: int

    def made(self) -> NDArray[np.int64]:
        """Count the steps (local_epochs, c) of a client up to that of the mini-batch."""
        return self.number + 1 + self.per_epoch * np.arange(self.local_epochs)[:, None]

    def until_next(self) -> NDArray[np.int64]:
        """Count the steps (local_epochs, c) from there until the next, or to the client's last."""
        left = self.per_epoch * self.local_epochs - self.made() + 1
        until: NDArray[np.int64] = np.minimum(self.per_epoch, left)
        return until


@dataclass(frozen=True, eq=False)
class _Part:
    """The private rows of the mini-batches with one number, and how an optimiser moves them.

    Attributes
    ----------
    first : int
        The first client that has such a mini-batch; so have all after it.
    block : Tensor of shape (c, n, width)
        A view of the rows; updated in place.
    mask, weight : Tensor of shape (c, n)
        1 for examples and 0 for padding; the share in the mean of the mini-batch.
    mean, square : Tensor of shape (c, n, width)
        Moments; empty where the optimiser has no use for them.
    keep : Tensor of shape (2, c, 1, 1)
        What is left of the moments from one epoch to the next.
    moves : Tensor of shape (local_epochs, 4, c, 1, 1)
        See `drift`.
    scratch : Tensor of shape (2, c, n, width)
        To work in, shared by all parts: new memory costs more than the sums in it.
    optimizer : Optimizer
    """

    first: int
    block: Tensor
    mask: Tensor
    weight: Tensor
    mean: Tensor
    square: Tensor
    keep: Tensor
    moves: Tensor
    scratch: Tensor
    optimizer: Optimizer

    @classmethod
    def of(
        cls,
        first: int,
        block: Tensor,
        mask: Tensor,
        scratch: Tensor,
        steps: _Steps,
        optimizer: Optimizer,
    ) -> _Part:
        """Begin training, without moments."""
        decays = optimizer.betas if optimizer.name == "adam" else (optimizer.momentum, 0.0)
        keep = np.array(decays)[:, None] ** steps.per_epoch
        moves = drift(steps.made(), steps.until_next(), optimizer)
        return cls(
            first=first,
            block=block,
            mask=mask,
            weight=mask / mask.sum(1, keepdim=True),
            mean=torch.zeros_like(block if optimizer.name != "sgd" else block[:0]),
            square=torch.zeros_like(block if optimizer.name == "adam" else block[:0]),
            keep=to_device(keep, block.device).to(block.dtype)[..., None, None],
            moves=to_device(moves, block.device).to(block.dtype)[..., None, None],
            scratch=scratch,
            optimizer=optimizer,
        )

    def move(self, grad: Tensor, epoch: int) -> None:
        """Move the rows by a gradient, as far as they get before their next; overwrites `grad`."""
        block, mean, square, optimizer = self.block, self.mean, self.square, self.optimizer
        term = self.scratch[1]
        if optimizer.name == "sgd":
            block.sub_(grad, alpha=optimizer.learning_rate)
        elif optimizer.name == "momentum":
            mean.mul_(self.keep[0]).add_(grad)
            block.sub_(torch.mul(mean, self.moves[epoch, 0], out=term))
        else:
            beta1, beta2 = optimizer.betas
            mean.mul_(self.keep[0]).add_(grad, alpha=1 - beta1)
            square.mul_(self.keep[1]).addcmul_(grad, grad, value=1 - beta2)
            near, near_by, far, far_by = self.moves[epoch]
            root = torch.sqrt(square, out=grad)
            block.addcdiv_(torch.mul(mean, near, out=term), root.add_(near_by), value=-1)
            block.addcdiv_(torch.mul(mean, far, out=term), root.add_(far_by), value=-1)


def drifts_smoothly(optimizer: Optimizer) -> bool:
    """Tell whether `drift` is exact: Adam's second moment must change slowly."""
    return optimizer.name != "adam" or optimizer.betas[1] >= 0.99


def drift(
    step: NDArray[np.int64], length: NDArray[np.int64], optimizer: Optimizer
) -> NDArray[np.float64]:
    """Sum up what an optimiser makes of moments in some steps without a gradient.

    After the gradient of a client's step number t, momentum moves a row by rate Σ μ^j velocity in
    that and the following steps, j = 0 ... length - 1. Adam moves it by

        rate Σ_j a_j mean / (b_j r + eps),  r = √square,
        a_j = β1^j / (1 - β1^(t + j)),  b_j² = β2^j / (1 - β2^(t + j)),

    which is mean times Σ w_j / (r + x_j) with w_j = rate a_j / b_j and x_j = eps / b_j. The x_j
    lie close together, and the Gauss rule of this sum with two nodes gives it to rounding wherever
    a gradient is large against eps: the relative error is about 2 (eps / gradient)^4 in the first
    steps, less in later ones, and at most some percent where a gradient is smaller than eps. Sums
    of one or two steps are exact.

    Parameters
    ----------
    step, length : ndarray of shape (...)
        Numbers from 1.
    optimizer : Optimizer

    Returns
    -------
    ndarray of shape (..., 4, c) for arguments (..., c)
        Momentum: the factor of the velocity, first of the four. Adam: w, x of one node, w of the
        other and its x beyond that of the first. SGD: zeros, since nothing drifts.
    """
    moves = np.zeros((*step.shape[:-1], 4, step.shape[-1]))
    decay = {"momentum": optimizer.momentum, "adam": optimizer.betas[0], "sgd": 0.0}[optimizer.name]
    over = math.ceil(math.log(NEGLIGIBLE) / math.log(decay)) if 0 < decay < 1 else 1
    longest = int(length.max(initial=1))
    j = np.arange(min(longest, over) if decay < 1 else longest)
    fades = np.where(j < length[..., None], float(decay) ** j, 0.0)
    if optimizer.name != "adam":
        moves[..., 0, :] = optimizer.learning_rate * fades.sum(-1)
        return moves
    beta1, beta2 = optimizer.betas
    made = step[..., None] + j
    root = np.sqrt(beta2**j / (1 - beta2**made))
    w, x = fades / (1 - beta1**made) / root, 1 / root
    total = w.sum(-1)
    centre = (w * x).sum(-1) / total
    off = x - centre[..., None]
    spread = (w * off**2).sum(-1) / total
    lean = (w * off**3).sum(-1) / total / np.maximum(spread, np.finfo(float).tiny)
    # The nodes are the roots of z² - lean z - spread, the polynomial of degree two that is
    # orthogonal to lower ones under the weights w; their shares keep total and centre.
    half = np.sqrt(lean**2 / 4 + spread)
    share = np.divide(half + lean / 2, 2 * half, out=np.full_like(half, 0.5), where=half > 0)
    moves[..., 0, :] = optimizer.learning_rate * total * share
    moves[..., 1, :] = optimizer.eps * (centre + lean / 2 - half)
    moves[..., 2, :] = optimizer.learning_rate * total * (1 - share)
    moves[..., 3, :] = optimizer.eps * 2 * half
    return moves
