"""A search over the workers of dask and of ray finds what a serial one finds.

Each scheduler is started once, on loopback, and runs one search: most of the time goes by while
the workers import torch. So that one search is asked everything.
"""

import os
import pickle
import secrets
import shutil
import tempfile
from contextlib import suppress

import joblib
import numpy as np
import psutil
import pytest
import torch
from sklearn.base import clone
from sklearn.callback import ProgressBar
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from fedrecsk import FedFNNRecommender
from fedrecsk.datasets import make_interactions
from fedrecsk.model_selection import PerUserHoldout

X, CLIENTS = make_interactions(60, 40, n_clients=10, random_state=0, return_X_y=True)
N_ROUNDS = 2


def make_search():
    """A search whose candidates stop early by a callback, and whose scorer says where it runs.

    Both are local, so they travel by value, as what is written in a notebook does.
    """

    class StopEarly:
        def setup(self, estimator, context):
            pass

        def teardown(self, estimator, context):
            pass

        def on_fit_task_begin(self, estimator, context):
            pass

        def on_fit_task_end(self, estimator, context):
            return context.task_name == "round" and context.task_id == N_ROUNDS - 1

    def score_and_place(estimator, X, client_ids):
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {
            "ndcg": estimator.score(X, client_ids),
            "rounds": getattr(estimator, "n_rounds_", 0),
            "process": os.getpid(),
            "threads": torch.get_num_threads(),
            "gpu": int(gpu) if gpu else -1,
        }

    model = FedFNNRecommender(4, n_rounds=N_ROUNDS + 3, random_state=0, device="cpu")
    return GridSearchCV(
        model.set_callbacks(StopEarly()),
        {"l2": [0.05, 0.2], "l2_exponent": [0.5, 1.0]},
        scoring=score_and_place,
        refit="ndcg",
        cv=PerUserHoldout(n_splits=2, random_state=0),
    )


def of_fits(search, name):
    """What the scorer said in each fit, (candidates, splits)."""
    return np.column_stack([search.cv_results_[f"split{split}_test_{name}"] for split in range(2)])


def assert_same_search(search, serial):
    assert search.best_params_ == serial.best_params_
    assert search.cv_results_["params"] == serial.cv_results_["params"]
    ours, theirs = of_fits(search, "ndcg"), of_fits(serial, "ndcg")
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(ours)) == ours.size  # so that swapped candidates would be seen
    assert (of_fits(search, "rounds") == N_ROUNDS).all()
    np.testing.assert_array_equal(search.best_estimator_.predict(X), serial.predict(X))
    assert search.best_estimator_.n_rounds_ == N_ROUNDS


@pytest.fixture
def no_process_left(monkeypatch):
    """Demand that all processes that a test starts are gone, and end those that are not.

    They are known by what they inherit: children of a process that has ended are no one's.
    """
    monkeypatch.setenv("STARTED_BY", mark := secrets.token_hex())
    yield
    _, left = psutil.wait_procs(marked(mark), timeout=120)
    for each in left:
        each.kill()
    assert left == []


def marked(mark):
    """Processes with a mark in their environment."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            # Python's own tracker, one for all that is ever spawned, ends with this process.
            if each.environ().get("STARTED_BY") == mark and "resource_tracker" not in " ".join(
                each.cmdline()
            ):
                found.append(each)
    return found


@pytest.fixture
def no_thread_setting(monkeypatch):
    """Leave the number of threads to the schedulers."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def serial():
    return make_search().fit(X, CLIENTS)


def test_a_fitted_pipeline_travels_with_what_is_written_in_a_notebook():
    cloudpickle = pytest.importorskip("cloudpickle", reason="dask, which sends with it, is missing")
    model = make_search().estimator
    pipeline = make_pipeline(FunctionTransformer(lambda rows: rows[:, :2]), model).fit(X, CLIENTS)
    sent = cloudpickle.dumps(pipeline)
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"local|lambda"):
        pickle.dumps(pipeline)
    opened = pickle.loads(sent)
    np.testing.assert_array_equal(opened.predict(X), pipeline.predict(X))
    assert opened[-1].n_rounds_ == N_ROUNDS
    # The callback is there as well, and the fit is the same as on the sender's side.
    again = clone(opened).fit(X, CLIENTS)
    assert again[-1].n_rounds_ == N_ROUNDS
    np.testing.assert_array_equal(again.predict(X), pipeline.predict(X))


@pytest.mark.usefixtures("no_process_left", "no_thread_setting")
def test_dask(serial, tmp_path, capsys):
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    with (
        distributed.LocalCluster(
            host="127.0.0.1",
            processes=True,
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=tmp_path,
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        search = make_search().set_callbacks(ProgressBar()).fit(X, CLIENTS)
    assert_same_search(search, serial)
    assert os.getpid() not in of_fits(search, "process")
    assert (of_fits(search, "threads") == 1).all()
    assert "100%" in capsys.readouterr().out


@pytest.mark.usefixtures("no_process_left", "no_thread_setting")
def test_ray(serial, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.util.joblib import register_ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # no network
    # Else ray writes a token for its ports into the home directory.
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # Ray puts a pool of its own under joblib's, and leaves it there.
    pool = joblib.pool.PicklingPool.__bases__
    folder = tempfile.mkdtemp(prefix="ray")  # tmp_path is too long for the sockets in it
    register_ray()
    try:
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=2,  # ray counts them, and nothing here uses them
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        with joblib.parallel_config("ray", n_jobs=2, ray_remote_args={"num_gpus": 1}):
            search = make_search().fit(X, CLIENTS)
    finally:
        ray.shutdown()
        joblib.pool.PicklingPool.__bases__ = pool
        shutil.rmtree(folder, ignore_errors=True)
    assert_same_search(search, serial)
    processes, gpus = of_fits(search, "process"), of_fits(search, "gpu")
    assert os.getpid() not in processes
    assert (of_fits(search, "threads") == 1).all()
    # One GPU a process, and another one for each.
    pairs = set(zip(processes.ravel(), gpus.ravel(), strict=True))
    assert sorted(gpu for _, gpu in pairs) == [0, 1]
    assert len({process for process, _ in pairs}) == 2
