"""Rounds whose uploads pass through an uplink, and rounds in which some clients are broken."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.engine.attacks import Attack
from fedrecsk.engine.defences import Defence
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.uplink import Uplink
from fedrecsk.exceptions import NoUsableUploadError
from fedrecsk.models import whole_data
from tests.methods.factor_rounds import (
    SHARED,
    SINGLE,
    STREAMS,
    assert_states_close,
    bce,
    delegates_of,
    exact,
    start,
)

# What a step is, and whether its start has a bias, a head and a plain server.
STEPS = {
    "mean": (bce, {}, {"item_bias": True}),
    "fedavg": (bce, {"item_weighting": "fedavg"}, {}),
    "magnitude, adam": (
        bce,
        {"item_weighting": "magnitude", "server_optimizer": Optimizer("adam", 0.05)},
        {"server": Optimizer("adam", 0.05)},
    ),
    "head": (bce, {"item_weighting": "fedavg"}, {"neural": True, "item_bias": True}),
    "newton": (bce, {"server_optimizer": None}, {"server": None, "item_bias": True}),
    "whole-data": (exact, {}, {}),
}
OF_SINGLE_USERS = {"newton"}
CASES = [
    pytest.param(name, shards, id=f"{name}, {kind}")
    for name in STEPS
    for kind, shards in (("single", SINGLE), ("shared", SHARED))
    if not (name in OF_SINGLE_USERS and kind == "shared")
]


def run(name, shards, state=None, **changes):
    step, arguments, beginning = STEPS[name]
    state = start(shards, **beginning) if state is None else state
    return step(state, shards, 3, **arguments, **changes)


@pytest.mark.parametrize(("name", "shards"), CASES)
@pytest.mark.parametrize("rows", [1, 65_536])
def test_an_uplink_that_does_nothing_changes_nothing(name, shards, rows, monkeypatch):
    expected, logs = run(name, shards)
    monkeypatch.setattr("fedrecsk.engine.shards.CPU_CHUNK_ROWS", rows)
    for uplink in (Uplink(), Uplink(defence=Defence("clip", 0.1, 1.0))):
        found, more = run(name, shards, uplink=uplink)
        assert_states_close(found, expected)
        assert more["loss"] == pytest.approx(logs["loss"], rel=1e-5)
        assert {n: more[n] for n in ("clients", "rejected", "bytes_up", "bytes_down")} == {
            n: logs[n] for n in ("clients", "rejected", "bytes_up", "bytes_down")
        }


def broken_start(name, shards, users):
    """Users whose vectors are too large to train from."""
    state = start(shards, **STEPS[name][2])
    factors = state.user_factors.clone()
    factors[users] = 1e30
    return replace(state, user_factors=factors)


@pytest.mark.parametrize("through", [None, Uplink()], ids=["plain", "uplink"])
@pytest.mark.parametrize(("name", "shards"), [c for c in CASES if "whole" not in c.values[0]])
def test_broken_clients_are_left_out_and_counted(name, shards, through, monkeypatch):
    broken = np.array(delegates_of(shards, 3)[:2])
    users = shards.users_of(broken)
    found, logs = run(name, shards, broken_start(name, shards, users), uplink=through)
    assert logs["rejected"] == 2
    assert np.isfinite(logs["loss"])
    # The same round of the others alone, as if nobody else had been asked.
    others = np.setdiff1d(delegates_of(shards, 3), broken)
    monkeypatch.setattr("tests.methods.factor_rounds.sampled", lambda *_: others)
    expected, _ = run(name, shards, broken_start(name, shards, users))
    assert_states_close(
        replace(found, times_sampled=expected.times_sampled, turns=expected.turns), expected
    )
    assert found.times_sampled[users].tolist() == [1] * len(users)


def unsolved(monkeypatch, users):
    """Let the equations of some users have no solution."""
    solve = whole_data.solve_users

    def fails(cohort, *arguments, **named):
        found = solve(cohort, *arguments, **named)
        found[torch.isin(cohort.users, torch.from_numpy(users))] = torch.nan
        return found

    monkeypatch.setattr(whole_data, "solve_users", fails)


@pytest.mark.parametrize("through", [None, Uplink()], ids=["plain", "uplink"])
@pytest.mark.parametrize("shards", [SINGLE, SHARED], ids=["single", "shared"])
def test_clients_that_cannot_be_solved_are_left_out_and_counted(shards, through, monkeypatch):
    broken = np.array(delegates_of(shards, 3)[:2])
    users = shards.users_of(broken)
    others = np.setdiff1d(delegates_of(shards, 3), broken)
    before = start(shards)
    with monkeypatch.context() as patch:
        patch.setattr("tests.methods.factor_rounds.sampled", lambda *_: others)
        expected, _ = run("whole-data", shards)
    unsolved(monkeypatch, users)
    found, logs = run("whole-data", shards, uplink=through)
    assert logs["rejected"] == 2
    assert torch.equal(found.user_factors[users], before.user_factors[users])
    assert_states_close(
        replace(found, times_sampled=expected.times_sampled, turns=expected.turns), expected
    )


@pytest.mark.parametrize("through", [None, Uplink()], ids=["plain", "uplink"])
@pytest.mark.parametrize("name", STEPS)
def test_a_round_without_a_usable_upload_says_so(name, through, monkeypatch):
    users = np.arange(SINGLE.n_users)
    unsolved(monkeypatch, users)
    with pytest.raises(NoUsableUploadError, match=r"round 4: the uploads of all 15 clients"):
        run(name, SINGLE, broken_start(name, SINGLE, users), uplink=through)


@pytest.mark.parametrize(("name", "shards"), CASES)
def test_clients_that_send_what_is_not_a_number_are_as_if_not_asked(name, shards, monkeypatch):
    liars = delegates_of(shards, 3)[::4]
    malicious = np.isin(np.arange(shards.n_clients), liars)
    uplink = Uplink(attack=Attack("nan", malicious, 1.0, 0, STREAMS))
    found, logs = run(name, shards, uplink=uplink)
    assert logs["rejected"] == len(liars)
    others = np.setdiff1d(delegates_of(shards, 3), liars)
    monkeypatch.setattr("tests.methods.factor_rounds.sampled", lambda *_: others)
    expected, _ = run(name, shards)
    for part in ("item_table", *(("head",) if expected.head else ())):
        ours, theirs = getattr(found, part), getattr(expected, part)
        for key in ours if isinstance(ours, dict) else [None]:
            pair = (ours, theirs) if key is None else (ours[key], theirs[key])
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("defence", ["clip", "median", "trimmed-mean", "multi-krum"])
@pytest.mark.parametrize("name", ["mean", "fedavg", "newton"])
def test_a_defence_keeps_the_table_near_that_of_honest_clients(name, defence):
    honest, _ = run(name, SINGLE)
    liars = np.isin(np.arange(SINGLE.n_clients), delegates_of(SINGLE, 3)[:1])
    attack = Attack("scale", liars, 40.0, 0, STREAMS)
    plain, _ = run(name, SINGLE, uplink=Uplink(attack))
    safe, _ = run(name, SINGLE, uplink=Uplink(attack, Defence(defence, 0.2, 0.8)))
    far, near = ((state.item_table - honest.item_table).norm() for state in (plain, safe))
    assert near < 0.7 * far
