from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrecsk.data import encode
from fedrecsk.data.prompts import catalogue
from fedrecsk.datasets import make_interactions
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._language import (
    Ranking,
    about,
    adapters_before,
    check_periods,
    find_intercept,
    items_under,
    mean_of_best,
)
from fedrecsk.estimators._platforms import (
    AUTO_PLATFORMS,
    FEWEST_VALIDATION_USERS,
    MOST_PLATFORMS,
    MOST_VALIDATION_USERS,
    HeldOut,
    Platforms,
    Sampler,
    hold_out_last,
    make_platforms,
)
from fedrecsk.methods.fellrec import FELLRecState
from fedrecsk.models.text_vectors import TextForm, TokenRows

N_ITEMS = 40


def platforms_of(lengths_by_platform, seed=0, n_items=N_ITEMS):
    """Users of the platforms mixed, with different items each, drawn at random."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(len(lengths_by_platform)), list(map(len, lengths_by_platform)))
    lengths = np.concatenate([np.asarray(own, dtype=np.int64) for own in lengths_by_platform])
    order = rng.permutation(len(owners))
    rows = [rng.permutation(n_items)[:n] for n in lengths[order]]
    indptr = np.cumsum([0, *map(len, rows)])
    ids = np.arange(len(lengths_by_platform))
    items = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    return Platforms(ids, ids, owners[order], indptr, items, n_items)


def history(platforms, user):
    return platforms.items[platforms.indptr[user] : platforms.indptr[user + 1]].tolist()


# Who is on which platform ------------------------------------------------------------------


@pytest.fixture(scope="module")
def bunch():
    return make_interactions(120, 60, 3, mean_interactions=12, taste=4.0, random_state=0)


def made(data, n_platforms=None, previous=None, item_text=None):
    items, codes = catalogue(data, item_text or {item: str(item) for item in range(60)})
    platforms = make_platforms(
        data,
        codes,
        len(items),
        n_platforms=n_platforms,
        streams=Streams(0),
        previous=previous,
    )
    return platforms, items, codes


def fitted(data, **settings):
    """What a fit leaves for `make_platforms` to go on from."""
    platforms, items, codes = made(data, **settings)
    counts = platforms.counts(platforms.lengths)
    return {
        **about(data, codes, items, platforms),
        "client_ids_": data.clients.ids,
        "item_counts_": np.concatenate([counts, counts.sum(0)[None]]),
    }


def test_clients_are_platforms(bunch):
    names = np.array([f"shop {client % 7}" for client in bunch.target])
    data = encode(bunch.data, names)
    for n_platforms in (None, "auto", 7, 100):
        platforms, _, _ = made(data, n_platforms)
        assert platforms.ids.tolist() == [f"shop {number}" for number in range(7)]
        assert platforms.of_client.tolist() == list(range(7))
        assert platforms.of_user.tolist() == [user % 7 for user in range(120)]
    assert fitted(data)["platforms_are_clients_"]


def test_clients_are_grouped(bunch):
    data = encode(bunch.data, bunch.target)
    platforms, _, _ = made(data, 3)
    assert platforms.ids.tolist() == [0, 1, 2]
    assert len(platforms) == 3
    for platform in range(3):  # mostly users of one taste
        tastes = bunch.user_clusters[platforms.of_user == platform]
        assert np.bincount(tastes).max() > 0.8 * len(tastes)
    assert not fitted(data, n_platforms=3)["platforms_are_clients_"]


def test_auto_groups_many_clients(bunch):
    few = bunch.target < MOST_PLATFORMS
    assert len(made(encode(bunch.data[few], bunch.target[few]), "auto")[0]) == MOST_PLATFORMS
    more = bunch.target <= MOST_PLATFORMS
    assert len(made(encode(bunch.data[more], bunch.target[more]), "auto")[0]) == AUTO_PLATFORMS


def test_histories_are_in_the_order_of_time_by_codes_of_the_catalogue(bunch):
    texts = {item: str(item) for item in range(-3, 70)}  # items that nobody chose, on both sides
    data = encode(bunch.data, bunch.target)
    platforms, items, _ = made(data, 3, item_text=texts)
    assert platforms.n_items == len(items) == 73
    assert platforms.n_users == 120
    for user in range(120):
        rows = bunch.data[bunch.data[:, 0] == user]
        expected = rows[np.lexsort([rows[:, 1], rows[:, 3]]), 1]
        assert items.items.ids[history(platforms, user)].tolist() == expected.tolist()


def test_known_clients_stay_and_new_ones_join_those_like_them(bunch):
    old = bunch.target < 90
    previous = fitted(encode(bunch.data[old], bunch.target[old]), n_platforms=3)
    # Other interactions, a new item, and more platforms asked for, change nothing.
    rows = np.concatenate([bunch.data, [[3, 1000, 5, 10**9], [110, 1000, 5, 10**9]]])
    data = encode(rows, np.concatenate([bunch.target, [3, 110]]))
    texts = {item: str(item) for item in [*range(60), 1000]}
    for n_platforms in (3, 5, "auto", None):
        platforms, _, _ = made(data, n_platforms, previous, texts)
        assert platforms.ids.tolist() == [0, 1, 2]
        assert platforms.of_client[:90].tolist() == previous["client_platforms_"].tolist()
    taste_of = [
        np.bincount(bunch.user_clusters[:90][previous["client_platforms_"] == platform]).argmax()
        for platform in range(3)
    ]
    joined = [taste_of[platform] for platform in platforms.of_client[90:]]
    assert np.mean(joined == bunch.user_clusters[90:]) > 0.9


def test_joining_is_by_the_likelihood_of_what_is_chosen(bunch):
    old = bunch.target < 90
    previous = fitted(encode(bunch.data[old], bunch.target[old]), n_platforms=3)
    platforms, _, _ = made(encode(bunch.data, bunch.target), 3, previous)
    counts = previous["item_counts_"][:3]
    for client in range(90, 120):
        chosen = bunch.data[bunch.target == client][:, 1]
        places = np.searchsorted(previous["item_ids_"], chosen)
        likelihood = [
            sum(np.log((row[place] + 1) / (row + 1).sum()) for place in places) for row in counts
        ]
        assert platforms.of_client[client] == np.argmax(likelihood)


def test_new_clients_become_platforms_where_clients_are_platforms(bunch):
    old = bunch.target < 5
    more = bunch.target < 8
    previous = fitted(encode(bunch.data[old], bunch.target[old]), n_platforms=None)
    data = encode(bunch.data[more], bunch.target[more])
    for n_platforms in (None, "auto", 8):
        platforms, _, _ = made(data, n_platforms, previous)
        assert platforms.ids.tolist() == list(range(8))
        assert platforms.of_client.tolist() == list(range(8))


@pytest.mark.parametrize(("n_old", "n_platforms"), [(5, 6), (MOST_PLATFORMS, "auto")])
def test_clients_that_are_platforms_stay_when_there_are_too_many(bunch, n_old, n_platforms):
    """Their adapters are named by their ids, which numbers of clusters must not take over."""
    old = bunch.target < n_old
    previous = fitted(encode(bunch.data[old], bunch.target[old] + 7), n_platforms=n_platforms)
    assert previous["platforms_are_clients_"]
    more = bunch.target < n_old + 3
    platforms, _, _ = made(encode(bunch.data[more], bunch.target[more] + 7), n_platforms, previous)
    assert platforms.ids.tolist() == list(range(7, 7 + n_old))
    assert platforms.of_client[:n_old].tolist() == list(range(n_old))
    assert (platforms.of_client[n_old:] < n_old).all()
    assert len(platforms.of_client) == n_old + 3


def test_counts_and_windows():
    platforms = platforms_of([[3, 0, 5], [1, 2], []])
    ends = np.maximum(platforms.lengths - 1, 0)
    counts = np.zeros((3, N_ITEMS))
    for user in range(platforms.n_users):
        for item in history(platforms, user)[: ends[user]]:
            counts[platforms.of_user[user], item] += 1
    np.testing.assert_array_equal(platforms.counts(ends), counts)
    users = np.arange(platforms.n_users)
    for row, user in zip(platforms.window(users, ends, 3), users, strict=True):
        known = history(platforms, user)[: ends[user]][::-1][:3]
        assert row.tolist() == known + [-1] * (3 - len(known))


# Who validates ------------------------------------------------------------------------------


def lengths_drawn(n_users, seed=0):
    return np.random.default_rng(seed).integers(1, 9, n_users).tolist()


@pytest.mark.parametrize(
    "sizes", [(300, 50, 7, 1), (5, 3), (1,), (2000, 900), (30_000, 40), (4, 0, 6), (0,)]
)
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_held_out_users(sizes, fraction):
    platforms = platforms_of([lengths_drawn(n, seed) for seed, n in enumerate(sizes)])
    held_out = hold_out_last(platforms, fraction, Streams(0))
    lengths = platforms.lengths
    able = lengths >= 3
    assert len(np.unique(held_out.users)) == len(held_out.users)
    assert able[held_out.users].all()
    # Nobody loses more than the last item, and two are left at least.
    lost = np.zeros(platforms.n_users, dtype=np.int64)
    lost[held_out.users] = 1
    np.testing.assert_array_equal(held_out.ends, lengths - lost)
    assert (held_out.ends[held_out.users] >= 2).all()
    for user, target in zip(held_out.users[:50], held_out.targets[:50], strict=True):
        assert target == history(platforms, user)[-1]
    per_platform = np.bincount(platforms.of_user[held_out.users], minlength=len(platforms))
    able_there = np.bincount(platforms.of_user[able], minlength=len(platforms))
    assert (per_platform[able_there > 0] >= 1).all()
    assert (per_platform <= able_there).all()
    slack = len(sizes)  # by rounding
    wanted = np.clip(fraction * able.sum(), FEWEST_VALIDATION_USERS, MOST_VALIDATION_USERS)
    assert abs(len(held_out.users) - min(wanted, able.sum())) <= slack
    if able.sum() <= FEWEST_VALIDATION_USERS:
        assert len(held_out.users) == able.sum()


def test_held_out_users_are_drawn_anew_with_another_seed():
    platforms = platforms_of([lengths_drawn(500)])
    one, same, other = (hold_out_last(platforms, 0.1, Streams(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.users, same.users)
    assert not np.array_equal(one.users, other.users)


def test_ndcg_of_held_out_users():
    platforms = platforms_of([lengths_drawn(40), lengths_drawn(10, 1)])
    held_out = hold_out_last(platforms, 0.5, Streams(0))
    rng = np.random.default_rng(0)
    which = np.arange(0, len(held_out.users), 2)
    scores = rng.random((len(which), N_ITEMS))
    expected = []
    for row, place in zip(scores, which, strict=True):
        seen = history(platforms, held_out.users[place])[:-1]
        rivals = [item for item in range(N_ITEMS) if item not in seen]
        rank = sorted(rivals, key=lambda item, row=row: -row[item]).index(held_out.targets[place])
        expected.append(1 / np.log2(rank + 2) if rank < 20 else 0.0)
    found = held_out.ndcg(scores.copy(), platforms, which)
    np.testing.assert_allclose(found, expected)
    assert found.min() > 0 or 0.0 in expected
    nobody = HeldOut(platforms.lengths, held_out.users[:0], held_out.targets[:0])
    assert nobody.ndcg(scores[:0], platforms, which[:0]).shape == (0,)


# Examples ------------------------------------------------------------------------------------

LENGTHS = [[6, 2, 1, 9, 3, 4, 2, 2, 7, 12, 5], [3, 0, 2], [1, 1], [8, 4, 2, 2, 6]]


def sampler_of(platforms, ends=None, **changed):
    pieces = TokenRows.of([[1] * (1 + item % 5) for item in range(platforms.n_items)])
    settings = {
        "local_epochs": 2,
        "batch_size": 4,
        "gradient_accumulation": 1,
        "examples_per_user": 2,
        "n_negatives": 3,
        "max_history": 3,
    }
    ends = platforms.lengths if ends is None else ends
    form = TextForm(pieces, (2,), (3,), 0, 64)
    return Sampler(platforms, ends, form, Streams(5), **{**settings, **changed})


def listed(sampler, t, clients):
    """Examples of each client by epoch and step: lists of micro-batches of plain values."""
    found = {client: [] for client in clients}
    for step in sampler.steps(t, clients):
        for number, client in enumerate(clients):
            batches = []
            for examples, weights in step:
                assert weights.shape == (len(clients),)
                if number not in examples.clients:
                    assert weights[number] == 0
                    continue
                row = examples.clients.index(number)
                present = examples.present[row]
                assert weights[number] == present.sum() > 0
                windows = examples.histories.reshape(*examples.targets.shape, -1)
                assert (windows[row][~present] == -1).all()
                assert (examples.targets[row][~present] == 0).all()
                batches.append(
                    (
                        examples.key,
                        windows[row][present].tolist(),
                        examples.targets[row][present].tolist(),
                        examples.negatives[row].tolist(),
                    )
                )
            if batches:
                found[client].append(batches)
    return found


@pytest.mark.parametrize("accumulation", [1, 2, 3, 9])
def test_examples_are_items_with_those_before_them(accumulation):
    platforms = platforms_of(LENGTHS)
    ends = np.maximum(platforms.lengths - (np.arange(platforms.n_users) % 2), 0)
    sampler = sampler_of(platforms, ends, gradient_accumulation=accumulation)
    n_examples = sampler.n_examples()
    users = [np.flatnonzero(platforms.of_user == client) for client in range(4)]
    assert n_examples.tolist() == [sum(min(max(ends[u] - 1, 0), 2) for u in own) for own in users]
    found = listed(sampler, 0, [0, 1, 2, 3])
    assert found[2] == []
    size = -(-4 // accumulation)
    for client in (0, 1, 3):
        possible = {}
        for user in users[client]:
            items = history(platforms, user)[: ends[user]]
            for place in range(1, len(items)):
                window = items[:place][::-1][:3]
                possible[(*window, *[-1] * (3 - len(window)), items[place])] = user
        for epoch in range(2):
            steps = [step for step in found[client] if step[0][0][1] == epoch]
            assert len(steps) == -(-n_examples[client] // 4)
            drawn = []
            for step in steps:
                assert sum(len(batch[2]) for batch in step) <= 4
                for _, windows, targets, negatives in step:
                    assert 1 <= len(targets) <= size
                    assert len(negatives) == 3
                    assert all(0 <= item < N_ITEMS for item in negatives)
                    drawn += [(*w, item) for w, item in zip(windows, targets, strict=True)]
            assert len(set(drawn)) == len(drawn) == n_examples[client]
            # As many of each user as there are, at most two.
            owners = [possible[example] for example in drawn]
            for user in users[client]:
                assert owners.count(user) == min(max(ends[user] - 1, 0), 2)


def test_examples_do_not_depend_on_the_other_clients():
    sampler = sampler_of(platforms_of(LENGTHS), gradient_accumulation=2)
    for t in (0, 3):
        together = listed(sampler, t, [0, 1, 2, 3])
        for clients in ([0], [1], [3], [1, 3], [3, 0]):
            alone = listed(sampler, t, clients)
            assert alone == {client: together[client] for client in clients}
    assert listed(sampler, 0, [0]) != listed(sampler, 1, [0])


def test_nor_on_what_the_other_clients_hold():
    one = platforms_of(LENGTHS)
    changed = replace(one, items=np.where(one.of_user.repeat(one.lengths) == 0, one.items, 0))
    sampler = sampler_of(one)
    other = sampler_of(changed)
    assert listed(sampler, 0, [0, 1])[0] == listed(other, 0, [0, 1])[0]
    assert listed(sampler, 0, [0, 1])[1] != listed(other, 0, [0, 1])[1]


def test_every_place_of_a_user_comes_up():
    sampler = sampler_of(platforms_of([[6]]), examples_per_user=1, local_epochs=1)
    targets = [listed(sampler, t, [0])[0][0][0][2][0] for t in range(60)]
    assert set(targets) == set(history(sampler.platforms, 0)[1:])
    whole = sampler_of(platforms_of([[6]]), examples_per_user=99, local_epochs=1, batch_size=8)
    assert sorted(listed(whole, 0, [0])[0][0][0][2]) == sorted(history(whole.platforms, 0)[1:])


def test_platforms_without_examples():
    sampler = sampler_of(platforms_of([[1, 1], []]), n_negatives=0)
    assert sampler.n_examples().tolist() == [0, 0]
    assert list(sampler.steps(0, [0, 1])) == []


# Around them ---------------------------------------------------------------------------------


def test_periods():
    cpu = torch.device("cpu")
    assert check_periods(None, 3, cpu).tolist() == [1, 1, 1]
    found = check_periods([1, 3, 2], 3, cpu)
    assert (found.tolist(), found.dtype) == ([1, 3, 2], torch.int64)
    assert check_periods(np.array([1, 2], dtype=np.uint8), 2, cpu).tolist() == [1, 2]
    for wrong in ([2, 3, 2], [1, 2], [0, 1, 1], [1.0, 2.0, 1.0], ["1", "1", "1"], 1, [[1, 1, 1]]):
        with pytest.raises(ValueError, match=r"each of the 3 platforms .* 1 for the fastest"):
            check_periods(wrong, 3, cpu)


def adapters_of(*values):
    return {
        "q.lora_A": torch.tensor(values).reshape(-1, 1, 1).repeat(1, 2, 3),
        "q.lora_B": torch.tensor(values).reshape(-1, 1, 1).repeat(1, 4, 2),
    }


def test_platforms_go_on_from_their_adapters_and_new_ones_from_the_mean():
    previous = {
        "adapters_": {name: value.numpy() for name, value in adapters_of(1.0, 3.0, 8.0).items()},
        "platform_ids_": np.array(["c", "a", "b"]),
    }
    platforms = replace(platforms_of([[1]] * 4), ids=np.array(["a", "b", "c", "d"]))
    found = adapters_before(adapters_of(*[0.0] * 4), platforms, previous)
    for name, value in adapters_of(3.0, 8.0, 1.0, 4.0).items():
        torch.testing.assert_close(found[name], value)
    wrong = {name: value[:, :, :1] for name, value in adapters_of(*[0.0] * 4).items()}
    with pytest.raises(ValueError, match="lora_rank or target_modules changed"):
        adapters_before(wrong, platforms, previous)


def state_of(*values):
    state = FELLRecState.start(adapters_of(*values), aggregation="fellrec")
    return replace(state, best_value=torch.tensor([0.25, 0.5], dtype=torch.float64))


def test_the_mean_of_the_best():
    state = state_of(0.0, 0.0)
    assert mean_of_best(state, np.array([3, 1])) == pytest.approx((3 * 0.25 + 0.5) / 4)
    assert mean_of_best(state, np.array([3, 0])) == 0.25
    unknown = replace(state, best_value=torch.tensor([0.25, -np.inf], dtype=torch.float64))
    assert mean_of_best(unknown, np.array([1, 1])) == 0.25
    assert mean_of_best(state, np.array([0, 0])) == 0.0


def test_equal_adapters_read_the_catalogue_once():
    class Model:
        n_read = 0

        def encode_items(self, own):
            self.n_read += 1
            return own["q.lora_A"].flatten()

    model, tables = Model(), []
    for value in (1.0, 2.0, 1.0, 2.0, 2.0):
        found = items_under(model, adapters_of(value), tables)
        assert found.unique().tolist() == [value]
    assert model.n_read == 2


@pytest.mark.parametrize("generates", [False, True])
def test_the_intercept_makes_probabilities_those_of_the_data(generates):
    platforms = platforms_of([lengths_drawn(30), lengths_drawn(20, 1)])
    rng = np.random.default_rng(0)
    counts = platforms.counts(platforms.lengths)
    attributes = {
        "generates_": generates,
        "shared_popularity_": False,
        "user_platforms_": platforms.of_user,
        "crowd_factors_": np.zeros(4, dtype=np.float32),
        "item_factors_": np.zeros((N_ITEMS, 4), dtype=np.float32),
        "user_factors_": rng.standard_normal((50, 4)).astype(np.float32),
        "item_vectors_": rng.standard_normal((2, N_ITEMS, 4)).astype(np.float32),
        "item_counts_": np.concatenate([counts, counts.sum(0)[None]]),
        "popularity_weight_": 0.5,
        "temperature_": 0.5,
    }
    intercept = find_intercept(attributes, platforms)
    scores = [
        Ranking(0.5, 0.5, generated=generates, shared_popularity=False)
        .scores(
            torch.from_numpy(attributes["user_factors_"][[user]]),
            torch.from_numpy(
                attributes["item_vectors_"][0 if generates else platforms.of_user[user]]
            ),
            torch.from_numpy(counts[platforms.of_user[user]]).float(),
        )
        .numpy()
        for user in range(50)
    ]
    probability = 1 / (1 + np.exp(-(np.concatenate(scores).astype(float) + intercept)))
    assert probability.mean() == pytest.approx(len(platforms.items) / (50 * N_ITEMS), rel=1e-6)
    attributes["user_factors_"][0] = np.nan
    with pytest.raises(FloatingPointError, match="Lower learning_rate"):
        find_intercept(attributes, platforms)
