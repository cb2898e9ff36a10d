"""Data to learn on: made up, from MovieLens, or from the caller's own files."""

from fedrecsk.data.datasets import load_interactions
from fedrecsk.data.movielens import fetch_movielens, load_movielens
from fedrecsk.data.synthetic import make_interactions

__all__ = ["fetch_movielens", "load_interactions", "load_movielens", "make_interactions"]
