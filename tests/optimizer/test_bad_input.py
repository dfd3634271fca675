"""Weights, state and checkpoints that FusedLayca refuses: by name, with the way out, and with nothing modified."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca

from ..support import (
    contents,
    copy_of,
    every_backend,
    native_backends,
    norm_of,
    parameter,
    params_of,
    random_gradients,
    running,
    same_bits,
    train,
)

ids = {"ids": lambda case: case.name}


@dataclass(frozen=True)
class BadStart:
    """Weights with which a first step cannot begin."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    zero: Callable[[dict[str, Tensor]], Any]
    options: Mapping[str, Any]
    message: str


ZERO_WAY_OUT = r"no direction to turn.*rotate=False"


BAD_STARTS = (
    BadStart(
        "a zero matrix", {"up": (4, 3), "down": (3, 4)}, lambda p: p["down"].zero_(), {}, rf"'down'.*{ZERO_WAY_OUT}"
    ),
    BadStart(
        "two zero matrices: both are named",
        {"lora_b": (4, 3), "good": (3, 3), "residual": (2, 2)},
        lambda p: (p["lora_b"].zero_(), p["residual"].mul_(0.0)),
        {"momentum": 0.9},
        rf"'lora_b' \(shape \(4, 3\).*'residual' \(shape \(2, 2\).*{ZERO_WAY_OUT}",
    ),
    BadStart("a zero chunk", {"w": (6, 4)}, lambda p: p["w"][2:4].zero_(), {"chunks": 3}, rf"'w'.*{ZERO_WAY_OUT}"),
    BadStart("a zero row", {"w": (6, 4)}, lambda p: p["w"][5].zero_(), {"chunks": "all"}, rf"'w'.*{ZERO_WAY_OUT}"),
    BadStart(
        "a zero bias that is to rotate",
        {"b": (6,)},
        lambda p: p["b"].zero_(),
        {"rotate": True},
        rf"'b'.*{ZERO_WAY_OUT}",
    ),
    BadStart(
        "chunks that do not divide",
        {"qkv": (7, 4)},
        lambda p: None,
        {"chunks": 3},
        r"chunks=3 does not divide the first dimension of parameter 'qkv' \(shape \(7, 4\).*divisor of 7.*chunks=1",
    ),
    BadStart(
        "sizes that do not add up",
        {"qkv": (7, 4)},
        lambda p: None,
        {"chunks": (4, 2)},
        r"chunks=\(4, 2\) adds up to 6, and the first dimension of parameter 'qkv' \(shape \(7, 4\).*is 7.*chunks=1",
    ),
    BadStart(
        "columns that do not divide",
        {"qkv": (4, 7)},
        lambda p: None,
        {"chunks": ("columns", 3)},
        r"chunks=\('columns', 3\) does not divide the second dimension of parameter 'qkv'.*divisor of 7",
    ),
    BadStart(
        "matrices that cannot be halved",
        {"moe": (2, 5, 4)},
        lambda p: None,
        {"chunks": ("matrices", 2)},
        r"does not divide the second dimension of parameter 'moe'.*divisor of 5",
    ),
    BadStart(
        "columns of a vector",
        {"v": (5,)},
        lambda p: None,
        {"chunks": "columns", "rotate": True},
        r"chunks='columns' cuts columns, and parameter 'v' .*has none.*chunks=1",
    ),
    BadStart(
        "a zero part", {"w": (6, 4)}, lambda p: p["w"][1:3].zero_(), {"chunks": (1, 2, 3)}, rf"'w'.*{ZERO_WAY_OUT}"
    ),
    BadStart(
        "a zero expert", {"w": (2, 3, 4)}, lambda p: p["w"][1].zero_(), {"chunks": "matrices"}, rf"'w'.*{ZERO_WAY_OUT}"
    ),
    BadStart(
        "chunks of a scalar", {"s": ()}, lambda p: None, {"chunks": 2, "rotate": True}, r"chunks=2 .*'s'.*chunks=1"
    ),
)


@pytest.mark.parametrize("case", BAD_STARTS, **ids)
@native_backends
def test_a_first_step_that_cannot_begin(backend: str, case: BadStart, seed: int) -> None:
    named = {name: parameter(*shape, backend=backend) for name, shape in case.shapes.items()}
    with torch.no_grad():
        case.zero(named)
    optimizer = FusedLayca(named.items(), 0.1, backend=backend, **case.options)
    for param in named.values():
        param.grad = torch.randn_like(param)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=case.message):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    assert len(optimizer.state) == 0
    optimizer.param_groups[0].update(rotate=False, chunks=1)
    optimizer.step()
    assert not any(same_bits(old[0], new[0]) for old, new in zip(before, contents(optimizer), strict=True))


def test_without_names_the_message_counts(seed: int) -> None:
    params = [parameter(3, 4), parameter(2, 2), Parameter(torch.zeros(5, 3))]
    optimizer = FusedLayca([{"params": params[:1]}, {"params": params[1:]}], 0.1, backend="torch")
    params[2].grad = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"parameter 1 of group 1 \(shape \(5, 3\), torch\.float32\)"):
        optimizer.step()


def test_zero_weights_that_do_not_rotate_or_have_no_gradient_are_welcome(seed: int) -> None:
    frozen, bias = Parameter(torch.zeros(3, 4)), Parameter(torch.zeros(5))
    optimizer = FusedLayca([frozen, bias, parameter(2, 2)], 0.1, momentum=0.9, backend="torch")
    train(optimizer, [[None, *row] for row in random_gradients([bias, params_of(optimizer)[2]], 2)])
    assert bias.any()


@dataclass(frozen=True)
class BadState:
    """A state_dict made by ``saved`` that an optimizer made by ``running`` cannot take."""

    name: str
    saved: Callable[[], FusedLayca]
    message: str


def trained(shapes: Mapping[str, tuple[int, ...]], **options: Any) -> FusedLayca:
    named = [(name, parameter(*shape)) for name, shape in shapes.items()]
    optimizer = FusedLayca(named, 0.3, backend="torch", **{"momentum": 0.5, **options})
    train(optimizer, random_gradients(params_of(optimizer), 1))
    return optimizer


def with_radius(shape: tuple[int, ...]) -> FusedLayca:
    optimizer = trained({"matrix": (4, 3), "bias": (5,)})
    optimizer.state[params_of(optimizer)[0]]["radius"] = torch.ones(shape, dtype=torch.float64)
    return optimizer


MATRIX = r"parameter 'matrix' \(shape \(4, 3\)"


BAD_STATES = (
    BadState(
        "another shape",
        lambda: trained({"matrix": (3, 4), "bias": (5,)}),
        rf"state_dict: 'momentum_buffer' has shape \(3, 4\), but {MATRIX}.* needs \(4, 3\): load it into",
    ),
    BadState(
        "another shape of the second parameter",
        lambda: trained({"matrix": (4, 3), "bias": (6,)}),
        r"'momentum_buffer' has shape \(6,\), but parameter 'bias'.* needs \(5,\)",
    ),
    BadState(
        "a scalar's buffer",
        lambda: trained({"matrix": (), "bias": (5,)}, rotate=True),
        rf"'momentum_buffer' has shape \(\), but {MATRIX}",
    ),
    BadState("a radius of other layers", lambda: with_radius((2,)), rf"'radius' has shape \(2,\), but {MATRIX}"),
    BadState("a radius of no layers", lambda: with_radius(()), rf"'radius' has shape \(\), but {MATRIX}"),
    BadState("fewer parameters", lambda: trained({"matrix": (4, 3)}), r"groups hold \[1\] parameters.*\[2\]"),
    BadState("more parameters", lambda: trained({"matrix": (4, 3), "bias": (5,), "third": (2,)}), r"hold \[3\].*\[2\]"),
)


@pytest.mark.parametrize("case", BAD_STATES, **ids)
def test_a_state_dict_that_does_not_fit(case: BadState, seed: int) -> None:
    optimizer = running()
    before, groups = contents(optimizer), copy_of(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=case.message):
        optimizer.load_state_dict(case.saved().state_dict())
    assert same_bits(contents(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.step()


def test_a_state_dict_of_a_base_that_is_not_known_here(seed: int) -> None:
    """Written by a later version, say: found before anything is loaded."""
    optimizer = running()
    before, groups = contents(optimizer), copy_of(optimizer.state_dict()["param_groups"])
    saved = running().state_dict()
    saved["param_groups"][0]["base"] = "newton"
    with pytest.raises(ValueError, match=r"base='newton' is unknown.*'sgd', 'sgd_amom'"):
        optimizer.load_state_dict(saved)
    assert same_bits(contents(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.step()


SURGERY = {
    "other weights": lambda param: torch.randn(5, 3).to(param.device),
    "rows cut off: the same address and strides as before": lambda param: param.data[:2],
}


@pytest.mark.parametrize("operate", SURGERY.values(), ids=SURGERY.keys())
@every_backend
def test_a_buffer_that_no_longer_fits_after_surgery_says_what_to_clear(
    backend: str, operate: Callable[[Tensor], Tensor], seed: int
) -> None:
    optimizer = running(backend=backend)
    matrix = params_of(optimizer)[0]
    matrix.grad = None
    matrix.data = operate(matrix)
    matrix.grad = torch.randn_like(matrix)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"'momentum_buffer' of parameter 'matrix'.*\(4, 3\).*del optimizer\.state"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    del optimizer.state[matrix]
    optimizer.step()
    assert optimizer.state[matrix]["momentum_buffer"].shape == matrix.shape


@every_backend
def test_rows_cut_off_without_momentum_leave_a_smaller_layer(backend: str, seed: int) -> None:
    """Nothing is left over from the larger one: the weights beyond must not be touched."""
    optimizer = running(backend=backend, momentum=0.0, radius="current")
    matrix = params_of(optimizer)[0]
    whole, matrix.grad = matrix.data, None
    matrix.data = whole[:2]
    beyond, norm = copy_of(whole[2:]), norm_of(matrix)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    assert same_bits(copy_of(whole[2:]), beyond)
    assert norm_of(matrix) == pytest.approx(norm, rel=1e-6)
