import numpy as np
import pytest
import torch

from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.mixing import RowSums
from fedrecsk.models import sampled_bce
from fedrecsk.models.bce_newton import curvature_sums, newton_step
from fedrecsk.models.whole_data import ServerStatistics
from tests.reference import bce_newton_reference as reference
from tests.reference.federations import random_federation
from tests.reference.sampled_bce_reference import train_cohort

N_ITEMS, WIDTH = 12, 5


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def nothing_known(n_items=N_ITEMS, width=WIDTH):
    return ServerStatistics.zero(n_items, width, torch.device("cpu"))


def round_of(seed, *, n_users=20):
    """What a server could be told in a round: two of the items are touched by nobody."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 30, (N_ITEMS,), generator=generator).double()
    counts[[2, 7]] = 0.0
    users = normal(n_users, WIDTH, seed=seed) * torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1])
    return {
        "gradient": normal(N_ITEMS, WIDTH, seed=seed + 100) * counts[:, None],
        "counts": counts,
        "curvature": 0.2 * counts,
        "gram": users.T @ users / n_users,
    }


def literal(table, rounds, *, l2, forgetting, decay):
    """Return the table after each of the rounds."""
    table, counts, curvature, tables = table.numpy(), 0.0, 0.0, []
    for t, told in enumerate(rounds):
        counts = (1 - forgetting) * counts + told["counts"].numpy()
        curvature = (1 - forgetting) * curvature + told["curvature"].numpy()
        table = reference.dense_step(
            table,
            told["gradient"].numpy(),
            gram=reference.mean_gram([seen["gram"].numpy() for seen in rounds[: t + 1]], decay),
            counts=counts,
            curvature=curvature,
            l2=l2,
        )
        tables.append(table)
    return tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_users", [20, 3])  # fewer than columns: a singular Gram matrix
@pytest.mark.parametrize(("forgetting", "decay"), [(0.3, 0.9), (1.0, 0.5), (0.05, 0.0)])
def test_a_step_solves_a_dense_system_for_every_item(forgetting, decay, n_users, dtype):
    start = normal(N_ITEMS, WIDTH, seed=0)
    rounds = [round_of(t, n_users=n_users) for t in range(4)]
    constants = {"l2": 0.07, "forgetting": forgetting, "decay": decay}
    table, statistics = start.to(dtype), nothing_known()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
    for told, expected in zip(rounds, literal(start, rounds, **constants), strict=True):
        told = {name: value.to(dtype) for name, value in told.items()}
        table, statistics = newton_step(table, statistics, **told, **constants)
        np.testing.assert_allclose(
            table, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max())
        )


def test_directions_that_no_user_has_shown_have_a_floor_under_their_curvature():
    # With so much curvature the identity counts for nothing, and the floor is what is left.
    told = round_of(0, n_users=2) | {"curvature": torch.full((N_ITEMS,), 1e7).double()}
    start = normal(N_ITEMS, WIDTH, seed=1)
    moved, _ = newton_step(start, nothing_known(), **told, l2=0.0, forgetting=0.5, decay=0.9)
    (expected,) = literal(start, [told], l2=0.0, forgetting=0.5, decay=0.9)
    step = np.abs(expected - start.numpy()).max()
    assert step > 1e-6
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6 * step)
    # No further than along the weakest direction that the floor leaves.
    largest = np.linalg.eigvalsh(told["gram"])[-1]
    bound = told["gradient"].norm(dim=1) / (1e7 * 1e-4 * largest)
    assert ((moved - start).norm(dim=1) <= 1.001 * bound).all()


def test_a_step_leaves_its_arguments_alone_and_items_without_gradient_where_they_are():
    start, statistics = normal(N_ITEMS, WIDTH, seed=1), nothing_known()
    for t in range(2):
        told = round_of(t)
        copies = {name: value.clone() for name, value in told.items()}
        before, known = start.clone(), statistics.counts.clone()
        moved, after = newton_step(start, statistics, **told, l2=0.1, forgetting=0.3, decay=0.9)
        assert torch.equal(start, before)
        assert torch.equal(statistics.counts, known)
        assert all(torch.equal(told[name], copy) for name, copy in copies.items())
        untouched = told["counts"] == 0
        assert torch.equal(moved[untouched], start[untouched])
        assert (moved != start)[~untouched].all()
        start, statistics = moved, after
    assert torch.equal(statistics.counts[[2, 7]], torch.zeros(2).double())
    assert torch.equal(statistics.curvature[[2, 7]], torch.zeros(2).double())


def test_a_forgetting_of_one_forgets_all_that_was_known_of_the_items():
    start, told = normal(N_ITEMS, WIDTH, seed=1), round_of(5)
    known = ServerStatistics(
        gram=torch.eye(WIDTH).double(),
        counts=torch.full((N_ITEMS,), 40.0).double(),
        curvature=torch.full((N_ITEMS,), 9.0).double(),
        weight=0.7,
    )
    constants = {"l2": 0.1, "decay": 0.0}  # of the Gram matrix nothing is kept either
    fresh, fresh_statistics = newton_step(
        start, nothing_known(), **told, **constants, forgetting=1.0
    )
    moved, statistics = newton_step(start, known, **told, **constants, forgetting=1.0)
    torch.testing.assert_close(moved, fresh)
    for name in ("gram", "counts", "curvature"):
        torch.testing.assert_close(getattr(statistics, name), getattr(fresh_statistics, name))
    kept, _ = newton_step(start, known, **told, **constants, forgetting=0.1)
    touched = told["counts"] > 0
    # What is known holds an item where it is.
    assert ((kept - start).norm(dim=1) < (fresh - start).norm(dim=1))[touched].all()


def test_many_rounds_with_the_same_message_end_at_the_newton_step():
    """Evidence sums to 1 / ρ rounds, so a step is ρ of the whole way once the prior is small."""
    told, forgetting = round_of(3), 0.2
    told = {name: 1e6 * value if name != "gram" else value for name, value in told.items()}
    statistics, steps = nothing_known(), []
    for _ in range(60):
        moved, statistics = newton_step(
            torch.zeros(N_ITEMS, WIDTH).double(),
            statistics,
            **told,
            l2=0.1,
            forgetting=forgetting,
            decay=0.9,
        )
        steps.append(moved)
    touched = told["counts"] > 0
    torch.testing.assert_close(
        steps[-1][touched], forgetting * steps[0][touched], rtol=1e-4, atol=0.0
    )


@pytest.mark.parametrize("item_bias", [True, False])
@pytest.mark.parametrize("path", ["fused", "pooled"])
def test_curvature_sums_are_loops_over_clients_and_their_items(item_bias, path):
    shards = random_federation(4, n_users=12, n_items=70, max_rows=6)
    width = 3
    users = 0.8 * normal(shards.n_users, width, seed=0).float()
    table = 0.8 * normal(shards.n_items, width + item_bias, seed=1).float()
    clients = np.array([7, 2, 10, 5, 0])
    if path == "fused":  # wants clients by ascending size
        clients = clients[np.argsort(shards.client_rows[clients], kind="stable")]
    cohort = shards.cohort(clients)
    arguments = {
        "item_bias": item_bias,
        "n_negatives": 2,
        "batch_size": 6,
        "local_epochs": 2,
        "optimizer": Optimizer("sgd", 0.2),
        "l2": 0.02,
        "key": 5,
    }
    result = sampled_bce.train(cohort, users[cohort.users], table, **arguments)
    found, gram = curvature_sums(
        result,
        RowSums(result.row_items, len(table)),
        sampled_bce.with_constant(result.user_vectors, item_bias),
    )
    updates = train_cohort(shards, clients.tolist(), users, table, **arguments)
    evidence = reference.Evidence.none(shards.n_items)
    reference.collect(
        evidence, updates, table.double().numpy(), item_bias=item_bias, forgetting=0.0
    )
    np.testing.assert_allclose(found, evidence.curvature, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gram / len(clients), evidence.grams[0], rtol=1e-5, atol=1e-5)
    assert (found > 0).any()
    assert not (found > 0).all()
