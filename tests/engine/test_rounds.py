import math

import pytest

from fedrecsk.engine.rounds import EarlyStopping, run_rounds


def count_up(state, t):
    return state + 1, {"loss": 1.0 / (t + 1), "seen": state}


def stopping(values, patience=2, tol=0.0):
    """Early stopping on a list of validation values, one for each state from 1 on."""
    return EarlyStopping(lambda state: values[state - 1], patience, tol)


def test_history_has_one_record_a_round():
    result = run_rounds(count_up, 0, n_rounds=3)
    assert result.state == 3
    assert [record["round"] for record in result.history] == [1, 2, 3]
    assert [record["loss"] for record in result.history] == [1.0, 1 / 2, 1 / 3]
    assert [record["seen"] for record in result.history] == [0, 1, 2]
    assert all(record["seconds"] >= 0 for record in result.history)
    assert all("validation_ndcg" not in record for record in result.history)


def test_numbers_of_rounds_go_on():
    result = run_rounds(count_up, 10, n_rounds=2, first_round=5)
    assert [record["round"] for record in result.history] == [6, 7]
    assert [record["loss"] for record in result.history] == [1 / 6, 1 / 7]


def test_no_rounds_leave_the_start():
    result = run_rounds(count_up, 4, n_rounds=0)
    assert (result.state, result.history) == (4, [])


def test_early_stopping_returns_the_best_state():
    values = [0.1, 0.4, 0.3, 0.2, 0.9]
    result = run_rounds(count_up, 0, n_rounds=5, early_stopping=stopping(values))
    assert result.state == 2
    assert [record["validation_ndcg"] for record in result.history] == values[:4]


def test_early_stopping_returns_the_best_state_when_rounds_run_out():
    result = run_rounds(count_up, 0, n_rounds=3, early_stopping=stopping([0.5, 0.6, 0.55]))
    assert result.state == 2
    assert len(result.history) == 3


def test_an_improvement_starts_the_waiting_again():
    values = [0.5, 0.4, 0.6, 0.5, 0.7, 0.6, 0.6, 0.8]
    result = run_rounds(count_up, 0, n_rounds=8, early_stopping=stopping(values))
    assert (result.state, len(result.history)) == (5, 7)


def test_an_improvement_below_tol_does_not_count_but_is_kept():
    values = [0.5, 0.505, 0.509, 0.9]
    result = run_rounds(count_up, 0, n_rounds=4, early_stopping=stopping(values, tol=0.01))
    assert (result.state, len(result.history)) == (3, 3)


def test_a_callback_stops_the_fit_and_sees_every_record():
    seen = []

    def stop_at_two(state, record):
        seen.append((state, record["round"]))
        return state == 2

    result = run_rounds(count_up, 0, n_rounds=5, on_round_end=stop_at_two)
    assert result.state == 2
    assert seen == [(1, 1), (2, 2)]
    assert len(result.history) == 2


def test_a_callback_sees_the_round_that_early_stopping_ends_on():
    seen = []

    def watch(state, record):
        seen.append(record["validation_ndcg"])
        return False

    run_rounds(
        count_up, 0, n_rounds=9, early_stopping=stopping([0.3, 0.2, 0.1]), on_round_end=watch
    )
    assert seen == [0.3, 0.2, 0.1]


def test_rounds_begin_step_and_end_in_turn():
    events = []

    def step(state, t):
        events.append(f"step {t}")
        return state, {"loss": 0.0}

    run_rounds(
        step,
        None,
        n_rounds=2,
        on_round_begin=lambda: events.append("begin"),
        on_round_end=lambda state, record: bool(events.append("end")),
    )
    assert events == ["begin", "step 0", "end", "begin", "step 1", "end"]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_divergence_names_the_round_and_the_way_out(loss):
    ended = []

    def step(state, t):
        return state, {"loss": loss if t == 6 else 1.0}

    with pytest.raises(FloatingPointError, match=r"round 7\b.*learning_rate"):
        run_rounds(
            step,
            None,
            n_rounds=9,
            first_round=4,
            on_round_end=lambda state, record: bool(ended.append(record["round"])),
        )
    assert ended == [5, 6]
