"""The flags of both sides: a parser in groups, what can be listed, completion for shells."""

import argparse
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import shtab

from gblm.base import GblmError, one_of
from gblm.machine.device import DTYPES
from gblm.machine.offload import OFFLOADS
from gblm.maths import patterns
from gblm.maths.allocation import ALLOCATIONS
from gblm.maths.scores import NORMS
from gblm.methods import METHODS, SOLVERS
from gblm.walk.gradients import BACKWARDS

# The groups of --help, in their order; a flag is one line: parser.add(its group, …).
GROUPS = {
    "what": "what to prune",
    "how": "how to prune (METHODS and PATTERNS: one, or several with commas and then compared)",
    "calibration": "calibration",
    "evaluation": "evaluation, before and after",
    "memory": "memory and speed",
    "scale": "large models, and several processes (torchrun --nproc-per-node 8 -m …)",
    "output": "output",
    "help": "help",
}

SHELLS = ("bash", "zsh", "tcsh")
EXITS = "exit codes: 0 done, 2 something given is wrong (the message says what), 130 interrupted"


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of 100 columns, with the examples as they are written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


class Parser(argparse.ArgumentParser):
    """An argument parser whose flags stand in `GROUPS`, and whose errors are `GblmError`."""

    def __init__(self, program: str, description: str, examples: str) -> None:
        super().__init__(
            program,
            usage=f"{program} [--model MODEL] [flags]",
            description=f"{description}\n\n{examples.rstrip()}",
            epilog=EXITS,
            formatter_class=Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.titled = {name: self.add_argument_group(title) for name, title in GROUPS.items()}

    def add(
        self, group: str, flag: str, help: str, value: str | None = None, **options: Any
    ) -> None:
        """Add a flag to one of the `GROUPS`; `value` names its value in the help.

        Among the options, `short` is a second name of the flag, and `complete` what shells offer
        for its value, where that is no matter of choices.
        """
        names = [name for name in (options.pop("short", None), flag) if name]
        complete = options.pop("complete", None)
        if value:
            options["metavar"] = value
        action = self.titled[group].add_argument(*names, help=help, **options)
        if complete:
            action.complete = complete  # type: ignore[attr-defined]

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """Every flag, by its name without dashes."""
        pairs = ((flag, action) for action in self._actions for flag in action.option_strings)
        return {flag[2:]: action for flag, action in pairs if flag.startswith("--")}

    def nearest(self, name: str, dashes: str = "--") -> str:
        """Return the end of a message about a flag that there is none of."""
        near = difflib.get_close_matches(name, self.flags, 1)
        return f"; did you mean {dashes}{near[0]}?" if near else ""

    def error(self, message: str) -> NoReturn:
        for word in message.partition("unrecognized arguments: ")[2].split():
            if word.startswith("--"):
                message += self.nearest(word[2:].partition("=")[0])
        raise GblmError(f"{message}; see --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            one_of(value, action.choices, action.dest.replace("_", " "))


def several(text: str) -> str:
    """Mark a flag that takes one value, or several with commas."""
    return text


def amount(text: str) -> str:
    """Mark a flag that takes a number, or a word such as auto."""
    return text


def parser(program: str, description: str, examples: str) -> Parser:
    """Return a parser with the flags that mean the same on both sides."""
    new = Parser(program, description, examples)
    add = new.add
    a_folder: dict[str, Any] = {"type": Path, "complete": shtab.DIRECTORY}

    add(
        "what",
        "--model",
        "a folder, or a name of the hub; without it, the packaged demo",
        complete=shtab.DIRECTORY,
    )
    add("what", "--include", "linears to prune, with commas, * for anything", "NAMES", type=several)
    add(
        "what",
        "--exclude",
        "linears to leave dense, such as '*.down_proj,model.layers.0.*'",
        "NAMES",
        type=several,
    )
    add(
        "how",
        "--method",
        "what decides; METHOD+SOLVER mends its mask, METHOD:OPTION=VALUE; see --list methods",
        "METHODS",
        type=several,
        complete=words("methods", [*METHODS, *(f"{m}+{s}" for m in METHODS for s in SOLVERS)]),
    )
    add("how", "--sparsity", "0.5, 2:4, …; see --list patterns", "PATTERNS", type=several)
    add("how", "--alpha", "factor of the gradient term, or auto: equal medians", type=amount)
    add(
        "how",
        "--norm",
        "of gradients over samples: l1, l2 [as published]",
        "NORM",
        choices=list(NORMS),
    )
    add(
        "how",
        "--group",
        "comparison group: row, layer [as published]",
        "GROUP",
        choices=["auto", *patterns.GROUPS],
        default="auto",
    )
    add(
        "how",
        "--allocation",
        "spread the budget over the linears; see --list allocations",
        "NAME",
        choices=list(ALLOCATIONS),
    )
    add(
        "how",
        "--refine",
        "passes over the samples that refine each block's weights",
        "PASSES",
        type=float,
    )
    add("calibration", "--calibration", "a data set or a local path", "SOURCE", complete=shtab.FILE)
    add("calibration", "--samples", "calibration samples", "N", type=int)
    add(
        "calibration",
        "--seed",
        "of the calibration samples [%(default)s]",
        "N",
        type=int,
        default=0,
    )
    add(
        "evaluation",
        "--evaluate",
        "data sets or local paths, with commas",
        "SOURCES",
        type=several,
        complete=shtab.FILE,
    )
    add("memory", "--device", "cpu, cuda, cuda:1, … [a GPU where there is one]", default="auto")
    add(
        "memory",
        "--dtype",
        "float32, bfloat16, float16 [as stored]",
        "DTYPE",
        choices=["auto", *DTYPES],
        default="auto",
    )
    add(
        "memory",
        "--micro-batch",
        "samples a block sees at a time [auto]",
        "N",
        type=amount,
        default="auto",
    )
    add(
        "memory",
        "--backward",
        "gradients by blocks, or by the whole model [auto]",
        "HOW",
        choices=list(BACKWARDS),
        default="auto",
    )
    add(
        "scale",
        "--offload",
        "weights away from the device: none, cpu, disk [auto]",
        "WHERE",
        choices=list(OFFLOADS),
        default="auto",
    )
    add(
        "scale", "--work-dir", "for gradients, finished blocks and their journal", "DIR", **a_folder
    )
    add("scale", "--resume", "go on with the run that --work-dir holds", action="store_true")
    add(
        "scale",
        "--gradients",
        "of a former run: the gradients in its --work-dir",
        "DIR",
        **a_folder,
    )
    add(
        "scale",
        "--gradient-dtype",
        "of gradients in a folder [%(default)s]",
        "DTYPE",
        choices=list(DTYPES),
        default="float32",
    )
    add("output", "--output", "for the pruned model and its report.json", "DIR", **a_folder)
    add(
        "output",
        "--report",
        "for report.html, a page that shows what became of it",
        "DIR",
        **a_folder,
    )
    add("output", "--overwrite", "let output and report replace what is there", action="store_true")
    add(
        "output",
        "--dry-run",
        "say what a run would do and take; nothing is run",
        action="store_true",
    )
    add(
        "output",
        "--verbose",
        "a line for every block; twice for details",
        short="-v",
        action="count",
        default=0,
    )
    add(
        "help",
        "--config",
        "a TOML file of flags, such as the config.toml of a result",
        "FILE",
        type=Path,
        complete=shtab.FILE,
    )
    add("help", "--help", "show this", short="-h", action="help")
    add("help", "--list", f"say what there is: {', '.join(LISTS)}", "WHAT", choices=list(LISTS))
    add("help", "--completion", "a script for bash, zsh or tcsh", "SHELL", choices=SHELLS)
    add("help", "--version", "of gblm and of the packages it stands on", action="store_true")
    return new


def words(name: str, choices: Sequence[str]) -> dict[str, Any]:
    """Return what shells offer for a flag that takes some of the choices, with commas."""
    function = f"_gblm_{name}"
    script = f"""
{function}() {{
  local before=""
  [[ $1 == *,* ]] && before="${{1%,*}},"
  compgen -P "$before" -W "{" ".join(choices)}" -- "${{1##*,}}"
}}"""
    zsh = f"_values -s , {name} {' '.join(choices)}"
    return {
        "bash": function,
        "zsh": f"{{{zsh}}}",
        "tcsh": f"({' '.join(choices)})",
        "preamble": {"bash": script},
    }


def methods() -> list[tuple[str, str]]:
    """Return the name of every method, what it does, and its options."""
    found = []
    for name, text in _first_sentences(METHODS):
        taken = inspect.signature(METHODS[name]).parameters.values()
        options = ":".join(f"{own.name}={own.default}" for own in taken)
        found.append((name, f"{text} [:{options}]" if options else text))
    mended = [(f"METHOD+{name}", f"the mask of any of these, mended by {name}") for name in SOLVERS]
    return found + mended


def allocations() -> list[tuple[str, str]]:
    """Return the name of every allocation, and what it does."""
    return _first_sentences(ALLOCATIONS)


def _first_sentences(factories: Mapping[str, Callable[..., Any]]) -> list[tuple[str, str]]:
    said = {name: inspect.getdoc(factory) or "" for name, factory in factories.items()}
    return [(name, " ".join(text.partition("\n\n")[0].split())) for name, text in said.items()]


def pattern_forms() -> list[tuple[str, str]]:
    """Return the forms that a pattern has, and what each means."""
    return [
        ("0.5", "half of the weights go, compared where --group says"),
        ("0.5/row", "half of the weights of every output"),
        ("0.5/layer", "half of the weights of every linear"),
        ("2:4", "two of every four neighbouring weights stay; any n:m"),
    ]


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "methods": methods,
    "patterns": pattern_forms,
    "allocations": allocations,
}


def completion(parser: Parser, shell: str) -> str:
    """Return the script that completes the flags of a command, `gblm-llm` say, in a shell."""
    parser.prog = parser.prog.split()[-1].replace(".", "-")
    return shtab.complete(parser, shell)


def listing(what: str) -> None:
    """Print a line for each of what there is."""
    found = LISTS[what]()
    width = max(len(name) for name, _ in found)
    for name, text in found:
        print(f"{name:{width}}  {text}")
