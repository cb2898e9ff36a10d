from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from fedrecsk.engine import secure_sum
from fedrecsk.engine.secure_sum import (
    PRIME,
    SecureSum,
    cut,
    masked,
    masked_sum,
    protocol_bytes,
    put_together,
    quantised,
    ring_sum,
    steps,
    threshold,
)
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import add_uploads
from fedrecsk.exceptions import NoUsableUploadError, TooFewClientsError
from tests.engine.test_uploads import N_ITEMS, WIDTH, random_uploads

STREAMS = Streams(3)


def values_of(n_clients=7, n_values=11, seed=0):
    return np.random.default_rng(seed).integers(-1000, 1000, (n_clients, n_values))


# Secrets ----------------------------------------------------------------------------------


def test_any_threshold_shares_give_the_secret_and_fewer_do_not():
    secret = 2**254 + 12345
    shares = cut(secret, 6, 4, np.random.default_rng(0))
    for places in combinations(range(6), 4):
        assert put_together({place: shares[place] for place in places}) == secret
    assert put_together(dict(enumerate(shares))) == secret
    for places in combinations(range(6), 3):
        assert put_together({place: shares[place] for place in places}) != secret


def test_shares_are_spread_over_the_field():
    shares = [cut(1, 3, 2, np.random.default_rng(seed)) for seed in range(200)]
    mean = np.mean([[share / PRIME for share in own] for own in shares], axis=0)
    assert (np.abs(mean - 0.5) < 0.1).all()


def test_both_sides_of_a_pair_agree_on_a_seed():
    one, other = (secure_sum._drawn_keys(STREAMS, number) for number in (0, 1))
    assert one.agreed(other.public) == other.agreed(one.public)
    assert one.agreed(other.public) != one.agreed(one.public)


# The protocol -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [12, 32, 64])
@pytest.mark.parametrize(("vanished", "silent"), [((), ()), ((2,), ()), ((), (0,)), ((1, 6), (3,))])
def test_the_server_learns_the_sum_of_those_who_sent(bits, vanished, silent):
    values = values_of()
    found = masked_sum(
        values, bits=bits, threshold=4, streams=STREAMS, vanished=vanished, silent=silent
    )
    kept = [number for number in range(len(values)) if number not in vanished]
    expected = torch.from_numpy(values[kept].sum(0))
    if bits < 64:
        expected = ring_sum(expected, bits)
    assert found.tolist() == expected.tolist()


def test_sums_beyond_the_ring_wrap_around():
    values = np.full((3, 2), 100)
    found = masked_sum(values, bits=8, threshold=2, streams=STREAMS)
    assert found.tolist() == [300 - 256] * 2 == ring_sum(torch.tensor([300] * 2), 8).tolist()


@pytest.mark.parametrize(
    ("vanished", "silent", "left"),
    [((0, 1, 2, 3), (), 3), ((), (0, 1, 2, 3), 3), ((5, 4), (1, 2), 3)],
)
def test_below_the_threshold_nobody_learns_anything(vanished, silent, left):
    with pytest.raises(TooFewClientsError, match=f"7 clients of round 3 only {left} .* needs 4"):
        masked_sum(
            values_of(),
            bits=32,
            threshold=4,
            streams=STREAMS,
            vanished=vanished,
            silent=silent,
            t=2,
        )


def test_what_a_client_sends_says_nothing_of_its_numbers():
    """Two vectors under the same masks differ as they do, and each alone looks like noise."""
    keys = [secure_sum._drawn_keys(STREAMS, number) for number in range(4)]
    public = [one.public for one in keys]
    zeros = masked(np.zeros(4000, dtype=np.int64), 1, keys[1], public)
    sent = masked(np.full(4000, 5), 1, keys[1], public)
    assert (sent - zeros == 5).all()
    for values in (zeros, sent):
        low = values & np.uint64(2**16 - 1)
        counts = np.histogram(low, 16, (0, 2**16))[0]
        assert ((counts - 250) ** 2 / 250).sum() < 45  # chi squared with 15 degrees: 1e-4


def test_without_recovery_the_masks_of_who_vanished_stay(monkeypatch):
    monkeypatch.setattr(secure_sum, "_pair_mask", lambda *_: np.zeros(11, dtype=np.uint64))
    found = masked_sum(values_of(), bits=32, threshold=4, streams=STREAMS, vanished=[2])
    assert found.tolist() == np.delete(values_of(), 2, 0).sum(0).tolist()  # without masks
    monkeypatch.undo()
    pair = secure_sum._pair_mask

    def forgets(number, other, seed, n):
        """Let the server, which asks for the pairs with client 2 alone, take nothing off."""
        forgets.calls += 1
        mask = pair(number, other, seed, n)
        return mask if forgets.calls <= 6 * 6 else 0 * mask

    forgets.calls = 0
    monkeypatch.setattr(secure_sum, "_pair_mask", forgets)
    found = masked_sum(values_of(), bits=32, threshold=4, streams=STREAMS, vanished=[2])
    assert (found != np.delete(values_of(), 2, 0).sum(0)).all()
    assert forgets.calls == 6 * 6 + 6


@pytest.mark.parametrize(("vanished", "silent"), [((), ()), ((2, 5), (0,))])
def test_of_a_client_the_server_puts_one_secret_together_never_both(monkeypatch, vanished, silent):
    drawn = [secure_sum._drawn_keys(STREAMS, number) for number in range(7)]
    found = []
    put = secure_sum.put_together
    monkeypatch.setattr(
        secure_sum, "put_together", lambda *given: found.append(put(*given)) or found[-1]
    )
    masked_sum(values_of(), bits=32, threshold=4, streams=STREAMS, vanished=vanished, silent=silent)
    for number, keys in enumerate(drawn):
        assert (keys.secret in found) == (number in vanished)
        assert (keys.seed in found) == (number not in vanished)


# Fixed point ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("n_clients", [2, 3, 127])
def test_the_largest_sums_fit_and_one_client_more_does_not(bits, n_clients):
    n_steps = steps(bits, n_clients)
    for sign in (-1, 1):
        total = torch.tensor([sign * n_clients * n_steps])
        assert ring_sum(total, bits).equal(total)
    total = torch.tensor([n_clients * (n_steps + 1)])
    assert not ring_sum(total, bits).equal(total)


def test_too_many_clients_for_the_ring_are_refused():
    with pytest.raises(ValueError, match="secure_bits=8 holds sums of at most 127 clients"):
        steps(8, 128)


def test_numbers_are_rounded_to_the_nearest_step_and_cut_off_at_the_bound():
    values = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    found = quantised(values, 2.0, 50)
    back = found.double() * (2.0 / 50)
    inside = values.abs() <= 2
    assert (back - values)[inside].abs().max() <= 0.02 + 1e-12
    assert set(found[~inside].tolist()) == {-50, 50}


# Uploads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("width", [WIDTH, WIDTH - 2])
@pytest.mark.parametrize("n_numbers", [0, 4])
def test_protocol_and_arithmetic_are_the_same_and_near_the_plain_sum(bits, width, n_numbers):
    uploads = random_uploads(n_numbers=n_numbers)
    found = SecureSum(bits, False, STREAMS).add(uploads, N_ITEMS, width, 5)
    whole = SecureSum(bits, True, STREAMS).add(uploads, N_ITEMS, width, 5)
    plain = add_uploads(uploads, N_ITEMS)
    n_clients = len(uploads.clients)
    weighted = uploads.rows * uploads.row_weights[:, None]
    numbers = uploads.numbers * uploads.weights[:, None]

    def tolerance(values):
        """n half steps, with the smallest power of two that no number exceeds as the bound."""
        largest = float(values.abs().max()) if values.numel() else 1.0
        return n_clients * 0.5 * 2 ** np.ceil(np.log2(largest)) / steps(bits, n_clients) + 3e-6

    bounds = {
        "rows": max(tolerance(weighted[:, :width]), *map(tolerance, weighted[:, width:].T), 0),
        "row_weights": tolerance(uploads.row_weights),
        "numbers": tolerance(numbers),
        "weight": tolerance(uploads.weights),
    }
    for name, bound in bounds.items():
        ours, theirs, expected = (getattr(sums, name) for sums in (found, whole, plain))
        assert torch.equal(ours, theirs), name
        assert ours.dtype == expected.dtype
        assert ours.shape == expected.shape
        if expected.numel():
            assert (ours - expected).abs().max() <= bound, name
    assert found.clients.tolist() == uploads.clients.tolist()
    assert (found.bytes_up, found.bytes_down) == (whole.bytes_up, whole.bytes_down)


def test_coarse_sums_are_worse_than_fine_ones():
    uploads = random_uploads()
    plain = add_uploads(uploads, N_ITEMS).rows
    errors = [
        float((SecureSum(bits, False, STREAMS).add(uploads, N_ITEMS, WIDTH, 0).rows - plain).norm())
        for bits in (8, 12, 16, 24)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 30 * errors[2]


def test_counts_are_exact():
    uploads = random_uploads()
    ones = replace(uploads, row_weights=torch.ones_like(uploads.row_weights))
    found = SecureSum(12, False, STREAMS).add(ones, N_ITEMS, WIDTH, 0)
    assert found.row_weights.tolist() == add_uploads(ones, N_ITEMS).row_weights.tolist()


@pytest.mark.parametrize("simulate", [False, True])
@pytest.mark.parametrize("where", ["rows", "row_weights", "numbers", "weights"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.0**40])
def test_clients_whose_numbers_do_not_fit_leave_and_their_masks_are_taken_off(
    simulate, where, value
):
    uploads = random_uploads()
    place = uploads.row_clients == 4 if where.startswith("row") else torch.arange(12) == 4
    values = getattr(uploads, where).clone()
    values[place] = value
    broken = replace(uploads, **{where: values})
    others = uploads.of(torch.arange(12) != 4)
    sums, n_rejected = Uplink(secure_sum=SecureSum(32, simulate, STREAMS)).receive(
        broken, torch.zeros(12, WIDTH), torch.zeros(N_ITEMS, WIDTH), 0
    )
    assert n_rejected == 1
    assert sums.clients.tolist() == others.clients.tolist()
    expected = add_uploads(others, N_ITEMS)
    torch.testing.assert_close(sums.rows, expected.rows, rtol=0, atol=1e-5)
    torch.testing.assert_close(sums.numbers, expected.numbers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("simulate", [False, True])
def test_a_round_ends_if_too_many_leave(simulate):
    secure = SecureSum(32, simulate, STREAMS)
    uploads = random_uploads()
    for n_left, error in ((8, None), (7, TooFewClientsError), (0, NoUsableUploadError)):
        numbers = uploads.numbers.clone()
        numbers[n_left:] = torch.nan
        broken = replace(uploads, numbers=numbers)
        if error is None:
            assert len(secure.add(broken, N_ITEMS, WIDTH, 0).clients) == n_left
            continue
        with pytest.raises(error):
            secure.add(broken, N_ITEMS, WIDTH, 0)


def test_the_sum_of_one_is_no_secret():
    one = random_uploads().of(torch.arange(12) == 3)
    with pytest.raises(ValueError, match="Round 8 has a single client"):
        SecureSum(32, False, STREAMS).add(one, N_ITEMS, WIDTH, 7)


def test_bytes_are_those_of_the_messages():
    uploads = random_uploads()
    found = SecureSum(16, False, STREAMS).add(uploads, N_ITEMS, WIDTH, 0)
    n = len(uploads.clients)
    # The table with its weights, four numbers and their weight; 64 counts for each of four parts.
    masked_values = (N_ITEMS * (WIDTH + 1) + 4 + 1) * 2 + 4 * 64 * 2
    keys, shares, unmasking = 2 * 32, (n - 1) * (2 * 32 + 16), n * 32
    assert found.bytes_up == n * (2 * (keys + shares + unmasking) + masked_values)
    assert found.bytes_down == n * 2 * ((n - 1) * keys + shares + n * 4)


def test_who_vanishes_sends_no_input_and_no_shares():
    everybody, fewer = protocol_bytes(9, 9, 100, 32), protocol_bytes(9, 7, 100, 32)
    assert everybody[0] - fewer[0] == 2 * (400 + 9 * 32)
    assert everybody[1] - fewer[1] == 4 * (81 - 49)


def test_two_thirds_have_to_stay():
    for n_clients in range(2, 200):
        needed = threshold(n_clients)
        assert 3 * needed >= 2 * n_clients > 3 * (needed - 1)
