"""Products of a model's code with matrices of its parameters, seen as they are computed.

A linear is a matrix W `[out, in]`, a view of a parameter, in a product y = x·Wᵀ, whichever module
or function computes it and however the parameter stores it: whole, transposed, a slice of a fused
or of a three-dimensional one, a kernel of a convolution, which meets patches of its input. A
function mode of torch stands above autograd and autocast, and so sees the operands of every
product, and its output with its gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode


def valueless(tensor: Tensor) -> bool:
    """Say whether a tensor is a shape alone: on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@dataclass(frozen=True)
class Matrix:
    """Where a matrix `[out, in]` lies in a parameter: its first element, and its strides."""

    offset: int
    shape: tuple[int, int]
    stride: tuple[int, int]

    @classmethod
    def of(cls, view: Tensor, parameter: Tensor) -> Matrix:
        """Return where a view of a parameter lies in it."""
        offset = view.storage_offset() - parameter.storage_offset()
        return cls(offset, tuple(view.shape), view.stride())  # type: ignore[arg-type]

    def view(self, parameter: Tensor) -> Tensor:
        """Return the matrix, written through; of a parameter without values, one without."""
        if parameter.untyped_storage().nbytes() < parameter.nbytes:  # it is offloaded
            return parameter.flatten()[:1].expand(self.shape)
        return parameter.as_strided(
            self.shape, self.stride, parameter.storage_offset() + self.offset
        )

    @property
    def last(self) -> int:
        """Where its last element lies."""
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def index(self, parameter: Tensor) -> str:
        """Return the part of the parameter that it is, as one would write it: `[17]`, `[0:64]`."""
        ranges = []
        rest, rest_of_last = self.offset, self.last
        for size, stride in zip(parameter.shape, parameter.stride(), strict=True):
            first, rest = divmod(rest, stride)
            end, rest_of_last = divmod(rest_of_last, stride)
            whole = first == 0 and end == size - 1
            ranges.append(":" if whole else str(first) if first == end else f"{first}:{end + 1}")
        while ranges and ranges[-1] == ":":
            ranges.pop()
        return f"[{', '.join(ranges)}]" if ranges else ""


@dataclass(frozen=True)
class Patches:
    """The patches that a kernel of a convolution meets, by the dimensions of its pictures.

    padding: before and after.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> Patches:
        """Return the patches by the arguments of a convolution of torch."""
        every, gaps = _each(stride, kernel), _each(dilation, kernel)
        if padding == "same":
            whole = [gap * (size - 1) for gap, size in zip(gaps, kernel, strict=True)]
            sides = tuple((size // 2, size - size // 2) for size in whole)
        else:
            sides = tuple((n, n) for n in _each(0 if padding == "valid" else padding, kernel))
        return cls(tuple(kernel), every, sides, gaps)

    @property
    def single(self) -> bool:
        """Whether each is one position, and every position one of them."""
        return {*self.kernel, *self.stride} == {1} and not any(map(any, self.padding))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the patches `[n, …, channels·k]` of `x [n, channels, …]`."""
        if self.single:
            return x.movedim(1, -1)
        x = F.pad(x, [n for sides in reversed(self.padding) for n in sides])
        for i, (size, every, gap) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            x = x.unfold(2 + i, gap * (size - 1) + 1, every)[..., ::gap]
        return x.movedim(1, 1 + len(self.kernel)).flatten(1 + len(self.kernel))


def _each(value: Any, kernel: Sequence[int]) -> tuple[int, ...]:
    """Return an argument of a convolution for each dimension of its kernel."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * len(kernel) if len(values) == 1 else values


def _same(y: Tensor) -> Tensor:
    return y


@dataclass
class Use:
    """One product y = x·Wᵀ: W `weight [out, in]`, x `[..., in]` of the `input` of a function.

    rows(y), of the product's output or of its gradient, is `[..., out]`, in the order of x.
    columns(input) is x, where the function takes it in another form.
    """

    weight: Tensor
    input: Tensor
    rows: Callable[[Tensor], Tensor] = _same
    columns: Callable[[Tensor], Tensor] = _same

    @property
    def x(self) -> Tensor:
        """The input vectors `[..., in]`, made of the input whenever they are asked for."""
        return self.columns(self.input)

    def input_key(self) -> tuple:
        """Return what is equal for linears that see the same input, while that is kept."""
        own = self.input
        place = own.untyped_storage()._cdata, own.storage_offset(), own.shape, own.stride()
        return *place, own._version, self.columns


Known = Callable[[Any], bool]  # whether something is a view of a parameter that is watched
Form = Callable[..., Iterable[Use]]


class Products(TorchFunctionMode):
    """Sees the products with some linears while the model's code runs.

    values: what their parameters hold then, where that is not their own.
    """

    def __init__(
        self, linears: Iterable[Any], values: Mapping[nn.Parameter, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.linears: dict[int, dict[Matrix, Any]] = {}  # by the storage of their parameter
        self.tensors: dict[int, Tensor] = {}
        for linear in linears:
            tensor = values[linear.parameter] if values else linear.parameter
            storage = tensor.untyped_storage()._cdata
            self.tensors[storage] = tensor
            self.linears.setdefault(storage, {})[linear.matrix] = linear

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WRITTEN and not UNSEEN:
            with self:
                return WRITTEN[func](*args, **kwargs)
        form = FORMS.get(func)
        if form is None or UNSEEN:
            return func(*args, **kwargs)
        seen = []
        for use in form(self.knows, *args, **kwargs):
            if (linear := self.linear(use.weight)) is not None:
                self.before(linear, use)
                seen.append((linear, use))
        output = func(*args, **kwargs)
        return self.after(seen, output) if seen else output

    def knows(self, tensor: Any) -> bool:
        """Say whether a tensor is a view of a parameter that is watched."""
        return (
            isinstance(tensor, Tensor)
            and tensor.ndim > 1
            and tensor.untyped_storage()._cdata in self.tensors
        )

    def linear(self, weight: Tensor) -> Any:
        """Return the linear of a view, None where it is none."""
        storage = weight.untyped_storage()._cdata
        if storage not in self.tensors:  # a copy
            return None
        return self.linears[storage].get(Matrix.of(weight, self.tensors[storage]))

    def before(self, linear: Any, use: Use) -> None:
        """Act before a product."""

    def after(self, seen: list[tuple[Any, Use]], output: Tensor) -> Tensor:
        """Return the output of a product for the model's code."""
        return output


UNSEEN: list[None] = []  # an entry for each `unseen` that is under way


@contextmanager
def unseen() -> Iterator[None]:
    """Let nobody see the products for a time."""
    UNSEEN.append(None)
    try:
        yield
    finally:
        UNSEEN.pop()


def _linear(known: Known, input: Tensor, weight: Tensor, bias: Any = None) -> Iterator[Use]:
    if known(weight):
        yield Use(weight, input)


def _matmul(known: Known, a: Tensor, b: Tensor, **out: Any) -> Iterator[Use]:
    if known(b):
        yield from _right(a, b)
    elif known(a) and b.ndim == 1:
        yield Use(a, b[None], _as_row)
    elif known(a):  # yᵀ = bᵀaᵀ
        for use in _right(b.mT, a.mT):
            yield Use(use.weight, use.input, partial(_transposed, use.rows))


def _right(x: Tensor, w: Tensor) -> Iterator[Use]:
    """Yield the uses of x @ w for w `[in, out]`, or `[experts, in, out]`."""
    if w.ndim == 2:
        yield Use(w.mT, x) if x.ndim > 1 else Use(w.mT, x[None], _as_row)
    elif w.ndim == 3:
        for i, own in enumerate(w):  # x is of all experts, or of each
            many = x.ndim > 2 and x.shape[-3] == len(w)
            rows = x.select(-3, i if many else 0) if x.ndim > 2 else x
            yield Use(own.mT, rows, partial(torch.select, dim=-3, index=i))


def _as_row(y: Tensor) -> Tensor:
    return y[None]


def _transposed(rows: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    return rows(y.mT)


def _addmm(
    known: Known, input: Tensor, *matrices: Tensor, alpha: float = 1, **named: Any
) -> Iterator[Use]:
    """Yield the uses of input + alpha·ab; torch names a and b by the function."""
    named = {name: value for name, value in named.items() if name not in ("beta", "out")}
    if alpha == 1:
        yield from _matmul(known, *matrices, *named.values())


def _conv(
    known: Known,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Use]:
    """Yield the use of a kernel `[out, in, …]` as the matrix `[out, in·k]` of each group."""
    parts = _by_group(known, input, weight, groups, (stride, padding, dilation))
    for i, own, x, patches in parts:
        yield Use(own.flatten(1), x, partial(_features_last, i, groups), patches)


def _by_group(
    known: Known, input: Tensor, weight: Tensor, groups: int, form: tuple[Any, Any, Any]
) -> Iterator[tuple[int, Tensor, Tensor, Patches]]:
    """Yield each group of a convolution that is a product: number, kernel, input, patches.

    form: its stride, padding and dilation.
    """
    if known(weight) and input.ndim == weight.ndim and not depthwise(weight):
        patches = Patches.of(weight.shape[2:], *form)
        parts = zip(weight.chunk(groups), input.chunk(groups, dim=1), strict=True)
        yield from ((i, own, x, patches) for i, (own, x) in enumerate(parts))


def depthwise(kernel: Tensor) -> bool:
    """Say whether each output of a kernel has a single input, so that it is a matrix of none."""
    return kernel.ndim > 2 and kernel.shape[1] == 1


def _of_group(group: int, groups: int, y: Tensor) -> Tensor:
    size = y.shape[1] // groups
    return y.narrow(1, group * size, size)  # a view that can be written to, unlike a chunk


def _features_last(group: int, groups: int, y: Tensor) -> Tensor:
    return _of_group(group, groups, y).movedim(1, -1)


def _conv_transpose(
    known: Known,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Iterator[Use]:
    """Yield the use of a kernel `[in, out, …]` as the matrix `[out·k, in]` of each group.

    The output adds up what each input gives to a patch of it.
    """
    parts = _by_group(known, input, weight, groups, (stride, padding, dilation))
    for i, own, x, patches in parts:
        yield Use(own.flatten(1).mT, x.movedim(1, -1), partial(_patches_of, patches, i, groups))


def _patches_of(patches: Patches, group: int, groups: int, y: Tensor) -> Tensor:
    return patches(_of_group(group, groups, y))


def grouped(
    known: Known, input: Tensor, weight: Tensor, offs: Tensor | None = None, **rest: Any
) -> Iterator[Use]:
    """Yield the uses of a grouped product: rows up to `offs[i]` meet `weight[i] [in, out]`."""
    if not known(weight) or weight.ndim != 3 or input.ndim != 2 or offs is None:
        return
    if valueless(offs):  # as if all experts had as many
        ends = [(i + 1) * len(input) // len(weight) for i in range(len(weight))]
    else:
        ends = offs.tolist()
    for own, start, end in zip(weight, [0, *ends], ends, strict=False):
        if end > start:
            rows = partial(torch.narrow, dim=0, start=start, length=end - start)
            yield Use(own.mT, rows(input), rows)


def _einsum(known: Known, equation: str, *operands: Any) -> Iterator[Use]:
    if len(operands) == 1 and isinstance(operands[0], Sequence):
        operands = tuple(operands[0])
    sides, _, out = equation.replace(" ", "").partition("->")
    letters = sides.split(",")
    if len(operands) != 2 or "." in equation or not out or not any(map(known, operands)):
        return
    w, x = (0, 1) if known(operands[0]) else (1, 0)
    weight, ws, other, xs = operands[w], letters[w], operands[x], letters[x]
    many = [c for c in ws if c in xs and c in out]
    inputs = [c for c in ws if c in xs and c not in out]
    outputs = [c for c in ws if c in out and c not in xs]
    rest = [c for c in xs if c in out and c not in ws]
    if len(many + inputs + outputs) != len(ws) or len(many + inputs + rest) != len(xs):
        return  # a letter is summed alone, or stands twice
    weight = weight.permute([ws.index(c) for c in many + outputs + inputs])
    other = other.permute([xs.index(c) for c in many + rest + inputs])
    order, k = [out.index(c) for c in many + rest + outputs], len(many)
    for index in itertools.product(*[range(n) for n in weight.shape[:k]]):
        own = weight[index].reshape(weight.shape[k : k + len(outputs)].numel(), -1)
        yield Use(own, other[index].flatten(len(rest)), partial(_picked, order, index, len(rest)))


def _picked(order: list[int], index: tuple[int, ...], rest: int, y: Tensor) -> Tensor:
    return y.permute(order)[index].flatten(rest)


def _swapped(known: Known, b: Tensor, a: Tensor) -> Iterator[Use]:
    return _matmul(known, a, b)


# How a function of torch multiplies: its uses of matrices that are known, by its arguments.
FORMS: dict[Any, Form] = {F.linear: _linear, torch.einsum: _einsum}
FORMS |= dict.fromkeys(
    [torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__],
    _matmul,
)
FORMS[Tensor.__rmatmul__] = _swapped
FORMS |= dict.fromkeys([torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm], _addmm)
CONVOLUTIONS: dict[Any, Form] = dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], _conv)
for _transpose in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    CONVOLUTIONS[_transpose] = _conv_transpose
FORMS |= CONVOLUTIONS
for _name, _place in (("grouped_mm", F), ("_grouped_mm", torch)):
    if hasattr(_place, _name):
        FORMS[getattr(_place, _name)] = grouped

# Functions of torch that are written in Python, with the products that they are made of: the same
# code, which does not hand itself to a mode as a whole.
_attention = F.multi_head_attention_forward
WRITTEN: dict[Any, Callable[..., Any]] = {
    _attention: FunctionType(
        _attention.__code__, {**vars(F), "has_torch_function": lambda tensors: False}
    )
}
WRITTEN[_attention].__defaults__ = _attention.__defaults__
