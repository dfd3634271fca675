"""Training steps under torch.compile: the optimizer's part is left out of it, and compiles nothing again."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from layca_fast import FusedLayca, layer_groups
from layca_fast.state.compensation import HALVES

from ..support import contents, native_backends, same_bits

pytestmark = [
    # The compiler's own: what it looks at, and what it imports.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

Step = Callable[[nn.Module, FusedLayca, Tensor], Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def whole_step(model: nn.Module, optimizer: FusedLayca, inputs: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(inputs).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def compiled_model_only(compiler: str) -> Step:
    compiled: dict[int, nn.Module] = {}

    def step(model: nn.Module, optimizer: FusedLayca, inputs: Tensor) -> Tensor:
        return whole_step(compiled.setdefault(id(model), torch.compile(model, backend=compiler)), optimizer, inputs)

    return step


def compiled_optimizer_only(compiler: str) -> Step:
    compiled: dict[int, Callable[[], Any]] = {}

    def step(model: nn.Module, optimizer: FusedLayca, inputs: Tensor) -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        compiled.setdefault(id(optimizer), torch.compile(optimizer.step, backend=compiler))()

    return step


STEPS = {
    "the whole step": lambda compiler: torch.compile(whole_step, backend=compiler),
    "the model": compiled_model_only,
    "optimizer.step": compiled_optimizer_only,
}


def pair(
    backend: str, as_tensor: bool, dtype: torch.dtype = torch.float32, base: str = "adam"
) -> list[tuple[nn.Module, FusedLayca]]:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    models = (model, copy.deepcopy(model))
    rates = [torch.tensor(0.1) if as_tensor else 0.1 for _ in models]
    if base == "muon":
        groups = [
            layer_groups(each, lr, base=base, others_base="adam", others_lr=lr)
            for each, lr in zip(models, rates, strict=True)
        ]
        return [(each, FusedLayca(of, backend=backend)) for each, of in zip(models, groups, strict=True)]
    return [
        (each, FusedLayca(each.parameters(), lr, base=base, backend=backend))
        for each, lr in zip(models, rates, strict=True)
    ]


def set_rate(optimizer: FusedLayca, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        group.update({"betas": (0.9 - rate, 0.99)} if "betas" in group else {"momentum": 0.9 - rate})


@pytest.mark.parametrize("as_tensor", [False, True], ids=["lr float", "lr tensor"])
@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("base", ["adam", "muon"])
@native_backends
def test_a_new_lr_compiles_nothing_again(
    backend: str, base: str, make: Callable[[str], Step], as_tensor: bool, seed: int
) -> None:
    (model, optimizer), (twin, plain) = pair(backend, as_tensor, base=base)
    compiled = make("eager")
    graphs = []
    for number in range(6):
        inputs = torch.randn(10, 8)
        for each in (optimizer, plain):
            set_rate(each, 0.1 / (1 + number))
        compiled(model, optimizer, inputs)
        whole_step(twin, plain, inputs)
        graphs.append(dict(counters["frames"]))
        assert same_bits(contents(optimizer), contents(plain))
    assert graphs[1:] == [graphs[0]] * 5
    assert graphs[0].get("ok", 0) > 0 or make is compiled_optimizer_only


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_parameters(dtype: torch.dtype, seed: int) -> None:
    (model, optimizer), (twin, plain) = pair("cpu", False, dtype)
    compiled = torch.compile(whole_step, backend="eager")
    for number in range(3):
        inputs = torch.randn(10, 8).to(dtype)
        for each in (optimizer, plain):
            set_rate(each, 0.1 / (1 + number))
        compiled(model, optimizer, inputs)
        whole_step(twin, plain, inputs)
        assert same_bits(contents(optimizer), contents(plain))
    assert all("remainder" in state for state in optimizer.state.values())


@pytest.mark.exhaustive
def test_with_the_default_compiler(seed: int) -> None:
    """Whose kernels round otherwise: the run must only stay close."""
    (model, optimizer), (twin, plain) = pair("auto", False)
    compiled = torch.compile(whole_step)
    for number in range(4):
        inputs = torch.randn(10, 8)
        for each in (optimizer, plain):
            set_rate(each, 0.1 / (1 + number))
        loss, expected = compiled(model, optimizer, inputs), whole_step(twin, plain, inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0
