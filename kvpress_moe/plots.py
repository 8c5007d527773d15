"""
Plots for notebooks and papers.

The functions take statistics, caches, records or a training log, and return a matplotlib ``Figure``. They open no
window and do not use pyplot. A notebook displays the figure if it is the last value of a cell.
``figure.savefig("usage.pdf")`` writes it to a file. Needs matplotlib (``pip install kvpress-moe[plots]``).
"""

try:
    import matplotlib as _  # noqa: F401
except ImportError as error:
    raise ImportError("kvpress_moe.plots: matplotlib is missing. pip install kvpress-moe[plots]") from error

from kvpress_moe.report.figures.byte_shares import over_bytes as over_bytes
from kvpress_moe.report.figures.kept_pairs import kept_positions as kept_positions
from kvpress_moe.report.figures.kept_pairs import kept_share as kept_share
from kvpress_moe.report.figures.ratios import over_ratio as over_ratio
from kvpress_moe.report.figures.routing import expert_usage as expert_usage
from kvpress_moe.report.figures.routing import hit_rates as hit_rates
from kvpress_moe.report.figures.training import loss_by_layer as loss_by_layer
from kvpress_moe.report.figures.training import training_curves as training_curves

__all__ = [
    "expert_usage",
    "hit_rates",
    "kept_positions",
    "kept_share",
    "loss_by_layer",
    "over_bytes",
    "over_ratio",
    "training_curves",
]
