"""The CUDA module as nvcc compiled it, without a GPU: it imports, says what is missing, and spills nothing."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from layca_fast.backends import backends
from layca_fast.formulas.bases import FORMULAS
from layca_fast.state.native import import_native

from ..cpu.support import states_read
from . import compiled as cuda_code
from .compiled import ARCHITECTURES, DTYPES, Kernel

MODULE, REASON = import_native("cuda")
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(MODULE is None, reason=f"backend 'cuda': {REASON}"),
]
reads_code = pytest.mark.skipif(cuda_code.cuobjdump() is None, reason="there is no cuobjdump; Triton brings one")

TYPES = dict.fromkeys(("dtype", "grad_dtype", "state_dtype"), "float32")

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
    view = MODULE.BatchView(**addresses, **sizes, formula="adam", **TYPES)
    for verb, kernel in (("step", "prepare"), ("coefficients", "finish"), ("rotate", "rotate")):
        with pytest.raises(RuntimeError, match=rf"the CUDA kernel {kernel} \(adam, float32\) could not be launched: "):
            getattr(view, verb)(0)


def test_a_formula_or_type_without_kernels_is_named() -> None:
    assert MODULE is not None
    names = ("tensors", "hypers", "step_options", "layers", "tiles", "dots", "coefficients", "counts", "partials")
    numbers = dict.fromkeys((*names, "partial_counts", "n_tensors", "n_layers", "n_tiles", "tile"), 0)
    with pytest.raises(ValueError, match=r"formula='adamw', dtype='float32'.*\(sgd, float32\)"):
        MODULE.BatchView(**numbers, formula="adamw", **TYPES)
    for name in TYPES:
        with pytest.raises(ValueError, match="dtype='int8': there are float32 float64 bfloat16 float16"):
            MODULE.BatchView(**numbers, formula="sgd", **{**TYPES, name: "int8"})


@reads_code
def test_every_kernel_is_compiled_for_every_architecture(usage: dict[Kernel, dict[str, dict[str, int]]]) -> None:
    assert set(usage) == cuda_code.every_kernel()
    known = set(ARCHITECTURES) if cuda_code.nvcc() == cuda_code.committed()["nvcc"] else {"sm_90"}
    assert all(known <= set(numbers) for numbers in usage.values()), "make test-exhaustive builds the module for them"


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
    """After a change that is meant: python -m tests.backends.cuda.compiled > tests/backends/cuda/resources.json."""
    assert cuda_code.registers() == cuda_code.committed()["registers"]


@pytest.fixture(scope="module")
def moves() -> dict[str, dict[Kernel, list[str]]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(cuda_code.moves, ARCHITECTURES), strict=True))


def expected_vectors(kernel: Kernel) -> dict[int, tuple[int, int]]:
    """Loads and stores of a thread's packs, by bytes; 8 only where 16-bit numbers come in fours."""
    formula = FORMULAS[kernel.formula]
    grads, states, moved, turned = 1, len(formula.states), len(formula.states), 0
    if kernel.verb == "rotate":
        grads, states, moved, turned = int(formula.reads_grad), states_read(formula), 0, 1
    loads, stores = {16: 1 + grads + states}, {16: moved + turned}
    if kernel.dtype == "halves":
        # Weights in two parts; of what may be float32 or not there is the one load and the other.
        loads, stores = {16: grads + states, 8: 2 + grads + states}, {16: moved, 8: moved + 2 * turned}
    return {size: (PACKS_AT_ONCE * loads[size], PACKS_AT_ONCE * stores[size]) for size in loads}


#: Those of the tables, which come in numbers of 64 bits, say nothing about caches.
VECTORS = {16: r"{}\.E\S*\.128\b", 8: r"{}\.E(?:\.EF\.64\b|\.64\.STRONG)"}


@reads_code
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_packs_move_in_vectors(architecture: str, moves: dict[str, dict[Kernel, list[str]]]) -> None:
    found = {kernel: names for kernel, names in moves[architecture].items() if kernel.verb in ("measure", "rotate")}
    assert len(found) == 2 * len(DTYPES) * len(FORMULAS)
    for kernel, names in found.items():
        for size, expected in expected_vectors(kernel).items():
            patterns = [VECTORS[size].format(kind) for kind in ("LDG", "STG")]
            counts = tuple(sum(bool(re.match(pattern, name)) for name in names) for pattern in patterns)
            assert counts == expected, kernel


def is_vector(kernel: Kernel, kind: str, name: str) -> bool:
    """Of a pack. Where there are no 16-bit numbers, 8 bytes are one of float64."""
    return any(re.match(VECTORS[size].format(kind), name) for size in expected_vectors(kernel))


@reads_code
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_packs_are_under_way_before_one_is_used(
    architecture: str, moves: dict[str, dict[Kernel, list[str]]]
) -> None:
    """The loads of both packs of every array come before the first store: occupancy.py counts on that."""
    late = {
        kernel: names
        for kernel, names in moves[architecture].items()
        if kernel.verb in ("measure", "rotate")
        and (stores := [place for place, name in enumerate(names) if is_vector(kernel, "STG", name)])
        and any(is_vector(kernel, "LDG", name) for name in names[stores[0] :])
    }
    assert late == {}


@reads_code
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_elements_are_known_to_be_in_global_memory(
    architecture: str, moves: dict[str, dict[Kernel, list[str]]]
) -> None:
    """Loads and stores of any kind of memory find out which at run time; and none goes to a thread's own."""
    for kernel, names in moves[architecture].items():
        if kernel.verb in ("measure", "rotate"):
            assert [name for name in names if re.match(r"(?:LD|ST)\.E|LDL|STL", name)] == [], kernel
