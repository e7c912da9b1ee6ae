"""Progress bars: many updates a second in a terminal, few lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

LOG_INTERVAL_S = 30.0
CURSOR_UP = "\x1b[A"


class _Lines(ObjectWrapper):
    """A stream on which each state of a bar is a line of its own, without codes that move a cursor."""

    last = ""

    def write(self, text: str) -> None:
        """Writes what is left of a text without such codes, unless it is the line before again."""
        line = text.replace("\r", "").replace(CURSOR_UP, "").strip()
        if line and line != self.last:
            self.wrapper_setattr("last", line)
            self._wrapped.write(f"{line}\n")


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Returns a tqdm bar; where stderr is no terminal it writes a line every half a minute, none before.

    Args:
        iterable: What is counted; None where the caller does.
        **options: Of tqdm.
    """
    if not sys.stderr.isatty():
        options = dict.fromkeys(("mininterval", "maxinterval", "delay"), LOG_INTERVAL_S) | options
        options["file"] = _Lines(sys.stderr)
    return tqdm(iterable, **options)


@contextmanager
def busy_with(bar: tqdm, what: str) -> Iterator[None]:
    """Says beside a bar in a terminal what keeps it from moving."""
    before = getattr(bar, "desc", "").removesuffix(": ")  # a hidden bar has none
    refresh = sys.stderr.isatty()
    bar.set_description(f"{before}, {what}", refresh)
    try:
        yield
    finally:
        bar.set_description(before, refresh)


def move_to(bar: tqdm, count: float) -> None:
    """Moves a bar on to a count, in whole units: at most to its end, and never back."""
    bar.update(max(0, int(min(count, bar.total)) - bar.n))
