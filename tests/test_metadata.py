"""What stands beside the code: versions, citation, workflows and templates say what the code says."""

import re
from pathlib import Path

import pytest
import yaml

from layca_fast import __version__

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    assert cited["license"] == "BSD-3-Clause"
    assert {"1806.01603", "2606.16899"} == {entry["url"].rpartition("/")[2] for entry in cited["references"]}


def test_the_changelog_has_an_entry_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", text, re.M)


def test_the_version_is_written_once() -> None:
    """The packages that are built read it from there, and their dependency on each other as well."""
    for name in ("pyproject.toml", "setup.py", "release/cuda/pyproject.toml", "release/cuda/setup.py"):
        assert __version__ not in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_call_the_makefile_only(workflow: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    steps = [
        step for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values() for step in job["steps"]
    ]
    assert steps
    for step in steps:
        words = step.get("run", "make").split()
        assert words[0] == "make", words
        assert set(words[1:]) <= set(targets), words
        # By commit, so that what runs cannot be changed under us.
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", "a@" + 40 * "0")), step


def test_a_report_of_a_fault_asks_for_info() -> None:
    assert WORKFLOWS
    assert TEMPLATES
    bug = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert "python -m layca_fast info" in bug
