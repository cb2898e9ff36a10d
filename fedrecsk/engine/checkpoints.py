"""The state of an unfinished fit in a folder, from which it goes on to the same result.

Two files. ``state.json`` has everything but the numbers of tensors: the configuration of the fit,
its history and what the state is made of. It names the safetensors file that belongs to it. Each
checkpoint brings a file of a new name, and replacing ``state.json`` is what makes it count; so
whenever a fit is killed, one whole checkpoint is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedrecsk.engine.rounds import Progress
from fedrecsk.engine.snapshots import assemble, dismantle

State = TypeVar("State")

TENSORS, RECORD = "state.safetensors", "state.json"
# Of the files; to be raised whenever older ones can no longer be read.
FORMAT = 2
# Settings longer than this, as JSON, are told apart by their hash.
LONGEST_SETTING = 200


class Checkpoints:
    """The checkpoints of one fit, in a folder of its own.

    Parameters
    ----------
    folder : str or Path
        Made if it is not there.
    settings : mapping of str to object
        Parameters that the result depends on; see `describe` for what they may be.
    data : mapping of str to object
        Parts of the data by a plural, such as ``"interactions"``; see `fingerprint`.
    every : int, default=1
        Rounds between two checkpoints.

    Raises
    ------
    ValueError
        If the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, object],
        data: Mapping[str, object],
        *,
        every: int = 1,
    ) -> None:
        self.folder = Path(folder)
        self.every = every
        self._settings = {name: describe(value) for name, value in settings.items()}
        self._data = {part: fingerprint(value) for part, value in data.items()}
        # The safetensors file of the last checkpoint that this object has read or written.
        self._last: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"checkpoint must be a folder that can be written to; {self.folder} cannot be "
                f"({type(error).__name__}: {error}). Give another one."
            ) from error

    def identify(self, part: str, value: object) -> None:
        """Count one more part among the data of the fit."""
        self._data[part] = fingerprint(value)

    def load(self, start: State, n_rounds: int) -> Progress[State] | None:
        """Read where the fit stands.

        Parameters
        ----------
        start
            The state before the first round, of the same structure and on the device to be used.
        n_rounds : int
            Rounds of the fit.

        Returns
        -------
        Progress or None
            None where the folder has no checkpoint.

        Raises
        ------
        ValueError
            If the checkpoint is of another fit, says in what; or has more rounds, or is damaged.
        """
        if not (self.folder / RECORD).is_file():
            return None
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            found, name, plan = record["format"], str(record["tensors"]), record["progress"]
            theirs = {part: dict(record[part]) for part in ("settings", "data", "versions")}
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise self._unreadable(error) from error
        if found != FORMAT:
            raise ValueError(
                f"The checkpoint in {self.folder} is in format {found!r}, and this version of "
                f"fedrecsk reads format {FORMAT}. Remove the folder to start anew."
            )
        self._check_same_fit(theirs)
        if Path(name).name != name or not _is_file(self.folder / name):
            raise ValueError(
                f"The checkpoint in {self.folder} names {name!r}, which is not there. Remove the "
                "folder to start anew."
            )
        progress = self._assembled(plan, name, start)
        if record.get("sums") != self._sums(plan, name):
            raise self._unreadable(ValueError("its checksums are not those of what was written"))
        if len(progress.history) > n_rounds:
            raise ValueError(
                f"The checkpoint in {self.folder} is {len(progress.history)} rounds on, and "
                f"n_rounds={n_rounds}. Raise n_rounds, or give another folder."
            )
        self._last = name
        return progress

    def _check_same_fit(self, theirs: dict[str, dict[str, Any]]) -> None:
        """Refuse a checkpoint of another configuration, and say what is other."""
        found = setting_differences(theirs["settings"], self._settings)
        parts = sorted(
            part
            for part in self._data.keys() | theirs["data"].keys()
            if self._data.get(part) != theirs["data"].get(part)
        )
        if parts:
            found.append(f"the {' and the '.join(parts)} differ")
        if not found:
            return
        versions = setting_differences(theirs["versions"], library_versions())
        if versions:
            found.append(f"and it was written by another version, {', '.join(versions)}")
        raise ValueError(
            f"The checkpoint in {self.folder} is of another fit than this one: "
            f"{'; '.join(found)}. Give the same data and parameters to go on with it, or give "
            "another folder, or remove it to start anew."
        )

    def _assembled(self, plan: Any, name: str, start: State) -> Progress[State]:
        """Read the tensors and put the state together."""
        like = Progress(start, start, 0.0, 0, [])
        try:
            tensors = load_file(self.folder / name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(error) from error
        try:
            progress: Progress[State] = assemble(plan, tensors, like)
            len(progress.history)
        except ValueError as error:
            raise ValueError(
                f"The checkpoint in {self.folder} is of another model, though data and parameters "
                f"are the same: {error}. Files that a parameter names, such as a backbone's, may "
                "have changed, or the version of fedrecsk. Remove the folder to start anew."
            ) from error
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise self._unreadable(error) from error
        return progress

    def save(self, progress: Progress[Any]) -> None:
        """Write a checkpoint; a fit that is killed while it writes leaves the one before.

        Parameters
        ----------
        progress : Progress

        Raises
        ------
        RuntimeError
            If another fit has written into the folder meanwhile.
        """
        self._check_alone()
        plan, tensors = dismantle(progress)
        name = f"{len(progress.history)}-{secrets.token_hex(4)}.{TENSORS}"
        record = {
            "format": FORMAT,
            "versions": library_versions(),
            "settings": self._settings,
            "data": self._data,
            "tensors": name,
            "progress": plan,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put(name, lambda part: save_file(tensors, part))
        text = json.dumps({**record, "sums": self._sums(plan, name)}, allow_nan=False)
        self._put(RECORD, lambda part: part.write_text(text, encoding="utf-8"))
        self._last = name
        # Also what fits left that were killed while they wrote.
        for old in self.folder.glob(f"[0-9]*-*.{TENSORS}*"):
            if old.name != name:
                with contextlib.suppress(OSError):  # in use on Windows: the next time, then
                    old.unlink()

    def _sums(self, plan: Any, name: str) -> dict[str, str]:
        """Hash what makes up the state: a bit that flips on a disk must not become another fit."""
        with (self.folder / name).open("rb") as file:
            tensors = hashlib.file_digest(file, "sha256").hexdigest()
        text = json.dumps(plan, sort_keys=True)
        return {"tensors": tensors, "progress": hashlib.sha256(text.encode()).hexdigest()}

    def _put(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file beside its place, and move it there when all of it is on the disk."""
        part = self.folder / f"{name}.part"
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, self.folder / name)
        _sync_names(self.folder)

    def _check_alone(self) -> None:
        """Refuse to write over the checkpoint of a fit that runs at the same time."""
        try:
            text = (self.folder / RECORD).read_text(encoding="utf-8")
            found = json.loads(text)["tensors"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._unreadable(error) from error
        if found != self._last:
            raise RuntimeError(
                f"Another fit writes its checkpoints into {self.folder}. Give every fit a folder "
                "of its own."
            )

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(
            f"The checkpoint in {self.folder} cannot be read ({type(error).__name__}: {error}). "
            "Remove the folder to start anew."
        )


def _is_file(path: Path) -> bool:
    """Say whether there is a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can tell."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def library_versions() -> dict[str, str]:
    """Give the versions that may decide over the last bits of a result."""
    try:
        own = importlib.metadata.version("fedrecsk")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        own = "unknown"
    return {"fedrecsk": own, "torch": str(torch.__version__), "numpy": np.__version__}


def setting_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ, with both values.

    Examples
    --------
    >>> from fedrecsk.engine.checkpoints import setting_differences
    >>> setting_differences({"l2": 0.1, "cv": 5}, {"l2": 0.5, "cv": 5, "gate": True})
    ['gate: not set there, True here', 'l2: 0.1 there, 0.5 here']
    """
    found = []
    for name in sorted(theirs.keys() | ours.keys()):
        # As text, since 1 client is not the share 1.0 of them.
        there, here = (
            json.dumps(side[name], sort_keys=True) if name in side else None
            for side in (theirs, ours)
        )
        if there == here:
            continue
        values = [repr(side[name]) if name in side else "not set" for side in (theirs, ours)]
        is_long = any(isinstance(side.get(name), dict) for side in (theirs, ours))
        values_said = f"{name}: {values[0]} there, {values[1]} here"
        found.append(f"{name}: other values" if is_long else values_said)
    return found


def describe(value: object) -> Any:
    """Turn a parameter into JSON by which it can be told from others.

    Parameters
    ----------
    value : object
        None, text, a number, a path, a mapping, anything that becomes an array of such values,
        or a function, which goes by its name.

    Returns
    -------
    JSON value
        Long ones become their hash.

    Examples
    --------
    >>> from fedrecsk.engine.checkpoints import describe
    >>> describe((8, 16, 32)), describe({"b": 1.0, "a": 2})
    ([8, 16, 32], [['a', 2], ['b', 1.0]])
    >>> list(describe(range(1000)))
    ['sha256']
    """
    plain = _plain(value)
    text = json.dumps(plain)
    if len(text) > LONGEST_SETTING:
        return {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    return plain


def _plain(value: Any) -> Any:
    """Turn a value into JSON of any length."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        pairs = [[_plain(key), _plain(part)] for key, part in value.items()]
        return sorted(pairs, key=json.dumps)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, partial):
        return [_plain(part) for part in (value.func, value.args, value.keywords)]
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    array = np.asarray(value)
    # What no array can be made of is only ever like itself.
    return _plain(array.tolist()) if array.ndim else repr(value)


def fingerprint(value: object) -> str:
    """Hash data.

    Parameters
    ----------
    value : object
        A tree of dataclasses, mappings with text keys, tuples and lists, and in it tensors,
        arrays, numbers, text and None.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    TypeError
        If something else is in the tree.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.engine.checkpoints import fingerprint
    >>> one = fingerprint({"user": np.arange(3)})
    >>> one == fingerprint({"user": np.arange(3)}), len(one)
    (True, 64)
    >>> one == fingerprint({"item": np.arange(3)})
    False
    """
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        if isinstance(value, np.ndarray):
            # Objects are ids, which may be of any kind.
            array = value.astype(str) if value.dtype == object else value
            digest.update(f"array {array.dtype.str} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)};".encode())
            for key in sorted(value):
                feed(key)
                feed(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"sequence {len(value)};".encode())
            for part in value:
                feed(part)
        elif value is None or isinstance(value, bool | int | float | str | np.generic):
            plain = value.item() if isinstance(value, np.generic) else value
            text = f"{type(plain).__name__} {plain!r};"
            digest.update(text.encode("utf-8", "surrogatepass"))
        else:
            raise TypeError(f"A {type(value).__name__} cannot be hashed.")

    feed(value)
    return digest.hexdigest()
