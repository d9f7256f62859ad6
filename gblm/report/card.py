"""The model card of a result, its README.md, and its way to the hub."""

import re
from pathlib import Path
from typing import Any

from gblm.base import GblmError, explained
from gblm.report import Report
from gblm.report.wording import changes, percent, short, size

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
UNTOUCHED = " What was neither pruned nor refined is that of the original."
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def card(report: Report, source: Path | None, folder: Path, name: str = "") -> str:
    """Return the card of a result in a folder: where it comes from, what was done, how to load it.

    source: the folder of the dense model, whose card says its licence. name: its repository on the
    hub, empty for none.
    """
    from huggingface_hub import ModelCardData, metadata_load  # as below: its import takes 0.1 s

    readme = source / "README.md" if source else Path()
    found: dict[str, Any] = (metadata_load(readme) if readme.is_file() else None) or {}
    kept = {key: found[key] for key in KEPT if key in found}
    base = report.model if REPOSITORY.fullmatch(report.model) else Path(report.model).name
    if REPOSITORY.fullmatch(report.model) and not Path(report.model).exists():
        kept["base_model"] = report.model
    elif "base_model" in found:
        kept["base_model"] = found["base_model"]
    samples, of, place = report.calibration.rpartition(" from ")
    shown = changes(report)
    metrics = sorted({entry["metric"] for entry in report.evaluation.values()})
    tags = ["pruned", "sparse", "gblm", report.method.partition("(")[0]]
    data = ModelCardData(**kept, tags=tags, metrics=metrics or None)
    rows = [f"| {x.data} | {x.metric.title} | {x.before} | {x.after} |" for x in shown]
    table = ["| data | metric | dense | pruned |", "|---|---|--:|--:|", *rows, ""]
    whole = report.sparsity * report.weights / max(1, report.parameters)
    code = report.loading.replace(str(folder), name or "FOLDER")
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {base}, pruned\n",
        f"This is {base} with {percent(report.sparsity)} of the weights of its pruned linear "
        f"layers set to zero, {percent(whole)} of all its weights. gblm pruned it without "
        f"retraining: method `{report.method}`, pattern `{report.pattern}`, "
        f"{samples}{of}{short(place)}."
        f"{'' if report.smaller else UNTOUCHED}\n",
        *(table if rows else []),
        f"The weights take {size(report.file_bytes)}: zeros are stored like any other weight.\n",
        "## Load it\n",
        f"```python\n{code}\n```\n",
        "## Repeat it\n",
        f"```sh\n{report.program} --config config.toml --output DIR\n```\n",
        "`report.json` holds the sparsity and the error of every layer.",
    ]
    return "\n".join(lines) + "\n"


def check_hub(name: str) -> None:
    """Raise `GblmError` where a result cannot go to a repository of the hub: before any work."""
    if not REPOSITORY.fullmatch(name):
        raise GblmError(f"--push-to-hub {name} is no repository; give OWNER/NAME")
    with explained("the hub does not know you", "log in by `hf auth login`"):
        from huggingface_hub import HfApi

        HfApi().whoami()


def push(folder: Path, name: str) -> None:
    """Upload a result to a repository of the hub, new where there is none."""
    way = f"the result is in {folder}; upload it by `hf upload {name} {folder}`"
    with explained(f"{name} cannot be uploaded to the hub", way):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Pruned by gblm")
