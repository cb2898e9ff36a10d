"""Interactions as the caller has them, and as arrays of codes (no torch here)."""

from fedrecsk.data.interactions import (
    Columns,
    Interactions,
    encode,
    interactions_from_sparse,
    read_columns,
)
from fedrecsk.data.partition import (
    auto_ratio,
    auto_sizes,
    client_capacities,
    cluster_clients,
    size_groups,
)
from fedrecsk.data.vocabulary import Vocabulary

__all__ = [
    "Columns",
    "Interactions",
    "Vocabulary",
    "auto_ratio",
    "auto_sizes",
    "client_capacities",
    "cluster_clients",
    "encode",
    "interactions_from_sparse",
    "read_columns",
    "size_groups",
]
