"""`python -m gblm.gains`: what the zeros of a pruned folder buy on this machine, by trial."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gblm.base import GblmError
from gblm.gains import said, trial
from gblm.machine.device import find_device
from gblm.machine.files import read_tensors
from gblm.packed import packed_files, read_packed, weight_files
from gblm.report import Report

EXAMPLES = """\
examples:
  python -m gblm.gains PRUNED                   its linears here, dense, in int8, int4, CSR, 2:4

exit codes: 0 done, 2 something given is wrong (the message says what)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m gblm.gains",
        description="Try what the zeros of a pruned model buy on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="a folder that --output wrote, packed or not")
    parser.add_argument("--device", default="auto", help="[a GPU where there is one]")
    args = parser.parse_args(argv)
    try:
        device = find_device(args.device)
        weights = {name: own.to(device) for name, own in linears(args.folder).items()}
        print(f"{args.folder} on {device}, {torch.get_num_threads()} threads; dense, and ratios:")
        print("\n".join(said(trial(weights))))
    except GblmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def linears(folder: Path) -> dict[str, Tensor]:
    """Return the pruned weights of a folder: those its report names, else those in its blocks."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    for file in packed_files(folder):
        tensors |= read_packed(file)
    if not tensors:
        raise GblmError(f"{folder} holds no .safetensors; give a folder that --output wrote")
    pruned = {
        name: own
        for name, own in tensors.items()
        if own.ndim == 2 and own.is_floating_point() and re.search(r"\.\d+\..*weight$", name)
    }
    if (folder / "report.json").is_file():
        named = {f"{own.name}.weight" for own in Report.read(folder).linears}
        pruned = {name: own for name, own in pruned.items() if name in named} or pruned
    if not pruned:
        raise GblmError(f"{folder} holds no linear in blocks; give a transformer")
    return pruned


if __name__ == "__main__":
    sys.exit(main())
