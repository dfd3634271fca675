"""A refused call leaves nothing behind, at any public entry point: no hook, no state, no group, no attribute."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Optimizer

import layca_fast
from layca_fast import FusedLayca, RotationMonitor, attach, detach, diagnostics, layer_groups

from .support import copy_of, same_bits


class World:
    """A model, a FusedLayca and an optimizer of torch's on it, all in the middle of a run."""

    def __init__(self, steps: int) -> None:
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.ours = FusedLayca(self.model.named_parameters(), 0.1, momentum=0.9)
        self.theirs = SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.attached = SGD([("lone", Parameter(torch.randn(4, 3)))], lr=0.1, momentum=0.9)
        attach(self.attached)
        self.monitor = RotationMonitor(self.model)
        self.inputs = torch.randn(5, 4)
        for _ in range(steps):
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()
        self.backward()

    def backward(self) -> None:
        self.model(self.inputs).square().sum().backward()
        self.lone.grad = torch.randn(4, 3)

    @property
    def lone(self) -> Any:
        return self.attached.param_groups[0]["params"][0]

    @property
    def optimizers(self) -> list[Optimizer]:
        return [self.ours, self.theirs, self.attached]

    def seen(self) -> dict[str, Any]:
        """All that a refused call must not change, tensors as copies."""
        found: dict[str, Any] = {}
        for name, module in self.model.named_modules():
            found[f"module {name}"] = _shape_of(vars(module))
        for index, param in enumerate([*self.model.parameters(), self.lone]):
            hooks = {"after": param._post_accumulate_grad_hooks, "before": param._backward_hooks}
            found[f"parameter {index}"] = [copy_of([param, param.grad]), _shape_of(hooks)]
        for index, buffer in enumerate(self.model.buffers()):
            found[f"buffer {index}"] = copy_of(buffer)
        for index, optimizer in enumerate(self.optimizers):
            own = {name: value for name, value in vars(optimizer).items() if name not in WORK}
            found[f"optimizer {index}"] = _shape_of(own)
            found[f"groups {index}"] = [
                {key: [id(each) for each in value] if key == "params" else repr(value) for key, value in group.items()}
                for group in optimizer.param_groups
            ]
            found[f"state {index}"] = [[id(param), copy_of(dict(each))] for param, each in optimizer.state.items()]
        found["monitor"] = copy_of(self.monitor.state_dict())
        return found


#: What FusedLayca works with, whose contents are no news to the user.
WORK = ("_plan", "_stale", "_warned", "_warned_of_types", "param_groups", "state")


def _shape_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Which attributes there are, and of dicts (those of hooks are) which keys; other values by identity."""
    return {
        name: list(value) if isinstance(value, dict) else value if isinstance(value, bool) else id(value)
        for name, value in attributes.items()
    }


class Skips(SGD):
    """An optimizer that wraps another, and has not called torch's constructor."""

    def __init__(self, inner: Optimizer, **more: Any) -> None:
        self.optimizer = inner
        self.param_groups, self.state = inner.param_groups, inner.state
        vars(self).update(more)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def wrapper(world: World, *hooks: str, kind: Any = dict) -> Optimizer:
    return Skips(world.theirs, **{name: kind() for name in hooks})


STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def with_option(optimizer: Optimizer, name: str, value: Any) -> None:
    """A step under an option that is out of range."""
    group = optimizer.param_groups[0]
    had, old = name in group, group.get(name)
    group[name] = value
    try:
        optimizer.step()
    finally:
        if had:
            group[name] = old
        else:
            del group[name]


def with_gradient(world: World, optimizer: Optimizer, param: Tensor) -> None:
    """A step on a gradient that is sparse, as the last of several."""
    kept = param.grad
    param.grad = torch.randn(param.shape).to_sparse()
    try:
        optimizer.step()
    finally:
        param.grad = kept


def saved(optimizer: Optimizer, spoil: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    return state


def wrong_shapes(state: dict[str, Any]) -> None:
    for each in state["state"].values():
        each["momentum_buffer"] = torch.zeros(17)
    state["state"].setdefault(0, {"momentum_buffer": torch.zeros(17)})


Call = Callable[[World], object]

#: By the public name that is called, then what is wrong.
CALLS: dict[str, Call] = {
    "FusedLayca: an option": lambda w: FusedLayca(w.model.parameters(), 0.1, betas=(0.9, 0.9)),
    "FusedLayca: a rate": lambda w: FusedLayca(w.model.parameters(), -0.1),
    "FusedLayca: a second group": lambda w: FusedLayca(
        [{"params": w.model[0].parameters()}, {"params": w.model[2].parameters(), "chunks": 0}]
    ),
    "FusedLayca: a module": lambda w: FusedLayca(w.model),
    "FusedLayca.add_param_group: a parameter again": lambda w: w.ours.add_param_group({"params": w.model[0].weight}),
    "FusedLayca.add_param_group: a type": lambda w: w.ours.add_param_group(
        {"params": [("new", torch.ones(2, 2, dtype=torch.int64))]}
    ),
    "FusedLayca.add_param_group: an option": lambda w: w.ours.add_param_group(
        {"params": [("new", Parameter(torch.randn(2, 2)))], "lr": -1.0}
    ),
    "FusedLayca.add_param_group: no dict": lambda w: w.ours.add_param_group([Parameter(torch.randn(2, 2))]),
    "FusedLayca.add_param_group: a mix of names": lambda w: w.ours.add_param_group(
        {"params": [("new", Parameter(torch.randn(2, 2))), Parameter(torch.randn(2, 2))]}
    ),
    "FusedLayca.step: an option": lambda w: with_option(w.ours, "rule", "none"),
    "FusedLayca.step: a gradient": lambda w: with_gradient(w, w.ours, w.model[2].bias),
    "FusedLayca.step: a backend": lambda w: with_option(w.ours, "backend", "cuda"),
    "FusedLayca.sync_hyperparameters: a rate": lambda w: _with_rate(w.ours, w.ours.sync_hyperparameters),
    "FusedLayca.load_state_dict: groups": lambda w: w.ours.load_state_dict(
        saved(w.ours, lambda s: s["param_groups"].append({"params": [99]}))
    ),
    "FusedLayca.load_state_dict: shapes": lambda w: w.ours.load_state_dict(saved(w.ours, wrong_shapes)),
    "FusedLayca.load_state_dict: options": lambda w: w.ours.load_state_dict(
        saved(w.ours, lambda s: s["param_groups"][0].update(lr=-1.0))
    ),
    "FusedLayca.step_in_backward: GradScaler": lambda w: FusedLayca(
        w.model.parameters(), unscale_in_step=True
    ).step_in_backward(),
    "FusedLayca: a radius": lambda w: FusedLayca(w.model.parameters(), 0.1, radius=-1.0),
    "FusedLayca.step: a radius": lambda w: with_option(w.ours, "radius", 0.0),
    "FusedLayca.step: a norm to wait for": lambda w: with_option(w.ours, "joins_at", -1.0),
    "FusedLayca.check_norms: a limit": lambda w: w.ours.check_norms(above=-1.0),
    "FusedLayca.check_norms: a moment": lambda w: w.ours.check_norms(at="later"),
    "RotationMonitor: a limit of drifts": lambda w: RotationMonitor(w.ours, check_norms=-1.0),
    "layer_groups: zeros": lambda w: layer_groups(w.model, zeros="rotate-later"),
    "attach: options": lambda w: attach(w.theirs, rule="none"),
    "attach: chunks": lambda w: attach(w.theirs, chunks=7),
    "attach: no optimizer": lambda w: attach(w.model),
    "attach: twice": lambda w: attach(w.attached),
    "attach: ours": lambda w: attach(w.ours),
    "attach: LBFGS": lambda w: attach(LBFGS(w.model.parameters())),
    "attach: a complex parameter": lambda w: attach(SGD([Parameter(torch.ones(3, 2) * 1j)], lr=0.1)),
    "attach: no constructor": lambda w: attach(wrapper(w)),
    "attach: hooks of a step alone": lambda w: attach(wrapper(w, *STEP_HOOKS)),
    "attach: hooks before a step alone": lambda w: attach(wrapper(w, STEP_HOOKS[0])),
    "attach: an option set later": lambda w: with_option(w.attached, "rule", "none"),
    "detach: nothing attached": lambda w: detach(w.theirs),
    "detach: no optimizer": lambda w: detach(w.model),
    "layer_groups: alpha": lambda w: layer_groups(w.model, alpha=1.0, others="freeze"),
    "layer_groups: a type": lambda w: layer_groups(w.model, rotate=[3], others="freeze"),
    "layer_groups: others": lambda w: layer_groups(w.model, others="drop"),
    "RotationMonitor: keep": lambda w: RotationMonitor(w.model, keep="tape"),
    "RotationMonitor: layers": lambda w: RotationMonitor(w.model, layers=["none"]),
    "RotationMonitor.attach: no optimizer": lambda w: w.monitor.attach(w.model),
    "RotationMonitor.attach: a wrapper of nothing": lambda w: w.monitor.attach(_hollow()),
    "RotationMonitor.record: a step again": lambda w: w.monitor.record(0),
    "RotationMonitor.reset: a step": lambda w: w.monitor.reset(-1),
    "RotationMonitor.load_state_dict: keep": lambda w: w.monitor.load_state_dict(
        {**w.monitor.state_dict(), "keep": "cpu"}
    ),
    "diagnostics.IterativeRefinement: a block": lambda w: diagnostics.IterativeRefinement(w.model, ["none"]),
    "diagnostics.IterativeRefinement: blocks": lambda w: diagnostics.IterativeRefinement(w.model, 3),
    "diagnostics.IterativeRefinement: every": lambda w: diagnostics.IterativeRefinement(w.model, ["0"], every=0),
    "diagnostics.norm_propagation: a loss": lambda w: diagnostics.norm_propagation(w.model, w.inputs, lambda y: y.none),
    "diagnostics.norm_propagation: a layer": lambda w: diagnostics.norm_propagation(
        w.model, w.inputs, lambda y: y.sum(), layers=["1"]
    ),
    "diagnostics.norm_propagation: inputs": lambda w: diagnostics.norm_propagation(w.model, 3, lambda y: y.sum()),
    "diagnostics.gradient_covariance: a loss": lambda w: diagnostics.gradient_covariance(
        w.model, w.model, [w.inputs, w.inputs]
    ),
    "diagnostics.gradient_covariance: one batch": lambda w: diagnostics.gradient_covariance(
        w.model, lambda batch: w.model(batch).sum(), [w.inputs]
    ),
    "diagnostics.LayerConditioning: a layer": lambda w: diagnostics.LayerConditioning(w.model, ["1"]),
    "diagnostics.LayerConditioning: layers": lambda w: diagnostics.LayerConditioning(w.model, 3),
    "diagnostics.LayerConditioning: every": lambda w: diagnostics.LayerConditioning(w.model, every=0),
}


def _with_rate(optimizer: Optimizer, call: Callable[[], object]) -> None:
    optimizer.param_groups[0]["lr"] = -1.0
    try:
        call()
    finally:
        optimizer.param_groups[0]["lr"] = 0.1


def _hollow() -> Optimizer:
    return Skips.__new__(Skips)


@pytest.mark.parametrize("steps", [0, 2], ids=["new", "mid-run"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_refused_call_leaves_nothing(call: Call, steps: int, seed: int) -> None:
    world = World(steps)
    before = world.seen()
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as raised:
        call(world)
    # Of an AttributeError only the one that a test's own loss raises.
    assert not isinstance(raised.value, AttributeError) or "'none'" in str(raised.value)
    after = world.seen()
    changed = [name for name in before if not same_bits(after[name], before[name])]
    assert not changed
    assert after.keys() == before.keys()
    # The run goes on.
    for optimizer in world.optimizers:
        optimizer.step()


def test_every_entry_point_is_tried() -> None:
    # These refuse nothing, or return plain data.
    quiet = {
        "Handle",
        "LayerGroups",
        "NormDriftError",
        "NormDrifts",
        "RotationStats",
        "Curves",
        "backends",
        "__version__",
    }
    names = {name.partition(":")[0].partition(".")[0] for name in CALLS}
    assert set(layca_fast.__all__) - quiet <= names | {"read_curves", "diagnostics"}
