"""What `hetefedrec_sizes.py` makes of its runs: summary, goals, tables and figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Goal, mean_and_spread
from _curves import figure_class, unpack
from numpy.typing import NDArray

from fedrecsk.plotting import GroupGainsDisplay, SpectrumDisplay

Params = dict[str, Any]
Cells = list[list[str]]

HETEFEDREC, ALL_SMALL, ALL_LARGE = "HeteFedRec", "All Small", "All Large"
BASELINES = (
    ALL_SMALL, ALL_LARGE, "All Large-exclusive", "Clustered", "Directly Aggregate", "Standalone",
)  # fmt: skip
NO_DECORRELATION = "- decorrelation"
ABLATIONS = ("- distillation", NO_DECORRELATION, "- dual task")
# With the data, but not competitors.
REFERENCES = ("popularity", "centralised")
GROUPS = ("small", "medium", "large")

# The goals; the first is what the paper says of MovieLens-1M.
LEAD, TRAFFIC, SECONDS = 1.159, 0.5, 60.0


# ------------------------------------------------------------------- one run


def pack(values: Sequence[float] | NDArray[np.floating[Any]]) -> str:
    """Write a curve as text of five digits: a line of JSON and not a page."""
    return " ".join(f"{value:.5f}" for value in values)


def best_of(run: Params) -> Params | None:
    """Return the moment with the best validation, None if training diverged before the first."""
    validation = unpack(run["validation"])
    if np.isnan(validation).all():
        return None
    place = int(np.nanargmax(validation))
    return {
        "epoch": run["epochs"][place],
        "validation": float(validation[place]),
        **{key: float(unpack(run[key])[place]) for key in ("ndcg@20", "recall@20")},
        "groups": {
            group: float(unpack(curves["ndcg@20"])[place])
            for group, curves in run["groups"].items()
        },
    }


def chosen_of(runs: Sequence[Params]) -> Params:
    """Choose among the candidates of a method: the best on validation, if it did not diverge."""
    tried = []
    for run in runs:
        best = best_of(run)
        validation = None if best is None else best["validation"]
        tried.append(
            {"params": run["candidate"], "validation": validation, "diverged": run["diverged"]}
        )
    survivors = [one for one in tried if not one["diverged"]] or tried
    best_one = max(survivors, key=lambda one: one["validation"] or 0.0)
    return {"chosen": best_one["params"], "tried": tried}


# ------------------------------------------------------------------- summary


def summary_of(runs: Sequence[Params], tuning: Params, data: Params) -> list[Params]:
    """Summarise the data sets and base models as they were asked for last.

    Parameters
    ----------
    runs : list of dict
        Of several runs of the same thing the last counts.
    tuning : dict
        ``tuning[base][data][method]["chosen"]``.
    data : dict
        For each data set ``plans`` and ``tuned_on``, by base model.
    """
    summary = []
    for name, about in data.items():
        for base, plan in about["plans"].items():
            tuned = tuning.get(base, {}).get(about.get("tuned_on", {}).get(base), {})
            kept: dict[str, dict[int, Params]] = {}
            for run in runs:
                here = (run["data"], run["base"], run["interactions"])
                if here != (name, base, about["interactions"]) or run["method"] not in tuned:
                    continue
                if not _as_planned(run, plan) or run["candidate"] != tuned[run["method"]]["chosen"]:
                    continue
                kept.setdefault(run["method"], {})[run["seed"]] = run
            methods = {}
            for method in tuned:  # in the order of the script
                if method in kept:
                    rows = [kept[method][seed] for seed in sorted(kept[method])]
                    methods[method] = _method_summary(rows)
            if methods:
                entry = {"data": name, "base": base, "plan": plan, "methods": methods}
                entry["lead"] = _lead(methods)
                entry["claims"] = _claims(methods, network=base != "mf")
                summary.append(entry)
    return summary


def _as_planned(run: Params, plan: Params) -> bool:
    if run["base"] == "mf" or run["method"] in REFERENCES:
        return True
    return bool(run["epochs"][-1] == plan["epochs"])


def _method_summary(runs: Sequence[Params]) -> Params:
    """Means over the seeds; each seed at the moment that its validation chose."""
    best = [found for found in map(best_of, runs) if found is not None]
    curve = np.mean([unpack(run["ndcg@20"]) for run in runs], axis=0)
    groups = {
        group: round(_mean([one["groups"][group] for one in best]), 5)
        for group in GROUPS
        if all(group in one["groups"] for one in best)
    }
    summary: Params = {
        "seeds": [run["seed"] for run in runs],
        "diverged": sum(run["diverged"] for run in runs),
        "candidate": runs[0]["candidate"],
        "ndcg@20": [one["ndcg@20"] for one in best],
        "recall@20": [one["recall@20"] for one in best],
        "groups": groups,
        "best_epoch": statistics.median(one["epoch"] for one in best) if best else None,
        "epochs": runs[0]["epochs"],
        "curve": pack(curve),
        "numbers": runs[0].get("numbers"),
    }
    for key in (
        "seconds_per_epoch", "numbers_mean", "bytes_down_per_epoch", "bytes_up_per_epoch",
        "effective_rank", "singular_value_variance",
    ):  # fmt: skip
        known = [run[key] for run in runs if run.get(key) is not None]
        summary[key] = round(_mean(known), 4) if known else None
    summary["peak_rss_mb"] = max(run["peak_rss_mb"] for run in runs)
    summary["rss_growth_mb"] = round(
        max(run["peak_rss_mb"] - run["rss_before_mb"] for run in runs), 1
    )
    return summary


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def quality(methods: Mapping[str, Params], name: str) -> float:
    """Mean NDCG@20 of a method; nan if it is not there."""
    return _mean(methods[name]["ndcg@20"]) if name in methods else math.nan


def _lead(methods: Mapping[str, Params]) -> Params | None:
    """Compare HeteFedRec with the best baseline that there is."""
    there = [name for name in BASELINES if not math.isnan(quality(methods, name))]
    if not there or math.isnan(quality(methods, HETEFEDREC)):
        return None
    best = max(there, key=lambda name: quality(methods, name))
    ratio = quality(methods, HETEFEDREC) / quality(methods, best)
    return {"best_baseline": best, "ratio": round(ratio, 4)}


def _traffic(methods: Mapping[str, Params]) -> float:
    """Numbers that a mean client of HeteFedRec receives, as a share of All Large's."""
    if HETEFEDREC not in methods or ALL_LARGE not in methods:
        return math.nan
    ours, theirs = (methods[name]["numbers_mean"] for name in (HETEFEDREC, ALL_LARGE))
    return ours / theirs if ours and theirs else math.nan


def _claims(methods: Mapping[str, Params], *, network: bool) -> Cells:
    """Put what the paper's abstract and summaries say beside what we found."""
    claims = []
    lead = _lead(methods)
    if lead is not None:
        claims.append(
            [
                "NDCG@20 over the best baseline",
                "up to +15.9% (MovieLens-1M)",
                f"{_percent(lead['ratio'])} over {lead['best_baseline']}",
            ]
        )
    traffic = _traffic(methods)
    if not math.isnan(traffic):
        claims.append(["numbers to a client / All Large's", "about half", f"{traffic:.0%}"])
    if not network or HETEFEDREC not in methods:
        return claims
    spread = [
        methods[name]["singular_value_variance"]
        for name in (HETEFEDREC, NO_DECORRELATION)
        if name in methods
    ]
    if len(spread) == 2 and None not in spread:
        claims.append(
            [
                "variance of the singular values, with / without decorrelation",
                "lower",
                f"{spread[0]:.3g} / {spread[1]:.3g}",
            ]
        )
    ours = quality(methods, HETEFEDREC)
    for name in ABLATIONS:
        if not math.isnan(quality(methods, name)):
            gain = _percent(ours / quality(methods, name))
            claims.append([f"NDCG@20 brought by {name.removeprefix('- ')}", "a gain", gain])
    return claims


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def goals_of(summary: Sequence[Params]) -> list[Goal]:
    """Compare with the best baseline, with All Large's traffic, and with a minute an epoch."""
    goals = []
    for entry in summary:
        methods, base = entry["methods"], entry["base"]
        where = f"{entry['data']}, {base}"
        if entry["lead"] is not None and base != "mf":
            what = f"{where}, NDCG@20, {HETEFEDREC} / {entry['lead']['best_baseline']}"
            target = LEAD if base == "ncf" else 1.0
            goals.append(Goal(what, entry["lead"]["ratio"], target))
        traffic = _traffic(methods)
        if not math.isnan(traffic):
            what = f"{where}, numbers to a mean client, {HETEFEDREC} / {ALL_LARGE}"
            goals.append(Goal(what, traffic, TRAFFIC, at_least=False))
        if (entry["data"], base) == ("ml-1m", "ncf") and HETEFEDREC in methods:
            seconds = methods[HETEFEDREC]["seconds_per_epoch"]
            if seconds is not None:
                what = f"{where}, seconds of an epoch of {HETEFEDREC}"
                goals.append(Goal(what, seconds, SECONDS, at_least=False))
    return goals


# -------------------------------------------------------------------- tables

Table = tuple[str, list[str], Cells]


def tables_of(summary: Sequence[Params]) -> Iterator[Table]:
    """Give title, header and rows of every table: quality, curves, costs and claims."""
    for entry in summary:
        where, methods = f"{entry['data']}, {entry['base']}", entry["methods"]
        yield f"{where}: quality, at the moment that validation chose", *_quality_table(methods)
        yield f"{where}: NDCG@20 over epochs", *_curve_table(methods)
        yield f"{where}: costs and spectrum", *_cost_table(methods)
        if entry["claims"]:
            yield f"{where}: the paper and here", ["claim", "paper", "here"], entry["claims"]


def _quality_table(methods: Mapping[str, Params]) -> tuple[list[str], Cells]:
    header = ["", "NDCG@20", "recall@20", *(f"NDCG@20, {g}" for g in GROUPS), "epoch", "settings"]
    rows = []
    for name, method in methods.items():
        row = [name]
        if method["ndcg@20"]:
            for key in ("ndcg@20", "recall@20"):
                mean, spread = mean_and_spread(method[key])
                row.append(f"{mean:.4f} ± {spread:.4f}" if len(method[key]) > 1 else f"{mean:.4f}")
        else:
            row += ["diverged", ""]
        row += [_number(method["groups"].get(group), ".4f") for group in GROUPS]
        row += [_number(method["best_epoch"], "g"), words(method["candidate"])]
        rows.append(row)
    return header, rows


def words(candidate: Params) -> str:
    """Write settings shortly."""
    if not candidate:
        return "the defaults"
    known = dict(candidate)
    parts = []
    for side, prefix in (("local", ""), ("server", "server_")):
        optimizer = known.pop(f"{prefix}optimizer", None)
        rate = known.pop(f"{prefix}learning_rate", None)
        if optimizer is not None:
            parts.append(f"{side} {optimizer} {rate:g}")
    parts += [f"{name} {value}" for name, value in known.items()]
    return ", ".join(parts)


def _curve_table(methods: Mapping[str, Params]) -> tuple[list[str], Cells]:
    """One column a moment; references, whose moments are others, are left out."""
    shown = {name: method for name, method in methods.items() if name not in REFERENCES}
    epochs: list[float] = max((method["epochs"] for method in shown.values()), key=len, default=[])
    rows = [
        [name, *(f"{value:.4f}".replace("nan", "–") for value in unpack(method["curve"]))]
        for name, method in shown.items()
    ]
    return ["", *(f"epoch {epoch:g}" for epoch in epochs)], rows


COSTS = (
    ("s an epoch", "seconds_per_epoch", ".2f", 1.0),
    ("peak MB", "peak_rss_mb", ".0f", 1.0),
    ("of it grown", "rss_growth_mb", ".0f", 1.0),
    ("numbers to a client", "numbers_mean", ",.0f", 1.0),
    ("MB down an epoch", "bytes_down_per_epoch", ".1f", 1e-6),
    ("MB up an epoch", "bytes_up_per_epoch", ".1f", 1e-6),
    ("effective rank", "effective_rank", ".1f", 1.0),
    ("variance of singular values", "singular_value_variance", ".3f", 1.0),
)


def _cost_table(methods: Mapping[str, Params]) -> tuple[list[str], Cells]:
    header = ["", *(title for title, *_ in COSTS), "numbers by size"]
    rows = []
    for name, method in methods.items():
        row = [name]
        row += [_number(method[key], style, scale) for _, key, style, scale in COSTS]
        numbers = method["numbers"] or {}
        row.append(", ".join(f"{size}: {count:,}" for size, count in numbers.items()))
        rows.append(row)
    return header, rows


def _number(value: float | None, style: str, scale: float = 1.0) -> str:
    return "" if value is None or math.isnan(value) else format(scale * value, style)


# ------------------------------------------------------------------- figures


def draw(summary: Sequence[Params], runs: Sequence[Params], folder: Path) -> None:
    """Draw gains by group, curves, and spectra: one panel for each data set and base."""
    folder.mkdir(parents=True, exist_ok=True)
    _draw_groups(summary, folder / "hetefedrec_groups.png")
    _draw_curves(summary, folder / "hetefedrec_curves.png")
    _draw_spectra(summary, runs, folder / "hetefedrec_spectrum.png")


def _panels(entries: Sequence[Params], height: float) -> tuple[Any, list[Any]]:
    figure = figure_class()(figsize=(5.2 * len(entries), height), layout="constrained")
    axes = figure.subplots(1, len(entries), squeeze=False)[0]
    for ax, entry in zip(axes, entries, strict=True):
        ax.set_title(f"{entry['data']}, {entry['base']}")
    return figure, list(axes)


def _draw_groups(summary: Sequence[Params], path: Path) -> None:
    """Relative gain of the methods over All Small in each group."""
    # Clients alone are so far below that nothing else could be told apart.
    shown = [name for name in (HETEFEDREC, *BASELINES) if name != "Standalone"]
    panels = []
    for entry in summary:
        values = {
            name: [entry["methods"][name]["groups"][group] for group in GROUPS]
            for name in shown
            if name in entry["methods"] and len(entry["methods"][name]["groups"]) == len(GROUPS)
        }
        if len(values) > 1 and min(values.get(ALL_SMALL, [0.0])) > 0:
            panels.append((entry, values))
    if not panels:
        return
    figure, axes = _panels([entry for entry, _ in panels], 4.5)
    for ax, (_, values) in zip(axes, panels, strict=True):
        GroupGainsDisplay(groups=GROUPS, values=values, baseline=ALL_SMALL).plot(ax)
    figure.savefig(path, dpi=150)


def _draw_curves(summary: Sequence[Params], path: Path) -> None:
    """NDCG@20 over epochs, mean over the seeds."""
    if not summary:
        return
    figure, axes = _panels(summary, 4)
    for ax, entry in zip(axes, summary, strict=True):
        for name in (HETEFEDREC, *BASELINES):
            if name in entry["methods"]:
                method = entry["methods"][name]
                width = 2.5 if name == HETEFEDREC else 1.5
                ax.plot(method["epochs"], unpack(method["curve"]), label=name, linewidth=width,
                        marker="o", markersize=3)  # fmt: skip
        ax.set(xlabel="Epoch", ylabel="NDCG@20")
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _draw_spectra(summary: Sequence[Params], runs: Sequence[Params], path: Path) -> None:
    """Eigenvalues of the widest table with and without decorrelation, first seed."""
    labels = {HETEFEDREC: "with decorrelation", NO_DECORRELATION: "without"}
    panels = []
    for entry in summary:
        tables = {}
        for name, label in labels.items():
            if name not in entry["methods"] or entry["base"] == "mf":
                continue
            candidate = entry["methods"][name]["candidate"]
            for run in runs:
                here = (run["data"], run["base"], run["method"], run["candidate"])
                if here == (entry["data"], entry["base"], name, candidate) and _as_planned(
                    run, entry["plan"]
                ):
                    root = run.get("table_root")
                    if root is not None:
                        tables[label] = table_of(root)
        if tables:
            panels.append((entry, tables))
    if not panels:
        return
    figure, axes = _panels([entry for entry, _ in panels], 4)
    for ax, (_, tables) in zip(axes, panels, strict=True):
        SpectrumDisplay(tables=tables).plot(ax)
    figure.savefig(path, dpi=150)


def table_of(root: Sequence[str]) -> NDArray[np.float64]:
    """Return a table with the correlations of the one that `root` was made of."""
    rows = np.array([unpack(row) for row in root])
    return np.concatenate([rows, -rows])
