"""The adapters of clients as files in the format of the library PEFT.

    folder/
        clients.json                       ids, folders and names of the layers, in their order
        client-7/
            adapter_config.json            rank, alpha, which layers, of which model
            adapter_model.safetensors      lora_A and lora_B of each layer
        client-8/ ...

Every client's folder is complete in itself: ``PeftModel.from_pretrained(model, folder)`` reads it.
Nothing that is read can run code: the files are JSON and plain numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.models.stacked_lora import Adapters

_INDEX, _CONFIG, _WEIGHTS = "clients.json", "adapter_config.json", "adapter_model.safetensors"
_VERSION = 1
# What PEFT puts in front of the path of a layer.
_PREFIX = "base_model.model."
# Kinds of adapters that PEFT has and that are not B A alone.
_NOT_PLAIN = ("alpha_pattern", "lora_bias", "modules_to_save", "rank_pattern", "use_dora")
_NUMBERS = re.compile(r"(u?int(8|16|32|64)|float(16|32|64))")


class Settings(TypedDict):
    """What is known of adapters beside their numbers; `save_adapters` takes them by these names.

    Attributes
    ----------
    base_model : str or None
    rank : int
    alpha : float
    dropout : float
    targets : tuple of str
    task_type : str or None
    fan_in_fan_out : bool
    """

    base_model: str | None
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    task_type: str | None
    fan_in_fan_out: bool


def save_adapters(
    folder: str | os.PathLike[str],
    adapters: Mapping[str, Tensor],
    clients: Sequence[object] | NDArray[Any],
    *,
    base_model: str | None,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
) -> list[Path]:
    """Write every client's adapter into a folder of its own, in PEFT's format.

    Parameters
    ----------
    folder : str or path
        Made if missing. Clients that are there already are written over; folders of other clients
        stay, but the index no longer names them.
    adapters : mapping of name to Tensor of shape (C, ...)
        ``"<path>.lora_A"`` (C, r, in) and ``"<path>.lora_B"`` (C, out, r).
    clients : sequence of C ids
        Distinct ints, floats or strings, all of one kind. Their folders are called
        ``client-<id>``; an id that would make no safe name gets another, with a hash of it.
    base_model : str or None
        Name or path of the model that the adapters are for.
    rank : int
    alpha : float
    dropout : float
    targets : sequence of str
        Names or paths of the adapted layers, such as `StackedLoRA.targets`.
    task_type : str, optional
        As PEFT calls it, such as ``"CAUSAL_LM"`` or ``"FEATURE_EXTRACTION"``.
    fan_in_fan_out : bool, default=False
        `StackedLoRA.fan_in_fan_out` of the model.

    Returns
    -------
    list of Path
        The clients' folders.

    Raises
    ------
    ValueError
        If the ids are repeated, not one a client or of no such kind, or if the names and shapes of
        the adapters do not fit `targets` and `rank`. Nothing has been written then.

    Notes
    -----
    All files are written aside and moved to their places one by one, the index last.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> import torch
    >>> from fedrecsk.models.adapter_files import load_adapters, save_adapters
    >>> adapters = {"q.lora_A": torch.ones(2, 1, 4), "q.lora_B": torch.zeros(2, 3, 1)}
    >>> about = {"base_model": None, "rank": 1, "alpha": 2.0, "dropout": 0.0, "targets": ("q",)}
    >>> with TemporaryDirectory() as folder:
    ...     paths = save_adapters(folder, adapters, ["games", "films"], **about)
    ...     again, clients, settings = load_adapters(folder)
    >>> [path.name for path in paths], clients.tolist(), settings["rank"]
    (['client-games', 'client-films'], ['games', 'films'], 1)
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    layers = _layers(adapters, rank, source="The adapters")
    for path in layers:
        if not any(path == name or path.endswith(f".{name}") for name in targets):
            raise ValueError(f"There are adapters of {path!r}, which targets={targets!r} miss.")
    ids, dtype = _plain_ids(clients)
    n_clients = len(next(iter(adapters.values())))
    if len(ids) != n_clients:
        raise ValueError(f"Got {len(ids)} client ids for the adapters of {n_clients} clients.")
    names = [_folder_name(own) for own in ids]
    config = LoraConfig(
        r=rank,
        # PEFT declares an int here but only divides by the rank; an int keeps its files as usual.
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        base_model_name_or_path=base_model,
        task_type=task_type,
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )
    # Not through the constructor, which makes a set of it: its order changes with the process.
    config.target_modules = sorted(targets)
    index = {
        "version": _VERSION,
        "dtype": dtype,
        "layers": layers,
        "clients": [{"id": i, "folder": name} for i, name in zip(ids, names, strict=True)],
    }
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=root) as aside:
        for client, name in enumerate(names):
            config.save_pretrained(os.path.join(aside, name))
            own = {
                _key(entry): value[client].detach().cpu().contiguous()
                for entry, value in adapters.items()
            }
            save_file(own, os.path.join(aside, name, _WEIGHTS), metadata={"format": "pt"})
        written = Path(aside, _INDEX)
        written.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for name in names:
            (root / name).mkdir(exist_ok=True)
            for file in (_WEIGHTS, _CONFIG):
                os.replace(Path(aside, name, file), root / name / file)
        os.replace(written, root / _INDEX)
    return [root / name for name in names]


def load_adapters(folder: str | os.PathLike[str]) -> tuple[Adapters, NDArray[Any], Settings]:
    """Read the adapters that `save_adapters` wrote.

    Parameters
    ----------
    folder : str or path

    Returns
    -------
    adapters : dict of Tensor of shape (C, ...)
        float32, on the CPU.
    clients : ndarray of shape (C,)
        Ids as they were given.
    settings : dict
        `Settings`: ``base_model, rank, alpha, dropout, targets, task_type, fan_in_fan_out``.

    Raises
    ------
    FileNotFoundError
        If the folder, its index, or a file that the index names is missing.
    ValueError
        If a file is damaged, holds numbers that are not finite, lies outside of the folder, or
        does not agree with the others.
    """
    root = Path(folder).resolve()
    layers, ids, names = _read_index(root)
    settings: list[Settings] = []
    stacked: dict[str, list[Tensor]] = {}
    for name in names:
        config, weights = f"{name}/{_CONFIG}", f"{name}/{_WEIGHTS}"
        settings.append(_settings(_read_json(_inside(root, name, _CONFIG)), source=config))
        _refuse_difference(settings[0], settings[-1], config, first=names[0])
        adapter = _read_weights(_inside(root, name, _WEIGHTS), layers, source=weights)
        alone = {entry: value[None] for entry, value in adapter.items()}
        _layers(alone, settings[0]["rank"], source=weights)
        for entry, value in adapter.items():
            stacked.setdefault(entry, []).append(value)
        expected = {entry: tuple(values[0].shape) for entry, values in stacked.items()}
        shapes = {entry: tuple(value.shape) for entry, value in adapter.items()}
        _refuse_difference(expected, shapes, weights, first=names[0])
    return {entry: torch.stack(values) for entry, values in stacked.items()}, ids, settings[0]


def _refuse_difference(
    expected: Mapping[str, object], found: Mapping[str, object], source: str, *, first: str
) -> None:
    """Refuse a client whose settings or shapes are not those of the first client."""
    for key, value in found.items():
        if value != expected[key]:
            raise ValueError(
                f"{source} has {value!r} for {key}, but the first client, {first}, has "
                f"{expected[key]!r}; the adapters of all clients must be alike."
            )


# Client ids -------------------------------------------------------------------------------


def _plain_ids(clients: Sequence[object] | NDArray[Any]) -> tuple[list[int | float | str], str]:
    """Return ids as JSON has them, and the dtype that brings them back."""
    ids: list[Any] = [
        value.item() if isinstance(value, np.generic) else value
        for value in (clients if isinstance(clients, np.ndarray) else list(clients))
    ]
    kinds = {type(value) for value in ids}
    if len(kinds) != 1 or not kinds <= {int, float, str}:
        names = sorted(kind.__name__ for kind in kinds) or "none"
        raise ValueError(f"Client ids must be ints, floats or strings, of one kind; got {names}.")
    if any(value != value for value in ids):
        raise ValueError("A client id is not a number (nan), which cannot be found again.")
    if len(set(ids)) < len(ids):
        twice = next(value for value in ids if ids.count(value) > 1)
        raise ValueError(f"The client id {twice!r} comes more than once.")
    array = clients if isinstance(clients, np.ndarray) else np.asarray(ids)
    if array.dtype.kind == "O":
        return ids, "object"
    return ids, "str" if kinds == {str} else array.dtype.name


def _folder_name(client: object) -> str:
    """Name a client's folder: the id where it is a safe name on every system, else a hash.

    Capitals are not, since some systems do not tell them apart.
    """
    text = str(client)
    if len(text) <= 64 and re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", text):
        return f"client-{text}"
    readable = re.sub(r"[^a-z0-9]+", "-", text.lower())[:32].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    # A tilde is in no id that is its own name, so the two kinds cannot meet.
    return f"client-{readable}~{digest}"


# Reading ----------------------------------------------------------------------------------


def _key(entry: str) -> str:
    """Return PEFT's name of an entry, such as base_model.model.<path>.lora_A.weight."""
    return f"{_PREFIX}{entry}.weight"


def _layers(adapters: Mapping[str, Tensor], rank: int, *, source: str) -> list[str]:
    """Check that adapters are pairs A (C, r, in) and B (C, out, r); list their layers."""
    paths = [entry.removesuffix(".lora_A") for entry in adapters if entry.endswith(".lora_A")]
    pairs = {f"{path}.{part}" for path in paths for part in ("lora_A", "lora_B")}
    if not paths or adapters.keys() != pairs:
        odd = sorted(adapters.keys() ^ pairs)
        raise ValueError(f"{source} must be pairs of lora_A and lora_B; got {odd or 'none'}.")
    n_clients = len(adapters[f"{paths[0]}.lora_A"])
    for path in paths:
        A, B = adapters[f"{path}.lora_A"], adapters[f"{path}.lora_B"]
        if A.dim() != 3 or B.dim() != 3 or len(A) != n_clients or len(B) != n_clients:
            raise ValueError(f"{source} of {path} are not matrices, one for every client.")
        if A.shape[1] != rank or B.shape[2] != rank:
            raise ValueError(
                f"{source} of {path} have the shapes {tuple(A.shape[1:])} and "
                f"{tuple(B.shape[1:])}, which are not of rank {rank}."
            )
    return paths


def _inside(root: Path, *parts: str) -> Path:
    """Return a file of the folder; refuse one that links lead out of it."""
    path = root.joinpath(*parts).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{'/'.join(parts)} leads out of {root}; it is not read.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is {root} a folder of save_adapters?")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(found).__name__}, no object.")
    return found


def _read_index(root: Path) -> tuple[list[str], NDArray[Any], list[str]]:
    """Return the paths of the layers, the client ids, and the clients' folders."""
    path = _inside(root, _INDEX)
    index = _read_json(path)
    if index.get("version") != _VERSION:
        raise ValueError(
            f"{path} has the version {index.get('version')!r}; this release reads {_VERSION}."
        )
    try:
        layers = [str(layer) for layer in index["layers"]]
        entries = [(entry["id"], entry["folder"]) for entry in index["clients"]]
        plain, _ = _plain_ids([own for own, _ in entries])
        ids = np.array(plain, dtype=_id_dtype(index["dtype"], plain))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {error!r}.") from error
    folders = [_folder_name(own) for own in plain]
    for (own, given), expected in zip(entries, folders, strict=True):
        # So that a name from a file is never a path to somewhere else.
        if given != expected:
            raise ValueError(
                f"{path} has the folder {given!r} for the client {own!r}; expected {expected!r}."
            )
    return layers, ids, folders


def _id_dtype(name: object, ids: Sequence[int | float | str]) -> np.dtype[Any]:
    """Return the dtype of ids by its name in the index."""
    if name == "object":
        return np.dtype(object)
    if isinstance(name, str) and isinstance(ids[0], str) and name == "str":
        return np.asarray(ids).dtype
    if isinstance(name, str) and not isinstance(ids[0], str) and _NUMBERS.fullmatch(name):
        return np.dtype(name)
    raise ValueError(f"ids such as {ids[0]!r} cannot be of the dtype {name!r}")


def _settings(config: Mapping[str, Any], *, source: str) -> Settings:
    """Take out of PEFT's description of an adapter what concerns a plain one."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{source} is of the type {config.get('peft_type')!r}; expected 'LORA'.")
    odd = {key: config[key] for key in _NOT_PLAIN if config.get(key)}
    if config.get("bias", "none") != "none":
        odd["bias"] = config["bias"]
    if config.get("use_rslora"):
        odd["use_rslora"] = True
    if odd:
        raise ValueError(f"{source} has {odd}; only plain adapters, B A, can be read.")
    if not isinstance(config.get("target_modules"), list):
        raise ValueError(f"{source} has no list of target_modules; it must name the layers.")
    try:
        found = Settings(
            base_model=config["base_model_name_or_path"],
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config["lora_dropout"]),
            targets=tuple(config["target_modules"]),
            task_type=config["task_type"],
            fan_in_fan_out=bool(config["fan_in_fan_out"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{source} is damaged: {error!r}.") from error
    if not (math.isfinite(found["alpha"]) and math.isfinite(found["dropout"])):
        raise ValueError(f"{source} is damaged: lora_alpha or lora_dropout is not finite.")
    return found


def _read_weights(path: Path, layers: Sequence[str], *, source: str) -> Adapters:
    """Read one client's adapter, in the order of the layers."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{source} is damaged: {error}.") from error
    entries = [f"{layer}.{part}" for layer in layers for part in ("lora_A", "lora_B")]
    if found.keys() != {_key(entry) for entry in entries}:
        odd = sorted(found.keys() ^ {_key(entry) for entry in entries})
        raise ValueError(
            f"{source} does not hold the layers that {_INDEX} names: {len(odd)} entries are "
            f"missing or too many, such as {odd[0]!r}."
        )
    adapter = {entry: found[_key(entry)].to(torch.float32) for entry in entries}
    spoiled = [entry for entry, value in adapter.items() if not value.isfinite().all()]
    if spoiled:
        raise ValueError(
            f"{source} is damaged: {spoiled[0]} has numbers that are not finite, which every "
            "prediction would take over."
        )
    return adapter
