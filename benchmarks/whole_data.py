"""What each part of the whole-data objective brings: one left out at a time.

NDCG@20 on a random 20% of every user's interactions, defaults otherwise, for everybody taking
part (12 rounds), 20% of the clients (40 rounds) and 5% (80 rounds). The parts:

- the rank-one curvature along an item's own vector in the server's step (`item_curvature`),
- the penalty's growth with the number of interactions (`l2_exponent`; 0 and 1 are the classical
  choices),
- the weight of unobserved pairs that follows the density (`unobserved_weight`; 0.1 for all data
  instead),
- the server's rate that falls over the rounds (`server_learning_rate`; constant instead).
"""

from __future__ import annotations

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
from numpy.typing import NDArray

from fedrecsk import FedFNNRecommender
from fedrecsk.metrics import evaluate
from fedrecsk.model_selection import PerUserHoldout

SCRIPT = "whole_data"
PARTICIPATION = {1.0: 12, 0.2: 40, 0.05: 80}  # share of the clients: rounds
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "without item curvature": {"item_curvature": False},
    "l2_exponent 0": {"l2_exponent": 0.0},
    "l2_exponent 1": {"l2_exponent": 1.0},
    "unobserved_weight 0.1": {"unobserved_weight": 0.1},
    "constant rate": {},  # the first round's, see below
}
MAX_TEST_USERS = 10_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    arguments = parse_arguments(__doc__, SCRIPT, seeds=3, argv=argv)
    plan = {1.0: 3, 0.2: 5} if arguments.quick else PARTICIPATION
    results, goals = [], []
    with one_thread():
        for data in load(arguments.data, quick=arguments.quick):
            rows = [
                run(data, share, rounds, name, parameters, arguments.seeds)
                for share, rounds in plan.items()
                for name, parameters in VARIANTS.items()
            ]
            results.append({"data": data.name, **data.sizes, "rows": rows})
            goals.append(curvature_goal(data.name, rows))
    print(table(results))
    write_json(arguments, SCRIPT, {"seeds": arguments.seeds, "results": results}, goals)
    for goal in goals:
        print(goal)


def run(
    data: Data, share: float, rounds: int, name: str, parameters: dict[str, Any], seeds: int
) -> dict[str, Any]:
    """Fit one variant on every seed."""
    if name == "constant rate":
        parameters = {"server_learning_rate": share**0.75}
    say(f"{data.name}: {share:g} of the clients, {name}")
    values = []
    for seed in range(seeds):
        train, test = next(PerUserHoldout(random_state=seed).split(data.X))
        model = FedFNNRecommender(
            clients_per_round=share, n_rounds=rounds, random_state=seed, **parameters
        ).fit(data.X[train])
        held_out = data.X[some_users(data.X, test, seed)]
        values.append(float(evaluate(model, held_out, metrics="ndcg", k=20).overall["ndcg@20"]))
    mean, spread = mean_and_spread(values)
    return {
        "participation": share,
        "rounds": rounds,
        "variant": name,
        "parameters": parameters,
        "ndcg@20": mean,
        "spread": spread,
        "per_seed": values,
    }


def some_users(X: NDArray[Any], test: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Held-out rows of at most MAX_TEST_USERS random users."""
    users = np.unique(X[test, 0])
    if len(users) <= MAX_TEST_USERS:
        return test
    chosen = np.random.default_rng(seed).choice(users, MAX_TEST_USERS, replace=False)
    return test[np.isin(X[test, 0], chosen)]


def curvature_goal(name: str, rows: Sequence[dict[str, Any]]) -> Goal:
    """With full participation, the default is not worse than without the curvature term."""
    full = {row["variant"]: row["ndcg@20"] for row in rows if row["participation"] == 1.0}
    ratio = full["default"] / full["without item curvature"]
    return Goal(f"{name}: NDCG@20 with / without item curvature, all clients", ratio, 0.99)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Lay the means out, a block per data set."""
    blocks = []
    for result in results:
        shares = list(dict.fromkeys(row["participation"] for row in result["rows"]))
        cells = {(r["variant"], r["participation"]): r for r in result["rows"]}
        lines = [
            [variant, *(_mean_text(cells[variant, share]) for share in shares)]
            for variant in VARIANTS
        ]
        header = [result["data"], *(f"{100 * share:g}% of clients" for share in shares)]
        blocks.append(format_table(header, lines))
    return "\n\n".join(blocks)


def _mean_text(row: dict[str, Any]) -> str:
    return f"{row['ndcg@20']:.4f} ± {row['spread']:.4f}"


if __name__ == "__main__":
    main()
