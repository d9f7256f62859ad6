"""Prune a model from Python: by names or values, with data in whatever form they come."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from gblm.base import Adapter, GblmError, Method, Pattern
from gblm.machine.bars import bars
from gblm.methods import make, parse
from gblm.report import Report, clock
from gblm.walk.blocks import Block, by_name, choose
from gblm.walk.gradients import first, sweep
from gblm.walk.prune import Pruning, method_pattern
from gblm.walk.survey import find_adapter
from gblm.walk.walk import Walk, no_progress

Patterns = Pattern | str | float | Mapping[str, "Pattern | str | float | None"]
WALK = ("micro_batch", "backward", "include", "exclude")  # options; others are of the data


def prune(
    model: nn.Module,
    data: Any,
    method: Method | str = "best",
    pattern: Patterns = "0.5",
    *,
    adapter: Adapter | None = None,
    progress: bool = False,
    **options: Any,
) -> Report:
    """Prune every linear in the blocks of a model in place, block by block, and report on it.

    Statistics of inputs see the blocks before them as they have become; gradients are of the dense
    model.

    data: the calibration samples: a batch, some batches such as a DataLoader's, or what the adapter
    makes a batch of, with further options (see `gblm.llm.adapters.batch_of`, `gblm.vit.…`).
    method: its name with options, as `--method` has it, or a `Method`. pattern: "2:4", 0.5, … or a
    `Pattern`; with an allocation, the budget of the model. A dict gives linears patterns of their
    own by their names, `{"*.down_proj": "0.3", "*.q_proj": None, "*": "0.5"}`: the first that
    matches counts, None and no match leave a linear dense. adapter: that of the model's library
    where None. progress: show bars. options: include and exclude, names of linears; micro_batch,
    samples at a time; backward: see `gradient_sums`.

    A pattern of units makes the model smaller; one named after it is for what is left.

    Raises `GblmError` where model, data, method and pattern do not go together, and where a
    statistic, a score or a loss holds a NaN or an Inf: the block it names, and every block after
    it, is then as it was.
    """
    model = unwrapped(model)
    own = {name: options.pop(name) for name in WALK if name in options}
    adapter = adapter or find_adapter(model)
    method = _method(method)
    batch = _batch(adapter, model, data, options)
    micro = own.get("micro_batch")
    walk = Walk.of(model, batch, adapter, micro_batch=micro)
    usual, single, dense = _patterns(walk.blocks, method, pattern)
    include, exclude = (_texts(own.get(name)) for name in ("include", "exclude"))
    if include or exclude or dense:
        choose(walk.blocks, include, [*exclude, *dense])
    single = {name: x for name, x in single.items() if name not in dense}
    pruning = Pruning(walk, method, usual, own=single)
    pruning.check()
    with bars(True) if progress else nullcontext(no_progress) as walk.progress:
        if needs := pruning.needs:
            with clock(pruning.report.seconds, "gradients"):
                samples = first(model, batch, adapter, method.share)
                share = Walk.of(model, samples, adapter, blocks=walk.blocks, micro_batch=micro)
                share.progress = walk.progress
                pruning.gradients = sweep(share, needs, own.get("backward", "auto"))[0]
        report = pruning.run()
    if then := usual.then:
        own = {**own, "include": None, "exclude": pruning.excluded}
        after = prune(model, batch, method, then, adapter=adapter, progress=progress, **own)
        report.add(after, pruning.renamed)
    return report


def unwrapped(model: Any) -> Any:
    """Return the model in a wrapper: of torch.compile, DataParallel, DDP or peft."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _method(method: Any) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        name, options = parse(method)
        return make(name, **options)
    way = "give its name, such as 'best', or call its factory: gblm.METHODS['best']()"
    raise GblmError(f"method {method!r:.60} is no method; {way}")


def _batch(adapter: Adapter, model: nn.Module, data: Any, options: dict[str, Any]) -> Any:
    known = list(inspect.signature(adapter.batch).parameters)[2:]
    if wrong := [name for name in options if name not in known]:
        raise GblmError(
            f"prune takes no {wrong[0]}= for this model; its options are {', '.join(WALK)}"
            f"{''.join(f', {name}' for name in known)}, and the pattern says the sparsity"
        )
    return adapter.batch(model, data, **options)


def _texts(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else [*(names or ())]


def _patterns(
    blocks: list[Block], method: Method, pattern: Patterns
) -> tuple[Pattern, dict[str, Pattern], list[str]]:
    """Return the pattern of most linears, those of single ones, and the linears left dense."""
    if not isinstance(pattern, Mapping):
        return _pattern(method, pattern), {}, []
    values = by_name(blocks, pattern)
    found = {name: _pattern(method, own) for name, own in values.items() if own is not None}
    if not found:
        raise GblmError("the patterns leave every layer dense; give some a pattern")
    usual = _pattern(method, pattern["*"]) if pattern.get("*") else next(iter(found.values()))
    single = {name: own for name, own in found.items() if own.name != usual.name}
    return usual, single, [name for name, own in values.items() if own is None]


def _pattern(method: Method, pattern: Any) -> Pattern:
    if isinstance(pattern, int | float):
        pattern = str(pattern)
    if not isinstance(pattern, Pattern | str):
        raise GblmError(f"pattern {pattern!r:.60} is none; give 0.5, '2:4' or gblm.nm(2, 4)")
    return method_pattern(method, pattern)
