"""Learning rates from everywhere: after each step every layer has turned by atan of the rate then scheduled."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from layca_fast import FusedLayca
from layca_fast.commands.verify import angle_between, angle_tolerance

from ..support import every_backend, native_backends, parameter, random_gradients, relative_distance

STEPS = 8


@dataclass(frozen=True)
class Schedule:
    """A scheduler and the base options that it runs with."""

    name: str
    make: Callable[[Optimizer], Any]
    options: Mapping[str, Any] = field(default_factory=lambda: {"momentum": 0.9})
    takes_metric: bool = False


SCHEDULES = (
    Schedule("LambdaLR", lambda opt: lr_scheduler.LambdaLR(opt, [lambda t: 1 / (1 + t), lambda t: 0.7**t])),
    Schedule("MultiplicativeLR", lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.8)),
    Schedule("StepLR", lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.3)),
    Schedule("MultiStepLR", lambda opt: lr_scheduler.MultiStepLR(opt, [1, 4, 5], gamma=0.5)),
    Schedule("ExponentialLR", lambda opt: lr_scheduler.ExponentialLR(opt, 0.6)),
    Schedule("LinearLR warm-up", lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=5)),
    Schedule("PolynomialLR down to 0", lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=6, power=2.0)),
    Schedule("CosineAnnealingLR", lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=5, eta_min=1e-3)),
    Schedule("CosineAnnealingWarmRestarts", lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=3)),
    Schedule(
        "SequentialLR",
        lambda opt: lr_scheduler.SequentialLR(
            opt,
            [lr_scheduler.LinearLR(opt, 0.2, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, T_max=5)],
            milestones=[3],
        ),
    ),
    Schedule(
        "ChainedScheduler",
        lambda opt: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(opt, 0.9), lr_scheduler.ConstantLR(opt, 0.5, total_iters=4)]
        ),
    ),
    Schedule("SWALR", lambda opt: SWALR(opt, swa_lr=0.01, anneal_epochs=4)),
    Schedule(
        "ReduceLROnPlateau",
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1),
        takes_metric=True,
    ),
    Schedule(
        "OneCycleLR cycling momentum",
        lambda opt: lr_scheduler.OneCycleLR(opt, [0.1, 0.2], total_steps=STEPS + 1, div_factor=5, final_div_factor=10),
    ),
    Schedule(
        "OneCycleLR cycling momentum under Nesterov",
        lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=STEPS + 1, base_momentum=0.5, max_momentum=0.8),
        {"momentum": 0.8, "nesterov": True},
    ),
    Schedule(
        "CyclicLR cycling momentum from 0 up",
        lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, step_size_up=3, base_momentum=0.0, max_momentum=0.6),
        {"momentum": 0.3, "dampening": 0.2},
    ),
)


def optimizers_on_equal_weights(schedule: Schedule, as_tensor: bool, backend: str) -> tuple[FusedLayca, Optimizer]:
    """Ours, and a torch.optim.SGD that shows what the schedule prescribes and what momentum makes of it."""
    ours = [parameter(*shape, backend=backend, dtype=torch.float64) for shape in ((6, 5), (4, 3))]
    theirs = [param.detach().clone().requires_grad_() for param in ours]
    groups = [
        [
            {"params": [param], "lr": torch.tensor(lr) if as_tensor else lr}
            for param, lr in zip(params, (0.1, 0.03), strict=True)
        ]
        for params in (ours, theirs)
    ]
    sgd = torch.optim.SGD(groups[1], lr=0.5, foreach=False, **schedule.options)
    return FusedLayca(groups[0], lr=0.5, backend=backend, **schedule.options), sgd


def advance(schedule: Schedule, scheduler: Any) -> None:
    scheduler.step(1.0) if schedule.takes_metric else scheduler.step()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["lr float", "lr 0-d tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@every_backend
def test_every_step_turns_by_the_scheduled_rate(backend: str, schedule: Schedule, as_tensor: bool, seed: int) -> None:
    optimizer, sgd = optimizers_on_equal_weights(schedule, as_tensor, backend)
    ours, theirs = schedule.make(optimizer), schedule.make(sgd)
    rates = set()
    params = [group["params"][0] for group in optimizer.param_groups]
    for grads in random_gradients(params, STEPS):
        before = [param.detach().flatten().clone() for param in params]
        for group, plain, grad in zip(optimizer.param_groups, sgd.param_groups, grads, strict=True):
            group["params"][0].grad, plain["params"][0].grad = grad.clone(), grad.clone()
        optimizer.step()
        sgd.step()
        for group, plain, old in zip(optimizer.param_groups, sgd.param_groups, before, strict=True):
            lr, param = float(plain["lr"]), group["params"][0]
            assert float(group["lr"]) == lr
            assert isinstance(group["lr"], torch.Tensor) == as_tensor
            assert group["momentum"] == plain["momentum"]
            angle = angle_between(old, param.detach().flatten())
            assert angle == pytest.approx(math.atan(lr), rel=1e-14 / max(lr, 1e-12) + 1e-12, abs=0)
            if "momentum_buffer" in optimizer.state[param]:
                expected = sgd.state[plain["params"][0]]["momentum_buffer"]
                assert relative_distance(optimizer.state[param]["momentum_buffer"], expected) <= 1e-14
            rates.add(lr)
        advance(schedule, ours)
        advance(schedule, theirs)
    assert len(rates) > 3, "the schedule did nothing"


RATES = (
    pytest.param(0.05, id="float"),
    pytest.param(1, id="int"),
    pytest.param(torch.tensor(0.05), id="0-d float32 tensor"),
    pytest.param(torch.tensor(0.05, dtype=torch.float64), id="0-d float64 tensor"),
    pytest.param(torch.tensor([0.05]), id="tensor of one element"),
    pytest.param(numpy.float64(0.05), id="numpy float64"),
    pytest.param(numpy.float32(0.05), id="numpy float32"),
)


@pytest.mark.parametrize("lr", RATES)
@native_backends
def test_every_kind_of_number_serves_as_lr(backend: str, lr: Any, seed: int) -> None:
    param = parameter(7, 9, backend=backend)
    optimizer = FusedLayca([param], lr, momentum=0.9, backend=backend)
    for _ in range(3):
        before = param.detach().double().flatten()
        param.grad = torch.randn_like(param)
        optimizer.step()
        expected = math.atan(float(lr))
        assert angle_between(before, param.detach().double().flatten()) == pytest.approx(
            expected, rel=angle_tolerance(param.dtype, float(lr), param.numel())
        )


@every_backend
def test_a_tensor_lr_is_read_at_every_step(backend: str, seed: int) -> None:
    """What capturable training relies on: the tensor is filled in place and its groups never learn of it."""
    param = parameter(5, 8, backend=backend, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = FusedLayca([param], lr, momentum=0.9, backend=backend)
    for rate in (0.1, 0.02, 0.0, 0.3):
        lr.fill_(rate)
        before = param.detach().flatten().clone()
        param.grad = torch.randn_like(param)
        optimizer.step()
        assert angle_between(before, param.detach().flatten()) == pytest.approx(math.atan(rate), rel=1e-12, abs=1e-15)
    assert optimizer.param_groups[0]["lr"] is lr


RECOMMENDED = (
    pytest.param({}, 3**-3, id="sgd: one step's gradient"),
    pytest.param({"momentum": 0.9}, 3**-5, id="sgd with momentum: averaged"),
    pytest.param({"base": "sgd_amom"}, 3**-5, id="sgd_amom: averaged"),
)


@pytest.mark.parametrize("per_group", [False, True], ids=["constructor", "group"])
@pytest.mark.parametrize(("options", "rate"), RECOMMENDED)
def test_without_lr_the_papers_rate_is_taken(options: dict[str, Any], rate: float, per_group: bool, seed: int) -> None:
    param, other = parameter(3, 4), parameter(2, 2)
    if per_group:
        groups = [{"params": [other], "momentum": 0.5}, {"params": [param], **options}]
        optimizer = FusedLayca(groups, backend="torch")
    else:
        optimizer = FusedLayca([param], backend="torch", **options)
    assert optimizer.param_groups[-1]["lr"] == rate


def test_a_group_may_ask_for_the_papers_rate_beside_an_lr_of_the_constructor(seed: int) -> None:
    """Every argument may be set per group, and lr=None is one."""
    groups = [{"params": [parameter(3, 4)]}, {"params": [parameter(3, 4)], "lr": None, "momentum": 0.9}]
    optimizer = FusedLayca(groups, lr=0.5, backend="torch")
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 3**-5]
