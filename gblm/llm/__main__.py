"""`python -m gblm.llm`: prune a causal language model, compare methods, save the result."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import shtab

from gblm.base import Batch, GblmError
from gblm.command import cli, flags, plan
from gblm.command.estimate import Sight, Task, seen
from gblm.command.job import Bars, Job, Run, Work, compare, work_folder
from gblm.llm.sources import SOURCES
from gblm.machine.device import find_device
from gblm.machine.processes import launched, rank
from gblm.report import Evaluation, Examples, clock
from gblm.walk.survey import choose as choose_linears
from gblm.walk.survey import placed, survey

EXAMPLES = """\
examples:
  python -m gblm.llm                                    the packaged demo, six methods
  python -m gblm.llm --model DIR --sparsity 2:4 --calibration c4 --output PRUNED
  python -m gblm.llm --model DIR --method best --sparsity 0.5,2:4 --calibration notes.txt \\
      --evaluate wikitext2
  python -m gblm.llm --model DIR --dry-run              what that takes; nothing is run
"""


def parser() -> flags.Parser:
    """Return the parser of `python -m gblm.llm`."""
    new = flags.parser(
        "python -m gblm.llm", "Prune a causal language model, without retraining.", EXAMPLES
    )
    add = new.add
    add("what", "--trust-remote-code", "run code that comes with the model", action="store_true")
    add("what", "--allow-pickle", "read weights that are not safetensors", action="store_true")
    add("calibration", "--length", "tokens in a window [2048 at most]", "N", type=int)
    add("evaluation", "--evaluate-windows", "the first windows alone", "N", type=int)
    add(
        "evaluation",
        "--tasks",
        "zero-shot tasks of lm-evaluation-harness, with commas; paper: its six",
        "TASKS",
        type=flags.several,
    )
    add(
        "evaluation",
        "--task-data",
        "their items, TASK_….jsonl [from the hub]",
        "DIR",
        type=Path,
        complete=shtab.DIRECTORY,
    )
    add("evaluation", "--task-limit", "the first items of each task alone", "N", type=int)
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.command(parser(), argv, run)


def run(args: Any) -> None:
    """Draw the windows, load the model, carry out the runs, show the table."""
    demo = args.model is None
    if demo:
        set_demo(args)
    title = "the packaged demo" if demo else args.model
    cli.fill(args, method="gblm", sparsity="0.5", alpha="100", calibration="c4", samples=128)
    wanted = cli.runs(args)
    micro_batch = cli.whole(args.micro_batch, "micro-batch")
    cli.check_folders(args)
    with launched(args.device) as args.device:
        if args.dry_run:
            return dry_run(args, wanted, title)
        with work_folder(args) as work:
            carry_out(args, wanted, micro_batch, title, work)


def carry_out(
    args: Any, wanted: list[Run], micro_batch: int | None, title: str, work: Work
) -> None:
    """Do what the flags ask for, in a work folder."""
    seconds: dict[str, float] = {}
    with clock(seconds, "data"):
        from gblm.llm import adapters, models

        silence()
        device = find_device(args.device)
        config, tokenizer = models.load_tokenizer(args.model, args.trust_remote_code)
        tasks = open_tasks(args)
        batch, sets = draw(args, config, tokenizer)
    with clock(seconds, "load"):
        model, offload = models.load_offloaded(
            args.model,
            args.offload,
            work.scratch,
            device=device,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )
    cli.check_folders(args, cli.model_bytes(model) * len(wanted))

    batch = placed(batch, model)
    args.length = batch["input_ids"].shape[1]
    adapter = adapters.adapter(model)
    blocks = survey(model, batch, adapter)
    choose_linears(blocks, cli.listed(args.include), cli.listed(args.exclude))
    samples, length = batch["input_ids"].shape
    job = Job(
        name=args.model,
        model=model,
        batch=batch,
        adapter=adapter,
        blocks=blocks,
        evaluate=lambda model, show: evaluate(model, tokenizer, sets, tasks, show),
        save=lambda folder: models.save(model, tokenizer, folder, like=args.model),
        output=args.output,
        seed=args.seed,
        micro_batch=micro_batch,
        backward=args.backward,
        seconds=seconds,
        offload=offload,
        work=work if work.asked or offload else None,
        report=args.report,
        examples=examples(args, model, tokenizer, batch, sets),
        calibration=f"{samples} windows of {length} tokens from {args.calibration}",
        loading=models.loading,
        recipe=cli.recipe(parser(), args, model, offload, SOURCES),
    )
    reports = compare(job, wanted)
    metrics = "perplexity, zero-shot accuracy" if tasks else "perplexity"
    cli.show_table(f"{title}: {metrics}, pruned with {samples} windows of {length}", reports)
    cli.show_folders(args)


def silence() -> None:
    """Let transformers say nothing but errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def dry_run(args: Any, wanted: list[Run], title: str) -> None:
    """Say what the runs would do and take, by the config and the text, without the weights."""
    import torch

    from gblm.llm import adapters, evaluate, models

    silence()
    device = find_device(args.device)
    trust = {"trust_remote_code": args.trust_remote_code}
    config, tokenizer = models.load_tokenizer(args.model, args.trust_remote_code)
    batch, sets = draw(args, config, tokenizer)
    samples, length = batch["input_ids"].shape
    task = Task(
        samples,
        evaluated=sum(len(windows) for windows in sets.values()),
        together=max(1, evaluate.POSITIONS // length),
    )

    def sight(model: Any) -> Sight:
        one = {"input_ids": torch.zeros(1, length, dtype=torch.int64)}
        return model, one, adapters.adapter(model)

    @contextmanager
    def sketch() -> Iterator[Sight]:
        with models.sketch(args.model, device=device, dtype=args.dtype, **trust) as model:
            yield sight(model)

    def load() -> Sight:
        kind = {"dtype": args.dtype, "allow_pickle": args.allow_pickle, **trust}
        return sight(models.load_model(args.model, device=torch.device("cpu"), **kind))

    found = seen(sketch, load)
    plan.show(title, args, wanted, found, task, device, models.stored_dtype(config))


def draw(args: Any, config: Any, tokenizer: Any) -> tuple[Batch, dict[str, Any]]:
    """Return the calibration batch, and the evaluation windows by data set."""
    from gblm.llm import data, models

    sizes = {"samples": args.samples, "length": args.length, "seed": args.seed}
    batch = models.windows(args.calibration, config, tokenizer, **sizes)
    length = batch["input_ids"].shape[1]
    sets = {}
    for source in cli.listed(args.evaluate):
        sets[source] = data.evaluation(source, tokenizer, length, args.evaluate_windows)
        data.check_ids(sets[source], models.vocabulary(config), source)
    return batch, sets


def open_tasks(args: Any) -> Any:
    """Return the zero-shot tasks with their items, None where the flags name none."""
    from gblm.llm import zero_shot

    if names := cli.listed(args.tasks):
        return zero_shot.open_tasks(names, args.task_data, args.task_limit)
    if args.task_data or args.task_limit is not None:
        raise GblmError("--task-data and --task-limit go with --tasks; name some, or paper")
    return None


def examples(
    args: Any, model: Any, tokenizer: Any, batch: Batch, sets: dict[str, Any]
) -> Examples | None:
    """Return what the report shows before and after, in process 0 where there will be one."""
    if rank() or not cli.told(args, model):
        return None
    from gblm.llm.examples import Continuations

    source, windows = next(iter(sets.items()), (args.calibration, batch["input_ids"]))
    return Continuations(tokenizer, windows, cli.short(source))


def evaluate(
    model: Any, tokenizer: Any, sets: dict[str, Any], tasks: Any, show: Bars
) -> Evaluation:
    """Return the perplexity on every data set, and the accuracy on every task with their mean."""
    from gblm.llm import zero_shot
    from gblm.llm.evaluate import perplexity

    bar = partial(show, "evaluate")
    found = {
        name: {"perplexity": perplexity(model, ids, progress=bar)} for name, ids in sets.items()
    }
    if tasks:
        bar = partial(show, "zero-shot")
        found |= zero_shot.entries(zero_shot.accuracy(model, tokenizer, tasks, progress=bar))
    return found


def set_demo(args: Any) -> None:
    """Fill in the packaged demo where no model is named."""
    from gblm.llm import demo

    given = [flag for flag in ("calibration", "evaluate", "length") if getattr(args, flag)]
    if given:
        raise GblmError(f"--{given[0]} goes with --model; without a model the demo brings its own")
    args.model, args.calibration, args.evaluate = str(demo.FOLDER), "demo", "demo"
    args.method = args.method or "magnitude,gradient,wanda,gblm,sparsegpt,best"
    args.evaluate_windows = args.evaluate_windows or 160


if __name__ == "__main__":
    sys.exit(main())
