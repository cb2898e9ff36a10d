"""Baselines: what a federated method has to beat."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedrecsk.data.interactions import Interactions
from fedrecsk.engine.accounting import AccountantName
from fedrecsk.engine.attacks import AttackName
from fedrecsk.engine.compression import CompressionName
from fedrecsk.engine.defences import DefenceName
from fedrecsk.engine.local import OptimizerName
from fedrecsk.engine.participation import Availability, ClientSeconds
from fedrecsk.engine.privacy import PrivacyName
from fedrecsk.engine.traffic import sparse_row_bytes
from fedrecsk.estimators._base import SHARED_CONSTRAINTS, Attributes, BaseRecommender, RoundWatch
from fedrecsk.estimators._factors import score_factor_items, score_factor_pairs
from fedrecsk.estimators._fedfnn import FACTOR_CONSTRAINTS, factor_probability
from fedrecsk.estimators._fedfnn_simulation import ModelName, simulate_fedfnn
from fedrecsk.estimators._privacy import PRIVACY_CONSTRAINTS
from fedrecsk.estimators._sklearn import Constraints
from fedrecsk.estimators._uplink import SecureAggregation
from fedrecsk.methods.factor_state import SamplingName


class FedAvgRecommender(BaseRecommender):
    """Federated averaging of a factor model.

    Sampled clients train on their own interactions; the server adds the average of their changes
    of the item vectors, weighted by their numbers of interactions, to its item vectors. User
    vectors stay with the clients. It is FedFNN without prediction, and averaged over all
    delegates instead of those who touched an item.

    Parameters
    ----------
    model : {"mf", "ncf", "lightgcn"}, default="mf"
        Matrix factorisation, neural collaborative filtering, or LightGCN, see `FedFNNRecommender`.
    n_factors : int, default=32
        Length of the user and item vectors.
    objective : {"bce", "whole-data"}, default="bce"
        Local objective, see `FedFNNRecommender`.
    n_rounds : int, default=40
    clients_per_round : int or float, default=0.2
        A number, or a share of all clients in (0, 1].
    sampling : {"uniform", "poisson", "epoch", "stratified"}, default="uniform"
    availability : float, mapping, array-like, callable or None, default=None
    dropout_rate : float in [0, 1), default=0.0
    client_seconds : float, mapping, array-like or None, default=None
    deadline : float or None, default=None
    over_selection : float, default=0.0
    local_epochs : int, default=5
    learning_rate : float or "auto", default="auto"
    batch_size : int, None or "auto", default="auto"
    n_negatives : int, default=4
    l2 : float or "auto", default="auto"
    l2_exponent : float in [0, 1], default=0.75
    unobserved_weight : float or "auto", default="auto"
    item_curvature : bool, default=True
    init_scale : float or "auto", default="auto"
    optimizer : {"auto", "sgd", "momentum", "adam"}, default="auto"
    item_bias : bool, default=True
    n_graph_layers : int, default=1
    item_propagation : bool, default=False
    server_optimizer : {"sgd", "momentum", "adam"}, default="sgd"
    server_learning_rate : float or "auto", default="auto"
    refit : bool, default=True
    defence : {"clip", "median", "trimmed-mean", "krum", "multi-krum"} or None, default=None
    assumed_malicious : float in [0, 0.5), default=0.1
    clip_quantile : float in (0, 1], default=0.7
    check_uploads : bool, default=True
    malicious_fraction : float in [0, 1), default=0.0
    attack : str, default="gradient"
    attack_strength : float, default=10.0
    target_item : item id, default=None
    compression : {"top-k", "quantised", "low-rank"} or None, default=None
    compression_level : float or "auto", default="auto"
    error_feedback : bool, default=True
    secure_aggregation : bool or "simulate", default=False
    secure_bits : int, default=32
    privacy : {"central", "local"} or None, default=None
    noise_multiplier : float or "auto", default=1.0
    clip_norm : float or "auto", default="auto"
    target_epsilon : float or None, default=None
    delta : float or "auto", default="auto"
    accountant : {"auto", "pld", "rdp"}, default="auto"
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
        As in `FedFNNRecommender`.
    user_ids_, item_ids_, client_ids_, seen_indptr_, seen_indices_, n_features_in_ :
        As in `FedFNNRecommender`.

    References
    ----------
    .. [1] B. McMahan et al., "Communication-Efficient Learning of Deep Networks from
       Decentralized Data", AISTATS 2017.

    Examples
    --------
    >>> from fedrecsk import FedAvgRecommender
    >>> from fedrecsk.datasets import make_interactions
    >>> X, client_ids = make_interactions(
    ...     n_users=100, n_items=60, random_state=0, return_X_y=True)
    >>> model = FedAvgRecommender(n_factors=8, n_rounds=5, random_state=0).fit(X, client_ids)
    >>> model.predict(X[:2]).shape
    (2,)
    """

    _parameter_constraints: ClassVar[Constraints] = {
        **FACTOR_CONSTRAINTS,
        **PRIVACY_CONSTRAINTS,
    }

    def __init__(
        self,
        model: ModelName = "mf",
        *,
        n_factors: int = 32,
        objective: Literal["whole-data", "bce"] = "bce",
        n_rounds: int = 40,
        clients_per_round: int | float = 0.2,
        sampling: SamplingName = "uniform",
        availability: Availability = None,
        dropout_rate: float = 0.0,
        client_seconds: ClientSeconds = None,
        deadline: float | None = None,
        over_selection: float = 0.0,
        local_epochs: int = 5,
        learning_rate: float | Literal["auto"] = "auto",
        batch_size: int | Literal["auto"] | None = "auto",
        n_negatives: int = 4,
        l2: float | Literal["auto"] = "auto",
        l2_exponent: float = 0.75,
        unobserved_weight: float | Literal["auto"] = "auto",
        item_curvature: bool = True,
        init_scale: float | Literal["auto"] = "auto",
        optimizer: OptimizerName | Literal["auto"] = "auto",
        item_bias: bool = True,
        n_graph_layers: int = 1,
        item_propagation: bool = False,
        server_optimizer: OptimizerName = "sgd",
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
        privacy: PrivacyName | None = None,
        noise_multiplier: float | Literal["auto"] = 1.0,
        clip_norm: float | Literal["auto"] = "auto",
        target_epsilon: float | None = None,
        delta: float | Literal["auto"] = "auto",
        accountant: AccountantName | Literal["auto"] = "auto",
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
        self.n_graph_layers = n_graph_layers
        self.item_propagation = item_propagation
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
        self.privacy = privacy
        self.noise_multiplier = noise_multiplier
        self.clip_norm = clip_norm
        self.target_epsilon = target_epsilon
        self.delta = delta
        self.accountant = accountant
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
            objective=self.objective,
            model=self.model,
            n_rounds=self.n_rounds,
            clients_per_round=self.clients_per_round,
            sampling=self.sampling,
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
            l2_exponent=self.l2_exponent,
            unobserved_weight=self.unobserved_weight,
            item_curvature=self.item_curvature,
            init_scale=self.init_scale,
            optimizer=self.optimizer,
            item_weighting="fedavg",
            item_bias=self.item_bias,
            n_graph_layers=self.n_graph_layers,
            item_propagation=self.item_propagation,
            server_optimizer=self.server_optimizer,
            server_learning_rate=self.server_learning_rate,
            predictor=None,
            discount=0.0,
            discount_decay=1.0,
            n_clusters=1,
            cv=2,
            patience=1,
            patience_on="loss",
            gate=True,
            anchor=True,
            extra_inputs=False,
            refit=self.refit,
            defence=self.defence,
            assumed_malicious=self.assumed_malicious,
            clip_quantile=self.clip_quantile,
            check_uploads=self.check_uploads,
            malicious_fraction=self.malicious_fraction,
            attack=self.attack,
            attack_strength=self.attack_strength,
            target_item=self.target_item,
            compression=self.compression,
            compression_level=self.compression_level,
            error_feedback=self.error_feedback,
            secure_aggregation=self.secure_aggregation,
            secure_bits=self.secure_bits,
            privacy=self.privacy,
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.clip_norm,
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            accountant=self.accountant,
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


class PopularityRecommender(BaseRecommender):
    """Recommend to everybody what most users had: one round of counting.

    Parameters
    ----------
    min_rating : float or None, default=None
        Drop weaker rows first.
    verbose : int, default=0
        1 prints a line.

    Attributes
    ----------
    item_counts_ : ndarray of shape (n_items,)
        Users of each item.
    user_ids_, item_ids_, client_ids_, seen_indptr_, seen_indices_, n_features_in_ :
        As in `FedFNNRecommender`.
    history_ : list of dict
        A single round. Its loss is the binary cross-entropy of the shares of users.
    n_rounds_ : int

    Examples
    --------
    >>> from fedrecsk import PopularityRecommender
    >>> model = PopularityRecommender().fit([[1, "a"], [2, "a"], [2, "b"], [3, "c"]])
    >>> model.predict([[1, "a"], [1, "b"]]).round(2)
    array([0.67, 0.33])
    >>> model.recommend([1], k=1)[0]
    array([['b']], dtype='<U1')
    """

    _parameter_constraints: ClassVar[Constraints] = {
        "min_rating": SHARED_CONSTRAINTS["min_rating"],
        "verbose": SHARED_CONSTRAINTS["verbose"],
    }

    def __init__(self, *, min_rating: float | None = None, verbose: int = 0) -> None:
        self.min_rating = min_rating
        self.verbose = verbose

    def _simulate(self, data: Interactions, watch: RoundWatch, *, go_on: bool) -> Attributes:
        # Counts over all rows that clients hold: partial_fit passes old and new rows together.
        watch.begin()
        start = time.perf_counter()
        counts = data.item_counts.astype(np.int64)
        share = counts / data.n_users
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -(share * np.log(share) + (1 - share) * np.log1p(-share))
        attributes: Attributes = {"item_counts_": counts}
        record = {
            "round": int(getattr(self, "n_rounds_", 0)) + 1 if go_on else 1,
            "loss": float(np.nan_to_num(entropy).mean()),
            "clients": data.n_clients,
            "bytes_down": 0,
            "bytes_up": sparse_row_bytes(len(data), 1),
            "seconds": time.perf_counter() - start,
        }
        watch.end(record, lambda: attributes)
        return {**attributes, "history_": [record]}

    def _score_items(self, users: NDArray[np.int64]) -> NDArray[np.float64]:
        share = self.item_counts_ / len(self.user_ids_)
        return np.tile(share, (len(users), 1))

    def _score_pairs(
        self, users: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = self.item_counts_[items] / len(self.user_ids_)
        return scores

    def _similarity(self, items: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """Popularity knows no likeness: every item's neighbours are the most popular ones."""
        return self._score_items(items)
