"""Flags in a TOML file: read beside the command line, and written beside every result."""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shtab
import tomli_w
import torch

from gblm.base import GblmError
from gblm.command.flags import Parser, amount, several
from gblm.machine.files import write_text
from gblm.machine.processes import world
from gblm.report import versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "config.toml"
ASKED = ("config", "help", "list", "completion", "version")  # on a command line alone
APART = ("work-dir", "resume")  # where a run works, which does not change what it gives

Flags = dict[str, Any]  # values as TOML has them, by the names of the flags without dashes


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of a command line and of the file its --config names; the former win.

    Raises `GblmError` where a flag or a key is unknown, or its value is of another type.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    if args.config is None:
        return args
    stored = read(args.config, parser)
    try:
        parser.parse_args(stored)
    except GblmError as error:
        raise GblmError(f"{args.config}: {error}") from None
    return parser.parse_args([*stored, *given])


def read(path: Path, parser: Parser) -> list[str]:
    """Return what a file holds as the arguments of a command line.

    Raises `GblmError` where the file cannot be read, holds an unknown key, or a value of another
    type than its flag.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GblmError(f"{path} cannot be read ({reason}); give a TOML file of flags") from error
    arguments: list[str] = []
    for name, value in found.items():
        action = parser.flags.get(name)
        if action is None:
            raise GblmError(f"{path}: no flag is called {name}{parser.nearest(name, dashes='')}")
        if name in ASKED:
            raise GblmError(f"{path}: {name} goes on the command line alone; remove it")
        arguments += _arguments(path, name, action, value)
    return arguments


def _arguments(path: Path, name: str, action: argparse.Action, value: Any) -> list[str]:
    """Return what a key of a file and its value are on a command line."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if action.nargs == 0:
        right, said = isinstance(value, bool), "true or false"
        text = None
    elif action.type is int:
        right, said, text = number and isinstance(value, int), "a whole number", str(value)
    elif action.type is float:
        right, said, text = number, "a number", str(value)
    elif action.type is several:
        values = value if isinstance(value, list) else [value]
        right = all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in values)
        said, text = "a string, or a list of them", ",".join(str(v) for v in values)
    else:
        right = isinstance(value, str) or (action.type is amount and number)
        said, text = "a number or a string" if action.type is amount else "a string", str(value)
    if not right:
        raise GblmError(f"{path}: {name} is {value!r}; give {said}")
    if text is None:
        return [f"--{name}"] if value else []
    return [f"--{name}={text}"]


@dataclass
class Recipe:
    """The flags that the results of a command depend on, to be written beside each of them."""

    program: str
    flags: Flags

    def write(self, folder: Path, **own: Any) -> None:
        """Write the flags of one run, those of its `own` in their place, into its folder."""
        found = ", ".join(f"{name} {number}" for name, number in versions().items())
        head = [
            f"Repeat this run: {self.program} --config {NAME} --output DIR",
            f"It ran with {found};",
            f"processes: {world()}, threads of each: {torch.get_num_threads()}.",
        ]
        text = "".join(f"# {line}\n" for line in head) + "\n" + tomli_w.dumps(self.flags | own)
        write_text(folder / NAME, text)


def recipe(parser: Parser, args: argparse.Namespace, names: Collection[str]) -> Recipe:
    """Return the recipe of a command's flags, with local paths made absolute.

    names: values that are never paths, such as those of known data sets.
    """
    found: Flags = {}
    for group in ("what", "how", "calibration", "evaluation", "memory", "scale"):
        for action in parser.titled[group]._group_actions:
            name = action.option_strings[-1][2:]
            value = getattr(args, action.dest)
            if name in APART or value is None or value is False:
                continue
            if action.type is several:
                parts = [p for p in (part.strip() for part in value.split(",")) if p]
                value = [_absolute(action, part, names) for part in parts]
                value = value[0] if len(value) == 1 else value
            elif not isinstance(value, bool | int | float):
                value = _absolute(action, str(value), names)
            found[name] = value
    return Recipe(parser.prog, found)


def _absolute(action: argparse.Action, text: str, names: Collection[str]) -> str:
    """Return a value of a flag, absolute where it is the path of something that is there."""
    complete = getattr(action, "complete", None)
    path = Path(text).expanduser()
    there = path.is_dir() if complete is shtab.DIRECTORY else path.exists()
    if complete in (shtab.FILE, shtab.DIRECTORY) and there and text not in names:
        return os.path.abspath(path)
    return text
