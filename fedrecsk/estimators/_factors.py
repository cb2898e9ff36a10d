"""Run the rounds of a factor model and turn its state into fitted attributes.

Shared by every estimator whose model is user vectors times item vectors: each brings its own
round as a function, the rest is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.rounds import EarlyStopping, Record, run_rounds
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import SCORE_K, Attributes, RoundWatch
from fedrecsk.methods.fedfnn import FactorState, Logs, random_factors, served_factors
from fedrecsk.metrics.ranking import hits_of, ndcg_from_hits, top_k
from fedrecsk.models import ncf
from fedrecsk.models.whole_data import ServerStatistics

# Early stopping ranks at most this many users a round.
MAX_VALIDATION_USERS = 2_000

Step = Callable[[FactorState, int], tuple[FactorState, Logs]]
Refit = Callable[[FactorState, NDArray[np.int64]], Tensor]


@dataclass(frozen=True, eq=False)
class Validation:
    """Rows held out of training to watch the ranking.

    Attributes
    ----------
    users : ndarray of shape (m,)
        User codes with held-out rows.
    truth : csr_array of shape (m, n_items)
    seen_rows, seen_items : ndarray
        Training rows of these users, as places in an (m, n_items) table.
    """

    users: NDArray[np.int64]
    truth: Any
    seen_rows: NDArray[np.int64]
    seen_items: NDArray[np.int64]

    def ndcg(self, users: Tensor, state: FactorState) -> float:
        """Mean NDCG@20 of the validation users for user vectors (n_users, d) and a state."""
        chosen = torch.from_numpy(self.users).to(users.device)
        array = score_table(users[chosen], state.item_table, state.head).cpu().numpy()
        array[self.seen_rows, self.seen_items] = -np.inf
        k = min(SCORE_K, array.shape[1])
        hits = hits_of(top_k(array, k), self.truth)
        return float(ndcg_from_hits(hits, np.diff(self.truth.indptr), k).mean())


def hold_out(
    data: Interactions, fraction: float, streams: Streams
) -> tuple[NDArray[np.bool_], Validation]:
    """Set aside a random share of every user's rows; users keep at least one for training.

    Returns
    -------
    train : ndarray of shape (n,), bool
    validation : Validation
    """
    rng = streams.numpy("validation")
    order = np.lexsort((rng.random(len(data)), data.user))
    counts = data.user_counts
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(data), dtype=np.int64)
    rank[order] = np.arange(len(data)) - starts[data.user[order]]
    share = np.minimum(np.ceil(fraction * counts), counts - 1)
    held = rank < share[data.user]
    users = np.unique(data.user[held])
    if len(users) == 0:
        raise ValueError(
            "early_stopping=True needs users with at least two interactions to hold some out; "
            "every user here has one. Set early_stopping=False."
        )
    if len(users) > MAX_VALIDATION_USERS:
        users = np.sort(rng.choice(users, MAX_VALIDATION_USERS, replace=False))
    seen = data.matrix()
    table = seen[users]
    mask = np.zeros(data.n_users, dtype=bool)
    mask[users] = True
    truth = type(seen)(
        (np.ones(int(held.sum()), dtype=bool), (data.user[held], data.item[held])),
        shape=seen.shape,
    )[users]
    # Seen are the users' rows without the held-out ones.
    kept = (table - truth.astype(np.float32)).tocsr()
    kept.eliminate_zeros()
    rows, items = (axis.astype(np.int64) for axis in kept.nonzero())
    return ~held, Validation(users=users, truth=truth, seen_rows=rows, seen_items=items)


def fit_factors(
    data: Interactions,
    watch: RoundWatch,
    *,
    step: Step,
    refit: Refit | None,
    n_factors: int,
    item_bias: bool,
    init_scale: float,
    server_optimizer: Optimizer | None,
    head: ncf.Head,
    n_rounds: int,
    validation: Validation | None,
    shards: ClientShards,
    n_iter_no_change: int,
    tol: float,
    streams: Streams,
    previous: Attributes | None,
) -> Attributes:
    """Run rounds of `step` from random or previous factors.

    Parameters
    ----------
    data : Interactions
    watch : RoundWatch
    step : callable
        ``step(state, t) -> (state, logs)``.
    refit : callable or None
        ``refit(state, clients) -> user vectors``: what users do on their own devices
        before inference.
    n_factors, item_bias, init_scale, server_optimizer, head
        Of the start, see `fedrecsk.methods.fedfnn`.
    n_rounds : int
    validation : Validation or None
        With early stopping.
    shards : ClientShards
        The training rows.
    n_iter_no_change, tol
        Of early stopping.
    streams : Streams
    previous : dict or None
        Fitted attributes to go on from.

    Returns
    -------
    dict
        ``user_factors_, item_factors_, item_bias_, history_`` and diagnostics.
    """
    users, table = random_factors(
        data.n_users,
        data.n_items,
        n_factors,
        item_bias=item_bias,
        init_scale=init_scale,
        streams=streams,
        device=shards.device,
    )
    first_round = 0
    if previous is not None:
        users, table = _take_over(users, table, data, previous)
        head = _head_before(head, n_factors, previous)
        first_round = int(previous["n_rounds_"])
    state = FactorState.start(
        users,
        table,
        server_optimizer,
        n_clients=shards.n_clients,
        head=head,
        first_round=first_round,
    )
    if previous is not None:
        state = replace(
            state,
            times_sampled=_times_sampled_before(state, data, previous),
            statistics=_statistics_before(state, data, previous),
        )
    everybody = np.arange(shards.n_clients)
    round_now = first_round

    def attributes(state: FactorState) -> Attributes:
        users = served_factors(state) if refit is None else refit(state, everybody)
        return _fitted(users, state, n_factors)

    stopping = None
    if validation is not None:
        holders = np.unique(data.user_client[validation.users])

        def evaluate(state: FactorState) -> float:
            users = served_factors(state) if refit is None else refit(state, holders)
            return validation.ndcg(users, state)

        stopping = EarlyStopping(evaluate=evaluate, n_iter_no_change=n_iter_no_change, tol=tol)

    def round_begins() -> None:
        nonlocal round_now
        round_now += 1
        watch.begin()

    def round_ended(state: FactorState, record: Record) -> bool:
        return watch.end(record, lambda: attributes(state))

    try:
        result = run_rounds(
            step,
            state,
            n_rounds=n_rounds,
            first_round=first_round,
            early_stopping=stopping,
            on_round_begin=round_begins,
            on_round_end=round_ended,
        )
        fitted = attributes(result.state)
    # torch documents the name but does not list it for type checkers.
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        # Vectors so large, or so alike without a penalty, that the equations have no solution.
        raise _diverged("vectors cannot be solved for", round_now) from error
    if not _largest_score(fitted, n_factors) < float(np.finfo(np.float32).max):
        raise _diverged("the scores are not finite", round_now)
    return {**fitted, "history_": result.history}


def _largest_score(fitted: Attributes, n_factors: int) -> float:
    """Bound the scores from above; NaN if a factor is."""
    user, item, bias = (
        float(np.abs(fitted[name]).max(initial=0.0))
        for name in ("user_factors_", "item_factors_", "item_bias_")
    )
    return n_factors * user * item + bias


def _diverged(what: str, round_now: int) -> FloatingPointError:
    return FloatingPointError(
        f"Training diverged: {what} in round {round_now}. Lower learning_rate or "
        "server_learning_rate, or raise l2."
    )


def make_shards(
    data: Interactions, rows: NDArray[np.bool_] | slice, device: torch.device
) -> ClientShards:
    """Put (some rows of) coded data on the device."""
    return ClientShards.from_codes(
        data.user[rows], data.item[rows], data.user_client, data.n_clients, data.n_items, device
    )


def _take_over(
    users: Tensor, table: Tensor, data: Interactions, previous: Attributes
) -> tuple[Tensor, Tensor]:
    """Put previous factors in the places of known ids; new ids keep their random start."""
    old_items = previous["item_factors_"]
    if table.shape[1] > old_items.shape[1]:
        old_items = np.column_stack([old_items, previous["item_bias_"]])
    for new, old, ids, old_ids in (
        (users, previous["user_factors_"], data.users.ids, previous["user_ids_"]),
        (table, old_items, data.items.ids, previous["item_ids_"]),
    ):
        if new.shape[1] != old.shape[1]:
            raise ValueError(
                f"Cannot go on from {old.shape[1]} columns with {new.shape[1]}: n_factors or "
                "item_bias changed since the last fit. Fit anew with warm_start=False."
            )
        codes, known = Vocabulary(old_ids).encode(ids)
        new[torch.from_numpy(known)] = torch.from_numpy(old[codes[known]]).to(new)
        if new is table and new.shape[1] > users.shape[1]:
            # A bias of zero would rank above everything that is trained; nobody knows better.
            new[torch.from_numpy(~known), -1] = float(previous["item_bias_"].mean())
    return users, table


def _times_sampled_before(state: FactorState, data: Interactions, previous: Attributes) -> Tensor:
    """Count the rounds (n_users,) in which each user took part before; new users have none."""
    times = state.times_sampled.clone()
    codes, known = Vocabulary(previous["user_ids_"]).encode(data.users.ids)
    counted = previous["times_sampled_"][codes[known]]
    times[torch.from_numpy(known)] = torch.from_numpy(counted).to(times)
    return times


def _head_before(head: ncf.Head, n_factors: int, previous: Attributes) -> ncf.Head:
    """Put the previous head in the place of a fresh one."""
    flat = torch.from_numpy(previous["network_"])
    if len(flat) != len(ncf.flat_head(head)):
        raise ValueError(
            "Cannot go on with another model than before: model changed since the last fit. Fit "
            "anew with warm_start=False."
        )
    old = ncf.head_of(flat, n_factors)
    return {name: old[name].to(value) for name, value in head.items()}


def _statistics_before(
    state: FactorState, data: Interactions, previous: Attributes
) -> ServerStatistics:
    """Put what the server knew of known items in their places; new items have no evidence."""
    fresh = state.statistics
    gram = torch.from_numpy(previous["user_gram_"]).to(fresh.gram)
    if gram.shape != fresh.gram.shape:  # another objective, whose statistics mean other things
        return fresh
    codes, known = Vocabulary(previous["item_ids_"]).encode(data.items.ids)
    places = torch.from_numpy(known)
    counts, curvature = fresh.counts.clone(), fresh.curvature.clone()
    old = torch.from_numpy(previous["item_evidence_"][codes[known]]).to(counts)
    counts[places], curvature[places] = old[:, 0], old[:, 1]
    weight = float(previous["user_gram_weight_"])
    return replace(fresh, gram=gram, counts=counts, curvature=curvature, weight=weight)


def _fitted(users: Tensor, state: FactorState, n_factors: int) -> Attributes:
    statistics = state.statistics
    table = state.item_table.cpu().numpy()
    bias = table[:, n_factors] if table.shape[1] > n_factors else np.zeros(len(table), table.dtype)
    return {
        "user_factors_": users.cpu().numpy(),
        "item_factors_": np.ascontiguousarray(table[:, :n_factors]),
        "item_bias_": np.ascontiguousarray(bias),
        "times_sampled_": state.times_sampled.cpu().numpy().astype(np.int64),
        "network_": ncf.flat_head(state.head).cpu().numpy(),
        "item_evidence_": torch.stack([statistics.counts, statistics.curvature], 1).cpu().numpy(),
        "user_gram_": statistics.gram.cpu().numpy(),
        "user_gram_weight_": statistics.weight,
    }


def score_table(users: Tensor, table: Tensor, head: ncf.Head) -> Tensor:
    """Scores (n, n_items) of all items for user vectors (n, d), whatever the model."""
    width = users.shape[1]
    bias = table.shape[1] > width
    if head:
        return ncf.score_items(users, table, head, item_bias=bias)
    scores = users @ table[:, :width].T
    return scores + table[:, width] if bias else scores


def score_factor_items(estimator: Any, users: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scores (n, n_items) of all items; -1 is scored with the mean user vector."""
    vectors = _vectors(estimator, users)
    if len(estimator.network_):
        scores: NDArray[np.float32] = ncf.score_items(
            torch.from_numpy(vectors),
            torch.from_numpy(_table(estimator)),
            _head(estimator),
            item_bias=True,
        ).numpy()
        return scores
    scores = vectors @ estimator.item_factors_.T
    scores += estimator.item_bias_
    return scores


def score_factor_pairs(
    estimator: Any, users: NDArray[np.int64], items: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Scores (n,) pair by pair, in double precision: the same whatever else is in the batch."""
    vectors = _vectors(estimator, users).astype(np.float64)
    if len(estimator.network_):
        return _network_scores(vectors, _table(estimator)[items], _head(estimator))
    factors = estimator.item_factors_[items].astype(np.float64)
    scores: NDArray[np.float64] = np.einsum("nd,nd->n", vectors, factors)
    scores += estimator.item_bias_[items]
    return scores


def _network_scores(
    vectors: NDArray[np.float64], rows: NDArray[np.float32], head: ncf.Head
) -> NDArray[np.float64]:
    """Scores (n,) of the network; einsum, since a matrix product rounds as its shape has it."""
    width = vectors.shape[1]
    signal = np.concatenate([vectors, rows[:, :width]], axis=1)
    n_layers = len(head) // 2
    for number in range(n_layers):
        weight, bias = (head[f"{kind}_{number}"].double().numpy() for kind in ("weight", "bias"))
        signal = np.einsum("nk,kh->nh", signal, weight) + bias
        if number < n_layers - 1:
            signal = np.maximum(signal, 0.0)
    scores: NDArray[np.float64] = signal[:, 0] + rows[:, width]
    return scores


def _table(estimator: Any) -> NDArray[np.float32]:
    """Item vectors with the bias as the last column."""
    return np.column_stack([estimator.item_factors_, estimator.item_bias_])


def _head(estimator: Any) -> ncf.Head:
    # A copy: the array of a memory-mapped model is read-only, which torch does not know.
    return ncf.head_of(torch.tensor(estimator.network_), estimator.user_factors_.shape[1])


def _vectors(estimator: Any, users: NDArray[np.int64]) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = estimator.user_factors_[users]
    if (users < 0).any():
        vectors[users < 0] = estimator.user_factors_.mean(axis=0)
    return vectors


def logistic(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic function, stable for large arguments."""
    return 0.5 * (1.0 + np.tanh(0.5 * scores))
