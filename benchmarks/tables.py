"""Rewrite the tables of the READMEs and of pages in docs from the JSON that the scripts wrote.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``; `SECTIONS` (benchmarks/README.md),
`SUMMARIES` (README.md), `OF_SCALE` (docs/scale.md), `OF_ROBUST` (docs/robust.md),
`OF_COMMUNICATION` (docs/communication.md) and `OF_RELIABILITY` (docs/reliability.md) say which. A
place stays as it is while there is no result for it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _convergence_report as convergence
import _sizes_report as sizes
import accuracy
import attacks
import compression
import faults
import fedfnn_cost as cost
import fedfnn_sensitivity as sensitivity
import fedfnn_streaming as streaming
import fellrec_balance as balance
import fellrec_split as split
import privacy
import reliability
import round_profile as profile
import scale
from _common import RESULTS, paired_ratio

HERE = Path(__file__).parent
Report = dict[str, Any]
# Name of a place, the result that fills it, and how.
Places = Mapping[str, tuple[str, Callable[[Report], str]]]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table with the first column to the left and numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def accuracy_section(report: Report) -> str:
    """One table a data set: means over the seeds."""
    parts = [origin(report)]
    for name, compared in report["data"].items():
        rows = [
            [
                f"{run['method']}, {run['setting']}",
                accuracy.spread_out(run["ndcg@20"]),
                accuracy.spread_out(run["recall@20"]),
                f"{statistics.median(run['seconds']):.2f}",
            ]
            for run in compared["results"]
        ]
        parts.append(f"**{accuracy.headline(name, compared)}**")
        parts.append(markdown(["", "NDCG@20", "recall@20", "seconds of a fit"], rows))
        chosen = [
            f"{method}: {_words(tuning['chosen'])}" for method, tuning in compared["tuning"].items()
        ]
        if chosen:
            parts.append(f"Tuned: {'; '.join(chosen)}.")
    return "\n\n".join([*parts, *goals(report)])


def accuracy_summary(report: Report) -> str:
    """One table: NDCG@20 of every method on every data set."""
    cells: dict[str, dict[str, str]] = {}
    for name, compared in report["data"].items():
        for run in compared["results"]:
            row = f"{run['method']}, {run['setting']}"
            cells.setdefault(row, {})[name] = f"{statistics.fmean(run['ndcg@20']):.3f}"
    return _by_data(cells, list(report["data"]))


def cohort_speed_section(report: Report) -> str:
    """One table a data set: medians over the runs, and how they compare with the engine."""
    parts = [origin(report)]
    for name, result in report["data"].items():
        rows = []
        for contender, values in result["seconds"].items():
            median = statistics.median(values)
            speed = ratio = ""
            if not contender.startswith("whole-data"):  # no examples, and another objective
                speed = f"{result['examples'] / median / 1e6:.2f}"
                ratio = f"{paired_ratio(values, _engine(result, contender)):.1f}"
            rows.append([contender, f"{median:.3f}", speed, ratio])
        parts.append(
            f"**{name}: {result['users']:,} clients, {result['examples']:,} examples a round**"
        )
        header = ["", "seconds", "million examples/s", "times the engine's seconds"]
        parts.append(markdown(header, rows))
    return "\n\n".join([*parts, *goals(report)])


def cohort_speed_summary(report: Report) -> str:
    """One table: seconds of a round of every contender on every data set."""
    cells: dict[str, dict[str, str]] = {}
    for name, result in report["data"].items():
        for contender, values in result["seconds"].items():
            if not contender.endswith("full batch"):
                cells.setdefault(contender, {})[name] = f"{statistics.median(values):.3f} s"
    return _by_data(cells, list(report["data"]))


def round_profile_section(report: Report) -> str:
    """One table a model: seconds by phase, beside what was counted."""
    limits = report["limits"]
    can = (
        f"One thread reached {limits['flops'] / 1e9:.0f} Gflop/s, {limits['bytes'] / 1e9:.1f} GB/s "
        f"and {limits['rows'] / 1e6:.0f} million random rows/s."
    )
    parts = [f"{origin(report)} {can}"]
    for name, result in report["data"].items():
        for kind, entry in result["models"].items():
            parts += [f"**{name}, {kind}**", markdown(profile.HEADER, profile.rows_of(entry))]
    return "\n\n".join(parts)


def other_engines_section(report: Report) -> str:
    """One table a data set of what was timed against what."""
    parts = [origin(report)]
    for name, result in report["data"].items():
        rows = [
            [f"{what}, {n} {'thread' if n == '1' else 'threads'}", _median(seconds[n])]
            for what, seconds in result["threads"].items()
            for n in ("1", "2")
        ]
        if "ranking" in result:
            for who, seconds in result["ranking"]["seconds"].items():
                rows.append([f"top 20 of all users, {who}", _median(seconds)])
        if "flower" in result:
            timed = result["flower"]
            rows.append(["a round, engine", _median(timed["engine"])])
            for kind in ("training", "idle"):
                what = f"a round, Flower with {kind} clients, scaled up"
                rows.append([what, f"{timed[kind]['a_round']:.1f}"])
        parts += [f"**{name}**", markdown(["", "seconds"], rows)]
    return "\n\n".join([*parts, *goals(report)])


def _median(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f}"


def whole_data_section(report: Report) -> str:
    """One table a data set: variants by participation."""
    parts = [origin(report)]
    for result in report["results"]:
        cells: dict[str, dict[str, str]] = {}
        for run in result["rows"]:
            share = f"{100 * run['participation']:g}% of clients"
            mean = f"{run['ndcg@20']:.4f} ± {run['spread']:.4f}"
            cells.setdefault(run["variant"], {})[share] = mean
        shares = list(next(iter(cells.values())))
        parts += [f"**{result['data']}**, NDCG@20", _by_data(cells, shares)]
    return "\n\n".join([*parts, *goals(report)])


def fedfnn_convergence_section(report: Report) -> str:
    """Tables of rounds by data set, participation and serving; then costs, ever and never."""
    parts = [origin(report)]
    for heading, rows in convergence.tables_of(report["data"]):
        parts += [f"**{heading}**", markdown(convergence.HEADER, rows)]
    for name, result in report["data"].items():
        for share, entry in result["participation"].items():
            measured, where = entry["measured"], f"{name}, {100 * float(share):g}% of the clients"
            parts.append(f"**{where}: the meta-network**, means over the seeds")
            parts.append(markdown(convergence.COST_HEADER, convergence.cost_rows(measured)))
            parts.append(f"**{where}: NDCG@20 of users who took part / who never did**, as held")
            parts.append(markdown(*convergence.apart_rows(measured, "held")))
    tuning = report["tuning"]
    chosen = "; ".join(
        f"{method}: {_words(entry['chosen'])}" for method, entry in tuning["methods"].items()
    )
    parts.append(f"Tuned on {tuning['data']} at {100 * tuning['participation']:g}%: {chosen}.")
    return "\n\n".join([*parts, *goals(report)])


def fedfnn_convergence_summary(report: Report) -> str:
    """One table: rounds to the middle mark, by data set, participation and way of serving."""
    shown = (
        convergence.FEDAVG,
        convergence.FEDFAST,
        convergence.MLP,
        convergence.BCE_DEFAULT,
        convergence.WHOLE_DEFAULT,
    )
    cells: dict[str, dict[str, str]] = {}
    columns = []
    for name, result in report["data"].items():
        for share, entry in result["participation"].items():
            for protocol, derived in entry["derived"].items():
                columns.append(f"{name}, {100 * float(share):g}%, {protocol}")
                for method in shown:
                    reached = derived["methods"][method]["rounds"][str(convergence.GOAL_MARK)]
                    row = cells.setdefault(method, {})
                    row[columns[-1]] = "never" if reached is None else str(reached)
    return _by_data(cells, columns)


def fedfnn_sensitivity_section(report: Report) -> str:
    """One table for each data set and kind of prediction."""
    parts = [origin(report)]
    for name, result in report["data"].items():
        for kind, header, rows in sensitivity.tables_of(result):
            parts += [f"**{name}; {kind}**", markdown(header, rows)]
    return "\n\n".join(parts)


def fedfnn_streaming_section(report: Report) -> str:
    """One table a data set for the stream, and one for the hard cases."""
    parts = [origin(report)]
    parts += [markdown(*streaming.stream_cells(result)) for result in report["streams"]]
    parts.append(markdown(*streaming.hard_cells(report["hard_cases"])))
    return "\n\n".join([*parts, *goals(report)])


def fedfnn_cost_section(report: Report) -> str:
    """One table a data set."""
    parts = [origin(report)]
    for name, result in report["data"].items():
        parts.append(markdown([name, *cost.HEADER[1:]], cost.table(result["rows"])))
    return "\n\n".join([*parts, *goals(report)])


def fellrec_balance_section(report: Report) -> str:
    """One table for each data set and backend, and what was chosen on the validation part."""
    parts = [origin(report)]
    for name, kinds in report["data"].items():
        for kind, compared in kinds.items():
            parts.append(
                f"**{name}, {kind}: {compared['users']:,} users, {compared['test_users']:,} "
                f"of them judged, {compared['items']:,} items, {compared['rounds']} rounds**"
            )
            parts.append(markdown(balance.HEADER, balance.table(compared)))
            chosen = [
                f"{family}: {_words(tuning['chosen'])}"
                for family, tuning in compared["tuning"].items()
            ]
            parts.append(f"Tuned: {'; '.join(chosen)}.")
    return "\n\n".join([*parts, *goals(report)])


def fellrec_balance_summary(report: Report) -> str:
    """One table: recall@10 of every method on every data set, without its variants."""
    cells: dict[str, dict[str, str]] = {}
    columns = []
    for name, kinds in report["data"].items():
        for kind, compared in kinds.items():
            columns.append(f"{name}, {kind}")
            for method, result in compared["results"].items():
                if method not in balance.ABLATIONS:
                    value = statistics.fmean(result["recall@10"])
                    cells.setdefault(method, {})[columns[-1]] = f"{value:.4f}"
    return _by_data(cells, columns)


def fellrec_split_section(report: Report) -> str:
    """Tables of what each side holds and takes, what can be read, and how fast clients train."""
    parts = [origin(report)]
    for name, models in report["data"].items():
        for heading, header, rows in split.tables_of(models):
            parts += [f"**{name}; {heading}**", markdown(header, rows)]
    return "\n\n".join([*parts, *goals(report)])


def fellrec_split_summary(report: Report) -> str:
    """One table: the smallest real client of every model, and what is left to read."""
    rows = [
        [f"{model}, {name}", *split.summary_cells(result)]
        for name, models in report["data"].items()
        for model, result in models.items()
    ]
    return markdown(["", *split.SUMMARY], rows)


def hetefedrec_sizes_section(report: Report) -> str:
    """Quality, curves, costs and claims of every data set and base model."""
    parts = [origin(report)]
    for heading, header, rows in sizes.tables_of(report["summary"]):
        parts += [f"**{heading}**", markdown(header, rows)]
    return "\n\n".join([*parts, *goals(report)])


def hetefedrec_sizes_summary(report: Report) -> str:
    """One table: NDCG@20 of HeteFedRec, its baselines and the references."""
    shown = (sizes.HETEFEDREC, *sizes.BASELINES, *sizes.REFERENCES)
    cells: dict[str, dict[str, str]] = {name: {} for name in shown}
    columns = []
    for entry in report["summary"]:
        columns.append(f"{entry['data']}, {entry['base']}")
        for name in shown:
            value = sizes.quality(entry["methods"], name)
            if not math.isnan(value):
                cells[name][columns[-1]] = f"{value:.3f}"
    return _by_data({name: row for name, row in cells.items() if row}, columns)


def scale_section(report: Report) -> str:
    """One table for the large point, and one for each objective."""
    parts = [origin(report)]
    for heading, rows in scale.tables_of(report):
        parts += [f"**{heading}**", markdown(scale.HEADER, rows)]
    return "\n\n".join([*parts, *goals(report)])


def privacy_section(report: Report) -> str:
    """Write a table for each data set and kind of noise."""
    parts = [origin(report)]
    for heading, header, rows in privacy.tables_of(report):
        parts += [f"**{heading}**", markdown(header, rows)]
    chosen = [f"{name}: {_words(params)}" for name, params in report["chosen"].items()]
    parts.append(f"Chosen: {'; '.join(chosen)}.")
    return "\n\n".join([*parts, *goals(report)])


def scale_summary(report: Report) -> str:
    """One table: the large point, and how much the others matter who take no part."""
    return markdown(*scale.summary(report))


def faults_section(report: Report) -> str:
    """Tables of every data set: who is there and delivers, and who is in time."""
    parts = [origin(report)]
    for name, result in report["data"].items():
        for heading, header, rows in faults.tables_of(result["rows"]):
            parts += [f"**{name}, {heading}**, NDCG@20", markdown(header, rows)]
    return "\n\n".join([*parts, *goals(report)])


def attacks_section(report: Report) -> str:
    """Tables of every data set and method: ranking, and exposure of what is promoted."""
    parts = [origin(report)]
    for name, result in report["data"].items():
        rows = result["rows"]
        for method in dict.fromkeys(row["method"] for row in rows):
            for key, title in (("ndcg@20", "NDCG@20"), ("er@10", "ER@10 of the target")):
                parts.append(f"**{name}, {method}**, {title}")
                parts.append(markdown(*attacks.table_of(rows, method, key)))
    return "\n\n".join([*parts, *goals(report)])


def compression_section(report: Report) -> str:
    """Tables of compression and of secure sums, for each data set and method."""
    return "\n\n".join([compression_summary(report), *goals(report)])


def compression_summary(report: Report) -> str:
    """Make the same without the goals."""
    seeds = ", ".join(map(str, report["what"]["seeds"]))
    parts = [f"{origin(report)} Mean and spread over the seeds {seeds}."]
    for name, result in report["data"].items():
        for heading, header, rows in compression.tables_of(result):
            parts += [f"**{name}; {heading}**", markdown(header, rows)]
    return "\n\n".join(parts)


def reliability_section(report: Report) -> str:
    """One table of rows and memory, and one of what was tried."""
    drawn = report["drawn"]
    parts = [
        origin(report),
        reliability_rows(report),
        f"**{drawn['tests']} properties, {drawn['multiple']:g} times the examples of CI**",
        reliability_cases(report),
    ]
    return "\n\n".join([*parts, *goals(report)])


def reliability_rows(report: Report) -> str:
    """One table: ten million rows."""
    return markdown(reliability.ROWS_HEADER, reliability.rows_table(report))


def reliability_cases(report: Report) -> str:
    """One table: what was tried, and what came out."""
    return markdown(reliability.CASES_HEADER, reliability.cases_table(report))


SECTIONS: Places = {
    "accuracy": ("accuracy", accuracy_section),
    "cohort_speed": ("cohort_speed", cohort_speed_section),
    "compression": ("compression", compression_section),
    "fedfnn_convergence": ("fedfnn_convergence", fedfnn_convergence_section),
    "fedfnn_cost": ("fedfnn_cost", fedfnn_cost_section),
    "fedfnn_sensitivity": ("fedfnn_sensitivity", fedfnn_sensitivity_section),
    "fedfnn_streaming": ("fedfnn_streaming", fedfnn_streaming_section),
    "fellrec_balance": ("fellrec_balance", fellrec_balance_section),
    "fellrec_split": ("fellrec_split", fellrec_split_section),
    "hetefedrec_sizes": ("hetefedrec_sizes", hetefedrec_sizes_section),
    "other_engines": ("other_engines", other_engines_section),
    "privacy": ("privacy", privacy_section),
    "reliability": ("reliability", reliability_section),
    "round_profile": ("round_profile", round_profile_section),
    "scale": ("scale", scale_section),
    "whole_data": ("whole_data", whole_data_section),
}
SUMMARIES: Places = {
    "accuracy": ("accuracy", accuracy_summary),
    "balance": ("fellrec_balance", fellrec_balance_summary),
    "convergence": ("fedfnn_convergence", fedfnn_convergence_summary),
    "sizes": ("hetefedrec_sizes", hetefedrec_sizes_summary),
    "speed": ("cohort_speed", cohort_speed_summary),
    "split": ("fellrec_split", fellrec_split_summary),
}

OF_SCALE: Places = {"scale": ("scale", scale_summary)}
OF_ROBUST: Places = {
    "attacks": ("attacks", attacks_section),
    "faults": ("faults", faults_section),
}
OF_COMMUNICATION: Places = {"compression": ("compression", compression_summary)}
OF_RELIABILITY: Places = {
    "cases": ("reliability", reliability_cases),
    "rows": ("reliability", reliability_rows),
}


def origin(report: Report) -> str:
    """Say with which command and where the numbers came about."""
    machine = report["machine"]
    named = ("python", "torch", "numpy", "implicit", "pfl", "flwr")
    versions = [f"{part} {machine[part]}" for part in named if part in machine]
    return (
        f"`{report['command']}` on {machine['cpu']}, {machine['cores']} cores; "
        f"{', '.join(versions)}."
    )


def goals(report: Report) -> list[str]:
    """Return a table of the goals, or nothing if there are none."""
    rows = [
        [
            goal["what"],
            f"{goal['value']:.4g}",
            f"{'≥' if goal['at_least'] else '≤'} {goal['target']:.4g}",
            "yes" if goal["held"] else "no",
        ]
        for goal in report["goals"]
    ]
    return [markdown(["goal", "value", "target", "held"], rows)] if rows else []


def rewrite(text: str, reports: Mapping[str, Report], places: Places) -> str:
    """Fill the marked places of a text."""
    for place, (result, write) in places.items():
        if result in reports:
            marked = re.compile(rf"(<!-- {place} -->\n).*?(<!-- /{place} -->)", re.DOTALL)
            body = write(reports[result])
            text = marked.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def _engine(result: Report, contender: str) -> list[float]:
    """Seconds of the engine with the contender's mini-batches."""
    kind = "full batch" if contender.endswith("full batch") else "batches of 64"
    seconds: list[float] = result["seconds"][f"engine, {kind}"]
    return seconds


def _by_data(cells: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> str:
    rows = [[row, *(cells[row].get(column, "") for column in columns)] for row in cells]
    return markdown(["", *columns], rows)


def _words(params: Mapping[str, float | str]) -> str:
    words = [
        f"{name} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in params.items()
    ]
    return ", ".join(words) or "the defaults"


def main() -> int:
    reports = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    for readme, places in (
        (HERE / "README.md", SECTIONS),
        (HERE.parent / "README.md", SUMMARIES),
        (HERE.parent / "docs" / "scale.md", OF_SCALE),
        (HERE.parent / "docs" / "robust.md", OF_ROBUST),
        (HERE.parent / "docs" / "communication.md", OF_COMMUNICATION),
        (HERE.parent / "docs" / "reliability.md", OF_RELIABILITY),
    ):
        readme.write_text(rewrite(readme.read_text(), reports, places))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
