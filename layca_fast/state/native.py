"""The compiled modules, ``layca_fast._cpu`` and ``layca_fast._cuda``, or why they are missing."""

import ctypes
import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..version import __version__


def import_native(backend: str) -> tuple[ModuleType | None, str | None]:
    """The module of a backend, or None and the reason why it is missing: what stopped its build, if that is known.

    The module of CUDA kernels also comes as a package of its own, ``layca_fast_cuda``, of the same version.
    """
    try:
        return import_module(f"layca_fast._{backend}"), None
    except ImportError as error:
        if re.search(r"undefined symbol: (omp|GOMP)_", str(error)) and _make_openmp_global():
            return import_native(backend)
        missing = error
    if backend == "cuda":
        try:
            apart = import_module("layca_fast_cuda")
            if apart.__version__ == __version__:
                return import_module("layca_fast_cuda._cuda"), None
        except ModuleNotFoundError:
            pass
        except ImportError as error:
            return None, f"the native module of layca_fast_cuda does not load: {error}"
        else:
            return None, (
                f"layca_fast_cuda {apart.__version__} belongs to another layca_fast than this, {__version__}: "
                f"pip install layca_fast_cuda=={__version__}"
            )
    note = Path(__file__).parents[1] / "_build.json"
    built = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    return None, f"the native module is not there: {built.get(backend) or missing}"


def _make_openmp_global() -> bool:
    """For a torch that runs without OpenMP: make the system's functions global. Whether that made any difference."""
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return False
    try:
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
