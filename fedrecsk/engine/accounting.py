"""How much privacy the rounds of a fit have cost, counted by `dp-accounting`.

A round releases sums with Gaussian noise. What that costs does not depend on the data, so all of
it is known before the fit starts: a `Plan` says what its rounds will cost, and a list of `Charge`
what has been spent by earlier fits. Three kinds of rounds are told apart:

- ``"poisson"``: every client takes part with the same probability. Neighbouring federations differ
  by one client that is there or not. Sampling is accounted for.
- ``"fixed"``: a cohort of fixed size, drawn anew. Neighbours differ in one client's data, and
  clipped uploads then by up to twice the bound. Sampling is accounted for.
- ``"every"``: nothing is gained by sampling, because the server knows who takes part, or clients
  take turns. A client is charged for each round in which it takes part, and a fit for as many as
  the client that takes part most often. Neighbours as for ``"fixed"``.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

AccountantName = Literal["pld", "rdp"]
Relation = Literal["poisson", "fixed", "every"]

# Grid of privacy losses. Epsilon is rounded up on it, by less than 0.001 for the usual noise.
PLD_GRID = 1e-3
# Relative width of the interval in which a fitting noise is looked for.
NOISE_TOLERANCE = 1e-3
MOST_NOISE = 1e6
# Much noise costs what cannot be told from zero, which has no logarithm.
LEAST_EPSILON = 1e-300


@dataclass(frozen=True)
class Charge:
    """Rounds of one kind.

    Attributes
    ----------
    relation : {"poisson", "fixed", "every"}
    noise_multiplier : float
        Standard deviation of the noise over the bound that an upload is clipped to.
    cohort : int
        Clients in a round, the expected number with ``"poisson"``.
    clients : int
        Of the federation.
    rounds : int
        In which a client can have been heard.
    """

    relation: Relation
    noise_multiplier: float
    cohort: int
    clients: int
    rounds: int

    @property
    def rate(self) -> float:
        """Share of the clients that take part in a round."""
        return self.cohort / self.clients

    @property
    def effective_noise(self) -> float:
        """Noise over the largest change that one client makes to a sum."""
        if self.relation == "poisson":
            return self.noise_multiplier
        # One clipped upload takes the place of another: they may point in opposite directions.
        return self.noise_multiplier / 2.0


@dataclass(frozen=True)
class Plan:
    """What the rounds of a fit will cost.

    Attributes
    ----------
    charge : Charge
        ``rounds`` is not read.
    turns : tuple of int
        Round by round, how often the client that takes part most often has done so by then;
        without ``"every"`` the number of the round.
    spent : tuple of Charge
        By earlier fits.
    delta : float
    accountant : {"pld", "rdp"}
    """

    charge: Charge
    turns: tuple[int, ...]
    spent: tuple[Charge, ...]
    delta: float
    accountant: AccountantName

    def __post_init__(self) -> None:
        relations = {charge.relation for charge in (*self.spent, self.charge)}
        if "poisson" in relations and len(relations) > 1:
            raise ValueError(
                "The fit to go on from was sampled in another way, and the two cannot be added up: "
                "neighbouring federations are not the same. Keep sampling and privacy, or fit "
                "anew with warm_start=False."
            )

    def epsilons(self) -> list[float]:
        """Give epsilon after each round, all that was spent before included."""
        if any(charge.noise_multiplier == 0 for charge in (*self.spent, self.charge)):
            return [math.inf] * len(self.turns)
        try:
            return list(_epsilons(self))
        except OverflowError:  # with hardly any noise, losses are beyond what a float holds
            return [math.inf] * len(self.turns)

    def affordable(self, target: float) -> int:
        """Count the rounds after which epsilon is at most `target`."""
        return sum(epsilon <= target for epsilon in self.epsilons())

    def after(self, rounds: int) -> tuple[Charge, ...]:
        """Give all that is spent when so many rounds are over."""
        turns = self.turns[rounds - 1] if rounds else 0
        return (*self.spent, replace(self.charge, rounds=turns))

    def with_noise(self, noise_multiplier: float) -> Plan:
        """Return the same with other noise."""
        return replace(self, charge=replace(self.charge, noise_multiplier=noise_multiplier))


def fitting_noise(plan: Plan, target: float) -> float:
    """Find the smallest noise multiplier with which a whole plan costs no more than `target`.

    Parameters
    ----------
    plan : Plan
        Its own noise is not read.
    target : float
        Epsilon.

    Returns
    -------
    float
        At most 0.1% too large.

    Raises
    ------
    ValueError
        If no noise is enough, as a rule because earlier fits have spent it all.
    """
    return _fitting_noise(plan.with_noise(1.0), target)


@lru_cache(maxsize=32)
def _fitting_noise(plan: Plan, target: float) -> float:
    """See `fitting_noise`; the search takes seconds."""
    last = replace(plan, turns=plan.turns[-1:])

    def excess(log_noise: float) -> float:  # nearly a straight line, which few looks will find
        epsilon = last.with_noise(math.exp(log_noise)).epsilons()[0]
        return math.log(max(epsilon, LEAST_EPSILON) / target)

    high = 0.0
    while excess(high) > 0:
        high += math.log(4.0)
        if high > math.log(MOST_NOISE):
            why, remedy = f"{math.exp(high):.0g} times the bound is too little", ""
            if plan.spent:
                why = "rounds before have spent it"
                remedy = ", or fit anew with warm_start=False"
            raise ValueError(
                f"No noise is enough for target_epsilon={target}: {why}. "
                f"Raise target_epsilon{remedy}."
            )
    low = high - math.log(4.0)
    while excess(low) <= 0:
        low -= math.log(4.0)
    found = float(brentq(excess, low, high, xtol=NOISE_TOLERANCE / 4.0))
    while excess(found) > 0:
        found += NOISE_TOLERANCE / 4.0
    return math.exp(found)


@lru_cache(maxsize=64)
def _epsilons(plan: Plan) -> tuple[float, ...]:
    """See `Plan.epsilons`; many fits have the same rounds."""
    every = all(charge.relation == "every" for charge in (*plan.spent, plan.charge))
    fixed = any(charge.relation == "fixed" for charge in (*plan.spent, plan.charge))
    if plan.accountant == "rdp":
        count = _by_rdp(plan)
    elif fixed:
        raise ValueError(
            'accountant="pld" does not know cohorts of fixed size, sampling="uniform". Use '
            'accountant="rdp", or sampling="poisson".'
        )
    elif every:
        count = _by_gauss(plan)
    else:
        count = _by_pld(plan)
    with _silence():
        found: dict[int, float] = {}
        for turns in plan.turns:  # ascending
            if turns not in found:
                found[turns] = count(turns)
    return tuple(found[turns] for turns in plan.turns)


def _by_rdp(plan: Plan) -> Callable[[int], float]:
    """Add up Rényi divergences."""
    rdp = _library().rdp
    with _silence():
        start = np.asarray(0.0)
        for charge in plan.spent:
            start = start + charge.rounds * _divergences(replace(charge, rounds=1))
        once = _divergences(replace(plan.charge, rounds=1))
    orders = rdp.RdpAccountant().orders

    def count(turns: int) -> float:
        total = start + turns * once
        epsilon, _ = rdp.compute_epsilon(orders, total + np.zeros(len(orders)), plan.delta)
        return float(epsilon)

    return count


@lru_cache(maxsize=64)
def _divergences(charge: Charge) -> Any:
    """Rényi divergences of one round, by order."""
    library = _library()
    relations = library.NeighboringRelation
    event = library.GaussianDpEvent(charge.effective_noise)
    relation = relations.ADD_OR_REMOVE_ONE
    if charge.relation == "poisson":
        event = library.PoissonSampledDpEvent(charge.rate, event)
    elif charge.relation == "fixed":
        relation = relations.REPLACE_ONE
        event = library.SampledWithoutReplacementDpEvent(charge.clients, charge.cohort, event)
    accountant = library.rdp.RdpAccountant(neighboring_relation=relation)
    return accountant.compose(event).rdp


def _by_gauss(plan: Plan) -> Callable[[int], float]:
    """Add up Gaussian releases, which together are one."""
    get_epsilon = _library().get_epsilon_gaussian
    start = sum(charge.rounds / charge.effective_noise**2 for charge in plan.spent)

    def count(turns: int) -> float:
        total = start + turns / plan.charge.effective_noise**2
        return float(get_epsilon(total**-0.5, plan.delta)) if total else 0.0

    return count


def _by_pld(plan: Plan) -> Callable[[int], float]:
    """Convolve privacy loss distributions round by round."""
    # With little noise losses are large, and a fine grid of them would not fit into memory. Only
    # distributions on the same grid can be put together.
    noise = min(charge.effective_noise for charge in (*plan.spent, plan.charge))
    grid = PLD_GRID * max(1.0, 0.25 / noise**2)
    now = _losses(plan.charge, grid)
    total, done = None, 0
    for charge in plan.spent:
        if charge.rounds:
            part = _losses(charge, grid).self_compose(charge.rounds)
            total = part if total is None else total.compose(part)

    def count(turns: int) -> float:
        nonlocal total, done
        if turns > done:
            part = now if turns - done == 1 else now.self_compose(turns - done)
            total = part if total is None else total.compose(part)
            done = turns
        return 0.0 if total is None else float(total.get_epsilon_for_delta(plan.delta))

    return count


def _losses(charge: Charge, grid: float) -> Any:
    """Distribution of the privacy loss of one round."""
    _library()
    distributions = importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
    return distributions.from_gaussian_mechanism(
        charge.effective_noise, value_discretization_interval=grid, sampling_prob=charge.rate
    )


def _library() -> Any:
    """Import dp-accounting, which is an extra."""
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise ImportError(
            "privacy needs dp-accounting to count what it costs. Install it with: pip install "
            '"fedrecsk[privacy]"'
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the library from saying which orders, or losses too large to count, it leaves out."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with np.errstate(over="ignore", divide="ignore"):
            yield
    finally:
        log.setLevel(before)


def turns_so_far(cohorts: Iterable[NDArray[np.int64]], n_clients: int) -> tuple[int, ...]:
    """Count, round by round, how often the client has taken part that did so most often.

    Parameters
    ----------
    cohorts : iterable of ndarray
        Client codes of each round.
    n_clients : int

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.accounting import turns_so_far
    >>> turns_so_far([np.array([0, 1]), np.array([2]), np.array([1, 2])], 3)
    (1, 1, 2)
    """
    turns = np.zeros(n_clients, dtype=np.int64)
    most = []
    for cohort in cohorts:
        turns[cohort] += 1
        most.append(int(turns.max(initial=0)))
    return tuple(most)
