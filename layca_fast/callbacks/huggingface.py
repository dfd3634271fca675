"""RotationMonitor as a callback of the Hugging Face Trainer."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..monitor import RotationMonitor
from ..monitor.writers import Writer
from .recorder import Recorder


class RotationCallback(TrainerCallback):  # type: ignore[misc]
    """Records the rotation of a model's layers over the Trainer's global steps.

    ::

        Trainer(..., callbacks=[RotationCallback(writers=[JsonLinesWriter("run.jsonl")], every=10)])

    The initial weights are those when training starts. They and the records are saved in each checkpoint's folder, as
    ``rotation_monitor.pt`` (of sharded models one file per process), and a run that resumes from the checkpoint of that
    step in ``output_dir``, or from that in ``TrainingArguments(resume_from_checkpoint=...)``, goes on with them; where
    there is none it starts anew, with a warning. Writers are called, on the first process, whenever the Trainer logs
    and at the end.

    Args:
        writers: of :mod:`layca_fast.writers`.
        options: of :class:`layca_fast.RotationMonitor`.
    """

    def __init__(self, writers: Iterable[Writer] = (), **options: Any) -> None:
        self._recorder = Recorder(writers, options)

    @property
    def monitor(self) -> RotationMonitor | None:
        """What records; None before training starts."""
        return self._recorder.monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step, saved = state.global_step, None
        if step > 0:
            # A model with shards is known by the files that it left.
            names = (f"rotation_monitor_{args.process_index}.pt", "rotation_monitor.pt")
            # Trainer.train does not say where it resumes from; its arguments may.
            asked = args.resume_from_checkpoint
            folders = [*([Path(asked)] if isinstance(asked, str) else []), _folder(args, step)]
            paths = [folder / name for folder in folders for name in names]
            path = next((path for path in paths if path.exists()), None)
            if path is None:
                warnings.warn(
                    f"{paths[-1]} is missing: rotation counts from the weights at step {step}; where the run resumes "
                    "from another folder, name it as TrainingArguments(resume_from_checkpoint=...), too",
                    stacklevel=2,
                )
            else:
                saved = torch.load(path, map_location="cpu", weights_only=True)
        self._recorder.start(model, step, saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.record(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._recorder.write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._recorder.write()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is None:
            return
        folder = _folder(args, state.global_step)
        if self.monitor.is_sharded:
            torch.save(self.monitor.state_dict(), folder / f"rotation_monitor_{args.process_index}.pt")
        elif state.is_world_process_zero:
            torch.save(self.monitor.state_dict(), folder / "rotation_monitor.pt")


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
