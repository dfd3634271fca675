"""What the callbacks share: a monitor that is made when training starts, and the writers that it feeds."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..monitor import RotationMonitor
from ..monitor.writers import Writer


class Recorder:
    """Makes the monitor, or goes on with a saved one, and writes."""

    def __init__(self, writers: Iterable[Writer], options: Mapping[str, Any]) -> None:
        self._writers = list(writers)
        self._options = dict(options)
        self.monitor: RotationMonitor | None = None

    def start(self, model: nn.Module, step: int, saved: Mapping[str, Any] | None) -> None:
        """Watch ``model`` from ``step`` on, or go on with the records and initial weights of ``saved``."""
        self.monitor = RotationMonitor(model, **self._options)
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
