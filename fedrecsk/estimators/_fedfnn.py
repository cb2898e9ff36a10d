"""The estimator around `fedrecsk.methods.fedfnn`; its rounds are in `_fedfnn_simulation`."""

from __future__ import annotations

from numbers import Integral, Real
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
from fedrecsk.estimators._base import SHARED_CONSTRAINTS, Attributes, BaseRecommender, RoundWatch
from fedrecsk.estimators._factors import logistic, score_factor_items, score_factor_pairs
from fedrecsk.estimators._fedfnn_simulation import (
    ModelName,
    Objective,
    ServerOptimizerName,
    simulate_fedfnn,
)
from fedrecsk.estimators._privacy import PRIVACY_CONSTRAINTS
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions
from fedrecsk.estimators._uplink import UPLINK_CONSTRAINTS, SecureAggregation
from fedrecsk.methods.bce_rounds import ItemWeighting
from fedrecsk.methods.factor_state import SamplingName
from fedrecsk.methods.meta_network import PredictorName

FACTOR_CONSTRAINTS: Constraints = {
    **SHARED_CONSTRAINTS,
    **UPLINK_CONSTRAINTS,
    "model": [StrOptions({"mf", "ncf", "lightgcn"})],
    "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"}), None],
    "n_graph_layers": [Interval(Integral, 1, None, closed="left")],
    "item_propagation": ["boolean"],
    "sampling": [StrOptions({"uniform", "poisson", "epoch", "stratified"})],
    "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    "objective": [StrOptions({"whole-data", "bce"})],
    "l2_exponent": [Interval(Real, 0, 1, closed="both")],
    "unobserved_weight": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    "item_curvature": ["boolean"],
    "init_scale": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    "optimizer": [StrOptions({"auto", "sgd", "momentum", "adam"})],
    "server_optimizer": [StrOptions({"sgd", "momentum", "adam"})],
    "server_learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    "item_bias": ["boolean"],
    "refit": ["boolean"],
}
# Of prediction.
PREDICTION_CONSTRAINTS: Constraints = {
    "item_weighting": [StrOptions({"count", "magnitude", "interactions", "fedavg"})],
    "discount": [Interval(Real, 0, 1, closed="both")],
    "discount_decay": [Interval(Real, 0, 1, closed="both")],
    "n_clusters": [Interval(Integral, 1, None, closed="left")],
    "patience": [Interval(Integral, 1, None, closed="left")],
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
    model : {"mf", "ncf", "lightgcn"}, default="mf"
        Matrix factorisation, or with ``objective="bce"`` only: neural collaborative filtering, a
        small network over a user and an item vector, shared like the items; LightGCN, such a
        network after propagation over the graph of a user and its items.
    n_rounds : int, default=40
        Rounds of a fit.
    clients_per_round : int or float, default=0.2
        Delegates a round: a number, or a share of all clients in (0, 1].
    sampling : {"epoch", "uniform", "poisson", "stratified"}, default="epoch"
        ``"epoch"`` draws among those with the fewest turns, so that everybody takes part once
        before anybody does so twice; ``"uniform"`` draws each round anew; ``"poisson"`` draws
        each client for itself, so that cohorts vary in size and a round may have nobody;
        ``"stratified"`` gives equal quotas to `n_clusters` clusters of the users' vectors, as
        FedFast does.
    availability : float, mapping, array-like, callable or None, default=None
        Chance that a client is there in a round; the server draws among those that are. A float
        is everybody's, a mapping has one by client id, an array one for each client in the order
        of the sorted client ids. A function ``availability(round, client_ids)`` is called once a
        round, with the number of it in ``history_`` and the sorted client ids, and returns a
        truth value or a chance for each; it must give the same for the same. None: all are
        there, always.
    dropout_rate : float in [0, 1), default=0.0
        Chance that a client that was asked never delivers.
    client_seconds : float, mapping, array-like or None, default=None
        Seconds that each client's device takes for one interaction of its training rows in one
        local epoch (``"whole-data"``: in all). How long it takes in a round is that times rows
        and epochs, times a random factor, log-normal with median 1 and a spread of 0.25.
    deadline : float or None, default=None
        Seconds after which a client is not waited for. Needs `client_seconds`.
    over_selection : float, default=0.0
        Clients that are asked beyond those of `clients_per_round`, as a share of these. The first
        `clients_per_round` that deliver count, in order of their seconds, or in a random one; the
        others have trained for nothing. With 0 a round shrinks by those that do not deliver.
    local_epochs : int, default=5
        Passes over a client's own examples in a round (``"bce"``).
    learning_rate : float or "auto", default="auto"
        Of local training (``"bce"``): 0.1 for ``"mf"``; for networks 0.3 with ``"sgd"``, 0.03
        with ``"momentum"`` and 0.01 with ``"adam"``.
    batch_size : int, None or "auto", default="auto"
        Examples in a local step (``"bce"``); None takes all of a client's at once, which
        ``"lightgcn"`` needs. ``"auto"``: 64 for ``"mf"``, and for ``"ncf"`` unless the server
        uses Adam; else None.
    n_negatives : int, default=4
        Unseen items drawn per interaction, anew each round (``"bce"``).
    l2 : float or "auto", default="auto"
        Penalty. ``"whole-data"``: per interaction of a user or item with the mean number of
        them; ``"auto"`` follows from these means, 0.13 on MovieLens-100K and 0.37 on data with
        5 interactions a user. ``"bce"``: per example, 0.02 with
        the server's ``"newton"``, else 0.01.
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
    optimizer : {"auto", "sgd", "momentum", "adam"}, default="auto"
        Of local training (``"bce"``): ``"sgd"``, but ``"adam"`` for networks whose server does not
        use it.
    item_weighting : {"count", "magnitude", "interactions", "fedavg"}, default="count"
        How the server weighs the changes of one item by several delegates (``"bce"``): equally,
        by the size of the change, by the client's number of interactions; ``"fedavg"`` divides
        by all delegates instead of by those who changed the item.
    item_bias : bool, default=True
        Whether items have an aggregated bias (``"bce"``).
    n_graph_layers : int, default=1
        Layers of propagation of ``"lightgcn"``.
    item_propagation : bool, default=False
        Whether a user's own items are propagated as well, as LightGCN has it. Only training
        interactions bear that mark, so the network learns to tell them by it and ranks worse.
    server_optimizer : {"auto", "newton", "sgd", "momentum", "adam"}, default="auto"
        What the server makes of the clients' changes (``"bce"``). ``"newton"`` fits every item's
        step to the curvature that its clients amount to; it needs ``model="mf"``, local
        ``"sgd"``, ``item_weighting="count"`` and one user a client, and is what ``"auto"`` takes
        where it can; else ``"sgd"``, and ``"adam"`` for networks.
    server_learning_rate : float or "auto", default="auto"
        ``"auto"``: 1 for ``"bce"`` with ``"sgd"`` (adds the change), 0.05 with momentum and Adam,
        0.1 with Adam for networks; for ``"newton"`` (share of the old evidence that a round
        forgets) and ``"whole-data"`` it follows from the participation and falls over the rounds.
    predictor : {"linear", "mlp", "mean", "cluster"} or None, default="linear"
        Meta-network; ``"mlp"`` is the paper's. None turns prediction off. A predicted vector
        that nobody would read is not computed: where `refit` lets every user fit its own at the
        end, only literal prediction (``anchor=False, objective="bce"``) leaves a trace.
    discount, discount_decay : float in [0, 1], default=1.0
        A prediction in round t is multiplied by ``discount * discount_decay**t``.
    n_clusters : int, default=10
        Of ``predictor="cluster"`` and ``sampling="stratified"``.
    cv : int, default=5
        Folds over the delegates that choose the meta-network's candidate.
    patience : int, default=5
        Rounds without improvement after which prediction ends for good.
    patience_on : {"loss", "ndcg"}, default="loss"
        What has to improve: the training loss, or NDCG@20 on held-out rows (a share of
        `validation_fraction` of each user's).
    gate : bool, default=True
        Weigh predictions by their cross-validated R2, predict nothing where that is not above
        zero, and move only users who never took part: others hold what their own data taught
        them. False is the literal method.
    anchor : bool, default=True
        Keep predictions apart: they are what a user is served with until its turn comes, and no
        training starts from them. False, the literal method, adds them to the user's vector.
    extra_inputs : bool, default=True
        Show the meta-network also what the server knows anyway: the logarithm of a user's number
        of interactions, whether it took part, and how often.
    refit : bool, default=True
        At the end every user fits its own vector to its own rows and the final item vectors,
        on its own device; nothing is sent.
    defence : {"clip", "median", "trimmed-mean", "krum", "multi-krum"} or None, default=None
        How the server adds up what clients send if it does not trust them: clipped; by the median
        or the trimmed mean of those who sent a row; of the one client, or those, whose uploads are
        most like others'. All of them clip first. None adds everything up. Uploads that are not
        finite, or a hundred times as long as most, are dropped in any case.
    assumed_malicious : float in [0, 0.5), default=0.1
        Largest share of dishonest clients in a round that a defence has to withstand.
    clip_quantile : float in (0, 1], default=0.7
        With a defence, rows longer than this quantile of all rows of the round are shortened to
        it, and steps made as long again as most clients want them; 1 shortens none.
    check_uploads : bool, default=True
        With a defence and the whole-data objective, also drop clients whose uploads no users with
        any history would lead to. Not of compressed uploads, which are blurred.
    malicious_fraction : float in [0, 1), default=0.0
        Share of the clients that are dishonest, to try defences on.
    attack : {"gradient", "lookalike", "random", "bandwagon", "sign-flip", "scale", "gaussian", \
"nan"}, default="gradient"
        What dishonest clients do. The first four want everybody to be recommended `target_item`;
        the others spoil the model. See `docs/robust.md`.
    attack_strength : float, default=10.0
        How much louder than honest clients they are.
    target_item : item id, default=None
        What shall be recommended; None: the least popular item.
    compression : {"top-k", "quantised", "low-rank"} or None, default=None
        How clients make their uploads smaller: they send the longest of their rows alone; rows in
        a few bits; the product of two thin matrices. See `docs/communication.md`.
    compression_level : float or "auto", default="auto"
        Of ``"top-k"`` the share of its rows that a client sends, of ``"quantised"`` the bits of a
        number, of ``"low-rank"`` the rank; ``"auto"``: 0.1, 4 and 2.
    error_feedback : bool, default=True
        With compression, clients keep what they have not sent and add it the next time.
    secure_aggregation : bool or "simulate", default=False
        Let clients mask their uploads, so that the server sees sums alone. What looks at single
        uploads or users is refused: defences, predictors at work, stratified sampling. True does
        the arithmetic and counts the bytes; ``"simulate"`` runs the whole protocol to the same
        result, for small federations.
    secure_bits : int in [2, 32], default=32
        Of a masked number. Sums of n clients are exact to n half steps, with about
        ``2**(secure_bits - 1) / n`` steps to the largest number.
    privacy : {"central", "local"} or None, default=None
        Differential privacy of what the server learns, with a client and all that it holds as
        the unit: uploads are clipped, and their sums noised by a server that is trusted with
        uploads, or uploads by each client. `docs/privacy.md` says what that protects and what
        not. Refused with what would look at clients past the noise: defences, early stopping,
        ``sampling="stratified"``, predictions that are read, and with ``"bce"`` other item
        weightings than ``"fedavg"``; also with clients that may fail, compression and secure
        aggregation. With it every client weighs the same.
    noise_multiplier : float or "auto", default=1.0
        Standard deviation of the noise over the length that uploads are clipped to. ``"auto"``:
        the smallest with which all `n_rounds` together stay within `target_epsilon`.
    clip_norm : float or "auto", default="auto"
        Length that a client's upload is shortened to, rows, counts and numbers as one vector.
        ``"auto"`` gives each of these parts a length of its own, learned privately as one that
        three clients in ten stay within.
    target_epsilon : float or None, default=None
        The fit ends before the round that would exceed it.
    delta : float or "auto", default="auto"
        ``"auto"``: 1e-5, or ``n_clients ** -1.1`` where that is less.
    accountant : {"auto", "pld", "rdp"}, default="auto"
        What adds rounds up: distributions of the privacy loss, or Rényi divergences, which bound
        epsilon less tightly and alone know cohorts of fixed size. ``"auto"`` takes ``"rdp"`` for
        those, else ``"pld"``. Needs ``pip install "fedrecsk[privacy]"``.
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
    item_factors_ : ndarray of shape (n_items, n_factors)
    item_bias_ : ndarray of shape (n_items,)
        Zero with ``"whole-data"``.
    times_sampled_ : ndarray of shape (n_users,)
        Rounds in which each user took part.
    network_ : ndarray of shape (n_weights,)
        Weights of the network of ``"ncf"`` or ``"lightgcn"``, layer by layer; empty for ``"mf"``.
    n_graph_layers_ : int
        0 for other models than ``"lightgcn"``.
    item_propagation_ : bool
        False for other models than ``"lightgcn"``.
    item_evidence_ : ndarray of shape (n_items, 2)
    user_gram_ : ndarray of shape (n_columns, n_columns)
    user_gram_weight_ : float
        What the quasi-Newton steps of the server know, for `partial_fit` to go on from: how many
        clients spoke of each item and with what curvature, and the running mean of u uᵀ.
    user_ids_, item_ids_, client_ids_ : ndarray
        Sorted ids.
    seen_indptr_, seen_indices_ : ndarray
        Items of each user in `fit`, in CSR form.
    malicious_client_ids_ : ndarray
        Clients that `attack` makes dishonest, sorted; none without.
    target_item_ : item id or None
        What they promote.
    epsilon_ : float
        What all fits so far have cost; infinite without privacy.
    delta_ : float or None
        What epsilon goes with.
    privacy_spent_ : list of dict or None
        Rounds by noise and sampling, for `partial_fit` to count on from.
    clip_norms_ : ndarray of shape (n_parts,)
        What the parts of an upload would be shortened to next; empty without privacy.
    history_ : list of dict
        One a round: ``round, loss, seconds, clients, rejected, bytes_up, bytes_down``; of the
        clients, those rejected sent what was not finite or far too large. With privacy
        ``epsilon`` (all rounds so far) and ``clip_norm``; the rest is not protected. With early
        stopping ``validation_ndcg``, with a predictor at work ``predictor_r2, predictor_cosine,
        predictor_candidate, predicted_share, predicted_norm, prediction_active, user_norm``.
        Where clients may fail, also how many were ``asked``, ``dropped`` out, were too ``late``,
        and ``unavailable`` to be asked, and with `client_seconds` the seconds that the server
        ``waited``. ``clients`` are those that delivered, and ``bytes_down`` went to all that were
        asked. A round in which nobody delivers changes nothing, and its ``loss`` is None.
    n_rounds_ : int
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Of DataFrames.

    See Also
    --------
    FedAvgRecommender : The same model by plain federated averaging.
    FedFastRecommender : The method that prediction generalises.

    Notes
    -----
    The server holds the users' vectors here where predictions are read, which plain federated
    matrix factorisation does not ask for: they reveal taste. `docs/methods/fedfnn.md` says what is
    ours and what the paper's.

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
        **PREDICTION_CONSTRAINTS,
        **PRIVACY_CONSTRAINTS,
        "server_optimizer": [StrOptions({"auto", "newton", "sgd", "momentum", "adam"})],
        "predictor": [StrOptions({"mlp", "linear", "mean", "cluster"}), None],
        "cv": [Interval(Integral, 2, None, closed="left")],
        "patience_on": [StrOptions({"loss", "ndcg"})],
        "gate": ["boolean"],
        "anchor": ["boolean"],
        "extra_inputs": ["boolean"],
    }

    def __init__(
        self,
        n_factors: int = 32,
        *,
        objective: Objective = "whole-data",
        model: ModelName = "mf",
        n_rounds: int = 40,
        clients_per_round: int | float = 0.2,
        sampling: SamplingName = "epoch",
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
        item_weighting: ItemWeighting = "count",
        item_bias: bool = True,
        n_graph_layers: int = 1,
        item_propagation: bool = False,
        server_optimizer: ServerOptimizerName = "auto",
        server_learning_rate: float | Literal["auto"] = "auto",
        predictor: PredictorName | None = "linear",
        discount: float = 1.0,
        discount_decay: float = 1.0,
        n_clusters: int = 10,
        cv: int = 5,
        patience: int = 5,
        patience_on: Literal["loss", "ndcg"] = "loss",
        gate: bool = True,
        anchor: bool = True,
        extra_inputs: bool = True,
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
        self.n_factors = n_factors
        self.objective = objective
        self.model = model
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
        self.item_weighting = item_weighting
        self.item_bias = item_bias
        self.n_graph_layers = n_graph_layers
        self.item_propagation = item_propagation
        self.server_optimizer = server_optimizer
        self.server_learning_rate = server_learning_rate
        self.predictor = predictor
        self.discount = discount
        self.discount_decay = discount_decay
        self.n_clusters = n_clusters
        self.cv = cv
        self.patience = patience
        self.patience_on = patience_on
        self.gate = gate
        self.anchor = anchor
        self.extra_inputs = extra_inputs
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
            item_weighting=self.item_weighting,
            item_bias=self.item_bias,
            n_graph_layers=self.n_graph_layers,
            item_propagation=self.item_propagation,
            server_optimizer=self.server_optimizer,
            server_learning_rate=self.server_learning_rate,
            predictor=self.predictor,
            discount=self.discount,
            discount_decay=self.discount_decay,
            n_clusters=self.n_clusters,
            cv=self.cv,
            patience=self.patience,
            patience_on=self.patience_on,
            gate=self.gate,
            anchor=self.anchor,
            extra_inputs=self.extra_inputs,
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


def factor_probability(scores: NDArray[np.float64], objective: Objective) -> NDArray[np.float64]:
    """Turn scores of a factor model into probabilities, keeping their order.

    With ``"bce"`` a score is a log-odds. The whole-data objective fits 1 to interactions and 0
    to the rest, so a score is a probability already, except that it can leave [0, 1]; a
    logistic curve of slope 1 through (1/2, 1/2) bends it back without making ties.
    """
    return logistic(scores if objective == "bce" else 4.0 * (scores - 0.5))
