"""The fenced blocks of a page, and its commands run in this process: for tests of the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

import flashdit.__main__
import iwin_tasks.__main__

FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRIES = {"flashdit": flashdit.__main__, "iwin": iwin_tasks.__main__}


def fenced(text: str, language: str) -> list[str]:
    """Returns the fenced blocks of a language."""
    return [block for name, block in FENCE.findall(text) if name == language]


def run_command(line: str, short: Mapping[str, Sequence[str]]) -> None:
    """Runs a command of a page with less work.

    Args:
        line: The command, perhaps with a comment.
        short: Words to add, by how the command begins.
    """
    words = shlex.split(line, comments=True)
    more = next((more for start, more in short.items() if line.startswith(start)), ())
    ENTRIES[words[0]].main([*words[1:], *more])
