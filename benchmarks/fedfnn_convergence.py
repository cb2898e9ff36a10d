"""How many rounds FedFNN takes, next to FedAvg and FedFast, and which part of it saves them.

Of every user's items a random fifth is held out, another one for each seed; NDCG@20 of a fixed
sample of users is taken after the rounds of a grid, and drawn over the rounds. All methods have
32 factors, and those with sampled negatives 5 local epochs, 4 negatives and batches of 64. Their
users are served in two ways, in one training run: with the vectors that they hold, and after
fitting these to their own rows. The whole-data objective solves for users anyway; its default
stands in both comparisons.

FedAvg sets the marks: 90, 95 and 99% of the best NDCG@20 of its curve, which is the mean over
the seeds and then a running mean over 3 points. A method reaches a mark in the first round of the
grid where its own mean curve is as high.

Each method is tuned in the same way: 6 candidates, on a fifth held out from the training rows of
the first seed, at 5% participation on the first data set only, by the best NDCG@20 within a
budget of rounds; what it chose holds for all data sets and participations.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from _common import Data, Goal, format_table, load, say, write_json
from _convergence_report import (
    BCE_DEFAULT,
    COST_HEADER,
    FEDAVG,
    FEDFAST,
    HEADER,
    MLP,
    PROTOCOLS,
    WHOLE_DEFAULT,
    cost_rows,
    derive,
    goals_of,
    plot,
    tables_of,
)
from _curves import (
    LOCAL,
    N_FACTORS,
    Oracle,
    Params,
    best_of,
    fit_and_record,
    parse,
    split_of,
    unpack,
)
from accuracy import grid
from joblib import Parallel, delayed

from fedrecsk import FedAvgRecommender, FedFastRecommender, FedFNNRecommender

SCRIPT = "fedfnn_convergence"
# Share of the clients in a round: rounds of the baselines, and of our server steps.
ROUNDS = {0.01: (600, 200), 0.05: (240, 100), 0.2: (80, 60)}
TUNING_SHARE, TUNING_ROUNDS = 0.05, (120, 60)
GOAL_SHARES = (0.01, 0.05)
MANY_USERS = 2_000  # with more, no 20% by default, and only the methods of MAIN

RATES = grid(learning_rate=[0.03, 0.1, 0.3], l2=[0.01, 0.02])
SERVER_RATES = grid(learning_rate=[0.1, 0.3], server_learning_rate=[2.0, 5.0, 10.0], l2=[0.01])
WHOLE_RATES = grid(l2=["auto", 0.08, 0.2], server_learning_rate=["auto", 0.1])
BCE: Params = {"n_factors": N_FACTORS, "refit": False, "device": "cpu", **LOCAL}
# A constant discount has become the default after these runs, see docs/methods/fedfnn.md.
FALLING: Params = {"discount_decay": 0.95}
OURS: Params = {**BCE, **FALLING, "objective": "bce"}
# Their base: changes averaged over those who touched an item, and nothing of ours.
COUNT: Params = {
    **OURS,
    "sampling": "uniform",
    "server_optimizer": "sgd",
    "item_bias": False,
    "predictor": None,
}
LITERAL: Params = {**COUNT, "gate": False, "anchor": False, "extra_inputs": False}
WHOLE: Params = {"n_factors": N_FACTORS, "device": "cpu"}


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Parameters
    ----------
    name : str
    make : callable
        The estimator's class.
    params : dict
    candidates : list of dict
        Tried in tuning; empty with `rates_of`.
    without : str or None
        The method that this one is with prediction.
    rates_of : str or None
        Takes what was chosen for another method.
    quick_learner : bool
        Takes the smaller number of rounds.
    protocols : tuple of str
        How its users are served.
    """

    name: str
    make: Callable[..., Any]
    params: Params
    candidates: list[Params] = field(default_factory=lambda: RATES)
    without: str | None = None
    rates_of: str | None = None
    quick_learner: bool = False
    protocols: tuple[str, ...] = tuple(PROTOCOLS)


def _fnn(name: str, params: Params, **more: Any) -> Method:
    return Method(name, FedFNNRecommender, params, **more)


def _literal(name: str, predictor: str, **changes: Any) -> Method:
    return _fnn(name, {**LITERAL, "predictor": predictor, **changes}, without="FedAvg + count")


GATED = {"gate": True, "anchor": True, "extra_inputs": True}
METHODS = [
    Method(FEDAVG, FedAvgRecommender, {**BCE, "item_bias": False}),
    Method(
        "FedAvg, server rate tuned", FedAvgRecommender, {**BCE, "item_bias": False}, SERVER_RATES
    ),
    Method("FedAvg + item bias", FedAvgRecommender, {**BCE, "item_bias": True}),
    _fnn("FedAvg + count", COUNT),
    _fnn("W1, magnitude", {**COUNT, "item_weighting": "magnitude"}),
    _fnn("W2, interactions", {**COUNT, "item_weighting": "interactions"}),
    Method(FEDFAST, FedFastRecommender, BCE),
    _literal("mean, literal", "mean"),
    _literal("linear, literal", "linear"),
    _literal(MLP, "mlp"),
    _literal("mlp, gated", "mlp", **GATED),
    Method("oracle", Oracle, LITERAL, without="FedAvg + count", rates_of=MLP, quick_learner=True),
    _fnn("count + bias", {**COUNT, "item_bias": True}),
    _fnn("+ epoch sampling", {**COUNT, "item_bias": True, "sampling": "epoch"}),
    _fnn("+ newton server", {**OURS, "predictor": None}, quick_learner=True),
    _fnn(BCE_DEFAULT, OURS, without="+ newton server", quick_learner=True),
    _fnn(WHOLE_DEFAULT, WHOLE, candidates=WHOLE_RATES, quick_learner=True, protocols=("refit",)),
    _fnn(
        "whole-data, as held",
        {**WHOLE, "refit": False, "predictor": None},
        candidates=WHOLE_RATES,
        quick_learner=True,
        protocols=("held",),
    ),
    _fnn(
        "whole-data, as held, predicted",
        {**WHOLE, **FALLING, "refit": False},
        candidates=WHOLE_RATES,
        without="whole-data, as held",
        quick_learner=True,
        protocols=("held",),
    ),
]

# What larger data are tried on; the ablations are for the smaller ones.
MAIN = {
    FEDAVG,
    "FedAvg, server rate tuned",
    "FedAvg + count",
    FEDFAST,
    MLP,
    "+ newton server",
    BCE_DEFAULT,
    WHOLE_DEFAULT,
}

# -------------------------------------------------------------------- running


@dataclass(frozen=True)
class Plan:
    """How much work is done."""

    n_seeds: int
    n_judged: int
    scale: float
    jobs: int
    n_candidates: int | None

    def rounds(self, method: Method, share: float, budget: tuple[int, int] | None = None) -> int:
        """Return a method's rounds: those of the nearest participation that is planned for."""
        nearest = min(ROUNDS, key=lambda known: abs(math.log(known / share)))
        n_rounds = (budget or ROUNDS[nearest])[method.quick_learner]
        return max(3, round(self.scale * n_rounds))

    def map(self, jobs: Sequence[Any]) -> list[Any]:
        """Run delayed calls, each on one thread."""
        done: list[Any] = Parallel(n_jobs=self.jobs)(jobs)
        return done


def one_fit(
    method: Method, params: Params, data: Data, *, share: float, n_rounds: int, seed: int,
    n_judged: int, inner: bool = False,
) -> Params:  # fmt: skip
    """Fit once and record; `inner` for tuning, where one way of serving is enough."""
    found = fit_and_record(
        method.make,
        {**method.params, **params},
        split_of(data, seed, n_judged, inner=inner),
        protocols=method.protocols[:1] if inner else method.protocols,
        n_rounds=n_rounds,
        share=share,
        seed=seed,
    )
    last = found[method.protocols[0]].split()[-1]
    say(f"{data.name}, {share:g}, {method.name}, seed {seed}, {params}: at the end {last}")
    return found


def tune(methods: Sequence[Method], data: Data, plan: Plan) -> Params:
    """Choose the rates of every method by the best NDCG@20 on inner validation rows."""
    tried = [
        (method, params)
        for method in methods
        if method.rates_of is None
        for params in method.candidates[: plan.n_candidates]
    ]
    runs = plan.map(
        [
            delayed(one_fit)(
                method, params, data, share=TUNING_SHARE, seed=0, n_judged=plan.n_judged,
                n_rounds=plan.rounds(method, TUNING_SHARE, TUNING_ROUNDS), inner=True,
            )
            for method, params in tried
        ]
    )  # fmt: skip
    tuned: Params = {}
    for (method, params), run in zip(tried, runs, strict=True):
        best = best_of(unpack(run[method.protocols[0]]))
        entry = tuned.setdefault(method.name, {"chosen": None, "tried": []})
        # What diverges within the budget would do so later, however good it was before.
        found = None if run["diverged"] else round(best, 4)
        entry["tried"].append({"params": params, "ndcg@20": found})
    for name, entry in tuned.items():
        chosen = max(entry["tried"], key=lambda one: one["ndcg@20"] or 0.0)
        if not chosen["ndcg@20"]:
            raise FloatingPointError(f"All candidates of {name} diverged on {data.name}.")
        entry["chosen"] = chosen["params"]
    for method in methods:
        if method.rates_of is not None:
            tuned[method.name] = {"chosen": tuned[method.rates_of]["chosen"], "tried": []}
    return tuned


def measure(
    methods: Sequence[Method], data: Data, share: float, tuned: Params, plan: Plan
) -> Params:
    """Fit all methods on all seeds at one participation."""
    work = [(method, seed) for method in methods for seed in range(plan.n_seeds)]
    runs = plan.map(
        [
            delayed(one_fit)(
                method, tuned[method.name]["chosen"], data, share=share, seed=seed,
                n_rounds=plan.rounds(method, share), n_judged=plan.n_judged,
            )
            for method, seed in work
        ]
    )  # fmt: skip
    measured: Params = {}
    for (method, _), run in zip(work, runs, strict=True):
        rounds = run.pop("rounds")  # the same for all seeds
        row = {"without": method.without, "rounds": rounds, "runs": []}
        measured.setdefault(method.name, row)["runs"].append(run)
    return measured


# ----------------------------------------------------------------- the script


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--participation", type=float, action="append", metavar="SHARE",
                        help="of the clients in a round; may be repeated")  # fmt: skip
    parser.add_argument("--rounds-scale", type=float, default=1.0, metavar="F",
                        help="all numbers of rounds times this")  # fmt: skip
    parser.add_argument("--judged-users", type=int, default=1_000, metavar="N",
                        help="rank at most so many, a fixed random sample")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(__doc__, SCRIPT, seeds=3, argv=argv, options=add_options)
    quick = arguments.quick
    plan = Plan(
        n_seeds=1 if quick else arguments.seeds,
        n_judged=arguments.judged_users,
        scale=0.02 if quick else arguments.rounds_scale,
        jobs=arguments.jobs,
        n_candidates=2 if quick else None,
    )
    results: Params = {}
    goals: list[Goal] = []
    tuned: Params | None = None
    for data in load(arguments.data, quick=quick):
        many = data.sizes["users"] > MANY_USERS
        shares = arguments.participation or ((0.05,) if quick else (0.01, 0.05) if many else ROUNDS)
        methods = [method for method in METHODS if not many or method.name in MAIN]
        if tuned is None:
            tuned_on = data.name
            tuned = tune(METHODS, data, plan)
        results[data.name] = {**data.sizes, "participation": {}}
        for share in shares:
            measured = measure(methods, data, share, tuned, plan)
            derived = {protocol: derive(measured, protocol) for protocol in PROTOCOLS}
            entry = {"derived": derived, "measured": measured}
            results[data.name]["participation"][f"{share:g}"] = entry
            if not quick and share in GOAL_SHARES:
                goals += goals_of(f"{data.name}, {100 * share:g}%", derived)
            write_json(arguments, SCRIPT, report(arguments, results, tuned, tuned_on, plan), goals)
    if arguments.plot is not None:
        plot(results, arguments.plot)
    show(results, goals)
    return 0


def report(
    arguments: argparse.Namespace, results: Params, tuned: Params, tuned_on: str, plan: Plan
) -> Params:
    """Collect what the JSON says besides goals and machine."""
    return {
        "command": arguments.repeat,
        "what": {
            "split": "a random fifth of every user's items held out, PerUserHoldout(0.2)",
            "metric": "NDCG@20, all unseen items ranked, mean over the judged users",
            "judged_users": plan.n_judged,
            "seeds": list(range(plan.n_seeds)),
            "jobs": plan.jobs,
            "threads": 1,
            "served": PROTOCOLS,
            "curves": "values at the rounds of the same name; apart: round, judged users who took "
            "part until then, NDCG@20 of these, and of the others",
            "mark": "percent of FedAvg's best: mean over the seeds, running mean over 3 points",
        },
        "tuning": {
            "data": tuned_on,
            "participation": TUNING_SHARE,
            "rounds": {m.name: plan.rounds(m, TUNING_SHARE, TUNING_ROUNDS) for m in METHODS},
            "criterion": "best NDCG@20 within these rounds on a fifth held out from the training "
            "rows of seed 0, served as held (FedFNN: as it is)",
            "methods": tuned,
        },
        "data": results,
    }


def show(results: Params, goals: Sequence[Goal]) -> None:
    """Print tables and goals."""
    for heading, rows in tables_of(results):
        print(f"\n{heading}")
        print(format_table(HEADER, rows))
    for name, result in results.items():
        for share, entry in result["participation"].items():
            print(f"\n{name}, {100 * float(share):g}% of the clients")
            print(format_table(COST_HEADER, cost_rows(entry["measured"])))
    print()
    print("\n".join(map(str, goals)) or "goals: none with --quick")


if __name__ == "__main__":
    raise SystemExit(main())
