"""``make test-versions``: the tests' core under several versions of Python and torch, and the table of what was run.

    python -m release.versions                                  # every pair of PAIRS whose interpreter is found
    python -m release.versions --python python3.13 --torch 2.14.1

For each pair a wheel is built for that Python, and installed with that torch and the Triton that it brings into a fresh
environment without a compiler, where ``verify --quick`` and the tests of release/environments.py run. Each row of the
table in docs/backends.md is written by the run that it describes, and replaces the row of the same versions. On x86-64
PyPI's torch comes with some gigabytes of CUDA's libraries: a pair takes minutes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from .environments import ROOT, TOOLS, Environment
from .wheel import build

#: What is run when nothing is named: the oldest and the newest of each, the torch that development runs on, and those
#: in which a name of layca_fast/compat.py came in, or did not yet.
PAIRS = (
    ("3.10", "2.6.0"),
    ("3.11", "2.8.0"),
    ("3.11", "2.9.1"),
    ("3.11", "2.10.0"),
    ("3.11", "2.13.0"),
    ("3.12", "2.14.1"),
    ("3.13", "2.15.0"),
    ("3.14", "2.15.0"),
)

#: Beside torch before 2.13: newer ones warn of what the interpreter of its Triton does, and since 2.4 refuse it.
OLD_NUMPY = ("numpy<1.25",)

PAGE = ROOT / "docs" / "backends.md"
BEGIN, END = "<!-- written by make test-versions -->\n", "\n<!-- end of the table -->"
HEAD = "| Python | torch | Triton | cpu backend | passed | skipped | on |\n| --- | --- | --- | --- | --- | --- | --- |"


def interpreter(version: str) -> str | None:
    """The command of an interpreter of this version, or None."""
    found = shutil.which(f"python{version}")
    if found is None:
        return None
    # A launcher may stand for a version that is not installed.
    command = [found, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
    said = subprocess.run(command, capture_output=True, text=True)
    return found if said.returncode == 0 and said.stdout.strip() == version else None


def order(row: str) -> list[int]:
    """By which rows are sorted: their versions of Python and torch, as numbers."""
    python, torch = [cell.strip() for cell in row.strip("|").split("|")][:2]
    return [int(number) for number in re.findall(r"\d+", f"{python} {torch}")]


def written(page: str, python: str, torch: str, row: str | None) -> str:
    """The page with ``row`` in its table, in place of the one of that Python and torch; None: without either."""
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    same = rf"\| {re.escape(python)}\.\d+ \| {re.escape(torch)}(\+\w+)? \|"
    rows = [each for each in table.strip().splitlines()[2:] if not re.match(same, each)]
    return before + BEGIN + "\n".join([HEAD, *sorted([*rows, *filter(None, [row])], key=order)]) + END + after


def is_old_triton(version: str) -> bool:
    """Whether the triton backend refuses it, so that the tests leave it out: pyproject.toml asks for 3.3."""
    return version != "none" and tuple(map(int, version.split(".")[:2])) < (3, 3)


def try_pair(python: str, torch: str, workers: int) -> str:
    """Build, install and test; returns the row of the table. RuntimeError if anything failed."""
    with tempfile.TemporaryDirectory() as folder:
        _, wheel = build(Path(folder) / "wheels", python, cuda=False)
        here = Environment(Path(folder) / "fresh", python)
        is_old = tuple(map(int, torch.split(".")[:2])) < (2, 13)
        here.uv_install(wheel, f"torch=={torch}", *TOOLS, *(OLD_NUMPY if is_old else ()))
        here.check_installed()
        program = (
            "import platform, importlib.metadata as m, layca_fast, torch; "
            "print(platform.python_version(), torch.__version__, "
            "*[d.version for d in m.distributions() if d.metadata['Name'] == 'triton'] or ['none'])"
        )
        versions = here.run("-c", program).split()
        native = here.run("-c", "import layca_fast; print(layca_fast.backends()['cpu'].available)").strip()
        print("    " + here.run("-m", "layca_fast", "verify", "--quick").strip().splitlines()[-1], flush=True)
        said = here.run_core(workers)
        print(f"    {said}", flush=True)
    if is_old_triton(versions[2]):
        versions[2] += " (too old)"
    counts = [found[1] if (found := re.search(rf"(\d+) {what}", said)) else "0" for what in ("passed", "skipped")]
    today = datetime.now(timezone.utc).date().isoformat()
    return f"| {' | '.join([*versions, 'yes' if native == 'True' else 'no', *counts, today])} |"


def main() -> int:
    """Run the pairs; returns 1 if one failed, or none could be run."""
    parser = argparse.ArgumentParser(prog="python -m release.versions", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", help="an interpreter, as python3.12: only this, with --torch")
    parser.add_argument("--torch", help="a version on PyPI: only this, with --python")
    parser.add_argument("--workers", type=int, default=2, help="processes of the tests")
    args = parser.parse_args()
    if (args.python is None) != (args.torch is None):
        parser.error("--python and --torch belong together")
    pairs = PAIRS if args.python is None else ((args.python, args.torch),)
    failed = tried = 0
    for version, torch in pairs:
        python = args.python or interpreter(version)
        if python is None:
            print(f"==> Python {version} with torch {torch}: not run, for there is no python{version} on the PATH")
            continue
        print(f"==> {python} with torch {torch}", flush=True)
        tried += 1
        try:
            row = try_pair(python, torch, args.workers)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed += 1
            row = None
        version = re.sub(r"^.*python", "", python)
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), version, torch, row), encoding="utf-8")
    return 1 if failed or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
