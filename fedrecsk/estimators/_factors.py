"""Run the rounds of a factor model and turn its state into fitted attributes.

Shared by every estimator whose model is user vectors times item vectors: each brings its own
round as a function, the rest is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.vocabulary import Vocabulary, distinct
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.rounds import EarlyStopping, Record, run_rounds
from fedrecsk.engine.shards import ClientShards, concatenate_ranges
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import (
    SCORE_K,
    Attributes,
    RoundWatch,
    check_somebody_delivered,
)
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.methods.factor_state import FactorState, Logs, served_factors
from fedrecsk.metrics.ranking import hits_of, ndcg_from_hits, top_k
from fedrecsk.models import ncf
from fedrecsk.models.ego_graph import EgoGraphs
from fedrecsk.models.factors import random_factors
from fedrecsk.models.head import Head, flat_head, head_of
from fedrecsk.models.whole_data import ServerStatistics

# Scores are shares or log-odds: beyond this, training had diverged before anybody noticed.
MEANINGLESS = 1e6
# Early stopping ranks at most this many users a round.
MAX_VALIDATION_USERS = 2_000

Step = Callable[[FactorState, int], tuple[FactorState, Logs]]
Refit = Callable[[FactorState, NDArray[np.int64]], Tensor]
State = TypeVar("State")
# Items of users in CSR form: offsets (n + 1,), and the items (nnz,) user by user.
Positives = tuple[Tensor, Tensor]


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

    def ndcg(
        self,
        users: Tensor,
        table: Tensor,
        head: Head,
        n_graph_layers: int = 0,
        *,
        item_propagation: bool = False,
    ) -> float:
        """Mean NDCG@20 of the validation users for user vectors (n_users, d) and a model."""
        chosen = torch.from_numpy(self.users).to(users.device)
        offsets, items = self.positives()
        scores = score_table(
            users[chosen],
            table,
            head,
            n_graph_layers=n_graph_layers,
            item_propagation=item_propagation,
            positives=(offsets.to(users.device), items.to(users.device)),
        )
        return float(self.ndcg_per_user(scores.cpu().numpy()).mean())

    def positives(self) -> Positives:
        """Training rows of the validation users."""
        counts = np.bincount(self.seen_rows, minlength=len(self.users))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return torch.from_numpy(offsets), torch.from_numpy(self.seen_items)

    def ndcg_per_user(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """NDCG@20 (m,) of scores (m, n_items) of the validation users; overwrites them."""
        scores[self.seen_rows, self.seen_items] = -np.inf
        k = min(SCORE_K, scores.shape[1])
        hits = hits_of(top_k(scores, k), self.truth)
        return ndcg_from_hits(hits, np.diff(self.truth.indptr), k)


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
    users = distinct(data.user[held])
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
    head: Head,
    n_graph_layers: int,
    item_propagation: bool,
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
        Of the start, see `FactorState.start`.
    n_graph_layers : int
        Over which a network's inputs are propagated.
    item_propagation : bool
        Whether items are, as well as users.
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
        users, table = take_over(users, table, data, previous)
        head = head_before(
            head, n_factors, n_graph_layers, previous, item_propagation=item_propagation
        )
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
            times_sampled=times_sampled_before(state.times_sampled, data, previous),
            statistics=_statistics_before(state, data, previous),
            clip_norms=_clip_norms_before(previous),
        )
    everybody = np.arange(shards.n_clients)

    def attributes(state: FactorState) -> Attributes:
        users = served_factors(state) if refit is None else refit(state, everybody)
        statistics = state.statistics
        evidence = torch.stack([statistics.counts, statistics.curvature], 1)
        return {
            **model_attributes(
                users,
                state.item_table,
                state.head,
                n_graph_layers,
                item_propagation=item_propagation,
            ),
            "times_sampled_": state.times_sampled.cpu().numpy().astype(np.int64),
            "item_evidence_": evidence.cpu().numpy(),
            "user_gram_": statistics.gram.cpu().numpy(),
            "user_gram_weight_": statistics.weight,
            "clip_norms_": np.zeros(0)
            if state.clip_norms is None
            else state.clip_norms.cpu().numpy().copy(),
        }

    stopping = None
    if validation is not None:
        holders = distinct(data.user_client[validation.users])

        def evaluate(state: FactorState) -> float:
            users = served_factors(state) if refit is None else refit(state, holders)
            return validation.ndcg(
                users,
                state.item_table,
                state.head,
                n_graph_layers,
                item_propagation=item_propagation,
            )

        stopping = EarlyStopping(evaluate=evaluate, n_iter_no_change=n_iter_no_change, tol=tol)
    return run_factors(
        watch,
        step=step,
        start=state,
        attributes=attributes,
        n_rounds=n_rounds,
        first_round=first_round,
        early_stopping=stopping,
    )


def run_factors(
    watch: RoundWatch,
    *,
    step: Callable[[State, int], tuple[State, Logs]],
    start: State,
    attributes: Callable[[State], Attributes],
    n_rounds: int,
    first_round: int,
    early_stopping: EarlyStopping[State] | None,
) -> Attributes:
    """Run rounds of a factor model, whatever its state, and say where they diverge.

    Parameters
    ----------
    watch : RoundWatch
    step : callable
        ``step(state, t) -> (state, logs)``.
    start
        The state before the first round.
    attributes : callable
        ``attributes(state) -> dict`` of fitted attributes, those of `model_attributes` among them.
    n_rounds, first_round : int
    early_stopping : EarlyStopping or None

    Returns
    -------
    dict
        The attributes of the final state, and ``history_``.
    """
    past = watch.load(start)
    round_now = first_round + (len(past.history) if past else 0)

    def round_begins() -> None:
        nonlocal round_now
        round_now += 1
        watch.begin()

    good: list[tuple[State, list[Record]]] = [(past.state, past.history)] if past else []

    def round_ended(state: State, record: Record) -> bool:
        good[:] = [(state, [*(good[0][1] if good else []), record])]
        return watch.end(record, lambda: attributes(state))

    try:
        result = run_rounds(
            step,
            start,
            n_rounds=n_rounds,
            first_round=first_round,
            past=past,
            early_stopping=early_stopping,
            save=watch.save,
            save_every=watch.save_every,
            on_round_begin=round_begins,
            on_round_end=round_ended,
        )
        fitted = attributes(result.state)
    except NoUsableUploadError:
        if good:
            state, history = good[0]
            watch.kept = _kept(attributes, state, history)
        raise
    # torch documents the name but does not list it for type checkers.
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        # Vectors so large, or so alike without a penalty, that the equations have no solution.
        raise _diverged("vectors cannot be solved for", round_now) from error
    if not _largest_score(fitted) < float(np.finfo(np.float32).max):
        raise _diverged("the scores are not finite", round_now)
    check_somebody_delivered(result.history, goes_on=first_round > 0)
    return {**fitted, "history_": result.history}


def _kept(
    attributes: Callable[[State], Attributes], state: State, history: list[Record]
) -> Attributes | None:
    """Give what a fit that an error ends leaves behind; None if nobody could be served with it."""
    try:
        fitted = attributes(state)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    usable = _largest_score(fitted) < MEANINGLESS
    return {**fitted, "history_": history} if usable else None


def _largest_score(fitted: Attributes) -> float:
    """Bound the scores from above; NaN if a factor is."""
    user, item, bias = (
        float(np.abs(fitted[name]).max(initial=0.0))
        for name in ("user_factors_", "item_factors_", "item_bias_")
    )
    n_factors = int(fitted["item_factors_"].shape[1])
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


def take_over(
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


def times_sampled_before(fresh: Tensor, data: Interactions, previous: Attributes) -> Tensor:
    """Count the rounds (n_users,) in which each user took part before; new users have none."""
    times = fresh.clone()
    codes, known = Vocabulary(previous["user_ids_"]).encode(data.users.ids)
    counted = previous["times_sampled_"][codes[known]]
    times[torch.from_numpy(known)] = torch.from_numpy(counted).to(times)
    return times


def head_before(
    head: Head,
    n_factors: int,
    n_graph_layers: int,
    previous: Attributes,
    *,
    item_propagation: bool = False,
) -> Head:
    """Put the previous head in the place of a fresh one."""
    flat = torch.tensor(previous["network_"])  # copies, see `_head`
    graph = (previous["n_graph_layers_"], previous["item_propagation_"])
    if len(flat) != len(flat_head(head)) or graph != (n_graph_layers, item_propagation):
        raise ValueError(
            "Cannot go on with another model than before: model, n_graph_layers or "
            "item_propagation changed since the last fit. Fit anew with warm_start=False."
        )
    old = head_of(flat, n_factors)
    return {name: old[name].to(value) for name, value in head.items()}


def _statistics_before(
    state: FactorState, data: Interactions, previous: Attributes
) -> ServerStatistics:
    """Put what the server knew of known items in their places; new items have no evidence."""
    fresh = state.statistics
    gram = torch.tensor(previous["user_gram_"]).to(fresh.gram)  # a copy, see `_head`
    if gram.shape != fresh.gram.shape:  # another objective, whose statistics mean other things
        return fresh
    codes, known = Vocabulary(previous["item_ids_"]).encode(data.items.ids)
    places = torch.from_numpy(known)
    counts, curvature = fresh.counts.clone(), fresh.curvature.clone()
    old = torch.from_numpy(previous["item_evidence_"][codes[known]]).to(counts)
    counts[places], curvature[places] = old[:, 0], old[:, 1]
    weight = float(previous["user_gram_weight_"])
    return replace(fresh, gram=gram, counts=counts, curvature=curvature, weight=weight)


def _clip_norms_before(previous: Attributes) -> Tensor | None:
    """Read what uploads were shortened to before, if they were."""
    norms = previous["clip_norms_"]
    return torch.from_numpy(norms.copy()) if len(norms) else None


def model_attributes(
    users: Tensor,
    item_table: Tensor,
    head: Head,
    n_graph_layers: int,
    *,
    item_propagation: bool = False,
) -> Attributes:
    """Turn a model into the fitted attributes that `score_factor_items` reads."""
    table, n_factors = item_table.cpu().numpy(), users.shape[1]
    bias = table[:, n_factors] if table.shape[1] > n_factors else np.zeros(len(table), table.dtype)
    return {
        # A copy: the rounds to come may write into the state.
        "user_factors_": users.cpu().numpy().copy(),
        "item_factors_": np.ascontiguousarray(table[:, :n_factors]),
        "item_bias_": np.ascontiguousarray(bias),
        "network_": flat_head(head).cpu().numpy(),
        "n_graph_layers_": n_graph_layers,
        "item_propagation_": item_propagation,
    }


def score_table(
    users: Tensor,
    table: Tensor,
    head: Head,
    *,
    n_graph_layers: int = 0,
    item_propagation: bool = False,
    positives: Positives | None = None,
) -> Tensor:
    """Scores (n, n_items) of all items for user vectors (n, d), whatever the model.

    Graph layers need the users' positives.
    """
    width = users.shape[1]
    bias = table.shape[1] > width
    if head:
        return ncf.score_items(
            users,
            table,
            head,
            item_bias=bias,
            n_graph_layers=n_graph_layers,
            item_propagation=item_propagation,
            positives=positives if n_graph_layers else None,
        )
    scores = users @ table[:, :width].T
    return scores + table[:, width] if bias else scores


def score_factor_items(estimator: Any, users: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scores (n, n_items) of all items; -1 is scored with the mean user vector."""
    vectors = _vectors(estimator, users)
    if len(estimator.network_):
        scores: NDArray[np.float32] = score_table(
            torch.from_numpy(vectors),
            torch.from_numpy(_table(estimator)),
            _head(estimator),
            n_graph_layers=estimator.n_graph_layers_,
            item_propagation=estimator.item_propagation_,
            positives=_seen_by(estimator, users),
        ).numpy()
        return scores
    scores = vectors @ estimator.item_factors_.T
    scores += estimator.item_bias_
    return scores


def score_factor_pairs(
    estimator: Any, users: NDArray[np.int64], items: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Scores (n,) pair by pair, in double precision: the same whatever else is in the batch."""
    if estimator.n_graph_layers_:
        return _network_scores(*_propagated(estimator, users, items), _head(estimator))
    vectors = _vectors(estimator, users).astype(np.float64)
    if len(estimator.network_):
        return _network_scores(vectors, _table(estimator)[items], _head(estimator))
    factors = estimator.item_factors_[items].astype(np.float64)
    scores: NDArray[np.float64] = np.einsum("nd,nd->n", vectors, factors)
    scores += estimator.item_bias_[items]
    return scores


def _propagated(
    estimator: Any, users: NDArray[np.int64], items: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vectors (n, d) and item rows (n, d + 1) of pairs after propagation over graph layers."""
    distinct, place = np.unique(users, return_inverse=True)
    table = torch.from_numpy(_table(estimator)).double()
    offsets, seen = _seen_by(estimator, distinct)
    graphs = EgoGraphs.of(
        torch.from_numpy(_vectors(estimator, distinct)).double(),
        table,
        offsets,
        seen,
        n_layers=estimator.n_graph_layers_,
        items=estimator.item_propagation_,
    )
    holder = np.repeat(np.arange(len(distinct)), np.diff(offsets.numpy()))
    is_positive = np.isin(place * len(table) + items, holder * len(table) + seen.numpy())
    vectors, rows = graphs.pairs(
        torch.from_numpy(place), table[torch.from_numpy(items)], torch.from_numpy(is_positive)
    )
    return vectors.numpy(), rows.numpy()


def _seen_by(estimator: Any, users: NDArray[np.int64]) -> Positives:
    """Items that users (n,) had in fit; -1 had none."""
    known = users[users >= 0]
    counts = np.zeros(len(users), dtype=np.int64)
    counts[users >= 0] = np.diff(estimator.seen_indptr_)[known]
    items = estimator.seen_indices_[concatenate_ranges(estimator.seen_indptr_, known)]
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])), torch.from_numpy(items)


def _network_scores(
    vectors: NDArray[np.float64], rows: NDArray[np.floating[Any]], head: Head
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


def _head(estimator: Any) -> Head:
    # A copy: the array of a memory-mapped model is read-only, which torch does not know.
    return head_of(torch.tensor(estimator.network_), estimator.user_factors_.shape[1])


def _vectors(estimator: Any, users: NDArray[np.int64]) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = estimator.user_factors_[users]
    if (users < 0).any():
        vectors[users < 0] = _crowd(estimator)
    return vectors


def _crowd(estimator: Any) -> NDArray[np.float32]:
    """Vector (d,) of somebody without interactions who is like the mean user."""
    n_layers = estimator.n_graph_layers_
    if not n_layers:
        mean: NDArray[np.float32] = estimator.user_factors_.mean(axis=0)
        return mean
    # The mean user as the network sees users, which are mostly their items. Copies, see `_head`.
    graphs = EgoGraphs.of(
        torch.tensor(estimator.user_factors_),
        torch.tensor(estimator.item_factors_),
        *_seen_by(estimator, np.arange(len(estimator.user_factors_))),
        n_layers=n_layers,
        items=False,
    )
    # Propagation shrinks a vector without neighbours by graphs.item.
    vector: NDArray[np.float32] = (graphs.users.mean(dim=0) / graphs.item).numpy()
    return vector


def logistic(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic function, stable for large arguments."""
    return 0.5 * (1.0 + np.tanh(0.5 * scores))
