"""The CUDA module as nvcc compiled it, without a GPU: it imports, says what is missing, and spills nothing."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from layca_fast.backends import backends
from layca_fast.backends.native import import_native
from layca_fast.bases import FORMULAS

from . import cuda_code
from .cuda_code import ARCHITECTURES, Kernel
from .native_support import states_read

MODULE, REASON = import_native("cuda")
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"backend 'cuda': {REASON}")
reads_code = pytest.mark.skipif(cuda_code.cuobjdump() is None, reason="there is no cuobjdump; Triton brings one")

#: Of csrc/cuda/tile.h: packs that a thread has under way at a time.
PACKS_AT_ONCE = 2


@pytest.fixture(scope="module")
def usage() -> dict[Kernel, dict[str, dict[str, int]]]:
    return cuda_code.usage()


def test_every_formula_has_kernels() -> None:
    assert MODULE is not None
    assert set(MODULE.formulas) == set(FORMULAS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_module_imports_and_the_backend_says_why_it_is_missing() -> None:
    assert MODULE is not None
    assert MODULE.device_problem() != ""
    status = backends()["cuda"]
    assert not status.available
    assert "no device" in status.reason


@pytest.mark.skipif(shutil.which("ldd") is None, reason="there is no ldd")
def test_the_module_needs_neither_cuda_nor_torch_libraries() -> None:
    """It brings CUDA's runtime along, and that finds the driver when it is asked for a device."""
    done = subprocess.run(["ldd", str(cuda_code.module_file())], capture_output=True, text=True, check=True)
    assert re.findall(r"^\s*(lib(?:cuda|cudart|torch|c10|python)\S*)", done.stdout, re.MULTILINE) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_that_cannot_be_launched_is_named() -> None:
    """Without a GPU none can. The tables are real, though nothing gets to read them."""
    assert MODULE is not None
    table = torch.zeros(100, dtype=torch.int64)
    names = ("tensors", "hypers", "step_options", "layers", "tiles", "dots", "coefficients", "counts", "partials")
    addresses = dict.fromkeys((*names, "partial_counts"), table.data_ptr())
    sizes = dict.fromkeys(("n_tensors", "n_layers", "n_tiles", "tile"), 1)
    view = MODULE.BatchView(**addresses, **sizes, formula="adam", dtype="float32")
    for verb, kernel in (("step", "prepare"), ("coefficients", "finish"), ("rotate", "rotate")):
        with pytest.raises(RuntimeError, match=rf"the CUDA kernel {kernel} \(adam, float32\) could not be launched: "):
            getattr(view, verb)(0)


def test_a_formula_or_type_without_kernels_is_named() -> None:
    assert MODULE is not None
    names = ("tensors", "hypers", "step_options", "layers", "tiles", "dots", "coefficients", "counts", "partials")
    numbers = dict.fromkeys((*names, "partial_counts", "n_tensors", "n_layers", "n_tiles", "tile"), 0)
    with pytest.raises(ValueError, match=r"formula='sgd', dtype='int8'.*\(sgd, float32\)"):
        MODULE.BatchView(**numbers, formula="sgd", dtype="int8")


@reads_code
def test_every_kernel_is_compiled_for_every_architecture(usage: dict[Kernel, dict[str, dict[str, int]]]) -> None:
    assert set(usage) == cuda_code.every_kernel()
    known = set(ARCHITECTURES) if cuda_code.nvcc() == cuda_code.committed()["nvcc"] else {"sm_90"}
    assert all(known <= set(numbers) for numbers in usage.values())


@reads_code
def test_nothing_spills(usage: dict[Kernel, dict[str, dict[str, int]]]) -> None:
    spilled = {
        f"{kernel} for {architecture}": numbers
        for kernel, by_architecture in usage.items()
        for architecture, numbers in by_architecture.items()
        if numbers["STACK"] or numbers["LOCAL"]
    }
    assert spilled == {}


@reads_code
@pytest.mark.skipif(
    cuda_code.nvcc() != cuda_code.committed()["nvcc"],
    reason=f"the registers are those of nvcc {cuda_code.committed()['nvcc']}, and here is {cuda_code.nvcc()}",
)
def test_kernels_use_the_registers_they_did() -> None:
    """After a change that is meant: python -m tests.cuda_code > tests/cuda_resources.json."""
    assert cuda_code.registers() == cuda_code.committed()["registers"]


@pytest.fixture(scope="module")
def code() -> dict[str, dict[Kernel, str]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, map(dict, pool.map(cuda_code.code, ARCHITECTURES)), strict=True))


def expected_vectors(kernel: Kernel) -> tuple[int, int]:
    """16-byte loads and stores of a thread's packs."""
    formula = FORMULAS[kernel.formula]
    if kernel.verb == "measure":
        return PACKS_AT_ONCE * (2 + len(formula.states)), PACKS_AT_ONCE * len(formula.states)
    return PACKS_AT_ONCE * (1 + formula.reads_grad + states_read(formula)), PACKS_AT_ONCE


@reads_code
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_packs_move_in_vectors_of_16_bytes(architecture: str, code: dict[str, dict[Kernel, str]]) -> None:
    found = {kernel: text for kernel, text in code[architecture].items() if kernel.verb in ("measure", "rotate")}
    assert len(found) == 4 * len(FORMULAS)
    for kernel, text in found.items():
        vectors = [len(re.findall(rf"\b{name}\.E\S*\.128\b", text)) for name in ("LDG", "STG")]
        assert tuple(vectors) == expected_vectors(kernel), kernel


@reads_code
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_elements_are_known_to_be_in_global_memory(architecture: str, code: dict[str, dict[Kernel, str]]) -> None:
    """Loads and stores of any kind of memory find out which at run time; and none goes to a thread's own."""
    for kernel, text in code[architecture].items():
        if kernel.verb in ("measure", "rotate"):
            assert re.findall(r"\b(?:LD|ST)\.E\S*|\b(?:LDL|STL)\S*", text) == [], kernel
