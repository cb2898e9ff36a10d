"""Local training of the adapters of all clients at once.

    for each step, over its micro-batches and for every client c with examples in them:
        g_c = sum of the gradients of c's losses / number of c's examples
        g_c = g_c + mu (theta_c - anchor_c)                 proximal term
        g_c = g_c · min(1, largest norm / |g_c|)
        theta_c = (1 - rate · decay) theta_c                AdamW
        theta_c = Adam's step from theta_c by g_c, with moments and a count of steps of c's own

Clients share no adapter, so one backward pass from the sum of the clients' losses gives the stack
of their gradients. Dividing by the examples of the whole step makes it the same however the step
is cut into micro-batches.

`length_buckets` plans the steps. Texts in a batch are padded to the longest one among them, so a
client's examples are sorted by length inside windows of a few batches, which leaves the contents
of its batches and their order random. The batches of different clients meet in one stacked batch,
and long ones had better meet long ones. For that, all clients read the same random numbers, one a
step: a client with n batches takes the longest where the largest of the first n numbers is, the
next longest where the second largest is, and so on. So each client's order is a random permutation
that depends on nothing but the client and these numbers.

Ilya Loshchilov and Frank Hutter (2019), "Decoupled Weight Decay Regularization", ICLR. Tian Li,
Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar and Virginia Smith (2020),
"Federated Optimization in Heterogeneous Networks", MLSys (the proximal term).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments
from fedrecsk.models.stacked_lora import Adapters, flat, unflat

Batch = TypeVar("Batch")


def train_adapters(
    adapters: Mapping[str, Tensor],
    loss: Callable[[Adapters, Batch], Tensor],
    batches: Iterable[Sequence[tuple[Batch, Tensor]]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float | None = None,
    anchor: Mapping[str, Tensor] | None = None,
    proximal: float = 0.0,
) -> tuple[Adapters, Tensor]:
    """Train every client's adapters on its own examples, by AdamW.

    Parameters
    ----------
    adapters : mapping of name to Tensor of shape (C, ...)
        Each client's start; not changed.
    loss : callable
        ``loss(adapters, batch) -> Tensor (C,)``: for each client the *sum* of the losses of its
        examples in the micro-batch. What it says of a client without examples is not read.
    batches : iterable of steps
        A step is a sequence of micro-batches ``(batch, weights)``, with `weights` (C,) the number
        of examples that each client has in it, 0 for none. May be a generator.
    learning_rate : float
    weight_decay : float, default=0.0
        Decoupled: a step multiplies by ``1 - learning_rate * weight_decay``.
    betas : tuple of two floats, default=(0.9, 0.999)
    eps : float, default=1e-8
    max_grad_norm : float, optional
        Largest norm of a client's gradient of a step, over all its adapters. Default: any.
    anchor : mapping of name to Tensor of shape (C, ...) or (1, ...), optional
        What the proximal term pulls to: each client's own, or one for all.
    proximal : float, default=0.0
        Weight mu of the term ``mu / 2 · |theta - anchor|²``, as in FedProx and Ditto.

    Returns
    -------
    adapters : dict of Tensor of shape (C, ...)
        After training. A client without examples has what it started with.
    losses : Tensor of shape (C,)
        Mean over all examples that a client has seen, each before the step that used it, without
        the proximal term; 0 for a client without examples.

    Raises
    ------
    ValueError
        If `proximal` is given without an anchor, or the anchor is of other adapters.

    Notes
    -----
    Clients that have run out of examples need not cost time: the loss can run the model on
    ``select(adapters, present)`` and put the losses at ``present`` into a vector of zeros.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.lora_training import train_adapters
    >>> start = {"w": torch.zeros(2, 1)}
    >>> target = torch.tensor([[1.0, 1.0], [3.0, 5.0]])
    >>> trained, losses = train_adapters(
    ...     start,
    ...     lambda adapters, batch: (adapters["w"] - batch).square().sum(1),
    ...     [[(target, torch.tensor([2.0, 0.0]))]],  # the second client has no examples
    ...     learning_rate=0.5,
    ... )
    >>> [round(value, 3) for value in trained["w"].flatten().tolist()], losses.tolist()
    ([0.5, 0.0], [1.0, 0.0])
    """
    optimizer = Optimizer("adam", learning_rate, betas=betas, eps=eps)
    # One vector a client: a step is a few operations, however many layers are adapted.
    theta = flat(adapters).detach().clone()  # (C, P)
    pull = _anchor(adapters, anchor) if proximal else None
    moments = init_moments({"theta": theta}, optimizer)
    seen, total = theta.new_zeros(len(theta)), theta.new_zeros(len(theta))
    for step in batches:
        grads, losses, number = _gradients(theta, adapters, loss, step)
        active = number > 0
        if pull is not None:
            grads += proximal * (theta - pull)
        if max_grad_norm is not None:
            grads *= (max_grad_norm / (grads.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        if weight_decay:
            decay = 1.0 - learning_rate * weight_decay
            theta = torch.where(active[:, None], decay * theta, theta)
        stepped, moments = apply_gradients(
            {"theta": theta}, {"theta": grads}, moments, active, optimizer
        )
        theta = stepped["theta"]
        seen += losses
        total += number
    # Clones: views would keep all clients' adapters in memory for the sake of one.
    trained = {name: value.clone() for name, value in unflat(theta, adapters).items()}
    return trained, seen / total.clamp_min(1.0)


def length_buckets(
    lengths: Sequence[ArrayLike],
    batch_size: int,
    generators: Sequence[np.random.Generator],
    order: np.random.Generator,
    *,
    window: int = 8,
) -> list[NDArray[np.int64]]:
    """Plan an epoch in which all clients step together and stacked batches pad little.

    Parameters
    ----------
    lengths : sequence of C arrays of shape (n_c,)
        Length of each example of each client, such as its number of tokens.
    batch_size : int
        Most examples B of a client in a step.
    generators : sequence of C numpy.random.Generator
        Of each client, for which of its examples share a batch.
    order : numpy.random.Generator
        Says at which steps the long batches come, the same steps for all clients. Give generators
        of the same seed wherever a client's plan is to come out the same.
    window : int, default=8
        Most batches among whose examples a client sorts by length. A window has no more than a
        quarter of a client's batches, or those of a small client would hold the same examples in
        every epoch. 1: batches are plain random samples.

    Returns
    -------
    list of ndarray of shape (C, B)
        Of each step, the numbers 0 ... n_c - 1 of the examples of each client by ascending length,
        then -1 where a client has fewer than B. A client with n examples takes part in the first
        ceil(n / B) steps, and each of its examples comes once.

    Raises
    ------
    ValueError
        If there is not one generator a client, or sizes are not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.models.lora_training import length_buckets
    >>> rng = [np.random.default_rng(seed) for seed in range(3)]
    >>> plan = length_buckets([[7, 3, 7, 3], [5]], 2, rng[:2], rng[2])
    >>> len(plan), plan[0].shape, sorted(np.concatenate(plan, axis=1)[0].tolist())
    (2, (2, 2), [0, 1, 2, 3])
    >>> plan[1][1].tolist()  # the second client has run out
    [-1, -1]
    """
    if len(generators) != len(lengths):
        raise ValueError(
            f"Got {len(generators)} generators for {len(lengths)} clients; give one a client."
        )
    if batch_size < 1 or window < 1:
        raise ValueError(
            f"Batches and windows hold at least 1; got batch_size={batch_size}, window={window}."
        )
    plans = [
        _client_batches(np.asarray(own), batch_size, generator, window)
        for own, generator in zip(lengths, generators, strict=True)
    ]
    n_steps = max((len(batches) for batches in plans), default=0)
    heights = order.random(n_steps)
    stacked = np.full((n_steps, len(plans), batch_size), -1, dtype=np.int64)
    for client, batches in enumerate(plans):
        # `batches` ascend by length, and so do the numbers of the steps they are put at.
        stacked[np.argsort(heights[: len(batches)], kind="stable"), client] = batches
    return list(stacked)


def _gradients(
    theta: Tensor,
    like: Mapping[str, Tensor],
    loss: Callable[[Adapters, Batch], Tensor],
    step: Sequence[tuple[Batch, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a step's mean gradients (C, P), sums of losses (C,) and numbers of examples (C,)."""
    grads = torch.zeros_like(theta)
    losses, number = theta.new_zeros(len(theta)), theta.new_zeros(len(theta))
    for batch, weights in step:
        here = weights.to(theta)
        leaf = theta.detach().requires_grad_(True)
        with torch.enable_grad():
            summed = torch.where(here > 0, loss(unflat(leaf, like), batch).to(theta.dtype), 0.0)
            (grad,) = torch.autograd.grad(summed.sum(), leaf)
        # What an absent client's loss makes of its padding, a NaN included, must not be added.
        grads += torch.where(here[:, None] > 0, grad, 0.0)
        losses += summed.detach()
        number += here
    return grads / number.clamp_min(1.0)[:, None], losses, number


def _anchor(
    adapters: Mapping[str, Tensor], anchor: Mapping[str, Tensor] | None
) -> Tensor:  # (C, P) or (1, P)
    """Return what the proximal term pulls to, in the order of the adapters."""
    if anchor is None:
        raise ValueError("proximal > 0 pulls the adapters to an anchor: give one.")
    n_clients = len(next(iter(adapters.values())))
    for name, value in adapters.items():
        fits = name in anchor and anchor[name].shape[1:] == value.shape[1:]
        if not fits or len(anchor[name]) not in (1, n_clients):
            raise ValueError(
                f"The anchor must have {name} of the shape {tuple(value.shape)}, or with 1 in "
                f"front; got {tuple(anchor[name].shape) if name in anchor else 'none'}."
            )
    return flat({name: anchor[name] for name in adapters}).detach()


def _client_batches(
    lengths: NDArray[np.int64], batch_size: int, generator: np.random.Generator, window: int
) -> NDArray[np.int64]:
    """Draw a client's batches (n_batches, B) and sort them by their longest examples."""
    n = len(lengths)
    batches = np.full((-(-n // batch_size), batch_size), -1, dtype=np.int64)
    in_window = batch_size * max(1, min(window, len(batches) // 4))
    drawn = generator.permutation(n)
    by_length = np.lexsort((lengths[drawn], np.arange(n) // in_window))
    batches.reshape(-1)[:n] = drawn[by_length]
    longest = np.where(batches >= 0, lengths[batches], -1).max(axis=1)
    return batches[np.argsort(longest, kind="stable")]
