"""Models for other runtimes: ONNX, whose outputs are compared, and Core ML with its own pruning."""

import copy
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import GblmError, explained

EXPORTS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "coreml": ("coremltools",)}
NEAR = 1e-3  # of the outputs: how far those of onnxruntime may be, in float32


def check_export(form: str) -> None:
    """Raise `GblmError` where what an export takes is not installed."""
    if missing := [name for name in EXPORTS[form] if find_spec(name) is None]:
        raise GblmError(
            f"--export {form} takes {' and '.join(missing)}, which is not installed; "
            f"pip install 'gblm[{form}]'"
        )


def export(form: str, model: nn.Module, inputs: Tensor, folder: Path) -> str:
    """Write a model from inputs `[n, …]` to a tensor in a form; return what was done, in words.

    The model is taken in float32, on the CPU. Raises `GblmError` where its code cannot be exported,
    or an ONNX file gives other outputs.
    """
    plain = copy.deepcopy(model).float().cpu().eval()
    given = inputs.cpu().float() if inputs.is_floating_point() else inputs.cpu()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with explained(f"--export {form}: the model cannot be exported", "do without it"):
        return {"onnx": _onnx, "coreml": _coreml}[form](plain, given, folder)


@torch.no_grad()
def _onnx(model: nn.Module, inputs: Tensor, folder: Path) -> str:
    import onnxruntime

    file = folder / "model.onnx"
    names = {i: torch.export.Dim(f"d{i}") for i in range(1 if inputs.ndim > 2 else 2)}
    several = torch.cat([inputs, inputs])[:2]
    program = torch.onnx.export(
        model, (several,), dynamo=True, dynamic_shapes=(names,), verbose=False
    )
    assert program
    program.save(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    got = torch.from_numpy(session.run(None, {given.name: inputs.numpy()})[0])
    wanted: Tensor = model(inputs)
    far = float((got - wanted).abs().max() / wanted.abs().max())
    if not far <= NEAR:
        raise GblmError(f"{file.name} gives other outputs than the model, by {far:.2%}")
    return (
        f"{file.name}: outputs in onnxruntime within {far:.1e} of the model's; zeros alone make it "
        "neither smaller nor quicker"
    )


@torch.no_grad()
def _coreml(model: nn.Module, inputs: Tensor, folder: Path) -> str:
    import coremltools

    package = folder / "model.mlpackage"
    program = torch.export.export(model, (inputs[:1],)).run_decompositions({})
    converted: Any = coremltools.convert(
        program,
        pass_pipeline=coremltools.PassPipeline.DEFAULT_PRUNING,
        minimum_deployment_target=coremltools.target.iOS16,
        convert_to="mlprogram",
        skip_model_load=True,
    )
    converted.save(str(package))
    size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    return f"{package.name}: {size / 1e6:.2f} MB in float16, zeros as a bitmask; run it on a Mac"
