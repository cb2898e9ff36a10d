"""Federations with secure sums or compressed uploads, through the estimators."""

import numpy as np
import pytest
from sklearn.base import clone

from fedrecsk import (
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    HeteFedRecRecommender,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.model_selection import PerUserHoldout

FAST = {"n_factors": 8, "random_state": 0, "device": "cpu", "clients_per_round": 0.5}
SIZES = {
    "sizes": (4, 8),
    "group_ratio": (1, 1),
    "random_state": 0,
    "device": "cpu",
    "clients_per_round": 0.5,
}
KINDS = {
    "fedavg": FedAvgRecommender(**FAST, n_rounds=12),
    "fedfnn": FedFNNRecommender(**FAST, n_rounds=8),
    "fedfnn bce": FedFNNRecommender(**FAST, n_rounds=8, objective="bce"),
    "fedfast": FedFastRecommender(**FAST, n_rounds=8),
    "ncf": FedAvgRecommender("ncf", **FAST, n_rounds=4, local_epochs=2),
    "magnitude": FedFNNRecommender(**FAST, n_rounds=8, objective="bce", item_weighting="magnitude"),
    "sizes": HeteFedRecRecommender(**SIZES, n_rounds=8),
    "sizes ncf": HeteFedRecRecommender("ncf", **SIZES, n_rounds=4, local_epochs=2),
    "sizes apart": HeteFedRecRecommender(**SIZES, n_rounds=8, aggregation="clustered"),
}
SECURE = [kind for kind in KINDS if kind != "fedfast"]
ALL = {"top-k": 1.0, "quantised": 30, "low-rank": 9}


@pytest.fixture(scope="module")
def split():
    X, client_ids = make_interactions(120, 90, 4, random_state=1, return_X_y=True)
    train, test = next(iter(PerUserHoldout(random_state=0).split(X, client_ids)))
    return X[train], X[test]


@pytest.fixture(scope="module")
def plain(split):
    """Fits without anything, each once."""
    return {kind: clone(model).fit(split[0]) for kind, model in KINDS.items()}


def bytes_of(model, name="bytes_up"):
    return sum(record[name] for record in model.history_)


def close(model, other, share):
    scale = np.abs(other.item_factors_).max()
    np.testing.assert_allclose(model.item_factors_, other.item_factors_, rtol=0, atol=share * scale)


# Secure aggregation -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", SECURE)
def test_secure_sums_change_the_model_by_no_more_than_rounding(kind, split, plain):
    model = clone(KINDS[kind]).set_params(secure_aggregation=True).fit(split[0])
    close(model, plain[kind], 5e-3)
    assert model.score(split[1]) == pytest.approx(plain[kind].score(split[1]), abs=0.01)
    assert bytes_of(model) > bytes_of(plain[kind])
    assert bytes_of(model, "bytes_down") > bytes_of(plain[kind], "bytes_down")


@pytest.mark.parametrize("kind", ["fedavg", "fedfnn", "sizes", "sizes ncf"])
def test_the_simulated_protocol_gives_the_same_fit(kind, split, assert_same_fit):
    settings = {"n_rounds": 2, "clients_per_round": 8}
    fits = [
        clone(KINDS[kind]).set_params(secure_aggregation=how, **settings).fit(split[0])
        for how in (True, "simulate")
    ]
    assert_same_fit(fits[1], fits[0])


def test_devices_that_break_leave_the_sum(split):
    model = clone(KINDS["fedfnn"]).set_params(
        secure_aggregation=True, malicious_fraction=0.1, attack="nan"
    )
    model.fit(split[0])
    assert sum(record["rejected"] for record in model.history_) > 0
    assert np.isfinite(model.item_factors_).all()


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("fedavg", {"defence": "clip"}, 'defence="clip" compares the lengths'),
        ("fedfnn", {"defence": "median"}, 'defence="median" compares the values'),
        ("fedfnn", {"defence": "trimmed-mean"}, "single uploads"),
        ("fedfnn", {"defence": "krum"}, "single uploads"),
        ("fedfnn", {"defence": "multi-krum"}, "single uploads"),
        ("fedfnn", {"refit": False}, "predictor learns from the vectors of single users"),
        ("fedfnn bce", {"anchor": False}, "predictor=None"),
        ("fedavg", {"sampling": "stratified"}, 'sampling="stratified" clusters'),
        ("fedavg", {"compression": "top-k"}, "as long as the table"),
    ],
)
def test_who_wants_to_see_more_than_sums_is_refused(kind, changes, reason, split):
    model = clone(KINDS[kind]).set_params(secure_aggregation=True, **changes)
    with pytest.raises(ValueError, match=f"sums alone, but .*{reason}.*Leave one"):
        model.fit(split[0])
    model.set_params(secure_aggregation=False, n_rounds=1).fit(split[0])


@pytest.mark.parametrize("kind", ["sizes", "sizes ncf"])
def test_a_client_alone_with_its_size_keeps_its_upload(kind, split):
    """Its upload would be the sum that the server sees; the others are heard."""
    users = np.unique(split[0][:, 0])
    sizes = np.where(np.arange(len(users)) == 5, 8, 4)
    model = clone(KINDS[kind]).set_params(
        n_rounds=3, clients_per_round=1.0, client_sizes=sizes, secure_aggregation=True
    )
    model.fit(split[0])
    assert [record["rejected"] for record in model.history_] == [1, 1, 1]
    model.set_params(clients_per_round=1)
    with pytest.raises(ValueError, match=r"single client, of 120 in all.*Raise clients_per_round"):
        model.fit(split[0])


@pytest.mark.parametrize("kind", ["fedavg", "fedfnn", "ncf"])
def test_a_client_that_is_left_alone_keeps_its_upload(kind, split):
    model = clone(KINDS[kind]).set_params(
        n_rounds=12, clients_per_round=3, dropout_rate=0.5, secure_aggregation=True
    )
    model.fit(split[0])
    alone = [record for record in model.history_ if record["clients"] == 1]
    assert 0 < len(alone) < 12
    for record in alone:
        assert (record["loss"], record["rejected"], record["bytes_up"]) == (None, 1, 0)
    # Such a round changes nothing.
    trained = [record["round"] for record in model.history_ if record["loss"] is not None]
    number = next(record["round"] for record in alone if record["round"] > trained[0])
    before, after = (
        clone(model).set_params(n_rounds=n).fit(split[0]).item_factors_
        for n in (number - 1, number)
    )
    assert (before == after).all()


def test_clients_that_are_all_alone_with_their_sizes_are_refused(split):
    users = np.unique(split[0][:, 0])
    model = HeteFedRecRecommender(client_sizes=1 + np.arange(len(users)), secure_aggregation=True)
    with pytest.raises(ValueError, match=r"single client of each size.*Raise clients_per_round"):
        model.fit(split[0])


def test_who_sends_nothing_has_nothing_to_hide_or_to_shorten(split):
    for changes in ({"secure_aggregation": True}, {"compression": "top-k"}):
        model = clone(KINDS["sizes ncf"]).set_params(aggregation="standalone", **changes)
        with pytest.raises(ValueError, match=r"standalone.*sends nothing"):
            model.fit(split[0])


@pytest.mark.parametrize("kind", ["fedavg", "fedfnn", "sizes", "sizes ncf"])
def test_what_clients_keep_belongs_to_a_checkpoint(kind, split, tmp_path, assert_same_fit):
    model = clone(KINDS[kind]).set_params(n_rounds=5, compression="top-k")
    whole = clone(model).fit(split[0])
    model.set_params(checkpoint=tmp_path / "fit")
    clone(model).set_params(n_rounds=2).fit(split[0])
    assert_same_fit(model.fit(split[0]), whole)


def test_a_ring_too_small_for_the_cohort_is_refused_before_the_first_round(split):
    model = clone(KINDS["fedfnn"]).set_params(secure_aggregation=True, secure_bits=6)
    rounds = []

    def everybody(number, client_ids):
        rounds.append(number)
        return np.ones(len(client_ids))

    model.set_params(availability=everybody)
    with pytest.raises(ValueError, match=r"secure_bits=6 holds sums of at most 31 clients.* 60"):
        model.fit(split[0])
    model.set_params(clients_per_round=1)
    with pytest.raises(ValueError, match="single client, of 120 in all"):
        model.fit(split[0])
    model.set_params(clients_per_round=1.0)
    with pytest.raises(ValueError, match="single client, of 1 in all"):
        model.fit(split[0], np.zeros(len(split[0])))
    assert rounds == []


# Compression ------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_a_level_that_keeps_everything_changes_nothing(kind, name, feedback, split, plain):
    short = 4
    model = clone(KINDS[kind]).set_params(
        n_rounds=short, compression=name, compression_level=ALL[name], error_feedback=feedback
    )
    expected = clone(KINDS[kind]).set_params(n_rounds=short).fit(split[0])
    close(model.fit(split[0]), expected, 2e-3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["fedavg", "fedfnn", "fedfnn bce", "ncf", "sizes", "sizes ncf"])
def test_compression_sends_less_and_learns(kind, name, split, plain):
    model = clone(KINDS[kind]).set_params(compression=name).fit(split[0])
    assert bytes_of(model) < 0.8 * bytes_of(plain[kind])
    assert np.isfinite(model.item_factors_).all()
    if name != "top-k" and not kind.endswith("ncf"):
        assert model.score(split[1]) > 0.9 * plain[kind].score(split[1])


def test_one_user_a_client_is_of_rank_1_without_loss(split, plain):
    """With the whole-data objective, what a user sends is its vector times a number an item."""
    model = clone(KINDS["fedfnn"])
    model.set_params(compression="low-rank", compression_level=1).fit(split[0])
    close(model, plain["fedfnn"], 2e-3)
    assert bytes_of(model) < 0.6 * bytes_of(plain["fedfnn"])


def test_error_feedback_helps_where_few_rows_are_sent(split):
    scores = {}
    for feedback in (True, False):
        model = clone(KINDS["fedfnn"]).set_params(
            n_rounds=20, compression="top-k", error_feedback=feedback
        )
        scores[feedback] = model.fit(split[0]).score(split[1])
    assert scores[True] > scores[False] + 0.02


@pytest.mark.parametrize("kind", ["fedavg", "fedfnn"])
def test_fits_repeat_and_seeds_differ(kind, split, assert_same_fit):
    model = clone(KINDS[kind]).set_params(
        n_rounds=3, compression="quantised", compression_level=2, error_feedback=False
    )
    first = clone(model).fit(split[0])
    assert_same_fit(clone(model).fit(split[0]), first)
    model.set_params(random_state=1)
    assert (model.fit(split[0]).item_factors_ != first.item_factors_).any()


def test_chunks_do_not_matter(split, monkeypatch):
    model = clone(KINDS["fedavg"]).set_params(n_rounds=3, compression="quantised")
    for changes in ({"error_feedback": False}, {"compression": "top-k"}):
        model.set_params(**changes)
        whole = clone(model).fit(split[0])
        with monkeypatch.context() as patch:
            patch.setattr("fedrecsk.engine.shards.CPU_CHUNK_ROWS", 300)
            close(clone(model).fit(split[0]), whole, 1e-4)


@pytest.mark.parametrize("defence", ["clip", "median"])
def test_a_defence_looks_at_what_was_unpacked(defence, split):
    model = clone(KINDS["fedavg"]).set_params(
        compression="low-rank", defence=defence, malicious_fraction=0.1, attack="nan"
    )
    model.fit(split[0])
    assert sum(record["rejected"] for record in model.history_) > 0
    assert np.isfinite(model.item_factors_).all()


@pytest.mark.parametrize(
    ("name", "level", "reason"),
    [
        ("top-k", 1.5, "no share of the rows"),
        ("quantised", 1, "no number of bits"),
        ("quantised", 2.5, "no number of bits"),
        ("quantised", 33, "no number of bits"),
        ("low-rank", 0.5, "no rank"),
    ],
)
def test_levels_are_checked_by_the_kind_of_compression(name, level, reason, split):
    model = clone(KINDS["fedavg"]).set_params(compression=name, compression_level=level)
    with pytest.raises(ValueError, match=f"compression_level={level} is {reason}"):
        model.fit(split[0])
