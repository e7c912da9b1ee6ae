"""A trained classifier as the extractor of scores: `--extractor RUN`."""

from __future__ import annotations

from dataclasses import dataclass

from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.features.timm_models import ModelExtractor
from flashdit.shared.files import file_sha256
from flashdit.shared.runs import find_checkpoint, read_state
from iwin_tasks.classification.model import input_format, load_weights, make_model, read_spec


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
        checkpoint = find_checkpoint(options.weights, "--extractor")
        network, state = make_model(read_spec(checkpoint)), read_state(checkpoint)
        load_weights(network, checkpoint)
        size = input_format(network).image_size
        super().__init__("classifier", network, list(state["class_names"]), size)
        self.colours, self.accuracy = state.get("colours"), state.get("top1")
        self.weights_sha256 = file_sha256(checkpoint / "ema" / "model.safetensors")
