"""Methods: a name, the statistics needed and a solve, made by a factory from its options."""

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from torch import Tensor

from gblm.base import GblmError, Method, Pattern, Statistics, one_of
from gblm.maths import admm as _admm
from gblm.maths import scores
from gblm.maths import sparsegpt as _sparsegpt
from gblm.maths.allocation import ALLOCATIONS
from gblm.maths.scores import NORMS, masked


def magnitude() -> Method:
    """Keep the largest |W|, of the whole weight where no group is named."""
    return masked("magnitude", (), scores.magnitude, group="layer")


def gradient(norm: str = "l1") -> Method:
    """Keep the largest |W|·‖G‖ (arXiv 2311.04902); norm: "l1" or "l2"."""
    statistic = _statistic(norm)
    score = partial(scores.gradient, norm=norm)
    terms = partial(scores.gradient_terms, norm=norm)
    return masked(f"gradient(norm={norm})", {statistic}, score, factor=terms)


def wanda() -> Method:
    """Keep the largest |W|·‖X‖₂ (arXiv 2306.11695)."""
    return masked("wanda", {"input_sq"}, scores.wanda, factor=scores.wanda_terms)


def gblm(alpha: float | str = 100, norm: str = "l1") -> Method:
    """Keep the largest |W|·(‖X‖₂ + α·‖G‖ₚ) (arXiv 2311.04902).

    alpha: a number, 100 as published, or "auto" (see `scores.gblm`). norm: "l1" or "l2".
    """
    statistic, factor = _statistic(norm), alpha if alpha == "auto" else _factor(alpha)
    score = partial(scores.gblm, alpha=factor, norm=norm)
    terms = partial(scores.gblm_terms, alpha=factor, norm=norm)
    name = f"gblm(alpha={factor}, norm={norm})"
    return masked(name, {"input_sq", statistic}, score, factor=terms)


def ria(power: float = 0.5) -> Method:
    """Keep the largest (|W| / Σ_i |W| + |W| / Σ_j |W|)·‖X‖₂^power (RIA, ICLR 2024).

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


def wanda_plus(factor: float = 100, rounds: int = 0, rate: float = 3e-7) -> Method:
    """Keep the largest |W|·(factor·G + ‖X‖₂) by regional gradients (Wanda++, arXiv 2503.04992).

    rounds, rate: of the regional optimisation by RMSprop before (see `regional.optimise`); 5 rounds
    are the published ones.
    """
    score = partial(scores.wanda_plus, alpha=_factor(factor))
    if rounds < 0 or not 0 < rate < math.inf:
        raise GblmError(f"rounds {rounds} at rate {rate:g}; wanda++ was published with 5 at 3e-7")
    named = f"factor={_factor(factor)}" + (f", rounds={rounds}, rate={rate:g}" if rounds else "")
    method = masked(f"wanda++({named})", {"input_sq", "grad_sq"}, score)
    return replace(method, regional=True, rounds=rounds, rate=float(rate) if rounds else 0.0)


def sparsegpt(damping: float = 0.01, columns: int = 128) -> Method:
    """Prune column by column and let the weights that stay make up for it (arXiv 2301.00774).

    damping: of H, times its mean diagonal. columns: chosen at a time, where the pattern lets them.
    """
    if not (0 <= damping < math.inf and columns > 0):
        raise GblmError(f"sparsegpt needs damping ≥ 0, columns ≥ 1; not {damping:g}, {columns}")
    solve = partial(_sparsegpt.solve, damping=damping, columns=columns)
    return Method("sparsegpt", frozenset({"input_gram"}), solve, group="layer")


def admm() -> Method:
    """Choose mask and weights together by least squares (ALPS, arXiv 2406.07831)."""
    return Method("admm", frozenset({"input_gram"}), _admm.solve)


def best(
    allocation: str | None = "auto",
    focus: float = 0.5,
    mix: float = 0.5,
    refine: float = 0.75,
) -> Method:
    """The settings gblm stands for: gradients decide where, least squares and refinement mend.

    `admm` on one group of linears after the other, each on the inputs that the mended ones before
    it make, towards mix·dense + (1 − mix)·own outputs; positions weighted by their gradients
    (focus), the budget spread over the linears by them (allocation), and every block refined
    (refine: passes over the samples). Gradients are those of an eighth of the samples.
    docs/benchmarks.md shows what each part is worth.

    Raises `GblmError` where focus or mix is outside [0, 1], refine below 0, the allocation unknown.
    """
    _check_passes(refine)
    one_of(allocation or "auto", ["auto", *ALLOCATIONS], "allocation")
    for name, value in {"focus": focus, "mix": mix}.items():
        if not 0 <= value <= 1:
            raise GblmError(f"{name} {value:g} is outside [0, 1]; 0.5 is the usual one")
    needs = {"input_gram", "cross_gram"} | ({"grad_position"} if focus else set())
    solve = partial(_admm.solve, mix=mix)
    method = Method("best", frozenset(needs), solve, "layer", focus=focus, share=0.125)
    return replace(method, allocation=allocation, refine=float(refine))


METHODS: dict[str, Callable[..., Method]] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "wanda": wanda,
    "gblm": gblm,
    "ria": ria,
    "pruner-zero": pruner_zero,
    "wanda++": wanda_plus,
    "sparsegpt": sparsegpt,
    "admm": admm,
    "best": best,
}

# What mends the weights of a mask that a score has chosen: METHOD+SOLVER.
SOLVERS: dict[str, Callable[[Tensor, Statistics, Pattern, Tensor], tuple[Tensor, Tensor]]] = {
    "repair": _admm.repair,
    "sparsegpt": _sparsegpt.solve,
    "admm": _admm.solve,
}


def seeded(method: Method, solver: str) -> Method:
    """Return the method that keeps what `method` keeps, with the weights a solver gives that mask.

    `repair` is the least-squares refit, which is also where `admm` leads once its mask is given.
    Raises `GblmError` where there is no such solver.
    """
    mend = SOLVERS[one_of(solver, SOLVERS, "solver")]

    def solve(weight: Tensor, statistics: Statistics, pattern: Pattern) -> tuple[Tensor, Tensor]:
        return mend(weight, statistics, pattern, method.solve(weight, statistics, pattern)[1])

    needs = method.needs | {"input_gram"}
    return replace(method, name=f"{method.name}+{solver}", needs=needs, solve=solve)


def factory(name: str) -> tuple[Callable[..., Method], str | None]:
    """Return what makes the method of a name, METHOD or METHOD+SOLVER, and the solver.

    Raises `GblmError` where no method or no solver has that name.
    """
    if name not in METHODS and "+" in name:
        method, _, solver = name.rpartition("+")
        return METHODS[one_of(method, METHODS, "method")], one_of(solver, SOLVERS, "solver")
    return METHODS[one_of(name, METHODS, "method")], None


def make(name: str, **options: Any) -> Method:
    """Return the method that `factory` names, made with those of the options that it takes."""
    maker, solver = factory(name)
    taken = inspect.signature(maker).parameters
    method = maker(**{option: value for option, value in options.items() if option in taken})
    return seeded(method, solver) if solver else method


def parse(text: str, **usual: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of what `text` names: "gblm", "gblm+repair:alpha=50:norm=l2".

    usual: options that are taken where the text does not name them and the method has them.
    Raises `GblmError` where no method has that name, or those options, or an option that value.
    """
    name, *parts = text.split(":")
    taken = inspect.signature(factory(name)[0]).parameters
    found = {option: value for option, value in usual.items() if option in taken}
    for part in parts:
        option, _, value = part.partition("=")
        if option not in taken:
            known = ", ".join(taken) or "none"
            raise GblmError(f"method {text}: no option {option!r}; those of {name}: {known}")
        found[option] = _value(text, taken[option], value)
    return name, found


def _value(text: str, option: inspect.Parameter, value: str) -> Any:
    """Return the value of an option of a method, of the type that its factory takes."""
    kinds = get_args(option.annotation) or (option.annotation,)
    for kind in (int, float):
        with suppress(ValueError):
            if kind in kinds:
                return kind(value)
    if str in kinds:
        return None if value == "none" else value
    words = {int: "a whole number", float: "a number"}
    wanted = words[next(kind for kind in kinds if kind in words)]
    raise GblmError(f"method {text}: {option.name} takes {wanted}, not {value!r}")


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


def _check_passes(refine: float) -> None:
    if not 0 <= refine < math.inf:
        raise GblmError(f"refine {refine:g} is no number of passes; 1 is the usual one")


def _statistic(norm: str) -> str:
    return NORMS[one_of(norm, NORMS, "norm")]
