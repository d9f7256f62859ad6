"""The demo: a small LLaMA that ships with the package, and the text it was trained on.

The text is the source of the running Python's standard library, which is on every machine: some
modules are held out for evaluation, the others are for training and calibration. The model beside
this file was trained by `eval/train_demo_llm.py`.
"""

import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gblm.base import GblmError, one_of

FOLDER = Path(__file__).parent  # config, weights and tokenizer lie beside this file
NAME = "demo"  # by which the commands know it

# All of them exist in Python 3.10 to 3.14, as a file or as a package.
HELD_OUT = re.compile(
    r"(argparse|configparser|dataclasses|difflib|fractions|json|shutil|statistics|tarfile|textwrap)"
    r"(\.py)?"
)

# Files and folders that are no library of this Python, or hold tables and not text.
LEFT_OUT = re.compile(
    r"site-packages|dist-packages|ensurepip|tests?|idlelib|lib2to3|turtledemo|__pycache__"
    r"|encodings|config-.*|_sysconfig(data|_vars).*|__p?hello__.*|(entities|stringprep|_casefix)\.py"
)


def text(split: str) -> str:
    """Return the text of a split, "calibration" or "evaluation".

    Its files stand in one mixed order, so any first part of the text is a sample of the whole.
    Raises `GblmError` where the standard library's sources are not there.
    """
    one_of(split, ("calibration", "evaluation"), "split")
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out = split == "evaluation"
    files = [
        path
        for path in sources(library)
        if bool(HELD_OUT.fullmatch(path.relative_to(library).parts[0])) == held_out
    ]
    if not files:
        raise GblmError(
            f"the demo's text is the source of Python's standard library, but {library} holds no "
            ".py files; run it with a Python that has them, or name a model and a data set"
        )
    random.Random(0).shuffle(files)
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def sources(folder: Path) -> Iterator[Path]:
    """Yield the sources in a folder and those below it, sorted, less what is left out."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if LEFT_OUT.fullmatch(path.name):
            continue  # here, and not after a glob: site-packages can hold 100,000 files
        if path.is_dir():
            yield from sources(path)
        elif path.suffix == ".py":
            yield path
