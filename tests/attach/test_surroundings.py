"""Attached optimizers among groups, schedulers, scalers, hooks and changes in the middle of a run."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from layca_fast import attach
from layca_fast.commands.verify import angle_between, layers_of

from ..support import (
    clones,
    contents,
    copy_of,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)


def angles_of_a_step(optimizer: Optimizer, chunks: int | str = 1) -> list[list[float]]:
    """Take a step on random gradients: the angle that each layer of each tensor has turned by."""
    before = [layers_of(param, chunks) for param in params_of(optimizer)]
    train(optimizer, random_gradients(params_of(optimizer), 1))
    after = [layers_of(param, chunks) for param in params_of(optimizer)]
    return [[angle_between(*pair) for pair in zip(*each, strict=True)] for each in zip(before, after, strict=True)]


def turns_by(angle: list[float], rate: float) -> bool:
    return angle == [pytest.approx(math.atan(rate), rel=1e-12)] * len(angle)


def doubles(*shapes: tuple[int, ...]) -> list[Parameter]:
    return [parameter(*shape, dtype=torch.float64) for shape in shapes]


def test_groups_have_their_own_rates_and_options(seed: int) -> None:
    matrix, packed, bias, embedding, turned_bias = doubles((6, 5), (9, 4), (7,), (8, 3), (6,))
    groups: list[dict[str, Any]] = [
        {"params": [("matrix", matrix)], "lr": 0.01},
        {"params": [("packed", packed)], "lr": 0.02, "chunks": 3, "radius": "current", "lr_factor": 0.5},
        {"params": [("bias", bias), ("embedding", embedding)], "rotate": False},
        {"params": [("turned", turned_bias)], "rotate": True, "backend": "torch", "lr": torch.tensor(0.04)},
    ]
    optimizer, plain = SGD(groups, 0.03), SGD(clones([bias, embedding]), 0.03)
    attach(optimizer)
    before = {param: layers_of(param, 3) for param in (packed,)}
    whole = {param: layers_of(param, 1)[0] for param in (matrix, turned_bias)}
    train(optimizer, random_gradients(params_of(optimizer), 1))
    for param in params_of(plain):
        param.grad = None
    for ours, theirs in zip((bias, embedding), params_of(plain), strict=True):
        theirs.grad = ours.grad
    plain.step()
    assert turns_by([angle_between(*pair) for pair in zip(before[packed], layers_of(packed, 3), strict=True)], 0.02)
    assert turns_by([angle_between(whole[matrix], layers_of(matrix, 1)[0])], 0.01)
    # This rate is a float32.
    assert turns_by([angle_between(whole[turned_bias], layers_of(turned_bias, 1)[0])], float(torch.tensor(0.04)))
    assert same_bits([copy_of(bias), copy_of(embedding)], [copy_of(param) for param in params_of(plain)])
    assert optimizer.state[packed]["radius"].shape == (3,)
    assert bias not in optimizer.state
    assert embedding not in optimizer.state


@pytest.mark.parametrize("chunks", [1, 3, "all"])
def test_chunks_turn_one_by_one(chunks: int | str, seed: int) -> None:
    optimizer = Adam(doubles((6, 5), (9, 4, 2)), lr=0.02)
    attach(optimizer, chunks=chunks)
    for _ in range(20):
        assert all(turns_by(angles, 0.02) for angles in angles_of_a_step(optimizer, chunks))


def test_options_and_groups_may_change_mid_run(seed: int) -> None:
    optimizer = SGD(doubles((6, 5)), 0.02, momentum=0.9)
    attach(optimizer)
    assert turns_by(angles_of_a_step(optimizer)[0], 0.02)
    radius = copy_of(optimizer.state[params_of(optimizer)[0]]["radius"])
    optimizer.add_param_group({"params": doubles((4, 4), (3,)), "lr": 0.05})
    added, bias = params_of(optimizer)[1:]
    angles = angles_of_a_step(optimizer)
    assert turns_by(angles[0], 0.02)
    assert turns_by(angles[1], 0.05)
    assert "radius" not in optimizer.state[bias]
    optimizer.param_groups[1]["rotate"] = True
    assert turns_by(angles_of_a_step(optimizer)[2], 0.05)
    optimizer.param_groups[0]["rotate"] = False
    assert not turns_by(angles_of_a_step(optimizer)[0], 0.02)
    del optimizer.param_groups[0]["rotate"]
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert float(params_of(optimizer)[0].detach().norm()) == pytest.approx(radius.item(), rel=1e-12)
    assert optimizer.state[added]["radius"].dtype == torch.float64


def test_a_group_that_turns_by_slices_from_now_on_forgets_its_radius_first(seed: int) -> None:
    (param,) = doubles((6, 5))
    optimizer = SGD([param], 0.02)
    attach(optimizer)
    train(optimizer, random_gradients([param], 1))
    optimizer.param_groups[0]["chunks"] = 3
    before = contents(optimizer)
    param.grad = None
    with pytest.raises(ValueError, match=r"radius.*3 layers"):
        optimizer.step()
    assert same_bits(contents(optimizer)[0][0], before[0][0])
    del optimizer.state[param]["radius"]
    assert turns_by(angles_of_a_step(optimizer, 3)[0], 0.02)


@pytest.mark.parametrize(
    "convert", [torch.clone, lambda data: data.t().clone().t(), lambda data: data.float().double()]
)
def test_weights_in_new_memory_are_followed(convert: Any, seed: int) -> None:
    optimizer = Adam(doubles((6, 5), (7, 3)), lr=0.02)
    attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    params_of(optimizer)[0].data = convert(params_of(optimizer)[0].data)
    assert all(turns_by(angles, 0.02) for angles in angles_of_a_step(optimizer))


def test_weights_loaded_before_the_first_step_give_the_radius(seed: int) -> None:
    module = nn.Linear(5, 4, dtype=torch.float64)
    optimizer = SGD(module.parameters(), 0.02)
    attach(optimizer)
    module.load_state_dict({name: 3 * value for name, value in module.state_dict().items()})
    norm = float(module.weight.detach().norm())
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert float(module.weight.detach().norm()) == pytest.approx(norm, rel=1e-12)


class Replacing(Optimizer):
    """Plain SGD that puts new memory under its parameters at every step, as some optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data = param.data - group["lr"] * param.grad


def test_optimizers_that_replace_the_memory_of_their_parameters_turn_too(seed: int) -> None:
    params = doubles((6, 5), (7,))
    replacing, plain = Replacing(params, 0.02), SGD(clones(params), 0.02)
    gradients = random_gradients(params, 5)
    for optimizer in (replacing, plain):
        attach(optimizer)
        train(optimizer, gradients)
    for ours, theirs in zip(params, params_of(plain), strict=True):
        assert relative_distance(ours, theirs) <= 1e-12


def test_closures_that_make_the_gradients(seed: int) -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = AdamW(module.parameters(), lr=0.02)
    attach(optimizer)
    inputs = torch.randn(8, 6, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        before = layers_of(module[0].weight, 1)[0]
        assert isinstance(optimizer.step(closure), Tensor)
        assert turns_by([angle_between(before, layers_of(module[0].weight, 1)[0])], 0.02)


def test_a_step_that_raises_leaves_nothing_half_done(seed: int) -> None:
    optimizer = SGD(doubles((6, 5)), 0.02, momentum=0.9)
    attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    before = contents(optimizer)

    def fail() -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(fail)
    assert same_bits(contents(optimizer), before)
    assert turns_by(angles_of_a_step(optimizer)[0], 0.02)


@pytest.mark.parametrize("first", ["scheduler", "attach"])
def test_schedulers_made_before_or_after(first: str, seed: int) -> None:
    optimizer = SGD(doubles((6, 5)), 0.1, momentum=0.9)
    if first == "attach":
        attach(optimizer)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    if first == "scheduler":
        attach(optimizer)
    for step in range(4):
        assert turns_by(angles_of_a_step(optimizer)[0], 0.1 * 0.5**step)
        scheduler.step()


def test_one_cycle_changes_momentum_too(seed: int) -> None:
    optimizer = Adam(doubles((6, 5)), lr=0.1)
    attach(optimizer)
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    for _ in range(9):
        assert turns_by(angles_of_a_step(optimizer)[0], optimizer.param_groups[0]["lr"])
        scheduler.step()


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_may_skip_a_step(fused: bool, seed: int) -> None:
    module = nn.Linear(6, 5)
    optimizer = AdamW(module.parameters(), lr=0.02, fused=fused)
    attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        optimizer.zero_grad()
        before = layers_of(module.weight, 1)[0]
        loss = module(torch.randn(8, 6)).square().mean()
        scaler.scale(loss * (math.inf if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        after = layers_of(module.weight, 1)[0]
        expected = 0.0 if step == 1 else math.atan(0.02)
        assert angle_between(before, after) == pytest.approx(expected, rel=1e-5)
        assert step != 1 or torch.equal(before, after)


def test_users_hooks_keep_their_order_and_see_the_turned_weights(seed: int) -> None:
    optimizer = SGD(doubles((6, 5)), 0.02)
    events: list[str] = []
    seen: list[Tensor] = []

    def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(params_of(optimizer)[0].detach().clone())

    optimizer.register_step_pre_hook(lambda *_: events.append("before: first"))
    optimizer.register_step_post_hook(look)
    optimizer.register_step_post_hook(lambda *_: events.append("after: first"))
    attach(optimizer)
    optimizer.register_step_pre_hook(lambda *_: events.append("before: second"))
    optimizer.register_step_post_hook(lambda *_: events.append("after: second"))
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert events == ["before: first", "before: second", "after: first", "after: second"]
    assert torch.equal(seen[0], params_of(optimizer)[0])


def test_autograd_notices_the_turn(seed: int) -> None:
    param = parameter(4, 4)
    optimizer = SGD([param], 0.02)
    attach(optimizer)
    loss = (param @ param).sum()
    train(optimizer, random_gradients([param], 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
