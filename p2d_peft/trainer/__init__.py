"""`P2DTrainer` and its arguments."""

from .config import P2DConfig
from .p2d_trainer import P2DTrainer


__all__ = ["P2DConfig", "P2DTrainer"]
