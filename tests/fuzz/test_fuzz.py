"""The fuzzer finds what is wrong, says how to meet it again, and comes to the same trial then."""

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from layca_fast.backends.torch_ import TorchBackend
from layca_fast.backends.torch_ import backend as torch_
from layca_fast.formulas.bases import FORMULAS
from layca_fast.step.directions import Directed

from .__main__ import main, run_trial
from .trial import Trial

#: Options are drawn without regard to what is warned of.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_some_steps_agree(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """``make fuzz`` takes many more."""
    assert main(["--steps", "150", "--seed", str(seed)]) == 0, capsys.readouterr().out


def turned_too_far(patch: pytest.MonkeyPatch) -> None:
    coefficients = torch_.coefficients

    def wrong(*args: Any) -> Any:
        a, *rest = coefficients(*args)
        return (a * (1 + 1e-4), *rest)

    patch.setattr(torch_, "coefficients", wrong)


def states_forgotten(patch: pytest.MonkeyPatch) -> None:
    measure = TorchBackend.measure

    def wrong(self: TorchBackend, batch: Any) -> None:
        measure(self, batch)
        for states in batch.states:
            states[0].mul_(0.99)

    patch.setattr(TorchBackend, "measure", wrong)


def gradients_spoiled(patch: pytest.MonkeyPatch) -> None:
    rotate = TorchBackend.rotate

    def wrong(self: TorchBackend, batch: Any) -> None:
        rotate(self, batch)
        for grad in batch.grads:
            if grad is not None:
                grad.add_(1)

    patch.setattr(TorchBackend, "rotate", wrong)


def short_states_turned_too_far(patch: pytest.MonkeyPatch) -> None:
    """What 16 bits round away of a state is no excuse for the step that is made of it."""
    rotate = TorchBackend.rotate

    def wrong(self: TorchBackend, batch: Any) -> None:
        if batch.states and batch.state_dtype == torch.bfloat16:
            batch.coefficients[:, 0] *= 1 + 1e-4
        rotate(self, batch)

    patch.setattr(TorchBackend, "rotate", wrong)


def short_weights_turned_too_far(patch: pytest.MonkeyPatch) -> None:
    """Nor is what they round away of a weight."""
    rotate = TorchBackend.rotate

    def wrong(self: TorchBackend, batch: Any) -> None:
        if batch.dtype == torch.bfloat16 and not any(slot.remainder is not None for slot in batch.slots):
            batch.coefficients[:, 0] *= 1 + 1e-2
        rotate(self, batch)

    patch.setattr(TorchBackend, "rotate", wrong)


def directions_of_short_states(patch: pytest.MonkeyPatch) -> None:
    direct = Directed._direct

    def wrong(self: Directed, advance: Callable[[], object]) -> None:
        direct(self, advance)
        for slot, step in zip(self.given, self.steps, strict=True):
            if slot.states[0].dtype == torch.bfloat16 and step.numel() > 1:
                step[(0,) * step.dim()] *= 1.01

    patch.setattr(Directed, "_direct", wrong)


@pytest.mark.parametrize(
    ("mistake", "formulas"),
    [
        (turned_too_far, FORMULAS),
        (states_forgotten, FORMULAS),
        (gradients_spoiled, FORMULAS),
        (short_states_turned_too_far, FORMULAS),
        pytest.param(short_weights_turned_too_far, FORMULAS, marks=pytest.mark.exhaustive),
        (directions_of_short_states, ["muon"]),
    ],
)
def test_a_backend_that_is_wrong_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None],
    formulas: Collection[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: int,
) -> None:
    mistake(monkeypatch)
    assert main(["--steps", "1000", "--seed", str(seed), "--failures", "1", "--formulas", *formulas]) == 1
    said = capsys.readouterr().out
    assert "Disagreement" in said
    assert f"again: python -m tests.fuzz --seed {seed} --trial" in said


def test_a_trial_can_be_met_again(seed: int) -> None:
    logs = []
    for _ in range(2):
        trial = Trial(seed, 1)
        assert run_trial(seed, 1)[1] is None
        for _ in trial.run():
            pass
        logs.append(trial.log)
    assert logs[0] == logs[1]
