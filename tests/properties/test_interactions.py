"""Reading and coding, for any ids in any container; and for what is no data at all."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array

from fedrecsk.data import (
    Columns,
    Interactions,
    Vocabulary,
    encode,
    interactions_from_sparse,
    read_columns,
)
from fedrecsk.data.interactions import merge
from tests.properties.documented import Refused, outcome
from tests.properties.strategies import (
    ANYTHING,
    BYTES,
    CELLS,
    FLOATS,
    INTEGERS,
    TEXTS,
    client_of_user,
    contained,
    ends_in_nul,
    examples,
    ids,
    tables,
)


def slow_encode(rows, clients):
    """Say with dictionaries what `encode` does, in ids: the latest row of each pair."""
    kept = {}
    for row, client in zip(rows, clients, strict=True):
        key, rest = (client, *row[:2]), row[2:]
        # Without timestamps the last row counts; of equally late ones the highest rating.
        if key not in kept or len(rest) < 2 or rest[::-1] >= kept[key][::-1]:
            kept[key] = rest
    return {key: kept[key] for key in sorted(kept)}


def decoded(data):
    """Give the rows of an Interactions by ids: (client, user, item) to the rest."""
    columns = [
        data.clients.ids[data.user_client[data.user]].tolist(),
        data.users.ids[data.user].tolist(),
        data.items.ids[data.item].tolist(),
    ]
    rest = [column.tolist() for column in (data.rating, data.timestamp) if column is not None]
    values = zip(*rest, strict=True) if rest else [()] * len(data)
    return dict(zip(zip(*columns, strict=True), values, strict=True))


def arrays_of(data):
    ids = [vocabulary.ids for vocabulary in (data.users, data.items, data.clients)]
    parts = [data.user, data.item, data.rating, data.timestamp, data.user_client, *ids]
    return [None if part is None else (part.dtype, part.tolist()) for part in parts]


@settings(max_examples=examples(60))
@given(st.data())
def test_what_is_encoded_comes_back(data):
    """Every id and every row, in the order that the docstring says, whatever held them."""
    rows = data.draw(tables())
    clients = data.draw(st.none() | client_of_user(rows))
    X = data.draw(contained(rows))
    found = outcome("interactions", lambda: encode(X, clients))
    assert not isinstance(found, Refused), found
    expected = slow_encode(rows, [row[0] for row in rows] if clients is None else clients)
    assert decoded(found) == expected
    assert list(decoded(found)) == list(expected)
    for vocabulary, codes in ((found.users, found.user), (found.items, found.item)):
        assert sorted(set(codes.tolist())) == list(range(len(vocabulary)))
    assert found.client_indptr[-1] == len(found)


@settings(max_examples=examples(30))
@given(st.data())
def test_neither_order_nor_repeats_of_rows_matter(data):
    rows = data.draw(tables(n_columns=data.draw(st.sampled_from([2, 4]))))
    clients = data.draw(client_of_user(rows))
    again = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9))
    places = data.draw(st.permutations([*range(len(rows)), *again]))
    one = outcome("interactions", lambda: encode(rows, clients))
    other = outcome(
        "interactions", lambda: encode([rows[i] for i in places], [clients[i] for i in places])
    )
    assert arrays_of(one) == arrays_of(other)


@settings(max_examples=examples(30))
@given(st.data())
def test_merged_rows_are_those_of_one_table(data):
    """As clients do that keep their rows; where ids cannot be kept together, nothing is merged."""
    kind = data.draw(st.sampled_from(["integers", "unsigned", "text", "floats"]))
    rows = data.draw(tables(n_columns=4, kinds=(kind,)))
    cut = data.draw(st.integers(1, len(rows)))
    old = encode(rows[:cut])
    new = encode(rows[cut:]) if rows[cut:] else old
    found = outcome("interactions", lambda: merge(old, new))
    assert arrays_of(found)[:5] == arrays_of(encode(rows))[:5]


@settings(max_examples=examples(20))
@given(st.data())
def test_a_user_under_two_clients_is_named_with_both(data):
    rows = data.draw(tables(n_columns=2, kinds=("integers", "text")))
    clients = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    of_user = {}
    for (user, _), client in zip(rows, clients, strict=True):
        of_user.setdefault(user, set()).add(client)
    torn = [user for user, found in of_user.items() if len(found) > 1]
    found = outcome("interactions", lambda: encode(rows, clients))
    assert isinstance(found, Refused) == bool(torn)
    if torn:
        assert f"User {min(torn)!r} is under two clients, 0 and 1" in str(found)


@settings(max_examples=examples(150))
@given(ANYTHING, st.booleans())
def test_anything_is_read_or_refused(X, first_two_suffice):
    found = outcome("interactions", lambda: read_columns(X, first_two_suffice=first_two_suffice))
    if isinstance(found, Refused):
        return
    assert isinstance(found, Columns)
    n = len(found)
    assert n > 0
    for column in (found.user, found.item, found.rating, found.timestamp, found.client):
        assert column is None or column.shape == (n,)
        assert column is None or column.dtype.kind in "biufUS"
        assert column is None or column.dtype.kind != "f" or np.isfinite(column).all()
    data = outcome("interactions", lambda: encode(found))
    assert isinstance(data, Interactions | Refused)
    if isinstance(data, Refused):
        assert "is under two clients" in str(data)


ODD_CLIENTS = st.one_of(
    st.lists(CELLS, max_size=4),
    st.lists(CELLS, min_size=3, max_size=3),
    st.lists(st.lists(CELLS, min_size=1, max_size=1), min_size=3, max_size=3),
    ANYTHING,
)


@settings(max_examples=examples(75))
@given(ODD_CLIENTS)
def test_client_ids_of_any_kind_and_length(clients):
    rows = [["ann", 1], ["bob", 1], ["cem", 2]]
    found = outcome("interactions", lambda: encode(rows, clients))
    if not isinstance(found, Refused):
        assert len(found) == 3
        assert found.user_client.shape == (3,)


@settings(max_examples=examples(30))
@given(
    tables(n_columns=4), st.one_of(st.none(), st.floats(), st.integers(-3, 6)), st.integers(2, 4)
)
def test_weak_rows_are_dropped_or_all_are(rows, min_rating, n_columns):
    rows = [row[:n_columns] for row in rows]
    found = outcome("interactions", lambda: encode(rows, min_rating=min_rating))
    kept = [row for row in rows if min_rating is None or (n_columns > 2 and row[2] >= min_rating)]
    if kept:
        assert decoded(found) == slow_encode(kept, [row[0] for row in kept])
    else:
        assert isinstance(found, Refused)


COLUMNS = st.one_of(
    ids(), st.lists(INTEGERS), st.lists(TEXTS), st.lists(FLOATS), st.lists(BYTES),
    st.lists(st.integers(0, 2**64 - 1)),
)  # fmt: skip


@settings(max_examples=examples(75))
@given(COLUMNS, COLUMNS)
def test_lookups_are_those_of_a_dictionary(known, asked):
    """Equal is what Python calls equal, but text that NumPy would shorten is refused."""
    found = outcome("vocabulary", lambda: Vocabulary.from_values(known))
    lost = any(map(ends_in_nul, known))
    assert isinstance(found, Refused) == lost
    if lost:
        assert "NUL" in str(found)
        return
    vocabulary, codes = found
    assert vocabulary.ids.tolist() == sorted(set(known))
    assert vocabulary.decode(codes).tolist() == known
    answer = outcome("vocabulary", lambda: vocabulary.encode(asked))
    assert isinstance(answer, Refused) == any(map(ends_in_nul, asked))
    if not isinstance(answer, Refused):
        place = {value: code for code, value in enumerate(sorted(set(known)))}
        assert answer[0].tolist() == [place.get(value, -1) for value in asked]
        assert answer[1].tolist() == [value in place for value in asked]
    longer = outcome("vocabulary", lambda: vocabulary.extend(asked))
    if not isinstance(longer, Refused):
        assert longer.ids.tolist() == sorted({*known, *asked})


@settings(max_examples=examples(30))
@given(st.data())
def test_sparse_matrices_become_rows(data):
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    cells = st.tuples(
        st.integers(0, max(shape[0] - 1, 0)),
        st.integers(0, max(shape[1] - 1, 0)),
        st.sampled_from([0.0, 1.0, 2.5, -1.0, np.nan, np.inf]),
    )
    entries = data.draw(st.lists(cells, max_size=5 if min(shape) else 0))
    row, column, value = zip(*entries, strict=True) if entries else ((), (), ())
    matrix = coo_array((np.array(value, dtype=float), (row, column)), shape=shape)
    user_ids = data.draw(st.none() | ids(max_size=4))
    found = outcome("interactions", lambda: interactions_from_sparse(matrix, user_ids=user_ids))
    fits = user_ids is None or len(user_ids) == shape[0]
    dense = matrix.toarray()
    assert isinstance(found, Refused) == (not fits or not np.isfinite(dense).all())
    if not isinstance(found, Refused):
        names = range(shape[0]) if user_ids is None else user_ids
        expected = [[names[i], j, dense[i, j]] for i, j in zip(*np.nonzero(dense), strict=True)]
        assert found.tolist() == expected
