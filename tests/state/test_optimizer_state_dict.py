"""Checkpoints through torch.distributed.checkpoint's get and set_optimizer_state_dict: flat and not, strict, full.

A tensor that needs no state has no entry in the state, as in torch, and loads all the same.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW, Optimizer

from layca_fast import FusedLayca, attach

from ..support import contents, params_of, random_gradients, same_bits, train


def attached(made: Optimizer) -> Optimizer:
    attach(made)
    return made


#: Optimizers that need no state for biases, for all, or for none of the tensors.
MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "FusedLayca": lambda model: FusedLayca(model.parameters(), 0.1),
    "FusedLayca, named": lambda model: FusedLayca(model.named_parameters(), 0.1),
    "FusedLayca, nothing rotates": lambda model: FusedLayca(model.parameters(), 0.1, rotate=False),
    "FusedLayca, momentum": lambda model: FusedLayca(model.parameters(), 0.1, momentum=0.9),
    "FusedLayca, adam": lambda model: FusedLayca(model.parameters(), 0.1, base="adam"),
    "FusedLayca, function": lambda model: FusedLayca(model.named_parameters(), 0.1, radius=len),
    "attached SGD": lambda model: attached(SGD(model.parameters(), lr=0.1)),
    "attached SGD, momentum": lambda model: attached(SGD(model.parameters(), lr=0.1, momentum=0.9)),
    "attached SGD, function": lambda model: attached(
        SGD([{"params": [*model.parameters()], "radius": len}], lr=0.1, momentum=0.9)
    ),
    "attached AdamW": lambda model: attached(AdamW(model.parameters(), lr=0.1, weight_decay=0.0)),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
}


#: Full state dicts without any state are refused by torch itself: see below.
CASES = [
    (maker, through)
    for maker in MAKERS
    for through, options in OPTIONS.items()
    if maker != "FusedLayca, nothing rotates" or "full_state_dict" not in options
]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


@pytest.mark.parametrize(("maker", "through"), CASES)
def test_a_run_resumes_bit_for_bit(maker: str, through: str, one_process: None, seed: int) -> None:
    make, options = MAKERS[maker], OPTIONS[through]
    model = network()
    optimizer = make(model)
    rows = random_gradients(params_of(optimizer), 5)
    train(optimizer, rows[:2])
    for param in model.parameters():
        param.grad = None
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(strict=True, **options))
    # torch's own load_state_dict shares memory with what it loads.
    saved = copy.deepcopy(saved)
    again = network()
    again.load_state_dict(model.state_dict())
    resumed = make(again)
    set_optimizer_state_dict(again, resumed, saved, options=StateDictOptions(strict=True, **options))
    for each in (optimizer, resumed):
        train(each, rows[2:])
    assert same_bits(contents(resumed), contents(optimizer))
    assert same_bits(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("through", ["full", "broadcast"])
@pytest.mark.parametrize(
    "make",
    [lambda model: SGD(model.parameters(), lr=0.1), MAKERS["FusedLayca, nothing rotates"]],
    ids=["torch.optim.SGD", "FusedLayca"],
)
def test_torch_refuses_full_states_without_any_tensor(
    make: Callable[[nn.Module], Optimizer], through: str, one_process: None, seed: int
) -> None:
    """Its own SGD's, too. Where a later torch loads them, CASES shall hold them."""
    model, options = network(), StateDictOptions(strict=True, **OPTIONS[through])
    optimizer = make(model)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    with pytest.raises(AssertionError, match="Expected device to be set"):
        set_optimizer_state_dict(model, make(model), saved, options=options)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_entry_of_the_state_is_empty(make: Callable[[nn.Module], Optimizer], seed: int) -> None:
    """After steps, and after a checkpoint was loaded in which some are."""
    optimizer = make(network())
    rows = random_gradients(params_of(optimizer), 3)
    train(optimizer, rows[:2])
    assert all(optimizer.state.values())
    saved = optimizer.state_dict()
    loaded = make(network())
    loaded.load_state_dict(saved)
    assert all(loaded.state.values())
    train(loaded, rows[2:])
    assert all(loaded.state.values())
    assert set(saved["state"]) in (set(range(6)), set())


def test_state_that_is_dropped_leaves_no_empty_entry(seed: int) -> None:
    optimizer = FusedLayca(network().bfloat16().parameters(), 0.1)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    optimizer.reset_radius()
    assert all(optimizer.state.values())
    optimizer.param_groups[0]["compensate"] = False
    optimizer.param_groups[0]["rotate"] = False
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert not optimizer.state


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_parameter_that_never_had_a_gradient_loads_strictly(
    make: Callable[[nn.Module], Optimizer], one_process: None, seed: int
) -> None:
    model = network()
    optimizer = make(model)
    rows = [[*row[:-1], None] for row in random_gradients(params_of(optimizer), 2)]
    train(optimizer, rows)
    saved = get_optimizer_state_dict(model, optimizer)
    resumed = make(model)
    set_optimizer_state_dict(model, resumed, saved)
    assert params_of(resumed)[-1] not in resumed.state
