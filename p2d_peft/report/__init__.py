"""What a run did and what it cost."""

from .page import save_page
from .pictures import save_pictures
from .run_folder import Run
from .run_report import P2DReport


__all__ = ["P2DReport", "Run", "save_page", "save_pictures"]
