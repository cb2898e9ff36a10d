"""The models of a federation trained where all data lie in one place: what it is measured against.

Whole-data objective (`fedrecsk.models.whole_data`), alternating least squares:

    for each sweep:
        u <- the minimiser given V, for every user
        v <- the minimiser given U, for every item

Sampled negatives (`fedrecsk.models.sampled_bce`, `fedrecsk.models.ncf`):

    for each pass:
        draw negatives anew and shuffle the users
        for each batch of users:
            g <- gradient of the mean loss over all their examples
            one step of an optimiser along g: of V, of the head, and of these users' vectors

Yifan Hu, Yehuda Koren and Chris Volinsky (2008), "Collaborative Filtering for Implicit Feedback
Datasets", ICDM, for the first; Diederik Kingma and Jimmy Ba (2015), "Adam: A Method for Stochastic
Optimization", ICLR, for the usual optimiser of the second.

Models and losses are those of the federated methods, and so is the code: an item is solved for by
what solves a user, on the transposed data, and gradients are read off one local step of every
user. LightGCN propagates over the graph of a user and its items here too, not over that of all
users. An item that no user of a batch has among its examples has a gradient of zero, along which
Adam and momentum still move it; the vectors of users outside of the batch, and what the optimiser
remembers of them, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrecsk.engine.local import Moments, Optimizer, Params, apply_gradients, init_moments
from fedrecsk.engine.mixing import RowSums
from fedrecsk.engine.shards import ClientShards, Cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.models import ncf, sampled_bce, whole_data
from fedrecsk.models.head import Head
from fedrecsk.models.sampled_bce import LocalResult

# Length of the local step that gradients are read off: long, since the difference of two vectors
# that lie close together would be mostly rounding.
STRIDE = 1024.0

Logs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class CentralState:
    """A model between two passes over the data.

    Attributes
    ----------
    user_factors : Tensor of shape (n_users, d)
    item_table : Tensor of shape (n_items, d) or (n_items, d + 1)
        With the item bias as the last column where there is one.
    head : dict of Tensor
        See `fedrecsk.models.head`; empty for matrix factorisation.
    user_moments : Moments
        Of each user's vector.
    shared_moments : Moments
        Of the item table and the head, with a leading axis of one.
    passes : int
        Passes made.
    """

    user_factors: Tensor
    item_table: Tensor
    head: Head
    user_moments: Moments
    shared_moments: Moments
    passes: int

    @classmethod
    def start(
        cls,
        user_factors: Tensor,
        item_table: Tensor,
        head: Head,
        optimizer: Optimizer | None = None,
    ) -> CentralState:
        """Return the state before the first pass; alternating least squares has no optimiser."""
        optimizer = optimizer or Optimizer("sgd", 1.0)
        return cls(
            user_factors=user_factors,
            item_table=item_table,
            head=head,
            user_moments=init_moments({"user": user_factors}, optimizer),
            shared_moments=init_moments(_shared(item_table, head), optimizer),
            passes=0,
        )


def _shared(item_table: Tensor, head: Mapping[str, Tensor]) -> Params:
    """Put what all users share together, with the leading axis that optimisers expect."""
    return {name: value[None] for name, value in {"item": item_table, **head}.items()}


# Alternating least squares ----------------------------------------------------------------------


def whole_data_sweep(
    state: CentralState,
    by_user: ClientShards,
    by_item: ClientShards,
    *,
    unobserved_weight: float,
    penalty: whole_data.Penalty,
) -> tuple[CentralState, Logs]:
    """Solve all users exactly against the items, then all items against the users.

    Parameters
    ----------
    state : CentralState
        Not changed. The users' vectors are not read.
    by_user, by_item : ClientShards
        The data, and the data transposed: its users are the items and the other way round.
    unobserved_weight : float
    penalty : Penalty
        See `fedrecsk.models.whole_data`.

    Returns
    -------
    state : CentralState
    logs : dict
        The loss is that of the users' vectors before the items move, per interaction and without
        the penalty.
    """
    items = state.item_table
    gram = items.T @ items
    users = solved(by_user, items, unobserved_weight=unobserved_weight, penalty=penalty)
    loss = items.new_zeros(())
    for cohort in by_user.user_chunks(np.arange(by_user.n_clients)):
        chosen = users[cohort.users]
        loss += whole_data.user_sums(
            cohort, chosen, items, gram, unobserved_weight=unobserved_weight
        ).loss
    moved = solved(by_item, users, unobserved_weight=unobserved_weight, penalty=penalty)
    new = replace(state, user_factors=users, item_table=moved, passes=state.passes + 1)
    return new, {"loss": float(loss) / max(len(by_user.items), 1)}


def solved(
    shards: ClientShards,
    vectors: Tensor,
    *,
    unobserved_weight: float,
    penalty: whole_data.Penalty,
) -> Tensor:
    """Return the minimisers (n_users, d) of all users of the shards against vectors (n_items, d).

    Of transposed shards the users are the items; one without interactions has a vector of zeros.
    """
    gram = vectors.T @ vectors
    found = vectors.new_zeros(shards.n_users, vectors.shape[1])
    for cohort in shards.user_chunks(np.flatnonzero(shards.client_rows)):
        found[cohort.users] = whole_data.solve_users(
            cohort,
            vectors,
            gram,
            unobserved_weight=unobserved_weight,
            penalty=penalty,
            mean_rows=len(shards.items) / shards.n_users,
        )
    return whole_data.all_solved(found)


# Sampled negatives ------------------------------------------------------------------------------


def bce_pass(
    state: CentralState,
    by_user: ClientShards,
    t: int,
    *,
    streams: Streams,
    batch_users: int,
    item_bias: bool,
    n_negatives: int,
    n_graph_layers: int,
    item_propagation: bool = False,
    optimizer: Optimizer,
    l2: float,
) -> tuple[CentralState, Logs]:
    """Make one step of the optimiser for every batch of users, until all had their turn.

    Parameters
    ----------
    state : CentralState
        Not changed.
    by_user : ClientShards
        With one user a client.
    t : int
        Number of the pass, counted on where a fit goes on; it keys all random draws.
    streams : Streams
    batch_users : int
        Users in a step; the last batch may have fewer.
    item_bias, n_negatives, n_graph_layers, item_propagation, l2
        See `fedrecsk.models.ncf.train`.
    optimizer : Optimizer

    Returns
    -------
    state : CentralState
    logs : dict
        The loss is the mean over all examples, each seen before its step, without the penalty.
    """
    # Copies, which the steps of the pass then write into.
    state = replace(
        state,
        user_factors=state.user_factors.clone(),
        user_moments=_copied(state.user_moments),
        passes=state.passes + 1,
    )
    order = streams.numpy("batches", t).permutation(by_user.n_clients)
    loss, n_examples = state.item_table.new_zeros(()), state.item_table.new_zeros(())
    for start in range(0, len(order), batch_users):
        batch = order[start : start + batch_users]
        found = _gradients_of_batch(
            state,
            by_user.chunks(batch, rows_per_interaction=1 + n_negatives),
            item_bias=item_bias,
            n_negatives=n_negatives,
            n_graph_layers=n_graph_layers,
            item_propagation=item_propagation,
            l2=l2,
            key=streams.key("examples", t),
        )
        loss += found.loss
        n_examples += found.n_examples
        _move_users(state, found.users, found.user / found.n_examples, optimizer)
        shared = {name: value[None] / found.n_examples for name, value in found.shared.items()}
        everything = torch.ones(1, dtype=torch.bool, device=state.item_table.device)
        moved, moments = apply_gradients(
            _shared(state.item_table, state.head),
            shared,
            state.shared_moments,
            everything,
            optimizer,
        )
        state = replace(
            state,
            item_table=moved["item"][0],
            head={name: moved[name][0] for name in state.head},
            shared_moments=moments,
        )
    return state, {"loss": float(loss / n_examples.clamp_min(1))}


def _copied(moments: Moments) -> Moments:
    return Moments(
        first={name: value.clone() for name, value in moments.first.items()},
        second={name: value.clone() for name, value in moments.second.items()},
        steps=moments.steps.clone(),
    )


def _move_users(state: CentralState, users: Tensor, grad: Tensor, optimizer: Optimizer) -> None:
    """Step the vectors of some users (m,) by gradients (m, d), in place: others cost nothing."""
    held = state.user_moments
    own = Moments(
        first={name: value[users] for name, value in held.first.items()},
        second={name: value[users] for name, value in held.second.items()},
        steps=held.steps[users],
    )
    moved, own = apply_gradients(
        {"user": state.user_factors[users]},
        {"user": grad},
        own,
        torch.ones_like(users, dtype=torch.bool),
        optimizer,
    )
    state.user_factors[users] = moved["user"]
    held.steps[users] = own.steps
    for kept, new in ((held.first, own.first), (held.second, own.second)):
        for name, value in new.items():
            kept[name][users] = value


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Sums over the examples of a batch.

    Attributes
    ----------
    users : Tensor of shape (m,), int64
        Codes of the users of the batch.
    user : Tensor of shape (m, d)
        Gradient by their vectors.
    shared : dict of Tensor
        Gradients by the item table, ``item``, and by the head's weights.
    loss, n_examples : Tensor of shape ()
    """

    users: Tensor
    user: Tensor
    shared: dict[str, Tensor]
    loss: Tensor
    n_examples: Tensor


def _gradients_of_batch(
    state: CentralState,
    cohorts: Iterable[Cohort],
    *,
    item_bias: bool,
    n_negatives: int,
    n_graph_layers: int,
    item_propagation: bool,
    l2: float,
    key: int,
) -> _Gradients:
    """Add up the gradients of the summed loss over cohorts of one user a client."""
    table = state.item_table
    shared = {
        name: torch.zeros_like(value) for name, value in {"item": table, **state.head}.items()
    }
    users, by_user = [], []
    loss, n_examples = table.new_zeros(()), table.new_zeros(())
    for cohort in cohorts:
        start = state.user_factors[cohort.users]
        result, heads = _one_step(
            cohort,
            start,
            state,
            item_bias=item_bias,
            n_negatives=n_negatives,
            n_graph_layers=n_graph_layers,
            item_propagation=item_propagation,
            l2=l2,
            key=key,
        )
        # A network's local loss is the mean over a client's examples, the other one their sum.
        share = result.n_examples if state.head else torch.ones_like(result.n_examples)
        share = share / STRIDE
        sums = RowSums(result.row_items, len(table))
        weight = share[result.row_clients] * result.row_valid
        shared["item"] -= sums.add(result.row_delta, weight)
        for name, value in heads.items():
            shared[name] -= torch.tensordot(share, value - state.head[name], 1)
        users.append(cohort.users)
        by_user.append((start - result.user_vectors) * share[:, None])
        loss += result.losses.sum()
        n_examples += result.n_examples.sum()
    return _Gradients(torch.cat(users), torch.cat(by_user), shared, loss, n_examples)


def _one_step(
    cohort: Cohort,
    user_vectors: Tensor,
    state: CentralState,
    *,
    item_bias: bool,
    n_negatives: int,
    n_graph_layers: int,
    item_propagation: bool,
    l2: float,
    key: int,
) -> tuple[LocalResult, Head]:
    """Let every client make one step of plain descent over all its examples."""
    descent = Optimizer("sgd", STRIDE)
    if state.head:
        result, heads = ncf.train(
            cohort,
            user_vectors,
            state.item_table,
            [state.head],
            item_bias=item_bias,
            n_negatives=n_negatives,
            batch_size=None,
            local_epochs=1,
            optimizer=descent,
            l2=l2,
            key=key,
            n_graph_layers=n_graph_layers,
            item_propagation=item_propagation,
        )
        return result, heads[0]
    result = sampled_bce.train(
        cohort,
        user_vectors,
        state.item_table,
        item_bias=item_bias,
        n_negatives=n_negatives,
        batch_size=None,
        local_epochs=1,
        optimizer=descent,
        l2=l2,
        key=key,
    )
    return result, {}
