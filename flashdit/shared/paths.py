"""Paths as users write them: `~` and environment variables become what they stand for."""

from __future__ import annotations

import os
import re

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expanded(text: str) -> str:
    """Returns a path with the home folder for `~` at its beginning, and the values of `$NAME` and `${NAME}`.

    Raises:
        ValueError: If a variable is not set; names it.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} must be set for {text}")
        return os.environ[name]

    return os.path.expanduser(VARIABLE.sub(value, text))
