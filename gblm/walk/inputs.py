"""What the linears of a block see: statistics of their inputs, and some inputs as examples."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gblm.base import GblmError, Statistics
from gblm.machine import processes
from gblm.machine.device import exact
from gblm.maths import stats
from gblm.walk.blocks import Linear
from gblm.walk.call import Call
from gblm.walk.products import Products, Use

# The relative error of a linear is measured on at most this many of its calibration inputs.
ERROR_POSITIONS = 256


@dataclass
class Inputs:
    """What the linears of one group saw: their statistics, and some inputs to measure errors on.

    `weights` is how much each position of a sample counts in the statistics: see `add_inputs`.
    `stride`: one of so many inputs is kept as an example.
    """

    group: list[Linear]
    statistics: Statistics
    weights: Tensor | None
    stride: int
    examples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, samples: int, dense: Tensor | None = None) -> None:
        """Add the inputs `x [positions, in]` of `samples` samples; see `stats.add_inputs`."""
        start = -self.statistics.positions % self.stride
        self.examples.append(x[start :: self.stride].clone())
        with exact(x.device):
            stats.add_inputs(self.statistics, x, samples, dense, self.weights)

    def finish(self, samples: int) -> None:
        """Make the statistics those of all processes; raises `GblmError` for a NaN or an Inf.

        samples: of this process, those that did not come to a routed linear, too.
        """
        self.statistics.samples = samples
        processes.add_statistics([self.statistics])
        check(self.group[0], self.statistics)


def collect(groups: list[Inputs], calls: list[Call], step: int) -> None:
    """Run a block on its calls, and add what the groups of its linears see."""
    watch = _Collecting(groups)
    for call in calls:
        for piece in call.pieces(step):
            watch.start(piece.stop - piece.start)
            with suppress(Stop):
                call.run(call.arguments(piece), watch=watch)
    for inputs in groups:
        inputs.finish(sum(call.samples for call in calls))


class _Collecting(Products):
    """Adds what linears see, and stops the block once the last of them has."""

    def __init__(self, groups: list[Inputs]) -> None:
        super().__init__(inputs.group[0] for inputs in groups)
        self.groups = {inputs.group[0].name: inputs for inputs in groups}
        self.stops = not any(inputs.group[0].repeated for inputs in groups)
        self.missing: set[str] = set()
        self.samples = 0

    def start(self, samples: int) -> None:
        self.missing, self.samples = set(self.groups), samples

    def before(self, linear: Linear, use: Use) -> None:
        self.groups[linear.name].add(use.x.flatten(0, -2), self.samples)
        self.missing.discard(linear.name)
        if self.stops and not self.missing:  # nothing after the last linear's input is of use
            raise Stop


class Stop(Exception):
    """Ends a run of a block that has given all it was run for."""


class NotFinite(GblmError):
    """A statistic that holds a NaN or an Inf."""


def check(linear: Linear, statistics: Statistics) -> None:
    """Raise `GblmError` with the linear's name where a statistic holds a NaN or an Inf."""
    for name, value in statistics.sums.items():
        if not stats.is_finite(value):
            raise NotFinite(
                f"{linear}: the statistic {name} holds a NaN or an Inf; "
                "check the weights and the calibration samples, or use a wider dtype"
            )


def with_gradients(
    inputs: Statistics, gradient: Statistics | None, device: torch.device
) -> Statistics:
    """Return the statistics of inputs with those of gradients, which may be elsewhere."""
    if gradient is None:
        return inputs
    sums = {name: total.to(device) for name, total in gradient.sums.items()}
    count = gradient.differentiated or gradient.samples
    samples, positions = inputs.samples or gradient.samples, inputs.positions
    return Statistics({**inputs.sums, **sums}, samples, positions, count)


def relative_error(dense: Tensor, weight: Tensor, examples: list[Tensor]) -> float:
    """Return ‖(W − Ŵ)X‖ / ‖WX‖ on some inputs, 0 for none and for 0 / 0.

    Weights are `[out, in]`, examples `[positions, in]` each.
    """
    if not examples:
        return 0.0
    x, dense = torch.cat(examples), stats.wide(dense)
    x = x if x.dtype == torch.bfloat16 else stats.wide(x)
    difference, whole = (
        torch.linalg.norm(x @ own.T.to(x.dtype), dtype=dense.dtype)
        for own in (dense - stats.wide(weight), dense)
    )
    return (difference / whole).nan_to_num(0).item()
