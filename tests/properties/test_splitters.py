"""What every splitter promises, on any rows; and each one's own promise."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrecsk.model_selection import ColdUserSplit, LeaveLastOut, PerUserHoldout, PerUserKFold
from tests.properties.documented import Refused, outcome
from tests.properties.strategies import ANYTHING, contained, examples, tables

SIZES = st.one_of(st.integers(1, 4), st.floats(0, 1, exclude_min=True, exclude_max=True))
SEEDS = st.integers(0, 2**32 - 1)


def splitters():
    return st.one_of(
        st.builds(LeaveLastOut, st.integers(1, 3)),
        st.builds(PerUserHoldout, SIZES, st.integers(1, 3), SEEDS),
        st.builds(PerUserKFold, st.integers(2, 4), random_state=SEEDS),
        st.builds(PerUserKFold, st.integers(2, 4), shuffle=st.just(False)),
        st.builds(ColdUserSplit, SIZES, st.integers(1, 3), SEEDS),
    )


def items_of(rows, which):
    """The distinct items of each user among some rows."""
    found = defaultdict(set)
    for row in which:
        found[rows[row][0]].add(rows[row][1])
    return found


@settings(max_examples=examples(50))
@given(st.data(), splitters())
def test_splits_are_partitions_that_leak_nothing(data, cv):
    rows = data.draw(tables(n_columns=4))
    X = data.draw(contained(rows))
    found = outcome("splitters", lambda: list(cv.split(X)))
    if isinstance(found, Refused):
        return
    assert len(found) == cv.get_n_splits(X)
    everything = items_of(rows, range(len(rows)))
    for train, test in found:
        assert train.dtype == test.dtype == np.int64
        assert len(test)
        assert sorted([*train, *test]) == list(range(len(rows)))
        assert train.tolist() == sorted(train.tolist())
        assert test.tolist() == sorted(test.tolist())
        kept, held = items_of(rows, train), items_of(rows, test)
        for user, items in everything.items():
            assert not kept[user] & held[user]  # no pair on both sides
            assert kept[user] | held[user] == items
            check_promise(cv, len(items), len(kept[user]), len(held[user]))
    again = outcome("splitters", lambda: list(cv.split(X)))
    assert [test.tolist() for _, test in again] == [test.tolist() for _, test in found]


def check_promise(cv, n, n_kept, n_held):
    """Check what a splitter promises a user of n items."""
    if isinstance(cv, ColdUserSplit):
        assert 0 in (n_kept, n_held)
        return
    assert n_kept >= 1
    if isinstance(cv, LeaveLastOut):
        assert n_held == (cv.n if n > cv.n else 0)
    elif isinstance(cv, PerUserKFold):
        assert n_held in ((0,) if n == 1 else (n // cv.n_splits, -(-n // cv.n_splits)))
    elif isinstance(cv.test_size, int):
        assert n_held == min(cv.test_size, n - 1)
    else:
        # Halves go up, and the last item never.
        assert n_held <= n - 1
        assert abs(min(cv.test_size * n, n - 1) - n_held) <= 0.5 + 1e-6


@settings(max_examples=examples(25))
@given(st.data(), splitters())
def test_the_order_of_rows_does_not_matter(data, cv):
    """But to folds that are not shuffled, and among equally late items."""
    if not getattr(cv, "shuffle", True):
        return
    rows = [
        (*row[:3], place) for place, row in enumerate(data.draw(tables(n_columns=4, max_rows=12)))
    ]
    order = data.draw(st.permutations(range(len(rows))))
    moved = [rows[place] for place in order]
    found = outcome("splitters", lambda: list(cv.split(rows)))
    other = outcome("splitters", lambda: list(cv.split(moved)))
    assert isinstance(found, Refused) == isinstance(other, Refused)
    if not isinstance(found, Refused):
        for (_, test), (_, test_of_moved) in zip(found, other, strict=True):
            assert {rows[i] for i in test} == {moved[i] for i in test_of_moved}


@settings(max_examples=examples(25))
@given(tables(n_columns=4), st.integers(1, 3))
def test_the_past_predicts_the_future(rows, n):
    """No item that a user keeps is later than one that is held out."""
    found = outcome("splitters", lambda: list(LeaveLastOut(n).split(rows)))
    if isinstance(found, Refused):
        assert max(map(len, items_of(rows, range(len(rows))).values())) <= n
        return
    [(_, test)] = found
    held = items_of(rows, test)
    latest = {}
    for user, item, _, time in rows:
        latest[user, item] = max(time, latest.get((user, item), time))
    for (user, item), time in latest.items():
        if user in held and item not in held[user]:
            assert all(time <= latest[user, other] for other in held[user])


@settings(max_examples=examples(20))
@given(tables(), st.integers(2, 5), st.none() | SEEDS)
def test_folds_cover_every_pair_once_but_those_of_users_with_one(rows, n_splits, seed):
    cv = PerUserKFold(n_splits, shuffle=seed is not None, random_state=seed)
    found = outcome("splitters", lambda: list(cv.split(rows)))
    everything = items_of(rows, range(len(rows)))
    dealt = {user: items for user, items in everything.items() if len(items) > 1}
    n_pairs = sum(map(len, dealt.values()))
    assert isinstance(found, Refused) == (n_pairs < n_splits)
    if isinstance(found, Refused):
        return
    tests = [test for _, test in found]
    assert items_of(rows, np.concatenate(tests)) == dealt
    sizes = [sum(map(len, items_of(rows, test).values())) for test in tests]
    assert sum(sizes) == n_pairs
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=examples(20))
@given(tables(), SIZES, SEEDS)
def test_cold_users_are_unknown_in_training(rows, test_size, seed):
    cv = ColdUserSplit(test_size, random_state=seed)
    found = outcome("splitters", lambda: list(cv.split(rows)))
    users = {row[0] for row in rows}
    if isinstance(found, Refused):
        assert len(users) <= (test_size if isinstance(test_size, int) else 1)
        return
    [(train, test)] = found
    warm, cold = ({rows[i][0] for i in part} for part in (train, test))
    assert not warm & cold
    assert warm
    if isinstance(test_size, int):
        assert len(cold) == test_size
    else:
        assert abs(len(cold) - np.clip(test_size * len(users), 1, len(users) - 1)) <= 0.5 + 1e-6


@settings(max_examples=examples(50))
@given(ANYTHING, splitters())
def test_anything_is_split_or_refused(X, cv):
    found = outcome("splitters", lambda: list(cv.split(X)))
    if not isinstance(found, Refused):
        for train, test in found:
            assert sorted([*train, *test]) == list(range(len(train) + len(test)))


ODD_PARAMETERS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=2), st.just([1]),
    st.sampled_from([np.int64(2), np.float32(0.5), np.nan, 10**30]),
)  # fmt: skip


@settings(max_examples=examples(20))
@given(ODD_PARAMETERS, ODD_PARAMETERS, st.one_of(SEEDS, st.sampled_from([None, "x", 0.5])))
@pytest.mark.parametrize("cls", [LeaveLastOut, PerUserHoldout, PerUserKFold, ColdUserSplit])
def test_parameters_are_checked(cls, one, two, three):
    """At once or when rows are split."""
    rows = [[user, item] for user in range(4) for item in range(5)]
    rows = np.column_stack([rows, np.ones(20, int), np.arange(20)])

    def call():
        if cls is LeaveLastOut:
            cv = cls(one)
        elif cls is PerUserKFold:
            cv = cls(one, shuffle=two, random_state=three)
        else:
            cv = cls(one, two, three)
        return list(cv.split(rows)) if cv.get_n_splits() <= 100 else []

    outcome("splitters", call)
