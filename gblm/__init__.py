"""gblm: one-shot pruning of trained transformers, with the gradients of a few samples."""

from gblm.base import Adapter, GblmError, Method, Pattern, Statistics, Step
from gblm.gains import accelerate, gains
from gblm.maths.patterns import nm, parse, unstructured
from gblm.methods import METHODS, masked
from gblm.packed import pack, unpack
from gblm.report import Report
from gblm.walk.gradients import gradient_sums
from gblm.walk.prune import prune

__all__ = [
    "METHODS",
    "Adapter",
    "GblmError",
    "Method",
    "Pattern",
    "Report",
    "Statistics",
    "Step",
    "accelerate",
    "gains",
    "gradient_sums",
    "masked",
    "nm",
    "pack",
    "parse",
    "prune",
    "unpack",
    "unstructured",
]
