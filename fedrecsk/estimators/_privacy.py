"""What a fit promises about its clients, from an estimator's parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedrecsk.engine.accounting import (
    AccountantName,
    Charge,
    Plan,
    Relation,
    fitting_noise,
    turns_so_far,
)
from fedrecsk.engine.privacy import Privacy, PrivacyName
from fedrecsk.engine.sampling import poisson_cohort, uniform_cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import Attributes
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions
from fedrecsk.methods.factor_state import SamplingName

PRIVACY_CONSTRAINTS: Constraints = {
    "privacy": [StrOptions({"central", "local"}), None],
    "noise_multiplier": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
    # An infinite one clips nothing.
    "clip_norm": [Interval(Real, 0, None, closed="right"), StrOptions({"auto"})],
    "target_epsilon": [Interval(Real, 0, None, closed="neither"), None],
    "delta": [Interval(Real, 0, 1, closed="neither"), StrOptions({"auto"})],
    "accountant": [StrOptions({"auto", "pld", "rdp"})],
}
# Without privacy.
NOTHING_PROMISED: Attributes = {"epsilon_": math.inf, "delta_": None, "privacy_spent_": None}


@dataclass(frozen=True)
class Promise:
    """What a fit promises.

    Attributes
    ----------
    privacy : Privacy
        What makes it true.
    plan : Plan
        What it costs.
    epsilons : list of float
        After each round that the target allows.
    """

    privacy: Privacy
    plan: Plan
    epsilons: list[float]

    def fitted(self, n_rounds: int) -> Attributes:
        """Give the attributes after so many rounds."""
        return {
            "epsilon_": self.epsilons[n_rounds - 1],
            "delta_": self.plan.delta,
            "privacy_spent_": [asdict(charge) for charge in self.plan.after(n_rounds)],
        }


def promise(
    streams: Streams,
    *,
    privacy: PrivacyName,
    noise_multiplier: float | Literal["auto"],
    clip_norm: float | Literal["auto"],
    target_epsilon: float | None,
    delta: float | Literal["auto"],
    accountant: AccountantName | Literal["auto"],
    sampling: SamplingName,
    cohort: int,
    n_clients: int,
    n_rounds: int,
    previous: Attributes | None,
) -> Promise:
    """Settle noise and rounds before anything is released.

    Parameters
    ----------
    streams : Streams
        Of the fit; from them the cohorts will be drawn.
    privacy, ..., sampling
        As in `FedFNNRecommender`.
    cohort : int
        Clients in a round, with ``"poisson"`` on average.
    n_clients, n_rounds : int
    previous : dict or None
        Fitted attributes to go on from.

    Returns
    -------
    Promise

    Raises
    ------
    ValueError
        If the parameters promise nothing, or the target is missed by the first round.
    """
    if noise_multiplier == "auto" and target_epsilon is None:
        raise ValueError('noise_multiplier="auto" needs a target_epsilon to follow from.')
    if clip_norm == math.inf and noise_multiplier != 0:
        raise ValueError(
            "clip_norm=inf leaves uploads of any length, which no noise hides. Give a finite "
            'length, or "auto".'
        )
    relation, turns = _turns(privacy, sampling, cohort, n_clients, n_rounds, streams, previous)
    if accountant == "auto":
        accountant = "rdp" if relation == "fixed" else "pld"
    noise = 1.0 if noise_multiplier == "auto" else float(noise_multiplier)
    plan = Plan(
        Charge(relation, noise, cohort, n_clients, 0),
        turns,
        _spent(previous),
        min(1e-5, n_clients**-1.1) if delta == "auto" else float(delta),
        accountant,
    )
    if noise_multiplier == "auto" and target_epsilon is not None:
        plan = plan.with_noise(fitting_noise(plan, float(target_epsilon)))
    epsilons = plan.epsilons()
    if target_epsilon is not None:
        epsilons = epsilons[: plan.affordable(float(target_epsilon))]
        if not epsilons:
            raise ValueError(
                f"target_epsilon={target_epsilon} is less than the first round costs, "
                f"{plan.epsilons()[0]:.3g}. Raise it, raise noise_multiplier, or lower "
                "clients_per_round."
            )
    bound = None if clip_norm == "auto" else float(clip_norm)
    stage = Privacy(privacy, plan.charge.noise_multiplier, bound, cohort, streams)
    return Promise(stage, plan, epsilons)


def _turns(
    privacy: PrivacyName,
    sampling: SamplingName,
    cohort: int,
    n_clients: int,
    n_rounds: int,
    streams: Streams,
    previous: Attributes | None,
) -> tuple[Relation, tuple[int, ...]]:
    """Say how rounds are accounted for, and how many of them a client is heard in by each."""
    rounds = range(1, n_rounds + 1)
    if privacy == "central" and sampling == "poisson":
        return "poisson", tuple(rounds)
    if privacy == "central" and sampling == "uniform" and cohort < n_clients:
        return "fixed", tuple(rounds)
    if sampling == "epoch":  # nobody has a second turn before everybody has had one
        return "every", tuple(-(-number * cohort // n_clients) for number in rounds)
    first = 0 if previous is None else int(previous["n_rounds_"])
    draw = poisson_cohort if sampling == "poisson" else uniform_cohort

    def cohorts() -> Iterator[NDArray[np.int64]]:
        for t in range(first, first + n_rounds):
            yield draw(n_clients, cohort, streams.numpy("sampling", t))

    return "every", turns_so_far(cohorts(), n_clients)


def _spent(previous: Attributes | None) -> tuple[Charge, ...]:
    """Read what earlier fits have spent."""
    if previous is None:
        return ()
    spent = previous["privacy_spent_"]
    if spent is None:
        raise ValueError(
            "The fit to go on from had no privacy, and what it has learned cannot be hidden "
            "afterwards. Fit anew with privacy and warm_start=False."
        )
    return tuple(Charge(**charge) for charge in spent)


def check_private(
    *,
    defence: str | None,
    early_stopping: bool,
    sampling: SamplingName,
    predictor: str | None,
    objective: Literal["whole-data", "bce"],
    item_weighting: str,
    unreliable: bool,
    compression: str | None,
    secure_aggregation: bool,
) -> None:
    """Refuse what would look at clients past the noise, or is not accounted for.

    Parameters
    ----------
    defence, ..., secure_aggregation
        As in `FedFNNRecommender`; `predictor` is None where its predictions would not be read.
        `unreliable`: whether clients may be away, drop out or be late.

    Raises
    ------
    ValueError
        Says what, why, and what to do.
    """
    if defence is not None:
        raise ValueError(
            f'defence="{defence}" treats an upload by what others have sent, so one client could '
            "change the sums by more than the noise hides. Set defence=None: privacy clips as well."
        )
    if unreliable:
        raise ValueError(
            "privacy is accounted for clients that are drawn and deliver; who fails may be no "
            "matter of chance. Leave availability, dropout_rate, client_seconds, deadline and "
            "over_selection out."
        )
    if compression is not None or secure_aggregation:
        raise ValueError(
            "privacy adds its noise to whole sums of plain numbers. Set compression=None and "
            "secure_aggregation=False."
        )
    if early_stopping:
        raise ValueError(
            "early_stopping=True looks at held-out rows of clients without noise. Set it to False, "
            "and choose n_rounds or target_epsilon."
        )
    if sampling == "stratified":
        raise ValueError(
            'sampling="stratified" draws clients by their vectors, which tells of them. Use '
            '"poisson", "uniform" or "epoch".'
        )
    if predictor is not None:
        raise ValueError(
            f'predictor="{predictor}" needs the users\' vectors at the server, without noise. Set '
            "predictor=None, or refit=True with anchor=True, where nobody reads predictions."
        )
    if objective == "bce" and item_weighting != "fedavg":
        raise ValueError(
            f'item_weighting="{item_weighting}" divides by how many clients sent a row, which '
            'tells of single ones, or drowns in noise. Set item_weighting="fedavg".'
        )


def rounds_of(promised: Promise | None, n_rounds: int) -> int:
    """Count the rounds that a fit may make."""
    return n_rounds if promised is None else len(promised.epsilons)
