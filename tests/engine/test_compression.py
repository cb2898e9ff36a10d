import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine.compression import Compression, leading_part, rounded
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uploads import add_uploads
from tests.engine.test_uploads import N_ITEMS, WIDTH, random_uploads

KINDS = ["top-k", "quantised", "low-rank"]
ALL = {"top-k": 1.0, "quantised": 30, "low-rank": WIDTH}
SOME = {"top-k": 0.4, "quantised": 3, "low-rank": 1}
EACH = pytest.mark.parametrize("name", KINDS)


def compression(name, level=None, feedback=True, seed=0):
    return Compression(name, SOME[name] if level is None else level, feedback, Streams(seed))


def send(name, uploads, residual=None, *, level=None, feedback=True, width=WIDTH, t=0, seed=0):
    stage = compression(name, level, feedback, seed)
    return stage.apply(uploads, residual, N_ITEMS, width, t)


def grams(uploads, width=WIDTH, seed=0):
    """The same uploads with symmetric matrices for numbers."""
    users = torch.randn(
        len(uploads.clients), 2, width, generator=torch.Generator().manual_seed(seed)
    )
    return replace(uploads, numbers=(users.mT @ users).flatten(1), products=True)


def tables(uploads):
    """Rows by (client, item)."""
    places = zip(uploads.row_clients.tolist(), uploads.row_items.tolist(), strict=True)
    return dict(zip(places, uploads.rows.double().numpy(), strict=True))


def random_round(t, *, width=WIDTH, n_numbers=4):
    """Uploads of round t: some of 12 clients, each with other items than before."""
    uploads = random_uploads(t, n_numbers=n_numbers)
    return replace(uploads, clients=np.random.default_rng(t).permutation(20)[:12])


# One round, against plain definitions ------------------------------------------------------


@EACH
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("make", [lambda u: u, grams], ids=["weights", "matrix"])
def test_a_level_that_keeps_everything_changes_nothing(name, feedback, make):
    uploads = make(random_uploads())
    residual = None
    for t in range(3):
        sent, residual, _ = send(name, uploads, residual, level=ALL[name], feedback=feedback, t=t)
        for part in ("row_clients", "row_items", "rows", "row_weights", "numbers", "weights"):
            torch.testing.assert_close(
                getattr(sent, part), getattr(uploads, part), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("share", [0.01, 0.34, 0.5, 0.9])
@pytest.mark.parametrize("width", [WIDTH, WIDTH - 1])
def test_the_longest_rows_are_sent(share, width):
    uploads = random_uploads()
    sent, residual, _ = send("top-k", uploads, level=share, width=width)
    found = tables(sent)
    for client in range(12):
        own = {k: row for k, row in tables(uploads).items() if k[0] == client}
        by_length = sorted(own, key=lambda k: -np.linalg.norm(own[k][:width]))
        chosen = set(by_length[: math.ceil(share * len(own))])
        assert {k for k in found if k[0] == client} == chosen
        items, rows, _ = residual[str(uploads.clients[client])]
        kept = {(client, item) for item in items.tolist()}
        assert kept == set(own) - chosen
        for item, row in zip(items.tolist(), rows.numpy(), strict=True):
            np.testing.assert_array_equal(row, own[client, item])
    for key, row in found.items():
        np.testing.assert_array_equal(row, tables(uploads)[key])


def test_of_a_network_the_largest_weights_are_sent():
    uploads = random_uploads(n_numbers=10)
    sent, residual, _ = send("top-k", uploads, level=0.25)
    for client, own in enumerate(uploads.numbers):
        chosen = torch.argsort(own.abs())[-3:]
        expected = torch.zeros(10)
        expected[chosen] = own[chosen]
        assert sent.numbers[client].equal(expected)
        assert residual[str(uploads.clients[client])][2].equal(own - expected)


@pytest.mark.parametrize("bits", [2, 3, 5, 9])
def test_quantised_rows_are_multiples_of_a_fraction_of_their_largest_number(bits):
    uploads = grams(random_uploads())
    for feedback in (True, False):
        sent, _, _ = send("quantised", uploads, level=bits, feedback=feedback)
        matrices = (uploads.numbers.reshape(-1, 3, 3), sent.numbers.reshape(-1, 3, 3))
        assert matrices[1].equal(matrices[1].mT)
        halves = [m[:, *torch.triu_indices(3, 3)] for m in matrices]
        for (values, found), most in (((uploads.rows, sent.rows), bits), (halves, max(bits, 8))):
            levels = 2 ** (most - 1) - 1
            scale = values.abs().amax(1, keepdim=True)
            steps = found * levels / scale
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
            error = ((values - found).abs() / (scale / levels)).max()
            assert error <= (0.5 if feedback else 1.0) + 1e-3
            assert error > (0.3 if feedback else 0.6)


def test_rounding_at_random_is_right_on_average_and_to_the_nearest_is_not():
    uploads = random_uploads()
    rounds = [send("quantised", uploads, level=2, feedback=False, t=t)[0].rows for t in range(600)]
    scale = uploads.rows.abs().amax(1, keepdim=True)
    assert ((torch.stack(rounds).mean(0) - uploads.rows).abs() / scale).max() < 0.1
    assert ((rounded(uploads.rows, 2) - uploads.rows).abs() / scale).max() > 0.4


def test_random_parts_follow_client_item_and_round_alone():
    uploads = random_uploads()
    sent, _, _ = send("quantised", uploads, level=2, feedback=False)
    kept = torch.arange(12) % 2 == 0
    half, _, _ = send("quantised", uploads.of(kept), level=2, feedback=False)
    assert sent.of(kept).rows.equal(half.rows)
    assert sent.of(kept).numbers.equal(half.numbers)
    for changes in ({"t": 1}, {"seed": 1}):
        other, _, _ = send("quantised", uploads, level=2, feedback=False, **changes)
        assert not other.rows.equal(sent.rows)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_rows_are_the_best_of_their_rank(rank):
    uploads, width = random_uploads(), 8
    generator = torch.Generator().manual_seed(0)
    uploads = replace(uploads, rows=torch.randn(len(uploads.rows), width, generator=generator))
    order = torch.randperm(len(uploads.rows), generator=generator)
    shuffled = replace(
        uploads,
        row_clients=uploads.row_clients[order],
        row_items=uploads.row_items[order],
        rows=uploads.rows[order],
        row_weights=uploads.row_weights[order],
    )
    sent, _, _ = send("low-rank", shuffled, level=rank, width=width)
    found, n_packed = tables(sent), 0
    for client in range(12):
        own = uploads.rows[uploads.row_clients == client].double()
        left, values, right = torch.linalg.svd(own, full_matrices=False)
        near = left[:, :rank] * values[:rank] @ right[:rank]
        packed = rank * (len(own) + width) < len(own) * width
        n_packed += packed
        items = uploads.row_items[uploads.row_clients == client].tolist()
        rows = np.array([found[client, item] for item in items])
        np.testing.assert_allclose(rows, near if packed else own, atol=1e-5)
    assert 0 < n_packed < 12


def test_low_rank_matrices_keep_their_largest_eigenvalues():
    matrices = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    matrices += matrices.mT.clone()
    values = torch.linalg.eigvalsh(matrices.double())
    for rank in (1, 3):
        near = torch.linalg.eigvalsh(leading_part(matrices, rank).double())
        for own, found in zip(values, near, strict=True):
            largest = own[torch.argsort(own.abs())[-rank:]]
            expected = (
                torch.cat([largest, torch.zeros(6 - rank, dtype=torch.float64)]).sort().values
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@EACH
def test_columns_beyond_the_table_go_along(name):
    uploads = random_uploads()
    sent, _, _ = send(name, uploads, width=WIDTH - 1)
    for key, row in tables(sent).items():
        assert row[-1] == tables(uploads)[key][-1]


@EACH
def test_broken_clients_spoil_nobody_else(name):
    uploads = grams(random_uploads())
    rows, numbers = uploads.rows.clone(), uploads.numbers.clone()
    rows[uploads.row_clients == 3], numbers[3] = torch.nan, torch.nan
    sent, _, _ = send(name, replace(uploads, rows=rows, numbers=numbers))
    whole, _, _ = send(name, uploads)
    others = torch.arange(12) != 3
    assert not sent.of(~others).rows.isfinite().any()
    torch.testing.assert_close(sent.of(others).rows, whole.of(others).rows)
    torch.testing.assert_close(sent.of(others).numbers, whole.of(others).numbers)


# Error feedback ----------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("make", [lambda u: u, grams], ids=["weights", "matrix"])
def test_with_error_feedback_nothing_is_lost(name, make):
    """All that clients sent over the rounds is what they wanted to send less what they keep."""
    wanted, got = {}, {}
    numbers = {"wanted": np.zeros((20, 9)), "got": np.zeros((20, 9))}
    residual = None
    for t in range(8):
        uploads = make(random_round(t))
        sent, residual, _ = send(name, uploads, residual, t=t)
        pairs = sent.row_clients * N_ITEMS + sent.row_items
        assert len(pairs.unique()) == len(pairs)
        for side, part in ((wanted, uploads), (got, sent)):
            for (place, item), row in tables(part).items():
                key = int(uploads.clients[place]), item
                side[key] = side.get(key, 0.0) + row
        for side, part in (("wanted", uploads), ("got", sent)):
            m = part.numbers.shape[1]
            numbers[side][uploads.clients, :m] += part.numbers.double().numpy()
    kept = {
        (int(client), item): row
        for client, (items, rows, _) in residual.items()
        for item, row in zip(items.tolist(), rows.double().numpy(), strict=True)
    }
    assert kept
    assert set(got) | set(kept) >= set(wanted)
    for key in set(got) | set(kept):
        total = got.get(key, 0.0) + kept.get(key, 0.0)
        np.testing.assert_allclose(total, wanted[key], atol=1e-4)
    left = np.zeros((20, 9))
    for client, (_, _, own) in residual.items():
        left[int(client), : len(own)] = own.numpy()
    np.testing.assert_allclose(numbers["got"] + left, numbers["wanted"], atol=1e-4)
    assert (left != 0).any() == (name == "quantised" or (name, m) == ("low-rank", 9))


@EACH
def test_without_error_feedback_nothing_is_kept(name):
    uploads = random_uploads()
    _, residual, _ = send(name, uploads, feedback=False)
    assert residual is None


@EACH
def test_the_residual_is_not_changed_in_place(name):
    _, before, _ = send(name, random_round(0))
    copy = {key: tuple(part.clone() for part in parts) for key, parts in before.items()}
    send(name, random_round(1), before, t=1)
    assert before.keys() == copy.keys()
    for key, parts in before.items():
        assert all(ours.equal(theirs) for ours, theirs in zip(parts, copy[key], strict=True))


def test_rows_that_are_sent_late_weigh_as_much_as_the_others():
    first, second = random_round(0), random_round(0)
    _, residual, _ = send("top-k", first, level=0.01)
    quiet = replace(
        second, rows=second.rows * 1e-6, row_weights=torch.full_like(second.row_weights, 0.25)
    )
    late, _, _ = send("top-k", quiet, residual, level=1.0, t=1)
    assert late.row_weights.unique().tolist() == [0.25]
    assert len(late.rows) == len(second.rows)


# Bytes -------------------------------------------------------------------------------------


def test_bytes_of_a_tiny_case_by_hand():
    """Two clients with 4 and 1 rows of 3 columns in the table and one besides; 10 weights."""
    uploads = random_uploads(n_numbers=10)
    two = replace(
        uploads.of(torch.arange(12) < 2),
        row_clients=torch.tensor([0, 0, 0, 0, 1]),
        row_items=torch.tensor([0, 1, 2, 3, 0]),
        rows=torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),
        row_weights=torch.ones(5),
    )
    # 2 and 1 rows of 4 numbers and an index; 5 of 10 weights with indices would not be smaller.
    assert send("top-k", two, level=0.5)[2] == 3 * (4 * 4 + 4) + 2 * 10 * 4
    assert send("top-k", two, level=0.25)[2] == 2 * (4 * 4 + 4) + 2 * 3 * 8
    # Five rows: index, scale, 3 x 5 bits, the other column; scale and 10 x 5 bits for the weights.
    assert send("quantised", two, level=5)[2] == 5 * (4 + 4 + 2 + 4) + 2 * (4 + 7)
    # 4 x 3 as 4 x 1 and 1 x 3; the single row stays; indices and other columns; the weights.
    assert send("low-rank", two, level=1)[2] == (7 + 3) * 4 + 5 * (4 + 4) + 2 * 10 * 4
    matrices = replace(two, numbers=torch.eye(3).flatten().repeat(2, 1), products=True)
    assert send("top-k", matrices, level=0.5)[2] == 3 * 20 + 2 * 6 * 4
    assert send("quantised", matrices, level=5)[2] == 5 * 14 + 2 * (4 + 6)
    assert send("low-rank", matrices, level=1)[2] == 80 + 2 * 4 * 4
    assert send("low-rank", matrices, level=2)[2] == 12 * 4 + 3 * 4 + 5 * 8 + 2 * 6 * 4
    # As many weights as a matrix has, and none of them is one.
    weights = replace(matrices, products=False)
    assert send("top-k", weights, level=0.25)[2] == 2 * 20 + 2 * 3 * 8
    assert send("quantised", weights, level=5)[2] == 5 * 14 + 2 * (4 + 6)
    assert send("low-rank", weights, level=1)[2] == 80 + 2 * 9 * 4
    nothing = replace(two, numbers=torch.zeros(2, 0))
    assert send("quantised", nothing, level=8)[2] == 5 * (4 + 4 + 3 + 4)


def test_residual_rows_are_paid_for_when_they_are_sent():
    uploads = random_round(0)
    n_bytes = [send("top-k", uploads, None, level=0.5)[2]]
    residual = send("top-k", uploads, level=0.5)[1]
    n_bytes.append(send("top-k", uploads, residual, level=0.5, t=1)[2])
    assert n_bytes[0] == n_bytes[1]  # as many rows as before, whichever they are


@EACH
def test_sums_of_compressed_uploads_are_near(name):
    uploads = random_uploads(n_clients=12)
    plain = add_uploads(uploads, N_ITEMS).rows
    errors = []
    for level in {"top-k": (0.2, 0.6, 1.0), "quantised": (2, 4, 12), "low-rank": (1, 2, 3)}[name]:
        sent, _, _ = send(name, uploads, level=level)
        errors.append(float((add_uploads(sent, N_ITEMS).rows - plain).norm() / plain.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1.0
    assert errors[-1] < 1e-3
