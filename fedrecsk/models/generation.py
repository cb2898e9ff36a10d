"""Recommending by writing: a causal model writes a title, and items are ranked by likeness to it.

The inference of BIGRec (Bao et al. 2023, arXiv:2308.08434):

    write    beam search continues the prompt of a user's history; the adapter is in force
    ground   the base model, without an adapter, turns what was written and every title into the
             last layer's hidden state at the last token; items are ranked by the L2 distance
    inject   optionally, distances of popular items shrink:
             D~ (1 + C~)^(-gamma), D~ the distance and C~ the popularity, each scaled to [0, 1]

Texts are batched by length, so that little is computed on padding, and padding is masked: the
company that a text is batched with does not matter beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedrecsk.data.prompts import read_answer
from fedrecsk.models.backbone import Backbone, last_hidden
from fedrecsk.models.text_vectors import pad_rows

__all__ = ["embed_last_token", "generate_titles", "ground", "inject_popularity"]

# Distances computed at once: bounds the float64 work space to some tens of megabytes.
_CELLS_AT_ONCE = 2**22


def generate_titles(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 32,
    batch_size: int = 16,
) -> list[str]:
    """Write the title that continues each prompt, by beam search.

    Nothing is drawn at random. Adapters of one client that are in force around the call
    (``with stacked.using(adapters)``) are used.

    Parameters
    ----------
    backbone : Backbone
        A causal one.
    prompts : sequence of sequence of int
        Token ids of the prompts, none empty.
    num_beams : int, default=4
        Continuations kept while searching. 1: always the likeliest token.
    max_new_tokens : int, default=32
        A title ends there at the latest.
    batch_size : int, default=16
        Prompts at once; each takes `num_beams` rows.

    Returns
    -------
    titles : list of str
        In the order of the prompts; see :func:`fedrecsk.data.prompts.read_answer`.

    Raises
    ------
    ValueError
        If the backbone is no causal one, a prompt is empty, or prompt and title are longer than
        what the model can read.
    """
    if backbone.backend != "causal":
        raise ValueError(f"{backbone.name} was loaded as an encoder, which cannot write titles.")
    lengths = [len(each) for each in prompts]
    if not lengths:
        return []
    if min(lengths) == 0:
        raise ValueError(f"Prompt {lengths.index(0)} is empty. Give it at least one token.")
    limit = backbone.max_positions
    if limit is not None and max(lengths) + max_new_tokens > limit:
        raise ValueError(
            f"The longest prompt has {max(lengths)} tokens and its title up to {max_new_tokens}, "
            f"but {backbone.name} reads {limit} tokens. Show shorter histories, or write shorter "
            "titles."
        )
    model: Any = backbone.model
    titles = [""] * len(prompts)
    for places in _by_length(lengths, batch_size):
        pad = backbone.tokenizer.pad_token_id
        rows = [prompts[place] for place in places]
        ids, mask = pad_rows(rows, pad, backbone.device, side="left")
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # Off elsewhere: only writing reads the same tokens again and again.
            use_cache=True,
            pad_token_id=backbone.tokenizer.pad_token_id,
        )
        responses: list[str] = backbone.tokenizer.batch_decode(
            written[:, ids.shape[1] :], skip_special_tokens=True
        )
        for place, response in zip(places, responses, strict=True):
            titles[place] = read_answer(response)
    return titles


@torch.no_grad()
def embed_last_token(
    backbone: Backbone, texts: Sequence[str], *, batch_size: int = 64, max_length: int = 512
) -> Tensor:
    """Turn texts into the last layer's hidden states at their last tokens.

    Parameters
    ----------
    backbone : Backbone
        Its base model is meant: call this where no adapters are in force.
    texts : sequence of str
        Such as titles. An empty one is read as a single pad token.
    batch_size : int, default=64
        Texts at once.
    max_length : int, default=512
        Tokens of a text that are read at most, special tokens among them.

    Returns
    -------
    vectors : Tensor of shape (n, width), float32
        In the order of the texts, on the device of the model.
    """
    if not len(texts):
        return torch.empty(0, backbone.width, device=backbone.device)
    limit = backbone.max_positions
    max_length = max_length if limit is None else min(max_length, limit)
    read = {"truncation": True, "max_length": max_length, "split_special_tokens": True}
    encoded = backbone.tokenizer(list(texts), **read)["input_ids"]
    tokens = [ids or [backbone.tokenizer.pad_token_id] for ids in encoded]
    vectors = torch.empty(len(tokens), backbone.width, device=backbone.device)
    for places in _by_length([len(ids) for ids in tokens], batch_size):
        texts_here = [tokens[place] for place in places]
        ids, mask = pad_rows(texts_here, backbone.tokenizer.pad_token_id, backbone.device)
        hidden = last_hidden(backbone.model, ids, mask)  # (rows, L, width)
        rows = torch.arange(len(places), device=ids.device)
        last = hidden[rows, mask.sum(1) - 1]
        vectors[torch.tensor(places, device=ids.device)] = last.float()
    return vectors


def ground(generated: Tensor, titles: Tensor) -> Tensor:
    """Score items by how near their titles are to what was written.

    Parameters
    ----------
    generated : Tensor of shape (n, width)
        Vectors of the written titles.
    titles : Tensor of shape (m, width)
        Vectors of the items' titles.

    Returns
    -------
    scores : Tensor of shape (n, m), float32
        Minus the L2 distance, so that the nearest item scores highest.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.generation import ground
    >>> ground(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 3.0]]))
    tensor([[-5., -1.]])
    """
    # Hidden states lie far from the origin and close together. Products of them lose the small
    # distances in float32; centred and in float64 they are exact enough, and two to four times
    # as fast as differences (17 thousand titles, widths 128 to 4096, one thread).
    centre = titles.double().mean(0)
    there = titles.double() - centre
    scores = torch.empty(len(generated), len(titles), device=titles.device)
    chunk = max(1, _CELLS_AT_ONCE // max(1, len(titles)))
    for start in range(0, len(generated), chunk):
        here = generated[start : start + chunk].double() - centre
        scores[start : start + chunk] = -torch.cdist(
            here, there, compute_mode="use_mm_for_euclid_dist"
        )
    return scores


def inject_popularity(distance: Tensor, popularity: Tensor, gamma: float) -> Tensor:
    """Bring popular items nearer, as BIGRec does.

    Parameters
    ----------
    distance : Tensor of shape (n, m)
        L2 distances, ``-ground(...)``. Each row is scaled to [0, 1].
    popularity : Tensor of shape (m,)
        Such as the number of interactions of each item. Scaled to [0, 1].
    gamma : float
        0 or more. 0 leaves the order of the items as it is.

    Returns
    -------
    scores : Tensor of shape (n, m)
        Minus ``D~ (1 + C~)^(-gamma)``, so that the best item scores highest.

    Raises
    ------
    ValueError
        If ``gamma`` is negative or the shapes do not fit.

    Examples
    --------
    >>> import torch
    >>> from fedrecsk.models.generation import inject_popularity
    >>> inject_popularity(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([0, 9, 0]), gamma=1.0)
    tensor([[-0.0000, -0.5000, -1.0000]])
    """
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}.")
    if popularity.shape != distance.shape[1:]:
        raise ValueError(
            f"There are distances to {distance.shape[1]} items, but popularities of shape "
            f"{tuple(popularity.shape)}."
        )
    nearness = (1.0 + _to_unit(popularity.to(distance.dtype))) ** -gamma
    return -_to_unit(distance) * nearness


def _to_unit(values: Tensor) -> Tensor:
    """Scale the last axis to [0, 1]; where all values are equal, to 0."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    spread = high - low
    return (values - low) / torch.where(spread > 0, spread, torch.ones_like(spread))


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Group places by length, the longest first: if memory is short, it shows at once."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
