"""backend="cuda" on CPU tensors, as if they were a GPU's: import both fixtures into the file that needs them."""

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType, SimpleNamespace

import pytest
import torch

from layca_fast.backends.cuda import BACKEND, CudaBackend

from ..cpu.support import build_once


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The emulator, which has the interface of the CUDA module."""
    (file,) = build_once(tmp_path_factory, "_cuda_emulator").glob("_cuda_emulator.*")
    spec = spec_from_file_location("_cuda_emulator", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def driver_of(emulator: ModuleType) -> ctypes.CDLL:
    """The functions of csrc/cuda/emulator/driver.cpp that are no Python."""
    return ctypes.CDLL(str(emulator.__file__))


@pytest.fixture(autouse=True)
def emulated(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[None]:
    """backend="cuda" on CPU tensors, as if they were a GPU's; blocks, warps and threads run in an order of ``seed``."""
    driver_of(emulator).layca_emulator_seed(ctypes.c_uint64(seed))
    monkeypatch.setattr(BACKEND._views, "native", emulator)
    monkeypatch.setattr(CudaBackend, "missing", lambda self: None)
    monkeypatch.setattr(CudaBackend, "refuses", lambda self, device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    yield
    BACKEND._views._views.clear()
