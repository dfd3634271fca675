"""Copies, pickles and checkpoints of attached optimizers: attached, independent, and bit for bit on the same path."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from layca_fast import attach, detach
from layca_fast.commands.verify import angle_between, layers_of

from ..support import clones, contents, copy_of, parameter, params_of, random_gradients, same_bits, train
from .support import OPTIMIZERS, new_params


def through_torch_save(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    loaded: Optimizer = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[Optimizer], Optimizer]] = {
    "deepcopy": copy.deepcopy,
    "a copy of a copy": lambda optimizer: pickle.loads(pickle.dumps(copy.deepcopy(optimizer))),
    "torch.save": through_torch_save,
    **{
        f"pickle, protocol {protocol}": lambda optimizer, protocol=protocol: pickle.loads(
            pickle.dumps(optimizer, protocol)
        )
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("through", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_attached_and_goes_its_own_way(
    through: Callable[[Optimizer], Optimizer], name: str, seed: int
) -> None:
    optimizer = OPTIMIZERS[name](new_params(name, torch.float32), lr=0.03)
    handle = attach(optimizer, chunks="all")
    gradients = random_gradients(params_of(optimizer), 5)
    train(optimizer, gradients[:2])
    other = through(optimizer)
    assert type(other) is type(optimizer)
    saved = contents(optimizer)
    train(other, gradients[2:])
    assert same_bits(contents(optimizer), saved), "the copy shares memory with its source"
    train(optimizer, gradients[2:])
    assert same_bits(contents(other), contents(optimizer))
    handle.remove()
    before = layers_of(params_of(other)[0], "all")
    train(other, gradients[:1])
    for old, new in zip(before, layers_of(params_of(other)[0], "all"), strict=True):
        assert angle_between(old, new) == pytest.approx(math.atan(0.03), rel=1e-4), "no longer attached"
    detach(other)
    with pytest.raises(ValueError, match="nothing is attached"):
        detach(other)


def test_a_model_copied_with_its_optimizer_and_handle(seed: int) -> None:
    model = nn.Linear(6, 5)
    optimizer = AdamW(model.parameters(), lr=0.03)
    handle = attach(optimizer)
    gradients = random_gradients(params_of(optimizer), 4)
    train(optimizer, gradients[:2])
    for duplicate in (copy.deepcopy, lambda triple: pickle.loads(pickle.dumps(triple))):
        twin, other, its_handle = duplicate((model, optimizer, handle))
        assert all(a is b for a, b in zip(params_of(other), twin.parameters(), strict=True))
        before = layers_of(twin.weight, 1)[0]
        train(other, gradients[2:3])
        assert angle_between(before, layers_of(twin.weight, 1)[0]) == pytest.approx(math.atan(0.03), rel=1e-5)
        its_handle.remove()
        with pytest.raises(ValueError, match="nothing is attached"):
            detach(other)
    attached_still = layers_of(model.weight, 1)[0]
    train(optimizer, gradients[3:])
    assert angle_between(attached_still, layers_of(model.weight, 1)[0]) == pytest.approx(math.atan(0.03), rel=1e-5)


def test_a_pickle_stays_attached_in_a_process_whose_hooks_are_numbered_anew(seed: int) -> None:
    """torch numbers hooks from 0 in each process: the user's first ones there must not take the place of ours."""
    optimizer = SGD([parameter(4, 3, dtype=torch.float64)], 0.1)
    attach(optimizer)
    program = """
import io, sys, torch
optimizer = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
for _ in range(9):
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)
(param,) = optimizer.param_groups[0]["params"]
before = param.detach().clone()
param.grad = torch.ones_like(param).cumsum(0)
optimizer.step()
dot = (param * before).sum() / param.norm() / before.norm()
print(float(torch.arccos(dot).tan().detach()))
"""
    file = io.BytesIO()
    torch.save(optimizer, file)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", program], input=file.getvalue(), capture_output=True, check=True, env=environment
    )
    assert float(run.stdout) == pytest.approx(0.1, rel=1e-9)


def test_users_hooks_are_left_out_of_copies_as_torch_leaves_them_out(seed: int) -> None:
    optimizer = SGD([parameter(4, 3)], 0.1)
    attach(optimizer)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("copied"))
    StepLR(optimizer, 1)
    train(pickle.loads(pickle.dumps(optimizer)), [[torch.randn(4, 3)]])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_carries_the_radii_with_their_type(name: str, seed: int) -> None:
    optimizer = OPTIMIZERS[name](new_params(name, torch.float32), lr=0.03)
    attach(optimizer)
    gradients = random_gradients(params_of(optimizer), 5)
    train(optimizer, gradients[:2])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = OPTIMIZERS[name](clones(params_of(optimizer)), lr=0.5)
    attach(loaded)
    # In the middle of a run of its own, which the loaded state must end.
    train(loaded, gradients[:1])
    with torch.no_grad():
        for ours, theirs in zip(params_of(loaded), params_of(optimizer), strict=True):
            ours.copy_(theirs)
    saved = torch.load(file, weights_only=True)
    before = copy_of(saved)
    loaded.load_state_dict(saved)
    assert same_bits(saved, before), "the caller's dict was modified"
    for ours, theirs in zip(params_of(loaded), params_of(optimizer), strict=True):
        assert same_bits(dict(loaded.state[ours]), dict(optimizer.state[theirs]))
        if ours.dim() >= 2:
            radius = loaded.state[ours]["radius"]
            assert radius.dtype == torch.float64
            assert not torch.equal(radius, radius.float().double()), "no digits that float32 would lose"
            assert radius.data_ptr() != optimizer.state[theirs]["radius"].data_ptr()
    for each in (optimizer, loaded):
        train(each, gradients[2:])
    assert same_bits(contents(loaded), contents(optimizer))


def test_the_loaded_radius_is_the_one_that_steps_restore(seed: int) -> None:
    optimizer = SGD([parameter(4, 3, dtype=torch.float64)], 0.1)
    attach(optimizer)
    train(optimizer, [[torch.randn(4, 3)]])
    saved = optimizer.state_dict()
    saved["state"][0]["radius"] = torch.tensor([7.0], dtype=torch.float64)
    optimizer.load_state_dict(saved)
    train(optimizer, [[torch.randn(4, 3)]])
    assert float(params_of(optimizer)[0].detach().norm()) == pytest.approx(7.0, rel=1e-12)


def test_a_hook_that_renumbers_parameters_takes_the_radii_along(seed: int) -> None:
    optimizer = AdamW([("a", parameter(4, 3)), ("b", parameter(3, 4))], lr=0.1)
    attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    loaded = AdamW([("b", parameter(3, 4)), ("a", parameter(4, 3))], lr=0.1)
    attach(loaded)

    def by_name(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        return {**saved, "state": {0: saved["state"][1], 1: saved["state"][0]}}

    loaded.register_load_state_dict_pre_hook(by_name)
    radii: list[Any] = []
    loaded.register_load_state_dict_post_hook(
        lambda loaded: radii.extend(loaded.state[param]["radius"] for param in params_of(loaded))
    )
    loaded.load_state_dict(optimizer.state_dict())
    a, b = params_of(optimizer)
    assert same_bits(radii, [optimizer.state[b]["radius"], optimizer.state[a]["radius"]])


def test_a_checkpoint_of_the_plain_optimizer_keeps_options_and_takes_radii_anew(seed: int) -> None:
    params = [parameter(4, 3), parameter(5, 4)]
    groups = [{"params": params[:1]}, {"params": params[1:], "rotate": False, "lr": 0.2}]
    optimizer = AdamW(groups, lr=0.1)
    attach(optimizer)
    train(optimizer, random_gradients(params, 1))
    copies = clones(params)
    plain = AdamW([{"params": copies[:1]}, {"params": copies[1:]}], lr=0.3)
    train(plain, random_gradients(params, 1))
    optimizer.load_state_dict(plain.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert [group.get("rotate") for group in optimizer.param_groups] == [None, False]
    assert all("radius" not in state for state in optimizer.state.values())
    with torch.no_grad():
        params[0].mul_(3)
    norm = params[0].detach().double().norm()
    train(optimizer, random_gradients(params, 1))
    assert float(optimizer.state[params[0]]["radius"]) == pytest.approx(float(norm), rel=1e-12)
    assert "radius" not in optimizer.state[params[1]]


def test_a_state_that_was_loaded_before_attaching_serves(seed: int) -> None:
    """torch has cast these radii to float32; the first step makes them float64 again."""
    optimizer = AdamW([parameter(4, 3)], lr=0.1)
    attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    loaded = AdamW(clones(params_of(optimizer)), lr=0.1)
    loaded.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        params_of(loaded)[0].mul_(2)
    attach(loaded)
    train(loaded, random_gradients(params_of(loaded), 1))
    radii = [each.state[params_of(each)[0]]["radius"] for each in (loaded, optimizer)]
    assert radii[0].dtype == torch.float64
    assert float(radii[0]) == pytest.approx(float(radii[1]), rel=1e-6)
