"""One optimizer step, timed: ``pytest bench`` (or ``make bench``). ``python -m bench.ratios`` compares interleaved."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from layca_fast import FusedLayca, backends

from .providers import Provider, assert_moves, make_params, providers
from .shapes import MODELS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("provider", providers(DEVICE), ids=lambda provider: provider.name)
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark: BenchmarkFixture, model: str, provider: Provider) -> None:
    params = make_params(MODELS[model](), DEVICE)
    step = provider.make(params)
    assert_moves(params, step)

    def synchronized_step() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = model
    benchmark.pedantic(synchronized_step, rounds=12, warmup_rounds=2)
    count = sum(param.numel() for param in params)
    benchmark.extra_info.update(
        parameters=count,
        bytes_per_parameter=provider.bytes_per_parameter,
        gigabytes_per_second=round(count * provider.bytes_per_parameter / benchmark.stats.stats.median / 1e9, 2),
        threads=torch.get_num_threads(),
        device=str(DEVICE),
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Triton's kernels run on this GPU, where test_step times them")
def test_interpreted_triton_step(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is for correctness: one small batch, so that its kernels run here, too."""
    params = make_params([(30, 40), (7, 5), (9,)], DEVICE)
    assert backends()["triton"].available, backends()["triton"].reason
    step = FusedLayca(params, 1e-3, momentum=0.9, backend="triton").step
    assert_moves(params, step)
    benchmark.group = "interpreter, 3 tensors"
    benchmark.pedantic(step, rounds=3)
