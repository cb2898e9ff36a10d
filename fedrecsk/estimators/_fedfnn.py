"""The estimator around `fedrecsk.methods.fedfnn`."""

from __future__ import annotations

from numbers import Integral, Real
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.data.interactions import Interactions
from fedrecsk.engine.device import resolve_device, torch_threads
from fedrecsk.engine.local import Optimizer, OptimizerName
from fedrecsk.engine.sampling import cohort_size, uniform_cohort
from fedrecsk.engine.shards import CPU_CHUNK_ROWS
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import SHARED_CONSTRAINTS, Attributes, BaseRecommender, RoundWatch
from fedrecsk.estimators._factors import (
    fit_factors,
    hold_out,
    logistic,
    make_shards,
    score_factor_items,
    score_factor_pairs,
)
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions
from fedrecsk.methods.fedfnn import (
    FactorState,
    ItemWeighting,
    Logs,
    bce_step,
    prediction_step,
    refit_bce,
    refit_whole_data,
    whole_data_step,
)
from fedrecsk.methods.meta_network import PredictorName
from fedrecsk.models import whole_data

# What "auto" stands for, by objective; chosen in pilots, see benchmarks.
AUTO_BCE_L2 = 0.01
AUTO_INIT_SCALE = {"whole-data": 0.01, "bce": 0.1}
# Descent steps of a refit with objective="bce".
REFIT_STEPS = 20
# Decay of the server's running averages with objective="whole-data".
STATISTICS_DECAY = 0.9

FACTOR_CONSTRAINTS: Constraints = {
    **SHARED_CONSTRAINTS,
    "objective": [StrOptions({"whole-data", "bce"})],
    "l2_exponent": [Interval(Real, 0, 1, closed="both")],
    "unobserved_weight": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    "item_curvature": ["boolean"],
    "init_scale": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    "optimizer": [StrOptions({"sgd", "momentum", "adam"})],
    "server_optimizer": [StrOptions({"sgd", "momentum", "adam"})],
    "server_learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    "item_bias": ["boolean"],
    "refit": ["boolean"],
}


class FedFNNRecommender(BaseRecommender):
    """Federated matrix factorisation that predicts the updates of users who were not sampled.

    In every round some clients, the delegates, train on their own interactions and send changes
    of the item vectors, which the server averages. A meta-network learns to predict how training
    changes a user's vector and moves the users who were not sampled as well.

    Two local objectives are to be had. ``"whole-data"``, the default, solves each client's
    problem exactly, counts all unseen items as weak negatives, and takes quasi-Newton steps on
    the server: it needs far fewer rounds. ``"bce"`` is the literal method: binary cross-entropy
    on sampled negatives by gradient steps.

    Parameters
    ----------
    n_factors : int, default=32
        Length of the user and item vectors.
    objective : {"whole-data", "bce"}, default="whole-data"
        Local objective.
    n_rounds : int, default=40
        Rounds of a fit.
    clients_per_round : int or float, default=0.2
        Delegates a round: a number, or a share of all clients in (0, 1].
    local_epochs : int, default=5
        Passes over a client's own examples in a round (``"bce"``).
    learning_rate : float, default=0.1
        Of local training (``"bce"``).
    batch_size : int or None, default=64
        Examples in a local step (``"bce"``); None takes all of a client's at once.
    n_negatives : int, default=4
        Unseen items drawn per interaction, anew each round (``"bce"``).
    l2 : float or "auto", default="auto"
        Penalty. ``"whole-data"``: per interaction of a user or item with the mean number of
        them; ``"auto"`` follows from these means, 0.13 on MovieLens-100K and 0.37 on data with
        5 interactions a user. ``"bce"``: per example, 0.01.
    l2_exponent : float in [0, 1], default=0.75
        How the penalty grows with the number of interactions (``"whole-data"``).
    unobserved_weight : float or "auto", default="auto"
        Weight of an unobserved pair against 1 of an observed one (``"whole-data"``). ``"auto"``:
        30 times the density of the data, at most 1.
    item_curvature : bool, default=True
        Let clients send one more number per item, the curvature along its vector, so that the
        server's steps fit sparse catalogues (``"whole-data"``).
    init_scale : float or "auto", default="auto"
        Standard deviation of the random start; 0.01 for ``"whole-data"``, 0.1 for ``"bce"``.
    optimizer : {"sgd", "momentum", "adam"}, default="sgd"
        Of local training (``"bce"``); ``"sgd"`` has the fastest path.
    item_weighting : {"count", "magnitude", "interactions", "fedavg"}, default="count"
        How the server weighs the changes of one item by several delegates (``"bce"``): equally,
        by the size of the change, by the client's number of interactions; ``"fedavg"`` divides
        by all delegates instead of by those who changed the item.
    item_bias : bool, default=True
        Whether items have an aggregated bias (``"bce"``).
    server_optimizer : {"sgd", "momentum", "adam"}, default="sgd"
        What the server makes of the averaged change (``"bce"``).
    server_learning_rate : float or "auto", default="auto"
        ``"auto"``: 1 for ``"bce"`` with ``"sgd"`` (adds the change), 0.05 with the others; for
        ``"whole-data"`` it follows from the participation and falls over the rounds.
    predictor : {"mlp", "linear", "mean", "cluster"} or None, default="mlp"
        Meta-network. None turns prediction off. With ``objective="whole-data"`` and ``refit``
        every user is solved anew at the end and the item update needs no subordinates, so a
        predicted vector would never be read, and none is computed.
    discount, discount_decay : float in [0, 1], default=1.0 and 0.95
        A prediction in round t is multiplied by ``discount * discount_decay**t``.
    n_clusters : int, default=10
        Of ``predictor="cluster"``.
    cv : int, default=5
        Folds over the delegates that choose the meta-network's candidate.
    patience : int, default=5
        Rounds without a lower loss after which prediction ends for good.
    gate : bool, default=True
        Weigh predictions by their cross-validated R2 and by how often the user took part, and
        predict nothing where that beats no prediction. False is the literal method.
    refit : bool, default=True
        At the end every user fits its own vector to its own rows and the final item vectors,
        on its own device; nothing is sent.
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
    device : str, default="auto"
        ``"auto"`` takes a GPU where there is one.
    random_state : int, RandomState or None, default=None
        An int makes fits repeatable.
    verbose : int, default=0
        1 prints about ten lines a fit, 2 one a round.

    Attributes
    ----------
    user_factors_ : ndarray of shape (n_users, n_factors)
    item_factors_ : ndarray of shape (n_items, n_factors)
    item_bias_ : ndarray of shape (n_items,)
        Zero with ``"whole-data"``.
    times_sampled_ : ndarray of shape (n_users,)
        Rounds in which each user took part.
    user_ids_, item_ids_, client_ids_ : ndarray
        Sorted ids.
    seen_indptr_, seen_indices_ : ndarray
        Items of each user in `fit`, in CSR form.
    history_ : list of dict
        One a round: ``round, loss, seconds, clients, bytes_up, bytes_down``, with early stopping
        ``validation_ndcg``, with a predictor ``predictor_r2, predictor_cosine,
        predictor_candidate, predicted_share, prediction_active``.
    n_rounds_ : int
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Of DataFrames.

    See Also
    --------
    FedAvgRecommender : The same model by plain federated averaging.

    Notes
    -----
    The server holds the users' vectors here, which plain federated matrix factorisation does not
    ask for: they reveal taste. `docs/methods/fedfnn.md` says what is ours and what the paper's.

    References
    ----------
    .. [1] F. Fabbri et al., "FedFNN: Faster Training Convergence Through Update Predictions in
       Federated Recommender Systems", arXiv:2309.08635, 2023.
    .. [2] Y. Hu, Y. Koren, C. Volinsky, "Collaborative Filtering for Implicit Feedback
       Datasets", ICDM 2008.

    Examples
    --------
    >>> from fedrecsk import FedFNNRecommender
    >>> from fedrecsk.datasets import make_interactions
    >>> X, client_ids = make_interactions(
    ...     n_users=100, n_items=60, random_state=0, return_X_y=True)
    >>> model = FedFNNRecommender(n_factors=8, n_rounds=10, random_state=0).fit(X, client_ids)
    >>> ids, scores = model.recommend(users=X[:1, 0], k=3)
    >>> ids.shape
    (1, 3)
    """

    _parameter_constraints: ClassVar[Constraints] = {
        **FACTOR_CONSTRAINTS,
        "item_weighting": [StrOptions({"count", "magnitude", "interactions", "fedavg"})],
        "predictor": [StrOptions({"mlp", "linear", "mean", "cluster"}), None],
        "discount": [Interval(Real, 0, 1, closed="both")],
        "discount_decay": [Interval(Real, 0, 1, closed="both")],
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "cv": [Interval(Integral, 2, None, closed="left")],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "gate": ["boolean"],
    }

    def __init__(
        self,
        n_factors: int = 32,
        *,
        objective: Literal["whole-data", "bce"] = "whole-data",
        n_rounds: int = 40,
        clients_per_round: int | float = 0.2,
        local_epochs: int = 5,
        learning_rate: float = 0.1,
        batch_size: int | None = 64,
        n_negatives: int = 4,
        l2: float | Literal["auto"] = "auto",
        l2_exponent: float = 0.75,
        unobserved_weight: float | Literal["auto"] = "auto",
        item_curvature: bool = True,
        init_scale: float | Literal["auto"] = "auto",
        optimizer: OptimizerName = "sgd",
        item_weighting: ItemWeighting = "count",
        item_bias: bool = True,
        server_optimizer: OptimizerName = "sgd",
        server_learning_rate: float | Literal["auto"] = "auto",
        predictor: PredictorName | None = "mlp",
        discount: float = 1.0,
        discount_decay: float = 0.95,
        n_clusters: int = 10,
        cv: int = 5,
        patience: int = 5,
        gate: bool = True,
        refit: bool = True,
        min_rating: float | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        warm_start: bool = False,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_factors = n_factors
        self.objective = objective
        self.n_rounds = n_rounds
        self.clients_per_round = clients_per_round
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
        self.item_weighting = item_weighting
        self.item_bias = item_bias
        self.server_optimizer = server_optimizer
        self.server_learning_rate = server_learning_rate
        self.predictor = predictor
        self.discount = discount
        self.discount_decay = discount_decay
        self.n_clusters = n_clusters
        self.cv = cv
        self.patience = patience
        self.gate = gate
        self.refit = refit
        self.min_rating = min_rating
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _simulate(self, data: Interactions, watch: RoundWatch, *, go_on: bool) -> Attributes:
        return simulate_fedfnn(
            data,
            watch,
            previous=dict(vars(self)) if go_on else None,
            n_factors=self.n_factors,
            objective=self.objective,
            n_rounds=self.n_rounds,
            clients_per_round=self.clients_per_round,
            local_epochs=self.local_epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            n_negatives=self.n_negatives,
            l2=self.l2,
            l2_exponent=self.l2_exponent,
            unobserved_weight=self.unobserved_weight,
            item_curvature=self.item_curvature,
            init_scale=self.init_scale,
            optimizer=self.optimizer,
            item_weighting=self.item_weighting,
            item_bias=self.item_bias,
            server_optimizer=self.server_optimizer,
            server_learning_rate=self.server_learning_rate,
            predictor=self.predictor,
            discount=self.discount,
            discount_decay=self.discount_decay,
            n_clusters=self.n_clusters,
            cv=self.cv,
            patience=self.patience,
            gate=self.gate,
            refit=self.refit,
            early_stopping=self.early_stopping,
            validation_fraction=self.validation_fraction,
            n_iter_no_change=self.n_iter_no_change,
            tol=self.tol,
            device=self.device,
            random_state=self.random_state,
        )

    def _score_items(self, users: NDArray[np.int64]) -> NDArray[np.float32]:
        return score_factor_items(self, users)

    def _score_pairs(
        self, users: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        return score_factor_pairs(self, users, items)

    def _probability(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return factor_probability(scores, self.objective)


def factor_probability(
    scores: NDArray[np.float64], objective: Literal["whole-data", "bce"]
) -> NDArray[np.float64]:
    """Turn scores of a factor model into probabilities, keeping their order.

    With ``"bce"`` a score is a log-odds. The whole-data objective fits 1 to interactions and 0
    to the rest, so a score is a probability already, except that it can leave [0, 1]; a
    logistic curve of slope 1 through (1/2, 1/2) bends it back without making ties.
    """
    return logistic(scores if objective == "bce" else 4.0 * (scores - 0.5))


def simulate_fedfnn(
    data: Interactions,
    watch: RoundWatch,
    *,
    previous: Attributes | None,
    n_factors: int,
    objective: Literal["whole-data", "bce"],
    n_rounds: int,
    clients_per_round: int | float,
    local_epochs: int,
    learning_rate: float,
    batch_size: int | None,
    n_negatives: int,
    l2: float | Literal["auto"],
    l2_exponent: float,
    unobserved_weight: float | Literal["auto"],
    item_curvature: bool,
    init_scale: float | Literal["auto"],
    optimizer: OptimizerName,
    item_weighting: ItemWeighting,
    item_bias: bool,
    server_optimizer: OptimizerName,
    server_learning_rate: float | Literal["auto"],
    predictor: PredictorName | None,
    discount: float,
    discount_decay: float,
    n_clusters: int,
    cv: int,
    patience: int,
    gate: bool,
    refit: bool,
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
    n_factors, ..., random_state
        As in `FedFNNRecommender`.

    Returns
    -------
    dict
        Fitted attributes.
    """
    streams = Streams.from_random_state(random_state)
    sizes = len(data), data.n_users, data.n_items
    if l2 != "auto":
        penalty_strength = float(l2)
    else:
        penalty_strength = AUTO_BCE_L2 if objective == "bce" else whole_data.default_l2(*sizes)
    scale = AUTO_INIT_SCALE[objective] if init_scale == "auto" else float(init_scale)
    rows: NDArray[np.bool_] | slice = slice(None)
    validation = None
    if early_stopping:
        rows, validation = hold_out(data, validation_fraction, streams)
    shards = make_shards(data, rows, resolve_device(device))
    size = cohort_size(clients_per_round, data.n_clients)
    bias = item_bias and objective == "bce"
    server_rate = server_learning_rate
    if objective == "bce" and server_rate == "auto":
        server_rate = 1.0 if server_optimizer == "sgd" else 0.05
    server = Optimizer(server_optimizer, 1.0 if server_rate == "auto" else float(server_rate))

    if objective == "bce":
        local = Optimizer(optimizer, learning_rate)

        def train(
            state: FactorState, delegates: NDArray[np.int64], t: int
        ) -> tuple[FactorState, Logs]:
            return bce_step(
                state,
                shards,
                delegates,
                t,
                streams=streams,
                item_weighting=item_weighting,
                item_bias=bias,
                n_negatives=n_negatives,
                batch_size=batch_size,
                local_epochs=local_epochs,
                optimizer=local,
                l2=penalty_strength,
                server_optimizer=server,
            )

        def fit_users(state: FactorState, clients: NDArray[np.int64]) -> Tensor:
            return refit_bce(
                state,
                shards,
                clients,
                item_bias=bias,
                n_negatives=n_negatives,
                n_steps=REFIT_STEPS,
                l2=penalty_strength,
                streams=streams,
            )

    else:
        weight = (
            whole_data.default_unobserved_weight(*sizes)
            if unobserved_weight == "auto"
            else float(unobserved_weight)
        )
        penalty = whole_data.Penalty(penalty_strength, l2_exponent)

        def train(
            state: FactorState, delegates: NDArray[np.int64], t: int
        ) -> tuple[FactorState, Logs]:
            return whole_data_step(
                state,
                shards,
                delegates,
                t,
                unobserved_weight=weight,
                penalty=penalty,
                server_learning_rate=None if server_rate == "auto" else float(server_rate),
                decay=STATISTICS_DECAY,
                item_curvature=item_curvature,
            )

        def fit_users(state: FactorState, clients: NDArray[np.int64]) -> Tensor:
            return refit_whole_data(
                state,
                shards,
                clients,
                unobserved_weight=weight,
                penalty=penalty,
                mean_rows=len(shards.items) / shards.n_users,
            )

    # With the whole-data objective a refit replaces every predicted vector before it is read.
    kind = None if objective == "whole-data" and refit else predictor

    def step(state: FactorState, t: int) -> tuple[FactorState, Logs]:
        delegates = uniform_cohort(shards.n_clients, size, streams.numpy("sampling", t))
        trained, logs = train(state, delegates, t)
        if kind is None:
            return trained, logs
        predicted, more = prediction_step(
            state,
            trained,
            shards,
            delegates,
            t,
            loss=logs["loss"],
            streams=streams,
            predictor=kind,
            discount=discount,
            discount_decay=discount_decay,
            cv=cv,
            patience=patience,
            gate=gate,
            n_clusters=n_clusters,
        )
        return predicted, {**logs, **more}

    with torch_threads(CPU_CHUNK_ROWS * n_factors):
        return fit_factors(
            data,
            watch,
            step=step,
            refit=fit_users if refit else None,
            n_factors=n_factors,
            item_bias=bias,
            init_scale=scale,
            server_optimizer=server,
            n_rounds=n_rounds,
            validation=validation,
            shards=shards,
            n_iter_no_change=n_iter_no_change,
            tol=tol,
            streams=streams,
            previous=previous,
        )
