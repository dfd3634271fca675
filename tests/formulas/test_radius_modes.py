"""radius="current" restores the norm before the step, whatever radius is stored: reference and backends alike."""

import pytest
import torch

from layca_fast import FusedLayca
from layca_fast.commands.verify import layers_of
from layca_fast.reference import reference_step

from ..support import every_backend, parameter, relative_distance, same_bits, train


@pytest.mark.parametrize("chunks", [1, 2, "all"], ids=str)
@pytest.mark.parametrize("rule", ["layca", "hyperball"])
@every_backend
def test_a_stored_radius_waits_while_the_current_norm_is_kept(
    backend: str, rule: str, chunks: int | str, seed: int
) -> None:
    """From "initial" to "current" and back, with weights that somebody rescales in between."""
    param = parameter(4, 3, backend=backend)
    optimizer = FusedLayca([param], 0.1, rule=rule, chunks=chunks, momentum=0.9, backend=backend)
    weight = param.detach().double().cpu()
    state: dict[str, object] = {}
    for radius in ("initial", "current", "current", "initial"):
        optimizer.param_groups[0]["radius"] = radius
        with torch.no_grad():
            param.mul_(1.5)
        weight *= 1.5
        before = [layer.norm() for layer in layers_of(weight, chunks)]
        stored = None if not state else list(state["radius"])  # type: ignore[call-overload]
        grad = torch.randn(4, 3)
        train(optimizer, [[grad.to(param.device)]])
        options = {"rule": rule, "chunks": chunks, "radius": radius, "momentum": 0.9}
        reference_step(weight, grad.double(), state, lr=0.1, **options)
        assert relative_distance(param, weight) < 1e-6
        if radius == "current":
            after = [float(layer.norm()) for layer in layers_of(weight, chunks)]
            assert after == pytest.approx([float(norm) for norm in before], rel=1e-12)
            assert same_bits(state["radius"], stored)
