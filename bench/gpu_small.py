"""``python -m bench.gpu_small``: a few steps of every formula on small tensors, for compute-sanitizer to watch."""

from collections.abc import Sequence
from itertools import product

import torch

from layca_fast import FusedLayca, backends
from layca_fast.commands.cases import BASE_OPTIONS, shapes_of

#: Ends within a pack, a warp, a block and a tile; one that is not aligned; and more tiles than one.
SHAPES = ((3, 3), (70, 91), (4096,), (3, 1371), (1,), (300, 333))


#: An odd number: two of Lion's steps, signs, may bring a lone weight back.
STEPS = 3


def step_all(names: Sequence[str], device: torch.device) -> None:
    """Step on these backends; AssertionError unless all weights stay finite and move."""
    runs = [(options, torch.float32) for options in BASE_OPTIONS]
    # Few, for each takes Triton's compiler seconds.
    runs += [(options, torch.bfloat16) for options in BASE_OPTIONS[::4]]
    for name, (options, dtype) in product(names, runs):
        # Random numbers and comparisons are the CPU's, so that there is little to watch but our kernels.
        params = [torch.randn(shape).to(device, dtype) for shape in shapes_of(options, SHAPES)]
        params.append(torch.randn(8191).to(device, dtype)[1:].view(90, 91))
        before = [param.cpu().float().clone() for param in params]
        for param in params:
            param.requires_grad_()
        optimizer = FusedLayca(params, 0.05, backend=name, **options)
        for _ in range(STEPS):
            for param in params:
                param.grad = torch.randn(param.shape).to(device, dtype)
            optimizer.step()
        after = [optimizer.effective_weight(param).cpu() for param in params]
        for old, new in zip(before, after, strict=True):
            assert torch.isfinite(new).all(), (name, options, dtype)
            assert not torch.equal(old, new), (name, options, dtype)


def main() -> None:
    """Step on every GPU backend that can run here."""
    names = [name for name in ("cuda", "triton") if backends()[name].available]
    assert names, "no backend for GPUs can run here"
    step_all(names, torch.device("cuda"))
    print(f"stepped: {', '.join(names)}")


if __name__ == "__main__":
    main()
