"""A smaller model of the same family: modules of an empty copy take the place of its own.

The copy is built by the family's own code, from a config that states what is left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm.base import Adapter, GblmError, Pattern, Statistics, reason
from gblm.machine.offload import offload_of, onload
from gblm.walk.blocks import Block, Units, frozen, take, to_device
from gblm.walk.call import Output
from gblm.walk.visit import Visit
from gblm.walk.walk import Walk

STATED = ("config", "_model_args", "narrowed")  # where models keep what made them
SAME = 1e-3  # the most by which the smaller model may differ from the one that passes units by


@dataclass
class Rebuilt(ABC):
    """A model that becomes smaller, and what is known of that before any work.

    units: those of each block from which some go, by its name. gone: the names of blocks that go.
    renamed: of each block that stays, its name by that in the smaller model, where it has another.
    lost: which rows of linears go, by their names, where that is chosen beforehand. empty: the
    copy. before, moves: what `undo` undoes; it gives the model back what it had before `apply`,
    whose weights that leaves as they are.
    """

    model: nn.Module
    blocks: list[Block]
    units: dict[str, list[Units]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    lost: dict[str, Tensor] = field(default_factory=dict)
    empty: nn.Module = field(default_factory=nn.Module)
    before: list[tuple[Any, str, Any]] = field(default_factory=list)
    moves: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    @abstractmethod
    def of(cls, walk: Walk, pattern: Pattern) -> Rebuilt:
        """Return how a model becomes as small as a pattern says; `GblmError` if it cannot."""

    def choose(self, walk: Walk, gradients: Mapping[str, Statistics]) -> None:
        """Choose what the steps of a method do not choose."""
        return

    def outputs(self, visit: Visit) -> list[Output] | None:
        """Return what stands for the outputs of a block that goes, None where it still runs."""
        return None

    @contextmanager
    def passing(self, names: list[str]) -> Iterator[None]:
        """Have the model pass blocks by for a time."""
        yield

    @abstractmethod
    def apply(self) -> None:
        """Make the model smaller, in place."""

    @torch.no_grad()
    def check(
        self,
        walk: Walk,
        make: Callable[[], nn.Module],
        what: str,
        way: str = "choose other units",
    ) -> None:
        """Make the copy; raises `GblmError` where it is not the model without what goes."""
        batch = to_device(next(iter(walk.micro_batches())).batch, walk.device)
        one = take(batch, slice(0, 1))
        with frozen(walk.model):
            with self.passing(self.gone):
                wanted = _hidden(walk, one)
            try:
                self.empty = make()
                self.apply()
                found = _hidden(walk, one)
            except Exception as error:  # whatever the model's code has against it
                self.undo()
                raise GblmError(f"{what} cannot be ({reason(error)}); {way}") from error
            self.undo()
        for own, other in zip(found, wanted, strict=True):
            if not (own - other).norm() <= SAME * other.norm():
                raise GblmError(f"{what} makes other blocks of those that stay; {way}")

    def put(self, name: str, new: nn.Module) -> None:
        """Put a module in the place of one of the model's."""
        self.before.append((self.model, name, self.model.get_submodule(name)))
        self.model.set_submodule(name, new)

    def fill(
        self, new: nn.Module, old: nn.Module, name: str, left: Callable[[], dict[str, nn.Parameter]]
    ) -> None:
        """Fill a module of the copy with what is left of an old one, which rests where that did.

        name: of the new one in the model. left: gives its parameters, those of the old at hand.
        """
        offload = offload_of(self.model)
        with onload(old):
            fill(new, old, left())
            if offload:
                self.moves.append(offload.exchange(old, new, name))

    def state(self) -> None:
        """Give the model the config of the copy."""
        for name, module in self.empty.named_modules():
            own = self.model.get_submodule(name)
            for key in STATED:
                if key in vars(module) and vars(own).get(key) is not vars(module)[key]:
                    self.before.append((own, key, vars(own).get(key)))
                    setattr(own, key, vars(module)[key])

    def undo(self) -> None:
        """Give the model back what it had."""
        for owner, name, value in reversed(self.before):
            if isinstance(value, nn.Module):
                owner.set_submodule(name, value)
            elif value is None:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)
        self.before.clear()
        for move in reversed(self.moves):
            move()
        self.moves.clear()


@contextmanager
def forwards(model: nn.Module, instead: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Have modules, by their names in a model, do something else for a time."""
    with ExitStack() as stack:
        for name, forward in instead.items():
            module = model.get_submodule(name)
            stack.callback(vars(module).pop, "forward")
            module.forward = forward
        yield


def _hidden(walk: Walk, batch: Any) -> list[Tensor]:
    return [x.float() for x in tree_flatten(walk.adapter.trunk(walk.model, batch))[0]]


def settings_of(
    model: nn.Module, adapter: Adapter, pattern: Pattern
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], nn.Module]]:
    """Return the settings of a model, and what makes an empty one of changed ones.

    Raises `GblmError` where its adapter does not know them.
    """
    if adapter.config is None:
        raise GblmError(
            f"{pattern.name}: the config of {type(model).__name__} is not known; give its adapter "
            "a config(model)"
        )
    return adapter.config(model)


def fill(new: nn.Module, old: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give a module of an empty copy parameters by name, and the buffers of an old one."""
    for name, parameter in parameters.items():
        owner, _, last = name.rpartition(".")
        setattr(new.get_submodule(owner), last, parameter)
    known, device = dict(old.named_buffers()), next(iter(parameters.values())).device
    for name, buffer in list(new.named_buffers()):
        owner, _, last = name.rpartition(".")
        same = name in known and known[name].shape == buffer.shape
        new.get_submodule(owner)._buffers[last] = known[name].clone() if same else buffer.to(device)
    new.train(old.training)
