"""FedFast, the method that FedFNN starts from, as an estimator of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedrecsk.data.interactions import Interactions
from fedrecsk.engine.attacks import AttackName
from fedrecsk.engine.compression import CompressionName
from fedrecsk.engine.defences import DefenceName
from fedrecsk.engine.local import OptimizerName
from fedrecsk.engine.participation import Availability, ClientSeconds
from fedrecsk.estimators._base import Attributes, BaseRecommender, RoundWatch
from fedrecsk.estimators._factors import score_factor_items, score_factor_pairs
from fedrecsk.estimators._fedfnn import (
    FACTOR_CONSTRAINTS,
    PREDICTION_CONSTRAINTS,
    factor_probability,
)
from fedrecsk.estimators._fedfnn_simulation import simulate_fedfnn
from fedrecsk.estimators._sklearn import Constraints
from fedrecsk.methods.bce_rounds import ItemWeighting

# Whole-data parameters and the choice of a model or of the sampling have no place in FedFast.
BCE_CONSTRAINTS: Constraints = {
    name: FACTOR_CONSTRAINTS[name]
    for name in FACTOR_CONSTRAINTS
    if name
    not in {
        "objective", "model", "n_graph_layers", "item_propagation", "sampling", "l2_exponent",
        "unobserved_weight", "item_curvature",
        # It always looks at the vectors of single users.
        "secure_aggregation", "secure_bits",
    }
}  # fmt: skip


class FedFastRecommender(BaseRecommender):
    """FedFast: delegates drawn by clusters, their updates handed on within the cluster.

    Delegates are drawn with equal quotas from clusters of the users' vectors (ActvSAMP). Every
    subordinate gets the mean change of its cluster's delegates, with a discount that falls over
    the rounds (ActvAGG). Item changes are weighted by their size. It is `FedFNNRecommender` with
    ``sampling="stratified", predictor="cluster"`` and without what is ours there.

    Parameters
    ----------
    n_factors : int, default=32
        Length of the user and item vectors.
    n_rounds : int, default=40
    clients_per_round : int or float, default=0.2
        A number, or a share of all clients in (0, 1].
    availability : float, mapping, array-like, callable or None, default=None
    dropout_rate : float in [0, 1), default=0.0
    client_seconds : float, mapping, array-like or None, default=None
    deadline : float or None, default=None
    over_selection : float, default=0.0
    n_clusters : int, default=10
        Of the users' vectors.
    discount, discount_decay : float in [0, 1], default=1.0 and 0.95
        Subordinates move by ``discount * discount_decay**t`` times their cluster's mean change.
    patience : int, default=1000
        Rounds without a lower loss after which subordinates are no longer moved.
    local_epochs : int, default=5
    learning_rate : float or "auto", default="auto"
    batch_size : int, None or "auto", default="auto"
    n_negatives : int, default=4
    l2 : float or "auto", default="auto"
    init_scale : float or "auto", default="auto"
    optimizer : {"auto", "sgd", "momentum", "adam"}, default="auto"
    item_weighting : {"count", "magnitude", "interactions", "fedavg"}, default="magnitude"
    item_bias : bool, default=False
    server_optimizer : {"sgd", "momentum", "adam"}, default="sgd"
    server_learning_rate : float or "auto", default="auto"
    refit : bool, default=True
    defence : {"clip", "median", "trimmed-mean", "krum", "multi-krum"} or None, default=None
    assumed_malicious : float in [0, 0.5), default=0.1
    clip_quantile : float in (0, 1], default=0.7
    malicious_fraction : float in [0, 1), default=0.0
    attack : str, default="gradient"
    attack_strength : float, default=10.0
    target_item : item id, default=None
    compression : {"top-k", "quantised", "low-rank"} or None, default=None
    compression_level : float or "auto", default="auto"
    error_feedback : bool, default=True
    min_rating : float or None, default=None
    early_stopping : bool, default=False
    validation_fraction : float in (0, 1), default=0.1
    n_iter_no_change : int, default=10
    tol : float, default=1e-4
    warm_start : bool, default=False
    checkpoint : str, Path or None, default=None
    checkpoint_every : int, default=1
    device : str, default="auto"
    random_state : int, RandomState or None, default=None
    verbose : int, default=0
        All as in `FedFNNRecommender`.

    Attributes
    ----------
    user_factors_, item_factors_, item_bias_, network_, times_sampled_, history_, n_rounds_ :
        As in `FedFNNRecommender`.
    n_graph_layers_, item_propagation_, item_evidence_, user_gram_, user_gram_weight_ :
        As in `FedFNNRecommender`.
    malicious_client_ids_, target_item_ :
        As in `FedFNNRecommender`.
    epsilon_, delta_, privacy_spent_, clip_norms_ :
        As in `FedFNNRecommender`; nothing is promised here.
    user_ids_, item_ids_, client_ids_, seen_indptr_, seen_indices_, n_features_in_ :
        As in `FedFNNRecommender`.

    References
    ----------
    .. [1] K. Muhammad et al., "FedFast: Going Beyond Average for Faster Training of Federated
       Recommender Systems", KDD 2020.

    Examples
    --------
    >>> from fedrecsk import FedFastRecommender
    >>> from fedrecsk.datasets import make_interactions
    >>> X, client_ids = make_interactions(
    ...     n_users=100, n_items=60, random_state=0, return_X_y=True)
    >>> model = FedFastRecommender(n_factors=8, n_rounds=5, random_state=0).fit(X, client_ids)
    >>> model.predict(X[:2]).shape
    (2,)
    """

    _parameter_constraints: ClassVar[Constraints] = {
        **BCE_CONSTRAINTS,
        **PREDICTION_CONSTRAINTS,
    }

    def __init__(
        self,
        n_factors: int = 32,
        *,
        n_rounds: int = 40,
        clients_per_round: int | float = 0.2,
        availability: Availability = None,
        dropout_rate: float = 0.0,
        client_seconds: ClientSeconds = None,
        deadline: float | None = None,
        over_selection: float = 0.0,
        n_clusters: int = 10,
        discount: float = 1.0,
        discount_decay: float = 0.95,
        patience: int = 1000,
        local_epochs: int = 5,
        learning_rate: float | Literal["auto"] = "auto",
        batch_size: int | Literal["auto"] | None = "auto",
        n_negatives: int = 4,
        l2: float | Literal["auto"] = "auto",
        init_scale: float | Literal["auto"] = "auto",
        optimizer: OptimizerName | Literal["auto"] = "auto",
        item_weighting: ItemWeighting = "magnitude",
        item_bias: bool = False,
        server_optimizer: OptimizerName = "sgd",
        server_learning_rate: float | Literal["auto"] = "auto",
        refit: bool = True,
        defence: DefenceName | None = None,
        assumed_malicious: float = 0.1,
        clip_quantile: float = 0.7,
        malicious_fraction: float = 0.0,
        attack: AttackName = "gradient",
        attack_strength: float = 10.0,
        target_item: Any = None,
        compression: CompressionName | None = None,
        compression_level: float | Literal["auto"] = "auto",
        error_feedback: bool = True,
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
        self.n_factors = n_factors
        self.n_rounds = n_rounds
        self.clients_per_round = clients_per_round
        self.availability = availability
        self.dropout_rate = dropout_rate
        self.client_seconds = client_seconds
        self.deadline = deadline
        self.over_selection = over_selection
        self.n_clusters = n_clusters
        self.discount = discount
        self.discount_decay = discount_decay
        self.patience = patience
        self.local_epochs = local_epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.n_negatives = n_negatives
        self.l2 = l2
        self.init_scale = init_scale
        self.optimizer = optimizer
        self.item_weighting = item_weighting
        self.item_bias = item_bias
        self.server_optimizer = server_optimizer
        self.server_learning_rate = server_learning_rate
        self.refit = refit
        self.defence = defence
        self.assumed_malicious = assumed_malicious
        self.clip_quantile = clip_quantile
        self.malicious_fraction = malicious_fraction
        self.attack = attack
        self.attack_strength = attack_strength
        self.target_item = target_item
        self.compression = compression
        self.compression_level = compression_level
        self.error_feedback = error_feedback
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
        return simulate_fedfnn(
            data,
            watch,
            previous=dict(vars(self)) if go_on else None,
            n_factors=self.n_factors,
            objective="bce",
            model="mf",
            n_rounds=self.n_rounds,
            clients_per_round=self.clients_per_round,
            sampling="stratified",
            availability=self.availability,
            dropout_rate=self.dropout_rate,
            client_seconds=self.client_seconds,
            deadline=self.deadline,
            over_selection=self.over_selection,
            local_epochs=self.local_epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            n_negatives=self.n_negatives,
            l2=self.l2,
            l2_exponent=1.0,
            unobserved_weight="auto",
            item_curvature=False,
            init_scale=self.init_scale,
            optimizer=self.optimizer,
            item_weighting=self.item_weighting,
            item_bias=self.item_bias,
            n_graph_layers=1,
            item_propagation=False,
            server_optimizer=self.server_optimizer,
            server_learning_rate=self.server_learning_rate,
            predictor="cluster",
            discount=self.discount,
            discount_decay=self.discount_decay,
            n_clusters=self.n_clusters,
            cv=2,
            patience=self.patience,
            patience_on="loss",
            gate=False,
            anchor=False,
            extra_inputs=False,
            refit=self.refit,
            defence=self.defence,
            assumed_malicious=self.assumed_malicious,
            clip_quantile=self.clip_quantile,
            check_uploads=False,
            malicious_fraction=self.malicious_fraction,
            attack=self.attack,
            attack_strength=self.attack_strength,
            target_item=self.target_item,
            compression=self.compression,
            compression_level=self.compression_level,
            error_feedback=self.error_feedback,
            secure_aggregation=False,
            secure_bits=32,
            privacy=None,  # delegates are drawn, and others moved, by vectors at the server
            noise_multiplier=0.0,
            clip_norm="auto",
            target_epsilon=None,
            delta="auto",
            accountant="auto",
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
        return factor_probability(scores, "bce")
