"""``make sanitize`` in short: builds in a minute, runs, and sees what it is there to see."""

import subprocess
import sys
from pathlib import Path

import pytest

from ..backends.cpu.support import ROOT
from .__main__ import KINDS, library

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not Path(library("libasan.so")).is_absolute(), reason="the compiler has no sanitizers here"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_sanitizer_reports_anything(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.sanitize", kind, "--short", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no sanitizer reported anything" in done.stdout
