"""docs/scaling.md says what ``python -m bench.predict`` prints, and that what an optimizer allocates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

from bench import predict
from layca_fast import FusedLayca

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_page_has_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main([])
    page = PAGE.read_text(encoding="utf-8")
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert len(blocks) == 12
    assert all(block in page for block in blocks)


@pytest.mark.parametrize(("base", "base_options"), predict.BASE_OPTIONS)
@pytest.mark.parametrize(("name", "dtype", "options"), predict.STORAGE)
def test_state_takes_the_bytes_predicted(
    name: str, dtype: torch.dtype, options: dict[str, Any], base: str, base_options: dict[str, Any], seed: int
) -> None:
    param = Parameter(torch.randn(48, 32, dtype=dtype))
    optimizer = FusedLayca([param], 0.1, **options, **base_options)
    param.grad = torch.randn_like(param)
    optimizer.step()
    state = dict(optimizer.state[param])
    assert state.pop("radius").nbytes == 8
    if "step" in state:
        assert state.pop("step").nbytes == 4
    allocated = sum(tensor.untyped_storage().nbytes() for tensor in state.values())
    assert allocated == predict.state_bytes(dtype, optimizer.param_groups[0]) * param.numel()


def test_a_hundred_gpus_share_memory_and_add_a_latency() -> None:
    assert predict.all_reduce_seconds(1, 1e6, 1.0, 1.0) == 0.0
    assert predict.all_reduce_seconds(8, 0.0, 1e-5, 1.0) == pytest.approx(6e-5)
    assert predict.all_reduce_seconds(2, 100.0, 0.0, 50.0) == pytest.approx(2.0)


def test_the_models_have_the_weights_of_their_names() -> None:
    weights = [sum(torch.Size(shape).numel() for shape in shapes()) for _, shapes in predict.MODELS]
    assert [round(count / 1e9, 1) for count in weights] == [1.2, 6.7, 69.0]


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)], ids=str)
def test_products_take_the_operations_predicted(shape: tuple[int, int], seed: int) -> None:
    """As torch counts them, in the type of GPUs."""
    param = Parameter(torch.randn(shape))
    optimizer = FusedLayca([param], 0.1, base="muon", ns_dtype=predict.ON_GPUS)
    param.grad = torch.randn_like(param)
    optimizer.step()
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    assert counted.get_total_flops() == predict.product_flops(*shape)


def test_the_busiest_gpu_has_the_even_share_where_matrices_are_many() -> None:
    assert predict.busiest_flops([(64, 256)] * 64, 8) == (1, 8 * predict.product_flops(64, 256))
    windows, busiest = predict.busiest_flops([(8192, 8192)] * 64, 4)
    assert (windows, busiest) == (8, 16 * predict.product_flops(8192, 8192))
