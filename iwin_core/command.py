"""How a command of iwin_core ends when its user made a mistake: one line on stderr, exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run_command(main: Callable[[], None], name: str) -> None:
    """Runs `main`; what a user can cause ends it with one sentence instead of a traceback.

    Args:
        main: The command.
        name: What the line begins with, as in `iwin_core.reach`.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
