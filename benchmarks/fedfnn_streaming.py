"""FedFNN where data arrive over time, and where federations are hard.

The stream: a fit on the earliest 60% of the rows, then three portions with the rest, each followed
by a few rounds of `partial_fit`; against a fit from scratch on all rows with as many rounds in
all. 5% of the clients a round. NDCG@20 on a random 20% of every user's rows, and, once the last
portion is there, the rounds to 95% of what the fit from scratch ends at: going on, or starting
anew. Rows are in the order of their timestamps, or in a random one where there are none.

The hard cases, on made-up data: one and two delegates a round; one user who has half of all rows
(the others are scored); a drift, after which every user likes what a user of another cluster
liked (the new taste is scored, before and after `partial_fit` on rows of it).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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

from fedrecsk import FedAvgRecommender, FedFNNRecommender, PopularityRecommender, UnknownIdWarning
from fedrecsk.datasets import make_interactions
from fedrecsk.model_selection import PerUserHoldout

SCRIPT = "fedfnn_streaming"
METHODS: dict[str, Callable[..., Any]] = {
    "FedAvg": FedAvgRecommender,
    "FedFNN": FedFNNRecommender,
    "FedFNN bce": lambda **parameters: FedFNNRecommender(objective="bce", **parameters),
}
HARD_METHODS = ("popularity", *METHODS)
PARTICIPATION = 0.05
OFFLINE_SHARE = 0.6
N_PORTIONS = 3
ENOUGH = 0.95
AS_GOOD = 0.97
MAX_TEST_USERS = 2_000
# A curve has every round up to here, and every fifth from there on.
EVERY_ROUND_UNTIL = 20

Rows = NDArray[Any]
# Of a method's name, rounds and a seed: NDCG@20 by what was varied.
Case = Callable[[str, int, int], dict[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    arguments = parse_arguments(__doc__, SCRIPT, seeds=3, argv=argv)
    offline, online, hard_rounds = (12, 2, 20) if arguments.quick else (60, 10, 300)
    seeds = 1 if arguments.quick else arguments.seeds
    streams, goals = [], []
    with one_thread(), warnings.catch_warnings():
        # A model that was not updated does not know the new; that is what is measured.
        warnings.simplefilter("ignore", UnknownIdWarning)
        for data in load(arguments.data, quick=arguments.quick):
            rows = [stream_row(data, name, offline, online, seeds) for name in METHODS]
            streams.append({"data": data.name, **data.sizes, "rows": rows})
            goals += [goal for row in rows for goal in stream_goals(data.name, row)]
        hard = [
            hard_row(case, name, hard_rounds, seeds) for case in HARD_CASES for name in HARD_METHODS
        ]
    print(stream_table(streams), hard_table(hard), sep="\n\n")
    settings = {
        "seeds": seeds,
        "participation": PARTICIPATION,
        "rounds_offline": offline,
        "rounds_per_portion": online,
        "portions": N_PORTIONS,
    }
    write_json(arguments, SCRIPT, {**settings, "streams": streams, "hard_cases": hard}, goals)
    for goal in goals:
        print(goal)


# ---------------------------------------------------------------- the stream


class Curve:
    """A callback that scores the model as the rounds go by."""

    def __init__(self, held_out: Rows) -> None:
        self.held_out = held_out
        self.rounds: list[int] = []
        self.values: list[float] = []
        self._done = 0

    def setup(self, estimator: Any, context: Any) -> None:
        """Nothing to prepare."""

    # Nor to clean up, or to look at before a round.
    teardown = on_fit_task_begin = setup

    def on_fit_task_end(self, estimator: Any, context: Any, *, fitted_estimator: Any) -> None:
        """Score after a round."""
        if context.task_name != "round":
            return
        self._done += 1
        if self._done <= EVERY_ROUND_UNTIL or self._done % 5 == 0:
            self.rounds.append(self._done)
            self.values.append(fitted_estimator.score(self.held_out))

    def first_at(self, value: float) -> int | None:
        """First round that reaches a value."""
        reached = (n for n, each in zip(self.rounds, self.values, strict=True) if each >= value)
        return next(reached, None)


def portions_of(X: Rows, seed: int) -> list[Rows]:
    """Cut rows into the offline part and the portions of the stream, in the order of time."""
    rng = np.random.default_rng(seed)
    X = X[rng.permutation(len(X))]
    if X.shape[1] > 3:
        X = X[np.argsort(X[:, 3].astype(float), kind="stable")]
    cuts = np.linspace(OFFLINE_SHARE, 1, N_PORTIONS + 1)[:-1] * len(X)
    # Time has done its part; a model sees user and item alone.
    return [part[:, :2] for part in np.split(X, cuts.astype(int))]


def stream_row(data: Data, name: str, offline: int, online: int, seeds: int) -> dict[str, Any]:
    """Run one method through the stream, and from scratch, on every seed."""
    say(f"{data.name}: stream, {name}")
    runs = [stream_run(data, METHODS[name], offline, online, seed) for seed in range(seeds)]
    row: dict[str, Any] = {"method": name}
    for key in runs[0]:
        values = [run[key] for run in runs]
        reached = [value for value in values if value is not None]
        # A seed that never gets there has no number of rounds, so the mean has none either.
        row[key] = mean_and_spread(reached)[0] if len(reached) == len(values) else None
        row[f"{key}_per_seed"] = values
    return row


def stream_run(
    data: Data, method: Callable[..., Any], offline: int, online: int, seed: int
) -> dict[str, float | None]:
    """Score the stream and the fit from scratch."""
    train, test = next(PerUserHoldout(random_state=seed).split(data.X))
    portions = portions_of(data.X[train], seed)
    held_out = data.X[some_users(data.X, test, seed), :2]
    settings = {"clients_per_round": PARTICIPATION, "random_state": seed}
    scratch = Curve(held_out)
    method(n_rounds=offline + N_PORTIONS * online, **settings).set_callbacks(scratch).fit(
        np.concatenate(portions)
    )
    model = method(n_rounds=offline, **settings).fit(portions[0])
    known_users = len(model.user_ids_)
    result = {"ndcg_offline": model.score(held_out)}
    model.set_params(n_rounds=online)
    for portion in portions[1:-1]:
        model.partial_fit(portion)
    streamed = Curve(held_out)
    model.set_callbacks(streamed).partial_fit(portions[-1])
    final = scratch.values[-1]
    return {
        **result,
        "new_users": 1 - known_users / len(model.user_ids_),
        "ndcg_stream": model.score(held_out),
        "ndcg_scratch": final,
        "rounds_online": streamed.first_at(ENOUGH * final),
        "rounds_scratch": scratch.first_at(ENOUGH * final),
    }


def some_users(X: Rows, test: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Held-out rows of at most MAX_TEST_USERS random users."""
    users = np.unique(X[test, 0])
    if len(users) <= MAX_TEST_USERS:
        return test
    chosen = np.random.default_rng(seed).choice(users, MAX_TEST_USERS, replace=False)
    return test[np.isin(X[test, 0], chosen)]


def stream_goals(data: str, row: dict[str, Any]) -> list[Goal]:
    """As good as from scratch, and sooner."""
    ratio = row["ndcg_stream"] / row["ndcg_scratch"]
    goals = [Goal(f"{data}, {row['method']}: NDCG@20 of the stream / from scratch", ratio, AS_GOOD)]
    sooner = (row["rounds_online"] or np.inf) / (row["rounds_scratch"] or np.nan)
    what = f"{data}, {row['method']}: rounds to 95%, online / from scratch"
    return [*goals, Goal(what, sooner, 1.0, at_least=False)]


# What a table shows of the stream.
STREAM_COLUMNS = {
    "ndcg_offline": "offline only",
    "ndcg_stream": "stream",
    "ndcg_scratch": "from scratch",
    "rounds_online": "rounds online",
    "rounds_scratch": "rounds from scratch",
}


def stream_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the stream on one data set."""
    rows = [[row["method"], *(cell(row, key) for key in STREAM_COLUMNS)] for row in result["rows"]]
    return [f"{result['data']}, stream", *STREAM_COLUMNS.values()], rows


def stream_table(results: Sequence[dict[str, Any]]) -> str:
    """Lay out the stream, a block per data set."""
    return "\n\n".join(format_table(*stream_cells(result)) for result in results)


def cell(row: dict[str, Any], key: str) -> str:
    """Write a number, with its digits by kind."""
    if row[key] is None:
        return "never"
    return f"{row[key]:.4f}" if key.startswith("ndcg") else f"{row[key]:.0f}"


# ---------------------------------------------------------------- hard cases


def made_up(seed: int) -> Any:
    """Interactions of the hard cases."""
    return make_interactions(400, 300, 5, mean_interactions=25, random_state=seed)


def few_delegates(n: int) -> Case:
    """Return the case of n delegates a round."""

    def case(name: str, n_rounds: int, seed: int) -> dict[str, float]:
        X = made_up(seed).data[:, :2]
        train, test = next(PerUserHoldout(random_state=seed).split(X))
        model = make(name, n_rounds, seed, clients_per_round=n).fit(X[train])
        return {f"{n} delegate{'s' * (n > 1)} a round": model.score(X[test])}

    return case


def giant(name: str, n_rounds: int, seed: int) -> dict[str, float]:
    """Add a user with as many rows as all others have, on a wide catalogue."""
    X = make_interactions(150, 1_500, 5, mean_interactions=10, random_state=seed).data[:, :2]
    train, test = next(PerUserHoldout(random_state=seed).split(X))
    items = np.random.default_rng(seed).choice(1_500, len(train), replace=False)
    rows = np.column_stack([np.full(len(train), X[:, 0].max() + 1), items])
    without = make(name, n_rounds, seed).fit(X[train]).score(X[test])
    with_giant = make(name, n_rounds, seed).fit(np.concatenate([X[train], rows])).score(X[test])
    return {"without the giant user": without, "one user has half of the rows": with_giant}


def drift(name: str, n_rounds: int, seed: int) -> dict[str, float]:
    """Change every user's taste to that of a user of the next cluster."""
    made = made_up(seed)
    X, clusters = made.data[:, :2], made.user_clusters
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(np.flatnonzero(clusters == c)) for c in range(clusters.max() + 1)]
    partner = np.empty(len(clusters), dtype=np.int64)
    for users, others in zip(groups, groups[1:] + groups[:1], strict=True):
        partner[users] = others  # clusters are of one size
    part = rng.choice(3, len(X), p=[0.4, 0.4, 0.2])
    before, after, held_out = (X[part == place].copy() for place in range(3))
    for rows in (after, held_out):
        rows[:, 0] = partner[rows[:, 0]]
    n_rounds = max(2, n_rounds // 5)
    model = make(name, n_rounds, seed).fit(before)
    stale = model.score(held_out)
    if name != "popularity":
        model.set_params(n_rounds=n_rounds // 2)
    return {
        "drift, not updated": stale,
        "drift, after partial_fit": model.partial_fit(after).score(held_out),
    }


HARD_CASES: tuple[Case, ...] = (few_delegates(1), few_delegates(2), giant, drift)


def make(name: str, n_rounds: int, seed: int, **parameters: Any) -> Any:
    """Make an unfitted estimator; popularity has nothing to set."""
    if name == "popularity":
        return PopularityRecommender()
    return METHODS[name](n_rounds=n_rounds, random_state=seed, **parameters)


def hard_row(case: Case, name: str, n_rounds: int, seeds: int) -> dict[str, Any]:
    """Run one method through one case on every seed."""
    runs = [case(name, n_rounds, seed) for seed in range(seeds)]
    say(f"hard cases: {', '.join(runs[0])}, {name}")
    return {"method": name, "ndcg@20": {key: [run[key] for run in runs] for key in runs[0]}}


def hard_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the cases, a line each."""
    return format_table(*hard_cells(rows))


def hard_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the hard cases."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        for case, values in row["ndcg@20"].items():
            mean, spread = mean_and_spread(values)
            cells.setdefault(case, []).append(f"{mean:.4f} ± {spread:.4f}")
    return ["hard cases", *HARD_METHODS], [[case, *line] for case, line in cells.items()]


if __name__ == "__main__":
    main()
