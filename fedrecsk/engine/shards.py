"""The clients' data on the device, and the cohorts that are cut from it.

`ClientShards` holds every client's rows once, sorted by client and user, for the whole fit. A
`Cohort` is a view of some clients: what one chunk of local training works on. Chunks hold
clients of similar size, so that padding stays small, and a bounded number of rows, so that
memory does not grow with the number of clients that take part in a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device

# Padded rows in a chunk: a few MiB of float32 rows stay in a CPU's cache over all local epochs;
# a GPU wants launches large enough to fill it.
CPU_CHUNK_ROWS = 65_536
GPU_CHUNK_ROWS = 4_194_304


@dataclass(frozen=True, eq=False)
class Cohort:
    """Some clients, with their users and rows.

    Attributes
    ----------
    clients : ndarray of shape (C,)
        Client codes.
    users : Tensor of shape (U,), int64
        User codes, grouped by client in the order of `clients`.
    owner : Tensor of shape (U,), int64
        Position in `clients` of each user's client.
    counts : ndarray of shape (U,)
        Rows of each user.
    sizes : Tensor of shape (U,), int64
        The same on the device.
    items : Tensor of shape (n,), int64
        Item codes, grouped by user in the order of `users`, ascending within a user.
    row_user : Tensor of shape (n,), int64
        Position in `users` of each row's user.
    client_rows : ndarray of shape (C,)
        Rows of each client.
    single_user : bool
        Whether every client holds exactly one user.
    """

    clients: NDArray[np.int64]
    users: Tensor
    owner: Tensor
    counts: NDArray[np.int64]
    sizes: Tensor
    items: Tensor
    row_user: Tensor
    client_rows: NDArray[np.int64]
    single_user: bool

    @property
    def n_users(self) -> int:
        """Number of users, U."""
        return len(self.counts)

    @property
    def n_rows(self) -> int:
        """Number of interactions, n."""
        return len(self.items)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.items.device

    def offsets(self) -> Tensor:
        """Offsets (U + 1,) of each user's rows in `items`."""
        return self._offsets

    def of_users(self, kept: Tensor) -> Cohort:
        """Return the same with some of the users alone, told by a mask (U,).

        For cohorts in which every entry of `clients` holds one user.
        """
        rows = kept[self.row_user]
        chosen = kept.cpu().numpy()
        place = kept.cumsum(0) - 1
        return Cohort(
            clients=self.clients[chosen],
            users=self.users[kept],
            owner=place[kept],
            counts=self.counts[chosen],
            sizes=self.sizes[kept],
            items=self.items[rows],
            row_user=place[self.row_user[rows]],
            client_rows=self.client_rows[chosen],
            single_user=self.single_user,
        )

    def padded(self, values: Tensor, fill: float | int) -> Tensor:
        """Lay values of rows (n, ...) out as (U, longest, ...), filled up with `fill`."""
        width = int(self.counts.max(initial=1))
        out = values.new_full((self.n_users, width, *values.shape[1:]), fill)
        out[self.row_user, self.position()] = values
        return out

    def position(self) -> Tensor:
        """Position (n,) of each row within its user's rows."""
        return self._position

    # Kept, since one round asks for them many times.
    @cached_property
    def _offsets(self) -> Tensor:
        return torch.cat([self.sizes.new_zeros(1), self.sizes.cumsum(0)])

    @cached_property
    def _position(self) -> Tensor:
        starts = self._offsets[:-1]
        return torch.arange(self.n_rows, device=self.device) - starts[self.row_user]


@dataclass(frozen=True, eq=False)
class ClientShards:
    """Every client's interactions, resident on the device.

    Attributes
    ----------
    n_clients, n_users, n_items : int
    users : ndarray of shape (n_users,)
        User codes sorted by (client, user).
    client_offsets : ndarray of shape (n_clients + 1,)
        Where each client's users start in `users`.
    row_offsets : ndarray of shape (n_users + 1,)
        Where each user's rows start, in the order of `users`.
    items : Tensor of shape (n,), int64
        Item codes on the device, ascending within a user.
    client_items : ndarray of shape (n_clients,)
        Distinct items of each client: the rows that it would send.
    """

    n_clients: int
    n_users: int
    n_items: int
    users: NDArray[np.int64]
    client_offsets: NDArray[np.int64]
    row_offsets: NDArray[np.int64]
    items: Tensor
    client_items: NDArray[np.int64]

    @classmethod
    def from_codes(
        cls,
        user: NDArray[np.int64],
        item: NDArray[np.int64],
        user_client: NDArray[np.int64],
        n_clients: int,
        n_items: int,
        device: torch.device | None = None,
    ) -> ClientShards:
        """Sort coded interactions by client and put them on the device.

        Parameters
        ----------
        user, item : ndarray of shape (n,)
            Codes of distinct (user, item) pairs in any order.
        user_client : ndarray of shape (n_users,)
            Client code of each user.
        n_clients, n_items : int
        device : torch.device, optional
            Default: CPU.

        Returns
        -------
        ClientShards
        """
        n_users = len(user_client)
        users = np.lexsort((np.arange(n_users), user_client)).astype(np.int64)
        place = np.empty(n_users, dtype=np.int64)  # of each user in `users`
        place[users] = np.arange(n_users)
        slot = place[user]
        # One integer for both is sorted in one pass, and in no time where rows are in order.
        order = np.argsort(slot * n_items + item, kind="stable")
        counts = np.bincount(slot, minlength=n_users)
        per_client = np.bincount(user_client, minlength=n_clients)
        # Not numpy.unique, whose hash table takes 70 times as long for numbers this large.
        held = np.sort(user_client[user] * n_items + item)
        held = held[np.diff(held, prepend=-1) > 0]
        items = torch.from_numpy(np.ascontiguousarray(item[order], dtype=np.int64))
        return cls(
            n_clients=n_clients,
            n_users=n_users,
            n_items=n_items,
            users=users,
            client_offsets=np.concatenate([[0], np.cumsum(per_client)]).astype(np.int64),
            row_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            items=items.to(device or torch.device("cpu")),
            client_items=np.bincount(held // max(n_items, 1), minlength=n_clients),
        )

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self.items.device

    # Kept, since a round must not cost more the more clients take no part in it.
    @cached_property
    def client_rows(self) -> NDArray[np.int64]:
        """Number of interactions of each client, shape (n_clients,)."""
        return np.diff(self.row_offsets[self.client_offsets])

    @cached_property
    def client_users(self) -> NDArray[np.int64]:
        """Number of users of each client, shape (n_clients,)."""
        return np.diff(self.client_offsets)

    @cached_property
    def place_rows(self) -> NDArray[np.int64]:
        """Number of interactions of each user, shape (n_users,), in the order of `users`."""
        return np.diff(self.row_offsets)

    @cached_property
    def user_rows(self) -> NDArray[np.int64]:
        """Number of interactions of each user, shape (n_users,), by user code."""
        rows = np.empty(self.n_users, dtype=np.int64)
        rows[self.users] = self.place_rows
        return rows

    def users_of(self, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """User codes held by `clients`, in their order."""
        return self.users[concatenate_ranges(self.client_offsets, clients)]

    def cohort(self, clients: NDArray[np.int64]) -> Cohort:
        """Cut out some clients with all their users.

        Parameters
        ----------
        clients : ndarray of shape (C,)
            Distinct client codes, in the order wanted.

        Returns
        -------
        Cohort
        """
        clients = np.asarray(clients, dtype=np.int64)
        per_client = self.client_users[clients]
        owner = np.repeat(np.arange(len(clients)), per_client)
        return self._cut(clients, concatenate_ranges(self.client_offsets, clients), owner)

    def chunks(
        self, clients: NDArray[np.int64], *, rows_per_interaction: int = 1
    ) -> Iterator[Cohort]:
        """Cut clients into cohorts of similar size and bounded memory.

        Parameters
        ----------
        clients : ndarray of shape (C,)
            Distinct client codes in any order.
        rows_per_interaction : int, default=1
            Rows that training makes of one interaction (1 + negatives per positive).

        Yields
        ------
        Cohort
            Clients by ascending size. The padded rows of a chunk stay below the bound of the
            device; a single client above it makes a chunk of its own.
        """
        clients = np.asarray(clients, dtype=np.int64)
        for part in self._by_size(self.client_rows[clients] * rows_per_interaction):
            yield self.cohort(clients[part])

    def user_chunks(
        self, clients: NDArray[np.int64], *, rows_per_interaction: int = 1
    ) -> Iterator[Cohort]:
        """Cut the users of clients into cohorts of similar size, whoever holds them.

        For steps that treat users one by one and only add up over clients. A platform with a
        million users does not make one huge chunk here.

        Parameters
        ----------
        clients, rows_per_interaction
            As in `chunks`.

        Yields
        ------
        Cohort
            One entry of ``clients`` per user, so a client can appear several times.
        """
        clients = np.asarray(clients, dtype=np.int64)
        slots = concatenate_ranges(self.client_offsets, clients)
        holder = np.repeat(clients, self.client_users[clients])
        sizes = self.place_rows[slots]
        for part in self._by_size(sizes * rows_per_interaction):
            yield self._cut(holder[part], slots[part], np.arange(len(part)))

    def _cut(
        self, clients: NDArray[np.int64], slots: NDArray[np.int64], owner: NDArray[np.int64]
    ) -> Cohort:
        """Build a cohort from places in `users` and the position of each one's client."""
        counts = self.place_rows[slots]
        # All that the device has to be told, in one transfer: (4, U). What has an entry a row is
        # made there, of a length known here, so that nothing is read back.
        shift = self.row_offsets[slots] - (np.cumsum(counts) - counts)
        plan = np.stack([self.users[slots], owner, counts, shift])
        users, owners, sizes, shifts = to_device(plan, self.device).unbind(0)
        n_rows, place = int(counts.sum()), torch.arange(len(slots), device=self.device)
        row_user = torch.repeat_interleave(place, sizes, output_size=n_rows)
        rows = torch.arange(n_rows, device=self.device) + shifts[row_user]
        return Cohort(
            clients=clients,
            users=users,
            owner=owners,
            counts=counts,
            sizes=sizes,
            items=self.items[rows],
            row_user=row_user,
            client_rows=np.bincount(owner, counts, len(clients)).astype(np.int64),
            single_user=np.array_equal(owner, np.arange(len(clients))),
        )

    def _by_size(self, sizes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Cut positions, by ascending size, into parts of bounded padded size."""
        limit = CPU_CHUNK_ROWS if self.device.type == "cpu" else GPU_CHUNK_ROWS
        order = np.argsort(sizes, kind="stable")
        ascending = np.maximum(sizes[order], 1)
        start = 0
        while start < len(order):
            # The last one sets the padded width; padded sizes ascend, so a search finds the end.
            fits = min(len(order) - start, limit)
            padded = ascending[start : start + fits] * np.arange(1, fits + 1)
            stop = start + max(1, int(np.searchsorted(padded, limit, side="right")))
            yield order[start:stop]
            start = stop


def concatenate_ranges(offsets: NDArray[np.int64], which: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate the index ranges ``offsets[w]:offsets[w + 1]`` for each w of `which`.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.shards import concatenate_ranges
    >>> concatenate_ranges(np.array([0, 2, 2, 5]), np.array([2, 0])).tolist()
    [2, 3, 4, 0, 1]
    """
    starts = offsets[which]
    lengths = offsets[which + 1] - starts
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    shift: NDArray[np.int64] = np.repeat(starts - (ends - lengths), lengths)
    return np.arange(total, dtype=np.int64) + shift


def written_users(
    user_factors: Tensor, trained: Sequence[tuple[Tensor, Tensor]], *, in_place: bool
) -> Tensor:
    """Put vectors (U, N) into the users' first columns, once the round can no longer fail."""
    written = user_factors if in_place else user_factors.clone()
    for users, vectors in trained:
        written[users, : vectors.shape[1]] = vectors
    return written


def counted_turns(
    turns: NDArray[np.int64], clients: NDArray[np.int64], *, in_place: bool
) -> NDArray[np.int64]:
    """Return the clients' turns (n_clients,) after another round with some of them."""
    counted = turns if in_place else turns.copy()
    counted[clients] += 1
    return counted
