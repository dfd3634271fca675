"""What layer_groups and FusedLayca say where less rotates than one would think, or more than is good."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from layca_fast import FusedLayca, layer_groups

from ..support import Unknown, parameter, resting, turning


class Conv1D(nn.Module):
    """As transformers has it: weights stored as (in, out)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(into, out))
        self.bias = nn.Parameter(torch.zeros(out))


def model_with(unknown: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), unknown)


def test_unknown_types_are_named_with_the_way_out_where_nothing_rotates(seed: int) -> None:
    expected = r"no layer of this ModuleList rotates.*Unknown \(2 with 48 weights\).*rotate=\[Unknown\].*\{Unknown: n\}"
    with pytest.warns(UserWarning, match=expected) as caught:
        layer_groups(nn.ModuleList([Unknown(), Unknown()]))
    assert (len(caught), caught[0].filename) == (1, __file__)


@pytest.mark.parametrize("width", [6, 60])
def test_large_matrices_of_unknown_types_are_worth_a_warning_and_small_ones_are_not(width: int, seed: int) -> None:
    model = model_with(Unknown(), width)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer_groups(model)
    said = [str(each.message) for each in caught]
    assert (said == []) == (0.1 * (24 + width**2) >= 24)
    assert all(re.search(r"40% of the weights in matrices of this Sequential do not rotate", each) for each in said)


@pytest.mark.parametrize("rotate", [[Unknown], {Unknown: 2}, {Unknown: False}], ids=str)
def test_who_decides_on_a_type_is_not_warned(rotate: Any, seed: int) -> None:
    groups = layer_groups(model_with(Unknown(), 6), rotate=rotate)
    rotates = "1.weight" in turning(groups)
    assert rotates == (rotate != {Unknown: False})
    assert rotates or resting(groups)["1.weight"] == "as rotate says"


def test_nothing_but_embeddings_is_said_too(seed: int) -> None:
    with pytest.warns(UserWarning, match=r"no layer of this Embedding rotates.*embeddings=True"):
        layer_groups(nn.Embedding(5, 3))


def test_a_module_of_the_model_stands_for_all_inside_of_it(seed: int) -> None:
    """And wins over its type; what is named inside of it wins over both."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    groups = layer_groups(model, rotate={nn.Linear: 2, model[1]: False, model[1][1]: 4, model[2]: False})
    assert turning(groups) == {"0.weight": 2, "1.1.weight": 4}
    assert {name for name, reason in resting(groups).items() if reason == "as rotate says"} == {
        "1.0.weight",
        "2.weight",
    }


def test_the_conv1d_of_transformers_is_a_layer_and_is_not_cut_along_its_inputs(seed: int) -> None:
    model = nn.Sequential(Conv1D(12, 4), Conv1D(4, 4))
    groups = layer_groups(model)
    assert turning(groups) == {"0.weight": 1, "1.weight": 1}
    assert "yes: stored as (in, out)" in str(groups)
    assert turning(layer_groups(model, rotate=[Conv1D])) == turning(groups)
    with pytest.raises(ValueError, match=r"chunks=3 would cut the weights of Conv1D along their inputs"):
        layer_groups(model, rotate={Conv1D: 3})
    packed = layer_groups(model, rotate={Conv1D: ("columns", 3), model[1]: 1})
    assert turning(packed) == {"0.weight": ("columns", 3), "1.weight": 1}
    assert "yes, as 3 layers: stored as (in, out)" in str(packed)
    assert turning(layer_groups(model, rotate={Conv1D: "columns"})) == {"0.weight": "columns", "1.weight": "columns"}
    assert turning(layer_groups(model, rotate={model[0]: False})) == {"1.weight": 1}


def test_an_optimizer_of_vectors_alone_says_that_nothing_rotates(seed: int) -> None:
    with pytest.warns(UserWarning, match=r"nothing rotates: none of the 2 parameters.*rotate=False") as caught:
        FusedLayca([parameter(3), parameter(4)], 0.1)
    assert (len(caught), caught[0].filename) == (1, __file__)
    FusedLayca([parameter(3)], 0.1, rotate=False)
    FusedLayca([parameter(3), parameter(2, 2)], 0.1)


HIDDEN = [(53248, 16384), (16384, 53248), (28672, 8192), (3072, 768), (1000, 2048), (65536, 1)]
VOCABULARIES = [(50257, 768), (32000, 4096), (128256, 4096), (151936, 896), (30522, 768)]


@pytest.mark.parametrize(("shape", "warned"), [(s, False) for s in HIDDEN] + [(s, True) for s in VOCABULARIES], ids=str)
def test_a_vocabulary_is_told_from_hidden_layers_by_its_shape(shape: tuple[int, ...], warned: bool, seed: int) -> None:
    """Shapes of published models. A tensor of one element stands for the memory."""
    from layca_fast.state.doubts import vocabulary_rotates

    weight = torch.ones(1).expand(shape)
    groups = [{"params": [parameter(2, 2), weight], "rotate": None, "param_names": ["a", "wte.weight"]}]
    said = vocabulary_rotates(groups)
    assert (said is not None) == warned
    assert said is None or re.match(r"parameter 'wte\.weight' .*layer_groups\(model\).*rotate=True to silence", said)
    assert vocabulary_rotates([{**groups[0], "rotate": True}]) is None


def test_an_optimizer_warns_of_a_vocabulary_once(seed: int) -> None:
    with pytest.warns(UserWarning, match="parameter 0 of group 0 .* seems to be an embedding") as caught:
        FusedLayca([nn.Parameter(torch.empty(2**14, 2)), nn.Parameter(torch.empty(2**14, 2))], 0.1)
    assert (len(caught), caught[0].filename) == (1, __file__)
