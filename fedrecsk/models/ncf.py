"""Neural collaborative filtering trained on sampled negatives, all clients of a cohort at once.

    logit(u, i) = MLP([u ; v_i])  (+ b_i with an item bias),   MLP: 2d -> 8 -> 8 -> 1 with ReLU.

A client's private copy of the model is its users' vectors, one row for each distinct item among
its examples, and its own head, the MLP. For the examples (u, i, y) of a mini-batch,

    loss = mean over the batch of  log(1 + exp(s)) - y s  +  l2/2 (|u|^2 + |v_i|^2)

with s = logit(u, i), and one step of an optimiser follows its gradient, written out by hand. The
mean, where matrix factorisation (`sampled_bce`) takes the sum: all examples of a batch share the
head, and a sum would make its steps grow with the batch. The head is not penalised. The examples
are those of `sampled_bce.draw_examples`. An item bias is the last column of the item table, as
there, and v_i in the penalty includes it.

Two paths compute the same training. `_train_fused` serves one user a client. A private row is then
in exactly one mini-batch, so its gradient is zero but for one step of each epoch, and all moves
that momentum or Adam make of it until the next one are known at once (`_drift`). A local step is a
few batched products over rows that lie side by side, and no other row is read or written.
`_train_pooled` serves any number of users a client, and gathers.

A head is a dict of ``weight_0, bias_0, weight_1, ...`` with weights (in, out); those of trained
clients carry a leading client axis.

Xiangnan He, Lizi Liao, Hanwang Zhang, Liqiang Nie, Xia Hu and Tat-Seng Chua (2017), "Neural
Collaborative Filtering", WWW. Here without its product branch, as federated recommenders use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad, softplus

from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments
from fedrecsk.engine.shards import Cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.models.sampled_bce import (
    LocalExamples,
    LocalResult,
    _DenseUpdate,
    _side_by_side,
    _SparseSgd,
    draw_examples,
)

Head = dict[str, Tensor]

# (user, item) pairs whose hidden units are held at a time when all items are scored.
SCORE_PAIRS = 65_536
# A decay below this is over.
NEGLIGIBLE = 1e-12
# Of refit_users: large, since the best step is kept.
REFIT_RATE = 0.05


def init_head(
    n_factors: int,
    *,
    hidden: Sequence[int] = (8, 8),
    streams: Streams,
    device: torch.device | None = None,
) -> Head:
    """Draw the server's first head.

    Weights are uniform in ±sqrt(6 / inputs), which keeps the scale of signals through ReLU;
    biases are zero.

    Parameters
    ----------
    n_factors : int
        Of a user vector, d.
    hidden : sequence of int, default=(8, 8)
        Units of each hidden layer.
    streams : Streams
        The stream ``"ncf_head"`` is used.
    device : torch.device, optional
        Default: CPU. The numbers are the same on every device.

    Returns
    -------
    dict of Tensor
        ``weight_k`` of shape (inputs, outputs) and ``bias_k`` of shape (outputs,), k = 0, 1, ...

    Examples
    --------
    >>> from fedrecsk.engine.streams import Streams
    >>> from fedrecsk.models.ncf import init_head
    >>> {name: tuple(value.shape) for name, value in init_head(16, streams=Streams(0)).items()}
    {'weight_0': (32, 8), 'bias_0': (8,), 'weight_1': (8, 8), 'bias_1': (8,),
     'weight_2': (8, 1), 'bias_2': (1,)}
    """
    generator = streams.torch("ncf_head")
    head: Head = {}
    for number, (inputs, outputs) in enumerate(pairwise([2 * n_factors, *hidden, 1])):
        uniform = 2.0 * torch.rand(inputs, outputs, generator=generator) - 1.0
        head[f"weight_{number}"] = (math.sqrt(6.0 / inputs) * uniform).to(device)
        head[f"bias_{number}"] = torch.zeros(outputs, device=device)
    return head


def flat_head(head: Mapping[str, Tensor]) -> Tensor:
    """Put a head's weights into one vector (P,); `head_of` takes them out again."""
    parts = [part.reshape(-1) for layer in _layers(head) for part in layer]
    return torch.cat(parts) if parts else torch.zeros(0)


def head_of(flat: Tensor, n_factors: int, hidden: Sequence[int] = (8, 8)) -> Head:
    """Take a head out of the vector of its weights; the empty head out of an empty one.

    Examples
    --------
    >>> from fedrecsk.engine.streams import Streams
    >>> from fedrecsk.models.ncf import flat_head, head_of, init_head
    >>> head = init_head(4, streams=Streams(0))
    >>> again = head_of(flat_head(head), 4)
    >>> all(bool((again[name] == head[name]).all()) for name in head)
    True
    """
    if not len(flat):
        return {}
    like: Head = {}
    for number, (inputs, outputs) in enumerate(pairwise([2 * n_factors, *hidden, 1])):
        like[f"weight_{number}"] = flat.new_empty(inputs, outputs)
        like[f"bias_{number}"] = flat.new_empty(outputs)
    return {name: value[0] for name, value in _stacked(flat[None], like).items()}


def score_items(
    user_vectors: Tensor, item_table: Tensor, head: Mapping[str, Tensor], *, item_bias: bool
) -> Tensor:
    """Score every item for every user.

    The first layer is linear in user and item, so each part is computed once; only the hidden
    units of a bounded number of pairs exist at a time.

    Parameters
    ----------
    user_vectors : Tensor of shape (n, d)
    item_table : Tensor of shape (m, d) or (m, d + 1)
        With the item bias as the last column if `item_bias`.
    head : mapping of name to Tensor
        One head, without client axis.
    item_bias : bool

    Returns
    -------
    Tensor of shape (n, m)
        Logits.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.ncf import score_items
    >>> head = {"weight_0": torch.tensor([[1.0], [2.0]]), "bias_0": torch.tensor([0.5])}
    >>> users, items = torch.tensor([[1.0], [10.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    >>> score_items(users, items, head, item_bias=False)
    tensor([[ 3.5000,  5.5000,  7.5000],
            [12.5000, 14.5000, 16.5000]])
    """
    layers = _layers(head)
    width = user_vectors.shape[1]
    from_users = _user_part(user_vectors, layers)
    from_items = _item_part(item_table, layers, width)
    scores = from_users.new_empty(len(user_vectors), len(item_table))
    items_at_once = max(1, min(len(item_table), SCORE_PAIRS))
    users_at_once = max(1, SCORE_PAIRS // items_at_once)
    for i in range(0, len(user_vectors), users_at_once):
        users = from_users[i : i + users_at_once, None]
        for j in range(0, len(item_table), items_at_once):
            logit = _forward(users + from_items[j : j + items_at_once], layers)[1]
            scores[i : i + users_at_once, j : j + items_at_once] = logit
    if item_bias:
        scores += item_table[:, width]
    return scores


def score_pairs(
    user_vectors: Tensor, item_rows: Tensor, head: Mapping[str, Tensor], *, item_bias: bool
) -> Tensor:
    """Score one item for each user.

    Parameters
    ----------
    user_vectors : Tensor of shape (n, d)
    item_rows : Tensor of shape (n, d) or (n, d + 1)
        The row of the item table that belongs to each pair.
    head, item_bias
        As in `score_items`.

    Returns
    -------
    Tensor of shape (n,)
        Logits.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.ncf import score_pairs
    >>> head = {"weight_0": torch.tensor([[1.0], [2.0]]), "bias_0": torch.tensor([0.5])}
    >>> users, rows = torch.tensor([[1.0], [10.0]]), torch.tensor([[1.0, 100.0], [2.0, 200.0]])
    >>> score_pairs(users, rows, head, item_bias=True)
    tensor([103.5000, 214.5000])
    """
    layers = _layers(head)
    width = user_vectors.shape[1]
    first = _user_part(user_vectors, layers) + _item_part(item_rows, layers, width)
    logit = _forward(first, layers)[1]
    return logit + item_rows[:, width] if item_bias else logit


def train(
    cohort: Cohort,
    user_vectors: Tensor,
    item_table: Tensor,
    head: Mapping[str, Tensor],
    *,
    item_bias: bool,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    key: int,
) -> tuple[LocalResult, Head]:
    """Train all clients of a cohort on their own examples, from the server's table and head.

    Parameters
    ----------
    cohort : Cohort
        C clients with U users. The fast path wants one user a client and clients by ascending
        size, as `ClientShards.chunks` gives them.
    user_vectors : Tensor of shape (U, d)
        The users' vectors before training.
    item_table : Tensor of shape (n_items, d) or (n_items, d + 1)
        With the item bias as the last column if `item_bias`.
    head : mapping of name to Tensor
        The server's head, without client axis, see `init_head`.
    item_bias : bool
    n_negatives : int
        Negatives per positive, drawn anew each round.
    batch_size : int or None
        Examples per local step; None for all of a client's.
    local_epochs : int
    optimizer : Optimizer
        Momentum and Adam move all that a client holds in each of its steps, as torch's own do.
    l2 : float
        Penalty per example, see the module's head.
    key : int
        Of the round.

    Returns
    -------
    result : LocalResult
    heads : dict of Tensor of shape (C, ...)
        Each client's own head after training.
    """
    examples = draw_examples(
        cohort, len(item_table), n_negatives=n_negatives, batch_size=batch_size, key=key
    )
    fits = cohort.single_user and bool((np.diff(cohort.counts) >= 0).all())
    path = _train_fused if fits and _drifts_smoothly(optimizer) else _train_pooled
    return path(
        cohort,
        examples,
        user_vectors,
        item_table,
        head,
        item_bias=item_bias,
        local_epochs=local_epochs,
        optimizer=optimizer,
        l2=l2,
    )


# The network, for one head or a stack of them ---------------------------------------------------

Layers = list[tuple[Tensor, Tensor]]


def _layers(head: Mapping[str, Tensor]) -> Layers:
    """Return the weights (..., in, out) and biases (..., out) in order."""
    return [(head[f"weight_{k}"], head[f"bias_{k}"]) for k in range(len(head) // 2)]


def _product(values: Tensor, weight: Tensor) -> Tensor:
    """Multiply by the weights of one head (in, out), or of each client's own (c, in, out)."""
    # A client's batches are small, and `matmul` spends as long on looking as on multiplying.
    return torch.bmm(values, weight) if weight.dim() == 3 else values @ weight


def _user_part(user: Tensor, layers: Layers) -> Tensor:
    """Return what users (..., n, d) bring into the first layer, with its bias: (..., n, h)."""
    weight, bias = layers[0]
    return _product(user, weight[..., : user.shape[-1], :]) + bias[..., None, :]


def _item_part(item: Tensor, layers: Layers, width: int) -> Tensor:
    """Return what items (..., n, d or d + 1) bring into the first layer: (..., n, h)."""
    return _product(item[..., :width], layers[0][0][..., width:, :])


def _forward(first: Tensor, layers: Layers) -> tuple[list[Tensor], Tensor]:
    """Return all hidden units (..., n, h) and the logits (..., n) from the first layer's sums.

    `first` is overwritten.
    """
    hidden, sums = [], first
    for weight, bias in layers[1:]:
        hidden.append(sums.relu_())
        sums = _product(hidden[-1], weight)
        sums += bias[..., None, :]
    return hidden, sums[..., 0]


def _backward(error: Tensor, hidden: list[Tensor], layers: Layers) -> list[Tensor]:
    """Return the loss's gradient by each layer's sums (..., n, h), given that by the logits."""
    sums = [error[..., None]]
    for (weight, _), units in zip(reversed(layers[1:]), reversed(hidden), strict=True):
        # ReLU's slope, 0 or 1, is the sign of what it gave.
        sums.append(_product(sums[-1], weight.mT).mul_(units.sign()))
    return sums[::-1]


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients of all clients' losses in one mini-batch.

    Attributes
    ----------
    user : Tensor of shape (c, n, d), or (c, 1, d) for one user a client
    item : Tensor of shape (c, n, d or d + 1)
    head : Tensor of shape (c, P)
        Laid out as `flat_head`.
    logit : Tensor of shape (c, n)
    """

    user: Tensor
    item: Tensor
    head: Tensor
    logit: Tensor


def _gradients(
    user: Tensor,
    item: Tensor,
    heads: Mapping[str, Tensor],
    label: Tensor,
    weight: Tensor,
    *,
    item_bias: bool,
    l2: float,
    out: Tensor | None = None,
) -> _Gradients:
    """Differentiate the clients' losses on examples (c, n) that count by `weight`.

    user: (c, n, d), or (c, 1, d) where a client's examples share their user; item: (c, n, d or
    d + 1); label and weight broadcast to (c, n). The items' gradient goes to `out`.
    """
    layers, width, shared = _layers(heads), user.shape[2], user.shape[1] == 1
    hidden, logit = _forward(_item_part(item, layers, width) + _user_part(user, layers), layers)
    if item_bias:
        logit = logit + item[:, :, width]
    error = (torch.sigmoid(logit) - label).mul_(weight)
    sums = _backward(error, hidden, layers)

    by_user = sums[0].sum(1, keepdim=True) if shared else sums[0]
    first = layers[0][0]
    user_grad = torch.bmm(by_user, first[:, :width].mT)
    # An item bias does not enter the first layer: a row of zeros for it leaves items in one piece.
    by_items = pad(first[:, width:], (0, 0, 0, item.shape[2] - width))
    item_grad = torch.bmm(sums[0], by_items.mT, out=torch.empty_like(item) if out is None else out)
    if item_bias:
        item_grad[:, :, width] = error
    if l2:
        share = weight.sum(1, keepdim=True) if shared else weight
        user_grad += l2 * share[:, :, None] * user
        item_grad.addcmul_(item, weight[:, :, None], value=l2)
    # The products are this way round, and transposed after, because it is twice as fast.
    first_grad = [torch.bmm(by_user.mT, user), torch.bmm(sums[0].mT, item[:, :, :width])]
    parts = [torch.cat(first_grad, dim=2).mT, sums[0].sum(1)]
    for units, by_sums in zip(hidden, sums[1:], strict=True):
        parts += [torch.bmm(units.mT, by_sums), by_sums.sum(1)]
    return _Gradients(user_grad, item_grad, torch.cat([p.flatten(1) for p in parts], 1), logit)


def _stacked(flat: Tensor, head: Mapping[str, Tensor]) -> Head:
    """View clients' flat heads (C, P) as heads (C, ...) of the shapes of `head`."""
    names = [f"{kind}_{k}" for k in range(len(head) // 2) for kind in ("weight", "bias")]
    parts = torch.split(flat, [head[name].numel() for name in names], dim=1)
    return {
        name: part.reshape(-1, *head[name].shape) for name, part in zip(names, parts, strict=True)
    }


# One user a client ------------------------------------------------------------------------------


def _train_fused(
    cohort: Cohort,
    examples: LocalExamples,
    user_vectors: Tensor,
    item_table: Tensor,
    head: Mapping[str, Tensor],
    *,
    item_bias: bool,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
) -> tuple[LocalResult, Head]:
    """One user a client: batched products over contiguous private rows, each read once an epoch."""
    width, fan = user_vectors.shape[1], examples.items.shape[1]
    rows = _PrivateRows.of(cohort, examples, item_table, local_epochs, optimizer)
    parts = rows.parts
    label = item_table.new_zeros(examples.per_batch, fan)
    label[:, 0] = 1.0
    label = label.reshape(-1)
    # All that moves at every step of a client, side by side: its user's vector and its head.
    own = torch.cat([user_vectors, flat_head(head).expand(cohort.n_users, -1)], dim=1)
    moments = init_moments({"own": own}, optimizer)
    # Updated in place, so that the parts' views of it last.
    views = [(own[p.first :, None, :width], _stacked(own[p.first :, width:], head)) for p in parts]
    own_grad = torch.zeros_like(own)
    number = torch.arange(cohort.n_users, device=own.device)
    losses = own.new_zeros(cohort.n_users)
    for epoch in range(local_epochs):
        for part, (users, heads) in zip(parts, views, strict=True):
            target = label[: part.mask.shape[1]]
            found = _gradients(
                users,
                part.block,
                heads,
                target,
                part.weight,
                item_bias=item_bias,
                l2=l2,
                out=part.scratch[0],
            )
            if epoch == 0:
                loss = softplus(found.logit) - target * found.logit
                losses[part.first :] += (loss * part.mask).sum(1)
            part.move(found.item, epoch)
            own_grad[part.first :, :width] = found.user[:, 0]
            own_grad[part.first :, width:] = found.head
            moved, moments = apply_gradients(
                {"own": own}, {"own": own_grad}, moments, number >= part.first, optimizer
            )
            own.copy_(moved["own"])
    n_examples = losses.new_zeros(cohort.n_users)
    n_examples.index_add_(0, cohort.row_user, examples.valid.sum(1).to(losses.dtype))
    result = LocalResult(
        user_vectors=own[:, :width],
        row_items=rows.items,
        row_clients=rows.clients,
        row_values=rows.values,
        row_valid=rows.valid,
        losses=losses,
        n_examples=n_examples,
        item_table=item_table,
    )
    return result, _stacked(own[:, width:], head)


@dataclass(frozen=True, eq=False)
class _PrivateRows:
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
    ) -> _PrivateRows:
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
        See `_drift`.
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
        moves = _drift(steps.made(), steps.until_next(), optimizer)
        return cls(
            first=first,
            block=block,
            mask=mask,
            weight=mask / mask.sum(1, keepdim=True),
            mean=torch.zeros_like(block if optimizer.name != "sgd" else block[:0]),
            square=torch.zeros_like(block if optimizer.name == "adam" else block[:0]),
            keep=torch.from_numpy(keep).to(block)[..., None, None],
            moves=torch.from_numpy(moves).to(block)[..., None, None],
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


def _drifts_smoothly(optimizer: Optimizer) -> bool:
    """Tell whether `_drift` is exact: Adam's second moment must change slowly."""
    return optimizer.name != "adam" or optimizer.betas[1] >= 0.99


def _drift(
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


# Any number of users a client -------------------------------------------------------------------


def _train_pooled(
    cohort: Cohort,
    examples: LocalExamples,
    user_vectors: Tensor,
    item_table: Tensor,
    head: Mapping[str, Tensor],
    *,
    item_bias: bool,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
) -> tuple[LocalResult, Head]:
    """Any number of users a client: gather a mini-batch, client by client, and scatter back."""
    n_items, n_clients = len(item_table), len(cohort.clients)
    batches, pairs = _batches(cohort, examples, n_items, item_table.dtype)
    row_items, row_clients = pairs % n_items, pairs // n_items
    rows, users = item_table.index_select(0, row_items), user_vectors.clone()
    trainable = users.new_ones(users.shape[1])
    apply = (
        _SparseSgd(users, rows, trainable, optimizer.learning_rate)
        if optimizer.name == "sgd"
        else _DenseUpdate(users, rows, trainable, cohort.owner, row_clients, n_clients, optimizer)
    )
    own = {"head": flat_head(head).repeat(n_clients, 1)}
    moments = init_moments(own, optimizer)
    losses = rows.new_zeros(n_clients)
    for epoch in range(local_epochs):
        for batch in batches:
            found = _gradients(
                batch.padded(apply.users.index_select(0, batch.user)),
                batch.padded(apply.rows.index_select(0, batch.row)),
                _stacked(own["head"], head),
                batch.label,
                batch.weight,
                item_bias=item_bias,
                l2=l2,
            )
            if epoch == 0:
                loss = softplus(found.logit) - batch.label * found.logit
                losses += (loss * (batch.weight > 0)).sum(1)
            user_grad, item_grad = (
                grad.flatten(0, 1).index_select(0, batch.place) for grad in (found.user, found.item)
            )
            apply.step(batch.user, batch.row, batch.client, user_grad, item_grad)
            active = batch.weight.sum(1) > 0
            own, moments = apply_gradients(own, {"head": found.head}, moments, active, optimizer)
    n_examples = losses.new_zeros(n_clients)
    n_examples.index_add_(
        0, cohort.owner[cohort.row_user], examples.valid.sum(1).to(n_examples.dtype)
    )
    result = LocalResult(
        user_vectors=apply.users,
        row_items=row_items,
        row_clients=row_clients,
        row_values=apply.rows,
        row_valid=torch.ones_like(row_items, dtype=torch.bool),
        losses=losses,
        n_examples=n_examples,
        item_table=item_table,
    )
    return result, _stacked(own["head"], head)


@dataclass(frozen=True, eq=False)
class _Batch:
    """The examples of the mini-batches with one number, flat and in a padded layout.

    Attributes
    ----------
    user, row, client : Tensor of shape (L,), int64
        Positions of each example's user, private row and client.
    place : Tensor of shape (L,), int64
        Its place in the layout (C, n), counted through.
    label, weight : Tensor of shape (C, n)
        The weight is zero for padding.
    """

    user: Tensor
    row: Tensor
    client: Tensor
    place: Tensor
    label: Tensor
    weight: Tensor

    def padded(self, values: Tensor) -> Tensor:
        """Lay out values (L, d) of the examples as (C, n, d)."""
        out = values.new_zeros(self.weight.numel(), values.shape[1])
        return out.index_copy_(0, self.place, values).reshape(*self.weight.shape, -1)


def _batches(
    cohort: Cohort, examples: LocalExamples, n_items: int, dtype: torch.dtype
) -> tuple[list[_Batch], Tensor]:
    """Deal a cohort's examples into its local steps.

    Returns the batches, and of each private row ``client * n_items + item``.
    """
    n_clients, fan = len(cohort.clients), examples.items.shape[1]
    keep = examples.valid.reshape(-1)
    item = examples.items.reshape(-1)[keep]
    user = cohort.row_user.repeat_interleave(fan)[keep]
    owner = cohort.owner[user]
    number = examples.batch.repeat_interleave(fan)[keep]
    label = torch.zeros_like(examples.valid, dtype=dtype)
    label[:, 0] = 1.0
    label = label.reshape(-1)[keep]
    pairs, row = torch.unique(owner * n_items + item, return_inverse=True)
    # By step and then by client, so that a step is a slice and a client's examples follow
    # one another in it.
    group = number * n_clients + owner
    order = torch.argsort(group, stable=True)
    sizes = torch.bincount(group, minlength=examples.n_batches * n_clients)
    starts = sizes.cumsum(0) - sizes
    slot = torch.arange(len(order), device=order.device) - starts[group[order]]
    sizes = sizes.reshape(examples.n_batches, n_clients)
    ends = [0, *sizes.sum(1).cumsum(0).tolist()]
    batches = []
    for step, longest in enumerate(sizes.amax(1).tolist()):
        if not longest:  # a cohort without examples
            continue
        chosen = order[ends[step] : ends[step + 1]]
        client = owner[chosen]
        place = client * longest + slot[ends[step] : ends[step + 1]]
        layout = label.new_zeros(2, n_clients * longest)
        layout[0, place] = label[chosen]
        layout[1, place] = 1.0 / sizes[step, client].to(dtype)
        labels, weights = layout.reshape(2, n_clients, longest)
        batches.append(_Batch(user[chosen], row[chosen], client, place, labels, weights))
    return batches, pairs


# Users against a frozen model -------------------------------------------------------------------


def refit_users(
    cohort: Cohort,
    user_vectors: Tensor,
    item_table: Tensor,
    head: Mapping[str, Tensor],
    *,
    item_bias: bool,
    n_negatives: int,
    n_steps: int,
    l2: float,
    key: int,
) -> Tensor:
    """Fit each user's own vector to its own data against the frozen table and head.

    What a client does on its own device before inference; nothing is sent. Full-batch Adam at a
    rate of .05 on the mean loss of the user's examples; the problem is not convex, and the best
    vector seen on the way is kept, so a user's loss on its examples never rises.

    Parameters
    ----------
    cohort, user_vectors, item_table, head, item_bias, n_negatives, key
        As in `train`.
    n_steps : int
        Of Adam.
    l2 : float
        Penalty per example.

    Returns
    -------
    Tensor of shape (U, d)
        Users without rows keep their vectors.
    """
    examples = draw_examples(
        cohort, len(item_table), n_negatives=n_negatives, batch_size=None, key=key
    )
    layers, width = _layers(head), user_vectors.shape[1]
    items = cohort.padded(examples.items, 0).flatten(1)  # (U, n)
    mask = cohort.padded(examples.valid, False).flatten(1).to(item_table.dtype)
    weight = mask / mask.sum(1, keepdim=True).clamp_min(1)
    label = torch.zeros_like(mask)
    label[:, :: examples.items.shape[1]] = 1.0
    from_items = _item_part(item_table, layers, width)[items]  # (U, n, h)
    bias = item_table[:, width][items] if item_bias else torch.zeros_like(mask)
    active = torch.from_numpy(cohort.counts > 0).to(mask.device)
    to_user = layers[0][0][:width].mT

    current = {"user": user_vectors}
    moments = init_moments(current, optimizer := Optimizer("adam", REFIT_RATE))
    best, lowest = user_vectors.clone(), torch.full_like(user_vectors[:, 0], torch.inf)
    for _ in range(n_steps + 1):
        users = current["user"]
        hidden, logit = _forward(_user_part(users, layers)[:, None] + from_items, layers)
        logit = logit + bias
        loss = ((softplus(logit) - label * logit) * weight).sum(1) + l2 / 2 * users.square().sum(1)
        better = active & (loss < lowest)
        best, lowest = torch.where(better[:, None], users, best), torch.where(better, loss, lowest)
        error = (torch.sigmoid(logit) - label) * weight
        grad = _backward(error, hidden, layers)[0].sum(1) @ to_user + l2 * users
        current, moments = apply_gradients(current, {"user": grad}, moments, active, optimizer)
    return best
