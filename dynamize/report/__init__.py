"""What a run cost and saved: the ledger and its faces (terminal, Markdown, JSON, one HTML page).

Each face is a module with one function, `render(report)`: `terminal`, `markdown`, `html`. None needs torch.
"""

from dynamize.report.data import Answerer, Mark, ReportData
from dynamize.report.ledger import Ledger, Rival, Row, Timing, headline
from dynamize.report.standing import Classes, Gallery, GalleryImage, Glimpse, Place, Section, Standing
from dynamize.report.verdicts import share_of_saving_shown, verdicts

__all__ = [
    "Answerer",
    "Classes",
    "Gallery",
    "GalleryImage",
    "Glimpse",
    "Ledger",
    "Mark",
    "Place",
    "ReportData",
    "Rival",
    "Row",
    "Section",
    "Standing",
    "Timing",
    "headline",
    "share_of_saving_shown",
    "verdicts",
]
