"""Every input and every error of the tables with which torch tests its own optimizers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

# torch's own test tools need it, and no user of torch has to have it.
pytest.importorskip("expecttest")

from ..support import clones, contents, params_of, relative_distance, same_bits
from .adapter import AS_OURS, Layca, error_inputs, inputs, registered, unknown_options

#: (info, input) and (info, error) of every row.
INPUTS = [
    pytest.param(info, each, id=f"{info.optim_cls.__name__}, {info.optim_cls.backend}, {each.desc}")
    for backend in ("cpu", "torch")
    for info in registered(backend)
    for each in inputs(info)
]
ERRORS = [
    pytest.param(
        info, each, id=f"{info.optim_cls.__name__}, {info.optim_cls.backend}, {each.optimizer_error_input.desc}"
    )
    for backend in ("cpu", "torch")
    for info in registered(backend)
    for each in error_inputs(info)
]
every_input = pytest.mark.parametrize(("info", "given"), INPUTS)

SHAPES = ((10, 5), (10,), (3, 2, 2), ())


def test_the_tables_have_all_that_is_ours() -> None:
    """Torch may rename its classes: then nothing here would run, and nothing fail."""
    assert {info.optim_cls.of_torch.__name__ for info in registered("cpu")} == set(AS_OURS)
    assert len(INPUTS) > 60
    assert len(ERRORS) > 60


def ours(info: Any, params: Any, kwargs: dict[str, Any], **more: Any) -> Layca:
    return info.optim_cls(params, **kwargs, **more)


def refuses(info: Any, given: Any) -> bool:
    """Whether the options are none of ours; then they are refused by name."""
    unknown = unknown_options(info, given.kwargs)
    if unknown:
        with pytest.raises(TypeError, match=unknown[0]):
            ours(info, [Parameter(torch.ones(2, 2))], given.kwargs)
    return bool(unknown)


def parameters() -> list[Parameter]:
    return [Parameter(torch.randn(shape)) for shape in SHAPES]


@every_input
def test_takes_torchs_step_where_nothing_rotates(info: Any, given: Any, seed: int) -> None:
    """Weight decay but AdamW's is L2 in torch: it is then put into the gradient that ours is given."""
    if refuses(info, given):
        return
    kwargs = dict(given.kwargs)
    theirs = info.optim_cls.of_torch(parameters(), **copy.deepcopy(kwargs))
    params = clones(params_of(theirs))
    lr = kwargs.pop("lr", theirs.defaults["lr"])
    decay = 0.0
    if info.optim_cls.of_torch is torch.optim.AdamW:
        kwargs.setdefault("weight_decay", theirs.defaults["weight_decay"])
    else:
        decay = kwargs.pop("weight_decay", 0.0)
    if kwargs.get("capturable"):
        del kwargs["capturable"]
    sign = -1.0 if kwargs.get("maximize") else 1.0
    optimizer = ours(info, params, {"lr": lr, **kwargs}, rotate=False)
    for _ in range(6):
        for mine, their in zip(params, params_of(theirs), strict=True):
            their.grad = torch.randn_like(their)
            mine.grad = their.grad + sign * decay * mine.detach()
        optimizer.step()
        theirs.step()
    for mine, their in zip(params, params_of(theirs), strict=True):
        assert relative_distance(mine, their) < 2e-5


def problem() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(16, 10)


@every_input
def test_goes_in_the_right_direction_with_every_scheduler(info: Any, given: Any, seed: int) -> None:
    if refuses(info, given):
        return
    kwargs = {**given.kwargs, "weight_decay": 0.0}
    for schedulers in [[], *info.scheduler_inputs]:
        model, x = problem()
        target = model(x).detach() + torch.randn(16, 1)
        optimizer = ours(info, model.parameters(), copy.deepcopy(kwargs))
        made = [make(optimizer) for make in schedulers]
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            (-loss if kwargs.get("maximize") else loss).backward()
            losses.append(float(loss.detach()))
            # Most go down at once; some schedules first go up.
            if len(losses) > 6 and min(losses[1:]) < losses[0]:
                break
            optimizer.step()
            for scheduler in made:
                needs_loss = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss.detach()] if needs_loss else []))
        assert min(losses[1:]) < losses[0]


@every_input
def test_goes_on_after_saving_copying_and_pickling(info: Any, given: Any, seed: int) -> None:
    if refuses(info, given):
        return
    kwargs = {**given.kwargs, "weight_decay": 0.0}
    optimizer = ours(info, parameters(), copy.deepcopy(kwargs))
    rows = [[torch.randn(shape) for shape in SHAPES] for _ in range(4)]

    def train(which: Layca, some: list[list[Tensor]]) -> None:
        for row in some:
            for param, grad in zip(params_of(which), row, strict=True):
                param.grad = grad.clone()
            which.step()

    train(optimizer, rows[:2])
    loaded = ours(info, clones(params_of(optimizer)), copy.deepcopy(kwargs))
    loaded.load_state_dict(optimizer.state_dict())
    others = [loaded, copy.deepcopy(optimizer)]
    others[1].load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    train(optimizer, rows[2:])
    for other in others:
        train(other, rows[2:])
        assert same_bits(contents(other), contents(optimizer))


@every_input
def test_a_groups_own_rate_wins_and_missing_gradients_are_left_alone(info: Any, given: Any, seed: int) -> None:
    if refuses(info, given):
        return
    params = parameters()
    groups = [{"params": params[:1], "lr": 0.0}, {"params": params[1:2]}, {"params": params[2:]}]
    optimizer = ours(info, groups, {**given.kwargs, "weight_decay": 0.0})
    before = [param.detach().clone() for param in params]
    for param in params[:2]:
        param.grad = torch.randn_like(param)
    optimizer.step()
    kept = [same_bits(param.detach(), was) for param, was in zip(params, before, strict=True)]
    assert kept == [True, False, True, True]
    # As torch has it: what needs no state has no entry.
    assert set(optimizer.state) <= set(params[:2])
    assert bool(optimizer.state) or not optimizer.defaults.get("momentum", 1.0)


@pytest.mark.parametrize(("info", "given"), ERRORS)
@pytest.mark.filterwarnings("ignore")
def test_what_torch_refuses_is_refused(info: Any, given: Any, seed: int) -> None:
    """With an error of the same kind; of a parameter that is there twice torch only warns, and steps it twice."""
    error = given.optimizer_error_input
    kwargs = dict(error.kwargs)
    params = [Parameter(torch.randn(2, 2))] if error.params is None else error.params
    kinds = (ValueError, TypeError) if given.error_type in (UserWarning, ValueError) else (given.error_type, ValueError)
    if {name for name in kwargs if name in ("foreach", "fused", "differentiable", "capturable")}:
        # They say how torch is to do it.
        return
    if "param groups should be with/without names" in given.error_regex:
        # Groups with and without names go together here: ours names the others.
        ours(info, params, kwargs)
        return
    with pytest.raises(kinds):
        ours(info, params, kwargs)
