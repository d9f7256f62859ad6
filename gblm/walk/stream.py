"""The stream between blocks: which matrices read it, through which norms, and which write it.

A run of one sample shows it: a matrix that sees what a norm of the stream gives reads it, any other
whose outputs are as wide writes it. Outside of the blocks, what is at work before the first of
them writes, and what comes after the last reads. Whether that is all, a rotation drawn at random
tells: a model turned by it must give the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import Batch, GblmError
from gblm.maths.rotation import rotation_of
from gblm.maths.stats import wide
from gblm.walk.blocks import Block, Linear, frozen, hooked, take, to_device
from gblm.walk.head import hidden
from gblm.walk.products import Products, Use
from gblm.walk.survey import survey
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

SAME = 0.1  # the most by which a turned model may differ: weights of 16 bits are rounded anew


@dataclass(eq=False)
class Turned:
    """A matrix `[out, in]` that turns with the stream, written through, and its bias.

    linear: the linear of a block that it is, None outside.
    """

    weight: Tensor
    bias: Tensor | None = None
    linear: Linear | None = None


@dataclass
class Reading:
    """A norm of the stream, and the matrices that see what it gives."""

    norm: Any
    matrices: list[Turned] = field(default_factory=list)

    def fold(self) -> None:
        """Let the matrices do what the weights w of the norm do; its bias b becomes b / w."""
        scale, neutral = scales(self.norm)
        for own in self.matrices:
            own.weight.copy_(wide(own.weight) * scale)
        self.norm.weight.fill_(neutral)
        if self.bias is not None:
            self.bias.copy_(wide(self.bias) / scale)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the norm."""
        own: Tensor | None = getattr(self.norm, "bias", None)
        return own


@dataclass
class Stream:
    """What turns with the stream of a model, whose width is d.

    centred: whether its norms take the mean off. before: parameters outside of the blocks that
    write it, with the dimension that does.
    """

    width: int = 0
    centred: bool = False
    readings: list[Reading] = field(default_factory=list)
    writers: list[Turned] = field(default_factory=list)
    before: list[tuple[nn.Parameter, int]] = field(default_factory=list)

    def fold(self) -> None:
        """Fold every norm into what reads it."""
        for reading in self.readings:
            reading.fold()

    def turn(self, rotation: Tensor) -> None:
        """Turn the stream by a rotation R `[d, d]`: readers W become WR, writers RᵀW."""
        exact = rotation.double().cpu()
        exact = exact @ (1.5 * torch.eye(len(exact)) - 0.5 * exact.T @ exact)

        def turned(value: Tensor) -> Tensor:
            value = wide(value)
            return value @ exact.to(value)

        for own in (own for reading in self.readings for own in reading.matrices):
            own.weight.copy_(turned(own.weight))
        for own in self.writers:
            own.weight.copy_(turned(own.weight.T).T)
        biases = [*(own.bias for own in self.writers), *(own.bias for own in self.readings)]
        for bias in biases:
            if bias is not None:
                bias.copy_(turned(bias))
        for parameter, dim in self.before:
            parameter.copy_(turned(parameter.detach().movedim(dim, -1)).movedim(-1, dim))


class Whole:
    """The parameters of a model at some time; from then on its head has weights of its own."""

    def __init__(self, walk: Walk) -> None:
        self.tie = walk.adapter.untied(walk.model)
        self.before = {own: own.detach().clone() for own in walk.model.parameters()}

    def forget(self, blocks: list[Block]) -> None:
        """Forget the parameters of the blocks."""
        for own in (own for block in blocks for own in block.module.parameters()):
            self.before.pop(own, None)

    def undo(self) -> None:
        """Give the model back what is known of it."""
        for own, value in self.before.items():
            own.detach().copy_(value)
        self.tie()


def find_stream(walk: Walk) -> Stream:
    """Return the stream of a model whose head has weights of its own.

    Raises `GblmError` where there is none that could turn.
    """
    batch = to_device(next(iter(walk.micro_batches())).batch, walk.device)
    one = take(batch, slice(0, 1))
    blocks, stream = survey(walk.model, one, walk.adapter), Stream()
    forward(replace(walk, batch=one, blocks=blocks), lambda visit: _add(visit, stream))
    with frozen(walk.model), torch.no_grad():
        _add_outside(walk, blocks, one, stream)
        norm = stream.readings[-1].norm
        x = torch.randn(8, stream.width).to(norm.weight)
        near, far = wide(norm(x)), wide(norm(x + 3))
    stream.centred = bool((near - far).norm() < SAME * near.norm())
    return stream


@torch.no_grad()
def check_turns(walk: Walk) -> None:
    """Raise `GblmError` where a model turned at random does not give the same."""
    way = "its stream cannot be turned; use --rotate 0"
    if walk.adapter.logits is None:
        raise GblmError(f"{type(walk.model).__name__} has an adapter without logits, so {way}")
    whole = Whole(walk)
    try:
        batch = to_device(next(iter(walk.micro_batches())).batch, walk.device)
        one = take(batch, slice(0, 1))
        with frozen(walk.model):
            wanted = _given(walk, one)
            stream = find_stream(walk)
            stream.fold()
            draw = torch.Generator().manual_seed(0)
            free = torch.randn(stream.width, stream.width, generator=draw).to(walk.device)
            stream.turn(rotation_of(free, stream.centred))
            found = _given(walk, one)
    except GblmError as error:
        raise GblmError(f"{type(walk.model).__name__}: {error}; {way}") from error
    finally:
        whole.undo()
    if not (found - wanted).norm() <= SAME * wanted.norm():
        raise GblmError(f"{type(walk.model).__name__} gives something else once turned, so {way}")


def _given(walk: Walk, batch: Batch) -> Tensor:
    assert walk.adapter.logits
    return wide(walk.adapter.logits(walk.model, hidden(walk, batch), batch))


def scales(norm: Any) -> tuple[Tensor, float]:
    """Return by what a norm multiplies, `[d]`, and the weight with which it multiplies by 1."""
    own = norm.weight.detach().clone()
    x = torch.randn(64, len(own)).to(own)
    shift = getattr(norm, "bias", None)
    for neutral in (1.0, 0.0):
        norm.weight.fill_(neutral)
        given = wide(norm(x)) - (0 if shift is None else wide(shift))
        norm.weight.copy_(own)
        if abs(given.square().mean().sqrt().item() - 1) < SAME:
            return wide(own) + (1 - neutral), neutral
    raise GblmError(f"{type(norm).__name__} does not make its inputs alike")


def _norms(modules: Iterable[nn.Module], width: int) -> list[nn.Module]:
    """Return the modules whose weight is one number for each channel, and their bias as well."""
    return [
        own
        for own in modules
        if {*own._parameters} <= {"weight", "bias"}
        and not [*own.children()]
        and isinstance(own._parameters.get("weight"), Tensor)
        and own.weight.shape == (width,)
    ]


def _add(visit: Visit, stream: Stream) -> None:
    """Add the readings and writers of a block."""
    call, block = visit.calls[0].sample(0), visit.block
    leaves = (x for x in call.leaves if isinstance(x, Tensor) and x.is_floating_point())
    width = next(leaves).shape[-1]
    if stream.width not in (0, width):
        raise GblmError(f"its blocks are {stream.width} and {width} wide")
    stream.width = width
    given: dict[int, Reading] = {}
    kept: list[Tensor] = []

    def note(norm: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)
        given[output.untyped_storage()._cdata] = Reading(norm)

    watch = _Seen(block.linears)
    with hooked(x.register_forward_hook(note) for x in _norms(block.module.modules(), width)):
        visit.outputs = [call.run(call.arguments(slice(0, 1)), watch=watch)]
    for linear in block.linears:
        own = Turned(linear.weight, _bias(visit.walk.model, linear), linear)
        storage = watch.inputs[linear.name].untyped_storage()._cdata
        if storage in given:
            given[storage].matrices.append(own)
        elif linear.shape[0] == width:
            stream.writers.append(own)
    stream.readings += given.values()


class _Seen(Products):
    """Keeps what every linear sees."""

    def __init__(self, linears: Iterable[Linear]) -> None:
        super().__init__(linears)
        self.inputs: dict[str, Tensor] = {}

    def before(self, linear: Linear, use: Use) -> None:
        self.inputs[linear.name] = use.input


def _bias(model: nn.Module, linear: Linear) -> Tensor | None:
    """Return the bias of the module that a linear is the weight of, None for no such."""
    try:
        module = model.get_submodule(linear.name)
    except AttributeError:
        return None
    own = module._parameters.get("bias")
    return own if module._parameters.get("weight") is linear.parameter else None


def _add_outside(walk: Walk, blocks: list[Block], one: Batch, stream: Stream) -> None:
    """Add what writes the stream before the blocks, and the norm and the matrices after them."""
    inside = {own for block in blocks for own in block.module.modules()}
    outside = [own for own in walk.model.modules() if own not in inside]
    first: list[nn.Module] = []
    after: list[nn.Module] = []
    begun: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        (after if begun else first).append(module)

    hooks = [own.register_forward_pre_hook(note) for own in outside if not [*own.children()]]
    hooks.append(blocks[0].module.register_forward_pre_hook(lambda own, *_: begun.append(own)))
    with hooked(hooks):
        _given(walk, one)
    single = [own for own in outside if [*own.children()]]
    for own in dict.fromkeys([*first, *single]):
        matrix = isinstance(own, nn.Linear | nn.modules.conv._ConvNd)
        for parameter in own.parameters(recurse=False):
            dim = 0 if matrix else parameter.ndim - 1
            if parameter.shape[dim] == stream.width:
                stream.before.append((parameter, dim))
    norms = _norms(dict.fromkeys(after), stream.width)
    heads = [own for own in dict.fromkeys(after) if isinstance(own, nn.Linear)]
    if len(norms) != 1 or not heads:
        raise GblmError(f"between its blocks and its head are {len(norms)} norms")
    matrices = [Turned(own.weight.detach(), own.bias) for own in heads]
    stream.readings.append(Reading(norms[0], matrices))
