"""Step hooks that torch runs more than once for one step: what hangs on them acts on the outermost pair alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from layca_fast import RotationMonitor, attach

from ..support import clones, copy_of, params_of, random_gradients, same_bits

RATE = 0.1


class Parent(SGD):
    """Used in the fixture: the fault needs that, because torch patches a class when it is first used."""


class Once(Parent):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Twice(Once):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Catching(Once):
    """Catches what leaves the inner step, and takes it again."""

    def step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except ConnectionError:
            return super().step()


class Sharing(SGD):
    """A wrapper that takes over all that the inner one has, its hooks too."""

    def __init__(self, inner: Optimizer) -> None:
        self.__dict__.update(inner.__dict__)
        self.inner = inner
        self._patch_step_function()

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def through_super(params: list[Parameter]) -> tuple[Optimizer, Callable[[], Any]]:
    made = Once(params, lr=RATE, momentum=0.9)
    return made, made.step


def three_deep(params: list[Parameter]) -> tuple[Optimizer, Callable[[], Any]]:
    made = Twice(params, lr=RATE, momentum=0.9)
    return made, made.step


def through_a_wrapper(params: list[Parameter]) -> tuple[Optimizer, Callable[[], Any]]:
    made = Sharing(SGD(params, lr=RATE, momentum=0.9))
    return made, made.step


def inside_of_a_wrapper(params: list[Parameter]) -> tuple[Optimizer, Callable[[], Any]]:
    made = SGD(params, lr=RATE, momentum=0.9)
    return made, lambda: Sharing(made).step()


def failing() -> float:
    raise ConnectionError("no data")


def after_an_exception_inside(params: list[Parameter]) -> tuple[Optimizer, Callable[[], Any]]:
    made = Catching(params, lr=RATE, momentum=0.9)
    return made, lambda: made.step(failing)


def after_an_exception_through_all(params: list[Parameter]) -> tuple[Optimizer, Callable[[], Any]]:
    made = Twice(params, lr=RATE, momentum=0.9)

    def step() -> None:
        with pytest.raises(ConnectionError):
            made.step(failing)
        made.step()

    return made, step


def while_an_exception_is_handled(params: list[Parameter]) -> tuple[Optimizer, Callable[[], Any]]:
    """Whose traceback keeps the frames of the failed step alive."""
    made = Twice(params, lr=RATE, momentum=0.9)

    def step() -> None:
        try:
            made.step(failing)
        except ConnectionError:
            made.step()

    return made, step


NESTED = [
    through_super,
    three_deep,
    through_a_wrapper,
    inside_of_a_wrapper,
    after_an_exception_inside,
    after_an_exception_through_all,
    while_an_exception_is_handled,
]


def trained(optimizer: Optimizer, step: Callable[[], Any], gradients: list[list[Tensor]]) -> list[Any]:
    weights = []
    for row in gradients:
        for param, grad in zip(params_of(optimizer), row, strict=True):
            param.grad = grad.clone()
        step()
        weights.append(copy_of([*params_of(optimizer)]))
    return weights


@pytest.fixture
def weights(seed: int) -> list[Parameter]:
    Parent([Parameter(torch.zeros(1))], lr=1.0)
    Once([Parameter(torch.zeros(1))], lr=1.0)
    return [Parameter(torch.randn(6, 4)), Parameter(torch.randn(3))]


@pytest.mark.parametrize("make", NESTED)
def test_a_layer_turns_once_however_deep_the_step(make: Any, weights: list[Parameter]) -> None:
    gradients = random_gradients(weights, 3)
    plain = SGD(clones(weights), lr=RATE, momentum=0.9)
    attach(plain)
    expected = trained(plain, plain.step, gradients)
    nested, step = make(weights)
    attach(nested)
    assert same_bits(trained(nested, step, gradients), expected)


@pytest.mark.parametrize("make", NESTED)
def test_a_step_is_recorded_once_however_deep(make: Any, weights: list[Parameter]) -> None:
    nested, step = make(weights)
    monitor = RotationMonitor(nested).attach()
    trained(nested, step, random_gradients(weights, 3))
    assert monitor.curves.steps == [0, 1, 2, 3]


def test_a_closure_that_takes_a_step_of_the_same_optimizer(weights: list[Parameter]) -> None:
    """Its own step and the inner one are one base step, which turns the layers once."""
    optimizer = Twice(weights, lr=RATE)
    attach(optimizer)
    monitor = RotationMonitor(optimizer).attach()
    (gradients,) = random_gradients(weights, 1)

    def closure() -> float:
        for param, grad in zip(weights, gradients, strict=True):
            param.grad = grad
        optimizer.step()
        return 0.0

    before = weights[0].detach().clone()
    optimizer.step(closure)
    # Two plain steps lie in one direction, so the layer turns by atan(lr) in that of one.
    turned = SGD([Parameter(before)], lr=RATE)
    attach(turned)
    params_of(turned)[0].grad = gradients[0]
    turned.step()
    torch.testing.assert_close(weights[0], params_of(turned)[0], rtol=1e-5, atol=1e-6)
    assert monitor.curves.steps == [0, 1]


def test_a_closure_that_takes_the_step_of_another_optimizer(weights: list[Parameter]) -> None:
    """Each has hooks of its own, and each of them turns."""
    other = Parameter(torch.randn(5, 4))
    optimizers = [SGD([weights[0]], lr=RATE), SGD([other], lr=RATE)]
    alone = [SGD(clones([param]), lr=RATE) for param in (weights[0], other)]
    monitors = [RotationMonitor(each).attach() for each in optimizers]
    for each in (*optimizers, *alone):
        attach(each)
        params_of(each)[0].grad = torch.ones_like(params_of(each)[0])

    def closure() -> float:
        optimizers[1].step()
        return 0.0

    optimizers[0].step(closure)
    for each in alone:
        each.step()
    for ours, theirs in zip(optimizers, alone, strict=True):
        assert same_bits(copy_of(params_of(ours)), copy_of(params_of(theirs)))
    assert [monitor.curves.steps for monitor in monitors] == [[0, 1], [0, 1]]


def test_two_that_hang_on_one_optimizer_do_not_take_each_other_for_nested(weights: list[Parameter]) -> None:
    optimizer = Twice(weights, lr=RATE)
    attach(optimizer)
    monitors = [RotationMonitor(optimizer).attach() for _ in range(2)]
    trained(optimizer, optimizer.step, random_gradients(weights, 2))
    assert [monitor.curves.steps for monitor in monitors] == [[0, 1, 2], [0, 1, 2]]
    rotation = monitors[0].curves.rotation[1]
    assert float(rotation) == pytest.approx(1 - 1 / (1 + RATE**2) ** 0.5, rel=1e-4)
