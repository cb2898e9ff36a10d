import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fedrecsk.engine.streams import Streams
from fedrecsk.models.head import (
    Joint,
    backward,
    flat_head,
    forward,
    gradients,
    head_layers,
    head_of,
    head_width,
    init_head,
    item_part,
    n_weights,
    stacked_heads,
    user_part,
)
from tests.reference.ncf_reference import logit


def test_first_heads():
    head = init_head(16, hidden=(8, 4), streams=Streams(5))
    shapes = {name: tuple(value.shape) for name, value in head.items()}
    assert list(shapes.items()) == [
        ("weight_0", (32, 8)),
        ("bias_0", (8,)),
        ("weight_1", (8, 4)),
        ("bias_1", (4,)),
        ("weight_2", (4, 1)),
        ("bias_2", (1,)),
    ]
    again, other = (init_head(16, hidden=(8, 4), streams=Streams(seed)) for seed in (5, 6))
    for name, value in head.items():
        assert torch.equal(value, again[name])
        if name.startswith("bias"):
            assert not value.any()
            continue
        assert not torch.equal(value, other[name])
    wide = init_head(100, hidden=(50,), streams=Streams(0))["weight_0"]
    bound = np.sqrt(6 / 200)
    assert 0.99 * bound < wide.abs().max() <= bound
    assert wide.std() == pytest.approx(bound / np.sqrt(3), rel=0.03)
    assert abs(wide.mean()) < 0.03 * bound


def test_several_first_heads_are_independent_of_each_other():
    only = init_head(4, streams=Streams(0))
    heads = [init_head(4, key=key, streams=Streams(0)) for key in (0, 4, 4, 8)]
    weights = [head["weight_0"] for head in (only, *heads)]
    equal = [(a, b) for a in range(5) for b in range(a) if torch.equal(weights[a], weights[b])]
    assert equal == [(3, 2)]


@pytest.mark.parametrize(("width", "hidden"), [(3, (8, 8)), (5, (4,)), (2, ())])
def test_a_flat_head_holds_the_head(width, hidden):
    head = init_head(width, hidden=hidden, streams=Streams(0))
    flat = flat_head(head)
    assert flat.shape == (n_weights(head),)
    assert head_width(head) == width
    again = head_of(flat, width, hidden)
    assert again.keys() == head.keys()
    assert all(torch.equal(again[name], head[name]) for name in head)
    assert flat_head({}).shape == (0,)
    assert head_of(torch.zeros(0), width) == {}


# Nested heads -----------------------------------------------------------------------------

WIDTHS, HIDDEN = (1, 3, 5), ((4, 2), (3, 3), (2, 5))


def nested(hidden=HIDDEN, n_clients=4):
    """Heads of ascending widths, flat heads of several clients, and these as stacks."""
    heads = [
        init_head(w, hidden=h, key=w, streams=Streams(0))
        for w, h in zip(WIDTHS, hidden, strict=True)
    ]
    n_flat = sum(map(n_weights, heads))
    flat = torch.randn(n_clients, n_flat, generator=torch.Generator().manual_seed(1)).double()
    return heads, flat, stacked_heads(flat, heads)


def logits_of_each(user, item, stacks, client, **bias):
    return torch.stack(
        [logit(user, item, {n: v[client] for n, v in head.items()}, **bias) for head in stacks]
    )


@pytest.mark.parametrize("hidden", [HIDDEN, ((2,), (3,), (4,)), ((), (), ())])
def test_a_joint_network_gives_the_logits_of_each_head(hidden):
    heads, flat, stacks = nested(hidden)
    joint = Joint.of(flat, heads)
    joint.load()
    vectors = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(2)).double()
    users, items = vectors
    first = user_part(users, joint.layers) + item_part(items, joint.layers, 5)
    found = forward(first, joint.layers)[1]
    assert found.shape == (4, 6, 3)
    for c in range(4):
        for k in range(6):
            expected = logits_of_each(users[c, k], items[c, k], stacks, c, item_bias=False)
            torch.testing.assert_close(found[c, k], expected)


def test_a_joint_network_takes_in_and_gives_back_flat_heads():
    heads, flat, _ = nested()
    start = flat.clone()
    joint = Joint.of(flat, heads)
    joint.load()
    n_used = sum(int((value != 0).sum()) for layer in joint.layers for value in layer)
    assert n_used == flat.numel()
    for layer in joint.last(2).layers:
        for value in layer:
            value.mul_(2.0)
    assert torch.equal(flat, start)
    joint.last(3).store()
    assert torch.equal(flat[:3], start[:3])
    assert torch.equal(flat[3:], 2.0 * start[3:])
    joint.store()
    assert torch.equal(flat[:2], start[:2])
    assert torch.equal(flat[2:], 2.0 * start[2:])


def test_the_layers_of_one_head_are_views():
    head = init_head(3, streams=Streams(0))
    flat = flat_head(head).repeat(2, 1)
    joint = Joint.of(flat, [head])
    assert joint.blocks == []
    joint.layers[0][0].zero_()
    assert not flat[:, :48].any()
    assert flat[:, 48:].any()


@pytest.mark.parametrize("shared", [False, True], ids=["own users", "shared user"])
@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("n_heads", [1, 3])
def test_gradients_are_those_of_autograd(n_heads, item_bias, shared):
    heads, flat, _ = nested()
    heads = heads[-n_heads:]
    flat = flat[:, -sum(map(n_weights, heads)) :].contiguous()
    generator = torch.Generator().manual_seed(3)
    user = torch.randn(4, 1 if shared else 6, 5, generator=generator).double()
    item = torch.randn(4, 6, 5 + item_bias, generator=generator).double()
    label = (torch.rand(4, 6, generator=generator) < 0.4).double()
    weight = torch.rand(4, 6, generator=generator).double()
    weight[1, 4:] = 0.0
    grad = torch.zeros_like(flat)
    network, into = Joint.of(flat, heads), Joint.of(grad, heads)
    network.load()
    found = gradients(
        user, item, network.layers, label, weight, item_bias=item_bias, into=into.layers
    )
    into.store()

    leaves = [value.clone().requires_grad_(True) for value in (user, item, flat)]
    u, v, own = leaves
    stacks = stacked_heads(own, heads)
    scores = torch.stack(
        [
            logits_of_each(u[c, 0 if shared else k], v[c, k], stacks, c, item_bias=item_bias)
            for c in range(4)
            for k in range(6)
        ]
    ).reshape(4, 6, n_heads)
    loss = binary_cross_entropy_with_logits(
        scores, label[:, :, None].expand_as(scores), reduction="none"
    )
    expected = torch.autograd.grad((loss.sum(2) * weight).sum(), leaves)
    for ours, theirs in zip((found.user, found.item, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found.logit, scores[:, :, -1].detach())


def test_one_head_of_any_shape_goes_forward_and_back():
    head = {name: value.double() for name, value in init_head(2, streams=Streams(1)).items()}
    layers = head_layers(head)
    first = torch.randn(7, 8, generator=torch.Generator().manual_seed(0)).double()
    leaf = first.clone().requires_grad_(True)
    signal = leaf
    for weight, bias in layers[1:]:
        signal = torch.relu(signal) @ weight + bias
    hidden, found = forward(first, layers)
    torch.testing.assert_close(found, signal.detach())
    error = torch.linspace(-1, 1, 7).double()[:, None]
    (expected,) = torch.autograd.grad((signal * error).sum(), [leaf])
    torch.testing.assert_close(backward(error, hidden, layers)[0], expected)
