"""How far reconstructions are from their images: in pixels, in VGG16's features; and the KL term."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models import vgg16

from flashdit.shared.weights import read_tensors

TAPS = (4, 9, 16, 23, 30)
"""Ends of VGG16's layers up to relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""
EPSILON = 1e-10


class PerceptualError(nn.Module):
    """Mean squared distance of VGG16's features, each position's scaled to unit length.

    Args:
        weights: File of torchvision's VGG16 weights.

    Raises:
        ValueError: If the file holds other weights.

    Source: Zhang et al. 2018 (LPIPS), eq. (1), with every channel's weight 1: without their learned ones.
    """

    def __init__(self, weights: str):
        super().__init__()
        features = cast(nn.Sequential, vgg16(weights=None).features)
        given = {
            key.removeprefix("features."): value
            for key, value in read_tensors(weights).items()
            if key.startswith("features.")
        }
        try:
            features.load_state_dict(given)
        except RuntimeError as error:
            raise ValueError(
                f"loss.vgg16 must be a file of torchvision's VGG16 weights, got {weights}: {error}"
            ) from error
        self.parts = nn.ModuleList(features[start:end] for start, end in pairwise((0, *TAPS)))
        self.mean = nn.Buffer(torch.tensor(IMAGENET_DEFAULT_MEAN).reshape(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(IMAGENET_DEFAULT_STD).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Returns the mean over the batch and the five features, of images (B, 3, H, W) in [−1, 1]."""
        both = (torch.cat([images, others]) / 2 + 0.5 - self.mean) / self.std
        distances = []
        for part in self.parts:
            both = part(both)
            unit, other = (both / (both.square().sum(1, keepdim=True).sqrt() + EPSILON)).chunk(2)
            distances.append((unit - other).square().sum(1).mean())
        return torch.stack(distances).mean()


def pixel_error(images: Tensor, reconstructions: Tensor, kind: str) -> Tensor:
    """Returns the mean absolute (`l1`) or squared (`l2`) error of images in [−1, 1]."""
    return (F.l1_loss if kind == "l1" else F.mse_loss)(reconstructions, images)


def kl_per_number(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns KL(N(mean, exp(log_variance)) ‖ N(0, 1)), the mean over all numbers.

    Source: Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Returns the peak signal-to-noise ratio over all pixels, in dB, of images in [−1, 1]."""
    error = ((images - reconstructions) / 2).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)
