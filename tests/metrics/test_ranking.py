import math

import numpy as np
import pytest
from scipy.sparse import csc_array, csr_array
from sklearn.metrics import ndcg_score

from fedrecsk.metrics import (
    coverage_at_k,
    hit_rate_at_k,
    map_at_k,
    mrr_at_k,
    ndcg_at_k,
    precision_at_k,
    ranking,
    recall_at_k,
    top_k,
)
from fedrecsk.metrics.ranking import USER_METRICS, hits_of

METRICS = {
    "ndcg": ndcg_at_k,
    "recall": recall_at_k,
    "precision": precision_at_k,
    "hit_rate": hit_rate_at_k,
    "mrr": mrr_at_k,
    "map": map_at_k,
}


def plain_top_k(scores, k):
    """Sort each row by (-score, column)."""
    return [sorted(range(len(row)), key=lambda j: (-row[j], j))[:k] for row in scores]


def plain_metric(name, true_items, ranked, k):
    """One user's value by the textbook definition; `ranked` are the items, best first."""
    hits = [item in true_items for item in ranked[:k]]
    if name == "ndcg":
        gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits, start=1) if hit)
        ideal = sum(1 / math.log2(r + 1) for r in range(1, min(k, len(true_items)) + 1))
        return gain / ideal
    if name == "recall":
        return sum(hits) / len(true_items)
    if name == "precision":
        return sum(hits) / k
    if name == "hit_rate":
        return float(any(hits))
    if name == "mrr":
        return next((1 / rank for rank, hit in enumerate(hits, start=1) if hit), 0.0)
    precisions = [sum(hits[:rank]) / rank for rank, hit in enumerate(hits, start=1) if hit]
    return sum(precisions) / min(k, len(true_items))


def random_case(seed, n_users=40, n_items=12):
    rng = np.random.default_rng(seed)
    y_true = (rng.random((n_users, n_items)) < 0.25).astype(int)
    y_true[0] = 0  # a user with nothing to find
    y_true[1] = 1  # and one that likes everything
    scores = rng.integers(0, 6, (n_users, n_items)).astype(float)  # many ties
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[2] = -np.inf
    y_true[2, :3] = 1
    return y_true, scores


@pytest.mark.parametrize("k", [1, 3, 11, 12, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_top_k_is_the_sorted_head(k, dtype):
    rng = np.random.default_rng(k)
    scores = rng.integers(-3, 3, (30, 12)).astype(dtype)
    if dtype is not np.int64:
        scores[rng.random(scores.shape) < 0.3] = -np.inf
        scores[3] = np.inf
    top = top_k(scores, k)
    assert top.dtype == np.int64
    assert top.tolist() == plain_top_k(scores, k)


def test_top_k_without_ties():
    scores = np.random.default_rng(0).permutation(60).reshape(3, 20).astype(float)
    assert top_k(scores, 5).tolist() == plain_top_k(scores, 5)


def test_top_k_does_not_depend_on_blocks(monkeypatch):
    scores = np.random.default_rng(0).integers(0, 4, (25, 9)).astype(float)
    whole = top_k(scores, 4)
    monkeypatch.setattr(ranking, "_BLOCK", 20)
    np.testing.assert_array_equal(top_k(scores, 4), whole)


def test_top_k_counts_nan_as_lowest():
    scores = [[np.nan, 1.0, -np.inf, 2.0], [4.0, 3.0, 2.0, np.nan]]
    assert top_k(scores, 4).tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]
    assert top_k(scores, 1).tolist() == [[3], [0]]


def test_top_k_leaves_its_argument_alone():
    scores = np.array([[1.0, np.nan, 3.0]])
    top_k(scores, 2)
    np.testing.assert_array_equal(scores, [[1.0, np.nan, 3.0]])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_top_k_of_nothing(shape):
    assert top_k(np.empty(shape), 2).shape == (shape[0], min(2, shape[1]))


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "3", None])
def test_k_must_be_a_positive_integer(k):
    with pytest.raises(ValueError, match="k must be a positive integer"):
        top_k([[1.0, 2.0]], k)
    with pytest.raises(ValueError, match="k must be a positive integer"):
        ndcg_at_k([[0, 1]], [[1.0, 2.0]], k)


def test_top_k_wants_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(n_users, n_items\), got \(2,\)"):
        top_k([1.0, 2.0], 1)


def test_hits_of_is_membership():
    rng = np.random.default_rng(1)
    truth = csr_array((rng.random((20, 7)) < 0.3).astype(float))
    top = rng.integers(-1, 7, (20, 5))  # -1 is padding
    dense = truth.toarray()
    expected = [[j >= 0 and dense[u, j] == 1 for j in row] for u, row in enumerate(top)]
    np.testing.assert_array_equal(hits_of(top, truth), expected)


def test_hits_of_reads_unsorted_rows():
    truth = csr_array((np.ones(3), np.array([4, 0, 2]), np.array([0, 2, 3])), shape=(2, 5))
    assert not truth.has_sorted_indices
    np.testing.assert_array_equal(
        hits_of(np.array([[0, 4, 2], [0, 2, 4]]), truth), [[1, 1, 0], [0, 1, 0]]
    )


def test_hits_of_empty_truth():
    assert not hits_of(np.array([[0, 1]]), csr_array((1, 3))).any()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("k", [1, 4, 12, 30])
def test_metrics_match_their_definition(name, k):
    y_true, scores = random_case(seed=k)
    per_user = [
        plain_metric(
            name,
            set(np.flatnonzero(row)),
            [j for j in order if s[j] > -np.inf],
            k,
        )
        for row, order, s in zip(y_true, plain_top_k(scores, k), scores, strict=True)
        if row.any()
    ]
    assert METRICS[name](y_true, scores, k) == pytest.approx(np.mean(per_user), abs=1e-12)
    weights = np.random.default_rng(0).random(len(y_true))
    weighted = np.average(per_user, weights=weights[y_true.any(axis=1)])
    value = METRICS[name](y_true, scores, k, sample_weight=weights)
    assert value == pytest.approx(weighted, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_one_ranking_serves_shorter_lists(name):
    y_true, scores = random_case(seed=5)
    scores[np.isinf(scores)] = -1.0
    truth = csr_array(y_true)
    n_true = y_true.sum(axis=1)
    longest = hits_of(top_k(scores, 10), truth)
    for k in (1, 3, 10):
        alone = USER_METRICS[name](hits_of(top_k(scores, k), truth), n_true, k)
        np.testing.assert_array_equal(USER_METRICS[name](longest, n_true, k), alone)


@pytest.mark.parametrize("name", METRICS)
def test_perfect_and_useless_rankings(name):
    y_true = np.array([[1, 0, 0, 1], [0, 1, 1, 0]])
    perfect = METRICS[name](y_true, y_true.astype(float), 2)
    assert perfect == pytest.approx(1.0)
    assert METRICS[name](y_true, -y_true.astype(float), 2) == 0.0


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_agrees_with_scikit_learn(k):
    rng = np.random.default_rng(k)
    y_true = (rng.random((30, 10)) < 0.3).astype(int)
    y_true[np.arange(30), rng.integers(0, 10, 30)] = 1
    scores = rng.permuted(np.tile(np.arange(10.0), (30, 1)), axis=1)
    weights = rng.random(30)
    assert ndcg_at_k(y_true, scores, k) == pytest.approx(ndcg_score(y_true, scores, k=k))
    assert ndcg_at_k(y_true, scores, k, sample_weight=weights) == pytest.approx(
        ndcg_score(y_true, scores, k=k, sample_weight=weights)
    )


@pytest.mark.parametrize("kind", [csr_array, csc_array, np.asarray, lambda y: y.astype(bool)])
def test_truth_may_be_sparse_or_dense(kind):
    y_true, scores = random_case(seed=2)
    assert map_at_k(kind(y_true), scores, 5) == map_at_k(y_true.tolist(), scores, 5)


def test_stored_zeros_are_not_true():
    stored = csr_array((np.array([1, 0]), (np.array([0, 0]), np.array([0, 1]))), shape=(1, 3))
    assert recall_at_k(stored, [[3.0, 2.0, 1.0]], 1) == 1.0
    assert stored.nnz == 2, "the caller's matrix was changed"


@pytest.mark.parametrize("metric", METRICS.values())
def test_no_user_with_truth_is_nan(metric):
    assert math.isnan(metric(np.zeros((2, 3)), np.ones((2, 3)), 2))
    assert math.isnan(metric([[1, 0], [0, 0]], np.ones((2, 2)), 1, sample_weight=[0, 1]))


def test_excluded_true_item_is_a_miss():
    assert recall_at_k([[1, 1]], [[-np.inf, 1.0]], 2) == 0.5
    assert ndcg_at_k([[1, 0]], [[-np.inf, 1.0]], 2) == 0.0


def test_coverage():
    scores = np.array([[3.0, 2.0, 1.0, -np.inf], [3.0, 1.0, 2.0, -np.inf]])
    assert coverage_at_k(scores, 1) == 0.25
    assert coverage_at_k(scores, 2) == 0.75
    assert coverage_at_k(scores, 4) == 0.75
    assert math.isnan(coverage_at_k(np.empty((2, 0)), 1))


@pytest.mark.parametrize(
    ("y_true", "y_score", "message"),
    [
        ([[0, 1]], [[1.0, 2.0, 3.0]], r"same shape .* got \(1, 2\) and \(1, 3\)"),
        ([[0, 5]], [[1.0, 2.0]], r"0 and 1 only, found .*5"),
        ([[0, 1]], [[1.0, np.nan]], "y_score has NaN"),
        ([0, 1], [[1.0, 2.0]], r"y_true must have shape .* got \(2,\)"),
        ([[0, 1]], [1.0, 2.0], r"y_score must have shape .* got \(2,\)"),
        ([[0, 1]], [["a", 2.0]], "y_score must hold real numbers only: could not convert"),
        ([[0, 1]], np.ones((1, 2)) * 1j, "y_score must hold real numbers only: complex"),
        ([[0, 1]], [[10**400, 2.0]], "y_score must hold real numbers only: int too large"),
        ([[0, 1], [1]], [[1.0, 2.0]], "y_true must hold real numbers only"),
        ([["yes", "no"]], [[1.0, 2.0]], "y_true must hold real numbers only: could not convert"),
    ],
)
def test_bad_input(y_true, y_score, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(y_true, y_score, 1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "each of the 2 users"),
        ([1.0, -1.0], "not negative"),
        ([1.0, np.nan], "finite"),
        ([1.0, {}], "sample_weight must hold real numbers only: float"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(np.eye(2), np.eye(2), 1, sample_weight=weights)
