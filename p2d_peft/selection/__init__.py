"""Which rows of a pool to train on."""

from .selector import P2DDataSelector


__all__ = ["P2DDataSelector"]
