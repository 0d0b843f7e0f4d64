"""Which episodes a process draws its windows from, step by step: its part of the data, and of that what is
unpacked.

A batch is a function of seed, phase, step and rank, drawn uniformly over the frames of the episodes that are
given here. Where all frames are unpacked these never change: the order is global, and goes on at any step.
Where they are not, the pieces of the rank come and go in an order that is shuffled anew in every round, as
many at a time as the cache holds; which ones are there at a step depends on the step alone.
"""

from __future__ import annotations

import heapq

import numpy as np

from d4_datasets.errors import UserError
from d4_datasets.windows import Windows


def owners(frames: np.ndarray, ranks: int) -> np.ndarray:
    """Which rank reads each piece, int64 [P]: all about equally many `frames` [P], spread over the data."""
    out = np.zeros(len(frames), np.int64)
    loads = [(0, rank) for rank in range(ranks)]
    # The largest first, so that what is left is small; equal ones in no order.
    shuffled = np.random.default_rng(ranks).permutation(len(frames))
    for piece in shuffled[np.argsort(-frames[shuffled], kind="stable")]:
        load, rank = heapq.heappop(loads)
        out[piece] = rank
        heapq.heappush(loads, (load + int(frames[piece]), rank))
    return out


class Course:
    """Episodes by step.

    Args:
        windows: the data.
        episodes: ids that may be drawn from, of all ranks.
        seed: decides the order of the pieces.
        rank, ranks: of the process; each draws from its own part, and if any had none, each from all.
        frames_per_step: what the process draws in a step; a piece is left when about as many frames have
            been drawn as it holds.

    Attributes:
        part: this rank's episodes.
        at_once: how many pieces are drawn from at a time, None: all.

    Raises:
        UserError: the cache is too small to draw from one piece while the next is unpacked.
    """

    def __init__(
        self,
        windows: Windows,
        episodes: np.ndarray,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        frames_per_step: int = 1,
    ) -> None:
        self.windows, self.seed, self.rank, self.frames_per_step = windows, seed, rank, frames_per_step
        self.part = np.asarray(episodes, np.int64)
        self.at_once: int | None = None
        self._cache: tuple[int, np.ndarray] = (-1, self.part)
        if windows.piece_bounds is None:
            return
        bounds = windows.piece_bounds
        piece = np.searchsorted(bounds, self.part, side="right") - 1
        weight = np.bincount(piece, windows.episode_length[self.part], len(bounds) - 1)
        if ranks > 1:
            owner = owners(np.add.reduceat(windows.episode_length, bounds[:-1]), ranks)
            if len(np.unique(owner[weight > 0])) == ranks:
                mine = owner[piece] == rank
                self.part, piece = self.part[mine], piece[mine]
                weight = np.where(owner == rank, weight, 0)
        self._episodes = {int(p): self.part[piece == p] for p in np.flatnonzero(weight)}
        self._weight = weight
        self._choose()

    def _choose(self) -> None:
        """Decide whether pieces have to come and go."""
        pieces = self.windows.pieces
        fit = None if pieces is None else pieces.fit()
        if pieces is None or fit is None or fit >= len(self._episodes):
            return
        assert pieces.budget is not None
        largest = max(map(pieces.bytes_of, self._episodes))
        if pieces.budget < 2 * largest:
            raise UserError(
                f"a piece of the dataset takes {largest / 1e9:.2f} GB unpacked, and drawing from one while "
                f"the next is made needs twice that; {pieces.budget / 1e9:.2f} GB are allowed for this "
                "process: give it more with --cache-gb"
            )
        self.at_once = fit

    def __call__(self, step: int) -> np.ndarray:
        """The ids to draw from at a step; begins to unpack what comes next."""
        if self.at_once is None:
            return self.part
        place = self._place(step * self.frames_per_step)
        if self._cache[0] != place:
            following = self._following(place, self.at_once + 1)
            now, after = following[: self.at_once], following[self.at_once :]
            assert self.windows.pieces is not None
            for piece in (*now, *after):
                self.windows.pieces.prepare(piece)
            self._cache = (place, np.sort(np.concatenate([self._episodes[p] for p in now])))
        return self._cache[1]

    def _place(self, frames: int) -> int:
        """How many pieces have been left for good once so many frames have been drawn."""
        order = len(self._episodes)
        round_, rest = divmod(frames, int(self._weight.sum()))
        ends = np.cumsum(self._weight[self._order(round_)])
        return round_ * order + int(np.searchsorted(ends, rest, side="right"))

    def _following(self, place: int, count: int) -> list[int]:
        """The pieces from a place on, `count` different ones."""
        found: dict[int, None] = {}
        size = len(self._episodes)
        while len(found) < count:
            found[int(self._order(place // size)[place % size])] = None
            place += 1
        return list(found)

    def _order(self, round_: int) -> np.ndarray:
        """The pieces of this rank in the order of a round."""
        mine = np.array(sorted(self._episodes), np.int64)
        return np.random.default_rng([self.seed, self.rank, round_]).permutation(mine)
