"""FlashDiT: class-conditional latent diffusion with Iwin attention, trained by flow matching."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashdit.models.dit import FlashDiT
    from flashdit.sampling.pipeline import FlashDiTPipeline

__all__ = ["FlashDiT", "FlashDiTPipeline"]
HOMES = {"FlashDiT": "flashdit.models.dit", "FlashDiTPipeline": "flashdit.sampling.pipeline"}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for, so that light commands start fast."""
    if name not in HOMES:
        raise AttributeError(f"module 'flashdit' has no attribute '{name}' (public: {', '.join(HOMES)})")
    return getattr(import_module(HOMES[name]), name)
