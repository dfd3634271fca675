"""``python -m layca_fast verify``: every backend on this machine against the float64 reference."""

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import backends, load
from ..figures.console import print_table
from ..optimizer import FusedLayca
from ..reference import ANGLES, reference_step, slices
from ..state.members import rotates
from .cases import DEFAULT, FULL, QUICK, Case, cases, effort_of, interpreting
from .progress import progress

Shape = tuple[int, ...]


@dataclass
class Errors:
    """The largest errors over the layers and steps of a case, each divided by what is allowed for it.

    ``angle``: of the realised rotation, relative to atan(lr), at any step; ``norm``: relative to the radius, at any
    step; ``weight``: distance to the reference after the last step, relative to the tensor's norm. The ``*_ratio``
    are these over their tolerances: 1 or less passes.
    """

    angle: float = 0.0
    norm: float = 0.0
    weight: float = 0.0
    angle_ratio: float = 0.0
    norm_ratio: float = 0.0
    weight_ratio: float = 0.0

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return all(ratio <= 1.0 for ratio in (self.angle_ratio, self.norm_ratio, self.weight_ratio))

    def add(self, kind: str, error: float, allowed: float) -> None:
        """Keep ``error`` if it is the worst of its kind so far (NaN is the worst of all)."""
        ratio, worst = error / allowed, getattr(self, f"{kind}_ratio")
        if not math.isnan(worst) and not ratio <= worst:
            setattr(self, kind, error)
            setattr(self, f"{kind}_ratio", ratio)


def angle_between(before: Tensor, after: Tensor) -> float:
    """The angle between two float64 vectors in radians, exact for small angles, where arccos is not."""
    dot = torch.dot(before, after)
    orthogonal = after - dot / torch.dot(before, before) * before
    return math.atan2(float(orthogonal.norm() * before.norm()), float(dot))


def angle_tolerance(dtype: torch.dtype, angle: float, n: int) -> float:
    """Relative error allowed in a rotation of n weights by ``angle`` radians: storing them costs the second term."""
    exact, stored = (1e-12, 6e-16) if dtype == torch.float64 else (1e-6, 3e-7)
    return exact + stored / (angle * math.sqrt(n))


def layers_of(tensor: Tensor, chunks: Any) -> list[Tensor]:
    """The layers of a rotating tensor as flat float64 vectors on the CPU."""
    wide = tensor.detach().to("cpu", torch.float64, copy=True)
    return [layer.flatten() for layer in slices(wide, chunks)]


def _turned(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).contiguous().transpose(0, 1)


def _gradient(param: Tensor, case: Case, turns: bool, generator: torch.Generator) -> Tensor:
    noise = torch.randn(param.shape, dtype=torch.float64, device="cpu", generator=generator)
    if case.sine is None or not turns:
        return noise.to(case.dtype)
    weight = param.cpu().double()
    orthogonal = noise - (noise * weight).sum() / weight.square().sum() * weight
    tilted: Tensor = case.sine * orthogonal / orthogonal.norm() + math.sqrt(1 - case.sine**2) * weight / weight.norm()
    return tilted.to(case.dtype)


def _away_from_ties(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """``grad`` changed where Lion's step, a sign, would hang on the last bit: no two precisions agree there."""
    if group["base"] != "lion":
        return grad
    wide = -grad.double() if group["maximize"] else grad.double()
    mixed = torch.lerp(wide, state.get("exp_avg", torch.zeros_like(wide)), group["betas"][0])
    return torch.where(mixed.abs() < 1e-4, grad + 0.1, grad)


def compare(case: Case, backend: str, device: torch.device, seed: int = 0) -> Errors:
    """Run ``case`` on one backend beside the reference in float64 on the same gradients."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, dtype=case.dtype, device="cpu", generator=generator) for shape in case.shapes]
    placed = [_turned(weight) if case.turned else weight for weight in weights]
    params = [weight.to(device, copy=True).requires_grad_() for weight in placed]
    expected = [weight.to(torch.float64, copy=True) for weight in weights]
    states: list[dict[str, Any]] = [{} for _ in params]
    optimizer = FusedLayca(params, case.lr, backend=backend, **case.options)
    group = optimizer.param_groups[0]
    turns = [rotates(param, group) and param.numel() > 1 for param in params]
    errors = Errors()
    chunks = [group["chunks"] if turn else 1 for turn in turns]
    largest = [[0.0] * len(layers_of(weight, each)) for weight, each in zip(expected, chunks, strict=True)]
    for _ in range(case.steps):
        ours = [optimizer.effective_weight(param) for param in params]
        before = [layers_of(weight, group["chunks"]) if turn else [] for weight, turn in zip(ours, turns, strict=True)]
        asked: list[list[float]] = []
        for param, start, weight, state, turn in zip(params, ours, expected, states, turns, strict=True):
            grad = _away_from_ties(_gradient(start, case, turn, generator), state, group)
            if case.sine is not None:
                # A hair's difference between the weights turns such a step elsewhere: compare single steps.
                weight.copy_(start)
            param.grad = grad.to(device)
            step = reference_step(weight, grad.double(), state, lr=case.lr, **case.options)
            asked.append(_asked_angles(group, start, step) if turn else [])
        optimizer.step()
        for param, layers, angles in zip(params, before, asked, strict=True):
            if layers:
                _add_rotation(errors, case, optimizer, param, layers, angles)
        # The norm of a tensor that does not rotate may pass through zero: it is measured by its largest.
        for norms, weight, each in zip(largest, expected, chunks, strict=True):
            norms[:] = map(max, norms, (float(layer.norm()) for layer in layers_of(weight, each)))
    allowed = 1e-12 if case.dtype == torch.float64 else 1e-6
    for param, weight, norms, each in zip(params, expected, largest, chunks, strict=True):
        layers = layers_of(optimizer.effective_weight(param), each)
        for layer, theirs, norm in zip(layers, layers_of(weight, each), norms, strict=True):
            if layer.numel() > 0:
                errors.add("weight", float((layer - theirs).norm()) / norm, allowed)
    return errors


def _asked_angles(group: Mapping[str, Any], weights: Tensor, step: Tensor) -> list[float]:
    """The rotation that each layer of a tensor is to make from ``weights`` on this base step, in radians."""
    lr, angles = group["lr"], []
    for weight, direction in zip(layers_of(weights, group["chunks"]), layers_of(step, group["chunks"]), strict=True):
        angles.append(ANGLES[group["rule"]](lr, angle_between(weight, direction)))
    return angles


def _add_rotation(
    errors: Errors, case: Case, optimizer: FusedLayca, param: Tensor, before: list[Tensor], asked: list[float]
) -> None:
    group = optimizer.param_groups[0]
    radii = optimizer.state[param]["radius"].tolist()
    after = layers_of(optimizer.effective_weight(param), group["chunks"])
    for old, new, radius, angle in zip(before, after, radii, asked, strict=True):
        error = abs(angle_between(old, new) / angle - 1)
        errors.add("angle", error, angle_tolerance(case.dtype, angle, old.numel()))
        target = float(old.norm()) if group["radius"] == "current" else radius
        errors.add("norm", abs(float(new.norm()) / target - 1), 1e-12 if case.dtype == torch.float64 else 2e-7)


def places() -> Iterator[tuple[str, torch.device]]:
    """Every (backend, device) pair that can run here."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for name, status in backends().items():
        for device in devices:
            if status.available and load(name).refuses(device) is None:
                yield name, device


def _verify(name: str, device: torch.device, seed: int, how: str) -> list[bool]:
    """Print the table of one backend; returns whether each case passed."""
    chosen = list(cases(effort_of(how, name, device)))
    place = "in the interpreter" if name == "triton" and interpreting() else f"on {device.type}"
    print(f"==> Backend {name} {place}: {len(chosen)} cases", flush=True)
    rows, passed = [], []
    with progress([name], len(chosen), "cases") as advance:
        for case in chosen:
            dtype = str(case.dtype).removeprefix("torch.")
            advance(0, f"{case.name}, {dtype}", by=0)
            errors = compare(case, name, device, seed)
            advance(0, f"{case.name}, {dtype}")
            passed.append(errors.passed)
            figures = [f"{value:.1e}" for value in (errors.angle, errors.norm, errors.weight)]
            rows.append([case.name, dtype, *figures, "pass" if errors.passed else "FAIL"])
    title = f"{name} {place}: largest relative errors against the float64 reference"
    print_table(title, ["case", "dtype", "angle", "norm", "weight", ""], rows)
    return passed


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table per backend; returns 1 if any row failed."""
    parser = argparse.ArgumentParser(prog="python -m layca_fast verify", description=__doc__)
    parser.add_argument("--backend", action="append", help="only this backend (may be repeated)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only on tensors there (default: everywhere)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_const", const=QUICK, dest="how", help="few steps: seconds")
    length.add_argument(
        "--full", action="store_const", const=FULL, dest="how", help="many steps, and Triton's interpreter: minutes"
    )
    parser.set_defaults(how=DEFAULT)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and gradients (default 0)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in args.backend or ():
        status = backends()[load(name).name]
        if not status.available:
            parser.error(f"--backend {name} cannot run here: {status.reason}")
    asked = [
        (name, device)
        for name, device in places()
        if name in (args.backend or [name]) and args.device in (None, device.type)
    ]
    # What Triton compiles are the formulas that the torch backend runs, and the interpreter takes minutes.
    slow = [(name, device) for name, device in asked if name == "triton" and interpreting()]
    if args.backend or args.how == FULL or not any(name == "torch" for name, _ in asked):
        slow = []
    count = failed = 0
    for name, device in asked:
        if (name, device) in slow:
            continue
        passed = _verify(name, device, args.seed, args.how)
        count, failed = count + len(passed), failed + passed.count(False)
    if slow:
        print("not run: triton (here only its interpreter, which takes minutes: --full or --backend triton)")
    for name, status in backends().items():
        if not status.available:
            print(f"not run: {name} ({status.reason})")
    if not count:
        print("no backend that was asked for takes tensors on the device that was asked for")
    print(f"{count - failed} of {count} cases passed")
    return 1 if failed or not count else 0
