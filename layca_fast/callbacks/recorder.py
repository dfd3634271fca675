"""What the callbacks share: a monitor that is made when training starts, and the writers that it feeds."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..monitor import RotationMonitor
from ..monitor.writers import Writer

#: What a callback takes: writers, or what makes those of each training by its number: trials need files of their own.
Writers = Iterable[Writer] | Callable[[int], Iterable[Writer]]


class Recorder:
    """Makes the monitor, or goes on with a saved one, and writes."""

    def __init__(self, writers: Writers, options: Mapping[str, Any]) -> None:
        self._make_writers = writers if callable(writers) else None
        self._writers = [] if callable(writers) else list(writers)
        self._trainings = 0
        self._options = dict(options)
        self.monitor: RotationMonitor | None = None

    def start(
        self, model: nn.Module, step: int, saved: Mapping[str, Any] | None, optimizers: Iterable[Any] = ()
    ) -> None:
        """Watch ``model`` from ``step`` on, or go on with the records and initial weights of ``saved``.

        ``optimizers``: those whose norms are checked, where the options ask for it.
        """
        if self._make_writers is not None:
            self._writers = list(self._make_writers(self._trainings))
        self._trainings += 1
        self.monitor = RotationMonitor(model, **self._options)
        self.monitor.guard(*optimizers)
        if saved:
            self.monitor.load_state_dict(dict(saved))
        elif step > 0:
            self.monitor.reset(step)

    def record(self, step: int) -> None:
        """Record once ``step`` is reached; a repeated one, as between two optimizer steps, is nothing new."""
        if self.monitor is not None and step > self.monitor.step:
            self.monitor.record(step)

    def write(self) -> None:
        """Hand all news to the writers; where one fails, to the others first, and raise its error."""
        if self.monitor is None:
            return
        failures = []
        for writer in self._writers:
            try:
                writer.write(self.monitor)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]
