"""The Hugging Face callback where one of them sees several trainings: trials of a search, trainers in one process."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from layca_fast.callbacks.huggingface import RotationCallback
from layca_fast.monitor.reading import read_curves
from layca_fast.monitor.writers import JsonLinesWriter

from ..support import same_bits

STEPS = 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(inputs).square().mean()}


def trainer_for(folder: Path, callback: Any, start: Model, steps: int = STEPS) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"inputs": each} for each in torch.randn(20, 6)]
    return Trainer(
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback],
        model_init=lambda: copy.deepcopy(start),
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("named", [False, True], ids=["run-N", "hp_name"])
@pytest.mark.parametrize("rates", [(0.01, 0.02, 0.04), (0.01, 0.01, 0.01)], ids=["different", "alike"])
def test_each_trial_of_a_search_keeps_its_records(
    rates: tuple[float, ...], named: bool, tmp_path: Path, seed: int
) -> None:
    """In the folders of its own checkpoints, and in a file of its own; trials with the same parameters included."""
    callback = RotationCallback(lambda number: [JsonLinesWriter(tmp_path / f"{number}.jsonl")])
    trainer = trainer_for(tmp_path / "out", callback, Model())
    following = itertools.cycle(rates)

    def space(trial: Any) -> dict[str, float]:
        rate = next(following)
        return {"learning_rate": trial.suggest_float("learning_rate", rate, rate)}

    numbers = itertools.count()
    names = {"hp_name": lambda trial: f"trial{trial.number}"} if named else {}
    trainer.hyperparameter_search(
        hp_space=space,
        compute_objective=lambda metrics: float(next(numbers)),
        backend="optuna",
        n_trials=3,
        **names,
    )
    written = sorted((tmp_path / "out").rglob("rotation_monitor.pt"))
    folders = {path.parent.parent.name for path in written}
    assert len(folders) == 3
    assert len(written) == 3 * 2
    for number, folder in enumerate(sorted(folders)):
        curves = read_curves(tmp_path / f"{number}.jsonl")
        assert curves.steps == list(range(STEPS + 1))
        for step in (2, 4):
            saved = torch.load(tmp_path / "out" / folder / f"checkpoint-{step}" / "rotation_monitor.pt")
            assert same_bits(saved["rotation"], curves.rotation[: step + 1])


def test_trainers_in_one_process_share_a_callback(tmp_path: Path, seed: int) -> None:
    callback = RotationCallback(lambda number: [JsonLinesWriter(tmp_path / f"{number}.jsonl")])
    start = Model()
    for name in ("a", "b"):
        trainer_for(tmp_path / name, callback, start).train()
    for number, name in enumerate(("a", "b")):
        curves = read_curves(tmp_path / f"{number}.jsonl")
        saved = torch.load(tmp_path / name / "checkpoint-4" / "rotation_monitor.pt")
        assert same_bits(saved["rotation"], curves.rotation)
    trainer_for(tmp_path / "a", callback, start, steps=6).train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4")
    )
    assert same_bits(read_curves(tmp_path / "2.jsonl").rotation[:5], read_curves(tmp_path / "0.jsonl").rotation)
    assert read_curves(tmp_path / "2.jsonl").steps == list(range(7))
