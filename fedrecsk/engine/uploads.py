"""What the clients of a round send, client by client, and what the server makes of it.

A client sends rows of a table, those alone that it has touched, and some numbers besides. The
server only ever needs sums: of each row over the clients that sent it, and of the numbers over
all clients. `add_uploads` adds them up as they are. Everything that may happen on the way, or that
a careful server does instead of adding, works on `Uploads` and ends in `UploadSums`:

    honest clients -> attacks of dishonest ones -> screening -> defence -> sums -> server step
    honest clients -> attacks of dishonest ones -> privacy -> noised sums -> server step

Steps that trust everybody never lay uploads out: they add rows up as they come, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device
from fedrecsk.engine.mixing import scatter_sum

# A client whose upload is so many times as long as that of the median client is broken: clients
# with much data are longer than others, but by one order of magnitude and not by two.
EXPLODED = 100.0
# What clients would have sent and have not yet, see `fedrecsk.engine.compression`. By client code,
# as text: items (K,) in ascending order, their rows (K, w), and numbers (m,) if there are some.
Residual = dict[str, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Uploads:
    """What some clients send.

    Attributes
    ----------
    clients : ndarray of shape (C,)
        Client codes.
    row_clients : Tensor of shape (K,), int64
        Position in `clients` of each row's client.
    row_items : Tensor of shape (K,), int64
        Row of the table; a client sends one at most for each.
    rows : Tensor of shape (K, w)
    row_weights : Tensor of shape (K,)
        Weight of each row in the sum.
    n_directions : int
        Leading columns of the rows that are a vector; each further one is a size of its own.
    numbers : Tensor of shape (C, m)
        What a client sends besides.
    weights : Tensor of shape (C,)
        Weight of each client's numbers in the sum.
    products : bool
        Whether the numbers are a symmetric matrix Σ u uᵀ, row after row.
    """

    clients: NDArray[np.int64]
    row_clients: Tensor
    row_items: Tensor
    rows: Tensor
    row_weights: Tensor
    n_directions: int
    numbers: Tensor
    weights: Tensor
    products: bool = False

    @classmethod
    def nobody(cls, width: int, n_numbers: int, like: Tensor) -> Uploads:
        """Give what no client sends, rows of some width and numbers, beside a tensor."""
        none = torch.zeros(0, dtype=torch.int64, device=like.device)
        return cls(
            clients=np.zeros(0, dtype=np.int64),
            row_clients=none,
            row_items=none,
            rows=like.new_zeros(0, width),
            row_weights=like.new_zeros(0),
            n_directions=width,
            numbers=like.new_zeros(0, n_numbers),
            weights=like.new_zeros(0),
        )

    @classmethod
    def join(cls, parts: Sequence[Uploads]) -> Uploads:
        """Put the uploads of several chunks of clients side by side."""
        starts = np.cumsum([0, *(len(part.clients) for part in parts)]).tolist()
        return cls(
            clients=np.concatenate([part.clients for part in parts]),
            row_clients=torch.cat(
                [part.row_clients + start for part, start in zip(parts, starts, strict=False)]
            ),
            row_items=torch.cat([part.row_items for part in parts]),
            rows=torch.cat([part.rows for part in parts]),
            row_weights=torch.cat([part.row_weights for part in parts]),
            n_directions=parts[0].n_directions,
            numbers=torch.cat([part.numbers for part in parts]),
            weights=torch.cat([part.weights for part in parts]),
            products=parts[0].products,
        )

    def by_client(self, n_items: int) -> Uploads:
        """Add up what entries of the same client send, clients ascending; for equal weights."""
        clients, place = np.unique(self.clients, return_inverse=True)
        owner = torch.from_numpy(place).to(self.row_clients.device)
        key = owner[self.row_clients] * n_items + self.row_items
        pairs, index = torch.unique(key, return_inverse=True)
        return Uploads(
            clients=clients,
            row_clients=pairs // n_items,
            row_items=pairs % n_items,
            rows=scatter_sum(self.rows, index, len(pairs)),
            row_weights=self.row_weights[:1].expand(len(pairs)),
            n_directions=self.n_directions,
            numbers=scatter_sum(self.numbers, owner, len(clients)),
            weights=self.weights[:1].expand(len(clients)),
            products=self.products,
        )

    def norms(self) -> Tensor:
        """Length (C,) of each client's upload, rows and numbers together."""
        squares = self.numbers.square().sum(1)
        squares = squares.index_add(0, self.row_clients, self.row_squares())
        return squares.sqrt()

    def row_squares(self) -> Tensor:
        """Squared length (K,) of each row."""
        return self.rows.square().sum(1)

    def of(self, kept: Tensor) -> Uploads:
        """Return what some of the clients send, told by a mask (C,)."""
        place = kept.cumsum(0) - 1
        rows = kept[self.row_clients]
        return Uploads(
            clients=self.clients[kept.cpu().numpy()],
            row_clients=place[self.row_clients[rows]],
            row_items=self.row_items[rows],
            rows=self.rows[rows],
            row_weights=self.row_weights[rows],
            n_directions=self.n_directions,
            numbers=self.numbers[kept],
            weights=self.weights[kept],
            products=self.products,
        )

    def with_rows(self, rows: Tensor) -> Uploads:
        """Return the same with other rows (K, w)."""
        return replace(self, rows=rows)


@dataclass(frozen=True, eq=False)
class UploadSums:
    """What the server goes on with.

    Attributes
    ----------
    rows : Tensor of shape (n_items, w)
        Weighted sum of each row over the clients that sent it; zero where nobody did.
    row_weights : Tensor of shape (n_items,)
        Their weight.
    numbers : Tensor of shape (m,)
        Weighted sum over all clients.
    weight : Tensor of shape ()
        Their weight.
    clients : ndarray
        Codes of the clients that were heard.
    bytes_up : int or None
        What all of them sent; None: what their rows and numbers take as they are.
    bytes_down : int
        What they got on top of the server's table.
    residual : Residual or None
        What clients have kept for later rounds.
    """

    rows: Tensor
    row_weights: Tensor
    numbers: Tensor
    weight: Tensor
    clients: NDArray[np.int64]
    bytes_up: int | None = None
    bytes_down: int = 0
    residual: Residual | None = None


class Meaning(Protocol):
    """What is known of uploads besides their shape, such as `fedrecsk.models.explained`."""

    def holds(self, uploads: Uploads) -> Tensor:
        """Tell which clients (C,) send what some data would have led to."""

    def upload_of(self, vector: Tensor, item: int) -> tuple[Tensor, Tensor]:
        """Give the row (w,) and the numbers (m,) of a client with one user vector and one item."""


def add_uploads(uploads: Uploads, n_items: int) -> UploadSums:
    """Add uploads up as they are.

    Parameters
    ----------
    uploads : Uploads
    n_items : int
        Rows of the table.

    Returns
    -------
    UploadSums

    Examples
    --------
    Two clients send rows of width 1, and both of them row 2:

    >>> import numpy as np, torch
    >>> from fedrecsk.engine.uploads import Uploads, add_uploads
    >>> uploads = Uploads(
    ...     clients=np.array([5, 8]),
    ...     row_clients=torch.tensor([0, 0, 1]),
    ...     row_items=torch.tensor([0, 2, 2]),
    ...     rows=torch.tensor([[1.0], [2.0], [4.0]]),
    ...     row_weights=torch.ones(3),
    ...     n_directions=1,
    ...     numbers=torch.zeros(2, 0),
    ...     weights=torch.ones(2),
    ... )
    >>> sums = add_uploads(uploads, 3)
    >>> sums.rows.flatten().tolist(), sums.row_weights.tolist()
    ([1.0, 0.0, 6.0], [1.0, 0.0, 2.0])
    """
    return UploadSums(
        rows=scatter_sum(uploads.rows, uploads.row_items, n_items, uploads.row_weights),
        row_weights=scatter_sum(uploads.row_weights[:, None], uploads.row_items, n_items)[:, 0],
        numbers=uploads.weights @ uploads.numbers,
        weight=uploads.weights.sum(),
        clients=uploads.clients,
    )


def as_sent(logs: dict[str, Any], received: UploadSums | None) -> dict[str, Any]:
    """Put in the bytes of an uplink through which clients send something else than their rows.

    Parameters
    ----------
    logs : dict
        Of a round, with ``bytes_up`` and ``bytes_down`` of rows and numbers as they are.
    received : UploadSums or None
        What the uplink has made of them, if there was one.

    Returns
    -------
    dict
        The same `logs` where nothing else was sent.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from fedrecsk.engine.uploads import UploadSums, as_sent
    >>> nothing = torch.zeros(0)
    >>> masked = UploadSums(
    ...     nothing, nothing, nothing, nothing, np.arange(2), bytes_up=90, bytes_down=20)
    >>> as_sent({"bytes_up": 60, "bytes_down": 400}, masked)
    {'bytes_up': 90, 'bytes_down': 420}
    """
    if received is None or received.bytes_up is None:
        return logs
    more = {"bytes_up": received.bytes_up, "bytes_down": logs["bytes_down"] + received.bytes_down}
    return {**logs, **more}


def screen(uploads: Uploads) -> Uploads:
    """Drop the clients whose uploads nobody can use.

    Parameters
    ----------
    uploads : Uploads

    Returns
    -------
    Uploads
        Without clients that sent anything but finite numbers, or an upload more than a hundred
        times as long as the median client's. Nobody may be left.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from fedrecsk.engine.uploads import Uploads, screen
    >>> uploads = Uploads(
    ...     clients=np.array([5, 8]),
    ...     row_clients=torch.tensor([0, 1]),
    ...     row_items=torch.tensor([0, 0]),
    ...     rows=torch.tensor([[1.0], [float("nan")]]),
    ...     row_weights=torch.ones(2),
    ...     n_directions=1,
    ...     numbers=torch.zeros(2, 0),
    ...     weights=torch.ones(2),
    ... )
    >>> screen(uploads).clients.tolist()
    [5]
    """
    # In double precision: squares of numbers that are finite in single overflow there.
    exact = replace(uploads, rows=uploads.rows.double(), numbers=uploads.numbers.double())
    norms = exact.norms()
    usable = norms.isfinite()
    if bool(usable.any()):
        typical = norms[usable].median()
        if float(typical) > 0:  # else most clients have nothing to say, which is no measure
            usable &= norms <= EXPLODED * typical
    return uploads if bool(usable.all()) else uploads.of(usable)


def finite(uploads: Uploads) -> Uploads:
    """Drop the clients that send what is not finite; unlike `screen` it looks at each alone.

    Parameters
    ----------
    uploads : Uploads

    Returns
    -------
    Uploads
    """
    exact = replace(uploads, rows=uploads.rows.double(), numbers=uploads.numbers.double())
    usable = exact.norms().isfinite()
    return uploads if bool(usable.all()) else uploads.of(usable)


def client_weights(rows: NDArray[np.int64], like: Tensor) -> Tensor:
    """Turn numbers of interactions (C,) into weights beside a tensor."""
    return to_device(rows, like.device).to(like.dtype)
