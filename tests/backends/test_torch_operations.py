"""How many operations a step of the torch backend is: a clock on a busy machine could not defend it."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layca_fast import FusedLayca

from ..support import parameter

BASES = ({"base": "sgd"}, {"momentum": 0.9}, {"base": "adam"})


class Counting(TorchDispatchMode):
    """Counts the operations, without views, and the bytes of new tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.new_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view:
            self.operations += 1
            writes = any(argument.alias_info is not None for argument in func._schema.arguments)
            if isinstance(result, torch.Tensor) and not writes:
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
    few, many = (counted([(6, 5)] * count, options).operations for count in (100, 300))
    assert (many - few) / 200 < 0.5


@pytest.mark.parametrize(("options", "most"), list(zip(BASES, (24, 28, 42), strict=True)), ids=str)
def test_a_large_layer_takes_few_operations_and_no_new_memory(options: dict[str, Any], most: int, seed: int) -> None:
    """Of a block more: so many operations, none of which takes memory of the block's size."""
    short, long = (counted([(blocks * 256, 1024)], options) for blocks in (1, 3))
    assert (long.operations - short.operations) / 2 < most
    assert long.new_bytes - short.new_bytes < 2**18


def test_only_hidden_gradients_are_looked_at_by_themselves(seed: int) -> None:
    """What is not finite shows in the step or in a state: of each formula that does not say that it hides it."""
    from layca_fast.formulas.bases import FORMULAS

    shown = {"sgd_momentum": (0.9, 1.0), "sgd_nesterov": (0.9, 1.0), "sgd": (), "adagrad": (1e-10,)}
    for name, formula in FORMULAS.items():
        options = shown.get(name, (0.1, 0.9, 0.1, 1e-8, 1.0, 1.0) if "adam" in name else (0.9, 0.1, 1e-8, 0.9))
        options = options if name not in ("lion", "muon") else (0.1, 0.9, 0.1)
        for bad in (float("nan"), float("inf"), -float("inf"), 1e30):
            grad = torch.tensor([bad])
            if torch.equal(formula.admit(grad), grad):
                continue
            states = formula.advance(grad, tuple(torch.ones(1) for _ in formula.states), options)
            found = [*states, formula.step(grad, states, options)]
            if not formula.hides:
                assert not all(bool(torch.isfinite(each).all()) for each in found), (name, bad)
