"""Coroutines: runs of a model's code that can wait in the middle, for each other.

A coroutine is a greenlet: a thread could wait as well, but every thread that computes brings a pool
of threads of its own. What Python and torch keep for each thread, a coroutine keeps for itself:
context variables, autocast, the grad mode and the function modes.
"""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode
from torch.overrides import _push_mode as push_mode


@dataclass(frozen=True)
class State:
    """What torch keeps for each thread: the grad mode, autocast of a device, the function modes."""

    device: str
    grad: bool
    autocast: bool
    dtype: torch.dtype
    cache: bool
    modes: tuple[TorchFunctionMode, ...]

    @classmethod
    def now(cls, device: str) -> "State":
        return cls(
            device,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.is_autocast_cache_enabled(),
            tuple(_get_current_function_mode_stack()),
        )

    def set(self) -> None:
        """Make it the state of this thread."""
        if self == State.now(self.device):
            return
        torch.set_grad_enabled(self.grad)
        torch.set_autocast_enabled(self.device, self.autocast)
        torch.set_autocast_dtype(self.device, self.dtype)
        torch.set_autocast_cache_enabled(self.cache)
        for _ in _get_current_function_mode_stack():
            _pop_mode()
        for mode in self.modes:
            push_mode(mode)


@dataclass(frozen=True)
class Scope:
    """Where a coroutine waits: the state and the context variables that code has there."""

    state: State
    context: contextvars.Context

    @contextmanager
    def inside(self) -> Iterator[contextvars.Context]:
        """Have the state, but for the grad mode, for a time; gives a copy of the context."""
        outside = State.now(self.state.device)
        replace(self.state, grad=outside.grad).set()
        try:
            yield self.context.copy()
        finally:
            outside.set()


class Coroutine:
    """A run of `work` that can wait: `switch` goes on with it until it waits or ends."""

    def __init__(self, work: Callable[[], Any], device: torch.device) -> None:
        self.greenlet = greenlet(lambda begun: work())
        self.greenlet.gr_context = contextvars.copy_context()
        self.state = State.now(device.type)

    def switch(self, value: Any = None) -> Any:
        """Let it go on, `wait` returning the value there; return what it waits with, or gives."""
        outside = State.now(self.state.device)
        self.state.set()
        try:
            return self.greenlet.switch(value)
        finally:
            self.state = State.now(outside.device)
            outside.set()

    def scope(self) -> Scope:
        """Return where it waits."""
        return Scope(self.state, (self.greenlet.gr_context or contextvars.Context()).copy())

    def close(self) -> None:
        """End it where it waits."""
        if not self.greenlet:  # not begun, or at its end
            return
        outside = State.now(self.state.device)
        self.state.set()
        try:
            self.greenlet.throw()
        finally:
            outside.set()


def wait(event: Any) -> Any:
    """Wait in the middle of a coroutine with an event; return what it is told to go on with."""
    parent = getcurrent().parent
    assert parent is not None
    return parent.switch(event)
