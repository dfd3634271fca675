"""Commands with time limits, run one after the other or side by side, and what became of each."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

ROOT = Path(__file__).parents[1]

#: Characters of a part's output that the results keep, from its end.
TAIL = 4000


@dataclass(frozen=True)
class Part:
    """A command, and the seconds that it may take.

    ``missing``: why it cannot run here; "" if it can. ``refusals``: what it prints where the platform does not let it.
    """

    name: str
    command: Sequence[str]
    limit: float
    missing: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    refusals: Sequence[str] = ()

    def log(self, folder: Path) -> Path:
        """Where its output goes."""
        return folder / f"{''.join(letter if letter.isalnum() else '_' for letter in self.name)}.log"


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "passed", "failed" or "missing"; the end of its output."""

    name: str
    verdict: str
    seconds: float
    output: str


class Deadline:
    """A time by which all is to be done, ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, reserved: float = 0.0) -> float:
        """Seconds until then, without those that are ``reserved`` for what comes later; never below 0."""
        return max(0.0, self._end - time.monotonic() - reserved)


def _finish(process: "subprocess.Popen[bytes]", limit: float, left: Callable[[], float]) -> str:
    """Wait for a process that leads a session; what went wrong, or "". None of its children outlives the limit."""
    start = time.monotonic()
    try:
        while process.poll() is None:
            taken = time.monotonic() - start
            if taken >= limit or left() <= 0:
                return f"stopped after {taken:.0f} seconds"
            time.sleep(0.05)
        code = process.returncode
    finally:
        if process.returncode is None:
            # A test's, a compiler's or a sanitizer's children would go on, and hold the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit code {code}" if code else ""


def _run(part: Part, environment: Mapping[str, str], log: Path, left: Callable[[], float]) -> str:
    """Run one part with its output in ``log``; what went wrong, or ""."""
    if left() <= 0:
        log.touch()
        return "not started: no time was left"
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env={**environment, **part.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        return _finish(process, part.limit, left)


def run_part(part: Part, environment: Mapping[str, str], logs: Path, left: Callable[[], float]) -> Outcome:
    """Run one part for at most its limit and what is ``left``, its output in a file; print what became of it."""
    if part.missing:
        print(f"==> {part.name}: missing: {part.missing}", flush=True)
        return Outcome(part.name, "missing", 0.0, part.missing)
    log, start = part.log(logs), time.monotonic()
    problem = _run(part, environment, log, left)
    seconds, output = time.monotonic() - start, log.read_text(errors="replace")
    refused = bool(problem) and any(refusal in output for refusal in part.refusals)
    verdict = "missing" if refused else "failed" if problem else "passed"
    tail = output[-TAIL:]
    print(f"==> {part.name}: {verdict} in {seconds:.0f} s" + (f" ({problem})\n{tail}" if problem else ""), flush=True)
    return Outcome(part.name, verdict, seconds, f"{tail}\n{problem}" if problem else tail)


def run_parts(
    parts: Sequence[Part],
    environment: Mapping[str, str],
    logs: Path,
    left: Callable[[], float],
    at_once: int = 1,
) -> list[Outcome]:
    """Run all parts, ``at_once`` of them side by side, whatever becomes of each; those named first begin first."""
    stopped = Event()

    def still_left() -> float:
        return 0.0 if stopped.is_set() else left()

    with ThreadPoolExecutor(at_once) as pool:
        try:
            return list(pool.map(lambda part: run_part(part, environment, logs, still_left), parts))
        finally:
            # Control-C reaches only this process, as the parts have sessions of their own.
            stopped.set()


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line: what failed, what is missing."""
    by_verdict = {
        verdict: [each.name for each in outcomes if each.verdict == verdict] for verdict in ("failed", "missing")
    }
    said = [f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict.items() if names]
    return "; ".join(said) or "everything passed"
