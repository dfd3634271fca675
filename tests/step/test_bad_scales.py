"""unscale_in_step=True: scales and verdicts that are none."""

from typing import Any

import pytest
import torch

from layca_fast import FusedLayca

from ..support import (
    contents,
    parameter,
    random_gradients,
    same_bits,
    train,
)

BAD_SCALES = (
    pytest.param(2.0, TypeError, r"grad_scale=2\.0: GradScaler sets a tensor of one element", id="number"),
    pytest.param(
        torch.ones(2), ValueError, r"grad_scale is a tensor of shape \(2,\): it must hold one", id="two scales"
    ),
)


@pytest.mark.parametrize(("scale", "error", "message"), BAD_SCALES)
def test_a_scale_that_is_none_is_refused(scale: Any, error: type[Exception], message: str, seed: int) -> None:
    params = [parameter(4, 3)]
    optimizer = FusedLayca(params, 0.05, momentum=0.9, backend="torch", unscale_in_step=True)
    train(optimizer, random_gradients(params, 1))
    before = contents(optimizer)
    optimizer.grad_scale = scale
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same_bits(contents(optimizer), before)


def test_a_verdict_of_two_numbers_is_refused(seed: int) -> None:
    params = [parameter(4, 3)]
    optimizer = FusedLayca(params, 0.05, momentum=0.9, backend="torch", unscale_in_step=True)
    train(optimizer, random_gradients(params, 1))
    before = contents(optimizer)
    optimizer.found_inf = torch.zeros(2)
    with pytest.raises(ValueError, match=r"found_inf is a tensor of shape \(2,\): it must hold one"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)


def test_it_is_an_option_of_the_optimizer_alone(seed: int) -> None:
    with pytest.raises(ValueError, match=r"unscale_in_step='yes' is unknown: choose one of \[False, True\]"):
        FusedLayca([parameter(3, 4)], unscale_in_step="yes")
    with pytest.raises(ValueError, match="unscale_in_step is no option of a group"):
        FusedLayca([{"params": [parameter(3, 4)], "unscale_in_step": True}])
