"""Every command and snippet of the pages is run, on small stand-ins; every link leads somewhere.

A block of ```sh holds commands, ```python a snippet, ```toml a file; ```text is output and is not
run. The blocks of a page are run in their order in one folder, as a reader has it.
"""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from gblm.command.settings import parse
from gblm.gains.__main__ import main as try_zeros
from gblm.llm.__main__ import SIDE as LLM
from gblm.llm.__main__ import main as prune_llm
from gblm.methods import METHODS
from gblm.packed.__main__ import main as pack
from gblm.report.__main__ import main as show
from gblm.vit.__main__ import SIDE as VIT
from gblm.vit.__main__ import main as prune_vit

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def named(page: Path) -> str:
    """Return what a test of a page is called."""
    return str(page.relative_to(ROOT))


# What the pages name, and what is in the reader's folder in its place (see `reader`).
STAND_INS = {
    "meta-llama/Llama-2-7b-hf": "tiny-llama",
    "meta-llama/Llama-2-70b-hf": "tiny-llama",
    "Qwen/Qwen3-30B-A3B": "tiny-moe",
    "llava-hf/llava-1.5-7b-hf": "tiny-llava",
    "openai/clip-vit-base-patch32": "tiny-clip",
    "openai/whisper-tiny.en": "tiny-whisper",
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": "tiny-bert",
    "vit_base_patch16_224": "tiny-vit",
    "google/vit-base-patch16-224": "tiny-vit-of-transformers",
    "HuggingFaceTB/SmolLM2-135M": "tiny-llama",
    "flowers/train": "images",
    "flowers/val": "images",
    "c4": "notes.txt",
    "wikitext2": "notes.txt",
    "imagenet/train": "images",
    "imagenet/val": "images",
}
NUMBERS = {"samples=1024": "samples=8"}  # of a snippet
# What makes a run short; of two flags the last one counts.
SHORT = {
    "gblm.llm": ["--samples", "6", "--length", "16", "--device", "cpu"],
    "gblm.vit": ["--samples", "8", "--device", "cpu", "--workers", "1"],
    "quality.py": ["--samples", "6", "--length", "16", "--windows", "8", "--draws", "1"],
    "figures.py": ["--samples", "6", "--length", "16", "--windows", "8"],
    "paper_tables.py": [
        *("--calibration", "notes.txt", "--evaluate", "notes.txt"),  # they have defaults there
        *("--samples", "6", "--length", "16", "--windows", "8"),
    ],
    "zero_shot.py": ["--limit", "1"],
    "imagenet.py": [],
    "zeros.py": ["--length", "16", "--new", "4", "--seconds", "0"],
}
TOOLS = {"gblm.report": show, "gblm.gains": try_zeros, "gblm.packed": pack}
SIDES = {"gblm.llm": (prune_llm, LLM), "gblm.vit": (prune_vit, VIT)}
TASKS = {  # an item of each of the paper's tasks
    "boolq": {"question": "is it so", "passage": "It is.", "answer": True},
    "rte": {"sentence1": "It is so.", "sentence2": "It is.", "label": 0, "idx": 0},
    "hellaswag": {
        "ind": 0,
        "activity_label": "Run",
        "ctx_a": "He runs.",
        "ctx_b": "he",
        "ctx": "He runs. he",
        "endings": ["falls.", "runs.", "sings.", "sits."],
        "label": 1,
    },
    "winogrande": {
        "sentence": "The cat met the dog when the _ woke.",
        "option1": "cat",
        "option2": "dog",
        "answer": "1",
    },
    "arc_easy": {
        "id": "0",
        "question": "What is 1 and 1?",
        "choices": {"text": ["1", "2", "3"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "id": "0",
        "question_stem": "Snow is",
        "choices": {"text": ["cold", "hot", "red", "old"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
}


@pytest.fixture(autouse=True)
def _methods_of_a_page_go_with_it() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def reader(llm: list[str], vit: list[str], tmp_path: Path, monkeypatch) -> Path:
    """The folder of a reader: models, texts, images and tasks, all of them small."""
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    llama = Path(llm[llm.index("--model") + 1])
    images = Path(vit[vit.index("--calibration") + 1])
    links = {
        "notes.txt": llama.parent / "notes.txt",
        "tiny-vit": images.parent / "tiny",
        "images": images,
        "pictures": images,
    }
    for name, place in links.items():
        (tmp_path / name).symlink_to(place)
    shutil.copytree(llama, tmp_path / "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(llama, eos_token="Ā")  # zero-shot prompts begin so
    tokenizer.save_pretrained(tmp_path / "tiny-llama")
    state = load_file(images.parent / "tiny" / "model.safetensors")
    torch.save(state, tmp_path / "flowers.pth")
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "train").symlink_to(images)
    save_moe(tmp_path / "tiny-moe", tokenizer)
    save_llava(tmp_path / "tiny-llava", tmp_path)
    save_clip(tmp_path / "tiny-clip")
    save_whisper(tmp_path / "tiny-whisper", tokenizer)
    save_classifier(tmp_path / "tiny-bert", tokenizer)
    save_vit(tmp_path / "tiny-vit-of-transformers")
    (tmp_path / "tasks").mkdir()
    for task, item in TASKS.items():
        (tmp_path / "tasks" / f"{task}_validation.jsonl").write_text(json.dumps(item) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing from elsewhere
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("gblm.command.measure.SECONDS", 0)
    monkeypatch.setattr(sys.modules["gblm.gains"], "SECONDS", 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    return tmp_path


def save_moe(folder: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_whisper(folder: Path, tokenizer: Any) -> None:
    """Save a model that hears a second, and beside it recordings with what is said there."""
    sides = ("encoder", "decoder")
    sizes = {f"{side}_{name}": 1 for side in sides for name in ("layers", "attention_heads")}
    sizes |= {f"{side}_ffn_dim": 16 for side in sides} | {"num_mel_bins": 8, "d_model": 16}
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    numbers = {mark: len(tokenizer) + i for i, mark in enumerate(marks)}
    end, start, last = numbers.values()
    ids = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end}
    ids |= {"decoder_start_token_id": start, "vocab_size": last + 1}
    config = WhisperConfig(max_source_positions=50, max_target_positions=32, **sizes, **ids)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    words = WhisperTokenizer(tokenizer.get_vocab() | numbers, [], pad_token=marks[0])
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    WhisperProcessor(extractor, words).save_pretrained(folder)
    with wave.open(str(folder.parent / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(range(250)) * 80)
    lines = [json.dumps({"audio": "a.wav", "text": f"text {i}"}) for i in range(8)]
    (folder.parent / "said.jsonl").write_text("\n".join(lines))


def save_classifier(folder: Path, tokenizer: Any) -> None:
    """Save a classifier of texts, and beside it texts with labels."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    names = {"label2id": {"NEGATIVE": 0, "POSITIVE": 1}, "id2label": {0: "NEGATIVE", 1: "POSITIVE"}}
    config = BertConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes, **names)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"text": f"review {i}", "label": ["POSITIVE", 0][i % 2]} for i in range(8)]
    (folder.parent / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))


def save_vit(folder: Path) -> None:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16}
    config = ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def save_llava(folder: Path, pairs: Path) -> None:
    """Save a model that sees, and pairs of pictures and text."""
    train_demo_vlm = importlib.import_module("train_demo_vlm")
    torch.manual_seed(0)
    tokenizer = train_demo_vlm.word_tokenizer()
    train_demo_vlm.tiny_llava(tokenizer).save_pretrained(folder)
    train_demo_vlm.digits_processor().save_pretrained(folder)
    (pairs / "shown").mkdir()
    lines = []
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(pairs / "shown" / f"{i}.png")
        lines.append({"image": f"shown/{i}.png", "text": "which digit is it?", "answer": str(i)})
    (pairs / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))


def save_clip(folder: Path) -> None:
    words = AutoTokenizer.from_pretrained(folder.parent / "tiny-llava")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(words)}
    config = CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 16})
    config.vision_config.patch_size = 8
    CLIPModel(config).save_pretrained(folder)
    lines = (folder.parent / "pairs.jsonl").read_text().splitlines()
    texts = [json.dumps({"image": json.loads(line)["image"], "text": "a digit"}) for line in lines]
    (folder.parent / "captions.jsonl").write_text("\n".join(texts))
    square = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size=square, crop_size=square), words).save_pretrained(folder)


# What a page holds.


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page: their language and their text."""
    found = re.findall(r"^```(.*?)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert page.count("```") == 2 * len(found), "a fence is not closed"
    return found


def commands(text: str) -> list[list[str]]:
    """Return the words of every command of a block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def stood_in(words: Sequence[str]) -> list[str]:
    """Return the words of a command with the stand-ins in them."""
    parted = (word.split(",") for word in words)
    return [",".join(STAND_INS.get(part, part) for part in parts) for parts in parted]


def quoted(text: str) -> str:
    """Return Python or TOML with the stand-ins in its strings, and fewer samples."""
    for name, place in STAND_INS.items():
        text = text.replace(f'"{name}"', f'"{place}"')
    for many, few in NUMBERS.items():
        text = text.replace(many, few)
    return text


# How it is run.


def exits(work: Callable[[], int | None]) -> None:
    """Run a command and check that it ends well."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = work()
        except SystemExit as end:
            code = end.code
    assert not code, f"exit code {code}: {said.getvalue()}"


def shortened(program: str, argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command with what makes it short, where it runs a model."""
    asks = {"--list", "--completion", "--version", "--help"} & set(argv)
    return stood_in(argv) + ([] if asks else SHORT[program])


def python(words: list[str]) -> None:
    """Run `python -m MODULE …` or `python eval/SCRIPT.py …` in this process."""
    if words[0] == "-m" and words[1] in SIDES:
        return exits(lambda: SIDES[words[1]][0](shortened(words[1], words[2:])))
    if words[0] == "-m" and words[1] in TOOLS:
        return exits(lambda: TOOLS[words[1]](words[2:]))
    script = ROOT / words[0]
    assert script.parent == ROOT / "eval", f"no way is known to run python {words[0]}"
    before, sys.argv = sys.argv, [words[0], *shortened(script.name, words[1:])]
    try:
        exits(lambda: runpy.run_path(str(script), run_name="__main__") and None)
    finally:
        sys.argv = before


def torchrun(words: list[str]) -> None:
    """Run a command in one process in place of several, or parse it for several machines.

    tests/test_scale.py runs commands in several.
    """
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(words)
    program = launch.training_script
    assert launch.module
    if launch.nnodes == "1:1":
        return python(["-m", program, *launch.training_script_args])
    parse(SIDES[program][1].app(), shortened(program, launch.training_script_args))


def make(words: list[str]) -> None:
    """Check that the Makefile has a target."""
    for target in words:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def pip(words: list[str]) -> None:
    """Check that `pip install` names this package and extras it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[0] == "install"
    for asked in map(Requirement, words[1:]):
        assert asked.name == project["name"]
        assert asked.extras <= set(project["optional-dependencies"])


HEADS = {
    "python": python,
    "gblm": lambda words: python(["-m", f"gblm.{words[0]}", *words[1:]]),
    "gblm-llm": lambda words: python(["-m", "gblm.llm", *words]),
    "gblm-vit": lambda words: python(["-m", "gblm.vit", *words]),
    "torchrun": torchrun,
    "make": make,
    "pip": pip,
}


def call(words: list[str]) -> None:
    """Run a command; what it prints goes where `> FILE` says."""
    head, *words = words
    assert head in HEADS, f"no way is known to run {head}"
    if ">" not in words:
        return HEADS[head](words)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        HEADS[head](words[: words.index(">")])
    assert said.getvalue(), f"{head} prints nothing"
    file = Path(words[words.index(">") + 1]).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(said.getvalue())


def run(page: str) -> None:
    """Run the blocks of a page; raises what goes wrong, AssertionError for a block not known."""
    scope: dict[str, object] = {"__name__": "page"}
    for language, text in blocks(page):
        if language == "sh":
            for words in commands(text):
                call(words)
        elif language == "python":
            exec(compile(quoted(text), "page", "exec"), scope)
        elif language == "toml":
            tomllib.loads(text)
            if name := re.match(r"# (\S+\.toml)\n", text):
                Path(name[1]).write_text(quoted(text))
        else:
            assert language == "text", f"no way is known to run a block of {language!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if "```" in page.read_text()], ids=named)
def test_a_page_runs(page: Path, reader: Path):
    run(page.read_text())


WRONG = {
    "```sh\npython -m gblm.llm --model c4 --sparsty 0.5\n```": "--sparsty",
    "```sh\npython -m gblm.llm --model tasks --calibration c4\n```": "tasks",
    "```sh\npython eval/quality.py llm --modle c4\n```": "exit code 2",
    "```sh\npython -m http.server\n```": "no way is known",
    "```sh\ntorchrun --nnodes 2 -m gblm.vit --sparsty 0.5\n```": "--sparsty",
    "```sh\nmake everything\n```": "everything",
    "```sh\npip install 'gblm[all]'\n```": "all",
    "```sh\nrm pruned\n```": "no way is known to run rm",
    "```\npython -m gblm.llm\n```": "no way is known to run a block",
    "```python\nimport gblm\ngblm.prone\n```": "prone",
    "```toml\nmodel = \n```": "value",
}


@pytest.mark.parametrize("page", WRONG, ids=list(WRONG.values()))
def test_a_wrong_page_is_found_out(page: str, reader: Path, capsys):
    with pytest.raises(Exception, match=re.escape(WRONG[page])):
        run(f"{page}\n")


# Links.


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken(page: Path, text: str) -> list[str]:
    """Return the links and pictures of a page's text that lead nowhere."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    wrong = []
    for target in targets:
        name, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        place = page.parent / name if name else page
        if not place.exists() or (anchor and anchor not in anchors(place.read_text())):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_of_a_page_lead_somewhere(page: Path):
    assert broken(page, page.read_text()) == []


def test_broken_links_are_found():
    page = ROOT / "README.md"
    text = (
        "[a](docs/none.md) ![b](docs/none.svg) [c](docs/design.md#none) [d](docs/design.md#words)"
    )
    assert broken(page, text) == ["docs/none.md", "docs/none.svg", "docs/design.md#none"]


def test_every_page_is_reached_from_the_readme():
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name}" in (ROOT / "README.md").read_text(), page.name
