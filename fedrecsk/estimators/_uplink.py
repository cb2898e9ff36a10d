"""Who is dishonest, and what the server does about it, from an estimator's parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

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
from fedrecsk.engine.defences import Defence, DefenceName
from fedrecsk.engine.streams import Streams
from fedrecsk.engine.uplink import Uplink
from fedrecsk.estimators._base import Attributes
from fedrecsk.estimators._sklearn import Constraints, Interval, StrOptions

UPLINK_CONSTRAINTS: Constraints = {
    "defence": [StrOptions({"clip", "median", "trimmed-mean", "krum", "multi-krum"}), None],
    "assumed_malicious": [Interval(Real, 0, 0.5, closed="left")],
    "clip_quantile": [Interval(Real, 0, 1, closed="right")],
    "malicious_fraction": [Interval(Real, 0, 1, closed="left")],
    "attack": [
        StrOptions({"sign-flip", "scale", "gaussian", "nan", "random", "bandwagon", "gradient"})
    ],
    "attack_strength": [Interval(Real, 0, None, closed="neither")],
    "target_item": "no_validation",
}


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
    malicious_fraction: float,
    attack: AttackName,
    attack_strength: float,
    target_item: Any,
) -> Distrust:
    """Draw who is dishonest, and bind what happens to uploads.

    Parameters
    ----------
    data : Interactions
    streams : Streams
    defence, ..., target_item
        As in `FedFNNRecommender`.

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
    if dishonest is None and defence is None:
        return Distrust(None, data, fitted)
    rule = None
    if defence is not None:
        rule = Defence(defence, float(assumed_malicious), float(clip_quantile))
    return Distrust(Uplink(dishonest, rule), data, fitted)


def _target(data: Interactions, target_item: Any) -> int:
    """Code of the item to be promoted; the least popular one by default."""
    if target_item is None:
        return int(np.argmin(data.item_counts))
    codes, known = Vocabulary(data.items.ids).encode([target_item])
    if not known[0]:
        raise ValueError(f"target_item={target_item!r} is not among the items of the data.")
    return int(codes[0])
