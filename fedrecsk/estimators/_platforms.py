"""Users on platforms with their histories: what a federation of language models trains on.

A platform is a client of the federation: a group of users. Where every user is a client of its
own, as in the other estimators, a server-side step groups them first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.partition import cluster_clients
from fedrecsk.data.prompts import histories
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.engine.shards import concatenate_ranges
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import Attributes
from fedrecsk.estimators._factors import Validation
from fedrecsk.models.lora_training import length_buckets
from fedrecsk.models.text_model import Examples
from fedrecsk.models.text_vectors import TextForm, last_items

IntArray = NDArray[np.int64]

# "auto": up to so many clients are platforms as they are; more are grouped into so many.
MOST_PLATFORMS, AUTO_PLATFORMS = 32, 5
# Validation ranks at least so many users where there are as many, and at most so many.
FEWEST_VALIDATION_USERS, MOST_VALIDATION_USERS = 100, 2_000


@dataclass(frozen=True, eq=False)
class Platforms:
    """Who holds what, in the order of time.

    Attributes
    ----------
    ids : ndarray of shape (C,)
        Client ids where platforms are the caller's clients, else numbers.
    of_client : ndarray of shape (n_clients,), int64
        Platform of each client of the data.
    of_user : ndarray of shape (n_users,), int64
    indptr, items : ndarray
        Items of each user by their codes in the catalogue, the oldest first.
    n_items : int
        Of the catalogue.
    """

    ids: NDArray[Any]
    of_client: IntArray
    of_user: IntArray
    indptr: IntArray
    items: IntArray
    n_items: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.indptr) - 1

    @property
    def lengths(self) -> IntArray:
        """Items of each user, (n_users,)."""
        return np.diff(self.indptr)

    def counts(self, ends: IntArray) -> NDArray[np.float64]:
        """How often each platform has chosen each item (C, n_items), among the first `ends`."""
        users = np.repeat(np.arange(self.n_users), self.lengths)
        early = np.arange(len(self.items)) - self.indptr[users] < ends[users]
        places = self.of_user[users[early]] * self.n_items + self.items[early]
        table = np.bincount(places, minlength=len(self) * self.n_items)
        return table.reshape(len(self), self.n_items).astype(np.float64)

    def window(self, users: IntArray, ends: IntArray, n: int) -> IntArray:
        """Last n items (m, n) of users before `ends` (m,), the latest first."""
        return last_items(self.indptr, self.items, users, ends, n)


def make_platforms(
    data: Interactions,
    codes: IntArray,
    n_items: int,
    *,
    n_platforms: int | Literal["auto"] | None,
    streams: Streams,
    previous: Attributes | None,
) -> Platforms:
    """Give every client a platform, and list the histories.

    Parameters
    ----------
    data : Interactions
    codes : ndarray of shape (data.n_items,), int64
        Code in the catalogue of each item.
    n_items : int
        Of the catalogue.
    n_platforms : int, "auto" or None
        See `FELLRecRecommender`.
    streams : Streams
    previous : dict or None
        Fitted attributes to go on from: known clients stay where they are, and new ones join the
        platform that chooses most like them. Where every client was a platform, new ones become
        platforms as well, as long as `n_platforms` lets them.

    Returns
    -------
    Platforms
    """
    indptr, items = histories(data)
    if n_platforms == "auto":
        n_platforms = None if data.n_clients <= MOST_PLATFORMS else AUTO_PLATFORMS
    most = data.n_clients if n_platforms is None else n_platforms
    alone = most >= data.n_clients
    if previous is not None and not (alone and previous["platforms_are_clients_"]):
        ids = previous["platform_ids_"]
        of_client = _joined(data, previous)
    elif alone:
        ids, of_client = data.clients.ids, np.arange(data.n_clients)
    else:
        seed = int(streams.numpy("platforms").integers(2**31 - 1))
        of_client = cluster_clients(data, most, random_state=seed)
        ids = np.arange(int(of_client.max()) + 1)
    return Platforms(ids, of_client, of_client[data.user_client], indptr, codes[items], n_items)


def _joined(data: Interactions, previous: Attributes) -> IntArray:
    """Platform (n_clients,) of known and of new clients."""
    found, known = Vocabulary(previous["client_ids_"]).encode(data.clients.ids)
    of_client = np.where(known, previous["client_platforms_"][found], 0)
    new = np.flatnonzero(~known)
    if len(new):
        counts = previous["item_counts_"][:-1]  # of the platforms, without the crowd
        taste = np.log((counts + 1.0) / (counts + 1.0).sum(axis=1, keepdims=True))
        codes, is_old = Vocabulary(previous["item_ids_"]).encode(data.items.ids)
        rows = np.isin(data.user_client[data.user], new) & is_old[data.item]
        likelihood = np.zeros((data.n_clients, len(counts)))
        owners = data.user_client[data.user[rows]]
        np.add.at(likelihood, owners, taste[:, codes[data.item[rows]]].T)
        of_client[new] = likelihood[new].argmax(axis=1)
    return of_client


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The last item of some users, to validate by.

    Attributes
    ----------
    ends : ndarray of shape (n_users,), int64
        Of every user, how many items are left for training.
    users : ndarray of shape (m,), int64
    targets : ndarray of shape (m,), int64
        The held-out item of each.
    """

    ends: IntArray
    users: IntArray
    targets: IntArray

    def ndcg(
        self, scores: NDArray[np.floating[Any]], platforms: Platforms, which: IntArray
    ) -> NDArray[np.float64]:
        """NDCG@20 of users `which` (of m) from their scores (len(which), n_items), overwritten."""
        users = self.users[which]
        starts = platforms.indptr[users]
        # Where the items of each user begin, and where those end that are not held out.
        bounds = np.column_stack([starts, starts + self.ends[users]]).ravel()
        places = concatenate_ranges(bounds, 2 * np.arange(len(users)))
        truth = csr_array(
            (np.ones(len(users), dtype=bool), (np.arange(len(users)), self.targets[which])),
            shape=scores.shape,
        )
        return Validation(
            users=users,
            truth=truth,
            seen_rows=np.repeat(np.arange(len(users)), self.ends[users]),
            seen_items=platforms.items[places],
        ).ndcg_per_user(scores)


def hold_out_last(platforms: Platforms, fraction: float, streams: Streams) -> HeldOut:
    """Hold out the last item of some users of every platform.

    Users with at least three items are drawn: two are left to train on. Each platform gives the
    same share of its own, rounded, at least one; in all about 100 at least where there are as many.
    """
    lengths = platforms.lengths
    able = np.flatnonzero(lengths >= 3)
    share = max(fraction, FEWEST_VALIDATION_USERS / max(1, len(able)))
    share = min(share, MOST_VALIDATION_USERS / max(1, len(able)), 1.0)
    chosen = []
    for platform in range(len(platforms)):
        own = able[platforms.of_user[able] == platform]
        n = min(len(own), max(1, round(share * len(own))))
        chosen.append(streams.numpy("held out", platform).permutation(own)[:n])
    users = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *chosen]))
    ends = lengths.copy()
    ends[users] -= 1
    return HeldOut(ends, users, platforms.items[platforms.indptr[users] + ends[users]])


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws the examples of a local training: an item of a user, and the items before it.

    Attributes
    ----------
    platforms : Platforms
    ends : ndarray of shape (n_users,), int64
        How many items of each user may be used.
    form : TextForm
        Of histories, for their lengths.
    streams : Streams
    local_epochs, batch_size, gradient_accumulation, examples_per_user, n_negatives, max_history
        See `FELLRecRecommender`.
    """

    platforms: Platforms
    ends: IntArray
    form: TextForm
    streams: Streams
    local_epochs: int
    batch_size: int
    gradient_accumulation: int
    examples_per_user: int
    n_negatives: int
    max_history: int

    def n_examples(self) -> IntArray:
        """Examples of each platform in an epoch, (C,)."""
        per_user = np.clip(self.ends - 1, 0, self.examples_per_user)
        counts = np.bincount(
            self.platforms.of_user, weights=per_user, minlength=len(self.platforms)
        )
        return counts.astype(np.int64)

    def steps(
        self, t: int, clients: Sequence[int]
    ) -> Iterator[list[tuple[Examples, torch.Tensor]]]:
        """Give the steps of a local training of some platforms in round t, for `train_adapters`."""
        for epoch in range(self.local_epochs):
            drawn = [self._draw(t, epoch, client) for client in clients]
            plan = length_buckets(
                [self.form.lengths(windows) for windows, _ in drawn],
                self.batch_size,
                [self.streams.numpy("batches", t, epoch, client) for client in clients],
                self.streams.numpy("order", t, epoch),
            )
            for number, chosen in enumerate(plan):
                yield self._micro_batches(drawn, chosen, clients, (t, epoch, number))

    def _draw(self, t: int, epoch: int, client: int) -> tuple[IntArray, IntArray]:
        """Histories (n, H) and next items (n,) of a platform's epoch."""
        mine = np.flatnonzero((self.platforms.of_user == client) & (self.ends >= 2))
        # Places go round from a random one, so that those of one user differ.
        first = self.streams.numpy("places", t, epoch, client).integers(0, self.ends[mine] - 1)
        turns = np.arange(self.examples_per_user)[:, None]
        wanted = turns < np.minimum(self.ends[mine] - 1, self.examples_per_user)
        places = (1 + (first + turns) % (self.ends[mine] - 1))[wanted]
        users = np.broadcast_to(mine, wanted.shape)[wanted]
        targets = self.platforms.items[self.platforms.indptr[users] + places]
        return self.platforms.window(users, places, self.max_history), targets

    def _micro_batches(
        self,
        drawn: Sequence[tuple[IntArray, IntArray]],
        chosen: IntArray,
        clients: Sequence[int],
        key: tuple[int, ...],
    ) -> list[tuple[Examples, torch.Tensor]]:
        """Cut a step (K, B) into micro-batches, without the platforms that have run out."""
        size = -(-self.batch_size // self.gradient_accumulation)
        batches = []
        for part, start in enumerate(range(0, self.batch_size, size)):
            here = chosen[:, start : start + size]
            here = here[:, (here >= 0).any(axis=0)]
            active = np.flatnonzero((here >= 0).any(axis=1))
            if not len(active):
                continue
            present = here[active] >= 0
            windows = np.full((len(active), here.shape[1], self.max_history), -1, dtype=np.int64)
            targets = np.zeros((len(active), here.shape[1]), dtype=np.int64)
            negatives = np.empty((len(active), self.n_negatives), dtype=np.int64)
            for row, client in enumerate(active.tolist()):
                numbers = here[client][present[row]]
                windows[row, present[row]] = drawn[client][0][numbers]
                targets[row, present[row]] = drawn[client][1][numbers]
                negatives[row] = self.streams.numpy(
                    "negatives", *key, part, clients[client]
                ).integers(0, self.platforms.n_items, self.n_negatives)
            examples = Examples(
                clients=tuple(active.tolist()),
                histories=windows.reshape(-1, self.max_history),
                targets=targets,
                present=present,
                negatives=negatives,
                key=(*key, part),
            )
            weights = torch.from_numpy((here >= 0).sum(axis=1))
            batches.append((examples, weights))
        return batches
