"""Stepping inside backward on real processes: FSDP2 gives the ordinary weights, replicas are refused."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from layca_fast import FusedLayca
from layca_fast.in_backward import handle as in_backward
from layca_fast.state.layout import is_vector
from layca_fast.state.sharding import local_of

from ..support import same_bits
from .support import Place, counting, expect, network, on


def local_weights(model: nn.Module) -> list[Tensor]:
    return [local_of(param).detach().clone() for param in model.parameters()]


def fsdp2(seed: int) -> tuple[nn.Module, FusedLayca]:
    torch.manual_seed(seed)
    model = network()
    for module in (model[0], model[2], model):
        fully_shard(module)
    return model, FusedLayca(model.parameters(), 0.1, base="adam", weight_decay=0.0)


@on(2, exhaustive=(1, 3))
def in_backward_under_fsdp2_the_weights_are_those_of_ordinary_steps(place: Place) -> None:
    """Bit for bit: on uneven shards, with accumulation, and with gradients that some ranks lack."""
    ordinary, inside = fsdp2(place.seed), fsdp2(place.seed)
    inside[1].step_in_backward()
    generator = torch.Generator().manual_seed(place.seed + 1 + place.rank)
    for step in range(4):
        x = torch.randn(3, 7, generator=generator)
        for model, optimizer in (ordinary, inside):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            for number in range(1 + step % 2):
                # FSDP2 adds up what it does not reduce yet, so only the last of these backward passes steps.
                model.set_requires_gradient_sync(number == step % 2)
                model(x * (1 + number)).square().mean().backward()
            if model is inside[0]:
                assert all(param.grad is None for param in model.parameters())
            else:
                grads = [param.grad for param in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        assert same_bits(local_weights(inside[0]), local_weights(ordinary[0]))
    # Set by hand, and for each parameter by one rank only: all ranks step it.
    for model, optimizer in (ordinary, inside):
        for number, (param, grad) in enumerate(zip(model.parameters(), grads, strict=True)):
            param.grad = grad if number % place.world == place.rank else None
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(local_weights(inside[0]), local_weights(ordinary[0]))


@on(2)
def in_backward_each_sharded_layer_is_summed_by_itself(place: Place) -> None:
    model, optimizer = fsdp2(place.seed)
    with optimizer.step_in_backward():
        for _ in range(2):
            with counting() as sums:
                model(torch.randn(3, 7)).square().mean().backward()
                optimizer.step()
    # In the second step: no layer is new, and each of those that rotate has three dots.
    assert [tuple(each.shape) for each in sums] == [(1, 3)] * sum(not is_vector(param) for param in model.parameters())


def replica(place: Place, bucket_view: bool) -> tuple[nn.Module, FusedLayca, Tensor]:
    """A replica that steps in backward, and data that no other rank has."""
    torch.manual_seed(place.seed)
    model = network()
    optimizer = FusedLayca(model.parameters(), 0.1)
    optimizer.step_in_backward()
    torch.manual_seed(place.seed + 1 + place.rank)
    return DistributedDataParallel(model, gradient_as_bucket_view=bucket_view), optimizer, torch.randn(3, 7)


@on(2)
def in_backward_replicas_are_refused(place: Place) -> None:
    """Before anything moves; and where nobody could have known, at the latest by step."""
    for bucket_view in (False, True):
        model, optimizer, x = replica(place, bucket_view)
        before = local_weights(model)
        loss = model(x).square().mean()
        expect(RuntimeError, "cannot work under DistributedDataParallel", loss.backward)
        assert same_bits(local_weights(model), before)
        look, in_backward.check_not_replicated = in_backward.check_not_replicated, lambda params: None
        try:
            model, optimizer, x = replica(place, bucket_view)
            model(x).square().mean().backward()
            expect(RuntimeError, "came after backward had stepped it", optimizer.step)
        finally:
            in_backward.check_not_replicated = look
