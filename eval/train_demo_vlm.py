"""Train a tiny LLaVA on the digits of scikit-learn: an image-text model for tests and examples.

    python eval/train_demo_vlm.py --output demo_vlm

It writes a folder that `AutoModelForImageTextToText` and `AutoProcessor` load, and beside the model
`calibration.jsonl` and `evaluation.jsonl`: lines of image, text and answer, of the images to train
on and of those held out. An image holds one digit or two, and the model names them, compares one
with a number, says which side is larger, or adds. The default number of steps takes less than 15
minutes on 2 idle cores. The same seed gives the same model on the same machine, as long as
`--minutes` does not cut the training short.
"""

import argparse
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_demo_vit import moved
from training import train
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer

from gblm.llm import pairs
from gblm.vit import demo

SIZE = 16  # pixels of a side of an image; a digit has 8 × 8 of them
PATCH = 4  # pixels of a side of a patch
ROW = 4  # of the image, the first with ink
MIDDLE, LEFT, RIGHT = 4, 0, 8  # the first column of a digit
BATCH = 64  # images in a step, each with one question
PEAK_RATE = 2e-3
ROWS = {"calibration": 512, "evaluation": 1000}  # of the files beside the model

PAD, START, END, IMAGE, UNKNOWN = "<pad>", "<s>", "</s>", "<image>", "<unk>"
SPECIAL = [PAD, START, END, IMAGE, UNKNOWN]
WORDS = "user assistant : ? which digit is it digits are they larger than side what their sum"
ANSWERS = "yes no left right neither"
NUMBERS = [str(number) for number in range(19)]  # 9 + 9 is 18

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %} "
    "{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Example:
    """A question about an image, which is made of pictures of a split, each at its column."""

    pictures: dict[int, int]  # the index of the picture, by its column
    question: str
    answer: str


def draw_example(labels: list[int], draw: random.Random) -> Example:
    """Return an example of one of four kinds, of pictures with these labels.

    The kinds are to name one digit or two, to compare one with a number, to compare two, to add.
    """
    kind = draw.choice(["name", "threshold", "side", "sum"])
    two = kind in ("side", "sum") or (kind == "name" and draw.random() < 0.5)
    columns = (LEFT, RIGHT) if two else (MIDDLE,)
    pictures = {column: draw.randrange(len(labels)) for column in columns}
    digits = [labels[index] for index in pictures.values()]
    if kind == "name":
        question = "Which digits are they?" if two else "Which digit is it?"
        return Example(pictures, question, " ".join(map(str, digits)))
    if kind == "threshold":
        number = draw.randrange(9)
        answer = "yes" if digits[0] > number else "no"
        return Example(pictures, f"Is it larger than {number}?", answer)
    if kind == "sum":
        return Example(pictures, "What is their sum?", str(sum(digits)))
    left, right = digits
    answer = "left" if left > right else "right" if right > left else "neither"
    return Example(pictures, "Which side is larger?", answer)


def draw_images(pictures: Tensor, examples: list[Example]) -> Tensor:
    """Return the images of examples, `[n, SIZE, SIZE]`, of a split's pictures `[m, 8, 8]`.

    Where a picture does not reach, an image has the least value there is: no ink.
    """
    images = pictures.min().repeat(len(examples), SIZE, SIZE)
    height, width = pictures.shape[-2:]
    for image, example in zip(images, examples, strict=True):
        for column, index in example.pictures.items():
            image[ROW : ROW + height, column : column + width] = pictures[index]
    return images


def word_tokenizer() -> FastTokenizer:
    """Return a tokenizer of the few words and numbers of questions and answers."""
    words = SPECIAL + WORDS.split() + ANSWERS.split() + NUMBERS
    numbered = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # punctuation is a word of its own
    return FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",  # as generation wants it
    )


def digits_processor() -> LlavaProcessor:
    """Return the processor of the model: pixels to -1…1, and the tokenizer of words."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor,
        word_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",  # the class token is left out
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def tiny_llava(tokenizer: FastTokenizer) -> LlavaForConditionalGeneration:
    """Return a fresh LLaVA: a CLIP tower of the size of the demo of `gblm.vit`, and a LLaMA.

    Every linear has a multiple of 16 inputs, so that all n:m patterns up to 8:16 apply.
    """
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=64,
        initializer_range=0.2,  # of patches and positions
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.08,  # near 1/sqrt(128); the usual 0.02 is for widths of thousands
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        initializer_range=0.1,  # of the projector
    )
    return LlavaForConditionalGeneration(config)


class Lessons:
    """Batches of fresh examples of a split; the pictures are moved anew each time."""

    def __init__(self, processor: LlavaProcessor, split: str, seed: int) -> None:
        pictures, labels = demo.digits(split)
        self.pictures = pictures[:, None] / 127.5 - 1  # [n, 1, 8, 8] in -1…1
        self.labels = labels.tolist()
        self.processor = processor
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.encoded: dict[tuple[str, str], tuple[list[int], int]] = {}

    def batch(self) -> dict[str, Tensor]:
        """Return `pixel_values`, `input_ids` and `labels`; those of a prompt and padding -100."""
        examples = [draw_example(self.labels, self.draw) for _ in range(BATCH)]
        images = draw_images(moved(self.pictures, self.generator)[:, 0], examples)
        rows = [self.encode(example) for example in examples]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((BATCH, longest), self.processor.tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (values, asked) in enumerate(rows):
            ids[row, : len(values)] = torch.tensor(values)
            labels[row, asked : len(values)] = ids[row, asked : len(values)]
        pixels = images[:, None].expand(-1, 3, -1, -1)
        return {"pixel_values": pixels, "input_ids": ids, "labels": labels}

    def encode(self, example: Example) -> tuple[list[int], int]:
        """Return the tokens of question and answer, and how many are the question's."""
        key = (example.question, example.answer)
        if key not in self.encoded:
            tokens = IMAGE * (SIZE // PATCH) ** 2
            pair = pairs.Pair(Path(), example.question)
            asked = pairs.prompt(pair, self.processor).replace(IMAGE, tokens)
            question = self.processor.tokenizer(asked).input_ids
            answer = self.processor.tokenizer(f"{example.answer}{END}").input_ids
            self.encoded[key] = (question + answer, len(question))
        return self.encoded[key]


def answer_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss over the tokens of the answers; padding to the right is never seen."""
    labels = batch["labels"][:, 1:]
    output = model(
        pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], use_cache=False
    )
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), labels.flatten())


def write_examples(folder: Path, split: str, seed: int) -> None:
    """Write `<split>.jsonl` and its images: lines of image (a path in the folder), text, answer."""
    pictures, labels = demo.digits(split)
    draw = random.Random(f"{split} {seed}")
    examples = [draw_example(labels.tolist(), draw) for _ in range(ROWS[split])]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, example) in enumerate(
        zip(draw_images(pictures, examples), examples, strict=True)
    ):
        name = f"images/{split}_{number:04}.png"
        Image.fromarray(image.numpy()).save(folder / name)
        line = {"image": name, "text": example.question, "answer": example.answer}
        lines.append(json.dumps(line) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines))


def exact_match(folder: Path, split: str) -> dict[str, float]:
    """Return the percentage of answers of a saved model that are those of a file, by question.

    The whole is that of "all"; numbers in questions are left out.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    kinds: dict[str, list[pairs.Pair]] = defaultdict(list)
    for pair in pairs.read(str(folder / f"{split}.jsonl")):
        kinds[pair.text.rstrip("?0123456789 ")].append(pair)
    found = {kind: pairs.exact_match(model, own, processor) for kind, own in kinds.items()}
    total = sum(map(len, kinds.values()))
    found["all"] = sum(found[kind] * len(own) for kind, own in kinds.items()) / total
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1500, help=f"of {BATCH} images each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    processor = digits_processor()
    model = tiny_llava(processor.tokenizer)
    lessons = Lessons(processor, "calibration", args.seed)
    language = model.model.language_model.num_parameters()
    print(f"{model.num_parameters():,} weights, {language:,} of them of the language model")
    train(
        model,
        lambda: answer_loss(model, lessons.batch()),
        args.steps,
        PEAK_RATE,
        args.minutes,
    )
    model.half().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    for split in ROWS:
        write_examples(args.output, split, args.seed)
        for kind, share in sorted(exact_match(args.output, split).items()):
            print(f"{split}  {share:6.2f}% exact match  {kind}")


if __name__ == "__main__":
    main()
