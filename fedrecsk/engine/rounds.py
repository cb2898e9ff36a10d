"""The loop over rounds: history, early stopping, and the checks that end a fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

State = TypeVar("State")
Record = dict[str, Any]

# A loss this many times that of the first round is divergence, whether or not it overflows.
DIVERGED = 100.0
TINY_LOSS = 1e-3


@dataclass(frozen=True)
class EarlyStopping(Generic[State]):
    """Stop when a held-out ranking metric has not improved for some rounds.

    Parameters
    ----------
    evaluate : callable
        ``evaluate(state) -> float``; larger is better.
    n_iter_no_change : int
        Rounds without improvement after which the fit ends.
    tol : float
        What counts as an improvement.
    """

    evaluate: Callable[[State], float]
    n_iter_no_change: int
    tol: float


@dataclass(frozen=True)
class RoundsResult(Generic[State]):
    """What the rounds leave behind.

    Attributes
    ----------
    state
        The last state, or with early stopping the one that validated best.
    history : list of dict
        One record a round.
    """

    state: State
    history: list[Record]


def run_rounds(
    step: Callable[[State, int], tuple[State, Record]],
    state: State,
    *,
    n_rounds: int,
    first_round: int = 0,
    past: Sequence[Record] = (),
    early_stopping: EarlyStopping[State] | None = None,
    on_round_begin: Callable[[], None] | None = None,
    on_round_end: Callable[[State, Record], bool] | None = None,
) -> RoundsResult[State]:
    """Run federated rounds from a start state.

    Parameters
    ----------
    step : callable
        ``step(state, t) -> (state, logs)``; `t` is the number of the round, `logs` a dict with
        at least ``loss``.
    state
        The start.
    n_rounds : int
        At most this many rounds.
    first_round : int, default=0
        Number of the first one; above zero where a fit goes on.
    past : sequence of dict, default=()
        Records of rounds of this fit that were run before it was interrupted; `state` is the one
        after them. They count among `n_rounds` and are in the history.
    early_stopping : EarlyStopping, optional
    on_round_begin : callable, optional
        Called before each round.
    on_round_end : callable, optional
        ``on_round_end(state, record) -> bool``; True ends the fit after this round.

    Returns
    -------
    RoundsResult

    Raises
    ------
    FloatingPointError
        If a round's loss is not finite, or a hundred times that of the first; says which round.

    Examples
    --------
    >>> from fedrecsk.engine.rounds import run_rounds
    >>> result = run_rounds(lambda s, t: (s + 1, {"loss": 1.0 / (t + 1)}), 0, n_rounds=3)
    >>> result.state, [record["round"] for record in result.history]
    (3, [1, 2, 3])
    """
    history: list[Record] = list(past)
    bound = _largest_loss(history[0]) if history else math.inf
    best_state, best_value, waited = state, -math.inf, 0
    if early_stopping is not None:
        for done in history:
            value = done["validation_ndcg"]
            waited = 0 if value > best_value + early_stopping.tol else waited + 1
            best_value = max(best_value, value)
        if history and waited >= early_stopping.n_iter_no_change:
            return RoundsResult(state=state, history=history)
    for t in range(first_round + len(history), first_round + n_rounds):
        if on_round_begin is not None:
            on_round_begin()
        start = time.perf_counter()
        state, logs = step(state, t)
        record: Record = {"round": t + 1, **logs, "seconds": time.perf_counter() - start}
        if t == first_round:
            bound = _largest_loss(record)
        if not record["loss"] <= bound or not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"Training diverged in round {t + 1}: the loss is {record['loss']}. "
                "Lower learning_rate or server_learning_rate, or raise l2."
            )
        stop = False
        if early_stopping is not None:
            value = early_stopping.evaluate(state)
            record["validation_ndcg"] = value
            waited = 0 if value > best_value + early_stopping.tol else waited + 1
            if value > best_value:
                best_state, best_value = state, value
            stop = waited >= early_stopping.n_iter_no_change
        history.append(record)
        if on_round_end is not None:
            # Called in every case: a callback sees the last round as well.
            stop = on_round_end(state, record) or stop
        if stop:
            break
    return RoundsResult(state=best_state if early_stopping is not None else state, history=history)


def _largest_loss(first: Record) -> float:
    """Give the loss above which a fit has diverged; any, where nobody had examples."""
    if first["loss"] == 0:
        return math.inf
    bound: float = DIVERGED * max(abs(first["loss"]), TINY_LOSS)
    return bound
