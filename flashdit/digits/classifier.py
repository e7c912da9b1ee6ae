"""A small Iwin Transformer for the digits: the feature network where Inception has nothing to say."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from safetensors.torch import load_file
from torch import Tensor, nn

from flashdit.digits.images import IMAGE_SIZE
from flashdit.evaluation.features.extractor import SPATIAL_CHANNELS
from iwin_core import IwinConfig, IwinTransformer

DIGITS_WEIGHTS = Path(__file__).parent / "assets" / "classifier.safetensors"


def digits_config(num_classes: int = 10) -> IwinConfig:
    """Returns a three-stage Iwin Transformer: maps of 16×16, 8×8 and 4×4 tokens, 16 to 64 channels."""
    return IwinConfig(
        img_size=IMAGE_SIZE,
        patch_size=2,
        num_classes=num_classes,
        embed_dim=16,
        depths=(1, 1, 1),
        num_heads=(1, 2, 4),
        window_size=4,
        mlp_ratio=2.0,
    )


class DigitsClassifier(nn.Module):
    """uint8 NCHW images → {pool (b, 64), spatial (b, 4·4·7), logits (b, num_classes)}.

    The pool features are the mean of the normed last map; the spatial ones the first seven channels of the
    map that enters the last stage, flattened as ADM flattens Inception's: rows, columns, channels.

    Args:
        num_classes: Width of the logits.
        dropout: Share of pool features dropped in training, so that no few of them carry a class alone.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.2):
        super().__init__()
        self.backbone = IwinTransformer(digits_config(num_classes))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the three features; images of another size are resized to 32×32 first."""
        pixels = images.float() / 127.5 - 1
        if pixels.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        *lower, last = self.backbone.stages()
        x = self.backbone.patch_embed(pixels)  # (b, 16, 16, 16)
        for stage in lower:
            assert stage.downsample is not None
            x = stage.downsample(stage(x))
        pool = reduce(self.backbone.norm(last(x)), "b h w c -> b c", "mean")
        return {
            "pool": pool,
            "spatial": rearrange(x[..., :SPATIAL_CHANNELS], "b h w c -> b (h w c)"),  # of (b, 4, 4, 64)
            "logits": self.backbone.head(self.dropout(pool)),
        }


def load_digits_classifier() -> DigitsClassifier:
    """Returns the committed classifier, in eval mode and without gradients."""
    classifier = DigitsClassifier()
    classifier.load_state_dict(load_file(DIGITS_WEIGHTS))
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy_of(classifier: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images (n, 3, h, w) whose largest logit is their label's."""
    return (classifier(images)["logits"].argmax(1) == labels).float().mean().item()
