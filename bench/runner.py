"""The interleaved runner: every provider takes its step on the same weights, once per round, in random order.

The machine's speed drifts, so what is compared is timed within seconds of each other. All providers share one set of
weights and gradients, each through parameters of its own, and keep only their states apart: that is what makes room
for a dozen optimizers on one large model. The gradients change sign every round, so the weights stay where they are
however many rounds there are.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from layca_fast.commands.verify import angle_between, angle_tolerance
from layca_fast.state.layout import is_vector

from .by_hand import RATE
from .providers import Provider
from .shapes import Shape

#: Steps before the timed ones, beside the one that is checked.
WARM_UP = 3

#: Rounds that are timed, if as many are asked for, however long they take.
FEWEST_ROUNDS = 5

#: Layers whose rotation is measured, and the largest that is: its float64 copies must not crowd out the rest.
SAMPLE, LARGEST_SAMPLE = 8, 2**24

#: Cycles of a GPU's clock, about 10 ms, in which the host queues a step.
HEAD_START = 20_000_000

#: Elements of the copy that gives the bandwidth, at most.
LARGEST_COPY = 2**26


class Model:
    """Random weights of ``shapes`` with random gradients, on ``device``."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.weights = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        self.grads = [torch.randn_like(weight) for weight in self.weights]
        self.count = sum(weight.numel() for weight in self.weights)
        self.scale = dtype.itemsize / 4

    def flip_gradients(self) -> None:
        """Change the sign of every gradient, in place."""
        torch._foreach_neg_(self.grads)

    def fingerprints(self) -> list[float]:
        """A number per tensor that every step along the gradient changes, and that is finite if the weights are.

        The product with the gradient, since a plain sum may survive a step of equal size in all elements.
        """
        return [
            float(torch.dot(weight.view(-1), grad.view(-1)))
            for weight, grad in zip(self.weights, self.grads, strict=True)
        ]

    def sample(self) -> list[int]:
        """Indices of some tensors that rotate, evenly spread."""
        rotating = [i for i, weight in enumerate(self.weights) if not is_vector(weight) and weight.numel() > 1]
        small = [i for i in rotating if self.weights[i].numel() <= LARGEST_SAMPLE]
        small = small or sorted(rotating, key=lambda i: self.weights[i].numel())[:1]
        return small[:: math.ceil(len(small) / SAMPLE)]


class Contestant:
    """One provider at work on a model: ``prepare`` before, and outside of, every timed ``step``."""

    def __init__(self, provider: Provider, model: Model) -> None:
        self.provider, self.model = provider, model
        self.bytes_per_parameter = provider.bytes_per_parameter * model.scale
        self.bytes_moved = self.bytes_per_parameter * model.count
        self._params = [weight.detach().requires_grad_() for weight in model.weights]
        self._grads = [grad.clone() for grad in model.grads] if provider.alters_grad else model.grads
        self._give_gradients()
        self.step = provider.make(self._params)

    def _give_gradients(self) -> None:
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = grad

    def prepare(self) -> None:
        """Put back the gradients of a provider that writes to them or drops them."""
        if self.provider.alters_grad:
            torch._foreach_copy_(self._grads, self.model.grads)
            self._give_gradients()

    def check(self) -> None:
        """Take one step; AssertionError unless all tensors move, stay finite and, where promised, turn by atan(lr)."""
        name, weights = self.provider.name, self.model.weights
        sample = [] if self.provider.accuracy is None else self.model.sample()
        fingerprints = self.model.fingerprints()
        before = {index: weights[index].clone() for index in sample}
        self.prepare()
        self.step()
        for index, (old, new) in enumerate(zip(fingerprints, self.model.fingerprints(), strict=True)):
            assert math.isfinite(new), f"{name}: tensor {index} is no longer finite"
            assert new != old, f"{name}: tensor {index} did not move"
        for index, old_weight in before.items():
            self._check_angle(index, old_weight, weights[index])

    def _check_angle(self, index: int, before: Tensor, after: Tensor) -> None:
        assert self.provider.accuracy is not None
        expected = math.atan(RATE)
        angle = angle_between(before.double().flatten(), after.double().flatten())
        allowed = self.provider.accuracy + angle_tolerance(after.dtype, expected, after.numel())
        error = abs(angle / expected - 1)
        assert error <= allowed, (
            f"{self.provider.name}: tensor {index} of shape {tuple(after.shape)} turned by {angle:.6e} radians, "
            f"not by {expected:.6e}: relative error {error:.1e}, allowed {allowed:.1e}"
        )


class Copy:
    """A copy of as many bytes as the weights have, up to a limit: the bandwidth that the others are held against."""

    def __init__(self, model: Model) -> None:
        self._source = torch.randn(min(model.count, LARGEST_COPY), device=model.device, dtype=model.weights[0].dtype)
        self._target = torch.empty_like(self._source)
        self.bytes_per_parameter = 8 * model.scale  # read, and written
        self.bytes_moved = 2.0 * self._source.nbytes

    def prepare(self) -> None:
        """Nothing to put back."""

    def step(self) -> None:
        """Copy once."""
        self._target.copy_(self._source)

    def check(self) -> None:
        """AssertionError unless a copy arrives."""
        self._target.zero_()
        self.step()
        assert torch.equal(self._source, self._target), "the copy did not arrive"


COPY = "copy"


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, from an idle device until it is idle again."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def host_seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """How long one call keeps the host, from an idle device, which need not be done when it returns."""
    synchronize(device)
    start = time.perf_counter()
    step()
    taken = time.perf_counter() - start
    synchronize(device)
    return taken


def device_seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """How long one call takes a GPU that had other work while the host queued it, as in training."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda._sleep(HEAD_START)
        start.record()
        step()
        end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1e3


Timer = Callable[[Callable[[], object], torch.device], float]


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """No garbage collection by itself, where one step would pay for the objects of all; what there is stays."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def interleave(
    entries: Mapping[str, Contestant | Copy],
    model: Model,
    rounds: int,
    limit: float = math.inf,
    timer: Timer = seconds_of,
) -> dict[str, list[float]]:
    """Seconds of each entry's step, one per round, in an order drawn for each round; checked before and after.

    Once ``limit`` seconds have passed, no round begins but the first :data:`FEWEST_ROUNDS`.
    """
    for entry in entries.values():
        entry.check()
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    order, generator = list(entries), random.Random(0)
    end = time.perf_counter() + limit
    with collected_by_hand():
        for number in range(-WARM_UP, rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() > end:
                break
            generator.shuffle(order)
            model.flip_gradients()
            gc.collect()
            for name in order:
                entries[name].prepare()
                taken = timer(entries[name].step, model.device)
                if number >= 0:
                    seconds[name].append(taken)
    for entry in entries.values():
        entry.check()
    return seconds
