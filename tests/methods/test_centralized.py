import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.centralized import CentralState, bce_pass, solved, whole_data_sweep
from fedrecsk.models.whole_data import Penalty
from tests.reference.federations import federation_of, items_by_user, random_federation
from tests.reference.ncf_reference import logit, propagated, random_server
from tests.reference.sampled_bce_reference import examples_of, torch_optimizer
from tests.reference.whole_data_reference import strength

W0, PENALTY = 0.3, Penalty(0.2, 0.75)
STREAMS = Streams(3)


# ---------------------------------------------------------------- alternating least squares


def transposed(shards):
    rows = items_by_user(shards)
    users_of = [[u for u, items in enumerate(rows) if i in items] for i in range(shards.n_items)]
    user = np.repeat(np.arange(shards.n_items), [len(users) for users in users_of])
    item = np.array([u for users in users_of for u in users], dtype=np.int64)
    return ClientShards.from_codes(
        user, item, np.arange(shards.n_items), shards.n_items, shards.n_users
    )


def start_of(shards, d=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    users, items = (
        0.3 * torch.randn(n, d, generator=generator, dtype=dtype)
        for n in (shards.n_users, shards.n_items)
    )
    return CentralState.start(users, items, {})


def literal_solve(rows, vectors, w0, penalty):
    """Solve for one row after another, by the normal equations over all cells of the matrix."""
    mean = np.mean([len(r) for r in rows])
    found = np.zeros((len(rows), vectors.shape[1]))
    for place, chosen in enumerate(rows):
        left = strength(len(chosen), mean, penalty.l2, penalty.exponent) * np.eye(vectors.shape[1])
        right = np.zeros(vectors.shape[1])
        for j, vector in enumerate(vectors):
            weight = w0 + (j in chosen)  # a cell counts w0, an interaction 1 more
            left += weight * np.outer(vector, vector)
            right += (j in chosen) * vector
        found[place] = np.linalg.solve(left, right)
    return found


def sweep(state, shards, penalty=PENALTY, w0=W0):
    return whole_data_sweep(
        state, shards, transposed(shards), unobserved_weight=w0, penalty=penalty
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("penalty", [PENALTY, Penalty(0.01, 0.0), Penalty(1.0, 1.0)], ids=str)
def test_sweeps_are_alternating_least_squares(penalty, dtype):
    shards = random_federation(1, n_users=13, n_items=11)
    rows, columns = items_by_user(shards), items_by_user(transposed(shards))
    state = start_of(shards, dtype=dtype)
    items = state.item_table.double().numpy()
    for number in range(3):
        users = literal_solve(rows, items, W0, penalty)
        before, items = items, literal_solve(columns, users, W0, penalty)
        state, logs = sweep(state, shards, penalty)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-4
        np.testing.assert_allclose(state.user_factors, users, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(state.item_table, items, rtol=tolerance, atol=tolerance)
        assert state.passes == number + 1
        scores = users @ before.T
        fit = sum(((1 - scores[u, i]) ** 2) for u, chosen in enumerate(rows) for i in chosen)
        expected = (fit + W0 * (scores**2).sum()) / sum(map(len, rows))
        assert logs["loss"] == pytest.approx(expected, rel=1e-4)


def objective(state, shards, penalty):
    rows, columns = items_by_user(shards), items_by_user(transposed(shards))
    U, V = state.user_factors.numpy(), state.item_table.numpy()
    scores = U @ V.T
    total = W0 * (scores**2).sum()
    total += sum((1 - scores[u, i]) ** 2 for u, chosen in enumerate(rows) for i in chosen)
    for vectors, held in ((U, rows), (V, columns)):
        mean = np.mean([len(r) for r in held])
        total += sum(
            strength(len(chosen), mean, penalty.l2, penalty.exponent) * vector @ vector
            for vector, chosen in zip(vectors, held, strict=True)
        )
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_objective_falls_with_every_sweep(seed):
    shards = random_federation(seed)
    state, _ = sweep(start_of(shards, seed=seed), shards)
    before = objective(state, shards, PENALTY)
    for _ in range(20):
        state, _ = sweep(state, shards)
        after = objective(state, shards, PENALTY)
        assert after < before
        before = after


def test_users_do_not_depend_on_where_they_start():
    shards = random_federation(0)
    one = start_of(shards)
    other = dataclasses.replace(one, user_factors=one.user_factors + 7.0)
    found, expected = (sweep(state, shards)[0] for state in (other, one))
    assert torch.equal(found.user_factors, expected.user_factors)
    assert torch.equal(found.item_table, expected.item_table)


def test_items_without_interactions_have_no_vector():
    shards = federation_of([[0, 1], [1, 3], [3]], 5)
    state, _ = sweep(start_of(shards), shards)
    norms = state.item_table.norm(dim=1)
    assert (norms[[2, 4]] == 0).all()
    assert (norms[[0, 1, 3]] > 0.01).all()


def test_solved_users_are_the_minimum():
    shards = random_federation(4)
    state, _ = sweep(start_of(shards), shards)
    users = solved(shards, state.item_table, unobserved_weight=W0, penalty=PENALTY)
    best = objective(dataclasses.replace(state, user_factors=users), shards, PENALTY)
    assert best < objective(state, shards, PENALTY)
    for shift in (1e-3, -1e-3):
        moved = dataclasses.replace(state, user_factors=users + shift)
        assert objective(moved, shards, PENALTY) > best


# ---------------------------------------------------------------- sampled negatives


def literal_pass(
    model, shards, t, users, table, head, optimizers, *, batch_users, n_negatives, n_layers,
    items, l2,
):  # fmt: skip
    """Walk over the users' batches with autograd; `users`, `table` and `head` are parameters."""
    d = users[0].shape[0]
    item_bias = table.shape[1] > d
    order = STREAMS.numpy("batches", t).permutation(shards.n_clients)
    losses = []
    for start in range(0, len(order), batch_users):
        batch, terms = order[start : start + batch_users].tolist(), []
        for user in batch:
            examples = examples_of(
                shards, user, n_negatives=n_negatives, batch_size=None,
                key=STREAMS.key("examples", t),
            )  # fmt: skip
            positives = [e.item for e in examples if e.label]
            vector, rows = propagated(users[user], table, positives, n_layers, items=items)
            for example in examples:
                if model == "mf":
                    row = table[example.item]
                    score = users[user] @ row[:d] + (row[d] if item_bias else 0.0)
                else:
                    score = logit(vector, rows[example.item], head, item_bias=item_bias)
                fit = binary_cross_entropy_with_logits(score, score.new_tensor(example.label))
                losses.append(float(fit.detach()))
                norms = users[user].square().sum() + table[example.item].square().sum()
                terms.append(fit + l2 / 2 * norms)
        moving = [optimizers["shared"], *(optimizers[user] for user in batch)]
        for each in moving:
            each.zero_grad()
        torch.autograd.backward([torch.stack(terms).mean()])
        for each in moving:
            each.step()
    return np.mean(losses)


def both(
    model, *, optimizer, batch_users, item_bias=True, n_layers=0, items=False, l2=0.0, passes=3,
    seed=0,
):  # fmt: skip
    """Give what the fast and the literal code make of the same start in some passes."""
    shards = random_federation(seed, n_users=9, n_items=14, max_rows=6)
    n_negatives = 2
    U, V, heads = random_server(shards, [4], item_bias=item_bias, seed=seed)
    head = {} if model == "mf" else heads[0]
    state = CentralState.start(U.clone(), V.clone(), head, optimizer)
    users = [vector.clone().requires_grad_(True) for vector in U]
    table = V.clone().requires_grad_(True)
    own = {name: value.clone().requires_grad_(True) for name, value in head.items()}
    optimizers = {user: torch_optimizer([vector], optimizer) for user, vector in enumerate(users)}
    optimizers["shared"] = torch_optimizer([table, *own.values()], optimizer)
    for t in range(passes):
        state, logs = bce_pass(
            state, shards, t, streams=STREAMS, batch_users=batch_users, item_bias=item_bias,
            n_negatives=n_negatives, n_graph_layers=n_layers, item_propagation=items,
            optimizer=optimizer, l2=l2,
        )  # fmt: skip
        loss = literal_pass(
            model, shards, t, users, table, own, optimizers, batch_users=batch_users,
            n_negatives=n_negatives, n_layers=n_layers, items=items, l2=l2,
        )  # fmt: skip
        assert logs["loss"] == pytest.approx(loss, rel=1e-9)
    assert state.passes == passes
    found = {"user": state.user_factors, "item": state.item_table, **state.head}
    expected = {"user": torch.stack(users), "item": table, **own}
    return found, {name: value.detach() for name, value in expected.items()}


OPTIMIZERS = [Optimizer("adam", 0.05), Optimizer("momentum", 0.3), Optimizer("sgd", 0.5)]
MODELS = {"mf": 0, "ncf": 0, "lightgcn": 1}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: each.name)
@pytest.mark.parametrize("batch_users", [4, 100])
@pytest.mark.parametrize("model", MODELS)
def test_a_pass_is_autograd_and_an_optimizer(model, batch_users, optimizer):
    found, expected = both(
        model, optimizer=optimizer, batch_users=batch_users, n_layers=MODELS[model], l2=0.05
    )
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "arguments",
    [{"item_bias": False}, {"n_layers": 3}, {"n_layers": 2, "items": True}, {"seed": 5, "l2": 0.0}],
    ids=str,
)
def test_a_pass_with_other_arguments(arguments):
    model = "lightgcn" if "n_layers" in arguments else "ncf"
    found, expected = both(
        model, optimizer=OPTIMIZERS[0], batch_users=2, **{"l2": 0.01} | arguments
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-8)


def one_pass(state, shards, **arguments):
    defaults = {
        "streams": STREAMS, "batch_users": 5, "item_bias": True, "n_negatives": 2,
        "n_graph_layers": 0, "optimizer": OPTIMIZERS[0], "l2": 0.01,
    }  # fmt: skip
    return bce_pass(state, shards, 0, **defaults | arguments)


def everything_in(state):
    moments = (state.user_moments, state.shared_moments)
    return [
        state.user_factors,
        state.item_table,
        *state.head.values(),
        *(value for m in moments for value in (*m.first.values(), *m.second.values(), m.steps)),
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chunk_rows", [1, 60])
def test_chunks_change_nothing(model, chunk_rows, monkeypatch):
    shards = random_federation(2)
    U, V, heads = random_server(shards, [4])
    state = CentralState.start(U, V, {} if model == "mf" else heads[0], OPTIMIZERS[0])
    whole, logs = one_pass(state, shards, n_graph_layers=MODELS[model])
    monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", chunk_rows)
    cut, cut_logs = one_pass(state, shards, n_graph_layers=MODELS[model])
    assert cut_logs["loss"] == pytest.approx(logs["loss"], rel=1e-12)
    for found, expected in zip(everything_in(cut), everything_in(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_a_pass_changes_no_argument(model):
    shards = random_federation(2)
    U, V, heads = random_server(shards, [4])
    state = CentralState.start(U, V, {} if model == "mf" else heads[0], OPTIMIZERS[0])
    state, _ = one_pass(state, shards)
    before = [value.clone() for value in everything_in(state)]
    one_pass(state, shards)
    for value, old in zip(everything_in(state), before, strict=True):
        assert torch.equal(value, old)


def test_everybody_has_one_step_in_a_pass():
    shards = random_federation(2)
    U, V, _ = random_server(shards, [4])
    state = CentralState.start(U, V, {}, OPTIMIZERS[0])
    state, _ = one_pass(state, shards, batch_users=7)
    assert (state.user_moments.steps == 1).all()
    assert state.shared_moments.steps.tolist() == [-(-shards.n_users // 7)]


def test_single_precision_keeps_small_gradients():
    """A gradient read off a short step would be rounding, next to values of ten."""
    shards = random_federation(2)
    U, V, heads = random_server(shards, [4])
    state = CentralState.start(U, V + 10.0, heads[0], Optimizer("sgd", 1.0))
    exact, _ = one_pass(state, shards, optimizer=Optimizer("sgd", 1.0), batch_users=100)
    single = CentralState.start(
        state.user_factors.float(),
        state.item_table.float(),
        {name: value.float() for name, value in state.head.items()},
        Optimizer("adam", 1.0),
    )
    found, _ = one_pass(single, shards, optimizer=Optimizer("adam", 1.0), batch_users=100)
    gradient = found.shared_moments.first["item"][0] / 0.1
    expected = state.item_table - exact.item_table
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)
