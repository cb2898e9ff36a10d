"""What smaller uploads, and secure sums, cost: NDCG@20 against megabytes sent by all clients.

FedAvg with sampled negatives, FedFNN and HeteFedRec with the whole-data objective, all with their
defaults, under three kinds of compression at several levels, with error feedback and without; and
secure aggregation with numbers of several lengths. A random 20% of every user's interactions are
held out, another one for each seed. Megabytes are those of all clients in all rounds, upwards.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from _common import Data, Goal, format_table, load, mean_and_spread, one_thread, say, write_json
from _curves import Params, figure_class, parse
from joblib import Parallel, delayed

from fedrecsk import FedAvgRecommender, FedFNNRecommender, HeteFedRecRecommender
from fedrecsk.metrics import evaluate
from fedrecsk.model_selection import PerUserHoldout

SCRIPT = "compression"
METHODS = {
    "FedAvg, bce": FedAvgRecommender,
    "FedFNN, whole-data": FedFNNRecommender,
    "HeteFedRec, whole-data": HeteFedRecRecommender,
}
LEVELS: dict[str, tuple[float, ...]] = {
    "top-k": (0.1, 0.3),
    "quantised": (2, 4),
    "low-rank": (1, 4),
}
BITS = (16, 24, 32)
HEADER = ["", "MB up", "with error feedback", "MB up", "without"]
SECURE_HEADER = ["", "MB up", "MB down", "NDCG@20", "less than plain sums"]


def settings(*, quick: bool) -> list[Params]:
    """List what estimators are fitted with, the plain one first."""
    found: list[Params] = [{}]
    for kind, levels in LEVELS.items():
        for level in levels[:1] if quick else levels:
            found += [
                {"compression": kind, "compression_level": level, "error_feedback": feedback}
                for feedback in (True, False)
            ]
    bits = BITS[:1] if quick else BITS
    return found + [{"secure_aggregation": True, "secure_bits": number} for number in bits]


def fit(data: Data, method: str, params: Params, n_rounds: int, seed: int) -> Params:
    """Fit once; what came of it and what was sent."""
    train, test = next(PerUserHoldout(random_state=seed).split(data.X))
    model = METHODS[method](n_rounds=n_rounds, random_state=seed, device="cpu", **params)
    with one_thread():
        model.fit(data.X[train])
        found = evaluate(model, data.X[test], metrics="ndcg", k=20).overall["ndcg@20"]
    up, down = (sum(r[name] for r in model.history_) / 1e6 for name in ("bytes_up", "bytes_down"))
    say(f"{data.name}, {method}, seed {seed}, {params}: {found:.4f}, {up:.1f} MB")
    return {"ndcg@20": float(found), "mb_up": round(up, 3), "mb_down": round(down, 3)}


def measure(data: Data, *, n_rounds: int, seed: int, jobs: int, quick: bool) -> list[Params]:
    """Fit everything once on one data set; a row per method and setting."""
    cells = [(method, params) for method in METHODS for params in settings(quick=quick)]
    fits = Parallel(n_jobs=jobs)(
        delayed(fit)(data, method, params, n_rounds, seed) for method, params in cells
    )
    return [
        {"method": method, **params, **{name: [value] for name, value in found.items()}}
        for (method, params), found in zip(cells, fits, strict=True)
    ]


def joined(rows: Sequence[Params], more: Sequence[Params]) -> list[Params]:
    """Put the values of another seed behind those of the seeds before."""
    if not rows:
        return list(more)
    return [
        {
            name: value + new[name] if isinstance(value, list) else value
            for name, value in row.items()
        }
        for row, new in zip(rows, more, strict=True)
    ]


# --------------------------------------------------------------------- report


def plain_of(rows: Sequence[Params], method: str) -> Params:
    """Return the row of a method without anything."""
    return next(
        row
        for row in rows
        if row["method"] == method and not {"compression", "secure_aggregation"} & set(row)
    )


def tables_of(result: Params) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Give for every method a table of compression and one of secure sums."""
    rows = result["rows"]
    for method in dict.fromkeys(row["method"] for row in rows):
        plain, own = plain_of(rows, method), [row for row in rows if row["method"] == method]
        cells = [["as they are", *_cells(plain), "", ""]]
        packed = [row for row in own if "compression" in row]
        for kind, level in dict.fromkeys(
            (r["compression"], r["compression_level"]) for r in packed
        ):
            pair = {
                row["error_feedback"]: _cells(row)
                for row in packed
                if (row["compression"], row["compression_level"]) == (kind, level)
            }
            cells.append([f"{kind}, {level_text(kind, level)}", *pair[True], *pair[False]])
        yield f"{method}: compression, NDCG@20", HEADER, cells
        secure = [row for row in own if "secure_aggregation" in row]
        lines = [
            [
                f"{row['secure_bits']} bits",
                _megabytes(row["mb_up"]),
                _megabytes(row["mb_down"]),
                _spread(row),
                f"{loss_of(row, plain):.4f}",
            ]
            for row in secure
        ]
        first = ["plain sums", _megabytes(plain["mb_up"]), _megabytes(plain["mb_down"])]
        lines.insert(0, [*first, _spread(plain), ""])
        yield f"{method}: secure aggregation", SECURE_HEADER, lines


def level_text(kind: str, level: float) -> str:
    """Say what a level is."""
    if kind == "top-k":
        return f"{100 * level:g}% of the rows"
    return f"{level:g} bits" if kind == "quantised" else f"rank {level:g}"


def loss_of(row: Params, plain: Params) -> float:
    """Mean over the seeds of what is lost against plain sums."""
    pairs = zip(plain["ndcg@20"], row["ndcg@20"], strict=True)
    return statistics.fmean(before - after for before, after in pairs)


def _cells(row: Params) -> list[str]:
    return [_megabytes(row["mb_up"]), _spread(row)]


def _spread(row: Params) -> str:
    mean, spread = mean_and_spread(row["ndcg@20"])
    return f"{mean:.4f} ± {spread:.4f}" if len(row["ndcg@20"]) > 1 else f"{mean:.4f}"


def _megabytes(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):,.1f}"


def goals_of(name: str, rows: Sequence[Params]) -> list[Goal]:
    """Ask for an eighth of the bytes at 99.5% of the NDCG, and for 32 bits without a loss."""
    goals = []
    for method in METHODS:
        plain = plain_of(rows, method)
        best, mean = statistics.fmean(plain["mb_up"]), statistics.fmean(plain["ndcg@20"])
        enough = [
            best / statistics.fmean(row["mb_up"])
            for row in rows
            if row["method"] == method
            and "compression" in row
            and statistics.fmean(row["ndcg@20"]) >= 0.995 * mean
        ]
        what = f"{name}, {method}: times fewer MB up at 99.5% of the NDCG@20"
        goals.append(Goal(what, max(enough, default=0.0), 8.0))
        secure = [row for row in rows if row["method"] == method and "secure_bits" in row]
        last = max(secure, key=lambda row: row["secure_bits"])
        loss = abs(loss_of(last, plain))
        what = f"{name}, {method}: NDCG@20 changed by {last['secure_bits']} bits"
        goals.append(Goal(what, loss, 0.001, at_least=False))
    return goals


def plot(results: Params, path: Path) -> None:
    """Draw NDCG@20 against megabytes: a row per data set, a column per method."""
    figure = figure_class()(figsize=(5.2 * len(METHODS), 3.8 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), len(METHODS), squeeze=False)
    colours = dict(zip(LEVELS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for line, (name, result) in zip(axes, results.items(), strict=True):
        for ax, method in zip(line, METHODS, strict=True):
            own = [row for row in result["rows"] if row["method"] == method]
            for kind, colour in colours.items():
                for feedback, style in ((True, "-o"), (False, "--o")):
                    points = sorted(
                        _point(row)
                        for row in own
                        if row.get("compression") == kind and row["error_feedback"] == feedback
                    )
                    label = f"{kind}{'' if feedback else ', no error feedback'}"
                    face = colour if feedback else "white"
                    ax.plot(*zip(*points, strict=True), style, color=colour, mfc=face, label=label)
            points = [_point(row) for row in own if "secure_bits" in row]
            ax.plot(*zip(*points, strict=True), "s", color="tab:red", label="secure aggregation")
            ax.plot(*_point(plain_of(own, method)), "k*", ms=12, label="as they are")
            ax.set(xscale="log", title=f"{name}, {method}", xlabel="MB sent by all clients")
            ax.grid(alpha=0.3)
        line[0].set_ylabel("NDCG@20")
    axes[0][-1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _point(row: Params) -> tuple[float, float]:
    return statistics.fmean(row["mb_up"]), statistics.fmean(row["ndcg@20"])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="of every fit")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(__doc__, SCRIPT, seeds=3, argv=argv, options=add_options)
    quick = arguments.quick
    n_seeds, n_rounds = (1, 4) if quick else (arguments.seeds, arguments.rounds)
    sets = load(arguments.data, quick=quick)
    results: Params = {data.name: {**data.sizes, "rows": []} for data in sets}
    goals: list[Goal] = []
    for seed in range(n_seeds):
        for data in sets:
            own = measure(data, n_rounds=n_rounds, seed=seed, jobs=arguments.jobs, quick=quick)
            results[data.name]["rows"] = joined(results[data.name]["rows"], own)
        if not quick:
            goals = [g for name, result in results.items() for g in goals_of(name, result["rows"])]
        # After every seed: a run that is cut short leaves whole seeds behind.
        write_json(arguments, SCRIPT, report(arguments, results, seed + 1, n_rounds), goals)
    if arguments.plot is not None:
        plot(results, arguments.plot)
    for name, result in results.items():
        for heading, header, lines in tables_of(result):
            print(f"\n{name}, {heading}")
            print(format_table(header, lines))
    for goal in goals:
        print(goal)
    return 0


def report(arguments: argparse.Namespace, results: Params, n_seeds: int, n_rounds: int) -> Params:
    """Collect what the JSON says besides machine."""
    return {
        "command": arguments.repeat,
        "what": {
            "split": "a random fifth of every user's items held out, PerUserHoldout(0.2)",
            "n_rounds": n_rounds,
            "seeds": list(range(n_seeds)),
            "tuning": "none: defaults",
        },
        "data": results,
    }


if __name__ == "__main__":
    raise SystemExit(main())
