"""The whole-data objective for clients of several sizes: exact solves in the first columns.

    client of size N  <- solves its vector in the first N columns; sends what `models.whole_data`
                         says, of N columns (dual task: also of every smaller size, added up)
    server            <- for each block of columns between two sizes, one quasi-Newton step from
                         the sums of the clients that own the block

Beyond the paper, whose bases are networks. A narrow client's vector is a wide one with zeros, so
all sums are those of the homogeneous federation; only how often an item was seen, and its
curvature, are counted block by block, since a penalty in proportion to everybody's interactions
is too much for columns that few own. There is one table, of which all sizes are slices, so
distillation has nothing to do; and the step works in the eigenbasis of the users, where
decorrelated columns are no aim (as a term of the server's gradient it ruined the ranking in a
pilot).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from fedrecsk.engine.parallel import add_up, fill_rows, own_part, shares
from fedrecsk.engine.shards import ClientShards, Cohort, counted_turns, written_users
from fedrecsk.engine.traffic import dense_bytes, sparse_row_bytes
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import Uploads, UploadSums
from fedrecsk.methods.nested_state import (
    Aggregation,
    Arrivals,
    Logs,
    NestedState,
    Sizes,
    column_blocks,
    downloads,
    federations,
)
from fedrecsk.models import whole_data
from fedrecsk.models.head import Head


def whole_data_step(
    state: NestedState,
    shards: ClientShards,
    participants: NDArray[np.int64],
    t: int,
    *,
    sizes: Sizes,
    dual_task: bool,
    aggregation: Aggregation,
    unobserved_weight: float,
    penalty: whole_data.Penalty,
    server_learning_rate: float | None,
    decay: float,
    item_curvature: bool,
    contributors: NDArray[np.int64] | None = None,
    uplink: Uplink | None = None,
    in_place: bool = False,
) -> tuple[NestedState, Logs]:
    """Solve the participants, each in its own columns, and step the table block by block.

    Parameters
    ----------
    state, shards, participants, t, sizes, dual_task, aggregation
        As in `fedrecsk.methods.hetefedrec.network_step`. Dual task: a client also solves in each
        smaller size.
    unobserved_weight, penalty, decay, item_curvature
        See `fedrecsk.models.whole_data`.
    server_learning_rate : float or None
        η; None follows from the participation, `whole_data.default_rate`.
    contributors : ndarray of int64, optional
        Clients that ever take part, for whom the participants stand; default: all.
    uplink : Uplink, optional
        See `fedrecsk.methods.hetefedrec.network_step`; in dual task it looks at what is sent of
        each size on its own.
    in_place : bool, default=False
        See `fedrecsk.methods.hetefedrec.network_step`.

    Returns
    -------
    state : NestedState
    logs : dict
    """
    trained: list[tuple[Tensor, Tensor]] = []
    tables, statistics = list(state.tables), list(state.statistics)
    population = np.arange(shards.n_clients) if contributors is None else contributors
    users_of_size = np.bincount(
        sizes.of_client[population],
        weights=np.diff(shards.client_offsets)[population],
        minlength=len(sizes.widths),
    )
    logs: Logs = {
        "loss": 0.0, "clients": len(participants), "rejected": 0, "bytes_down": 0, "bytes_up": 0
    }  # fmt: skip
    arrivals = Arrivals.before(state)
    # A GPU would be waited for, unless somebody looks at single uploads anyway.
    looks = uplink is not None or state.user_factors.device.type == "cpu"
    broken: list[NDArray[np.int64]] = []
    n_rows, n_bytes = 0, downloads(state, dual_task=dual_task)
    parts = shares(participants, shards.client_rows[participants])
    for federation in federations(sizes, aggregation):
        table = state.tables[federation[-1]]
        blocks = column_blocks([sizes.widths[x] for x in federation])
        sums = _BlockSums.zero(shards.n_items, blocks, table.device)
        for place, x in enumerate(federation):
            group = sizes.members(participants, x)
            for y in range(0 if dual_task else place, place + 1):
                width = blocks[y].stop
                part = table[:, :width]
                gram = part.T @ part
                sent: list[tuple[Uploads, Tensor]] = []
                for cohort in shards.user_chunks(sizes.members(own_part(parts), x)):
                    users = whole_data.solve_users(
                        cohort,
                        part,
                        gram,
                        unobserved_weight=unobserved_weight,
                        penalty=penalty,
                        mean_rows=len(shards.items) / shards.n_users,
                    )
                    if looks and not bool(users.isfinite().all()):
                        solved = users.isfinite().all(1)
                        broken.append(cohort.clients[~solved.cpu().numpy()])
                        cohort, users = cohort.of_users(solved), users[solved]
                    if y == place:
                        trained.append((cohort.users, users))
                    more = sums.plus(cohort, users, part, gram, unobserved_weight)
                    if uplink is None:
                        sums = more
                    else:
                        sums = sums.with_loss(more)
                        own = whole_data.uploads_of(cohort, users, part, blocks[: y + 1])
                        sent.append((own, users))
                if uplink is not None and sent:
                    n_clients = len(np.unique(np.concatenate([own.clients for own, _ in sent])))
                    receive = partial(
                        whole_data.receive, uplink, sent, part, t, blocks=blocks[: y + 1]
                    )
                    received, n_rejected = arrivals.take(federation[y], n_clients, uplink, receive)
                    logs["rejected"] += n_rejected * (y == place)
                    if received is not None:
                        sums = sums.plus_received(received, shards.client_users)
            d, n_curvatures = blocks[place].stop, (place + 1) * item_curvature
            n_sent = int(shards.client_items[group].sum())
            logs["bytes_down"] += len(group) * int(n_bytes[x])
            # A row carries the pull on the item, its count and its curvatures.
            logs["bytes_up"] += sparse_row_bytes(n_sent, d + 1 + n_curvatures)
            logs["bytes_up"] += len(group) * dense_bytes((d, d))
        sums = sums.of_all_processes()
        # Of each block; in dual task a user counts once for each of its sizes that has the block.
        owners = [
            sum(
                int(users_of_size[x]) * (more + 1 if dual_task else 1)
                for more, x in enumerate(federation[place:])
            )
            for place in range(len(federation))
        ]
        moved = table.clone()
        for place, block in enumerate(blocks):
            if not sums.n_owners[place]:
                continue  # nobody who has these columns took part
            rate = server_learning_rate
            if rate is None:
                rate = whole_data.default_rate(sums.total.n_users / owners[0], t)
            number = federation[place]
            moved[:, block], statistics[number] = whole_data.server_step(
                table,
                state.statistics[number],
                replace(sums.total, counts=sums.counts[place], curvature=sums.curvature[place]),
                n_users=owners[0],
                unobserved_weight=unobserved_weight,
                penalty=penalty,
                mean_rows=len(shards.items) / shards.n_items * owners[0] / shards.n_users,
                rate=rate,
                decay=decay,
                item_curvature=item_curvature,
                columns=block,
                n_owners=owners[place],
            )
        for x, block in zip(federation, blocks, strict=True):
            tables[x] = moved[:, : block.stop]
        logs["loss"] = logs["loss"] + sums.total.loss.double()
        n_rows += sums.total.n_rows
    logs["loss"] = logs["loss"] / max(n_rows, 1)
    logs["rejected"] += len(np.unique(np.concatenate(broken))) if broken else 0
    logs["rejected"] = int(add_up(torch.tensor(logs["rejected"]))[0])
    arrivals.check_somebody_is_heard(len(participants), logs["rejected"], t)
    user_factors = written_users(state.user_factors, trained, in_place=in_place)
    return replace(
        state,
        user_factors=fill_rows(user_factors, parts, shards.users_of),
        tables=tuple(tables),
        statistics=tuple(statistics),
        turns=counted_turns(state.turns, participants, in_place=in_place),
        residuals=arrivals.kept(),
    ), arrivals.logs(logs)


@dataclass(frozen=True, eq=False)
class _BlockSums:
    """What the server learns of a round, with what it needs for each block of columns.

    Attributes
    ----------
    total : Sums
        Of all participants, vectors padded with zeros to the widest.
    blocks : list of slice
    counts, curvature : list of Tensor of shape (n_items,)
        Of those that own the block; their curvature in its columns.
    n_owners : list of int
        Participants that own the block.
    """

    total: whole_data.Sums
    blocks: list[slice]
    counts: list[Tensor]
    curvature: list[Tensor]
    n_owners: list[int]

    @classmethod
    def zero(cls, n_items: int, blocks: list[slice], device: torch.device) -> _BlockSums:
        """Return the sums over nobody."""
        nothing = [torch.zeros(n_items, device=device) for _ in blocks]
        total = whole_data.Sums.zero(n_items, blocks[-1].stop, device)
        return cls(total, blocks, nothing, nothing, [0] * len(blocks))

    def plus(
        self, cohort: Cohort, users: Tensor, items: Tensor, gram: Tensor, unobserved_weight: float
    ) -> _BlockSums:
        """Add users (U, N) that were solved against the first N columns of the table."""
        sums = whole_data.user_sums(cohort, users, items, gram, unobserved_weight=unobserved_weight)
        width = users.shape[1]
        more = self.blocks[-1].stop - width
        total = self.total + replace(
            sums, pull=pad(sums.pull, (0, more)), gram=pad(sums.gram, (0, more, 0, more))
        )
        counts, curvature, n_owners = list(self.counts), list(self.curvature), list(self.n_owners)
        for place, block in enumerate(self.blocks):
            if block.stop > width:
                break
            whole = block.stop - block.start == width
            curvature[place] = curvature[place] + (
                sums.curvature
                if whole
                else whole_data.curvature_sums(cohort, users[:, block], items[:, block])
            )
            counts[place] = counts[place] + sums.counts
            n_owners[place] += cohort.n_users
        return replace(self, total=total, counts=counts, curvature=curvature, n_owners=n_owners)

    def with_loss(self, other: _BlockSums) -> _BlockSums:
        """Take over the loss and the number of rows of other sums."""
        total = replace(self.total, loss=other.total.loss, n_rows=other.total.n_rows)
        return replace(self, total=total)

    def plus_received(self, received: UploadSums, client_users: NDArray[np.int64]) -> _BlockSums:
        """Add what an uplink has made of the uploads of clients of one size.

        Parameters
        ----------
        received : UploadSums
            Rows (n_items, N + b + 1) of `whole_data.uploads_of` in the first b blocks.
        client_users : ndarray of shape (n_clients,)
            Users of each client.
        """
        width = int(len(received.numbers) ** 0.5)
        missing = self.blocks[-1].stop - width
        n_users = int(client_users[received.clients].sum())
        gram = whole_data.positive(received.numbers.reshape(width, width))
        total = replace(
            self.total,
            pull=self.total.pull + pad(received.rows[:, :width], (0, missing)),
            gram=self.total.gram + pad(gram, (0, missing, 0, missing)),
            n_users=self.total.n_users + n_users,
        )
        counts, curvature, n_owners = list(self.counts), list(self.curvature), list(self.n_owners)
        for place in range(received.rows.shape[1] - width - 1):
            counts[place] = counts[place] + received.rows[:, -1].clamp_min(0.0)
            curvature[place] = curvature[place] + received.rows[:, width + place].clamp_min(0.0)
            n_owners[place] += n_users
        return replace(self, total=total, counts=counts, curvature=curvature, n_owners=n_owners)

    def of_all_processes(self) -> _BlockSums:
        """Return the sums over the users of all processes that share a fit."""
        n_owners, *sums = add_up(torch.tensor(self.n_owners), *self.counts, *self.curvature)
        return replace(
            self,
            total=self.total.of_all_processes(),
            counts=sums[: len(self.blocks)],
            curvature=sums[len(self.blocks) :],
            n_owners=n_owners.tolist(),
        )


def refit_whole_data(
    cohort: Cohort,
    users: Tensor,
    table: Tensor,
    head: Head,
    *,
    unobserved_weight: float,
    penalty: whole_data.Penalty,
    mean_rows: float,
) -> Tensor:
    """Solve users (U, N) exactly against a table (n_items, N), for `refit_users`."""
    solved = whole_data.solve_users(
        cohort,
        table,
        table.T @ table,
        unobserved_weight=unobserved_weight,
        penalty=penalty,
        mean_rows=mean_rows,
    )
    return whole_data.all_solved(solved)
