import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

Launch = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small tensors are fastest on one thread; tests of threading choose their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Give a function that runs a program in several processes, as a launcher would."""
    return _launch


def _launch(
    n_processes: int, *program: str, timeout: float = 120, **environment: str
) -> list[tuple[int, str, str]]:
    """Run ``python *program`` once a rank; return their exit codes, outputs and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *program],
            cwd=Path(__file__).parents[1],
            env=os.environ
            | common
            | {"WORLD_SIZE": str(n_processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n_processes)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]
