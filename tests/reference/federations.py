"""Small federations to run both the fast and the literal code on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedrecsk.engine.shards import ClientShards


def federation_of(
    items_of: Sequence[Sequence[int]],
    n_items: int,
    client_of: Sequence[int] | None = None,
    n_clients: int | None = None,
) -> ClientShards:
    """Return shards of users with the given items; every user is a client by default."""
    user = np.repeat(np.arange(len(items_of)), [len(items) for items in items_of])
    item = np.array([i for items in items_of for i in items], dtype=np.int64)
    client = np.asarray(range(len(items_of)) if client_of is None else client_of, dtype=np.int64)
    # The order in which rows arrive must not matter, so they arrive shuffled.
    order = np.random.default_rng(len(item)).permutation(len(item))
    size = int(client.max()) + 1 if n_clients is None else n_clients
    return ClientShards.from_codes(user[order], item[order], client, size, n_items)


def random_federation(
    seed: int,
    *,
    n_users: int = 24,
    n_items: int = 30,
    n_clients: int | None = None,
    max_rows: int = 9,
) -> ClientShards:
    """Return shards of users with 1 to `max_rows` items, popular ones more often."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(2, n_items + 2)
    items_of = [
        rng.choice(
            n_items, rng.integers(1, max_rows + 1), replace=False, p=popularity / sum(popularity)
        )
        for _ in range(n_users)
    ]
    client_of = (
        None if n_clients is None else rng.permutation(np.arange(n_users) % n_clients).tolist()
    )
    return federation_of([items.tolist() for items in items_of], n_items, client_of)


def items_by_user(shards: ClientShards) -> list[list[int]]:
    """Return each user's items, ascending."""
    rows: list[list[int]] = [[] for _ in range(shards.n_users)]
    for place, user in enumerate(shards.users):
        start, stop = shards.row_offsets[place], shards.row_offsets[place + 1]
        rows[user] = shards.items[start:stop].tolist()
    return rows
