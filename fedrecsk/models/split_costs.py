"""What a split of a language model costs: memory, seconds and bytes, for every place to split at.

Both sides run in one process, cut apart as in two: the server's time and memory are noted where
the client calls it, and what is left is the client's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedrecsk.models.split_lm import SplitLM
from fedrecsk.models.split_middle import Call, Middle, MiddleServer, find_layers
from fedrecsk.models.stacked_lora import Adapters, StackedLoRA


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
    >>> from fedrecsk.models.split_costs import split_costs
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
