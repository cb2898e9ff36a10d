"""A frozen language model with the adapters of all clients, as a recommender sees it.

Item codes go in, vectors or losses of all clients come out:

    encoder     item and history are texts; their vectors are the mean of the last hidden states
                (of the last token where a model only looks back); trained by the ranking loss
    causal      the history is a prompt; its vector is the hidden state from which the answer would
                be written, and is compared with those of the titles: trained by the ranking loss,
                and no title is written ("direct"), or the model is trained to write the title
                ("generate", see `generation.py`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedrecsk.data.prompts import Catalogue, answer, prompt
from fedrecsk.models.backbone import Backbone, last_hidden
from fedrecsk.models.split_lm import SplitLM
from fedrecsk.models.stacked_lora import Adapters, StackedLoRA, select
from fedrecsk.models.text_vectors import (
    Pooling,
    TextForm,
    TokenRows,
    encode_texts,
    pad_rows,
    pooled,
    ranking_loss,
)

IntArray = NDArray[np.int64]
Inference = Literal["direct", "generate"]
# Stands for a title where a prompt is cut into what is before and after the history.
_MARK = "MARK"
_SEPARATOR = ", "


@dataclass(frozen=True, eq=False)
class Examples:
    """Next items to be predicted, of the clients that take part in a step.

    Attributes
    ----------
    clients : tuple of int
        Numbers among those that are trained, of the K clients with examples.
    histories : ndarray of shape (K * B, H), int64
        Item codes, the latest first and -1 behind; rows of absent examples are all -1.
    targets : ndarray of shape (K, B), int64
        Item code of the next item; 0 where there is none.
    present : ndarray of shape (K, B), bool
    negatives : ndarray of shape (K, N), int64
        Items drawn uniformly.
    key : tuple of int
        Names the step, for randomness.
    """

    clients: tuple[int, ...]
    histories: IntArray
    targets: IntArray
    present: NDArray[np.bool_]
    negatives: IntArray
    key: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TextModel:
    """A backbone, its adapters' places, and the forms in which it reads items and histories.

    Attributes
    ----------
    backbone : Backbone
    lora : StackedLoRA
    items : TextForm
        Of an item's own text.
    histories : TextForm
    titles : TokenRows
        What the causal model shall write for each item, with the end of the text.
    title_texts : tuple of str
        Of each item.
    pooling : {"mean", "cls", "last"}
    split : SplitLM or None
        Trained through, where layers lie on a server.
    """

    backbone: Backbone
    lora: StackedLoRA
    items: TextForm
    histories: TextForm
    titles: TokenRows
    title_texts: tuple[str, ...]
    pooling: Pooling
    split: SplitLM | None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    def vectors(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Vectors (rows, width) of texts, with the adapters in force around the call."""
        model = self.backbone.model if self.split is None else self.split.client
        return pooled(last_hidden(model, tokens, mask), mask, self.pooling)

    def encode_items(self, adapters: Adapters | None) -> Tensor:
        """Vectors (n_items, width) of all items under one client's adapter, or without any."""
        everything = np.arange(len(self.items.pieces))[:, None]
        with self.lora.using(adapters):
            return encode_texts(
                self.vectors, self.items, everything, self.backbone.width, self.device
            )

    def encode_histories(self, adapters: Adapters | None, histories: IntArray) -> Tensor:
        """Vectors (n, width) of histories (n, H) under one client's adapter."""
        with self.lora.using(adapters):
            return encode_texts(
                self.vectors, self.histories, histories, self.backbone.width, self.device
            )

    def ranking_losses(
        self,
        adapters: Adapters,
        examples: Examples,
        *,
        prior: Tensor,
        shares: Tensor,
        temperature: float,
        corrected: bool = True,
        frozen_items: Tensor | None = None,
        dropout: Sequence[torch.Generator] = (),
    ) -> Tensor:
        """Sum of the ranking losses of each client's examples.

        Parameters
        ----------
        adapters : dict of Tensor of shape (C, ...)
        examples : Examples
        prior : Tensor of shape (C, n_items)
            Added to the score of an item.
        shares : Tensor of shape (C, n_items)
            Share of each item among the client's targets.
        temperature : float
        corrected : bool, default=True
            Whether scores are lowered by how often a candidate is to be expected. If not, an item
            that is often chosen is as often a wrong candidate, and vectors tell how much likelier
            than usual an item is.
        frozen_items : Tensor of shape (C, n_items, width), optional
            Item vectors to rank all items by, which are not trained. Default: those of the
            targets and of `examples.negatives`, which are.
        dropout : sequence of torch.Generator
            One for each of the K clients of the examples.

        Returns
        -------
        Tensor of shape (C,)
        """
        chosen = torch.tensor(examples.clients, device=self.device)
        own = adapters if len(chosen) == len(shares) else select(adapters, chosen)
        n_clients, size = examples.targets.shape
        targets = torch.from_numpy(examples.targets).to(self.device)
        present = torch.from_numpy(examples.present).to(self.device)
        with self.lora.using(own, dropout=dropout):
            queries = self._queries(examples)
            if frozen_items is None:
                items, candidates = self._candidates(examples)
        if frozen_items is None:
            expected = torch.ones_like(candidates, dtype=torch.float32)
            if corrected:
                # By the client's own number of targets, whatever the others in the step have.
                expected = present.sum(1, keepdim=True) * shares[chosen].gather(1, candidates)
                expected = expected + examples.negatives.shape[1] / shares.shape[1]
            losses = ranking_loss(
                queries,
                items,
                targets,
                candidates,
                prior=prior[chosen].gather(1, candidates),
                expected=expected,
                present=present,
                temperature=temperature,
            )
        else:
            scores = queries @ frozen_items[chosen].transpose(1, 2) / temperature
            scores = scores + prior[chosen][:, None]
            each = functional.cross_entropy(
                scores.flatten(0, 1), targets.flatten(), reduction="none"
            )
            losses = torch.where(present, each.view(n_clients, size), 0.0).sum(1)
        return losses.new_zeros(len(shares)).index_add(0, chosen, losses)

    @torch.no_grad()
    def temperature_losses(
        self, adapters: Adapters, examples: Examples, temperatures: Sequence[float]
    ) -> Tensor:
        """Sum of the uncorrected ranking losses of all clients' examples at each temperature.

        Parameters
        ----------
        adapters : dict of Tensor of shape (C, ...)
        examples : Examples
        temperatures : sequence of T floats

        Returns
        -------
        Tensor of shape (T,)
        """
        with self.lora.using(select(adapters, torch.tensor(examples.clients, device=self.device))):
            queries = self._queries(examples)
            items, candidates = self._candidates(examples)
        nothing = torch.zeros_like(candidates, dtype=torch.float32)
        targets = torch.from_numpy(examples.targets).to(self.device)
        present = torch.from_numpy(examples.present).to(self.device)
        losses = [
            ranking_loss(
                queries,
                items,
                targets,
                candidates,
                prior=nothing,
                expected=nothing + 1.0,
                present=present,
                temperature=temperature,
            ).sum()
            for temperature in temperatures
        ]
        return torch.stack(losses)

    def _queries(self, examples: Examples) -> Tensor:
        """Vectors (K, B, width) of the examples' histories, with the adapters in force."""
        vectors = self.vectors(*self._tensors(self.histories, examples.histories))
        return vectors.view(*examples.targets.shape, -1)

    def _candidates(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Vectors (K, B + N, width) and codes (K, B + N) of the targets and the negatives."""
        # Negatives are read first: a client's rows, by which its dropout goes, are then the same
        # however many targets the others have.
        codes = np.concatenate([examples.negatives, examples.targets], axis=1)
        vectors = self.vectors(*self._tensors(self.items, codes.reshape(-1, 1)))
        size = examples.targets.shape[1]
        vectors = vectors.view(*codes.shape, -1).roll(size, dims=1)
        return vectors, torch.from_numpy(np.roll(codes, size, axis=1)).to(self.device)

    def writing_losses(
        self,
        adapters: Adapters,
        examples: Examples,
        *,
        n_clients: int,
        prompt_loss: bool,
        dropout: Sequence[torch.Generator] = (),
    ) -> Tensor:
        """Sum over each client's examples of the mean loss of the tokens of the answer.

        Parameters
        ----------
        adapters : dict of Tensor of shape (C, ...)
        examples : Examples
        n_clients : int
            C.
        prompt_loss : bool
            Whether the tokens of the prompt count as well.
        dropout : sequence of torch.Generator

        Returns
        -------
        Tensor of shape (C,)
        """
        chosen = torch.tensor(examples.clients, device=self.device)
        own = adapters if len(chosen) == n_clients else select(adapters, chosen)
        tokens, mask, is_answer = self._prompts_with_answers(examples)
        model: Any = self.backbone.model if self.split is None else self.split.client
        counted = mask[:, 1:].bool() if prompt_loss else is_answer[:, 1:]
        with self.lora.using(own, dropout=dropout):
            hidden = last_hidden(model, tokens, mask)[:, :-1][counted]  # (T, width)
        losses = functional.cross_entropy(
            _logits(model, hidden).float(), tokens[:, 1:][counted], reduction="none"
        )
        rows = torch.arange(len(tokens), device=self.device)[:, None].expand_as(counted)[counted]
        sums = losses.new_zeros(len(tokens)).index_add(0, rows, losses)
        means = sums / counted.sum(1).clamp_min(1)
        present = torch.from_numpy(examples.present).to(self.device)
        per_client = torch.where(present, means.view(present.shape), 0.0).sum(1)
        return per_client.new_zeros(n_clients).index_add(0, chosen, per_client)

    def prompts(self, histories: IntArray) -> list[list[int]]:
        """Token numbers of the prompts of histories (n, H)."""
        tokens, mask = self.histories.read(histories)
        return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]

    def _tensors(self, form: TextForm, items: IntArray) -> tuple[Tensor, Tensor]:
        tokens, mask = form.read(items)
        return (
            torch.from_numpy(tokens).to(self.device),
            torch.from_numpy(mask).to(self.device).long(),
        )

    def _prompts_with_answers(self, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and mask (rows, L) of prompts with answers, and where the answers are."""
        prompts = self.prompts(examples.histories)
        answers = [self.titles[item].tolist() for item in examples.targets.flatten().tolist()]
        rows = [one + other for one, other in zip(prompts, answers, strict=True)]
        tokens, mask = pad_rows(rows, self.histories.pad, self.device)
        starts = torch.tensor([len(row) for row in prompts], device=self.device)[:, None]
        places = torch.arange(tokens.shape[1], device=self.device)
        return tokens, mask, mask.bool() & (places >= starts)


def open_text_model(
    backbone: Backbone,
    catalogue: Catalogue,
    *,
    inference: Inference,
    pooling: Pooling | Literal["auto"],
    target_modules: Sequence[str] | str,
    rank: int,
    alpha: float,
    dropout: float,
    max_item_tokens: int,
    max_tokens: int,
    n_client_layers: int | None,
) -> TextModel:
    """Tokenise the catalogue and put places for adapters into the backbone.

    Parameters
    ----------
    backbone : Backbone
    catalogue : Catalogue
    inference : {"direct", "generate"}
        Of a causal backbone.
    pooling : {"mean", "cls", "last", "auto"}
        ``"auto"``: the last token where a model only looks back, else the mean.
    target_modules, rank, alpha, dropout
        See `StackedLoRA`.
    max_item_tokens : int
        Tokens of an item's text that are read at most.
    max_tokens : int
        Tokens of a history at most; also limited by what the backbone can read.
    n_client_layers : int or None
        Layers on the client's side, see `SplitLM`; None: the model is in one piece.

    Returns
    -------
    TextModel

    Raises
    ------
    ValueError
        If the backbone cannot read as much as one item needs, or as `StackedLoRA`, `SplitLM`.
    """
    tokenizer = backbone.tokenizer
    head, tail = _special_tokens(tokenizer)
    pad = int(tokenizer.pad_token_id)
    limit = backbone.max_positions
    # Some models count positions from 2 on.
    most = max_tokens if limit is None else min(max_tokens, limit - 2)

    def pieces(texts: Sequence[str], ending: Sequence[int] = ()) -> TokenRows:
        # A title may have "[SEP]" in it, which is no separator there.
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        read = {"truncation": True, "max_length": max_item_tokens}
        rows = tokenizer(list(texts), **plain, **read)["input_ids"]
        return TokenRows.of([[*row, *ending] for row in rows])

    titles = TokenRows.of([])
    if backbone.backend == "encoder":
        texts = pieces(catalogue.texts)
        items = TextForm(texts, head, tail, pad, most)
        histories = TextForm(texts, head, tail, pad, most, newest_first=not backbone.looks_back)
    else:
        quoted = [answer(title) for title in catalogue.titles]
        before, after = prompt([_MARK]).split(answer(_MARK))
        start, end = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)
        )
        comma = tokenizer(_SEPARATOR, add_special_tokens=False)["input_ids"]
        answers = pieces(quoted)
        items = TextForm(answers, head, (), pad, most)
        shown = TokenRows.of(
            [[*comma, *row] for row in map(answers.__getitem__, range(len(quoted)))]
        )
        room = most
        if inference == "generate":
            titles = pieces(quoted, [tokenizer.eos_token_id])
            room = most - int(titles.lengths.max(initial=0))
        histories = TextForm(
            shown, (*head, *start), tuple(end), pad, room, newest_first=False, between=len(comma)
        )
    needed = len(histories.head) + len(histories.tail) + 1
    if histories.max_tokens < needed:
        raise ValueError(
            f"A history may have {histories.max_tokens} tokens, but {needed} are needed for the "
            "shortest one. Raise max_tokens, or take a backbone that reads more."
        )
    lora = StackedLoRA(
        backbone.model, target_modules=target_modules, rank=rank, alpha=alpha, dropout=dropout
    )
    split = None
    if n_client_layers is not None:
        split = SplitLM.split(backbone.model, backbone.layers_path, n_client_layers)
    if pooling == "auto":
        pooling = "last" if backbone.looks_back else "mean"
    return TextModel(backbone, lora, items, histories, titles, catalogue.titles, pooling, split)


def _special_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """Apply a causal model's head, as its own forward pass does."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    scale = getattr(config, "logit_scale", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale:
        logits = logits * scale
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits  # type: ignore[no-any-return]
