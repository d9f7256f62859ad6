"""What the zeros of linears buy on this machine, by trial: y = xWᵀ in every way there is.

    float32, …   dense products, in the dtypes that the device multiplies in
    int8, int4   weights of 8 and 4 bits, by torch's own kernels: those that `torch.compile` gives a
                 model which torchao has quantised; without it torchao is slower than dense
    CSR          the zeros left out, indices of int32
    2:4, FP8     on CUDA alone: torch's semi-structured products, and torchao's in FP8

Each is measured for about 20 ms with the real weight of a shape, at one vector (as in generation)
and at 128.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gblm.machine.device import CPU_PRODUCTS, has_products
from gblm.machine.speed import take_turns
from gblm.report import Gain
from gblm.report.wording import gain, time

POSITIONS = (1, 128)
SECONDS = 0.02  # of each way
INT4_GROUP = 32  # neighbours that share a scale
BEST = 0.95  # of the dense time; above it there is no gain
ON_CUDA = ("2:4", "FP8 2:4")
Work = Callable[[], Any]


# The ways: of a weight `[out, in]` and inputs `[positions, in]`, the work that multiplies them.


def dense(dtype: torch.dtype, weight: Tensor, x: Tensor) -> Work:
    """Return the dense product in a dtype."""
    return partial(linear, x.to(dtype), weight.to(dtype))


def int8(weight: Tensor, x: Tensor) -> Work:
    """Return the product with a weight of 8 bits, a scale for each output."""
    if weight.shape[1] % 16:
        raise ValueError("torch's kernel reads beyond the rows of such a weight")
    scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
    rounded = (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return partial(torch._weight_int8pack_mm, x.bfloat16(), rounded, scale)


def int4(weight: Tensor, x: Tensor) -> Work:
    """Return the product with a weight of 4 bits, a scale and a zero for 32 neighbours."""
    parts = weight.float().unflatten(1, (-1, INT4_GROUP))
    least, most = parts.amin(dim=2), parts.amax(dim=2)
    scale = ((most - least) / 15).clamp(min=1e-12)
    rounded = ((parts - least[..., None]) / scale[..., None]).round().clamp(0, 15)
    numbers = rounded.flatten(1).to(torch.int32)
    scales = torch.stack([scale.T, (least + 8 * scale).T], dim=2).contiguous().bfloat16()
    ops = torch.ops.aten
    if weight.device.type == "cpu":
        packed = ops._convert_weight_to_int4pack_for_cpu(numbers, 1)
        return partial(ops._weight_int4pack_mm_for_cpu, x.bfloat16(), packed, INT4_GROUP, scales)
    packed = ops._convert_weight_to_int4pack((numbers[:, ::2] << 4 | numbers[:, 1::2]).byte(), 8)
    return partial(ops._weight_int4pack_mm, x.bfloat16(), packed, INT4_GROUP, scales)


def csr(weight: Tensor, x: Tensor) -> Work:
    """Return the product with the values that are not 0, in float32 with indices of int32."""
    held = weight.float().to_sparse_csr()
    indices = held.crow_indices().int(), held.col_indices().int()
    small = torch.sparse_csr_tensor(*indices, held.values(), size=held.shape)
    return partial(torch.matmul, small, x.float().T.contiguous())


def semi_structured(weight: Tensor, x: Tensor) -> Work:
    """Return torch's 2:4 product, in the dtype of 16 bits that the weight has, else bfloat16."""
    half = weight if weight.itemsize == 2 else weight.bfloat16()
    return partial(linear, x.to(half.dtype), torch.sparse.to_sparse_semi_structured(half))


def fp8_semi_structured(weight: Tensor, x: Tensor) -> Work:
    """Return torchao's 2:4 product in FP8, inputs scaled as they come."""
    from torchao import quantization as ao
    from torchao.quantization.quantize_.workflows.float8.float8_packing_format import (
        Float8PackingFormat,
    )

    outputs, inputs = weight.shape
    held = nn.Linear(inputs, outputs, bias=False)
    held.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    form = Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA
    options = {"granularity": ao.PerRow(), "packing_format": form}
    ao.quantize_(held, ao.Float8DynamicActivationFloat8WeightConfig(**options))
    return partial(held, x.bfloat16())


WAYS: dict[str, Callable[[Tensor, Tensor], Work]] = {
    "int8": int8,
    "int4": int4,
    "CSR": csr,
    "2:4": semi_structured,
    "FP8 2:4": fp8_semi_structured,
}


def ways(weight: Tensor) -> dict[str, Callable[[Tensor, Tensor], Work]]:
    """Return the ways that fit a weight, the dense one in its own dtype first."""
    halves = [dtype for dtype in CPU_PRODUCTS if has_products(weight.device, dtype)]
    dtypes = dict.fromkeys([weight.dtype, torch.float32, *halves])
    found = {name(dtype): partial(dense, dtype) for dtype in dtypes}
    fits = weight.device.type == "cuda" and two_of_four(weight)
    return found | {way: make for way, make in WAYS.items() if fits or way not in ON_CUDA}


def name(dtype: torch.dtype) -> str:
    """Return what a dtype is called."""
    return str(dtype).removeprefix("torch.")


def two_of_four(weight: Tensor) -> bool:
    """Say whether at most two of every four neighbouring inputs are not 0."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(dim=2) <= 2).all())


# The trial.


def gains(model: nn.Module, *, positions: tuple[int, ...] = POSITIONS) -> list[Gain]:
    """Return the seconds of every way to multiply by the linears of a model, where it is.

    One weight stands for all of its shape and dtype. Only modules of the class `nn.Linear` count.
    """
    modules = (own for own in model.modules() if isinstance(own, nn.Linear))
    return trial({str(i): own.weight.detach() for i, own in enumerate(modules)}, positions)


@torch.no_grad()
def trial(
    weights: Mapping[str, Tensor], positions: tuple[int, ...] = POSITIONS, among: str = ""
) -> list[Gain]:
    """Return what `gains` does of weights `[out, in]`; among: the one way to try beside dense."""
    shapes = Counter((own.shape, own.dtype) for own in weights.values())
    found = []
    for (shape, dtype), number in shapes.items():
        kind = (shape, dtype)
        weight = next(own for own in weights.values() if (own.shape, own.dtype) == kind)
        base = name(dtype)
        for some in positions:
            x = torch.randn(some, shape[1], device=weight.device).to(dtype)
            works = {
                way: work
                for way, make in ways(weight).items()
                if (not among or way in (among, base)) and (work := _made(make, weight, x))
            }
            taken = take_turns(list(works.values()), weight.device, SECONDS)
            seconds = dict(zip(works, (own.seconds for own in taken), strict=True))
            found.append(Gain(list(shape), number, some, base, seconds))
    return found


def _made(make: Callable[[Tensor, Tensor], Work], weight: Tensor, x: Tensor) -> Work | None:
    """Return the work of a way, None where it cannot be done with this shape or this torch."""
    try:
        with warnings.catch_warnings():  # torch's, that such tensors are a beta
            warnings.simplefilter("ignore")
            work = make(weight, x)
            work()
    except (RuntimeError, ValueError, NotImplementedError, ImportError, AssertionError):
        return None
    return work


def said(found: list[Gain]) -> list[str]:
    """Return the lines of a table: the dense seconds of every shape, and the ratios to them."""
    names = list(dict.fromkeys(way for own in found for way in own.seconds))
    head = ["layers", "shape", "vectors", *names]
    rows = [head]
    for own in found:
        shape = " × ".join(map(str, own.shape))
        cells = [_cell(own, way) for way in names]
        rows.append([str(own.number), shape, str(own.positions), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _cell(own: Gain, way: str) -> str:
    if way == own.base:
        return time(own.seconds[way])
    return gain(own.ratio(way), BEST, math.inf) if way in own.seconds else "–"


# What a device does with 2:4.


@torch.no_grad()
def accelerate(model: nn.Module, *, positions: int = 128) -> str:
    """Let linears run by torch's 2:4 products where a trial says that this is quicker here.

    Their weights become those of `torch.sparse.to_sparse_semi_structured`, for inference alone;
    save the model before. Returns what was done, in a sentence: on a CPU, that nothing is gained.
    """
    modules = {key: own for key, own in model.named_modules() if isinstance(own, nn.Linear)}
    fitting = {key: own for key, own in modules.items() if _can(own.weight)}
    if not fitting:
        return _nothing(modules)
    weights = {key: own.weight.detach() for key, own in fitting.items()}
    quick = {
        (tuple(own.shape), own.base): own.ratio("2:4")
        for own in trial(weights, (positions,), among="2:4")
        if "2:4" in own.seconds and own.ratio("2:4") <= BEST
    }
    swapped = 0
    for own in fitting.values():
        if (tuple(own.weight.shape), name(own.weight.dtype)) in quick:
            sparse = torch.sparse.to_sparse_semi_structured(own.weight.detach())
            if _agree(own.weight, sparse, positions):
                own.weight = nn.Parameter(sparse, requires_grad=False)
                swapped += 1
    if not swapped:
        return f"no gain: 2:4 products are not quicker at {positions} vectors, for any shape here"
    least, most = min(quick.values()), max(quick.values())
    return (
        f"{swapped} of {len(modules)} linear layers run by 2:4 products, in {least:.2f} to "
        f"{most:.2f} of the dense time at {positions} vectors"
    )


def _can(weight: Tensor) -> bool:
    """Say whether torch has a 2:4 product for a weight: its device, its dtype and its zeros."""
    return weight.device.type == "cuda" and weight.itemsize == 2 and two_of_four(weight)


def _agree(weight: Tensor, sparse: Tensor, positions: int) -> bool:
    """Say whether both give the same outputs within the rounding of 16 bits."""
    x = torch.randn(positions, weight.shape[1], device=weight.device).to(weight.dtype)
    wanted = linear(x, weight).float()
    return bool((linear(x, sparse).float() - wanted).norm() <= 0.01 * wanted.norm())


def _nothing(modules: Mapping[str, nn.Linear]) -> str:
    devices = {own.weight.device.type for own in modules.values()}
    if "cuda" not in devices:
        return (
            "no gain: torch has 2:4 products on CUDA alone; on a CPU, int8 makes decoding quicker"
        )
    return "no gain: no linear layer has two zeros of every four neighbours, in 16 bits"
