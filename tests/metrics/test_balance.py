import math

import numpy as np
import pytest

from fedrecsk.metrics import client_balance


def test_matches_plain_formulas():
    rng = np.random.default_rng(0)
    values = rng.random(43).tolist()
    balance = client_balance(values)
    mean = sum(values) / 43
    assert balance == pytest.approx(
        {
            "mean": mean,
            "worst": min(values),
            "worst_decile": sum(sorted(values)[:5]) / 5,
            "spread": math.sqrt(sum((v - mean) ** 2 for v in values) / 43),
            "jain": sum(values) ** 2 / (43 * sum(v * v for v in values)),
            "n_clients": 43,
            "n_missing": 0,
        }
    )
    assert all(type(v) in (float, int) for v in balance.values())


def test_weights_move_the_mean_alone():
    plain = client_balance([0.0, 1.0, 1.0])
    weighted = client_balance([0.0, 1.0, 1.0], weights=[2, 1, 1])
    assert weighted.pop("mean") == 0.5
    assert plain.pop("mean") == pytest.approx(2 / 3)
    assert weighted == plain


def test_missing_values_are_left_out_and_counted():
    balance = client_balance([np.nan, 0.2, np.nan, 0.4], weights=[9, 1, 9, 3])
    assert (balance["n_clients"], balance["n_missing"]) == (2, 2)
    assert balance["mean"] == pytest.approx(0.35)
    assert balance["worst"] == 0.2


@pytest.mark.parametrize("n", [1, 2, 9])
def test_jain_runs_from_one_nth_to_one(n):
    one_has_all = np.zeros(n)
    one_has_all[-1] = 1e-200
    assert client_balance(one_has_all)["jain"] == pytest.approx(1 / n)
    assert client_balance(np.full(n, 0.3))["jain"] == pytest.approx(1.0)
    assert client_balance(np.zeros(n))["jain"] == 1.0


def test_jain_says_nothing_of_negative_values():
    balance = client_balance([-1.0, 1.0])
    assert math.isnan(balance["jain"])
    assert balance["worst"] == -1.0


def test_the_largest_of_numbers_do_not_overflow():
    values = np.array([0.25, 0.5, 1.0])
    plain, large = client_balance(values), client_balance(values * 1e308)
    assert large["jain"] == pytest.approx(plain["jain"])
    for name in ("mean", "worst", "worst_decile", "spread"):
        assert large[name] == pytest.approx(plain[name] * 1e308)


def test_few_clients_have_a_worst_decile():
    assert client_balance([0.5, 0.1])["worst_decile"] == 0.1
    assert client_balance(np.arange(11.0))["worst_decile"] == 0.5


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], None, "No client has a value"),
        ([np.nan], None, "1 values, all nan"),
        ([1.0, np.inf], None, "finite"),
        ([[1.0]], None, "one value a client"),
        ([1.0, 2.0], [1.0], "weights must hold one weight for each of the 2 clients"),
        ([1.0, 2.0], [1.0, -1.0], "not negative"),
        ([1.0, np.nan], [0.0, 1.0], "all 0"),
        (["good"], None, "values must hold real numbers only: could not convert"),
        ([1.0], [10**400], "weights must hold real numbers only: int too large"),
        ([[1.0], [2.0, 3.0]], None, "values must hold real numbers only: setting"),
    ],
)
def test_bad_input(values, weights, message):
    with pytest.raises(ValueError, match=message):
        client_balance(values, weights)
