"""Limits that are documented: what they are, and that the way around each works."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from layca_fast import FusedLayca

from ..support import norm_of, parameter


@pytest.mark.parametrize("expected", [TypeError, RuntimeError])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_sparse_gradient_is_the_error_that_either_habit_expects(
    expected: type[Exception], steps_before: int, seed: int
) -> None:
    """torch's optimizers raise RuntimeError; what is of a wrong type is a TypeError everywhere here."""
    embedding = nn.Embedding(6, 4, sparse=True)
    optimizer = FusedLayca(embedding.parameters(), 0.1)
    for _ in range(steps_before):
        embedding.weight.grad = torch.randn(6, 4)
        optimizer.step()
    embedding.weight.grad = None
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(expected, match=r"dense gradients \(sparse=False\)"):
        optimizer.step()


@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer, cycle: OneCycleLR(optimizer, max_lr=0.1, total_steps=20, cycle_momentum=cycle),
        lambda optimizer, cycle: CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, cycle_momentum=cycle),
    ],
)
def test_schedulers_that_cycle_under_groups_of_several_bases(make: Any, base: str, seed: int) -> None:
    groups = [
        {"params": [parameter(4, 3)], "base": "sgd", "momentum": 0.9},
        {"params": [parameter(4, 3)], "base": "adam"},
    ]
    optimizer = FusedLayca(groups, 0.1, base=base)
    if base == "adam":
        # torch's own: the group of sgd has none.
        with pytest.raises(KeyError, match="betas"):
            make(optimizer, True)
    scheduler = make(optimizer, False)
    before = [(group.get("momentum"), group.get("betas")) for group in optimizer.param_groups]
    for _ in range(5):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.randn(4, 3)
        optimizer.step()
        scheduler.step()
    assert [(group.get("momentum"), group.get("betas")) for group in optimizer.param_groups] == before


def test_cycling_works_where_all_groups_have_one_base(seed: int) -> None:
    optimizer = FusedLayca([parameter(4, 3)], 0.1, base="adam")
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    first = optimizer.param_groups[0]["betas"]
    for _ in range(5):
        optimizer.param_groups[0]["params"][0].grad = torch.randn(4, 3)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["betas"] != first


@pytest.mark.parametrize("convert", [lambda w: w.to(memory_format=torch.channels_last), lambda w: w.transpose(0, 1)])
def test_permuted_weights_without_gaps_are_taken(convert: Any, seed: int) -> None:
    weight = Parameter(convert(torch.randn(4, 3, 2, 2)))
    weight.grad = torch.randn_like(weight)
    norm = norm_of(weight)
    FusedLayca([weight], 0.1, backend="cpu").step()
    assert norm_of(weight) == pytest.approx(norm, rel=1e-6)


FORKED = """
import os, torch
from layca_fast import FusedLayca
torch.set_num_threads(2)
weight = torch.nn.Parameter(torch.randn(600, 600))
optimizer = FusedLayca([weight], 0.1, backend="cpu")
weight.grad = torch.randn(600, 600)
optimizer.step()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    optimizer.step()
    os._exit(7)
optimizer.step()
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_one_thread_in_a_forked_process(seed: int) -> None:
    """The kernel's threads do not survive a fork: a child that asked for them would wait for ever."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
