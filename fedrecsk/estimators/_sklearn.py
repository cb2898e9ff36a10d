"""The only place that imports scikit-learn's private names, so that a release breaks one file."""

from __future__ import annotations

from typing import Any

from sklearn.utils._param_validation import Interval, StrOptions

__all__ = ["EXPECTED_FAILED_CHECKS", "Interval", "StrOptions"]

# For sklearn.utils.estimator_checks.check_estimator(..., expected_failed_checks=...).
EXPECTED_FAILED_CHECKS: dict[str, str] = {
    "check_fit_score_takes_y": "the second argument of fit and score is called client_ids, not y",
    "check_n_features_in_after_fitting": "calls score(X, y=y); here y is called client_ids",
    # The two below pass random labels as client ids, to users who come up more than once. A user
    # under two clients is an error by our contract, which no tag can tell these checks.
    "check_estimators_dtypes": "cast to integers, its users 0, 1 and 2 are under two clients each",
    "check_positive_only_tag_during_fit": "in iris a user (sepal length) is under several clients",
}

Constraints = dict[str, list[Any] | str]
