import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedrecsk.models import reconstruction
from fedrecsk.models.reconstruction import (
    linear_inverter_attack,
    nearest_token_attack,
    reconstruction_risk,
    suggest_client_layers,
)
from fedrecsk.models.stacked_lora import StackedLoRA

VOCABULARY, WIDTH, N_LAYERS = 40, 24, 4
PATHS = {"bert": "encoder.layer", "llama": "model.layers", "gpt2": "transformer.h"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(kind):
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2, "intermediate_size": 24,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
        elif kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            config = GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=N_LAYERS, n_head=2, n_positions=32,
                bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
            model = GPT2LMHeadModel(config)
        # Layers that mix a lot, so that depth hides tokens.
        for each in model.get_submodule(PATHS[kind]).parameters():
            nn.init.normal_(each, std=0.4)
    return model.eval()


def texts(n_rows, length=9, seed=1):
    tokens = torch.randint(3, VOCABULARY, (n_rows, length), generator=generator(seed))
    tokens[:, 0] = 1  # a special token first
    lengths = length - torch.arange(n_rows) % 3
    mask = (torch.arange(length) < lengths[:, None]).long()
    return tokens * mask, mask


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def nearest_by_definition(vectors, table):
    return [int(np.argmax([cosine(vector, row) for row in table])) for vector in vectors]


# The attacks -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [reconstruction.CHUNK, 3 * VOCABULARY, 1])
def test_nearest_token_is_by_centred_cosine(monkeypatch, chunk):
    monkeypatch.setattr(reconstruction, "CHUNK", chunk)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator()) + 2.0
    hidden = torch.randn(20, WIDTH, generator=generator(1)) - 1.0
    expected = nearest_by_definition(
        (hidden - hidden.mean(0)).numpy(), (table - table.mean(0)).numpy()
    )
    assert nearest_token_attack(hidden, table).tolist() == expected


def test_nearest_token_needs_one_width():
    with pytest.raises(ValueError, match=r"states have 3 numbers and token embeddings 4, so"):
        nearest_token_attack(torch.zeros(2, 3), torch.zeros(5, 4))


def test_linear_inverter_is_ridge_regression():
    table = torch.randn(VOCABULARY, WIDTH, generator=generator()) + 1.0
    known_tokens = torch.randint(VOCABULARY, (60,), generator=generator(1))
    known = torch.randn(60, 10, generator=generator(2)) * torch.arange(1, 11) + 4.0
    hidden = torch.randn(30, 10, generator=generator(3)) * torch.arange(1, 11) + 4.0
    found = linear_inverter_attack(
        hidden, table, known_hidden=known, known_tokens=known_tokens, ridge=0.2
    )
    scaler = StandardScaler().fit(known.numpy())
    targets = table[known_tokens].numpy()
    ridge = Ridge(alpha=0.2 * 60).fit(scaler.transform(known.numpy()), targets)
    guessed = ridge.predict(scaler.transform(hidden.numpy())) - targets.mean(0)
    assert found.tolist() == nearest_by_definition(guessed, table.numpy() - targets.mean(0))


def test_linear_inverter_undoes_any_linear_map():
    """Also for tokens that it has not seen, and beside a number that never changes."""
    table = torch.randn(VOCABULARY, 8, generator=generator())
    turned = table @ torch.randn(8, 12, generator=generator(1)) + 3.0
    hidden = torch.cat([turned, torch.full((VOCABULARY, 1), 0.1)], 1)
    known = torch.arange(25)
    found = linear_inverter_attack(
        hidden, table, known_hidden=hidden[known], known_tokens=known, ridge=1e-6
    )
    assert found.tolist() == list(range(VOCABULARY))
    assert nearest_token_attack(turned[:, :8], table).tolist() != list(range(VOCABULARY))


# The risk of every layer -------------------------------------------------------------------


def states_one_by_one(model, path, tokens, mask, special=()):
    """Hidden states (n + 1, N, d) and tokens (N,) that count, text after text unpadded."""
    states, found = [[] for _ in range(N_LAYERS + 1)], []
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append((args, output)))
        for layer in model.get_submodule(path)
    ]
    for row, length in zip(tokens, mask.sum(1).tolist(), strict=True):
        outputs.clear()
        with torch.no_grad():
            model(input_ids=row[None, :length], attention_mask=torch.ones(1, length).long())
        keep = [i for i in range(length) if int(row[i]) not in special]
        hidden = [outputs[0][0][0], *(output for _, output in outputs)]
        for place, each in enumerate(hidden):
            states[place].append(each[0, keep])
        found.append(row[keep])
    for hook in hooks:
        hook.remove()
    return [torch.cat(each) for each in states], torch.cat(found)


@pytest.mark.parametrize("kind", PATHS)
def test_risk_is_the_share_of_tokens_told_right(kind):
    model = tiny_model(kind)
    auxiliary, target = texts(30), texts(12, seed=2)
    risk = reconstruction_risk(
        model, PATHS[kind], auxiliary, target, special_ids=[1, 0], batch_size=5
    )
    table = model.get_input_embeddings().weight.detach()
    known, known_tokens = states_one_by_one(model, PATHS[kind], *auxiliary, special=(0, 1))
    hidden, tokens = states_one_by_one(model, PATHS[kind], *target, special=(0, 1))
    assert [row["layer"] for row in risk] == [0, 1, 2, 3, 4]
    for row, known_hidden, each in zip(risk, known, hidden, strict=True):
        nearest = nearest_token_attack(each, table)
        inverted = linear_inverter_attack(
            each, table, known_hidden=known_hidden, known_tokens=known_tokens
        )
        rates = [float((guess == tokens).double().mean()) for guess in (nearest, inverted)]
        # Padding shifts hidden states by rounding, and with it a guess that is a near tie.
        found = [row["nearest_token"], row["linear_inverter"]]
        np.testing.assert_allclose(found, rates, atol=0.02)
    # Embedded tokens tell all, and layers that mix hide something.
    assert risk[0]["linear_inverter"] == 1.0
    assert risk[-1]["nearest_token"] < 0.6


def test_only_tokens_that_count_do():
    """Tokens that are always the same are easily told, so they must not be counted."""
    model = tiny_model("llama")
    auxiliary, target = texts(30), texts(12, seed=2)
    path = PATHS["llama"]
    without = reconstruction_risk(model, path, auxiliary, target, special_ids=[1])
    counted = reconstruction_risk(model, path, auxiliary, target)
    assert counted[-1]["linear_inverter"] > without[-1]["linear_inverter"] + 0.02
    titles = torch.full_like(target[0], -1)
    titles[:, 1:] = 0
    titled = reconstruction_risk(model, path, auxiliary, target, special_ids=[1], titles=titles)
    for one, other in zip(titled, without, strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other)
    with pytest.raises(ValueError, match=r"target texts counts: .* or in no title\."):
        reconstruction_risk(model, path, auxiliary, target, titles=titles.fill_(-1))
    with pytest.raises(ValueError, match=r"No token of the auxiliary texts counts"):
        reconstruction_risk(model, path, (auxiliary[0], auxiliary[1] * 0), target)


def test_titles_are_told_as_a_whole(monkeypatch):
    tokens, mask = texts(4)
    titles = torch.tensor([-1, 0, 0, 1, 1, -1, 2, 2, 2]).repeat(4, 1)
    wrong = torch.zeros_like(tokens, dtype=torch.bool)
    wrong[0, 4] = wrong[1, 6] = wrong[2, 1] = wrong[2, 7] = wrong[2, 8] = wrong[3, 5] = True
    counted = mask.bool() & (titles >= 0)

    def attack(hidden, table):
        return torch.where(wrong, 0, tokens)[counted]

    monkeypatch.setattr(reconstruction, "nearest_token_attack", attack)
    path = PATHS["llama"]
    risk = reconstruction_risk(tiny_model("llama"), path, texts(9), (tokens, mask), titles=titles)
    whole, right = [], []
    for text in range(4):
        for title in range(3):
            members = [(text, i) for i in range(9) if counted[text, i] and titles[text, i] == title]
            whole.append(not any(wrong[each] for each in members))
            right += [not wrong[each] for each in members]
    assert 0 < sum(whole) < len(whole)
    assert risk[2]["nearest_token"] == pytest.approx(np.mean(right))
    assert risk[2]["nearest_token_titles"] == pytest.approx(np.mean(whole))
    assert 0 <= risk[2]["linear_inverter_titles"] <= 1


def test_adapters_in_effect_count():
    model = tiny_model("bert")
    lora = StackedLoRA(model, rank=4, alpha=8.0)
    adapters = {name: each + 1.0 for name, each in lora.init(1, generator()).items()}
    jobs = (model, PATHS["bert"], texts(20), texts(9, seed=2))
    plain = reconstruction_risk(*jobs)
    with lora.using(adapters):
        changed = reconstruction_risk(*jobs)
    assert changed[0] == plain[0]
    assert changed[-1] != plain[-1]


# How many layers to keep -------------------------------------------------------------------


def risk_of(nearest, inverter):
    return [
        {"layer": layer, "nearest_token": a, "linear_inverter": b}
        for layer, (a, b) in enumerate(zip(nearest, inverter, strict=True))
    ]


def suggested_by_definition(risk, max_risk):
    n_layers = len(risk) - 1
    for k in range(n_layers - 1):
        seen = [row for row in risk if k <= row["layer"] <= n_layers - 1]
        if all(max(row["nearest_token"], row["linear_inverter"]) <= max_risk for row in seen):
            return k
    return None


def test_suggestion_is_the_first_safe_split():
    rng = np.random.default_rng(0)
    suggested = set()
    for _ in range(200):
        n = rng.integers(3, 8)
        risk = risk_of(rng.random(n).round(1) ** 2, rng.random(n).round(1) ** 2)
        max_risk = float(rng.random())
        expected = suggested_by_definition(risk, max_risk)
        suggested.add(expected)
        if expected is None:
            with pytest.raises(ValueError, match="No split keeps the risk within"):
                suggest_client_layers(risk, max_risk)
        else:
            assert suggest_client_layers(risk, max_risk) == expected
    assert suggested >= {None, 0, 1, 2, 3}


def test_what_leaves_the_middle_counts_and_what_stays_does_not():
    """The server computes its last output, and never sees that of the last layer."""
    assert suggest_client_layers(risk_of([1, 0.2, 0.1, 0.1, 1], [0] * 5), 0.3) == 1
    with pytest.raises(
        ValueError, match=r"within 0\.3: .* is 0\.900, with n_client_layers=2\..*=3"
    ):
        suggest_client_layers(risk_of([1, 0.2, 0.1, 0.1, 0], [0, 0, 0, 0.9, 0]), 0.3)


def test_suggestion_refuses():
    with pytest.raises(ValueError, match=r"layers 0, \.\.\., n .*; got layers \[0, 1\]"):
        suggest_client_layers(risk_of([1, 1], [1, 1]), 0.5)
    with pytest.raises(ValueError, match=r"got layers \[1, 2, 3\]"):
        suggest_client_layers(risk_of([1, 1, 1, 1], [1] * 4)[1:], 0.5)
    with pytest.raises(ValueError, match=r"from 0 to 1; got 50"):
        suggest_client_layers(risk_of([1, 1, 1], [1] * 3), 50)
