"""Where user and item vectors start."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrecsk.engine.streams import Streams


def random_factors(
    n_users: int,
    n_items: int,
    n_factors: int,
    *,
    item_bias: bool,
    init_scale: float,
    streams: Streams,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Draw the start: normal vectors of standard deviation `init_scale`, bias zero.

    Returns
    -------
    user_factors : Tensor of shape (n_users, n_factors)
    item_table : Tensor of shape (n_items, n_factors + item_bias)
    """
    users = torch.randn(n_users, n_factors, generator=streams.torch("user_factors"))
    items = torch.randn(n_items, n_factors, generator=streams.torch("item_factors"))
    table = init_scale * items
    if item_bias:
        table = torch.cat([table, torch.zeros(n_items, 1)], dim=1)
    return (init_scale * users).to(device), table.to(device)
