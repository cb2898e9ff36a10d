"""What every fitted estimator answers: predict, recommend, similar_items and score."""

import itertools

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone

from fedrecsk import (
    FELLRecRecommender,
    NothingHeldOutWarning,
    PopularityRecommender,
    UnknownIdWarning,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.estimators import _base

EVERY_PAIR = np.array(list(itertools.product(range(40), range(20))))


# ---------------------------------------------------------------- predict


def test_predict_gives_probabilities_in_the_order_of_scores(fitted):
    probability = fitted.predict(EVERY_PAIR)
    assert probability.shape == (800,)
    assert probability.dtype == np.float64
    assert ((probability >= 0) & (probability <= 1)).all()
    ids, scores = fitted.recommend(k=20, exclude_seen=False)
    for user in range(40):
        assert sorted(ids[user]) == list(range(20))
        assert (np.diff(scores[user]) <= 0).all()
        # Lists are ranked in single precision, pairs in double: near ties may swap.
        ranked = fitted.predict([[user, item] for item in ids[user]])
        assert (np.diff(ranked) <= 1e-6).all()
    if not isinstance(fitted, PopularityRecommender):  # here all items are equally popular
        assert (scores[:, 0] > scores[:, -1]).all()


def test_predict_is_a_function_of_each_row(fitted):
    whole = fitted.predict(EVERY_PAIR)
    order = np.random.default_rng(0).permutation(800)
    np.testing.assert_array_equal(fitted.predict(EVERY_PAIR[order]), whole[order])
    np.testing.assert_array_equal(fitted.predict(np.repeat(EVERY_PAIR, 2, axis=0))[::2], whole)
    for row in (0, 123, 799):
        assert fitted.predict([EVERY_PAIR[row]])[0] == whole[row]


def test_predict_looks_at_user_and_item_only(fitted, obvious):
    expected = fitted.predict(obvious)
    nonsense = np.full((len(obvious), 1), np.nan)
    np.testing.assert_array_equal(fitted.predict(np.hstack([obvious, nonsense])), expected)
    frame = pd.DataFrame({"colour": "red", "item_id": obvious[:, 1], "user_id": obvious[:, 0]})
    for same in (frame, pl.from_pandas(frame), frame.set_index("colour")):
        np.testing.assert_array_equal(fitted.predict(same), expected)
    np.testing.assert_array_equal(fitted.predict(obvious.tolist()), expected)


def test_unknown_ids_get_a_fallback_and_one_warning(fitted):
    rows = [[0, 2], [999, 2], [0, 888], [999, 888], [0, 4], [-5, 4], [1, 888]]
    with pytest.warns(UnknownIdWarning) as caught:
        probability = fitted.predict(rows)
    assert [str(warning.message) for warning in caught] == [
        "3 of 7 users are unknown to fit and get the crowd's scores; "
        "3 of 7 items are unknown to fit and get the lowest score or are dropped."
    ]
    assert caught[0].filename == __file__
    assert ((probability >= 0) & (probability <= 1)).all()
    known = fitted.predict(EVERY_PAIR).reshape(40, 20)
    assert probability[0] == known[0, 2]
    assert probability[4] == known[0, 4]
    # Lowest scores are searched in single precision.
    np.testing.assert_allclose(probability[[2, 6]], known[:2].min(axis=1), rtol=1e-5)
    with pytest.warns(UnknownIdWarning, match=r"20 of 20 users are unknown"):
        crowd = fitted.predict([[999, item] for item in range(20)])
    assert probability[1] == crowd[2]
    assert probability[5] == crowd[4]
    np.testing.assert_allclose(probability[3], crowd.min(), rtol=1e-5)


def test_ids_of_another_kind_are_unknown(fitted):
    with pytest.warns(UnknownIdWarning, match="2 of 2 users are unknown.*2 of 2 items"):
        as_text = fitted.predict([["0", "2"], ["1", "3"]])
    assert np.isfinite(as_text).all()
    np.testing.assert_array_equal(fitted.predict([[0.0, 2.0]]), fitted.predict([[0, 2]]))


def test_the_crowd_likes_what_most_users_like(estimator):
    """Nine users of ten are even, and so is the newcomer's list."""
    rows = [
        [user, item]
        for user in range(40)
        for item in range(20)
        if item % 2 == (user % 10 == 9) and item != user % 20
    ]
    estimator.fit(rows)
    with pytest.warns(UnknownIdWarning, match="1 of 1 users"):
        ids, scores = estimator.recommend(["somebody"], k=10)
    assert sorted(ids[0]) == list(range(0, 20, 2))
    assert np.isfinite(scores).all()


# ---------------------------------------------------------------- recommend


def test_recommend_leaves_out_what_was_seen(fitted, obvious):
    ids, scores = fitted.recommend(k=11)
    assert ids.shape == scores.shape == (40, 11)
    assert ids.dtype == fitted.item_ids_.dtype
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    for user in range(40):
        unseen = set(range(20)) - set(obvious[obvious[:, 0] == user, 1])
        assert set(ids[user]) == unseen
    ids, scores = fitted.recommend(k=100)
    assert ids.shape == (40, 20)
    assert (scores == -np.inf).sum(axis=1).tolist() == [9] * 40
    assert (scores[:, :11] > -np.inf).all()


def test_recommend_agrees_with_predict(fitted, obvious):
    table = fitted.predict(EVERY_PAIR).reshape(40, 20)
    table[obvious[:, 0], obvious[:, 1]] = -1
    ids, _ = fitted.recommend(k=5)
    best = -np.sort(-table, axis=1)[:, :5]
    np.testing.assert_allclose(np.take_along_axis(table, ids, axis=1), best, atol=1e-6)


def test_recommend_for_some_users_in_their_order(fitted):
    all_ids, all_scores = fitted.recommend(k=4)
    for users in ([7, 3, 3], np.array([7, 3, 3]), pd.Series([7, 3, 3]), [7.0, 3.0, 3.0]):
        ids, scores = fitted.recommend(users, k=4)
        np.testing.assert_array_equal(ids, all_ids[[7, 3, 3]])
        np.testing.assert_allclose(scores, all_scores[[7, 3, 3]], atol=1e-5)
    ids, scores = fitted.recommend([], k=4)
    assert ids.shape == scores.shape == (0, 4)


def test_recommend_among_candidates(fitted):
    ids, scores = fitted.recommend([0, 1], k=10, candidates=[5, 0, 9, 9, 4])
    assert ids.shape == (2, 4)
    assert sorted(ids[0]) == sorted(ids[1]) == [0, 4, 5, 9]
    assert set(ids[0, :3]) == {0, 5, 9}  # user 0 has item 4
    assert scores[0, 3] == -np.inf
    assert ids[1, 0] in (0, 4)  # user 1 has 5 and 9
    assert (scores[1, 2:] == -np.inf).all()
    full_ids, full_scores = fitted.recommend([0], k=20, exclude_seen=False)
    ids, scores = fitted.recommend([0], k=2, exclude_seen=False, candidates=[3, 4, 15])
    place = [full_ids[0].tolist().index(item) for item in (3, 4, 15)]
    assert scores[0].tolist() == sorted(full_scores[0, place], reverse=True)[:2]
    with pytest.warns(UnknownIdWarning, match="1 of 3 items are unknown"):
        ids, _ = fitted.recommend([0], k=5, candidates=[3, 77, 4])
    assert sorted(ids[0]) == [3, 4]
    with (
        pytest.warns(UnknownIdWarning, match="2 of 2 items are unknown"),
        pytest.raises(ValueError, match="None of the 2 candidates is known"),
    ):
        fitted.recommend([0], candidates=["a", "b"])


def test_recommend_to_unknown_users(fitted):
    with pytest.warns(UnknownIdWarning) as caught:
        ids, scores = fitted.recommend([5, 777, 888], k=20)
    assert len(caught) == 1
    assert "2 of 3 users are unknown to fit" in str(caught[0].message)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(ids[0], fitted.recommend([5], k=20)[0][0])
    np.testing.assert_array_equal(ids[1], ids[2])
    assert np.isfinite(scores[1:]).all()  # somebody new has seen nothing


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3", None])
def test_bad_k_is_refused(k, fitted):
    for call in (lambda: fitted.recommend(k=k), lambda: fitted.similar_items([1], k=k)):
        with pytest.raises(ValueError, match=r"k must be a positive integer, got"):
            call()


MANY = [2**53, 2**53 + 1]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (["1", 1], TypeError, "Numbers and text are mixed in"),  # not two texts
        ([MANY[1], 0.5], ValueError, "Floats are mixed with integers"),  # nor user 2**53
        (["1", None], ValueError, "contains NaN: 1 of 2"),
        (np.ma.masked_equal([1, 2], 2), ValueError, "contains NaN: 1 of 2"),
        ([["1"]], ValueError, r"to be a 1d array"),
        ("1\0", ValueError, "ends in a NUL character"),
        ({"1"}, TypeError, "not 'set'"),
    ],
)
def test_ids_that_are_asked_for_are_read_as_those_of_fit(asked, error, message):
    model = PopularityRecommender().fit([[user, user] for user in MANY])
    for name, call in {
        "users": model.recommend,
        "items": model.similar_items,
        "candidates": lambda ids: model.recommend(candidates=ids),
    }.items():
        with pytest.raises(error, match=rf"{message}.*\b{name}|\b{name}\b.*{message}"):
            call(asked)


@pytest.mark.parametrize("one", ["b", np.str_("b"), np.array("b"), ["b"], pl.Series(["b"])])
def test_one_id_alone_is_asked_for_like_a_list_of_one(one):
    model = PopularityRecommender().fit([["a", "b"], ["a", "c"], ["b", "c"]])
    assert model.recommend(one, k=1)[0].tolist() == [["b"]]
    assert model.similar_items(one)[0].tolist() == [["c"]]


def test_lists_do_not_depend_on_the_batch(fitted, monkeypatch):
    users = [3, 9, 4, 999]
    with pytest.warns(UnknownIdWarning):
        whole = fitted.recommend(users, k=7), fitted.predict([[3, 4], [999, 77], [5, 77]])
    similar = fitted.similar_items(range(20), k=3)
    monkeypatch.setattr(_base, "SCORES_PER_BATCH", 1)
    with pytest.warns(UnknownIdWarning):
        single = fitted.recommend(users, k=7), fitted.predict([[3, 4], [999, 77], [5, 77]])
    np.testing.assert_allclose(single[0][1], whole[0][1], atol=1e-5)
    np.testing.assert_allclose(single[1], whole[1], atol=1e-5)
    np.testing.assert_allclose(fitted.similar_items(range(20), k=3)[1], similar[1], atol=1e-5)


# ---------------------------------------------------------------- similar_items


def test_similar_items_share_the_taste(fitted):
    ids, scores = fitted.similar_items([4, 7], k=9)
    assert ids.shape == scores.shape == (2, 9)
    assert scores.dtype == np.float64
    assert (np.diff(scores) <= 0).all()
    if isinstance(fitted, PopularityRecommender):
        return
    if isinstance(fitted, FELLRecRecommender):
        # Vectors tell what comes after what as well.
        assert (ids[0] % 2 == 0).sum() >= 7
        assert (ids[1] % 2 == 1).sum() >= 7
    else:
        assert set(ids[0]) == set(range(0, 20, 2)) - {4}
        assert set(ids[1]) == set(range(1, 20, 2)) - {7}
    item, other = fitted.item_factors_[[4, ids[0, 2]]].astype(float)
    cosine = item @ other / np.sqrt((item @ item) * (other @ other))
    np.testing.assert_allclose(scores[0, 2], cosine, rtol=1e-5)
    assert fitted.similar_items(4, k=100)[0].shape == (1, 19)


def test_similar_items_of_unknown_items(fitted):
    with pytest.raises(ValueError, match=r"2 of 3 items are unknown to fit, the first is 77\b"):
        fitted.similar_items([4, 77, 88])


# ---------------------------------------------------------------- score


def plain_ndcg(fitted, train, held_out, weight=None):
    """Mean NDCG@20 one user at a time, from the probabilities of all its pairs."""
    items = sorted({item for _, item in train})
    values, weights = [], []
    for user in sorted({user for user, _ in held_out}):
        seen = {item for each, item in train if each == user}
        truth = {item for each, item in held_out if each == user} - seen
        if not truth:
            continue
        probability = dict(zip(items, fitted.predict([[user, i] for i in items]), strict=True))
        ranked = sorted(set(items) - seen, key=lambda item: (-probability[item], item))[:20]
        gain = sum(1 / np.log2(place + 2) for place, item in enumerate(ranked) if item in truth)
        best = sum(1 / np.log2(place + 2) for place in range(min(20, len(truth))))
        values.append(gain / best)
        rows = [place for place, (each, _) in enumerate(held_out) if each == user]
        weights.append(1 if weight is None else np.mean([weight[row] for row in rows]))
    return np.average(values, weights=weights)


@pytest.fixture(scope="module")
def halves():
    """Train and held-out rows: repeats, rows of train, users and items unknown to train."""
    X, _ = make_interactions(30, 50, 3, mean_interactions=12, return_X_y=True, random_state=1)
    rows = X[:, :2]
    held = np.random.default_rng(0).random(len(rows)) < 0.3
    train = rows[~held]
    odd_ones = [[3, 777], [999, train[0, 1]]]
    held_out = np.concatenate([rows[held], rows[held][:5], train[::7], odd_ones])
    return train, held_out


# The newcomer's scores are asked for pair by pair.
@pytest.mark.filterwarnings("ignore:.* of .* users are unknown:fedrecsk.UnknownIdWarning")
def test_score_is_ndcg_of_held_out_rows(estimator, halves):
    train, held_out = halves
    estimator.fit(train)
    train_rows, held_rows = train.tolist(), held_out.tolist()
    expected = plain_ndcg(estimator, train_rows, held_rows)
    with pytest.warns(UnknownIdWarning):
        score = estimator.score(held_out)
    assert isinstance(score, float)
    assert score == pytest.approx(expected, abs=1e-9)
    weight = np.random.default_rng(1).random(len(held_out))
    expected = plain_ndcg(estimator, train_rows, held_rows, weight)
    with pytest.warns(UnknownIdWarning):
        weighted = estimator.score(held_out, sample_weight=weight)
    assert weighted == pytest.approx(expected, abs=1e-9)
    assert weighted != pytest.approx(score, abs=1e-9)
    with pytest.warns(UnknownIdWarning):
        assert estimator.score(held_out, np.zeros(len(held_out))) == score


def test_score_of_the_obvious_answer_is_one(trainable, obvious):
    held_out = [[user, user % 20] for user in range(40)]
    assert trainable.fit(obvious).score(held_out) == pytest.approx(1.0)
    assert trainable.score([[user, (user + 1) % 20] for user in range(40)]) < 0.7


def test_score_of_the_training_rows_is_nan_with_a_warning(fitted, obvious):
    message = r"The score is nan\..*360 rows of X \(40 users\) hold only.*held out from fit"
    with pytest.warns(NothingHeldOutWarning, match=message) as caught:
        assert np.isnan(fitted.score(obvious))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_score_with_min_rating_ignores_weak_rows(trainable, obvious):
    ratings = np.full((len(obvious), 1), 5)
    trainable.set_params(min_rating=4).fit(np.hstack([obvious, ratings]))
    assert trainable.score([[0, 0, 5], [0, 19, 3.5]]) == 1.0
    assert trainable.score([[0, 0, 5], *([0, item, 4] for item in (13, 15, 17, 19))]) < 1.0
    with pytest.warns(NothingHeldOutWarning, match="1 of the rows are below min_rating"):
        assert np.isnan(trainable.score([[0, 19, 3.5]]))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0], r"sample_weight must hold one weight for each of the 2 rows"),
        ([1.0, -1.0], r"sample_weight must be finite and not negative"),
        ([0.0, 0.0], r"sample_weight is 0 for every user that has held-out items"),
    ],
)
def test_bad_weights_are_refused(weight, message, fitted):
    with pytest.raises(ValueError, match=message):
        fitted.score([[0, 0], [1, 1]], sample_weight=weight)


def test_answers_of_a_clone_need_a_fit_of_its_own(fitted):
    assert not clone(fitted).__sklearn_is_fitted__()
