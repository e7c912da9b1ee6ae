"""Any extractor by its name: a registered one, torch-fidelity's, or yours as `package.module:callable`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdit.evaluation.features.extractor import EXTRACTORS, Extractor
from flashdit.shared.files import file_sha256
from flashdit.shared.registry import unknown
from flashdit.shared.weights import read_content

DINO_CODE = "facebookresearch_dinov2_main"  # torch hub's folder of the code that torch-fidelity runs


class TorchFidelityExtractor(Extractor):
    """An extractor of torch-fidelity's registry: the layer of its FID as pool, that of its IS as logits.

    It has no spatial features, and no logits where torch-fidelity takes one layer for both scores, which is
    then no class's logits.

    Args:
        name: Its name in torch-fidelity's registry.
        weights: Weights file; None means torch hub's cached one.

    Raises:
        ValueError: If the weights are not there or not this network's; nothing is ever downloaded.
    """

    resize = "torch-fidelity's own"

    def __init__(self, name: str, weights: str | None = None):
        super().__init__()
        self.name = name
        kind = torch_fidelity_extractors()[name]
        pool, logits = (kind.get_default_feature_layer_for_metric(score) for score in ("fid", "isc"))
        path = weights_path(name, weights)
        options: dict[str, Any] = {"feature_extractor_weights_path": str(path)} if path else {}
        if path is not None:
            check_tensors(path)
            self.weights_sha256 = file_sha256(path)
        try:
            # Without its internal dtype 'float64', which torch-fidelity 0.4.0 reads as float32.
            self.network = kind(name, [pool] if pool == logits else [pool, logits], **options)
        except (RuntimeError, KeyError) as error:
            mismatch = " ".join(str(error).split())[:160]
            raise ValueError(
                f"weights must be those of extractor '{name}', got {path}: {mismatch}"
            ) from error
        self.pool_dimensions = widths(self)["pool"]

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Returns the features."""
        pool, *logits = self.network(images)
        return {"pool": pool, "spatial": None, "logits": logits[0] if logits else None}


def widths(extractor: Extractor) -> dict[str, int]:
    """Returns how wide each kind of features is, 0 where there is none: asked of one black image."""
    with torch.no_grad():
        features = extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    return {kind: 0 if values is None else values.shape[1] for kind, values in features.items()}


def torch_fidelity_extractors() -> Mapping[str, Any]:
    """Returns torch-fidelity's registry, with what was registered there from outside."""
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # 3 s to import
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"torch and torchvision must be a matching pair, got: {error}") from error
    return FEATURE_EXTRACTORS_REGISTRY


def weights_path(name: str, given: str | None) -> Path | None:
    """Returns the weights file of a torch-fidelity extractor, None where it takes none.

    Raises:
        ValueError: If torch-fidelity would have to download something.
    """
    hub = Path(torch.hub.get_dir())
    if name.startswith("dinov2-"):
        from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA

        needed = [hub / DINO_CODE, hub / "checkpoints" / f"{MODEL_METADATA[name]}_pretrain.pth"]
        missing = [str(path) for path in needed if not path.exists()]
        if given or missing:
            got = f"--extractor-weights {given}" if given else f"no {missing[0]}"
            raise ValueError(
                f"extractor '{name}' is read from torch hub's cache alone and never downloaded: it needs "
                f"{needed[0]} and {needed[1]}, got {got}"
            )
        return None
    cached = cached_file(name)
    path = Path(given) if given else hub / "checkpoints" / cached if cached else None
    if path is not None and not path.is_file():
        raise ValueError(
            f"extractor '{name}' needs its weights, and there is no file {path}; nothing is downloaded: "
            f"fetch {cached or 'it'} and pass it by --extractor-weights"
        )
    return path


def cached_file(name: str) -> str | None:
    """Returns what torch-fidelity calls the weights in torch hub's cache, None for an extractor of others."""
    if name.startswith("clip-"):
        from torch_fidelity.feature_extractor_clip import MODEL_METADATA

        return f"{name}-{MODEL_METADATA[name]['hash']}.pt"
    return "vgg16-397923af.pth" if name == "vgg16" else None


def check_tensors(path: Path) -> None:
    """Raises ValueError for a pickle of more than tensors; CLIP's archives are TorchScript, no pickles."""
    if path.suffix != ".pt":
        read_content(path)
        return
    try:
        torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"weights must be a TorchScript file, got {path}: {str(error)[:160]}") from error


def imported_extractor(name: str) -> Any:
    """Returns what a callable, given as `package.module:callable`, returns.

    Raises:
        ValueError: If there is no such callable.
    """
    module_name, _, attribute = name.partition(":")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"an extractor 'package.module:callable' must import, got {name}: {error}"
        ) from error
    return build()


def completed(extractor: Any, name: str) -> Extractor:
    """Returns an extractor in eval mode with the name and the dimensions that it does not state itself.

    Raises:
        ValueError: If it is no extractor.
    """
    if not isinstance(extractor, Extractor):
        raise ValueError(
            f"{name} must return a flashdit.evaluation.features.Extractor, got {type(extractor).__name__}"
        )
    extractor.eval()
    extractor.name = getattr(extractor, "name", name)
    if not hasattr(extractor, "pool_dimensions"):
        found = widths(extractor)
        extractor.pool_dimensions, extractor.spatial_dimensions = found["pool"], found.get("spatial", 0)
    return extractor


def build_extractor(name: str, weights: str | None = None) -> Extractor:
    """Returns the extractor of a name, in eval mode.

    Args:
        name: One of `EXTRACTORS`, a name of torch-fidelity's registry, or `package.module:callable`.
        weights: Weights file, the option `weights` of an extractor of `EXTRACTORS`; None means its default,
            for one of torch-fidelity's the file cached by torch hub.

    Raises:
        ValueError: If the name is unknown or its weights are missing.
    """
    name = "inception" if name == "inception-v3-compat" else name  # torch-fidelity's name of the same network
    if name in EXTRACTORS.names():
        extractor = EXTRACTORS.build({"name": name, **({"weights": weights} if weights else {})})
    elif ":" in name:
        extractor = imported_extractor(name)
    elif name in (others := torch_fidelity_extractors()):
        extractor = TorchFidelityExtractor(name, weights)
    else:
        raise unknown("extractor", name, {*EXTRACTORS.names(), *others, "package.module:callable"})
    return completed(extractor, name)
