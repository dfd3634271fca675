"""Layer convergence rates: how fast each layer came near its final weights (Which layer is learning faster?)."""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..state.sharding import is_sharded
from .hooks import check_model
from .spectrum import precise


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all parameters, by name; memory of the model, time of copying it off its device.

    Sharded ones (DTensor, FSDP2) are gathered, one at a time, so all processes must call it together; each gets all.
    """
    check_model(model)
    named = ((name, param.detach()) for name, param in model.named_parameters())
    whole = ((name, each.full_tensor() if is_sharded(each) else each) for name, each in named)
    return {name: each.to("cpu", copy=True) for name, each in whole}


def convergence_rate(before: Tensor, after: Tensor, final: Tensor, elapsed: float) -> float:
    """C = ln(|before - final| / |after - final|) / elapsed, of one layer's weights at two times and at the end.

    In the inverse of the unit of ``elapsed`` (steps, epochs); positive while the layer comes nearer. Infinite where
    ``after`` is ``final``, minus infinite where ``before`` is, NaN where both are. One pass over the tensors; memory:
    three copies of a tensor in float64. Raises ValueError for shapes that differ or elapsed <= 0, and TypeError for a
    DTensor, of which a process knows its part.
    """
    if any(is_sharded(each) for each in (before, after, final)):
        raise TypeError("the weights are a DTensor: pass whole tensors, as snapshot(model) or full_tensor() give them")
    if not before.shape == after.shape == final.shape:
        raise ValueError(f"shapes {[tuple(each.shape) for each in (before, after, final)]}: they must be the same")
    if not 0.0 < elapsed < math.inf:
        raise ValueError(f"elapsed={elapsed!r}: must be a finite time > 0 between the two")
    first, second = (float(torch.linalg.vector_norm(precise(each) - precise(final))) for each in (before, after))
    if first == 0 or second == 0:
        return math.nan if first == second else math.copysign(math.inf, first - second)
    return (math.log(first) - math.log(second)) / elapsed


def convergence_rates(
    snapshots: Mapping[float, Mapping[str, Tensor]], final: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """:func:`convergence_rate` of every layer between each two snapshots that follow each other, by name.

    Args:
        snapshots: weights by name (:func:`snapshot`, or a part of it), at two times or more, in any unit and order.
        final: the weights at the end of the training. Its names choose the layers.

    One pass over all snapshots, a layer at a time. Raises ValueError for fewer than two times, and for a name or shape
    that differs.
    """
    times = sorted(snapshots)
    if len(times) < 2:
        raise ValueError(f"snapshots of {len(times)} time(s): a rate needs two or more")
    for time in times:
        for name in final:
            if name not in snapshots[time]:
                raise ValueError(f"the snapshot at {time!r} lacks {name!r}, which final has: take them from one model")
    return {
        name: [
            convergence_rate(snapshots[start][name], snapshots[end][name], weight, end - start)
            for start, end in pairwise(times)
        ]
        for name, weight in final.items()
    }
