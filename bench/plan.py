"""Which providers run on a model, in which batches, and why the others do not."""

import gc
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .providers import MOST_TENSORS, Provider, yardstick
from .runner import LARGEST_COPY

#: Of the memory that is free, how much a measurement may take.
MEMORY_SHARE = 0.9


def release_memory(device: torch.device) -> None:
    """Give back what nothing uses any more: optimizers hold reference cycles through their hooks, and torch keeps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on ``device``; half of the machine's where its system does not tell."""
    release_memory(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def sift(candidates: Sequence[Provider], tensors: int, quick: bool) -> dict[str, str]:
    """Why candidates do not run on a model of so many tensors, by name."""
    reasons = {}
    for each in candidates:
        if each.skipped:
            reasons[each.name] = each.skipped
        elif each.slow_to_compile and tensors > MOST_TENSORS:
            reasons[each.name] = f"compiles one graph over all tensors: minutes, beyond {MOST_TENSORS} of them"
        elif each.slow_to_compile and quick:
            reasons[each.name] = "compiles one graph over all tensors, for a minute: not in the quick run"
    return reasons


def in_batches(
    candidates: Sequence[Provider], base: str, parameters: int, itemsize: int, free: int
) -> tuple[list[list[Provider]], dict[str, str]]:
    """Batches of providers that fit into ``free`` bytes together; and who fits in none, with the reason.

    The yardstick is in every batch, so that ratios come from interleaved rounds even where one batch is not enough.
    """
    first = next(each for each in candidates if each.name == yardstick(base))
    # Weights and gradients, and the copy's two buffers.
    shared = 2 * parameters + 2 * min(parameters, LARGEST_COPY)

    def needed(batch: Sequence[Provider]) -> float:
        own = (sum(each.state for each in batch) + max(each.scratch for each in batch)) / 4
        return itemsize * (shared + own * parameters)

    batches: list[list[Provider]] = [[first]]
    skipped: dict[str, str] = {}
    for each in candidates:
        together = [first] if each is first else [first, each]
        if needed(together) > MEMORY_SHARE * free:
            names = " and ".join(one.name for one in reversed(together))
            skipped[each.name] = (
                f"{names} take {needed(together) / 1e9:.1f} GB, and {MEMORY_SHARE:.0%} of the "
                f"{free / 1e9:.1f} GB of memory that are free may be taken"
            )
        elif each is not first:
            if needed([*batches[-1], each]) > MEMORY_SHARE * free:
                batches.append([first])
            batches[-1].append(each)
    return ([] if first.name in skipped else batches), skipped
