"""What it costs when clients are away, drop out, or are too slow.

Every user is a client; a random fifth of every user's items is held out (`PerUserHoldout`, another
draw for each seed), and the number is NDCG@20 over all users. FedAvg (binary cross-entropy) and
FedFNN have their defaults; nothing is tuned, and nothing is told of the faults to the method.

- Dropout: each client that was asked fails with the same chance; once, twice as many are asked.
- Availability goes by a clock of 24 rounds: each client is there for 8 of them, beginning at an
  hour of its own; or the half with more interactions by day and the other by night; or all in the
  same 8, so that in two rounds of three nobody can be asked.
- Speeds are log-normal, and slower the more interactions a client has (correlation of the
  logarithms 0.5), so that who is late is not random. The deadline is what 70% of the clients keep
  in a round of median luck: these are the fast ones, the others the slow ones. Against it, half as
  many clients more are asked, with the deadline or without, and 30% who drop out at random.

Waited is the mean over the rounds of the seconds that the server waits, in units of the deadline.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _common import (
    Data,
    Goal,
    format_table,
    load,
    mean_and_spread,
    one_thread,
    parse_arguments,
    say,
    write_json,
)
from numpy.typing import NDArray

from fedrecsk import FedAvgRecommender, FedFNNRecommender
from fedrecsk.metrics import evaluate
from fedrecsk.model_selection import PerUserHoldout

SCRIPT = "faults"
METHODS: dict[str, Callable[..., Any]] = {
    "FedAvg": FedAvgRecommender,
    "FedFNN": FedFNNRecommender,
}
# Passes over its rows that a client of each method makes in a round.
PASSES = {"FedAvg": 5, "FedFNN": 1}
HOURS, AWAKE = 24, 8
SPEED_SPREAD, SPEED_CORRELATION = 0.7, 0.5
IN_TIME = 0.7
ENOUGH = 0.95

Params = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Federation:
    """What is made up about the clients of a data set.

    Attributes
    ----------
    users : ndarray of shape (n_clients,)
        Sorted.
    rows : ndarray of shape (n_clients,)
        Training rows.
    seconds : ndarray of shape (n_clients,)
        For one row, so that the deadline of one pass is 1.
    hours : ndarray of shape (n_clients,)
        When each client's day begins.
    """

    users: NDArray[Any]
    rows: NDArray[np.int64]
    seconds: NDArray[np.float64]
    hours: NDArray[np.int64]

    @classmethod
    def of(cls, X: NDArray[Any], seed: int) -> Federation:
        """Make it up from training rows and a seed."""
        users, rows = np.unique(X[:, 0], return_counts=True)
        rng = np.random.default_rng(seed)
        size = np.log(rows)
        size = (size - size.mean()) / max(size.std(), 1e-12)
        other = rng.standard_normal(len(users))
        mixed = SPEED_CORRELATION * size + np.sqrt(1 - SPEED_CORRELATION**2) * other
        seconds = np.exp(SPEED_SPREAD * mixed)
        seconds /= np.quantile(seconds * rows, IN_TIME)
        return cls(users, rows, seconds, rng.integers(HOURS, size=len(users)))

    @property
    def groups(self) -> dict[Any, str]:
        """Which users are slow, and which are fast."""
        slow = self.seconds * self.rows > 1.0
        return dict(zip(self.users.tolist(), np.where(slow, "slow", "fast").tolist(), strict=True))


@dataclass(frozen=True)
class Clock:
    """An availability: from its hour on, each client is there for some rounds of a day."""

    hours: NDArray[np.int64]
    awake: int

    def __call__(self, number: int, client_ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Say who is there."""
        there: NDArray[np.bool_] = (number - self.hours) % HOURS < self.awake
        return there


def day_and_night(federation: Federation) -> Clock:
    """Let the half with more interactions be there by day, and the other by night."""
    active = np.argsort(np.argsort(federation.rows, kind="stable")) >= len(federation.rows) // 2
    return Clock(np.where(active, 0, HOURS // 2), HOURS // 2)


# Parameters of each case, by what is varied.
RELIABLE, RANDOM = "reliable", "30% drop out"
CASES: dict[str, Callable[[Federation], Params]] = {
    RELIABLE: lambda federation: {},
    "10% drop out": lambda federation: {"dropout_rate": 0.1},
    RANDOM: lambda federation: {"dropout_rate": 0.3},
    "50% drop out": lambda federation: {"dropout_rate": 0.5},
    "70% drop out": lambda federation: {"dropout_rate": 0.7},
    "50% drop out, twice as many asked": lambda federation: {
        "dropout_rate": 0.5,
        "over_selection": 1.0,
    },
    "8 hours each, round the clock": lambda federation: {
        "availability": Clock(federation.hours, AWAKE)
    },
    "the active by day, the others by night": lambda federation: {
        "availability": day_and_night(federation)
    },
    "the same 8 hours for all": lambda federation: {
        "availability": Clock(np.zeros_like(federation.hours), AWAKE)
    },
    "deadline": lambda federation: {"deadline": 1.0},
    "deadline, half as many more asked": lambda federation: {
        "deadline": 1.0,
        "over_selection": 0.5,
    },
    "no deadline, half as many more asked": lambda federation: {"over_selection": 0.5},
}
SPEEDS = (RELIABLE, RANDOM, *(name for name in CASES if "deadline" in name))


def measure(data: Data, method: str, n_seeds: int, **settings: Any) -> list[Params]:
    """Fit one method in every case, with every seed."""
    rows: dict[str, Params] = {}
    for seed in range(n_seeds):
        train, test = next(PerUserHoldout(random_state=seed).split(data.X))
        federation = Federation.of(data.X[train], seed)
        for case, parameters in CASES.items():
            say(f"{data.name}, {method}, seed {seed}: {case}")
            given = {"client_seconds": federation.seconds / PASSES[method]}
            model = METHODS[method](
                **{**settings, **given, **parameters(federation)}, random_state=seed
            )
            model.fit(data.X[train])
            row = rows.setdefault(case, {"method": method, "case": case})
            for name, value in judged(model, data.X[test], federation.groups).items():
                row.setdefault(name, []).append(value)
    return list(rows.values())


def judged(model: Any, held_out: NDArray[Any], groups: dict[Any, str]) -> dict[str, float]:
    """Return NDCG@20 of all, of the fast and of the slow, and means over the rounds."""
    found = evaluate(model, held_out, metrics=("ndcg",), k=20, groups=groups)
    counted = {
        name: statistics.fmean(record[name] for record in model.history_)
        for name in ("asked", "clients", "dropped", "late", "unavailable", "waited")
    }
    idle = statistics.fmean(record["loss"] is None for record in model.history_)
    apart = {name: values["ndcg@20"] for name, values in found.per_group.items()}
    return {"ndcg@20": found.overall["ndcg@20"], **apart, **counted, "idle": idle}


def goals_of(name: str, rows: Sequence[Params]) -> list[Goal]:
    """Ask that 30% dropout costs at most 5%."""
    goals = []
    for method in METHODS:
        means = {row["case"]: statistics.fmean(row["ndcg@20"]) for row in of_method(rows, method)}
        what = f"{name}, {method}: NDCG@20 with 30% dropout / without"
        goals.append(Goal(what, means[RANDOM] / means[RELIABLE], ENOUGH))
    return goals


def of_method(rows: Sequence[Params], method: str) -> list[Params]:
    return [row for row in rows if row["method"] == method]


# --------------------------------------------------------------------- report


def tables_of(rows: Sequence[Params]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Give a heading, header and rows for who takes part, and for who is late."""
    header = ["", *METHODS, "asked", "deliver", "rounds without anybody"]
    by_case = {row["case"]: row for row in of_method(rows, next(iter(METHODS)))}
    lines = []
    for case, row in by_case.items():
        if case in SPEEDS and case not in (RELIABLE, RANDOM):
            continue
        ndcg = [spread_out(each["ndcg@20"]) for each in rows if each["case"] == case]
        idle = f"{100 * statistics.fmean(row['idle']):.0f}%"
        lines.append([case, *ndcg, *mean_counts(row, ("asked", "clients")), idle])
    yield "who is there and delivers", header, lines
    header = ["", "all", "fast", "slow", "asked", "deliver", "late", "waited"]
    for method in METHODS:
        lines = []
        for row in of_method(rows, method):
            if row["case"] in SPEEDS:
                ndcg = [spread_out(row[name]) for name in ("ndcg@20", "fast", "slow")]
                counts = mean_counts(row, ("asked", "clients", "late"))
                waited = f"{statistics.fmean(row['waited']):.2f}"
                lines.append([row["case"], *ndcg, *counts, waited])
        yield f"{method}: who is in time", header, lines


def mean_counts(row: Params, names: Sequence[str]) -> list[str]:
    return [f"{statistics.fmean(row[name]):.0f}" for name in names]


def spread_out(values: Sequence[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.4f} ± {spread:.4f}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(__doc__, SCRIPT, seeds=3, argv=argv)
    settings = {"n_rounds": 26, "n_factors": 8} if arguments.quick else {}
    n_seeds = 1 if arguments.quick else arguments.seeds
    results: Params = {}
    goals: list[Goal] = []
    with one_thread():
        for data in load(arguments.data, quick=arguments.quick):
            rows = [row for name in METHODS for row in measure(data, name, n_seeds, **settings)]
            results[data.name] = {**data.sizes, "rows": rows}
            for heading, header, lines in tables_of(rows):
                print(f"\n{data.name}, {heading}, NDCG@20\n{format_table(header, lines)}")
            # What is learned in a few rounds on a part of the data says nothing.
            goals += [] if arguments.quick else goals_of(data.name, rows)
    write_json(arguments, SCRIPT, {"seeds": n_seeds, "data": results}, goals)
    for goal in goals:
        print(goal)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
