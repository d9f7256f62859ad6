"""`python -m gblm.gains`: what the zeros of a pruned folder buy on this machine, by trial."""

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
from gblm.machine.program import guarded, make_parser
from gblm.packed import packed_files, read_packed, weight_files
from gblm.report import Report

EXAMPLES = """\
examples:
  python -m gblm.gains PRUNED                   its linears here, dense, in int8, int4, CSR, 2:4

exit codes: 0 done, 2 something given is wrong (the message says what)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = make_parser(
        "python -m gblm.gains",
        "Try what the zeros of a pruned model buy on this machine.",
        EXAMPLES,
    )
    parser.add_argument("folder", type=Path, help="a folder that --output wrote, packed or not")
    parser.add_argument("--device", default="auto", help="[a GPU where there is one]")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args.folder, args.device))


def run(folder: Path, named: str) -> None:
    """Try the linears of a folder on a device, and print what came out."""
    device = find_device(named)
    weights = {name: own.to(device) for name, own in linears(folder).items()}
    print(f"{folder} on {device}, {torch.get_num_threads()} threads; dense, and ratios:")
    print("\n".join(said(trial(weights))))


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
        raise GblmError(f"{folder} holds no linear layer in blocks; give a transformer")
    return pruned


if __name__ == "__main__":
    sys.exit(main())
