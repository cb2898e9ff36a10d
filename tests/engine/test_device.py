import numpy as np
import pytest
import torch

from fedrecsk.engine.device import (
    ELEMENTS_PER_THREAD,
    resolve_device,
    to_device,
    torch_threads,
)


def test_auto_is_the_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device() == resolve_device("auto") == torch.device(expected)


def test_names_and_devices_are_taken_as_they_are():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there_says_what_to_do(name):
    with pytest.raises(ValueError, match=r"device=.* cannot be used.*device='auto'"):
        resolve_device(name)


@pytest.mark.threads
@pytest.mark.parametrize(
    ("before", "n_elements", "inside"),
    [
        (2, 0, 1),
        (2, ELEMENTS_PER_THREAD, 1),
        (2, 2 * ELEMENTS_PER_THREAD, 2),
        (2, 100 * ELEMENTS_PER_THREAD, 2),  # never above the caller's own setting
        (1, 100 * ELEMENTS_PER_THREAD, 1),
    ],
)
def test_threads_are_capped_inside_and_restored(before, n_elements, inside):
    torch.set_num_threads(before)
    with torch_threads(n_elements) as threads:
        assert threads == inside == torch.get_num_threads()
    assert torch.get_num_threads() == before


@pytest.mark.threads
def test_threads_are_restored_after_an_error():
    torch.set_num_threads(2)
    inside = []

    def fail():
        with torch_threads(1):
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [1]
    assert torch.get_num_threads() == 2


def test_arrays_are_sent_as_they_are():
    values = np.arange(12).reshape(3, 4)
    for each in (values, values[:, ::2], values.T, values[:0], values / 2):
        sent = to_device(each, torch.device("cpu"))
        assert sent.shape == each.shape
        np.testing.assert_array_equal(sent.numpy(), each, strict=True)
    assert to_device(values, torch.device("meta")).device.type == "meta"


def test_copies_to_a_gpu_come_from_pinned_memory_and_do_not_block(monkeypatch):
    calls = []

    class Pinned:
        def to(self, device, *, non_blocking=False):
            calls.append((device.type, non_blocking))

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: Pinned())
    to_device(np.arange(3), torch.device("cuda"))
    assert calls == [("cuda", True)]
