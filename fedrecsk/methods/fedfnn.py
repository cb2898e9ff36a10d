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
by all delegates instead of by those that touched the row.

Where we deviate (only the abstract and summaries of the paper could be read):

- The literal method washes out what a user has learned: whoever took part once has a personal
  vector, and predictions know only the crowd. `gate` weights each prediction by the predictor's
  cross-validated R2 and by 1 / (1 + times the user took part).
- ``objective="whole-data"`` replaces sampled negatives by exact client solves and a quasi-Newton
  server step (`fedrecsk.models.whole_data`). Delegates' vectors are then optimal for the current
  table, the item update needs nothing of the subordinates, and predicted vectors are the
  server's guess for users it has not heard of.
- `refit`: every user may fit its own vector to its own data before inference, on its own device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.local import Moments, Optimizer, apply_gradients, init_moments
from fedrecsk.engine.mixing import RowSums, weighted_mean
from fedrecsk.engine.shards import ClientShards, Cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.traffic import dense_bytes, sparse_row_bytes
from fedrecsk.methods.meta_network import PredictorName, predict_updates
from fedrecsk.models import sampled_bce, whole_data

ItemWeighting = Literal["count", "magnitude", "interactions", "fedavg"]
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
        """Return the watch after a round with this loss."""
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
        The server's copy of the users' vectors.
    item_table : Tensor of shape (n_items, d) or (n_items, d + 1)
        With the item bias as the last column where there is one.
    times_sampled : Tensor of shape (n_users,)
        Rounds in which each user took part.
    moments : Moments
        Of the server optimiser.
    statistics : ServerStatistics
        Of the whole-data server step.
    watch : PredictionWatch
    first_round : int
        Number of the fit's first round; schedules count from there.
    """

    user_factors: Tensor
    item_table: Tensor
    times_sampled: Tensor
    moments: Moments
    statistics: whole_data.ServerStatistics
    watch: PredictionWatch
    first_round: int

    @classmethod
    def start(
        cls,
        user_factors: Tensor,
        item_table: Tensor,
        server_optimizer: Optimizer,
        *,
        first_round: int = 0,
    ) -> FactorState:
        """Return the state before the first round for given arrays."""
        n_items, n_factors = len(item_table), user_factors.shape[1]
        return cls(
            user_factors=user_factors,
            item_table=item_table,
            times_sampled=torch.zeros(len(user_factors), device=user_factors.device),
            moments=init_moments({"item": item_table}, server_optimizer),
            statistics=whole_data.ServerStatistics.zero(n_items, n_factors, item_table.device),
            watch=PredictionWatch(),
            first_round=first_round,
        )


def random_factors(
    n_users: int,
    n_items: int,
    n_factors: int,
    *,
    item_bias: bool,
    init_scale: float,
    streams: Streams,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Draw the start: normal vectors of standard deviation `init_scale`, bias zero.

    Returns
    -------
    user_factors : Tensor of shape (n_users, n_factors)
    item_table : Tensor of shape (n_items, n_factors + item_bias)
    """
    users = torch.randn(n_users, n_factors, generator=streams.torch("user_factors"))
    items = torch.randn(n_items, n_factors, generator=streams.torch("item_factors"))
    table = init_scale * items
    if item_bias:
        table = torch.cat([table, torch.zeros(n_items, 1)], dim=1)
    return (init_scale * users).to(device), table.to(device)


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
    server_optimizer: Optimizer,
) -> tuple[FactorState, Logs]:
    """Train the delegates with sampled-negative binary cross-entropy and aggregate.

    Parameters
    ----------
    state : FactorState
        Not changed.
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
    server_optimizer : Optimizer
        Takes the aggregated change as a negative gradient; plain SGD at rate 1 adds it.

    Returns
    -------
    state : FactorState
    logs : dict
    """
    table = state.item_table
    key = streams.key("examples", t)
    client_rows = shards.client_rows
    total_rows = float(max(client_rows[delegates].sum(), 1))
    numerator, denominator = torch.zeros_like(table), table.new_zeros(len(table), 1)
    user_factors = state.user_factors.clone()
    losses, n_examples = table.new_zeros(()), table.new_zeros(())
    n_private = torch.zeros((), dtype=torch.int64, device=table.device)
    for cohort in shards.chunks(delegates, rows_per_interaction=1 + n_negatives):
        result = sampled_bce.train(
            cohort,
            state.user_factors[cohort.users],
            table,
            item_bias=item_bias,
            n_negatives=n_negatives,
            batch_size=batch_size,
            local_epochs=local_epochs,
            optimizer=optimizer,
            l2=l2,
            key=key,
        )
        weight = _row_weights(result, item_weighting, cohort, client_rows, total_rows)
        sums = RowSums.of(result.row_items, len(table))
        numerator += sums.add(result.row_values, weight)
        denominator += sums.add(weight[:, None])
        user_factors[cohort.users] = result.user_vectors
        losses += result.losses.sum()
        n_examples += result.n_examples.sum()
        n_private += result.row_valid.sum()
    # Σ w (v_k - V) without the differences: one pass over the private rows less.
    numerator -= denominator * table
    mean = numerator if item_weighting == "fedavg" else weighted_mean(numerator, denominator[:, 0])
    moved, moments = apply_gradients(
        {"item": table}, {"item": -mean}, state.moments, denominator[:, 0] > 0, server_optimizer
    )
    loss = float(losses / n_examples.clamp_min(1))
    logs: Logs = {
        "loss": loss,
        "clients": len(delegates),
        "bytes_down": len(delegates) * dense_bytes(tuple(table.shape)),
        "bytes_up": sparse_row_bytes(int(n_private), table.shape[1]),
    }
    new = replace(
        state,
        user_factors=user_factors,
        item_table=moved["item"],
        moments=moments,
        times_sampled=_counted(state, shards, delegates),
    )
    return new, logs


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

    Returns
    -------
    state : FactorState
    logs : dict
    """
    items = state.item_table
    gram = items.T @ items
    mean_user_rows = len(shards.items) / shards.n_users
    user_factors = state.user_factors.clone()
    total = whole_data.Sums.zero(shards.n_items, items.shape[1], items.device)
    for cohort in shards.user_chunks(delegates):
        users = whole_data.solve_users(
            cohort,
            items,
            gram,
            unobserved_weight=unobserved_weight,
            penalty=penalty,
            mean_rows=mean_user_rows,
        )
        user_factors[cohort.users] = users
        total += whole_data.user_sums(
            cohort, users, items, gram, unobserved_weight=unobserved_weight
        )
    rate = server_learning_rate
    if rate is None:
        rate = whole_data.default_rate(total.n_users / shards.n_users, t - state.first_round)
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
    )
    d = items.shape[1]
    n_rows, width = int(shards.client_items[delegates].sum()), d + 1 + item_curvature
    logs: Logs = {
        "loss": float(total.loss) / max(total.n_rows, 1),
        "clients": len(delegates),
        "bytes_down": len(delegates) * dense_bytes(tuple(items.shape), (d, d)),
        # A row carries the pull on the item, its count and its curvature.
        "bytes_up": sparse_row_bytes(n_rows, width) + len(delegates) * dense_bytes((d, d)),
    }
    new = replace(
        state,
        user_factors=user_factors,
        item_table=moved,
        statistics=statistics,
        times_sampled=_counted(state, shards, delegates),
    )
    return new, logs


def prediction_step(
    before: FactorState,
    trained: FactorState,
    shards: ClientShards,
    delegates: NDArray[np.int64],
    t: int,
    *,
    loss: float,
    streams: Streams,
    predictor: PredictorName,
    discount: float,
    discount_decay: float,
    cv: int,
    patience: int,
    gate: bool,
    n_clusters: int,
) -> tuple[FactorState, Logs]:
    """Learn from the delegates' updates and move the subordinates: the second half of a round.

    Parameters
    ----------
    before, trained : FactorState
        Around the delegates' training, `bce_step` or `whole_data_step`; not changed.
    shards, delegates, t, streams
        As in `bce_step`.
    loss : float
        Of the round, for patience.
    predictor, cv, gate, n_clusters
        See `fedrecsk.methods.meta_network.predict_updates`.
    discount, discount_decay : float
        Predictions in the fit's round t are multiplied by ``discount * discount_decay**t``.
    patience : int
        Rounds without a lower loss after which prediction ends for good.

    Returns
    -------
    state : FactorState
    logs : dict
        ``prediction_active``, and while it is ``predictor_r2, predictor_cosine,
        predictor_candidate, predicted_share``.
    """
    watch = before.watch.after(loss, patience)
    new = replace(trained, watch=watch)
    logs: Logs = {"prediction_active": watch.active}
    if not watch.active:
        return new, logs
    users = _users(before, shards, delegates)
    is_delegate = torch.zeros(shards.n_users, dtype=torch.bool, device=users.device)
    is_delegate[users] = True
    others = torch.nonzero(~is_delegate)[:, 0]
    start = before.user_factors
    prediction = predict_updates(
        predictor,
        start[users],
        trained.user_factors[users] - start[users],
        start[others],
        cv=cv,
        gate=gate,
        n_clusters=n_clusters,
        seed=streams.key("meta_network", t) % (2**32),
    )
    logs["predictor_r2"] = prediction.r2
    logs["predictor_cosine"] = prediction.cosine
    logs["predictor_candidate"] = prediction.candidate
    logs["predicted_share"] = 0.0
    if prediction.deltas is None:
        return new, logs
    factor = discount * discount_decay ** (t - before.first_round)
    scale = start.new_full((len(others),), factor)
    if gate:
        scale *= min(prediction.r2, 1.0) / (1.0 + before.times_sampled[others])
    user_factors = new.user_factors.clone()
    user_factors[others] = start[others] + scale[:, None] * prediction.deltas
    logs["predicted_share"] = len(others) / shards.n_users
    return replace(new, user_factors=user_factors), logs


def _users(state: FactorState, shards: ClientShards, delegates: NDArray[np.int64]) -> Tensor:
    """Codes of the delegates' users, on the state's device."""
    return torch.from_numpy(shards.users_of(delegates)).to(state.user_factors.device)


def _counted(state: FactorState, shards: ClientShards, delegates: NDArray[np.int64]) -> Tensor:
    """Return `times_sampled` after another round with these delegates."""
    times_sampled = state.times_sampled.clone()
    times_sampled[_users(state, shards, delegates)] += 1
    return times_sampled


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
    rows = torch.from_numpy(client_rows[cohort.clients]).to(valid)
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
    for cohort in shards.user_chunks(clients):
        users[cohort.users] = whole_data.solve_users(
            cohort,
            items,
            gram,
            unobserved_weight=unobserved_weight,
            penalty=penalty,
            mean_rows=mean_rows,
        )
    return users


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
) -> Tensor:
    """Return user vectors (n_users, d) with those of `clients` fitted to the final table."""
    users = state.user_factors.clone()
    key = streams.key("refit")
    for cohort in shards.user_chunks(clients, rows_per_interaction=1 + n_negatives):
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
    return users
