"""The demo's other bases: what is trained, the table of all of them with its spread, and their picture."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import matplotlib.colors
import matplotlib.image
import pytest
import torch
from torch import nn

from layca_fast import FusedLayca
from layca_fast.commands.demo import figure as demo_figure
from layca_fast.commands.demo import main as demo
from layca_fast.commands.demo.bases import PAPER_BASES, contestants
from layca_fast.commands.demo.tables import spread_in_points
from layca_fast.commands.demo.training import Contestant, Digits, Result, Run

from .support import check_png, table_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")

#: The paper's five: torch's class, what its group holds beside the defaults, its lr, and that of FusedLayca on it.
FIVE = {
    "sgd": (torch.optim.SGD, {}, 1, 3**-2),
    "sgd_amom": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.9}, 3, 3**-3),
    "rmsprop": (torch.optim.RMSprop, {}, 3**-5, 3**-2),
    "adam": (torch.optim.Adam, {}, 3**-4, 3**-3),
    "adagrad": (torch.optim.Adagrad, {}, 3**-2, 3**-2),
}


def runs_ending_at(*finals: float) -> list[Run]:
    return [Run([0.1, 0.5, final], [[0.0], [0.1], [0.2]]) for final in finals]


def results_ending_at(finals: dict[str, tuple[list[float], list[float]]]) -> list[Result]:
    """Results without and with Layca in turn, whose runs end at these accuracies, by base."""
    return [
        (racer, runs_ending_at(*accuracies))
        for base, both in finals.items()
        for racer, accuracies in zip(contestants(base, "torch", CPU), both, strict=True)
    ]


def random_finals(seeds: int) -> dict[str, tuple[list[float], list[float]]]:
    return {base: tuple((0.9 + 0.09 * torch.rand(2, seeds, dtype=torch.float64)).tolist()) for base in FIVE}


def test_the_five_bases_are_the_papers() -> None:
    assert list(PAPER_BASES) == list(FIVE)


@pytest.mark.parametrize("base", FIVE)
def test_each_base_is_torchs_own_against_layca(base: str) -> None:
    kind, options, plain_rate, layca_rate = FIVE[base]
    params = [nn.Parameter(torch.randn(3, 2))]
    plain, layca = (racer.optimizer(params) for racer in contestants(base, "torch", CPU))
    assert type(plain) is kind
    assert plain.param_groups == kind(params, lr=plain_rate, **options).param_groups
    assert type(layca) is FusedLayca
    assert layca.param_groups == FusedLayca(params, lr=layca_rate, base=base, backend="torch").param_groups


def test_each_lr_is_that_of_its_side_alone() -> None:
    plain, layca = (racer.lr for racer in contestants("sgd_amom", "torch", CPU))
    assert [racer.lr for racer in contestants("sgd_amom", "torch", CPU, plain_rate=0.3)] == [0.3, layca]
    assert [racer.lr for racer in contestants("sgd_amom", "torch", CPU, layca_rate=0.3)] == [plain, 0.3]


def test_one_lr_of_layca_may_serve_all_bases() -> None:
    args, _ = demo.parse(["--base", "all", "--layca-lr", "1/81"])
    assert args.layca_lr == 1 / 81


@pytest.mark.parametrize(
    ("rate", "text"), [(3.0, "3"), (1.0, "1"), (3**-7, "1/2187"), (1e-3, "1/1000"), (3e-5, "3e-05"), (0.7071, "0.7071")]
)
def test_rates_print_as_what_they_are(rate: float, text: str) -> None:
    assert Contestant("any", "sgd", rate, "-", torch.optim.SGD).rate == text


@pytest.mark.exhaustive
def test_main_compares_all_bases(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recorded_runs: list[list[Run]],
    few_digits: Digits,
) -> None:
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(demo, "load_digits", lambda: few_digits)
    assert demo.main(["--base", "all", "--epochs", "1", "--seeds", "2", "--out", str(figure)]) == 0

    printed = capsys.readouterr().out
    rows = table_rows(printed)
    finals = [[run.accuracy[-1] for run in runs] for runs in recorded_runs]
    plain, layca = finals[::2], finals[1::2]
    for base, before, after in zip(FIVE, plain, layca, strict=True):
        racers = contestants(base, "auto", demo.pick_device("auto"))
        cells = [
            text for racer, accs in zip(racers, (before, after), strict=True) for text in (racer.rate, summary(accs))
        ]
        assert rows[base] == [base, *cells]
        assert all(racer.name in printed for racer in racers)
    spreads = [100 * (max(map(mean, side)) - min(map(mean, side))) for side in (plain, layca)]
    assert rows["spread"] == ["spread", *(f"{points:.1f} points" for points in spreads)]
    assert str(figure) in printed
    check_png(figure)


def summary(accuracies: Sequence[float]) -> str:
    return f"{mean(accuracies):.3f} ± {stdev(accuracies):.3f}"


def test_all_bases_start_alike_and_move(few_digits: Digits) -> None:
    """Ten runs from the same weights: equal accuracy at the start, no two with the same weights after an epoch."""
    racers = [racer for base in FIVE for racer in contestants(base, "torch", CPU)]
    runs = [run for (run,) in demo.train_all(racers, few_digits, epochs=1, seeds=1)]
    assert len({run.accuracy[0] for run in runs}) == 1
    assert len({tuple(run.rotation[-1]) for run in runs}) == len(racers)


@pytest.mark.parametrize("base", ["adam", "sgd_amom"])
def test_main_compares_one_base(
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recorded_runs: list[list[Run]],
    few_digits: Digits,
) -> None:
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(demo, "load_digits", lambda: few_digits)
    argv = [
        "--base",
        base,
        "--plain-lr",
        "0.002",
        "--layca-lr",
        "1/50",
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--out",
        str(figure),
    ]
    assert demo.main(argv) == 0
    rows = table_rows(capsys.readouterr().out)
    racers = contestants(base, "auto", demo.pick_device("auto"))
    for racer, rate, runs in zip(racers, ("1/500", "1/50"), recorded_runs, strict=True):
        assert rows[racer.name][:4] == [racer.name, rate, racer.backend, summary([run.accuracy[-1] for run in runs])]
    check_png(figure)


def test_names_of_all_bases_fit_into_the_table(
    seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    results = results_ending_at(random_finals(seeds=3))
    demo.print_pair("\nAfter", results)
    rows = table_rows(capsys.readouterr().out)
    assert all(racer.name in rows for racer, _ in results)


def test_an_unknown_base_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--base", "adamax"])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "adamax" in message
    assert all(re.search(rf"\b{base}\b", message.split("choose from")[1]) for base in (*FIVE, "all"))


def test_spread_is_between_the_best_and_the_worst_mean() -> None:
    finals = {"sgd": [0.95, 0.97], "adam": [0.99, 0.90], "adagrad": [0.925, 0.945], "rmsprop": [0.94, 0.96]}
    results = [(contestants("sgd", "torch", CPU)[0], runs_ending_at(*both)) for both in finals.values()]
    assert spread_in_points(results) == pytest.approx(100 * (0.96 - 0.935))
    assert spread_in_points(results[:1]) == 0


def pixels_of(picture: torch.Tensor, colour: str) -> torch.Tensor:
    """Row and column, (N, 2), of the pixels of ``picture``, (height, width, 4), that have exactly this colour."""
    wanted = torch.tensor(matplotlib.colors.to_rgba(colour)).mul(255).round()
    return (picture.mul(255).round() == wanted).all(-1).nonzero()


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_shows_where_every_base_ends(seeds: int, seed: int, tmp_path: Path) -> None:
    settings = dict(matplotlib.rcParams)
    ends = torch.linspace(0.91, 0.98, 10, dtype=torch.float64)[torch.randperm(10)].view(5, 2)
    offsets = torch.linspace(-0.003, 0.003, seeds, dtype=torch.float64) if seeds > 1 else torch.zeros(1)
    finals = {base: tuple((both[:, None] + offsets).tolist()) for base, both in zip(FIVE, ends, strict=True)}
    demo_figure.save_bases(tmp_path / "figure.png", results_ending_at(finals))

    check_png(tmp_path / "figure.png")
    picture = torch.from_numpy(matplotlib.image.imread(tmp_path / "figure.png"))
    for side, panel in enumerate((slice(150, 700), slice(720, 1290))):
        shown = [pixels_of(picture[:, panel], colour) for colour in demo_figure.BASE_COLOURS]
        last_rows = torch.stack([pixels[pixels[:, 1] > pixels[:, 1].max() - 10, 0].double().mean() for pixels in shown])
        assert last_rows.argsort().tolist() == ends[:, side].argsort(descending=True).tolist()
    shown = [pixels_of(picture[:, 1490:], colour) for colour in demo_figure.BASE_COLOURS]
    rightmost = torch.stack([pixels[:, 1].max() for pixels in shown])
    assert rightmost.argsort().tolist() == ends.amax(1).argsort().tolist()
    assert dict(matplotlib.rcParams) == settings


def test_the_rule_is_that_of_fused_layca_alone() -> None:
    plain, ball = contestants("adam", "torch", CPU, rule="hyperball")
    params = [torch.ones(3, 2, requires_grad=True)]
    assert ball.name == "Hyperball on adam"
    assert ball.optimizer(params).param_groups[0]["rule"] == "hyperball"
    assert "rule" not in plain.optimizer(params).param_groups[0]
