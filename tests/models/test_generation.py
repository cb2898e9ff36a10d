"""Writing and grounding titles, against the same for one text at a time without padding."""

import itertools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedrecsk.models import generation
from fedrecsk.models.backbone import load_backbone
from fedrecsk.models.generation import embed_last_token, generate_titles, ground, inject_popularity
from fedrecsk.models.stacked_lora import StackedLoRA

SPECIAL = ["[PAD]", "<s>", "</s>", '"']
WORDS = [*SPECIAL, *(f"w{number}" for number in range(20))]
PAD, BOS, EOS, QUOTE = range(4)
LIMIT = 48


def make_tokenizer():
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="<s>", eos_token="</s>"
    )


def make_backbone(kind):
    shape = {"vocab_size": len(WORDS), "initializer_range": 0.4}

    def build():
        if kind == "llama":
            config = LlamaConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                max_position_embeddings=LIMIT, bos_token_id=BOS, eos_token_id=EOS, **shape,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
        elif kind == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=LIMIT, **shape)
            )
        else:
            config = BertConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                max_position_embeddings=LIMIT, **shape,
            )  # fmt: skip
            return BertModel(config), make_tokenizer()
        return model, make_tokenizer()

    backend = "encoder" if kind == "bert" else "causal"
    return load_backbone(build, backend=backend, device="cpu", seed=1)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def backbone(request):
    return make_backbone(request.param)


def make_prompts(n=13, seed=0):
    rng = np.random.default_rng(seed)
    return [[BOS, *rng.integers(4, len(WORDS), rng.integers(1, 12)).tolist()] for _ in range(n)]


def words_of(tokens):
    """Read tokens as `generate_titles` promises to."""
    tokens = list(itertools.takewhile(lambda token: token != EOS, tokens))
    if tokens and tokens[0] == QUOTE:
        tokens = list(itertools.takewhile(lambda token: token != QUOTE, tokens[1:]))
    elif QUOTE in tokens:
        tokens = tokens[: tokens.index(QUOTE)]
    return " ".join(WORDS[token] for token in tokens if token not in (PAD, BOS))


@torch.no_grad()
def log_probabilities(backbone, tokens):
    """Score the next token after a text, read alone, without padding and without a cache."""
    return backbone.model(torch.tensor([tokens])).logits[0, -1].log_softmax(0)


def greedy(backbone, prompt, max_new_tokens):
    tokens = []
    for _ in range(max_new_tokens):
        tokens.append(int(log_probabilities(backbone, prompt + tokens).argmax()))
        if tokens[-1] == EOS:
            break
    return tokens


def all_continuations(backbone, prompt, max_new_tokens):
    """Find the best text up to the end, of all there are, by its mean log-probability."""
    best, growing = [], [(0.0, [])]
    for _ in range(max_new_tokens):
        grown = []
        for score, tokens in growing:
            scores = log_probabilities(backbone, prompt + tokens).tolist()
            for token, more in enumerate(scores):
                place = best if token == EOS else grown
                place.append((score + more, [*tokens, token]))
        growing = grown
    return max((score / len(tokens), tokens) for score, tokens in best + growing)[1]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_one_beam_is_the_likeliest_token_each_time(backbone, batch_size):
    prompts = make_prompts()
    expected = [words_of(greedy(backbone, prompt, 6)) for prompt in prompts]
    found = generate_titles(backbone, prompts, num_beams=1, max_new_tokens=6, batch_size=batch_size)
    assert found == expected
    assert len(set(found)) > 3


def test_enough_beams_find_the_best_text(backbone):
    prompts = make_prompts(4)
    expected = [words_of(all_continuations(backbone, prompt, 2)) for prompt in prompts]
    found = generate_titles(backbone, prompts, num_beams=len(WORDS), max_new_tokens=2)
    assert found == expected


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_do_not_depend_on_the_batch(backbone, num_beams):
    prompts = make_prompts(11)
    options = {"num_beams": num_beams, "max_new_tokens": 6}
    alone = [generate_titles(backbone, [prompt], **options)[0] for prompt in prompts]
    state = torch.get_rng_state()
    for batch_size in (3, 16):
        assert generate_titles(backbone, prompts, batch_size=batch_size, **options) == alone
    order = np.random.default_rng(0).permutation(len(prompts))
    moved = generate_titles(backbone, [prompts[place] for place in order], **options)
    assert moved == [alone[place] for place in order]
    assert torch.equal(torch.get_rng_state(), state)


def test_titles_are_read_out_of_quotes(backbone, monkeypatch):
    """The model writes a title in quotes, ends, and is padded."""
    written = torch.tensor([[QUOTE, 5, 6, QUOTE, 7, EOS, PAD], [QUOTE, 8, EOS, PAD, PAD, PAD, PAD]])

    def generate(input_ids, **options):
        return torch.cat([input_ids, written], 1)

    monkeypatch.setattr(backbone.model, "generate", generate)
    assert generate_titles(backbone, [[BOS, 4], [BOS]]) == ["w1 w2", "w4"]


def test_the_adapter_in_force_writes(backbone):
    lora = StackedLoRA(backbone.model, target_modules="auto", rank=2, alpha=40)
    adapters = lora.init(1, torch.Generator().manual_seed(0))
    for name, value in adapters.items():
        if name.endswith("lora_B"):
            value.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    prompts = make_prompts()
    plain = generate_titles(backbone, prompts, num_beams=3, max_new_tokens=6, batch_size=5)
    with lora.using(adapters):
        adapted = generate_titles(backbone, prompts, num_beams=3, max_new_tokens=6, batch_size=5)
        alone = [
            generate_titles(backbone, [prompt], num_beams=3, max_new_tokens=6)[0]
            for prompt in prompts
        ]
        one_beam = generate_titles(backbone, prompts, num_beams=1, max_new_tokens=6)
        expected = [words_of(greedy(backbone, prompt, 6)) for prompt in prompts]
    again = generate_titles(backbone, prompts, num_beams=3, max_new_tokens=6, batch_size=5)
    lora.restore()
    assert adapted == alone
    assert one_beam == expected
    assert adapted != plain == again


def test_what_cannot_be_written(backbone):
    assert generate_titles(backbone, []) == []
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        generate_titles(backbone, [[BOS], []])
    with pytest.raises(ValueError, match=r"prompt has 40 tokens and its title up to 9, .* 48"):
        generate_titles(backbone, [[BOS] * 40], max_new_tokens=9)
    assert generate_titles(backbone, [[BOS] * 40], max_new_tokens=8) != []
    with pytest.raises(ValueError, match="loaded as an encoder, which cannot write"):
        generate_titles(make_backbone("bert"), [[BOS]])


TEXTS = ["w1", "w2 w3 w4 w5 w6 w7", "", "w3 w2", "w1 w2 w3", "w1 w2 w4", "unheard of words"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_vectors_are_those_of_each_text_alone(kind, batch_size):
    backbone = make_backbone(kind)
    found = embed_last_token(backbone, TEXTS, batch_size=batch_size)
    assert found.shape == (len(TEXTS), 16)
    assert found.dtype == torch.float32
    for vector, text in zip(found, TEXTS, strict=True):
        ids = torch.tensor([backbone.tokenizer(text)["input_ids"]])
        hidden = backbone.model(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(vector, hidden[0, -1], rtol=1e-5, atol=1e-5)


def test_long_texts_are_cut(backbone):
    long = " ".join(["w1 w2 w3"] * 40)
    cut = embed_last_token(backbone, [long, " ".join(long.split()[: LIMIT - 1])])
    torch.testing.assert_close(cut[0], cut[1])
    short = embed_last_token(backbone, [long, "w1 w2"], max_length=3)
    torch.testing.assert_close(short[0], short[1])


def test_texts_without_a_token():
    """A tokenizer that adds nothing gives no tokens to an empty text."""
    backbone = make_backbone("llama")
    backbone.tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    found = embed_last_token(backbone, ["w1", ""])
    expected = backbone.model(torch.tensor([[PAD]]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found[1], expected[0, 0])
    assert embed_last_token(backbone, []).shape == (0, 16)


def test_distances_of_states_far_from_the_origin(monkeypatch):
    monkeypatch.setattr(generation, "_CELLS_AT_ONCE", 100)
    rng = torch.Generator().manual_seed(0)
    offset = 1000 * torch.randn(24, generator=rng)
    titles = offset + torch.randn(37, 24, generator=rng)
    generated = torch.cat([titles[[5, 9]], offset + torch.randn(11, 24, generator=rng)])
    expected = [
        [-float(np.linalg.norm(one - other)) for other in titles.double().numpy()]
        for one in generated.double().numpy()
    ]
    found = ground(generated, titles)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-4)
    assert found.argmax(1)[:2].tolist() == [5, 9]


@pytest.mark.parametrize("n", [0, 1])
def test_distances_of_few(n):
    assert ground(torch.ones(n, 3), torch.ones(1, 3)).tolist() == [[0.0]] * n


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_popularity_is_injected(gamma):
    rng = np.random.default_rng(0)
    distance, popularity = rng.gamma(2.0, size=(5, 9)), rng.integers(0, 50, 9)
    expected = np.empty((5, 9))
    low, high = popularity.min(), popularity.max()
    for row, column in itertools.product(range(5), range(9)):
        near, far = min(distance[row]), max(distance[row])
        scaled = (distance[row, column] - near) / (far - near)
        expected[row, column] = -scaled * (1 + (popularity[column] - low) / (high - low)) ** -gamma
    found = inject_popularity(torch.tensor(distance), torch.tensor(popularity), gamma)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    if gamma == 0.0:
        assert (found.argsort(1) == torch.tensor(-distance).argsort(1)).all()


def test_popularity_of_equals():
    """Where all are equally near, or equally popular, there is nothing to tell them by."""
    equal = inject_popularity(torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0]), 1.0)
    assert equal.abs().tolist() == [[0.0] * 3] * 2
    distance = torch.tensor([[1.0, 2.0, 3.0]])
    assert inject_popularity(distance, torch.ones(3), 5.0).tolist() == [[-0.0, -0.5, -1.0]]


def test_popularity_that_does_not_fit():
    with pytest.raises(ValueError, match="gamma must not be negative, got -1"):
        inject_popularity(torch.ones(1, 3), torch.ones(3), -1)
    with pytest.raises(ValueError, match=r"distances to 3 items, but popularities of shape \(2,\)"):
        inject_popularity(torch.ones(1, 3), torch.ones(2), 1)
