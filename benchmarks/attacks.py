"""What dishonest clients achieve, and what each defence makes of it and costs without them.

A share of the clients is dishonest, see `fedrecsk.engine.attacks`. Judged are the honest ones:
NDCG@20 on a random 20% of their interactions, and for attacks that promote an item, the least
popular one, the share of them that find it among their first ten (ER@10). The defences have their
defaults. A fit that an attack ends is 0.

The rules that sort or compare uploads take five to twenty times as long as the others and are run
with the first seed. Of data sets with more than 2,000 users FedFNN alone is attacked, with one seed
and the fast rules. "clip alone" does not check whether data would explain an upload.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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

from fedrecsk import FedAvgRecommender, FedFNNRecommender
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.metrics import evaluate, exposure_ratio
from fedrecsk.model_selection import PerUserHoldout

SCRIPT = "attacks"
MALICIOUS = 0.05
METHODS: dict[str, Any] = {
    "FedFNN": FedFNNRecommender,
    "FedAvg": FedAvgRecommender,
}
MANY_USERS = 2_000
PROMOTIONS = ("gradient", "lookalike", "random", "bandwagon")
ATTACKS = ("none", *PROMOTIONS, "sign-flip", "scale", "gaussian")
OF_VECTORS = ("lookalike",)  # which it makes up
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {"defence": None},
    "clip": {"defence": "clip"},
    "clip alone": {"defence": "clip", "check_uploads": False},
    "trimmed-mean": {"defence": "trimmed-mean"},
    "median": {"defence": "median"},
    "multi-krum": {"defence": "multi-krum"},
    "krum": {"defence": "krum"},
}
SUMS = ("none", "clip", "clip alone")  # as fast as adding up
TRIED = {"FedFNN": tuple(DEFENCES), "FedAvg": ("none", "clip", "trimmed-mean")}
ADVISED = "clip"


def run(data: Data, method: str, attack: str, defence: str, seeds: int) -> dict[str, Any]:
    """Fit with each seed, and judge the honest users."""
    ndcg, exposure, seconds = [], [], []
    for seed in range(seeds):
        train, test = next(PerUserHoldout(random_state=seed).split(data.X))
        # Without attack those are left out too who would be dishonest: the same users are judged.
        # One of the attacks draws them, with a strength that does nothing.
        quiet = {"attack": "scale", "attack_strength": 1.0}
        model = METHODS[method](
            random_state=seed,
            malicious_fraction=MALICIOUS,
            **DEFENCES[defence],
            **(quiet if attack == "none" else {"attack": attack}),
        )
        start = time.perf_counter()
        try:
            model.fit(data.X[train])
        except FloatingPointError:
            ndcg.append(0.0)
            continue
        seconds.append(time.perf_counter() - start)
        honest = np.setdiff1d(model.user_ids_, model.malicious_client_ids_)
        # By codes: NumPy compares ids that are objects one with all.
        rows = test[Vocabulary(honest).encode(data.X[test, 0])[1]]
        found = evaluate(model, data.X[rows], metrics="ndcg", k=20)
        ndcg.append(float(found.overall["ndcg@20"]))
        if attack in ("none", *PROMOTIONS):
            target = model.target_item_
            if target is None:
                items, counts = np.unique(data.X[train, 1], return_counts=True)
                target = items[np.argmin(counts)]
            exposure.append(exposure_ratio(model, target, users=honest))
    return {
        "method": method,
        "attack": attack,
        "defence": defence,
        "ndcg@20": ndcg,
        "er@10": exposure,
        "seconds": seconds,
    }


def goals_of(name: str, rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """State that attacks move little past the advised defence, from where nobody is dishonest.

    The calm fit to compare with has no defence, so that what it costs counts as well.
    """
    cells = {(row["method"], row["attack"], row["defence"]): row for row in rows}
    goals = []
    for method in dict.fromkeys(row["method"] for row in rows):
        calm = cells[method, "none", "none"]
        worst = min(
            np.mean(row["ndcg@20"]) / np.mean(calm["ndcg@20"])
            for (who, _, defence), row in cells.items()
            if who == method and defence == ADVISED
        )
        goals.append(Goal(f"{name}, {method}, {ADVISED}: NDCG@20 kept", float(worst), 0.95))
        moved = max(
            np.mean(cells[method, attack, ADVISED]["er@10"]) - np.mean(calm["er@10"])
            for attack in PROMOTIONS
            if (method, attack, ADVISED) in cells
        )
        goals.append(
            Goal(f"{name}, {method}, {ADVISED}: ER@10 moved", float(moved), 0.05, at_least=False)
        )
    return goals


def table_of(
    rows: Sequence[dict[str, Any]], method: str, key: str
) -> tuple[list[str], list[list[str]]]:
    """Lay out attacks by defences: the header, and the lines."""
    cells = {(row["attack"], row["defence"]): row[key] for row in rows if row["method"] == method}
    defences = list(dict.fromkeys(defence for _, defence in cells))
    lines = []
    for attack in dict.fromkeys(attack for attack, _ in cells):
        found = [cells.get((attack, defence), []) for defence in defences]
        if any(found):
            lines.append([attack, *(text_of(values) for values in found)])
    return ["", *defences], lines


def text_of(values: Sequence[float]) -> str:
    """Mean, and spread where there are several."""
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:.3f}" + f" ± {spread:.3f}" * (len(values) > 1)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(__doc__, SCRIPT, seeds=3, argv=argv)
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    with one_thread():
        for data in load(arguments.data, quick=arguments.quick):
            rows = []
            few = not arguments.quick and data.sizes["users"] <= MANY_USERS
            for method in METHODS if few else ("FedFNN",):
                for attack in ("none", "gradient") if arguments.quick else ATTACKS:
                    if attack in OF_VECTORS and method != "FedFNN":
                        continue
                    say(f"{data.name}: {method}, {attack}")
                    for defence in TRIED[method] if few else SUMS:
                        n = arguments.seeds if few and defence in SUMS else 1
                        rows.append(run(data, method, attack, defence, n))
                for key in ("ndcg@20", "er@10"):
                    header, lines = table_of(rows, method, key)
                    print(format_table([f"{method}, {key}", *header[1:]], lines))
            results[data.name] = {**data.sizes, "rows": rows}
            goals += goals_of(data.name, rows)
            report = {"malicious": MALICIOUS, "seeds": arguments.seeds, "data": results}
            write_json(arguments, SCRIPT, report, goals)
    print("\n".join(map(str, goals)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
