"""Local training of all clients of a cohort at once.

Parameters carry a leading client axis C and a loss gives one number per client. Clients do not
share parameters, so the gradient of the summed loss *is* the stack of the clients' gradients:
one backward pass trains them all. An optimiser step moves only the clients that had a batch;
without the mask Adam would keep moving the others by its momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

OptimizerName = Literal["sgd", "momentum", "adam"]
Batch = TypeVar("Batch")
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Optimizer:
    """A first-order optimiser for stacked parameters.

    Parameters
    ----------
    name : {"sgd", "momentum", "adam"}
    learning_rate : float
    momentum : float, default=0.9
        Of ``"momentum"`` (heavy ball, as ``torch.optim.SGD``).
    betas : tuple of two floats, default=(0.9, 0.999)
        Of ``"adam"``.
    eps : float, default=1e-8
        Of ``"adam"``.
    """

    name: OptimizerName
    learning_rate: float
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, eq=False)
class Moments:
    """What an optimiser remembers of stacked parameters.

    Attributes
    ----------
    first, second : dict of Tensor
        Like the parameters; empty where the optimiser has no use for them.
    steps : Tensor of shape (C,)
        Steps that each client has made.
    """

    first: Params
    second: Params
    steps: Tensor


def init_moments(params: Mapping[str, Tensor], optimizer: Optimizer) -> Moments:
    """Return the moments before the first step."""
    names = list(params) if optimizer.name != "sgd" else []
    squares = list(params) if optimizer.name == "adam" else []
    some = next(iter(params.values()))
    return Moments(
        first={name: torch.zeros_like(params[name]) for name in names},
        second={name: torch.zeros_like(params[name]) for name in squares},
        steps=some.new_zeros(some.shape[0]),
    )


def apply_gradients(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    moments: Moments,
    active: Tensor,
    optimizer: Optimizer,
) -> tuple[Params, Moments]:
    """Make one optimiser step of the clients that are active.

    Parameters
    ----------
    params, grads : mapping of name to Tensor of shape (C, ...)
    moments : Moments
    active : Tensor of shape (C,), bool
        Clients that had a batch; the others' parameters and moments stay as they are.
    optimizer : Optimizer

    Returns
    -------
    params, moments
        New objects.
    """
    steps = moments.steps + active.to(moments.steps.dtype)
    new_params: Params = {}
    first: Params = {}
    second: Params = {}
    for name, param in params.items():
        grad = grads[name]
        mask = _along_clients(active, param)
        if optimizer.name == "sgd":
            step = optimizer.learning_rate * grad
        elif optimizer.name == "momentum":
            velocity = optimizer.momentum * moments.first[name] + grad
            first[name] = torch.where(mask, velocity, moments.first[name])
            step = optimizer.learning_rate * velocity
        else:
            beta1, beta2 = optimizer.betas
            mean = beta1 * moments.first[name] + (1 - beta1) * grad
            square = beta2 * moments.second[name] + (1 - beta2) * grad * grad
            first[name] = torch.where(mask, mean, moments.first[name])
            second[name] = torch.where(mask, square, moments.second[name])
            # Clients that have not moved yet would divide 0 by 0; the mask drops their result.
            made = _along_clients(steps.clamp_min(1), param)
            corrected = (square / (1 - beta2**made)).sqrt() + optimizer.eps
            step = optimizer.learning_rate * (mean / (1 - beta1**made)) / corrected
        new_params[name] = torch.where(mask, param - step, param)
    return new_params, Moments(first=first, second=second, steps=steps)


def local_train(
    params: Mapping[str, Tensor],
    loss: Callable[[Params, Batch], Tensor],
    batches: Sequence[tuple[Batch, Tensor]],
    *,
    optimizer: Optimizer,
    local_epochs: int,
) -> tuple[Params, Tensor]:
    """Train every client of a cohort on its own batches; the general path, for any model.

    Parameters
    ----------
    params : mapping of name to Tensor of shape (C, ...)
        Each client's start; not changed.
    loss : callable
        ``loss(params, batch) -> Tensor (C,)``, the clients' losses on their part of the batch.
    batches : sequence of (batch, active)
        One entry per local step of an epoch, and which clients (C,) have data in it.
    optimizer : Optimizer
    local_epochs : int
        Passes over `batches`.

    Returns
    -------
    params : dict of Tensor
        After training.
    losses : Tensor of shape (C,)
        Sum over the batches of the first epoch, before each step: what the client saw.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.local import Optimizer, local_train
    >>> start = {"w": torch.zeros(2, 1)}
    >>> target = torch.tensor([[1.0], [3.0]])
    >>> trained, losses = local_train(
    ...     start,
    ...     lambda p, batch: ((p["w"] - batch) ** 2).sum(1),
    ...     [(target, torch.tensor([True, False]))],
    ...     optimizer=Optimizer("sgd", 0.5),
    ...     local_epochs=1,
    ... )
    >>> trained["w"].flatten().tolist(), losses.tolist()
    ([1.0, 0.0], [1.0, 0.0])
    """
    current: Params = {name: value.detach().clone() for name, value in params.items()}
    moments = init_moments(current, optimizer)
    some = next(iter(current.values()))
    first_losses = some.new_zeros(some.shape[0])
    for epoch in range(local_epochs):
        for batch, active in batches:
            for value in current.values():
                value.requires_grad_(True)
            with torch.enable_grad():
                losses = torch.where(active, loss(current, batch), 0.0)
                grads = torch.autograd.grad(losses.sum(), list(current.values()))
            with torch.no_grad():
                current, moments = apply_gradients(
                    current, dict(zip(current, grads, strict=True)), moments, active, optimizer
                )
                if epoch == 0:
                    first_losses += losses
    return {name: value.detach() for name, value in current.items()}, first_losses


def _along_clients(per_client: Tensor, like: Tensor) -> Tensor:
    """Reshape (C,) so that it broadcasts against (C, ...)."""
    return per_client.reshape(-1, *([1] * (like.dim() - 1)))
