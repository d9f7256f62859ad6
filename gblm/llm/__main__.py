"""`python -m gblm.llm`: prune a causal language model, compare methods, save the result."""

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from gblm import llm
from gblm.base import Batch, GblmError
from gblm.command import side
from gblm.command.job import Bars, Opened
from gblm.command.settings import (
    CALIBRATION,
    EVALUATION,
    NUMBER,
    OUTPUT,
    PATH,
    SEVERAL,
    TEXT,
    WHAT,
    Settings,
    Value,
)
from gblm.llm import demo
from gblm.machine.tables import NONE
from gblm.report import Evaluation, Examples, clock
from gblm.report.wording import short
from gblm.walk.blocks import size, to_device

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  gblm llm                                    the packaged demo, six methods
  gblm llm --model DIR --sparsity 2:4 --calibration c4 --output PRUNED
  gblm llm --model DIR --sparsity 0.5,2:4 --calibration notes.txt \\
      --evaluate wikitext2
  gblm llm --model DIR --dry-run              what that takes; nothing is run"""


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(Settings):
    """The flags of `python -m gblm.llm`."""

    trust_remote_code: Annotated[bool, WHAT()] = False
    """run code that comes with the model"""
    allow_pickle: Annotated[bool, WHAT()] = False
    """read weights that are not safetensors"""
    length: Annotated[int | None, CALIBRATION(NUMBER, "N")] = None
    """tokens in a window [2048 at most]"""
    bos: Annotated[bool, CALIBRATION()] = False
    """a begin-of-text token in front of each window, those of --evaluate too"""
    experts: Annotated[str, CALIBRATION(Value(offers=["routed", "all"]), "WHICH")] = "routed"
    """statistics of an expert: of the tokens sent to it, or of all [routed]"""
    evaluate_windows: Annotated[int | None, EVALUATION(NUMBER, "N")] = None
    """evaluate on the first N windows, texts or pairs only, or on N pictures of all classes"""
    tasks: Annotated[tuple[str, ...], EVALUATION(SEVERAL, "TASKS")] = ()
    """zero-shot tasks of lm-evaluation-harness, with commas; paper: its six"""
    task_data: Annotated[Path | None, EVALUATION(PATH, "DIR")] = None
    """their items, TASK_….jsonl [from the hub]"""
    task_limit: Annotated[int | None, EVALUATION(NUMBER, "N")] = None
    """evaluate on the first N items of each task only"""
    template: Annotated[str, EVALUATION(TEXT, "TEXT")] = "a photo of a {}."
    """what CLIP is told of a class, with {} for its name ['a photo of a {}.']"""
    exact_match: Annotated[bool, EVALUATION()] = False
    """answers given word by word, of pairs of pictures and text"""
    also: Annotated[str, OUTPUT(Value(offers=("int8",)), "FORM")] = ""
    """int8: the result quantised by torchao too, in a folder int8 of it"""


@dataclass(kw_only=True)
class Language(Opened):
    """A language model with its tokenizer, its windows by data set and its zero-shot tasks.

    tokenizer: a processor for a model that sees or hears. By data set, pairs: those to be answered;
    classes: of pictures, for CLIP.
    """

    tokenizer: Any
    sets: dict[str, Batch]
    pairs: dict[str, list[Any]] = field(default_factory=dict)
    classes: dict[str, Any] = field(default_factory=dict)
    tasks: Any = None

    @property
    def words(self) -> Any:
        """The tokenizer, that of the processor where there is one."""
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)

    def evaluate(self, bars: Bars) -> Evaluation:
        """Return how good it is on every data set, the accuracy on every task and their mean."""
        bar, metrics = partial(bars, "evaluate"), Evaluation()
        for name, windows in self.sets.items():
            metrics[name] = llm.evaluate.metrics(self.model, windows, progress=bar)
            if own := self.pairs.get(name):
                answered = llm.pairs.exact_match(self.model, own, self.tokenizer, progress=bar)
                metrics[name]["exact_match"] = answered
        for name, classes in self.classes.items():
            inputs = self.model, classes, self.tokenizer
            metrics[name] = {"top1": llm.contrast.top1(*inputs, progress=bar)}
        if self.tasks:
            inputs, bar = (self.model, self.words, self.tasks), partial(bars, "zero-shot")
            metrics |= llm.zero_shot.entries(llm.zero_shot.accuracy(*inputs, progress=bar))
        return metrics

    def counts(self) -> dict[str, tuple[int, str]]:
        found = {}
        for name, own in self.sets.items():
            plain = not set(own) & {"attention_mask", "pixel_values", "input_features"}
            of = f"windows of {llm.models.length_of(own)} tokens" if plain else "samples"
            found[name] = size(own), of
        found |= {name: (len(own.images), "pictures") for name, own in self.classes.items()}
        return found | (self.tasks.counts() if self.tasks else {})

    def evaluated(self) -> tuple[int, int]:
        length = llm.models.length_of(self.batch)
        pictures = sum(len(own.images) for own in self.classes.values())
        return sum(map(size, self.sets.values())) + pictures, max(
            1, llm.evaluate.POSITIONS // length
        )

    def save(self, folder: Path) -> None:
        like = checkpoint(self.settings)  # type: ignore[arg-type]
        llm.models.save(self.model, self.tokenizer, folder, like)
        also = self.settings.also  # type: ignore[attr-defined]
        if also and (note := llm.int8.quantise(folder)) not in self.notes:
            self.notes.append(note)

    def uses(self, model: Any) -> dict[str, Callable[[], Any]]:
        """Return forward passes of 1 and 16 samples of 128 tokens, and the generation of 64."""
        found: dict[str, Callable[[], Any]] = {
            f"forward of {count}": partial(model, **self.some(count, 128)) for count in (1, 16)
        }
        if model.can_generate():
            given = self.some(1, 16)
            given = {name: x for name, x in given.items() if not name.startswith("decoder_")}
            new = min(64, (llm.models.positions(model.config) or 80) - 16)
            count = {"min_new_tokens": new, "max_new_tokens": new}
            found[f"{new} tokens"] = partial(model.generate, **given, **count, do_sample=False)
        return found

    def graph(self) -> tuple[nn.Module, Tensor]:
        """Return the model from ids to logits, and a window of 16 tokens."""
        if self.settings.export == "coreml":
            raise GblmError("--export coreml is for image classifiers; a language model has onnx")
        if set(self.batch) != {"input_ids"}:
            raise GblmError("--export onnx is for models of text alone; do without it")
        return llm.adapters.Logits(self.model), self.batch["input_ids"][:1, :16].long()

    def some(self, count: int, length: int) -> dict[str, Any]:
        """Return so many calibration samples, plain windows cut to a length, as inputs."""
        chosen = torch.arange(count) % size(self.batch)
        batch = {name: value[chosen] for name, value in self.batch.items()}
        if set(batch) == {"input_ids"}:
            batch = {"input_ids": batch["input_ids"][:, :length]}
        return llm.replay.inputs_of(
            self.model, to_device(batch, next(self.model.parameters()).device)
        )

    def loading(self, folder: Path) -> str:
        packed = self.settings.format == "packed"
        return llm.models.loading(folder, self.model, packed)

    def examples(self) -> Examples | None:
        if llm.heads.head(self.model.config) != llm.heads.CAUSAL:
            return None
        source, batch = next(iter(self.sets.items()), (self.settings.calibration, self.batch))
        return llm.examples.Continuations(self.words, batch["input_ids"], short(source))


def load(
    settings: LanguageSettings, device: torch.device, scratch: Path, seconds: dict[str, float]
) -> Language:
    """Draw the windows, then load the model."""
    if settings.also:
        llm.int8.check_torchao()
    with clock(seconds, "data"):
        _, data = draw(settings)
        tasks = open_tasks(settings)
    with clock(seconds, "load"):
        model, offload = llm.models.load_offloaded(
            checkpoint(settings), settings.offload, scratch, device, settings.dtype
        )
    side.check_folders(settings, model)
    llm.models.check_causal(model, data["batch"])
    count, length = size(data["batch"]), llm.models.length_of(data["batch"])
    stored = checkpoint(settings).dtype() or next(model.parameters()).dtype
    what, held = f"windows of {length} tokens", set(data["batch"])
    if own := bool(held & {"attention_mask", "pixel_values"}):
        what = "pairs" if held & {"pixel_values", "input_features"} else "texts"
    return Language(
        settings=settings if own else replace(settings, length=length),
        model=model,
        adapter=llm.adapters.adapter(model, settings.experts),
        calibration=f"{count} {what} from {settings.calibration}",
        offload=offload,
        notes=[*llm.models.conversions(checkpoint(settings), stored), *data.pop("notes")],
        stored=stored,
        tasks=tasks,
        origin=checkpoint(settings).folder(),
        **data,
    )


@contextmanager
def sketch(settings: LanguageSettings, device: torch.device) -> Iterator[Language]:
    """Draw the windows; the model is made of its config alone."""
    config, data = draw(settings)
    with llm.models.sketch(checkpoint(settings), device, settings.dtype) as model:
        yield Language(
            settings=settings,
            model=model,
            adapter=llm.adapters.adapter(model, settings.experts),
            stored=llm.models.stored_dtype(config),
            **data | {"notes": ["seconds are without --tasks"] * bool(settings.tasks)},
        )


def draw(settings: LanguageSettings) -> tuple[Any, dict[str, Any]]:
    """Return the config, and what a `Language` has beside its model, by name."""
    llm.models.silence()
    config, tokenizer = llm.models.load_tokenizer(settings.model, settings.trust_remote_code)
    if llm.heads.processed(config):
        tokenizer = checkpoint(settings).processor()
    kind, classifies = llm.heads.head(config), llm.heads.classifies(config)
    compares = kind == llm.heads.BARE and hasattr(config, "vision_config")
    if settings.evaluate and kind == llm.heads.BARE and not compares:
        raise GblmError(f"model {settings.model} has no head to judge it by; leave --evaluate out")
    if settings.bos and kind != llm.heads.CAUSAL:
        raise GblmError(f"--bos is for causal models of text, and {settings.model} is none")
    if settings.unlabelled and not classifies:
        raise GblmError(f"--unlabelled is for classifiers, and {settings.model} is none")
    batch = samples(settings, settings.calibration, config, tokenizer)
    sets, pairs, classes = {}, {}, {}
    for source in settings.evaluate:
        if compares:
            limit = settings.evaluate_windows
            classes[source] = llm.contrast.classes(source, settings.template, limit)
        elif kind == llm.heads.SPEECH:
            own = llm.pairs.read(source, "audio")[: settings.evaluate_windows]
            sets[source] = llm.speech.batch(own, tokenizer, config)
        elif llm.pairs.is_pairs(source):
            own = llm.pairs.read(source)[: settings.evaluate_windows]
            sets[source] = llm.pairs.batch(own, tokenizer)
            if settings.exact_match:
                pairs[source] = [pair for pair in own if pair.answer]
        elif classifies:
            rows = llm.labelled.read(source, "evaluation")[: settings.evaluate_windows]
            sets[source] = llm.labelled.batch(rows, config, tokenizer, settings.length)
        else:
            sets[source] = evaluated(settings, source, config, tokenizer, batch)
    if settings.exact_match and not pairs:
        raise GblmError("--exact-match goes with --evaluate PAIRS.jsonl that holds answers")
    notes = ["the calibration labels are the model's own predictions"] * settings.unlabelled
    found = {"batch": batch, "sets": sets, "pairs": pairs, "tokenizer": tokenizer}
    return config, {**found, "classes": classes, "notes": notes}


def samples(settings: LanguageSettings, source: str, config: Any, tokenizer: Any) -> Batch:
    """Return the calibration samples of a source: pairs, labelled texts, or windows.

    Of no source it is one window of ids in their order.
    """
    if source == NONE:
        length = llm.models.window_length(config, settings.length)
        ids = torch.arange(length)[None] % llm.models.vocabulary(config)
        return llm.heads.samples_of(ids, config, tokenizer, settings.seed)
    if llm.heads.head(config) == llm.heads.SPEECH:
        pairs = drawn(settings, llm.pairs.read(source, "audio"), "pairs")
        return llm.speech.batch(pairs, tokenizer, config)
    if llm.pairs.is_pairs(source):
        if not hasattr(config, "vision_config"):
            what = "pictures or recordings"
            raise GblmError(
                f"{source} holds {what}, which {settings.model} does not take; give text"
            )
        pairs = drawn(settings, llm.pairs.read(source), "pairs")
        if llm.heads.head(config) == llm.heads.BARE:
            return llm.pairs.contrasted(pairs, tokenizer, config, settings.template)
        return llm.pairs.batch(pairs, tokenizer)
    if llm.heads.classifies(config):
        labelled = not settings.unlabelled
        find = llm.labelled.read if labelled else llm.sources.table
        if rows := find(source, "calibration"):
            some, length = drawn(settings, rows, "texts"), settings.length
            return llm.labelled.batch(some, config, tokenizer, length, labelled)
    if hasattr(config, "vision_config"):
        log.warning("calibration on text alone: what sees the pictures stays dense")
    size_of = {"samples": settings.samples, "length": settings.length}
    size_of |= {"seed": settings.seed, "bos": settings.bos}
    words = getattr(tokenizer, "tokenizer", tokenizer)
    return llm.models.windows(source, config, words, **size_of)


def drawn(settings: LanguageSettings, found: list[Any], what: str) -> list[Any]:
    """Return as many as there are to be samples; raises `GblmError` where there are fewer."""
    if len(found) < settings.samples:
        raise GblmError(
            f"{settings.calibration} holds {len(found)} {what}, {settings.samples} asked for; "
            f"use --samples {len(found)} or less"
        )
    return random.Random(settings.seed).sample(found, settings.samples)


def evaluated(
    settings: LanguageSettings, source: str, config: Any, tokenizer: Any, batch: Batch
) -> Batch:
    """Return the windows of a source to evaluate on, as long as those of the calibration."""
    words, length = getattr(tokenizer, "tokenizer", tokenizer), settings.length
    length = llm.models.window_length(config, length or llm.models.length_of(batch))
    ids = llm.data.evaluation(source, words, length, settings.evaluate_windows, settings.bos)
    llm.data.check_ids(ids, llm.models.vocabulary(config), source)
    return llm.heads.samples_of(ids, config, words, settings.seed)


def checkpoint(settings: LanguageSettings) -> Any:
    """Return the checkpoint of the model, and what of it is trusted."""
    trust = settings.trust_remote_code, settings.allow_pickle
    return llm.models.Checkpoint(settings.model, *trust)


def open_tasks(settings: LanguageSettings) -> Any:
    """Return the zero-shot tasks with their items, None where the flags name none."""
    names, data, limit = settings.tasks, settings.task_data, settings.task_limit
    if names:
        return llm.zero_shot.open_tasks(names, data, limit)
    if data or limit is not None:
        raise GblmError("--task-data and --task-limit go with --tasks; name some, or paper")
    return None


SIDE = side.Side(
    program="gblm llm",
    about="Prune a causal language model, without retraining.",
    examples=EXAMPLES,
    kind=LanguageSettings,
    load=load,
    sketch=sketch,
    usual={
        "method": ("best",),
        "sparsity": ("0.5",),
        "calibration": "c4",
        "samples": 128,
    },
    demo={
        "model": demo.NAME,
        "calibration": "demo",
        "evaluate": ("demo",),
        "method": ("magnitude", "gradient", "wanda", "gblm", "sparsegpt", "best"),
        "evaluate_windows": 160,
    },
    alone=("calibration", "evaluate", "length"),
)
main = partial(side.main, SIDE)

if __name__ == "__main__":
    sys.exit(main())
