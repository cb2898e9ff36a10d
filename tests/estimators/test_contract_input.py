"""What every estimator takes, and what it says about input that it cannot take."""

import numpy as np
import pytest
from scipy.sparse import coo_array, csr_matrix
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from fedrecsk import (
    FedAvgRecommender,
    FELLRecRecommender,
    PopularityRecommender,
    interactions_from_sparse,
)

# Ids in the order of their codes, so that a fit must not see a difference.
ORDERED_IDS = {
    "negative": lambda codes: codes - 30,
    "large": lambda codes: codes + 10**9,
    "unsigned": lambda codes: codes.astype(np.uint64) + np.uint64(2**63),
    "small integers": lambda codes: codes.astype(np.int8),
    "floats": lambda codes: codes / 7 - 2.5,
    "single floats": lambda codes: codes.astype(np.float32),
    "big floats": lambda codes: codes * 1e300,
    "strings": lambda codes: np.array([f"é-{code:03d}" for code in codes]),
    "bytes": lambda codes: np.array([b"%03d" % code for code in codes]),
    "integer objects": lambda codes: codes.astype(object) * 10**15,
    "string objects": lambda codes: np.array([f"{code:03d}" for code in codes], dtype=object),
}


def with_texts_of_codes(estimator, item_ids):
    """Where ids are read as text, let other ids have the text that the codes would have."""
    if "item_text" in estimator.get_params():
        texts = dict(zip(np.asarray(item_ids).tolist(), map(str, range(20)), strict=True))
        estimator.set_params(item_text=texts)


@pytest.mark.parametrize("kind", ORDERED_IDS)
def test_ids_of_any_kind(kind, typical, fitted, obvious):
    ids = ORDERED_IDS[kind]
    X = np.column_stack([ids(obvious[:, 0]), ids(obvious[:, 1])])
    with_texts_of_codes(typical, ids(np.arange(20)))
    named = typical.fit(X)
    for name in ("user_factors_", "item_factors_", "item_counts_", "seen_indices_"):
        if hasattr(fitted, name):
            np.testing.assert_array_equal(getattr(named, name), getattr(fitted, name))
    np.testing.assert_array_equal(named.user_ids_, ids(np.arange(40)))
    np.testing.assert_array_equal(named.item_ids_, ids(np.arange(20)))
    np.testing.assert_array_equal(named.client_ids_, ids(np.arange(40)))
    np.testing.assert_array_equal(named.predict(X), fitted.predict(obvious))
    expected_ids, expected_scores = fitted.recommend([7, 3], k=5)
    found, scores = named.recommend(ids(np.array([7, 3])), k=5)
    assert found.tolist() == ids(expected_ids.ravel()).reshape(2, 5).tolist()
    np.testing.assert_array_equal(scores, expected_scores)


def test_user_item_and_client_ids_may_be_of_different_kinds(typical, fitted, obvious):
    users = [f"user {code:02d}" for code in obvious[:, 0]]
    items = (obvious[:, 1] + 0.5).tolist()
    rows = [list(row) for row in zip(users, items, strict=True)]
    with_texts_of_codes(typical, np.arange(20) + 0.5)
    mixed = typical.fit(rows, client_ids=(obvious[:, 0] - 100).tolist())
    assert mixed.user_ids_[3] == "user 03"
    assert mixed.item_ids_[3] == 3.5
    assert mixed.client_ids_[3] == -97
    np.testing.assert_array_equal(mixed.predict(rows[:9]), fitted.predict(obvious[:9]))
    assert mixed.recommend(["user 07"], k=2)[0].dtype == np.float64


def test_ids_in_no_order(typical, obvious):
    rng = np.random.default_rng(0)
    user_ids, item_ids = rng.permutation(1000)[:40] - 500, rng.permutation(1000)[:20]
    X = np.column_stack([user_ids[obvious[:, 0]], item_ids[obvious[:, 1]]])
    with_texts_of_codes(typical, item_ids)
    ids, _ = typical.fit(X).recommend(user_ids, k=1)
    if not isinstance(typical, PopularityRecommender):
        assert ids[:, 0].tolist() == [item_ids[user % 20] for user in range(40)]


def test_repeated_rows_count_once(estimator, fitted, obvious, assert_same_fit):
    often = np.repeat(obvious, np.arange(len(obvious)) % 3 + 1, axis=0)
    often = often[np.random.default_rng(0).permutation(len(often))]
    assert_same_fit(estimator.fit(often), fitted)


def test_ratings_and_times_do_not_change_the_fit(typical, fitted, obvious):
    rng = np.random.default_rng(0)
    times = rng.integers(0, 9, len(obvious))
    if isinstance(typical, FELLRecRecommender):
        times = obvious[:, 1]  # which leaves histories in their order
    extra = np.column_stack([rng.integers(1, 6, len(obvious)), times])
    typical.fit(np.column_stack([obvious, extra]))
    assert typical.n_features_in_ == 4
    pairs = obvious[:50]
    np.testing.assert_array_equal(typical.predict(pairs), fitted.predict(pairs))


@pytest.mark.parametrize("container", [coo_array, csr_matrix])
def test_sparse_matrices_go_through_a_function(container, typical, fitted, obvious):
    matrix = container((np.ones(len(obvious)), (obvious[:, 0], obvious[:, 1])), shape=(40, 20))
    for call in (typical.fit, typical.partial_fit, fitted.predict, fitted.score):
        with pytest.raises(TypeError, match=r"Sparse input.*interactions_from_sparse"):
            call(matrix)
    typical.fit(interactions_from_sparse(matrix))
    np.testing.assert_array_equal(typical.predict(obvious), fitted.predict(obvious))


# ---------------------------------------------------------------- bad input


NOT_ROWS = {
    "nan": ([[0, 1], [np.nan, 2]], r"X contains NaN: 1 of 2 values in column 'user_id'.*row 1"),
    "none": ([[0, 1], [1, None]], r"X contains NaN: 1 of 2 values in column 'item_id'.*row 1"),
    "nan text": (np.array([["a", "b"], ["c", np.nan]], dtype=object), r"X contains NaN"),
    "infinity": ([[0, 1.0], [1, -np.inf]], r"X contains infinity: 1 of 2 values in.*'item_id'"),
    "no rows": (np.empty((0, 2)), r"0 sample\(s\)"),
    "no rows at all": ([], r"Expected 2D array, got 1D array"),
    "one column": ([[0], [1]], r"1 feature\(s\)|X has 1 features"),
    "flat": (np.arange(4), r"Expected 2D array, got 1D array"),
    "a cube": (np.zeros((2, 2, 2)), r"dim 3"),
    "ragged": ([[0, 1], [0]], r"rows of X have different lengths: 1, 2"),
    "complex": (np.array([[0, 1j]]), r"Complex data not supported"),
}


@pytest.mark.parametrize("kind", NOT_ROWS)
def test_rows_that_are_refused(kind, typical, fitted):
    X, message = NOT_ROWS[kind]
    for call in (typical.fit, typical.partial_fit, fitted.predict, fitted.score):
        with pytest.raises(ValueError, match=message):
            call(X)
    assert not hasattr(typical, "item_ids_")


def test_mixed_text_and_numbers_are_refused(typical, fitted):
    for call in (typical.fit, fitted.predict):
        with pytest.raises(TypeError, match=r"[Nn]umbers and text are mixed in column 'user_id'"):
            call([[1, 2], ["a", 2]])


def test_bad_ratings_and_times_are_refused(typical):
    with pytest.raises(ValueError, match=r"X contains NaN.*'rating'"):
        typical.fit([[0, 1, 5.0], [0, 2, np.nan]])
    with pytest.raises(ValueError, match=r"X contains infinity.*'timestamp'"):
        typical.fit([[0, 1, 5.0, 1.0], [0, 2, 3.0, np.inf]])
    with pytest.raises(ValueError, match=r"'rating' of X holds text that is no number.*'good'"):
        typical.fit([["a", "b", "good"]])


@pytest.mark.parametrize(
    ("client_ids", "message"),
    [
        ([1, 2, 3], r"inconsistent numbers of samples: \[4, 3\]"),
        ([1, 1, 2, np.nan], r"client_ids contains NaN.*row 3"),
        ([[1, 1], [1, 1], [2, 2], [2, 2]], r"client_ids should be a 1d array"),
        ([7, 7, 8, 9], r"User 'bob' is under two clients, 8 and 9\."),
        (["x", "y", "z", "w"], r"User 'ann' is under two clients, 'x' and 'y' \(2 such users"),
    ],
)
def test_bad_client_ids_are_refused(client_ids, message, estimator):
    X = [["ann", 1], ["ann", 2], ["bob", 1], ["bob", 3]]
    for call in (estimator.fit, estimator.partial_fit):
        with pytest.raises(ValueError, match=message):
            call(X, client_ids)
    assert not hasattr(estimator, "item_ids_")


def test_a_failed_refit_leaves_the_old_fit(typical, obvious, assert_same_fit):
    untouched = clone(typical).fit(obvious)
    typical.fit(obvious)
    for bad, message in (([[0, np.nan]], "contains NaN"), ([[0], [1]], "1 feature")):
        for call in (typical.fit, typical.partial_fit):
            with pytest.raises(ValueError, match=message):
                call(bad)
    assert_same_fit(typical, untouched)


def test_an_unfitted_estimator_says_so(typical):
    for call in (
        lambda: typical.predict([[0, 1]]),
        lambda: typical.score([[0, 1]]),
        lambda: typical.recommend([0]),
        lambda: typical.similar_items([1]),
    ):
        with pytest.raises(NotFittedError, match=rf"This {type(typical).__name__} instance"):
            call()


# ---------------------------------------------------------------- the smallest data


SMALLEST = {
    "one interaction": [[5, 6]],
    "one user": [[5, item] for item in range(6)],
    "one item": [[user, 6] for user in range(6)],
    "a user with every item": [[0, item] for item in range(6)] + [[1, 2], [2, 5]],
    "one item each": [[user, user] for user in range(6)],
    "two users": [[0, 1], [0, 2], [1, 2], [1, 3]],
}


@pytest.mark.parametrize("kind", SMALLEST)
def test_the_smallest_data(kind, estimator):
    X = SMALLEST[kind]
    n_items = len({item for _, item in X})
    estimator.fit(X)
    probability = estimator.predict(X)
    assert ((probability >= 0) & (probability <= 1)).all()
    ids, scores = estimator.recommend(k=50)
    assert ids.shape == scores.shape == (len(estimator.user_ids_), n_items)
    for user, its_ids, its_scores in zip(estimator.user_ids_, ids, scores, strict=True):
        assert sorted(its_ids) == estimator.item_ids_.tolist()
        seen = {item for each, item in X if each == user}
        assert [item in seen for item in its_ids] == (its_scores == -np.inf).tolist()
    ids, scores = estimator.similar_items(estimator.item_ids_, k=50)
    assert ids.shape == (n_items, n_items - 1)
    assert np.isfinite(scores).all()


def test_one_client_holds_everybody(trainable, obvious):
    trainable.fit(obvious, np.zeros(len(obvious)))
    ids, _ = trainable.recommend(k=1)
    assert ids[:, 0].tolist() == [user % 20 for user in range(40)]
    if hasattr(trainable, "times_sampled_"):
        assert (trainable.times_sampled_ == trainable.n_rounds).all()


def test_more_factors_than_items(obvious):
    model = FedAvgRecommender(n_factors=64, n_rounds=5, random_state=0, device="cpu").fit(obvious)
    ids, _ = model.recommend(k=1)
    assert ids[:, 0].tolist() == [user % 20 for user in range(40)]
