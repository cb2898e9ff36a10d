"""HeteFedRec: one federation of clients whose models differ in size.

Yuan, Qu, Cui, Tong, Zhou, Yin. "HeteFedRec: Federated Recommender Systems with Model
Heterogeneity", ICDE 2024, arXiv:2307.12810.

    sizes N_1 < ... < N_l; tables V_x (items, N_x) and predictors T_x of each, V_x = V_l[:, :N_x]
    for each round t:
        S        <- the next clients of a shuffled traversal
        client k <- size x: local training of (u_k[:N_x], V_x, T_1 ... T_x) on
                      sum over y <= x of BCE with the first N_y columns and T_y     (dual task)
                      + alpha ||corr(V_x)||_F / N_x        for x > 1          (decorrelation)
        V_x      <- V_x + the first N_x columns of the changes, padded, added and divided
        T_x      <- mean over the clients that trained it
        V        <- a few steps towards the mean of the tables' item relations  (distillation)

Everything else is an argument: one size is federated averaging; without dual task, decorrelation
and distillation it is direct aggregation; ``aggregation="clustered"`` keeps a federation for each
size; participants may be the largest clients alone.

The base is a network over user and item vectors (`network_step`: NCF, or LightGCN on the clients'
own graphs) or matrix factorisation on the whole-data objective (`whole_data_step`).

Where we deviate, and what the summaries that could be read leave open:

- Decorrelation is a property of the whole table, of which a client moves few rows. Its gradient is
  that of the table as sent, taken at the rows that the client trains.
- What padded updates are divided by is an argument, see `fedrecsk.methods.padded_aggregation`.
- With the whole-data objective a client of size N solves in the first N columns, exactly, and the
  server takes one quasi-Newton step per block of columns, each from the sums of those that own
  the block. Dual task then means that a client also solves in every smaller size and sends the
  sum. There is one table, of which all sizes are slices, so distillation has nothing to do; and
  the step works in the eigenbasis of the users, where decorrelated columns are no aim (as a term
  of the server's gradient it ruined the ranking in a pilot).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from fedrecsk.engine.local import Moments, Optimizer, apply_gradients, init_moments
from fedrecsk.engine.mixing import RowSums
from fedrecsk.engine.shards import ClientShards, Cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.traffic import dense_bytes, sparse_row_bytes
from fedrecsk.methods.padded_aggregation import Denominator, combine, slice_of
from fedrecsk.methods.self_distillation import distill, draw_items
from fedrecsk.models import ncf, whole_data
from fedrecsk.models.decorrelation import decorrelation_pull, spectrum
from fedrecsk.models.head import Head, n_weights
from fedrecsk.models.sampled_bce import LocalResult
from fedrecsk.models.whole_data import ServerStatistics

Aggregation = Literal["padded", "clustered", "standalone"]
ClientWeights = Literal["uniform", "interactions"]
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
        >>> from fedrecsk.methods.hetefedrec import Sizes
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
        Rounds of this fit in which each client took part.
    private : PrivateModels or None
        Of clients that each train for themselves.
    """

    user_factors: Tensor
    tables: tuple[Tensor, ...]
    heads: tuple[Head, ...]
    statistics: tuple[ServerStatistics, ...]
    table_moments: tuple[tuple[Moments, ...], ...]
    head_moments: tuple[Moments, ...]
    turns: NDArray[np.int64]
    private: PrivateModels | None = None

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
        blocks = [] if heads else [block for widths in shared for block in _blocks(widths)]
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
            head_moments=tuple(init_moments(_lifted(h), server_optimizer) for h in heads),
            turns=np.zeros(len(sizes.of_client), dtype=np.int64),
        )


def network_step(
    state: NestedState,
    shards: ClientShards,
    participants: NDArray[np.int64],
    t: int,
    *,
    sizes: Sizes,
    streams: Streams,
    dual_task: bool,
    alpha: float,
    aggregation: Aggregation,
    denominator: Denominator,
    client_weights: ClientWeights,
    item_bias: bool,
    n_graph_layers: int,
    item_propagation: bool = False,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
    server_optimizer: Optimizer,
) -> tuple[NestedState, Logs]:
    """Train the participants, each in its own size, and aggregate.

    Parameters
    ----------
    state : NestedState
        Not changed.
    shards : ClientShards
    participants : ndarray of int64
        Codes of the clients that take part.
    t : int
        Number of the round; it keys all random draws.
    sizes : Sizes
    streams : Streams
    dual_task : bool
        Train every smaller size's predictor along with the own one.
    alpha : float
        Weight of the decorrelation of all sizes but the smallest.
    aggregation : {"padded", "clustered"}
        One federation, or one for each size.
    denominator : {"owners", "clients", "sum"}
        See `fedrecsk.methods.padded_aggregation`.
    client_weights : {"uniform", "interactions"}
        Weight of a client in all sums: 1, or its interactions.
    item_bias, n_graph_layers, item_propagation, n_negatives, batch_size, local_epochs, optimizer
    l2
        See `fedrecsk.models.ncf.train`.
    server_optimizer : Optimizer
        Takes an aggregated change as a negative gradient; plain SGD at rate 1 adds it.

    Returns
    -------
    state : NestedState
    logs : dict
    """
    key = streams.key("examples", t)
    together = dual_task and aggregation == "padded"
    weight_of = shards.client_rows.astype(float)
    if client_weights == "uniform":
        weight_of = np.ones(shards.n_clients)
    user_factors = state.user_factors.clone()
    sums = _NetworkSums.zero(state)
    for x, width in enumerate(sizes.widths):
        tasks = range(x + 1) if together else range(x, x + 1)
        pull = decorrelation_pull(state.tables[x][:, :width], alpha) if alpha and x else None
        group = sizes.members(participants, x)
        for cohort in shards.chunks(group, rows_per_interaction=1 + n_negatives):
            result, heads = ncf.train(
                cohort,
                user_factors[cohort.users, :width],
                state.tables[x],
                [state.heads[y] for y in tasks],
                item_bias=item_bias,
                n_graph_layers=n_graph_layers,
                item_propagation=item_propagation,
                n_negatives=n_negatives,
                batch_size=batch_size,
                local_epochs=local_epochs,
                optimizer=optimizer,
                l2=l2,
                pull=pull,
                key=key,
            )
            user_factors[cohort.users, :width] = result.user_vectors
            weight = torch.from_numpy(weight_of[cohort.clients]).to(user_factors)
            sums.add(x, result, weight)
            for y, head in zip(tasks, heads, strict=True):
                sums.add_head(y, head, state.heads[y], weight)

    members = [sizes.members(participants, x) for x in range(len(sizes.widths))]
    weights = [float(weight_of[group].sum()) for group in members]
    tables, table_moments = list(state.tables), []
    for federation, moments in zip(
        federations(sizes, aggregation), state.table_moments, strict=True
    ):
        change = combine(
            [sums.changes[x] for x in federation],
            [sums.trained[x] for x in federation],
            total_weight=sum(weights[x] for x in federation),
            denominator=denominator,
            item_bias=item_bias,
        )
        moved, after = _server_move(
            state.tables[federation[-1]],
            change,
            [sums.trained[x] for x in federation],
            moments,
            server_optimizer,
            blocks=table_blocks([sizes.widths[x] for x in federation], item_bias=item_bias),
        )
        for x in federation:
            part = slice_of(moved, sizes.widths[x], item_bias=item_bias)
            tables[x] = tables[x] + part
        table_moments.append(after)
    shared, head_moments = sums.moved_heads(state, server_optimizer)
    logs = _network_logs(state, sums, members, dual_task=together)
    return replace(
        state,
        user_factors=user_factors,
        tables=tuple(tables),
        heads=shared,
        table_moments=tuple(table_moments),
        head_moments=head_moments,
        turns=_taken(state, participants),
    ), logs


@dataclass(eq=False)
class _NetworkSums:
    """What the clients of a round send, added up; the only thing here that changes in place.

    Attributes
    ----------
    changes : list of Tensor of shape (n_items, N_x [+ 1])
        For each size, Σ weight * (row after training - row before) over its clients.
    trained : list of Tensor of shape (n_items,)
        Their weight, row by row.
    heads : list of dict of Tensor
        For each size's predictor, Σ weight * change over all clients that trained it.
    head_weights : list of float
    losses, n_examples : Tensor of shape ()
    n_rows : Tensor of shape (n_sizes,), int64
        Rows that the clients of each size send.
    """

    changes: list[Tensor]
    trained: list[Tensor]
    heads: list[Head]
    head_weights: list[float]
    losses: Tensor
    n_examples: Tensor
    n_rows: Tensor

    @classmethod
    def zero(cls, state: NestedState) -> _NetworkSums:
        """Begin with nobody."""
        return cls(
            changes=[torch.zeros_like(table) for table in state.tables],
            trained=[table.new_zeros(len(table)) for table in state.tables],
            heads=[{n: torch.zeros_like(v) for n, v in head.items()} for head in state.heads],
            head_weights=[0.0] * len(state.heads),
            losses=state.user_factors.new_zeros(()),
            n_examples=state.user_factors.new_zeros(()),
            n_rows=torch.zeros(
                len(state.tables), dtype=torch.int64, device=state.user_factors.device
            ),
        )

    def add(self, size: int, result: LocalResult, weight: Tensor) -> None:
        """Add clients of a size that count by weight (C,)."""
        each = weight[result.row_clients] * result.row_valid
        rows = RowSums.of(result.row_items, len(self.trained[size]))
        # The differences and not the rows: a small step must not drown in the rows' rounding.
        self.changes[size] += rows.add(result.row_delta, each)
        self.trained[size] += rows.add(each[:, None])[:, 0]
        self.losses += result.losses.sum()
        self.n_examples += result.n_examples.sum()
        self.n_rows[size] += result.row_valid.sum()

    def add_head(self, size: int, trained: Head, before: Head, weight: Tensor) -> None:
        """Add clients (C, ...) that trained a size's predictor."""
        for name, value in trained.items():
            self.heads[size][name] += torch.tensordot(weight, value - before[name], 1)
        self.head_weights[size] += float(weight.sum())

    def moved_heads(
        self, state: NestedState, server_optimizer: Optimizer
    ) -> tuple[tuple[Head, ...], tuple[Moments, ...]]:
        """Step every predictor that was trained by the mean change of those that trained it."""
        heads, moments = [], []
        for head, change, weight, before in zip(
            state.heads, self.heads, self.head_weights, state.head_moments, strict=True
        ):
            grads = {name: -value[None] / (weight or 1.0) for name, value in change.items()}
            active = torch.tensor([weight > 0], device=self.losses.device)
            moved, after = apply_gradients(_lifted(head), grads, before, active, server_optimizer)
            heads.append({name: value[0] for name, value in moved.items()})
            moments.append(after)
        return tuple(heads), tuple(moments)


def _server_move(
    table: Tensor,
    change: Tensor,
    trained: Sequence[Tensor],
    moments: Sequence[Moments],
    server_optimizer: Optimizer,
    *,
    blocks: Sequence[tuple[int, slice]],
) -> tuple[Tensor, tuple[Moments, ...]]:
    """Return the server optimiser's move of the widest table, the change a negative gradient.

    A block of columns has moments of its own, and only rows that an owner of the block trained
    move: what nobody trained must not drift on by its momentum.
    """
    move, after = torch.zeros_like(table), []
    for (owner, block), before in zip(blocks, moments, strict=True):
        active = torch.stack(list(trained[owner:])).sum(0) > 0
        part = {"block": table[:, block]}
        moved, new = apply_gradients(
            part, {"block": -change[:, block]}, before, active, server_optimizer
        )
        move[:, block] = moved["block"] - part["block"]
        after.append(new)
    return move, tuple(after)


def _network_logs(
    state: NestedState,
    sums: _NetworkSums,
    members: Sequence[NDArray[np.int64]],
    *,
    dual_task: bool,
) -> Logs:
    """Count a round's loss and traffic: whole models down, trained rows and predictors up."""
    held = client_parameters(state, dual_task=dual_task)
    n_rows, down, up = sums.n_rows.tolist(), 0, 0
    for x, (group, table) in enumerate(zip(members, state.tables, strict=True)):
        down += len(group) * dense_bytes((int(held[x]),))
        up += sparse_row_bytes(n_rows[x], table.shape[1])
        up += len(group) * dense_bytes((int(held[x]) - table.numel(),))
    return {
        "loss": float(sums.losses / sums.n_examples.clamp_min(1)),
        "clients": sum(len(group) for group in members),
        "bytes_down": down,
        "bytes_up": up,
    }


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
) -> tuple[NestedState, Logs]:
    """Solve the participants, each in its own columns, and step the table block by block.

    Parameters
    ----------
    state, shards, participants, t, sizes, dual_task, aggregation
        As in `network_step`. Dual task: a client also solves in each smaller size.
    unobserved_weight, penalty, decay, item_curvature
        See `fedrecsk.models.whole_data`.
    server_learning_rate : float or None
        η; None follows from the participation, `whole_data.default_rate`.

    Returns
    -------
    state : NestedState
    logs : dict
    """
    user_factors = state.user_factors.clone()
    tables, statistics = list(state.tables), list(state.statistics)
    users_of_size = np.bincount(
        sizes.of_client, weights=np.diff(shards.client_offsets), minlength=len(sizes.widths)
    )
    logs: Logs = {"loss": 0.0, "clients": len(participants), "bytes_down": 0, "bytes_up": 0}
    n_rows = 0
    for federation in federations(sizes, aggregation):
        table = state.tables[federation[-1]]
        blocks = _blocks([sizes.widths[x] for x in federation])
        sums = _BlockSums.zero(shards.n_items, blocks, table.device)
        for place, x in enumerate(federation):
            group = sizes.members(participants, x)
            for y in range(0 if dual_task else place, place + 1):
                width = blocks[y].stop
                part = table[:, :width]
                gram = part.T @ part
                for cohort in shards.user_chunks(group):
                    users = whole_data.solve_users(
                        cohort,
                        part,
                        gram,
                        unobserved_weight=unobserved_weight,
                        penalty=penalty,
                        mean_rows=len(shards.items) / shards.n_users,
                    )
                    sums = sums.plus(cohort, users, part, gram, unobserved_weight)
                    if y == place:
                        user_factors[cohort.users, :width] = users
            d, n_curvatures = blocks[place].stop, (place + 1) * item_curvature
            n_sent = int(shards.client_items[group].sum())
            logs["bytes_down"] += len(group) * dense_bytes((shards.n_items, d), (d, d))
            # A row carries the pull on the item, its count and its curvatures.
            logs["bytes_up"] += sparse_row_bytes(n_sent, d + 1 + n_curvatures)
            logs["bytes_up"] += len(group) * dense_bytes((d, d))
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
        logs["loss"] += float(sums.total.loss)
        n_rows += sums.total.n_rows
    logs["loss"] /= max(n_rows, 1)
    return replace(
        state,
        user_factors=user_factors,
        tables=tuple(tables),
        statistics=tuple(statistics),
        turns=_taken(state, participants),
    ), logs


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


def standalone_step(
    state: NestedState,
    shards: ClientShards,
    *,
    sizes: Sizes,
    streams: Streams,
    item_bias: bool,
    n_graph_layers: int,
    item_propagation: bool = False,
    n_negatives: int,
    batch_size: int | None,
    local_epochs: int,
    optimizer: Optimizer,
    l2: float,
) -> tuple[NestedState, Logs]:
    """Let every client train for itself, in one go: the baseline without a federation.

    Parameters
    ----------
    state : NestedState
        What all start from.
    shards, sizes, streams
    item_bias, n_graph_layers, item_propagation, n_negatives, batch_size, local_epochs, optimizer
    l2
        See `fedrecsk.models.ncf.train`.

    Returns
    -------
    state : NestedState
        With `private`.
    logs : dict
    """
    everybody = np.arange(shards.n_clients)
    key = streams.key("examples", 0)
    widest = sizes.widths[-1]
    user_factors = state.user_factors.clone()
    networks = np.zeros((shards.n_clients, n_weights(state.heads[-1])), dtype=np.float32)
    clients, items, values = [], [], []
    losses, n_examples = user_factors.new_zeros(()), user_factors.new_zeros(())
    for x, width in enumerate(sizes.widths):
        group = sizes.members(everybody, x)
        for cohort in shards.chunks(group, rows_per_interaction=1 + n_negatives):
            result, heads = ncf.train(
                cohort,
                user_factors[cohort.users, :width],
                state.tables[x],
                [state.heads[x]],
                item_bias=item_bias,
                n_graph_layers=n_graph_layers,
                item_propagation=item_propagation,
                n_negatives=n_negatives,
                batch_size=batch_size,
                local_epochs=local_epochs,
                optimizer=optimizer,
                l2=l2,
                key=key,
            )
            user_factors[cohort.users, :width] = result.user_vectors
            real = result.row_valid
            rows = np.zeros((int(real.sum()), widest + 1), dtype=np.float32)
            trained = result.row_values[real].cpu().numpy()
            rows[:, :width] = trained[:, :width]
            if item_bias:
                rows[:, -1] = trained[:, -1]
            clients.append(cohort.clients[result.row_clients[real].cpu().numpy()])
            items.append(result.row_items[real].cpu().numpy())
            values.append(rows)
            flat = torch.cat([value.flatten(1) for value in heads[0].values()], 1)
            networks[cohort.clients, : flat.shape[1]] = flat.cpu().numpy()
            losses += result.losses.sum()
            n_examples += result.n_examples.sum()
    owner = np.concatenate(clients)
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=shards.n_clients)
    private = PrivateModels(
        indptr=np.concatenate([[0], np.cumsum(counts)]),
        items=np.concatenate(items)[order],
        rows=np.concatenate(values)[order],
        networks=networks,
    )
    logs: Logs = {
        "loss": float(losses / n_examples.clamp_min(1)),
        "clients": shards.n_clients,
        "bytes_down": 0,
        "bytes_up": 0,
    }
    return replace(state, user_factors=user_factors, private=private), logs


def distillation_step(
    state: NestedState,
    t: int,
    *,
    sizes: Sizes,
    streams: Streams,
    fraction: float,
    n_steps: int,
    learning_rate: float,
) -> tuple[NestedState, Logs]:
    """Let the tables agree on which items are alike; needs nothing of any client.

    Parameters
    ----------
    state : NestedState
    t : int
    sizes : Sizes
    streams : Streams
    fraction : float
        Share of the items that are drawn, see `draw_items`.
    n_steps, learning_rate
        See `fedrecsk.methods.self_distillation.distill`.

    Returns
    -------
    state : NestedState
    logs : dict
        ``distillation_loss``, before the first step.
    """
    items = draw_items(len(state.tables[0]), fraction, streams.numpy("distillation", t))
    factors = [table[:, :n] for table, n in zip(state.tables, sizes.widths, strict=True)]
    items = items.to(state.tables[0].device)
    taught, loss = distill(factors, items, n_steps=n_steps, learning_rate=learning_rate)
    tables = tuple(
        torch.cat([new, table[:, new.shape[1] :]], 1)
        for new, table in zip(taught, state.tables, strict=True)
    )
    return replace(state, tables=tables), {"distillation_loss": loss}


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
    for x, width in enumerate(sizes.widths):
        for cohort in shards.user_chunks(sizes.members(clients, x)):
            users = fitted[cohort.users, :width]
            head = state.heads[x] if state.heads else {}
            fitted[cohort.users, :width] = fit(cohort, users, state.tables[x], head)
    return fitted


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
    return whole_data.solve_users(
        cohort,
        table,
        table.T @ table,
        unobserved_weight=unobserved_weight,
        penalty=penalty,
        mean_rows=mean_rows,
    )


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


def _blocks(widths: Sequence[int]) -> list[slice]:
    """Cut the widest table's columns where the sizes end."""
    return [slice(a, b) for a, b in pairwise([0, *widths])]


def table_blocks(widths: Sequence[int], *, item_bias: bool) -> list[tuple[int, slice]]:
    """Return the blocks of columns of the widest table, each with the first size that owns it.

    Examples
    --------
    >>> from fedrecsk.methods.hetefedrec import table_blocks
    >>> table_blocks([2, 4], item_bias=True)
    [(0, slice(0, 2, None)), (1, slice(2, 4, None)), (0, slice(4, 5, None))]
    """
    blocks = list(enumerate(_blocks(widths)))
    return [*blocks, (0, slice(widths[-1], widths[-1] + 1))] if item_bias else blocks


def _lifted(head: Head) -> Head:
    """Give every tensor the leading axis of one client that optimisers expect."""
    return {name: value[None] for name, value in head.items()}


def _taken(state: NestedState, participants: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `turns` after another round with these participants."""
    turns = state.turns.copy()
    turns[participants] += 1
    return turns
