"""What ``make gpu`` is made of, on the CPU: its parts, its tables on tiny models, its goals and its file of results."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from bench import gpu, gpu_small, gpu_tables
from bench.gpu import Outcome, Part
from bench.gpu_tables import LARGE, TABLES, goals, outcomes
from bench.measure import measure
from bench.providers import Provider, providers, yardstick
from bench.rows import Row
from bench.runner import COPY, host_seconds_of, seconds_of
from bench.shapes import MODELS

CPU = torch.device("cpu")
TINY = [(30, 40), (40,), (8, 3, 3, 3)]


def eager(base: str, device: torch.device) -> list[Provider]:
    return [each for each in providers(base, device) if "compile" not in each.name]


def test_tables_of_tiny_models_on_the_cpu(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, _, model in TABLES:
        monkeypatch.setitem(MODELS, model, lambda: TINY)
    monkeypatch.setattr(gpu_tables, "providers", eager)
    monkeypatch.setattr(gpu_tables, "TIMERS", {"device": seconds_of, "host": host_seconds_of})
    out = tmp_path / "out.json"
    results = gpu_tables.run(TABLES, CPU, 2, 1.0, out)
    written = json.loads(out.read_text())
    assert written["goals"] == results
    assert {(row["timer"], row["base"], row["model"]) for row in written["rows"]} == set(TABLES)
    for base in ("momentum", "adam"):
        who = {row["provider"] for row in written["rows"] if row["base"] == base}
        assert who == {COPY, *(each.name for each in gpu_tables.entrants(base, CPU))}
        assert {yardstick(base), "FusedLayca cuda", "FusedLayca triton", "Layca by hand, foreach"} <= who
    # No GPU, no figure.
    assert all(row["measured"] is None and row["reached"] is None for row in results)
    assert "not measured" in capsys.readouterr().out


def rows_at(milliseconds: dict[str, float]) -> dict[tuple[str, str, str, str], Row]:
    """Rows of all tables at these medians by provider, 1 ms for the others."""
    template = measure("sgd", "tiny", TINY, 1, CPU, only=eager("sgd", CPU)[:1], tell=lambda _: None)[0]
    names = {*gpu_tables.NAMES, yardstick("momentum"), yardstick("adam")}
    found = {}
    for timer, base, model in TABLES:
        for name in names:
            median = milliseconds.get(name, 1.0)
            row = replace(template, base=base, model=model, provider=name, median_ms=median, copy_fraction=0.9 / median)
            found[timer, base, model, name] = row
    return found


def by_name(milliseconds: dict[str, float]) -> dict[str, dict[str, Any]]:
    return {row["goal"]: row for row in outcomes(rows_at(milliseconds))}


def test_goals_are_held_against_what_was_measured(seed: int) -> None:
    found = by_name({"FusedLayca cuda": 1.2, "FusedLayca triton": 1.2, "Layca by hand, foreach": 6.0})
    assert len(found) == len(list(goals()))
    ratio = found["cuda / SGD fused, GPT-2 small"]
    assert ratio["measured"] == pytest.approx(1.2)
    assert (ratio["reached"], ratio["moonshot_reached"]) == (True, False)
    assert not found["cuda / SGD fused, ResNet-50"]["reached"]
    assert found[f"cuda / SGD fused, {LARGE}"]["moonshot_reached"]
    assert found["triton / cuda, ResNet-50"]["measured"] == 1
    assert found["by hand, foreach / cuda, ResNet-50"]["reached"]
    assert not found["by hand, four operations / cuda, ResNet-50"]["reached"]
    assert found["host, 161 tensors, microseconds"]["measured"] == pytest.approx(1200)
    share = f"cuda, {LARGE}: part of the copy bandwidth at 28 bytes"
    assert not found[share]["reached"]
    assert by_name({"FusedLayca cuda": 1.0})[share]["reached"]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_every_part_runs_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    parts = [
        Part("one", python("print('fine')"), 60),
        Part("two", python("import sys; print('because'); sys.exit(3)"), 60),
        Part("three", python("import time; print('waits', flush=True); time.sleep(60)"), 3),
        Part("four", python("print('never')"), 60, missing="no such tool"),
        Part("five", ["/no/such/program"], 60),
        Part("six", python("import os; print(os.environ['OURS'])"), 60, environment={"OURS": "mine"}),
    ]
    done = gpu.run_parts(parts, {"PATH": ""}, tmp_path, at_once=2)
    assert [each.name for each in done] == [part.name for part in parts]
    assert [each.verdict for each in done] == ["passed", "failed", "failed", "missing", "failed", "passed"]
    for outcome, said in zip(done, ("fine", "because", "waits", "no such tool", "/no/such", "mine"), strict=True):
        assert said in outcome.output
    assert "stopped after 3 seconds" in done[2].output
    assert gpu.summary(done) == "failed: two, three, five; missing: four"
    assert gpu.summary(done[:1]) == "everything passed"


def test_wheels_are_used_without_pip(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "brought_along-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along/__init__.py", "VALUE = 'here'")
        wheel.writestr("brought_along-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought-along\nVersion: 1\n")
    site = tmp_path / "site"
    assert gpu.unpack_wheels(tmp_path, site) == ["brought_along-1-py3-none-any.whl"]
    program = "import brought_along, importlib.metadata as m; print(brought_along.VALUE, m.version('brought_along'))"
    done = subprocess.run(python(program), env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["here", "1"]


def test_modules_that_were_not_built_leave_no_old_ones_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = gpu.sysconfig.get_config_var("EXT_SUFFIX")
    package, built = tmp_path / "root" / "layca_fast", tmp_path / "build" / "modules"
    for folder in (package, built):
        folder.mkdir(parents=True)
    for name in ("_cpu", "_cuda"):
        (package / (name + suffix)).write_text("old")
    (built / ("_cpu" + suffix)).write_text("new")
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "root")
    assert gpu.install_modules(tmp_path / "build") == ["_cpu" + suffix]
    assert [file.read_text() for file in package.iterdir()] == ["new"]


@pytest.mark.parametrize("verdict", ["passed", "failed"])
def test_one_file_holds_what_was_found(
    verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_all(environment: dict[str, str], folder: Path, measurements: Path) -> Sequence[Outcome]:
        measurements.write_text(json.dumps({"goals": [1], "rows": [2]}))
        return [Outcome("verify", verdict, 1.5, "said so"), Outcome("compute-sanitizer", "missing", 0.0, "not found")]

    monkeypatch.setattr(gpu, "run_all", run_all)
    out = tmp_path / "results.json"
    assert gpu.main(["--out", str(out)]) == (verdict == "failed")
    report = json.loads(out.read_text())
    assert all(report[name] for name in ("date", "gpu", "driver", "nvcc", "torch", "triton", "python", "layca_fast"))
    assert (report["goals"], report["rows"]) == ([1], [2])
    assert [part["verdict"] for part in report["parts"]] == [verdict, "missing"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "missing: compute-sanitizer" in last
    assert ("failed: verify" in last) == (verdict == "failed")


def test_the_parts_cover_what_must_be_proven() -> None:
    names = [part.name for part in gpu.proofs("")]
    for test in ("tests/test_gpu_numbers.py", "tests/test_gpu_step.py"):
        assert {f"pytest -m gpu -k '{which}' {test}" for which in ("triton", "not triton")} <= set(names)
    assert {f"verify {backend}" for backend in ("cuda", "triton", "cpu", "torch")} <= set(names)
    tools = [part for part in gpu.proofs("") if part.name.startswith("compute-sanitizer")]
    assert [(part.name.split()[1], part.missing) for part in tools] == [
        ("memcheck", "compute-sanitizer was not found"),
        ("racecheck", "compute-sanitizer was not found"),
    ]


def test_what_the_sanitizer_watches_steps(seed: int) -> None:
    gpu_small.step_all(["cpu"], CPU)


def test_results_are_named_after_the_gpu() -> None:
    assert gpu.results_file("NVIDIA H200").name == "gpu_nvidia_h200.json"
