"""Give every client of a federation its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.partition import auto_ratio, auto_sizes, client_capacities, size_groups
from fedrecsk.engine.sampling import epoch_cohort
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._factors import hold_out, make_shards
from fedrecsk.methods.nested_state import NestedState, Sizes, refit_users
from fedrecsk.methods.nested_whole_data import refit_whole_data, whole_data_step
from fedrecsk.models import whole_data
from fedrecsk.models.factors import random_factors

# What sizes="auto" chooses from, and how each is tried.
CANDIDATE_SIZES = (4, 8, 16, 32, 64)
TRIAL_ROUNDS = 15
TRIAL_PARTICIPATION = 0.2
TRIAL_HELD_OUT = 0.2


@dataclass(frozen=True, eq=False)
class Assignment:
    """Sizes of all clients.

    Attributes
    ----------
    columns : ndarray of shape (n_clients,), int64
        Columns of each client's model.
    group : ndarray of shape (n_clients,), int64
        Group of each client, from the fewest interactions, or the smallest size, to the most.
    sizes : tuple of int
        Of the groups.
    ratio : tuple of float
        Shares of clients in the groups; they sum to 1.
    """

    columns: NDArray[np.int64]
    group: NDArray[np.int64]
    sizes: tuple[int, ...]
    ratio: tuple[float, ...]


def assign_sizes(
    data: Interactions,
    *,
    sizes: Sequence[int] | Literal["auto"],
    group_ratio: Sequence[float] | Literal["auto"],
    client_sizes: Mapping[Any, int] | ArrayLike | None,
    streams: Streams,
    device: torch.device,
) -> Assignment:
    """Give every client its size: as the caller says, or by its number of interactions.

    Parameters
    ----------
    data : Interactions
        Of training.
    sizes, group_ratio, client_sizes
        As in `HeteFedRecRecommender`.
    streams : Streams
    device : torch.device

    Returns
    -------
    Assignment
    """
    if client_sizes is not None:
        columns = client_capacities(client_sizes, data.clients.ids)
        distinct, group, counts = np.unique(columns, return_inverse=True, return_counts=True)
        shares = tuple(float(share) for share in counts / len(columns))
        return Assignment(columns, group, tuple(int(size) for size in distinct), shares)
    if not isinstance(sizes, str):
        sizes = _widths(sizes)
    if isinstance(sizes, str) or isinstance(group_ratio, str):
        sizes, group_ratio = _chosen(data, sizes, group_ratio, streams, device)
    if len(sizes) != len(group_ratio):
        raise ValueError(
            f"sizes has {len(sizes)} entries and group_ratio {len(group_ratio)}: each group of "
            "clients needs a size. Give both the same length."
        )
    if (np.diff(sizes) < 0).any():
        raise ValueError(
            f"sizes must ascend, found {sizes!r}: groups are sorted from the clients with "
            "the fewest interactions to those with the most."
        )
    group = size_groups(np.diff(data.client_indptr), group_ratio)
    total = float(sum(group_ratio))
    return Assignment(
        np.asarray(sizes, dtype=np.int64)[group],
        group,
        sizes,
        tuple(float(share) / total for share in group_ratio),
    )


def _widths(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Read the sizes of groups, which a caller may give as any sequence or array."""
    for size in sizes:
        whole = isinstance(size, Integral) and not isinstance(size, bool | np.bool_)
        if not whole or size < 1:
            raise ValueError(
                f"sizes holds {size!r}; a size is the number of columns of a model, an integer of "
                "at least 1."
            )
    return tuple(int(size) for size in sizes)


def _chosen(
    data: Interactions,
    sizes: tuple[int, ...] | Literal["auto"],
    group_ratio: Sequence[float] | Literal["auto"],
    streams: Streams,
    device: torch.device,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Choose sizes, shares or both by what each size is worth to validation clients."""
    if data.user_counts.max() < 2:
        raise ValueError(
            'sizes="auto" and group_ratio="auto" hold out a part of every user\'s interactions, '
            "and every user here has one. Give both."
        )
    candidates = CANDIDATE_SIZES if sizes == "auto" else tuple(sorted(set(sizes)))
    quality, clients = _quality_of_sizes(data, candidates, streams, device)
    counts = np.diff(data.client_indptr)
    if sizes != "auto":
        return candidates, auto_ratio(quality, counts[clients], candidates)
    if isinstance(group_ratio, str):
        return auto_sizes(quality, counts[clients], candidates)
    # Each group by itself, and no group smaller than one that has less data.
    group = size_groups(counts, group_ratio)[clients]
    least, chosen = 0, []
    for number in range(len(group_ratio)):
        members = quality[group == number, least:]
        if len(members):
            one_group = np.zeros(len(members))
            found, _ = auto_sizes(members, one_group, candidates[least:], n_sizes=1)
            least = candidates.index(found[0])
        chosen.append(candidates[least])
    return tuple(chosen), tuple(group_ratio)


def _quality_of_sizes(
    data: Interactions, candidates: Sequence[int], streams: Streams, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Try each size on everybody, with the whole-data objective: the one that is quick to train.

    Returns
    -------
    quality : ndarray of shape (m, n_candidates)
        NDCG@20 of the clients that have something held out.
    clients : ndarray of shape (m,)
    """
    rows, validation = hold_out(data, TRIAL_HELD_OUT, Streams(streams.key("size_trial") % 2**31))
    shards = make_shards(data, rows, device)
    shape = int(rows.sum()), data.n_users, data.n_items
    weight = whole_data.default_unobserved_weight(*shape)
    penalty = whole_data.Penalty(whole_data.default_l2(*shape), 0.75)
    n_delegates = max(1, round(TRIAL_PARTICIPATION * data.n_clients))
    owner = data.user_client[validation.users]
    clients, place = np.unique(owner, return_inverse=True)
    quality = np.empty((len(clients), len(candidates)))
    for column, width in enumerate(candidates):
        size = Sizes.of(np.full(data.n_clients, width))
        users, table = random_factors(
            data.n_users,
            data.n_items,
            width,
            item_bias=False,
            init_scale=0.01,
            streams=streams,
            device=device,
        )
        state = NestedState.start(users, table, [], size, data.user_client)
        for t in range(TRIAL_ROUNDS):
            state, _ = whole_data_step(
                state,
                shards,
                epoch_cohort(state.turns, n_delegates, streams.numpy("size_trial", t)),
                t,
                sizes=size,
                dual_task=False,
                aggregation="padded",
                unobserved_weight=weight,
                penalty=penalty,
                server_learning_rate=None,
                decay=0.9,
                item_curvature=True,
            )
        solve = partial(
            refit_whole_data,
            unobserved_weight=weight,
            penalty=penalty,
            mean_rows=len(shards.items) / shards.n_users,
        )
        vectors = refit_users(state, shards, clients, sizes=size, fit=solve)
        chosen = torch.from_numpy(validation.users).to(vectors.device)
        each = validation.ndcg_per_user((vectors[chosen] @ state.tables[0].T).cpu().numpy())
        quality[:, column] = np.bincount(place, each) / np.bincount(place)
    return quality, clients
