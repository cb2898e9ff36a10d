"""The middle layers of a split model, and who runs them: what a server holds.

    client  sends h_k, and how the model calls each layer
    server  runs layers k ... n - 2 of h_k, answers with h_(n-1)
    client  sends dloss/dh_(n-1)
    server  adds up the gradients of the adapters of its layers, answers with dloss/dh_k

How a layer is called is noted on the client's side, as JSON in which tensors are numbers
(:class:`Note`), and recalled on the server's, so that a model may treat its layers differently.
The client's side is in :mod:`fedrecsk.models.split_lm`, which begins with the method as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedrecsk.models.stacked_lora import Adapters, StackedLoRA

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
    >>> from fedrecsk.models.split_middle import Middle
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
            How each layer is called, as a :class:`Note` notes it.
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
            args = [recall(each, hidden, tensors) for each in call["args"]]
            kwargs = {name: recall(each, hidden, tensors) for name, each in call["kwargs"].items()}
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
    >>> from fedrecsk.models.split_middle import take_middle
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


# The server -------------------------------------------------------------------------------


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
    >>> from fedrecsk.models.split_middle import Middle, MiddleServer
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


# How a layer is called --------------------------------------------------------------------


class Note:
    """Turns the arguments of a layer into JSON and a list of tensors, each of them once."""

    def __init__(self, hidden: Tensor, tensors: list[Tensor], path: str) -> None:
        self.hidden = hidden
        self.tensors = tensors
        self.path = path

    def value(self, value: Any, name: str = "an argument") -> Any:
        """Note one argument; `recall` undoes it."""
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


def recall(noted: Any, hidden: Tensor, tensors: Sequence[Tensor]) -> Any:
    """Turn what a :class:`Note` noted into the argument again."""
    if not isinstance(noted, dict):
        return noted
    [(kind, value)] = noted.items()
    if kind == "hidden":
        return hidden
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: recall(each, hidden, tensors) for key, each in value.items()}
    several = [recall(each, hidden, tensors) for each in value]
    return tuple(several) if kind == "tuple" else several
