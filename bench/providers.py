"""Who takes the step: FusedLayca on each backend, torch's own SGD, and Layca as one would write it by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layca_fast import FusedLayca, attach, backends
from layca_fast.backends import load

MOMENTUM, RATE = 0.9, 1e-3


@dataclass(frozen=True)
class Provider:
    """``make(params)`` returns a function that takes one step in place.

    ``bytes_per_parameter`` counts what the algorithm reads and writes in float32 if nothing stays in cache between its
    passes: each of w, g and momentum read once and w and momentum written once make 20; a second pass over w and
    momentum makes 28.
    """

    name: str
    bytes_per_parameter: int
    make: Callable[[Sequence[Tensor]], Callable[[], object]]


def _layca(backend: str) -> Callable[[Sequence[Tensor]], Callable[[], object]]:
    return lambda params: FusedLayca(params, RATE, momentum=MOMENTUM, backend=backend).step


def _sgd(**options: bool) -> Callable[[Sequence[Tensor]], Callable[[], object]]:
    return lambda params: torch.optim.SGD(params, lr=RATE, momentum=MOMENTUM, **options).step


def _attached_sgd(params: Sequence[Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.SGD(params, lr=RATE, momentum=MOMENTUM, fused=True)
    attach(optimizer)
    return optimizer.step


def _four_operations(params: Sequence[Tensor]) -> Callable[[], object]:
    """The paper's four operations, tensor by tensor, with torch's reductions: what a port by hand looks like."""
    rotating = [param for param in params if param.dim() >= 2]
    buffers = [torch.zeros_like(param) for param in params]
    radii = {param: param.detach().norm() for param in rotating}

    @torch.no_grad()
    def step() -> None:
        for param, buffer in zip(params, buffers, strict=True):
            assert param.grad is not None
            buffer.mul_(MOMENTUM).add_(param.grad)
            if param.dim() < 2:
                param.sub_(RATE * buffer)
                continue
            norm = param.norm()
            projected = buffer - (buffer * param).sum() / norm**2 * param
            scaled = projected * (norm / projected.norm())
            param.sub_(RATE * scaled)
            param.mul_(radii[param] / param.norm())

    return step


def _native(name: str, device: torch.device) -> bool:
    """Whether a backend runs at its own speed here: Triton's interpreter does not."""
    interpreted = name == "triton" and device.type == "cpu"
    return backends()[name].available and load(name).refuses(device) is None and not interpreted


def providers(device: torch.device) -> list[Provider]:
    """All that can run on ``device``, the yardstick first."""
    layca = [name for name in ("cuda", "triton", "cpu", "torch") if _native(name, device)]
    return [
        Provider("SGD fused", 20, _sgd(fused=True)),
        Provider("SGD foreach", 32, _sgd(foreach=True)),
        *(Provider(f"FusedLayca {name}", 28, _layca(name)) for name in layca),
        # SGD's 20; 8 to keep w; 16 to exchange it for u, through a scratch that stays in cache; 20 to turn w by u.
        Provider("attach to SGD fused", 64, _attached_sgd),
        Provider("Layca by hand", 104, _four_operations),
    ]


def make_params(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    """Random weights with random gradients."""
    params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def assert_moves(params: Sequence[Tensor], step: Callable[[], object]) -> None:
    """Take one step and raise AssertionError unless every tensor moved and stayed finite."""
    before = [param.detach().clone() for param in params]
    step()
    for old, param in zip(before, params, strict=True):
        assert not torch.equal(old, param.detach()), "a tensor did not move"
        assert bool(torch.isfinite(param).all()), "a tensor is no longer finite"
