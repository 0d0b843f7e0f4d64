"""Arrays one behind the other, read as one: the frames of many files under one index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np


class Joined:
    """Parts [n_k, ...] behind each other as one array [N, ...], opened when something of them is read.

    Reads what a NumPy array reads by one index (a number, a slice, or integers of any shape) and copies once.

    Args: bounds: int64 [P + 1], row at which each part begins, and N. part: gives part k. shape: of a row.
    """

    def __init__(
        self, bounds: np.ndarray, part: Callable[[int], np.ndarray], shape: tuple[int, ...], dtype: Any
    ) -> None:
        self.bounds, self.part = np.asarray(bounds, np.int64), part
        self.shape, self.dtype = (int(bounds[-1]), *shape), np.dtype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        index = np.asarray(index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        out = np.empty((*index.shape, *self.shape[1:]), self.dtype)
        self.read(index, out)
        return out

    def read(self, index: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows `index` into `out` [*index.shape, ...], which must be contiguous.

        Runs of rows that follow each other are copied at once, part by part.
        """
        flat = index.reshape(-1)
        flat = np.where(flat < 0, flat + len(self), flat)
        if flat.size and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"frame {flat.max()} of {len(self)}")
        part = np.searchsorted(self.bounds, flat, side="right") - 1
        breaks = np.flatnonzero((np.diff(flat) != 1) | (np.diff(part) != 0)) + 1
        begins, ends = np.append(0, breaks), np.append(breaks, flat.size)
        rows = out.reshape(flat.size, *self.shape[1:])
        # Part by part: one that had to make room for another is not opened again.
        for run in np.argsort(part[begins], kind="stable") if flat.size else ():
            begin, end = begins[run], ends[run]
            k = int(part[begin])
            first = flat[begin] - self.bounds[k]
            rows[begin:end] = self.part(k)[first : first + end - begin]


Frames: TypeAlias = np.ndarray | Joined


def gather(source: Frames, index: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Copy the rows `index` of an array into `out` [*index.shape, ...], once; returns `out`."""
    if isinstance(source, Joined):
        source.read(index, out)
        return out
    if index.size and not 0 <= index.min() <= index.max() < len(source):
        raise IndexError(f"frame {index.max()} of {len(source)}")
    # without `mode` NumPy would go through another copy of the result
    return np.take(source, index, axis=0, out=out, mode="clip")
