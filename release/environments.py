"""Environments like a user's: a fresh one, in which no compiler is found, with what was built instead of the tree."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: What is run against an installed package: formulas and the reference, one optimizer's steps on every backend, its
#: state and checkpoints, torch's own names, and whose threads the kernels use.
CORE = (
    *("formulas/test_rules.py", "formulas/test_properties.py", "formulas/test_orthogonal.py"),
    *("optimizer/test_torch_behaviour.py", "optimizer/test_surroundings.py", "optimizer/test_param_groups.py"),
    *("state/test_checkpoints.py", "state/test_foreign_checkpoints.py", "state/test_spread.py"),
    *("step/test_watch.py", "step/test_modes.py", "attach/test_turning.py", "test_compat.py"),
    *("backends/test_equivalence.py", "backends/cpu/test_one_team.py"),
)

#: What these tests are run with.
TOOLS = ("expecttest", "hypothesis", "numpy", "pybind11", "pytest>=8.2", "pytest-timeout", "pytest-xdist")


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Run a command and return what it printed; RuntimeError with all of that if it fails.

    ``environment`` is added to this process's; an empty value takes a variable out.
    """
    # These would change what is built, and what is tested.
    changing = ("LAYCA_CUDA", "LAYCA_REQUIRE_NATIVE", "PYTEST_ADDOPTS")
    kept = {name: value for name, value in os.environ.items() if name not in changing}
    merged = {**kept, **environment}
    merged = {name: value for name, value in merged.items() if value or name not in environment}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=merged, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


class Environment:
    """A virtual environment whose commands find its own programs and nothing else: no compiler, no nvcc, no tree."""

    def __init__(self, folder: Path, python: str) -> None:
        """Make it in ``folder``, of the interpreter ``python``."""
        self.folder, self.python = folder, folder / "bin" / "python"
        run([uv(), "venv", "--quiet", "--clear", "--seed", "--python", python, folder])

    def run(self, *command: str | Path, folder: Path | None = None) -> str:
        """Run the environment's Python with these arguments, in ``folder`` or in its own."""
        words = [self.python, *command]
        path = str(self.folder / "bin")
        where = ["-c", "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"]
        return run(
            [self.python, *where, folder or self.folder, *words],
            PATH=path,
            PYTHONPATH="",
            CXX="",
            CC="",
            CUDACXX="",
            VIRTUAL_ENV="",
        )

    def pip_install(self, *arguments: str | Path) -> None:
        """Install by pip, as a user does."""
        self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)

    def uv_install(self, *arguments: str | Path) -> None:
        """Install by uv, which shares files between environments: for what is large."""
        run([uv(), "pip", "install", "--quiet", "--python", self.python, *arguments])

    def check_installed(self) -> None:
        """RuntimeError unless layca_fast comes from this environment."""
        file = self.run("-c", "import layca_fast; print(layca_fast.__file__)").strip()
        if not Path(file).is_relative_to(self.folder):
            raise RuntimeError(f"layca_fast was imported from {file}, not from {self.folder}")

    def run_core(self, workers: int) -> str:
        """The tests of ``CORE`` against the installed package; returns pytest's last line."""
        apart = self.folder / "apart"
        shutil.rmtree(apart, ignore_errors=True)
        shutil.copytree(ROOT / "tests", apart / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        # Its settings: every warning is an error, deprecations among them.
        shutil.copy(ROOT / "pyproject.toml", apart / "pyproject.toml")
        parallel = ["--numprocesses", str(workers), "--dist", "loadfile", "--timeout", "1800"]
        chosen = [f"tests/{name}" for name in CORE]
        # Hypothesis counts references in a way that Python 3.14 has made wrong, and warns of itself.
        parallel += ["-W", "ignore:It looks like `register_random` was passed an object"]
        said = self.run(
            *("-m", "pytest", "-q", "-m", "not exhaustive and not gpu", "-p", "no:cacheprovider", *parallel, *chosen),
            folder=apart,
        )
        return said.strip().splitlines()[-1].strip("= ")


def uv() -> str:
    """The program uv of this environment, or of the system."""
    here = Path(sys.executable).parent
    found = shutil.which("uv", path=str(here)) or shutil.which("uv")
    if found is None:
        raise FileNotFoundError("uv was not found: pip install uv")
    return found
