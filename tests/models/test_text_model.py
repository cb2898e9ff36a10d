import numpy as np
import pytest
import torch

from fedrecsk.data.prompts import Catalogue, answer, prompt
from fedrecsk.data.vocabulary import Vocabulary
from fedrecsk.engine.streams import Streams
from fedrecsk.models import compact, text_vectors
from fedrecsk.models.backbone import load_backbone
from fedrecsk.models.stacked_lora import select
from fedrecsk.models.text_model import Examples, open_text_model
from tests.reference.fellrec_reference import ALPHA, RANK, Reader, tiny_backbone

# The last is longer than what is read of an item.
TITLES = (
    "Red Robot",
    "The Blue Wizard: Part 2",
    "Castle",
    "Dragon's 'Night', again",
    "Castle",
    "one two three four five six seven eight nine ten",
)
TEXTS = tuple(f"title: {title} brand: Acme {place}" for place, title in enumerate(TITLES))
MOST_ITEM_TOKENS = 20


def catalogue_of(titles=TITLES, texts=TEXTS):
    return Catalogue(Vocabulary(np.arange(len(titles))), tuple(titles), tuple(texts))


def opened(backbone, catalogue=None, **changed):
    settings = {
        "inference": "direct",
        "pooling": "auto",
        "target_modules": "auto",
        "rank": RANK,
        "alpha": ALPHA,
        "dropout": 0.0,
        "max_item_tokens": MOST_ITEM_TOKENS,
        "max_tokens": 256,
        "n_client_layers": None,
    }
    return open_text_model(backbone, catalogue or catalogue_of(), **{**settings, **changed})


@pytest.fixture(scope="module")
def untrained():
    """Compact backbones of either kind, hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "MIN_STEPS", 1)
        patch.setattr(compact, "MAX_STEPS", 1)
        found = {}
        for backend in ("encoder", "causal"):
            state = compact.build_compact(
                TEXTS, backend=backend, streams=Streams(0), other_texts=[prompt(["", ""])]
            )
            found[backend] = load_backbone(
                lambda state=state: compact.open_compact(state), backend=backend, device="cpu"
            )
    return found


def histories_of(n, width, n_items=6, seed=0):
    """Rows of item codes, the oldest first, and as the model takes them."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, n_items, rng.integers(0, width + 1)).tolist() for _ in range(n)]
    return rows, np.array([row[::-1] + [-1] * (width - len(row)) for row in rows])


def texts_read(form, codes):
    tokens, mask = form.read(codes)
    return [row[there].tolist() for row, there in zip(tokens, mask, strict=True)]


@pytest.mark.parametrize("inference", ["direct", "generate"])
def test_a_causal_model_reads_the_prompt_as_its_tokenizer_writes_it(untrained, inference):
    tokenizer = untrained["causal"].tokenizer
    model = opened(untrained["causal"], inference=inference)
    rows, codes = histories_of(40, 4)
    expected = [
        tokenizer(prompt([TITLES[item] for item in row]))["input_ids"] for row in [*rows, []]
    ]
    codes = np.concatenate([codes, np.full((1, 4), -1)])
    assert model.prompts(codes) == texts_read(model.histories, codes) == expected
    assert tokenizer.unk_token_id not in expected[-1]
    everything = np.arange(len(TITLES))[:, None]
    answers = [tokenizer(answer(title), add_special_tokens=False)["input_ids"] for title in TITLES]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert texts_read(model.items, everything) == [[start, *tokens] for tokens in answers]
    if inference == "generate":
        written = [model.titles[item].tolist() for item in range(len(TITLES))]
        assert written == [[*tokens, end] for tokens in answers]


def test_an_encoder_reads_texts_the_newest_first(untrained):
    tokenizer = untrained["encoder"].tokenizer
    model = opened(untrained["encoder"])
    rows, codes = histories_of(40, 4)
    expected = [tokenizer(" ".join(TEXTS[item] for item in row[::-1]))["input_ids"] for row in rows]
    assert texts_read(model.histories, codes) == expected
    everything = np.arange(len(TEXTS))[:, None]
    assert texts_read(model.items, everything) == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len(model.titles) == 0


def test_a_history_too_long_loses_the_oldest(untrained):
    tokenizer = untrained["causal"].tokenizer
    most = len(tokenizer(prompt([]))["input_ids"]) + 16
    model = opened(untrained["causal"], max_tokens=most)
    rows, codes = histories_of(60, 5, n_items=5)
    lost = 0
    for row, tokens in zip(rows, texts_read(model.histories, codes), strict=True):
        whole = [
            tokenizer(prompt([TITLES[item] for item in row[start:]]))["input_ids"]
            for start in range(len(row) + 1)
        ]
        fitting = next(text for text in whole if len(text) <= most)
        assert tokens == fitting
        lost += fitting != whole[0]
    assert lost > 5


def test_long_texts_are_cut(untrained):
    for backend in ("encoder", "causal"):
        tokenizer = untrained[backend].tokenizer
        model = opened(untrained[backend], max_item_tokens=3, inference="direct")
        text = TEXTS[5] if backend == "encoder" else answer(TITLES[5])
        first = tokenizer(text, add_special_tokens=False)["input_ids"][:3]
        tokens = texts_read(model.items, np.array([[5]]))[0]
        special = 2 if backend == "encoder" else 1
        assert len(tokens) == 3 + special
        assert tokens[1:4] == first
    model = opened(untrained["causal"], max_item_tokens=3, inference="generate")
    assert model.titles.lengths.max() == 4
    assert model.titles[5][-1] == untrained["causal"].tokenizer.eos_token_id


@pytest.mark.parametrize("backend", ["encoder", "causal"])
def test_special_tokens_in_titles_are_text(untrained, backend):
    titles = ("Red [SEP] Robot [PAD]", "Castle")
    model = opened(untrained[backend], catalogue_of(titles, titles))
    _, mask = model.items.read(np.array([[0]]))
    special = untrained[backend].tokenizer.all_special_ids
    pieces = model.items.pieces[0].tolist()
    unknown = untrained[backend].tokenizer.unk_token_id
    assert not set(pieces) & (set(special) - {unknown})
    assert mask.all()


def test_prompts_with_answers_stay_within_what_the_model_reads(untrained):
    backbone = untrained["causal"]
    empty = len(backbone.tokenizer(prompt([]))["input_ids"])
    longest = max(len(backbone.tokenizer(answer(title))["input_ids"]) for title in TITLES)
    model = opened(backbone, inference="generate", max_tokens=empty + longest + 6)
    _, codes = histories_of(30, 4)
    targets = np.arange(30).reshape(3, 10) % len(TITLES)
    present = np.ones((3, 10), dtype=bool)
    nothing = np.zeros((3, 0), dtype=np.int64)
    examples = Examples((0, 1, 2), codes, targets, present, nothing, (0,))
    tokens, mask, is_answer = model._prompts_with_answers(examples)
    assert tokens.shape[1] <= empty + longest + 6
    for place, item in enumerate(targets.flatten()):
        own = tokens[place][mask[place].bool()].tolist()
        said = tokens[place][is_answer[place]].tolist()
        assert said == model.titles[item].tolist()
        assert own == model.prompts(codes[place : place + 1])[0] + said


def test_no_room_for_a_history(untrained):
    needed = len(untrained["causal"].tokenizer(prompt([]))["input_ids"]) + 1
    assert opened(untrained["causal"], max_tokens=needed).histories.max_tokens == needed
    message = rf"may have {needed - 1} tokens, but {needed} are needed.*Raise max_tokens"
    with pytest.raises(ValueError, match=message):
        opened(untrained["causal"], max_tokens=needed - 1)
    longest = 13  # a title with quotes and the end
    with pytest.raises(ValueError, match="Raise max_tokens"):
        opened(untrained["causal"], max_tokens=needed + longest - 1, inference="generate")
    opened(untrained["causal"], max_tokens=needed + longest, inference="generate")
    with pytest.raises(ValueError, match="may have 2 tokens, but 3 are needed"):
        opened(untrained["encoder"], max_tokens=2)


def test_what_the_backbone_can_read_bounds_the_texts(untrained):
    # Two positions less: some models begin to count at the number of the pad token.
    most = compact.MAX_POSITIONS - 2
    for backend in ("encoder", "causal"):
        model = opened(untrained[backend], max_tokens=10**6)
        assert model.histories.max_tokens == model.items.max_tokens == most


KINDS = {
    "encoder": {"backend": "encoder"},
    "decoder as encoder": {"backend": "encoder", "decoder": True},
    "causal": {"backend": "causal"},
}


def small(kind, **changed):
    """A small model with random adapters of two clients."""
    titles = [title.split(":")[0] for title in TITLES[:5]]
    backbone = tiny_backbone(**KINDS[kind], titles=titles)
    model = opened(backbone, catalogue_of(titles, titles), **changed)
    adapters = model.lora.init(2, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    adapters = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in adapters.items()
    }
    return model, adapters, Reader(backbone, titles, titles)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_client_layers", [None, 0, 1])
def test_vectors_are_those_of_one_text_at_a_time(kind, n_client_layers, monkeypatch):
    model, adapters, reader = small(kind, n_client_layers=n_client_layers)
    assert (model.split is None) == (n_client_layers is None)
    assert model.pooling == ("mean" if kind == "encoder" else "last")
    monkeypatch.setattr(text_vectors, "TOKENS_PER_BATCH", 200)
    rows, codes = histories_of(12, 3, n_items=5)
    for own in (None, select(adapters, [1])):
        items = model.encode_items(own)
        vectors = model.encode_histories(own, codes)
        with model.lora.using(own), torch.no_grad():
            plain = model.backbone.model
            slow_items = [reader.vector(plain, reader.item(item)) for item in range(5)]
            slow = [reader.vector(plain, reader.history(row)) for row in rows]
        torch.testing.assert_close(items, torch.stack(slow_items), rtol=0, atol=1e-5)
        torch.testing.assert_close(vectors, torch.stack(slow), rtol=0, atol=1e-5)
    assert (items - model.encode_items(None)).abs().max() > 1e-3


def test_pooling_can_be_chosen():
    model, _, reader = small("encoder", pooling="cls")
    hidden = reader.backbone.model(input_ids=reader.item(1)[None]).last_hidden_state[0, 0]
    torch.testing.assert_close(model.encode_items(None)[1], hidden / hidden.norm())


def test_tokenizers_without_special_tokens():
    from transformers import PreTrainedTokenizerFast

    backbone = tiny_backbone("encoder", TITLES)
    core = backbone.tokenizer.backend_tokenizer
    core.post_processor = None
    plain = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    assert plain("Castle")["input_ids"] == plain("Castle", add_special_tokens=False)["input_ids"]
    bare = load_backbone(lambda: (backbone.model, plain), backend="encoder", device="cpu")
    model = opened(bare)
    assert (model.histories.head, model.histories.tail) == ((), ())
    nobody = model.encode_histories(None, np.full((1, 3), -1))
    assert nobody.isfinite().all()
