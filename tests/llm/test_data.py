"""Laws and errors of the token windows, on tiny files and a tokenizer made here."""

import copy
import gzip
import io
import json
import logging
import os
import random
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gblm.base import GblmError
from gblm.llm import data, sources
from gblm.llm.data import calibration, check_ids, evaluation, tokens

ASSETS = Path(os.environ.get("GBLM_ASSETS", "missing"))
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="GBLM_ASSETS is no folder")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One id a word: `w17` is 17."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(5000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)


def text_of(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text, "url": "x"}) for text in texts) + "\n")
    return path


DOCUMENTS = [text_of(*range(100 * n, 100 * n + size)) for n, size in enumerate([30, 8, 9, 5, 60])]


def published_text(ids: list[int], samples: int, length: int, seed: int) -> list[list[int]]:
    random.seed(seed)
    windows = []
    for _ in range(samples):
        i = random.randint(0, len(ids) - length - 1)
        windows.append(ids[i : i + length])
    return windows


def published_documents(texts: list[str], tokenizer, samples: int, length: int, seed: int):
    random.seed(seed)
    windows = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[i]).input_ids
            if len(ids) > length:
                break
        i = random.randint(0, len(ids) - length - 1)
        windows.append(ids[i : i + length])
    return windows


# --- draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_windows_of_a_text_are_the_published_draws(tmp_path, words, seed):
    path = tmp_path / "notes.md"
    path.write_text(text_of(*range(271)))  # 255 starts: one more would need a bit more a draw
    windows = calibration(str(path), words, 9, 16, seed)
    assert windows.dtype == torch.int64
    assert windows.tolist() == published_text(list(range(271)), 9, 16, seed)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("length", [8, 9])  # documents of just that many tokens are passed over
def test_windows_of_documents_are_the_published_draws(tmp_path, words, seed, length):
    path = jsonl(tmp_path / "documents.jsonl", DOCUMENTS)
    windows = calibration(str(path), words, 7, length, seed)
    assert windows.tolist() == published_documents(DOCUMENTS, words, 7, length, seed)
    assert not set(windows.flatten().tolist()) & set(range(100, 200))


def test_the_seed_alone_decides_and_the_global_one_is_untouched(tmp_path, words):
    path = str(jsonl(tmp_path / "documents.jsonl", DOCUMENTS))
    random.seed(1)
    first, state = calibration(path, words, 7, 8), random.getstate()
    random.seed(2)
    assert torch.equal(calibration(path, words, 7, 8), first)
    random.seed(1)
    assert random.getstate() == state
    assert not torch.equal(calibration(path, words, 7, 8, seed=1), first)


def test_a_document_is_tokenised_once_at_most(tmp_path, words, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(data, "tokens", lambda t, text: (seen.append(text), tokens(t, text))[1])
    calibration(str(jsonl(tmp_path / "documents.jsonl", DOCUMENTS)), words, 7, 8)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    "texts",
    [
        [text_of(*range(10 * n, 10 * n + 8)) for n in range(20)],  # none longer than a window
        [text_of(*range(10 * n, 10 * n + 8)) for n in range(20)] + [text_of(*range(300, 318))],
    ],
)
def test_documents_that_hold_too_few_windows_are_joined(tmp_path, words, texts):
    windows = calibration(str(jsonl(tmp_path / "short.jsonl", texts)), words, 5, 8, seed=3)
    assert windows.tolist() == published_text(words(" ".join(texts)).input_ids, 5, 8, seed=3)


def test_a_text_of_one_window_gives_it(tmp_path, words):
    path = tmp_path / "one.txt"
    path.write_text(text_of(*range(8)))
    assert calibration(str(path), words, 1, 8).tolist() == [list(range(8))]


@pytest.mark.parametrize("name", ["short.txt", "short.jsonl"])
def test_too_short_a_text_is_an_error_that_counts(tmp_path, words, name):
    path = tmp_path / name
    if name.endswith("jsonl"):
        jsonl(path, [text_of(*range(40)), text_of(*range(39))])
    else:
        path.write_text(text_of(*range(79)))
    assert calibration(str(path), words, 9, 8).shape == (9, 8)
    with pytest.raises(GblmError, match=r"79 tokens, that is 9 windows of 8, and 10 .*--samples"):
        calibration(str(path), words, 10, 8)


@pytest.mark.parametrize("arguments", [(0, 8), (4, 0), (-1, 8)])
def test_samples_and_length_are_positive(tmp_path, words, arguments):
    with pytest.raises(GblmError, match="give 1 or more"):
        calibration("demo", words, *arguments)


# --- evaluation --------------------------------------------------------------------------------


def test_evaluation_windows_follow_each_other_and_the_tail_is_dropped(tmp_path, words):
    path = tmp_path / "text.txt"
    path.write_text(text_of(*range(43)))
    windows = evaluation(str(path), words, 8)
    assert windows.dtype == torch.int64
    assert windows.tolist() == torch.arange(40).view(5, 8).tolist()
    assert torch.equal(evaluation(str(path), words, 8, limit=2), windows[:2])
    assert torch.equal(evaluation(str(path), words, 8, limit=50), windows)


def test_evaluation_joins_documents(tmp_path, words):
    windows = evaluation(str(jsonl(tmp_path / "a.jsonl", DOCUMENTS)), words, 10)
    ids = words(" ".join(DOCUMENTS)).input_ids
    assert windows.flatten().tolist() == ids[: len(ids) // 10 * 10]


def test_evaluation_of_less_than_a_window_is_an_error(tmp_path, words):
    path = tmp_path / "text.txt"
    path.write_text(text_of(*range(7)))
    with pytest.raises(GblmError, match="7 tokens, less than one window of 8"):
        evaluation(str(path), words, 8)
    with pytest.raises(GblmError, match="limit is 0"):
        evaluation(str(path), words, 8, limit=0)


# --- ready windows -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_ready_windows_are_taken_as_they_are(tmp_path, words, kind, dtype):
    path, ids = tmp_path / f"windows.{kind}", np.arange(60).reshape(6, 10)
    if kind == "npz":
        np.savez(path, input_ids=ids.astype(dtype), other=np.zeros(3))
    else:
        save_file({"input_ids": torch.from_numpy(ids.astype(dtype))}, path)
    windows = calibration(str(path), words, 4, 8)
    assert windows.dtype == torch.int64
    assert windows.tolist() == ids[:4, :8].tolist()
    assert evaluation(str(path), words, 5).tolist() == ids.reshape(12, 5).tolist()
    assert evaluation(str(path), words, 8, limit=3).tolist() == ids[:3, :8].tolist()
    with pytest.raises(GblmError, match="6 windows there, 7 asked for"):
        calibration(str(path), words, 7, 8)
    for call in (
        lambda: calibration(str(path), words, 4, 11),
        lambda: evaluation(str(path), words, 11),
    ):
        with pytest.raises(GblmError, match="hold 10 tokens, 11 asked for"):
            call()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.zeros((2, 3), int)}, "no `input_ids`, only ids"),
        ({"input_ids": np.zeros((2, 3))}, r"float64 \[2, 3\]"),
        ({"input_ids": np.zeros((2, 3), bool)}, r"bool \[2, 3\]"),
        ({"input_ids": np.zeros(3, int)}, r"int64 \[3\]"),
        ({"input_ids": np.zeros((0, 3), int)}, r"int64 \[0, 3\]"),
        ({"input_ids": np.array([[{}]], object)}, "cannot be read .*allow_pickle"),
    ],
)
def test_ready_windows_of_another_kind_are_errors(tmp_path, words, arrays, message):
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(GblmError, match=message):
        calibration(str(tmp_path / "w.npz"), words, 1, 2)


def test_ids_outside_the_vocabulary_are_named():
    ids = torch.tensor([[0, 9], [3, 4]])
    check_ids(ids, 10, "w.npz")
    with pytest.raises(GblmError, match=r"w.npz: token id 9 in row 0 .* vocabulary of 9"):
        check_ids(ids, 9, "w.npz")
    with pytest.raises(GblmError, match="token id -1 in row 1"):
        check_ids(ids - torch.tensor([[0, 0], [0, 5]]), 10, "w.npz")


# --- local files -------------------------------------------------------------------------------

ROWS = [text_of(*range(10 * n, 10 * n + 12)) for n in range(4)]


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": range(4), "text": ROWS}), path)


WRITERS = {
    "a.jsonl": lambda path: jsonl(path, ROWS),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in ROWS])),
    "indented.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: jsonl(path, ROWS),
    "strings.jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, ROWS))),
    "A.JSONL": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(path, ROWS).read_bytes()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(path, ROWS).read_bytes())),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert sources.read(str(tmp_path / name), "calibration") == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a", "a.py", "a.txt.gz"])
def test_any_other_ending_is_text(tmp_path, name):
    text = "é\n\nno end\u2028of line"
    raw = text.replace("\n", "\r\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert sources.read(str(tmp_path / name), "calibration") == text


def test_a_single_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one"}, indent=1))
    assert sources.read(str(tmp_path / "a.json"), "calibration") == ["one"]


def test_a_folder_is_its_files_sorted(tmp_path):
    for name in (".git/x.txt", "b/c.txt", "a.txt", ".hidden", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    jsonl(tmp_path / "b" / "a.jsonl", ROWS)
    assert sources.read(str(tmp_path), "calibration") == ["a.txt", *ROWS, "b/c.txt", "d.txt"]
    np.savez(tmp_path / "w.npz", input_ids=np.zeros((1, 2), int))
    with pytest.raises(GblmError, match=r"ready windows; give .*w\.npz alone"):
        sources.read(str(tmp_path), "calibration")


CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
CHATS = {
    "messages": {"messages": CHAT},
    "from and value": {
        "conversations": [
            {"from": "human", "value": "w1 w2"},
            {"from": "gpt", "value": "w3"},
        ]
    },
    "parts": {"messages": [{"role": "user", "content": [{"text": "w1 w2"}]}, CHAT[1]]},
    "instruction": {"instruction": "w1 w2", "input": "", "output": "w3"},
    "prompt": {"prompt": "w1 w2", "completion": "w3"},
}


@pytest.mark.parametrize("form", CHATS)
def test_chats_and_instructions_go_through_the_chat_template(tmp_path, words, form, monkeypatch):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(CHATS[form])}\n" * 4)
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(GblmError, match="no chat template"):
        calibration(path, words, 1, 4)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} end {% endfor %}"
    monkeypatch.setattr(words, "chat_template", template, raising=False)
    said = "user: w1 w2 end assistant: w3 end "
    expected = words(said, add_special_tokens=False)["input_ids"]
    assert data.tokens(words, sources.read(path, "calibration")[0]).tolist() == expected
    assert (
        evaluation(path, words, 4).flatten().tolist()
        == (expected * 4)[: len(expected) * 4 // 4 * 4]
    )


def test_a_table_of_commas_is_no_prose(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"one, two"\n2,three\n')
    (tmp_path / "a.tsv").write_text("text\tid\none, two\t1\nthree\t2\n")
    for name in ("a.csv", "a.tsv"):
        assert sources.read(str(tmp_path / name), "calibration") == ["one, two", "three"]


def test_a_folder_of_splits_gives_each_its_own(tmp_path):
    for name in ("data/train-00000-of-00001.txt", "data/validation.txt", "other/latest.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert sources.read(str(tmp_path), "calibration") == ["data/train-00000-of-00001.txt"]
    assert sources.read(str(tmp_path), "evaluation") == ["data/validation.txt"]
    (tmp_path / "data/test-1.txt").write_text("test")
    assert sources.read(str(tmp_path), "evaluation") == ["test"]
    assert sources.read(str(tmp_path / "other"), "evaluation") == ["other/latest.txt"]


def test_another_data_set_of_the_hub_is_read_by_its_columns(monkeypatch):
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "dev"])
    for split in ("calibration", "evaluation"):
        assert sources.read("some/words", split) == ["one", "two"]
    sources.read("some/words:few", "calibration")
    assert [part for _, part in asked] == ["train", "dev", "few"]


BROKEN = {
    "surrogate.jsonl": (b'{"text": "a \\ud800"}', r"line 1 holds \\ud800, half of a character"),
    "role.jsonl": (b'{"messages": [{"text": "a"}]}', "line 1: a message has no role and content"),
    "bad.txt": (
        b"twelve bytes\xff",
        r"calibration text .*bad.txt is not UTF-8 \(byte 0xff at 12\)",
    ),
    "bad.jsonl": (b'"a"\n"\xff"\n', r"bad.jsonl, line 2 is not UTF-8 \(byte 0xff at 1\)"),
    "empty.txt": (b"", "empty.txt is empty"),
    "blank.txt": (b" \n\n", "blank.txt is empty"),
    "empty.jsonl": (b"\n", "empty.jsonl is empty"),
    "empty.json": (b"[]", "empty.json is empty"),
    "blank.json": (b'["", " "]', "blank.json is empty"),
    "cut.jsonl": (b'{"text": "a"}\n\n{"text": "b\n', "cut.jsonl, line 3 is not JSON"),
    "cut.json": (b'[\n{"text": "a"},\n{"text" "b"}]', "cut.json, line 3 is not JSON"),
    "first.jsonl": (b'{"text": a}\n{"text": "b"}', "first.jsonl, line 1 is not JSON"),
    "deep.json": (b"[" * 200_000, "deep.json cannot be read|deep.json, line 1 is not JSON"),
    "field.jsonl": (b'{}\n{"txt": "b"}', "field.jsonl, line 1 has no `text` field"),
    "number.jsonl": (b'"a"\n{"text": 3}', "number.jsonl, line 2 has no `text` field"),
    "null.json": (b'[{"text": "a"}, null]', "null.json, item 2 has no `text` field"),
    "bad.jsonl.gz": (b'{"text": "a"}', "bad.jsonl.gz cannot be read .*gzip"),
    "cut.txt.gz": (gzip.compress(b"a" * 99)[:-9], "cut.txt.gz cannot be read"),
    "bad.npz": (b"PK\x03\x04 and so on", "bad.npz cannot be read"),
    "text.npz": (b"not an archive", "text.npz cannot be read"),
    "empty.npz": (b"", "empty.npz cannot be read"),
    "bad.safetensors": (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "bad.safetensors cannot be read"),
    "bad.parquet": (b"PAR1 and so on", "bad.parquet cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("inside", [False, True])
def test_broken_files_are_errors_that_name_the_place(tmp_path, words, name, inside):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    if inside and message.endswith("is empty"):
        message = "is empty"
    with pytest.raises(GblmError, match=message):
        calibration(str(tmp_path if inside else tmp_path / name), words, 1, 4)


def test_parquet_without_text_is_an_error(tmp_path, words):
    import pyarrow
    import pyarrow.parquet

    for columns, message in (({"body": ["a"]}, "only body"), ({"text": ["a", None]}, "row 2")):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(GblmError, match=message):
            calibration(str(tmp_path / "a.parquet"), words, 1, 4)


def test_a_file_without_rights_is_an_error(tmp_path, words, monkeypatch):
    path = tmp_path / "locked.txt"
    path.write_text("a")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(GblmError, match=r"locked.txt cannot be read .*Permission denied"):
        calibration(str(path), words, 1, 4)


def test_a_missing_path_names_the_nearest(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a")
    for source, message in (
        ("wikitext", r"did you mean wikitext2\?"),
        ("note.txt", r"did you mean notes.txt\?"),
        (str(tmp_path / "note.txt"), rf"did you mean {tmp_path}/notes.txt\?"),
        ("zzz", "one of c4, wikitext2, ptb, demo"),
        ("nowhere/at/all", "no such file or source"),
        ("", "source is empty"),
    ):
        with pytest.raises(GblmError, match=message):
            evaluation(source, words, 4)


def test_demo_is_the_packaged_text(words, monkeypatch):
    demo = ModuleType("gblm.llm.demo")
    texts = {"calibration": text_of(*range(50)), "evaluation": text_of(*range(50, 70))}
    monkeypatch.setattr(demo, "text", texts.__getitem__, raising=False)
    monkeypatch.setitem(sys.modules, "gblm.llm.demo", demo)
    assert calibration("demo", words, 3, 8).tolist() == published_text(list(range(50)), 3, 8, 0)
    assert evaluation("demo", words, 8).flatten().tolist() == list(range(50, 66))


# --- the hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Records the calls of `datasets.load_dataset` and answers with the rows it is given."""
    datasets = pytest.importorskip("datasets")
    calls: list[dict] = []

    def answer(column: str, rows: list[str]) -> list[dict]:
        def load_dataset(path, name=None, data_files=None, split=None, **rest):
            calls.append({"path": path, "name": name, "files": data_files, "split": split})
            return datasets.Dataset.from_dict({column: rows, "other": rows})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return answer


def test_c4_calibration(hub, words):
    calls = hub("text", DOCUMENTS)
    windows = calibration("c4", words, 7, 8, seed=2)
    assert windows.tolist() == published_documents(DOCUMENTS, words, 7, 8, seed=2)
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert calls == [{"path": "allenai/c4", "name": None, "files": files, "split": "train"}]


def test_c4_evaluation_is_1100_documents_and_256_windows(hub, words):
    rows = [text_of(n, n + 1) for n in range(1200)]
    calls = hub("text", rows)
    ids = words(" ".join(rows[:1100])).input_ids
    assert evaluation("c4", words, 4).tolist() == torch.tensor(ids).view(-1, 4)[:256].tolist()
    assert len(evaluation("c4", words, 100)) == 22
    assert len(evaluation("c4", words, 4, limit=9)) == 9
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert calls[0] == {
        "path": "allenai/c4",
        "name": None,
        "files": files,
        "split": "validation",
    }


def test_wikitext2(hub, bytes_bpe):
    calls = hub("text", ["", " = A title = ", "one two three", ""] * 30)
    rows = ["", " = A title = ", "one two three", ""] * 30
    name = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "files": None}
    windows = calibration("wikitext2", bytes_bpe, 3, 16)
    ids = bytes_bpe(" ".join(rows)).input_ids
    assert windows.tolist() == published_text(ids, 3, 16, 0)
    ids = bytes_bpe("\n\n".join(rows)).input_ids
    windows = evaluation("wikitext2", bytes_bpe, 16)
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert calls == [{**name, "split": "train"}, {**name, "split": "test"}]


def test_ptb(hub, words):
    rows = [text_of(n, n + 1, n + 2) for n in range(50)]
    calls = hub("sentence", rows)
    ids = words(" ".join(rows)).input_ids
    assert calibration("ptb", words, 3, 16).tolist() == published_text(ids, 3, 16, 0)
    assert evaluation("ptb", words, 16).flatten().tolist() == ids[:144]
    assert [call["split"] for call in calls] == ["train", "test"]
    for call in calls:  # a loading script would no longer run
        assert call["path"] == "parquet"
        assert call["files"][call["split"]].endswith(f"penn_treebank/{call['split']}/0000.parquet")


def test_a_hub_out_of_reach_is_an_error(words, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(**_):
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(GblmError, match=r"wikitext2 could not be loaded .*reach.*or give the path"):
        evaluation("wikitext2", words, 16)


# --- long texts --------------------------------------------------------------------------------

PROSE = (
    "It's a  test, isn't it?\n\n  Yes 12345 times; 日本 naïve cafe\u0301 \t end.\r\n<s> mid <s>"
    " \x1c odd\u00a0space\u2003and x_y (so) they'll SAY 'so' a1 2b \u0301 e \u0301.  \n " * 40
)


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32)


@pytest.fixture(scope="module")
def bytes_bpe() -> PreTrainedTokenizerFast:
    return byte_level()


def test_a_long_text_gives_no_warning(tmp_path, caplog):
    tokenizer = byte_level()  # a new one: each warns once
    (tmp_path / "long.txt").write_text(PROSE)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    caplog.set_level("WARNING", "transformers")  # tests before this one may have made it quiet
    try:
        calibration(str(tmp_path / "long.txt"), tokenizer, 2, 8)
        evaluation(str(tmp_path / "long.txt"), tokenizer, 8)
        assert "longer than" not in caplog.text
        tokenizer(PROSE)
        assert "longer than" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


# --- real texts --------------------------------------------------------------------------------


@needs_assets
def test_novels():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "llama" / "novels-6M")
    path = ASSETS / "text" / "novels-eval.txt"
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids
    windows = calibration(str(path), tokenizer, 128, 256)
    assert windows.tolist() == published_text(ids, 128, 256, 0)
    windows = evaluation(str(path), tokenizer, 256, limit=160)
    assert windows.flatten().tolist() == ids[: 160 * 256]


@needs_assets
def test_golden_windows(words):
    golden = ASSETS.parent / "golden" / "stories260K"
    windows = calibration(str(golden / "calibration.npz"), words, 128, 256)
    assert windows.shape == (128, 256)
    check_ids(windows, 512, "golden")
    assert evaluation(str(golden / "evaluation.npz"), words, 256).shape == (60, 256)


def shard(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


def test_shards_of_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    texts = {f"{n}.txt": text for n, text in enumerate(DOCUMENTS[:3])}
    about = {f"{n}.json": '{"url": "x"}' for n in range(3)}  # beside the text
    both = dict(sorted((texts | about).items()))
    one = shard(folder / "train-000.tar", both)
    assert sources.read(str(one), "calibration") == DOCUMENTS[:3]
    rows = {"a.json": json.dumps({"text": "w3"}), "b.json": json.dumps({"text": "w4"})}
    shard(folder / "train-001.tar", rows)
    shard(folder / "val-000.tar", {"a.txt": "w5"})
    assert sources.read(str(folder), "calibration") == [*DOCUMENTS[:3], "w3", "w4"]
    assert sources.read(str(folder), "evaluation") == ["w5"]
    with pytest.raises(GblmError, match=r"holds no .txt and no .json, only cls; give it one"):
        sources.read(str(shard(tmp_path / "none.tar", {"a.cls": "1"})), "calibration")
    (tmp_path / "junk.tar").write_bytes(b"no shard")
    with pytest.raises(GblmError, match=r"junk.tar cannot be read"):
        sources.read(str(tmp_path / "junk.tar"), "calibration")


def test_windows_begin_with_the_token_that_begins_a_text(tmp_path: Path, words):
    words = copy.deepcopy(words)
    file = tmp_path / "notes.txt"
    file.write_text(text_of(*range(1, 200)))
    with pytest.raises(GblmError, match="no begin-of-text token; leave --bos out"):
        calibration(str(file), words, 4, 8, bos=True)
    words.bos_token = "w7"
    for plain, begun in (
        (calibration(str(file), words, 4, 7), calibration(str(file), words, 4, 8, bos=True)),
        (evaluation(str(file), words, 7), evaluation(str(file), words, 8, bos=True)),
        (evaluation(str(file), words, 7, 3), evaluation(str(file), words, 8, 3, bos=True)),
    ):
        assert (begun[:, 0] == 7).all()
        assert torch.equal(begun[:, 1:], plain)
    own = tmp_path / "own.txt"  # as of a tokenizer that adds it by itself
    own.write_text(text_of(7, *range(100, 200)))
    assert evaluation(str(own), words, 8, bos=True)[0].tolist() == [7, *range(100, 107)]
    documents = jsonl(tmp_path / "rows.jsonl", DOCUMENTS)
    assert (calibration(str(documents), words, 3, 9, bos=True)[:, 0] == 7).all()
