from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine.attacks import Attack, draw_malicious, made_up_items
from fedrecsk.engine.defences import Defence, clip, krum, trimmed_mean
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import EXPLODED, Uploads, add_uploads, screen
from fedrecsk.exceptions import NoUsableUploadError
from tests.reference.defence_reference import (
    central_mean,
    krum_scores,
    laid_out,
    shortened,
    trimmed,
)

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


# Defences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.9, 1.0])
def test_clipping_shortens_what_is_longer_than_the_quantile(quantile):
    uploads = random_uploads()
    clipped = clip(uploads, quantile)
    n = uploads.n_directions
    close(clipped.rows[:, :n], shortened(uploads.rows[:, :n].numpy(), quantile))
    close(clipped.rows[:, n:], shortened(uploads.rows[:, n:].numpy(), quantile))  # one column
    close(clipped.numbers, shortened(uploads.numbers.numpy(), quantile))
    parallel = torch.cosine_similarity(clipped.rows[:, :n], uploads.rows[:, :n])
    close(parallel, np.ones(len(parallel)))


@pytest.mark.parametrize(
    ("name", "assumed", "cut"), [("median", 0.0, 99), ("trimmed-mean", 0.2, 3)]
)
@pytest.mark.parametrize("at_once", [1, 20, 1 << 24])
def test_trimmed_means_and_medians_are_those_of_who_sent_the_row(
    name, assumed, cut, at_once, monkeypatch
):
    monkeypatch.setattr("fedrecsk.engine.defences.SORTED_NUMBERS", at_once)
    uploads = random_uploads(1)
    sums = Defence(name, assumed, 1.0).add(uploads, N_ITEMS)
    expected = np.zeros((N_ITEMS, WIDTH))
    for item, sent in laid_out(uploads, N_ITEMS).items():
        for column in range(WIDTH):
            if sent:
                values = [row[column] for row in sent.values()]
                expected[item, column] = trimmed(values, cut) * client_weights_of(uploads, item)
    close(sums.rows, expected)
    numbers = uploads.numbers.double().numpy()
    total = uploads.weights.double().sum().item()
    close(sums.numbers, central_mean(numbers, cut) * total)
    assert sums.weight.item() == pytest.approx(total)
    assert sums.clients.tolist() == uploads.clients.tolist()


@pytest.mark.parametrize("n_numbers", [0, 4])
@pytest.mark.parametrize("n_malicious", [0, 3])
@pytest.mark.parametrize("at_once", [1, 1 << 23])
def test_krum_takes_those_with_near_neighbours(n_numbers, n_malicious, at_once, monkeypatch):
    monkeypatch.setattr("fedrecsk.engine.defences.DENSE_NUMBERS", at_once)
    for seed in range(4):
        uploads = random_uploads(seed, n_numbers=n_numbers)
        scores = krum_scores(uploads, N_ITEMS, n_malicious)
        for n_chosen in (1, 7):
            chosen = krum(uploads, N_ITEMS, n_malicious, n_chosen)
            expected = np.sort(np.argsort(scores, kind="stable")[:n_chosen])
            assert chosen.clients.tolist() == uploads.clients[expected].tolist()


def test_strangers_are_no_nearer_than_those_who_share_a_row():
    """Few pairs have a row in common, as on data with many items: nobody else is known."""
    uploads = replace(
        random_uploads(n_clients=6),
        row_clients=torch.arange(6),
        row_items=torch.tensor([0, 0, 0, 1, 2, 3]),
        rows=torch.tensor([[1.0], [2.0], [3.0], [9.0], [9.0], [9.0]]),
        row_weights=torch.ones(6),
        n_directions=1,
        numbers=torch.zeros(6, 0),
    )
    np.testing.assert_array_equal(krum_scores(uploads, N_ITEMS, 0), [4.0] * 6)
    assert krum(uploads, N_ITEMS, 0, 1).clients.tolist() == uploads.clients[:1].tolist()


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "krum", "multi-krum"])
@pytest.mark.parametrize("value", [-50.0, 50.0])
def test_a_minority_does_not_move_the_result_far(name, value):
    # Everybody sends every row, all about 1; three of twelve say something else.
    rng = np.random.default_rng(0)
    client, item = (axis.ravel() for axis in np.divmod(np.arange(12 * N_ITEMS), N_ITEMS))
    rows = torch.from_numpy(rng.normal(1, 0.1, (len(client), WIDTH)).astype(np.float32))
    lies = torch.from_numpy(client < 3)
    rows[lies] = value
    uploads = Uploads(
        np.arange(12), torch.from_numpy(client), torch.from_numpy(item), rows,
        torch.ones(len(client)), WIDTH, torch.zeros(12, 0), torch.ones(12),
    )  # fmt: skip
    sums = Defence(name, 0.25, 1.0).add(uploads, N_ITEMS)
    means = sums.rows / sums.row_weights[:, None]
    assert (means - 1).abs().max() < 0.3
    plain = add_uploads(uploads, N_ITEMS)
    assert (plain.rows / plain.row_weights[:, None] - 1).abs().min() > 5


def test_what_is_left_of_gram_matrices_is_one():
    users = torch.randn(15, 4, generator=torch.Generator().manual_seed(0))
    users[0] *= 40
    uploads = random_uploads(n_clients=15)
    grams = (users[:, :, None] * users[:, None, :]).flatten(1)
    for name in ("median", "trimmed-mean"):
        sums = Defence(name, 0.1, 1.0).add(replace(uploads, numbers=grams), N_ITEMS)
        values = torch.linalg.eigvalsh(sums.numbers.reshape(4, 4))
        assert 0 < values[0] < values[-1] < 100


def test_without_values_there_is_no_mean():
    found = trimmed_mean(torch.ones(2, 3), torch.tensor([2, 2]), torch.tensor([0, 0, 2, 0]), 1)
    assert found.tolist() == [[0] * 3, [0] * 3, [1] * 3, [0] * 3]


# Attacks ----------------------------------------------------------------------------------


def attacked(name, uploads, target=5, strength=4.0):
    malicious = np.zeros(100, dtype=bool)
    malicious[uploads.clients[[1, 4]]] = True
    vectors = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))
    attack = Attack(name, malicious, strength, target, Streams(0))
    bad = torch.isin(uploads.row_clients, torch.tensor([1, 4]))
    return attack.apply(uploads, vectors, torch.zeros(N_ITEMS, WIDTH), 0), bad, vectors


@pytest.mark.parametrize(("name", "factor"), [("sign-flip", -4.0), ("scale", 4.0)])
def test_flipped_and_scaled_uploads(name, factor):
    uploads = random_uploads()
    found, bad, _ = attacked(name, uploads)
    close(found.rows, torch.where(bad[:, None], factor * uploads.rows, uploads.rows).numpy())
    close(found.numbers[4], factor * uploads.numbers[4].numpy())
    close(found.numbers[3], uploads.numbers[3].numpy())


def test_noise_is_as_much_longer_as_the_strength_says():
    uploads = random_uploads()
    found, bad, _ = attacked("gaussian", uploads)
    close(found.rows[bad].norm(dim=1), 4 * uploads.rows[bad].norm(dim=1).numpy())
    close(found.rows[~bad], uploads.rows[~bad].numpy())
    cosine = torch.cosine_similarity(found.rows[bad], uploads.rows[bad])
    assert cosine.abs().mean() < 0.9


def test_broken_devices_send_what_is_not_a_number():
    found, bad, _ = attacked("nan", random_uploads())
    assert found.rows[bad].isnan().all()
    assert not found.rows[~bad].isnan().any()


def test_a_promotion_replaces_the_row_of_the_target_alone():
    uploads = random_uploads()
    found, bad, vectors = attacked("gradient", uploads, target=8)  # which nobody sends
    n = len(uploads.rows)
    assert found.row_items[n:].tolist() == [8, 8]
    assert found.row_clients[n:].tolist() == [1, 4]
    close(found.rows[:n], uploads.rows.numpy())
    typical = uploads.rows[bad].norm(dim=1).median()
    close(found.rows[n:].norm(dim=1), [4 * typical] * 2)
    # The table is zero, so the gradient is half the sum of the attackers' users.
    direction = vectors[[1, 4]].sum(0)
    close(torch.cosine_similarity(found.rows[n:], direction[None]), [1.0, 1.0])
    sent, _, _ = attacked("gradient", uploads, target=5)
    pairs = sent.row_clients * N_ITEMS + sent.row_items
    assert len(pairs.unique()) == len(pairs)


def test_who_is_dishonest_is_drawn_once_and_for_all():
    drawn = draw_malicious(200, 0.1, Streams(3))
    assert drawn.sum() == 20
    assert (drawn == draw_malicious(200, 0.1, Streams(3))).all()
    assert (drawn != draw_malicious(200, 0.1, Streams(4))).any()


@pytest.mark.parametrize("name", ["random", "bandwagon"])
def test_made_up_histories_hold_the_target_and_are_as_long(name):
    rng = np.random.default_rng(0)
    n_users, n_items = 30, 40
    items_of = [rng.choice(n_items, rng.integers(1, 41), replace=False) for _ in range(n_users)]
    user = np.repeat(np.arange(n_users), list(map(len, items_of)))
    item = np.concatenate(items_of)
    order = rng.permutation(len(user))
    user, item = user[order], item[order]
    liars = np.arange(n_users) % 3 == 0
    made = made_up_items(user, item, liars, n_items, target=7, name=name, streams=Streams(0))
    assert (made[~liars[user]] == item[~liars[user]]).all()
    popular = np.argsort(-np.bincount(item[~liars[user]], minlength=n_items), kind="stable")
    for one in np.flatnonzero(liars):
        own = made[user == one]
        assert len(set(own.tolist())) == len(own)
        assert 7 in own
        if name == "bandwagon":
            top = [i for i in popular if i != 7][: (len(own) - 1) // 2]
            assert set(top) <= set(own.tolist())
