"""What an attention head is and which heads matter for a task."""

from .geometry import AttentionGeometry, ModelGeometry, Units
from .head_set import Head, HeadSet
from .localize import localize_heads
from .scores import HeadScores


__all__ = ["AttentionGeometry", "Head", "HeadScores", "HeadSet", "ModelGeometry", "Units", "localize_heads"]
