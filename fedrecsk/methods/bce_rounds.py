"""Rounds of a factor model on sampled negatives: gradient steps, and a mean of the changes.

    delegate k  <- u_k, V, and what is shared besides; local training, binary cross-entropy on its
                   interactions and drawn negatives
                   sends v_k - V of the rows that it touched
    server      <- V moves by the weighted mean over the delegates that touched a row
                   (newton: by the sum of their gradients over their curvature)

What delegates send is added up in `delegate_sums`. Special cases are arguments, see `fedfnn`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device
from fedrecsk.engine.local import Moments, Optimizer, apply_gradients
from fedrecsk.engine.mixing import mean_rows, weighted_mean
from fedrecsk.engine.parallel import fill_rows, own_part, shares
from fedrecsk.engine.privacy import Release
from fedrecsk.engine.shards import ClientShards, Cohort, counted_turns, written_users
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.traffic import dense_bytes, sparse_row_bytes
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import Uploads, UploadSums, as_sent
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.methods.delegate_sums import DelegateSums, uploads_of
from fedrecsk.methods.factor_state import (
    FactorState,
    Logs,
    counted_times,
    served_factors,
)
from fedrecsk.methods.noised_sums import released, sends_every_row
from fedrecsk.models import bce_newton, ncf, sampled_bce, whole_data
from fedrecsk.models.head import Head, lifted, n_weights, without

ItemWeighting = Literal["count", "magnitude", "interactions", "fedavg"]


def bce_step(
    state: FactorState,
    shards: ClientShards,
    delegates: NDArray[np.int64],
    t: int,
    *,
    streams: Streams,
    item_weighting: ItemWeighting,
    item_bias: bool,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    n_graph_layers: int = 0,
    item_propagation: bool = False,
    server_optimizer: Optimizer | None,
    forgetting: float | None = None,
    decay: float = 0.9,
    uplink: Uplink | None = None,
    in_place: bool = False,
) -> tuple[FactorState, Logs]:
    """Train the delegates with sampled-negative binary cross-entropy and aggregate.

    Parameters
    ----------
    state : FactorState
        Not changed, unless `in_place`.
    shards : ClientShards
    delegates : ndarray of int64
        Codes of the clients that take part.
    t : int
        Number of the round, counted on where a fit goes on; it keys all random draws.
    streams : Streams
    item_weighting : {"count", "magnitude", "interactions", "fedavg"}
        Weight of a client's row in the mean of those that touched it: 1, the L1 norm of its
        change, or the client's interactions. ``"fedavg"``: weights n_k / n_S over all delegates.
    item_bias, n_negatives, batch_size, local_epochs, optimizer, l2
        See `fedrecsk.models.sampled_bce.train`.
    n_graph_layers, item_propagation
        Of a network, see `fedrecsk.models.ncf.train`.
    server_optimizer : Optimizer or None
        Takes the aggregated change as a negative gradient; plain SGD at rate 1 adds it. None
        makes the quasi-Newton step of `fedrecsk.models.bce_newton` instead, for clients with
        one user, local SGD and no head.
    forgetting, decay : float
        Of the quasi-Newton step; None: a forgetting that follows from the participation,
        `whole_data.steady_rate`.
    uplink : Uplink, optional
        What happens to uploads before they are added up; None adds them as they come.
    in_place : bool, default=False
        Write what belongs to single users and clients into the tensors of `state`, which must not
        be read any more. Else all users are copied, also those who take no part.

    Returns
    -------
    state : FactorState
    logs : dict
        Numbers that the device knows are tensors of shape (), so that nobody waits for them.

    Raises
    ------
    NoUsableUploadError
        If what every delegate has learned is not finite, or far too large. On a GPU single
        delegates are looked at by an uplink alone.
    """
    table = state.item_table
    key = streams.key("examples", t)
    client_rows = shards.client_rows
    total_rows = float(max(client_rows[delegates].sum(), 1))
    trained: list[tuple[Tensor, Tensor]] = []
    newton = server_optimizer is None
    sums = DelegateSums(table, state.head, newton=newton)
    sent: list[tuple[Uploads, Tensor]] = []
    # A GPU would be waited for, unless somebody looks at single uploads anyway.
    looks = uplink is not None or table.device.type == "cpu"
    bound = sampled_bce.BROKEN * max(1.0, float(table.abs().max())) if looks else math.inf
    parts = shares(delegates, client_rows[delegates])
    for cohort in shards.chunks(own_part(parts), rows_per_interaction=1 + n_negatives):
        result, heads = _train(
            cohort,
            state,
            item_bias=item_bias,
            n_negatives=n_negatives,
            batch_size=batch_size,
            local_epochs=local_epochs,
            optimizer=optimizer,
            l2=l2,
            n_graph_layers=n_graph_layers,
            item_propagation=item_propagation,
            key=key,
        )
        share = _share_of_rows(cohort, total_rows).to(table.dtype)
        if newton:
            share = torch.full_like(share, 1.0 / len(delegates))
        broken = result.broken(cohort.owner, heads, bound) if looks else None
        if broken is not None:
            result = result.without(broken, cohort.owner, state.user_factors[cohort.users])
            heads = without(heads, broken, state.head)
            sums.leave_out(broken, share)
            share = share.masked_fill(broken, 0.0)
        trained.append((cohort.users, result.user_vectors))
        sums.count(result)
        weight = _row_weights(result, item_weighting, cohort, client_rows, total_rows)
        vectors = sampled_bce.with_constant(result.user_vectors, item_bias)
        if broken is not None:
            vectors.masked_fill_(broken[cohort.owner][:, None], 0.0)
        if uplink is None:
            sums.add(result, weight, vectors, heads, share)
        else:
            own = uploads_of(
                cohort, result, weight, vectors, heads, share, state.head, newton=newton
            )
            means = mean_rows(vectors, cohort.owner, len(share))
            kept = torch.ones_like(share, dtype=torch.bool) if broken is None else ~broken
            sent.append((own.of(kept), means[kept]))
    sums.finish()
    received = release = None
    if uplink is not None and uplink.privacy is not None:
        release = _release(uplink, sent, sums, state, t, len(delegates))
    elif uplink is not None and sums.n_broken < len(delegates):
        received = _receive(uplink, sent, sums, state, t, len(delegates))
    if 0 < len(delegates) == sums.n_broken and release is None:
        raise NoUsableUploadError(len(delegates), t)
    if server_optimizer is None:
        moved = _newton_move(
            state,
            sums,
            len(delegates),
            learned=optimizer.learning_rate * local_epochs,
            l2=l2,
            forgetting=whole_data.steady_rate(len(delegates) / shards.n_clients, t)
            if forgetting is None
            else forgetting,
            decay=decay,
        )
    else:
        moved = _plain_move(state, sums, item_weighting, server_optimizer)
    new = replace(
        moved,
        user_factors=fill_rows(
            written_users(state.user_factors, trained, in_place=in_place), parts, shards.users_of
        ),
        times_sampled=counted_times(state, shards, delegates, in_place=in_place),
        turns=counted_turns(state.turns, delegates, in_place=in_place),
        residual=received.residual if received else state.residual,
        clip_norms=release.bounds if release else state.clip_norms,
    )
    logs = _bce_logs(state, sums, len(delegates), release, dense=sends_every_row(uplink))
    return new, as_sent(logs, received)


def _train(
    cohort: Cohort,
    state: FactorState,
    *,
    item_bias: bool,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    n_graph_layers: int,
    item_propagation: bool,
    key: int,
) -> tuple[sampled_bce.LocalResult, Head]:
    """Train a chunk of clients with the model that the state holds."""
    users = state.user_factors[cohort.users]
    if state.head:
        result, heads = ncf.train(
            cohort,
            users,
            state.item_table,
            [state.head],
            item_bias=item_bias,
            n_negatives=n_negatives,
            batch_size=batch_size,
            local_epochs=local_epochs,
            optimizer=optimizer,
            l2=l2,
            key=key,
            n_graph_layers=n_graph_layers,
            item_propagation=item_propagation,
        )
        return result, heads[0]
    result = sampled_bce.train(
        cohort,
        users,
        state.item_table,
        item_bias=item_bias,
        n_negatives=n_negatives,
        batch_size=batch_size,
        local_epochs=local_epochs,
        optimizer=optimizer,
        l2=l2,
        key=key,
    )
    return result, {}


def _share_of_rows(cohort: Cohort, total_rows: float) -> Tensor:
    """Share (C,) of the interactions of all delegates that each client holds."""
    rows = torch.zeros(len(cohort.clients), dtype=torch.float64, device=cohort.device)
    return rows.index_add_(0, cohort.owner, cohort.sizes.double()) / total_rows


def _row_weights(
    result: sampled_bce.LocalResult,
    item_weighting: ItemWeighting,
    cohort: Cohort,
    client_rows: NDArray[np.int64],
    total_rows: float,
) -> Tensor:
    """Weight (K,) of every private row in the aggregation; zero for padding."""
    valid = result.row_valid.to(result.row_values.dtype)
    if item_weighting == "count":
        return valid
    if item_weighting == "magnitude":
        return valid * result.row_delta.abs().sum(1)
    rows = to_device(client_rows[cohort.clients], valid.device).to(valid.dtype)
    weight = valid * rows[result.row_clients]
    return weight / total_rows if item_weighting == "fedavg" else weight


def _release(
    uplink: Uplink,
    sent: Sequence[tuple[Uploads, Tensor]],
    sums: DelegateSums,
    state: FactorState,
    t: int,
    n_delegates: int,
) -> Release:
    """Let the sums take what an uplink with privacy makes of the uploads of chunks of clients."""
    table, n_numbers = state.item_table, n_weights(state.head)
    width = table.shape[1]
    release, n_rejected = released(
        uplink,
        Uploads.join([own for own, _ in sent] or [Uploads.nobody(width, n_numbers, table)]),
        torch.cat([table.new_zeros(0, width), *(means for _, means in sent)]),
        (width,),
        [1.0] * (1 + bool(state.head)),
        state,
        t,
        n_delegates,
    )
    sums.take_noised(release.sums, n_rejected)
    return release


def _receive(
    uplink: Uplink,
    sent: Sequence[tuple[Uploads, Tensor]],
    sums: DelegateSums,
    state: FactorState,
    t: int,
    n_delegates: int,
) -> UploadSums:
    """Let the sums take what any other uplink makes of them."""
    uploads = Uploads.join([own for own, _ in sent])
    vectors = torch.cat([means for _, means in sent])
    received, n_rejected = uplink.receive(uploads, vectors, state.item_table, t, state.residual)
    sums.take(received, n_delegates, n_rejected)
    return received


def _newton_move(
    state: FactorState,
    sums: DelegateSums,
    n_delegates: int,
    *,
    learned: float,
    l2: float,
    forgetting: float,
    decay: float,
) -> FactorState:
    """Return the state with a table that has made the quasi-Newton step.

    `learned` is by how much a gradient was multiplied in all local epochs together.
    """
    moved, statistics = bce_newton.newton_step(
        state.item_table,
        state.statistics,
        gradient=sums.changes / -learned,
        counts=sums.weights[:, 0],
        curvature=sums.curvature,
        gram=sums.gram / (n_delegates * (1.0 - sums.broken_share)),
        l2=l2,
        forgetting=forgetting,
        decay=decay,
    )
    return replace(state, item_table=moved, statistics=statistics)


def _plain_move(
    state: FactorState,
    sums: DelegateSums,
    item_weighting: ItemWeighting,
    server_optimizer: Optimizer,
) -> FactorState:
    """Return the state with table and head moved by the mean change, a negative gradient."""
    heard = 1.0 - sums.broken_share
    mean = (
        sums.changes / heard
        if item_weighting == "fedavg"
        else weighted_mean(sums.changes, sums.weights[:, 0])
    )
    touched = sums.weights[:, 0] > 0  # of noised sums all rows
    moved, moments = apply_gradients(
        {"item": state.item_table}, {"item": -mean}, state.moments, touched, server_optimizer
    )
    change = {name: total / heard for name, total in sums.head.items()}
    head, head_moments = _moved_head(state, change, server_optimizer)
    return replace(
        state, item_table=moved["item"], moments=moments, head=head, head_moments=head_moments
    )


def _moved_head(
    state: FactorState, change: Head, server_optimizer: Optimizer
) -> tuple[Head, Moments | None]:
    """Step the shared head by the mean change of the delegates, weighted by interactions."""
    if state.head_moments is None:
        return state.head, state.head_moments
    grads = {name: -value for name, value in lifted(change).items()}
    active = torch.ones(1, dtype=torch.bool, device=state.item_table.device)
    moved, moments = apply_gradients(
        lifted(state.head), grads, state.head_moments, active, server_optimizer
    )
    return {name: value[0] for name, value in moved.items()}, moments


def _bce_logs(
    state: FactorState,
    sums: DelegateSums,
    n_delegates: int,
    release: Release | None,
    *,
    dense: bool,
) -> Logs:
    """Count a round's loss and traffic; `dense`: clients send rows that they have not touched."""
    n_items, width = state.item_table.shape
    # With a row its curvature and with a client the products of its vectors, if they are needed.
    n_numbers = width**2 if sums.newton else n_weights(state.head)
    rows_up = sums.n_rows * sparse_row_bytes(1, width + sums.newton)
    logs: Logs = {
        "loss": sums.losses / sums.n_examples.clamp_min(1),
        "clients": n_delegates,
        "rejected": sums.n_broken,
        "bytes_down": n_delegates * bce_download(state),
        "bytes_up": rows_up + n_delegates * dense_bytes((n_numbers,)),
    }
    if release is not None:
        logs["clip_norm"] = release.clip_norm
    if dense:
        logs["bytes_up"] = n_delegates * dense_bytes((n_items, width), (n_numbers,))
    return logs


def bce_download(state: FactorState) -> int:
    """Bytes that a client is sent in a round of `bce_step`: the item table and what is shared."""
    return dense_bytes(tuple(state.item_table.shape), (n_weights(state.head),))


def refit_bce(
    state: FactorState,
    shards: ClientShards,
    clients: NDArray[np.int64],
    *,
    item_bias: bool,
    n_negatives: int,
    n_steps: int,
    l2: float,
    streams: Streams,
    n_graph_layers: int = 0,
    item_propagation: bool = False,
) -> Tensor:
    """Return user vectors (n_users, d) with those of `clients` fitted to the final table."""
    users = served_factors(state).clone()
    key = streams.key("refit")
    parts = shares(clients, shards.client_rows[clients])
    for cohort in shards.user_chunks(own_part(parts), rows_per_interaction=1 + n_negatives):
        if state.head:
            users[cohort.users] = ncf.refit_users(
                cohort,
                users[cohort.users],
                state.item_table,
                state.head,
                item_bias=item_bias,
                n_negatives=n_negatives,
                n_steps=n_steps,
                l2=l2,
                key=key,
                n_graph_layers=n_graph_layers,
                item_propagation=item_propagation,
            )
            continue
        users[cohort.users] = sampled_bce.refit_users(
            cohort,
            users[cohort.users],
            state.item_table,
            item_bias=item_bias,
            n_negatives=n_negatives,
            n_steps=n_steps,
            l2=l2,
            key=key,
        )
    return fill_rows(users, parts, shards.users_of)
