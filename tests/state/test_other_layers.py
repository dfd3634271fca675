"""Checkpoints that were made under other chunks: refused by name, with the way out, unless the layers are the same."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from layca_fast import FusedLayca, attach

from ..support import contents, copy_of, params_of, same_bits, train

Make = Callable[..., Optimizer]


def ours(chunks: Any, **options: Any) -> FusedLayca:
    group = {"params": [("qkv", Parameter(torch.randn(8, 4)))], "chunks": chunks}
    return FusedLayca([group, {"params": [("bias", Parameter(torch.randn(5)))]}], 0.1, momentum=0.9, **options)


def attached(chunks: Any, **options: Any) -> Optimizer:
    """With its chunks given to attach, which groups know nothing of."""
    params = [("qkv", Parameter(torch.randn(8, 4))), ("bias", Parameter(torch.randn(5)))]
    optimizer = AdamW(params, 0.1, weight_decay=0.0)
    attach(optimizer, chunks=chunks, **options)
    return optimizer


def attached_by_group(chunks: Any, **options: Any) -> Optimizer:
    group = {"params": [("qkv", Parameter(torch.randn(8, 4)))], "chunks": chunks}
    optimizer = AdamW([group, {"params": [("bias", Parameter(torch.randn(5)))]}], 0.1, weight_decay=0.0)
    attach(optimizer, **options)
    return optimizer


every_kind = pytest.mark.parametrize("make", [ours, attached, attached_by_group], ids=lambda make: make.__name__)


def saved_after(make: Make, chunks: Any, steps: int = 2, **options: Any) -> dict[str, Any]:
    """Through a file, as weights_only reads it."""
    optimizer = make(chunks, **options)
    train(optimizer, [[torch.randn(8, 4), torch.randn(5)]] * steps)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ((2, 2, 4), (4, 2, 2)),
        ((2, 6), 2),
        (2, ("columns", 2)),
        (4, "all"),
        (1, (4, 4)),
        ("columns", 4),
        (("columns", (1, 3)), ("columns", 2)),
    ],
    ids=str,
)
@every_kind
def test_other_layers_are_refused_by_name_before_anything_changes(make: Make, then: Any, now: Any, seed: int) -> None:
    saved, optimizer = saved_after(make, then), make(now)
    train(optimizer, [[torch.randn(8, 4), torch.randn(5)]])
    groups = copy_of([dict(group) for group in optimizer.param_groups])
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"'qkv' \(shape \(8, 4\).* was saved .*has chunks=.* here") as error:
        optimizer.load_state_dict(saved)
    # Of chunks=1, which attach was told, the saved groups know nothing.
    told = make is not attached or then != 1
    assert f"{f'under chunks={then!r}' if told else 'with 1 radii'}, and has chunks={now!r} here" in str(error.value)
    assert f"give its group {f'chunks={then!r}' if told else 'the chunks of that run'}" in str(error.value)
    assert same_bits(contents(optimizer), before)
    assert [list(group) for group in optimizer.param_groups] == [list(group) for group in groups]


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ((4, 4), 2),
        (8, "all"),
        ((8,), 1),
        ("matrices", 1),
        (4, ("matrices", 4)),
        ([2, 6], (2, 6)),
        ("columns", ("columns", 4)),
    ],
    ids=str,
)
@every_kind
def test_the_same_layers_by_another_word_go_on(make: Make, then: Any, now: Any, seed: int) -> None:
    saved, optimizer = saved_after(make, then), make(now)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params_of(optimizer)[0]]["radius"], saved["state"][0]["radius"])
    train(optimizer, [[torch.randn(8, 4), torch.randn(5)]])


@every_kind
def test_a_group_that_says_nothing_follows_the_checkpoint(make: Make, seed: int) -> None:
    """As it does with every option: that is torch's."""
    saved, optimizer = saved_after(make, (2, 6)), make(1)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["chunks"] == (2, 6)
    train(optimizer, [[torch.randn(8, 4), torch.randn(5)]])


@every_kind
def test_without_radii_there_is_nothing_to_refuse(make: Make, seed: int) -> None:
    """Where none were taken yet, were taken out, or the tensor did not rotate."""
    cases = (saved_after(make, 2, steps=0), saved_after(make, 2))
    for entry in cases[1]["state"].values():
        entry.pop("radius", None)
    for saved in cases:
        optimizer = make((2, 6))
        optimizer.load_state_dict(saved)
        train(optimizer, [[torch.randn(8, 4), torch.randn(5)]])
    resting = saved_after(make, 2, rotate=False)
    make((2, 6)).load_state_dict(resting)


@every_kind
def test_the_way_out_goes_on_with_other_layers(make: Make, seed: int) -> None:
    saved, optimizer = saved_after(make, (2, 2, 4)), make((4, 2, 2))
    saved["state"][0].pop("radius")
    saved["param_groups"][0]["chunks"] = (4, 2, 2)
    optimizer.load_state_dict(saved)
    param = params_of(optimizer)[0]
    norms = torch.stack([part.detach().double().norm() for part in param.split([4, 2, 2])])
    train(optimizer, [[torch.randn(8, 4), torch.randn(5)]])
    torch.testing.assert_close(optimizer.state[param]["radius"], norms, rtol=1e-6, atol=0)


def test_attach_leaves_no_option_in_groups_that_had_none(seed: int) -> None:
    optimizer = attached((2, 6))
    keys = [list(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved_after(attached, (2, 6)))
    assert [sorted(group) for group in optimizer.param_groups] == [sorted(each) for each in keys]
    plain = AdamW([("qkv", Parameter(torch.randn(8, 4))), ("bias", Parameter(torch.randn(5)))], 0.1)
    plain.load_state_dict(saved_after(attached, (2, 6)))
    train(plain, [[torch.randn(8, 4), torch.randn(5)]])
