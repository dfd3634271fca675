"""What ``make gpu`` is made of, on the CPU: its parts, its tables on tiny models, its goals and its file of results."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

import layca_fast
from bench import gpu, gpu_small, gpu_tables
from bench.gpu_tables import LARGE, TABLES, goals, outcomes
from bench.measure import measure
from bench.parts import Deadline, Outcome
from bench.plan import free_memory
from bench.providers import Provider, providers, yardstick
from bench.rows import Row
from bench.runner import COPY, host_seconds_of, seconds_of
from bench.shapes import MODELS

CPU = torch.device("cpu")
TINY = [(30, 40), (40,), (8, 3, 3, 3)]


def eager(base: str, device: torch.device) -> list[Provider]:
    return [each for each in providers(base, device) if "compile" not in each.name]


@pytest.mark.exhaustive
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
            times = {"median_ms": median, "ratio_median": median, "copy_fraction": 0.9 / median}
            row = replace(template, base=base, model=model, provider=name, **times)
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


def test_wheels_are_used_without_pip(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "brought_along-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along/__init__.py", "VALUE = 'here'")
        wheel.writestr("brought_along-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought-along\nVersion: 1\n")
    site = tmp_path / "site"
    assert gpu.unpack_wheels(tmp_path, site) == ["brought_along-1-py3-none-any.whl"]
    program = "import brought_along, importlib.metadata as m; print(brought_along.VALUE, m.version('brought_along'))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
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
    def run_all(*args: Any) -> Sequence[Outcome]:
        _, _, measurements, deadline = args
        assert 0 < deadline.left() <= 8 * 60
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


def test_results_are_written_even_if_facts_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setattr(gpu, "run_all", lambda *args: [Outcome("verify", "passed", 1.5, "said so")])
    monkeypatch.setattr(gpu, "_gpu", broken)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert gpu.main([]) == 0
    (out,) = (tmp_path / "bench" / "results").iterdir()
    report = json.loads(out.read_text())
    assert "the GPU fell off the bus" in report["gpu"]
    assert report["torch"] == torch.__version__
    assert report["parts"][0]["output"] == "said so"


def test_programs_are_looked_for_on_the_path_of_the_parts(tmp_path: Path) -> None:
    for name, says in {"nvcc": "echo one; echo release 13.0", "nvidia-smi": "true", "git": "exit 3"}.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{says}\n")
        program.chmod(0o755)
    found = gpu.facts(str(tmp_path))
    assert (found["nvcc"], found["driver"], found["commit"]) == ("release 13.0", "not found", "not found")
    assert gpu.facts("")["nvcc"] == "not found"


@pytest.mark.exhaustive
def test_the_parts_cover_what_must_be_proven() -> None:
    """Every file with a test for a GPU; under the sanitizer first; what needs the memory for itself apart."""
    parts = gpu.proofs("")
    names = [part.name for part in parts]
    marked = {str(file.relative_to(gpu.ROOT)) for file in (gpu.ROOT / "tests").rglob("test_*.py") if on_gpu(file)}
    assert gpu.LARGE_TESTS in marked
    assert len(marked) >= 4
    assert {name.split()[-1] for name in names if name.startswith("pytest")} == marked - {gpu.LARGE_TESTS}
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-k", "triton", *sorted(marked)]
    found = subprocess.run(collect, cwd=gpu.ROOT, capture_output=True, text=True, check=True).stdout
    for test in marked - {gpu.LARGE_TESTS}:
        assert f"pytest -m gpu -k 'not triton' {test}" in names
        assert (f"pytest -m gpu -k 'triton' {test}" in names) == (f"{test}::" in found)
    devices = {part.command[-3]: part.command[-1] for part in parts if part.name.startswith("verify")}
    assert devices == {"cuda": "cuda", "triton": "cuda", "torch": "cuda", "cpu": "cpu"}
    assert [(part.name, part.missing) for part in parts[:3]] == [
        (f"compute-sanitizer {tool}", "compute-sanitizer was not found")
        for tool in ("racecheck", "memcheck", "synccheck")
    ]


def on_gpu(file: Path) -> bool:
    return bool(re.search(r"^(pytestmark = \[?\*?ON_GPU|\W*pytest\.mark\.gpu)", file.read_text(), re.MULTILINE))


def test_time_is_kept_for_what_runs_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[tuple[str, float]] = []

    def run_parts(parts: Any, environment: Any, logs: Path, left: Any, at_once: int = 1) -> list[Outcome]:
        for part in parts:
            part.log(logs).touch()
            allowed.append((part.name, left()))
        return []

    monkeypatch.setattr(gpu, "run_parts", run_parts)
    monkeypatch.setattr(gpu, "install_modules", lambda folder: [])
    gpu.run_all({"PATH": ""}, tmp_path, tmp_path / "none.json", Deadline(400))
    *before, large, benches = allowed
    assert {name for name, _ in before} >= {"configure", "verify cuda", "compute-sanitizer memcheck"}
    assert {round(left) for _, left in before} == {400 - 45 - 150}
    assert (large[0], round(large[1])) == (f"pytest -m gpu {gpu.LARGE_TESTS}", 400 - 150)
    assert (benches[0], round(benches[1])) == ("benches", 400)


def test_memory_is_given_back_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append("mem_get_info"), (5, 9))[1])
    assert free_memory(torch.device("cuda")) == 5
    assert calls == ["empty_cache", "mem_get_info"]


def test_versions_of_packages_that_were_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the code runs from its folder: what is installed has metadata, what lies on the path has none."""

    def hidden(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("bench.providers.version", hidden)
    ran = [each for each in eager("momentum", CPU) if not each.skipped]
    versions = {each.package: each.package_version for each in ran}
    assert versions["layca_fast"] == f"layca_fast {layca_fast.__version__}"
    assert versions["torch"] == f"torch {torch.__version__}"
    monkeypatch.delitem(sys.modules, "optimi", raising=False)
    assert replace(ran[0], package="torch-optimi").package_version == "torch-optimi of unknown version"


def test_what_the_sanitizer_watches_steps(seed: int) -> None:
    gpu_small.step_all(["cpu"], CPU)


def test_results_are_named_after_the_gpu() -> None:
    assert gpu.results_file("NVIDIA H200").name == "gpu_nvidia_h200.json"
