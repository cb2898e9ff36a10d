"""Fits whose arrays must not depend on the number of processes; as a program, one of several."""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from fedrecsk import (
    CentralizedRecommender,
    FedFNNRecommender,
    FELLRecRecommender,
    HeteFedRecRecommender,
)
from fedrecsk.datasets import make_interactions
from fedrecsk.engine.parallel import is_main
from tests.estimators.conftest import FAST_TEXT, tiny_encoder

X, _ = make_interactions(200, 40, random_state=0, return_X_y=True)
PLATFORMS = X[:, 0] % 5
FACTORS = {"n_factors": 4, "n_rounds": 6, "random_state": 0}
FEW, MOST = FACTORS | {"n_rounds": 3}, FACTORS | {"clients_per_round": 0.8}


def there_in_the_first(number, client_ids):
    """What process 0 says: of every three clients two are there, others in each round."""
    there = (client_ids + number) % 3 > 0
    return there if os.environ.get("RANK", "0") == "0" else ~there


FAULTS = {"availability": there_in_the_first, "dropout_rate": 0.2, "over_selection": 0.2}
SIZES = {
    "sizes": (2, 4),
    "group_ratio": (1, 1),
    "n_rounds": 4,
    "random_state": 0,
    "clients_per_round": 0.5,
}
TEXT = FAST_TEXT | {"n_rounds": 2, "n_platforms": None}
FITS = {
    "whole-data": (FedFNNRecommender(**FACTORS), None),
    "whole-data, platforms": (FedFNNRecommender(**MOST, early_stopping=True), PLATFORMS),
    "predictions": (FedFNNRecommender(**FACTORS, refit=False), None),
    "whole-data, faults": (
        FedFNNRecommender(**MOST, **FAULTS, client_seconds=0.1, deadline=2.0),
        None,
    ),
    "bce, newton": (FedFNNRecommender(**FACTORS, objective="bce"), None),
    "bce, adam": (FedFNNRecommender(**FACTORS, objective="bce", server_optimizer="adam"), None),
    "bce, platforms": (FedFNNRecommender(**MOST, objective="bce"), PLATFORMS),
    # Not refit: whether a step of a network is taken back can hang on the last digit.
    "ncf": (FedFNNRecommender(**FEW, objective="bce", model="ncf", refit=False), None),
    "sizes, mf": (HeteFedRecRecommender("mf", **SIZES), None),
    "sizes, dual task": (HeteFedRecRecommender("mf", **SIZES, dual_task=True), None),
    "sizes, ncf": (HeteFedRecRecommender("ncf", **SIZES), None),
    "sizes, faults": (HeteFedRecRecommender("mf", **SIZES, **FAULTS), None),
    "sizes, apart": (HeteFedRecRecommender("ncf", **SIZES, aggregation="standalone"), None),
    "centralised": (CentralizedRecommender(**FACTORS), None),
    "fellrec": (
        FELLRecRecommender(tiny_encoder, **TEXT | {"early_stopping": True}, proximal=0.1),
        PLATFORMS,
    ),
    # Four platforms need three rounds for a training: until then one process has nothing to do.
    "ditto": (
        FELLRecRecommender(
            tiny_encoder, **TEXT, aggregation="ditto", proximal=0.1, client_periods=[1, 3, 3, 3, 3]
        ),
        PLATFORMS,
    ),
}


class StopHere:
    """Stop the fit after its second round, in one process; look at the model in another."""

    n_rounds = 0

    def setup(self, estimator, context):
        """Nothing to set up."""

    def teardown(self, estimator, context):
        """Nothing to tear down."""

    def on_fit_task_begin(self, estimator, context):
        """Nothing to do yet."""

    def on_fit_task_end(self, estimator, context):
        """Count the rounds, and fit another model where nobody else does."""
        self.n_rounds += context.task_name == "round"
        if is_main():
            FedFNNRecommender(n_factors=2, n_rounds=1).fit(X)
        return not is_main() and self.n_rounds == 2


def arrays_of(estimator):
    """Name all numbers that a fit leaves, but the seconds."""
    found = {
        name: value for name, value in vars(estimator).items() if isinstance(value, np.ndarray)
    }
    for name, value in getattr(estimator, "adapters_", {}).items():
        found[f"adapters_ {name}"] = value
    for name in (
        "loss", "clients", "bytes_up", "bytes_down", "validation_ndcg", "asked", "late", "waited"
    ):  # fmt: skip
        values = [record[name] for record in estimator.history_ if name in record]
        found[f"history_ {name}"] = np.array(values)
    found["predict"] = estimator.predict(X)
    return {name: value for name, value in found.items() if value.dtype != object}


def fit_all():
    """Fit everything; return all arrays as ``fit / array``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*item_text|.*titles|.*texts")
        return {
            f"{name} / {array}": value
            for name, (estimator, client_ids) in FITS.items()
            for array, value in arrays_of(estimator.fit(X, client_ids)).items()
        }


def message_of(error, work):
    """Return what an error says."""
    try:
        work()
    except error as found:
        return str(found)
    return ""


def main(folder):
    """Fit as one of several processes, and leave what was found in a folder."""
    rank = int(os.environ["RANK"])
    np.savez(folder / f"{rank}.npz", **fit_all())
    unseeded = FedFNNRecommender(n_factors=4, n_rounds=2, verbose=2)
    stopped = FedFNNRecommender(**FACTORS).set_callbacks(StopHere())
    found = {
        "unseeded": unseeded.fit(X).item_factors_.tolist(),
        "generator": unseeded.set_params(random_state=np.random.RandomState(rank))
        .fit(X)
        .item_factors_.tolist(),
        "n_rounds": stopped.fit(X).n_rounds_,
        "data": message_of(ValueError, lambda: unseeded.fit(X[rank:])),
        "parameters": message_of(
            ValueError, lambda: FedFNNRecommender(4, l2=0.1 + rank, random_state=0).fit(X)
        ),
        "diverged": message_of(
            FloatingPointError,
            lambda: FedFNNRecommender(
                **FACTORS, objective="bce", server_optimizer="sgd", server_learning_rate=1e9
            ).fit(X),
        ),
        "afterwards": FedFNNRecommender(**FACTORS).fit(X).item_factors_.tolist(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
