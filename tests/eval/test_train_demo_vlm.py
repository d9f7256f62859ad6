"""The tiny LLaVA: its questions are answered rightly, its training runs, and its folder loads."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import train_demo_vlm
from PIL import Image
from train_demo_vlm import LEFT, MIDDLE, RIGHT, Example, draw_example, draw_images
from transformers import AutoModelForImageTextToText, AutoProcessor

from gblm.llm import pairs

LABELS = list(range(10))


def expected(example: Example) -> str:
    digits = [LABELS[index] for index in example.pictures.values()]
    match example.question.rstrip("?").split():
        case ["Which", "digit", "is", "it"] | ["Which", "digits", "are", "they"]:
            return " ".join(map(str, digits))
        case ["Is", "it", "larger", "than", number]:
            return ["no", "yes"][digits[0] > int(number)]
        case ["What", "is", "their", "sum"]:
            return str(sum(digits))
        case ["Which", "side", "is", "larger"]:
            left, right = digits
            return ["neither", "left", "right"][(left > right) - (left < right)]
    raise AssertionError(example.question)


def test_the_answers_are_right_and_in_the_vocabulary():
    draw = random.Random(0)
    tokenizer = train_demo_vlm.word_tokenizer()
    for _ in range(500):
        example = draw_example(LABELS, draw)
        assert example.answer == expected(example)
        assert tuple(example.pictures) in ((MIDDLE,), (LEFT, RIGHT))
        tokens = tokenizer(f"{example.question} {example.answer}").input_ids
        assert tokenizer.unk_token_id not in tokens


def test_an_image_holds_its_pictures_and_else_no_ink():
    pictures = torch.arange(10.0)[:, None, None].expand(10, 8, 8)
    two, one = draw_images(pictures, [Example({0: 3, 8: 5}, "", ""), Example({4: 7}, "", "")])
    assert two[4:12, :8].eq(3).all()
    assert two[4:12, 8:].eq(5).all()
    assert one[4:12, 4:12].eq(7).all()
    assert one.sum() == 7 * 64


def test_training_sees_what_the_processor_gives(monkeypatch):
    monkeypatch.setattr(train_demo_vlm, "moved", lambda pictures, generator: pictures)
    processor = train_demo_vlm.digits_processor()
    batch = train_demo_vlm.Lessons(processor, "calibration", seed=3).batch()
    pictures, labels = train_demo_vlm.demo.digits("calibration")
    draw = random.Random(3)
    for row in range(8):
        example = draw_example(labels.tolist(), draw)
        image = Image.fromarray(draw_images(pictures, [example])[0].numpy())
        text = pairs.prompt(pairs.Pair(Path(), example.question), processor)
        inputs = processor(images=image, text=text, return_tensors="pt")
        torch.testing.assert_close(inputs["pixel_values"][0], batch["pixel_values"][row])
        asked = inputs["input_ids"][0]
        assert torch.equal(batch["input_ids"][row, : len(asked)], asked)
        answer = batch["labels"][row][batch["labels"][row] != -100]
        assert processor.decode(answer) == f"{example.answer} </s>"
        assert torch.equal(batch["input_ids"][row, len(asked) :][: len(answer)], answer)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder that the script writes after two steps."""
    call = f"train_demo_vlm.py --output {tmp_path} --steps 2 --threads 1"
    monkeypatch.setattr(sys, "argv", call.split())
    monkeypatch.setattr(train_demo_vlm, "BATCH", 4)
    monkeypatch.setattr(train_demo_vlm, "ROWS", {"calibration": 4, "evaluation": 6})
    train_demo_vlm.main()
    return tmp_path


def test_a_folder_loads_and_has_its_examples(folder):
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(set(line) == {"image", "text", "answer"} for line in lines)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float16
    inputs = processor(
        images=Image.open(folder / lines[0]["image"]),
        text=pairs.prompt(pairs.Pair(Path(), lines[0]["text"]), processor),
        return_tensors="pt",
    )
    assert model.float()(**inputs).logits.isfinite().all()
    assert inputs["input_ids"].eq(model.config.image_token_id).sum() == 16
