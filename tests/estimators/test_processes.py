"""Two processes that share a fit give the arrays of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedrecsk import FedFNNRecommender
from fedrecsk.data import encode
from fedrecsk.engine.parallel import Ranks
from fedrecsk.estimators import _base
from tests.estimators import shared_fits

ROOT = Path(__file__).parents[2]
# Largest difference between two processes and one, in units of an array's largest number.
TOLERANCE = 1e-5
# Adam divides gradients by their size, and follows those of nearly nothing as it does others.
ADAM_TOLERANCES = {"ncf": 1e-4, "fellrec": 1e-3, "ditto": 1e-3}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found that were started as docs/scale.md says, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    line = "-m torch.distributed.run --standalone --nproc_per_node=2 -m"
    ended = subprocess.run(
        [sys.executable, *line.split(), "tests.estimators.shared_fits", folder],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FEDRECSK_TIMEOUT": "60"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    ranks = [
        (dict(np.load(folder / f"{rank}.npz")), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(2)
    ]
    return ranks, ended.stdout


@pytest.fixture(scope="module")
def one():
    return shared_fits.fit_all()


@pytest.mark.parametrize("fit", shared_fits.FITS)
def test_two_processes_fit_as_one(one, two, fit):
    (first, _), (second, _) = two[0]
    assert first.keys() == second.keys() == one.keys()
    names = [name for name in one if name.startswith(f"{fit} / ")]
    assert len(names) > 10
    for name in names:
        np.testing.assert_array_equal(first[name], second[name], name, strict=True)
        if one[name].dtype.kind != "f":
            np.testing.assert_array_equal(first[name], one[name], name, strict=True)
            continue
        largest = max(1e-6, np.abs(one[name]).max(initial=0.0))
        bound = ADAM_TOLERANCES.get(fit, TOLERANCE)
        np.testing.assert_allclose(
            first[name] / largest, one[name] / largest, 0, bound, err_msg=name
        )


def test_without_a_seed_all_take_that_of_the_first(two):
    (_, first), (_, second) = two[0]
    assert first["unseeded"] == second["unseeded"]
    assert first["generator"] == second["generator"] != first["unseeded"]


def test_one_process_speaks_for_all(two):
    assert two[1].count("[FedFNNRecommender] round 1/2") == 2  # of two fits, in two processes


def test_a_callback_of_one_process_stops_all(two):
    assert [found["n_rounds"] for _, found in two[0]] == [2, 2]


@pytest.mark.parametrize(
    ("what", "called"), [("data", "interactions"), ("parameters", "parameters")]
)
def test_processes_with_different_input_are_refused(two, what, called):
    for _, found in two[0]:
        assert f"must be given the same {called}; that of process 1 is not" in found[what]


def test_a_fit_that_diverges_does_not_keep_the_next_from_fitting(one, two):
    for _, found in two[0]:
        assert "Training diverged" in found["diverged"]
        expected = one["whole-data / item_factors_"]
        np.testing.assert_allclose(found["afterwards"], expected, atol=TOLERANCE)


# In one process ---------------------------------------------------------------------------------


def marks_of(**changes):
    model = FedFNNRecommender(n_factors=4, **changes)
    return model._marks(encode([[0, 1], [1, 2]]), go_on=False)


def test_what_processes_must_be_given_alike():
    same = marks_of(random_state=0)
    assert marks_of(random_state=0, verbose=2, device="cpu", checkpoint="here") == same
    for changes in ({"random_state": 1}, {"random_state": 0, "l2": 0.5}):
        other = marks_of(**changes)
        assert {name for name in same if other[name] != same[name]} == {"parameters"}
    # One draws the seed for all; the generators are objects of their own in every process.
    drawn = [marks_of(random_state=np.random.RandomState(seed)) for seed in (0, 1)]
    assert drawn[0] == drawn[1]


def test_only_the_first_process_writes_checkpoints(monkeypatch, tmp_path):
    settings = {"n_factors": 4, "random_state": 0, "checkpoint": tmp_path}
    rows = [[user, item] for user in range(6) for item in range(user % 3, 6, 2)]
    monkeypatch.setattr(_base, "ranks", lambda: Ranks(1, 2))
    FedFNNRecommender(n_rounds=2, **settings).fit(rows)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(_base, "ranks", lambda: Ranks(0, 2))
    FedFNNRecommender(n_rounds=2, **settings).fit(rows)
    assert list(tmp_path.iterdir())
    monkeypatch.setattr(_base, "of_main", lambda n_rounds: 3)
    with pytest.raises(ValueError, match="has 2 rounds here and another number in process 0"):
        FedFNNRecommender(n_rounds=3, **settings).fit(rows)
