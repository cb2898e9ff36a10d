"""Who takes part in a round where clients cannot be relied upon.

    there      <- clients that are available in this round
    asked      <- the sampling's draw of ceil((1 + over_selection) * size) of them; all are sent
                  the model
    dropped    <- of these, each with the same chance; they never deliver
    late       <- the others whose training takes longer than the deadline
    delivered  <- the first `size` of those in time, in the order in which they arrive

Only those who delivered are trained in the simulation, since nobody sees what the others have
computed. All draws are functions of the seed, the round and the client: nothing else shifts, and
a client's luck does not depend on who else was asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from fedrecsk.engine.parallel import add_up, ranks
from fedrecsk.engine.streams import Streams, counter_uniform

# ``draw(among, size) -> clients``: `size` of the clients `among`, both in ascending order.
Draw = Callable[[NDArray[np.int64], int], NDArray[np.int64]]
# ``availability(round, client_ids)``: whether, or with which probability, each client is there.
AvailabilityFunction = Callable[[int, NDArray[Any]], ArrayLike]
Availability = AvailabilityFunction | Mapping[Any, float] | ArrayLike | None
ClientSeconds = Mapping[Any, float] | ArrayLike | None

State = TypeVar("State")
Logs = dict[str, Any]

# Standard deviation of the logarithm of a client's seconds from round to round: two rounds in
# three take between .78 and 1.28 times the median.
SPREAD = 0.25


@dataclass(frozen=True, eq=False)
class Turnout:
    """Who took part in a round, and why the others did not.

    Attributes
    ----------
    asked : ndarray of shape (a,), int64
        Clients that were sent the model, ascending.
    delivered : ndarray of shape (m,), int64
        Those whose uploads count, ascending.
    dropped : int
        Clients that were asked and never delivered.
    late : int
        Clients that were asked and took longer than the deadline.
    unavailable : int
        Clients that could not be asked.
    waited : float or None
        Seconds until the server had what it wanted, or gave up; None where clients have no
        speeds.
    """

    asked: NDArray[np.int64]
    delivered: NDArray[np.int64]
    dropped: int
    late: int
    unavailable: int
    waited: float | None

    def train(
        self,
        state: State,
        train: Callable[[NDArray[np.int64]], tuple[State, Logs]],
        wasted: int = 0,
    ) -> tuple[State, Logs]:
        """Run a round with those who deliver; with nobody, the state stays as it is.

        Parameters
        ----------
        state
        train : callable
            ``train(clients) -> (state, logs)``.
        wasted : int, default=0
            Bytes that those were sent who were asked and do not deliver; `train` counts the others.

        Returns
        -------
        state
        logs : dict
            Of `train`, or with None for a loss; and who took part.
        """
        logs: Logs = {
            "loss": None, "clients": 0, "rejected": 0, "bytes_down": 0, "bytes_up": 0
        }  # fmt: skip
        if len(self.delivered):
            state, logs = train(self.delivered)
        turnout = {
            "asked": len(self.asked),
            "dropped": self.dropped,
            "late": self.late,
            "unavailable": self.unavailable,
        }
        waited = {} if self.waited is None else {"waited": self.waited}
        # Added and not put in its place: those who deliver may get more than the model.
        down = {"bytes_down": logs["bytes_down"] + wasted}
        return state, {**logs, **down, **turnout, **waited}

    @property
    def failed(self) -> NDArray[np.int64]:
        """Clients that were sent the model for nothing, ascending."""
        return np.setdiff1d(self.asked, self.delivered, assume_unique=True)

    def turns_after(
        self, turns: NDArray[np.int64], missed: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Count the turns of those who did not deliver, for sampling in epochs.

        A client that misses a turn keeps it, so that it is asked again soon. If it misses that
        one too, the turn is over: clients that never deliver must not take all places of a round.

        Parameters
        ----------
        turns : ndarray of shape (n_clients,), int64
            With those of this round's `delivered`.
        missed : ndarray of shape (n_clients,), bool
            Whether each client has missed the last time that it was asked, and kept its turn.

        Returns
        -------
        turns, missed : ndarray
            After the round; new ones.

        Examples
        --------
        >>> import numpy as np
        >>> from fedrecsk.engine.participation import Turnout
        >>> asked, nobody = np.array([0, 2]), np.zeros(0, dtype=np.int64)
        >>> turnout = Turnout(asked, nobody, dropped=2, late=0, unavailable=0, waited=None)
        >>> turns, missed = np.zeros(3, dtype=np.int64), np.array([False, False, True])
        >>> turns, missed = turnout.turns_after(turns, missed)
        >>> turns.tolist(), missed.tolist()
        ([0, 0, 1], [True, False, False])
        """
        turns, missed = turns.copy(), missed.copy()
        failed = self.failed
        twice = failed[missed[failed]]
        missed[failed] = True
        missed[twice] = False
        missed[self.delivered] = False
        turns[twice] += 1
        return turns, missed


@dataclass(frozen=True, eq=False)
class Participation:
    """How far the clients of a federation can be relied upon.

    Attributes
    ----------
    client_ids : ndarray of shape (n_clients,)
        Sorted.
    availability : callable, ndarray of shape (n_clients,) or None
        Probabilities, or a function that gives them round by round, see `AvailabilityFunction`.
        None: everybody is always there.
    dropout_rate : float in [0, 1)
        Chance that a client that was asked never delivers.
    seconds : ndarray of shape (n_clients,) or None
        Median seconds of each client's local training.
    deadline : float or None
        Seconds after which nobody is waited for.
    over_selection : float
        How many more clients are asked than wanted, as a share of these.
    streams : Streams

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.participation import Participation
    >>> from fedrecsk.engine.streams import Streams
    >>> ids = np.arange(100)
    >>> clients = Participation(ids, None, 0.3, None, None, 0.5, Streams(0))
    >>> turnout = clients.of_round(0, 20, lambda among, size: among[:size])
    >>> len(turnout.asked), len(turnout.delivered), turnout.dropped
    (30, 20, 8)
    """

    client_ids: NDArray[Any]
    availability: AvailabilityFunction | NDArray[np.float64] | None
    dropout_rate: float
    seconds: NDArray[np.float64] | None
    deadline: float | None
    over_selection: float
    streams: Streams

    def of_round(
        self, t: int, size: int, draw: Draw, population: NDArray[np.int64] | None = None
    ) -> Turnout:
        """Decide who takes part in a round.

        Parameters
        ----------
        t : int
            Number of the round, from 0 and counted on where a fit goes on.
        size : int
            Clients that are wanted.
        draw : callable
            The sampling, see `Draw`.
        population : ndarray of int64, optional
            Clients that may take part at all, ascending; default: all.

        Returns
        -------
        Turnout

        Raises
        ------
        ValueError
            If `availability` is a function and returns no probability for each client.
        """
        if population is None:
            population = np.arange(len(self.client_ids))
        there = population
        if self.availability is not None:
            chance = self._probabilities(t)[population]
            there = population[self._uniform("availability", t, population) < chance]
        n_asked = min(n_to_ask(size, self.over_selection), len(there))
        asked = draw(there, n_asked) if n_asked else there
        # Where nobody is asked in vain everybody counts, also of a draw that varies in size.
        wanted = size if self.over_selection else max(size, len(asked))
        drops = self._uniform("dropout", t, asked) < self.dropout_rate
        arrival = self._arrival(t, asked)
        in_time = arrival <= (math.inf if self.deadline is None else self.deadline)
        delivers = ~drops & in_time
        order = np.argsort(np.where(delivers, arrival, math.inf), kind="stable")
        kept = order[: min(wanted, int(delivers.sum()))]
        waited = None
        if self.seconds is not None:
            waited = float(arrival[kept].max(initial=0.0))
            if self.deadline is not None and len(kept) < min(wanted, len(asked)):
                waited = self.deadline  # someone might still have come
        return Turnout(
            asked=asked,
            delivered=np.sort(asked[kept]),
            dropped=int(drops.sum()),
            late=int((~drops & ~in_time).sum()),
            unavailable=len(population) - len(there),
            waited=waited,
        )

    def _probabilities(self, t: int) -> NDArray[np.float64]:
        """Return the probability (n_clients,) that each client is there."""
        if not callable(self.availability):
            assert self.availability is not None  # or nobody would ask
            return self.availability
        ids = self.client_ids.view()
        ids.flags.writeable = False
        given = self.availability(t + 1, ids)
        try:
            answer = np.asarray(given)
        except ValueError:  # lists of different lengths
            answer = np.empty((), dtype=object)
        if answer.shape != ids.shape or answer.dtype.kind not in "biuf":
            raise ValueError(
                f"availability(round, client_ids) must return a truth value or a probability for "
                f"each of the {len(ids)} clients; in round {t + 1} it returned an array of shape "
                f"{answer.shape} and type {answer.dtype}."
            )
        found = answer.astype(np.float64)
        _check_probabilities(found, ids, f"availability, in round {t + 1},")
        # Processes that share a fit must not part over what a function says in each of them.
        mine = torch.from_numpy(found if ranks().rank == 0 else np.zeros_like(found))
        of_first: NDArray[np.float64] = add_up(mine)[0].numpy()
        return of_first

    def _arrival(self, t: int, clients: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return when clients (C,) deliver: in seconds, or in any order if they have no speed."""
        luck = self._uniform("arrival", t, clients)
        if self.seconds is None:
            return luck
        # The normal quantile of 0 is infinite.
        noise: NDArray[np.float64] = np.exp(SPREAD * ndtri(np.maximum(luck, 2.0**-54)))
        return self.seconds[clients] * noise

    def _uniform(self, name: str, t: int, clients: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return a number in [0, 1) for each client (C,), whoever else is asked for."""
        drawn = counter_uniform(self.streams.key(name, t), torch.from_numpy(clients))
        numbers: NDArray[np.float64] = drawn.numpy()
        return numbers


def read_participation(
    client_ids: NDArray[Any],
    client_rows: NDArray[np.int64],
    *,
    availability: Availability,
    dropout_rate: float,
    client_seconds: ClientSeconds = None,
    deadline: float | None = None,
    over_selection: float = 0.0,
    local_epochs: int = 1,
    streams: Streams,
) -> Participation | None:
    """Read what a caller says of the clients.

    Parameters
    ----------
    client_ids : ndarray of shape (n_clients,)
        Sorted.
    client_rows : ndarray of shape (n_clients,)
        Training rows of each client.
    availability : callable, float, mapping, array-like of shape (n_clients,) or None
        See `Participation`; a float is everybody's probability, and a mapping has one for each
        client id, and may have further ones.
    dropout_rate : float
    client_seconds : float, mapping, array-like of shape (n_clients,) or None, default=None
        Median seconds that each client takes for one row in one local epoch.
    deadline : float or None, default=None
    over_selection : float, default=0.0
    local_epochs : int, default=1
    streams : Streams

    Returns
    -------
    Participation or None
        None where everybody is always there and delivers at once.

    Raises
    ------
    ValueError
        If a client has no number, or one that is no probability or no time; if nobody is ever
        there; or if there is a deadline and nobody has a speed.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.participation import read_participation
    >>> from fedrecsk.engine.streams import Streams
    >>> clients = read_participation(
    ...     np.array(["laptop", "phone"]), np.array([100, 20]), availability=0.9,
    ...     dropout_rate=0.0, client_seconds={"laptop": 0.01, "phone": 0.05}, deadline=4.0,
    ...     local_epochs=5, streams=Streams(0))
    >>> clients.availability.tolist(), clients.seconds.tolist()
    ([0.9, 0.9], [5.0, 5.0])
    """
    if deadline is not None and client_seconds is None:
        raise ValueError(
            f"deadline={deadline:g} needs client_seconds, the seconds that each client takes for "
            "one interaction: without a speed nobody is late."
        )
    if availability is None and client_seconds is None and not dropout_rate and not over_selection:
        return None
    chances: AvailabilityFunction | NDArray[np.float64] | None = None
    if callable(availability):
        chances = availability
    elif availability is not None:
        chances = _of_clients(availability, client_ids, "availability", "a probability")
        _check_probabilities(chances, client_ids, "availability")
        if not chances.any():
            raise ValueError(
                f"availability is 0 for all of the {len(client_ids)} clients, so nobody could "
                "ever take part. Give some of them a chance."
            )
    seconds = None
    if client_seconds is not None:
        each = _of_clients(client_seconds, client_ids, "client_seconds", "a time")
        wrong = np.flatnonzero(~((each > 0) & np.isfinite(each)))
        if len(wrong):
            raise ValueError(
                f"client_seconds gives client {client_ids[wrong].tolist()[0]!r} "
                f"{each[wrong[0]]:g} seconds for an interaction; give a finite number above 0."
            )
        seconds = each * client_rows * local_epochs
    return Participation(
        client_ids=client_ids,
        availability=chances,
        dropout_rate=float(dropout_rate),
        seconds=seconds,
        deadline=None if deadline is None else float(deadline),
        over_selection=float(over_selection),
        streams=streams,
    )


def n_to_ask(size: int, over_selection: float) -> int:
    """Return how many clients are asked so that `size` of them may deliver.

    Examples
    --------
    >>> from fedrecsk.engine.participation import n_to_ask
    >>> n_to_ask(10, 0.0), n_to_ask(10, 0.1), n_to_ask(10, 0.25)
    (10, 11, 13)
    """
    # 1.1 * 10 is a little above 11.
    return math.ceil(round((1.0 + over_selection) * size, 6))


def _of_clients(
    values: Mapping[Any, float] | ArrayLike, client_ids: NDArray[Any], name: str, what: str
) -> NDArray[np.float64]:
    """Read one number for each client (n_clients,), however they are given."""
    names = client_ids.tolist()
    if isinstance(values, Mapping):
        missing = [each for each in names if each not in values]
        if missing:
            raise ValueError(
                f"{name} has no entry for {len(missing)} of the {len(names)} clients, such as "
                f"{missing[0]!r}; give every client {what}."
            )
        values = [values[each] for each in names]
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers, {what} for each client: {error}.") from error
    if found.ndim == 0:
        return np.full(len(names), float(found))
    if found.shape != (len(names),):
        raise ValueError(
            f"{name} is of shape {found.shape}, but there are {len(names)} clients; give {what} "
            "for each of them in the order of the sorted client ids, or a mapping."
        )
    return found


def _check_probabilities(found: NDArray[np.float64], client_ids: NDArray[Any], what: str) -> None:
    """Refuse numbers (n_clients,) that are no probabilities."""
    wrong = np.flatnonzero(~((found >= 0) & (found <= 1)))
    if len(wrong):
        raise ValueError(
            f"{what} gives client {client_ids[wrong].tolist()[0]!r} the probability "
            f"{found[wrong[0]]:g}; probabilities lie between 0 and 1."
        )
