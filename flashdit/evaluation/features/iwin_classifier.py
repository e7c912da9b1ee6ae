"""A small Iwin Transformer as the feature network of data for which Inception has nothing to say."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from safetensors.torch import load_file
from torch import Tensor, nn

from flashdit.evaluation.features.extractor import SPATIAL_CHANNELS, Extractor
from flashdit.shared.files import file_sha256
from iwin_core import IwinConfig, IwinTransformer


class IwinClassifier(nn.Module):
    """uint8 NCHW images → {pool (b, d), spatial (b, h·w·7), logits (b, num_classes)}.

    The pool features are the mean of the normed last map; the spatial ones the first seven channels of the
    map that enters the last stage, flattened as ADM flattens Inception's: rows, columns, channels.

    Args:
        config: Of the network; images of another size than its `img_size` are resized to it first.
        dropout: Share of pool features dropped in training, so that no few of them carry a class alone.
    """

    def __init__(self, config: IwinConfig, dropout: float = 0.2):
        super().__init__()
        self.backbone = IwinTransformer(config)
        self.dropout = nn.Dropout(dropout)
        side = config.img_size
        self.size = (side, side) if isinstance(side, int) else tuple(side)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the three features."""
        entering, normed = self.last_maps(images)
        pool = reduce(normed, "b h w c -> b c", "mean")
        return {
            "pool": pool,
            "spatial": rearrange(entering[..., :SPATIAL_CHANNELS], "b h w c -> b (h w c)"),
            "logits": self.backbone.head(self.dropout(pool)),
        }

    def last_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the map (b, h, w, c) that enters the last stage, and the normed one that leaves it."""
        pixels = images.float() / 127.5 - 1
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(
                pixels, size=self.size, mode="bilinear", align_corners=False, antialias=True
            )
        *lower, last = self.backbone.stages()
        x = self.backbone.patch_embed(pixels)  # (b, h, w, c)
        for stage in lower:
            assert stage.downsample is not None
            x = stage.downsample(stage(x))
        return x, self.backbone.norm(last(x))


def load_classifier(config: IwinConfig, weights: Path) -> IwinClassifier:
    """Returns a classifier with the weights of a file, in eval mode and without gradients."""
    classifier = IwinClassifier(config)
    classifier.load_state_dict(load_file(weights))
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy_of(classifier: IwinClassifier, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images (n, 3, h, w) whose largest logit is their label's."""
    return (classifier(images)["logits"].argmax(1) == labels).float().mean().item()


class IwinClassifierExtractor(Extractor):
    """A committed classifier of a data set: its features, and logits over the data's own classes.

    Args:
        config: Of its network.
        weights: Its file.
    """

    def __init__(self, config: IwinConfig, weights: Path):
        super().__init__()
        self.network = load_classifier(config, weights)
        self.weights_sha256 = file_sha256(weights)
        height, width = self.network.size
        self.resize = f"bilinear, antialiased, to {width}×{height}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Returns the features."""
        return dict(self.network(images))

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the normed last map, whose mean the pooled features are."""
        return self.network.last_maps(images)[1]
