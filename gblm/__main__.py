"""`gblm`: the commands of the package by one name, `gblm llm …`, `gblm vit …`, `gblm report …`."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "llm": "prune a language model, one that sees among them",
    "vit": "prune a classifier of pictures",
    "report": "show a run, or compare several, on one page",
    "gains": "measure what the zeros of a result buy on this machine",
    "packed": "pack a pruned model, or unpack it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  gblm {name:8} {text}" for name, text in COMMANDS.items()]
        print("usage: gblm COMMAND [flags]", *lines, "--help after a command: its flags", sep="\n")
        return 0
    if words[0] == "--version":
        words = ["llm", "--version"]
    if words[0] not in COMMANDS:
        names = ", ".join(COMMANDS)
        print(f"error: unknown command {words[0]!r}; choose from {names}", file=sys.stderr)
        return 2
    code: int = import_module(f"gblm.{words[0]}.__main__").main(words[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
