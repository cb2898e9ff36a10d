import pickle
import random

import numpy as np
import pytest
import torch

from fedrecsk.datasets import make_interactions
from fedrecsk.engine.streams import Streams
from fedrecsk.models import compact
from fedrecsk.models.backbone import last_hidden
from fedrecsk.models.compact import (
    MAX_POSITIONS,
    WIDTH,
    _next_word_loss,
    build_compact,
    open_compact,
)
from fedrecsk.models.text_vectors import pad_rows, pooled

BACKENDS = ("encoder", "causal")


@pytest.fixture
def quick(monkeypatch):
    """Few steps of training, where its result is not looked at."""
    monkeypatch.setattr(compact, "MIN_STEPS", 3)
    monkeypatch.setattr(compact, "MAX_STEPS", 3)


def vectors_of(state, texts):
    model, tokenizer = open_compact(state)
    tokens, mask = pad_rows(tokenizer(list(texts))["input_ids"], tokenizer.pad_token_id)
    with torch.no_grad():
        hidden = last_hidden(model, tokens, mask)
    return pooled(hidden, mask, "mean" if state.backend == "encoder" else "last")


def assert_same(one, other):
    assert (one.backend, one.words) == (other.backend, other.words)
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        np.testing.assert_array_equal(value, other.weights[name])


@pytest.fixture(scope="module")
def titled():
    """Titles of a catalogue with four topics, and the topics."""
    bunch = make_interactions(60, 120, 4, random_state=0)
    return [bunch.item_text[item] for item in range(120)], bunch.item_clusters


@pytest.fixture(scope="module")
def trained(titled):
    """Models of the titles, trained a third as long as is usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "MIN_STEPS", 20)
        patch.setattr(compact, "MAX_STEPS", 20)
        return {
            backend: build_compact(titled[0], backend=backend, streams=Streams(0))
            for backend in BACKENDS
        }


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_of_one_topic_are_nearer(titled, trained, backend):
    titles, topics = titled
    vectors = vectors_of(trained[backend], titles)
    cosines = (vectors @ vectors.T).fill_diagonal_(torch.nan).numpy()
    alike = topics[:, None] == topics
    within, between = np.nanmean(cosines[alike]), np.nanmean(cosines[~alike])
    assert within > between + 0.1
    # The nearest other title is nearly always of the same topic; by chance a quarter is.
    nearest = np.nanargmax(cosines, axis=1)
    assert np.mean(topics[nearest] == topics) > 0.8
    assert np.isfinite(vectors.numpy()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_gives_the_same_model(titled, backend, quick):
    titles = titled[0][:50]

    def build(seed):
        return build_compact(titles, backend=backend, streams=Streams(seed))

    assert_same(build(3), build(3))
    weights = build(4).weights
    assert any(not np.array_equal(weights[name], value) for name, value in build(3).weights.items())


def test_the_global_random_states_stay(titled, quick):
    np.random.seed(5)  # noqa: NPY002  # the legacy state is what must stay as it is
    random.seed(5)
    torch.manual_seed(5)
    numpy_before, python_before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    torch_before = torch.get_rng_state().clone()
    for backend in BACKENDS:
        open_compact(build_compact(titled[0], backend=backend, streams=Streams(0)))
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert random.getstate() == python_before
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_does_not_depend_on_the_global_random_state(titled, backend, quick):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(build_compact(titled[0][:40], backend=backend, streams=Streams(0)))
    assert_same(*states)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "texts",
    [
        ["Castle"],
        [""],
        ["", "", ""],
        ["Castle", ""],
        ["same title"] * 7,
        ["one two", "one two", "three"],
        ["蓝色机器人", "Синий робот", "روبوت أزرق", "🤖 🤖", "青いロボット", "नीला रोबोट"],
        ["1", "2", "3", "4"],
        ["... !!!", "???"],
        ["word " * 2000, "other"],
        [" \t\n", "\u200b"],
        ["[PAD] [SEP]", "[CLS] [UNK] word", "[MASK]"],
    ],
    ids=repr,
)
def test_texts_of_any_kind(backend, texts, quick):
    state = build_compact(texts, backend=backend, streams=Streams(0))
    assert all(np.isfinite(value).all() for value in state.weights.values())
    shown = [text[:40] for text in texts]
    assert vectors_of(state, shown).isfinite().all()
    assert len(set(state.words)) == len(state.words)


def test_words_of_other_scripts_are_known(quick):
    texts = ["蓝色 机器人", "Синий робот", "Crème Brûlée"]
    state = build_compact(texts, backend="encoder", streams=Streams(0))
    _, tokenizer = open_compact(state)
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    # Case and accents do not matter.
    assert tokenizer("creme BRULEE")["input_ids"] == tokenizer(texts[2])["input_ids"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_can_be_kept(titled, backend, quick):
    state = build_compact(titled[0][:40], backend=backend, streams=Streams(0))
    again = pickle.loads(pickle.dumps(state))
    assert_same(state, again)
    assert torch.equal(vectors_of(state, titled[0]), vectors_of(again, titled[0]))
    one, _ = open_compact(state)
    other, _ = open_compact(state)
    for parameter in one.parameters():
        parameter.data.fill_(0.0)
    # Neither the state nor another model is changed with a model.
    assert_same(state, again)
    assert any(bool(parameter.any()) for parameter in other.parameters())


def test_special_tokens_and_other_words(quick):
    texts, others = ["red robot", "red wizard"], ['Below: "write"']
    for backend in BACKENDS:
        state = build_compact(texts, backend=backend, streams=Streams(0), other_texts=others)
        model, tokenizer = open_compact(state)
        assert state.words[:4] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        assert state.words[4:] == ("below", ":", '"', "write", "red", "robot", "wizard")
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        inner = tokenizer("red robot", add_special_tokens=False)["input_ids"]
        ending = [end] if backend == "encoder" else []
        assert tokenizer("red robot")["input_ids"] == [start, *inner, *ending]
        assert not model.training
        assert model.config.vocab_size == len(state.words)
        assert model.config.hidden_size == WIDTH
        assert tokenizer.model_max_length == MAX_POSITIONS


def test_the_most_frequent_words_are_known(monkeypatch, quick):
    monkeypatch.setattr(compact, "MAX_WORDS", 3)
    texts = ["b a", "b a", "b c", "d", "c", "e"]
    state = build_compact(texts, backend="encoder", streams=Streams(0), other_texts=["z a"])
    # Frequent first, equals by the alphabet; words of other texts do not take their places.
    assert state.words[4:] == ("z", "a", "b", "c", "d")


def test_next_words_are_learned(titled, trained):
    titles, _ = titled
    losses = []
    for state in (trained["causal"], untrained_like(trained["causal"])):
        model, tokenizer = open_compact(state)
        texts = [[*row, tokenizer.eos_token_id] for row in tokenizer(titles)["input_ids"]]
        with torch.no_grad():
            losses.append(float(_next_word_loss(model, texts, tokenizer.pad_token_id)))
    assert losses[0] < losses[1] - 0.3


def untrained_like(state):
    rng = np.random.default_rng(0)
    drawn = {
        name: (0.02 * rng.standard_normal(value.shape)).astype(np.float32)
        if value.ndim > 1
        else value
        for name, value in state.weights.items()
    }
    if "lm_head.weight" in drawn:
        drawn["lm_head.weight"] = drawn["model.embed_tokens.weight"]
    return compact.CompactState(state.backend, state.words, drawn)


def test_next_word_loss_is_a_mean_over_tokens(quick):
    texts = ["one two three", "four", "five six"]
    state = build_compact(texts, backend="causal", streams=Streams(0))
    model, tokenizer = open_compact(state)
    rows = tokenizer(texts)["input_ids"]
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            losses += [-float(logits[place - 1, row[place]]) for place in range(1, len(row))]
        found = float(_next_word_loss(model, rows, tokenizer.pad_token_id))
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
