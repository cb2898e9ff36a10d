"""Predictors of updates, one problem at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedrecsk.methods.meta_network import HIDDEN_UNITS, LEARNING_RATE, TRAINING_STEPS


def train_network(x: Tensor, y: Tensor, weight_decay: float, seed: int) -> nn.Sequential:
    """Train one network on its own examples, full batch, with torch's Adam."""
    width = x.shape[1]
    first, last = nn.Linear(width, HIDDEN_UNITS), nn.Linear(HIDDEN_UNITS, y.shape[1])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        start = torch.randn(width, HIDDEN_UNITS, generator=generator) / math.sqrt(width)
        first.weight.copy_(start.T)
        for parameter in (first.bias, last.weight, last.bias):
            parameter.zero_()
    network = nn.Sequential(first, nn.Tanh(), last).to(x.dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for _ in range(TRAINING_STEPS):
        decay = first.weight.square().sum() + last.weight.square().sum()
        loss = (network(x) - y).square().mean() + weight_decay * decay / width
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        optimizer.step()
    return network


def ridge(
    x: NDArray[np.float64], y: NDArray[np.float64], strength: float, query: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Fit one ridge regression with an (almost) free intercept by least squares and predict.

    The penalty is per example, written as extra rows of the least-squares problem.
    """
    n, d = x.shape
    penalty = np.sqrt(strength * n * np.append(np.ones(d), 1e-6))
    left = np.vstack([np.column_stack([x, np.ones(n)]), np.diag(penalty)])
    right = np.vstack([y, np.zeros((d + 1, y.shape[1]))])
    coefficients = np.linalg.lstsq(left, right, rcond=None)[0]
    predicted: NDArray[np.float64] = np.column_stack([query, np.ones(len(query))]) @ coefficients
    return predicted
