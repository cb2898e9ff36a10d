"""How well a fitted recommender finds held-out interactions.

Everything here goes through :func:`rank_users`, which asks the estimator once for the top lists
of the users of ``X`` and compares them with what these users did. The truth of a user is its
distinct items in ``X`` without those it had in ``fit``. An item that ``fit`` never met cannot be
ranked and is a miss. Users whose truth is empty are left out.

A recommender offers, once fitted: ``user_ids_``, ``item_ids_`` (sorted), ``seen_indptr_`` and
``seen_indices_`` (CSR of the item codes of each user code in ``fit``), and
``recommend(users, k)``, which gives the ids (n, k) of unseen items, best first, and their scores
(n, k), -inf marking places that it could not fill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import Bunch
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_is_fitted

from fedrecsk.data.interactions import read_columns
from fedrecsk.data.vocabulary import Vocabulary, distinct
from fedrecsk.exceptions import NothingHeldOutError
from fedrecsk.metrics.balance import client_balance
from fedrecsk.metrics.ranking import (
    USER_METRICS,
    BoolArray,
    FloatArray,
    IntArray,
    check_k,
    check_weights,
    hits_of,
    stored_in,
    weighted_mean,
)

# Scores that an estimator holds at a time while it ranks a batch: 128 MB in double precision.
_SCORES_PER_BATCH = 1 << 24


def ranking_scorer(metric: str = "recall", *, k: int = 10) -> RankingScorer:
    """Make a scorer of held-out ranking quality for ``scoring=``.

    Works in :func:`~sklearn.model_selection.cross_val_score`,
    :class:`~sklearn.model_selection.GridSearchCV` and the like, alone or in a dict of several,
    and with a :class:`~sklearn.pipeline.Pipeline` that ends in a recommender. To have many
    metrics of one fitted estimator use :func:`evaluate`, which ranks only once.

    Parameters
    ----------
    metric : {"ndcg", "recall", "precision", "hit_rate", "mrr", "map", "coverage"}, \
default="recall"
        The metric; each is described at its function, such as :func:`recall_at_k`.
    k : int, default=10
        Length of the list that is judged.

    Returns
    -------
    scorer : callable
        ``scorer(estimator, X, client_ids, sample_weight=None)`` gives a float, higher is
        better. With metadata routing it asks for ``client_ids``; for ``sample_weight`` only
        after ``set_score_request(sample_weight=True)``.

    Raises
    ------
    ValueError
        If the metric is unknown or ``k`` is not a positive integer.

    Examples
    --------
    >>> from fedrecsk.metrics import ranking_scorer
    >>> ranking_scorer("ndcg", k=20)
    RankingScorer(k=20, metric='ndcg')
    """
    _check_metrics([metric])
    return RankingScorer(metric, check_k(k))


class RankingScorer(BaseEstimator):
    """What :func:`ranking_scorer` returns.

    A ``BaseEstimator`` for the sake of ``clone``, ``repr`` and metadata requests; there is
    nothing to fit.

    Parameters
    ----------
    metric : str
        Name of the metric.
    k : int
        Length of the list that is judged.
    """

    # Requests are read off the method called score, hence the alias below. client_ids must be
    # asked for or refused, since a mean over users does not need it; asking is the quiet choice.
    __metadata_request__score: ClassVar[dict[str, bool | str]] = {
        "estimator": UNUSED,
        "client_ids": True,
    }

    def __init__(self, metric: str, k: int) -> None:
        self.metric = metric
        self.k = k

    def __call__(
        self,
        estimator: Any,
        X: Any,
        y: npt.ArrayLike | None = None,
        *,
        client_ids: npt.ArrayLike | None = None,
        sample_weight: npt.ArrayLike | None = None,
    ) -> float:
        """Score a fitted recommender on held-out interactions.

        Parameters
        ----------
        estimator : recommender, or Pipeline or search that ends in one
            Fitted.
        X : interactions
            Held-out rows.
        y, client_ids : ignored
            Client ids come in the place of y or, with metadata routing, by name; a mean over
            users does not depend on them.
        sample_weight : array-like of shape (n_rows,), default=None
            A user weighs the mean of its rows' weights.

        Returns
        -------
        score : float
            Mean over the users with held-out items.
        """
        return score_ranking(
            estimator, X, metric=self.metric, k=self.k, sample_weight=sample_weight
        )

    score = __call__


def evaluate(
    estimator: Any,
    X: Any,
    client_ids: npt.ArrayLike | None = None,
    *,
    metrics: str | Iterable[str] = ("ndcg", "recall"),
    k: int | Iterable[int] = (10, 20),
    groups: Mapping[Any, Any] | npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    batch_size: int | None = None,
) -> Bunch:
    """Judge a fitted recommender on held-out interactions: overall, per client, per group.

    All items are ranked for every user, without those the user had in ``fit``, and ranked once
    for all metrics. The truth of a user is its distinct items in ``X`` that it did not have in
    ``fit``; an item unknown to ``fit`` is a miss. Where the estimator has a ``min_rating``, rows
    of ``X`` with a lower rating are not part of the truth. Users without truth are left out.

    Parameters
    ----------
    estimator : recommender, or Pipeline or search that ends in one
        Fitted. In a pipeline ids are those after its transforming steps.
    X : interactions
        Held-out rows: user, item and so on, as for ``fit``.
    client_ids : array-like of shape (n_rows,), default=None
        Client of each row. None: the ``client_id`` column of ``X``, else every user is a client.
    metrics : str or iterable of str, default=("ndcg", "recall")
        Of ``"ndcg", "recall", "precision", "hit_rate", "mrr", "map", "coverage"``. Coverage
        belongs to all lists together and has an overall value only.
    k : int or iterable of int, default=(10, 20)
        Lengths of the lists that are judged.
    groups : mapping or array-like of shape (n_rows,), default=None
        Group of each user id, or of each row, for values per group, such as light and heavy
        users. All rows of a user must be in one group.
    sample_weight : array-like of shape (n_rows,), default=None
        A user weighs the mean of its rows' weights in all means over users.
    batch_size : int, default=None
        Users ranked at a time, which bounds memory. None: as many as make about 17 million
        scores.

    Returns
    -------
    result : Bunch
        - ``overall``: dict, such as ``{"ndcg@10": 0.31, ...}``: mean over users.
        - ``n_users``: users with held-out items.
        - ``user_ids``: ndarray of shape (n_users,), sorted.
        - ``per_user``: dict of metric to ndarray of shape (n_users,).
        - ``client_ids``: ndarray of shape (n_clients,), sorted: clients with such users.
        - ``per_client``: dict of metric to ndarray of shape (n_clients,): mean over the
          client's users.
        - ``balance``: dict of metric to what :func:`client_balance` says of ``per_client``.
        - ``per_group``: dict of group to dict of metric, and ``n_users``, to value. Empty
          without ``groups``.

    Raises
    ------
    ValueError
        If no user has anything to find, a metric is unknown, an argument has the wrong length,
        or the rows of a user are under two clients or groups.
    TypeError
        If the estimator is no recommender.

    Examples
    --------
    Anything with the few attributes below can be judged; here every user gets the items in
    order.

    >>> import numpy as np
    >>> from sklearn.base import BaseEstimator
    >>> from fedrecsk.metrics import evaluate
    >>> class InOrder(BaseEstimator):
    ...     def fit(self, X, client_ids=None):
    ...         self.user_ids_, self.item_ids_ = np.unique(X[:, 0]), np.arange(4)
    ...         self.seen_indptr_, self.seen_indices_ = np.array([0, 0, 0]), np.array([], int)
    ...         return self
    ...     def recommend(self, users, k):
    ...         n = len(users)
    ...         return np.tile(np.arange(k), (n, 1)), np.tile(-np.arange(k, dtype=float), (n, 1))
    >>> held_out = np.array([[1, 0], [2, 0], [2, 3]])
    >>> result = evaluate(InOrder().fit(held_out), held_out, metrics="recall", k=2)
    >>> result.overall
    {'recall@2': 0.75}
    >>> result.per_user["recall@2"]
    array([1. , 0.5])
    """
    names = _check_metrics([metrics] if isinstance(metrics, str) else list(metrics))
    lengths = [check_k(each) for each in (k if isinstance(k, Iterable) else (k,))]
    if not lengths:
        raise ValueError("k is empty; pass the length of at least one list.")
    ranked = rank_users(
        estimator, X, max(lengths), sample_weight=sample_weight, batch_size=batch_size
    )
    per_user = {
        f"{name}@{length}": USER_METRICS[name](ranked.hits, ranked.n_true, length)
        for name in names
        if name in USER_METRICS
        for length in lengths
    }
    overall = {
        f"{name}@{length}": ranked.overall(name, length) for name in names for length in lengths
    }
    if client_ids is None:
        client_ids = ranked.client_of_row
    if client_ids is None:
        clients, client_of_user = ranked.user_ids, np.arange(len(ranked.user_ids))
    else:
        clients, client_of_user = _label_users(client_ids, ranked, "client_ids", "client")
    per_client = {
        key: _mean_by_label(values, client_of_user, len(clients), ranked.weights)
        for key, values in per_user.items()
    }
    return Bunch(
        overall=overall,
        n_users=len(ranked.user_ids),
        user_ids=ranked.user_ids,
        per_user=per_user,
        client_ids=clients,
        per_client=per_client,
        balance={key: client_balance(values) for key, values in per_client.items()},
        per_group={} if groups is None else _per_group(groups, ranked, per_user),
    )


def score_ranking(
    estimator: Any,
    X: Any,
    *,
    metric: str = "ndcg",
    k: int = 20,
    sample_weight: npt.ArrayLike | None = None,
    batch_size: int | None = None,
) -> float:
    """Mean of one metric over the users with held-out items; ``evaluate`` for its arguments."""
    ranked = rank_users(
        estimator,
        X,
        k,
        sample_weight=sample_weight,
        batch_size=batch_size,
        first_two_suffice=True,
    )
    return ranked.overall(metric, k)


@dataclass(frozen=True, eq=False)
class RankedUsers:
    """Top lists against the truth, for the users of ``X`` that have held-out items.

    Attributes
    ----------
    user_ids : ndarray of shape (U,)
        Sorted.
    hits : ndarray of shape (U, L), bool
        Whether each entry of the user's list is one of its held-out items. L falls short of
        the length asked for where there are fewer items.
    n_true : ndarray of shape (U,), int64
        Number of held-out items, at least 1.
    weights : ndarray of shape (U,) or None
        Weight of each user.
    first_place : ndarray of shape (n_items,), int64
        Best place (from 0) of each item in any list, L where it is in none.
    user_of_row : ndarray of shape (n_rows,), int64
        Position in ``user_ids`` of the user of each row of ``X``, -1 for users left out.
    client_of_row : ndarray of shape (n_rows,) or None
        The client column of ``X``, if it has one.
    """

    user_ids: npt.NDArray[Any]
    hits: BoolArray
    n_true: IntArray
    weights: FloatArray | None
    first_place: IntArray
    user_of_row: IntArray
    client_of_row: npt.NDArray[Any] | None

    def overall(self, metric: str, k: int) -> float:
        """Value of a metric over all users."""
        if metric == "coverage":
            # Places beyond L exist in no list, so k must not reach the marker L.
            return float(np.mean(self.first_place < min(k, self.hits.shape[1])))
        return weighted_mean(USER_METRICS[metric](self.hits, self.n_true, k), self.weights)


def rank_users(
    estimator: Any,
    X: Any,
    k: int,
    *,
    sample_weight: npt.ArrayLike | None = None,
    batch_size: int | None = None,
    first_two_suffice: bool = False,
) -> RankedUsers:
    """Rank all unseen items for the users of ``X`` and find their held-out items.

    Parameters
    ----------
    estimator, X, sample_weight, batch_size
        As in :func:`evaluate`.
    k : int
        Length of the lists.

    Returns
    -------
    ranked : RankedUsers
        The lists as hits, with what the metrics need.

    Raises
    ------
    ValueError, TypeError
        As :func:`evaluate`.
    """
    estimator, transformers = recommender_of(estimator)
    for transformer in transformers:
        X = transformer.transform(X)
    min_rating = getattr(estimator, "min_rating", None)
    columns = read_columns(X, first_two_suffice=first_two_suffice and min_rating is None)
    n_rows = len(columns.user)
    row_weight = None
    if sample_weight is not None:
        row_weight = check_weights(sample_weight, n_rows, "rows of X")
    users, user_of_row = Vocabulary.from_values(columns.user)
    counts = np.ones(n_rows, dtype=np.bool_)
    if min_rating is not None and columns.rating is not None:
        counts = columns.rating >= min_rating
    truth, n_true = _held_out(estimator, users, user_of_row[counts], columns.item[counts])
    judged = np.flatnonzero(n_true)
    if judged.size == 0:
        raise NothingHeldOutError(_nothing_to_find(n_rows, len(users), int(n_rows - counts.sum())))

    weights = None
    if row_weight is not None:
        n_rows_of = np.bincount(user_of_row, minlength=len(users))
        weights = (np.bincount(user_of_row, row_weight, len(users)) / n_rows_of)[judged]
        if not weights.any():
            raise ValueError("sample_weight is 0 for every user that has held-out items.")
    position = np.full(len(users), -1, dtype=np.int64)
    position[judged] = np.arange(judged.size)
    user_ids = users.ids[judged]
    hits, first_place = _rank(estimator, user_ids, truth[judged], k, batch_size)
    return RankedUsers(
        user_ids, hits, n_true[judged], weights, first_place, position[user_of_row], columns.client
    )


def recommender_of(estimator: Any) -> tuple[Any, list[Any]]:
    """Follow pipelines and searches down to the recommender.

    Returns it and the fitted transformers that X passes on the way there.
    """
    transformers: list[Any] = []
    while True:
        if isinstance(estimator, Pipeline):
            steps = [step for _, step in estimator.steps]
            transformers += [s for s in steps[:-1] if s is not None and s != "passthrough"]
            estimator = steps[-1]
        elif hasattr(estimator, "best_estimator_"):
            estimator = estimator.best_estimator_
        else:
            break
    if not hasattr(estimator, "recommend"):
        raise TypeError(
            f"{type(estimator).__name__} has no recommend method; pass a recommender, or a "
            "pipeline or search that ends in one. A search has its recommender once it is fitted "
            "with refit."
        )
    check_is_fitted(estimator)
    return estimator, transformers


def _held_out(
    estimator: Any, users: Vocabulary, user_of_row: IntArray, item_of_row: npt.NDArray[Any]
) -> tuple[csr_array, IntArray]:
    """Collect what each user has in X and had not in fit.

    Returns the truth that can be ranked, (n_users, n_items of fit), and the size of the whole
    truth, (n_users,), which also counts items unknown to fit.
    """
    items, item_of_row = Vocabulary.from_values(item_of_row)
    pairs = distinct(user_of_row * len(items) + item_of_row)
    user, item = np.divmod(pairs, max(len(items), 1))
    item = Vocabulary(estimator.item_ids_).encode(items.ids)[0][item]  # -1 unknown
    fit_user, known_user = Vocabulary(estimator.user_ids_).encode(users.ids)
    n_items = len(estimator.item_ids_)
    seen = known_user[user] & stored_in(
        estimator.seen_indptr_, estimator.seen_indices_, n_items, fit_user[user], item
    )
    user, item = user[~seen], item[~seen]
    n_true = np.bincount(user, minlength=len(users))
    user, item = user[item >= 0], item[item >= 0]
    ones = np.ones(len(user), dtype=np.bool_)
    return csr_array((ones, (user, item)), shape=(len(users), n_items)), n_true


def _rank(
    estimator: Any, user_ids: npt.NDArray[Any], truth: csr_array, k: int, batch_size: int | None
) -> tuple[BoolArray, IntArray]:
    """Ask for the lists batch by batch; hits (U, L) and each item's best place (n_items,)."""
    n_items = len(estimator.item_ids_)
    k = min(k, n_items)
    if batch_size is None:
        batch_size = max(1, _SCORES_PER_BATCH // n_items)
    elif batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
    items = Vocabulary(estimator.item_ids_)
    hits = np.zeros((len(user_ids), k), dtype=np.bool_)
    first_place = np.full(n_items, k, dtype=np.int64)
    for start in range(0, len(user_ids), batch_size):
        batch = slice(start, start + batch_size)
        ids, scores = estimator.recommend(user_ids[batch], k=k)
        filled = scores > -np.inf
        top = np.full(ids.shape, -1, dtype=np.int64)
        top[filled] = items.encode(ids[filled])[0]
        hits[batch] = hits_of(top, truth[batch])
        np.minimum.at(first_place, top[filled], np.nonzero(filled)[1])
    return hits, first_place


def _nothing_to_find(n_rows: int, n_users: int, n_weak: int) -> str:
    weak = f" {n_weak} of the rows are below min_rating." if n_weak else ""
    return (
        f"No user has an item left to find: the {n_rows} rows of X ({n_users} users) hold only "
        f"(user, item) pairs that were in fit.{weak} Score on rows held out from fit."
    )


def _label_users(
    label_of_row: npt.ArrayLike, ranked: RankedUsers, name: str, kind: str
) -> tuple[npt.NDArray[Any], IntArray]:
    """Give each ranked user the label of its rows: sorted labels, and codes (U,) into them."""
    labels, code_of_row = Vocabulary.from_values(label_of_row, source=name)
    if len(code_of_row) != len(ranked.user_of_row):
        raise ValueError(
            f"{name} has {len(code_of_row)} entries, but X has {len(ranked.user_of_row)} rows; "
            f"pass the {kind} of every row."
        )
    rows = np.flatnonzero(ranked.user_of_row >= 0)
    user, code = ranked.user_of_row[rows], code_of_row[rows]
    code_of_user = np.empty(len(ranked.user_ids), dtype=np.int64)
    code_of_user[user] = code
    clash = np.flatnonzero(code_of_user[user] != code)
    if clash.size:
        bad = user[clash[0]]
        one, other = sorted((code[clash[0]], code_of_user[bad]))
        raise ValueError(
            f"User {ranked.user_ids[bad].item()!r} has rows under two {kind}s, "
            f"{labels.ids[one].item()!r} and {labels.ids[other].item()!r}; give all rows of a "
            f"user one {kind}."
        )
    used, code_of_user = np.unique(code_of_user, return_inverse=True)
    return labels.ids[used], code_of_user


def _per_group(
    groups: Mapping[Any, Any] | npt.ArrayLike, ranked: RankedUsers, per_user: dict[str, FloatArray]
) -> dict[Any, dict[str, float | int]]:
    """Mean of each metric over the users of each group, and how many they are."""
    if isinstance(groups, Mapping):
        users = ranked.user_ids.tolist()
        without = [user for user in users if user not in groups]
        if without:
            raise ValueError(
                f"groups has no entry for {len(without)} of the {len(users)} users with held-out "
                f"items, such as {without[0]!r}; give every user a group."
            )
        labels, group_of_user = Vocabulary.from_values(
            [groups[user] for user in users], source="groups"
        )
        names = labels.ids
    else:
        names, group_of_user = _label_users(groups, ranked, "groups", "group")
    means = {
        key: _mean_by_label(values, group_of_user, len(names), ranked.weights)
        for key, values in per_user.items()
    }
    n_users = np.bincount(group_of_user, minlength=len(names))
    return {
        name: {**{key: float(mean[g]) for key, mean in means.items()}, "n_users": int(n_users[g])}
        for g, name in enumerate(names.tolist())
    }


def _mean_by_label(
    values: FloatArray, label: IntArray, n_labels: int, weights: FloatArray | None
) -> FloatArray:
    """Weighted mean of values (U,) within each label, nan where the weights are all 0."""
    if weights is None:
        weights = np.ones(len(values))
    total = np.bincount(label, weights, n_labels)
    summed = np.bincount(label, weights * values, n_labels)
    means = np.full(n_labels, np.nan)
    np.divide(summed, total, out=means, where=total > 0)
    return means


def _check_metrics(names: list[str]) -> list[str]:
    known = [*USER_METRICS, "coverage"]
    if not names:
        raise ValueError(f"metrics is empty; choose from {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown metric {name!r}; choose from {', '.join(known)}.")
    return names
