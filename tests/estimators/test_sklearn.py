"""Estimators inside scikit-learn: its own checks, searches, pipelines, frames and callbacks."""

import pickle

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.callback import ProgressBar, ScoringMonitor
from sklearn.model_selection import (
    GridSearchCV,
    RandomizedSearchCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    learning_curve,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder
from sklearn.utils import estimator_html_repr
from sklearn.utils.estimator_checks import check_estimator

from fedrecsk import (
    CentralizedRecommender,
    FedAvgRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
    PopularityRecommender,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.estimators._sklearn import EXPECTED_FAILED_CHECKS
from fedrecsk.metrics import evaluate, ranking_scorer
from fedrecsk.model_selection import PerUserHoldout, PerUserKFold

FAST = {"n_factors": 4, "n_rounds": 4, "random_state": 0, "device": "cpu"}
COLUMNS = ["user_id", "item_id", "rating", "timestamp"]


@pytest.fixture(scope="module")
def interactions():
    """120 users in 30 clients, 60 items, 3 tastes; ratings and timestamps."""
    return make_interactions(
        120, 60, 3, mean_interactions=15, n_clients=30, return_X_y=True, random_state=0
    )


@pytest.fixture(scope="module")
def halves(interactions):
    """X and client ids of a training half, and of a held-out half."""
    X, client_ids = interactions
    train, test = next(PerUserHoldout(random_state=0).split(X))
    return X[train], client_ids[train], X[test], client_ids[test]


# ---------------------------------------------------------------- scikit-learn's own checks


@pytest.mark.filterwarnings(
    # The checks pass random numbers with more columns than interactions have.
    "ignore:X has .* columns; those after the fourth:UserWarning",
    # check_fit_idempotent holds out rows of continuous numbers, so none comes up in fit.
    "ignore:20 of 20 users are unknown to fit:fedrecsk.UnknownIdWarning",
    # The numbers come without texts, and a random number hardly ever twice.
    "ignore::fedrecsk.NoItemTextWarning",
    "ignore:No user has two interactions:UserWarning",
)
@pytest.mark.parametrize(
    "estimator",
    [
        PopularityRecommender(),
        FedFNNRecommender(n_rounds=2),
        FedFNNRecommender(n_rounds=2, refit=False, predictor="cluster"),
        FedFNNRecommender(n_rounds=1, objective="bce"),
        FedFNNRecommender(n_rounds=2, objective="bce", predictor="linear"),
        FedAvgRecommender(n_rounds=2),
        FedAvgRecommender(n_rounds=2, objective="whole-data", early_stopping=False),
        CentralizedRecommender(n_rounds=2),
        HeteFedRecRecommender(n_rounds=2),
        HeteFedRecRecommender("ncf", n_rounds=1, local_epochs=1),
        FELLRecRecommender("tiny_encoder", n_rounds=1, local_epochs=1),
    ],
    ids=repr,
)
def test_checks_of_scikit_learn(estimator, tiny_backbones):
    if isinstance(estimator, FELLRecRecommender):
        estimator.set_params(backbone=tiny_backbones[estimator.backbone])
    logs = check_estimator(
        estimator,
        expected_failed_checks=EXPECTED_FAILED_CHECKS,
        on_fail="raise",
        on_skip=None,  # the one on array APIs, which scikit-learn runs only where asked to
    )
    by_status = {}
    for log in logs:
        by_status.setdefault(log["status"], set()).add(log["check_name"])
    assert len(by_status["passed"]) > 30
    # An exemption whose check passes by now has to go.
    assert by_status["xfail"] == set(EXPECTED_FAILED_CHECKS)
    assert by_status.get("skipped", set()) <= {"check_array_api_input"}


# ---------------------------------------------------------------- searches and splits


def widths(estimator):
    """Two widths of the vectors to choose from, under the name that the estimator has for them."""
    if hasattr(estimator, "sizes"):
        return {"sizes": [(2, 3, 4), (4, 6, 8)]}
    if hasattr(estimator, "lora_rank"):
        return {"lora_rank": [1, 4]}
    return {"n_factors": [2, 8]}


def grid_search(estimator, **kwargs):
    grid = {**widths(estimator), "n_rounds": [1, 6]}
    if isinstance(estimator, PopularityRecommender):
        grid = {"min_rating": [None, 4]}
    return GridSearchCV(estimator, grid, cv=PerUserHoldout(random_state=0), **kwargs)


def test_grid_search_positional(typical, interactions):
    X, client_ids = interactions
    search = grid_search(typical).fit(X, client_ids)
    assert (search.cv_results_["mean_test_score"] > 0.1).all()
    np.testing.assert_array_equal(search.best_estimator_.client_ids_, np.arange(30))
    assert search.best_params_ in search.cv_results_["params"]
    # The score of the search is the one that fit and score give by hand.
    train, test = next(PerUserHoldout(random_state=0).split(X))
    by_hand = clone(typical).set_params(**search.best_params_).fit(X[train], client_ids[train])
    assert search.best_score_ == by_hand.score(X[test])


def test_grid_search_by_metadata_routing(typical, interactions):
    X, client_ids = interactions
    expected = grid_search(typical).fit(X, client_ids)
    with sklearn.config_context(enable_metadata_routing=True):
        search = grid_search(typical).fit(X, client_ids=client_ids)
        assert search.score([[X[0, 0], 900]], client_ids=client_ids[:1]) == 0
    np.testing.assert_array_equal(search.best_estimator_.client_ids_, np.arange(30))
    np.testing.assert_array_equal(
        search.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"]
    )


def test_sample_weight_is_routed_on_request(interactions):
    X, client_ids = interactions
    weight = np.random.default_rng(0).random(len(X))
    model = FedAvgRecommender(**FAST)
    plain = cross_val_score(model, X, client_ids, cv=PerUserHoldout(random_state=0))
    with sklearn.config_context(enable_metadata_routing=True):
        scores = cross_val_score(
            model,
            X,
            cv=PerUserHoldout(random_state=0),
            params={"client_ids": client_ids, "sample_weight": weight},
        )
    train, test = next(PerUserHoldout(random_state=0).split(X))
    model.fit(X[train], client_ids[train])
    assert scores[0] == model.score(X[test], sample_weight=weight[test])
    assert plain[0] == model.score(X[test])
    assert scores[0] != plain[0]


def test_grid_search_in_two_processes(interactions):
    X, client_ids = interactions
    one = grid_search(FedFNNRecommender(**FAST)).fit(X, client_ids)
    two = grid_search(FedFNNRecommender(**FAST), n_jobs=2).fit(X, client_ids)
    # Another process may have another number of threads: equal to 1e-5, not to the last bit.
    np.testing.assert_allclose(
        two.cv_results_["mean_test_score"], one.cv_results_["mean_test_score"], atol=1e-5
    )
    np.testing.assert_allclose(
        two.best_estimator_.item_factors_, one.best_estimator_.item_factors_, atol=1e-5
    )


def test_ranking_scorers_in_scoring(interactions):
    X, client_ids = interactions
    cv = PerUserHoldout(random_state=0)
    scoring = {"recall": ranking_scorer("recall", k=5), "ndcg": ranking_scorer("ndcg", k=20)}
    search = GridSearchCV(
        FedFNNRecommender(**FAST), {"n_factors": [2, 8]}, scoring=scoring, refit="ndcg", cv=cv
    ).fit(X, client_ids)
    train, test = next(cv.split(X))
    for place, n_factors in enumerate((2, 8)):
        model = FedFNNRecommender(**FAST | {"n_factors": n_factors})
        model.fit(X[train], client_ids[train])
        values = evaluate(model, X[test], metrics=("recall", "ndcg"), k=(5, 20)).overall
        assert search.cv_results_["mean_test_recall"][place] == values["recall@5"]
        assert search.cv_results_["mean_test_ndcg"][place] == values["ndcg@20"]
        assert values["ndcg@20"] == model.score(X[test])


def test_randomized_search(interactions):
    X, client_ids = interactions
    search = RandomizedSearchCV(
        FedAvgRecommender(**FAST),
        {"l2": [0.0, 0.01, "auto"], "learning_rate": [0.05, 0.1]},
        n_iter=3,
        cv=PerUserHoldout(random_state=0),
        random_state=0,
    ).fit(X, client_ids)
    assert search.best_score_ > 0.1


def test_cross_validation(typical, interactions):
    X, client_ids = interactions
    cv = PerUserKFold(3, random_state=0)
    scores = cross_val_score(typical, X, client_ids, cv=cv)
    assert scores.shape == (3,)
    assert (scores > 0.1).all()
    np.testing.assert_array_equal(
        cross_validate(typical, X, client_ids, cv=cv)["test_score"], scores
    )


# Rare items are all in one fold, and unknown to the fit on the others.
@pytest.mark.filterwarnings("ignore:.* items are unknown to fit:fedrecsk.UnknownIdWarning")
def test_cross_val_predict(typical, interactions):
    X, client_ids = interactions
    cv = PerUserKFold(3, random_state=0)
    probability = cross_val_predict(typical, X, client_ids, cv=cv)
    assert probability.shape == (len(X),)
    assert ((probability >= 0) & (probability <= 1)).all()
    train, test = list(cv.split(X))[1]
    by_hand = clone(typical).fit(X[train], client_ids[train])
    np.testing.assert_array_equal(probability[test], by_hand.predict(X[test]))


@pytest.mark.filterwarnings(
    # What a model was fitted on leaves nothing to find, so training scores are nan by design.
    "ignore:The score is nan:fedrecsk.NothingHeldOutWarning",
    # A small share of the training rows leaves out some users.
    "ignore:.* users are unknown to fit:fedrecsk.UnknownIdWarning",
)
def test_learning_curve(typical, interactions):
    X, client_ids = interactions
    sizes, train_scores, test_scores = learning_curve(
        typical,
        X,
        client_ids,
        cv=PerUserHoldout(random_state=0),
        train_sizes=[0.2, 1.0],
        shuffle=True,
        random_state=0,
    )
    assert sizes[0] < sizes[1]
    assert np.isnan(train_scores).all()
    assert (test_scores > 0.1).all()
    if not isinstance(typical, PopularityRecommender):
        assert test_scores[1, 0] > test_scores[0, 0]


# ---------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def named(interactions):
    """The interactions as strings, and what encodes them."""
    X, client_ids = interactions
    names = np.column_stack(
        [[f"user {u}" for u in X[:, 0]], [f"item {i}" for i in X[:, 1]]]
    ).astype(object)
    return names, client_ids


def pipeline(estimator):
    return make_pipeline(
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), estimator
    )


def test_pipeline_with_an_encoder(typical, named):
    X, client_ids = named
    train, test = next(PerUserHoldout(random_state=0).split(X))
    model = pipeline(clone(typical)).fit(X[train], client_ids[train])
    direct = clone(typical).fit(model[0].transform(X[train]).astype(int), client_ids[train])
    np.testing.assert_array_equal(
        model.predict(X[train]), direct.predict(model[0].transform(X[train]))
    )
    assert model.score(X[test], client_ids[test]) == direct.score(model[0].transform(X[test]))
    assert model[-1].client_ids_.tolist() == list(range(30))
    assert evaluate(model, X[test], metrics="ndcg", k=20).overall["ndcg@20"] == model.score(X[test])


def test_search_over_a_pipeline(typical, named):
    X, client_ids = named
    step = type(typical).__name__.lower()
    values = {"min_rating": [None]} if step.startswith("pop") else widths(typical)
    search = GridSearchCV(
        pipeline(typical),
        {f"{step}__{name}": each for name, each in values.items()},
        cv=PerUserHoldout(random_state=0),
    ).fit(X, client_ids)
    assert (search.cv_results_["mean_test_score"] > 0.1).all()
    assert search.best_estimator_[-1].client_ids_.tolist() == list(range(30))


def test_pipeline_with_metadata_routing(named):
    X, client_ids = named
    with sklearn.config_context(enable_metadata_routing=True):
        model = pipeline(FedAvgRecommender(**FAST)).fit(X, client_ids=client_ids)
        search = GridSearchCV(
            pipeline(FedAvgRecommender(**FAST)),
            {"fedavgrecommender__n_factors": [2]},
            cv=PerUserHoldout(random_state=0),
        ).fit(X, client_ids=client_ids)
        miss = np.array([[X[0, 0], "an item of nobody"]], dtype=object)
        assert model.score(miss, client_ids=client_ids[:1]) == 0
    assert model[-1].client_ids_.tolist() == list(range(30))
    assert search.best_estimator_[-1].client_ids_.tolist() == list(range(30))


def test_callbacks_reach_into_a_pipeline(named):
    X, client_ids = named
    callback = StopAfter(2)
    model = pipeline(FedAvgRecommender(**FAST).set_callbacks(callback)).fit(X, client_ids)
    assert model[-1].n_rounds_ == 2


# ---------------------------------------------------------------- an estimator like any other


def test_get_and_set_params(typical):
    params = typical.get_params()
    assert type(typical)(**params).get_params() == params
    assert typical.set_params(verbose=2) is typical
    assert clone(typical).get_params()["verbose"] == 2
    with pytest.raises(ValueError, match="Invalid parameter 'n_epochs'"):
        typical.set_params(n_epochs=3)


def test_set_output_changes_nothing(fitted, obvious):
    assert not hasattr(fitted, "set_output")
    expected = fitted.predict(obvious), *fitted.recommend([3])
    for transform_output in ("pandas", "polars"):
        with sklearn.config_context(transform_output=transform_output):
            found = fitted.predict(obvious), *fitted.recommend([3])
        for ours, theirs in zip(found, expected, strict=True):
            assert type(ours) is np.ndarray
            np.testing.assert_array_equal(ours, theirs)


def test_html_and_text_repr(typical, obvious):
    name = type(typical).__name__
    assert repr(typical).startswith(f"{name}(")
    assert "not fitted" in estimator_html_repr(typical).lower()
    html = typical.fit(obvious)._repr_html_()
    assert name in html
    assert "fitted" in html.lower()


def test_joblib_and_pickle_round_trips(fitted, obvious, tmp_path, assert_same_fit):
    joblib.dump(fitted, tmp_path / "model.joblib")
    for opened in (joblib.load(tmp_path / "model.joblib"), pickle.loads(pickle.dumps(fitted))):
        assert_same_fit(opened, fitted)
        np.testing.assert_array_equal(opened.predict(obvious), fitted.predict(obvious))
        np.testing.assert_array_equal(opened.recommend(k=3)[0], fitted.recommend(k=3)[0])
    # Opened models can go on: they know what clients hold.
    assert opened.partial_fit([[0, 0], [77, 0]]).user_ids_[-1] == 77
    assert len(fitted.user_ids_) == 40


def test_a_memory_mapped_model_predicts_and_goes_on(fitted, obvious, tmp_path):
    joblib.dump(fitted, tmp_path / "model.joblib")
    opened = joblib.load(tmp_path / "model.joblib", mmap_mode="r")
    np.testing.assert_array_equal(opened.predict(obvious), fitted.predict(obvious))
    np.testing.assert_array_equal(opened.recommend(k=3)[1], fitted.recommend(k=3)[1])
    opened.similar_items([3])
    torch.set_warn_always(True)  # that an array is read-only is said once a process
    try:
        opened.partial_fit(obvious[:3])
    finally:
        torch.set_warn_always(False)
    np.testing.assert_array_equal(opened.user_ids_, fitted.user_ids_)


# ---------------------------------------------------------------- data frames


FRAMES = {
    "pandas": lambda data, columns: pd.DataFrame(data, columns=columns),
    "polars": lambda data, columns: pl.DataFrame(data, schema=columns, orient="row"),
    "pyarrow": lambda data, columns: pa.table(dict(zip(columns, data.T, strict=True))),
}


@pytest.mark.parametrize("library", FRAMES)
def test_frames(library, typical, halves, assert_same_fit):
    X, client_ids, X_test, _ = halves
    frame = FRAMES[library]
    by_array = clone(typical).fit(X, client_ids)
    by_frame = clone(typical).fit(
        frame(np.column_stack([client_ids, X[:, ::-1]]), ["client_id", *COLUMNS[::-1]])
    )
    assert by_frame.feature_names_in_.tolist() == ["client_id", *COLUMNS[::-1]]
    assert by_frame.n_features_in_ == 5
    del by_frame.feature_names_in_
    by_frame.n_features_in_ = 4
    assert_same_fit(by_frame, by_array)
    pairs = frame(X_test[:, [1, 0]], ["item_id", "user_id"])
    np.testing.assert_array_equal(by_frame.predict(pairs), by_array.predict(X_test))
    assert by_frame.score(pairs) == by_array.score(X_test)
    assert by_frame.score(frame(X_test, COLUMNS)) == by_array.score(X_test)


def test_categories_and_series(typical, halves):
    X, client_ids, _, _ = halves
    frame = pd.DataFrame(
        {
            "user_id": pd.Categorical([f"u{user}" for user in X[:, 0]]),
            "item_id": pd.array(X[:, 1], dtype="Int64"),
        }
    )
    typical.fit(frame, pd.Series(client_ids, index=np.arange(len(X))[::-1]))
    assert typical.user_ids_[0] == "u0"
    assert typical.item_ids_.dtype == np.int64
    ids, _ = typical.recommend(frame["user_id"].iloc[:3], k=2)
    assert ids.shape == (3, 2)


def test_feature_names_go_with_the_frame(typical, halves):
    X, _, _, _ = halves
    typical.fit(pd.DataFrame(X, columns=COLUMNS))
    assert typical.feature_names_in_.tolist() == COLUMNS
    typical.fit(X)
    assert not hasattr(typical, "feature_names_in_")


def test_frames_that_are_refused(typical, halves):
    X, _, _, _ = halves
    frame = pd.DataFrame(X, columns=COLUMNS)
    with pytest.raises(ValueError, match=r"columns that mean nothing here: mood, colour"):
        typical.fit(frame.assign(mood=1, colour=2))
    with pytest.raises(ValueError, match=r"X lacks the column item_id; it has user_id, rating"):
        typical.fit(frame[["user_id", "rating"]])
    with pytest.warns(UserWarning, match=r"read by position: 'who' as user_id, 'what' as item_id"):
        typical.fit(pd.DataFrame(X[:, :2], columns=["who", "what"]))
    torn = frame.assign(client_id=np.arange(len(frame)))
    with pytest.raises(ValueError, match=r"User \d+ is under two clients, \d+ and \d+"):
        typical.fit(torn)


def test_frames_in_searches(typical, interactions):
    X, client_ids = interactions
    frame = pd.DataFrame(X, columns=COLUMNS)
    search = grid_search(typical).fit(frame.assign(client_id=client_ids))
    expected = grid_search(typical).fit(X, client_ids)
    np.testing.assert_array_equal(
        search.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"]
    )


# ---------------------------------------------------------------- callbacks


class StopAfter:
    """Ask for an end after some rounds."""

    def __init__(self, n_rounds):
        self.n_rounds = n_rounds
        self.began, self.ended, self.torn_down = 0, 0, 0

    def setup(self, estimator, context):
        self.began = self.ended = 0

    def teardown(self, estimator, context):
        self.torn_down += 1

    def on_fit_task_begin(self, estimator, context):
        self.began += context.task_name == "round"

    def on_fit_task_end(self, estimator, context):
        self.ended += context.task_name == "round"
        return context.task_name == "round" and self.ended >= self.n_rounds


class Watch(StopAfter):
    """Ask for a fitted estimator after each round, and for the data."""

    def __init__(self):
        super().__init__(10**9)
        self.models, self.data = [], []

    def on_fit_task_begin(self, estimator, context, *, X, y):
        super().on_fit_task_begin(estimator, context)
        self.data.append((X, y))

    def on_fit_task_end(self, estimator, context, *, X, y, fitted_estimator):
        super().on_fit_task_end(estimator, context)
        self.data.append((X, y))
        if context.task_name == "round":
            self.models.append(fitted_estimator)


def test_a_callback_may_stop_the_fit(trainable, obvious, assert_same_fit):
    callback = StopAfter(3)
    stopped = clone(trainable).set_callbacks(callback).fit(obvious)
    assert stopped.n_rounds_ == len(stopped.history_) == 3
    assert (callback.began, callback.ended, callback.torn_down) == (3, 3, 1)
    short = clone(trainable).set_params(n_rounds=3).fit(obvious)
    np.testing.assert_array_equal(stopped.item_factors_, short.item_factors_)
    stopped.partial_fit(obvious)
    assert stopped.n_rounds_ == 6
    assert callback.torn_down == 2


def test_what_a_callback_got_stays_as_it_was(obvious):
    """Though rounds may write into the state that it was made of."""
    settings = {"clients_per_round": 5, "predictor": None, "refit": False, "random_state": 0}
    callback = Watch()
    FedFNNRecommender(n_rounds=3, **settings).set_callbacks(callback).fit(obvious)
    for n, seen in enumerate(callback.models, start=1):
        short = FedFNNRecommender(n_rounds=n, **settings).fit(obvious)
        np.testing.assert_array_equal(seen.user_factors_, short.user_factors_)
        np.testing.assert_array_equal(seen.times_sampled_, short.times_sampled_)


def test_a_callback_gets_a_fitted_estimator(typical, obvious):
    callback = Watch()
    client_ids = obvious[:, 0] // 2
    final = typical.set_callbacks(callback).fit(obvious, client_ids)
    assert len(callback.models) == final.n_rounds_
    for n, model in enumerate(callback.models, start=1):
        assert model.n_rounds_ == n
        assert model.history_ == final.history_[:n]
        assert model.client_ids_.tolist() == list(range(20))
        assert model.recommend([3], k=2)[0].shape == (1, 2)
        assert model.score([[0, 0], [1, 1]]) >= 0
    np.testing.assert_array_equal(model.predict(obvious), final.predict(obvious))
    assert len(callback.data) == 2 * (final.n_rounds_ + 1)  # the fit is a task, too
    assert all(X is obvious and y is client_ids for X, y in callback.data)
    if isinstance(typical, PopularityRecommender):
        return
    first = callback.models[0]
    assert not np.array_equal(first.item_factors_, final.item_factors_)
    typical.partial_fit(obvious, client_ids)
    assert callback.models[-1].n_rounds_ == 2 * typical.n_rounds
    assert callback.models[-1].history_ == typical.history_


def test_a_callback_sees_feature_names(obvious):
    callback = Watch()
    frame = pd.DataFrame(obvious, columns=["user_id", "item_id"])
    FedAvgRecommender(**FAST).set_callbacks(callback).fit(frame)
    assert callback.models[0].feature_names_in_.tolist() == ["user_id", "item_id"]


def test_callbacks_are_torn_down_after_an_error(obvious):
    callback = StopAfter(10)
    model = FedAvgRecommender(**FAST, learning_rate=1e4).set_callbacks(callback)
    with pytest.raises(FloatingPointError, match="diverged"):
        model.fit(obvious)
    assert callback.torn_down == 1


def test_callbacks_inside_a_search(interactions):
    X, client_ids = interactions
    model = FedFNNRecommender(**FAST).set_callbacks(StopAfter(2))
    search = GridSearchCV(model, {"n_factors": [2, 3]}, cv=PerUserHoldout(random_state=0))
    assert search.fit(X, client_ids).best_estimator_.n_rounds_ == 2


def test_progress_bar(typical, obvious, capsys):
    typical.set_callbacks(ProgressBar()).fit(obvious)
    out = capsys.readouterr().out
    assert f"{type(typical).__name__} - fit" in out
    assert "100%" in out


def test_progress_bar_of_a_search(interactions, capsys):
    X, client_ids = interactions
    search = grid_search(FedFNNRecommender(**FAST)).set_callbacks(ProgressBar())
    search.fit(X, client_ids)
    out = capsys.readouterr().out
    assert "GridSearchCV" in out
    assert "FedFNNRecommender" in out


def test_scoring_monitor_follows_a_held_out_score(halves):
    X, client_ids, X_test, _ = halves
    monitor = ScoringMonitor(scoring=lambda model, X, y: {"ndcg": model.score(X_test)})
    model = FedFNNRecommender(**FAST).set_callbacks(monitor).fit(X, client_ids)
    table = monitor.get_logs().data_as_pandas
    rounds = table[table["task_name"] == "round"]
    assert len(rounds) == 4
    assert rounds["ndcg"].iloc[-1] == model.score(X_test)
    assert rounds["ndcg"].iloc[0] < rounds["ndcg"].iloc[-1]
