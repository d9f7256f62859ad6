"""Rows of parquet files, read where they lie: `datasets` would first copy them into its cache."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet

if TYPE_CHECKING:
    import datasets


class Rows:
    """The rows of some parquet files as one table, read by row groups.

    `rows[3]` is a row by column, `rows["label"]` a whole column; `features` are the kinds of the
    columns, by the notes of `datasets` where the files hold any.
    """

    features: datasets.Features

    def __init__(self, files: Sequence[Path]) -> None:
        import datasets

        self.groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        for path in files:
            with pyarrow.parquet.ParquetFile(path) as file:
                numbers = range(file.num_row_groups)
                self.groups += [(path, number) for number in numbers]
                sizes += [file.metadata.row_group(number).num_rows for number in numbers]
        self.stops = list(itertools.accumulate(sizes))
        self.features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(files[0]))

    def __len__(self) -> int:
        return self.stops[-1] if self.stops else 0

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return [value for group in self.groups for value in _read(*group, key)[key].to_pylist()]
        group = bisect.bisect_right(self.stops, key)
        last = self.stops[group - 1] if group else 0
        return _held(*self.groups[group]).slice(key - last, 1).to_pylist()[0]


def _read(path: Path, number: int, *columns: str) -> pyarrow.Table:
    with pyarrow.parquet.ParquetFile(path) as file:  # of its own: processes share no place in it
        return file.read_row_group(number, columns=list(columns) or None)


_held = functools.lru_cache(maxsize=1)(_read)  # rows are mostly asked for one after the other
