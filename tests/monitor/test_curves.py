"""RotationMonitor: its numbers against known angles, under any optimizer, and that watching changes nothing."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layca_fast import FusedLayca, RotationMonitor, attach
from layca_fast.commands.demo.training import rotation_from
from layca_fast.monitor import rotation_monitor as monitor_module
from layca_fast.monitor.keeping import KEEPS

from ..attach.support import OPTIMIZERS
from ..support import every_backend, parameter, random_gradients, same_bits, train

NAN = math.nan


def plane(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two random directions of this shape at a right angle, float64, of norm 1."""
    first, second = torch.randn(2, *shape, dtype=torch.float64)
    first = first / first.norm()
    second = second - (first * second).sum() * first
    return first, second / second.norm()


def at(angle: float, norm: float, directions: tuple[Tensor, Tensor]) -> Tensor:
    return norm * (math.cos(angle) * directions[0] + math.sin(angle) * directions[1])


def watching(*weights: Tensor, **options: object) -> tuple[RotationMonitor, list[nn.Parameter]]:
    """A monitor of parameters of their own with these values, named "0.0", "0.1", ..."""
    params = [nn.Parameter(weight.clone()) for weight in weights]
    return RotationMonitor(torch.optim.SGD(params, 0.1), layers=["0.*"], **options), params


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-14), (torch.float32, 1e-7)])
@every_backend
def test_known_angles_and_norms(backend: str, dtype: torch.dtype, exact: float, seed: int) -> None:
    """Whatever the norm; angles between records add up where the layer turns in one plane."""
    directions = plane((7, 11))
    angles, norms = [0.3, 0.3, 0.301, 1.2, 2.0, math.pi, 2.5], [3.0, 1e-9, 40.0, 1.0, 2e6, 0.1, 5.0]
    param = parameter(7, 11, backend=backend, dtype=dtype)
    param.data.copy_(at(0.0, 2.0, directions))
    monitor = RotationMonitor(torch.optim.SGD([("w", param)], 0.1), per_step=True, backend=backend)
    for angle, norm in zip(angles, norms, strict=True):
        param.data.copy_(at(angle, norm, directions))
        assert monitor.record()
    curves = monitor.curves
    assert (curves.names, curves.steps) == (["w"], list(range(8)))
    expected = [0.0, *(1 - math.cos(angle) for angle in angles)]
    assert curves.of("w") == curves.rotation[:, 0].tolist() == pytest.approx(expected, abs=exact)
    assert curves.norm[:, 0].tolist() == pytest.approx([2.0, *norms], rel=10 * exact)
    between = [abs(new - old) for old, new in zip([0.0, *angles], angles, strict=False)]
    # A cosine that is right to 1e-16 gives an angle near 0 or pi to its root.
    assert curves.angle[1:, 0].tolist() == pytest.approx(between, abs=max(exact, 5e-8))
    assert math.isnan(curves.angle[0, 0])


@every_backend
def test_weights_that_stay_have_turned_by_exactly_nothing(backend: str, seed: int) -> None:
    param = parameter(9, 33, backend=backend)
    monitor = RotationMonitor(torch.optim.SGD([param], 0.1), per_step=True, backend=backend)
    monitor.record()
    curves = monitor.curves
    assert curves.rotation.tolist() == [[0.0], [0.0]]
    assert curves.angle[1].tolist() == [0.0]


@pytest.mark.parametrize("keep", KEEPS)
def test_weights_without_an_angle_give_nan_and_harm_no_other(keep: str, seed: int) -> None:
    """Zero or non-finite at the start: never an angle. Later: one as soon as the weights have a direction again."""
    usual, zero, broken, later = (torch.randn(4, 40) for _ in range(4))
    zero.zero_()
    broken[1, 2] = math.inf
    monitor, params = watching(
        usual, zero, broken, later, keep=keep, per_step=keep != "bfloat16", sketch_size=16, backend="cpu"
    )
    for changed in (math.nan, math.inf, 0.0, 1.0):
        with torch.no_grad():
            params[1].fill_(1.0)
            params[2].copy_(usual)
            params[3].copy_(later)
            params[3][2, 3] = changed
            if changed == 0.0:
                params[3].zero_()
        monitor.record()
    curves = monitor.curves
    assert curves.rotation.isnan().T.tolist() == [
        [False] * 5,
        [True] * 5,
        [True] * 5,
        [False, True, True, True, False],
    ]
    assert curves.rotation[:, 0].tolist() == pytest.approx([0.0] * 5, abs=2e-6)
    assert curves.norm[1:, :3].isfinite().all()
    assert not curves.norm[1:3, 3].isfinite().any()
    assert curves.norm[3, 3] == 0.0
    if monitor.per_step:
        assert curves.angle[2:, :3].isfinite().all()
        assert curves.angle[:, 3].isnan().all(), "one of two records has no direction"


def trained(name: str, watched: Callable[[Optimizer], object] | None) -> tuple[list[Tensor], list[nn.Parameter]]:
    """Initial and final weights; the same training every time, but for who watches it."""
    torch.manual_seed(11)
    params = [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 6))]
    start = [param.detach().clone() for param in params]
    optimizer = FusedLayca(params, 0.1, momentum=0.9) if name == "FusedLayca" else OPTIMIZERS[name](params, lr=0.05)
    if name == "SGD":
        attach(optimizer)
    if watched is not None:
        watched(optimizer)
    for row in random_gradients(params, 5):
        train(optimizer, [row])
    # A noisy update, as of code that draws random numbers while it trains.
    for param in params:
        param.data += 0.01 * torch.randn_like(param)
    return start, params


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", ["FusedLayca", "SGD", "AdamW, fused", "Muon"])
def test_any_optimizer_trains_bit_for_bit_as_it_does_alone(name: str, keep: str) -> None:
    """And the curves are those of a computation by torch (of the demo), within what keeping w_0 costs."""
    _, alone = trained(name, None)
    made: list[RotationMonitor] = []
    start, params = trained(
        name, lambda optimizer: made.append(RotationMonitor(optimizer, keep=keep, every=2).attach())
    )
    assert same_bits(params, alone)
    (monitor,) = made
    assert monitor.curves.steps == [0, 2, 4]
    monitor.record(6)
    # All layers here are shorter than a sketch, so that keeps them whole.
    exact = {"abs": 2e-3} if keep == "bfloat16" else {"abs": 1e-13}
    assert monitor.curves.rotation[-1].tolist() == pytest.approx(rotation_from(start, params), **exact)


def test_steps_of_fused_layca_turn_every_chunk_by_atan_lr(seed: int) -> None:
    model = nn.MultiheadAttention(24, 2)
    optimizer = FusedLayca([{"params": [("qkv", model.in_proj_weight)], "chunks": 3}], 0.03)
    for sketch_size, rel in ((4096, 1e-5), (101, 0.6)):
        keep = "device" if sketch_size == 4096 else "sketch"
        monitor = RotationMonitor(optimizer, per_step=True, keep=keep, sketch_size=sketch_size)
        with monitor.attach(optimizer):
            train(optimizer, random_gradients([model.in_proj_weight], 3))
        train(optimizer, random_gradients([model.in_proj_weight], 1))
        curves = monitor.curves
        assert curves.names == ["qkv[0]", "qkv[1]", "qkv[2]"]
        assert curves.steps == [0, 1, 2, 3], "left the with block, so the last step was not recorded"
        # One part in sqrt(101), times 6.
        assert curves.angle[1:].flatten().tolist() == pytest.approx([math.atan(0.03)] * 9, rel=rel)


def test_a_hook_is_one_and_copies_have_none(seed: int) -> None:
    param = parameter(4, 3)
    optimizer = torch.optim.SGD([param], 0.1)
    monitor = RotationMonitor(nn.ParameterList([param]), layers=["0"])
    with pytest.raises(TypeError, match="optimizer is a NoneType"):
        monitor.attach()
    monitor.attach(optimizer)
    with pytest.raises(ValueError, match="call detach"):
        monitor.attach(optimizer)
    twin = copy.deepcopy(optimizer)
    train(optimizer, random_gradients([param], 1))
    train(twin, random_gradients([param], 1))
    monitor.detach()
    monitor.detach()
    train(optimizer, random_gradients([param], 1))
    assert monitor.step == 1


@pytest.mark.parametrize("keep", KEEPS)
def test_a_copy_goes_on_with_the_copied_model(keep: str, seed: int) -> None:
    """By deepcopy and by pickle, with the weights' memory in another order since; no hook goes with it."""
    model = nn.Sequential(nn.Conv2d(4, 3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = RotationMonitor(model, keep=keep, per_step=keep != "bfloat16").attach(optimizer)
    start = model[0].weight.detach().clone()
    monitor.record()
    for copied in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        twin, follower = copied((model, monitor))
        twin.to(memory_format=torch.channels_last)
        twin[0].weight.data += torch.randn_like(twin[0].weight)
        follower.record()
        expected = [0.0, 0.0, *rotation_from([start], [twin[0].weight])]
        assert follower.curves.of("0.weight") == pytest.approx(expected, abs=2e-3 if keep == "bfloat16" else 1e-13)
        follower.attach(optimizer)
        follower.detach()
    assert monitor.curves.steps == [0, 1]


def test_compiled_steps_record_without_being_compiled_again(seed: int) -> None:
    model = nn.Linear(3, 4)
    monitor = RotationMonitor(model)
    compiled = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def step(inputs: Tensor) -> Tensor:
        doubled = 2 * inputs
        monitor.record()
        return doubled + 1

    for _ in range(4):
        step(torch.randn(2, 3))
    assert monitor.curves.steps == [0, 1, 2, 3, 4]
    assert len(compiled) == 2, "before the record, and after it"


def test_in_inference_mode_a_monitor_is_made_and_records(seed: int) -> None:
    model = nn.Linear(3, 4)
    with torch.inference_mode():
        monitor = RotationMonitor(model, per_step=True)
        monitor.record()
    model.weight.data *= -1
    monitor.record()
    monitor.load_state_dict(monitor.state_dict())
    assert monitor.curves.rotation.flatten().tolist() == pytest.approx([0.0, 0.0, 2.0])


def test_a_record_inside_of_a_captured_graph_is_refused(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Replays would run no line of it."""
    monitor, _ = watching(torch.randn(3, 3), every=2)
    monkeypatch.setattr(monitor_module, "is_capturing", lambda: True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"record\(\) after each replay"):
            monitor.record()
    assert (monitor.step, monitor.curves.steps) == (0, [0])


def test_steps_may_be_numbered_and_left_out(seed: int) -> None:
    """The first from each multiple of ``every`` on is measured, so that no numbering misses them all."""
    monitor, _ = watching(torch.randn(3, 3), every=5)
    assert [step for step in (2, 4, 6, 8, 11, 12, 30) if monitor.record(step)] == [6, 11, 30]
    assert monitor.curves.steps == [0, 6, 11, 30]
    with pytest.raises(ValueError, match="step=30: the last one was 30"):
        monitor.record(30)


def test_reset_starts_anew_from_the_present_weights(seed: int) -> None:
    monitor, (param,) = watching(torch.randn(3, 5), per_step=True)
    for step in (7, None):
        param.data += torch.randn_like(param)
        monitor.record(step)
    monitor.reset(20)
    assert (monitor.curves.steps, monitor.curves.rotation.tolist()) == ([20], [[0.0]])
    param.data *= -1
    monitor.record()
    assert monitor.curves.steps == [20, 21]
    assert monitor.curves.rotation[1].tolist() == pytest.approx([2.0])
    assert monitor.curves.angle[1].tolist() == pytest.approx([math.pi])


BAD = {
    "keep='disk' is unknown": {"keep": "disk"},
    "every=0: must be a whole number >= 1": {"every": 0},
    "every=2.5: must be a whole number": {"every": 2.5},
    "sketch_size=1": {"sketch_size": 1},
    "seed=-1": {"seed": -1},
    "per_step='yes' is unknown": {"per_step": "yes"},
    "backend='abacus' is unknown": {"backend": "abacus"},
    "per_step=True with keep='bfloat16'": {"keep": "bfloat16", "per_step": True},
    "layers='weight': must be a list": {"layers": "weight"},
    "'wait' is the name of no parameter here.*'weight', 'bias'": {"layers": ["weight", "wait"]},
}


@pytest.mark.parametrize(("message", "options"), BAD.items(), ids=BAD.keys())
def test_bad_arguments_are_named(message: str, options: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RotationMonitor(nn.Linear(3, 4), **options)
