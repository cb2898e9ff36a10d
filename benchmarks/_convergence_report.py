"""What `fedfnn_convergence.py` reads off its curves: marks, comparisons, goals, tables, figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import Goal
from _curves import Params, best_of, fewer, figure_class, first_reaching, unpack
from numpy.typing import NDArray

FEDAVG, FEDFAST, MLP = "FedAvg", "FedFast", "mlp, literal"
BCE_DEFAULT, WHOLE_DEFAULT = "FedFNN, bce", "FedFNN"
WITHOUT = "without prediction"
PROTOCOLS = {"held": "users served as held", "refit": "users refit before being served"}
MARKS = (90, 95, 99)  # percent of FedAvg's best
GOAL_MARK = 95


def curve_of(measured: Params, name: str, protocol: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return rounds and curves (n_seeds, n_points); the default of FedFNN has one set for all."""
    if name == WHOLE_DEFAULT:
        protocol = "refit"
    method = measured[name]
    curves = np.array([unpack(run[protocol]) for run in method["runs"]])
    return unpack(method["rounds"][protocol]), curves


def derive(measured: Params, protocol: str) -> Params:
    """Find every method's rounds to the marks that FedAvg sets, and compare them."""
    shown = [
        name
        for name, method in measured.items()
        if protocol in method["rounds"] or name == WHOLE_DEFAULT
    ]
    grids = {name: curve_of(measured, name, protocol)[0] for name in shown}
    means = {name: curve_of(measured, name, protocol)[1].mean(axis=0) for name in shown}
    best = {name: best_of(means[name]) for name in shown}
    reached = {
        name: {
            str(mark): first_reaching(grids[name], means[name], mark / 100 * best[FEDAVG])
            for mark in MARKS
        }
        for name in shown
    }

    def against(name: str, other: str) -> Params:
        last = int(grids[other][-1])
        return {m: fewer(reached[other][m], last, reached[name][m]) for m in map(str, MARKS)}

    rows: Params = {}
    for name in shown:
        without = measured[name]["without"]
        rows[name] = {
            "best": _number(best[name]),
            "final": _number(float(means[name][-1])),
            "rounds": reached[name],
            "fewer than FedAvg": against(name, FEDAVG),
            "fewer than FedFast": against(name, FEDFAST),
            WITHOUT: without,
            f"fewer than {WITHOUT}": against(name, without) if without else None,
        }
    return {"best of FedAvg": _number(best[FEDAVG]), "methods": rows}


def goals_of(where: str, derived: Params) -> list[Goal]:
    """Fewer rounds at no lower final NDCG, and what prediction itself is worth."""
    mark, goals = str(GOAL_MARK), []
    for protocol, served in PROTOCOLS.items():
        rows = derived[protocol]["methods"]
        floor = max(rows[name]["best"] or 0.0 for name in (FEDAVG, FEDFAST))
        for name, target in ((BCE_DEFAULT, 5.0), (WHOLE_DEFAULT, 30.0)):
            row, what = rows[name], f"{where}, {served}, {name}"
            for other in (FEDAVG, FEDFAST):
                ratio = row[f"fewer than {other}"][mark]
                goals.append(Goal(f"{what}, times fewer rounds than {other}", ratio, target))
            what = f"{what}, final NDCG@20 against the best of both baselines"
            goals.append(Goal(what, row["final"] or 0.0, floor))
        ratio = rows[BCE_DEFAULT][f"fewer than {WITHOUT}"][mark]
        what = f"{where}, {served}, times fewer rounds by prediction itself (stretch)"
        goals.append(Goal(what, ratio, 2.0))
    return goals


def _number(value: float) -> float | None:
    """Round for JSON, which has no nan."""
    return round(value, 4) if math.isfinite(value) else None


# --------------------------------------------------------------------- report

HEADER = ["", "90%", "95%", "99%", "÷ FedAvg", "÷ FedFast", "÷ no prediction", "best", "final"]


def rows_of(derived: Params) -> list[list[str]]:
    """Cells of a table for one participation and way of serving; ratios at 95%.

    ``>`` stands where the other method never got there.
    """
    methods, rows, mark = derived["methods"], [], str(GOAL_MARK)
    for name, row in methods.items():
        cells = [name, *("never" if at is None else str(at) for at in row["rounds"].values())]
        for other in (FEDAVG, FEDFAST, row[WITHOUT]):
            compared = row[f"fewer than {other if other in (FEDAVG, FEDFAST) else WITHOUT}"]
            if compared is None or not compared[mark]:
                cells.append("")
                continue
            bound = "> " if methods[other]["rounds"][mark] is None else ""
            cells.append(f"{bound}{compared[mark]:.1f}")
        for key in ("best", "final"):
            cells.append("diverged" if row[key] is None else f"{row[key]:.4f}")
        rows.append(cells)
    return rows


def title(name: str, share: str, protocol: str, derived: Params) -> str:
    """Say what a table is about."""
    best = derived["best of FedAvg"]
    return (
        f"{name}, {100 * float(share):g}% of the clients, {PROTOCOLS[protocol]}; "
        f"FedAvg's best: {best:.4f}"
    )


def tables_of(results: Params) -> Iterator[tuple[str, list[list[str]]]]:
    """Give title and rows of every table."""
    for name, result in results.items():
        for share, entry in result["participation"].items():
            for protocol, derived in entry["derived"].items():
                yield title(name, share, protocol, derived), rows_of(derived)


COST_HEADER = ["", "R²", "cosine", "rounds predicted", "ms a round", "of it the meta-network"]


def cost_rows(measured: Params) -> list[list[str]]:
    """How well predictors predict, and what a round costs; means over the seeds."""
    rows = []
    for name, method in measured.items():
        cells = [name]
        for key, scale, style in (
            ("predictor_r2", 1, ".3f"),
            ("predictor_cosine", 1, ".3f"),
            ("rounds_predicted", 1, ".0%"),
            ("seconds_per_round", 1e3, ".1f"),
            ("meta_network_share", 1, ".0%"),
        ):
            known = [run[key] for run in method["runs"] if run.get(key) is not None]
            cells.append(format(scale * statistics.fmean(known), style) if known else "")
        rows.append(cells)
    return rows


def apart_rows(measured: Params, protocol: str) -> tuple[list[str], list[list[str]]]:
    """NDCG@20 of users who took part and of those who did not yet, at a few rounds of seed 0."""
    header, rows = [""], []
    for name in (FEDAVG, FEDFAST, MLP, "+ newton server", BCE_DEFAULT):
        points = [text.split() for text in measured[name]["runs"][0]["apart"][protocol]]
        if len(points) >= len(header):
            header = ["", *(f"round {point[0]}" for point in points)]
        sides = [" / ".join(value.replace("nan", "–") for value in point[2:]) for point in points]
        rows.append([name, *sides])
    return header, [row + [""] * (len(header) - len(row)) for row in rows]


def plot(results: Params, path: Path) -> None:
    """Draw NDCG@20 over rounds: a column per data set and participation, a row per serving."""
    drawn = (FEDAVG, FEDFAST, MLP, BCE_DEFAULT, WHOLE_DEFAULT)
    panels = [
        (f"{name}, {100 * float(share):g}%", entry["measured"])
        for name, result in results.items()
        for share, entry in result["participation"].items()
    ]
    figure = figure_class()(figsize=(4.2 * len(panels), 7), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for line, protocol in zip(axes, PROTOCOLS, strict=True):
        for ax, (name, measured) in zip(line, panels, strict=True):
            for method in drawn:
                rounds, curves = curve_of(measured, method, protocol)
                ax.plot(rounds, curves.mean(axis=0), label=method)
                ax.fill_between(rounds, curves.min(axis=0), curves.max(axis=0), alpha=0.2)
            ax.set(title=f"{name}, {protocol}", xscale="log", xlabel="Round", ylabel="NDCG@20")
            ax.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
