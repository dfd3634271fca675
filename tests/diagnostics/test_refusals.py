"""LayerConditioning and IterativeRefinement refuse what they cannot take, and leave no hook."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from layca_fast.diagnostics import IterativeRefinement, LayerConditioning

from .support import Residual

BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "every": (lambda: LayerConditioning(nn.Linear(1, 1), every=0), ValueError, "every=0: must be a whole number >= 1"),
    "fraction": (lambda: LayerConditioning(nn.Linear(1, 1), every=1.5), ValueError, "every=1.5"),
    "model": (lambda: LayerConditioning(3), TypeError, "model must be a torch.nn.Module, not a int"),
    "groups": (lambda: LayerConditioning(nn.Conv1d(2, 2, 1, groups=2)), ValueError, "2 groups.* pass patches=False"),
    "returns": (lambda: IterativeRefinement(Residual(), ["plain"], returns="x"), ValueError, r"\['sum', 'branch'\]"),
    "a string": (lambda: IterativeRefinement(Residual(), "plain"), TypeError, r"pass a list of names, \['plain'\]"),
    "no block": (lambda: IterativeRefinement(Residual(), []), ValueError, "name at least one residual block"),
    "unknown": (lambda: IterativeRefinement(Residual(), ["x"]), ValueError, "'x' is no module of this Residual"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_refused_arguments_leave_no_hook() -> None:
    model = nn.Linear(1, 1)
    for refused in (lambda: LayerConditioning(model, ["x"]), lambda: IterativeRefinement(model, ["x"])):
        with pytest.raises(ValueError, match="'x' is no"):
            refused()
    assert not model._forward_pre_hooks


def test_blocks_that_are_none_say_so(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    with IterativeRefinement(model, ["0"]), pytest.raises(ValueError, match=r"block '0' returns shape \(4, 2\)"):
        model(torch.randn(4, 3))
    with IterativeRefinement(model, ["1"]):
        model(torch.randn(4, 3))
        with pytest.raises(TypeError, match="the input of block '1' is a int"):
            model[1](3)
