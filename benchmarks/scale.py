"""What a million clients cost: time and memory by clients, items, cohort and length of vectors.

FedFNN on generated interactions in random order: activity and popularity follow power laws, 14
rows a user on average, fewer where few items repeat; every user is a client. One of the four
numbers is varied at a time, the others stay at those of the base, and one large point has a
million clients and 100,000 items.

Every point runs in a process of its own, on one thread, so that its peak memory is its own. The
peak includes the imports (0.3 GiB) and the generated array. Seconds are the processor's: reading,
coding and sharding; the median over the rounds; the users' refit; ranking all items for some
users, 10 each. With sampled negatives nothing is refitted. Of several runs (--seeds) a time is the
lowest.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from _common import Goal, format_table, one_thread, parse_arguments, say, write_json
from numpy.typing import NDArray

from fedrecsk import FedFNNRecommender
from fedrecsk.engine.rounds import run_rounds
from fedrecsk.estimators import _factors, _fedfnn_simulation

SCRIPT = "scale"
VARIED = ("clients", "items", "cohort", "d")
NAMES = {
    "clients": "clients",
    "items": "items",
    "cohort": "clients in a round",
    "d": "factors",
}
# Rows of a user: one, and these on average by a power law, less what repeats.
MEAN_ROWS, TAIL, MOST_ROWS = 17, 1.5, 500
GOAL_GIB, GOAL_POPULATION, GOAL_COHORT = 8.0, 1.3, 1.2
HEADER = [
    "",
    "rows",
    "rows of a round",
    "s, reading",
    "s, a round",
    "s, refit",
    "users/s, ranking",
    "peak GiB",
    "MB up, a round",
    "MB down, a round",
]
# Of these, in docs/scale.md.
SUMMARY = ("rows of a round", "s, reading", "s, a round", "s, refit", "peak GiB")

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """What is measured at a time.

    Parameters
    ----------
    objective : {"whole-data", "bce"}
    clients, items, cohort, d : int
    rounds : int
    ranked : int
        Users whose items are ranked.
    """

    objective: str
    clients: int
    items: int
    cohort: int
    d: int
    rounds: int
    ranked: int


@dataclass(frozen=True)
class Plan:
    """The points: a base, the values of each number around it by objective, and a large one."""

    base: Point
    sweeps: Mapping[str, Mapping[str, Sequence[int]]]
    large: Point

    def points(self) -> list[Point]:
        """All of them, without repeats."""
        found = [
            replace(self.base, objective=objective, **{name: value})
            for objective, sweep in self.sweeps.items()
            for name in VARIED
            for value in sweep.get(name, ())
        ]
        return list(dict.fromkeys([*found, self.large]))


FULL = Plan(
    base=Point("whole-data", 100_000, 10_000, 1_000, 32, rounds=20, ranked=10_000),
    sweeps={
        "whole-data": {
            "clients": (10_000, 100_000, 1_000_000),
            "items": (1_000, 10_000, 100_000),
            "cohort": (100, 1_000, 10_000),
            "d": (8, 32, 128),
        },
        "bce": {"clients": (10_000, 100_000, 1_000_000), "cohort": (100, 1_000, 10_000)},
    },
    large=Point("whole-data", 1_000_000, 100_000, 1_000, 32, rounds=100, ranked=20_000),
)
QUICK = Plan(
    base=Point("whole-data", 1_000, 200, 50, 4, rounds=2, ranked=20),
    sweeps={"whole-data": {"clients": (500, 1_000)}},
    large=Point("whole-data", 2_000, 200, 50, 4, rounds=2, ranked=20),
)


# ----------------------------------------------------------------- one point


def generate(n_clients: int, n_items: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Make up interactions (n, 2) with power laws in users and items, in random order.

    Every item occurs where there are at least as many users.
    """
    rng = np.random.default_rng(seed)
    activity = np.ceil(rng.pareto(TAIL, n_clients) * MEAN_ROWS * (TAIL - 1))
    user = np.repeat(np.arange(n_clients), np.minimum(activity, MOST_ROWS).astype(np.int64))
    # The logarithm of an item's number is uniform: its share falls as one over the number.
    item = (n_items ** rng.random(len(user))).astype(np.int64) - 1
    everybody = np.arange(n_clients)
    key = np.concatenate([user * n_items + item, everybody * n_items + everybody % n_items])
    key.sort()
    key = key[np.diff(key, prepend=-1) > 0]
    rng.shuffle(key)
    return np.column_stack([key // n_items, key % n_items])


@dataclass
class Watch:
    """What `watched` writes down: rows and seconds of rounds, and when they began and ended."""

    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch the rounds of a fit, in seconds of the processor."""
    watch, draw = Watch(), _fedfnn_simulation.draw_delegates

    def noted(state: Any, shards: Any, *rest: Any) -> NDArray[np.int64]:
        delegates = draw(state, shards, *rest)
        watch.rows.append(int(shards.client_rows[delegates].sum()))
        return delegates

    def timed(step: Any, *args: Any, **named: Any) -> Any:
        def one(state: Any, t: int) -> Any:
            start = time.process_time()
            result = step(state, t)
            watch.seconds.append(time.process_time() - start)
            return result

        watch.began = time.process_time()
        result = run_rounds(one, *args, **named)
        watch.ended = time.process_time()
        return result

    with (
        patch.object(_fedfnn_simulation, "draw_delegates", noted),
        patch.object(_factors, "run_rounds", timed),
    ):
        yield watch


def measure(point: Point) -> Row:
    """Fit and rank in this process."""
    X = generate(point.clients, point.items)
    refit = point.objective == "whole-data"
    model = FedFNNRecommender(
        point.d, objective=point.objective, n_rounds=point.rounds, clients_per_round=point.cohort,
        refit=refit, predictor=None, device="cpu", random_state=0,
    )  # fmt: skip
    start = time.process_time()
    with watched() as watch:
        model.fit(X)
    fitted = time.process_time()
    some = model.user_ids_[:: max(1, point.clients // point.ranked)][: point.ranked]
    model.recommend(some)
    last = model.history_[-1]
    return {
        **asdict(point),
        "rows": len(X),
        "round_rows": statistics.fmean(watch.rows),
        "reading": watch.began - start,
        "round": statistics.median(watch.seconds),
        "rounds_together": watch.ended - watch.began,
        "refit": fitted - watch.ended if refit else None,
        "ranking": (time.process_time() - fitted) / len(some),
        "peak_gib": peak_gib(),
        "bytes_up": statistics.fmean(record["bytes_up"] for record in model.history_),
        "bytes_down": last["bytes_down"],
    }


def peak_gib() -> float:
    """Peak memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1_024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---------------------------------------------------------------- all points


def measure_apart(point: Point) -> Row:
    """Measure in a process of its own."""
    words = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    row: Row = json.loads(done.stdout)
    say(f"{point}: {row['round']:.3f} s a round, {row['peak_gib']:.2f} GiB")
    return row


def quietest(runs: Sequence[Row]) -> Row:
    """Of several runs of a point the lowest of each number; nothing but time and memory differs."""
    return {
        name: value if isinstance(value, str | None) else min(run[name] for run in runs)
        for name, value in runs[0].items()
    }


def along(rows: Sequence[Row], plan: Plan, objective: str, name: str) -> list[Row]:
    """Rows that differ from the base in `name` alone, ascending."""
    wanted = [
        asdict(replace(plan.base, objective=objective, **{name: value}))
        for value in plan.sweeps[objective].get(name, ())
    ]
    return [row for want in wanted for row in rows if want.items() <= row.items()]


def goals_of(rows: Sequence[Row], plan: Plan) -> list[Goal]:
    """Compare the ends of the sweeps, and the large point's memory with the bound."""
    goals = []
    for objective in plan.sweeps:
        clients = along(rows, plan, objective, "clients")
        if len(clients) > 1:
            few, many = clients[0], clients[-1]
            what = f"{objective}: seconds of a round, {many['clients']:,} / {few['clients']:,}"
            ratio = many["round"] / few["round"]
            goals.append(Goal(f"{what} clients", ratio, GOAL_POPULATION, at_least=False))
        cohort = along(rows, plan, objective, "cohort")
        if len(cohort) > 1:
            few, many = cohort[-2:]
            what = f"{objective}: seconds per row, {many['cohort']:,} / {few['cohort']:,}"
            ratio = many["round"] / many["round_rows"] / (few["round"] / few["round_rows"])
            goals.append(Goal(f"{what} in a round", ratio, GOAL_COHORT, at_least=False))
    large = next(row for row in rows if asdict(plan.large).items() <= row.items())
    what = f"peak GiB, {large['clients']:,} clients, {large['items']:,} items"
    what += f", {large['rounds']} rounds of {large['cohort']:,}"
    return [*goals, Goal(what, large["peak_gib"], GOAL_GIB, at_least=False)]


# ------------------------------------------------------------------ reporting


def tables_of(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Headings and cells, under `HEADER`: the large point, then a table an objective."""
    rows, plan = report["points"], as_plan(report["plan"])
    large = plan.large
    cells = [line("", row) for row in rows if asdict(large).items() <= row.items()]
    heading = (
        f"{large.clients:,} clients, {large.items:,} items, {large.rounds} rounds of "
        f"{large.cohort:,}, d = {large.d}; {large.ranked:,} users ranked"
    )
    tables = [(heading, cells)]
    base = plan.base
    for objective in plan.sweeps:
        cells = [
            line(f"{row[name]:,} {NAMES[name]}", row)
            for name in VARIED
            for row in along(rows, plan, objective, name)
        ]
        heading = (
            f"{objective}; base: {base.clients:,} clients, {base.items:,} items, "
            f"{base.cohort:,} clients in a round, {base.d} factors"
        )
        tables.append((heading, cells))
    return tables


def summary(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the large point and of the sweeps over clients and over cohorts."""
    rows, plan = report["points"], as_plan(report["plan"])
    chosen = [row for row in rows if asdict(plan.large).items() <= row.items()]
    for objective in plan.sweeps:
        for name in ("clients", "cohort"):
            chosen += along(rows, plan, objective, name)
    shown = [HEADER.index(name) for name in SUMMARY]
    cells = [
        [
            row["objective"],
            *(f"{row[name]:,}" for name in ("clients", "items", "cohort")),
            *(line("", row)[place] for place in shown),
        ]
        # The base is in both sweeps.
        for row in {json.dumps(row): row for row in chosen}.values()
    ]
    return ["", "clients", "items", "clients in a round", *SUMMARY], cells


def line(name: str, row: Row) -> list[str]:
    """Lay out a row under `HEADER`."""
    refit = "" if row["refit"] is None else f"{row['refit']:.1f}"
    return [
        name or row["objective"],
        f"{row['rows']:,}",
        f"{row['round_rows']:,.0f}",
        f"{row['reading']:.1f}",
        f"{row['round']:.3f}",
        refit,
        f"{1 / row['ranking']:,.0f}",
        f"{row['peak_gib']:.2f}",
        f"{row['bytes_up'] / 1e6:.1f}",
        f"{row['bytes_down'] / 1e6:,.0f}",
    ]


def as_plan(written: Mapping[str, Any]) -> Plan:
    """Read a plan as the JSON has it."""
    return Plan(Point(**written["base"]), written["sweeps"], Point(**written["large"]))


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw seconds of a round and peak memory against each of the numbers."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows, plan = report["points"], as_plan(report["plan"])
    quantities = {"round": "seconds of a round", "peak_gib": "peak memory, GiB"}
    figure, axes = plt.subplots(
        2, len(VARIED), figsize=(11.5, 5), sharex="col", sharey="row", layout="constrained"
    )
    for line_of_axes, (quantity, label) in zip(axes, quantities.items(), strict=True):
        for ax, name in zip(line_of_axes, VARIED, strict=True):
            for objective in plan.sweeps:
                sweep = along(rows, plan, objective, name)
                if sweep:
                    x, y = ([row[key] for row in sweep] for key in (name, quantity))
                    ax.plot(x, y, marker="o", label=objective)
            ax.set(xscale="log", yscale="log")
            ax.grid(alpha=0.3)
        line_of_axes[0].set_ylabel(label)
        y_axis = line_of_axes[0].yaxis  # which the panels of a line share
        y_axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        y_axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        y_axis.set_minor_formatter(NullFormatter())
    for ax, name in zip(axes[1], VARIED, strict=True):
        ax.set_xlabel(NAMES[name])
    axes[0, 0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments of all scripts and our own."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--figure", type=Path, metavar="FILE")
    own.add_argument("--point", type=json.loads)  # from this script to itself
    known, rest = own.parse_known_args(argv)
    further = "Further options: --figure FILE, a PNG."
    arguments = parse_arguments(f"{__doc__} {further}", SCRIPT, seeds=1, argv=rest)
    if arguments.data:
        raise SystemExit("scale.py makes its data up, so that it knows their sizes; drop --data.")
    vars(arguments).update(figure=known.figure, point=known.point)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.point is not None:
        with one_thread():
            print(json.dumps(measure(Point(**arguments.point))))
        return 0
    plan, seeds = (QUICK, 1) if arguments.quick else (FULL, arguments.seeds)
    points = plan.points()
    # In turns, so that a busy hour of the machine does not hit one point alone.
    runs = [[measure_apart(point) for point in points] for _ in range(seeds)]
    rows = [quietest(of_point) for of_point in zip(*runs, strict=True)]
    report = {"repeats": seeds, "threads": 1, "plan": asdict(plan), "points": rows}
    goals = goals_of(rows, plan)
    write_json(arguments, SCRIPT, report, [] if arguments.quick else goals)
    for heading, cells in tables_of(report):
        print(f"\n{heading}\n{format_table(HEADER, cells)}")
    if arguments.figure is not None:
        draw(report, arguments.figure)
    print("goals: none with --quick" if arguments.quick else "\n".join(map(str, goals)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
