"""Bytes that a real federation would send, counted from shapes."""

from __future__ import annotations

from math import prod

FLOAT_BYTES = 4  # parameters travel as float32
INDEX_BYTES = 4  # row numbers travel as int32


def dense_bytes(*shapes: tuple[int, ...]) -> int:
    """Bytes of dense float32 tensors of the given shapes.

    Examples
    --------
    >>> from fedrecsk.engine.traffic import dense_bytes
    >>> dense_bytes((10, 4), (4,))
    176
    """
    return FLOAT_BYTES * sum(prod(shape) for shape in shapes)


def sparse_row_bytes(n_rows: int, width: int) -> int:
    """Bytes of `n_rows` rows of `width` float32 numbers, each with its row number.

    Examples
    --------
    >>> from fedrecsk.engine.traffic import sparse_row_bytes
    >>> sparse_row_bytes(3, 32)
    396
    """
    return n_rows * (width * FLOAT_BYTES + INDEX_BYTES)
