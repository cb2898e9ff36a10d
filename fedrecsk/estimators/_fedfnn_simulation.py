"""A fit of FedFNN, FedAvg or FedFast, from its parameters to its attributes.

`simulate_fedfnn` settles in this order who takes part and how uploads travel, what is promised of
clients, what "auto" stands for, what delegates and server do in a round, and runs the rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.data.interactions import Interactions
from fedrecsk.engine.accounting import AccountantName
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
from fedrecsk.engine.privacy import PrivacyName
from fedrecsk.engine.sampling import cohort_size
from fedrecsk.engine.secure_sum import steps
from fedrecsk.engine.shards import CPU_CHUNK_ROWS, ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uplink import Uplink
from fedrecsk.estimators._base import Attributes, RoundWatch
from fedrecsk.estimators._factors import (
    Refit,
    Step,
    Validation,
    fit_factors,
    hold_out,
    make_shards,
)
from fedrecsk.estimators._privacy import (
    NOTHING_PROMISED,
    Promise,
    check_private,
    promise,
    rounds_of,
)
from fedrecsk.estimators._uplink import SecureAggregation, check_sums_suffice, distrust
from fedrecsk.methods.bce_rounds import ItemWeighting, bce_download, bce_step, refit_bce
from fedrecsk.methods.factor_state import (
    FactorState,
    Logs,
    SamplingName,
    draw_delegates,
    served_factors,
)
from fedrecsk.methods.fedfnn import Monitor, Predict, Train, fedfnn_step, prediction_step
from fedrecsk.methods.meta_network import PredictorName
from fedrecsk.methods.whole_data_rounds import (
    refit_whole_data,
    whole_data_download,
    whole_data_step,
)
from fedrecsk.models import whole_data
from fedrecsk.models.head import init_head

ModelName = Literal["mf", "ncf", "lightgcn"]
Objective = Literal["whole-data", "bce"]
ServerOptimizerName = OptimizerName | Literal["auto", "newton"]

# What "auto" stands for, by objective; chosen in pilots, see benchmarks.
AUTO_BCE_L2 = {"newton": 0.02, "plain": 0.01}
AUTO_INIT_SCALE = {"whole-data": 0.01, "bce": 0.1}
# Of networks, by optimiser. Adam on the server wants the sum of the clients' plain gradients, and
# a server that adds changes wants clients that make some way on their own.
AUTO_NETWORK_RATE = {"sgd": 0.3, "momentum": 0.03, "adam": 0.01}
AUTO_ADAM_SERVER_RATE = {"mf": 0.05, "ncf": 0.1, "lightgcn": 0.1}
# What is logged of a round in which nobody takes part.
NOBODY: Logs = {"loss": None, "clients": 0, "rejected": 0, "bytes_down": 0, "bytes_up": 0}
# Descent steps of a refit with objective="bce".
REFIT_STEPS = 20
# Decay of the server's running averages in quasi-Newton steps.
STATISTICS_DECAY = 0.9


def simulate_fedfnn(
    data: Interactions,
    watch: RoundWatch,
    *,
    previous: Attributes | None,
    n_factors: int,
    objective: Objective,
    model: ModelName,
    n_rounds: int,
    clients_per_round: int | float,
    sampling: SamplingName,
    availability: Availability,
    dropout_rate: float,
    client_seconds: ClientSeconds,
    deadline: float | None,
    over_selection: float,
    local_epochs: int,
    learning_rate: float | Literal["auto"],
    batch_size: int | Literal["auto"] | None,
    n_negatives: int,
    l2: float | Literal["auto"],
    l2_exponent: float,
    unobserved_weight: float | Literal["auto"],
    item_curvature: bool,
    init_scale: float | Literal["auto"],
    optimizer: OptimizerName | Literal["auto"],
    item_weighting: ItemWeighting,
    item_bias: bool,
    n_graph_layers: int,
    item_propagation: bool,
    server_optimizer: ServerOptimizerName,
    server_learning_rate: float | Literal["auto"],
    predictor: PredictorName | None,
    discount: float,
    discount_decay: float,
    n_clusters: int,
    cv: int,
    patience: int,
    patience_on: Literal["loss", "ndcg"],
    gate: bool,
    anchor: bool,
    extra_inputs: bool,
    refit: bool,
    defence: DefenceName | None,
    assumed_malicious: float,
    clip_quantile: float,
    check_uploads: bool,
    malicious_fraction: float,
    attack: AttackName,
    attack_strength: float,
    target_item: Any,
    compression: CompressionName | None,
    compression_level: float | Literal["auto"],
    error_feedback: bool,
    secure_aggregation: SecureAggregation,
    secure_bits: int,
    privacy: PrivacyName | None,
    noise_multiplier: float | Literal["auto"],
    clip_norm: float | Literal["auto"],
    target_epsilon: float | None,
    delta: float | Literal["auto"],
    accountant: AccountantName | Literal["auto"],
    early_stopping: bool,
    validation_fraction: float,
    n_iter_no_change: int,
    tol: float,
    device: str,
    random_state: int | np.random.RandomState | None,
) -> Attributes:
    """Settle what the parameters say, bind the functions of a round, and run the rounds.

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
    check_objective(model, objective)
    streams = Streams.from_random_state(random_state)
    # A refit replaces every vector that was only predicted before it is read; predictions that
    # training starts from leave their traces.
    if refit and (objective == "whole-data" or anchor):
        predictor = None
    if secure_aggregation:
        cohort = cohort_size(clients_per_round, data.n_clients)
        check_sums_suffice(
            defence=defence, compression=compression, predicts=predictor is not None,
            sampling=sampling, cohort=cohort, n_clients=data.n_clients,
        )  # fmt: skip
        steps(secure_bits, cohort)  # or the first round would find that the ring is too small
    federation = _federation(
        data, streams,
        hold_some_out=early_stopping or (predictor is not None and patience_on == "ndcg"),
        validation_fraction=validation_fraction, clients_per_round=clients_per_round,
        availability=availability, dropout_rate=dropout_rate, client_seconds=client_seconds,
        deadline=deadline, over_selection=over_selection,
        local_epochs=local_epochs if objective == "bce" else 1,
        defence=defence, assumed_malicious=assumed_malicious, clip_quantile=clip_quantile,
        check_uploads=check_uploads, malicious_fraction=malicious_fraction, attack=attack,
        attack_strength=attack_strength, target_item=target_item,
        lookalike_fits=objective == "whole-data" and privacy is None, compression=compression,
        compression_level=compression_level, error_feedback=error_feedback,
        secure_aggregation=secure_aggregation, secure_bits=secure_bits, device=device,
    )  # fmt: skip
    promised = None
    if privacy is not None:
        check_private(
            defence=defence, early_stopping=early_stopping, sampling=sampling, predictor=predictor,
            objective=objective, item_weighting=item_weighting,
            unreliable=federation.participation is not None, compression=compression,
            secure_aggregation=bool(secure_aggregation),
        )  # fmt: skip
        promised = promise(
            streams, privacy=privacy, noise_multiplier=noise_multiplier, clip_norm=clip_norm,
            target_epsilon=target_epsilon, delta=delta, accountant=accountant, sampling=sampling,
            cohort=federation.cohort, n_clients=data.n_clients, n_rounds=n_rounds,
            previous=previous,
        )  # fmt: skip
        federation = federation.private(promised)
    resolved = _resolved(
        data, objective=objective, model=model, learning_rate=learning_rate, batch_size=batch_size,
        l2=l2, unobserved_weight=unobserved_weight, init_scale=init_scale, optimizer=optimizer,
        item_weighting=item_weighting, item_bias=item_bias, n_graph_layers=n_graph_layers,
        item_propagation=item_propagation, server_optimizer=server_optimizer,
        server_learning_rate=server_learning_rate,
    )  # fmt: skip
    # Nobody asks for an earlier state: neither a predictor, nor early stopping for the best one.
    in_place = predictor is None and not early_stopping
    if objective == "bce":
        training = _bce(
            federation, resolved, streams, item_weighting=item_weighting, n_negatives=n_negatives,
            local_epochs=local_epochs, in_place=in_place,
        )  # fmt: skip
    else:
        training = _whole_data(
            federation, resolved, l2_exponent=l2_exponent, item_curvature=item_curvature,
            in_place=in_place,
        )  # fmt: skip
    predict = None
    if predictor is not None:
        predict = _prediction(
            federation.shards, streams, predictor=predictor, discount=discount,
            discount_decay=discount_decay, cv=cv, patience=patience, gate=gate, anchor=anchor,
            extra_inputs=extra_inputs, n_clusters=n_clusters,
        )  # fmt: skip
    watched = federation.validation if patience_on == "ndcg" else None
    step = _step(
        federation, training, predict, _monitor(watched, resolved), promised, streams,
        sampling=sampling, n_clusters=n_clusters,
    )  # fmt: skip

    def besides(n_done: int) -> Attributes:
        cost = NOTHING_PROMISED if promised is None else promised.fitted(n_done)
        return {**federation.fitted, **cost}

    watch.besides = besides
    with torch_threads(CPU_CHUNK_ROWS * n_factors):
        return fit_factors(
            data, watch, step=step, refit=training.refit if refit else None, n_factors=n_factors,
            item_bias=resolved.item_bias, init_scale=resolved.init_scale,
            server_optimizer=resolved.server_optimizer,
            head=init_head(n_factors, streams=streams, device=federation.shards.device)
            if model != "mf" else {},
            n_graph_layers=resolved.n_graph_layers, item_propagation=resolved.item_propagation,
            n_rounds=rounds_of(promised, n_rounds),
            validation=federation.validation if early_stopping else None,
            shards=federation.shards, n_iter_no_change=n_iter_no_change, tol=tol, streams=streams,
            previous=previous,
        )  # fmt: skip


# Who takes part --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Federation:
    """Who takes part in rounds, and how uploads travel.

    Attributes
    ----------
    shards : ClientShards
        What clients train on.
    validation : Validation or None
        What they do not train on.
    cohort : int
        Clients wanted in a round.
    participation : Participation or None
        Who delivers; None: all.
    uplink : Uplink or None
    fitted : dict
        Attributes that say who was dishonest.
    """

    shards: ClientShards
    validation: Validation | None
    cohort: int
    participation: Participation | None
    uplink: Uplink | None
    fitted: Attributes

    def private(self, promised: Promise) -> _Federation:
        """Return the same with what makes a promise true."""
        return replace(self, uplink=replace(self.uplink or Uplink(), privacy=promised.privacy))


def _federation(
    data: Interactions,
    streams: Streams,
    *,
    hold_some_out: bool,
    validation_fraction: float,
    clients_per_round: int | float,
    availability: Availability,
    dropout_rate: float,
    client_seconds: ClientSeconds,
    deadline: float | None,
    over_selection: float,
    local_epochs: int,
    defence: DefenceName | None,
    assumed_malicious: float,
    clip_quantile: float,
    check_uploads: bool,
    malicious_fraction: float,
    attack: AttackName,
    attack_strength: float,
    target_item: Any,
    lookalike_fits: bool,
    compression: CompressionName | None,
    compression_level: float | Literal["auto"],
    error_feedback: bool,
    secure_aggregation: SecureAggregation,
    secure_bits: int,
    device: str,
) -> _Federation:
    """Hold rows out, draw who is dishonest, and read who delivers."""
    rows: NDArray[np.bool_] | slice = slice(None)
    validation = None
    if hold_some_out:
        rows, validation = hold_out(data, validation_fraction, streams)
    around = distrust(
        data, streams, defence=defence, assumed_malicious=assumed_malicious,
        clip_quantile=clip_quantile, check_uploads=check_uploads,
        malicious_fraction=malicious_fraction, attack=attack, attack_strength=attack_strength,
        target_item=target_item, lookalike_fits=lookalike_fits, compression=compression,
        compression_level=compression_level, error_feedback=error_feedback,
        secure_aggregation=secure_aggregation, secure_bits=secure_bits,
    )  # fmt: skip
    shards = make_shards(around.data, rows, resolve_device(device))
    cohort = cohort_size(clients_per_round, data.n_clients)
    participation = read_participation(
        data.clients.ids, shards.client_rows, availability=availability, dropout_rate=dropout_rate,
        client_seconds=client_seconds, deadline=deadline, over_selection=over_selection,
        local_epochs=local_epochs, streams=streams,
    )  # fmt: skip
    return _Federation(shards, validation, cohort, participation, around.uplink, around.fitted)


# What "auto" stands for ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Resolved:
    """Parameters of the model and of training, with "auto" resolved.

    Attributes
    ----------
    n_graph_layers : int
        0 for other models than LightGCN.
    item_propagation, item_bias : bool
        False where the model or the objective has none.
    init_scale : float
    optimizer : Optimizer
        Of local training.
    batch_size : int or None
    server_optimizer : Optimizer or None
        None is the quasi-Newton step.
    server_rate : float or None
        Of quasi-Newton steps, with either objective; None follows from the participation.
    l2, unobserved_weight : float
    """

    n_graph_layers: int
    item_propagation: bool
    item_bias: bool
    init_scale: float
    optimizer: Optimizer
    batch_size: int | None
    server_optimizer: Optimizer | None
    server_rate: float | None
    l2: float
    unobserved_weight: float


def _resolved(
    data: Interactions,
    *,
    objective: Objective,
    model: ModelName,
    learning_rate: float | Literal["auto"],
    batch_size: int | Literal["auto"] | None,
    l2: float | Literal["auto"],
    unobserved_weight: float | Literal["auto"],
    init_scale: float | Literal["auto"],
    optimizer: OptimizerName | Literal["auto"],
    item_weighting: ItemWeighting,
    item_bias: bool,
    n_graph_layers: int,
    item_propagation: bool,
    server_optimizer: ServerOptimizerName,
    server_learning_rate: float | Literal["auto"],
) -> _Resolved:
    """Resolve what is "auto", and what has no meaning for a model or an objective."""
    if server_optimizer == "auto" and model != "mf":
        server_optimizer = "adam"
    local, examples_per_step = _local(model, optimizer, learning_rate, batch_size, server_optimizer)
    server = _server(
        server_optimizer,
        server_learning_rate,
        model,
        newton_fits=model == "mf"
        and local.name == "sgd"
        and item_weighting == "count"
        and data.n_clients == data.n_users,
    )
    sizes = len(data), data.n_users, data.n_items
    if l2 == "auto":
        of_bce = AUTO_BCE_L2["newton" if server is None else "plain"]
        l2 = whole_data.default_l2(*sizes) if objective == "whole-data" else of_bce
    if unobserved_weight == "auto":
        unobserved_weight = whole_data.default_unobserved_weight(*sizes)
    return _Resolved(
        n_graph_layers=n_graph_layers if model == "lightgcn" else 0,
        item_propagation=bool(item_propagation) and model == "lightgcn",
        item_bias=item_bias and objective == "bce",
        init_scale=AUTO_INIT_SCALE[objective] if init_scale == "auto" else float(init_scale),
        optimizer=local,
        batch_size=examples_per_step,
        server_optimizer=server,
        server_rate=None if server_learning_rate == "auto" else float(server_learning_rate),
        l2=float(l2),
        unobserved_weight=float(unobserved_weight),
    )


def _local(
    model: ModelName,
    optimizer: OptimizerName | Literal["auto"],
    rate: float | Literal["auto"],
    batch_size: int | Literal["auto"] | None,
    server: ServerOptimizerName,
) -> tuple[Optimizer, int | None]:
    """Resolve the clients' optimiser and examples in a step, which depend on the server's."""
    plain = model == "mf" or server == "adam"
    if optimizer == "auto":
        optimizer = "sgd" if plain else "adam"
    if rate == "auto":
        rate = 0.1 if model == "mf" else AUTO_NETWORK_RATE[optimizer]
    if batch_size == "auto":
        # A step of LightGCN propagates over all of a client's positives.
        batch_size = 64 if model == "mf" or (model == "ncf" and not plain) else None
    return Optimizer(optimizer, float(rate)), batch_size


def _server(
    name: ServerOptimizerName,
    rate: float | Literal["auto"],
    model: ModelName,
    *,
    newton_fits: bool,
) -> Optimizer | None:
    """Resolve the server's optimiser; None is the quasi-Newton step."""
    if name == "newton" and not newton_fits:
        raise ValueError(
            'server_optimizer="newton" needs model="mf", optimizer="sgd", item_weighting="count" '
            "and one user per client: only then the clients' changes add up to a gradient. "
            "Use another one."
        )
    if name == "newton" or (name == "auto" and newton_fits):
        return None
    plain: OptimizerName = "sgd" if name == "auto" else name
    if rate == "auto":
        rate = {"sgd": 1.0, "momentum": 0.05, "adam": AUTO_ADAM_SERVER_RATE[model]}[plain]
    return Optimizer(plain, float(rate))


def check_objective(model: ModelName, objective: Objective) -> None:
    """Refuse to solve a network exactly."""
    if model != "mf" and objective == "whole-data":
        raise ValueError(
            f'model="{model}" needs objective="bce": only a linear model can be solved for.'
        )


# A round ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Training:
    """What the clients of an objective do in a round and after the last one.

    Attributes
    ----------
    train : callable
        See `fedrecsk.methods.fedfnn.Train`.
    refit : callable
        ``refit(state, clients) -> user vectors``.
    download : callable
        ``download(state) -> bytes`` that a client is sent in a round.
    """

    train: Train
    refit: Refit
    download: Callable[[FactorState], int]


def _bce(
    federation: _Federation,
    resolved: _Resolved,
    streams: Streams,
    *,
    item_weighting: ItemWeighting,
    n_negatives: int,
    local_epochs: int,
    in_place: bool,
) -> _Training:
    """Bind what sampled negatives need."""
    forgetting = None
    if resolved.server_optimizer is None and resolved.server_rate is not None:
        forgetting = min(1.0, resolved.server_rate)

    def train(state: FactorState, delegates: NDArray[np.int64], t: int) -> tuple[FactorState, Logs]:
        return bce_step(
            state,
            federation.shards,
            delegates,
            t,
            streams=streams,
            item_weighting=item_weighting,
            item_bias=resolved.item_bias,
            n_graph_layers=resolved.n_graph_layers,
            item_propagation=resolved.item_propagation,
            n_negatives=n_negatives,
            batch_size=resolved.batch_size,
            local_epochs=local_epochs,
            optimizer=resolved.optimizer,
            l2=resolved.l2,
            server_optimizer=resolved.server_optimizer,
            forgetting=forgetting,
            decay=STATISTICS_DECAY,
            uplink=federation.uplink,
            in_place=in_place,
        )

    def refit(state: FactorState, clients: NDArray[np.int64]) -> Tensor:
        return refit_bce(
            state,
            federation.shards,
            clients,
            item_bias=resolved.item_bias,
            n_graph_layers=resolved.n_graph_layers,
            item_propagation=resolved.item_propagation,
            n_negatives=n_negatives,
            n_steps=REFIT_STEPS,
            l2=resolved.l2,
            streams=streams,
        )

    return _Training(train, refit, bce_download)


def _whole_data(
    federation: _Federation,
    resolved: _Resolved,
    *,
    l2_exponent: float,
    item_curvature: bool,
    in_place: bool,
) -> _Training:
    """Bind what exact solves need."""
    shards, penalty = federation.shards, whole_data.Penalty(resolved.l2, l2_exponent)

    def train(state: FactorState, delegates: NDArray[np.int64], t: int) -> tuple[FactorState, Logs]:
        return whole_data_step(
            state,
            shards,
            delegates,
            t,
            unobserved_weight=resolved.unobserved_weight,
            penalty=penalty,
            server_learning_rate=resolved.server_rate,
            decay=STATISTICS_DECAY,
            item_curvature=item_curvature,
            uplink=federation.uplink,
            in_place=in_place,
        )

    def refit(state: FactorState, clients: NDArray[np.int64]) -> Tensor:
        return refit_whole_data(
            state,
            shards,
            clients,
            unobserved_weight=resolved.unobserved_weight,
            penalty=penalty,
            mean_rows=len(shards.items) / shards.n_users,
        )

    return _Training(train, refit, whole_data_download)


def _prediction(
    shards: ClientShards,
    streams: Streams,
    *,
    predictor: PredictorName,
    discount: float,
    discount_decay: float,
    cv: int,
    patience: int,
    gate: bool,
    anchor: bool,
    extra_inputs: bool,
    n_clusters: int,
) -> Predict:
    """Bind what prediction needs."""

    def predict(
        before: FactorState,
        trained: FactorState,
        delegates: NDArray[np.int64],
        t: int,
        monitored: float,
    ) -> tuple[FactorState, Logs]:
        return prediction_step(
            before,
            trained,
            shards,
            delegates,
            t,
            monitored=monitored,
            streams=streams,
            predictor=predictor,
            discount=discount,
            discount_decay=discount_decay,
            cv=cv,
            patience=patience,
            gate=gate,
            anchor=anchor,
            extra_inputs=extra_inputs,
            n_clusters=n_clusters,
        )

    return predict


def _monitor(validation: Validation | None, resolved: _Resolved) -> Monitor:
    """Say what has to fall for prediction to go on: the ranking's NDCG times -1, or the loss."""

    def monitor(trained: FactorState, logs: Logs) -> float:
        if validation is None:
            return float(logs["loss"])  # patience decides now, so the device is waited for
        return -validation.ndcg(
            served_factors(trained),
            trained.item_table,
            trained.head,
            resolved.n_graph_layers,
            item_propagation=resolved.item_propagation,
        )

    return monitor


def _step(
    federation: _Federation,
    training: _Training,
    predict: Predict | None,
    monitor: Monitor,
    promised: Promise | None,
    streams: Streams,
    *,
    sampling: SamplingName,
    n_clusters: int,
) -> Step:
    """Bind a whole round: the draw, the training, and what it costs in privacy."""
    participation, uplink = federation.participation, federation.uplink

    def train_and_predict(
        state: FactorState, delegates: NDArray[np.int64], t: int
    ) -> tuple[FactorState, Logs]:
        if len(delegates) and uplink is not None and not uplink.takes(len(delegates)):
            alone = {"clients": len(delegates), "rejected": len(delegates)}
            down = len(delegates) * training.download(state)
            return state, {**NOBODY, **alone, "bytes_down": down}
        after, logs = fedfnn_step(
            state, delegates, t, train=training.train, predict=predict, monitor=monitor
        )
        if promised is not None:
            logs["epsilon"] = promised.epsilons[t - state.first_round]
        return after, logs

    def step(state: FactorState, t: int) -> tuple[FactorState, Logs]:
        def draw(among: NDArray[np.int64] | None, n: int) -> NDArray[np.int64]:
            return draw_delegates(
                state, federation.shards, n, t, sampling, n_clusters, streams, among
            )

        if participation is None:
            delegates = draw(None, federation.cohort)
            if not len(delegates) and promised is None:  # which happens with "poisson"
                return state, dict(NOBODY)
            return train_and_predict(state, delegates, t)
        turnout = participation.of_round(t, federation.cohort, draw)
        wasted = len(turnout.failed) * training.download(state)
        after, logs = turnout.train(
            state, lambda chosen: train_and_predict(state, chosen, t), wasted
        )
        turns, missed = turnout.turns_after(after.turns, state.missed)
        return replace(after, turns=turns, missed=missed), logs

    return step
