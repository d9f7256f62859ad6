"""A report to make pages of."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gblm.report import Example, LinearReport, Mask, Report

KINDS = {"self_attn.q_proj": [32, 32], "mlp.down_proj": [32, 96]}


def made(blocks: int = 6, **given: Any) -> Report:
    """Return the report of a model of some blocks, whose errors rise with depth."""
    linears = [
        LinearReport(f"layers.{i}.{kind}", shape, 0.5, 0.01 * (i + 1) + 0.001 * j, 0.1)
        for i in range(blocks)
        for j, (kind, shape) in enumerate(KINDS.items())
    ]
    values = {
        "method": "gblm(alpha=100, norm=l1)",
        "pattern": "0.5",
        "model": "models/tiny-llama",
        "seconds": {"load": 1.0, "prune": 83.0},
        "peak_memory_bytes": 1_234_567_890,
        "evaluation": {"text/notes.txt": {"metric": "perplexity", "dense": 48.6, "pruned": 49.3}},
        "linears": linears,
        "dense": {"layers.0.mlp.up_proj": "excluded"},
        "seed": 7,
        "blocks": [f"layers.{i}" for i in range(blocks)],
        "parameters": 5_834_000,
        "calibration": "16 windows of 256 from notes.txt",
        "pictures": {"layers.5.mlp.down_proj": Mask(4, 8, base64.b64encode(bytes(32)).decode())},
        "examples": [Example("Once upon", "a time there was", "a time there lived")],
        "examples_note": "How each model goes on.",
        "command": "python -m gblm.llm --model models/tiny-llama",
        **given,
    }
    return Report(**values)


def picture() -> str:
    """Return a small JPEG in base64."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def make_report() -> Callable[..., Report]:
    return made


@pytest.fixture
def vision() -> Report:
    """The report of a classifier, with an image whose prediction changed."""
    accuracy = {"metric": "top1", "dense": 89.2, "pruned": 82.6}
    return made(
        blocks=12,
        model="vit_tiny",
        evaluation={"val top1": accuracy, "val cross_entropy": {**accuracy, "metric": "nats"}},
        examples=[Example("goldfish", "goldfish", "tench", picture())],
        examples_note="1 of 60 images changed class:",
    )
