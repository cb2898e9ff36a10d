"""What the meta-network adds to the time of a round.

FedFNN with sampled negatives and 5% of the clients; every round predicts (patience never ends
it), at its full cost: literally, so for everybody who was not sampled. Given are medians over the
rounds of the seconds of the meta-network against those of the rest of the same round, so that
whatever else slows the machine down slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from _common import Data, Goal, format_table, load, one_thread, parse_arguments, say, write_json
from _curves import timed_predictions

from fedrecsk import FedFNNRecommender

SCRIPT = "fedfnn_cost"
SHARE, MOST = 0.05, 0.5
PREDICTORS = ("linear", "mlp", "mean", "cluster")
SERVERS = ("newton", "sgd")
HEADER = ["predictor", "server", "seconds of a round", "meta-network / rest"]


def measure(data: Data, predictor: str, server: str, n_rounds: int, seeds: int) -> dict[str, Any]:
    """Fit and compare, round by round."""
    added, seconds = [], []
    for seed in range(seeds):
        model = FedFNNRecommender(
            objective="bce", predictor=predictor, server_optimizer=server, refit=False, gate=False,
            anchor=False, discount=0.0, patience=n_rounds + 1, n_rounds=n_rounds,
            clients_per_round=SHARE, random_state=seed, device="cpu",
        )  # fmt: skip
        with timed_predictions() as meta:
            model.fit(data.X, data.clients)
        rounds = np.array([record["seconds"] for record in model.history_])
        added += (np.array(meta) / (rounds - np.array(meta))).tolist()
        seconds += rounds.tolist()
    row = {
        "predictor": predictor,
        "server": server,
        "seconds": statistics.median(seconds),
        "added": statistics.median(added),
    }
    say(f"{data.name}: {row}")
    return row


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(__doc__, SCRIPT, seeds=3, argv=argv)
    n_rounds, seeds = (3, 1) if arguments.quick else (10, arguments.seeds)
    results, goals = {}, []
    with one_thread():
        for data in load(arguments.data, quick=arguments.quick):
            rows = [
                measure(data, predictor, server, n_rounds, seeds)
                for predictor in PREDICTORS
                for server in SERVERS
            ]
            results[data.name] = {**data.sizes, "rows": rows}
            print(format_table([data.name, *HEADER[1:]], table(rows)))
            if not arguments.quick:
                goals += [
                    Goal(
                        f"{data.name}, {row['predictor']}, {row['server']}: meta-network / rest",
                        row["added"],
                        MOST,
                        at_least=False,
                    )
                    for row in rows
                ]
    what = {"participation": SHARE, "rounds": n_rounds, "seeds": seeds, "data": results}
    write_json(arguments, SCRIPT, what, goals)
    print("\n".join(map(str, goals)) or "goals: none with --quick")
    return 0


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lay out the rows."""
    return [
        [row["predictor"], row["server"], f"{row['seconds']:.3f}", f"{row['added']:.3f}"]
        for row in rows
    ]


if __name__ == "__main__":
    raise SystemExit(main())
