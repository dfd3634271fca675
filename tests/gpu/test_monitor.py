"""RotationMonitor on a GPU: records do not make the host wait, and the curves are those of a CPU."""

import pytest
import torch
from torch.nn import Parameter

from layca_fast import RotationMonitor
from layca_fast.monitor.keeping import KEEPS

from .support import GPU, ON_GPU, every_gpu_backend, on, waiting_is_an_error, weights

pytestmark = ON_GPU


@every_gpu_backend
@pytest.mark.parametrize("keep", KEEPS)
def test_records_do_not_wait_and_agree_with_the_cpu(keep: str, backend: str, seed: int) -> None:
    start = weights()
    here, there = [Parameter(weight.clone()) for weight in start], on(GPU, start)
    options = {"keep": keep, "per_step": keep != "bfloat16", "sketch_size": 500, "layers": ["0.*"]}
    cpu = RotationMonitor(torch.optim.SGD(here, 0.1), **options)
    gpu = RotationMonitor(torch.optim.SGD(there, 0.1), backend=backend, **options)
    for number in range(3):
        for param, twin, change in zip(here, there, weights(), strict=True):
            param.data += 0.3 * change
            twin.data.copy_(param.data)
        cpu.record()
        torch.cuda.synchronize()
        if number == 0:
            gpu.record()
            continue
        with waiting_is_an_error():
            gpu.record()
    for name in ("rotation", "angle", "norm"):
        expected, found = getattr(cpu.curves, name), getattr(gpu.curves, name)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7, equal_nan=True)
