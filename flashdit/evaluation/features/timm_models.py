"""Any image model of timm as an extractor: its pooled features and its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from flashdit.evaluation.features.extractor import Extractor
from flashdit.shared.files import file_sha256
from flashdit.shared.registry import unknown
from flashdit.shared.weights import read_tensors

TIMM_PREFIX = "timm/"


class ModelExtractor(Extractor):
    """A timm model in eval mode: pool is what its head reads, logits what its classifier says.

    Images are resized whole to the model's input size, bicubic and antialiased, and normalised as its
    description says.

    Args:
        name: Of the extractor.
        network: A timm model with its weights.
        class_names: What its logits mean, where they are the data's own classes.
        size: (h, w) that it takes, in pixels; None is its description's.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        class_names: list[str] | None = None,
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.name, self.class_names = name, class_names
        self.network = network.eval().requires_grad_(False)
        about = resolve_model_data_config(network)
        self.size = size or tuple(about["input_size"][1:])
        self.resize = f"bicubic, antialiased, to {self.size[0]}×{self.size[1]}"
        self.mean, self.std = (
            nn.Buffer(torch.tensor(about[key]).reshape(1, 3, 1, 1)) for key in ("mean", "std")
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Returns the features."""
        network = cast(Any, self.network)
        pool = network.forward_head(self._last(images), pre_logits=True)
        logits = network.get_classifier()(pool) if network.num_classes else None
        return {"pool": pool, "spatial": None, "logits": logits}

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor | None:
        """Returns what its head reads as a map: of a transformer the patches' tokens alone."""
        network, last = cast(Any, self.network), self._last(images)
        if last.ndim == 4:
            channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
            return (last if channels_last else rearrange(last, "b d h w -> b h w d")).float()
        height, width = getattr(getattr(network, "patch_embed", None), "grid_size", None) or (0, 0)
        tokens = last[:, getattr(network, "num_prefix_tokens", 0) :]
        if tokens.ndim != 3 or tokens.shape[1] != height * width:
            return None
        return rearrange(tokens.float(), "b (h w) d -> b h w d", h=height)

    def _last(self, images: Tensor) -> Tensor:
        """Returns what its head reads."""
        pixels = images.float() / 255
        if pixels.shape[-2:] != self.size:
            resized = F.interpolate(pixels, size=self.size, mode="bicubic", antialias=True)
            pixels = resized.clamp(0, 1)
        return cast(Any, self.network).forward_features((pixels - self.mean) / self.std)


def timm_extractor(name: str, weights: str | None) -> ModelExtractor:
    """Returns the extractor of `timm/MODEL` with the weights of a file.

    Raises:
        ValueError: If timm has no such model, or the file does not hold its weights; nothing is downloaded.
    """
    model_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(model_name):
        raise unknown("model of timm", model_name, timm.list_models())
    if weights is None:
        raise ValueError(
            f"extractor '{name}' needs its weights file, --extractor-weights FILE; nothing is downloaded"
        )
    network = timm.create_model(model_name, pretrained=False)
    try:
        network.load_state_dict(read_tensors(weights))
    except RuntimeError as error:
        mismatch = " ".join(str(error).split())[:160]
        raise ValueError(
            f"weights must be those of timm's {model_name}, got {weights}: {mismatch}"
        ) from error
    extractor = ModelExtractor(name, network)
    extractor.weights_sha256 = file_sha256(Path(weights))
    return extractor
