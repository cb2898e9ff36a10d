"""What every estimator does with a fit to go on from: partial_fit, warm_start, early stopping."""

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from fedrecsk import (
    FedAvgRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    PopularityRecommender,
    UnknownIdWarning,
)
from fedrecsk.data import encode
from fedrecsk.datasets import make_interactions
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._factors import hold_out

FAST = {"n_factors": 4, "n_rounds": 8, "random_state": 0, "device": "cpu"}
ARRAYS = ("user_factors_", "item_factors_", "item_bias_", "times_sampled_")


@pytest.fixture(scope="module")
def newcomers():
    """Users 100..119 with the tastes of the others, and items 20..29 that nobody had before."""
    rows = [
        [user, item]
        for user in range(100, 120)
        for item in range(30)
        if user % 2 == item % 2 and item != user % 20 and item != 20 + user % 10
    ]
    # Known users meet the new items as well.
    rows += [[user, item] for user in range(20) for item in range(20, 30) if user % 2 == item % 2]
    return np.array(rows)


# ---------------------------------------------------------------- partial_fit


def test_the_first_partial_fit_is_a_fit(estimator, obvious, assert_same_fit):
    clients = obvious[:, 0] // 4
    assert clone(estimator).partial_fit(obvious, clients).n_rounds_ >= 1
    assert_same_fit(
        clone(estimator).partial_fit(obvious, clients), clone(estimator).fit(obvious, clients)
    )


def test_partial_fit_takes_new_users_items_and_rows(estimator, obvious, newcomers, n_columns):
    estimator.fit(obvious)
    history = list(estimator.history_)
    assert estimator.partial_fit(newcomers) is estimator
    assert estimator.user_ids_.tolist() == [*range(40), *range(100, 120)]
    assert estimator.item_ids_.tolist() == list(range(30))
    assert estimator.client_ids_.tolist() == estimator.user_ids_.tolist()
    both = np.concatenate([obvious, newcomers])
    for code, user in enumerate(estimator.user_ids_):
        start, stop = estimator.seen_indptr_[code : code + 2]
        assert estimator.seen_indices_[start:stop].tolist() == sorted(both[both[:, 0] == user, 1])
    assert estimator.history_[: len(history)] == history
    assert [record["round"] for record in estimator.history_] == list(
        range(1, 2 * len(history) + 1)
    )
    assert estimator.n_rounds_ == 2 * len(history)
    assert np.isfinite(estimator.predict(both)).all()  # and no warning: all ids are known
    ids, _ = estimator.recommend(k=30)
    assert ids.shape == (60, 30)
    if isinstance(estimator, PopularityRecommender):
        assert estimator.item_counts_.tolist() == np.bincount(both[:, 1]).tolist()
        return
    assert estimator.user_factors_.shape == (60, n_columns(estimator))
    assert estimator.item_factors_.shape == (30, n_columns(estimator))
    if not isinstance(estimator, FELLRecRecommender):  # which has no vector without a text
        assert estimator.item_bias_.shape == (30,)


def test_partial_fit_learns_the_new_and_keeps_the_old(trainable, obvious, newcomers):
    held_out_new = [[user, user % 20] for user in range(100, 120)] + [
        [user, 20 + user % 10] for user in range(100, 120)
    ]
    held_out_old = [[user, user % 20] for user in range(40)]
    trainable.fit(obvious)
    with pytest.warns(UnknownIdWarning):
        before = trainable.score(held_out_new)
    trainable.partial_fit(newcomers)
    assert trainable.score(held_out_new) > before + 0.2
    assert trainable.score(held_out_new) > 0.9
    # To a reader of histories the five new items are as good for those who have not met them.
    reader = isinstance(trainable, FELLRecRecommender)
    assert trainable.score(held_out_old) > (0.65 if reader else 0.9)
    # What is asked of a round's clients is counted over both fits.
    if hasattr(trainable, "times_sampled_"):
        drawn = sum(record["clients"] for record in trainable.history_)
        assert trainable.times_sampled_.sum() == drawn


def test_partial_fit_goes_on_from_the_factors(trainable, obvious):
    """Nothing new to learn: the loss starts where it ended, and rows are not counted twice."""
    if isinstance(trainable, FELLRecRecommender):
        # Every item is a target in every round, so that losses can be compared.
        trainable.set_params(examples_per_user=8)
    trainable.fit(obvious)
    first_loss, last_loss = (trainable.history_[place]["loss"] for place in (0, -1))
    seen = trainable.seen_indices_.copy()
    trainable.partial_fit(obvious[::-1])
    next_loss = trainable.history_[trainable.n_rounds]["loss"]
    assert abs(next_loss - last_loss) < abs(next_loss - first_loss)
    np.testing.assert_array_equal(trainable.seen_indices_, seen)


def test_partial_fit_keeps_clients(trainable, obvious, newcomers):
    trainable.fit(obvious, obvious[:, 0] // 4)
    with pytest.raises(ValueError, match=r"User 0 is under two clients, 0 and 77"):
        trainable.partial_fit(newcomers, np.full(len(newcomers), 77))
    assert trainable.n_rounds_ == trainable.n_rounds
    # Users 100..119 join the clients 5 to 9 that are there already.
    trainable.partial_fit(newcomers, np.where(newcomers[:, 0] < 100, newcomers[:, 0] // 4,
                                              newcomers[:, 0] // 4 - 20))  # fmt: skip
    assert trainable.client_ids_.tolist() == list(range(10))
    if hasattr(trainable, "times_sampled_"):
        assert np.unique(trainable.times_sampled_[20:24]).size == 1


def test_partial_fit_refuses_ids_of_another_kind(estimator, obvious):
    estimator.fit(obvious)
    with pytest.raises(TypeError, match=r"'user_id' of the new rows are text.*known ids are num"):
        estimator.partial_fit([["a", "b"]])
    estimator.partial_fit([[0.0, 99.0]])
    assert estimator.user_ids_.tolist() == list(range(40))
    assert estimator.item_ids_.tolist() == [*range(20), 99]
    assert estimator.item_ids_.dtype == np.int64


def test_partial_fit_applies_min_rating(estimator, obvious):
    rated = np.column_stack([obvious, np.full(len(obvious), 5)])
    estimator.set_params(min_rating=4).fit(rated)
    estimator.partial_fit([[100, 0, 5], [100, 50, 1], [101, 0, 2], [100, 2, 4]])
    assert estimator.user_ids_.tolist() == [*range(40), 100]
    assert estimator.item_ids_.tolist() == list(range(20))


def test_partial_fit_with_another_width_is_refused(trainable, obvious):
    if hasattr(trainable, "sizes"):
        change, message = {"sizes": (2, 4, 9)}, r"from sizes \(2, 4, 8\) with \(2, 4, 9\)"
    elif hasattr(trainable, "lora_rank"):
        change, message = {"lora_rank": 3}, "with other adapters than before.*lora_rank"
    else:
        change, message = {"n_factors": 3}, r"from 4 columns.*n_factors.*changed"
    trainable.fit(obvious).set_params(**change)
    with pytest.raises(ValueError, match=f"Cannot go on {message}"):
        trainable.partial_fit(obvious)


def test_partial_fit_learns_in_several_steps(trainable, obvious):
    """Ten users at a time."""
    for start in range(0, 40, 10):
        trainable.partial_fit(obvious[np.isin(obvious[:, 0], range(start, start + 10))])
    assert trainable.n_rounds_ == 4 * trainable.n_rounds
    assert trainable.score([[user, user % 20] for user in range(40)]) > 0.95


# ---------------------------------------------------------------- warm_start


def test_warm_start_goes_on(trainable, obvious, assert_same_fit):
    cold = clone(trainable).fit(obvious)
    warm = trainable.set_params(warm_start=True).fit(obvious)
    np.testing.assert_array_equal(warm.item_factors_, cold.item_factors_)
    assert [r["loss"] for r in warm.history_] == [r["loss"] for r in cold.history_]
    warm.fit(obvious)
    n_rounds = trainable.n_rounds
    assert warm.n_rounds_ == 2 * n_rounds
    assert [record["round"] for record in warm.history_] == list(range(1, 2 * n_rounds + 1))
    assert not np.array_equal(warm.item_factors_, cold.item_factors_)
    assert warm.history_[n_rounds]["loss"] < warm.history_[0]["loss"]
    assert_same_fit(warm.set_params(warm_start=False).fit(obvious), cold)


def test_warm_start_forgets_rows_but_not_factors(trainable, obvious):
    """Unlike partial_fit, which keeps the old rows."""
    trainable.set_params(warm_start=True).fit(obvious)
    trainable.fit(obvious[obvious[:, 0] < 10])
    assert trainable.user_ids_.tolist() == list(range(10))
    assert trainable.seen_indptr_[-1] == (obvious[:, 0] < 10).sum()
    assert trainable.n_rounds_ == 2 * trainable.n_rounds
    assert trainable.score([[user, user % 20] for user in range(10)]) > 0.95


# ---------------------------------------------------------------- early stopping


@pytest.fixture(scope="module")
def tastes():
    X, _ = make_interactions(60, 50, 3, mean_interactions=12, return_X_y=True, random_state=0)
    # Three users with a single row, who must keep it.
    return np.concatenate([X[:, :2], [[900, 1], [901, 2], [902, 3]]])


@pytest.mark.parametrize("objective", ["whole-data", "bce"])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("cls", [FedFNNRecommender, FedAvgRecommender])
def test_early_stopping_stops_and_returns_the_best(cls, objective, refit, tastes):
    model = cls(
        **FAST | {"n_rounds": 300},
        objective=objective,
        refit=refit,
        early_stopping=True,
        n_iter_no_change=3,
        tol=0.01,
    )
    if cls is FedFNNRecommender:
        model.set_params(predictor="linear")
    model.fit(tastes)
    assert model.n_rounds_ < 300
    watched = pd.DataFrame(model.history_)["validation_ndcg"].to_numpy()
    assert ((watched >= 0) & (watched <= 1)).all()
    best, waited = -1.0, 0
    for t, value in enumerate(watched):
        waited = 0 if value > best + 0.01 else waited + 1
        best = max(best, value)
        assert (waited == 3) == (t == len(watched) - 1)
    assert len(model.user_ids_) == 63

    # Once more by hand, from the same held-out rows and the factors that fit returned.
    data = encode(tastes)
    train, _ = hold_out(data, 0.1, Streams(0))
    table = model.user_factors_ @ model.item_factors_.T + model.item_bias_
    values = []
    for user in np.unique(data.user[~train]):
        seen = data.item[train & (data.user == user)]
        truth = set(data.item[~train & (data.user == user)])
        ranked = [i for i in np.argsort(-table[user], kind="stable") if i not in seen][:20]
        gain = sum(1 / np.log2(place + 2) for place, item in enumerate(ranked) if item in truth)
        values.append(gain / sum(1 / np.log2(place + 2) for place in range(min(20, len(truth)))))
    assert np.mean(values) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_held_out_rows_leave_every_user_one(fraction, tastes):
    data = encode(tastes)
    train, validation = hold_out(data, fraction, Streams(0))
    kept = np.bincount(data.user[train], minlength=data.n_users)
    assert (kept >= 1).all()
    expected = np.minimum(np.ceil(fraction * data.user_counts), data.user_counts - 1)
    np.testing.assert_array_equal(data.user_counts - kept, expected)
    np.testing.assert_array_equal(validation.users, np.flatnonzero(expected))
    truth = validation.truth.toarray().astype(bool)
    for place, user in enumerate(validation.users):
        held = data.item[~train & (data.user == user)]
        assert np.flatnonzero(truth[place]).tolist() == held.tolist()
        seen = validation.seen_items[validation.seen_rows == place]
        assert sorted(seen) == data.item[train & (data.user == user)].tolist()
    same, _ = hold_out(data, fraction, Streams(0))
    np.testing.assert_array_equal(train, same)
    other, _ = hold_out(data, fraction, Streams(1))
    assert (train != other).any()


def test_early_stopping_still_excludes_held_out_rows_from_lists(trainable, obvious):
    """Watched rows were in fit: nobody wants to be recommended them."""
    trainable.set_params(early_stopping=True, validation_fraction=0.3).fit(obvious)
    ids, scores = trainable.recommend(k=11)
    for user in range(40):
        assert not set(ids[user]) & set(obvious[obvious[:, 0] == user, 1])
    assert np.isfinite(scores).all()


def test_early_stopping_needs_users_with_two_rows(trainable):
    rows = [[user, user % 3] for user in range(9)]
    trainable.set_params(early_stopping=True)
    if isinstance(trainable, FELLRecRecommender):  # nothing to learn, and nothing to hold out
        assert trainable.fit(rows).score([[0, 1]]) > 0
        return
    with pytest.raises(ValueError, match=r"early_stopping=True needs users with at least two"):
        trainable.fit(rows)
    trainable.set_params(early_stopping=False).fit(rows)
