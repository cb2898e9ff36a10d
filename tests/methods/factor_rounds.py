"""Federations and rounds on which the tests of factor models agree."""

from functools import partial

import numpy as np
import pytest
import torch

from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.rounds import read_logs
from fedrecsk.engine.sampling import uniform_cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.bce_rounds import bce_step
from fedrecsk.methods.factor_state import (
    FactorState,
)
from fedrecsk.methods.fedfnn import prediction_step
from fedrecsk.methods.whole_data_rounds import whole_data_step
from fedrecsk.models import whole_data
from fedrecsk.models.factors import random_factors
from fedrecsk.models.head import init_head
from tests.reference.federations import random_federation

N_FACTORS = 4
ADD = Optimizer("sgd", 1.0)  # on the server: add the aggregated change
PENALTY = whole_data.Penalty(0.2, 0.5)
W0 = 0.15
STREAMS = Streams(11)
SINGLE = random_federation(0, n_users=30, n_items=25)
SHARED = random_federation(1, n_users=24, n_items=20, n_clients=9)
FEDERATIONS = pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["single", "shared"])
PREDICTION = {
    "discount": 0.5,
    "discount_decay": 0.9,
    "cv": 5,
    "patience": 3,
    "gate": True,
    "anchor": True,
    "extra_inputs": True,
    "n_clusters": 3,
    "monitored": None,  # the loss
}
LITERAL = {"gate": False, "anchor": False, "extra_inputs": False}
FEDAVG = {
    "item_weighting": "fedavg",
    "item_bias": True,
    "n_negatives": 2,
    "batch_size": 9,
    "local_epochs": 2,
    "optimizer": Optimizer("sgd", 0.1),
    "l2": 0.02,
    "server_optimizer": ADD,
}
EXACT = {
    "unobserved_weight": W0,
    "penalty": PENALTY,
    "server_learning_rate": 0.5,
    "decay": 0.8,
    "item_curvature": True,
}


def start(shards, *, item_bias=False, server=ADD, first_round=0, neural=False):
    users, table = random_factors(
        shards.n_users,
        shards.n_items,
        N_FACTORS,
        item_bias=item_bias,
        init_scale=0.6,
        streams=STREAMS,
        device=shards.device,
    )
    head = init_head(N_FACTORS, hidden=(3, 3), streams=STREAMS) if neural else None
    return FactorState.start(
        users, table, server, n_clients=shards.n_clients, head=head, first_round=first_round
    )


def sampled(shards, t, streams, n_sampled):
    size = shards.n_clients // 2 if n_sampled is None else n_sampled
    return uniform_cohort(shards.n_clients, size, streams.numpy("sampling", t))


def bce(state, shards, t, *, streams=STREAMS, n_sampled=None, predictor=None, **changes):
    """One round of BCE, by default of half of the clients and without prediction."""
    delegates = sampled(shards, t, streams, n_sampled)
    prediction = {name: changes.pop(name, value) for name, value in PREDICTION.items()}
    arguments = {
        "item_weighting": "count",
        "item_bias": state.item_table.shape[1] > N_FACTORS,
        "n_negatives": 2,
        "batch_size": 9,
        "local_epochs": 2,
        "optimizer": Optimizer("sgd", 0.1),
        "l2": 0.02,
        "server_optimizer": ADD,
        **changes,
    }
    trained, logs = bce_step(state, shards, delegates, t, streams=streams, **arguments)
    return predicted(state, trained, logs, shards, delegates, t, streams, predictor, prediction)


def exact(state, shards, t, *, streams=STREAMS, n_sampled=None, predictor=None, **changes):
    """One round of the whole-data objective, likewise."""
    delegates = sampled(shards, t, streams, n_sampled)
    prediction = {name: changes.pop(name, value) for name, value in PREDICTION.items()}
    arguments = {
        "unobserved_weight": W0,
        "penalty": PENALTY,
        "server_learning_rate": 0.5,
        "decay": 0.8,
        "item_curvature": True,
        **changes,
    }
    trained, logs = whole_data_step(state, shards, delegates, t, **arguments)
    return predicted(state, trained, logs, shards, delegates, t, streams, predictor, prediction)


def predicted(before, trained, logs, shards, delegates, t, streams, predictor, prediction):
    """The second half of a round, if there is one, with what the loop over rounds reads."""
    logs = read_logs(logs)
    if predictor is None:
        return trained, logs
    prediction = dict(prediction)
    monitored = prediction.pop("monitored")
    kept = {name: value.clone() for name, value in tensors_of(trained).items()}
    state, more = prediction_step(
        before,
        trained,
        shards,
        delegates,
        t,
        monitored=logs["loss"] if monitored is None else monitored,
        streams=streams,
        predictor=predictor,
        **prediction,
    )
    for name, value in tensors_of(trained).items():
        assert torch.equal(value, kept[name]), name  # prediction leaves its arguments alone
    return state, {**logs, **more, "bytes_up": logs["bytes_up"] + more["bytes_up"]}


# The quasi-Newton step is for clients of one user.
newton = partial(bce, server_optimizer=None)
STEPS = pytest.mark.parametrize("step", [bce, exact, newton], ids=["bce", "whole-data", "newton"])
STEPS_ON_FEDERATIONS = pytest.mark.parametrize(
    ("step", "shards"),
    [(bce, SINGLE), (bce, SHARED), (exact, SINGLE), (exact, SHARED), (newton, SINGLE)],
    ids=["bce-single", "bce-shared", "whole-data-single", "whole-data-shared", "newton"],
)


def delegates_of(shards, t):
    """Clients of a round by default."""
    return sampled(shards, t, STREAMS, None).tolist()


def users_of(shards, clients):
    return shards.users_of(np.asarray(clients)).tolist()


def tensors_of(state):
    """Every tensor in a state, by name."""
    moments, statistics = state.moments, state.statistics
    head = state.head_moments
    served = {} if state.served is None else {"served": state.served}
    return {
        "user_factors": state.user_factors,
        **served,
        **{f"head {name}": value for name, value in state.head.items()},
        **({f"head first {name}": value for name, value in head.first.items()} if head else {}),
        "turns": torch.from_numpy(state.turns),
        "item_table": state.item_table,
        "times_sampled": state.times_sampled,
        "steps": moments.steps,
        **{f"first {name}": value for name, value in moments.first.items()},
        **{f"second {name}": value for name, value in moments.second.items()},
        "gram": statistics.gram,
        "counts": statistics.counts,
        "curvature": statistics.curvature,
    }


def assert_states_close(found, expected, tolerance=1e-5):
    """Compare states, relative to the largest value of each tensor."""
    assert tensors_of(found).keys() == tensors_of(expected).keys()
    for (name, ours), theirs in zip(
        tensors_of(found).items(), tensors_of(expected).values(), strict=True
    ):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(
            ours, theirs, rtol=0.0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
