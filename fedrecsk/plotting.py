"""Displays in the style of scikit-learn's; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedrecsk.metrics.balance import client_balance
from fedrecsk.metrics.scorers import evaluate, recommender_of

__all__ = [
    "ClientBalanceDisplay",
    "ConvergenceDisplay",
    "GroupGainsDisplay",
    "SpectrumDisplay",
    "SplitDisplay",
]

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
        _check_metric(metric)
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


class GroupGainsDisplay:
    """A metric by group of clients, one bar a method, or its gain over a baseline.

    Groups may be the clients with few, some and many interactions
    (:func:`~fedrecsk.data.size_groups`), or those of each model size. Make it with
    :meth:`from_estimators`.

    Parameters
    ----------
    groups : sequence of str
        Names of the groups, from left to right.
    values : mapping of str to array-like of shape (n_groups,)
        For each method its legend entry and its values. nan leaves a bar out.
    baseline : str, default=None
        Method to compare with: the bars are the relative gains of the other methods over it, in
        percent. None: the bars are the values.
    metric : str, default="NDCG@20"
        What the values are.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes that were drawn on.
    figure_ : matplotlib Figure
        Figure of the axes.
    bars_ : list of matplotlib BarContainer
        The bars of each method, in the order of ``values`` and without the baseline.

    Examples
    --------
    >>> from fedrecsk.plotting import GroupGainsDisplay
    >>> display = GroupGainsDisplay(
    ...     groups=["few", "many"],
    ...     values={"one size": [0.20, 0.30], "three sizes": [0.22, 0.36]},
    ...     baseline="one size")
    >>> display.plot()  # doctest: +SKIP
    <fedrecsk.plotting.GroupGainsDisplay object at ...>
    """

    ax_: Any
    figure_: Any
    bars_: list[Any]

    def __init__(
        self,
        *,
        groups: Sequence[str],
        values: Mapping[str, npt.ArrayLike],
        baseline: str | None = None,
        metric: str = "NDCG@20",
    ) -> None:
        self.groups = groups
        self.values = values
        self.baseline = baseline
        self.metric = metric

    @classmethod
    def from_estimators(
        cls,
        estimators: Mapping[str, Any] | Iterable[Any],
        X: Any,
        client_ids: npt.ArrayLike | None = None,
        *,
        groups: Mapping[Any, Any],
        order: Sequence[Any] | None = None,
        baseline: str | None = None,
        metric: str = "ndcg",
        k: int = 20,
        ax: Any = None,
        bar_kw: Mapping[str, Any] | None = None,
    ) -> Self:
        """Evaluate each estimator on held-out interactions and draw the mean of each group.

        Parameters
        ----------
        estimators : mapping of str to estimator, or iterable of estimators
            Fitted; also pipelines and searches that end in a recommender. The keys are the
            legend entries; without keys, the class names.
        X : interactions
            Held-out rows.
        client_ids : array-like of shape (n_rows,), default=None
            Client of each row, as in :func:`~fedrecsk.metrics.evaluate`.
        groups : mapping of client id to group
            Group of each client that has held-out rows; further clients may be in it. The value
            of a group is the mean over its clients, each of which counts once.
        order : sequence of groups, default=None
            Groups to draw, from left to right. None: all, sorted.
        baseline : str, default=None
            Legend entry of the method to compare with. None: draw the values themselves.
        metric : {"ndcg", "recall", "precision", "hit_rate", "mrr", "map"}, default="ndcg"
            The metric.
        k : int, default=20
            Length of the list that is judged.
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        bar_kw : mapping, default=None
            Passed to matplotlib's ``bar`` for every method.

        Returns
        -------
        display : GroupGainsDisplay
            The drawn display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        TypeError
            If ``groups`` is no mapping.
        ValueError
            If there is no estimator, the baseline is none of them, a client has no group, the
            metric has no value per client, or as in :meth:`plot` and
            :func:`~fedrecsk.metrics.evaluate`.
        """
        _import_pyplot(f"{cls.__name__}.from_estimators")
        _check_metric(metric)
        if not isinstance(groups, Mapping):
            raise TypeError(
                "groups must be a mapping from client id to group, got "
                f"{type(groups).__name__}. Make one with dict(zip(client_ids, groups))."
            )
        named = _named(estimators)
        _check_baseline(baseline, named)
        by_client = {
            name: _values_of_clients(estimator, X, client_ids, metric, k)
            for name, estimator in named.items()
        }
        if order is None:
            clients = set().union(*by_client.values())
            order = sorted({groups[client] for client in clients if client in groups})
        values = {name: _group_means(each, groups, order) for name, each in by_client.items()}
        display = cls(
            groups=[str(group) for group in order],
            values=values,
            baseline=baseline,
            metric=f"{_METRIC_LABELS[metric]}@{k}",
        )
        return display.plot(ax, bar_kw=bar_kw)

    def plot(self, ax: Any = None, *, bar_kw: Mapping[str, Any] | None = None) -> Self:
        """Draw the bars.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        bar_kw : mapping, default=None
            Passed to matplotlib's ``bar`` for every method.

        Returns
        -------
        display : GroupGainsDisplay
            This display, with ``ax_``, ``figure_`` and ``bars_``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If a method has not one value a group, the baseline is no method, or is the only one,
            or its value in a group is 0, so that there is no relative gain over it.
        """
        heights = self._heights()
        self.ax_ = _axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = self.ax_.figure
        self.bars_ = []
        at = np.arange(len(self.groups))
        width = 0.8 / len(heights)
        for place, (name, height) in enumerate(heights.items()):
            shift = (place - (len(heights) - 1) / 2) * width
            # A little narrower than their room, so that neighbours do not touch.
            style = {"width": 0.92 * width, "label": name, **(bar_kw or {})}
            self.bars_.append(self.ax_.bar(at + shift, height, **style))
        self.ax_.set_xticks(at, self.groups)
        ylabel = self.metric
        if self.baseline is not None:
            ylabel = f"Gain in {self.metric} over {self.baseline} (%)"
            self.ax_.axhline(0, color="black", linewidth=0.8)
        _finish(self.ax_, "Group of clients", ylabel)
        self.ax_.grid(visible=False, axis="x")  # lines through the bars would mean nothing
        return self

    def _heights(self) -> dict[str, FloatArray]:
        """Values of each method, or its gains in percent over the baseline."""
        if not self.values:
            raise ValueError("There is no method to draw; pass the values of at least one.")
        _check_baseline(self.baseline, self.values)
        heights = {}
        for name, values in self.values.items():
            heights[name] = np.asarray(values, dtype=np.float64)
            if heights[name].shape != (len(self.groups),):
                raise ValueError(
                    f"{name} must have one value for each of the {len(self.groups)} groups; got "
                    f"shape {heights[name].shape}."
                )
        if self.baseline is None:
            return heights
        base = heights.pop(self.baseline)
        if (base == 0).any():
            worst = self.groups[int(np.flatnonzero(base == 0)[0])]
            raise ValueError(
                f"{self.baseline} has the value 0 in group {worst!r}, over which no gain can be "
                "given in percent. Leave baseline=None to draw the values themselves."
            )
        return {name: 100 * (values / base - 1) for name, values in heights.items()}


class SpectrumDisplay:
    """How item vectors use their dimensions: eigenvalues, one line a table.

    Drawn are the eigenvalues of the correlation matrix of a table's columns over the items, in
    descending order. They sum to the number of columns. A flat line at 1 means that the columns
    are uncorrelated; a steep one that few directions carry everything, as when embeddings
    collapse. The legend gives the effective rank, the exponential of the entropy of the
    eigenvalues' shares (Roy and Vetterli, 2007), from 1 to the number of columns. A constant
    column counts as uncorrelated with all others. Make it with :meth:`from_estimators`, or from
    arrays.

    Parameters
    ----------
    tables : mapping of str to array-like of shape (n_items, n_factors)
        For each line its legend entry and its table. Tables may differ in shape.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes that were drawn on.
    figure_ : matplotlib Figure
        Figure of the axes.
    lines_ : list of matplotlib Line2D
        The lines, in the order of ``tables``.

    Examples
    --------
    >>> import numpy as np
    >>> from fedrecsk.plotting import SpectrumDisplay
    >>> display = SpectrumDisplay(tables={"untrained": np.eye(5, 3)})
    >>> display.plot()  # doctest: +SKIP
    <fedrecsk.plotting.SpectrumDisplay object at ...>
    """

    ax_: Any
    figure_: Any
    lines_: list[Any]

    def __init__(self, *, tables: Mapping[str, npt.ArrayLike]) -> None:
        self.tables = tables

    @classmethod
    def from_estimators(
        cls,
        estimators: Mapping[str, Any] | Iterable[Any],
        *,
        ax: Any = None,
        line_kw: Mapping[str, Any] | None = None,
    ) -> Self:
        """Draw the spectrum of each estimator's ``item_factors_``.

        Parameters
        ----------
        estimators : mapping of str to estimator, or iterable of estimators
            Fitted, with item vectors; also pipelines and searches that end in a recommender. The
            keys are the legend entries; without keys, the class names.
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        line_kw : mapping, default=None
            Passed to matplotlib's ``plot`` for every line.

        Returns
        -------
        display : SpectrumDisplay
            The drawn display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there is no estimator, or one has no item vectors.
        """
        _import_pyplot(f"{cls.__name__}.from_estimators")
        tables = {}
        for name, estimator in _named(estimators).items():
            recommender, _ = recommender_of(estimator)
            if not hasattr(recommender, "item_factors_"):
                raise ValueError(
                    f"{name} ({type(recommender).__name__}) has no item_factors_ to draw the "
                    "spectrum of. Leave it out."
                )
            tables[name] = recommender.item_factors_
        return cls(tables=tables).plot(ax, line_kw=line_kw)

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
        display : SpectrumDisplay
            This display, with ``ax_``, ``figure_`` and ``lines_``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there is no table, or one is empty, not two-dimensional, or has NaN or infinity.
        """
        if not self.tables:
            raise ValueError("There is no table to draw; pass at least one.")
        spectra = {name: _eigenvalues(name, table) for name, table in self.tables.items()}
        self.ax_ = _axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = self.ax_.figure
        self.lines_ = []
        for name, eigenvalues in spectra.items():
            n_factors = len(eigenvalues)
            label = f"{name} (effective rank {_effective_rank(eigenvalues):.1f} of {n_factors})"
            marker = "o" if n_factors == 1 else None
            style = {"linewidth": 2, "marker": marker, "label": label, **(line_kw or {})}
            self.lines_ += self.ax_.plot(np.arange(1, n_factors + 1), eigenvalues, **style)
        if self.ax_.get_xscale() == "linear":
            self.ax_.locator_params(axis="x", integer=True)
        _finish(self.ax_, "Component", "Eigenvalue of the correlation matrix")
        return self


class SplitDisplay:
    """What a client of a split language model holds, and what the server could read.

    Bars are the client's parameters for each number of layers that it keeps. Lines are the
    reconstruction risk: the largest share of tokens that an attack tells right from any hidden
    state the server then sees. Make it with :meth:`from_costs`, or from arrays.

    Parameters
    ----------
    n_client_layers : array-like of shape (n_splits,)
        Layers k that the client keeps beside the last one.
    client_parameters : array-like of shape (n_splits,)
        Parameters that the client holds.
    risks : mapping of str to array-like of shape (n_splits,), default=None
        For each attack its legend entry and the risks, from 0 to 1. None: no line.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the bars.
    risk_ax_ : matplotlib Axes or None
        Axes of the lines, on the right; None where there is no line.
    figure_ : matplotlib Figure
        Figure of the axes.
    bars_ : matplotlib BarContainer
        The bars.
    lines_ : list of matplotlib Line2D
        The lines, in the order of ``risks``.

    Examples
    --------
    >>> from fedrecsk.plotting import SplitDisplay
    >>> display = SplitDisplay(
    ...     n_client_layers=[0, 1, 2], client_parameters=[5e6, 6e6, 7e6],
    ...     risks={"linear inverter": [1.0, 0.7, 0.0]})
    >>> display.plot()  # doctest: +SKIP
    <fedrecsk.plotting.SplitDisplay object at ...>
    """

    ax_: Any
    risk_ax_: Any
    figure_: Any
    bars_: Any
    lines_: list[Any]

    def __init__(
        self,
        *,
        n_client_layers: npt.ArrayLike,
        client_parameters: npt.ArrayLike,
        risks: Mapping[str, npt.ArrayLike] | None = None,
    ) -> None:
        self.n_client_layers = n_client_layers
        self.client_parameters = client_parameters
        self.risks = risks

    @classmethod
    def from_costs(
        cls,
        costs: Sequence[Mapping[str, float]],
        risk: Sequence[Mapping[str, float]] | None = None,
        *,
        ax: Any = None,
        bar_kw: Mapping[str, Any] | None = None,
        line_kw: Mapping[str, Any] | None = None,
    ) -> Self:
        """Draw the measured costs of splits, and the risk of the layers.

        Parameters
        ----------
        costs : sequence of mapping
            As from ``fedrecsk.models.split_costs.split_costs``: one for each split, with
            ``n_client_layers`` and ``client_parameters``.
        risk : sequence of mapping, default=None
            As from ``fedrecsk.models.reconstruction.reconstruction_risk``: one for each of the
            layers 0, ..., n, with ``nearest_token`` and ``linear_inverter``. A client that keeps
            k layers shows the server the hidden states k, ..., n - 1, and the worst of them is
            drawn. None: no line.
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        bar_kw : mapping, default=None
            Passed to matplotlib's ``bar``.
        line_kw : mapping, default=None
            Passed to matplotlib's ``plot`` for every line.

        Returns
        -------
        display : SplitDisplay
            The drawn display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there are no costs, `risk` is not of the layers 0, ..., n in order, or a split
            keeps more layers than there are.
        """
        _import_pyplot(f"{cls.__name__}.from_costs")
        kept = [int(row["n_client_layers"]) for row in costs]
        risks = None if risk is None else _risks_of_splits(kept, risk)
        display = cls(
            n_client_layers=kept,
            client_parameters=[row["client_parameters"] for row in costs],
            risks=risks,
        )
        return display.plot(ax, bar_kw=bar_kw, line_kw=line_kw)

    def plot(
        self,
        ax: Any = None,
        *,
        bar_kw: Mapping[str, Any] | None = None,
        line_kw: Mapping[str, Any] | None = None,
    ) -> Self:
        """Draw the bars and the lines.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw. None: a new figure.
        bar_kw : mapping, default=None
            Passed to matplotlib's ``bar``.
        line_kw : mapping, default=None
            Passed to matplotlib's ``plot`` for every line.

        Returns
        -------
        display : SplitDisplay
            This display, with ``ax_``, ``risk_ax_``, ``figure_``, ``bars_`` and ``lines_``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there is no split, or a line or the bars have not one value for each.
        """
        at = np.asarray(self.n_client_layers)
        millions = np.asarray(self.client_parameters, dtype=np.float64) / 1e6
        lines = {name: np.asarray(each, float) for name, each in (self.risks or {}).items()}
        if not at.size:
            raise ValueError("There is no split to draw; pass the costs of at least one.")
        for name, values in {"client_parameters": millions, **lines}.items():
            if values.shape != at.shape:
                raise ValueError(
                    f"{name} must have one value for each of the {at.size} splits; got shape "
                    f"{values.shape}."
                )
        self.ax_ = _axes(ax, f"{type(self).__name__}.plot")
        self.figure_ = self.ax_.figure
        bar_style = {"width": 0.6, "color": "0.8", "label": "client's parameters", **(bar_kw or {})}
        self.bars_ = self.ax_.bar(at, millions, **bar_style)
        self.ax_.set_xticks(at)
        _finish(self.ax_, "Layers before the boundary", "Parameters on the client (millions)")
        self.ax_.grid(visible=False, axis="x")
        self.risk_ax_ = self.ax_.twinx() if lines else None
        self.lines_ = []
        for name, values in lines.items():
            style = {"linewidth": 2, "marker": "o", "label": name, **(line_kw or {})}
            self.lines_ += self.risk_ax_.plot(at, values, **style)
        if lines:
            self.risk_ax_.set(ylabel="Tokens the server could read", ylim=(0, 1.05))
            self.risk_ax_.spines[["top"]].set_visible(False)
            # One legend, above the bars: the right axes would draw its lines across it.
            self.ax_.get_legend().remove()
            self.risk_ax_.legend(
                handles=[self.bars_, *self.lines_],
                frameon=False,
                loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
                ncols=1 + len(lines),
            )
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


def _check_metric(metric: str) -> None:
    if metric not in _METRIC_LABELS:
        raise ValueError(
            f"metric must be one of {', '.join(_METRIC_LABELS)}, which have a value for each "
            f"client; got {metric!r}."
        )


def _check_baseline(baseline: str | None, methods: Mapping[str, Any]) -> None:
    """See that a baseline is one of the methods, and that another one is left to draw."""
    if baseline is None:
        return
    if baseline not in methods:
        raise ValueError(
            f"The baseline {baseline!r} is none of the methods, which are "
            f"{', '.join(map(repr, methods))}."
        )
    if len(methods) == 1:
        raise ValueError(
            f"{baseline!r} is the only method, so nothing is left to compare with it. Add another, "
            "or leave baseline=None."
        )


def _values_of_clients(
    estimator: Any, X: Any, client_ids: npt.ArrayLike | None, metric: str, k: int
) -> dict[Any, float]:
    """Value of the metric for each client that has held-out items."""
    result = evaluate(estimator, X, client_ids, metrics=metric, k=k)
    values = result.per_client[f"{metric}@{k}"].tolist()
    return dict(zip(result.client_ids.tolist(), values, strict=True))


def _group_means(
    values: Mapping[Any, float], groups: Mapping[Any, Any], order: Sequence[Any]
) -> FloatArray:
    """Mean over the clients of each group, (n_groups,), nan where a group has none."""
    without = [client for client in values if client not in groups]
    if without:
        raise ValueError(
            f"groups has no entry for {len(without)} of the {len(values)} clients with held-out "
            f"items, such as {without[0]!r}; give every client a group."
        )
    members: dict[Any, list[float]] = {group: [] for group in order}
    for client, value in values.items():
        if groups[client] in members:
            members[groups[client]].append(value)
    return np.array([np.mean(each) if each else np.nan for each in members.values()])


def _risks_of_splits(
    kept: Sequence[int], risk: Sequence[Mapping[str, float]]
) -> dict[str, FloatArray]:
    """Worst risk of the hidden states that the server sees, for each split and attack."""
    n_layers = len(risk) - 1
    if n_layers < 1 or [row["layer"] for row in risk] != list(range(len(risk))):
        raise ValueError(
            "risk must have one entry for each of the layers 0, ..., n, in this order; got layers "
            f"{[row['layer'] for row in risk]}."
        )
    if max(kept, default=0) >= n_layers:
        raise ValueError(
            f"costs has a client with {max(kept)} layers beside the last one, but risk is of a "
            f"model of {n_layers} layers. Take both from the same model."
        )
    risks = {}
    for attack in ("nearest_token", "linear_inverter"):
        rates = [row[attack] for row in risk]
        # The server sees the hidden states k, ..., n - 1; nothing at all for k = n - 1.
        worst = [max(rates[k:n_layers]) if k < n_layers - 1 else 0.0 for k in kept]
        risks[attack.replace("_", " ")] = np.array(worst)
    return risks


def _eigenvalues(name: str, table: npt.ArrayLike) -> FloatArray:
    """Eigenvalues, descending, of the correlation matrix of a table's columns."""
    vectors = np.asarray(table, dtype=np.float64)
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(
            f"The table of {name} must be of shape (n_items, n_factors); got {vectors.shape}."
        )
    if not np.isfinite(vectors).all():
        raise ValueError(f"The table of {name} has NaN or infinity.")
    centred = vectors - vectors.mean(axis=0)
    # A mean is rounded, so that a constant column is not centred to exact zeros.
    centred[:, np.ptp(vectors, axis=0) == 0] = 0
    centred /= _or_one(np.abs(centred).max(axis=0))  # squares of tiny values would vanish
    centred /= _or_one(np.sqrt((centred**2).sum(axis=0)))
    correlation = centred.T @ centred
    np.fill_diagonal(correlation, 1.0)
    eigenvalues: FloatArray = np.linalg.eigvalsh(correlation)[::-1].clip(min=0)
    return eigenvalues


def _or_one(divisors: FloatArray) -> FloatArray:
    return np.where(divisors == 0, 1.0, divisors)


def _effective_rank(eigenvalues: FloatArray) -> float:
    """Exponential of the entropy of the eigenvalues' shares."""
    shares = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


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
