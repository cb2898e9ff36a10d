import math

import numpy as np
import pytest
import torch

from fedrecsk.methods import meta_network
from fedrecsk.methods.meta_network import CANDIDATES, MIN_DELEGATES, predict_updates
from tests.reference.meta_network_reference import ridge, train_network

KINDS = ["mlp", "linear", "mean", "cluster"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predict(kind, before, deltas, query, **changes):
    arguments = {"cv": 5, "gate": True, "n_clusters": 3, "seed": 1, **changes}
    return predict_updates(kind, before, deltas, query, **arguments)


def assert_nothing(prediction, reason):
    assert prediction.deltas is None
    assert prediction.candidate.startswith("none: ")
    assert reason in prediction.candidate


# When nothing is predicted ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_delegates_predict_nothing(kind):
    before, deltas = normal(MIN_DELEGATES, 3), torch.ones(MIN_DELEGATES, 3)
    few = predict(kind, before[:-1], deltas[:-1], normal(6, 3))
    assert_nothing(few, "4 delegates")
    assert math.isnan(few.r2)
    assert math.isnan(few.cosine)
    assert predict(kind, before, deltas, normal(6, 3), gate=False).deltas is not None


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_to_predict_for(kind):
    assert_nothing(predict(kind, normal(9, 3), torch.ones(9, 3), normal(0, 3)), "nobody")


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_that_are_zero_or_not_finite_predict_nothing(kind, value):
    deltas = torch.zeros(12, 3)
    deltas[4, 1] = value
    for gate in (False, True):
        prediction = predict(kind, normal(12, 3), deltas, normal(6, 3), gate=gate)
        assert_nothing(prediction, "zero or not finite")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_pure_noise_is_gated(kind, seed):
    before, noise = normal(40, 4, seed=seed), normal(40, 4, seed=100 + seed)
    noise -= noise.mean(0)
    gated = predict(kind, before, noise, normal(9, 4), seed=seed)
    assert_nothing(gated, "no candidate beats zero")
    assert gated.r2 <= 0.0
    literal = predict(kind, before, noise, normal(9, 4), seed=seed, gate=False)
    assert literal.r2 == gated.r2
    assert literal.deltas.shape == (9, 4)
    assert torch.isfinite(literal.deltas).all()


# What is learned --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "cluster", "linear"])
def test_a_constant_update_is_recovered(kind):
    constant = torch.tensor([0.3, -2.0, 0.0, 1e-3])
    found = predict(kind, normal(30, 4), constant.repeat(30, 1), normal(7, 4, seed=1))
    assert found.r2 == pytest.approx(1.0, abs=1e-4)
    assert found.cosine == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(found.deltas, constant.repeat(7, 1), rtol=1e-3, atol=1e-3)


def test_linear_recovers_a_linear_map():
    before, query = 0.1 * normal(60, 4) + 3.0, 0.1 * normal(20, 4, seed=1) + 3.0
    weights, offset = normal(4, 4, seed=2), normal(4, seed=3)
    found = predict("linear", before, before @ weights + offset, query)
    assert found.candidate == "linear(0.001)"
    assert found.r2 > 0.999
    truth = query @ weights + offset
    assert (found.deltas - truth).square().mean() < 1e-3 * truth.var()


def test_linear_takes_more_regularisation_where_the_noise_asks_for_it():
    before = normal(25, 12)
    deltas = normal(25, 12, seed=1) + 0.4 * before + 1.0
    assert predict("linear", before, deltas, normal(5, 12)).candidate == "linear(10)"


def test_mlp_learns_a_smooth_map_that_is_not_linear():
    before, query = normal(150, 4), normal(80, 4, seed=1)
    mixing = normal(4, 4, seed=2)

    def smooth(x):
        return torch.cos(x @ mixing)

    found = predict("mlp", before, smooth(before), query)
    linear = predict("linear", before, smooth(before), query)
    assert found.r2 > 0.5
    assert found.r2 > linear.r2 + 0.2
    truth = smooth(query)
    assert (found.deltas - truth).square().sum() < 0.5 * truth.square().sum()


def test_cluster_learns_the_mean_update_of_each_cluster():
    centres = torch.tensor([[9.0, 0.0], [-9.0, 0.0], [0.0, 9.0]])
    label, asked = torch.arange(30) % 3, torch.tensor([2, 0, 1, 1])
    updates = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.0, 4.0]])
    noise = 0.1 * normal(30, 2, seed=2)
    deltas = updates[label] + noise
    found = predict("cluster", centres[label] + normal(30, 2), deltas, centres[asked])
    assert found.r2 > 0.98
    expected = torch.stack([deltas[label == c].mean(0) for c in asked])
    torch.testing.assert_close(found.deltas, expected, rtol=1e-4, atol=1e-4)
    assert predict("mean", centres[label], deltas, centres[asked]).r2 < 0.5


def test_a_cluster_without_delegates_does_not_change():
    before = torch.cat([normal(10, 2) + 50.0, normal(10, 2) - 50.0])
    query = torch.tensor([[50.0, 50.0], [50.0, -50.0], [-50.0, 50.0], [-50.0, -50.0]])
    query = torch.cat([query.repeat(5, 1)])
    deltas = torch.ones(20, 2)
    found = predict("cluster", before, deltas, query, n_clusters=4)
    expected = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(5)
    torch.testing.assert_close(found.deltas, expected[:, None].expand(-1, 2))


@pytest.mark.parametrize("n", [20, 200])
def test_one_cluster_is_the_mean(n):
    before, deltas, query = normal(n, 3), normal(n, 3, seed=1) + 1.0, normal(6, 3, seed=2)
    one = predict("cluster", before, deltas, query, n_clusters=1)
    mean = predict("mean", before, deltas, query)
    assert torch.equal(one.deltas, mean.deltas)
    assert (one.r2, one.cosine) == (mean.r2, mean.cosine)


# Cross-validation against loops: with as many folds as delegates, nobody is dealt at random -----


def leave_one_out(fit_predict, x, y):
    """R2 against predicting zero and mean cosine of predictions from the others."""
    n = len(x)
    others = [[j for j in range(n) if j != i] for i in range(n)]
    predicted = np.stack([fit_predict(x[o], y[o], x[i : i + 1])[0] for i, o in enumerate(others)])
    r2 = 1.0 - ((predicted - y) ** 2).sum() / (y**2).sum()
    norms = np.linalg.norm(predicted, axis=1) * np.linalg.norm(y, axis=1)
    return r2, ((predicted * y).sum(1) / norms).mean()


def standardised(before, deltas, query):
    """The predictors' inputs and outputs: standard scores, and updates of unit mean square."""
    x, y, q = (array.double().numpy() for array in (before, deltas, query))
    centre, spread, scale = x.mean(0), x.std(0, ddof=1), np.sqrt((y**2).mean())
    return (x - centre) / spread, y / scale, (q - centre) / spread, scale


@pytest.fixture
def task():
    before, query = normal(9, 3) * torch.tensor([1.0, 5.0, 0.2]) + 2.0, normal(4, 3, seed=1)
    return before, 0.05 * (before @ normal(3, 3, seed=2) + normal(9, 3, seed=3)), query


def test_mean_and_its_score_by_hand(task):
    before, deltas, query = task[0], task[1] + 0.5, task[2]
    found = predict("mean", before, deltas, query, cv=len(before))
    x, y, q, scale = standardised(before, deltas, query)
    r2, cosine = leave_one_out(lambda x, y, q: y.mean(0, keepdims=True), x, y)
    assert (found.r2, found.cosine) == pytest.approx((r2, cosine), rel=1e-5)
    assert found.candidate == "mean(0)"
    expected = np.tile(y.mean(0) * scale, (len(q), 1))
    np.testing.assert_allclose(found.deltas, expected, rtol=1e-5, atol=1e-6)


def test_linear_and_its_choice_by_hand(task):
    found = predict("linear", *task, cv=len(task[0]))
    x, y, q, scale = standardised(*task)
    scores = {
        strength: leave_one_out(lambda x, y, q, s=strength: ridge(x, y, s, q), x, y)
        for strength in CANDIDATES["linear"]
    }
    best = max(scores, key=lambda strength: scores[strength][0])
    assert found.candidate == f"linear({best:g})"
    assert (found.r2, found.cosine) == pytest.approx(scores[best], rel=1e-4)
    np.testing.assert_allclose(found.deltas, ridge(x, y, best, q) * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stacked_networks_and_their_choice_are_those_trained_one_by_one(task, dtype):
    seed = 5
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-8}[dtype]
    found = predict("mlp", *(array.to(dtype) for array in task), cv=len(task[0]), seed=seed)
    x, y, q, scale = standardised(*task)

    def fit_predict(x, y, q, decay):
        x, y, q = (torch.from_numpy(array).to(dtype) for array in (x, y, q))
        return train_network(x, y, decay, seed)(q).detach().double().numpy()

    scores = {
        decay: leave_one_out(lambda x, y, q, s=decay: fit_predict(x, y, q, s), x, y)
        for decay in CANDIDATES["mlp"]
    }
    best = max(scores, key=lambda decay: scores[decay][0])
    assert found.candidate == f"mlp({best:g})"
    assert (found.r2, found.cosine) == pytest.approx(scores[best], rel=tolerance)
    expected = fit_predict(x, y, q, best) * scale
    np.testing.assert_allclose(found.deltas, expected, rtol=tolerance, atol=tolerance)


def test_the_gradients_of_a_stack_of_networks_are_those_of_autograd():
    """Weights of examples and of the penalty differ in the stack; more inputs than outputs."""
    x, y, query = (
        normal(*shape, seed=s).double() for s, shape in enumerate([(9, 5), (9, 2), (4, 5)])
    )
    weight = torch.ones(3, 9, dtype=torch.float64)
    weight[1, [0, 4, 5]] = weight[2, 1:8] = 0.0
    strength = torch.tensor([1e-4, 0.3, 0.1], dtype=torch.float64)
    found = meta_network._fit_mlp(x, y, weight, query, strength, seed=3)
    for answer, counted, decay in zip(found, weight > 0, strength.tolist(), strict=True):
        network = train_network(x[counted], y[counted], decay, seed=3)
        torch.testing.assert_close(answer, network(query).detach(), rtol=1e-8, atol=1e-9)


def test_many_delegates_are_represented_by_a_random_sample(monkeypatch):
    monkeypatch.setattr(meta_network, "MAX_DELEGATES", 20)
    n = 50
    # Each delegate moves along an axis of its own, so the mean update tells who is in it.
    means = [
        predict("mean", normal(n, n), torch.eye(n), normal(2, n), gate=False, seed=seed).deltas
        for seed in (1, 1, 2)
    ]
    for mean in means:
        torch.testing.assert_close(mean[0].sort().values, torch.tensor([0.0] * 30 + [0.05] * 20))
        assert torch.equal(mean[0], mean[1])
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


def test_folds_are_even_and_shuffled():
    folds = meta_network._folds(23, 5, seed=0)
    assert sorted(np.bincount(folds)) == [4, 4, 5, 5, 5]
    assert folds.tolist() != sorted(folds.tolist())
    assert not torch.equal(folds, meta_network._folds(23, 5, seed=1))


# Invariances ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_scale_with_the_updates(kind):
    before, query = normal(30, 3), normal(8, 3, seed=1)
    deltas = before.roll(1, 1) + 0.5
    small, large = (predict(kind, before, c * deltas, query, gate=False) for c in (1e-3, 1e3))
    assert small.r2 == pytest.approx(large.r2, rel=1e-4)
    torch.testing.assert_close(1e6 * small.deltas, large.deltas, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_prediction_and_arguments_stay(kind):
    arguments = normal(30, 3), normal(30, 3, seed=1) + 1.0, normal(8, 3, seed=2)
    copies = [tensor.clone() for tensor in arguments]
    first, again = (predict(kind, *arguments, gate=False) for _ in range(2))
    assert torch.equal(first.deltas, again.deltas)
    assert first.r2 == again.r2
    assert all(map(torch.equal, arguments, copies))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_spread_are_no_reason_to_fail(kind):
    before, query = normal(12, 3), normal(5, 3, seed=1)
    before[:, 1] = query[:, 1] = 0.0
    found = predict(kind, before, before + 1.0, query, gate=False)
    assert torch.isfinite(found.deltas).all()


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_an_input_that_all_delegates_share_throws_nobody_far(kind):
    """It can differ for the others, who then get what they would get without it, or nearly."""
    before, query = normal(40, 3), normal(6, 3, seed=1)
    deltas = before.roll(1, 1) + 0.5
    constant, other = torch.full((40, 1), 0.7), torch.full((6, 1), 1.7)
    found, as_delegates = (
        predict(kind, torch.cat([before, constant], 1), deltas, torch.cat([query, last], 1))
        for last in (other, torch.full((6, 1), 0.7))
    )
    largest = as_delegates.deltas.abs().max()
    assert (found.deltas - as_delegates.deltas).abs().max() < largest
    if kind == "linear":
        torch.testing.assert_close(found.deltas, as_delegates.deltas, rtol=1e-3, atol=1e-3)


def test_inputs_may_be_wider_than_updates():
    """What else is known of a user helps where the update depends on it and nothing else."""
    before, query = normal(60, 3), normal(8, 3, seed=1)
    known, asked = normal(60, 2, seed=2), normal(8, 2, seed=3)
    deltas = torch.stack([known[:, 0], -known[:, 0], known[:, 1]], 1)
    found = predict("linear", torch.cat([before, known], 1), deltas, torch.cat([query, asked], 1))
    truth = torch.stack([asked[:, 0], -asked[:, 0], asked[:, 1]], 1)
    torch.testing.assert_close(found.deltas, truth, rtol=0.0, atol=0.02)
    assert predict("linear", before, deltas, query).r2 < 0.2


def test_there_are_no_more_clusters_than_vectors():
    labels = meta_network.cluster_labels(normal(4, 3), 10, seed=0)
    assert sorted(labels.tolist()) == [0, 1, 2, 3]
    assert predict("cluster", normal(6, 3), torch.ones(6, 3), normal(2, 3), n_clusters=50).r2 <= 1.0


def test_cluster_labels_find_groups_and_depend_on_the_seed_alone():
    centres = 20.0 * torch.eye(3)
    group = torch.arange(30) % 3
    labels = meta_network.cluster_labels(centres[group] + normal(30, 3), 3, seed=2**40)
    assert len({(int(g), int(label)) for g, label in zip(group, labels, strict=True)}) == 3
    again = meta_network.cluster_labels(centres[group] + normal(30, 3), 3, seed=2**40)
    assert labels.tolist() == again.tolist()
