"""Hands csrc/ to CMake and Ninja. What cannot be built is left out, and ``layca_fast/_build.json`` says why.

LAYCA_REQUIRE_NATIVE=1 makes a native module that cannot be built an error. The CUDA module is wanted where there is a
CUDA compiler; LAYCA_CUDA=OFF does without it, LAYCA_CUDA=ON wants it everywhere, and LAYCA_CUDA=APART leaves it to the
distribution of its own that release/cuda/ makes by what stands here. It is compiled for the GPUs that this machine has;
LAYCA_CUDA_ARCHITECTURES names others ("90", "80;90"), or "all" of them, as a wheel needs them. LAYCA_OPENMP=OFF builds
kernels that run on one thread.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

#: The native modules, by the name of the backend that each serves.
MODULES = {"cpu": "layca_fast._cpu", "cuda": "layca_fast._cuda"}

SOURCE = Path(__file__).parent.resolve() / "csrc"

REQUIRED = os.environ.get("LAYCA_REQUIRE_NATIVE", "0") not in ("", "0")
CUDA = os.environ.get("LAYCA_CUDA", "AUTO").upper()
if CUDA not in ("AUTO", "ON", "OFF", "APART"):
    raise SystemExit(f"LAYCA_CUDA={CUDA}: choose ON, OFF, AUTO or APART")
ARCHITECTURES = os.environ.get("LAYCA_CUDA_ARCHITECTURES", "").replace(",", ";").lower()
if not re.fullmatch(r"(all|\d{2,3}(;\d{2,3})*)?", ARCHITECTURES):
    raise SystemExit(f"LAYCA_CUDA_ARCHITECTURES={ARCHITECTURES}: choose all, or numbers such as 90 or 80;90")
#: The oldest GPUs that the kernels run on.
OLDEST = 80


def tool(name: str, folder: str) -> str:
    """The program of the Python package ``name``; otherwise the one on PATH. FileNotFoundError if there is neither."""
    suffix = ".exe" if os.name == "nt" else ""
    try:
        program = Path(getattr(import_module(name), folder)) / (name + suffix)
    except (ImportError, AttributeError):
        program = None
    found = str(program) if program is not None and program.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} was not found: pip install {name}")
    return found


def first_error(log: str) -> str:
    """The error that a build's output reports first, on one line. What comes after it is mostly a consequence."""
    lines = log.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            # Where in CMake's own files it was raised, in a folder that has vanished, helps nobody.
            message = ["CMake Error:"] if line.endswith("(message):") else [line]
            for below in lines[i + 1 :]:
                # What follows is the output of a failed trial of the compiler, line by line.
                if (below and not below.startswith(" ")) or "with the following output" in below:
                    break
                message.append(below.strip())
            return " ".join(filter(None, message))
        if "error:" in line:
            return line.strip()
    return lines[-1] if lines else "no output"


def run(*command: str) -> None:
    """Run a command and pass its lines on; RuntimeError with the first error that it reported if it fails."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    if process.returncode != 0:
        raise RuntimeError(first_error("".join(lines)))


def gpus_here() -> list[str]:
    """The compute capabilities of this machine's GPUs that the kernels run on, as 90 for 9.0; empty if none is seen."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        # A driver in trouble may never answer.
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", said, re.MULTILINE)}
    return [str(number) for number in sorted(found) if number >= OLDEST]


def architectures() -> list[str]:
    """What CMake is told of the GPUs to compile for; nothing means all.

    All where no GPU is seen: the module is then for another machine (an image is built, or a login node of a cluster
    installs it), and one for the wrong GPUs would import there and fail at the first step.
    """
    chosen = ARCHITECTURES or ";".join(gpus_here())
    return [] if chosen in ("", "all") else [f"-DLAYCA_CUDA_ARCHITECTURES={chosen}"]


def unwanted(backend: str) -> str | None:
    """Why a backend's module is not even tried, or None."""
    if backend != "cuda" or CUDA == "ON":
        return None
    if CUDA == "APART":
        return "it comes as a package of its own: pip install layca_fast_cuda"
    if CUDA == "OFF":
        return "LAYCA_CUDA=OFF was set at installation, as make does where it sees no GPU"
    if os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return None
    return "there was no CUDA compiler at installation: put nvcc on the PATH, or name it in CUDACXX"


def build(backend: str, target: str, module: Path) -> None:
    """Build one CMake target and put it at ``module``. Raises OSError, ImportError or RuntimeError if it fails."""
    pybind11 = import_module("pybind11")
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    # A build folder that is kept remembers the tools of an isolated environment that has vanished.
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "module"
        run(
            cmake,
            *("-S", str(SOURCE), "-B", folder, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            # A CUDA compiler that does not work costs the CUDA module only.
            f"-DLAYCA_CUDA={'ON' if backend == 'cuda' else 'OFF'}",
            f"-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP={'ON' if os.environ.get('LAYCA_OPENMP') == 'OFF' else 'OFF'}",
            *(architectures() if backend == "cuda" else ()),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        run(cmake, "--build", folder, "--target", target)
        (built,) = output.iterdir()
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, module)


class BuildNative(build_ext):
    """Builds each native module with CMake and notes the reasons for those that are missing."""

    #: By the name of the backend that each serves.
    modules = MODULES
    #: Whether what runs without a module is told why it is missing.
    noted = True

    def run(self) -> None:
        """Build into build_lib and, for an editable install, copy from there into the source tree."""
        self.reasons: dict[str, str | None] = {}
        (package,) = {name.rpartition(".")[0] for name in self.modules.values()}
        folders = {Path(self.build_lib, package)}
        if self.inplace:
            folders.add(Path(self.get_finalized_command("build_py").get_package_dir(package)))
        for folder in folders:
            for name in self.modules.values():
                for old in folder.glob(name.rpartition(".")[2] + ".*.*"):
                    old.unlink()
        super().run()
        for folder in folders if self.noted else ():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build.json").write_text(json.dumps(self.reasons, indent=2) + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        """Build one module, or note why that failed."""
        backend = next(key for key, name in self.modules.items() if name == ext.name)
        self.reasons[backend] = unwanted(backend)
        if self.reasons[backend] is not None:
            return
        try:
            build(backend, ext.name.rpartition(".")[2], Path(self.get_ext_fullpath(ext.name)))
        except (OSError, ImportError, RuntimeError) as error:
            if REQUIRED:
                raise
            self.reasons[backend] = f"{type(error).__name__}: {error}" if not str(error) else str(error)
            print(f"layca_fast is installed without its {backend} backend: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """The modules that were built, not those that were wanted."""
        return [path for path in super().get_outputs() if Path(path).exists()]


# Builders run this file as the main program.
if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, sources=[], optional=True) for name in MODULES.values()],
        cmdclass={"build_ext": BuildNative},
    )
