import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedrecsk.models.split_lm import Boundary, SplitLM
from fedrecsk.models.split_middle import Middle, MiddleServer
from fedrecsk.models.stacked_lora import StackedLoRA
from tests.reference.tiny_language_models import (
    CLIENTS,
    N_LAYERS,
    PATHS,
    SIZES,
    WIDTH,
    adapted,
    generator,
    loss_of,
    texts,
    tiny_model,
    worst_difference,
)

# The same as the unsplit model -------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["one graph", "apart"])
@pytest.mark.parametrize("kind", [*PATHS, "qwen2"])
def test_outputs_and_gradients_are_those_of_the_unsplit_model(kind, apart):
    model, lora, adapters = adapted(kind)
    tokens, mask = texts()
    with lora.using(adapters):
        expected = model(input_ids=tokens, attention_mask=mask)
        losses = loss_of(expected, CLIENTS)
        grads = torch.autograd.grad(losses.sum(), list(adapters.values()))
    expected_grads = dict(zip(adapters, grads, strict=True))
    for k in range(N_LAYERS):
        split = SplitLM.split(model, PATHS.get(kind, "model.layers"), k)
        ours, theirs = split.sides(adapters)
        assert {**ours, **theirs}.keys() == adapters.keys()
        assert len(theirs) == len(adapters) // N_LAYERS * (N_LAYERS - 1 - k)
        server = None
        if apart:
            server = MiddleServer(split.middle, adapters=theirs)
            split.connect(server)
        with lora.using(adapters):
            output = split(tokens, mask)
            losses = loss_of(output, CLIENTS)
            wanted = [*(ours if apart else adapters).values(), split.boundary.leaf]
            found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        grads = dict(zip(ours if apart else adapters, found, strict=False))
        if apart:
            grads |= server.gradients
        torch.testing.assert_close(output[0], expected[0], atol=1e-6, rtol=0)
        assert worst_difference(grads, expected_grads) < 1e-6
        states = 0 if k == N_LAYERS - 1 else tokens.numel() * WIDTH * 4
        sent = split.boundary.sent
        assert sent["hidden_up"] == sent["hidden_down"] == sent["gradient_up"] == states
        # Below layer 0 there is nothing to train, so no gradient has to come back.
        assert sent["gradient_down"] == (0 if k == 0 else states)
        assert 0 <= sent["extras_up"] < 0.8 * tokens.numel() * WIDTH * 4


@pytest.mark.parametrize("kind", PATHS)
def test_inference_keeps_and_sends_no_gradients(kind):
    model = tiny_model(kind)
    tokens, mask = texts()
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask)[0]
        for apart in (False, True):
            split = SplitLM.split(model, PATHS[kind], 1)
            if apart:
                server = MiddleServer(split.middle)
                split.connect(server)
                server.backward = None  # nobody asks for it
            torch.testing.assert_close(split(tokens, mask)[0], expected, atol=1e-6, rtol=0)
            assert split.boundary.sent["gradient_up"] == split.boundary.sent["gradient_down"] == 0
            assert split.boundary.sent["hidden_down"] == tokens.numel() * WIDTH * 4
        assert not server._runs


def test_backward_reaches_the_server_where_the_client_trains_nothing_below():
    model, lora, adapters = adapted("bert")
    split = SplitLM.split(model, PATHS["bert"], 0)
    server = MiddleServer(split.middle, adapters=split.sides(adapters)[1])
    split.connect(server)
    with lora.using(adapters):
        loss_of(split(*texts())).sum().backward()
    assert all(float(each.abs().max()) > 0 for each in server.gradients.values())


def test_split_models_generate():
    model = tiny_model("gpt2")
    split = SplitLM.split(model, PATHS["gpt2"], 1)
    tokens, mask = texts(2)
    settings = {
        "max_new_tokens": 4, "num_beams": 2, "do_sample": False, "use_cache": False,
        "pad_token_id": 0,
    }  # fmt: skip
    expected = model.generate(input_ids=tokens, attention_mask=mask, **settings)
    found = split.client.generate(input_ids=tokens, attention_mask=mask, **settings)
    assert found.tolist() == expected.tolist()
    assert split.boundary.sent["hidden_up"] > 0


def test_the_model_that_was_split_stays_whole():
    model = tiny_model("llama")
    before = model.state_dict()
    tokens, mask = texts()
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
        split = SplitLM.split(model, model.model.layers, 1).connect(MiddleServer(Middle(
            {f"model.layers.{i}": model.model.layers[i] for i in (1, 2)})))  # fmt: skip
        assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, expected)
    assert model.state_dict().keys() == before.keys()
    assert model.config.use_cache
    assert type(split.client) is type(model)
    assert split.client.lm_head is model.lm_head


def test_a_client_can_lack_the_weights_of_the_middle():
    model = tiny_model("bert")
    names = set(model.state_dict())
    split = SplitLM.split(model, PATHS["bert"], 1)
    held = set(split.middle.state_dict())
    assert {name.split(".")[2] for name in held} == {"1", "2"}
    assert set(split.client.state_dict()) == names - held
    weights = [weakref.ref(each) for each in split.middle.parameters()]
    split.connect(Elsewhere(split.middle.paths))
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert not [name for name, _ in split.named_parameters() if ".1." in name or ".2." in name]


class Elsewhere:
    """A server of which only the layers' names are known here."""

    def __init__(self, paths):
        self.paths = paths


def test_a_client_can_be_made_without_the_weights_of_the_middle():
    model = tiny_model("llama")
    tokens, mask = texts()
    with torch.device("meta"):
        bare = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    whole = model.state_dict()
    theirs = SplitLM.split(model, PATHS["llama"], 1)
    ours = {name: whole[name] for name in theirs.client.state_dict()}
    bare.load_state_dict(ours, strict=False, assign=True)
    bare.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state dict
    split = SplitLM.split(bare, PATHS["llama"], 1)
    split.connect(MiddleServer(theirs.middle))
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(split(tokens, mask).logits, expected, atol=1e-6, rtol=0)


# Other models ------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer that returns a tuple, and is asked for its kind."""

    def __init__(self, kind, extra=None):
        super().__init__()
        self.kind = kind
        self.extra = extra
        self.mix = nn.Linear(4, 4)

    def forward(self, hidden_states, shift=None, scale=()):
        return self.mix(hidden_states) * scale[0]["by"] + shift, self.extra


class Chain(nn.Module):
    """A plain model whose layers are called by keywords, each kind with another shift."""

    def __init__(self, skip=False, extra=None):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Layer(f"kind {i % 2}", extra) for i in range(5))
        self.skip = skip

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids)
        shifts = {"kind 0": attention_mask[..., None] * 1.0, "kind 1": torch.full((1,), 0.5)}
        for layer in self.layers:
            output = layer(hidden_states=hidden, shift=shifts[layer.kind], scale=[{"by": 2}])[0]
            hidden = output + hidden if self.skip else output
        return (hidden,)


@pytest.mark.parametrize("k", range(5))
def test_layers_with_tuples_keywords_and_kinds(k):
    model = Chain()
    tokens = torch.arange(6).reshape(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    expected = model(tokens, mask)[0]
    split = SplitLM.split(model, "layers", k)
    torch.testing.assert_close(split(tokens, mask)[0], expected)
    with torch.no_grad():
        split.connect(MiddleServer(split.middle))
        torch.testing.assert_close(split(tokens, mask)[0], expected)


def test_models_that_cannot_be_split():
    with pytest.raises(ValueError, match=r"Chain does not hand the output of each of its 5 .*str"):
        SplitLM.split(Chain(skip=True), "layers", 1)
    with pytest.raises(ValueError, match="more than its hidden states"):
        SplitLM.split(Chain(extra=3), "layers", 1)
    with pytest.raises(ValueError, match="Chain has no list of layers 'h'; it has 'layers'"):
        SplitLM.split(Chain(), "h", 1)
    with pytest.raises(ValueError, match=r"no list of layers the given ModuleList; it has 'lay"):
        SplitLM.split(Chain(), Chain().layers, 1)
    for k in (-1, 5):
        with pytest.raises(ValueError, match=f"from 0 to 4 for a model of 5 layers.*got {k}"):
            SplitLM.split(Chain(), "layers", k)


def test_what_cannot_cross_is_refused():
    model = tiny_model("llama")
    split = SplitLM.split(model, PATHS["llama"], 1)
    tokens, mask = texts()
    with pytest.raises(ValueError, match=r"hands past_key_values to model\.layers\.1, of type Dyn"):
        split.client(input_ids=tokens, attention_mask=mask, use_cache=True)
    split(tokens, mask)  # and goes on working
    chain = Chain()
    chain.embed.weight.requires_grad_(False)
    split = SplitLM.split(chain, "layers", 0)
    with pytest.raises(ValueError, match=r"hands shift to layers\.0 and wants a gradient"):
        split(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, requires_grad=True))
    split = SplitLM.split(Chain(), "layers", 1)
    with pytest.raises(ValueError, match=r"server holds layers\.2 \.\.\. layers\.3, but with n_cl"):
        split.connect(Elsewhere(("layers.2", "layers.3")))
    with pytest.raises(RuntimeError, match=r"called layers\.2 after 0 layers"):
        split.boundary.visit(1, (torch.zeros(1),), {})


def test_dropout_is_that_of_the_unsplit_model():
    model, lora, adapters = adapted("bert", dropout=0.5)
    split = SplitLM.split(model, PATHS["bert"], 1)
    theirs = split.sides(adapters)[1]
    middle = SplitLM.split(tiny_model("bert"), PATHS["bert"], 1).middle  # the same weights again
    with lora.using(adapters, dropout=[generator(c) for c in range(CLIENTS)]):
        expected = split(*texts())[0].detach()
    server = MiddleServer(
        middle,
        lora=StackedLoRA(middle, target_modules=["query", "value"], rank=2, alpha=4.0, dropout=0.5),
        adapters=theirs,
        dropout=[generator(c) for c in range(CLIENTS)],
    )
    split.connect(server)
    with lora.using(adapters, dropout=[generator(c) for c in range(CLIENTS)]):
        found = split(*texts())[0].detach()
    with lora.using(adapters), torch.no_grad():
        without = split(*texts())[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert float((without - expected).abs().max()) > 1e-3


def test_a_boundary_counts_from_zero_again():
    split = SplitLM.split(tiny_model("bert"), PATHS["bert"], 1)
    assert sum(split.boundary.sent.values()) == 0  # trying the model out is not counted
    split(*texts())
    assert split.boundary.sent["hidden_up"] > 0
    split.boundary.reset()
    assert split.boundary.sent == Boundary([], Middle({})).sent
