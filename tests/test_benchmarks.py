import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator

from fedrecsk import FedFNNRecommender, PopularityRecommender
from fedrecsk.datasets import make_interactions
from fedrecsk.metrics import evaluate
from fedrecsk.models.text_vectors import TokenRows

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """Import a script of the benchmarks folder, which is no package, as Python runs it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


common, accuracy = script("_common"), script("accuracy")
cohort_speed, tables = script("cohort_speed"), script("tables")
curves, convergence_report = script("_curves"), script("_convergence_report")
convergence, sensitivity = script("fedfnn_convergence"), script("fedfnn_sensitivity")
sizes, sizes_report = script("hetefedrec_sizes"), script("_sizes_report")
balance = script("fellrec_balance")
split = script("fellrec_split")
round_profile, other_engines = script("round_profile"), script("other_engines")
scale, faults, compression = script("scale"), script("faults"), script("compression")
privacy, reliability, attacks = script("privacy"), script("reliability"), script("attacks")


@pytest.fixture(scope="module")
def data():
    made = make_interactions(40, 60, 2, mean_interactions=12, random_state=0)
    return common.Data("tiny", made.data, made.target)


@pytest.fixture
def only_tiny(monkeypatch, data):
    """Let every script load the tiny data."""
    modules = accuracy, cohort_speed, convergence, faults, other_engines, round_profile, sizes
    for module in modules:
        monkeypatch.setattr(module, "load", lambda paths, quick: [data])


class Known(BaseEstimator):
    """Ranks the items by id, downwards if told so; breaks down if told so."""

    fits: list = []  # noqa: RUF012 - rows of every fit, of all instances

    def __init__(self, downwards=False, diverges=False, random_state=None):
        self.downwards = downwards
        self.diverges = diverges
        self.random_state = random_state

    def fit(self, X, client_ids=None):
        if self.diverges:
            raise FloatingPointError("diverged")
        Known.fits.append((X, client_ids, self.random_state))
        self.user_ids_, self.item_ids_ = np.unique(X[:, 0]), np.unique(X[:, 1])
        self.seen_indptr_ = np.zeros(len(self.user_ids_) + 1, dtype=np.int64)
        self.seen_indices_ = np.zeros(0, dtype=np.int64)
        return self

    def recommend(self, users, k):
        items = self.item_ids_[::-1] if self.downwards else self.item_ids_
        return np.tile(items[:k], (len(users), 1)), np.tile(-np.arange(k) * 1.0, (len(users), 1))


# ------------------------------------------------------------------ _common


def test_paired_seconds_times_all_contenders_in_turn():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = common.paired_seconds(contenders, 3)
    assert "".join(calls) == "ab" + "ababab"  # once without counting
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert common.paired_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3.0


def test_goal_says_whether_it_is_held():
    assert str(common.Goal("a", 2.0, 1.5)) == "goal: a = 2 (target >= 1.5) held"
    assert str(common.Goal("a", 2.0, 1.5, at_least=False)).endswith("(target <= 1.5) not held")
    assert common.Goal("a", 1.5, 1.5).held
    assert not common.Goal("a", float("nan"), 1.5).held
    assert not common.Goal("a", float("nan"), 1.5, at_least=False).held


def test_json_tells_how_to_repeat_it_and_no_paths(tmp_path):
    words = ["--data", str(tmp_path / "ml-100k"), "--seeds", "2", "--out", str(tmp_path / "x.json")]
    arguments = common.parse_arguments("", "accuracy", seeds=3, argv=words)
    common.write_json(arguments, "accuracy", {"data": {}}, [common.Goal("a", 1.0, 2.0)])
    text = (tmp_path / "x.json").read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)
    assert report["command"] == "python benchmarks/accuracy.py --data ml-100k --seeds 2"
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["cpu"]
    assert report["goals"][0]["held"] is False


def test_quick_keeps_whole_users(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [f"{user},{item}" for user in range(30) for item in range(1_000)]
    path.write_text("user_id,item_id\n" + "\n".join(rows))
    (whole,) = common.load([path], quick=False)
    (part,) = common.load([path], quick=True)
    assert whole.name == "rows"
    assert whole.sizes == {"interactions": 30_000, "users": 30, "items": 1_000}
    assert part.sizes == {"interactions": 20_000, "users": 20, "items": 1_000}


def test_one_thread_restores_the_setting():
    torch.set_num_threads(2)
    with common.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_format_table_aligns_numbers_to_the_right():
    text = common.format_table(["a", "n"], [["long", "1"], ["b", "22"]])
    assert text == "a      n\nlong   1\nb     22"


# ----------------------------------------------------------------- accuracy


def test_every_method_has_as_many_candidates():
    sizes = {m.name: len(m.candidates) for m in accuracy.METHODS if m.name != "popularity"}
    assert set(sizes.values()) == {12}
    for method in accuracy.METHODS:
        for params in method.candidates:
            method.estimator(params, 0)  # each is accepted by its estimator


def test_als_is_judged_like_the_rest(data):
    pytest.importorskip("implicit")
    model = accuracy.ALSRecommender(4, regularization=1.0, iterations=3, random_state=0)
    model.fit(data.X)
    users = model.user_ids_[[3, 0]]
    ids, scores = model.recommend(users, 50)
    for row, user in enumerate(users):
        vector = model.user_factors_[np.flatnonzero(model.user_ids_ == user)[0]]
        seen = set(data.X[data.X[:, 0] == user, 1])
        expected = {
            item: model.item_factors_[place] @ vector
            for place, item in enumerate(model.item_ids_)
            if item not in seen
        }
        filled = scores[row] > -np.inf
        assert list(ids[row][filled]) == sorted(expected, key=expected.get, reverse=True)[:50]
    with pytest.raises(ValueError, match="1 of 1 users"):
        model.recommend(np.array([-7]), 3)


def test_als_learns_the_planted_taste(data):
    pytest.importorskip("implicit")
    train, test = accuracy.split(data, 0)
    als = accuracy.ALSRecommender(2, regularization=1.0, alpha=3.0, random_state=0)
    found = evaluate(als.fit(data.X[train]), data.X[test], metrics="ndcg", k=20)
    floor = evaluate(PopularityRecommender().fit(data.X[train]), data.X[test], metrics="ndcg", k=20)
    assert found.overall["ndcg@20"] > floor.overall["ndcg@20"]


def test_tuning_takes_the_best_and_never_sees_test_rows(data):
    Known.fits = []
    method = accuracy.Method("known", Known)
    candidates = [{"diverges": True}, {"downwards": True}, {"downwards": False}]
    tuned = accuracy.tune(method, data, candidates)
    train, test = accuracy.split(data, 0)
    inner, validation = accuracy.split(data, 0, train)
    assert not set(validation) & set(test)
    assert set(inner) | set(validation) == set(train)
    expected = [
        evaluate(Known(**params).fit(data.X[inner]), data.X[validation], metrics="ndcg", k=20)
        for params in candidates[1:]
    ]
    scores = [found.overall["ndcg@20"] for found in expected]
    assert [entry["validation_ndcg@20"] for entry in tuned["tried"]] == [None, *scores]
    assert tuned["chosen"] == candidates[1 + int(np.argmax(scores))]
    for rows, clients, _ in Known.fits[:2]:
        np.testing.assert_array_equal(rows, data.X[inner])
        np.testing.assert_array_equal(clients, data.clients[inner])


def test_tuning_without_a_survivor_is_an_error(data):
    with pytest.raises(FloatingPointError, match=r"known.*tiny"):
        accuracy.tune(accuracy.Method("known", Known), data, [{"diverges": True}])


def test_judging_takes_another_split_and_seed_each_time(data):
    Known.fits = []
    run = accuracy.judge(accuracy.Method("known", Known), "default", {}, data, range(2))
    assert [seed for _, _, seed in Known.fits] == [0, 1]
    assert not np.array_equal(Known.fits[0][0], Known.fits[1][0])
    for seed in (0, 1):
        train, test = accuracy.split(data, seed)
        found = evaluate(Known().fit(data.X[train]), data.X[test], metrics="ndcg", k=20)
        assert run["ndcg@20"][seed] == found.overall["ndcg@20"]


def test_many_users_are_sampled_the_same_way_each_time(data, monkeypatch):
    monkeypatch.setattr(accuracy, "MANY_USERS", 30)
    monkeypatch.setattr(accuracy, "SAMPLED_USERS", 10)
    rows = accuracy.sampled(data.X, 40)
    assert len(np.unique(rows[:, 0])) == 10
    assert len(rows) == np.isin(data.X[:, 0], np.unique(rows[:, 0])).sum()  # all rows of them
    np.testing.assert_array_equal(rows, accuracy.sampled(data.X, 40))
    assert accuracy.sampled(data.X, 30) is data.X


def test_accuracy_goals(data):
    def run(method, setting, ndcg, seconds=1.0):
        return {"method": method, "setting": setting, "ndcg@20": ndcg, "seconds": [seconds] * 2}

    compared = {
        "results": [
            run("FedFNN", "default", [0.40, 0.42], 11.0),
            run("FedFNN", "tuned", [0.45, 0.45]),
            run("ALS (centralised)", "tuned", [0.44, 0.45]),
        ]
    }
    goals = accuracy.goals_of("ml-100k", compared)
    assert [(round(goal.value, 6), round(goal.target, 6), goal.held) for goal in goals] == [
        (0.45, 0.445, True),
        (0.41, 0.42, False),
        (11.0, 10.0, False),
    ]
    assert len(accuracy.goals_of("other", compared)) == 1
    del compared["results"][2]
    assert accuracy.goals_of("other", compared) == []


def test_accuracy_runs_and_writes(only_tiny, monkeypatch, tmp_path, capsys):
    methods = [
        accuracy.Method("popularity", PopularityRecommender, seeded=False),
        accuracy.Method("FedFNN", FedFNNRecommender, accuracy.grid(n_rounds=[1, 2], n_factors=[4])),
    ]
    monkeypatch.setattr(accuracy, "METHODS", methods)
    out = tmp_path / "accuracy.json"
    assert accuracy.main(["--seeds", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    compared = json.loads(out.read_text())["data"]["tiny"]
    assert [(r["method"], r["setting"]) for r in compared["results"]] == [
        ("popularity", "default"),
        ("FedFNN", "default"),
        ("FedFNN", "tuned"),
    ]
    tried = compared["tuning"]["FedFNN"]["tried"]
    assert tried[0]["params"] == {}  # the defaults are in the race
    assert len(tried) == 3
    assert compared["results"][2]["params"] == compared["tuning"]["FedFNN"]["chosen"]
    mean = np.mean(compared["results"][1]["ndcg@20"])
    assert f"{mean:.4f} ±" in printed


# ------------------------------------------------------------- cohort_speed


@pytest.fixture(scope="module")
def federation(data):
    return cohort_speed.Federation.of(data)


@pytest.mark.parametrize("batch_size", [64, None])
def test_lean_loop_computes_what_the_engine_computes(federation, batch_size):
    state = cohort_speed.engine_round(federation, batch_size)
    clients = range(federation.shards.n_clients)
    batches = {client: federation.batches(client, batch_size) for client in clients}
    rows = int(federation.shards.client_rows.sum())
    items, users = cohort_speed.loop_round(federation.state, batches, rows)
    assert (items - federation.state.item_table).abs().max() > 1e-3
    torch.testing.assert_close(state.item_table, items, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.user_factors, users, rtol=1e-4, atol=1e-6)


def test_batches_are_full_but_the_last_and_balanced(federation):
    for own in (federation.batches(client, 64) for client in range(5)):
        sizes = [len(label) for _, label in own]
        assert all(size == 60 for size in sizes[:-1])
        assert 0 < sizes[-1] <= 60
        positives = sum(float(label.sum()) for _, label in own)
        assert sum(sizes) <= 5 * positives


def test_tutorial_loop_trains(federation):
    everybody = range(federation.shards.n_clients)
    positives = {c: federation.shards.cohort(np.array([c])).items for c in everybody}
    averaged = cohort_speed.tutorial_round(federation.state, positives, np.random.default_rng(0))
    moved = averaged["items.weight"] - federation.state.item_table
    engine = cohort_speed.engine_round(federation, 64).item_table - federation.state.item_table
    # Other negatives and other batches, but the same averages: the same direction.
    cosine = torch.cosine_similarity(moved.flatten(), engine.flatten(), dim=0)
    assert cosine > 0.8


def test_pfl_computes_what_the_loop_computes(federation):
    pytest.importorskip("pfl")
    state = federation.state
    # pfl has one user vector for all, so the loop gets one as well.
    alike = state.user_factors[:1].expand_as(state.user_factors).clone()
    state = cohort_speed.FactorState.start(
        alike,
        state.item_table,
        cohort_speed.Optimizer("sgd", 1.0),
        n_clients=federation.shards.n_clients,
    )
    clients = range(10)
    batches = {client: federation.batches(client, 64) for client in clients}
    rows = int(federation.shards.client_rows[:10].sum())
    assert sum(len(label) for own in batches.values() for _, label in own) == 5 * rows
    items, _ = cohort_speed.loop_round(state, batches, rows)
    table = cohort_speed.pfl_rounds(state, batches)()
    torch.testing.assert_close(table, items, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_centralised_epoch_lowers_the_loss(federation, sparse):
    torch.manual_seed(0)
    own = [federation.batches(client, None)[0] for client in range(federation.shards.n_clients)]
    user = torch.arange(len(own)).repeat_interleave(torch.tensor([len(y) for _, y in own]))
    item, label = map(torch.cat, zip(*own, strict=True))
    state = federation.state
    model = cohort_speed.CentralModel(state.user_factors, state.item_table, sparse=sparse)
    before = model.loss(user, item, label).item()
    for _ in range(20):
        cohort_speed.central_epoch(model, user, item, label)
    assert model.loss(user, item, label).item() < before


def test_whole_data_round_moves_the_items(federation):
    state = cohort_speed.whole_data_round(federation)
    assert (state.item_table - federation.state.item_table).abs().max() > 1e-3


def test_users_who_share_a_client_are_an_error(data):
    shared = common.Data("shared", data.X, data.clients % 3)
    with pytest.raises(ValueError, match="a client of its own"):
        cohort_speed.Federation.of(shared)


def test_cohort_speed_runs_and_writes(only_tiny, tmp_path, capsys):
    out = tmp_path / "cohort_speed.json"
    assert cohort_speed.main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())["data"]["tiny"]
    assert result["sampled_clients"]["loop"] == 20
    for name in ("lean loop, batches of 64", "lean loop, full batch"):
        assert 0 < result["share_of_examples"][name] < 1
    for name, seconds in result["seconds"].items():
        assert len(seconds) == 2
        assert name in printed
    goals = [line for line in printed.splitlines() if line.startswith("goal: ")]
    assert any("lean loop / engine" in goal for goal in goals)


# ------------------------------------------------------------ round_profile


def test_clock_books_seconds_where_they_are_spent(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(round_profile.time, "perf_counter", lambda: next(now))
    clock = round_profile.Clock()
    scatter = clock.timed("scatter", lambda: None)

    def train():
        return clock.timed("scatter", scatter)()

    clock.round_of(clock.timed("local steps", train))()
    # The clock ticks once whenever a phase begins or ends.
    (record,) = clock.rounds
    assert {phase: ticks for phase, ticks in record.items() if ticks} == {
        "rest": 2, "local steps": 2, "scatter": 3,
    }  # fmt: skip


def test_round_profile_runs_and_leaves_the_library_as_it_was(only_tiny, tmp_path, capsys):
    before = dict(vars(round_profile.bce_rounds)), round_profile.torch.Tensor.index_select
    out = tmp_path / "x.json"
    assert round_profile.main(["--quick", "--out", str(out)]) == 0
    assert (dict(vars(round_profile.bce_rounds)), round_profile.torch.Tensor.index_select) == before
    report = json.loads(out.read_text())
    models = report["data"]["tiny"]["models"]
    assert list(models) == list(round_profile.MODELS)
    for entry in models.values():
        for phase in ("gather", "local steps", "scatter", "server step", "evaluation"):
            assert entry["phases"][phase]["seconds"][0] > 0, phase
            assert entry["phases"][phase]["limit"] > 0, phase
        inside = [p["seconds"][0] for name, p in entry["phases"].items() if name != "evaluation"]
        assert sum(inside) == pytest.approx(entry["rounds"][0])
    assert "local steps" in capsys.readouterr().out
    text = "<!-- round_profile -->\n<!-- /round_profile -->"
    filled = tables.rewrite(text, {"round_profile": report}, tables.SECTIONS)
    assert filled.count("| local steps |") == 4


def test_counts_of_a_round():
    fitted = FedFNNRecommender(n_factors=32)
    fitted.user_ids_, fitted.item_ids_ = np.arange(3), np.arange(5)
    count = round_profile.counted("mf, bce", fitted, 10)
    assert count["local steps"].macs == 50 * 3 * 32
    assert count["scatter"].macs == 50 * 32
    machine = {"flops": 2.0, "bytes": 1e9, "rows": 1e9}
    assert count["scatter"].seconds(machine) == 50 * 32


# ------------------------------------------------------------ other_engines


def test_other_engines_runs_and_writes(only_tiny, tmp_path):
    out = tmp_path / "x.json"
    assert other_engines.main(["--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [goal["what"] for goal in report["goals"]] == [
        f"tiny, {what}, two threads / one"
        for what in ("two rounds, bce", "two rounds, whole-data", "recommend")
    ]
    text = "<!-- other_engines -->\n<!-- /other_engines -->"
    filled = tables.rewrite(text, {"other_engines": report}, tables.SECTIONS)
    assert "| recommend, 2 threads |" in filled


def test_other_engines_goals():
    seconds = {"ours": [1.0, 1.0, 4.0], "implicit": [2.0, 3.0, 4.0]}
    timed = {"a_round": 900.0}
    result = {
        "flower": {"engine": [1.0, 2.0, 3.0], "training": timed, "idle": {"a_round": 2_000.0}},
        "ranking": {"seconds": seconds},
        "threads": {"recommend": {"1": [2.0], "2": [1.0]}},
    }
    goals = {goal.what: goal for goal in other_engines.goals_of("ml", result)}
    assert goals["ml, a round, Flower, training clients / engine"].value == 450.0
    assert goals["ml, a round, Flower, idle clients / engine"].held
    assert goals["ml, top 20 of all users, implicit / ours"].value == 2.0
    assert goals["ml, recommend, two threads / one"].value == 0.5


def test_implicit_ranks_the_same_factors():
    pytest.importorskip("implicit")
    made = make_interactions(30, 40, 2, random_state=0)
    model = other_engines.fitted(common.Data("tiny", made.data, made.target))
    with common.one_thread():
        assert other_engines.ranking(model, 1)["same"] > 0.99


# ------------------------------------------------------------- cohort_speed


def test_cohort_speed_goals_are_ratios_of_pairs():
    seconds = {
        "engine, batches of 64": [1.0, 2.0, 1.0],
        "engine, full batch": [1.0, 1.0, 1.0],
        "lean loop, batches of 64": [40.0, 40.0, 20.0],
        "centralised": [1.0, 1.0, 1.0],
    }
    goals = {g.what: g for g in cohort_speed.goals_of("ml", {"seconds": seconds})}
    assert goals["ml, batches of 64, lean loop / engine"].value == 20.0
    assert not goals["ml, batches of 64, lean loop / engine"].held
    assert goals["ml, full batch, engine / centralised"].held
    assert len(goals) == 3


# ------------------------------------------------------------------- curves

BCE = {"objective": "bce", "n_factors": 4, "l2": 0.02, "learning_rate": 0.1, "device": "cpu"}


def fitted_ndcg(split, **params):
    model = FedFNNRecommender(**{**BCE, **params}).fit(split.train, split.clients)
    return evaluate(model, split.held_out, metrics="ndcg", k=20).overall["ndcg@20"]


def test_grid_is_dense_early_and_ends_at_the_last_round():
    rounds = curves.rounds_grid(100, 10, 1.1)
    assert list(rounds[:12]) == [*range(1, 11), 11, 12]
    assert rounds[-1] == 100
    assert (np.diff(rounds) <= np.maximum(1, 0.1 * rounds[:-1])).all()
    assert list(curves.rounds_grid(3, 10, 1.1)) == [1, 2, 3]


def test_inner_split_never_sees_held_out_rows(data):
    outer, inner = (curves.split_of(data, 1, 10**6, inner=inner) for inner in (False, True))
    rows = {tuple(row) for row in outer.train}
    assert {tuple(row) for row in inner.train} | {tuple(row) for row in inner.held_out} == rows
    assert not {tuple(row) for row in outer.held_out} & rows
    assert len(outer.clients) == len(outer.train)


def test_judged_users_are_the_same_for_all_seeds(data):
    users = [set(curves.split_of(data, seed, 7).held_out[:, 0]) for seed in (0, 1)]
    assert len(users[0]) == 7
    assert users[0] == users[1]
    assert len(curves.split_of(data, 0, 7).train) == len(curves.split_of(data, 0, 40).train)


@pytest.mark.parametrize("item_bias", [False, True])
def test_both_curves_are_those_of_separate_fits(data, item_bias):
    split = curves.split_of(data, 0, 10**6)
    params = {**BCE, "predictor": None, "item_bias": item_bias}
    run = curves.fit_and_record(
        FedFNNRecommender, {**params, "refit": False}, split,
        protocols=("held", "refit"), n_rounds=3, share=0.5, seed=5,
    )  # fmt: skip
    assert run["rounds"] == {"held": "1 2 3", "refit": "1 2 3"}
    params.update(clients_per_round=0.5, random_state=5)
    for protocol, refit in (("held", False), ("refit", True)):
        curve = curves.unpack(run[protocol])
        for n_rounds in (2, 3):
            expected = fitted_ndcg(split, **params, n_rounds=n_rounds, refit=refit)
            assert curve[n_rounds - 1] == pytest.approx(expected, abs=1e-4)
    assert run["held"] != run["refit"]


def test_whole_data_has_the_refit_of_its_own(data):
    split = curves.split_of(data, 0, 10**6)
    run = curves.fit_and_record(
        FedFNNRecommender, {"n_factors": 4}, split,
        protocols=("refit",), n_rounds=3, share=0.5, seed=5,
    )  # fmt: skip
    params = {"objective": "whole-data", "l2": "auto", "clients_per_round": 0.5, "random_state": 5}
    expected = fitted_ndcg(split, **params, n_rounds=3)
    assert curves.unpack(run["refit"])[-1] == pytest.approx(expected, abs=1e-4)


def test_ever_and_never_sampled_make_up_the_mean(data, monkeypatch):
    monkeypatch.setattr(curves, "APART_FROM", (2,))
    split = curves.split_of(data, 0, 10**6)
    run = curves.fit_and_record(
        FedFNNRecommender, {**BCE, "predictor": "mean", "refit": False}, split,
        protocols=("held",), n_rounds=3, share=0.2, seed=5,
    )  # fmt: skip
    (line,) = run["apart"]["held"]
    t, n_ever, ever, never = map(float, line.split())
    n_users = len(np.unique(split.held_out[:, 0]))
    assert t == 2
    assert 0 < n_ever < n_users
    mean = (n_ever * ever + (n_users - n_ever) * never) / n_users
    assert mean == pytest.approx(curves.unpack(run["held"])[1], abs=2e-4)
    assert 0 < run["meta_network_share"] < 1
    assert 0 <= run["rounds_predicted"] <= 1


def test_timing_the_meta_network_leaves_it_as_it_was():
    before = curves.fedfnn.predict_updates
    with pytest.raises(ZeroDivisionError), curves.timed_predictions():
        _ = 1 // (curves.fedfnn.predict_updates is before)  # raises as it is another one
    assert curves.fedfnn.predict_updates is before


def test_a_curve_ends_where_training_diverges(data):
    run = curves.fit_and_record(
        FedFNNRecommender,
        {**BCE, "learning_rate": 1e4, "server_optimizer": "sgd", "predictor": None, "refit": False},
        curves.split_of(data, 0, 10**6),
        protocols=("held",), n_rounds=4, share=0.5, seed=0,
    )  # fmt: skip
    assert run["diverged"]
    assert np.isnan(curves.unpack(run["held"])[-1])


def test_oracle_with_everybody_is_no_prediction(data):
    split = curves.split_of(data, 0, 10**6)
    params = {**BCE, **curves.LOCAL, "item_bias": False}
    options = {"protocols": ("held",), "n_rounds": 3, "seed": 0}
    plain = {**params, "predictor": None, "server_optimizer": "sgd", "sampling": "uniform",
             "refit": False}  # fmt: skip
    for share, alike in ((1.0, True), (0.3, False)):
        oracle = curves.fit_and_record(curves.Oracle, params, split, share=share, **options)
        count = curves.fit_and_record(FedFNNRecommender, plain, split, share=share, **options)
        assert (oracle["held"] == count["held"]) is alike


def test_what_is_read_off_a_curve():
    rounds = np.array([1.0, 2.0, 3.0, 5.0, 8.0])
    curve = np.array([0.1, 0.3, 0.2, 0.25, 0.1])
    assert curves.best_of(curve) == pytest.approx(0.25)
    assert curves.best_of(np.array([0.2, 0.2, 0.2, np.nan])) == pytest.approx(0.2)
    assert curves.first_reaching(rounds, curve, 0.25) == 2
    assert curves.first_reaching(rounds, curve, 0.31) is None
    assert curves.fewer(40, 100, 8) == 5.0
    assert curves.fewer(None, 100, 8) == 12.5
    assert curves.fewer(40, 100, None) == 0.0
    np.testing.assert_array_equal(curves.unpack(curves.pack(np.array([0.12345, 1]))), [0.1235, 1])


# -------------------------------------------------------------- convergence


def measured_of(*final):
    """Two baselines and the two defaults with straight curves to these heights, over 10 rounds."""
    names = ("FedAvg", "FedFast", "+ newton server", "FedFNN, bce", "FedFNN")
    steps = np.arange(1, 11)
    measured = {}
    for name, height in zip(names, final, strict=True):
        curve = curves.pack(height * steps / 10)
        protocols = ("refit",) if name == "FedFNN" else ("held", "refit")
        measured[name] = {
            "without": "+ newton server" if name == "FedFNN, bce" else None,
            "rounds": dict.fromkeys(protocols, curves.pack(steps)),
            "runs": [{**dict.fromkeys(protocols, curve), "apart": {"held": ["5 20 0.2 nan"]}}] * 2,
        }
    return measured


def test_marks_are_set_by_fedavg():
    derived = convergence_report.derive(measured_of(0.1, 0.05, 0.2, 0.4, 0.8), "held")
    rows = derived["methods"]
    assert derived["best of FedAvg"] == 0.09  # the mean of rounds 8 to 10
    assert rows["FedAvg"]["rounds"] == {"90": 9, "95": 9, "99": 9}
    assert rows["FedFast"]["rounds"] == {"90": None, "95": None, "99": None}
    assert rows["FedFNN, bce"]["rounds"] == {"90": 3, "95": 3, "99": 3}
    assert rows["FedFNN, bce"]["fewer than FedAvg"]["95"] == 3.0
    assert rows["FedFNN, bce"]["fewer than FedFast"]["95"] == 3.33
    assert rows["FedFNN, bce"]["fewer than without prediction"]["95"] == 1.67
    assert rows["FedFNN"]["rounds"]["95"] == 2  # its one curve stands in both comparisons
    cells = {row[0]: row[1:] for row in convergence_report.rows_of(derived)}
    assert cells["FedFast"] == ["never"] * 3 + ["", "", "", "0.0450", "0.0500"]
    assert cells["FedFNN, bce"][3:6] == ["3.0", "> 3.3", "1.7"]


def test_convergence_goals():
    measured = measured_of(0.1, 0.05, 0.2, 0.4, 0.08)
    both = {
        protocol: convergence_report.derive(measured, protocol) for protocol in ("held", "refit")
    }
    goals = {goal.what: goal for goal in convergence_report.goals_of("ml, 5%", both)}
    assert len(goals) == 14
    held = "ml, 5%, users served as held"
    assert goals[f"{held}, FedFNN, bce, times fewer rounds than FedAvg"].value == 3.0
    assert goals[f"{held}, FedFNN, times fewer rounds than FedAvg"].value == 0.0  # never
    final = "final NDCG@20 against the best of both baselines"
    assert goals[f"{held}, FedFNN, bce, {final}"].held
    assert not goals[f"{held}, FedFNN, {final}"].held


def test_convergence_methods_are_tuned_alike():
    names = [method.name for method in convergence.METHODS]
    assert len(set(names)) == len(names)
    for method in convergence.METHODS:
        assert len(method.candidates) == 6
        assert method.without in (None, *names)
        assert method.rates_of in (None, *names)
        for params in method.candidates:
            model = method.make(**{**method.params, **params})  # each is accepted
            if "local_epochs" in method.params:
                float(model.l2)  # the benchmark's refit takes it as it is


def test_convergence_rounds_follow_the_participation():
    plan = convergence.Plan(n_seeds=1, n_judged=9, scale=0.5, jobs=1, n_candidates=None)
    fedavg, ours = convergence.METHODS[0], convergence.METHODS[-1]
    assert [plan.rounds(fedavg, share) for share in (0.01, 0.04, 0.2)] == [300, 120, 40]
    assert [plan.rounds(ours, share) for share in (0.01, 0.04, 1.0)] == [100, 50, 30]
    assert plan.rounds(fedavg, 0.05, (120, 60)) == 60


def test_convergence_runs_and_writes(only_tiny, tmp_path, capsys, monkeypatch):
    shown = ("FedAvg", "FedFast", "mlp, literal", "+ newton server", "FedFNN, bce", "FedFNN")
    methods = [method for method in convergence.METHODS if method.name in (*shown, "oracle")]
    # Those that the rest is compared with must be there; the oracle's base is not.
    methods = [replace(m, without=None) if m.without == "FedAvg + count" else m
               for m in methods]  # fmt: skip
    monkeypatch.setattr(convergence, "METHODS", methods)
    out, figure = tmp_path / "fedfnn_convergence.json", tmp_path / "curves.png"
    words = ["--quick", "--participation", "0.2", "--out", str(out)]
    if importlib.util.find_spec("matplotlib"):
        words += ["--plot", str(figure)]
    assert convergence.main(words) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["command"].endswith("--quick --participation 0.2")
    entry = report["data"]["tiny"]["participation"]["0.2"]
    assert list(entry["measured"]) == [method.name for method in methods]
    assert set(entry["derived"]["held"]["methods"]) == set(entry["measured"])
    assert report["goals"] == []
    tuning = report["tuning"]["methods"]
    assert tuning["oracle"]["chosen"] == tuning["mlp, literal"]["chosen"]
    best = max(tuning["FedAvg"]["tried"], key=lambda tried: tried["ndcg@20"])
    assert tuning["FedAvg"]["chosen"] == best["params"]
    assert "tiny, 20% of the clients, users served as held" in printed
    assert figure.exists() == ("--plot" in words)
    text = "<!-- fedfnn_convergence -->\n<!-- /fedfnn_convergence -->"
    filled = tables.rewrite(text, {"fedfnn_convergence": report}, tables.SECTIONS)
    assert "| FedFNN, bce | " in filled
    assert "FedFNN: l2 auto, server_learning_rate auto" in filled
    assert filled.count("| mlp, literal | ") == 4  # two ways of serving, costs, ever and never


# -------------------------------------------------------------- sensitivity


def test_sensitivity_compares_with_no_prediction():
    plain, better = "0.1 0.1 0.1 0.1", "0.05 0.2 0.2 0.2"
    curves_of = {(None, 0.0, 0): [plain] * 2, ("mlp, literal", 1.0, 3): [plain, better]}
    result = sensitivity.derive("1 2 4 8", curves_of)
    assert [cell["best"] for cell in result["cells"]] == [0.1, 0.15]
    assert [cell["rounds"] for cell in result["cells"]] == [1, 2]
    ((kind, header, rows),) = sensitivity.tables_of(result)
    assert (kind, header) == ("mlp, literal", ["discount", "patience 3"])
    assert rows == [["0 (no prediction)", "0.100 / 1"], ["1", "0.150 / 2"]]


def test_sensitivity_runs_and_writes(monkeypatch, data, tmp_path, capsys):
    monkeypatch.setattr(sensitivity, "data_sets", lambda arguments: [data])
    out, figure = tmp_path / "fedfnn_sensitivity.json", tmp_path / "heatmap.png"
    words = ["--quick", "--out", str(out)]
    if importlib.util.find_spec("matplotlib"):
        words += ["--plot", str(figure)]
    assert sensitivity.main(words) == 0
    report = json.loads(out.read_text())
    cells = report["data"]["tiny"]["cells"]
    assert [cell["kind"] for cell in cells] == ["no prediction", *sensitivity.KINDS]
    assert "tiny, mlp, gated: best NDCG@20" in capsys.readouterr().out
    assert figure.exists() == ("--plot" in words)
    text = "<!-- fedfnn_sensitivity -->\n<!-- /fedfnn_sensitivity -->"
    filled = tables.rewrite(text, {"fedfnn_sensitivity": report}, tables.SECTIONS)
    assert filled.count("| 0 (no prediction) |") == 3


def test_plot_without_matplotlib_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"fedrecsk\[plot\]"):
        sensitivity.main(["--plot", str(tmp_path / "a.png")])


# -------------------------------------------------------------------- sizes

NCF = {
    "base_model": "ncf", "sizes": (2, 4, 8), "n_rounds": 4, "clients_per_round": 10,
    "local_epochs": 1, "refit": False,
}  # fmt: skip


def ndcg_of(listed, wanted):
    """NDCG@20 of one list, by its definition."""
    gains = [1 / np.log2(place + 2) for place, item in enumerate(listed[:20]) if item in wanted]
    return sum(gains) / sum(1 / np.log2(place + 2) for place in range(min(20, len(wanted))))


def sizes_task(method="HeteFedRec", rounds=(2, 4), **params):
    chosen = {**NCF, "n_rounds": rounds[-1], **params}
    return sizes.Task("ncf", method, 0, {}, chosen, rounds, tuple(r / 4 for r in rounds))


def test_sizes_hold_out_twice(data):
    split = sizes.Split.of(data, 1)
    rows = [
        {tuple(row) for row in part[:, :2]} for part in (split.inner, split.validation, split.test)
    ]
    assert sum(map(len, rows)) == len(set().union(*rows)) == len(data.X)
    assert len(split.clients) == len(split.inner)
    train, _ = accuracy.split(data, 1)
    assert rows[0] | rows[1] == {tuple(row) for row in data.X[train, :2]}
    assert not np.array_equal(split.test, sizes.Split.of(data, 0).test)


def test_sizes_mask_what_the_user_had(data):
    split = sizes.Split.of(data, 0)
    model = FedFNNRecommender(4, n_rounds=3, random_state=0).fit(split.inner, split.clients)
    found = sizes.Judge(split)(model)
    everything, _ = model.recommend(k=60, exclude_seen=False)
    sides = {"validation": (split.inner, split.validation), "ndcg@20": (None, split.test)}
    for name, (seen, held_out) in sides.items():
        seen = np.concatenate([split.inner, split.validation]) if seen is None else seen
        values = []
        for user, order in zip(model.user_ids_, everything, strict=True):
            had = set(seen[seen[:, 0] == user, 1])
            wanted = set(held_out[held_out[:, 0] == user, 1])
            if wanted:
                values.append(ndcg_of([item for item in order if item not in had], wanted))
        assert found[name] == pytest.approx(np.mean(values))


def test_sizes_groups_are_by_interactions(data):
    split = sizes.Split.of(data, 0)
    model = FedFNNRecommender(4, n_rounds=3, random_state=0).fit(split.inner, split.clients)
    found = sizes.Judge(split)(model)
    groups = found["groups"]
    n_users = {name: group["n_users"] for name, group in groups.items()}
    mean = sum(groups[name]["ndcg@20"] * n for name, n in n_users.items()) / sum(n_users.values())
    assert found["ndcg@20"] == pytest.approx(mean)
    clients, counts = np.unique(split.clients, return_counts=True)
    largest = clients[np.argsort(counts, kind="stable")[32:]]  # the last fifth of 40
    of_largest = split.test[np.isin(split.test[:, 0], data.X[np.isin(data.clients, largest), 0])]
    assert n_users["large"] == len(np.unique(of_largest[:, 0])) == 8
    expected = evaluate(
        sizes.Lists(model, *model.recommend(k=60), split.masked), of_largest, metrics="recall", k=20
    )
    assert groups["large"]["recall@20"] == pytest.approx(expected.overall["recall@20"])


@pytest.mark.parametrize("method", ["HeteFedRec", "Standalone"])
def test_sizes_curves_are_those_of_separate_fits(data, method):
    extra = {"aggregation": "standalone"} if method == "Standalone" else {}
    run = sizes.one_run(data, sizes_task(method, **extra))
    split = sizes.Split.of(data, 0)
    for place, n_rounds in enumerate((2, 4)):
        model = sizes.HeteFedRecRecommender(
            **{**NCF, **extra, "n_rounds": n_rounds}, random_state=0
        ).fit(split.inner, split.clients)
        found = sizes.Judge(split)(model)
        for key in ("validation", "ndcg@20", "recall@20"):
            assert curves.unpack(run[key])[place] == pytest.approx(found[key], abs=1e-5)
        group = curves.unpack(run["groups"]["small"]["ndcg@20"])[place]
        assert group == pytest.approx(found["groups"]["small"]["ndcg@20"], abs=1e-5)
    assert run["diverged"] is False
    assert json.loads(json.dumps(run)) == run  # comes back from the JSON as it is
    sent = sum(record["bytes_down"] for record in model.history_)
    assert run["bytes_down_per_epoch"] == sent  # one epoch in all
    assert (sent == 0) == (method == "Standalone")


def test_sizes_fits_are_put_together_at_the_moments_only(data, monkeypatch):
    split, asked = sizes.Split.of(data, 0), []
    recorder = sizes.Recorder((2, 4), lambda model: asked.append(model.n_rounds_) or {})
    served = []
    nested = importlib.import_module("fedrecsk.estimators._hetefedrec")
    refit = nested.refit_users
    monkeypatch.setattr(
        nested, "refit_users", lambda *args, **named: served.append(1) or refit(*args, **named)
    )
    model = sizes.HeteFedRecRecommender(**NCF, contributors="largest", random_state=0)
    model.set_callbacks(recorder).fit(split.inner, split.clients)
    assert asked == [2, 4]
    assert len(served) == 3  # and once at the end


def test_sizes_curves_end_where_training_diverges(data):
    task = sizes_task(optimizer="sgd", learning_rate=1e6, server_optimizer="sgd")
    run = sizes.one_run(data, task)
    assert run["diverged"]
    assert np.isnan(curves.unpack(run["ndcg@20"])[-1])
    assert "seconds_per_epoch" not in run


def test_sizes_methods_have_the_same_rounds_and_candidates(data):
    plan = sizes.Plan(epochs=5, cohort=30)
    for base in sizes.NETWORKS:
        for method in sizes.METHODS:
            for candidate in method.candidates(base):
                task = plan.task(data, base, method, 0, candidate)
                method.make(**task.params)  # each is accepted
                if method.federated:
                    assert len(method.candidates(base)) == 3
                    # 13 of 40 clients, the most that is at most a third
                    assert task.params["clients_per_round"] == 13
                    assert task.rounds == (4, 7, 10, 13, 16)
                    assert task.epochs == (1, 2, 3, 4, 5)
                    assert task.params["n_rounds"] == 16
                    assert task.params["refit"] is False
    exact = sizes.Plan(epochs=5, cohort=8).task(data, "ncf", sizes.METHODS[0], 0, {})
    assert exact.rounds == (5, 10, 15, 20, 25)
    whole = plan.task(data, "mf", sizes.METHODS[0], 0, {})
    assert whole.rounds == (8, 16, 24, 32, 40)
    assert "local_epochs" not in whole.params


def test_sizes_every_method_runs(data):
    plan = sizes.Plan(epochs=1, cohort=8, moments=1, central_rounds=1)
    for base in ("ncf", "mf"):
        for method in sizes.METHODS:
            if base not in method.bases or (base == "mf" and method.sweep):
                continue
            run = sizes.one_run(data, plan.task(data, base, method, 0, {}))
            assert 0 <= curves.unpack(run["ndcg@20"])[0] <= 1, method.name
            assert run["peak_rss_mb"] >= run["rss_before_mb"] > 0


def test_sizes_root_keeps_the_correlations():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)) + 3.0
    root = [sizes.pack(row) for row in sizes.root_of(table)]
    again = sizes_report.table_of(root)
    assert again.shape == (8, 4)
    np.testing.assert_allclose(
        np.corrcoef(again, rowvar=False), np.corrcoef(table, rowvar=False), atol=1e-4
    )


def sizes_run(method, validation, test, *, seed=0, candidate=None, diverged=False, **more):
    """A run of two moments."""
    return {
        "data": "ml-1m", "interactions": 100, "base": "ncf", "method": method, "seed": seed,
        "candidate": candidate or {}, "epochs": [1, 2], "validation": validation,
        "ndcg@20": test, "recall@20": test, "diverged": diverged, "peak_rss_mb": 9.0,
        "rss_before_mb": 4.0,
        "groups": {g: {"users": 3, "ndcg@20": test, "recall@20": test} for g in sizes.GROUPS},
        **more,
    }  # fmt: skip


def test_sizes_validation_chooses_moment_and_settings():
    run = sizes_run("a", "0.3 0.2", "0.1 0.5")
    best = sizes_report.best_of(run)
    assert (best["epoch"], best["validation"], best["ndcg@20"]) == (1, 0.3, 0.1)
    assert best["groups"] == {"small": 0.1, "medium": 0.1, "large": 0.1}
    assert sizes_report.best_of(sizes_run("a", "nan nan", "nan nan", diverged=True)) is None
    runs = [
        sizes_run("a", "0.3 0.2", "0.9 0.9", candidate={"n": 1}),
        sizes_run("a", "0.1 0.4", "0.1 0.1", candidate={"n": 2}),
        sizes_run("a", "0.9 nan", "0.9 nan", candidate={"n": 3}, diverged=True),
    ]
    chosen = sizes_report.chosen_of(runs)
    assert chosen["chosen"] == {"n": 2}
    assert [one["validation"] for one in chosen["tried"]] == [0.3, 0.4, 0.9]
    assert sizes_report.chosen_of(runs[2:])["chosen"] == {"n": 3}


def sizes_summary(runs):
    names = list(dict.fromkeys(run["method"] for run in runs))
    tuning = {"ncf": {"ml": {name: {"chosen": {}} for name in names}}}
    about = {"interactions": 100, "plans": {"ncf": {"epochs": 2}}, "tuned_on": {"ncf": "ml"}}
    return sizes_report.summary_of(runs, tuning, {"ml-1m": about})


def test_sizes_summary_compares_with_the_best_baseline():
    runs = [
        sizes_run("HeteFedRec", "0.1 0.2", "0.1 0.3", numbers_mean=50, seconds_per_epoch=70.0,
                  singular_value_variance=1.0),
        sizes_run("HeteFedRec", "0.3 0.2", "0.5 0.3", seed=1, numbers_mean=50,
                  seconds_per_epoch=80.0, singular_value_variance=2.0),
        sizes_run("All Small", "0.1 0.2", "0.9 0.1"),
        sizes_run("All Large", "0.1 0.2", "0.1 0.2", numbers_mean=100),
        sizes_run("All Large", "0.1 0.2", "0.1 0.9", candidate={"other": 1}),
        sizes_run("popularity", "0.9 0.9", "0.9 0.9"),
        sizes_run("- decorrelation", "0.1 0.2", "0.1 0.5", singular_value_variance=3.0),
    ]  # fmt: skip
    (entry,) = sizes_summary(runs)
    ours = entry["methods"]["HeteFedRec"]
    assert ours["ndcg@20"] == [0.3, 0.5]  # each seed at its own moment
    assert ours["curve"] == "0.30000 0.30000"
    assert (ours["best_epoch"], ours["seeds"], ours["rss_growth_mb"]) == (1.5, [0, 1], 5.0)
    assert entry["methods"]["All Large"]["ndcg@20"] == [0.2]  # not of settings not chosen
    assert entry["lead"] == {"best_baseline": "All Large", "ratio": 2.0}
    assert [(goal.value, goal.held) for goal in sizes_report.goals_of([entry])] == [
        (2.0, True), (0.5, True), (75.0, False),
    ]  # fmt: skip
    assert [claim[2] for claim in entry["claims"]] == [
        "+100.0% over All Large", "50%", "1.5 / 3", "-20.0%",
    ]  # fmt: skip


def test_sizes_last_asked_counts():
    runs = [sizes_run("All Small", "0.1 0.2", f"0.1 0.{n}") for n in (3, 4)]
    (entry,) = sizes_summary(runs)
    assert entry["methods"]["All Small"]["ndcg@20"] == [0.4]
    runs[1]["epochs"] = [5, 10]  # another number of epochs than planned
    (entry,) = sizes_summary(runs)
    assert entry["methods"]["All Small"]["ndcg@20"] == [0.3]
    assert entry["lead"] is None
    assert sizes_report.goals_of([entry]) == []


@pytest.fixture
def counted(monkeypatch, only_tiny):
    """Run in this process, and list what is run; breaks down at the number in the list."""
    done, breaks = [], []
    monkeypatch.setattr(sizes, "LOCAL_EPOCHS", 1)

    def run_all(data, tasks, jobs):
        for task in tasks:
            if len(done) in breaks:
                raise KeyboardInterrupt
            done.append((task.method, task.seed, len(task.candidate)))
            yield sizes.one_run(data, task)

    monkeypatch.setattr(sizes, "run_all", run_all)
    return done, breaks


def test_sizes_go_on_where_they_were_interrupted(counted, tmp_path):
    done, breaks = counted
    out = tmp_path / "sizes.json"
    words = ["--seeds", "2", "--epochs", "1", "--methods", "All Small", "--out", str(out)]
    breaks.append(2)
    with pytest.raises(KeyboardInterrupt):
        sizes.main(words)
    assert len(json.loads(out.read_text())["runs"]) == 2
    breaks.clear()
    assert sizes.main(words) == 0
    report = json.loads(out.read_text())
    chosen = report["tuning"]["ncf"]["tiny"]["All Small"]["chosen"]
    tuned = [("All Small", 0, len(candidate)) for candidate in sizes.CANDIDATES]
    assert done == [*tuned, ("All Small", 1, len(chosen))]
    assert len(report["runs"]) == 4
    assert len(report["commands"]) == 1
    assert len(report["summary"][0]["methods"]["All Small"]["ndcg@20"]) == 2
    sizes.main(words)
    assert len(done) == 4  # nothing is run again
    sizes.main([*words, "--methods", "popularity"])
    assert done[4:] == [("popularity", 0, 0), ("popularity", 1, 0)]
    report = json.loads(out.read_text())
    assert len(report["commands"]) == 2
    assert set(report["summary"][0]["methods"]) == {"All Small", "popularity"}
    with pytest.raises(SystemExit, match=r"results of hours; give --quick another"):
        sizes.main(["--quick", "--out", str(out)])
    sizes.main(["--seeds", "1", "--methods", "popularity", "--fresh", "--out", str(out)])
    assert len(json.loads(out.read_text())["runs"]) == 1


def test_sizes_carry_settings_over(counted, data, monkeypatch, tmp_path):
    done, _ = counted
    other = common.Data("other", data.X[:-3], data.clients[:-3])
    monkeypatch.setattr(sizes, "load", lambda paths, quick: [data, other])
    out = tmp_path / "sizes.json"
    words = ["--seeds", "1", "--epochs", "1", "--out", str(out)]
    sizes.main([*words, "--methods", "All Small"])
    report = json.loads(out.read_text())
    chosen = report["tuning"]["ncf"]["tiny"]["All Small"]["chosen"]
    assert len(done) == 4
    assert [run["candidate"] for run in report["runs"] if run["data"] == "other"] == [chosen]
    tried = report["tuning"]["ncf"]["tiny"]["All Small"]["tried"]
    assert max(tried, key=lambda one: one["validation"])["params"] == chosen
    # Later, on the second data set alone: what was tuned is known, anything else is not.
    monkeypatch.setattr(sizes, "load", lambda paths, quick: [other])
    sizes.main([*words, "--methods", "All Small"])
    assert len(done) == 4
    with pytest.raises(SystemExit, match=r"All Large \(ncf\) were not tuned on tiny"):
        sizes.main([*words, "--methods", "All Large"])
    sizes.main([*words, "--methods", "All Large", "--tune-each"])
    assert len(done) == 7


def test_sizes_run_in_processes_of_their_own(data):
    task = sizes_task("popularity", rounds=(0,))
    here = sizes.one_run(data, task)
    # Pickled by name, which a new process must find; a script's folder is on its path.
    sys.path.insert(0, str(BENCHMARKS))
    try:
        (run,) = sizes.run_all(data, [task], 1)
    finally:
        sys.path.remove(str(BENCHMARKS))
    assert run["ndcg@20"] == here["ndcg@20"]


def test_sizes_runs_and_writes(only_tiny, tmp_path, capsys):
    out, figures = tmp_path / "hetefedrec_sizes.json", tmp_path / "images"
    words = ["--quick", "--out", str(out)]
    for name in ("HeteFedRec", "- decorrelation", "All Small", "All Large"):
        words += ["--methods", name]
    if importlib.util.find_spec("matplotlib"):
        words += ["--figures", str(figures)]
    assert sizes.main(words) == 0
    printed = capsys.readouterr().out
    assert "tiny, ncf: quality, at the moment that validation chose" in printed
    report = json.loads(out.read_text())
    assert report["goals"] == []
    assert str(tmp_path) not in out.read_text()
    assert "--methods '- decorrelation'" in report["command"]
    assert len(report["runs"]) == 4 * 2  # two candidates
    drawn = ["hetefedrec_curves.png", "hetefedrec_groups.png", "hetefedrec_spectrum.png"]
    assert sorted(path.name for path in figures.glob("*")) == drawn * ("--figures" in words)
    text = "<!-- hetefedrec_sizes -->\n<!-- /hetefedrec_sizes -->"
    filled = tables.rewrite(text, {"hetefedrec_sizes": report}, tables.SECTIONS)
    assert filled.count("| - decorrelation | ") == 3  # quality, curve, costs
    assert "| epoch 1 | epoch 2 |" in filled
    summary = "<!-- sizes -->\n<!-- /sizes -->"
    filled = tables.rewrite(summary, {"hetefedrec_sizes": report}, tables.SUMMARIES)
    value = np.mean(report["summary"][0]["methods"]["All Small"]["ndcg@20"])
    assert f"| All Small | {value:.3f} |" in filled


# ---------------------------------------------------------- fellrec_balance


def test_balance_runs_appends_and_writes(tmp_path):
    out = tmp_path / "fellrec_balance.json"
    words = ["--quick", "--seeds", "1", "--out", str(out), "--append"]
    assert balance.main([*words, "--methods", "FedAvg"]) == 0
    given = ["--learning-rate", "0.004", "--popularity-weight", "0.5"]
    assert balance.main([*words, "--methods", "FELLRec", *given]) == 0
    report = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    assert len(report["commands"]) == 2
    compared = report["data"]["made-up"]["encoder, compact"]
    assert {"popularity", "FedAvg", "FELLRec"} <= set(compared["results"])
    ours = compared["results"]["FELLRec"]
    assert ours["worst"][0] == min(ours["clients"][0]) <= ours["recall@10"][0]
    assert sum(compared["test_users_by_platform"]) == compared["test_users"]
    goals = balance.goals_of("made-up", compared, "encoder, compact")
    assert goals[1].value == pytest.approx(
        ours["recall@10"][0] / compared["results"]["FedAvg"]["recall@10"][0] - 1
    )
    text = "<!-- fellrec_balance -->\n<!-- /fellrec_balance -->"
    filled = tables.rewrite(text, {"fellrec_balance": report}, tables.SECTIONS)
    assert "| FELLRec |" in filled
    assert "Tuned: FedAvg: learning_rate 0.008" in filled
    assert "FELLRec: learning_rate 0.004, popularity_weight 0.5, popularity_counts all." in filled


# ------------------------------------------------------------ fellrec_split


@pytest.fixture(scope="module")
def split_run(tmp_path_factory):
    """A try of the script with the compact encoder: its JSON, and where it is."""
    folder = tmp_path_factory.mktemp("split")
    out = folder / "fellrec_split.json"
    words = ["--quick", "--compact", "encoder", "--out", str(out)]
    if importlib.util.find_spec("matplotlib"):
        words += ["--figure", str(folder / "split.png")]
    assert split.main(words) == 0
    assert (folder / "split.png").is_file() == ("--figure" in words)
    return json.loads(out.read_text()), out


def test_split_runs_and_writes(split_run):
    report, out = split_run
    assert report["command"] == (
        "python benchmarks/fellrec_split.py --seeds 3 --quick --compact encoder"
    )
    assert report["goals"] == []
    assert str(out.parent) not in out.read_text()
    models = report["data"]["made-up"]
    assert list(models) == ["compact encoder"]
    result = models["compact encoder"]
    assert [row["n_client_layers"] for row in result["splits"]] == list(range(result["layers"]))
    assert split.worst(result) < split.TOLERANCE
    assert result["frozen"][0]["linear_inverter"] > 0.9  # embedded tokens tell nearly all
    assert result["speed"]["rows"] == 5 * split.QUICK.batch
    text = "<!-- fellrec_split -->\n<!-- /fellrec_split -->"
    filled = tables.rewrite(text, {"fellrec_split": report}, tables.SECTIONS)
    assert filled.count("| compact encoder |") == 2  # heads of suggestions, row of speed
    assert f"| {split.TOLD[1]} |" in filled
    summary = tables.rewrite(
        "<!-- split -->\n<!-- /split -->", {"fellrec_split": report}, tables.SUMMARIES
    )
    assert f"| {result['speed']['ratio']:.2f} |" in summary


def test_split_ends_with_1_where_it_differs(split_run, monkeypatch, tmp_path):
    result = dict(split_run[0]["data"]["made-up"]["compact encoder"])
    monkeypatch.setattr(split, "compact_opener", lambda backend, texts: None)
    words = ["--quick", "--compact", "causal", "--out", str(tmp_path / "x.json")]
    for difference, code in ((2e-4, 1), (float("nan"), 1), (1e-5, 0)):
        result["splits"] = [{**row, "gradient_difference": difference} for row in result["splits"]]
        monkeypatch.setattr(split, "measure", lambda *args, result=result, **kwargs: result)
        assert split.main(words) == code


def test_split_goes_on_with_what_other_runs_measured(split_run, monkeypatch, tmp_path):
    result = split_run[0]["data"]["made-up"]["compact encoder"]
    monkeypatch.setattr(split, "compact_opener", lambda backend, texts: None)
    monkeypatch.setattr(split, "measure", lambda *args, **kwargs: result)
    out = tmp_path / "x.json"
    for kind in ("encoder", "causal", "causal"):
        assert split.main(["--compact", kind, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report["data"]["made-up"]) == ["compact encoder", "compact causal"]
    assert len(report["commands"]) == 2
    assert [goal["value"] for goal in report["goals"][::2]] == [split.worst(result)] * 2
    split.main(["--quick", "--compact", "causal", "--out", str(out)])
    assert list(json.loads(out.read_text())["data"]["made-up"]) == ["compact causal"]


@pytest.fixture(scope="module")
def split_model():
    """Made-up histories, and a model that knows the words of a few items."""
    (data,) = split.load_histories(None)
    opener = split.compact_opener("encoder", data.items.texts[:6])
    return data, split.open_with_adapters(opener(), data.items)


def test_split_attacks_what_the_adapters_make_of_a_text(split_model, monkeypatch):
    data, model = split_model
    generator = torch.Generator().manual_seed(0)
    adapters = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in model.lora.init(1, generator).items()
    }
    monkeypatch.setattr(split, "train", lambda *args: (adapters, []))
    run = split.attack(model, data, split.QUICK, 0, 1e-3)
    assert run["frozen"][0] == run["trained"][0]  # no adapter has acted on the embedded tokens
    assert run["frozen"][1:] != run["trained"][1:]
    assert split.mean_curve([run, run], "frozen") == run["frozen"]


def test_split_trains_on_the_histories(split_model):
    data, model = split_model
    windows, targets = data.windows(data.some_users(8, 0))
    effort = replace(split.QUICK, steps=10, batch=8)
    adapters, (first, last) = split.train(model, windows, targets, effort, 0, 1e-2)
    assert last < first
    assert all(value.abs().max() > 0 for value in adapters.values())


def test_split_sees_a_difference(split_model, monkeypatch):
    """Another answer of the server must show, or the comparison proves nothing."""
    data, model = split_model
    tokens, mask = split.read(model.histories, data.windows(data.some_users(2, 0))[0])
    rows = split.differences(model, tokens, mask)
    assert max(row["output_difference"] for row in rows) < 1e-6

    class Contrary(split.MiddleServer):
        def forward(self, hidden, calls, tensors, *, train):
            output, run = super().forward(hidden, calls, tensors, train=train)
            return -output, run

    monkeypatch.setattr(split, "MiddleServer", Contrary)
    rows = split.differences(model, tokens, mask)
    assert rows[0]["output_difference"] > 1e-3
    assert rows[0]["gradient_difference"] > 1e-3
    assert rows[1]["output_difference"] < 1e-6  # no layer is left for the server
    nothing = {"a": torch.ones(1), "b": torch.tensor([torch.nan])}
    assert np.isnan(split._relative(nothing, {"a": torch.ones(1), "b": torch.ones(1)}))


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize("max_tokens", [20, 9, 6])
def test_split_numbers_tokens_by_their_titles(newest_first, max_tokens):
    pieces = split_pieces()
    form = split.TextForm(
        pieces, (90, 91), (92,), 0, max_tokens, newest_first=newest_first, between=1
    )
    windows = np.array([[0, 1, 2], [2, -1, -1], [1, 0, -1]])
    tokens, _ = form.read(windows)
    numbers = split.title_numbers(form, windows)
    assert numbers.shape == tokens.shape
    for row, window, own in zip(numbers, windows, tokens, strict=True):
        kept = [code for code in window if code >= 0]
        kept = [code for code in kept if set(pieces[code][1:]) & set(own)]  # there is room for it
        order = kept if newest_first else kept[::-1]
        for number, code in enumerate(order):
            inside = pieces[code][1:]  # without what stands between titles
            assert set(own[row == number]) == set(inside) & set(own)
        assert not set(own[row < 0]) & {token for code in kept for token in pieces[code][1:]}


def split_pieces():
    """Tokens of three items, each after what stands between titles, 50."""
    return TokenRows.of([[50, 1, 2], [50, 3], [50, 4, 5, 6, 7]])


def test_split_suggests_layers_or_says_none():
    curve = [
        {"layer": j, "nearest_token": 0.0, "linear_inverter": rate}
        for j, rate in enumerate([1.0, 0.8, 0.4, 0.3, 0.6])
    ]
    assert split.suggestions(curve) == {"0.9": 1, "0.75": 2, "0.5": 2, "0.25": None, "0.1": None}


def test_split_takes_names_not_folders(tmp_path):
    folder = tmp_path / "some-model"
    arguments = split.parse(["--compact", "none", "--backbone", str(folder)])
    assert arguments.paths == {"some-model": str(folder)}
    assert arguments.repeat.endswith("--compact none --backbone some-model")
    with pytest.raises(SystemExit):
        split.parse(["--compact", "none"])


def test_split_needs_titles(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("user_id,item_id\n1,2\n")
    with pytest.raises(SystemExit, match="rows has no titles"):
        list(split.load_histories([path]))


# -------------------------------------------------------------------- scale


def test_scale_makes_up_distinct_pairs_with_power_laws():
    X = scale.generate(3_000, 500)
    assert np.array_equal(X, scale.generate(3_000, 500))
    assert len(np.unique(X, axis=0)) == len(X)
    activity, popularity = (np.bincount(column) for column in X.T)
    assert activity.shape == (3_000,)
    assert popularity.shape == (500,)
    assert activity.min() >= 1
    assert popularity.min() >= 1
    assert activity.max() > 10 * np.median(activity)
    assert popularity.max() > 10 * np.median(popularity)
    assert np.any(np.diff(X[:, 0]) < 0)  # rows are not in order


@pytest.mark.parametrize("objective", ["whole-data", "bce"])
def test_scale_measures_what_takes_part(objective):
    point = scale.Point(objective, 60, 30, 60, 3, rounds=2, ranked=7)
    row = scale.measure(point)
    assert row["rows"] == row["round_rows"] == len(scale.generate(60, 30))
    assert row["round"] > 0
    assert row["reading"] > 0
    assert row["rounds_together"] >= 2 * row["round"] * 0.99
    assert (row["refit"] is None) == (objective == "bce")
    assert 0.05 < row["peak_gib"] < 64
    part = scale.measure(replace(point, cohort=15))
    assert part["round_rows"] < row["rows"] / 2
    assert part["bytes_down"] * 4 == row["bytes_down"]


def scale_row(point, **changes):
    measured = {
        "rows": 1_000, "round_rows": float(point.cohort), "reading": 1.0, "round": 0.5,
        "rounds_together": 5.0, "refit": 2.0, "ranking": 0.01, "peak_gib": 2.0, "bytes_up": 3e6,
        "bytes_down": 4e6,
    }  # fmt: skip
    return {**vars(point), **measured, **changes}


def test_scale_asks_for_costs_that_follow_the_rows():
    plan = replace(scale.FULL, sweeps={"whole-data": scale.FULL.sweeps["whole-data"]})
    base = plan.base
    flat = [scale_row(point) for point in plan.points()]
    population, cohort, memory = scale.goals_of(flat, plan)
    assert population.value == 1.0
    assert cohort.value == pytest.approx(0.1)
    assert memory.value == 2.0
    slow = {
        replace(base, clients=1_000_000): {"round": 0.7},
        replace(base, cohort=10_000): {"round": 6.5},
        plan.large: {"peak_gib": 9.0},
    }
    rows = [scale_row(point, **slow.get(point, {})) for point in plan.points()]
    population, cohort, memory = goals = scale.goals_of(rows, plan)
    assert population.value == pytest.approx(1.4)
    assert cohort.value == pytest.approx(1.3)
    assert memory.value == 9.0
    assert not any(goal.held for goal in goals)


def test_scale_varies_one_number_at_a_time():
    base = vars(scale.FULL.base)
    points = scale.FULL.points()
    assert len(points) == len(set(points))
    for point in points:
        if point != scale.FULL.large:
            differ = [name for name, value in vars(point).items() if value != base[name]]
            assert len(set(differ) - {"objective"}) <= 1
    rows = [scale_row(point) for point in points]
    for name in scale.VARIED:
        values = [row[name] for row in scale.along(rows, scale.FULL, "whole-data", name)]
        assert len(values) == 3
        assert values == sorted(values)


def test_scale_takes_the_lowest_of_several_runs():
    point = scale.FULL.base
    runs = [scale_row(point, round=3.0, refit=None), scale_row(point, round=2.0, refit=None)]
    assert scale.quietest(runs) == scale_row(point, round=2.0, refit=None)


def test_scale_end_to_end(tmp_path, monkeypatch, capsys):
    measured = []

    def near(point):  # and not in another process, which takes as long to import
        measured.append(point)
        return scale_row(point)

    monkeypatch.setattr(scale, "measure_apart", near)
    out, figure = tmp_path / "scale.json", tmp_path / "scale.png"
    assert scale.main(["--quick", "--out", str(out), "--figure", str(figure)]) == 0
    assert measured == scale.QUICK.points()
    assert figure.stat().st_size > 1_000
    report = json.loads(out.read_text())
    assert report["goals"] == []
    text = tables.rewrite("<!-- scale -->\n<!-- /scale -->", {"scale": report}, tables.SECTIONS)
    assert "**2,000 clients, 200 items, 2 rounds of 50, d = 4; 20 users ranked**" in text
    assert "| 500 clients | 1,000 | 50 | 1.0 | 0.500 | 2.0 | 100 | 2.00 | 3.0 | 4 |" in text
    assert "500 clients" in capsys.readouterr().out
    text = tables.rewrite("<!-- scale -->\n<!-- /scale -->", {"scale": report}, tables.OF_SCALE)
    assert text.count("\n|") == 2 + 3  # each point once
    assert "| whole-data | 500 | 200 | 50 | 50 | 1.0 | 0.500 | 2.0 | 2.00 |" in text


def test_scale_measures_one_point_when_asked_to(capsys):
    point = scale.Point("whole-data", 40, 20, 10, 2, rounds=1, ranked=3)
    assert scale.main(["--point", json.dumps(vars(point))]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {name: row[name] for name in vars(point)} == vars(point)
    with pytest.raises(SystemExit, match="drop --data"):
        scale.main(["--data", "ml-100k"])


# ------------------------------------------------------------------- faults


def test_faults_make_slow_clients_of_those_with_much_to_train():
    rows = np.random.default_rng(0).zipf(1.7, 2_000).clip(max=500)
    made = faults.Federation.of(np.column_stack([np.repeat(np.arange(2_000), rows)] * 2), seed=1)
    assert made.users.tolist() == list(range(2_000))
    assert made.rows.tolist() == rows.tolist()
    slow = np.array([made.groups[user] == "slow" for user in range(2_000)])
    assert slow.mean() == pytest.approx(1 - faults.IN_TIME, abs=1e-3)
    np.testing.assert_array_equal(slow, made.seconds * rows > 1)
    found = np.corrcoef(np.log(rows), np.log(made.seconds))[0, 1]
    assert found == pytest.approx(faults.SPEED_CORRELATION, abs=0.05)
    again = faults.Federation.of(np.column_stack([np.repeat(np.arange(2_000), rows)] * 2), seed=1)
    assert again.seconds.tolist() == made.seconds.tolist()


def test_faults_know_the_hours():
    hours, day = np.array([0, 12, 23]), range(24, 48)
    there = np.array([faults.Clock(hours, 8)(number, hours) for number in day])
    assert there.sum(axis=0).tolist() == [8] * 3
    assert there[:, 2].nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 23]
    federation = faults.Federation(np.arange(4), np.array([9, 1, 5, 2]), np.ones(4), np.zeros(4))
    clock = faults.day_and_night(federation)
    assert clock(3, federation.users).tolist() == [True, False, True, False]
    assert clock(12, federation.users).tolist() == [False, True, False, True]


def test_faults_run_and_write(only_tiny, monkeypatch, tmp_path, capsys):
    names = [faults.RELIABLE, faults.RANDOM, "the same 8 hours for all", "deadline"]
    monkeypatch.setattr(faults, "CASES", {name: faults.CASES[name] for name in names})
    out = tmp_path / "faults.json"
    assert faults.main(["--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    rows = report["data"]["tiny"]["rows"]
    assert [row["case"] for row in rows] == names * 2
    for reliable, dropped, away, late in (rows[:4], rows[4:]):
        assert reliable["asked"] == reliable["clients"] == dropped["asked"] == [8.0]
        assert dropped["clients"][0] < 7
        assert away["idle"][0] == pytest.approx(16 / 26)
        assert late["late"][0] > 0
        assert late["waited"][0] <= 1 < reliable["waited"][0]
    text = tables.rewrite("<!-- faults -->\n<!-- /faults -->", {"faults": report}, tables.OF_ROBUST)
    assert f"| 30% drop out | {rows[1]['ndcg@20'][0]:.4f} ± 0.0000 |" in text
    assert "**tiny, FedFNN: who is in time**" in text
    assert "62%" in capsys.readouterr().out
    (kept, lost) = faults.goals_of(
        "x", [row | {"ndcg@20": [0.5 if row["case"] != faults.RANDOM else 0.48]} for row in rows]
    )
    assert kept.value == lost.value == 0.96


# -------------------------------------------------------------- compression


def test_compression_runs_and_writes(monkeypatch, data, tmp_path, capsys):
    monkeypatch.setattr(compression, "load", lambda paths, quick: [data])
    out, figure = tmp_path / "compression.json", tmp_path / "compression.png"
    assert compression.main(["--quick", "--out", str(out), "--plot", str(figure)]) == 0
    assert figure.stat().st_size > 1_000
    report = json.loads(out.read_text())
    rows = report["data"]["tiny"]["rows"]
    assert len(rows) == 3 * (1 + 3 * 2 + 1)
    assert report["goals"] == []
    printed = capsys.readouterr().out
    assert "low-rank, rank 1" in printed
    place = "<!-- compression -->\n<!-- /compression -->"
    for places in (tables.SECTIONS, tables.OF_COMMUNICATION):
        text = tables.rewrite(place, {"compression": report}, places)
        assert text.count("| as they are | ") == text.count("| 16 bits | ") == 3


def compression_row(ndcg, up, **params):
    return {"method": "FedFNN, whole-data", **params, "ndcg@20": ndcg, "mb_up": up, "mb_down": up}


def test_compression_goals_and_losses(monkeypatch):
    monkeypatch.setattr(compression, "METHODS", {"FedFNN, whole-data": None})
    packed = {"compression": "low-rank", "error_feedback": True}
    rows = [
        compression_row([0.4, 0.6], [80.0, 120.0]),
        compression_row([0.4, 0.598], [9.0, 11.0], **packed, compression_level=1),
        compression_row([0.3, 0.3], [1.0, 1.0], **packed, compression_level=2),
        compression_row([0.3, 0.3], [1.0, 1.0], secure_aggregation=True, secure_bits=16),
        compression_row([0.4, 0.601], [1.0, 1.0], secure_aggregation=True, secure_bits=32),
    ]
    fewer, change = compression.goals_of("ml", rows)
    assert fewer.value == pytest.approx(10)
    assert change.value == pytest.approx(0.0005)
    assert fewer.held
    assert change.held
    assert compression.loss_of(rows[3], rows[0]) == pytest.approx(0.2)
    fewer, _ = compression.goals_of("ml", [row for row in rows if row["ndcg@20"] != [0.4, 0.598]])
    assert not fewer.held


# ------------------------------------------------------------------ attacks


def attack_row(attack, defence, ndcg, exposure=()):
    cells = {"method": "FedAvg", "attack": attack, "defence": defence}
    return {**cells, "ndcg@20": ndcg, "er@10": list(exposure), "seconds": [1.0]}


def test_attacks_are_judged_from_where_nobody_lies_and_nobody_defends():
    rows = [
        attack_row("none", "none", [0.3, 0.5], [0.1, 0.0]),
        attack_row("none", "clip", [0.36, 0.4], [0.0, 0.0]),
        attack_row("gradient", "none", [0.2, 0.2], [0.9, 0.9]),
        attack_row("gradient", "clip", [0.4, 0.4], [0.1, 0.04]),
        attack_row("scale", "clip", [0.39, 0.4]),
        attack_row("scale", "median", [0.0]),
    ]
    kept, moved = attacks.goals_of("ml", rows)
    assert kept.value == pytest.approx(0.38 / 0.4)  # what the defence itself costs counts
    assert kept.held
    assert moved.value == pytest.approx(0.02)
    assert moved.held
    header, lines = attacks.table_of(rows, "FedAvg", "er@10")
    assert header == ["", "none", "clip", "median"]
    assert lines[1] == ["gradient", "0.900 ± 0.000", "0.070 ± 0.042", ""]
    assert [line[0] for line in lines] == ["none", "gradient"]
    rows[3]["er@10"] = [0.2, 0.2]
    rows[4]["ndcg@20"] = [0.3, 0.3]
    assert not any(goal.held for goal in attacks.goals_of("ml", rows))


def test_a_fit_that_an_attack_ends_ranks_nothing(data, monkeypatch):
    found = attacks.run(data, "FedFNN", "gradient", "clip", 1)
    assert found["ndcg@20"][0] > 0
    assert found["er@10"][0] <= 1

    def end(self, X):
        raise FloatingPointError("Training diverged.")

    monkeypatch.setattr(attacks.FedFNNRecommender, "fit", end)
    found = attacks.run(data, "FedFNN", "gradient", "clip", 1)
    assert (found["ndcg@20"], found["er@10"], found["seconds"]) == ([0.0], [], [])


# ------------------------------------------------------------------ privacy


def test_privacy_end_to_end(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("dp_accounting")
    larger = replace(data, name="larger", clients=None)
    monkeypatch.setattr(privacy, "load", lambda paths, quick: [data, larger])
    monkeypatch.setattr(privacy, "MANY_USERS", 10**9)
    out, figure = tmp_path / "privacy.json", tmp_path / "privacy.png"
    words = ["--quick", "--out", str(out)]
    if importlib.util.find_spec("matplotlib"):
        words += ["--figure", str(figure)]
    assert privacy.main(words) == 0
    assert figure.is_file() == ("--figure" in words)
    report = json.loads(out.read_text())
    assert report["goals"] == []
    points = report["data"]["tiny"]["points"]
    assert [(p["privacy"], p["objective"], p["epsilon"]) for p in points] == [
        ("none", "whole-data", None),
        ("central", "whole-data", 8),
        ("local", "whole-data", 512),
        ("none", "bce", None),
        ("central", "bce", 8),
    ]
    assert points[0]["ndcg@20"][0] > points[2]["ndcg@20"][0]
    text = "<!-- privacy -->\n<!-- /privacy -->"
    filled = tables.rewrite(text, {"privacy": report}, tables.SECTIONS)
    assert "**tiny, 40 users, " in filled
    assert f"| 512 | {points[2]['ndcg@20'][0]:.3f} |" in filled
    assert "no privacy" in capsys.readouterr().out


def test_privacy_asks_for_more_than_popularity():
    points = [
        {"privacy": "central", "objective": one, "epsilon": 8, "ndcg@20": scores}
        for one, scores in (("bce", [0.1, 0.1]), ("whole-data", [0.2, 0.4]))
    ]
    (goal,) = privacy.goals_of({"ml": {"popularity": [0.2, 0.2], "points": points}})
    assert goal.value == pytest.approx(1.5)
    json.dumps(goal.as_dict())
    assert goal.held


# -------------------------------------------------------------- reliability

TALLY = {
    "metrics / cases": 7, "metrics / accepted": 4, "metrics / refused": 3, "archives / cases": 5,
    "archives / refused": 5, "archives / faults": 9,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["integers", "text"])
def test_reliability_measures_rows_of_both_kinds(kind):
    row = reliability.measure(reliability.Point(kind, 400, 60, 30))
    assert (row["found_rows"], row["users"], row["found_items"]) == (400, 60, 30)
    assert row["fit"] > 0
    assert 0.05 < row["peak_gib"] < 64


def test_reliability_counts_by_area():
    areas = reliability.areas_of(TALLY)
    assert areas["metrics"] == {
        "cases": 7, "accepted": 4, "refused": 3, "faults": 0, "undocumented": 0,
    }  # fmt: skip
    report = {"drawn": {"areas": areas, "tests": 2, "failed": 0}, "points": []}
    assert reliability.total(report, "cases") == 12
    undocumented, failed, cases = reliability.goals_of(report)
    assert undocumented.held
    assert failed.held
    assert not cases.held
    areas["metrics"]["undocumented"] = 1
    assert not reliability.goals_of(report)[0].held


def test_reliability_end_to_end(tmp_path, monkeypatch, capsys):
    started = []

    def near(point):  # and not in another process, which takes as long to import
        started.append(point)
        measured = {"found_rows": 9, "users": 3, "found_items": 2, "coding": 1.0, "fit": 2.0}
        return {**vars(point), **measured, "peak_gib": 0.5}

    class Done:
        returncode, stdout, stderr = 1, "1 failed", ""

    def run(words, *, env, **rest):
        started.append(env["FEDRECSK_EXAMPLES"])
        Path(env["FEDRECSK_TALLY"]).write_text(json.dumps(TALLY))
        report = next(word for word in words if word.startswith("--junitxml="))
        suite = '<testsuites><testsuite tests="3" failures="1" errors="0"/></testsuites>'
        Path(report.removeprefix("--junitxml=")).write_text(suite)
        return Done()

    monkeypatch.setattr(reliability, "measure_apart", near)
    monkeypatch.setattr(reliability.subprocess, "run", run)
    out = tmp_path / "reliability.json"
    assert reliability.main(["--quick", "--out", str(out)]) == 1  # a property did not hold
    assert started == [*reliability.QUICK.points, str(reliability.QUICK.multiple)]
    report = json.loads(out.read_text())
    assert report["goals"] == []
    assert "together" in capsys.readouterr().out
    text = "<!-- reliability -->\n<!-- /reliability -->"
    filled = tables.rewrite(text, {"reliability": report}, tables.SECTIONS)
    assert "**3 properties, 0.05 times the examples of CI**" in filled
    assert "| archives | 5 | 0 | 5 | 9 | 0 |" in filled
    text = "<!-- rows -->\n<!-- /rows -->\n<!-- cases -->\n<!-- /cases -->"
    filled = tables.rewrite(text, {"reliability": report}, tables.OF_RELIABILITY)
    assert "| text, DataFrame | 9 | 3 | 2 | 1.0 | 2.0 | 0.50 |" in filled
    assert "| together | 12 | 4 | 8 | 9 | 0 |" in filled
    with pytest.raises(SystemExit, match="drop --data"):
        reliability.main(["--data", "ml-100k"])


def test_reliability_says_where_the_tests_did_not_run(monkeypatch):
    class Failed:
        returncode, stdout, stderr = 4, "no such option", "hypothesis is missing"

    monkeypatch.setattr(reliability.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(SystemExit, match=r"did not run(.|\n)*hypothesis is missing"):
        reliability.draw(1.0)


# ------------------------------------------------------------------- tables

REPORT = {
    "command": "python benchmarks/accuracy.py",
    "machine": {"cpu": "Abacus", "cores": 2, "python": "3.11", "torch": "2", "numpy": "2"},
    "goals": [common.Goal("tuned", 0.5, 0.4).as_dict()],
    "data": {
        "ml": {
            "interactions": 1_000, "users": 10, "items": 20, "judged_users": 10,
            "tuning": {"FedFNN": {"chosen": {"l2": 0.05}}, "ALS": {"chosen": {}}},
            "results": [
                {"method": "FedFNN", "setting": "tuned", "ndcg@20": [0.4, 0.6],
                 "recall@20": [0.1, 0.1], "seconds": [1.0, 3.0]},
            ],
        }
    },
}  # fmt: skip


def test_tables_fill_their_places_only():
    text = "before\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nafter\n"
    filled = tables.rewrite(text, {"accuracy": REPORT}, tables.SECTIONS)
    assert filled.startswith("before\n<!-- accuracy -->\n")
    assert filled.endswith("<!-- /accuracy -->\nafter\n")
    assert "old" not in filled
    assert "| FedFNN, tuned | 0.5000 ± 0.1414 | 0.1000 ± 0.0000 | 2.00 |" in filled
    assert "Tuned: FedFNN: l2 0.05; ALS: the defaults." in filled
    assert "| tuned | 0.5 | ≥ 0.4 | yes |" in filled
    assert tables.rewrite(filled, {"accuracy": REPORT}, tables.SECTIONS) == filled


def test_tables_leave_places_without_results_alone():
    text = "<!-- cohort_speed -->\nas before\n<!-- /cohort_speed -->\n"
    assert tables.rewrite(text, {"accuracy": REPORT}, tables.SECTIONS) == text


def test_tables_of_speed():
    seconds = {
        "engine, batches of 64": [1.0, 2.0],
        "engine, full batch": [0.5, 0.5],
        "centralised": [2.0, 4.0],
        "pfl, full batch": [5.0, 5.0],
        "whole-data round": [0.1, 0.1],
    }
    result = {"users": 10, "examples": 3_000_000, "seconds": seconds}
    report = {**REPORT, "goals": [], "data": {"ml": result}}
    text = tables.rewrite(
        "<!-- cohort_speed -->\n<!-- /cohort_speed -->", {"cohort_speed": report}, tables.SECTIONS
    )
    assert "| engine, batches of 64 | 1.500 | 2.00 | 1.0 |" in text
    assert "| centralised | 3.000 | 1.00 | 2.0 |" in text
    assert "| pfl, full batch | 5.000 | 0.60 | 10.0 |" in text
    assert "| whole-data round | 0.100 |  |  |" in text
