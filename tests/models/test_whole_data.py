import numpy as np
import pytest
import torch

from fedrecsk.models.whole_data import (
    JITTER,
    Penalty,
    ServerStatistics,
    Sums,
    all_solved,
    default_rate,
    default_unobserved_weight,
    server_step,
    solve_users,
    steady_rate,
    user_sums,
)
from tests.reference import whole_data_reference as reference
from tests.reference.federations import federation_of, items_by_user, random_federation

SINGLE = random_federation(0, n_users=25, n_items=20)
SHARED = random_federation(1, n_users=18, n_items=15, n_clients=4)
EDGES = federation_of([range(6), [], [2], [2], [0, 5]], 7)  # item 6 has no users
FEDERATIONS = pytest.mark.parametrize("shards", [SINGLE, SHARED, EDGES])
W0, L2, EXPONENT, N_FACTORS = 0.2, 0.3, 0.7, 4
PENALTY = Penalty(L2, EXPONENT)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def item_table(shards, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shards.n_items, N_FACTORS, generator=generator, dtype=torch.float64).to(
        dtype
    )


def everybody(shards):
    return shards.cohort(np.arange(shards.n_clients))


def assert_close(found, expected):
    """Compare with a reference in double precision, relative to its largest value."""
    tolerance = TOLERANCE[found.dtype]
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max()
    assert error <= tolerance * max(1.0, expected.abs().max())


def solved(shards, table, cohort=None):
    """Solve a cohort (default: everybody) with the module's constants."""
    return solve_users(
        everybody(shards) if cohort is None else cohort,
        table,
        table.T @ table,
        unobserved_weight=W0,
        penalty=PENALTY,
        mean_rows=len(shards.items) / shards.n_users,
    )


def summed(cohort, users, table):
    return user_sums(cohort, users, table, table.T @ table, unobserved_weight=W0)


# Penalty and defaults ---------------------------------------------------------------------


def test_penalty_is_l2_times_the_mean_at_the_mean():
    for exponent in (0.0, 0.5, 1.0):
        found = Penalty(0.2, exponent).strength(torch.tensor([8.0]), 8.0)
        assert found.item() == pytest.approx(0.2 * 8.0 + JITTER)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_penalty_grows_with_a_power_of_the_count(exponent):
    counts = [0.0, 1.0, 3.0, 50.0]
    found = Penalty(0.1, exponent).strength(torch.tensor(counts, dtype=torch.float64), 7.0)
    expected = [reference.strength(count, 7.0, 0.1, exponent) for count in counts]
    assert found.tolist() == pytest.approx(expected)
    assert found.min() >= JITTER * (1 - 1e-9)  # rows without data stay solvable


def test_default_unobserved_weight_balances_and_is_bounded():
    for n_rows, n_users, n_items in [(300, 1000, 500), (10_000, 943, 1682), (5, 10, 100)]:
        weight = default_unobserved_weight(n_rows, n_users, n_items)
        assert weight * n_users * n_items == pytest.approx(30 * n_rows)
    assert default_unobserved_weight(100, 10, 10) == 1.0  # never above an observed pair
    weights = [default_unobserved_weight(n_rows, 50, 60) for n_rows in range(1, 3000, 50)]
    assert weights == sorted(weights)


def test_steady_rate_is_a_full_step_for_everybody_and_falls_with_time():
    assert [steady_rate(1.0, t) for t in (0, 5, 500)] == [1.0, 1.0, 1.0]
    for participation in (0.01, 0.05, 0.2, 0.5, 0.9):
        rates = [steady_rate(participation, t) for t in range(200)]
        assert all(0.0 < rate < 1.0 for rate in rates)
        assert (np.diff(rates) < 0).all()
    for t in (0, 10, 1000):
        rates = [steady_rate(share, t) for share in (0.01, 0.05, 0.2)]
        assert rates == sorted(rates)


def test_default_rate_is_the_larger_of_the_schedule_and_one_over_the_rounds():
    for participation in (0.001, 0.05, 0.2, 0.5, 0.9, 1.0):
        rates = [default_rate(participation, t) for t in range(200)]
        for t, rate in enumerate(rates):
            schedule, mean = steady_rate(participation, t), 1.0 / (t + 1)
            assert rate in (schedule, mean)
            assert rate >= max(schedule, mean)
        assert rates[0] == 1.0
        assert (np.diff(rates) <= 0).all()
    assert [default_rate(0.001, t) for t in range(4)] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert default_rate(0.2, 100) == steady_rate(0.2, 100)
    assert [default_rate(1.0, t) for t in (0, 7, 500)] == [1.0] * 3


# Users ------------------------------------------------------------------------------------


@DTYPES
@FEDERATIONS
def test_solve_users_solves_each_users_normal_equations(shards, dtype):
    table = item_table(shards, dtype)
    cohort = everybody(shards)
    items = items_by_user(shards)
    expected = reference.solve_users(
        [items[user] for user in cohort.users.tolist()],
        table.double().numpy(),
        W0,
        L2,
        EXPONENT,
        len(shards.items) / shards.n_users,
    )
    assert_close(solved(shards, table, cohort), expected)


@FEDERATIONS
def test_matrices_of_a_few_users_are_held_at_a_time(shards, monkeypatch):
    table, seen = item_table(shards, torch.float32), []
    whole = solved(shards, table)
    cholesky = torch.linalg.cholesky_ex

    def watched(matrix):
        seen.append(matrix.numel())
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", watched)
    for bound in (3 * N_FACTORS**2, 1):
        monkeypatch.setattr("fedrecsk.models.whole_data.MATRIX_NUMBERS", bound)
        seen.clear()
        assert torch.equal(solved(shards, table), whole)
        assert max(seen) == max(bound, N_FACTORS**2)
        assert sum(seen) == shards.n_users * N_FACTORS**2


@FEDERATIONS
def test_solved_users_are_stationary(shards):
    table, cohort = item_table(shards), everybody(shards)
    users = solved(shards, table, cohort).requires_grad_(True)
    items = items_by_user(shards)
    value = torch.zeros((), dtype=torch.float64)
    for u, user in zip(users, cohort.users.tolist(), strict=True):
        own = items[user]
        ridge = reference.strength(len(own), len(shards.items) / shards.n_users, L2, EXPONENT)
        value = value + ((1 - table[own] @ u) ** 2).sum() + W0 * ((table @ u) ** 2).sum()
        value = value + ridge * u @ u
    value.backward()
    assert users.grad.abs().max() < 1e-10


def test_solving_does_not_depend_on_who_shares_the_cohort():
    table = item_table(SHARED)
    whole = dict(zip(everybody(SHARED).users.tolist(), solved(SHARED, table), strict=True))
    for chunk in SHARED.user_chunks(np.arange(2)):
        for user, vector in zip(chunk.users.tolist(), solved(SHARED, table, chunk), strict=True):
            torch.testing.assert_close(vector, whole[user])


def test_a_user_without_rows_gets_the_zero_vector():
    users = solved(EDGES, item_table(EDGES))
    assert torch.equal(users[1], torch.zeros(N_FACTORS, dtype=torch.float64))
    assert torch.equal(users[2], users[3])  # the same items, the same vector


@DTYPES
@FEDERATIONS
def test_user_sums_are_loops_over_interactions(shards, dtype):
    table, cohort = item_table(shards, dtype), everybody(shards)
    users = torch.randn(
        shards.n_users, N_FACTORS, generator=torch.Generator().manual_seed(3), dtype=dtype
    )
    found = summed(cohort, users, table)
    items = items_by_user(shards)
    expected = reference.totals(
        [items[user] for user in cohort.users.tolist()],
        users.double().numpy(),
        table.double().numpy(),
        W0,
    )
    assert_close(found.pull, expected.pull)
    assert_close(found.counts, expected.counts)
    assert_close(found.curvature, expected.curvature)
    assert_close(found.gram, expected.gram)
    assert float(found.loss) == pytest.approx(expected.loss, rel=TOLERANCE[dtype])
    assert (found.n_users, found.n_rows) == (shards.n_users, len(shards.items))


def test_sums_of_parts_are_the_sums_of_the_whole():
    table = item_table(SHARED)
    total = Sums.zero(SHARED.n_items, N_FACTORS, SHARED.device)
    for client in range(SHARED.n_clients):
        cohort = SHARED.cohort(np.array([client]))
        total = total + summed(cohort, solved(SHARED, table, cohort), table)
    whole = summed(everybody(SHARED), solved(SHARED, table), table)
    for name in ("pull", "counts", "curvature", "gram", "loss"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name))
    assert (total.n_users, total.n_rows) == (whole.n_users, whole.n_rows)


# Server -----------------------------------------------------------------------------------


def start_statistics(shards):
    return ServerStatistics.zero(shards.n_items, N_FACTORS, shards.device)


@pytest.mark.parametrize("item_curvature", [True, False])
@pytest.mark.parametrize(
    ("shards", "dtype"),
    [
        (SINGLE, torch.float32),
        (SINGLE, torch.float64),
        (SHARED, torch.float32),
        (SHARED, torch.float64),
        (EDGES, torch.float64),  # fewer different users than factors: a singular matrix
    ],
)
def test_server_step_solves_a_dense_system_for_every_item(shards, dtype, item_curvature):
    """Two rounds of half of the clients each, with smoothing in between."""
    table = item_table(shards, dtype)
    table[shards.n_items // 2] = 0.0  # a vector without direction
    items, statistics, decay, rate = items_by_user(shards), start_statistics(shards), 0.6, 0.4
    smooth = {"gram": 0.0, "counts": 0.0, "curvature": 0.0}
    expected, weight = table.double().numpy(), 0.0
    half = shards.n_clients // 2
    for clients in (np.arange(half), np.arange(half, shards.n_clients)):
        cohort = shards.cohort(clients)
        users = solved(shards, table, cohort)
        sums = summed(cohort, users, table)
        mean_rows = len(shards.items) / shards.n_items
        table, statistics = server_step(
            table,
            statistics,
            sums,
            n_users=shards.n_users,
            unobserved_weight=W0,
            penalty=PENALTY,
            mean_rows=mean_rows,
            rate=rate,
            decay=decay,
            item_curvature=item_curvature,
        )

        plain = reference.totals(
            [items[user] for user in cohort.users.tolist()], users.double().numpy(), expected, W0
        )
        scale = shards.n_users / cohort.n_users
        weight = decay * weight + 1 - decay
        for name in smooth:
            smooth[name] = decay * smooth[name] + (1 - decay) * scale * getattr(plain, name)
        mean = {name: value / weight for name, value in smooth.items()}
        ridge = np.array(
            [reference.strength(count, mean_rows, L2, EXPONENT) for count in mean["counts"]]
        )
        expected = reference.dense_step(
            expected,
            reference.gradient(expected, plain, scale, W0, ridge),
            **mean,
            n_users=shards.n_users,
            w0=W0,
            ridge=ridge,
            rate=rate,
            item_curvature=item_curvature,
        )
        # From here on the reference follows the fast table, so that errors do not add up.
        assert_close(table, expected)
        expected = table.double().numpy()


def test_directions_that_no_user_has_shown_do_not_amplify_rounding():
    # Nine users cannot span 32 factors: rows outside their cohort have no curvature there.
    shards = random_federation(0, n_users=200, n_items=100, max_rows=10)
    tables = {}
    start = 0.1 * torch.randn(
        shards.n_items, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for dtype in TOLERANCE:
        table, cohort = start.to(dtype), shards.cohort(np.arange(9))
        tables[dtype], _ = server_step(
            table,
            ServerStatistics.zero(shards.n_items, 32, shards.device),
            summed(cohort, solved(shards, table, cohort), table),
            n_users=shards.n_users,
            unobserved_weight=W0,
            penalty=PENALTY,
            mean_rows=5.0,
            rate=1.0,
            decay=0.9,
        )
    moved = (tables[torch.float64] - start).abs().max()
    error = (tables[torch.float32].double() - tables[torch.float64]).abs().max()
    assert error < 1e-2 * moved


def test_curvature_along_an_item_shortens_the_step_of_users_that_are_alike():
    # The crowd does not look like the users of items 0 and 1, so its Gram matrix says little.
    shards = federation_of([[0, 1]] * 3 + [[2, 3, 4]] * 30, 5)
    table = item_table(shards)
    users = solved(shards, table)
    moved = [
        server_step(
            table,
            start_statistics(shards),
            summed(everybody(shards), users, table),
            n_users=shards.n_users,
            unobserved_weight=W0,
            penalty=PENALTY,
            mean_rows=len(shards.items) / shards.n_items,
            rate=1.0,
            decay=0.0,
            item_curvature=item_curvature,
        )[0]
        for item_curvature in (True, False)
    ]
    along = [(((after - table) * table).sum(1) / table.norm(dim=1))[:2].abs() for after in moved]
    assert (along[0] < along[1]).all()


def test_a_vector_that_is_rounding_gives_no_direction():
    """A full step takes an item to nothing whom nobody of the round had; others come for it."""
    shards = random_federation(0, n_users=30, n_items=12)
    table = item_table(shards)
    generator = torch.Generator().manual_seed(1)

    def moved(size, *, item_curvature=True):
        noise = size * torch.randn(1, N_FACTORS, generator=generator, dtype=torch.float64)
        start = table.index_copy(0, torch.tensor([4]), noise)
        sums = summed(everybody(shards), solved(shards, start), start)
        return server_step(
            start,
            start_statistics(shards),
            sums,
            n_users=shards.n_users,
            unobserved_weight=W0,
            penalty=PENALTY,
            mean_rows=5.0,
            rate=1.0,
            decay=0.0,
            item_curvature=item_curvature,
        )[0]

    expected = moved(0.0)
    for _ in range(3):
        torch.testing.assert_close(moved(1e-8), expected, rtol=0, atol=1e-6)
    # A short vector is one all the same.
    state = generator.get_state()
    short = moved(1e-3)
    generator.set_state(state)
    assert (short - moved(1e-3, item_curvature=False))[4].norm() > 1e-4


def run_rounds(shards, table, n_rounds, *, decay, rate=1.0):
    """Alternate exact user solves and server steps of everybody; yield users and table."""
    cohort, statistics = everybody(shards), start_statistics(shards)
    for _ in range(n_rounds):
        users = solved(shards, table, cohort)
        yield users, table
        table, statistics = server_step(
            table,
            statistics,
            summed(cohort, users, table),
            n_users=shards.n_users,
            unobserved_weight=W0,
            penalty=PENALTY,
            mean_rows=len(shards.items) / shards.n_items,
            rate=rate,
            decay=decay,
        )


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("shards", [SINGLE, SHARED])
def test_full_participation_descends_to_a_stationary_point(shards, decay):
    by_user = items_by_user(shards)
    items = [by_user[user] for user in everybody(shards).users.tolist()]
    item_counts = np.bincount(shards.items, minlength=shards.n_items)
    user_ridge, item_ridge = (
        np.array([reference.strength(n, np.mean(counts), L2, EXPONENT) for n in counts])
        for counts in ([len(own) for own in items], item_counts)
    )
    values, slopes = [], []
    for users, table in run_rounds(shards, item_table(shards), 300, decay=decay):
        U, V = users.numpy(), table.numpy()
        values.append(reference.objective(items, U, V, W0, user_ridge, item_ridge))
        sums = reference.totals(items, U, V, W0)
        slopes.append(np.abs(reference.gradient(V, sums, 1.0, W0, item_ridge)).max())
    assert (np.diff(values) <= 1e-9 * values[0]).all()
    assert slopes[-1] < 1e-6 * slopes[0]
    # Zero is stationary as well, with one for each interaction: this must be a better point.
    assert values[-1] < 0.9 * len(shards.items)


def test_a_step_of_rate_zero_changes_nothing_but_the_statistics():
    table = item_table(SINGLE)
    sums = summed(everybody(SINGLE), solved(SINGLE, table), table)
    before = start_statistics(SINGLE)
    moved, after = server_step(
        table,
        before,
        sums,
        n_users=SINGLE.n_users,
        unobserved_weight=W0,
        penalty=PENALTY,
        mean_rows=1.0,
        rate=0.0,
        decay=0.9,
    )
    assert torch.equal(moved, table)
    assert before.weight == 0.0
    assert torch.equal(before.gram, torch.zeros(N_FACTORS, N_FACTORS))
    assert after.weight == pytest.approx(0.1)
    torch.testing.assert_close(after.gram / after.weight, sums.gram)


def test_users_without_a_solution_are_not_numbers_and_the_others_are_solved():
    shards, table = SINGLE, item_table(SINGLE, torch.float32)
    expected = solved(shards, table)
    cohort = everybody(shards)
    spoilt = int(cohort.items[0])
    found = solve_users(
        cohort, table.index_fill(0, torch.tensor([spoilt]), torch.nan), table.T @ table,
        unobserved_weight=W0, penalty=PENALTY,
        mean_rows=len(shards.items) / shards.n_users,
    )  # fmt: skip
    holders = cohort.row_user[cohort.items == spoilt].unique()
    others = torch.ones(cohort.n_users, dtype=torch.bool).index_fill(0, holders, False)
    assert 0 < len(holders) < cohort.n_users
    assert found[holders].isnan().all()
    assert torch.equal(found[others], expected[others])
    assert all_solved(expected) is expected
    with pytest.raises(torch.linalg.LinAlgError, match="no solution"):
        all_solved(found)


def test_a_matrix_that_is_not_positive_has_no_solution():
    shards, table = SINGLE, item_table(SINGLE, torch.float32)
    found = solve_users(
        everybody(shards), table, -1e3 * torch.eye(N_FACTORS),
        unobserved_weight=W0, penalty=PENALTY, mean_rows=1.0,
    )  # fmt: skip
    assert found.isnan().all()
