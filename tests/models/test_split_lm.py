import gc
import json
import multiprocessing
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments
from fedrecsk.models.split_lm import (
    Boundary,
    Middle,
    MiddleServer,
    RemoteMiddle,
    SplitLM,
    compress,
    expand,
    serve_middle,
    split_costs,
    take_middle,
)
from fedrecsk.models.stacked_lora import StackedLoRA

CLIENTS, ROWS, LENGTH, WIDTH, VOCABULARY = 3, 2, 7, 16, 99
N_LAYERS = 4
PATHS = {"bert": "encoder.layer", "llama": "model.layers", "gpt2": "transformer.h"}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(kind, **more):
    """A random model, the same at every call; biases and norms are random as well."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = untrained(kind, **more)
    with torch.no_grad():
        for place, each in enumerate(model.parameters()):
            each += 0.1 * torch.randn(each.shape, generator=generator(place))
    return model.eval()


def untrained(kind, **more):
    if kind == "bert":
        return BertModel(BertConfig(**SIZES, **more), add_pooling_layer=False)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **more))
    if kind == "qwen2":
        # The first two layers see everything, the other two through a sliding window.
        config = Qwen2Config(
            **SIZES, num_key_value_heads=1, use_sliding_window=True, sliding_window=3,
            max_window_layers=2, **more
        )  # fmt: skip
        return Qwen2ForCausalLM(config)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=N_LAYERS, n_head=2, n_positions=32,
        bos_token_id=1, eos_token_id=2, **more
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def random_adapters(lora, n_clients=CLIENTS):
    drawn = lora.init(n_clients, generator())
    return {
        name: (0.3 * torch.randn(each.shape, generator=generator(place))).requires_grad_(True)
        for place, (name, each) in enumerate(drawn.items())
    }


def adapted(kind, **parameters):
    model = tiny_model(kind)
    lora = StackedLoRA(model, rank=2, alpha=4.0, **parameters)
    return model, lora, random_adapters(lora)


def texts(n_rows=CLIENTS * ROWS, seed=5):
    """Tokens of rows of several lengths, padded on the right."""
    tokens = torch.randint(3, VOCABULARY, (n_rows, LENGTH), generator=generator(seed))
    lengths = LENGTH - torch.arange(n_rows) % 4
    return tokens, (torch.arange(LENGTH) < lengths[:, None]).long()


def loss_of(output, clients=1):
    """Some function of the whole output, one number a client."""
    weights = torch.randn(output[0].shape, generator=generator(9))
    return (output[0] * weights).reshape(clients, -1).mean(1)


def worst_difference(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).detach().abs().max()) for name in expected)


@pytest.fixture(autouse=True, scope="module")
def server_process(tmp_path_factory):
    """A process that starts while the other tests run; the last ones talk to it."""
    folder = tmp_path_factory.mktemp("server")
    model, _, adapters = adapted("llama", target_modules=["q_proj", "v_proj"])
    split = SplitLM.split(model, PATHS["llama"], 1)
    save_file(split.middle.state_dict(), folder / "middle.safetensors")
    save_file(split.sides(adapters)[1], folder / "adapters.safetensors")
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=run_server, args=(theirs, folder), daemon=True
    )
    process.start()
    theirs.close()
    yield process, ours
    process.kill()
    process.join()


def run_server(connection, folder):
    """A server process: no weight of the model but those of its layers ever enters it."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    middle = take_middle(model, PATHS["llama"], 1)
    middle.load_state_dict(load_file(folder / "middle.safetensors"), assign=True)
    held = [each for each in gc.get_objects() if isinstance(each, nn.Parameter)]
    real = {id(each) for each in held if each.device.type != "meta"}
    assert real == {id(each) for each in middle.parameters()}
    serve_middle(
        connection,
        middle,
        lora=StackedLoRA(middle, target_modules=["q_proj", "v_proj"], rank=2, alpha=4.0),
        adapters=load_file(folder / "adapters.safetensors"),
        update=adam(),
        timeout=60,
    )


def adam():
    """Make a function that does one Adam step after the other."""
    optimizer, moments = Optimizer("adam", 0.05), []

    def update(adapters, gradients):
        before = moments.pop() if moments else init_moments(adapters, optimizer)
        everybody = torch.ones(len(next(iter(adapters.values()))), dtype=torch.bool)
        adapters, after = apply_gradients(adapters, gradients, before, everybody, optimizer)
        moments.append(after)
        return adapters

    return update


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


# What crosses ------------------------------------------------------------------------------


def masks():
    keys = texts()[1].bool()[:, None, None]
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    least = torch.finfo(torch.float32).min
    random = torch.rand(6, 1, LENGTH, LENGTH, generator=generator()) < 0.5
    return {
        "padding": (keys.expand(-1, 1, LENGTH, LENGTH), 2 + 6),
        "causal": ((keys & causal), 2 + 6 + 7),
        "causal, to be added": (torch.where(keys & causal, 0.0, least), 8 + 6 + 7),
        "left padding": (keys.flip(-1) & causal, 2 + 6 + 7),
        "random": (random, 2 + 37),
        "all seen": (torch.ones(6, 1, 99, 99, dtype=torch.bool), 1),
    }


@pytest.mark.parametrize("name", masks())
def test_masks_cross_as_bits(name):
    mask, n_bytes = masks()[name]
    recipe, parts = compress(mask)
    assert sum(part.nbytes for part in parts) == n_bytes
    back = expand(json.loads(json.dumps(recipe)), parts)
    assert back.dtype == mask.dtype
    assert torch.equal(back, mask)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4, 5, generator=generator()),
        torch.randn(1, 30, generator=generator()).expand(4, 30),
        torch.arange(40)[None],
        torch.tensor([[torch.nan, 1.0] * 20]),
        torch.tensor([[-torch.inf, 0.0, 0.0] * 20]),
        torch.zeros(0, 4),
        torch.tensor(3),
        torch.randn(64, generator=generator()).to(torch.bfloat16),
    ],
    ids=str,
)
def test_other_tensors_cross_as_they_are(tensor):
    recipe, parts = compress(tensor)
    back = expand(recipe, parts)
    assert back.dtype == tensor.dtype
    torch.testing.assert_close(back, tensor, atol=0, rtol=0, equal_nan=True)
    assert sum(part.nbytes for part in parts) <= tensor.numel() * tensor.itemsize


# Over a connection -------------------------------------------------------------------------


@contextmanager
def connected(middle, timeout=20.0, **parameters):
    """A client of a server that runs in a thread of this process."""
    ours, theirs = Pipe()
    result = []

    def serve():
        result.append(serve_middle(theirs, middle, **parameters))
        theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield RemoteMiddle(ours, timeout=timeout), result
    finally:
        ours.close()
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", PATHS)
def test_nothing_is_pickled_and_all_is_counted(kind, monkeypatch):
    def refuse(*args):
        raise AssertionError("an object was pickled")

    monkeypatch.setattr(Connection, "send", refuse)
    monkeypatch.setattr(Connection, "recv", refuse)
    model, lora, adapters = adapted(kind)
    split = SplitLM.split(model, PATHS[kind], 1)
    with connected(split.middle, adapters=split.sides(adapters)[1]) as (remote, _):
        split.connect(remote)
        said = remote.bytes_sent, remote.bytes_received
        with lora.using(adapters):
            loss_of(split(*texts())).sum().backward()
        sent = split.boundary.sent
        up = sent["hidden_up"] + sent["extras_up"] + sent["gradient_up"]
        down = sent["hidden_down"] + sent["gradient_down"]
        # What comes on top are two headers each way.
        assert up < remote.bytes_sent - said[0] < up + 1200
        assert down < remote.bytes_received - said[1] < down + 300


def test_half_precision_crosses_as_it_is():
    model = tiny_model("llama").to(torch.bfloat16)
    tokens, mask = texts()
    split = SplitLM.split(model, PATHS["llama"], 1)
    with torch.no_grad(), connected(split.middle) as (remote, _):
        expected = model(input_ids=tokens, attention_mask=mask).logits
        found = split.connect(remote)(tokens, mask).logits
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        assert split.boundary.sent["hidden_up"] == tokens.numel() * WIDTH * 2


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


def test_adapters_go_to_the_server_and_back():
    model, lora, adapters = adapted("gpt2")
    split = SplitLM.split(model, PATHS["gpt2"], 2)
    theirs = split.sides(adapters)[1]
    middle = SplitLM.split(tiny_model("gpt2"), PATHS["gpt2"], 2).middle
    own = StackedLoRA(middle, target_modules=["c_attn"], rank=2, alpha=4.0)
    with connected(middle, lora=own, adapters=theirs) as (remote, result):
        assert worst_difference(remote.adapters(), theirs) == 0
        doubled = {name: 2 * each.detach() for name, each in theirs.items()}
        remote.load(doubled)
        assert worst_difference(remote.adapters(), doubled) == 0
        with lora.using({**adapters, **doubled}), torch.no_grad():
            expected = split(*texts())[0]
        split.connect(remote)
        with lora.using(adapters), torch.no_grad():
            found = split(*texts())[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        with pytest.raises(RuntimeError, match="Names or shapes of the adapters"):
            remote.load({"h": torch.zeros(1)})
        with pytest.raises(RuntimeError, match="made without update= or lora="):
            remote.step()
        remote.close()
        remote.close()
    assert worst_difference(result[0], doubled) == 0
    with pytest.raises(ConnectionError, match="is closed"):
        remote.adapters()


def test_a_failed_request_is_told_and_the_server_goes_on():
    model = tiny_model("bert")
    split = SplitLM.split(model, PATHS["bert"], 1)
    call = {"args": [{"hidden": True}], "kwargs": {}}
    hidden = torch.randn(1, 3, WIDTH)
    with connected(split.middle) as (remote, _):
        with pytest.raises(RuntimeError, match="failed: RuntimeError"):  # another width
            remote.forward(torch.randn(1, 3, WIDTH + 1), [call] * 2, [], train=False)
        with pytest.raises(RuntimeError, match="calls of 3 layers for the 2 here"):
            remote.forward(hidden, [call] * 3, [], train=False)
        with pytest.raises(RuntimeError, match="Unknown request 'eat'"):
            remote._ask({"do": "eat"})
        output, run = remote.forward(hidden, [call] * 2, [], train=True)
        remote.backward(run, output, back=True)
        with pytest.raises(RuntimeError, match=f"Run {run} is unknown here, or has had"):
            remote.backward(run, output, back=True)


def test_runs_without_a_backward_are_forgotten():
    model, lora, adapters = adapted("bert")
    split = SplitLM.split(model, PATHS["bert"], 1)
    server = MiddleServer(split.middle, adapters=split.sides(adapters)[1])
    split.connect(server)
    with lora.using(adapters):
        output = split(*texts())
        assert len(server._runs) == 1
        first, second = loss_of(output), loss_of(split(*texts()))
        assert len(server._runs) == 2
        (first.sum() + second.sum()).backward()
        assert not server._runs
        output = split(*texts())
    del output, first, second
    gc.collect()
    assert not server._runs
    with connected(split_again(model).middle) as (remote, _):
        _, run = remote.forward(torch.zeros(1, 2, WIDTH), [CALL] * 2, [], train=True)
        remote.forget(run)
        with pytest.raises(RuntimeError, match="unknown here"):
            remote.backward(run, torch.zeros(1, 2, WIDTH), back=True)


CALL = {"args": [{"hidden": True}], "kwargs": {}}


def split_again(model):
    return SplitLM.split(model, PATHS["bert"], 1)


def test_a_server_that_does_not_answer():
    ours, theirs = Pipe()
    with pytest.raises(TimeoutError, match=r"not answered 'hello' within 0\.01 seconds"):
        RemoteMiddle(ours, timeout=0.01)
    assert ours.closed
    theirs.close()
    ours, theirs = Pipe()
    with pytest.raises(TimeoutError, match=r"from the client within 0\.01 seconds"):
        serve_middle(theirs, Middle({}), timeout=0.01)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([b"[]"], "no message of this protocol"),
        ([b"no JSON"], "Expecting value"),
        ([b'{"do": "hello"}'], "no message of this protocol"),
        ([b'{"tensors": [["float32", [2, -3]]]}'], r"dtype float32 and shape \[2, -3\]"),
        ([b'{"tensors": [["float32", ["2"]]]}'], r"dtype float32 and shape \['2'\]"),
        ([b'{"tensors": [["object", [2]]]}'], "dtype object"),
        ([b'{"tensors": [["float64", [100000, 100000]]]}'], "of 80000000000 bytes"),
        ([b'{"tensors": [["float32", [2]]]}', b"1234567"], "has 7 bytes for a tensor of 8"),
        ([b'{"tensors": [["float32", [2]]]}', b"123456789"], "has 9 bytes for a tensor of 8"),
    ],
)
def test_what_is_no_message_is_refused(messages, reason):
    ours, theirs = Pipe()
    for message in messages:
        ours.send_bytes(message)
    with pytest.raises(ValueError, match=reason):
        serve_middle(theirs, Middle({}), timeout=1)


def test_a_server_that_dies():
    """A process that says which layers it has, waits for work, and is gone."""
    ours, theirs = Pipe()
    script = (
        "import os, sys; from multiprocessing.connection import Connection\n"
        "us = Connection(int(sys.argv[1])); us.recv_bytes()\n"
        'us.send_bytes(b\'{"paths": ["encoder.layer.1", "encoder.layer.2"], "tensors": []}\')\n'
        "us.recv_bytes(); os._exit(1)"
    )
    fd = theirs.fileno()
    process = subprocess.Popen([sys.executable, "-c", script, str(fd)], pass_fds=[fd])
    theirs.close()
    split = SplitLM.split(tiny_model("bert"), PATHS["bert"], 1)
    split.connect(RemoteMiddle(ours, timeout=20))
    with pytest.raises(ConnectionError, match=r"lost during 'forward'.*process may have died"):
        split(*texts())
    with pytest.raises(ConnectionError, match="is closed"):
        split(*texts())
    assert process.wait(20) == 1


def test_two_processes_train_as_one(server_process):
    process, connection = server_process
    model, lora, adapters = adapted("llama", target_modules=["q_proj", "v_proj"])
    batches = [texts(seed=seed) for seed in (1, 2)]
    expected, trained = [], {name: each.detach() for name, each in adapters.items()}
    update = adam()
    for batch in batches:
        leaves = {name: each.requires_grad_(True) for name, each in trained.items()}
        with lora.using(leaves):
            output = model(input_ids=batch[0], attention_mask=batch[1])[0]
        losses = loss_of([output], CLIENTS)
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        grads = dict(zip(leaves, grads, strict=True))
        trained = update({name: each.detach() for name, each in leaves.items()}, grads)
        expected.append((losses.detach(), output.detach()))
    lora.restore()

    split = SplitLM.split(model, PATHS["llama"], 1)
    with RemoteMiddle(connection) as remote:
        split.connect(remote)
        del model, lora
        gc.collect()
        client = StackedLoRA(
            split.client, target_modules=["q_proj", "v_proj"], rank=2, alpha=4.0
        )  # of the client's layers only
        ours, update = split.sides(adapters)[0], adam()
        for batch, (losses, output) in zip(batches, expected, strict=True):
            leaves = {name: each.detach().requires_grad_(True) for name, each in ours.items()}
            with client.using(leaves):
                found = split(*batch)[0]
            found_losses = loss_of([found], CLIENTS)
            found_losses.sum().backward()
            torch.testing.assert_close(found, output, atol=1e-5, rtol=0)
            torch.testing.assert_close(found_losses, losses, atol=1e-5, rtol=0)
            grads = {name: each.grad for name, each in leaves.items()}
            ours = update({name: each.detach() for name, each in leaves.items()}, grads)
            remote.step()
        theirs = remote.adapters()
    assert worst_difference({**ours, **theirs}, trained) < 1e-5
    start = {name: each.detach() for name, each in adapters.items()}
    assert min(float((theirs[name] - start[name]).abs().max()) for name in theirs) > 0.01
    process.join(20)
    assert process.exitcode == 0


# What a split costs ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATHS)
def test_costs(kind):
    model = tiny_model(kind)
    tokens, mask = texts(4)
    costs = split_costs(model, PATHS[kind], tokens, mask, repeats=1)
    assert [row["n_client_layers"] for row in costs] == [0, 1, 2, 3]
    n_parameters = sum(each.numel() for each in model.parameters())
    layer = sum(each.numel() for each in model.get_submodule(PATHS[kind])[0].parameters())
    state = LENGTH * WIDTH * 4
    for k, row in enumerate(costs):
        assert row["server_parameters"] == (3 - k) * layer
        assert row["client_parameters"] == n_parameters - (3 - k) * layer
        assert row["server_weight_bytes"] == 4 * row["server_parameters"]
        assert row["client_weight_bytes"] >= 4 * row["client_parameters"]
        extras = row["inference_bytes"] - (2 * state if k < 3 else 0)
        assert 0 <= extras < 0.5 * state
        back = 0 if k == 3 else 1 if k == 0 else 2
        assert row["training_bytes"] == row["inference_bytes"] + back * state
        for side in ("client", "server"):
            busy = side == "client" or k < 3
            for job in ("training", "inference"):
                assert (row[f"{side}_{job}_seconds"] > 0) == busy
            assert (row[f"{side}_activation_bytes"] > 0) == busy
        assert list(row) == list(costs[0])
    adapters = [row["server_adapter_parameters"] for row in costs]
    each = adapters[0] // 3
    assert adapters == [3 * each, 2 * each, each, 0]
    assert [row["client_adapter_parameters"] for row in costs] == [each * i for i in (1, 2, 3, 4)]
    # A side keeps for the backward pass what its layers need: the more layers, the more.
    kept = [row["server_activation_bytes"] for row in costs]
    assert kept == sorted(kept, reverse=True)
    assert kept[1] - kept[2] > 3 * 4 * state
    # The adapters that were made for it are off again.
    assert not any(module._forward_hooks for module in model.modules())


def test_costs_of_the_callers_adapters_and_loss():
    model, lora, adapters = adapted("bert", target_modules=["query"])
    tokens, mask = texts()
    seen = []

    def loss(output):
        seen.append(output[0].detach())
        return output[0].sum()

    [row] = split_costs(
        model, PATHS["bert"], tokens, mask, n_client_layers=[2], lora=lora, adapters=adapters,
        loss=loss, repeats=2,
    )  # fmt: skip
    assert row["server_adapter_parameters"] == 2 * 2 * WIDTH
    assert len(seen) == 4  # once to count memory, once to warm up, twice to measure
    with lora.using(adapters), torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask)[0]
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)
    assert all(each.grad is None for each in adapters.values())


def test_a_boundary_counts_from_zero_again():
    split = SplitLM.split(tiny_model("bert"), PATHS["bert"], 1)
    assert sum(split.boundary.sent.values()) == 0  # trying the model out is not counted
    split(*texts())
    assert split.boundary.sent["hidden_up"] > 0
    split.boundary.reset()
    assert split.boundary.sent == Boundary([], Middle({})).sent
