"""Text before and after: greedy, within the model's positions, ended where a sequence ends."""

from types import SimpleNamespace

import torch
from torch import nn

from gblm.llm.__main__ import Language, LanguageSettings
from gblm.llm.adapters import adapter
from gblm.llm.examples import Continuations, whole


def made(tokenizer, windows: int = 9, length: int = 32) -> Continuations:
    ids = torch.arange(windows * length).view(windows, length) % 60 + 1
    return Continuations(tokenizer, ids, "notes.txt")


def test_prompts_begin_and_end_between_words(tokenizer):
    text = "word " + "some " * 3 + "or other " * 9
    window = torch.tensor([tokenizer(text)["input_ids"]])[:, 1:]
    examples = Continuations(tokenizer, window, "notes.txt")
    (prompt,) = examples.prompts
    found, start = tokenizer.decode(prompt.tolist()), tokenizer.decode(window[0].tolist())
    assert found.startswith(" ")
    assert len(prompt) == 24
    assert start[start.index(found) + len(found)] == " "


def test_a_word_that_may_be_cut_is_left_out():
    assert whole("it was so. We can f") == "it was so. We can …"
    assert whole("it was so.") == "it was so."
    assert whole("f") == "f"


def test_what_is_written_is_what_generate_writes(llama, tokenizer):
    examples = made(tokenizer)
    examples.before(llama)
    ids = llama.generate(
        examples.prompts,
        attention_mask=torch.ones_like(examples.prompts),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert examples.dense == [tokenizer.decode(row[16:]) for row in ids]


def test_unchanged_models_write_alike_and_others_do_not(llama, tokenizer):
    examples = made(tokenizer)
    examples.before(llama)
    said, found = examples.after(llama)
    assert "notes.txt" in said
    assert len(found) == 3
    assert all(example.dense == example.pruned for example in found)
    nn.init.normal_(llama.lm_head.weight, generator=torch.Generator().manual_seed(1))
    assert any(example.dense != example.pruned for example in examples.after(llama)[1])


def test_the_model_is_not_asked_for_more_than_it_can_take(llama, tokenizer):
    examples = made(tokenizer, length=64)
    examples.prompts = examples.prompts[:, :1].expand(-1, 60)  # of the model's 64 positions
    assert len(tokenizer(examples.written(llama)[0])["input_ids"]) == 4


def test_of_a_processor_the_tokenizer_writes(llama, tokenizer, batch):
    settings = LanguageSettings(calibration="notes.txt")
    processor = SimpleNamespace(tokenizer=tokenizer)
    given = {"settings": settings, "model": llama, "batch": batch, "adapter": adapter(llama)}
    examples = Language(**given, tokenizer=processor, sets={}).examples()
    examples.before(llama)
    assert len(examples.dense) == 3


def test_text_ends_with_the_sequence(tokenizer):
    examples = made(tokenizer, windows=1)
    assert len(examples.prompts) == 1
    end = tokenizer("Z")["input_ids"][0]
    examples.tokenizer.eos_token = "Z"
    try:
        assert examples._text(torch.tensor([*tokenizer("ab")["input_ids"], end, 5])) == "ab"
    finally:
        examples.tokenizer.eos_token = None
