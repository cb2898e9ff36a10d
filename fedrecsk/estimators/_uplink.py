"""What happens to uploads on their way to the server, from an estimator's parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from fedrecsk.data.interactions import Interactions
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.engine.attacks import (
    PROMOTIONS,
    Attack,
    AttackName,
    draw_malicious,
    made_up_items,
)
from fedrecsk.engine.compression import Compression, CompressionName
from fedrecsk.engine.defences import Defence, DefenceName
from fedrecsk.engine.secure_sum import SecureSum
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uplink import Uplink
from fedrecsk.estimators._base import Attributes
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions

UPLINK_CONSTRAINTS: Constraints = {
    "defence": [StrOptions({"clip", "median", "trimmed-mean", "krum", "multi-krum"}), None],
    "assumed_malicious": [Interval(Real, 0, 0.5, closed="left")],
    "clip_quantile": [Interval(Real, 0, 1, closed="right")],
    "check_uploads": ["boolean"],
    "malicious_fraction": [Interval(Real, 0, 1, closed="left")],
    "attack": [StrOptions({*PROMOTIONS, "sign-flip", "scale", "gaussian", "nan"})],
    "attack_strength": [Interval(Real, 0, None, closed="neither")],
    "target_item": "no_validation",
    "compression": [StrOptions({"top-k", "quantised", "low-rank"}), None],
    "compression_level": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    "error_feedback": ["boolean"],
    "secure_aggregation": ["boolean", StrOptions({"simulate"})],
    "secure_bits": [Interval(Integral, 2, 32, closed="both")],
}
# What "auto" stands for, by kind of compression; see benchmarks/compression.py.
AUTO_LEVEL: dict[CompressionName, float] = {"top-k": 0.1, "quantised": 4, "low-rank": 2}
SecureAggregation = bool | Literal["simulate"]


@dataclass(frozen=True)
class Distrust:
    """What a fit has to do with dishonest clients.

    Attributes
    ----------
    uplink : Uplink or None
        None: nothing.
    data : Interactions
        What clients train on; dishonest ones may have made their histories up.
    fitted : dict
        Attributes that say who was dishonest.
    """

    uplink: Uplink | None
    data: Interactions
    fitted: Attributes


def distrust(
    data: Interactions,
    streams: Streams,
    *,
    defence: DefenceName | None,
    assumed_malicious: float,
    clip_quantile: float,
    check_uploads: bool,
    malicious_fraction: float,
    attack: AttackName,
    attack_strength: float,
    target_item: Any,
    lookalike_fits: bool,
    compression: CompressionName | None = None,
    compression_level: float | Literal["auto"] = "auto",
    error_feedback: bool = True,
    secure_aggregation: SecureAggregation = False,
    secure_bits: int = 32,
) -> Distrust:
    """Draw who is dishonest, and bind what happens to uploads.

    Parameters
    ----------
    data : Interactions
    streams : Streams
    defence, ..., secure_bits
        As in `FedFNNRecommender`.
    lookalike_fits : bool
        Whether a user vector says what its client sends, so that ``"lookalike"`` can make one up.

    Returns
    -------
    Distrust
    """
    malicious = draw_malicious(data.n_clients, malicious_fraction, streams)
    target = _target(data, target_item) if attack in PROMOTIONS else -1
    fitted: Attributes = {
        "malicious_client_ids_": data.clients.ids[malicious],
        "target_item_": data.items.ids[target] if target >= 0 and malicious.any() else None,
    }
    dishonest = None
    if malicious.any() and attack == "lookalike" and not lookalike_fits:
        raise ValueError(
            'attack="lookalike" sends what follows from a user vector with the whole-data objective'
            " and without privacy. Choose these, or another attack."
        )
    if malicious.any():
        dishonest = Attack(attack, malicious, float(attack_strength), target, streams)
        if attack == "random" or attack == "bandwagon":
            items = made_up_items(
                data.user,
                data.item,
                malicious[data.user_client],
                data.n_items,
                target=target,
                name=attack,
                streams=streams,
            )
            data = replace(data, item=items)
    rule = packed = secure = None
    if defence is not None:
        rule = Defence(defence, float(assumed_malicious), float(clip_quantile), bool(check_uploads))
    if compression is not None:
        level = _level(compression, compression_level)
        packed = Compression(compression, level, bool(error_feedback), streams)
    if secure_aggregation:
        secure = SecureSum(int(secure_bits), secure_aggregation == "simulate", streams)
    uplink = Uplink(dishonest, rule, packed, secure)
    return Distrust(None if uplink == Uplink() else uplink, data, fitted)


def check_sums_suffice(
    *,
    defence: DefenceName | None,
    compression: CompressionName | None,
    predicts: bool,
    sampling: str,
    cohort: int,
    n_clients: int,
) -> None:
    """Refuse secure aggregation where somebody wants to see more than sums, or a sum is no secret.

    Parameters
    ----------
    defence, compression, sampling
        As in `FedFNNRecommender`.
    predicts : bool
        Whether a predictor is at work.
    cohort : int
        Clients in a round, of `n_clients`.
    """
    if cohort < 2:
        raise ValueError(
            f"A round has a single client, of {n_clients} in all, and its upload would be the sum "
            "that secure_aggregation hides it in. Raise clients_per_round, or leave "
            "secure_aggregation out."
        )
    reasons = []
    if defence is not None:
        what = "lengths" if defence == "clip" else "values"
        reasons.append(f'defence="{defence}" compares the {what} of single uploads')
    if compression is not None:
        reasons.append(
            f'compression="{compression}" saves nothing under masks, which are as long as the table'
        )
    if predicts:
        reasons.append("predictor learns from the vectors of single users; use predictor=None")
    if sampling == "stratified":
        reasons.append('sampling="stratified" clusters the vectors of single users')
    if reasons:
        raise ValueError(
            f"secure_aggregation shows the server sums alone, but {'; '.join(reasons)}. "
            "Leave one of them out."
        )


def _level(kind: CompressionName, level: float | Literal["auto"]) -> float:
    """Resolve the level of a compression, whose meaning depends on its kind."""
    if level == "auto":
        return AUTO_LEVEL[kind]
    if kind == "top-k" and level > 1:
        raise ValueError(
            f'compression_level={level} is no share of the rows: with compression="top-k" it lies '
            "in (0, 1]."
        )
    if kind == "quantised" and level not in range(2, 33):
        raise ValueError(
            f'compression_level={level} is no number of bits: with compression="quantised" it is '
            "2, 3, ... or 32."
        )
    if kind == "low-rank" and level != int(level):
        raise ValueError(
            f'compression_level={level} is no rank: with compression="low-rank" it is 1, 2, ...'
        )
    return float(level)


def _target(data: Interactions, target_item: Any) -> int:
    """Code of the item to be promoted; the least popular one by default."""
    if target_item is None:
        return int(np.argmin(data.item_counts))
    codes, known = Vocabulary(data.items.ids).encode([target_item])
    if not known[0]:
        raise ValueError(f"target_item={target_item!r} is not among the items of the data.")
    return int(codes[0])
