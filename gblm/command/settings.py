"""The settings of a command: one dataclass gives its flags, their help, files and completion."""

import argparse
import difflib
import shutil
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import shtab
import tomli_w
import torch
from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.argument import Argument
from cyclopts.config import Dict
from cyclopts.help import HelpPanel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gblm.base import GblmError, one_of
from gblm.machine.device import COMPUTE_DTYPES, DTYPES
from gblm.machine.export import EXPORTS
from gblm.machine.files import portable, write_text
from gblm.machine.offload import OFFLOADS
from gblm.machine.processes import world
from gblm.maths import patterns
from gblm.maths.allocation import ALLOCATIONS
from gblm.maths.scores import NORMS
from gblm.methods import METHODS, SOLVERS
from gblm.report import versions
from gblm.walk.gradients import BACKWARDS

NAME = "config.toml"
SHELLS = ("bash", "zsh", "tcsh")
MEASURES = ("speed",)
RUNTIMES = ("dense", "semi-structured")
FORMATS = ("safetensors", "packed")
ZEROS = {"auto": 0.05, "always": 0.0, "never": 1.0}  # by the share of a linear that is 0
LISTS = ("methods", "patterns", "allocations", "gains")
EXITS = "exit codes: 0 done, 2 something given is wrong (the message says what), 130 interrupted"


def _text(text: str) -> str:
    if not text:
        raise ValueError
    return text


@dataclass(frozen=True)
class Value:
    """What a flag takes, and the converter by which cyclopts reads it.

    read: the value of a text, or `ValueError`. meaning, types: what it is in words, and in a TOML
    file. offers: "folder" or "file", by which a shell completes it, or words, of which it is one.
    several: whether it is texts with commas between, of those words or others.
    """

    read: Callable[[str], Any] = _text
    meaning: str = "a string"
    types: tuple[type, ...] = (str,)
    offers: str | Collection[str] = ()
    several: bool = False

    @property
    def words(self) -> Collection[str]:
        return () if isinstance(self.offers, str) else self.offers

    def __call__(self, hint: Any, given: Sequence[Any]) -> Any:
        """Return the value of the last text given for a flag, or of all where it takes several."""
        last = given[-1]
        source = "" if last.source == "cli" else f"{last.source}: "
        name = (last.keyword or "").strip("-[]")
        if self.several:
            texts = given if source else [last]
            return tuple(dict.fromkeys(part for text in texts for part in listed(text.value)))
        try:
            if self.words:
                return one_of(last.value, self.words, name.replace("-", " "))
            return self.read(last.value)
        except ValueError:
            text = f"{name} {last.value[:40]!r} is not {self.meaning}; see --help"
            raise GblmError(f"{source}{text}") from None
        except GblmError as error:
            raise GblmError(f"{source}{error}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise ValueError
    return int(text)


TEXT, FOLDER, FILE = Value(), Value(offers="folder"), Value(offers="file")
PATH = Value(lambda text: Path(text).expanduser(), offers="folder")
COUNT = Value(_count, "a whole number of 1 or more", (int,))
NUMBER = Value(int, "a whole number", (int,))
REAL = Value(float, "a number", (int, float))
AMOUNT = Value(meaning="a number or a string", types=(int, float, str))
WHOLE = replace(
    AMOUNT,
    read=lambda text: None if text == "auto" else _count(text),
    meaning="auto or a whole number of 1 or more",
)
SEVERAL = Value(meaning="a string, or a list of them", types=(str, int, float, list), several=True)
FILES = replace(SEVERAL, offers="file")
MENDED = [f"{method}+{solver}" for method in METHODS for solver in SOLVERS]


def listed(text: str) -> list[str]:
    """Return the values in a text that stand between commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


GROUPS = (  # of --help, in their order
    "what to prune",
    "how to prune (METHODS, PATTERNS: several, with commas, are compared)",
    "calibration",
    "evaluation, before and after",
    "memory and speed",
    "large models, several processes (torchrun --nproc-per-node 8 -m …)",
    "output",
    "help",
)
RECIPE = GROUPS[:6]  # those that a result depends on
APART = ("work-dir", "resume")  # where a run works, which does not change what it gives


def _group(title: str) -> Callable[..., Parameter]:
    """Return a function that makes a flag of a group, by what it takes and how that is called."""
    group = Group(title, sort_key=GROUPS.index(title))

    def flag(value: Value | None = None, metavar: str | None = None, **more: Any) -> Parameter:
        return Parameter(group=group, converter=value, metavar=metavar, **more)

    return flag


WHAT, HOW, CALIBRATION, EVALUATION, MEMORY, SCALE, OUTPUT, HELP = map(_group, GROUPS)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags that mean the same on every side, which adds its own in a class below this one."""

    model: Annotated[str, WHAT(FOLDER, "MODEL")] = ""
    """a folder, or a name of the hub; without it, the packaged demo"""
    include: Annotated[tuple[str, ...], WHAT(SEVERAL, "NAMES")] = ()
    """linear layers to prune, with commas, * for anything"""
    exclude: Annotated[tuple[str, ...], WHAT(SEVERAL, "NAMES")] = ()
    """linear layers to leave dense, such as '*.down_proj,model.layers.0.*'"""
    method: Annotated[
        tuple[str, ...], HOW(replace(SEVERAL, offers=[*METHODS, *MENDED]), "METHODS")
    ] = ()
    """how weights are chosen; METHOD+SOLVER, METHOD:OPTION=VALUE; see --list methods"""
    sparsity: Annotated[tuple[str, ...], HOW(SEVERAL, "PATTERNS")] = ()
    """0.5, 2:4, …; see --list patterns"""
    uneven: Annotated[bool, HOW()] = False
    """units of 'neurons:0.25': layers may keep different numbers; a file beside loads the result"""
    pattern_for: Annotated[tuple[str, ...], HOW(SEVERAL, "NAME=PATTERN")] = ()
    """a pattern of its own for some layers, such as '*.down_proj=0.3,*.q_proj=dense'"""
    keep_zeros: Annotated[str, HOW(Value(offers=[*ZEROS]), "WHEN")] = "auto"
    """what is 0 stays 0: always, never [in layers with many zeros]"""
    alpha: Annotated[str, HOW(AMOUNT, "ALPHA")] = ""
    """factor of the gradient term, or auto: equal medians"""
    norm: Annotated[str, HOW(Value(offers=NORMS), "NORM")] = ""
    """of gradients over samples: l1, l2 [as published]"""
    group: Annotated[str, HOW(Value(offers=["auto", *patterns.GROUPS]), "GROUP")] = "auto"
    """comparison group: row, layer [as published]"""
    allocation: Annotated[str, HOW(Value(offers=ALLOCATIONS), "NAME")] = ""
    """a sparsity for each layer at the same total; see --list allocations"""
    rotate: Annotated[int | None, HOW(NUMBER, "STEPS")] = None
    """steps that first learn a rotation of the stream between the blocks, 60 is usual"""
    refine: Annotated[float | None, HOW(REAL, "PASSES")] = None
    """passes over the samples that refine each block's weights"""
    calibration: Annotated[str, CALIBRATION(FILE, "SOURCE")] = ""
    """a data set or a local path"""
    samples: Annotated[int, CALIBRATION(COUNT, "N")] = 0
    """number of calibration samples"""
    seed: Annotated[int, CALIBRATION(NUMBER, "N")] = 0
    """of the calibration samples [0]"""
    unlabelled: Annotated[bool, CALIBRATION()] = False
    """labels are the predictions of the model, a classifier"""
    evaluate: Annotated[tuple[str, ...], EVALUATION(FILES, "SOURCES")] = ()
    """data sets or local paths, with commas"""
    measure: Annotated[str, EVALUATION(Value(offers=MEASURES), "WHAT")] = ""
    """speed: of the whole model, with the size of its file and its memory"""
    runtime: Annotated[str, EVALUATION(Value(offers=RUNTIMES), "HOW")] = "dense"
    """semi-structured: of 2:4 on a GPU, where it is quicker [dense]"""
    device: Annotated[str, MEMORY(TEXT, "DEVICE")] = "auto"
    """cpu, cuda, cuda:1, … [a GPU where there is one]"""
    dtype: Annotated[str, MEMORY(Value(offers=["auto", *DTYPES]), "DTYPE")] = "auto"
    """float32, bfloat16, float16 [as stored]"""
    compute_dtype: Annotated[str, MEMORY(Value(offers=COMPUTE_DTYPES), "DTYPE")] = "auto"
    """of products in blocks of float32: float32, bfloat16 [by the device]"""
    micro_batch: Annotated[int | None, MEMORY(WHOLE, "N")] = None
    """samples a block sees at a time [auto]"""
    backward: Annotated[str, MEMORY(Value(offers=BACKWARDS), "HOW")] = "auto"
    """gradients by blocks, or by the whole model [auto]"""
    offload: Annotated[str, SCALE(Value(offers=OFFLOADS), "WHERE")] = "auto"
    """weights away from the device: none, cpu, disk [auto]"""
    work_dir: Annotated[Path | None, SCALE(PATH, "DIR")] = None
    """for gradients, finished blocks and their journal"""
    resume: Annotated[bool, SCALE()] = False
    """go on with the run that --work-dir holds"""
    gradients: Annotated[Path | None, SCALE(PATH, "DIR")] = None
    """of a former run: the gradients in its --work-dir"""
    gradient_dtype: Annotated[str, SCALE(Value(offers=DTYPES), "DTYPE")] = "float32"
    """of gradients in a folder [float32]"""
    push_to_hub: Annotated[str, OUTPUT(TEXT, "OWNER/NAME")] = ""
    """upload the result, with its model card, to this repository of the hub"""
    output: Annotated[Path | None, OUTPUT(PATH, "DIR")] = None
    """for the pruned model and its report.json"""
    format: Annotated[str, OUTPUT(Value(offers=FORMATS), "FORMAT")] = "safetensors"
    """of the output; packed is smaller on disk alone [safetensors]"""
    export: Annotated[str, OUTPUT(Value(offers=EXPORTS), "FORM")] = ""
    """onnx, or coreml of classifiers: the result for other runtimes, beside it"""
    report: Annotated[Path | None, OUTPUT(PATH, "DIR")] = None
    """write an HTML report to DIR"""
    overwrite: Annotated[bool, OUTPUT()] = False
    """let output and report replace what is there"""
    dry_run: Annotated[bool, OUTPUT()] = False
    """say what a run would do and take; nothing is run"""
    verbose: Annotated[int, OUTPUT(name=("-v", "--verbose"), count=True, allow_repeating=None)] = 0
    """a line for every block; twice for details"""

    @property
    def dense(self) -> list[str]:
        """The names of the linears that stay dense."""
        ends = (text.removesuffix("=dense") for text in self.pattern_for if text.endswith("=dense"))
        return [*self.exclude, *ends]


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The flags that a command line alone has: a file of flags, and what asks for an answer."""

    config: Annotated[Path | None, HELP(replace(PATH, offers="file"), "FILE")] = None
    """a TOML file of flags, such as the config.toml of a result"""
    list: Annotated[str | None, HELP(Value(offers=LISTS), "WHAT")] = None
    """say what there is: methods, patterns, allocations; what zeros buy: gains"""
    completion: Annotated[str | None, HELP(Value(offers=SHELLS), "SHELL")] = None
    """a script for bash, zsh or tcsh"""
    version: Annotated[bool, HELP()] = False
    """of gblm and of the packages it stands on"""


S = TypeVar("S", bound=Settings)


def flags(app: App) -> dict[str, Argument]:
    """Return the flags of a command by their names in a file."""
    arguments = app.assemble_argument_collection(parse_docstring=True)
    return {flag.names[-1].lstrip("-"): flag for flag in arguments if flag.keys}


def parse(app: App, argv: Sequence[str] | None = None) -> tuple[Any, CommandLine] | None:
    """Return the settings of a command line and of the file its --config names; the former win.

    None where help was asked for, which is printed. Raises `GblmError` where a flag or a key is
    unknown, or its value is of another type.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parsed = app(words)
        if parsed and (path := parsed[1].config):
            app.config = (Dict(_stored(path, flags(app)), source=str(path)),)
            parsed = app(words)
    except CycloptsError as error:
        text = str(error).rstrip(".").replace(". Did", "; did")
        raise GblmError(f"{text[:1].lower()}{text[1:]}; see --help") from None
    return parsed


def make_app(
    program: str, text: str, kind: type[Settings], usual: Mapping[str, Any] | None = None
) -> App:
    """Return the parser of a class of settings; text: what stands above the flags in the help.

    usual: the values of flags that are not given, which the help shows.
    """
    app = App(
        name=program,
        usage=f"usage: {program} [--model MODEL] \\[flags]",
        help=text,
        help_format="plaintext",
        help_epilogue=EXITS,
        help_formatter=partial(_panel, usual or {}),
        version_flags=(),
        console=Console(width=min(100, shutil.get_terminal_size().columns)),
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
        default_parameter=Parameter(allow_repeating=True, negative=()),
    )
    app["--help"].group, app["--help"].help = HELP().group, "show this"  # type: ignore[assignment]
    flat = Parameter(name="*")

    def run(
        settings: Annotated[kind, flat] = kind(),  # type: ignore[valid-type]  # noqa: B008
        line: Annotated[CommandLine, flat] = CommandLine(),
    ) -> tuple[Settings, CommandLine]:
        return settings, line

    app.default(run)
    return app


def _panel(usual: Mapping[str, Any], console: Console, options: Any, panel: HelpPanel) -> None:
    """Print a group of flags: its title, then a line for each with its help beside it."""
    if not panel.entries:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=28, overflow="fold")
    for entry in panel.entries:
        names = entry.all_options
        value = usual.get(names[-1].lstrip("-").replace("-", "_"))
        shown = ",".join(value) if isinstance(value, tuple) else value
        if value:
            entry.description.append(Text(f"[{shown}]"))
        table.add_row(f"  {', '.join(names)} {entry.metavar or ''}", entry.description)
    console.print(f"{panel.title}:", table, "", highlight=False)


def _stored(path: Path, arguments: dict[str, Argument]) -> dict[str, Any]:
    """Return what a file of flags holds; raises `GblmError` for what no flag takes."""
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GblmError(f"{path} cannot be read ({reason}); give a TOML file of flags") from error
    for key, content in stored.items():
        flag = arguments.get(key)
        if key == "help" or (flag and _group_of(flag) == GROUPS[-1]):
            raise GblmError(f"{path}: {key} goes on the command line alone; remove it")
        if not flag:
            near = difflib.get_close_matches(key, arguments, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise GblmError(f"{path}: no flag is called {key}{hint}; see --help")
        value = _value_of(flag) or Value(meaning="true or false", types=(bool,))
        for part in content if isinstance(content, list) and value.several else [content]:
            right = isinstance(part, value.types)
            if not right or isinstance(part, bool) != (bool in value.types):
                raise GblmError(f"{path}: {key} is {content!r}; give {value.meaning}")
    return {key: int(part) if key == "verbose" else part for key, part in stored.items()}


def _value_of(flag: Argument) -> Value | None:
    return flag.parameter.converter  # type: ignore[return-value]


def _group_of(flag: Argument) -> str:
    return flag.parameter.group[0].name  # type: ignore[index]


def keeps(settings: Settings) -> bool:
    """Say whether anything is to be kept or rounded in a folder, or taken from a former run."""
    return bool(settings.work_dir or settings.gradients or settings.gradient_dtype != "float32")


def filled(settings: S, **usual: Any) -> S:
    """Return settings in which what was not given has the usual value."""
    return replace(settings, **{k: value for k, value in usual.items() if not getattr(settings, k)})


@dataclass
class Recipe:
    """The flags that the results of a command depend on, to be written beside each of them."""

    program: str
    flags: dict[str, Any]

    def write(self, folder: Path, **run: Any) -> None:
        """Write the flags into the folder of one run, whose own stand in their place."""
        packages = ", ".join(f"{name} {number}" for name, number in versions().items())
        head = (
            f"# Repeat this run, in the folder it ran in: {self.program} --config {NAME} --output "
            "DIR\n"
            f"# It ran with {packages};\n"
            f"# processes: {world()}, threads of each: {torch.get_num_threads()}.\n\n"
        )
        write_text(folder / NAME, head + tomli_w.dumps(self.flags | run))


def recipe(app: App, settings: Settings) -> Recipe:
    """Return the recipe of a command's settings."""
    stored: dict[str, Any] = {}
    for key, flag in flags(app).items():
        content = getattr(settings, flag.keys[-1], None)
        if _group_of(flag) not in RECIPE or key in APART or content in (None, False, (), ""):
            continue
        if isinstance(content, tuple):
            content = content[0] if len(content) == 1 else list(content)
        elif isinstance(content, Path):
            content = portable(str(content))
        stored[key] = content
    return Recipe(app.name[0], stored)


def portable_names(settings: S) -> S:
    """Return settings whose models and data have names without the folders of this machine."""
    found: dict[str, Any] = {}
    for key, content in vars(settings).items():
        if isinstance(content, str):
            found[key] = _portable(content)
        elif isinstance(content, tuple):
            found[key] = tuple(map(_portable, content))
    return replace(settings, **found)


def _portable(text: str) -> str:
    """Return a name; what an absolute path becomes is a path still, and no name of the hub."""
    short = portable(text)
    return f"./{short}" if short != text and "/" not in short else short


def completion(app: App, shell: str) -> str:
    """Return the script that completes the flags of a command, `gblm-llm` say, in a shell."""
    parser = argparse.ArgumentParser(app.name[0].replace(" ", "-"))
    places = {"folder": shtab.DIRECTORY, "file": shtab.FILE}
    for key, flag in flags(app).items():
        value, kind = _value_of(flag), dict[str, Any]()
        if not value:
            kind["action"] = "store_true"
        elif value.words and not value.several:
            kind["choices"] = value.words
        action = parser.add_argument(*flag.names, help=flag.parameter.help, **kind)
        if value and value.offers and not kind:
            complete = _words(key, value.words) if value.words else places[str(value.offers)]
            action.complete = complete  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _words(name: str, choices: Collection[str]) -> dict[str, Any]:
    """Return what shells offer for a flag that takes some of the choices, with commas."""
    function, words = f"_gblm_{name}", " ".join(choices)
    script = f"""
{function}() {{
  local before=""
  [[ $1 == *,* ]] && before="${{1%,*}},"
  compgen -P "$before" -W "{words}" -- "${{1##*,}}"
}}"""
    return {
        "bash": function,
        "zsh": f"{{_values -s , {name} {words}}}",
        "tcsh": f"({words})",
        "preamble": {"bash": script},
    }
