"""Iwin attention and what the Iwin Transformer paper (arXiv 2507.18405) builds on it."""

from iwin_core.attention import IwinAttention
from iwin_core.backbone.backbone import IwinTransformer
from iwin_core.backbone.config import IwinConfig
from iwin_core.backbone.features import IwinFeatures
from iwin_core.backbone.timm_import import register_with_timm
from iwin_core.backbone.weights import load_official_checkpoint
from iwin_core.block import IwinBlock
from iwin_core.windows import merge, partition, rearrange, restore

__all__ = [
    "IwinAttention",
    "IwinBlock",
    "IwinConfig",
    "IwinFeatures",
    "IwinTransformer",
    "load_official_checkpoint",
    "merge",
    "partition",
    "rearrange",
    "restore",
]

register_with_timm()
