"""What goes on around an optimizer, in other threads and in torch's global settings, must not change its steps."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from layca_fast import FusedLayca

from ..support import clones, contents, every_backend, native_backends, parameter, random_gradients, same_bits, train


@native_backends
def test_optimizers_in_several_threads_do_not_disturb_each_other(backend: str, seed: int) -> None:
    # Large enough that the cpu backend shares it out among its own threads.
    shapes = [(200, 300), (17,), (5, 4, 3)]
    start = [[parameter(*shape) for shape in shapes] for _ in range(4)]
    grads = [random_gradients(params, 25) for params in start]

    def run(index: int) -> FusedLayca:
        params = [param.detach().clone().requires_grad_() for param in start[index]]
        optimizer = FusedLayca(params, 0.05 * (index + 1), momentum=0.2 * index, backend=backend)
        train(optimizer, grads[index])
        return optimizer

    expected = [contents(run(index)) for index in range(4)]
    found: dict[int, list[Any]] = {}
    threads = [
        threading.Thread(target=lambda index=index: found.update({index: contents(run(index))})) for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_bits([found[index] for index in range(4)], expected)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "a default device where no parameter is": lambda: torch.device("meta"),
    "a default dtype of 16 bits": lambda: default_dtype(torch.bfloat16),
    "a default dtype of 64 bits": lambda: default_dtype(torch.float64),
    "autocast around the step": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "gradients enabled": torch.enable_grad,
    "deterministic algorithms": deterministic_algorithms,
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@every_backend
def test_global_settings_of_torch_change_nothing(backend: str, setting: Callable[[], Any], seed: int) -> None:
    params = [parameter(4, 3, backend=backend), parameter(5, backend=backend)]
    optimizers = [
        FusedLayca(each, 0.1, momentum=0.9, nesterov=True, backend=backend) for each in (params, clones(params))
    ]
    grads = random_gradients(params, 2)
    with setting():
        train(optimizers[0], grads)
        optimizers[0].rotation_stats()
    train(optimizers[1], grads)
    assert same_bits(contents(optimizers[0]), contents(optimizers[1]))
