"""Whisper: recordings with their texts as samples, and the command."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

from gblm.llm import evaluate, pairs, speech
from gblm.llm.__main__ import main
from gblm.llm.adapters import adapter

RATE = 16000
MARKS = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
FIRST = 256  # the number of the first mark
START = FIRST + 1
SIZES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}


@pytest.fixture
def folder(tokenizer: transformers.PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A Whisper of tokens of a byte that hears one second, and recordings with their texts."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=FIRST + len(MARKS),
        d_model=16,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=32,
        decoder_start_token_id=START,
        pad_token_id=FIRST,
        bos_token_id=FIRST,
        eos_token_id=FIRST,
        init_std=0.3,
        **SIZES,
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    marks = {mark: FIRST + i for i, mark in enumerate(MARKS)}
    words = WhisperTokenizer(tokenizer.get_vocab() | marks, [], pad_token=MARKS[0])
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    transformers.WhisperProcessor(extractor, words).save_pretrained(tmp_path / "model")
    for i in range(8):
        record(tmp_path / f"{i}.wav", np.sin(np.arange(4000 + 900 * i) / (3 + i)))
    lines = [{"audio": f"{i}.wav", "text": "ab" * (i + 1)} for i in range(8)]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def record(path: Path, values: np.ndarray, rate: int = RATE) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((values * 2**14).astype("<i2").tobytes())


def batch_of(folder: Path) -> tuple[transformers.PreTrainedModel, dict]:
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder / "model")
    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    found = pairs.read(str(folder / "said.jsonl"), "audio")
    return model, speech.batch(found, processor, model.config)


def test_the_text_is_asked_for_and_what_stands_before_it_given(folder):
    _, batch = batch_of(folder)
    assert batch["input_features"].shape == (8, 8, 100)
    text = batch["labels"][0, 1:3].tolist()
    assert batch["labels"][0, :4].tolist() == [-100, *text, FIRST]
    assert batch["decoder_input_ids"][0, :4].tolist() == [START, START + 1, *text]
    assert batch["decoder_attention_mask"].sum(dim=1).tolist() == [2 + 2 * i for i in range(1, 9)]


def test_the_loss_is_the_models_own(folder):
    model, batch = batch_of(folder)
    own, expected = adapter(model), []
    for one in own.unpad(batch):
        with torch.no_grad():
            expected.append(model(**one).loss.item())
            losses = own.loss(model, own.trunk(model, one), one)
        assert losses.item() == pytest.approx(expected[-1], rel=1e-5)
    perplexity = np.exp(np.mean(expected))
    assert evaluate.perplexity(model, batch) == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("gblm", "2:4"),
        pytest.param("wanda,gblm,sparsegpt,best", "0.5,2:4", marks=pytest.mark.slow),
    ],
)
def test_the_command_prunes_encoder_and_decoder(method, pattern, folder):
    source, output = str(folder / "said.jsonl"), folder / "pruned"
    flags = ["--model", str(folder / "model"), "--samples", "8", "--calibration", source]
    flags += ["--evaluate", source, "--method", method, "--sparsity", pattern]
    assert main([*flags, "--output", str(output)]) == 0
    results = [path.parent for path in output.rglob("report.json")]
    assert len(results) == len(method.split(",")) * len(pattern.split(","))
    for result in results:
        report = json.loads((result / "report.json").read_text())
        assert report["calibration"] == f"8 pairs from {source}"
        names = {linear["name"].removeprefix("model.") for linear in report["linears"]}
        assert {"encoder.layers.0.fc1", "decoder.layers.0.encoder_attn.k_proj"} <= names
        assert len(names) == 16
        pruned = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(result)
        _, batch = batch_of(folder)
        expected = report["evaluation"][source]
        assert expected["metric"] == "perplexity"
        assert evaluate.perplexity(pruned, batch) == pytest.approx(expected["pruned"], rel=1e-4)


def test_what_whisper_does_not_take_is_refused(folder, capsys):
    flags = ["--model", str(folder / "model"), "--samples", "1", "--method", "wanda"]
    source = folder / "one.jsonl"
    source.write_text('{"audio": "one.wav", "text": "ab"}')
    cases = {
        "has 16 bits at 8000 Hz": (np.zeros(800), 8000),
        "is longer than 1 s": (np.zeros(RATE + 1), RATE),
    }
    for said, sound in cases.items():
        record(folder / "one.wav", *sound)
        assert main([*flags, "--calibration", str(source)]) == 2
        assert said in capsys.readouterr().err
    (folder / "one.wav").write_bytes(b"")
    for place, said in ((str(source), "is no recording"), ("c4", "lines of an audio and a text")):
        assert main([*flags, "--calibration", place]) == 2
        assert said in capsys.readouterr().err
