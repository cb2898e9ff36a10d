"""The estimator around `fedrecsk.methods.centralized`."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.data.interactions import Interactions
from fedrecsk.engine.device import resolve_device, torch_threads
from fedrecsk.engine.local import Optimizer, OptimizerName
from fedrecsk.engine.rounds import EarlyStopping
from fedrecsk.engine.shards import CPU_CHUNK_ROWS, ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import SHARED_CONSTRAINTS, Attributes, BaseRecommender, RoundWatch
from fedrecsk.estimators._factors import (
    Validation,
    head_before,
    hold_out,
    model_attributes,
    run_factors,
    score_factor_items,
    score_factor_pairs,
    take_over,
    times_sampled_before,
)
from fedrecsk.estimators._fedfnn import FACTOR_CONSTRAINTS, factor_probability
from fedrecsk.estimators._fedfnn_simulation import AUTO_INIT_SCALE, ModelName, check_objective
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions
from fedrecsk.methods.centralized import CentralState, Logs, bce_pass, solved, whole_data_sweep
from fedrecsk.models import whole_data
from fedrecsk.models.factors import random_factors
from fedrecsk.models.head import Head, init_head

# What "auto" stands for with objective="bce", by model; chosen in pilots.
AUTO_LEARNING_RATE = {"mf": 0.03, "ncf": 0.03, "lightgcn": 0.01}
AUTO_L2 = {"mf": 0.02, "ncf": 0.01, "lightgcn": 0.01}

CENTRAL_CONSTRAINTS: Constraints = {
    **{
        name: SHARED_CONSTRAINTS[name]
        for name in SHARED_CONSTRAINTS
        if name
        not in {
            "clients_per_round",
            "availability",
            "dropout_rate",
            "client_seconds",
            "deadline",
            "over_selection",
            "local_epochs",
            "batch_size",
        }
    },
    **{
        name: FACTOR_CONSTRAINTS[name]
        for name in (
            "model",
            "n_graph_layers",
            "item_propagation",
            "learning_rate",
            "l2_exponent",
            "unobserved_weight",
            "init_scale",
            "item_bias",
        )
    },
    "objective": [StrOptions({"auto", "whole-data", "bce"})],
    "optimizer": [StrOptions({"sgd", "momentum", "adam"})],
    "batch_users": [Interval(Integral, 1, None, closed="left")],
}


class CentralizedRecommender(BaseRecommender):
    """The model of a federation, trained where all data lie in one place.

    What a federated method is measured against: the same models and losses without the
    restrictions of a federation. Clients hand over their interactions once, before the first
    round, and have no part in training; who holds which user makes no difference.

    Parameters
    ----------
    model : {"mf", "ncf", "lightgcn"}, default="mf"
        Matrix factorisation, neural collaborative filtering, or LightGCN on the graph of each
        user and its items, see `FedFNNRecommender`.
    n_factors : int, default=32
        Length of the user and item vectors.
    objective : {"auto", "whole-data", "bce"}, default="auto"
        ``"whole-data"``: exact alternating least squares, with all unseen items as weak
        negatives. ``"bce"``: binary cross-entropy on sampled negatives by steps of an optimiser.
        ``"auto"``: the first for ``"mf"``, the only one that it can be, and the second for the
        networks.
    n_rounds : int, default=40
        Sweeps over all users and all items, or passes over all users.
    batch_users : int, default=64
        Users in a step (``"bce"``), with all their examples.
    learning_rate : float or "auto", default="auto"
        Of the optimiser (``"bce"``): 0.03 for ``"mf"`` and ``"ncf"``, 0.01 for ``"lightgcn"``.
    n_negatives : int, default=4
        Unseen items drawn per interaction, anew each round (``"bce"``).
    l2 : float or "auto", default="auto"
        Penalty. ``"whole-data"``: as in `FedFNNRecommender`. ``"bce"``: per example,
        0.02 for ``"mf"`` and 0.01 for the networks.
    l2_exponent : float in [0, 1], default=0.75
    unobserved_weight : float or "auto", default="auto"
        As in `FedFNNRecommender` (``"whole-data"``).
    init_scale : float or "auto", default="auto"
        Standard deviation of the random start; 0.01 for ``"whole-data"``, 0.1 for ``"bce"``.
    optimizer : {"adam", "momentum", "sgd"}, default="adam"
        Of training (``"bce"``). A user's vector and its moments stand still in batches without
        the user.
    item_bias : bool, default=True
        Whether items have a bias (``"bce"``).
    n_graph_layers : int, default=1
        Layers of propagation of ``"lightgcn"``.
    item_propagation : bool, default=False
        Whether a user's own items are propagated as well, as LightGCN has it. Only training
        interactions bear that mark, so the network learns to tell them by it and ranks worse.
    min_rating : float or None, default=None
        Drop weaker rows first.
    early_stopping : bool, default=False
        Hold out rows of every user and stop when NDCG@20 on them no longer improves.
    validation_fraction : float in (0, 1), default=0.1
        Share of a user's rows held out.
    n_iter_no_change : int, default=10
        Rounds without improvement before stopping.
    tol : float, default=1e-4
        Smallest improvement that counts.
    warm_start : bool, default=False
        Let `fit` start from the factors of the last one.
    checkpoint : str, Path or None, default=None
        Folder to write checkpoints into. A fit that was interrupted goes on from the last one if
        it is called again with the same data and parameters, and ends with the same result;
        `n_rounds` may differ. Needs an int as `random_state`, and a folder for each fit.
    checkpoint_every : int, default=1
        Rounds between two checkpoints; the last round is always written.
    device : str, default="auto"
        ``"auto"`` takes a GPU where there is one.
    random_state : int, RandomState or None, default=None
        An int makes fits repeatable.
    verbose : int, default=0
        1 prints about ten lines a fit, 2 one a round.

    Attributes
    ----------
    user_factors_ : ndarray of shape (n_users, n_factors)
        With ``"whole-data"`` solved against the final items.
    item_factors_ : ndarray of shape (n_items, n_factors)
    item_bias_ : ndarray of shape (n_items,)
        Zero with ``"whole-data"``.
    network_ : ndarray of shape (n_weights,)
        Weights of the network, layer by layer; empty for ``"mf"``.
    n_graph_layers_ : int
        0 for other models than ``"lightgcn"``.
    item_propagation_ : bool
        False for other models than ``"lightgcn"``.
    times_sampled_ : ndarray of shape (n_users,)
        Rounds in which each user took part: all since its data came.
    user_ids_, item_ids_, client_ids_, seen_indptr_, seen_indices_, n_features_in_ :
        As in `FedFNNRecommender`.
    history_ : list of dict
        One a round: ``round, loss, seconds, clients, bytes_up, bytes_down``, with early stopping
        ``validation_ndcg``. Nothing is sent in a round: both numbers of bytes are zero.
    n_rounds_ : int

    See Also
    --------
    FedFNNRecommender, FedAvgRecommender : The same models in a federation.

    Notes
    -----
    With ``"bce"`` a model goes on to fit the training rows after it has begun to rank worse;
    `early_stopping` watches for that. ``item_propagation=True`` needs it: propagation leaves a
    trace of the user in each of its training items, which in the end the network looks for and
    nothing else. On a random fifth of each user's rows of MovieLens-100K, ``"lightgcn"`` has an
    NDCG@20 of .37 after the default 40 rounds, and .01 with ``item_propagation=True`` (.31 with
    early stopping as well); popularity has .22.

    References
    ----------
    .. [1] Y. Hu, Y. Koren, C. Volinsky, "Collaborative Filtering for Implicit Feedback
       Datasets", ICDM 2008.

    Examples
    --------
    >>> from fedrecsk import CentralizedRecommender
    >>> from fedrecsk.datasets import make_interactions
    >>> X, client_ids = make_interactions(
    ...     n_users=100, n_items=60, random_state=0, return_X_y=True)
    >>> model = CentralizedRecommender(n_factors=8, n_rounds=5, random_state=0).fit(X, client_ids)
    >>> ids, scores = model.recommend(users=X[:1, 0], k=3)
    >>> ids.shape
    (1, 3)
    """

    _parameter_constraints: ClassVar[Constraints] = CENTRAL_CONSTRAINTS

    def __init__(
        self,
        model: ModelName = "mf",
        *,
        n_factors: int = 32,
        objective: Literal["auto", "whole-data", "bce"] = "auto",
        n_rounds: int = 40,
        batch_users: int = 64,
        learning_rate: float | Literal["auto"] = "auto",
        n_negatives: int = 4,
        l2: float | Literal["auto"] = "auto",
        l2_exponent: float = 0.75,
        unobserved_weight: float | Literal["auto"] = "auto",
        init_scale: float | Literal["auto"] = "auto",
        optimizer: OptimizerName = "adam",
        item_bias: bool = True,
        n_graph_layers: int = 1,
        item_propagation: bool = False,
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
        self.model = model
        self.n_factors = n_factors
        self.objective = objective
        self.n_rounds = n_rounds
        self.batch_users = batch_users
        self.learning_rate = learning_rate
        self.n_negatives = n_negatives
        self.l2 = l2
        self.l2_exponent = l2_exponent
        self.unobserved_weight = unobserved_weight
        self.init_scale = init_scale
        self.optimizer = optimizer
        self.item_bias = item_bias
        self.n_graph_layers = n_graph_layers
        self.item_propagation = item_propagation
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
        return simulate_centralized(
            data,
            watch,
            previous=dict(vars(self)) if go_on else None,
            model=self.model,
            n_factors=self.n_factors,
            objective=self._objective(),
            n_rounds=self.n_rounds,
            batch_users=self.batch_users,
            learning_rate=self.learning_rate,
            n_negatives=self.n_negatives,
            l2=self.l2,
            l2_exponent=self.l2_exponent,
            unobserved_weight=self.unobserved_weight,
            init_scale=self.init_scale,
            optimizer=self.optimizer,
            item_bias=self.item_bias,
            n_graph_layers=self.n_graph_layers,
            item_propagation=self.item_propagation,
            early_stopping=self.early_stopping,
            validation_fraction=self.validation_fraction,
            n_iter_no_change=self.n_iter_no_change,
            tol=self.tol,
            device=self.device,
            random_state=self.random_state,
        )

    def _objective(self) -> Literal["whole-data", "bce"]:
        if self.objective != "auto":
            return self.objective
        return "whole-data" if self.model == "mf" else "bce"

    def _score_items(self, users: NDArray[np.int64]) -> NDArray[np.float32]:
        return score_factor_items(self, users)

    def _score_pairs(
        self, users: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        return score_factor_pairs(self, users, items)

    def _probability(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return factor_probability(scores, self._objective())


def simulate_centralized(
    data: Interactions,
    watch: RoundWatch,
    *,
    previous: Attributes | None,
    model: ModelName,
    n_factors: int,
    objective: Literal["whole-data", "bce"],
    n_rounds: int,
    batch_users: int,
    learning_rate: float | Literal["auto"],
    n_negatives: int,
    l2: float | Literal["auto"],
    l2_exponent: float,
    unobserved_weight: float | Literal["auto"],
    init_scale: float | Literal["auto"],
    optimizer: OptimizerName,
    item_bias: bool,
    n_graph_layers: int,
    item_propagation: bool,
    early_stopping: bool,
    validation_fraction: float,
    n_iter_no_change: int,
    tol: float,
    device: str,
    random_state: int | np.random.RandomState | None,
) -> Attributes:
    """Resolve "auto", bind the parameters of a round, and run the rounds.

    Parameters
    ----------
    data, watch
        See `BaseRecommender._simulate`.
    previous : dict or None
        Fitted attributes to go on from.
    model, ..., random_state
        As in `CentralizedRecommender`.

    Returns
    -------
    dict
        Fitted attributes.
    """
    check_objective(model, objective)
    layers = n_graph_layers if model == "lightgcn" else 0
    of_items = bool(item_propagation) and model == "lightgcn"
    streams = Streams.from_random_state(random_state)
    sizes = len(data), data.n_users, data.n_items
    rows: NDArray[np.bool_] | slice = slice(None)
    validation = None
    if early_stopping:
        rows, validation = hold_out(data, validation_fraction, streams)
    where = resolve_device(device)
    by_user = _shards_of(data.user[rows], data.item[rows], data.n_users, data.n_items, where)
    bias = item_bias and objective == "bce"
    rule = Optimizer(
        optimizer, AUTO_LEARNING_RATE[model] if learning_rate == "auto" else float(learning_rate)
    )
    if l2 != "auto":
        strength = float(l2)
    else:
        strength = whole_data.default_l2(*sizes) if objective == "whole-data" else AUTO_L2[model]

    if objective == "bce":

        def train(state: CentralState, t: int) -> tuple[CentralState, Logs]:
            return bce_pass(
                state,
                by_user,
                t,
                streams=streams,
                batch_users=batch_users,
                item_bias=bias,
                n_negatives=n_negatives,
                n_graph_layers=layers,
                item_propagation=of_items,
                optimizer=rule,
                l2=strength,
            )

        def served(state: CentralState) -> Tensor:
            return state.user_factors

    else:
        by_item = _shards_of(data.item[rows], data.user[rows], data.n_items, data.n_users, where)
        weight = (
            whole_data.default_unobserved_weight(*sizes)
            if unobserved_weight == "auto"
            else float(unobserved_weight)
        )
        penalty = whole_data.Penalty(strength, l2_exponent)

        def train(state: CentralState, t: int) -> tuple[CentralState, Logs]:
            return whole_data_sweep(
                state, by_user, by_item, unobserved_weight=weight, penalty=penalty
            )

        def served(state: CentralState) -> Tensor:
            return solved(by_user, state.item_table, unobserved_weight=weight, penalty=penalty)

    def step(state: CentralState, t: int) -> tuple[CentralState, Logs]:
        state, logs = train(state, t)
        # All clients' data are used, and nothing is sent.
        return state, {**logs, "clients": data.n_clients, "bytes_down": 0, "bytes_up": 0}

    def evaluate(state: CentralState, validation: Validation) -> float:
        return validation.ndcg(
            served(state), state.item_table, state.head, layers, item_propagation=of_items
        )

    times = _rounds_before(data, previous)

    def attributes(state: CentralState) -> Attributes:
        model = model_attributes(
            served(state), state.item_table, state.head, layers, item_propagation=of_items
        )
        return {**model, "times_sampled_": times + state.passes}

    with torch_threads(CPU_CHUNK_ROWS * n_factors):
        return run_factors(
            watch,
            step=step,
            start=_start(
                data,
                previous,
                network=model != "mf",
                n_factors=n_factors,
                item_bias=bias,
                n_graph_layers=layers,
                item_propagation=of_items,
                init_scale=AUTO_INIT_SCALE[objective] if init_scale == "auto" else init_scale,
                optimizer=rule,
                streams=streams,
                device=where,
            ),
            attributes=attributes,
            n_rounds=n_rounds,
            first_round=0 if previous is None else int(previous["n_rounds_"]),
            early_stopping=None
            if validation is None
            else EarlyStopping(
                evaluate=lambda state: evaluate(state, validation),
                n_iter_no_change=n_iter_no_change,
                tol=tol,
            ),
        )


def _shards_of(
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    n_users: int,
    n_items: int,
    device: torch.device,
) -> ClientShards:
    """Put data on the device, every user a client of its own."""
    return ClientShards.from_codes(user, item, np.arange(n_users), n_users, n_items, device)


def _start(
    data: Interactions,
    previous: Attributes | None,
    *,
    network: bool,
    n_factors: int,
    item_bias: bool,
    n_graph_layers: int,
    item_propagation: bool,
    init_scale: float,
    optimizer: Optimizer,
    streams: Streams,
    device: torch.device,
) -> CentralState:
    """Draw the model, with what an earlier fit left in the places of known ids."""
    users, table = random_factors(
        data.n_users,
        data.n_items,
        n_factors,
        item_bias=item_bias,
        init_scale=init_scale,
        streams=streams,
        device=device,
    )
    head: Head = init_head(n_factors, streams=streams, device=device) if network else {}
    if previous is not None:
        users, table = take_over(users, table, data, previous)
        head = head_before(
            head, n_factors, n_graph_layers, previous, item_propagation=item_propagation
        )
    return CentralState.start(users, table, head, optimizer)


def _rounds_before(data: Interactions, previous: Attributes | None) -> NDArray[np.int64]:
    """Count the rounds (n_users,) of each user in earlier fits."""
    fresh = torch.zeros(data.n_users, dtype=torch.int64)
    if previous is None:
        return fresh.numpy()
    times: NDArray[np.int64] = times_sampled_before(fresh, data, previous).numpy()
    return times
