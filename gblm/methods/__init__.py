"""Methods: a name and its steps, made by a factory from its options.

A step is a class in a file beside this one; `METHODS` is the table of what there is.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

from torch import Tensor

from gblm.base import GblmError, Method, Pattern, Solver, Statistics, one_of
from gblm.machine.speed import Cost
from gblm.maths import admm as _admm
from gblm.maths import scores, stats
from gblm.maths import sparsegpt as _sparsegpt
from gblm.maths.allocation import ALLOCATIONS
from gblm.maths.scores import NORMS, Factor, Score, lift
from gblm.methods.distill import Distill
from gblm.methods.refine import Refine
from gblm.methods.regional import Regional
from gblm.methods.rotate import Rotate
from gblm.methods.solve import Solve, SolverCost


def masked(
    name: str,
    needs: Iterable[str],
    score: Score,
    group: str = "row",
    factor: Factor | None = None,
) -> Method:
    """Return the method that keeps what the pattern keeps of a score, and leaves it unchanged.

    needs: the statistics that `score(weight [out, in], statistics)` reads. group: the comparison
    group of unstructured patterns, "row" or "layer". factor: the terms of a score
    |W|·(a_j + α·G), which one kernel then computes and selects for n:m.
    """
    return Method(name, (Solve(name, frozenset(needs), lift(score, factor)),), group=group)


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


def gblm(alpha: float | str = 100, norm: str = "l1", share: float = 1.0) -> Method:
    """Keep the largest |W|·(‖X‖₂ + α·‖G‖ₚ) (arXiv 2311.04902).

    alpha: a number, 100 as published, or "auto" (see `scores.gblm`). norm: "l1" or "l2". share:
    the part of the samples whose gradients are taken, 8 at least; they then stand for all.
    """
    if not 0 < share <= 1:
        raise GblmError(f"share {share:g} is outside (0, 1]; 1 is the published one")
    statistic, factor = _statistic(norm), alpha if alpha == "auto" else _factor(alpha)
    score = partial(scores.gblm, alpha=factor, norm=norm)
    terms = partial(scores.gblm_terms, alpha=factor, norm=norm)
    name = f"gblm(alpha={factor}, norm={norm}{f', share={share:g}' if share < 1 else ''})"
    method = masked(name, {"input_sq", statistic}, score, factor=terms)
    return replace(method, share=float(share))


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

    rounds, rate: of the regional optimisation by RMSprop before (see `Regional`); 5 rounds are the
    published ones.
    """
    solve = lift(partial(scores.wanda_plus, alpha=_factor(factor)))
    if rounds < 0 or not 0 < rate < math.inf:
        raise GblmError(f"rounds {rounds} at rate {rate:g}; wanda++ was published with 5 at 3e-7")
    named = f"factor={_factor(factor)}" + (f", rounds={rounds}, rate={rate:g}" if rounds else "")
    name, needs = f"wanda++({named})", frozenset({"input_sq"})
    step = Regional(
        name,
        needs,
        solve,
        regional=frozenset({"grad_sq"}),
        rounds=rounds,
        rate=float(rate) if rounds else 0.0,
    )
    return Method(name, (step,))


def sparsegpt(damping: float = 0.01, columns: int = 128) -> Method:
    """Prune column by column and let the weights that stay make up for it (arXiv 2301.00774).

    damping: of H, times its mean diagonal. columns: chosen at a time, where the pattern lets them.
    """
    if not (0 <= damping < math.inf and columns > 0):
        raise GblmError(f"sparsegpt needs damping ≥ 0, columns ≥ 1; not {damping:g}, {columns}")
    solve = partial(_sparsegpt.solve, damping=damping, columns=columns)
    step = Solve("sparsegpt", frozenset({"input_gram"}), solve, price=_sparsegpt_cost)
    return Method("sparsegpt", (step,), group="layer")


def admm() -> Method:
    """Choose mask and weights together by least squares (ALPS, arXiv 2406.07831)."""
    needs = frozenset({"input_gram"})
    step = Solve("admm", needs, _admm.solve, masks=ADMM_MASKS, price=_admm_cost, narrow=True)
    return Method("admm", (step,))


def best(
    allocation: str | None = "auto",
    focus: float = 0.5,
    mix: float = 0.5,
    refine: float = 0.75,
    distill: float = 0.0,
    rotate: int = 0,
) -> Method:
    """Choose masks and new weights by least squares, and their budget by gradients.

    `admm` on one group of linears after the other, each on the inputs that the pruned ones before
    it make, towards mix·dense + (1 − mix)·own outputs; positions weighted by their gradients
    (focus), the budget spread over the linears by them (allocation), and every block refined
    (refine: passes over the samples). Gradients are those of an eighth of the samples. distill:
    passes over the samples that fit the whole model to the dense one's logits afterwards. rotate:
    steps that learn a rotation of the stream beforehand (see `Rotate`), 60 being the usual ones.
    docs/experiments.md shows what each part is worth.

    Raises `GblmError` where focus or mix is outside [0, 1], refine below 0, the allocation unknown.
    """
    one_of(allocation or "auto", ["auto", *ALLOCATIONS], "allocation")
    given = {"allocation": allocation, "focus": focus, "mix": mix, "refine": refine}
    title = _title("best", best, {**given, "distill": distill, "rotate": rotate})
    for name, value in {"focus": focus, "mix": mix}.items():
        if not 0 <= value <= 1:
            raise GblmError(f"{name} {value:g} is outside [0, 1]; 0.5 is the usual one")
    step = Solve(
        "best",
        frozenset({"input_gram", "cross_gram"}),
        partial(_admm.solve, mix=mix),
        focus,
        ADMM_MASKS,
        _admm_cost,
        narrow=True,
    )
    method = refined(Method(title, (step,), allocation, "layer", share=0.125), refine)
    if not 0 <= distill < math.inf:
        raise GblmError(f"distill {distill:g} is no number of passes; 1 is the usual one")
    if distill:
        method = replace(method, steps=(*method.steps, Distill(float(distill))))
    return rotated(method, rotate)


def rotated(method: Method, steps: int) -> Method:
    """Return a method that turns the stream first, by a rotation learnt in so many steps.

    Raises `GblmError` for fewer than 0, and for a method whose scores take gradients: those are of
    the weights as they were.
    """
    if steps < 0:
        raise GblmError(f"rotate {steps} is no number of steps; 60 is the usual one")
    others = tuple(step for step in method.steps if not isinstance(step, Rotate))
    if steps and method.needs & set(stats.GRADIENT) - {"grad_position"}:
        raise GblmError(f"{method.name} scores by gradients of weights, which a rotation changes")
    return replace(method, steps=(Rotate(steps), *others) if steps else others)


def _title(name: str, maker: Callable[..., Method], given: dict[str, Any]) -> str:
    """Return a name with those of the options that are not the usual ones."""
    usual = inspect.signature(maker).parameters
    own = {key: value for key, value in given.items() if value != usual[key].default}
    texts = (f"{k}={v:g}" if isinstance(v, int | float) else f"{k}={v}" for k, v in own.items())
    return f"{name}({', '.join(texts).lower()})" if own else name


def refined(method: Method, passes: float) -> Method:
    """Return a method whose last step refines each block, in so many passes over the samples.

    Raises `GblmError` where that is no number of passes.
    """
    if not 0 <= passes < math.inf:
        raise GblmError(f"refine {passes:g} is no number of passes; 1 is the usual one")
    steps = tuple(step for step in method.steps if not isinstance(step, Refine))
    focus = max((getattr(step, "focus", 0.0) for step in steps), default=0.0)
    if passes:
        at = sum(not isinstance(step, Distill) for step in steps)  # which comes last
        steps = (*steps[:at], Refine(float(passes), focus), *steps[at:])
    return replace(method, steps=steps)


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

ADMM_MASKS = len(_admm.PENALTIES) * _admm.STEPS  # that it chooses of a linear, one by one


def _sparsegpt_cost(o: int, i: int) -> Cost:
    return Cost(4 / 3 * i**3 + o * i**2, 512 * o * i, 4 * i)


def _admm_cost(o: int, i: int) -> Cost:
    # A Cholesky factor takes in³/3 operations, the inverse from it 2·in³/3.
    return Cost(5 * i**3 + 62 * o * i**2, 900 * o * i, 400)


def _repair_cost(o: int, i: int) -> Cost:
    return Cost(200 * o * i**2, 4000 * o * i, 1000)


@dataclass(frozen=True)
class Mend:
    """What gives new weights to a mask, `solve(weight, statistics, pattern, keep)`; its price."""

    solve: Callable[[Tensor, Statistics, Pattern, Tensor], tuple[Tensor, Tensor]]
    price: SolverCost


# What mends the weights of a mask that a score has chosen: METHOD+SOLVER.
SOLVERS: dict[str, Mend] = {
    "repair": Mend(_admm.repair, _repair_cost),
    "sparsegpt": Mend(_sparsegpt.solve, _sparsegpt_cost),
    "admm": Mend(_admm.solve, _admm_cost),
}


def seeded(method: Method, solver: str) -> Method:
    """Return the method that keeps what `method` keeps, with the weights a solver gives that mask.

    `repair` is the least-squares refit, which is also where `admm` leads once its mask is given.
    Raises `GblmError` where there is no such solver.
    """
    mend = SOLVERS[one_of(solver, SOLVERS, "solver")]
    name = f"{method.name}+{solver}"
    steps = []
    for step in method.steps:
        if isinstance(step, Solve):
            solve: Solver = partial(_mended, choose=step.solve, mend=mend.solve)
            needs = step.statistics | {"input_gram"}
            step = replace(step, name=name, statistics=needs, price=mend.price)
            step = replace(step, solve=solve, narrow=False)
        steps.append(step)
    return replace(method, name=name, steps=tuple(steps))


def _mended(
    weight: Tensor, statistics: Statistics, pattern: Pattern, choose: Solver, mend: Any
) -> tuple[Tensor, Tensor]:
    return mend(weight, statistics, pattern, choose(weight, statistics, pattern)[1])


def factory(name: str) -> tuple[Callable[..., Method], str | None]:
    """Return what makes the method of a name, METHOD or METHOD+SOLVER, and the solver.

    Raises `GblmError` where no method or no solver has that name.
    """
    if name not in METHODS and "+" in name:
        method, _, solver = name.rpartition("+")
        return METHODS[one_of(method, METHODS, "method")], one_of(solver, SOLVERS, "solver")
    return METHODS[one_of(name, METHODS, "method")], None


def options_of(text: str) -> Iterable[str]:
    """Return the names of the options of a method that `text` names, with options or without."""
    return inspect.signature(factory(text.partition(":")[0])[0]).parameters


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


def _statistic(norm: str) -> str:
    return NORMS[one_of(norm, NORMS, "norm")]
