import copy
import re
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn

from fedrecsk.models.stacked_lora import (
    StackedLoRA,
    flat,
    mean,
    n_parameters,
    select,
    unflat,
)
from tests.reference.lora_reference import MODELS, VOCABULARY, peft_model, tiny_model

# PEFT still calls transformers' attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANK, ALPHA, CLIENTS = 4, 6.0, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_adapters(lora, n_clients=CLIENTS, seed=1):
    """Adapters with a random B as well, another one for every client."""
    drawn = lora.init(n_clients, generator(seed))
    return {
        name: 0.3 * torch.randn(value.shape, generator=generator(seed + place))
        for place, (name, value) in enumerate(drawn.items())
    }


def texts(n_rows, length=6, seed=2):
    return torch.randint(3, VOCABULARY, (n_rows, length), generator=generator(seed))


def outputs(model, input_ids):
    output = model(input_ids=input_ids)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def stacked(kind="bert", **parameters):
    model = tiny_model(kind)
    return model, StackedLoRA(model, rank=RANK, alpha=ALPHA, **parameters)


def linear_model(n_in=8, n_out=5, **parameters):
    """A model that is one linear layer, called "only"."""
    model = nn.Sequential()
    model.add_module("only", nn.Linear(n_in, n_out))
    return model, StackedLoRA(model, target_modules=["only"], rank=2, alpha=2, **parameters)


# What the model computes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_stack_gives_what_separate_peft_models_give(kind):
    model, lora = stacked(kind)
    adapters, rows = random_adapters(lora), texts(2 * CLIENTS)
    with lora.using(adapters) as same:
        assert same is model
        together = outputs(model, rows)
    for client, block in enumerate(rows.split(2)):
        own = {name: value[client] for name, value in adapters.items()}
        alone = peft_model(
            tiny_model(kind),
            own,
            lora.targets,
            rank=RANK,
            alpha=ALPHA,
            fan_in_fan_out=lora.fan_in_fan_out,
        )
        expected = outputs(alone, block)
        torch.testing.assert_close(
            together[2 * client : 2 * client + 2], expected, rtol=1e-5, atol=1e-5
        )
        assert (expected - outputs(tiny_model(kind), block)).abs().max() > 1e-2
    assert lora.fan_in_fan_out == (kind == "gpt2")


def test_gradients_are_the_stack_of_the_clients_gradients():
    model, lora = stacked()
    adapters, rows = random_adapters(lora), texts(2 * CLIENTS)
    leaves = {name: value.clone().requires_grad_(True) for name, value in adapters.items()}
    with lora.using(leaves):
        outputs(model, rows).square().sum().backward()
    assert not any(value.grad is not None for value in model.parameters())
    for client, block in enumerate(rows.split(2)):
        own = {name: value[client] for name, value in adapters.items()}
        alone = peft_model(tiny_model("bert"), own, lora.targets, rank=RANK, alpha=ALPHA)
        outputs(alone, block).square().sum().backward()
        names = dict(alone.named_parameters())
        for name, value in leaves.items():
            expected = names[f"base_model.model.{name}.default.weight"].grad
            torch.testing.assert_close(value.grad[client], expected, rtol=1e-4, atol=1e-4)


def test_the_frozen_layer_meets_all_rows_in_one_call():
    model, lora = linear_model()
    seen = []
    model.only.register_forward_pre_hook(lambda layer, args: seen.append(tuple(args[0].shape)))
    with lora.using(random_adapters(lora)):
        model(torch.ones(12, 7, 8))
    assert seen == [(12, 7, 8)]


@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 8), (6, 2, 3, 8), (0, 4, 8)])
def test_rows_of_any_shape(shape):
    model, lora = linear_model()
    adapters = random_adapters(lora)
    x = torch.randn(shape, generator=generator())
    A, B = adapters["only.lora_A"], adapters["only.lora_B"]
    with lora.using(adapters):
        y = model(x)
        torch.testing.assert_close(model.only(input=x), y)
    plain = model(x)
    for row in range(len(x)):
        client = row // 2
        product = B[client] @ A[client]  # alpha / rank = 1
        torch.testing.assert_close(y[row], plain[row] + x[row] @ product.T)


def test_adapters_act_inside_of_their_block_only():
    model, lora = stacked()
    rows = texts(CLIENTS)
    plain = outputs(tiny_model("bert"), rows)
    first, second = random_adapters(lora), random_adapters(lora, seed=9)
    assert torch.equal(outputs(model, rows), plain)
    with lora.using(first):
        adapted = outputs(model, rows)
        with lora.using(second):
            assert not torch.equal(outputs(model, rows), adapted)
        with lora.using(None):
            assert torch.equal(outputs(model, rows), plain)
        assert torch.equal(outputs(model, rows), adapted)
    assert not torch.equal(adapted, plain)
    with pytest.raises(KeyError), lora.using(first):
        raise KeyError
    assert torch.equal(outputs(model, rows), plain)


def test_the_model_keeps_its_names_and_gets_its_layers_back():
    model, lora = stacked()
    assert model.state_dict().keys() == tiny_model("bert").state_dict().keys()
    assert not any(value.requires_grad for value in model.parameters())
    rows = texts(CLIENTS)
    plain = outputs(model, rows)
    assert lora.restore() is model
    with lora.using(random_adapters(lora)):
        assert torch.equal(outputs(model, rows), plain)
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_client_takes_any_number_of_rows_as_beam_search_does(kind):
    model, lora = stacked(kind)
    adapters, rows = random_adapters(lora, 1), texts(3)
    own = {name: value[0] for name, value in adapters.items()}
    alone = peft_model(
        tiny_model(kind),
        own,
        lora.targets,
        rank=RANK,
        alpha=ALPHA,
        fan_in_fan_out=lora.fan_in_fan_out,
    )
    search = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    mask = torch.ones_like(rows)
    with lora.using(adapters):
        found = model.generate(input_ids=rows, attention_mask=mask, **search)
    expected = alone.generate(input_ids=rows, attention_mask=mask, **search)
    assert torch.equal(found, expected)
    plain = model.generate(input_ids=rows, attention_mask=mask, **search)
    assert not torch.equal(found, plain)


def test_float32_adapters_of_a_bfloat16_model():
    model, lora = stacked("llama")
    adapters, rows = random_adapters(lora), texts(CLIENTS)
    with lora.using(adapters):
        expected = outputs(model, rows)
    model.to(torch.bfloat16)
    leaves = {name: value.clone().requires_grad_(True) for name, value in adapters.items()}
    with lora.using(leaves):
        y = outputs(model, rows)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().mean() < 0.05 * expected.abs().mean()
    for value in leaves.values():
        assert value.grad.dtype == torch.float32
        assert value.grad.abs().max() > 0


# Beginning ---------------------------------------------------------------------------------


def test_first_adapters():
    _, lora = stacked(target_modules=["query", "output.dense"])
    adapters = lora.init(CLIENTS, generator())
    layers = [f"encoder.layer.{n}" for n in (0, 1)]
    paths = [
        f"{layer}.{name}"
        for layer in layers
        for name in ("attention.self.query", "attention.output.dense", "output.dense")
    ]
    assert lora.targets == tuple(paths)
    assert list(adapters) == [f"{path}.lora_{part}" for path in paths for part in "AB"]
    again, other = lora.init(1, generator()), lora.init(1, generator(1))
    for name, value in adapters.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, again[name].expand_as(value))
        if name.endswith("lora_B"):
            assert not value.any()
            continue
        n_in = 32 if re.search(r"\d\.output", name) else 16
        assert value.shape == (CLIENTS, RANK, n_in)
        assert not torch.equal(value[0], other[name][0])
        assert 0.8 * n_in**-0.5 < value.abs().max() <= n_in**-0.5
    # Copies, not views of one: a step of one client must not move the others.
    adapters[f"{paths[0]}.lora_A"][0] += 1
    assert torch.equal(adapters[f"{paths[0]}.lora_A"][1], again[f"{paths[0]}.lora_A"][0])


def test_the_model_starts_as_it_is():
    model, lora = stacked()
    rows = texts(CLIENTS)
    plain = outputs(model, rows)
    with lora.using(lora.init(CLIENTS, generator())):
        assert torch.equal(outputs(model, rows), plain)


# Dropout -----------------------------------------------------------------------------------


def dropped(lora, model, generators, shape, calls=1):
    """Which entries of the input are dropped, read off a layer that gives back its input."""
    n_in = shape[-1]
    n_clients = len(generators)
    adapters = {
        "only.lora_A": torch.eye(n_in).repeat(n_clients, 1, 1),
        "only.lora_B": torch.eye(n_in).repeat(n_clients, 1, 1),
    }
    with torch.no_grad():
        model.only.weight.zero_()
        model.only.bias.zero_()
        with lora.using(adapters, dropout=generators):
            return [model(torch.ones(shape)) for _ in range(calls)]


def mirror(n_in, rate):
    model = nn.Sequential()
    model.add_module("only", nn.Linear(n_in, n_in))
    return model, StackedLoRA(model, target_modules=["only"], rank=n_in, alpha=n_in, dropout=rate)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_is_even(rate):
    n_clients, B, L, n_in = 2, 40, 25, 13
    model, lora = mirror(n_in, rate)
    (y,) = dropped(lora, model, [generator(0), generator(1)], (n_clients * B, L, n_in))
    kept = y > 0
    torch.testing.assert_close(
        y[kept], torch.full((kept.sum(),), 1 / (1 - rate)), rtol=1e-4, atol=0
    )
    n = kept.numel()
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(kept.float().mean() - (1 - rate)) < 4 * spread / n**0.5
    for dim in ((1, 2), (0, 2), (0, 1)):
        share = kept.float().mean(dim)
        limit = 5 * spread / (n / len(share)) ** 0.5
        assert (share - (1 - rate)).abs().max() < limit
    # Neighbours along every axis, and the same places of two clients, are independent.
    centred = kept.float() - (1 - rate)
    clients = centred.view(n_clients, B, L, n_in)
    pairs = [
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
        (centred[..., 4:], centred[..., :-4]),
        (clients[0], clients[1]),
    ]
    for a, b in pairs:
        assert abs((a * b).mean()) < 4 * spread**2 / a.numel() ** 0.5


def test_masks_are_the_hash_that_they_are_said_to_be():
    """The finaliser of SplitMix64 with Python's integers, modulo 2**64, one entry at a time."""
    rate, calls, shape = 0.25, 2, (2, 3, 6)
    model, lora = mirror(shape[-1], rate)
    found = dropped(lora, model, [generator(4)], shape, calls=calls)
    limit = 2**64
    draw = torch.randint(2**62, (1,), generator=generator(4)).item()
    for call in range(calls):
        start = draw + zlib.crc32(f"only {call}".encode()) * 2**31
        for row, position, feature in np.ndindex(shape):
            counter = (row * 2**20 + position) * 2**20 + feature // 4
            z = (start + counter * 0x9E3779B97F4A7C15) % limit
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % limit
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % limit
            z ^= z >> 31
            bits = int.from_bytes(
                z.to_bytes(8, sys.byteorder)[2 * (feature % 4) :][:2], sys.byteorder
            )
            signed = bits - 65536 if bits >= 32768 else bits
            kept = found[call][row, position, feature] > 0
            assert kept == (signed >= rate * 65536 - 32768)


def test_masks_change_with_the_call_the_layer_the_client_and_the_draw():
    n_in = 64
    shape = (2, 8, n_in)
    model, lora = mirror(n_in, 0.5)
    generators = [generator(5), generator(5)]
    first, second = dropped(lora, model, generators, shape, calls=2)
    assert torch.equal(first[0], first[1])  # equal draws give equal masks
    assert 0.3 < (first != second).float().mean() < 0.7
    (third,) = dropped(lora, model, generators, shape)  # drawn on from the same generators
    assert 0.3 < (first != third).float().mean() < 0.7
    (again,) = dropped(lora, model, [generator(5), generator(6)], shape)
    assert torch.equal(again[0], first[0])
    assert 0.3 < (again[1] != first[1]).float().mean() < 0.7
    other = nn.Sequential()
    other.add_module("first", nn.Sequential(model.only))
    nested = StackedLoRA(other, target_modules=["0"], rank=n_in, alpha=n_in, dropout=0.5)
    eye = torch.eye(n_in)[None]
    adapters = {"first.0.lora_A": eye, "first.0.lora_B": eye}
    with nested.using(adapters, dropout=[generator(5)]):
        elsewhere = other(torch.ones(shape[1:])[None])[0]
    assert 0.3 < (elsewhere != first[0]).float().mean() < 0.7


@pytest.mark.parametrize("kind", MODELS)
def test_masks_do_not_depend_on_who_shares_the_batch(kind):
    model, lora = stacked(kind, dropout=0.3)
    adapters, rows = random_adapters(lora), texts(2 * CLIENTS)
    with lora.using(adapters, dropout=[generator(seed) for seed in range(CLIENTS)]):
        together = [outputs(model, rows) for _ in range(2)]
    for client, block in enumerate(rows.split(2)):
        with lora.using(select(adapters, [client]), dropout=[generator(client)]):
            alone = [outputs(model, block) for _ in range(2)]
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(
                whole[2 * client : 2 * client + 2], part, rtol=1e-5, atol=1e-5
            )
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_masks_do_not_depend_on_padding():
    """Texts padded further on the right, and further rows, because of another client."""
    model, lora = mirror(10, 0.5)
    (short,) = dropped(lora, model, [generator(3)], (2, 4, 10))
    (long,) = dropped(lora, model, [generator(3), generator(4)], (6, 9, 10))
    assert torch.equal(long[:2, :4], short)


def test_dropout_leaves_the_frozen_layer_alone_and_is_off_without_generators():
    model, lora = stacked(dropout=0.5)
    rows = texts(CLIENTS)
    generators = [generator(seed) for seed in range(CLIENTS)]
    plain = outputs(model, rows)
    with lora.using(lora.init(CLIENTS, generator()), dropout=generators):
        assert torch.equal(outputs(model, rows), plain)
    adapters = random_adapters(lora)
    without = StackedLoRA(tiny_model("bert"), rank=RANK, alpha=ALPHA)
    with lora.using(adapters), without.using(adapters):
        evaluated = outputs(model, rows)
        assert torch.equal(evaluated, outputs(without.model, rows))
    with lora.using(adapters, dropout=generators):
        assert not torch.equal(outputs(model, rows), evaluated)
    with without.using(adapters, dropout=generators):
        assert torch.equal(outputs(without.model, rows), evaluated)


def test_generators_must_be_one_a_client():
    _, lora = stacked(dropout=0.5)
    with (
        pytest.raises(ValueError, match="2 generators for the dropout of 3 clients"),
        lora.using(random_adapters(lora), dropout=[generator(), generator()]),
    ):
        pass


# Which layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("target_modules", ["auto", "all-linear"])
@pytest.mark.parametrize("kind", MODELS)
def test_layers_are_chosen_as_by_peft(kind, target_modules):
    _, lora = stacked(kind, target_modules=target_modules)
    config = LoraConfig(
        r=RANK,
        target_modules=None if target_modules == "auto" else target_modules,
        fan_in_fan_out=kind == "gpt2",
    )
    wrapped = get_peft_model(copy.deepcopy(lora.model), config)
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in wrapped.named_parameters()
        if "lora_A" in name
    }
    assert set(lora.targets) == expected
    assert len(lora.targets) == len(expected)


@pytest.mark.parametrize(
    "model_type",
    sorted(set(PEFT_TARGETS) - {"blip-2", "gemma4"}),  # images as well as text
)
def test_known_model_types_get_the_layers_of_peft(model_type):
    wanted = PEFT_TARGETS[model_type]
    model = nn.Module()
    model.config = SimpleNamespace(model_type=model_type)
    for name in [*wanted, "dense", "fc", "out", "lm_head"]:
        model.add_module(name, nn.Linear(2, 2))
    lora = StackedLoRA(model, rank=1, alpha=1)
    assert set(lora.targets) == set(wanted)


def test_unknown_model_types_get_the_layers_that_make_queries_and_values():
    model = nn.Module()
    model.attn = nn.Module()
    for name in ("q", "k", "v", "o"):
        model.attn.add_module(name, nn.Linear(2, 2))
    model.q = nn.Embedding(2, 2)
    assert StackedLoRA(model, rank=1, alpha=1).targets == ("attn.q", "attn.v")


def test_a_layer_is_known_by_its_features_and_not_by_its_weight():
    """As with quantised layers, whose weight is packed."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 6, 4
            self.register_buffer("weight", torch.randint(255, (12, 1), dtype=torch.uint8))

        def forward(self, x):
            return torch.zeros(*x.shape[:-1], self.out_features, dtype=torch.bfloat16)

    model = nn.Sequential(Packed())
    lora = StackedLoRA(model, target_modules=["0"], rank=2, alpha=4)
    adapters = random_adapters(lora, 1)
    assert {tuple(value.shape) for value in adapters.values()} == {(1, 2, 6), (1, 4, 2)}
    x = torch.randn(3, 6, generator=generator())
    with lora.using(adapters):
        y = model(x)
    A, B = adapters["0.lora_A"][0], adapters["0.lora_B"][0]
    torch.testing.assert_close(y, (2 * x @ A.T @ B.T).bfloat16(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["query", "q_proj"], r"names 'q_proj', which is no linear.*called dense, key, query, val"),
        (["uery"], "names 'uery', which is no linear layer of BertModel"),
        (["word_embeddings"], "names 'word_embeddings', which is no linear layer"),
        ([], "target_modules is empty. Its linear layers are called dense"),
        ("query", r"give 'auto', 'all-linear' or a list of names such as \['query'\]"),
    ],
)
def test_names_that_are_not_there(target_modules, message):
    with pytest.raises(ValueError, match=message):
        stacked(target_modules=target_modules)


def test_models_without_a_layer_to_choose():
    with pytest.raises(ValueError, match=r"'auto' finds no layer.*are called 0; the first is '0'"):
        StackedLoRA(nn.Sequential(nn.Linear(2, 2)), rank=1, alpha=1)
    with pytest.raises(ValueError, match="It has no linear layers"):
        StackedLoRA(nn.Sequential(nn.Tanh()), target_modules="all-linear", rank=1, alpha=1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank": 0, "alpha": 1}, "at least 1; got 0"),
        ({"rank": 1, "alpha": 0}, "alpha must be positive; got 0"),
        ({"rank": 1, "alpha": 1, "dropout": 1.0}, r"in \[0, 1\); got 1.0"),
    ],
)
def test_numbers_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        StackedLoRA(nn.Linear(2, 2), target_modules=["only"], **parameters)


def test_adapters_of_other_layers():
    model, lora = linear_model()
    good = random_adapters(lora)
    A, B = good["only.lora_A"], good["only.lora_B"]
    for wrong, message in [
        ({"only.lora_A": A}, "1 missing, such as 'only.lora_B'"),
        ({**good, "x.lora_A": A}, "1 unknown, such as 'x.lora_A'"),
        (
            {"only.lora_A": A, "only.lora_B": B[:2]},
            r"lora_B has the shape \(2, 5, 2\); expected \(3",
        ),
        (
            {"only.lora_A": A[:, :1], "only.lora_B": B},
            r"\(3, 1, 8\); expected \(3, 2, 8\).* rank 2",
        ),
    ]:
        with pytest.raises(ValueError, match=message), lora.using(wrong):
            pass
    with (
        pytest.raises(
            ValueError, match="batch of 7 rows is not made of equal blocks for 3 clients"
        ),
        lora.using(good),
    ):
        model(torch.ones(7, 8))


# Adapters as such --------------------------------------------------------------------------


def test_clients_are_selected_with_their_gradients():
    _, lora = linear_model()
    adapters = random_adapters(lora)
    for clients in ([2, 0, 2], torch.tensor([2, 0, 2])):
        chosen = select(adapters, clients)
        assert list(chosen) == list(adapters)
        for name, value in chosen.items():
            for place, client in enumerate([2, 0, 2]):
                assert torch.equal(value[place], adapters[name][client])
    leaves = {name: value.requires_grad_(True) for name, value in adapters.items()}
    sum(value.sum() for value in select(leaves, [2, 0, 2]).values()).backward()
    for value in leaves.values():
        assert value.grad.flatten(1)[:, 0].tolist() == [1, 0, 2]


def test_mean_of_adapters():
    _, lora = linear_model()
    adapters = random_adapters(lora)
    for weights, shares in [
        (None, [1 / 3] * 3),
        ([1, 0, 3], [0.25, 0, 0.75]),
        (torch.tensor([10, 20, 70]), [0.1, 0.2, 0.7]),
    ]:
        middle = mean(adapters, weights)
        for name, value in adapters.items():
            expected = sum(share * own for share, own in zip(shares, value, strict=True))
            torch.testing.assert_close(middle[name], expected[None])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"shape \(2,\) for the adapters of 3 clients"),
        ([1, -1, 1], r"non-negative.*got \[1.0, -1.0, 1.0\]"),
        ([0, 0, 0], "one positive"),
        ([1, float("nan"), 1], "non-negative"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(ValueError, match=message):
        mean({"w": torch.zeros(3, 2)}, weights)


def test_flat_adapters_hold_the_adapters():
    _, lora = stacked()
    adapters = random_adapters(lora)
    vectors = flat(adapters)
    assert vectors.shape == (CLIENTS, n_parameters(adapters))
    assert n_parameters(adapters) == len(lora.targets) * 2 * RANK * 16
    again = unflat(vectors, adapters)
    assert list(again) == list(adapters)
    for name, value in adapters.items():
        assert torch.equal(again[name], value)
    for client in range(CLIENTS):
        own = torch.cat([value[client].reshape(-1) for value in adapters.values()])
        assert torch.equal(vectors[client], own)
    again[next(iter(again))][1] += 1
    assert not torch.equal(vectors, flat(adapters))  # they are views
