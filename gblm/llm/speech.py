"""Recordings with what is said in them, for Whisper: samples of them."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gblm.base import Batch, GblmError, explained
from gblm.llm.heads import shifted
from gblm.llm.pairs import Pair
from gblm.walk.blocks import joined


def batch(pairs: list[Pair], processor: Any, config: Any) -> Batch:
    """Return pairs as samples: `input_features`, `decoder_input_ids`, `labels`, and their mask.

    The targets are the text and its end. What stands before the text, such as the language, is
    given and no target.
    """
    prefix = len(processor.tokenizer.prefix_tokens)
    samples = []
    for pair in pairs:
        ids = torch.tensor([processor.tokenizer(pair.text)["input_ids"]])
        labels = ids[:, 1:]  # the first is what the decoder starts with
        if labels.shape[1] > config.max_target_positions:
            most = config.max_target_positions
            raise GblmError(f"{pair.file}: its text has more than {most} tokens; cut it into parts")
        given = shifted(labels, config)
        labels = labels.clone()
        labels[:, : prefix - 1] = -100
        one = {"input_features": _features(pair.file, processor.feature_extractor)}
        one |= {"decoder_input_ids": given, "labels": labels}
        samples.append(one | {"decoder_attention_mask": torch.ones_like(given)})
    whole = joined(samples)
    return whole | {"attention_mask": torch.ones(len(pairs), 1, dtype=torch.long)}


def _features(path: Path, extractor: Any) -> Tensor:
    """Return what the feature extractor makes of a recording, `[1, …]`: a `.wav` of 16 bits."""
    with explained(f"{path} is no recording", "give a .wav file"), wave.open(str(path)) as file:
        rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
        sound = file.readframes(file.getnframes())
    if width != 2 or rate != extractor.sampling_rate:
        raise GblmError(
            f"{path} has {8 * width} bits at {rate} Hz; save it with 16 bits at "
            f"{extractor.sampling_rate} Hz"
        )
    values = np.frombuffer(sound, "<i2").reshape(-1, channels).mean(axis=1) / 2**15
    if len(values) > extractor.n_samples:
        raise GblmError(f"{path} is longer than {extractor.chunk_length} s; cut it into parts")
    found: Tensor = extractor(values, sampling_rate=rate, return_tensors="pt")["input_features"]
    return found
