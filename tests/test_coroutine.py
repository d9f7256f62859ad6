"""Strands: what Python and torch keep for each thread, each of them keeps for itself."""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from gblm.walk.coroutine import Coroutine, State, wait

CPU = torch.device("cpu")
NAME: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")


class Mode(TorchFunctionMode):
    """Changes nothing; stands on the stack of modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def coroutine(work: Callable[[], Any]) -> Coroutine:
    return Coroutine(work, CPU)


@contextmanager
def named(name: str) -> Iterator[None]:
    token = NAME.set(name)
    try:
        yield
    finally:
        NAME.reset(token)


# What a model's code may be in the middle of, by name.
INSIDE: dict[str, Callable[[], Any]] = {
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of another dtype": lambda: torch.autocast("cpu", torch.float16),
    "autocast without its cache": lambda: torch.autocast(
        "cpu", torch.bfloat16, cache_enabled=False
    ),
    "a function mode": Mode,
    "a context variable": lambda: named("inside"),
}


def state() -> tuple[State, str]:
    return State.now("cpu"), NAME.get()


def test_a_strand_waits_with_a_value_and_goes_on_with_one():
    def work() -> str:
        first = wait("one")
        second = wait(first + 1)
        return f"{first} {second}"

    run = coroutine(work)
    assert run.switch() == "one"
    assert run.switch(2) == 3
    assert run.switch(5) == "2 5"


@pytest.mark.parametrize("names", [[name] for name in INSIDE] + [list(INSIDE), [*INSIDE][::-1]])
def test_what_a_strand_is_in_the_middle_of_is_its_own(names):
    found = []

    def work() -> None:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(INSIDE[name]())
            found.append(state())
            wait(None)
            found.append(state())
        found.append(state())

    outside = state()
    run = coroutine(work)
    run.switch()
    assert found[0] != outside
    assert state() == outside
    with torch.no_grad(), Mode(), named("elsewhere"):  # which the coroutine does not see
        other = state()
        run.switch()
        assert state() == other
    assert found[1] == found[0]
    assert found[2] == outside
    assert state() == outside


def test_a_strand_begins_with_what_there_is_when_it_is_made():
    found = []
    with torch.no_grad(), Mode(), named("maker"):
        made = state()
        run = coroutine(lambda: found.append(state()))
    run.switch()
    assert found == [made]


def test_strands_know_nothing_of_each_other():
    order = list(INSIDE)
    found: dict[str, list[tuple[State, str]]] = {name: [] for name in order}

    def work(name: str) -> None:
        with INSIDE[name]():
            for _ in range(3):
                found[name].append(state())
                wait(None)

    outside = state()
    runs = {name: coroutine(lambda name=name: work(name)) for name in order}
    for names in (order, order[::-1], order[2:] + order[:2]):
        for name in names:
            runs[name].switch()
            assert state() == outside
    for name in order:
        assert len(found[name]) == 3
        if name != "a function mode":  # of which each has another
            with INSIDE[name]():
                assert found[name] == [state()] * 3
    for run in runs.values():
        run.close()


@pytest.mark.parametrize("error", [ValueError("planted"), KeyboardInterrupt()])
def test_an_exception_leaves_everything_as_it_was(error):
    def work() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Mode(), named("inside"):
            wait(None)
            raise error

    outside, run = state(), coroutine(work)
    run.switch()
    with pytest.raises(type(error)):
        run.switch()
    assert state() == outside
    run.close()
    assert state() == outside


def test_a_strand_that_is_closed_ends_where_it_waits_in_a_state_of_its_own():
    found = []

    def work() -> None:
        with torch.no_grad(), Mode(), named("inside"):
            try:
                found.append(state())
                wait(None)
                found.append("not reached")
            finally:
                found.append(state())

    outside, run = state(), coroutine(work)
    run.switch()
    run.close()
    run.close()
    assert found[0] == found[1]
    assert len(found) == 2
    assert state() == outside


def test_a_strand_that_has_not_begun_or_is_at_its_end_is_closed_without_a_trace():
    calls: list[int] = []
    coroutine(lambda: calls.append(1)).close()
    assert not calls
    run = coroutine(lambda: calls.append(2))
    run.switch()
    run.close()
    assert calls == [2]


def test_a_place_has_the_state_of_a_strand_but_for_the_grad_mode_after_its_end_too():
    def work() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Mode(), named("inside"):
            wait(None)
            assert NAME.get() == "inside"

    outside, run = state(), coroutine(work)
    run.switch()
    place = run.scope()
    for _ in range(2):
        with place.inside() as context:
            assert torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
            assert len(_get_current_function_mode_stack()) == 1
            assert context.run(NAME.get) == "inside"
            context.run(NAME.set, "changed")  # in a copy
        assert state() == outside
        with torch.no_grad(), place.inside():
            assert not torch.is_grad_enabled()
        with pytest.raises(ValueError, match="planted"), place.inside():
            raise ValueError("planted")
        assert state() == outside
        run.switch() if run.greenlet else None
    assert not run.greenlet


def test_tensors_made_in_a_strand_know_its_grad_mode():
    def work() -> None:
        x = torch.ones(1, requires_grad=True)
        with torch.no_grad():
            wait((x * 2).requires_grad)
            wait((x * 2).requires_grad)
        wait((x * 2).requires_grad)

    run = coroutine(work)
    found = [run.switch()]
    assert (torch.ones(1, requires_grad=True) * 2).requires_grad
    with torch.no_grad():
        found += [run.switch(), run.switch()]
    assert found == [False, False, True]
    run.close()
