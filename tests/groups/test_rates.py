"""layer_groups: the paper's layer-wise rates, from the factors to the angles that layers turn by in a training."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from layca_fast import FusedLayca, layer_groups
from layca_fast.commands.verify import angle_between, angle_tolerance, layers_of

from ..support import contents, copy_of, native_backends, params_of, relative_distance, same_bits

ALPHAS = (-0.6, 0.0, 0.6)

MOMENTUM = 0.9


class Small(nn.Module):
    """Tokens (N, 5) to logits (N, 3), through every kind of layer that packs several or none."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.memory = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.convolution(self.tokens(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.memory(self.attention(x))[0][:, -1])


#: What rotates in Small, in forward order, with its chunks.
ROTATING = {
    "convolution.weight": 1,
    "attention.self_attn.in_proj_weight": 3,
    "attention.self_attn.out_proj.weight": 1,
    "attention.linear1.weight": 1,
    "attention.linear2.weight": 1,
    "memory.weight_ih_l0": 4,
    "memory.weight_hh_l0": 4,
    "head.weight": 1,
}


def backward(model: nn.Module) -> None:
    model.zero_grad()
    tokens, targets = torch.randint(11, (4, 5)), torch.randint(3, (4,))
    nn.functional.cross_entropy(model(tokens), targets).backward()


def paper_rate(rate: float, layer: int, layers: int, alpha: float) -> float:
    """The paper's rate of one layer, in logarithms."""
    if layers == 1:
        return rate
    if alpha > 0:
        return math.exp(math.log(rate) + 5 * (layers - 1 - layer) / (layers - 1) * math.log(1 - alpha))
    return math.exp(math.log(rate) + 5 * layer / (layers - 1) * math.log(1 + alpha))


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The lr of every tensor, by name."""
    return {name: float(group["lr"]) for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("alpha", [*ALPHAS, -0.99, 0.99])
def test_rates_are_the_papers_in_forward_order(alpha: float, layers: int, seed: int) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers)))
    expected = {f"{layer}.weight": paper_rate(0.3, layer, layers, alpha) for layer in range(layers)}
    groups = layer_groups(model, 0.3, alpha)
    assert rates(FusedLayca(groups, 7.0)) == pytest.approx(expected, rel=1e-12)
    assert rates(FusedLayca(layer_groups(model, alpha=alpha), 0.3)) == pytest.approx(expected, rel=1e-12)
    factors = {name: group["lr_factor"] for group in groups for name, _ in group["params"]}
    assert factors == pytest.approx({name: rate / 0.3 for name, rate in expected.items()}, rel=1e-12)
    assert [row.lr_factor for row in groups.rows] == list(factors.values())


@pytest.mark.parametrize(("momentum", "recommended"), [(0.0, 3**-3), (0.9, 3**-5)])
def test_without_an_lr_factors_multiply_the_recommended_one(momentum: float, recommended: float, seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    expected = {"0.weight": 1.0, "1.weight": 0.4**5, "0.bias": 1.0, "1.bias": 1.0}
    optimizer = FusedLayca(layer_groups(model, alpha=-0.6), momentum=momentum)
    assert rates(optimizer) == pytest.approx({name: factor * recommended for name, factor in expected.items()})
    # A copied group has an lr, which is not multiplied again.
    optimizer.add_param_group({**optimizer.param_groups[1], "params": [("new", nn.Parameter(torch.randn(2, 2)))]})
    assert rates(optimizer)["new"] == rates(optimizer)["1.weight"]


def test_a_tensor_lr_is_shared_at_factor_1_and_multiplied_at_others(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    lr = torch.tensor(0.25, dtype=torch.float64)
    for groups in (layer_groups(model, lr, 0.6), FusedLayca(layer_groups(model, alpha=0.6), lr).param_groups):
        early, late, others = groups
        assert late["lr"] is lr
        assert others["lr"] is lr
        assert isinstance(early["lr"], Tensor)
        assert float(early["lr"]) == pytest.approx(0.25 * 0.4**5, rel=1e-12)
    assert float(lr) == 0.25


def test_the_others_have_their_own_lr_and_decay(seed: int) -> None:
    model = nn.Linear(3, 4)
    options = {"base": "sgd_amom", "momentum": 0.7, "radius": "current"}
    layers, others = layer_groups(model, 0.1, others_lr=0.02, weight_decay=0.3, **options)
    assert (layers["lr"], others["lr"]) == (0.1, 0.02)
    assert layers["weight_decay"] == 0.0
    assert others["weight_decay"] == 0.3
    for group in (layers, others):
        assert {name: group[name] for name in options} == options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@native_backends
def test_in_a_training_each_layer_turns_by_its_rate_and_the_others_take_the_plain_step(
    backend: str, alpha: float, dtype: torch.dtype, seed: int
) -> None:
    rate = 0.05
    model = Small().to(dtype)
    optimizer = FusedLayca(layer_groups(model, alpha=alpha), rate, momentum=MOMENTUM, backend=backend)
    buffers: dict[str, Tensor] = {}
    expected = {name: paper_rate(rate, i, len(ROTATING), alpha) for i, name in enumerate(ROTATING)}
    for _ in range(3):
        backward(model)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer.step()
        for name, param in model.named_parameters():
            buffers[name] = MOMENTUM * buffers[name] + param.grad if name in buffers else param.grad.clone()
            if name not in ROTATING:
                plain = before[name] - rate * buffers[name]
                assert relative_distance(param, plain) <= (1e-6 if dtype == torch.float32 else 1e-14), name
                continue
            for start, end in zip(*(layers_of(w, ROTATING[name]) for w in (before[name], param)), strict=True):
                angle = math.atan(expected[name])
                tolerance = angle_tolerance(dtype, expected[name], start.numel())
                assert angle_between(start, end) == pytest.approx(angle, rel=tolerance), name
                assert float(end.norm()) == pytest.approx(float(start.norm()), rel=1e-6)


def test_other_optimizers_take_the_groups_and_their_rates(seed: int) -> None:
    model = Small()
    groups = layer_groups(model, 0.1, -0.6, others_lr=0.7)
    optimizer = torch.optim.SGD(groups, lr=5.0)
    backward(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step()
    for name, param in model.named_parameters():
        rotating = list(ROTATING)
        rate = paper_rate(0.1, rotating.index(name), len(rotating), -0.6) if name in ROTATING else 0.7
        torch.testing.assert_close(param.detach(), before[name] - rate * param.grad)
    assert set(rates(optimizer)) == set(before)


def trained(model: nn.Module, **options: Any) -> FusedLayca:
    optimizer = FusedLayca(layer_groups(model, alpha=-0.6), 0.05, momentum=MOMENTUM, **options)
    for _ in range(2):
        backward(model)
        optimizer.step()
    return optimizer


def test_a_checkpoint_goes_on_with_the_same_bits_rates_and_names(seed: int) -> None:
    model = Small()
    optimizer = trained(model)
    saved = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(model)
    # Its own rates must give way to the saved ones, which must not be multiplied again.
    resumed = FusedLayca(layer_groups(twin, alpha=-0.6), 3.0)
    resumed.load_state_dict(saved)
    assert rates(resumed) == rates(optimizer)
    backward(model)
    for param, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        param.grad = copy_of(theirs.grad)
    optimizer.step()
    resumed.step()
    assert same_bits(contents(resumed), contents(optimizer))


def test_a_checkpoint_of_sgd_on_the_same_groups_is_still_foreign(seed: int) -> None:
    """Its groups hold some of our options, but its lr is no rotation rate."""
    model = Small()
    sgd = torch.optim.SGD(layer_groups(model, 5.0), momentum=MOMENTUM)
    backward(model)
    sgd.step()
    optimizer = FusedLayca(layer_groups(model), 0.05, momentum=MOMENTUM)
    before = rates(optimizer)
    with pytest.warns(UserWarning, match="another optimizer wrote this checkpoint"):
        optimizer.load_state_dict(sgd.state_dict())
    assert rates(optimizer) == before
    for param in params_of(optimizer):
        assert same_bits(optimizer.state[param]["momentum_buffer"], sgd.state[param]["momentum_buffer"])


def test_a_scheduler_keeps_the_ratios_of_the_rates(seed: int) -> None:
    model = Small()
    optimizer = trained(model)
    start = rates(optimizer)
    scheduler = LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    for epoch in range(1, 4):
        backward(model)
        before = layers_of(model.memory.weight_ih_l0, 4)
        optimizer.step()
        rate = start["memory.weight_ih_l0"] / epoch
        for first, second in zip(before, layers_of(model.memory.weight_ih_l0, 4), strict=True):
            assert angle_between(first, second) == pytest.approx(
                math.atan(rate), rel=angle_tolerance(torch.float32, rate, first.numel())
            )
        scheduler.step()
        assert rates(optimizer) == pytest.approx({name: rate / (1 + epoch) for name, rate in start.items()}, rel=1e-12)
