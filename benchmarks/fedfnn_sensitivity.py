"""How FedFNN's predictions depend on their discount, on patience, and on how users cluster.

Three kinds of prediction with the literal objective: by a multi-layer perceptron or a linear map
for everybody who was not sampled, training going on from it (the literal method), and by the
perceptron, gated and anchored. Discounts and patience make a grid; the rest are defaults, with
the plain server step and nothing tuned. A discount of 0 is no prediction, so it is measured once;
a patience of 1000 never ends prediction. Made-up data have 1, 5 or 50 clusters of users.

5% of the clients take part in a round, and users are served with what they hold. Given are the
best NDCG@20 within the rounds (mean over the seeds, then a running mean over 3 points) and the
first round in which the mean curve is at 95% of the best without prediction.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Data, format_table, load, say, write_json
from _curves import (
    LOCAL,
    N_FACTORS,
    Params,
    best_of,
    figure_class,
    first_reaching,
    fit_and_record,
    parse,
    split_of,
    unpack,
)
from joblib import Parallel, delayed

from fedrecsk import FedFNNRecommender
from fedrecsk.datasets import make_interactions

SCRIPT = "fedfnn_sensitivity"
SHARE, MARK, N_JUDGED = 0.05, 95, 1_000
CLUSTERS = (1, 5, 50)
DISCOUNTS, PATIENCE = (0.25, 0.5, 1.0), (1, 3, 10, 1_000)
BASE: Params = {
    "n_factors": N_FACTORS,
    "objective": "bce",
    "sampling": "uniform",
    "server_optimizer": "sgd",
    "item_bias": False,
    "refit": False,
    "device": "cpu",
    **LOCAL,
}
LITERAL: Params = {**BASE, "gate": False, "anchor": False, "extra_inputs": False}
GATED: Params = {**BASE, "gate": True, "anchor": True, "extra_inputs": True}
KINDS: dict[str, Params] = {
    "mlp, literal": {**LITERAL, "predictor": "mlp"},
    "linear, literal": {**LITERAL, "predictor": "linear"},
    "mlp, gated": {**GATED, "predictor": "mlp"},
}


def data_sets(arguments: argparse.Namespace) -> list[Data]:
    """Make data up with several numbers of clusters, and read those of ``--data``."""
    quick = arguments.quick
    sets = []
    for n_clusters in (5,) if quick else CLUSTERS:
        sizes = (200, 150) if quick else (600, 400)
        made = make_interactions(*sizes, n_clusters, random_state=0)
        sets.append(Data(f"made-up, {n_clusters} clusters", made.data, made.target))
    return sets + (load(arguments.data, quick=quick) if arguments.data else [])


def fit(data: Data, params: Params, *, n_rounds: int, seed: int) -> tuple[str, str]:
    """Fit once and return the packed grid of rounds and curve."""
    found = fit_and_record(
        FedFNNRecommender,
        params,
        split_of(data, seed, N_JUDGED),
        protocols=("held",),
        n_rounds=n_rounds,
        share=SHARE,
        seed=seed,
    )
    shown = {name: params[name] for name in ("predictor", "discount", "patience") if name in params}
    say(f"{data.name}, seed {seed}, {shown}: at the end {found['held'].split()[-1]}")
    return found["rounds"]["held"], found["held"]


def measure(data: Data, *, n_rounds: int, n_seeds: int, jobs: int, quick: bool) -> Params:
    """Fit the whole grid on one data set."""
    discounts = DISCOUNTS[-1:] if quick else DISCOUNTS
    patience = PATIENCE[-1:] if quick else PATIENCE
    cells = [(None, 0.0, 0)] + [(k, d, p) for k in KINDS for d in discounts for p in patience]
    work = [
        (cell, seed, {**KINDS[cell[0]], "discount": cell[1], "patience": cell[2]})
        if cell[0]
        else (cell, seed, {**BASE, "predictor": None})
        for cell in cells
        for seed in range(n_seeds)
    ]
    packed = Parallel(n_jobs=jobs)(
        delayed(fit)(data, params, n_rounds=n_rounds, seed=seed) for _, seed, params in work
    )
    curves: dict[Any, list[str]] = {}
    for (cell, _, _), (_, curve) in zip(work, packed, strict=True):
        curves.setdefault(cell, []).append(curve)
    return derive(packed[0][0], curves)


def derive(rounds: str, curves: dict[Any, list[str]]) -> Params:
    """Compare every cell of the grid with no prediction.

    Parameters
    ----------
    rounds : str
        Packed grid of rounds.
    curves : dict
        Packed curves over the seeds by (kind, discount, patience); kind None is no prediction.
    """
    means = {cell: np.mean([unpack(one) for one in runs], axis=0) for cell, runs in curves.items()}
    plain = next(cell for cell in curves if cell[0] is None)
    floor = best_of(means[plain])
    cells = []
    for cell, mean in means.items():
        kind, discount, patience = cell
        best = best_of(mean)
        cells.append(
            {
                "kind": kind or "no prediction",
                "discount": discount,
                "patience": patience,
                "best": None if np.isnan(best) else round(best, 4),  # training diverged
                "rounds": first_reaching(unpack(rounds), mean, MARK / 100 * floor),
                "curves": curves[cell],
            }
        )
    return {"rounds": rounds, "cells": cells}


# --------------------------------------------------------------------- report


def tables_of(result: Params) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Give for every kind of prediction its name, the header, and a row per discount.

    A cell is the best NDCG@20 and the rounds to the mark.
    """
    plain = result["cells"][0]
    for kind in dict.fromkeys(cell["kind"] for cell in result["cells"][1:]):
        own = [cell for cell in result["cells"] if cell["kind"] == kind]
        patience = list(dict.fromkeys(cell["patience"] for cell in own))
        rows = [["0 (no prediction)", *[_text(plain)] * len(patience)]]
        for discount in dict.fromkeys(cell["discount"] for cell in own):
            row = [_text(cell) for cell in own if cell["discount"] == discount]
            rows.append([f"{discount:g}", *row])
        yield kind, ["discount", *(f"patience {number}" for number in patience)], rows


def _text(cell: Params) -> str:
    if cell["best"] is None:
        return "diverged"
    return f"{cell['best']:.3f} / {'never' if cell['rounds'] is None else cell['rounds']}"


def plot(results: Params, path: Path) -> None:
    """Draw the best NDCG@20 less that without prediction: a row per data set, a column per kind."""
    kinds = list(KINDS)
    figure = figure_class()(figsize=(3.6 * len(kinds), 2.8 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), len(kinds), squeeze=False)
    gains = {
        (name, kind): _gains(result, kind) for name, result in results.items() for kind in kinds
    }
    limit = max(float(np.nanmax(np.abs(gain))) for _, _, gain in gains.values()) or 1.0
    for line, name in zip(axes, results, strict=True):
        for ax, kind in zip(line, kinds, strict=True):
            discounts, patience, gain = gains[name, kind]
            image = ax.imshow(gain, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower")
            ax.set_xticks(range(len(patience)), [str(number) for number in patience])
            ax.set_yticks(range(len(discounts)), [f"{number:g}" for number in discounts])
            ax.set(title=f"{name}\n{kind}", xlabel="Patience", ylabel="Discount")
            for (row, column), value in np.ndenumerate(gain):
                dark = abs(value) > 0.6 * limit
                ax.text(column, row, f"{value:+.3f}", ha="center", va="center", fontsize=7,
                        color="white" if dark else "black")  # fmt: skip
    figure.colorbar(image, ax=axes, label="NDCG@20 gained by prediction", shrink=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _gains(result: Params, kind: str) -> tuple[list[float], list[int], Any]:
    """Discounts, patience, and how much better than no prediction (discounts x patience)."""
    own = [cell for cell in result["cells"] if cell["kind"] == kind]
    discounts = list(dict.fromkeys(cell["discount"] for cell in own))
    patience = list(dict.fromkeys(cell["patience"] for cell in own))
    best = [np.nan if cell["best"] is None else cell["best"] for cell in own]
    gain = np.array(best).reshape(len(discounts), len(patience)) - result["cells"][0]["best"]
    return discounts, patience, gain


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="of every fit")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(__doc__, SCRIPT, seeds=2, argv=argv, options=add_options)
    quick = arguments.quick
    n_seeds, n_rounds = (1, 8) if quick else (arguments.seeds, arguments.rounds)
    results: Params = {}
    for data in data_sets(arguments):
        found = measure(data, n_rounds=n_rounds, n_seeds=n_seeds, jobs=arguments.jobs, quick=quick)
        results[data.name] = {**data.sizes, **found}
        write_json(arguments, SCRIPT, report(arguments, results, n_seeds, n_rounds), [])
    if arguments.plot is not None:
        plot(results, arguments.plot)
    for name, result in results.items():
        for kind, header, rows in tables_of(result):
            print(f"\n{name}, {kind}: best NDCG@20 / rounds to {MARK}% of the best without")
            print(format_table(header, rows))
    return 0


def report(arguments: argparse.Namespace, results: Params, n_seeds: int, n_rounds: int) -> Params:
    """Collect what the JSON says besides machine."""
    return {
        "command": arguments.repeat,
        "what": {
            "split": "a random fifth of every user's items held out, PerUserHoldout(0.2)",
            "metric": "NDCG@20, users served as held, best running mean over 3 points",
            "rounds": f"to {MARK}% of the best without prediction",
            "judged_users": N_JUDGED,
            "participation": SHARE,
            "n_rounds": n_rounds,
            "seeds": list(range(n_seeds)),
            "tuning": "none",
        },
        "data": results,
    }


if __name__ == "__main__":
    raise SystemExit(main())
