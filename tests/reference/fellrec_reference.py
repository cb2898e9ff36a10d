"""FELLRec one client, one example and one candidate at a time.

for each round, for each client c that is due:
    write c's adapter into a copy of the frozen model that PEFT has wrapped
    for each step of c's plan:
        for each micro-batch: backward from  sum of the examples' losses / examples of the step
        add mu (theta - anchor) to the gradient, one step of torch's AdamW
then mix as in `dynamic_balance_reference`.

Texts are read by the tokenizer, one at a time and without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedrecsk.data.prompts import answer, prompt
from fedrecsk.models.backbone import Backbone, load_backbone
from tests.reference.dynamic_balance_reference import Client, fedavg_row, mixed
from tests.reference.lora_reference import adapter_of, peft_model

RANK, ALPHA = 2, 4.0
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
N_LAYERS = 3
# History, the oldest item first, and the next item.
Example = tuple[list[int], int]
# Examples of a micro-batch, and the items drawn as negatives.
MicroBatch = tuple[list[Example], list[int]]
Losses = Callable[[nn.Module, MicroBatch], list[Tensor]]


def tiny_tokenizer(texts: Sequence[str], *, ends: bool) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the words of some texts; `ends` puts a token behind."""
    splitter = BertPreTokenizer()
    words = [word for text in texts for word, _ in splitter.pre_tokenize_str(text)]
    numbers = {word: place for place, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    core = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    core.pre_tokenizer = splitter
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]" if ends else "[CLS] $A",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def tiny_backbone(backend: str, titles: Sequence[str], *, decoder: bool | None = None) -> Backbone:
    """Make a small model with random weights that are large enough to matter."""
    decoder = backend == "causal" if decoder is None else decoder
    tokenizer = tiny_tokenizer([prompt(["", ""]), *titles], ends=not decoder)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3,
    }  # fmt: skip
    if decoder:
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return load_backbone(lambda: (model, tokenizer), backend=backend, device="cpu")


@dataclass(frozen=True)
class Reader:
    """How a model reads items and histories; items are known by title and text."""

    backbone: Backbone
    titles: Sequence[str]
    texts: Sequence[str]

    def tokens(self, text: str, *more: int) -> Tensor:
        return torch.tensor([*self.backbone.tokenizer(text)["input_ids"], *more])

    def item(self, item: int) -> Tensor:
        if self.backbone.backend == "causal":
            return self.tokens(answer(self.titles[item]))
        return self.tokens(self.texts[item])

    def history(self, items: Sequence[int]) -> Tensor:
        if self.backbone.backend == "causal":
            return self.tokens(prompt([self.titles[item] for item in items]))
        order = items if self.backbone.looks_back else items[::-1]
        return self.tokens(" ".join(self.texts[item] for item in order))

    def with_answer(self, items: Sequence[int], target: int) -> tuple[Tensor, int]:
        """Tokens of a prompt and its answer, and how many of them are the prompt's."""
        text = prompt([self.titles[item] for item in items])
        whole = self.tokens(text + answer(self.titles[target]), 3)
        return whole, len(self.tokens(text))

    def vector(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Vector of one text."""
        hidden = model(input_ids=tokens[None], output_hidden_states=True).hidden_states[-1][0]
        found = hidden[-1] if self.backbone.looks_back else hidden.mean(0)
        return found / found.norm()


@dataclass(frozen=True)
class Popularity:
    """How often one client has chosen each item."""

    counts: list[int]
    weight: float
    lift: bool = False  # the loss then knows nothing of popularity

    def prior(self, item: int) -> float:
        if self.lift:
            return 0.0
        return self.weight * math.log(1 + self.counts[item])

    def expected(self, item: int, n_targets: int, n_negatives: int) -> float:
        if self.lift:
            return 1.0
        share = self.counts[item] / sum(self.counts)
        return n_targets * share + n_negatives / len(self.counts)


def in_batch_losses(reader: Reader, popularity: Popularity, temperature: float) -> Losses:
    """Rank the target among the other targets of the micro-batch and the negatives."""

    def losses(model: nn.Module, batch: MicroBatch) -> list[Tensor]:
        examples, negatives = batch
        targets = [target for _, target in examples]
        vectors = {item: reader.vector(model, reader.item(item)) for item in {*targets, *negatives}}
        found = []
        for place, (history, target) in enumerate(examples):
            query = reader.vector(model, reader.history(history))
            candidates = [target]
            candidates += [
                item
                for other, item in enumerate([*targets, *negatives])
                if other != place and item != target
            ]
            scores = [
                query.dot(vectors[item]) / temperature
                + popularity.prior(item)
                - math.log(popularity.expected(item, len(targets), len(negatives)))
                for item in candidates
            ]
            found.append(torch.stack(scores).logsumexp(0) - scores[0])
        return found

    return losses


def catalogue_losses(
    reader: Reader, popularity: Popularity, temperature: float, vectors: Sequence[Tensor]
) -> Losses:
    """Rank the target among all items, whose vectors are those before the training."""

    def losses(model: nn.Module, batch: MicroBatch) -> list[Tensor]:
        found = []
        for history, target in batch[0]:
            query = reader.vector(model, reader.history(history))
            scores = [
                query.dot(vector) / temperature + popularity.prior(item)
                for item, vector in enumerate(vectors)
            ]
            found.append(torch.stack(scores).logsumexp(0) - scores[target])
        return found

    return losses


def writing_losses(reader: Reader, *, prompt_loss: bool) -> Losses:
    """Write the answer token by token."""

    def losses(model: nn.Module, batch: MicroBatch) -> list[Tensor]:
        found = []
        for history, target in batch[0]:
            tokens, n_prompt = reader.with_answer(history, target)
            logits = model(input_ids=tokens[None]).logits[0]
            first = 1 if prompt_loss else n_prompt
            each = [-logits[k - 1].log_softmax(0)[tokens[k]] for k in range(first, len(tokens))]
            found.append(torch.stack(each).mean())
        return found

    return losses


def wrapped_by_peft(model: nn.Module, like: Client) -> PeftModel:
    """Wrap a copy of the frozen model, with places for adapters of these names."""
    targets = sorted({name.rsplit(".", 1)[0] for name in like})
    return peft_model(model, like, targets, rank=RANK, alpha=ALPHA)


def train_locally(
    wrapped: PeftModel,
    holds: Client,
    steps: Sequence[Sequence[MicroBatch]],
    losses_from: Callable[[nn.Module], Losses],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    anchor: Client | None = None,
    proximal: float = 0.0,
) -> tuple[Client, float | None]:
    """Train one client; `losses_from` gets the model as the client starts from it."""
    if not steps:
        return holds, None
    places = dict(wrapped.named_parameters())
    trained = {name: places[f"base_model.model.{name}.default.weight"] for name in holds}
    with torch.no_grad():
        for name, value in holds.items():
            trained[name].copy_(value)
        losses_of = losses_from(wrapped)
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=weight_decay)
    seen: list[float] = []
    for step in steps:
        number = sum(len(examples) for examples, _ in step)
        optimizer.zero_grad()
        for batch in step:
            losses = losses_of(wrapped, batch)
            (torch.stack(losses).sum() / number).backward()
            seen += [loss.item() for loss in losses]
        for name, value in (anchor or {}).items():
            trained[name].grad += proximal * (trained[name].detach() - value)
        optimizer.step()
    return adapter_of(wrapped, holds), sum(seen) / len(seen)


def ditto(
    start: Client,
    train: Callable[[int, int, Client, Client | None], Client],
    n_examples: Sequence[float],
    n_rounds: int,
) -> tuple[list[Client], Client]:
    """Train a shared adapter as in FedAvg, and personal ones that are pulled to it.

    `train` takes round, client, what it starts from, and what it is pulled to. Returns the
    personal adapters and the shared one.
    """
    shared, personal = start, [start for _ in n_examples]
    for t in range(n_rounds):
        sent = [train(t, c, shared, None) for c in range(len(n_examples))]
        personal = [train(t, c, personal[c], shared) for c in range(len(n_examples))]
        shared = mixed(sent, fedavg_row(n_examples, [1.0 for _ in n_examples]))
    return personal, shared
