"""Build a tiny random member of every family, prune it, reload it, and tell what stays dense.

    python eval/families.py [--task causal,masked,seq2seq,vision,timm] [--only llama,bert]
        [--methods wanda,gblm,sparsegpt,best] [--patterns 0.5,2:4] [--large 1e7]
        [--json families.json] [--output docs/families.md]

The families are those that transformers maps to a task, and the modules of timm whose models hold
attention or token mixing. Each is made of its config class with small sizes; one that cannot be
built so is listed with the reason. `share` is the part of the weights in the blocks that is pruned.
A model of more than `--large` weights, as of timm some are, is pruned by the first method alone.
`--json` keeps what was found; families that are in that file are not examined again.
"""

import argparse
import gc
import json
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import TASKS, batch_of, build, timm_names

import gblm
from gblm import methods
from gblm.base import reason
from gblm.walk.survey import find_adapter

SECONDS = 600  # for one method, at most


@dataclass
class Result:
    """What became of one family: `share` of its blocks' weights pruned, or an `error`."""

    task: str
    family: str
    parameters: int = 0
    share: float = 0.0
    dense: dict[str, str] = field(default_factory=dict)
    note: str = ""
    built: str = ""  # why it could not be, empty where it was
    errors: dict[str, str] = field(default_factory=dict)  # by method and pattern
    seconds: float = 0.0


def too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def examine(
    task: str, family: str, names: list[str], patterns: list[str], large: float = 1e7
) -> Result:
    """Prune a family by every method and pattern, and load it again."""
    result, start = Result(task, family), time.perf_counter()
    signal.signal(signal.SIGALRM, too_long)
    try:
        model = build(task, family)
        batch = batch_of(task, model)
        with torch.no_grad():
            find_adapter(model).trunk(model, batch)  # whether it runs at all
    except Exception as error:
        result.built = reason(error)
        return result
    result.parameters = sum(own.numel() for own in model.parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    whole = False
    with suppress(Exception):  # what transformers cannot save
        whole = task != "timm" and reloads(model)
    if task != "timm" and not whole:
        result.note = "transformers does not load what it has saved, dense ones too"
    for name in names[: 1 if result.parameters > large else None]:
        for pattern in patterns:
            try:
                signal.alarm(SECONDS)
                model.load_state_dict(state)
                report = gblm.prune(model, batch, methods.make(name), pattern)
                if name == names[0] and pattern == patterns[0]:
                    result.share = report.weights / max(1, report.block_weights)
                    result.dense = report.dense
                    assert not whole or reloads(model), "it is not loaded again"
            except Exception as error:
                own = isinstance(error, gblm.GblmError | TimeoutError)
                result.errors[f"{name} {pattern}"] = ("" if own else "TRACEBACK ") + reason(error)
            finally:
                signal.alarm(0)
    result.seconds = time.perf_counter() - start
    return result


def reloads(model: Any) -> bool:
    """Save a model and load it again: say whether it is the same."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).state_dict()
    return all(torch.equal(own, again[name]) for name, own in model.state_dict().items())


def families(task: str) -> list[str]:
    return timm_names() if task == "timm" else sorted(TASKS[task])


def page(results: list[Result]) -> Iterator[str]:
    """Yield the lines of docs/families.md."""
    yield "# Which families gblm prunes, and how much of each"
    yield ""
    yield "`python eval/families.py --output docs/families.md` builds a tiny member of every"
    yield "family, prunes it by wanda, gblm, sparsegpt and best to 50 % and 2:4, and loads it"
    yield "again; a model of more than ten million weights, by wanda alone. `pruned` is the part"
    yield "of the weights in the matrices of the blocks that is pruned; the rest is named with the"
    yield "reason. A family whose sizes or inputs the script does not know is not built."
    for task in dict.fromkeys(result.task for result in results):
        own = [result for result in results if result.task == task]
        made = [result for result in own if not result.built]
        whole = [r for r in made if r.share >= 0.95 and not r.errors]
        yield ""
        yield f"## {task}"
        yield ""
        idle = [r for r in made if r not in whole and not r.errors and unused(r)]
        counts = f"{len(own)} families, {len(made)} built"
        yield f"{counts}, {len(whole)} of them pruned to 95 % or more."
        if idle:
            yield f"Of {len(idle)} more only matrices that their blocks do not use stay dense."
        yield ""
        yield "| family | pruned | stays dense, or why not |"
        yield "|---|---|---|"
        for result in own:
            notes = [f"not built: {result.built}"] if result.built else []
            notes += [result.note] if result.note else []
            notes += [f"{run}: {text}" for run, text in list(result.errors.items())[:2]]
            if result.share < 0.95:
                reasons = Counter(
                    f"{name.rpartition('.')[2]} {text}" for name, text in result.dense.items()
                )
                notes += [text for text, _ in reasons.most_common(3)]
            share = "–" if result.built else f"{100 * result.share:.0f} %"
            yield f"| {result.family} | {share} | {'; '.join(notes).replace('|', '/')} |"


def unused(result: Result) -> bool:
    """Say whether no matrix stays dense that a block uses."""
    reasons = set(result.dense.values())
    return bool(reasons) and reasons <= {"not used by its block"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="causal,masked,seq2seq,vision,timm")
    parser.add_argument("--only", default="")
    parser.add_argument("--methods", default="wanda,gblm,sparsegpt,best")
    parser.add_argument("--patterns", default="0.5,2:4")
    parser.add_argument("--large", type=float, default=1e7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = []
    if args.json and args.json.exists():
        results = [Result(**one) for one in json.loads(args.json.read_text())]
    done = {(result.task, result.family) for result in results}
    for task in args.task.split(","):
        for family in args.only.split(",") if args.only else families(task):
            if (task, family) in done or (
                args.only and task != "timm" and family not in TASKS[task]
            ):
                continue
            runs = args.methods.split(","), args.patterns.split(",")
            found = examine(task, family, *runs, args.large)
            results.append(found)
            note = found.built or " | ".join(found.errors.values())
            print(f"{task} {family}: {100 * found.share:.0f} % {note}", flush=True)
            gc.collect()
            if args.json:
                args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    if args.output:
        args.output.write_text("\n".join(page(results)) + "\n")


if __name__ == "__main__":
    main()
