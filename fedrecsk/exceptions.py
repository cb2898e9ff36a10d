"""Classes of warnings and errors that callers may want to tell apart.

Errors are Python's and scikit-learn's own: ``ValueError`` for bad data and parameters,
``NotFittedError`` before ``fit``, ``FloatingPointError`` for a fit that diverges.
"""

from __future__ import annotations


class UnknownIdWarning(UserWarning):
    """Ids that ``fit`` has not seen were given a fallback; the message counts them."""


class NothingHeldOutError(ValueError):
    """Every row to be scored was in ``fit``, so there is nothing to find."""


class NothingHeldOutWarning(UserWarning):
    """``score`` has nothing to find and returns nan, as on the training rows of a search."""


class NoItemTextWarning(UserWarning):
    """A model that reads texts knows some items, or all, by their ids only."""
