"""The state of a federated factor model, and what all ways to train it share.

`bce_rounds` trains it on sampled negatives, `whole_data_rounds` solves for it, and `fedfnn`
predicts the vectors of those who were not asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device
from fedrecsk.engine.local import Moments, Optimizer, init_moments
from fedrecsk.engine.mixing import mean_rows
from fedrecsk.engine.sampling import (
    epoch_cohort,
    poisson_cohort,
    stratified_cohort,
    uniform_cohort,
)
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uploads import Residual
from fedrecsk.methods.meta_network import cluster_labels
from fedrecsk.models import whole_data
from fedrecsk.models.head import Head, lifted

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
            head_moments=init_moments(lifted(head), plain) if head else None,
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


def served_factors(state: FactorState) -> Tensor:
    """Vectors (n_users, d) that users are served with."""
    return state.user_factors if state.served is None else state.served


def users_of(state: FactorState, shards: ClientShards, delegates: NDArray[np.int64]) -> Tensor:
    """Codes of the delegates' users, on the state's device."""
    return to_device(shards.users_of(delegates), state.user_factors.device)


def counted_times(
    state: FactorState, shards: ClientShards, delegates: NDArray[np.int64], *, in_place: bool
) -> Tensor:
    """Return `times_sampled` after another round with these delegates."""
    times_sampled = state.times_sampled if in_place else state.times_sampled.clone()
    times_sampled[users_of(state, shards, delegates)] += 1
    return times_sampled
