"""Floor 4: scikit-learn estimators around the methods: validate, call, assign."""

from fedrecsk.estimators._baselines import FedAvgRecommender, PopularityRecommender
from fedrecsk.estimators._fedfast import FedFastRecommender
from fedrecsk.estimators._fedfnn import FedFNNRecommender

__all__ = [
    "FedAvgRecommender",
    "FedFNNRecommender",
    "FedFastRecommender",
    "PopularityRecommender",
]
