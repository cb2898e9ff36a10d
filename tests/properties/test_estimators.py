"""Small estimators on data that are drawn: answers of documented shapes, or errors that say why."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from fedrecsk import (
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    HeteFedRecRecommender,
    PopularityRecommender,
)
from tests.properties.documented import Refused, outcome
from tests.properties.strategies import (
    ANYTHING,
    CELLS,
    client_of_user,
    contained,
    examples,
    ids,
    tables,
)

FAST = {"n_rounds": 1, "random_state": 0, "device": "cpu"}
ESTIMATORS = {
    "popularity": PopularityRecommender(),
    "fedavg": FedAvgRecommender(**FAST, n_factors=2, local_epochs=1),
    "fedfnn": FedFNNRecommender(**FAST, n_factors=2),
    "fedfast": FedFastRecommender(**FAST, n_factors=2, local_epochs=1, n_clusters=2),
    "hetefedrec": HeteFedRecRecommender(**FAST, sizes=(1, 2), group_ratio=(1, 1)),
}
NAMES = pytest.mark.parametrize("name", ESTIMATORS)


def state_of(estimator):
    """All that a fit has left, copied."""
    return {
        name: copy.deepcopy(value)
        for name, value in vars(estimator).items()
        if name.endswith("_") and not name.startswith("_")
    }


def assert_same_state(estimator, before):
    after = state_of(estimator)
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name, strict=True)


@settings(max_examples=examples(8))
@given(st.data())
@NAMES
def test_any_table_is_fitted_and_asked(name, data):
    rows = data.draw(tables())
    clients = data.draw(st.none() | client_of_user(rows))
    estimator = clone(ESTIMATORS[name])
    X = data.draw(contained(rows))
    assert outcome("estimators", lambda: estimator.fit(X, clients)) is estimator
    users, items = sorted({row[0] for row in rows}), sorted({row[1] for row in rows})
    assert (estimator.user_ids_.tolist(), estimator.item_ids_.tolist()) == (users, items)
    probability = outcome("estimators", lambda: estimator.predict(X))
    assert probability.shape == (len(rows),)
    assert ((probability >= 0) & (probability <= 1)).all()
    k = data.draw(st.integers(1, 8))
    found, scores = outcome("estimators", lambda: estimator.recommend(k=k))
    assert found.shape == scores.shape == (len(users), min(k, len(items)))
    seen = {row[:2] for row in rows}
    for user, own, values in zip(users, found.tolist(), scores.tolist(), strict=True):
        assert len(set(own)) == len(own)
        assert set(own) <= set(items)
        assert values == sorted(values, reverse=True)
        for item, score in zip(own, values, strict=True):
            assert (score == -np.inf) == ((user, item) in seen)
    found, scores = outcome("estimators", lambda: estimator.similar_items(items, k=k))
    assert found.shape == scores.shape == (len(items), min(k, len(items) - 1))
    assert np.isfinite(scores).all()


@settings(max_examples=examples(8))
@given(st.data())
@NAMES
def test_unknown_ids_get_finite_answers(name, data):
    """Ids of any kind, some of them those of the fit, some not."""
    rows = data.draw(tables(n_columns=2))
    estimator = clone(ESTIMATORS[name]).fit(rows)
    asked = data.draw(tables(n_columns=2))
    probability = outcome("estimators", lambda: estimator.predict(asked))
    assert probability.shape == (len(asked),)
    assert np.isfinite(probability).all()
    users = data.draw(ids())
    found, scores = outcome("estimators", lambda: estimator.recommend(users, k=3))
    assert found.shape == scores.shape == (len(users), min(3, len(estimator.item_ids_)))
    assert not np.isnan(scores).any()
    score = outcome("estimators", lambda: estimator.score(asked))
    assert np.isnan(score) or 0 <= score <= 1


@settings(max_examples=examples(8))
@given(st.data())
@NAMES
def test_more_rows_are_taken_in_or_nothing_is(name, data):
    """After an error of `partial_fit` the estimator is what it was."""
    kinds = ("integers", "floats", "text")
    rows, more = data.draw(tables(n_columns=2, kinds=kinds)), data.draw(tables(kinds=kinds))
    estimator = clone(ESTIMATORS[name]).fit(rows)
    before = state_of(estimator)
    clients = data.draw(st.none() | client_of_user(more))
    found = outcome("estimators", lambda: estimator.partial_fit(more, clients))
    if isinstance(found, Refused):
        assert_same_state(estimator, before)
        return
    assert set(estimator.user_ids_.tolist()) == {row[0] for row in [*rows, *more]}
    assert set(estimator.item_ids_.tolist()) == {row[1] for row in [*rows, *more]}
    assert np.isfinite(estimator.predict(rows)).all()


GOOD = [[user, item] for user in range(4) for item in range(4) if user != item]
CALLS = {
    "fit": lambda estimator, X, extra: estimator.fit(X, extra),
    "partial_fit": lambda estimator, X, extra: estimator.partial_fit(X, extra),
    "predict": lambda estimator, X, extra: estimator.predict(X),
    "recommend": lambda estimator, X, extra: estimator.recommend(X, 2),
    "candidates": lambda estimator, X, extra: estimator.recommend([0], candidates=X),
    "similar_items": lambda estimator, X, extra: estimator.similar_items(X),
    "score": lambda estimator, X, extra: estimator.score(X, sample_weight=extra),
}


@settings(max_examples=examples(25))
@given(ANYTHING, st.none() | st.lists(CELLS, max_size=4))
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_lost_on_bad_input(call, X, extra):
    """Anything at all is answered or refused, and only `fit` changes the fit."""
    estimator = PopularityRecommender().fit(GOOD)
    before = state_of(estimator)
    found = outcome("estimators", lambda: CALLS[call](estimator, X, extra))
    if isinstance(found, Refused) or call not in ("fit", "partial_fit"):
        assert_same_state(estimator, before)
    if call == "predict" and not isinstance(found, Refused):
        assert np.isfinite(found).all()


@settings(max_examples=examples(8))
@given(ANYTHING)
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "popularity"])
def test_a_failed_fit_of_a_federation_leaves_the_old_one(name, X):
    estimator = clone(ESTIMATORS[name]).fit(GOOD)
    before = state_of(estimator)
    for call in (estimator.fit, estimator.partial_fit):
        if not isinstance(outcome("estimators", lambda call=call: call(X)), Refused):
            return
        assert_same_state(estimator, before)
