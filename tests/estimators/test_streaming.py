"""An offline fit meets a stream: new rows, users and items arrive, few rounds follow each time."""

import copy

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from fedrecsk import FedAvgRecommender, FedFNNRecommender, PopularityRecommender
from fedrecsk.datasets import make_interactions
from fedrecsk.model_selection import PerUserHoldout

SEEDS = (0, 1, 2)
N_PORTIONS = 2
COMMON = {"n_factors": 16, "clients_per_round": 0.05, "random_state": 0, "device": "cpu"}
# Estimator, rounds offline, rounds after each portion of the stream; as few as get close.
KINDS = {
    "fedfnn-whole-data": (FedFNNRecommender(**COMMON), 40, 10, 4),
    "fedfnn-bce": (FedFNNRecommender(**COMMON, objective="bce"), 40, 10, 4),
    # Plain averaging takes a hundred rounds to get anywhere with 5% of the clients.
    "fedavg": (FedAvgRecommender(**COMMON | {"clients_per_round": 0.2}), 60, 10, 6),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def streams():
    """By seed: the portions of the training rows, the first one large, and held-out rows."""
    return {seed: make_stream(seed) for seed in SEEDS}


def make_stream(seed, n_users=300, n_items=200):
    X, _ = make_interactions(
        n_users, n_items, 5, mean_interactions=20, return_X_y=True, random_state=seed
    )
    X = X[:, :2]
    train, test = next(PerUserHoldout(random_state=seed).split(X))
    rng = np.random.default_rng(seed)
    # A row is there when its user and its item are: a seventh of the users and a twentieth
    # of the items come late, and a seventh of the other rows as well.
    user, item, row = (
        np.where(rng.random(n) < late, rng.integers(1, N_PORTIONS + 1, n), 0)
        for n, late in ((n_users, 0.15), (n_items, 0.05), (len(train), 0.15))
    )
    rows = X[train]
    portion = np.maximum.reduce([user[rows[:, 0]], item[rows[:, 1]], row])
    held_out = X[test]
    held_out = held_out[np.isin(held_out[:, 1], rows[:, 1])]
    return [rows[portion == place] for place in range(N_PORTIONS + 1)], held_out


@pytest.fixture(scope="module")
def start(kind, streams):
    """Give a function that returns a new copy of the offline fit for a seed."""
    estimator, offline, *_ = KINDS[kind]
    fitted = {}

    def copy_of_fit(seed):
        if seed not in fitted:
            model = clone(estimator).set_params(n_rounds=offline, random_state=seed)
            fitted[seed] = model.fit(streams[seed][0][0])
        return copy.deepcopy(fitted[seed])

    return copy_of_fit


@pytest.fixture(scope="module")
def streamed(kind, streams, start):
    """By seed: the model after the whole stream."""
    *_, online, _ = KINDS[kind]
    return {seed: after_stream(start(seed), streams[seed], online) for seed in SEEDS}


def after_stream(model, stream, online):
    """Go on through all portions, with some rounds after each."""
    model.set_params(n_rounds=online)
    for portion in stream[0][1:]:
        model.partial_fit(portion)
    return model


def scores_from_scratch(kind, streams, n_rounds):
    """Score (n_seeds,) fits on all rows at once."""
    estimator = clone(KINDS[kind][0]).set_params(n_rounds=n_rounds)
    return [
        clone(estimator).set_params(random_state=seed).fit(np.concatenate(portions)).score(held_out)
        for seed, (portions, held_out) in streams.items()
    ]


def test_the_stream_ends_where_a_fit_from_scratch_does(kind, streams, streamed):
    """With as many rounds in all, most of which the stream had before the new rows came."""
    _, offline, online, _ = KINDS[kind]
    of_stream = np.mean([streamed[seed].score(streams[seed][1]) for seed in SEEDS])
    of_scratch = np.mean(scores_from_scratch(kind, streams, offline + N_PORTIONS * online))
    assert of_stream >= 0.97 * of_scratch


def test_the_stream_gets_close_sooner_than_a_fit_from_scratch(kind, streams, start):
    """Near to where a fit from scratch ends, in rounds in which that is not there yet."""
    _, offline, _, few = KINDS[kind]
    of_stream = np.mean(
        [after_stream(start(seed), streams[seed], few).score(streams[seed][1]) for seed in SEEDS]
    )
    online = N_PORTIONS * few
    assert of_stream > np.mean(scores_from_scratch(kind, streams, online))
    assert of_stream >= 0.9 * np.mean(scores_from_scratch(kind, streams, offline + online))


def test_the_first_round_online_keeps_what_was_learned(streams, start):
    """One round with 15 or 60 of 300 clients must not take the place of 40 rounds before."""
    ratios = []
    for seed, (portions, held_out) in streams.items():
        model = start(seed)
        known = held_out[
            np.isin(held_out[:, 0], model.user_ids_) & np.isin(held_out[:, 1], model.item_ids_)
        ]
        before = model.score(known)
        # The same rows once more: nothing is new, and nothing is to be lost.
        model.set_params(n_rounds=1).partial_fit(portions[0][:1])
        ratios.append(model.score(known) / before)
    assert np.mean(ratios) > 0.96


def test_the_stream_teaches_what_is_new(streams, start, streamed):
    """Held-out rows of users or items that came late, against popularity over all rows."""
    gains = []
    for seed, (portions, held_out) in streams.items():
        offline = start(seed)
        known = [
            np.isin(held_out[:, 0], offline.user_ids_),
            np.isin(held_out[:, 1], offline.item_ids_),
        ]
        late = held_out[~np.logical_and(*known)]
        assert len(late) > 50
        popularity = PopularityRecommender().fit(np.concatenate(portions))
        gains.append(streamed[seed].score(late) / popularity.score(late))
    assert np.mean(gains) > 1.2


# ---------------------------------------------------------------- what is carried on


def by_user(model, name):
    """Give the rows of a fitted array by user id."""
    return dict(zip(model.user_ids_.tolist(), getattr(model, name), strict=True))


def test_counts_and_history_go_on(kind, streams, start):
    _, offline, online, _ = KINDS[kind]
    portions, _ = streams[0]
    model = start(0).set_params(n_rounds=online)
    for n, portion in enumerate(portions[1:], start=1):
        history, times = model.history_, by_user(model, "times_sampled_")
        model.partial_fit(portion)
        assert model.history_[: len(history)] == history
        table = pd.DataFrame(model.history_)
        assert table["round"].tolist() == list(range(1, offline + n * online + 1))
        assert np.isfinite(table["loss"]).all()
        more = np.array(
            [after - times.get(user, 0) for user, after in by_user(model, "times_sampled_").items()]
        )
        assert ((more >= 0) & (more <= online)).all()
        assert more.sum() == table["clients"][-online:].sum()
        # The model meets new rows, not a new start: the loss stays below that of the first round.
        assert table["loss"][offline + (n - 1) * online] < table["loss"][0]


def test_known_users_take_part_online_as_well(streams, start):
    """New users do not take all the places: known ones have new rows, too."""
    portions, _ = streams[0]
    model = start(0)
    known, times = model.user_ids_, model.times_sampled_
    model.set_params(n_rounds=5).partial_fit(np.concatenate(portions[1:]))
    is_known = np.isin(model.user_ids_, known)
    drawn_known = (model.times_sampled_[is_known] - times).sum()
    drawn_new = model.times_sampled_[~is_known].sum()
    assert drawn_new > 0
    # Their share of the places is at least half of their share of the clients.
    assert drawn_known / (drawn_known + drawn_new) > 0.5 * is_known.mean()


def test_known_users_start_from_their_vectors(kind, streams):
    """Without refit, whoever is not drawn online has the vector of before, to the bit."""
    portions, _ = streams[0]
    estimator, offline, *_ = KINDS[kind]
    model = clone(estimator).set_params(n_rounds=offline, refit=False)
    if isinstance(model, FedFNNRecommender):
        model.set_params(predictor=None)
    model.fit(portions[0])
    before = by_user(model, "user_factors_")
    times = by_user(model, "times_sampled_")
    model.set_params(n_rounds=2).partial_fit(portions[1])
    n_same = 0
    counts = by_user(model, "times_sampled_")
    for user, vector in by_user(model, "user_factors_").items():
        if user in before and counts[user] == times[user]:
            np.testing.assert_array_equal(vector, before[user])
            n_same += 1
        elif user in before:
            assert not np.array_equal(vector, before[user])
    assert n_same > 100


def test_predictions_leave_known_users_alone(streams):
    """Gated predictions go to users who never took part, also those who came with the stream."""
    portions, _ = streams[0]
    model = FedFNNRecommender(
        **COMMON | {"clients_per_round": 0.2}, objective="bce", refit=False, n_rounds=20
    ).fit(portions[0])
    before = by_user(model, "user_factors_")
    times = by_user(model, "times_sampled_")
    model.set_params(n_rounds=1).partial_fit(portions[1])
    n_same = 0
    counts = by_user(model, "times_sampled_")
    for user, vector in by_user(model, "user_factors_").items():
        if times.get(user, 0) > 0 and counts[user] == times[user]:
            np.testing.assert_array_equal(vector, before[user])
            n_same += 1
    assert n_same > 100


def test_newcomers_are_recommended_and_recommendable(start, streamed):
    old, model = start(1), streamed[1]
    new_users = np.setdiff1d(model.user_ids_, old.user_ids_)
    new_items = np.setdiff1d(model.item_ids_, old.item_ids_)
    assert len(new_users) > 30
    assert len(new_items) >= 5
    ids, scores = model.recommend(new_users, k=20)
    assert np.isfinite(scores).all()
    # Not one list for all newcomers, as the crowd's would be.
    assert len({tuple(row) for row in ids[:, :5].tolist()}) > len(new_users) / 2
    shown = np.unique(model.recommend(k=20)[0])
    assert np.isin(new_items, shown).mean() > 0.25
    assert np.isfinite(model.similar_items(new_items, k=3)[1]).all()
