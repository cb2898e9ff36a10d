"""Neural collaborative filtering trained on sampled negatives, all clients of a cohort at once.

    logit(u, i) = MLP([u ; v_i])  (+ b_i with an item bias),   MLP: 2d -> 8 -> 8 -> 1 with ReLU.

A client's private copy of the model is its users' vectors, one row for each distinct item among
its examples, and its own head, the MLP (`head`). For the examples (u, i, y) of a mini-batch,

    loss = mean over the batch of  log(1 + exp(s)) - y s  +  l2/2 (|u|^2 + |v_i|^2)

with s = logit(u, i), and one step of an optimiser follows its gradient, written out by hand. The
mean, where matrix factorisation (`sampled_bce`) takes the sum: all examples of a batch share the
head, and a sum would make its steps grow with the batch. The head is not penalised. The examples
are those of `sampled_bce.draw_examples`. An item bias is the last column of the item table, as
there, and v_i in the penalty includes it.

Three things may be added. Several heads of ascending widths N_1 < ... < N_m = d: the loss is the
sum of log(1 + exp(s_j)) - y s_j over the heads, s_j from the first N_j columns of u and v_i, and
the penalty once. Graph layers: the MLP reads u and v_i after propagation over the user's ego graph
(`ego_graph`), of the user alone or of its items too, through which gradients flow back. A pull: the
frozen gradient of a regulariser of the whole table, (v - mean) @ matrix, moves every row of a
mini-batch once a step.

Two paths compute the same training. `_train_fused` serves one user a client. A private row is then
in exactly one mini-batch, so its gradient is zero but for one step of each epoch, and all moves
that momentum or Adam make of it until the next one are known at once (`private_rows`). A local
step is a few batched products over rows that lie side by side, and no other row is read or written.
`_train_pooled` serves any number of users a client, and gathers.

Xiangnan He, Lizi Liao, Hanwang Zhang, Liqiang Nie, Xia Hu and Tat-Seng Chua (2017), "Neural
Collaborative Filtering", WWW. Here without its product branch, as federated recommenders use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments
from fedrecsk.engine.shards import Cohort
from fedrecsk.models.ego_graph import (
    EgoGraphs,
    Propagation,
    StarsInList,
    StarsInRows,
    neighbourhoods,
)
from fedrecsk.models.head import (
    Head,
    Joint,
    backward,
    flat_head,
    forward,
    gradients,
    head_layers,
    head_width,
    item_part,
    stacked_heads,
    user_part,
)
from fedrecsk.models.private_rows import Own, PrivateRows, drifts_smoothly
from fedrecsk.models.sampled_bce import (
    LocalExamples,
    LocalResult,
    _DenseUpdate,
    _SparseSgd,
    draw_examples,
)

# (user, item) pairs whose hidden units are held at a time when all items are scored.
SCORE_PAIRS = 65_536
# Of refit_users: large, since the best step is kept.
REFIT_RATE = 0.05


def score_items(
    user_vectors: Tensor,
    item_table: Tensor,
    head: Mapping[str, Tensor],
    *,
    item_bias: bool,
    n_graph_layers: int = 0,
    item_propagation: bool = False,
    positives: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Score every item for every user.

    The first layer is linear in user and item, so each part is computed once; only the hidden
    units of a bounded number of pairs exist at a time.

    A head that is narrower than the model scores the columns that it reads: pass these of the
    vectors and of the table, with the column of the item bias.

    Parameters
    ----------
    user_vectors : Tensor of shape (n, d)
    item_table : Tensor of shape (m, d) or (m, d + 1)
        With the item bias as the last column if `item_bias`.
    head : mapping of name to Tensor
        One head, without client axis.
    item_bias : bool
    n_graph_layers : int, default=0
        K, of the propagation over the users' ego graphs.
    item_propagation : bool, default=False
        Whether positives are propagated as well as users, see `fedrecsk.models.ego_graph`.
    positives : tuple of two Tensors of int64, optional
        The items of the ego graphs, with `n_graph_layers`: where each user's start, (n + 1,), and
        the items of all users one after another, (nnz,), without repetition within a user.

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
    layers, width = head_layers(head), user_vectors.shape[1]
    of_items = item_part(item_table, layers, width)
    gains = None
    if n_graph_layers:
        if positives is None:
            raise ValueError("Scores over graph layers need positives=(indptr, indices).")
        graphs = EgoGraphs.of(
            user_vectors,
            item_table,
            *positives,
            n_layers=n_graph_layers,
            items=item_propagation,
        )
        user_vectors, of_items = graphs.users, graphs.item * of_items
        gains = None if graphs.gains is None else item_part(graphs.gains, layers, width)
    of_users = user_part(user_vectors, layers)
    scores = of_users.new_empty(len(user_vectors), len(item_table))
    items_at_once = max(1, min(len(item_table), SCORE_PAIRS))
    users_at_once = max(1, SCORE_PAIRS // items_at_once)
    for i in range(0, len(user_vectors), users_at_once):
        users = of_users[i : i + users_at_once, None]
        for j in range(0, len(item_table), items_at_once):
            first = users + of_items[j : j + items_at_once]
            if gains is not None and positives is not None:
                user, item = _pairs_within(positives, i, j, first.shape[:2])
                first[user, item] += gains[i + user]
            scores[i : i + users_at_once, j : j + items_at_once] = forward(first, layers)[1][..., 0]
    if item_bias:
        scores += item_table[:, width]
    return scores


def _pairs_within(
    positives: tuple[Tensor, Tensor], i: int, j: int, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the positives in a rectangle of users from i and items from j, counted from there."""
    indptr, indices = positives
    ends = indptr[i : i + shape[0] + 1]
    item = indices[int(ends[0]) : int(ends[-1])] - j
    user = torch.arange(shape[0], device=item.device).repeat_interleave(ends.diff())
    inside = (item >= 0) & (item < shape[1])
    return user[inside], item[inside]


def score_pairs(
    user_vectors: Tensor, item_rows: Tensor, head: Mapping[str, Tensor], *, item_bias: bool
) -> Tensor:
    """Score one item for each user.

    With graph layers, pass what `EgoGraphs.pairs` makes of users and rows.

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
    layers, width = head_layers(head), user_vectors.shape[1]
    first = user_part(user_vectors, layers) + item_part(item_rows, layers, width)
    logit = forward(first, layers)[1][..., 0]
    return logit + item_rows[:, width] if item_bias else logit


def train(
    cohort: Cohort,
    user_vectors: Tensor,
    item_table: Tensor,
    heads: Sequence[Mapping[str, Tensor]],
    *,
    item_bias: bool,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    key: int,
    n_graph_layers: int = 0,
    item_propagation: bool = False,
    pull: tuple[Tensor, Tensor] | None = None,
) -> tuple[LocalResult, list[Head]]:
    """Train all clients of a cohort on their own examples, from the server's table and heads.

    Parameters
    ----------
    cohort : Cohort
        C clients with U users. The fast path wants one user a client and clients by ascending
        size, as `ClientShards.chunks` gives them.
    user_vectors : Tensor of shape (U, d)
        The users' vectors before training.
    item_table : Tensor of shape (n_items, d) or (n_items, d + 1)
        With the item bias as the last column if `item_bias`.
    heads : sequence of mappings of name to Tensor
        The server's heads, without client axis, see `init_head`. Their widths ascend, the last one
        is d, and all have as many layers.
    item_bias : bool
        In the logit of every head.
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
    n_graph_layers : int, default=0
        K, of the propagation over each user's ego graph. From 1 on it needs ``batch_size=None``.
    item_propagation : bool, default=False
        Whether positives are propagated as well as users, see `fedrecsk.models.ego_graph`.
    pull : tuple of Tensors of shapes (d,) and (d, d), optional
        A mean and a matrix: the d factors v of every private row in a mini-batch get the additional
        gradient ``(v - mean) @ matrix``, once a step.

    Returns
    -------
    result : LocalResult
        Its losses are those of the last head.
    heads : list of dicts of Tensors of shape (C, ...)
        Each client's own heads after training.

    Raises
    ------
    ValueError
        If the heads do not fit the vectors or each other, or if graph layers meet mini-batches.
    """
    _check_heads(heads, user_vectors.shape[1])
    if n_graph_layers and batch_size is not None:
        raise ValueError(
            f"n_graph_layers={n_graph_layers} needs batch_size=None, found {batch_size}: a step "
            "propagates over all of a client's positives."
        )
    examples = draw_examples(
        cohort, len(item_table), n_negatives=n_negatives, batch_size=batch_size, key=key
    )
    fits = cohort.single_user and bool((np.diff(cohort.counts) >= 0).all())
    path = _train_fused if fits and drifts_smoothly(optimizer) else _train_pooled
    return path(
        cohort,
        examples,
        user_vectors,
        item_table,
        heads,
        item_bias=item_bias,
        local_epochs=local_epochs,
        optimizer=optimizer,
        l2=l2,
        graph=Propagation.of(n_graph_layers, items=item_propagation) if n_graph_layers else None,
        pull=None if pull is None else _Pull.of(*pull, item_table.shape[1]),
    )


def _check_heads(heads: Sequence[Mapping[str, Tensor]], n_factors: int) -> None:
    """Refuse heads that are not nested in user vectors of `n_factors`."""
    widths = [head_width(head) for head in heads]
    if not widths or widths != sorted(set(widths)) or widths[-1] != n_factors:
        raise ValueError(
            f"The widths of heads must ascend up to the {n_factors} columns of the user vectors, "
            f"found {widths}."
        )
    if len({len(head) for head in heads}) > 1:
        raise ValueError("All heads must have the same number of layers.")


# Terms of the loss beside the network's ---------------------------------------------------------


def _penalise(
    l2: float,
    user_grad: Tensor,
    user: Tensor,
    share: Tensor,
    item_grad: Tensor,
    item: Tensor,
    weight: Tensor,
) -> None:
    """Add the penalty's gradients, of users that count by `share` and items by `weight`."""
    if l2:
        user_grad += l2 * share * user
        item_grad.addcmul_(item, weight, value=l2)


@dataclass(frozen=True, eq=False)
class _Pull:
    """The gradient ``v @ matrix + offset`` of every private row v; zero for an item bias.

    Attributes
    ----------
    offset : Tensor of shape (width,)
    matrix : Tensor of shape (width, width)
    """

    offset: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, mean: Tensor, matrix: Tensor, width: int) -> _Pull:
        """Write out ``(v - mean) @ matrix`` for rows of a given width."""
        rest = width - len(mean)
        return cls(pad(-(mean @ matrix), (0, rest)), pad(matrix, (0, rest, 0, rest)))

    def add(self, grad: Tensor, rows: Tensor, share: Tensor, work: Tensor) -> None:
        """Add it to the gradients (..., width) of rows, by a share (..., 1)."""
        flat = work.view(-1, work.shape[-1])
        torch.addmm(self.offset, rows.view(flat.shape), self.matrix, out=flat)
        grad.addcmul_(work, share)


# One user a client ------------------------------------------------------------------------------


def _train_fused(
    cohort: Cohort,
    examples: LocalExamples,
    user_vectors: Tensor,
    item_table: Tensor,
    heads: Sequence[Mapping[str, Tensor]],
    *,
    item_bias: bool,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    graph: Propagation | None = None,
    pull: _Pull | None = None,
) -> tuple[LocalResult, list[Head]]:
    """One user a client: batched products over contiguous private rows, each read once an epoch."""
    width, fan = user_vectors.shape[1], examples.items.shape[1]
    rows = PrivateRows.of(cohort, examples, item_table, local_epochs, optimizer)
    label = item_table.new_zeros(examples.per_batch, fan)
    label[:, 0] = 1.0
    label = label.reshape(-1)
    # All that moves at every step of a client, side by side: its user's vector and its heads.
    flat = torch.cat([flat_head(head) for head in heads])
    own = Own(torch.cat([user_vectors, flat.expand(cohort.n_users, -1)], dim=1), optimizer)
    users = own.values[:, None, :width]
    network, into = (Joint.of(held[:, width:], heads) for held in (own.values, own.grad))
    # Views, which last since all is updated in place.
    views = [
        (
            part,
            users[part.first :],
            network.last(part.first),
            into.last(part.first),
            None if graph is None else StarsInRows.of(part.mask, fan, graph),
        )
        for part in rows.parts
    ]
    losses = users.new_zeros(cohort.n_users)
    for epoch in range(local_epochs):
        for part, user, theirs, their_grad, stars in views:
            target = label[: part.mask.shape[1]]
            theirs.load()
            found = gradients(
                user,
                part.block,
                theirs.layers,
                target,
                part.weight,
                item_bias=item_bias,
                into=their_grad.layers,
                out=part.scratch[0],
                stars=stars,
            )
            their_grad.store()
            if epoch == 0:
                loss = softplus(found.logit) - target * found.logit
                losses[part.first :] += (loss * part.mask).sum(1)
            weight = part.weight[:, :, None]
            share = weight.sum(1, keepdim=True)
            _penalise(l2, found.user, user, share, found.item, part.block, weight)
            if pull is not None:
                pull.add(found.item, part.block, part.mask[:, :, None], part.scratch[1])
            part.move(found.item, epoch)
            own.grad[part.first :, :width] = found.user[:, 0]
            own.move(part.first)
    n_examples = losses.new_zeros(cohort.n_users)
    n_examples.index_add_(0, cohort.row_user, examples.valid.sum(1).to(losses.dtype))
    result = LocalResult(
        user_vectors=own.values[:, :width],
        row_items=rows.items,
        row_clients=rows.clients,
        row_values=rows.values,
        row_valid=rows.valid,
        losses=losses,
        n_examples=n_examples,
        item_table=item_table,
    )
    return result, stacked_heads(own.values[:, width:], heads)


# Any number of users a client -------------------------------------------------------------------


def _train_pooled(
    cohort: Cohort,
    examples: LocalExamples,
    user_vectors: Tensor,
    item_table: Tensor,
    heads: Sequence[Mapping[str, Tensor]],
    *,
    item_bias: bool,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    graph: Propagation | None = None,
    pull: _Pull | None = None,
) -> tuple[LocalResult, list[Head]]:
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
    own = torch.cat([flat_head(head) for head in heads]).repeat(n_clients, 1)
    own_grad = torch.zeros_like(own)
    network, into = Joint.of(own, heads), Joint.of(own_grad, heads)
    moments = init_moments({"own": own}, optimizer)
    graphs = [
        None
        if graph is None
        else StarsInList.of(batch.user, batch.flat(batch.label), len(users), graph)
        for batch in batches
    ]
    losses = rows.new_zeros(n_clients)
    for epoch in range(local_epochs):
        for batch, stars in zip(batches, graphs, strict=True):
            user = apply.users.index_select(0, batch.user)
            item = apply.rows.index_select(0, batch.row)
            inputs = (user, item) if stars is None else stars.forward(apply.users, item)
            network.load()
            found = gradients(
                batch.padded(inputs[0]),
                batch.padded(inputs[1]),
                network.layers,
                batch.label,
                batch.weight,
                item_bias=item_bias,
                into=into.layers,
            )
            into.store()
            if epoch == 0:
                loss = softplus(found.logit) - batch.label * found.logit
                losses += (loss * (batch.weight > 0)).sum(1)
            by_user, by_item = batch.flat(found.user), batch.flat(found.item)
            if stars is not None:
                by_user, by_item = stars.backward(by_user, by_item)
            weight = batch.flat(batch.weight)[:, None]
            _penalise(l2, by_user, user, weight, by_item, item, weight)
            if pull is not None:
                pull.add(by_item, item, batch.row_shares(), torch.empty_like(item))
            apply.step(batch.user, batch.row, batch.client, by_user, by_item)
            active = batch.weight.sum(1) > 0
            moved, moments = apply_gradients(
                {"own": own}, {"own": own_grad}, moments, active, optimizer
            )
            own.copy_(moved["own"])
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
    return result, stacked_heads(own, heads)


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

    def flat(self, values: Tensor) -> Tensor:
        """Take the values (L, ...) of the examples out of that layout (C, n, ...)."""
        return values.flatten(0, 1).index_select(0, self.place)

    def row_shares(self) -> Tensor:
        """Return the share (L, 1) of each example among those of its private row."""
        return 1.0 / torch.bincount(self.row)[self.row].to(self.weight.dtype)[:, None]


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
    n_graph_layers: int = 0,
    item_propagation: bool = False,
) -> Tensor:
    """Fit each user's own vector to its own data against the frozen table and head.

    What a client does on its own device before inference; nothing is sent. Full-batch Adam at a
    rate of .05 on the mean loss of the user's examples; the problem is not convex, and the best
    vector seen on the way is kept, so a user's loss on its examples never rises.

    Parameters
    ----------
    cohort, user_vectors, item_table, item_bias, n_negatives, key
        As in `train`.
    n_graph_layers, item_propagation
        As in `train`.
    head : mapping of name to Tensor
        One head, of the width of the vectors.
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
    layers, width, fan = head_layers(head), user_vectors.shape[1], examples.items.shape[1]
    items = cohort.padded(examples.items, 0).flatten(1)  # (U, n)
    mask = cohort.padded(examples.valid, False).flatten(1).to(item_table.dtype)
    weight = mask / mask.sum(1, keepdim=True).clamp_min(1)
    label = torch.zeros_like(mask)
    label[:, ::fan] = 1.0
    graph = Propagation.of(n_graph_layers, items=item_propagation)
    total, root = neighbourhoods(item_table[:, :width], cohort.offsets(), cohort.items)
    of_items = graph.item * item_part(item_table, layers, width)[items]  # (U, n, h)
    bias = item_table[:, width][items] if item_bias else torch.zeros_like(mask)
    active = torch.from_numpy(cohort.counts > 0).to(mask.device)
    to_user, to_item = layers[0][0][:width], layers[0][0][width:]

    current = {"user": user_vectors}
    moments = init_moments(current, optimizer := Optimizer("adam", REFIT_RATE))
    best, lowest = user_vectors.clone(), torch.full_like(user_vectors[:, 0], torch.inf)
    for _ in range(n_steps + 1):
        users = current["user"]
        moved, gains = graph.forward(users, total, root)
        first = of_items + user_part(moved, layers)[:, None]
        if gains is not None:
            first[:, ::fan] += (gains @ to_item)[:, None]
        hidden, logits = forward(first, layers)
        logit = logits[:, :, 0] + bias
        loss = ((softplus(logit) - label * logit) * weight).sum(1) + l2 / 2 * users.square().sum(1)
        better = active & (loss < lowest)
        best, lowest = torch.where(better[:, None], users, best), torch.where(better, loss, lowest)
        error = (torch.sigmoid(logit) - label) * weight
        sums = backward(error[:, :, None], hidden, layers)[0]
        by_gain = None if gains is None else sums[:, ::fan].sum(1) @ to_item.mT
        grad = graph.backward(sums.sum(1) @ to_user.mT, by_gain, root)[0] + l2 * users
        current, moments = apply_gradients(current, {"user": grad}, moments, active, optimizer)
    return best
