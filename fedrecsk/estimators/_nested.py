"""Run the rounds of a federation of several sizes, and score with what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.engine.rounds import EarlyStopping
from fedrecsk.engine.shards import concatenate_ranges
from fedrecsk.estimators._base import Attributes, RoundWatch
from fedrecsk.estimators._factors import (
    Validation,
    run_factors,
    score_factor_items,
    score_factor_pairs,
    score_table,
)
from fedrecsk.estimators._sizes import Assignment
from fedrecsk.methods.nested_state import Logs, NestedState, PrivateModels, Sizes, client_parameters
from fedrecsk.models.head import flat_head, head_of, network_size
from fedrecsk.models.whole_data import ServerStatistics

Step = Callable[[NestedState, int], tuple[NestedState, Logs]]
Serve = Callable[[NestedState, NDArray[np.int64]], Tensor]


def fit_nested(
    data: Interactions,
    watch: RoundWatch,
    *,
    step: Step,
    serve: Serve,
    start: NestedState,
    sizes: Sizes,
    assignment: Assignment,
    dual_task: bool,
    n_graph_layers: int,
    item_propagation: bool,
    n_rounds: int,
    first_round: int,
    validation: Validation | None,
    n_iter_no_change: int,
    tol: float,
) -> Attributes:
    """Run rounds of `step` from a start.

    Parameters
    ----------
    data : Interactions
    watch : RoundWatch
    step : callable
        ``step(state, t) -> (state, logs)``.
    serve : callable
        ``serve(state, clients) -> user vectors``: what the users of these clients are served
        with; the vectors of others are not looked at.
    start : NestedState
    sizes : Sizes
    assignment : Assignment
    dual_task : bool
    n_graph_layers : int
    item_propagation : bool
    n_rounds, first_round : int
    validation : Validation or None
        With early stopping.
    n_iter_no_change, tol
        Of early stopping.

    Returns
    -------
    dict
        Fitted attributes.
    """
    everybody = np.arange(data.n_clients)
    parameters = client_parameters(start, dual_task=dual_task)
    fixed: Attributes = {
        "client_sizes_": assignment.columns,
        "client_groups_": assignment.group,
        "client_parameters_": parameters[sizes.of_client],
        "user_sizes_": assignment.columns[data.user_client],
        "user_clients_": data.user_client,
        "group_sizes_": np.array(assignment.sizes, dtype=np.int64),
        "group_ratio_": np.array(assignment.ratio),
        "sizes_": np.array(sizes.widths, dtype=np.int64),
        "n_graph_layers_": n_graph_layers,
        "item_propagation_": item_propagation,
    }

    def attributes(state: NestedState) -> Attributes:
        return {**fixed, **_fitted(serve(state, everybody), state, sizes)}

    stopping = None
    if validation is not None:
        holders = np.unique(data.user_client[validation.users])
        place = sizes.of_client[data.user_client[validation.users]]

        def evaluate(state: NestedState) -> float:
            vectors = serve(state, holders)[torch.from_numpy(validation.users)]
            scores = np.empty((len(vectors), data.n_items), dtype=np.float32)
            offsets, items = (part.numpy() for part in validation.positives())
            for x, width in enumerate(sizes.widths):
                rows = np.flatnonzero(place == x)
                starts = np.concatenate([[0], np.cumsum(np.diff(offsets)[rows])])
                seen = items[concatenate_ranges(offsets, rows)]
                scores[rows] = score_table(
                    vectors[torch.from_numpy(rows), :width],
                    state.tables[x],
                    state.heads[x] if state.heads else {},
                    n_graph_layers=n_graph_layers,
                    item_propagation=item_propagation,
                    positives=(
                        torch.from_numpy(starts).to(vectors.device),
                        torch.from_numpy(seen).to(vectors.device),
                    ),
                ).cpu()
            return float(validation.ndcg_per_user(scores).mean())

        stopping = EarlyStopping(evaluate=evaluate, n_iter_no_change=n_iter_no_change, tol=tol)

    fitted = run_factors(
        watch,
        step=step,
        start=start,
        attributes=attributes,
        n_rounds=n_rounds,
        first_round=first_round,
        early_stopping=stopping,
    )
    # The largest size is looked at already; clustered or alone, another may go astray by itself.
    for name in ("item_tables_", "item_biases_", "network_", "private_rows_", "private_networks_"):
        if not np.isfinite(fitted[name]).all():
            raise FloatingPointError(
                "Training diverged: a smaller or a private model is not finite in round "
                f"{first_round + len(fitted['history_'])}. Lower learning_rate or "
                "server_learning_rate, or raise l2."
            )
    return fitted


def _fitted(users: Tensor, state: NestedState, sizes: Sizes) -> Attributes:
    """Put a state into arrays; narrower tables are filled up with zeros."""
    widest = sizes.widths[-1]
    n_items = len(state.tables[0])
    tables = np.zeros((len(state.tables), n_items, widest), dtype=np.float32)
    biases = np.zeros((len(state.tables), n_items), dtype=np.float32)
    for x, (table, width) in enumerate(zip(state.tables, sizes.widths, strict=True)):
        array = table.cpu().numpy()
        tables[x, :, :width] = array[:, :width]
        if array.shape[1] > width:
            biases[x] = array[:, width]
    network = torch.cat([flat_head(head) for head in state.heads] or [torch.zeros(0)])
    grams = np.zeros((len(state.statistics), widest, widest), dtype=np.float32)
    for grams_x, statistics in zip(grams, state.statistics, strict=True):
        width = len(statistics.gram)
        grams_x[:width, :width] = statistics.gram.cpu().numpy()
    evidence = [torch.stack([s.counts, s.curvature], 1).cpu().numpy() for s in state.statistics]
    return {
        "user_factors_": users.cpu().numpy(),
        "item_factors_": tables[-1].copy(),
        "item_bias_": biases[-1].copy(),
        "item_tables_": tables,
        "item_biases_": biases,
        "network_": network.cpu().numpy(),
        "item_evidence_": np.array(evidence, dtype=np.float32).reshape(-1, n_items, 2),
        "user_gram_": grams,
        "user_gram_weight_": np.array([s.weight for s in state.statistics]),
        **_private(state.private, widest),
    }


def _private(private: PrivateModels | None, widest: int) -> Attributes:
    """Give the rows of clients that share nothing; empty in a federation."""
    if private is None:
        none = np.zeros(0, dtype=np.int64)
        private = PrivateModels(
            none, none, np.zeros((0, widest + 1), np.float32), np.zeros((0, 0), np.float32)
        )
    return {
        "private_indptr_": private.indptr,
        "private_items_": private.items,
        "private_rows_": private.rows,
        "private_networks_": private.networks,
    }


# Going on ---------------------------------------------------------------------------------------


def take_over(
    start: NestedState,
    data: Interactions,
    sizes: Sizes,
    previous: Attributes,
    *,
    group_sizes: Sequence[int],
    n_graph_layers: int,
    item_propagation: bool,
) -> NestedState:
    """Put what an earlier fit left in the places of known users and items.

    New ones keep their random start, and so do the columns of a client that has grown. A size
    that nobody had before, as there were too few clients, takes its first columns from the widest.
    """
    if set(previous["group_sizes_"].tolist()) != set(group_sizes):
        raise ValueError(
            f"Cannot go on from sizes {tuple(previous['group_sizes_'].tolist())} with "
            f"{tuple(group_sizes)}. Fit anew with warm_start=False."
        )
    graph = (previous["n_graph_layers_"], previous["item_propagation_"])
    if (len(previous["network_"]) > 0) != bool(start.heads) or graph != (
        n_graph_layers,
        item_propagation,
    ):
        raise ValueError(
            "Cannot go on with another model than before: base_model, n_graph_layers or "
            "item_propagation changed since the last fit. Fit anew with warm_start=False."
        )
    codes, known = Vocabulary(previous["user_ids_"]).encode(data.users.ids)
    own = np.array(sizes.widths)[sizes.of_client[data.user_client]]
    kept = np.zeros(len(own), dtype=np.int64)
    kept[known] = np.minimum(own[known], previous["user_sizes_"][codes[known]])
    old = np.zeros((len(own), sizes.widths[-1]), dtype=np.float32)
    common = previous["user_factors_"][codes[known], : old.shape[1]]
    old[known, : common.shape[1]] = common
    inside = torch.from_numpy(np.arange(sizes.widths[-1]) < kept[:, None])
    users = torch.where(
        inside.to(start.user_factors.device),
        torch.from_numpy(old).to(start.user_factors),
        start.user_factors,
    )
    codes, known = Vocabulary(previous["item_ids_"]).encode(data.items.ids)
    places, codes = torch.from_numpy(np.flatnonzero(known)), codes[known]
    tables = []
    before: list[int] = previous["sizes_"].tolist()
    for table, width in zip(start.tables, sizes.widths, strict=True):
        y = before.index(width) if width in before else -1
        new, bias = table.clone(), previous["item_biases_"][y]
        common = previous["item_tables_"][y][codes, : min(width, before[y])]
        new[places, : common.shape[1]] = torch.from_numpy(common).to(new)
        if new.shape[1] > width:
            # A bias of zero would rank above everything that is trained; nobody knows better.
            new[:, width] = float(bias.mean())
            new[places, width] = torch.from_numpy(bias[codes]).to(new)
        tables.append(new)
    networks = dict(zip(before, split_networks(previous), strict=True))
    return replace(
        start,
        user_factors=users,
        tables=tuple(tables),
        heads=tuple(
            {n: v.to(like[n]) for n, v in head_of(torch.tensor(networks[width]), width).items()}
            if width in networks
            else like
            for like, width in zip(start.heads, sizes.widths, strict=False)
        ),
        statistics=_statistics_before(start, places, codes, previous),
    )


def _statistics_before(
    start: NestedState, places: Tensor, codes: NDArray[np.int64], previous: Attributes
) -> tuple[ServerStatistics, ...]:
    """Put what the server knew of known items in their places; new items have no evidence."""
    # Narrower blocks are filled up with zeros, and blocks have other columns than before where the
    # sizes have changed, or the aggregation.
    before = [np.count_nonzero(np.diagonal(gram)) for gram in previous["user_gram_"]]
    now = [len(fresh.gram) for fresh in start.statistics]
    known = previous["user_gram_weight_"] > 0
    if len(before) != len(now) or any(
        there and old != new for there, old, new in zip(known, before, now, strict=True)
    ):
        return start.statistics
    statistics = []
    for x, fresh in enumerate(start.statistics):
        counts, curvature, width = fresh.counts.clone(), fresh.curvature.clone(), len(fresh.gram)
        old = torch.from_numpy(previous["item_evidence_"][x][codes]).to(counts)
        counts[places], curvature[places] = old[:, 0], old[:, 1]
        gram = torch.tensor(previous["user_gram_"][x][:width, :width]).to(fresh.gram)
        weight = float(previous["user_gram_weight_"][x])
        statistics.append(ServerStatistics(gram, counts, curvature, weight))
    return tuple(statistics)


def split_networks(fitted: Attributes) -> list[NDArray[np.float32]]:
    """Cut the weights of all sizes' predictors apart; empty ones for a linear model."""
    weights: NDArray[np.float32] = fitted["network_"]
    if not len(weights):
        return [weights] * len(fitted["sizes_"])
    ends = np.cumsum([network_size(width) for width in fitted["sizes_"].tolist()])
    return np.split(weights, ends[:-1])


# Scoring ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SizeModel:
    """The model that clients of one size are served with, under the names of fitted attributes.

    So everything that scores a factor model scores this.

    Attributes
    ----------
    user_factors_ : ndarray of shape (n_users, N)
    item_factors_ : ndarray of shape (n_items, N)
    item_bias_ : ndarray of shape (n_items,)
    network_ : ndarray of shape (P,)
    n_graph_layers_ : int
    item_propagation_ : bool
    seen_indptr_, seen_indices_ : ndarray
    """

    user_factors_: NDArray[np.float32]
    item_factors_: NDArray[np.float32]
    item_bias_: NDArray[np.float32]
    network_: NDArray[np.float32]
    n_graph_layers_: int
    item_propagation_: bool
    seen_indptr_: NDArray[np.int64]
    seen_indices_: NDArray[np.int64]


def score_nested_items(estimator: Any, users: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scores (n, n_items) of all items, each user in its own size.

    -1 is scored with the mean user in the smallest size, in which everybody has a part.
    """
    scores = np.empty((len(users), len(estimator.item_ids_)), dtype=np.float32)
    for rows, model in _by_size(estimator, users):
        scores[rows] = score_factor_items(model, users[rows])
    return scores


def score_nested_pairs(
    estimator: Any, users: NDArray[np.int64], items: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Scores (n,) pair by pair, in double precision."""
    scores = np.empty(len(users))
    for rows, model in _by_size(estimator, users):
        scores[rows] = score_factor_pairs(model, users[rows], items[rows])
    return scores


def _by_size(
    estimator: Any, users: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], SizeModel]]:
    """Give the places of the users of each size, and their model."""
    own = np.where(users < 0, estimator.sizes_[0], estimator.user_sizes_[users])
    if len(estimator.private_indptr_):
        yield from _alone(estimator, users)
        return
    networks = split_networks(vars(estimator))
    for x, width in enumerate(estimator.sizes_.tolist()):
        rows = np.flatnonzero(own == width)
        if len(rows):
            yield (
                rows,
                SizeModel(
                    user_factors_=estimator.user_factors_[:, :width],
                    item_factors_=estimator.item_tables_[x][:, :width],
                    item_bias_=estimator.item_biases_[x],
                    network_=networks[x],
                    n_graph_layers_=estimator.n_graph_layers_,
                    item_propagation_=estimator.item_propagation_,
                    seen_indptr_=estimator.seen_indptr_,
                    seen_indices_=estimator.seen_indices_,
                ),
            )


def _alone(
    estimator: Any, users: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], SizeModel]]:
    """Give the places of each client's users, and the client's own model; the crowd the start."""
    shared = split_networks(vars(estimator))
    client = np.where(users < 0, -1, estimator.user_clients_[users])
    for number in np.unique(client):
        width = int(estimator.sizes_[0] if number < 0 else estimator.client_sizes_[number])
        x = int(np.searchsorted(estimator.sizes_, width))
        factors = estimator.item_tables_[x][:, :width]
        bias, network = estimator.item_biases_[x], shared[x]
        if number >= 0:
            own = slice(*estimator.private_indptr_[number : number + 2])
            items = estimator.private_items_[own]
            factors, bias = factors.copy(), bias.copy()
            factors[items] = estimator.private_rows_[own, :width]
            bias[items] = estimator.private_rows_[own, -1]
            network = estimator.private_networks_[number, : len(network)]
        yield (
            np.flatnonzero(client == number),
            SizeModel(
                user_factors_=estimator.user_factors_[:, :width],
                item_factors_=factors,
                item_bias_=bias,
                network_=network,
                n_graph_layers_=estimator.n_graph_layers_,
                item_propagation_=estimator.item_propagation_,
                seen_indptr_=estimator.seen_indptr_,
                seen_indices_=estimator.seen_indices_,
            ),
        )
