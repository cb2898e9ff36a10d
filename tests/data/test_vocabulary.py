"""Ids and codes against a dictionary, and the ids that are refused."""

import enum
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import polars as pl
import pytest

from fedrecsk.data.vocabulary import Vocabulary, as_ids, distinct

COLUMNS = {
    "ints": [5, 3, 5, -7, 10**9],
    "floats": [2.5, -1.0, 2.5, 1e300],
    "integral floats": [3.0, 1.0, 3.0],
    "bools": [True, False, True],
    "text": ["b", "a", "B", "b", "", "ä"],
    "bytes": [b"b", b"a", b"b"],
    "ints and floats": [1, 2.5, 1.0],
    "ints and large floats": [1, 1e300],
    "ints and bools": [True, 5, 1],
    "large": [2**63 - 1, 2**63 - 2, -(2**63)],
    "unsigned": [2**64 - 1, 2**63, 0],
}


@pytest.mark.parametrize("values", COLUMNS.values(), ids=COLUMNS.keys())
def test_from_values_numbers_the_sorted_distinct_values(values):
    vocabulary, codes = Vocabulary.from_values(values)
    distinct = sorted(set(values))
    assert vocabulary.ids.tolist() == distinct
    assert codes.dtype == np.int64
    assert codes.tolist() == [distinct.index(value) for value in values]
    assert vocabulary.decode(codes).tolist() == values
    assert len(vocabulary) == len(distinct)


@pytest.mark.parametrize("known", COLUMNS.values(), ids=COLUMNS.keys())
@pytest.mark.parametrize("asked", COLUMNS.values(), ids=COLUMNS.keys())
def test_encode_agrees_with_a_dictionary(known, asked):
    # A dictionary compares by value: 3 == 3.0 == True, and 2**63 - 1 != 2.0**63.
    distinct = sorted(set(known))
    code_of = {value: code for code, value in enumerate(distinct)}
    codes, mask = Vocabulary.from_values(known)[0].encode(asked)
    assert codes.tolist() == [code_of.get(value, -1) for value in asked]
    assert mask.tolist() == [value in code_of for value in asked]


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float32, np.float16, np.longdouble])
def test_narrow_and_wide_dtypes_are_the_same_ids(dtype):
    vocabulary, _ = Vocabulary.from_values([1, 2, 3])
    codes, known = vocabulary.encode(np.array([3, 4, 1], dtype=dtype))
    assert codes.tolist() == [2, -1, 0]
    assert known.tolist() == [True, False, True]


def test_integers_that_floats_cannot_tell_apart_stay_apart():
    large = 2**53
    vocabulary, _ = Vocabulary.from_values([large, large + 1])
    assert len(vocabulary) == 2
    assert vocabulary.encode([float(large)])[0].tolist() == [0]
    floats, _ = Vocabulary.from_values([float(large)])
    assert floats.encode([large, large + 1])[0].tolist() == [0, -1]


@pytest.mark.parametrize("edge", [2.0**63, 2.0**64, -(2.0**63), -(2.0**64), 1e300, 0.5, -0.5])
def test_floats_at_the_edge_of_the_integers(edge):
    for ids in ([2**63 - 1, -(2**63), 0], [2**64 - 1, 0]):
        vocabulary, _ = Vocabulary.from_values(ids)
        assert vocabulary.encode([edge])[1].tolist() == [edge in ids]


def test_longer_text_is_not_cut_to_a_known_id():
    vocabulary, _ = Vocabulary.from_values(["ab", "b"])
    assert vocabulary.encode(["abc", "ab", "a"])[0].tolist() == [-1, 0, -1]


def test_codes_do_not_depend_on_order():
    values = np.random.default_rng(0).integers(-50, 50, 300)
    first, codes = Vocabulary.from_values(values)
    second, reversed_codes = Vocabulary.from_values(values[::-1])
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(codes, reversed_codes[::-1])


def test_decode_refuses_the_code_of_the_unknown():
    vocabulary, _ = Vocabulary.from_values(["a", "b"])
    with pytest.raises(ValueError, match="between 0 and 1; got -1 to 0"):
        vocabulary.decode([0, -1])
    with pytest.raises(ValueError, match="between 0 and 1; got 0 to 2"):
        vocabulary.decode([0, 2])
    assert vocabulary.decode([]).tolist() == []


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ([10, 30], [20, 30], "i"),
        ([10, 30], [20.0, 30.0], "i"),
        ([10.0, 30.0], [20, 30], "f"),
        ([10, 30], [20.5], "f"),
        ([True, False], [1, 0], "b"),
        ([True], [7], "i"),
        ([1], [2**64 - 1], "u"),
        (["b"], ["aaa", "b"], "U"),
        ([b"b"], [b"aaa"], "S"),
        ([], ["a"], "U"),
        (["a"], [], "U"),
    ],
)
def test_extend_is_the_sorted_union(old, new, kind):
    vocabulary, _ = Vocabulary.from_values(old)
    extended = vocabulary.extend(new)
    assert extended.ids.tolist() == sorted(set(old) | set(new))
    assert extended.ids.dtype.kind == kind
    codes, known = extended.encode(vocabulary.ids)
    assert known.all()
    assert extended.decode(codes).tolist() == vocabulary.ids.tolist()


def test_extend_refuses_what_cannot_be_one_dtype():
    with pytest.raises(TypeError, match=r"column 'user_id' of X are text, such as 'a', .* numbers"):
        Vocabulary.from_values([1])[0].extend(["a"], source="X", column="user_id")
    with pytest.raises(ValueError, match="without rounding"):
        Vocabulary.from_values([2**53 + 1])[0].extend([0.5])
    with pytest.raises(ValueError, match="without rounding"):
        Vocabulary.from_values([-1])[0].extend([2**64 - 1])


def test_an_empty_vocabulary_knows_nothing():
    vocabulary, codes = Vocabulary.from_values([])
    assert len(vocabulary) == len(codes) == 0
    assert vocabulary.encode(["a", "b"])[0].tolist() == [-1, -1]
    assert vocabulary.encode([1.0])[1].tolist() == [False]


def test_nothing_asked_is_nothing_found():
    codes, known = Vocabulary.from_values(["a"])[0].encode([])
    assert codes.shape == known.shape == (0,)


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(["b", "a"]),
        pd.Series(["b", "a"], dtype="category"),
        pl.Series(["b", "a"]),
        np.array(["b", "a"], dtype=object),
        ("b", "a"),
    ],
)
def test_series_and_tuples_are_ids(values):
    assert as_ids(values).tolist() == ["b", "a"]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            [1.0, math.nan],
            ValueError,
            r"Input X contains NaN: 1 of 2 values in column 'c' .* row 1",
        ),
        (["a", None], ValueError, "Input X contains NaN: 1 of 2 values"),
        (["a", math.nan], ValueError, "Input X contains NaN: 1 of 2 values"),
        ([pd.NA, 1, pd.NaT], ValueError, "Input X contains NaN: 2 of 3 values"),
        ([Decimal("NaN")], ValueError, "Input X contains NaN: 1 of 1 values"),
        ([None], ValueError, "Input X contains NaN: 1 of 1 values"),
        ([1.0, 2.0, -math.inf], ValueError, "Input X contains infinity: 1 of 3 .* row 2"),
        (np.array([np.inf, np.nan]), ValueError, "Input X contains NaN"),
        ([1, "a"], TypeError, "Numbers and text are mixed in column 'c' of X, such as 1 and 'a'"),
        (["a", b"a"], TypeError, "Bytes and text are mixed in column 'c' of X"),
        ([2**64], ValueError, "does not fit 64 bits. Pass them as strings"),
        ([-1, 2**63], ValueError, "does not fit 64 bits"),
        ([2**53 + 1, 0.5], ValueError, "such as 9007199254740993, .* Pass them as strings"),
        ([10**400, 0.5], ValueError, "integers of 2\\*\\*53 and more in column 'c'"),
        ([1, np.inf], ValueError, "Input X contains infinity: 1 of 2 values in column 'c'"),
        ([1j], ValueError, "Complex data not supported: column 'c' of X"),
        (np.array([1j]), ValueError, "Complex data not supported: column 'c' of X"),
        ([np.timedelta64(1, "D")], TypeError, "a string or a number, not 'timedelta64'"),
        ([{"a": 1}], TypeError, "argument must be a string or a number, not 'dict'"),
        ([[1], [2, 3]], TypeError, "argument must be a string or a number, not 'list'"),
        ([[1], [2]], ValueError, r"column 'c' of X to be a 1d array, .* shape \(2, 1\)"),
        (5, ValueError, r"1d array, got an array of shape \(\). .* single value into a list"),
        (
            np.array(["2020"], dtype="M8[D]"),
            TypeError,
            r"column 'c' of X has dtype datetime64\[D\]",
        ),
    ],
)
def test_values_that_are_no_ids_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        as_ids(values, source="X", column="c")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "b\0"], r"Text in column 'c' of X ends in a NUL character, 'b\\x00', .* Remove it"),
        ([b"\0"], r"ends in a NUL character, b'\\x00'"),
        ([Fraction(10**400, 3), 0.5], "column 'c' of X is too large for double precision. Pass"),
        ([Decimal("sNaN"), "a"], "Input X contains NaN: 1 of 2 values"),
        ([Decimal("sNaN")], "Input X contains NaN: 1 of 1 values"),
        (np.ma.masked_equal([1, 2, 3], 2), "Input X contains NaN: 1 of 3 values .* row 1"),
        (np.array([np.longdouble("1e4000")]), "Input X contains infinity: 1 of 1"),
        (["x" * 10**6, *["y"] * 1_999], r"longest text in column 'c' .* 1000000 ch.* 7\.5 GiB"),
        (["x" * 10**6] * 2_000, r"longest text in column 'c' of X has 1000000 characters"),
    ],
)
def test_values_that_an_array_would_change_or_blow_up_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        as_ids(values, source="X", column="c")


def test_text_with_nul_inside_and_long_text_are_ids():
    texts = ["a\0b", "a", "x" * 10_000]
    assert as_ids(texts).tolist() == texts
    assert Vocabulary.from_values(texts)[0].ids.tolist() == sorted(texts)


def test_text_by_inheritance_is_read_as_the_text_that_it_is():
    class Colour(str, enum.Enum):  # noqa: UP042 - for its other __str__
        RED = "red"

    assert str(Colour.RED) != "red"
    assert as_ids([Colour.RED, "red"]).tolist() == ["red", "red"]


def test_messages_without_a_column_name_the_argument():
    with pytest.raises(ValueError, match="Input client_ids contains NaN: 1 of 1 values are miss"):
        as_ids([None], source="client_ids")
    with pytest.raises(TypeError, match="mixed in client_ids, such as"):
        as_ids([1, "a"], source="client_ids")


@pytest.mark.parametrize(
    "values", [[], [3], [3, 1, 3, 3, 2], [10**15, -5, 10**15], [0.5, 0.25, 0.5], ["b", "a", "b"]]
)
def test_distinct_values_are_those_of_a_set(values):
    array = np.array(values)
    assert distinct(array).tolist() == sorted(set(values))
    assert array.tolist() == values


@pytest.mark.parametrize(
    "values",
    [
        [7, 5, 7, 9, 5, 5],  # close together
        [-3, 2, -1, 2, 0, -3, -3],
        [4],
        [0, 10**6, 0],  # far apart
        [-(2**63), 2**63 - 1, 0],  # the range itself does not fit
    ],
)
def test_integers_are_coded_as_unique_does(values):
    ids, codes = np.unique(values, return_inverse=True)
    vocabulary, found = Vocabulary.from_values(np.array(values))
    assert vocabulary.ids.dtype == found.dtype == np.int64
    np.testing.assert_array_equal(vocabulary.ids, ids)
    np.testing.assert_array_equal(found, codes)
