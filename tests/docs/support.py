"""Code blocks, figures and links of Markdown files, and commands that are understood but not carried out."""

import argparse
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]

#: Everything that users read.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"(?:^<!-- (?P<note>[^\n]+) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, the note in the comment above it, and its text."""

    place: str
    language: str
    note: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}",
            match["language"],
            match["note"] or "",
            match["text"],
        )
        for match in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments and leading assignments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail for a command that the Makefile, the package's extras or the program's own parser does not know."""
    program, *arguments = words
    if program == "make":
        _check_make(arguments)
    elif words[:2] == ["pip", "install"]:
        _check_install(arguments[1:])
    elif program == "torchrun":
        script = next(index for index, word in enumerate(arguments) if word.endswith(".py"))
        _check_parser(["python", *arguments[script:]], monkeypatch)
    elif program == "python":
        _check_parser(words, monkeypatch)
    else:
        pytest.fail(f"a command that nobody checks: {' '.join(words)}")


def _check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    asked = [word for word in arguments if "=" not in word]
    assert asked, f"make {arguments} names no target"
    assert set(asked) <= set(targets)


def _check_install(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (section,) = re.findall(r"^\[project\.optional-dependencies\]\n(.+?)^\[", project, re.M | re.S)
    known = set(re.findall(r"^(\w+) = ", section, re.M))
    (package,) = (word for word in arguments if not word.startswith("-"))
    extras = re.fullmatch(r"(?:\.|layca_fast)(?:\[([\w,]+)\])?", package)
    assert extras, f"pip install {package}: what is that?"
    assert set((extras[1] or "").split(",")) <= known | {""}


class _Understood(BaseException):
    """The parser took the arguments. No Exception, so that no program catches it."""


def _check_parser(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        parse(self, *args, **kwargs)
        raise _Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    is_module = words[1] == "-m"
    name, arguments = (words[2], words[3:]) if is_module else (str(ROOT / words[1]), words[2:])
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if not is_module:
        # As Python does, for what lies beside the script.
        monkeypatch.syspath_prepend(str(Path(name).parent))
    monkeypatch.chdir(ROOT)
    try:
        with warnings.catch_warnings():
            # Modules that the tests have imported already run once more here.
            warnings.simplefilter("ignore", RuntimeWarning)
            (runpy.run_module if is_module else runpy.run_path)(name, run_name="__main__")
    except _Understood:
        return
    except SystemExit as end:
        # 0: a program without options ran to its end.
        if end.code:
            pytest.fail(f"{' '.join(words)}: not understood")


def figures(page: Path) -> list[tuple[str, str]]:
    """Path of every figure, and the paragraph under it, which names the command that makes it."""
    found = re.findall(r"^!\[[^\]]*\]\(([^)]+)\)\n\n(.+?)(?:\n\n|\Z)", prose(page), re.M | re.S)
    assert len(found) == prose(page).count("!["), f"{page.name}: a figure without a paragraph under it"
    return [(path, " ".join(text.split())) for path, text in found]


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
