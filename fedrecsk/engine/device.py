"""Where the tensors live, and how many threads work on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedrecsk.engine.parallel import local_rank

# Below this many elements a tensor operation is over before a second thread has woken up:
# small batched products were measured up to ten times slower on many threads than on one.
ELEMENTS_PER_THREAD = 262_144


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn the ``device`` parameter of an estimator into a torch device.

    Parameters
    ----------
    device : str or torch.device, default="auto"
        ``"auto"`` takes the first GPU where there is one, else the CPU; of several processes that
        share a fit, each takes a GPU of its own while there are enough. Everything else is a torch
        device name such as ``"cpu"`` or ``"cuda:1"``.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        If the name is no torch device, or this machine has no such device.

    Examples
    --------
    >>> from fedrecsk.engine.device import resolve_device
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if isinstance(device, str) and device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = local_rank()
        return torch.device("cuda" if rank is None else f"cuda:{rank % torch.cuda.device_count()}")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={device!r} cannot be used on this machine: {error}. "
            "Use device='auto' or device='cpu'."
        ) from error
    return resolved


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Send an array to a device without waiting for what the device still has to do.

    Parameters
    ----------
    values : ndarray
        Not to be changed afterwards: on a CPU the tensor shares its memory.
    device : torch.device

    Returns
    -------
    Tensor
        Of the same shape and type.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from fedrecsk.engine.device import to_device
    >>> to_device(np.array([2, 3]), torch.device("cpu"))
    tensor([2, 3])
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        # Out of ordinary memory a copy waits until all work before it is done. torch keeps a
        # pinned block until the copy out of it is over, and then uses it again.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def torch_threads(n_elements: int) -> Iterator[int]:
    """Cap torch's threads to what work of `n_elements` can use, and restore the setting.

    The caller's own setting (``torch.set_num_threads``, ``OMP_NUM_THREADS``, joblib's inner
    limit) is an upper bound that is never raised.

    Parameters
    ----------
    n_elements : int
        Number of tensor elements that one operation of the work touches.

    Yields
    ------
    int
        The number of threads in force inside the block.
    """
    before = torch.get_num_threads()
    cap = max(1, min(before, n_elements // ELEMENTS_PER_THREAD))
    torch.set_num_threads(cap)
    try:
        yield cap
    finally:
        torch.set_num_threads(before)
