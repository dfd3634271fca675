"""The demo end to end, and the parts that decide whether its comparison is a fair one."""

import math
import sys
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from layca_fast.backends import choose, load
from layca_fast.commands.demo import figure as demo_figure
from layca_fast.commands.demo import main as demo
from layca_fast.commands.demo.bases import contestants
from layca_fast.commands.demo.training import (
    DROP_FACTOR,
    Contestant,
    Digits,
    Network,
    Run,
    accuracy,
    load_digits,
    rotation_from,
    train,
)

from .support import check_png, table_rows

CHANCE = 0.1
LAYERS = 9
STEPS_PER_EPOCH = 20


pytestmark = pytest.mark.usefixtures("one_thread")


def check_rotation(run: Run, epochs: int) -> None:
    assert len(run.rotation) == epochs + 1
    assert all(len(row) == LAYERS for row in run.rotation)
    assert run.rotation[0] == pytest.approx([0.0] * LAYERS, abs=1e-12)
    assert all(0.0 < value <= 2.0 for row in run.rotation[1:] for value in row)


def test_main_trains_prints_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recorded_runs: list[list[Run]]
) -> None:
    epochs, figure = 2, tmp_path / "figure.png"
    assert demo.main(["--epochs", str(epochs), "--out", str(figure)]) == 0

    printed = capsys.readouterr().out
    sgd, layca = (runs[0] for runs in recorded_runs)
    rows = table_rows(printed)
    for name, run in (("torch.optim.SGD", sgd), ("FusedLayca", layca)):
        assert run.accuracy[0] < 3 * CHANCE
        assert run.accuracy[-1] > 5 * CHANCE
        assert rows[name][3] == f"{run.accuracy[-1]:.3f}"
        assert rows[name][4] == f"{sum(run.rotation[-1]) / LAYERS:.3f}"
        check_rotation(run, epochs)
    assert rows["torch.optim.SGD"][1:3] == ["1", "-"]
    assert rows["FusedLayca"][1:3] == ["1/9", choose("auto", demo.pick_device("auto")).name]
    furthest = 1 - math.cos(STEPS_PER_EPOCH * math.atan(3**-2))
    assert max(layca.rotation[1]) <= furthest, "a layer cannot have turned by more than all of its steps"
    assert str(figure) in printed
    check_png(figure)


@pytest.mark.exhaustive
def test_seeds_are_trained_and_summarized(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recorded_runs: list[list[Run]],
    few_digits: Digits,
) -> None:
    monkeypatch.setattr(demo, "load_digits", lambda: few_digits)
    assert demo.main(["--epochs", "1", "--seeds", "3", "--out", str(tmp_path / "figure.png")]) == 0
    rows = table_rows(capsys.readouterr().out)
    for name, runs in zip(("torch.optim.SGD", "FusedLayca"), recorded_runs, strict=True):
        finals = torch.tensor([run.accuracy[-1] for run in runs], dtype=torch.float64)
        assert len({tuple(run.rotation[-1]) for run in runs}) == 3
        assert rows[name][3] == f"{finals.mean():.3f} ± {finals.std():.3f}"
    check_png(tmp_path / "figure.png")


@pytest.mark.parametrize("name", demo.EXTRAS)
def test_a_missing_extra_is_named_with_the_way_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert demo.main(["--out", str(tmp_path / "figure.png")]) == 1
    message = capsys.readouterr().err
    assert name in message
    assert 'pip install "layca_fast[demo]"' in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "0 is not at least 1"),
        (["--seeds", "-2"], "-2 is not at least 1"),
        (["--epochs", "many"], "'many'"),
        (["--quick", "--epochs", "3"], "not allowed with"),
        (["--backend", "abacus"], "choose from"),
        (["--plain-lr", "0"], "0 is not a positive number or fraction"),
        (["--plain-lr", "nan"], "nan is not a positive number or fraction"),
        (["--layca-lr", "1/0"], "1/0 is not a positive number or fraction"),
        (["--base", "all", "--plain-lr", "0.5"], "--plain-lr 0.5: the optimizers of --base all differ in lr"),
        (["--out", "/"], "--out /"),
        (["--out", "no such folder/figure.png"], "in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        demo.main(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_refused_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load("torch"), "missing", lambda: "it is on holiday")
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--backend", "torch"])
    assert exit_info.value.code == 2
    assert "backend='torch' cannot run on cpu: it is on holiday" in capsys.readouterr().err


def test_quick_is_shorter() -> None:
    full, quick = (demo.parse(argv)[0].epochs for argv in ([], ["--quick"]))
    assert quick < full


def test_digits_are_split_without_overlap(digits: Digits) -> None:
    """What rates are chosen on is neither trained on nor part of the test."""
    validation = load_digits(validation=True)
    assert torch.equal(validation.train_images, digits.train_images)
    assert torch.equal(validation.train_labels, digits.train_labels)
    assert digits.train_images.shape == validation.test_images.shape == (1000, 1, 14, 14)
    assert digits.test_images.shape == (3000, 1, 14, 14)
    images = torch.cat([digits.train_images, validation.test_images, digits.test_images])
    assert images.min() == 0
    assert 0.9 < images.max() <= 1
    assert len(images.flatten(1).unique(dim=0)) == 5000
    labels = torch.cat([digits.train_labels, validation.test_labels, digits.test_labels])
    assert labels.bincount().tolist() == [500] * 10
    assert digits.train_labels.bincount().min() > 50


def test_every_parameter_of_the_network_is_a_layer() -> None:
    network = Network()
    kinds = [type(module) for module in network.modules()]
    assert kinds.count(nn.Conv2d) == 8
    assert kinds.count(nn.BatchNorm2d) == 8
    parameters = list(network.parameters())
    assert len(parameters) == LAYERS
    assert all(parameter.dim() >= 2 for parameter in parameters)


def test_rotation_is_one_minus_cosine_whatever_the_norms() -> None:
    start = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    quarter = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    eighth = start + torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    cases = [(7 * start, 0.0), (eighth, 1 - math.sqrt(0.5)), (quarter, 1.0), (-0.1 * start, 2.0)]
    now = [weights for weights, _ in cases]
    assert rotation_from([start] * len(cases), now) == pytest.approx([value for _, value in cases], abs=1e-12)


def test_accuracy_counts_every_image() -> None:
    labels = torch.arange(1001) % 10
    logits = nn.functional.one_hot(labels, 10).float()
    logits[::7] = logits[::7].roll(1, dims=1)
    right = 1001 - len(range(0, 1001, 7))
    assert accuracy(nn.Identity(), logits, labels) == pytest.approx(right / 1001, abs=1e-12)


def gradients_seen(contestant: Contestant, digits: Digits, seed: int) -> list[torch.Tensor]:
    """Every gradient of one epoch at lr 0, where the weights stay as they were initialized."""
    seen: list[torch.Tensor] = []

    def record(optimizer: Optimizer, *_: object) -> None:
        seen.extend(param.grad.clone() for param in optimizer.param_groups[0]["params"])

    def make(params: object) -> Optimizer:
        optimizer = contestant.make(params, lr=0.0)
        optimizer.register_step_pre_hook(record)
        return optimizer

    train(make, digits, epochs=1, seed=seed, on_epoch=lambda _: None)
    return seen


def test_both_start_from_the_same_weights_and_see_the_same_batches(few_digits: Digits) -> None:
    sgd, layca = contestants("sgd", "torch", torch.device("cpu"))
    first = gradients_seen(sgd, few_digits, seed=5)
    torch.rand(1)  # so that the global generator is elsewhere: the seed alone decides
    state = torch.get_rng_state()
    second = gradients_seen(layca, few_digits, seed=5)
    assert len(first) == 3 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = gradients_seen(sgd, few_digits, seed=6)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_lr_drops_twice(few_digits: Digits) -> None:
    made: list[Optimizer] = []
    rates: list[float] = []

    def make(params: object) -> Optimizer:
        made.append(torch.optim.SGD(params, lr=1.0))
        return made[0]

    train(make, few_digits, epochs=8, seed=0, on_epoch=lambda _: rates.append(made[0].param_groups[0]["lr"]))
    assert rates == pytest.approx([1.0] * 5 + [DROP_FACTOR] + [DROP_FACTOR**2] * 2)


def test_the_figure_shows_its_data_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    settings = dict(matplotlib.rcParams)
    sgd, layca = contestants("sgd", "torch", torch.device("cpu"))
    pictures = []
    for final in (0.9, 1.0):
        run = Run([0.1, 0.8, final], [[0.0] * LAYERS, [0.1] * LAYERS, [1.2 * final] * LAYERS])
        demo_figure.save_pair(tmp_path / f"{final}.png", [(sgd, [run]), (layca, [run, run])])
        check_png(tmp_path / f"{final}.png")
        pictures.append(matplotlib.image.imread(tmp_path / f"{final}.png"))
    panels = [slice(0, 600), slice(700, 1400), slice(1400, 2000)]
    assert all((pictures[0][:, panel] != pictures[1][:, panel]).any() for panel in panels)
    assert dict(matplotlib.rcParams) == settings
