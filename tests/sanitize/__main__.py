"""``python -m tests.sanitize``: the native code under sanitizers. Ends with 0 where none of them reports anything.

address: AddressSanitizer and UndefinedBehaviorSanitizer on the step driver, on a stress of threads, and, preloaded into
Python, on the CPU module and the emulator of the CUDA kernels while tests/fuzz runs on them. thread: ThreadSanitizer on
the stress of threads, in a build whose teams are the standard library's, as it does not understand OpenMP's, and on the
emulator, each of whose GPU's threads it takes for one of the host's.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pybind11

from layca_fast.formulas.bases import FORMULAS

from ..backends.cpu.support import ROOT, keep_formulas, tool

KINDS = {
    "address": ("step_driver", "stress_driver", "_cpu", "_cuda_emulator"),
    "thread": ("stress_driver", "race_driver"),
}

#: What --short builds: formulas of no states and of three, with steps that are made again and steps that are kept.
FEW = {"sgd": "Sgd", "adam_amsgrad": "Adam<true>"}

OPTIONS = {
    # Python and torch keep memory until the end of the process.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def run(command: Sequence[str | Path], **more: str) -> None:
    print("  ", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env={**os.environ, **OPTIONS, **more})


def build(kind: str, folder: Path, formulas: Mapping[str, str] | None) -> None:
    """Build the targets of a kind in ``folder``; ``formulas``: only these, by name, with their C++ types."""
    source = ROOT / "csrc"
    if formulas is not None:
        source = folder / "csrc"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", source)
        keep_formulas(source, *formulas.values())
    options = [f"-DLAYCA_SANITIZE={kind}", "-DLAYCA_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    for command in (["-S", source, "-B", folder, *options], ["--build", folder, "--target", *KINDS[kind]]):
        subprocess.run([tool("cmake"), *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def library(name: str) -> str:
    """A library of the compiler, to preload."""
    found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def check(kind: str, folder: Path, short: bool) -> None:
    formulas = FEW if short else None
    print(f"==> Building for the {kind} sanitizer{'' if short else ' (minutes)'}", flush=True)
    build(kind, folder, formulas)
    for formula in formulas or FORMULAS:
        if kind == "address":
            run([folder / "step_driver", formula])
        run([folder / "stress_driver", formula, "6" if short else "60"])
        if kind == "thread":
            run([folder / "race_driver", formula])
    if kind != "address":
        return
    # C++'s own library must be there when the sanitizer looks for what throws.
    preload = f"{library('libasan.so')} {library('libubsan.so')} {library('libstdc++.so')}"
    (module,), (emulator,) = folder.glob("_cpu.*.so"), folder.glob("_cuda_emulator.*.so")
    fuzzed = ["--formulas", *FEW] if short else []
    for modules, steps in (([module], "200" if short else "5000"), ([module, emulator], "100" if short else "2000")):
        under = [sys.executable, "-m", "tests.sanitize.under", *modules, "--", "--steps", steps, *fuzzed]
        run(under, LD_PRELOAD=preload)


def main(argv: Sequence[str] | None = None) -> int:
    """Build and run; 1 where a sanitizer has reported something, which is then in the output."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {list(KINDS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="fewer steps, rounds and formulas")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sanitize", help="where to build")
    args = parser.parse_args(argv)
    unknown = set(args.kinds) - set(KINDS)
    if unknown:
        parser.error(f"{sorted(unknown)}: choose of {list(KINDS)}")
    for kind in args.kinds or KINDS:
        folder = args.folder / (f"{kind}-short" if args.short else kind)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            check(kind, folder, args.short)
        except subprocess.CalledProcessError as error:
            print(f"the {kind} sanitizer, or what ran under it, failed: {error}", file=sys.stderr)
            return 1
    print("no sanitizer reported anything")
    return 0


if __name__ == "__main__":
    sys.exit(main())
