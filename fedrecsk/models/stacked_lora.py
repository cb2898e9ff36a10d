"""Low-rank adapters of all clients over one frozen model, in one pass.

A linear layer W with the adapter of client c gives

    y = x W' + s · (x A_c') B_c',        A_c (r, in),  B_c (out, r),  s = alpha / r.

A batch holds the rows of all clients, client after client and as many of each. W meets them all in
one product, A and B in one batched product each, so a pass costs what the frozen model costs for
that many rows, with one copy of it in memory. Clients share no parameter that is trained: the
gradient of the sum of their losses is the stack of their gradients.

A hook on the layer adds the second term. The model keeps its modules and their names, and runs as
it was outside of `StackedLoRA.using`.

Dropout acts on the x of the second term. Whether an entry is dropped is a hash of a number that
its client's generator draws, the layer, how often it has been called in this block, the client's
row, the position and the feature. So a client's masks do not depend on which clients share the
batch, nor on how far their texts make it pad on the right.

Edward Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang and Weizhu
Chen (2022), "LoRA: Low-Rank Adaptation of Large Language Models", ICLR. Where adapters go and how
they start is as in the library PEFT.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# "<path of the layer>.lora_A" (C, r, in) and "<path of the layer>.lora_B" (C, out, r).
Adapters = dict[str, Tensor]

# How models call the layers that make queries and values; the first that a model has all of.
_QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
    ("qkv",),
)
# Models for which PEFT adapts other layers than these by default.
_OTHER_TARGETS = {
    "btlm": ("c_proj", "c_attn"),
    "deberta": ("in_proj",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}


class StackedLoRA:
    """A frozen model whose chosen linear layers add the adapters of all clients at once.

    Parameters
    ----------
    model : nn.Module
        Frozen in place; its linear layers get a hook each.
    target_modules : sequence of str, or {"auto", "all-linear"}, default="auto"
        Which linear layers are adapted. A name means the layers of which it is the path or the end
        of the path (``"query"``: every layer whose path ends with ``.query``). ``"auto"``: those
        that make queries and values, for known model types the ones that PEFT chooses.
        ``"all-linear"``: all but the output layer of a language model.
    rank : int
        Rank r of an adapter.
    alpha : float
        An adapter's product is multiplied by ``alpha / rank``.
    dropout : float, default=0.0
        Rate at which entries of the adapters' input are dropped in training, in [0, 1).

    Attributes
    ----------
    model : nn.Module
    targets : tuple of str
        Paths of the adapted layers, in the order of ``model.named_modules()``.
    scaling : float
        ``alpha / rank``.

    Raises
    ------
    ValueError
        If `rank`, `alpha` or `dropout` are out of their range, or if a name fits no linear layer
        of the model; the message lists the names that there are.

    Notes
    -----
    Which client a row belongs to is read off its place, so every adapted layer has to see the rows
    in their order, each client's as many. That holds for layers on (rows, ..., features) and on
    rows flattened with their positions; it does not for layers that see a selection of tokens
    (experts) or texts without their padding.

    Gradient checkpointing runs layers once more in the backward pass: this has to happen inside
    the same ``using`` block, and without dropout.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from fedrecsk.models.stacked_lora import StackedLoRA
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> lora = StackedLoRA(model, target_modules=["0"], rank=2, alpha=4)
    >>> adapters = lora.init(5, torch.Generator().manual_seed(0))
    >>> {name: tuple(value.shape) for name, value in adapters.items()}
    {'0.lora_A': (5, 2, 4), '0.lora_B': (5, 3, 2)}
    >>> rows = torch.ones(10, 4)  # two of each client
    >>> before = model(rows)
    >>> with lora.using(adapters):
    ...     after = model(rows)
    >>> torch.equal(before, after)  # B is zero at first
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_modules: Sequence[str] | str = "auto",
        rank: int,
        alpha: float,
        dropout: float = 0.0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"The rank of an adapter is at least 1; got {rank}.")
        if not alpha > 0.0:
            raise ValueError(f"alpha must be positive; got {alpha}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"The rate of dropout lies in [0, 1); got {dropout}.")
        self.model = model
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        self.dropout = dropout
        self.targets = _targets(model, target_modules)
        self._layers = {
            path: _AdaptedLayer(path, model.get_submodule(path), self.scaling, dropout)
            for path in self.targets
        }
        model.requires_grad_(False)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether adapted layers keep their weights as (in, out), as those of GPT-2 do."""
        return any(_is_conv1d(self.model.get_submodule(path)) for path in self.targets)

    def init(self, n_clients: int, generator: torch.Generator) -> Adapters:
        """Draw the adapters before training, the same for every client.

        A is uniform in ±1/sqrt(in), PEFT's choice, and B is zero: the model starts as it is.

        Parameters
        ----------
        n_clients : int
            C.
        generator : torch.Generator
            Its device does the drawing: with one on the CPU, every device gets the same numbers.

        Returns
        -------
        dict of Tensor
            ``"<path>.lora_A"`` (C, r, in) and ``"<path>.lora_B"`` (C, out, r) for each adapted
            layer, float32 on the device of the layer.
        """
        adapters: Adapters = {}
        for path, layer in self._layers.items():
            drawn = torch.empty(self.rank, layer.n_in, device=generator.device)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5.0), generator=generator)
            device = layer.device()
            adapters[f"{path}.lora_A"] = drawn.to(device).repeat(n_clients, 1, 1)
            adapters[f"{path}.lora_B"] = torch.zeros(
                n_clients, layer.n_out, self.rank, device=device
            )
        return adapters

    @contextmanager
    def using(
        self,
        adapters: Mapping[str, Tensor] | None,
        *,
        dropout: Sequence[torch.Generator] | None = None,
    ) -> Iterator[nn.Module]:
        """Let the model apply adapters inside of a ``with`` block.

        Parameters
        ----------
        adapters : mapping of name to Tensor, or None
            Of C clients, as from `init`. The rows of a batch are then C equal blocks, client after
            client; with C = 1 any number of rows. None: the plain model, also within another block.
        dropout : sequence of torch.Generator, optional
            One a client, for training: each gives one number. They are not read where the rate
            is 0. Default, or an empty sequence: nothing is dropped.

        Yields
        ------
        nn.Module
            The model.

        Raises
        ------
        ValueError
            If names or shapes of the adapters, or the number of generators, do not fit.

        Notes
        -----
        A client that has run out of examples while others go on still draws. For masks that do not
        depend on that, give each step generators of its own, such as
        ``streams.torch("dropout", round, epoch, step, client)``.
        """
        before = [layer.active for layer in self._layers.values()]
        keys = None
        if adapters is not None:
            n_clients = self._check(adapters)
            if dropout and self.dropout:
                keys = _keys(dropout, n_clients)
        for path, layer in self._layers.items():
            layer.active = None
            if adapters is not None:
                A, B = adapters[f"{path}.lora_A"], adapters[f"{path}.lora_B"]
                layer.active = _Active(A, B, None if keys is None else keys.to(A.device))
        try:
            yield self.model
        finally:
            for layer, active in zip(self._layers.values(), before, strict=True):
                layer.active = active

    def restore(self) -> nn.Module:
        """Take the hooks off and give the model back, which stays frozen.

        Further blocks of `using` then have no effect.
        """
        for layer in self._layers.values():
            layer.hook.remove()
        return self.model

    def _check(self, adapters: Mapping[str, Tensor]) -> int:
        """Refuse adapters that are not for these layers; count their clients."""
        wanted: dict[str, tuple[int, int]] = {}
        for path, layer in self._layers.items():
            wanted[f"{path}.lora_A"] = (self.rank, layer.n_in)
            wanted[f"{path}.lora_B"] = (layer.n_out, self.rank)
        if adapters.keys() != wanted.keys():
            missing, unknown = wanted.keys() - adapters.keys(), adapters.keys() - wanted.keys()
            some = "; ".join(
                f"{len(names)} {what}, such as {min(names)!r}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
            raise ValueError(
                f"These adapters are not for the {len(self.targets)} adapted layers: {some}."
            )
        n_clients = len(next(iter(adapters.values())))
        for name, shape in wanted.items():
            if tuple(adapters[name].shape) != (n_clients, *shape):
                raise ValueError(
                    f"{name} has the shape {tuple(adapters[name].shape)}; expected "
                    f"{(n_clients, *shape)}, for {n_clients} clients and rank {self.rank}."
                )
        return n_clients


def select(adapters: Mapping[str, Tensor], clients: Tensor | Sequence[int]) -> Adapters:
    """Take the adapters of some clients, by their numbers; gradients pass through.

    Parameters
    ----------
    adapters : mapping of name to Tensor of shape (C, ...)
    clients : Tensor or sequence of int
        K numbers in 0 ... C - 1; one may come several times.

    Returns
    -------
    dict of Tensor of shape (K, ...)

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.stacked_lora import select
    >>> select({"w": torch.tensor([[1.0], [2.0], [3.0]])}, [2, 0])["w"].flatten().tolist()
    [3.0, 1.0]
    """
    some = next(iter(adapters.values()))
    index = torch.as_tensor(clients, dtype=torch.int64, device=some.device)
    return {name: value[index] for name, value in adapters.items()}


def mean(
    adapters: Mapping[str, Tensor], weights: Tensor | Sequence[float] | None = None
) -> Adapters:
    """Average the adapters of all clients, A and B separately, into those of one.

    Parameters
    ----------
    adapters : mapping of name to Tensor of shape (C, ...)
    weights : Tensor or sequence of float, of shape (C,), optional
        Non-negative; only their ratios count. Default: all clients alike.

    Returns
    -------
    dict of Tensor of shape (1, ...)

    Raises
    ------
    ValueError
        If the weights are not one a client, negative, or sum to nothing.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.stacked_lora import mean
    >>> stacked = {"w": torch.tensor([[0.0], [4.0]])}
    >>> mean(stacked)["w"].tolist(), mean(stacked, [3, 1])["w"].tolist()
    ([[2.0]], [[1.0]])
    """
    some = next(iter(adapters.values()))
    n_clients = len(some)
    given = torch.ones(n_clients) if weights is None else torch.as_tensor(weights)
    shares = given.to(device=some.device, dtype=torch.float64)
    if shares.shape != (n_clients,):
        raise ValueError(
            f"Got weights of the shape {tuple(shares.shape)} for the adapters of {n_clients} "
            "clients; give one weight a client."
        )
    if not (bool((shares >= 0.0).all()) and 0.0 < float(shares.sum()) < math.inf):
        raise ValueError(
            f"The clients' weights must be non-negative, and one positive; got {shares.tolist()}."
        )
    shares = shares / shares.sum()
    return {
        name: torch.tensordot(shares.to(value.dtype), value, dims=1)[None]
        for name, value in adapters.items()
    }


def flat(adapters: Mapping[str, Tensor]) -> Tensor:
    """Put each client's adapters into one vector; `unflat` takes them out again.

    Parameters
    ----------
    adapters : mapping of name to Tensor of shape (C, ...)

    Returns
    -------
    Tensor of shape (C, P)
        In the order of the mapping.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.stacked_lora import flat, unflat
    >>> adapters = {"a": torch.zeros(3, 2, 4), "b": torch.ones(3, 5, 2)}
    >>> flat(adapters).shape
    torch.Size([3, 18])
    >>> {name: tuple(value.shape) for name, value in unflat(flat(adapters), adapters).items()}
    {'a': (3, 2, 4), 'b': (3, 5, 2)}
    """
    return torch.cat([value.flatten(1) for value in adapters.values()], dim=1)


def unflat(vectors: Tensor, like: Mapping[str, Tensor]) -> Adapters:
    """Show vectors (K, P) as adapters of K clients, with the names and shapes of others.

    The adapters are views, so gradients by them become one gradient by the vectors.
    """
    shapes = [value.shape[1:] for value in like.values()]
    parts = torch.split(vectors, [shape.numel() for shape in shapes], dim=1)
    return {
        name: part.view(len(part), *shape)
        for name, part, shape in zip(like, parts, shapes, strict=True)
    }


def n_parameters(adapters: Mapping[str, Tensor]) -> int:
    """Count the parameters P of one client's adapters.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.stacked_lora import n_parameters
    >>> n_parameters({"a": torch.zeros(3, 2, 4), "b": torch.ones(3, 5, 2)})
    18
    """
    return sum(value[0].numel() for value in adapters.values())


# The adapted layers -----------------------------------------------------------------------


@dataclass(eq=False)
class _Active:
    """What a layer applies in a block: the clients' adapters, their keys, calls so far."""

    A: Tensor  # (C, r, in)
    B: Tensor  # (C, out, r)
    keys: Tensor | None  # (C,) where inputs are dropped
    calls: int = 0


class _AdaptedLayer:
    """The hook of one linear layer."""

    def __init__(self, path: str, layer: nn.Module, scaling: float, dropout: float) -> None:
        features = _features(layer)
        assert features is not None
        self.n_in, self.n_out = features
        self.layer = layer
        self.scaling = scaling
        self.path = path
        # Numbers of 16 bits are compared, so the rate is a multiple of 2^-16.
        self.n_dropped = min(max(1, round(dropout * 65536)), 65535) if dropout else 0
        self.active: _Active | None = None
        self.hook = layer.register_forward_hook(self.add_adapters, with_kwargs=True)

    def device(self) -> torch.device:
        """Return where the layer's weights are."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight.device

    def add_adapters(
        self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        """Add the clients' products to the layer's output (rows, ..., out)."""
        if (active := self.active) is None:
            return output
        x = args[0] if args else next(iter(kwargs.values()))  # (rows, ..., in)
        C = len(active.A)
        if x.shape[0] % C:
            raise ValueError(
                f"A batch of {x.shape[0]} rows is not made of equal blocks for {C} clients: "
                "every client needs the same number of rows, padded where it has fewer."
            )
        x, scaling = x.to(output.dtype), self.scaling
        if active.keys is not None:
            x = x.masked_fill(self._dropped(x, active), 0.0)
            scaling /= 1.0 - self.n_dropped / 65536
        N = x.numel() // (C * self.n_in)
        low = torch.bmm(x.reshape(C, N, self.n_in), active.A.to(x.dtype).mT)  # (C, N, r)
        y = torch.baddbmm(
            output.reshape(C, N, self.n_out), low, active.B.to(x.dtype).mT, alpha=scaling
        )
        return y.view(output.shape)

    def _dropped(self, x: Tensor, active: _Active) -> Tensor:
        """Choose the entries of (rows, ..., in) that are dropped in this call."""
        assert active.keys is not None
        # Another word of 64 bits for every four features, 16 bits each, of every token.
        sizes = (x.shape[0] // len(active.keys), *x.shape[1:-1], math.ceil(self.n_in / 4))
        counter = torch.zeros((), dtype=torch.int64, device=x.device)
        for size in sizes:
            counter = (counter[..., None] << 20) + torch.arange(size, device=x.device)
        # The path and not a running number, which would change where other layers are adapted too.
        start = active.keys + (zlib.crc32(f"{self.path} {active.calls}".encode()) << 31)
        active.calls += 1
        words = _scrambled(start.reshape(-1, *[1] * len(sizes)) + counter * _GOLDEN_GAMMA)
        bits = words.view(torch.int16)[..., : self.n_in]
        return (bits < self.n_dropped - 32768).reshape(x.shape)


def _keys(generators: Sequence[torch.Generator], n_clients: int) -> Tensor:
    """Draw one number of each client's generator, (C,)."""
    if len(generators) != n_clients:
        raise ValueError(
            f"Got {len(generators)} generators for the dropout of {n_clients} clients; give one "
            "generator a client."
        )
    return torch.cat([torch.randint(2**62, (1,), generator=g, device=g.device) for g in generators])


def _scrambled(z: Tensor) -> Tensor:
    """Scramble int64 values in place, all 64 bits: the finaliser of SplitMix64."""
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= _MIX_1
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= _MIX_2
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


# Odd constants of SplitMix64, as signed 64-bit integers; fedrecsk.engine.streams has them too.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


# Which layers ------------------------------------------------------------------------------


def _is_conv1d(layer: nn.Module) -> bool:
    """Know the linear layer of GPT-2, whose weight is (in, out), without importing its library."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _features(layer: nn.Module) -> tuple[int, int] | None:
    """Return the numbers of inputs and outputs of a linear layer; None for any other module."""
    if _is_conv1d(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    # By its numbers and not by its weight, whose shape quantised layers pack.
    n_in, n_out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(n_in, int) and isinstance(n_out, int) and hasattr(layer, "weight"):
        return n_in, n_out
    return None


def _targets(model: nn.Module, target_modules: Sequence[str] | str) -> tuple[str, ...]:
    """Find the paths of the layers to adapt, in the order of the model's modules."""
    linear = [path for path, module in model.named_modules() if path and _features(module)]
    if isinstance(target_modules, str):
        if target_modules == "all-linear":
            found = _all_but_output(model, linear)
        elif target_modules == "auto":
            found = _queries_and_values(model, linear)
        else:
            raise ValueError(
                f"target_modules={target_modules!r} is not known: give 'auto', 'all-linear' or a "
                f"list of names such as [{target_modules!r}]."
            )
        if not found:
            raise ValueError(
                f"target_modules={target_modules!r} finds no layer to adapt in "
                f"{type(model).__name__}. {_names_there(linear)}"
            )
        return tuple(found)
    if not target_modules:
        raise ValueError(f"target_modules is empty. {_names_there(linear)}")
    for name in target_modules:
        if not any(_fits(path, name) for path in linear):
            raise ValueError(
                f"target_modules names {name!r}, which is no linear layer of "
                f"{type(model).__name__}. {_names_there(linear)}"
            )
    return tuple(path for path in linear if any(_fits(path, name) for name in target_modules))


def _fits(path: str, name: str) -> bool:
    """Match a module's path with a name as PEFT does."""
    return path == name or path.endswith(f".{name}")


def _queries_and_values(model: nn.Module, linear: Sequence[str]) -> list[str]:
    """Find the layers that make queries and values, or what PEFT takes for the model's type."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    last = {path: path.rpartition(".")[2] for path in linear}
    if model_type in _OTHER_TARGETS:
        return [path for path in linear if last[path] in _OTHER_TARGETS[model_type]]
    for names in _QUERY_AND_VALUE:
        if set(names) <= set(last.values()):
            return [path for path in linear if last[path] in names]
    return []


def _all_but_output(model: nn.Module, linear: Sequence[str]) -> list[str]:
    """Leave out the layer that makes a language model's logits."""
    output_layer = getattr(model, "get_output_embeddings", lambda: None)()
    return [path for path in linear if model.get_submodule(path) is not output_layer]


def _names_there(linear: Sequence[str]) -> str:
    """Say which linear layers a model has."""
    if not linear:
        return "It has no linear layers."
    names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
    return f"Its linear layers are called {names}; the first is {linear[0]!r}."
