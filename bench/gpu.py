"""``make gpu``: build, prove and measure on a machine with an NVIDIA GPU, and write one file of results.

The machine needs Python with torch and Triton, nvcc, CMake and Ninja, and no network. What else Python needs (pybind11,
pytest with pluggy, iniconfig and packaging, hypothesis with sortedcontainers) may lie as wheels in a folder: --wheels.
A part that fails does not stop the others; the exit code is then 1, and the last line names what failed.
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
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]

#: Characters of a part's output that the results keep, from its end.
TAIL = 4000

PYTHON = sys.executable

#: Where CUDA's programs lie if they are not on the PATH.
TOOLKIT = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


@dataclass(frozen=True)
class Part:
    """A command, and the seconds that it may take. ``missing``: why it cannot run here; "" if it can."""

    name: str
    command: Sequence[str]
    limit: float
    missing: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def log(self, folder: Path) -> Path:
        """Where its output goes."""
        return folder / f"{''.join(letter if letter.isalnum() else '_' for letter in self.name)}.log"


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "passed", "failed" or "missing"; the end of its output."""

    name: str
    verdict: str
    seconds: float
    output: str


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels of pure Python in ``folder`` into ``site``, which needs no pip; returns their names."""
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            archive.extractall(site)
    return [wheel.name for wheel in wheels]


def run_part(part: Part, environment: Mapping[str, str], logs: Path) -> Outcome:
    """Run one part, its output in a file; print what became of it."""
    log = part.log(logs)
    if part.missing:
        print(f"==> {part.name}: missing: {part.missing}", flush=True)
        return Outcome(part.name, "missing", 0.0, part.missing)
    start = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                part.command,
                cwd=ROOT,
                env={**environment, **part.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=part.limit,
            )
            code: object = done.returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {part.limit:.0f} seconds"
        except OSError as error:
            code = str(error)
    seconds, tail = time.monotonic() - start, log.read_text(errors="replace")[-TAIL:]
    verdict = "passed" if code == 0 else "failed"
    last = "" if code == 0 else f" ({code})\n{tail}"
    print(f"==> {part.name}: {verdict} in {seconds:.0f} s{last}", flush=True)
    return Outcome(part.name, verdict, seconds, tail if code == 0 else f"{tail}\n{code}")


def run_parts(parts: Sequence[Part], environment: Mapping[str, str], logs: Path, at_once: int = 1) -> list[Outcome]:
    """Run all parts, ``at_once`` of them side by side, whatever becomes of each."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda part: run_part(part, environment, logs), parts))


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
    return Part(f"compute-sanitizer {tool}", command, 200, missing, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def proofs(path: str) -> list[Part]:
    """What shows that the numbers are right, the longest first."""
    finds = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'torch finds no GPU')"
    tests = sorted(str(test.relative_to(ROOT)) for test in (ROOT / "tests").glob("test_gpu_*.py"))
    pytest = [PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--maxfail=20"]
    verify = [PYTHON, "-m", "layca_fast", "verify", "--backend"]
    return [
        # Without it the tests would be skipped, which is no proof.
        Part("torch finds a GPU", [PYTHON, "-c", finds], 60),
        *(
            Part(f"pytest -m gpu -k '{which}' {test}", [*pytest, "-k", which, test], 200)
            for test in tests
            for which in ("triton", "not triton")
        ),
        *(Part(f"verify {backend}", [*verify, backend], 200) for backend in ("torch", "triton", "cuda", "cpu")),
        sanitizer("memcheck", path),
        sanitizer("racecheck", path),
    ]


def first_line(*command: str) -> str:
    """What a command prints first, or last if it is nvcc; "not found" if it does not run."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "not found"
    return said[-1] if command[0] == "nvcc" else said[0]


def facts() -> dict[str, str]:
    """Where and with what this ran."""
    import torch

    from layca_fast import __version__

    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "not installed"
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "gpu": gpu,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": first_line("nvcc", "--version"),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "layca_fast": __version__,
        "commit": first_line("git", "rev-parse", "HEAD"),
    }


def results_file(gpu: str) -> Path:
    """Where the results of this kind of GPU are kept."""
    name = "".join(letter if letter.isalnum() else "_" for letter in gpu.lower())
    return ROOT / "bench" / "results" / f"gpu_{name}.json"


def run_all(environment: Mapping[str, str], folder: Path, measurements: Path) -> list[Outcome]:
    """Every part in its order; what only has to be right runs side by side, what is timed runs alone."""
    done = run_parts(building(folder, environment), environment, folder)
    print(f"Modules: {', '.join(install_modules(folder)) or 'none'}", flush=True)
    # A few threads each: the CPU's part of these is small.
    done += run_parts(proofs(environment["PATH"]), {**environment, "OMP_NUM_THREADS": "2"}, folder, at_once=8)
    benches = Part("benches", [PYTHON, "-m", "bench.gpu_tables", "--out", str(measurements)], 240)
    done += run_parts([benches], environment, folder)
    print(benches.log(folder).read_text(errors="replace"), flush=True)
    return done


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line: what failed, what is missing."""
    by_verdict = {
        verdict: [each.name for each in outcomes if each.verdict == verdict] for verdict in ("failed", "missing")
    }
    said = [f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict.items() if names]
    return "; ".join(said) or "everything passed"


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and write the results; returns 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--wheels", type=Path, help="folder of wheels of pure Python to use beside what is installed")
    parser.add_argument("--out", type=Path, help="JSON file of results (default: bench/results/gpu_NAME.json)")
    args = parser.parse_args(argv)
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
        outcomes = run_all(environment, folder, measurements)
        measured: dict[str, Any] = json.loads(measurements.read_text()) if measurements.exists() else {}
    found = facts()
    out = args.out or results_file(found["gpu"])
    report = {**found, "wheels": wheels, "parts": [asdict(each) for each in outcomes], **measured}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Results: {out}\n{summary(outcomes)}")
    return 1 if any(each.verdict == "failed" for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
