"""RotationMonitor: how far the layers of any model turn, under any optimizer."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compat import not_compiled
from ..formulas.options import BACKENDS, check_choice
from ..messages import warn_caller
from ..state.reduction import Reduction
from ..step.capture import is_capturing
from .after_steps import AfterSteps
from .angles import angle_between
from .curves import QUANTITIES, Curves
from .guard import guard_of
from .keeping import KEEPS, Reference, Sketched, View, Whole
from .saved import check_saved
from .watched import replaced, watched_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of the state_dict: a reader of another version must not guess.
VERSION = 1

#: What a state must share with the monitor that loads it.
SETTINGS = ("keep", "per_step", "names", "sketch_size", "seed")


def _count(name: str, value: Any, least: int) -> int:
    """``value`` as an int; ValueError if it is no whole number >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}: must be a whole number >= {least}")
    return int(value)


class RotationMonitor(AfterSteps):
    """Layer rotation curves, angles between records and norms, of any model under any optimizer.

    The curve of a layer is 1 - cos(w_t, w_0), with w_0 the weights when the monitor is made (arXiv 1806.01603,
    section 3)::

        monitor = RotationMonitor(model, every=10)
        for batch in loader:
            ...
            optimizer.step()
            monitor.record()
        monitor.plot("rotation.png")

    or, instead of calling :meth:`record`, ``with monitor.attach(optimizer): train()``. Weights, gradients, state and
    random numbers of the training are read at most, so the training goes bit for bit as it does without it.

    Args:
        model_or_optimizer: what holds the layers. Of a model: the weights that :func:`layca_fast.layer_groups` would
            rotate, and tensors of two or more dimensions in modules of types that it does not know; packed weights as
            the layers that they hold. Of an optimizer: what rotates by its groups' ``rotate`` and ``chunks``, or has
            two or more dimensions; names are those of its groups, or "group.index".
        keep: where and how w_0 is kept. "device": a copy beside the weights. "cpu": in pinned host memory, brought over
            piece by piece at each record. "bfloat16": a copy of 2 bytes a weight, off by at most 1.96e-3 radians,
            so that a curve at the angle theta is off by 1.96e-3 * sin(theta) + 2e-6 at most. "sketch": about
            ``sketch_size`` float32 numbers per layer, and as many of the present weights; the curve is an estimate: see
            below.
        every: measure at every so many-th call of :meth:`record`.
        layers: names of parameters to watch instead, also of one dimension; shell wildcards (``"*.attn.*"``) work.
        per_step: also measure the angle to the weights of the record before, which with ``every=1`` is the rotation of
            the step. Doubles the memory and the time. Not with keep="bfloat16", whose rounding exceeds most steps.
        sketch_size: at least 2; the largest prime up to it is used. The standard deviation of an estimated 1 - cos is
            (1 - cos^2)/sqrt(sketch_size), at most 1.6 % at the default, and that of a small angle between records
            1/sqrt(sketch_size) of it, provided that no remainder of positions by that prime holds much more than its
            share of the squared weights. A layer with no more elements than that is kept whole, in float32.
        seed: of the sketch's signs; the same seed gives the same sketch on every device.
        backend: "auto", "cpu", "triton", "cuda" or "torch": see :func:`layca_fast.backends`.
        check_norms: the largest relative drift of a norm from its radius, such as 1e-3, to be looked for at every call
            of :meth:`record`, whatever ``every``: by :meth:`layca_fast.FusedLayca.check_norms`, of the last step of the
            optimizer that the monitor is made of or attached to, or of those of :meth:`guard`. Waits for the device.
        on_drift: "raise" :class:`layca_fast.NormDriftError` beyond it, once the step is recorded, or "warn", once for
            each layer.

    A record costs one fused pass over weights and copies (two with ``per_step``), in float64 sums of fixed order, and
    keeps 24 bytes a layer on the device until it is read; it does not wait for a GPU. What is kept elsewhere, or in
    another type, comes over through 64 MB that stay. With "sketch" it is a pass of torch operations over blocks of the
    weights, which take up to about 70 MB of a GPU while it lasts. Weights of 16 bits are taken as they are stored,
    without the remainders that FusedLayca keeps of them: bfloat16 rounds by up to 2e-3 radians, so that smaller angles
    between records are mostly rounding (``rotation_stats()`` has the true ones). Angles below about 1e-7 are lost in
    rounding.

    DTensor parameters, as of FSDP2: each process measures its shards, and the dots are added up by one float64
    all-reduce per mesh dimension that shards, so **all processes must record at the same steps**; each has all curves.
    A state_dict holds this process's shards: save one per process, and load it on the same mesh.

    Layers that are all zero or not finite, at the start or now, have no angle: NaN.

    Raises TypeError or ValueError for arguments and parameters that it cannot take.
    """

    def __init__(
        self,
        model_or_optimizer: nn.Module | Optimizer,
        *,
        keep: str = "device",
        every: int = 1,
        layers: Iterable[str] | None = None,
        per_step: bool = False,
        sketch_size: int = 4096,
        seed: int = 0,
        backend: str = "auto",
        check_norms: float | None = None,
        on_drift: str = "raise",
    ) -> None:
        self._guard = guard_of(check_norms, on_drift)
        check_choice({"keep": keep}, "keep", KEEPS)
        check_choice({"per_step": per_step}, "per_step", (False, True))
        check_choice({"backend": backend}, "backend", ("auto", *BACKENDS))
        every, sketch_size = _count("every", every, 1), _count("sketch_size", sketch_size, 2)
        seed = _count("seed", seed, 0)
        if per_step and keep == "bfloat16":
            raise ValueError(
                "per_step=True with keep='bfloat16': its rounding, 2e-3 radians, exceeds most steps; use "
                "keep='device', 'cpu' or 'sketch'"
            )
        self.keep, self.every, self.per_step = keep, every, bool(per_step)
        self.sketch_size, self.seed = sketch_size, seed
        self._watched = watched_layers(model_or_optimizer, layers)
        self.names = [name for each in self._watched for name in each.layer_names]
        self._source = model_or_optimizer
        self._told_of_replaced = False
        self._view: View = (
            Sketched(self._watched, sketch_size, seed) if keep == "sketch" else Whole(self._watched, keep)
        )
        self._layout = [(each.layers, each.groups) for each in self._watched]
        self._reduction: Reduction | None = None
        counts = [each.layers for each in self._watched]
        self._start = Reference(self._view, counts, backend)
        self._before = Reference(self._view, counts, backend) if self.per_step else None
        super().__init__()
        self.reset()

    # To compile a record would gain nothing, and be done again for every new step number.
    @not_compiled
    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self, step: int = 0) -> None:
        """Take the present weights as the initial ones, forget all records, and record them as ``step``."""
        step = _count("step", step, 0)
        self.step = step
        self._steps: list[int] = []
        self._pending: list[Tensor] = []
        self._read = torch.zeros(0, len(QUANTITIES), len(self.names), dtype=torch.float64, device="cpu")
        weights, squares = self._view.take()
        self._start.set(weights)
        if self._before is not None:
            self._before.set(weights)
        self._measure(weights, squares, first=True)

    def guard(self, *optimizers: Optimizer | None) -> None:
        """Check the norms of these optimizers, too, at every record, where ``check_norms`` asks for it.

        None stands for no optimizer.
        """
        for optimizer in optimizers:
            if self._guard is not None and optimizer is not None:
                self._guard.watch(optimizer)

    def _follow(self, optimizer: Optimizer) -> None:
        self.guard(optimizer)

    @not_compiled
    @torch.inference_mode(False)
    @torch.no_grad()
    def record(self, step: int | None = None) -> bool:
        """Say that a step was taken, and measure the layers if it is one of every ``every``; returns whether it was.

        ``step``: its number, greater than the last one; None: the next. Where numbers are left out, the first from each
        multiple of ``every`` on is measured. Neither waits for the device nor modifies anything but the monitor.

        Raises RuntimeError while a CUDA graph is captured, ValueError where weights have another shape, and what
        ``check_norms`` asks for.
        """
        measured = self._record(step)
        if self._guard is not None:
            self._guard.check(self._source)
        return measured

    def _record(self, step: int | None) -> bool:
        step = self.step + 1 if step is None else step
        step = _count("step", step, 0)
        if step <= self.step:
            raise ValueError(
                f"step={step!r}: the last one was {self.step}, and steps go up; reset() starts anew from the present "
                "weights"
            )
        if is_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and its replays would not record: call record() after each replay "
                "instead, or detach() the monitor from the optimizer whose step is captured"
            )
        if step // self.every == self.step // self.every:
            self.step = step
            return False
        weights, squares = self._view.take()
        self.step = step
        self._measure(weights, squares)
        return True

    def _warn_of_replaced(self) -> None:
        gone = [] if self._told_of_replaced else replaced(self._source, self._watched)
        if gone:
            self._told_of_replaced = True
            warn_caller(
                f"parameters {gone} were replaced by others since this RotationMonitor was made, as fully_shard and "
                "load_state_dict(assign=True) do: it still watches the old ones. Make the monitor after that"
            )

    def _measure(self, weights: Sequence[Tensor], squares: Tensor | None, first: bool = False) -> None:
        references = [self._start] if self._before is None else [self._start, self._before]
        tables = [reference.dots(weights) for reference in references]
        if squares is not None:
            tables.append(squares.unsqueeze(1))
        table = self._summed(torch.cat(tables, dim=1))
        square = (table[:, 0] if squares is None else table[:, -1]).clone()
        if first:
            for reference in references:
                reference.squares = square
        # 1 - cos in the form that does not cancel.
        rotation = 2 * torch.sin(angle_between(table[:, 0:3], self._start.squares) / 2).square()
        turned = torch.full_like(rotation, math.nan)
        if self._before is not None:
            if not first:
                turned = angle_between(table[:, 3:6], self._before.squares)
            self._before.set(weights)
            self._before.squares = square
        self._steps.append(self.step)
        self._pending.append(torch.stack([rotation, turned, square.sqrt()]))

    def _summed(self, table: Tensor) -> Tensor:
        """The dots of whole layers from those of the shards here, (layers, columns) float64."""
        if not self.is_sharded:
            return table
        if self._reduction is None:
            self._reduction = Reduction(self._layout, table.shape[1], table.device)
        self._reduction.table.copy_(table)
        self._reduction.run()
        return self._reduction.table.to(table.device)

    @property
    def curves(self) -> Curves:
        """All records so far, as plain data. Waits for the device, and frees its memory of them.

        Warns once where parameters were replaced by others since the monitor was made: their curves stand still.
        """
        self._warn_of_replaced()
        if self._pending:
            self._read = torch.cat([self._read, torch.stack(self._pending).cpu()])
            self._pending = []
        rotation, angle, norm = (each.clone() for each in self._read.unbind(1))
        return Curves(list(self.names), list(self._steps), rotation=rotation, angle=angle, norm=norm)

    def plot(
        self, path: str | Path | None = None, *, quantity: str = "rotation", title: str = "", xlabel: str = "step"
    ) -> "Figure":
        """Draw the curves, one line per layer: :meth:`layca_fast.Curves.plot` says what the options are."""
        return self.curves.plot(path, quantity=quantity, title=title, xlabel=xlabel)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies of weights that are kept, wherever they are; records are not counted."""
        return self._start.nbytes + (0 if self._before is None else self._before.nbytes)

    @property
    def is_sharded(self) -> bool:
        """Whether other processes have parts of the layers, so that all of them must record and save."""
        return any(each.groups for each in self._watched)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": [], "_reduction": None}

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on: plain data and tensors, for torch.load(weights_only=True).

        The tensors of copies are the monitor's own, as in torch's state_dicts: save them, or copy them, at once.
        """
        curves = self.curves
        for reference in (self._start, self._before):
            if reference is not None:
                reference.wait()
        return {
            "version": VERSION,
            **{name: getattr(self, name) for name in SETTINGS},
            "step": self.step,
            "steps": curves.steps,
            **{name: getattr(curves, name) for name in QUANTITIES},
            "start": list(self._start.kept),
            "start_squares": self._start.squares,
            "before": [] if self._before is None else list(self._before.kept),
            "before_squares": None if self._before is None else self._before.squares,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`: initial weights and records are those that were saved, copied.

        Raises ValueError, before anything is modified, for a state of another monitor: other layers, ``keep``,
        ``per_step``, ``sketch_size`` or ``seed``. ``every`` may differ.
        """
        if state_dict.get("version") != VERSION:
            raise ValueError(f"state_dict: has version {state_dict.get('version')!r}, and only {VERSION} can be read")
        kept = {"start": self._start.kept, "before": [] if self._before is None else self._before.kept}
        check_saved(
            state_dict,
            {name: getattr(self, name) for name in SETTINGS},
            {name: [tuple(tensor.shape) for tensor in tensors] for name, tensors in kept.items()},
        )
        self._start.restore(state_dict["start"], state_dict["start_squares"])
        if self._before is not None:
            self._before.restore(state_dict["before"], state_dict["before_squares"])
        self.step, self._steps, self._pending = state_dict["step"], list(state_dict["steps"]), []
        self._read = torch.stack([state_dict[name].cpu().to(torch.float64) for name in QUANTITIES], dim=1)
