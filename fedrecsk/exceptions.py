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
        self.arguments: tuple[int, ...] = n_clients, t

    def __reduce__(self) -> tuple[type[NoUsableUploadError], tuple[int, ...]]:
        # Exceptions are rebuilt from their message otherwise, as when a worker of joblib fails.
        return type(self), self.arguments


class TooFewClientsError(NoUsableUploadError):
    """So many clients have left a round of secure aggregation that nobody can read the sum.

    Parameters
    ----------
    n_left, n_needed : int
        Clients that were there in the end, and that would have been needed.
    n_clients : int
        Of the round.
    t : int
        Number of the round, from 0.
    """

    def __init__(self, n_left: int, n_needed: int, n_clients: int, t: int) -> None:
        FloatingPointError.__init__(
            self,
            f"Of the {n_clients} clients of round {t + 1} only {n_left} stayed to the end or had "
            f"numbers that can be added, and secure aggregation needs {n_needed} to unmask the "
            "sum. Lower learning_rate or raise l2 if uploads are not finite.",
        )
        self.arguments = n_left, n_needed, n_clients, t
