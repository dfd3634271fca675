"""README.md and docs/: every code block runs or is understood, figures have their commands, links lead somewhere.

``make docs`` checks what only the built site can show.
"""

import contextlib
import csv
import importlib.util
import io
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from torch import distributed

from .support import PAGES, ROOT, anchors, blocks, check_command, commands, figures, prose


@pytest.fixture
def own_processes() -> Iterator[None]:
    """A page that fails between init_process_group and its end must not leave a group to other tests."""
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

#: Python blocks that no test runs: how many for each reason. A new one has to be put here, too.
NOT_RUN: dict[str, int] = {}

#: Pages whose blocks need the trainers' packages, with the number of their blocks: make test-trainers runs them, by
#: tests/trainers/test_recipes.py, and CI runs that.
RUN_BY_TRAINERS = {"trainers.md": 8}

#: Blocks that run only in part without a GPU.
NEED_A_GPU = {"cuda_graphs.md": 1}

PRINTED = "printed"

#: Pages whose blocks of text are compared with the code in other ways: below, by test_faq.py, and, with the packages
#: that it needs, by tests/trainers/test_plans.py.
TEXT_COMPARED = ("api.md", "faq.md", "plans.md")

README, INDEX = PAGES[0], ROOT / "docs" / "README.md"

#: Pages of the site that lie beside docs/; their links are followed, too.
BESIDE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

#: By what a person wants.
SECTIONS = ["Try", "Adopt", "Scale", "Understand", "Contribute"]


def script(path: Path) -> ModuleType:
    """A Python file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pages
def test_python_blocks_run_in_order(
    page: Path, seed: int, one_thread: None, own_processes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one namespace per page and an empty folder; what they print is what the page shows."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    output = ""
    for block in blocks(page):
        if block.language == "python" and page.name not in RUN_BY_TRAINERS and not block.note.startswith("not run"):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block.text, block.place, "exec"), namespace)
            output = printed.getvalue()
        elif block.note == PRINTED:
            assert block.text == output, block.place


@pages
def test_shell_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page):
        if block.language == "bash":
            for words in commands(block):
                with monkeypatch.context() as context:
                    check_command(words, context)


@pages
def test_commands_in_the_text_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in sorted(set(re.findall(r"`((?:python|make|pip|torchrun) [^`]+)`", prose(page).replace("\n", " ")))):
        with monkeypatch.context() as context:
            check_command(shlex.split(command), context)


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    """So no block is passed over because of its language, its fence or a misspelt note."""
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page)), page.name
        for block in blocks(page):
            assert block.language in ("python", "bash", "text"), block.place
            assert block.note in ("", PRINTED) or re.fullmatch("not run: .+", block.note), block.place
            assert block.language != "text" or block.note == PRINTED or page.name in TEXT_COMPARED, block.place
        assert not re.search(r"^ *(?:~~~|(?:    |\t)(?:import|from|python|pip|make) )", prose(page), re.M), page.name


def test_blocks_that_no_test_runs_are_counted() -> None:
    every = [(page.name, block) for page in PAGES for block in blocks(page)]
    notes = Counter(block.note for _, block in every if block.note.startswith("not run"))
    assert notes == {f"not run: {reason}": count for reason, count in NOT_RUN.items()}
    ours = [(name, block) for name, block in every if name not in RUN_BY_TRAINERS]
    assert Counter(name for name, block in ours if "cuda.is_available()" in block.text) == NEED_A_GPU
    theirs = Counter(name for name, block in every if name in RUN_BY_TRAINERS and block.language == "python")
    assert theirs == RUN_BY_TRAINERS
    assert re.search(r"^make .*\btest-all$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    assert re.search(r"^test-all: .*\btest-trainers\b", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


@pages
def test_figures_are_there_and_made_by_the_command_under_them(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, paragraph in figures(page):
        assert (page.parent / path).is_file(), path
        found = [command.split() for command in re.findall(r"`((?:python|make) [^`]+)`", paragraph)]
        assert found, f"{path}: no command under it"
        for words in found:
            with monkeypatch.context() as context:
                check_command(words, context)


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To a file: of a folder, the site has no page."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_index_leads_to_every_page_and_the_menu_of_the_site_has_what_it_lists() -> None:
    """In one place each, in sections by what a person wants."""
    index = INDEX.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", index, re.M) == SECTIONS
    listed = re.findall(r"^- \[[^\]]+\]\((\S+)\):", index, re.M)
    pages = [page.name for page in PAGES if page not in (README, INDEX)]
    assert sorted(listed) == sorted([*pages, *(f"../{page.name}" for page in BESIDE)])
    menu = script(ROOT / "docs" / "conf.py").menu(index)
    assert [f"{page}.md" for page in re.findall(r"^.+ <(.+)>$", menu, re.M)] == listed
    assert re.findall(r"^:caption: (.+)$", menu, re.M) == SECTIONS
    assert "(docs/README.md)" in README.read_text(encoding="utf-8")


@pages
def test_pages_open_with_what_they_are_for(page: Path) -> None:
    """One title, and sentences under it, before any code, list, table, figure or further heading."""
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# .+\n\n[\w`\[][^\n]*[ .:,]", text), text[:200]
    assert len(re.findall(r"^# ", prose(page), re.M)) == 1


def test_the_readme_is_one_page_with_the_commands_of_a_newcomer() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
    shell = [words[:3] for block in blocks(README) if block.language == "bash" for words in commands(block)]
    assert shell[:3] == [["make", "demo"], ["make", "test"], ["pip", "install", "."]]


def test_the_readme_gives_the_speeds_that_were_measured() -> None:
    """Its four ratios are the file's, to the digits given."""
    with (ROOT / "bench" / "results" / "ratios.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] == "FusedLayca cpu"]
    measured = {(row["base"], row["model"]): f"{float(row['ratio_median']):.2f}" for row in rows}
    text = README.read_text(encoding="utf-8")
    (head,) = re.findall(r"^\| \| (ResNet-50 .*) \|$", text, re.M)
    told = {
        (base, model): ratio
        for base, cells in re.findall(r"^\| with (\w+)[^|]*\| (.*) \|$", text, re.M)
        for model, ratio in zip(head.split(" | "), cells.split(" | "), strict=True)
    }
    assert len(told) == 4
    assert told.items() <= measured.items()


def test_the_api_reference_is_up_to_date() -> None:
    """python docs/make_api.py writes it."""
    path = ROOT / "docs" / "make_api.py"
    assert path.with_name("api.md").read_text(encoding="utf-8") == script(path).render()
