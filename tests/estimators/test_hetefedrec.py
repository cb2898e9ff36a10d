"""HeteFedRec: sizes and groups, who learns from whom, and what a user is scored with."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.base import clone

from fedrecsk import (
    FedAvgRecommender,
    HeteFedRecRecommender,
    PopularityRecommender,
    UnknownIdWarning,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.engine import shards as shards_module
from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators import _hetefedrec, _sizes
from fedrecsk.estimators._factors import hold_out, make_shards
from fedrecsk.methods.nested_state import NestedState, Sizes
from fedrecsk.metrics import evaluate
from fedrecsk.model_selection import PerUserHoldout
from fedrecsk.models.factors import random_factors
from fedrecsk.models.head import head_of, init_head, network_size
from fedrecsk.models.whole_data import default_l2, default_unobserved_weight
from tests.reference.ncf_reference import logit, propagated, train_cohort
from tests.reference.whole_data_reference import solve_user, strength

FAST = {"sizes": (2, 4, 8), "n_rounds": 4, "random_state": 0, "device": "cpu"}
BASES = ("mf", "ncf", "lightgcn")
BASE = pytest.mark.parametrize("base", BASES)
ARRAYS = ("user_factors_", "item_factors_", "item_bias_", "item_tables_", "item_biases_")
NETWORKS = (*ARRAYS, "network_")


@pytest.fixture(scope="module")
def skewed():
    """Eighty users with 2 to 18 of 30 items, the later ones with more."""
    rng = np.random.default_rng(0)
    counts = np.sort(rng.integers(2, 19, 80))
    return np.array(
        [[user, item] for user in range(80) for item in rng.choice(30, counts[user], replace=False)]
    )


def networks_of(model):
    """The predictor of each size."""
    ends = np.cumsum([network_size(width) for width in model.sizes_.tolist()])
    parts = np.split(model.network_, ends[:-1])
    return [
        {name: value.double() for name, value in head_of(torch.from_numpy(part), width).items()}
        for part, width in zip(parts, model.sizes_.tolist(), strict=True)
    ]


def seen_by(model, user):
    return model.seen_indices_[slice(*model.seen_indptr_[user : user + 2])].tolist()


# ---------------------------------------------------------------- groups


def test_clients_with_more_rows_get_larger_models(skewed):
    model = HeteFedRecRecommender(**FAST).fit(skewed)
    counts = np.bincount(skewed[:, 0])
    assert np.bincount(model.client_groups_).tolist() == [40, 24, 16]
    # Users are sorted by their rows, so ties go to the lower group in the order of ids.
    assert model.client_groups_.tolist() == [0] * 40 + [1] * 24 + [2] * 16
    assert counts[39] == counts[40]
    np.testing.assert_array_equal(model.client_sizes_, np.array([2, 4, 8])[model.client_groups_])
    np.testing.assert_array_equal(model.user_sizes_, model.client_sizes_)
    np.testing.assert_array_equal(model.user_clients_, np.arange(80))
    assert model.sizes_.tolist() == model.group_sizes_.tolist() == [2, 4, 8]
    np.testing.assert_allclose(model.group_ratio_, [0.5, 0.3, 0.2])
    inside = np.arange(8) < model.user_sizes_[:, None]
    assert (model.user_factors_[~inside] == 0).all()
    assert (model.user_factors_[inside] != 0).all()
    for x, width in enumerate((2, 4, 8)):
        assert (model.item_tables_[x][:, width:] == 0).all()


def test_users_of_a_client_share_its_size(skewed):
    model = HeteFedRecRecommender(**FAST, group_ratio=(1, 2, 1)).fit(skewed, skewed[:, 0] % 8)
    assert np.bincount(model.client_groups_).tolist() == [2, 4, 2]
    np.testing.assert_array_equal(model.user_clients_, np.arange(80) % 8)
    np.testing.assert_array_equal(model.user_sizes_, model.client_sizes_[np.arange(80) % 8])
    rows = np.bincount(skewed[:, 0] % 8)
    assert rows[model.client_sizes_ == 2].max() <= rows[model.client_sizes_ == 4].min()
    assert rows[model.client_sizes_ == 4].max() <= rows[model.client_sizes_ == 8].min()


@pytest.mark.parametrize("kind", ["mapping", "array", "list"])
def test_a_caller_gives_the_sizes_of_clients(kind, skewed):
    given = {user: (3, 6)[user % 2] for user in range(80)}
    client_sizes = {
        "mapping": {**given, 999: 64},  # of a client that is not in the data
        "array": np.array(list(given.values())),
        "list": list(given.values()),
    }[kind]
    model = HeteFedRecRecommender(**FAST, client_sizes=client_sizes).fit(skewed)
    np.testing.assert_array_equal(model.client_sizes_, list(given.values()))
    assert model.group_sizes_.tolist() == model.sizes_.tolist() == [3, 6]
    np.testing.assert_array_equal(model.client_groups_, np.arange(80) % 2)
    np.testing.assert_allclose(model.group_ratio_, [0.5, 0.5])
    if kind == "mapping":
        del client_sizes[7]
        with pytest.raises(ValueError, match=r"client_sizes has no entry for 1 of the 80 clients"):
            model.fit(skewed)


def test_sizes_and_ratio_may_be_any_sequence(skewed, assert_same_fit):
    expected = HeteFedRecRecommender(**FAST, group_ratio=(5, 3, 2)).fit(skewed)
    for sizes, ratio in (
        (np.array([2, 4, 8]), np.array([0.5, 0.3, 0.2])),
        ([2, 4, 8], [5, 3, 2]),
        (np.array([2, 4, 8], dtype=np.int32), (10, 6, 4)),
    ):
        model = HeteFedRecRecommender(**FAST | {"sizes": sizes}, group_ratio=ratio).fit(skewed)
        np.testing.assert_allclose(model.group_ratio_, expected.group_ratio_)
        model.group_ratio_ = expected.group_ratio_
        assert_same_fit(model, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (2, 4)}, r"sizes has 2 entries and group_ratio 3"),
        ({"sizes": (4, 2, 8)}, r"sizes must ascend, found \(4, 2, 8\)"),
        ({"sizes": (0, 2, 8)}, r"sizes holds 0; a size is .* an integer of at least 1"),
        ({"sizes": (2, 4.5, 8)}, r"sizes holds 4\.5; a size is"),
        ({"sizes": (True, 4, 8)}, r"sizes holds True; a size is"),
        ({"sizes": ("2", "4", "8")}, r"sizes holds '2'; a size is"),
        ({"sizes": (0, 2, 8), "group_ratio": "auto"}, r"sizes holds 0; a size is"),
        ({"group_ratio": (5, -3, 2)}, r"ratio must hold finite numbers of at least 0"),
        ({"sizes": "auto", "group_ratio": (0, 0)}, r"ratio must hold finite numbers"),
        ({"client_sizes": [8, 16]}, r"client_sizes"),
        ({"base_model": "lightgcn", "batch_size": 8}, r"batch_size must be None, found 8"),
        ({"alpha": 0.1}, r'alpha must be 0 or "auto" with base_model="mf", found 0\.1'),
        ({"distill_fraction": 0.1}, r'distill_fraction must be 0 or "auto"'),
        ({"aggregation": "standalone"}, r'aggregation="standalone" needs base_model='),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message, skewed):
    with pytest.raises(ValueError, match=message):
        HeteFedRecRecommender(**FAST | changes).fit(skewed)


# ---------------------------------------------------------------- sizes that are chosen


@pytest.fixture(scope="module")
def tastes():
    """Rows of users with five tastes, whose activity has a heavy tail."""
    return make_interactions(
        150, 80, 5, mean_interactions=15, activity_exponent=1.5, return_X_y=True,
        random_state=0,
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": "auto", "group_ratio": "auto"},
        {"sizes": "auto"},
        {"sizes": "auto", "group_ratio": (1, 1)},
        {"group_ratio": "auto"},
        {"sizes": [4, 4, 32], "group_ratio": "auto"},
    ],
    ids=str,
)
def test_chosen_sizes_ascend_with_what_clients_have(changes, tastes, assert_same_fit):
    model = HeteFedRecRecommender(**FAST | {"n_rounds": 1} | changes).fit(tastes)
    sizes, ratio = model.group_sizes_, model.group_ratio_
    assert (np.diff(sizes) >= 0).all()
    assert len(sizes) == len(ratio)
    assert ratio.sum() == pytest.approx(1.0)
    candidates = (4, 8, 16, 32, 64) if changes.get("sizes") == "auto" else changes.get("sizes")
    assert set(sizes) <= set(candidates or (2, 4, 8))
    counts = np.bincount(tastes[:, 0].astype(int))
    assert (np.diff(model.client_sizes_[np.argsort(counts, kind="stable")]) >= 0).all()
    assert_same_fit(HeteFedRecRecommender(**FAST | {"n_rounds": 1} | changes).fit(tastes), model)
    # What was chosen stays when a fit goes on.
    model.partial_fit(tastes[:1])
    np.testing.assert_array_equal(model.group_sizes_, sizes)
    np.testing.assert_allclose(model.group_ratio_, ratio)


def test_small_sizes_are_chosen_where_they_are_enough(tastes):
    """Without tastes popularity is all there is: one direction."""
    for seed in range(2):
        X, _ = make_interactions(
            150, 80, 1, mean_interactions=15, return_X_y=True, random_state=seed
        )
        model = HeteFedRecRecommender(sizes="auto", group_ratio="auto", n_rounds=1, device="cpu",
                                      random_state=0).fit(X)  # fmt: skip
        assert model.group_sizes_.tolist() == [4]
    # Five tastes need more than four columns, with four they cannot be told apart.
    model.fit(tastes)
    assert model.group_sizes_.max() > 4


@pytest.mark.parametrize(
    ("best", "expected"),
    [((0, 1, 2), [4, 8, 16]), ((2, 0, 1), [16, 16, 16]), ((0, 3, 0), [4, 32, 32])],
    ids=str,
)
def test_no_group_has_a_smaller_size_than_one_with_less(best, expected, skewed, monkeypatch):
    """Each group's best size counts, and what the groups before it have."""
    group = np.repeat([0, 1, 2], [40, 24, 16])

    def planted(*_):
        quality = np.full((80, 5), 0.1)
        for number, column in enumerate(best):
            quality[group == number, column] = 0.9
        return quality, np.arange(80)

    monkeypatch.setattr(_sizes, "_quality_of_sizes", planted)
    model = HeteFedRecRecommender(**FAST | {"sizes": "auto", "n_rounds": 1}).fit(skewed)
    assert model.group_sizes_.tolist() == expected


def test_choosing_sizes_needs_rows_to_hold_out():
    rows = [[user, user % 3] for user in range(9)]
    with pytest.raises(ValueError, match=r"hold out a part .* every user here has one"):
        HeteFedRecRecommender(sizes="auto", group_ratio="auto", n_rounds=1).fit(rows)


# ---------------------------------------------------------------- special cases are arguments


@BASE
@pytest.mark.parametrize("dual_task", [True, False])
def test_equal_sizes_are_one_size(base, dual_task, skewed):
    arguments = {**FAST, "dual_task": dual_task}
    three = HeteFedRecRecommender(base, **arguments | {"sizes": (8, 8, 8)}).fit(skewed)
    one = HeteFedRecRecommender(base, **arguments | {"sizes": (8,)}, group_ratio=(1,)).fit(skewed)
    for name in (*NETWORKS, "sizes_", "client_sizes_", "client_parameters_", "item_evidence_"):
        np.testing.assert_array_equal(getattr(three, name), getattr(one, name), err_msg=name)
    assert set(three.client_groups_) == {0, 1, 2}
    assert [r["bytes_up"] for r in three.history_] == [r["bytes_up"] for r in one.history_]
    np.testing.assert_array_equal(three.predict(skewed), one.predict(skewed))


@BASE
def test_one_size_is_fedavg(base, skewed):
    shared = {"n_rounds": 4, "random_state": 0, "device": "cpu", "sampling": "uniform"}
    shared |= {"clients_per_round": 0.3, "learning_rate": 0.2, "init_scale": 0.1, "l2": 0.01}
    shared |= {"local_epochs": 2, "batch_size": None, "optimizer": "sgd"}
    # Fitting users keeps the best of several vectors: near ties would be decided by rounding.
    shared |= {"server_optimizer": "sgd", "server_learning_rate": 0.5, "refit": base == "mf"}
    ours = HeteFedRecRecommender(
        base, sizes=(6,), group_ratio=(1,), denominator="clients", **shared
    ).fit(skewed)
    objective = "whole-data" if base == "mf" else "bce"
    theirs = FedAvgRecommender(base, n_factors=6, objective=objective, **shared).fit(skewed)
    for name in ("user_factors_", "item_factors_", "item_bias_", "network_"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, err_msg=name
        )
    for name in ("clients", "bytes_up", "bytes_down"):
        assert [r[name] for r in ours.history_] == [r[name] for r in theirs.history_]


def test_whether_to_solve_in_smaller_sizes_may_be_a_numpy_boolean(skewed, assert_same_fit):
    found, expected, other = (
        HeteFedRecRecommender(**FAST, dual_task=dual_task).fit(skewed)
        for dual_task in (np.True_, True, "auto")
    )
    np.testing.assert_array_equal(found.item_factors_, expected.item_factors_)
    assert not np.array_equal(found.item_factors_, other.item_factors_)


@pytest.mark.parametrize("switch", [
    {"dual_task": False}, {"alpha": 0}, {"distill_fraction": 0}, {"denominator": "clients"},
    {"client_weights": "uniform"}, {"aggregation": "clustered"}, {"contributors": "largest"},
    {"server_optimizer": "sgd"}, {"item_bias": False}, {"sampling": "uniform"},
], ids=str)  # fmt: skip
def test_every_mechanism_makes_a_difference(switch, skewed):
    full = HeteFedRecRecommender(
        "ncf", **FAST, client_weights="interactions", clients_per_round=0.5
    )
    without = clone(full).set_params(**switch).fit(skewed)
    assert not np.allclose(full.fit(skewed).item_factors_, without.item_factors_, atol=1e-5)
    assert np.isfinite(without.item_tables_).all()


# ---------------------------------------------------------------- who contributes


@pytest.fixture(scope="module")
def few_large():
    """32 users with 3 of 20 items, and 8 who together have them all, 12 each."""
    rng = np.random.default_rng(0)
    small = [[user, item] for user in range(32) for item in rng.choice(20, 3, replace=False)]
    large = [[32 + k, (3 * k + step) % 20] for k in range(8) for step in range(12)]
    return np.array(small), np.array(large)


@BASE
@pytest.mark.parametrize("refit", [True, False])
def test_of_clients_that_do_not_contribute_nothing_is_learned(base, refit, few_large):
    small, large = few_large
    model = HeteFedRecRecommender(
        base, sizes=(3, 6), group_ratio=(4, 1), contributors="largest", refit=refit, n_rounds=6,
        random_state=0, device="cpu", clients_per_round=0.5, dual_task=base != "mf",
    )  # fmt: skip
    one = clone(model).fit(np.concatenate([small, large]))
    moved = np.column_stack([small[:, 0], (small[:, 1] * 7 + 3) % 20])  # as many rows, others
    other = clone(model).fit(np.concatenate([moved, large]))
    for name in ("item_tables_", "item_biases_", "network_", "client_sizes_"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_array_equal(one.user_factors_[32:], other.user_factors_[32:])
    assert (one.user_factors_[:32, :3] != other.user_factors_[:32, :3]).any(1).all()
    assert {record["clients"] for record in one.history_} == {4}
    # The small ones are served with vectors that fit what they have.
    table = one.predict(list(itertools.product(range(32), range(20)))).reshape(32, 20)
    own = np.zeros((32, 20), dtype=bool)
    own[small[:, 0], small[:, 1]] = True
    assert table[own].mean() > table[~own].mean()
    if base == "mf":
        sizes = len(small) + len(large), 40, 20
        for user in range(32):
            held = small[small[:, 0] == user, 1].tolist()
            ridge = strength(3, sizes[0] / 40, default_l2(*sizes), 0.75)
            expected = solve_user(
                held, one.item_tables_[0][:, :3].astype(float), default_unobserved_weight(*sizes),
                ridge,
            )  # fmt: skip
            np.testing.assert_allclose(one.user_factors_[user, :3], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("every", "rounds"), [("epoch", [4, 8]), (3, [3, 6, 9]), (1, list(range(1, 10)))]
)
def test_when_tables_are_distilled(every, rounds, skewed):
    model = HeteFedRecRecommender(
        "ncf", **FAST | {"n_rounds": 9}, clients_per_round=0.25, distill_every=every, local_epochs=1
    ).fit(skewed)
    done = [r["round"] for r in model.history_ if r["distillation_loss"] is not None]
    assert done == rounds


@pytest.mark.parametrize("every", [1, 3, None])
def test_when_the_spectrum_is_looked_at(every, skewed):
    model = HeteFedRecRecommender(**FAST | {"n_rounds": 7}, report_every=every).fit(skewed)
    assert "distillation_loss" not in model.history_[0]
    names = ("effective_rank", "singular_value_variance")
    if every is None:
        assert not set(names) & set(model.history_[0])
        return
    for record in model.history_:
        for name in names:
            assert (record[name] is not None) == (record["round"] % every == 0)
    last = [r for r in model.history_ if r["effective_rank"] is not None][-1]
    assert 1 <= last["effective_rank"] <= 8
    if every == 1:
        values = np.linalg.eigvalsh(np.corrcoef(model.item_factors_.astype(float), rowvar=False))
        assert last["singular_value_variance"] == pytest.approx(
            ((values - 1) ** 2).mean(), rel=1e-4
        )


# ---------------------------------------------------------------- traffic


def test_a_mixed_federation_sends_half_of_what_a_large_one_does(skewed):
    arguments = FAST | {"sizes": (8, 16, 32)}
    mixed = HeteFedRecRecommender("ncf", **arguments, item_bias=False).fit(skewed)
    large = HeteFedRecRecommender(
        "ncf", **arguments | {"sizes": (32,)}, group_ratio=(1,), item_bias=False
    ).fit(skewed)
    expected = np.array([30 * 8 + 217, 30 * 16 + 217 + 345, 30 * 32 + 217 + 345 + 601])
    np.testing.assert_array_equal(mixed.client_parameters_, expected[mixed.client_groups_])
    assert set(large.client_parameters_) == {30 * 32 + 601}
    # Of tables alone, which are nearly all there is in a catalogue of a usual size.
    assert mixed.client_sizes_.mean() / 32 == pytest.approx(0.475)


@BASE
def test_bytes_down_are_the_models_of_the_participants(base, skewed):
    model = HeteFedRecRecommender(base, **FAST, clients_per_round=1.0).fit(skewed)
    per_round = 4 * model.client_parameters_.sum()
    if base == "mf":  # and the Gram matrix of the items
        per_round += 4 * (model.client_sizes_**2).sum()
    assert [record["bytes_down"] for record in model.history_] == [per_round] * 4
    again = HeteFedRecRecommender(base, **FAST, clients_per_round=0.25).fit(skewed)
    assert sum(record["bytes_down"] for record in again.history_) == per_round  # one epoch


# ---------------------------------------------------------------- scores


@BASE
def test_users_are_scored_with_the_model_of_their_size_alone(base, skewed):
    model = HeteFedRecRecommender(base, **FAST, aggregation="clustered").fit(skewed)
    pairs = np.array(list(itertools.product(range(80), range(30))))
    before = model.predict(pairs).reshape(80, 30)
    ids, scores = model.recommend(k=30, exclude_seen=False)
    for x, width in enumerate((2, 4, 8)):
        changed = clone(model).fit(skewed)
        others = [y for y in range(3) if y != x]
        changed.item_tables_[others] += 1.0
        changed.item_biases_[others] -= 3.0
        changed.item_factors_ += 1.0
        after = changed.predict(pairs).reshape(80, 30)
        mine = model.user_sizes_ == width
        np.testing.assert_array_equal(after[mine], before[mine])
        assert not np.isclose(after[~mine], before[~mine]).all(axis=1).any()
        again = changed.recommend(k=30, exclude_seen=False)
        np.testing.assert_array_equal(again[0][mine], ids[mine])
        np.testing.assert_array_equal(again[1][mine], scores[mine])


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": "ncf"},
        {"base_model": "lightgcn"},
        {"base_model": "lightgcn", "n_graph_layers": 2, "item_propagation": True},
        {"base_model": "mf"},
    ],
    ids=str,
)
def test_scores_are_those_of_the_definition(changes, skewed):
    model = HeteFedRecRecommender(**FAST | changes).fit(skewed)
    layers = model.n_graph_layers_
    assert layers == (
        changes.get("n_graph_layers", 1) if changes["base_model"] == "lightgcn" else 0
    )
    heads = networks_of(model) if changes["base_model"] != "mf" else None
    expected = np.empty((80, 30))
    for user in range(80):
        width = model.user_sizes_[user]
        x = model.sizes_.tolist().index(width)
        vector = torch.from_numpy(model.user_factors_[user, :width]).double()
        rows = np.column_stack([model.item_tables_[x][:, :width], model.item_biases_[x]])
        rows = torch.from_numpy(rows).double()
        if heads is None:
            expected[user] = rows[:, :width] @ vector
            continue
        vector, rows = propagated(
            vector, rows, seen_by(model, user), layers,
            items=changes.get("item_propagation", False),
        )  # fmt: skip
        expected[user] = [float(logit(vector, row, heads[x], item_bias=True)) for row in rows]
    pairs = list(itertools.product(range(80), range(30)))
    log_odds = 4 * (expected - 0.5) if heads is None else expected
    likely = 1 / (1 + np.exp(-log_odds))
    np.testing.assert_allclose(model.predict(pairs).reshape(80, 30), likely, atol=1e-7)
    ids, scores = model.recommend(k=30, exclude_seen=False)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, ids, axis=1), atol=1e-5)


@BASE
def test_strangers_get_the_mean_user_in_the_smallest_size(base, skewed):
    model = HeteFedRecRecommender(base, **FAST).fit(skewed)
    with pytest.warns(UnknownIdWarning):
        ids, scores = model.recommend([999, 5], k=30, exclude_seen=False)
    np.testing.assert_allclose(scores[1], model.recommend([5], k=30, exclude_seen=False)[1][0])
    users = torch.from_numpy(model.user_factors_[:, :2]).double()
    rows = np.column_stack([model.item_tables_[0][:, :2], model.item_biases_[0]])
    rows = torch.from_numpy(rows).double()
    if base == "mf":
        expected = (rows[:, :2] @ users.mean(0)).numpy()
    else:
        layers, head = model.n_graph_layers_, networks_of(model)[0]
        moved = [propagated(users[u], rows, seen_by(model, u), layers)[0] for u in range(80)]
        rows = propagated(users[0], rows, [], layers)[1]
        vector = torch.stack(moved).mean(0)
        expected = np.array([float(logit(vector, row, head, item_bias=True)) for row in rows])
    np.testing.assert_allclose(scores[0], expected[ids[0]], atol=1e-5)


# ---------------------------------------------------------------- everybody alone


@pytest.mark.parametrize("base", ["ncf", "lightgcn"])
def test_standalone_scores_are_those_of_clients_trained_one_by_one(base, skewed, assert_same_fit):
    X, layers = skewed[skewed[:, 0] >= 65], int(base == "lightgcn")
    model = HeteFedRecRecommender(
        base, sizes=(2, 4), group_ratio=(1, 1), aggregation="standalone", n_rounds=10,
        clients_per_round=0.2, local_epochs=3, n_negatives=2, random_state=0, device="cpu",
    ).fit(X)  # fmt: skip
    assert len(model.history_) == model.n_rounds_ == 1
    assert model.history_[0]["bytes_up"] == model.history_[0]["bytes_down"] == 0
    data, streams = model._interactions, Streams(0)
    shards = make_shards(data, slice(None), torch.device("cpu"))
    sizes = Sizes.of(model.client_sizes_)
    users, table = random_factors(
        data.n_users, data.n_items, 4, item_bias=True, init_scale=0.1, streams=streams,
        device=shards.device,
    )  # fmt: skip
    heads = [init_head(width, key=width, streams=streams) for width in (2, 4)]
    start = NestedState.start(users, table, heads, sizes, data.user_client)
    expected = np.empty((data.n_users, data.n_items))
    for client, x in enumerate(sizes.of_client):
        width = sizes.widths[x]
        (update,) = train_cohort(
            shards, [client], users[:, :width], start.tables[x], heads[x], item_bias=True,
            n_negatives=2, batch_size=None, local_epochs=6, optimizer=Optimizer("sgd", 0.3),
            l2=0.01, key=streams.key("examples", 0), n_graph_layers=layers,
        ).values()  # fmt: skip
        rows = start.tables[x].clone()
        for item, row in update.rows.items():
            rows[item] = row
        held = seen_by(model, client)
        vector, rows = propagated(update.user_vectors[client], rows, held, layers)
        expected[client] = [float(logit(vector, row, update.head, item_bias=True)) for row in rows]
    ids, scores = model.recommend(k=data.n_items, exclude_seen=False)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, ids, axis=1), atol=1e-4)
    # Going on is training anew: there is no server that would remember.
    first = clone(model).fit(X)
    model.partial_fit(X)
    assert [record["round"] for record in model.history_] == [1, 2]
    for name in ("private_rows_", "private_networks_", "user_factors_"):
        np.testing.assert_array_equal(getattr(model, name), getattr(first, name))
    with pytest.warns(UnknownIdWarning):
        assert np.isfinite(model.recommend([999], k=5)[1]).all()


# ---------------------------------------------------------------- going on, memory, divergence


@BASE
@pytest.mark.parametrize("aggregation", ["padded", "clustered"])
def test_a_federation_may_grow_from_a_single_client(base, aggregation, obvious):
    """At first there is nobody for the larger sizes."""
    model = HeteFedRecRecommender(base, **FAST | {"n_rounds": 8}, aggregation=aggregation)
    model.partial_fit(obvious[obvious[:, 0] == 0])
    assert model.sizes_.tolist() == [2]
    model.partial_fit(obvious[obvious[:, 0] < 3])
    assert model.sizes_.tolist() == [2, 8]
    model.set_params(n_rounds=1, report_every=None).partial_fit(obvious)
    assert model.sizes_.tolist() == [2, 4, 8]
    assert model.user_factors_.shape == (40, 8)
    assert np.isfinite(model.predict(obvious)).all()


def test_columns_of_a_size_that_is_new_continue_the_old_ones(obvious):
    """A user's vector and the items' first columns are kept when its client moves up."""
    model = HeteFedRecRecommender(**FAST, refit=False).fit(obvious[obvious[:, 0] < 2])
    assert model.sizes_.tolist() == [2, 4]
    old = clone(model).fit(obvious[obvious[:, 0] < 2])
    model.set_params(server_learning_rate=1e-9, clients_per_round=1, n_rounds=1)
    model.partial_fit(obvious)
    np.testing.assert_allclose(
        model.item_tables_[-1][old.item_ids_, :4], old.item_tables_[-1], atol=1e-6
    )
    np.testing.assert_allclose(
        model.item_tables_[0][old.item_ids_, :2], old.item_tables_[0][:, :2], atol=1e-6
    )


@pytest.mark.parametrize("base", ["mf", "ncf"])
def test_clients_that_change_their_size_keep_the_columns_in_common(base, skewed):
    arguments = {**FAST, "refit": False, "group_ratio": (2, 1, 1)}
    old = HeteFedRecRecommender(base, **arguments).fit(skewed)
    model = clone(old).fit(skewed).set_params(group_ratio=(1, 1, 2), n_rounds=1)
    model.set_params(clients_per_round=1).partial_fit(skewed)
    before, after = old.user_sizes_, model.user_sizes_
    assert (after > before).any()
    inside = np.arange(8) < after[:, None]
    assert (model.user_factors_[inside] != 0).all()  # what is new begins at random
    assert (model.user_factors_[~inside] == 0).all()
    common = np.arange(8) < np.minimum(before, after)[:, None]
    same = np.where(common, model.user_factors_ == old.user_factors_, True).all(axis=1)
    assert same.sum() == 79  # all but the one that has trained
    model.set_params(group_ratio=(8, 1, 1)).partial_fit(skewed)
    assert (model.user_sizes_ < after).any()
    assert (model.user_factors_[np.arange(8) >= model.user_sizes_[:, None]] == 0).all()


def test_statistics_of_other_blocks_are_forgotten(skewed):
    """Another aggregation cuts the columns otherwise."""
    model = HeteFedRecRecommender(**FAST).fit(skewed)
    assert [np.count_nonzero(np.diag(gram)) for gram in model.user_gram_] == [2, 2, 4]
    weight = model.user_gram_weight_.copy()
    same = clone(model).fit(skewed).partial_fit(skewed)
    assert (same.user_gram_weight_ > weight).all()
    model.set_params(aggregation="clustered").partial_fit(skewed)
    assert [np.count_nonzero(np.diag(gram)) for gram in model.user_gram_] == [2, 4, 8]
    np.testing.assert_allclose(model.user_gram_weight_, weight)


@BASE
def test_early_stopping_returns_the_best(base):
    X, _ = make_interactions(60, 50, 3, mean_interactions=12, return_X_y=True, random_state=0)
    arguments = {**FAST | {"n_rounds": 30}, "server_learning_rate": 0.3}
    arguments |= {"early_stopping": True, "n_iter_no_change": 3, "tol": 0.0, "local_epochs": 2}
    stopped = HeteFedRecRecommender(base, **arguments).fit(X)
    values = [record["validation_ndcg"] for record in stopped.history_]
    best = int(np.argmax(values)) + 1
    assert stopped.n_rounds_ == min(best + 3, 30)
    exact = HeteFedRecRecommender(base, **arguments | {"n_rounds": best}).fit(X)
    for name in NETWORKS:
        np.testing.assert_array_equal(getattr(exact, name), getattr(stopped, name), err_msg=name)
    if base == "lightgcn":  # which knows all rows once it is fitted
        return
    # The watched number once more, user by user, from what was returned.
    train, validation = hold_out(stopped._interactions, 0.1, Streams(0))
    held = ~train
    codes = stopped._interactions
    assert len(set(stopped.user_sizes_[validation.users])) == 3
    ids, _ = stopped.recommend(k=50, exclude_seen=False)
    found = []
    for user in validation.users:
        order = np.searchsorted(stopped.item_ids_, ids[user])
        seen = set(codes.item[train & (codes.user == user)])
        truth = set(codes.item[held & (codes.user == user)])
        ranked = [item for item in order if item not in seen][:20]
        gain = sum(1 / np.log2(place + 2) for place, item in enumerate(ranked) if item in truth)
        found.append(gain / sum(1 / np.log2(place + 2) for place in range(min(20, len(truth)))))
    assert np.mean(found) == pytest.approx(max(values), abs=1e-6)


@BASE
@pytest.mark.parametrize("aggregation", ["padded", "clustered", "standalone"])
def test_fits_do_not_depend_on_chunks(base, aggregation, skewed, monkeypatch):
    if (base, aggregation) == ("mf", "standalone"):
        return  # refused
    fits = []
    for rows in (100_000, 60):
        monkeypatch.setattr(shards_module, "CPU_CHUNK_ROWS", rows)
        fits.append(HeteFedRecRecommender(base, **FAST, aggregation=aggregation).fit(skewed))
    for name in (*NETWORKS, "private_rows_", "private_networks_", "user_gram_"):
        np.testing.assert_allclose(
            getattr(fits[1], name), getattr(fits[0], name), rtol=1e-5, atol=2e-5, err_msg=name
        )
    assert [r["bytes_up"] for r in fits[1].history_] == [r["bytes_up"] for r in fits[0].history_]


@pytest.mark.parametrize("aggregation", ["padded", "clustered"])
@pytest.mark.parametrize("report_every", [1, None])
@pytest.mark.parametrize(
    "wild",
    [
        {"base_model": "mf", "server_learning_rate": 1e30},
        {"base_model": "mf", "init_scale": 1e30},
        {"base_model": "ncf", "learning_rate": 1e4},
        {"base_model": "ncf", "learning_rate": 1e4, "refit": False},
        {"base_model": "lightgcn", "server_learning_rate": 1e30},
    ],
    ids=str,
)
def test_divergence_names_round_and_parameter(wild, report_every, aggregation, skewed):
    model = HeteFedRecRecommender(**FAST | wild, report_every=report_every, aggregation=aggregation)
    with pytest.raises(FloatingPointError, match=r"Training diverged.* round [1-4]\b.*Lower lear"):
        model.fit(skewed)
    assert not hasattr(model, "item_factors_")


def test_divergence_of_a_small_federation_by_itself_is_noticed(skewed, monkeypatch):
    """The largest size, which every fit looks at, is sound."""
    step = _hetefedrec.network_step

    def spoiled(*args, **named):
        state, logs = step(*args, **named)
        state.tables[0][3] = torch.nan
        return state, logs

    monkeypatch.setattr(_hetefedrec, "network_step", spoiled)
    model = HeteFedRecRecommender(
        "ncf", **FAST | {"n_rounds": 1}, aggregation="clustered", distill_fraction=0, refit=False
    )
    with pytest.raises(FloatingPointError, match=r"Training diverged.* in round 1\b.*Lower"):
        model.fit(skewed)


# ---------------------------------------------------------------- quality


@pytest.fixture(scope="module")
def halves():
    """Rows to fit on and rows held out, of users with planted tastes."""
    X, _ = make_interactions(400, 200, 5, mean_interactions=20, return_X_y=True, random_state=0)
    train, test = next(PerUserHoldout(random_state=0).split(X))
    return X[train], X[test]


@pytest.mark.parametrize(
    ("changes", "gain"),
    [
        ({}, 1.7),
        ({"dual_task": True}, 1.7),
        ({"aggregation": "clustered"}, 1.5),
        ({"contributors": "largest"}, 1.4),
        ({"base_model": "ncf"}, 1.3),
        ({"base_model": "lightgcn"}, 1.4),
    ],
    ids=str,
)
def test_it_beats_popularity(changes, gain, halves):
    train, test = halves
    popularity = PopularityRecommender().fit(train).score(test)
    model = HeteFedRecRecommender(**changes, random_state=0, device="cpu").fit(train)
    assert model.score(test) > gain * popularity


def test_every_group_beats_popularity(halves):
    train, test = halves
    model = HeteFedRecRecommender(random_state=0, device="cpu").fit(train)
    groups = dict(zip(model.client_ids_.tolist(), model.client_groups_.tolist(), strict=True))
    found, base = (
        evaluate(each, test, metrics="ndcg", k=20, groups=groups).per_group
        for each in (model, PopularityRecommender().fit(train))
    )
    for group in range(3):
        assert found[group]["n_users"] == pytest.approx(400 * (0.5, 0.3, 0.2)[group], abs=5)
        assert found[group]["ndcg@20"] > 1.3 * base[group]["ndcg@20"]


def test_power_law_activity(halves):
    X, _ = make_interactions(
        150, 120, 3, mean_interactions=15, activity_exponent=1.2, return_X_y=True, random_state=0
    )
    train, test = next(PerUserHoldout(random_state=0).split(X))
    counts = np.bincount(X[train, 0])
    assert counts.max() > 5 * np.median(counts)
    model = HeteFedRecRecommender(n_rounds=30, random_state=0, device="cpu").fit(X[train])
    assert counts[model.client_groups_ == 2].min() >= counts[model.client_groups_ == 1].max()
    assert model.score(X[test]) > 1.3 * PopularityRecommender().fit(X[train]).score(X[test])
