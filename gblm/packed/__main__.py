"""`python -m gblm.packed`: write the packed form of a folder, or a packed one as it was."""

import sys
from collections.abc import Sequence
from pathlib import Path

from gblm.machine.program import guarded, make_parser
from gblm.packed import pack, unpack

EXAMPLES = """\
examples:
  python -m gblm.packed pack PRUNED SMALL       the folder, with model.packed.safetensors
  python -m gblm.packed unpack SMALL AGAIN      the folder as it was, bit for bit

exit codes: 0 done, 2 something given is wrong (the message says what)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = make_parser(
        "python -m gblm.packed", "Pack a folder of .safetensors, or unpack it.", EXAMPLES
    )
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("folder", type=Path, help="the folder of a model")
    parser.add_argument("out", type=Path, help="the folder to write, which is not there yet")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args.what, args.folder, args.out))


def run(what: str, folder: Path, out: Path) -> None:
    """Pack or unpack a folder into another, and say so."""
    if what == "pack":
        print(pack(folder, out))
    else:
        unpack(folder, out)
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())
