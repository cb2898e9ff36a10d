import numpy as np
import pytest
import torch

from fedrecsk.engine.attacks import Attack, draw_malicious, made_up_items
from fedrecsk.engine.streams import Streams
from tests.engine.test_uploads import N_ITEMS, WIDTH, close, random_uploads


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
