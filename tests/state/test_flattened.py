"""Steps that something takes on flat runs of many layers, which would turn as one."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from layca_fast import FusedLayca

from ..support import same_bits

#: As ZeRO does it: one flat tensor stands in the group for all of its parameters.
PROGRAM = """
def step(optimizer, flat):
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.step()
"""


@pytest.mark.parametrize(
    "name", ["runtime.zero.stage_1_and_2", "runtime.zero.stage3", "runtime.bf16_optimizer", "runtime.engine"]
)
def test_a_step_by_zero_is_refused_before_anything_moves(name: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    optimizer = FusedLayca([{"params": [torch.randn(4, 3).requires_grad_()], "rotate": True}], 0.03)
    flat = torch.randn(12).requires_grad_()
    flat.grad = torch.randn(12)
    before = flat.detach().clone()
    program: dict[str, Any] = {"__name__": f"deepspeed.{name}"}
    exec(PROGRAM, program)
    if name == "runtime.engine":
        # What steps the parameters themselves, as stage 0 does.
        program["step"](optimizer, flat)
        assert not same_bits(flat, before)
        return
    with pytest.raises(TypeError, match=r"deepspeed\.runtime\..*no layers to turn: .*FSDP2"):
        program["step"](optimizer, flat)
    assert same_bits(flat, before)
    assert not optimizer.state
