"""Coded interactions, sorted by client: what the rest of the package works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_consistent_length

from fedrecsk.data.columns import Columns, as_rating, read_columns, stack_columns
from fedrecsk.data.vocabulary import IdArray, Vocabulary, as_ids

__all__ = ["Columns", "Interactions", "encode", "interactions_from_sparse", "read_columns"]


@dataclass(frozen=True, eq=False)
class Interactions:
    """Coded interactions: one row per observed (user, item) pair, sorted by client.

    Rows are sorted by client, then user, then item, and no pair occurs twice.

    Parameters
    ----------
    user, item : ndarray of shape (n,), int64
        Codes into ``users`` and ``items``.
    rating : ndarray of shape (n,), float64, or None
        Ratings, if the data have them.
    timestamp : ndarray of shape (n,), int64 or float64, or None
        Moments, if the data have them.
    user_client : ndarray of shape (n_users,), int64
        Code of the client that holds each user.
    users, items, clients : Vocabulary
        The ids behind the codes.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    rating: NDArray[np.float64] | None
    timestamp: NDArray[Any] | None
    user_client: NDArray[np.int64]
    users: Vocabulary
    items: Vocabulary
    clients: Vocabulary

    def __len__(self) -> int:
        return len(self.user)

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.users)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def n_clients(self) -> int:
        """Number of clients."""
        return len(self.clients)

    @property
    def user_counts(self) -> NDArray[np.int64]:
        """Interactions of each user, shape (n_users,)."""
        return np.bincount(self.user, minlength=self.n_users)

    @property
    def item_counts(self) -> NDArray[np.int64]:
        """Interactions of each item, shape (n_items,)."""
        return np.bincount(self.item, minlength=self.n_items)

    @property
    def client_indptr(self) -> NDArray[np.int64]:
        """Where each client's rows start, shape (n_clients + 1,).

        Client ``c`` holds the rows ``client_indptr[c] : client_indptr[c + 1]``.
        """
        counts = np.bincount(self.user_client[self.user], minlength=self.n_clients)
        return np.concatenate([[0], np.cumsum(counts)])

    def matrix(self) -> sp.csr_array:
        """Give the interactions as a binary user x item matrix.

        Returns
        -------
        matrix : csr_array of shape (n_users, n_items), float32
            One where the user has the item.
        """
        ones = np.ones(len(self), dtype=np.float32)
        return sp.csr_array((ones, (self.user, self.item)), shape=(self.n_users, self.n_items))


def encode(
    X: Any, client_ids: ArrayLike | None = None, *, min_rating: float | None = None
) -> Interactions:
    """Code interactions and sort them by client.

    The result does not depend on the order of the rows, with one exception: among repeated
    (user, item) rows without timestamps the last one counts.

    Parameters
    ----------
    X : array-like of shape (n, 2..4), DataFrame, or Columns
        Interactions, as in :func:`read_columns`.
    client_ids : array-like of shape (n,), default=None
        Which client holds each row. None: the ``client_id`` column of a DataFrame, else every
        user is a client.
    min_rating : float, default=None
        Drop the rows with a lower rating first.

    Returns
    -------
    interactions : Interactions
        A repeated (user, item) pair counts once, with the latest timestamp (and of equally
        late rows the highest rating).

    Raises
    ------
    ValueError
        If a user is under two clients, ``client_ids`` has missing values or another length,
        ``min_rating`` is given without ratings or leaves no row, or as in
        :func:`read_columns`.
    TypeError
        As in :func:`read_columns`.

    Examples
    --------
    >>> from fedrecsk.data import encode
    >>> data = encode([["bob", 8], ["ann", 7], ["ann", 8]], ["east", "west", "west"])
    >>> data.users.ids
    array(['ann', 'bob'], dtype='<U3')
    >>> data.user_client
    array([1, 0])
    >>> data.user, data.item
    (array([1, 0, 0]), array([1, 0, 1]))
    >>> data.client_indptr
    array([0, 1, 3])
    """
    columns = read_columns(X)
    client = columns.client if client_ids is None else _as_client_ids(client_ids)
    if client is not None:
        check_consistent_length(columns.user, client)
    if min_rating is not None:
        strong = _at_least(columns, min_rating)
        columns = columns.take(strong)
        client = None if client is None else client[strong]

    users, user = Vocabulary.from_values(columns.user)
    items, item = Vocabulary.from_values(columns.item)
    if client is None:
        clients, user_client = users, np.arange(len(users), dtype=np.int64)
    else:
        clients, row_client = Vocabulary.from_values(client)
        user_client = _client_of_each_user(user, row_client, users, clients)

    # Users renumbered in the order of their clients: one integer then sorts by all three.
    place = np.empty(len(users), dtype=np.int64)
    place[np.argsort(user_client, kind="stable")] = np.arange(len(users))
    rows = _sorted_unique_rows(place[user] * len(items) + item, columns)
    return Interactions(
        user=user[rows],
        item=item[rows],
        rating=None if columns.rating is None else columns.rating[rows],
        timestamp=None if columns.timestamp is None else columns.timestamp[rows],
        user_client=user_client,
        users=users,
        items=items,
        clients=clients,
    )


def interactions_from_sparse(
    matrix: Any,
    *,
    user_ids: ArrayLike | None = None,
    item_ids: ArrayLike | None = None,
) -> NDArray[Any]:
    """Turn a sparse user x item matrix into rows that every estimator reads.

    Parameters
    ----------
    matrix : sparse array or matrix of shape (n_users, n_items)
        Ratings, or ones. Zeros that are stored all the same are no interactions.
    user_ids : array-like of shape (n_users,), default=None
        Ids of the rows. None: the row numbers.
    item_ids : array-like of shape (n_items,), default=None
        Ids of the columns. None: the column numbers.

    Returns
    -------
    interactions : ndarray of shape (nnz, 3)
        User, item, rating, by user and then item; of dtype object if an id is text.

    Raises
    ------
    TypeError
        If ``matrix`` is not sparse.
    ValueError
        If it is not two-dimensional, holds NaN, infinity or complex numbers, or the ids are
        too few, too many or repeated.

    Examples
    --------
    >>> from scipy.sparse import csr_array
    >>> from fedrecsk.data import interactions_from_sparse
    >>> interactions_from_sparse(csr_array([[0, 5], [3, 0]]), item_ids=[10, 20])
    array([[ 0, 20,  5],
           [ 1, 10,  3]])
    """
    is_sparse: bool = sp.issparse(matrix)
    if not is_sparse:
        raise TypeError(
            f"Expected a scipy.sparse user x item matrix, got {type(matrix).__name__}. Wrap a "
            "dense matrix in scipy.sparse.csr_array first."
        )
    if matrix.ndim != 2:
        raise ValueError(f"Expected a user x item matrix, got shape {matrix.shape}.")
    # The constructor of csr_array sorts by row and sums entries that are stored in pieces.
    entries = sp.csr_array(matrix.tocoo()).tocoo()
    stored = entries.data != 0
    rows, columns, values = entries.row[stored], entries.col[stored], entries.data[stored]
    rating = as_rating(values, source="matrix", column=None)
    if values.dtype.kind in "biu":
        rating = values.astype(np.int64)
    n_users, n_items = entries.shape
    user = _ids_of_axis(user_ids, n_users, "user_ids", "rows")[rows]
    item = _ids_of_axis(item_ids, n_items, "item_ids", "columns")[columns]
    return stack_columns([user, item, rating])


def _as_client_ids(client_ids: ArrayLike) -> IdArray:
    array = (
        np.array(client_ids, dtype=object)
        if isinstance(client_ids, list | tuple)
        else np.asarray(client_ids)
    )
    if array.ndim == 2 and array.shape[1] == 1:
        array = array.ravel()
    if array.ndim != 1:
        raise ValueError(
            f"client_ids should be a 1d array, got an array of shape {array.shape} instead."
        )
    return as_ids(array, source="client_ids")


def _at_least(columns: Columns, min_rating: float) -> NDArray[np.bool_]:
    """Mask the rows that are rated well enough to count."""
    if columns.rating is None:
        raise ValueError(
            f"min_rating={min_rating} needs ratings, but X has none. Add a rating column, or "
            "leave min_rating=None."
        )
    strong: NDArray[np.bool_] = columns.rating >= min_rating
    if not strong.any():
        raise ValueError(
            f"min_rating={min_rating} leaves none of the {len(columns)} interactions: their "
            f"ratings run from {columns.rating.min():g} to {columns.rating.max():g}. Lower "
            "min_rating."
        )
    return strong


def _client_of_each_user(
    user: NDArray[np.int64], client: NDArray[np.int64], users: Vocabulary, clients: Vocabulary
) -> NDArray[np.int64]:
    user_client = np.empty(len(users), dtype=np.int64)
    user_client[user] = client
    torn = np.unique(user[user_client[user] != client])
    if torn.size:
        first, second = clients.ids[np.unique(client[user == torn[0]])[:2]].tolist()
        raise ValueError(
            f"User {users.ids[torn[0]].item()!r} is under two clients, {first!r} and {second!r}"
            f"{f' ({len(torn)} such users in all)' if torn.size > 1 else ''}. A user belongs to "
            "one client; correct the client ids, or make the users of each client distinct."
        )
    return user_client


def _sorted_unique_rows(key: NDArray[np.int64], columns: Columns) -> NDArray[np.int64]:
    """Row numbers in the order of their keys; of the rows with one key, the latest."""
    order = np.argsort(key, kind="stable")
    last = _ends_run(key[order])
    if not last.all() and columns.timestamp is not None:
        # Equally late rows are told apart by rating, so that row order does not decide.
        rating = columns.timestamp if columns.rating is None else columns.rating
        order = np.lexsort((rating, columns.timestamp, key))
        last = _ends_run(key[order])
    return order[last]


def _ends_run(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask the last of each run of equal values."""
    return np.append(values[1:] != values[:-1], True)


def _ids_of_axis(ids: ArrayLike | None, size: int, name: str, axis: str) -> IdArray:
    """Ids of the rows or columns of a matrix, by default their numbers."""
    if ids is None:
        return np.arange(size)
    array = as_ids(ids, source=name)
    if len(array) != size:
        raise ValueError(f"{name} has {len(array)} ids for a matrix with {size} {axis}.")
    if len(np.unique(array)) != size:
        raise ValueError(f"{name} has repeated ids; every one of the {axis} needs its own.")
    return array


def merge(old: Interactions, new: Interactions) -> Interactions:
    """Put two sets of interactions together, as clients do that keep their rows.

    Parameters
    ----------
    old, new : Interactions
        A pair in both counts once, with the later timestamp; without timestamps that of `new`.

    Returns
    -------
    interactions : Interactions
        Over the union of users, items and clients. Ratings and timestamps are kept if both
        sides have them.

    Raises
    ------
    ValueError
        If a user is under another client in `new` than in `old`.
    TypeError
        If ids are text on one side and numbers on the other.

    Examples
    --------
    >>> from fedrecsk.data.interactions import encode, merge
    >>> both = merge(encode([[1, 5]]), encode([[1, 6], [2, 5]]))
    >>> both.n_users, both.n_items, len(both)
    (2, 2, 3)
    """
    columns = Columns(
        user=_joined("user_id", old.users, old.user, new.users, new.user),
        item=_joined("item_id", old.items, old.item, new.items, new.item),
        rating=_both(old.rating, new.rating),
        timestamp=_both(old.timestamp, new.timestamp),
        client=_joined(
            "client_id",
            old.clients,
            old.user_client[old.user],
            new.clients,
            new.user_client[new.user],
        ),
        n_columns=2,
        feature_names=None,
    )
    return encode(columns)


def _joined(
    name: str,
    old: Vocabulary,
    old_codes: NDArray[np.int64],
    new: Vocabulary,
    new_codes: NDArray[np.int64],
) -> IdArray:
    """Ids of the old and then the new rows, in a type that holds both without rounding."""
    union = old.extend(new.ids, source="the new rows", column=name)
    codes = [union.encode(old.ids)[0][old_codes], union.encode(new.ids)[0][new_codes]]
    ids: IdArray = union.ids[np.concatenate(codes)]
    return ids


def _both(first: NDArray[Any] | None, second: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if first is None or second is None else np.concatenate([first, second])
