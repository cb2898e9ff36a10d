from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.rounds import read_logs
from fedrecsk.engine.sampling import uniform_cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.methods import whole_data_rounds
from fedrecsk.methods.bce_rounds import bce_step
from fedrecsk.methods.factor_state import FactorState
from fedrecsk.methods.hetefedrec import distillation_step, network_step
from fedrecsk.methods.nested_state import (
    NestedState,
    Sizes,
    client_parameters,
    federations,
    refit_users,
    spectrum_of,
)
from fedrecsk.methods.nested_whole_data import refit_whole_data, whole_data_step
from fedrecsk.methods.self_distillation import draw_items
from fedrecsk.methods.standalone import standalone_step
from fedrecsk.models import ncf, whole_data
from fedrecsk.models.head import flat_head, head_of, init_head
from tests.reference import hetefedrec_reference as reference
from tests.reference import ncf_reference, whole_data_reference
from tests.reference.federations import federation_of, items_by_user, random_federation
from tests.reference.ncf_reference import random_server

WIDTHS = (2, 3, 5)
ADD = Optimizer("sgd", 1.0)  # on the server: add the aggregated change
ADAM = Optimizer("adam", 0.05)
STREAMS = Streams(11)
SINGLE = random_federation(0, n_users=18, n_items=25, max_rows=5)
SHARED = random_federation(1, n_users=16, n_items=20, n_clients=9, max_rows=4)
FEDERATIONS = pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["single", "shared"])
DENOMINATORS = pytest.mark.parametrize("denominator", ["owners", "clients", "sum"])
SERVERS = pytest.mark.parametrize("server", [ADD, ADAM, Optimizer("momentum", 0.7)], ids=str)
DUAL = pytest.mark.parametrize("dual_task", [False, True], ids=["own", "dual"])
LOCAL = {
    "n_negatives": 2,
    "batch_size": 4,
    "local_epochs": 2,
    "optimizer": Optimizer("sgd", 0.2),
    "l2": 0.02,
}
NETWORK = {
    "dual_task": True,
    "alpha": 0.5,
    "aggregation": "padded",
    "denominator": "owners",
    "client_weights": "interactions",
    "item_bias": True,
    "n_graph_layers": 0,
    "server_optimizer": ADD,
    **LOCAL,
}
PENALTY = whole_data.Penalty(0.2, 0.5)
W0 = 0.15
EXACT = {
    "dual_task": False,
    "aggregation": "padded",
    "unobserved_weight": W0,
    "penalty": PENALTY,
    "server_learning_rate": 0.5,
    "decay": 0.8,
    "item_curvature": True,
}


def sizes_for(shards, widths=WIDTHS):
    """Sizes by turns, so that they have nothing to do with how much a client has."""
    return Sizes(tuple(widths), np.arange(shards.n_clients) % len(widths))


def clients_of_users(shards):
    """The client of each user."""
    owner = np.empty(shards.n_users, dtype=np.int64)
    owner[shards.users] = np.repeat(np.arange(shards.n_clients), np.diff(shards.client_offsets))
    return owner


def start(shards, sizes=None, *, neural=True, dtype=torch.float64, item_bias=None, **changes):
    """A state at which losses bend."""
    sizes = sizes_for(shards) if sizes is None else sizes
    item_bias = neural if item_bias is None else item_bias
    users, table, heads = random_server(shards, sizes.widths, item_bias=item_bias, dtype=dtype)
    return NestedState.start(
        users, table, heads if neural else [], sizes, clients_of_users(shards), **changes
    )


def cohort(shards, t, n=6):
    return uniform_cohort(shards.n_clients, n, STREAMS.numpy("sampling", t))


def network(state, shards, t, *, sizes=None, participants=None, **changes):
    """One round of networks."""
    participants = cohort(shards, t) if participants is None else participants
    state, logs = network_step(
        state,
        shards,
        participants,
        t,
        sizes=sizes_for(shards) if sizes is None else sizes,
        streams=STREAMS,
        **NETWORK | changes,
    )
    return state, read_logs(logs)


def exact(state, shards, t, *, sizes=None, participants=None, **changes):
    """One round of the whole-data objective."""
    participants = cohort(shards, t) if participants is None else participants
    state, logs = whole_data_step(
        state,
        shards,
        participants,
        t,
        sizes=sizes_for(shards) if sizes is None else sizes,
        **EXACT | changes,
    )
    return state, read_logs(logs)


def start_network(shards, **changes):
    return start(shards, **changes)


def start_exact(shards, **changes):
    return start(shards, neural=False, dtype=torch.float32, **changes)


STEPS = pytest.mark.parametrize(
    ("begin", "step"),
    [(start_network, network), (start_exact, exact)],
    ids=["network", "whole-data"],
)


@FEDERATIONS
@STEPS
def test_a_step_in_place_is_the_same_step(shards, begin, step):
    copying, writing = begin(shards), begin(shards)
    for t in range(3):
        before = writing
        copying, logs = step(copying, shards, t)
        writing, same = step(writing, shards, t, in_place=True)
        assert logs == same
        assert tensors_of(copying).keys() == tensors_of(writing).keys()
        for name, value in tensors_of(copying).items():
            assert torch.equal(value, tensors_of(writing)[name]), name
        # Nothing is copied for the clients that took no part.
        assert writing.user_factors is before.user_factors
        assert writing.turns is before.turns


def tensors_of(state):
    """Every tensor in a state, by name."""
    found = {"users": state.user_factors, "turns": torch.from_numpy(state.turns)}
    for x, table in enumerate(state.tables):
        found[f"table {x}"] = table
    for x, head in enumerate(state.heads):
        found |= {f"head {x} {name}": value for name, value in head.items()}
    for x, each in enumerate(state.statistics):
        found |= {f"gram {x}": each.gram, f"counts {x}": each.counts}
        found |= {f"curvature {x}": each.curvature, f"weight {x}": torch.tensor(each.weight)}
    moments = {f"rows {f} {b}": m for f, ms in enumerate(state.table_moments)
               for b, m in enumerate(ms)}  # fmt: skip
    moments |= {f"head {x}": m for x, m in enumerate(state.head_moments)}
    for name, each in moments.items():
        found[f"{name} steps"] = each.steps
        for kind in ("first", "second"):
            found |= {f"{name} {kind} {k}": v for k, v in getattr(each, kind).items()}
    return found


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# Rounds against loops over clients --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("single", {}),
        ("single", {"dual_task": False, "alpha": 0.0, "denominator": "clients"}),
        ("single", {"client_weights": "uniform", "denominator": "sum", "server_optimizer": ADAM}),
        ("single", {"aggregation": "clustered", "server_optimizer": ADAM}),
        ("single", {"n_graph_layers": 1, "batch_size": None, "server_optimizer": ADAM}),
        ("shared", {"server_optimizer": ADAM}),
        ("shared", {"client_weights": "uniform", "denominator": "clients", "alpha": 0.0}),
        ("shared", {"dual_task": False, "server_optimizer": Optimizer("momentum", 0.7)}),
        ("shared", {"item_bias": False, "optimizer": Optimizer("adam", 0.05)}),
    ],
    ids=str,
)
def test_network_rounds_are_loops_over_clients(name, changes):
    shards = {"single": SINGLE, "shared": SHARED}[name]
    arguments = NETWORK | changes
    sizes, server = sizes_for(shards), arguments["server_optimizer"]
    aggregation, item_bias = arguments["aggregation"], arguments["item_bias"]
    state = start(shards, item_bias=item_bias, aggregation=aggregation, server_optimizer=server)
    held = reference.Held(state.user_factors.clone(), list(state.tables), list(state.heads))
    literal = {name: value for name, value in arguments.items()
               if name not in ("server_optimizer", "aggregation")}  # fmt: skip
    literal["dual_task"] = arguments["dual_task"] and aggregation == "padded"
    for t in range(2):
        participants = cohort(shards, t)
        before = state
        state, logs = network(state, shards, t, **changes)
        loss = reference.network_round(
            held,
            shards,
            participants.tolist(),
            widths=sizes.widths,
            size_of=sizes.of_client.tolist(),
            federations=federations(sizes, aggregation),
            server=server,
            key=STREAMS.key("examples", t),
            **literal,
        )
        assert logs["loss"] == pytest.approx(loss, rel=1e-5)
        assert logs["clients"] == len(participants)
        torch.testing.assert_close(state.user_factors, held.users, rtol=1e-5, atol=1e-5)
        for found, expected, old in zip(state.tables, held.tables, before.tables, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert not torch.equal(found, old)
        for found, expected in zip(state.heads, held.heads, strict=True):
            assert_close(found, expected, 1e-5)
        turns = before.turns.copy()
        turns[participants] += 1
        assert state.turns.tolist() == turns.tolist()


def start_literally(shards, state, users, blocks):
    table = state.tables[-1].double().numpy()
    n_items = len(table)
    nothing = [
        (np.zeros((b, b)), np.zeros(n_items), np.zeros(n_items), 0.0) for b in np.diff([0, *blocks])
    ]
    return reference.HeldExactly(users, table.copy(), nothing)


def whole_data_literally(held, shards, participants, t, sizes, **changes):
    """The reference's round, with the rate worked out from who takes part."""
    arguments = EXACT | changes
    users_of = [shards.users_of(np.array([k])).tolist() for k in range(shards.n_clients)]
    rate = arguments["server_learning_rate"]
    if rate is None:
        times = [(place + 1 if arguments["dual_task"] else 1) for place in sizes.of_client]
        solves = np.array([n * len(users) for n, users in zip(times, users_of, strict=True)])
        p = solves[participants].sum() / solves.sum()
        rate = max(p**0.75 / (1 + (t + 1) * p * (1 - p)) ** 0.5, 1 / (t + 1))
    return reference.whole_data_round(
        held,
        items_by_user(shards),
        users_of,
        participants.tolist(),
        widths=sizes.widths,
        size_of=sizes.of_client.tolist(),
        dual_task=arguments["dual_task"],
        w0=W0,
        l2=arguments["penalty"].l2,
        exponent=arguments["penalty"].exponent,
        rate=rate,
        decay=arguments["decay"],
        item_curvature=arguments["item_curvature"],
    )


@FEDERATIONS
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dual_task": True},
        {"server_learning_rate": None, "item_curvature": False},
        {"server_learning_rate": None, "dual_task": True},
    ],
    ids=str,
)
def test_whole_data_rounds_are_loops_over_users(shards, changes):
    sizes = sizes_for(shards)
    state = start_exact(shards)
    users = state.user_factors.double().numpy().copy()
    held = start_literally(shards, state, users, sizes.widths)
    for t in range(3):
        participants = cohort(shards, t)
        state, logs = exact(state, shards, t, **changes)
        loss = whole_data_literally(held, shards, participants, t, sizes, **changes)
        assert logs["loss"] == pytest.approx(loss, rel=1e-4)
        np.testing.assert_allclose(state.user_factors, held.users, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.tables[-1], held.table, rtol=1e-4, atol=1e-5)
        for statistics, (gram, counts, curvature, weight) in zip(
            state.statistics, held.statistics, strict=True
        ):
            np.testing.assert_allclose(statistics.gram, gram, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(statistics.counts, counts, rtol=1e-5)
            np.testing.assert_allclose(statistics.curvature, curvature, rtol=1e-4, atol=1e-5)
            assert statistics.weight == pytest.approx(weight)
        for table, width in zip(state.tables, sizes.widths, strict=True):
            assert torch.equal(table, state.tables[-1][:, :width])


# Nesting ----------------------------------------------------------------------------------


@DUAL
@SERVERS
@DENOMINATORS
def test_narrow_tables_of_networks_stay_slices_of_the_widest(denominator, server, dual_task):
    changes = {"denominator": denominator, "dual_task": dual_task, "server_optimizer": server}
    changes["optimizer"] = Optimizer("sgd", 0.05)  # sums overshoot sooner than means
    state = begun = start(SINGLE, server_optimizer=server, dtype=torch.float32)
    for t in range(4):
        state, _ = network(state, SINGLE, t, **changes)
    widest = state.tables[-1]
    for x, width in enumerate(WIDTHS):
        assert not torch.allclose(state.tables[x], begun.tables[x], atol=1e-2)
        expected = torch.cat([widest[:, :width], widest[:, -1:]], 1)
        torch.testing.assert_close(state.tables[x], expected, rtol=0.0, atol=1e-6)


def test_distillation_is_what_ends_nesting():
    state = start(SINGLE)
    for t in range(2):
        state, _ = network(state, SINGLE, t)
        state, _ = distil(state, t)
    assert not torch.allclose(state.tables[0][:, :2], state.tables[-1][:, :2], atol=1e-4)


@FEDERATIONS
@STEPS
def test_users_are_zero_beyond_their_own_size(shards, begin, step):
    state = begin(shards)
    for t in range(2):
        state, _ = step(state, shards, t)
    own = np.array(WIDTHS)[sizes_for(shards).of_client[clients_of_users(shards)]]
    inside = torch.arange(WIDTHS[-1]) < torch.from_numpy(own)[:, None]
    assert (state.user_factors[~inside] == 0).all()
    assert (state.user_factors[inside] != 0).all()


# One size ---------------------------------------------------------------------------------


ONE = {"dual_task": False, "alpha": 0.0}


@FEDERATIONS
@pytest.mark.parametrize("server", [ADD, ADAM], ids=str)
@pytest.mark.parametrize("n_graph_layers", [0, 1])
def test_one_size_is_federated_averaging(shards, server, n_graph_layers):
    """Means over all clients' interactions with one size: FedAvg, to rounding."""
    sizes = sizes_for(shards, (4,))
    state = start(shards, sizes, server_optimizer=server)
    other = FactorState.start(
        state.user_factors,
        state.tables[0],
        server,
        n_clients=shards.n_clients,
        head=state.heads[0],
    )
    local = LOCAL | {"batch_size": None} | {"n_graph_layers": n_graph_layers}
    # Dual task and decorrelation are for those that have a smaller size.
    for dual_task, alpha in ((True, 1.0), (False, 0.0)):
        ours, theirs = state, other
        for t in range(3):
            ours, logs = network(
                ours,
                shards,
                t,
                sizes=sizes,
                denominator="clients",
                server_optimizer=server,
                dual_task=dual_task,
                alpha=alpha,
                **local,
            )
            theirs, expected = bce_step(
                theirs,
                shards,
                cohort(shards, t),
                t,
                streams=STREAMS,
                item_weighting="fedavg",
                item_bias=True,
                server_optimizer=server,
                **local,
            )
        torch.testing.assert_close(ours.user_factors, theirs.user_factors, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.tables[0], theirs.item_table, rtol=0, atol=1e-9)
        assert_close(ours.heads[0], theirs.head, 1e-9)
        assert logs["loss"] == pytest.approx(float(expected["loss"]))
        for name in ("clients", "bytes_up", "bytes_down"):
            assert logs[name] == expected[name]


@FEDERATIONS
def test_uniform_owners_of_one_size_are_weighting_by_count(shards):
    sizes = sizes_for(shards, (4,))
    state = start(shards, sizes)
    found, _ = network(
        state, shards, 1, sizes=sizes, denominator="owners", client_weights="uniform", **ONE
    )
    other = FactorState.start(
        state.user_factors, state.tables[0], ADD, n_clients=shards.n_clients, head=state.heads[0]
    )
    expected, _ = bce_step(
        other, shards, cohort(shards, 1), 1, streams=STREAMS, item_weighting="count",
        item_bias=True, server_optimizer=ADD, **LOCAL,
    )  # fmt: skip
    torch.testing.assert_close(found.tables[0], expected.item_table, rtol=0, atol=1e-9)


@FEDERATIONS
@pytest.mark.parametrize("rate", [0.5, None])
def test_one_size_solves_as_federated_averaging_does(shards, rate):
    sizes = sizes_for(shards, (4,))
    state = start_exact(shards, sizes=sizes)
    other = FactorState.start(state.user_factors, state.tables[0], ADD, n_clients=shards.n_clients)
    arguments = {name: value for name, value in EXACT.items()
                 if name not in ("dual_task", "aggregation")}  # fmt: skip
    arguments["server_learning_rate"] = rate
    for t in range(3):
        state, logs = exact(
            state, shards, t, sizes=sizes, server_learning_rate=rate, dual_task=True
        )
        other, expected = whole_data_rounds.whole_data_step(
            other, shards, cohort(shards, t), t, **arguments
        )
        for name in ("clients", "bytes_up", "bytes_down"):
            assert logs[name] == expected[name]
        assert logs["loss"] == pytest.approx(float(expected["loss"]))
    torch.testing.assert_close(state.user_factors, other.user_factors, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.tables[0], other.item_table, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.statistics[0].gram, other.statistics.gram)


# Federations of their own -----------------------------------------------------------------


@FEDERATIONS
@pytest.mark.parametrize("server", [ADD, ADAM], ids=str)
def test_clustered_networks_are_federations_of_their_own(shards, server):
    sizes = sizes_for(shards)
    state = begun = start(shards, aggregation="clustered", server_optimizer=server)
    changes = {"aggregation": "clustered", "server_optimizer": server, "alpha": 0.0}
    for t in range(3):
        state, _ = network(state, shards, t, denominator="clients", **changes)
    owner = clients_of_users(shards)
    for x, width in enumerate(WIDTHS):
        one = Sizes((width,), np.zeros(shards.n_clients, dtype=np.int64))
        alone = NestedState.start(
            begun.user_factors[:, :width], begun.tables[x], [begun.heads[x]], one, owner,
            server_optimizer=server,
        )  # fmt: skip
        for t in range(3):
            members = sizes.members(cohort(shards, t), x)
            alone, _ = network(
                alone,
                shards,
                t,
                sizes=one,
                participants=members,
                denominator="clients",
                **changes | {"aggregation": "padded"},
            )
        torch.testing.assert_close(state.tables[x], alone.tables[0], rtol=0, atol=1e-12)
        assert_close(state.heads[x], alone.heads[0], 1e-12)
        mine = sizes.of_client[owner] == x
        assert torch.equal(state.user_factors[mine, :width], alone.user_factors[mine])


def part_of(shards, clients):
    """A federation of some clients alone, and the codes of their users."""
    users, items = shards.users_of(clients), items_by_user(shards)
    place = {int(client): number for number, client in enumerate(clients)}
    owner = clients_of_users(shards)
    members = [place[int(owner[user])] for user in users]
    return federation_of([items[user] for user in users], shards.n_items, members), users


@FEDERATIONS
def test_clustered_factorisations_are_federations_of_their_own(shards):
    sizes = sizes_for(shards)
    # With the exponent 1 a penalty does not depend on what rows have on average.
    changes = {"penalty": whole_data.Penalty(0.2, 1.0), "server_learning_rate": None}
    state = begun = start_exact(shards, aggregation="clustered")
    for t in range(3):
        state, _ = exact(state, shards, t, aggregation="clustered", **changes)
    for x, width in enumerate(WIDTHS):
        clients = np.flatnonzero(sizes.of_client == x)
        part, users = part_of(shards, clients)
        one = Sizes((width,), np.zeros(len(clients), dtype=np.int64))
        alone = NestedState.start(
            begun.user_factors[users, :width], begun.tables[x], [], one, clients_of_users(part)
        )
        for t in range(3):
            members = np.flatnonzero(np.isin(clients, cohort(shards, t)))
            if len(members):
                alone, _ = exact(alone, part, t, sizes=one, participants=members, **changes)
        torch.testing.assert_close(state.tables[x], alone.tables[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            state.user_factors[users, :width], alone.user_factors, rtol=1e-4, atol=1e-5
        )


# Groups that stay away --------------------------------------------------------------------


@pytest.mark.parametrize("absent", [(2,), (1, 2), (0,), (1,)], ids=str)
@SERVERS
@DENOMINATORS
def test_a_size_without_participants_keeps_what_is_its_own(denominator, server, absent):
    sizes = sizes_for(SINGLE)
    changes = {"denominator": denominator, "server_optimizer": server}
    state, _ = network(
        start(SINGLE, server_optimizer=server), SINGLE, 0, participants=np.arange(9), **changes
    )
    there = np.flatnonzero(~np.isin(sizes.of_client, absent))
    after, _ = network(state, SINGLE, 1, participants=there, **changes)
    untouched = [WIDTHS[min(absent) - 1], WIDTHS[-1]] if 2 in absent else None
    for x in range(3):
        trains_it = [y for y in range(x, 3) if y not in absent]  # in dual task
        assert_same = torch.equal(flat_head(after.heads[x]), flat_head(state.heads[x]))
        assert assert_same == (not trains_it)
        same = after.head_moments[x].steps == state.head_moments[x].steps
        assert bool(same) == (not trains_it)
        owned = any(y not in absent for y in range(x, 3))
        for before, now in zip(tensors_of(state).items(), tensors_of(after).items(), strict=True):
            if before[0].startswith(f"rows 0 {x} "):
                # Rows that are trained step; plain SGD counts its steps, too.
                assert torch.equal(before[1], now[1]) == (not owned), before[0]
    if untouched:
        tail = slice(*untouched)
        assert torch.equal(after.tables[2][:, tail], state.tables[2][:, tail])
    # What the sizes have in common moves all of them, absent or not.
    for table, before in zip(after.tables, state.tables, strict=True):
        assert not torch.equal(table[:, :2], before[:, :2])
    away = np.isin(sizes.of_client[clients_of_users(SINGLE)], absent)
    assert torch.equal(after.user_factors[away], state.user_factors[away])


@DUAL
@pytest.mark.parametrize("absent", [(2,), (1, 2), (0,)], ids=str)
def test_a_size_that_solves_nothing_keeps_its_columns_and_statistics(absent, dual_task):
    sizes = sizes_for(SINGLE)
    state, _ = exact(start_exact(SINGLE), SINGLE, 0, participants=np.arange(9), dual_task=dual_task)
    there = np.flatnonzero(~np.isin(sizes.of_client, absent))
    after, _ = exact(state, SINGLE, 1, participants=there, dual_task=dual_task)
    for x, (first, last) in enumerate(zip((0, *WIDTHS), WIDTHS, strict=False)):
        own = all(y in absent for y in range(x, 3))
        block = slice(first, last)
        assert torch.equal(after.tables[2][:, block], state.tables[2][:, block]) == own
        assert torch.equal(after.statistics[x].gram, state.statistics[x].gram) == own
        assert torch.equal(after.statistics[x].counts, state.statistics[x].counts) == own
        assert (after.statistics[x].weight == state.statistics[x].weight) == own


def test_rows_that_nobody_trains_do_not_drift_by_their_momentum():
    shards = federation_of([[0, 1], [2, 3], [4, 5]], 300)
    sizes = sizes_for(shards, (2, 3))
    state = start(shards, sizes, server_optimizer=ADAM)
    arguments = {"sizes": sizes, "server_optimizer": ADAM, "alpha": 0.0}
    state, _ = network(state, shards, 0, participants=np.array([0, 1, 2]), **arguments)
    after, _ = network(state, shards, 1, participants=np.array([1]), **arguments)
    still = (after.tables[1] == state.tables[1]).all(1)
    assert still[[0, 1, 4, 5]].sum() >= 2  # but for what client 1 drew as negatives
    steps = after.table_moments[0][0].steps - state.table_moments[0][0].steps
    assert torch.equal(steps == 0, still)
    assert 2 <= int(steps.sum()) <= 6


# Everybody alone --------------------------------------------------------------------------


@pytest.mark.parametrize("n_graph_layers", [0, 1])
@FEDERATIONS
def test_standalone_clients_are_trained_one_by_one(shards, n_graph_layers):
    sizes = sizes_for(shards)
    state = start(shards)
    local = LOCAL | {"batch_size": None, "n_graph_layers": n_graph_layers}
    after, logs = standalone_step(
        state, shards, sizes=sizes, streams=STREAMS, item_bias=True, **local
    )
    private = after.private
    assert logs["bytes_up"] == logs["bytes_down"] == 0
    assert logs["clients"] == shards.n_clients
    total, n_examples = 0.0, 0
    for client, x in enumerate(sizes.of_client):
        width = WIDTHS[x]
        (update,) = ncf_reference.train_cohort(
            shards,
            [client],
            state.user_factors[:, :width],
            state.tables[x],
            state.heads[x],
            item_bias=True,
            key=STREAMS.key("examples", 0),
            **local,
        ).values()
        own = slice(*private.indptr[client : client + 2])
        rows = dict(zip(private.items[own].tolist(), private.rows[own], strict=True))
        assert rows.keys() == update.rows.keys()
        for item, row in update.rows.items():
            np.testing.assert_allclose(rows[item][:width], row[:-1], rtol=1e-5, atol=1e-5)
            assert (rows[item][width:-1] == 0).all()
            np.testing.assert_allclose(rows[item][-1], row[-1], rtol=1e-5, atol=1e-5)
        weights = flat_head(update.head)
        network = private.networks[client]
        np.testing.assert_allclose(network[: len(weights)], weights, rtol=1e-5, atol=1e-5)
        assert (network[len(weights) :] == 0).all()
        assert (
            head_of(torch.from_numpy(network[: len(weights)]), width).keys() == update.head.keys()
        )
        for user, vector in update.user_vectors.items():
            torch.testing.assert_close(after.user_factors[user, :width], vector)
            assert (after.user_factors[user, width:] == 0).all()
        total, n_examples = total + update.loss, n_examples + update.n_examples
    assert logs["loss"] == pytest.approx(total / n_examples)
    for table, before in zip(after.tables, state.tables, strict=True):
        assert torch.equal(table, before)


# Distillation -----------------------------------------------------------------------------


def distil(state, t=0, **changes):
    arguments = {"fraction": 0.1, "n_steps": 3, "learning_rate": 0.01, **changes}
    return distillation_step(
        state, t, sizes=Sizes(WIDTHS, state.turns), streams=STREAMS, **arguments
    )


@pytest.mark.parametrize("item_bias", [False, True])
def test_distillation_moves_the_factors_of_the_drawn_items(item_bias):
    shards = federation_of([[0], [1], [2]], 700)
    state = start(shards, item_bias=item_bias)
    after, logs = distil(state, 4, fraction=0.5)
    drawn = draw_items(700, 0.5, STREAMS.numpy("distillation", 4))
    assert len(drawn) == 350
    moved = torch.zeros(700, dtype=torch.bool)
    moved[drawn] = True
    for table, before, width in zip(after.tables, state.tables, WIDTHS, strict=True):
        assert torch.equal((table != before).any(1), moved)
        assert (table != before)[moved, :width].all()
        assert torch.equal(table[:, width:], before[:, width:])
    assert logs["distillation_loss"] > 0
    assert torch.equal(after.user_factors, state.user_factors)
    _, lower = distil(after, 4, fraction=0.5, n_steps=1)
    assert lower["distillation_loss"] < logs["distillation_loss"]
    other, _ = distil(state, 5, fraction=0.5)
    assert not torch.equal(other.tables[0], after.tables[0])


def test_distillation_is_that_of_the_reference():
    shards = federation_of([[0], [1], [2]], 12)  # few: all of them are drawn
    state = start(shards)
    after, logs = distil(state)
    factors = [table[:, :width] for table, width in zip(state.tables, WIDTHS, strict=True)]
    expected, losses = reference.distill(factors, torch.arange(12), 3, 0.01)
    assert logs["distillation_loss"] == pytest.approx(losses[0])
    for table, factor, width in zip(after.tables, expected, WIDTHS, strict=True):
        torch.testing.assert_close(table[:, :width], factor)


# Numbers held and sent --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "dual_task", "expected"),
    [
        ((8, 16, 32), True, [29_865, 59_858, 119_755]),
        ((8,), True, [29_865]),
        ((32,), True, [119_193]),
        ((8,), False, [29_865]),
        ((8, 16, 32), False, [29_865, 3_706 * 16 + 345, 119_193]),
    ],
    ids=str,
)
def test_numbers_that_a_client_of_movielens_1m_holds(widths, dual_task, expected):
    sizes = Sizes.of(np.array(widths))
    state = NestedState.start(
        torch.zeros(0, widths[-1]),
        torch.zeros(3_706, widths[-1]),
        [init_head(width, key=width, streams=STREAMS) for width in widths],
        sizes,
        np.zeros(0, dtype=np.int64),
    )
    found = client_parameters(state, dual_task=dual_task)
    assert found.tolist() == expected
    if len(widths) == 3 and dual_task:
        assert found @ [0.5, 0.3, 0.2] == pytest.approx(56_841, abs=0.5)


@DUAL
@FEDERATIONS
def test_bytes_of_a_network_round(shards, dual_task):
    sizes, participants = sizes_for(shards), cohort(shards, 1)
    state = start(shards)
    _, logs = network(state, shards, 1, dual_task=dual_task)
    held = client_parameters(state, dual_task=dual_task)
    assert logs["bytes_down"] == 4 * held[sizes.of_client[participants]].sum()
    up = 0
    for client in participants.tolist():
        x = sizes.of_client[client]
        rows = {
            example.item
            for example in ncf_reference.examples_of(
                shards, client, n_negatives=2, batch_size=4, key=STREAMS.key("examples", 1)
            )
        }
        # Trained rows with their bias and number, and the predictors.
        up += len(rows) * 4 * (WIDTHS[x] + 1 + 1)
        up += 4 * (held[x] - shards.n_items * (WIDTHS[x] + 1))
    assert logs["bytes_up"] == up


@DUAL
@FEDERATIONS
def test_bytes_of_a_whole_data_round(shards, dual_task):
    sizes, participants = sizes_for(shards), cohort(shards, 1)
    _, logs = exact(start_exact(shards), shards, 1, dual_task=dual_task)
    items, up, down = items_by_user(shards), 0, 0
    for client in participants.tolist():
        x = sizes.of_client[client]
        d = WIDTHS[x]
        distinct = {i for user in shards.users_of(np.array([client])) for i in items[user]}
        down += 4 * (shards.n_items * d + d * d)
        # A row: the pull, the count, a curvature for each block, and the row's number.
        up += len(distinct) * 4 * (d + 1 + (x + 1) + 1) + 4 * d * d
    assert (logs["bytes_up"], logs["bytes_down"]) == (up, down)


# What a step owes whoever calls it --------------------------------------------------------


@STEPS
@FEDERATIONS
def test_a_step_leaves_its_state_alone_and_can_be_repeated(shards, begin, step):
    state, _ = step(begin(shards), shards, 0)
    copies = {name: value.clone() for name, value in tensors_of(state).items()}
    after, _ = step(state, shards, 1)
    again, _ = step(state, shards, 1)
    assert_close(tensors_of(state), copies, 0.0)
    assert_close(tensors_of(after), tensors_of(again), 0.0)
    assert not torch.equal(after.user_factors, state.user_factors)


@FEDERATIONS
@STEPS
@pytest.mark.parametrize("dual_task", [False, True])
def test_rounds_do_not_depend_on_chunks(shards, begin, step, dual_task, monkeypatch):
    calls, most = Counter(), 6
    fan = 1 + LOCAL["n_negatives"] if step is network else 1

    def counting(name, function):
        def call(cohort, *args, **named):
            calls[name] += 1
            rows = cohort.client_rows if step is network else cohort.counts
            padded = len(rows) * int(max(rows)) * fan
            assert padded <= shards_module.CPU_CHUNK_ROWS or len(rows) == 1
            return function(cohort, *args, **named)

        return call

    for module, name in ((ncf, "train"), (whole_data, "solve_users")):
        monkeypatch.setattr(module, name, counting(step.__name__, getattr(module, name)))
    states, logs, counts = [], [], []
    for rows in (100_000, most):
        monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)
        calls.clear()
        state = begin(shards)
        for t in range(2):
            state, log = step(state, shards, t, dual_task=dual_task)
        states.append(tensors_of(state))
        logs.append(log)
        counts.append(calls[step.__name__])
    assert_close(*states, 1e-5)
    assert counts[1] > 1.5 * counts[0]
    for name in ("clients", "bytes_up", "bytes_down"):
        assert logs[0][name] == logs[1][name]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("neural", [True, False], ids=["network", "whole-data"])
def test_users_that_are_fitted_do_not_depend_on_chunks(neural, monkeypatch):
    state, sizes = start(SINGLE, neural=neural, dtype=torch.float32), sizes_for(SINGLE)
    clients = np.arange(0, SINGLE.n_clients, 2)

    def of_network(cohort, users, table, head):
        return ncf.refit_users(
            cohort, users, table, head, item_bias=True, n_negatives=2, n_steps=4, l2=0.02, key=7
        )

    def of_factors(cohort, users, table, head):
        return refit_whole_data(
            cohort, users, table, head, unobserved_weight=W0, penalty=PENALTY, mean_rows=3.0
        )

    found = []
    for rows in (100_000, 6):
        monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)
        fit = of_network if neural else of_factors
        found.append(refit_users(state, SINGLE, clients, sizes=sizes, fit=fit))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][1::2], state.user_factors[1::2])
    if neural:
        assert (found[0][::2] != state.user_factors[::2]).any(1).all()
        return
    items = items_by_user(SINGLE)
    for user in range(0, SINGLE.n_users, 2):
        width = WIDTHS[sizes.of_client[user]]
        ridge = whole_data_reference.strength(len(items[user]), 3.0, 0.2, 0.5)
        expected = whole_data_reference.solve_user(
            items[user], state.tables[-1][:, :width].double().numpy(), W0, ridge
        )
        np.testing.assert_allclose(found[0][user, :width], expected, rtol=1e-4, atol=1e-5)
        assert (found[0][user, width:] == 0).all()


@pytest.mark.threads
@STEPS
def test_one_and_two_threads_agree(begin, step):
    # Large enough for torch to share the work out.
    shards = random_federation(3, n_users=120, n_items=300, max_rows=40)
    states = []
    # Few steps: each waits for all threads, on a machine that may be busy.
    changes = {"batch_size": None, "local_epochs": 1} if step is network else {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = begin(shards, dtype=torch.float32) if step is network else begin(shards)
        for t in range(2):
            state, _ = step(state, shards, t, participants=cohort(shards, t, 80), **changes)
        states.append(tensors_of(state))
    assert_close(*states, 1e-5)


def test_the_spectrum_is_that_of_the_widest_table_without_its_bias():
    state, sizes = start(SINGLE), sizes_for(SINGLE)
    found = spectrum_of(state, sizes)
    values = np.linalg.eigvalsh(np.corrcoef(state.tables[-1][:, :5].numpy(), rowvar=False))
    share = values / values.sum()
    assert found["singular_value_variance"] == pytest.approx(((values - 1) ** 2).mean())
    assert found["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    biased = replace(state, tables=(*state.tables[:-1], state.tables[-1] * torch.tensor(
        [1.0, 1.0, 1.0, 1.0, 1.0, 50.0])))  # fmt: skip
    assert spectrum_of(biased, sizes) == found


def test_participants_stand_for_the_contributors_alone():
    sizes, some = sizes_for(SINGLE), np.arange(0, SINGLE.n_clients, 2)
    # With the exponent 1 a penalty does not depend on what rows have on average.
    changes = {"penalty": whole_data.Penalty(0.2, 1.0), "server_learning_rate": None}
    state = start_exact(SINGLE)
    found, _ = exact(state, SINGLE, 3, participants=some, contributors=some, **changes)
    alone, users = part_of(SINGLE, some)
    fewer = replace(sizes, of_client=sizes.of_client[some])
    begun = replace(state, user_factors=state.user_factors[users], turns=state.turns[some])
    expected, _ = exact(begun, alone, 3, sizes=fewer, participants=np.arange(len(some)), **changes)
    torch.testing.assert_close(found.tables[-1], expected.tables[-1], rtol=1e-4, atol=1e-5)
    everybody, _ = exact(state, SINGLE, 3, participants=some, **changes)
    assert not torch.allclose(everybody.tables[-1], expected.tables[-1], atol=1e-3)
