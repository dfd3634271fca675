"""rotation_stats(): the numbers of the last step against a computation by hand, and counts over the whole run."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from layca_fast import FusedLayca, RotationMonitor, RotationStats

from ..support import copy_of, every_backend, native_backends, parameter, random_gradients, same_bits, train

EXACT = {"rel": 1e-12, "abs": 1e-14}


def values(stats: RotationStats, name: str) -> list[float]:
    return getattr(stats, name).tolist()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["lr float", "lr tensor"])
@every_backend
def test_the_last_step_against_a_computation_by_hand(backend: str, as_tensor: bool, seed: int) -> None:
    """Weights, base step and norms are those from before the step; drift is what happened to the weights since."""
    param, plain = (parameter(6, 5, backend=backend, dtype=torch.float64) for _ in range(2))
    lr = torch.tensor(0.07, dtype=torch.float64) if as_tensor else 0.07
    groups = [{"params": [param], "chunks": 3}, {"params": [plain], "rotate": False}]
    optimizer = FusedLayca(groups, lr, momentum=0.8, nesterov=True, maximize=True, backend=backend)
    start = param.detach().clone()
    first, second = random_gradients([param, plain], 2)
    train(optimizer, [first])
    radii = [float(part.norm()) for part in start.chunk(3)]
    param.data[:2] *= 1.5
    before = copy_of([param, plain])
    train(optimizer, [second])
    steps = [-(g2 + 0.8 * (0.8 * g1 + g2)) for g1, g2 in zip(first, second, strict=True)]
    stats = optimizer.rotation_stats()
    assert set(stats) == {param, plain}
    turned, straight = stats[param], stats[plain]
    pairs = [(w.flatten(), u.flatten()) for w, u in zip(before[0].chunk(3), steps[0].chunk(3), strict=True)]
    assert values(turned, "angle") == pytest.approx([math.atan(0.07)] * 3, **EXACT)
    assert values(turned, "cosine") == pytest.approx([float(w @ u / w.norm() / u.norm()) for w, u in pairs], **EXACT)
    assert values(turned, "step_norm") == pytest.approx([float(u.norm()) for _, u in pairs], **EXACT)
    assert values(turned, "norm") == pytest.approx([float(w.norm()) for w, _ in pairs], **EXACT)
    assert values(turned, "radius") == pytest.approx(radii, **EXACT)
    assert values(turned, "drift") == pytest.approx([0.5, 0.0, 0.0], rel=1e-12, abs=1e-14)
    assert values(straight, "angle") == [0.0]
    assert values(straight, "norm") == pytest.approx([float(before[1].norm())], **EXACT)
    assert values(straight, "step_norm") == pytest.approx([float(steps[1].norm())], **EXACT)
    for each in (turned, straight):
        assert all(not getattr(each, name).any() for name in ("non_finite", "no_direction", "broken"))


def test_stats_have_the_names_of_a_monitor(seed: int) -> None:
    named = [("bias", parameter(3)), ("matrix", parameter(3, 4))]
    groups = [{"params": named}, {"params": [("other", parameter(2, 2))]}]
    optimizer = FusedLayca(groups, 0.1)
    train(optimizer, random_gradients([param for group in groups for _, param in group["params"]], 1))
    assert {param: stats.name for param, stats in optimizer.rotation_stats().items()} == {
        param: name for group in groups for name, param in group["params"]
    }
    unnamed = FusedLayca([{"params": [parameter(2)]}, {"params": [parameter(3, 3), parameter(2, 2)]}], 0.1)
    train(unnamed, random_gradients([param for group in unnamed.param_groups for param in group["params"]], 1))
    assert {stats.name for stats in unnamed.rotation_stats().values()} == {"0.0", "1.0", "1.1"}
    assert RotationMonitor(unnamed).names == ["1.0", "1.1"]


def test_stats_print_as_a_table(seed: int) -> None:
    """The least and the largest of a tensor's layers, in the order of the tensors."""
    groups = [{"params": [("packed", parameter(6, 4))], "chunks": 3}, {"params": [("bias", parameter(5))]}]
    optimizer = FusedLayca(groups, 0.1)
    grads = [torch.randn(6, 4), torch.full((5,), torch.nan)]
    grads[0][:2] = 0
    train(optimizer, [grads])
    head, packed, bias = (re.split(r" {2,}", line) for line in str(optimizer.rotation_stats()).splitlines())
    assert head[:4] == ["parameter", "layers", "angle", "cos(w, u)"]
    assert packed[:3] == ["packed", "3", f"0 to {math.atan(0.1):.3g}"]
    assert packed[-3:] == ["0", "1", "0"]
    assert (bias[0], bias[-3:]) == ("bias", ["5", "0", "0"])


@native_backends
def test_before_the_first_step_there_is_nothing_to_tell(backend: str, seed: int) -> None:
    assert FusedLayca([parameter(3, 4, backend=backend)], 0.1, backend=backend).rotation_stats() == {}


@every_backend
def test_non_finite_gradients_are_counted_per_layer_over_steps(backend: str, seed: int) -> None:
    """They count as zero and never reach the state; the layer turns by the rest."""
    param, bias = parameter(4, 6, backend=backend), parameter(8, backend=backend)
    twins = [param.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()]
    groups = [{"params": [param], "chunks": 2}, {"params": [bias], "momentum": 0.0}]
    optimizer = FusedLayca(groups, 0.1, momentum=0.9, backend=backend)
    twin_groups = [{"params": twins[:1], "chunks": 2}, {"params": twins[1:], "momentum": 0.0}]
    cleaned = FusedLayca(twin_groups, 0.1, momentum=0.9, backend=backend)
    first, second, third = random_gradients([param, bias], 3)
    first[0][0, 0], first[0][1, 5], first[0][3, 3] = math.nan, math.inf, -math.inf
    first[1][2] = math.inf
    second[0][2:4] = math.nan
    rows = (first, second, third)
    train(optimizer, rows)
    train(cleaned, [[grad.nan_to_num(0.0, 0.0, 0.0) for grad in row] for row in rows])
    stats = optimizer.rotation_stats()
    assert values(stats[param], "non_finite") == [2, 1 + 12]
    assert values(stats[bias], "non_finite") == [1]
    assert same_bits(copy_of([param, bias]), copy_of(twins))
    assert same_bits(dict(optimizer.state[param]), dict(cleaned.state[twins[0]]))


def parallel(param: Tensor) -> Tensor:
    return 3 * param.detach()


@every_backend
def test_steps_without_a_direction_are_counted_and_change_nothing(backend: str, seed: int) -> None:
    """A gradient along the weights, a zero gradient; at lr = 0 nobody asked for a direction."""
    params = [parameter(5, 4, backend=backend) for _ in range(3)]
    optimizer = FusedLayca(params, 0.1, backend=backend)
    train(optimizer, random_gradients(params, 1))
    before = copy_of(params)
    for grads in (
        [parallel(params[0]), torch.zeros_like(params[1])],
        [parallel(params[0]), torch.zeros_like(params[1])],
    ):
        train(optimizer, [[*grads, *random_gradients(params[2:], 1)[0]]])
    stats = optimizer.rotation_stats()
    assert same_bits(copy_of(params[:2]), before[:2])
    assert [values(stats[param], "no_direction") for param in params] == [[2], [2], [0]]
    assert [values(stats[param], "angle") for param in params[:2]] == [[0.0], [0.0]]
    assert values(stats[params[2]], "angle") == pytest.approx([math.atan(0.1)])
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, [[parallel(param) for param in params]])
    stats = optimizer.rotation_stats()
    assert [values(stats[param], "no_direction") for param in params] == [[2], [2], [0]]
    assert [values(stats[param], "angle") for param in params] == [[0.0]] * 3


@every_backend
def test_broken_weights_are_left_alone_and_counted(backend: str, seed: int) -> None:
    """One chunk holds a NaN: it stays bit for bit, the next one turns as ever."""
    param = parameter(6, 4, backend=backend)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, chunks=3, backend=backend)
    train(optimizer, random_gradients([param], 1))
    param.data[2, 1], param.data[5, 0] = math.nan, math.inf
    before = param.detach().clone()
    train(optimizer, random_gradients([param], 2))
    stats = optimizer.rotation_stats()[param]
    assert values(stats, "broken") == [0, 2, 2]
    assert values(stats, "no_direction") == [0, 0, 0]
    assert values(stats, "angle") == pytest.approx([math.atan(0.1), 0.0, 0.0])
    assert same_bits(param.detach()[2:], before[2:])
    assert not torch.equal(param[:2], before[:2])
    assert torch.isfinite(optimizer.state[param]["radius"]).all()


@every_backend
def test_a_tensor_without_a_gradient_in_the_last_step_did_not_turn(backend: str, seed: int) -> None:
    params = [parameter(4, 3, backend=backend), parameter(3, 3, backend=backend)]
    optimizer = FusedLayca(params, 0.1, momentum=0.9, backend=backend)
    rows = random_gradients(params, 3)
    rows[0][0][1, 1] = math.nan
    train(optimizer, [rows[0], [None, rows[1][1]], [None, rows[2][1]]])
    idle, busy = (optimizer.rotation_stats()[param] for param in params)
    assert values(idle, "angle") == [0.0]
    assert values(busy, "angle") == pytest.approx([math.atan(0.1)])
    assert (values(idle, "non_finite"), values(idle, "no_direction")) == ([1], [0])


def replaced_in_memory(optimizer: FusedLayca, param: Tensor) -> None:
    param.data = param.data.clone()


CHANGES: dict[str, Any] = {
    "parameter moved": replaced_in_memory,
    "momentum switched off": lambda optimizer, param: optimizer.param_groups[0].update(momentum=0.0),
    "group added": lambda optimizer, param: optimizer.add_param_group({"params": [parameter(2, 3)]}),
    "reset_radius": lambda optimizer, param: optimizer.reset_radius(),
    "state_dict loaded": lambda optimizer, param: optimizer.load_state_dict(optimizer.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@native_backends
def test_counts_go_on_through_changes(backend: str, change: Any, seed: int) -> None:
    """They count since the optimizer was made, whatever makes it plan anew."""
    param = parameter(4, 3, backend=backend)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend=backend)
    for (grad,) in random_gradients([param], 2):
        grad[0, 1] = math.nan
        param.grad = grad
        optimizer.step()
        change(optimizer, param)
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert values(optimizer.rotation_stats()[param], "non_finite") == [2]


@native_backends
def test_counts_outlive_a_step_that_the_tensor_sits_out(backend: str, seed: int) -> None:
    """Without a radius and without a gradient it has no part in that step, and still its counts are its own."""
    param, other = parameter(4, 3, backend=backend), parameter(3, 3, backend=backend)
    optimizer = FusedLayca([param, other], 0.1, momentum=0.9, backend=backend)
    first, second, third = random_gradients([param, other], 3)
    first[0][0, 1] = math.nan
    train(optimizer, [first])
    optimizer.reset_radius()
    train(optimizer, [[None, second[1]], third])
    assert values(optimizer.rotation_stats()[param], "non_finite") == [1]


@every_backend
def test_stats_are_a_snapshot(backend: str, seed: int) -> None:
    param = parameter(4, 3, backend=backend)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend=backend)
    train(optimizer, random_gradients([param], 2))
    stats = optimizer.rotation_stats()[param]
    before = copy_of(list(vars(stats).values()))
    optimizer.param_groups[0]["lr"] = 0.4
    train(optimizer, random_gradients([param], 2))
    assert same_bits(copy_of(list(vars(stats).values())), before)
    assert values(optimizer.rotation_stats()[param], "angle") == pytest.approx([math.atan(0.4)])


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["lr float", "lr tensor"])
@native_backends
def test_handing_over_a_new_rate_does_not_change_the_last_step(
    backend: str, as_tensor: bool, capturable: bool, seed: int
) -> None:
    """Twice, and after changes of other hyperparameters; the next step is told with its own rate."""
    param, other = (parameter(6, 5, backend=backend) for _ in range(2))
    rate = torch.tensor(0.07, dtype=torch.float64) if as_tensor else 0.07
    groups = [{"params": [param]}, {"params": [other], "lr": 0.2}]
    optimizer = FusedLayca(groups, rate, momentum=0.8, backend=backend, capturable=capturable)
    for number in range(2):
        train(optimizer, random_gradients([param, other], 1))
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2
            group["momentum"] -= 0.1
            optimizer.sync_hyperparameters()
        stats = optimizer.rotation_stats()
        turned = [values(stats[each], "angle") for each in (param, other)]
        assert turned == [pytest.approx([math.atan(each)], **EXACT) for each in rates]
        assert rates == pytest.approx([0.07 / 2**number, 0.2 / 2**number])


@every_backend
@pytest.mark.parametrize("base", ["sgd", "muon"])
def test_the_drift_of_a_learned_radius_is_not_what_it_has_learned(base: str, backend: str, seed: int) -> None:
    """Only what somebody did to the weights since the last step."""
    learned, fixed = (parameter(6, 5, backend=backend, dtype=torch.float64) for _ in range(2))
    groups = [{"params": [learned], "radius": "learned", "chunks": 3}, {"params": [fixed]}]
    optimizer = FusedLayca(groups, 0.1, base=base, backend=backend)
    for drift in (0.0, 0.5):
        for param in (learned, fixed):
            param.grad = torch.randn_like(param) + param.detach()
        with torch.no_grad():
            learned[:2] *= 1 + drift
        optimizer.step()
        stats = optimizer.rotation_stats()
        assert values(stats[learned], "drift") == pytest.approx([drift, 0.0, 0.0], rel=1e-12, abs=1e-14)
        assert values(stats[fixed], "drift") == pytest.approx([0.0], **EXACT)
        norms = [float(part.norm()) for part in learned.detach().chunk(3)]
        assert values(stats[learned], "radius") == pytest.approx(norms, **EXACT)
        assert all(
            abs(norm / radius - 1) > 1e-3 for norm, radius in zip(values(stats[learned], "norm"), norms, strict=True)
        )
