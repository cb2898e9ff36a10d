"""What the benchmark scripts share: arguments, data, timing, tables, goals and the JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import fedrecsk
from fedrecsk.datasets import load_interactions, make_interactions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, eq=False)
class Data:
    """One data set by a name that tells nothing of where it lies."""

    name: str
    X: NDArray[Any]
    clients: NDArray[Any] | None

    @property
    def sizes(self) -> dict[str, int]:
        """Rows, users and items."""
        users, items = (len(np.unique(self.X[:, column])) for column in (0, 1))
        return {"interactions": len(self.X), "users": users, "items": items}


def parse_arguments(
    description: str | None, script: str, *, seeds: int, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Read the arguments that all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        metavar="PATH",
        help="what fedrecsk.datasets.load_interactions reads; may be repeated; default: made-up "
        "data",
    )
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help="repetitions")
    parser.add_argument("--quick", action="store_true", help="a minute at most, to try the script")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{script}.json", metavar="FILE", help="JSON"
    )
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    return arguments


def load(paths: Sequence[Path] | None, *, quick: bool) -> list[Data]:
    """Read the data sets, or make one up.

    With `quick`, of each at most 20,000 rows remain, of whole users.
    """
    if not paths:
        made = make_interactions(600 if quick else 3_000, 400 if quick else 1_500, random_state=0)
        return [Data("made-up", made.data, made.target)]
    sets = []
    for path in paths:
        bunch = load_interactions(path)
        X, clients = bunch.data, bunch.target
        if quick:
            order = np.argsort(X[:, 0], kind="stable")
            last = X[order[min(20_000, len(X)) - 1], 0]
            kept = X[:, 0] <= last
            X, clients = X[kept], None if clients is None else clients[kept]
        sets.append(Data(path.stem, X, clients))
    return sets


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch, BLAS and OpenMP to one thread, so that seconds of libraries compare."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def paired_seconds(
    contenders: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Time the contenders in turn, again and again.

    Whatever else slows the machine down for a while then slows all of them.

    Returns
    -------
    dict of name to list of `repeats` seconds
        After one run each that does not count.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the runs of the ratio within a run."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over the seeds (0 for a single one)."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table of text, the first column to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@dataclass(frozen=True)
class Goal:
    """A number that is to be reached.

    Parameters
    ----------
    what : str
    value, target : float
    at_least : bool
        Whether the value is to be at least, or at most, the target.
    """

    what: str
    value: float
    target: float
    at_least: bool = True

    @property
    def held(self) -> bool:
        """Whether the number is reached; nan reaches nothing."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "held" if self.held else "not held"
        return f"goal: {self.what} = {self.value:.4g} (target {sign} {self.target:.4g}) {verdict}"

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into the JSON."""
        return {
            "what": self.what,
            "value": self.value,
            "target": self.target,
            "at_least": self.at_least,
            "held": self.held,
        }


def write_json(
    arguments: argparse.Namespace, script: str, results: Mapping[str, Any], goals: Sequence[Goal]
) -> None:
    """Write results with what one needs to judge and to repeat them."""
    report = {
        "script": f"benchmarks/{script}.py",
        "command": command(arguments, script),
        "quick": arguments.quick,
        "machine": machine(),
        **results,
        "goals": [goal.as_dict() for goal in goals],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def command(arguments: argparse.Namespace, script: str) -> str:
    """Rebuild the command line, with the names of data sets for their paths."""
    words = ["python", f"benchmarks/{script}.py"]
    for path in arguments.data or ():
        words += ["--data", path.name]
    words += ["--seeds", str(arguments.seeds)]
    return shlex.join(words + ["--quick"] * arguments.quick)


def machine() -> dict[str, Any]:
    """Describe processor and software, with the versions of what is compared with."""
    others = {
        name: metadata.version(name)
        for name in ("flwr", "implicit", "pfl")
        if importlib.util.find_spec(name) is not None
    }
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "fedrecsk": fedrecsk.__version__,
        **others,
    }


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def say(text: str) -> None:
    """Report on the way, apart from the table."""
    print(text, file=sys.stderr, flush=True)
