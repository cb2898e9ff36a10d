"""Where the seconds of a round go, and how far each part is from what the machine can do.

One round with all clients, one local epoch, mini-batches of 64 examples, SGD, one thread, for
matrix factorisation with sampled negatives, for the whole-data objective, for the network (ncf) and
the network over ego graphs (lightgcn, which steps over all that a client has). The library has no
timers: the script wraps its functions while it measures. Seconds of a phase are its own, without
those of phases within; "rest" is what no wrapped function took.

- sampling: negatives and mini-batches. Its integer arithmetic, hashes, is not counted.
- gather: cutting clients out of the data and copying rows of the table for them.
- local steps: scores, gradients and updates, or the exact solves.
- scatter: adding up what clients send.
- server step: moving the table and the shared network.
- evaluation: the 20 best unseen items of every user (of a sample for the networks, scaled up).

Beside them stand multiply-adds and bytes, counted by hand (`counted`), and the time that the
machine would need for the larger of both: flop/s of a matrix product, bytes/s of a large copy,
rows/s of a random gather, all measured in the same process. Chunks of clients fit in the last
cache, which is faster than the copy, so a ratio can come out below one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest import mock

import numpy as np
import torch
from _common import (
    Data,
    format_table,
    load,
    one_thread,
    parse_arguments,
    say,
    write_json,
)

from fedrecsk import FedAvgRecommender
from fedrecsk.engine.mixing import RowSums
from fedrecsk.engine.shards import ClientShards
from fedrecsk.estimators import _fedfnn_simulation
from fedrecsk.methods import bce_rounds
from fedrecsk.models import ncf, sampled_bce, whole_data
from fedrecsk.models.head import head_layers, head_of
from fedrecsk.models.private_rows import PrivateRows

SCRIPT = "round_profile"
N_FACTORS, N_NEGATIVES, BATCH_SIZE, TOP = 32, 4, 64, 20
PHASES = ("sampling", "gather", "local steps", "scatter", "server step", "rest", "evaluation")
MODELS: dict[str, dict[str, Any]] = {
    "mf, bce": {"model": "mf", "objective": "bce"},
    "mf, whole-data": {"model": "mf", "objective": "whole-data"},
    "ncf": {"model": "ncf"},
    "lightgcn": {"model": "lightgcn"},
}
# Users whose items the networks rank; the rest is scaled up.
RANKED_USERS = 300
ROUNDS_OF_NETWORKS = 3


@dataclass
class Clock:
    """Seconds of phases, each without those of the phases within."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    _stack: list[str] = field(default_factory=list)
    _since: float = 0.0

    def _turn(self) -> None:
        """Book the time since the last turn to the phase that is on."""
        now = time.perf_counter()
        if self._stack and self.rounds:
            self.rounds[-1][self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def on(self, phase: str) -> Iterator[None]:
        """Book what happens inside to a phase."""
        self._turn()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function; a phase that is on already stays on within itself."""

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            with self.on(phase):
                return function(*args, **named)

        return call

    def timed_copies(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what copies rows, where local steps ask for it."""

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            if not self._stack or self._stack[-1] != "local steps":
                return function(*args, **named)
            with self.on("gather"):
                return function(*args, **named)

        return call

    def round_of(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the step of a round, which begins a new record."""

        @wraps(step)
        def call(*args: Any, **named: Any) -> Any:
            self.rounds.append(dict.fromkeys(PHASES, 0.0))
            with self.on("rest"):
                return step(*args, **named)

        return call


@contextmanager
def watched() -> Iterator[Clock]:
    """Wrap the functions of the library that make up the phases, for as long as it lasts."""
    clock = Clock()
    places: list[tuple[Any, str, str]] = [
        (sampled_bce, "draw_examples", "sampling"),
        (ncf, "draw_examples", "sampling"),
        (sampled_bce, "train", "local steps"),
        (ncf, "train", "local steps"),
        (sampled_bce, "_side_by_side", "gather"),
        (whole_data, "_padded_rows", "gather"),
        (whole_data, "solve_users", "local steps"),
        (whole_data, "user_sums", "scatter"),
        (whole_data, "server_step", "server step"),
        (RowSums, "add", "scatter"),
        (bce_rounds, "_row_weights", "scatter"),
        (bce_rounds, "weighted_mean", "server step"),
        (bce_rounds, "apply_gradients", "server step"),
        (ClientShards, "_cut", "gather"),
        (ClientShards, "_by_size", "gather"),
    ]
    with ExitStack() as stack:
        for where, name, phase in places:
            wrapped = clock.timed(phase, getattr(where, name))
            stack.enter_context(mock.patch.object(where, name, wrapped))
        for where, name in ((torch.Tensor, "index_select"),):
            copies = clock.timed_copies(getattr(where, name))
            stack.enter_context(mock.patch.object(where, name, copies))
        of = classmethod(clock.timed("gather", PrivateRows.of.__func__))  # type: ignore[attr-defined]
        stack.enter_context(mock.patch.object(PrivateRows, "of", of))
        for name in ("bce_step", "whole_data_step"):
            step = clock.round_of(getattr(_fedfnn_simulation, name))
            stack.enter_context(mock.patch.object(_fedfnn_simulation, name, step))
        yield clock


def limits(repeats: int) -> dict[str, float]:
    """Measure what one thread can do: flop/s, bytes/s, and rows/s of random rows."""
    generator = torch.Generator().manual_seed(0)

    def best(run: Callable[[], object]) -> float:
        run()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    flops = {}
    for n in (256, 512, 1024):
        a, b = torch.randn(2, n, n, generator=generator)
        out = torch.empty(n, n)
        flops[n] = 2 * n**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    large, other = torch.zeros(2, 1 << 25)  # 128 MiB each, more than a cache holds
    table = torch.randn(3_700, N_FACTORS, generator=generator)
    index = torch.randint(len(table), (65_536,), generator=generator)
    rows = torch.empty(len(index), N_FACTORS)
    return {
        "flops": max(flops.values()),
        # A copy reads and writes.
        "bytes": 2 * large.nbytes / best(lambda: other.copy_(large)),
        "rows": len(index) / best(lambda: torch.index_select(table, 0, index, out=rows)),
    }


@dataclass(frozen=True)
class Count:
    """Multiply-adds, bytes and gathered rows of a phase."""

    macs: float = 0.0
    bytes: float = 0.0
    rows: float = 0.0

    def seconds(self, machine: dict[str, float]) -> float:
        """Least time on the machine, if all three go on side by side."""
        return max(
            2 * self.macs / machine["flops"],
            self.bytes / machine["bytes"],
            self.rows / machine["rows"],
        )


def counted(kind: str, fitted: FedAvgRecommender, n: int) -> dict[str, Count]:
    """Count multiply-adds and bytes of a round by phase; float32, codes of 8 bytes."""
    n_users, n_items, d = len(fitted.user_ids_), len(fitted.item_ids_), N_FACTORS
    row = 4 * d  # bytes
    # Scores are written once and read once by the selection of the best.
    ranking = Count(n_users * n_items * d, 8 * n_users * n_items)
    if kind == "mf, whole-data":
        return {
            # A row is read by its code and written to the client's copy; twice, since the
            # scores after the solve are made of a second copy.
            "gather": Count(0, 2 * n * (8 + 2 * row), 2 * n),
            # Gram matrix (d² for each interaction), Cholesky factor (d³/6), two substitutions (d²).
            "local steps": Count(
                n * d * d + n_users * (d**3 / 6 + d * d), n * row + 8 * n_users * d * d
            ),
            # Score and pull of each interaction: d each, of rows read once; the code once.
            "scatter": Count(2 * n * d + n_users * d * d, n * (row + 8)),
            # Into the eigenbasis and back, gradient and Gram matrix: 4 d² an item; eigh about 9 d³.
            "server step": Count(4 * n_items * d * d + 9 * d**3, 6 * n_items * row),
            "evaluation": ranking,
        }
    examples = n * (1 + N_NEGATIVES)
    steps, bytes_of_steps, scored = 3 * d, 2 * row, d  # score, user's gradient, row's update
    shared = 0
    if kind != "mf, bce":
        layers = head_layers(head_of(torch.tensor(fitted.network_), d))
        weights = [weight.numel() for weight, _ in layers]
        shared = sum(weights)
        # The user's half of the first layer is worked out once a step, not for each example.
        per_example = shared - weights[0] // 2
        # Forward, gradient by the inputs, gradient by the weights.
        steps, scored = 3 * per_example + d, per_example - weights[0] // 2
    if kind == "lightgcn":
        # Mean of the positives forward, and its gradient backward.
        steps += 2 * d / (1 + N_NEGATIVES)
    if shared:
        # All hidden units of a user and an item, and the score.
        ranking = Count(n_users * n_items * scored, 8 * n_users * n_items)
    return {
        # Code and mask of an example are written, the positives read; no multiply-adds.
        "sampling": Count(0, examples * 9 + n * 8),
        # Codes read, rows read and written.
        "gather": Count(0, examples * (8 + 2 * row), examples),
        # Rows are read once and written once if score, gradient and update go over them together.
        "local steps": Count(examples * steps, examples * bytes_of_steps),
        # Row, code and weight are read; the table stays in the cache.
        "scatter": Count(examples * d, examples * (row + 12)),
        # Mean and step: two multiply-adds a number, three tables go by.
        "server step": Count(2 * (n_items * d + shared), 3 * 4 * (n_items * d + shared)),
        "evaluation": ranking,
    }


def profile(kind: str, data: Data, rounds: int, machine: dict[str, float]) -> dict[str, Any]:
    """Fit and rank with one model, and set its phases against the counts."""
    network = MODELS[kind]["model"] != "mf"
    rounds = min(rounds, ROUNDS_OF_NETWORKS) if network else rounds
    estimator = FedAvgRecommender(
        **MODELS[kind],
        n_factors=N_FACTORS,
        n_rounds=1 + rounds,
        clients_per_round=1.0,
        local_epochs=1,
        learning_rate=0.01,
        # A step over ego graphs takes all that a client has.
        batch_size=None if kind == "lightgcn" else BATCH_SIZE,
        n_negatives=N_NEGATIVES,
        optimizer="sgd",
        item_bias=False,
        refit=False,
        random_state=0,
    )
    with watched() as clock:
        estimator.fit(data.X, data.clients)
    users = estimator.user_ids_
    some = np.random.default_rng(0).permutation(users)[:RANKED_USERS] if network else users
    ranking = []
    for _ in range(3):
        start = time.perf_counter()
        estimator.recommend(some, k=TOP)
        ranking.append((time.perf_counter() - start) * len(users) / len(some))
    counts = counted(kind, estimator, len(data.X))
    kept = clock.rounds[1:]  # the first one warms up
    phases: dict[str, Any] = {}
    for phase in PHASES:
        every = ranking if phase == "evaluation" else [record[phase] for record in kept]
        count = counts.get(phase, Count())
        phases[phase] = {
            "seconds": every,
            "macs": count.macs,
            "bytes": count.bytes,
            "limit": count.seconds(machine),
        }
    return {"rounds": [sum(record.values()) for record in kept], "phases": phases}


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """Lay out the phases of a model for a table."""
    total = statistics.median(result["rounds"])
    rows = []
    for phase, entry in result["phases"].items():
        median, limit = statistics.median(entry["seconds"]), entry["limit"]
        share = "" if phase == "evaluation" else f"{100 * median / total:.0f}%"
        counts = [f"{entry[name] / 1e6:,.0f}" if entry[name] else "" for name in ("macs", "bytes")]
        against = [f"{limit:.4f}", f"{median / limit:.1f}"] if limit else ["", ""]
        rows.append([phase, f"{median:.4f}", share, *counts, *against])
    return [*rows, ["a round", f"{total:.4f}", "100%", "", "", "", ""]]


HEADER = [
    "",
    "seconds",
    "of the round",
    "million multiply-adds",
    "MB",
    "limit, seconds",
    "times the limit",
]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(__doc__, SCRIPT, seeds=7, argv=argv)
    rounds = 1 if arguments.quick else arguments.seeds
    results: dict[str, Any] = {}
    with one_thread():
        machine = limits(3 if arguments.quick else 15)
        for data in load(arguments.data, quick=arguments.quick):
            results[data.name] = {**data.sizes, "models": {}}
            for kind in MODELS:
                say(f"{data.name}: {kind}")
                results[data.name]["models"][kind] = profile(kind, data, rounds, machine)
            what = {"rounds": rounds, "threads": 1, "limits": machine, "data": results}
            write_json(arguments, SCRIPT, what, [])
    print(
        f"limits: {machine['flops'] / 1e9:.0f} Gflop/s, {machine['bytes'] / 1e9:.1f} GB/s, "
        f"{machine['rows'] / 1e6:.0f} million random rows/s"
    )
    for name, result in results.items():
        for kind, entry in result["models"].items():
            print(f"\n{name}, {kind}")
            print(format_table(HEADER, rows_of(entry)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
