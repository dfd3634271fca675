"""``python -m bench.gpu_small``: a few steps of every formula on small tensors, for compute-sanitizer to watch."""

from collections.abc import Sequence
from itertools import product

import torch

from layca_fast import FusedLayca, backends
from layca_fast.verify import BASE_OPTIONS

#: Ends within a pack, a warp, a block and a tile; one that is not aligned; and more tiles than one.
SHAPES = ((3, 3), (70, 91), (4096,), (3, 1371), (1,), (300, 333))


def step_all(names: Sequence[str], device: torch.device) -> None:
    """Step on these backends; AssertionError unless all weights stay finite and move."""
    for name, options in product(names, BASE_OPTIONS):
        params = [torch.randn(shape, device=device).requires_grad_() for shape in SHAPES]
        params.append(torch.randn(8191, device=device)[1:].view(90, 91).requires_grad_())
        before = [param.detach().clone() for param in params]
        optimizer = FusedLayca(params, 0.05, backend=name, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        for old, new in zip(before, params, strict=True):
            assert torch.isfinite(new).all(), (name, options)
            assert not torch.equal(old, new), (name, options)


def main() -> None:
    """Step on every GPU backend that can run here."""
    names = [name for name in ("cuda", "triton") if backends()[name].available]
    assert names, "no backend for GPUs can run here"
    step_all(names, torch.device("cuda"))
    print(f"stepped: {', '.join(names)}")


if __name__ == "__main__":
    main()
