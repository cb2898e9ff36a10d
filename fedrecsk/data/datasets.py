"""Interactions from the caller's own files: CSV, Parquet, a folder of both tables, MovieLens."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import Bunch

from fedrecsk.data.columns import (
    NAMES,
    POSITIONS,
    Columns,
    as_rating,
    as_timestamp,
    read_columns,
    stack_columns,
)
from fedrecsk.data.movielens import is_movielens, load_movielens
from fedrecsk.data.vocabulary import IdArray, as_ids

# A Parquet file with more rows, of which more than these come out of a byte, is not read.
_MANY_ROWS = 2**20
_ROWS_PER_BYTE = 64

_ACCEPTED = (
    "a CSV or Parquet file with the columns user_id, item_id[, rating][, timestamp][, client_id], "
    "a folder with interactions.parquet, or a MovieLens archive or folder"
)


def load_interactions(path: str | os.PathLike[str]) -> Any:
    r"""Read interactions from a file or folder, by what is there.

    Parameters
    ----------
    path : str or path-like
        One of

        - a ``.csv`` file (comma-separated, UTF-8, with a header) or a ``.parquet`` file with
          the columns ``user_id, item_id[, rating][, timestamp][, client_id]``, in any order;
          other columns are not read;
        - a folder with such an ``interactions.parquet``, and perhaps ``items.parquet`` with
          ``item_id`` and ``title``;
        - a MovieLens archive or folder, as in :func:`load_movielens`.

    Returns
    -------
    data : Bunch
        - data: ndarray of shape (n, 2..4); user, item[, rating[, timestamp]]. int64 if all
          values are whole numbers, float64 if all are numbers, else object. Where there are
          timestamps but no ratings, every rating is 1. In a CSV file, ids are text unless
          all of a column are written as plain integers.
        - target: ndarray of shape (n,), or None; the ``client_id`` column, if there is one.
        - feature_names: list of the names of the columns of ``data``.
        - item_text: dict from item id to title, empty if there are no titles.
        - DESCR: str.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If it is none of the above, lacks a column, or has values that cannot be read.
    ImportError
        If Parquet is to be read and pyarrow is not installed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from fedrecsk.datasets import load_interactions
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "shop.csv")
    ...     _ = file.write_text("item_id,user_id\n31,ann\n32,bob\n")
    ...     shop = load_interactions(file)
    >>> shop.data
    array([['ann', 31],
           ['bob', 32]], dtype=object)
    >>> shop.feature_names
    ['user_id', 'item_id']
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}. Pass {_ACCEPTED}.")
    suffix = path.suffix.lower()
    if path.is_dir() and (path / "interactions.parquet").is_file():
        columns = _read_table(path / "interactions.parquet")
        return _bunch(columns, _read_titles(path / "items.parquet"), path)
    if suffix == ".zip" or (path.is_dir() and is_movielens(path)):
        movielens = load_movielens(path)
        movielens.target = None
        return movielens
    if path.is_file() and suffix == ".csv":
        return _bunch(_read_csv(path), {}, path)
    if path.is_file() and suffix == ".parquet":
        return _bunch(_read_table(path), {}, path)
    raise ValueError(f"{path} cannot be read as interactions. Pass {_ACCEPTED}.")


def _bunch(columns: Columns, item_text: dict[Any, str], path: Path) -> Any:
    parts: list[NDArray[Any]] = [columns.user, columns.item]
    if columns.rating is not None:
        parts.append(_whole(columns.rating))
    elif columns.timestamp is not None:
        # By position a timestamp is the fourth column, so the third cannot be left out.
        parts.append(np.ones(len(columns), dtype=np.int64))
    if columns.timestamp is not None:
        parts.append(_whole(columns.timestamp))
    return Bunch(
        data=stack_columns(parts),
        target=columns.client,
        feature_names=list(POSITIONS[: len(parts)]),
        item_text=item_text,
        DESCR=f"{len(columns)} interactions read from {path}",
    )


def _whole(values: NDArray[Any]) -> NDArray[Any]:
    """Make integers of floats that all are whole, so that integer ids beside them stay so."""
    if values.dtype.kind == "f" and (np.abs(values) <= 2.0**53).all():
        integers = values.astype(np.int64)
        return integers if (integers == values).all() else values
    return values


def _present_names(names: list[str], path: Path) -> list[str]:
    """Check the header of a table; give the names that mean something here."""
    present = [name for name in NAMES if name in names]
    missing = [name for name in POSITIONS[:2] if name not in names]
    if missing:
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
            f"{', '.join(names) or 'none'}. Rename its columns to user_id, item_id[, rating]"
            "[, timestamp][, client_id]."
        )
    repeated = [name for name in present if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{path} has more than one column named {', '.join(repeated)}.")
    return present


def _read_csv(path: Path) -> Columns:
    try:
        texts = _csv_columns(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    if not texts["user_id"]:
        raise ValueError(f"{path} has a header but no rows.")
    source = str(path)
    arrays = {name: as_ids(values, source=source, column=name) for name, values in texts.items()}
    rating, timestamp, client = (arrays.get(name) for name in NAMES[2:])
    return Columns(
        user=_ids_from_text(arrays["user_id"]),
        item=_ids_from_text(arrays["item_id"]),
        rating=None if rating is None else as_rating(rating, source=source),
        timestamp=None if timestamp is None else as_timestamp(timestamp, source=source),
        client=None if client is None else _ids_from_text(client),
        n_columns=len(texts),
        feature_names=tuple(texts),
    )


def _csv_columns(path: Path) -> dict[str, list[str]]:
    """Read the named columns as text."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        names = _present_names(header, path)
        texts: dict[str, list[str]] = {name: [] for name in names}
        targets = [(name, texts[name], header.index(name)) for name in names]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"Line {reader.line_num} of {path} has {len(row)} fields, but the header has "
                    f"{len(header)}."
                )
            for name, values, position in targets:
                if not row[position]:
                    raise ValueError(
                        f"Line {reader.line_num} of {path} has no {name}. Fill it in or drop the "
                        "line."
                    )
                values.append(row[position])
    return texts


def _ids_from_text(texts: NDArray[np.str_]) -> IdArray:
    """Make integers of ids that all are written as plain integers; 007 is a name."""
    try:
        integers = texts.astype(np.int64)
    except (ValueError, OverflowError):
        return texts
    return integers if (integers.astype(np.str_) == texts).all() else texts


def _read_table(path: Path) -> Columns:
    table = _read_parquet(path, _present_names)
    try:
        return read_columns(table)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as interactions: {error}") from error


def _read_titles(path: Path) -> dict[Any, str]:
    """Read titles by item id; a folder need not have them."""
    if not path.is_file():
        return {}
    table = _read_parquet(path, _title_names)
    ids = as_ids(_values(table["item_id"]), source=str(path), column="item_id")
    titles = ("" if title is None else str(title) for title in _values(table["title"]))
    return dict(zip(ids.tolist(), titles, strict=True))


def _values(column: Any) -> list[Any]:
    """Give the values of a column of pyarrow; those of a dictionary once for all their rows."""
    found: list[Any] = []
    for chunk in column.chunks:
        if not hasattr(chunk, "dictionary"):
            found += chunk.to_pylist()
            continue
        values = [*chunk.dictionary.to_pylist(), None]
        found += [values[-1 if code is None else code] for code in chunk.indices.to_pylist()]
    return found


def _title_names(names: list[str], path: Path) -> list[str]:
    if "item_id" not in names or "title" not in names:
        raise ValueError(
            f"{path} should have the columns item_id and title; it has {', '.join(names)}."
        )
    return ["item_id", "title"]


def _read_parquet(path: Path, choose: Callable[[list[str], Path], list[str]]) -> Any:
    """Read those columns of a Parquet file that `choose` picks from all names."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "Reading Parquet needs pyarrow. Install it, for example with "
            "pip install 'fedrecsk[benchmark]', or pass a CSV file."
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            _refuse_bomb(file.metadata.num_rows, path)
            chosen = choose(list(file.schema_arrow.names), path)
            texts = [field.name for field in file.schema_arrow if _is_text(field.type)]
        # A text that many rows share stays one text.
        options = {"read_dictionary": texts, "page_checksum_verification": True}
        with pq.ParquetFile(path, **options) as file:
            table = file.read(columns=chosen)
            # Text that is no UTF-8, and offsets to nowhere, would be found by whoever reads them.
            table.validate(full=True)
            return table
    # Names of columns are decoded as they are asked for.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}.") from error


def _is_text(kind: Any) -> bool:
    """Say whether a column of pyarrow holds text or bytes, which dictionaries are made for."""
    return str(kind) in ("string", "large_string", "binary", "large_binary")


def _refuse_bomb(n_rows: int, path: Path) -> None:
    """Refuse a file that is so small for its rows that it can only be meant to fill the memory.

    Each row is another (user, item) pair, and these take some bits, however they are packed.
    """
    size = path.stat().st_size
    if n_rows > _MANY_ROWS and n_rows > _ROWS_PER_BYTE * size:
        raise ValueError(
            f"{path} claims {n_rows} rows in {size} bytes, more than distinct interactions can be "
            "packed into. It is not read."
        )
