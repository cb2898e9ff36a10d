"""Federated recommender estimators for scikit-learn."""

from fedrecsk.data import interactions_from_sparse
from fedrecsk.estimators import (
    CentralizedRecommender,
    FedAvgRecommender,
    FedFastRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
    PopularityRecommender,
)
from fedrecsk.exceptions import (
    NoItemTextWarning,
    NothingHeldOutError,
    NothingHeldOutWarning,
    NoUsableUploadError,
    TooFewClientsError,
    UnknownIdWarning,
)

__version__ = "0.1.0"

__all__ = [
    "CentralizedRecommender",
    "FELLRecRecommender",
    "FedAvgRecommender",
    "FedFNNRecommender",
    "FedFastRecommender",
    "HeteFedRecRecommender",
    "NoItemTextWarning",
    "NoUsableUploadError",
    "NothingHeldOutError",
    "NothingHeldOutWarning",
    "PopularityRecommender",
    "TooFewClientsError",
    "UnknownIdWarning",
    "__version__",
    "interactions_from_sparse",
]
