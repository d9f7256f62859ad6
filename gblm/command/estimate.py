"""What a run would do and take: read off one sample, nothing run.

A model without values (on the meta device, or of fake tensors) shows its blocks and linears as any
other does, and what one sample computes and keeps. With n samples, F the operations of a sample's
forward pass through the blocks, B those of its linears alone (2 per weight and position), H those
of the head, E samples to evaluate on, W the bytes of the weights:

    gradients = n'·(4F + 3H)       by blocks: forward, again, by inputs, by weights; 3F by the model
    forward   = n·2F               statistics, then outputs; n·F more for each of: the dense stream,
                                   a target of refinement, the outputs after it
    gram      = n·Σ 2·in²·t        of each group, for each Gram matrix; half where it is symmetric
    refine    = passes·n·3F        and 64 bytes for each weight and step
    error     = 4·Σ out·in·min(n·t, 2048)
    solve     = see `SOLVERS`
    evaluate  = E·(F + H)

over the rates at which this machine multiplies matrices and adds in memory, measured in a fraction
of a second. Sums of gradients and of scores are counted in bytes. Not counted: reading the model
and the data, and writing the result.

Memory is W, the batch, the sums of gradients and, where runs share a model, a copy of its blocks,
beside the largest of: the activations that a backward pass keeps; the stream with what a
micro-batch and a solver hold; a batch of the evaluation. Within about a factor of 1.5, as seconds
are within about 2.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm.base import Adapter, Batch, Method, Pattern
from gblm.machine.device import peak_memory, resident
from gblm.maths import stats
from gblm.walk.gradients import FEWEST, activations
from gblm.walk.prune import allocated, needed
from gblm.walk.regional import SAMPLES
from gblm.walk.survey import Block, Linear, hooked, quiet, survey

log = logging.getLogger(__name__)

# The part of the measured rate that a model reaches, what stands between its products included.
EFFICIENCY = 0.8
# Of the memory that work takes, what an allocator holds for it; of the head, logits beside losses.
HELD, HEAD = 1.5, 3


@dataclass
class Look:
    """What one sample tells of a model; bytes and operations are those of a sample.

    stream: bytes of a block's input. kept: of what a backward pass of the blocks keeps, and of the
    head. trunk, head: operations.
    """

    blocks: list[Block]
    weights: int
    numbers: int
    sample: int
    stream: int
    kept: int
    kept_head: int
    trunk: int
    head: int

    @property
    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block.linears]


def look(model: nn.Module, one: Batch, adapter: Adapter) -> Look:
    """Return what a batch of one sample tells of a model, which may have no values."""
    from torch.utils.flop_counter import FlopCounterMode

    blocks = survey(model, one, adapter)
    stream = 0

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal stream
        leaves = tree_flatten((args, kwargs))[0]
        stream = max(stream, *(x.nbytes for x in leaves if isinstance(x, Tensor) and x.ndim), 0)

    hooks = [b.module.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    counter = FlopCounterMode(display=False)
    with quiet(model), torch.no_grad(), hooked(hooks), counter:
        hidden = adapter.trunk(model, one)
        trunk = counter.get_total_flops()
        adapter.loss(model, hidden, one)
    with quiet(model), torch.enable_grad():
        kept, kept_head = activations(model, one, adapter, blocks)
    parameters = list(model.parameters())
    return Look(
        blocks,
        weights=sum(own.nbytes for own in parameters),
        numbers=sum(own.numel() for own in parameters),
        sample=sum(value.nbytes for value in one.values()),
        stream=stream,
        kept=kept,
        kept_head=kept_head,
        trunk=trunk,
        head=counter.get_total_flops() - trunk,
    )


@dataclass
class Machine:
    """How quick a device is: operations and bytes a second, and the seconds of a small call."""

    device: torch.device
    operations: float
    bytes: float
    call: float


def measure(device: torch.device, dtype: torch.dtype, width: int, least: float = 0.05) -> Machine:
    """Measure a device for about three times `least` seconds, by products of that width."""
    width = min(width, 2048)
    x = torch.ones(1024, width, dtype=dtype, device=device)
    w = torch.ones(width, width, dtype=dtype, device=device)
    large = torch.ones(2**22, device=device)
    small = torch.ones(8, device=device)
    return Machine(
        device,
        operations=2 * 1024 * width * width / _seconds(lambda: x @ w, device, least),
        bytes=3 * large.nbytes / _seconds(lambda: large.add_(large), device, least),
        call=_seconds(lambda: small.add_(small), device, least),
    )


def _seconds(work: Callable[[], Any], device: torch.device, least: float) -> float:
    """Return the seconds of the quickest call, of as many as take `least` of them."""
    calls: list[float] = []
    work()
    while sum(calls) < least:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        calls.append(time.perf_counter() - start)
    return min(calls)


@dataclass
class Cost:
    """Operations of matrix products, bytes that are read or written, small calls, other seconds."""

    operations: float = 0
    bytes: float = 0
    calls: float = 0
    seconds: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.operations + other.operations,
            self.bytes + other.bytes,
            self.calls + other.calls,
            self.seconds + other.seconds,
        )

    def on(self, machine: Machine) -> float:
        """Return the seconds on a machine."""
        products = self.operations / (machine.operations * EFFICIENCY)
        return products + self.bytes / machine.bytes + self.calls * machine.call + self.seconds


# The cost of a linear [out, in] by the last part of a method's name; keep: seconds of one mask.
# A Cholesky factor takes in³/3 operations, the inverse from it 2·in³/3.
SOLVERS: dict[str, Callable[[int, int, float], Cost]] = {
    "sparsegpt": lambda o, i, keep: Cost(4 / 3 * i**3 + o * i**2, 512 * o * i, 4 * i, keep),
    "admm": lambda o, i, keep: Cost(10 * i**3 + 104 * o * i**2, 1600 * o * i, 600, 40 * keep),
    "repair": lambda o, i, keep: Cost(200 * o * i**2, 4000 * o * i, 1000, keep),
}
SOLVERS["best"] = SOLVERS["admm"]


def _masked(o: int, i: int, keep: float) -> Cost:
    """Return the cost of a score and a mask by it."""
    return Cost(0, 40 * o * i, 20, keep)


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
    found: Look, task: Task, method: Method, pattern: Pattern, machine: Machine, free: int
) -> Estimate:
    """Return what a run takes, on a machine with so much memory free: see the formulas above."""
    needs = needed(method, pattern)
    some = min(task.samples, max(FEWEST, round(method.share * task.samples)))
    sums = sum(_sum_bytes(linear, needs) for linear in found.linears)
    backward = task.backward
    if backward == "auto":
        whole = (found.kept + found.kept_head) * max(1, task.micro // 4) + sums
        backward = "model" if whole <= (free - found.weights) / 2 else "blocks"
    seconds = {"prune": _prune(found, task, method, pattern, machine).on(machine)}
    if needs:
        passes = 4 if backward == "blocks" else 3
        writes = sum(
            _sum_bytes(linear, needs) * 3 + 4 * linear.weight.numel() for linear in found.linears
        )
        cost = Cost(some * (passes * found.trunk + 3 * found.head), some * writes)
        seconds["gradients"] = cost.on(machine)
    evaluation = Cost(task.evaluated * (found.trunk + found.head)).on(machine)
    if task.evaluated:
        seconds |= {"evaluate dense": evaluation, "evaluate": evaluation}
    held = 0 if task.kept else sums
    memory = (task.samples + task.evaluated) * found.sample + found.weights
    own = [sum(p.nbytes for p in block.module.parameters()) for block in found.blocks]
    if task.offload:
        memory += 2 * max(own) - sum(own)
    elif task.several:
        memory += sum(own)
    work = [held + HELD * _prune_bytes(found, task, method)]
    if needs:
        work.append(sums + HELD * _gradient_bytes(found, task, some, backward))
    if task.evaluated:
        batch = HEAD * found.kept_head + found.kept // len(found.blocks)
        work.append(held + task.together * batch)
    return Estimate(seconds, round(memory + max(work)), backward)


def _sum_bytes(linear: Linear, needs: frozenset[str]) -> int:
    """Return the bytes of the sums of gradients of a linear."""
    outputs, inputs = linear.shape
    table = stats.GRADIENT
    shapes = [table[name].shape(outputs, inputs, linear.positions) for name in needs & set(table)]
    return sum(4 * torch.Size(shape).numel() for shape in shapes)


def _prune(found: Look, task: Task, method: Method, pattern: Pattern, machine: Machine) -> Cost:
    """Return the cost of pruning: forward passes, statistics, solutions, refinement."""
    n, beside = task.samples, "cross_gram" in method.needs
    passes = 2 + (1 if method.refine else 0)
    total = Cost(n * passes * found.trunk)
    probe = torch.rand(512, 512, device=machine.device)
    keep = _seconds(lambda: pattern.keep(probe), machine.device, 0.02) / probe.numel()
    solver = SOLVERS.get(method.name.rpartition("+")[2], _masked)
    for block in found.blocks:
        for group in block.groups:
            inputs, rows = group[0].shape[1], n * group[0].positions
            total += Cost(bytes=8 * rows * inputs)
            if "input_gram" in method.needs:
                total += Cost(1.1 * inputs**2 * rows)
            if beside:
                total += Cost(2 * inputs**2 * rows)
        for linear in block.linears:
            outputs, inputs = linear.shape
            total += Cost(4 * outputs * inputs * min(n * linear.positions, 2048))
            total += solver(outputs, inputs, keep * outputs * inputs)
    spent = allocated(method, pattern)
    if spent and spent.name != "uniform":
        weights = sum(linear.weight.numel() for linear in found.linears)
        total += Cost(n * found.trunk if spent.needs & set(stats.INPUT) else 0, 400 * weights)
    if method.regional:
        total += Cost((6 if method.rounds else 3) * n * found.trunk)
    if method.rounds:  # the target, statistics, a step, and one more of all statistics
        rounds = 5 * method.rounds * min(n, SAMPLES)
        total += Cost((rounds + n) * found.trunk)
    return total + _refine(found, task, method)


def _refine(found: Look, task: Task, method: Method) -> Cost:
    """Return the cost of refinement: a backward pass, and Adam on the weights at every step."""
    if not method.refine:
        return Cost()
    positions = max(linear.positions for linear in found.linears)
    steps = max(1, round(method.refine * task.samples / max(1, 512 // positions)))
    weights = sum(linear.weight.numel() for linear in found.linears)
    small = 60 * steps * len(found.blocks)
    return Cost(method.refine * task.samples * 3 * found.trunk, 64.0 * weights * steps, small)


def _gradient_bytes(found: Look, task: Task, samples: int, backward: str) -> int:
    """Return the bytes of a backward pass, but for the sums it makes."""
    if backward == "model":
        return max(1, task.micro // 4) * (found.kept + HEAD * found.kept_head)
    block = found.kept // len(found.blocks)
    streams = (len(found.blocks) + 2) * samples * found.stream
    return streams + task.micro * max(block, HEAD * found.kept_head)


def _prune_bytes(found: Look, task: Task, method: Method) -> int:
    """Return the bytes of the stream, and of what works on one block at its side."""
    n, beside = task.samples, "cross_gram" in method.needs
    block = found.kept // len(found.blocks)
    grams = len({"input_gram", "cross_gram"} & method.needs)
    widest = max(linear.positions * linear.shape[1] * 4 for linear in found.linears)
    if beside:  # all of both streams wait before a group
        stream = 2 * n * (2 * found.stream + widest)
    else:
        stream = n * found.stream * (3 if method.refine else 2)
    groups = [[4 * g[0].shape[1] ** 2 * grams for g in b.groups] for b in found.blocks if b.groups]
    statistics = max(max(own) if beside else sum(own) for own in groups)
    solving = max(4 * (4 * o * i + 4 * grams * i**2) for o, i in (x.shape for x in found.linears))
    refining = 0
    if method.refine:
        own = max(sum(x.weight.numel() for x in b.linears) for b in found.blocks)
        refining = 24 * own
    return stream + statistics + max(solving, refining, task.micro * block)
