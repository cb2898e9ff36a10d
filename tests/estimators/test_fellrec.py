"""What FELLRec has of its own: platforms, texts, adapters and split models."""

import pickle

import numpy as np
import pytest
import torch
from peft import PeftModel
from sklearn.model_selection import GridSearchCV

from fedrecsk import (
    FELLRecRecommender,
    NoItemTextWarning,
    PopularityRecommender,
    UnknownIdWarning,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.estimators import _fellrec_serving, _fellrec_simulation
from fedrecsk.model_selection import PerUserHoldout
from fedrecsk.models.backbone import load_backbone
from fedrecsk.models.generation import embed_last_token
from fedrecsk.models.lora_training import train_adapters

N_USERS, N_ITEMS = 24, 16
TEXTS = {item: str(item) for item in range(N_ITEMS)}


def made_rows():
    """Seven items of each user's parity, at random times; columns user, item, rating, time."""
    rng = np.random.default_rng(0)
    rows = [
        [user, item, 5, time]
        for user in range(N_USERS)
        for time, item in enumerate(rng.permutation(np.arange(user % 2, N_ITEMS, 2))[:7])
    ]
    return np.array(rows)


X = made_rows()
CLIENTS = X[:, 0] // 8  # three platforms of eight users


@pytest.fixture
def make(tiny_backbones):
    """Give a function that makes an estimator with fast settings."""

    def make(backbone="tiny_encoder", **changes):
        settings = {
            "item_text": TEXTS,
            "n_rounds": 3,
            "local_epochs": 1,
            "target_modules": "all-linear",
            "learning_rate": 0.01,
            "popularity_weight": 0.0,
            "temperature": 0.05,
            "learning_rate_schedule": "constant",
            "early_stopping": False,
            "random_state": 0,
            "device": "cpu",
        }
        return FELLRecRecommender(tiny_backbones[backbone], **settings | changes)

    return make


@pytest.fixture
def make_causal(make):
    """The same on a model that writes."""
    return lambda **changes: make("tiny_causal", backend="causal", **changes)


def differ(one, other):
    """Say whether any adapter of two estimators differs."""
    return any(
        not np.array_equal(value, other.adapters_[name]) for name, value in one.adapters_.items()
    )


def equal_among_platforms(model):
    return all(np.array_equal(each, each[:1].repeat(len(each), 0)) for each in
               model.adapters_.values())  # fmt: skip


# ---------------------------------------------------------------- ranking


def test_beats_popularity_with_the_offline_model():
    """Titles of the made-up data tell the clusters; the model is made from them alone."""
    data = make_interactions(150, 80, 4, n_clients=5, random_state=0)
    train, test = next(PerUserHoldout(random_state=0).split(data.data))
    model = FELLRecRecommender(
        item_text=data.item_text, n_rounds=3, random_state=0, device="cpu"
    ).fit(data.data[train], data.target[train])
    popularity = PopularityRecommender().fit(data.data[train])
    assert model.score(data.data[test]) > 1.15 * popularity.score(data.data[test])
    assert sum(record["seconds"] for record in model.history_) < 60
    opened = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(opened.recommend(k=5)[1], model.recommend(k=5)[1])
    # The compact model goes with the estimator, so that training can go on.
    assert opened.set_params(n_rounds=1).partial_fit([[0, 0], [999, 1]], [0, 0]).n_rounds_ >= 2


def test_travels_with_a_backbone_that_is_written_in_a_notebook(make, tiny_backbones):
    """Dask and ray send functions by value with cloudpickle, where pickle would refuse them."""
    cloudpickle = pytest.importorskip("cloudpickle", reason="dask, which sends with it, is missing")
    model = make(n_rounds=1).set_params(backbone=lambda: tiny_backbones["tiny_encoder"]())
    opened = pickle.loads(cloudpickle.dumps(model)).fit(X, CLIENTS)
    model.fit(X, CLIENTS)
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"local|lambda"):
        pickle.dumps(model)
    again = pickle.loads(cloudpickle.dumps(model))
    for other in (opened, again):
        np.testing.assert_array_equal(other.recommend(k=5)[1], model.recommend(k=5)[1])
    assert again.partial_fit([[0, 0], [999, 1]], [0, 0]).n_rounds_ == 2


def test_seen_items_are_masked_and_held_out_ones_too(make):
    model = make(early_stopping=True).fit(X, CLIENTS)
    ids, scores = model.recommend(k=N_ITEMS - 7)
    assert np.isfinite(scores).all()
    for user in range(N_USERS):
        assert not set(ids[user]) & set(X[X[:, 0] == user, 1])


def test_items_known_by_text_alone_are_recommended(make):
    texts = {item: str(item) for item in range(30)}  # 16 to 29 have never been chosen
    model = make(item_text=texts, n_rounds=8).fit(X, CLIENTS)
    assert model.item_ids_.tolist() == list(range(30))
    assert model.item_counts_[:, N_ITEMS:].sum() == 0
    ids, scores = model.recommend(k=5, candidates=range(N_ITEMS, 30))
    assert np.isfinite(scores).all()
    assert (ids % 2 == np.arange(N_USERS)[:, None] % 2).mean() > 0.9
    # A held-out row of such an item can be found.
    assert model.score([[user, 16 + user % 2] for user in range(N_USERS)]) > 0.3


def test_unknown_users_are_served_by_the_mean_adapter(make):
    model = make(aggregation="fedavg").fit(X, CLIENTS)
    # All hold the mean, so the crowd's vector is the mean of the users', and so are the scores.
    for table in model.item_vectors_[1:]:
        np.testing.assert_allclose(table, model.item_vectors_[0], atol=1e-5)
    np.testing.assert_allclose(model.crowd_factors_, model.user_factors_.mean(0), atol=1e-5)
    np.testing.assert_allclose(
        model._score_items(np.array([-1]))[0],
        model._score_items(np.arange(N_USERS)).mean(0),
        atol=1e-3,
    )
    local = make(aggregation="local").fit(X, CLIENTS)
    assert not np.allclose(local.item_vectors_[-1], local.item_vectors_[0], atol=1e-3)
    with pytest.warns(UnknownIdWarning):
        assert np.isfinite(local.recommend(["nobody"], k=3)[1]).all()


def test_popularity_of_the_own_platform_counts(make):
    rows = X.copy()
    model = make(popularity_weight=50.0, popularity_counts="platform", n_rounds=1)
    model.fit(rows, rows[:, 0] % 2)
    ids, _ = model.recommend(k=1)
    unseen_favourite = []
    for user in range(N_USERS):
        counts = model.item_counts_[user % 2].copy()
        counts[rows[rows[:, 0] == user, 1]] = -1
        unseen_favourite.append(counts.argmax())
    assert ids[:, 0].tolist() == unseen_favourite
    assert model.item_counts_[0, 1::2].sum() == 0  # platform 0 holds the even users
    np.testing.assert_array_equal(model.item_counts_[-1], model.item_counts_[:-1].sum(0))


def test_the_weight_of_popularity_is_found_by_validation(make):
    model = make(popularity_weight="auto", early_stopping=True).fit(X, CLIENTS)
    assert model.popularity_weight_ in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert make(popularity_weight="auto").fit(X, CLIENTS).popularity_weight_ == 0.5


def test_mean_probability_is_the_share_of_pairs(make):
    model = make().fit(X, CLIENTS)
    pairs = [[user, item] for user in range(N_USERS) for item in range(N_ITEMS)]
    assert model.predict(pairs).mean() == pytest.approx(len(X) / len(pairs), abs=1e-5)


# ---------------------------------------------------------------- histories and platforms


def test_times_give_histories_their_order(make, assert_same_fit):
    model = make().fit(X, CLIENTS)
    order = np.random.default_rng(1).permutation(len(X))
    assert_same_fit(make().fit(X[order], CLIENTS[order]), model)
    later = X.copy()
    later[:, 3] = 10 * later[:, 3] + 1000  # other times, the same order
    np.testing.assert_array_equal(make().fit(later, CLIENTS).user_factors_, model.user_factors_)
    turned = X.copy()
    turned[:, 3] = -turned[:, 3]
    assert differ(make().fit(turned, CLIENTS), model)


def test_only_the_latest_items_are_read(make):
    short = make(max_history=2, learning_rate=1e-9).fit(X, CLIENTS)
    latest = X[X[:, 3] >= 5]
    alone = make(max_history=2, learning_rate=1e-9).fit(latest, latest[:, 0] // 8)
    np.testing.assert_allclose(short.user_factors_, alone.user_factors_, atol=1e-5)


def test_platforms_are_clients_or_groups_of_them(make):
    model = make(n_rounds=1).fit(X, [f"shop {client}" for client in CLIENTS])
    assert model.platforms_are_clients_
    assert model.platform_ids_.tolist() == ["shop 0", "shop 1", "shop 2"]
    assert model.client_platforms_.tolist() == [0, 1, 2]
    assert model.user_platforms_.tolist() == [user // 8 for user in range(N_USERS)]
    grouped = make(n_rounds=1, n_platforms=2).fit(X)
    assert not grouped.platforms_are_clients_
    assert grouped.platform_ids_.tolist() == [0, 1]
    assert {r["clients"] for r in grouped.history_} == {2}
    # Users of one taste are on one platform.
    assert len(set(grouped.user_platforms_[::2])) == len(set(grouped.user_platforms_[1::2])) == 1
    assert grouped.user_platforms_[0] != grouped.user_platforms_[1]
    assert len(make(n_rounds=1, n_platforms=None).fit(X).platform_ids_) == N_USERS
    assert len(make(n_rounds=1).fit(X).platform_ids_) == N_USERS  # "auto", and few enough
    more = np.concatenate([X, np.add(X, [100, 0, 0, 0])])
    assert len(make(n_rounds=1).fit(more).platform_ids_) == 5


def test_one_platform_is_centralised_training(make, assert_same_fit):
    """With nobody to mix with, every aggregation is the same."""
    models = [
        make(n_platforms=1, aggregation=name).fit(X) for name in ("fellrec", "fedavg", "local")
    ]
    assert len(models[0].platform_ids_) == 1
    for model in models[1:]:
        for name, value in models[0].adapters_.items():
            np.testing.assert_allclose(model.adapters_[name], value, atol=1e-6)
    assert models[2].history_[0]["bytes_up"] == 0
    assert models[0].history_[-1]["loss"] < models[0].history_[0]["loss"]


def test_popularity_of_all_platforms_or_of_the_own(make):
    """With a large weight every platform ranks by what is popular, here or anywhere."""
    own, everywhere = (
        make(popularity_weight=1000.0, popularity_counts=counts, n_rounds=1).fit(X, CLIENTS)
        for counts in ("platform", "all")
    )
    rows = [np.bincount(X[client == CLIENTS, 1], minlength=N_ITEMS) for client in range(3)]
    assert own.item_counts_.tolist() == everywhere.item_counts_.tolist()
    for user, platform in ((0, 0), (23, 2)):
        for model, counts in ((own, rows[platform]), (everywhere, np.sum(rows, axis=0))):
            ids, _ = model.recommend([user], k=N_ITEMS, exclude_seen=False)
            assert (np.diff(counts[ids[0]]) <= 0).all()
            pairs = model.predict([[user, item] for item in ids[0]])
            assert (np.diff(pairs) <= 1e-12).all()
    assert not np.array_equal(own.predict(X), everywhere.predict(X))


def test_validation_users_choose_whose_popularity_counts(make):
    shared = {"popularity_counts": "auto", "popularity_weight": 1.0, "n_rounds": 1}
    # Platforms of even and of odd items have nothing in common.
    model = make(**shared, early_stopping=True).fit(X, X[:, 0] % 2)
    assert not model.shared_popularity_
    # A platform of one user knows what that one has seen, and it may not choose it again.
    rng, liked = np.random.default_rng(0), 0.7 ** np.arange(N_ITEMS)
    rows = np.array(
        [
            [user, item, 5, time]
            for user in range(N_USERS)
            for time, item in enumerate(rng.choice(N_ITEMS, 4, False, liked / liked.sum()))
        ]
    )
    alone = make(**shared, early_stopping=True, n_platforms=None).fit(rows, rows[:, 0])
    assert alone.shared_popularity_
    assert not make(**shared).fit(X, X[:, 0] % 2).shared_popularity_  # nobody to ask


def test_the_temperature_suits_the_start(make):
    """A sharper or a blunter one makes more of what the untrained model confuses."""
    model = make(temperature="auto", n_rounds=1, learning_rate=1e-12).fit(X, CLIENTS)
    found = model.temperature_
    losses = {
        factor: make(
            temperature=factor * found,
            n_rounds=1,
            learning_rate=1e-12,
            lora_dropout=0.0,
            local_epochs=4,
        )
        .fit(X, CLIENTS)
        .history_[0]["loss"]
        for factor in (0.5, 1.0, 2.0)
    }
    assert losses[1.0] < min(losses[0.5], losses[2.0])


def test_who_goes_on_keeps_the_temperature(make):
    model = make(temperature="auto", n_rounds=1, warm_start=True).fit(X, CLIENTS)
    found = model.temperature_
    model.set_params(learning_rate=0.1).partial_fit(X, CLIENTS)
    assert model.temperature_ == found
    assert model.set_params(temperature=0.3).fit(X, CLIENTS).temperature_ == 0.3
    # Nobody has two items: nothing says which temperature suits.
    _, first = np.unique(X[:, 0], return_index=True)
    with pytest.warns(UserWarning, match="two interactions"):
        assert make(temperature="auto").fit(X[first], CLIENTS[first]).temperature_ == 0.05


def test_the_learning_rate_falls_with_the_rounds(make, monkeypatch):
    rates = []

    def train(*args, learning_rate, **kwargs):
        rates.append(learning_rate)
        return train_adapters(*args, learning_rate=learning_rate, **kwargs)

    monkeypatch.setattr(_fellrec_simulation, "train_adapters", train)
    falling = {"learning_rate": 0.02, "learning_rate_schedule": "linear"}
    model = make(n_rounds=4, **falling).fit(X, CLIENTS)
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.005])
    rates.clear()
    model.partial_fit(X, CLIENTS)  # rounds 5 to 8 are a fit of their own
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.005])
    rates.clear()
    make(n_rounds=2, learning_rate=0.02).fit(X, CLIENTS)
    assert rates == [0.02, 0.02]


# ---------------------------------------------------------------- aggregation


def test_local_platforms_do_not_hear_of_each_other(make):
    model = make(aggregation="local").fit(X, CLIENTS)
    others = X.copy()
    others[CLIENTS == 2, 1] = (others[CLIENTS == 2, 1] + 2) % N_ITEMS
    other = make(aggregation="local").fit(others, CLIENTS)
    for name, value in model.adapters_.items():
        np.testing.assert_allclose(other.adapters_[name][:2], value[:2], atol=1e-5)
    assert differ(model, other)
    mixed = make().fit(X, CLIENTS), make().fit(others, CLIENTS)
    assert any(
        not np.allclose(mixed[0].adapters_[name][:2], mixed[1].adapters_[name][:2], atol=1e-4)
        for name in model.adapters_
    )


def test_fedavg_leaves_all_with_the_same_adapter(make):
    model = make(aggregation="fedavg").fit(X, CLIENTS)
    assert equal_among_platforms(model)
    assert not equal_among_platforms(make().fit(X, CLIENTS))
    # The pull is felt from the second step of a local training on.
    free, pulled = (
        make(aggregation="fedavg", proximal=pull, batch_size=4, n_rounds=1).fit(X, CLIENTS)
        for pull in (0.0, 10.0)
    )
    assert equal_among_platforms(pulled)
    assert differ(free, pulled)
    uneven = np.minimum(CLIENTS + (X[:, 0] > 2), 2)
    by_size = make(aggregation="fedavg").fit(X, uneven)
    alike = make(aggregation="fedavg", client_weights="clients").fit(X, uneven)
    assert differ(by_size, alike)


def test_ditto_keeps_personal_adapters_near_the_shared_one(make):
    free = make(aggregation="ditto", proximal=0.0).fit(X, CLIENTS)
    pulled = make(aggregation="ditto", proximal=100.0).fit(X, CLIENTS)
    assert not equal_among_platforms(free)

    def spread(model):
        return sum(np.ptp(value, axis=0).sum() for value in model.adapters_.values())

    assert 0 < spread(pulled) < spread(free)


def test_what_the_similarity_compares_matters(make):
    models = {on: make(similarity_on=on).fit(X, CLIENTS) for on in ("params", "update", "product")}
    assert differ(models["params"], models["update"])
    assert differ(models["params"], models["product"])
    assert differ(models["update"], models["product"])
    for model in models.values():
        assert all(0 <= record["similarity"] <= 1 for record in model.history_)
    # From one start the adapters look alike; their changes say more.
    first = {on: model.history_[0]["similarity"] for on, model in models.items()}
    assert first["params"] > first["update"]
    plain = make(use_similarity=False, use_heating=False).fit(X, CLIENTS)
    assert equal_among_platforms(plain)


def test_periods_of_one_are_the_synchronous_method(make, assert_same_fit):
    plain = make().fit(X, CLIENTS)
    ones = make(client_periods=[1, 1, 1]).fit(X, CLIENTS)
    assert_same_fit(ones, plain)
    slow = make(client_periods=[1, 2, 3], n_rounds=6).fit(X, CLIENTS)
    assert [record["clients"] for record in slow.history_] == [1, 2, 2, 2, 1, 3]


# ---------------------------------------------------------------- split models


@pytest.mark.parametrize("client_layers", [0, 1, 2])
def test_a_split_model_gives_the_same_results(make, client_layers):
    whole = make("deep_encoder", n_rounds=2).fit(X, CLIENTS)
    split = make("deep_encoder", n_rounds=2, client_layers=client_layers).fit(X, CLIENTS)
    assert whole.client_layers_ is None
    assert split.client_layers_ == client_layers
    for name, value in whole.adapters_.items():
        np.testing.assert_allclose(split.adapters_[name], value, atol=1e-5)
    np.testing.assert_allclose(split.user_factors_, whole.user_factors_, atol=1e-5)
    assert "bytes_boundary" not in whole.history_[0]
    assert all(record["bytes_boundary"] > 0 for record in split.history_)


def test_layers_are_chosen_by_what_can_be_reconstructed(make):
    daring = make("deep_encoder", n_rounds=1, client_layers="auto", max_risk=1.0).fit(X, CLIENTS)
    assert daring.client_layers_ == 0
    assert daring.history_[0]["bytes_boundary"] > 0
    with pytest.raises(ValueError, match="No split keeps the risk within 1e-06"):
        make("deep_encoder", n_rounds=1, client_layers="auto", max_risk=1e-6).fit(X, CLIENTS)


# ---------------------------------------------------------------- adapters on disk


def test_adapters_are_written_and_read(make, tmp_path):
    model = make().fit(X, CLIENTS)
    folders = model.save_adapters(tmp_path)
    assert len(folders) == 3
    other = make(aggregation="fedavg", n_rounds=1).fit(X, CLIENTS)
    assert differ(other, model)
    assert other.load_adapters(tmp_path) is other
    for name, value in model.adapters_.items():
        np.testing.assert_array_equal(other.adapters_[name], value)
    np.testing.assert_allclose(other.predict(X), model.predict(X), atol=1e-6)
    assert other.n_rounds_ == 1  # nothing was trained


# PEFT asks transformers under a name that has become old.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_opens_an_adapter(make, tiny_backbones, tmp_path):
    model = make(lora_dropout=0.0).fit(X, CLIENTS)
    folders = model.save_adapters(tmp_path)
    # The backbone is drawn from the estimator's seed.
    backbone = load_backbone(tiny_backbones["tiny_encoder"], backend="encoder", device="cpu",
                             seed=0)  # fmt: skip
    tokens = backbone.tokenizer(["3", "4"], return_tensors="pt")
    opened = PeftModel.from_pretrained(backbone.model, folders[1]).eval()
    with torch.no_grad():
        hidden = opened(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
    vectors = torch.nn.functional.normalize(hidden.mean(1), dim=-1).numpy()
    np.testing.assert_allclose(vectors, model.item_vectors_[1, 3:5], atol=1e-5)


def test_adapters_of_others_are_refused(make, tmp_path):
    make().fit(X, CLIENTS).save_adapters(tmp_path)
    with pytest.raises(ValueError, match="rank 8"):
        make(lora_rank=4).fit(X, CLIENTS).load_adapters(tmp_path)
    with pytest.raises(ValueError, match="other layers"):
        make(target_modules="auto").fit(X, CLIENTS).load_adapters(tmp_path)
    with pytest.raises(ValueError, match=r"no adapter for the platforms \[3\]"):
        make().fit(X, X[:, 0] // 6).load_adapters(tmp_path)


# ---------------------------------------------------------------- early stopping


def test_each_platform_keeps_its_best_adapter(make, tmp_path):
    model = make(n_rounds=8, early_stopping=True, n_iter_no_change=8).fit(X, CLIENTS)
    table = np.array([record["client_ndcg"] for record in model.history_])
    assert table.shape == (8, 3)
    best = np.maximum.accumulate(table, axis=0)
    watched = np.array([record["validation_ndcg"] for record in model.history_])
    assert (np.diff(watched) >= 0).all()
    # Three platforms hold out all their users; what the start was worth may be better still.
    assert (watched >= best.mean(axis=1) - 1e-9).all()
    # By hand: the adapters that serve rank the held-out last items as well as the best round.
    is_last = X[:, 3] == 6
    other = make(n_rounds=1, learning_rate=1e-9).fit(X[~is_last], CLIENTS[~is_last])
    model.save_adapters(tmp_path)
    other.load_adapters(tmp_path)
    truth = dict(X[is_last, :2].tolist())
    ids, _ = other.recommend(k=N_ITEMS)
    gains = [1 / np.log2(row.index(truth[user]) + 2) for user, row in enumerate(ids.tolist())]
    values = np.reshape(gains, (3, 8)).mean(axis=1)
    assert (values >= best[-1] - 1e-6).all()
    assert values.mean() == pytest.approx(watched[-1], abs=1e-6)
    assert differ(model, make(n_rounds=8).fit(X, CLIENTS))


def test_training_ends_when_nobody_improves(make):
    model = make(n_rounds=50, early_stopping=True, n_iter_no_change=2).fit(X, CLIENTS)
    assert model.n_rounds_ < 50
    watched = [record["validation_ndcg"] for record in model.history_]
    assert watched[-1] <= watched[-3] + 1e-4


# ---------------------------------------------------------------- going on


def test_partial_fit_takes_clients_as_new_platforms(make):
    model = make().fit(X, CLIENTS)
    texts = TEXTS | {16: "16", 18: "18"}
    new = [[100, 16, 5, 1], [100, 18, 5, 2], [100, 2, 5, 3], [0, 16, 5, 99]]
    model.set_params(item_text=texts).partial_fit(new, [7, 7, 7, 0])
    assert model.platform_ids_.tolist() == [0, 1, 2, 7]
    assert model.item_ids_.tolist() == [*range(N_ITEMS), 16, 18]
    assert all(len(value) == 4 for value in model.adapters_.values())
    assert [record["round"] for record in model.history_] == list(range(1, 7))
    assert model.history_[-1]["clients"] == 4
    assert model.user_platforms_[-1] == 3


def test_partial_fit_puts_new_clients_on_the_platform_of_their_taste(make):
    model = make(n_platforms=2, n_rounds=1).fit(X)
    before = model.user_platforms_
    new = [[100, item, 5, item] for item in range(0, 16, 2)]
    new += [[101, item, 5, item] for item in range(1, 16, 2)]
    model.partial_fit(new)
    assert model.user_platforms_[:N_USERS].tolist() == before.tolist()
    assert model.user_platforms_[N_USERS:].tolist() == before[:2].tolist()


def test_other_adapters_cannot_be_gone_on_from(make):
    model = make(warm_start=True).fit(X, CLIENTS).set_params(target_modules="auto")
    with pytest.raises(ValueError, match=r"other adapters than before.*target_modules"):
        model.fit(X, CLIENTS)


def test_heating_goes_on(make):
    """Rounds are counted through, so that the second fit does not start to mix anew."""
    whole = make(n_rounds=4).fit(X, CLIENTS)
    parts = make(n_rounds=2, warm_start=True).fit(X, CLIENTS).fit(X, CLIENTS)
    np.testing.assert_array_equal(
        [record["heat"] for record in parts.history_[:2]],
        [record["heat"] for record in whole.history_[:2]],
    )
    np.testing.assert_allclose(
        [record["heat"] for record in parts.history_],
        [record["heat"] for record in whole.history_],
        atol=0.05,
    )


# ---------------------------------------------------------------- writing titles


def test_writing_is_learned(make_causal):
    model = make_causal(inference="generate", n_rounds=4, num_beams=2).fit(X, CLIENTS)
    assert model.generates_
    assert model.history_[-1]["loss"] < model.history_[0]["loss"]
    assert len(model.generated_titles_) == N_USERS
    assert all(isinstance(title, str) for title in model.generated_titles_)
    with pytest.warns(UnknownIdWarning):
        assert np.isfinite(model.recommend(["nobody"], k=3)[1]).all()
    assert ((model.predict(X) >= 0) & (model.predict(X) <= 1)).all()


def test_written_titles_lead_to_items(make_causal, tiny_backbones, monkeypatch):
    """Whatever the model writes: who is given the title of an item gets this item first."""
    asked = []

    def write(backbone, prompts, *, num_beams, max_new_tokens):
        asked.append((len(prompts), num_beams))
        return [str(place) for place in range(len(prompts))]

    monkeypatch.setattr(_fellrec_serving, "generate_titles", write)
    model = make_causal(inference="generate", n_rounds=1, num_beams=3).fit(X, CLIENTS)
    assert asked == [(8, 3), (8, 3), (8, 3), (1, 3)]  # each platform's users, and the crowd
    assert model.generated_titles_ == tuple(str(user % 8) for user in range(N_USERS))
    ids, _ = model.recommend(k=1, exclude_seen=False)
    assert ids[:, 0].tolist() == [user % 8 for user in range(N_USERS)]
    # Titles are compared without adapters, so there is one table for all.
    backbone = load_backbone(tiny_backbones["tiny_causal"], backend="causal", device="cpu", seed=0)
    vectors = embed_last_token(backbone, list(TEXTS.values())).numpy()
    np.testing.assert_allclose(model.item_vectors_, vectors[None], atol=1e-5)
    # Seen items come last.
    ids, scores = model.recommend(k=N_ITEMS)
    assert ((scores == -np.inf).sum(axis=1) == 7).all()


def test_the_prompt_may_count_in_the_loss(make_causal):
    shared = {"inference": "generate", "n_rounds": 1, "num_beams": 1}
    answers = make_causal(**shared).fit(X, CLIENTS)
    everything = make_causal(**shared, prompt_loss=True).fit(X, CLIENTS)
    assert differ(answers, everything)


def test_all_items_may_be_negatives(make):
    model = make(negatives="all", objective="probability", n_rounds=6).fit(X, CLIENTS)
    assert differ(model, make(objective="probability", n_rounds=6).fit(X, CLIENTS))
    assert model.history_[-1]["loss"] < model.history_[0]["loss"]
    with pytest.raises(ValueError, match='negatives="all" needs objective="probability"'):
        make(negatives="all").fit(X, CLIENTS)


def test_lift_leaves_popularity_to_the_ranking(make):
    """Nothing that is trained depends on the weight; with probabilities it does."""
    for objective, same in (("lift", True), ("probability", False)):
        settings = {"objective": objective, "n_negatives": 4, "n_rounds": 1}
        without = make(**settings).fit(X, CLIENTS)
        with_it = make(**settings | {"popularity_weight": 1.0}).fit(X, CLIENTS)
        assert same is not differ(without, with_it)
        assert not np.allclose(without.recommend(k=3)[1], with_it.recommend(k=3)[1])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_poolings(make, pooling):
    model = make(pooling=pooling).fit(X, CLIENTS)
    assert np.isfinite(model.user_factors_).all()
    is_default = np.array_equal(model.item_vectors_, make().fit(X, CLIENTS).item_vectors_)
    assert is_default == (pooling == "mean")


# ---------------------------------------------------------------- scikit-learn


def test_search_over_the_rank_of_the_adapters(make):
    search = GridSearchCV(
        make(n_rounds=1), {"lora_rank": [1, 4]}, cv=PerUserHoldout(random_state=0)
    ).fit(X, CLIENTS)
    ranks = {value.shape[1] for name, value in search.best_estimator_.adapters_.items()
             if name.endswith("lora_A")}  # fmt: skip
    assert ranks == {search.best_params_["lora_rank"]}
    assert (search.cv_results_["mean_test_score"] > 0).all()


def test_rounds_are_seen_by_callbacks_and_printed(make, capsys, interrupt):
    callback = interrupt()
    model = make(early_stopping=True, verbose=2).set_callbacks(callback).fit(X, CLIENTS)
    assert len(callback.seen) == model.n_rounds_ == 3
    for n, each in enumerate(callback.seen, start=1):
        assert each.history_ == model.history_[:n]
        assert each.recommend([3], k=2)[0].shape == (1, 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "validation NDCG@20 0." in lines[-1]


def test_divergence_names_the_round(make):
    with pytest.raises(FloatingPointError, match="Training diverged"):
        make(learning_rate=1e30).fit(X, CLIENTS)


# ---------------------------------------------------------------- what cannot be


def test_a_fit_without_texts_says_so(make):
    with pytest.warns(NoItemTextWarning, match="no text for any of the 16 items"):
        make(item_text=None, n_rounds=1).fit(X, CLIENTS)
    with pytest.warns(NoItemTextWarning, match="1 of 16 items have no text, such as 3"):
        make(item_text={item: TEXTS[item] for item in TEXTS if item != 3}, n_rounds=1).fit(
            X, CLIENTS
        )


@pytest.mark.parametrize("early_stopping", [True, False])
def test_nothing_to_learn_from_is_a_warning(make, early_stopping):
    rows = [[user, user % 5] for user in range(10)]
    model = make(popularity_weight=1.0, early_stopping=early_stopping)
    with pytest.warns(UserWarning, match="No user has two interactions to learn from"):
        model.fit(rows)
    assert all(record["loss"] == 0 for record in model.history_)
    # What is left is the text, and how popular an item is.
    assert np.isfinite(model.recommend(k=3)[1]).all()


def test_writing_needs_a_model_that_writes(make):
    with pytest.raises(ValueError, match=r'inference="generate" needs backend="causal"'):
        make(inference="generate").fit(X, CLIENTS)


def test_backbones_that_are_refused(make, tiny_backbones):
    model, _ = tiny_backbones["tiny_encoder"]()
    with pytest.raises((TypeError, ValueError), match=r"BertModel|'backbone' parameter"):
        make().set_params(backbone=model).fit(X, CLIENTS)
    with pytest.raises(FileNotFoundError, match="There is no folder no/such/folder"):
        make().set_params(backbone="no/such/folder").fit(X, CLIENTS)


def test_texts_that_are_refused(make):
    with pytest.raises(ValueError, match="a text for none of the 16 items"):
        make(item_text={100: "a", 101: "b"}).fit(X, CLIENTS)
    with pytest.raises(TypeError, match="a text for none of the 16 items"):
        make(item_text={"a": "a"}).fit(X, CLIENTS)
    with pytest.raises(TypeError, match="item_text is a int"):
        make(item_text=3).fit(X, CLIENTS)


@pytest.mark.parametrize("periods", [[1, 1], [1, 2, 3, 4], [2, 2, 2], [0, 1, 1], [1, 1.5, 1]])
def test_periods_that_are_refused(make, periods):
    with pytest.raises(ValueError, match="client_periods must give each of the 3 platforms"):
        make(client_periods=periods).fit(X, CLIENTS)


def test_a_layer_that_is_not_there_is_named(make):
    with pytest.raises(ValueError, match="no_such_layer"):
        make(target_modules=["no_such_layer"]).fit(X, CLIENTS)


# ---------------------------------------------------------------- odd federations


ODD = {
    "one user": ([[0, item, 5, item] for item in range(6)], None),
    "users with every item": ([[u, i, 5, i] for u in range(4) for i in range(N_ITEMS)], None),
    "a platform of single rows": (
        [[0, 1, 5, 1], *([u, i, 5, i] for u in range(1, 5) for i in range(4))],
        [9, *[u // 3 for u in range(1, 5) for _ in range(4)]],
    ),
    "identical users": ([[u, i, 5, i] for u in range(8) for i in range(5)], None),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("negatives", ["in-batch", "all"])
def test_odd_federations(make, kind, early_stopping, negatives):
    rows, clients = ODD[kind]
    objective = "probability" if negatives == "all" else "lift"
    settings = {"negatives": negatives, "objective": objective}
    model = make(early_stopping=early_stopping, **settings).fit(rows, clients)
    assert np.isfinite(model.user_factors_).all()
    assert np.isfinite(model.item_vectors_).all()
    assert all(np.isfinite(record["loss"]) for record in model.history_)
    probability = model.predict(np.array(rows))
    assert ((probability >= 0) & (probability <= 1)).all()
    if early_stopping:
        assert all(0 <= record["validation_ndcg"] <= 1 for record in model.history_)
