"""Structured pruning: choose which units of a block go, and refit what reads the others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gblm.base import GblmError, Solver, Statistics
from gblm.machine import processes
from gblm.machine.device import exact
from gblm.maths import admm, scores, stats, structure
from gblm.maths.scores import Score
from gblm.report import LinearReport
from gblm.walk.blocks import Linear, Units
from gblm.walk.inputs import Inputs, relative_error, with_gradients
from gblm.walk.visit import Visit

FEWEST = 32  # an expert with fewer inputs is judged by the magnitude of its weights


@dataclass(frozen=True)
class Chooser:
    """How units are chosen: by the sums of a score, or step by step by least squares for None.

    refit: whether the reader's weights are refitted. mix: the dense stream's part in the target.
    """

    score: Score | None
    refit: bool
    mix: float = 1.0

    @classmethod
    def of(cls, solve: Solver, name: str) -> Chooser:
        """Return how the solver of a method chooses; raises `GblmError` where it cannot."""
        options = solve.keywords if isinstance(solve, partial) else {}
        function = solve.func if isinstance(solve, partial) else solve
        if score := options.get("score"):
            return cls(score, refit=False)
        if "choose" in options:
            return cls(cls.of(options["choose"], name).score, refit=True)
        if function is admm.solve:
            return cls(None, refit=True, mix=options.get("mix", 1.0))
        raise GblmError(
            f"{name} has no score of units; use best, admm, or a score such as wanda or gblm, "
            "alone or with +repair"
        )


def prune_units(
    visit: Visit, chooser: Chooser, needs: frozenset[str], focus: float
) -> list[LinearReport]:
    """Zero the units of a block that go; return what became of its linears."""
    reports: list[LinearReport] = []
    seen: dict[str, Inputs] = {}
    left = list(visit.block.units)
    with closing(visit.inputs(needs, focus)) as inputs:
        for groups in inputs:
            seen |= {linear.name: own for own in groups for linear in own.group}
            ready = [own for own in left if all(x.name in seen for x, _, _ in own.parts())]
            for units in ready:
                left.remove(units)
                with exact(units.reader.weight.device):
                    reports += _prune(units, chooser, seen, visit.gradients)
    return reports


def _prune(
    units: Units,
    chooser: Chooser,
    inputs: Mapping[str, Inputs],
    gradients: Mapping[str, Statistics],
) -> list[LinearReport]:
    start, reader = time.perf_counter(), units.reader
    dense = stats.wide(reader.weight)
    own = inputs[reader.name]
    channels = units.channels.to(dense.device)
    few = reader.routed and own.statistics.sums and own.statistics.positions < FEWEST
    score, refit = (scores.magnitude, False) if few else (chooser.score, chooser.refit)
    keep = None
    if score:
        summed = structure.unit_scores(
            (score(stats.wide(x.weight), _statistics(x, inputs, gradients)).movedim(axis, 0), rows)
            for x, axis, rows in (
                (x, axis, rows.to(dense.device)) for x, axis, rows in units.parts()
            )
        )
        keep = torch.zeros(len(channels), dtype=torch.bool, device=dense.device)
        keep[scores.finite(summed, "score").topk(units.kept).indices] = True
    weight = dense
    if refit:
        weight, keep = structure.solve(
            dense, own.statistics, channels, units.kept, keep, mix=chooser.mix
        )
    assert keep is not None
    weight = processes.sent(_zeroed(weight, 1, channels[~keep]).to(reader.weight.dtype), 0)
    off = relative_error(dense, weight, own.examples)
    reader.weight.copy_(weight)
    for linear, rows in units.writers:
        linear.weight.copy_(_zeroed(linear.weight, 0, rows.to(dense.device)[~keep]))
    seconds, note = time.perf_counter() - start, ""
    if few:
        note = f"by magnitude, for it has {own.statistics.positions} inputs"
    return [
        LinearReport(
            linear.name,
            list(linear.shape),
            float((~keep).sum()) * rows.shape[1] / linear.shape[axis],
            off if linear is reader else 0.0,
            seconds if linear is reader else 0.0,
            positions=inputs[linear.name].statistics.positions,
            note=note if linear is reader else "",
        )
        for linear, axis, rows in units.parts()
    ]


def _statistics(
    linear: Linear, inputs: Mapping[str, Inputs], gradients: Mapping[str, Statistics]
) -> Statistics:
    own = inputs[linear.name].statistics
    return with_gradients(own, gradients.get(linear.name), linear.weight.device)


def _zeroed(weight: Tensor, dim: int, places: Tensor) -> Tensor:
    return weight.index_fill(dim, places.flatten(), 0)
