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

The middle may be a process of its own (:func:`serve_middle`, :class:`RemoteMiddle`), or stay in
the caller's autograd graph, where the bytes that would cross are counted: the simulation. Keys and
values of earlier tokens are not kept across the boundary, so a split model generates with
``use_cache=False``.

Only a summary of the paper and the authors' scripts could be read; the scripts take a model apart
and glue it together again in one process.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from math import prod
from multiprocessing import BufferTooShort
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from fedrecsk.models.stacked_lora import Adapters, StackedLoRA

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# How a layer is called: JSON, in which tensors are numbers.
Call = dict[str, Any]


class Middle(nn.Module):
    """The layers that a server holds, and nothing else of the model.

    They keep the module paths that they have in the whole model, so that adapters and state dicts
    know them by the same names. Make it with :func:`take_middle`.

    Parameters
    ----------
    layers : mapping of str to Module
        Layers in order, by module path, such as ``"encoder.layer.1"``.
    config : object, default=None
        The model's ``config``, for those who look up the type of the model there.

    Attributes
    ----------
    paths : tuple of str
        Module paths of the layers.

    Examples
    --------
    >>> from torch import nn
    >>> from fedrecsk.models.split_lm import Middle
    >>> middle = Middle({"model.layers.1": nn.Linear(2, 2)})
    >>> middle.paths, sorted(middle.state_dict())
    (('model.layers.1',), ['model.layers.1.bias', 'model.layers.1.weight'])
    """

    def __init__(self, layers: Mapping[str, nn.Module], config: object = None) -> None:
        super().__init__()
        self.paths = tuple(layers)
        self.config = config
        for path, layer in layers.items():
            *outer, name = path.split(".")
            parent: nn.Module = self
            for each in outer:
                if each not in parent._modules:
                    parent.add_module(each, nn.Module())
                parent = parent.get_submodule(each)
            parent.add_module(name, layer)

    def forward(self, hidden: Tensor, calls: Sequence[Call], tensors: Sequence[Tensor]) -> Tensor:
        """Run the layers.

        Parameters
        ----------
        hidden : Tensor of shape (B, L, d)
            What enters the first layer.
        calls : sequence of dict
            How each layer is called, as a :class:`Boundary` notes it.
        tensors : sequence of Tensor
            What the calls refer to: masks, position embeddings.

        Returns
        -------
        Tensor of shape (B, L, d)
            What leaves the last layer.
        """
        if len(calls) != len(self.paths):
            raise ValueError(f"Got calls of {len(calls)} layers for the {len(self.paths)} here.")
        for path, call in zip(self.paths, calls, strict=True):
            args = [_recall(each, hidden, tensors) for each in call["args"]]
            kwargs = {name: _recall(each, hidden, tensors) for name, each in call["kwargs"].items()}
            hidden = hidden_of(self.get_submodule(path)(*args, **kwargs))
        return hidden


def take_middle(model: nn.Module, layers: str | nn.ModuleList, n_client_layers: int) -> Middle:
    """Give the layers that a server holds.

    Parameters
    ----------
    model : Module
        A Hugging Face model. It may be on the meta device, without weights: then load those of
        the middle alone with ``middle.load_state_dict(weights, assign=True)``.
    layers : str or ModuleList
        The list of its n layers, or the module path of it.
    n_client_layers : int
        Layers k, from 0 to n - 1, that the client keeps beside the last one.

    Returns
    -------
    Middle
        Layers k ... n - 2, shared with the model.

    Raises
    ------
    ValueError
        If there is no such list, or k is out of range.

    Examples
    --------
    >>> from torch import nn
    >>> from fedrecsk.models.split_lm import take_middle
    >>> model = nn.Module()
    >>> model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    >>> take_middle(model, "layers", 1).paths
    ('layers.1', 'layers.2')
    """
    path, modules = find_layers(model, layers)
    last = len(modules) - 1
    if not 0 <= n_client_layers <= last:
        raise ValueError(
            f"n_client_layers must be from 0 to {last} for a model of {last + 1} layers, whose "
            f"last one always stays with the client; got {n_client_layers}."
        )
    held = {f"{path}.{i}": modules[i] for i in range(n_client_layers, last)}
    return Middle(held, getattr(model, "config", None))


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
            A :class:`RemoteMiddle`, or a :class:`MiddleServer` in this process.

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
        Who runs them. A :class:`Middle` does so in the caller's autograd graph; a
        :class:`MiddleServer` or :class:`RemoteMiddle` is apart.

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
    >>> from fedrecsk.models.split_lm import Boundary, Middle
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
        note = _Note(hidden, self._tensors, self.paths[place])
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


# The server's side -------------------------------------------------------------------------


class Server(Protocol):
    """What a client asks of the side that holds the middle, wherever that is."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Module paths of the layers that are held."""

    def forward(
        self, hidden: Tensor, calls: Sequence[Call], tensors: Sequence[Tensor], *, train: bool
    ) -> tuple[Tensor, int]:
        """Run the middle; the number names this run for `backward`."""

    def backward(self, run: int, gradient: Tensor, *, back: bool) -> Tensor | None:
        """Take the gradient by a run's output; give that by its input, if wanted `back`."""

    def forget(self, run: int) -> None:
        """Drop a run that will have no backward."""


class MiddleServer:
    """Runs the middle, and trains the adapters in it.

    Parameters
    ----------
    middle : Middle
        The layers.
    lora : StackedLoRA, default=None
        Made from `middle`; applies the adapters.
    adapters : mapping of str to Tensor of shape (C, ...), default=None
        Adapters of the middle. Without `lora`, those that the caller has put into effect itself.
        None: nothing is trained here.
    update : callable, default=None
        ``update(adapters, gradients) -> adapters``, one optimiser step, for :meth:`step`.
    dropout : sequence of torch.Generator, default=()
        One a client, for the adapters' dropout in training; each forward draws from them.

    Attributes
    ----------
    paths : tuple of str
        Module paths of the layers.
    adapters : dict of Tensor
        As they are now.
    gradients : dict of Tensor
        Their sum since the last step.

    Examples
    --------
    >>> from torch import nn
    >>> from fedrecsk.models.split_lm import Middle, MiddleServer
    >>> MiddleServer(Middle({"layers.1": nn.Linear(2, 2)})).paths
    ('layers.1',)
    """

    def __init__(
        self,
        middle: Middle,
        *,
        lora: StackedLoRA | None = None,
        adapters: Mapping[str, Tensor] | None = None,
        update: Callable[[Adapters, Adapters], Adapters] | None = None,
        dropout: Sequence[torch.Generator] = (),
    ) -> None:
        self.middle = middle
        self.paths = middle.paths
        self.lora = lora
        self.update = update
        self.dropout = dropout
        self._runs: dict[int, tuple[Tensor, Tensor]] = {}
        self._n_runs = 0
        self.load(adapters or {})

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Take other adapters, as after an aggregation; gradients and open runs are dropped.

        Parameters
        ----------
        adapters : mapping of str to Tensor of shape (C, ...)
        """
        self.adapters: Adapters = {
            name: each if self.lora is None else each.detach().clone().requires_grad_(True)
            for name, each in adapters.items()
        }
        self.gradients = {name: torch.zeros_like(each) for name, each in self.adapters.items()}
        self._runs.clear()

    def forward(
        self, hidden: Tensor, calls: Sequence[Call], tensors: Sequence[Tensor], *, train: bool
    ) -> tuple[Tensor, int]:
        """Run the middle.

        Parameters
        ----------
        hidden : Tensor of shape (B, L, d)
        calls, tensors : sequence
            As in :meth:`Middle.forward`.
        train : bool
            Whether to keep what a backward needs.

        Returns
        -------
        output : Tensor of shape (B, L, d)
        run : int
            Names this run for :meth:`backward`.
        """
        adapted: AbstractContextManager[Any] = nullcontext()
        if self.lora is not None and self.adapters:
            adapted = self.lora.using(self.adapters, dropout=self.dropout if train else ())
        with adapted, torch.set_grad_enabled(train):
            entered = hidden.detach().requires_grad_(train)
            output = self.middle(entered, calls, tensors)
        self._n_runs += 1
        if train:
            self._runs[self._n_runs] = (entered, output)
        return output.detach(), self._n_runs

    def backward(self, run: int, gradient: Tensor, *, back: bool) -> Tensor | None:
        """Add up the gradients of the adapters.

        Parameters
        ----------
        run : int
            From :meth:`forward`; each has one backward.
        gradient : Tensor of shape (B, L, d)
            Of the client's loss by the run's output.
        back : bool
            Whether the client has anything to train below the middle.

        Returns
        -------
        Tensor of shape (B, L, d) or None
            Gradient by what entered, if wanted back.

        Raises
        ------
        ValueError
            If there is no such run, or no more.
        """
        if run not in self._runs:
            raise ValueError(f"Run {run} is unknown here, or has had its backward already.")
        entered, output = self._runs.pop(run)
        wanted = [*self.adapters.values(), *([entered] if back else [])]
        if not wanted:
            return None
        found = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
        for name, each in zip(self.adapters, found, strict=False):
            if each is not None:
                self.gradients[name] += each
        return found[-1] if back else None

    def step(self) -> None:
        """Make one optimiser step with the gradients since the last one.

        Raises
        ------
        ValueError
            If there is no `update` or no `lora`.
        """
        if self.update is None or self.lora is None:
            raise ValueError("This server was made without update= or lora= and makes no steps.")
        adapters = {name: each.detach() for name, each in self.adapters.items()}
        self.load(self.update(adapters, self.gradients))

    def forget(self, run: int) -> None:
        """Drop a run that will have no backward."""
        self._runs.pop(run, None)


def serve_middle(
    connection: Connection,
    middle: Middle,
    *,
    lora: StackedLoRA | None = None,
    adapters: Mapping[str, Tensor] | None = None,
    update: Callable[[Adapters, Adapters], Adapters] | None = None,
    dropout: Sequence[torch.Generator] = (),
    timeout: float | None = None,
) -> Adapters:
    """Answer a client until it closes the connection: the loop of a server process.

    JSON and bytes of tensors are read from the connection, and nothing is unpickled. A request
    that fails is reported to the client, and the loop goes on.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        One end of a ``Pipe``, or what a ``Listener`` has accepted.
    middle : Middle
        The layers, on the device that is to run them.
    lora, adapters, update, dropout
        As for :class:`MiddleServer`.
    timeout : float, default=None
        Seconds to wait for the next request. None: for ever.

    Returns
    -------
    dict of Tensor of shape (C, ...)
        The adapters of the middle at the end.

    Raises
    ------
    TimeoutError
        If the client is silent for longer than `timeout`.
    ValueError
        If what comes is no message of a :class:`RemoteMiddle`.
    """
    server = MiddleServer(middle, lora=lora, adapters=adapters, update=update, dropout=dropout)
    device = next((each.device for each in middle.parameters()), torch.device("cpu"))
    try:
        while True:
            request, tensors, _ = _receive(connection, timeout, device)
            if request.get("do") == "close":
                _send(connection, {}, [])
                break
            try:
                reply, answer = _answer(server, request, tensors)
            except Exception as error:  # whatever is wrong with a request, its sender is told
                reply, answer = {"error": f"{type(error).__name__}: {error}"}, []
            _send(connection, reply, answer)
    except (EOFError, ConnectionError):
        pass  # the client is gone
    return {name: each.detach() for name, each in server.adapters.items()}


class RemoteMiddle:
    """The client's end of a connection to a process that runs :func:`serve_middle`.

    Hand it to :meth:`SplitLM.connect`. It closes at the end of a ``with`` block.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        One end of a ``Pipe``, or a ``Client``.
    timeout : float, default=60.0
        Seconds to wait for an answer.

    Attributes
    ----------
    paths : tuple of str
        Module paths of the layers that the server holds.
    bytes_sent, bytes_received : int
        All that went through the connection, headers included.

    Raises
    ------
    ConnectionError
        From every method: if the server is gone.
    TimeoutError
        From every method: if it does not answer in time. The connection is then closed.
    RuntimeError
        From every method: if the server could not do what was asked, with its message.
    """

    def __init__(self, connection: Connection, *, timeout: float = 60.0) -> None:
        self.connection = connection
        self.timeout = timeout
        self.bytes_sent = 0
        self.bytes_received = 0
        self._forgotten: list[int] = []
        self.paths: tuple[str, ...] = tuple(self._ask({"do": "hello"})[0]["paths"])

    def forward(
        self, hidden: Tensor, calls: Sequence[Call], tensors: Sequence[Tensor], *, train: bool
    ) -> tuple[Tensor, int]:
        """Run the middle over there, as :meth:`MiddleServer.forward`."""
        recipes: list[Any] = []
        payload = [hidden]
        for each in tensors:
            recipe, parts = compress(each)
            recipes.append(recipe)
            payload += parts
        # Most layers are called alike: say it once.
        names = [json.dumps(call) for call in calls]
        alike = dict(zip(names, calls, strict=True))
        request = {
            "do": "forward",
            "train": train,
            "calls": list(alike.values()),
            "layers": [list(alike).index(name) for name in names],
            "extras": recipes,
        }
        reply, [output] = self._ask(request, payload, hidden.device)
        return output, reply["run"]

    def backward(self, run: int, gradient: Tensor, *, back: bool) -> Tensor | None:
        """Send a gradient, as :meth:`MiddleServer.backward`."""
        request = {"do": "backward", "run": run, "back": back}
        _, answer = self._ask(request, [gradient], gradient.device)
        return answer[0] if back else None

    def step(self) -> None:
        """Let the server make an optimiser step with the gradients since the last one."""
        self._ask({"do": "step"})

    def forget(self, run: int) -> None:
        """Let the server drop a run; it is told with the next request."""
        self._forgotten.append(run)

    def adapters(self) -> Adapters:
        """Fetch the adapters of the middle, (C, ...), as for an aggregation."""
        reply, tensors = self._ask({"do": "adapters"})
        return dict(zip(reply["names"], tensors, strict=True))

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Give the server other adapters, (C, ...), as after an aggregation."""
        self._ask({"do": "load", "names": list(adapters)}, list(adapters.values()))

    def close(self) -> None:
        """End the server's loop and close the connection; once closed, do nothing."""
        if not self.connection.closed:
            try:
                self._ask({"do": "close"})
            finally:
                self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(
        self,
        request: dict[str, Any],
        tensors: Sequence[Tensor] = (),
        device: torch.device | str = "cpu",
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Send a request and wait for the answer."""
        if self.connection.closed:
            raise ConnectionError("The connection to the server of the middle layers is closed.")
        request["forget"], self._forgotten = self._forgotten, []
        try:
            self.bytes_sent += _send(self.connection, request, tensors)
            reply, answer, n_bytes = _receive(self.connection, self.timeout, torch.device(device))
        except (EOFError, OSError, ValueError) as error:
            # What comes later could be the answer to this request: the connection is of no use.
            self.connection.close()
            if isinstance(error, TimeoutError):
                raise TimeoutError(
                    f"The server of the middle layers has not answered {request['do']!r} within "
                    f"{self.timeout} seconds. Raise timeout= if it is only slow."
                ) from error
            raise ConnectionError(
                f"The server of the middle layers was lost during {request['do']!r} "
                f"({type(error).__name__}). Its process may have died; start it again and connect "
                "anew."
            ) from error
        self.bytes_received += n_bytes
        if "error" in reply:
            raise RuntimeError(f"The server of the middle layers failed: {reply['error']}")
        return reply, answer


# What a split costs ------------------------------------------------------------------------


def split_costs(
    model: nn.Module,
    layers: str | nn.ModuleList,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    n_client_layers: Iterable[int] | None = None,
    lora: StackedLoRA | None = None,
    adapters: Mapping[str, Tensor] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    repeats: int = 3,
) -> list[dict[str, float]]:
    """Measure what each side holds, does and sends, for every place to split at.

    Both sides run in this process, one after the other and cut apart as in two processes.

    Parameters
    ----------
    model : Module
        A Hugging Face model.
    layers : str or ModuleList
        The list of its n layers, or the module path of it.
    input_ids, attention_mask : Tensor of shape (B, L)
        The batch that is measured.
    n_client_layers : iterable of int, default=None
        Values k to measure. None: 0, ..., n - 1.
    lora : StackedLoRA, default=None
        Made from `model`. None: one of rank 8 on the usual layers, taken off at the end.
    adapters : mapping of str to Tensor of shape (C, ...), default=None
        Of `lora`. None: those of one client.
    loss : callable, default=None
        ``loss(model_output) -> Tensor ()``. None: the mean square of the first output.
    repeats : int, default=3
        Times that a step is measured, after one that is not; the fastest counts.

    Returns
    -------
    list of dict
        One a value of k: ``n_client_layers``; for each side (``client_``, ``server_``)
        ``parameters``, ``weight_bytes`` (as stored: quantised weights are packed),
        ``adapter_parameters`` (of one client), ``activation_bytes`` (kept for the backward pass
        of the batch), ``training_seconds`` and ``inference_seconds`` (of the batch); and
        ``training_bytes`` and ``inference_bytes`` that cross the boundary, both ways together,
        per sequence.

    Raises
    ------
    ValueError
        As for :meth:`SplitLM.split`.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from fedrecsk.models.split_lm import split_costs
    >>> model = BertModel(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=3,
    ...     num_attention_heads=2, intermediate_size=8)).eval()
    >>> tokens = torch.ones(2, 5, dtype=torch.long)
    >>> costs = split_costs(model, "encoder.layer", tokens, tokens, repeats=1)
    >>> [row["n_client_layers"] for row in costs], costs[-1]["server_parameters"]
    ([0, 1, 2], 0)
    """
    n_layers = len(find_layers(model, layers)[1])
    chosen = range(n_layers) if n_client_layers is None else n_client_layers
    splits = [SplitLM.split(model, layers, k) for k in chosen]
    ours = lora is None
    if lora is None:
        lora = StackedLoRA(model, rank=8, alpha=16.0)
    try:
        if adapters is None:
            adapters = lora.init(1, torch.Generator().manual_seed(0))
        leaves = {name: each.detach().requires_grad_(True) for name, each in adapters.items()}
        with lora.using(leaves):
            return [
                _costs_of(each, leaves, input_ids, attention_mask, loss or _mean_square, repeats)
                for each in splits
            ]
    finally:
        if ours:
            lora.restore()


def _costs_of(
    split: SplitLM,
    adapters: Adapters,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss: Callable[[Any], Tensor],
    repeats: int,
) -> dict[str, float]:
    """Measure one split; the adapters are in effect."""
    middle, boundary, device = cast(Middle, split.middle), split.boundary, input_ids.device
    own = dict(zip(("client", "server"), split.sides(adapters), strict=True))
    weights = [*_weights(split.client), *_weights(middle), *adapters.values()]
    server = _Meter(middle, own["server"], weights)
    split.connect(server)

    def train(kept: _Kept | None = None) -> None:
        with nullcontext() if kept is None else kept.noting():
            value = loss(split(input_ids, attention_mask))
        wanted = [*own["client"].values(), boundary.leaf]
        torch.autograd.grad(value, wanted, allow_unused=True)

    def infer() -> None:
        with torch.no_grad():
            split(input_ids, attention_mask)

    kept = _Kept(weights)
    train(kept)
    kept_bytes = {"client": kept.n_bytes(), "server": server.kept.n_bytes()}
    crossed: dict[str, float] = {}
    seconds: dict[str, dict[str, float]] = {}
    for job, work in (("training", train), ("inference", infer)):
        work()
        best = (float("inf"), 0.0)
        for _ in range(repeats):
            boundary.reset()
            server.seconds, began = 0.0, _now(device)
            work()
            best = min(best, (_now(device) - began, server.seconds))
        crossed[f"{job}_bytes"] = sum(boundary.sent.values()) / len(input_ids)
        seconds[job] = {"client": best[0] - best[1], "server": best[1]}
    row: dict[str, float] = {"n_client_layers": split.n_client_layers}
    for side, module in (("client", split.client), ("server", middle)):
        row |= {
            f"{side}_parameters": sum(each.numel() for each in module.parameters()),
            f"{side}_weight_bytes": sum(each.nbytes for each in _weights(module)),
            f"{side}_adapter_parameters": sum(each[0].numel() for each in own[side].values()),
            f"{side}_activation_bytes": kept_bytes[side],
            f"{side}_training_seconds": seconds["training"][side],
            f"{side}_inference_seconds": seconds["inference"][side],
        }
    return row | crossed


class _Meter(MiddleServer):
    """A server in this process that takes its own time and notes what it keeps."""

    def __init__(self, middle: Middle, adapters: Adapters, weights: Sequence[Tensor]) -> None:
        super().__init__(middle, adapters=adapters)
        self.kept = _Kept(weights)
        self.seconds = 0.0

    def forward(
        self, hidden: Tensor, calls: Sequence[Call], tensors: Sequence[Tensor], *, train: bool
    ) -> tuple[Tensor, int]:
        began = _now(hidden.device)
        # The inner hooks win: nothing of this is noted as the client's.
        with self.kept.noting():
            result = super().forward(hidden, calls, tensors, train=train)
        self.seconds += _now(hidden.device) - began
        return result

    def backward(self, run: int, gradient: Tensor, *, back: bool) -> Tensor | None:
        began = _now(gradient.device)
        result = super().backward(run, gradient, back=back)
        self.seconds += _now(gradient.device) - began
        return result


class _Kept:
    """Memory that autograd keeps for the backward pass, without that of the weights."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = {each.untyped_storage().data_ptr() for each in weights}
        self.storages: dict[int, int] = {}

    def noting(self) -> AbstractContextManager[Any]:
        self.storages.clear()
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def n_bytes(self) -> int:
        return sum(self.storages.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _mean_square(output: Any) -> Tensor:
    first: Tensor = output[0]
    return first.float().square().mean()


def _now(device: torch.device) -> float:
    """Read the clock when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# What crosses: few bytes and no pickles ----------------------------------------------------

MAX_HEADER = 2**20  # bytes; whatever is longer is no message of ours
MAX_TENSOR = 2**33
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def compress(tensor: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
    """Say a tensor in few bytes, without loss.

    Made for what a model hands to its layers beside the hidden states. Axes along which nothing
    changes are sent once. A tensor of two values, such as a mask, becomes bits; and a mask that
    is a pattern common to all rows (causal, sliding window) together with the padding of each row
    becomes these two in place of L x L bits a row.

    Parameters
    ----------
    tensor : Tensor

    Returns
    -------
    recipe : dict
        JSON; what :func:`expand` needs beside the parts.
    parts : list of Tensor
        What is sent.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.split_lm import compress, expand
    >>> mask = torch.ones(4, 1, 16, 16).tril() * (torch.arange(16) < torch.tensor([[16], [9],
    ...     [3], [16]]))[:, None, None]
    >>> recipe, parts = compress(mask)
    >>> sum(part.nbytes for part in parts), mask.nbytes
    (48, 4096)
    >>> bool((expand(recipe, parts) == mask).all())
    True
    """
    slim = tensor.detach()
    recipe: dict[str, Any] = {"shape": list(slim.shape), "bits": []}
    for axis in range(slim.dim() if slim.numel() else 0):
        first = slim.narrow(axis, 0, 1)
        if slim.shape[axis] > 1 and bool((slim == first).all()):
            slim = first
    if slim.numel() < 16:
        return recipe, [slim]
    high, low = slim.amax(), slim.amin()
    bits = slim == high
    if not bool((bits | (slim == low)).all()):
        return recipe, [slim]
    factors = [bits]
    if slim.dim() == 4:
        padding, pattern = bits.any(-2, keepdim=True), bits.any(0, keepdim=True)
        fewer = padding.numel() + pattern.numel() < bits.numel()
        if fewer and bool((padding & pattern == bits).all()):
            factors = [padding, pattern]
    recipe["bits"] = [list(factor.shape) for factor in factors]
    return recipe, [torch.stack([low, high]), *(_pack_bits(factor) for factor in factors)]


def expand(recipe: Mapping[str, Any], parts: Sequence[Tensor]) -> Tensor:
    """Undo :func:`compress`.

    Parameters
    ----------
    recipe : mapping
    parts : sequence of Tensor

    Returns
    -------
    Tensor
        A view, in which axes along which nothing changes take no memory.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.split_lm import compress, expand
    >>> expand(*compress(torch.full((2, 2), 7)))
    tensor([[7, 7],
            [7, 7]])
    """
    slim = parts[0]
    if recipe["bits"]:
        low, high = slim
        bits = torch.ones((), dtype=torch.bool, device=slim.device)
        for shape, packed in zip(recipe["bits"], parts[1:], strict=True):
            bits = bits & _unpack_bits(packed, shape)
        slim = torch.where(bits, high, low)
    return slim.expand(recipe["shape"])


def _pack_bits(bits: Tensor) -> Tensor:
    """Pack n booleans into ceil(n / 8) bytes."""
    flat = nn.functional.pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8))
    return (flat.reshape(-1, 8) * _bit_weights(bits.device)).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    bits = (packed[:, None] & _bit_weights(packed.device)) != 0
    return bits.flatten()[: prod(shape)].reshape(tuple(shape))


def _bit_weights(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _send(connection: Connection, header: dict[str, Any], tensors: Sequence[Tensor]) -> int:
    """Send a JSON header, then the bytes of each tensor; count all of them."""
    flat = [each.detach().contiguous().cpu() for each in tensors]
    header["tensors"] = [
        [str(each.dtype).removeprefix("torch."), list(each.shape)] for each in flat
    ]
    text = json.dumps(header).encode()
    connection.send_bytes(text)
    for each in flat:
        if each.numel():
            connection.send_bytes(each.flatten().view(torch.uint8).numpy().data)
    return len(text) + sum(each.nbytes for each in flat)


def _receive(
    connection: Connection, timeout: float | None, device: torch.device
) -> tuple[dict[str, Any], list[Tensor], int]:
    """Receive what `_send` sent, and the number of bytes."""
    if not connection.poll(timeout):
        raise TimeoutError(f"Nothing came from the client within {timeout} seconds.")
    text = connection.recv_bytes(MAX_HEADER)
    header = json.loads(text)
    if not isinstance(header, dict) or "tensors" not in header:
        raise ValueError("What came through the connection is no message of this protocol.")
    tensors = []
    n_bytes = len(text)
    for name, shape in header.pop("tensors"):
        if name not in _DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"A message announces a tensor of dtype {name} and shape {shape}.")
        size = prod(shape) * _DTYPES[name].itemsize
        if size > MAX_TENSOR:  # before memory is taken for it
            raise ValueError(f"A message announces a tensor of {size} bytes.")
        buffer = bytearray(size)
        try:
            got = connection.recv_bytes_into(buffer) if size else 0
        except BufferTooShort as error:
            got = len(error.args[0])
        if got != size:
            raise ValueError(f"A message has {got} bytes for a tensor of {size}.")
        flat = torch.frombuffer(buffer, dtype=_DTYPES[name]) if size else torch.empty(0)
        tensors.append(flat.to(device=device, dtype=_DTYPES[name]).reshape(shape))
        n_bytes += size
    return header, tensors, n_bytes


def _answer(
    server: MiddleServer, request: Mapping[str, Any], tensors: list[Tensor]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Do what a client asks."""
    for run in request["forget"]:
        server.forget(run)
    match request["do"]:
        case "hello":
            return {"paths": list(server.paths)}, []
        case "forward":
            hidden, *parts = tensors
            extras = []
            for recipe in request["extras"]:
                n_parts = 1 + len(recipe["bits"])
                extras.append(expand(recipe, parts[:n_parts]))
                parts = parts[n_parts:]
            calls = [request["calls"][which] for which in request["layers"]]
            output, run = server.forward(hidden, calls, extras, train=request["train"])
            return {"run": run}, [output]
        case "backward":
            back = server.backward(request["run"], tensors[0], back=request["back"])
            return {}, [] if back is None else [back]
        case "step":
            server.step()
            return {}, []
        case "adapters":
            return {"names": list(server.adapters)}, list(server.adapters.values())
        case "load":
            given = dict(zip(request["names"], tensors, strict=True))
            shapes = {name: each.shape for name, each in server.adapters.items()}
            if {name: each.shape for name, each in given.items()} != shapes:
                raise ValueError("Names or shapes of the adapters are not those of the server's.")
            server.load(given)
            return {}, []
        case other:
            raise ValueError(f"Unknown request {other!r}.")


# Stand-ins, and what they note -------------------------------------------------------------


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


class _Note:
    """Turns the arguments of a layer into JSON and a list of tensors, each of them once."""

    def __init__(self, hidden: Tensor, tensors: list[Tensor], path: str) -> None:
        self.hidden = hidden
        self.tensors = tensors
        self.path = path

    def value(self, value: Any, name: str = "an argument") -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if value is self.hidden:
            return {"hidden": True}
        if isinstance(value, Tensor):
            return {"tensor": self._number(value, name)}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.value(each, name) for each in value]}
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": {key: self.value(each, name) for key, each in value.items()}}
        raise ValueError(
            f"The model hands {name} to {self.path}, of type {type(value).__name__}, which cannot "
            "cross to a server: only tensors, numbers and strings can. If it is a cache of keys "
            "and values, call the model with use_cache=False."
        )

    def _number(self, tensor: Tensor, name: str) -> int:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"The model hands {name} to {self.path} and wants a gradient by it, which a "
                "server does not send back. Freeze the model before it is split."
            )
        for number, known in enumerate(self.tensors):
            if known is tensor:
                return number
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def _recall(noted: Any, hidden: Tensor, tensors: Sequence[Tensor]) -> Any:
    """Turn a noted argument into the argument again."""
    if not isinstance(noted, dict):
        return noted
    [(kind, value)] = noted.items()
    if kind == "hidden":
        return hidden
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _recall(each, hidden, tensors) for key, each in value.items()}
    several = [_recall(each, hidden, tensors) for each in value]
    return tuple(several) if kind == "tuple" else several


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


def find_layers(model: nn.Module, layers: str | nn.ModuleList) -> tuple[str, nn.ModuleList]:
    """Find the list of layers, and its module path."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    for name, each in lists.items():
        if each is layers or name == layers:
            return name, each
    wanted = repr(layers) if isinstance(layers, str) else "the given ModuleList"
    raise ValueError(
        f"{type(model).__name__} has no list of layers {wanted}; it has "
        f"{', '.join(map(repr, lists)) or 'none'}."
    )


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


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Give the hidden states that a layer is called with."""
    return cast(Tensor, args[0] if args else kwargs["hidden_states"])


def hidden_of(output: Any) -> Tensor:
    """Give the hidden states that a layer returns."""
    if not isinstance(output, tuple):
        return cast(Tensor, output)
    if any(each is not None for each in output[1:]):
        raise ValueError(
            "A layer returned more than its hidden states, which a split model cannot pass on. "
            "Turn off output_attentions and use_cache."
        )
    return cast(Tensor, output[0])


def _listed(paths: Sequence[str]) -> str:
    """Name a run of layers by its ends."""
    if not paths:
        return "no layers"
    return paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
