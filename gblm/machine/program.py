"""What every command of the package shares: how it ends, and the flags of the small ones."""

import argparse
import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable
from threading import current_thread, main_thread
from types import FrameType

from gblm.base import GblmError

atexit.register(gc.freeze)  # a process that ends need not look for garbage, which takes 0.3 s


def make_parser(program: str, about: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser of few flags, whose help ends in examples."""
    return argparse.ArgumentParser(
        program,
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def guarded(work: Callable[[], None], interrupted: str = "nothing half done stays") -> int:
    """Return the exit code of a command: 0, 2 for an error of the user's, 130 for Ctrl-C.

    interrupted: what is said after Ctrl-C.
    """
    try:
        with _Interrupts() as interrupts:
            work()
            sys.stdout.flush()
    except BrokenPipeError:  # who read it, as `head` does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        # Native code that Ctrl-C meets may turn it into an error of its own.
        if interrupts.seen or isinstance(error, KeyboardInterrupt):
            print(f"interrupted: {interrupted}", file=sys.stderr)
            return 130
        if not isinstance(error, GblmError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class _Interrupts:
    """Remembers, while it is entered, whether Ctrl-C was pressed; it raises as it always does."""

    seen = False

    def __enter__(self) -> "_Interrupts":
        self.before = signal.getsignal(signal.SIGINT)
        if self.before is signal.default_int_handler and current_thread() is main_thread():
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.default_int_handler(number, frame)
