"""What it brings to give clients models of different sizes: HeteFedRec next to its baselines.

Of every user's items a random fifth is held out for the test, and of the remaining ones a tenth
for validation, other ones for each seed. Every method is fitted to the rest, without a refit
afterwards. At five moments of a fit all items are ranked that the user had not in training:
validation rows then choose the moment, and the test's NDCG@20 and recall@20 at that moment are
the result. For the test, validation rows are masked like training rows.

All federated methods are one estimator with other arguments, have the same number of rounds and
of clients in a round, and are tuned with the same candidates, by the best validation NDCG@20 of
the first seed on the first data set; what was chosen holds for all data sets. With matrix
factorisation ("mf") nothing is tuned: its rates follow from the data.

Results are also given for three groups of clients, always 5:3:2 by their number of training
interactions, whatever sizes a method gives them.

Each run has a process of its own, so that peak memory is that of the run, and one thread. The
JSON is written after each; what it holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Data, command, format_table, load, one_thread, parse_arguments, say, write_json
from _curves import figure_class
from _sizes_report import (
    GROUPS,
    HETEFEDREC,
    NO_DECORRELATION,
    best_of,
    chosen_of,
    draw,
    goals_of,
    pack,
    summary_of,
    tables_of,
)
from accuracy import sampled
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from fedrecsk import CentralizedRecommender, HeteFedRecRecommender, PopularityRecommender
from fedrecsk.data import size_groups
from fedrecsk.data.interactions import encode
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.metrics import evaluate
from fedrecsk.model_selection import PerUserHoldout

SCRIPT = "hetefedrec_sizes"
K = 20
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
GROUP_RATIO = (5, 3, 2)
MOMENTS = 5
NETWORKS = ("ncf", "lightgcn")
BASES = (*NETWORKS, "mf")
LOCAL_EPOCHS = 5
MF_ROUNDS, MF_SHARE = 40, 0.2
CENTRAL_ROUNDS, N_FACTORS = 40, 32
# The last is the paper's way, as far as it is known: Adam on the clients, and plain averages.
PAPER_RATES = {
    "optimizer": "adam", "learning_rate": 0.01, "server_optimizer": "sgd",
    "server_learning_rate": 1.0, "client_weights": "uniform",
}  # fmt: skip
CANDIDATES: list[dict[str, Any]] = [
    *(
        {"optimizer": "sgd", "learning_rate": 0.3,
         "server_optimizer": "adam", "server_learning_rate": rate}
        for rate in (0.03, 0.1)
    ),
    PAPER_RATES,
]  # fmt: skip
# Methods of which the figure of spectra needs the widest table.
SPECTRA = (HETEFEDREC, NO_DECORRELATION)

Params = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Parameters
    ----------
    name : str
    params : dict
        Of `make`, besides those that all methods have.
    bases : tuple of str
        Base models that it is for.
    make : callable
        The estimator's class.
    sweep : bool
        Whether it comes only with ``--sweeps``.
    """

    name: str
    params: Params = field(default_factory=dict)
    bases: tuple[str, ...] = BASES
    make: Callable[..., Any] = HeteFedRecRecommender
    sweep: bool = False

    @property
    def federated(self) -> bool:
        """Whether there are clients, and rates to tune."""
        return self.make is HeteFedRecRecommender

    def candidates(self, base: str, n_candidates: int | None = None) -> list[Params]:
        """Return the settings to choose from."""
        return CANDIDATES[:n_candidates] if self.federated and base in NETWORKS else [{}]


SMALL, LARGE = {"sizes": (8, 8, 8)}, {"sizes": (32, 32, 32)}
PLAIN: Params = {"dual_task": False, "alpha": 0.0, "distill_fraction": 0.0}
METHODS = [
    Method(HETEFEDREC),
    Method("All Small", SMALL),
    Method("All Large", LARGE),
    Method("All Large-exclusive", {**LARGE, "contributors": "largest"}),
    # Tables of separate federations must not be brought together by distillation.
    Method("Clustered", {**PLAIN, "aggregation": "clustered"}),
    # Matrix factorisation has none of the three mechanisms that are off here.
    Method("Directly Aggregate", PLAIN, NETWORKS),
    Method("Standalone", {"aggregation": "standalone"}, NETWORKS),
    Method("- distillation", {"distill_fraction": 0.0}, NETWORKS),
    Method(NO_DECORRELATION, {"alpha": 0.0}, NETWORKS),
    Method("- dual task", {"dual_task": False}, NETWORKS),
    Method("denominator clients", {"denominator": "clients"}, NETWORKS),
    Method("denominator sum", {"denominator": "sum"}, NETWORKS),
    Method("auto sizes", {"sizes": "auto"}, ("mf",)),
    Method("auto ratio", {"group_ratio": "auto"}, ("mf",)),
    Method("alpha 0.1", {"alpha": 0.1}, NETWORKS, sweep=True),
    Method("alpha 1", {"alpha": 1.0}, NETWORKS, sweep=True),
    Method("sizes 2, 4, 8", {"sizes": (2, 4, 8)}, sweep=True),
    Method("sizes 32, 64, 128", {"sizes": (32, 64, 128)}, sweep=True),
    Method("ratio 1:1:1", {"group_ratio": (1, 1, 1)}, sweep=True),
    Method("ratio 2:3:5", {"group_ratio": (2, 3, 5)}, sweep=True),
    Method("popularity", make=PopularityRecommender),
    Method("centralised", {"n_factors": N_FACTORS}, make=CentralizedRecommender),
]
NAMED = {method.name: method for method in METHODS}
QUICK_METHODS = (HETEFEDREC, "All Small", "All Large")

# ----------------------------------------------------------------------- data


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a seed.

    Attributes
    ----------
    inner : ndarray
        Rows to fit.
    clients : ndarray or None
        Their clients.
    validation, test : ndarray
        Held-out rows of the users that are ranked.
    masked : ndarray
        Validation rows of all users.
    """

    inner: NDArray[Any]
    clients: NDArray[Any] | None
    validation: NDArray[Any]
    test: NDArray[Any]
    masked: NDArray[Any]

    @classmethod
    def of(cls, data: Data, seed: int) -> Split:
        """Hold out a fifth for the test, and a tenth of the rest for validation."""
        train, test = next(PerUserHoldout(TEST_SHARE, random_state=seed).split(data.X))
        inner, held_out = next(
            PerUserHoldout(VALIDATION_SHARE, random_state=seed).split(data.X[train])
        )
        rows = train[inner]
        masked = data.X[train[held_out]]
        n_users = data.sizes["users"]
        return cls(
            inner=data.X[rows],
            clients=None if data.clients is None else data.clients[rows],
            validation=sampled(masked, n_users),
            test=sampled(data.X[test], n_users),
            masked=masked,
        )


class Lists(BaseEstimator):
    """Lists that a recommender gave, with some items taken out, for `fedrecsk.metrics`.

    Parameters
    ----------
    model : fitted recommender
    ids, scores : ndarray of shape (n_users, length)
        What it recommends to all its users.
    hidden : ndarray of shape (n, 2 or more)
        Users and items that are to count as seen as well.
    """

    def __init__(
        self,
        model: Any,
        ids: NDArray[Any],
        scores: NDArray[np.floating[Any]],
        hidden: NDArray[Any],
    ) -> None:
        self.user_ids_, self.item_ids_ = model.user_ids_, model.item_ids_
        n_users, n_items = len(self.user_ids_), len(self.item_ids_)
        user, known_user = Vocabulary(self.user_ids_).encode(hidden[:, 0])
        item, known_item = Vocabulary(self.item_ids_).encode(hidden[:, 1])
        known = known_user & known_item
        taken = user[known] * n_items + item[known]
        rows = np.repeat(np.arange(n_users), np.diff(model.seen_indptr_))
        seen = np.union1d(rows * n_items + model.seen_indices_, taken)
        self.seen_indptr_ = np.searchsorted(seen, np.arange(n_users + 1) * n_items)
        self.seen_indices_ = seen % n_items
        listed = Vocabulary(self.item_ids_).encode(ids.ravel())[0].reshape(ids.shape)
        out = np.isin(np.arange(n_users)[:, None] * n_items + listed, taken)
        order = np.argsort(out, axis=1, kind="stable")  # those that stay, in their order
        self.ids_ = np.take_along_axis(ids, order, axis=1)
        self.scores_ = np.take_along_axis(np.where(out, -np.inf, scores), order, axis=1)

    def fit(self, X: Any, client_ids: Any = None) -> Lists:
        """Do nothing; `fedrecsk.metrics` asks for estimators."""
        return self

    def recommend(
        self, users: NDArray[Any], k: int
    ) -> tuple[NDArray[Any], NDArray[np.floating[Any]]]:
        """Give the first k."""
        rows = Vocabulary(self.user_ids_).encode(users)[0]
        return self.ids_[rows, :k], self.scores_[rows, :k]


class Judge:
    """Ranks once, and judges on validation and test rows."""

    def __init__(self, split: Split) -> None:
        self._split = split
        data = encode(split.inner, split.clients)
        group = size_groups(np.diff(data.client_indptr), GROUP_RATIO)[data.user_client]
        self._groups = {
            user: GROUPS[g] for user, g in zip(data.users.ids.tolist(), group, strict=True)
        }
        # So long that the first 20 are there after validation rows are taken out.
        per_user = np.unique(split.masked[:, 0], return_counts=True)[1]
        self._length = K + int(per_user.max(initial=0))

    def __call__(self, model: Any) -> Params:
        """Return the two metrics: of validation, of the test, and of its groups."""
        split = self._split
        ids, scores = model.recommend(k=self._length)
        nothing, hidden = split.masked[:0], split.masked
        validation = evaluate(
            Lists(model, ids, scores, nothing), split.validation, metrics="ndcg", k=K
        )
        test = evaluate(
            Lists(model, ids, scores, hidden),
            split.test,
            metrics=("ndcg", "recall"),
            k=K,
            groups=self._groups,
        )
        return {
            "validation": validation.overall["ndcg@20"],
            **test.overall,
            "groups": test.per_group,
        }


# ------------------------------------------------------------------------ run


class Recorder:
    """A callback that judges the model after some rounds."""

    def __init__(self, rounds: Sequence[int], judge: Callable[[Any], Params]) -> None:
        self.found: list[Params] = []
        self._rounds = set(rounds)
        self._judge = judge
        self._round = 0

    def setup(self, estimator: Any, context: Any) -> None:
        """Do nothing."""

    def teardown(self, estimator: Any, context: Any) -> None:
        """Do nothing."""

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        """Count the rounds."""
        self._round += context.task_name == "round"

    @property
    def on_fit_task_end(self) -> Callable[..., None]:
        """The hook that asks for a fitted estimator, if this is one of the rounds.

        An estimator is put together for hooks that ask for it. Where bystanders fit their vectors
        to be served, that costs as much as a round.
        """
        return self._look if self._round in self._rounds else self._pass

    def _look(self, estimator: Any, context: Any, *, fitted_estimator: Any) -> None:
        if context.task_name == "round":
            self.found.append(self._judge(fitted_estimator))

    def _pass(self, estimator: Any, context: Any) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Task:
    """One fit.

    Attributes
    ----------
    base, method : str
    seed : int
    candidate : dict
        Settings that were, or are, tuned.
    params : dict
        Of the estimator, those of the candidate and `n_rounds` included.
    rounds : tuple of int
        After which the model is judged; the last is the end.
    epochs : tuple of float
        Passes over the clients until then.
    """

    base: str
    method: str
    seed: int
    candidate: Params
    params: Params
    rounds: tuple[int, ...]
    epochs: tuple[float, ...]

    def key(self, data: Data) -> Params:
        """Return what tells a run from others, as the JSON has it."""
        key = {
            "data": data.name,
            "interactions": len(data.X),
            "base": self.base,
            "method": self.method,
            "seed": self.seed,
            "candidate": self.candidate,
            "params": self.params,
            "rounds": list(self.rounds),
        }
        loaded: Params = json.loads(json.dumps(key))
        return loaded


def fits(task: Task, judge: Callable[[Any], Params], split: Split, into: list[Params]) -> Any:
    """Fit, put what `judge` finds at each moment `into` a list, and return the last model."""
    make = NAMED[task.method].make
    if make is PopularityRecommender:
        model = make().fit(split.inner, split.clients)
        into.append(judge(model))
        return model
    if task.params.get("aggregation") != "standalone":
        recorder = Recorder(task.rounds, judge)
        recorder.found = into
        model = make(**task.params, random_state=task.seed)
        return model.set_callbacks(recorder).fit(split.inner, split.clients)
    # Clients that are alone train in one go: each moment takes a fit.
    for n_rounds in task.rounds:
        model = make(**{**task.params, "n_rounds": n_rounds}, random_state=task.seed)
        into.append(judge(model.fit(split.inner, split.clients)))
    return model


def one_run(data: Data, task: Task) -> Params:
    """Fit once and return everything that is recorded, ready for JSON."""
    before = peak_megabytes()
    split = Split.of(data, task.seed)
    name = f"{data.name}, {task.base}, {task.method}, seed {task.seed}"
    judge = Judge(split)
    found: list[Params] = []

    def watch(model: Any) -> Params:
        seen = judge(model)
        epoch = task.epochs[len(found)]
        say(f"{name}, epoch {epoch:g}: {seen['validation']:.4f} test {seen['ndcg@20']:.4f}")
        return seen

    model = None
    start = time.perf_counter()
    with one_thread():
        try:
            model = fits(task, watch, split, found)
        # A table of huge numbers leaves a refit without a solution; torch documents the name but
        # does not list it for type checkers.
        except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            say(f"{name}: {error}")
    return {
        **task.key(data),
        "epochs": list(task.epochs),
        **curves(found, len(task.rounds)),
        "diverged": model is None,
        "wall_seconds": round(time.perf_counter() - start, 2),
        "peak_rss_mb": peak_megabytes(),
        "rss_before_mb": before,
        **({} if model is None else costs(model, task)),
    }


def curves(found: Sequence[Params], n_moments: int) -> Params:
    """Put what was found at each moment into curves; nan after training diverged."""

    def curve(read: Callable[[Params], float]) -> str:
        return pack([read(one) for one in found] + [math.nan] * (n_moments - len(found)))

    groups = found[0]["groups"] if found else {}
    return {
        "validation": curve(lambda one: one["validation"]),
        "ndcg@20": curve(lambda one: one["ndcg@20"]),
        "recall@20": curve(lambda one: one["recall@20"]),
        "groups": {
            group: {
                "users": groups[group]["n_users"],
                **{
                    key: curve(lambda one, g=group, key=key: one["groups"][g][key])  # type: ignore[misc]
                    for key in ("ndcg@20", "recall@20")
                },
            }
            for group in GROUPS
            if group in groups
        },
    }


def costs(model: Any, task: Task) -> Params:
    """Seconds, traffic, numbers that clients hold, and the spectrum of the widest table."""
    history = getattr(model, "history_", [])
    epochs = task.epochs[-1] or 1
    seconds = sum(record["seconds"] for record in history)
    found: Params = {"seconds_per_epoch": round(seconds / epochs, 4)}
    if not NAMED[task.method].federated:
        return found
    for way in ("bytes_down", "bytes_up"):
        found[f"{way}_per_epoch"] = round(sum(record[way] for record in history) / epochs)
    alone = task.params.get("aggregation") == "standalone"
    sizes = model.sizes_.tolist()
    # A client that is alone holds a model but sends nothing of it.
    numbers = {} if alone else {
        str(size): int(model.client_parameters_[model.client_sizes_ == size][0]) for size in sizes
    }  # fmt: skip
    found |= {
        "group_sizes": model.group_sizes_.tolist(),
        "group_ratio": [round(share, 4) for share in model.group_ratio_.tolist()],
        "numbers": numbers,
        "numbers_mean": 0.0 if alone else round(float(model.client_parameters_.mean()), 1),
    }
    if not alone:
        for key in ("effective_rank", "singular_value_variance"):
            known = [record[key] for record in history if record.get(key) is not None]
            found[key] = known[-1] if known else None
    if task.method in SPECTRA and task.seed == 0:
        found["table_root"] = [pack(row) for row in root_of(model.item_factors_)]
    return found


def root_of(table: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return a square matrix with the inner products of the standardised columns of a table.

    Above its negative it is a table with the same correlations, in few rows.
    """
    centred = table.astype(np.float64) - table.mean(axis=0, dtype=np.float64)
    scale = centred.std(axis=0)
    centred /= np.where(scale > 0, scale, 1.0) * math.sqrt(len(table))
    root: NDArray[np.float64] = np.asarray(np.linalg.qr(centred, mode="r"))
    return root


def peak_megabytes() -> float:
    """Most memory that this process has held so far."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


# ----------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes
    ----------
    epochs : int
        Passes over the clients.
    cohort : int
        Clients in a round of networks, at most.
    moments : int
        At which a fit is judged.
    central_rounds : int
    """

    epochs: int
    cohort: int
    moments: int = MOMENTS
    central_rounds: int = CENTRAL_ROUNDS

    def task(self, data: Data, base: str, method: Method, seed: int, candidate: Params) -> Task:
        """Work out the arguments and moments of a fit."""
        clients = data.X[:, 0] if data.clients is None else data.clients
        n_clients = len(np.unique(clients))
        share = min(self.cohort, max(1, n_clients // 3)) / n_clients
        params: Params
        if method.make is PopularityRecommender:
            return Task(base, method.name, seed, {}, {}, (0,), (0.0,))
        if method.make is CentralizedRecommender:
            rounds = self._rounds(self.central_rounds)
            params = {**method.params, "model": base, "n_rounds": rounds[-1]}
            return Task(base, method.name, seed, {}, params, rounds, rounds)
        if base == "mf":
            share = MF_SHARE
            rounds = self._rounds(MF_ROUNDS)
            epochs = tuple(n * MF_SHARE for n in rounds)
            params = {"clients_per_round": MF_SHARE}
        else:
            epochs = tuple(self.epochs * i / self.moments for i in range(1, self.moments + 1))
            # Rounded first: 3 epochs of a third of the clients are 9 rounds.
            rounds = tuple(math.ceil(round(epoch / share, 6)) for epoch in epochs)
            params = {
                "clients_per_round": round(share * n_clients),
                "local_epochs": LOCAL_EPOCHS,
                "refit": False,
            }
        params |= {"base_model": base, "n_rounds": rounds[-1], **method.params, **candidate}
        return Task(base, method.name, seed, candidate, params, rounds, epochs)

    def _rounds(self, n_rounds: int) -> tuple[int, ...]:
        return tuple(round(n_rounds * i / self.moments) for i in range(1, self.moments + 1))


class Store:
    """Runs that are done, in a JSON file that is written after each.

    Parameters
    ----------
    arguments : argparse.Namespace
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        out: Path = arguments.out
        old: Params = {}
        if out.is_file() and not arguments.fresh:
            old = json.loads(out.read_text())
            if arguments.quick and not old["quick"]:
                raise SystemExit(f"{out} holds results of hours; give --quick another --out.")
            if arguments.quick or old["quick"]:
                old = {}  # nothing that is worth keeping, or to be tried anew
        self.runs: list[Params] = old.get("runs", [])
        self.tuning: Params = old.get("tuning", {})
        # The data, and how they were run last: what the summary is about.
        self.data: Params = old.get("data", {})
        self.tuned_on: str | None = old.get("tuned_on")
        commands = [*old.get("commands", []), arguments.repeat]
        self.commands = list(dict.fromkeys(commands))

    def find(self, key: Params) -> Params | None:
        """Return the run with this key."""
        for run in self.runs:
            if all(run[name] == value for name, value in key.items()):
                return run
        return None

    def get(self, data: Data, tasks: Sequence[Task]) -> list[Params]:
        """Run what is not there, and return the runs of all tasks."""
        missing = [task for task in tasks if self.find(task.key(data)) is None]
        if len(missing) < len(tasks):
            say(f"{data.name}: {len(tasks) - len(missing)} runs are there already")
        jobs = 0 if self.arguments.quick else self.arguments.jobs
        for number, run in enumerate(run_all(data, missing, jobs), start=1):
            self.runs.append(run)
            self.write()
            say(f"{data.name}, {run['base']}: {number} of {len(missing)}: {line_of(run)}")
        found = [run for run in (self.find(task.key(data)) for task in tasks) if run is not None]
        # What is asked for last stands last, which is what the summary goes by.
        asked = {id(run) for run in found}
        self.runs = [run for run in self.runs if id(run) not in asked] + found
        return found

    def write(self) -> None:
        """Write what there is; a file is there in full or not at all."""
        summary = summary_of(self.runs, self.tuning, self.data)
        goals = [] if self.arguments.quick else goals_of(summary)
        results = {
            "command": "; ".join(self.commands),
            "commands": self.commands,
            "what": WHAT,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "jobs": self.arguments.jobs,
            "tuned_on": self.tuned_on,
            "tuning": self.tuning,
            "data": self.data,
            "summary": summary,
            "runs": self.runs,
        }
        part = self.arguments.out.with_suffix(".part")
        write_json(argparse.Namespace(**{**vars(self.arguments), "out": part}), SCRIPT, results,
                   goals)  # fmt: skip
        os.replace(part, self.arguments.out)


def run_all(data: Data, tasks: Sequence[Task], jobs: int) -> Iterator[Params]:
    """Give runs as they are done, each out of a new process; of this one if `jobs` is 0."""
    if not jobs:
        yield from (one_run(data, task) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fedrecsk"])  # takes seconds, once and not each time
    pool = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)
    try:
        for done in as_completed([pool.submit(one_run, data, task) for task in tasks]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def line_of(run: Params) -> str:
    """Say in a line how a run went."""
    best = best_of(run)
    text: str = f"{run['method']}, seed {run['seed']}, {run['candidate']}: "
    if best is None:
        return text + "diverged"
    text += f"NDCG@20 {best['ndcg@20']:.4f} at epoch {best['epoch']:g} "
    text += f"(validation {best['validation']:.4f}); "
    text += f"{run.get('seconds_per_epoch', math.nan):.2f} s an epoch, {run['peak_rss_mb']:.0f} MB"
    return text + (", diverged later" if run["diverged"] else "")


WHAT = {
    "split": "a random fifth of every user's items for the test, a tenth of the rest for "
    "validation; methods are fitted to what remains",
    "metric": "NDCG@20 and recall@20, all items ranked that are in neither training nor "
    "validation, mean over users, at the moment with the best validation NDCG@20",
    "curves": "values at the rounds and epochs of the same run",
    "groups": "clients by training interactions, 5:3:2",
    "threads": 1,
    "table_root": "a matrix R with the widest table's correlations R'R, of the first seed",
    "seconds_per_epoch": "of training rounds, a pass over the clients; nobody is ranked in them",
}

# ----------------------------------------------------------------- the script


def measure(
    store: Store, data: Data, base: str, methods: Sequence[Method], plan: Plan, n_seeds: int,
    n_candidates: int | None, tuned_on: str,
) -> None:  # fmt: skip
    """Tune where this is the data to tune on, then run all seeds."""
    about = store.data.setdefault(data.name, {**data.sizes, "plans": {}})
    about["plans"][base] = {"epochs": plan.epochs, "cohort": plan.cohort, "moments": plan.moments}
    tuned = store.tuning.setdefault(base, {}).setdefault(tuned_on, {})
    if data.name == tuned_on:
        tasks = [
            plan.task(data, base, method, 0, candidate)
            for method in methods
            for candidate in method.candidates(base, n_candidates)
        ]
        runs = store.get(data, tasks)
        for method in methods:
            tuned[method.name] = chosen_of([run for run in runs if run["method"] == method.name])
    untuned = [method.name for method in methods if method.name not in tuned]
    if untuned:
        raise SystemExit(
            f"{', '.join(untuned)} ({base}) were not tuned on {tuned_on}; give it as the first "
            "--data, or pass --tune-each."
        )
    about["tuned_on"] = {**about.get("tuned_on", {}), base: tuned_on}
    store.get(
        data,
        [
            plan.task(data, base, method, seed, tuned[method.name]["chosen"])
            for seed in range(n_seeds)
            for method in methods
        ],
    )
    store.write()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments of all scripts, and those of this one."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="")
    own.add_argument("--base", action="append", choices=BASES, help="may be repeated; ncf")
    own.add_argument("--methods", action="append", metavar="NAME",
                     help=f"may be repeated; of: {', '.join(NAMED)}")  # fmt: skip
    own.add_argument("--sweeps", action="store_true", help="also alpha, sizes and ratios")
    own.add_argument("--epochs", type=int, default=20, metavar="N", help="of networks")
    own.add_argument("--cohort", type=int, default=256, metavar="N",
                     help="clients in a round of networks, at most a third")  # fmt: skip
    own.add_argument("--tune-each", action="store_true", help="tune on each data set")
    own.add_argument("--fresh", action="store_true", help="forget what --out holds")
    own.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    own.add_argument("--figures", type=Path, metavar="DIR", help="PNGs go there")
    known, rest = own.parse_known_args(argv)
    further = " ".join(own.format_help().partition("options:")[2].split())
    about = f"{__doc__ or ''} Further options: {further}".replace("%", "%%")
    arguments = parse_arguments(about, SCRIPT, seeds=3, argv=rest)
    vars(arguments).update(vars(known))
    for name in ("jobs", "epochs", "cohort"):
        if getattr(known, name) < 1:
            own.error(f"--{name} must be at least 1, got {getattr(known, name)}")
    for name in known.methods or ():
        if name not in NAMED:
            own.error(f"--methods {name} is unknown; choose from {', '.join(NAMED)}")
    if known.figures is not None:
        figure_class()  # now and not after hours of work
    words = [command(arguments, SCRIPT)]
    for name in ("base", "methods", "sweeps", "epochs", "cohort", "tune_each"):
        value = getattr(known, name)
        if value != own.get_default(name):
            option = f"--{name.replace('_', '-')}"
            for one in value if isinstance(value, list) else [value]:
                words.append(shlex.join([option] if one is True else [option, str(one)]))
    arguments.repeat = " ".join(words)
    return arguments


def chosen_methods(arguments: argparse.Namespace, base: str) -> list[Method]:
    """Return the methods that were asked for and are for this base."""
    names = arguments.methods or (QUICK_METHODS if arguments.quick else None)
    return [
        method
        for method in METHODS
        if base in method.bases
        and (method.name in names if names else arguments.sweeps or not method.sweep)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    quick = arguments.quick
    plan = Plan(arguments.epochs, arguments.cohort)
    if quick:
        plan = Plan(epochs=2, cohort=arguments.cohort, moments=2, central_rounds=2)
    store = Store(arguments)
    sets = load(arguments.data, quick=quick)
    store.tuned_on = store.tuned_on or sets[0].name
    for base in arguments.base or ("ncf",):
        methods = chosen_methods(arguments, base)
        for data in sets:
            measure(
                store, data, base, methods, plan,
                n_seeds=1 if quick else arguments.seeds,
                n_candidates=2 if quick else None,
                tuned_on=data.name if arguments.tune_each else store.tuned_on,
            )  # fmt: skip
    summary = summary_of(store.runs, store.tuning, store.data)
    if arguments.figures is not None:
        draw(summary, store.runs, arguments.figures)
    for heading, header, rows in tables_of(summary):
        print(f"\n{heading}")
        print(format_table(header, rows))
    print()
    print("\n".join(map(str, goals_of(summary))) if not quick else "goals: none with --quick")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
