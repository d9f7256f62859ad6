"""Build a tiny random member of every family, prune it, reload it, and tell what stays dense.

    python eval/families.py [--task causal,masked,seq2seq,vision,timm] [--only llama,bert]
        [--methods wanda,gblm,sparsegpt,best] [--patterns 0.5,2:4] [--output docs/families.md]

The families are those that transformers maps to a task, and the modules of timm whose models hold
attention or token mixing. Each is made of its config class with small sizes; one that cannot be
built so is listed with the reason. `share` is the part of the weights in the blocks that is pruned.
"""

import argparse
import gc
import inspect
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.base import reason
from gblm.llm import heads
from gblm.walk.survey import find_adapter

VOCABULARY, LENGTH, SAMPLES, IMAGE = 128, 16, 4, 32
SECONDS = 600  # for one method, at most

TASKS = {
    "causal": heads.CLASS[heads.CAUSAL][1],
    "masked": heads.CLASS[heads.MASKED][1],
    "seq2seq": heads.CLASS[heads.TARGET][1],
    "vision": heads.CLASS[heads.PICTURES][1],
}

# Sizes by the names that configs have for them; a config takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embed_dim"), 32),
    **dict.fromkeys(("embedding_size", "lru_width", "rnn_hidden_size", "dim_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "n_inner"), 64),
    **dict.fromkeys(("hidden_dim", "ffn_size"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_inner"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8,
    "n_groups": 1, "time_step_rank": 4, "rotary_dim": 4, "attention_head_size": 8,
    "first_k_dense_replace": 1, "sliding_window": 8, "attention_window": 8, "block_size": 4,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "image_size": IMAGE, "patch_size": 8, "out_hidden_size": 32, "projection_dim": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
    "mm_tokens_per_image": 4, "spatial_merge_size": 2,
    "image_token_id": 3, "image_token_index": 3, "video_token_id": 4, "audio_token_id": 5,
    "vision_start_token_id": 6, "vision_end_token_id": 7,
}  # fmt: skip


@dataclass
class Result:
    """What became of one family: `share` of its blocks' weights pruned, or an `error`."""

    task: str
    family: str
    parameters: int = 0
    share: float = 0.0
    dense: dict[str, str] = field(default_factory=dict)
    note: str = ""
    built: str = ""  # why it could not be, empty where it was
    errors: dict[str, str] = field(default_factory=dict)  # by method and pattern
    seconds: float = 0.0


def small(config: Any) -> dict[str, Any]:
    """Return the options of a small config: the sizes it knows, and those of configs within it."""
    known = config.to_dict()
    options: dict[str, Any] = {}
    for name, value in SIZES.items():
        name_of = getattr(config, "attribute_map", {}).get(name, name)
        private = isinstance(getattr(type(config), name_of, None), property)
        if name in known and not private and not isinstance(known[name], list | tuple):
            options[name] = value
    if "kv_lora_rank" in known:  # every head has keys of its own
        options["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, value in known.items():
        if name in getattr(config, "sub_configs", {}) and isinstance(value, dict):
            options[name] = small(getattr(config, name))
        if name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            options[name] = (kinds * 2)[: max(2, len(kinds))]
            options["num_hidden_layers"] = len(options[name])
    if "vl" in config.model_type and "rope_parameters" in known:
        options["rope_parameters"] = {
            **(known["rope_parameters"] or {}),
            "mrope_section": [2, 1, 1],
        }
    return options


def build(task: str, family: str) -> nn.Module:
    """Return a tiny model, its numbers drawn."""
    torch.manual_seed(0)
    if task == "timm":
        return timm_model(family)
    kind = transformers.CONFIG_MAPPING[family]
    config = kind(**small(kind()))
    if hasattr(config, "causal"):
        config.causal = task == "causal"
    name = TASKS[task][family]
    name = name[0] if isinstance(name, tuple) else name
    model = getattr(transformers, name)(config).eval()
    sizes = [own.numel() for own in model.parameters()]
    if sum(sizes) > 3e6 or max(sizes) > 5e5:
        raise ValueError("its sizes have names that are not known here")
    with torch.no_grad():
        for own in model.parameters():
            if own.ndim > 1 and own.is_floating_point():
                own.copy_(torch.randn_like(own) * 0.05)
    return model


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5).eval()


# Those of modules that hold several kinds of models, beside the smallest of each module.
BESIDE = ("botnet26t_256", "halonet26t", "mobilevit_xxs", "mobilevitv2_050", "twins_pcpvt_small")


def timm_names() -> list[str]:
    """Return the smallest model of every module of timm that holds attention or token mixing."""
    import timm
    from timm.models import _registry

    words = ("attn", "attention", "mixer", "token")
    names = []
    for module in sorted(timm.list_modules()):
        code = inspect.getsource(sys.modules[f"timm.models.{module}"]).lower()
        if not any(word in code for word in words) or "nn.linear" not in code:
            continue
        sizes = {}
        for name in sorted(_registry._module_to_models[module]):
            if timm.is_model(name):
                with torch.device("meta"), suppress(Exception):
                    model = timm.create_model(name)
                    sizes[name] = sum(own.numel() for own in model.parameters())
        if sizes:
            names.append(min(sizes, key=lambda name: sizes[name]))
    return [*names, *BESIDE]


def batch_of(task: str, model: Any) -> dict[str, Tensor]:
    """Return calibration samples of drawn numbers."""
    draw = torch.Generator().manual_seed(1)
    if task == "timm":
        size = model.pretrained_cfg["input_size"]
        labels = torch.arange(SAMPLES) % 5
        return {"images": torch.randn(SAMPLES, *size, generator=draw), "labels": labels}
    ids = torch.randint(8, VOCABULARY, (SAMPLES, LENGTH), generator=draw)
    if task == "masked":
        masked = torch.rand(ids.shape, generator=draw) < 0.3
        masked[:, 0] = True
        return {"input_ids": ids.where(~masked, 7), "labels": ids.where(masked, -100)}
    if task == "seq2seq":
        target = torch.randint(8, VOCABULARY, (SAMPLES, LENGTH), generator=draw)
        start = torch.full((SAMPLES, 1), 2)
        shifted = torch.cat([start, target[:, :-1]], dim=1)
        return {"input_ids": ids, "decoder_input_ids": shifted, "labels": target}
    return {"input_ids": ids} | (pictures(model, ids, draw) if task == "vision" else {})


def pictures(model: Any, ids: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Return a picture for each sample, with its tokens and what the model asks for beside it."""
    config = model.config
    vision = getattr(config, "vision_config", None)
    wanted = inspect.signature(model.forward).parameters
    token = next(
        getattr(config, name)
        for name in ("image_token_id", "image_token_index")
        if isinstance(getattr(config, name, None), int)
    )
    if "image_grid_thw" in wanted:
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(SAMPLES, 16, width, generator=draw)
        grids = torch.tensor([[1, 4, 4]] * SAMPLES)
        count = 16 // vision.spatial_merge_size**2
        more = {"pixel_values": pixels, "image_grid_thw": grids}
    else:
        size = getattr(vision, "image_size", IMAGE)
        size = size if isinstance(size, int) else size[0]
        shape = (SAMPLES, 3, size, size)
        pixels = torch.randn(shape, generator=draw)
        if "idefics" in config.model_type or "smolvlm" in config.model_type:
            pixels = pixels[:, None]
        more = {"pixel_values": pixels}
        sizes = torch.tensor([[size, size]] * SAMPLES)
        with torch.no_grad():
            try:
                features = model.get_image_features(pixels[:1])
            except TypeError:
                more["image_sizes"] = sizes
                features = model.get_image_features(pixels[:1], image_sizes=sizes[:1])
        features = getattr(features, "pooler_output", features)
        features = features[0] if isinstance(features, list | tuple) else features
        count = features.reshape(-1, features.shape[-1]).shape[0]
    tokens = torch.full((SAMPLES, count), token)
    more["input_ids"] = torch.cat([ids[:, :2], tokens, ids[:, 2:]], dim=1)
    if "token_type_ids" in wanted:
        more["token_type_ids"] = (more["input_ids"] == token).long()
    if "mm_token_type_ids" in wanted:
        more["mm_token_type_ids"] = (more["input_ids"] == token).long()
    return more


def too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def examine(task: str, family: str, names: list[str], patterns: list[str]) -> Result:
    """Prune a family by every method and pattern, and load it again."""
    result, start = Result(task, family), time.perf_counter()
    signal.signal(signal.SIGALRM, too_long)
    try:
        model = build(task, family)
        batch = batch_of(task, model)
        with torch.no_grad():
            find_adapter(model).trunk(model, batch)  # whether it runs at all
    except Exception as error:
        result.built = reason(error)
        return result
    result.parameters = sum(own.numel() for own in model.parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    whole = task != "timm" and reloads(model)
    if task != "timm" and not whole:
        result.note = "transformers loads other weights than it has saved, dense ones too"
    for name in names:
        for pattern in patterns:
            try:
                signal.alarm(SECONDS)
                model.load_state_dict(state)
                report = gblm.prune(model, batch, methods.make(name), pattern)
                result.share = report.weights / max(1, report.block_weights)
                result.dense = report.dense
                if whole and name == names[0] and pattern == patterns[0]:
                    assert reloads(model)
            except Exception as error:
                own = isinstance(error, gblm.GblmError | TimeoutError)
                result.errors[f"{name} {pattern}"] = ("" if own else "TRACEBACK ") + reason(error)
            finally:
                signal.alarm(0)
    result.seconds = time.perf_counter() - start
    return result


def reloads(model: Any) -> bool:
    """Save a model and load it again: say whether it is the same."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).state_dict()
    return all(torch.equal(own, again[name]) for name, own in model.state_dict().items())


def families(task: str) -> list[str]:
    return timm_names() if task == "timm" else sorted(TASKS[task])


def page(results: list[Result]) -> Iterator[str]:
    """Yield the lines of docs/families.md."""
    yield "# Which families gblm prunes, and how much of each"
    yield ""
    yield "`python eval/families.py --methods wanda,gblm --patterns 0.5` builds a tiny member"
    yield "of every family, prunes it and loads it again. `pruned` is the part of the weights"
    yield "in the matrices of the blocks that is pruned; the rest is named with the reason. A"
    yield "family whose sizes or inputs the script does not know is not built."
    for task in dict.fromkeys(result.task for result in results):
        own = [result for result in results if result.task == task]
        made = [result for result in own if not result.built]
        whole = [r for r in made if r.share >= 0.95 and not r.errors]
        yield ""
        yield f"## {task}"
        yield ""
        counts = f"{len(own)} families, {len(made)} built"
        yield f"{counts}, {len(whole)} of them pruned to 95 % or more."
        yield ""
        yield "| family | pruned | stays dense, or why not |"
        yield "|---|---|---|"
        for result in own:
            notes = [f"not built: {result.built}"] if result.built else []
            notes += [result.note] if result.note else []
            notes += [f"{run}: {text}" for run, text in list(result.errors.items())[:2]]
            if result.share < 0.95:
                reasons = Counter(
                    f"{name.rpartition('.')[2]} {text}" for name, text in result.dense.items()
                )
                notes += [text for text, _ in reasons.most_common(3)]
            share = "–" if result.built else f"{100 * result.share:.0f} %"
            yield f"| {result.family} | {share} | {'; '.join(notes).replace('|', '/')} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="causal,masked,seq2seq,vision,timm")
    parser.add_argument("--only", default="")
    parser.add_argument("--methods", default="wanda,gblm,sparsegpt,best")
    parser.add_argument("--patterns", default="0.5,2:4")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = []
    for task in args.task.split(","):
        for family in args.only.split(",") if args.only else families(task):
            if args.only and task != "timm" and family not in TASKS[task]:
                continue
            found = examine(task, family, args.methods.split(","), args.patterns.split(","))
            results.append(found)
            note = found.built or " | ".join(found.errors.values())
            print(f"{task} {family}: {100 * found.share:.0f} % {note}", flush=True)
            gc.collect()
            if args.json:
                args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    if args.output:
        args.output.write_text("\n".join(page(results)) + "\n")


if __name__ == "__main__":
    main()
