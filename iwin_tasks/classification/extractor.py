"""A trained classifier as the extractor of scores: `--extractor RUN`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.features.timm_models import ModelExtractor
from flashdit.shared.files import file_sha256
from flashdit.shared.runs import find_checkpoint, read_state
from iwin_tasks.classification.model import load_weights, make_model


@dataclass(kw_only=True)
class ClassifierExtractorOptions:
    """Options of a trained classifier as extractor."""

    weights: str
    """A run or a checkpoint of `iwin classify`, whose average is meant."""


@EXTRACTORS.register("classifier", ClassifierExtractorOptions)
class ClassifierExtractor(ModelExtractor):
    """A classifier's average: its logits are over the classes it was trained on.

    Args:
        options: Where it lies.

    Raises:
        ValueError: If there is no checkpoint of a classifier.
    """

    def __init__(self, options: ClassifierExtractorOptions):
        checkpoint = find_checkpoint(options.weights)
        config = checkpoint / "ema" / "config.json"
        spec = json.loads(config.read_text()) if config.is_file() else {}
        if not str(spec.get("name", "")).startswith("iwin"):
            raise ValueError(
                f"an extractor's run must be one of iwin classify, got {checkpoint} of "
                f"{spec.get('_class_name', 'something else')}"
            )
        network = make_model(spec)
        load_weights(network, checkpoint)
        state = read_state(checkpoint)
        super().__init__("classifier", network, list(state["class_names"]))
        self.colours = state.get("colours")
        self.weights_sha256 = file_sha256(checkpoint / "ema" / "model.safetensors")
