"""Ranking metrics against the sentences of their docstrings, for any scores and truths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from fedrecsk.metrics import (
    client_balance,
    coverage_at_k,
    hit_rate_at_k,
    map_at_k,
    mrr_at_k,
    ndcg_at_k,
    precision_at_k,
    recall_at_k,
    top_k,
)
from tests.properties.documented import Refused, outcome
from tests.properties.strategies import CELLS, examples, odd_arrays

METRICS = {
    "ndcg": ndcg_at_k,
    "recall": recall_at_k,
    "precision": precision_at_k,
    "hit_rate": hit_rate_at_k,
    "mrr": mrr_at_k,
    "map": map_at_k,
}
SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -math.inf, math.inf, 1e300, 5e-324]),
    st.integers(-2, 2).map(float),
    st.floats(allow_nan=False),
)


def ranked_list(scores, k):
    """The items of one user, best first, ties to the smaller number, without those at -inf."""
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
    return [item for item in order[:k] if scores[item] > -math.inf]


def gain(rank):
    return 1 / math.log2(rank + 1)


DEFINITIONS = {
    "ndcg": lambda hits, n_true, k: (
        sum(gain(rank) for rank in hits)
        / sum(gain(rank) for rank in range(1, min(k, n_true) + 1))
    ),
    "recall": lambda hits, n_true, k: len(hits) / n_true,
    "precision": lambda hits, n_true, k: len(hits) / k,
    "hit_rate": lambda hits, n_true, k: float(bool(hits)),
    "mrr": lambda hits, n_true, k: 1 / min(hits) if hits else 0.0,
    "map": lambda hits, n_true, k: (
        sum((n + 1) / rank for n, rank in enumerate(hits)) / min(k, n_true)
    ),
}  # fmt: skip


def plain(metric, truth, scores, k, weights):
    """Mean of a metric's definition over the users with a true item."""
    values, shares = [], []
    for true, own, weight in zip(truth, scores, weights, strict=True):
        if any(true):
            hits = [rank for rank, item in enumerate(ranked_list(own, k), 1) if true[item]]
            values.append(DEFINITIONS[metric](hits, sum(true), k))
            shares.append(weight)
    total = sum(shares)
    return sum(map(math.prod, zip(values, shares, strict=True))) / total if total else math.nan


@st.composite
def rankings(draw, max_users=4, max_items=6):
    """Truth (U, I), scores (U, I) and a weight for each user."""
    n_users, n_items = draw(st.integers(0, max_users)), draw(st.integers(1, max_items))

    def table(cells):
        row = st.lists(cells, min_size=n_items, max_size=n_items)
        return draw(st.lists(row, min_size=n_users, max_size=n_users))

    weights = draw(st.lists(st.sampled_from([0, 0.5, 1, 3]), min_size=n_users, max_size=n_users))
    return table(st.integers(0, 1)), table(SCORES), weights


def as_table(rows, dtype):
    return np.array(rows, dtype=dtype).reshape(len(rows), -1 if rows else 1)


@settings(max_examples=examples(25))
@given(rankings(), st.integers(1, 8), st.booleans(), st.booleans())
@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_what_they_are_called(metric, ranking, k, is_sparse, is_weighted):
    truth, scores, weights = ranking
    y_true = as_table(truth, np.int64)
    found = outcome(
        "metrics",
        lambda: METRICS[metric](
            csr_array(y_true) if is_sparse else y_true,
            as_table(scores, np.float64),
            k,
            sample_weight=weights if is_weighted else None,
        ),
    )
    expected = plain(metric, truth, scores, k, weights if is_weighted else [1] * len(truth))
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert math.isnan(found) or -1e-12 <= found <= 1 + 1e-12


@settings(max_examples=examples(20))
@given(st.data(), rankings(), st.integers(1, 8))
@pytest.mark.parametrize("metric", METRICS)
def test_metrics_do_not_depend_on_order_and_rise_with_hits(metric, data, ranking, k):
    truth, scores, _ = ranking
    function = METRICS[metric]
    y_true, y_score = as_table(truth, np.int64), as_table(scores, np.float64)
    found = outcome("metrics", lambda: function(y_true, y_score, k))
    order = data.draw(st.permutations(range(len(truth))))
    moved = outcome("metrics", lambda: function(y_true[list(order)], y_score[list(order)], k))
    assert moved == pytest.approx(found, rel=1e-12, nan_ok=True)
    # Any increasing function of the scores gives the same lists.
    ranks = np.unique(y_score, return_inverse=True)[1].reshape(y_score.shape) * 2.0 - 7
    ranks[y_score == -np.inf] = -np.inf
    assert outcome("metrics", lambda: function(y_true, ranks, k)) == pytest.approx(
        found, rel=1e-12, nan_ok=True
    )
    if math.isnan(found):
        return
    # A true item that goes to the top makes nothing worse.
    user, item = data.draw(st.sampled_from([*zip(*np.nonzero(y_true), strict=True)]))
    better = ranks.copy()
    better[user, item] = 1e6
    assert outcome("metrics", lambda: function(y_true, better, k)) >= found - 1e-12
    # Nor, for what is no mean over places or ranks, does a longer list.
    if metric in ("recall", "hit_rate", "mrr"):
        assert outcome("metrics", lambda: function(y_true, y_score, k + 1)) >= found - 1e-12
    perfect = outcome("metrics", lambda: function(y_true, y_true, k))
    assert perfect >= found - 1e-12
    if metric in ("ndcg", "hit_rate", "mrr", "map"):
        assert perfect == pytest.approx(1.0)


@settings(max_examples=examples(30))
@given(rankings(), st.integers(1, 8))
def test_lists_are_sorted_and_cover_what_they_hold(ranking, k):
    _, scores, _ = ranking
    y_score = as_table(scores, np.float64)
    found = outcome("metrics", lambda: top_k(y_score, k))
    order = [sorted(range(len(own)), key=lambda i, own=own: (-own[i], i))[:k] for own in scores]
    assert found.tolist() == order
    listed = {item for own in scores for item in ranked_list(own, k)}
    share = outcome("metrics", lambda: coverage_at_k(y_score, k))
    assert share == pytest.approx(len(listed) / y_score.shape[1])


@settings(max_examples=examples(40))
@given(
    st.lists(st.one_of(st.just(math.nan), st.floats(0, 1), st.floats(0, 1e300)), max_size=30),
    st.none() | st.sampled_from([0.0, 0.5, 2.0]),
)
def test_balance_is_in_bounds(values, weight):
    weights = None if weight is None else [weight + place % 3 for place in range(len(values))]
    found = outcome("metrics", lambda: client_balance(values, weights))
    known = [value for value in values if not math.isnan(value)]
    if not known or (
        weights and not any(w for w, v in zip(weights, values, strict=True) if v == v)
    ):
        assert isinstance(found, Refused)
        return
    assert found["n_clients"] == len(known)
    assert found["n_missing"] == len(values) - len(known)
    low, high = min(known), max(known)
    room = 1e-9 * high
    assert found["worst"] == low
    assert low - room <= found["worst_decile"] <= high + room
    assert low - room <= found["mean"] <= high + room
    assert 0 <= found["spread"] <= high + room
    assert 1 / len(known) - 1e-9 <= found["jain"] <= 1 + 1e-9
    again = outcome("metrics", lambda: client_balance(values[::-1], weights and weights[::-1]))
    assert again == pytest.approx(found, rel=1e-9, abs=room)


ODD_TABLES = st.one_of(
    odd_arrays(), st.lists(st.lists(CELLS, max_size=3), max_size=3), CELLS,
    st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=2, max_size=2),
    st.sampled_from([csr_array((2, 2)), csr_array(np.eye(2)), csr_array(np.full((2, 2), np.nan))]),
)  # fmt: skip
ODD_NUMBERS = st.one_of(st.integers(-1, 4), st.sampled_from([None, True, 2.0, "3", np.int8(2)]))


@settings(max_examples=examples(100))
@given(ODD_TABLES, ODD_TABLES, ODD_NUMBERS, st.none() | st.lists(CELLS, max_size=3))
def test_anything_is_judged_or_refused(y_true, y_score, k, weights):
    found = outcome("metrics", lambda: ndcg_at_k(y_true, y_score, k, sample_weight=weights))
    assert isinstance(found, float | Refused)
    for call in (lambda: coverage_at_k(y_score, k), lambda: client_balance(y_score, weights)):
        outcome("metrics", call)
