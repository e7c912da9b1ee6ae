"""A segmenter: backbone, neck and heads; its logits, its training losses, and how authors' files fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from flashdit.shared.registry import unknown
from iwin_core.backbone.dense import make_dense_backbone
from iwin_tasks.segmentation.heads import FCNHead, FPNHead, FPNNeck, UPerHead, resized

WIDTHS = {"upernet": 512, "semantic_fpn": 256}
"""Each kind's channels; of the Semantic FPN those of its neck, of which its head has half."""
DROPOUT = 0.1
DROP_PATH_RATE = 0.3  # of an Iwin backbone in the paper's recipe
AUXILIARY_WEIGHT = 0.4
AUXILIARY = "auxiliary_head."


class Segmenter(nn.Module):
    """(B, 3, H, W) → logits (B, K, H, W) of any H × W, with labels the training losses; both float32.

    Args:
        backbone: (B, 3, H, W) → four NCHW maps, the finest first.
        decode_head: Maps → logits (B, K, h, w).
        neck: Maps → maps, before the decode head; None leaves it out.
        auxiliary_head: Maps → logits, in training alone; None leaves it out.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module,
        neck: nn.Module | None = None,
        auxiliary_head: nn.Module | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Identity() if neck is None else neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        ignore: int = 255,
        class_weights: Tensor | None = None,
    ) -> Any:
        """Returns the logits (B, K, H, W), or with labels what `losses` returns.

        Args:
            images: (B, 3, H, W), normalised.
            labels: Classes (B, H, W) int64; None gives logits.
            ignore: The label of pixels that do not count.
            class_weights: As `losses` takes them.
        """
        if labels is not None:
            return self.losses(images, labels, ignore, class_weights)
        return resized(self.decode(images).float(), images.shape[-2:])

    def maps(self, images: Tensor) -> list[Tensor]:
        """Returns the four maps that the decode head takes, NCHW."""
        return self.neck(list(self.backbone(images)))

    def decode(self, images: Tensor) -> Tensor:
        """Returns the logits (B, K, h, w) at the sides of the first map."""
        return self.decode_head(self.maps(images))

    def losses(
        self, images: Tensor, labels: Tensor, ignore: int = 255, class_weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the losses and, in percent, the shares of right pixels, by mmsegmentation's names.

        What is trained is `decode.loss_seg` plus, with an auxiliary head, `aux.loss_seg`, which is 0.4 times
        its cross-entropy; `decode.acc_seg` and `aux.acc_seg` count ignored pixels as wrong.

        Args:
            images: (B, 3, H, W), normalised.
            labels: Classes (B, H, W) int64.
            ignore: The label of pixels that do not count.
            class_weights: Of each class's pixels in the losses, (K,) float32; None means 1.
        """
        maps = list(self.backbone(images))
        heads = {"decode": (self.decode_head(self.neck(maps)), 1.0)}
        if self.auxiliary_head is not None:
            heads["aux"] = (self.auxiliary_head(maps), AUXILIARY_WEIGHT)
        found = {}
        for name, (logits, weight) in heads.items():
            full = resized(logits.float(), labels.shape[-2:])
            found[f"{name}.loss_seg"] = weight * pixel_loss(full, labels, ignore, class_weights)
            found[f"{name}.acc_seg"] = 100 * (full.argmax(1) == labels).float().mean()
        return found

    def official_state(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Returns a file's tensors, and which are left out: an auxiliary head that the model lacks."""
        lacks = self.auxiliary_head is None
        left_out = [name for name in given if lacks and name.startswith(AUXILIARY)]
        return {name: value for name, value in given.items() if name not in left_out}, left_out


def pixel_loss(logits: Tensor, labels: Tensor, ignore: int, class_weights: Tensor | None = None) -> Tensor:
    """Returns the cross-entropy summed over the pixels that count, divided by the number of all pixels.

    Differs from the mean over those that count: an image that is mostly ignored weighs less.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64.
        ignore: The label of pixels that do not count.
        class_weights: Of each class's pixels, (K,) float32; None means 1.
    """
    losses = F.cross_entropy(logits, labels, class_weights, ignore_index=ignore, reduction="none")
    return losses.mean()


def build_segmenter(
    kind: str,
    backbone: str | nn.Module,
    num_classes: int,
    *,
    channels: int | None = None,
    auxiliary_channels: int = 256,
    dropout: float = DROPOUT,
    backbone_options: Mapping[str, Any] | None = None,
) -> Segmenter:
    """Returns a freshly initialised segmenter; `iwin_core.load_official_checkpoint` loads the authors' files.

    An Iwin backbone by name is the authors' dense one: zero padding, a norm for each map, Table III's heads
    and drop path 0.3. `load_official_checkpoint(model.backbone, PATH)` starts it from a classifier's weights.

    Args:
        kind: `upernet` or `semantic_fpn`.
        backbone: A timm name, or a module (B, 3, H, W) → four NCHW maps.
        num_classes: K, without the ignored label.
        channels: Of UPerNet's head, or of the Semantic FPN's neck, of which its head has half; None means 512
            and 256.
        auxiliary_channels: Of UPerNet's auxiliary head; 0 leaves it out. The Semantic FPN has none.
        dropout: Share of channels dropped before the logits in training.
        backbone_options: Fields of IwinConfig, or what another timm model takes.

    Raises:
        ValueError: If a name, a number or an option is invalid.

    Source: the released UPerNet configurations; the Semantic FPN as PVT and Swin have it.
    """
    if kind not in WIDTHS:
        raise unknown("segmenter", kind, list(WIDTHS))
    width = WIDTHS[kind] if channels is None else channels
    least = 1 if kind == "upernet" else 2
    if num_classes < 1 or width < least or auxiliary_channels < 0:
        raise ValueError(
            f"num_classes must be at least 1, channels at least {least} and auxiliary_channels at least 0, "
            f"got {num_classes}, {width} and {auxiliary_channels}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    body, dims = make_dense_backbone(backbone, backbone_options, drop_path_rate=DROP_PATH_RATE)
    if kind == "semantic_fpn":
        head = FPNHead(len(dims), width, width // 2, num_classes, dropout)
        return Segmenter(body, head, neck=FPNNeck(dims, width))
    auxiliary = FCNHead(dims, auxiliary_channels, num_classes, dropout) if auxiliary_channels else None
    return Segmenter(body, UPerHead(dims, width, num_classes, dropout), auxiliary_head=auxiliary)
