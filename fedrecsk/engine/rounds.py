"""The loop over rounds: history, early stopping, and the checks that end a fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fedrecsk.engine.parallel import anywhere, of_main

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


@dataclass(frozen=True, eq=False)
class Progress(Generic[State]):
    """Where a fit stands after a round: all that it needs to go on.

    Attributes
    ----------
    state
        After the round.
    best_state
        The state that validated best; without early stopping, `state`.
    best_value : float
        How well; -inf where nothing was validated.
    waited : int
        Rounds since the last improvement that counts.
    history : list of dict
        Records of the rounds of this fit.
    """

    state: State
    best_state: State
    best_value: float
    waited: int
    history: list[Record]


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
    past: Progress[State] | None = None,
    early_stopping: EarlyStopping[State] | None = None,
    save: Callable[[Progress[State]], None] | None = None,
    save_every: int = 1,
    on_round_begin: Callable[[], None] | None = None,
    on_round_end: Callable[[State, Record], bool] | None = None,
) -> RoundsResult[State]:
    """Run federated rounds from a start state.

    Parameters
    ----------
    step : callable
        ``step(state, t) -> (state, logs)``; `t` is the number of the round, `logs` a dict with
        at least ``loss``, which is None where nobody has trained. Tensors of shape () in it are
        read when the round is over.
    state
        The start.
    n_rounds : int
        At most this many rounds.
    first_round : int, default=0
        Number of the first one; above zero where a fit goes on.
    past : Progress, optional
        Where this fit was interrupted: it goes on from there and not from `state`. The rounds
        before count among `n_rounds` and are in the history.
    early_stopping : EarlyStopping, optional
    save : callable, optional
        ``save(progress)``, called before `on_round_end`, in which a caller may end everything.
    save_every : int, default=1
        Rounds between two calls of `save`; the last round is always saved.
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
    past = past or Progress(state, state, -math.inf, 0, [])
    state, best_state = past.state, past.best_state
    best_value, waited = past.best_value, past.waited
    history = list(past.history)
    losses = (record["loss"] for record in history)
    bound = next((_largest_loss(loss) for loss in losses if loss is not None), None)
    if early_stopping is not None and waited >= early_stopping.n_iter_no_change:
        return RoundsResult(state=best_state, history=history)
    for t in range(first_round + len(history), first_round + n_rounds):
        if on_round_begin is not None:
            on_round_begin()
        start = time.perf_counter()
        state, logs = step(state, t)
        # The one place where a GPU is waited for, so that the seconds are those of its work too.
        logs = read_logs(logs)
        record: Record = {"round": t + 1, **logs, "seconds": time.perf_counter() - start}
        loss = record["loss"]
        if loss is not None:
            bound = _largest_loss(loss) if bound is None else bound
            if not loss <= bound or not math.isfinite(loss):
                raise FloatingPointError(
                    f"Training diverged in round {t + 1}: the loss is {loss}. "
                    "Lower learning_rate or server_learning_rate, or raise l2."
                )
        stop = False
        if early_stopping is None:
            best_state = state
        elif loss is None:
            record["validation_ndcg"] = None  # nobody has trained, so there is nothing to wait for
        else:
            # One process decides for all, lest they part over the last digit.
            value = of_main(early_stopping.evaluate(state))
            record["validation_ndcg"] = value
            waited = 0 if value > best_value + early_stopping.tol else waited + 1
            if value > best_value:
                best_state, best_value = state, value
            stop = waited >= early_stopping.n_iter_no_change
        history.append(record)
        progress = Progress(state, best_state, best_value, waited, list(history))
        last = stop or len(history) == n_rounds
        due = save is not None and (last or len(history) % save_every == 0)
        if save is not None and due:
            save(progress)
        if on_round_end is not None:
            # Called in every case: a callback sees the last round as well.
            stop = on_round_end(state, record) or stop
        if anywhere(stop):
            if save is not None and not due:
                save(progress)
            break
    return RoundsResult(state=best_state, history=history)


def read_logs(logs: Record) -> Record:
    """Turn the tensors of shape () in a round's logs into numbers, all of them in one transfer.

    Parameters
    ----------
    logs : dict
        With tensors for the numbers that the device knows.

    Returns
    -------
    dict
        In the same order.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.rounds import read_logs
    >>> read_logs({"loss": torch.tensor(0.5), "clients": 3, "bytes_up": torch.tensor(12)})
    {'loss': 0.5, 'clients': 3, 'bytes_up': 12}
    """
    waiting = {name: value for name, value in logs.items() if isinstance(value, Tensor)}
    if not waiting:
        return logs
    # Double precision holds single precision and the whole numbers that occur, below 2**53.
    numbers = torch.stack([value.double() for value in waiting.values()]).tolist()
    read = {
        name: number if value.is_floating_point() else int(number)
        for (name, value), number in zip(waiting.items(), numbers, strict=True)
    }
    return {**logs, **read}


def _largest_loss(first: float) -> float:
    """Give the loss above which a fit has diverged; any, where nobody had examples."""
    return math.inf if first == 0 else DIVERGED * max(abs(first), TINY_LOSS)
