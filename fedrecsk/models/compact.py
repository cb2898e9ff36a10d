"""A small language model made from the item texts alone, for use without any download.

    words      the most frequent words of the texts, each a token
    vectors    of words: singular vectors of the item x word matrix, weighted by rarity (LSA)
    model      a few transformer layers over them, BERT-like or Llama-like
    training   two random halves of a text shall find each other among other texts (the vector of a
               text is what the recommender ranks by); the causal model predicts next words as well

Item texts are public, so the server does all this before the first round, and no user's data are
in it. Afterwards the model is frozen; clients train adapters on top of it, as they would on a
downloaded one.

Latent semantic analysis: S. Deerwester et al. (1990), "Indexing by Latent Semantic Analysis".
Contrastive training on two views of one text: T. Gao, X. Yao and D. Chen (2021), "SimCSE".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedrecsk.engine.streams import Streams
from fedrecsk.models.text_vectors import TokenRows, pad_rows, pooled

WIDTH = 128
N_LAYERS = 2
N_HEADS = 4
MAX_WORDS = 8_000
MAX_POSITIONS = 1_024
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

# Of the training; found on the validation rows of two real catalogues.
BATCH = 256
TEMPERATURE = 0.05
LEARNING_RATE = 1e-3
KEPT_WORDS = 0.6
# Long texts are padding for the others in a batch; the first words of a part tell it apart.
MOST_WORDS = 16
PASSES = 5
# Texts of a batch whose next words the causal model predicts; a softmax over all words costs
# more than the rest of the step.
READ_ON = 64
MIN_STEPS, MAX_STEPS = 60, 200

Backend = Literal["causal", "encoder"]


@dataclass(frozen=True, eq=False)
class CompactState:
    """What a compact model is made of, in NumPy and plain Python.

    Attributes
    ----------
    backend : {"causal", "encoder"}
    words : tuple of str
        The tokens, in the order of their numbers.
    weights : dict of str to ndarray
        The model's parameters by name.
    """

    backend: Backend
    words: tuple[str, ...]
    weights: dict[str, NDArray[np.float32]]


def build_compact(
    texts: Sequence[str],
    *,
    backend: Backend,
    streams: Streams,
    other_texts: Sequence[str] = (),
) -> CompactState:
    """Make and pre-train a compact model from item texts.

    Parameters
    ----------
    texts : sequence of str
        One an item.
    backend : {"causal", "encoder"}
        A Llama-like model of next words, or a BERT-like model of whole texts.
    streams : Streams
        Of randomness.
    other_texts : sequence of str, default=()
        Texts whose words shall be known as well, such as an instruction.

    Returns
    -------
    CompactState

    Examples
    --------
    >>> from fedrecsk.engine.streams import Streams
    >>> from fedrecsk.models.compact import build_compact, open_compact
    >>> state = build_compact(
    ...     ["red robot", "blue robot", "red wizard"], backend="encoder", streams=Streams(0))
    >>> model, tokenizer = open_compact(state)
    >>> tokenizer.tokenize("A red wizard")
    ['[UNK]', 'red', 'wizard']
    """
    words = _words(texts, other_texts)
    model, tokenizer = _empty(backend, words)
    generator = streams.torch("compact")
    _draw(model, generator)
    read = {"truncation": True, "max_length": MAX_POSITIONS}
    rows = TokenRows.of(tokenizer(list(texts), add_special_tokens=False, **read)["input_ids"])
    _start_from_lsa(model, rows, len(words), streams)
    _train(model, rows, tokenizer, backend, streams)
    weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    return CompactState(backend, tuple(words), weights)


def open_compact(state: CompactState) -> tuple[Any, Any]:
    """Give the model and the tokenizer (transformers' classes) of a compact model."""
    model, tokenizer = _empty(state.backend, list(state.words))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.weights.items()})
    return model.eval(), tokenizer


def _words(texts: Sequence[str], other_texts: Sequence[str]) -> list[str]:
    """List the special tokens, the words of the other texts and the most frequent of the texts."""
    split = _splitter()
    counts: dict[str, int] = {}
    for text in texts:
        for word in split(text):
            counts[word] = counts.get(word, 0) + 1
    first = dict.fromkeys([*SPECIAL, *(word for text in other_texts for word in split(text))])
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    return list(dict.fromkeys([*first, *frequent]))[: MAX_WORDS + len(first)]


def _splitter() -> Any:
    """Give a function from a text to its words, the way that the tokenizer splits."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()

    def split(text: str) -> list[str]:
        pieces = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        return [word for word, _ in pieces]

    return split


def _empty(backend: Backend, words: list[str]) -> tuple[Any, Any]:
    """Make an untrained model and its tokenizer; the caller's random state stays as it was."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    numbers = {word: number for number, word in enumerate(words)}
    pad, unknown, start, end = (numbers[token] for token in SPECIAL)
    core = Tokenizer(WordLevel(numbers, unk_token=SPECIAL[unknown]))
    core.normalizer = BertNormalizer(lowercase=True)
    core.pre_tokenizer = BertPreTokenizer()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]" if backend == "encoder" else "[CLS] $A",
        special_tokens=[("[CLS]", start), ("[SEP]", end)],
    )
    names = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True),
        bos_token=SPECIAL[start],
        eos_token=SPECIAL[end],
    )
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=core, model_max_length=MAX_POSITIONS, **names)
    shape: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": pad,
    }
    with torch.random.fork_rng(devices=[]):
        if backend == "encoder":
            config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            model: Any = BertModel(config, add_pooling_layer=False)
        else:
            ends: dict[str, Any] = {
                "bos_token_id": start,
                "eos_token_id": end,
                "tie_word_embeddings": True,
            }
            model = LlamaForCausalLM(LlamaConfig(**shape, **ends))
    model.set_attn_implementation("eager")  # the faster one for short texts on a CPU
    return model, tokenizer


@torch.no_grad()
def _draw(model: Any, generator: torch.Generator) -> None:
    """Draw all matrices anew, so that the start is a function of the seed."""
    for value in model.parameters():
        if value.dim() > 1:
            value.normal_(0.0, 0.02, generator=generator)


@torch.no_grad()
def _start_from_lsa(model: Any, rows: TokenRows, n_words: int, streams: Streams) -> None:
    """Start the words' vectors from the singular vectors of the weighted item x word matrix."""
    from sklearn.decomposition import TruncatedSVD

    counts = sp.csr_array(
        (np.ones(len(rows.tokens)), (rows.owners(), rows.tokens)), shape=(len(rows), n_words)
    )
    counts.sum_duplicates()
    counts.data = 1.0 + np.log(counts.data)
    owners = np.bincount(counts.indices, minlength=n_words)
    rarity = np.log((1.0 + len(rows)) / (1.0 + owners))
    weighted = counts @ sp.diags_array(rarity)
    width = min(WIDTH, n_words - 1, len(rows))
    if width < 2 or not weighted.count_nonzero():
        return  # one text, or texts that are all alike, have no likeness to start from
    seed = int(streams.numpy("lsa").integers(2**31 - 1))
    found = TruncatedSVD(width, random_state=seed).fit(weighted)
    vectors = found.components_.T * np.sqrt(found.singular_values_)
    length = np.linalg.norm(vectors, axis=1).mean()
    if length > 0:
        # Twice the length of a random start: texts keep their likeness through random layers.
        vectors *= 2 * 0.02 * math.sqrt(WIDTH) / length
    table = model.get_input_embeddings().weight
    table[len(SPECIAL) :, :width] = torch.from_numpy(vectors[len(SPECIAL) :]).to(table)
    table[len(SPECIAL) :, width:] = 0.0


def _train(model: Any, rows: TokenRows, tokenizer: Any, backend: Backend, streams: Streams) -> None:
    """Let two random parts of a text find each other; the causal model also predicts words."""
    if len(rows) < 2:
        return
    rng = streams.numpy("compact")
    size = min(BATCH, len(rows))
    n_steps = int(np.clip(math.ceil(PASSES * len(rows) / size), MIN_STEPS, MAX_STEPS))
    start, end, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    tail = [end] if backend == "encoder" else []

    def part(row: NDArray[np.int64]) -> list[int]:
        kept = rng.random(len(row)) < KEPT_WORDS
        if len(row) and not kept.any():
            kept[rng.integers(len(row))] = True
        return [start, *row[kept][:MOST_WORDS].tolist(), *tail]

    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    labels = torch.arange(size)
    for step in range(n_steps):
        chosen = [rows[number] for number in rng.choice(len(rows), size, replace=False)]
        one, other = (
            _vectors(model, [part(row) for row in chosen], pad, backend) for _ in range(2)
        )
        loss = functional.cross_entropy(one @ other.T / TEMPERATURE, labels)
        if backend == "causal":
            whole = [[start, *row[:MOST_WORDS].tolist(), end] for row in chosen[:READ_ON]]
            loss = loss + _next_word_loss(model, whole, pad)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / n_steps)
        optimizer.step()
    model.eval().requires_grad_(False)


def _vectors(model: Any, texts: list[list[int]], pad: int, backend: Backend) -> Tensor:
    tokens, mask = pad_rows(texts, pad)
    body = model if backend == "encoder" else model.base_model
    hidden = body(input_ids=tokens, attention_mask=mask).last_hidden_state
    return pooled(hidden, mask, "mean" if backend == "encoder" else "last")


def _next_word_loss(model: Any, texts: list[list[int]], pad: int) -> Tensor:
    """Mean cross-entropy of the next token over the tokens of texts."""
    tokens, mask = pad_rows(texts, pad)
    hidden = model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
    followed = mask[:, 1:].bool()  # padding is on the right
    logits = model.get_output_embeddings()(hidden[:, :-1][followed])
    return functional.cross_entropy(logits, tokens[:, 1:][followed])
