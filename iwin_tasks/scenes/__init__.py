"""Embedded scenes for detection and segmentation: real digits on real photographs, with exact truth."""

from iwin_tasks.scenes.drawing import Scene, SceneOptions, draw_scene

__all__ = ["Scene", "SceneOptions", "draw_scene"]
