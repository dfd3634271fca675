"""layer_groups with a base of their own for the others: who is whose, which options are, the head, and the plan."""

from typing import Any

import pytest
import torch
from torch import nn

from layca_fast import FusedLayca, layer_groups

from ..support import norm_of, params_of, resting, turning


class Language(nn.Module):
    """A small model of language: convolution, norm, packed attention, and a head tied to the embedding or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        x = x + self.conv(x.mT).mT
        x = x + self.attention(x, x, x)[0]
        logits: torch.Tensor = self.head(self.norm(x + self.hidden(x).relu()))
        return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bases", [("muon", "adam"), ("sgd", "lion"), ("adam", "sgd")], ids=str)
def test_every_parameter_is_in_one_group_of_its_base(bases: tuple[str, str], tied: bool, seed: int) -> None:
    model = Language(tied)
    groups = layer_groups(model, 0.05, base=bases[0], others_base=bases[1], others_lr=0.01)
    placed = [name for group in groups for name, _ in group["params"]]
    assert sorted(placed) == sorted(name for name, _ in model.named_parameters())
    assert turning(groups) == {
        "conv.weight": 1,
        "attention.in_proj_weight": 3,
        "attention.out_proj.weight": 1,
        "hidden.weight": 1,
    }
    reasons = resting(groups)
    assert reasons["tokens.weight"] == ("embedding and logits" if tied else "embedding")
    assert tied or reasons["head.weight"] == "logits"
    for group in groups:
        rotates = group["rotate"]
        assert (group["base"], group["lr"]) == ((bases[0], 0.05) if rotates else (bases[1], 0.01))


def test_the_model_trains_with_it(seed: int) -> None:
    """Muon's matrices keep their norms, and all the rest moves."""
    model = Language(tied=True)
    optimizer = FusedLayca(layer_groups(model, base="muon", others_base="adam", others_lr=0.01))
    assert {group["lr"] for group in optimizer.param_groups} == {2**-4, 0.01}
    before = [param.detach().clone() for param in params_of(optimizer)]
    tokens = torch.randint(11, (4, 6))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for param, old in zip(params_of(optimizer), before, strict=True):
        assert not torch.equal(param, old)
        if "radius" in optimizer.state[param]:
            assert norm_of(param) == pytest.approx(norm_of(old), rel=1e-5)


def test_options_go_to_the_base_that_has_them(seed: int) -> None:
    options: dict[str, Any] = {
        "momentum": 0.9,
        "eps": 1e-6,
        "betas": (0.8, 0.9),
        "weight_decay": 0.1,
        "rule": "hyperball",
    }
    groups = layer_groups(Language(True), base="muon", others_base="adam", **options)
    optimizer = FusedLayca(groups)
    *rotating, others = optimizer.param_groups
    for group in rotating:
        assert (group["momentum"], group["eps"], group["rule"], group["weight_decay"]) == (0.9, 1e-6, "hyperball", 0.0)
        assert "betas" not in group
    assert (others["betas"], others["eps"], others["weight_decay"]) == ((0.8, 0.9), 1e-8, 0.1)
    assert "momentum" not in others
    assert others["lr"] == 3**-5, "what is recommended for its own base"


def test_the_plan_shows_what_trains_each_tensor(seed: int) -> None:
    groups = layer_groups(Language(True), 0.05, base="muon", others_base="adam", others_lr=torch.tensor(0.01))
    lines = {line.split()[0]: line for line in str(groups).splitlines()}
    assert lines["parameter"].split()[-3:] == ["base", "rule", "lr"]
    assert lines["attention.in_proj_weight"].split()[-4:] == ["1", "muon", "layca", "0.05"]
    assert "yes, as 3 layers" in lines["attention.in_proj_weight"]
    assert lines["norm.bias"].split()[-4:] == ["-", "adam", "-", "0.01"]
    assert "optimizer's" in str(layer_groups(Language(True), base="muon", others_base="adam"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "muon"}, r"base='muon' directs whole matrices.*others_base='adam'"),
        ({"base": "sgd", "others_base": "muon"}, r"others_base='muon' directs whole matrices.*use 'adam'"),
        ({"base": "muon", "others_base": "adan"}, r"base='adan' is unknown.*adam"),
        ({"base": "muon", "others_base": "adam", "others": "freeze"}, r"others_base='adam'.*leave it out"),
    ],
    ids=str,
)
def test_pairs_that_cannot_be_are_refused(options: dict[str, Any], message: str, seed: int) -> None:
    with pytest.raises(ValueError, match=message):
        layer_groups(Language(True), **options)


def test_a_head_is_what_the_model_says_or_the_last_linear(seed: int) -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert resting(layer_groups(plain, base="muon", others_base="adam"))["2.weight"] == "logits"
    model = Language(tied=False)
    model.get_output_embeddings = lambda: model.hidden
    assert resting(layer_groups(model, base="muon", others_base="adam"))["hidden.weight"] == "logits"


@pytest.mark.parametrize("asked", [None, 1, False])
def test_a_head_of_a_type_of_its_own_is_found_by_its_shape(asked: int | None, seed: int) -> None:
    """Not the last Linear in its stead, which is hidden; what the caller says of the head counts."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(11, 8))

    model = nn.Sequential(nn.Embedding(11, 8), nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), Head())
    groups = layer_groups(model, base="muon", others_base="adam", rotate={} if asked is None else {Head: asked})
    hidden = {"2.weight": 1, "3.weight": 1}
    assert turning(groups) == {**hidden, **({"4.weight": 1} if asked else {})}
