"""The bare loop: what a step takes if a loop does nothing else, in C++ that is compiled when it is first used.

The limit that FusedLayca's CPU backend is held against: the same arithmetic on the same addresses, float32 only, for
the same instruction set and on as many threads, with no care for anything (``bare.cpp``).
"""

import ctypes
import math
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from layca_fast import backends
from layca_fast.state.layout import is_vector

from .by_hand import BETAS, BUFFERS, EPS, MOMENTUM, RATE, Step

SOURCE = Path(__file__).with_name("bare.cpp")

#: Those of the package's kernels (csrc/CMakeLists.txt), with the sums in any order.
COMPILE = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math")
COMPILE += ("-fno-signed-zeros",)


class Options(ctypes.Structure):
    """As bare.cpp has it."""

    _fields_ = (
        ("lr", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("momentum", "beta1", "beta2", "over_correction1")),
        *((name, ctypes.c_float) for name in ("over_root_correction2", "eps")),
    )


def missing() -> str:
    """Why there is no bare loop here; "" where there is one."""
    status = backends()["cpu"]
    if not status.available:
        return f"it stands beside the CPU backend, which is missing: {status.reason}"
    if platform.system() != "Linux" or shutil.which("g++") is None:
        return "it is compiled by g++ on Linux"
    return ""


@cache
def _library() -> ctypes.CDLL:
    """Compiled for the instruction set that our kernels run with here."""
    instructions = import_module("layca_fast._cpu").instruction_sets[0]
    march = () if instructions == "baseline" else (f"-march={instructions.replace('_64_', '-64-')}",)
    with tempfile.TemporaryDirectory() as folder:
        made, library = Path(folder, "bare.o"), Path(folder, "bare.so")
        subprocess.run(["g++", *COMPILE, *march, "-c", str(SOURCE), "-o", str(made)], check=True)
        # Without OpenMP's library, as our kernels: it takes the functions, and so the threads, that torch has loaded.
        subprocess.run(["g++", "-shared", str(made), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def bare_step(base: str, rotate: bool) -> Callable[[Sequence[Tensor]], Step]:
    """A step that turns what is no vector by atan(RATE), or, without ``rotate``, takes the plain step of ``base``."""

    def make(params: Sequence[Tensor]) -> Step:
        states = [[torch.zeros_like(param) for param in params] for _ in range(BUFFERS[base])]
        rows = []
        for index, param in enumerate(params):
            assert param.grad is not None
            assert param.dtype == torch.float32
            state = [each[index].data_ptr() for each in states] + [0, 0]
            turns = rotate and not is_vector(param)
            rows.append((param.data_ptr(), param.grad.data_ptr(), *state[:2], param.numel(), int(turns)))
        table = torch.tensor(rows, dtype=torch.int64)
        step_all = getattr(_library(), f"bare_{base}")
        options = Options(RATE, MOMENTUM, *BETAS, 1.0, 1.0, EPS)
        kept = (states, list(params))
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1
            options.over_correction1 = 1 / (1 - BETAS[0] ** steps)
            options.over_root_correction2 = 1 / math.sqrt(1 - BETAS[1] ** steps)
            address, count = ctypes.c_void_p(table.data_ptr()), ctypes.c_int64(len(kept[1]))
            step_all(address, count, ctypes.byref(options), torch.get_num_threads())

        return step

    return make
