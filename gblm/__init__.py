"""gblm: one-shot pruning of trained transformers, with the gradients of a few samples."""

from importlib.metadata import version

from gblm.base import Adapter, GblmError, Method, Pattern, Statistics, Step
from gblm.gains import accelerate, gains
from gblm.maths.patterns import nm, parse, unstructured
from gblm.methods import METHODS, masked
from gblm.methods.prune import prune
from gblm.packed import pack, unpack
from gblm.report import Report
from gblm.walk.gradients import gradient_sums
from gblm.walk.zeros import frozen_zeros, masks

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
    "frozen_zeros",
    "gains",
    "gradient_sums",
    "masked",
    "masks",
    "nm",
    "pack",
    "parse",
    "prune",
    "unpack",
    "unstructured",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        return version("gblm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
