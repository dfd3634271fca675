"""Whatever changes between steps is noticed, by both ways to watch tensors: C++'s and Python's."""

import gc
import weakref
from collections import UserDict
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from layca_fast import FusedLayca
from layca_fast.step import watch
from layca_fast.step.watch import Layouts, addresses, same_items, same_objects, values_are

from ..support import clones, copy_of, parameter, params_of, random_gradients, same_bits, train
from .host_support import every_base, many


def replace_parameter_memory(optimizer: FusedLayca) -> None:
    for param in params_of(optimizer):
        param.data = param.data.clone()


def drop_some_gradients(optimizer: FusedLayca) -> None:
    for param in params_of(optimizer)[::7]:
        param.grad = None


def transpose_in_place(optimizer: FusedLayca) -> None:
    """The same address, size and shape in another order; the gradient keeps the old one."""
    for param in params_of(optimizer):
        if param.shape == (8, 8):
            param.data = param.data.t()


def reorder_groups(optimizer: FusedLayca) -> None:
    optimizer.param_groups.reverse()


def move_a_parameter_to_the_other_group(optimizer: FusedLayca) -> None:
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop())


def add_a_parameter(optimizer: FusedLayca) -> None:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 20).view(4, 5))
    param.grad = torch.ones_like(param).tril()
    optimizer.param_groups[0]["params"].append(param)


def replace_state(optimizer: FusedLayca) -> None:
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = {name: value.clone() for name, value in state.items()}


def replace_state_memory(optimizer: FusedLayca) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


CHANGES = (
    replace_parameter_memory,
    drop_some_gradients,
    transpose_in_place,
    reorder_groups,
    move_a_parameter_to_the_other_group,
    add_a_parameter,
    replace_state,
    replace_state_memory,
)


@pytest.fixture(params=["C++", "Python"])
def watching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to look at tensors: C++'s is there with the native module and with torch >= 2.10."""
    if request.param == "Python":
        monkeypatch.setattr(watch, "_native", None)
    else:
        assert watch._native is not None
        if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
            pytest.skip("this torch does not describe its tensors in C")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@every_base
def test_what_changes_between_steps_is_noticed(options: dict[str, Any], change: Any, seed: int, watching: None) -> None:
    """Beside an optimizer that makes its plan anew at every step."""
    params = [parameter(*shape) for shape in ((8, 8), (30,), (4, 3, 3)) * 4]
    twins = clones(params)
    quick, careful = (
        FusedLayca([{"params": each[:6]}, {"params": each[6:], "lr": 0.02}], 0.01, backend="cpu", **options)
        for each in (params, twins)
    )
    for step, row in enumerate(random_gradients(params, 4)):
        for param, twin, grad in zip(params, twins, row, strict=True):
            param.grad, twin.grad = grad.clone(), grad.clone()
        if step == 2:
            change(quick)
            change(careful)
        careful._plan = None
        quick.step()
        careful.step()
    for ours, theirs in zip(params_of(quick), params_of(careful), strict=True):
        assert same_bits(ours.detach(), theirs.detach())
        assert same_bits(copy_of(dict(quick.state[ours])), copy_of(dict(careful.state[theirs])))


def test_memory_that_is_read_as_another_type_is_noticed(seed: int, watching: None) -> None:
    """An allocator may give the address of a tensor to its successor, so the address alone tells nothing."""
    tensors = [torch.randn(4, 4), torch.randn(6)]
    layouts = Layouts(tensors)
    assert layouts.hold()
    changes = (
        lambda tensor: tensor.view(torch.int32),
        lambda tensor: tensor[:2],
        lambda tensor: tensor.t(),
    )
    for change in changes:
        before = tensors[0].data
        address = before.data_ptr()
        tensors[0].data = change(before)
        assert tensors[0].data_ptr() == address
        assert not layouts.hold()
        tensors[0].data = before
        assert layouts.hold()


def freed(tensor: Tensor) -> Tensor:
    """A copy without memory, as sharded training leaves parameters between their uses."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def of_another_kind(tensor: Tensor) -> list[Any]:
    """Gradients that kernels must not read as they read ``tensor``."""
    return [
        None,
        tensor.double(),
        tensor.t(),
        tensor[:2],
        tensor.to_sparse(),
        torch._neg_view(tensor),
        torch.nn.Parameter(tensor),
        tensor.to("meta"),
        freed(tensor),
    ]


@pytest.mark.parametrize("kind", range(9))
def test_gradients_fit_only_if_they_lie_as_their_tensors(kind: int, seed: int, watching: None) -> None:
    tensors = [torch.randn(6), torch.randn(4, 4), torch.randn(())]
    layouts = Layouts(tensors)
    grads: list[Any] = [torch.randn_like(tensor) for tensor in tensors]
    assert layouts.fit(grads) == addresses(grads)
    grads[1] = of_another_kind(grads[1])[kind]
    # Not part of the assertion, which would print the freed one.
    found = layouts.fit(grads)
    assert found is None


#: Gradients that torch lets a tensor have.
ASSIGNABLE = (
    lambda grad: None,
    lambda grad: grad.t(),
    lambda grad: grad.to_sparse(),
    torch._neg_view,
    torch.nn.Parameter,
    freed,
)


@pytest.mark.parametrize("change", ASSIGNABLE)
def test_one_look_finds_what_hold_and_fit_find(change: Any, seed: int, watching: None) -> None:
    params = [parameter(6), parameter(4, 4), parameter(3)]
    layouts = Layouts(params)
    for param in params:
        param.grad = torch.randn_like(param)
    grads = [param.grad for param in params]
    found = layouts.look()
    assert found is not None
    assert same_objects(found[0], grads)
    assert found[1] == layouts.fit(grads) == addresses(grads)
    params[1].grad = change(grads[1])
    found = layouts.look()
    assert found is not None
    assert found[1] is None
    assert same_objects(found[0], [param.grad for param in params])
    params[2].data = params[2].data.clone()
    assert layouts.look() is None


def test_a_look_survives_python_code_that_takes_the_tensors_away(seed: int) -> None:
    params = [parameter(6), parameter(4, 4), parameter(3)]
    layouts = Layouts(params)

    class Clearing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            params.clear()
            return func(*args, **(kwargs or {}))

    with Clearing():
        assert layouts.look() is None
    assert params == []


def test_what_python_code_raises_in_between_is_raised(seed: int, watching: None) -> None:
    class Interrupting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.is_neg:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    optimizer = many({"momentum": 0.9})
    before = copy_of(params_of(optimizer))
    with Interrupting(), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert same_bits(before, params_of(optimizer))


def test_state_in_another_mapping_is_watched_too(seed: int, watching: None) -> None:
    optimizer = many({"momentum": 0.9})
    param = params_of(optimizer)[0]
    optimizer.state[param] = UserDict(optimizer.state[param])
    optimizer.step()
    plan = optimizer._plan
    optimizer.step()
    assert optimizer._plan is plan
    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    optimizer.step()
    assert optimizer._plan is not plan


def test_attributes_are_those_of_a_list_that_stays() -> None:
    class Growing:
        @property
        def grad(self) -> None:
            objects.append(self)

    objects: list[Any] = [Growing(), Growing()]
    assert import_module("layca_fast._cpu").attributes(objects, "grad") == [None, None]

    class Shrinking:
        @property
        def grad(self) -> None:
            objects.clear()

    objects[:] = [Shrinking(), Shrinking()]
    with pytest.raises(RuntimeError, match="shorter"):
        import_module("layca_fast._cpu").attributes(objects, "grad")


def test_parameters_that_are_exchanged_are_noticed(seed: int, watching: None) -> None:
    """As ``module.to`` does it under set_swap_module_params_on_conversion; it wants no other references to them."""
    params = [parameter(4, 4), parameter(5)]
    grads = random_gradients(params, 2)
    optimizer = FusedLayca(params, 0.01, momentum=0.9, backend="cpu")
    train(optimizer, grads[:1])
    optimizer.zero_grad()
    other = torch.nn.Parameter(params[0].detach().clone())
    torch.utils.swap_tensors(params[0], other)
    before = params[0].detach().clone()
    train(optimizer, grads[1:])
    assert not same_bits(params[0].detach(), before)
    assert same_bits(other.detach(), before)


def test_states_are_freed_with_their_optimizer(seed: int, watching: None) -> None:
    """Also those that C++ holds a reference to, which no garbage collector sees."""
    optimizer = many({"momentum": 0.9})
    states = [weakref.ref(value) for entry in optimizer.state.values() for value in entry.values()]
    assert len(states) > 60
    del optimizer
    gc.collect()
    assert not any(state() is not None for state in states)


def test_lists_and_dicts_are_compared_by_identity(watching: None) -> None:
    one, other = [1], [1]
    assert same_objects([one, other], [one, other])
    assert not same_objects([one, other], [one, one])
    assert not same_objects([one], [one, other])
    assert values_are({"a": one, "b": other}, [one, other])
    assert not values_are({"a": one, "b": other}, [other, one])
    assert not values_are({"a": one}, [one, other])
    assert values_are(UserDict({"a": one}), [one])
    assert same_items({"a": one, "b": other}, ["a", "b"], [one, other])
    assert not same_items({"a": one, "b": other}, ["a", "c"], [one, other])
    assert not same_items({"a": one, "b": other}, ["a", "b"], [one, one])
    assert not same_items({"a": one}, ["a", "b"], [one, other])
    assert not same_items({"b": other, "a": one}, ["a", "b"], [one, other])
    assert same_items(UserDict({"a": one}), ["a"], [one])
