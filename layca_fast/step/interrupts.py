"""Signals that arrive while a step is taken: what they call is called once the step is whole."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

#: What Python code handles by default or often, where the system has it: Ctrl-C, stop requests, timeouts, schedulers'.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Python's signal handlers to the end of the context; the second signal of a kind is let through at once.

    Handlers run in the main thread, between any two operations, and most of them raise. Elsewhere there is nothing to
    put off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def wait(number: int, frame: FrameType | None) -> None:
        again = any(number == each for each, _ in waiting)
        waiting.append((number, frame))
        if again:
            handlers[number](number, frame)

    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, wait)
        yield
    finally:
        _call_all([partial(signal.signal, number, handler) for number, handler in handlers.items()])
        first = dict(reversed(waiting))
        _call_all([partial(handlers[number], number, frame) for number, frame in reversed(first.items())])


def _call_all(calls: Sequence[Callable[[], Any]]) -> None:
    """Call each of them, in order, also where one raises: most handlers do."""
    if calls:
        try:
            calls[0]()
        finally:
            _call_all(calls[1:])
