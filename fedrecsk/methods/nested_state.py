"""The state of a federation of several sizes, and what all ways to train it share.

A narrow table is the first columns of a wide one. `hetefedrec` trains networks over it,
`nested_whole_data` a factorisation, and in `standalone` every client is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.local import Moments, Optimizer, init_moments
from fedrecsk.engine.parallel import fill_rows, own_part, shares
from fedrecsk.engine.shards import ClientShards, Cohort
from fedrecsk.engine.traffic import FLOAT_BYTES
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import Residual, UploadSums
from fedrecsk.exceptions import NoUsableUploadError, TooFewClientsError
from fedrecsk.methods.padded_aggregation import slice_of
from fedrecsk.models.decorrelation import spectrum
from fedrecsk.models.head import Head, lifted, n_weights
from fedrecsk.models.whole_data import ServerStatistics

Aggregation = Literal["padded", "clustered", "standalone"]
Logs = dict[str, Any]

# The server optimiser that adds the aggregated change as it is.
ADD = Optimizer("sgd", 1.0)


@dataclass(frozen=True, eq=False)
class Sizes:
    """The sizes of a federation and who has which.

    Attributes
    ----------
    widths : tuple of int
        N_1 < ... < N_l, columns of the tables.
    of_client : ndarray of shape (n_clients,), int64
        Place in `widths` of each client's size.
    """

    widths: tuple[int, ...]
    of_client: NDArray[np.int64]

    @classmethod
    def of(cls, client_sizes: NDArray[np.int64]) -> Sizes:
        """Read the number of columns (n_clients,) that each client has.

        Examples
        --------
        >>> import numpy as np
        >>> from fedrecsk.methods.nested_state import Sizes
        >>> sizes = Sizes.of(np.array([8, 32, 8]))
        >>> sizes.widths, sizes.of_client.tolist()
        ((8, 32), [0, 1, 0])
        """
        widths, place = np.unique(client_sizes, return_inverse=True)
        return cls(tuple(int(width) for width in widths), place.astype(np.int64))

    def members(self, clients: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Return those of `clients` that have the size at a place in `widths`."""
        chosen: NDArray[np.int64] = clients[self.of_client[clients] == size]
        return chosen


@dataclass(frozen=True, eq=False)
class PrivateModels:
    """What clients hold that share nothing: the start, but for the rows that they trained.

    Attributes
    ----------
    indptr : ndarray of shape (n_clients + 1,)
        Where each client's rows start.
    items : ndarray of shape (K,)
        Item of each row.
    rows : ndarray of shape (K, N_l + 1)
        Its vector, zero beyond the client's size, and its bias.
    networks : ndarray of shape (n_clients, P)
        Each client's predictor, its weights first.
    """

    indptr: NDArray[np.int64]
    items: NDArray[np.int64]
    rows: NDArray[np.float32]
    networks: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class NestedState:
    """The state of a federation of several sizes between rounds.

    Attributes
    ----------
    user_factors : Tensor of shape (n_users, N_l)
        A user of size N has its first N columns; the others are zero.
    tables : tuple of Tensor of shape (n_items, N_x) or (n_items, N_x + 1)
        One for each size; with the item bias as the last column where there is one.
    heads : tuple of dict of Tensor
        One for each size, see `fedrecsk.models.head`; empty for the whole-data objective.
    statistics : tuple of ServerStatistics
        Of the quasi-Newton steps, one for each block of columns; empty for networks.
    table_moments : tuple of tuple of Moments
        Of the server optimiser of networks: for each federation, see `federations`, and each of
        its `table_blocks`.
    head_moments : tuple of Moments
        For each size.
    turns : ndarray of shape (n_clients,)
        Rounds of this fit in which each client took part, or had its turn and did not deliver.
    missed : ndarray of shape (n_clients,), bool
        Whether each client has missed a turn and kept it, see `Turnout.turns_after`.
    private : PrivateModels or None
        Of clients that each train for themselves.
    residuals : tuple of (Residual or None), or None
        For each size, what clients that compress their uploads of it have kept for later; it lies
        with them. None: nobody compresses.
    """

    user_factors: Tensor
    tables: tuple[Tensor, ...]
    heads: tuple[Head, ...]
    statistics: tuple[ServerStatistics, ...]
    table_moments: tuple[tuple[Moments, ...], ...]
    head_moments: tuple[Moments, ...]
    turns: NDArray[np.int64]
    missed: NDArray[np.bool_]
    private: PrivateModels | None = None
    residuals: tuple[Residual | None, ...] | None = None

    @classmethod
    def start(
        cls,
        user_factors: Tensor,
        item_table: Tensor,
        heads: Sequence[Head],
        sizes: Sizes,
        user_client: NDArray[np.int64],
        aggregation: Aggregation = "padded",
        server_optimizer: Optimizer = ADD,
    ) -> NestedState:
        """Return the state before the first round: tables that are slices of `item_table`.

        Parameters
        ----------
        user_factors : Tensor of shape (n_users, N_l)
            Cut to each user's size here.
        item_table : Tensor of shape (n_items, N_l) or (n_items, N_l + 1)
        heads : sequence of dict of Tensor
            One for each size, or none.
        sizes : Sizes
        user_client : ndarray of shape (n_users,)
        aggregation : {"padded", "clustered", "standalone"}
        server_optimizer : Optimizer, default=SGD at rate 1
            Of networks.
        """
        widest = sizes.widths[-1]
        item_bias = item_table.shape[1] > widest
        own = np.array(sizes.widths)[sizes.of_client[user_client]]
        inside = torch.arange(widest) < torch.from_numpy(own)[:, None]
        shared = [[sizes.widths[x] for x in each] for each in federations(sizes, aggregation)]
        blocks = [] if heads else [block for widths in shared for block in column_blocks(widths)]
        table_moments = []
        for widths in shared if heads else []:
            part = slice_of(item_table, widths[-1], item_bias=item_bias)
            table_moments.append(
                tuple(
                    init_moments({"block": part[:, block]}, server_optimizer)
                    for _, block in table_blocks(widths, item_bias=item_bias)
                )
            )
        return cls(
            user_factors=user_factors * inside.to(user_factors),
            tables=tuple(
                slice_of(item_table, width, item_bias=item_bias) for width in sizes.widths
            ),
            heads=tuple(heads),
            statistics=tuple(
                ServerStatistics.zero(len(item_table), b.stop - b.start, item_table.device)
                for b in blocks
            ),
            table_moments=tuple(table_moments),
            head_moments=tuple(init_moments(lifted(h), server_optimizer) for h in heads),
            turns=np.zeros(len(sizes.of_client), dtype=np.int64),
            missed=np.zeros(len(sizes.of_client), dtype=bool),
        )


SPECTRUM = ("effective_rank", "singular_value_variance")


def spectrum_of(state: NestedState, sizes: Sizes) -> Logs:
    """Look at how the widest table spreads over its columns, see `models.decorrelation`."""
    found = spectrum(state.tables[-1][:, : sizes.widths[-1]])
    return dict(zip(SPECTRUM, (found.effective_rank, found.variance), strict=True))


def refit_users(
    state: NestedState,
    shards: ClientShards,
    clients: NDArray[np.int64],
    *,
    sizes: Sizes,
    fit: Callable[[Cohort, Tensor, Tensor, Head], Tensor],
) -> Tensor:
    """Return user vectors (n_users, N_l) with those of `clients` fitted to the final model.

    Parameters
    ----------
    state, shards, clients, sizes
    fit : callable
        ``fit(cohort, users (U, N), table, head) -> users (U, N)``; the head is empty for the
        whole-data objective.
    """
    fitted = state.user_factors.clone()
    parts = shares(clients, shards.client_rows[clients])
    for x, width in enumerate(sizes.widths):
        for cohort in shards.user_chunks(sizes.members(own_part(parts), x)):
            users = fitted[cohort.users, :width]
            head = state.heads[x] if state.heads else {}
            fitted[cohort.users, :width] = fit(cohort, users, state.tables[x], head)
    return fill_rows(fitted, parts, shards.users_of)


def federations(sizes: Sizes, aggregation: Aggregation) -> list[list[int]]:
    """Return which sizes share what they learn."""
    everyone = list(range(len(sizes.widths)))
    return [[x] for x in everyone] if aggregation == "clustered" else [everyone]


def client_parameters(state: NestedState, *, dual_task: bool) -> NDArray[np.int64]:
    """Count the numbers (n_sizes,) that a client of each size holds in common with others.

    Its table and its predictor; in dual task those of all smaller sizes, too. As many go up.
    """
    tables = np.array([table.numel() for table in state.tables], dtype=np.int64)
    if not state.heads:
        return tables
    heads = np.array([n_weights(head) for head in state.heads], dtype=np.int64)
    return tables + (np.cumsum(heads) if dual_task else heads)


def downloads(state: NestedState, *, dual_task: bool) -> NDArray[np.int64]:
    """Count the bytes (n_sizes,) that a client of each size is sent in a round.

    What it holds in common with others; with the whole-data objective, also VᵀV of its columns.
    """
    numbers = client_parameters(state, dual_task=dual_task)
    if not state.heads:
        numbers += np.array([table.shape[1] ** 2 for table in state.tables], dtype=np.int64)
    return FLOAT_BYTES * numbers


def column_blocks(widths: Sequence[int]) -> list[slice]:
    """Cut the widest table's columns where the sizes end."""
    return [slice(a, b) for a, b in pairwise([0, *widths])]


def table_blocks(widths: Sequence[int], *, item_bias: bool) -> list[tuple[int, slice]]:
    """Return the blocks of columns of the widest table, each with the first size that owns it.

    Examples
    --------
    >>> from fedrecsk.methods.nested_state import table_blocks
    >>> table_blocks([2, 4], item_bias=True)
    [(0, slice(0, 2, None)), (1, slice(2, 4, None)), (0, slice(4, 5, None))]
    """
    blocks = list(enumerate(column_blocks(widths)))
    return [*blocks, (0, slice(widths[-1], widths[-1] + 1))] if item_bias else blocks


@dataclass(eq=False)
class Arrivals:
    """What uploads of several sizes have cost, and left with the clients.

    Attributes
    ----------
    residuals : list of (Residual or None)
        For each size, what clients keep.
    bytes_up : int or None
        Of clients that send something else than their rows; None: bytes follow from the rows.
    bytes_down : int
        What such clients got on top of the server's tables.
    somebody_is_alone : bool
        Whether a client cannot send anything since nobody else of its size takes part, see
        `Uplink.takes`.
    somebody_is_asked : bool
        Whether the uploads of any size were handed on.
    """

    residuals: list[Residual | None]
    bytes_up: int | None = None
    bytes_down: int = 0
    somebody_is_alone: bool = False
    somebody_is_asked: bool = False

    @classmethod
    def before(cls, state: NestedState) -> Arrivals:
        """Begin a round."""
        return cls(list(state.residuals or [None] * len(state.tables)))

    def take(
        self,
        size: int,
        n_clients: int,
        uplink: Uplink,
        receive: Callable[[Residual | None], tuple[UploadSums, int]],
    ) -> tuple[UploadSums | None, int]:
        """Hand the uploads of a size to an uplink.

        Parameters
        ----------
        size : int
        n_clients : int
            Of this size, in the round.
        uplink : Uplink
        receive : callable
            ``receive(residual)`` is `Uplink.receive` for their uploads.

        Returns
        -------
        sums : UploadSums or None
            None if nothing of them is left, which is no error as long as there are other sizes.
        n_rejected : int
        """
        if not uplink.takes(n_clients):
            self.somebody_is_alone |= n_clients > 0
            return None, n_clients
        self.somebody_is_asked = True
        try:
            sums, n_rejected = receive(self.residuals[size])
        except TooFewClientsError:
            raise
        except NoUsableUploadError:
            return None, n_clients
        if sums.bytes_up is not None:
            self.bytes_up = (self.bytes_up or 0) + sums.bytes_up
            self.bytes_down += sums.bytes_down
            self.residuals[size] = sums.residual
        return sums, n_rejected

    def logs(self, logs: Logs) -> Logs:
        """Put in what was counted."""
        if self.bytes_up is None:
            return logs
        bytes_down = logs["bytes_down"] + self.bytes_down
        return {**logs, "bytes_up": self.bytes_up, "bytes_down": bytes_down}

    def check_somebody_is_heard(self, n_participants: int, n_rejected: int, t: int) -> None:
        """Refuse a round of which nothing is left.

        Raises
        ------
        ValueError
            If clients of every size are alone.
        NoUsableUploadError
            If nobody can use what they send.
        """
        if not 0 < n_participants == n_rejected:
            return
        if self.somebody_is_alone and not self.somebody_is_asked:
            raise ValueError(
                f"Round {t + 1} has a single client of each size, and its upload would be the sum "
                "that secure_aggregation hides it in. Raise clients_per_round."
            )
        raise NoUsableUploadError(n_participants, t)

    def kept(self) -> tuple[Residual | None, ...] | None:
        """Return what the next state holds of it."""
        keeps = any(residual is not None for residual in self.residuals)
        return tuple(self.residuals) if keeps else None
