"""How evenly a metric is spread over clients."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedrecsk.metrics.ranking import as_numbers, check_weights

# Sums of squares of larger numbers overflow.
_LARGE = 1e100


def client_balance(
    values: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> dict[str, float | int]:
    """Summarise a metric over clients: its level, its low end and its evenness.

    Parameters
    ----------
    values : array-like of shape (n_clients,)
        The metric of each client, higher is better. nan marks a client that has no value
        (say, nothing held out); it is left out and counted in ``n_missing``.
    weights : array-like of shape (n_clients,), default=None
        Weight of each client in ``mean``, for example its number of users. The other
        entries count every client once, since they ask how clients fare, not how large
        they are.

    Returns
    -------
    balance : dict
        - ``mean``: (weighted) mean over the clients.
        - ``worst``: lowest value.
        - ``worst_decile``: mean of the lowest tenth of the clients, rounded up, so of at
          least one.
        - ``spread``: standard deviation over the clients (divisor n).
        - ``jain``: Jain's index (sum x)² / (n · sum x²), from 1/n where one client has
          everything to 1 where all are equal. 1 if all values are 0; nan if a value is
          negative, for which the index says nothing.
        - ``n_clients``: clients with a value.
        - ``n_missing``: clients without.

    Raises
    ------
    ValueError
        If no client has a value, a value is infinite, the lengths differ, or the weights are
        negative or all 0.

    Examples
    --------
    >>> from fedrecsk.metrics import client_balance
    >>> balance = client_balance([0.25, 0.5, 0.75])
    >>> balance["mean"], balance["worst"], round(balance["jain"], 3)
    (0.5, 0.25, 0.857)
    """
    x = as_numbers(values, "values").astype(np.float64)
    if x.ndim != 1:
        raise ValueError(f"values must hold one value a client, got shape {x.shape}.")
    has_value = ~np.isnan(x)
    w = None if weights is None else check_weights(weights, len(x), "clients", "weights")[has_value]
    n_missing = int(len(x) - has_value.sum())
    x = x[has_value]
    if x.size == 0:
        raise ValueError(
            f"No client has a value: got {n_missing} values, all nan. Balance needs at least one."
        )
    if np.isinf(x).any():
        raise ValueError("values must be finite; found an infinite one.")
    if w is not None and not w.any():
        raise ValueError("The weights of the clients that have a value are all 0.")
    worst, top = float(x.min()), float(np.abs(x).max())
    scale = top if top > _LARGE else 1.0
    x = x / scale
    lowest = np.sort(x)[: math.ceil(len(x) / 10)]
    return {
        "mean": float(np.average(x, weights=w) * scale),
        "worst": worst,
        "worst_decile": float(lowest.mean() * scale),
        "spread": float(x.std() * scale),
        "jain": _jain(x),
        "n_clients": len(x),
        "n_missing": n_missing,
    }


def _jain(x: npt.NDArray[np.float64]) -> float:
    if (x < 0).any():
        return float("nan")
    top = x.max()
    if top == 0:
        return 1.0
    x = x / top  # the index has no scale, and squares of tiny values would vanish
    return float(x.sum() ** 2 / (len(x) * (x @ x)))
