"""Sums with privacy: clipping, noise, learned bounds, and what they cost."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine import accounting
from fedrecsk.engine.accounting import Charge, Plan, fitting_noise, turns_so_far
from fedrecsk.engine.privacy import Privacy, moved_bounds, part_lengths
from fedrecsk.engine.sampling import poisson_cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uploads import Uploads, add_uploads

STREAMS = Streams(3)
N_ITEMS, WIDTHS = 12, (3, 1)
PARTS = 3  # two of rows, and the numbers
BOUNDS = torch.tensor([1.5, 0.4, 2.0], dtype=torch.float64)


def uploads(n_clients=9, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.nonzero(torch.rand(n_clients, N_ITEMS, generator=generator) < 0.4)
    return Uploads(
        clients=np.arange(n_clients),
        row_clients=pairs[:, 0],
        row_items=pairs[:, 1],
        rows=scale * torch.randn(len(pairs), sum(WIDTHS), generator=generator),
        row_weights=torch.rand(len(pairs), generator=generator),
        n_directions=WIDTHS[0],
        numbers=scale * torch.randn(n_clients, 5, generator=generator),
        weights=torch.rand(n_clients, generator=generator),
    )


def release(sent, *, bounds=BOUNDS, t=0, n_clients=None, n_items=N_ITEMS, **changes):
    arguments = {
        "name": "central", "noise_multiplier": 0.0, "clip_norm": None, "cohort": 9,
        "streams": STREAMS,
    }  # fmt: skip
    stage = Privacy(**{**arguments, **changes})
    count = len(sent.clients) if n_clients is None else n_clients
    return stage.add(sent, n_items, WIDTHS, bounds, t, count)


def parts_of(sums):
    """Lay the sums out part by part."""
    return [sums.rows[:, :3].flatten(), sums.rows[:, 3].flatten(), sums.numbers]


def reference_sums(sent, bounds):
    """Shorten each client's dense upload by one factor and add up, one client at a time."""
    rows = torch.zeros(N_ITEMS, 4, dtype=torch.float64)
    numbers = torch.zeros(5, dtype=torch.float64)
    for client in range(len(sent.clients)):
        own = torch.zeros(N_ITEMS, 4, dtype=torch.float64)
        for k in torch.nonzero(sent.row_clients == client)[:, 0]:
            own[sent.row_items[k]] = sent.rows[k].double()
        number = sent.numbers[client].double()
        lengths = [own[:, :3].norm(), own[:, 3].norm(), number.norm()]
        factor = min(1.0, *(float(b / x) for b, x in zip(bounds, lengths, strict=True)))
        rows += factor * own
        numbers += factor * number
    return rows, numbers


def test_clipping_is_that_of_one_client_at_a_time():
    sent = uploads()
    sums = release(sent).sums
    rows, numbers = reference_sums(sent, BOUNDS)
    torch.testing.assert_close(sums.rows.double(), rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.numbers.double(), numbers, rtol=1e-5, atol=1e-6)


def test_weights_that_clients_claim_are_not_read():
    sent = uploads()
    louder = replace(sent, row_weights=100 * sent.row_weights, weights=100 * sent.weights)
    assert torch.equal(release(sent).sums.rows, release(louder).sums.rows)
    assert torch.equal(release(sent).sums.numbers, release(louder).sums.numbers)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_one_client_moves_the_sums_by_no_more_than_the_bounds(scale):
    sent = uploads(scale=scale)
    whole = parts_of(release(sent).sums)
    for client in range(len(sent.clients)):
        others = sent.of(torch.from_numpy(sent.clients != client))
        rest = parts_of(release(others).sums)
        for one, other, bound in zip(whole, rest, BOUNDS, strict=True):
            assert float((one - other).norm()) <= float(bound) * (1 + 1e-4)
    # Somebody is clipped, or the bounds prove nothing.
    assert scale < 1 or not torch.allclose(whole[2], add_uploads(sent, N_ITEMS).numbers)


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_noise_is_one_gaussian_mechanism_on_the_rescaled_upload(noise):
    """Over all parts and the indicators, bounds over noise add up to 1 / noise_multiplier."""
    n_items = 4_000
    nobody = Uploads.nobody(4, 20_000, torch.zeros(1))
    found = release(nobody, noise_multiplier=noise, n_items=n_items, cohort=200)
    spreads = [float(part.std()) for part in parts_of(found.sums)]
    cost = sum((float(b) / s) ** 2 for b, s in zip(BOUNDS, spreads, strict=True))
    steps = torch.stack(
        [
            release(nobody, noise_multiplier=noise, n_items=1, cohort=200, t=t).bounds
            for t in range(3, 403)
        ]
    )
    # From the steps of the bounds back to the noise in the number of those that fit.
    logs = (steps / BOUNDS).log().flatten()
    plain = (moved_bounds(BOUNDS, torch.full((PARTS,), 0.5), 0.0, 9) / BOUNDS).log()[0]
    damping = float(logs.mean() / plain)
    fitting = 200 * float(logs.std()) / damping
    cost += (math.sqrt(PARTS) / 2.0 / fitting) ** 2
    assert cost == pytest.approx(1.0 / noise**2, rel=0.06)
    assert found.noise == pytest.approx(spreads[0], rel=0.05)


def test_local_noise_is_that_of_all_clients():
    nobody = Uploads.nobody(4, 20_000, torch.zeros(1))
    central, local = (
        release(
            nobody, name=name, noise_multiplier=1.0, n_items=4_000, clip_norm=2.0, n_clients=16
        ).sums
        for name in ("central", "local")
    )
    for one, other in zip(parts_of(central), parts_of(local), strict=True):
        assert float(one.std()) == pytest.approx(2.0, rel=0.05)
        assert float(other.std()) == pytest.approx(8.0, rel=0.05)


def test_a_fixed_length_is_that_of_the_whole_upload():
    sent = uploads(1, scale=10.0)
    sums = release(sent, clip_norm=0.7).sums
    length = torch.cat(parts_of(sums)).norm()
    assert float(length) == pytest.approx(0.7, rel=1e-5)
    free = release(sent, clip_norm=math.inf).sums
    even = replace(sent, row_weights=torch.ones(len(sent.rows)), weights=torch.ones(1))
    torch.testing.assert_close(free.rows, add_uploads(even, N_ITEMS).rows)


def test_noise_is_new_in_each_round_and_the_same_again():
    sent = uploads()
    once, again, later = (release(sent, noise_multiplier=1.0, t=t).sums for t in (0, 0, 1))
    assert torch.equal(once.rows, again.rows)
    assert not torch.equal(once.rows, later.rows)


def test_bounds_settle_where_three_in_ten_clients_fit():
    sent = uploads(400)
    bounds = torch.ones(PARTS, dtype=torch.float64)
    for t in range(60):
        bounds = release(sent, bounds=bounds, cohort=400, t=t, noise_multiplier=1.0).bounds
    part = torch.tensor([0, 0, 0, 1])
    fitting = (part_lengths(sent, part, PARTS) <= bounds).double().mean(0)
    assert fitting.tolist() == pytest.approx([0.3] * PARTS, abs=0.15)


def test_poisson_cohorts_are_binomial():
    rng = np.random.default_rng(0)
    drawn = [poisson_cohort(50, 10, rng) for _ in range(4_000)]
    sizes = np.array([len(cohort) for cohort in drawn])
    assert sizes.mean() == pytest.approx(10, abs=0.2)
    assert sizes.var() == pytest.approx(50 * 0.2 * 0.8, rel=0.08)
    often = np.bincount(np.concatenate(drawn), minlength=50)
    assert np.abs(often / 4_000 - 0.2).max() < 0.03
    # Two clients together as often as each for itself would have it.
    both = sum(0 in cohort and 1 in cohort for cohort in drawn)
    assert both == pytest.approx(160, abs=50)


# ------------------------------------------------------------- what it costs


def plan(relation, accountant, *, noise=1.0, rounds=100, spent=(), cohort=100):
    charge = Charge(relation, noise, cohort, 1_000, 0)
    return Plan(charge, tuple(range(1, rounds + 1)), tuple(spent), 1e-5, accountant)


@pytest.fixture
def library():
    return pytest.importorskip("dp_accounting")


@pytest.mark.parametrize(("accountant", "value"), [("rdp", 7.904), ("pld", 7.047)])
def test_epsilon_is_that_of_the_library(accountant, value, library):
    whole = replace(plan("poisson", accountant), turns=(1, 50, 100))
    first, half, last = whole.epsilons()
    assert 0 < first < half < last == pytest.approx(value, abs=1e-3)
    # Rounds of two fits count together.
    on = replace(whole, turns=(50,), spent=(replace(whole.charge, rounds=50),))
    assert on.epsilons()[-1] == pytest.approx(value, abs=1e-3)


def test_cohorts_of_fixed_size_have_twice_the_sensitivity(library):
    found = plan("fixed", "rdp", noise=4.0, rounds=30)
    accountant = library.rdp.RdpAccountant(
        neighboring_relation=library.NeighboringRelation.REPLACE_ONE
    )
    event = library.SampledWithoutReplacementDpEvent(1_000, 100, library.GaussianDpEvent(2.0))
    accountant.compose(event, 30)
    assert found.epsilons()[-1] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
    with pytest.raises(ValueError, match=r'does not know cohorts of fixed size.*"poisson"'):
        plan("fixed", "pld").epsilons()


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_without_sampling_rounds_are_gaussian(accountant, library):
    epsilons = plan("every", accountant, noise=4.0, rounds=9).epsilons()
    # Nine releases with noise 4, for sensitivity 2, are one with noise 2/3.
    exact = library.get_epsilon_gaussian(2.0 / 3.0, 1e-5)
    slack = 1e-6 if accountant == "pld" else 0.1
    assert exact - 1e-6 <= epsilons[-1] <= exact * (1 + slack)


def test_a_target_stops_rounds_or_sets_the_noise(library):
    whole = plan("poisson", "rdp")
    rounds = whole.affordable(5.0)
    assert whole.epsilons()[rounds - 1] <= 5.0 < whole.epsilons()[rounds]
    noise = fitting_noise(whole, 5.0)
    assert whole.with_noise(noise).epsilons()[-1] <= 5.0
    assert whole.with_noise(0.998 * noise).epsilons()[-1] > 5.0
    with pytest.raises(ValueError, match="No noise is enough"):
        fitting_noise(plan("poisson", "rdp", spent=whole.after(100)), 5.0)


def test_no_noise_promises_nothing():
    assert plan("poisson", "pld", noise=0.0, rounds=2).epsilons() == [math.inf] * 2


@pytest.mark.parametrize("relation", ["poisson", "every"])
def test_hardly_any_noise_and_hardly_any_cost_are_counted(relation, library):
    assert plan(relation, "pld", noise=1e-4, rounds=2).epsilons()[0] > 1e6
    for accountant in ("pld", "rdp"):
        few = plan(relation, accountant, rounds=3)
        assert few.with_noise(fitting_noise(few, 1e-9)).epsilons()[-1] <= 1e-9


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("relation", ["poisson", "every", "fixed"])
def test_noise_comes_too_late_after_rounds_without(relation, accountant):
    spent = plan(relation, accountant, noise=0.0, rounds=1).after(1)
    late = plan(relation, accountant, spent=spent, rounds=2)
    assert late.epsilons() == [math.inf] * 2
    with pytest.raises(ValueError, match="No noise is enough"):
        fitting_noise(late, 5.0)


def test_two_kinds_of_neighbours_are_not_added_up():
    with pytest.raises(ValueError, match="sampled in another way"):
        plan("every", "rdp", spent=plan("poisson", "rdp").after(3))


def test_turns_are_those_of_the_busiest_client():
    cohorts = [np.array([0, 1]), np.array([], dtype=int), np.array([2, 0]), np.array([0])]
    assert turns_so_far(iter(cohorts), 3) == (1, 1, 2, 3)


def test_a_missing_library_is_named(monkeypatch):
    def fails(name):
        raise ImportError(name)

    monkeypatch.setattr(accounting.importlib, "import_module", fails)
    with pytest.raises(ImportError, match=r'pip install "fedrecsk\[privacy\]"'):
        plan("poisson", "rdp", noise=1.234).epsilons()
