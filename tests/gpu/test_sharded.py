"""FSDP2 on a GPU, with its shards there or offloaded to the CPU, trains as the whole model does."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from layca_fast import FusedLayca, layer_groups

from ..sharded.support import network, off
from .support import ON_GPU, waiting_is_an_error

pytestmark = ON_GPU


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("policy", [OffloadPolicy(), CPUOffloadPolicy()], ids=["on the GPU", "offloaded"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_fully_shard_trains_as_the_whole_model(mesh: DeviceMesh, policy: OffloadPolicy, base: str, seed: int) -> None:
    models = []
    for shards in (False, True):
        torch.manual_seed(seed)
        model = network().cuda()
        if shards:
            fully_shard(model, mesh=mesh, offload_policy=policy)
        optimizer = FusedLayca(layer_groups(model, lr=0.02), base=base)
        draws = torch.Generator("cuda").manual_seed(seed)
        for number in range(5):
            inputs = torch.randn(16, 7, generator=draws, device="cuda")
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), inputs[:, :1]).backward()
            waits = number == 0 or isinstance(policy, CPUOffloadPolicy)
            with nullcontext() if waits else waiting_is_an_error():
                optimizer.step()
        models.append([param.cpu() for param in model.parameters()])
    assert off(models[1], models[0]) < 1e-5
