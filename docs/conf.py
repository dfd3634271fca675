"""Sphinx's configuration: ``make docs`` builds the pages of this folder, as they stand, into the site.

The source is the whole repository, so that links between pages mean the same in the site as where the repository is
read. docs/README.md is the first page, and the order in which it lists the others is the site's menu.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Not at run time: tests read this file where there is no Sphinx.
    from sphinx.application import Sphinx

project = "layca_fast"
copyright = "layca_fast developers, BSD-3-Clause"
html_title = project

extensions = ["myst_parser"]
root_doc = "docs/README"
include_patterns = ["docs/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "site"]  # not looked into

myst_heading_anchors = 4
myst_links_external_new_tab = False
smartquotes = False  # they would change what stands in code-like text
nitpicky = True
highlight_language = "none"

html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "github-dark"

FIRST_PAGE = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/README.html"><title>layca_fast</title>\n'


def menu(index: str) -> str:
    """Directives that make Sphinx's menu of a page with sections of linked pages; they show nothing in the page."""
    parts = []
    for section in re.split(r"^## ", index, flags=re.M)[1:]:
        entries = re.findall(r"^- \[([^\]]+)\]\((\S+)\.md\)", section, re.M)
        lines = "\n".join(f"{title} <{page}>" for title, page in entries)
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {section.splitlines()[0]}\n\n{lines}\n```\n")
    return "\n".join(parts)


def add_menu(app: "Sphinx", name: str, source: list[str]) -> None:
    """To the first page. The README is the only page that no menu lists."""
    if name == root_doc:
        source[0] += "\n" + menu(source[0])
    elif name == "README":
        source[0] = "---\norphan: true\n---\n" + source[0]


def add_first_page(app: "Sphinx", error: Exception | None) -> None:
    """site/index.html leads to the first page."""
    if error is None:
        (Path(app.outdir) / "index.html").write_text(FIRST_PAGE, encoding="utf-8")


def setup(app: "Sphinx") -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", add_menu)
    app.connect("build-finished", add_first_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
