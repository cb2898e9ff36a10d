import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from fedrecsk.metrics import client_balance, evaluate
from fedrecsk.plotting import (
    ClientBalanceDisplay,
    ConvergenceDisplay,
    GroupGainsDisplay,
    SpectrumDisplay,
    SplitDisplay,
)

mpl.use("Agg")


class FakeRecommender(BaseEstimator):
    """Ranks the items in order, or backwards; its history is made up."""

    def __init__(self, n_rounds=3, validate=False, backwards=False):
        self.n_rounds = n_rounds
        self.validate = validate
        self.backwards = backwards

    def fit(self, X, client_ids=None):
        self.user_ids_, self.item_ids_ = np.unique(X[:, 0]), np.arange(6)
        self.seen_indptr_ = np.zeros(len(self.user_ids_) + 1, dtype=int)
        self.seen_indices_ = np.zeros(0, dtype=int)
        self.history_ = [
            {"round": t, "loss": 1 / t, "seconds": 0.5, "clients": 2, "bytes_up": 1_000_000,
             "bytes_down": 2_000_000}
            for t in range(1, self.n_rounds + 1)
        ]  # fmt: skip
        if self.validate:
            for entry in self.history_[::2]:  # every second round only
                entry["validation_ndcg"] = entry["round"] / 10
        return self

    def recommend(self, users, k):
        items = self.item_ids_[::-1] if self.backwards else self.item_ids_
        return np.tile(items[:k], (len(users), 1)), np.tile(-np.arange(k) * 1.0, (len(users), 1))

    def score(self, X, client_ids=None):
        return 0.0


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def X():  # noqa: N802
    rng = np.random.default_rng(0)
    return np.column_stack([rng.integers(0, 8, 30), rng.integers(0, 6, 30)])


def legend(display):
    return [text.get_text() for text in display.ax_.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("x", "label", "expected"),
    [
        ("round", "Round", [1, 2, 3]),
        ("seconds", "Seconds", [0.5, 1.0, 1.5]),
        ("megabytes", "Megabytes sent", [3, 6, 9]),
    ],
)
def test_convergence_draws_the_history(X, x, label, expected):
    display = ConvergenceDisplay.from_estimators({"ours": FakeRecommender().fit(X)}, x=x)
    [line] = display.lines_
    np.testing.assert_allclose(line.get_xdata(), expected)
    np.testing.assert_allclose(line.get_ydata(), [1, 1 / 2, 1 / 3])
    assert display.ax_.get_xlabel() == label
    assert display.ax_.get_ylabel() == "Training loss"
    assert legend(display) == ["ours"]
    assert display.figure_ is display.ax_.figure


def test_convergence_prefers_validation_where_all_have_it(X):
    validated = FakeRecommender(5, validate=True).fit(X)
    display = ConvergenceDisplay.from_estimators([validated], x="seconds")
    assert display.ax_.get_ylabel() == "Validation NDCG"
    np.testing.assert_allclose(display.lines_[0].get_xdata(), [0.5, 1.5, 2.5])
    np.testing.assert_allclose(display.lines_[0].get_ydata(), [0.1, 0.3, 0.5])
    mixed = ConvergenceDisplay.from_estimators([validated, FakeRecommender().fit(X)])
    assert mixed.ax_.get_ylabel() == "Training loss"
    chosen = ConvergenceDisplay.from_estimators([validated], y="clients")
    assert chosen.ax_.get_ylabel() == "Clients"


def test_estimators_without_names_get_their_class_names(X):
    fitted = [FakeRecommender(n).fit(X) for n in (2, 4)]
    pipeline = make_pipeline(FunctionTransformer(), FakeRecommender()).fit(X)
    assert legend(ConvergenceDisplay.from_estimators([fitted[0]])) == ["FakeRecommender"]
    display = ConvergenceDisplay.from_estimators([*fitted, pipeline])
    assert legend(display) == ["FakeRecommender 1", "FakeRecommender 2", "FakeRecommender 3"]
    assert [len(line.get_xdata()) for line in display.lines_] == [2, 4, 3]


def test_convergence_of_a_search(X):
    grid = GridSearchCV(FakeRecommender(), {"n_rounds": [4]}, cv=2).fit(X)
    display = ConvergenceDisplay.from_estimators({"best": grid})
    assert len(display.lines_[0].get_xdata()) == 4


def test_one_round_is_visible(X):
    display = ConvergenceDisplay.from_estimators([FakeRecommender(1).fit(X)])
    assert display.lines_[0].get_marker() == "o"


def test_rounds_are_whole_ticks(X):
    display = ConvergenceDisplay.from_estimators([FakeRecommender(3).fit(X)])
    ticks = display.ax_.get_xticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))
    assert (
        np.mod(
            ConvergenceDisplay.from_estimators(
                [FakeRecommender(3).fit(X)], x="seconds"
            ).ax_.get_xticks(),
            1,
        )
        > 0
    ).any()


def test_axes_and_style_are_the_callers(X):
    _, ax = plt.subplots()
    est = FakeRecommender().fit(X)
    display = ConvergenceDisplay.from_estimators([est], ax=ax, line_kw={"color": "red"})
    assert display.ax_ is ax
    assert display.lines_[0].get_color() == "red"
    assert display.plot() is display
    assert display.ax_ is not ax
    balance = ClientBalanceDisplay.from_estimators([est], X, ax=ax, line_kw={"linewidth": 5})
    assert balance.ax_ is ax
    assert balance.lines_[0].get_linewidth() == 5


def test_convergence_refuses(X):
    est = FakeRecommender().fit(X)
    with pytest.raises(ValueError, match="x must be 'round', 'seconds' or 'megabytes', got 'day'"):
        ConvergenceDisplay.from_estimators([est], x="day")
    with pytest.raises(ValueError, match="history of ours has no 'auc'; it has 'loss', 'seconds'"):
        ConvergenceDisplay.from_estimators({"ours": est}, y="auc")
    with pytest.raises(ValueError, match="no estimator to draw"):
        ConvergenceDisplay.from_estimators([])
    del est.history_
    with pytest.raises(ValueError, match=r"ours \(FakeRecommender\) has no history"):
        ConvergenceDisplay.from_estimators({"ours": est})


def test_balance_draws_sorted_clients(X):
    estimators = {"a": FakeRecommender().fit(X), "b": FakeRecommender(backwards=True).fit(X)}
    clients = X[:, 0] % 4
    display = ClientBalanceDisplay.from_estimators(estimators, X, clients, metric="recall", k=2)
    assert display.ax_.get_ylabel() == "Recall@2 of the client"
    for line, (name, est) in zip(display.lines_, estimators.items(), strict=True):
        values = evaluate(est, X, clients, metrics="recall", k=2).per_client["recall@2"]
        assert len(values) == 4
        # Each client takes a quarter of the axis at its own height.
        np.testing.assert_allclose(line.get_xdata(), [0, 25, 50, 75, 100])
        np.testing.assert_allclose(line.get_ydata()[:-1], np.sort(values))
        assert line.get_drawstyle() == "steps-post"
        balance = client_balance(values)
        assert line.get_label() == (
            f"{name} (mean {balance['mean']:.3f}, Jain {balance['jain']:.2f})"
        )


def test_balance_leaves_out_clients_without_value():
    display = ClientBalanceDisplay(values={"a": [0.4, np.nan, 0.2]}, ylabel="y").plot()
    np.testing.assert_allclose(display.lines_[0].get_ydata(), [0.2, 0.4, 0.4])
    assert legend(display) == ["a (mean 0.300, Jain 0.90)"]


def test_balance_refuses_coverage(X):
    with pytest.raises(ValueError, match=r"metric must be one of ndcg, recall.*got 'coverage'"):
        ClientBalanceDisplay.from_estimators([FakeRecommender().fit(X)], X, metric="coverage")


def heights(bars):
    return [bar.get_height() for bar in bars]


def centres(bars):
    return np.array([bar.get_x() + bar.get_width() / 2 for bar in bars])


def test_group_values_are_bars_side_by_side():
    values = {"a": [0.2, 0.4, 0.1], "b": [0.3, np.nan, 0.2]}
    display = GroupGainsDisplay(groups=["few", "some", "many"], values=values).plot()
    a, b = display.bars_
    np.testing.assert_allclose(heights(a), values["a"])
    np.testing.assert_allclose(heights(b), values["b"])
    assert legend(display) == ["a", "b"]
    assert display.ax_.get_ylabel() == "NDCG@20"
    assert display.ax_.get_xlabel() == "Group of clients"
    assert display.ax_.get_xticks().tolist() == [0, 1, 2]
    assert [text.get_text() for text in display.ax_.get_xticklabels()] == ["few", "some", "many"]
    assert display.figure_ is display.ax_.figure
    # Each group's bars are around its tick, in the order of the methods, and do not overlap.
    np.testing.assert_allclose((centres(a) + centres(b)) / 2, [0, 1, 2], atol=1e-12)
    assert (centres(b) - centres(a) > a[0].get_width()).all()
    assert centres(a)[1] - centres(b)[0] > a[0].get_width()


def test_group_gains_are_over_the_baseline():
    values = {"a": [0.3, 0.2], "base": [0.2, 0.4], "b": [0.2, 0.6]}
    display = GroupGainsDisplay(
        groups=["few", "many"], values=values, baseline="base", metric="Recall@10"
    ).plot()
    assert legend(display) == ["a", "b"]
    np.testing.assert_allclose(heights(display.bars_[0]), [50, -50])
    np.testing.assert_allclose(heights(display.bars_[1]), [0, 50], atol=1e-12)
    assert display.ax_.get_ylabel() == "Gain in Recall@10 over base (%)"
    [zero] = display.ax_.lines
    assert list(zero.get_ydata()) == [0, 0]


def test_group_gains_of_estimators(X):
    estimators = {"a": FakeRecommender().fit(X), "b": FakeRecommender(backwards=True).fit(X)}
    clients = X[:, 0] % 4 + 10
    groups = {10: "low", 11: "high", 12: "low", 13: "high", 99: "elsewhere"}
    display = GroupGainsDisplay.from_estimators(
        estimators, X, clients, groups=groups, metric="recall", k=2
    )
    assert display.groups == ["high", "low"]
    assert display.ax_.get_ylabel() == "Recall@2"
    for bars, est in zip(display.bars_, estimators.values(), strict=True):
        result = evaluate(est, X, clients, metrics="recall", k=2)
        assert result.client_ids.tolist() == [10, 11, 12, 13]
        values = result.per_client["recall@2"]
        np.testing.assert_allclose(heights(bars), [values[1::2].mean(), values[::2].mean()])
    ordered = GroupGainsDisplay.from_estimators(
        estimators, X, clients, groups=groups, order=["low", "elsewhere"], baseline="a"
    )
    assert ordered.groups == ["low", "elsewhere"]
    assert legend(ordered) == ["b"]
    mean = {
        name: evaluate(est, X, clients, k=20).per_client["ndcg@20"][::2].mean()
        for name, est in estimators.items()
    }
    gain = heights(ordered.bars_[0])
    np.testing.assert_allclose(gain, [100 * (mean["b"] / mean["a"] - 1), np.nan])
    assert ordered.ax_.get_ylabel() == "Gain in NDCG@20 over a (%)"


def test_groups_of_users_are_those_of_evaluate(X):
    est = FakeRecommender().fit(X)
    groups = {user: user % 3 for user in range(8)}
    display = GroupGainsDisplay.from_estimators([est], X, groups=groups)
    per_group = evaluate(est, X, groups=groups).per_group
    assert display.groups == ["0", "1", "2"]
    np.testing.assert_allclose(
        heights(display.bars_[0]), [per_group[group]["ndcg@20"] for group in range(3)]
    )


def test_group_gains_axes_and_style_are_the_callers(X):
    _, ax = plt.subplots()
    display = GroupGainsDisplay.from_estimators(
        [FakeRecommender().fit(X)],
        X,
        groups=dict.fromkeys(range(8), "all"),
        ax=ax,
        bar_kw={"color": "red"},
    )
    assert display.ax_ is ax
    assert display.bars_[0][0].get_facecolor() == (1, 0, 0, 1)
    assert display.plot() is display
    assert display.ax_ is not ax


def test_group_gains_refuse(X):
    est = FakeRecommender().fit(X)
    groups = dict.fromkeys(range(8), "all")
    draw = GroupGainsDisplay.from_estimators
    with pytest.raises(ValueError, match=r"metric must be one of ndcg, recall.*got 'coverage'"):
        draw([est], X, groups=groups, metric="coverage")
    with pytest.raises(TypeError, match=r"mapping from client id to group, got ndarray.*zip"):
        draw([est], X, groups=X[:, 0])
    with pytest.raises(ValueError, match=r"no entry for 7 of the 8 clients .*, such as 1;"):
        draw([est], X, groups={0: "all"})
    with pytest.raises(ValueError, match="baseline 'c' is none of the methods, which are 'a', 'b'"):
        draw({"a": est, "b": est}, X, groups=groups, baseline="c")
    with pytest.raises(ValueError, match="'a' is the only method"):
        draw({"a": est}, X, groups=groups, baseline="a")
    with pytest.raises(ValueError, match="no estimator to draw"):
        draw([], X, groups=groups)
    with pytest.raises(ValueError, match="no method to draw"):
        GroupGainsDisplay(groups=["all"], values={}).plot()
    with pytest.raises(ValueError, match=r"a must have one value for each of the 2 groups; .*3"):
        GroupGainsDisplay(groups=["few", "many"], values={"a": [1, 2, 3]}).plot()
    with pytest.raises(ValueError, match=r"a has the value 0 in group 'many'.*baseline=None"):
        GroupGainsDisplay(
            groups=["few", "many"], values={"a": [1, 0], "b": [1, 1]}, baseline="a"
        ).plot()


def test_spectrum_is_that_of_the_correlation_matrix():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4))
    table = table * [1, 10, 1e-200, 100] + [5, 0, 0, -3]
    other = rng.normal(size=(30, 2)).astype(np.float32)
    display = SpectrumDisplay(tables={"ours": table, "other": other}).plot()
    for line, drawn in zip(display.lines_, (table, other), strict=True):
        scaled = drawn.astype(float) / np.abs(drawn).max(axis=0)
        expected = np.sort(np.linalg.eigvals(np.corrcoef(scaled.T)).real)[::-1]
        np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-12)
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, drawn.shape[1] + 1))
        share = expected / expected.sum()
        rank = np.exp(-sum(p * np.log(p) for p in share))
        name = "ours" if drawn is table else "other"
        assert line.get_label() == f"{name} (effective rank {rank:.1f} of {drawn.shape[1]})"
    assert display.ax_.get_xlabel() == "Component"
    assert display.ax_.get_ylabel() == "Eigenvalue of the correlation matrix"
    assert display.figure_ is display.ax_.figure
    ticks = display.ax_.get_xticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))


@pytest.mark.parametrize(
    ("table", "eigenvalues", "rank"),
    [
        (np.outer([1.0, 2, 4, 7], [1, -2, 3]), [3, 0, 0], "1.0 of 3"),
        ([[1, 1], [1, -1], [-1, 1], [-1, -1]], [1, 1], "2.0 of 2"),
        (np.column_stack([[1.0, 2, 4], [2.0, 4, 8], [0.1, 0.1, 0.1]]), [2, 1, 0], "1.9 of 3"),
        (np.full((7, 2), 0.1), [1, 1], "2.0 of 2"),
        ([[3.0, 4.0]], [1, 1], "2.0 of 2"),
        ([[3.0], [4.0]], [1], "1.0 of 1"),
    ],
    ids=["one direction", "uncorrelated", "a constant", "constants", "one item", "one column"],
)
def test_spectra_known_by_hand(table, eigenvalues, rank):
    [line] = SpectrumDisplay(tables={"t": table}).plot().lines_
    np.testing.assert_allclose(line.get_ydata(), eigenvalues, atol=1e-12)
    assert line.get_label() == f"t (effective rank {rank})"
    assert line.get_marker() == ("o" if len(eigenvalues) == 1 else "None")


def test_spectrum_of_estimators(X):
    fitted = make_pipeline(FunctionTransformer(), FakeRecommender()).fit(X)
    table = np.random.default_rng(0).normal(size=(6, 3))
    fitted[-1].item_factors_ = table
    _, ax = plt.subplots()
    display = SpectrumDisplay.from_estimators([fitted], ax=ax, line_kw={"color": "red"})
    assert display.ax_ is ax
    [line] = display.lines_
    [expected] = SpectrumDisplay(tables={"FakeRecommender": table}).plot().lines_
    np.testing.assert_array_equal(line.get_ydata(), expected.get_ydata())
    assert line.get_label() == expected.get_label()
    assert line.get_color() == "red"


def test_spectrum_refuses(X):
    with pytest.raises(ValueError, match=r"ours \(FakeRecommender\) has no item_factors_"):
        SpectrumDisplay.from_estimators({"ours": FakeRecommender().fit(X)})
    with pytest.raises(ValueError, match="no table to draw"):
        SpectrumDisplay(tables={}).plot()
    for table in ([1.0, 2.0], np.zeros((0, 3)), np.zeros((3, 0))):
        with pytest.raises(ValueError, match=r"table of t must be of shape \(n_items, n_factors"):
            SpectrumDisplay(tables={"t": table}).plot()
    with pytest.raises(ValueError, match="table of t has NaN or infinity"):
        SpectrumDisplay(tables={"t": [[1.0, np.nan]]}).plot()


COSTS = [
    {"n_client_layers": k, "client_parameters": 2e6 + 1e6 * k, "server_parameters": 3e6 - 1e6 * k}
    for k in range(4)
]
RISK = [
    {"layer": layer, "nearest_token": nearest, "linear_inverter": inverter}
    for layer, (nearest, inverter) in enumerate(
        [(1.0, 1.0), (0.3, 0.9), (0.5, 0.2), (0.1, 0.4), (0.95, 0.99)]
    )
]


def test_split_draws_parameters_and_what_the_server_sees():
    display = SplitDisplay.from_costs(COSTS, RISK)
    np.testing.assert_allclose(heights(display.bars_), [2, 3, 4, 5])
    np.testing.assert_allclose(centres(display.bars_), [0, 1, 2, 3])
    nearest, inverter = display.lines_
    for line in display.lines_:
        np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2, 3])
    # A split at k shows the layers k, ..., 3; the fourth stays with the client, always.
    np.testing.assert_allclose(nearest.get_ydata(), [1.0, 0.5, 0.5, 0.0])
    np.testing.assert_allclose(inverter.get_ydata(), [1.0, 0.9, 0.4, 0.0])
    entries = [text.get_text() for text in display.risk_ax_.get_legend().get_texts()]
    assert entries == ["client's parameters", "nearest token", "linear inverter"]
    assert display.ax_.get_legend() is None
    assert display.ax_.get_xlabel() == "Layers before the boundary"
    assert display.ax_.get_ylabel() == "Parameters on the client (millions)"
    assert display.risk_ax_.get_ylabel() == "Tokens the server could read"
    assert display.ax_.get_xticks().tolist() == [0, 1, 2, 3]
    assert display.figure_ is display.ax_.figure is display.risk_ax_.figure


def test_split_of_some_layers():
    display = SplitDisplay.from_costs([COSTS[3], COSTS[1]], RISK)
    np.testing.assert_allclose(centres(display.bars_), [3, 1])
    np.testing.assert_allclose(display.lines_[0].get_ydata(), [0.0, 0.5])


def test_split_without_risk():
    _, ax = plt.subplots()
    display = SplitDisplay.from_costs(COSTS, ax=ax, bar_kw={"color": "red"})
    assert display.ax_ is ax
    assert display.bars_[0].get_facecolor() == (1, 0, 0, 1)
    assert display.risk_ax_ is None
    assert display.lines_ == []
    assert legend(display) == ["client's parameters"]
    assert display.plot() is display
    assert display.ax_ is not ax
    lines = SplitDisplay.from_costs(COSTS, RISK, line_kw={"color": "red"}).lines_
    assert [line.get_color() for line in lines] == ["red", "red"]


def test_split_refuses():
    with pytest.raises(ValueError, match="no split to draw"):
        SplitDisplay.from_costs([])
    with pytest.raises(
        ValueError, match=r"layers 0, \.\.\., n, in this order; got layers \[1, 0\]"
    ):
        SplitDisplay.from_costs(COSTS, RISK[1::-1])
    with pytest.raises(ValueError, match=r"client with 3 layers .* model of 2 layers"):
        SplitDisplay.from_costs(COSTS, RISK[:3])
    with pytest.raises(ValueError, match=r"client_parameters must .* each of the 2 splits; .*3"):
        SplitDisplay(n_client_layers=[0, 1], client_parameters=[1, 2, 3]).plot()
    with pytest.raises(ValueError, match=r"a must have one value for each of the 1 splits"):
        SplitDisplay(n_client_layers=[0], client_parameters=[1], risks={"a": [0, 1]}).plot()


def test_without_matplotlib(X, monkeypatch):
    est = FakeRecommender().fit(X)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    install = r'pip install "fedrecsk\[plot\]"'
    with pytest.raises(ImportError, match=f"ConvergenceDisplay.from_estimators needs .*{install}"):
        ConvergenceDisplay.from_estimators([est])
    with pytest.raises(ImportError, match=f"ClientBalanceDisplay.from_estimators .*{install}"):
        ClientBalanceDisplay.from_estimators([est], X)
    with pytest.raises(ImportError, match=f"ClientBalanceDisplay.plot needs .*{install}"):
        ClientBalanceDisplay(values={"a": [1.0]}, ylabel="y").plot()
    with pytest.raises(ImportError, match=f"GroupGainsDisplay.from_estimators needs .*{install}"):
        GroupGainsDisplay.from_estimators([est], X, groups={})
    with pytest.raises(ImportError, match=f"GroupGainsDisplay.plot needs .*{install}"):
        GroupGainsDisplay(groups=["all"], values={"a": [1.0]}).plot()
    with pytest.raises(ImportError, match=f"SpectrumDisplay.from_estimators needs .*{install}"):
        SpectrumDisplay.from_estimators([est])
    with pytest.raises(ImportError, match=f"SpectrumDisplay.plot needs .*{install}"):
        SpectrumDisplay(tables={"a": [[1.0]]}).plot()
    with pytest.raises(ImportError, match=f"SplitDisplay.from_costs needs .*{install}"):
        SplitDisplay.from_costs(COSTS)
    with pytest.raises(ImportError, match=f"SplitDisplay.plot needs .*{install}"):
        SplitDisplay(n_client_layers=[0], client_parameters=[1]).plot()
