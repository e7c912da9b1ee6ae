"""Any extractor by its name: a registered one, a trained run's, timm's, torch-fidelity's, or yours."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdit.evaluation.features.extractor import EXTRACTORS, FORWARD_ROWS, Extractor
from flashdit.evaluation.features.timm_models import TIMM_PREFIX, timm_extractor
from flashdit.shared.files import file_sha256
from flashdit.shared.paths import resolved
from flashdit.shared.registry import unknown
from flashdit.shared.weights import read_content

OF_RUNS = "classifier"  # the registered extractor that reads the folder of a trained run
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
    colours = "colour"

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
        self.pool_dimensions = checked_widths(self)["pool"]

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Returns the features."""
        pool, *logits = self.network(images)
        return {"pool": pool, "spatial": None, "logits": logits[0] if logits else None}


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
        ValueError: If there is no such callable, or it fails without arguments.
    """
    module_name, _, attribute = name.partition(":")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"an extractor 'package.module:callable' must import, got {name}: {error}"
        ) from error
    try:
        return build()
    except Exception as error:  # code from outside may fail in any way
        raise ValueError(
            f"an extractor 'package.module:callable' must be made without arguments, {name} is not: "
            f"{type(error).__name__}: {error}"
        ) from error


def completed(extractor: Any, name: str) -> Extractor:
    """Returns an extractor in eval mode with the name and the dimensions that it does not state itself.

    Raises:
        ValueError: If it is no extractor, or its features are not what an extractor returns.
    """
    if not isinstance(extractor, Extractor):
        raise ValueError(
            f"{name} must return a flashdit.evaluation.features.Extractor, got {type(extractor).__name__}"
        )
    extractor.eval()
    extractor.name = getattr(extractor, "name", name)
    stated = hasattr(extractor, "pool_dimensions")
    if not stated or ":" in name:
        found = checked_widths(extractor)
        if stated and extractor.pool_dimensions != found["pool"]:
            raise ValueError(
                f"extractor '{name}' must have its pool_dimensions={extractor.pool_dimensions}, got "
                f"{found['pool']}"
            )
        extractor.pool_dimensions, extractor.spatial_dimensions = found["pool"], found["spatial"]
    return extractor


def checked_widths(extractor: Extractor) -> dict[str, int]:
    """Returns how wide each kind of features is, 0 where there is none: asked of black images.

    Raises:
        ValueError: If features are missing, of another type or shape, or not finite.
    """
    rule = f"extractor '{extractor.name}' must map uint8 (n, 3, h, w) to"
    images = torch.zeros(FORWARD_ROWS, 3, 32, 32, dtype=torch.uint8)
    try:
        with torch.no_grad():
            features = extractor(images)
    except Exception as error:  # code from outside may fail in any way
        raise ValueError(f"{rule} features, it fails: {type(error).__name__}: {error}") from error
    if not isinstance(features, Mapping) or features.get("pool") is None:
        got = sorted(features) if isinstance(features, Mapping) else type(features).__name__
        raise ValueError(f"{rule} a mapping with 'pool', got {got}")
    for kind, values in features.items():
        if values is None:
            continue
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(images):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{rule} {kind} (n, width), got {got} for n = {len(images)}")
        if values.dtype != torch.float32 or not values.isfinite().all():
            raise ValueError(f"{rule} finite float32 {kind}, got {values.dtype} of black images")
    logits, names = features.get("logits"), extractor.class_names
    if names is not None and (logits is None or logits.shape[1] != len(names)):
        got = None if logits is None else logits.shape[1]
        raise ValueError(f"{rule} one logit for each of its {len(names)} class_names, got {got}")
    found = {kind: 0 if values is None else values.shape[1] for kind, values in features.items()}
    return {"spatial": 0, **found}


def build_extractor(name: str, weights: str | None = None) -> Extractor:
    """Returns the extractor of a name, in eval mode.

    Args:
        name: One of `EXTRACTORS`, the folder of a trained classifier's run, `timm/MODEL`, a name of
            torch-fidelity's registry, or `package.module:callable`.
        weights: Weights file, the option `weights` of an extractor of `EXTRACTORS`; None means its default,
            for one of torch-fidelity's the file cached by torch hub.

    Raises:
        ValueError: If the name is unknown or its weights are missing.
    """
    name = "inception" if name == "inception-v3-compat" else name  # torch-fidelity's name of the same network
    if name in EXTRACTORS.names():
        extractor = EXTRACTORS.build({"name": name, **({"weights": weights} if weights else {})})
    elif Path(name).is_dir():
        if weights:
            raise ValueError(f"an extractor's run has its own weights, got {name} and {weights}")
        extractor = EXTRACTORS.build({"name": OF_RUNS, "weights": name})
    elif name.startswith(TIMM_PREFIX):
        extractor = timm_extractor(name, weights)
    elif ":" in name:
        extractor = imported_extractor(name)
    elif name in (others := torch_fidelity_extractors()):
        extractor = TorchFidelityExtractor(name, weights)
    else:
        kinds = {*EXTRACTORS.names(), *others, "timm/MODEL", "RUN", "package.module:callable"}
        if "/" in name:
            raise ValueError(f"an extractor must be a known name or a run's folder, {name} does not exist")
        raise unknown("extractor", name, kinds)
    extractor = completed(extractor, name)
    is_run = name not in EXTRACTORS.names() and Path(name).is_dir()
    extractor.built_as = (
        str(resolved(name)) if is_run else name,
        str(resolved(weights)) if weights else None,
    )
    return extractor
