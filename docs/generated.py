"""Which parts of the documentation are read from the code? What `config-keys` and `command-help` print."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.application import Sphinx

from flashdit.shared.settings import describe

WIDTH = "100"  # of help texts, in columns
ENTRIES = {"flashdit": "flashdit.__main__", "iwin": "iwin_tasks.__main__"}


def help_of(command: str) -> str:
    """Returns what `flashdit X --help` or `iwin X --help` prints."""
    program, *words = command.split()
    main, printed = import_module(ENTRIES[program]).main, io.StringIO()
    before = sys.argv, {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    sys.argv = [program, *words, "--help"]
    os.environ |= {"COLUMNS": WIDTH, "NO_COLOR": "1"}
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        sys.argv, values = before
        for name, value in values.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
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


class ConfigKeys(Directive):
    """`{config-keys} package.module:Name`: a table of a dataclass's keys or of a class's arguments."""

    required_arguments = 1
    option_spec = {"prefix": directives.unchanged}  # noqa: RUF012 - docutils' protocol

    def run(self) -> list[nodes.Node]:
        """Returns the table."""
        module, _, name = self.arguments[0].partition(":")
        keys = describe(getattr(import_module(module), name), self.options.get("prefix", ""))
        return [key_table([(key.name, key.type, key.default or "required", key.doc) for key in keys])]


def key_table(rows: list[tuple[str, str, str, str]]) -> nodes.table:
    """Returns a table of keys, types, defaults and meanings."""
    group = nodes.tgroup(cols=4)
    group += [nodes.colspec(colwidth=width) for width in (24, 18, 16, 42)]
    head, body = nodes.thead(), nodes.tbody()
    head += row_of([nodes.paragraph(text=title) for title in ("key", "type", "default", "meaning")])
    for *codes, meaning in rows:
        body += row_of(
            [*(nodes.paragraph("", "", nodes.literal(text=code)) for code in codes), prose(meaning)]
        )
    group += [head, body]
    return nodes.table("", group, classes=["colwidths-given"])


def row_of(cells: list[nodes.paragraph]) -> nodes.row:
    """Returns a row of these cells."""
    row = nodes.row()
    row += [nodes.entry("", cell) for cell in cells]
    return row


def prose(text: str) -> nodes.paragraph:
    """Returns text in which `backticks` mean code."""
    paragraph = nodes.paragraph()
    for place, part in enumerate(text.split("`")):
        paragraph += nodes.literal(text=part) if place % 2 else nodes.Text(part)
    return paragraph


def escape(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Escapes what reStructuredText reads as markup outside of `backticks`: docstrings are plain text."""
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
