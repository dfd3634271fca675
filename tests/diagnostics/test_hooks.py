"""LayerConditioning and IterativeRefinement: dense numpy, closed forms, and trainings that they do not change."""

import math
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from layca_fast import FusedLayca
from layca_fast.diagnostics import IterativeRefinement, LayerConditioning, rows

from .support import Block, Residual

Array = npt.NDArray[np.float64]


def spectrum_of_rows(samples: Array, factor: float) -> Array:
    return np.linalg.eigvalsh(factor * samples.T @ samples)[::-1]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (8, 5)),
    "linear on sequences": (lambda: nn.Linear(4, 3, bias=False), (3, 6, 4)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2, padding_mode="reflect"), (3, 2, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 3, 6, 7)),
    "Conv2d same": (lambda: nn.Conv2d(2, 4, (4, 3), padding="same", padding_mode="replicate"), (3, 2, 6, 5)),
    "Conv2d valid": (lambda: nn.Conv2d(2, 4, 3, padding="valid", bias=False), (3, 2, 6, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular"), (2, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_weights_are_the_output(kind: str, seed: int) -> None:
    """So they are what the layer multiplies its weights with, in the order of the flattened weights."""
    make, shape = LAYERS[kind]
    layer, inputs = make().double(), torch.randn(shape, dtype=torch.float64)
    product = rows.input_rows(layer, inputs) @ layer.weight.flatten(1).T
    if layer.bias is not None:
        product = product + layer.bias
    torch.testing.assert_close(product, rows.output_rows(layer, layer(inputs)), rtol=1e-12, atol=1e-12)
    one = rows.batched(layer, inputs[0])
    if "Conv" in kind:
        torch.testing.assert_close(rows.input_rows(layer, one), rows.input_rows(layer, inputs[:1]))


@pytest.mark.parametrize("mean_loss", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_conditioning_is_that_of_dense_numpy(
    kind: str, mean_loss: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small parts, so that more than one is summed."""
    monkeypatch.setattr(rows, "PART", 100)
    make, shape = LAYERS[kind]
    layer, inputs = make(), torch.randn(shape)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    with LayerConditioning(model, mean_loss=mean_loss) as conditioning:
        model(inputs).square().mean().backward()
    outputs = layer(inputs)
    outputs.retain_grad()
    functional.relu(outputs).square().mean().backward()
    x = rows.input_rows(layer, inputs.double()).flatten(0, 1).numpy()
    g = rows.output_rows(layer, outputs.grad.double()).flatten(0, 1).numpy()
    condition = conditioning.records[0]["0"]
    expected = spectrum_of_rows(x, 1 / len(x)), spectrum_of_rows(g, len(g) if mean_loss else 1 / len(g))
    for spectrum, dense in zip((condition.inputs, condition.gradients), expected, strict=True):
        np.testing.assert_allclose(spectrum.eigenvalues, dense, rtol=1e-6, atol=1e-9 * dense[0])
    assert condition.largest == pytest.approx(expected[0][0] * expected[1][0], rel=1e-6)
    assert condition.condition(0.5) == pytest.approx(
        math.prod(dense[0] / dense[math.ceil(0.5 * len(dense)) - 1] for dense in expected), rel=1e-4
    )


def test_channels_instead_of_patches(seed: int) -> None:
    """Of a grouped convolution, in a pass that no backward pass follows."""
    model, inputs = nn.Sequential(nn.Conv2d(4, 2, 3, groups=2)), torch.randn(3, 4, 5, 5)
    with LayerConditioning(model, patches=False) as conditioning:
        model(inputs)
    channels = inputs.double().permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    condition = conditioning.records[0]["0"]
    np.testing.assert_allclose(condition.inputs.eigenvalues, spectrum_of_rows(channels, 1 / len(channels)), rtol=1e-6)
    assert condition.gradients is None
    assert condition.largest is None
    assert condition.condition() is None


def test_conditioning_in_closed_form() -> None:
    """Inputs sqrt(3) a_i e_i: Sigma_x = diag(a^2). Three samples of a mean loss w.x: Sigma_g = 3 * 3 * (1/3)^2 = 1."""
    model = nn.Linear(3, 1, bias=False)
    inputs = math.sqrt(3) * torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    with LayerConditioning(model) as conditioning:
        model(inputs).mean().backward()
    condition = conditioning.records[0][""]
    assert condition.inputs.eigenvalues.tolist() == pytest.approx([16, 4, 1], rel=1e-6)
    assert condition.gradients.eigenvalues.tolist() == pytest.approx([1], rel=1e-6)
    assert condition.condition() == pytest.approx(16, rel=1e-6)
    assert condition.condition(2 / 3) == pytest.approx(4, rel=1e-6)


def test_fewer_samples_than_dimensions_and_numbers_that_are_not_finite(seed: int) -> None:
    """37 eigenvalues are rounding: neither negative, nor the end of a finite condition number."""
    model = nn.Linear(40, 2)
    with LayerConditioning(model) as conditioning:
        model(torch.randn(3, 40)).sum().backward()
        model(torch.full((3, 40), math.inf)).sum().backward()
    inputs = conditioning.records[0][""].inputs
    assert bool((inputs.eigenvalues >= 0).all())
    assert inputs.condition(3 / 40) < math.inf
    assert all(inputs.condition(rank / 40) == math.inf for rank in range(4, 41))
    assert math.isnan(conditioning.records[1][""].inputs.largest)


@pytest.mark.parametrize("returns", ["sum", "branch"])
def test_refinement_is_that_of_dense_numpy(returns: str, seed: int) -> None:
    model, inputs = Residual().double().eval(), torch.randn(9, 6, dtype=torch.float64)
    names = ["plain", "in_place"] if returns == "sum" else ["plain.branch", "in_place.branch"]
    with IterativeRefinement(model, names, returns=returns) as refinement:
        model(inputs).square().mean().backward()
    h = [model.stem(inputs)]
    for block in (model.plain, model.in_place):
        h.append(h[-1] + block.branch(h[-1]))
    for each in h:
        each.retain_grad()
    model.head(model.norm(h[-1])).square().mean().backward()
    for name, start, end in zip(names, h, h[1:], strict=False):
        step, down, base = ((t.detach().numpy()) for t in (end - start, -start.grad, start))
        lengths = [np.linalg.norm(each, axis=1) for each in (step, down, base)]
        found = refinement.records[0][name]
        assert found.cosine == pytest.approx(np.mean((step * down).sum(1) / (lengths[0] * lengths[1])), rel=1e-9)
        assert found.ratio == pytest.approx(np.mean(lengths[0] / lengths[2]), rel=1e-9)


class Descent(nn.Module):
    """F(h) = scale * h on the loss |h|^2 / 2 of what goes in: -dL/dh is parallel to h."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, h: Tensor) -> tuple[Tensor, None]:
        return h + self.scale * h, None


@pytest.mark.parametrize(("scale", "cosine"), [(-0.25, 1.0), (0.5, -1.0), (0.0, math.nan)])
def test_refinement_in_closed_form(scale: float, cosine: float, seed: int) -> None:
    model, h = nn.Sequential(Descent(scale)), torch.randn(5, 3).requires_grad_()
    with IterativeRefinement(model, ["0"]) as refinement:
        model(h)[0].square().sum().backward()
    assert refinement.records[0]["0"].cosine == pytest.approx(cosine, rel=1e-5, nan_ok=True)
    assert refinement.records[0]["0"].ratio == pytest.approx(abs(scale), rel=1e-5)
    with IterativeRefinement(model, ["0"]) as refinement:
        model(h.detach())[0].square().sum().backward()
    assert math.isnan(refinement.records[0]["0"].cosine)


def test_a_branch_is_kept_until_its_gradient_is_there(seed: int) -> None:
    """Also where h is a leaf, whose hooks outlive the pass."""
    model, h = nn.Sequential(Descent(0.5)), torch.randn(5, 3).requires_grad_()
    with IterativeRefinement(model, ["0"]) as refinement:
        loss = model(h)[0].square().sum()
        notes = refinement._notes
        assert notes is not None
        (call,) = notes["0"]
        assert call.branch is not None
        loss.backward()
        assert call.branch is None
        assert len(call.cosines) == 1
        model(h)[0].square().sum().backward()
        assert len(call.cosines) == 1, "an earlier pass heard of a later one"


def train(*, watched: bool, every: int = 1) -> tuple[list[Tensor], list[int]]:
    """Six steps with batch norm, dropout, checkpointing and a validation pass; what they leave, bit for bit."""
    torch.manual_seed(5)
    model = Residual()
    optimizer = FusedLayca(model.parameters(), lr=0.05, momentum=0.9, backend="torch")
    with ExitStack() as stack:
        records = []
        if watched:
            conditioning = stack.enter_context(LayerConditioning(model, every=every))
            refinement = stack.enter_context(IterativeRefinement(model, ["plain", "in_place"], every=every))
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 6)).square().mean()
            with torch.no_grad():
                model(torch.randn(8, 6))
            loss.backward()
            optimizer.step()
        if watched:
            records = [*conditioning.records]
            assert records == [*refinement.records]
            layers = {"stem", "plain.branch.1", "in_place.branch.1", "head"}
            for step in records:
                assert {name for name, each in conditioning.records[step].items() if each.gradients} == layers
                assert all(math.isfinite(each.cosine) for each in refinement.records[step].values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    grads = [param.grad for param in model.parameters()]
    return [*model.parameters(), *model.buffers(), *grads, torch.get_rng_state()], records


@pytest.mark.parametrize("every", [1, 4])
def test_a_watched_training_is_bit_for_bit_the_same(every: int) -> None:
    plain, _ = train(watched=False)
    watched, steps = train(watched=True, every=every)
    assert steps == [*range(0, 6, every)]
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


def test_layers_used_twice_and_recomputed_in_backward(seed: int) -> None:
    """Under activation checkpointing a layer runs twice: its moments are those of one run."""
    model, inputs = Block(4), torch.randn(6, 4)
    with LayerConditioning(model) as plain:
        model(inputs).square().mean().backward()

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    outer = Recomputed()
    with LayerConditioning(outer) as recomputed:
        outer(inputs).square().mean().backward()
    one, other = plain.records[0]["branch.1"], recomputed.records[0]["block.branch.1"]
    torch.testing.assert_close(one.inputs.eigenvalues, other.inputs.eigenvalues)
    torch.testing.assert_close(one.gradients.eigenvalues, other.gradients.eigenvalues)


def test_passes_without_gradients_are_neither_counted_nor_measured(seed: int) -> None:
    """A validation between the forward and the backward pass, with other inputs."""
    model, inputs = Block(4), torch.randn(6, 4)
    measured = []
    for validates in (False, True):
        with LayerConditioning(model) as conditioning, IterativeRefinement(model, [""]) as refinement:
            loss = model(inputs).square().mean()
            if validates:
                with torch.no_grad():
                    model(torch.ones(9, 4))
            loss.backward()
        assert list(conditioning.records) == list(refinement.records) == [0]
        measured.append((conditioning.records[0]["branch.1"].inputs.eigenvalues.tolist(), refinement.records[0][""]))
    assert measured[0] == measured[1]


def test_what_was_measured_stays_and_nothing_is_added_after_removal(seed: int) -> None:
    model = nn.Linear(3, 2)
    conditioning = LayerConditioning(model, [""], every=2)
    for _ in range(3):
        model(torch.randn(5, 3)).sum().backward()
    conditioning.remove()
    conditioning.remove()
    model(torch.randn(5, 3)).sum().backward()
    assert list(conditioning.records) == [0, 2]
