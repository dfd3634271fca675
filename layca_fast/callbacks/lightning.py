"""RotationMonitor as a callback of Lightning."""

import warnings
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from ..monitor import RotationMonitor
from .advice import advise_rate
from .recorder import Recorder, Writers


class RotationCallback(Callback):  # type: ignore[misc]
    """Records the rotation of a LightningModule's layers over the Trainer's global steps.

    ::

        Trainer(callbacks=[RotationCallback(writers=[JsonLinesWriter("run.jsonl")], every=10)])

    The initial weights are those when training starts. They and the records go into Lightning's checkpoints, and a
    resumed run goes on with them; not those of sharded models, whose processes have different shards: these start anew,
    with a warning. Writers are called, on the first process, at the end of each epoch and of the training. Warns where
    ``lr=None`` has chosen a rate that is too small for the length of the training.

    Args:
        writers: of :mod:`layca_fast.writers`; or a function that makes them for each training that this callback sees,
            by its number from 0 on: several (trials of a search) would begin the same file anew, one after the other.
        options: of :class:`layca_fast.RotationMonitor`; ``check_norms=1e-3`` raises, or warns with
            ``on_drift="warn"``, at the step that finds a norm which other code has changed.
    """

    def __init__(self, writers: Writers = (), **options: Any) -> None:
        super().__init__()
        self._recorder = Recorder(writers, options)
        self._saved: dict[str, Any] = {}

    @property
    def monitor(self) -> RotationMonitor | None:
        """What records; None before training starts."""
        return self._recorder.monitor

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        advise_rate(trainer.optimizers, trainer.estimated_stepping_batches)
        self._recorder.start(pl_module, trainer.global_step, self._saved, trainer.optimizers)
        self._saved = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self._recorder.record(trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._recorder.write()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._recorder.write()

    def state_dict(self) -> dict[str, Any]:
        if self.monitor is None:
            return self._saved
        if self.monitor.is_sharded:
            warnings.warn("rotation curves of sharded layers are not part of Lightning's checkpoints", stacklevel=2)
            return {}
        return self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict
