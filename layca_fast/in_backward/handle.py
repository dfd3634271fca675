"""Stepping inside backward: each parameter is stepped as soon as its gradient is complete, which is then freed.

A layer's step needs nothing of the others, so every parameter has a plan of its own, made once; the sums, and so the
bits, are those of the ordinary step. torch calls post-accumulate-gradient hooks once the gradient of a leaf is
complete: after all uses of tied weights, and under FSDP2 after the gradient was reduced and scattered.
"""

import threading
import weakref
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..backends import choose
from ..compat import not_compiled, number_of_backward
from ..formulas.options import check_groups, waits
from ..messages import describe, labelled
from ..state.checks import cut_for
from ..state.members import rotates
from ..state.memory import check_apart, is_trained
from ..state.sharding import is_sharded, local_of
from ..state.structure import check_entries
from ..state.zeros import Layers, check_norms
from ..step.capture import is_capturing
from ..step.plan import Plan
from ..step.scratch import Scratch
from ..step.watch import gradients, same_objects
from .limits import check_not_replicated
from .places import places


class Stepped(Protocol):
    """What a handle needs of its optimizer, :class:`layca_fast.FusedLayca`, which stands above and makes the handle."""

    param_groups: list[dict[str, Any]]
    state: Any
    _unscales: bool
    _stale: bool
    _steps: int
    _plan: Plan | None
    _in_backward: "StepInBackward | None"

    def _warn_of_ignored_decay(self) -> None: ...

    def _warn_of_lost_rotations(self) -> None: ...


class StepInBackward:
    """What :meth:`layca_fast.FusedLayca.step_in_backward` returns: :meth:`remove` gives the ordinary step back.

    Also a context manager that does. Copies and pickles of the optimizer take ordinary steps.
    """

    #: Whether :meth:`remove` is still to be called.
    is_on: bool

    def __init__(self, optimizer: Stepped) -> None:
        if optimizer._unscales:
            raise ValueError(
                "unscale_in_step=True: GradScaler decides about a step when all gradients are there, which they never "
                "are under step_in_backward(). Train in bfloat16, which needs no GradScaler, or take ordinary steps"
            )
        past = optimizer._in_backward or optimizer._plan
        if isinstance(past, StepInBackward) and past.is_on:
            raise RuntimeError("step_in_backward() is on already: remove() its handle before calling it again")
        # Weak: the optimizer holds this, and the parameters hold the hooks.
        self._optimizer: weakref.ref[Stepped] = weakref.ref(optimizer)
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._plans: dict[Tensor, Plan] = {}
        self._scratch = Scratch()
        self.is_on = True
        # Weakly, as parameters may be replaced.
        self._counts = WeakTensorKeyDictionary()
        for (param, first), count in ({} if past is None else past.counts()).items():
            self._counts.setdefault(param, {})[first] = count.clone()
        # Each device has a thread of its own in a backward pass.
        self._lock = threading.RLock()
        try:
            self._follow(optimizer)
        except BaseException:
            self.remove()
            raise
        self._stepped: set[Tensor] = set()
        self._begin()

    def _begin(self) -> None:
        """Be ready for a backward pass."""
        self._last_stepped = self._stepped
        self._stepped = set()
        self._created: set[Tensor] = set()
        self._seen: set[int] = set()
        self._running: set[int] = set()
        self._is_open = False
        self._memory_is_checked = False

    def __repr__(self) -> str:
        return f"<step_in_backward: {f'on, with {len(self._hooks)} parameters' if self.is_on else 'removed'}>"

    def remove(self) -> None:
        """Take the hooks off: the next :meth:`FusedLayca.step` is an ordinary one. Does nothing the second time."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self.is_on = {}, False
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._in_backward is self:
            optimizer._stale = True

    def __enter__(self) -> "StepInBackward":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def plans(self) -> list[Plan]:
        """One for each parameter that has been stepped; those that were not stepped last say so."""
        last = self._stepped or self._last_stepped
        for param, plan in self._plans.items():
            if param not in last:
                plan.rest()
        return list(self._plans.values())

    def refuse_scaler(self) -> None:
        """Raise RuntimeError if GradScaler is about to step: its scale is in the steps that backward has taken."""
        if self.is_on:
            raise RuntimeError(
                "GradScaler cannot work under step_in_backward(): backward has stepped the parameters, by gradients "
                "that are scaled still. Go back to weights from before this iteration, and train in bfloat16 without "
                "GradScaler, or remove() the handle"
            )

    def counts(self) -> dict[tuple[Tensor, int], Tensor]:
        """The counts of every tensor that has been stepped, as :meth:`Plan.counts` has them, here or before."""
        found = {(param, first): count for param, each in self._counts.items() for first, count in each.items()}
        for plan in self._plans.values():
            found.update(plan.counts())
        return found

    def follow(self) -> None:
        """Bring the hooks up to date with the parameters of the optimizer."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._follow(optimizer)

    def _follow(self, optimizer: Stepped) -> None:
        self._places = places(optimizer.param_groups, optimizer.state)
        self._state = optimizer.state
        self._groups = list(optimizer.param_groups)
        self._params = [list(group["params"]) for group in self._groups]
        self._is_checked = False
        for param in self._hooks.keys() - self._places.keys():
            self._hooks.pop(param).remove()
            self._plans.pop(param, None)
        self._hook_all()

    def _hook_all(self) -> None:
        """A hook on every parameter that is trained and has none: some may have been frozen, or lazy, until now."""
        me = weakref.ref(self)

        def hook(param: Tensor) -> None:
            this = me()
            if this is not None:
                this._take(param)

        for param in self._places:
            if param.requires_grad and param not in self._hooks and not is_lazy(param):
                self._hooks[param] = param.register_post_accumulate_grad_hook(hook)

    def _follows(self, optimizer: Stepped) -> bool:
        if optimizer._stale or optimizer.state is not self._state:
            return False
        if not same_objects(optimizer.param_groups, self._groups):
            return False
        pairs = zip(self._groups, self._params, strict=True)
        return all(same_objects(group["params"], known) for group, known in pairs)

    @not_compiled
    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        """The hook: step ``param`` by its gradient, which is complete, and free that."""
        optimizer = self._optimizer()
        # A hook of the user's may have taken the gradient away.
        if optimizer is None or param.grad is None:
            return
        with self._lock:
            self._check_backward(param)
            if not self._is_open:
                self._open(optimizer)
            if param in self._places:
                self._step(optimizer, param)

    def _check_backward(self, param: Tensor) -> None:
        """Raise RuntimeError if this hook belongs to a second backward pass, or to a capture."""
        if is_capturing():
            raise RuntimeError(
                "a backward pass with step_in_backward() cannot be part of a CUDA graph: remove() the handle and "
                "capture ordinary steps"
            )
        task = number_of_backward()
        # A backward inside of another, as reentrant checkpoints run it, has a number of its own.
        is_next = task not in self._seen and bool(self._seen) and not self._running
        if is_next or param in self._stepped:
            # What the first backward left was nothing, so this belongs to the second alone.
            param.grad = None
            raise RuntimeError(
                "a second backward pass before optimizer.step(): under step_in_backward() the first one has stepped "
                "the parameters already, so gradients cannot be accumulated. Call optimizer.step() after every "
                "backward, add up the losses and call backward once, or remove() the handle (under "
                "torch.utils.checkpoint, use_reentrant=False keeps a backward one pass)"
            )
        if task not in self._seen and task >= 0:
            self._seen.add(task)
            self._running.add(task)
            Variable._execution_engine.queue_callback(partial(self._running.discard, task))

    def _open(self, optimizer: Stepped) -> None:
        """At the first gradient of an iteration: what the ordinary step checks before it modifies anything."""
        check_groups(optimizer.param_groups, optimizer._steps + 1)
        if not self._follows(optimizer):
            self._follow(optimizer)
            plan = optimizer._plan
            if plan is not None and not (plan.recorded or plan._kept):
                # It would keep the memory of state that has been replaced, and no graph needs it.
                optimizer._plan = None
        if not self._is_checked:
            check_not_replicated(self._places)
            check_entries(optimizer.param_groups, optimizer.state)
            self._check_memory()
            self._check_norms()
            optimizer._warn_of_ignored_decay()
            self._is_checked = True
        optimizer._stale = False
        optimizer._warn_of_lost_rotations()
        self._is_open = True

    def _check_norms(self) -> None:
        """Look for layers of zeros among all that are trained, before the first of them moves."""
        new = []
        for param, place in self._places.items():
            ((group, label, _),) = labelled(place.groups)
            turns = param.requires_grad and rotates(param, group) and not waits(group)
            if turns and "radius" not in place.state.get(param, {}):
                new.append(Layers(group, label, param, cut_for(param, group, label)))
        check_norms(new)

    def _check_memory(self) -> None:
        """Raise ValueError for parameters that are trained and share memory: each plan sees one of them only."""
        self._memory_is_checked = True
        trained = [each for place in self._places.values() for each in labelled(place.groups) if is_trained(each[2])]
        check_apart([(partial(describe, label, param), local_of(param)) for _, label, param in trained])

    def _step(self, optimizer: Stepped, param: Tensor) -> None:
        groups, state = self._places[param]
        plan = self._plans.get(param)
        if plan is None or not plan.holds(groups, state):
            if plan is not None and not self._memory_is_checked:
                self._check_memory()
            if param not in optimizer.state:
                self._created.add(param)
            previous, plan = plan, Plan(groups, state, choose, plan, self._scratch)
            if previous is None and param in self._counts:
                plan.carry_counts({(param, first): count for first, count in self._counts[param].items()})
            self._plans[param] = plan
        plan.step()
        self._stepped.add(param)
        grad = param.grad
        if grad is not None and grad.is_cuda:
            # FSDP2 reduces gradients on streams of its own; their memory must not be given away before we are done.
            local_of(grad).record_stream(torch.cuda.current_stream(grad.device))
        param.grad = None

    def close(self) -> None:
        """At :meth:`FusedLayca.step`: step what no hook has stepped, and be ready for the next backward.

        Raises RuntimeError, before that, for a gradient of a parameter that has been stepped.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if not self._is_open:
            self._open(optimizer)
        params = list(self._places)
        late = [param for param, grad in zip(params, gradients(params), strict=True) if grad is not None]
        for param in late:
            if param in self._stepped:
                ((_, label, _),) = labelled(self._places[param].groups)
                raise RuntimeError(
                    f"{describe(label, param)} has a gradient that came after backward had stepped "
                    "it: whatever sets gradients later, such as DistributedDataParallel, needs ordinary steps: "
                    "remove() the handle, and go back to weights from before this iteration"
                )
        for param in params:
            # Sharded layers are stepped by all processes together, in one order, whichever of them have a gradient.
            shared = is_sharded(param) and param.requires_grad
            if param not in self._stepped and (shared or param.grad is not None):
                self._step(optimizer, param)
        # The ordinary step creates state in the order of the groups, and checkpoints keep it.
        for param in params:
            if param in self._created and param in optimizer.state:
                optimizer.state[param] = optimizer.state.pop(param)
        self._hook_all()
        self._begin()
