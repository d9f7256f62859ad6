"""Solve: give every linear of a block a mask, and the weights that a solver finds for it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import GblmError, Pattern, Solver, Statistics, Step
from gblm.machine import processes
from gblm.machine.device import exact
from gblm.machine.speed import Cost
from gblm.maths import stats
from gblm.methods.structure import FEWEST, Chooser, prune_units
from gblm.report import LinearReport
from gblm.walk.blocks import Linear
from gblm.walk.footprint import Footprint
from gblm.walk.inputs import Inputs, relative_error, with_gradients
from gblm.walk.visit import Visit

# The cost of a linear [out, in] for a solver, beside its mask.
SolverCost = Callable[[int, int], Cost]


def by_score(outputs: int, inputs: int) -> Cost:
    """Return the cost of a score and its mask."""
    return Cost(0, 40 * outputs * inputs, 20)


@dataclass(frozen=True)
class Solve(Step):
    """Prunes each linear by `solve(weight, statistics, pattern)`.

    name: of the method, for errors. statistics: what it needs. focus: the part of a position's
    weight in the statistics of inputs that its gradients decide. masks: how often it chooses a
    mask. price: what it costs beside. narrow: `solve` takes `products`, the dtype of those that
    need few bits.
    """

    name: str
    statistics: frozenset[str]
    solve: Solver
    focus: float = 0.0
    masks: int = 1
    price: SolverCost = by_score
    narrow: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return self.statistics | ({"grad_position"} if self.focus else set())

    @property
    def solver(self) -> Solver:
        return self.solve

    def check(self, pattern: Pattern) -> None:
        if pattern.units:
            Chooser.of(self.solve, self.name)

    def visit(self, visit: Visit) -> None:
        work = self.units if visit.block.units else self.linears
        visit.reports += visit.attempt(lambda: work(visit))

    def units(self, visit: Visit) -> list[LinearReport]:
        """Remove units of the block; return what became of its linears."""
        return prune_units(visit, Chooser.of(self.solve, self.name), self.needs, self.focus)

    def linears(self, visit: Visit) -> list[LinearReport]:
        """Solve the linears of a block, and write their weights; return what became of them."""
        reports, step = [], self
        if self.narrow:
            solve: Callable[..., Any] = self.solve
            step = replace(self, solve=partial(solve, products=visit.walk.compute_dtype))
        with closing(visit.inputs(self.needs, self.focus)) as inputs:
            for groups in inputs:
                reports += step.groups(groups, visit.patterns, visit.gradients)
        return reports

    def groups(
        self,
        groups: list[Inputs],
        patterns: Mapping[str, Pattern],
        gradients: Mapping[str, Statistics],
    ) -> list[LinearReport]:
        """Solve the linears of some groups, then write the weights of all.

        Each process solves some of them and sends what it found.
        """
        notes = lent(groups) if self.needs else {}
        linears = [(linear, inputs) for inputs in groups for linear in inputs.group]
        solved: dict[int, tuple[Tensor, LinearReport]] = {}
        for i, (linear, inputs) in enumerate(linears):
            if i % processes.world() == processes.rank():
                gradient = gradients.get(linear.name)
                with exact(linear.weight.device):
                    solved[i] = self.linear(linear, inputs, patterns.get(linear.name), gradient)
        reports: dict[int, LinearReport] = {}
        for part in processes.gathered({i: report for i, (_, report) in solved.items()}):
            reports |= part
        for i, (linear, _) in enumerate(linears):
            weight = solved[i][0] if i in solved else torch.empty_like(linear.weight)
            linear.weight.copy_(processes.sent(weight, i % processes.world()))
        return [replace(reports[i], **notes.get(x.name, {})) for i, (x, _) in enumerate(linears)]

    def linear(
        self,
        linear: Linear,
        inputs: Inputs,
        pattern: Pattern | None,
        gradient: Statistics | None = None,
    ) -> tuple[Tensor, LinearReport]:
        """Return the new weight of a linear, in its own dtype, and what became of it.

        Without a pattern the linear stays dense.
        """
        start = time.perf_counter()
        if pattern is None:
            return linear.weight, LinearReport(linear.name, list(linear.shape), 0.0, 0.0, 0.0)
        dense = stats.wide(linear.weight)
        statistics = with_gradients(inputs.statistics, gradient, dense.device)
        where = f"{linear}, {self.name}, {pattern.name}"
        note = ""
        try:
            if linear.routed and self.needs and inputs.statistics.positions < FEWEST:
                note = f"by magnitude, for it has {inputs.statistics.positions} inputs"
                weight, keep = dense, pattern.keep(dense.abs())
            else:
                weight, keep = self.solve(dense, statistics, pattern)
        except GblmError as error:
            raise GblmError(f"{where}: {error}") from None
        weight = weight.mul(keep).add_(0).to(linear.weight.dtype)  # 0 of either sign becomes +0
        if not stats.is_finite(weight):
            raise GblmError(f"{where}: the new weight holds a NaN or an Inf; use a wider dtype")
        off = relative_error(dense, weight, inputs.examples)
        sparsity = stats.sparsity(weight)
        seconds = time.perf_counter() - start
        shape, positions = list(linear.shape), inputs.statistics.positions
        return weight, LinearReport(
            linear.name, shape, sparsity, off, seconds, positions=positions, note=note
        )

    def cost(self, footprint: Footprint) -> Cost:
        """Forward passes for statistics and outputs, Gram matrices, masks, errors, solutions."""
        n, beside = footprint.samples, "cross_gram" in self.needs
        grams = len({"input_gram", "cross_gram"} & self.needs)
        total = Cost(n * 2 * footprint.trunk)
        statistics = []
        for block in footprint.blocks:
            for group in block.groups:
                inputs, rows = group[0].shape[1], n * group[0].positions
                total += Cost(bytes=8 * rows * inputs)
                total += Cost((1.1 * bool(grams) + 2 * beside) * inputs**2 * rows)
            squares = [4 * group[0].shape[1] ** 2 * grams for group in block.groups] or [0]
            statistics.append(max(squares) if beside else sum(squares))
        solving = 0
        for linear in footprint.linears:
            outputs, inputs = linear.shape
            total += Cost(4 * outputs * inputs * min(n * linear.positions, 2048))
            total += self.price(outputs, inputs)
            total += Cost(seconds=self.masks * footprint.keep * outputs * inputs)
            solving = max(solving, 16 * (outputs * inputs + grams * inputs**2))
        stream = n * footprint.stream * 2
        if beside:  # all of both streams wait before a group
            stream = 2 * n * (2 * footprint.stream + footprint.widest)
        work = max(solving, footprint.micro * footprint.kept // len(footprint.blocks))
        return total + Cost(memory=stream + max(statistics) + work)


def lent(groups: list[Inputs]) -> dict[str, dict[str, Any]]:
    """Give experts with few inputs the statistics of all experts of their layer.

    Returns what the report says of them, by name.
    """
    layers: dict[nn.Parameter, list[Statistics]] = defaultdict(list)
    for inputs in groups:
        layers[inputs.group[0].parameter].append(inputs.statistics)
    notes: dict[str, dict[str, Any]] = {}
    for inputs in groups:
        linear, count = inputs.group[0], inputs.statistics.positions
        layer = layers[linear.parameter]
        total = sum(own.positions for own in layer)
        if linear.routed and linear.parameter.ndim > 2 and count < FEWEST <= total:
            inputs.statistics = replace(reduce(add, layer), samples=inputs.statistics.samples)
            note = f"by the inputs of all experts of its layer, for it has {count}"
            notes |= {own.name: {"note": note, "positions": count} for own in inputs.group}
    return notes
