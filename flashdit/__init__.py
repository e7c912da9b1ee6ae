"""FlashDiT: class-conditional latent diffusion with Iwin attention, trained by flow matching."""

from flashdit.models.dit import FlashDiT

__all__ = ["FlashDiT"]
