"""`python -m gblm.vit`: prune an image classifier, compare methods, save the result."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import shtab

from gblm.base import Batch, GblmError
from gblm.command import cli, flags, plan
from gblm.command.estimate import Sight, Task, seen
from gblm.command.job import Bars, Job, Run, Work, compare, work_folder
from gblm.machine.device import find_device, find_dtype
from gblm.machine.processes import gathered, launched, rank
from gblm.report import Evaluation, Examples, clock
from gblm.walk.survey import choose as choose_linears
from gblm.walk.survey import survey

EXAMPLES = """\
examples:
  python -m gblm.vit                                    the packaged demo, all methods
  python -m gblm.vit --model vit_base_patch16_224 --calibration imagenet/train --output PRUNED
  python -m gblm.vit --model vit_base_patch16_224 --calibration imagenet/train --dry-run
  python -m gblm.vit --model vit_tiny_patch16_224 --checkpoint FILE.safetensors \\
      --method gblm,wanda,sparsegpt --sparsity 0.5,2:4 --calibration DIR --evaluate DIR
"""


def parser() -> flags.Parser:
    """Return the parser of `python -m gblm.vit`."""
    new = flags.parser(
        "python -m gblm.vit", "Prune an image classifier, without retraining.", EXAMPLES
    )
    add = new.add
    add(
        "what",
        "--checkpoint",
        "the weights, .safetensors [those of the model's name]",
        "FILE",
        complete=shtab.FILE,
    )
    add("calibration", "--unlabelled", "labels are the model's predictions", action="store_true")
    add("evaluation", "--evaluate-images", "a choice of this many", "N", type=int)
    add(
        "memory",
        "--workers",
        "processes that decode images [auto]",
        "N",
        type=flags.amount,
        default="auto",
    )
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.command(parser(), argv, run)


def run(args: Any) -> None:
    """Load the model, choose the images, carry out the runs, show the table."""
    demo = args.model is None
    if demo:
        set_demo(args)
    title = "the packaged demo" if demo else args.model
    cli.fill(args, method="gblm", sparsity="0.5", alpha="auto", samples=1024)
    if not args.calibration:
        raise GblmError("no calibration images; give a folder or a data set by --calibration")
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
    with clock(seconds, "load"):
        import torch

        from gblm.vit import adapters, demo, models

        if args.model == str(demo.FOLDER):
            torch.set_num_threads(1)  # so small a model is slower on more, by far beside others
        device = find_device(args.device)
        model, offload, stored = models.load_offloaded(
            args.model,
            args.checkpoint,
            args.offload,
            work.scratch,
            device=device,
            dtype=args.dtype,
        )
        adapter = adapters.adapter(model)
    cli.check_folders(args, cli.model_bytes(model) * len(wanted))
    with clock(seconds, "data"):
        batch, loaders, notes = choose(args, model)

    blocks = survey(model, batch, adapter)
    choose_linears(blocks, cli.listed(args.include), cli.listed(args.exclude))
    job = Job(
        name=args.model,
        model=model,
        batch=batch,
        adapter=adapter,
        blocks=blocks,
        evaluate=lambda model, show: evaluate(model, loaders, notes, show),
        save=lambda folder: models.save(model, folder, stored),
        output=args.output,
        seed=args.seed,
        micro_batch=micro_batch,
        backward=args.backward,
        notes=notes,
        seconds=seconds,
        offload=offload,
        work=work if work.asked or offload else None,
        report=args.report,
        examples=examples(args, model, batch, loaders),
        calibration=f"{len(batch['images'])} images from {args.calibration}",
        loading=models.loading,
        recipe=cli.recipe(parser(), args, model, offload, ["demo"]),
    )
    reports = compare(job, wanted)
    cli.show_table(f"{title}, pruned with {len(batch['images'])} images", reports)
    for note in notes if not rank() else []:
        print(note)
    cli.show_folders(args)


def dry_run(args: Any, wanted: list[Run], title: str) -> None:
    """Say what the runs would do and take, without the weights and without decoding an image."""
    import torch

    from gblm.vit import adapters, data, models

    device = find_device(args.device)

    def sight(model: Any) -> Sight:
        parameter = next(model.parameters())
        shape = data.input_size(model)
        images = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
        labels = torch.zeros(1, dtype=torch.int64, device=parameter.device)
        return model, {"images": images, "labels": labels}, adapters.adapter(model)

    def load() -> Any:
        return models.load(args.model, args.checkpoint)

    try:
        model = models.sketch(args.model)
    except Exception:  # whatever the model's code had against having no values
        model = load()
    dtype = find_dtype(args.dtype, device, lambda: torch.float32) or torch.float32
    images = data.open_images(args.calibration, model, "calibration", labelled=not args.unlabelled)
    images.chosen(args.samples)
    sources = (data.open_images(name, model, "evaluation") for name in cli.listed(args.evaluate))
    counts = [min(len(found), args.evaluate_images or len(found)) for found in sources]
    task = Task(args.samples, evaluated=sum(counts), together=data.TOGETHER)
    found = seen(lambda: nullcontext(sight(model.to(dtype))), lambda: sight(load().to(dtype)))
    plan.show(title, args, wanted, found, task, device, torch.float32)


def choose(args: Any, model: Any) -> tuple[Batch, dict[str, Any], list[str]]:
    """Return the calibration batch, the evaluation images by data set, and notes on them."""
    from gblm.vit import data, models

    workers = cli.whole(args.workers, "workers") or data.WORKERS
    sets = {
        source: data.open_images(source, model, "evaluation", workers=workers)
        for source in cli.listed(args.evaluate)
    }
    for source, found in sets.items():
        for first in found.batches([0], 1, of=len(found)):  # none where that image is broken
            data.fitting(model, first, source)
    images = data.open_images(
        args.calibration, model, "calibration", labelled=not args.unlabelled, workers=workers
    )
    batch = data.calibration(images, args.samples, args.seed)
    parameter = next(model.parameters())
    batch = {
        name: value.to(parameter if value.is_floating_point() else parameter.device)
        for name, value in batch.items()
    }
    data.fitting(model, batch, args.calibration)
    notes = images.notes
    if "labels" not in batch:
        if not args.unlabelled:
            raise GblmError(
                f"{args.calibration} has no labels; give a labelled source, or --unlabelled to "
                "take the model's own predictions"
            )
        batch = models.predicted(model, batch)
        notes.append("the calibration labels are the model's own predictions")
    loaders = {
        source: data.evaluation(found, limit=args.evaluate_images) for source, found in sets.items()
    }
    return batch, loaders, notes


def examples(args: Any, model: Any, batch: Batch, loaders: dict[str, Any]) -> Examples | None:
    """Return what the report shows before and after, in process 0 where there will be one."""
    if rank() or not cli.told(args, model):
        return None
    from gblm.vit.examples import Changed

    source, found = next(iter(loaders.items()), (args.calibration, [batch]))
    return Changed(model, found, cli.short(source))


def evaluate(model: Any, loaders: dict[str, Any], notes: list[str], show: Bars) -> Evaluation:
    """Return top-1, top-5 and cross-entropy on every data set, and note what it says of itself."""
    from gblm.vit.evaluate import evaluate as measure

    def progress(done: int, total: int) -> None:
        show("evaluate", done, total)

    found = {name: measure(model, loader, progress) for name, loader in loaders.items()}
    for loader in loaders.values():  # what other processes have met
        for broken in gathered(loader.images.broken):
            loader.images.broken.update(broken)
    said = (note for loader in loaders.values() for note in loader.images.notes)
    notes += [note for note in dict.fromkeys(said) if note not in notes]
    return found


def set_demo(args: Any) -> None:
    """Fill in the packaged demo where no model is named."""
    from gblm.methods import METHODS
    from gblm.vit import demo

    flags = ("calibration", "evaluate", "checkpoint")
    if given := [flag for flag in flags if getattr(args, flag)]:
        raise GblmError(f"--{given[0]} goes with --model; without a model the demo brings its own")
    args.model, args.calibration, args.evaluate = str(demo.FOLDER), "demo", "demo"
    cli.fill(args, method=",".join(METHODS), sparsity="0.5,0.7,0.8")


if __name__ == "__main__":
    sys.exit(main())
