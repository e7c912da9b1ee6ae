"""Object detection and instance segmentation: Mask R-CNN and Cascade Mask R-CNN on any four maps."""

from iwin_tasks.detection.build import build_detector

__all__ = ["build_detector"]
