"""What a feature extractor is: uint8 images → the features that scores compare."""

from __future__ import annotations

from torch import Tensor, nn

from flashdit.shared.registry import Registry
from flashdit.shared.weights import tensors_sha256

EXTRACTORS = Registry("extractor", "flashdit.extractors")

FORWARD_ROWS = 32  # images per forward of every extractor
SPATIAL_CHANNELS = 7  # of a map, as many as ADM takes of Inception's


class Extractor(nn.Module):
    """uint8 NCHW images → {"pool": (b, d), "spatial": (b, s) | None, "logits": (b, classes) | None}, float32.

    Attributes:
        name: Its name in `EXTRACTORS`.
        pool_dimensions: d, which a reference's stored mu must have.
        spatial_dimensions: s, which its stored mu_s must have; 0 where it has no spatial features.
        resize: How it brings images to its own size.
        class_names: What its logits mean, where they are the data's own classes; otherwise None.
        weights_sha256: Of the weights file; None where there is none.
        warnings: What a report must say of its weights.
        colours: What it was trained on, `grey` or `colour` images; None where that is unknown.
        accuracy: Share of images held out from its training that its logits name rightly; None where unknown.
        built_as: (name, weights) as `build_extractor` takes them from any folder; None where it did not.
        is_inception: Whether its scores may be called FID, KID and IS; those of another carry its name.
    """

    name: str
    pool_dimensions: int
    spatial_dimensions: int = 0
    resize: str = "unknown"
    class_names: list[str] | None = None
    weights_sha256: str | None = None
    warnings: tuple[str, ...] = ()
    colours: str | None = None
    accuracy: float | None = None
    built_as: tuple[str, str | None] | None = None
    is_inception: bool = False

    def feature_map(self, images: Tensor) -> Tensor | None:
        """Returns its last map before pooling, which a model's tokens can be aligned with; None: it has none.

        Args:
            images: uint8 (b, 3, height, width).

        Returns:
            float32 (b, h, w, d), rows from the top.
        """
        return None

    @property
    def fingerprint(self) -> str:
        """The class and the sha256 of every weight: equal fingerprints give comparable features."""
        return f"{type(self).__name__}:sha256={tensors_sha256(self.state_dict())}"


def colours_of(images: Tensor) -> str:
    """Returns `grey` where the three channels of all images (n, 3, h, w) are equal, else `colour`."""
    return "grey" if bool((images == images[:, :1]).all()) else "colour"
