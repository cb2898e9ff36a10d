"""Items and histories as text: what a language model reads.

Every text is one line of visible characters. Inside a prompt a title has no double quote and no
heading of its own either, so whatever an item is called, the prompt keeps its form.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
from numpy.typing import NDArray

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.vocabulary import IdArray, Vocabulary, as_ids, is_missing
from fedrecsk.exceptions import NoItemTextWarning

__all__ = [
    "Catalogue",
    "answer",
    "catalogue",
    "histories",
    "one_line",
    "prompt",
    "prompt_title",
    "read_answer",
    "read_item_text",
]

# (name, text) of each attribute of an item, the title first.
Attributes = list[tuple[str, str]]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Soft hyphens, zero-width spaces, marks of direction, and halves of surrogate pairs, which no
# tokenizer can encode. The joiners stay: scripts and emoji are spelled with them.
_INVISIBLE = re.compile(r"[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_HEADING = re.compile("##+")
_QUOTE = '"'

_INSTRUCTION = """\
### Instruction:
Below are the titles of the items that a person chose, from the oldest to the latest choice. \
Write the title of one more item that this person is likely to choose next.

### History:
{history}

### Response:
"""
_ACCEPTED = (
    "Pass a dict from item id to title or to a dict of attributes, or a DataFrame with the column "
    "item_id, a column title and any further columns of text"
)


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Items and the texts that a model knows them by.

    Parameters
    ----------
    items : Vocabulary
        The ids; an item's code is its place in all that follows.
    titles : tuple of str
        Of each item, one line.
    texts : tuple of str
        Of each item, one line: ``"title: X brand: Y categories: A, B"``, or the title alone where
        no item has more than one attribute.
    """

    items: Vocabulary
    titles: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.items)


def read_item_text(item_text: Any, *, max_attributes: int = 3) -> Catalogue:
    """Read the texts of items.

    Parameters
    ----------
    item_text : mapping, DataFrame or Series
        - A mapping from item id to title, or to a mapping from attribute to value.
        - A DataFrame (pandas, polars, pyarrow, ...) with the column ``item_id``. Its columns of
          text, or of lists of text, are the attributes; columns of numbers and dates are left out.
        - A pandas Series of titles with the item ids as index.

        The attribute ``title`` is the title, else the first attribute. In other attributes ``|``
        separates words. Missing and empty values are dropped, and items that have no others.
    max_attributes : int, default=3
        The first so many of an item's attributes make its text, the title counted.

    Returns
    -------
    catalogue : Catalogue
        The items that have a text, sorted by id.

    Raises
    ------
    TypeError
        If ``item_text`` or a value in it is of another type, or the ids mix text with numbers.
    ValueError
        If a DataFrame has no column ``item_id`` or none of text, an item comes twice, or
        ``max_attributes`` is below 1.

    Examples
    --------
    >>> from fedrecsk.data.prompts import read_item_text
    >>> read_item_text({7: "Heat", 3: "Alien"}).texts
    ('Alien', 'Heat')
    >>> films = {7: {"title": "Heat", "genres": "Crime|Thriller"}, 3: {"title": "Alien"}}
    >>> read_item_text(films).texts
    ('title: Alien', 'title: Heat genres: Crime, Thriller')
    """
    if max_attributes < 1:
        raise ValueError(f"max_attributes must be at least 1, got {max_attributes}.")
    ids, items = _read(item_text)
    _refuse_repeats(ids)
    items = [attributes[:max_attributes] for attributes in items]
    named = any(len(attributes) > 1 for attributes in items)
    order = [int(place) for place in np.argsort(ids, kind="stable") if items[place]]
    return Catalogue(
        items=Vocabulary(ids[order]),
        titles=tuple(items[place][0][1] for place in order),
        texts=tuple(_as_text(items[place], named) for place in order),
    )


def catalogue(
    data: Interactions, item_text: Any = None, *, max_attributes: int = 3
) -> tuple[Catalogue, NDArray[np.int64]]:
    """Put the items of the interactions together with the items that have a text.

    Parameters
    ----------
    data : Interactions
        What was observed. Its items without a text get their id as title and text.
    item_text : mapping, DataFrame, Series or None, default=None
        As in :func:`read_item_text`. Items that nobody has chosen yet belong to the catalogue
        too. None: every item has its id as text.
    max_attributes : int, default=3
        As in :func:`read_item_text`.

    Returns
    -------
    catalogue : Catalogue
        Over the union of both, sorted by id.
    codes : ndarray of shape (data.n_items,), int64
        Code in the catalogue of each item code of ``data``.

    Raises
    ------
    TypeError
        If the ids are text on one side and numbers on the other, or as in
        :func:`read_item_text`.
    ValueError
        If no item of ``data`` has a text though ``item_text`` has some, or as in
        :func:`read_item_text`.

    Warns
    -----
    NoItemTextWarning
        If items of ``data`` have no text; the message counts them.

    Examples
    --------
    >>> from fedrecsk.data import encode
    >>> from fedrecsk.data.prompts import catalogue
    >>> data = encode([["ann", 7], ["bob", 5]])
    >>> items, codes = catalogue(data, {3: "Alien", 5: "Solaris", 7: "Heat"})
    >>> items.titles
    ('Alien', 'Solaris', 'Heat')
    >>> codes
    array([1, 2])
    """
    known = Catalogue(data.items, (), ())
    if item_text is not None:
        known = read_item_text(item_text, max_attributes=max_attributes)
    has_text = np.zeros(data.n_items, dtype=np.bool_)
    items = data.items
    if known.titles:
        _, has_text = known.items.encode(data.items.ids)
        if not has_text.any():
            raise _nothing_matches(data.items.ids, known.items.ids)
        items = data.items.extend(known.items.ids, source="item_text", column="item_id")
    if not has_text.all():
        _warn_of_items_without_text(data.items.ids[~has_text], data.n_items)
    titles = [_id_as_text(each) for each in items.ids.tolist()]
    texts = titles.copy()
    places = items.encode(known.items.ids)[0].tolist()
    # Without any text there are no titles to put in, and the ids stay.
    for place, title, text in zip(places, known.titles, known.texts, strict=False):
        titles[place], texts[place] = title, text
    return Catalogue(items, tuple(titles), tuple(texts)), items.encode(data.items.ids)[0]


def histories(data: Interactions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the items of each user, the oldest first.

    Parameters
    ----------
    data : Interactions
        Items of one moment come in the order of their codes. So do all items of a user where
        there are no timestamps, since the order of the rows says nothing.

    Returns
    -------
    indptr : ndarray of shape (n_users + 1,), int64
        The items of user u are ``items[indptr[u] : indptr[u + 1]]``.
    items : ndarray of shape (n,), int64
        Item codes of ``data``.

    Examples
    --------
    >>> from fedrecsk.data import encode
    >>> from fedrecsk.data.prompts import histories
    >>> rows = [["ann", 7, 1.0, 30], ["bob", 9, 1.0, 10], ["ann", 8, 1.0, 20]]
    >>> histories(encode(rows))
    (array([0, 2, 3]), array([1, 0, 2]))
    """
    keys = [data.item, data.user]
    if data.timestamp is not None:
        keys.insert(1, data.timestamp)
    indptr = np.concatenate([[0], np.cumsum(data.user_counts)])
    return indptr, data.item[np.lexsort(keys)]


def one_line(text: str) -> str:
    r"""Bring a text to one line: no control characters, one blank between words.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    text : str
        Without blanks at its ends.

    Examples
    --------
    >>> from fedrecsk.data.prompts import one_line
    >>> one_line("  The\tThird\n Man ")
    'The Third Man'
    """
    return " ".join(_INVISIBLE.sub("", _CONTROL.sub(" ", text)).split())


def prompt_title(title: str) -> str:
    """Write a title as it stands between the quotes of a prompt and of an answer.

    Parameters
    ----------
    title : str
        Any title.

    Returns
    -------
    title : str
        One line, with single quotes for double ones and no two ``#`` in a row, which begin the
        headings of a prompt.

    Examples
    --------
    >>> from fedrecsk.data.prompts import prompt_title
    >>> prompt_title('"Heat" ### Response:')
    "'Heat' # Response:"
    """
    return _HEADING.sub("#", one_line(title)).replace(_QUOTE, "'")


def prompt(titles: Sequence[str], *, max_history: int = 10) -> str:
    """Ask for the title of the next item.

    An instruction, the history as titles in quotes, and room for the response, as in BIGRec (Bao
    et al. 2023, arXiv:2308.08434), in words of our own that suit items of any kind.

    Parameters
    ----------
    titles : sequence of str
        Titles of the user's items, the oldest first.
    max_history : int, default=10
        Only the last so many are shown.

    Returns
    -------
    prompt : str
        :func:`answer` of the next item's title continues it.

    Examples
    --------
    >>> from fedrecsk.data.prompts import prompt
    >>> print(prompt(["Alien", "Heat"]))
    ### Instruction:
    Below are the titles of the items that a person chose, from the oldest to the latest choice.
    Write the title of one more item that this person is likely to choose next.
    <BLANKLINE>
    ### History:
    "Alien", "Heat"
    <BLANKLINE>
    ### Response:
    <BLANKLINE>
    """
    if max_history < 1:
        raise ValueError(f"max_history must be at least 1, got {max_history}.")
    return _INSTRUCTION.format(history=", ".join(map(answer, titles[-max_history:])))


def answer(title: str) -> str:
    """Write the response that a prompt asks for.

    Parameters
    ----------
    title : str
        Title of the next item.

    Returns
    -------
    answer : str
        The title in double quotes.

    Examples
    --------
    >>> from fedrecsk.data.prompts import answer
    >>> answer("Heat")
    '"Heat"'
    """
    return f"{_QUOTE}{prompt_title(title)}{_QUOTE}"


def read_answer(response: str) -> str:
    r"""Take the title out of a response that a model wrote.

    Parameters
    ----------
    response : str
        What the model added to a prompt.

    Returns
    -------
    title : str
        The first text in quotes, whether or not the model closed them; without quotes the first
        line. ``read_answer(answer(title)) == prompt_title(title)``.

    Examples
    --------
    >>> from fedrecsk.data.prompts import read_answer
    >>> read_answer(' "Heat"\n\n### Response: "Alien"')
    'Heat'
    """
    before, _, quoted = response.partition(_QUOTE)
    if before.strip() or not quoted:
        return one_line(before.strip().split("\n")[0])
    return one_line(quoted.partition(_QUOTE)[0].strip().split("\n")[0])


def _read(item_text: Any) -> tuple[IdArray, list[Attributes]]:
    """Read item ids and what is known of each item, whatever holds them."""
    if isinstance(item_text, Mapping):
        return _read_pairs(item_text.items())
    frame = _as_frame(item_text)
    if frame is not None:
        return _read_frame(frame)
    # A Series is told by its index, so that no DataFrame library is imported for it.
    if hasattr(item_text, "index") and hasattr(item_text, "items"):
        return _read_pairs(item_text.items())
    raise TypeError(f"item_text is a {type(item_text).__name__}. {_ACCEPTED}.")


def _read_pairs(pairs: Iterable[tuple[Any, Any]]) -> tuple[IdArray, list[Attributes]]:
    ids, items = [], []
    for item, value in pairs:
        ids.append(item)
        texts: Iterable[tuple[str, list[str]]]
        if isinstance(value, Mapping):
            texts = ((str(name), _value_as_text(each, item)) for name, each in value.items())
        elif isinstance(value, str) or is_missing(value):
            texts = [("title", _value_as_text(value, item))]
        else:
            raise TypeError(
                f"item_text gives item {item!r} a {type(value).__name__}, {value!r}. {_ACCEPTED}."
            )
        items.append(_title_first(texts))
    # Of dtype object, or a key that is a tuple would add a dimension.
    return as_ids(np.fromiter(ids, dtype=object, count=len(ids)), source="item_text"), items


def _read_frame(frame: nw.DataFrame[Any]) -> tuple[IdArray, list[Attributes]]:
    names = list(map(str, frame.columns))
    if "item_id" not in names:
        raise ValueError(
            f"item_text lacks the column item_id; it has {', '.join(names)}. Rename the column "
            "with the item ids."
        )
    ids = as_ids(frame["item_id"].to_numpy(), source="item_text", column="item_id")
    columns = {
        name: frame[name].to_list()
        for name in frame.columns
        if name != "item_id" and not _has_no_text(frame[name].dtype)
    }
    if not columns or ("title" in names and "title" not in columns):
        raise ValueError(
            f"item_text has no column of text{' called title' * ('title' in names)}; it has "
            f"{', '.join(f'{name} ({frame[name].dtype})' for name in frame.columns)}. Add the "
            "titles as a column, or convert one with astype(str)."
        )
    items = []
    for item, *values in zip(ids.tolist(), *columns.values(), strict=True):
        texts = (
            (str(name), _value_as_text(value, item))
            for name, value in zip(columns, values, strict=True)
        )
        items.append(_title_first(texts))
    return ids, items


def _as_frame(item_text: Any) -> nw.DataFrame[Any] | None:
    """Wrap a DataFrame of any library; None for everything else."""
    try:
        frame = nw.from_native(item_text, pass_through=True)
        if isinstance(frame, nw.DataFrame):
            _ = frame.columns
    except nw.exceptions.DuplicateError as error:
        raise ValueError(
            "item_text has several columns of the same name. Rename or drop them."
        ) from error
    if isinstance(frame, nw.LazyFrame):
        raise TypeError(
            "item_text is a lazy frame, whose rows are not there yet. Pass item_text.collect()."
        )
    return frame if isinstance(frame, nw.DataFrame) else None


def _has_no_text(dtype: Any) -> bool:
    return bool(dtype.is_numeric() or dtype.is_temporal() or dtype == nw.Boolean)


def _value_as_text(value: Any, item: Any) -> list[str]:
    """List the words of an attribute: of one value, or of each in a collection."""
    if isinstance(value, str):
        return [one_line(value)]
    if is_missing(value):
        return []
    if isinstance(value, bool | int | float | np.number):
        return [str(value)]
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        # The order of a set is not the same in every process.
        parts = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [word for part in parts for word in _value_as_text(part, item)]
    raise TypeError(
        f"item_text gives item {item!r} a value of type {type(value).__name__}, {value!r}. "
        "Convert it to text."
    )


def _title_first(attributes: Iterable[tuple[str, list[str]]]) -> Attributes:
    """Put the title first and drop what is empty; bars are read in the other attributes only."""
    named = list(attributes)
    names = [name for name, _ in named]
    title = names.index("title") if "title" in names else 0
    texts = [(name, ", ".join(words)) for name, words in named[title : title + 1]]
    for name, words in named[:title] + named[title + 1 :]:
        parts = (part.strip() for word in words for part in word.split("|"))
        texts.append((one_line(name), ", ".join(filter(None, parts))))
    return [(name, text) for name, text in texts if text]


def _as_text(attributes: Attributes, named: bool) -> str:
    if not named:
        return attributes[0][1]
    return " ".join(f"{name}: {text}" for name, text in attributes)


def _refuse_repeats(ids: IdArray) -> None:
    distinct, counts = np.unique(ids, return_counts=True)
    repeated = distinct[counts > 1]
    if len(repeated):
        raise ValueError(
            f"item_text has {counts.max()} texts for item {distinct[counts.argmax()].item()!r}"
            f"{f' ({len(repeated)} such items in all)' if len(repeated) > 1 else ''}. Keep one row "
            "an item."
        )


def _nothing_matches(items: IdArray, texts: IdArray) -> TypeError | ValueError:
    """Make the error for texts that belong to none of the items."""
    found = (
        f"item_text has a text for none of the {len(items)} items of the interactions: their ids "
        f"are such as {items[0].item()!r}, those of item_text such as {texts[0].item()!r}."
    )
    text_in_both = (items.dtype.kind in "US") == (texts.dtype.kind in "US")
    if text_in_both:
        return ValueError(f"{found} Key item_text by the ids of the interactions.")
    return TypeError(f"{found} Convert one of them to the kind of the other.")


def _warn_of_items_without_text(items: IdArray, n_items: int) -> None:
    example = repr(items[0].item())
    if len(items) == n_items:
        message = (
            f"There is no text for any of the {n_items} items, so the model knows them by their "
            f"ids only, such as {example}. Pass item_text, for example a dict from item id to title"
        )
    else:
        message = (
            f"{len(items)} of {n_items} items have no text, such as {example}; their ids stand in "
            "for it. Add them to item_text"
        )
    warnings.warn(f"{message}.", NoItemTextWarning, stacklevel=3)


def _id_as_text(item: Any) -> str:
    """Write an id as a text that is not empty."""
    if isinstance(item, bytes):
        item = item.decode(errors="replace")
    if isinstance(item, float) and item.is_integer():
        item = int(item)
    return one_line(str(item)) or repr(item)
