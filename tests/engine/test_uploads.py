import numpy as np
import pytest
import torch

from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import EXPLODED, Uploads, add_uploads, screen
from fedrecsk.exceptions import NoUsableUploadError

N_ITEMS, WIDTH = 9, 3


def random_uploads(seed=0, n_clients=12, n_numbers=4):
    """Clients that send 1 to 6 rows; nobody sends the last item, one client alone item 7."""
    rng = np.random.default_rng(seed)
    items = [rng.choice(7, rng.integers(1, 7), replace=False) for _ in range(n_clients)]
    items[3] = np.append(items[3], 7)
    n_rows = sum(map(len, items))
    return Uploads(
        clients=np.sort(rng.choice(100, n_clients, replace=False)),
        row_clients=torch.from_numpy(np.repeat(np.arange(n_clients), list(map(len, items)))),
        row_items=torch.from_numpy(np.concatenate(items)),
        rows=torch.from_numpy(rng.normal(size=(n_rows, WIDTH)).astype(np.float32)),
        row_weights=torch.from_numpy(rng.uniform(0.5, 2, n_rows).astype(np.float32)),
        n_directions=WIDTH - 1,
        numbers=torch.from_numpy(rng.normal(size=(n_clients, n_numbers)).astype(np.float32)),
        weights=torch.from_numpy(rng.uniform(0.5, 2, n_clients).astype(np.float32)),
    )


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def client_weights_of(uploads, item):
    return uploads.row_weights[uploads.row_items == item].double().sum().item()


# Sums -------------------------------------------------------------------------------------


def test_sums_are_those_of_a_loop():
    uploads = random_uploads()
    sums = add_uploads(uploads, N_ITEMS)
    rows, weights = np.zeros((N_ITEMS, WIDTH)), np.zeros(N_ITEMS)
    for item, row, weight in zip(
        uploads.row_items.tolist(), uploads.rows.numpy(), uploads.row_weights.tolist(), strict=True
    ):
        rows[item] += weight * row
        weights[item] += weight
    close(sums.rows, rows)
    close(sums.row_weights, weights)
    close(sums.numbers, (uploads.weights[:, None] * uploads.numbers).sum(0).numpy())
    assert not sums.rows[-1].any()


def test_uploads_of_chunks_are_joined_and_taken_apart():
    uploads = random_uploads()
    kept = torch.arange(12) % 3 == 0
    parts = [uploads.of(kept), uploads.of(~kept)]
    assert parts[0].clients.tolist() == uploads.clients[::3].tolist()
    whole = add_uploads(Uploads.join(parts), N_ITEMS)
    close(whole.rows, add_uploads(uploads, N_ITEMS).rows.numpy())
    close(whole.numbers, add_uploads(uploads, N_ITEMS).numbers.numpy())


def test_entries_of_one_client_are_added_up():
    uploads = random_uploads()
    ones = torch.ones_like(uploads.row_weights), torch.ones_like(uploads.weights)
    twice = Uploads(
        np.array([5, 2] * 6), uploads.row_clients, uploads.row_items, uploads.rows, ones[0],
        WIDTH, uploads.numbers, ones[1],
    )  # fmt: skip
    merged = twice.by_client(N_ITEMS)
    assert merged.clients.tolist() == [2, 5]
    pairs = merged.row_clients * N_ITEMS + merged.row_items
    assert len(pairs.unique()) == len(pairs)
    close(merged.numbers[0], uploads.numbers[1::2].sum(0).numpy())
    close(add_uploads(merged, N_ITEMS).rows, add_uploads(twice, N_ITEMS).rows.numpy())


# Screening --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("where", ["rows", "numbers"])
def test_what_nobody_can_use_is_dropped(where, value):
    uploads = random_uploads()
    place = uploads.row_clients == 4 if where == "rows" else torch.arange(12) == 4
    getattr(uploads, where)[place] = value
    usable = screen(uploads)
    assert usable.clients.tolist() == np.delete(uploads.clients, 4).tolist()
    assert add_uploads(usable, N_ITEMS).rows.isfinite().all()


def test_long_uploads_are_kept_up_to_the_bound():
    uploads = random_uploads()
    typical = uploads.norms().median()
    for factor, n_left in ((0.9, 12), (1.2, 11)):
        one = uploads.norms()[4]
        scale = torch.ones(12)
        scale[4] = factor * EXPLODED * typical / one
        longer = Uploads(
            uploads.clients, uploads.row_clients, uploads.row_items,
            uploads.rows * scale[uploads.row_clients][:, None], uploads.row_weights, WIDTH,
            uploads.numbers * scale[:, None], uploads.weights,
        )  # fmt: skip
        assert len(screen(longer).clients) == n_left


def test_nobody_is_too_long_where_most_have_nothing_to_say():
    uploads = random_uploads()
    silent = uploads.with_rows(uploads.rows * (uploads.row_clients == 4)[:, None])
    silent.numbers[torch.arange(12) != 4] = 0.0
    assert len(screen(silent).clients) == 12


def test_an_uplink_ends_the_fit_if_nothing_can_be_used():
    uploads = random_uploads()
    uploads.rows[:] = torch.nan
    with pytest.raises(NoUsableUploadError, match="round 3: the uploads of all 12 clients"):
        Uplink().receive(uploads, torch.zeros(12, WIDTH), torch.zeros(N_ITEMS, WIDTH), 2)
