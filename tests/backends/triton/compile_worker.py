"""Compiles the Triton kernels ahead of time and prints what became of them as JSON; run by test_compile.py.

A process of its own, because TRITON_INTERPRET, which the other tests need, leaves nothing to compile. It needs no GPU.
"""

import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from layca_fast.backends.triton.launches import (
    OPTIONS,
    TILE,
    Launch,
    finish_launch,
    measure_launch,
    prepare_launch,
    rotate_launch,
)
from layca_fast.commands.cases import BASE_OPTIONS
from layca_fast.formulas.bases import BASES, FORMULAS
from layca_fast.state.slot import Slot
from layca_fast.step.batch import Batch

from ..cpu.support import resource_usage, states_read

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.int64: "*i64", torch.float64: "*fp64"}


@dataclass(frozen=True)
class Types:
    """Of parameters, their gradients and their states, and whether the parameters have remainders."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    compensated: bool = False

    @property
    def name(self) -> str:
        types = (str(each).removeprefix("torch.") for each in (self.param, self.grad, self.state))
        return "/".join(types) + "+remainder" * self.compensated


#: Of every formula on every target.
COMMON_TYPES = (Types(torch.float32, torch.float32, torch.float32),)
#: Of every formula on one target.
TYPES = (
    *COMMON_TYPES,
    Types(torch.float64, torch.float64, torch.float64),
    Types(torch.bfloat16, torch.bfloat16, torch.float32, compensated=True),
)
#: Of two formulas on every target: one reads the gradient twice, one keeps more states and counts steps.
ALL_TYPES = (
    *TYPES,
    Types(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    Types(torch.bfloat16, torch.float32, torch.bfloat16, compensated=True),
    Types(torch.float16, torch.float16, torch.float32, compensated=True),
)
WITH_ALL_TYPES = ("sgd_nesterov", "adam")
WITH_ALL_FORMULAS = "sm_90"


def types_of(formula: str, target: str) -> tuple[Types, ...]:
    if formula in WITH_ALL_TYPES:
        return ALL_TYPES
    return TYPES if target == WITH_ALL_FORMULAS else COMMON_TYPES


def batch_of(name: str, types: Types, tile: int = TILE) -> Batch:
    """A batch that the formula called ``name`` runs on, in tiles of so many elements."""
    for options in BASE_OPTIONS:
        base = BASES[options["base"]]
        neutral = {"lr": 0.1, "weight_decay": 0.0, "maximize": False, "radius": "initial", "rule": "layca"}
        group = {**base.options, **options, **neutral}
        if base.formula(group).name == name:
            param = torch.zeros(8, 8, dtype=types.param)
            states = tuple(torch.zeros_like(param, dtype=types.state) for _ in FORMULAS[name].states)
            remainder = torch.zeros_like(param) if types.compensated else None
            radius = torch.zeros(1, dtype=torch.float64)
            step = torch.zeros(()) if FORMULAS[name].counts_steps else None
            slot = Slot(
                param, group, base, "weight", states, step, radius, 1, dense=True, fresh=False, remainder=remainder
            )
            batch = Batch(FORMULAS[name], [slot], tile)
            batch.grad_dtype = types.grad
            return batch
    raise LookupError(f"none of verify.BASE_OPTIONS makes a base run the formula {name!r}: add the options that do")


def launches(target: str) -> Iterator[tuple[str, Launch, dict[str, list[int]]]]:
    """Every launch that is compiled for a target, with what one program should do in all: 16-byte loads and stores of
    each array, and tests for finite values, the latter once in the copy of the code for aligned tiles and once in the
    other.
    """
    for formula in FORMULAS.values():
        for types in types_of(formula.name, target):
            batch = batch_of(formula.name, types)
            param, grad, state = (TILE * each.itemsize // 16 for each in (types.param, types.grad, types.state))
            weight = [param] * (1 + types.compensated)
            states, reads_grad = len(formula.states), formula.reads_grad
            # Gradient, states and step, and what the formula itself tests.
            # The states of an element are asked for together: of three, compilers make one comparison of two. For AMD
            # they compare bits with a register, which cannot be told from other comparisons.
            together = 0 if target.startswith("gfx") else min(states, 2)
            tests = 2 + together + formula.advance.__code__.co_names.count("finite_or_zero")
            measured = {
                "loads": [*weight, grad, *[state] * states],
                "stores": [state] * states,
                "finite": [2 * TILE * tests],
            }
            rotated = {
                "loads": [*weight, *[grad] * reads_grad, *[state] * states_read(formula)],
                "stores": weight,
                "finite": [2 * TILE * (1 + reads_grad)],
            }
            case = f"{formula.name}, {types.name}"
            if formula.counts_steps:
                yield f"prepare({case})", prepare_launch(batch), {}
            yield f"measure({case})", measure_launch(batch), measured
            for sums, coefficients in ((True, False), (False, True), (True, True)):
                name = f"finish({case}, sums={sums}, coefficients={coefficients})"
                yield name, finish_launch(batch, sums=sums, coefficients=coefficients), {}
            yield f"rotate({case})", rotate_launch(batch), rotated


def compile_for(target: GPUTarget, launch: Launch) -> Any:
    """What Triton's own launcher would compile for tables as torch allocates them, at 16-byte addresses."""
    names = launch.kernel.arg_names
    tables = dict(zip(names, launch.tables, strict=False))
    source = ASTSource(
        launch.kernel,
        signature={name: POINTERS[tables[name].dtype] if name in tables else "constexpr" for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(tables))},
    )
    return triton.compile(source, target=target, options={"num_warps": launch.warps, **OPTIONS})


def cuda_report(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ((_, usage),) = resource_usage(triton.knobs.nvidia.cuobjdump.path, Path(file.name)).items()
    text = kernel.asm["ptx"]
    spills = {name: usage[name] for name in ("STACK", "LOCAL")}
    return {
        "registers": usage["REG"],
        "spills": {**spills, "ld.local or st.local": len(re.findall(r"\b(?:ld|st)\.local", text))},
        "loads": len(re.findall(r"\bld\.global\S*\.(?:v4\.[bf]32|v2\.[bf]64)\b", text)),
        "stores": len(re.findall(r"\bst\.global\S*\.(?:v4\.[bf]32|v2\.[bf]64)\b", text)),
        # The exponential of float64 compares a part of its argument by abs.ftz, which loses nothing.
        "inexact": re.findall(r"\b(?!abs\.)\w\S*\.(?:approx|ftz)\b\S*", text),
        # As a comparison of floating-point numbers, or of their bits.
        "finite": len(
            re.findall(r"0f7F800000|0d7FF0000000000000|\b(?:21390950|9218868437227405)(?:39|40|311|312);", text)
        ),
    }


def amd_report(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    counts = {name: int(re.search(rf"\.{name}:\s*(\d+)", text).group(1)) for name in names}
    return {
        "registers": counts.pop("vgpr_count"),
        "spills": counts,
        "loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
        "stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
        # Denormals are flushed unless both bits of these modes are set.
        "inexact": re.findall(r"\.amdhsa_float_denorm_mode_\w+ [012]\b", text),
        "finite": len(re.findall(r"v_cmp_class_f(?:32|64)|0x7f800000|0x7ff00000", text)),
    }


def end_with_input() -> None:
    """However the parent ends, nobody is left to read what would be compiled for minutes."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with_input, daemon=True).start()
    reports = {}
    for target in sys.argv[1:]:
        report = cuda_report if TARGETS[target].backend == "cuda" else amd_report
        for name, launch, program in launches(target):
            threads = launch.warps * TARGETS[target].warp_size
            expected = {what: sum(count // threads for count in counts) for what, counts in program.items()}
            reports[f"{name} for {target}"] = {**report(compile_for(TARGETS[target], launch)), "expected": expected}
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
