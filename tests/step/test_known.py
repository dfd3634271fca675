"""Groups that nobody has touched are not checked again, and whatever somebody has touched is."""

import math
import signal
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.host import OPTIONS, Host, stand_in
from layca_fast import FusedLayca
from layca_fast.backends.cuda import BACKEND
from layca_fast.formulas.tables import Hyper
from layca_fast.step import watch
from layca_fast.step.hypers import Hyperparameters
from layca_fast.step.known import KnownGroups

from ..support import clones, contents, parameter, params_of, random_gradients, same_bits, train
from .host_support import many


@pytest.fixture(params=["C++", "Python"])
def watching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Python":
        monkeypatch.setattr(watch, "_native", None)


def made(**options: Any) -> FusedLayca:
    params = [parameter(4, 3), parameter(5, 4), parameter(6)]
    return FusedLayca([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], 0.01, **options)


def test_groups_stay_known_while_nothing_but_rates_changes(watching: None) -> None:
    groups = made(momentum=0.9).param_groups
    known = KnownGroups()
    edition = known.check(groups, 1)
    assert edition is not None
    for step in range(3):
        groups[step % 2]["lr"] = 0.03 / (step + 1)
        assert known.check(groups, step) is edition


def rename(group: dict[str, Any]) -> None:
    """The same values in the same order, under another name."""
    last = list(group)[-1]
    group["another"] = group.pop(last)


CHANGES: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "momentum": lambda groups: groups[1].update(momentum=0.5),
    "rule": lambda groups: groups[0].update(rule="hyperball"),
    "radius": lambda groups: groups[0].update(radius=lambda shape: 2.0),
    "maximize": lambda groups: groups[0].update(maximize=True),
    "decay": lambda groups: groups[1].update(weight_decay=0.1),
    "a key of the user's": lambda groups: groups[0].update(mine=3),
    "a name": lambda groups: rename(groups[0]),
    "a key less": lambda groups: groups[0].pop("capturable"),
    "an equal group": lambda groups: groups.__setitem__(0, dict(groups[0])),
    "another order": lambda groups: groups.reverse(),
    "a group more": lambda groups: groups.append(dict(groups[0], params=[])),
    "a group less": lambda groups: groups.pop(),
    "a rate that is whole": lambda groups: groups[0].update(lr=1),
    "a rate below zero by rounding": lambda groups: groups[0].update(lr=-1e-12),
    "a rate in a tensor": lambda groups: groups[0].update(lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_change_is_noticed(change: Callable[[Any], object], watching: None) -> None:
    groups: list[Any] = made(momentum=0.9).param_groups
    known = KnownGroups()
    edition = known.check(groups, 1)
    change(groups)
    try:
        found = known.check(groups, 2)
    except ValueError:
        # Nor is a refused group taken for the one before it.
        with pytest.raises(ValueError, match="group 0"):
            known.check(groups, 3)
        return
    assert found is None or found is not edition


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", math.nan), ("lr", -0.1), ("lr", math.inf), ("lr", torch.tensor(-1.0)), ("momentum", -1.0), ("rule", "no")],
)
def test_what_is_refused_is_refused_at_every_step_with_its_number(name: str, value: Any, watching: None) -> None:
    groups = made(momentum=0.9).param_groups
    known = KnownGroups()
    known.check(groups, 1)
    old = groups[1][name]
    for step in (2, 3):
        groups[1][name] = value
        with pytest.raises(ValueError, match=f"{name}=.*found at step {step}, in group 1"):
            known.check(groups, step)
    groups[1][name] = old
    known.check(groups, 4)


def test_what_changes_in_place_is_noticed(watching: None) -> None:
    """A tensor that holds the rate, a list of betas: the group holds the same objects as before."""
    rate, betas = torch.tensor(0.1), [0.9, 0.99]
    groups = made(base="adam").param_groups
    groups[0]["lr"] = rate
    known = KnownGroups()
    assert known.check(groups, 1) is not None
    for wrong in (-1.0, math.nan, math.inf):
        rate.fill_(wrong)
        with pytest.raises(ValueError, match=r"lr=.*step 2"):
            known.check(groups, 2)
    rate.fill_(0.2)
    assert known.check(groups, 3) is not None
    groups[0]["betas"] = betas
    assert known.check(groups, 3) is None
    betas[1] = 2.0
    with pytest.raises(ValueError, match=r"betas=.*step 4"):
        known.check(groups, 4)


def test_what_a_plan_refuses_it_refuses_again(seed: int, watching: None) -> None:
    """The groups are known by then."""
    optimizer = many({"momentum": 0.9})
    optimizer.param_groups[0]["chunks"] = 3
    for _ in range(3):
        with pytest.raises(ValueError, match="chunks"):
            optimizer.step()


def test_groups_that_are_no_dicts_are_checked_at_every_step(watching: None) -> None:
    groups: list[Any] = [UserDict(group) for group in made().param_groups]
    assert KnownGroups().check(groups, 1) is None


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def random_options(optimizer: FusedLayca) -> None:
    """As a schedule, and now and then somebody else, might set them."""
    for group in optimizer.param_groups:
        draw = torch.rand(3).tolist()
        if draw[0] < 0.6:
            group["lr"] = [draw[1] / 10, torch.tensor(draw[1] / 10), 0.0, 1][int(4 * draw[2] ** 4)]
        elif draw[0] < 0.75:
            group["momentum"] = 0.5 + draw[1] / 4
        elif draw[0] < 0.8:
            group["maximize"] = not group["maximize"]
        if isinstance(group["lr"], torch.Tensor) and draw[2] < 0.5:
            group["lr"].mul_(0.9)


def test_the_table_follows_whatever_changes(seed: int, watching: None) -> None:
    """Beside a table that is made anew."""
    optimizer = many({"momentum": 0.9})
    for _ in range(60):
        random_options(optimizer)
        optimizer.step()
        for _, batch in optimizer._plan.batches:
            new = Hyperparameters(batch.slots, batch.dtype, batch.hypers.device)
            new.push()
            assert torch.equal(batch.hypers, new.table)
            assert torch.equal(batch.hyperparameters.last_rates, new.table[:, Hyper.LR])


def test_a_rate_that_was_not_written_is_written_at_the_next_step(seed: int) -> None:
    """A signal may end a step before its tables are whole."""
    optimizer = many({"momentum": 0.9})
    (batch,) = [batch for _, batch in optimizer._plan.batches]
    train(optimizer, random_gradients(params_of(optimizer), 2))
    for group in optimizer.param_groups:
        group["lr"] = 0.123
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(batch.hyperparameters._mirror), "set_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert torch.equal(batch.hypers[:, Hyper.LR], torch.full((4,), 0.123, dtype=torch.float64))


def test_steps_are_those_of_an_optimizer_that_checks_all_again(seed: int, watching: None) -> None:
    quick = many({"momentum": 0.9})
    params = clones(params_of(quick))
    half = len(params) // 2
    careful = FusedLayca([{"params": params[:half]}, {"params": params[half:], "lr": 0.02}], 0.01, momentum=0.9)
    careful.load_state_dict(quick.state_dict())
    for row in random_gradients(params, 20):
        random_options(quick)
        for ours, theirs in zip(quick.param_groups, careful.param_groups, strict=True):
            theirs.update({name: ours[name] for name in ("lr", "momentum", "maximize")})
        careful._known, careful._plan = KnownGroups(), None
        train(quick, [row])
        train(careful, [row])
        assert same_bits(contents(quick), contents(careful))


@pytest.mark.parametrize("keys", [{}, {"mine": []}], ids=["groups that are known", "groups that are not"])
def test_gradients_that_a_step_did_not_take_are_not_those_of_the_next(keys: dict[str, Any], seed: int) -> None:
    """A step that fails after it has looked at them: the next one takes those that are there then."""
    optimizer = many({"momentum": 0.9}, backend="cpu")
    twin = many({"momentum": 0.9}, backend="cpu")
    for param, other in zip(params_of(optimizer), params_of(twin), strict=True):
        with torch.no_grad():
            other.copy_(param)
    twin.load_state_dict(optimizer.state_dict())
    first, second = random_gradients(params_of(optimizer), 2)
    plan = optimizer._plan

    for param, grad in zip(params_of(optimizer), first, strict=True):
        param.grad = grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plan), "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.param_groups[0].update(keys)
    train(optimizer, [second])
    train(twin, [second])
    assert same_bits(contents(optimizer), contents(twin))


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals whose handlers are set."""
    found: list[int] = []
    setter = signal.signal

    def counted(number: int, handler: Any) -> Any:
        found.append(number)
        return setter(number, handler)

    monkeypatch.setattr(signal, "signal", counted)
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_handlers_of_signals_are_set_around_launches(options: dict[str, Any], handlers: list[int]) -> None:
    """A launch is one call of compiled code, between which and the next Python looks for no signals."""
    with stand_in():
        host = Host(8, options, "new gradients and lr")
        handlers.clear()
        host.prepare()
        host.step()
    assert handlers == []


def test_handlers_are_set_around_what_python_does_between_launches(
    handlers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to launch on a device that is not the current one."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stand_in():
            host = Host(8, OPTIONS["momentum"], "new gradients")
            backend = host._optimizer._plan.batches[0][0]
            monkeypatch.setattr(type(backend), "is_uninterrupted", lambda *_: False)
            handlers.clear()
            host.prepare()
            host.step()
        assert signal.SIGINT in handlers
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize(("index", "current"), [(0, 0), (1, 0), (0, 1)])
def test_only_launches_on_the_current_device_are_one_call(
    index: int, current: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    batch: Any = SimpleNamespace(device=torch.device("cuda", index))
    assert BACKEND.is_uninterrupted(batch) == (index == current)


def test_a_momentum_that_has_left_its_memory_is_noticed(seed: int, watching: None) -> None:
    """Also where a batch turns along directions that another has made."""
    params = [parameter(6, 5, backend="cpu") for _ in range(2)]
    optimizer = FusedLayca(params, 0.1, base="muon", backend="cpu")
    rows = random_gradients(params, 3)
    train(optimizer, rows[:2])
    twin = FusedLayca(clones(params), 0.1, base="muon", backend="cpu")
    twin.load_state_dict(optimizer.state_dict())
    momentum = optimizer.state[params[0]]["momentum_buffer"]
    momentum.data = momentum.data.clone()
    train(optimizer, rows[2:])
    train(twin, rows[2:])
    assert same_bits(contents(optimizer), contents(twin))
