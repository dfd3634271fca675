"""RotationMonitor as a callback of the Hugging Face Trainer."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..monitor import RotationMonitor
from .advice import advise_rate
from .recorder import Recorder, Writers


class RotationCallback(TrainerCallback):  # type: ignore[misc]
    """Records the rotation of a model's layers over the Trainer's global steps.

    ::

        Trainer(..., callbacks=[RotationCallback(writers=[JsonLinesWriter("run.jsonl")], every=10)])

    The initial weights are those when training starts. They and the records are saved in each checkpoint's folder, as
    ``rotation_monitor.pt`` (of sharded models one file per process), and a run that resumes from the checkpoint of that
    step in ``output_dir`` (of a trial, in its folder), or from that in
    ``TrainingArguments(resume_from_checkpoint=...)``, goes on with them; where there is none it starts anew, with a
    warning. Writers are called, on the first process, whenever the Trainer logs and at the end. Warns where ``lr=None``
    has chosen a rate that is too small for the length of the training.

    Args:
        writers: of :mod:`layca_fast.writers`; or a function that makes them for each training that this callback sees,
            by its number from 0 on: several (trials of a search) would begin the same file anew, one after the other.
        options: of :class:`layca_fast.RotationMonitor`; ``check_norms=1e-3`` raises, or warns with
            ``on_drift="warn"``, at the step that finds a norm which other code has changed.
    """

    def __init__(self, writers: Writers = (), **options: Any) -> None:
        self._recorder = Recorder(writers, options)

    @property
    def monitor(self) -> RotationMonitor | None:
        """What records; None before training starts."""
        return self._recorder.monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        advise_rate([kwargs.get("optimizer")], state.max_steps)
        step, saved = state.global_step, None
        if step > 0:
            # A model with shards is known by the files that it left.
            names = (f"rotation_monitor_{args.process_index}.pt", "rotation_monitor.pt")
            # Trainer.train does not say where it resumes from; its arguments may.
            asked = args.resume_from_checkpoint
            folders = [*([Path(asked)] if isinstance(asked, str) else []), _folder(args, state)]
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
        self._recorder.start(model, step, saved, [kwargs.get("optimizer")])

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
        folder = _folder(args, state)
        if not folder.is_dir():
            warnings.warn(f"rotation curves are not saved: no folder {folder} of this checkpoint", stacklevel=2)
            return
        if self.monitor.is_sharded:
            torch.save(self.monitor.state_dict(), folder / f"rotation_monitor_{args.process_index}.pt")
        elif state.is_world_process_zero:
            torch.save(self.monitor.state_dict(), folder / "rotation_monitor.pt")


def _folder(args: Any, state: Any) -> Path:
    """Where the Trainer has put the checkpoint of this state: in a search a folder of the trial's, with any name."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    expected = Path(args.output_dir) / name
    if not state.is_hyper_param_search:
        return expected
    found = [path.parent for path in Path(args.output_dir).glob(f"*/{name}/{TRAINER_STATE_NAME}")]
    # The Trainer tells callbacks neither the folder nor the number of a trial, but each checkpoint holds its state.
    return max(found, key=lambda folder: _likeness(folder / TRAINER_STATE_NAME, state), default=expected)


def _likeness(path: Path, state: Any) -> tuple[bool, bool, float]:
    """How sure it is that this file holds ``state``: the same parameters, the same history, and how new it is."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    present = json.loads(json.dumps({name: getattr(state, name) for name in ("trial_params", "log_history")}))
    same = [saved.get(name) == value for name, value in present.items()]
    return same[0], same[1], path.stat().st_mtime
