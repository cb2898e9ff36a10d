"""Ranking metrics, their balance over clients, and scorers for model selection."""

from fedrecsk.metrics.balance import client_balance
from fedrecsk.metrics.exposure import exposure_ratio
from fedrecsk.metrics.ranking import (
    coverage_at_k,
    hit_rate_at_k,
    map_at_k,
    mrr_at_k,
    ndcg_at_k,
    precision_at_k,
    recall_at_k,
    top_k,
)
from fedrecsk.metrics.scorers import evaluate, ranking_scorer

__all__ = [
    "client_balance",
    "coverage_at_k",
    "evaluate",
    "exposure_ratio",
    "hit_rate_at_k",
    "map_at_k",
    "mrr_at_k",
    "ndcg_at_k",
    "precision_at_k",
    "ranking_scorer",
    "recall_at_k",
    "top_k",
]
