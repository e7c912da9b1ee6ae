"""Inception as ADM's evaluator uses it: the extractor behind every published FID."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from flashdit.evaluation.features.extractor import EXTRACTORS, SPATIAL_CHANNELS, Extractor
from flashdit.shared.files import file_sha256
from flashdit.shared.weights import read_content

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_DIGEST = "6726825d"  # the first of the published file's sha256
INCEPTION_TENSORS = 472
WEIGHTS_VARIABLE = "FLASHDIT_INCEPTION_WEIGHTS"


@dataclass(kw_only=True)
class InceptionOptions:
    """Options of `inception`.

    Attributes:
        weights: Path; None means $FLASHDIT_INCEPTION_WEIGHTS, or else torch hub's cached file.
    """

    weights: str | None = None


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
    """Raises ValueError unless a file is a dictionary of Inception's 472 tensors; unpickles only tensors."""
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
    is_inception = True
    colours = "colour"

    def __init__(self, path: Path):
        super().__init__()
        # Imported here: it brings torchvision, 3 s that other extractors need not wait for.
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

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Returns the features."""
        pool, logits = self.network(images)
        branch = self._branch.pop("mixed_6/conv")[:, :SPATIAL_CHANNELS]
        # Rows, columns, channels: the order in which references store mu_s and sigma_s.
        return {"pool": pool, "spatial": rearrange(branch, "b c h w -> b (h w c)"), "logits": logits}

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the map (b, 8, 8, 2048) whose mean pool_3 is."""
        maps: list[Tensor] = []
        hook = self.network.Mixed_7c.register_forward_hook(lambda *passed: maps.append(passed[-1]))
        with hook:
            self.network(images)
        return rearrange(maps[0].float(), "b d h w -> b h w d")


@EXTRACTORS.register("inception", InceptionOptions)
def build_inception(options: InceptionOptions) -> Extractor:
    """Builds the Inception extractor, its weights found and checked."""
    path = inception_weights_path(options.weights)
    check_inception_weights(path)
    extractor = InceptionExtractor(path)
    extractor.weights_sha256 = file_sha256(path)
    if not extractor.weights_sha256.startswith(INCEPTION_DIGEST):
        extractor.warnings = (
            f"{path.name} is not the published {INCEPTION_FILE}: no score compares with a paper's",
        )
    return extractor
