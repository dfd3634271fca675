"""capturable=True and unscale_in_step=True on a GPU: steps in CUDA graphs, and steps that the host does not wait for.

What of this needs no GPU is tested on CPU tensors in tests/step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from layca_fast import FusedLayca
from layca_fast.backends import load
from layca_fast.step.upload import SPARES

from ..support import contents, copy_of, params_of, same_bits, shapes_for, train
from .support import GPU_BACKENDS, ON_GPU, waiting_is_an_error

pytestmark = ON_GPU

# One that cannot run fails with its reason, and hides nothing.
gpu_backends = pytest.mark.parametrize("backend", ["torch", *GPU_BACKENDS])

OPTIONS = (
    {"base": "sgd", "momentum": 0.9, "dampening": 0.2},
    {"base": "adam", "amsgrad": True},
    {"base": "rmsprop"},
    {"base": "muon"},
)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def random_gradients(params: Sequence[Tensor], steps: int) -> list[list[Tensor]]:
    return [[torch.randn_like(param) for param in params] for _ in range(steps)]


def gpu_params(base: Mapping[str, Any] = {}) -> list[nn.Parameter]:
    """Matrices on both sides of a tile, layers in one tensor, a bias, and a tensor without elements."""
    shapes = shapes_for(base, ((300, 70), (9,), (6, 50, 3), (1, 7), (0, 3)))
    return [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]


def tensor_lr(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cuda")


def fill_gradients(optimizer: FusedLayca, row: Sequence[Tensor]) -> None:
    """In place, where there are some."""
    for param, grad in zip(params_of(optimizer), row, strict=True):
        if param.grad is None:
            param.grad = grad.clone()
        else:
            param.grad.copy_(grad)


def captured_step(optimizer: FusedLayca) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # torch warns of a graph without anything in it, as one is where the step is refused.
        torch.zeros((), device="cuda").add_(1)
        optimizer.step()
    return graph


@every_option
@gpu_backends
def test_100_replays_under_a_schedule_equal_eager_steps(backend: str, options: dict[str, Any], seed: int) -> None:
    params = gpu_params(options)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    lr, other = tensor_lr(0.1), tensor_lr(0.02)
    groups = [{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": other}]
    captured = FusedLayca(groups, backend=backend, capturable=True, **options)
    groups = [{"params": twins[:2], "lr": 0.1}, {"params": twins[2:], "lr": 0.02}]
    eager = FusedLayca(groups, backend=backend, **options)
    rows = random_gradients(params, 104)
    for optimizer in (captured, eager):
        for row in rows[:3]:
            fill_gradients(optimizer, row)
            optimizer.step()
    schedules = [lr_scheduler.CosineAnnealingLR(each, T_max=30, eta_min=1e-3) for each in (captured, eager)]
    graph = captured_step(captured)
    assert same_bits(copy_of(params), copy_of(twins)), "a capture must not move anything"
    for step, row in enumerate(rows[3:]):
        for optimizer in (captured, eager):
            fill_gradients(optimizer, row)
        if step == 50:
            # An eager step between replays must not disturb them.
            captured.step()
        else:
            graph.replay()
        eager.step()
        for schedule in schedules:
            schedule.step()
    assert float(lr) == eager.param_groups[0]["lr"] != 0.1
    assert same_bits(contents(captured), contents(eager))


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@gpu_backends
def test_a_whole_training_step_in_a_graph(backend: str, seed: int) -> None:
    """Backward in the graph, so that gradients lie in its own memory; two graphs of one optimizer take turns."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).cuda()
    twin = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).cuda()
    twin.load_state_dict(model.state_dict())
    lr = tensor_lr(0.05)
    ours = FusedLayca(model.parameters(), lr, base="adam", backend=backend, capturable=True)
    plain = FusedLayca(twin.parameters(), 0.05, base="adam", backend=backend)
    inputs = {size: torch.randn(size, 20, device="cuda") for size in (8, 16)}

    def step(network: nn.Module, optimizer: FusedLayca, x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        network(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(model, ours, inputs[8])
            step(twin, plain, inputs[8])
    torch.cuda.current_stream().wait_stream(side)
    graphs = {}
    for size, x in inputs.items():
        graphs[size] = torch.cuda.CUDAGraph()
        ours.zero_grad(set_to_none=True)
        with torch.cuda.graph(graphs[size]):
            step(model, ours, x)
    for turn in range(30):
        size = (8, 16)[turn // 2 % 2]
        inputs[size].copy_(torch.randn_like(inputs[size]))
        graphs[size].replay()
        step(twin, plain, inputs[size])
        rate = 0.05 / (1 + turn)
        lr.fill_(rate)
        plain.param_groups[0]["lr"] = rate
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
        assert ours.state[param]["step"].item() == plain.state[other]["step"].item() == 32


@gpu_backends
def test_sync_hyperparameters_reaches_the_next_replay(backend: str, seed: int) -> None:
    params = gpu_params()
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    options = {"momentum": 0.9, "weight_decay": 0.01, "rotate": False, "backend": backend}
    captured = FusedLayca(params, 0.1, capturable=True, **options)
    eager = FusedLayca(twins, 0.1, **options)
    (row,) = random_gradients(params, 1)
    for optimizer in (captured, eager):
        fill_gradients(optimizer, row)
        optimizer.step()
    graph = captured_step(captured)
    for change in ({}, {"momentum": 0.5}, {"lr": 0.3}, {"weight_decay": 0.2, "maximize": True}):
        (row,) = random_gradients(params, 1)
        for optimizer in (captured, eager):
            fill_gradients(optimizer, row)
            optimizer.param_groups[0].update(change)
        captured.sync_hyperparameters()
        graph.replay()
        eager.step()
        assert same_bits(contents(captured), contents(eager))


@gpu_backends
def test_a_capture_without_a_gradient_is_an_error_and_moves_nothing(backend: str, seed: int) -> None:
    params = gpu_params()
    optimizer = FusedLayca(params, 0.1, momentum=0.9, backend=backend, capturable=True)
    train(optimizer, random_gradients(params, 1))
    params[1].grad = None
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .* has no gradient"):
        captured_step(optimizer)
    torch.cuda.synchronize()
    assert same_bits(contents(optimizer), before)


@gpu_backends
def test_more_captures_than_there_is_memory_ready_for_are_refused(backend: str, seed: int) -> None:
    """Clearly and in time; what was captured before stays good."""
    params = gpu_params()
    optimizer = FusedLayca(params, 0.1, momentum=0.9, backend=backend, capturable=True)
    train(optimizer, random_gradients(params, 1))
    graphs = [captured_step(optimizer) for _ in range(SPARES)]
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"sync_hyperparameters\(\) before the capture"):
        captured_step(optimizer)
    torch.cuda.synchronize()
    assert same_bits(contents(optimizer), before)
    optimizer.sync_hyperparameters()
    for graph in (*graphs, captured_step(optimizer)):
        before = copy_of(params)
        graph.replay()
        assert not torch.equal(params[0], before[0])


@gpu_backends
def test_unscaling_in_the_step_does_not_wait_and_equals_the_standard_path(backend: str, seed: int) -> None:
    params = gpu_params()
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    options = {"momentum": 0.9, "dampening": 0.3, "backend": backend}
    ours = FusedLayca(params, 0.1, unscale_in_step=True, **options)
    plain = FusedLayca(twins, 0.1, **options)
    scalers = [torch.amp.GradScaler("cuda", init_scale=1000.0, growth_interval=3) for _ in range(2)]
    for scaler in scalers:
        scaler.scale(torch.zeros((), device="cuda"))
    rows = random_gradients(params, 8)
    for step in (0, 1, 4):
        rows[step][0][3, step] = float("inf")
    for step, row in enumerate(rows):
        for optimizer, scaler in zip((ours, plain), scalers, strict=True):
            fill_gradients(optimizer, [grad * scaler.get_scale() for grad in row])
            if step == 0 or optimizer is plain:
                scaler.step(optimizer)
            else:
                with waiting_is_an_error():
                    scaler.step(optimizer)
            scaler.update()
        assert same_bits(copy_of(params), copy_of(twins))
    states = [[dict(each.state[param]) for param in params_of(each)] for each in (ours, plain)]
    assert same_bits(*states)


@gpu_backends
def test_loss_scaling_in_a_graph(backend: str, seed: int) -> None:
    """Scaler and all: a replay whose gradients are not finite moves nothing and lowers the scale."""
    params = gpu_params()[:3]
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    ours = FusedLayca(params, tensor_lr(0.1), base="adam", backend=backend, capturable=True, unscale_in_step=True)
    plain = FusedLayca(twins, 0.1, base="adam", backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device="cuda"))
    rows = random_gradients(params, 6)
    fill_gradients(ours, [1024.0 * grad for grad in rows[0]])
    scaler.step(ours)
    scaler.update()
    train(plain, rows[:1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scaler.step(ours)
        scaler.update()
    for step, row in enumerate(rows[1:]):
        broken = step in (1, 3)
        fill_gradients(ours, [scaler.get_scale() * grad for grad in row])
        if broken:
            params[2].grad[0, 0, 0] = float("nan")
        before = copy_of(params)
        graph.replay()
        if broken:
            assert same_bits(copy_of(params), before)
        else:
            train(plain, [row])
        assert same_bits(copy_of(params), copy_of(twins))
    assert scaler.get_scale() == 256.0


@gpu_backends
def test_loaded_state_follows_its_parameter_to_the_gpu(backend: str, seed: int) -> None:
    """Saved from a run on the CPU; types stay as they were, and the run goes on."""
    on_cpu = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3))]
    source = FusedLayca(on_cpu, 0.1, base="adam", backend="torch")
    train(source, random_gradients(on_cpu, 2))
    params = [nn.Parameter(param.detach().cuda()) for param in on_cpu]
    loaded = FusedLayca(params, 0.1, base="adam", backend=backend)
    saved = source.state_dict()
    saved["param_groups"][0]["backend"] = backend
    loaded.load_state_dict(saved)
    for param, old in zip(params, on_cpu, strict=True):
        for name, value in source.state[old].items():
            assert loaded.state[param][name].device == param.device
            assert same_bits(loaded.state[param][name].cpu(), value)
    assert load(backend).refuses(params[0].device) is None
    train(loaded, random_gradients(params, 2))
    assert loaded.state[params[0]]["step"].item() == 4
