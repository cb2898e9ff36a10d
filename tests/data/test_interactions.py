"""Coded interactions against a plain definition with dictionaries."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from fedrecsk.data import encode, interactions_from_sparse, read_columns

RNG = np.random.default_rng(0)


def slow_encode(rows, clients, min_rating=None):
    """Say with dictionaries what `encode` does, in ids: rows in order, client of each user."""
    kept = {}
    for row, client in zip(rows, clients, strict=True):
        user, item, rating, timestamp = row
        if min_rating is not None and rating < min_rating:
            continue
        known = kept.get((client, user, item))
        if known is None or (timestamp, rating) >= (known[1], known[0]):
            kept[client, user, item] = (rating, timestamp)
    return [(*key, *kept[key]) for key in sorted(kept)]


def decoded(data):
    """Give the rows of an Interactions as (client, user, item, rating, timestamp) ids."""
    columns = (
        data.clients.ids[data.user_client[data.user]],
        data.users.ids[data.user],
        data.items.ids[data.item],
        data.rating,
        data.timestamp,
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))


def random_rows(n=400, n_users=30, n_items=12):
    """Rows with many repeats, and ties among their timestamps and ratings."""
    return np.column_stack(
        [
            RNG.integers(0, n_users, n) * 10 - 50,
            RNG.integers(0, n_items, n) + 10**9,
            RNG.integers(1, 6, n),
            RNG.integers(0, 7, n),
        ]
    )


@pytest.mark.parametrize("min_rating", [None, 3])
@pytest.mark.parametrize("by_user", [True, False])
def test_encode_agrees_with_the_plain_definition(min_rating, by_user):
    X = random_rows()
    clients = X[:, 0] if by_user else (X[:, 0] // 10) % 4
    data = encode(X, None if by_user else clients, min_rating=min_rating)
    assert decoded(data) == slow_encode(X.tolist(), clients.tolist(), min_rating)


@pytest.mark.parametrize("with_clients", [True, False])
def test_row_order_does_not_matter(with_clients):
    X = random_rows()
    clients = X[:, 0] % 7 if with_clients else None
    expected = encode(X, clients)
    for _ in range(3):
        order = RNG.permutation(len(X))
        data = encode(X[order], None if clients is None else clients[order])
        for name in ("user", "item", "rating", "timestamp", "user_client"):
            np.testing.assert_array_equal(getattr(data, name), getattr(expected, name))
        for name in ("users", "items", "clients"):
            np.testing.assert_array_equal(getattr(data, name).ids, getattr(expected, name).ids)


def test_rows_are_sorted_and_unique_and_contiguous_by_client():
    X = random_rows()
    data = encode(X, X[:, 0] % 7)
    client = data.user_client[data.user]
    keys = list(zip(client.tolist(), data.user.tolist(), data.item.tolist(), strict=True))
    assert keys == sorted(set(keys))
    assert len(data) == len(keys) < len(X)
    assert data.client_indptr[0] == 0
    assert data.client_indptr[-1] == len(data)
    for code in range(data.n_clients):
        rows = slice(data.client_indptr[code], data.client_indptr[code + 1])
        assert set(client[rows].tolist()) == {code}
        assert (rows.stop - rows.start) == np.sum(client == code)


def test_sizes_counts_and_matrix():
    X = random_rows()
    data = encode(X)
    pairs = {(user, item) for user, item in X[:, :2].tolist()}
    assert (data.n_users, data.n_items) == (len(set(X[:, 0])), len(set(X[:, 1])))
    assert data.n_clients == data.n_users
    np.testing.assert_array_equal(data.user_client, np.arange(data.n_users))
    matrix = data.matrix()
    assert matrix.dtype == np.float32
    assert matrix.shape == (data.n_users, data.n_items)
    dense = matrix.toarray()
    for user, user_id in enumerate(data.users.ids.tolist()):
        for item, item_id in enumerate(data.items.ids.tolist()):
            assert dense[user, item] == ((user_id, item_id) in pairs)
    np.testing.assert_array_equal(data.user_counts, dense.sum(axis=1))
    np.testing.assert_array_equal(data.item_counts, dense.sum(axis=0))


def test_dtypes():
    data = encode(random_rows())
    assert data.user.dtype == data.item.dtype == data.user_client.dtype == np.int64
    assert data.rating.dtype == np.float64
    assert data.timestamp.dtype == np.int64
    two = encode(random_rows()[:, :2])
    assert (two.rating, two.timestamp) == (None, None)


@pytest.mark.parametrize(
    ("rows", "rating", "timestamp"),
    [
        ([[1, 2, 5], [1, 2, 3]], 3, None),  # the last row
        ([[1, 2, 5, 20], [1, 2, 3, 10]], 5, 20),  # the latest row
        ([[1, 2, 3, 20], [1, 2, 5, 20], [1, 2, 4, 20]], 5, 20),  # the best of the latest rows
    ],
)
def test_repeated_pairs_count_once(rows, rating, timestamp):
    data = encode(rows)
    assert data.rating.tolist() == [rating]
    assert (data.timestamp if timestamp is None else data.timestamp[0]) == timestamp


def test_repeats_with_timestamps_but_no_ratings():
    frame = pd.DataFrame({"user_id": [1, 1], "item_id": [2, 2], "timestamp": [9, 4]})
    assert encode(frame).timestamp.tolist() == [9]


def test_min_rating_comes_before_the_latest_row_and_before_the_ids():
    X = [["ann", 1, 5, 10], ["ann", 1, 1, 20], ["bob", 2, 1, 30], ["cat", 3, 4, 40]]
    data = encode(X, min_rating=4)
    assert data.users.ids.tolist() == ["ann", "cat"]
    assert data.items.ids.tolist() == [1, 3]
    assert data.timestamp.tolist() == [10, 40]
    with_clients = encode(X, ["x", "x", "y", "z"], min_rating=4)
    assert with_clients.clients.ids.tolist() == ["x", "z"]


def test_min_rating_needs_ratings_and_leaves_rows():
    with pytest.raises(ValueError, match="min_rating=3 needs ratings, but X has none"):
        encode([[1, 2]], min_rating=3)
    with pytest.raises(ValueError, match=r"leaves none of the 2 interactions: .* from 1 to 4.5"):
        encode([[1, 2, 1], [1, 3, 4.5]], min_rating=5)


def test_ratings_that_may_be_below_zero():
    assert encode([[1, 2, -3.0], [1, 3, -5.0]], min_rating=-4).rating.tolist() == [-3.0]


def test_client_ids_of_many_kinds():
    X = [["ann", 1], ["bob", 2]]
    for clients in (
        ["x", "y"],
        ("x", "y"),
        np.array([["x"], ["y"]]),
        [["x"], ["y"]],
        pd.Series(["x", "y"], index=[7, 8]),
        np.array(["x", "y"], dtype=object),
    ):
        data = encode(X, clients)
        assert data.clients.ids.tolist() == ["x", "y"]
        assert data.user_client.tolist() == [0, 1]


def test_client_ids_come_before_the_client_id_column():
    frame = pd.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "client_id": ["x", "x"]})
    assert encode(frame).clients.ids.tolist() == ["x"]
    assert encode(frame, [5, 6]).clients.ids.tolist() == [5, 6]


def test_clients_and_users_may_share_ids():
    data = encode([[0, 1], [1, 1], [2, 1]], [2, 1, 2])
    assert data.clients.ids.tolist() == [1, 2]
    assert data.user_client.tolist() == [1, 0, 1]
    assert data.user.tolist() == [1, 0, 2]


def test_columns_are_encoded_without_reading_again():
    X = random_rows()
    assert decoded(encode(read_columns(X))) == decoded(encode(X))


@pytest.mark.parametrize(
    ("clients", "error", "message"),
    [
        (["x"], ValueError, r"inconsistent numbers of samples: \[2, 1\]"),
        (["x", None], ValueError, "Input client_ids contains NaN: 1 of 2"),
        ([1.0, np.nan], ValueError, "Input client_ids contains NaN"),
        ([1.0, np.inf], ValueError, "Input client_ids contains infinity"),
        (["x", 1], TypeError, "Numbers and text are mixed in client_ids"),
        (np.ones((2, 2)), ValueError, r"client_ids should be a 1d array, got .* \(2, 2\)"),
        ("x", ValueError, r"client_ids should be a 1d array, got an array of shape \(\)"),
        ([1j, 2], ValueError, "Complex data not supported: client_ids"),
    ],
)
def test_bad_client_ids_are_refused(clients, error, message):
    with pytest.raises(error, match=message):
        encode([[1, 2], [2, 3]], clients)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 2, 0]])
def test_a_user_under_two_clients_is_named_with_both(order):
    X = np.array([["ann", "1"], ["bob", "1"], ["bob", "2"], ["cat", "1"]])[order]
    clients = np.array(["x", "y", "x", "z"])[order]
    with pytest.raises(ValueError, match=r"User 'bob' is under two clients, 'x' and 'y'. A user"):
        encode(X, clients)


def test_many_users_under_two_clients_are_counted():
    with pytest.raises(ValueError, match=r"User 1 is under two clients, 7 and 8 \(2 such users"):
        encode([[2, 1], [2, 2], [1, 1], [1, 2]], [7, 9, 8, 7])


def test_the_arguments_are_not_changed():
    X = random_rows()
    clients = X[:, 0] % 3
    for array in (X, clients):
        array.flags.writeable = False
    before = X.copy()
    data = encode(X, clients, min_rating=2)
    np.testing.assert_array_equal(X, before)
    assert not any(np.shares_memory(part, X) for part in (data.user, data.rating, data.timestamp))


@pytest.mark.parametrize("container", [sp.csr_array, sp.coo_matrix, sp.csc_array, sp.dok_array])
def test_sparse_matrices_become_rows(container):
    dense = np.array([[0, 5, 0], [3, 0, 4], [0, 0, 0]])
    rows = interactions_from_sparse(container(dense))
    assert rows.dtype == np.int64
    assert rows.tolist() == [[0, 1, 5], [1, 0, 3], [1, 2, 4]]


def test_sparse_matrices_with_ids():
    dense = np.array([[0.0, 4.5], [3.0, 0.0]])
    named = interactions_from_sparse(sp.csr_array(dense), user_ids=["b", "a"], item_ids=[7, 9])
    assert named.dtype == object
    assert named.tolist() == [["b", 9, 4.5], ["a", 7, 3.0]]
    assert encode(named).matrix().toarray().tolist() == [[1, 0], [0, 1]]
    large = interactions_from_sparse(sp.csr_array(dense), item_ids=[2**53, 2**53 + 1])
    assert large[:, 1].tolist() == [2**53 + 1, 2**53]


def test_sparse_entries_that_are_no_interactions():
    pieces = sp.coo_array(([1, 2, 3, 0], ([0, 0, 1, 1], [1, 1, 0, 1])), shape=(2, 2))
    assert interactions_from_sparse(pieces).tolist() == [[0, 1, 3], [1, 0, 3]]
    assert pieces.nnz == 4
    assert interactions_from_sparse(sp.csr_array((2, 3))).shape == (0, 3)
    booleans = interactions_from_sparse(sp.csr_array(np.eye(2, dtype=bool)))
    assert booleans.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("matrix", "ids", "error", "message"),
    [
        (np.eye(2), {}, TypeError, "Expected a scipy.sparse user x item matrix, got ndarray"),
        (sp.coo_array(np.ones(2)), {}, ValueError, r"got shape \(2,\)"),
        (sp.csr_array([[np.nan]]), {}, ValueError, "Input matrix contains NaN"),
        (sp.csr_array([[np.inf]]), {}, ValueError, "Input matrix contains infinity"),
        (sp.csr_array([[1j]]), {}, ValueError, "Complex data not supported"),
        (sp.eye_array(2), {"user_ids": [1]}, ValueError, "user_ids has 1 ids .* with 2 rows"),
        (sp.eye_array(2), {"item_ids": [1, 2, 3]}, ValueError, "item_ids has 3 ids .* 2 columns"),
        (sp.eye_array(2), {"item_ids": [1, 1]}, ValueError, "item_ids has repeated ids"),
        (sp.eye_array(2), {"user_ids": [1, None]}, ValueError, "Input user_ids contains NaN"),
    ],
)
def test_bad_sparse_input_is_refused(matrix, ids, error, message):
    with pytest.raises(error, match=message):
        interactions_from_sparse(matrix, **ids)
