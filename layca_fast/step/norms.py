"""The guard: how far the norms of rotating layers are from their radii, at the last step or now.

A step puts every layer back on its sphere, so a norm that somebody else has changed shows before it only: in the norm
that the step itself has measured, or in that of the present weights before the next step.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formulas.rotation import KEEP
from ..formulas.tables import Coefficient
from ..messages import aligned, labelled
from ..state.checks import check_memory
from ..state.compensation import fits, join
from ..state.cut import LayerNames, cut_of
from ..state.layout import layers_are_dense, memory_order, scalar_device
from ..state.members import rotates
from ..state.reduction import Reduction
from ..state.sharding import (
    Sharding,
    is_elsewhere,
    is_sharded,
    local_of,
    placed,
    radius_placements,
    sharding_of,
)
from ..state.slot import Slot
from .batch import Batch

if TYPE_CHECKING:
    from .plan import Plan

#: Elements that are read at a time, in float64: what stays in a CPU's cache; enough for one launch to fill a GPU.
BLOCK_ON_CPU, BLOCK_ELSEWHERE = 2**18, 2**22

#: In what processes tell one another: nothing to compare with, and nothing known here. A drift is -1 at least.
_NOTHING, _UNKNOWN = -2.0, -3.0


class NormDriftError(RuntimeError):
    """A layer whose norm is not that of its sphere: somebody else has written to the weights, or the state."""


class NotSteppedError(RuntimeError):
    """There is no last step to look at."""


class NormDrifts(Mapping[str, Tensor]):
    """By the name of each rotating tensor, norm / radius - 1 of its layers: (layers,) float64, on the device.

    NaN where there is nothing to compare with, infinity where the weights are not finite. The methods, and ``print``,
    read the numbers, and so wait for the device. ``when`` says which weights were looked at.
    """

    def __init__(self, drifts: Mapping[str, Tensor], when: str, parts: Mapping[str, LayerNames] | None = None) -> None:
        self._drifts, self.when, self._parts = dict(drifts), when, dict(parts or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._drifts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._drifts)

    def __len__(self) -> int:
        return len(self._drifts)

    def _layers(self) -> list[tuple[str, float]]:
        """Every layer that can be compared, with its drift; the farthest first."""
        found = [
            (f"{name}{suffix}", value)
            for name, values in self._drifts.items()
            for suffix, value in zip(self._suffixes(name, len(values)), values.tolist(), strict=True)
            if not math.isnan(value)
        ]
        return sorted(found, key=lambda each: -abs(each[1]))

    def _suffixes(self, name: str, count: int) -> Sequence[str]:
        known = self._parts.get(name)
        if known is not None:
            return known.suffixes(count)
        return [""] if count == 1 else [f"[{index}]" for index in range(count)]

    def above(self, limit: float) -> dict[str, float]:
        """The drifts of more than ``limit`` in size, by the name of the layer, the farthest first."""
        return {name: value for name, value in self._layers() if abs(value) > limit}

    def worst(self) -> tuple[str, float]:
        """The layer that is farthest from its radius, and its drift; ("", 0.0) where none can be compared."""
        return next(iter(self._layers()), ("", 0.0))

    def message(self, limit: float) -> str | None:
        """What to say of the layers that are farther than ``limit`` from their radii; None where none is."""
        far = self.above(limit)
        if not far:
            return None
        some = ", ".join(f"{name} {value:+.2g}" for name, value in list(far.items())[:5])
        more = f" and {len(far) - 5} more" if len(far) > 5 else ""
        return (
            f"{len(far)} of {len(self._layers())} layers have not the norm of their radius, {self.when}: {some}{more} "
            f"as norm / radius - 1, where {limit:g} was allowed. Other code has written to the weights, or weights and "
            "optimizer state are of two checkpoints. If that was meant, call optimizer.reset_radius()"
        )

    def raise_if(self, above: float = 1e-3) -> None:
        """Raise NormDriftError, naming them, where layers are farther than ``above`` from their radii."""
        check_limit(above)
        message = self.message(above)
        if message is not None:
            raise NormDriftError(message)

    def __str__(self) -> str:
        rows = [(name, f"{value:+.1e}") for name, value in self._layers()]
        return aligned(("layer", "norm / radius - 1"), rows)


def checked_plans(plans: "Sequence[Plan]") -> "Sequence[Plan]":
    """``plans``, or RuntimeError where there are none."""
    if not plans:
        raise NotSteppedError(
            "check_norms: no step was taken yet, or groups or state have changed since the last: take one, or look at "
            "the weights as they are, check_norms(at='now')"
        )
    return plans


def check_limit(above: Any, name: str = "above") -> None:
    """Raise ValueError for a largest drift that is none."""
    if isinstance(above, bool) or not isinstance(above, Real) or not 0.0 <= float(above) < math.inf:
        raise ValueError(f"{name}={above!r}: must be a finite number >= 0, such as 1e-3, the largest relative drift")


def _last_drift(batch: Batch, slot: Slot, rows: slice, factors: Tensor | None, arriving: Tensor | None) -> Tensor:
    """Of the layers of a slot, by the norms that its last step has found; ``arriving`` is brought up to date."""
    assert slot.radius is not None
    n2, _, q = batch.dots[rows].unbind(1)
    before = slot.radius if factors is None else slot.radius / factors[rows]
    drift = n2.sqrt() / before - 1
    # Of what no step has measured, the dots are 0.
    known = (slot.radius > 0) & ((n2 != 0) | (q != 0))
    if slot.group["radius"] == "current":
        known = torch.zeros_like(known)
    elif arriving is not None:
        known &= ~arriving
        arriving &= batch.coefficients[rows, Coefficient.MODE] == KEEP
    return torch.where(known, torch.where(drift.isfinite(), drift, math.inf), math.nan)


def last_drifts(
    plans: "Iterable[Plan]", groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]
) -> NormDrifts:
    """Of what ``plans`` have stepped last, by the ``names`` of their parameters.

    All processes that share tensors call it together, with the same ``groups``.
    """
    found: dict[Tensor, list[tuple[int, Tensor]]] = {}
    factors: dict[Batch, Tensor] = {}
    for plan in plans:
        for batch, slot, rows in plan.rows():
            if slot.radius is None:
                continue
            if batch.learned is not None and batch not in factors:
                factors[batch] = batch.learned.last_factors()
            check_memory(slot.radius, f"the state 'radius' of {slot.label}")
            drift = _last_drift(
                batch, slot, rows, factors.get(batch), plan.arriving.get((slot.owner, slot.piece.first))
            )
            found.setdefault(slot.owner, []).append((slot.piece.first, drift))
    # Of one tensor in several batches they do not come in the order of its layers.
    ordered = {param: sorted(parts, key=lambda part: part[0]) for param, parts in found.items()}
    drifts = {param: torch.cat([each for _, each in parts]) for param, parts in ordered.items() if param in names}
    drifts |= _gathered(drifts, [param for group, _, param in labelled(groups) if rotates(param, group)], groups)
    known = {names[param]: drifts[param] for param in names if param in drifts}
    return NormDrifts(known, "as the last step found them", _parts(groups, names))


def _parts(groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> dict[str, LayerNames]:
    """What the layers of rotating tensors are called, by the names of these."""
    return {
        names[param]: LayerNames(cut_of(param, group["chunks"], label), group.get("chunk_names"))
        for group, label, param in labelled(groups)
        if param in names and rotates(param, group)
    }


def _gathered(
    drifts: Mapping[Tensor, Tensor], params: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, Tensor]:
    """The drifts of tensors whose layers are shared out as a whole, on every process those of all layers."""
    chunks = {param: group["chunks"] for group, _, param in labelled(groups)}
    shared = []
    for param in params:
        if not is_sharded(param) or is_elsewhere(param):
            continue
        cut = cut_of(param, chunks[param], "")
        sharding = sharding_of(param, cut, "")
        if sharding.whole:
            over = tuple(param.device_mesh.get_group(dim) for dim in sharding.whole)
            shared.append((param, cut.layers, sharding.start, over))
    if not shared:
        return {}
    device = scalar_device(local_of(shared[0][0]).device)
    reduction = Reduction([(layers, over) for _, layers, _, over in shared], 1, device)
    parts = reduction.table.fill_(_UNKNOWN).squeeze(1).split([layers for _, layers, _, _ in shared])
    for (param, _, first, _), part in zip(shared, parts, strict=True):
        if param in drifts:
            ours = drifts[param]
            part[first : first + len(ours)] = torch.where(ours.isnan(), _NOTHING, ours)
    reduction.run("max")
    return {param: torch.where(part < -1, math.nan, part) for (param, *_), part in zip(shared, parts, strict=True)}


def _squares(local: Tensor, remainder: Tensor | None, layers: int) -> Tensor:
    """The squared norms of the rows of ``local.reshape(layers, -1)``, (layers,) float64, read block by block."""
    dense = layers_are_dense(local, layers)
    weights, *rest = (
        (memory_order(each) if dense else each).reshape(layers, -1)
        for each in ([local] if remainder is None else [local, remainder])
    )
    block = BLOCK_ON_CPU if local.device.type == "cpu" else BLOCK_ELSEWHERE
    sums = torch.zeros(layers, dtype=torch.float64, device=scalar_device(local.device))
    length = weights.shape[1]
    if length == 0:
        return sums
    height = max(1, block // length)
    for row in range(0, layers, height):
        for column in range(0, length, block):
            part = slice(row, row + height), slice(column, column + block)
            values = join(weights[part], rest[0][part]) if rest else weights[part]
            sums[part[0]] += values.to(sums.device).double().square().sum(1)
    return sums


def _present(group: Mapping[str, Any], label: str, param: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, Sharding]:
    """What this process adds to the squared norms and radii of a tensor's layers, (layers, 2), and who else does."""
    check_memory(param, label)
    cut = cut_of(param, group["chunks"], label)
    local, sharding = local_of(param).detach(), sharding_of(param, cut, label, know_all=True)
    remainder = state.get("remainder")
    if remainder is not None:
        remainder = placed(remainder, param) if fits(remainder, param, group) else None
    table = torch.zeros(cut.layers, 2, dtype=torch.float64, device=scalar_device(local.device))
    for piece in sharding.pieces:
        part = piece.of(local)
        if part.numel() > 0:
            rest = None if remainder is None else piece.of(remainder)
            table[piece.first : piece.first + piece.layers, 0] = _squares(part, rest, piece.layers)
    radius = state.get("radius")
    if radius is None:
        return table, sharding
    first = 0
    if is_sharded(param):
        own = sharding_of(param, cut, label)
        first = own.start
        radius = placed(radius, param, radius_placements(param, own))
        coordinate = param.device_mesh.get_coordinate() or ()
        several = [dim for dim, each in enumerate(param.placements) if not each.is_replicate() and dim not in own.whole]
        if any(coordinate[dim] > 0 for dim in several):
            # Where all know a radius, one of them says so.
            return table, sharding
    table[first : first + len(radius), 1] = radius.to(table.device)
    return table, sharding


def present_drifts(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any], names: Mapping[Tensor, str]
) -> NormDrifts:
    """Of the weights as they are, in one pass over them; all processes that share tensors call it together."""
    asked = [
        (group, label, param)
        for group, label, param in labelled(groups)
        if rotates(param, group)
        and not is_elsewhere(param)
        and (is_sharded(param) or state.get(param, {}).get("radius") is not None)
    ]
    tables = [_present(group, label, param, state.get(param, {})) for group, label, param in asked]
    if any(sharding.groups for _, sharding in tables):
        layout = [(len(table) if sharding.groups else 0, sharding.groups) for table, sharding in tables]
        reduction = Reduction(layout, 2, tables[0][0].device)
        parts = reduction.table.split([rows for rows, _ in layout])
        for part, (table, _) in zip(parts, tables, strict=True):
            part.copy_(table[: len(part)])
        reduction.run()
        for part, (table, _) in zip(parts, tables, strict=True):
            table[: len(part)] = part.to(table.device)
    drifts = {}
    for (group, _, param), (table, _) in zip(asked, tables, strict=True):
        n2, radius = table.unbind(1)
        drift = n2.sqrt() / radius - 1
        known = (radius > 0) & (group["radius"] != "current")
        drifts[names[param]] = torch.where(known, torch.where(drift.isfinite(), drift, math.inf), math.nan)
    return NormDrifts(drifts, "as the weights are now", _parts(groups, names))
