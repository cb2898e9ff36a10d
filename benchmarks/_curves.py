"""NDCG@20 over the rounds of one fit, under two ways of serving, and what is read off curves.

``"held"``: users are served with the vectors they hold after the round. ``"refit"``: before being
served every user fits its own vector to its own rows and the item vectors of the round, on its
own device. A curve of the second kind is computed next to the first, in the same training run.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _common import Data, command, one_thread, parse_arguments
from numpy.typing import NDArray

from fedrecsk import FedFNNRecommender
from fedrecsk.data.interactions import encode
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.sampling import cohort_size, uniform_cohort
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.streams import Streams
from fedrecsk.methods import fedfnn
from fedrecsk.methods.bce_rounds import bce_step
from fedrecsk.methods.factor_state import FactorState
from fedrecsk.methods.meta_network import predict_updates
from fedrecsk.metrics import evaluate
from fedrecsk.model_selection import PerUserHoldout
from fedrecsk.models import sampled_bce
from fedrecsk.models.factors import random_factors

N_FACTORS = 32
LOCAL = {"local_epochs": 5, "n_negatives": 4, "batch_size": 64}  # of every method with "bce"
INIT_SCALE, REFIT_STEPS = 0.1, 20  # with "bce", as the estimators have them
# A refit costs as much as several rounds, so its curve has fewer points.
GRIDS = {"held": (30, 1.1), "refit": (10, 1.2)}
# Users who took part and those who never did are told apart at the grid rounds from here on.
APART_FROM = (5, 20, 60, 200)

Params = dict[str, Any]


# ------------------------------------------------------------------ arguments


def parse(
    description: str | None,
    script: str,
    *,
    seeds: int,
    argv: Sequence[str] | None,
    options: Callable[[argparse.ArgumentParser], None],
) -> argparse.Namespace:
    """Read the arguments of all scripts, ``--jobs`` and ``--plot``, and those that `options` adds.

    Returns
    -------
    argparse.Namespace
        With ``repeat``, the command line that does it again.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="")
    options(own)
    own.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    own.add_argument("--plot", type=Path, metavar="FILE", help="PNG")
    known, rest = own.parse_known_args(argv)
    further = " ".join(own.format_help().partition("options:")[2].split())
    about = f"{description or ''} Further options: {further}"
    arguments = parse_arguments(about, script, seeds=seeds, argv=rest)
    vars(arguments).update(vars(known))
    if known.jobs < 1:
        own.error(f"--jobs must be at least 1, got {known.jobs}")
    if known.plot is not None:
        figure_class()  # now and not after hours of work
    words = [command(arguments, script)]
    for name, value in vars(known).items():
        if name not in ("jobs", "plot") and value != own.get_default(name):
            for one in value if isinstance(value, list) else [value]:
                words.append(shlex.join([f"--{name.replace('_', '-')}", f"{one:g}"]))
    arguments.repeat = " ".join(words)
    return arguments


def figure_class() -> Any:
    """Return matplotlib's Figure, which needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(
            '--plot needs matplotlib. Install it with: pip install "fedrecsk[plot]"'
        ) from None
    return Figure


# ----------------------------------------------------------------------- data


@dataclass(frozen=True, eq=False)
class Split:
    """Training rows, their clients, and the held-out rows of the users that are ranked."""

    train: NDArray[Any]
    clients: NDArray[Any] | None
    held_out: NDArray[Any]


def split_of(data: Data, seed: int, n_judged: int, *, inner: bool = False) -> Split:
    """Hold out a random fifth of each user's items; a fixed sample of users is ranked.

    With `inner` the fifth is taken from the training rows, for tuning.
    """
    rows = np.arange(len(data.X))
    for _ in range(1 + inner):
        train, test = next(PerUserHoldout(0.2, random_state=seed).split(data.X[rows]))
        rows, held_out = rows[train], rows[test]
    users = np.unique(data.X[:, 0])
    if len(users) > n_judged:
        users = np.random.default_rng(0).permutation(users)[:n_judged]
        held_out = held_out[np.isin(data.X[held_out, 0], users)]
    clients = None if data.clients is None else data.clients[rows]
    return Split(data.X[rows], clients, data.X[held_out])


def rounds_grid(n_rounds: int, dense: int, growth: float) -> NDArray[np.int64]:
    """Every round up to `dense`, then every `growth` times as many, and the last."""
    grid = list(range(1, min(dense, n_rounds) + 1))
    while grid[-1] < n_rounds:
        grid.append(min(max(grid[-1] + 1, int(grid[-1] * growth)), n_rounds))
    return np.array(grid)


# ------------------------------------------------------------------ recording


class BceRefit:
    """Gives a copy of a fitted model in which every user has fitted its own vector.

    What an estimator with ``objective="bce"`` and ``refit=True`` does at the end of a fit.
    """

    def __init__(self, split: Split, seed: int) -> None:
        data = encode(split.train, split.clients)
        self._shards = _shards(data)
        self._key = Streams(seed).key("refit")
        judged = np.isin(data.users.ids, split.held_out[:, 0])
        self._clients = np.unique(data.user_client[judged])

    def __call__(self, model: Any) -> Any:
        biased = bool(model.item_bias)
        users = torch.from_numpy(model.user_factors_.copy())
        table = torch.from_numpy(model.item_factors_)
        if biased:
            table = torch.cat([table, torch.from_numpy(model.item_bias_)[:, None]], dim=1)
        n_negatives = LOCAL["n_negatives"]
        for cohort in self._shards.user_chunks(self._clients, rows_per_interaction=1 + n_negatives):
            users[cohort.users] = sampled_bce.refit_users(
                cohort,
                users[cohort.users],
                table,
                item_bias=biased,
                n_negatives=n_negatives,
                n_steps=REFIT_STEPS,
                l2=float(model.l2),  # tuned, never "auto" here
                key=self._key,
            )
        served = copy.copy(model)
        served.user_factors_ = users.numpy()
        return served


class Recorder:
    """A callback that ranks the held-out items after the rounds of a grid.

    Parameters
    ----------
    held_out : ndarray
        Held-out rows.
    grids : dict of str to ndarray
        For each way of serving, the rounds to rank after.
    refit : callable or None
        Gives the copy to rank under ``"refit"``; None: the model has refitted itself.
    """

    def __init__(
        self,
        held_out: NDArray[Any],
        grids: Mapping[str, NDArray[np.int64]],
        refit: BceRefit | None,
    ) -> None:
        self.grids = grids
        self.history: list[Params] = []
        self.apart: dict[str, list[str]] = {protocol: [] for protocol in grids}
        self._held_out = held_out
        self._refit = refit
        self._found: dict[tuple[str, int], float] = {}

    def setup(self, estimator: Any, context: Any) -> None:
        """Do nothing."""

    def teardown(self, estimator: Any, context: Any) -> None:
        """Do nothing."""

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        """Do nothing."""

    def on_fit_task_end(self, estimator: Any, context: Any, *, fitted_estimator: Any) -> None:
        """Record after every round."""
        if context.task_name == "round":
            self.record(fitted_estimator)

    def record(self, model: Any) -> None:
        """Rank with a fitted model, if its round is on the grid."""
        self.history = model.history_
        t = int(model.history_[-1]["round"])
        for protocol, grid in self.grids.items():
            if t not in grid:
                continue
            served = _finite(model)
            if protocol == "refit" and self._refit is not None:
                served = _finite(self._refit(model))
            found = evaluate(served, self._held_out, metrics="ndcg", k=20)
            self._found[protocol, t] = float(found.overall["ndcg@20"])
            if t in [grid[grid >= start].min(initial=grid[-1]) for start in APART_FROM]:
                self.apart[protocol].append(_apart(t, model, found))

    def curve(self, protocol: str) -> NDArray[np.float64]:
        """Return NDCG@20 on the grid; nan after training diverged."""
        grid = self.grids[protocol]
        return np.array([self._found.get((protocol, int(t)), np.nan) for t in grid])


def _finite(model: Any) -> Any:
    """Return a factor model as it is, unless its scores may overflow."""
    user, item = (np.abs(factors).max() for factors in (model.user_factors_, model.item_factors_))
    largest = float(user) * float(item) * model.user_factors_.shape[1]
    if not largest < float(np.finfo(np.float32).max):
        raise FloatingPointError("Training diverged: the scores overflow.")
    return model


def _apart(t: int, model: Any, found: Any) -> str:
    """Round, users who took part so far, NDCG@20 of those, and of the others."""
    sampled = model.times_sampled_[np.searchsorted(model.user_ids_, found.user_ids)] > 0
    values = found.per_user["ndcg@20"]
    sides = [values[side].mean() if side.any() else np.nan for side in (sampled, ~sampled)]
    return f"{t} {sampled.sum()} {pack(np.array(sides))}"


def fit_and_record(
    make: Callable[..., Any],
    params: Params,
    split: Split,
    *,
    protocols: Sequence[str],
    n_rounds: int,
    share: float,
    seed: int,
) -> Params:
    """Fit one method on one split and return its curves and diagnostics, ready for JSON.

    `make` returns an estimator with ``fit`` and ``set_callbacks``.
    """
    model = make(**params, n_rounds=n_rounds, clients_per_round=share, random_state=seed)
    bce = getattr(model, "objective", "bce") == "bce"
    grids = {name: rounds_grid(n_rounds, *GRIDS[name if bce else "held"]) for name in protocols}
    # The whole-data objective has a refit of its own, which is part of the estimator.
    refit = BceRefit(split, seed) if bce and "refit" in protocols else None
    recorder = Recorder(split.held_out, grids, refit)
    diverged = False
    with one_thread(), timed_predictions() as meta_seconds:
        try:
            model.set_callbacks(recorder).fit(split.train, split.clients)
        # A table of huge numbers leaves a refit without a solution; torch documents the name but
        # does not list it for type checkers.
        except (FloatingPointError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            diverged = True
    return {
        "seed": seed,
        "rounds": {protocol: pack(rounds) for protocol, rounds in grids.items()},
        **{protocol: pack(recorder.curve(protocol)) for protocol in grids},
        "apart": recorder.apart,
        "diverged": diverged,
        **_diagnostics(recorder.history, meta_seconds),
    }


def _diagnostics(history: Sequence[Params], meta_seconds: Sequence[float]) -> Params:
    """Seconds of a round, what share of them the meta-network takes, and how well it predicts."""
    seconds = [record["seconds"] for record in history]
    found: Params = {
        "seconds_per_round": round(statistics.median(seconds), 5) if seconds else None,
        "meta_network_share": round(sum(meta_seconds) / max(sum(seconds), 1e-9), 3),
    }
    tried = [record for record in history if "predictor_r2" in record]
    if tried:
        for name in ("predictor_r2", "predictor_cosine"):
            values = np.array([record[name] for record in tried], dtype=np.float64)
            known = values[np.isfinite(values)]
            found[name] = round(float(known.mean()), 4) if len(known) else None
        predicted = [record["predicted_share"] for record in tried]
        found["rounds_predicted"] = round(sum(s > 0 for s in predicted) / len(history), 3)
        found["users_predicted"] = round(sum(predicted) / len(history), 3)
    return found


@contextmanager
def timed_predictions() -> Iterator[list[float]]:
    """Collect the seconds of every call of the meta-network."""
    seconds: list[float] = []

    def timed(*args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return predict_updates(*args, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    with patch.object(fedfnn, "predict_updates", timed):
        yield seconds


# --------------------------------------------------------------------- oracle


class Oracle(FedFNNRecommender):
    """The literal method with perfect predictions: every user trains, delegates move the items.

    No server could do this; it bounds what any predictor can bring. Changes are averaged over
    the delegates that touched an item, without item bias, as in the literal rows.
    """

    def fit(self, X: NDArray[Any], client_ids: NDArray[Any] | None = None) -> Oracle:
        """Train, and tell the callbacks' `record` about every round."""
        recorders = self._skl_callbacks
        # One ordinary round leaves everything behind that ranking asks for.
        template = FedFNNRecommender(
            self.n_factors, objective="bce", n_rounds=1, predictor=None, refit=False,
            item_bias=False, l2=self.l2, random_state=self.random_state, device="cpu",
        ).fit(X, client_ids)  # fmt: skip
        data = encode(X, client_ids)
        shards, streams = _shards(data), Streams.from_random_state(self.random_state)
        users, table = random_factors(
            data.n_users, data.n_items, self.n_factors, item_bias=False,
            init_scale=INIT_SCALE, streams=streams, device=shards.device,
        )  # fmt: skip
        server = Optimizer("sgd", 1.0)
        state = FactorState.start(users, table, server, n_clients=data.n_clients)
        history = []
        for t in range(self.n_rounds):
            start = time.perf_counter()
            state = self._round(state, shards, t, streams, server)
            history.append({"round": t + 1, "seconds": time.perf_counter() - start})
            model = copy.copy(template)
            model.user_factors_ = state.user_factors.numpy()
            model.item_factors_ = state.item_table.numpy()
            model.times_sampled_ = state.times_sampled.numpy()
            model.history_ = list(history)
            for recorder in recorders:
                recorder.record(model)
        self.__dict__.update({k: v for k, v in vars(model).items() if k.endswith("_")})
        return self

    def _round(
        self,
        state: FactorState,
        shards: ClientShards,
        t: int,
        streams: Streams,
        server: Optimizer,
    ) -> FactorState:
        """Train the delegates and aggregate, then give all others their true changes."""
        size = cohort_size(self.clients_per_round, shards.n_clients)
        delegates = uniform_cohort(shards.n_clients, size, streams.numpy("sampling", t))
        local: Params = {
            "item_bias": False,
            "optimizer": Optimizer("sgd", float(self.learning_rate)),
            "l2": float(self.l2),
            **LOCAL,
        }
        trained, _ = bce_step(
            state, shards, delegates, t,
            streams=streams, item_weighting="count", server_optimizer=server, **local,
        )  # fmt: skip
        others = np.setdiff1d(np.arange(shards.n_clients), delegates)
        users = trained.user_factors.clone()
        for cohort in shards.chunks(others, rows_per_interaction=1 + LOCAL["n_negatives"]):
            users[cohort.users] = sampled_bce.train(
                cohort, state.user_factors[cohort.users], state.item_table,
                key=streams.key("examples", t), **local,
            ).user_vectors  # fmt: skip
        return replace(trained, user_factors=users)


def _shards(data: Any) -> ClientShards:
    return ClientShards.from_codes(
        data.user, data.item, data.user_client, data.n_clients, data.n_items, torch.device("cpu")
    )


# --------------------------------------------------------------------- curves


def pack(values: NDArray[Any]) -> str:
    """Write a curve as text of four digits, or a grid: a line of JSON and not a page."""
    if np.issubdtype(values.dtype, np.integer):
        return " ".join(map(str, values))
    return " ".join(f"{value:.4f}" for value in values)


def unpack(text: str) -> NDArray[np.float64]:
    """Read what `pack` wrote."""
    return np.array(text.split(), dtype=np.float64)


def best_of(curve: NDArray[np.float64]) -> float:
    """Best running mean over three points, so that a single lucky one does not count.

    Nan, which stands after training diverged, is passed over.
    """
    width = min(3, len(curve))
    return float(np.fmax.reduce(np.convolve(curve, np.full(width, 1 / width), mode="valid")))


def first_reaching(
    rounds: NDArray[np.float64], curve: NDArray[np.float64], target: float
) -> int | None:
    """First round at which the curve is at least `target`."""
    reached = np.flatnonzero(curve >= target)
    return int(rounds[reached[0]]) if len(reached) else None


def fewer(theirs: int | None, their_last: int, ours: int | None) -> float:
    """Return how many times fewer rounds ours takes than theirs; 0 if it never gets there.

    Where theirs does not get there either within their rounds, a bound from below.
    """
    if ours is None:
        return 0.0
    return round((their_last if theirs is None else theirs) / ours, 2)
