"""Checkpoints of other optimizers, and tools that make checkpoints of this one."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from layca_fast import FusedLayca, layer_groups
from layca_fast.commands.verify import angle_between

from ..support import (
    clones,
    contents,
    copy_of,
    every_backend,
    mixed_optimizer,
    mixed_params,
    native_backends,
    norm_of,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)

MOMENTA = (
    pytest.param({"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}, id="momentum, dampening, weight decay"),
    pytest.param({"momentum": 0.8, "nesterov": True}, id="nesterov"),
    pytest.param({}, id="no momentum: there is no buffer to take over"),
)


@pytest.mark.parametrize("options", MOMENTA)
@every_backend
def test_an_sgd_checkpoint_gives_its_momentum_and_nothing_else(
    backend: str, options: dict[str, Any], seed: int
) -> None:
    """Its learning rate is no rotation rate and its decay no Layca: ours stay, and a warning says so."""
    source = clones(mixed_params(backend))
    sgd = torch.optim.SGD([{"params": source[:1]}, {"params": source[1:], "lr": 5.0}], lr=3.0, **options)
    train(sgd, random_gradients(source, 3))
    params = clones(source)
    ours = {"momentum": 0.7, "dampening": 0.1, "chunks": 2, "rotate": True}
    optimizer = FusedLayca(
        [{"params": params[:1], **ours}, {"params": params[1:]}], 0.05, momentum=0.6, backend=backend
    )
    groups = copy_of(optimizer.state_dict()["param_groups"])
    with pytest.warns(UserWarning, match="hyperparameters") as caught:
        optimizer.load_state_dict(sgd.state_dict())
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert optimizer.state_dict()["param_groups"] == groups
    for param, theirs in zip(params, source, strict=True):
        assert same_bits(dict(optimizer.state[param]), dict(sgd.state[theirs]))
    norms = [norm_of(half) for half in params[0].chunk(2)]
    before = [copy_of(dict(optimizer.state[param])) for param in params]
    grads = random_gradients(params, 1)
    train(optimizer, grads)
    assert optimizer.state[params[0]]["radius"].tolist() == pytest.approx(norms, rel=1e-12)
    if options:
        expected = 0.7 * before[0]["momentum_buffer"] + 0.9 * grads[0][0]
        assert relative_distance(optimizer.state[params[0]]["momentum_buffer"], expected) <= 1e-6


ADAMS = (
    pytest.param(torch.optim.Adam, {"lr": 1e-3, "amsgrad": True}, id="Adam"),
    pytest.param(torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, id="AdamW"),
)


@pytest.mark.parametrize(("kind", "options"), ADAMS)
@native_backends
def test_an_adam_checkpoint_loads_and_what_the_base_does_not_use_is_kept(
    backend: str, kind: type[torch.optim.Optimizer], options: dict[str, Any], seed: int
) -> None:
    source = [parameter(4, 3, backend=backend), parameter(5, backend=backend)]
    adam = kind(source, **options)
    train(adam, random_gradients(source, 2))
    params = clones(source)
    optimizer = FusedLayca(params, 0.05, momentum=0.6, dampening=0.2, backend=backend)
    with pytest.warns(UserWarning, match="hyperparameters"):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert "betas" not in optimizer.param_groups[0]
    grads = random_gradients(params, 1)
    train(optimizer, grads)
    for param, theirs, grad in zip(params, source, grads[0], strict=True):
        state = optimizer.state[param]
        assert relative_distance(state["momentum_buffer"], grad) <= 1e-7, "a first gradient is taken undampened"
        assert same_bits({name: state[name] for name in adam.state[theirs]}, dict(adam.state[theirs]))


MOMENTS = (
    pytest.param(torch.optim.Adam, {"foreach": True}, id="Adam"),
    pytest.param(torch.optim.Adam, {"amsgrad": True}, id="Adam with amsgrad"),
    pytest.param(torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}, id="AdamW fused"),
    pytest.param(torch.optim.AdamW, {"maximize": True, "weight_decay": 0.0}, id="AdamW maximizing"),
)


@pytest.mark.parametrize(("kind", "options"), MOMENTS)
@native_backends
def test_moments_of_an_adam_checkpoint_go_on_under_adam(
    backend: str, kind: type[torch.optim.Optimizer], options: dict[str, Any], seed: int
) -> None:
    """From a file: rotating layers turn by atan(lr) in Adam's direction, the bias takes AdamW's very steps."""
    source = [parameter(4, 3, backend=backend, dtype=torch.float64), parameter(5, backend=backend, dtype=torch.float64)]
    adam = kind(source, lr=0.01, betas=(0.8, 0.95), eps=1e-6, **options)
    train(adam, random_gradients(source, 3))
    file = io.BytesIO()
    torch.save(adam.state_dict(), file)
    file.seek(0)
    params = clones(source)
    ours = {name: value for name, value in options.items() if name in ("amsgrad", "maximize", "weight_decay")}
    groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:], "lr": 0.01}]
    optimizer = FusedLayca(groups, 0.05, base="adam", betas=(0.8, 0.95), eps=1e-6, backend=backend, **ours)
    saved = torch.load(file, weights_only=True)
    # Its groups are others than ours: as many as ours, with the parameters in the same order.
    saved["param_groups"] = [{**saved["param_groups"][0], "params": [number]} for number in (0, 1)]
    with pytest.warns(UserWarning, match="hyperparameters"):
        optimizer.load_state_dict(saved)
    for param, theirs in zip(params, source, strict=True):
        assert same_bits(dict(optimizer.state[param]), dict(adam.state[theirs]))
    for row in random_gradients(params, 3):
        before = params[0].detach().clone()
        train(adam, [row])
        train(optimizer, [row])
        for param, theirs in zip(params, source, strict=True):
            for name, value in adam.state[theirs].items():
                assert relative_distance(optimizer.state[param][name], value) <= 1e-13, name
        assert relative_distance(params[1], source[1]) <= 1e-13
        angle = angle_between(before.flatten(), params[0].detach().flatten())
        assert angle == pytest.approx(math.atan(0.05), rel=1e-12)
    assert optimizer.state[params[0]]["radius"].item() == pytest.approx(norm_of(params[0]), rel=1e-12)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))


@pytest.mark.parametrize("named", [True, False], ids=["saved with names", "named afterwards"])
def test_names_match_an_adamw_checkpoint_with_the_groups_of_layer_groups(named: bool, seed: int) -> None:
    """Their order is another, and most shapes are alike: each parameter gets its own moments all the same."""
    model = small_model()
    model[2].bias.requires_grad_(False)
    adam = torch.optim.AdamW(model.named_parameters() if named else model.parameters())
    train(adam, random_gradients(params_of(adam), 2))
    saved = adam.state_dict()
    if not named:
        saved["param_groups"][0]["param_names"] = [name for name, _ in model.named_parameters()]
    optimizer = FusedLayca(layer_groups(model), 0.05, base="adam")
    with pytest.warns(UserWarning, match="another optimizer wrote this checkpoint"):
        optimizer.load_state_dict(saved)
    trainable = [param for param in model.parameters() if param.requires_grad]
    assert set(optimizer.state) == set(trainable), "and nothing of what is frozen"
    for param in trainable:
        assert same_bits(dict(optimizer.state[param]), dict(adam.state[param]))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_without_names_other_groups_are_refused_with_the_way_out(seed: int) -> None:
    model = small_model()
    adam = torch.optim.AdamW(model.parameters())
    train(adam, random_gradients(params_of(adam), 1))
    optimizer = FusedLayca(layer_groups(model), 0.05, base="adam")
    with pytest.raises(ValueError, match=r"groups of \[6\] parameters where this one has \[2, 4\].*param_names"):
        optimizer.load_state_dict(adam.state_dict())
    others = torch.optim.AdamW(nn.Linear(3, 3).named_parameters())
    with pytest.raises(ValueError, match=r"it has no parameters \['0\.weight', '2\.weight'"):
        optimizer.load_state_dict(others.state_dict())
    assert not optimizer.state


def test_a_new_buffer_takes_its_first_gradient_undampened_after_loading_a_run_without_momentum(seed: int) -> None:
    """As torch.optim.SGD has it, and however many steps the parameter waits for that gradient."""
    params = [parameter(3, 4), parameter(2, 5)]
    plain = FusedLayca(params, 0.1, backend="torch")
    train(plain, random_gradients(params, 2))
    loaded = FusedLayca(clones(params), 0.1, backend="torch")
    loaded.load_state_dict(plain.state_dict())
    loaded.param_groups[0].update(momentum=0.9, dampening=0.4)
    first, second = params_of(loaded)
    grads = random_gradients(params, 3)
    train(loaded, [[grads[0][0], None], [grads[1][0], None], grads[2]])
    assert relative_distance(loaded.state[second]["momentum_buffer"], grads[2][1]) <= 1e-6
    expected = 0.9 * (0.9 * grads[0][0] + 0.6 * grads[1][0]) + 0.6 * grads[2][0]
    assert relative_distance(loaded.state[first]["momentum_buffer"], expected) <= 1e-6


def test_an_empty_buffer_of_an_older_torch_counts_as_none(seed: int) -> None:
    """torch.optim.SGD without momentum once saved None in its place."""
    params = [parameter(3, 4)]
    saved = torch.optim.SGD(params, 0.1).state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    optimizer = FusedLayca(params, 0.1, momentum=0.9, dampening=0.4, backend="torch")
    with pytest.warns(UserWarning, match="hyperparameters"):
        optimizer.load_state_dict(saved)
    grads = random_gradients(params, 1)
    train(optimizer, grads)
    assert relative_distance(optimizer.state[params[0]]["momentum_buffer"], grads[0][0]) <= 1e-7


@native_backends
def test_distributed_checkpoints_state_dict_goes_both_ways(backend: str, seed: int) -> None:
    """It makes a fresh optimizer create its state by a step at lr = 0 with zero gradients, then fills that in."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    optimizer = FusedLayca(model.parameters(), 0.1, momentum=0.9, dampening=0.3, backend=backend)
    grads = random_gradients(list(model.parameters()), 4)
    train(optimizer, grads[:2])
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    loaded = FusedLayca(twin.parameters(), 0.1, momentum=0.9, dampening=0.3, backend=backend)
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    set_optimizer_state_dict(twin, loaded, saved)
    assert same_bits(contents(loaded), contents(optimizer))
    train(optimizer, grads[2:])
    train(loaded, grads[2:])
    assert same_bits(contents(loaded), contents(optimizer))


@every_backend
def test_the_dummy_step_of_checkpoint_tools_creates_state_and_fixes_nothing(backend: str, seed: int) -> None:
    params = mixed_params(backend)
    optimizer = mixed_optimizer(params, backend)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy_of(params)
    train(optimizer, [[torch.zeros_like(param) for param in params]])
    assert same_bits(copy_of(params), before)
    for param in params:
        # torch's optimizers count that step, too.
        assert all(not tensor.any() for name, tensor in optimizer.state[param].items() if name != "step")
    assert optimizer.state[params[0]]["radius"].tolist() == [0.0, 0.0, 0.0]
    for param in params:
        param.data.mul_(3.0)
    optimizer.param_groups[0]["lr"] = 0.1
    norms = [norm_of(part) for part in params[0].chunk(3)]
    train(optimizer, random_gradients(params, 1))
    assert optimizer.state[params[0]]["radius"].tolist() == pytest.approx(norms, rel=1e-12)
