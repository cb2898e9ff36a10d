"""What a seed gives on a CPU: the same bits again, and the same numbers however work is cut up.

Runs in one process are compared in test_contract.py, several processes in test_processes.py; here
are another process, another number of threads and other chunks, for every kind of training.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone

from fedrecsk import (
    CentralizedRecommender,
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.engine import shards
from tests.estimators.conftest import FAST_TEXT, tiny_encoder

ROOT = Path(__file__).parents[2]
# Largest difference, in units of an array's largest number.
TOLERANCE = 1e-5
# After several rounds of networks; see docs/reliability.md.
KINKED = 1e-4
CHUNK = 300

# Large enough for torch to share the work out, and with items that nobody of the first round has.
ROWS = make_interactions(240, 200, mean_interactions=24, random_state=0, return_X_y=True)[0][:, :2]
FACTORS = {"n_factors": 8, "n_rounds": 3, "random_state": 0, "device": "cpu"}
SIZES = {
    "sizes": (4, 8),
    "group_ratio": (1, 1),
    "clients_per_round": 0.3,
    "n_rounds": 3,
    "random_state": 0,
    "device": "cpu",
}
LINEAR = {
    "fedavg-bce": FedAvgRecommender(**FACTORS),
    "fedavg-whole-data": FedAvgRecommender(**FACTORS, objective="whole-data"),
    "fedfnn-whole-data": FedFNNRecommender(**FACTORS),
    "fedfnn-predicted": FedFNNRecommender(**FACTORS, refit=False),
    "fedfnn-bce": FedFNNRecommender(**FACTORS, objective="bce"),
    "fedfast": FedFastRecommender(**FACTORS),
    "hetefedrec-mf": HeteFedRecRecommender("mf", **SIZES),
    "hetefedrec-mf-dual-task": HeteFedRecRecommender("mf", **SIZES, dual_task=True),
    "centralized-whole-data": CentralizedRecommender(**FACTORS),
    "centralized-bce": CentralizedRecommender(**FACTORS, objective="bce"),
}
NETWORKS = {
    "fedavg-ncf": FedAvgRecommender("ncf", **FACTORS, refit=False),
    "fedavg-lightgcn": FedAvgRecommender("lightgcn", **FACTORS, refit=False),
    "hetefedrec-ncf": HeteFedRecRecommender("ncf", **SIZES, refit=False),
    "centralized-ncf": CentralizedRecommender("ncf", **FACTORS),
}
TEXTS = {
    "fellrec": FELLRecRecommender(
        tiny_encoder, **FAST_TEXT | {"n_rounds": 1, "n_platforms": None, "device": "cpu"}
    )
}
ALL = LINEAR | NETWORKS | TEXTS


def arrays_of(name, **changes):
    """Fit an estimator; give all numbers that the fit leaves, but the seconds."""
    estimator = clone(ALL[name]).set_params(**changes)
    X = ROWS[ROWS[:, 0] < 60] if name in TEXTS else ROWS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*item_text|.*titles|.*texts")
        estimator.fit(X, X[:, 0] % 3 if name in TEXTS else None)
    found = {key: value for key, value in vars(estimator).items() if isinstance(value, np.ndarray)}
    for key, value in getattr(estimator, "adapters_", {}).items():
        found[f"adapters_ {key}"] = value
    for key in ("loss", "clients", "bytes_up", "bytes_down"):
        found[f"history_ {key}"] = np.array([record[key] for record in estimator.history_])
    found["predict"] = estimator.predict(X)
    return {key: value for key, value in found.items() if value.dtype != object}


def save_all(path):
    """Leave the arrays of all fits in a file."""
    torch.set_num_threads(1)
    fits = {name: arrays_of(name) for name in ALL}
    np.savez(path, **{f"{name} / {key}": v for name, fit in fits.items() for key, v in fit.items()})


@pytest.fixture(scope="module")
def expected():
    """The arrays of every fit, on one thread and in chunks of the usual size; fitted once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: arrays_of(name) for name in ALL}
    torch.set_num_threads(before)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype.kind == "f":
            largest = max(1e-6, np.abs(value).max(initial=0.0))
            np.testing.assert_allclose(
                found[name] / largest, value / largest, rtol=0, atol=tolerance, err_msg=name
            )
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_another_process_gives_the_same_bits(expected, tmp_path):
    """With other hashes of strings, and other places in memory."""
    script = (
        "import sys; from tests.estimators.test_reproducible import save_all as f; f(sys.argv[1])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "arrays.npz"],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = dict(np.load(tmp_path / "arrays.npz"))
    wanted = {f"{name} / {key}": v for name, fit in expected.items() for key, v in fit.items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)


# Few steps: each waits for all threads, on a machine that may be busy.
BRIEF = {"n_rounds": 1, "local_epochs": 1, "batch_size": None}


@pytest.mark.threads
@pytest.mark.parametrize("name", ALL)
def test_two_threads_give_the_numbers_of_one(name):
    changes = {key: BRIEF[key] for key in BRIEF.keys() & ALL[name].get_params().keys()}
    if name in TEXTS:
        del changes["batch_size"]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(arrays_of(name, **changes))
    assert_close(*found, TOLERANCE)


@pytest.mark.parametrize("name", LINEAR)
def test_small_chunks_give_the_numbers_of_large_ones(name, expected, monkeypatch):
    monkeypatch.setattr(shards, "CPU_CHUNK_ROWS", CHUNK)
    assert_close(arrays_of(name), expected[name], TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_small_chunks_move_networks_by_no_more_than_kinks_do(name, expected, monkeypatch):
    """A unit within rounding of zero is on in one fit and off in the other: not in one round."""
    whole = arrays_of(name, n_rounds=1)
    monkeypatch.setattr(shards, "CPU_CHUNK_ROWS", CHUNK)
    assert_close(arrays_of(name, n_rounds=1), whole, TOLERANCE)
    assert_close(arrays_of(name), expected[name], KINKED)


def test_users_that_are_fitted_to_a_network_hardly_ever_meet_a_kink(monkeypatch):
    """Twenty steps of Adam after a kink lead a user elsewhere: one or two in hundreds."""
    whole = arrays_of("fedavg-ncf", refit=True)
    monkeypatch.setattr(shards, "CPU_CHUNK_ROWS", CHUNK)
    parts = arrays_of("fedavg-ncf", refit=True)
    apart = np.abs(parts["user_factors_"] - whole["user_factors_"]).max(axis=1)
    assert np.mean(apart > TOLERANCE * np.abs(whole["user_factors_"]).max()) <= 0.02
    for name in ("item_factors_", "item_bias_", "network_"):
        assert_close({name: parts[name]}, {name: whole[name]}, KINKED)
