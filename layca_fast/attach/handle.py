"""Layca on any torch optimizer, through the hooks that torch gives every optimizer."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..compat import not_compiled
from ..formulas.chunks import as_tuples
from ..formulas.options import check_choice
from ..formulas.plain import with_plain
from ..messages import labelled, named
from ..state.attached import (
    ATTACHED,
    check_attached,
    follow_attached,
    keep_options,
    shield,
    unshield,
    with_chunks,
    without_chunks,
)
from ..state.effective import effective_weight
from ..state.entries import drop_empty, with_all_entries
from ..state.modes import out_of_inference
from ..state.others import HOOK
from ..state.radii import without_functions
from ..step.hooks import is_nested
from ..step.norms import NormDrifts, checked_plans, last_drifts, present_drifts
from .checks import check_optimizer
from .halves import is_half, narrowed
from .shadow import OPTIONS, Shadow, check_turning, plan_groups
from .stand_in import StandIn

#: torch's dicts of hooks on an optimizer, and the method of :class:`Handle` that goes into each.
_HOOKS = {
    "_optimizer_step_pre_hooks": "_before_step",
    "_optimizer_step_post_hooks": "_after_step",
    "_optimizer_state_dict_post_hooks": "_after_save",
    "_optimizer_load_state_dict_pre_hooks": "_before_load",
    "_optimizer_load_state_dict_post_hooks": "_after_load",
}


def _handle_of(optimizer: Optimizer) -> "Handle | None":
    # Not an optimizer: has none either.
    hook = getattr(optimizer, "_optimizer_step_pre_hooks", {}).get(HOOK)
    handle: Handle | None = None if hook is None else hook.__self__
    return handle


class Handle:
    """What :func:`attach` returns: :meth:`remove` gives the plain optimizer back. Also a context manager that does."""

    def __init__(self, optimizer: Optimizer, options: Mapping[str, Any]) -> None:
        # Weak: the optimizer holds its hooks, so a strong reference would keep its state from being freed at once.
        self._optimizer: weakref.ref[Optimizer] = weakref.ref(optimizer)
        self.options = dict(options)
        self._shadow: Shadow | None = None
        self._stand_in: StandIn | None = None
        self._steps = 0
        self._was_loaded = False
        for hooks, method in _HOOKS.items():
            getattr(optimizer, hooks)[HOOK] = getattr(self, method)
        # The user's own hooks after a step or a load then see what this one has made of it.
        for hooks in ("_optimizer_step_post_hooks", "_optimizer_load_state_dict_post_hooks"):
            getattr(optimizer, hooks).move_to_end(HOOK, last=False)
        # torch leaves hooks out of copies and pickles. An instance attribute is found before the class's method.
        optimizer.__getstate__ = self._state_of_optimizer  # type: ignore[method-assign]

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        if optimizer is None or _handle_of(optimizer) is not self:
            return "<layca_fast.attach: removed>"
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"<layca_fast.attach to {type(optimizer).__name__}: {options}>"

    def remove(self) -> None:
        """Take the hooks off, and radii and remainders out of the optimizer's state. Does nothing the second time."""
        optimizer = self._optimizer()
        if optimizer is not None and _handle_of(optimizer) is self:
            detach(optimizer)
            self._shadow = self._stand_in = None

    @torch.no_grad()
    def check_norms(self, above: float | None = None, *, at: str = "step") -> NormDrifts:
        """How far the norm of every rotating layer is from its radius: :meth:`layca_fast.FusedLayca.check_norms`.

        RuntimeError where the handle was removed.
        """
        check_choice({"at": at}, "at", ("step", "now"))
        optimizer = self._optimizer()
        if optimizer is None or _handle_of(optimizer) is not self:
            raise RuntimeError(
                "check_norms: this handle was removed, and nothing turns the optimizer's layers any more"
            )
        names = {param: name for _, name, param in named(optimizer.param_groups)}
        if at == "now":
            drifts = present_drifts(plan_groups(optimizer, self.options), optimizer.state, names)
        else:
            shadow = None if self._was_loaded else self._shadow
            plans = [] if shadow is None or shadow.plan is None else [shadow.plan]
            aliases = {} if shadow is None else {alias: names[param] for param, alias in shadow.pairs if param in names}
            drifts = last_drifts(checked_plans(plans), [] if shadow is None else shadow.groups, aliases)
        if above is not None:
            drifts.raise_if(above)
        return drifts

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def effective_weight(self, param: Tensor) -> Tensor:
        """The float32 weight that a 16-bit ``param`` and its remainder stand for, as that of FusedLayca."""
        optimizer = self._optimizer()
        return effective_weight(param, {} if optimizer is None else optimizer.state.get(param, {}))

    # Weights and plan are made again at the next step: a copy of the optimizer has parameters of its own.
    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer(), "options": self.options, "steps": self._steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._optimizer = weakref.ref(state["optimizer"])
        self.options, self._steps = state["options"], state.get("steps", 0)
        self._shadow, self._stand_in, self._was_loaded = None, None, False

    def _state_of_optimizer(self) -> dict[str, Any]:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError(
                "this optimizer is a shallow copy of an attached one that is gone: copy.deepcopy makes copies that last"
            )
        ours = {hooks: OrderedDict({HOOK: getattr(self, method)}) for hooks, method in _HOOKS.items()}
        state: dict[str, Any] = type(optimizer).__getstate__(optimizer)
        return {**state, **ours, "__getstate__": self._state_of_optimizer}

    # To compile what the hooks do on the host would gain nothing, and be done again for every new lr.
    @not_compiled
    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if is_nested(self):
            if optimizer is self._optimizer() and self._stand_in is not None and self._stand_in.weights:
                raise RuntimeError(
                    f"a closure steps this {type(optimizer).__name__} in the middle of its own step, in which float32 "
                    "weights stand in for its 16-bit parameters: take that step before, or keep them in float32"
                )
            return None
        shadow = self._keep(optimizer)
        if not shadow.needs_stand_in(optimizer):
            return None
        if self._stand_in is None or type(self._stand_in.optimizer) is not type(optimizer):
            self._stand_in = StandIn(type(optimizer))
        self._stand_in.enter(optimizer, lambda: self._keep(optimizer).fill())
        return self._stand_in.arguments(args, kwargs)

    def _keep(self, optimizer: Optimizer) -> Shadow:
        shadow = self._fitting_shadow(optimizer)
        shadow.keep(optimizer)
        return shadow

    @not_compiled
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Some optimizers put new memory under a parameter while they step, and hooks may have changed lr.
        if not is_nested(self):
            stepped: Mapping[Tensor, Tensor] = {}
            if self._stand_in is not None and args[0] is self._stand_in.optimizer:
                stepped = self._stand_in.hand_over()
            self._fitting_shadow(optimizer).turn(optimizer, stepped)
            self._steps += 1
            self._was_loaded = False

    def _fitting_shadow(self, optimizer: Optimizer) -> Shadow:
        groups = plan_groups(optimizer, self.options, self._steps + 1)
        if self._shadow is None or not self._shadow.fits(groups):
            with out_of_inference():
                self._shadow = Shadow(optimizer, groups, self._shadow)
        self._shadow.take_rates(groups)
        return self._shadow

    def _before_load(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        before = optimizer.param_groups
        saved = follow_attached(optimizer, saved, self.options)
        try:
            check_attached(optimizer, saved, before, self.options)
        except ValueError:
            optimizer.param_groups = before
            raise
        saved = without_chunks(saved, before, self.options["chunks"])
        return shield(optimizer, keep_options(optimizer, saved, (*OPTIONS, "chunk_names")))

    def _after_load(self, optimizer: Optimizer) -> None:
        unshield(optimizer)
        drop_empty(optimizer.state)
        self._was_loaded = True

    def _after_save(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        saved = with_all_entries(optimizer, saved)
        saved = {**saved, "param_groups": [without_functions(group) for group in saved["param_groups"]]}
        return with_chunks(optimizer, saved, self.options["chunks"])


def attach(
    optimizer: Optimizer,
    rule: str = "layca",
    rotate: bool | None = None,
    *,
    chunks: int | str | Sequence[Any] = 1,
    radius: str | float | Callable[[torch.Size], float] = "initial",
    joins_at: float | Callable[[torch.Size], float] = 0.0,
    backend: str = "auto",
) -> Handle:
    """Make any torch optimizer turn its layers by exactly atan(lr) per step, in the direction of its own step.

    Before each step the rotating weights are copied; after it the difference u = w_before - w_after is the base step,
    the weights are put back, and they are rotated by u and the group's lr as :class:`layca_fast.FusedLayca` rotates.
    The optimizer stays what it is: schedulers, param groups, state_dict, deepcopy and pickle work, and copies of an
    attached optimizer are attached. Tensors that do not rotate keep the optimizer's own step.

    Args:
        optimizer: any torch.optim.Optimizer whose ``step`` needs no closure. Its rotating parameters are float32,
            float64, bfloat16 or float16 and dense, plain or DTensors. Its lr becomes the rotation rate too: a rotating
            layer turns by atan(lr) radians.
        rule: as in FusedLayca, like the next five.
        rotate: which tensors rotate: True, False, or None for those with two or more dimensions longer than 1.
        chunks: which parts of a rotating tensor are layers: 1, n, "all", sizes, "matrices", "columns", ...
        radius: the norm that each step restores: "initial", "current", a number, or a function of the layer's shape.
        joins_at: the norm from which on a layer rotates: until then it takes the optimizer's own steps.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    A param group's own "rule", "rotate", "chunks", "radius", "joins_at" or "backend" wins over the argument.

    State: ``optimizer.state[param]["radius"]``, float64 of shape (layers,), kept with its type by load_state_dict. A
    state loaded without radii takes them from the weights at the next step. Of 16-bit parameters also ``"remainder"``,
    as in FusedLayca, and the optimizer's own state is that of float32 weights, which load_state_dict keeps, too.

    Sharded parameters (FSDP2, tensor parallel, both, HSDP): as in FusedLayca, three float64 numbers per layer travel in
    one all-reduce per mesh dimension that shards, and step, so all processes must step together. State is sharded as
    FusedLayca's. What the optimizer itself does to DTensors is torch's affair.

    16-bit parameters: the optimizer steps the float32 weight that parameter and remainder stand for, by a float32
    gradient, and ``handle.effective_weight(param)`` is that weight. The run is that of float32 parameters on the same
    gradients: in bfloat16 bit for bit, in float16 for weights of 2**-16 and more. For its step, the optimizer is
    replaced by a stand-in of its class with these weights in its groups; parameters, groups and types stay as they are,
    also where the step fails. It must take its parameters from its groups. Needs torch 2.10 or newer.

    Memory: one copy of the weights that rotate and may move (frozen ones are not copied), kept between steps, and a
    scratch of at most 2**18 elements per dtype on a CPU, 2**22 on other devices. A 16-bit weight costs 6 bytes, 2 for
    the remainder and 4 for the copy, 4 more for a float32 gradient during the step, and 2 for each moment of the
    optimizer, which becomes float32.

    Precision: w_after is stored in the parameter's type, float32 where that has 16 bits, so u carries its rounding: its
    direction is off by an angle of at most eps/2 * |w|/|u|, eps being 1.2e-7 in float32, and on random weights by 0.4
    of that: 2.5e-5 radians where the base step is 1e-3 of the weights, 2.5e-2 where it is 1e-6. Elements of u below
    half a unit in the last place of their weight are lost. The angle turned is atan(lr) all the same.
    ``python -m bench.attach_error`` measures this; docs/attach.md says what to do about it.

    A step below eps/2 * |w| (once projected) is not told from rounding, so the layer stays as it is.

    Weight decay inside the optimizer: a decay that is parallel to w is projected away by rule="layca". So it is with
    decoupled decay (AdamW) and with SGD without momentum. L2 decay that goes through momentum or is divided by a second
    moment (SGD with momentum, Adam) does change the direction, and under rule="hyperball", which does not project,
    every decay tilts the step. Set weight_decay=0 for what rotates to be rid of it.

    Hooks that change weights before the step must be registered before ``attach``: later ones would be part of the base
    step. An optimizer that keeps copies of the weights in its state (ASGD) keeps those of its own step.

    Returns:
        A handle: ``handle.remove()`` restores the plain optimizer, as leaving ``with attach(optimizer):`` does: radii
        and remainders are gone then, and moments of 16-bit parameters are of 16 bits, as the plain optimizer has them.

    Raises:
        TypeError, ValueError: before anything is modified, for an optimizer, options or parameters that it cannot take;
            here, or, for parameters and options that changed since and layers whose weights are all zero, at the step.
        RuntimeError: after a step that wrote to 16-bit parameters themselves: the optimizer keeps them elsewhere than
            in its groups.
    """
    check_optimizer(optimizer, tuple(_HOOKS))
    if _handle_of(optimizer) is not None:
        raise ValueError(
            f"this {type(optimizer).__name__} is attached already, as copies of an attached optimizer are: set options "
            "in its param groups, or call layca_fast.detach(optimizer) first"
        )
    options = with_plain(
        {"rule": rule, "rotate": rotate, "chunks": chunks, "radius": radius, "joins_at": joins_at, "backend": backend}
    )
    options["chunks"] = as_tuples(options["chunks"])
    check_turning(plan_groups(optimizer, options))
    return Handle(optimizer, options)


def detach(optimizer: Optimizer) -> None:
    """What ``handle.remove()`` does, where the handle is not at hand, as for a copy. ValueError if not attached."""
    if _handle_of(optimizer) is None:
        raise ValueError(f"optimizer is a {type(optimizer).__name__} to which nothing is attached")
    for hooks in _HOOKS:
        del getattr(optimizer, hooks)[HOOK]
    del optimizer.__dict__["__getstate__"]
    for _, _, param in labelled(optimizer.param_groups):
        state = optimizer.state.get(param, {})
        had = [state.pop(name, None) is not None for name in ATTACHED]
        if is_half(param) and had[ATTACHED.index("remainder")]:
            state.update(narrowed(state, param))
        if any(had) and not state:
            del optimizer.state[param]
