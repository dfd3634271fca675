"""Parameters that FusedLayca refuses, by name and with the way out, before anything is modified."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.formulas.bases import BASES

from ..support import (
    contents,
    copy_of,
    parameter,
    params_of,
    random_gradients,
    running,
    same_bits,
    train,
)
from .bad_support import Wrapper, ids


class NamedParameter(Parameter):
    """A subclass that only carries attributes: its memory is its own."""


def quantized() -> Tensor:
    with warnings.catch_warnings():
        # Deprecated, and still met in old checkpoints.
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8)


@dataclass(frozen=True)
class BadTensor:
    """A parameter, made by ``make``, that no kernel may be handed."""

    name: str
    make: Callable[[], Tensor]
    error: type[Exception]
    message: str


BAD_PARAMETERS = (
    BadTensor(
        "sparse", lambda: torch.eye(3).to_sparse(), TypeError, r"\(shape \(3, 3\).*layout torch\.sparse_coo.*to_dense"
    ),
    BadTensor("mkldnn", lambda: torch.randn(3, 4).to_mkldnn(), TypeError, r"layout torch\._mkldnn.*to_dense"),
    BadTensor("complex", lambda: torch.randn(3, 4, dtype=torch.cfloat), TypeError, r"is complex.*view_as_real"),
    BadTensor(
        "integer",
        lambda: torch.ones(3, 4, dtype=torch.int64),
        TypeError,
        r"torch\.int64.*not a floating-point",
    ),
    BadTensor("boolean", lambda: torch.ones(3, 4, dtype=torch.bool), TypeError, r"torch\.bool.*not a floating-point"),
    BadTensor("quantized", quantized, TypeError, r"torch\.qint8.*not a floating-point.*convert"),
    BadTensor(
        "of 8 bits",
        lambda: torch.randn(3, 4).to(torch.float8_e4m3fn),
        TypeError,
        r"torch\.float8_e4m3fn.*float64, float32, bfloat16 and float16.*forward",
    ),
    BadTensor("wrapper subclass", lambda: Wrapper(torch.randn(3, 4)), TypeError, r"is a Wrapper.*plain tensor"),
    BadTensor("expanded", lambda: torch.randn(1, 4).expand(3, 4), ValueError, r"share memory.*\(0, 1\).*clone\(\)"),
    BadTensor(
        "overlapping windows",
        lambda: torch.randn(12).as_strided((5, 4), (2, 1)),
        ValueError,
        r"share memory.*\(2, 1\).*clone\(\)",
    ),
    BadTensor("meta", lambda: torch.empty(3, 4, device="meta"), ValueError, r"meta device.*to_empty"),
    BadTensor("lazy", torch.nn.UninitializedParameter, ValueError, r"not initialized.*forward"),
)


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("case", BAD_PARAMETERS, **ids)
def test_the_constructor_refuses(case: BadTensor, named: bool, seed: int) -> None:
    good = parameter(3, 4)
    params = [("good", good), ("layer.bad", case.make())] if named else [good, case.make()]
    label = r"parameter 'layer\.bad'" if named else "parameter 1 of group 0"
    before = copy_of(good)
    with pytest.raises(case.error, match=f"{label}.*{case.message}"):
        FusedLayca(params, 0.1, backend="torch")
    assert same_bits(copy_of(good), before)


@pytest.mark.parametrize("base", ["sgd", "muon"])
@pytest.mark.parametrize("case", BAD_PARAMETERS, **ids)
def test_a_new_group_is_refused_and_the_run_goes_on(case: BadTensor, base: str, seed: int) -> None:
    optimizer = running()
    before = contents(optimizer)
    with pytest.raises(case.error, match=f"parameter 'new' ?.*{case.message}"):
        optimizer.add_param_group({"params": [("fine", parameter(2, 2)), ("new", case.make())], "base": base})
    assert len(optimizer.param_groups) == 1
    assert same_bits(contents(optimizer), before)
    optimizer.step()


def test_subclasses_with_memory_of_their_own_are_welcome(seed: int) -> None:
    plain = parameter(3, 4)
    named = NamedParameter(plain.detach().clone())
    optimizers = [FusedLayca([param], 0.1, momentum=0.9, backend="torch") for param in (plain, named)]
    grads = random_gradients([plain], 2)
    for optimizer in optimizers:
        train(optimizer, grads)
    assert torch.equal(plain, named)


TWICE = {
    "in one group": lambda good, twice: [{"params": [("good", good), ("encoder", twice), ("decoder", twice)]}],
    "in two groups": lambda good, twice: [
        {"params": [("good", good), ("encoder", twice)]},
        {"params": [("decoder", twice)], "rotate": False},
    ],
}


@pytest.mark.parametrize("groups", TWICE.values(), ids=TWICE.keys())
def test_the_same_parameter_twice_is_named(groups: Callable[..., Any], seed: int) -> None:
    with pytest.raises(ValueError, match=r"(?s)parameter '(encoder|decoder)'.*(once|twice)"):
        FusedLayca(groups(parameter(2, 2), parameter(3, 4)), 0.1, backend="torch")


def test_the_same_parameter_added_again_is_named_and_the_run_goes_on(seed: int) -> None:
    optimizer = running()
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"parameter '(matrix|again)'"):
        optimizer.add_param_group({"params": [("again", params_of(optimizer)[0])]})
    assert len(optimizer.param_groups) == 1
    assert same_bits(contents(optimizer), before)


@dataclass(frozen=True)
class NoMatrix:
    """A tensor that base="muon" cannot direct, with the options of its group."""

    shape: tuple[int, ...]
    options: Mapping[str, Any]
    message: str


NO_MATRICES = (
    NoMatrix((), {}, r"shape \(\).*is no matrix.*layer_groups\(model, base='muon', others_base='adam'\)"),
    NoMatrix((5,), {"rotate": None}, r"shape \(5,\).*is no matrix.*layer_groups"),
    NoMatrix((5,), {"rotate": False}, r"shape \(5,\).*is no matrix.*layer_groups"),
    NoMatrix((6, 4), {"chunks": "all"}, r"chunks='all' cuts .*\(6, 4\).* into vectors.*fewer chunks"),
    NoMatrix((6, 4), {"chunks": 6}, r"chunks=6 cuts .*into vectors.*fewer chunks"),
    NoMatrix((6, 4), {"chunks": 4}, r"chunks=4 does not divide"),
    NoMatrix((6, 4), {"chunks": "columns"}, r"chunks='columns' cuts .*into vectors.*fewer chunks"),
    NoMatrix((6, 4, 3, 3), {"chunks": "columns"}, r"chunks='columns' cuts .*into vectors.*fewer chunks"),
    NoMatrix((6, 4), {"chunks": ("columns", 4)}, r"'columns', 4.* cuts .*into vectors"),
    NoMatrix((6, 4), {"chunks": (4, 1)}, r"chunks=\(4, 1\) adds up to 5"),
)


@pytest.mark.parametrize("case", NO_MATRICES, ids=str)
def test_what_is_no_matrix_has_no_direction(case: NoMatrix, seed: int) -> None:
    """Found at construction, in a new group, and where a group changes its base mid-run; nothing is modified."""
    param = parameter(*case.shape)
    with pytest.raises(ValueError, match=case.message):
        FusedLayca([param], 0.1, base="muon", **case.options)
    optimizer = running()
    with pytest.raises(ValueError, match=case.message):
        optimizer.add_param_group({"params": [("new", param)], "base": "muon", **case.options})
    assert len(optimizer.param_groups) == 1
    changed = FusedLayca([param], 0.1, backend="torch")
    train(changed, random_gradients([param], 1))
    before = contents(changed)
    changed.param_groups[0].update({**BASES["muon"].options, "base": "muon", **case.options})
    with pytest.raises(ValueError, match=case.message):
        changed.step()
    assert same_bits(contents(changed), before)
