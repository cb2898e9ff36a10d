import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fedrecsk.data.interactions import encode, read_columns
from fedrecsk.datasets import make_interactions
from fedrecsk.engine.shards import ClientShards
from fedrecsk.models import sampled_bce

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
try:
    common, gpu_rounds = map(importlib.import_module, ("_common", "gpu_rounds"))
finally:
    sys.path.pop(0)

KINDS = pytest.mark.parametrize("kind", list(gpu_rounds.KINDS))
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="here the numbers are measured")


@pytest.fixture(scope="module")
def made():
    return make_interactions(40, 30, 2, mean_interactions=9, random_state=0)


@pytest.fixture(scope="module")
def data(made):
    return encode(read_columns(made.data), made.target)


@ON_CPU
def test_a_dry_run_measures_no_goal_and_writes_only_where_told(made, tmp_path, monkeypatch, capsys):
    tiny = common.Data("tiny", made.data, made.target)
    monkeypatch.setattr(gpu_rounds, "like_ml_1m", lambda arguments: [tiny])
    default = tmp_path / "gpu_rounds.json"
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_rounds, "RESULTS", tmp_path)
    assert gpu_rounds.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert not default.exists()
    assert "dry run" in printed
    goals = [line for line in printed.splitlines() if line.startswith("goal: ")]
    assert len(goals) == 4 * len(gpu_rounds.KINDS)
    assert all("not measured: no GPU" in goal for goal in goals)
    out = tmp_path / "elsewhere.json"
    assert gpu_rounds.main(["--quick", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["goals"] == []
    assert set(written["data"]["tiny"]["kinds"]) == set(gpu_rounds.KINDS)


def test_goals_compare_the_device_with_its_memory_and_one_thread():
    result = {
        "milliseconds": [2.0, 1.0, 3.0],
        "cpu_milliseconds": [100.0],
        "times_floor": 4.0,
        "difference": 1e-6,
        "waits": {"a.py:1: values, basis = torch.linalg.eigh(gram)": 3, "a.py:2: float(loss)": 3},
    }
    floor, faster, same, waits = gpu_rounds.goals_of("ml", {"bce": result})
    assert (floor.value, faster.value, same.value, waits.value) == (4.0, 50.0, 1e-6, 1.0)
    assert [goal.held for goal in (floor, faster, same, waits)] == [False, False, True, False]


@KINDS
def test_rounds_train_and_agree_with_themselves(kind, data):
    rounds = gpu_rounds.Rounds(data, kind, gpu_rounds.CPU)
    before = rounds.state.item_table.clone()
    rounds.one_more()
    assert rounds.t == 1
    assert not torch.equal(rounds.state.item_table, before)
    assert gpu_rounds.largest_difference(data, kind, gpu_rounds.CPU) == 0.0


def test_bytes_count_every_private_row_that_training_makes(data):
    shards = ClientShards.from_codes(
        data.user, data.item, data.user_client, data.n_clients, data.n_items
    )
    examples = sampled_bce.draw_examples(
        shards.cohort(np.arange(data.n_clients)), data.n_items,
        n_negatives=gpu_rounds.N_NEGATIVES, batch_size=None, key=1,
    )  # fmt: skip
    n_rows = int(examples.valid.sum())
    assert n_rows < 5 * len(data)  # some have too few unseen items
    moved = gpu_rounds.bytes_of_round(data, "bce, full batch")
    assert moved["draw examples"] == 8 * n_rows
    assert moved["local epochs"] == 2 * 32 * 4 * n_rows
    assert gpu_rounds.bytes_of_round(data, "whole-data")["read rows"] == 2 * 32 * 4 * len(data)


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(gpu_rounds, "timed", lambda *args, **kwargs: [2.0, 0.5])
    assert gpu_rounds.bandwidth(gpu_rounds.CPU, 4_000) == 2 * 4_000 / 0.5


def test_lines_that_wait_are_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found = Counter()
    with gpu_rounds.waits_seen(found):
        for _ in range(2):
            gpu_rounds.warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        gpu_rounds.warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", 0]
    assert list(found.values()) == [2]
    assert "warnings.warn(" in next(iter(found))
