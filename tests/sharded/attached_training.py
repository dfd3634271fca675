"""Networks under FSDP2 and tensor parallel, trained by optimizers of torch that ``attach`` turns."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD, AdamW, Optimizer

from layca_fast import attach

from .attached import BF16, FP16, effective
from .support import STEPS, Place, counting, expect, network, off, on, whole


def learn(model: nn.Module, optimizer: Optimizer, seed: int) -> list[Tensor]:
    """Steps by gradients of the network itself; what was summed over processes in them."""
    draws = torch.Generator().manual_seed(seed)
    sums: list[Tensor] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = torch.randn(16, 7, generator=draws), torch.randn(16, 2, generator=draws)
        nn.functional.mse_loss(model(inputs), targets).backward()
        with counting() as seen:
            optimizer.step()
        sums += seen
    return sums


def twins(place: Place) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(place.seed)
    plain = network()
    torch.manual_seed(place.seed)
    return plain, network()


@on(3, exhaustive=(1, 2, 4))
def fully_shard_under_attach_trains_as_one_process_does(place: Place) -> None:
    plain, model = twins(place)
    fully_shard(model[0])
    fully_shard(model)
    optimizers = [SGD(each.parameters(), 0.02, momentum=0.9) for each in (plain, model)]
    for each in optimizers:
        attach(each)
    learn(plain, optimizers[0], place.seed)
    sums = learn(model, optimizers[1], place.seed)
    assert off(list(model.parameters()), list(plain.parameters())) < 2e-6
    # The first step asks whether a layer is all zeros.
    assert len(sums) == (STEPS + 1 if place.world > 1 else 0)


@on(2)
def a_model_of_16_bits_trains_under_fully_shard(place: Place) -> None:
    """By the gradients that its own backward leaves: every layer keeps its norm, and turns by the angle."""
    for dtype in (BF16, FP16):
        torch.manual_seed(place.seed)
        model = network().to(dtype)
        fully_shard(model[0])
        fully_shard(model)
        # Biases take AdamW's own step, whose default eps is zero in float16.
        optimizer = AdamW(model.parameters(), 1e-3, eps=1e-4, weight_decay=0.0)
        handle = attach(optimizer)
        layers = [param for param in model.parameters() if param.dim() > 1]
        norms = [whole(param).double().norm() for param in layers]
        for batch in torch.randn(STEPS, 16, 7).to(dtype):
            before = effective(handle, layers)
            optimizer.zero_grad()
            model(batch).float().square().mean().backward()
            optimizer.step()
            for old, new, norm in zip(before, effective(handle, layers), norms, strict=True):
                torch.testing.assert_close(new.double().norm(), norm, rtol=1e-6, atol=0)
                old, new = old.double(), new.double()
                cosine = (old * new).sum() / old.norm() / new.norm()
                angle = torch.atan(torch.tensor(1e-3, dtype=torch.float64))
                # Storing the weights in float32 moves each by 2**-24 of it.
                torch.testing.assert_close(torch.acos(cosine), angle, rtol=1e-3, atol=0)


@on(4)
def fully_shard_over_tensor_parallel_under_attach(place: Place) -> None:
    plain, model = twins(place)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizers = [AdamW(each.parameters(), 0.02, weight_decay=0.0) for each in (plain, model)]
    for each in optimizers:
        attach(each)
    learn(plain, optimizers[0], place.seed)
    sums = learn(model, optimizers[1], place.seed)
    assert off(list(model.parameters()), list(plain.parameters())) < 5e-6
    layers = [param for param in model.parameters() if param.dim() > 1]
    on_tp = [param for param in layers if param.device_mesh.ndim == 2]
    # One all-reduce per dimension of the mesh, of three float64 numbers per layer.
    assert [tensor.numel() for tensor in sums[-2:]] == [3 * len(layers), 3 * len(on_tp)]
    assert len(sums) == 2 * STEPS + 2
    chunked = SGD([model[0].weight], 0.02)
    attach(chunked, chunks=2)
    expect(ValueError, "in turns", chunked.step)
