"""Pieces of `FELLRecRecommender` that need nothing of its parameters but what they are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.prompts import Catalogue
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.engine.streams import Streams
from fedrecsk.estimators._base import Attributes
from fedrecsk.estimators._platforms import Platforms
from fedrecsk.methods.fellrec import FELLRecState
from fedrecsk.models.backbone import Backbone
from fedrecsk.models.generation import ground, inject_popularity
from fedrecsk.models.reconstruction import reconstruction_risk, suggest_client_layers
from fedrecsk.models.stacked_lora import Adapters, mean
from fedrecsk.models.text_model import TextModel

IntArray = NDArray[np.int64]

# Users whose vectors make the crowd's, and who say how probable an interaction is.
CROWD_SAMPLE = 512
# Texts, and tokens of each, that the attack behind client_layers="auto" is tried on.
ATTACKED_TEXTS, MOST_ATTACKED_TOKENS = 512, 64


def by_platform(platforms: IntArray) -> Iterator[tuple[int, IntArray]]:
    """Give each platform that comes up, and where."""
    for platform in np.unique(platforms).tolist():
        yield platform, np.flatnonzero(platforms == platform)


@dataclass(frozen=True)
class Ranking:
    """How vectors and counts become scores.

    Attributes
    ----------
    temperature : float
        By which cosines are divided.
    popularity_weight : float
    generated : bool
        Whether histories stand for titles that were written: then distances rank.
    shared_popularity : bool
        Whether popularity is that among all platforms.
    """

    temperature: float
    popularity_weight: float
    generated: bool
    shared_popularity: bool

    @classmethod
    def of(cls, fitted: Mapping[str, Any]) -> Ranking:
        """Read fitted attributes."""
        return cls(
            fitted["temperature_"],
            fitted["popularity_weight_"],
            fitted["generates_"],
            fitted["shared_popularity_"],
        )

    def popularity(self, counts: Tensor) -> Tensor:
        """Give the counts (C, n_items) that platforms rank by, from the own of each."""
        return counts.sum(0, keepdim=True).expand_as(counts) if self.shared_popularity else counts

    def places(self, platforms: IntArray) -> IntArray:
        """Rows of a table of counts, the last of them of all, that hold for platforms (n,)."""
        return np.full_like(platforms, -1) if self.shared_popularity else platforms

    def prior(self, counts: Tensor) -> Tensor:
        """Give what popularity adds to the scores of items, from counts (..., n_items)."""
        return self.popularity_weight * torch.log1p(counts)

    def scores(self, queries: Tensor, items: Tensor, counts: Tensor) -> Tensor:
        """Scores (n, n_items) of vectors of histories, or of titles that were written."""
        if self.generated:
            return inject_popularity(-ground(queries, items), counts, self.popularity_weight)
        return queries @ items.T / self.temperature + self.prior(counts)


def items_under(model: TextModel, own: Adapters, tables: list[tuple[Adapters, Tensor]]) -> Tensor:
    """Item vectors (n_items, width) under an adapter; `tables` remembers those of others.

    After an average all platforms hold the same adapter, and the catalogue is read once.
    """
    for adapters, table in tables:
        if all(torch.equal(adapters[name], value) for name, value in own.items()):
            return table
    table = model.encode_items(own)
    tables.append((own, table))
    return table


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Share the memory of an array, but that of a memory-mapped one, which cannot be written."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def score_users(fitted: Mapping[str, Any], users: IntArray) -> NDArray[np.float32]:
    """Scores (n, n_items) for user codes (n,), -1 for the crowd, from fitted attributes."""
    ranking = Ranking.of(fitted)
    crowd = len(fitted["item_counts_"]) - 1
    platforms = np.where(users >= 0, fitted["user_platforms_"][users], crowd)
    scores = np.empty((len(users), len(fitted["item_factors_"])), dtype=np.float32)
    for platform, which in by_platform(platforms):
        rows = fitted["user_factors_"][users[which]]
        if platform == crowd:
            rows = np.repeat(fitted["crowd_factors_"][None], len(which), axis=0)
        table = 0 if ranking.generated else platform
        counted = crowd if ranking.shared_popularity else platform
        scores[which] = ranking.scores(
            torch.from_numpy(rows),
            as_tensor(fitted["item_vectors_"][table]),
            as_tensor(fitted["item_counts_"][counted]).float(),
        ).numpy()
    return scores


def sample_users(n_users: int) -> IntArray:
    """Codes of some users, evenly spread."""
    return np.unique(np.linspace(0, n_users - 1, CROWD_SAMPLE).astype(np.int64))


def find_intercept(attributes: Attributes, platforms: Platforms) -> float:
    """Shift scores so that the mean probability of a pair is the share of pairs in the data."""
    scores = score_users(attributes, sample_users(platforms.n_users)).astype(np.float64)
    if not np.isfinite(scores).all():
        raise FloatingPointError(
            "Training diverged: the scores are not finite. Lower learning_rate."
        )
    share = len(platforms.items) / (platforms.n_users * platforms.n_items)
    share = min(max(share, 1e-9), 1.0 - 1e-9)
    low, high = -scores.max() - 50.0, -scores.min() + 50.0
    return float(brentq(lambda shift: expit(scores + shift).mean() - share, low, high))


def about(
    data: Interactions, codes: IntArray, items: Catalogue, platforms: Platforms
) -> Attributes:
    """Fitted attributes that training does not change."""
    matrix = data.matrix()
    return {
        "item_ids_": items.items.ids,
        # Both vocabularies are sorted, so the items of a user stay in order.
        "seen_indptr_": matrix.indptr.astype(np.int64),
        "seen_indices_": codes[matrix.indices],
        "platform_ids_": platforms.ids,
        "client_platforms_": platforms.of_client,
        "platforms_are_clients_": bool(np.array_equal(platforms.ids, data.clients.ids)),
    }


def mean_of_best(state: FELLRecState, users: IntArray) -> float:
    """Mean over validation users of the best values so far; 0 if nobody validates."""
    values = state.best_value.cpu().numpy()
    known = np.isfinite(values) & (users > 0)
    if not known.any():
        return 0.0
    return float(np.average(values[known], weights=users[known]))


def adapters_before(start: Adapters, platforms: Platforms, previous: Attributes) -> Adapters:
    """Put earlier adapters in the places of known platforms; new ones start from their mean."""
    before = {name: torch.tensor(value) for name, value in previous["adapters_"].items()}
    if before.keys() != start.keys() or any(
        before[name].shape[1:] != value.shape[1:] for name, value in start.items()
    ):
        raise ValueError(
            "Cannot go on with other adapters than before: the backbone, lora_rank or "
            "target_modules changed since the last fit. Fit anew with warm_start=False."
        )
    old_ids = previous["platform_ids_"]
    order = np.argsort(old_ids, kind="stable")
    places, known = Vocabulary(old_ids[order]).encode(platforms.ids)
    centre = mean(before)
    return {
        name: torch.stack(
            [
                before[name][order[place]] if is_known else centre[name][0]
                for place, is_known in zip(places, known, strict=True)
            ]
        ).to(value)
        for name, value in start.items()
    }


def check_periods(periods: ArrayLike | None, n_clients: int, device: torch.device) -> Tensor:
    """Read the rounds that each platform needs for a local training."""
    if periods is None:
        return torch.ones(n_clients, dtype=torch.int64, device=device)
    found = np.asarray(periods)
    if found.shape != (n_clients,) or found.dtype.kind not in "iu" or found.min() != 1:
        raise ValueError(
            f"client_periods must give each of the {n_clients} platforms a whole number of "
            f"rounds, 1 for the fastest; got {periods!r}."
        )
    return torch.from_numpy(found.astype(np.int64)).to(device)


def check_same_layers(adapters: Adapters, model: TextModel, folder: str | Path) -> None:
    """Refuse adapters for other layers than those of the model."""
    wanted = {f"{path}.{side}" for path in model.lora.targets for side in ("lora_A", "lora_B")}
    if adapters.keys() != wanted:
        strange = sorted(adapters.keys() ^ wanted)
        raise ValueError(
            f"The adapters in {folder} are for other layers than this estimator's, such as "
            f"{strange[0]}."
        )


def bytes_crossed(model: TextModel) -> int:
    """Bytes that have crossed the boundary between client and server so far."""
    return 0 if model.split is None else sum(model.split.boundary.sent.values())


def safe_layers(backbone: Backbone, items: Catalogue, max_risk: float, streams: Streams) -> int:
    """Find the fewest layers that keep the reconstruction of texts below a risk.

    The item texts are public, so the server can try its own attack on them.
    """
    order = streams.numpy("attack").permutation(len(items))[:ATTACKED_TEXTS]
    encoded = backbone.tokenizer(
        [items.texts[place] for place in order],
        padding=True,
        truncation=True,
        max_length=MOST_ATTACKED_TOKENS,
        return_tensors="pt",
    ).to(backbone.device)
    half = len(order) // 2
    known, secret = (
        (encoded["input_ids"][part], encoded["attention_mask"][part])
        for part in (slice(half), slice(half, None))
    )
    curve = reconstruction_risk(
        backbone.model,
        backbone.layers_path,
        known,
        secret,
        special_ids=backbone.tokenizer.all_special_ids,
    )
    try:
        return suggest_client_layers(curve, max_risk)
    except ValueError as error:
        raise ValueError(
            f'client_layers="auto" finds no split of {backbone.name} that keeps max_risk='
            f"{max_risk}. Raise max_risk, or leave all layers to the clients with "
            f"client_layers=None. {error}"
        ) from error
