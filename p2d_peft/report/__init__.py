"""What a run did and what it cost."""

from .page import save_page
from .pictures import save_pictures
from .run_folder import Run
from .run_report import P2DReport
from .score_plots import plot_scores


__all__ = ["P2DReport", "Run", "plot_scores", "save_page", "save_pictures"]
