"""`python -m gblm.llm`: prune a causal language model, compare methods, save the result."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from gblm.base import Batch, GblmError
from gblm.command import side
from gblm.command.estimate import Source, Task, seen
from gblm.command.job import Bars, Opened
from gblm.command.settings import CALIBRATION, EVALUATION, NUMBER, PATH, SEVERAL, WHAT, Settings
from gblm.command.show import Outline
from gblm.llm import demo
from gblm.llm.sources import SOURCES
from gblm.report import Evaluation, Examples, clock
from gblm.report.wording import short

EXAMPLES = """\
examples:
  python -m gblm.llm                                    the packaged demo, six methods
  python -m gblm.llm --model DIR --sparsity 2:4 --calibration c4 --output PRUNED
  python -m gblm.llm --model DIR --method best --sparsity 0.5,2:4 --calibration notes.txt \\
      --evaluate wikitext2
  python -m gblm.llm --model DIR --dry-run              what that takes; nothing is run
"""


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(Settings):
    """The flags of `python -m gblm.llm`."""

    trust_remote_code: Annotated[bool, WHAT()] = False
    """run code that comes with the model"""
    allow_pickle: Annotated[bool, WHAT()] = False
    """read weights that are not safetensors"""
    length: Annotated[int | None, CALIBRATION(NUMBER, "N")] = None
    """tokens in a window [2048 at most]"""
    evaluate_windows: Annotated[int | None, EVALUATION(NUMBER, "N")] = None
    """the first windows alone"""
    tasks: Annotated[tuple[str, ...], EVALUATION(SEVERAL, "TASKS")] = ()
    """zero-shot tasks of lm-evaluation-harness, with commas; paper: its six"""
    task_data: Annotated[Path | None, EVALUATION(PATH, "DIR")] = None
    """their items, TASK_….jsonl [from the hub]"""
    task_limit: Annotated[int | None, EVALUATION(NUMBER, "N")] = None
    """the first items of each task alone"""


@dataclass(kw_only=True)
class Language(Opened):
    """A language model with its tokenizer, its windows by data set and its zero-shot tasks."""

    tokenizer: Any
    sets: dict[str, Tensor]
    tasks: Any

    def evaluate(self, bars: Bars) -> Evaluation:
        """Return the perplexity on every data set, the accuracy on every task and their mean."""
        from gblm.llm import zero_shot
        from gblm.llm.evaluate import perplexity

        model: Any = self.model  # of transformers
        bar = partial(bars, "evaluate")
        metrics: Evaluation = {
            name: {"perplexity": perplexity(model, windows, progress=bar)}
            for name, windows in self.sets.items()
        }
        if self.tasks:
            bar = partial(bars, "zero-shot")
            accuracy = zero_shot.accuracy(model, self.tokenizer, self.tasks, progress=bar)
            metrics |= zero_shot.entries(accuracy)
        return metrics

    def save(self, folder: Path) -> None:
        from gblm.llm import models

        model: Any = self.model
        models.save(model, self.tokenizer, folder, like=self.settings.model)

    def loading(self, folder: Path) -> str:
        from gblm.llm import models

        return models.loading(folder)

    def examples(self) -> Examples:
        from gblm.llm.examples import Continuations

        calibration = (self.settings.calibration, self.batch["input_ids"])
        source, windows = next(iter(self.sets.items()), calibration)
        return Continuations(self.tokenizer, windows, short(source))


def load(
    settings: LanguageSettings,
    device: torch.device,
    scratch: Path,
    seconds: dict[str, float],
) -> Language:
    """Draw the windows, load the model; returns both with what is done with them."""
    with clock(seconds, "data"):
        from gblm.llm import adapters, models

        silence()
        config, tokenizer = models.load_tokenizer(settings.model, settings.trust_remote_code)
        tasks = open_tasks(settings)
        batch, sets = draw(settings, config, tokenizer)
    with clock(seconds, "load"):
        model, offload = models.load_offloaded(
            settings.model,
            settings.offload,
            scratch,
            device=device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            allow_pickle=settings.allow_pickle,
        )
    samples, length = batch["input_ids"].shape
    return Language(
        replace(settings, length=length),
        model,
        batch,
        adapters.adapter(model),
        f"{samples} windows of {length} tokens from {settings.calibration}",
        offload,
        tokenizer=tokenizer,
        sets=sets,
        tasks=tasks,
    )


def outline(settings: LanguageSettings, device: torch.device) -> Outline:
    """Return what config and text tell of a run, with the calibration windows drawn."""
    from gblm.llm import adapters, evaluate, models

    silence()
    trust = settings.trust_remote_code
    config, tokenizer = models.load_tokenizer(settings.model, trust)
    batch, sets = draw(settings, config, tokenizer)
    samples, length = batch["input_ids"].shape
    task = Task(
        samples,
        evaluated=sum(len(windows) for windows in sets.values()),
        together=max(1, evaluate.POSITIONS // length),
    )

    def sight(model: Any) -> Source:
        one = {"input_ids": torch.zeros(1, length, dtype=torch.int64)}
        return model, one, adapters.adapter(model)

    @contextmanager
    def sketch() -> Iterator[Source]:
        name, dtype = settings.model, settings.dtype
        with models.sketch(name, device=device, dtype=dtype, trust_remote_code=trust) as model:
            yield sight(model)

    def whole() -> Source:
        return sight(
            models.load_model(
                settings.model,
                device=torch.device("cpu"),
                dtype=settings.dtype,
                allow_pickle=settings.allow_pickle,
                trust_remote_code=trust,
            )
        )

    unmeasured = " and without --tasks" if settings.tasks else ""
    return Outline(seen(sketch, whole), task, models.stored_dtype(config), unmeasured)


def silence() -> None:
    """Let transformers say nothing but errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def draw(
    settings: LanguageSettings, config: Any, tokenizer: Any
) -> tuple[Batch, dict[str, Tensor]]:
    """Return the calibration batch, and the evaluation windows by data set."""
    from gblm.llm import data, models

    batch = models.windows(
        settings.calibration,
        config,
        tokenizer,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
    )
    length, sets = batch["input_ids"].shape[1], {}
    for source in settings.evaluate:
        sets[source] = data.evaluation(source, tokenizer, length, settings.evaluate_windows)
        data.check_ids(sets[source], models.vocabulary(config), source)
    return batch, sets


def open_tasks(settings: LanguageSettings) -> Any:
    """Return the zero-shot tasks with their items, None where the flags name none."""
    from gblm.llm import zero_shot

    if settings.tasks:
        names = list(settings.tasks)
        return zero_shot.open_tasks(names, settings.task_data, settings.task_limit)
    if settings.task_data or settings.task_limit is not None:
        raise GblmError("--task-data and --task-limit go with --tasks; name some, or paper")
    return None


SIDE = side.Side(
    program="python -m gblm.llm",
    about="Prune a causal language model, without retraining.",
    examples=EXAMPLES,
    kind=LanguageSettings,
    load=load,
    outline=outline,
    usual={
        "method": ("gblm",),
        "sparsity": ("0.5",),
        "alpha": "100",
        "calibration": "c4",
        "samples": 128,
    },
    demo={
        "model": str(demo.FOLDER),
        "calibration": "demo",
        "evaluate": ("demo",),
        "method": ("magnitude", "gradient", "wanda", "gblm", "sparsegpt", "best"),
        "evaluate_windows": 160,
    },
    alone=("calibration", "evaluate", "length"),
    sources=SOURCES,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return side.main(SIDE, argv)


if __name__ == "__main__":
    sys.exit(main())
