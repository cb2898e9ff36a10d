"""Federations with clients that break, lie or promote an item, through the estimators."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone

from fedrecsk import (
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    HeteFedRecRecommender,
    NoUsableUploadError,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.methods.whole_data_rounds import whole_data_step
from fedrecsk.metrics import exposure_ratio
from fedrecsk.model_selection import PerUserHoldout
from fedrecsk.models import whole_data

FAST = {"n_factors": 8, "random_state": 0, "device": "cpu"}
KINDS = {
    "fedavg": FedAvgRecommender(**FAST, n_rounds=20, clients_per_round=0.5),
    "fedfnn": FedFNNRecommender(**FAST, n_rounds=12, clients_per_round=0.5),
    "fedfnn bce": FedFNNRecommender(**FAST, n_rounds=12, clients_per_round=0.5, objective="bce"),
    "fedfast": FedFastRecommender(**FAST, n_rounds=12, clients_per_round=0.5),
    "hetefedrec": HeteFedRecRecommender(
        sizes=(4, 8),
        group_ratio=(1, 1),
        n_rounds=12,
        clients_per_round=0.5,
        random_state=0,
        device="cpu",
    ),
    "ncf": FedAvgRecommender("ncf", **FAST, n_rounds=6, clients_per_round=0.5),
}
PROMOTIONS = ["gradient", "random", "bandwagon"]


@pytest.fixture(scope="module")
def split():
    X, client_ids = make_interactions(200, 120, 4, random_state=1, return_X_y=True)
    train, test = next(iter(PerUserHoldout(random_state=0).split(X, client_ids)))
    return X[train], X[test]


@pytest.mark.parametrize("kind", ["fedavg", "fedfnn", "fedfnn bce", "fedfast", "hetefedrec"])
def test_a_defence_against_nobody_that_clips_nothing_changes_nothing(kind, split):
    plain = clone(KINDS[kind]).fit(split[0])
    clipped = clone(KINDS[kind]).set_params(defence="clip", clip_quantile=1.0).fit(split[0])
    scale = np.abs(plain.item_factors_).max()
    np.testing.assert_allclose(
        clipped.item_factors_, plain.item_factors_, rtol=0, atol=2e-3 * scale
    )
    assert plain.target_item_ is None
    assert len(plain.malicious_client_ids_) == 0
    assert {record["rejected"] for record in plain.history_} == {0}


@pytest.mark.parametrize("kind", ["fedavg", "fedfnn", "fedfnn bce", "ncf", "hetefedrec"])
def test_clients_that_send_what_is_not_a_number_are_dropped_and_counted(kind, split):
    model = clone(KINDS[kind]).set_params(malicious_fraction=0.2, attack="nan").fit(split[0])
    rejected = [record["rejected"] for record in model.history_]
    assert sum(rejected) == pytest.approx(0.2 * sum(r["clients"] for r in model.history_), rel=0.2)
    assert np.isfinite(model.item_factors_).all()
    honest = ~np.isin(split[1][:, 0], model.malicious_client_ids_)
    plain = clone(KINDS[kind]).fit(split[0])
    assert model.score(split[1][honest]) > 0.85 * plain.score(split[1][honest])


def test_dishonest_clients_are_drawn_by_the_seed_and_named(split):
    model = clone(KINDS["fedfnn"]).set_params(malicious_fraction=0.1, n_rounds=1)
    drawn = model.fit(split[0]).malicious_client_ids_
    assert len(drawn) == 20
    assert np.isin(drawn, model.client_ids_).all()
    assert (clone(model).fit(split[0]).malicious_client_ids_ == drawn).all()
    model.set_params(random_state=1)
    assert (model.fit(split[0]).malicious_client_ids_ != drawn).any()
    items, counts = np.unique(split[0][:, 1], return_counts=True)
    assert model.target_item_ == items[np.argmin(counts)]
    model.set_params(target_item=items[3]).fit(split[0])
    assert model.target_item_ == items[3]


def test_an_unknown_target_is_refused(split):
    model = clone(KINDS["fedfnn"]).set_params(malicious_fraction=0.1, target_item="nothing")
    with pytest.raises((ValueError, TypeError), match="nothing"):
        model.fit(split[0])


@pytest.mark.parametrize("attack", PROMOTIONS)
@pytest.mark.parametrize("kind", ["fedavg", "fedfnn bce"])
def test_promotions_expose_their_target_and_a_defence_prevents_it(kind, attack, split):
    found = {}
    for defence in (None, "trimmed-mean"):
        model = clone(KINDS[kind]).set_params(
            malicious_fraction=0.1, attack=attack, defence=defence, attack_strength=30.0
        )
        model.fit(split[0])
        honest = np.setdiff1d(model.user_ids_, model.malicious_client_ids_)
        found[defence] = exposure_ratio(model, model.target_item_, users=honest)
    assert found[None] > 0.3
    assert found["trimmed-mean"] < 0.5 * found[None]


@pytest.mark.parametrize("kind", ["fedfnn", "hetefedrec"])
@pytest.mark.parametrize("n_groups", [None, 9])
def test_uploads_of_honest_clients_are_explained_by_their_data(kind, n_groups, split):
    X = split[0]
    clients = None if n_groups is None else X[:, 0] % n_groups
    model = clone(KINDS[kind]).set_params(defence="clip", clip_quantile=1.0, clients_per_round=1.0)
    model.fit(X, clients)
    assert [record["rejected"] for record in model.history_] == [0] * model.n_rounds_
    unchecked = clone(model).set_params(check_uploads=False).fit(X, clients)
    assert (model.item_factors_ == unchecked.item_factors_).all()


@pytest.mark.parametrize("attack", ["gradient", "random", "bandwagon", "sign-flip", "gaussian"])
@pytest.mark.parametrize("kind", ["fedfnn", "hetefedrec"])
def test_uploads_that_no_data_explain_are_dropped_and_counted(kind, attack, split):
    model = clone(KINDS[kind]).set_params(
        malicious_fraction=0.1, attack=attack, clients_per_round=1.0, defence="clip"
    )
    model.fit(split[0])
    n_malicious = len(model.malicious_client_ids_)
    assert [record["rejected"] for record in model.history_] == [n_malicious] * model.n_rounds_
    model.set_params(check_uploads=False).fit(split[0])
    assert sum(record["rejected"] for record in model.history_) < n_malicious


@pytest.mark.parametrize("kind", ["fedfnn", "hetefedrec"])
def test_the_check_keeps_an_item_that_nobody_has_from_being_pushed(kind):
    """Where all who send a row are dishonest, clipping alone is not enough."""
    X, _ = make_interactions(400, 300, 4, random_state=1, return_X_y=True)
    exposure = {}
    for checks in (True, False):
        model = clone(KINDS[kind]).set_params(
            defence="clip", check_uploads=checks, malicious_fraction=0.1, n_rounds=20
        )
        model.fit(X)
        honest = np.setdiff1d(model.user_ids_, model.malicious_client_ids_)
        exposure[checks] = exposure_ratio(model, model.target_item_, users=honest)
    assert exposure[True] < 0.02
    assert exposure[False] > 0.1


def test_lookalikes_need_uploads_that_mean_something(split):
    attack = {"attack": "lookalike", "malicious_fraction": 0.1}
    model = clone(KINDS["fedfnn"]).set_params(**attack, defence="clip").fit(split[0])
    assert sum(record["rejected"] for record in model.history_) == 0
    for kind in ("fedavg", "fedfnn bce", "fedfast"):
        with pytest.raises(ValueError, match='attack="lookalike" sends what follows from a user'):
            clone(KINDS[kind]).set_params(**attack).fit(split[0])
    model.set_params(defence=None, privacy="central", sampling="poisson", predictor=None)
    with pytest.raises(ValueError, match="without privacy"):
        model.fit(split[0])


def test_the_last_good_state_is_kept_if_no_upload_of_a_round_can_be_used(split, monkeypatch):
    solve, broken = whole_data.solve_users, []

    def fails(cohort, *arguments, **named):
        found = solve(cohort, *arguments, **named)
        return found * np.nan if broken else found

    def step(state, shards, delegates, t, **named):
        broken[:] = [t] if t == 3 else []
        try:
            return whole_data_step(state, shards, delegates, t, **named)
        finally:
            broken.clear()  # the refit at the end is on good devices

    monkeypatch.setattr(whole_data, "solve_users", fails)
    monkeypatch.setattr("fedrecsk.estimators._fedfnn_simulation.whole_data_step", step)
    model = clone(KINDS["fedfnn"])
    with pytest.raises(NoUsableUploadError, match="round 4: the uploads of all 100") as caught:
        model.fit(split[0])
    assert "keeps its state after round 3" in "".join(caught.value.__notes__)
    assert model.n_rounds_ == len(model.history_) == 3
    shorter = clone(model).set_params(n_rounds=3).fit(split[0])
    assert (model.item_factors_ == shorter.item_factors_).all()
    assert (model.predict(split[1]) == shorter.predict(split[1])).all()


@pytest.mark.parametrize("kind", ["fedavg", "fedfnn", "fedfast", "ncf", "hetefedrec", "het ncf"])
def test_a_state_that_is_kept_is_that_of_the_shorter_fit(kind, split, assert_same_fit):
    """With all that a fit leaves, and with the vectors that users had before the bad round."""
    model = clone(KINDS["hetefedrec" if kind == "het ncf" else kind])
    model.set_params(n_rounds=40, clients_per_round=2, refit=False)
    model.set_params(malicious_fraction=0.4, attack="nan", random_state=4)
    if kind == "het ncf":
        model.set_params(base_model="ncf", local_epochs=1)
    if kind == "fedfast":
        model.set_params(clients_per_round=3)
    with pytest.raises(NoUsableUploadError):
        model.fit(split[0])
    assert 1 <= model.n_rounds_ < 40
    assert_same_fit(model, clone(model).set_params(n_rounds=model.n_rounds_).fit(split[0]))


@pytest.mark.parametrize("changes", [{}, {"dual_task": True}, {"base_model": "ncf"}, {
    "base_model": "ncf", "aggregation": "clustered"}])  # fmt: skip
def test_clients_of_a_size_that_are_all_broken_do_not_end_the_round_of_the_others(changes, split):
    model = clone(KINDS["hetefedrec"]).set_params(n_rounds=6, local_epochs=1, **changes)
    drawn = clone(model).set_params(malicious_fraction=0.1, attack="nan", n_rounds=1)
    broken = drawn.fit(split[0]).malicious_client_ids_
    sizes = {client: 8 if client in broken else 4 for client in drawn.client_ids_.tolist()}
    model.set_params(client_sizes=sizes, malicious_fraction=0.1, attack="nan").fit(split[0])
    assert sum(record["rejected"] for record in model.history_) == 6 * 100 * 0.1
    assert all(record["rejected"] < record["clients"] for record in model.history_)
    assert np.isfinite(model.item_factors_).all()
    assert np.isfinite(model.predict(split[1])).all()


def test_clients_that_are_alone_have_nothing_to_defend(split):
    model = HeteFedRecRecommender("ncf", aggregation="standalone", n_rounds=1, defence="clip")
    with pytest.raises(ValueError, match="sends nothing that could be attacked, defended"):
        model.fit(split[0])


def test_the_error_survives_another_process():
    error = pickle.loads(pickle.dumps(NoUsableUploadError(7, 2)))
    assert str(error) == str(NoUsableUploadError(7, 2))
