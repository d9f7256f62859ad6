"""`python -m gblm.packed`: write the packed form of a folder, or a packed one as it was."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gblm.base import GblmError
from gblm.packed import pack, unpack

EXAMPLES = """\
examples:
  python -m gblm.packed pack PRUNED SMALL       the folder, with model.packed.safetensors
  python -m gblm.packed unpack SMALL AGAIN      the folder as it was, bit for bit

exit codes: 0 done, 2 something given is wrong (the message says what)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m gblm.packed",
        description="Pack a folder of .safetensors, or unpack it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("folder", type=Path, help="the folder of a model")
    parser.add_argument("out", type=Path, help="the folder to write, which is not there yet")
    args = parser.parse_args(argv)
    try:
        if args.what == "pack":
            print(pack(args.folder, args.out))
        else:
            unpack(args.folder, args.out)
    except GblmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
