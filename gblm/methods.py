"""Methods: a name, the statistics needed and a solve, made by a factory from its options."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from gblm import scores
from gblm.base import GblmError, Method, one_of
from gblm.scores import NORMS, masked
from gblm.solvers import sparsegpt as _sparsegpt


def magnitude() -> Method:
    """Keep the largest |W|, of the whole weight where no group is named."""
    return masked("magnitude", (), scores.magnitude, group="layer")


def gradient(norm: str = "l1") -> Method:
    """Keep the largest |W|·‖G‖ (arXiv 2311.04902); norm: "l1" or "l2"."""
    statistic = _statistic(norm)
    score = partial(scores.gradient, norm=norm)
    return masked(f"gradient(norm={norm})", {statistic}, score)


def wanda() -> Method:
    """Keep the largest |W|·‖X‖₂ (arXiv 2306.11695)."""
    return masked("wanda", {"input_sq"}, scores.wanda)


def gblm(alpha: float | str = 100, norm: str = "l1") -> Method:
    """Keep the largest |W|·(‖X‖₂ + α·‖G‖ₚ) (arXiv 2311.04902).

    alpha: a number, 100 as published, or "auto" (see `scores.gblm`). norm: "l1" or "l2".
    """
    statistic, factor = _statistic(norm), alpha if alpha == "auto" else _factor(alpha)
    score = partial(scores.gblm, alpha=factor, norm=norm)
    return masked(f"gblm(alpha={factor}, norm={norm})", {"input_sq", statistic}, score)


def ria(power: float = 0.5) -> Method:
    """Keep the largest (|W| / Σ_i |W| + |W| / Σ_j |W|)·‖X‖₂^power (RIA, see `scores.ria`).

    As published, the whole weight is compared where no group is named.
    """
    if not (math.isfinite(power) and power >= 0):
        raise GblmError(f"power {power:g} is no number of 0 or more; 0.5 is the published one")
    score = partial(scores.ria, power=power)
    return masked(f"ria(power={power:g})", {"input_sq"}, score, group="layer")


def pruner_zero(norm: str = "l2") -> Method:
    """Keep the largest |W|²·σ(‖G‖), σ scaling to 0 … 1 (arXiv 2406.02924); norm: "l1" or "l2"."""
    statistic = _statistic(norm)
    score = partial(scores.pruner_zero, norm=norm)
    return masked(f"pruner-zero(norm={norm})", {statistic}, score)


def sparsegpt(damping: float = 0.01, columns: int = 128) -> Method:
    """Prune column by column and let the weights that stay make up for it (arXiv 2301.00774)."""
    solve = partial(_sparsegpt.solve, damping=damping, columns=columns)
    return Method("sparsegpt", frozenset({"input_gram"}), solve, group="layer")


METHODS: dict[str, Callable[..., Method]] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "wanda": wanda,
    "gblm": gblm,
    "ria": ria,
    "pruner-zero": pruner_zero,
    "sparsegpt": sparsegpt,
}


def make(name: str, **options: Any) -> Method:
    """Return the method of that name, made with those of the options that it takes.

    Raises `GblmError` where no method has that name.
    """
    factory = METHODS[one_of(name, METHODS, "method")]
    taken = inspect.signature(factory).parameters
    return factory(**{option: value for option, value in options.items() if option in taken})


def _factor(alpha: float | str) -> float:
    try:
        value = float(alpha)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and value >= 0:
        return int(value) if value.is_integer() else value
    raise GblmError(
        f"alpha {alpha} is neither auto nor a number of 0 or more; 100 is the published one"
    )


def _statistic(norm: str) -> str:
    return NORMS[one_of(norm, NORMS, "norm")]
