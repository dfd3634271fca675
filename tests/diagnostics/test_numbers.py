"""Layer convergence, gradient noise and norm propagation: closed forms, dense numpy, and input that they refuse."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layca_fast import diagnostics
from layca_fast.diagnostics import (
    Spectrum,
    convergence_rate,
    convergence_rates,
    gradient_covariance,
    noise_scale,
    norm_propagation,
    snapshot,
)


def test_gradient_descent_on_a_quadratic_converges_at_its_rate(seed: int) -> None:
    """w <- (1 - rate) w towards 0: C = -ln(1 - rate) per step, whatever the interval and the layer."""
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)).double()
    shrink = {"0.weight": 0.7, "1.weight": 0.2}
    snapshots = {}
    for step in (0, 3, 4, 9):
        weights = model.state_dict()
        snapshots[step] = {name: weights[name] * (1 - rate) ** step for name, rate in shrink.items()}
    # Dictionaries need not be in the order of time.
    rates = convergence_rates(dict(reversed(snapshots.items())), {name: 0 * weights[name] for name in shrink})
    assert set(rates) == set(shrink)
    for name, rate in shrink.items():
        assert rates[name] == pytest.approx([-math.log1p(-rate)] * 3, rel=1e-12)


def test_convergence_rates_are_those_of_numpy(seed: int) -> None:
    before, after, final = (torch.randn(3, 4, 2) for _ in range(3))
    distances = [np.linalg.norm((each.double() - final.double()).numpy().ravel()) for each in (before, after)]
    expected = math.log(distances[0] / distances[1]) / 2.5
    assert convergence_rate(before, after, final, 2.5) == pytest.approx(expected, rel=1e-12)
    assert convergence_rate(before, final, final, 1) == math.inf
    assert convergence_rate(final, after, final, 1) == -math.inf
    assert math.isnan(convergence_rate(final, final, final, 1))


def test_snapshots_are_copies(seed: int) -> None:
    model = nn.Linear(3, 2)
    taken = snapshot(model)
    kept = {name: param.detach().clone() for name, param in model.named_parameters()}
    with torch.no_grad():
        model.weight.zero_()
    assert taken.keys() == kept.keys()
    assert all(torch.equal(taken[name], kept[name]) and not taken[name].requires_grad for name in kept)


def test_noise_scale() -> None:
    assert noise_scale(0.3, 60) == pytest.approx(0.005)


class Noisy(nn.Module):
    """What a measurement could disturb or miss: batch norm, dropout, tied, unused and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.relu(self.norm(self.first(x) * self.frozen))))


def test_the_gradient_covariance_is_that_of_dense_numpy(seed: int) -> None:
    """All eigenvalues of the n x n covariance, from gradients that backward() leaves."""
    model = Noisy().eval()
    batches = [torch.randn(7, 6) for _ in range(5)]
    gradients = []
    for batch in batches:
        model.zero_grad()
        model(batch).square().mean().backward()
        trained = [param for param in model.parameters() if param.requires_grad]
        flat = [torch.zeros_like(param) if param.grad is None else param.grad for param in trained]
        gradients.append(torch.cat([each.flatten() for each in flat]).double().numpy())
    dense = np.cov(np.array(gradients).T, bias=True)
    expected = np.linalg.eigvalsh(dense)[::-1][:5]
    spectrum = gradient_covariance(model, lambda batch: model(batch).square().mean(), batches)
    np.testing.assert_allclose(spectrum.eigenvalues.numpy(), expected, rtol=1e-6, atol=1e-9 * expected[0])
    assert spectrum.largest == float(spectrum.eigenvalues[0])


def test_the_gradient_covariance_of_two_opposite_gradients(seed: int) -> None:
    """Gradients g + a and g - a: the covariance is a a^T, its largest eigenvalue |a|^2."""
    weight = nn.Linear(8, 1, bias=False)
    middle, away = torch.randn(8), torch.randn(8)
    spectrum = gradient_covariance(weight, lambda x: weight(x).sum(), [middle + away, middle - away])
    assert spectrum.largest == pytest.approx(float(away.double().square().sum()), rel=1e-5)


def test_large_gradients_are_taken_in_parts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(13, 11)
    batches = [torch.randn(4, 13) for _ in range(3)]

    def measure() -> Tensor:
        return gradient_covariance(model, lambda batch: model(batch).square().mean(), batches).eigenvalues

    whole = measure()
    monkeypatch.setattr(diagnostics.noise, "PART", 20)
    torch.testing.assert_close(measure(), whole, rtol=1e-9, atol=1e-9 * float(whole[0]))


def test_norms_pass_unchanged_through_orthogonal_layers(seed: int) -> None:
    """Linear and orthogonal: |h_l| = |x| and |dL/dW_l| = |x| |e| for every sample and layer, exactly."""
    layers = [nn.Linear(12, 12, bias=False, dtype=torch.float64) for _ in range(5)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    model = nn.Sequential(*layers)
    ratios = norm_propagation(model, torch.randn(9, 12, dtype=torch.float64), lambda out: out.pow(4).mean())
    assert list(ratios) == ["0", "1", "2", "3", "4"]
    for each in ratios.values():
        assert each.activation == pytest.approx(1, rel=1e-10)
        assert each.gradient == pytest.approx(1, rel=1e-10)


def test_he_initialisation_keeps_norms_and_a_smaller_one_loses_them(seed: int) -> None:
    """At width 800 a draw of the weights moves a layer's mean square by 8 %: the tolerance is nine deviations."""

    def measured(scale: float) -> dict[str, diagnostics.NormRatios]:
        linear = [nn.Linear(800, 800, bias=False) for _ in range(3)]
        for layer in linear:
            nn.init.normal_(layer.weight, std=scale * math.sqrt(2 / 800))
        model = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
        errors = torch.randn(40, 800)
        return norm_propagation(model, torch.randn(40, 800), lambda outputs: (outputs * errors).sum(1))

    kept, lost = measured(1.0), measured(0.5)
    assert kept["4"].activation == pytest.approx(1, abs=0.5)
    assert kept["0"].gradient == pytest.approx(1, abs=0.5)
    assert lost["4"].activation == pytest.approx(0.25, abs=0.13)
    assert lost["0"].gradient == pytest.approx(0.25, abs=0.13)


class Convolutions(nn.Module):
    """A convolution used twice, an in-place activation, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.shared = nn.Conv2d(3, 3, 3, padding="same", padding_mode="circular", bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.shared(self.relu(self.shared(x))))
        return self.head(x.mean((2, 3)))


def test_per_sample_gradient_norms_are_those_of_backward(seed: int) -> None:
    """Each sample alone through backward(): convolutions, a layer used twice, in-place activations."""
    model, inputs = Convolutions(), torch.randn(4, 2, 6, 5)
    expected: dict[str, list[float]] = {"stem": [], "shared": [], "head": []}
    for sample in inputs.split(1):
        model.zero_grad()
        outputs = model(sample)
        outputs.retain_grad()
        outputs.exp().sum().backward()
        scale = float(sample.norm() * outputs.grad.norm())
        for name, ratios in expected.items():
            ratios.append(float(model.get_submodule(name).weight.grad.norm()) / scale)
    found = norm_propagation(model, inputs, lambda outputs: outputs.exp().sum(1))
    assert set(found) == set(expected)
    for name, ratios in expected.items():
        assert found[name].gradient == pytest.approx(math.sqrt(np.mean(np.square(ratios))), rel=1e-4)
    assert found["stem"].activation == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_borrowed_models_come_back_as_they_were(training: bool, seed: int) -> None:
    model = Noisy().train(training)
    model(torch.randn(5, 6)).sum().backward()
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(tensor, tensor.detach().clone(), tensor._version) for tensor in tensors]
    grads = [None if param.grad is None else (param.grad, param.grad.clone()) for param in model.parameters()]
    state = torch.get_rng_state()
    # As optimizers do that step inside of backward().
    model.last.bias.register_post_accumulate_grad_hook(lambda param: pytest.fail("a step was taken"))
    gradient_covariance(model, lambda batch: model(batch).mean(), [torch.ones(5, 6), torch.eye(6)])
    norm_propagation(model, torch.ones(4, 6), lambda outputs: outputs.sum(1))
    with pytest.raises(ZeroDivisionError):
        gradient_covariance(model, lambda batch: 1 / 0, [1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    now = [*model.parameters(), *model.buffers()]
    assert all(one is other and one._version == version for one, (other, _, version) in zip(now, kept, strict=True))
    assert all(torch.equal(one, copy) for one, (_, copy, _) in zip(now, kept, strict=True))
    for param, before in zip(model.parameters(), grads, strict=True):
        assert param.grad is None if before is None else param.grad is before[0] and torch.equal(*before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_eigenvalues_in_closed_form() -> None:
    spectrum = Spectrum(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    assert (spectrum.largest, spectrum.condition(0.2), spectrum.condition(0.8)) == (8, 1, 8)
    assert spectrum.condition(0.41) == 4
    assert spectrum.condition() == math.inf
    assert math.isnan(Spectrum(torch.zeros(3, dtype=torch.float64)).condition())
    # 0.07 * 100 is above 7 in floating point.
    assert Spectrum(torch.arange(100, 0, -1).double()).condition(0.07) == 100 / 94


def _rate(**changes: Any) -> Any:
    return convergence_rate(**{"before": torch.ones(2), "after": torch.ones(2), "final": torch.zeros(2)} | changes)


BAD = {
    "shapes": (lambda: _rate(after=torch.ones(3), elapsed=1), ValueError, r"shapes \[\(2,\), \(3,\), \(2,\)\]"),
    "no time": (lambda: _rate(elapsed=0), ValueError, "elapsed=0: must be a finite time > 0"),
    "one snapshot": (lambda: convergence_rates({0: {}}, {}), ValueError, "needs two or more"),
    "another model": (lambda: convergence_rates({0: {}, 1: {}}, {"w": torch.ones(1)}), ValueError, "at 0 lacks 'w'"),
    "no module": (lambda: snapshot([1]), TypeError, "torch.nn.Module, not a list"),
    "negative lr": (lambda: noise_scale(-1, 2), ValueError, "lr=-1: must be a finite number >= 0"),
    "no batch": (lambda: noise_scale(1, 0), ValueError, "batch_size=0: must be a finite number > 0"),
    "one batch": (lambda: gradient_covariance(nn.Linear(1, 1), len, [1]), ValueError, "1 given, .* two or more"),
    "untrained": (lambda: gradient_covariance(nn.ReLU(), len, [1, 2]), ValueError, "ReLU requires a gradient"),
    "not scalar": (
        lambda: gradient_covariance(nn.Linear(1, 1), lambda _: torch.ones(2), [1, 2]),
        ValueError,
        r"shape \(2,\): it must return a tensor of one element",
    ),
    "no graph": (
        lambda: gradient_covariance(nn.Linear(1, 1), lambda _: torch.ones(1), [1, 2]),
        ValueError,
        "without a graph",
    ),
    "tokens": (lambda: norm_propagation(nn.Linear(1, 1), torch.ones(2, 1).long(), len), TypeError, "inputs must be"),
    "no layers": (lambda: norm_propagation(nn.ReLU(), torch.ones(2, 1), len), ValueError, "has no Linear"),
    "empty": (lambda: norm_propagation(nn.Linear(1, 1), torch.ones(2, 1), len, []), ValueError, "at least one layer"),
    "unknown": (
        lambda: norm_propagation(Convolutions(), torch.ones(2, 1), len, ["relu"]),
        ValueError,
        r"'relu' is no Linear.* choose from \['stem', 'shared', 'head'\]",
    ),
    "groups": (
        lambda: norm_propagation(nn.Conv2d(2, 2, 1, groups=2), torch.ones(2, 1), len),
        ValueError,
        "2 groups.* leave it out",
    ),
    "frozen": (
        lambda: norm_propagation(nn.Linear(1, 1).requires_grad_(False), torch.ones(2, 1), len),
        ValueError,
        "require no gradient: leave them out",
    ),
    "p": (lambda: Spectrum(torch.ones(1)).condition(0.0), ValueError, "p=0.0: must lie in 0 < p <= 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
