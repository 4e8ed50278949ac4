"""What a run cost and saved: the ledger and its faces (terminal, Markdown, JSON, one HTML page).

Each face is a module with one function, `render(report)`: `terminal`, `markdown`, `html`. None needs torch.
"""

from dynamize.report.data import Answerer, DecisionUse, Gallery, GalleryImage, Network, OptionUse, ReportData, Usage
from dynamize.report.ledger import Ledger, Rival, Row, Timing, headline
from dynamize.report.verdicts import share_of_saving_shown, verdicts

__all__ = [
    "Answerer",
    "DecisionUse",
    "Gallery",
    "GalleryImage",
    "Ledger",
    "Network",
    "OptionUse",
    "ReportData",
    "Rival",
    "Row",
    "Timing",
    "Usage",
    "headline",
    "share_of_saving_shown",
    "verdicts",
]
