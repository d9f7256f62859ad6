"""Train a small Qwen3-MoE on the source of the standard library: experts for tests and examples.

    python eval/train_demo_moe.py --output demo_moe

It writes a folder that `from_pretrained` loads. Text, tokenizer and training are those of the demo
of `gblm.llm`; the default number of steps takes less than 15 minutes on 2 idle cores. The same seed
gives the same model on the same machine, as long as `--minutes` does not cut the training short.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_demo_llm import (
    CONTEXT,
    PEAK_RATE,
    VOCABULARY,
    encode,
    perplexity,
    random_windows,
    unigram_perplexity,
)
from training import train
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from gblm.llm import demo

EXPERTS = 8
EXPERTS_PER_TOKEN = 2
BALANCE = 0.01  # the weight of the loss that spreads the tokens over the experts


def small_qwen3_moe() -> Qwen3MoeForCausalLM:
    """Return a fresh Qwen3-MoE: grouped queries with norms, and experts in every block.

    Every linear has a multiple of 16 inputs, so that all n:m patterns up to 8:16 apply.
    """
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        moe_intermediate_size=80,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.07,  # near 1/sqrt(160); the usual 0.02 is for widths of thousands
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def balanced_loss(model: Qwen3MoeForCausalLM, windows: Tensor) -> Tensor:
    """Return the mean loss over windows `[n, t]`, and a share of that of unbalanced experts.

    Each block is balanced by itself: over all blocks together, as the model's own `aux_loss` has
    it, an expert may be idle where its namesake in another block is busy.
    """
    output = model(input_ids=windows, use_cache=False, output_router_logits=True)
    loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    unbalanced = [
        load_balancing_loss_func((logits,), EXPERTS, EXPERTS_PER_TOKEN)
        for logits in output.router_logits
    ]
    return loss + BALANCE * torch.stack(unbalanced).mean()


@torch.no_grad()
def expert_shares(model: Qwen3MoeForCausalLM, windows: Tensor) -> Tensor:
    """Return which share of the choices of a block falls on each expert, `[blocks, experts]`."""
    logits = torch.stack(model(input_ids=windows, output_router_logits=True).router_logits)
    chosen = logits.topk(EXPERTS_PER_TOKEN).indices.flatten(1)  # [blocks, choices]
    counts = torch.stack([torch.bincount(block, minlength=EXPERTS) for block in chosen])
    return counts / chosen.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1500, help="of 2,048 tokens each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    tokenizer = FastTokenizer.from_pretrained(demo.FOLDER)
    train_tokens, held_out = encode(tokenizer, "calibration"), encode(tokenizer, "evaluation")
    model = small_qwen3_moe()
    print(f"{len(train_tokens):,} tokens to train on, {len(held_out):,} held out")
    print(f"{model.num_parameters():,} weights, at most {args.steps} steps")
    train(
        model,
        lambda: balanced_loss(model, random_windows(train_tokens, generator)),
        args.steps,
        PEAK_RATE,
        args.minutes,
    )
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    saved = Qwen3MoeForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    print(f"held-out perplexity   {perplexity(saved, held_out):.3f}, as saved, in fp16")
    print(f"  token frequencies   {unigram_perplexity(train_tokens, held_out):.3f}")
    shares = expert_shares(saved, held_out[: 16 * CONTEXT].view(16, CONTEXT))
    print(f"  share of an expert  {shares.min():.3f} to {shares.max():.3f}, mean {1 / EXPERTS}")


if __name__ == "__main__":
    main()
