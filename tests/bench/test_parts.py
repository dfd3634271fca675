"""Parts of ``make gpu``: each runs whatever becomes of the others, within its time, and leaves nothing behind."""

import fcntl
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import parts
from bench.parts import TAIL, Deadline, Outcome, Part, run_part, run_parts, summary

from ..support import HANGS

HERE = {"PATH": ""}


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


WAITS = python(f"import time; time.sleep({HANGS})")
#: Seconds that a part is given to show something and to be stopped: more, where the machine is too busy for it.
LIMITS = (2, 10, 60, 600)
STOPPED = re.compile(r"stopped after \d+ seconds")


def plenty() -> float:
    return float(HANGS)


def test_every_part_runs_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    for limit in LIMITS:
        listed = [
            Part("one", python("print('fine')"), HANGS),
            Part("two", python("import sys; print('because'); sys.exit(3)"), HANGS),
            Part("three", python(f"import time; print('waits', flush=True); time.sleep({HANGS})"), limit),
            Part("four", python("print('never')"), HANGS, missing="no such tool"),
            Part("five", ["/no/such/program"], HANGS),
            Part("six", python("import os; print(os.environ['OURS'])"), HANGS, environment={"OURS": "mine"}),
        ]
        done = run_parts(listed, HERE, tmp_path, plenty, at_once=2)
        if "waits" in done[2].output:
            break
    assert [each.name for each in done] == [part.name for part in listed]
    assert [each.verdict for each in done] == ["passed", "failed", "failed", "missing", "failed", "passed"]
    for outcome, said in zip(done, ("fine", "because", "waits", "no such tool", "/no/such", "mine"), strict=True):
        assert said in outcome.output
    assert "exit code 3" in done[1].output
    assert STOPPED.search(done[2].output)
    assert summary(done) == "failed: two, three, five; missing: four"
    assert summary(done[:1]) == "everything passed"


def test_children_of_a_part_that_is_stopped_are_stopped_too(tmp_path: Path) -> None:
    lock, ready = tmp_path / "lock", tmp_path / "ready"
    lock.touch()
    holds = "import fcntl, pathlib, sys, time; held = open(sys.argv[1]); fcntl.flock(held, fcntl.LOCK_EX); "
    holds += "pathlib.Path(sys.argv[2]).touch(); time.sleep(3600)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {holds!r}, *sys.argv[1:]])"
    for limit in LIMITS:
        outcome = run_part(Part("parent", [*python(starts), str(lock), str(ready)], limit), HERE, tmp_path, plenty)
        assert STOPPED.search(outcome.output)
        if ready.exists():
            break
    assert ready.exists(), "the child never held the lock"
    with lock.open() as held:
        # Taken at once or, while the killed child is being taken away, soon.
        for _ in range(HANGS * 20):
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)
    pytest.fail("the child still holds its lock")


def test_what_is_left_of_the_time_limits_every_part(tmp_path: Path) -> None:
    outcome = run_part(Part("late", WAITS, HANGS), HERE, tmp_path, Deadline(1).left)
    assert outcome.verdict == "failed"
    assert STOPPED.search(outcome.output)
    outcome = run_part(Part("too late", python("print('ran')"), HANGS), HERE, tmp_path, lambda: 0.0)
    assert outcome.verdict == "failed"
    assert outcome.output.strip() == "not started: no time was left"


def test_what_interrupts_the_run_stops_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = parts.run_part

    def interrupted(part: Part, *args: Any) -> Outcome:
        if part.name == "one":
            raise KeyboardInterrupt
        return run(part, *args)

    monkeypatch.setattr(parts, "run_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_parts([Part(name, WAITS, HANGS) for name in ("one", "two", "three")], HERE, tmp_path, plenty, at_once=2)


def test_a_deadline_counts_down_and_keeps_what_is_reserved() -> None:
    deadline = Deadline(10_000)
    assert 9_000 < deadline.left() <= 10_000
    assert 3_000 < deadline.left(6_000) <= 4_000
    assert deadline.left(20_000) == 0
    assert Deadline(-1).left() == 0


def test_what_the_platform_refuses_is_missing_and_has_not_failed(tmp_path: Path) -> None:
    says = f"print('Error: Device not supported.' + '.' * {2 * TAIL})"
    refused = Part("tool", python(f"import sys; {says}; sys.exit(1)"), HANGS, refusals=("Device not supported",))
    assert run_part(refused, HERE, tmp_path, plenty).verdict == "missing"
    found = Part("tool", python("import sys; print('1 error'); sys.exit(9)"), HANGS, refusals=("Device not supported",))
    assert run_part(found, HERE, tmp_path, plenty).verdict == "failed"
    fine = Part("tool", python(says), HANGS, refusals=("Device not supported",))
    assert run_part(fine, HERE, tmp_path, plenty).verdict == "passed"
