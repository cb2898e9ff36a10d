"""Flexible storage: a language model whose middle layers lie on a server.

Zhao, Wang, Xu, Ng, Chua. "LLM-based Federated Recommendation" (FELLRec), Findings of NAACL 2025,
arXiv:2402.09959. A client that cannot hold a whole model keeps the embeddings, the first k of n
layers and the last layer with norm and head; a server holds layers k ... n - 2.

    client  h_k = layers 0 ... k - 1 of the embedded tokens        sends h_k     (B, L, d)
    server  h_(n-1) = layers k ... n - 2 of h_k                    sends h_(n-1) (B, L, d)
    client  output = head(last layer of h_(n-1)), its loss         sends dloss/dh_(n-1)
    server  gradients of the adapters of its layers                sends dloss/dh_k

Token ids and the loss stay with the client. Each side trains the adapters of its own layers, and
both together are the unsplit model.

The client runs the model's *own* forward. Only the list of layers is another one, as long as
before, in which every layer of the middle is a stand-in without weights. A stand-in notes what its
layer is called with (mask, position embeddings ...), so that a model may treat its layers
differently; the last one sends all of it at once and returns what the server answers.

The middle may be a process of its own (:mod:`fedrecsk.models.split_channel`), or stay in the
caller's autograd graph, where the bytes that would cross are counted: the simulation. Keys and
values of earlier tokens are not kept across the boundary, so a split model generates with
``use_cache=False``. What a split costs is measured in :mod:`fedrecsk.models.split_costs`.

Only a summary of the paper and the authors' scripts could be read; the scripts take a model apart
and glue it together again in one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fedrecsk.models.split_channel import compress
from fedrecsk.models.split_middle import (
    Call,
    Middle,
    Note,
    Server,
    find_layers,
    hidden_in,
    hidden_of,
    take_middle,
)
from fedrecsk.models.stacked_lora import Adapters


class SplitLM(nn.Module):
    """A language model in two parts: the ends of a client, and the middle of a server.

    Outputs and gradients are those of the unsplit model. Make it with :meth:`split`.

    Parameters
    ----------
    client : Module
        The model with stand-ins for the layers of the middle.
    middle : Middle
        The layers of the server.
    boundary : Boundary
        What the stand-ins call.
    n_client_layers : int
        Layers k that the client keeps before the middle.

    Attributes
    ----------
    client : Module
        Of the model's own class, with its head, ``generate(..., use_cache=False)`` and so on.
    middle : Middle or None
        None once a server has taken over (:meth:`connect`).
    boundary : Boundary
        Counts what crosses.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from fedrecsk.models.split_lm import SplitLM
    >>> model = BertModel(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=4,
    ...     num_attention_heads=2, intermediate_size=8)).eval()
    >>> split = SplitLM.split(model, "encoder.layer", 1)
    >>> split.middle.paths
    ('encoder.layer.1', 'encoder.layer.2')
    >>> tokens = torch.tensor([[1, 2, 3, 4, 5]])
    >>> with torch.no_grad():
    ...     same = split(tokens, torch.ones_like(tokens)).last_hidden_state
    ...     torch.allclose(same, model(tokens).last_hidden_state, atol=1e-6)
    True
    >>> split.boundary.sent["hidden_up"]  # 5 tokens of 8 numbers of 4 bytes
    160
    """

    client: nn.Module
    middle: Middle | None

    def __init__(
        self, client: nn.Module, middle: Middle, boundary: Boundary, n_client_layers: int
    ) -> None:
        super().__init__()
        self.client = client
        self.middle = middle
        self.boundary = boundary
        self.n_client_layers = n_client_layers

    @classmethod
    def split(cls, model: nn.Module, layers: str | nn.ModuleList, n_client_layers: int) -> Self:
        """Split a model, which itself stays whole: the parts share its modules.

        Two tokens are run through the ends, to see that the model can be split. The layers of the
        middle are not run and may be on the meta device, without weights.

        Parameters
        ----------
        model : Module
            A Hugging Face model. With :class:`~fedrecsk.models.stacked_lora.StackedLoRA` on it,
            split it outside of a ``using`` block.
        layers : str or ModuleList
            The list of its n layers, or the module path of it, such as ``"encoder.layer"``.
        n_client_layers : int
            Layers k, from 0 to n - 1, that the client keeps beside the last one. With n - 1
            nothing is left for a server.

        Returns
        -------
        SplitLM

        Raises
        ------
        ValueError
            If there is no such list, k is out of range, or the model does something of its own
            between its layers, so that a middle cannot be cut out.
        """
        middle = take_middle(model, layers, n_client_layers)
        path, modules = find_layers(model, layers)
        boundary = Boundary(middle.paths, middle)
        ends: list[nn.Module] = list(modules)
        for place in range(len(middle.paths)):
            at = n_client_layers + place
            ends[at] = _Elsewhere(boundary, place, modules[at])
        client = _with_layers(model, path.split("."), nn.ModuleList(ends))
        if middle.paths:
            _probe(client, boundary, ends)
        return cls(client, middle, boundary, n_client_layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Run the split model.

        Parameters
        ----------
        input_ids : Tensor of shape (B, L)
        attention_mask : Tensor of shape (B, L), default=None
            1 for tokens, 0 for padding.

        Returns
        -------
        model output
            That of the unsplit model.
        """
        return self.client(input_ids=input_ids, attention_mask=attention_mask)

    def connect(self, server: Server) -> Self:
        """Let a server run the middle, and drop the middle here.

        Its memory is free once the model that was split is dropped too. To train, call
        ``loss.backward()``; or ask ``torch.autograd.grad`` for ``boundary.leaf`` too, without
        which it stops at the last layer where the client trains nothing below the middle (k = 0).

        Parameters
        ----------
        server : Server
            A :class:`~fedrecsk.models.split_channel.RemoteMiddle`, or in this process a
            :class:`~fedrecsk.models.split_middle.MiddleServer`.

        Returns
        -------
        SplitLM
            This object.

        Raises
        ------
        ValueError
            If the server holds other layers.
        """
        if tuple(server.paths) != self.boundary.paths:
            raise ValueError(
                f"The server holds {_listed(server.paths)}, but with "
                f"n_client_layers={self.n_client_layers} the client needs "
                f"{_listed(self.boundary.paths)}. Split both sides at the same layer."
            )
        self.boundary.server = server
        self.middle = None
        return self

    def sides(self, adapters: Mapping[str, Tensor]) -> tuple[Adapters, Adapters]:
        """Divide adapters into those of the client's layers and those of the server's.

        Parameters
        ----------
        adapters : mapping of str to Tensor
            Of the whole model, by module path.

        Returns
        -------
        client, server : dict of Tensor
        """
        theirs = tuple(f"{path}." for path in self.boundary.paths)
        client = {name: each for name, each in adapters.items() if not name.startswith(theirs)}
        server = {name: each for name, each in adapters.items() if name.startswith(theirs)}
        return client, server


class Boundary:
    """The line between client and server: carries what crosses it, and counts the bytes.

    Parameters
    ----------
    paths : sequence of str
        Module paths of the layers on the other side.
    server : Middle or Server
        Who runs them. A :class:`~fedrecsk.models.split_middle.Middle` does so in the caller's
        autograd graph; whatever else is apart, as for :meth:`SplitLM.connect`.

    Attributes
    ----------
    sent : dict of str to int
        Bytes since the start, or since :meth:`reset`: ``hidden_up``, ``extras_up`` (the masks and
        positions that layers need beside), ``hidden_down``, ``gradient_up``, ``gradient_down``. Up
        is from the client to the server.
    leaf : Tensor of shape ()
        See :meth:`SplitLM.connect`; its gradient is zero.

    Examples
    --------
    >>> from fedrecsk.models.split_lm import Boundary
    >>> from fedrecsk.models.split_middle import Middle
    >>> Boundary([], Middle({})).sent["hidden_up"]
    0
    """

    sent: dict[str, int]

    def __init__(self, paths: Sequence[str], server: Middle | Server) -> None:
        self.paths = tuple(paths)
        self.server = server
        self.leaf = torch.zeros((), requires_grad=True)
        # Set while the model is tried out: runs something else in place of each layer.
        self.probe: Callable[..., Any] | None = None
        self.tuple_length: int | None = None  # of what the model's layers return, if not a tensor
        self._calls: list[Call] = []
        self._tensors: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Count from zero again."""
        names = ("hidden_up", "extras_up", "hidden_down", "gradient_up", "gradient_down")
        self.sent = dict.fromkeys(names, 0)

    def visit(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note how the model calls a layer of the middle; at the last one, cross.

        Parameters
        ----------
        place : int
            Number of the layer within the middle.
        args, kwargs : tuple, dict
            What it is called with.

        Returns
        -------
        Tensor of shape (B, L, d), or tuple with one
            As a layer of the model would: what left the middle, or before the last layer the
            hidden states that were given.
        """
        if self.probe is not None:
            return self.probe(*args, **kwargs)
        hidden = hidden_in(args, kwargs)
        if place == 0:
            self._calls, self._tensors = [], []
        if len(self._calls) != place:
            raise RuntimeError(
                f"The model called {self.paths[place]} after {len(self._calls)} layers of the "
                "middle; a split model has to call its layers once each and in order."
            )
        note = Note(hidden, self._tensors, self.paths[place])
        self._calls.append(
            {
                "args": [note.value(each) for each in args],
                "kwargs": {name: note.value(each, name) for name, each in kwargs.items()},
            }
        )
        if place == len(self.paths) - 1:
            calls, tensors = self._calls, self._tensors
            self._calls, self._tensors = [], []  # the masks of a batch are not kept after it
            hidden = self._cross(hidden, calls, tensors)
        if self.tuple_length is None:
            return hidden
        return (hidden, *[None] * (self.tuple_length - 1))

    def _cross(self, hidden: Tensor, calls: list[Call], tensors: list[Tensor]) -> Tensor:
        extras = [part for each in tensors for part in compress(each)[1]]
        self.sent["extras_up"] += sum(part.nbytes for part in extras)
        if isinstance(self.server, Middle):
            crossed = _counted(hidden, self.sent, "hidden_up", "gradient_down")
            crossed = self.server(crossed, calls, tensors)
            return _counted(crossed, self.sent, "hidden_down", "gradient_up")
        if torch.is_grad_enabled():
            apply = cast(Callable[..., Tensor], _Cross.apply)
            return apply(hidden, self.leaf, self.server, calls, tensors, self.sent)
        self.sent["hidden_up"] += hidden.nbytes
        crossed = self.server.forward(hidden, calls, tensors, train=False)[0]
        self.sent["hidden_down"] += crossed.nbytes
        return crossed


# Stand-ins, and what crosses for them -----------------------------------------------------


class _Elsewhere(nn.Module):
    """Stands where a layer of the middle would be; has no weights."""

    def __init__(self, boundary: Boundary, place: int, layer: nn.Module) -> None:
        super().__init__()
        self.boundary = boundary
        self.place = place
        # Some models ask a layer for plain facts, such as which kind of mask it wants.
        for name, fact in vars(layer).items():
            if isinstance(fact, str | int | float) and name not in vars(self):
                setattr(self, name, fact)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.boundary.visit(self.place, args, kwargs)


class _Count(torch.autograd.Function):
    """Passes a tensor on, and counts its bytes and those of its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, sent: dict[str, int], forth: str, back: str) -> Tensor:
        ctx.sent, ctx.back = sent, back
        sent[forth] += hidden.nbytes
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.sent[ctx.back] += gradients[0].nbytes
        return gradients[0], None, None, None


def _counted(hidden: Tensor, sent: dict[str, int], forth: str, back: str) -> Tensor:
    return cast(Callable[..., Tensor], _Count.apply)(hidden, sent, forth, back)


class _Cross(torch.autograd.Function):
    """The middle as one operation, whose inside is on a server."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        leaf: Tensor,
        server: Server,
        calls: list[Call],
        tensors: list[Tensor],
        sent: dict[str, int],
    ) -> Tensor:
        output, run = server.forward(hidden, calls, tensors, train=True)
        ctx.run, ctx.sent, ctx.leaf = _Run(server, run), sent, leaf
        sent["hidden_up"] += hidden.nbytes
        sent["hidden_down"] += output.nbytes
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0]
        ctx.sent["gradient_up"] += gradients[0].nbytes
        back = ctx.run.backward(gradients[0], back=wanted)
        ctx.sent["gradient_down"] += back.nbytes if wanted else 0
        return back, torch.zeros_like(ctx.leaf), None, None, None, None


class _Run:
    """A run of the middle, which the server may forget when the client's graph is gone."""

    def __init__(self, server: Server, run: int) -> None:
        self.server = server
        self.run = run
        self.done = False

    def backward(self, gradient: Tensor, *, back: bool) -> Tensor | None:
        self.done = True
        return self.server.backward(self.run, gradient, back=back)

    def __del__(self) -> None:
        if not self.done:
            self.server.forget(self.run)


# Taking a model apart ----------------------------------------------------------------------


def _with_layers(model: nn.Module, path: list[str], layers: nn.ModuleList) -> nn.Module:
    """Copy the modules on the way to the list of layers, not what they hold, and exchange it."""
    if not path:
        return layers
    client = copy.copy(model)
    client._modules = model._modules.copy()
    client._modules[path[0]] = _with_layers(model.get_submodule(path[0]), path[1:], layers)
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        vars(client)["config"] = copy.copy(config)
        vars(client)["config"].use_cache = False
    return client


def _probe(client: nn.Module, boundary: Boundary, ends: Sequence[nn.Module]) -> None:
    """Run the ends once, to see what the model does between its layers.

    The client's last layer runs in place of each layer of the middle: what counts is only how the
    model passes outputs on.
    """
    passed: list[tuple[Tensor, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        passed.append((hidden_in(args, kwargs), output))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in ends]
    boundary.probe = ends[-1].forward  # not by a call, which its hook would note
    device = next(client.parameters()).device
    tokens = torch.ones(1, 2, dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            client(input_ids=tokens, attention_mask=tokens)
    finally:
        boundary.probe = None
        for hook in hooks:
            hook.remove()
    straight = len(passed) == len(ends) and all(
        hidden_of(output) is entered for (_, output), (entered, _) in pairwise(passed)
    )
    if not straight:
        raise ValueError(
            f"{type(client).__name__} does not hand the output of each of its {len(ends)} layers "
            "straight to the next one, so its middle cannot be cut out. Use a model with a plain "
            "chain of layers."
        )
    output = passed[0][1]
    boundary.tuple_length = len(output) if isinstance(output, tuple) else None


def _listed(paths: Sequence[str]) -> str:
    """Name a run of layers by its ends."""
    if not paths:
        return "no layers"
    return paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
