"""The registry of backends: which there are, which can run here, and which one a tensor takes."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from ..messages import warn_caller
from ..step.backend import Backend

#: The module of each backend, by its name.
MODULES = {"cuda": "cuda", "triton": "triton.backend", "cpu": "cpu", "torch": "torch_"}

#: The order in which backend="auto" tries them, by device type; elsewhere it is torch.
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}


@dataclass(frozen=True)
class Status:
    """Whether a backend can run on this machine; where it cannot, ``reason`` says why."""

    available: bool
    reason: str = ""


@cache
def load(name: str) -> Backend:
    """The backend called ``name``; ValueError with the valid names if there is none."""
    if name not in MODULES:
        raise ValueError(f"backend={name!r} is unknown: choose 'auto' or one of {sorted(MODULES)}")
    module = import_module(f"{__name__}.{MODULES[name]}")
    backend: Backend = module.BACKEND
    return backend


def backends() -> dict[str, Status]:
    """Every backend by name, with ``available`` and, where it is missing, ``reason``."""
    reasons = {name: load(name).missing() for name in MODULES}
    return {name: Status(reason is None, reason or "") for name, reason in reasons.items()}


@cache
def _tell_of_fallback(device: torch.device) -> None:
    """Warn once in a process, where tensors take the torch backend for want of a faster one that they could have."""
    wanted = [name for name in PREFERENCE.get(device.type, ()) if name != "torch"]
    reasons = [f"{name}: {load(name).missing() or load(name).refuses(device)}" for name in wanted]
    if reasons:
        warn_caller(
            f"the torch backend steps the tensors on {device}, many times slower than {' or '.join(wanted)} would: "
            f"{'; '.join(reasons)}. backend='torch' takes it without this warning"
        )


def choose(name: str, device: torch.device) -> Backend:
    """The backend for tensors on ``device``: the named one, or for "auto" the first of the preferred that runs.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that cannot run here.
    """
    if name == "auto":
        candidates = (load(each) for each in PREFERENCE.get(device.type, ("torch",)))
        chosen = next(each for each in candidates if each.missing() is None and each.refuses(device) is None)
        if chosen.name == "torch":
            _tell_of_fallback(device)
        return chosen
    backend = load(name)
    reason = backend.missing() or backend.refuses(device)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run on {device}: {reason}; backend='auto' picks one that can")
    return backend
