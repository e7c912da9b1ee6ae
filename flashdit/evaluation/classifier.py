"""A small convolutional classifier of the digits: the feature network where Inception has nothing to say."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from safetensors.torch import load_file
from torch import Tensor, nn

IMAGE_SIZE = 32
SPATIAL_CHANNELS = 7  # as many as ADM takes of Inception
DIGITS_WEIGHTS = Path(__file__).parents[1] / "assets" / "digits_classifier.safetensors"


def conv_block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Returns convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class DigitsClassifier(nn.Module):
    """uint8 NCHW images → {pool (b, 64), spatial (b, 4·4·7), logits (b, num_classes)}.

    The pool features are the global mean of the last map after its ReLU; the spatial ones the first seven
    channels of the map before it, flattened as ADM flattens Inception's: rows, columns, channels.

    Args:
        num_classes: Width of the logits.
        dropout: Share of pool features dropped in training, so that no few of them carry a class alone.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.2):
        super().__init__()
        self.lower = nn.Sequential(conv_block(3, 24, 1), conv_block(24, 32, 2), conv_block(32, 48, 2))
        self.middle = conv_block(48, 48, 2)
        self.upper = conv_block(48, 64, 1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the three features; images of another size are resized to 32×32 first."""
        pixels = images.float() / 127.5 - 1
        if pixels.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        middle = self.middle(self.lower(pixels))  # (b, 48, 4, 4)
        pool = reduce(self.upper(middle), "b c h w -> b c", "mean")
        return {
            "pool": pool,
            "spatial": rearrange(middle[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)"),
            "logits": self.head(self.dropout(pool)),
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
