"""Feature extractors: uint8 images → the features that scores compare. Inception, or a digits classifier."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from flashdit.digits.classifier import DIGITS_WEIGHTS, SPATIAL_CHANNELS, load_digits_classifier
from flashdit.digits.images import CLASS_NAMES
from flashdit.shared.registry import Registry
from flashdit.shared.weights import read_content

EXTRACTORS = Registry("extractor")

FORWARD_ROWS = 32  # images per forward of every extractor
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_DIGEST = "6726825d"  # the first of the published file's sha256
INCEPTION_TENSORS = 472
WEIGHTS_VARIABLE = "FLASHDIT_INCEPTION_WEIGHTS"


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
    """

    name: str
    pool_dimensions: int
    spatial_dimensions: int = 0
    resize: str = "unknown"
    class_names: list[str] | None = None
    weights_sha256: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """The class and the sha256 of every weight: equal fingerprints give comparable features."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return f"{type(self).__name__}:sha256={digest.hexdigest()}"

    @property
    def frechet_name(self) -> str:
        """What its Fréchet distance may be called: FID is Inception's alone."""
        return f"FD[{self.name}]"


@dataclass(kw_only=True)
class InceptionOptions:
    """Options of `inception`.

    Attributes:
        weights: Path; None means $FLASHDIT_INCEPTION_WEIGHTS, or else torch hub's cached file.
    """

    weights: str | None = None


@dataclass(kw_only=True)
class DigitsOptions:
    """The digits classifier has no options."""


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inception_weights_path(given: str | None) -> Path:
    """Returns the weights file: the given one, else the environment variable's, else torch hub's cached one.

    Raises:
        ValueError: If there is no such file; nothing is ever downloaded.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(given or os.environ.get(WEIGHTS_VARIABLE) or cached)
    if not path.is_file():
        raise ValueError(
            f"the inception extractor needs its weights, and there is no file {path}; fetch {INCEPTION_FILE} "
            f"(96 MB) from {INCEPTION_URL} and pass it by --inception-weights or ${WEIGHTS_VARIABLE}"
        )
    return path


def check_inception_weights(path: Path) -> None:
    """Refuses a file that is not a dictionary of Inception's 472 tensors; unpickles nothing but tensors."""
    content = read_content(path)
    tensors = content if isinstance(content, dict) else {}
    count = sum(not str(key).endswith("num_batches_tracked") for key in tensors)
    if count != INCEPTION_TENSORS:
        raise ValueError(f"{path} must hold the {INCEPTION_TENSORS} tensors of {INCEPTION_FILE}, got {count}")


class InceptionExtractor(Extractor):
    """ADM's Inception: pool_3 (2048), seven channels of mixed_6/conv (2023), logits without bias (1008).

    The network, its TF1 resize to 299×299 and the file format are torch-fidelity's `inception-v3-compat`.

    Args:
        path: A checked weights file.
    """

    name = "inception"
    pool_dimensions = 2048
    spatial_dimensions = 17 * 17 * SPATIAL_CHANNELS
    resize = "bilinear to 299×299 as TensorFlow 1 does"

    def __init__(self, path: Path):
        super().__init__()
        # Imported here: it brings torchvision, 3 s that a run on digits need not wait for.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            mismatch = " ".join(str(error).split())[:160]
            raise ValueError(
                f"inception weights must have torch-fidelity's names and shapes, got {path}: {mismatch}"
            ) from error
        self._branch: dict[str, Tensor] = {}
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_branch)

    def _keep_branch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps the map after its ReLU, as the 2015 graph's `mixed_6/conv` is."""
        self._branch["mixed_6/conv"] = output

    @property
    def frechet_name(self) -> str:
        """FID."""
        return "FID"

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Returns the features."""
        pool, logits = self.network(images)
        branch = self._branch.pop("mixed_6/conv")[:, :SPATIAL_CHANNELS]
        # Rows, columns, channels: the order in which references store mu_s and sigma_s.
        return {"pool": pool, "spatial": rearrange(branch, "b c h w -> b (h w c)"), "logits": logits}


class DigitsExtractor(Extractor):
    """The committed digits classifier: pool (64), spatial (112), logits (10) over the digits' own classes."""

    name = "digits"
    pool_dimensions = 64
    spatial_dimensions = 4 * 4 * SPATIAL_CHANNELS
    resize = "bilinear, antialiased, to 32×32"
    class_names = CLASS_NAMES

    def __init__(self):
        super().__init__()
        self.network = load_digits_classifier()
        self.weights_sha256 = file_digest(DIGITS_WEIGHTS)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Returns the features."""
        return dict(self.network(images))


@EXTRACTORS.register("inception", InceptionOptions)
def build_inception(options: InceptionOptions) -> Extractor:
    """Builds the Inception extractor, its weights found and checked."""
    path = inception_weights_path(options.weights)
    check_inception_weights(path)
    extractor = InceptionExtractor(path)
    extractor.weights_sha256 = file_digest(path)
    if not extractor.weights_sha256.startswith(INCEPTION_DIGEST):
        extractor.warnings = (
            f"{path.name} is not the published {INCEPTION_FILE}: no score compares with a paper's",
        )
    return extractor


@EXTRACTORS.register("digits", DigitsOptions)
def build_digits(options: DigitsOptions) -> Extractor:
    """Builds the digits extractor."""
    return DigitsExtractor()
