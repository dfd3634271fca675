"""docs/faq.md: every message that it explains is what the code says today."""

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from layca_fast import FusedLayca, RotationMonitor, attach, layer_groups
from layca_fast.backends import _tell_of_fallback, choose, load
from layca_fast.diagnostics import LayerConditioning
from layca_fast.monitor.reading import read_curves

FAQ = Path(__file__).parents[2] / "docs" / "faq.md"

ENTRY = re.compile(r"^## (.+?)\n+```text\n(.+?)```", re.MULTILINE | re.DOTALL)


def entries() -> dict[str, str]:
    """Heading and message of every entry; … stands for what differs from machine to machine."""
    return {heading: " ".join(message.split()) for heading, message in ENTRY.findall(FAQ.read_text(encoding="utf-8"))}


def step(*params: Tensor, **options: Any) -> FusedLayca:
    made = FusedLayca(params, **{"lr": 0.1, "backend": "torch"} | options)
    for param in params:
        param.grad = torch.ones_like(param)
    made.step()
    return made


class Named(nn.Module):
    """One layer of any kind, under a name."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)


class Hiding(Named):
    """Overrides named_parameters, and forgets a bias."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return (pair for pair in super().named_parameters(*args, **kwargs) if not pair[0].endswith("bias"))


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.randn(shape or (3, 2)).to(dtype))


def zero_layer() -> None:
    made = FusedLayca([("adapter.lora_B", Parameter(torch.zeros(4, 6)))], lr=0.1)
    made.param_groups[0]["params"][0].grad = torch.ones(4, 6)
    made.step()


def tied() -> None:
    weight = matrix()
    FusedLayca([("embedding.weight", weight), ("head.weight", weight)])


def shared_memory() -> None:
    embedding, head = matrix(), matrix()
    head.data = embedding.data
    made = FusedLayca([("embedding.weight", embedding), ("head.weight", head)])
    embedding.grad = head.grad = torch.ones_like(head)
    made.step()


def other_groups() -> None:
    first, second = matrix(), matrix()
    saved = FusedLayca([{"params": [first]}, {"params": [second], "rotate": False}]).state_dict()
    FusedLayca([first, second]).load_state_dict(saved)


def sparse() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    FusedLayca(embedding.parameters(), lr=0.1).step()


def changed_chunks() -> None:
    made = step(matrix(4, 2))
    made.param_groups[0]["chunks"] = 2
    made.step()


def other_chunks() -> None:
    saved = step(matrix(4, 2), chunks=(1, 3)).state_dict()
    FusedLayca([matrix(4, 2)], chunks=2).load_state_dict(saved)


def foreign_checkpoint() -> None:
    weight = matrix()
    weight.grad = torch.ones_like(weight)
    old = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    old.step()
    FusedLayca([weight], momentum=0.9).load_state_dict(old.state_dict())


def attach_again() -> None:
    plain = torch.optim.SGD([matrix()], lr=0.1)
    attach(plain)
    attach(plain)


def scheduled() -> None:
    made = FusedLayca([matrix()], lr=0.1)
    made.param_groups[0]["lr"] = -0.5
    made.step()


def damaged() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.csv"
        path.write_text("step,layer,rotation,angle,norm\n1,w,0.5\n", encoding="utf-8")
        read_curves(path)


def second_backward() -> None:
    weight = matrix()
    made = FusedLayca([weight], lr=0.1)
    with made.step_in_backward():
        weight.sum().backward()
        weight.sum().backward()


class Mixer(nn.Module):
    """A type that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = matrix(3, 4)


class Model(Named):
    """What the user calls their own."""


def nothing_rotates() -> None:
    # Ignored elsewhere in the tests.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedLayca([matrix(3)])


def slow_fallback() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(load("cpu")), "missing", lambda self: "the native module is not there")
        patch.setattr(type(load("triton")), "missing", lambda self: "not here")
        warnings.simplefilter("error")
        # Told once in a process, and perhaps by another test.
        _tell_of_fallback.cache_clear()
        choose("auto", torch.device("cpu"))


def nameless_checkpoint() -> None:
    model = nn.Linear(2, 3)
    old = torch.optim.AdamW(model.parameters())
    FusedLayca(layer_groups(model), base="adam").load_state_dict(old.state_dict())


def with_gaps() -> Parameter:
    return Parameter(torch.randn(4, 6)[:, :3])


class Lookahead(torch.optim.SGD):
    """A wrapper that has not called torch's constructor."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Outer(torch.optim.Optimizer):
    """Has param groups, and leaves the step to another that has the same parameters."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, dict(inner.defaults))
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def outer() -> None:
    weight = matrix(dtype=torch.bfloat16)
    made = Outer(torch.optim.SGD([weight], lr=0.1))
    made.inner.param_groups = [dict(group) for group in made.inner.param_groups]
    attach(made)
    weight.grad = torch.ones_like(weight)
    made.step()


def step_inside_fake_mode() -> None:
    weight = matrix()
    made = step(weight, backend="cpu")
    weight.grad = torch.ones_like(weight)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made.step()


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.odd = matrix(3, 3, dtype=torch.complex64)


def damaged_checkpoint() -> None:
    saved = step(matrix(), base="adam").state_dict()
    saved["state"][0]["exp_avg_sq"][0, 0] = float("inf")
    FusedLayca([matrix()], base="adam").load_state_dict(saved)


#: What triggers the message of each entry, by its heading.
TRIGGERS: dict[str, Callable[[], object]] = {
    "A layer starts at zero": zero_layer,
    "Weight decay does nothing": lambda: step(matrix(), weight_decay=0.01),
    "No layer rotates": lambda: layer_groups(Model("mixer", Mixer())),
    "Nothing rotates": nothing_rotates,
    "An embedding or a head rotates": lambda: FusedLayca([matrix(32000, 4)]),
    "The slow fallback runs": slow_fallback,
    "The learning rate is refused": lambda: FusedLayca([matrix()], lr=-0.1),
    "An option is refused": lambda: FusedLayca([matrix()], betas=(0.9, 0.99)),
    "A group has an option of another base": lambda: FusedLayca([{"params": [matrix()], "betas": (0.9, 0.99)}]),
    "A scheduler sets a number out of range": scheduled,
    "A file of rotation curves is damaged": damaged,
    "The same tensor twice": tied,
    "Tensors that share memory": shared_memory,
    "A backend cannot run": lambda: step(matrix(), backend="cuda"),
    "chunks does not fit": lambda: step(matrix(4, 2), chunks=3),
    "A checkpoint was made under other chunks": other_chunks,
    "chunks was changed in the middle of a run": changed_chunks,
    "Sparse gradients": sparse,
    "Elements that share memory": lambda: FusedLayca([torch.randn(3, 1).expand(3, 4)]),
    "A complex parameter": lambda: FusedLayca([matrix(3, 4, dtype=torch.complex64)]),
    "A parameter with gaps in memory": lambda: step(with_gaps(), backend="cpu"),
    "A wrapper without step hooks": lambda: attach(Lookahead(torch.optim.SGD([matrix()], lr=0.1))),
    "A step inside FakeTensorMode": step_inside_fake_mode,
    "A RotationMonitor finds no layer": lambda: RotationMonitor(nn.Embedding(4, 3)),
    "A RotationMonitor leaves tensors out": lambda: RotationMonitor(Odd()),
    "A lazy module has seen no input": lambda: layer_groups(nn.LazyLinear(2)),
    "alpha is out of range": lambda: layer_groups(nn.Linear(2, 2), alpha=1.0),
    "A parameter lands in no group": lambda: layer_groups(Hiding("layer", nn.Linear(2, 2))),
    "A checkpoint of another model": lambda: FusedLayca([matrix(5, 2)], momentum=0.9).load_state_dict(
        step(matrix(), momentum=0.9).state_dict()
    ),
    "A checkpoint with other groups": other_groups,
    "A checkpoint of another optimizer": foreign_checkpoint,
    "A checkpoint of another optimizer without names": nameless_checkpoint,
    "A checkpoint that is damaged": damaged_checkpoint,
    "Rotations below the precision of the type": lambda: step(matrix(dtype=torch.bfloat16), lr=1e-3, compensate=False),
    "attach and an optimizer that keeps its parameters elsewhere": outer,
    "attach, a second time": attach_again,
    "attach and LBFGS": lambda: attach(torch.optim.LBFGS([matrix()])),
    "GradScaler's option in a group": lambda: FusedLayca([{"params": [matrix()], "unscale_in_step": True}]),
    "A second backward pass under step_in_backward": second_backward,
    "GradScaler under step_in_backward": lambda: FusedLayca([matrix()], unscale_in_step=True).step_in_backward(),
    "Angles between records from a bfloat16 copy": lambda: RotationMonitor(
        nn.Linear(2, 2), per_step=True, keep="bfloat16"
    ),
    "Conditioning of grouped convolutions": lambda: LayerConditioning(Named("depthwise", nn.Conv2d(4, 4, 3, groups=4))),
}


def test_every_entry_has_its_trigger() -> None:
    text = FAQ.read_text(encoding="utf-8")
    assert list(entries()) == list(TRIGGERS)
    assert text.count("```text") == len(TRIGGERS)


@pytest.mark.parametrize("heading", TRIGGERS)
def test_messages_are_those_of_the_code(heading: str, seed: int) -> None:
    """Warnings are errors in the tests, so both are raised."""
    with pytest.raises((TypeError, ValueError, RuntimeError, UserWarning)) as raised:
        TRIGGERS[heading]()
    said = f"{type(raised.value).__name__}: {raised.value}"
    pattern = ".*".join(re.escape(part) for part in entries()[heading].split("…"))
    assert re.fullmatch(pattern, said), said
