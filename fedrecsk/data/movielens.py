"""The MovieLens 100K and 1M data sets, as GroupLens publishes them.

The data may not be handed on, so none of it is in this package: `load_movielens` reads what is
on disk, `fetch_movielens` downloads it from GroupLens.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import struct
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import Bunch

# Titles and genres by item id.
_Items = tuple[dict[int, str], dict[int, tuple[str, ...]]]

FEATURE_NAMES = ("user_id", "item_id", "rating", "timestamp")

_NEEDED = ("u.data", "u.item", "ratings.dat", "movies.dat")

# What the standard library raises on damaged archives; OSError is a seek to nowhere.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OSError,
    OverflowError, UnicodeDecodeError,
)  # fmt: skip

# Beyond every file of the two data sets (24.6 MB at most): what claims more is no MovieLens
# archive, and is not unpacked into memory. The table of contents is read as a whole.
_LARGEST_FILE = 256 * 2**20
_LARGEST_ARCHIVE = 128 * 2**20
# Read at a time. What zlib gives is cut to this; bz2 and lzma give all they have, thousands of
# times what went in, so members in these methods are not read.
_CHUNK = 2**20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# From here on floats cannot tell integers apart.
_LARGEST_NUMBER = 2.0**53
_LARGEST_DOWNLOAD = 64 * 2**20
_DOWNLOAD_TIMEOUT = 60.0

_URL = "https://files.grouplens.org/datasets/movielens/{file_name}"
# GroupLens publishes these sums next to the archives.
_MD5 = {
    "ml-100k.zip": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m.zip": "c4d9eecfca2ab87c1945afe126590906",
}
_FILE_NAMES = {"100k": "ml-100k.zip", "1m": "ml-1m.zip"}

_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance",
    "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

_DESCRIPTION = """\
MovieLens
---------
{n_rows} ratings by {n_users} users of {n_items} of {n_titles} movies, read from
{path}

Columns of data: user_id, item_id, rating (1 to 5), timestamp (seconds since 1970).

Collected by the GroupLens research project at the University of Minnesota. For research, without
redistribution and without commercial use unless GroupLens permits it. Cite: F. Maxwell Harper and
Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on
Interactive Intelligent Systems 5, 4, Article 19.
"""


def load_movielens(
    path: str | os.PathLike[str], *, return_X_y: bool = False, as_frame: bool = False
) -> Any:
    r"""Read MovieLens 100K or 1M from its archive or its unpacked folder.

    Archives are read in memory; nothing is unpacked to disk.

    Parameters
    ----------
    path : str or path-like
        ``ml-100k.zip`` or ``ml-1m.zip``, or a folder with ``u.data`` and ``u.item``, or
        ``ratings.dat`` and ``movies.dat``. They may lie in a sub-folder.
    return_X_y : bool, default=False
        Return ``(data, target)`` only.
    as_frame : bool, default=False
        Make ``data`` a pandas DataFrame and ``target`` a Series.

    Returns
    -------
    data : Bunch
        - data: ndarray of shape (n, 4), int64; user, item, rating, timestamp, in the order of
          the file. float64 if there are half stars.
        - target: ndarray of shape (n,), the client of each row: its user.
        - feature_names: list of the four column names.
        - item_text: dict from item id to title.
        - genres: dict from item id to a tuple of genres.
        - DESCR: str.
    (data, target) : tuple if ``return_X_y=True``

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If it is no MovieLens data set, or is encrypted, cut off or damaged.
    ImportError
        If ``as_frame=True`` and pandas is not installed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from fedrecsk.datasets import load_movielens
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = pathlib.Path(folder)
    ...     _ = (files / "ratings.dat").write_text("1::7::5::978300760\n2::7::3::978302109\n")
    ...     _ = (files / "movies.dat").write_text("7::Sabrina (1995)::Comedy|Romance\n")
    ...     movielens = load_movielens(folder)
    >>> movielens.data
    array([[        1,         7,         5, 978300760],
           [        2,         7,         3, 978302109]])
    >>> movielens.item_text
    {7: 'Sabrina (1995)'}
    >>> movielens.genres
    {7: ('Comedy', 'Romance')}
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no MovieLens archive or folder at {path}. Download ml-100k.zip or ml-1m.zip "
            "from https://grouplens.org/datasets/movielens/, or call fetch_movielens()."
        )
    files = _read_files(path)
    if "u.data" in files:
        data = _parse_ratings(files["u.data"], f"u.data in {path}")
        texts, genres = _parse_items_100k(files["u.item"], f"u.item in {path}")
    else:
        data = _parse_ratings(files["ratings.dat"], f"ratings.dat in {path}")
        texts, genres = _parse_movies_1m(files["movies.dat"], f"movies.dat in {path}")
    description = _DESCRIPTION.format(
        n_rows=len(data),
        n_users=len(np.unique(data[:, 0])),
        n_items=len(np.unique(data[:, 1])),
        n_titles=len(texts),
        path=path,
    )
    target = data[:, 0].copy()
    table, clients = _as_pandas(data, target) if as_frame else (data, target)
    if return_X_y:
        return table, clients
    return Bunch(
        data=table,
        target=clients,
        feature_names=list(FEATURE_NAMES),
        item_text=texts,
        genres=genres,
        DESCR=description,
    )


def fetch_movielens(
    name: str = "100k",
    *,
    data_home: str | os.PathLike[str] | None = None,
    download_if_missing: bool = True,
    return_X_y: bool = False,
    as_frame: bool = False,
) -> Any:
    """Load a MovieLens data set, and download it from GroupLens the first time.

    The archive's MD5 sum is compared with the one that GroupLens publishes.

    Parameters
    ----------
    name : {"100k", "1m"}, default="100k"
        MovieLens 100K (5 MB) or 1M (6 MB).
    data_home : str or path-like, default=None
        Folder that keeps the archive. None: the environment variable FEDRECSK_DATA_HOME, else
        ``~/fedrecsk_data``.
    download_if_missing : bool, default=True
        False: raise OSError where the archive is not in the folder.
    return_X_y, as_frame : bool, default=False
        As in :func:`load_movielens`.

    Returns
    -------
    data : Bunch, or tuple if ``return_X_y=True``
        As in :func:`load_movielens`.

    Raises
    ------
    ValueError
        If ``name`` is not a data set.
    OSError
        If the archive is missing and may not or cannot be downloaded, or has a wrong sum.

    Examples
    --------
    >>> from fedrecsk.datasets import fetch_movielens
    >>> movielens = fetch_movielens("100k")  # doctest: +SKIP
    """
    if name not in _FILE_NAMES:
        raise ValueError(f"name must be one of {', '.join(map(repr, _FILE_NAMES))}, got {name!r}.")
    file_name = _FILE_NAMES[name]
    if data_home is None:
        data_home = os.environ.get("FEDRECSK_DATA_HOME") or "~/fedrecsk_data"
    archive = Path(data_home).expanduser() / file_name
    if not archive.exists():
        if not download_if_missing:
            raise FileNotFoundError(
                f"{archive} is not there and download_if_missing is False. {_by_hand(archive)}"
            )
        _download(archive)
    elif _md5(archive.read_bytes()) != _MD5[file_name]:
        raise OSError(
            f"{archive} is not the archive that GroupLens publishes: its MD5 sum is "
            f"{_md5(archive.read_bytes())}, not {_MD5[file_name]}. Delete it to download it "
            "again, or read it as it is with load_movielens."
        )
    return load_movielens(archive, return_X_y=return_X_y, as_frame=as_frame)


def is_movielens(path: Path) -> bool:
    """Say whether a folder has the ratings file of a MovieLens data set."""
    return any(_find_file(path, name) is not None for name in ("u.data", "ratings.dat"))


def _read_files(path: Path) -> dict[str, bytes]:
    """Read the ratings and the titles, under their base names."""
    if path.is_dir():
        found = {name: file for name in _NEEDED if (file := _find_file(path, name)) is not None}
        chosen = _choose(set(found), path)
        return {name: _read_bounded(found[name]) for name in chosen}
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder.")
    if (size := path.stat().st_size) > _LARGEST_ARCHIVE:
        raise _too_large(str(path), size)
    with path.open("rb") as stream:
        try:
            archive = zipfile.ZipFile(stream)
            members = _find_members(archive)
            chosen = _choose(set(members), path)
            return {name: _read_member(archive, members[name], path) for name in chosen}
        except _DAMAGED as error:
            raise ValueError(
                f"{path} is not a zip archive that can be read, or is cut off or damaged "
                f"({error}). Download it again."
            ) from error


def _choose(found: set[str], path: Path) -> tuple[str, str]:
    """Pick the pair of files of one of the two layouts."""
    for ratings, titles in (("u.data", "u.item"), ("ratings.dat", "movies.dat")):
        if ratings in found and titles in found:
            return ratings, titles
        if ratings in found:
            raise ValueError(f"{path} has {ratings} but lacks {titles}, which holds the titles.")
    raise ValueError(
        f"{path} is not a MovieLens data set: it has neither u.data (100K) nor ratings.dat (1M). "
        "Pass the archive or folder of MovieLens 100K or 1M."
    )


def _find_file(folder: Path, name: str) -> Path | None:
    """Find a file in a folder or, failing that, in one of its folders."""
    candidates = [folder / name, *sorted(folder.glob(f"*/{name}"))]
    return next((file for file in candidates if file.is_file()), None)


def _find_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Find the needed members by base name, in the folder nearest to the top."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in sorted(archive.infolist(), key=lambda m: (m.filename.count("/"), m.filename)):
        name = member.filename.rsplit("/", 1)[-1]
        if name in _NEEDED and not member.filename.startswith("__MACOSX/"):
            members.setdefault(name, member)
    return members


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> bytes:
    if member.flag_bits & 1:
        raise ValueError(
            f"{member.filename} in {path} is encrypted. Unpack it and pass the folder."
        )
    if member.compress_type not in _METHODS:
        raise ValueError(
            f"{member.filename} in {path} is packed in another way than GroupLens does it (method "
            f"{member.compress_type}). Unpack it and pass the folder."
        )
    if member.file_size > _LARGEST_FILE:
        raise _too_large(f"{member.filename} in {path}", member.file_size)
    # Not ZipFile.read, which unpacks everything before it looks at the size that was declared.
    content = bytearray()
    with archive.open(member) as stream:
        while chunk := stream.read(_CHUNK):
            content += chunk
    return bytes(content)


def _read_bounded(file: Path) -> bytes:
    size = file.stat().st_size
    if size > _LARGEST_FILE:
        raise _too_large(str(file), size)
    return file.read_bytes()


def _too_large(what: str, size: int) -> ValueError:
    return ValueError(
        f"{what} has {size} bytes, far more than MovieLens 100K or 1M. It is not read."
    )


def _parse_ratings(raw: bytes, where: str) -> NDArray[Any]:
    """Read ``user, item, rating, timestamp`` lines into an array of four columns."""
    if not raw.strip():
        raise ValueError(f"{where} is empty. Download the data set again.")
    try:
        values = np.loadtxt(
            io.BytesIO(raw.replace(b"::", b"\t")),
            delimiter="\t",
            comments=None,
            ndmin=2,
            encoding="latin-1",
        )
    except ValueError as error:
        raise ValueError(
            f"{where} does not have the four numbers user, item, rating, timestamp in every line: "
            f"{error}. Download the data set again."
        ) from error
    if values.shape[1] != len(FEATURE_NAMES) or not np.isfinite(values).all():
        raise ValueError(
            f"{where} should have the four numbers user, item, rating, timestamp in every line; "
            f"its first line is {raw.splitlines()[0][:80].decode('latin-1')!r}."
        )
    large = np.flatnonzero((np.abs(values) >= _LARGEST_NUMBER).any(axis=1))
    if large.size:
        # Read as floats, two users might have become one.
        row = ", ".join(f"{value:.16g}" for value in values[large[0]])
        raise ValueError(
            f"{where} has numbers of 2**53 and more in row {large[0]}: {row}. They cannot be told "
            "apart from their neighbours. Download the data set again."
        )
    whole = values.astype(np.int64)
    return whole if (whole == values).all() else values


def _parse_items_100k(raw: bytes, where: str) -> _Items:
    """Read titles and genres: id, title, two dates, address, and one flag per genre, by ``|``."""
    texts, genres = {}, {}
    for number, fields in _split_lines(raw, "|", 5 + len(_GENRES_100K), where):
        item = _item_id(fields[0], number, where)
        texts[item] = fields[1]
        flags = zip(_GENRES_100K, fields[5:], strict=True)
        genres[item] = tuple(genre for genre, flag in flags if flag == "1")
    return texts, genres


def _parse_movies_1m(raw: bytes, where: str) -> _Items:
    """Read titles and genres: id, title, and genres by ``|``, all by ``::``."""
    texts, genres = {}, {}
    for number, fields in _split_lines(raw, "::", 3, where):
        item = _item_id(fields[0], number, where)
        texts[item] = fields[1]
        genres[item] = tuple(filter(None, fields[2].split("|")))
    return texts, genres


def _split_lines(
    raw: bytes, separator: str, n_fields: int, where: str
) -> Iterator[tuple[int, list[str]]]:
    """Give the number and the fields of every line that is not empty."""
    # Not splitlines(): in latin-1 it would also cut at \x85, which is a letter in other sets.
    for number, line in enumerate(raw.decode("latin-1").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split(separator)
        if len(fields) != n_fields:
            raise ValueError(
                f"Line {number} of {where} has {len(fields)} fields instead of {n_fields}. "
                "Download the data set again."
            )
        yield number, fields


def _item_id(text: str, number: int, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"Line {number} of {where} begins with {text[:40]!r} instead of an item number. "
            "Download the data set again."
        ) from None


def _as_pandas(data: NDArray[Any], target: NDArray[Any]) -> tuple[Any, Any]:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            "as_frame=True needs pandas. Install it, or leave as_frame=False."
        ) from error
    frame = pd.DataFrame(data, columns=list(FEATURE_NAMES))
    return frame, pd.Series(target, name="client_id")


def _download(archive: Path) -> None:
    """Download an archive next to its place, check it, and only then move it there."""
    url = _URL.format(file_name=archive.name)
    try:
        with closing(_open(url)) as response:
            content = response.read(_LARGEST_DOWNLOAD + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"Could not download {url} ({error}). {_by_hand(archive)}") from error
    found, published = _md5(content), _MD5[archive.name]
    if found != published:
        raise OSError(
            f"The download of {url} has the MD5 sum {found}, but GroupLens publishes {published}; "
            f"nothing was kept. Try again later. {_by_hand(archive)}"
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the move is one step and no reader sees half a file.
    part = archive.with_name(f"{archive.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)


def _open(url: str) -> IO[bytes]:
    """Open an https address, and refuse to be led to another kind of address."""
    response: Any = urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT)
    if not response.geturl().startswith("https://"):
        response.close()
        raise ConnectionError(f"{url} leads to {response.geturl()}, which is not https")
    opened: IO[bytes] = response
    return opened


def _by_hand(archive: Path) -> str:
    return (
        f"You can download {archive.name} from https://grouplens.org/datasets/movielens/ with a "
        f"browser and put it at {archive}."
    )


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
