"""Federated recommender estimators for scikit-learn."""

from fedrecsk.data import interactions_from_sparse
from fedrecsk.estimators import (
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    PopularityRecommender,
)
from fedrecsk.exceptions import NothingHeldOutError, NothingHeldOutWarning, UnknownIdWarning

__version__ = "0.1.0"

__all__ = [
    "FedAvgRecommender",
    "FedFNNRecommender",
    "FedFastRecommender",
    "NothingHeldOutError",
    "NothingHeldOutWarning",
    "PopularityRecommender",
    "UnknownIdWarning",
    "__version__",
    "interactions_from_sparse",
]
