"""Which parts of the documentation are read from the code? Two directives: `config-keys` and `command-help`."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any, cast

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.application import Sphinx

COLUMNS = "100"


def object_at(path: str) -> Any:
    """Returns the object of a `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def help_of(command: str) -> str:
    """Returns what `flashdit X --help` or `iwin X --help` prints."""
    package, name, *words = command.split()
    module = {"eval": "evaluate"}.get(name, name)
    if name in ("export", "list"):
        return "pending"
    main = import_module(f"{ {'flashdit': 'flashdit', 'iwin': 'iwin_tasks'}[package]}.commands.{module}").main
    printed = io.StringIO()
    before = sys.argv, dict(os.environ)
    sys.argv = [package, *words]
    os.environ |= {"COLUMNS": COLUMNS, "NO_COLOR": "1"}
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
    return printed.getvalue()


class CommandHelp(Directive):
    """`{command-help} flashdit train`: the command's help text."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Returns the help as a literal block."""
        text = help_of(self.arguments[0])
        if not text:
            raise self.error(f"`{self.arguments[0]} --help` must print something")
        return [nodes.literal_block(text, text, language="text")]


def keys_of(options: Any, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields key, type, default and meaning of a dataclass's fields, nested ones by dotted keys."""
    meanings = docstrings(options)
    for field in fields(options):
        factory = field.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield from keys_of(factory, f"{prefix}{field.name}.")
            continue
        default = factory() if factory is not MISSING else field.default
        shown = "required" if default is MISSING else repr(default)
        yield f"{prefix}{field.name}", str(field.type), shown, meanings.get(field.name, "")


def docstrings(options: type) -> dict[str, str]:
    """Returns the text under each field of a dataclass."""
    body = cast(ast.ClassDef, ast.parse(inspect.cleandoc(inspect.getsource(options))).body[0]).body
    found = {}
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def arguments_of(function: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields key, type, default and meaning of a function's arguments, from its class's Google docstring."""
    meanings = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", inspect.cleandoc(function.__doc__), re.M))
    for name, parameter in inspect.signature(function).parameters.items():
        meaning = " ".join(meanings.get(name, "").split())
        yield f"{prefix}{name}", str(parameter.annotation), repr(parameter.default), meaning


class ConfigKeys(Directive):
    """`{config-keys} package.module:Name`: a table of a dataclass's keys or of a class's arguments."""

    required_arguments = 1
    option_spec = {"prefix": directives.unchanged}  # noqa: RUF012 - docutils' protocol

    def run(self) -> list[nodes.Node]:
        """Returns the table."""
        described, prefix = object_at(self.arguments[0]), self.options.get("prefix", "")
        rows = list((keys_of if is_dataclass(described) else arguments_of)(described, prefix))
        return [table(("key", "type", "default", "meaning"), rows)]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> nodes.table:
    """Returns a table whose first three columns are code."""
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=width) for width in (24, 18, 16, 42)]
    head, body = nodes.thead(), nodes.tbody()
    head += row_of([nodes.paragraph(text=title) for title in header])
    for *codes, text in rows:
        body += row_of([*(code(part) for part in codes), prose(text)])
    group += [head, body]
    return nodes.table("", group, classes=["colwidths-given"])


def row_of(cells: list[nodes.paragraph]) -> nodes.row:
    """Returns a row of these cells."""
    row = nodes.row()
    row += [nodes.entry("", cell) for cell in cells]
    return row


def code(text: str) -> nodes.paragraph:
    """Returns text set as code, nothing for an empty one."""
    return nodes.paragraph("", "", *([nodes.literal(text=text)] if text else []))


def prose(text: str) -> nodes.paragraph:
    """Returns text in which `backticks` mean code."""
    paragraph = nodes.paragraph()
    for place, part in enumerate(inspect.cleandoc(text).split("`")):
        paragraph += nodes.literal(text=part) if place % 2 else nodes.Text(part)
    return paragraph


def escape(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escapes what reStructuredText would read as markup, outside of `backticks`: docstrings are plain text."""
    for place, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = (re.sub(r"([*|]|_(?!\w))", r"\\\1", part) for part in parts[::2])
        lines[place] = "`".join(parts)


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directives."""
    app.add_directive("command-help", CommandHelp)
    app.add_directive("config-keys", ConfigKeys)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon's
    return {"parallel_read_safe": False}
