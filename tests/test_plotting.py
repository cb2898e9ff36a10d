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
from fedrecsk.plotting import ClientBalanceDisplay, ConvergenceDisplay

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
