"""Frames of datasets that do not fit a disk: unpacked piece by piece, as they are read, into a bounded cache.

A piece is a run of episodes of one dataset, small enough that many fit the cache. The pieces that were used
last stay open; one thread unpacks those that are asked for, or will be soon (`prepare`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from d4_datasets.bounded import BoundedCache, CacheFull
from d4_datasets.joined import Joined

_PIECE_BYTES = 256 << 20  # unpacked
_HEADER_BYTES = 256  # of an array in its file, at most
_LEAST_PIECES = 32  # of a list that has so many episodes: several ranks share it evenly
Arrays = dict[str, np.ndarray]


def cut(length: np.ndarray, file: np.ndarray, frame_bytes: int) -> np.ndarray:
    """Where pieces begin, as episodes: int64 [P + 1], the last is the number of episodes E.

    Args: length: int64 [E] frames. file: int64 [E], which dataset and video each episode lies in, ascending.
        frame_bytes: of one frame of all cameras.
    """
    most = max(1, min(_PIECE_BYTES // max(frame_bytes, 1), int(length.sum()) // _LEAST_PIECES))
    bounds, frames = [0], 0
    changes = np.diff(file, prepend=file[:1]) != 0
    for episode, count in enumerate(length.tolist()):
        if frames and (changes[episode] or frames + count > most):
            bounds.append(episode)
            frames = 0
        frames += count
    return np.array([*bounds, len(length)], np.int64)


class Pieces:
    """The frames of all cameras in P pieces, of which some are unpacked.

    Args:
        bounds: int64 [P + 1], frame at which each piece begins, and the number of frames.
        sizes: (height, width) by camera.
        keys: P names that change whenever the content does.
        unpack: fills a folder with <camera>.npy, uint8 [n, H, W, 3], of a piece.
        cache: where they are kept.
        budget: bytes that this process may have open, None for no limit.
    """

    def __init__(
        self,
        bounds: np.ndarray,
        sizes: dict[str, tuple[int, int]],
        keys: Sequence[str],
        unpack: Callable[[int, Path], None],
        cache: BoundedCache,
        budget: int | None,
    ) -> None:
        self.bounds, self.sizes, self.budget = bounds, sizes, budget
        self._keys, self._unpack, self._cache = keys, unpack, cache
        self._frame_bytes = sum(3 * height * width for height, width in sizes.values())
        self._open: OrderedDict[int, Arrays] = OrderedDict()
        self._jobs: dict[int, Future[Arrays]] = {}
        self._mutex = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "unpack")

    def __len__(self) -> int:
        return len(self._keys)

    def images(self) -> dict[str, Joined]:
        """By camera all frames as one array uint8 [N, H, W, 3], unpacked as they are read."""
        return {
            camera: Joined(self.bounds, partial(self._array, camera), (*size, 3), np.uint8)
            for camera, size in self.sizes.items()
        }

    def bytes_of(self, piece: int) -> int:
        """Size of a piece, unpacked."""
        frames = int(self.bounds[piece + 1] - self.bounds[piece])
        return frames * self._frame_bytes + _HEADER_BYTES * len(self.sizes)

    def fit(self) -> int | None:
        """How many pieces can be read at random at once, while another is unpacked; None: all."""
        sizes = list(map(self.bytes_of, range(len(self))))
        if self.budget is None or self.budget >= sum(sizes):
            return None
        largest = max(sizes)
        return max(1, self.budget // largest - 2)  # one in preparation, and the video that it comes from

    def prepare(self, piece: int) -> None:
        """Begin to unpack a piece if it is not there; it counts as used now, and others go first."""
        with self._mutex:
            if piece in self._open:
                self._open.move_to_end(piece)
            else:
                self._begin(piece)

    def close(self) -> None:
        """Release everything."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._open.clear()
        self._cache.close()

    def _array(self, camera: str, piece: int) -> np.ndarray:
        with self._mutex:
            arrays = self._open.get(piece)
            if arrays is not None:
                self._open.move_to_end(piece)
                return arrays[camera]
            job = self._begin(piece)
        return job.result()[camera]

    def _begin(self, piece: int) -> Future[Arrays]:
        """The job that unpacks a piece; to be called under the lock."""
        if piece not in self._jobs:
            self._jobs[piece] = self._pool.submit(self._load, piece)
        return self._jobs[piece]

    # -- in the thread --

    def _load(self, piece: int) -> Arrays:
        try:
            self._make_room(self.bytes_of(piece))
            arrays = self._map(self._hold(piece), piece)
            if arrays is None:  # cut off by a machine that went down
                self._cache.drop(self._keys[piece])
                arrays = self._map(self._hold(piece), piece)
                assert arrays is not None
            with self._mutex:
                self._open[piece] = arrays
            return arrays
        finally:
            with self._mutex:
                self._jobs.pop(piece, None)

    def _make_room(self, size: int) -> None:
        """Close what was used longest ago."""
        with self._mutex:
            total = size + sum(map(self.bytes_of, self._open))
            while self.budget is not None and total > self.budget and self._open:
                total -= self.bytes_of(self._close_oldest())

    def _close_oldest(self) -> int:
        oldest, _ = self._open.popitem(last=False)
        self._cache.release(self._keys[oldest])
        return oldest

    def _hold(self, piece: int) -> Path:
        """The folder of a piece, unpacked if it is not there."""
        while True:
            try:
                return self._cache.hold(self._keys[piece], self.bytes_of(piece), partial(self._unpack, piece))
            except CacheFull:  # other processes, or the video that it comes from, need room
                with self._mutex:
                    if not self._open:
                        raise
                    self._close_oldest()

    def _map(self, folder: Path, piece: int) -> Arrays | None:
        """The arrays of a piece; None if they are damaged."""
        frames = int(self.bounds[piece + 1] - self.bounds[piece])
        arrays = {}
        for camera, shape in self.sizes.items():
            try:
                array = np.load(folder / f"{camera}.npy", mmap_mode="r")
            except (OSError, ValueError):
                return None
            if array.shape != (frames, *shape, 3) or array.dtype != np.uint8:
                return None
            arrays[camera] = array.view(np.ndarray)
        return arrays
