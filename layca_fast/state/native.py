"""The compiled modules, ``layca_fast._cpu`` and ``layca_fast._cuda``, or why they are missing."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType


def import_native(backend: str) -> tuple[ModuleType | None, str | None]:
    """The module of a backend, or None and the reason why it is missing: what stopped its build, if that is known."""
    try:
        return import_module(f"layca_fast._{backend}"), None
    except ImportError as error:
        note = Path(__file__).parents[1] / "_build.json"
        built = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        return None, f"the native module is not there: {built.get(backend) or error}"
