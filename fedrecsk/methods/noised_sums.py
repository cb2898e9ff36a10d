"""What a round of a factor model releases with privacy: noised sums over the delegates.

Delegates send what they send without privacy, laid out client by client. What may be looked at is
the sums that `fedrecsk.engine.privacy` makes of it, and how long uploads are to be in the next
round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedrecsk.engine.mixing import mean_rows
from fedrecsk.engine.privacy import Release
from fedrecsk.engine.shards import ClientShards
from fedrecsk.engine.uplink import Uplink
from fedrecsk.engine.uploads import Uploads
from fedrecsk.methods.factor_state import FactorState
from fedrecsk.models import whole_data

# What the parts of a whole-data upload are shortened to in the first round: pull, curvature, counts
# and Gram matrix. Near to what is learned on MovieLens-100K; they may depend on no client's data.
START = (1.0, 0.1, 5.0, 0.1)


def released(
    uplink: Uplink,
    uploads: Uploads,
    means: Tensor,
    widths: Sequence[int],
    start: Sequence[float],
    state: FactorState,
    t: int,
    n_clients: int,
) -> tuple[Release, int]:
    """Release the sums of a round, with the bounds in the state, or those to start with."""
    bounds = state.clip_norms
    if bounds is None or len(bounds) != len(start):  # a fit that goes on may send other parts
        bounds = torch.tensor(start, dtype=torch.float64)
    return uplink.release(
        uploads, means, state.item_table, t, widths=widths, bounds=bounds, n_clients=n_clients
    )


def released_users(
    uplink: Uplink,
    sent: Sequence[tuple[Uploads, Tensor]],
    total: whole_data.Sums,
    shards: ClientShards,
    state: FactorState,
    t: int,
    n_clients: int,
    *,
    item_curvature: bool,
) -> tuple[whole_data.Sums, Release, int]:
    """Release the sums over solved users: those, all that is released, and how many it rejects."""
    assert uplink.privacy is not None
    items = state.item_table
    d = items.shape[1]
    of_users = Uploads.join([own for own, _ in sent] or [Uploads.nobody(d + 2, d * d, items)])
    vectors = torch.cat([items.new_zeros(0, d), *(users for _, users in sent)])
    uploads, means = _client_wise(of_users, vectors, shards.n_items)
    # Pull, curvature, count; noise for a column that nobody reads would be wasted.
    columns = [*range(d), d, d + 1] if item_curvature else [*range(d), d + 1]
    widths = (d, *[1] * (len(columns) - d))
    uploads = uploads.with_rows(uploads.rows[:, columns])
    start = START if item_curvature else (START[0], *START[2:])
    release, n_rejected = released(uplink, uploads, means, widths, start, state, t, n_clients)
    rows = items.new_zeros(len(items), d + 2)
    rows[:, columns] = release.sums.rows
    sums = total.with_received(replace(release.sums, rows=rows), shards.client_users)
    n_users = max(1, round(uplink.privacy.cohort * shards.n_users / shards.n_clients))
    return replace(sums, n_users=n_users), release, n_rejected


def _client_wise(uploads: Uploads, vectors: Tensor, n_items: int) -> tuple[Uploads, Tensor]:
    """Add up users' uploads, and average their vectors (U, d), client by client."""
    clients, place = np.unique(uploads.clients, return_inverse=True)
    means = mean_rows(vectors, torch.from_numpy(place).to(vectors.device), len(clients))
    return uploads.by_client(n_items), means


def sends_every_row(uplink: Uplink | None) -> bool:
    """Whether noise of their own must be in all rows that clients send, touched or not."""
    return uplink is not None and uplink.privacy is not None and uplink.privacy.name == "local"
