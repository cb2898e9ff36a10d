import math

import pytest
import torch

from fedrecsk.engine.rounds import EarlyStopping, Progress, run_rounds


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


def interrupted(n_done, **kwargs):
    """Run all rounds, and again from where an interruption after `n_done` rounds left them."""
    saved = []
    whole = run_rounds(count_up, 0, n_rounds=6, save=saved.append, **kwargs)
    past = saved[min(n_done, len(saved)) - 1] if n_done else None
    return whole, run_rounds(count_up, 0, n_rounds=6, past=past, **kwargs)


def without_seconds(history):
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in history
    ]


@pytest.mark.parametrize("n_done", range(7))
def test_rounds_go_on_after_an_interruption(n_done):
    for first_round in (0, 3):
        whole, again = interrupted(n_done, first_round=first_round)
        assert again.state == whole.state == 6
        assert without_seconds(again.history) == without_seconds(whole.history)


@pytest.mark.parametrize("n_done", range(7))
@pytest.mark.parametrize(
    "values",
    [
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # improves to the end
        [0.1, 0.2, 0.3, 0.3, 0.3, 0.9],  # as a mean of best values does: never falls
        [0.1, 0.4, 0.3, 0.45, 0.2, 0.1],  # the best is neither the first nor the last
    ],
)
def test_early_stopping_goes_on_after_an_interruption(n_done, values):
    whole, again = interrupted(n_done, early_stopping=stopping(values, tol=0.01))
    assert without_seconds(again.history) == without_seconds(whole.history)
    assert again.state == whole.state


def test_what_an_interrupted_fit_has_waited_counts():
    values = [0.5, 0.4, 0.3, 0.9]
    saved = []
    run_rounds(count_up, 0, n_rounds=2, early_stopping=stopping(values), save=saved.append)
    assert (saved[1].state, saved[1].best_state, saved[1].best_value) == (2, 1, 0.5)
    assert [progress.waited for progress in saved] == [0, 1]
    result = run_rounds(
        count_up, 0, n_rounds=4, past=saved[1], early_stopping=stopping(values), save=saved.append
    )
    assert len(result.history) == 3
    # A fit that had ended stays ended.
    ended = run_rounds(
        fail, 0, n_rounds=4, past=saved[-1], early_stopping=stopping(values), save=fail
    )
    assert (ended.state, ended.history) == (1, result.history)


def fail(*_):
    raise AssertionError("nothing is left to do")


@pytest.mark.parametrize(
    ("every", "rounds"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (5, [5]), (9, [5])]
)
def test_every_so_many_rounds_and_the_last_are_saved(every, rounds):
    saved = []
    options = {"save": lambda progress: saved.append(len(progress.history)), "save_every": every}
    run_rounds(count_up, 0, n_rounds=5, first_round=7, **options)
    assert saved == rounds
    # The last one is the last also where something else than their number ends the rounds.
    for ending in (
        {"early_stopping": stopping([0.5, 0.4, 0.3, 0.2, 0.1], patience=4)},
        {"on_round_end": lambda state, record: state == 5},
    ):
        saved.clear()
        run_rounds(count_up, 0, n_rounds=99, **options, **ending)
        assert saved == rounds


def test_a_round_is_saved_before_callbacks_hear_of_it():
    events = []
    run_rounds(
        count_up,
        0,
        n_rounds=2,
        save=lambda progress: events.append(f"save {progress.state}"),
        on_round_end=lambda state, record: bool(events.append(f"end {state}")),
    )
    assert events == ["save 1", "end 1", "save 2", "end 2"]


def test_what_was_saved_does_not_change_afterwards():
    saved = []
    run_rounds(count_up, 0, n_rounds=3, save=saved.append)
    assert [len(progress.history) for progress in saved] == [1, 2, 3]


def test_improvements_of_the_past_count_as_in_one_go():
    # Two steps below tol are one above it, and waiting starts again.
    values = [0.50, 0.506, 0.512, 0.518, 0.524, 0.53]
    for n_done in range(7):
        whole, again = interrupted(n_done, early_stopping=stopping(values, tol=0.01))
        assert len(again.history) == len(whole.history)


def test_the_past_is_not_changed_and_bounds_the_loss():
    past = Progress(0, 0, -math.inf, 0, [{"round": 1, "loss": 0.01}])
    with pytest.raises(FloatingPointError, match="round 2"):
        run_rounds(lambda s, t: (s, {"loss": 1.5}), 0, n_rounds=3, past=past)
    result = run_rounds(lambda s, t: (s, {"loss": 0.5}), 0, n_rounds=3, past=past)
    assert [record["round"] for record in result.history] == [1, 2, 3]
    assert past.history == [{"round": 1, "loss": 0.01}]


def test_tensors_in_the_logs_are_read_when_the_round_is_over():
    loss, n_bytes = torch.tensor(0.1), torch.tensor(2**40 + 1)

    def step(state, t):
        return state, {"loss": loss, "clients": 3, "bytes_up": n_bytes, "what": None}

    (record,) = run_rounds(step, 0, n_rounds=1).history
    assert list(record) == ["round", "loss", "clients", "bytes_up", "what", "seconds"]
    assert (record["loss"], record["bytes_up"], record["what"]) == (float(loss), 2**40 + 1, None)
    assert {name: type(record[name]) for name in ("loss", "clients", "bytes_up")} == {
        "loss": float,
        "clients": int,
        "bytes_up": int,
    }


def test_a_loss_that_is_a_tensor_ends_a_fit_that_diverges():
    with pytest.raises(FloatingPointError, match="round 1"):
        run_rounds(lambda s, t: (s, {"loss": torch.tensor(torch.nan)}), 0, n_rounds=2)


# ---------------------------------------------------------------- rounds without anybody


def idle_at(*numbers):
    """Steps that count up, but in rounds of these numbers, in which nobody trains."""

    def step(state, t):
        if t + 1 in numbers:
            return state, {"loss": None}
        return state + 1, {"loss": 1.0 / (t + 1)}

    return step


@pytest.mark.parametrize("n_done", range(7))
def test_rounds_in_which_nobody_trains_are_counted(n_done):
    saved = []
    whole = run_rounds(idle_at(1, 4), 0, n_rounds=6, save=saved.append)
    assert whole.state == 4
    assert [record["loss"] for record in whole.history] == [None, 1 / 2, 1 / 3, None, 1 / 5, 1 / 6]
    past = saved[n_done - 1] if n_done else None
    again = run_rounds(idle_at(1, 4), 0, n_rounds=6, past=past)
    assert again.state == whole.state
    assert without_seconds(again.history) == without_seconds(whole.history)


@pytest.mark.parametrize("n_done", range(5))
def test_the_first_loss_bounds_the_others_whenever_it_comes(n_done):
    losses = [None, None, 0.01, None, 1.5]
    saved = []

    def step(state, t):
        return state, {"loss": losses[t]}

    run_rounds(step, None, n_rounds=4, save=saved.append)
    past = saved[n_done - 1] if n_done else None
    with pytest.raises(FloatingPointError, match="round 5"):
        run_rounds(step, None, n_rounds=5, past=past)
    losses[4] = 0.9
    assert len(run_rounds(step, None, n_rounds=5, past=past).history) == 5


def test_early_stopping_waits_for_rounds_in_which_somebody_trains():
    values = [0.5, 0.4, 0.3, 0.9]
    result = run_rounds(idle_at(1, 3, 4), 0, n_rounds=9, early_stopping=stopping(values))
    found = [record["validation_ndcg"] for record in result.history]
    assert found == [None, 0.5, None, None, 0.4, 0.3]
    assert result.state == 1
