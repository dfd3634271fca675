"""What a step costs on the host, counted and not timed: a guard that does not depend on the machine's speed."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from layca_fast import FusedLayca
from layca_fast.step import watch

from ..support import parameter
from .host_support import every_base


def optimizer_of(count: int, options: dict[str, Any]) -> FusedLayca:
    """Past its first steps, with gradients that each step finds again."""
    params = [parameter(3, 4) for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = FusedLayca(params, 0.01, backend="cpu", **options)
    for _ in range(3):
        optimizer.step()
    return optimizer


@contextmanager
def counting(events: Counter[str]) -> Iterator[None]:
    """Count the bytecodes that Python runs, and the functions in C that it calls."""

    def on_opcode(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        frame.f_trace_opcodes = True
        events[event] += 1
        return on_opcode

    def on_call(_: FrameType, event: str, __: Any) -> None:
        events[event] += 1

    tracing = sys.gettrace()
    sys.settrace(on_opcode)
    sys.setprofile(on_call)
    try:
        yield
    finally:
        sys.setprofile(None)
        sys.settrace(tracing)


def cost(count: int, options: dict[str, Any]) -> Counter[str]:
    optimizer = optimizer_of(count, options)
    events: Counter[str] = Counter()
    with counting(events):
        optimizer.step()
    return events


@every_base
def test_python_does_as_much_for_many_tensors_as_for_few(options: dict[str, Any], seed: int) -> None:
    """No loop over tensors is Python's: neither its bytecodes nor its calls grow with their number."""
    few, many = cost(20, options), cost(200, options)
    assert few["opcode"] > 500, "nothing was counted"
    assert many == few
    # Up to 3,325 and 143 on Python 3.11; other versions split the same work otherwise.
    assert few["opcode"] < 4500
    assert few["c_call"] < 250


def test_torch_is_asked_of_each_tensor_for_its_gradient_and_that_ones_sign(seed: int) -> None:
    """These are torch's dearest answers: each once a step, and no other by way of Python."""
    asked: Counter[str] = Counter()

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if args and isinstance(args[0], Tensor):
                asked[getattr(func, "__qualname__", str(func))] += 1
            return func(*args, **(kwargs or {}))

    optimizer = optimizer_of(50, {"momentum": 0.9})
    with Counting():
        optimizer.step()
    # Told to modes alone, as this is one.
    del asked["TensorBase.copy_"]
    assert {name: count for name, count in asked.items() if count >= 50} == {
        "getset_descriptor.__get__": 50,
        "TensorBase.is_neg": 50,
    }


def test_every_loop_over_tensors_is_made_a_fixed_number_of_times(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loop of the native module that :mod:`layca_fast.step.watch` asks for, for one batch."""
    calls: Counter[str] = Counter()
    native = watch._native

    class Counting:
        def __getattr__(self, name: str) -> Any:
            found = getattr(native, name)
            if name == "Layouts":
                return found

            def counted(*args: Any) -> Any:
                calls[name] += 1
                return found(*args)

            return counted

    optimizer = optimizer_of(30, {"momentum": 0.9})
    monkeypatch.setattr(watch, "_native", Counting())
    optimizer.step()
    # The options of the one group, and its parameters; the states; the entries in them.
    assert calls == {"same_items": 1, "same_objects": 1, "values_are": 1, "entries_hold": 1}
