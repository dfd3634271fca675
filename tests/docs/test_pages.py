"""README.md and docs/: every code block runs or is understood, figures have their commands, links lead somewhere."""

import contextlib
import importlib.util
import io
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

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
RUN_BY_TRAINERS = {"trainers.md": 6}

#: Blocks that run only in part without a GPU.
NEED_A_GPU = {"README.md": 1}

PRINTED = "printed"

#: Pages whose blocks of text are compared with the code in other ways: below, and by test_faq.py.
TEXT_COMPARED = ("api.md", "faq.md")


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


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_index_and_the_index_from_the_readme() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in index
    assert "(docs/README.md)" in PAGES[0].read_text(encoding="utf-8")


def test_the_api_reference_is_up_to_date() -> None:
    """python docs/make_api.py writes it."""
    path = ROOT / "docs" / "make_api.py"
    spec = importlib.util.spec_from_file_location("make_api", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert path.with_name("api.md").read_text(encoding="utf-8") == module.render()
