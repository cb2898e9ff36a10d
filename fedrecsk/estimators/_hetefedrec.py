"""The estimator around `fedrecsk.methods.hetefedrec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedrecsk.data.interactions import Interactions
from fedrecsk.engine.attacks import AttackName
from fedrecsk.engine.compression import CompressionName
from fedrecsk.engine.defences import DefenceName
from fedrecsk.engine.device import resolve_device, torch_threads
from fedrecsk.engine.local import Optimizer, OptimizerName
from fedrecsk.engine.participation import (
    Availability,
    ClientSeconds,
    Participation,
    read_participation,
)
from fedrecsk.engine.sampling import cohort_size, epoch_cohort, uniform_cohort
from fedrecsk.engine.shards import CPU_CHUNK_ROWS, ClientShards, Cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uplink import Uplink
from fedrecsk.estimators._base import Attributes, BaseRecommender, RoundWatch
from fedrecsk.estimators._factors import hold_out, make_shards
from fedrecsk.estimators._fedfnn import FACTOR_CONSTRAINTS, factor_probability
from fedrecsk.estimators._nested import (
    fit_nested,
    score_nested_items,
    score_nested_pairs,
    take_over,
)
from fedrecsk.estimators._sizes import assign_sizes
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions
from fedrecsk.estimators._uplink import (
    Distrust,
    SecureAggregation,
    check_sums_suffice,
    distrust,
)
from fedrecsk.methods.hetefedrec import ClientWeights, distillation_step, network_step
from fedrecsk.methods.nested_state import (
    SPECTRUM,
    Aggregation,
    Logs,
    NestedState,
    Sizes,
    downloads,
    refit_users,
    spectrum_of,
)
from fedrecsk.methods.nested_whole_data import refit_whole_data, whole_data_step
from fedrecsk.methods.padded_aggregation import Denominator
from fedrecsk.methods.standalone import standalone_step
from fedrecsk.models import ncf, whole_data
from fedrecsk.models.factors import random_factors
from fedrecsk.models.head import Head, init_head

Train = Callable[[NestedState, NDArray[np.int64], int], tuple[NestedState, Logs]]
FitUsers = Callable[[Cohort, Tensor, Tensor, Head], Tensor]

# What "auto" stands for with a network; with the whole-data objective these are off.
AUTO_DUAL_TASK = True
AUTO_ALPHA = 0.01
AUTO_DISTILL_FRACTION = 0.1
AUTO_LEARNING_RATE = {"sgd": 0.3, "momentum": 0.03, "adam": 0.01}
AUTO_SERVER_LEARNING_RATE = {"sgd": 1.0, "momentum": 1.0, "adam": 0.1}
AUTO_L2 = 0.01
AUTO_INIT_SCALE = {"mf": 0.01, "ncf": 0.1, "lightgcn": 0.1}
STATISTICS_DECAY = 0.9
REFIT_STEPS = 20


class HeteFedRecRecommender(BaseRecommender):
    """Federated recommender whose clients hold models of different sizes.

    Clients with few interactions hold narrow models, clients with many hold wide ones, and all
    learn from each other: a narrow item table is the first columns of a wide one. So a small
    client sends and stores a fraction of what the largest does.

    The base is matrix factorisation with an exact local solution (the default), or a network
    over user and item vectors, as the paper has it.

    Parameters
    ----------
    base_model : {"mf", "ncf", "lightgcn"}, default="mf"
        ``"mf"``: matrix factorisation on the whole-data objective of `FedFNNRecommender`. A
        client of size N solves in the first N columns; the server takes one quasi-Newton step
        per block of columns. ``"ncf"``: a small network over the two vectors, trained on sampled
        negatives. ``"lightgcn"``: the same after propagation over the graph of a client's own
        interactions.
    sizes : sequence of int or "auto", default=(8, 16, 32)
        Columns of the groups' models, ascending; equal ones are allowed. ``"auto"`` chooses from
        4, 8, 16, 32 and 64, see Notes.
    group_ratio : sequence of float or "auto", default=(5, 3, 2)
        Relative numbers of clients in the groups, from those with the fewest interactions to
        those with the most; one entry for each size.
    client_sizes : mapping of client id to int, array-like of shape (n_clients,) or None, \
default=None
        The size of each client, such as its device allows; overrides `sizes` and `group_ratio`.
        An array is in the order of the sorted client ids.
    dual_task : bool or "auto", default="auto"
        Whether a client also trains every smaller size's predictor on the first columns of its
        vectors. "auto": with a network.
    alpha : float or "auto", default="auto"
        Weight of the decorrelation of the item table's columns, in all sizes but the smallest.
        "auto": 0.01 with a network. Must be 0 with ``"mf"``.
    distill_fraction : float in [0, 1] or "auto", default="auto"
        Share of the items, at least 256 of them, whose relations the tables are made to agree on;
        0 turns distillation off. "auto": 0.1 with a network. Must be 0 with ``"mf"``, where
        narrow tables are slices of the wide one.
    distill_every : int or "epoch", default="epoch"
        Rounds between two distillations; "epoch": when all clients have had a turn.
    distill_steps : int, default=10
        Steps of Adam.
    distill_learning_rate : float, default=0.001
    aggregation : {"padded", "clustered", "standalone"}, default="padded"
        ``"padded"``: one federation; narrow updates are filled up with zeros. ``"clustered"``: a
        federation for each size. ``"standalone"``: every client for itself (networks only), for
        as many local epochs as it would have had; the model then holds every client's own rows.
    denominator : {"owners", "clients", "sum"}, default="owners"
        What padded updates of a network are divided by: for each row and column, the clients
        that trained the one and have the other; all participants; nothing.
    client_weights : {"interactions", "uniform"}, default="interactions"
        Weight of a client in the averages of a network.
    contributors : {"all", "largest"}, default="all"
        ``"largest"``: only the clients of the last group take part; the others fit their own
        vectors to the result.
    n_graph_layers : int, default=1
        Of ``"lightgcn"``.
    item_propagation : bool, default=False
        Whether a user's own items are propagated as well, as LightGCN has it. Only training
        interactions bear that mark, so the network learns to tell them by it and ranks worse.
    n_rounds : int, default=40
        Rounds of a fit.
    clients_per_round : int or float, default=0.2
        A number, or a share of the contributors in (0, 1].
    sampling : {"epoch", "uniform"}, default="epoch"
        ``"epoch"``: everybody takes part once before anybody does so twice.
    availability : float, mapping, array-like, callable or None, default=None
    dropout_rate : float in [0, 1), default=0.0
    client_seconds : float, mapping, array-like or None, default=None
    deadline : float or None, default=None
    over_selection : float, default=0.0
        Of clients that fail, all five as in `FedFNNRecommender`; ``"mf"`` is ``"whole-data"``
        there. The standalone clients of `aggregation` have no round to miss.
    local_epochs : int, default=5
        Passes of a participant over its own data, of networks.
    learning_rate : float or "auto", default="auto"
        Of local training of networks; "auto": 0.3 with ``"sgd"``, 0.03 with ``"momentum"``, 0.01
        with ``"adam"``.
    batch_size : int or None, default=None
        Examples in a local step of networks; None: all of a client, the only choice with
        ``"lightgcn"``.
    n_negatives : int, default=4
        Sampled per interaction, of networks.
    l2 : float or "auto", default="auto"
        Penalty; "auto": from the size of the data for ``"mf"`` (as in `FedFNNRecommender`), 0.01
        for networks.
    l2_exponent : float in [0, 1], default=0.75
        Growth of the penalty of ``"mf"`` with the interactions of a row.
    unobserved_weight : float or "auto", default="auto"
        Weight of an unobserved pair, of ``"mf"``.
    item_curvature : bool, default=True
        Of the server steps of ``"mf"``, see `FedFNNRecommender`.
    init_scale : float or "auto", default="auto"
        Standard deviation of the start; "auto": 0.01 for ``"mf"``, 0.1 for networks.
    optimizer : {"sgd", "momentum", "adam"}, default="sgd"
        Of local training of networks.
    item_bias : bool, default=True
        Whether networks add a bias of the item.
    server_optimizer : {"adam", "sgd", "momentum"}, default="adam"
        Of networks: takes the aggregated change as a negative gradient. ``"sgd"`` at rate 1 adds
        it, as the paper does.
    server_learning_rate : float or "auto", default="auto"
        "auto": 0.1 with ``"adam"``, otherwise 1; for ``"mf"`` it follows from the participation.
    refit : bool, default=True
        Whether every user fits its own vector to the final model before inference.
    defence : {"clip", "median", "trimmed-mean", "krum", "multi-krum"} or None, default=None
        How the server adds up what clients of one size send, see `FedFNNRecommender`.
    assumed_malicious : float in [0, 0.5), default=0.1
    clip_quantile : float in (0, 1], default=0.7
    check_uploads : bool, default=True
    malicious_fraction : float in [0, 1), default=0.0
    attack : str, default="gradient"
    attack_strength : float, default=10.0
    target_item : item id, default=None
        As in `FedFNNRecommender`. Clients that are alone send nothing.
    compression : {"top-k", "quantised", "low-rank"} or None, default=None
    compression_level : float or "auto", default="auto"
    error_feedback : bool, default=True
        How clients make their uploads smaller, see `FedFNNRecommender`.
    secure_aggregation : bool or "simulate", default=False
    secure_bits : int in [2, 32], default=32
        As in `FedFNNRecommender`: the server sees sums over the clients of each size. A client
        that is the only one of its size in a round would be seen through; it sends nothing, and
        counts as ``rejected`` in ``history_``.
    report_every : int or None, default=1
        Rounds between two looks at the spectrum of the widest table in ``history_``; None: none.
    min_rating : float or None, default=None
        Drop weaker rows first.
    early_stopping : bool, default=False
        Hold out interactions and stop when NDCG@20 on them does not improve; the best round is
        kept.
    validation_fraction : float in (0, 1), default=0.1
    n_iter_no_change : int, default=10
    tol : float, default=1e-4
    warm_start : bool, default=False
        Whether `fit` goes on from the previous fit.
    checkpoint : str, Path or None, default=None
        Folder to write checkpoints into. A fit that was interrupted goes on from the last one if
        it is called again with the same data and parameters, and ends with the same result;
        `n_rounds` may differ, but not of ``aggregation="standalone"``. Needs an int as
        `random_state`, and a folder for each fit.
    checkpoint_every : int, default=1
        Rounds between two checkpoints; the last round is always written.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, or the best there is.
    random_state : int, RandomState or None, default=None
    verbose : int, default=0
        1 prints about ten lines a fit, 2 a line a round.

    Attributes
    ----------
    client_sizes_ : ndarray of shape (n_clients,), int64
        Columns of each client's model.
    client_groups_ : ndarray of shape (n_clients,), int64
        Group of each client, 0 the one with the fewest interactions or the smallest size. With
        ``dict(zip(model.user_ids_, model.client_groups_[model.user_clients_]))`` as `groups`,
        `fedrecsk.metrics.evaluate` reports each of them.
    client_parameters_ : ndarray of shape (n_clients,), int64
        Numbers that a client holds in common with others, and that travel to it each round.
    user_sizes_, user_clients_ : ndarray of shape (n_users,), int64
        Columns of each user's model, and the place of its client in `client_ids_`.
    group_sizes_, group_ratio_ : ndarray of shape (n_groups,)
        Sizes and shares of the groups, as given or chosen.
    sizes_ : ndarray of shape (n_sizes,), int64
        Distinct sizes that occur, ascending; N_l is the last.
    user_factors_ : ndarray of shape (n_users, N_l)
        Zero beyond a user's own size.
    item_factors_ : ndarray of shape (n_items, N_l)
        Of the largest size.
    item_bias_ : ndarray of shape (n_items,)
    item_tables_ : ndarray of shape (n_sizes, n_items, N_l)
        Item vectors of each size, zero beyond it.
    item_biases_ : ndarray of shape (n_sizes, n_items)
    network_ : ndarray of shape (P,)
        Weights of the predictors of all sizes; empty for ``"mf"``.
    n_graph_layers_ : int
    item_propagation_ : bool
    item_evidence_, user_gram_, user_gram_weight_ : ndarray
        What the server knows of each block of columns of ``"mf"``, for `partial_fit`.
    private_indptr_, private_items_, private_rows_, private_networks_ : ndarray
        With ``aggregation="standalone"``: where each client's own rows start, (n_clients + 1,);
        their items, (K,), vectors and bias, (K, N_l + 1); each client's predictor. Else empty.
    malicious_client_ids_ : ndarray
    target_item_ : item id or None
        As in `FedFNNRecommender`.
    history_ : list of dict
        One record a round: ``round, loss, clients, rejected, bytes_down, bytes_up, seconds``, and
        of early stopping and clients that fail what `FedFNNRecommender` has; with
        networks and distillation ``distillation_loss``; every `report_every` rounds
        ``effective_rank`` and ``singular_value_variance`` of the standardised widest table.
    n_rounds_ : int
    user_ids_, item_ids_, client_ids_, seen_indptr_, seen_indices_, n_features_in_ :
        As in `FedFNNRecommender`.

    Notes
    -----
    ``"auto"`` in `sizes` or `group_ratio` asks validation clients. A fifth of every user's
    interactions is held out, a short federation on the whole-data objective is run for each
    candidate size with everybody at that size, and clients report their NDCG@20. Of all ways to
    give larger sizes to clients with more interactions, the one with the least traffic is taken
    among those within one standard error of the best, `fedrecsk.data.auto_sizes`. Small sets of
    clients tell little, and then small sizes are chosen. `client_groups_` of a later
    `partial_fit` keep the sizes and shares chosen before.

    References
    ----------
    .. [1] W. Yuan, L. Qu, L. Cui, Y. Tong, X. Zhou and H. Yin, "HeteFedRec: Federated Recommender
       Systems with Model Heterogeneity", ICDE 2024, arXiv:2307.12810.

    Examples
    --------
    >>> from fedrecsk import HeteFedRecRecommender
    >>> from fedrecsk.datasets import make_interactions
    >>> X, client_ids = make_interactions(
    ...     n_users=100, n_items=60, random_state=0, return_X_y=True)
    >>> model = HeteFedRecRecommender(sizes=(2, 4, 8), n_rounds=5, random_state=0)
    >>> model.fit(X, client_ids).client_sizes_.sum()
    np.int64(380)
    >>> sorted(set(model.client_parameters_.tolist()))
    [120, 240, 480]
    """

    _parameter_constraints: ClassVar[Constraints] = {
        **{
            name: constraint
            for name, constraint in FACTOR_CONSTRAINTS.items()
            if name not in ("n_factors", "model", "objective")
        },
        "base_model": [StrOptions({"mf", "ncf", "lightgcn"})],
        "sizes": ["array-like", StrOptions({"auto"})],
        "group_ratio": ["array-like", StrOptions({"auto"})],
        "client_sizes": ["array-like", Mapping, None],
        "dual_task": ["boolean", StrOptions({"auto"})],
        "alpha": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
        "distill_fraction": [Interval(Real, 0, 1, closed="both"), StrOptions({"auto"})],
        "distill_every": [Interval(Integral, 1, None, closed="left"), StrOptions({"epoch"})],
        "distill_steps": [Interval(Integral, 1, None, closed="left")],
        "distill_learning_rate": [Interval(Real, 0, None, closed="neither")],
        "aggregation": [StrOptions({"padded", "clustered", "standalone"})],
        "denominator": [StrOptions({"owners", "clients", "sum"})],
        "client_weights": [StrOptions({"uniform", "interactions"})],
        "contributors": [StrOptions({"all", "largest"})],
        "n_graph_layers": [Interval(Integral, 1, None, closed="left")],
        "item_propagation": ["boolean"],
        "sampling": [StrOptions({"epoch", "uniform"})],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "optimizer": [StrOptions({"sgd", "momentum", "adam"})],
        "server_optimizer": [StrOptions({"sgd", "momentum", "adam"})],
        "report_every": [Interval(Integral, 1, None, closed="left"), None],
    }

    def __init__(
        self,
        base_model: Literal["mf", "ncf", "lightgcn"] = "mf",
        *,
        sizes: Sequence[int] | Literal["auto"] = (8, 16, 32),
        group_ratio: Sequence[float] | Literal["auto"] = (5, 3, 2),
        client_sizes: Mapping[Any, int] | ArrayLike | None = None,
        dual_task: bool | Literal["auto"] = "auto",
        alpha: float | Literal["auto"] = "auto",
        distill_fraction: float | Literal["auto"] = "auto",
        distill_every: int | Literal["epoch"] = "epoch",
        distill_steps: int = 10,
        distill_learning_rate: float = 0.001,
        aggregation: Aggregation = "padded",
        denominator: Denominator = "owners",
        client_weights: ClientWeights = "interactions",
        contributors: Literal["all", "largest"] = "all",
        n_graph_layers: int = 1,
        item_propagation: bool = False,
        n_rounds: int = 40,
        clients_per_round: int | float = 0.2,
        sampling: Literal["epoch", "uniform"] = "epoch",
        availability: Availability = None,
        dropout_rate: float = 0.0,
        client_seconds: ClientSeconds = None,
        deadline: float | None = None,
        over_selection: float = 0.0,
        local_epochs: int = 5,
        learning_rate: float | Literal["auto"] = "auto",
        batch_size: int | None = None,
        n_negatives: int = 4,
        l2: float | Literal["auto"] = "auto",
        l2_exponent: float = 0.75,
        unobserved_weight: float | Literal["auto"] = "auto",
        item_curvature: bool = True,
        init_scale: float | Literal["auto"] = "auto",
        optimizer: OptimizerName = "sgd",
        item_bias: bool = True,
        server_optimizer: OptimizerName = "adam",
        server_learning_rate: float | Literal["auto"] = "auto",
        refit: bool = True,
        defence: DefenceName | None = None,
        assumed_malicious: float = 0.1,
        clip_quantile: float = 0.7,
        check_uploads: bool = True,
        malicious_fraction: float = 0.0,
        attack: AttackName = "gradient",
        attack_strength: float = 10.0,
        target_item: Any = None,
        compression: CompressionName | None = None,
        compression_level: float | Literal["auto"] = "auto",
        error_feedback: bool = True,
        secure_aggregation: SecureAggregation = False,
        secure_bits: int = 32,
        report_every: int | None = 1,
        min_rating: float | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        warm_start: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.base_model = base_model
        self.sizes = sizes
        self.group_ratio = group_ratio
        self.client_sizes = client_sizes
        self.dual_task = dual_task
        self.alpha = alpha
        self.distill_fraction = distill_fraction
        self.distill_every = distill_every
        self.distill_steps = distill_steps
        self.distill_learning_rate = distill_learning_rate
        self.aggregation = aggregation
        self.denominator = denominator
        self.client_weights = client_weights
        self.contributors = contributors
        self.n_graph_layers = n_graph_layers
        self.item_propagation = item_propagation
        self.n_rounds = n_rounds
        self.clients_per_round = clients_per_round
        self.sampling = sampling
        self.availability = availability
        self.dropout_rate = dropout_rate
        self.client_seconds = client_seconds
        self.deadline = deadline
        self.over_selection = over_selection
        self.local_epochs = local_epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.n_negatives = n_negatives
        self.l2 = l2
        self.l2_exponent = l2_exponent
        self.unobserved_weight = unobserved_weight
        self.item_curvature = item_curvature
        self.init_scale = init_scale
        self.optimizer = optimizer
        self.item_bias = item_bias
        self.server_optimizer = server_optimizer
        self.server_learning_rate = server_learning_rate
        self.refit = refit
        self.defence = defence
        self.assumed_malicious = assumed_malicious
        self.clip_quantile = clip_quantile
        self.check_uploads = check_uploads
        self.malicious_fraction = malicious_fraction
        self.attack = attack
        self.attack_strength = attack_strength
        self.target_item = target_item
        self.compression = compression
        self.compression_level = compression_level
        self.error_feedback = error_feedback
        self.secure_aggregation = secure_aggregation
        self.secure_bits = secure_bits
        self.report_every = report_every
        self.min_rating = min_rating
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _simulate(self, data: Interactions, watch: RoundWatch, *, go_on: bool) -> Attributes:
        self._check_mechanisms()
        network, alone = self.base_model != "mf", self.aggregation == "standalone"
        # Clients that are alone have no server that would remember anything.
        previous = dict(vars(self)) if go_on and not alone else None
        streams = Streams.from_random_state(self.random_state)
        device = resolve_device(self.device)
        rows: NDArray[np.bool_] | slice = slice(None)
        validation = None
        if self.early_stopping:
            rows, validation = hold_out(data, self.validation_fraction, streams)
        around = self._distrust(data, streams)
        shards = make_shards(around.data, rows, device)
        participation = self._read_participation(data, shards, streams)
        group_sizes, group_ratio = self._groups(previous)
        assignment = assign_sizes(
            data,
            sizes=group_sizes,
            group_ratio=group_ratio,
            client_sizes=self.client_sizes,
            streams=streams,
            device=device,
        )
        sizes = Sizes.of(assignment.columns)
        dual_task = AUTO_DUAL_TASK if self.dual_task == "auto" else bool(self.dual_task)
        dual_task = dual_task and network and self.aggregation == "padded"
        users, table = random_factors(
            data.n_users,
            data.n_items,
            sizes.widths[-1],
            item_bias=network and self.item_bias,
            init_scale=_or(self.init_scale, AUTO_INIT_SCALE[self.base_model]),
            streams=streams,
            device=device,
        )
        several = len(sizes.widths) > 1
        heads = [
            init_head(width, streams=streams, key=width if several else None, device=device)
            for width in (sizes.widths if network else ())
        ]
        state = NestedState.start(
            users,
            table,
            heads,
            sizes,
            data.user_client,
            self.aggregation,
            self._server_optimizer,
        )
        first_round = int(self.n_rounds_) if go_on else 0
        if previous is not None:
            state = take_over(
                state,
                data,
                sizes,
                previous,
                group_sizes=assignment.sizes,
                n_graph_layers=self._graph_layers,
                item_propagation=self._propagates_items,
            )
        contributors = np.arange(data.n_clients)
        if self.contributors == "largest":
            contributors = np.flatnonzero(assignment.group == assignment.group.max())
        n_participants = cohort_size(self.clients_per_round, len(contributors))
        if alone:
            n_participants = len(contributors)
        train, fit = (
            self._of_network(shards, sizes, streams, around.uplink, dual_task=dual_task)
            if network
            else self._of_whole_data(data, shards, sizes, contributors, around.uplink)
        )
        # Distillation would join what clustered federations keep apart.
        distills = self.aggregation == "padded" and several and self._distill_fraction > 0
        distills = distills and network

        def train_some(state: NestedState, t: int) -> tuple[NestedState, Logs]:
            def draw(among: NDArray[np.int64], size: int) -> NDArray[np.int64]:
                rng = streams.numpy("sampling", t)
                if self.sampling == "uniform":
                    return among[uniform_cohort(len(among), size, rng)]
                return among[epoch_cohort(state.turns[among], size, rng)]

            if participation is None:
                return train(state, draw(contributors, n_participants), t)
            turnout = participation.of_round(t, n_participants, draw, contributors)
            wasted = downloads(state, dual_task=dual_task)[sizes.of_client[turnout.failed]]
            after, logs = turnout.train(
                state, lambda chosen: train(state, chosen, t), int(wasted.sum())
            )
            turns, missed = turnout.turns_after(after.turns, state.missed)
            return replace(after, turns=turns, missed=missed), logs

        def step(state: NestedState, t: int) -> tuple[NestedState, Logs]:
            turns = state.turns[contributors].min()
            state, logs = train_some(state, t)
            if distills:
                if self.distill_every == "epoch":
                    due = bool(state.turns[contributors].min() > turns)
                else:
                    due = (t + 1) % self.distill_every == 0
                logs["distillation_loss"] = None
                if due and logs["clients"]:
                    state, more = distillation_step(
                        state,
                        t,
                        sizes=sizes,
                        streams=streams,
                        fraction=self._distill_fraction,
                        n_steps=self.distill_steps,
                        learning_rate=self.distill_learning_rate,
                    )
                    logs |= more
            if self.report_every is not None:
                looks = (t + 1) % self.report_every == 0
                logs |= spectrum_of(state, sizes) if looks else dict.fromkeys(SPECTRUM)
            return state, logs

        bystanders = np.setdiff1d(np.arange(data.n_clients), contributors)

        def serve(state: NestedState, clients: NDArray[np.int64]) -> Tensor:
            if alone:  # every user's vector fits its own model already
                return state.user_factors
            fitted = clients if self.refit else np.intersect1d(clients, bystanders)
            return refit_users(state, shards, fitted, sizes=sizes, fit=fit)

        watch.besides = lambda n_done: around.fitted
        with torch_threads(CPU_CHUNK_ROWS * sizes.widths[-1]):
            return fit_nested(
                data,
                watch,
                step=step,
                serve=serve,
                start=state,
                sizes=sizes,
                assignment=assignment,
                dual_task=dual_task,
                n_graph_layers=self._graph_layers,
                item_propagation=self._propagates_items,
                n_rounds=1 if alone else self.n_rounds,
                first_round=first_round,
                validation=validation,
                n_iter_no_change=self.n_iter_no_change,
                tol=self.tol,
            )

    def _distrust(self, data: Interactions, streams: Streams) -> Distrust:
        """Draw who is dishonest, and bind what happens to uploads."""
        if self.secure_aggregation:
            check_sums_suffice(
                defence=self.defence,
                compression=self.compression,
                predicts=False,
                sampling=self.sampling,
                cohort=cohort_size(self.clients_per_round, data.n_clients),
                n_clients=data.n_clients,
            )
        around = distrust(
            data,
            streams,
            defence=self.defence,
            assumed_malicious=self.assumed_malicious,
            clip_quantile=self.clip_quantile,
            check_uploads=self.check_uploads,
            malicious_fraction=self.malicious_fraction,
            attack=self.attack,
            attack_strength=self.attack_strength,
            target_item=self.target_item,
            lookalike_fits=self.base_model == "mf",
            compression=self.compression,
            compression_level=self.compression_level,
            error_feedback=self.error_feedback,
            secure_aggregation=self.secure_aggregation,
            secure_bits=self.secure_bits,
        )
        if around.uplink is not None and self.aggregation == "standalone":
            raise ValueError(
                'aggregation="standalone" sends nothing that could be attacked, defended, '
                "compressed or hidden: leave defence, malicious_fraction, compression and "
                "secure_aggregation out."
            )
        return around

    def _settings(self) -> Attributes:
        settings = super()._settings()
        if self.aggregation == "standalone":  # one round, as long as all others together
            settings["n_rounds"] = self.n_rounds
        return settings

    def _read_participation(
        self, data: Interactions, shards: ClientShards, streams: Streams
    ) -> Participation | None:
        found = read_participation(
            data.clients.ids,
            shards.client_rows,
            availability=self.availability,
            dropout_rate=self.dropout_rate,
            client_seconds=self.client_seconds,
            deadline=self.deadline,
            over_selection=self.over_selection,
            local_epochs=1 if self.base_model == "mf" else self.local_epochs,
            streams=streams,
        )
        if found is not None and self.aggregation == "standalone":
            raise ValueError(
                'aggregation="standalone" has no rounds that a client could miss: leave '
                "availability, dropout_rate, client_seconds, deadline and over_selection out."
            )
        return found

    def _groups(
        self, previous: Attributes | None
    ) -> tuple[Sequence[int] | Literal["auto"], Sequence[float] | Literal["auto"]]:
        """Return `sizes` and `group_ratio`; what an earlier fit has chosen is kept."""
        if previous is None:
            return self.sizes, self.group_ratio
        chosen = tuple(previous["group_sizes_"].tolist())
        if isinstance(self.sizes, str):
            known = True
        else:
            known = isinstance(self.group_ratio, str) and tuple(sorted(set(self.sizes))) == chosen
        if not known:
            return self.sizes, self.group_ratio
        return chosen, tuple(previous["group_ratio_"].tolist())

    def _check_mechanisms(self) -> None:
        """Refuse what a base model has no use for, rather than leave it out in silence."""
        if self.base_model == "lightgcn" and self.batch_size is not None:
            raise ValueError(
                'base_model="lightgcn" propagates over all of a client\'s interactions in every '
                f"step: batch_size must be None, found {self.batch_size!r}."
            )
        if self.base_model != "mf":
            return
        if self.aggregation == "standalone":
            raise ValueError(
                'aggregation="standalone" needs base_model="ncf" or "lightgcn": a single user '
                "does not determine a factorisation."
            )
        for name in ("alpha", "distill_fraction"):
            value = getattr(self, name)
            if value not in ("auto", 0):
                raise ValueError(
                    f'{name} must be 0 or "auto" with base_model="mf", found {value!r}: there is '
                    "one table, of which all sizes are slices, and exact steps need no "
                    "decorrelation."
                )

    @property
    def _distill_fraction(self) -> float:
        return _or(self.distill_fraction, AUTO_DISTILL_FRACTION)

    @property
    def _graph_layers(self) -> int:
        return self.n_graph_layers if self.base_model == "lightgcn" else 0

    @property
    def _propagates_items(self) -> bool:
        return bool(self.item_propagation) and self.base_model == "lightgcn"

    @property
    def _server_optimizer(self) -> Optimizer:
        rate = _or(self.server_learning_rate, AUTO_SERVER_LEARNING_RATE[self.server_optimizer])
        return Optimizer(self.server_optimizer, rate)

    def _of_network(
        self,
        shards: ClientShards,
        sizes: Sizes,
        streams: Streams,
        uplink: Uplink | None,
        *,
        dual_task: bool,
    ) -> tuple[Train, FitUsers]:
        """Bind the parameters of a network's rounds, and of how its users fit their vectors."""
        l2 = _or(self.l2, AUTO_L2)
        optimizer = Optimizer(
            self.optimizer, _or(self.learning_rate, AUTO_LEARNING_RATE[self.optimizer])
        )

        def train(
            state: NestedState, participants: NDArray[np.int64], t: int
        ) -> tuple[NestedState, Logs]:
            if self.aggregation == "standalone":
                passes = self.local_epochs * self.n_rounds
                return standalone_step(
                    state,
                    shards,
                    sizes=sizes,
                    streams=streams,
                    item_bias=self.item_bias,
                    n_graph_layers=self._graph_layers,
                    item_propagation=self._propagates_items,
                    n_negatives=self.n_negatives,
                    batch_size=self.batch_size,
                    local_epochs=max(1, round(passes * self._participation(shards.n_clients))),
                    optimizer=optimizer,
                    l2=l2,
                )
            return network_step(
                state,
                shards,
                participants,
                t,
                sizes=sizes,
                streams=streams,
                dual_task=dual_task,
                alpha=_or(self.alpha, AUTO_ALPHA),
                aggregation=self.aggregation,
                denominator=self.denominator,
                client_weights=self.client_weights,
                item_bias=self.item_bias,
                n_graph_layers=self._graph_layers,
                item_propagation=self._propagates_items,
                n_negatives=self.n_negatives,
                batch_size=self.batch_size,
                local_epochs=self.local_epochs,
                optimizer=optimizer,
                l2=l2,
                server_optimizer=self._server_optimizer,
                uplink=uplink,
                in_place=not self.early_stopping,
            )

        def fit(cohort: Cohort, users: Tensor, table: Tensor, head: Head) -> Tensor:
            return ncf.refit_users(
                cohort,
                users,
                table,
                head,
                item_bias=self.item_bias,
                n_graph_layers=self._graph_layers,
                item_propagation=self._propagates_items,
                n_negatives=self.n_negatives,
                n_steps=REFIT_STEPS,
                l2=l2,
                key=streams.key("refit"),
            )

        return train, fit

    def _of_whole_data(
        self,
        data: Interactions,
        shards: ClientShards,
        sizes: Sizes,
        contributors: NDArray[np.int64],
        uplink: Uplink | None,
    ) -> tuple[Train, FitUsers]:
        """Bind the parameters of whole-data rounds, and of how users solve for their vectors."""
        shape = len(data), data.n_users, data.n_items
        weight = _or(self.unobserved_weight, whole_data.default_unobserved_weight(*shape))
        l2 = _or(self.l2, whole_data.default_l2(*shape))
        penalty = whole_data.Penalty(l2, float(self.l2_exponent))
        rate = None if self.server_learning_rate == "auto" else float(self.server_learning_rate)

        def train(
            state: NestedState, participants: NDArray[np.int64], t: int
        ) -> tuple[NestedState, Logs]:
            return whole_data_step(
                state,
                shards,
                participants,
                t,
                sizes=sizes,
                dual_task=self.dual_task != "auto" and bool(self.dual_task),
                aggregation=self.aggregation,
                unobserved_weight=weight,
                penalty=penalty,
                server_learning_rate=rate,
                decay=STATISTICS_DECAY,
                item_curvature=self.item_curvature,
                contributors=contributors,
                uplink=uplink,
                in_place=not self.early_stopping,  # which may want an earlier state back
            )

        fit = partial(
            refit_whole_data,
            unobserved_weight=weight,
            penalty=penalty,
            mean_rows=len(shards.items) / shards.n_users,
        )
        return train, fit

    def _participation(self, n_clients: int) -> float:
        return cohort_size(self.clients_per_round, n_clients) / n_clients

    def _score_items(self, users: NDArray[np.int64]) -> NDArray[np.float32]:
        return score_nested_items(self, users)

    def _score_pairs(
        self, users: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        return score_nested_pairs(self, users, items)

    def _probability(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return factor_probability(scores, "whole-data" if self.base_model == "mf" else "bce")


def _or(value: float | Literal["auto"], automatic: float) -> float:
    """Resolve "auto"."""
    return automatic if value == "auto" else float(value)
