"""The way out that each refusal of a parameter names works when it is followed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD

from layca_fast import FusedLayca, attach

from ..support import norm_of
from .test_bad_tensors import BAD_PARAMETERS, BadTensor


def as_written(bad: Tensor, text: str) -> Parameter:
    """What the advice says in code, run."""
    return eval(text, {"torch": torch, "parameter": bad})


def trained(param: Parameter, forward: Callable[[Tensor], Tensor], make: Any) -> None:
    """Two steps on the gradient of a loss: the tensor turns, and keeps its norm."""
    optimizer, norm, before = make([param]), norm_of(param), param.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        value = forward(param)
        (value * torch.randn(value.shape).to(value.dtype)).abs().float().square().sum().backward()
        optimizer.step()
    assert not torch.equal(before, param)
    assert norm_of(param) == pytest.approx(norm, rel=1e-5)


def attached(params: Any) -> Any:
    made = SGD(params, lr=0.1)
    attach(made)
    return made


#: Of a refused parameter and the message: the parameter to use instead, and what the forward pass makes of it.
FOLLOWED: dict[str, Callable[[Any, str], tuple[Parameter, Callable[[Tensor], Tensor]]]] = {
    "sparse": lambda bad, text: (as_written(bad, text), lambda param: param),
    "mkldnn": lambda bad, text: (as_written(bad, text), lambda param: param),
    "complex": lambda bad, text: (as_written(bad, text), torch.view_as_complex),
    "integer": lambda bad, text: (as_written(bad, text), lambda param: param),
    "boolean": lambda bad, text: (as_written(bad, text), lambda param: param),
    "quantized": lambda bad, text: (Parameter(bad.dequantize()), lambda param: param),
    "of 8 bits": lambda bad, text: (Parameter(bad.float()), lambda param: param.to(bad.dtype).float()),
    "wrapper subclass": lambda bad, text: (Parameter(bad.inner), lambda param: param),
    "expanded": lambda bad, text: (as_written(bad, text), lambda param: param),
    "overlapping windows": lambda bad, text: (as_written(bad, text), lambda param: param),
}


@pytest.mark.parametrize("make", [lambda params: FusedLayca(params, 0.1), attached], ids=["FusedLayca", "attach"])
@pytest.mark.parametrize("case", [case for case in BAD_PARAMETERS if case.name in FOLLOWED], ids=lambda case: case.name)
def test_the_advice_works(case: BadTensor, make: Any, seed: int) -> None:
    bad = case.make()
    with pytest.raises(case.error) as raised:
        FusedLayca([bad], 0.1)
    code = re.search(r"torch\.nn\.Parameter\(.*\)(?=, |$)", str(raised.value).partition(" in the forward")[0])
    text = "" if code is None else code[0].partition("), ")[0]
    if text:
        text += ")" * (text.count("(") - text.count(")"))
    param, forward = FOLLOWED[case.name](bad, text)
    trained(param, forward, make)


def test_the_advice_is_followed_for_every_refusal() -> None:
    elsewhere = {"meta", "lazy"}
    assert {case.name for case in BAD_PARAMETERS} == FOLLOWED.keys() | elsewhere


def test_a_module_on_the_meta_device(seed: int) -> None:
    module = nn.Linear(4, 3, device="meta")
    with pytest.raises(ValueError, match=r"module\.to_empty\(device="):
        FusedLayca(module.parameters(), 0.1)
    module.to_empty(device="cpu")
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    trained(module.weight, lambda param: param, lambda params: FusedLayca(module.parameters(), 0.1))


def test_a_lazy_module(seed: int) -> None:
    module = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="run one forward pass"):
        FusedLayca(module.parameters(), 0.1)
    module(torch.randn(2, 4))
    trained(module.weight, lambda param: param, lambda params: FusedLayca(module.parameters(), 0.1))


def test_the_tensor_before_the_expansion(seed: int) -> None:
    """The other way out for expanded tensors."""
    trained(Parameter(torch.randn(3, 1)), lambda param: param.expand(3, 4), lambda p: FusedLayca(p, 0.1, rotate=True))


def test_a_negated_view(seed: int) -> None:
    bad = torch.randn(3, 4, dtype=torch.cfloat).conj().imag
    with pytest.raises(ValueError, match=r"lazily negated.*torch\.nn\.Parameter\(parameter\.detach\(\)\.resolve_neg"):
        FusedLayca([bad], 0.1)
    fixed = as_written(bad, "torch.nn.Parameter(parameter.detach().resolve_neg())")
    # The imaginary part of a complex tensor has gaps in memory; resolve_neg has filled new memory.
    trained(fixed, lambda param: param, lambda params: FusedLayca(params, 0.1))
