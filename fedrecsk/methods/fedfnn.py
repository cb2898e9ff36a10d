"""FedFNN: predict the updates of the users that were not sampled.

Fabbri, Liu, McKenzie, Twardowski, Wijaya. "FedFNN: Faster Training Convergence Through Update
Predictions in Federated Recommender Systems", 2023, arXiv:2309.08635. FedFast, whose weighting
and clustering are arguments here: Muhammad et al., KDD 2020.

    for each round t:
        S        <- sample clients; their users are the delegates, all others subordinates
        u_k, v_k <- local training of every delegate from (u_k, V)
        V        <- V + weighted mean over the delegates that touched a row of (v_k - V)
        f        <- meta-network fitted to (u_k before training -> change of u_k), k in S
        u_s      <- u_s + discount * decay^t * confidence_s * f(u_s)   for every subordinate s
        stop predicting for good when the loss has not improved for `patience` rounds

Special cases are arguments: ``predictor=None, item_weighting="fedavg"`` is FedAvg, which divides
by all delegates instead of by those that touched the row. FedFast draws delegates by clusters
(``sampling="stratified"``) and predicts the mean change of a cluster (``predictor="cluster"``).

Prediction is here. The state and the sampling are in `factor_state`, local training and the
server's step in `bce_rounds` and, for the other objective, `whole_data_rounds`, and the candidates
for f in `meta_network`.

Where we deviate (only the abstract and summaries of the paper could be read):

- The literal method washes out what a user has learned: whoever took part once has a personal
  vector, and predictions know only the crowd. `gate` weights predictions by the predictor's
  cross-validated R2 and spares whoever has taken part. `anchor` keeps predictions apart from what
  users trained: they are what a user is served with until its turn comes, and no training starts
  from them, so errors do not pile up.
- ``server_optimizer="newton"``: a quasi-Newton step on the server (`fedrecsk.models.bce_newton`).
- ``objective="whole-data"`` replaces sampled negatives by exact client solves and a quasi-Newton
  server step (`fedrecsk.models.whole_data`). Delegates' vectors are then optimal for the current
  table, the item update needs nothing of the subordinates, and predicted vectors are the
  server's guess for users it has not heard of.
- `refit`: every user may fit its own vector to its own data before inference, on its own device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.traffic import dense_bytes
from fedrecsk.methods.factor_state import FactorState, Logs, served_factors, users_of
from fedrecsk.methods.meta_network import PredictorName, predict_updates

# ``train(state, delegates, t) -> (state, logs)``: what delegates and server learn in a round, see
# `bce_rounds.bce_step` and `whole_data_rounds.whole_data_step`.
Train = Callable[[FactorState, NDArray[np.int64], int], tuple[FactorState, Logs]]
# ``predict(before, trained, delegates, t, monitored) -> (state, logs)``: see `prediction_step`.
Predict = Callable[
    [FactorState, FactorState, NDArray[np.int64], int, float], tuple[FactorState, Logs]
]
# ``monitor(trained, logs) -> float``: what patience wants to fall.
Monitor = Callable[[FactorState, Logs], float]


def fedfnn_step(
    state: FactorState,
    delegates: NDArray[np.int64],
    t: int,
    *,
    train: Train,
    predict: Predict | None,
    monitor: Monitor,
) -> tuple[FactorState, Logs]:
    """Train the delegates, then predict the subordinates.

    Parameters
    ----------
    state : FactorState
    delegates : ndarray of int64
        Codes of the clients that take part, see `factor_state.draw_delegates`.
    t : int
        Number of the round.
    train : callable
        See `Train`.
    predict : callable or None
        See `Predict`; None is a method without prediction.
    monitor : callable
        See `Monitor`.

    Returns
    -------
    state : FactorState
    logs : dict
        Of the training, then of the prediction.
    """
    trained, logs = train(state, delegates, t)
    if predict is None:
        return trained, logs
    predicted, more = predict(state, trained, delegates, t, monitor(trained, logs))
    return predicted, {**logs, **more, "bytes_up": logs["bytes_up"] + more["bytes_up"]}


def prediction_step(
    before: FactorState,
    trained: FactorState,
    shards: ClientShards,
    delegates: NDArray[np.int64],
    t: int,
    *,
    monitored: float,
    streams: Streams,
    predictor: PredictorName,
    discount: float,
    discount_decay: float,
    cv: int,
    patience: int,
    gate: bool,
    anchor: bool,
    extra_inputs: bool,
    n_clusters: int,
) -> tuple[FactorState, Logs]:
    """Learn from the delegates' updates and move the subordinates: the second half of a round.

    Parameters
    ----------
    before, trained : FactorState
        Around the delegates' training, see `Train`; not changed.
    shards, delegates, t, streams
        As in `fedrecsk.methods.bce_rounds.bce_step`.
    monitored : float
        What patience wants to fall: the loss of the round, or a ranking metric times -1.
    predictor, cv, n_clusters
        See `fedrecsk.methods.meta_network.predict_updates`.
    discount, discount_decay : float
        Predictions in the fit's round t are multiplied by ``discount * discount_decay**t``.
    patience : int
        Rounds without a lower `monitored` after which prediction ends for good.
    gate : bool
        Weigh predictions by their cross-validated R2, and move only users who never took part.
    anchor : bool
        Put predictions into ``served`` alone. False: into ``user_factors``, from which training
        goes on.
    extra_inputs : bool
        Whether the predictor also sees `public_inputs`.

    Returns
    -------
    state : FactorState
    logs : dict
        ``prediction_active, bytes_up`` (of the delegates' vectors, which the server learns from
        as long as it predicts), ``user_norm`` (mean norm of the vectors that users are served
        with), and while prediction is active ``predictor_r2, predictor_cosine,
        predictor_candidate, predicted_share, predicted_norm`` (mean norm of the changes made);
        None is what was not measured.
    """
    watch = before.watch.after(monitored, patience)
    users = users_of(before, shards, delegates)
    # What predictions are written into; a copy, so that `before` and `trained` stay as they are.
    target = (served_factors(before) if anchor else trained.user_factors).clone()
    target[users] = trained.user_factors[users]
    logs: Logs = {"prediction_active": watch.active, "bytes_up": 0}
    if watch.active:
        logs["bytes_up"] = dense_bytes((len(users), before.user_factors.shape[1]))
        is_delegate = torch.zeros(shards.n_users, dtype=torch.bool, device=users.device)
        is_delegate[users] = True
        others = torch.nonzero(~is_delegate)[:, 0]
        if gate:
            others = others[before.times_sampled[others] == 0]
        start = before.user_factors
        inputs = torch.cat([start, public_inputs(before, shards)], 1) if extra_inputs else start
        prediction = predict_updates(
            predictor,
            inputs[users],
            trained.user_factors[users] - start[users],
            inputs[others],
            cv=cv,
            gate=gate,
            n_clusters=n_clusters,
            seed=streams.key("meta_network", t) % (2**32),
        )
        scale = discount * discount_decay ** (t - before.first_round)
        if gate and prediction.deltas is not None:
            scale *= min(prediction.r2, 1.0)
        logs |= {
            # None and not nan, which is not even equal to itself.
            "predictor_r2": None if math.isnan(prediction.r2) else prediction.r2,
            "predictor_cosine": None if math.isnan(prediction.cosine) else prediction.cosine,
            "predictor_candidate": prediction.candidate,
            "predicted_share": 0.0,
            "predicted_norm": 0.0,
        }
        if prediction.deltas is not None:
            moves = scale * prediction.deltas
            target[others] = start[others] + moves
            logs["predicted_share"] = len(others) / shards.n_users
            logs["predicted_norm"] = float(moves.norm(dim=1).mean())
    logs["user_norm"] = float(target.norm(dim=1).mean())
    new = replace(trained, watch=watch)
    new = replace(new, served=target) if anchor else replace(new, user_factors=target)
    return new, logs


def public_inputs(state: FactorState, shards: ClientShards) -> Tensor:
    """Collect what a server knows of its users besides their vectors, shape (n_users, 3).

    The logarithm of the number of interactions, which clients send as their weight; whether the
    user took part; the logarithm of how often.
    """
    rows = torch.from_numpy(shards.user_rows).to(state.times_sampled)
    times = state.times_sampled
    return torch.stack([torch.log1p(rows), (times > 0).to(times.dtype), torch.log1p(times)], 1)
