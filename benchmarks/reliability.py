"""What the package takes: ten million rows in bounded memory, and input of any kind.

Rows: generated interactions of users and items with power laws, in random order, once as an array
of integers and once as a DataFrame of text ids. They are coded, and one round of FedFNN is fitted
with every user as a client, and every client in the round. Each kind runs in a process of its own,
on one thread; its peak memory includes the imports (0.3 GiB) and the rows as the caller holds them.
Seconds are the processor's.

Input: the tests in tests/properties, with many more examples than in CI. A case is a call with
drawn arguments; it ends in a result of the documented shape, which the test checks, or is refused
with a documented error that the package raised on purpose. A fault is a damage to a file: a flipped
bit, a cut, a line or a member that does not belong there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import Goal, format_table, one_thread, parse_arguments, say, write_json
from scale import generate, peak_gib

from fedrecsk import FedFNNRecommender
from fedrecsk.data import encode

SCRIPT = "reliability"
ROOT = Path(__file__).parents[1]
# Text is held twice: as the Python strings that are read, and as the array of all of them.
GOAL_GIB = {"integers": 2.0, "text": 4.0}
GOAL_CASES = 10_000
COUNTS = ("cases", "accepted", "refused", "faults", "undocumented")
ROWS_HEADER = ["", "rows", "users", "items", "s, coding", "s, fit of a round", "peak GiB"]
CASES_HEADER = ["", "cases", "accepted", "refused", "faults injected", "undocumented errors"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """What is measured at a time.

    Parameters
    ----------
    kind : {"integers", "text"}
        Of the ids; text comes in a DataFrame.
    rows, clients, items : int
        At most so many rows; clients and items as they are generated.
    """

    kind: str
    rows: int
    clients: int
    items: int


@dataclass(frozen=True)
class Plan:
    """The points, and how many times the examples of CI are drawn."""

    points: tuple[Point, ...]
    multiple: float


def plan_of(rows: int, clients: int, items: int, multiple: float) -> Plan:
    """Measure both kinds of ids at one size."""
    points = tuple(Point(kind, rows, clients, items) for kind in GOAL_GIB)
    return Plan(points, multiple)


FULL = plan_of(10_000_000, 800_000, 50_000, 12.0)
QUICK = plan_of(10_000, 1_000, 200, 0.05)


# ---------------------------------------------------------------- many rows


def rows_of(point: Point) -> Any:
    """Make up the rows, as an array or a DataFrame."""
    X = generate(point.clients, point.items)[: point.rows]
    if point.kind == "integers":
        return X
    import pandas as pd

    return pd.DataFrame(
        {
            name: np.array([f"{letter}{code:06d}" for code in range(X[:, place].max() + 1)])[
                X[:, place]
            ]
            for place, (name, letter) in enumerate({"user_id": "u", "item_id": "i"}.items())
        }
    )


def measure(point: Point) -> Row:
    """Code and fit in this process."""
    X = rows_of(point)
    start = time.process_time()
    data = encode(X)
    coded = time.process_time()
    sizes = {"found_rows": len(data), "users": data.n_users, "found_items": data.n_items}
    del data
    began = time.process_time()
    model = FedFNNRecommender(n_rounds=1, clients_per_round=1.0, device="cpu", random_state=0)
    model.fit(X)
    fitted = time.process_time()
    if not (np.isfinite(model.item_factors_).all() and np.isfinite(model.user_factors_).all()):
        raise FloatingPointError("The fit is not finite.")
    return {
        **asdict(point),
        **sizes,
        "coding": coded - start,
        "fit": fitted - began,
        "peak_gib": peak_gib(),
    }


def measure_apart(point: Point) -> Row:
    """Measure in a process of its own."""
    words = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    row: Row = json.loads(done.stdout)
    say(f"{point}: {row['fit']:.1f} s, {row['peak_gib']:.2f} GiB")
    return row


# ------------------------------------------------------------ many examples


def draw(multiple: float) -> dict[str, Any]:
    """Run the property tests with so many times the examples; count what they tried."""
    with tempfile.TemporaryDirectory() as folder:
        tally, report = Path(folder, "tally.json"), Path(folder, "report.xml")
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*words, f"--junitxml={report}", "tests/properties"],
            cwd=ROOT,
            env=os.environ
            | {"FEDRECSK_EXAMPLES": str(multiple), "FEDRECSK_TALLY": str(tally)}
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not tally.exists():
            raise SystemExit(f"The tests did not run:\n{done.stdout}\n{done.stderr}")
        if done.returncode:
            say(done.stdout)
        suite = ET.parse(report).getroot().find("testsuite")
        assert suite is not None  # pytest writes one
        return {
            "multiple": multiple,
            "tests": int(suite.attrib["tests"]),
            "failed": int(suite.attrib["failures"]) + int(suite.attrib["errors"]),
            "areas": areas_of(json.loads(tally.read_text())),
        }


def areas_of(tally: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Sort counts such as ``"metrics / cases"`` by area; what was never counted is 0."""
    areas = sorted({key.split(" / ")[0] for key in tally})
    return {area: {kind: tally.get(f"{area} / {kind}", 0) for kind in COUNTS} for area in areas}


# ------------------------------------------------------------------ reporting


def total(report: Mapping[str, Any], kind: str) -> int:
    """Add up a count over the areas."""
    return sum(counts[kind] for counts in report["drawn"]["areas"].values())


def goals_of(report: Mapping[str, Any]) -> list[Goal]:
    """Ask for bounded memory, and for nothing but what is documented."""
    drawn = report["drawn"]
    return [
        *(
            Goal(
                f"peak GiB, {row['rows']:,} rows, {row['kind']}",
                row["peak_gib"],
                GOAL_GIB[row["kind"]],
                at_least=False,
            )
            for row in report["points"]
        ),
        Goal("undocumented errors", total(report, "undocumented"), 0.0, at_least=False),
        Goal(f"of {drawn['tests']} properties did not hold", drawn["failed"], 0.0, at_least=False),
        Goal("cases", total(report, "cases"), GOAL_CASES),
    ]


def rows_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Cells under `ROWS_HEADER`."""
    return [
        [
            f"{row['kind']}, {'array' if row['kind'] == 'integers' else 'DataFrame'}",
            f"{row['found_rows']:,}",
            f"{row['users']:,}",
            f"{row['found_items']:,}",
            f"{row['coding']:.1f}",
            f"{row['fit']:.1f}",
            f"{row['peak_gib']:.2f}",
        ]
        for row in report["points"]
    ]


def cases_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Cells under `CASES_HEADER`, and a line of sums."""
    together = {kind: total(report, kind) for kind in COUNTS}
    lines = {**report["drawn"]["areas"], "together": together}
    return [[area, *(f"{counts[kind]:,}" for kind in COUNTS)] for area, counts in lines.items()]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments of all scripts and our own."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--point", type=json.loads)  # from this script to itself
    known, rest = own.parse_known_args(argv)
    arguments = parse_arguments(__doc__, SCRIPT, seeds=1, argv=rest)
    if arguments.data:
        raise SystemExit("reliability.py makes its data up; drop --data.")
    vars(arguments).update(point=known.point)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.point is not None:
        with one_thread():
            print(json.dumps(measure(Point(**arguments.point))))
        return 0
    plan = QUICK if arguments.quick else FULL
    report = {
        "threads": 1,
        "points": [measure_apart(point) for point in plan.points],
        "drawn": draw(plan.multiple),
    }
    goals = goals_of(report)
    write_json(arguments, SCRIPT, report, [] if arguments.quick else goals)
    print(format_table(ROWS_HEADER, rows_table(report)))
    print(f"\n{format_table(CASES_HEADER, cases_table(report))}")
    print("goals: none with --quick" if arguments.quick else "\n".join(map(str, goals)))
    return int(report["drawn"]["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
