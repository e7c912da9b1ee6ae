"""What the scripts share: a user's mistake becomes one line on stderr and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can cause ends it with one sentence instead of a traceback.

    `FLASHDIT_TRACEBACK=1` shows the traceback, for those who look for a bug of ours.
    """
    try:
        main()
    except (ValueError, OSError, OmegaConfBaseException) as error:
        if os.environ.get("FLASHDIT_TRACEBACK"):
            raise
        sentence = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2)
