"""Meta-networks: predict a user's update from its vector, and say how far to trust the answer.

Every kind of predictor is one function ``fit(x, y, weight, query, strength)`` over a stack of S
problems that share their data and differ in the weights of the examples and in a strength of
regularisation. Cross-validation is then a single call: folds x candidates make the stack.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments

PredictorName = Literal["mlp", "linear", "mean", "cluster"]

# Candidates of each kind, by strength of regularisation: weight decay of the network, ridge of
# the linear map (per example, inputs standardised); the others have none.
CANDIDATES: dict[str, tuple[float, ...]] = {
    "mlp": (1e-4, 1e-2, 1e-1),
    "linear": (1e-3, 1e-1, 10.0),
    "mean": (0.0,),
    "cluster": (0.0,),
}
HIDDEN_UNITS = 32
TRAINING_STEPS = 30
LEARNING_RATE = 0.05
# Below this there are too few delegates to fit anything and to check it.
MIN_DELEGATES = 5
# Above this a random sample of the delegates does: it holds all that so small a network can
# learn, and the cost of a round stays that of the clients.
MAX_DELEGATES = 1_000


@dataclass(frozen=True, eq=False)
class Prediction:
    """Predicted updates, or the reason why there are none.

    Attributes
    ----------
    deltas : Tensor of shape (n_query, d) or None
        None where nothing should be predicted.
    r2 : float
        Cross-validated share of the delegates' squared update that the chosen candidate
        explains, against predicting zero. nan where it was not measured.
    cosine : float
        Mean cosine between predicted and true held-out updates; nan likewise.
    candidate : str
        ``"mlp(0.01)"`` and the like, or ``"none: reason"``.
    """

    deltas: Tensor | None
    r2: float
    cosine: float
    candidate: str


def predict_updates(
    kind: PredictorName,
    before: Tensor,
    deltas: Tensor,
    query: Tensor,
    *,
    cv: int,
    gate: bool,
    n_clusters: int,
    seed: int,
) -> Prediction:
    """Learn (vector before training -> update) from the delegates and apply it to others.

    Parameters
    ----------
    kind : {"mlp", "linear", "mean", "cluster"}
    before : Tensor of shape (n, inputs)
        Delegates' vectors before local training, and what else is known of them.
    deltas : Tensor of shape (n, d)
        Their updates.
    query : Tensor of shape (m, inputs)
        The same of the users to predict for.
    cv : int
        Folds over the delegates; they choose the candidate.
    gate : bool
        Predict nothing unless the best candidate beats predicting zero on held-out delegates.
    n_clusters : int
        Of ``kind="cluster"``.
    seed : int

    Returns
    -------
    Prediction
    """
    n = len(before)
    if n < MIN_DELEGATES or len(query) == 0:
        return _nothing(f"{n} delegates" if len(query) else "nobody to predict for")
    if n > MAX_DELEGATES:
        chosen = np.random.default_rng(seed).choice(n, MAX_DELEGATES, replace=False)
        sample = torch.from_numpy(np.sort(chosen)).to(before.device)
        before, deltas, n = before[sample], deltas[sample], MAX_DELEGATES
    scale = deltas.square().mean().sqrt()
    if not bool(torch.isfinite(scale)) or float(scale) == 0.0:
        return _nothing("updates are zero or not finite")
    centre, spread = before.mean(0), before.std(0)
    # An input that is the same for all delegates teaches nothing, and must not throw others far.
    varies = spread > 1e-6
    spread = torch.where(varies, spread, torch.ones_like(spread))
    x, y = (before - centre) / spread, deltas / scale
    q = torch.where(varies, (query - centre) / spread, torch.zeros_like(query))
    if kind == "cluster":
        # Clusters are made of all users' vectors, so they are the same for every fold.
        k = min(n_clusters, n + len(query))
        labels = torch.from_numpy(cluster_labels(torch.cat([x, q]), k, seed))
        one_hot = torch.nn.functional.one_hot(labels, k).to(x)
        x, q = one_hot[:n], one_hot[n:]

    strengths = torch.tensor(CANDIDATES[kind], dtype=x.dtype, device=x.device)
    folds = _folds(n, min(cv, n), seed).to(x.device)
    n_folds, n_candidates = int(folds.max()) + 1, len(strengths)
    fold = torch.arange(n_folds, device=x.device).repeat_interleave(n_candidates)
    weight = (folds[None, :] != fold[:, None]).to(x.dtype)  # (folds x candidates, n)
    held_out = _fit(kind, x, y, weight, x, strengths.repeat(n_folds), seed)
    # Each delegate is predicted by the networks that have not seen it: (candidates, n, d).
    own = folds[None, :] * n_candidates + torch.arange(n_candidates, device=x.device)[:, None]
    predicted = held_out[own, torch.arange(n, device=x.device)[None, :]]
    r2 = 1.0 - (predicted - y).square().sum((1, 2)) / y.square().sum()
    r2 = torch.where(torch.isfinite(r2), r2, -math.inf)
    best = int(r2.argmax())
    score = float(r2[best])
    cosine = float(torch.nn.functional.cosine_similarity(predicted[best], y, dim=1).mean())
    if not math.isfinite(score) or (gate and score <= 0.0):
        return Prediction(None, score, cosine, "none: no candidate beats zero")

    everyone = torch.ones(1, n, dtype=x.dtype, device=x.device)
    answer = _fit(kind, x, y, everyone, q, strengths[best : best + 1], seed)[0] * scale
    if not bool(torch.isfinite(answer).all()):
        return Prediction(None, score, cosine, "none: predictions are not finite")
    strength = n_clusters if kind == "cluster" else CANDIDATES[kind][best]
    return Prediction(answer, score, cosine, f"{kind}({strength:g})")


def _nothing(reason: str) -> Prediction:
    return Prediction(None, math.nan, math.nan, f"none: {reason}")


def _folds(n: int, cv: int, seed: int) -> Tensor:
    """Deal n delegates evenly to folds, shuffled; shape (n,)."""
    dealt = np.random.default_rng(seed).permutation(np.arange(n) % cv)
    return torch.from_numpy(dealt)


def cluster_labels(vectors: Tensor, n_clusters: int, seed: int) -> NDArray[np.int64]:
    """K-means labels of the vectors (n, inputs), shape (n,); no more clusters than vectors.

    Parameters
    ----------
    vectors : Tensor of shape (n, inputs)
    n_clusters, seed : int

    Returns
    -------
    ndarray of shape (n,), int64
    """
    # Here and not at the top: a tenth of the time of ``import fedrecsk``, for one predictor.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    # Server-side and small; scikit-learn's own k-means, single start, is what is wanted here.
    means = KMeans(min(n_clusters, len(vectors)), n_init=1, random_state=seed % (2**32))
    with warnings.catch_warnings():
        # Fewer distinct vectors than clusters: some clusters stay empty, which is all right.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels: NDArray[np.int64] = means.fit_predict(vectors.cpu().numpy()).astype(np.int64)
    return labels


def _fit(
    kind: PredictorName,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    query: Tensor,
    strength: Tensor,
    seed: int,
) -> Tensor:
    """Fit S problems on (x, y) with example weights (S, n); predict query: (S, m, d)."""
    if kind == "mlp":
        return _fit_mlp(x, y, weight, query, strength, seed)
    if kind == "linear":
        ones, more = x.new_ones(len(x), 1), query.new_ones(len(query), 1)
        return _fit_ridge(torch.cat([x, ones], 1), y, weight, torch.cat([query, more], 1), strength)
    if kind == "cluster":
        # A mean per cluster; without any delegate of the cluster, no change.
        sums = torch.einsum("sn,nk,nd->skd", weight, x, y)
        counts = torch.einsum("sn,nk->sk", weight, x).clamp_min(1e-12)
        return torch.einsum("mk,skd->smd", query, sums / counts[:, :, None])
    mean: Tensor = (weight @ y) / weight.sum(1, keepdim=True)
    return mean[:, None, :].expand(-1, len(query), -1)


def _fit_ridge(x: Tensor, y: Tensor, weight: Tensor, query: Tensor, strength: Tensor) -> Tensor:
    """Weighted ridge regressions with the intercept, the last column, unpenalised."""
    penalty = x.new_ones(x.shape[1])
    penalty[-1] = 1e-6
    ridge = strength[:, None] * weight.sum(1, keepdim=True) * penalty
    left = torch.einsum("sn,na,nb->sab", weight, x, x) + torch.diag_embed(ridge)
    right = torch.einsum("sn,na,nd->sad", weight, x, y)
    coefficients: Tensor = torch.linalg.solve(left, right)
    return query @ coefficients


def _fit_mlp(
    x: Tensor, y: Tensor, weight: Tensor, query: Tensor, strength: Tensor, seed: int
) -> Tensor:
    """Train one small network per problem, all in one stack, full batch with Adam."""
    n_stack, width, out = len(weight), x.shape[1], y.shape[1]
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(width, HIDDEN_UNITS, generator=generator) / math.sqrt(width)
    # The same start for every fold and candidate, so that they differ in data alone. The last
    # layer starts at zero: before training, the network predicts no update.
    start = {
        "w1": first.to(x).expand(n_stack, -1, -1),
        "b1": x.new_zeros(n_stack, HIDDEN_UNITS),
        "w2": x.new_zeros(n_stack, HIDDEN_UNITS, out),
        "b2": x.new_zeros(n_stack, out),
    }
    share = (weight / weight.sum(1, keepdim=True))[:, :, None]
    optimizer = Optimizer("adam", learning_rate=LEARNING_RATE)
    active = torch.ones(n_stack, dtype=torch.bool, device=x.device)
    network, moments = start, init_moments(start, optimizer)
    for _ in range(TRAINING_STEPS):
        hidden, output = _forward(network, x)
        # By hand, autograd costs as much again: mean squared error plus the decay of weights.
        error = (output - y) * share * (2.0 / out)  # (S, n, out)
        back = (error @ network["w2"].transpose(1, 2)) * (1.0 - hidden * hidden)
        decay = (2.0 / width) * strength[:, None, None]
        grads = {
            "w1": x.T @ back + decay * network["w1"],
            "b1": back.sum(1),
            "w2": hidden.transpose(1, 2) @ error + decay * network["w2"],
            "b2": error.sum(1),
        }
        network, moments = apply_gradients(network, grads, moments, active, optimizer)
    return _forward(network, query)[1]


def _forward(network: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden units (S, n, hidden) and outputs (S, n, out) of a stack of networks."""
    hidden = torch.tanh(
        torch.baddbmm(network["b1"][:, None, :], _stack(inputs, network), network["w1"])
    )
    return hidden, torch.baddbmm(network["b2"][:, None, :], hidden, network["w2"])


def _stack(inputs: Tensor, network: dict[str, Tensor]) -> Tensor:
    """Show the same inputs (n, in) to every network."""
    return inputs.expand(len(network["w1"]), -1, -1)
