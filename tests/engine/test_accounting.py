import math
from dataclasses import replace

import numpy as np
import pytest

from fedrecsk.engine import accounting
from fedrecsk.engine.accounting import Charge, Plan, fitting_noise, turns_so_far


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


def test_a_target_that_nothing_reaches_is_not_blamed_on_rounds_before(monkeypatch):
    monkeypatch.setattr(Plan, "epsilons", lambda self: (9.0,))
    with pytest.raises(ValueError, match=r"2\.5: \S+ times the bound is too little.*epsilon\.$"):
        fitting_noise(plan("poisson", "rdp", rounds=7), 2.5)


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
