"""Where the compiled modules come from, and that they run in a process whose OpenMP they do not find."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import layca_fast
from layca_fast.state import native
from layca_fast.version import __version__

from ..support import HANGS

#: The package without its own __init__, which would import torch, and with it torch's OpenMP.
WITHOUT_TORCH = """
import sys, types
for name in ("layca_fast", "layca_fast.state"):
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = [sys.argv[1] + "/".join(name.split(".")[1:])]
from layca_fast.state.native import import_native
module, reason = import_native("cpu")
print("torch" in sys.modules, module is not None, reason)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the modules are linked to their OpenMP")
def test_the_system_s_openmp_is_taken_where_torch_brings_none() -> None:
    folder = f"{Path(layca_fast.__file__).parent}/"
    command = [sys.executable, "-c", WITHOUT_TORCH, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS)
    assert done.stdout.strip() == "False True None"


def package(version: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for layca_fast_cuda, in place of both it and the module in the tree."""
    apart, module = ModuleType("layca_fast_cuda"), ModuleType("layca_fast_cuda._cuda")
    apart.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "layca_fast._cuda", None)
    monkeypatch.setitem(sys.modules, "layca_fast_cuda", apart)
    monkeypatch.setitem(sys.modules, "layca_fast_cuda._cuda", module)
    return module


def test_the_cuda_module_is_found_in_its_own_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = package(__version__, monkeypatch)
    assert native.import_native("cuda") == (module, None)


def test_a_cuda_module_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package("0.0.1", monkeypatch)
    module, reason = native.import_native("cuda")
    assert module is None
    assert reason is not None
    assert "layca_fast_cuda 0.0.1 belongs to another layca_fast" in reason
    assert f"pip install layca_fast_cuda=={__version__}" in reason
