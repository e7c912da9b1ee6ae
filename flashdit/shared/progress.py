"""Progress bars: many updates a second in a terminal, few lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL_S = 30.0


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Returns a tqdm bar; where stderr is no terminal it writes a line at most every half a minute.

    Args:
        iterable: What is counted; None where the caller does.
        **options: Of tqdm.
    """
    if not sys.stderr.isatty():
        options = {"mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S} | options
    return tqdm(iterable, **options)
