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


class NoUsableUploadError(FloatingPointError):
    """All clients of a round have sent what nobody can use, so the fit ends.

    Parameters
    ----------
    n_clients : int
        Of the round.
    t : int
        Number of the round, from 0.
    """

    def __init__(self, n_clients: int, t: int) -> None:
        super().__init__(
            f"Training diverged in round {t + 1}: the uploads of all {n_clients} clients are not "
            "finite, or far too large. Lower learning_rate, or raise l2."
        )
        self.arguments = n_clients, t

    def __reduce__(self) -> tuple[type[NoUsableUploadError], tuple[int, int]]:
        # Exceptions are rebuilt from their message otherwise, as when a worker of joblib fails.
        return type(self), self.arguments
