"""Federated LoRA, one client at a time: PEFT's own model and torch's own AdamW.

for each client c:
    wrap a fresh copy of the frozen model with PEFT and write c's adapter into it
    for each step of c's plan:
        for each micro-batch: backward from  sum of the examples' losses / examples of the step
        add mu (theta - anchor) to the gradient, clip its norm, one step of AdamW
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

# Texts of different lengths, and the loss of one of them under a model.
Text = Tensor
ExampleLoss = Callable[[nn.Module, Text], Tensor]
MODELS = ("bert", "llama", "gpt2")
VOCABULARY = 61


def tiny_model(kind: str, n_layers: int = 2) -> nn.Module:
    """Make a small model with random weights, frozen and without its own dropout."""
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": n_layers, "num_attention_heads": 2}
    if kind == "bert":
        model = BertModel(BertConfig(**common, **sizes, intermediate_size=32))
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**common, **sizes, num_key_value_heads=1, intermediate_size=32)
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(**common, n_embd=16, n_layer=n_layers, n_head=2, n_positions=64)
        )
    # Weights of the usual .02 would leave the adapters nothing to act on.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


def example_loss(model: nn.Module, text: Text) -> Tensor:
    """Return the loss of one text, without any padding.

    A language model's: mean cross entropy of the next token. An encoder's: the mean vector of the
    text should be the same number everywhere, its first token over the size of the vocabulary.
    """
    output = model(input_ids=text[None])
    if hasattr(output, "logits"):
        return nn.functional.cross_entropy(output.logits[0, :-1], text[1:])
    return (output.last_hidden_state[0].mean(0) - text[0] / VOCABULARY).square().mean()


def peft_model(
    model: nn.Module,
    adapter: Mapping[str, Tensor],
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    fan_in_fan_out: bool = False,
) -> PeftModel:
    """Wrap a copy of a model with PEFT, with one client's adapter of names "<path>.lora_A"."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        fan_in_fan_out=fan_in_fan_out,
    )
    wrapped = get_peft_model(copy.deepcopy(model), config)
    names = dict(wrapped.eval().named_parameters())
    trainable = {name for name, value in names.items() if value.requires_grad}
    assert trainable == {_name(entry) for entry in adapter}
    with torch.no_grad():
        for entry, value in adapter.items():
            names[_name(entry)].copy_(value)
    return wrapped


def adapter_of(wrapped: PeftModel, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the adapter out of a PEFT model."""
    names = dict(wrapped.named_parameters())
    return {entry: names[_name(entry)].detach().clone() for entry in like}


def train_alone(
    wrapped: PeftModel,
    texts: Sequence[Text],
    plan: Sequence[Sequence[Sequence[int]]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float | None = None,
    anchor: Mapping[str, Tensor] | None = None,
    proximal: float = 0.0,
) -> float:
    """Train one client's PEFT model in place; `plan` holds steps of micro-batches of texts.

    Returns the mean loss over all texts seen, each before the step that used it.
    """
    names = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        names.values(), lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps
    )
    seen: list[float] = []
    for step in plan:
        number = sum(len(micro_batch) for micro_batch in step)
        optimizer.zero_grad()
        for micro_batch in step:
            losses = [example_loss(wrapped, texts[example]) for example in micro_batch]
            (torch.stack(losses).sum() / number).backward()
            seen += [loss.item() for loss in losses]
        if proximal:
            assert anchor is not None
            for entry, value in anchor.items():
                parameter = names[_name(entry)]
                parameter.grad += proximal * (parameter.detach() - value)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(names.values(), max_grad_norm)
        optimizer.step()
    return sum(seen) / len(seen)


def _name(entry: str) -> str:
    """Return PEFT's name of a parameter."""
    return f"base_model.model.{entry}.default.weight"
