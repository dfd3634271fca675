"""Progress of what takes long: bars that move on a terminal; elsewhere, or without rich, a line every few seconds."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

#: Seconds after which a line follows the last one.
EVERY = 5.0

#: ``advance(number, note="", by=1)``: so many more of the task of that number are done, and what there is to say of it.
Advance = Callable[..., None]


@contextmanager
def progress(names: Sequence[str], total: int, unit: str) -> Iterator[Advance]:
    """Follow tasks of these names, of ``total`` units each."""
    try:
        from rich.console import Console
    except ImportError:
        moving = False
    else:
        console = Console()
        moving = console.is_terminal and not console.is_dumb_terminal
    with (_bars if moving else _lines)(names, total, unit) as advance:
        yield advance


@contextmanager
def _bars(names: Sequence[str], total: int, unit: str) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bars:
        tasks = [bars.add_task(name, total=total, start=False, note="") for name in names]

        def advance(number: int, note: str = "", by: int = 1) -> None:
            bars.start_task(tasks[number])
            bars.update(tasks[number], advance=by, note=note)

        yield advance


@contextmanager
def _lines(names: Sequence[str], total: int, unit: str) -> Iterator[Advance]:
    done = [-1] * len(names)
    printed = 0.0

    def advance(number: int, note: str = "", by: int = 1) -> None:
        nonlocal printed
        first, now = done[number] < 0, time.monotonic()
        done[number] = max(done[number], 0) + by
        if first or done[number] == total or now - printed >= EVERY:
            printed = now
            print(f"    {names[number]}: {done[number]} of {total} {unit}{', ' if note else ''}{note}", flush=True)

    yield advance
