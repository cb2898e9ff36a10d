"""The state of an unfinished fit in a folder, from which it goes on to the same result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedrecsk.engine.rounds import Record

TENSORS, RECORD = "state.safetensors", "state.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a fit stands after a round.

    Attributes
    ----------
    tensors : dict of str to Tensor
        The state.
    history : list of dict
        Records of the rounds so far.
    """

    tensors: dict[str, Tensor]
    history: list[Record]


def fingerprint(settings: Mapping[str, object], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hash what a fit depends on: a checkpoint of another fit must not be taken up.

    Parameters
    ----------
    settings : mapping of str to JSON-like values
    arrays : mapping of str to ndarray

    Returns
    -------
    str
        64 hexadecimal digits.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.checkpoints import fingerprint
    >>> one = fingerprint({"rank": 8}, {"user": np.arange(3)})
    >>> one == fingerprint({"rank": 8}, {"user": np.arange(3)}), len(one)
    (True, 64)
    >>> one == fingerprint({"rank": 4}, {"user": np.arange(3)})
    False
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype == object:
            array = array.astype(str)
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, mark: str) -> None:
    """Write a checkpoint; a fit that is killed while it writes leaves the one before.

    Parameters
    ----------
    folder : str or Path
        Made if it is not there.
    checkpoint : Checkpoint
    mark : str
        From `fingerprint`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = len(checkpoint.history)
    name = f"{done}.{TENSORS}"
    # Clones, since parts of a state may share their memory, which the format refuses.
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in checkpoint.tensors.items()
    }
    save_file(tensors, folder / f"{name}.part")
    os.replace(folder / f"{name}.part", folder / name)
    # The record names its tensors: whichever of them is on disk, the two belong together.
    record = {"mark": mark, "tensors": name, "history": checkpoint.history}
    text = json.dumps(record)
    part = folder / f"{RECORD}.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, folder / RECORD)
    for old in folder.glob(f"[0-9]*.{TENSORS}"):
        if old.name != name:
            old.unlink()


def load_checkpoint(folder: str | Path, mark: str) -> Checkpoint | None:
    """Read the checkpoint of the same fit, if there is one.

    Parameters
    ----------
    folder : str or Path
    mark : str
        From `fingerprint`.

    Returns
    -------
    Checkpoint or None
        None where the folder has no checkpoint.

    Raises
    ------
    ValueError
        If the checkpoint is of another fit, or damaged.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        theirs, name, history = record["mark"], str(record["tensors"]), list(record["history"])
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    if theirs != mark:
        raise ValueError(
            f"The checkpoint in {folder} is of a fit with other data, parameters or random state. "
            "Give the same ones to go on with it, or another folder, or remove it to start anew."
        )
    if Path(name).name != name or not (folder / name).is_file():
        raise ValueError(
            f"The checkpoint in {folder} names {name!r}, which is not there. Remove the folder to "
            "start anew."
        )
    try:
        return Checkpoint(load_file(folder / name), history)
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"The checkpoint in {folder} cannot be read ({type(error).__name__}: {error}). Remove the "
        "folder to start anew."
    )
