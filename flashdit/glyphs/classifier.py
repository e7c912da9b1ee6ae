"""The letters' classifier: its sizes and its committed weights."""

from __future__ import annotations

from pathlib import Path

from flashdit.evaluation.features.iwin_classifier import IwinClassifier, load_classifier
from flashdit.glyphs.fonts import LETTERS
from iwin_core import IwinConfig

GLYPHS_WEIGHTS = Path(__file__).parent / "assets" / "classifier.safetensors"


def glyphs_config() -> IwinConfig:
    """Returns a three-stage Iwin Transformer: maps of 16×16, 8×8 and 4×4 tokens, 24 to 96 channels."""
    return IwinConfig(
        img_size=64,
        patch_size=4,
        num_classes=len(LETTERS),
        embed_dim=24,
        depths=(1, 1, 1),
        num_heads=(1, 2, 4),
        window_size=4,
        mlp_ratio=2.0,
    )


def load_glyphs_classifier() -> IwinClassifier:
    """Returns the committed classifier, in eval mode and without gradients."""
    return load_classifier(glyphs_config(), GLYPHS_WEIGHTS)
