"""What users of a federation of language models are served with, and how well it ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrecsk.engine.parallel import fill_rows, own_part, shares
from fedrecsk.estimators._base import Attributes
from fedrecsk.estimators._language import (
    Ranking,
    by_platform,
    find_intercept,
    items_under,
    sample_users,
)
from fedrecsk.estimators._platforms import HeldOut, Platforms
from fedrecsk.models.generation import embed_last_token, generate_titles
from fedrecsk.models.stacked_lora import Adapters, mean, select
from fedrecsk.models.text_model import TextModel

IntArray = NDArray[np.int64]

MAX_TITLE_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Reader:
    """How histories and items become vectors.

    Attributes
    ----------
    model : TextModel
    writes : bool
        Whether a history stands for a title that the model writes.
    max_history : int
        Items of a user that are read, the latest.
    num_beams : int
        Of writing.
    """

    model: TextModel
    writes: bool
    max_history: int
    num_beams: int

    def vectors(
        self,
        own: Adapters,
        windows: IntArray,
        tables: list[tuple[Adapters, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Vectors of histories (n, H) under one adapter, and of items, kept in `tables`."""
        if self.writes:
            if not tables:
                tables.append((own, self.titles()))
            return self.written(own, windows)[1], tables[0][1]
        return self.model.encode_histories(own, windows), items_under(self.model, own, tables)

    def written(self, own: Adapters, windows: IntArray) -> tuple[list[str], Tensor]:
        """Titles that are written for histories (n, H), and their vectors without adapters."""
        model = self.model
        longest = int(model.titles.lengths.max(initial=1)) + 1
        with model.lora.using(own):
            titles = generate_titles(
                model.backbone,
                model.prompts(windows),
                num_beams=self.num_beams,
                max_new_tokens=min(longest, MAX_TITLE_TOKENS),
            )
        return titles, embed_last_token(model.backbone, titles)

    def titles(self) -> Tensor:
        """Vectors of the items' titles without adapters."""
        return embed_last_token(self.model.backbone, self.model.title_texts)


def validate(
    rankings: Sequence[Ranking],
    reader: Reader,
    platforms: Platforms,
    held_out: HeldOut,
    adapters: Adapters,
    counts: Tensor,
) -> Tensor:
    """NDCG@20 (R, C) of each platform's held-out users, by how scores are made.

    NaN where a platform has none.
    """
    found = torch.full((len(platforms), len(rankings)), torch.nan, dtype=torch.float64)
    tables: list[tuple[Adapters, Tensor]] = []
    of_user = platforms.of_user[held_out.users]
    # A platform costs a reading of the catalogue and one of every user.
    costs = np.bincount(of_user, minlength=len(platforms)) + platforms.n_items
    parts = shares(np.arange(len(platforms)), costs)
    for platform, which in by_platform(of_user):
        if platform not in own_part(parts):
            continue
        users = held_out.users[which]
        adapter = select(adapters, [platform])
        windows = platforms.window(users, held_out.ends[users], reader.max_history)
        queries, items = reader.vectors(adapter, windows, tables)
        for column, ranking in enumerate(rankings):
            popularity = ranking.popularity(counts)[platform]
            scores = ranking.scores(queries, items, popularity)
            values = held_out.ndcg(scores.cpu().numpy(), platforms, which)
            found[platform, column] = float(values.mean())
    return fill_rows(found, parts).T.contiguous().to(reader.model.device)


def serve(
    reader: Reader,
    platforms: Platforms,
    adapters: Adapters,
    ranking: Ranking,
) -> Attributes:
    """Encode users and items under the adapters that serve them."""
    model = reader.model
    everybody = platforms.window(
        np.arange(platforms.n_users), platforms.lengths, reader.max_history
    )
    users = torch.empty(platforms.n_users, model.backbone.width, device=model.device)
    written = [""] * platforms.n_users
    tables: list[tuple[Adapters, Tensor]] = []
    item_vectors = []
    crowd_adapter = mean(adapters)
    for platform, which in by_platform(platforms.of_user):
        own = select(adapters, [platform])
        places = torch.from_numpy(which).to(model.device)
        if reader.writes:
            titles, users[places] = reader.written(own, everybody[which])
            for place, title in zip(which, titles, strict=True):
                written[place] = title
        else:
            users[places] = model.encode_histories(own, everybody[which])
            item_vectors.append(items_under(model, own, tables))
    if reader.writes:
        nobody = np.full((1, reader.max_history), -1, dtype=np.int64)
        crowd = reader.written(crowd_adapter, nobody)[1][0]
        item_vectors = [reader.titles()]
    else:
        item_vectors.append(items_under(model, crowd_adapter, tables))
        sample = everybody[sample_users(platforms.n_users)]
        crowd = model.encode_histories(crowd_adapter, sample).mean(0)
    counts = platforms.counts(platforms.lengths)
    stacked = torch.stack(item_vectors).cpu().numpy()
    attributes: Attributes = {
        "adapters_": {name: value.cpu().numpy() for name, value in adapters.items()},
        "user_factors_": users.cpu().numpy(),
        "crowd_factors_": crowd.cpu().numpy(),
        "item_vectors_": stacked,
        "item_factors_": stacked[-1],
        "item_counts_": np.concatenate([counts, counts.sum(0)[None]]),
        "user_platforms_": platforms.of_user,
        "popularity_weight_": ranking.popularity_weight,
        "shared_popularity_": ranking.shared_popularity,
        "temperature_": ranking.temperature,
        "generated_titles_": tuple(written) if reader.writes else (),
        "generates_": ranking.generated,
    }
    attributes["intercept_"] = find_intercept(attributes, platforms)
    return attributes
