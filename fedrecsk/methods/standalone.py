"""Every client trains for itself: what a federation has to be better than."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedrecsk.engine.local import Optimizer
from fedrecsk.engine.parallel import add_up, fill_rows, own_part, shares
from fedrecsk.engine.shards import ClientShards, concatenate_ranges
from fedrecsk.engine.streams import Streams
from fedrecsk.methods.nested_state import (
    Logs,
    NestedState,
    PrivateModels,
    Sizes,
)
from fedrecsk.models import ncf
from fedrecsk.models.head import n_weights


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
    parts = shares(everybody, shards.client_rows)
    # Begun with nobody's, as a process may have no clients.
    clients, items = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    values = [np.zeros((0, widest + 1), dtype=np.float32)]
    losses, n_examples = user_factors.new_zeros(()), user_factors.new_zeros(())
    for x, width in enumerate(sizes.widths):
        group = sizes.members(own_part(parts), x)
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
    counts, losses, n_examples = add_up(
        torch.from_numpy(np.bincount(owner, minlength=shards.n_clients)), losses, n_examples
    )
    indptr = np.concatenate([[0], np.cumsum(counts.numpy())])
    order = np.argsort(owner, kind="stable")
    places = concatenate_ranges(indptr, own_part(parts))
    kept_items = torch.zeros(int(indptr[-1]), dtype=torch.int64)
    kept_rows = torch.zeros(int(indptr[-1]), widest + 1)
    kept_items[places] = torch.from_numpy(np.concatenate(items)[order])
    kept_rows[places] = torch.from_numpy(np.concatenate(values)[order])
    rows_of = partial(concatenate_ranges, indptr)
    private = PrivateModels(
        indptr=indptr,
        items=fill_rows(kept_items, parts, rows_of).numpy(),
        rows=fill_rows(kept_rows, parts, rows_of).numpy(),
        networks=fill_rows(torch.from_numpy(networks), parts).numpy(),
    )
    user_factors = fill_rows(user_factors, parts, shards.users_of)
    logs: Logs = {
        "loss": float(losses / n_examples.clamp_min(1)),
        "clients": shards.n_clients,
        "bytes_down": 0,
        "bytes_up": 0,
    }
    return replace(state, user_factors=user_factors, private=private), logs
