import itertools
import math

import pytest
import torch

from fedrecsk.methods.dynamic_balance import (
    Uploads,
    ages,
    balance,
    due_clients,
    fedavg_weights,
    heating,
    local_weights,
    loss_shares,
    mix,
    mixing_weights,
    similarity,
)
from tests.reference import dynamic_balance_reference as reference

N_CLIENTS, RANK = 5, 3
# (out, in) of the adapted modules.
MODULES = {"layer.0.query": (6, 7), "layer.0.value": (4, 7), "layer.1.query": (6, 5)}
ON = pytest.mark.parametrize("on", ["params", "update", "product"])
EXPONENT = pytest.mark.parametrize("exponent", ["t+1/beta", "(t+1)/beta"])
AGGREGATION = pytest.mark.parametrize("aggregation", ["fellrec", "fedavg", "local"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_adapters(n=N_CLIENTS, seed=0):
    """Adapters of n clients that have nothing in common."""
    adapters = {}
    for number, (module, (n_out, n_in)) in enumerate(MODULES.items()):
        adapters[f"{module}.lora_A"] = normal(n, RANK, n_in, seed=1000 * seed + 2 * number)
        adapters[f"{module}.lora_B"] = normal(n, n_out, RANK, seed=1000 * seed + 2 * number + 1)
    return adapters


def common_start(n=N_CLIENTS):
    """The same A for all, and B zero."""
    first = {name: value[:1].expand(n, -1, -1) for name, value in random_adapters(seed=9).items()}
    return {
        name: value.clone() if name.endswith("A") else torch.zeros_like(value)
        for name, value in first.items()
    }


def trained_a_little(n=N_CLIENTS, seed=0):
    """What clients hold after a few steps from the common start."""
    noise = random_adapters(n, seed)
    return {name: value + 0.1 * noise[name] for name, value in common_start(n).items()}


def of_client(adapters, c):
    return {name: value[c] for name, value in adapters.items()}


def each_client(adapters):
    return [of_client(adapters, c) for c in range(len(next(iter(adapters.values()))))]


def assert_same(found, clients):
    """Stacked adapters are those of a list of clients."""
    assert all(list(found) == list(client) for client in clients)
    for name, value in found.items():
        expected = torch.stack([client[name] for client in clients])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def losses_of(n=N_CLIENTS):
    """Losses near enough to each other that all have a share, in no order."""
    return 1.0 + 0.05 * normal(n, seed=77)


EXAMPLES = torch.tensor([40, 10, 25, 5, 20])


# Similarity --------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [False, True], ids=["apart", "near"])
@ON
def test_similarity_as_defined(on, near):
    start = common_start()
    adapters = trained_a_little() if near else random_adapters()
    expected = reference.similarity(each_client(adapters), each_client(start), on)
    found = similarity(adapters, start, on)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-6)


@ON
def test_similarity_is_symmetric_with_ones(on):
    found = similarity(trained_a_little(), common_start(), on)
    assert torch.equal(found, found.T)
    assert (found.diagonal() == 1).all()
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_a_common_start_hides_the_differences_of_the_parameters():
    """What the options are for: updates that point anywhere look alike as parameters."""
    adapters, start = trained_a_little(), common_start()
    off = ~torch.eye(N_CLIENTS, dtype=torch.bool)
    means = {on: float(similarity(adapters, start, on)[off].mean()) for on in ("params", "update")}
    assert means["params"] > 0.95
    assert means["update"] == pytest.approx(0.5, abs=0.05)


@ON
def test_equal_and_opposite(on):
    start = common_start(3)
    change = {name: 0.1 * value for name, value in random_adapters(1).items()}
    adapters = {
        name: torch.cat([value[:1] + change[name], value[:1] + change[name], value[:1]])
        for name, value in start.items()
    }
    if on == "update":
        adapters = {
            name: torch.cat([value[:2], start[name][:1] - change[name]])
            for name, value in adapters.items()
        }
    else:
        for name, value in adapters.items():
            sign = -1.0 if on == "params" or name.endswith("B") else 1.0
            adapters[name] = torch.cat([value[:2], sign * value[:1]])
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    torch.testing.assert_close(similarity(adapters, start, on), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("on", ["update", "product"])
def test_clients_that_have_not_moved_have_no_direction(on):
    start, adapters = common_start(4), trained_a_little(4)
    for name, value in adapters.items():
        value[1:3] = start[name][1:3]
    found = similarity(adapters, start, on)
    expected = torch.full((4, 4), 0.5).double()
    expected.fill_diagonal_(1.0)
    expected[0, 3] = expected[3, 0] = found[0, 3]
    assert torch.equal(found, expected)
    assert found[0, 3] != 0.5


def test_the_product_does_not_see_how_it_is_factored():
    adapters, start = random_adapters(), common_start()
    turned = {}
    for number, module in enumerate(MODULES):
        turn = normal(N_CLIENTS, RANK, RANK, seed=50 + number) + 3 * torch.eye(RANK)
        turned[f"{module}.lora_A"] = torch.linalg.inv(turn) @ adapters[f"{module}.lora_A"]
        turned[f"{module}.lora_B"] = adapters[f"{module}.lora_B"] @ turn
    before, after = (similarity(each, start, "product") for each in (adapters, turned))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    params = [similarity(each, start, "params") for each in (adapters, turned)]
    assert (params[0] - params[1]).abs().max() > 0.01


def test_products_are_not_formed():
    """One product would have 2^36 numbers; the cosine of u v' and w v' is that of u and w."""
    width = 2**18
    adapters = {
        "q.lora_B": torch.stack([torch.ones(width, 1), torch.ones(width, 1)]),
        "q.lora_A": torch.ones(2, 1, width),
    }
    adapters["q.lora_B"][1, : width // 4] = -1.0
    expected = torch.tensor([[1.0, 0.75], [0.75, 1.0]]).double()
    torch.testing.assert_close(similarity(adapters, adapters, "product"), expected)


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_products_need_both_factors(missing):
    adapters = random_adapters()
    del adapters[f"layer.0.value.{missing}"]
    with pytest.raises(ValueError, match=rf"'layer.0.value' has no 'layer.0.value.{missing}'"):
        similarity(adapters, adapters, "product")
    assert similarity(adapters, adapters, "params").shape == (N_CLIENTS, N_CLIENTS)


def test_products_need_adapters_by_name():
    with pytest.raises(ValueError, match=r"no 'w.lora_A' and no 'w.lora_B'"):
        similarity({"w": torch.ones(2, 3)}, {"w": torch.ones(2, 3)}, "product")


# Heating -----------------------------------------------------------------------------------


def test_shares_as_defined():
    losses = losses_of()
    weights = [math.exp(float(loss) / 0.05) for loss in losses]
    expected = torch.tensor([weight / sum(weights) for weight in weights]).double()
    torch.testing.assert_close(loss_shares(losses), expected, rtol=1e-6, atol=0)
    flat = loss_shares(losses, temperature=1e6)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / N_CLIENTS), rtol=1e-5, atol=0)


def test_losses_that_are_not_known_have_no_share():
    known = torch.tensor([1.0, 1.1])
    losses = torch.tensor([1.0, -math.inf, 1.1])
    assert torch.equal(loss_shares(losses)[[0, 2]], loss_shares(known))
    assert loss_shares(losses)[1] == 0
    assert torch.equal(heating(losses, 0)[[0, 2]], heating(known, 0))
    assert heating(losses, 0)[1] == 1
    nobody = torch.full((2,), -math.inf)
    assert loss_shares(nobody).tolist() == [0.0, 0.0]
    assert heating(nobody, 0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("t", range(4))
@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(0.7, 5.0, 0.05), (0.3, 2.0, 0.5)])
@EXPONENT
def test_heat_as_defined(exponent, alpha, beta, temperature, t):
    losses = losses_of()
    options = {"alpha": alpha, "beta": beta, "temperature": temperature, "exponent": exponent}
    found = heating(losses, t, **options)
    assert found.dtype == torch.float64
    expected = reference.heat(losses.tolist(), t, **options)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_both_exponents_agree_in_the_first_round_alone():
    first, second = (
        [heating(losses_of(), t, exponent=exponent) for t in range(3)]
        for exponent in ("t+1/beta", "(t+1)/beta")
    )
    assert torch.equal(first[0], second[0])
    for t in (1, 2):
        assert (first[t] > second[t]).all()


@EXPONENT
def test_heat_rises_with_the_rounds(exponent):
    losses = losses_of()
    for t in range(30):
        before, after = (
            heating(losses, t, exponent=exponent),
            heating(losses, t + 1, exponent=exponent),
        )
        assert ((after > before) | (before > 1 - 1e-15)).all()


@pytest.mark.parametrize("t", range(2))
@EXPONENT
def test_the_weaker_a_client_the_less_it_takes(exponent, t):
    losses = losses_of()
    order = losses.argsort()
    heat = heating(losses, t, exponent=exponent)
    assert (heat[order].diff() < 0).all()
    taken = 1 - mixing_weights(torch.full((N_CLIENTS,) * 2, 0.5), heat).diagonal()
    assert (taken[order].diff() < 0).all()


def test_heat_stays_above_its_floor():
    """A client that has all of the trouble never warms up."""
    for t in (0, 1, 100):
        heat = heating(torch.tensor([1.0, 9.0]), t)
        assert heat[0] == 1
        assert heat[1] == pytest.approx(math.tanh(0.7), abs=1e-12)
    assert (heating(losses_of(), 0) > math.tanh(0.7)).all()


@pytest.mark.parametrize("t", [0, 10, 10**9])
@EXPONENT
def test_heat_does_not_overflow(exponent, t):
    heat = heating(torch.tensor([0.0, 1e4, 3e37]), t, temperature=1e-3, exponent=exponent)
    assert heat[:2].tolist() == [1.0, 1.0]
    assert heat[2] == pytest.approx(math.tanh(0.7), abs=1e-15)
    if t > 10:
        assert heating(torch.ones(4), t, exponent=exponent).tolist() == [1.0] * 4


@pytest.mark.parametrize("t", [0, 10**9])
def test_no_heat_at_all(t):
    assert heating(torch.tensor([0.0, 1e4, 1.0]), t, alpha=0.0).tolist() == [0.0, 0.0, 0.0]


# Weights and mixing ------------------------------------------------------------------------


def test_weights_as_defined():
    alike = similarity(random_adapters(), common_start(), "params")
    heat = heating(losses_of(), 0)
    age = torch.tensor([0.0, 3.0, math.inf, 1.0, 0.0])
    factors = [0.0 if math.isinf(a) else (1 + a) ** -0.7 for a in age.tolist()]
    expected = [
        reference.row(c, alike[c].tolist(), float(heat[c]), factors) for c in range(N_CLIENTS)
    ]
    found = mixing_weights(alike, heat, staleness=age, staleness_exponent=0.7)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("age", [None, torch.tensor([0.0, 7.0, math.inf, 1.0, 0.0])])
def test_rows_sum_to_one(age):
    alike = similarity(random_adapters(), common_start(), "params")
    heated = mixing_weights(alike, heating(losses_of(), 0), staleness=age)
    averaged = [fedavg_weights(EXAMPLES, by, staleness=age) for by in ("examples", "clients")]
    for weights in (heated, *averaged, local_weights(N_CLIENTS)):
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(N_CLIENTS).double())


def test_the_own_adapter_counts_one():
    alike = torch.tensor([[1.0, 0.2, 0.6], [0.2, 1.0, 0.4], [0.6, 0.4, 1.0]])
    weights = mixing_weights(alike, torch.tensor([1.0, 0.5, 0.0]))
    for c, (total, others) in enumerate([(1.8, [0.2, 0.6]), (1.3, [0.1, 0.2]), (1.0, [0.0, 0.0])]):
        others.insert(c, 1.0)
        expected = torch.tensor(others).double() / total
        torch.testing.assert_close(weights[c], expected, rtol=1e-6, atol=1e-9)


def test_uploads_of_this_round_are_not_aged_to_the_bit():
    alike, heat = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)), torch.ones(4)
    new = torch.zeros(4)
    assert torch.equal(mixing_weights(alike, heat), mixing_weights(alike, heat, staleness=new))
    counts = torch.tensor([3, 1, 4, 1])
    assert torch.equal(fedavg_weights(counts), fedavg_weights(counts, staleness=new))


def test_old_uploads_count_less():
    even, heat = torch.ones(3, 3), torch.ones(3)
    for weigh in (
        lambda age: mixing_weights(even, heat, staleness=age),
        lambda age: fedavg_weights(torch.ones(3), staleness=age),
    ):
        seen = [float(weigh(torch.tensor([0.0, float(age), 0.0]))[0, 1]) for age in range(9)]
        assert all(newer > older for newer, older in itertools.pairwise(seen))
        assert seen[3] == pytest.approx(0.5 / 2.5)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_uploads_never_made_count_nothing(exponent):
    age = torch.tensor([0.0, math.inf, 4.0])
    options = {"staleness": age, "staleness_exponent": exponent}
    heated = mixing_weights(torch.ones(3, 3), torch.ones(3), **options)
    assert heated[0, 1] == 0
    assert heated[0, 2] > 0
    assert fedavg_weights(torch.ones(3), **options)[:, 1].tolist() == [0.0, 0.0, 0.0]
    if exponent == 0:
        assert heated[0].tolist() == [0.5, 0.0, 0.5]


def test_fedavg_by_examples_and_by_clients():
    by_examples = fedavg_weights(EXAMPLES)
    torch.testing.assert_close(by_examples[3], EXAMPLES.double() / 100)
    assert torch.equal(by_examples, by_examples[:1].expand(N_CLIENTS, -1))
    assert (fedavg_weights(EXAMPLES, "clients") == 1 / N_CLIENTS).all()


def test_fedavg_of_nobody_leaves_all_alone():
    assert torch.equal(fedavg_weights(torch.zeros(3)), local_weights(3))
    never = torch.full((3,), math.inf)
    assert torch.equal(fedavg_weights(torch.ones(3), staleness=never), local_weights(3))


def test_mixing_as_defined():
    adapters = random_adapters()
    weights = torch.rand(2, N_CLIENTS, generator=torch.Generator().manual_seed(5))
    expected = [reference.mixed(each_client(adapters), row.tolist()) for row in weights]
    found = mix(adapters, weights)
    assert found["layer.0.query.lora_B"].shape == (2, 6, RANK)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixing_keeps_types_and_clients_that_are_alone(dtype):
    adapters = {name: value.to(dtype) for name, value in random_adapters().items()}
    mixed = mix(adapters, local_weights(N_CLIENTS))
    assert all(value.dtype == dtype for value in mixed.values())
    assert_equal(mixed, adapters)


def test_equal_rows_make_equal_clients():
    adapters = random_adapters()
    mixed = mix(adapters, fedavg_weights(EXAMPLES))
    for name, value in mixed.items():
        mean = (EXAMPLES[:, None, None] / 100 * adapters[name]).sum(0)
        torch.testing.assert_close(value, mean.expand_as(value), rtol=1e-6, atol=1e-6)
        assert torch.equal(value, value[:1].expand_as(value))


# A round -----------------------------------------------------------------------------------


def reference_weights(adapters, start, losses, t, on, *, use_similarity=True, use_heating=True):
    alike = reference.similarity(each_client(adapters), each_client(start), on)
    heat = reference.heat(
        losses.tolist(), t, alpha=0.7, beta=5.0, temperature=0.05, exponent="t+1/beta"
    )
    n = len(alike)
    return [
        reference.row(
            c,
            alike[c] if use_similarity else [1.0] * n,
            heat[c] if use_heating else 1.0,
            [1.0] * n,
        )
        for c in range(n)
    ]


@pytest.mark.parametrize("use_heating", [True, False], ids=["heating", "warm"])
@pytest.mark.parametrize("use_similarity", [True, False], ids=["alike", "even"])
@pytest.mark.parametrize("t", [0, 1])
@ON
def test_a_round_as_defined(on, t, use_similarity, use_heating):
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    options = {"use_similarity": use_similarity, "use_heating": use_heating}
    found, weights, _ = balance(adapters, start, losses, EXAMPLES, t, similarity_on=on, **options)
    expected = reference_weights(adapters, start, losses, t, on, **options)
    torch.testing.assert_close(weights, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert_same(found, reference.simultaneous(each_client(adapters), expected))


def test_settings_of_the_heating_arrive():
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    usual = {"alpha": 0.7, "beta": 5.0, "temperature": 0.05, "exponent": "t+1/beta"}
    changes = {"alpha": 0.2, "beta": 1.5, "temperature": 0.4, "exponent": "(t+1)/beta"}
    for name, value in changes.items():
        options = {**usual, name: value}
        _, weights, diagnostics = balance(adapters, start, losses, EXAMPLES, 1, **options)
        heat = heating(losses, 1, **options)
        assert diagnostics["heat"] == heat.tolist()
        alike = similarity(adapters, start, "params")
        assert torch.equal(weights, mixing_weights(alike, heat))


def test_baselines_are_other_weights():
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    for by in ("examples", "clients"):
        found, weights, diagnostics = balance(
            adapters, start, losses, EXAMPLES, 0, aggregation="fedavg", client_weights=by
        )
        assert torch.equal(weights, fedavg_weights(EXAMPLES, by))
        assert_equal(found, mix(adapters, weights))
        assert diagnostics["heat"] == [1.0] * N_CLIENTS
    found, weights, _ = balance(adapters, start, losses, EXAMPLES, 0, aggregation="local")
    assert torch.equal(weights, local_weights(N_CLIENTS))
    assert_equal(found, adapters)


def test_without_similarity_and_heating_it_is_fedavg_by_clients():
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    plain, _, _ = balance(
        adapters, start, losses, EXAMPLES, 0, use_similarity=False, use_heating=False
    )
    average, _, _ = balance(
        adapters, start, losses, EXAMPLES, 0, aggregation="fedavg", client_weights="clients"
    )
    assert_equal(plain, average)


def permuted(adapters, order):
    return {name: value[order] for name, value in adapters.items()}


@AGGREGATION
@ON
def test_the_order_of_the_clients_does_not_matter(on, aggregation):
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    start = {name: value + 0.01 * random_adapters(seed=4)[name] for name, value in start.items()}
    options = {"similarity_on": on, "aggregation": aggregation}
    found, weights, diagnostics = balance(adapters, start, losses, EXAMPLES, 0, **options)
    order = torch.tensor([3, 0, 4, 2, 1])
    again, others, same = balance(
        permuted(adapters, order),
        permuted(start, order),
        losses[order],
        EXAMPLES[order],
        0,
        **options,
    )
    torch.testing.assert_close(others, weights[order][:, order], rtol=1e-12, atol=1e-12)
    for name, value in found.items():
        torch.testing.assert_close(again[name], value[order], rtol=1e-6, atol=1e-7)
    assert same["similarity"] == pytest.approx(diagnostics["similarity"])
    assert same["heat"] == pytest.approx([diagnostics["heat"][c] for c in order])


def test_overwriting_in_place_depends_on_the_order():
    """The scripts' way: the same clients in another order become other clients."""
    adapters, start, losses = random_adapters(), common_start(), losses_of()
    weights = reference_weights(adapters, start, losses, 0, "params")
    order = [3, 0, 4, 2, 1]
    shuffled = [[weights[c][j] for j in order] for c in order]
    clients = each_client(adapters)

    def gap(way):
        usual, other = way(clients, weights), way([clients[c] for c in order], shuffled)
        names = list(adapters)
        difference = [
            (usual[c][name] - other[place][name]).norm()
            for place, c in enumerate(order)
            for name in names
        ]
        size = [client[name].norm() for client in usual for name in names]
        return float(torch.stack(difference).norm() / torch.stack(size).norm())

    assert gap(reference.simultaneous) < 1e-6
    assert gap(reference.in_place) > 0.05
    # The first client mixes what all have trained in both ways, and the last what nobody has.
    ours, theirs = reference.simultaneous(clients, weights), reference.in_place(clients, weights)
    for name in adapters:
        assert torch.equal(ours[0][name], theirs[0][name])
        assert not torch.allclose(ours[-1][name], theirs[-1][name], atol=1e-2)


@AGGREGATION
@ON
def test_identical_clients_stay_as_they_are(on, aggregation):
    one = {name: value[:1] for name, value in trained_a_little().items()}
    adapters = {name: value.expand(N_CLIENTS, -1, -1) for name, value in one.items()}
    mixed, _, diagnostics = balance(
        adapters,
        common_start(),
        losses_of(),
        EXAMPLES,
        0,
        similarity_on=on,
        aggregation=aggregation,
    )
    assert_equal(mixed, adapters)
    assert diagnostics["similarity"] == pytest.approx(1.0)


@AGGREGATION
@ON
def test_one_client_stays_as_it_is(on, aggregation):
    adapters = trained_a_little(1)
    mixed, weights, diagnostics = balance(
        adapters,
        common_start(1),
        torch.tensor([0.4]),
        torch.tensor([7]),
        0,
        similarity_on=on,
        aggregation=aggregation,
    )
    assert_equal(mixed, adapters)
    assert weights.tolist() == [[1.0]]
    assert math.isnan(diagnostics["similarity"])


def test_diagnostics():
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    _, weights, diagnostics = balance(adapters, start, losses, EXAMPLES, 0, similarity_on="update")
    alike = similarity(adapters, start, "update")
    pairs = [alike[c, j] for c, j in itertools.permutations(range(N_CLIENTS), 2)]
    assert diagnostics["similarity"] == pytest.approx(float(sum(pairs)) / len(pairs))
    assert diagnostics["heat"] == heating(losses, 0).tolist()
    assert diagnostics["own_weight"] == [float(weights[c, c]) for c in range(N_CLIENTS)]


@AGGREGATION
def test_arguments_stay(aggregation):
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    uploads = Uploads.none(start)
    due = torch.tensor([True, False, True, True, False])
    given = [adapters, start, {"losses": losses, "n": EXAMPLES, "due": due}, uploads.adapters]
    given += [{"moments": uploads.moments, "losses": uploads.losses}]
    copies = [{name: value.clone() for name, value in each.items()} for each in given]
    balance(adapters, start, losses, EXAMPLES, 3, aggregation=aggregation, due=due, uploads=uploads)
    for tensors, same in zip(given, copies, strict=True):
        assert_equal(tensors, same)


# Clients that take their own time ----------------------------------------------------------


def test_who_is_due():
    periods = torch.tensor([1, 2, 3])
    due = [due_clients(t, periods).tolist() for t in range(6)]
    assert [round_ for round_, each in enumerate(due) if each[0]] == [0, 1, 2, 3, 4, 5]
    assert [round_ for round_, each in enumerate(due) if each[1]] == [1, 3, 5]
    assert [round_ for round_, each in enumerate(due) if each[2]] == [2, 5]


@pytest.mark.parametrize("period", [0, -2])
def test_periods_below_one(period):
    with pytest.raises(ValueError, match=rf"periods are \[1, {period}\]"):
        due_clients(0, torch.tensor([1, period]))


def test_uploads_keep_what_was_sent_last():
    start, first, second = common_start(3), random_adapters(3, seed=1), random_adapters(3, seed=2)
    uploads = Uploads.none(start)
    assert uploads.moments.tolist() == [-1, -1, -1]
    assert torch.isneginf(uploads.losses).all()
    assert_equal(uploads.adapters, start)
    one = uploads.updated(
        first, start, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False]), 0
    )
    two = one.updated(
        second, first, torch.tensor([4.0, 5.0, 6.0]), torch.tensor([True, False, False]), 1
    )
    assert two.moments.tolist() == [1, 0, -1]
    assert two.losses.tolist() == [4.0, 2.0, -math.inf]
    assert ages(4, two.moments).tolist() == [3.0, 4.0, math.inf]
    for name in start:
        assert torch.equal(
            two.adapters[name], torch.stack([second[name][0], first[name][1], start[name][2]])
        )
        assert torch.equal(
            two.starts[name], torch.stack([first[name][0], start[name][1], start[name][2]])
        )
    assert uploads.moments.tolist() == [-1, -1, -1]


def tuition(n=N_CLIENTS):
    """A target for each client, and the way there: (targets, stacked training, one client's)."""
    targets = trained_a_little(n, seed=6)

    def train_all(adapters):
        trained = {name: value + 0.4 * (targets[name] - value) for name, value in adapters.items()}
        losses = sum((adapters[name] - targets[name]).square().mean((1, 2)) for name in targets)
        return trained, 10 * losses

    def train_one(c, client):
        target = of_client(targets, c)
        trained = {name: value + 0.4 * (target[name] - value) for name, value in client.items()}
        losses = [float((client[name] - target[name]).square().mean()) for name in client]
        return trained, 10 * sum(losses)

    return train_all, train_one


def run(periods, n_rounds, *, synchronous=False, **options):
    """Rounds as an estimator would run them; training stops at whoever is not due."""
    train_all, _ = tuition(len(periods))
    adapters = common_start(len(periods))
    uploads = Uploads.none(adapters)
    history = []
    for t in range(n_rounds):
        trained, losses = train_all(adapters)
        if synchronous:
            clock = {}
        else:
            due = due_clients(t, periods)
            uploads = uploads.updated(trained, adapters, losses, due, t)
            clock = {"due": due, "uploads": uploads}
        n_examples = EXAMPLES[: len(periods)]
        adapters, weights, diagnostics = balance(
            trained, adapters, losses, n_examples, t, **clock, **options
        )
        history.append((weights, diagnostics))
    return adapters, history


@AGGREGATION
@ON
def test_all_periods_one_is_synchronous_to_the_bit(on, aggregation):
    options = {"similarity_on": on, "aggregation": aggregation}
    periods = torch.ones(N_CLIENTS, dtype=torch.int64)
    one, history = run(periods, 4, **options)
    other, expected = run(periods, 4, synchronous=True, **options)
    assert_equal(one, other)
    for (weights, logs), (same, same_logs) in zip(history, expected, strict=True):
        assert torch.equal(weights, same)
        assert logs == same_logs


@AGGREGATION
@pytest.mark.parametrize("staleness_exponent", [0.0, 0.5])
@ON
def test_clocks_as_defined(on, staleness_exponent, aggregation):
    periods = torch.tensor([1, 2, 3, 1, 4])
    _, train_one = tuition()
    options = {"aggregation": aggregation, "staleness_exponent": staleness_exponent}
    found, _ = run(periods, 7, similarity_on=on, **options)
    expected = reference.run_with_clock(
        of_client(common_start(), 0),
        train_one,
        periods.tolist(),
        7,
        n_examples=EXAMPLES.tolist(),
        on=on,
        **options,
    )
    assert_same(found, expected)


def test_a_client_of_period_three():
    """It keeps the start for two rounds, and is mixed in from its first upload on, by age."""
    periods = torch.tensor([1, 3])
    start = common_start(2)
    for n_rounds in (1, 2):
        adapters, history = run(periods, n_rounds)
        assert_equal(of_client(adapters, 1), of_client(start, 1))
        weights, diagnostics = history[-1]
        # Nobody to mix with, although the other adapter is there.
        assert weights.tolist() == [[1.0, 0.0], [0.0, 1.0]]
        assert math.isnan(diagnostics["similarity"])
    adapters, history = run(periods, 5, use_similarity=False, use_heating=False)
    assert not torch.equal(adapters["layer.0.query.lora_A"][1], start["layer.0.query.lora_A"][1])
    taken = [float(weights[0, 1]) for weights, _ in history]
    factors = [1.0, 2**-0.5, 3**-0.5]
    assert taken == pytest.approx([0.0, 0.0, *(factor / (1 + factor) for factor in factors)])
    own = [diagnostics["own_weight"][1] for _, diagnostics in history]
    assert own == [1.0, 1.0, 0.5, 1.0, 1.0]


def test_clients_that_are_not_due_are_not_read():
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    due = torch.tensor([True, True, False, True, False])
    expected, weights, _ = balance(adapters, start, losses, EXAMPLES, 0, due=due)
    for value in adapters.values():
        value[~due] = math.nan
    losses[~due] = math.nan
    found, same, _ = balance(adapters, start, losses, EXAMPLES, 0, due=due)
    assert torch.equal(same, weights)
    assert_equal(found, expected)
    assert_equal(permuted(found, ~due), permuted(start, ~due))


@AGGREGATION
def test_nobody_is_due(aggregation):
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    nobody = torch.zeros(N_CLIENTS, dtype=torch.bool)
    found, weights, diagnostics = balance(
        adapters, start, losses, EXAMPLES, 0, due=nobody, aggregation=aggregation
    )
    assert_equal(found, start)
    assert torch.equal(weights, local_weights(N_CLIENTS))
    assert diagnostics["heat"] == diagnostics["own_weight"] == [1.0] * N_CLIENTS


def test_this_rounds_uploads_may_be_in_already():
    adapters, start, losses = trained_a_little(), common_start(), losses_of()
    due = torch.tensor([True, False, True, True, False])
    before = Uploads.none(start)
    everybody = torch.ones(N_CLIENTS, dtype=torch.bool)
    before = before.updated(random_adapters(seed=3), start, losses + 0.1, everybody, 0)
    after = before.updated(adapters, start, losses, due, 1)
    (one, weights, logs), (other, same, same_logs) = (
        balance(
            adapters, start, losses, EXAMPLES, 1, due=due, uploads=uploads, similarity_on="update"
        )
        for uploads in (before, after)
    )
    assert_equal(one, other)
    assert torch.equal(weights, same)
    assert logs == same_logs
