"""Which tensors a RotationMonitor watches, and under which names."""

import pytest
import torch
from torch import nn

from layca_fast import FusedLayca, RotationMonitor, layer_groups
from layca_fast.monitor.keeping import KEEPS

from ..support import Unknown


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm((2, 4))
        self.custom = Unknown()
        self.gates = nn.GRUCell(4, 5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.zero = nn.Linear(4, 4)
        nn.init.zeros_(self.zero.weight)
        self.tied = self.zero


LAYERS = [
    *(f"attention.in_proj_weight[{part}]" for part in ("query", "key", "value")),
    "attention.out_proj.weight",
    "custom.weight",
    *(f"gates.weight_{kind}[{gate}]" for kind in ("ih", "hh") for gate in ("reset", "update", "new")),
    "zero.weight",
]


def test_of_a_model_the_weights_of_its_layers(seed: int) -> None:
    """As layer_groups has them, and those of modules that it does not know; a layer of zeros may turn yet."""
    assert RotationMonitor(Model()).names == LAYERS


def test_of_an_optimizer_what_rotates_by_its_groups(seed: int) -> None:
    with pytest.warns(UserWarning, match=r"unknown: Unknown"):
        groups = layer_groups(Model())
    expected = [name for name in LAYERS if not name.startswith(("custom", "zero"))]
    assert sorted(RotationMonitor(FusedLayca(groups)).names) == sorted(expected)
    plain = [{"params": [torch.ones(3, 3), torch.ones(5)]}, {"params": [torch.ones(4, 2)], "chunks": 2}]
    groups = [*plain, {"params": [torch.ones(2, 2)], "rotate": False}]
    assert RotationMonitor(torch.optim.SGD(groups, 0.1)).names == ["0.0", "1.0[0]", "1.0[1]"]


def test_layers_of_the_same_name_stay_apart(seed: int) -> None:
    """Records by name, in files and in TensorBoard, have one number for each."""
    groups = [
        {"params": [("weight", torch.ones(3, 3))]},
        {"params": [("weight", torch.ones(2, 3)), ("b", torch.ones(2, 2))]},
    ]
    assert RotationMonitor(torch.optim.SGD(groups, 0.1)).names == ["0.weight", "1.weight", "b"]


def test_names_and_wildcards_choose_anything(seed: int) -> None:
    model = Model()
    chosen = ["frozen.*", "attention.in_*weight", "embed.weight"]
    assert RotationMonitor(model, layers=chosen).names == [
        "embed.weight",
        *LAYERS[:3],
        "frozen.weight",
        "frozen.bias",
    ]
    assert RotationMonitor(model.frozen, layers=["bias"]).names == ["bias"]


def test_what_cannot_be_watched_is_an_error_that_names_it(seed: int) -> None:
    with pytest.raises(TypeError, match=r"model_or_optimizer is a list: it must be a torch\.nn\.Module"):
        RotationMonitor([torch.ones(2, 2)])
    with pytest.raises(ValueError, match=r"no parameter of this LayerNorm has two or more dimensions"):
        RotationMonitor(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"parameter 'weight'.* is on the meta device"):
        RotationMonitor(nn.Linear(3, 3, device="meta"))
    with pytest.raises(TypeError, match=r"parameter 'weight'.* is complex"):
        RotationMonitor(nn.Linear(3, 3, dtype=torch.complex64))


def test_weights_without_memory_are_an_error_at_the_record(seed: int) -> None:
    """As sharded training leaves them between uses; the records so far stay."""
    model = nn.Linear(3, 4)
    monitor = RotationMonitor(model)
    model.weight.data = torch.randn(4, 3)
    model.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"the memory of parameter 'weight' .* was freed"):
        monitor.record()
    assert monitor.curves.steps == [0]


@pytest.mark.parametrize("shape", [(4, 4), (3, 4), (0,)])
@pytest.mark.parametrize("keep", KEEPS)
def test_weights_of_another_shape_are_an_error_at_the_record(keep: str, shape: tuple[int, ...], seed: int) -> None:
    """As ZeRO-3, which empties parameters between uses, and what grows a layer leave them."""
    model = nn.Linear(3, 4)
    monitor = RotationMonitor(model, keep=keep)
    model.weight.data = torch.randn(shape)
    with pytest.raises(
        ValueError, match=r"parameter 'weight' has shape .*, and had \(4, 3\) when the monitor was made"
    ):
        monitor.record()
    assert monitor.curves.steps == [0]


def test_parameters_that_were_replaced_are_told_once(seed: int) -> None:
    """Their curves would look as if training did nothing."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    by_model, by_groups = RotationMonitor(model), RotationMonitor(optimizer)
    assert by_model.curves.steps == by_groups.curves.steps == [0], "nothing to tell"
    model[1].weight = nn.Parameter(torch.randn(4, 4))
    optimizer.param_groups[0]["params"][0] = model[1].weight
    for monitor, name in ((by_model, "1.weight"), (by_groups, "0.0")):
        monitor.record()
        with pytest.warns(UserWarning, match=rf"parameters \['{name}'\] were replaced"):
            assert monitor.curves.steps == [0, 1]
        assert monitor.curves.steps == [0, 1], "and not again"
