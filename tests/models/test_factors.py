import numpy as np
import pytest
import torch

from fedrecsk.engine.streams import Streams
from fedrecsk.models.factors import random_factors


@pytest.mark.parametrize("item_bias", [False, True])
def test_random_factors_have_the_scale_asked_for_and_no_bias(item_bias):
    arguments = {
        "item_bias": item_bias,
        "init_scale": 0.3,
        "device": torch.device("cpu"),
    }
    users, table = random_factors(400, 300, 8, streams=Streams(0), **arguments)
    assert users.shape == (400, 8)
    assert table.shape == (300, 8 + item_bias)
    for values in (users, table[:, :8]):
        assert values.std() == pytest.approx(0.3, rel=0.05)
        assert abs(values.mean()) < 5 * 0.3 / np.sqrt(values.numel())
    assert torch.equal(table[:, 8:], torch.zeros(300, int(item_bias)))
    again, _ = random_factors(400, 300, 8, streams=Streams(0), **arguments)
    other, _ = random_factors(400, 300, 8, streams=Streams(1), **arguments)
    assert torch.equal(users, again)
    assert not torch.equal(users, other)
    assert abs(np.corrcoef(users[:300].flatten(), table[:, :8].flatten())[0, 1]) < 0.1
