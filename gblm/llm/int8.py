"""A saved language model quantised to weights of 8 bits by torchao, in a folder of its own."""

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from gblm.base import GblmError, explained
from gblm.llm.heads import auto_class
from gblm.machine.files import weights_size
from gblm.report.wording import size


def check_torchao() -> None:
    """Raise `GblmError` where torchao is not installed."""
    if find_spec("torchao") is None:
        raise GblmError(
            "--also int8 is done by torchao, which is not installed; pip install 'gblm[int8]'"
        )


def quantise(folder: Path) -> str:
    """Write the quantised model of a folder into `int8` in it; return what it is in a sentence.

    Weights of linears get 8 bits and a scale for each output, so zeros stay zeros. Raises
    `GblmError` where torchao cannot.
    """
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    out, config = folder / "int8", AutoConfig.from_pretrained(folder)
    with explained("--also int8: the result cannot be quantised", "do without it"):
        quantization = TorchAoConfig(Int8WeightOnlyConfig())
        model = auto_class(config).from_pretrained(folder, quantization_config=quantization)
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return (
        f"int8: {size(weights_size(out))} in {out.name}; on a CPU it decodes quicker than dense "
        "under torch.compile, and slower without"
    )
