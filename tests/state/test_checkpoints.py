"""Saving, loading and copying an optimizer: nothing is lost, nothing is shared, and the run goes on bit for bit."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from layca_fast import FusedLayca
from layca_fast.commands.cases import BASE_OPTIONS

from ..support import (
    assert_close,
    clones,
    contents,
    copy_of,
    every_backend,
    mixed_optimizer,
    mixed_params,
    native_backends,
    on_every_backend,
    parameter,
    params_of,
    random_gradients,
    same_bits,
    shapes_for,
    train,
)


def same_groups(a: Optimizer, b: Optimizer) -> bool:
    return bool(a.state_dict()["param_groups"] == b.state_dict()["param_groups"])


def through_state_dict(optimizer: FusedLayca, backend: str) -> FusedLayca:
    """A fresh optimizer with other hyperparameters, which the loaded ones must replace."""
    params = clones(params_of(optimizer))
    groups = [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:4]}, {"params": params[4:]}]
    loaded = FusedLayca(groups, 0.7, momentum=0.1, backend=backend)
    loaded.load_state_dict(optimizer.state_dict())
    return loaded


def through_file(optimizer: FusedLayca, backend: str) -> FusedLayca:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = mixed_optimizer(clones(params_of(optimizer)), backend)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return loaded


def through_whole_file(optimizer: FusedLayca, backend: str) -> FusedLayca:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "state_dict": through_state_dict,
    "torch.save of the state_dict, weights_only": through_file,
    "torch.save of the optimizer": through_whole_file,
    "pickle": lambda optimizer, backend: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": lambda optimizer, backend: copy.deepcopy(optimizer),
}


@pytest.mark.parametrize("through", COPIES.values(), ids=COPIES.keys())
@every_backend
def test_a_copy_continues_bit_for_bit(
    backend: str, through: Callable[[FusedLayca, str], FusedLayca], seed: int
) -> None:
    optimizer = mixed_optimizer(mixed_params(backend), backend)
    grads = random_gradients(params_of(optimizer), 5)
    train(optimizer, grads[:2])
    other = through(optimizer, backend)
    saved = contents(optimizer)
    assert same_groups(other, optimizer)
    assert type(other) is FusedLayca
    train(other, grads[2:])
    assert same_bits(contents(optimizer), saved), "the copy shares memory with its source"
    train(optimizer, grads[2:])
    assert same_bits(contents(other), contents(optimizer))


@native_backends
def test_model_and_optimizer_copied_together_belong_together(backend: str, seed: int) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = FusedLayca(model.named_parameters(), 0.1, momentum=0.9, backend=backend)
    inputs = torch.randn(3, 8, 6)

    def run(model: nn.Module, optimizer: FusedLayca) -> None:
        for x in inputs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    run(model, optimizer)
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, other = duplicate((model, optimizer))
        assert all(a is b for a, b in zip(params_of(other), twin.parameters(), strict=True))
        run(twin, other)
        source = copy.deepcopy((model, optimizer))
        run(*source)
        assert same_bits(contents(other), contents(source[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_backend
def test_state_has_torchs_names_and_keeps_its_types(backend: str, dtype: torch.dtype, seed: int) -> None:
    """The radius is float64 whatever the parameter is: torch's own loading would make it float32."""
    optimizer = mixed_optimizer(mixed_params(backend, dtype), backend)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    loaded = through_file(optimizer, backend)
    for each in (optimizer, loaded):
        momentum, moments = {"momentum_buffer"}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        kept = ((momentum, 3), (momentum, None), (momentum, 1), (momentum, 1), (moments, 1))
        for param, (buffers, layers) in zip(params_of(each), kept, strict=True):
            state = each.state[param]
            scalars = {"step": (torch.float32, ())} if buffers is moments else {}
            if layers is not None:
                scalars["radius"] = (torch.float64, (layers,))
            expected = {name: (dtype, tuple(param.shape)) for name in buffers} | scalars
            assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == expected
    assert same_bits(contents(loaded)[0][2], contents(optimizer)[0][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@on_every_backend("options", BASE_OPTIONS, every=4)
def test_a_run_resumes_bit_for_bit_after_any_step(
    backend: str, options: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    """Through a file, into a model and an optimizer made anew, after each step of a run that is never interrupted."""

    def fresh(params: list[Parameter]) -> FusedLayca:
        groups = [{"params": params[:2], "chunks": "all"}, {"params": params[2:], "rule": "hyperball", "lr": 0.02}]
        return FusedLayca(groups, 0.1, backend=backend, **options)

    # The interpreter takes milliseconds per layer and step.
    shapes, steps = (((2, 4), (5,), (1, 7)), 3) if backend == "triton" else (((3, 4), (5,), (2, 3, 2), (1, 7)), 4)
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in shapes_for(options, shapes)]
    optimizer = fresh(params)
    rows = random_gradients(params, steps)
    runs = []
    for row in rows:
        file = io.BytesIO()
        torch.save({"params": [param.detach() for param in params], "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        runs.append(fresh([Parameter(each) for each in saved["params"]]))
        runs[-1].load_state_dict(saved["optimizer"])
        train(optimizer, [row])
    for done, resumed in enumerate(runs):
        train(resumed, rows[done:])
        assert same_bits(contents(resumed), contents(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@native_backends
def test_every_state_tensor_keeps_the_type_that_it_was_saved_with(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Whatever the parameter's type is, bit for bit; what the kernels need otherwise, the next step converts."""
    params = [parameter(4, 3, backend=backend, dtype=dtype)]
    optimizer = FusedLayca(params, 0.1, base="adam", backend=backend)
    saved = optimizer.state_dict()
    state = {
        "exp_avg": torch.randn(4, 3, dtype=torch.float16),
        "exp_avg_sq": torch.rand(4, 3, dtype=torch.bfloat16),
        "step": torch.tensor(3, dtype=torch.int64),
        "radius": torch.rand(1, dtype=torch.float64) / 3,
        "remark": torch.randint(-128, 128, (5,), dtype=torch.int8),
        "flags": torch.rand(4, 3) > 0.5,
    }
    saved["state"] = {0: state}
    optimizer.load_state_dict(saved)
    assert same_bits(dict(optimizer.state[params[0]]), state)
    train(optimizer, random_gradients(params, 1))
    after = optimizer.state[params[0]]
    assert (after["exp_avg"].dtype, after["exp_avg_sq"].dtype, after["step"].item()) == (dtype, dtype, 4.0)
    for name in ("radius", "remark", "flags"):
        assert same_bits(after[name], state[name])


def test_loaded_state_is_a_copy_and_the_source_dict_stays_as_it_was(seed: int) -> None:
    optimizer = mixed_optimizer(mixed_params())
    train(optimizer, random_gradients(params_of(optimizer), 2))
    saved = optimizer.state_dict()
    before = copy_of(saved)
    loaded = mixed_optimizer(clones(params_of(optimizer)))
    loaded.load_state_dict(saved)
    for ours, theirs in zip(params_of(loaded), params_of(optimizer), strict=True):
        for name, tensor in loaded.state[ours].items():
            assert tensor.data_ptr() != optimizer.state[theirs][name].data_ptr()
    train(loaded, random_gradients(params_of(loaded), 2))
    assert same_bits(saved, before)


def test_a_float64_state_survives_in_a_float32_run(seed: int) -> None:
    """Saved types are kept on load; where the kernels need the parameter's type, the next step converts."""
    wide = mixed_optimizer(mixed_params(dtype=torch.float64))
    train(wide, random_gradients(params_of(wide), 2))
    narrow = mixed_optimizer([Parameter(param.detach().float()) for param in params_of(wide)])
    narrow.load_state_dict(wide.state_dict())
    for param in params_of(narrow):
        assert {value.dtype for name, value in narrow.state[param].items() if name != "step"} == {torch.float64}
    grads = random_gradients(params_of(wide), 3)
    train(wide, grads)
    train(narrow, grads)
    assert_close(narrow, wide, tolerance=1e-6)


def test_hooks_of_state_dict_and_loading_run_in_torchs_places(seed: int) -> None:
    optimizer = mixed_optimizer(mixed_params())
    train(optimizer, random_gradients(params_of(optimizer), 2))
    events: list[str] = []

    def stamp(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        events.append("saved")
        return {**state_dict, "stamp": 7}

    optimizer.register_state_dict_pre_hook(lambda opt: events.append("saving"))
    optimizer.register_state_dict_post_hook(stamp)
    saved = optimizer.state_dict()
    assert (events, saved["stamp"]) == (["saving", "saved"], 7)

    def doubled(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {key: {name: 2 * value for name, value in each.items()} for key, each in saved["state"].items()}
        return {**state_dict, "state": state}

    types = []
    loaded = mixed_optimizer(clones(params_of(optimizer)))
    loaded.register_load_state_dict_pre_hook(doubled)
    loaded.register_load_state_dict_post_hook(lambda opt: types.append(opt.state[params_of(opt)[0]]["radius"].dtype))
    loaded.load_state_dict(saved)
    assert types == [torch.float64], "the user's hook must see the state as it was saved"
    for ours, theirs in zip(params_of(loaded), params_of(optimizer), strict=True):
        for name, value in optimizer.state[theirs].items():
            assert torch.equal(loaded.state[ours][name], 2 * value)
    loaded.load_state_dict(saved)
    assert len(types) == 2, "loading must leave the user's hooks in place, and only those"
    assert len(loaded._optimizer_load_state_dict_pre_hooks) == 1


def test_names_need_not_match_to_load_and_the_saved_ones_win(seed: int) -> None:
    """As in torch: parameters are matched by position."""
    first, second = parameter(3, 4), parameter(3, 4)
    saved = FusedLayca([("old.weight", first)], 0.1, momentum=0.9, backend="torch")
    train(saved, random_gradients([first], 1))
    loaded = FusedLayca([("new.weight", second)], 0.1, momentum=0.9, backend="torch")
    loaded.load_state_dict(saved.state_dict())
    assert loaded.param_groups[0]["param_names"] == ["old.weight"]
    assert same_bits(dict(loaded.state[second]), dict(saved.state[first]))


def test_groups_of_a_copy_can_make_an_optimizer_again(seed: int) -> None:
    """A loaded or copied group must not have caught options that its base does not have."""
    optimizer = mixed_optimizer(mixed_params())
    train(optimizer, random_gradients(params_of(optimizer), 1))
    for other in (copy.deepcopy(optimizer), through_file(optimizer, "torch")):
        again = FusedLayca([dict(group) for group in other.param_groups], backend="torch")
        assert same_groups(again, optimizer)
