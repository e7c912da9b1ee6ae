"""Semantic segmentation by Iwin and other backbones: UPerNet and Semantic FPN."""

from iwin_tasks.segmentation.inference import predict_probabilities
from iwin_tasks.segmentation.labels import LabelFormat
from iwin_tasks.segmentation.metrics import ConfusionMatrix
from iwin_tasks.segmentation.model import Segmenter, build_segmenter

__all__ = ["ConfusionMatrix", "LabelFormat", "Segmenter", "build_segmenter", "predict_probabilities"]
