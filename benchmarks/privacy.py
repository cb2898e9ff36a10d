"""What differential privacy costs in ranking: NDCG@20 against epsilon.

Two objectives, both with user vectors that never leave the devices: whole-data (FedFNN without
prediction) and sampled negatives (FedAvg). Central noise, cohorts drawn by Poisson sampling,
privacy losses added up as distributions; local noise, clients in epochs, each charged for its own
turns. Delta is 1e-5 and the unit is a user. The noise is the smallest that stays within epsilon.

Rounds, share of clients in a round and server learning rate are chosen on the first data set, on
rows held out of the training rows of the first seed, once for central noise at epsilon 8 and once
for local noise at epsilon 512, and used for all epsilons and data sets. The split and all draws
differ by seed. Of data sets with more than 2,000 users one seed is measured, with whole-data
alone. For comparison: the same fit without privacy, and popularity, which is not private either.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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

from fedrecsk import FedAvgRecommender, FedFNNRecommender, PopularityRecommender
from fedrecsk.model_selection import PerUserHoldout

SCRIPT = "privacy"
Params = dict[str, Any]
EPSILONS: dict[str, dict[str, Sequence[float]]] = {
    "whole-data": {"central": (1, 2, 4, 8, 16, 32), "local": (32, 128, 512, 2048)},
    "bce": {"central": (2, 8, 32)},
}
MANY_USERS = 2_000
TUNED_AT = {"central": 8, "local": 512}
SHARED: Params = {"n_factors": 16, "device": "cpu", "delta": 1e-5, "predictor": None}
FULL: dict[str, list[Params]] = {
    "whole-data": [
        {"n_rounds": rounds, "clients_per_round": share}
        for rounds in (20, 40)
        for share in (0.2, 0.5)
    ],
    "bce": [
        {"n_rounds": 40, "clients_per_round": share, "server_learning_rate": rate}
        for share in (0.2, 0.5)
        for rate in (1.0, 3.0)
    ],
}
QUICK: dict[str, list[Params]] = {
    "whole-data": [{"n_rounds": 5, "clients_per_round": 0.5}],
    "bce": [{"n_rounds": 5, "clients_per_round": 0.5, "server_learning_rate": 3.0}],
}


def model(objective: str, params: Params, seed: int) -> Any:
    """Make an estimator whose server sees no user's vector."""
    arguments = {**SHARED, "objective": objective, "random_state": seed, **params}
    if objective == "whole-data":
        return FedFNNRecommender(**arguments)
    del arguments["predictor"]
    return FedAvgRecommender(**arguments)


def with_privacy(name: str, epsilon: float, params: Params) -> Params:
    """Add what promises epsilon."""
    return {
        **params,
        "privacy": name,
        "target_epsilon": epsilon,
        "noise_multiplier": "auto",
        "sampling": "poisson" if name == "central" else "epoch",
    }


def halves(X: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fifth of every user's rows."""
    kept, held = next(iter(PerUserHoldout(random_state=seed).split(X)))
    return X[kept], X[held]


def ranked(train: np.ndarray, test: np.ndarray, estimator: Any) -> float:
    """Fit and rank; what diverges ranks nothing."""
    try:
        return float(estimator.fit(train).score(test))
    except FloatingPointError:
        return 0.0


def tune(train: np.ndarray, name: str, objective: str, grid: Sequence[Params]) -> Params:
    """Choose on rows held out of the training rows."""
    if len(grid) == 1:
        return dict(grid[0])
    inner, valid = halves(train, 1_000)
    found = [
        ranked(inner, valid, model(objective, with_privacy(name, TUNED_AT[name], params), 0))
        for params in grid
    ]
    return dict(grid[int(np.argmax(found))])


def measure(
    data: Data,
    *,
    seeds: int,
    grids: Mapping[str, list[Params]],
    epsilons: Mapping[str, Mapping[str, Sequence[float]]],
    chosen: dict[str, Params],
) -> Params:
    """Fit everything on one data set; `chosen` is filled by the first."""
    X = np.asarray(data.X)[:, :2]
    many = len(np.unique(X[:, 0])) > MANY_USERS
    splits = [halves(X, seed) for seed in range(1 if many else seeds)]
    points: list[Params] = []

    def add(kind: str, objective: str, epsilon: float | None, params: Params) -> None:
        start = time.perf_counter()
        scores = [
            ranked(*split, model(objective, params, seed)) for seed, split in enumerate(splits)
        ]
        points.append(
            {
                "privacy": kind,
                "objective": objective,
                "epsilon": epsilon,
                "ndcg@20": [round(score, 4) for score in scores],
                "seconds": round((time.perf_counter() - start) / len(splits), 2),
            }
        )
        say(f"{data.name} {kind} {objective} {epsilon}: {points[-1]['ndcg@20']}")

    popular = [ranked(*split, PopularityRecommender()) for split in splits]
    for objective, grid in grids.items():
        if many and objective == "bce":
            continue
        for name, values in epsilons[objective].items():
            label = f"{name}, {objective}"
            if label not in chosen:
                chosen[label] = tune(splits[0][0], name, objective, grid)
            if name == "central":
                add("none", objective, None, {**chosen[label], "sampling": "poisson"})
            for epsilon in values:
                add(name, objective, epsilon, with_privacy(name, epsilon, chosen[label]))
    return {
        **data.sizes,
        "popularity": [round(score, 4) for score in popular],
        "points": points,
    }


# --------------------------------------------------------------------- report


def cell(scores: Sequence[float]) -> str:
    """Mean and spread over the seeds."""
    mean, spread = mean_and_spread(scores)
    return f"{mean:.3f} ± {spread:.3f}" if len(scores) > 1 else f"{mean:.3f}"


def tables_of(report: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Give for every data set a heading, the header, and a row per epsilon."""
    for name, result in report["data"].items():
        by = {(p["privacy"], p["objective"], p["epsilon"]): p["ndcg@20"] for p in result["points"]}
        for kind in dict.fromkeys(p["privacy"] for p in result["points"] if p["epsilon"]):
            own = [p for p in result["points"] if p["privacy"] == kind]
            objectives = list(dict.fromkeys(p["objective"] for p in own))
            rows = [
                [f"{epsilon:g}"]
                + [cell(by[kind, one, epsilon]) if (kind, one, epsilon) in by else ""
                   for one in objectives]
                for epsilon in sorted({p["epsilon"] for p in own})
            ]  # fmt: skip
            rows.append(["no privacy", *(cell(by["none", one, None]) for one in objectives)])
            rows.append(["popularity", *[cell(result["popularity"])] * len(objectives)])
            heading = f"{name}, {result['users']:,} users, {result['items']:,} items, {kind} noise"
            yield heading, ["epsilon", *objectives], rows


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw NDCG@20 against epsilon, a panel for each data set."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    sets = report["data"]
    figure, axes = plt.subplots(
        1, len(sets), figsize=(5.5 * len(sets), 3.8), squeeze=False, layout="constrained"
    )
    for ax, (name, result) in zip(axes[0], sets.items(), strict=True):
        kinds = dict.fromkeys((p["privacy"], p["objective"]) for p in result["points"])
        colours: dict[str, str] = {}
        for kind, objective in kinds:
            own = [
                p for p in result["points"] if (p["privacy"], p["objective"]) == (kind, objective)
            ]
            colour = colours.setdefault(objective, f"C{len(colours)}")
            if kind == "none":
                ax.axhline(np.mean(own[0]["ndcg@20"]), color=colour, linestyle=":", linewidth=1)
                continue
            mean, spread = zip(*(mean_and_spread(p["ndcg@20"]) for p in own), strict=True)
            ax.errorbar(
                [p["epsilon"] for p in own], mean, spread, marker="o", markersize=4, capsize=2,
                color=colour, linestyle="-" if kind == "central" else "--",
                label=f"{objective}, {kind}",
            )  # fmt: skip
        ax.axhline(np.mean(result["popularity"]), color="grey", linewidth=1, label="popularity")
        ax.set(
            xscale="log", xlabel="epsilon (delta 1e-5)", title=f"{name}, {result['users']:,} users"
        )
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("NDCG@20 (dotted: no privacy)")
    axes[0, 0].legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def goals_of(results: Mapping[str, Params]) -> list[Goal]:
    """Ask for more than popularity at epsilon 8, with a trusted server."""
    goals = []
    for name, result in results.items():
        floor = float(np.mean(result["popularity"]))
        best = max(
            float(np.mean(p["ndcg@20"]))
            for p in result["points"]
            if (p["privacy"], p["epsilon"]) == ("central", TUNED_AT["central"])
        )
        goals.append(Goal(f"{name}: NDCG@20 at epsilon 8, over popularity's", best / floor, 1.0))
    return goals


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments of all scripts and our own."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--figure", type=Path, metavar="FILE")
    known, rest = own.parse_known_args(argv)
    arguments = parse_arguments(
        f"{__doc__} Further options: --figure FILE, a PNG.", SCRIPT, seeds=3, argv=rest
    )
    vars(arguments).update(figure=known.figure)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    quick = arguments.quick
    seeds, grids = (1, QUICK) if quick else (arguments.seeds, FULL)
    few = {"whole-data": {"central": (8,), "local": (512,)}, "bce": {"central": (8,)}}
    report: Params = {
        "shared": SHARED, "tuned_at": TUNED_AT, "threads": 1, "chosen": {}, "data": {},
    }  # fmt: skip
    with one_thread():
        for data in load(arguments.data, quick=quick):
            report["data"][data.name] = measure(
                data,
                seeds=seeds,
                grids=grids,
                epsilons=few if quick else EPSILONS,
                chosen=report["chosen"],
            )
            goals = [] if quick else goals_of(report["data"])
            write_json(arguments, SCRIPT, report, goals)
    for heading, header, rows in tables_of(report):
        print(f"\n{heading}\n{format_table(header, rows)}")
    if arguments.figure is not None:
        draw(report, arguments.figure)
    print("goals: none with --quick" if quick else "\n".join(map(str, goals)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
