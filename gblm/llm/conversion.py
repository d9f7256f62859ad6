"""Where the parameters of a model of transformers lie in a checkpoint, by transformers' own rules.

A checkpoint holds each expert by itself where the model has one tensor of all, or has other names.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from gblm.machine.files import tensor_shapes
from gblm.machine.offload import Converted, Tensors


@dataclass
class Places:
    """Where each parameter lies, its shape there, and the tensors that are of none."""

    of: dict[str, Path | Converted]
    shapes: dict[str, list[int]]
    others: set[str]


def places(model: PreTrainedModel, files: Mapping[str, Path]) -> Places:
    """Return where the parameters and buffers of a model lie in the files of a checkpoint."""
    transforms = get_model_conversion_mapping(model)
    parts, others = _parts(model, files, transforms), set[str]()
    vars(model)["_weight_conversions"] = [
        own for own in transforms if own.was_used()
    ]  # to save it again
    shapes = {key: own for file in set(files.values()) for key, own in tensor_shapes(file).items()}
    found = Places({}, {}, others)
    known = model.state_dict()
    for name, keys in parts.items():
        if name not in known:
            others.update(keys)
        elif [*keys] == [name]:
            found.of[name], found.shapes[name] = files[name], shapes[name]
        else:
            own = _transform(name, keys, transforms)
            convert = partial(_converted, model, name, keys, own)
            made = convert({key: torch.empty(shapes[key], device="meta") for key in keys})
            place = Converted({key: files[key] for key in keys}, convert)
            found.of |= dict.fromkeys(made, place)
            found.shapes |= {target: list(tensor.shape) for target, tensor in made.items()}
    return found


def _parts(
    model: PreTrainedModel, keys: Iterable[str], transforms: list[WeightTransform]
) -> dict[str, dict[str, str | None]]:
    """Return, by the name that tensors of a checkpoint have in the model, them and their rule."""
    renamings = [own for own in transforms if isinstance(own, WeightRenaming)]
    converters = [own for own in transforms if isinstance(own, WeightConverter)]
    prefix, known = model.base_model_prefix, model.state_dict()
    parts: dict[str, dict[str, str | None]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, rule = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, rule = key, None
        parts.setdefault(name, {})[key] = rule
    return parts


def _transform(
    name: str, keys: Mapping[str, str | None], transforms: list[WeightTransform]
) -> WeightTransform:
    """Return what makes a parameter of some tensors: another name, or an operation."""
    key, rule = next(iter(keys.items()))
    if rule is None:
        return WeightRenaming(key, name)
    converters = [own for own in transforms if isinstance(own, WeightConverter)]
    return next(own for own in converters if rule in own.source_patterns)


def _converted(
    model: PreTrainedModel,
    name: str,
    keys: Mapping[str, str | None],
    transform: WeightTransform,
    tensors: Tensors,
) -> Tensors:
    """Return the parameters that a rule makes of the tensors of a checkpoint."""
    own: Any = deepcopy(transform)
    for key, rule in keys.items():
        own.add_tensor(name, key, rule or key, tensors[key])
    made = own.convert(name, model=model, config=model.config)
    return {
        target: tensor[0] if isinstance(tensor, list) else tensor for target, tensor in made.items()
    }
