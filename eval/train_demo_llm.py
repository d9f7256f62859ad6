"""Train the demo model of `gblm.llm` again: a small LLaMA on the source of the standard library.

    python eval/train_demo_llm.py --output demo_model

It writes a folder that `from_pretrained` loads. The default number of steps takes less than 20
minutes on 2 idle cores; where other programs want them too, set OMP_WAIT_POLICY=passive, or the
threads lose most of their time waiting for each other.
"""

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from training import train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from gblm.llm import demo

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 256  # tokens in a window
BATCH = 8  # windows in a step; few, for in so short a training steps count for more
PEAK_RATE = 5e-3
THREADS = 2


def train_tokenizer(text: str) -> FastTokenizer:
    """Return a byte-level BPE tokenizer learnt from the text; no byte is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return FastTokenizer(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def encode(tokenizer: FastTokenizer, split: str) -> Tensor:
    """Return the tokens of a split of the demo's text, `[tokens]`."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(demo.text(split)).ids)


def small_llama() -> LlamaForCausalLM:
    """Return a fresh model with LLaMA-3's parts: grouped queries, SwiGLU, rotary positions.

    Every linear has a multiple of 16 inputs, so that all n:m patterns up to 8:16 apply.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.06,  # near 1/sqrt(192); the usual 0.02 is for widths of thousands
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,  # 2048 x 192 weights are a fifth of the model already
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def window_loss(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return the mean loss over windows `[n, t]`, each with t - 1 targets."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def random_windows(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Return a step's windows `[BATCH, CONTEXT]`, each from anywhere in the tokens."""
    starts = torch.randint(len(tokens) - CONTEXT + 1, (BATCH, 1), generator=generator)
    return tokens[starts + torch.arange(CONTEXT)]


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return exp of the mean loss over the windows of the tokens, the rest left out."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [window_loss(model, part) * len(part) for part in windows.split(BATCH)]
    return math.exp(torch.stack(losses).sum() / len(windows))


def unigram_perplexity(train_tokens: Tensor, tokens: Tensor) -> float:
    """Return the perplexity of knowing nothing but how frequent every token is in training."""
    counts = torch.bincount(train_tokens, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[tokens].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=demo.FOLDER, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="of 2,048 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)

    tokenizer = train_tokenizer(demo.text("calibration"))
    train_tokens, held_out = encode(tokenizer, "calibration"), encode(tokenizer, "evaluation")
    print(f"{len(train_tokens):,} tokens to train on, {len(held_out):,} held out")

    model = small_llama()
    epochs = args.steps * BATCH * CONTEXT / len(train_tokens)
    print(f"{model.num_parameters():,} weights, {args.steps} steps, {epochs:.1f} times the text")
    generator = torch.Generator().manual_seed(args.seed)
    train(
        model,
        lambda: window_loss(model, random_windows(train_tokens, generator)),
        args.steps,
        PEAK_RATE,
    )
    model.eval()
    print(f"held-out perplexity   {perplexity(model, held_out):.3f}")

    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    saved = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    print(f"  as saved, in fp16   {perplexity(saved, held_out):.3f}")
    print(f"  token frequencies   {unigram_perplexity(train_tokens, held_out):.3f}")


if __name__ == "__main__":
    main()
