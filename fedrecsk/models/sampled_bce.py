"""Matrix factorisation trained on sampled negatives with binary cross-entropy.

A client's private copy of the model is its users' vectors and one row for each distinct item
among its examples. For the examples (u, i, y) of a mini-batch, with s = u · v_i,

    loss = sum over the batch of  log(1 + exp(s)) - y s  +  l2/2 (|u|^2 + |v_i|^2),

and one step of an optimiser follows its gradient. The gradient has a closed form, e = σ(s) - y:
Σ e v_i for u and e u for v_i.

Two paths compute the same training. `_train_fused` serves the common case, one user a client and
plain SGD: a client's examples lie side by side, so every epoch is a few batched products over
private rows, without gathers, and updates them in place. `_train_pooled` serves any number of
users a client and any optimiser, over flat lists of examples.

An item bias is the last column of the item table; users then carry a constant 1 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device
from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments
from fedrecsk.engine.mixing import scatter_sum
from fedrecsk.engine.shards import Cohort
from fedrecsk.engine.streams import counter_uniform, derived_key
from fedrecsk.engine.uploads import Uploads

# A number so many times as large as the largest of the item table is a sign of divergence.
BROKEN = 1e3
# Up to so many user-item pairs for each negative, listing the unseen ones takes less time than a
# binary search for each negative.
LISTED = 8


@dataclass(frozen=True, eq=False)
class LocalExamples:
    """Positives of a cohort with their negatives.

    Attributes
    ----------
    items : Tensor of shape (n, 1 + n_negatives), int64
        A positive item and its negatives, row by row in the cohort's order of rows.
    valid : Tensor of the same shape, bool
        False where a user has too few unseen items left to draw from.
    batch : Tensor of shape (n,), int64
        Number of the local mini-batch that each row belongs to.
    slot : Tensor of shape (n,), int64
        Place of each row in its mini-batch.
    n_batches : int
        Mini-batches of the client with the most rows.
    per_batch : int
        Positives in a full mini-batch.
    """

    items: Tensor
    valid: Tensor
    batch: Tensor
    slot: Tensor
    n_batches: int
    per_batch: int


@dataclass(frozen=True, eq=False)
class LocalResult:
    """What the clients of a cohort hold after local training.

    Attributes
    ----------
    user_vectors : Tensor of shape (U, d)
    row_items : Tensor of shape (K,), int64
        Item of each private row; one row per (client, item).
    row_clients : Tensor of shape (K,), int64
        Position in ``cohort.clients`` of each private row's client.
    row_values : Tensor of shape (K, d or d + 1)
        Private rows after training.
    row_valid : Tensor of shape (K,), bool
        False for padding.
    losses : Tensor of shape (C,)
        Summed loss without the penalty over the examples, seen in the first epoch.
    n_examples : Tensor of shape (C,)
    item_table : Tensor of shape (n_items, d or d + 1)
        What the rows started from.
    """

    user_vectors: Tensor
    row_items: Tensor
    row_clients: Tensor
    row_values: Tensor
    row_valid: Tensor
    losses: Tensor
    n_examples: Tensor
    item_table: Tensor

    @property
    def row_delta(self) -> Tensor:
        """Change of each private row, shape (K, d or d + 1)."""
        return self.row_values - self.item_table.index_select(0, self.row_items)

    def broken(self, owner: Tensor, heads: Mapping[str, Tensor], bound: float) -> Tensor | None:
        """Tell which clients hold anything that is not finite, or larger than a bound.

        Parameters
        ----------
        owner : Tensor of shape (U,)
            Position of each user's client.
        heads : mapping of str to Tensor of shape (C, ...)
            What clients hold besides.
        bound : float

        Returns
        -------
        Tensor of shape (C,), bool, or None
            None where nobody does, which costs one pass over the rows.
        """
        held = [self.row_values, self.user_vectors, *heads.values()]
        if all(_within(values, bound) for values in held) and _within(self.losses, math.inf):
            return None
        out = ~self.losses.isfinite()
        out[self.row_clients[_beyond(self.row_values, bound) & self.row_valid]] = True
        out[owner[_beyond(self.user_vectors, bound)]] = True
        for values in heads.values():
            out |= _beyond(values, bound)
        return out

    def uploads(
        self, clients: NDArray[np.int64], row_weights: Tensor, numbers: Tensor, weights: Tensor
    ) -> Uploads:
        """Lay the changes of rows out, client by client, with what is sent besides.

        Parameters
        ----------
        clients : ndarray of shape (C,)
            Their codes.
        row_weights : Tensor of shape (K,)
        numbers : Tensor of shape (C, m)
        weights : Tensor of shape (C,)
        """
        valid = self.row_valid
        return Uploads(
            clients=clients,
            row_clients=self.row_clients[valid],
            row_items=self.row_items[valid],
            rows=self.row_delta[valid],
            row_weights=row_weights[valid],
            n_directions=self.row_values.shape[1],
            numbers=numbers,
            weights=weights,
        )

    def without(self, broken: Tensor, owner: Tensor, before: Tensor) -> LocalResult:
        """Return what is left if some clients, told by a mask (C,), had not taken part.

        Parameters
        ----------
        broken : Tensor of shape (C,), bool
        owner : Tensor of shape (U,)
        before : Tensor of shape (U, d)
            The users' vectors before training, which theirs keep.
        """
        rows = broken[self.row_clients]
        start = self.item_table.index_select(0, self.row_items)
        return replace(
            self,
            user_vectors=torch.where(broken[owner][:, None], before, self.user_vectors),
            row_values=torch.where(rows[:, None], start, self.row_values),
            row_valid=self.row_valid & ~rows,
            losses=self.losses.masked_fill(broken, 0.0),
            n_examples=self.n_examples.masked_fill(broken, 0),
        )


def _within(values: Tensor, bound: float) -> bool:
    """Tell whether all numbers are finite and none is larger than a bound."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return -bound <= float(low) and float(high) <= bound and math.isfinite(float(high - low))


def _beyond(values: Tensor, bound: float) -> Tensor:
    """Tell which of some tensors (n, ...) hold anything else."""
    return ~(values.abs().flatten(1).amax(1) <= bound)


def draw_examples(
    cohort: Cohort,
    n_items: int,
    *,
    n_negatives: int,
    batch_size: int | None,
    key: int,
) -> LocalExamples:
    """Draw negatives for every positive and deal the positives into mini-batches.

    Negatives of a user are distinct and never among its positives: the unseen items are cut
    into as many strata as negatives are wanted, turned by a random offset, and each stratum
    gives one. Every unseen item is drawn with equal probability.

    Parameters
    ----------
    cohort : Cohort
    n_items : int
    n_negatives : int
        Per positive.
    batch_size : int or None
        Examples in a local step; a positive stays with its negatives. None: all at once.
    key : int
        Of the round, see `Streams.key`.

    Returns
    -------
    examples : LocalExamples
        In the cohort's order of rows.
    """
    negatives, valid = _draw_negatives(cohort, n_items, n_negatives, key)
    items = torch.cat([cohort.items[None], negatives]).T.contiguous()
    keep = torch.cat([valid.new_ones(1, cohort.n_rows), valid]).T.contiguous()
    largest = max(1, int(cohort.client_rows.max(initial=0)))
    per_batch = largest if batch_size is None else max(1, batch_size // (1 + n_negatives))
    rank = _rank_in_client(cohort, derived_key(key, "shuffle"), shuffle=batch_size is not None)
    return LocalExamples(
        items=items,
        valid=keep,
        batch=rank // per_batch,
        slot=rank % per_batch,
        n_batches=-(-largest // per_batch),
        per_batch=per_batch,
    )


def _draw_negatives(
    cohort: Cohort, n_items: int, n_negatives: int, key: int
) -> tuple[Tensor, Tensor]:
    """Draw negatives (n_negatives, n) of every positive, and say which there are."""
    device = cohort.device
    # What is the same for all rows of a user is worked out once for each, (U,).
    counts = cohort.sizes
    left = n_items - counts
    strata = torch.minimum(counts * n_negatives, left)
    # Strata of equal size, the first ones with one item more where it does not come out even.
    sizes = left // strata.clamp_min(1)
    offset = (counter_uniform(derived_key(key, "offset"), cohort.users) * left).long()

    def of_rows(values: Tensor) -> Tensor:
        return values.index_select(0, cohort.row_user)  # (n,)

    # Rows are the last axis: with a handful of negatives there, each would be a loop of its own.
    column = torch.arange(n_negatives, device=device)[:, None]
    # Neighbouring strata go to different positives, so that a mini-batch spans the catalogue.
    # In place where nobody else holds the tensor: fresh memory costs more than the arithmetic.
    stratum = (column * of_rows(counts)).add_(cohort.position())  # (n_negatives, n)
    valid = stratum < of_rows(strata)
    size, larger, unseen = of_rows(sizes), of_rows(left - sizes * strata), of_rows(left)
    within = counter_uniform(derived_key(key, "negatives"), of_rows(cohort.users), stratum)
    within *= size + (stratum < larger)
    rank = torch.minimum(stratum, larger).add_(within.long()).add_(of_rows(offset))
    rank += stratum.mul_(size)  # where the stratum begins
    rank -= unseen * (rank >= unseen)
    return _unseen_item(cohort, rank, n_items, valid), valid


def _unseen_item(cohort: Cohort, rank: Tensor, n_items: int, valid: Tensor) -> Tensor:
    """Return the item that is number `rank` (m, n) among those the row's user has not seen.

    `rank` is overwritten.
    """
    starts = cohort.offsets()[:-1]
    if cohort.device.type == "cpu" and cohort.n_users * n_items <= LISTED * rank.numel():
        # Listing what the users have not seen takes less than that many searches. Not on a GPU,
        # which would be waited for: how long the list is depends on its values.
        seen = cohort.row_user * n_items + cohort.items
        unseen = torch.ones(cohort.n_users * n_items, dtype=torch.bool)
        unseen[seen] = False
        listed = torch.from_numpy(np.flatnonzero(unseen.numpy()))  # torch takes ten times as long
        base = torch.arange(cohort.n_users) * n_items  # of each user's items
        rank += (base - starts).index_select(0, cohort.row_user)
        rank.clamp_(max=max(len(listed) - 1, 0))  # ranks that are not valid may lie beyond
        if len(listed):
            rank = listed.index_select(0, rank.view(-1)).view(rank.shape)
        drawn = rank.sub_(base.index_select(0, cohort.row_user))
        return drawn if bool(valid.all()) else torch.where(valid, drawn, cohort.items)
    # With a user's items p_0 < p_1 < ..., unseen item number r is r + #{k : p_k - k <= r}.
    stride = n_items + 1
    shifted = cohort.items - cohort.position() + cohort.row_user * stride
    wanted = rank + cohort.row_user * stride
    below = torch.searchsorted(shifted, wanted, right=True)
    below -= starts.index_select(0, cohort.row_user)
    return torch.where(valid, rank + below, cohort.items)


def _rank_in_client(cohort: Cohort, key: int, *, shuffle: bool) -> Tensor:
    """Return each row's place (n,) among its client's rows, in a random order if `shuffle`."""
    owner = cohort.owner[cohort.row_user]
    order = torch.arange(cohort.n_rows, device=owner.device)
    if shuffle:
        chance = counter_uniform(key, cohort.users[cohort.row_user], cohort.items)
        order = _argsort(owner.to(torch.float64) + chance)
    per_client = owner.new_zeros(len(cohort.clients)).index_add_(0, cohort.owner, cohort.sizes)
    starts = per_client.cumsum(0) - per_client
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank - starts[owner]


def _argsort(values: Tensor) -> Tensor:
    """Sort numbers (n,) of which hardly any are equal, as a stable argsort does."""
    if values.device.type != "cpu":
        return torch.argsort(values, stable=True)
    order = np.argsort(values.numpy())  # a third of the time, but in no order of equal ones
    ascending = values.numpy()[order]
    if (ascending[1:] == ascending[:-1]).any():
        order = np.argsort(values.numpy(), kind="stable")
    return torch.from_numpy(order)


def train(
    cohort: Cohort,
    user_vectors: Tensor,
    item_table: Tensor,
    *,
    item_bias: bool,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    key: int,
) -> LocalResult:
    """Train all clients of a cohort on their own examples, from the server's table.

    Parameters
    ----------
    cohort : Cohort
        C clients with U users.
    user_vectors : Tensor of shape (U, d)
        The users' vectors before training.
    item_table : Tensor of shape (n_items, d) or (n_items, d + 1)
        With the item bias as the last column if `item_bias`.
    item_bias : bool
    n_negatives : int
        Negatives per positive, drawn anew each round.
    batch_size : int or None
        Examples per local step; None for all of a client's.
    local_epochs : int
    optimizer : Optimizer
    l2 : float
        Penalty per example, see the module's head.
    key : int
        Of the round.

    Returns
    -------
    LocalResult
    """
    examples = draw_examples(
        cohort, len(item_table), n_negatives=n_negatives, batch_size=batch_size, key=key
    )
    fits = cohort.single_user and bool((np.diff(cohort.counts) >= 0).all())
    path = _train_fused if fits and optimizer.name == "sgd" else _train_pooled
    return path(
        cohort,
        examples,
        user_vectors,
        item_table,
        item_bias=item_bias,
        local_epochs=local_epochs,
        optimizer=optimizer,
        l2=l2,
    )


def _train_fused(
    cohort: Cohort,
    examples: LocalExamples,
    user_vectors: Tensor,
    item_table: Tensor,
    *,
    item_bias: bool,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
) -> LocalResult:
    """One user a client, SGD: batched products over contiguous private rows."""
    rate, fan = optimizer.learning_rate, examples.items.shape[1]
    spans, place = _side_by_side(cohort, examples)
    n_places = spans[-1].stop if spans else 0
    row_items = examples.items.new_zeros(n_places, fan)
    row_items[place] = examples.items
    row_valid = examples.valid.new_zeros(n_places, fan)
    row_valid[place] = examples.valid
    row_clients = place.new_zeros(n_places)
    row_clients[place] = cohort.row_user
    row_items, row_valid = row_items.reshape(-1), row_valid.reshape(-1)
    rows = item_table.index_select(0, row_items)
    weight = row_valid.to(rows.dtype)
    parts = [
        (
            span.first,
            weight[span.start * fan : span.stop * fan].reshape(-1, span.longest * fan),
            rows[span.start * fan : span.stop * fan].reshape(-1, span.longest * fan, rows.shape[1]),
        )
        for span in spans
    ]
    label = item_table.new_zeros(examples.per_batch, fan)
    label[:, 0] = 1.0
    label = label.reshape(-1)
    users, trainable = _with_constant(user_vectors, item_bias)
    losses = users.new_zeros(cohort.n_users)
    for epoch in range(local_epochs):
        for first, mask, block in parts:  # block: (c, b, width), a view of rows
            vec, target = users[first:], label[: mask.shape[1]]  # (c, width), a view, and (b,)
            # (c, b); as vectors times transposed rows, a sixth of rows times vectors.
            score = torch.bmm(vec[:, None, :], block.mT)[:, 0]
            error = (torch.sigmoid(score) - target).mul_(mask)
            if epoch == 0:
                loss = torch.nn.functional.softplus(score) - target * score
                losses[first:] += (loss * mask).sum(1)
            grad = torch.bmm(error[:, None, :], block)[:, 0]
            if l2:
                grad = grad + l2 * mask.sum(1, keepdim=True) * vec
                block.mul_(1.0 - rate * l2 * mask[:, :, None])
            block.addcmul_(error[:, :, None], vec[:, None, :], value=-rate)
            vec.sub_(grad * trainable, alpha=rate)
    n_examples = losses.new_zeros(cohort.n_users)
    n_examples.index_add_(0, cohort.row_user, examples.valid.sum(1).to(losses.dtype))
    return LocalResult(
        user_vectors=users[:, : user_vectors.shape[1]],
        row_items=row_items,
        row_clients=row_clients.repeat_interleave(fan),
        row_values=rows,
        row_valid=row_valid,
        losses=losses,
        n_examples=n_examples,
        item_table=item_table,
    )


@dataclass(frozen=True)
class _Span:
    """Where the mini-batches with one number lie, of the clients that have so many.

    Attributes
    ----------
    first : int
        Clients ascend by size, so those with a batch are the last ones; the first of them.
    longest : int
        Positives of each in the padded layout.
    start, stop : int
        Places of the positives, client by client.
    """

    first: int
    longest: int
    start: int
    stop: int


def _side_by_side(cohort: Cohort, examples: LocalExamples) -> tuple[list[_Span], Tensor]:
    """Lay out positives so that every local step is a slice; return the place (n,) of each.

    A private row belongs to exactly one mini-batch, so the rows of a step lie together and are
    updated in place through all epochs.
    """
    most = int(cohort.counts.max(initial=0))
    spans, stop = [], 0
    for number in range(-(-most // examples.per_batch)):
        start, done = stop, number * examples.per_batch
        first = int(np.searchsorted(cohort.counts, done, side="right"))
        longest = min(examples.per_batch, most - done)
        stop = start + (cohort.n_users - first) * longest
        spans.append(_Span(first, longest, start, stop))
    table = [(span.start, span.first, span.longest) for span in spans]
    layout = to_device(np.array(table, dtype=np.int64).reshape(-1, 3), cohort.device)
    start_of, first_of, longest_of = layout[examples.batch].unbind(1)
    return spans, start_of + (cohort.row_user - first_of) * longest_of + examples.slot


def _train_pooled(
    cohort: Cohort,
    examples: LocalExamples,
    user_vectors: Tensor,
    item_table: Tensor,
    *,
    item_bias: bool,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
) -> LocalResult:
    """Any number of users a client, any optimiser: flat lists of examples."""
    n_items, n_clients = len(item_table), len(cohort.clients)
    fan = examples.items.shape[1]
    # Flat examples in the order of their local step, so that a step is a slice.
    by_step = torch.argsort(examples.batch, stable=True)
    keep = examples.valid[by_step].reshape(-1)
    item = examples.items[by_step].reshape(-1)[keep]
    user = cohort.row_user[by_step].repeat_interleave(fan)[keep]
    label = torch.zeros_like(examples.valid, dtype=item_table.dtype)
    label[:, 0] = 1.0
    label = label.reshape(-1)[keep]
    owner = cohort.owner[user]
    pairs, row = torch.unique(owner * n_items + item, return_inverse=True)
    row_items, row_clients = pairs % n_items, pairs // n_items
    sizes = examples.valid.sum(1)[by_step]
    per_step = torch.zeros(examples.n_batches, dtype=torch.int64, device=item.device)
    per_step.index_add_(0, examples.batch[by_step], sizes)
    ends = [0, *per_step.cumsum(0).tolist()]
    steps = [slice(start, stop) for start, stop in pairwise(ends)]

    rows = item_table.index_select(0, row_items)
    users, trainable = _with_constant(user_vectors, item_bias)
    apply = (
        _SparseSgd(users, rows, trainable, optimizer.learning_rate)
        if optimizer.name == "sgd"
        else _DenseUpdate(users, rows, trainable, cohort.owner, row_clients, n_clients, optimizer)
    )
    losses = rows.new_zeros(n_clients)
    for epoch in range(local_epochs):
        for step in steps:
            i, u, y, client = row[step], user[step], label[step], owner[step]
            vec, block = apply.users.index_select(0, u), apply.rows.index_select(0, i)
            score = (vec * block).sum(1)
            error = (torch.sigmoid(score) - y)[:, None]
            if epoch == 0:
                loss = torch.nn.functional.softplus(score) - y * score
                losses += scatter_sum(loss[:, None], client, n_clients)[:, 0]
            apply.step(u, i, client, error * block + l2 * vec, error * vec + l2 * block)
    return LocalResult(
        user_vectors=apply.users[:, : user_vectors.shape[1]],
        row_items=row_items,
        row_clients=row_clients,
        row_values=apply.rows,
        row_valid=torch.ones_like(row_items, dtype=torch.bool),
        losses=losses,
        n_examples=torch.bincount(owner, minlength=n_clients).to(rows.dtype),
        item_table=item_table,
    )


class _SparseSgd:
    """Plain SGD moves only the users and rows of the mini-batch, in buffers it owns."""

    def __init__(self, users: Tensor, rows: Tensor, trainable: Tensor, rate: float) -> None:
        self.users, self.rows = users, rows
        self._trainable, self._rate = trainable, rate

    def step(
        self, user: Tensor, row: Tensor, client: Tensor, user_grad: Tensor, row_grad: Tensor
    ) -> None:
        """Descend by the gradients (L, width) of the examples (L,)."""
        for table, index, grad in (
            (self.users, user, user_grad * self._trainable),
            (self.rows, row, row_grad),
        ):
            if table.device.type == "cpu":
                table.index_add_(0, index, grad, alpha=-self._rate)
            else:  # a GPU's index_add_ adds in no fixed order
                table -= self._rate * scatter_sum(grad, index, len(table))


class _DenseUpdate:
    """Momentum and Adam move everything that a client with a mini-batch holds."""

    def __init__(
        self,
        users: Tensor,
        rows: Tensor,
        trainable: Tensor,
        user_clients: Tensor,
        row_clients: Tensor,
        n_clients: int,
        optimizer: Optimizer,
    ) -> None:
        self.users, self.rows = users, rows
        self._trainable, self._optimizer = trainable, optimizer
        self._owners = {"user": user_clients, "row": row_clients}
        self._n_clients = n_clients
        self._user_moments = init_moments({"user": users}, optimizer)
        self._row_moments = init_moments({"row": rows}, optimizer)

    def step(
        self, user: Tensor, row: Tensor, client: Tensor, user_grad: Tensor, row_grad: Tensor
    ) -> None:
        """Make one optimiser step by the gradients (L, width) of the examples (L,)."""
        active = torch.zeros(self._n_clients, dtype=torch.bool, device=client.device)
        active[client] = True
        grads = {
            "user": scatter_sum(user_grad, user, len(self.users)) * self._trainable,
            "row": scatter_sum(row_grad, row, len(self.rows)),
        }
        moved, self._user_moments = apply_gradients(
            {"user": self.users},
            grads,
            self._user_moments,
            active[self._owners["user"]],
            self._optimizer,
        )
        self.users = moved["user"]
        moved, self._row_moments = apply_gradients(
            {"row": self.rows},
            grads,
            self._row_moments,
            active[self._owners["row"]],
            self._optimizer,
        )
        self.rows = moved["row"]


def refit_users(
    cohort: Cohort,
    user_vectors: Tensor,
    item_table: Tensor,
    *,
    item_bias: bool,
    n_negatives: int,
    n_steps: int,
    l2: float,
    key: int,
) -> Tensor:
    """Fit each user's own vector to its own data against the frozen item table.

    What a client does on its own device before inference; nothing is sent. The problem is
    convex. Its curvature never exceeds that of the bound 1/4 on the logistic loss, so steps
    with this fixed matrix always descend, need one factorisation and no rate to choose.

    Parameters
    ----------
    cohort, user_vectors, item_table, item_bias, n_negatives, key
        As in `train`.
    n_steps : int
        Descent steps; 20 come close to the optimum.
    l2 : float
        Penalty per example.

    Returns
    -------
    Tensor of shape (U, d)
    """
    examples = draw_examples(
        cohort, len(item_table), n_negatives=n_negatives, batch_size=None, key=key
    )
    width = user_vectors.shape[1]
    fan = examples.items.shape[1]
    items = cohort.padded(examples.items, 0)
    mask = cohort.padded(examples.valid, False).reshape(cohort.n_users, -1).to(item_table.dtype)
    rows = item_table.index_select(0, items.reshape(-1))
    rows = rows.reshape(*mask.shape, item_table.shape[1])
    label = torch.zeros_like(mask)
    label[:, ::fan] = 1.0
    factors = rows[:, :, :width]
    bias = rows[:, :, width] if item_bias else torch.zeros_like(mask)
    # A penalty is needed for uniqueness: a user with fewer examples than factors has many fits.
    penalty = max(l2, 1e-3) * mask.sum(1)
    eye = torch.eye(width, dtype=rows.dtype, device=rows.device)
    bound = 0.25 * torch.bmm((factors * mask[:, :, None]).transpose(1, 2), factors)
    factor = torch.linalg.cholesky(bound + (penalty[:, None, None] + 1e-6) * eye)
    users = user_vectors.clone()
    for _ in range(n_steps):
        score = torch.bmm(users[:, None, :], factors.mT)[:, 0] + bias
        error = (torch.sigmoid(score) - label) * mask
        grad = torch.bmm(error[:, None, :], factors)[:, 0] + penalty[:, None] * users
        users = users - torch.cholesky_solve(grad[:, :, None], factor)[:, :, 0]
    return users


def with_constant(user_vectors: Tensor, item_bias: bool) -> Tensor:
    """Copy user vectors (U, d), with the constant 1 appended that meets an item bias."""
    if not item_bias:
        return user_vectors.clone()
    return torch.cat([user_vectors, user_vectors.new_ones(len(user_vectors), 1)], dim=1)


def _with_constant(user_vectors: Tensor, item_bias: bool) -> tuple[Tensor, Tensor]:
    """Append the constant of `with_constant`; the mask keeps it constant."""
    users = with_constant(user_vectors, item_bias)
    trainable = users.new_ones(users.shape[1])
    trainable[user_vectors.shape[1] :] = 0.0
    return users, trainable
