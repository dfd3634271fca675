"""Radii that groups give, layers that join the sphere later, and the guard of norms: as on the CPU, without a wait."""

from typing import Any

import pytest
import torch

from layca_fast import FusedLayca, NormDriftError

from ..support import relative_distance
from .support import GPU, ON_GPU, every_gpu_backend, give, on, waiting_is_an_error, weights

pytestmark = ON_GPU

SHAPE = (64, 129)


def start(options: dict[str, Any]) -> torch.Tensor:
    return torch.zeros(SHAPE) if "joins_at" in options else torch.randn(SHAPE)


@pytest.mark.parametrize(
    "options",
    [{"joins_at": 1.0, "chunks": "all"}, {"joins_at": 8.0, "radius": "current"}, {"radius": 2.5}, {"radius": len}],
    ids=str,
)
@every_gpu_backend
def test_reaches_radii_and_joins_as_on_the_cpu(backend: str, options: dict[str, Any], seed: int) -> None:
    weight = start(options)
    ours, theirs = on(GPU, [weight]), on(torch.device("cpu"), [weight])
    optimizers = [
        FusedLayca(params, 0.01, momentum=0.9, backend=name, **options)
        for params, name in ((ours, backend), (theirs, "torch"))
    ]
    for _ in range(20):
        grads = weights([SHAPE])
        for optimizer in optimizers:
            give(optimizer, grads)
            optimizer.step()
        assert relative_distance(ours[0], theirs[0]) <= 2e-6
        radii = optimizers[0].state[ours[0]]["radius"].cpu(), optimizers[1].state[theirs[0]]["radius"]
        torch.testing.assert_close(*radii, rtol=2e-6, atol=0)
    assert bool((radii[0] > 0).all())


@every_gpu_backend
def test_the_guard_finds_a_foreign_write_and_waits_only_to_be_read(backend: str, seed: int) -> None:
    params = on(GPU, weights([SHAPE, (100, 100)]))
    optimizer = FusedLayca(params, 0.03, momentum=0.9, backend=backend)
    for number in range(3):
        give(optimizer, weights([SHAPE, (100, 100)]))
        optimizer.step()
        with waiting_is_an_error():
            found = [optimizer.check_norms(at=at) for at in ("step", "now")]
        assert abs(found[1].worst()[1]) < 1e-5
        assert list(found[0].above(1e-3)) == (["0.1"] if number == 2 else [])
        if number == 1:
            params[1].data.mul_(0.5)
    with pytest.raises(NormDriftError, match=r"0\.1 -0\.5"):
        optimizer.check_norms(above=1e-3)
