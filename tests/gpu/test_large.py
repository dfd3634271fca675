"""CUDA and Triton on a tensor that fills much of a GPU; ``make gpu`` runs this file alone."""

import pytest
import torch
from torch.nn import Parameter

from layca_fast import FusedLayca

from .support import GPU, ON_GPU, every_gpu_backend

pytestmark = ON_GPU

ELEMENTS = 2**31 + 2**20 + 5

#: Bytes.
NEEDED = 60e9


@every_gpu_backend
def test_a_tensor_of_more_than_two_to_the_31_elements(backend: str, seed: int) -> None:
    # Not when the file is read: other processes take and return memory.
    free = torch.cuda.mem_get_info(GPU)[0]
    if free < NEEDED:
        pytest.skip(f"takes {NEEDED / 1e9:.0f} GB of a GPU's memory, of which {free / 1e9:.0f} GB are free")
    rate = 0.05
    param = Parameter(torch.randn(ELEMENTS, 1, device=GPU))
    param.grad = torch.randn(ELEMENTS, 1, device=GPU)
    before = param.detach().clone()
    FusedLayca([param], rate, momentum=0.9, backend=backend).step()
    dots = torch.zeros(3, dtype=torch.float64, device=GPU)
    for old, new in zip(before.split(2**27), param.detach().split(2**27), strict=True):
        w, v = old.double(), new.double()
        dots += torch.stack([(w * w).sum(), (w * v).sum(), (v * v).sum()])
        assert bool((old != new).double().mean() > 0.99), "some part of the tensor was not reached"
    n2, cross, m2 = dots.tolist()
    assert m2 / n2 == pytest.approx(1, abs=1e-6)
    assert cross / (n2 * m2) ** 0.5 == pytest.approx(1 / (1 + rate**2) ** 0.5, abs=1e-8)
