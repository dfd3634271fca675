"""``python -m tests.sanitize.under CPU_MODULE [EMULATOR] -- ...``: the fuzzer, ``...`` its options, on such modules."""

import os
import sys
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType, SimpleNamespace


def loaded(name: str, file: str) -> ModuleType:
    """The compiled module in ``file``, which the package then finds as ``name``."""
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulate(emulator: ModuleType) -> None:
    """Let tensors on the CPU take the CUDA backend, which runs on its emulator."""
    import torch

    from layca_fast.backends import PREFERENCE
    from layca_fast.backends.cuda import BACKEND, CudaBackend

    BACKEND._views.native = emulator
    CudaBackend.missing = lambda self: None  # type: ignore[method-assign]
    CudaBackend.refuses = lambda self, device: None  # type: ignore[method-assign]
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
    PREFERENCE["cpu"] = ("cuda", "torch")


def main() -> int:
    split = sys.argv.index("--")
    files, options = sys.argv[1:split], sys.argv[split + 1 :]
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The module takes OpenMP from where torch has its own.
    import torch  # noqa: F401

    loaded("layca_fast._cpu", files[0])
    if files[1:]:
        emulate(loaded("_cuda_emulator", files[1]))
    from tests.fuzz.__main__ import main as fuzz

    return fuzz(options)


if __name__ == "__main__":
    sys.exit(main())
