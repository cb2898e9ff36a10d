"""Rounds of a factor model on all data: exact solves, and a quasi-Newton step on the server.

delegate k  <- V and V'V; solves its users' vectors, all unseen items as weak negatives
               sends pull, count and curvature of its items, and the products of its vectors
server      <- V moves by what the sums over all users would ask for, see `models.whole_data`
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.parallel import add_up, fill_rows, own_part, shares
from fedrecsk.engine.shards import ClientShards, counted_turns, written_users
from fedrecsk.engine.traffic import dense_bytes, sparse_row_bytes
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import Uploads, as_sent
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.methods.factor_state import (
    FactorState,
    Logs,
    counted_times,
)
from fedrecsk.methods.noised_sums import released_users, sends_every_row
from fedrecsk.models import whole_data


def whole_data_step(
    state: FactorState,
    shards: ClientShards,
    delegates: NDArray[np.int64],
    t: int,
    *,
    unobserved_weight: float,
    penalty: whole_data.Penalty,
    server_learning_rate: float | None,
    decay: float,
    item_curvature: bool,
    uplink: Uplink | None = None,
    in_place: bool = False,
) -> tuple[FactorState, Logs]:
    """Solve the delegates exactly and take a quasi-Newton step on the server.

    Parameters
    ----------
    state, shards, delegates, t
        As in `fedrecsk.methods.bce_rounds.bce_step`.
    unobserved_weight, penalty, decay, item_curvature
        See `fedrecsk.models.whole_data`.
    server_learning_rate : float or None
        η; None follows from the participation, `whole_data.default_rate`.
    uplink : Uplink, optional
    in_place : bool, default=False
        See `fedrecsk.methods.bce_rounds.bce_step`.

    Returns
    -------
    state : FactorState
    logs : dict
        As in `fedrecsk.methods.bce_rounds.bce_step`.
    """
    items = state.item_table
    gram = items.T @ items
    mean_user_rows = len(shards.items) / shards.n_users
    trained: list[tuple[Tensor, Tensor]] = []
    total = whole_data.Sums.zero(shards.n_items, items.shape[1], items.device)
    sent: list[tuple[Uploads, Tensor]] = []
    broken: list[NDArray[np.int64]] = []
    looks = uplink is not None or items.device.type == "cpu"  # a GPU would be waited for
    parts = shares(delegates, shards.client_rows[delegates])
    for cohort in shards.user_chunks(own_part(parts)):
        users = whole_data.solve_users(
            cohort,
            items,
            gram,
            unobserved_weight=unobserved_weight,
            penalty=penalty,
            mean_rows=mean_user_rows,
        )
        if looks and not bool(users.isfinite().all()):
            solved = users.isfinite().all(1)
            broken.append(cohort.clients[~solved.cpu().numpy()])
            cohort, users = cohort.of_users(solved), users[solved]
        trained.append((cohort.users, users))
        total += whole_data.user_sums(
            cohort, users, items, gram, unobserved_weight=unobserved_weight
        )
        if uplink is not None:
            sent.append((whole_data.uploads_of(cohort, users, items), users))
    n_rejected = len(np.unique(np.concatenate(broken))) if broken else 0
    received = release = None
    if uplink is not None and uplink.privacy is not None:
        total, release, more = released_users(
            uplink, sent, total, shards, state, t, len(delegates), item_curvature=item_curvature
        )
        n_rejected += more
    elif uplink is not None and total.n_users:
        received, more = whole_data.receive(uplink, sent, items, t, state.residual)
        total = total.with_received(received, shards.client_users)
        n_rejected += more
    total = total.of_all_processes()
    if len(delegates) and not total.n_users:
        raise NoUsableUploadError(len(delegates), t)
    user_factors = fill_rows(
        written_users(state.user_factors, trained, in_place=in_place), parts, shards.users_of
    )
    rate = server_learning_rate
    if rate is None:
        rate = whole_data.default_rate(total.n_users / shards.n_users, t)
    moved, statistics = whole_data.server_step(
        items,
        state.statistics,
        total,
        n_users=shards.n_users,
        unobserved_weight=unobserved_weight,
        penalty=penalty,
        mean_rows=len(shards.items) / shards.n_items,
        rate=rate,
        decay=decay,
        item_curvature=item_curvature,
        noise=release.noise if release else 0.0,
    )
    new = replace(
        state,
        user_factors=user_factors,
        item_table=moved,
        statistics=statistics,
        times_sampled=counted_times(state, shards, delegates, in_place=in_place),
        turns=counted_turns(state.turns, delegates, in_place=in_place),
        residual=received.residual if received else state.residual,
        clip_norms=release.bounds if release else state.clip_norms,
    )
    logs: Logs = {
        "loss": total.loss.double() / max(total.n_rows, 1),
        "clients": len(delegates),
        "rejected": int(add_up(torch.tensor(n_rejected))[0]),
        "bytes_down": len(delegates) * whole_data_download(state),
        "bytes_up": _upload(
            state, shards, delegates, item_curvature=item_curvature, dense=sends_every_row(uplink)
        ),
    }
    if release is not None:
        logs["clip_norm"] = release.clip_norm
    return new, as_sent(logs, received)


def _upload(
    state: FactorState,
    shards: ClientShards,
    delegates: NDArray[np.int64],
    *,
    item_curvature: bool,
    dense: bool,
) -> int:
    """Bytes that the delegates send; `dense`: also rows of items that they do not have."""
    n_items, d = state.item_table.shape
    # A row carries the pull on the item, its count and its curvature.
    width = d + 1 + item_curvature
    if dense:
        return len(delegates) * dense_bytes((n_items, width), (d, d))
    n_rows = int(shards.client_items[delegates].sum())
    return sparse_row_bytes(n_rows, width) + len(delegates) * dense_bytes((d, d))


def whole_data_download(state: FactorState) -> int:
    """Bytes that a client is sent in a round of `whole_data_step`: the table and its products."""
    d = state.item_table.shape[1]
    return dense_bytes(tuple(state.item_table.shape), (d, d))


def refit_whole_data(
    state: FactorState,
    shards: ClientShards,
    clients: NDArray[np.int64],
    *,
    unobserved_weight: float,
    penalty: whole_data.Penalty,
    mean_rows: float,
) -> Tensor:
    """Return user vectors (n_users, d) with those of `clients` solved against the final table."""
    items = state.item_table
    gram = items.T @ items
    users = state.user_factors.clone()
    parts = shares(clients, shards.client_rows[clients])
    for cohort in shards.user_chunks(own_part(parts)):
        users[cohort.users] = whole_data.solve_users(
            cohort,
            items,
            gram,
            unobserved_weight=unobserved_weight,
            penalty=penalty,
            mean_rows=mean_rows,
        )
    return whole_data.all_solved(fill_rows(users, parts, shards.users_of))
