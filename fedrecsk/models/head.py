"""The network of neural collaborative filtering: one head, a stack of them, or nested ones.

    logit(u, v) = MLP([u ; v]),   MLP: 2d -> 8 -> 8 -> 1 with ReLU.

A head is a dict of ``weight_0, bias_0, weight_1, ...`` with weights (in, out); those of trained
clients carry a leading client axis. Its width is d, half of what its first layer takes in.

Heads of ascending widths N_1 < ... < N_m are nested: head j reads the first N_j columns of both
vectors. `Joint` makes one network with m logits of them, each layer's weights as blocks of one
matrix and zeros elsewhere. Products with a few columns are slow, so one with these zeros takes less
time than m without, and it adds up the gradients of all heads by the vectors they share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedrecsk.engine.local import Params
from fedrecsk.engine.streams import Streams
from fedrecsk.models.ego_graph import StarsInRows

Head = dict[str, Tensor]
# Weights (..., in, out) and biases (..., out) in order.
Layers = list[tuple[Tensor, Tensor]]


def init_head(
    n_factors: int,
    *,
    hidden: Sequence[int] = (8, 8),
    key: int | None = None,
    streams: Streams,
    device: torch.device | None = None,
) -> Head:
    """Draw the server's first head.

    Weights are uniform in ±sqrt(6 / inputs), which keeps the scale of signals through ReLU;
    biases are zero.

    Parameters
    ----------
    n_factors : int
        Of a user vector, d.
    hidden : sequence of int, default=(8, 8)
        Units of each hidden layer.
    key : int, optional
        Of this head among several, such as its width: heads with different keys are independent.
        Default: the only head.
    streams : Streams
        The stream ``"ncf_head"`` is used.
    device : torch.device, optional
        Default: CPU. The numbers are the same on every device.

    Returns
    -------
    dict of Tensor
        ``weight_k`` of shape (inputs, outputs) and ``bias_k`` of shape (outputs,), k = 0, 1, ...

    Examples
    --------
    >>> from fedrecsk.engine.streams import Streams
    >>> from fedrecsk.models.head import init_head
    >>> {name: tuple(value.shape) for name, value in init_head(16, streams=Streams(0)).items()}
    {'weight_0': (32, 8), 'bias_0': (8,), 'weight_1': (8, 8), 'bias_1': (8,),
     'weight_2': (8, 1), 'bias_2': (1,)}
    """
    generator = streams.torch("ncf_head", *([] if key is None else [key]))
    head: Head = {}
    for number, (inputs, outputs) in enumerate(pairwise([2 * n_factors, *hidden, 1])):
        uniform = 2.0 * torch.rand(inputs, outputs, generator=generator) - 1.0
        head[f"weight_{number}"] = (math.sqrt(6.0 / inputs) * uniform).to(device)
        head[f"bias_{number}"] = torch.zeros(outputs, device=device)
    return head


def n_weights(head: Mapping[str, Tensor]) -> int:
    """Count the weights and biases P of a head.

    Examples
    --------
    >>> from fedrecsk.engine.streams import Streams
    >>> from fedrecsk.models.head import init_head, n_weights
    >>> n_weights(init_head(8, streams=Streams(0)))
    217
    """
    return sum(value.numel() for value in head.values())


def network_size(n_factors: int, hidden: Sequence[int] = (8, 8)) -> int:
    """Count the weights and biases of a head before there is one.

    Examples
    --------
    >>> from fedrecsk.models.head import network_size
    >>> network_size(8), network_size(32)
    (217, 601)
    """
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise([2 * n_factors, *hidden, 1]))


def head_width(head: Mapping[str, Tensor]) -> int:
    """Return the number d of columns that a head reads of a vector.

    Examples
    --------
    >>> from fedrecsk.engine.streams import Streams
    >>> from fedrecsk.models.head import head_width, init_head
    >>> head_width(init_head(8, streams=Streams(0)))
    8
    """
    return head["weight_0"].shape[-2] // 2


def flat_head(head: Mapping[str, Tensor]) -> Tensor:
    """Put a head's weights into one vector (P,); `head_of` takes them out again."""
    parts = [part.reshape(-1) for layer in head_layers(head) for part in layer]
    return torch.cat(parts) if parts else torch.zeros(0)


def flat_changes(
    trained: Sequence[Mapping[str, Tensor]], before: Sequence[Mapping[str, Tensor]], like: Tensor
) -> Tensor:
    """Put what clients changed of some heads into one vector each.

    Parameters
    ----------
    trained : sequence of mappings of name to Tensor of shape (C, ...)
    before : sequence of mappings of name to Tensor
        The same heads before training, without client axis.
    like : Tensor of shape (C, ...)
        Tells C and the dtype where there is no head.

    Returns
    -------
    Tensor of shape (C, P)
        `stacked_heads` takes the changes out again.
    """
    changes = [like.new_zeros(len(like), 0)]
    for own, shared in zip(trained, before, strict=True):
        for k in range(len(shared) // 2):
            for name in (f"weight_{k}", f"bias_{k}"):
                changes.append((own[name] - shared[name]).flatten(1))
    return torch.cat(changes, 1)


def lifted(head: Head) -> Params:
    """Give every tensor the leading axis of one client that optimisers expect."""
    return {name: value[None] for name, value in head.items()}


def without(trained: Mapping[str, Tensor], left_out: Tensor, shared: Mapping[str, Tensor]) -> Head:
    """Put the shared head in the place of those (C, ...) of some clients, told by a mask (C,)."""
    return {
        name: torch.where(left_out.view(-1, *[1] * shared[name].dim()), shared[name], value)
        for name, value in trained.items()
    }


def head_of(flat: Tensor, n_factors: int, hidden: Sequence[int] = (8, 8)) -> Head:
    """Take a head out of the vector of its weights; the empty head out of an empty one.

    Examples
    --------
    >>> from fedrecsk.engine.streams import Streams
    >>> from fedrecsk.models.head import flat_head, head_of, init_head
    >>> head = init_head(4, streams=Streams(0))
    >>> again = head_of(flat_head(head), 4)
    >>> all(bool((again[name] == head[name]).all()) for name in head)
    True
    """
    if not len(flat):
        return {}
    like: Head = {}
    for number, (inputs, outputs) in enumerate(pairwise([2 * n_factors, *hidden, 1])):
        like[f"weight_{number}"] = flat.new_empty(inputs, outputs)
        like[f"bias_{number}"] = flat.new_empty(outputs)
    return {name: value[0] for name, value in stacked_heads(flat[None], [like])[0].items()}


def stacked_heads(flat: Tensor, heads: Sequence[Mapping[str, Tensor]]) -> list[Head]:
    """View the flat heads of clients, one after another (C, P), as heads (C, ...).

    Parameters
    ----------
    flat : Tensor of shape (C, P)
        Every row as `flat_head` of each head, concatenated.
    heads : sequence of mappings of name to Tensor
        Heads of the shapes wanted, without client axis.

    Returns
    -------
    list of dict of Tensor
        Views of `flat`.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.streams import Streams
    >>> from fedrecsk.models.head import flat_head, init_head, stacked_heads
    >>> heads = [init_head(d, key=d, streams=Streams(0)) for d in (2, 4)]
    >>> flat = torch.cat([flat_head(head) for head in heads]).repeat(3, 1)
    >>> [tuple(head["weight_0"].shape) for head in stacked_heads(flat, heads)]
    [(3, 4, 8), (3, 8, 8)]
    """
    found = []
    own = torch.split(flat, [n_weights(head) for head in heads], dim=1)
    for head, values in zip(heads, own, strict=True):
        names = [f"{kind}_{k}" for k in range(len(head) // 2) for kind in ("weight", "bias")]
        parts = torch.split(values, [head[name].numel() for name in names], dim=1)
        found.append(
            {
                name: part.reshape(-1, *head[name].shape)
                for name, part in zip(names, parts, strict=True)
            }
        )
    return found


@dataclass(frozen=True, eq=False)
class Joint:
    """Nested heads of clients as one network, or the gradient by them.

    Attributes
    ----------
    layers : list of (Tensor, Tensor)
        Weights (C, in, out) and biases (C, out). The first layer takes in 2 N values, the last one
        gives a logit for each head.
    blocks : list of (Tensor, Tensor)
        A block of `layers`, and the part of the flat heads that it holds. Empty for one head, whose
        layers are views themselves.
    """

    layers: Layers
    blocks: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, flat: Tensor, heads: Sequence[Mapping[str, Tensor]]) -> Joint:
        """Lay out the flat heads (C, P), see `stacked_heads`, of ascending widths."""
        own = [head_layers(head) for head in stacked_heads(flat, heads)]
        if len(own) == 1:
            return cls(own[0], [])
        layers, blocks = [], []
        n_factors = head_width(heads[-1])
        rows = [
            [slice(0, width), slice(n_factors, n_factors + width)]
            for width in map(head_width, heads)
        ]
        n_inputs = 2 * n_factors
        for level in zip(*own, strict=True):
            columns = _side_by_side([bias.shape[1] for _, bias in level])
            n_outputs = columns[-1].stop
            weights = flat.new_zeros(len(flat), n_inputs, n_outputs)
            biases = flat.new_zeros(len(flat), n_outputs)
            for (weight, bias), into, column in zip(level, rows, columns, strict=True):
                pieces = weight.split([piece.stop - piece.start for piece in into], dim=1)
                for row, piece in zip(into, pieces, strict=True):
                    blocks.append((weights[:, row, column], piece))
                blocks.append((biases[:, column], bias))
            layers.append((weights, biases))
            rows, n_inputs = [[column] for column in columns], n_outputs
        return cls(layers, blocks)

    def last(self, first: int) -> Joint:
        """View the clients from number `first` on."""
        return Joint(
            [(weight[first:], bias[first:]) for weight, bias in self.layers],
            [(block[first:], own[first:]) for block, own in self.blocks],
        )

    def load(self) -> None:
        """Copy the flat heads into the layers."""
        for block, own in self.blocks:
            block.copy_(own)

    def store(self) -> None:
        """Copy the layers into the flat heads."""
        for block, own in self.blocks:
            own.copy_(block)


def _side_by_side(sizes: Sequence[int]) -> list[slice]:
    """Return where parts of some sizes lie, one after another."""
    ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


# The network, for one head or a stack of them ---------------------------------------------------


def head_layers(head: Mapping[str, Tensor]) -> Layers:
    """Return a head's weights (..., in, out) and biases (..., out) in order."""
    return [(head[f"weight_{k}"], head[f"bias_{k}"]) for k in range(len(head) // 2)]


def product(values: Tensor, weight: Tensor) -> Tensor:
    """Multiply by the weights of one head (in, out), or of each client's own (c, in, out)."""
    # A client's batches are small, and `matmul` spends as long on looking as on multiplying.
    return torch.bmm(values, weight) if weight.dim() == 3 else values @ weight


def user_part(user: Tensor, layers: Layers) -> Tensor:
    """Return what users (..., n, d) bring into the first layer, with its bias: (..., n, h)."""
    weight, bias = layers[0]
    return product(user, weight[..., : user.shape[-1], :]) + bias[..., None, :]


def item_part(item: Tensor, layers: Layers, width: int) -> Tensor:
    """Return what items (..., n, d or d + 1) bring into the first layer: (..., n, h)."""
    return product(item[..., :width], layers[0][0][..., width:, :])


def forward(first: Tensor, layers: Layers) -> tuple[list[Tensor], Tensor]:
    """Return all hidden units (..., n, h) and the logits (..., n, m) from the first layer's sums.

    `first` is overwritten. m is 1 but for nested heads.
    """
    hidden, sums = [], first
    for weight, bias in layers[1:]:
        hidden.append(sums.relu_())
        sums = product(hidden[-1], weight)
        sums += bias[..., None, :]
    return hidden, sums


def backward(error: Tensor, hidden: list[Tensor], layers: Layers) -> list[Tensor]:
    """Return the loss's gradient by each layer's sums (..., n, h), given that by the logits."""
    sums = [error]
    for (weight, _), units in zip(reversed(layers[1:]), reversed(hidden), strict=True):
        by_units = product(sums[-1], weight.mT)
        # ReLU's gradient, in place and in half the time of a product with the sign.
        sums.append(
            torch.ops.aten.threshold_backward.grad_input(by_units, units, 0, grad_input=by_units)
        )
    return sums[::-1]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of all clients' losses in one mini-batch, and what they come from.

    Attributes
    ----------
    user : Tensor of shape (c, n, d), or (c, 1, d) for one user a client
    item : Tensor of shape (c, n, d or d + 1)
    logit : Tensor of shape (c, n)
        Of the last head.
    """

    user: Tensor
    item: Tensor
    logit: Tensor


def gradients(
    user: Tensor,
    item: Tensor,
    network: Layers,
    label: Tensor,
    weight: Tensor,
    *,
    item_bias: bool,
    into: Layers,
    out: Tensor | None = None,
    stars: StarsInRows | None = None,
) -> Gradients:
    """Differentiate the clients' losses on examples (c, n) that count by `weight`.

    user: (c, n, d), or (c, 1, d) where a client's examples share their user; item: (c, n, d or
    d + 1); label and weight broadcast to (c, n). The gradient by the network goes into `into`, that
    by the items to `out`.
    """
    width, shared = user.shape[2], user.shape[1] == 1
    to_first = network[0][0]
    to_user, to_item = to_first[:, :width], to_first[:, width:]
    gain, scaled = None, to_item
    if stars is not None:
        user, gain = stars.forward(user, item)
        # What is left of an item's own vector: scaled weights cost less than scaled items.
        scaled = to_item * stars.layers.item
    first = torch.bmm(item[:, :, :width], scaled).add_(user_part(user, network))
    if stars is not None and gain is not None:
        stars.positives(first).add_(torch.bmm(gain, to_item))
    hidden, logit = forward(first, network)
    if item_bias:
        logit = logit + item[:, :, width:]
    error = (torch.sigmoid(logit) - label[..., None]).mul_(weight[:, :, None])
    sums = backward(error, hidden, network)

    total = sums[0].sum(1)
    by_user = total[:, None] if shared else sums[0]
    user_grad = torch.bmm(by_user, to_user.mT)
    # An item bias does not enter the first layer: a row of zeros for it leaves items in one piece.
    by_items = pad(scaled, (0, 0, 0, item.shape[2] - width))
    item_grad = torch.bmm(sums[0], by_items.mT, out=torch.empty_like(item) if out is None else out)
    if item_bias:
        item_grad[:, :, width] = error.sum(2)
    # The products are this way round, and transposed after, because it is twice as fast.
    items_grad = torch.bmm(sums[0].mT, item[:, :, :width])
    if stars is not None:
        by_gain = None
        if gain is None:
            items_grad *= stars.layers.item
        else:
            by_first = stars.positives(sums[0]).sum(1, keepdim=True)
            items_grad = torch.baddbmm(items_grad, by_first.mT, gain, beta=stars.layers.item)
            by_gain = torch.bmm(by_first, to_item.mT)
        user_grad, through = stars.backward(user_grad, by_gain)
        stars.positives(item_grad)[:, :, :width] += through
    into[0][0][:, :width] = torch.bmm(by_user.mT, user).mT
    into[0][0][:, width:] = items_grad.mT
    into[0][1].copy_(total)
    for (by_weight, by_bias), units, by_sums in zip(into[1:], hidden, sums[1:], strict=True):
        by_weight.copy_(torch.bmm(units.mT, by_sums))
        by_bias.copy_(by_sums.sum(1))
    return Gradients(user_grad, item_grad, logit[:, :, -1])
