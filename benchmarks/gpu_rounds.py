"""What a round of matrix factorisation takes on a GPU, against its memory and one CPU thread.

Full participation, 32 factors, one local epoch, 4 negatives for each interaction. Milliseconds of
a round lie between two events in the device's own queue, so that what the host does meanwhile
counts as far as the device has to wait for it. The floor of a round is the time in which the
device's memory can move the bytes that the round has to move, counted by hand below, at the speed
at which it copies a large tensor. The same rounds are run on one thread of the CPU, and the
factors of both compared.

At last the places are listed at which the host waited for the device within a round. One is left:
torch asks whether the eigenbasis of the server's d x d matrix was found, at the end of the round.

Without a GPU this is a dry run: everything runs on the CPU, the goals are not measured, and no
JSON is written unless --out names a file.
"""

from __future__ import annotations

import linecache
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from _common import (
    RESULTS,
    Data,
    Goal,
    format_table,
    load,
    one_thread,
    parse_arguments,
    say,
    write_json,
)

from fedrecsk.data.interactions import Interactions, encode, read_columns
from fedrecsk.datasets import make_interactions
from fedrecsk.engine.device import resolve_device
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.bce_rounds import bce_step
from fedrecsk.methods.factor_state import FactorState
from fedrecsk.methods.whole_data_rounds import whole_data_step
from fedrecsk.models import whole_data
from fedrecsk.models.factors import random_factors

SCRIPT = "gpu_rounds"
CPU = torch.device("cpu")
N_FACTORS, N_NEGATIVES, LOCAL_EPOCHS = 32, 4, 1
STREAMS = Streams(0)
ROUNDS_COMPARED = 3
TIMES_FLOOR, TIMES_CPU, DIFFERENCE = 3.0, 100.0, 1e-4
# Objective, examples in a local step, and the server's optimiser; None is the quasi-Newton step.
ADD = Optimizer("sgd", 1.0)
KINDS: dict[str, tuple[str, int | None, Optimizer | None]] = {
    "whole-data": ("whole-data", None, ADD),
    "bce, full batch": ("bce", None, ADD),
    "bce, batches of 64": ("bce", 64, ADD),
    "bce, batches of 64, newton": ("bce", 64, None),
}
FLOAT, INDEX = 4, 8  # bytes


@dataclass(eq=False)
class Rounds:
    """Federated rounds of one kind on one device; only the state changes."""

    data: Interactions
    kind: str
    device: torch.device

    def __post_init__(self) -> None:
        data = self.data
        self.shards = ClientShards.from_codes(
            data.user, data.item, data.user_client, data.n_clients, data.n_items, self.device
        )
        users, items = random_factors(
            data.n_users,
            data.n_items,
            N_FACTORS,
            item_bias=False,
            init_scale=0.1,
            streams=STREAMS,
            device=self.device,
        )
        self.state = FactorState.start(users, items, KINDS[self.kind][2], n_clients=data.n_clients)
        self.everybody = np.arange(data.n_clients)
        self.t = 0

    def one_more(self) -> None:
        """Run a round, without reading its logs."""
        objective, batch_size, server = KINDS[self.kind]
        if objective == "whole-data":
            self.state, _ = whole_data_step(
                self.state,
                self.shards,
                self.everybody,
                self.t,
                unobserved_weight=whole_data.default_unobserved_weight(
                    len(self.shards.items), self.shards.n_users, self.shards.n_items
                ),
                penalty=whole_data.Penalty(0.1, 0.75),
                server_learning_rate=None,
                decay=0.9,
                item_curvature=True,
                in_place=True,
            )
        else:
            self.state, _ = bce_step(
                self.state,
                self.shards,
                self.everybody,
                self.t,
                streams=STREAMS,
                item_weighting="count",
                item_bias=False,
                n_negatives=N_NEGATIVES,
                batch_size=batch_size,
                local_epochs=LOCAL_EPOCHS,
                optimizer=Optimizer("sgd", 0.1),
                l2=0.0,
                server_optimizer=server,
                in_place=True,
            )
        self.t += 1


def bytes_of_round(data: Interactions, kind: str) -> dict[str, int]:
    """Bytes that a round has to read and write in the device's memory, by what they are for.

    Each array counts once for every pass over it that cannot be left out where one kernel hands
    its rows to the next through memory. The item table is read through caches and counts once.
    """
    d, n, n_users, n_items = N_FACTORS, len(data), data.n_users, data.n_items
    row = d * FLOAT
    server = {
        # Read the old table and the sums, write the sums and the new table.
        "item table": 4 * n_items * row,
        # Read the users' vectors before the round and write those after it.
        "user vectors": 2 * n_users * row,
    }
    if KINDS[kind][0] == "whole-data":
        return {
            **server,
            # Read which items, and write a copy of each one's vector.
            "gather rows": n * (INDEX + row),
            # Read the copies for the users' matrices, and again for the scores.
            "read rows": 2 * n * row,
            # Write a d x d matrix a user, read it for its factor, write and read the factor.
            "users' matrices": 4 * n_users * d * row,
            # Read items, users and residuals, sorted by item, and a user's vector for each.
            "sum by item": n * (2 * INDEX + FLOAT + row),
        }
    seen = data.user_counts
    n_rows = int((seen + np.minimum(N_NEGATIVES * seen, n_items - seen)).sum())
    return {
        **server,
        # Write which item each positive and negative is.
        "draw examples": n_rows * INDEX,
        # Read that, and write a copy of each one's vector.
        "gather rows": n_rows * (INDEX + row),
        # Every epoch reads each private row and writes it back.
        "local epochs": LOCAL_EPOCHS * n_rows * 2 * row,
        # Read the rows and their items, once.
        "sum by item": n_rows * (INDEX + row),
    }


def bandwidth(device: torch.device, n_bytes: int, repeats: int = 10) -> float:
    """Bytes a second that the device reads and writes in a large copy, at best."""
    source = torch.ones(n_bytes // FLOAT, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, repeats, warm_up=2)
    return 2 * source.numel() * FLOAT / min(seconds)


def timed(
    run: Callable[[], object], device: torch.device, repeats: int, *, warm_up: int
) -> list[float]:
    """Seconds of each of some runs, by the device's events; on a CPU by the clock."""
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return seconds
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def largest_difference(data: Interactions, kind: str, device: torch.device) -> float:
    """Largest difference of a factor between the CPU and the device after some rounds."""
    ours, theirs = Rounds(data, kind, CPU), Rounds(data, kind, device)
    for _ in range(ROUNDS_COMPARED):
        ours.one_more()
        theirs.one_more()
    return max(
        float((getattr(ours.state, name) - getattr(theirs.state, name).cpu()).abs().max())
        for name in ("user_factors", "item_table")
    )


@contextmanager
def waits_seen(found: Counter[str]) -> Iterator[None]:
    """Count the lines at which the host waits for a GPU.

    Not the mode that ends the program at the first of them: all are wanted, and the one for the
    eigenbasis is there in any case.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for each in caught:
        if "synchroniz" in str(each.message):
            found[f"{each.filename.rpartition('fedrecsk')[2]}:{each.lineno}: "
                  f"{linecache.getline(each.filename, each.lineno).strip()}"] += 1  # fmt: skip


def is_eigenbasis(place: str) -> bool:
    """Tell whether a line found by `waits_seen` is the one that stays."""
    return "torch.linalg.eigh(" in place


def measure(
    data: Interactions, kind: str, device: torch.device, speed: float, *, repeats: int
) -> dict[str, Any]:
    """Time rounds on the device and on one thread of the CPU."""
    on_gpu = device.type == "cuda"
    moved = bytes_of_round(data, kind)
    rounds = Rounds(data, kind, device)
    seconds = timed(rounds.one_more, device, repeats, warm_up=3 if on_gpu else 1)
    result: dict[str, Any] = {
        "milliseconds": [1e3 * each for each in seconds],
        "bytes": moved,
        "floor_milliseconds": 1e3 * sum(moved.values()) / speed,
    }
    result["times_floor"] = statistics.median(result["milliseconds"]) / result["floor_milliseconds"]
    if on_gpu:
        found: Counter[str] = Counter()
        with waits_seen(found):
            for _ in range(ROUNDS_COMPARED):
                rounds.one_more()
        result["waits"] = dict(found)
        result["difference"] = largest_difference(data, kind, device)
        one = timed(Rounds(data, kind, CPU).one_more, CPU, max(3, repeats // 5), warm_up=1)
        result["cpu_milliseconds"] = [1e3 * each for each in one]
    say(f"{kind}: {statistics.median(result['milliseconds']):.2f} ms")
    return result


def goals_of(name: str, results: dict[str, Any]) -> list[Goal]:
    """List the goals; without a GPU their values are not numbers."""
    nothing, goals = float("nan"), []
    for kind, result in results.items():
        on_gpu = "difference" in result
        what = f"{name}, {kind}"
        times = result["times_floor"] if on_gpu else nothing
        faster = nothing
        if on_gpu:
            faster = statistics.median(result["cpu_milliseconds"]) / statistics.median(
                result["milliseconds"]
            )
        waits = [each for each in result.get("waits", {}) if not is_eigenbasis(each)]
        goals += [
            Goal(f"{what}: round / floor of its bytes", times, TIMES_FLOOR, at_least=False),
            Goal(f"{what}: one CPU thread / GPU", faster, TIMES_CPU),
            Goal(
                f"{what}: largest difference after {ROUNDS_COMPARED} rounds",
                result.get("difference", nothing),
                DIFFERENCE,
                at_least=False,
            ),
            Goal(
                f"{what}: places that wait, but the eigenbasis",
                float(len(waits)) if on_gpu else nothing,
                0.0,
                at_least=False,
            ),
        ]
    return goals


def report_goal(goal: Goal) -> str:
    """Say whether a goal is held, or that it was not measured."""
    if goal.value == goal.value:
        return str(goal)
    sign = ">=" if goal.at_least else "<="
    return f"goal: {goal.what} (target {sign} {goal.target:g}) not measured: no GPU"


def table(results: dict[str, Any]) -> str:
    """Lay out medians over the rounds."""
    rows = []
    for kind, result in results.items():
        one = result.get("cpu_milliseconds")
        rows.append(
            [
                kind,
                f"{statistics.median(result['milliseconds']):.2f}",
                f"{sum(result['bytes'].values()) / 1e6:.1f}",
                f"{result['floor_milliseconds']:.3f}",
                f"{100 / result['times_floor']:.1f}%",
                f"{statistics.median(one):.1f}" if one else "-",
                f"{result['difference']:.1e}" if "difference" in result else "-",
            ]
        )
    header = ["", "ms", "MB moved", "floor ms", "share of floor", "one CPU thread ms", "difference"]
    return format_table(header, rows)


def like_ml_1m(arguments: Any) -> list[Data]:
    """Read the data sets, or make one up with the sizes of MovieLens-1M."""
    if arguments.data or arguments.quick:
        return load(arguments.data, quick=arguments.quick)
    made = make_interactions(6_040, 3_706, mean_interactions=165.6, random_state=0)
    return [Data("made-up, 1M", made.data, made.target)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(__doc__, SCRIPT, seeds=20, argv=argv)
    repeats = 2 if arguments.quick else arguments.seeds
    device = resolve_device("auto")
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU, one thread (dry run)"
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    with one_thread():
        speed = bandwidth(device, 2**24 if arguments.quick else 2**30 if on_gpu else 2**27)
        for data in like_ml_1m(arguments):
            coded = encode(read_columns(data.X), data.clients)
            kinds = {kind: measure(coded, kind, device, speed, repeats=repeats) for kind in KINDS}
            results[data.name] = {**data.sizes, "kinds": kinds}
            goals += goals_of(data.name, kinds)
    for title, result in results.items():
        print(f"\n{title}: {result['users']:,} clients, {result['interactions']:,} interactions")
        print(f"{name}, memory copied at {speed / 1e9:.1f} GB/s")
        print(table(result["kinds"]))
        for kind, each in result["kinds"].items():
            for place, count in each.get("waits", {}).items():
                print(f"{kind}: waited {count} times in {ROUNDS_COMPARED} rounds at {place}")
    print()
    print("\n".join(map(report_goal, goals)))
    if on_gpu or arguments.out != RESULTS / f"{SCRIPT}.json":
        what = {
            "n_factors": N_FACTORS,
            "n_negatives": N_NEGATIVES,
            "local_epochs": LOCAL_EPOCHS,
            "repeats": repeats,
            "compared_after": ROUNDS_COMPARED,
        }
        measured = [goal for goal in goals if goal.value == goal.value]
        report = {"device": name, "bytes_per_second": speed, "what": what, "data": results}
        write_json(arguments, SCRIPT, report, measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
