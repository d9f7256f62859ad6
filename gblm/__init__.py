"""gblm: one-shot pruning of trained transformers, with the gradients of a few samples."""

from gblm.base import Adapter, GblmError, Kind, Method, Pattern, Statistics
from gblm.gradients import gradient_sums
from gblm.methods import METHODS
from gblm.patterns import nm, parse, unstructured
from gblm.pruner import prune
from gblm.report import Report
from gblm.scores import masked

__all__ = [
    "METHODS",
    "Adapter",
    "GblmError",
    "Kind",
    "Method",
    "Pattern",
    "Report",
    "Statistics",
    "gradient_sums",
    "masked",
    "nm",
    "parse",
    "prune",
    "unstructured",
]
