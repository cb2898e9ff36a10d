"""What balancing adapters across platforms brings over averaging them, and over no exchange.

Data sets with a global split by time: history is what came before, everything after is to be
found, all items but those seen are ranked. Users are grouped into five platforms by k-means on
user vectors of a matrix factorisation of the training rows. Every method trains adapters on the
same frozen model, with the same examples. Learning rate and popularity term are chosen on the
validation part, by recall@10, for each family of methods from the same candidates; then methods
train on training and validation rows and are judged on the test part, with several seeds.

The default model is the compact one, made from the item texts. ``--backbone`` takes a name or a
folder. ``--users N`` takes a sample of users, so that it runs on a CPU; without it all take part.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, Goal, format_table, mean_and_spread, say, write_json
from joblib import Parallel, delayed
from numpy.typing import NDArray

from fedrecsk import CentralizedRecommender, FELLRecRecommender, PopularityRecommender
from fedrecsk.data import cluster_clients, encode
from fedrecsk.data.prompts import read_item_text
from fedrecsk.datasets import make_interactions
from fedrecsk.engine.streams import Streams
from fedrecsk.metrics import evaluate
from fedrecsk.models.backbone import make_compact
from fedrecsk.models.compact import CompactState, open_compact

SCRIPT = "fellrec_balance"
N_PLATFORMS = 5
METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
# Lead over FedAvg, recall@10, that the paper reports.
CLAIMED = {"amazon-games": 0.181, "microlens-50k": 0.254}
# What every family chooses from. Whose popularity counts, and how much, needs no fit of its own,
# since vectors learn lift without it.
RATES = {"compact": (8e-3, 16e-3), "encoder": (5e-4, 1e-3), "causal": (2e-4, 5e-4)}
COUNTS = ("platform", "all")
WEIGHTS = (0.0, 0.25, 0.5, 1.0)
# Methods that are judged with every seed; the others with the first.
MAIN = ("local only", "FedAvg", "FELLRec")
# What each method is, and whose candidate it takes: families are tuned on their own.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "untrained": (
        "untrained",
        {"aggregation": "fedavg", "n_rounds": 1, "learning_rate": 1e-12},
    ),
    "local only": ("local only", {"aggregation": "local"}),
    "FedAvg": ("FedAvg", {"aggregation": "fedavg"}),
    "FedAvg, clients alike": ("FedAvg", {"aggregation": "fedavg", "client_weights": "clients"}),
    "FedProx": ("FedAvg", {"aggregation": "fedavg", "proximal": 0.01}),
    "Ditto": ("local only", {"aggregation": "ditto", "proximal": 0.1}),
    "FELLRec": ("FELLRec", {}),
    "centralised": ("FedAvg", {"aggregation": "fedavg", "n_platforms": 1}),
}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "without similarity": ("FELLRec", {"use_similarity": False}),
    "without heating": ("FELLRec", {"use_heating": False}),
    "similarity of updates": ("FELLRec", {"similarity_on": "update"}),
    "similarity of updates, squared": (
        "FELLRec",
        {"similarity_on": "update", "similarity_power": 2.0},
    ),
    "similarity of products": ("FELLRec", {"similarity_on": "product"}),
    "slower heating": ("FELLRec", {"heating_exponent": "(t+1)/beta"}),
    "probability instead of lift": ("FELLRec", {"objective": "probability", "n_negatives": 64}),
    "constant learning rate": ("FELLRec", {"learning_rate_schedule": "constant"}),
    "temperature .05": ("FELLRec", {"temperature": 0.05}),
    "popularity with the platform": ("FELLRec", {"popularity_counts": "platform"}),
    "popularity with all": ("FELLRec", {"popularity_counts": "all"}),
    "without popularity": ("FELLRec", {"popularity_weight": 0.0}),
    "best adapters by validation": ("FELLRec", {"early_stopping": True}),
}
# How scores count popularity: whose, and with what weight. Without weight both are the same.
Prior = tuple[str, float]
PRIORS: list[Prior] = [(counts, weight) for counts in COUNTS for weight in WEIGHTS]
PRIORS.remove(("all", 0.0))


@dataclass(frozen=True, eq=False)
class Split:
    """A data set cut by time, with its platforms."""

    name: str
    item_text: Any
    train: NDArray[Any]  # (n, 4): user, item, rating, timestamp
    held_out: NDArray[Any]  # (m, 2)
    platform_of: Mapping[Any, int]

    def platforms(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        """Platform of each row."""
        return np.array([self.platform_of[user] for user in rows[:, 0]])


def read(folder: Path, part: str, n_users: int | None, n_test_users: int | None) -> Split:
    """Read one part of a data set: history before it, and what is to be found in it."""
    import pandas as pd

    rows = pd.read_parquet(folder / "interactions.parquet")
    before = ["train"] if part == "valid" else ["train", "valid"]
    history, held_out = rows[rows.split.isin(before)], rows[rows.split == part]
    rng = np.random.default_rng(0)
    able = np.intersect1d(history.user_id.unique(), held_out.user_id.unique())
    tested = able if n_test_users is None else _sample(rng, able, n_test_users)
    others = np.setdiff1d(history.user_id.unique(), tested)
    if n_users is not None:
        others = _sample(rng, others, max(0, n_users - len(tested)))
    history = history[history.user_id.isin(np.concatenate([tested, others]))]
    held_out = held_out[held_out.user_id.isin(tested)]
    items = pd.read_parquet(folder / "items.parquet")
    columns = ["user_id", "item_id", "rating", "timestamp"]
    train = history[columns].to_numpy(dtype=object)
    return _with_platforms(folder.name, items, train, held_out[columns[:2]].to_numpy(dtype=object))


def made_up(part: str) -> Split:
    """Make data up and hold out the latest rows of every user, the last one as the test part."""
    data = make_interactions(150, 80, 4, random_state=0)
    order = np.lexsort((data.data[:, 3], data.data[:, 0]))
    rows = data.data[order]
    _users, starts, counts = np.unique(rows[:, 0], return_index=True, return_counts=True)
    back = np.repeat(starts + counts, counts) - np.arange(len(rows))
    train, held_out = rows[back > 2], rows[back == (2 if part == "valid" else 1)]
    return _with_platforms("made-up", data.item_text, train, held_out[:, :2])


def _sample(rng: np.random.Generator, ids: NDArray[Any], n: int) -> NDArray[Any]:
    return rng.choice(ids, min(n, len(ids)), replace=False)


def _with_platforms(
    name: str, item_text: Any, train: NDArray[Any], held_out: NDArray[Any]
) -> Split:
    data = encode(train)
    platforms = cluster_clients(data, N_PLATFORMS, random_state=0)
    return Split(
        name, item_text, train, held_out, dict(zip(data.users.ids.tolist(), platforms, strict=True))
    )


class Opener:
    """Opens the same compact model in every fit, without making it anew."""

    def __init__(self, state: CompactState) -> None:
        self.state = state

    def __call__(self) -> Any:
        """Return a fresh model and its tokenizer."""
        return open_compact(self.state)


def backbone_of(arguments: argparse.Namespace, split: Split, backend: str) -> Any:
    """Give the backbone that all methods train adapters on."""
    if arguments.backbone is not None:
        return arguments.backbone
    start = time.perf_counter()
    texts = read_item_text(split.item_text).texts
    state = make_compact(texts, backend=backend, streams=Streams(0))  # type: ignore[arg-type]
    say(f"{split.name}: compact {backend} in {time.perf_counter() - start:.0f} s")
    return Opener(state)


def judge(
    split: Split,
    settings: Mapping[str, Any],
    common: Mapping[str, Any],
    seed: int,
    priors: Sequence[Prior] = (),
) -> dict[str, Any]:
    """Fit once and rank the held-out rows; also say how other priors rank them."""
    torch.set_num_threads(1)
    options = {**common, **settings, "random_state": seed}
    start = time.perf_counter()
    with warnings.catch_warnings():
        # Held-out items that came later are misses for those who know no texts.
        warnings.simplefilter("ignore", category=UserWarning)
        model = FELLRecRecommender(item_text=split.item_text, **options)
        model.fit(split.train, split.platforms(split.train))
        seconds = time.perf_counter() - start
        found = {**quality(model, split), "seconds": seconds}
        for prior in priors:
            counts, model.popularity_weight_ = prior
            model.shared_popularity_ = counts == "all"
            found[prior] = quality(model, split)["recall@10"]
        return found


def quality(model: Any, split: Split) -> dict[str, Any]:
    """Rank, overall and by platform."""
    found = evaluate(
        model,
        split.held_out,
        client_ids=split.platforms(split.held_out),
        metrics=("recall", "ndcg"),
        k=(10, 20),
    )
    return {
        **{metric: float(found["overall"][metric]) for metric in METRICS},
        "clients": {metric: found["per_client"][metric].tolist() for metric in METRICS[:1]},
    }


def references(split: Split) -> dict[str, dict[str, Any]]:
    """Judge what reads no texts: popularity and matrix factorisation of all data."""
    models = {
        "popularity": PopularityRecommender(),
        "matrix factorisation, centralised": CentralizedRecommender(random_state=0),
    }
    clients = split.platforms(split.train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        return {
            name: quality(model.fit(split.train, clients), split) for name, model in models.items()
        }


def tune(
    split: Split, common: Mapping[str, Any], families: Mapping[str, Any], jobs: int, quick: bool
) -> dict[str, Any]:
    """Choose a candidate for each family on the validation part."""
    kind = "compact" if isinstance(common["backbone"], Opener) else common["backend"]
    tasks = [
        (name, rate)
        for name in families
        for rate in ([1e-12] if name == "untrained" else RATES[kind][: 1 if quick else None])
    ]
    found = Parallel(n_jobs=jobs)(
        delayed(judge)(
            split,
            {**families[name][1], "learning_rate": rate, "popularity_weight": 0.0},
            common,
            0,
            PRIORS,
        )
        for name, rate in tasks
    )
    chosen: dict[str, Any] = {}
    for (name, rate), result in zip(tasks, found, strict=True):
        values = {prior: result[prior] for prior in PRIORS}
        say(f"{split.name} validation: {name} {rate}: {values} {result['seconds']:.0f} s")
        entry = chosen.setdefault(name, {"candidates": [], "recall@10": -1.0})
        for (counts, weight), value in values.items():
            candidate = {
                "learning_rate": rate,
                "popularity_counts": counts,
                "popularity_weight": weight,
            }
            entry["candidates"].append({**candidate, "recall@10": value})
            if value > entry["recall@10"]:
                entry.update({"recall@10": value, "chosen": candidate})
    return chosen


def compare(
    arguments: argparse.Namespace,
    source: Callable[[str], Split],
    backend: str,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """Tune, then judge every method on the test part; `before` is what was found earlier."""
    split = source("valid")
    methods = dict(METHODS)
    if arguments.ablations:
        methods |= ABLATIONS
    if backend == "causal":
        methods = {name: METHODS[name] for name in ("untrained", "FedAvg", "FELLRec")}
    if arguments.methods:
        methods = {name: methods[name] for name in arguments.methods}
    common = {
        "backend": backend,
        "backbone": backbone_of(arguments, split, backend),
        "n_rounds": arguments.rounds,
        "local_epochs": 1,
        "batch_size": 64,
        # The validation part decides on the settings; in a fit it would cost as much as training.
        "early_stopping": False,
        "max_item_tokens": 16,
        "max_tokens": arguments.max_tokens,
        "dtype": arguments.dtype,
        "device": arguments.device,
    }
    if backend == "causal":
        common["max_tokens"] = 2 * arguments.max_tokens  # the instruction takes its share
    tuning = dict(before.get("tuning", {}))
    families = {
        name: METHODS[name]
        for name in dict.fromkeys(family for family, _ in methods.values())
        if name not in tuning
    }
    if arguments.learning_rate is None:
        tuning |= tune(split, common, families, arguments.jobs, arguments.quick)
    else:
        given = {
            "learning_rate": arguments.learning_rate,
            "popularity_weight": arguments.popularity_weight,
            "popularity_counts": "all",
        }
        tuning |= {name: {"candidates": [], "chosen": given} for name in families}
    split = source("test")
    tasks = [
        (name, seed) for name in methods for seed in range(arguments.seeds if name in MAIN else 1)
    ]
    found = Parallel(n_jobs=arguments.jobs)(
        delayed(judge)(
            split, {**tuning[methods[name][0]]["chosen"], **methods[name][1]}, common, seed
        )
        for name, seed in tasks
    )
    results: dict[str, Any] = dict(before.get("results", {}))
    if not results:
        for name, quality_of in references(split).items():
            results[name] = _collected([quality_of])
    for name in methods:
        runs = [run for (other, _), run in zip(tasks, found, strict=True) if other == name]
        results[name] = _collected(runs)
        say(f"{split.name}: {name} {results[name]['recall@10']}")
    users = np.unique(split.held_out[:, 0])
    sizes = np.bincount([split.platform_of[user] for user in users], minlength=N_PLATFORMS)
    return {
        **{key: getattr(arguments, key) for key in ("rounds", "max_tokens", "dtype")},
        "users": len(split.platform_of),
        "test_users": len(users),
        "test_users_by_platform": sizes.tolist(),
        "items": len(read_item_text(split.item_text)),
        "tuning": tuning,
        "results": results,
    }


def _collected(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the runs of all seeds side by side."""
    clients = [run["clients"]["recall@10"] for run in runs]
    return {
        **{metric: [run[metric] for run in runs] for metric in METRICS},
        "clients": clients,
        "worst": [float(np.min(values)) for values in clients],
        "spread": [float(np.std(values)) for values in clients],
        "seconds": [run.get("seconds", 0.0) for run in runs],
    }


HEADER = ["", *METRICS, "worst platform", "spread", "seconds"]


def table(compared: Mapping[str, Any]) -> list[list[str]]:
    """Lay out the results of one data set."""
    lines = []
    for name, result in compared["results"].items():
        cells = [name]
        for key in (*METRICS, "worst", "spread"):
            centre, spread = mean_and_spread(result[key])
            cells.append(f"{centre:.4f}" + f" ± {spread:.4f}" * (len(result[key]) > 1))
        lines.append([*cells, f"{statistics.median(result['seconds']):.0f}"])
    return lines


def lead(results: Mapping[str, Any], over: str, key: str = "recall@10") -> float:
    """Mean of FELLRec against the mean of another method, as a share of the latter."""
    ours, theirs = (statistics.fmean(results[name][key]) for name in ("FELLRec", over))
    return ours / theirs - 1.0 if theirs else float("nan")


def goals_of(name: str, compared: Mapping[str, Any], kind: str) -> list[Goal]:
    """State what is to be shown on one data set; the kind is the backend and the model."""
    results = compared["results"]
    if "FELLRec" not in results or "FedAvg" not in results:
        return []
    label, is_encoder = f"{name}, {kind}", kind.startswith("encoder")
    over_popularity = statistics.fmean(results["FELLRec"]["recall@10"]) / max(
        statistics.fmean(results["popularity"]["recall@10"]), 1e-9
    )
    found = [Goal(f"{label}: recall@10, times popularity's", over_popularity, 1.0)]
    target = CLAIMED.get(name, 0.0) if is_encoder else 0.0
    found.append(Goal(f"{label}: lead over FedAvg", lead(results, "FedAvg"), target))
    if is_encoder:
        found += [
            Goal(f"{label}: worst platform, lead", lead(results, "FedAvg", "worst"), 0.0),
            Goal(f"{label}: spread, lead", lead(results, "FedAvg", "spread"), 0.0, at_least=False),
        ]
    return found


def command_line(arguments: argparse.Namespace) -> str:
    """Rebuild the command, with names for paths."""
    words = ["python", f"benchmarks/{SCRIPT}.py"]
    for folder in arguments.data or ():
        words += ["--data", folder.name]
    for backend in arguments.backend or ():
        words += ["--backend", backend]
    if arguments.backbone is not None:
        words += ["--backbone", arguments.label or arguments.backbone]
    options = ["users", "test_users", "rounds", "max_tokens", "dtype", "seeds"]
    if arguments.learning_rate is not None:
        options += ["learning_rate", "popularity_weight"]
    for option in options:
        if getattr(arguments, option) is not None:
            words += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    for method in arguments.methods or ():
        words += ["--methods", method]
    words += ["--ablations"] * arguments.ablations + ["--append"] * arguments.append
    return shlex.join(words + ["--quick"] * arguments.quick)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, action="append", metavar="FOLDER")
    parser.add_argument("--backend", action="append", choices=("encoder", "causal"))
    parser.add_argument("--backbone", metavar="NAME", help="default: the compact model")
    parser.add_argument("--label", default="", help="what the backbone is called in the JSON")
    parser.add_argument("--users", type=int, help="sample of users; default: all")
    parser.add_argument("--test-users", type=int, help="sample of those judged; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", action="append", choices=[*METHODS, *ABLATIONS])
    parser.add_argument("--ablations", action="store_true", help="each mechanism off in turn")
    parser.add_argument(
        "--append", action="store_true", help="keep what the JSON has of other methods and data"
    )
    parser.add_argument("--learning-rate", type=float, help="given and not tuned")
    parser.add_argument("--popularity-weight", type=float, default=0.0, help="with the former")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a minute at most")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{SCRIPT}.json")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seeds, arguments.rounds = 1, 1
        arguments.methods = arguments.methods or ["FedAvg", "FELLRec"]
    results: dict[str, Any] = {}
    commands: list[str] = []
    if arguments.append and arguments.out.is_file():
        earlier = json.loads(arguments.out.read_text())
        results, commands = earlier["data"], earlier["commands"]
    commands.append(command_line(arguments))
    goals: list[Goal] = []
    for backend in arguments.backend or ["encoder"]:
        for folder in arguments.data or [None]:

            def source(part: str, folder: Path | None = folder) -> Split:
                if folder is None:
                    return made_up(part)
                return read(folder, part, arguments.users, arguments.test_users)

            name = "made-up" if folder is None else folder.name
            kind = f"{backend}, {arguments.label or arguments.backbone or 'compact'}"
            before = results.get(name, {}).get(kind, {})
            compared = compare(arguments, source, backend, before)
            results.setdefault(name, {})[kind] = compared
            print(format_table([f"{name}, {kind}", *HEADER[1:]], table(compared)))
            goals = [
                goal
                for label, kinds in results.items()
                for each, found in kinds.items()
                for goal in ([] if arguments.quick else goals_of(label, found, each))
            ]
            report = {"command": commands[0], "commands": commands, "data": results}
            write_json(arguments, SCRIPT, report, goals)
    print("\n".join(map(str, goals)) or "goals: none with --quick")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
