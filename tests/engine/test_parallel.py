"""Shares, sums and failures of several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed

from fedrecsk.engine import parallel
from fedrecsk.engine.device import resolve_device
from fedrecsk.engine.parallel import add_up, anywhere, deal, fill_rows, of_main, ranks, shares

LAUNCHED = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}

# Three processes, forked so that the imports are paid for once, and what they do together. Each
# prints what it found as one line of JSON into a file of its own.
PROGRAM = """
import json, os, signal, sys, time
import numpy as np, torch
from fedrecsk import FedFNNRecommender
from fedrecsk.engine import parallel
from fedrecsk.engine.parallel import (
    add_up, alone, anywhere, fill_rows, is_main, of_main, own_part, ranks, shares, together)

processes = []
for rank in range(3):
    processes.append(os.fork())
    if not processes[-1]:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
        sys.stdout, found = open(f"{sys.argv[1]}/{rank}.json", "w"), {}
        break
else:
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in processes]))
    sys.exit()

def caught(work, *kinds):
    began = time.perf_counter()
    try:
        work()
    except kinds as error:
        return [type(error).__name__, str(error), time.perf_counter() - began]

found["outside"] = [ranks().rank, ranks().size, is_main()]
with together(lambda: {"data": "same"}):
    found["inside"] = [ranks().rank, ranks().size]
    with alone():
        with together(lambda: {"data": str(rank)}):
            found["alone"] = [ranks().rank, ranks().size, is_main()]
    # Only the order 0, 1, 2 gives 0 in single precision: (1e8 + 1) - 1e8.
    summand = torch.tensor([1e8, 1.0, -1e8])[rank]
    table = torch.arange(7.0) * 10**rank
    parallel.PIECE = 3  # several exchanges for one tensor
    found["sums"] = [t.tolist() for t in add_up(summand, table, torch.tensor([[rank]]))]
    parts = shares(np.array([3, 5]), np.array([1, 9]))
    found["parts"] = [part.tolist() for part in parts]
    rows = torch.full((6, 2), -1.0)
    rows[own_part(parts)] = 1.0 + rank
    found["rows"] = fill_rows(rows, parts)[:, 1].tolist()
    pairs = torch.full((12,), -1)
    pairs_of = lambda part: np.concatenate([2 * part, 2 * part + 1])
    pairs[pairs_of(own_part(parts))] = rank
    found["pairs"] = fill_rows(pairs, parts, pairs_of).tolist()
    found["of_main"] = of_main(2**31 - 1 + rank)
    found["anywhere"] = [anywhere(rank == 2), anywhere(False)]

def other_data():
    with together(lambda: {"parameters": "same", "data": "b" if rank == 1 else "a"}):
        pass
found["other"] = caught(other_data, ValueError)

def same_error():
    with together(lambda: {"data": "same"}):
        add_up(torch.ones(1))
        raise FloatingPointError("diverged")
found["same_error"] = caught(same_error, FloatingPointError)
with together(lambda: {"data": "same"}):  # an error that all had alike leaves nothing behind
    found["again"] = add_up(torch.ones(1))[0].tolist()

def one_fails():
    with together(lambda: {"data": "same"}):
        if rank == 1:
            raise KeyError("only here")
        add_up(torch.ones(1))
found["one_fails"] = caught(one_fails, KeyError, RuntimeError)
if rank != 1:
    found["afterwards"] = caught(other_data, RuntimeError)

parallel._connection.lost = False  # as if started anew
os.environ["FEDRECSK_TIMEOUT"] = "0.5"
def one_hangs():
    with together(lambda: {"data": "same"}):
        if rank == 1:
            time.sleep(2)
        add_up(torch.ones(1))
found["one_hangs"] = caught(one_hangs, RuntimeError)

parallel._connection.lost = False
os.environ["FEDRECSK_TIMEOUT"] = "60"

class DieInTheSecondRound:
    n_rounds = 0
    def setup(self, estimator, context): pass
    def teardown(self, estimator, context): pass
    def on_fit_task_begin(self, estimator, context): pass
    def on_fit_task_end(self, estimator, context):
        self.n_rounds += context.task_name == "round"
        found["rounds"] = self.n_rounds
        if rank == 1 and self.n_rounds == 2:
            os.kill(os.getpid(), signal.SIGKILL)

two_clients = [[user, item] for user in range(2) for item in range(user, 3)]
model = FedFNNRecommender(2, clients_per_round=1.0).fit(two_clients)
found["clients"] = [model.client_ids_.tolist(), model.user_factors_.tolist()]
model.set_callbacks(DieInTheSecondRound())
if rank == 1:
    print(json.dumps(found), flush=True)
found["one_dies"] = caught(lambda: model.fit(two_clients), RuntimeError)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        cwd=Path(__file__).parents[2],
        env=os.environ | address | {"OMP_NUM_THREADS": "1", "FEDRECSK_TIMEOUT": "60"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.stdout.strip() == json.dumps([0, -signal.SIGKILL, 0]), ended.stderr
    return [json.loads((folder / f"{rank}.json").read_text().splitlines()[-1]) for rank in range(3)]


def test_processes_know_who_they_are_inside_of_a_fit_only(three):
    for rank, found in enumerate(three):
        assert found["outside"] == [0, 1, rank == 0]
        assert found["inside"] == [rank, 3]
        assert found["alone"] == [0, 1, rank == 0]


def test_sums_are_added_in_the_order_of_ranks(three):
    for found in three:
        assert found["sums"] == [0.0, [111.0 * n for n in range(7)], [[3]]]


def test_rows_of_others_are_filled_in_also_where_one_has_none(three):
    for found in three:
        assert found["parts"] == [[5], [3], []]
        assert found["rows"] == [-1.0, -1.0, -1.0, 2.0, -1.0, 1.0]
        assert found["pairs"] == [-1] * 6 + [1, 1, -1, -1, 0, 0]


def test_the_first_process_decides_and_any_may_stop(three):
    for found in three:
        assert found["of_main"] == 2**31 - 1
        assert found["anywhere"] == [True, False]


def test_other_data_are_refused_everywhere(three):
    for found in three:
        kind, message, _ = found["other"]
        assert kind == "ValueError"
        assert "the same data; that of process 1 is not that of process 0" in message


def test_an_error_of_all_processes_ends_the_fit_but_not_the_program(three):
    for found in three:
        assert found["same_error"][:2] == ["FloatingPointError", "diverged"]
        assert found["again"] == [3.0]


def test_an_error_of_one_process_ends_the_fit_in_all(three):
    assert three[1]["one_fails"][0] == "KeyError"
    for rank in (0, 2):
        kind, message, seconds = three[rank]["one_fails"]
        assert kind == "RuntimeError"
        assert f"Process {rank} of 3 has lost another one" in message
        assert seconds < 20  # of the 60 that it would have waited
        assert "Start all processes anew" in three[rank]["afterwards"][1]


def test_a_process_that_does_not_answer_ends_the_fit_in_time(three):
    for rank in (0, 2):
        kind, message, seconds = three[rank]["one_hangs"]
        assert kind == "RuntimeError"
        assert "within 0.5 s" in message
        assert "FEDRECSK_TIMEOUT" in message
        assert seconds < 1.5
    assert three[1]["one_hangs"][0] == "RuntimeError"  # and it does not go on by itself


def test_more_processes_than_clients_fit_the_same_model(three):
    ids, factors = three[0]["clients"]
    assert ids == [0, 1]
    assert np.abs(factors).max() > 0.1
    assert three[1]["clients"] == three[2]["clients"] == three[0]["clients"]  # whatever the seed


def test_a_process_that_dies_ends_the_fit_in_all(three):
    for rank in (0, 2):
        kind, message, seconds = three[rank]["one_dies"]
        assert kind == "RuntimeError"
        assert f"Process {rank} of 3 has lost another one" in message
        assert three[rank]["rounds"] == 2
        assert seconds < 20  # of the 60 that it would have waited


# One process ------------------------------------------------------------------------------------


def test_in_one_process_nothing_is_touched():
    clients, table = np.array([3, 1]), torch.arange(4.0)
    with parallel.together(lambda: pytest.fail("nobody to compare with")):
        assert ranks() == parallel.ALONE
        (part,) = shares(clients, np.array([1, 2]))
        assert part is clients
        assert parallel.own_part([part]) is clients
        assert add_up(table, table)[1] is table
        assert fill_rows(table, [part]) is table
        assert of_main(0.5) == 0.5
        assert anywhere(True)
        assert not anywhere(False)


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
def test_clients_are_dealt_evenly(n_parts):
    sizes = np.random.default_rng(0).pareto(1.2, 200).astype(np.int64)
    owner = deal(sizes, n_parts)
    loads = np.bincount(owner, sizes + 1, n_parts)
    assert loads.max() - loads.min() <= sizes.max() + 1
    np.testing.assert_array_equal(owner, deal(sizes, n_parts))


def test_clients_without_rows_are_dealt_out_too():
    assert sorted(deal(np.zeros(6, dtype=np.int64), 3).tolist()) == [0, 0, 1, 1, 2, 2]
    assert deal(np.zeros(0, dtype=np.int64), 3).tolist() == []


# Who is a rank ----------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Pretend that a launcher has started this process as the second of two."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "_rank_process", os.getpid())


def test_a_launched_process_is_a_rank(launched):
    assert parallel._is_rank()
    assert not parallel.is_main()


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "WORLD_SIZE"])
def test_variables_of_something_else_do_not_make_a_rank(launched, monkeypatch, missing):
    monkeypatch.delenv(missing)
    assert not parallel._is_rank()
    assert parallel.is_main()


def test_workers_of_joblib_are_no_ranks(launched):
    inside = Parallel(2, backend="threading")(delayed(parallel._is_rank)() for _ in range(2))
    assert inside == [False, False]
    assert Parallel(1)([delayed(parallel._is_rank)()]) == [True]


def test_a_fork_of_a_rank_is_none(launched, monkeypatch):
    monkeypatch.setattr(parallel, "_rank_process", os.getpid() + 1)
    assert not parallel._is_rank()


def test_two_threads_cannot_share_fits_at_the_same_time(launched, monkeypatch):
    monkeypatch.setattr(parallel._Connection, "open", lambda self: None)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 1)
    errors = []

    def second():
        try:
            with parallel.together(dict):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with parallel.together(dict):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "alone()" in errors[0]
    with parallel.together(dict):  # and the first one has given its place back
        pass


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "inf"])
def test_a_timeout_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(parallel.TIMEOUT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"FEDRECSK_TIMEOUT must be a number.*{text!r}"):
        parallel._timeout()


def test_every_process_of_a_machine_takes_a_gpu(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device("auto") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda:0")
