"""layer_groups: order, tied and zero tensors, freezing, and the plan."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layca_fast import FusedLayca, LayerGroups, layer_groups

from ..support import Unknown, copy_of, resting, same_bits, turning


def test_groups_are_shared_by_equal_chunks_in_order_of_appearance_the_others_last(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2), nn.Conv1d(2, 3, 2), nn.GRU(3, 2))
    groups = layer_groups(model)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert names[:3] == [
        ["0.weight", "2.weight"],
        ["1.weight_ih_l0", "1.weight_hh_l0"],
        ["3.weight_ih_l0", "3.weight_hh_l0"],
    ]
    assert all(group["rotate"] is True and group["lr_factor"] == 1.0 for group in groups[:3])
    assert groups[3]["rotate"] is False
    assert [row.name for row in groups.rows] == [name for name, _ in model.named_parameters()]
    assert all("lr" not in group for group in groups)
    for group in groups:
        for name, param in group["params"]:
            assert param is model.get_parameter(name)


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_head_tied_to_an_embedding_is_an_embedding(embeddings: bool, seed: int) -> None:
    model = nn.ModuleDict({"head": nn.Linear(3, 5, bias=False), "hidden": nn.Linear(3, 3, bias=False)})
    model["tokens"] = nn.Embedding(5, 3)
    model["tokens"].weight = model["head"].weight
    groups = layer_groups(model, embeddings=embeddings)
    expected = {"head.weight": 1, "hidden.weight": 1} if embeddings else {"hidden.weight": 1}
    assert turning(groups) == expected
    assert resting(groups) == ({} if embeddings else {"head.weight": "embedding and logits"})


def test_a_layer_that_an_unknown_module_holds_too_rotates_once(seed: int) -> None:
    model = Unknown()
    model.inner = nn.Linear(6, 4)
    model.inner.weight = model.weight
    assert turning(layer_groups(model)) == {"weight": 1}


def test_zero_tensors_and_those_with_a_zero_layer_are_others(seed: int) -> None:
    model = nn.ModuleList([nn.Linear(3, 4, bias=False), nn.MultiheadAttention(4, 2, bias=False), nn.Linear(2, 2)])
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].in_proj_weight[4:8].zero_()
    groups = layer_groups(model, alpha=0.5)
    assert turning(groups) == {"1.out_proj.weight": 1, "2.weight": 1}
    assert resting(groups) == {
        "0.weight": "all zero",
        "1.in_proj_weight": "one of its 3 layers is all zero",
        "2.bias": "bias",
    }
    assert [group["lr_factor"] for group in groups[:2]] == [0.5**5, 1.0], "positions count what rotates"


@pytest.mark.parametrize("norm", [0.5, lambda shape: shape[0] / shape[1]], ids=["number", "function"])
def test_zero_tensors_may_rotate_from_a_norm_on(norm: Any, seed: int) -> None:
    """In groups of their own, at the rates of those that rotate, with radii of their own; and the plan says so."""
    model = nn.ModuleList([nn.Linear(3, 6, bias=False), nn.MultiheadAttention(4, 2, bias=False), nn.Linear(2, 2)])
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].in_proj_weight[4:8].zero_()
    groups = layer_groups(model, alpha=0.5, lr=0.1, zeros="rotate-later", joins_at=norm, radius=3.0)
    assert turning(groups) == {"0.weight": 1, "1.in_proj_weight": 3, "1.out_proj.weight": 1, "2.weight": 1}
    expected = [0.5, 0.5] if norm == 0.5 else [2.0, 1.0]
    assert [group.get("joins_at") for group in groups] == [*expected, None, None, None]
    assert [group["radius"] for group in groups[:3]] == ["initial", "initial", 3.0]
    assert [round(group["lr"] / 0.1, 6) for group in groups[:4]] == [round(0.5 ** (5 * i / 3), 6) for i in (3, 2, 1, 0)]
    rows = str(groups).splitlines()
    assert re.fullmatch(rf"0\.weight +\(6, 3\) +from norm {expected[0]:g} on: all zero +0\.03125", rows[1])
    assert re.search(rf"from norm {expected[1]:g} on, as 3 layers: one of its 3 layers is all zero", rows[2])
    assert rows[-1] == "rotating: 4 (6 layers), others: 1"
    optimizer = FusedLayca(groups, momentum=0.9)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[model[0].weight]["radius"].tolist() == [-expected[0]]
    assert float(optimizer.state[model[1].in_proj_weight]["radius"][1]) == -expected[1]


def test_unequal_parts_may_wait_for_norms_of_their_own(seed: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    nn.init.zeros_(model[0].weight)
    options = {"rotate": {nn.Linear: (4, 2)}, "zeros": "rotate-later", "joins_at": lambda shape: 0.5 * shape[0]}
    groups = layer_groups(model, **options)
    assert "from norm 1 on, as 2 layers: one of its 2 layers is all zero, other parts up to 2" in str(groups)
    optimizer = FusedLayca(groups, 1e-3)
    model[0].weight.grad = torch.randn(6, 4)
    optimizer.step()
    assert optimizer.state[model[0].weight]["radius"].tolist() == [-2.0, -1.0]


def test_freezing_keeps_the_others_bit_for_bit_whatever_sets_their_lr(seed: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    model(torch.randn(5, 4)).square().sum().backward()
    start = copy_of(dict(model.named_parameters()))
    groups = layer_groups(model, others="freeze", weight_decay=0.1)
    assert (groups[-1]["rotate"], groups[-1]["lr"]) == (False, 0.0)
    assert resting(groups) == {
        "0.bias": "bias, frozen",
        "1.weight": "norm layer, frozen",
        "1.bias": "norm layer, frozen",
        "2.bias": "bias, frozen",
    }
    optimizer = FusedLayca(groups, 0.1, momentum=0.9)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
    frozen = resting(groups)
    for name, param in model.named_parameters():
        assert param.requires_grad is (name not in frozen)
        assert same_bits(param.detach(), start[name].detach()) is (name in frozen), name


def test_freezing_weights_of_zeros_warns_and_names_them(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match=r"all zero.*\['1\.weight'\] will never train.*others='train'") as caught:
        groups = layer_groups(model, others="freeze")
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert resting(groups)["1.weight"] == "all zero, frozen"
    nn.init.ones_(model[1].weight)
    model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_groups(model, others="freeze")


def test_parameters_that_are_not_trainable_are_left_out(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    groups = layer_groups(model)
    assert turning(groups) == {"1.weight": 1}
    assert resting(groups) == {"1.bias": "bias"}
    assert str(groups).endswith("left out with requires_grad=False: 2")


def test_the_plan_shows_every_tensor(seed: int) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, bias=False), nn.Linear(4, 2))
    groups = layer_groups(model, alpha=-0.5)
    assert str(groups) == groups.summary()
    lines = str(groups).splitlines()
    assert [re.split(r" {2,}", line) for line in lines] == [
        ["parameter", "shape", "rotates", "lr factor"],
        ["0.weight", "(9, 4)", "no: embedding", "-"],
        ["1.in_proj_weight", "(12, 4)", "yes, as 3 layers: query, key, value", "1"],
        ["1.out_proj.weight", "(4, 4)", "yes", "0.1768"],
        ["2.weight", "(2, 4)", "yes", "0.03125"],
        ["2.bias", "(2,)", "no: bias", "-"],
        ["rotating: 3 (5 layers), others: 2"],
    ]
    shapes = [line.index("(") for line in lines[1:-1]]
    assert len(set(shapes)) == 1, "the columns are aligned"
    torch.optim.SGD(groups, lr=0.1)
    assert str(groups).splitlines() == lines, "an optimizer changes the groups, not the plan"


def test_groups_are_a_list_that_copies_and_pickles_with_its_plan(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = layer_groups(model, 0.1)
    assert repr(groups) == repr(list(groups))
    assert str(groups) != repr(groups)
    twin, copied = copy.deepcopy((model, groups))
    assert copied[0]["params"][0][1] is twin[0].weight
    for other in (copied, pickle.loads(pickle.dumps(groups))):
        assert isinstance(other, LayerGroups)
        assert (other.rows, str(other)) == (groups.rows, str(groups))
        assert same_bits(list(other), list(groups))


WRAPPERS = {
    "bare": lambda model: model,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_names_are_those_of_the_wrapped_model(wrap: Callable[[nn.Module], nn.Module], seed: int) -> None:
    model = wrap(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    groups = layer_groups(model)
    assert [row.name for row in groups.rows] == [name for name, _ in model.named_parameters()]
    assert len(turning(groups)) == 1


def test_a_model_on_the_meta_device_has_a_plan(seed: int) -> None:
    with torch.device("meta"):
        model = nn.LSTM(3, 4)
    assert turning(layer_groups(model)) == {"weight_ih_l0": 4, "weight_hh_l0": 4}


def test_the_plan_in_short_has_one_row_for_the_same_tensor_of_all_blocks(seed: int) -> None:
    """Where all else is alike; what is small and many is counted."""
    blocks = [nn.TransformerEncoderLayer(4, 2, 8) for _ in range(3)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "heads": nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])})
    groups = layer_groups(model)
    lines = groups.summary(short=True).splitlines()
    assert [re.split(r" {2,}", line) for line in lines] == [
        ["parameter", "tensors", "shape", "rotates", "lr factor"],
        ["blocks.*.self_attn.in_proj_weight", "3", "(12, 4)", "yes, as 3 layers: query, key, value", "1"],
        ["blocks.*.self_attn.out_proj.weight", "3", "(4, 4)", "yes", "1"],
        ["blocks.*.linear1.weight", "3", "(8, 4)", "yes", "1"],
        ["blocks.*.linear2.weight", "3", "(4, 8)", "yes", "1"],
        ["heads.0.weight", "1", "(2, 4)", "yes", "1"],
        ["heads.1.weight", "1", "(3, 4)", "yes", "1"],
        ["biases", "14", "-", "no: bias", "-"],
        ["norm layers", "12", "-", "no: norm layer", "-"],
        ["rotating: 14 (20 layers), others: 26"],
    ]
    assert sum(int(re.split(r" {2,}", line)[1]) for line in lines[1:-1]) == len(groups.rows)
    rates = layer_groups(model, alpha=-0.5).summary(short=True)
    assert "blocks.*" not in rates, "each has a rate of its own"
    assert "no: bias, frozen" in layer_groups(model, others="freeze").summary(short=True)


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_known_by_their_names_wait_for_their_norm_in_a_plan_made_anew(trained: bool, seed: int) -> None:
    """LoRA's B starts at zero and grows; by default it takes plain steps, then as before. One column is a vector."""
    adapter = nn.ModuleDict({"lora_A": nn.Linear(6, 2, bias=False), "lora_B": nn.Linear(2, 4, bias=False)})
    narrow = nn.ModuleDict({"lora_A": nn.Linear(6, 3, bias=False), "lora_B": nn.Linear(1, 4, bias=False)})
    model = nn.ModuleList([adapter, narrow])
    for each in (adapter, narrow):
        nn.init.constant_(each["lora_B"].weight, float(trained))
    assert set(turning(layer_groups(model))) == {"0.lora_A.weight", "1.lora_A.weight"}
    groups = layer_groups(model, zeros="rotate-later", joins_at=0.25)
    assert turning(groups) == {"0.lora_A.weight": 1, "1.lora_A.weight": 1, "0.lora_B.weight": 1}
    assert [(row.name, row.joins_at) for row in groups.rows if row.joins_at] == [("0.lora_B.weight", 0.25)]
    assert "from norm 0.25 on: LoRA's B, which starts at zero" in str(groups)
    with pytest.warns(UserWarning, match="will never train") if not trained else warnings.catch_warnings():
        layer_groups(model, others="freeze")
