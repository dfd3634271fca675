"""Tensors that are cut otherwise than in equal slices, on processes: unequal parts, stacks of matrices, columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import Parameter

from layca_fast import FusedLayca, RotationMonitor

from .layers import check_alike
from .support import STEPS, Place, counting, draw, expect, give, off, on, params_of, shared, whole

#: (shape, chunks, dimension that is shared out): whole layers and cut ones, uneven and empty shards, stacks of two
#: dimensions, each of which may be shared out.
PARTS: Sequence[tuple[tuple[int, ...], Any, int]] = (
    ((9, 5), (4, 3, 2), 0),
    ((9, 5), (4, 3, 2), 1),
    ((2, 5), (1, 1), 0),
    ((6, 4, 3), "matrices", 0),
    ((5, 4, 3), "matrices", 0),
    ((3, 4, 5), "matrices", 2),
    ((4, 3, 6, 2), "matrices", 0),
    ((2, 5, 4, 3), "matrices", 1),
    ((2, 3, 6, 4), "matrices", 2),
    ((3, 4, 5), ("matrices", 2), 0),
    ((12, 4, 2), ("matrices", 2), 0),
    ((2, 6, 4), ("matrices", 2), 1),
    ((2, 3, 4, 5), ("matrices", 2), 1),
    ((2, 4, 6), ("matrices", 2), 2),
    ((5, 8), ("columns", 2), 0),
    ((5, 12), ("columns", 12), 1),
    ((5, 8), ("columns", (5, 3)), 1),
)

#: What base="muon" does not take, which directs matrices.
COLUMNS: Sequence[tuple[tuple[int, ...], Any, int]] = (
    ((5, 7), "columns", 0),
    ((5, 7), "columns", 1),
    ((3, 4, 2), "columns", 0),
)

BASES: Sequence[Mapping[str, Any]] = (
    {"momentum": 0.9},
    {"base": "adam", "betas": (0.8, 0.95), "eps": 1e-3},
    {"momentum": 0.9, "radius": "learned"},
    {"base": "muon", "ns_dtype": torch.float64},
)


def parts_for(base: Mapping[str, Any]) -> Sequence[tuple[tuple[int, ...], Any, int]]:
    matrices = [each for each in PARTS if each[1] != ("columns", 12)]
    return matrices if base.get("base") == "muon" else [*PARTS, *COLUMNS]


def twins(
    mesh: DeviceMesh, base: Mapping[str, Any], turned: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[FusedLayca, FusedLayca]:
    """An optimizer of whole tensors and one of their shards; ``turned``: whose columns lie one after the other."""
    plain, shards = [], []
    for shape, chunks, dim in parts_for(base):
        param = torch.randn(shape, dtype=dtype)
        own = shared(param, mesh, [Shard(dim)])
        if turned:
            local = own.to_local().transpose(0, 1).contiguous().transpose(0, 1)
            own = DTensor.from_local(local, mesh, [Shard(dim)], shape=own.shape, stride=own.stride())
        plain.append({"params": [Parameter(param)], "chunks": chunks})
        shards.append({"params": [Parameter(own)], "chunks": chunks})
    return FusedLayca(plain, 0.02, **base, **options), FusedLayca(shards, 0.02, **base, **options)


@on(3, exhaustive=(1, 2, 4))
def parts_take_the_steps_of_the_whole_layers(place: Place) -> None:
    for number, base in enumerate(BASES):
        plain, sharded = twins(place.mesh(), base, turned=bool(number % 2), backend=("auto", "torch")[number // 2])
        for _ in range(STEPS):
            grads = draw(params_of(plain))
            give(plain, grads)
            give(sharded, grads)
        check_alike(plain, sharded)


@on(2, exhaustive=(3,))
def parts_of_sixteen_bits_take_them_as_well(place: Place) -> None:
    plain, sharded = twins(place.mesh(), {"momentum": 0.9}, turned=place.world == 3, dtype=torch.bfloat16)
    for _ in range(STEPS):
        grads = [grad.bfloat16() for grad in draw(params_of(plain))]
        give(plain, grads)
        give(sharded, grads)
    ours = [sharded.effective_weight(param) for param in params_of(sharded)]
    assert off(ours, [plain.effective_weight(param) for param in params_of(plain)]) < 1e-6


@on(2, exhaustive=(4,))
def all_parts_travel_in_one_sum(place: Place) -> None:
    _, sharded = twins(place.mesh(), {"momentum": 0.9})
    give(sharded, draw(params_of(sharded)))
    with counting() as seen:
        give(sharded, draw(params_of(sharded)))
    assert len(seen) == 1


@on(4)
def parts_cut_along_two_dimensions_take_the_steps_of_whole_ones(place: Place) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    cases: Sequence[tuple[tuple[int, ...], Any, Sequence[Placement]]] = (
        ((9, 5), (4, 3, 2), [Shard(0), Shard(1)]),
        ((9, 5), (4, 5), [Shard(0), Shard(0)]),
        ((5, 6, 4), ("matrices", 2), [Shard(0), Shard(1)]),
        ((5, 6, 4), "matrices", [Shard(0), Shard(2)]),
        ((2, 5, 4, 3), "matrices", [Shard(1), Shard(0)]),
        ((6, 5), ("columns", (2, 3)), [Shard(1), Shard(0)]),
        ((6, 5), (2, 4), [Replicate(), Shard(0)]),
    )
    for base in ({"momentum": 0.9}, {"base": "muon", "ns_dtype": torch.float64}):
        weights = [torch.randn(shape) for shape, _, _ in cases]
        plain, sharded = (
            FusedLayca([{"params": [p], "chunks": c} for p, (_, c, _) in zip(each, cases, strict=True)], 0.02, **base)
            for each in (
                [Parameter(weight.clone()) for weight in weights],
                [Parameter(shared(w, mesh, list(lie))) for w, (_, _, lie) in zip(weights, cases, strict=True)],
            )
        )
        for _ in range(STEPS):
            grads = draw(weights)
            give(plain, grads)
            give(sharded, grads)
        assert off(params_of(sharded), params_of(plain)) < 1e-6


@on(2, exhaustive=(3,))
def telemetry_and_curves_of_parts_have_the_names_of_whole_ones(place: Place) -> None:
    """Of layers that lie whole on one process the statistics are those here, under their names among all."""
    plain, sharded = twins(place.mesh(), {"momentum": 0.9}, turned=place.world == 2)
    monitors = [RotationMonitor(each, per_step=True) for each in (plain, sharded)]
    for _ in range(2):
        grads = draw(params_of(plain))
        give(plain, grads)
        give(sharded, grads)
        for monitor in monitors:
            monitor.record()
    theirs, ours = (monitor.curves for monitor in monitors)
    assert ours.names == theirs.names
    torch.testing.assert_close(ours.angle, theirs.angle, rtol=1e-3, atol=1e-6, equal_nan=True)
    for one, other in zip(params_of(plain), params_of(sharded), strict=True):
        expected, found = plain.rotation_stats()[one], sharded.rotation_stats()[other]
        norms = dict(zip(expected.layer_names, expected.norm.tolist(), strict=True))
        for name, norm in zip(found.layer_names, found.norm.tolist(), strict=True):
            assert abs(norm / norms[name] - 1) < 1e-5
    for at in ("step", "now"):
        drifts = sharded.check_norms(at=at)
        assert list(drifts.above(-1.0))
        assert set(drifts.above(-1.0)) == set(plain.check_norms(at=at).above(-1.0))
        drifts.raise_if(1e-5)


@on(4)
def columns_shared_out_in_turns_are_refused(place: Place) -> None:
    """FSDP2 over tensor parallel: as layers they may be cut, but not in layers."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    (param,) = model.parameters()
    for chunks in ((3, 5), ("matrices", 2)):
        optimizer = FusedLayca([param], 0.02, chunks=chunks)
        expect(ValueError, "in turns", lambda step=optimizer.step: step())
    optimizer = FusedLayca([param], 0.02, chunks=("columns", (2, 4)))
    weight = whole(param).clone()
    plain = FusedLayca([Parameter(weight)], 0.02, chunks=("columns", (2, 4)))
    for _ in range(STEPS):
        grads = draw([weight])
        give(plain, grads)
        give(optimizer, grads)
    assert off([param], params_of(plain)) < 1e-6


@on(2, exhaustive=(3,))
def a_checkpoint_of_other_parts_is_refused(place: Place) -> None:
    """Through torch.distributed.checkpoint, which flattens it, of as many layers; the same parts go on."""
    folder = place.folder / f"parts-{place.world}"

    def made(chunks: Any) -> tuple[nn.Module, FusedLayca]:
        model = nn.Sequential(nn.Linear(5, 8, bias=False))
        fully_shard(model, mesh=place.mesh())
        return model, FusedLayca(list(model.named_parameters()), 0.02, chunks=chunks, momentum=0.9)

    def flat(model: nn.Module, optimizer: FusedLayca) -> dict[str, Any]:
        options = torch.distributed.checkpoint.state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
        return get_optimizer_state_dict(model, optimizer, options=options)

    model, optimizer = made((2, 4, 2))
    for param in model.parameters():
        give(optimizer, draw([param]))
    dcp.save({"optimizer": flat(model, optimizer)}, checkpoint_id=folder)
    for chunks, is_same in (((2, 4, 2), True), ((2, 2, 4), False)):
        other, resumed = made(chunks)
        saved = {"optimizer": flat(other, resumed)}
        dcp.load(saved, checkpoint_id=folder)

        def load(one: nn.Module = other, its: FusedLayca = resumed, state: dict[str, Any] = saved) -> None:
            options = torch.distributed.checkpoint.state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
            set_optimizer_state_dict(one, its, optim_state_dict=state["optimizer"], options=options)

        if not is_same:
            expect(ValueError, r"'0\.weight'.*chunks=\(2, 4, 2\).*chunks=\(2, 2, 4\) here", load)
            continue
        load()
        ((param, state),) = resumed.state.items()
        ((_, expected),) = optimizer.state.items()
        assert torch.equal(whole(state["radius"]), whole(expected["radius"]))
        assert resumed.param_groups[0]["chunks"] == (2, 4, 2)
        give(resumed, draw([param]))
