"""What an attention head is and which heads matter for a task."""

from .comparison import Comparison
from .geometry import AttentionGeometry, ModelGeometry, Units
from .head_set import Head, HeadSet
from .layouts import AttentionLayout, HeadSizes, register_attention_layout
from .localize import localize_heads
from .scores import HeadScores


__all__ = [
    "AttentionGeometry",
    "AttentionLayout",
    "Comparison",
    "Head",
    "HeadScores",
    "HeadSet",
    "HeadSizes",
    "ModelGeometry",
    "Units",
    "localize_heads",
    "register_attention_layout",
]
