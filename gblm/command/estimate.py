"""What a run would take: read off one sample, nothing run.

A model without values (on the meta device, or of fake tensors) shows its blocks and linears as any
other does, and what one sample computes and keeps (`gblm.walk.footprint`). With F the operations
of a sample's forward pass through the blocks, H those of the head, n' samples for gradients, E
samples to evaluate on and W the bytes of the weights:

    gradients = n'·(4F + 3H)       by blocks: forward, again, by inputs, by weights; 3F by the model
    evaluate  = E·(F + H)
    prune     = Σ of the method's steps, each of which states its own cost

over the rates at which this machine multiplies matrices and adds in memory, measured in a fraction
of a second. Not counted: reading the model and the data, and writing the result.

Memory is W, the batch, the sums of gradients and, where runs share a model, a copy of its blocks,
beside the largest of: the activations that a backward pass keeps; what the steps hold; a batch of
the evaluation. Within about a factor of 1.5, as seconds are within about 2.
"""

import math
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

import torch

from gblm.base import Method, Pattern
from gblm.machine.device import peak_memory, resident
from gblm.machine.speed import Cost, Machine, seconds
from gblm.maths import stats
from gblm.walk import sample
from gblm.walk.blocks import Linear
from gblm.walk.budget import FEWER, POSITIONS
from gblm.walk.footprint import Footprint
from gblm.walk.gradients import share_of
from gblm.walk.prune import allocated, at_work, needed, shortens
from gblm.walk.sample import evaluations

# Of the memory that work takes, what an allocator holds for it; of the head, logits beside losses.
HELD, HEAD = 1.5, 3


@dataclass
class Task:
    """What a command asks of a model: samples, those of the evaluation, and how they are taken.

    together: samples of a batch of the evaluation. several: whether runs share the model. kept:
    whether gradients are kept in a folder, which takes no memory. offload: whether weights are away
    but for a block at work and the one after it. micro: samples of a micro-batch.
    taken: bytes that libraries and data take before the model comes; peak: the most they have.
    """

    samples: int
    evaluated: int = 0
    together: int = 1
    several: bool = False
    kept: bool = False
    offload: bool = False
    micro: int = 1
    backward: str = "auto"
    taken: int = field(default_factory=resident)
    peak: int = field(default_factory=lambda: peak_memory(torch.device("cpu")))


@dataclass
class Estimate:
    """Seconds by phase as a report has them, bytes beside those of libraries and data read."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    backward: str = ""


def estimate(
    footprint: Footprint, task: Task, method: Method, pattern: Pattern, machine: Machine, free: int
) -> Estimate:
    """Return what a run takes, on a machine with so much memory free: see the formulas above.

    A pattern after units is counted as one of the model that had them.
    """
    found = _of_pattern(footprint, task, method, pattern, machine, free)
    if pattern.then:
        task = replace(task, evaluated=0)
        after = estimate(footprint, task, method, pattern.then, machine, free)
        for phase, seconds in after.seconds.items():
            found.seconds[phase] = found.seconds.get(phase, 0.0) + seconds
        found.memory = max(found.memory, after.memory)
    return found


def _of_pattern(
    footprint: Footprint, task: Task, method: Method, pattern: Pattern, machine: Machine, free: int
) -> Estimate:
    """Return what a run takes but for the pattern after its units."""
    probe = torch.rand(512, 512, device=machine.device)
    keep = seconds(lambda: pattern.keep(probe), machine.device, 0.02) / probe.numel()
    run = replace(footprint, samples=task.samples, micro=task.micro, keep=keep)
    needs = needed(method, pattern)
    share = share_of(task.samples, method.share)
    sums = sum(_sum_bytes(linear, needs) for linear in run.linears)
    backward = task.backward
    if backward == "auto":
        by_model = (run.kept + run.kept_head) * max(1, task.micro // 4) + sums
        backward = "model" if by_model <= (free - run.weights) / 2 else "blocks"
    steps = (step.cost(run) for step in at_work(method, pattern).steps)
    pruning = reduce(add, steps, _allocation(run, method, pattern) + _choice(run, pattern))
    by_phase = {"prune": pruning.on(machine)}
    if needs:
        passes = 4 if backward == "blocks" else 3
        writes = 3 * sums + sum(4 * linear.weight.numel() for linear in run.linears)
        cost = Cost(share * (passes * run.trunk + 3 * run.head), share * writes)
        by_phase["gradients"] = cost.on(machine)
    evaluation = Cost(task.evaluated * (run.trunk + run.head)).on(machine)
    if task.evaluated:
        by_phase |= {"evaluate dense": evaluation, "evaluate": evaluation}
    held = 0 if task.kept else sums
    work = [held + HELD * pruning.memory]
    if needs:
        work.append(sums + HELD * _gradient_bytes(run, task, share, backward))
    if task.evaluated:
        batch = HEAD * run.kept_head + run.kept // len(run.blocks)
        work.append(held + task.together * batch)
    return Estimate(by_phase, round(_resting_bytes(run, task) + max(work)), backward)


def _sum_bytes(linear: Linear, needs: frozenset[str]) -> int:
    """Return the bytes of the sums of gradients of a linear."""
    names = needs & stats.GRADIENT.keys()
    shapes = [stats.GRADIENT[name].shape(*linear.shape, linear.positions) for name in names]
    return sum(4 * math.prod(shape) for shape in shapes)


def _allocation(run: Footprint, method: Method, pattern: Pattern) -> Cost:
    """Return the cost of spreading a budget over the linears."""
    allocation = allocated(method, pattern)
    if not allocation or allocation.name == "uniform":
        return Cost()
    weights = sum(linear.weight.numel() for linear in run.linears)
    passes = run.samples if allocation.needs & stats.INPUT.keys() else 0
    total = Cost(passes * run.trunk, 400 * weights)
    if any(allocation.trials):
        fewer, whole = allocation.trials
        positions = max(linear.positions for linear in run.linears)
        samples = min(run.samples, max(1, POSITIONS // positions))
        passes = fewer * -(-samples // FEWER) + whole * samples
        calls = 100 * len(run.blocks) * (fewer + FEWER * whole)
        total += Cost(passes * (run.trunk + 2 * run.head), calls=calls, memory=4 * weights)
    return total


def _choice(run: Footprint, pattern: Pattern) -> Cost:
    """Return the cost of choosing the blocks that go, and of the stream through the others."""
    if not shortens(pattern):
        return Cost()
    count = len(run.blocks)
    samples = share_of(run.samples, sample.SHARE, sample.FEWEST)
    losses = evaluations(count, round(pattern.units[0][1] * count))
    passes = losses * samples * (run.trunk + run.head) + 2 * run.samples * run.trunk
    return Cost(passes, memory=run.micro * (run.kept // count) + HEAD * run.kept_head)


def _resting_bytes(run: Footprint, task: Task) -> int:
    """Return the bytes of the weights and the batch, and of a copy of the blocks if need be."""
    memory = (task.samples + task.evaluated) * run.sample + run.weights
    blocks = [sum(p.nbytes for p in block.module.parameters()) for block in run.blocks]
    if task.offload:
        return memory + 2 * max(blocks) - sum(blocks)
    return memory + (sum(blocks) if task.several else 0)


def _gradient_bytes(run: Footprint, task: Task, samples: int, backward: str) -> int:
    """Return the bytes of a backward pass, but for the sums it makes."""
    if backward == "model":
        return max(1, task.micro // 4) * (run.kept + HEAD * run.kept_head)
    block = run.kept // len(run.blocks)
    streams = (len(run.blocks) + 2) * samples * run.stream
    return streams + task.micro * max(block, HEAD * run.kept_head)
