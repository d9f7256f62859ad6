"""Packed checkpoints for transformers: `from_pretrained(folder, variant="packed")` loads them.

Importing this module registers their way of loading. The model is then an ordinary one: its weights
are unpacked as they are read, and `save_pretrained` writes an ordinary folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gblm.packed import QUANT_METHOD, check_names, decode


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What `config.json` says of a packed folder: its name alone, for all is unpacked."""

    def __init__(self, quant_method: str = QUANT_METHOD) -> None:
        self.quant_method, self.dequantize = quant_method, True  # type: ignore[assignment]


class Unpack(ConversionOps):
    """Unpacks tensors as they are read, before whatever else transformers does to them.

    alone: whether it does nothing else. dtype: what transformers wants floating ones in.
    """

    def __init__(self, alone: bool = False) -> None:
        self.alone, self.dtype = alone, None

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, list[Tensor]], *, full_layer_name: str, **others: Any
    ) -> dict[str, list[Tensor]]:
        """Return the tensors of every source, under the name of the parameter where alone."""
        return {
            full_layer_name if self.alone else name: [self._decoded(packed) for packed in tensors]
            for name, tensors in input_dict.items()
        }

    def _decoded(self, packed: Tensor) -> Tensor:
        tensor = decode(packed)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """How transformers reads a packed checkpoint: on the CPU, tensor by tensor."""

    is_trainable = True

    def is_serializable(self) -> bool:
        """Say that the model can be saved, for it is an ordinary one."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] = (), **others: Any
    ) -> None:
        for file in checkpoint_files:
            check_names(Path(file))

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> None:
        """Leave the packed bytes as they are, and note what they are to become."""
        converter.operations[0].dtype = dtype

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel) -> Any:
        """Unpack before every conversion of the family's, and what has none."""
        return [
            *(_unpacked_first(own) for own in weight_conversions),
            WeightConverter("(.+)", r"\1", [Unpack(alone=True)], force_cpu=True),
        ]


def _unpacked_first(own: Any) -> Any:
    if not isinstance(own, WeightConverter):  # but another name
        return own
    patterns = own._original_source_patterns, own._original_target_patterns
    return own.copy(*patterns, operations=[Unpack(), *own.operations], force_cpu=True)
