"""A state as JSON and named tensors, and back: nothing in them is code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

# What JSON has no words for is an object with one of these keys.
TENSOR, ARRAY, TUPLE, FIELDS, FLOAT = "$tensor", "$array", "$tuple", "$fields", "$float"
STRIDES = "strides"


def dismantle(value: object) -> tuple[Any, dict[str, Tensor]]:
    """Take a state apart.

    Parameters
    ----------
    value : object
        A tree of dataclasses, dicts with text keys, tuples and lists, and in it tensors, NumPy
        arrays of numbers, numbers, text and None.

    Returns
    -------
    plan
        For ``json.dumps``. One tensor in two places is one tensor in the plan.
    tensors : dict of str to Tensor
        Contiguous copies in the memory of the CPU, by their places in the tree.

    Raises
    ------
    TypeError
        If something else is in the tree.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.snapshots import dismantle
    >>> plan, tensors = dismantle({"loss": 0.5, "table": torch.zeros(2, 3)})
    >>> plan, list(tensors)
    ({'loss': 0.5, 'table': {'$tensor': 'table'}}, ['table'])
    """
    tensors: dict[str, Tensor] = {}
    return _plan(value, "", tensors, {}), tensors


def _plan(value: Any, name: str, tensors: dict[str, Tensor], known: dict[int, str]) -> Any:
    """Describe what is at a place in the tree; `known` are the names of tensors seen before."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {FLOAT: repr(value)}
    if isinstance(value, Tensor | np.ndarray):
        return _plan_of_tensor(value, name, tensors, known)

    def plan_of(key: str, part: Any) -> Any:
        return _plan(part, f"{name}.{key}" if name else key, tensors, known)

    if is_dataclass(value) and not isinstance(value, type):
        return {FIELDS: {f.name: plan_of(f.name, getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, dict):
        if strange := [key for key in value if not isinstance(key, str) or key[:1] == "$"]:
            raise TypeError(f"{name} has the key {strange[0]!r}, which cannot be saved.")
        return {key: plan_of(key, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [plan_of(str(place), part) for place, part in enumerate(value)]
        return parts if isinstance(value, list) else {TUPLE: parts}
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be saved.")


def _plan_of_tensor(
    value: Any, name: str, tensors: dict[str, Tensor], known: dict[int, str]
) -> dict[str, Any]:
    """Put a tensor or an array among the tensors, if it is not there yet."""
    is_array = isinstance(value, np.ndarray)
    if id(value) not in known:
        while name in tensors:  # "a.b" of one dict and "b" in the "a" of another
            name += "'"
        known[id(value)] = name
        tensor = torch.from_numpy(np.ascontiguousarray(value)) if is_array else value.detach()
        # ascontiguousarray makes one axis out of none.
        tensor = tensor.reshape(value.shape)
        tensors[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    plan: dict[str, Any] = {ARRAY if is_array else TENSOR: known[id(value)]}
    # Sums and products round as the layout in memory has it, so the layout belongs to the state.
    if not is_array and not value.is_contiguous() and 0 not in value.stride():
        plan[STRIDES] = list(value.stride())
    return plan


def assemble(plan: Any, tensors: Mapping[str, Tensor], like: Any) -> Any:
    """Put a state together again.

    Parameters
    ----------
    plan, tensors
        From `dismantle`.
    like : object
        A state of the same structure. It gives the classes, and the devices of the tensors. What
        is None in it may be anything in the plan.

    Returns
    -------
    object
        On memory of its own.

    Raises
    ------
    ValueError
        If the structure, a shape or a type is another than that of `like`; names the place.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.engine.snapshots import assemble, dismantle
    >>> assemble(*dismantle({"x": torch.ones(2), "n": 3}), like={"x": torch.zeros(2), "n": 0})
    {'x': tensor([1., 1.]), 'n': 3}
    """
    return _Assembly(tensors).of(plan, like, None, torch.device("cpu"), "state")


class _Assembly:
    """Tensors, and those that are in their places already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[tuple[str, str], Any] = {}

    def of(self, plan: Any, like: Any, kind: type | None, device: torch.device, name: str) -> Any:
        """Build what a plan describes; `kind` is the dataclass where `like` is None."""
        tag = (
            next((key for key in plan if key[:1] == "$"), None) if isinstance(plan, dict) else None
        )
        if tag in (TENSOR, ARRAY):
            return self._tensor(plan, tag, like, device, name)
        if isinstance(like, Tensor | np.ndarray):
            raise _other(name, "no tensor", _form(like))
        if tag == FIELDS:
            return self._dataclass(plan[FIELDS], like, kind, device, name)
        if is_dataclass(like):
            raise _other(name, "no fields", type(like).__name__)
        if tag == FLOAT:
            return float(plan[FLOAT])
        if tag == TUPLE:
            wanted = like if isinstance(like, tuple) else [None] * len(plan[TUPLE])
            if len(wanted) != len(plan[TUPLE]):
                raise _other(name, f"{len(plan[TUPLE])} parts", f"{len(wanted)}")
            pairs = enumerate(zip(plan[TUPLE], wanted, strict=True))
            return tuple(self.of(p, w, None, device, f"{name}.{n}") for n, (p, w) in pairs)
        if isinstance(plan, list):
            return [self.of(p, None, None, device, f"{name}.{n}") for n, p in enumerate(plan)]
        if not isinstance(plan, dict):
            return plan
        inside = like if isinstance(like, dict) else dict.fromkeys(plan)
        if plan.keys() != inside.keys():
            raise _other(name, f"the keys {sorted(plan)}", f"{sorted(inside)}")
        return {k: self.of(p, inside[k], None, device, f"{name}.{k}") for k, p in plan.items()}

    def _dataclass(
        self, plan: Any, like: Any, kind: type | None, device: torch.device, name: str
    ) -> Any:
        """Build an object of the class of `like`, or of `kind`."""
        cls = kind if like is None else type(like)
        if cls is None or not is_dataclass(cls) or {f.name for f in fields(cls)} != plan.keys():
            raise _other(name, f"the fields {sorted(plan)}", getattr(cls, "__name__", "others"))
        parts = {key: getattr(like, key, None) for key in plan}
        device = next((p.device for p in parts.values() if isinstance(p, Tensor)), device)
        return cls(
            **{
                key: self.of(plan[key], part, _kind_of_field(cls, key), device, f"{name}.{key}")
                for key, part in parts.items()
            }
        )

    def _tensor(
        self, plan: dict[str, Any], tag: str, like: Any, device: torch.device, name: str
    ) -> Any:
        """Give a tensor or an array its own, aligned memory, laid out as it was."""
        saved = self._tensors[plan[tag]]
        made = self._made.get((tag, plan[tag]))
        if made is None and tag == ARRAY:
            made = saved.clone().numpy()
        elif made is None:
            where = like.device if isinstance(like, Tensor) else device
            strides = plan.get(STRIDES)
            if strides is None:
                made = torch.empty_like(saved, device=where)
            else:
                made = torch.empty_strided(saved.shape, strides, dtype=saved.dtype, device=where)
            made.copy_(saved)
        self._made[tag, plan[tag]] = made
        if like is not None and _form(like) != _form(made):
            raise _other(name, _form(made), _form(like))
        return made


def _kind_of_field(owner: type, field: str) -> type | None:
    """Find the dataclass in an annotation such as ``PrivateModels | None``."""
    kinds: list[type] = list(get_args(get_type_hints(owner)[field]))
    return next((kind for kind in kinds if is_dataclass(kind)), None)


def _form(value: Any) -> str:
    if not isinstance(value, Tensor | np.ndarray):
        return type(value).__name__
    kind = "array" if isinstance(value, np.ndarray) else "tensor"
    return f"{kind} {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _other(name: str, there: str, here: str) -> ValueError:
    return ValueError(f"{name} has {there} there and {here} here")
