"""How well the methods rank held-out items, next to centralised matrix factorisation.

Of every user's items a random fifth is held out (`PerUserHoldout`, another draw for each seed);
all items that the user had not in training are ranked; the number is NDCG@20, mean over users.

Each method but popularity comes with its defaults and tuned. Tuning tries the defaults and the
candidates in `METHODS`, the same number for every method, on another fifth held out from the
training rows of the first seed; the best is then fitted to all training rows of each seed.
Within this script test rows choose nothing. But the lists of candidates, of FedFNN and of ALS,
and FedFNN's automatic defaults were developed on other random splits of these same data sets, some
of them judged on held-out rows. Only data not used so far can say what they are worth elsewhere.

ALS is `implicit.als.AlternatingLeastSquares` with 32 factors: all data in one place, no clients.
It is judged by the same code as the rest, and left out where implicit is not installed.

Everything runs on one thread, so that seconds compare. They are the processor's, which on one
thread are those of the clock on an idle machine.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

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
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator

from fedrecsk import FedAvgRecommender, FedFNNRecommender, PopularityRecommender
from fedrecsk.data.interactions import encode, read_columns
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.metrics import evaluate
from fedrecsk.metrics.ranking import top_k
from fedrecsk.model_selection import PerUserHoldout

SCRIPT = "accuracy"
N_FACTORS = 32
# With more users than the first number, the metric is taken over a fixed sample of the second.
MANY_USERS, SAMPLED_USERS = 20_000, 10_000
# What the defaults of FedFNN have to reach on data of this name: NDCG@20, and seconds of a fit.
DEFAULT_NDCG = {"ml-100k": 0.42, "ml-1m": 0.37}
DEFAULT_SECONDS = {"ml-100k": 10.0}

Params = dict[str, Any]


class ALSRecommender(BaseEstimator):
    """implicit's alternating least squares, with what `fedrecsk.metrics` asks of a recommender."""

    def __init__(
        self,
        n_factors: int = N_FACTORS,
        *,
        regularization: float = 0.01,
        alpha: float = 1.0,
        iterations: int = 15,
        random_state: int | None = None,
    ) -> None:
        self.n_factors = n_factors
        self.regularization = regularization
        self.alpha = alpha
        self.iterations = iterations
        self.random_state = random_state

    def fit(self, X: NDArray[Any], client_ids: Any = None) -> Self:
        """Factorise the user x item matrix of ones."""
        from implicit.cpu.als import AlternatingLeastSquares

        data = encode(read_columns(X))
        # implicit takes scipy's older matrix class only.
        seen = csr_matrix(data.matrix(), dtype=np.float32)
        model = AlternatingLeastSquares(
            factors=self.n_factors,
            regularization=self.regularization,
            alpha=self.alpha,
            iterations=self.iterations,
            num_threads=1,
            random_state=self.random_state,
        )
        model.fit(seen, show_progress=False)
        self.user_ids_, self.item_ids_ = data.users.ids, data.items.ids
        self.seen_indptr_ = seen.indptr.astype(np.int64)
        self.seen_indices_ = seen.indices.astype(np.int64)
        self.user_factors_, self.item_factors_ = model.user_factors, model.item_factors
        return self

    def recommend(
        self, users: NDArray[Any], k: int
    ) -> tuple[NDArray[Any], NDArray[np.floating[Any]]]:
        """Rank the unseen items of users that were in `fit`."""
        codes, known = Vocabulary(self.user_ids_).encode(users)
        if not known.all():
            raise ValueError(f"{(~known).sum()} of {len(users)} users were not in fit.")
        scores = self.user_factors_[codes] @ self.item_factors_.T
        for row, code in enumerate(codes):
            start, stop = self.seen_indptr_[code : code + 2]
            scores[row, self.seen_indices_[start:stop]] = -np.inf
        top = top_k(scores, k)
        return self.item_ids_[top], np.take_along_axis(scores, top, axis=1)


def grid(**values: Sequence[Any]) -> list[Params]:
    """Return every combination of parameter values."""
    names = list(values)
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values.values())]


@dataclass(frozen=True)
class Method:
    """A recommender, and the parameters that are tried for it."""

    name: str
    make: Callable[..., Any]
    candidates: list[Params] = field(default_factory=list)
    seeded: bool = True

    def estimator(self, params: Params, seed: int) -> Any:
        """Return an unfitted estimator."""
        return self.make(**params, **({"random_state": seed} if self.seeded else {}))


METHODS = [
    Method("popularity", PopularityRecommender, seeded=False),
    Method(
        "FedAvg",
        FedAvgRecommender,
        grid(server_learning_rate=[1.0, 3.0, 10.0, 1000.0], learning_rate=[0.03, 0.1, 0.3]),
    ),
    Method(
        "FedFNN",
        FedFNNRecommender,
        # Everybody takes part in each of 12 rounds: about the passes that the defaults make.
        [
            {**params, "clients_per_round": 1.0, "n_rounds": 12}
            for params in grid(l2=[0.05, 0.1, 0.2, 0.3], l2_exponent=[0.5, 0.75, 1.0])
        ],
    ),
    Method(
        "ALS (centralised)",
        ALSRecommender,
        grid(regularization=[10.0, 30.0, 50.0, 100.0], alpha=[3.0, 10.0, 100.0]),
    ),
]


def fit_and_judge(
    estimator: Any, X: NDArray[Any], clients: NDArray[Any] | None, held_out: NDArray[Any]
) -> dict[str, float]:
    """Return metrics on the held-out rows, and the processor's seconds for the fit."""
    start = time.process_time()
    estimator.fit(X, clients)
    seconds = time.process_time() - start
    found = evaluate(estimator, held_out, metrics=("ndcg", "recall"), k=20).overall
    return {**found, "seconds": seconds}


def sampled(rows: NDArray[Any], n_users: int) -> NDArray[Any]:
    """Rows of a fixed random sample of users where there are many, else all rows."""
    users, user_of_row = Vocabulary.from_values(rows[:, 0])
    if n_users <= MANY_USERS:
        return rows
    chosen = np.zeros(len(users), dtype=bool)
    chosen[np.random.default_rng(0).permutation(len(users))[:SAMPLED_USERS]] = True
    return rows[chosen[user_of_row]]


def split(
    data: Data, seed: int, rows: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split (some rows of) the data per user; return row numbers of both sides."""
    rows = np.arange(len(data.X)) if rows is None else rows
    train, test = next(PerUserHoldout(0.2, random_state=seed).split(data.X[rows]))
    return rows[train], rows[test]


def clients_of(data: Data, rows: NDArray[np.int64]) -> NDArray[Any] | None:
    """Return the clients of some rows, None where every user is one."""
    return None if data.clients is None else data.clients[rows]


def tune(method: Method, data: Data, candidates: Sequence[Params]) -> dict[str, Any]:
    """Choose among candidates on validation rows out of the first seed's training rows."""
    train, _ = split(data, 0)
    inner, validation = split(data, 0, train)
    held_out = sampled(data.X[validation], data.sizes["users"])
    scores: list[float] = []
    for params in candidates:
        estimator = method.estimator(params, 0)
        try:
            found = fit_and_judge(estimator, data.X[inner], clients_of(data, inner), held_out)
            scores.append(found["ndcg@20"])
        except FloatingPointError:
            scores.append(math.nan)  # training diverged
        say(f"{data.name}, {method.name}, validation: {params} {scores[-1]:.4f}")
    if np.isnan(scores).all():
        raise FloatingPointError(f"All candidates of {method.name} diverged on {data.name}.")
    return {
        "chosen": candidates[int(np.nanargmax(scores))],
        "tried": [
            {"params": params, "validation_ndcg@20": None if math.isnan(score) else score}
            for params, score in zip(candidates, scores, strict=True)
        ],
    }


def judge(
    method: Method, setting: str, params: Params, data: Data, seeds: Iterable[int]
) -> dict[str, Any]:
    """Fit to the training rows of every seed and judge on its test rows."""
    runs = []
    for seed in seeds:
        train, test = split(data, seed)
        held_out = sampled(data.X[test], data.sizes["users"])
        estimator = method.estimator(params, seed)
        runs.append(fit_and_judge(estimator, data.X[train], clients_of(data, train), held_out))
        say(f"{data.name}, {method.name}, {setting}, seed {seed}: {runs[-1]}")
    return {
        "method": method.name,
        "setting": setting,
        "params": params,
        **{key: [run[key] for run in runs] for key in runs[0]},
    }


def compare(
    data: Data, methods: Sequence[Method], *, n_seeds: int, n_candidates: int | None
) -> dict[str, Any]:
    """Tune and judge all methods on one data set."""
    results, tuning = [], {}
    for method in methods:
        results.append(judge(method, "default", {}, data, range(n_seeds)))
        if method.candidates:
            tuning[method.name] = tune(method, data, [{}, *method.candidates[:n_candidates]])
            chosen = tuning[method.name]["chosen"]
            results.append(judge(method, "tuned", chosen, data, range(n_seeds)))
    n_users = data.sizes["users"]
    return {
        **data.sizes,
        "judged_users": SAMPLED_USERS if n_users > MANY_USERS else n_users,
        "tuning": tuning,
        "results": results,
    }


def goals_of(name: str, compared: dict[str, Any]) -> list[Goal]:
    """Compare tuned FedFNN with tuned ALS, and the defaults with fixed targets."""
    runs = {(run["method"], run["setting"]): run for run in compared["results"]}
    goals = []

    def mean(method: str, setting: str) -> float:
        return statistics.fmean(runs[method, setting]["ndcg@20"])

    if ("ALS (centralised)", "tuned") in runs:
        ours, theirs = mean("FedFNN", "tuned"), mean("ALS (centralised)", "tuned")
        goals.append(Goal(f"{name}, NDCG@20 of tuned FedFNN against tuned ALS", ours, theirs))
    if name in DEFAULT_NDCG:
        value = mean("FedFNN", "default")
        goals.append(Goal(f"{name}, NDCG@20 of default FedFNN", value, DEFAULT_NDCG[name]))
    if name in DEFAULT_SECONDS:
        value = statistics.median(runs["FedFNN", "default"]["seconds"])
        what = f"{name}, seconds of a default FedFNN fit on one thread"
        goals.append(Goal(what, value, DEFAULT_SECONDS[name], at_least=False))
    return goals


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(__doc__, SCRIPT, seeds=3, argv=argv)
    methods = METHODS
    if importlib.util.find_spec("implicit") is None:
        say('implicit is not installed and ALS left out; pip install "fedrecsk[benchmark]" adds it')
        methods = [method for method in METHODS if method.make is not ALSRecommender]
    n_seeds = 1 if arguments.quick else arguments.seeds
    n_candidates = 2 if arguments.quick else None
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    with one_thread(), warnings.catch_warnings():
        # implicit calls what SciPy deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        for data in load(arguments.data, quick=arguments.quick):
            results[data.name] = compare(data, methods, n_seeds=n_seeds, n_candidates=n_candidates)
            if not arguments.quick:  # a part of the data says nothing about the targets
                goals += goals_of(data.name, results[data.name])
            write_json(arguments, SCRIPT, report(results, n_seeds), goals)
    for name, compared in results.items():
        print(f"\n{headline(name, compared)}")
        print(table(compared))
    print()
    print("\n".join(map(str, goals)) or "goals: none with --quick")
    return 0


def report(results: dict[str, Any], n_seeds: int) -> dict[str, Any]:
    """Collect what the JSON says besides goals and machine."""
    return {
        "what": {
            "split": "a random fifth of every user's items held out, PerUserHoldout(0.2)",
            "metric": "NDCG@20, all unseen items ranked, mean over users",
            "tuning": "the best of the defaults and the candidates below, by NDCG@20 on a fifth "
            "held out from the training rows of seed 0",
            "seeds": list(range(n_seeds)),
            "threads": 1,
        },
        "data": results,
    }


def headline(name: str, compared: dict[str, Any]) -> str:
    """Say what data a table is about."""
    text = (
        f"{name}: {compared['interactions']:,} interactions, {compared['users']:,} users, "
        f"{compared['items']:,} items"
    )
    if compared["judged_users"] < compared["users"]:
        text += f"; judged on a fixed sample of {compared['judged_users']:,} users"
    return text


def spread_out(values: Sequence[float]) -> str:
    """Write the mean over the seeds, and the standard deviation where there are several."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.4f} ± {spread:.4f}" if len(values) > 1 else f"{mean:.4f}"


def table(compared: dict[str, Any]) -> str:
    """Lay out means over the seeds, and the median seconds of a fit."""
    rows = []
    for run in compared["results"]:
        cells = [run["method"], run["setting"]]
        cells += [spread_out(run[key]) for key in ("ndcg@20", "recall@20")]
        cells.append(f"{statistics.median(run['seconds']):.2f}")
        rows.append(cells)
    return format_table(["method", "setting", "NDCG@20", "recall@20", "fit, s"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
