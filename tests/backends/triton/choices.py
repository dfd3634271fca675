"""Tile sizes and warps that a chooser may pick, and what they are compiled with; test_choices.py runs and judges them.

``python -m tests.backends.triton.choices FOLDER`` compiles a table of pairs ahead of time and prints reports as JSON.
It is a process of its own for the same reason as compile_worker.py, and needs no GPU.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from layca_fast.backends.triton.launches import measure_launch, rotate_launch
from layca_fast.formulas.bases import FORMULAS

from ...pairs import table_of_pairs
from ..cpu.support import states_read

#: Elements of a tile, and warps, with the committed choice as the last. A thread of a warp of 32 has 4 or 8 elements of
#: each array. With 16 (2048 in 4 warps, 4096 in 8) formulas of three states take up to 255 registers and spill, and so
#: they do where 16 warps leave a thread no more than 128; AMD's compiler then spills scalar registers.
CHOICES = ((1024, 4), (1024, 8), (2048, 8))

#: Of no state, of one and a gradient that is read twice, of two, and of three.
CHOSEN = ("sgd", "sgd_nesterov", "adam", "rmsprop_centered_momentum")

#: Of NVIDIA's and AMD's GPUs for training.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")

VERBS = ("measure", "rotate")


@dataclass(frozen=True)
class Compiled:
    """One kernel of the table."""

    formula: str
    types: str
    verb: str
    choice: tuple[int, int]
    target: str

    def __str__(self) -> str:
        tile, warps = self.choice
        return f"{self.verb}({self.formula}, {self.types}) of {tile} in {warps} warps for {self.target}"


def table() -> list[Compiled]:
    """Any two of formula, types, verb, choice and target meet in one of them."""
    lists = (CHOSEN, ("float32", "bfloat16+remainder"), VERBS, CHOICES, TARGETS)
    rows = list(product(*map(range, map(len, lists))))
    taken = table_of_pairs([[(str(place), choice) for place, choice in enumerate(row)] for row in rows])
    return [Compiled(*(of[i] for of, i in zip(lists, rows[number], strict=True))) for number in sorted(taken)]


def _expected(each: Compiled, threads: int) -> dict[str, int]:
    """Vectors of 16 bytes that a thread loads and stores; of 16-bit numbers it may have too few for one."""
    formula, (tile, _) = FORMULAS[each.formula], each.choice
    weights = [2, 2] if "remainder" in each.types else [4]
    grad, states = weights[0], len(formula.states)
    if each.verb == "measure":
        loads, stores = [*weights, grad, *[4] * states], [4] * states
    else:
        loads, stores = [*weights, *[grad] * formula.reads_grad, *[4] * states_read(formula)], weights
    return {
        "loads": sum(tile // threads * size // 16 for size in loads),
        "stores": sum(tile // threads * size // 16 for size in stores),
    }


def divisions(kernel: Any) -> list[str]:
    """Divisions of 64-bit integers: of Triton's tensors, of LLVM's optimized code, and of PTX."""
    found = re.findall(r"arith\.(?:div|rem)[su]i.*tensor<\S*xi64\S*>", kernel.asm["ttgir"])
    # By a power of two that it knows, the code generator shifts.
    found += re.findall(r"\b[su](?:div|rem) i64 %\w+, (?!(?:2|4|8|16),).*", kernel.asm["llir"])
    return found + re.findall(r"\b(?:div|rem)\.[su]64.*", kernel.asm.get("ptx", ""))


def reports() -> Iterator[tuple[str, dict[str, Any]]]:
    from triton.backends.compiler import GPUTarget

    from . import compile_worker as worker

    targets = {**worker.TARGETS, "sm_100": GPUTarget("cuda", 100, 32), "gfx950": GPUTarget("hip", "gfx950", 64)}
    floats = worker.Types(torch.float32, torch.float32, torch.float32)
    halves = worker.Types(torch.bfloat16, torch.bfloat16, torch.float32, compensated=True)
    for each in table():
        (tile, warps), target = each.choice, targets[each.target]
        batch = worker.batch_of(each.formula, floats if each.types == "float32" else halves, tile)
        launch = (measure_launch if each.verb == "measure" else rotate_launch)(batch)
        kernel = worker.compile_for(target, replace(launch, warps=warps))
        report = worker.cuda_report(kernel) if target.backend == "cuda" else worker.amd_report(kernel)
        (lanes,) = set(re.findall(r'"ttg.threads-per-warp" = (\d+)', kernel.asm["ttgir"]))
        wave = re.findall(r"\.wavefront_size:\s*(\d+)", kernel.asm.get("amdgcn", ""))
        threads = warps * target.warp_size
        more = {"divisions": divisions(kernel), "lanes": [int(lanes), *map(int, wave)]}
        yield str(each), {**report, **more, "expected": _expected(each, threads), "warp": target.warp_size}


if __name__ == "__main__":
    print(json.dumps(dict(reports())))
    sys.exit(0)
