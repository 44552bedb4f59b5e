"""Procedural scenes with exact masks: the data that comes with the package."""

from __future__ import annotations

from training.data.synthetic.folder import PALETTE, write_scenes
from training.data.synthetic.scene import CLASSES, draw_scene

__all__ = ["CLASSES", "PALETTE", "draw_scene", "write_scenes"]
