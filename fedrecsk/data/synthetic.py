"""Made-up interactions with a planted taste: each cluster of users prefers one group of items."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import Bunch, check_random_state

# One row of words per group of items, so that a title tells the group.
_GENRE_WORDS = (
    ("Starship", "Galaxy", "Android", "Orbit", "Nebula", "Colony", "Cosmos", "Robot"),
    ("Wedding", "Kiss", "Heart", "Romance", "Sweetheart", "Valentine", "Letter", "Bride"),
    ("Detective", "Murder", "Clue", "Witness", "Alibi", "Suspect", "Inspector", "Heist"),
    ("Ghost", "Crypt", "Vampire", "Scream", "Curse", "Haunting", "Coffin", "Nightmare"),
    ("Dragon", "Wizard", "Sword", "Kingdom", "Spell", "Castle", "Quest", "Sorcerer"),
    ("Soldier", "Battalion", "Trench", "General", "Platoon", "Bunker", "Frontline", "Siege"),
    ("Sheriff", "Saloon", "Cowboy", "Canyon", "Outlaw", "Prairie", "Stagecoach", "Ranch"),
    ("Ballad", "Orchestra", "Dancer", "Chorus", "Melody", "Stage", "Violin", "Encore"),
    ("Puppy", "Circus", "Treehouse", "Kitten", "Playground", "Toybox", "Picnic", "Cartoon"),
    ("Glacier", "Rainforest", "Volcano", "Savanna", "Reef", "Migration", "Tundra", "Whale"),
    ("Goalkeeper", "Marathon", "Stadium", "Champion", "Boxer", "Trophy", "Coach", "Penalty"),
    ("Clown", "Prank", "Slapstick", "Joke", "Banana", "Giggle", "Mishap", "Parody"),
)
_COMMON_WORDS = (
    "Last", "Silent", "Golden", "Hidden", "Long", "Broken", "First", "Endless", "Secret",
    "Distant", "Little", "Wild",
)  # fmt: skip

# Users drawn at once, times items: bounds the memory of a draw to some tens of megabytes.
_CELLS_AT_ONCE = 2**21

_DESCRIPTION = """\
Made-up interactions with a planted taste
-----------------------------------------
Made by fedrecsk.datasets.make_interactions; no real person or item is behind them.

{n_rows} interactions of {n_users} users with {n_items} items, in {n_clusters} clusters. An item
of a user's own cluster is exp({taste:g}) times as likely to be chosen as an equally popular other
item, and is rated higher. Popularity falls with rank to the power of -{popularity_exponent:g};
activity has a power-law tail. Titles use words of the item's cluster.

Columns of data: user_id, item_id, rating (1 to 5), timestamp (seconds since 1970).
"""


def make_interactions(
    n_users: int = 500,
    n_items: int = 300,
    n_clusters: int = 5,
    *,
    mean_interactions: float = 30.0,
    min_interactions: int = 5,
    activity_exponent: float = 2.5,
    popularity_exponent: float = 0.8,
    taste: float = 3.0,
    n_clients: int | None = None,
    return_X_y: bool = False,
    random_state: int | np.random.RandomState | None = None,
) -> Any:
    """Make interactions in which each cluster of users prefers one group of items.

    Parameters
    ----------
    n_users : int, default=500
        Users, with the ids ``0 .. n_users - 1``.
    n_items : int, default=300
        Items, with the ids ``0 .. n_items - 1``. The least popular may have no interaction.
    n_clusters : int, default=5
        Clusters of users, and groups of items; cluster c prefers group c. 1 plants no taste.
    mean_interactions : float, default=30.0
        Interactions of a user on average. The most active users are cut at half the items,
        which lowers the average where that is little.
    min_interactions : int, default=5
        Interactions of the least active users.
    activity_exponent : float, default=2.5
        Tail of the activity: the share of users beyond x falls like x to the power of
        -activity_exponent. Above 1; the smaller, the more unequal.
    popularity_exponent : float, default=0.8
        An item's popularity is its rank to the power of -popularity_exponent. 0: all alike.
    taste : float, default=3.0
        How much likelier an item of the user's own group is than an equally popular other
        item, as the logarithm of the ratio. 0: popularity alone decides.
    n_clients : int, default=None
        Clients that the users are dealt out to, evenly and at random. None: every user is a
        client.
    return_X_y : bool, default=False
        Return ``(data, target)`` only.
    random_state : int, RandomState or None, default=None
        Seed. An int gives the same data each time.

    Returns
    -------
    data : Bunch
        - data: ndarray of shape (n, 4), int64; user, item, rating (1 to 5), timestamp, in the
          order of time. No (user, item) pair occurs twice.
        - target: ndarray of shape (n,), int64; the client of each row.
        - feature_names: list of the four column names.
        - item_text: dict from item id to title.
        - user_clusters: ndarray of shape (n_users,), int64.
        - item_clusters: ndarray of shape (n_items,), int64.
        - DESCR: str.
    (data, target) : tuple if ``return_X_y=True``

    Raises
    ------
    ValueError
        If the sizes do not fit together.

    Examples
    --------
    >>> from fedrecsk.datasets import make_interactions
    >>> X, client_ids = make_interactions(50, 40, 2, return_X_y=True, random_state=0)
    >>> X.shape[1]
    4
    >>> len(set(client_ids))
    50
    """
    _check_sizes(n_users, n_items, n_clusters, mean_interactions, min_interactions, n_clients)
    if activity_exponent <= 1:
        raise ValueError(f"activity_exponent must be above 1, got {activity_exponent}.")
    rng = np.random.default_rng(check_random_state(random_state).randint(2**31 - 1))

    user_clusters = rng.permutation(n_users) % n_clusters
    item_clusters = rng.permutation(n_items) % n_clusters
    popularity = (1.0 + rng.permutation(n_items)) ** -popularity_exponent
    own = np.arange(n_clusters)[:, None] == item_clusters  # (n_clusters, n_items)
    weights = popularity * np.exp(taste * own)

    # Lomax with mean 1, stretched to the wanted mean beyond the minimum.
    excess = rng.pareto(activity_exponent, n_users) * (activity_exponent - 1)
    activity = min_interactions + excess * (mean_interactions - min_interactions)
    counts = np.minimum(activity, max(min_interactions, n_items // 2)).astype(np.int64)
    user, item = _draw_items(rng, weights, user_clusters, counts)
    timestamp = _draw_timestamps(rng, user, counts)

    liking = np.tanh(taste / 2) * np.where(user_clusters[user] == item_clusters[item], 1, -1)
    rating = np.clip(np.rint(3.2 + liking + rng.normal(0, 0.8, len(user))), 1, 5)

    clients = np.arange(n_users) if n_clients is None else rng.permutation(n_users) % n_clients
    rows = np.lexsort((item, user, timestamp))
    data = np.column_stack([user, item, rating.astype(np.int64), timestamp])[rows]
    target = clients[user[rows]]
    if return_X_y:
        return data, target
    return Bunch(
        data=data,
        target=target,
        feature_names=["user_id", "item_id", "rating", "timestamp"],
        item_text=_titles(rng, item_clusters),
        user_clusters=user_clusters,
        item_clusters=item_clusters,
        DESCR=_DESCRIPTION.format(
            n_rows=len(data), n_users=n_users, n_items=n_items, n_clusters=n_clusters,
            taste=taste, popularity_exponent=popularity_exponent,
        ),
    )  # fmt: skip


def _check_sizes(
    n_users: int,
    n_items: int,
    n_clusters: int,
    mean_interactions: float,
    min_interactions: int,
    n_clients: int | None,
) -> None:
    if not 1 <= n_clusters <= min(n_users, n_items):
        raise ValueError(
            f"n_clusters={n_clusters} must lie between 1 and the number of users ({n_users}) and "
            f"of items ({n_items})."
        )
    if not 1 <= min_interactions <= mean_interactions <= n_items:
        raise ValueError(
            f"min_interactions={min_interactions}, mean_interactions={mean_interactions} and "
            f"n_items={n_items} must be at least 1 and in this order."
        )
    if n_clients is not None and not 1 <= n_clients <= n_users:
        raise ValueError(f"n_clients={n_clients} must lie between 1 and n_users={n_users}.")


def _draw_items(
    rng: np.random.Generator,
    weights: NDArray[np.float64],
    user_clusters: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw each user's items without replacement, in proportion to the cluster's weights.

    An exponential race does it: the first k of independent waiting times with the weights as
    rates are such a draw.
    """
    n_items = weights.shape[1]
    # The most active users together, so that few cells of a chunk are sorted for nothing.
    order = np.argsort(-counts, kind="stable")
    chunk = max(1, _CELLS_AT_ONCE // n_items)
    rates = weights.astype(np.float32)
    users, items = [], []
    for start in range(0, len(order), chunk):
        some = order[start : start + chunk]
        most = counts[some[0]]
        waits = rng.standard_exponential((len(some), n_items), dtype=np.float32)
        waits /= rates[user_clusters[some]]
        first = np.argpartition(waits, most - 1, axis=1)[:, :most]
        by_wait = np.argsort(np.take_along_axis(waits, first, axis=1), axis=1)
        first = np.take_along_axis(first, by_wait, axis=1)
        items.append(first[np.arange(most) < counts[some][:, None]])
        users.append(np.repeat(some, counts[some]))
    return np.concatenate(users), np.concatenate(items)


def _draw_timestamps(
    rng: np.random.Generator, user: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Seconds since 1970: a user starts within a year, and half a day passes between rows."""
    gaps = 1 + rng.exponential(43_200, len(user)).astype(np.int64)
    # Rows arrive likeliest first; dates must not tell that, so they are shuffled in the user.
    shuffled = np.lexsort((rng.random(len(user)), user))
    starts = np.cumsum(counts) - counts
    elapsed = np.cumsum(gaps)
    elapsed -= np.repeat(elapsed[starts], counts)
    timestamp = np.empty(len(user), dtype=np.int64)
    first_day = 1_600_000_000 + rng.integers(0, 365 * 86_400, len(counts))
    timestamp[shuffled] = elapsed + np.repeat(first_day, counts)
    return timestamp


def _titles(rng: np.random.Generator, item_clusters: NDArray[np.int64]) -> dict[int, str]:
    """Title every item with two words of its group and a common one, each title once."""
    n_items = len(item_clusters)
    common = rng.integers(0, len(_COMMON_WORDS), n_items).tolist()
    n_words = len(_GENRE_WORDS[0])
    first_words = rng.integers(0, n_words, n_items)
    second_words = (first_words + rng.integers(1, n_words, n_items)) % n_words
    pairs = np.column_stack([first_words, second_words]).tolist()
    titles: dict[int, str] = {}
    seen: dict[str, int] = {}
    for item, cluster in enumerate(item_clusters.tolist()):
        cycle, genre = divmod(cluster, len(_GENRE_WORDS))
        # More groups than rows of words: the rows are used again, with a number to each word.
        first, second = (
            _GENRE_WORDS[genre][word] + (str(cycle + 1) if cycle else "") for word in pairs[item]
        )
        title = f"The {_COMMON_WORDS[common[item]]} {first} and the {second}"
        seen[title] = seen.get(title, 0) + 1
        titles[item] = title if seen[title] == 1 else f"{title}, Part {seen[title]}"
    return titles
