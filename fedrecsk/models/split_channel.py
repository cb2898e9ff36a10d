"""A split model in two processes: a server that answers a client over a connection.

    server process      serve_middle(connection, middle, ...)
    client process      split.connect(RemoteMiddle(connection))

Messages are JSON and bytes of tensors, and nothing is unpickled. Masks and positions that layers
need beside the hidden states are said in few bytes (:func:`compress`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from multiprocessing import BufferTooShort
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from fedrecsk.models.split_middle import Call, Middle, MiddleServer
from fedrecsk.models.stacked_lora import Adapters, StackedLoRA

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


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
        As for :class:`~fedrecsk.models.split_middle.MiddleServer`.
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

    Hand it to :meth:`fedrecsk.models.split_lm.SplitLM.connect`. It closes at the end of a ``with``
    block.

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
    >>> from fedrecsk.models.split_channel import compress, expand
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
    >>> from fedrecsk.models.split_channel import compress, expand
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
