"""`python -m gblm.report`: the page of a run, or of several side by side, from their folders."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from gblm.base import GblmError
from gblm.machine.files import write_text
from gblm.machine.program import guarded, make_parser
from gblm.report import Report, check_pages

EXAMPLES = """\
examples:
  python -m gblm.report PRUNED                          the page of one run
  python -m gblm.report RUNS --output all.html          all runs of one command
  python -m gblm.report A B C                           runs of several commands, side by side

exit codes: 0 done, 2 something given is wrong (the message says what)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = make_parser(
        "python -m gblm.report", "Show a run, or compare several, on one page.", EXAMPLES
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of --output or --report")
    output = "the page to write [%(default)s]"
    parser.add_argument("--output", type=Path, default=Path("report.html"), help=output)
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args.runs, args.output, args.overwrite))


def run(paths: list[Path], output: Path, overwrite: bool) -> None:
    """Read the reports of runs and write their page; raises `GblmError` for what is none."""
    if output.is_dir():
        raise GblmError(f"--output {output} is a folder; give a file, such as {output}/all.html")
    if output.exists() and not overwrite:
        raise GblmError(f"--output {output} is there already; give another file, or --overwrite")
    check_pages()
    folders = list(dict.fromkeys(folder for path in paths for folder in run_folders(path)))
    reports = {str(folder): Report.read(folder) for folder in folders}
    from gblm.report.page import comparison_page, run_page

    if len(reports) == 1:
        page = run_page(*reports.values())
    else:
        pages, start = [folder / "report.html" for folder in folders], output.absolute().parent
        there = (page for page in pages if page.is_file())
        links = {str(page.parent): quote(os.path.relpath(page, start)) for page in there}
        page = comparison_page(reports, links)
    write_text(output, page)
    print(f"written to {output}")


def run_folders(path: Path) -> list[Path]:
    """Return the folder of a run, or those of all runs of one command in a folder."""
    if (path / "report.json").is_file() or not path.is_dir():
        return [path]
    return sorted(file.parent for file in path.glob("*/report.json")) or [path]


if __name__ == "__main__":
    sys.exit(main())
