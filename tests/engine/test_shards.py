import numpy as np
import pytest
import torch

from fedrecsk.engine import shards as shards_module
from tests.reference.federations import federation_of, items_by_user, random_federation

FEDERATIONS = {
    "a user each": random_federation(0, n_users=40),
    "several users each": random_federation(1, n_users=40, n_clients=7),
    "one client": random_federation(2, n_users=15, n_clients=1),
    "very unequal": federation_of([range(25)] + [[i % 25] for i in range(30)], 25),
    "some without rows": federation_of([[], [3, 1], [], [2]], 5, [1, 0, 0, 1]),
    "clients without users": federation_of([[0], [1, 2], [4]], 5, [3, 1, 3], n_clients=6),
}


@pytest.fixture(params=FEDERATIONS, ids=str)
def shards(request):
    return FEDERATIONS[request.param]


@pytest.fixture
def chunk_rows(monkeypatch):
    return lambda rows: monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)


def rows_of_cohort(cohort):
    """List what a cohort holds as (client, user, item), row by row."""
    return [
        (
            int(cohort.clients[cohort.owner[position]]),
            int(cohort.users[position]),
            int(item),
        )
        for position, item in zip(cohort.row_user.tolist(), cohort.items.tolist(), strict=True)
    ]


def rows_of_clients(shards, clients):
    """The same from the federation's own arrays, a client and a user at a time."""
    items = items_by_user(shards)
    rows = []
    for client in clients:
        start, stop = shards.client_offsets[client], shards.client_offsets[client + 1]
        for user in shards.users[start:stop]:
            rows += [(int(client), int(user), item) for item in items[user]]
    return rows


def assert_consistent(cohort):
    """The counts, offsets and positions of a cohort describe its rows."""
    counts = cohort.counts.tolist()
    assert cohort.n_users == len(counts) == len(cohort.users) == len(cohort.owner)
    assert cohort.n_rows == sum(counts) == len(cohort.items) == len(cohort.row_user)
    assert cohort.offsets().tolist() == [sum(counts[:u]) for u in range(len(counts) + 1)]
    assert cohort.row_user.tolist() == [u for u, n in enumerate(counts) for _ in range(n)]
    assert cohort.position().tolist() == [k for n in counts for k in range(n)]
    assert (cohort.owner.diff() >= 0).all()


def test_from_codes_sorts_rows_by_client_user_and_item():
    shards = shards_module.ClientShards.from_codes(
        user=np.array([2, 0, 1, 2, 0, 2]),
        item=np.array([5, 3, 1, 0, 2, 4]),
        user_client=np.array([1, 0, 1]),
        n_clients=2,
        n_items=6,
    )
    assert shards.n_users == 3
    assert shards.users.tolist() == [1, 0, 2]  # user 1 is with client 0
    assert shards.client_offsets.tolist() == [0, 1, 3]
    assert shards.row_offsets.tolist() == [0, 1, 3, 6]
    assert shards.items.tolist() == [1, 2, 3, 0, 4, 5]
    assert shards.client_rows.tolist() == [1, 5]
    assert shards.users_of(np.array([1, 0])).tolist() == [0, 2, 1]
    assert shards.device == torch.device("cpu")


def test_from_codes_keeps_every_pair_with_its_client():
    rng = np.random.default_rng(3)
    pairs = np.array([(u, i) for u in range(20) for i in range(9) if rng.random() < 0.4])
    client = rng.integers(0, 6, 20)
    shards = shards_module.ClientShards.from_codes(pairs[:, 0], pairs[:, 1], client, 6, 9)
    expected = sorted((int(client[u]), int(u), int(i)) for u, i in pairs)
    assert rows_of_clients(shards, range(6)) == expected
    assert shards.client_rows.sum() == len(pairs)


def test_client_items_are_the_distinct_items_of_a_client(shards):
    items = [{item for _, _, item in rows_of_clients(shards, [c])} for c in range(shards.n_clients)]
    assert shards.client_items.tolist() == [len(own) for own in items]


def test_user_rows_are_by_user_code(shards):
    assert shards.user_rows.tolist() == [len(own) for own in items_by_user(shards)]
    assert shards.user_rows.sum() == shards.client_rows.sum() == len(shards.items)


def test_cohort_holds_the_clients_in_the_order_asked_for(shards):
    clients = np.random.default_rng(0).permutation(shards.n_clients)[: shards.n_clients // 2 + 1]
    cohort = shards.cohort(clients)
    assert cohort.clients.tolist() == clients.tolist()
    assert rows_of_cohort(cohort) == rows_of_clients(shards, clients)
    assert_consistent(cohort)
    held = [np.sum(np.asarray(cohort.owner) == c) for c in range(len(clients))]
    assert held == np.diff(shards.client_offsets)[clients].tolist()


def test_cohort_is_single_user_only_if_each_client_has_one():
    shards = FEDERATIONS["clients without users"]  # clients 1 and 3 hold one and two users
    assert shards.cohort(np.array([1])).single_user
    assert not shards.cohort(np.array([3])).single_user
    # A client without users next to one with two: as many users as clients, but not one each.
    assert not shards.cohort(np.array([0, 3])).single_user


def test_padded_puts_values_at_their_user_and_position(shards):
    cohort = shards.cohort(np.arange(shards.n_clients))
    padded = cohort.padded(cohort.items, -1)
    width = max(1, cohort.counts.max())
    assert padded.shape == (cohort.n_users, width)
    items = items_by_user(shards)
    for row, user in zip(padded.tolist(), cohort.users.tolist(), strict=True):
        assert row == items[user] + [-1] * (width - len(items[user]))


@pytest.mark.parametrize("rows_per_interaction", [1, 5])
@pytest.mark.parametrize("limit", [1, 7, 40, 10_000])
def test_chunks_cover_every_client_once_within_the_bound(
    shards, limit, rows_per_interaction, chunk_rows
):
    chunk_rows(limit)
    clients = np.random.default_rng(limit).permutation(shards.n_clients)
    chunks = list(shards.chunks(clients, rows_per_interaction=rows_per_interaction))
    assert sorted(np.concatenate([chunk.clients for chunk in chunks])) == sorted(clients)
    rows = [row for chunk in chunks for row in rows_of_cohort(chunk)]
    assert sorted(rows) == sorted(rows_of_clients(shards, clients))
    for chunk in chunks:
        assert_consistent(chunk)
        largest = max(1, shards.client_rows[chunk.clients].max() * rows_per_interaction)
        assert len(chunk.clients) == 1 or len(chunk.clients) * largest <= limit
    sizes = [shards.client_rows[client] for chunk in chunks for client in chunk.clients]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("limit", [1, 7, 40, 10_000])
def test_user_chunks_cover_every_user_once_within_the_bound(shards, limit, chunk_rows):
    chunk_rows(limit)
    clients = np.random.default_rng(limit).permutation(shards.n_clients)[1:]
    chunks = list(shards.user_chunks(clients))
    users = [user for chunk in chunks for user in chunk.users.tolist()]
    assert sorted(users) == sorted(shards.users_of(clients).tolist())
    rows = [row for chunk in chunks for row in rows_of_cohort(chunk)]
    assert sorted(rows) == sorted(rows_of_clients(shards, clients))
    for chunk in chunks:
        assert_consistent(chunk)
        assert chunk.single_user
        assert chunk.n_users == 1 or chunk.padded(chunk.items, 0).numel() <= limit


def test_chunks_fill_the_bound(chunk_rows):
    chunk_rows(12)
    shards = federation_of([range(3)] * 9, 5)
    assert [len(chunk.clients) for chunk in shards.chunks(np.arange(9))] == [4, 4, 1]
    chunks = shards.chunks(np.arange(9), rows_per_interaction=2)
    assert [len(chunk.clients) for chunk in chunks] == [2, 2, 2, 2, 1]
    small = federation_of([[0]] * 14 + [[]] * 2, 5)  # a client without rows takes a row's place
    assert [len(chunk.clients) for chunk in small.chunks(np.arange(16))] == [12, 4]


@pytest.mark.parametrize("cut", ["chunks", "user_chunks"])
def test_memory_of_a_chunk_does_not_grow_with_the_number_of_clients(cut, chunk_rows):
    chunk_rows(100)
    peaks = []
    for n_users in (50, 500, 5000):
        shards = random_federation(0, n_users=n_users, n_items=12, max_rows=6)
        chunks = getattr(shards, cut)(np.arange(n_users))
        peaks.append(max(chunk.padded(chunk.items, 0).numel() for chunk in chunks))
    assert max(peaks) <= 100
    assert min(peaks) > 80


def test_padding_stays_small_on_unequal_clients(chunk_rows):
    chunk_rows(1000)
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.pareto(1.0, 800) * 3 + 1, 400).astype(int)
    shards = federation_of([range(size) for size in sizes], 400)
    padded = sum(chunk.padded(chunk.items, 0).numel() for chunk in shards.chunks(np.arange(800)))
    assert padded < 1.3 * sizes.sum()
    assert 800 * sizes.max() > 20 * sizes.sum()  # what padding to one width would have cost


def test_no_clients_make_no_chunks(shards):
    nobody = np.array([], dtype=np.int64)
    assert list(shards.chunks(nobody)) == []
    assert list(shards.user_chunks(nobody)) == []
    assert shards.cohort(nobody).n_rows == 0
