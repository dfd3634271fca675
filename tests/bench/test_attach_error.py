"""``python -m bench.attach_error``: the ways that it compares, and that ``attach`` is the one it says."""

import pytest
import torch

from bench.attach_error import WAYS, main, ways
from layca_fast.state.compensation import HALVES


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attach_reads_the_step_as_from_a_float32_copy(dtype: torch.dtype, seed: int) -> None:
    rows = {row[0]: row[1:] for row in ways(dtype, 1e-3, 300, 40)}
    assert list(rows) == [name for name, *_ in WAYS]
    off = {name: float(row[-2]) for name, row in rows.items()}
    assert off["attach"] <= 2 * off["float32 copy"] + 1e-6
    # Each of the others loses what it is said to lose.
    assert 10 * off["attach"] < off["16-bit step from zero"] < off["16-bit difference"]
    assert 10 * off["attach"] < off["float32 copy, no remainder"]


def test_it_prints_three_tables(capsys: pytest.CaptureFixture[str], seed: int) -> None:
    main(["--size", "100", "--layer", "100", "--steps", "2", "--lr", "1e-6"])
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("float32", "bfloat16", "float16"))
    assert "no step" in printed
