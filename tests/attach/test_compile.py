"""Training steps under torch.compile with an attached optimizer: the hooks are left out, at one break a step."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, Optimizer

from layca_fast import FusedLayca, RotationMonitor, attach

from ..support import assert_close

pytestmark = [
    # The compiler's own: what it looks at, and what it imports.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Nested(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.1, momentum=0.9)


def nested(params: Any) -> Optimizer:
    sgd([nn.Parameter(torch.zeros(1))])
    return Nested(params, lr=0.1, momentum=0.9)


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=torch.tensor(0.1), weight_decay=0.0)


def whole_step(model: nn.Module, optimizer: Optimizer, inputs: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(inputs).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def counted(make: Callable[[Any], Optimizer], hang: Callable[[Optimizer], object], steps: int = 5) -> Any:
    """Train compiled and uncompiled side by side, a new lr at every step: (breaks, frames after every step)."""
    torch.compiler.reset()
    counters.clear()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    models = (model, copy.deepcopy(model))
    optimizers = [make(each.parameters()) for each in models]
    for each in optimizers:
        hang(each)
    compiled = torch.compile(whole_step, backend="eager")
    frames = []
    for number in range(steps):
        inputs = torch.randn(10, 8)
        for each in optimizers:
            rate = each.param_groups[0]["lr"]
            new = 0.1 / (1 + number)
            if isinstance(rate, Tensor):
                rate.fill_(new)
            else:
                each.param_groups[0]["lr"] = new
        compiled(models[0], optimizers[0], inputs)
        whole_step(models[1], optimizers[1], inputs)
        # What the compiler makes of AdamW's own step rounds otherwise.
        assert_close(optimizers[0], optimizers[1], 1e-2)
        frames.append(counters["frames"]["total"])
    return Counter(counters["graph_break"]), frames


@pytest.mark.parametrize("make", [sgd, nested, adamw])
def test_hooks_cost_one_break_and_no_frame_for_a_new_rate(make: Any, seed: int) -> None:
    own, own_frames = counted(lambda params: FusedLayca(params, lr=0.1), lambda optimizer: None)
    attached, attached_frames = counted(make, attach)
    # zero_grad and backward break as they do for all.
    assert sum(attached.values()) <= sum(own.values())
    # torch compiles its own step a second time where lr turns out to change.
    assert attached_frames[2:] == [attached_frames[2]] * len(attached_frames[2:])
    assert attached_frames[-1] <= own_frames[-1] + 3


def test_a_monitor_on_a_compiled_step_records_once(seed: int) -> None:
    monitors: list[RotationMonitor] = []

    def hang(optimizer: Optimizer) -> None:
        attach(optimizer)
        monitors.append(RotationMonitor(optimizer).attach())

    counted(nested, hang, steps=3)
    assert [monitor.curves.steps for monitor in monitors] == [[0, 1, 2, 3]] * 2
    assert torch.equal(monitors[0].curves.rotation, monitors[1].curves.rotation)


def test_a_monitor_alone_leaves_the_compiled_step_as_it_is(seed: int) -> None:
    monitors: list[RotationMonitor] = []
    counted(nested, lambda optimizer: monitors.append(RotationMonitor(optimizer).attach()), steps=3)
    assert [monitor.curves.steps for monitor in monitors] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("make", [sgd, nested])
def test_a_step_that_is_compiled_by_itself_turns_and_records_once(make: Any, seed: int) -> None:
    weight = nn.Parameter(torch.randn(6, 4))
    twin = nn.Parameter(weight.detach().clone())
    optimizers = [make([each]) for each in (weight, twin)]
    for each in optimizers:
        attach(each)
    monitor = RotationMonitor(optimizers[0]).attach()
    steps = [torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step]
    for _ in range(3):
        grad = torch.randn(6, 4)
        for param, step in zip((weight, twin), steps, strict=True):
            param.grad = grad.clone()
            step()
        assert torch.equal(weight, twin)
    assert monitor.curves.steps == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [sgd, nested, adamw])
def test_a_compiled_step_turns_16_bit_parameters_alike(make: Any, seed: int) -> None:
    """What stands in for the optimizer in its step is compiled once, too."""
    weight = nn.Parameter(torch.randn(6, 4).bfloat16())
    twin = nn.Parameter(weight.detach().clone())
    optimizers = [make([each]) for each in (weight, twin)]
    handles = [attach(each) for each in optimizers]
    torch.compiler.reset()
    counters.clear()
    steps = [torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step]
    frames = []
    for _ in range(4):
        grad = torch.randn(6, 4).bfloat16()
        for param, step in zip((weight, twin), steps, strict=True):
            param.grad = grad.clone()
            step()
        weights = [handle.effective_weight(param) for handle, param in zip(handles, (weight, twin), strict=True)]
        # What the compiler makes of AdamW's own step rounds otherwise.
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
        frames.append(counters["frames"]["total"])
    assert frames[2:] == [frames[2]] * 2
