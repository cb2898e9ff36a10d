"""Rounds of clients of several sizes whose uploads pass through an uplink."""

import numpy as np
import pytest
import torch

from fedrecsk.engine.attacks import Attack
from fedrecsk.engine.compression import Compression
from fedrecsk.engine.defences import Defence
from fedrecsk.engine.secure_sum import N_BOUNDS, SecureSum, protocol_bytes
from fedrecsk.engine.uplink import Uplink
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.models import ncf, whole_data
from tests.methods.test_hetefedrec import (
    DUAL,
    FEDERATIONS,
    SINGLE,
    STEPS,
    STREAMS,
    sizes_for,
    tensors_of,
)

AGGREGATIONS = pytest.mark.parametrize("aggregation", ["padded", "clustered"])


def assert_close(found, expected, leave_out=(), tolerance=1e-5):
    assert tensors_of(found).keys() == tensors_of(expected).keys()
    for name, value in tensors_of(found).items():
        if name not in leave_out:
            torch.testing.assert_close(
                value, tensors_of(expected)[name], rtol=tolerance, atol=tolerance, msg=name
            )


@FEDERATIONS
@STEPS
@DUAL
@AGGREGATIONS
def test_an_uplink_that_does_nothing_changes_nothing(shards, begin, step, dual_task, aggregation):
    # Everybody: the columns of a federation of two users are barely determined.
    everybody = np.arange(shards.n_clients)
    arguments = {"dual_task": dual_task, "aggregation": aggregation, "participants": everybody}
    expected, logs = step(begin(shards, aggregation=aggregation), shards, 3, **arguments)
    for uplink in (Uplink(), Uplink(defence=Defence("clip", 0.1, 1.0))):
        found, more = step(
            begin(shards, aggregation=aggregation), shards, 3, **arguments, uplink=uplink
        )
        assert_close(found, expected)
        assert more == pytest.approx(logs, rel=1e-5)
    assert logs["rejected"] == 0


@FEDERATIONS
@STEPS
def test_clients_that_send_what_is_not_a_number_are_as_if_not_asked(shards, begin, step):
    asked = np.arange(shards.n_clients)  # few users would barely determine the widest columns
    malicious = np.isin(asked, asked[:2])
    uplink = Uplink(Attack("nan", malicious, 1.0, 0, STREAMS))
    found, logs = step(begin(shards), shards, 3, participants=asked, dual_task=False, uplink=uplink)
    expected, _ = step(begin(shards), shards, 3, participants=asked[2:], dual_task=False)
    assert logs["rejected"] == 2
    # They keep what they have learned themselves.
    assert_close(found, expected, leave_out={"users", "turns"})


def broken(monkeypatch, users):
    """Let the vectors of some users be no numbers after training."""
    solve, train = whole_data.solve_users, ncf.train

    def solved(cohort, *arguments, **named):
        found = solve(cohort, *arguments, **named)
        found[torch.isin(cohort.users, torch.from_numpy(users))] = torch.nan
        return found

    def trained(cohort, *arguments, **named):
        result, heads = train(cohort, *arguments, **named)
        result.user_vectors[torch.isin(cohort.users, torch.from_numpy(users))] = torch.nan
        return result, heads

    monkeypatch.setattr(whole_data, "solve_users", solved)
    monkeypatch.setattr(ncf, "train", trained)


@pytest.mark.parametrize("uplink", [None, Uplink()], ids=["plain", "uplink"])
@FEDERATIONS
@STEPS
def test_broken_clients_are_left_out_and_counted(shards, begin, step, uplink, monkeypatch):
    asked = np.arange(shards.n_clients)
    users = shards.users_of(asked[:2])
    expected, _ = step(begin(shards), shards, 3, participants=asked[2:], dual_task=False)
    broken(monkeypatch, users)
    found, logs = step(begin(shards), shards, 3, participants=asked, dual_task=False, uplink=uplink)
    assert logs["rejected"] == 2
    assert_close(found, expected, leave_out={"turns"})


@pytest.mark.parametrize("uplink", [None, Uplink()], ids=["plain", "uplink"])
@STEPS
def test_a_round_without_a_usable_upload_says_so(begin, step, uplink, monkeypatch):
    broken(monkeypatch, np.arange(SINGLE.n_users))
    with pytest.raises(NoUsableUploadError, match="round 4: the uploads of all 6 clients"):
        step(begin(SINGLE), SINGLE, 3, dual_task=False, uplink=uplink)


@STEPS
@pytest.mark.parametrize("size", [0, 2])
def test_a_size_of_which_nothing_is_left_does_not_end_the_fit(begin, step, size):
    """The clients of other sizes are heard, and those of this one are counted."""
    asked = np.arange(SINGLE.n_clients)
    alone = sizes_for(SINGLE).members(asked, size)
    uplink = Uplink(Attack("nan", np.isin(asked, alone), 1.0, 0, STREAMS))
    found, logs = step(begin(SINGLE), SINGLE, 3, participants=asked, dual_task=False, uplink=uplink)
    others = np.setdiff1d(asked, alone)
    expected, _ = step(begin(SINGLE), SINGLE, 3, participants=others, dual_task=False)
    assert logs["rejected"] == len(alone) > 0
    assert_close(found, expected, leave_out={"users", "turns"})


@FEDERATIONS
@STEPS
@DUAL
@AGGREGATIONS
def test_secure_sums_are_the_plain_ones(shards, begin, step, dual_task, aggregation):
    everybody = np.arange(shards.n_clients)
    arguments = {"dual_task": dual_task, "aggregation": aggregation, "participants": everybody}
    expected, logs = step(begin(shards, aggregation=aggregation), shards, 3, **arguments)
    uplink = Uplink(secure_sum=SecureSum(32, simulate=False, streams=STREAMS))
    found, more = step(
        begin(shards, aggregation=aggregation), shards, 3, **arguments, uplink=uplink
    )
    # Sums are exact to a millionth of a bound, which columns of few users amplify.
    assert_close(found, expected, tolerance=2e-4)
    assert more["bytes_up"] > logs["bytes_up"]
    assert more["bytes_down"] > logs["bytes_down"]


@FEDERATIONS
@STEPS
@DUAL
def test_bytes_of_secure_sums_follow_from_the_clients_of_each_size(shards, begin, step, dual_task):
    """As many protocols a size as it has uploads: of networks one, of exact rounds one a task."""
    everybody, sizes = np.arange(shards.n_clients), sizes_for(shards)
    uplink = Uplink(secure_sum=SecureSum(32, simulate=False, streams=STREAMS))
    plain, logs = (
        step(begin(shards), shards, 3, participants=everybody, dual_task=dual_task, uplink=each)[1]
        for each in (None, uplink)
    )
    network = step.__name__ == "network"
    up = down = 0
    for x, width in enumerate(sizes.widths):
        n = len(sizes.members(everybody, x))
        for y in range(0 if dual_task and not network else x, x + 1):
            if network:
                columns, extra = width + 1, 0
                numbers = sum(
                    sum(value.numel() for value in head.values())
                    for head in begin(shards).heads[0 if dual_task else x : x + 1]
                )
            else:
                columns, extra, numbers = sizes.widths[y], y + 2, sizes.widths[y] ** 2
            n_values = shards.n_items * (columns + extra + 1) + numbers + 1
            n_parts = 1 + extra + 1 + 2
            for values in (n_parts * N_BOUNDS, n_values):
                more = protocol_bytes(n, n, values, 32)
                up, down = up + more[0], down + more[1]
    assert logs["bytes_up"] == up
    assert logs["bytes_down"] == plain["bytes_down"] + down


@pytest.mark.parametrize("name", ["top-k", "quantised", "low-rank"])
@STEPS
@DUAL
def test_clients_of_each_size_keep_what_they_did_not_send(begin, step, dual_task, name):
    """Two rounds are those of one compression for each size, with a residual of its own."""
    everybody = np.arange(SINGLE.n_clients)
    level = {"top-k": 0.4, "quantised": 3, "low-rank": 1}[name]
    seen = []

    class Watched(Compression):
        def apply(self, uploads, residual, *arguments):
            sent, after, n_bytes = super().apply(uploads, residual, *arguments)
            seen.append((uploads, residual, after, n_bytes))
            return sent, after, n_bytes

    uplink = Uplink(compression=Watched(name, level, True, STREAMS))
    state, n_bytes = begin(SINGLE), []
    for t in range(2):
        state, logs = step(
            state, SINGLE, t, participants=everybody, dual_task=dual_task, uplink=uplink
        )
        n_bytes.append(logs["bytes_up"])
    half = len(seen) // 2
    for (first, before, after, _), (second, kept, _, _) in zip(
        seen[:half], seen[half:], strict=True
    ):
        assert first.clients.tolist() == second.clients.tolist()
        # Of the same clients; those of wider sizes have sent theirs to this one after them.
        for code in first.clients.astype(str):
            for ours, theirs in zip(after[code], kept[code], strict=True):
                assert ours.equal(theirs)
        assert before is None or not set(before) & set(first.clients.astype(str))
    assert n_bytes == [
        sum(each[3] for each in seen[:half]),
        sum(each[3] for each in seen[half:]),
    ]
