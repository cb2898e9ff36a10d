"""Fits with differential privacy, through the estimators."""

import math

import numpy as np
import pytest
from sklearn.base import clone

from fedrecsk import FedAvgRecommender, FedFNNRecommender, NoUsableUploadError
from fedrecsk.datasets import make_interactions
from fedrecsk.engine.uplink import Uplink
from fedrecsk.models import whole_data

FAST = {
    "n_factors": 4, "random_state": 0, "device": "cpu", "n_rounds": 4, "sampling": "poisson",
    "clients_per_round": 0.5,
}  # fmt: skip
KINDS = {
    "whole-data": FedFNNRecommender(**FAST),
    "no curvature": FedFNNRecommender(**FAST, item_curvature=False),
    "fedavg": FedAvgRecommender(**FAST),
    "adam": FedAvgRecommender(**FAST, server_optimizer="adam"),
    "ncf": FedAvgRecommender("ncf", **FAST),
}
PRIVATE = {"privacy": "central", "accountant": "rdp"}


@pytest.fixture(scope="module")
def made():
    return make_interactions(80, 50, 3, random_state=1, return_X_y=True)


@pytest.fixture(scope="module", name="X")
def rows(made):
    return made[0]


@pytest.fixture(scope="module", autouse=True)
def _library():
    pytest.importorskip("dp_accounting")


def fit(kind, X, client_ids=None, **changes):
    return clone(KINDS[kind]).set_params(**{**PRIVATE, **changes}).fit(X, client_ids)


@pytest.mark.parametrize("name", ["central", "local"])
@pytest.mark.parametrize("kind", ["whole-data", "no curvature"])
def test_without_noise_and_clipping_it_is_the_plain_fit(kind, name, X):
    # Cohorts of a fixed size, since private sums are divided by the size expected.
    plain = clone(KINDS[kind]).set_params(sampling="uniform").fit(X)
    private = fit(
        kind, X, privacy=name, sampling="uniform", noise_multiplier=0.0, clip_norm=math.inf
    )
    scale = np.abs(plain.item_factors_).max()
    np.testing.assert_allclose(
        private.item_factors_, plain.item_factors_, rtol=0, atol=1e-4 * scale
    )
    assert private.epsilon_ == plain.epsilon_ == math.inf
    assert plain.privacy_spent_ is None


@pytest.mark.parametrize("kind", ["fedavg", "adam", "ncf"])
def test_without_noise_it_is_the_plain_fit_of_clients_that_weigh_the_same(kind, monkeypatch):
    # As many rows each: the only weights by which clients of plain FedAvg differ.
    users, items = np.divmod(np.arange(320), 8)
    X = np.column_stack([users, (items * 3 + users * 5) % 30])
    parameters = {"sampling": "uniform"}
    if kind == "adam":  # moves rows that nobody touched, since nobody may know
        parameters["clients_per_round"] = 1.0
    plain = clone(KINDS[kind]).set_params(**parameters).fit(X)
    private = fit(kind, X, **parameters, noise_multiplier=0.0, clip_norm=math.inf)
    np.testing.assert_allclose(private.item_factors_, plain.item_factors_, rtol=0, atol=1e-5)
    np.testing.assert_allclose(private.network_, plain.network_, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["central", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_private_fits_are_repeatable_and_say_what_they_cost(kind, name, X):
    first, again = (fit(kind, X, privacy=name) for _ in range(2))
    np.testing.assert_array_equal(first.item_factors_, again.item_factors_)
    epsilons = [record["epsilon"] for record in first.history_]
    assert epsilons == sorted(epsilons)
    assert first.epsilon_ == epsilons[-1] < math.inf
    assert first.delta_ == 1e-5
    assert all(record["clip_norm"] > 0 for record in first.history_)
    assert np.isfinite(first.predict(X)).all()
    other = clone(first).set_params(random_state=1).fit(X)
    assert np.abs(other.item_factors_ - first.item_factors_).max() > 1e-3


def test_the_noise_reaches_items_that_nobody_has_touched(X):
    kept = X[X[:, 1] < 40, :2]
    few = np.vstack([kept, [[kept[0, 0], item] for item in range(40, 45)]])
    model = fit("fedavg", few, n_rounds=1, clients_per_round=0.1, noise_multiplier=5.0)
    still = clone(model).set_params(noise_multiplier=0.0).fit(few)
    moved = np.abs(model.item_factors_ - still.item_factors_).max(1)
    assert (moved > 0).all()


def test_a_client_of_several_users_is_one_unit(made):
    X = made[0]
    clients = X[:, 0] // 4
    seen = []
    add = Uplink.release

    def spy(self, uploads, *arguments, **named):
        seen.append(uploads)
        return add(self, uploads, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Uplink, "release", spy)
        model = fit("whole-data", X, clients)
    assert all(len(set(sent.clients.tolist())) == len(sent.clients) <= 20 for sent in seen)
    assert model.privacy_spent_[0]["clients"] == 20


def test_a_target_ends_the_fit_before_it_is_exceeded(X):
    whole = fit("whole-data", X, n_rounds=6, noise_multiplier=2.0)
    epsilons = [record["epsilon"] for record in whole.history_]
    target = (epsilons[3] + epsilons[4]) / 2
    model = fit("whole-data", X, n_rounds=6, noise_multiplier=2.0, target_epsilon=target)
    assert model.n_rounds_ == len(model.history_) == 4
    assert model.epsilon_ == pytest.approx(epsilons[3])
    with pytest.raises(ValueError, match="less than the first round costs"):
        fit("whole-data", X, noise_multiplier=2.0, target_epsilon=epsilons[0] / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling": "epoch"},
        {"privacy": "local"},
        {"accountant": "auto"},
    ],
)
def test_a_target_sets_the_noise(changes, X):
    model = fit("whole-data", X, noise_multiplier="auto", target_epsilon=6.0, **changes)
    assert model.n_rounds_ == 4
    assert 5.95 < model.epsilon_ <= 6.0


def test_a_client_pays_for_its_own_turns_alone(X):
    taken, whole = (
        fit("whole-data", X, privacy="local", sampling=sampling, clients_per_round=share)
        for sampling, share in (("epoch", 0.25), ("uniform", 1.0))
    )
    assert taken.privacy_spent_[0]["rounds"] == 1
    assert taken.times_sampled_.tolist() == [1] * len(taken.user_ids_)
    assert whole.privacy_spent_[0]["rounds"] == 4
    drawn = fit("whole-data", X, privacy="local")
    assert drawn.privacy_spent_[0]["rounds"] == drawn.times_sampled_.max()


def test_a_plain_fit_that_fails_promises_nothing(X):
    model = fit("whole-data", X, n_rounds=1)
    assert model.epsilon_ < math.inf
    model.set_params(privacy=None, sampling="uniform", n_rounds=40, clients_per_round=2)
    model.set_params(malicious_fraction=0.6, attack="nan")
    with pytest.raises(NoUsableUploadError, match="round"):
        model.fit(X)
    assert (model.epsilon_, model.delta_, model.privacy_spent_) == (math.inf, None, None)
    with pytest.raises(ValueError, match="had no privacy"):
        model.set_params(**PRIVATE, malicious_fraction=0.0).partial_fit(X)


def test_callbacks_are_told_what_was_spent(X, interrupt):
    callback = interrupt()
    model = clone(KINDS["whole-data"]).set_params(**PRIVATE).set_callbacks(callback).fit(X)
    spent = [seen.epsilon_ for seen in callback.seen]
    assert spent == [record["epsilon"] for record in model.history_]
    assert [seen.privacy_spent_[0]["rounds"] for seen in callback.seen] == [1, 2, 3, 4]


def test_going_on_goes_on_counting(X):
    whole = fit("whole-data", X, n_rounds=6)
    model = fit("whole-data", X, n_rounds=2)
    model.set_params(n_rounds=4).partial_fit(X)
    assert model.n_rounds_ == 6
    assert model.epsilon_ == pytest.approx(whole.epsilon_)
    assert [charge["rounds"] for charge in model.privacy_spent_] == [2, 4]
    np.testing.assert_allclose(model.clip_norms_, whole.clip_norms_, rtol=1e-3)
    model.set_params(warm_start=True).fit(X)
    assert model.epsilon_ > whole.epsilon_
    with pytest.raises(ValueError, match="had no privacy"):
        clone(KINDS["whole-data"]).fit(X).set_params(**PRIVATE).partial_fit(X)
    assert model.set_params(privacy=None).partial_fit(X).epsilon_ == math.inf


def test_checkpoints_go_on_to_the_same(X, tmp_path):
    whole = fit("whole-data", X)
    stopped = fit("whole-data", X, n_rounds=2, checkpoint=tmp_path)
    model = fit("whole-data", X, checkpoint=tmp_path)
    assert stopped.n_rounds_ == 2
    np.testing.assert_array_equal(model.item_factors_, whole.item_factors_)
    np.testing.assert_array_equal(model.clip_norms_, whole.clip_norms_)
    assert model.epsilon_ == whole.epsilon_
    auto = {"noise_multiplier": "auto", "target_epsilon": 5.0, "checkpoint": tmp_path / "auto"}
    fit("whole-data", X, n_rounds=2, **auto)
    with pytest.raises(ValueError, match="n_rounds: 2 there, 4 here"):  # the noise would be other
        fit("whole-data", X, **auto)


REFUSED = {
    "defence": ({"defence": "clip"}, 'defence="clip" treats an upload by what others'),
    "early stopping": ({"early_stopping": True}, "without noise"),
    "stratified": ({"sampling": "stratified"}, "draws clients by their vectors"),
    "unreliable": ({"dropout_rate": 0.1}, "who fails may be no matter of chance"),
    "slow": ({"client_seconds": 0.1}, "Leave .* client_seconds, .* out"),
    "compressed": ({"compression": "low-rank"}, "whole sums of plain numbers"),
    "masked": ({"secure_aggregation": True}, "whole sums of plain numbers"),
    "predictor": ({"refit": False}, "needs the users' vectors at the server"),
    "weights": ({"objective": "bce"}, 'item_weighting="count" divides by'),
    "no target": ({"noise_multiplier": "auto"}, "needs a target_epsilon"),
    "no clipping": ({"clip_norm": math.inf}, "uploads of any length"),
    "accountant": (
        {"sampling": "uniform", "accountant": "pld"},
        "does not know cohorts of fixed size",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_breaks_the_promise_is_refused(why, X):
    changes, message = REFUSED[why]
    with pytest.raises(ValueError, match=message):
        fit("whole-data", X, **changes)


@pytest.mark.parametrize("kind", ["whole-data", "fedavg"])
def test_a_round_without_clients_leaves_a_plain_fit_and_noises_a_private_one(kind, X):
    few = {"clients_per_round": 1, "n_rounds": 8}  # of 80: one round in three has nobody
    model = clone(KINDS[kind]).set_params(**few).fit(X)
    empty = [number for number, record in enumerate(model.history_) if not record["clients"]]
    assert 0 < len(empty) < 8
    assert np.isfinite(model.item_factors_).all()
    first = empty[0]
    if first:
        before = clone(model).set_params(n_rounds=first).fit(X)
        after = clone(model).set_params(n_rounds=first + 1).fit(X)
        np.testing.assert_array_equal(before.item_factors_, after.item_factors_)
    private = fit(kind, X, **few, n_factors=2)
    shorter = fit(kind, X, clients_per_round=1, n_rounds=first + 1, n_factors=2)
    assert [record["clients"] for record in private.history_] == [
        record["clients"] for record in model.history_
    ]
    start = clone(shorter).set_params(noise_multiplier=0.0).fit(X)
    assert np.abs(shorter.item_factors_ - start.item_factors_).min() > 0


def test_broken_clients_do_not_end_a_private_fit(X, monkeypatch):
    solve = whole_data.solve_users

    def fails(cohort, *arguments, **named):
        found = solve(cohort, *arguments, **named)
        return found * np.nan if len(cohort.users) < 70 else found  # all but the refit

    monkeypatch.setattr(whole_data, "solve_users", fails)
    model = fit("whole-data", X, n_rounds=2)
    assert [record["rejected"] for record in model.history_] == [
        record["clients"] for record in model.history_
    ]
    assert np.isfinite(model.item_factors_).all()


def test_dishonest_clients_are_clipped_like_others(X):
    model = fit("fedavg", X, malicious_fraction=0.2, attack="scale", attack_strength=1e6)
    assert np.abs(model.item_factors_).max() < 1e3
    broken = fit("fedavg", X, malicious_fraction=0.2, attack="nan")
    assert sum(record["rejected"] for record in broken.history_) > 0
    assert np.isfinite(broken.item_factors_).all()
