"""What all recommenders share: reading data, the public methods, callbacks and scoring.

A subclass fills two hooks: `_simulate` runs the federation and returns fitted attributes,
`_score_items` scores all items for some users. Everything a user calls is written here once.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.callback import CallbackSupportMixin, with_callbacks
from sklearn.utils.validation import check_is_fitted

from fedrecsk.data.interactions import Columns, Interactions, encode, merge, read_columns
from fedrecsk.data.vocabulary import Vocabulary, one_or_many
from fedrecsk.engine.checkpoints import Checkpoints, describe, fingerprint
from fedrecsk.engine.parallel import alone, is_main, of_main, ranks, together
from fedrecsk.engine.rounds import Progress, Record
from fedrecsk.engine.shards import concatenate_ranges
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions
from fedrecsk.exceptions import (
    NothingHeldOutError,
    NothingHeldOutWarning,
    NoUsableUploadError,
    UnknownIdWarning,
)
from fedrecsk.metrics.ranking import check_k, top_k
from fedrecsk.metrics.scorers import score_ranking

# Scores held at a time when ranking: 64 MB in single precision.
SCORES_PER_BATCH = 1 << 24
# Length of the ranking behind ``score`` and early stopping.
SCORE_K = 20

Attributes = dict[str, Any]

# Parameters that processes which share a fit may have each their own of.
DIFFER_BY_PROCESS = {"checkpoint", "device", "verbose"}

# Constraints of the parameters that several estimators share, under the same names.
SHARED_CONSTRAINTS: Constraints = {
    "n_factors": [Interval(Integral, 1, None, closed="left")],
    "n_rounds": [Interval(Integral, 1, None, closed="left")],
    "clients_per_round": [
        Interval(Integral, 1, None, closed="left"),
        Interval(Real, 0, 1, closed="right"),
    ],
    "availability": [
        Interval(Real, 0, 1, closed="right"),
        "array-like",
        Mapping,
        callable,
        None,
    ],
    "dropout_rate": [Interval(Real, 0, 1, closed="left")],
    "client_seconds": [Interval(Real, 0, None, closed="neither"), "array-like", Mapping, None],
    "deadline": [Interval(Real, 0, None, closed="neither"), None],
    "over_selection": [Interval(Real, 0, None, closed="left")],
    "local_epochs": [Interval(Integral, 1, None, closed="left")],
    "learning_rate": [Interval(Real, 0, None, closed="neither")],
    "batch_size": [Interval(Integral, 1, None, closed="left"), None],
    "n_negatives": [Interval(Integral, 1, None, closed="left")],
    "l2": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
    "min_rating": [Interval(Real, None, None, closed="neither"), None],
    "early_stopping": ["boolean"],
    "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
    "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
    "tol": [Interval(Real, 0, None, closed="left")],
    "warm_start": ["boolean"],
    "checkpoint": [str, Path, None],
    "checkpoint_every": [Interval(Integral, 1, None, closed="left")],
    "device": [str],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
}


# Parameters that decide nothing in a round: a fit may go on from a checkpoint with other ones.
# `warm_start` is seen in what a fit goes on from.
NOT_OF_A_ROUND = {"checkpoint", "checkpoint_every", "device", "n_rounds", "verbose", "warm_start"}

State = TypeVar("State")
Method = TypeVar("Method", bound=Callable[..., Any])


def _client_ids_by_name(method: Method) -> Method:
    """Take ``client_ids`` by name also where a pipeline fills the place of ``y`` with None.

    With metadata routing, Pipeline and GridSearchCV.score call ``method(X, None, client_ids=...)``.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        if len(args) > 1 and args[1] is None and "client_ids" in named:
            args = (args[0], named.pop("client_ids"), *args[2:])
        return method(self, *args, **named)

    return cast(Method, call)


class BaseRecommender(CallbackSupportMixin, BaseEstimator, metaclass=ABCMeta):
    """Base of all recommenders; see the subclasses."""

    # Class-level metadata requests: with routing enabled, client_ids reaches fit and score
    # through GridSearchCV and Pipeline without the caller asking for it.
    __metadata_request__fit: ClassVar[dict[str, bool]] = {"client_ids": True}
    __metadata_request__partial_fit: ClassVar[dict[str, bool]] = {"client_ids": True}
    __metadata_request__score: ClassVar[dict[str, bool]] = {
        "client_ids": True,
        "sample_weight": True,
    }

    @abstractmethod
    def _simulate(self, data: Interactions, watch: RoundWatch, *, go_on: bool) -> Attributes:
        """Run the federation on coded data and return the fitted attributes.

        Parameters
        ----------
        data : Interactions
        watch : RoundWatch
            Its methods are to be called before and after every round.
        go_on : bool
            Start from the fitted attributes instead of afresh.

        Returns
        -------
        dict
            Attributes by name, ``history_`` among them.
        """

    @abstractmethod
    def _score_items(self, users: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """Scores (n, n_items) of all items for user codes (n,); code -1 stands for the crowd."""

    def _score_pairs(
        self, users: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Scores (n,) of known items for user codes, pair by pair."""
        distinct, place = np.unique(users, return_inverse=True)
        out = np.empty(len(users))
        for start, stop in _batches(len(distinct), len(self.item_ids_)):
            inside = (place >= start) & (place < stop)
            scores = self._score_items(distinct[start:stop])
            out[inside] = scores[place[inside] - start, items[inside]]
        return out

    def _similarity(self, items: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """Similarity (n, n_items) of all items to item codes (n,): cosine of their vectors."""
        vectors = self.item_factors_
        norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        unit = vectors / norms
        similarity: NDArray[np.floating[Any]] = unit[items] @ unit.T
        return similarity

    def _probability(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Turn scores into probabilities of interaction, keeping their order."""
        return scores

    def _settings(self) -> Attributes:
        """Parameters that decide the result of a round, by which a checkpoint is told."""
        parameters: Attributes = self.get_params(deep=False)
        names = parameters.keys() - NOT_OF_A_ROUND
        if parameters.get("privacy") is not None and parameters["noise_multiplier"] == "auto":
            names |= {"n_rounds"}  # which the noise follows from
        return {name: parameters[name] for name in names}

    # ------------------------------------------------------------------ fitting

    @_client_ids_by_name
    @with_callbacks
    def fit(self, interactions: Any, client_ids: ArrayLike | None = None) -> Self:
        """Train on interactions held by clients.

        Parameters
        ----------
        interactions : array-like of shape (n, 2..4) or DataFrame
            One row per observed interaction: ``user, item[, rating[, timestamp]]`` by position,
            or columns ``user_id, item_id[, rating][, timestamp][, client_id]`` by name.
        client_ids : array-like of shape (n,), default=None
            Which client holds each row. None: the ``client_id`` column, else every user is a
            client of its own.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If the data are empty, hold NaN or infinity, or put a user under two clients.
        FloatingPointError
            If training diverges. A `NoUsableUploadError`, where a round has no usable upload,
            leaves the estimator fitted as it was after the round before.
        """
        self._validate_params()
        columns = self._read(interactions)
        data = encode(columns, client_ids, min_rating=getattr(self, "min_rating", None))
        go_on = bool(getattr(self, "warm_start", False)) and self.__sklearn_is_fitted__()
        return self._run(data, columns, go_on=go_on, X=interactions, y=client_ids)

    @_client_ids_by_name
    @with_callbacks
    def partial_fit(self, interactions: Any, client_ids: ArrayLike | None = None) -> Self:
        """Go on from the fitted state with new rows, users and items.

        Clients keep the rows they had: training goes on over old and new rows together, for
        ``n_rounds`` more rounds. The first call is the same as `fit`.

        Parameters
        ----------
        interactions, client_ids
            As in `fit`, the new rows only.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As in `fit`; also if a known user turns up under another client.
        """
        self._validate_params()
        columns = self._read(interactions)
        data = encode(columns, client_ids, min_rating=getattr(self, "min_rating", None))
        go_on = self.__sklearn_is_fitted__()
        if go_on:
            data = merge(self._interactions, data)
        return self._run(data, columns, go_on=go_on, X=interactions, y=client_ids)

    def _read(self, interactions: Any) -> Columns:
        return read_columns(interactions, estimator=type(self).__name__)

    def _run(self, data: Interactions, columns: Columns, *, go_on: bool, X: Any, y: Any) -> Self:
        """Simulate with callbacks around it, then assign all fitted attributes at once."""
        n_rounds = int(getattr(self, "n_rounds", 1))
        checkpoints = self._checkpoints(data, go_on=go_on)
        context = self._init_callback_context(max_subtasks=n_rounds)
        with alone():
            context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        base: Attributes = {
            "user_ids_": data.users.ids,
            "item_ids_": data.items.ids,
            "client_ids_": data.clients.ids,
            "n_features_in_": columns.n_columns,
            **_seen(data),
        }
        if columns.feature_names is not None:
            base["feature_names_in_"] = np.array(columns.feature_names, dtype=object)
        old_history = list(self.history_) if go_on else []
        watch = RoundWatch(self, context, base, n_rounds, old_history, checkpoints, X=X, y=y)

        def assign(fitted: Attributes) -> Attributes:
            history = old_history + fitted["history_"]
            attributes = base | watch.besides(len(fitted["history_"])) | fitted
            attributes |= {"history_": history, "n_rounds_": len(history)}
            if columns.feature_names is None and hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
            for name, value in attributes.items():
                setattr(self, name, value)
            self._interactions = data
            return attributes

        try:
            with together(lambda: self._marks(data, go_on=go_on)):
                fitted = self._simulate(data, watch, go_on=go_on)
        except NoUsableUploadError as error:
            if watch.kept is not None:
                assign(watch.kept)
                error.add_note(f"The estimator keeps its state after round {self.n_rounds_}.")
            raise
        attributes = assign(fitted)
        with alone():
            context.call_on_fit_task_end(
                estimator=self, X=X, y=y, reconstruction_attributes=lambda: attributes
            )
        return self

    def _checkpoints(self, data: Interactions, *, go_on: bool) -> Checkpoints | None:
        """Open the folder of checkpoints, if there shall be one."""
        folder = getattr(self, "checkpoint", None)
        if folder is None:
            return None
        if not isinstance(self.random_state, int | np.integer):
            raise ValueError(
                f"checkpoint needs an int as random_state, got {self.random_state!r}: without one "
                "a fit cannot go on to the same result."
            )
        settings = {"estimator": type(self).__name__, **self._settings()}
        parts = self._parts(data, go_on=go_on)
        return Checkpoints(folder, settings, parts, every=self.checkpoint_every)

    def _marks(self, data: Interactions, *, go_on: bool) -> dict[str, str]:
        """Hash what all processes that share a fit must be given alike."""
        parameters = self.get_params(deep=False)
        kept = parameters.keys() - DIFFER_BY_PROCESS
        described = {name: describe(parameters[name]) for name in kept}
        if isinstance(parameters.get("random_state"), np.random.RandomState):
            described["random_state"] = "RandomState"  # the first process draws the seed for all
        marks = {part: fingerprint(value) for part, value in self._parts(data, go_on=go_on).items()}
        return {**marks, "parameters": fingerprint([type(self).__name__, described])}

    def _parts(self, data: Interactions, *, go_on: bool) -> dict[str, object]:
        """Give what a fit is made of besides parameters, by a name in the plural."""
        parts: dict[str, object] = {
            "users": data.users.ids,
            "items": data.items.ids,
            "clients": [data.clients.ids, data.user_client],
            "interactions": [data.user, data.item, data.rating, data.timestamp],
        }
        if go_on:
            parts["fitted attributes to go on from"] = {
                name: value
                for name, value in vars(self).items()
                if name.endswith("_") and not name.startswith("_") and name != "history_"
            }
        return parts

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "item_ids_")

    # --------------------------------------------------------------- predicting

    def predict(self, interactions: Any) -> NDArray[np.float64]:
        """Probability of interaction for each (user, item) row.

        Parameters
        ----------
        interactions : array-like of shape (n, 2..) or DataFrame
            User and item; further columns are not looked at.

        Returns
        -------
        ndarray of shape (n,), float64
            Unknown users get the crowd's scores, unknown items the lowest known score of their
            user.

        Warns
        -----
        UnknownIdWarning
            Once, with the number of rows whose user or item is unknown.
        """
        check_is_fitted(self)
        columns = self._read_known(interactions)
        users, known_user = Vocabulary(self.user_ids_).encode(columns.user)
        items, known_item = Vocabulary(self.item_ids_).encode(columns.item)
        _warn_unknown(len(users), int((~known_user).sum()), int((~known_item).sum()))
        scores = np.empty(len(users))
        scores[known_item] = self._score_pairs(users[known_item], items[known_item])
        if not known_item.all():
            lost, place = np.unique(users[~known_item], return_inverse=True)
            lowest = np.empty(len(lost))
            for start, stop in _batches(len(lost), len(self.item_ids_)):
                lowest[start:stop] = self._score_items(lost[start:stop]).min(axis=1)
            scores[~known_item] = lowest[place]
        return self._probability(scores)

    def recommend(
        self,
        users: ArrayLike | None = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: ArrayLike | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Rank items for users.

        Parameters
        ----------
        users : array-like of shape (n,), default=None
            User ids; None: all users of `fit`, in the order of ``user_ids_``. Unknown users get
            the crowd's ranking.
        k : int, default=10
            Length of the lists, capped at the number of candidates.
        exclude_seen : bool, default=True
            Leave out what a user had in `fit`.
        candidates : array-like, default=None
            Item ids to choose from; None: all. Unknown ones are dropped with a warning.

        Returns
        -------
        ids : ndarray of shape (n, k)
            Best first; ties go to the smaller id.
        scores : ndarray of shape (n, k), float64
            -inf where a user has fewer than k unseen candidates; such places are filled with
            seen ones.

        Warns
        -----
        UnknownIdWarning
        """
        check_is_fitted(self)
        k = check_k(k)
        codes = np.arange(len(self.user_ids_))
        if users is not None:
            codes, known = Vocabulary(self.user_ids_).encode(one_or_many(users, source="users"))
            _warn_unknown(len(codes), int((~known).sum()), 0)
        columns = self._candidate_codes(candidates)
        width = min(k, len(columns))
        ids = np.empty((len(codes), width), dtype=self.item_ids_.dtype)
        scores = np.empty((len(codes), width))
        for start, stop in _batches(len(codes), len(self.item_ids_)):
            batch = codes[start:stop]
            table = self._score_items(batch)
            if exclude_seen:
                rows, seen = self._seen_places(batch)
                table[rows, seen] = -np.inf
            if candidates is not None:
                table = table[:, columns]
            top = top_k(table, width)
            ids[start:stop] = self.item_ids_[columns[top]]
            scores[start:stop] = np.take_along_axis(table, top, axis=1)
        return ids, scores

    def similar_items(
        self, items: ArrayLike, k: int = 10
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Find the items most similar to some items.

        Parameters
        ----------
        items : array-like of shape (n,)
            Known item ids.
        k : int, default=10
            Capped at the number of other items.

        Returns
        -------
        ids : ndarray of shape (n, k)
            Without the item itself, best first.
        scores : ndarray of shape (n, k), float64
            Cosine similarity of the item vectors.

        Raises
        ------
        ValueError
            If an item is unknown; names it.
        """
        check_is_fitted(self)
        k = check_k(k)
        wanted = one_or_many(items, source="items")
        codes, known = Vocabulary(self.item_ids_).encode(wanted)
        if not known.all():
            raise ValueError(
                f"{int((~known).sum())} of {len(wanted)} items are unknown to fit, the first is "
                f"{wanted[~known].tolist()[0]!r}. Ask for ids in item_ids_."
            )
        width = min(k, max(len(self.item_ids_) - 1, 0))
        ids = np.empty((len(codes), width), dtype=self.item_ids_.dtype)
        scores = np.empty((len(codes), width))
        for start, stop in _batches(len(codes), len(self.item_ids_)):
            batch = codes[start:stop]
            table = self._similarity(batch)
            table[np.arange(len(batch)), batch] = -np.inf
            top = top_k(table, k)[:, :width]  # the item itself is last, and alone it has no place
            ids[start:stop] = self.item_ids_[top]
            scores[start:stop] = np.take_along_axis(table, top, axis=1)
        return ids, scores

    @_client_ids_by_name
    def score(
        self,
        interactions: Any,
        client_ids: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> float:
        """Mean NDCG@20 over the users with held-out rows.

        All items are ranked but those the user had in `fit`; those do not count as held out
        either. A held-out item unknown to `fit` is a miss.

        Parameters
        ----------
        interactions : array-like of shape (n, 2..) or DataFrame
            Held-out rows.
        client_ids : ignored
            In the place of scikit-learn's ``y``.
        sample_weight : array-like of shape (n,), default=None
            A user weighs the mean of its rows' weights.

        Returns
        -------
        float
            nan, with a warning, if every row was in `fit`: there is nothing to find then.
        """
        check_is_fitted(self)
        self._read_known(interactions)
        try:
            return score_ranking(
                self, interactions, metric="ndcg", k=SCORE_K, sample_weight=sample_weight
            )
        except NothingHeldOutError as error:
            # Training scores of learning_curve and GridSearchCV ask for this; it must not end
            # the search.
            # Level 3: the caller, behind the decorator.
            warnings.warn(f"The score is nan. {error}", NothingHeldOutWarning, stacklevel=3)
            return float("nan")

    def _read_known(self, interactions: Any) -> Columns:
        """Read rows for a fitted estimator: user and item suffice."""
        shape = getattr(interactions, "shape", None)
        if shape is not None and len(shape) == 2 and shape[1] == 1:
            raise ValueError(
                f"X has 1 features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input. The first two, user and item, suffice."
            )
        return read_columns(interactions, first_two_suffice=True, estimator=type(self).__name__)

    def _candidate_codes(self, candidates: ArrayLike | None) -> NDArray[np.int64]:
        if candidates is None:
            return np.arange(len(self.item_ids_))
        wanted = one_or_many(candidates, source="candidates")
        codes, known = Vocabulary(self.item_ids_).encode(wanted)
        _warn_unknown(len(codes), 0, int((~known).sum()))
        if not known.any():
            raise ValueError(
                f"None of the {len(codes)} candidates is known to fit. Pass ids in item_ids_."
            )
        return np.unique(codes[known])

    def _seen_places(self, users: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (row in the batch, item code) of everything the users had in fit."""
        known = np.flatnonzero(users >= 0)
        places = concatenate_ranges(self.seen_indptr_, users[known])
        lengths = np.diff(self.seen_indptr_)[users[known]]
        return np.repeat(known, lengths), self.seen_indices_[places]


class RoundWatch:
    """Tells callbacks, the terminal and the folder of checkpoints about every round.

    Parameters
    ----------
    estimator : BaseRecommender
    context : sklearn.callback.CallbackContext
        Of the fit.
    base : dict
        Fitted attributes that do not depend on the round.
    n_rounds : int
    old_history : list of dict
        Rounds of earlier fits that this one goes on from.
    checkpoints : Checkpoints or None
    X, y
        What the caller passed, for callbacks.
    """

    def __init__(
        self,
        estimator: BaseRecommender,
        context: Any,
        base: Attributes,
        n_rounds: int,
        old_history: list[Record],
        checkpoints: Checkpoints | None,
        *,
        X: Any,
        y: Any,
    ) -> None:
        self._estimator = estimator
        self._context = context
        self._base = base
        self._n_rounds = n_rounds
        self._old_history = old_history
        self._checkpoints = checkpoints
        self._X = X
        self._y = y
        self._round: Any = None
        self._history: list[Record] = []
        # Fitted attributes after the last good round, of a fit that an error ends.
        self.kept: Attributes | None = None
        # Fitted attributes that follow from the number of rounds of this fit, and not its state.
        self.besides: Callable[[int], Attributes] = lambda n_rounds: {}

    def identify(self, part: str, value: object) -> None:
        """Count what the estimator has read besides interactions among the data of the fit."""
        if self._checkpoints is not None:
            self._checkpoints.identify(part, value)

    def load(self, start: State) -> Progress[State] | None:
        """Read where an interrupted fit stands, if there is a checkpoint; rounds count on."""
        if self._checkpoints is None:
            return None
        progress = self._checkpoints.load(start, self._n_rounds)
        done = 0 if progress is None else len(progress.history)
        if done != of_main(done):
            raise ValueError(
                f"The checkpoint in {self._checkpoints.folder} has {done} rounds here and another "
                "number in process 0. Name a folder that all processes of the fit can read."
            )
        self._history = [] if progress is None else list(progress.history)
        for _ in self._history:
            # Callbacks hear nothing of these rounds, but the numbers of tasks are theirs.
            self._context.subcontext(task_name="round")
        return progress

    @property
    def save(self) -> Callable[[Progress[Any]], None] | None:
        """What writes a checkpoint, if there shall be one; of several processes the first does."""
        if self._checkpoints is None or ranks().rank:
            return None
        return self._checkpoints.save

    @property
    def save_every(self) -> int:
        """Rounds between two checkpoints."""
        return 1 if self._checkpoints is None else self._checkpoints.every

    def begin(self) -> None:
        """Open a round's task."""
        self._round = self._context.subcontext(task_name="round")
        with alone():
            self._round.call_on_fit_task_begin(estimator=self._estimator, X=self._X, y=self._y)

    def end(self, record: Record, attributes: Callable[[], Attributes]) -> bool:
        """Close the round's task; True if a callback asks to stop."""
        self._history.append(record)
        self._print(record)
        # A callback may ask for more in one of several processes than in another.
        with alone():
            stop = self._round.call_on_fit_task_end(
                estimator=self._estimator,
                X=self._X,
                y=self._y,  # and no metadata, which callbacks hand on to scorers as arguments
                # Built only where a callback asks for a fitted estimator.
                reconstruction_attributes=lambda: self._fitted(attributes()),
            )
        return bool(stop)

    def _fitted(self, attributes: Attributes) -> Attributes:
        history = self._old_history + self._history
        besides = self.besides(len(self._history))
        now = {"history_": history, "n_rounds_": len(history)}
        return self._base | besides | attributes | now

    def _print(self, record: Record) -> None:
        verbose = int(getattr(self._estimator, "verbose", 0))
        done = len(self._history)
        every = 1 if verbose > 1 else -(-self._n_rounds // 10)
        if not verbose or not is_main() or (done % every and done not in (1, self._n_rounds)):
            return
        parts = [f"[{type(self._estimator).__name__}] round {done}/{self._n_rounds}"]
        if record["loss"] is not None:
            parts.append(f"loss {record['loss']:.4f}")
        if record.get("validation_ndcg") is not None:
            parts.append(f"validation NDCG@{SCORE_K} {record['validation_ndcg']:.4f}")
        of_asked = f" of {record['asked']}" if "asked" in record else ""
        parts.append(f"{record['clients']}{of_asked} clients")
        parts.append(f"{record['seconds']:.2f} s")
        print("  ".join(parts), flush=True)


def check_somebody_delivered(history: list[Record], *, goes_on: bool) -> None:
    """Refuse a model that nobody has trained; where a fit goes on, say that it is as before."""
    if any(record["loss"] is not None for record in history):
        return
    asked, dropped, late, unavailable = (
        sum(record.get(name, 0) for record in history)
        for name in ("asked", "dropped", "late", "unavailable")
    )
    message = (
        f"Nobody delivered in any of {len(history)} rounds: {asked} times a client was asked, "
        f"{dropped} times it dropped out and {late} times it was late; {unavailable} times a "
        "client was not available. Raise availability, deadline or n_rounds, or lower dropout_rate."
    )
    if not goes_on:
        raise ValueError(message)
    warnings.warn(f"The model stays as it was. {message}", UserWarning, stacklevel=2)


def _seen(data: Interactions) -> Attributes:
    """CSR of the item codes that each user code had in fit."""
    matrix = data.matrix()
    return {
        "seen_indptr_": matrix.indptr.astype(np.int64),
        "seen_indices_": matrix.indices.astype(np.int64),
    }


def _batches(n_users: int, n_items: int) -> list[tuple[int, int]]:
    """Cut users so that a batch of full score rows stays within bounds."""
    size = max(1, SCORES_PER_BATCH // max(n_items, 1))
    return [(start, min(start + size, n_users)) for start in range(0, n_users, size)]


def _warn_unknown(n: int, n_users: int, n_items: int) -> None:
    if n_users == 0 and n_items == 0:
        return
    parts = []
    if n_users:
        parts.append(f"{n_users} of {n} users are unknown to fit and get the crowd's scores")
    if n_items:
        parts.append(
            f"{n_items} of {n} items are unknown to fit and get the lowest score or are dropped"
        )
    # Level 3: the caller of predict or recommend.
    warnings.warn("; ".join(parts) + ".", UnknownIdWarning, stacklevel=3)
