"""``make gpu``: build, prove and measure on a machine with an NVIDIA GPU, and write one file of results.

The machine needs Python with torch and Triton, nvcc, CMake and Ninja, and no network. What else Python needs (pybind11,
pytest with pluggy, iniconfig and packaging, hypothesis with sortedcontainers) may lie as wheels in a folder: --wheels.
A part that fails does not stop the others; the exit code is then 1, and the last line names what failed. All of it
together keeps to --minutes: a part for which no time is left has failed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from .parts import ROOT, Deadline, Outcome, Part, run_parts, summary

PYTHON = sys.executable

#: Where CUDA's programs lie if they are not on the PATH.
TOOLKIT = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")

#: Seconds that are kept for what runs after the proofs: the tests that need the GPU's memory for themselves, benches.
FOR_LARGE_TESTS, FOR_BENCHES = 45.0, 150.0

#: Tests that fill much of the GPU's memory.
LARGE_TESTS = "tests/gpu/test_large.py"

PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--maxfail=20")


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels of pure Python in ``folder`` into ``site``, which needs no pip; returns their names."""
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            archive.extractall(site)
    return [wheel.name for wheel in wheels]


def building(folder: Path, environment: Mapping[str, str]) -> list[Part]:
    """Configure once, then each module by itself, so that one that does not build costs only itself."""
    found = subprocess.run(
        [PYTHON, "-m", "pybind11", "--cmakedir"], env=environment, capture_output=True, text=True, check=False
    )
    missing = "" if found.returncode == 0 else "Python finds no pybind11"
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLAYCA_CUDA=ON",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'modules'}",
        f"-DPython_EXECUTABLE={PYTHON}",
        f"-Dpybind11_DIR={found.stdout.strip()}",
    ]
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", *options]
    build = ["cmake", "--build", str(folder), "--target"]
    return [
        Part("configure", configure, 90, missing),
        Part("build _cpu", [*build, "_cpu"], 120, missing),
        Part("build _cuda", [*build, "_cuda"], 240, missing),
    ]


def install_modules(folder: Path) -> list[str]:
    """Put the modules that were built beside the Python code, in place of older ones; returns their names."""
    suffix, installed = sysconfig.get_config_var("EXT_SUFFIX"), []
    for name in ("_cpu", "_cuda"):
        target, built = ROOT / "layca_fast" / (name + suffix), folder / "modules" / (name + suffix)
        target.unlink(missing_ok=True)
        if built.exists():
            shutil.copy2(built, target)
            installed.append(target.name)
    return installed


def sanitizer(tool: str, path: str) -> Part:
    """A few steps under compute-sanitizer."""
    program = shutil.which("compute-sanitizer", path=path)
    missing = "" if program else "compute-sanitizer was not found"
    # What torch asks of its driver in vain, when it starts, is no error of a kernel.
    command = [str(program), "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [PYTHON, "-m", "bench.gpu_small"]
    # torch would take memory in blocks of megabytes, in which no access beyond a tensor is noticed.
    whole_blocks = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(f"compute-sanitizer {tool}", command, 200, missing, whole_blocks, ("Device not supported",))


def halves(test: str) -> tuple[str, ...]:
    """What to select in a file of tests, part by part: where one backend hangs, the others' tests still run."""
    # A selection without any test would count as a failure.
    over_backends = "gpu_backend" in (ROOT / test).read_text(encoding="utf-8")
    return ("triton", "not triton") if over_backends else ("not triton",)


def proofs(path: str) -> list[Part]:
    """What shows that the numbers are right; first what takes longest, under the sanitizer."""
    finds = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'torch finds no GPU')"
    tests = sorted(str(test.relative_to(ROOT)) for test in (ROOT / "tests" / "gpu").glob("test_*.py"))
    verify = [PYTHON, "-m", "layca_fast", "verify", "--backend"]
    devices = {"torch": "cuda", "triton": "cuda", "cuda": "cuda", "cpu": "cpu"}
    return [
        *(sanitizer(tool, path) for tool in ("racecheck", "memcheck", "synccheck")),
        *(
            Part(f"pytest -m gpu -k '{which}' {test}", [*PYTEST, "-k", which, test], 200)
            for test in tests
            if test != LARGE_TESTS
            for which in halves(test)
        ),
        *(
            Part(f"verify {backend}", [*verify, backend, "--device", device], 200)
            for backend, device in devices.items()
        ),
        # Without it the tests would be skipped, which is no proof.
        Part("torch finds a GPU", [PYTHON, "-c", finds], 60),
    ]


def said_by(*command: str, path: str) -> list[str]:
    """The lines that a command on ``path`` prints; "not found" if it does not run or says nothing."""
    try:
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ["not found"]
    return done.stdout.strip().splitlines() or ["not found"]


def _told(fact: Callable[[], str]) -> str:
    # Whatever goes wrong here, the results that took minutes must still be written.
    try:
        return fact()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"


def _version_of(module: str) -> str:
    try:
        return str(import_module(module).__version__)
    except ImportError:
        return "not installed"


def facts(path: str) -> dict[str, str]:
    """Where and with what this ran; programs are looked for on ``path``."""
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found: dict[str, Callable[[], str]] = {
        "date": lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "gpu": _gpu,
        "driver": lambda: said_by(*driver, path=path)[0],
        "nvcc": lambda: said_by("nvcc", "--version", path=path)[-1],
        "torch": lambda: _version_of("torch"),
        "triton": lambda: _version_of("triton"),
        "python": platform.python_version,
        "system": lambda: f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "layca_fast": lambda: _version_of("layca_fast"),
        "commit": lambda: said_by("git", "-C", str(ROOT), "rev-parse", "HEAD", path=path)[0],
    }
    return {name: _told(fact) for name, fact in found.items()}


def results_file(gpu: str) -> Path:
    """Where the results of this kind of GPU are kept."""
    name = "".join(letter if letter.isalnum() else "_" for letter in gpu.lower())
    return ROOT / "bench" / "results" / f"gpu_{name}.json"


def run_all(environment: Mapping[str, str], folder: Path, measurements: Path, deadline: Deadline) -> list[Outcome]:
    """Every part in its order; what only has to be right runs side by side, what is timed or large runs alone."""

    def before_the_last() -> float:
        return deadline.left(FOR_LARGE_TESTS + FOR_BENCHES)

    done = run_parts(building(folder, environment), environment, folder, before_the_last)
    print(f"Modules: {', '.join(install_modules(folder)) or 'none'}", flush=True)
    # A few threads each: the CPU's part of these is small.
    few_threads = {**environment, "OMP_NUM_THREADS": "2"}
    done += run_parts(proofs(environment["PATH"]), few_threads, folder, before_the_last, at_once=8)
    large = Part(f"pytest -m gpu {LARGE_TESTS}", [*PYTEST, LARGE_TESTS], 120)
    done += run_parts([large], environment, folder, lambda: deadline.left(FOR_BENCHES))
    benches = Part("benches", [PYTHON, "-m", "bench.gpu_tables", "--out", str(measurements)], 240)
    done += run_parts([benches], environment, folder, deadline.left)
    print(benches.log(folder).read_text(errors="replace"), flush=True)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and write the results; returns 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--wheels", type=Path, help="folder of wheels of pure Python to use beside what is installed")
    parser.add_argument("--out", type=Path, help="JSON file of results (default: bench/results/gpu_NAME.json)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together (default 8)")
    args = parser.parse_args(argv)
    deadline = Deadline(60 * args.minutes)
    with tempfile.TemporaryDirectory() as temporary:
        folder, measurements = Path(temporary), Path(temporary) / "measurements.json"
        site = folder / "site"
        wheels = unpack_wheels(args.wheels, site) if args.wheels else []
        paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "PATH": os.pathsep.join((os.environ["PATH"], *TOOLKIT)),
        }
        outcomes = run_all(environment, folder, measurements, deadline)
        measured: dict[str, Any] = json.loads(measurements.read_text()) if measurements.exists() else {}
    found = facts(environment["PATH"])
    out = args.out or results_file(found["gpu"])
    report = {**found, "wheels": wheels, "parts": [asdict(each) for each in outcomes], **measured}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Results: {out}\n{summary(outcomes)}")
    return 1 if any(each.verdict == "failed" for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
