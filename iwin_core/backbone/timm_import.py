"""When are the timm entry points registered? As soon as timm is imported, before this package or after it.

Importing timm takes longer than all of this package with torch, and FlashDiT, which imports this package,
never needs it. So it waits for whoever wants timm to import it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS = "iwin_core.backbone.timm_models"


class TimmFinder(MetaPathFinder):
    """Finds timm as the other finders do; whoever then executes it registers the entry points with it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns timm's own spec, its loader followed by ours; None for every other name."""
        if fullname != "timm":
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, TimmFinder)]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(MODELS)

        spec.loader.exec_module = execute_and_register
        return spec


def register_with_timm() -> None:
    """Registers the entry points now if timm is there, else when it comes."""
    if sys.modules.get("timm"):
        importlib.import_module(MODELS)
    else:
        sys.meta_path.insert(0, TimmFinder())
