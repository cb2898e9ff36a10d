"""Displays in the style of scikit-learn's; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedrecsk.metrics.balance import client_balance
from fedrecsk.metrics.scorers import evaluate, recommender_of

__all__ = ["ClientBalanceDisplay", "ConvergenceDisplay"]

FloatArray = npt.NDArray[np.float64]

_METRIC_LABELS = {
    "ndcg": "NDCG",
    "recall": "Recall",
    "precision": "Precision",
    "hit_rate": "Hit rate",
    "mrr": "MRR",
    "map": "MAP",
}
_Y_LABELS = {"loss": "Training loss", "validation_ndcg": "Validation NDCG"}


class ConvergenceDisplay:
    """Training loss or validation quality as a fit went on, one line an estimator.

    Make it with :meth:`from_estimators`.

    Parameters
    ----------
    curves : mapping of str to tuple of two array-likes of shape (n_points,)
        For each line its legend entry, and its x and y values.
    xlabel, ylabel : str
        Labels of the axes.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes that were drawn on.
    figure_ : matplotlib Figure
        Figure of the axes.
    lines_ : list of matplotlib Line2D
        The lines, in the order of ``curves``.

    Examples
    --------
    >>> from fedrecsk.plotting import ConvergenceDisplay
    >>> display = ConvergenceDisplay(
    ...     curves={"FedAvg": ([1, 2, 3], [0.7, 0.6, 0.55])}, xlabel="Round", ylabel="Loss")
    >>> display.plot()  # doctest: +SKIP
    <fedrecsk.plotting.ConvergenceDisplay object at ...>
    """

    ax_: Any
    figure_: Any
    lines_: list[Any]

    def __init__(
        self,
        *,
        curves: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
        xlabel: str,
        ylabel: str,
    ) -> None:
        self.curves = curves
        self.xlabel = xlabel
        self.ylabel = ylabel

    @classmethod
    def from_estimators(
        cls,
        estimators: Mapping[str, Any] | Iterable[Any],
        *,
        x: str = "round",
        y: str | None = None,
        ax: Any = None,
        line_kw: Mapping[str, Any] | None = None,
    ) -> Self:
        """Draw what ``history_`` recorded of each fit.

        Parameters
        ----------
        estimators : mapping of str to estimator, or iterable of estimators
            Fitted; also pipelines and searches that end in a recommender. The keys are the
            legend entries; without keys, the class names.
        x : {"round", "seconds", "megabytes"}, default="round"
            Horizontal axis: communication rounds, or seconds or megabytes sent (up and down,
            all clients together) since the fit began.
        y : str, default=None
            Quantity of ``history_`` to draw. None: ``"validation_ndcg"`` if every fit recorded
            it, else ``"loss"``. Rounds without a value are passed over.
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        line_kw : mapping, default=None
            Passed to matplotlib's ``plot`` for every line.

        Returns
        -------
        display : ConvergenceDisplay
            The drawn display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If ``x`` is unknown, there is no estimator, or a history does not have ``y``.
        """
        _import_pyplot(f"{cls.__name__}.from_estimators")
        if x not in ("round", "seconds", "megabytes"):
            raise ValueError(f"x must be 'round', 'seconds' or 'megabytes', got {x!r}.")
        histories = {
            name: _history(name, estimator) for name, estimator in _named(estimators).items()
        }
        if y is None:
            recorded = all(
                any(entry.get("validation_ndcg") is not None for entry in history)
                for history in histories.values()
            )
            y = "validation_ndcg" if recorded else "loss"
        curves = {name: _curve(name, history, x, y) for name, history in histories.items()}
        xlabel = {"round": "Round", "seconds": "Seconds", "megabytes": "Megabytes sent"}[x]
        ylabel = _Y_LABELS.get(y, y.replace("_", " ").capitalize())
        return cls(curves=curves, xlabel=xlabel, ylabel=ylabel).plot(ax, line_kw=line_kw)

    def plot(self, ax: Any = None, *, line_kw: Mapping[str, Any] | None = None) -> Self:
        """Draw the lines.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        line_kw : mapping, default=None
            Passed to matplotlib's ``plot`` for every line.

        Returns
        -------
        display : ConvergenceDisplay
            This display, with ``ax_``, ``figure_`` and ``lines_``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        self.ax_ = _axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = self.ax_.figure
        self.lines_ = []
        for name, (x, y) in self.curves.items():
            # A fit of one round would be an invisible line.
            marker = "o" if np.size(x) == 1 else None
            style = {"linewidth": 2, "marker": marker, "label": name, **(line_kw or {})}
            self.lines_ += self.ax_.plot(x, y, **style)
        whole = all((np.mod(x, 1) == 0).all() for x, _ in self.curves.values())
        if whole and self.ax_.get_xscale() == "linear":
            self.ax_.locator_params(axis="x", integer=True)  # there is no round 1.5
        _finish(self.ax_, self.xlabel, self.ylabel)
        return self


class ClientBalanceDisplay:
    """A metric over clients from the worst off to the best off, one line an estimator.

    A flat line serves all clients alike; how far its left end sinks shows what the worst-off
    clients get. The legend gives the mean over the clients and Jain's index
    (:func:`~fedrecsk.metrics.client_balance`). Make it with :meth:`from_estimators`.

    Parameters
    ----------
    values : mapping of str to array-like of shape (n_clients,)
        For each line its legend entry and the clients' values, in any order; nan is left out.
    ylabel : str
        What the values are.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes that were drawn on.
    figure_ : matplotlib Figure
        Figure of the axes.
    lines_ : list of matplotlib Line2D
        The lines, in the order of ``values``.

    Examples
    --------
    >>> from fedrecsk.plotting import ClientBalanceDisplay
    >>> display = ClientBalanceDisplay(values={"FedAvg": [0.1, 0.4, 0.3]}, ylabel="NDCG@20")
    >>> display.plot()  # doctest: +SKIP
    <fedrecsk.plotting.ClientBalanceDisplay object at ...>
    """

    ax_: Any
    figure_: Any
    lines_: list[Any]

    def __init__(self, *, values: Mapping[str, npt.ArrayLike], ylabel: str) -> None:
        self.values = values
        self.ylabel = ylabel

    @classmethod
    def from_estimators(
        cls,
        estimators: Mapping[str, Any] | Iterable[Any],
        X: Any,
        client_ids: npt.ArrayLike | None = None,
        *,
        metric: str = "ndcg",
        k: int = 20,
        ax: Any = None,
        line_kw: Mapping[str, Any] | None = None,
    ) -> Self:
        """Evaluate each estimator on held-out interactions and draw its clients' values.

        Parameters
        ----------
        estimators : mapping of str to estimator, or iterable of estimators
            Fitted; also pipelines and searches that end in a recommender. The keys are the
            legend entries; without keys, the class names.
        X : interactions
            Held-out rows.
        client_ids : array-like of shape (n_rows,), default=None
            Client of each row, as in :func:`~fedrecsk.metrics.evaluate`.
        metric : {"ndcg", "recall", "precision", "hit_rate", "mrr", "map"}, default="ndcg"
            The metric.
        k : int, default=20
            Length of the list that is judged.
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        line_kw : mapping, default=None
            Passed to matplotlib's ``step`` for every line.

        Returns
        -------
        display : ClientBalanceDisplay
            The drawn display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there is no estimator, the metric has no value per client, or as in
            :func:`~fedrecsk.metrics.evaluate`.
        """
        _import_pyplot(f"{cls.__name__}.from_estimators")
        if metric not in _METRIC_LABELS:
            raise ValueError(
                f"metric must be one of {', '.join(_METRIC_LABELS)}, which have a value for each "
                f"client; got {metric!r}."
            )
        values = {
            name: evaluate(estimator, X, client_ids, metrics=metric, k=k).per_client[
                f"{metric}@{k}"
            ]
            for name, estimator in _named(estimators).items()
        }
        display = cls(values=values, ylabel=f"{_METRIC_LABELS[metric]}@{k} of the client")
        return display.plot(ax, line_kw=line_kw)

    def plot(self, ax: Any = None, *, line_kw: Mapping[str, Any] | None = None) -> Self:
        """Draw the lines.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        line_kw : mapping, default=None
            Passed to matplotlib's ``step`` for every line.

        Returns
        -------
        display : ClientBalanceDisplay
            This display, with ``ax_``, ``figure_`` and ``lines_``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If a line has no value.
        """
        self.ax_ = _axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = self.ax_.figure
        self.lines_ = []
        for name, values in self.values.items():
            balance = client_balance(values)
            ordered = np.sort(np.asarray(values, dtype=np.float64))[: int(balance["n_clients"])]
            # A step for each client: with few clients a slope would show values nobody has.
            share = np.linspace(0.0, 100.0, len(ordered) + 1)
            label = f"{name} (mean {balance['mean']:.3f}, Jain {balance['jain']:.2f})"
            style = {"linewidth": 2, "label": label, **(line_kw or {})}
            self.lines_ += self.ax_.step(
                share, np.append(ordered, ordered[-1]), where="post", **style
            )
        self.ax_.set_xlim(0, 100)
        self.ax_.set_ylim(bottom=0)
        _finish(self.ax_, "Clients, from worst off to best off (%)", self.ylabel)
        return self


def _import_pyplot(caller: str) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f'{caller} needs matplotlib. Install it with: pip install "fedrecsk[plot]"'
        ) from error
    return plt


def _axes(ax: Any, caller: str) -> Any:
    plt = _import_pyplot(caller)
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _finish(ax: Any, xlabel: str, ylabel: str) -> None:
    """Put on labels, a grid that stays behind the lines, and the legend."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.25, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)


def _named(estimators: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    """Give each estimator a legend entry: its key, or its class name, numbered if repeated."""
    if isinstance(estimators, Mapping):
        named = dict(estimators)
    else:
        listed = list(estimators)
        names = [type(recommender_of(estimator)[0]).__name__ for estimator in listed]
        named = {
            name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}": estimator
            for i, (name, estimator) in enumerate(zip(names, listed, strict=True))
        }
    if not named:
        raise ValueError("There is no estimator to draw; pass at least one.")
    return named


def _history(name: str, estimator: Any) -> list[Mapping[str, Any]]:
    recommender, _ = recommender_of(estimator)
    history: list[Mapping[str, Any]] = list(getattr(recommender, "history_", []))
    if not history:
        raise ValueError(
            f"{name} ({type(recommender).__name__}) has no history to draw: it was not trained in "
            "rounds. Leave it out."
        )
    return history


def _curve(
    name: str, history: list[Mapping[str, Any]], x: str, y: str
) -> tuple[FloatArray, FloatArray]:
    """Read the points of one line out of a history."""
    values = np.array([_number(entry.get(y)) for entry in history])
    drawn = ~np.isnan(values)
    if not drawn.any():
        numbers = [key for key in history[0] if key != "round"]
        raise ValueError(
            f"The history of {name} has no {y!r}; it has {', '.join(map(repr, numbers))}."
        )
    if x == "round":
        at = np.array([entry["round"] for entry in history], dtype=np.float64)
    elif x == "seconds":
        at = np.cumsum([float(entry["seconds"]) for entry in history])
    else:
        at = np.cumsum([(entry["bytes_up"] + entry["bytes_down"]) / 1e6 for entry in history])
    return at[drawn], values[drawn]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
