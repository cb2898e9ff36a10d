"""Tiny language models, random adapters and texts, for tests of split models."""

import torch
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
