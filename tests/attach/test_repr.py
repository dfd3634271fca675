"""Handles say what they are, and whether they are still on."""

import torch

from layca_fast import FusedLayca, attach

from ..support import parameter


def test_the_handle_of_attach_names_its_optimizer_and_options(seed: int) -> None:
    optimizer = torch.optim.SGD([parameter(2, 3)], lr=0.1)
    handle = attach(optimizer, chunks=1)
    assert repr(handle).startswith("<layca_fast.attach to SGD: rule='layca'")
    assert "chunks=1" in repr(handle)
    handle.remove()
    assert repr(handle) == "<layca_fast.attach: removed>"


def test_the_handle_of_steps_in_backward_says_whether_it_is_on(seed: int) -> None:
    optimizer = FusedLayca([parameter(2, 3), parameter(3)], 0.1)
    handle = optimizer.step_in_backward()
    assert repr(handle) == "<step_in_backward: on, with 2 parameters>"
    handle.remove()
    assert repr(handle) == "<step_in_backward: removed>"
