"""Who takes the step, as a table per base: FusedLayca, Layca by hand, torch's optimizers, and those of other packages.

Bytes per parameter count what a provider's operations read and write in float32 if nothing stays in cache between
them, 4 for each tensor read and 4 for each written. The floors, with w, g, momentum m and Adam's v: plain SGD reads w
and g and writes w, 12; momentum reads and writes m besides, 20; Adam m and v, 28. Layca's second pass reads w and what
its step is made of, and writes w.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from layca_fast import FusedLayca, __version__, attach, backends
from layca_fast.backends import load

from . import bare, by_hand
from .by_hand import BETAS, BUFFERS, EPS, MOMENTUM, RATE, Step

BASES = tuple(BUFFERS)

#: The optimizer that the base is an option of, in torch.
FAMILIES = {"sgd": "SGD", "momentum": "SGD", "adam": "Adam"}

#: The CPU backend, and what it takes where nothing rotates: the same tensors and states in one pass.
OURS, PLAIN, LEARNED = "FusedLayca cpu", "FusedLayca cpu, rotate=False", "FusedLayca cpu, radius=learned"

#: Of both, the kernels without the host's part of a step; and what a loop takes that does nothing else.
KERNELS, PLAIN_KERNELS = "FusedLayca cpu, kernels alone", "FusedLayca cpu, rotate=False, kernels alone"
BARE, BARE_PLAIN = "bare C++ loop", "bare C++ loop, rotate=False"

#: Relative error allowed to FusedLayca's rotations by atan(RATE), beside random rounding of the stored weights. Adam's
#: step on these gradients is a sign, so all weights of one binade are rounded alike: up to 2^-24 of w, at a step of
#: RATE of w.
LAYCA_ACCURACY = {"sgd": 1e-6, "momentum": 1e-6, "adam": 2**-24 / RATE}

#: The same for attach, whose base step, 1e-3 of the weights or more, is their rounded difference: bench.attach_error.
ATTACH_ACCURACY = {base: accuracy + 1e-5 for base, accuracy in LAYCA_ACCURACY.items()}

#: The same for hand-written Layca, which takes its dots, or its norms, from torch in float32: on a CPU torch.dot is off
#: by 1e-4 at 4e7 elements, torch.norm and _foreach_norm by 3e-3, and the angle is a quotient of two.
DOTS_ACCURACY, NORMS_ACCURACY = 1e-3, 1e-2

#: Where a graph over all tensors is compiled, compiling takes minutes beyond this many.
MOST_TENSORS = 200


@dataclass(frozen=True)
class Provider:
    """``make(params)`` returns a function that takes one step in place.

    ``state`` and ``scratch`` are bytes per parameter in float32: kept between steps, and allocated during one.
    ``accuracy`` is the relative error allowed to rotations by atan(RATE), beside what storing float32 costs; None for
    an optimizer that does not promise that angle. ``alters_grad``: it writes to gradients or drops them. ``package``:
    the distribution that it comes from. ``skipped``: why it cannot run; "" if it can.
    """

    name: str
    bytes_per_parameter: int
    make: Callable[[Sequence[Tensor]], Step]
    state: int = 0
    scratch: int = 0
    accuracy: float | None = None
    alters_grad: bool = False
    package: str = "torch"
    slow_to_compile: bool = False
    only_float32: bool = False
    skipped: str = ""

    @property
    def package_version(self) -> str:
        """The package with its version, or "" where it is not installed."""
        return "" if self.skipped and find_spec(MODULES[self.package]) is None else _named_version(self.package)


#: What users import from each distribution.
MODULES = {
    "torch": "torch",
    "layca_fast": "layca_fast",
    "torch-optimi": "optimi",
    "pytorch_optimizer": "pytorch_optimizer",
    "heavyball": "heavyball",
    "apex": "apex",
}


def _named_version(package: str) -> str:
    # Our own code may run from its folder, and others may lie on the path, without ever having been installed.
    if package == "layca_fast":
        return f"{package} {__version__}"
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} {getattr(sys.modules.get(MODULES[package]), '__version__', 'of unknown version')}"


def yardstick(base: str) -> str:
    """The name of the provider that ratios are taken to: torch's fused optimizer."""
    return f"{FAMILIES[base]} fused"


def _options(base: str) -> dict[str, Any]:
    """The base's hyperparameters, named as in torch.optim."""
    return {"sgd": {}, "momentum": {"momentum": MOMENTUM}, "adam": {"betas": BETAS, "eps": EPS}}[base]


def _torch_step(base: str, **options: bool) -> Callable[[Sequence[Tensor]], Step]:
    optimizer = getattr(torch.optim, FAMILIES[base])
    return lambda params: optimizer(params, lr=RATE, **_options(base), **options).step


def _attached_step(base: str) -> Callable[[Sequence[Tensor]], Step]:
    def make(params: Sequence[Tensor]) -> Step:
        optimizer = getattr(torch.optim, FAMILIES[base])(params, lr=RATE, **_options(base), fused=True)
        attach(optimizer)
        return optimizer.step

    return make


def turning_all(params: Sequence[Tensor], **options: Any) -> FusedLayca:
    """With embeddings and heads of a vocabulary, too, which nobody trains here: no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".* seems to be an embedding", category=UserWarning)
        return FusedLayca(params, RATE, **options)


def _layca_step(base: str, backend: str, **more: Any) -> Callable[[Sequence[Tensor]], Step]:
    name = "adam" if base == "adam" else "sgd"
    options = {"base": name, "backend": backend, **_options(base), **more}
    return lambda params: turning_all(params, **options).step


def _kernels_step(base: str, **more: Any) -> Callable[[Sequence[Tensor]], Step]:
    def make(params: Sequence[Tensor]) -> Step:
        step = _layca_step(base, "cpu", **more)(params)
        # The second finds what it did not have to make.
        step(), step()
        optimizer: Any = step.__self__
        # From the start, as the others: momentum that others have not would some time just outweigh the gradient.
        states = optimizer.state.values()
        torch._foreach_zero_(
            [entry[name] for entry in states for name in entry if name != "radius"] or [torch.zeros(1)]
        )
        calls = [batch.call(backend) for backend, batch in optimizer._plan.batches]

        def call_all() -> None:
            # It owns the tables, and has to live as long as this.
            assert optimizer
            for call in calls:
                call()

        return call_all

    return make


def _imported_step(module: str, name: str, **options: Any) -> Callable[[Sequence[Tensor]], Step]:
    """A step of an optimizer that is imported only when it is made."""
    return lambda params: getattr(import_module(module), name)(params, lr=RATE, **options).step


def _torch_providers(base: str) -> Iterator[Provider]:
    state = 4 * BUFFERS[base]
    fused = {"sgd": 12, "momentum": 20, "adam": 28}[base]
    # w + g: 12. m * momentum: 8, + g: 12, w + m: 12. m and g: 12, v: 8 + 12, its root, scaled, + eps: 24, w: 16.
    unfused = {"sgd": 12, "momentum": 32, "adam": 72}[base]
    family = FAMILIES[base]
    yield Provider(f"{family} fused", fused, _torch_step(base, fused=True), state)
    scratch = 4 if base == "adam" else 0
    yield Provider(f"{family} foreach", unfused, _torch_step(base, foreach=True), state, scratch)
    yield Provider(f"{family} for-loop", unfused, _torch_step(base, foreach=False), state, scratch)


def layca_skipped(name: str, device: torch.device) -> str:
    """Why a backend does not run at its own speed here."""
    status = backends()[name]
    if not status.available:
        return status.reason
    if name == "triton" and device.type == "cpu":
        return "on a CPU its kernels run in Triton's interpreter, which is for correctness"
    return load(name).refuses(device) or ""


def _layca_providers(base: str, device: torch.device) -> Iterator[Provider]:
    state = 4 * BUFFERS[base]
    # w and g: 8, m: 8, v: 8; then w: 8 and, without state g, else m and v, 4 each.
    # (The CPU's adam reads the steps that it has kept instead of m and v, as far as they are still in a cache.)
    moved = {"sgd": 20, "momentum": 28, "adam": 40}[base]
    for name in ("cuda", "triton", "cpu", "torch"):
        yield Provider(
            f"FusedLayca {name}",
            moved,
            _layca_step(base, name),
            state,
            accuracy=LAYCA_ACCURACY[base],
            package="layca_fast",
            skipped=layca_skipped(name, device),
        )
    floor = {"sgd": 12, "momentum": 20, "adam": 28}[base]
    on_cpu = partial(Provider, state=state, package="layca_fast", skipped=layca_skipped("cpu", device))
    yield on_cpu(PLAIN, floor, _layca_step(base, "cpu", rotate=False))
    yield on_cpu(KERNELS, moved, _kernels_step(base), accuracy=LAYCA_ACCURACY[base])
    yield on_cpu(PLAIN_KERNELS, floor, _kernels_step(base, rotate=False))
    no_bare = bare.missing() if device.type == "cpu" else "it is for CPUs"
    limit = partial(Provider, state=state, only_float32=True, package="layca_fast", skipped=no_bare)
    yield limit(BARE, moved, bare.bare_step(base, rotate=True), accuracy=LAYCA_ACCURACY[base])
    yield limit(BARE_PLAIN, floor, bare.bare_step(base, rotate=False))
    # w and g once more.
    yield on_cpu(LEARNED, moved + 8, _layca_step(base, "cpu", radius="learned"), accuracy=LAYCA_ACCURACY[base])
    # The optimizer's own; 8 to keep w; 16 to exchange it for u, through a scratch that stays in cache; 20 to turn w.
    attached = floor + 44
    yield Provider(
        f"attach to {yardstick(base)}",
        attached,
        _attached_step(base),
        state + 4,
        accuracy=ATTACH_ACCURACY[base],
        package="layca_fast",
    )


def _compiler_missing(device: torch.device) -> str:
    if device.type == "cuda":
        return "" if find_spec("triton") else "torch.compile needs triton"
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return "" if any(map(shutil.which, names)) else f"torch.compile needs a C++ compiler ({' or '.join(names)})"


def _by_hand_providers(base: str, device: torch.device) -> Iterator[Provider]:
    make = partial(Provider, state=4 * BUFFERS[base])
    # The step u. Momentum: m * momentum 8, + g 12. Adam: m 12, v 8 + 12, root 8, scaled 8, + eps 8, quotient 12.
    step = {"sgd": 0, "momentum": 20, "adam": 68}[base]
    # |w| 4, u*w 12, its sum 4, c*w 8, u - c*w 12, its norm 4, scaled 8, by the rate 8, w 12, |w| 4, scaled 8.
    literal = by_hand.per_tensor(base, by_hand.four_operations)
    yield make("Layca by hand, four operations", step + 84, literal, scratch=8, accuracy=NORMS_ACCURACY)
    # Dots 4 + 8 + 4, a*w 8, + b*u 12.
    closed = by_hand.per_tensor(base, by_hand.closed_form)
    scratch = 4 if base == "adam" else 0
    yield make("Layca by hand, closed form", step + 36, closed, scratch=scratch, accuracy=DOTS_ACCURACY)
    # |w| 4, w*u 12, its sum 4, |u| 4, a*w 8, b*u 8, w + b*u 12.
    lists = by_hand.foreach(base)
    yield make("Layca by hand, foreach", step + 52, lists, scratch=scratch + 4, accuracy=NORMS_ACCURACY)
    fused = {"sgd": 20, "momentum": 28, "adam": 40}[base]  # two passes at best, as FusedLayca
    missing = _compiler_missing(device)
    yield make("Layca by hand, torch.compile", fused, by_hand.compiled(base), accuracy=DOTS_ACCURACY, skipped=missing)


def not_installed(package: str) -> str:
    if find_spec(MODULES[package]) is not None:
        return ""
    return f"{package} is not installed" + ("" if package == "apex" else ": pip install 'layca_fast[bench]'")


def _other_packages(base: str, device: torch.device) -> Iterator[Provider]:
    state, gpu = 4 * BUFFERS[base], device.type == "cuda"
    optimi, zoo, heavy = (
        partial(Provider, state=state, package=package, skipped=not_installed(package))
        for package in ("torch-optimi", "pytorch_optimizer", "heavyball")
    )
    if base != "adam":
        momentum = MOMENTUM if base == "momentum" else 0.0
        # On a GPU one Triton kernel per tensor, elsewhere torch's operations one by one.
        moved = {"sgd": 12, "momentum": 20 if gpu else 32}[base]
        yield optimi("optimi SGD", moved, _imported_step("optimi", "SGD", momentum=momentum))
        # Norms of w and g 8, g + 0*w 12, scaled 8, w 12; with momentum also m * momentum 8, + g 12, copied to g 8.
        lars = _imported_step("pytorch_optimizer", "LARS", momentum=momentum, trust_coefficient=1.0)
        yield zoo("pytorch_optimizer LARS", 40 if base == "sgd" else 68, lars, state=state + 4, alters_grad=True)
    if base == "sgd":
        # Layca without its projection, to first order. Norms 8, scaled g 8, w 12, over sqrt(1 + lr^2) 8.
        yield zoo("pytorch_optimizer Fromage", 36, _imported_step("pytorch_optimizer", "Fromage"), scratch=4)
    compiling = partial(heavy, alters_grad=True, slow_to_compile=True, scratch=8)
    if base == "momentum":
        yield compiling("heavyball SGD", 20, _imported_step("heavyball", "SGD", beta=MOMENTUM))
    if base == "adam":
        # As torch's without the correction, 64; in Triton 28.
        optimi_adam = _imported_step("optimi", "Adam", betas=BETAS, eps=EPS)
        yield optimi("optimi Adam", 28 if gpu else 64, optimi_adam, scratch=4)
        # m 20, v 20, root 8, + eps 8, reciprocal 8, * m 12, norms 8, scaled 8, w 12.
        lamb = _imported_step("pytorch_optimizer", "Lamb", betas=BETAS, eps=EPS)
        yield zoo("pytorch_optimizer LAMB", 104, lamb, scratch=8)
        # Keeps norms by the rule that FusedLayca calls "hyperball"; two passes at best.
        yield compiling("heavyball HyperBallAdamW", 40, _imported_step("heavyball", "HyperBallAdamW", betas=BETAS))
        # The norm of g 4, m, v and u from w and g 28, norms of w and u 8, w 12.
        skipped = not_installed("apex") if gpu else "apex runs on NVIDIA GPUs only"
        fused_lamb = _imported_step("apex.optimizers", "FusedLAMB", betas=BETAS, eps=EPS)
        yield Provider(
            "apex FusedLAMB", 52, fused_lamb, state, scratch=4, alters_grad=True, package="apex", skipped=skipped
        )


def providers(base: str, device: torch.device) -> list[Provider]:
    """All providers of ``base`` ("sgd", "momentum" or "adam"), the yardstick first; some may be skipped."""
    return [
        *_torch_providers(base),
        *_layca_providers(base, device),
        *_by_hand_providers(base, device),
        *_other_packages(base, device),
    ]
