"""Rounds of clients of several sizes whose uploads pass through an uplink."""

import numpy as np
import pytest
import torch

from fedrecsk.engine.attacks import Attack
from fedrecsk.engine.defences import Defence
from fedrecsk.engine.uplink import Uplink
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.models import ncf, whole_data
from tests.methods.test_hetefedrec import (
    DUAL,
    FEDERATIONS,
    SINGLE,
    STEPS,
    STREAMS,
    tensors_of,
)

AGGREGATIONS = pytest.mark.parametrize("aggregation", ["padded", "clustered"])


def assert_close(found, expected, leave_out=()):
    assert tensors_of(found).keys() == tensors_of(expected).keys()
    for name, value in tensors_of(found).items():
        if name not in leave_out:
            torch.testing.assert_close(
                value, tensors_of(expected)[name], rtol=1e-5, atol=1e-5, msg=name
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
