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
own graphs); beyond the paper, `nested_whole_data` has matrix factorisation on the whole-data
objective.

Where we deviate, and what the summaries that could be read leave open:

- Decorrelation is a property of the whole table, of which a client moves few rows. Its gradient is
  that of the table as sent, taken at the rows that the client trains.
- What padded updates are divided by is an argument, see `fedrecsk.methods.padded_aggregation`.
- Padded changes go through a server optimiser; plain SGD at rate 1 adds them, as the paper does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.device import to_device
from fedrecsk.engine.local import Moments, Optimizer, apply_gradients
from fedrecsk.engine.mixing import RowSums, mean_rows
from fedrecsk.engine.parallel import add_up, fill_rows, own_part, shares
from fedrecsk.engine.shards import ClientShards, counted_turns, written_users
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.traffic import dense_bytes, sparse_row_bytes
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import Uploads
from fedrecsk.methods.nested_state import (
    Aggregation,
    Arrivals,
    Logs,
    NestedState,
    Sizes,
    client_parameters,
    downloads,
    federations,
    table_blocks,
)
from fedrecsk.methods.padded_aggregation import Denominator, combine, slice_of
from fedrecsk.methods.self_distillation import distill, draw_items
from fedrecsk.models import ncf, sampled_bce
from fedrecsk.models.decorrelation import decorrelation_pull
from fedrecsk.models.head import Head, flat_changes, lifted, stacked_heads
from fedrecsk.models.sampled_bce import BROKEN, LocalResult

ClientWeights = Literal["uniform", "interactions"]


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
    uplink: Uplink | None = None,
    in_place: bool = False,
) -> tuple[NestedState, Logs]:
    """Train the participants, each in its own size, and aggregate.

    Parameters
    ----------
    state : NestedState
        Not changed, unless `in_place`.
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
    uplink : Uplink, optional
        What happens to uploads before they are added up, among clients of the same size; None
        adds them as they come. A client that would be alone in a secure sum sends nothing and
        counts as rejected.
    in_place : bool, default=False
        Write users' vectors and clients' turns into the arrays of `state`, which must not be read
        any more. Else all users are copied, also those who take no part.

    Returns
    -------
    state : NestedState
    logs : dict

    Raises
    ------
    NoUsableUploadError
        If what every participant has learned is not finite, or far too large. On a GPU single
        participants are looked at by an uplink alone.
    ValueError
        If with secure sums a single client of each size takes part.
    """
    key = streams.key("examples", t)
    together = dual_task and aggregation == "padded"

    def weights_of(clients: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = shards.client_rows[clients].astype(float)
        return rows if client_weights == "interactions" else np.ones_like(rows)

    trained: list[tuple[Tensor, Tensor]] = []
    sums, arrivals = _NetworkSums.zero(state), Arrivals.before(state)
    parts = shares(participants, shards.client_rows[participants])
    # A GPU would be waited for, unless somebody looks at single uploads anyway.
    looks = uplink is not None or state.user_factors.device.type == "cpu"
    for x, width in enumerate(sizes.widths):
        tasks = range(x + 1) if together else range(x, x + 1)
        shared = [state.heads[y] for y in tasks]
        pull = decorrelation_pull(state.tables[x][:, :width], alpha) if alpha and x else None
        group = sizes.members(own_part(parts), x)
        bound = BROKEN * max(1.0, float(state.tables[x].abs().max())) if looks else math.inf
        sent: list[tuple[Uploads, Tensor]] = []
        for cohort in shards.chunks(group, rows_per_interaction=1 + n_negatives):
            before = state.user_factors[cohort.users, :width]
            result, heads = ncf.train(
                cohort,
                before,
                state.tables[x],
                shared,
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
            weight = to_device(weights_of(cohort.clients), before.device).to(before.dtype)
            changes = flat_changes(heads, shared, weight)
            broken = result.broken(cohort.owner, {"heads": changes}, bound) if looks else None
            if broken is not None:
                result = result.without(broken, cohort.owner, before)
                changes = changes.masked_fill(broken[:, None], 0.0)
                weight = weight.masked_fill(broken, 0.0)
                sums.n_broken += int(broken.sum())
            trained.append((cohort.users, result.user_vectors))
            sums.count(x, result)
            each = weight[result.row_clients] * result.row_valid
            if uplink is None:
                sums.add(x, result, each)
                sums.add_heads(tasks, weight @ changes, weight.sum())
            else:
                own = result.uploads(cohort.clients, each, changes, weight)
                vectors = sampled_bce.with_constant(result.user_vectors, item_bias)
                means = mean_rows(vectors, cohort.owner, len(weight))
                kept = torch.ones_like(weight, dtype=torch.bool) if broken is None else ~broken
                sent.append((own.of(kept), means[kept]))
        if uplink is not None and sent:
            uploads = Uploads.join([own for own, _ in sent])
            vectors = torch.cat([means for _, means in sent])
            receive = partial(uplink.receive, uploads, vectors, state.tables[x], t)
            received, n_rejected = arrivals.take(x, len(uploads.clients), uplink, receive)
            sums.n_broken += n_rejected
            if received is not None:
                sums.changes[x], sums.trained[x] = received.rows, received.row_weights
                sums.add_heads(tasks, received.numbers, received.weight)
    sums = sums.of_all_processes()
    arrivals.check_somebody_is_heard(len(participants), sums.n_broken, t)
    user_factors = fill_rows(
        written_users(state.user_factors, trained, in_place=in_place), parts, shards.users_of
    )
    members = [sizes.members(participants, x) for x in range(len(sizes.widths))]
    weights = [float(weights_of(group).sum()) for group in members]
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
    moved_heads, head_moments = sums.moved_heads(state, server_optimizer)
    logs = arrivals.logs(_network_logs(state, sums, members, dual_task=together))
    return replace(
        state,
        user_factors=user_factors,
        tables=tuple(tables),
        heads=moved_heads,
        table_moments=tuple(table_moments),
        head_moments=head_moments,
        turns=counted_turns(state.turns, participants, in_place=in_place),
        residuals=arrivals.kept(),
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
    head_weights : Tensor of shape (n_sizes,)
    losses, n_examples : Tensor of shape ()
    n_rows : Tensor of shape (n_sizes,), int64
        Rows that the clients of each size send.
    n_broken : int
        Clients whose uploads nobody could use; they are in none of the sums.
    """

    changes: list[Tensor]
    trained: list[Tensor]
    heads: list[Head]
    head_weights: Tensor
    losses: Tensor
    n_examples: Tensor
    n_rows: Tensor
    n_broken: int = 0

    @classmethod
    def zero(cls, state: NestedState) -> _NetworkSums:
        """Begin with nobody."""
        return cls(
            changes=[torch.zeros_like(table) for table in state.tables],
            trained=[table.new_zeros(len(table)) for table in state.tables],
            heads=[{n: torch.zeros_like(v) for n, v in head.items()} for head in state.heads],
            head_weights=state.user_factors.new_zeros(len(state.heads)),
            losses=state.user_factors.new_zeros(()),
            n_examples=state.user_factors.new_zeros(()),
            n_rows=torch.zeros(
                len(state.tables), dtype=torch.int64, device=state.user_factors.device
            ),
        )

    def count(self, size: int, result: LocalResult) -> None:
        """Count the examples and rows of a chunk of clients of a size."""
        self.losses += result.losses.sum()
        self.n_examples += result.n_examples.sum()
        self.n_rows[size] += result.row_valid.sum()

    def add(self, size: int, result: LocalResult, each: Tensor) -> None:
        """Add the rows of clients of a size, which count by weight (K,)."""
        rows = RowSums(result.row_items, len(self.trained[size]))
        # The differences and not the rows: a small step must not drown in the rows' rounding.
        self.changes[size] += rows.add(result.row_delta, each)
        self.trained[size] += rows.add(each[:, None])[:, 0]

    def add_heads(self, trained: Sequence[int], changes: Tensor, weight: Tensor) -> None:
        """Add the weighted changes (P,) of the predictors of some sizes, one after another."""
        heads = [self.heads[size] for size in trained]
        for size, head in zip(trained, stacked_heads(changes[None], heads), strict=True):
            for name, value in head.items():
                self.heads[size][name] += value[0]
            self.head_weights[size] += weight

    def of_all_processes(self) -> _NetworkSums:
        """Return what the clients of all processes that share a fit have sent."""
        n_sizes = len(self.trained)
        n_broken, weights, losses, n_examples, n_rows, *rest = add_up(
            torch.tensor(self.n_broken),
            self.head_weights,
            self.losses,
            self.n_examples,
            self.n_rows,
            *self.changes,
            *self.trained,
            *(value for head in self.heads for value in head.values()),
        )
        heads = iter(rest[2 * n_sizes :])
        return _NetworkSums(
            changes=rest[:n_sizes],
            trained=rest[n_sizes : 2 * n_sizes],
            heads=[{name: next(heads) for name in head} for head in self.heads],
            head_weights=weights,
            losses=losses,
            n_examples=n_examples,
            n_rows=n_rows,
            n_broken=int(n_broken),
        )

    def moved_heads(
        self, state: NestedState, server_optimizer: Optimizer
    ) -> tuple[tuple[Head, ...], tuple[Moments, ...]]:
        """Step every predictor that was trained by the mean change of those that trained it."""
        heads, moments = [], []
        for head, change, weight, before in zip(
            state.heads, self.heads, self.head_weights, state.head_moments, strict=True
        ):
            active = weight[None] > 0
            mean = torch.where(active, weight, torch.ones_like(weight))
            grads = {name: -value[None] / mean for name, value in change.items()}
            moved, after = apply_gradients(lifted(head), grads, before, active, server_optimizer)
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
    held, sent = (count(state, dual_task=dual_task) for count in (client_parameters, downloads))
    down, up = 0, sums.n_rows.new_zeros(())
    for x, (group, table) in enumerate(zip(members, state.tables, strict=True)):
        down += len(group) * int(sent[x])
        up += sums.n_rows[x] * sparse_row_bytes(1, table.shape[1])
        up += len(group) * dense_bytes((int(held[x]) - table.numel(),))
    return {
        "loss": sums.losses / sums.n_examples.clamp_min(1),
        "clients": sum(len(group) for group in members),
        "rejected": sums.n_broken,
        "bytes_down": down,
        "bytes_up": up,
    }


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
