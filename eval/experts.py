"""Try what an expert that few tokens are sent to is pruned by.

    python eval/experts.py --model demo_moe

The model is that of eval/train_demo_moe.py. Few windows of calibration leave experts with few
tokens. Such an expert is pruned by its own statistics, by the magnitude of its weights, or by the
statistics of all experts of its layer added up; or every expert has the statistics of all tokens.
"""

import argparse
from typing import Any

import torch

import gblm
from gblm import llm, methods
from gblm.llm.adapters import adapter
from gblm.methods import solve
from gblm.methods.solve import lent

LENGTH, EVALUATED, DRAWS = 64, 120, 3
WINDOWS = (2, 8, 32, 128)
# How many tokens are few, by what an expert with fewer is pruned, and what the experts see.
TRIALS = {
    "its own statistics": (0, "magnitude", "routed"),
    "magnitude below 32": (32, "magnitude", "routed"),
    "magnitude below 128": (128, "magnitude", "routed"),
    "the layer's below 32": (32, "layer", "routed"),
    "the layer's below 128": (128, "layer", "routed"),
    "`--experts all`": (32, "magnitude", "all"),
}


def no_one_lends(groups: Any) -> dict[str, Any]:
    """Leave every expert its own statistics."""
    return {}


def main() -> None:
    """Print a table of perplexities, each the mean of some draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder of eval/train_demo_moe.py")
    parser.add_argument("--sparsity", default="0.6")
    parser.add_argument("--methods", default="wanda,sparsegpt")
    args = parser.parse_args()
    llm.models.silence()
    model, tokenizer = llm.load(args.model, dtype="float32")
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    windows = llm.evaluation("demo", tokenizer, LENGTH, EVALUATED)
    print(f"dense {llm.perplexity(model, windows):.2f}, {args.sparsity}\n")
    print("| method | few inputs |", " | ".join(f"{n} windows" for n in WINDOWS), "|")
    print("|---|---|" + "--:|" * len(WINDOWS))
    for name in args.methods.split(","):
        for title, (fewest, fallback, experts) in TRIALS.items():
            solve.FEWEST, row = fewest, []
            solve.lent = lent if fallback == "layer" else no_one_lends
            for count in WINDOWS:
                found = []
                for seed in range(DRAWS):
                    model.load_state_dict(dense)
                    ids = llm.calibration("demo", tokenizer, count, LENGTH, seed)
                    given = {"adapter": adapter(model, experts)}
                    method = methods.make(name)
                    gblm.prune(model, {"input_ids": ids}, method, args.sparsity, **given)
                    found.append(llm.perplexity(model, windows))
                row.append(f"{torch.tensor(found).mean():.2f}")
            print(f"| {name} | {title} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
