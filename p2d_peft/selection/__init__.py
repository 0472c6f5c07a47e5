"""Which rows of a pool to train on."""

from .icl import icl_scorer
from .pool import extremes
from .scoring import RowScores, Scorer, ScoringContext
from .selector import P2DDataSelector


__all__ = ["P2DDataSelector", "RowScores", "Scorer", "ScoringContext", "extremes", "icl_scorer"]
