import gc
import json
import multiprocessing
import subprocess
import sys
import threading
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedrecsk.engine.local import Optimizer, apply_gradients, init_moments
from fedrecsk.models.split_channel import RemoteMiddle, compress, expand, serve_middle
from fedrecsk.models.split_lm import SplitLM
from fedrecsk.models.split_middle import Middle, MiddleServer, take_middle
from fedrecsk.models.stacked_lora import StackedLoRA
from tests.reference.tiny_language_models import (
    CLIENTS,
    LENGTH,
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
