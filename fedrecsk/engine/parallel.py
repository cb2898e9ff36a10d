"""One fit over several processes: each trains a share of the clients, all learn the sums.

A launcher (torchrun, ``accelerate launch``) starts the same program several times. The processes
read the same data and run the same rounds; what clients do is dealt out among them, and what the
server makes of it is done by every process for itself:

    shares    <- the clients of the round, dealt out so that rows are balanced
    training  <- of the own share
    add_up    <- the sums over all shares, always added in the order of the processes
    fill_rows <- the users' vectors that the other processes have trained

So all hold the same state after every round, bit for bit, and a client's draws do not depend on
who trains it, see `fedrecsk.engine.streams`. Processes are called ranks, as launchers do.

All of this happens inside `together`, which surrounds a fit; elsewhere, and in one process, every
function here returns what it was given. Whatever ends a fit in one process closes its connections,
which ends the fit in the others.
"""

from __future__ import annotations

import atexit
import heapq
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from joblib.parallel import get_active_backend
from numpy.typing import NDArray
from torch import Tensor

# Seconds that a process waits for another one, unless the environment says otherwise.
TIMEOUT, TIMEOUT_VARIABLE = 300.0, "FEDRECSK_TIMEOUT"
# Elements exchanged at a time: 16 MB in single precision from each process.
PIECE = 1 << 22


@dataclass(frozen=True)
class Ranks:
    """Which of the processes of a fit this one is.

    Attributes
    ----------
    rank : int
        From 0.
    size : int
        How many there are.
    """

    rank: int = 0
    size: int = 1


ALONE = Ranks()
# None: outside of any fit. A variable of the context, so that other threads are on their own.
_here: ContextVar[Ranks | None] = ContextVar("ranks", default=None)


def ranks() -> Ranks:
    """Return which of the processes of the running fit this one is; 0 of 1 outside of `together`.

    Examples
    --------
    >>> from fedrecsk.engine.parallel import ranks
    >>> ranks()
    Ranks(rank=0, size=1)
    """
    return _here.get() or ALONE


def is_main() -> bool:
    """Tell whether this is the process that speaks and writes for all; true if it is the only one.

    Unlike `ranks`, it also answers outside of a fit and in callbacks.

    Examples
    --------
    >>> from fedrecsk.engine.parallel import is_main
    >>> is_main()
    True
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not _launched() or int(os.environ["RANK"]) == 0


def local_rank() -> int | None:
    """Return the number of this process among those of its machine; None if it is the only one."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _launched() else None


def _launched() -> bool:
    """Tell whether a launcher has started this process, or one that it descends from, as a rank."""
    variables = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    return several and all(name in os.environ for name in variables)


# A process that a rank forks has its variables, but is no rank.
_rank_process = os.getpid() if _launched() else None


def _is_rank() -> bool:
    """Tell whether this process, in this thread, is one of the processes that share fits."""
    if _rank_process is not None and os.getpid() != _rank_process:
        return False
    if get_active_backend()[0].nesting_level:  # in a worker of joblib, which knows no other rank
        return False
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return _launched()


# A fit of several processes ---------------------------------------------------------------------


@dataclass(eq=False)
class _Connection:
    """What this process has open to the others; the only thing here that changes in place."""

    group: dist.ProcessGroup | None = None
    timeout: float = TIMEOUT
    lost: bool = False

    def open(self) -> None:
        """Connect, unless the fit before has left the connection open."""
        if self.lost:
            raise RuntimeError(
                "An earlier fit has lost the other processes, so there is nobody to share this "
                "one with. Start all processes anew."
            )
        if self.group is not None:
            return
        self.timeout = _timeout()
        if not dist.is_initialized():
            # Where needed, and not at the top: it takes as long to import as scikit-learn.
            from accelerate import PartialState

            # What the program itself would open with accelerate, so that it finds its own.
            PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=self.timeout))
            # Left open to the interpreter's end, gloo's threads now and then abort the process.
            atexit.register(_disconnect)
            if not dist.is_initialized():
                raise RuntimeError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this program runs in several "
                    "processes, but accelerate cannot connect them. Start it with torchrun or "
                    "accelerate launch, or unset WORLD_SIZE."
                )
        # Over the processors' memory on GPUs as well, see docs/design.md.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        assert isinstance(group, dist.ProcessGroup)  # a rank is a member of its own group
        self.group = group

    def close(self) -> None:
        """Close, so that whoever waits for this process hears of it at once."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return the values of all processes, in their order; all of one shape, on the CPU."""
        found = [torch.empty_like(values) for _ in range(ranks().size)]
        try:
            dist.all_gather(found, values, group=self.group)
            return found
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        # Outside of the handler: a traceback of torch's would keep the connection alive.
        self.lost = True
        self.close()
        raise RuntimeError(
            f"Process {ranks().rank} of {ranks().size} has lost another one, which ended, failed "
            f"or did not answer within {self.timeout:g} s: see what it printed. If it was only "
            f"slow, set the environment variable {TIMEOUT_VARIABLE} to more seconds. ({reason})"
        )


_connection = _Connection()


def _disconnect() -> None:
    """Close all that `_Connection.open` has opened."""
    _connection.close()
    if dist.is_initialized():
        dist.destroy_process_group()


_busy = threading.Lock()


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{TIMEOUT_VARIABLE} must be a number of seconds, found {text!r}.")
    return seconds


@contextmanager
def together(marks: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Let the processes of a launch share what is done inside.

    Parameters
    ----------
    marks : callable
        ``marks() -> {what: mark}``: what must be the same in all processes, with a hash of it.
        Not called in one process.

    Raises
    ------
    ValueError
        If the marks differ; says of what.
    RuntimeError
        If another process ends, fails, or does not answer in time; or if two threads want to
        share fits at the same time.

    Examples
    --------
    >>> from fedrecsk.engine.parallel import together
    >>> with together(lambda: {"data": "0123"}):
    ...     pass  # the rounds of a fit
    """
    if _here.get() is not None or not _is_rank():
        yield
        return
    if not _busy.acquire(blocking=False):
        raise RuntimeError(
            "Two threads fit at the same time in a program of several processes, which could not "
            "tell whose sums are whose. Fit one after the other, or inside of "
            "fedrecsk.engine.parallel.alone()."
        )
    try:
        _connection.open()
        token = _here.set(Ranks(dist.get_rank(), dist.get_world_size()))
        try:
            _check_same(marks())
            yield
        except BaseException:
            _connection.close()
            raise
        finally:
            _here.reset(token)
    finally:
        _busy.release()


@contextmanager
def alone() -> Iterator[None]:
    """Let this process do what is inside by itself, whoever else was launched.

    For callbacks, which may do other things in one process than in another, and for programs that
    give every process fits of its own.

    Examples
    --------
    >>> from fedrecsk.engine.parallel import alone, ranks
    >>> with alone():
    ...     ranks().size
    1
    """
    token = _here.set(ALONE)
    try:
        yield
    finally:
        _here.reset(token)


def _check_same(marks: Mapping[str, str]) -> None:
    """Refuse a fit whose processes were given different things."""
    for what, mark in marks.items():
        # All have the same length, or they could not be compared in one exchange.
        own = torch.tensor(list(mark.encode().ljust(64)[:64]), dtype=torch.uint8)
        theirs = _connection.gather(own)
        strange = [rank for rank, other in enumerate(theirs) if not torch.equal(other, theirs[0])]
        if strange:
            raise ValueError(
                f"The processes of one fit must be given the same {what}; that of process "
                f"{', '.join(map(str, strange))} is not that of process 0. Read the same files, "
                "and give an int wherever something is drawn at random. For fits of their own, "
                "use fedrecsk.engine.parallel.alone()."
            )


# Inside of a fit --------------------------------------------------------------------------------


def shares(clients: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Deal clients out to the processes so that each has about as many rows; the same in all.

    Parameters
    ----------
    clients : ndarray of shape (C,)
    sizes : ndarray of shape (C,)
        Rows of each client.

    Returns
    -------
    list of ndarray
        The clients of each process, in the order they had. With fewer clients than processes some
        have none. In one process: `clients` as they are.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.parallel import shares
    >>> shares(np.array([4, 7]), np.array([10, 1]))
    [array([4, 7])]
    """
    if ranks().size == 1:
        return [clients]
    owner = deal(sizes, ranks().size)
    return [clients[owner == rank] for rank in range(ranks().size)]


def deal(sizes: NDArray[np.int64], n_parts: int) -> NDArray[np.int64]:
    """Give each size, from the largest on, to the part (n,) that has the least so far.

    Parameters
    ----------
    sizes : ndarray of shape (n,)
    n_parts : int

    Returns
    -------
    ndarray of shape (n,), int64
        Two parts differ in their sums by one size at most, where none is zero.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.parallel import deal
    >>> deal(np.array([1, 9, 4, 3]), 2).tolist()
    [1, 0, 1, 1]
    """
    owner = np.empty(len(sizes), dtype=np.int64)
    loads = [(0, part) for part in range(n_parts)]
    for place in np.argsort(-sizes, kind="stable").tolist():
        load, part = loads[0]
        owner[place] = part
        # One more, so that those without rows do not all go to the same part.
        heapq.heapreplace(loads, (load + int(sizes[place]) + 1, part))
    return owner


def own_part(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the part of this process among `shares`."""
    return parts[ranks().rank]


def add_up(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sum tensors over the processes, always in the order of their ranks.

    Parameters
    ----------
    *tensors : Tensor
        Of the same shapes and types in all processes.

    Returns
    -------
    tuple of Tensor
        The same to the last bit in all processes. In one process: the tensors as they are.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.parallel import add_up
    >>> add_up(torch.ones(2), torch.tensor(3))
    (tensor([1., 1.]), tensor(3))
    """
    if ranks().size == 1:
        return tensors
    return tuple(_added(tensor) for tensor in tensors)


def _added(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1).cpu()
    total = torch.empty_like(flat)
    for start in range(0, len(flat), PIECE):
        piece = slice(start, start + PIECE)
        first, *others = _connection.gather(flat[piece].contiguous())
        for other in others:
            first += other
        total[piece] = first
    return total.reshape(tensor.shape).to(tensor.device)


def fill_rows(
    table: Tensor,
    parts: Sequence[NDArray[np.int64]],
    rows_of: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
) -> Tensor:
    """Write the rows of a table that other processes have computed into it.

    Parameters
    ----------
    table : Tensor of shape (n, ...)
        With the rows of the own part in place; the others' are written into it.
    parts : sequence of ndarray
        From `shares`.
    rows_of : callable, optional
        ``rows_of(part) -> rows``: the rows of a part, where they are not its members themselves.

    Returns
    -------
    Tensor of shape (n, ...)
        The table.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from fedrecsk.engine.parallel import fill_rows
    >>> fill_rows(torch.tensor([1.0, 2.0]), [np.array([0, 1])])
    tensor([1., 2.])
    """
    if ranks().size == 1:
        return table
    rows = [part if rows_of is None else rows_of(part) for part in parts]
    longest = max(len(each) for each in rows)
    at_once = max(1, PIECE // max(1, table[:1].numel()))
    for start in range(0, longest, at_once):
        places = [torch.from_numpy(each[start : start + at_once]).to(table.device) for each in rows]
        sent = torch.zeros(min(at_once, longest - start), *table.shape[1:], dtype=table.dtype)
        mine = places[ranks().rank]
        sent[: len(mine)] = table[mine].cpu()
        for place, found in zip(places, _connection.gather(sent), strict=True):
            table[place] = found[: len(place)].to(table.device)
    return table


def of_main(value: float) -> float:
    """Return the number that process 0 has; exact for whole numbers below 2**53."""
    if ranks().size == 1:
        return value
    return float(_connection.gather(torch.tensor([value], dtype=torch.float64))[0])


def anywhere(flag: bool) -> bool:
    """Tell whether the flag is set in any of the processes."""
    if ranks().size == 1:
        return flag
    return any(bool(found) for found in _connection.gather(torch.tensor([int(flag)])))
