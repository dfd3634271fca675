"""Which operations a step of the torch backend is, and how many: a clock on a busy machine could not defend that."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layca_fast import FusedLayca
from layca_fast.backends.torch_.arithmetic import Value, on_values
from layca_fast.backends.torch_.memory import Pool
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.formulas.bases import FORMULAS

from ...support import directs, parameter, rows_by_formula, same_bits

BASES = ({"base": "sgd"}, {"momentum": 0.9}, {"base": "adam"})

#: What rounds a product and a sum once or twice, as it was built and as elements lie.
FUSED = {"addcmul", "addcdiv", "lerp", "addcmul_", "addcdiv_", "lerp_"}


class Counting(TorchDispatchMode):
    """Counts the operations, without views, and the bytes of new tensors that they make; notes those that are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.new_bytes = 0
        self.fused: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        elements = isinstance(result, Tensor) and result.dim() > 0 and result.dtype == torch.float32
        if elements and (name in FUSED or kwargs.get("alpha", 1) != 1):
            self.fused.add(name)
        # A copy of a tensor to itself only tells modes of a write, and is not there without them.
        if not func.is_view and not (name == "copy_" and args[0] is args[1]):
            self.operations += 1
            writes = any(argument.alias_info is not None for argument in func._schema.arguments)
            if isinstance(result, Tensor) and not writes:
                self.new_bytes += result.numel() * result.element_size()
        return result


def counted(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> Counting:
    """What a step after the first few does."""
    params = [parameter(*shape) for shape in shapes]
    optimizer = FusedLayca(params, 0.01, rotate=True, backend="torch", **options)
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(2):
        optimizer.step()
    with Counting() as counting:
        optimizer.step()
    return counting


@pytest.mark.parametrize("options", BASES, ids=str)
def test_small_tensors_share_their_operations(options: dict[str, Any], seed: int) -> None:
    """Of a tensor more: none, for torch walks lists by itself; by hand it is 25 to 30."""
    few, many = (counted([(6, 5)] * count, options).operations for count in (50, 150))
    assert (many - few) / 100 < 0.5


@pytest.mark.parametrize(("options", "most"), list(zip(BASES, (25, 29, 46), strict=True)), ids=str)
def test_a_large_layer_takes_few_operations_and_no_new_memory(options: dict[str, Any], most: int, seed: int) -> None:
    """Of a block more: so many operations, none of which takes memory of the block's size."""
    short, long = (counted([(blocks * 256, 1024)], options) for blocks in (1, 3))
    assert (long.operations - short.operations) / 2 < most
    assert long.new_bytes - short.new_bytes < 2**18


@pytest.mark.parametrize("options", [each for each in BASE_OPTIONS if not directs(each)], ids=str)
def test_nothing_is_fused(options: dict[str, Any], seed: int) -> None:
    """Torch fuses in some builds only, and there not the last elements of a run."""
    assert not counted([(6, 5), (6, 5), (7,)], options).fused


class Plain(TorchFunctionMode):
    """A mode of the user's, to which everything must be a tensor or a number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(isinstance(each, Value) for each in args)
        return func(*args, **(kwargs or {}))


def test_function_modes_see_tensors_only(seed: int) -> None:
    params = [parameter(6, 5), parameter(6, 5)]
    optimizer = FusedLayca(params, 0.01, base="adam", amsgrad=True, backend="torch")
    for param in params:
        param.grad = torch.randn_like(param)
    with Plain():
        optimizer.step()


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_the_same_on_values(name: str, as_tensors: bool, seed: int) -> None:
    """Also where options are of the device, or larger than float32 holds."""
    formula = FORMULAS[name]
    base, group = rows_by_formula()[name]
    numbers = formula.prepare(torch.tensor(3.0, dtype=torch.float64), base.scalars(group, False))
    for eps in (None, 1e39):
        options = [torch.tensor(float(each), dtype=torch.float64) if as_tensors else float(each) for each in numbers]
        if eps is not None:
            options = [each if each != group.get("eps", math.nan) else each * 0 + eps for each in options]
        grad = torch.randn(5, 7)
        states = tuple(torch.rand(5, 7) for _ in formula.states)
        expected = formula.advance(grad, states, options)
        expected = [*expected, formula.step(grad, expected, options)]
        pool = Pool()
        given = Value(pool, grad), tuple(Value(pool, state) for state in states), options
        found = on_values(formula.advance)(*given)
        found = [*found, on_values(formula.step)(given[0], found, options)]
        assert same_bits([each.tensor for each in found], list(expected))


def test_only_hidden_gradients_are_looked_at_by_themselves(seed: int) -> None:
    """What is not finite shows in the step or in a state: of each formula that does not say that it hides it."""
    rows = rows_by_formula()
    for name, formula in FORMULAS.items():
        base, group = rows[name]
        options = formula.prepare(torch.tensor(3.0, dtype=torch.float64), base.scalars(group, False))
        for bad in (math.nan, math.inf, -math.inf, 1e30):
            grad = torch.tensor([bad])
            if torch.equal(formula.admit(grad), grad):
                continue
            states = formula.advance(grad, tuple(torch.ones(1) for _ in formula.states), options)
            found = [*states, formula.step(grad, states, options)]
            if not formula.hides:
                assert not all(bool(torch.isfinite(each).all()) for each in found), (name, bad)
