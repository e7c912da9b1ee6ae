"""The digits' classifier: its sizes and its committed weights."""

from __future__ import annotations

from pathlib import Path

from flashdit.digits.images import DIGIT_NAMES, IMAGE_SIZE
from flashdit.evaluation.features.iwin_classifier import IwinClassifier, load_classifier
from iwin_core import IwinConfig

DIGITS_WEIGHTS = Path(__file__).parent / "assets" / "classifier.safetensors"


def digits_config() -> IwinConfig:
    """Returns a three-stage Iwin Transformer: maps of 16×16, 8×8 and 4×4 tokens, 16 to 64 channels."""
    return IwinConfig(
        img_size=IMAGE_SIZE,
        patch_size=2,
        num_classes=len(DIGIT_NAMES),
        embed_dim=16,
        depths=(1, 1, 1),
        num_heads=(1, 2, 4),
        window_size=4,
        mlp_ratio=2.0,
    )


def load_digits_classifier() -> IwinClassifier:
    """Returns the committed classifier, in eval mode and without gradients."""
    return load_classifier(digits_config(), DIGITS_WEIGHTS)
