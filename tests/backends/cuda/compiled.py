"""What nvcc made of the CUDA kernels, read from the module; ``python -m tests.backends.cuda.compiled`` prints it."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from layca_fast.formulas.bases import FORMULAS
from layca_fast.state.native import import_native

from ..cpu.support import ROOT, as_json_lines, disassembly, resource_usage

COMMITTED = ROOT / "tests" / "backends" / "cuda" / "resources.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
#: What kernels are compiled for, by the mangled name: 16-bit parameters have one for all combinations of types.
DTYPES = {"f": "float32", "d": "float64", "NS0_6HalvesE": "halves"}


@dataclass(frozen=True)
class Kernel:
    """One entry of the module, by what its mangled name says."""

    verb: str
    formula: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.verb}({', '.join(filter(None, (self.formula, self.dtype)))})"


@cache
def cuobjdump() -> str | None:
    """NVIDIA's program that reads compiled code: on the PATH, or the one in Triton's package."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return str(triton.knobs.nvidia.cuobjdump.path)


@cache
def module_file() -> Path | None:
    module, _ = import_native("cuda")
    return None if module is None else Path(str(module.__file__))


@cache
def nvcc() -> str:
    """The version of the compiler that is here; another one may use other registers."""
    if shutil.which("nvcc") is None:
        return "none"
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V(\d+\.\d+\.\d+)", said)[0]


def mangled_formulas() -> dict[str, str]:
    """The formulas by what their C++ types are called in mangled names; both lists are in the order of base_steps.h."""
    module, _ = import_native("cuda")
    assert module is not None
    text = (ROOT / "csrc" / "base_steps.h").read_text(encoding="utf-8")
    (listed,) = re.findall(r"using Formulas = FormulaList<([^;]*)>;", text)
    types = re.findall(r"(\w+)(?:<([^>]*)>)?", listed)
    flags = {"true": "Lb1E", "false": "Lb0E", "": ""}
    names = [name + "".join(flags[flag.strip()] for flag in arguments.split(",")) for name, arguments in types]
    return dict(zip(names, module.formulas, strict=True))


def kernel_of(mangled: str, formulas: dict[str, str]) -> Kernel:
    """From ``_ZN5layca4cuda7measureINS_4AdamILb1EEEfEEv...``, or ``...INS_4LionEdEEv...``."""
    verb, length, rest = re.findall(r"^_ZN5layca4cuda\d+([a-z]+)INS_(\d+)(\w+)", mangled)[0]
    name, rest = rest[: int(length)], rest[int(length) :]
    arguments, dtype = re.findall(rf"^(?:I((?:Lb[01]E)+)E)?E({'|'.join(DTYPES)}|)E", rest)[0]
    return Kernel(verb, formulas[name + arguments], DTYPES.get(dtype, ""))


def every_kernel() -> set[Kernel]:
    """Those that the module must have."""
    kernels = {
        Kernel(verb, name, dtype)
        for verb in ("measure", "finish", "rotate")
        for name in FORMULAS
        for dtype in DTYPES.values()
    }
    return kernels | {Kernel("prepare", name, "") for name, formula in FORMULAS.items() if formula.counts_steps}


def usage() -> dict[Kernel, dict[str, dict[str, int]]]:
    """Registers and memory of each kernel, by architecture."""
    program, file, formulas = cuobjdump(), module_file(), mangled_formulas()
    assert program is not None
    assert file is not None
    found: dict[Kernel, dict[str, dict[str, int]]] = {}
    for (function, architecture), numbers in resource_usage(program, file).items():
        found.setdefault(kernel_of(function, formulas), {})[architecture] = numbers
    return found


def moves(architecture: str) -> dict[Kernel, list[str]]:
    """The loads and stores, with all their modifiers, in the machine code of each kernel."""
    program, file, formulas = cuobjdump(), module_file(), mangled_formulas()
    assert program is not None
    assert file is not None
    code = disassembly(program, file, architecture)
    return {kernel_of(name, formulas): re.findall(r" ((?:LD|ST)[A-Z]?\.?\S*)", text) for name, text in code.items()}


def registers() -> dict[str, dict[str, int]]:
    """What is committed: registers by kernel and architecture."""
    return {
        str(kernel): {architecture: numbers[architecture]["REG"] for architecture in ARCHITECTURES}
        for kernel, numbers in sorted(usage().items(), key=lambda entry: str(entry[0]))
    }


def committed() -> dict[str, Any]:
    """The table in the repository, with the version of nvcc that it is true of."""
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(as_json_lines({"nvcc": nvcc()}, "registers", registers().items()))
