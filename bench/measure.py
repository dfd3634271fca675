"""``measure``: every provider of a base on one model, as rows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .plan import free_memory, in_batches, release_memory, sift
from .providers import Provider, providers, yardstick
from .rows import Row, environment, quartiles, round_ratios
from .runner import COPY, Contestant, Copy, Model, Timer, interleave, seconds_of
from .shapes import Shape

NO_TIMES = dict.fromkeys(
    ("median_ms", "q1_ms", "q3_ms", "ratio_median", "ratio_q1", "ratio_q3", "gb_per_s", "copy_fraction")
)


def _batch_rows(
    batch: Sequence[Provider], model: Model, rounds: int, limit: float, timer: Timer, common: dict[str, Any]
) -> list[Row]:
    """One interleaved run of ``batch``, the copy's row first."""
    entries: dict[str, Contestant | Copy] = {COPY: Copy(model)}
    entries.update({each.name: Contestant(each, model) for each in batch})
    seconds = interleave(entries, model, rounds, limit, timer)
    quarters = {name: quartiles(times) for name, times in seconds.items()}
    speeds = {name: entries[name].bytes_moved / middle / 1e9 for name, (_, middle, _) in quarters.items()}
    packages = {each.name: each.package_version for each in batch}
    unit = common["yardstick"]
    rows = []
    for name, times in seconds.items():
        first, middle, third = quarters[name]
        ratio_q1, ratio_median, ratio_q3 = round_ratios(times, seconds[unit])
        rows.append(
            Row(
                **common,
                provider=name,
                median_ms=1e3 * middle,
                q1_ms=1e3 * first,
                q3_ms=1e3 * third,
                rounds=len(times),
                ratio_median=ratio_median,
                ratio_q1=ratio_q1,
                ratio_q3=ratio_q3,
                bytes_per_parameter=entries[name].bytes_per_parameter,
                gb_per_s=speeds[name],
                copy_fraction=speeds[name] / speeds[COPY],
                skipped="",
                package=packages.get(name, f"torch {torch.__version__}"),
            )
        )
    return rows


def measure(
    base: str,
    name: str,
    shapes: Sequence[Shape],
    rounds: int,
    device: torch.device,
    *,
    limit: float = math.inf,
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
    only: Sequence[Provider] | None = None,
    timer: Timer = seconds_of,
    tell: Callable[[str], object] = print,
) -> list[Row]:
    """A row of each provider of ``base`` (``only``: of these) and of a copy on tensors of ``shapes``, called ``name``.

    Interleaved in ``rounds`` rounds, fewer after ``limit`` seconds (:func:`bench.runner.interleave`); ``timer`` says
    what of a step is timed. Where memory does not hold all of them at once, in batches: a later batch's yardstick and
    copy serve its ratios but get no rows. Those that do not run get a row that says why. AssertionError if a provider
    does not move the weights as it must.
    """
    candidates = list(only or providers(base, device))
    parameters = sum(map(math.prod, shapes))
    skipped = sift(candidates, len(shapes), quick)
    if dtype != torch.float32:
        skipped.update({each.name: "it is written for float32" for each in candidates if each.only_float32})
    running = [each for each in candidates if each.name not in skipped]
    batches, too_large = in_batches(running, base, parameters, dtype.itemsize, free_memory(device))
    skipped.update(too_large)
    common = {
        **environment(device),
        "model": name,
        "tensors": len(shapes),
        "parameters": parameters,
        "base": base,
        "dtype": str(dtype).removeprefix("torch."),
        "yardstick": yardstick(base),
    }
    rows: dict[str, Row] = {}
    model = Model(shapes, device, dtype) if batches else None
    for batch in batches:
        assert model is not None
        tell(f"{name}, {base}: {rounds} rounds of {', '.join(each.name for each in batch)}")
        for row in _batch_rows(batch, model, rounds, limit, timer, common):
            rows.setdefault(row.provider, row)
        # The states of this batch would crowd out the next.
        release_memory(device)
    for each in candidates:
        if each.name in skipped:
            moved = each.bytes_per_parameter * dtype.itemsize / 4
            why = {"skipped": skipped[each.name], "package": each.package_version}
            rows[each.name] = Row(**common, **NO_TIMES, provider=each.name, rounds=0, bytes_per_parameter=moved, **why)
    order = [COPY, *(each.name for each in candidates)]
    return [rows[who] for who in order if who in rows]
