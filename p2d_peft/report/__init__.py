"""What a run did and what it cost."""

from .run_report import P2DReport


__all__ = ["P2DReport"]
