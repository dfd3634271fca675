"""FusedLayca, the optimizer: param groups, state and the order of things. It does no arithmetic."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .backends import choose
from .compat import not_compiled, without_gradients
from .formulas.bases import recommended_rate
from .formulas.chunks import as_tuples
from .formulas.options import (
    check_choice,
    check_groups,
    check_options,
    find_base,
)
from .formulas.plain import with_plain
from .in_backward.handle import StepInBackward
from .messages import labelled, named, warn_caller
from .state.compensation import lost_rotation
from .state.doubts import nothing_rotates, vocabulary_rotates
from .state.grouped import Grouped
from .state.members import ignored_decay, rotates
from .state.structure import check_entries
from .step.capture import is_capturing
from .step.interrupts import uninterrupted
from .step.known import KnownGroups
from .step.norms import NormDrifts, checked_plans, last_drifts, present_drifts
from .step.plan import Plan
from .step.stats import StepStats, rotation_stats
from .step.unscaling import LossScale


class FusedLayca(Grouped):
    """Layca (arXiv 1806.01603): every layer keeps its norm and turns by exactly atan(lr) per step.

    Args:
        params: tensors, named tensors or param groups, as for any torch optimizer; float32, float64, bfloat16 or
            float16, dense. Updated in place by :meth:`step`; their ``.grad``, of any floating type, is never modified.
        lr: rotation rate, float or tensor of one element: a rotating layer turns by atan(lr) radians per step; other
            tensors take the plain base step scaled by lr. None: 3**-3 where the direction is one step's gradient,
            3**-5 where it is averaged over steps: momentum, sgd_amom, adam, lion (paper, section 4); muon: 2**-4.
        base: the optimizer that proposes the direction: "sgd", "sgd_amom", "rmsprop", "adagrad", "adam", "lion", or
            "muon", for matrices only: each layer, viewed as (rows, all else), takes the orthogonalised momentum.
        rule: "layca", or "hyperball" (arXiv 2606.16899): the step is not projected, so the layer turns by
            atan2(lr sin(phi), 1 - lr cos(phi)), with phi the angle between weights and step.
        rotate: which tensors rotate: True, False, or None for all but vectors. A tensor with at most one dimension
            longer than 1 is a vector: biases, the (out, 1) gains of weight_norm, the weights of a Linear with one
            output. A tensor that rotates again after a pause goes back to its old radius; :meth:`reset_radius` forgets
            it.
        chunks: which parts of a rotating tensor are layers. Slices of its first dimension: 1 (the whole tensor), a
            divisor of that dimension, "all" (one for each index: the weights of one output), or their sizes, such as
            (2048, 512, 512) for query, key and value; "matrices": the last two dimensions, once for each index of
            those before them, such as (layers, experts, out, in), and ("matrices", n): each of these as n equal parts
            of its rows; "columns": one for each index of the second dimension, the weights of one input, and
            ("columns", n) or ("columns", sizes), as the first dimension's. See docs/options.md for what columns cost.
        chunk_names: what to call the parts in :meth:`rotation_stats` and in the curves of RotationMonitor, such as
            ("query", "key", "value"): one name for each layer of a tensor, or for each of the n parts of a matrix.
        radius: the norm that a layer is put back to after each step: "initial", its norm before the first step that
            moved it; "current", its norm before the step; or "learned", which begins as "initial" and follows the
            gradient, R <- R exp(-radius_lr lr c) with c = <w, g> / (|w| |g|): for layers whose norm the output depends
            on. It costs one more pass over weights and gradients. Or the norm itself: a number, or a function that
            makes it of the layer's shape, a ``torch.Size`` of (rows, all else). The first step that moves the layer
            leads there. A change counts after :meth:`reset_radius`.
        radius_lr: the rate of learned radii, as a multiple of lr; their product counts as 1 at most.
        joins_at: the norm from which on a layer rotates: a number, or a function of the layer's shape as for radius.
            Until its norm is that large a layer takes plain base steps, without weight decay, so it may begin at zero;
            the norm at which it joins is then its radius. 0: from the start.
        weight_decay: decoupled decay of the tensors that do not rotate. Ignored, with a warning, where they do.
        maximize: ascend instead of descend.
        compensate: whether bfloat16 and float16 parameters keep the rest of their bits in the state ``remainder``, 2
            bytes a weight, so that they turn as float32 ones do: True, False, or None for True. Without it a warning
            says so once where lr is less than the type can carry.
        state_dtype: of the base's buffers for bfloat16 and float16 parameters: torch.float32, torch.bfloat16, or None
            for float32. Buffers of other parameters have their parameter's type.
        capturable: let :meth:`step` be captured into a CUDA graph, after a first step outside of it. Replays take lr
            from the tensor that it is, on the parameters' device, and the rest as :meth:`sync_hyperparameters` left it.
        backend: "auto", "cpu", "triton", "cuda" or "torch": see :func:`layca_fast.backends`.
        base_options: what the base has beside these, named as in torch.optim and with its defaults. sgd: momentum,
            dampening, nesterov; sgd_amom: momentum (0.9); rmsprop: alpha, eps, momentum, centered; adagrad: eps,
            initial_accumulator_value; adam: betas, eps, amsgrad; lion (arXiv 2302.06675): betas (0.9, 0.99); muon:
            momentum, nesterov, ns_steps, ns_coefficients, eps, adjust_lr (None, "original" or "match_rms_adamw": of the
            plain step), and ns_dtype, the type of its Newton-Schulz iterations: None for bfloat16 on GPUs, float32 on
            CPUs, and float64 for float64 parameters.
        unscale_in_step: for the whole optimizer: ``torch.amp.GradScaler`` leaves unscaling, and skipping steps whose
            gradients are not finite, to the kernels: the host need not wait. Lightning then refuses to clip gradients.

    Every other argument may be set per param group. State per tensor: what torch's optimizer of that name keeps
    (``momentum_buffer``, ``exp_avg``, ``step``, ...), with ``step`` where the tensor is; and ``radius``, float64 of
    shape (layers,), where the tensor rotates: 0 until a step moves the layer, or, below 0, the norm that the first one
    will lead to, or that the layer waits for; and ``remainder``, raw 16-bit integers in
    a tensor of its type, where it is compensated: see :meth:`effective_weight`. Under rotate=False each base takes the
    step of torch's optimizer, with decoupled weight decay (so adam is AdamW).

    Raises TypeError or ValueError for options and tensors that it cannot take, before anything is modified.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        base: str = "sgd",
        rule: str = "layca",
        rotate: bool | None = None,
        chunks: int | str | Sequence[Any] = 1,
        chunk_names: Sequence[str] | None = None,
        radius: str | float | Callable[[torch.Size], float] = "initial",
        radius_lr: float = 9.0,
        joins_at: float | Callable[[torch.Size], float] = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        compensate: bool | None = None,
        state_dtype: torch.dtype | None = None,
        capturable: bool = False,
        unscale_in_step: bool = False,
        backend: str = "auto",
        **base_options: Any,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"params is a module, {type(params).__name__}: pass its parameters, model.parameters() or "
                "layca_fast.layer_groups(model)"
            )
        row = find_base(base)
        check_options(row, base_options)
        options = {**row.options, **with_plain(base_options)}
        common = {
            "lr": recommended_rate(row, options) if lr is None else lr,
            "base": base,
            "rule": rule,
            "rotate": rotate,
            "chunks": as_tuples(chunks),
            "chunk_names": as_tuples(chunk_names),
            "radius": radius,
            "radius_lr": radius_lr,
            "joins_at": joins_at,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "compensate": compensate,
            "state_dtype": state_dtype,
            "capturable": capturable,
            "backend": backend,
        }
        defaults = {**with_plain(common), **options}
        row.check(defaults)
        check_choice({"unscale_in_step": unscale_in_step}, "unscale_in_step", (False, True))
        self._unscales = bool(unscale_in_step)
        self._lr_is_recommended = lr is None
        self._plan: Plan | None = None
        self._known = KnownGroups()
        #: Groups of which there is nothing to warn of.
        self._compensated: object | None = None
        self._in_backward: StepInBackward | None = None
        self._stale = True
        self._steps = 0
        self._warned = False
        self._warned_of_types = False
        self._warned_of_keys = False
        super().__init__(params, defaults)
        message = nothing_rotates(self.param_groups) or vocabulary_rotates(self.param_groups)
        if message is not None:
            warn_caller(message)

    def _follow_groups(self) -> None:
        if self._in_backward is not None and self._in_backward.is_on:
            self._in_backward.follow()

    def __getstate__(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("_lr_is_recommended", "_unscales", "_steps")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also called by torch's load_state_dict, on an optimizer that has made its plan.
        super().__setstate__(state)
        told = ("_warned", "_warned_of_types", "_warned_of_keys")
        flags = dict.fromkeys(("_lr_is_recommended", "_unscales", *told), False)
        objects = dict.fromkeys(("_plan", "_in_backward", "_compensated"))
        for name, value in {**objects, "_steps": 0, **flags}.items():
            self.__dict__.setdefault(name, value)
        self._stale = True
        self._known = KnownGroups()
        # A group from an older version may lack options; torch's own additions to the defaults are none of ours.
        for group in self.param_groups:
            for name, value in self._options_of(find_base(group.get("base", self.defaults["base"]))).items():
                group.setdefault(name, value)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # To compile what it does on the host would gain nothing, and be done again for every new lr. torch.compiler.disable
    # would import the compiler, which takes a second, together with this package.
    @not_compiled
    @without_gradients
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Turn every rotating layer that has a gradient by atan(lr); take the base step on the other tensors.

        Parameters and state are modified in place; parameters without a gradient are left alone, bit for bit, as all
        are at lr = 0. ``closure``, if given, is called first with gradients enabled, and its loss returned. Does not
        wait for a GPU, but for the first step of a tensor, which looks for layers whose weights are all zero, and where
        the GPU is 16 steps behind and gradients or hyperparameters change at each. After :meth:`step_in_backward` it
        steps what backward has not, and closes the iteration.
        """
        loss = None
        edition = self._known.check(self.param_groups, self._steps + 1)
        loss_scale = LossScale.of(self) if self._unscales else None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            edition = self._known.check(self.param_groups, self._steps + 1)
        if self._in_backward is not None and self._in_backward.is_on:
            self._in_backward.close()
            self._steps += 1
            return loss
        if self._plan is None or self._stale or not self._plan.holds(self.param_groups, self.state, edition):
            with uninterrupted():
                check_entries(self.param_groups, self.state)
                self._plan = Plan(self.param_groups, self.state, choose, previous=self._plan)
                self._stale = False
            if self._in_backward is not None:
                self._plan.carry_counts(self._in_backward.counts())
                self._in_backward = None
            self._warn_of_ignored_decay()
        if edition is None or edition is not self._compensated:
            self._warn_of_lost_rotations(edition)
        self._plan.step(loss_scale)
        self._steps += 1
        return loss

    def step_in_backward(self) -> StepInBackward:
        """From now on, step every parameter inside of ``backward()``, as soon as its gradient is complete, and free it.

        The gradients of a model are then never all there at once. Weights and state are those of ordinary steps, bit
        for bit, if hyperparameters are set between :meth:`step` and the next backward. Call :meth:`step` as before,
        once after every backward: it steps what no hook has seen, such as gradients set by hand, and closes the
        iteration. Returns a handle whose ``remove()`` gives the ordinary step back; also a context manager.

        Nothing may need all gradients, or several backward passes, before the step. A second backward before
        :meth:`step` raises RuntimeError, before it modifies anything. Clipping by the norm of all gradients is
        impossible: after backward there are none (``clip_grad_norm_`` finds 0); a hook on a parameter that was
        registered before may change its gradient (``Tensor.register_post_accumulate_grad_hook``).
        ``torch.amp.GradScaler`` would scale steps that it can no longer unscale: ValueError here under
        ``unscale_in_step``, else RuntimeError from its ``step``. So do DistributedDataParallel, whose buckets keep
        memory for all gradients anyway, and the capture of a CUDA graph. Tensors are stepped one by one, which costs
        launches and some 70 microseconds of the host for each, ten times that under the torch backend, and an
        all-reduce where it is sharded.

        Layers of zeros are looked for among all trainable parameters, at the first gradient, before anything moves.
        A backward that fails has stepped some layers and not the others; :meth:`step` then closes the iteration.
        """
        self._in_backward = StepInBackward(self)
        return self._in_backward

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks for before it leaves unscaling, and skipping, to the step."""
        if self._in_backward is not None:
            self._in_backward.refuse_scaler()
        return self._unscales

    def sync_hyperparameters(self) -> None:
        """Hand the groups' hyperparameters to the device, for the next replays of a captured step.

        Schedulers reassign momentum, betas and an lr that is a float, which a CUDA graph does not see; an lr that is a
        tensor on the parameters' device it reads by itself. Elsewhere nothing is lost or gained: :meth:`step` does
        the same. Raises, before anything is modified: TypeError or ValueError for values out of range, RuntimeError
        for changes that a captured graph cannot follow, and during a capture.
        """
        check_groups(self.param_groups, self._steps + 1)
        if is_capturing():
            raise RuntimeError("sync_hyperparameters() cannot be part of a CUDA graph: call it outside of the capture")
        if self._plan is not None:
            self._plan.sync_hyperparameters(self.param_groups, self.state, stale=self._stale)

    def _warn_of_ignored_decay(self) -> None:
        message = None if self._warned else ignored_decay(self.param_groups)
        if message is not None:
            self._warned = True
            warn_caller(message)

    def _warn_of_lost_rotations(self, edition: object | None = None) -> None:
        # Schedulers change the rates: asked at every step, but only of groups that asked for it.
        if self._warned_of_types or all(group["compensate"] is not False for group in self.param_groups):
            self._compensated = edition
            return
        members = [member for member in labelled(self.param_groups) if rotates(member[2], member[0])]
        message = lost_rotation(members)
        if message is not None:
            self._warned_of_types = True
            warn_caller(message)

    @torch.no_grad()
    def check_norms(self, above: float | None = None, *, at: str = "step") -> NormDrifts:
        """How far the norm of every rotating layer is from its radius, by name: the guard against foreign writes.

        A step restores the norms, so what somebody else has done to the weights shows before it only. ``at`` says which
        weights are looked at. "step": those that the last step has found, before it moved them, by the norms that it
        has measured; costs next to nothing, so call it after every step. "now": the present ones, in one pass over
        them: for after a resume.

        Norms are compared with the state ``radius``, of learned radii with what it was before that step. NaN where that
        says nothing: of a tensor without a gradient in that step, under radius="current", which keeps any norm it
        finds, of a layer that waits (``joins_at``) or has no radius yet, and at the step that leads to a given radius.

        Does not wait for a device unless ``above`` is given or the result read. Of sharded layers all processes call it
        together, and each has all layers: one float64 all-reduce per mesh dimension for "now", at most one for "step".

        Args:
            above: raise :class:`layca_fast.NormDriftError` where a layer is farther than this from its radius, as
                norm / radius - 1. 1e-3 is far above what rounding does, also in 16 bits.
            at: "step" or "now".

        Raises:
            NormDriftError: as ``above`` says; ValueError for arguments that are none; RuntimeError where ``at="step"``
                and no step was taken since the optimizer was made, loaded, or given other groups.
        """
        check_choice({"at": at}, "at", ("step", "now"))
        names = {param: name for _, name, param in named(self.param_groups)}
        if at == "now":
            drifts = present_drifts(self.param_groups, self.state, names)
        else:
            plans = [] if self._plan is None or self._stale else [self._plan]
            plans += [] if self._in_backward is None else self._in_backward.plans
            drifts = last_drifts(checked_plans(plans), self.param_groups, names)
        if above is not None:
            drifts.raise_if(above)
        return drifts

    def rotation_stats(self) -> StepStats:
        """What the last step did to each tensor, a dict by parameter; empty before the first. ``print`` shows a table.

        Does not wait for a device, as reading or printing a number does. The table has the least and the largest of a
        tensor's layers, angles in radians, and under "kept" the steps without a direction to turn in.

        ``layer_names`` of each says which layer is which; with ``chunk_names`` the table has a row for each part.

        Of a DTensor: to the layers that this process has something of. What it counts, of elements and of steps with a
        gradient here, is not summed over processes.
        """
        names = {param: name for _, name, param in named(self.param_groups)}
        plans = [] if self._plan is None else [self._plan]
        if self._in_backward is not None:
            plans += self._in_backward.plans
        return rotation_stats((plan.rows() for plan in plans), names)
