"""What the last step did to each layer, from the numbers that the kernels have anyway."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..formulas.rotation import KEEP, orthogonal_square, rotation
from ..formulas.tables import Coefficient, Count
from ..messages import aligned
from ..state.checks import check_memory
from ..state.cut import LayerNames
from ..state.slot import Slot
from .batch import Batch


@dataclass(frozen=True)
class RotationStats:
    """One tensor's last step, per layer: tensors of shape (layers,) on the device; reading them may wait for it.

    ``name``: the tensor's, or "group.index", their numbers, where its param group does not know one; those of its
    layers are in ``layer_names``.
    ``angle``: the commanded rotation in radians, 0 where the layer was kept or does not rotate: atan(lr) under the rule
    "layca", atan2(lr sin(phi), 1 - lr cos(phi)) under "hyperball", with phi the angle between weights and step.
    ``cosine``: of the angle between weights and base step, before the step. ``step_norm``: of the base step. ``norm``:
    of the weights, before the step. ``radius``: the norm that steps restore (0: not yet set, or the layer waits for
    ``joins_at``), of tensors that do not rotate their own. ``drift``: norm / radius - 1, what storing the weights has
    cost since the last step; at the first moving step under a radius that was given, how far the layer was from it. Of
    a learned radius ``radius`` is what this step has made of it, and ``drift`` compares with what it was before.

    Counted since the optimizer was made: ``non_finite`` elements that counted as zero (of the gradient, which under
    rmsprop, adagrad and adam is one, too, where its square overflows; of state or step), steps with ``no_direction`` to
    turn in, steps with ``broken`` (non-finite) weights.
    """

    name: str
    angle: Tensor
    cosine: Tensor
    step_norm: Tensor
    norm: Tensor
    radius: Tensor
    drift: Tensor
    non_finite: Tensor
    no_direction: Tensor
    broken: Tensor
    parts: LayerNames | None = field(default=None, repr=False)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The tensor's name for one layer; else "name[0]", or with ``chunk_names`` "name[query]", for each."""
        if self.parts is None:
            return (self.name,) * self.angle.numel()
        return tuple(f"{self.name}{suffix}" for suffix in self.parts.suffixes(self.angle.numel()))

    def rows(self) -> "Iterator[tuple[str, RotationStats]]":
        """What a table shows in a row each, with its name: the tensor, or its parts if the group has names for them."""
        given = None if self.parts is None else self.parts.given
        if self.parts is None or given is None or self.parts.cut.layers == 1:
            yield self.name, self
            return
        for part, name in enumerate(given):
            # Of a stack, that part of all matrices.
            first = (part - self.parts.first) % len(given)
            tensors: dict[str, Any] = {each: getattr(self, each)[first :: len(given)] for each in _TENSORS}
            yield f"{self.name}[{name}]", replace(self, **tensors)


_TENSORS = tuple(field.name for field in fields(RotationStats) if field.name not in ("name", "parts"))


def _span(values: Tensor, form: str) -> str:
    """The number of a tensor's layers, or the least and the largest of them."""
    if values.numel() == 0:
        return "-"
    least, most = (format(float(each), form) for each in (values.min(), values.max()))
    return least if least == most else f"{least} to {most}"


class StepStats(dict[Tensor, RotationStats]):
    """The stats of every tensor, by parameter; ``print`` shows a table, which waits for the device."""

    def __str__(self) -> str:
        columns = ("parameter", "layers", "angle", "cos(w, u)", "|u|", "norm", "drift", "non-finite", "kept", "broken")
        rows = [
            (
                name,
                str(each.angle.numel()),
                _span(each.angle, ".3g"),
                _span(each.cosine, "+.3f"),
                _span(each.step_norm, ".3g"),
                _span(each.norm, ".4g"),
                _span(each.drift, "+.0e"),
                *(str(int(count.sum())) for count in (each.non_finite, each.no_direction, each.broken)),
            )
            for tensor in self.values()
            for name, each in tensor.rows()
        ]
        return aligned(columns, rows)


def _stats_of(batch: Batch, slot: Slot, rows: slice, name: str, factors: Tensor | None) -> RotationStats:
    """The stats of ``slot``, which has these ``rows`` in the batch's per-layer tables.

    ``factors``: what the step has multiplied the radii of the batch by, None for 1.
    """
    if slot.piece.layers == 0:
        rows = slice(rows.start, rows.start)
    n2, d, q = batch.dots[rows].unbind(1)
    norm, step_norm = n2.sqrt(), q.sqrt()
    kept = batch.coefficients[rows, Coefficient.MODE] == KEEP
    zeros = torch.zeros_like(norm)
    turned, radius, drift = zeros, norm, zeros
    if slot.radius is not None:
        check_memory(slot.radius, f"the state 'radius' of {slot.label}")
        sigma = orthogonal_square(n2, d, q).clamp(min=0.0).sqrt()
        along, across = rotation(torch.full_like(norm, slot.rule), norm, d, q, sigma, batch.hyperparameters.lr_of(slot))
        # Of a layer that waits, the radius is below 0, and the step was a plain one.
        turned = torch.where(kept | (slot.radius < 0), 0.0, torch.atan2(across, along))
        if slot.group["radius"] != "current":
            radius = slot.radius.clamp(min=0.0)
            before = radius if factors is None else radius / factors[rows]
            drift = torch.where(radius > 0, norm / before - 1, 0.0)
    counts = batch.counts[rows].clone()
    return RotationStats(
        name=name,
        angle=turned,
        cosine=d / (norm * step_norm),
        step_norm=step_norm,
        norm=norm,
        radius=radius,
        drift=drift,
        non_finite=counts[:, Count.NON_FINITE],
        no_direction=counts[:, Count.NO_DIRECTION],
        broken=counts[:, Count.BROKEN],
        parts=None if slot.cut is None else LayerNames(slot.cut, slot.group.get("chunk_names"), slot.start),
    )


def _joined(parts: Sequence[RotationStats]) -> RotationStats:
    """The stats of a tensor whose layers are in several slots, in their order."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {name: torch.cat([getattr(each, name) for each in parts]) for name in _TENSORS}
    return replace(parts[0], **joined)


def rotation_stats(plans: Iterable[Iterable[tuple[Batch, Slot, slice]]], names: Mapping[Tensor, str]) -> StepStats:
    """The stats of every parameter that ``plans`` step, each given as its slots with their batch and rows in it."""
    stats = StepStats()
    factors: dict[Batch, Tensor] = {}
    for slots in plans:
        found: dict[Tensor, list[tuple[int, RotationStats]]] = {}
        for batch, slot, rows in slots:
            if batch.learned is not None and batch not in factors:
                factors[batch] = batch.learned.last_factors()
            name = names.get(slot.owner, "")
            of_slot = _stats_of(batch, slot, rows, name, factors.get(batch))
            found.setdefault(slot.owner, []).append((slot.piece.first, of_slot))
        for param, parts in found.items():
            # Of one tensor in several batches they do not come in the order of its layers.
            stats[param] = _joined([each for _, each in sorted(parts, key=lambda part: part[0])])
    return stats
