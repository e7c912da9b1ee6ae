"""Object detection and instance segmentation: Mask R-CNN and Cascade Mask R-CNN on any four maps."""

from iwin_tasks.detection.build import build_detector
from iwin_tasks.detection.detector import Detector

__all__ = ["Detector", "build_detector"]
