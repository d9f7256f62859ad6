"""Data of the user: arrays of `.npz` and `.safetensors`, tables of `.parquet`, as they lie."""

import bisect
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gblm.base import GblmError, nearest

NONE = "none"  # the source of methods that look at weights alone


def check_there(path: Path, where: str, way: str, names: Collection[str] = ()) -> None:
    """Raise `GblmError` where a path is not there, with the nearest of its neighbours and names."""
    if path.exists():
        return
    near = {name: name for name in names} if path.parent == Path() else {}
    near |= {file.name: str(file) for file in path.parent.glob("*")}
    hint = nearest(path.name, near, form=near.__getitem__)
    raise GblmError(f"{where}: no such file or source; {hint}{way}")


def read_arrays(path: Path, names: Sequence[str], where: str) -> list[Tensor]:
    """Return the arrays of these names in a `.npz` or `.safetensors` file.

    Raises `GblmError`, which says where, for a missing one.
    """
    npz = path.suffix.lower() == ".npz"
    with np.load(path, allow_pickle=False) if npz else safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        if missing := [name for name in names if name not in keys]:
            raise GblmError(f"{where} has no `{missing[0]}`, only {', '.join(keys)}; rename one")
        if not npz:
            return [file.get_tensor(name) for name in names]
        arrays = [file[name] for name in names]
        native = [array.astype(array.dtype.newbyteorder("="), copy=False) for array in arrays]
        return [torch.from_numpy(array) for array in native]


def dtype_and_shape(tensor: Tensor) -> str:
    """Return the dtype and the shape of a tensor, such as "float32 [2, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class Rows:
    """The rows of parquet files, without a copy in a cache.

    `rows[3]` is a row by column, `rows["label"]` a whole column, `schema` says what they hold.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        from pyarrow import dataset

        table = dataset.dataset(files, format="parquet")
        self.schema = table.schema
        self.groups = [g for file in table.get_fragments() for g in file.split_by_row_group()]
        self.stops = list(accumulate(group.row_groups[0].num_rows for group in self.groups))

    def __len__(self) -> int:
        return self.stops[-1] if self.stops else 0

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            tables = (group.to_table(columns=[key]) for group in self.groups)
            return [cell for table in tables for cell in table[key].to_pylist()]
        number = bisect.bisect_right(self.stops, key)
        start = self.stops[number - 1] if number else 0
        return _table(self.groups[number]).slice(key - start, 1).to_pylist()[0]


@lru_cache(maxsize=1)  # rows are mostly asked for one after the other
def _table(group: Any) -> Any:
    return group.to_table()
