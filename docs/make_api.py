"""Writes docs/api.md from the docstrings: ``python docs/make_api.py``. A test fails where it was forgotten.

Signatures are taken from the source, so that they read as they are written there and in every version of Python alike.
"""

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import layca_fast
from layca_fast import diagnostics
from layca_fast.monitor import writers

TARGET = Path(__file__).with_name("api.md")

HEAD = """# API reference

This page lets you look up every public class and function. It is made from the docstrings by `python docs/make_api.py`,
so do not edit it here.
"""

#: By the path that users import them from.
MODULES = {"layca_fast": layca_fast, "layca_fast.writers": writers, "layca_fast.diagnostics": diagnostics}

#: Read, not imported: each needs a package that the documentation does not.
READ = ("layca_fast.callbacks.huggingface", "layca_fast.callbacks.lightning")

#: Sections of a docstring whose lines are entries "name: text".
ENTRIES = ("Args", "Raises")

#: Printed as they are, though they have no public method or docstring of their own.
LEFT_OUT = ("__version__",)


def render() -> str:
    """The whole of docs/api.md."""
    names = [*MODULES, *READ]
    parts = [HEAD, *(f"- [`{name}`](#{name.replace('.', '')})" for name in names)]
    for name, module in MODULES.items():
        parts += [f"\n## {name}\n", f"{_markdown(inspect.getdoc(module) or '')}"]
        for each in _public(module):
            parts += ["", *_entry(each, getattr(module, each))]
    for name in READ:
        parts += [f"\n## {name}\n", *_read(name)]
    return "\n".join(parts) + "\n"


def _public(module: ModuleType) -> list[str]:
    """What the module says, or the classes and functions that it defines."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", [name for name in defined if not name.startswith("_")])
    return [name for name in names if name not in LEFT_OUT]


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield f"### {name}\n"
    if inspect.isclass(thing):
        yield f"```text\n{_class_signature(name, _constructed(thing))}\n```\n"
        yield _markdown(inspect.getdoc(thing) or "")
        for method in _methods(thing):
            function = inspect.getattr_static(thing, method)
            inner = function.fget if isinstance(function, property) else function
            signature = f".{method}" if isinstance(function, property) else _signature(f".{method}", _definition(inner))
            yield f"\n#### {name}.{method}\n\n```text\n{signature}\n```\n"
            yield _markdown(inspect.getdoc(inner) or "")
    else:
        yield f"```text\n{_signature(name, _definition(thing))}\n```\n"
        yield _markdown(inspect.getdoc(thing) or "")


def _read(module: str) -> Iterator[str]:
    """The docstring of a module that is not imported, and its public classes with their properties."""
    path = Path(layca_fast.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield _markdown(ast.get_docstring(tree) or "")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield f"\n### {node.name}\n\n```text\n{_class_signature(node.name, node)}\n```\n"
            yield _markdown(ast.get_docstring(node) or "")
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and not each.name.startswith("_") and ast.get_docstring(each):
                    yield f"\n#### {node.name}.{each.name}\n\n```text\n.{each.name}\n```\n"
                    yield _markdown(ast.get_docstring(each) or "")


def _definition(thing: Any) -> Any:
    """The class or function as a syntax tree."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]


def _constructed(thing: type) -> Any:
    """The class, or the one of this package that it inherits its constructor from, as a syntax tree."""
    ours = [cls for cls in thing.__mro__ if cls.__module__.partition(".")[0] == "layca_fast"]
    return _definition(next((cls for cls in ours if "__init__" in vars(cls)), thing))


def _methods(thing: type) -> list[str]:
    """Public methods and properties with a docstring, of the class and of its own bases in this package."""
    found: dict[str, None] = {}
    for cls in thing.__mro__:
        if cls.__module__.partition(".")[0] == "layca_fast":
            for name, value in vars(cls).items():
                inner = value.fget if isinstance(value, property) else value
                if not name.startswith("_") and inspect.isfunction(inner) and inspect.getdoc(inner):
                    found.setdefault(name)
    return list(found)


def _class_signature(name: str, definition: ast.ClassDef) -> str:
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return _signature(name, node)
    fields = [ast.unparse(node) for node in definition.body if isinstance(node, ast.AnnAssign)]
    return _call(name, fields, "")


def _signature(name: str, function: ast.FunctionDef) -> str:
    arguments = function.args
    bound = [each for each in arguments.args if each.arg not in ("self", "cls")]
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_argument(each, value) for each, value in zip(bound, defaults[len(defaults) - len(bound) :], strict=True)]
    if arguments.vararg:
        shown.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [_argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        shown.append(f"**{ast.unparse(arguments.kwarg)}")
    is_constructor = function.name == "__init__" or function.returns is None
    return _call(name, shown, "" if is_constructor else f" -> {ast.unparse(function.returns)}")


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation else f"{text}={ast.unparse(default)}"


def _call(name: str, arguments: list[str], result: str) -> str:
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {each}," for each in arguments), f"){result}"])


def _markdown(docstring: str) -> str:
    """Sections become bold words, entries bullets, and roles such as :func:`x` code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring.replace("``", "`"))
    text = re.sub(r"^::\n\n", "", text, flags=re.M)
    lines, section = [], ""
    for line in text.splitlines():
        heading = re.fullmatch(r"(Args|Raises|Returns):(.*)", line)
        if heading:
            section = heading[1]
            lines += [f"**{section}:**{heading[2]}", ""] if heading[2] else [f"**{section}:**", ""]
        elif line and not line.startswith(" "):
            section = ""
            lines.append(line)
        else:
            lines.append(_in_section(line, section))
    return "\n".join(lines).strip()


def _in_section(line: str, section: str) -> str:
    inner = line[4:] if section else line
    entry = re.match(r"(\w[\w, *]*): (.*)", inner) if section in ENTRIES else None
    if entry:
        return f"- `{entry[1]}`: {entry[2]}"
    return f"  {inner.strip()}" if section in ENTRIES and inner.strip() else inner


if __name__ == "__main__":
    argparse.ArgumentParser(description="Writes docs/api.md from the docstrings.").parse_args()
    TARGET.write_text(render(), encoding="utf-8")
    print(f"written: {TARGET}")
