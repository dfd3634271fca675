"""Whatever torch's default device and dtype are, the package makes its own tensors where and as it needs them."""

import ast
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import layca_fast
from layca_fast import FusedLayca, RotationMonitor, attach, diagnostics, layer_groups
from layca_fast.commands import verify
from layca_fast.commands.cases import EFFORTS, QUICK
from layca_fast.monitor.reading import read_curves
from layca_fast.writers import CsvWriter, JsonLinesWriter

from ..support import BACKENDS, copy_of, native_backends, parameter, same_bits

PACKAGE = Path(layca_fast.__file__).parent

#: What makes a tensor out of nothing, and so takes torch's defaults where it is not told otherwise.
FACTORIES = {function.__name__ for function in _device_constructors()} | {"tensor", "as_tensor", "from_file"}


def calls_without(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each call of a factory that names no device or no dtype."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        if isinstance(owner, ast.Name) and owner.id == "torch" and name in FACTORIES:
            given = {keyword.arg for keyword in node.keywords}
            if not given >= {"device", "dtype"}:
                yield node.lineno, name


def test_every_tensor_is_made_with_its_device_and_dtype() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: torch.{name} needs device= and dtype="
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, name in calls_without(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
    assert list(calls_without("torch.zeros(3, device='cpu')\ntorch.zeros(1, device=d, dtype=e)\n")) == [(1, "zeros")]


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


class Setting:
    """A model and a batch of the usual device and dtype: what a public thing gets."""

    def __init__(self, folder: Path) -> None:
        self.model, self.inputs, self.folder = network(), torch.randn(8, 6), folder

    def loss(self, inputs: Tensor | None = None) -> Tensor:
        return self.model(self.inputs if inputs is None else inputs).square().mean()

    def train(self, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[Any]:
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return copy_of([dict(self.model.state_dict()), optimizer.state_dict()["state"]])


def fused(setting: Setting, **options: Any) -> list[Any]:
    optimizer = FusedLayca(layer_groups(setting.model, alpha=0.1), **options)
    trained = setting.train(optimizer)
    stats = [copy_of(list(vars(each).values())) for each in optimizer.rotation_stats().values()]
    resumed = FusedLayca(layer_groups(setting.model, alpha=0.1), **options)
    resumed.load_state_dict(optimizer.state_dict())
    return [trained, stats, setting.train(resumed)]


def halves(setting: Setting) -> list[Any]:
    setting.model.bfloat16()
    setting.inputs = setting.inputs.bfloat16()
    return fused(setting, base="adam")


def in_backward(setting: Setting) -> list[Any]:
    optimizer = FusedLayca(setting.model.parameters(), 0.1, momentum=0.9)
    optimizer.step_in_backward()
    return setting.train(optimizer)


def scaled(setting: Setting) -> list[Any]:
    optimizer = FusedLayca(setting.model.parameters(), 0.1, momentum=0.9, unscale_in_step=True, capturable=True)
    optimizer.grad_scale, optimizer.found_inf = torch.full_like(setting.loss(), 4.0), torch.zeros_like(setting.loss())
    trained = setting.train(optimizer)
    optimizer.sync_hyperparameters()
    return trained


def attached(setting: Setting) -> list[Any]:
    optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.1, foreach=False)
    attach(optimizer)
    return setting.train(optimizer)


def monitored(setting: Setting, **options: Any) -> list[Any]:
    monitor = RotationMonitor(setting.model, sketch_size=7, **options)
    optimizer = FusedLayca(setting.model.parameters(), 0.1)
    with monitor.attach(optimizer):
        setting.train(optimizer)
    resumed = RotationMonitor(setting.model, sketch_size=7, **options)
    resumed.load_state_dict(monitor.state_dict())
    resumed.record()
    found = []
    for name, writer in {"run.csv": CsvWriter, "run.jsonl": JsonLinesWriter}.items():
        writer(setting.folder / name).write(resumed)
        found.append(read_curves(setting.folder / name))
    found[0].plot(setting.folder / "run.png")
    return [list(vars(each.after(0)).values()) for each in [*found, resumed.curves]]


def diagnosed(setting: Setting) -> list[Any]:
    before = diagnostics.snapshot(setting.model)
    with diagnostics.LayerConditioning(setting.model) as conditions:
        setting.loss().backward()
        (condition,) = (each["0"] for each in conditions.records.values())
    with diagnostics.IterativeRefinement(setting.model, ["0"], returns="branch") as refinements:
        setting.loss().backward()
        (refinement,) = (each["0"] for each in refinements.records.values())
    ratios = diagnostics.norm_propagation(setting.model, setting.inputs, lambda out: out.square().mean())
    noise = diagnostics.gradient_covariance(setting.model, setting.loss, [setting.inputs, 2 * setting.inputs])
    rates = diagnostics.convergence_rates({0: before, 1: {name: each + 1 for name, each in before.items()}}, before)
    found = [condition.inputs, condition.gradients, refinement, *ratios.values(), noise]
    return [*(list(vars(each).values()) for each in found), rates]


def broken_spectrum(setting: Setting) -> list[Any]:
    setting.inputs[0] = math.nan
    with diagnostics.LayerConditioning(setting.model) as conditions:
        setting.loss().backward()
        (record,) = conditions.records.values()
    return list(vars(record["0"].inputs).values())


def verified(setting: Setting) -> list[Any]:
    case = next(case for case in verify.cases(EFFORTS[QUICK]["here"]) if case.dtype == torch.float32)
    return [str(verify.compare(case, "torch", torch.device("cpu")))]


THINGS: dict[str, Callable[[Setting], list[Any]]] = {
    **{
        f"FusedLayca, {base}, {backend}": lambda setting, base=base, backend=backend: fused(
            setting, base=base, backend=backend
        )
        for base in ("sgd", "sgd_amom", "rmsprop", "adagrad", "adam", "lion")
        for backend in BACKENDS
        if backend != "triton" or base == "adam"
    },
    "16-bit parameters": halves,
    "step_in_backward": in_backward,
    "unscale_in_step and capturable": scaled,
    "attach": attached,
    **{
        f"RotationMonitor, {keep}": lambda setting, keep=keep: monitored(
            setting, keep=keep, per_step=keep != "bfloat16"
        )
        for keep in ("device", "cpu", "bfloat16", "sketch")
    },
    "diagnostics": diagnosed,
    "a spectrum that is not finite": broken_spectrum,
    "verify": verified,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS.keys())
def test_foreign_defaults_change_no_bit(
    thing: Callable[[Setting], list[Any]], dtype: torch.dtype, tmp_path: Path, seed: int
) -> None:
    """ "meta" computes nothing, and refuses what lies elsewhere: a tensor that is made there by mistake shows."""
    setting = Setting(tmp_path)
    twin = copy.deepcopy(setting)
    expected = thing(setting)
    with defaults("meta", dtype):
        found = thing(twin)
    # NaN has a sign and a payload.
    assert same_bits(found, expected) or str(found) == str(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@native_backends
def test_a_plain_number_of_steps_stays_what_it_is(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Older versions of torch saved one; as a float16 number 70,001 steps would be infinitely many."""
    param = parameter(3, 4, backend=backend)
    optimizer = FusedLayca([param], 0.1, base="adam", backend=backend)
    param.grad = torch.randn_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 70_001
    with defaults("cpu", dtype):
        optimizer.load_state_dict(saved)
        optimizer.step()
    step = optimizer.state[param]["step"]
    assert (step.dtype, step.item()) == (torch.float32, 70_002)
