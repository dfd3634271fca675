"""The occupancy that the committed registers imply, held to NVIDIA's own calculator and to what memory asks for."""

import shutil
import subprocess
from pathlib import Path

import pytest

from . import occupancy as paper
from .compiled import ARCHITECTURES, cuobjdump

#: Threads of a block and kernels of 280 bytes of shared memory, as of csrc/cuda/kernels.cuh.
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "cuda_occupancy.h"
int main(int count, char** of) {
  for (int i = 3; i < count; ++i) {
    cudaOccDeviceProp gpu;
    gpu.computeMajor = std::atoi(of[1]) / 10;
    gpu.computeMinor = std::atoi(of[1]) % 10;
    gpu.maxThreadsPerBlock = 1024;
    gpu.maxThreadsPerMultiprocessor = std::atoi(of[2]) * 32;
    gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536;
    gpu.warpSize = 32;
    gpu.sharedMemPerBlock = 49152;
    gpu.sharedMemPerMultiprocessor = gpu.sharedMemPerBlockOptin = 100 * 1024;
    gpu.reservedSharedMemPerBlock = 1024;
    gpu.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 256;
    kernel.numRegs = std::atoi(of[i]);
    kernel.sharedSizeBytes = 280;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.maxDynamicSharedSizeBytes = 0;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, 256, 0) != CUDA_OCC_SUCCESS) return 1;
    std::printf("%d ", result.activeBlocksPerMultiprocessor);
  }
}
"""


def header() -> Path | None:
    """NVIDIA's occupancy calculator: of the CUDA toolkit, or of Triton's package."""
    nvcc, disassembler = shutil.which("nvcc"), cuobjdump()
    places = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    places += [Path(disassembler).resolve().parents[1] / "include"] if disassembler else []
    return next((place for place in places if (place / "cuda_occupancy.h").exists()), None)


def test_the_tables_in_the_docs_are_what_the_registers_say() -> None:
    """After a change that is meant: python -m tests.backends.cuda.occupancy."""
    text = paper.PAGE.read_text(encoding="utf-8")
    assert text == paper.written(text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_never_waits_for_the_kernels(architecture: str) -> None:
    """By Little's law, at twice the latency of an idle GPU."""
    short = {
        str(kernel): hidden
        for kernel in paper.kernels()
        if (hidden := paper.hidden_latency(kernel, architecture)) < paper.LOADED_LATENCY
    }
    assert short == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "least"), [("float32", 3), ("float64", 2), ("halves", 2)])
def test_no_kernel_loses_half_of_its_occupancy(dtype: str, least: int, architecture: str) -> None:
    """As torch's fused Adam did at 79 registers, with blocks of twice the size: one fitted where two had."""
    found = {
        str(kernel): paper.blocks_of(paper.registers_of(kernel, architecture), architecture)
        for kernel in paper.kernels()
        if kernel.dtype == dtype
    }
    assert {name: blocks for name, blocks in found.items() if blocks < least} == {}


@pytest.mark.skipif(header() is None, reason="there is no cuda_occupancy.h; the CUDA toolkit and Triton bring one")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.exhaustive
def test_the_blocks_are_those_of_nvidias_calculator(tmp_path: Path) -> None:
    """For every number of registers that a thread may have."""
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(PROGRAM, encoding="utf-8")
    subprocess.run(["c++", "-w", "-I", str(header()), "-o", str(program), str(source)], check=True)
    registers = range(24, 256)
    for architecture, card in paper.CARDS.items():
        command = [str(program), architecture.removeprefix("sm_"), str(card.warps), *map(str, registers)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ours = [paper.blocks_of(each, architecture) for each in registers]
        assert list(map(int, said.split())) == ours, architecture
