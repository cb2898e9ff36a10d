import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fedrecsk.engine import participation
from fedrecsk.engine.parallel import Ranks
from fedrecsk.engine.participation import SPREAD, n_to_ask, read_participation
from fedrecsk.engine.sampling import epoch_cohort, uniform_cohort
from fedrecsk.engine.streams import Streams, counter_uniform

N_CLIENTS = 60
IDS = np.array([f"client {number:02}" for number in range(N_CLIENTS)])
ROWS = np.arange(1, N_CLIENTS + 1)
STREAMS = Streams(3)
OFF = {
    "availability": None,
    "dropout_rate": 0.0,
    "client_seconds": None,
    "deadline": None,
    "over_selection": 0.0,
}


def clients(n_clients=N_CLIENTS, streams=STREAMS, local_epochs=1, **given):
    """Read what is given of the first clients, client k with k + 1 rows."""
    settings = {**OFF, **given, "local_epochs": local_epochs, "streams": streams}
    return read_participation(IDS[:n_clients], ROWS[:n_clients], **settings)


def uniform(t):
    """The sampling of round t."""
    rng = STREAMS.numpy("sampling", t)
    return lambda among, size: among[uniform_cohort(len(among), size, rng)]


def luck(name, t, client):
    """The number in [0, 1) that decides over one client."""
    return float(counter_uniform(STREAMS.key(name, t), torch.tensor([client]))[0])


def literal_round(t, size, draw, chances, dropout_rate, seconds, deadline, over_selection):
    """Go through a round client by client, as its description says."""
    there = [k for k in range(N_CLIENTS) if luck("availability", t, k) < chances[k]]
    wanted = min(math.ceil(round((1 + over_selection) * size, 6)), len(there))
    asked = draw(np.array(there, dtype=np.int64), wanted).tolist() if there else []
    fate, arrivals = Counter(), []
    for k in asked:
        moment = luck("arrival", t, k)
        if seconds is not None:
            moment = seconds[k] * math.exp(SPREAD * norm.ppf(moment))
        if luck("dropout", t, k) < dropout_rate:
            fate["dropped"] += 1
        elif deadline is not None and moment > deadline:
            fate["late"] += 1
        else:
            arrivals.append((moment, k))
    kept = sorted(arrivals)[:size]
    waited = None
    if seconds is not None:
        waited = max((moment for moment, _ in kept), default=0.0)
        if deadline is not None and len(kept) < min(size, len(asked)):
            waited = deadline
    delivered = sorted(k for _, k in kept)
    return asked, delivered, fate["dropped"], fate["late"], N_CLIENTS - len(there), waited


@pytest.mark.parametrize("over_selection", [0.0, 0.3, 2.0])
@pytest.mark.parametrize(("with_speeds", "deadline"), [(False, None), (True, None), (True, 30.0)])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.4])
@pytest.mark.parametrize("available", [None, 0.5, "some"])
def test_a_round_is_what_its_description_says(
    available, dropout_rate, with_speeds, deadline, over_selection
):
    chances = np.ones(N_CLIENTS) if available is None else np.full(N_CLIENTS, 0.5)
    if available == "some":
        chances = np.linspace(0, 0.4, N_CLIENTS)
        available = chances
    each = np.where(np.arange(N_CLIENTS) % 3 == 0, 2.0, 0.5)
    given = clients(
        availability=available,
        dropout_rate=dropout_rate,
        client_seconds=each if with_speeds else None,
        deadline=deadline,
        over_selection=over_selection,
        local_epochs=2,
    )
    if given is None:  # everybody is there and delivers
        assert (available, dropout_rate, with_speeds, over_selection) == (None, 0.0, False, 0.0)
        return
    seconds = each * ROWS * 2 if with_speeds else None
    for t in range(6):
        turnout = given.of_round(t, 15, uniform(t))
        asked, delivered, dropped, late, unavailable, waited = literal_round(
            t, 15, uniform(t), chances, dropout_rate, seconds, deadline, over_selection
        )
        assert turnout.asked.tolist() == asked
        assert turnout.delivered.tolist() == delivered
        assert (turnout.dropped, turnout.late) == (dropped, late)
        assert turnout.unavailable == unavailable
        assert turnout.waited == (None if waited is None else pytest.approx(waited))


def test_nothing_said_is_nothing_to_do():
    assert clients() is None
    for name, value in {
        "availability": 1.0,
        "dropout_rate": 0.1,
        "client_seconds": 1.0,
        "over_selection": 0.1,
    }.items():
        assert clients(**{name: value}) is not None, name


def test_where_all_are_there_the_sampling_is_as_without():
    given = clients(availability=1.0)
    for t in range(5):
        turnout = given.of_round(t, 12, uniform(t))
        expected = uniform_cohort(N_CLIENTS, 12, STREAMS.numpy("sampling", t))
        assert turnout.asked.tolist() == turnout.delivered.tolist() == expected.tolist()
        assert (turnout.dropped, turnout.late, turnout.unavailable) == (0, 0, 0)


def assert_binomial(count, trials, share):
    """A count is binomial(trials, share); five standard deviations are allowed."""
    assert abs(count - trials * share) < 5 * np.sqrt(trials * share * (1 - share))


def test_rates_are_those_given():
    chances = np.linspace(0.1, 0.9, N_CLIENTS)
    given = clients(availability=chances, dropout_rate=0.3, client_seconds=1 / ROWS, deadline=1.2)
    n_rounds, there, delivered = 400, np.zeros(N_CLIENTS), np.zeros(N_CLIENTS)
    asked = dropped = late = 0
    for t in range(n_rounds):
        turnout = given.of_round(t, N_CLIENTS, lambda among, size: among)  # all who are there
        there[turnout.asked] += 1
        delivered[turnout.delivered] += 1
        asked += len(turnout.asked)
        dropped += turnout.dropped
        late += turnout.late
        assert turnout.unavailable == N_CLIENTS - len(turnout.asked)
    for k in range(N_CLIENTS):
        assert_binomial(there[k], n_rounds, chances[k])
    assert_binomial(dropped, asked, 0.3)
    # Everybody's median is one second.
    in_time = norm.cdf(math.log(1.2) / SPREAD)
    assert_binomial(late, asked - dropped, 1 - in_time)
    for k in range(N_CLIENTS):
        assert_binomial(delivered[k], n_rounds, chances[k] * 0.7 * in_time)


def test_the_luck_of_a_client_is_its_own():
    given = clients(dropout_rate=0.5)

    def lost(t, asked):
        turnout = given.of_round(t, len(asked), lambda among, size: np.array(asked))
        return {int(k) for k in set(asked) - set(turnout.delivered.tolist())}

    for t in range(20):
        assert lost(t, range(0, 60, 2)) | lost(t, range(1, 60, 2)) == lost(t, range(60))
    # Rounds and seeds differ, and the same is the same.
    assert len({frozenset(lost(t, range(60))) for t in range(20)}) == 20
    assert lost(4, range(60)) == lost(4, range(60))
    other = clients(dropout_rate=0.5, streams=Streams(4)).of_round(4, 60, lambda among, size: among)
    assert set(range(60)) - set(other.delivered.tolist()) != lost(4, range(60))


def test_over_selection_keeps_what_was_wanted():
    given = clients(dropout_rate=0.2, over_selection=0.6)
    for t in range(50):
        turnout = given.of_round(t, 20, uniform(t))
        assert len(turnout.asked) == 32
        assert len(turnout.delivered) == min(20, 32 - turnout.dropped)
    # In a random order: those with the highest codes are kept as often as the others.
    always = clients(over_selection=1.0)
    kept = np.zeros(N_CLIENTS)
    for t in range(400):
        kept[always.of_round(t, 30, lambda among, size: among[:size]).delivered] += 1
    assert (kept > 0).all()
    for count in kept:
        assert_binomial(count, 400, 0.5)


def test_over_selection_keeps_the_fastest():
    given = clients(client_seconds=1.0, over_selection=1.0)  # client k takes about k + 1 seconds
    kept = np.zeros(N_CLIENTS)
    for t in range(100):
        kept[given.of_round(t, 30, lambda among, size: among).delivered] += 1
    assert kept[:10].min() == 100
    assert kept[50:].max() < 10
    # Which is what the server gains by it.
    waits = [
        np.mean([model.of_round(t, 15, uniform(t)).waited for t in range(100)])
        for model in (given, clients(client_seconds=1.0))
    ]
    assert waits[0] < 0.7 * waits[1]


@pytest.mark.parametrize(
    ("size", "more", "asked"),
    [(10, 0.0, 10), (10, 0.1, 11), (10, 0.11, 12), (30, 0.1, 33), (7, 0.5, 11), (1, 0.01, 2)],
)
def test_how_many_are_asked(size, more, asked):
    assert n_to_ask(size, more) == asked


def test_cohorts_shrink_to_those_who_are_there():
    given = clients(availability=0.1, over_selection=0.5)
    sizes = set()
    for t in range(40):
        turnout = given.of_round(t, 10, uniform(t))
        there = N_CLIENTS - turnout.unavailable
        assert len(turnout.asked) == min(15, there)
        assert len(turnout.delivered) == min(10, there)
        sizes.add(there)
    assert min(sizes) < 10


def test_nobody_there():
    given = clients(availability=lambda t, ids: np.zeros(len(ids), dtype=bool))
    turnout = given.of_round(0, 10, fail)
    assert len(turnout.asked) == len(turnout.delivered) == 0
    assert (turnout.unavailable, turnout.waited) == (N_CLIENTS, None)


def fail(*_):
    raise AssertionError("nobody is there to draw among")


def test_only_the_population_is_asked():
    given = clients(availability=0.5)
    population = np.arange(40, 60)
    whole = given.of_round(2, 60, lambda among, size: among)
    turnout = given.of_round(2, 60, lambda among, size: among, population)
    assert turnout.asked.tolist() == [k for k in whole.asked if k >= 40]
    assert turnout.unavailable == 20 - len(turnout.asked)


# ---------------------------------------------------------------- what a caller may give


def test_ways_to_give_numbers_client_by_client():
    numbers = np.linspace(0.1, 1.0, N_CLIENTS)
    by_id = {"nobody": 7.0, **dict(zip(IDS.tolist()[::-1], numbers.tolist()[::-1], strict=True))}
    for given in (numbers, numbers.tolist(), by_id):
        found = clients(availability=given, client_seconds=given, local_epochs=3)
        np.testing.assert_array_equal(found.availability, numbers)
        np.testing.assert_allclose(found.seconds, numbers * ROWS * 3)
    found = clients(availability=0.5, client_seconds=2)
    np.testing.assert_array_equal(found.availability, np.full(N_CLIENTS, 0.5))
    np.testing.assert_array_equal(found.seconds, 2.0 * ROWS)


def test_a_function_is_asked_once_a_round_with_what_history_shows():
    calls = []

    def odd(number, client_ids):
        calls.append((number, client_ids.tolist()))
        assert not client_ids.flags.writeable
        return np.arange(len(client_ids)) % 2 == 1

    given = clients(availability=odd)
    for t in (0, 7):
        turnout = given.of_round(t, N_CLIENTS, lambda among, size: among)
        assert turnout.delivered.tolist() == list(range(1, N_CLIENTS, 2))
    assert calls == [(1, IDS.tolist()), (8, IDS.tolist())]
    # Chances are chances, whoever gives them.
    chances = np.linspace(0, 1, N_CLIENTS)
    one, other = clients(availability=chances), clients(availability=lambda t, ids: chances)
    for t in range(5):
        expected = one.of_round(t, 20, uniform(t)).asked
        np.testing.assert_array_equal(other.of_round(t, 20, uniform(t)).asked, expected)


def test_the_first_of_several_processes_says_who_is_there(monkeypatch):
    sent = []

    def add_up(mine):
        sent.append(mine.tolist())
        return (torch.ones(N_CLIENTS, dtype=torch.float64),)

    monkeypatch.setattr(participation, "add_up", add_up)
    for rank, expected in ((0, 0.25), (1, 0.0)):
        monkeypatch.setattr(participation, "ranks", lambda rank=rank: Ranks(rank, 2))
        given = clients(availability=lambda t, ids: np.full(len(ids), 0.25))
        assert len(given.of_round(0, N_CLIENTS, lambda among, size: among).asked) == N_CLIENTS
        assert sent.pop() == [expected] * N_CLIENTS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"availability": {"client 00": 1.0}}, r"has no entry for 2 of the 3 clients.*'client 01'"),
        ({"availability": [0.5, 0.5]}, r"availability is of shape \(2,\), but there are 3 clients"),
        ({"availability": [[0.5] * 3]}, r"availability is of shape \(1, 3\)"),
        ({"availability": [0.5, 1.5, 1]}, r"gives client 'client 01' the probability 1\.5"),
        ({"availability": [0.5, -1, 1]}, r"gives client 'client 01' the probability -1"),
        ({"availability": [1, 1, math.nan]}, r"gives client 'client 02' the probability nan"),
        ({"availability": ["often"] * 3}, r"availability must be numbers, a probability for each"),
        ({"availability": [0, 0, 0]}, r"availability is 0 for all of the 3 clients"),
        ({"client_seconds": [1, 0, 1]}, r"gives client 'client 01' 0 seconds"),
        ({"client_seconds": [1, math.inf, 1]}, r"gives client 'client 01' inf seconds"),
        ({"client_seconds": {}}, r"client_seconds has no entry for 3 of the 3 clients"),
        ({"client_seconds": [1, 2]}, r"client_seconds is of shape \(2,\)"),
        ({"deadline": 3.0}, r"deadline=3 needs client_seconds"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        clients(n_clients=3, **given)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (True, r"in round 5 it returned an array of shape \(\) and type bool"),
        ([True, False], r"each of the 3 clients; in round 5 .* shape \(2,\)"),
        ([[0.5] * 3], r"shape \(1, 3\)"),
        (["yes"] * 3, r"type <U3"),
        ([1, [0, 1], 1], r"each of the 3 clients; in round 5 .* type object"),
        ([0.5, 2.0, 1.0], r"availability, in round 5, gives client 'client 01' the probability 2"),
        ([0.5, math.nan, 1.0], r"gives client 'client 01' the probability nan"),
    ],
)
def test_what_a_function_must_not_return(answer, message):
    given = clients(n_clients=3, availability=lambda t, ids: answer)
    with pytest.raises(ValueError, match=message):
        given.of_round(4, 2, fail)


# ---------------------------------------------------------------- turns


def literal_turns(history, n_clients):
    """Turns and misses after rounds of (asked, delivered), client by client."""
    turns, missed = [0] * n_clients, [False] * n_clients
    for asked, delivered in history:
        for k in asked:
            if k in delivered or missed[k]:
                turns[k], missed[k] = turns[k] + 1, False
            else:
                missed[k] = True
    return turns, missed


def test_epochs_ask_again_once():
    given = clients(dropout_rate=0.4)
    turns, missed = np.zeros(N_CLIENTS, dtype=np.int64), np.zeros(N_CLIENTS, dtype=bool)
    history = []
    for t in range(60):

        def draw(among, size, turns=turns, t=t):
            return among[epoch_cohort(turns[among], size, STREAMS.numpy("sampling", t))]

        turnout = given.of_round(t, 12, draw)
        history.append((turnout.asked.tolist(), turnout.delivered.tolist()))
        turns[turnout.delivered] += 1
        arguments = turns, missed
        before = turns.tolist(), missed.tolist()
        turns, missed = turnout.turns_after(*arguments)
        assert (arguments[0].tolist(), arguments[1].tolist()) == before
        expected = literal_turns(history, N_CLIENTS)
        assert (turns.tolist(), missed.tolist()) == expected
        assert turns.max() - turns.min() <= 2  # nobody is left behind
    assert turns.min() > 5


def test_clients_that_never_deliver_do_not_fill_the_rounds():
    """Every third client is always late; of the others each has as many turns as before."""
    slow = np.arange(N_CLIENTS) % 3 == 0
    given = clients(client_seconds=np.where(slow, 1e6, 1e-6), deadline=1.0)
    turns, missed = np.zeros(N_CLIENTS, dtype=np.int64), np.zeros(N_CLIENTS, dtype=bool)
    asked = np.zeros(N_CLIENTS)
    for t in range(120):

        def draw(among, size, turns=turns, t=t):
            return among[epoch_cohort(turns[among], size, STREAMS.numpy("sampling", t))]

        turnout = given.of_round(t, 12, draw)
        asked[turnout.asked] += 1
        turns[turnout.delivered] += 1
        turns, missed = turnout.turns_after(turns, missed)
    # Asked twice in every epoch, they have half of the places and not all of them.
    assert asked[slow].sum() / asked.sum() == pytest.approx(0.5, abs=0.02)
    assert turns.max() - turns.min() <= 2
