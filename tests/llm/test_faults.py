"""What is damaged, lies or is hostile ends in an error that names it, and writes nothing."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gblm import METHODS
from gblm.llm.__main__ import main

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, TOKENIZER, TOKENS = "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"
Damage = Callable[[Path], object]


@pytest.fixture
def model(llm: list[str], sealed: Any) -> Path:
    """A copy of the tiny LLaMA, to be damaged."""
    folder = sealed.root / "here" / "deep" / "model"
    shutil.copytree(llm[llm.index("--model") + 1], folder)
    return folder


@pytest.fixture
def run(llm: list[str], sealed: Any, model: Path) -> Callable[..., tuple[int, str]]:
    """Run the command on that copy, with an output."""
    output = sealed.root / "out"

    def run(*more: str) -> tuple[int, str]:
        given = [*short(llm), "--model", str(model), "--output", str(output)]
        return sealed.run(main, [*given, *more], output)

    return run


def short(llm: list[str]) -> list[str]:
    """Return the arguments of the tiny LLaMA for the command line, and of fewer samples."""
    given = llm[1:]
    given[given.index("--windows")] = "--evaluate-windows"
    return [*given, "--samples", "3", "--evaluate-windows", "4"]


def config(**values: object) -> Damage:
    return edited("config.json", lambda found: found.update(values))


def edited(name: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        edit(found)
        (folder / name).write_text(json.dumps(found))

    return damage


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def cut(size: Callable[[int, int], int]) -> Damage:
    """Keep `size(bytes of header, bytes in all)` of the weights."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        (folder / WEIGHTS).write_bytes(data[: size(header, len(data))])

    return damage


def flipped(name: str, at: int, bit: int) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1 << bit
        (folder / name).write_bytes(data)

    return damage


def weight(name: str, change: Callable[[torch.Tensor], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found[name])
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def poisoned(name: str, value: float) -> Damage:
    return weight(name, lambda found: found.view(-1)[7:8].fill_(value))


def index(value: object) -> Damage:
    """Put the weights into `a.safetensors`, with an index that holds a value."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / INDEX).write_bytes(data)

    return damage


def shards(*names: str) -> Damage:
    """Lay the weights into files of these names, by an index."""

    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        parts = [list(found)[i :: len(names)] for i in range(len(names))]
        for name, part in zip(names, parts, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file({key: found[key] for key in part}, folder / name, metadata={"format": "pt"})
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return damage


def vocabulary(change: Callable[[dict[str, int]], object]) -> Damage:
    return edited(TOKENIZER, lambda found: change(found["model"]["vocab"]))


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Damage, str]] = {
    # weights
    "no byte": (content(WEIGHTS, b""), "is damaged"),
    "half a length": (cut(lambda header, size: 4), "is damaged"),
    "half a header": (cut(lambda header, size: header // 2), "is damaged"),
    "no data": (cut(lambda header, size: header), "is damaged"),
    "one byte short": (cut(lambda header, size: size - 1), "is damaged"),
    "a length of exabytes": (flipped(WEIGHTS, 7, 6), "is damaged"),
    "a bit of the header's brace": (flipped(WEIGHTS, 8, 4), "is damaged"),
    "a NaN in a linear": (poisoned(Q, float("nan")), Q),
    "an Inf in a norm": (poisoned("model.norm.weight", float("inf")), "model.norm.weight"),
    "a NaN in the head": (poisoned("lm_head.weight", float("nan")), "lm_head.weight"),
    "a NaN nobody reads": (poisoned("model.embed_tokens.weight", float("nan")), "embed_tokens"),
    "a weight that overflows": (poisoned(Q, 3e38), "is nan"),
    # config.json
    "fewer words": (config(vocab_size=255), "config.json"),
    "more words": (config(vocab_size=257), "config.json"),
    "a trillion words": (config(vocab_size=10**12), "cannot be loaded"),
    "no word": (config(vocab_size=0), "vocabulary of 0"),
    "words as text": (config(vocab_size="many"), "vocab_size"),
    "wider": (config(hidden_size=64), "config.json"),
    "a width of a billion": (config(hidden_size=10**9), "cannot be loaded"),
    "a negative width": (config(hidden_size=-4), "cannot be loaded"),
    "fewer layers": (config(num_hidden_layers=1), "model.layers.1"),
    "more layers": (config(num_hidden_layers=3), "model.layers.2"),
    "ten million layers": (config(num_hidden_layers=10**7), "10000000 layers"),
    "no layer": (config(num_hidden_layers=0), "no blocks"),
    "more heads": (config(num_attention_heads=8), "config.json"),
    "heads that do not divide": (config(num_attention_heads=5), "cannot be loaded"),
    "no head": (config(num_attention_heads=0), "cannot be loaded"),
    "more keys": (config(num_key_value_heads=4), "config.json"),
    "a huge inner width": (config(intermediate_size=10**10), "cannot be loaded"),
    "fewer positions": (config(max_position_embeddings=8), "8 positions"),
    "an unknown family": (config(model_type="nothing"), "nothing"),
    "another family": (config(model_type="bert"), "weights"),
    "an unknown activation": (config(hidden_act="evil"), "evil"),
    "a NaN in the config": (config(rms_norm_eps=float("nan")), "nan"),
    "a config of nothing": (content("config.json", b""), "cannot be loaded"),
    "a config of no object": (content("config.json", b"[]"), "cannot be loaded"),
    "a config of bytes": (content("config.json", b"\xff\xfe\x00"), "cannot be loaded"),
    "a deep config": (content("config.json", b"[" * 100_000), "cannot be loaded"),
    # the tokenizer
    "ids beyond the model": (
        vocabulary(lambda words: words.update({word: i + 1000 for word, i in words.items()})),
        "outside the vocabulary of 256",
    ),
    "negative ids": (vocabulary(lambda words: words.update(a=-1)), "cannot be loaded"),
    "hardly any word": (vocabulary(lambda words: [words.pop(w) for w in list(words)[5:]]), "hold"),
    "a length as text": (
        edited(TOKENS, lambda found: found.update(model_max_length="x")),
        "cannot be loaded",
    ),
    "a tokenizer of no object": (content(TOKENIZER, b"3"), "cannot be loaded"),
    "a tokenizer of bytes": (content(TOKENIZER, b"\xff"), "cannot be loaded"),
    # the index of shards
    "an empty index": (index(b""), "no index of shards"),
    "an index of no object": (index([]), "no index of shards"),
    "an index without a map": (index({"metadata": {}}), "no index of shards"),
    "a map of nothing": (index({"weight_map": {}}), "names no shard"),
    "a shard of a number": (index({"weight_map": {Q: 3}}), "no index of shards"),
    "a shard of no name": (index({"weight_map": {Q: ""}}), "names ''"),
    "a missing shard": (index({"weight_map": {Q: "b.safetensors"}}), "b.safetensors"),
    "a shard that is the config": (index({"weight_map": {Q: "config.json"}}), "'config.json'"),
    "a shard above": (shards("../x.safetensors"), "'../x.safetensors'"),
    "a shard far above": (shards("a.safetensors", "../../x.safetensors"), "'../../x.saf"),
    "a shard below": (shards("sub/x.safetensors"), "'sub/x.safetensors'"),
    "a shard with a NUL": (index({"weight_map": {Q: "a\0.safetensors"}}), r"a\x00"),
}


# A file of weights or an index is read in another way by a model that stays on the disk.
WEIGHED = list(REFUSED)[: list(REFUSED).index("fewer words")]
INDEXED = list(REFUSED)[list(REFUSED).index("an empty index") :]


@pytest.mark.parametrize(
    ("case", "offload"),
    [
        *((case, "none") for case in REFUSED),
        *((case, "disk") for case in WEIGHED + INDEXED),
        *(
            pytest.param(case, "disk", marks=pytest.mark.slow)
            for case in REFUSED
            if case not in WEIGHED + INDEXED
        ),
    ],
)
def test_a_model_that_lies_or_is_damaged_is_refused(case, offload, model, run, sealed):
    damage, message = REFUSED[case]
    damage(model)
    code, error = run("--offload", offload)
    assert code == 2
    assert message in error
    assert not (sealed.root / "out").exists()


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_shard_of_an_absolute_path_is_refused(offload, model, run, sealed):
    elsewhere = sealed.root / "elsewhere.safetensors"
    shards(str(elsewhere))(model)
    code, error = run("--offload", offload)
    assert code == 2
    assert str(elsewhere) in error


def test_a_shard_that_is_a_link_is_read_and_never_written_through(model, run, sealed):
    """The hub's own cache is made of such links."""
    shards("a.safetensors", "b.safetensors")(model)
    elsewhere = sealed.root / "blob"
    (model / "a.safetensors").rename(elsewhere)
    (model / "a.safetensors").symlink_to(elsewhere)
    assert run()[0] == 0
    assert not (sealed.root / "out" / "a.safetensors").is_symlink()
    assert (sealed.root / "out" / "a.safetensors").is_file()


@pytest.mark.parametrize(
    ("part", "bit"),
    [
        pytest.param(part, bit, marks=() if (part + bit) % 3 == 0 else pytest.mark.slow)
        for part in range(12)
        for bit in (0, 5)
    ],
)
def test_a_flipped_bit_anywhere_is_an_error_or_another_weight(part, bit, model, run):
    """A bit of the header may rename metadata nobody reads; one of the data is another number."""
    data = (model / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    at = part * header // 8 if part < 8 else header + (part - 8) * (len(data) - header) // 4
    flipped(WEIGHTS, at, bit)(model)
    run("--method", "wanda")


@pytest.mark.parametrize("more", [[], ["--allow-pickle"], ["--offload", "disk"]])
@pytest.mark.parametrize("plain", [True, False])
def test_a_hostile_pickle_is_never_loaded(plain, more, model, run, hostile):
    (model / WEIGHTS).unlink()
    if plain:
        (model / PICKLE).write_bytes(pickle.dumps(hostile))
    else:
        torch.save({"model.norm.weight": hostile}, model / PICKLE)
    code, error = run(*more)
    assert code == 2
    assert f"model ./{model.name} " in error
    assert not hostile.mark.exists()


@pytest.mark.parametrize("which", ["config.json", TOKENS])
def test_code_that_comes_with_a_model_is_never_run_unasked(which, model, run, sealed):
    mark = sealed.root / "mark"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('run')")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    custom = {"auto_map": dict.fromkeys(names, "evil.Evil"), "model_type": "evil"}
    edited(which, lambda found: found.update(custom, tokenizer_class="Evil"))(model)
    code, error = run()
    assert code == 2
    assert "--trust-remote-code" in error
    assert not mark.exists()


# What is odd but sound


EVERY = ",".join([*METHODS, "gblm+repair", "wanda+sparsegpt"])


@pytest.mark.parametrize(
    "zero",
    [
        "model.embed_tokens.weight",  # inputs
        "model.layers.0.mlp.up_proj.weight",  # a weight, and the inputs of another
        *(pytest.param(name, marks=pytest.mark.slow) for name in (Q, "lm_head.weight")),
    ],
)
def test_weights_and_inputs_of_zeros_are_pruned_by_every_method(zero, model, run, sealed):
    weight(zero, lambda found: found.zero_())(model)
    assert run("--method", EVERY)[0] == 0
    results = sorted((sealed.root / "out").iterdir())
    assert len(results) == len(METHODS) + 2
    for result in results:
        report = json.loads((result / "report.json").read_text())
        assert report["sparsity"] >= 0.499
        for value in load_file(result / WEIGHTS).values():
            assert torch.isfinite(value).all()


@pytest.mark.parametrize("sparsity", [0.999, pytest.param(0.001, marks=pytest.mark.slow)])
def test_extreme_sparsities_leave_a_weight_of_each_row_or_drop_none(sparsity, model, run, sealed):
    assert run("--method", EVERY, "--sparsity", str(sparsity), "--group", "row")[0] == 0
    for result in sorted((sealed.root / "out").iterdir()):
        found = load_file(result / WEIGHTS)
        kept = [(found[name] != 0).sum(dim=1) for name in found if "_proj" in name]
        if sparsity == 0.001:  # of 32 or 48 weights of a row that is none
            assert all(k.min() == k.max() for k in kept)
        elif not result.name.startswith("best"):  # whose allocation keeps the count of the model
            assert all(k.max() <= 1 for k in kept)


def test_one_sample_is_enough(run):
    assert run("--samples", "1", "--method", EVERY)[0] == 0


def test_n_of_n_is_refused(run):
    code, error = run("--sparsity", "4:4")
    assert code == 2
    assert "0 < n < m" in error


# Calibration


def npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda file: np.savez(file, **arrays)


def parquet(*rows: Any) -> Callable[[Path], object]:
    def write(file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": list(rows)}), file)

    return write


def cut_parquet(file: Path) -> None:
    parquet(*(f"text {i}" for i in range(2000)))(file)
    file.write_bytes(file.read_bytes()[:300] + file.read_bytes()[-300:])


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bytes.txt": (lambda file: file.write_bytes(bytes(range(256)) * 50), "not UTF-8"),
    "nul.txt": (lambda file: file.write_bytes(b"\0" * 9000), ""),
    "broken.jsonl": (lambda file: file.write_bytes(b'{"text": "a"}\n{"te'), "line 2"),
    "bytes.jsonl": (lambda file: file.write_bytes(os.urandom(500)), "bytes.jsonl"),
    "cut.parquet": (cut_parquet, "cut.parquet"),
    "numbers.parquet": (parquet(1, 2, 3), "row 1"),
    "objects.npz": (npz(input_ids=np.array([[{}] * 16] * 4, dtype=object)), "allow_pickle"),
    "floats.npz": (npz(input_ids=np.ones((4, 16))), "float64"),
    "flat.npz": (npz(input_ids=np.ones(64, int)), "[64]"),
    "none.npz": (npz(input_ids=np.ones((0, 16), int)), "[0, 16]"),
    "beyond.npz": (npz(input_ids=np.full((8, 16), 256)), "token id 256"),
    "negative.npz": (npz(input_ids=np.full((8, 16), -1)), "token id -1"),
    "wrapped.npz": (npz(input_ids=np.full((8, 16), 2**64 - 1, np.uint64)), "token id"),
    "other.npz": (npz(ids=np.ones((4, 16), int)), "no `input_ids`"),
    "text.npz": (lambda file: file.write_text("text"), "cannot be read"),
    "empty.npz": (lambda file: file.write_bytes(b""), "cannot be read"),
    "empty.txt": (lambda file: file.write_bytes(b""), "is empty"),
}


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        *((name, "--calibration") for name in SOURCES),
        *((name, "--evaluate") for name in ("broken.jsonl", "beyond.npz")),
        *(
            pytest.param(name, "--evaluate", marks=pytest.mark.slow)
            for name in SOURCES
            if name not in ("broken.jsonl", "beyond.npz")
        ),
    ],
)
def test_garbage_for_text_is_refused_by_its_name(name, flag, run, sealed):
    make, message = SOURCES[name]
    file = sealed.root / "here" / name
    make(file)
    code, error = run(flag, str(file))
    assert code == (2 if message else 0)
    assert message in error
    assert code == 0 or name in error


def test_a_pickle_in_an_array_is_never_loaded(run, sealed, hostile):
    file = sealed.root / "here" / "evil.npz"
    np.savez(file, input_ids=np.array([[hostile]], dtype=object))
    assert run("--calibration", str(file))[0] == 2
    file.write_bytes(pickle.dumps(hostile))
    assert run("--calibration", str(file))[0] == 2
    assert not hostile.mark.exists()


# Folders


@pytest.mark.parametrize("flag", ["--output", "--work-dir"])
def test_a_folder_without_rights_is_refused(flag, run, sealed, monkeypatch):
    """Root may write anywhere: its rights are taken away where they are asked for."""
    closed = sealed.root / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        denied = PermissionError(13, "Permission denied")
        allowed, mkdir, made = os.access, Path.mkdir, Path.open

        def ask(path: Any, mode: int) -> bool:
            return closed not in (Path(path), *Path(path).parents) and allowed(path, mode)

        def make(path: Path, *args: Any, **kwargs: Any) -> None:
            if closed in path.parents:
                raise denied
            mkdir(path, *args, **kwargs)

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if closed in path.parents and mode != "r":
                raise denied
            return made(path, mode, *args, **kwargs)

        monkeypatch.setattr(os, "access", ask)
        monkeypatch.setattr(Path, "mkdir", make)
        monkeypatch.setattr(Path, "open", opened)
    code, error = run(flag, str(closed / "below"))
    assert code == 2
    assert str(closed) in error


def test_a_model_and_texts_of_read_only_folders_are_enough(model, run):
    for path in [*model.iterdir(), model]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        assert run()[0] == 0
    finally:
        model.chmod(0o700)


def test_results_are_the_same_bits_every_time(run, llm, model, sealed):
    """The second run is a process of its own, whose hashes, addresses and home are others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run("--method", "gblm,best")[0] == 0
    finally:
        torch.set_num_threads(threads)
    output = sealed.root / "again"
    before = sealed.tree(output)
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [
            *(sys.executable, "-m", "gblm.llm", *short(llm), "--model", model),
            *("--method", "gblm,best", "--output", output),
        ],
        check=True,
        env={**os.environ, **more},
        capture_output=True,
    )
    assert sealed.tree(output) == before, "nothing is written elsewhere"
    first = sealed.result(sealed.root / "out")
    assert len(first) == 4
    assert sealed.result(output) == first
    shutil.rmtree(output)


@pytest.mark.parametrize("method", ["gblm", "best"])
def test_results_from_disk_are_the_same_bits_every_time(method, run, two_threads, sealed):
    found = []
    for _ in range(2):
        assert run("--method", method, "--offload", "disk", "--overwrite")[0] == 0
        found.append(sealed.result(sealed.root / "out"))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)")]
)
def test_weights_for_which_there_is_no_memory_are_told(error, run, monkeypatch):
    def mapped(*given: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("gblm.llm.checkpoint.safe_open", mapped)
    code, said = run("--method", "magnitude")
    assert code == 2
    assert "out of memory; " in said
    assert "ulimit -v" in said
