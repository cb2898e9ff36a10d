"""FedFNN: predict the updates of the users that were not sampled.

Fabbri, Liu, McKenzie, Twardowski, Wijaya. "FedFNN: Faster Training Convergence Through Update
Predictions in Federated Recommender Systems", 2023, arXiv:2309.08635. FedFast, whose weighting
and clustering are arguments here: Muhammad et al., KDD 2020.

    for each round t:
        S        <- sample clients; their users are the delegates, all others subordinates
        u_k, v_k <- local training of every delegate from (u_k, V)
        V        <- V + weighted mean over the delegates that touched a row of (v_k - V)
        f        <- meta-network fitted to (u_k before training -> change of u_k), k in S
        u_s      <- u_s + discount * decay^t * confidence_s * f(u_s)   for every subordinate s
        stop predicting for good when the loss has not improved for `patience` rounds

Special cases are arguments: ``predictor=None, item_weighting="fedavg"`` is FedAvg, which divides
by all delegates instead of by those that touched the row. FedFast draws delegates by clusters
(``sampling="stratified"``) and predicts the mean change of a cluster (``predictor="cluster"``).

Where we deviate (only the abstract and summaries of the paper could be read):

- The literal method washes out what a user has learned: whoever took part once has a personal
  vector, and predictions know only the crowd. `gate` weights predictions by the predictor's
  cross-validated R2 and spares whoever has taken part. `anchor` keeps predictions apart from what
  users trained: they are what a user is served with until its turn comes, and no training starts
  from them, so errors do not pile up.
- ``server_optimizer="newton"``: a quasi-Newton step on the server (`fedrecsk.models.bce_newton`).
- ``objective="whole-data"`` replaces sampled negatives by exact client solves and a quasi-Newton
  server step (`fedrecsk.models.whole_data`). Delegates' vectors are then optimal for the current
  table, the item update needs nothing of the subordinates, and predicted vectors are the
  server's guess for users it has not heard of.
- `refit`: every user may fit its own vector to its own data before inference, on its own device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device
from fedrecsk.engine.local import Moments, Optimizer, Params, apply_gradients, init_moments
from fedrecsk.engine.mixing import mean_rows, weighted_mean
from fedrecsk.engine.parallel import add_up, fill_rows, own_part, shares
from fedrecsk.engine.privacy import Privacy, Release
from fedrecsk.engine.sampling import (
    epoch_cohort,
    poisson_cohort,
    stratified_cohort,
    uniform_cohort,
)
from fedrecsk.engine.shards import ClientShards, Cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.traffic import dense_bytes, sparse_row_bytes
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import Residual, Uploads, UploadSums
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.methods.delegate_sums import DelegateSums, uploads_of
from fedrecsk.methods.meta_network import PredictorName, cluster_labels, predict_updates
from fedrecsk.models import bce_newton, ncf, sampled_bce, whole_data
from fedrecsk.models.head import Head, without

# What the parts of a whole-data upload are shortened to in the first round: pull, curvature, counts
# and Gram matrix. Near to what is learned on MovieLens-100K; they may depend on no client's data.
START = (1.0, 0.1, 5.0, 0.1)

ItemWeighting = Literal["count", "magnitude", "interactions", "fedavg"]
SamplingName = Literal["uniform", "poisson", "epoch", "stratified"]
Logs = dict[str, Any]


@dataclass(frozen=True)
class PredictionWatch:
    """Patience: whether prediction still goes on.

    Attributes
    ----------
    active : bool
    best_loss : float
    waited : int
        Rounds since the loss was best.
    """

    active: bool = True
    best_loss: float = float("inf")
    waited: int = 0

    def after(self, loss: float, patience: int) -> PredictionWatch:
        """Return the watch after a round with this loss, or whatever else should fall."""
        if loss < self.best_loss:
            return replace(self, best_loss=loss, waited=0)
        waited = self.waited + 1
        return replace(self, waited=waited, active=self.active and waited < patience)


@dataclass(frozen=True, eq=False)
class FactorState:
    """The state of a federated factor model between rounds.

    Attributes
    ----------
    user_factors : Tensor of shape (n_users, d)
        The server's copy of the users' vectors, from which local training starts.
    served : Tensor of shape (n_users, d) or None
        What users are served with where predictions are kept apart; None: `user_factors`.
    item_table : Tensor of shape (n_items, d) or (n_items, d + 1)
        With the item bias as the last column where there is one.
    head : dict of Tensor
        What else the clients share, see `fedrecsk.models.head`; empty for matrix factorisation.
    times_sampled : Tensor of shape (n_users,)
        Rounds in which each user took part.
    turns : ndarray of shape (n_clients,)
        Rounds of this fit in which each client took part, or had its turn and did not deliver.
    missed : ndarray of shape (n_clients,), bool
        Whether each client has missed a turn and kept it, see `Turnout.turns_after`.
    moments, head_moments : Moments
        Of the server optimiser.
    statistics : ServerStatistics
        Of the quasi-Newton steps.
    watch : PredictionWatch
    first_round : int
        Number of the fit's first round; schedules count from there.
    residual : Residual or None
        What clients that compress their uploads have kept for later; it lies with them.
    clip_norms : Tensor of shape (P,) or None
        What the parts of an upload are shortened to, see `fedrecsk.engine.privacy`; None before
        the first round, or without privacy.
    """

    user_factors: Tensor
    served: Tensor | None
    item_table: Tensor
    head: Head
    times_sampled: Tensor
    turns: NDArray[np.int64]
    missed: NDArray[np.bool_]
    moments: Moments
    head_moments: Moments | None
    statistics: whole_data.ServerStatistics
    watch: PredictionWatch
    first_round: int
    residual: Residual | None = None
    clip_norms: Tensor | None = None

    @classmethod
    def start(
        cls,
        user_factors: Tensor,
        item_table: Tensor,
        server_optimizer: Optimizer | None,
        *,
        n_clients: int,
        head: Head | None = None,
        first_round: int = 0,
    ) -> FactorState:
        """Return the state before the first round for given arrays."""
        head = head or {}
        # None is the quasi-Newton step, which keeps its own statistics.
        plain = server_optimizer or Optimizer("sgd", 1.0)
        return cls(
            user_factors=user_factors,
            served=None,
            item_table=item_table,
            head=head,
            times_sampled=torch.zeros(len(user_factors), device=user_factors.device),
            turns=np.zeros(n_clients, dtype=np.int64),
            missed=np.zeros(n_clients, dtype=bool),
            moments=init_moments({"item": item_table}, plain),
            head_moments=init_moments(_lifted(head), plain) if head else None,
            statistics=whole_data.ServerStatistics.zero(
                len(item_table), item_table.shape[1], item_table.device
            ),
            watch=PredictionWatch(),
            first_round=first_round,
        )


def draw_delegates(
    state: FactorState,
    shards: ClientShards,
    size: int,
    t: int,
    sampling: SamplingName,
    n_clusters: int,
    streams: Streams,
    among: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Choose the clients of round t.

    Parameters
    ----------
    state : FactorState
    shards : ClientShards
    size : int
        How many; with ``"poisson"`` on average.
    t : int
    sampling : {"uniform", "poisson", "epoch", "stratified"}
        Uniformly; each for itself with the same probability; uniformly among those with the
        fewest turns, so that everybody takes part once before anybody does so twice; or with
        equal quotas from k-means clusters of the clients' mean user vectors, as FedFast does.
    n_clusters : int
    streams : Streams
    among : ndarray of int64, optional
        Clients to choose from, ascending; default: all.

    Returns
    -------
    ndarray of shape (size,), int64
        Ascending.
    """
    rng = streams.numpy("sampling", t)
    if sampling == "uniform":
        chosen = uniform_cohort(shards.n_clients if among is None else len(among), size, rng)
        return chosen if among is None else among[chosen]
    if sampling == "poisson":
        chosen = poisson_cohort(shards.n_clients if among is None else len(among), size, rng)
        return chosen if among is None else among[chosen]
    if sampling == "epoch":
        chosen = epoch_cohort(state.turns if among is None else state.turns[among], size, rng)
        return chosen if among is None else among[chosen]
    vectors = state.user_factors[torch.from_numpy(shards.users).to(state.user_factors.device)]
    # A client without rows would have no user; the encoder makes none.
    owner = torch.from_numpy(np.repeat(np.arange(shards.n_clients), shards.client_users))
    means = mean_rows(vectors, owner.to(vectors.device), shards.n_clients)
    labels = cluster_labels(means, n_clusters, streams.key("strata", t))
    if among is None:
        return stratified_cohort(labels, size, rng)
    return among[stratified_cohort(labels[among], size, rng)]


def bce_download(state: FactorState) -> int:
    """Bytes that a client is sent in a round of `bce_step`: the item table and what is shared."""
    n_shared = sum(value.numel() for value in state.head.values())
    return dense_bytes(tuple(state.item_table.shape), (n_shared,))


def whole_data_download(state: FactorState) -> int:
    """Bytes that a client is sent in a round of `whole_data_step`: the table and its products."""
    d = state.item_table.shape[1]
    return dense_bytes(tuple(state.item_table.shape), (d, d))


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
    width = table.shape[1]
    key = streams.key("examples", t)
    client_rows = shards.client_rows
    total_rows = float(max(client_rows[delegates].sum(), 1))
    newton = server_optimizer is None
    private = uplink is not None and uplink.privacy is not None
    clip_norms, private_logs = state.clip_norms, Logs()
    sums = DelegateSums(table, state.head, newton=newton)
    trained: list[tuple[Tensor, Tensor]] = []
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
    received = None
    if uplink is not None and uplink.privacy is not None:
        n_numbers = sum(value.numel() for value in state.head.values())
        release, n_rejected = _released(
            uplink,
            Uploads.join([own for own, _ in sent] or [Uploads.nobody(width, n_numbers, table)]),
            torch.cat([table.new_zeros(0, width), *(means for _, means in sent)]),
            (width,),
            [1.0] * (1 + bool(state.head)),
            state,
            t,
            len(delegates),
        )
        sums.take_noised(release.sums, n_rejected)
        clip_norms, private_logs = release.bounds, {"clip_norm": release.clip_norm}
    elif uplink is not None and sums.n_broken < len(delegates):
        uploads = Uploads.join([own for own, _ in sent])
        received, n_rejected = uplink.receive(
            uploads, torch.cat([means for _, means in sent]), table, t, state.residual
        )
        sums.take(received, len(delegates), n_rejected)
    if 0 < len(delegates) == sums.n_broken and not private:
        raise NoUsableUploadError(len(delegates), t)
    heard = 1.0 - sums.broken_share
    user_factors = fill_rows(_written(state, trained, in_place), parts, shards.users_of)
    moments, statistics = state.moments, state.statistics
    if server_optimizer is None:
        rate = forgetting
        if rate is None:
            rate = whole_data.steady_rate(len(delegates) / shards.n_clients, t)
        moved, statistics = bce_newton.newton_step(
            table,
            statistics,
            gradient=sums.changes / (-optimizer.learning_rate * local_epochs),
            counts=sums.weights[:, 0],
            curvature=sums.curvature,
            gram=sums.gram / (len(delegates) * heard),
            l2=l2,
            forgetting=rate,
            decay=decay,
        )
    else:
        mean = (
            sums.changes / heard
            if item_weighting == "fedavg"
            else weighted_mean(sums.changes, sums.weights[:, 0])
        )
        touched = sums.weights[:, 0] > 0  # of noised sums all rows
        step, moments = apply_gradients(
            {"item": table}, {"item": -mean}, moments, touched, server_optimizer
        )
        moved = step["item"]
    head_change = {name: change / heard for name, change in sums.head.items()}
    head, head_moments = _moved_head(state, head_change, server_optimizer)
    # With a row its curvature and with a client the products of its vectors, if they are needed.
    n_numbers = width**2 if newton else sum(value.numel() for value in head.values())
    logs: Logs = {
        "loss": sums.losses / sums.n_examples.clamp_min(1),
        "clients": len(delegates),
        "rejected": sums.n_broken,
        "bytes_down": len(delegates) * bce_download(state),
        "bytes_up": sums.n_rows * sparse_row_bytes(1, width + newton)
        + len(delegates) * dense_bytes((n_numbers,)),
    }
    logs |= private_logs
    if _is_dense(uplink):
        logs["bytes_up"] = len(delegates) * dense_bytes(tuple(table.shape), (n_numbers,))
    new = replace(
        state,
        user_factors=user_factors,
        item_table=moved,
        head=head,
        moments=moments,
        head_moments=head_moments,
        statistics=statistics,
        times_sampled=_counted(state, shards, delegates, in_place=in_place),
        turns=_taken(state, delegates, in_place=in_place),
        residual=received.residual if received else state.residual,
        clip_norms=clip_norms,
    )
    return new, _as_sent(logs, received)


def _as_sent(logs: Logs, received: UploadSums | None) -> Logs:
    """Put in the bytes of an uplink through which clients send something else than their rows."""
    if received is None or received.bytes_up is None:
        return logs
    more = {"bytes_up": received.bytes_up, "bytes_down": logs["bytes_down"] + received.bytes_down}
    return {**logs, **more}


def _share_of_rows(cohort: Cohort, total_rows: float) -> Tensor:
    """Share (C,) of the interactions of all delegates that each client holds."""
    rows = torch.zeros(len(cohort.clients), dtype=torch.float64, device=cohort.device)
    return rows.index_add_(0, cohort.owner, cohort.sizes.double()) / total_rows


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


def _lifted(head: Head) -> Params:
    """Give every tensor the leading axis of one client that optimisers expect."""
    return {name: value[None] for name, value in head.items()}


def _moved_head(
    state: FactorState, change: Head, server_optimizer: Optimizer | None
) -> tuple[Head, Moments | None]:
    """Step the shared head by the mean change of the delegates, weighted by interactions."""
    if state.head_moments is None or server_optimizer is None:
        return state.head, state.head_moments
    grads = {name: -value for name, value in _lifted(change).items()}
    active = torch.ones(1, dtype=torch.bool, device=state.item_table.device)
    moved, moments = apply_gradients(
        _lifted(state.head), grads, state.head_moments, active, server_optimizer
    )
    return {name: value[0] for name, value in moved.items()}, moments


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
        As in `bce_step`.
    unobserved_weight, penalty, decay, item_curvature
        See `fedrecsk.models.whole_data`.
    server_learning_rate : float or None
        η; None follows from the participation, `whole_data.default_rate`.
    uplink : Uplink, optional
    in_place : bool, default=False
        See `bce_step`.

    Returns
    -------
    state : FactorState
    logs : dict
        As in `bce_step`.
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
    received = None
    clip_norms, noise, private_logs = state.clip_norms, 0.0, Logs()
    if uplink is not None and uplink.privacy is not None:
        total, release, more = _noised(
            uplink,
            uplink.privacy,
            sent,
            total,
            shards,
            state,
            t,
            len(delegates),
            item_curvature=item_curvature,
        )
        clip_norms, noise = release.bounds, release.noise
        private_logs = {"clip_norm": release.clip_norm}
        n_rejected += more
    elif uplink is not None and total.n_users:
        received, more = whole_data.receive(uplink, sent, items, t, state.residual)
        total = total.with_received(received, shards.client_users)
        n_rejected += more
    total = total.of_all_processes()
    if len(delegates) and not total.n_users:
        raise NoUsableUploadError(len(delegates), t)
    user_factors = fill_rows(_written(state, trained, in_place), parts, shards.users_of)
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
        noise=noise,
    )
    d = items.shape[1]
    n_rows, width = int(shards.client_items[delegates].sum()), d + 1 + item_curvature
    logs: Logs = {
        "loss": total.loss.double() / max(total.n_rows, 1),
        "clients": len(delegates),
        "rejected": int(add_up(torch.tensor(n_rejected))[0]),
        "bytes_down": len(delegates) * whole_data_download(state),
        # A row carries the pull on the item, its count and its curvature.
        "bytes_up": sparse_row_bytes(n_rows, width) + len(delegates) * dense_bytes((d, d)),
    }
    logs |= private_logs
    if _is_dense(uplink):
        logs["bytes_up"] = len(delegates) * dense_bytes((len(items), width), (d, d))
    new = replace(
        state,
        user_factors=user_factors,
        item_table=moved,
        statistics=statistics,
        times_sampled=_counted(state, shards, delegates, in_place=in_place),
        turns=_taken(state, delegates, in_place=in_place),
        residual=received.residual if received else state.residual,
        clip_norms=clip_norms,
    )
    return new, _as_sent(logs, received)


def _noised(
    uplink: Uplink,
    privacy: Privacy,
    sent: Sequence[tuple[Uploads, Tensor]],
    total: whole_data.Sums,
    shards: ClientShards,
    state: FactorState,
    t: int,
    n_clients: int,
    *,
    item_curvature: bool,
) -> tuple[whole_data.Sums, Release, int]:
    """Return the sums that an uplink makes, with privacy, and all that is released."""
    items = state.item_table
    d = items.shape[1]
    of_users = Uploads.join([own for own, _ in sent] or [Uploads.nobody(d + 2, d * d, items)])
    vectors = torch.cat([items.new_zeros(0, d), *(users for _, users in sent)])
    uploads, means = _client_wise(of_users, vectors, shards.n_items)
    # Pull, curvature, count; noise for a column that nobody reads would be wasted.
    columns = [*range(d), d, d + 1] if item_curvature else [*range(d), d + 1]
    widths = (d, *[1] * (len(columns) - d))
    uploads = uploads.with_rows(uploads.rows[:, columns])
    start = START if item_curvature else (START[0], *START[2:])
    release, n_rejected = _released(uplink, uploads, means, widths, start, state, t, n_clients)
    rows = items.new_zeros(len(items), d + 2)
    rows[:, columns] = release.sums.rows
    sums = total.with_received(replace(release.sums, rows=rows), shards.client_users)
    n_users = max(1, round(privacy.cohort * shards.n_users / shards.n_clients))
    return replace(sums, n_users=n_users), release, n_rejected


def _is_dense(uplink: Uplink | None) -> bool:
    """Whether clients send every row: noise of their own must be in those they have not touched."""
    return uplink is not None and uplink.privacy is not None and uplink.privacy.name == "local"


def _client_wise(uploads: Uploads, vectors: Tensor, n_items: int) -> tuple[Uploads, Tensor]:
    """Add up users' uploads, and average their vectors (U, d), client by client."""
    clients, place = np.unique(uploads.clients, return_inverse=True)
    means = mean_rows(vectors, torch.from_numpy(place).to(vectors.device), len(clients))
    return uploads.by_client(n_items), means


def _released(
    uplink: Uplink,
    uploads: Uploads,
    means: Tensor,
    widths: Sequence[int],
    start: Sequence[float],
    state: FactorState,
    t: int,
    n_clients: int,
) -> tuple[Release, int]:
    """Release the sums of a round, with the bounds in the state, or those to start with."""
    bounds = state.clip_norms
    if bounds is None or len(bounds) != len(start):  # a fit that goes on may send other parts
        bounds = torch.tensor(start, dtype=torch.float64)
    return uplink.release(
        uploads, means, state.item_table, t, widths=widths, bounds=bounds, n_clients=n_clients
    )


def prediction_step(
    before: FactorState,
    trained: FactorState,
    shards: ClientShards,
    delegates: NDArray[np.int64],
    t: int,
    *,
    monitored: float,
    streams: Streams,
    predictor: PredictorName,
    discount: float,
    discount_decay: float,
    cv: int,
    patience: int,
    gate: bool,
    anchor: bool,
    extra_inputs: bool,
    n_clusters: int,
) -> tuple[FactorState, Logs]:
    """Learn from the delegates' updates and move the subordinates: the second half of a round.

    Parameters
    ----------
    before, trained : FactorState
        Around the delegates' training, `bce_step` or `whole_data_step`; not changed.
    shards, delegates, t, streams
        As in `bce_step`.
    monitored : float
        What patience wants to fall: the loss of the round, or a ranking metric times -1.
    predictor, cv, n_clusters
        See `fedrecsk.methods.meta_network.predict_updates`.
    discount, discount_decay : float
        Predictions in the fit's round t are multiplied by ``discount * discount_decay**t``.
    patience : int
        Rounds without a lower `monitored` after which prediction ends for good.
    gate : bool
        Weigh predictions by their cross-validated R2, and move only users who never took part.
    anchor : bool
        Put predictions into ``served`` alone. False: into ``user_factors``, from which training
        goes on.
    extra_inputs : bool
        Whether the predictor also sees `public_inputs`.

    Returns
    -------
    state : FactorState
    logs : dict
        ``prediction_active, user_norm`` (mean norm of the vectors that users are served with),
        and while prediction is active ``predictor_r2, predictor_cosine, predictor_candidate,
        predicted_share, predicted_norm`` (mean norm of the changes made); None is what was not
        measured.
    """
    watch = before.watch.after(monitored, patience)
    users = _users(before, shards, delegates)
    # What predictions are written into; a copy, so that `before` and `trained` stay as they are.
    target = (served_factors(before) if anchor else trained.user_factors).clone()
    target[users] = trained.user_factors[users]
    logs: Logs = {"prediction_active": watch.active}
    if watch.active:
        is_delegate = torch.zeros(shards.n_users, dtype=torch.bool, device=users.device)
        is_delegate[users] = True
        others = torch.nonzero(~is_delegate)[:, 0]
        if gate:
            others = others[before.times_sampled[others] == 0]
        start = before.user_factors
        inputs = torch.cat([start, public_inputs(before, shards)], 1) if extra_inputs else start
        prediction = predict_updates(
            predictor,
            inputs[users],
            trained.user_factors[users] - start[users],
            inputs[others],
            cv=cv,
            gate=gate,
            n_clusters=n_clusters,
            seed=streams.key("meta_network", t) % (2**32),
        )
        scale = discount * discount_decay ** (t - before.first_round)
        if gate and prediction.deltas is not None:
            scale *= min(prediction.r2, 1.0)
        logs |= {
            # None and not nan, which is not even equal to itself.
            "predictor_r2": None if math.isnan(prediction.r2) else prediction.r2,
            "predictor_cosine": None if math.isnan(prediction.cosine) else prediction.cosine,
            "predictor_candidate": prediction.candidate,
            "predicted_share": 0.0,
            "predicted_norm": 0.0,
        }
        if prediction.deltas is not None:
            moves = scale * prediction.deltas
            target[others] = start[others] + moves
            logs["predicted_share"] = len(others) / shards.n_users
            logs["predicted_norm"] = float(moves.norm(dim=1).mean())
    logs["user_norm"] = float(target.norm(dim=1).mean())
    new = replace(trained, watch=watch)
    new = replace(new, served=target) if anchor else replace(new, user_factors=target)
    return new, logs


def served_factors(state: FactorState) -> Tensor:
    """Vectors (n_users, d) that users are served with."""
    return state.user_factors if state.served is None else state.served


def public_inputs(state: FactorState, shards: ClientShards) -> Tensor:
    """Collect what a server knows of its users besides their vectors, shape (n_users, 3).

    The logarithm of the number of interactions, which clients send as their weight; whether the
    user took part; the logarithm of how often.
    """
    rows = torch.from_numpy(shards.user_rows).to(state.times_sampled)
    times = state.times_sampled
    return torch.stack([torch.log1p(rows), (times > 0).to(times.dtype), torch.log1p(times)], 1)


def _users(state: FactorState, shards: ClientShards, delegates: NDArray[np.int64]) -> Tensor:
    """Codes of the delegates' users, on the state's device."""
    return to_device(shards.users_of(delegates), state.user_factors.device)


def _written(
    state: FactorState, trained: Sequence[tuple[Tensor, Tensor]], in_place: bool
) -> Tensor:
    """Put vectors (U, d) into the users' places, once the round can no longer fail."""
    user_factors = state.user_factors if in_place else state.user_factors.clone()
    for users, vectors in trained:
        user_factors[users] = vectors
    return user_factors


def _counted(
    state: FactorState, shards: ClientShards, delegates: NDArray[np.int64], *, in_place: bool
) -> Tensor:
    """Return `times_sampled` after another round with these delegates."""
    times_sampled = state.times_sampled if in_place else state.times_sampled.clone()
    times_sampled[_users(state, shards, delegates)] += 1
    return times_sampled


def _taken(
    state: FactorState, delegates: NDArray[np.int64], *, in_place: bool
) -> NDArray[np.int64]:
    """Return `turns` after another round with these delegates."""
    turns = state.turns if in_place else state.turns.copy()
    turns[delegates] += 1
    return turns


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
