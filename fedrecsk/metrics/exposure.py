"""How often an item is recommended to those who do not have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.metrics.ranking import check_k


def exposure_ratio(
    estimator: Any, item: Any, *, users: npt.ArrayLike | None = None, k: int = 10
) -> float:
    """Share of users whose list has an item, among those that did not have it in ``fit``.

    ER@k, by which attacks that promote an item are judged.

    Parameters
    ----------
    estimator : recommender, or Pipeline that ends in one
        Fitted.
    item : item id
    users : array-like of shape (n,), default=None
        User ids; None: all users of ``fit``.
    k : int, default=10
        Length of the lists.

    Returns
    -------
    exposure : float
        In [0, 1]; nan if all users had the item.

    Raises
    ------
    ValueError
        If the item or a user is unknown to ``fit``, or ``k`` is not a positive integer.

    Examples
    --------
    >>> from fedrecsk import PopularityRecommender
    >>> from fedrecsk.metrics import exposure_ratio
    >>> X = [[1, "a"], [1, "b"], [2, "a"], [3, "b"], [4, "c"]]
    >>> model = PopularityRecommender().fit(X)
    >>> exposure_ratio(model, "b", k=1)  # user 2 gets it, user 4 gets "a"
    0.5
    """
    check_is_fitted(estimator)
    k = check_k(k)
    if isinstance(estimator, Pipeline):
        estimator = estimator[-1]
    code = _codes(estimator.item_ids_, [item], "item")[0]
    ids = estimator.user_ids_ if users is None else np.asarray(users)
    codes = np.arange(len(ids)) if users is None else _codes(estimator.user_ids_, ids, "users")
    holders = np.repeat(np.arange(len(estimator.user_ids_)), np.diff(estimator.seen_indptr_))
    has_it = np.zeros(len(estimator.user_ids_), dtype=bool)
    has_it[holders[estimator.seen_indices_ == code]] = True
    asked = ids[~has_it[codes]]
    if not len(asked):
        return float("nan")
    listed, _ = estimator.recommend(asked, k=k)
    return float((listed == estimator.item_ids_[code]).any(axis=1).mean())


def _codes(known_ids: npt.NDArray[Any], ids: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    codes, known = Vocabulary(known_ids).encode(ids)
    if not known.all():
        strange = np.asarray(ids)[~known][0]
        raise ValueError(f"{name}: {strange!r} is unknown to fit.")
    return codes
