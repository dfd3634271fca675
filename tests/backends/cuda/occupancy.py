"""What the registers of the CUDA kernels imply: how many threads share a multiprocessor, and the bytes they wait for.

``python -m tests.backends.cuda.occupancy`` writes the tables of docs/kernels.md anew, from ``resources.json``.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from layca_fast.formulas.bases import FORMULAS

from ..cpu.support import ROOT, states_read
from .compiled import ARCHITECTURES, DTYPES, Kernel, committed

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- written by python -m tests.backends.cuda.occupancy -->", "<!-- end of the table -->"

#: Of csrc/cuda: threads of a block, and packs of each array that a thread loads before it uses any of them.
BLOCK_THREADS, PACKS_AT_ONCE = 256, 2

#: Registers of a multiprocessor, and what they are given to a warp in.
REGISTERS, GRANULE, WARP = 65536, 256, 32


@dataclass(frozen=True)
class Card:
    """A GPU of an architecture: its multiprocessors and bandwidth, in bytes per ns, of its maker's data sheet."""

    name: str
    multiprocessors: int
    bandwidth: float
    #: Warps and blocks that a multiprocessor has room for.
    warps: int = 64
    blocks: int = 32


CARDS = {
    "sm_80": Card("A100 80 GB", 108, 2039),
    "sm_90": Card("H200", 132, 4800),
    "sm_100": Card("B200", 148, 8000),
    "sm_120": Card("RTX 5090", 170, 1792, warps=48, blocks=24),
}

#: Nanoseconds that a load from memory takes where nothing else is under way: 466 cycles on an A100 and 479 on an H100
#: (arXiv 2402.13499, at 1.41 and 1.755 GHz). Under load it is up to twice as long.
IDLE_LATENCY, LOADED_LATENCY = 330, 660


def blocks_of(registers: int, architecture: str) -> int:
    """How many blocks of such a kernel a multiprocessor has at a time; shared memory, of 280 bytes, limits none."""
    card = CARDS[architecture]
    by_warp = -(-registers * WARP // GRANULE) * GRANULE
    # A quarter of the registers belongs to each of four schedulers.
    warps = REGISTERS // 4 // by_warp * 4
    block_warps = BLOCK_THREADS // WARP
    return min(warps // block_warps, card.warps // block_warps, card.blocks)


def occupancy_of(registers: int, architecture: str) -> float:
    """The warps of a multiprocessor that such a kernel fills, of all that it has room for."""
    return blocks_of(registers, architecture) * (BLOCK_THREADS // WARP) / CARDS[architecture].warps


def bytes_of_thread(kernel: Kernel) -> int:
    """What a thread of measure or rotate loads before it waits. 16-bit weights have remainders and float32 moments."""
    formula = FORMULAS[kernel.formula]
    turns = kernel.verb == "rotate"
    grads = int(not turns or formula.reads_grad)
    states = states_read(formula) if turns else len(formula.states)
    if kernel.dtype == "halves":
        return PACKS_AT_ONCE * (8 * 2 + 8 * grads + 16 * states)
    return PACKS_AT_ONCE * 16 * (1 + grads + states)


def bytes_in_flight(kernel: Kernel, architecture: str) -> int:
    """What all threads of a multiprocessor wait for at a time."""
    return blocks_of(registers_of(kernel, architecture), architecture) * BLOCK_THREADS * bytes_of_thread(kernel)


def hidden_latency(kernel: Kernel, architecture: str) -> float:
    """Nanoseconds that a load may take before memory idles: Little's law, the bytes under way over the bandwidth."""
    card = CARDS[architecture]
    return bytes_in_flight(kernel, architecture) * card.multiprocessors / card.bandwidth


@cache
def _registers() -> dict[str, dict[str, int]]:
    registers: dict[str, dict[str, int]] = committed()["registers"]
    return registers


def registers_of(kernel: Kernel, architecture: str) -> int:
    return _registers()[str(kernel)][architecture]


def kernels() -> Iterator[Kernel]:
    """Those that stream."""
    for dtype in DTYPES.values():
        for verb in ("measure", "rotate"):
            for formula in FORMULAS:
                yield Kernel(verb, formula, dtype)


def _cell(kernel: Kernel, architecture: str) -> str:
    registers = registers_of(kernel, architecture)
    occupied = f"{100 * occupancy_of(registers, architecture):.3g} %"
    return f"{registers}, {occupied}, {hidden_latency(kernel, architecture):.0f} ns"


def table() -> str:
    """Registers, occupancy and hidden latency of every kernel that streams, by architecture."""
    head = [f"{architecture} ({CARDS[architecture].name})" for architecture in ARCHITECTURES]
    lines = ["| kernel | bytes of a thread | " + " | ".join(head) + " |", "| --- " * (2 + len(head)) + "|"]
    for kernel in kernels():
        cells = [_cell(kernel, architecture) for architecture in ARCHITECTURES]
        lines.append(f"| `{kernel}` | {bytes_of_thread(kernel)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def needs() -> str:
    """What Little's law asks of every multiprocessor."""
    lines = ["| | multiprocessors | GB/s | KB in flight at 330 ns | at 660 ns |", "| --- | --- | --- | --- | --- |"]
    for architecture in ARCHITECTURES:
        card = CARDS[architecture]
        asked = [card.bandwidth * latency / card.multiprocessors / 1024 for latency in (IDLE_LATENCY, LOADED_LATENCY)]
        cells = [str(card.multiprocessors), f"{card.bandwidth:.0f}", *(f"{each:.1f}" for each in asked)]
        lines.append(f"| {architecture} ({card.name}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The page with its two tables as they should be."""
    parts = text.split(BEGIN)
    assert len(parts) == 3, f"{PAGE} is to have two places for tables"
    made = [f"{BEGIN}\n{each}\n{END}" for each in (needs(), table())]
    rest = [part.split(END, 1)[1] for part in parts[1:]]
    return parts[0] + made[0] + rest[0] + made[1] + rest[1]


def main() -> int:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
