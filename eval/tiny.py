"""Tiny random models of every family, and samples of drawn numbers for them.

A model is made of its config class with small sizes: those that `SIZES` knows by their names, and
what a family asks for beside, in `OWN`.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import transformers
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn

from gblm.llm import heads
from gblm.walk.survey import find_adapter

VOCABULARY, LENGTH, SAMPLES, IMAGE = 128, 16, 4, 32
TEXT = VOCABULARY - 16  # the ids of text; those after them are codes of pictures

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
    **dict.fromkeys(("qk_rope_head_dim", "index_head_dim", "o_lora_rank"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8,
    "n_groups": 1, "time_step_rank": 4, "rotary_dim": 4, "attention_head_size": 8,
    "first_k_dense_replace": 1, "sliding_window": 8, "attention_window": 8, "block_size": 4,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(("layers", "num_layers"), 2), "attention_heads": 4,
    **dict.fromkeys(("alignment_intermediate_size", "projector_hidden_size"), 64),
    "patch_embed_hidden_size": 192,
    **dict.fromkeys(("text_hidden_size", "adapter_in_dim", "vision_output_dim"), 32),
    "image_size": IMAGE, "patch_size": 8, "out_hidden_size": 32, "projection_dim": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
    "mm_tokens_per_image": 4, "spatial_merge_size": 2,
    "image_token_id": 3, "image_token_index": 3, "video_token_id": 4, "audio_token_id": 5,
    "vision_start_token_id": 6, "vision_end_token_id": 7,
}  # fmt: skip


MROPE = {"rope_type": "default", "rope_theta": 1e4}  # its positions have three parts

# What a family asks for beside, by the name of its config or of one within it.
OWN: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": {
        "vocabulary_map": {"<image>": 3}
        | {"IMGIMG" + "".join(chr(65 + int(c)) for c in str(i)) + "Z": TEXT + i for i in range(16)}
    },
    "chameleon_vqgan": {
        "base_channels": 32, "channel_multiplier": [1, 2], "resolution": IMAGE,
        "latent_channels": 32, "num_embeddings": 16,
    },
    "emu3": {
        "vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}
        | {f"<|visual token {i:06d}|>": TEXT + i for i in range(16)}
    },
    "emu3_vqgan": {
        "base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 16, "embed_dim": 4,
        "latent_channels": 4, "temporal_downsample_factor": 1, "attn_resolutions": [],
    },
    "florence_vision": {
        "embed_dim": [16, 32], "depths": [1, 1], "num_heads": [2, 4], "num_groups": [2, 4],
        "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "window_size": 4, "projection_dim": 32,
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
    "glm4v_moe_text": {
        "rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    },
    "gemma3n_vision": {
        "hidden_size": 2048,
        "model_args": {
            "block_args": [
                [{name: None if callable(own) else own for name, own in stage.items()}]
                for (stage,) in decode_arch_def(
                    [["er_r1_k3_s2_e4_c16"], ["uir_r1_a3_k5_s2_e4_c32"], ["uir_r1_a5_k5_s2_e4_c32"]]
                )
            ],
            "msfa_indices": (-2, -1),
        },
    },
    "phi4_multimodal_audio": {
        "num_blocks": 2, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
    },
    "phi4_multimodal_vision": {"crop_size": IMAGE},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "intermediate_size": [64, 64],
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "janus_vqgan": {
        "base_channels": 32, "channel_multiplier": [1, 2], "latent_channels": 32,
        "num_embeddings": 16, "projection_dim": 32, "image_token_embed_dim": 32,
    },
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "llama4_vision_model": {
        "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
        "intermediate_size": 128,
    },
    "llama4_text": {"intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    "llava_next": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "llava_next_video": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "llava_onevision": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "granite4_vision": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "mllama_vision_model": {
        "num_global_layers": 1, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96,
        "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
}  # fmt: skip


def small(config: Any, sees: bool = False) -> dict[str, Any]:
    """Return the options of a small config: the sizes it knows, and those of configs within it.

    sees: positions of text have three parts, where the family knows such.
    """
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
        inner = getattr(config, "sub_configs", {}).get(name)
        if inner and value is None and name == "vision_config":
            options[name] = small(inner(), sees)
        elif inner and isinstance(value, dict):
            options[name] = small(getattr(config, name), sees)
        if name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            options[name] = (kinds * 2)[: max(2, len(kinds))]
            options["num_hidden_layers"] = len(options[name])
    rope = known.get("rope_parameters", {"": {}}) or {}
    if sees and not any(isinstance(own, dict) for own in rope.values()):
        options["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    options |= OWN.get(config.model_type, {})
    return options


def build(task: str, family: str) -> nn.Module:
    """Return a tiny model, its numbers drawn."""
    torch.manual_seed(0)
    if task == "timm":
        return timm_model(family)
    kind = transformers.CONFIG_MAPPING[family]
    config = kind(**small(kind(), task == "vision"))
    if hasattr(config, "causal"):
        config.causal = task == "causal"
    name = TASKS[task][family]
    name = name[0] if isinstance(name, tuple) else name
    own = getattr(transformers, name)
    if task == "causal" and not isinstance(config, own.config_class):
        config = config.get_text_config(decoder=True)
    model = own(config).eval()
    sizes = [own.numel() for own in model.parameters()]
    if sum(sizes) > 6e7 or max(sizes) > 6e6:
        large = max(model.named_parameters(), key=lambda own: own[1].numel())
        raise ValueError(f"sizes of unknown names: {large[0]} is {list(large[1].shape)}")
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
    ids = torch.randint(8, TEXT, (SAMPLES, LENGTH), generator=draw)
    if task == "masked":
        masked = torch.rand(ids.shape, generator=draw) < 0.3
        masked[:, 0] = True
        return {"input_ids": ids.where(~masked, 7), "labels": ids.where(masked, -100)}
    if task == "seq2seq":
        target = torch.randint(8, TEXT, (SAMPLES, LENGTH), generator=draw)
        start = torch.full((SAMPLES, 1), 2)
        shifted = torch.cat([start, target[:, :-1]], dim=1)
        return {"input_ids": ids, "decoder_input_ids": shifted, "labels": target}
    return {"input_ids": ids} | (pictures(model, ids, draw) if task == "vision" else {})


def pictures(model: Any, ids: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Return a picture for each sample, with its tokens and what the model asks for beside it.

    How many tokens stand for a picture, the model itself tells: a run of one sample shows the
    features that it makes of it.
    """
    config, wanted = model.config, inspect.signature(model.forward).parameters
    more = pixels(model, draw)
    token = image_token(config)
    for leave in ("image_sizes", ""):  # which some hand on to a tower that knows none
        given = {name: own for name, own in more.items() if name != leave}
        sample = {"input_ids": ids[:1]} | {name: own[:1] for name, own in given.items()}
        if found := features(model, sample):
            more = given
            break
    if found and token is not None:
        tokens = torch.full((SAMPLES, found), token)
        ids = torch.cat([ids[:, :2], tokens, ids[:, 2:]], dim=1)
    more["input_ids"] = ids
    for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in wanted and token is not None:
            more[name] = (ids == token).long()
    if "image_embeds_position_mask" in wanted:
        more["image_embeds_position_mask"] = torch.zeros_like(ids)
        more["image_embeds_position_mask"][:, 2 : 2 + config.latent_query_num] = 1
    if "image_attention_mask" in wanted:
        more["image_attention_mask"] = torch.ones(*ids.shape, 1, dtype=torch.long)
    if "cross_attention_mask" in wanted:
        tiles = config.vision_config.max_num_tiles
        more["cross_attention_mask"] = torch.ones(*ids.shape, 1, tiles, dtype=torch.long)
    if "decoder_input_ids" in wanted and getattr(config, "is_encoder_decoder", False):
        more |= {"decoder_input_ids": ids[:, -LENGTH:], "labels": ids[:, -LENGTH:]}
    if "bbox" in wanted:
        more["bbox"] = torch.zeros(*ids.shape, 4, dtype=torch.long)
    return more


WHOLE = ("kimi_k25_vision", "paddleocr_vl_vision")  # patches of these are small pictures


def image_token(config: Any) -> int | None:
    """Return the id that stands for a part of a picture, None where none does."""
    names = ("image_token_id", "image_token_index")
    places = (config, getattr(config, "vision_config", None), getattr(config, "text_config", None))
    found = (getattr(place, name, None) for place in places for name in names)
    return next((own for own in found if isinstance(own, int)), None)


def pixels(model: Any, draw: torch.Generator) -> dict[str, Tensor]:
    """Return drawn pictures as a model takes them, and what it asks for beside."""
    config, wanted = model.config, inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", None) or config
    names = ("in_channels", "num_channels", "in_chans")
    channels = next((n for name in names if (n := getattr(vision, name, 0))), 3)
    patch = getattr(vision, "patch_size", 8)
    if PATCHES & {*wanted}:
        return in_patches(vision, {*wanted}, channels, patch, draw)
    size = getattr(vision, "image_size", IMAGE)
    size = size if isinstance(size, int) else size[0]
    square = torch.tensor([[size, size]] * SAMPLES)
    more: dict[str, Tensor] = {}
    shape: tuple[int, ...] = (channels, size, size)
    if "aspect_ratio_ids" in wanted:
        shape = (1, vision.max_num_tiles, *shape)
        more["aspect_ratio_ids"] = torch.ones(SAMPLES, 1, dtype=torch.long)
        more["aspect_ratio_mask"] = torch.ones(SAMPLES, 1, vision.max_num_tiles).long()
    elif hasattr(config, "image_grid_pinpoints") or config.model_type.endswith("video"):
        shape = (2, *shape)  # the whole, and its parts; or several in their order
    elif "pixel_attention_mask" in wanted or "image_attention_mask" in wanted:
        shape = (1, *shape)
    if "pixel_attention_mask" in wanted:
        more["pixel_attention_mask"] = torch.ones(SAMPLES, 1, size, size, dtype=torch.long)
    if "image_sizes" in wanted:
        more["image_sizes"] = square
    if "target_sizes" in wanted:
        more["target_sizes"] = square // patch
    if "qformer_input_ids" in wanted:
        more["qformer_input_ids"] = torch.full((SAMPLES, 4), 9)
    if "high_res_pixel_values" in wanted:
        high = config.high_res_vision_config.image_size
        more["high_res_pixel_values"] = torch.randn(SAMPLES, channels, high, high, generator=draw)
    return {"pixel_values": torch.randn(SAMPLES, *shape, generator=draw), **more}


# Arguments of models that take pictures as patches, 4 by 4 of them here.
PATCHES = {
    "image_grid_thw", "flattened_patches", "image_patches", "spatial_shapes", "image_position_ids",
}  # fmt: skip


def in_patches(
    vision: Any, wanted: set[str], channels: int, patch: int, draw: torch.Generator
) -> dict[str, Tensor]:
    """Return drawn pictures of 16 patches, and where these lie."""
    width, count = channels * patch**2, torch.full((SAMPLES,), 4)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, 16, *shape, generator=draw)

    if "image_grid_thw" in wanted:
        small = vision.model_type in WHOLE
        width *= getattr(vision, "temporal_patch_size", 1)
        values = drawn(channels, patch, patch) if small else drawn(width)
        more = {
            "image_grid_thw": torch.tensor([[1, 4, 4]] * SAMPLES),
            "image_merge_sizes": count // 2,
        }
        return {"pixel_values": values} | {n: own for n, own in more.items() if n in wanted}
    if "flattened_patches" in wanted:
        values = torch.cat([places.float().expand(SAMPLES, 16, 2) + 1, drawn(width)], dim=-1)
        sides = {name: count for name in ("height", "width") if name in wanted}
        return {"flattened_patches": values} | sides
    if "spatial_shapes" in wanted:
        mask = torch.ones(SAMPLES, 16, dtype=torch.long)
        shapes = torch.full((SAMPLES, 2), 4)
        return {
            "pixel_values": drawn(width),
            "pixel_attention_mask": mask,
            "spatial_shapes": shapes,
        }
    if "image_position_ids" in wanted:
        return {"pixel_values": drawn(width), "image_position_ids": places.expand(SAMPLES, 16, 2)}
    return {"pixel_values": drawn(width)}


def features(model: Any, sample: dict[str, Tensor]) -> int:
    """Return how many features a model makes of the picture of a sample."""
    counts = list[int]()
    with torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "get_image_features"):
                stack.enter_context(_counted(module, counts))
        with suppress(Exception):  # it misses the tokens of the picture
            find_adapter(model).trunk(model, sample)
    return counts[0] if counts else 0


@contextmanager
def _counted(module: Any, counts: list[int]) -> Iterator[None]:
    """Have a module count what its `get_image_features` gives."""
    made = module.get_image_features

    def counting(*args: Any, **named: Any) -> Any:
        output = made(*args, **named)
        own = getattr(output, "pooler_output", None)
        own = output if own is None else own
        own = getattr(own, "last_hidden_state", own)
        parts = own if isinstance(own, list | tuple) else [own]
        counts.append(sum(x.reshape(-1, x.shape[-1]).shape[0] for x in parts))
        return output

    module.get_image_features = counting
    try:
        yield
    finally:
        del module.get_image_features
