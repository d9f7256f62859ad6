"""A result is its source with the pruned weights in it; all else has the source's bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gblm
from gblm import llm
from gblm.llm.__main__ import main
from gblm.llm.checkpoint import Checkpoint
from gblm.vit.__main__ import main as prune_vit
from tests.llm.test_families import FAMILIES, VOCABULARY, tiny

OFFLOADS = ["none", "cpu", "disk"]
OWN = {"README.md", "report.json", "config.toml"}
Files = dict[str, bytes]


def files(folder: Path) -> Files:
    """Return the bytes of every file of a folder, by its place in it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def changed(source: Path, result: Path, *more: str) -> set[str]:
    """Return the tensors that have other bytes in the result, each the source's with zeros.

    Fails where a file is missing or has other bytes, but for `more` that may be there.
    """
    before, after = files(source), files(result)
    weights = {name for name in before if name.endswith(".safetensors")}
    assert after.keys() - OWN == before.keys() | {*more}
    assert {name for name in before if before[name] != after[name]} <= weights
    found = set()
    for file in weights:
        old, new = tensors(source / file), tensors(result / file)
        assert old.keys() == new.keys()
        for name, one in old.items():
            other = new[name]
            assert one.dtype == other.dtype
            raw = one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
            if not torch.equal(*raw):
                found.add(name)
                assert torch.equal(other, torch.where(other == 0, 0, one)), name
    return found


def half_zero(found: set[str], result: Path) -> None:
    for file in result.glob("*.safetensors"):
        for name, value in tensors(file).items():
            if name in found:
                assert (value == 0).float().mean() == 0.5, name


def write_index(folder: Path, shards: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def odd(llm: list[str], tmp_path: Path) -> Path:
    """The tiny LLaMA in bf16 and three shards, with an fp32 norm, more tensors and more files."""
    folder = tmp_path / "source"
    shutil.copytree(llm[llm.index("--model") + 1], folder)
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    found = {name: own if "norm" in name else own.bfloat16() for name, own in found.items()}
    for own in found.values():  # fp32 values that bf16 has not
        own += 0.001 if own.dtype == torch.float32 else 0
    found |= {"mtp.proj.weight": torch.randn(4, 4), "steps": torch.tensor(7)}
    names, index = sorted(found), {}
    for i in range(3):
        part = {name: found[name] for name in names[i::3]}
        save_file(part, folder / f"part-{i}.safetensors", metadata={"format": "pt", "by": "me"})
        index |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "float16", "custom": {"kept": 1}}  # another than that of the files
    (folder / "config.json").write_text(json.dumps(config))
    texts = {
        "generation_config.json": '{"eos_token_id": [2, 9], "temperature": 0.6, "top_p": 0.9}',
        "LICENSE": "mine",
        "tokenizer.model": "pieces",
        "preprocessor_config.json": "{}",
        "modeling_x.py": "from .blocks_x import y",
        "blocks_x.py": "y = 1",
        "additional_chat_templates/tools.jinja": "{{ messages }}",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(llm: list[str], source: Path | str, output: Path, *more: str) -> int:
    flags = llm[1:]
    flags[flags.index("--windows")] = "--evaluate-windows"
    flags[flags.index("--model") + 1] = str(source)
    return main([*flags, "--method", "wanda", "--output", str(output), *more])


@pytest.mark.parametrize("offload", OFFLOADS)
def test_only_pruned_tensors_have_other_bytes(offload, odd, llm, tmp_path):
    aside = ["model.bin", "checkpoint-5/a.safetensors", ".git/config", "old/config.json"]
    assert run(llm, odd, tmp_path / "expected", "--offload", "none") == 0
    for name in aside:
        (odd / name).parent.mkdir(exist_ok=True)
        (odd / name).write_text("{}")
    assert run(llm, odd, tmp_path / "out", "--offload", offload) == 0
    for name in aside:
        (odd / name).unlink()
    found = changed(odd, tmp_path / "out")
    assert len(found) == 14
    assert all("_proj.weight" in name for name in found)
    half_zero(found, tmp_path / "out")
    expected = files(tmp_path / "expected")
    assert all(
        expected[name] == data for name, data in files(tmp_path / "out").items() if name not in OWN
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def hub(folder: Path, cache: Path, name: str, revision: str) -> None:
    """Lay a folder into a cache of the hub, as a revision of a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / f"{len(revision):040x}"
    for file in folder.rglob("*"):
        if file.is_file():
            blob = repository / "blobs" / f"{revision}-{file.name}"
            link = snapshot / file.relative_to(folder)
            for made in (blob, link):
                made.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link.symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(snapshot.name)


def test_a_model_of_the_hub_is_carried_at_its_revision(odd, llm, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    hub(odd, cache, "me/tiny", "main")
    (odd / "LICENSE").write_text("of the second")
    hub(odd, cache, "me/tiny", "second")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(llm, "me/tiny@second", tmp_path / "out") == 0
    assert len(changed(odd, tmp_path / "out")) == 14


TENSORS_BESIDE = {  # of families that leave some out
    "deepseek-v3": {"model.layers.2.eh_proj.weight": torch.randn(4, 8)},
    "qwen3-next": {"mtp.layers.0.norm.weight": torch.randn(4)},
}
QUICK = ["llama-3", "mixtral", "gpt2", "deepseek-v3", "qwen3-next"]


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES],
)
def test_families_are_carried_in_the_form_they_came_in(family, offload, tokenizer, tmp_path):
    """Experts in files of their own among them, which are one tensor in the model."""
    source, result = tmp_path / "source", tmp_path / "result"
    model = tiny(family).bfloat16()
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    beside = TENSORS_BESIDE.get(family, {})
    stored = load_file(source / "model.safetensors") | beside
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(str(source))
    model, offloaded = llm.models.load_offloaded(
        checkpoint, offload, tmp_path, torch.device("cpu"), "float32"
    )
    batch = {"input_ids": torch.randint(3, VOCABULARY, (3, 8))}
    report = gblm.prune(model, batch, gblm.METHODS["wanda"](), "0.5")
    llm.models.save(model, tokenizer, result, checkpoint)
    found = changed(source, result)
    pruned = sum(tensors(result / "model.safetensors")[name].numel() for name in found)
    assert pruned == report.weights
    again = llm.models.load(str(result), dtype="float32")[0]
    for name, own in llm.models.load(str(source), dtype="float32")[0].named_parameters():
        assert torch.equal(again.get_parameter(name), model.get_parameter(name)) or offloaded
        assert own.shape == again.get_parameter(name).shape
    if offloaded:
        offloaded.close()


def test_a_model_of_other_shapes_is_written_as_its_library_does(llm, tokenizer, tmp_path):
    source = Path(llm[llm.index("--model") + 1])
    model, _ = gblm.llm.load(str(source))
    config = LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 24})
    narrow = LlamaForCausalLM(config)
    gblm.llm.save(narrow, tokenizer, tmp_path / "narrow", like=str(source))
    shallow = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1}))
    gblm.llm.save(shallow, tokenizer, tmp_path / "shallow", like=str(source))
    for name, made in {"narrow": narrow, "shallow": shallow}.items():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(own, again[key]) for key, own in made.state_dict().items())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_classifier_of_timm_is_carried(offload, vit, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(vit[vit.index("--model") + 1], source)
    stored = load_file(source / "model.safetensors")
    stored = {k: own if k == "head.bias" else own.half() for k, own in stored.items()}
    save_file(stored, source / "model.safetensors")
    (source / "LICENSE").write_text("mine")
    flags = vit[1:]
    flags[flags.index("--model") + 1] = str(source)
    more = ["--method", "wanda", "--output", str(tmp_path / "out"), "--offload", offload]
    assert prune_vit([*flags, *more]) == 0
    found = changed(source, tmp_path / "out")
    assert len(found) == 8
    half_zero(found, tmp_path / "out")
    timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


def edited(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def with_tensors(**more: Tensor) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        found = {name.replace("__", "."): own for name, own in more.items()}
        save_file(stored | found, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def stale(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "old.safetensors")
    found = dict.fromkeys(load_file(folder / "old.safetensors"), "old.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": found})
    )


def misnamed(folder: Path) -> None:
    stale(folder)
    (folder / "model.safetensors").rename(folder / "new.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "new.safetensors"
    index["weight_map"]["lm_head.bias"] = "new.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


Q = "model__layers__0__self_attn__q_proj__weight"
REFUSED = {
    "quantised by its config": (edited(quantization_config={"quant_method": "gptq"}), "quantised"),
    "a scale beside a weight": (with_tensors(**{f"{Q}_scale_inv": torch.ones(1)}), "quantised"),
    "integers": (with_tensors(**{Q: torch.ones(32, 32, dtype=torch.int8)}), "quantised"),
    "fp8": (with_tensors(**{Q: torch.ones(32, 32).to(torch.float8_e4m3fn)}), "quantised"),
    "a stale index": (stale, "holds both model.safetensors and an index"),
    "an index of other names": (misnamed, "is stale"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge"),
}


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_is_refused_at_the_door(case, offload, llm, tmp_path, capsys):
    damage, message = REFUSED[case]
    shutil.copytree(llm[llm.index("--model") + 1], tmp_path / "source")
    damage(tmp_path / "source")
    assert run(llm, tmp_path / "source", tmp_path / "out", "--offload", offload) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "; " in error
    assert not (tmp_path / "out").exists()


def test_tensors_of_a_pickle_that_would_be_lost_are_named(llm, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(llm[llm.index("--model") + 1], source)
    stored = load_file(source / "model.safetensors") | {"mtp.weight": torch.ones(2)}
    (source / "model.safetensors").unlink()
    torch.save(stored, source / "pytorch_model.bin")
    assert run(llm, source, tmp_path / "out", "--allow-pickle") == 2
    assert "mtp.weight" in capsys.readouterr().err
