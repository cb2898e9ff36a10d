import pytest
import torch

from fedrecsk.models.split_costs import split_costs
from tests.reference.tiny_language_models import (
    LENGTH,
    PATHS,
    WIDTH,
    adapted,
    texts,
    tiny_model,
)


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
