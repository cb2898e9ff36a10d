"""Floor 4: scikit-learn estimators around the methods: validate, call, assign."""

from fedrecsk.estimators._baselines import FedAvgRecommender, PopularityRecommender
from fedrecsk.estimators._centralized import CentralizedRecommender
from fedrecsk.estimators._fedfast import FedFastRecommender
from fedrecsk.estimators._fedfnn import FedFNNRecommender
from fedrecsk.estimators._fellrec import FELLRecRecommender
from fedrecsk.estimators._hetefedrec import HeteFedRecRecommender

__all__ = [
    "CentralizedRecommender",
    "FELLRecRecommender",
    "FedAvgRecommender",
    "FedFNNRecommender",
    "FedFastRecommender",
    "HeteFedRecRecommender",
    "PopularityRecommender",
]
