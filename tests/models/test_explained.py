"""Uploads that some data would explain, and others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine.attacks import Attack
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uploads import Uploads
from fedrecsk.models import whole_data
from fedrecsk.models.explained import Explanation
from tests.reference.federations import random_federation

D = 5
BLOCKS = [[slice(None)], [slice(0, 2), slice(2, 5)]]
SINGLE = random_federation(0, n_users=18, n_items=25, max_rows=5)
SHARED = random_federation(1, n_users=40, n_items=12, n_clients=9, max_rows=4)
FEDERATIONS = pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["single", "shared"])


def honest(shards, blocks, seed=0, scale=0.7):
    """Uploads of all clients, the vectors that are in them, and what explains them."""
    generator = torch.Generator().manual_seed(seed)
    table = scale * torch.randn(shards.n_items, D, generator=generator)
    parts, vectors = [], []
    for cohort in shards.user_chunks(np.arange(shards.n_clients)):
        users = scale * torch.randn(cohort.n_users, D, generator=generator)
        parts.append(whole_data.uploads_of(cohort, users, table, blocks))
        vectors.append(users)
    sent = Uploads.join(parts)
    clients, place = np.unique(sent.clients, return_inverse=True)
    explanation = Explanation(table, blocks, clients, np.bincount(place))
    uploads = sent.by_client(shards.n_items)
    means = (
        torch.zeros(len(clients), D).index_add_(0, torch.from_numpy(place), torch.cat(vectors))
        / torch.from_numpy(np.bincount(place))[:, None]
    )
    return uploads, means, explanation


@FEDERATIONS
@pytest.mark.parametrize("blocks", BLOCKS, ids=["one", "two"])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_honest_uploads_are_explained(shards, blocks, scale, seed):
    uploads, _, explanation = honest(shards, blocks, seed, scale)
    assert explanation.holds(uploads).all()


@FEDERATIONS
@pytest.mark.parametrize("blocks", BLOCKS, ids=["one", "two"])
@pytest.mark.parametrize("name", ["sign-flip", "scale", "gaussian", "gradient"])
def test_uploads_that_were_tampered_with_are_not(shards, blocks, name):
    uploads, means, explanation = honest(shards, blocks)
    malicious = np.zeros(shards.n_clients, dtype=bool)
    malicious[uploads.clients[[1, 4]]] = True
    attack = Attack(name, malicious, 10.0, 3, Streams(0))
    sent = attack.apply(uploads, means, explanation.item_factors, 0)
    found = explanation.holds(sent).numpy()
    np.testing.assert_array_equal(found, ~malicious[uploads.clients])


@pytest.mark.parametrize("blocks", BLOCKS, ids=["one", "two"])
def test_of_one_user_no_number_can_be_another(blocks):
    uploads, _, explanation = honest(SINGLE, blocks)
    row = int(torch.nonzero(uploads.row_clients == 2)[0])
    for column in range(uploads.rows.shape[1]):
        rows = uploads.rows.clone()
        rows[row, column] += 0.1
        assert torch.nonzero(~explanation.holds(uploads.with_rows(rows))).tolist() == [[2]]
    for column in range(uploads.numbers.shape[1]):
        numbers = uploads.numbers.clone()
        numbers[2, column] += 0.1
        changed = replace(uploads, numbers=numbers)
        assert torch.nonzero(~explanation.holds(changed)).tolist() == [[2]]
    for name in ("row_weights", "weights"):
        weights = getattr(uploads, name).clone()
        weights[row if name == "row_weights" else 2] = 3.0
        changed = replace(uploads, **{name: weights})
        assert torch.nonzero(~explanation.holds(changed)).tolist() == [[2]]


def test_of_several_users_nobody_pulls_harder_than_they_could():
    """Nor more of them than there are, nor in directions in which none of them points."""
    uploads, _, explanation = honest(SHARED, [slice(None)])
    client = int(np.flatnonzero(explanation.n_users > 1)[0])
    row = int(torch.nonzero(uploads.row_clients == client)[0])

    def holds(column, change):
        rows = uploads.rows.clone()
        rows[row, column] = change(rows[row, column])
        return bool(explanation.holds(uploads.with_rows(rows))[client])

    assert not holds(slice(0, D), lambda pull: 5.0 * pull)
    assert not holds(D, lambda curvature: -curvature)
    assert not holds(D, lambda curvature: curvature + 10.0)
    assert not holds(D + 1, lambda count: count + 0.5)
    assert not holds(D + 1, lambda count: count + 100.0)
    assert holds(D, lambda curvature: 0.0 * curvature)  # which only says that scores are small
    few = next(c for c in range(9) if 1 < explanation.n_users[c] < D)
    gram = uploads.numbers[few].reshape(D, D).double()
    stranger = torch.linalg.eigh(gram).eigenvectors[:, 0].float()  # of no user of the client
    rows = uploads.rows.clone()
    rows[torch.nonzero(uploads.row_clients == few)[0], :D] += 0.2 * stranger
    assert not explanation.holds(uploads.with_rows(rows))[few]


@FEDERATIONS
@pytest.mark.parametrize("blocks", BLOCKS, ids=["one", "two"])
def test_lookalikes_send_what_a_user_would(shards, blocks):
    uploads, means, explanation = honest(shards, blocks)
    malicious = np.zeros(shards.n_clients, dtype=bool)
    malicious[uploads.clients[[1, 4]]] = True
    attack = Attack("lookalike", malicious, 10.0, 3, Streams(0))
    sent = attack.apply(uploads, means, explanation.item_factors, 0, explanation)
    assert explanation.holds(sent).all()
    for client in (1, 4):
        assert sent.row_items[sent.row_clients == client].tolist() == [3]
    vector = means[[1, 4]].mean(0)
    torch.testing.assert_close(sent.numbers[4].reshape(D, D), torch.outer(vector, vector))
    others = ~torch.isin(uploads.row_clients, torch.tensor([1, 4]))
    still = ~torch.isin(sent.row_clients, torch.tensor([1, 4]))
    torch.testing.assert_close(sent.rows[still], uploads.rows[others])
