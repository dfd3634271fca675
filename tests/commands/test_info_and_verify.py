"""``python -m layca_fast info | verify``: what they print, and that verify fails where a backend is wrong."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import layca_fast
from layca_fast import __main__, backends
from layca_fast.backends.cuda import CudaBackend
from layca_fast.backends.torch_ import TorchBackend
from layca_fast.commands import cases as all_cases
from layca_fast.commands import info, progress, verify
from layca_fast.figures import console
from layca_fast.formulas.tables import Coefficient
from layca_fast.step.batch import Batch

from ..support import BACKENDS

ALL_CASES = verify.cases


def few_cases(effort: all_cases.Effort) -> list[all_cases.Case]:
    """The shortest case of each kind, so that the table is made as for all of them."""
    cases = list(ALL_CASES(all_cases.EFFORTS[all_cases.QUICK]["interpreted"]))
    return [cases[1], cases[5], cases[-1]]


def test_verify_covers_every_backend_and_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "cases", few_cases)
    monkeypatch.setenv("COLUMNS", "200")
    assert verify.main(["--full"]) == 0
    printed = capsys.readouterr().out
    for name in BACKENDS:
        assert f"==> Backend {name} " in printed
        assert f"{name} {'in the interpreter' if name == 'triton' else 'on cpu'}: largest" in printed
    assert f"{3 * len(BACKENDS)} of {3 * len(BACKENDS)} cases passed" in printed
    assert "not run: cuda (" in printed


@pytest.mark.parametrize(
    ("argv", "interprets"),
    [
        ([], False),
        (["--quick"], False),
        (["--full"], True),
        (["--backend", "triton"], True),
        (["--device", "cpu"], False),
    ],
)
def test_the_interpreter_runs_only_where_it_is_asked_for(
    argv: list[str], interprets: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: set[str] = set()
    monkeypatch.setattr(verify, "compare", lambda case, name, *more: ran.add(name) or verify.Errors())
    monkeypatch.setattr(verify, "interpreting", lambda: True)
    monkeypatch.setattr(all_cases, "interpreting", lambda: True)
    assert verify.main(argv) == 0
    assert ("triton" in ran) == interprets
    assert ("not run: triton (" in capsys.readouterr().out) != interprets


def test_longer_checks_run_the_same_cases_for_more_steps() -> None:
    for place in ("here", "interpreted"):
        quick, default, full = (list(ALL_CASES(all_cases.EFFORTS[how][place])) for how in all_cases.EFFORTS)
        assert len(quick) == len(default) == len(full)
        assert (
            sum(case.steps for case in quick) < sum(case.steps for case in default) < sum(case.steps for case in full)
        )


def test_progress_prints_a_line_every_few_seconds_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([0.0, 1.0, 5.5, 6.0, 7.0, 8.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(moments))
    with progress.progress(["one", "two"], 3, "epochs") as advance:
        advance(0, by=0)
        for note in ("a", "b", "c"):
            advance(0, note)
        advance(1, by=0)
        advance(1, "d")
    printed = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in printed] == [
        "one: 0 of 3 epochs",
        "one: 2 of 3 epochs, b",
        "one: 3 of 3 epochs, c",
        "two: 0 of 3 epochs",
    ]


@pytest.mark.parametrize("column", [Coefficient.A, Coefficient.B])
def test_verify_fails_where_a_backend_is_wrong(
    column: Coefficient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part in 100,000 too long (A) or too far (B)."""
    right = TorchBackend.coefficients

    def wrong(self: TorchBackend, batch: Batch) -> None:
        right(self, batch)
        batch.coefficients[:, column] *= 1 + 1e-5

    monkeypatch.setattr(TorchBackend, "coefficients", wrong)
    monkeypatch.setattr(verify, "cases", few_cases)
    monkeypatch.setenv("COLUMNS", "200")
    assert verify.main(["--backend", "torch"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_verify_keeps_to_the_device_that_it_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch backend, which also takes GPUs, gets fewer tensors there."""
    ran: list[tuple[str, str, int]] = []

    def compare(case: all_cases.Case, backend: str, device: torch.device, seed: int) -> verify.Errors:
        ran.append((backend, device.type, len(case.shapes)))
        return verify.Errors()

    pairs = [("torch", "cpu"), ("torch", "cuda"), ("cpu", "cpu"), ("cuda", "cuda")]
    monkeypatch.setattr(verify, "places", lambda: [(name, torch.device(device)) for name, device in pairs])
    monkeypatch.setattr(verify, "compare", compare)
    assert verify.main(["--full", "--device", "cuda"]) == 0
    assert {device for _, device, _ in ran} == {"cuda"}
    most = {backend: max(tensors for name, _, tensors in ran if name == backend) for backend in ("torch", "cuda")}
    assert most == {"torch": 300, "cuda": 1000}
    ran.clear()
    assert verify.main(["--full", "--device", "cpu", "--backend", "torch"]) == 0
    assert {(backend, device) for backend, device, _ in ran} == {("torch", "cpu")}
    assert max(tensors for _, _, tensors in ran) == 1000
    ran.clear()
    assert verify.main([]) == 0
    assert {(backend, device) for backend, device, _ in ran} == set(pairs)
    assert verify.main(["--device", "cuda", "--backend", "cpu"]) == 1
    assert "no backend that was asked for" in capsys.readouterr().out.replace("\n", " ")


def test_errors_that_are_nan_fail() -> None:
    errors = verify.Errors()
    errors.add("angle", float("nan"), 1.0)
    errors.add("angle", 0.5, 1.0)
    assert not errors.passed


def test_verify_names_the_reason_of_a_backend_that_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        verify.main(["--backend", "cuda"])
    assert backends()["cuda"].reason in capsys.readouterr().err.replace("\n", "")


def test_the_angle_is_measured_exactly() -> None:
    for angle in (1e-9, 1e-4, 1.0, 3.0):
        before = torch.tensor([2.0, 0.0], dtype=torch.float64)
        after = 5 * torch.tensor([angle, 0.0], dtype=torch.float64).cos().sub(torch.tensor([0.0, 1.0]))
        after[1] = 5 * torch.tensor(angle, dtype=torch.float64).sin()
        assert verify.angle_between(before, after) == pytest.approx(angle, rel=1e-12)


def test_a_module_newer_than_the_driver_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "CUDA driver version is insufficient for CUDA runtime version"
    backend = CudaBackend()
    monkeypatch.setattr(backend._views, "native", SimpleNamespace(device_problem=lambda: said))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = str(backend.missing())
    assert reason.startswith(f"no device: {said} (the module was built with a newer CUDA")
    assert "update the driver" in reason
    monkeypatch.setattr(backend._views, "native", SimpleNamespace(device_problem=lambda: "the driver lists none"))
    assert backend.missing() == "no device: the driver lists none"


def test_info_lists_versions_and_reasons(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    for expected in (torch.__version__, *backends(), *(status.reason for status in backends().values())):
        assert expected in printed


def test_info_as_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["torch"] == torch.__version__
    assert said["layca_fast"] == layca_fast.__version__
    found = {name: (status.available, status.reason) for name, status in backends().items()}
    assert {name: (each["available"], each["reason"]) for name, each in said["backends"].items()} == found


def test_tables_without_rich_are_plain_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    console.print_table("Title", ["name", "x"], [["long name", "1"], ["b", "22"]])
    assert capsys.readouterr().out == "Title\nname       x\nlong name  1\nb          22\n"


@pytest.mark.parametrize("argv", [[], ["prove"]])
def test_unknown_commands_show_the_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(argv) == 2
    assert "info,verify,demo" in capsys.readouterr().err


def test_help_says_what_every_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("info", "verify", "demo", "plot"):
        assert any(line.startswith(f"{name} ") and len(line.split()) > 4 for line in lines), name


@pytest.mark.parametrize("argv", [["--help"], ["info", "--help"], ["verify", "-h"], ["demo", "--help"], ["plot", "-h"]])
def test_every_command_explains_itself(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = __main__.main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 0
    assert "usage: python -m layca_fast" in capsys.readouterr().out


def test_info_refuses_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        info.main(["cuda"])
    assert "cuda" in capsys.readouterr().err


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "layca_fast", "info"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "layca_fast" in done.stdout
