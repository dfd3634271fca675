"""The fuzzer finds what is wrong, says how to meet it again, and comes to the same trial then."""

from collections.abc import Callable
from typing import Any

import pytest

from layca_fast.backends import torch_
from layca_fast.backends.torch_ import TorchBackend

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


@pytest.mark.parametrize("mistake", [turned_too_far, states_forgotten, gradients_spoiled])
def test_a_backend_that_is_wrong_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: int,
) -> None:
    mistake(monkeypatch)
    assert main(["--steps", "300", "--seed", str(seed), "--failures", "1"]) == 1
    assert f"again: python -m tests.fuzz --seed {seed} --trial" in capsys.readouterr().out


def test_a_trial_can_be_met_again(seed: int) -> None:
    logs = []
    for _ in range(2):
        trial = Trial(seed, 1)
        assert run_trial(seed, 1)[1] is None
        for _ in trial.run():
            pass
        logs.append(trial.log)
    assert logs[0] == logs[1]
