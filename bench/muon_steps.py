"""Who takes Muon's step: FusedLayca, a loop by hand, torch, and those of other packages; and its products alone."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from layca_fast.formulas import products

from .by_hand import RATE, Step
from .providers import LAYCA_ACCURACY, Provider, not_installed, turning_all
from .runner import Contestant, Model

MOMENTUM, STEPS, COEFFICIENTS, EPS = 0.95, 5, (3.4445, -4.775, 2.0315), 1e-7

OURS, PLAIN, BY_HAND, TORCH = "FusedLayca muon", "FusedLayca muon, rotate=False", "Muon by hand", "torch Muon"

#: Ours with products of the same type as torch's.
OURS_16 = "FusedLayca muon, ns_dtype=bfloat16"


def orthogonalized(matrix: Tensor) -> Tensor:
    """The Newton-Schulz image of a matrix, in its own type."""
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def by_hand(params: Sequence[Tensor]) -> Step:
    """Matrix by matrix, in float32: an average, its image, one update."""
    buffers = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def step() -> None:
        for param, buffer in zip(params, buffers, strict=True):
            assert param.grad is not None
            buffer.lerp_(param.grad, 1 - MOMENTUM)
            direction = orthogonalized(param.grad.lerp(buffer, MOMENTUM))
            param.add_(direction, alpha=-RATE * max(1.0, param.shape[0] / param.shape[1]) ** 0.5)

    return step


def _ours(params: Sequence[Tensor], **options: Any) -> Step:
    return turning_all(params, base="muon", **options).step


def _imported(module: str, params: Sequence[Tensor], **options: Any) -> Step:
    # By its name, as no checker knows what a module that is imported by name has.
    return getattr(import_module(module), "Muon")(params, lr=RATE, **options).step  # noqa: B009


def _zoo(params: Sequence[Tensor]) -> Step:
    # It takes groups, where the others take tensors.
    return _imported("pytorch_optimizer", [{"params": list(params), "use_muon": True}])  # type: ignore[list-item]


def float32() -> Iterator[Provider]:
    """Those whose products are float32 on the CPU; the loop by hand is the yardstick."""
    make = partial(Provider, bytes_per_parameter=0, state=4, scratch=8)
    yield make(BY_HAND, make=by_hand)
    yield make(OURS, make=_ours, accuracy=LAYCA_ACCURACY["momentum"], package="layca_fast")
    yield make(PLAIN, make=partial(_ours, rotate=False), package="layca_fast")


def bfloat16() -> Iterator[Provider]:
    """Those whose products are bfloat16 everywhere."""
    make = partial(Provider, bytes_per_parameter=0, state=4, scratch=8)
    ours = partial(_ours, ns_dtype=torch.bfloat16)
    yield make(OURS_16, make=ours, accuracy=LAYCA_ACCURACY["momentum"], package="layca_fast")
    yield make(TORCH, make=partial(_imported, "torch.optim", weight_decay=0.0))
    zoo = not_installed("pytorch_optimizer")
    yield make("pytorch_optimizer Muon", make=_zoo, package="pytorch_optimizer", alters_grad=True, skipped=zoo)
    heavy = partial(make, package="heavyball", alters_grad=True, slow_to_compile=True)
    yield heavy("heavyball Muon", make=partial(_imported, "heavyball"), skipped=not_installed("heavyball"))


class Watched(Contestant):
    """Our step, and what its matrix products take of it: ``work`` in operations, ``seconds`` of each timed step."""

    def __init__(self, provider: Provider, model: Model) -> None:
        super().__init__(provider, model)
        self.work, self.seconds, self._inside = 0, list[float](), False
        self._taken = 0.0
        take = self.step

        def step() -> None:
            self.work, self._taken = 0, 0.0
            with self._watching():
                take()
            self.seconds.append(self._taken)

        self.step = step

    @contextmanager
    def _watching(self) -> Iterator[None]:
        names = ("multiply", "add_product", "multiply_symmetric", "add_product_symmetric")
        before = {name: getattr(products, name) for name in names}
        # The symmetric ones hand on to the others, inside of this module, where nothing is left out.
        try:
            for name, function in before.items():
                setattr(products, name, self._timed(function, name.endswith("_symmetric")))
            yield
        finally:
            for name, function in before.items():
                setattr(products, name, function)

    def _timed(self, function: Callable[..., Tensor], symmetric: bool) -> Callable[..., Tensor]:
        left_at = 1 if "add" not in function.__name__ else 2

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Tensor:
            if self._inside:
                return function(*arguments, **options)
            out, left = arguments[0], arguments[left_at]
            self._inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._taken += time.perf_counter() - start
                self._inside = False
                share = products.symmetric_share(out.shape[1]) if symmetric else 1.0
                self.work += round(2 * out.numel() * left.shape[2] * share)

        return timed


class OneProduct:
    """One ``torch.mm`` of square matrices, of as many operations as the products of a step."""

    bytes_per_parameter = bytes_moved = 0.0

    def __init__(self, work: int, device: torch.device) -> None:
        side = round((work / 2) ** (1 / 3))
        self.work = 2 * side**3
        self._left, self._right, self._out = (torch.randn(side, side, device=device) for _ in range(3))

    def prepare(self) -> None:
        """Nothing to put back."""

    def step(self) -> None:
        """Multiply once."""
        torch.mm(self._left, self._right, out=self._out)

    def check(self) -> None:
        """AssertionError unless a product arrives."""
        self._out.zero_()
        self.step()
        assert bool(self._out.isfinite().all() and self._out.any()), "the product did not arrive"
