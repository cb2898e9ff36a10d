from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine.defences import Defence, clip, krum, trimmed_mean
from fedrecsk.engine.uploads import Uploads, add_uploads
from tests.engine.test_uploads import N_ITEMS, WIDTH, client_weights_of, close, random_uploads
from tests.reference.defence_reference import (
    central_mean,
    krum_scores,
    laid_out,
    shortened,
    trimmed,
)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("assumed", [0.0, 0.2])
@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.9, 1.0])
def test_clipping_shortens_what_is_longer_than_the_quantile(quantile, assumed, products):
    uploads = replace(random_uploads(), products=products)
    clipped = clip(uploads, quantile, assumed)
    n = uploads.n_directions
    believed = None if products else 1 - assumed  # the length of changes is made up for
    close(clipped.rows[:, :n], shortened(uploads.rows[:, :n].numpy(), quantile, believed))
    close(clipped.rows[:, n:], shortened(uploads.rows[:, n:].numpy(), quantile))  # one column
    close(clipped.numbers, shortened(uploads.numbers.numpy(), quantile, believed))
    parallel = torch.cosine_similarity(clipped.rows[:, :n], uploads.rows[:, :n])
    close(parallel, np.ones(len(parallel)))


@pytest.mark.parametrize("length", [1e2, 1e30])
def test_what_liars_send_lengthens_nothing_beyond_the_longest_honest_row(length):
    uploads = random_uploads()
    lies = uploads.row_clients == 1
    assert lies.float().mean() < 0.2
    loud = uploads.with_rows(torch.where(lies[:, None], length, uploads.rows))
    honest = loud.rows[~lies].norm(dim=1).max()
    assert clip(loud, 0.5, 0.2).rows.norm(dim=1).max() <= honest


def test_where_most_have_nothing_to_say_nobody_speaks():
    uploads = random_uploads()
    rows = torch.zeros_like(uploads.rows)
    rows[0] = 5.0
    assert (clip(uploads.with_rows(rows), 0.7, 0.1).rows == 0).all()


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
