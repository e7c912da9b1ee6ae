"""The embedded default data: scikit-learn's digits as 32×32 images or larger ones, with one fixed split."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HELD_OUT_SHARE = 0.2
SPLIT_SEED = 0


@cache
def digits(split: str, image_size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    """Returns the images and labels of one split.

    The 1,797 grey 8×8 images (0–16) are enlarged bicubically and repeated over three channels.

    Args:
        split: `train` (1,437 images) or `held-out` (360 images), stratified by class.
        image_size: Side they are enlarged to, S, in pixels.

    Returns:
        Images uint8 (N, 3, S, S) and labels int64 (N,).

    Raises:
        ValueError: If the split is neither.
    """
    # Imported here: they take 2 s, which sampling from a checkpoint of digits need not wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "held-out"):
        raise ValueError(f"digits have the splits 'train' and 'held-out', got {split=}")
    flat, target = map(np.asarray, load_digits(return_X_y=True))
    small = torch.from_numpy(flat / 16 * 255).float().reshape(-1, 1, 8, 8)
    large = F.interpolate(small, size=(image_size, image_size), mode="bicubic", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(target).long()
    train, held_out = train_test_split(
        range(len(labels)), test_size=HELD_OUT_SHARE, random_state=SPLIT_SEED, stratify=target
    )
    rows = torch.tensor(sorted(train if split == "train" else held_out))
    return images[rows], labels[rows]
