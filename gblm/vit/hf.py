"""Image classifiers of transformers with their image processors: loaded, sketched and saved.

A model has three attributes beside its own: `image_processor`, which pre-processes its images, and
`num_classes` and `pretrained_cfg`, by the names that models of timm have them.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import cached_file, logging

from gblm.base import GblmError, explained
from gblm.machine.carry import Source, write_widths
from gblm.machine.files import check_depth, tensor_shapes
from gblm.vit.data import processed

# A family has one class of image classifiers, or several.
CLASSES = {
    own
    for names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    for own in ([names] if isinstance(names, str) else names)
}
WAY = "check the folder or the name, and the connection to the hub"


def load(name: str) -> PreTrainedModel:
    """Return an image classifier in evaluation mode, from a local folder or a hub name.

    Weights are read from safetensors only. Raises `GblmError` where it is none, where weights are
    missing or do not fit, and where its image processor is missing or gives no plain images.
    """
    config = _config(name)
    file = Path(name) / "model.safetensors"
    if file.is_file():
        check_depth(name, _depth(config), "layers", len(tensor_shapes(file)))
    with explained(f"model {name} cannot be loaded", WAY):
        model, info = AutoModelForImageClassification.from_pretrained(
            name, config=config, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise GblmError(
            f"model {name}: {len(wrong)} weights are missing or of another shape, such as "
            f"{', '.join(wrong[:3])}; give a whole checkpoint of an image classifier"
        )
    return _with_images(model, name)


def source(name: str) -> Source:
    """Return the checkpoint on disk of a model."""
    with explained(f"model {name}: its weights cannot be had", WAY):
        file = Path(str(cached_file(name, "model.safetensors")))
    return Source(dict.fromkeys(tensor_shapes(file), file), file.parent)


def sketch(name: str) -> PreTrainedModel:
    """Return the image classifier of a name without values, on the meta device: see `load`."""
    config = _config(name)
    with explained(f"model {name} cannot be made", WAY), torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    return _with_images(model, name)


def save(model: Any, folder: Path) -> None:
    """Write the weights, the config and the image processor's, as transformers does."""
    model.save_pretrained(folder, max_shard_size="100TB")
    write_widths(model, folder, AutoModelForImageClassification.__name__)
    model.image_processor.save_pretrained(folder)


def loading(folder: Path, model: Any) -> str:
    """Return the Python that loads a saved model."""
    more = ", trust_remote_code=True" if vars(model).get("narrowed") else ""
    return (
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(folder)!r}{more})\n"
        f"processor = AutoImageProcessor.from_pretrained({str(folder)!r})"
    )


def _config(name: str) -> PreTrainedConfig:
    """Return a config; raises `GblmError` where it is not that of an image classifier."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with explained(f"model {name} cannot be loaded", WAY):
        config = AutoConfig.from_pretrained(name)
        named = (config.architectures or ["nothing"])[0]
    if config.model_type == "timm_wrapper" and not config.architectures:
        raise GblmError(f"model {name} is one of timm; write hf-hub:{name}")
    if named not in CLASSES:
        raise GblmError(
            f"model {name} is no image classifier: its config.json names {named}; give one of "
            "those, or prune a language model by python -m gblm.llm"
        )
    return config


def _depth(config: PreTrainedConfig) -> int:
    depth = getattr(config, "num_hidden_layers", 0)
    return depth if isinstance(depth, int) else 0


def _with_images(model: Any, name: str) -> PreTrainedModel:
    """Return a model in evaluation mode, with what the rest of gblm must know of its images."""
    config = getattr(model.config, "vision_config", model.config)
    with explained(f"model {name}: its image processor cannot be had", "save it beside the model"):
        processor = AutoImageProcessor.from_pretrained(name)
    way = "give a model that takes pixel_values [n, c, h, w] alone"
    with explained(f"model {name}: its image processor gives no such images", way):
        height, width = torch.tensor(getattr(config, "image_size", 224)).expand(2).tolist()
        mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        pixels = processed(processor, Image.new(mode, (width, height)))
        if not isinstance(pixels, Tensor) or pixels.ndim != 3:
            raise ValueError(f"{type(processor).__name__} gives another form")
    scaled = getattr(processor, "do_normalize", False)
    resized = min((n for n in dict(processor.size or {}).values() if n), default=pixels.shape[-1])
    crop = getattr(processor, "crop_pct", None) or min(1.0, pixels.shape[-1] / resized)
    model.image_processor, model.num_classes = processor, model.config.num_labels
    names = [model.config.id2label.get(i, "") for i in range(model.config.num_labels)]
    model.pretrained_cfg = {
        "label_names": [] if names[0] == "LABEL_0" else names,
        "input_size": tuple(pixels.shape),
        "mean": tuple(processor.image_mean) if scaled else (0.0,) * len(pixels),
        "std": tuple(processor.image_std) if scaled else (1.0,) * len(pixels),
        "crop_pct": crop,
        "interpolation": Image.Resampling(processor.resample).name.lower(),
    }
    return model.eval()
