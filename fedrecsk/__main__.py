"""Compare methods from the command line: ``python -m fedrecsk``, or ``fedrecsk`` once installed."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

import fedrecsk
from fedrecsk import (
    CentralizedRecommender,
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
    PopularityRecommender,
)
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.datasets import load_interactions, make_interactions
from fedrecsk.metrics import evaluate
from fedrecsk.model_selection import PerUserHoldout
from fedrecsk.plotting import ClientBalanceDisplay, ConvergenceDisplay

# What --methods offers, in the order of the table. An option on the command line goes to those
# methods that have a parameter of that name.
METHODS: dict[str, type[Any]] = {
    "popularity": PopularityRecommender,
    "centralized": CentralizedRecommender,
    "fedavg": FedAvgRecommender,
    "fedfast": FedFastRecommender,
    "fedfnn": FedFNNRecommender,
    "hetefedrec": HeteFedRecRecommender,
    "fellrec": FELLRecRecommender,
}
# Methods that read texts of items, and how many rounds they get where --rounds says nothing: a
# language model takes minutes for its own number, the others seconds.
READERS = {"fellrec": 2}

# Size of the made-up data: all methods together take seconds.
N_USERS, N_ITEMS, N_CLUSTERS = 2_000, 1_000, 10
# The curve of a plot ranks at most this many users, at about this many rounds of a fit.
CURVE_USERS = 1_000
CURVE_POINTS = 20


@dataclass(frozen=True, eq=False)
class Split:
    """Interactions cut into rows to fit on and rows held out, both with their clients."""

    description: str
    train: NDArray[Any]
    train_clients: NDArray[Any] | None
    test: NDArray[Any]
    test_clients: NDArray[Any] | None
    item_text: dict[Any, str]
    counts: dict[str, int]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What one method did: the row of the table, and what the plot draws."""

    method: str
    estimator: Any
    ndcg: float
    recall: float
    seconds: float
    megabytes_up: float
    megabytes_down: float
    curve: list[tuple[int, float]]


class OneLine(io.TextIOBase):
    """A stream that shows the last line written to it, in one line of a terminal.

    Parameters
    ----------
    terminal : text file
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._width = 0

    def write(self, text: str) -> int:
        """Show text in place of what was there before."""
        for line in filter(None, text.splitlines()):
            # A line that wraps could not be rewritten.
            shown = line[: shutil.get_terminal_size().columns - 1]
            # Blanks wipe out the rest of a longer line before.
            self._terminal.write(f"\r{shown:<{self._width}}")
            self._width = len(shown)
        return len(text)

    def flush(self) -> None:
        """Show everything now."""
        self._terminal.flush()

    def end(self) -> None:
        """Leave the line as it is and go to the next."""
        if self._width:
            self._terminal.write("\n")
            self._width = 0


@contextmanager
def progress_on(stream: TextIO) -> Iterator[int]:
    """Send what estimators print to `stream`, which is stderr: stdout is for the table.

    Yields
    ------
    int
        The ``verbose`` that suits: every round where one line is rewritten, else about ten lines
        a fit.
    """
    if not stream.isatty():
        with redirect_stdout(stream):
            yield 1
        return
    line = OneLine(stream)
    try:
        with redirect_stdout(line):
            yield 2
    finally:
        line.end()


class HeldOutCurve:
    """A scikit-learn callback that scores held-out rows as the fit goes on.

    Losses of different methods do not compare, so the plot needs this. It costs a look at the
    fitted estimator every round.

    Parameters
    ----------
    held_out : interactions

    Attributes
    ----------
    points : list of (round, NDCG@20)
        About CURVE_POINTS of them, the first and the last round included.
    seconds : float
        Time of the fit that went into this and not into training.
    """

    def __init__(self, held_out: Any) -> None:
        self.held_out = held_out
        self.points: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._n_rounds = 1
        self._began = 0.0

    def setup(self, estimator: Any, context: Any) -> None:
        """Learn the number of rounds."""
        self._n_rounds = int(context.max_subtasks or 1)

    def teardown(self, estimator: Any, context: Any) -> None:
        """Nothing to clean up."""

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        """Note when a round begins."""
        self._began = time.perf_counter()

    def on_fit_task_end(
        self, estimator: Any, context: Any, *, fitted_estimator: Any = None
    ) -> None:
        """Score the estimator as it is after a round."""
        if context.task_name != "round":
            return
        record = fitted_estimator.history_[-1]
        done = record["round"]
        if done % -(-self._n_rounds // CURVE_POINTS) == 0 or done in (1, self._n_rounds):
            self.points.append((done, fitted_estimator.score(self.held_out)))
        self.seconds += time.perf_counter() - self._began - record["seconds"]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare methods on one data set and print a table.

    Parameters
    ----------
    argv : sequence of str, default=None
        Arguments without the program's name. None: those of the process.

    Returns
    -------
    int
        Exit status: 0, or 2 if the data or the arguments are at fault.
    """
    arguments = _parser().parse_args(argv)
    try:
        _check_outputs(arguments)
        split = _split(arguments)
        print(split.description, flush=True)
        results = [_run(method, split, arguments) for method in _methods(arguments.methods, split)]
        print(f"\n{_table(results)}")
        if arguments.json is not None:
            report = _report(results, split, arguments)
            arguments.json.write_text(json.dumps(report, indent=2, default=_plain) + "\n")
        if arguments.plot is not None:
            _plot(results, split, arguments.plot)
    # What goes wrong with the caller's data raises one of these, with a message made for them.
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        print(f"fedrecsk: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedrecsk",
        description="Compare federated recommenders: fit each on a part of every user's "
        "interactions and rank the items that were held out.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="MovieLens archive or folder, CSV or Parquet file with the columns user_id, item_id"
        "[, rating][, timestamp][, client_id], or folder with interactions.parquet; default: "
        "made-up data",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        choices=["all", *METHODS],
        metavar="NAME",
        help=f"all, or some of {', '.join(METHODS)}; default: all",
    )
    quick = ", ".join(f"{n_rounds} for {method}" for method, n_rounds in READERS.items())
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"default: each method's own, but {quick}"
    )
    parser.add_argument(
        "--clients-per-round",
        type=_number,
        metavar="N",
        help="a number, or a share such as 0.2; default: each method's own",
    )
    parser.add_argument("--factors", type=int, metavar="N", help="length of the vectors")
    parser.add_argument(
        "--test-size",
        type=_number,
        default=0.2,
        metavar="SHARE",
        help="share, or number, of every user's items to hold out; default: 0.2",
    )
    parser.add_argument(
        "--min-rating", type=float, metavar="R", help="drop rows with a weaker rating"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and the fits; default: 0")
    parser.add_argument("--device", help="such as cpu or cuda; default: a GPU where there is one")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw how well each method ranks, by round and over the clients; takes longer",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results and histories")
    parser.add_argument("--version", action="version", version=f"fedrecsk {fedrecsk.__version__}")
    return parser


def _number(text: str) -> int | float:
    """Read an integer as a count and everything else as a share."""
    try:
        return int(text) if text.strip("+-").isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _methods(names: Sequence[str], split: Split) -> list[str]:
    """List the methods that are asked for, and say which the data cannot feed."""
    wanted = [name for name in METHODS if "all" in names or name in names]
    if split.item_text:
        return wanted
    readers = ", ".join(name for name in wanted if name in READERS)
    fed = [name for name in wanted if name not in READERS]
    if not fed:
        raise ValueError(
            f"{readers} reads the texts of items, and these data have none. Choose other "
            "--methods, or data with titles."
        )
    if readers:
        print(f"Left out, since the data have no item texts: {readers}", flush=True)
    return fed


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Find out before the work, not after it, that its result cannot be written."""
    for file in (arguments.plot, arguments.json):
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"There is no folder {file.absolute().parent} for {file.name}.")
    if arguments.plot is not None:
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError as error:
            raise ImportError(
                '--plot needs matplotlib. Install it with: pip install "fedrecsk[plot]"'
            ) from error
        formats = FigureCanvasBase.get_supported_filetypes()
        if arguments.plot.suffix.lower().lstrip(".") not in formats:
            raise ValueError(
                f"--plot cannot write {arguments.plot.name}; end its name in one of "
                f"{', '.join('.' + name for name in sorted(formats))}."
            )


def _split(arguments: argparse.Namespace) -> Split:
    """Read or make the data and hold out a part of every user's rows."""
    if arguments.data is None:
        name, data = "Made-up data", make_interactions(N_USERS, N_ITEMS, N_CLUSTERS, random_state=0)
    else:
        name, data = str(arguments.data), load_interactions(arguments.data)
    X, clients = data.data, data.target
    splitter = PerUserHoldout(arguments.test_size, random_state=arguments.seed)
    train, test = next(splitter.split(X))
    counts = {
        "interactions": len(X),
        "users": len(np.unique(X[:, 0])),
        "items": len(np.unique(X[:, 1])),
        "held_out": len(test),
    }
    counts["clients"] = counts["users"] if clients is None else len(np.unique(clients))
    return Split(
        description=(
            f"{name}: {counts['interactions']:,} interactions of {counts['users']:,} users with "
            f"{counts['items']:,} items, {counts['clients']:,} clients; "
            f"{counts['held_out']:,} held out"
        ),
        train=X[train],
        train_clients=None if clients is None else clients[train],
        test=X[test],
        test_clients=None if clients is None else clients[test],
        item_text=data.item_text,
        counts=counts,
    )


def _run(method: str, split: Split, arguments: argparse.Namespace) -> Comparison:
    """Fit one method with progress, and judge it."""
    options = {
        "n_rounds": READERS.get(method) if arguments.rounds is None else arguments.rounds,
        "clients_per_round": arguments.clients_per_round,
        "n_factors": arguments.factors,
        "min_rating": arguments.min_rating,
        "random_state": arguments.seed,
        "device": arguments.device,
        "item_text": split.item_text or None,
    }
    estimator = METHODS[method]()
    known = estimator.get_params()
    estimator.set_params(**{k: v for k, v in options.items() if v is not None and k in known})
    curve = HeldOutCurve(_some_users(split.test))
    if arguments.plot is not None:
        estimator.set_callbacks(curve)
    with progress_on(sys.stderr) as verbose:
        estimator.set_params(verbose=verbose)
        start = time.perf_counter()
        estimator.fit(split.train, split.train_clients)
        seconds = time.perf_counter() - start - curve.seconds
    estimator.set_callbacks().set_params(verbose=known["verbose"])
    found = evaluate(estimator, split.test, metrics=("ndcg", "recall"), k=20).overall
    return Comparison(
        method=method,
        estimator=estimator,
        ndcg=found["ndcg@20"],
        recall=found["recall@20"],
        seconds=seconds,
        megabytes_up=sum(record["bytes_up"] for record in estimator.history_) / 1e6,
        megabytes_down=sum(record["bytes_down"] for record in estimator.history_) / 1e6,
        curve=curve.points,
    )


def _some_users(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows of at most CURVE_USERS users, evenly spread over the ids."""
    # By codes: NumPy compares ids that are objects one with all.
    users, codes = Vocabulary.from_values(rows[:, 0])
    step = -(-len(users.ids) // CURVE_USERS)
    kept: NDArray[Any] = rows[codes % step == 0]
    return kept


def _table(results: Sequence[Comparison]) -> str:
    """Lay the results out, one method a line."""
    rows = [["method", "NDCG@20", "recall@20", "seconds", "rounds", "MB up", "MB down"]]
    rows += [
        [
            result.method,
            f"{result.ndcg:.4f}",
            f"{result.recall:.4f}",
            f"{result.seconds:.1f}",
            str(result.estimator.n_rounds_),
            f"{result.megabytes_up:.1f}",
            f"{result.megabytes_down:.1f}",
        ]
        for result in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def _report(
    results: Sequence[Comparison], split: Split, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Collect what --json writes."""
    return {
        "fedrecsk": fedrecsk.__version__,
        "data": {"path": arguments.data and str(arguments.data), **split.counts},
        "test_size": arguments.test_size,
        "seed": arguments.seed,
        "results": [
            {
                "method": result.method,
                "estimator": type(result.estimator).__name__,
                "params": result.estimator.get_params(),
                "ndcg@20": result.ndcg,
                "recall@20": result.recall,
                "seconds": result.seconds,
                "rounds": result.estimator.n_rounds_,
                "megabytes_up": result.megabytes_up,
                "megabytes_down": result.megabytes_down,
                "history": result.estimator.history_,
            }
            for result in results
        ],
    }


def _plain(value: Any) -> Any:
    """Make JSON of NumPy's numbers, and text of parameters that are objects."""
    return value.item() if isinstance(value, np.generic) else repr(value)


def _plot(results: Sequence[Comparison], split: Split, file: Path) -> None:
    """Draw ranking quality by round, and over the clients, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = max(result.estimator.n_rounds_ for result in results)
    curves = {}
    for result in results:
        rounds, values = np.array(result.curve).T
        if len(rounds) == 1:
            # A method of a single round stays where it is while the others go on.
            rounds, values = np.array([1.0, last]), np.repeat(values, 2)
        curves[result.method] = (rounds, values)
    ConvergenceDisplay(curves=curves, xlabel="Round", ylabel="NDCG@20 on held-out items").plot(left)
    ClientBalanceDisplay.from_estimators(
        {result.method: result.estimator for result in results},
        split.test,
        split.test_clients,
        ax=right,
    )
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
