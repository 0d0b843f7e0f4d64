"""Training windows out of a dataset, or several, at memory speed.

A dataset keeps its frames as lossless video and its labels as Parquet: small, and readable by LeRobot. A
trainer needs random windows of it thousands of times a second, which no video decoder gives. So the first
use unpacks it into plain `.npy` files (`frame_cache`: one dataset as a whole; `shards`: several, or what lies
elsewhere or is too large for the disk); from then on every batch is a gather from memory maps, and the memory
of the process does not grow with the dataset.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import latents, places, shards
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.frame_cache import cache_bytes
from d4_datasets.joined import Frames, gather
from d4_datasets.places import Place
from d4_datasets.source import NoFrames

__all__ = ["NoFrames", "Windows", "cache_bytes"]


class Windows:
    """All frames of a dataset, or of several behind each other, as arrays over a global frame index, and the
    windows cut from them.

    N frames, E episodes, A action dimensions, K tasks (at least 1). Arrays are memory maps opened read-only.

    Attributes:
        contract: the contract the data were made with.
        num_frames: N.
        episode_start, episode_length: int64 [E], global index of the first frame, and number of frames.
        labelled: bool [E], True where any frame of the episode has a known action.
        sources: E names of the recordings that the episodes come from.
        episode_index: int64 [N].
        images: per camera uint8 [N, H, W, 3], RGB; empty if latents stand for them.
        latents: float16 [N, tokens, channels] of the robot's one camera, None if there are pictures.
        origin: whose latents they are.
        action: float32 [N, A], in the units of the contract, zeros where unknown.
        action_mask: bool [N], True where the action is known.
        reward: float32 [N, K], arrived with the frame.
        is_terminal: bool [N].
        task_index: int64 [N].
        vectors: per vector observation float32 [N, k].
        nonfinite: {(column, episode): number of frames}, empty unless opened with `strict=False`.
        roots: folders with the metadata of each dataset; shown: what people call them.
        cache: the folder that holds what was unpacked; limit: what that may take.
        digest: of all that the datasets hold, in hex.
        piece_bounds: int64 [P + 1], where pieces begin, as episodes: several datasets, or one that is not
            whole on this disk, are shared out among processes by them. None: one that is.
        pieces: the frames where they are unpacked piece by piece, None where all are.

    Raises:
        UserError: there is no dataset, no frames in it, frames missing from a video, NaN in a column, or the
            datasets are not of one robot.
    """

    def __init__(
        self,
        where: Place | Sequence[Place],
        cache: Path | None = None,
        *,
        strict: bool = True,
        limit: int | None = None,
        readers: int = 1,
    ) -> None:
        """Open a dataset or several (`places`), unpacking what is missing or outdated.

        Args:
            where: folders, URLs, or text files that list such.
            cache: where to unpack to; default: <dataset>/cache for what lies on this disk, else the user's
                cache folder.
            strict: refuse NaN and infinities; otherwise they are counted in `nonfinite`, because the audit
                looks at faulty data too.
            limit: bytes that unpacked frames and fetched videos may take; None: no limit.
            readers: processes on this machine that open the same, and share the limit.
        """
        found = places.expand(where)
        if len(found) == 1 and limit is None and not places.is_url(found[0]):
            store = shards.whole(Path(found[0]), cache)
        else:
            store = shards.joined(found, cache, limit, readers)
        self.nonfinite = store.nonfinite
        if strict:
            _refuse_nonfinite(self.nonfinite)
        self.contract: Contract = store.contract
        self.limit = limit
        self.roots, self.shown, self.digest = store.roots, store.shown, store.digest
        self.sources, self.cache = store.sources, store.cache
        self.piece_bounds, self.pieces = store.piece_bounds, store.pieces
        self.episode_length = store.episode_length
        self.episode_start = np.cumsum(self.episode_length) - self.episode_length
        self.num_frames = int(self.episode_length.sum())
        self.images: Mapping[str, Frames] = store.images
        columns, self.origin = store.columns, store.origin
        self.latents: np.ndarray | None = None
        if self.origin is not None:
            flat = columns[latents.column(store.contract.images[0].name)]
            self.latents = flat.reshape(-1, self.origin.tokens, self.origin.channels)
        self.action, self.reward = columns["action"], columns["reward"]
        self.action_mask, self.is_terminal = columns["action_mask"], columns["is_terminal"]
        self.task_index, self.episode_index = columns["task_index"], columns["episode_index"]
        self.vectors: dict[str, np.ndarray] = {
            vector.name: columns[f"observation.{vector.name}"] for vector in store.contract.vectors()
        }
        self.labelled = np.logical_or.reduceat(self.action_mask, self.episode_start)
        # Base-class views: indexing an np.memmap pays for subclass machinery on every gather.
        self._images = {
            name: array.view(np.ndarray) if isinstance(array, np.ndarray) else array
            for name, array in self.images.items()
        }
        self._columns = {name: array.view(np.ndarray) for name, array in columns.items()}

    @property
    def root(self) -> Path:
        """The first of `roots`."""
        return self.roots[0]

    @cached_property
    def provenance(self) -> list[dict[str, Any]]:
        """What meta/d4.json says of each of the E episodes; read when it is asked for."""
        out: list[dict[str, Any]] = []
        for meta in self.metadata:
            out += meta.get("episodes", [])
        return out

    @cached_property
    def metadata(self) -> list[dict[str, Any]]:
        """The meta/d4.json of each dataset, with `fps` of info.json."""
        out = []
        for root in self.roots:
            meta = json.loads((root / "meta" / "d4.json").read_text())
            out.append(meta | {"fps": float(json.loads((root / "meta" / "info.json").read_text())["fps"])})
        return out

    def close(self) -> None:
        """Let go of unpacked pieces, so that others may take their room."""
        if self.pieces is not None:
            self.pieces.close()

    def split(self, holdout: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Split the episodes into (train, holdout) ids, int64 and sorted, always the same for the same seed.

        Neighbours in a recording look alike: where there are enough recordings, whole ones are held out, so
        that none stands on both sides, else whole drives where there are enough of these. Labelled and
        unlabelled ones are split apart, so that both kinds do. A kind with one episode only stays in train;
        of two or more, at least one is held out (unless `holdout` is 0).
        """
        if not 0.0 <= holdout < 1.0:
            raise UserError(f"holdout is {holdout}; it is a share of the episodes, at least 0 and below 1")
        rng, unit = np.random.default_rng(seed), self._units(holdout)
        labelled = np.bincount(unit, self.labelled) > 0
        held = np.zeros(len(labelled), bool)
        for kind in (True, False):
            units = rng.permutation(np.flatnonzero(labelled == kind))
            if holdout > 0 and len(units) > 1:
                held[units[: min(max(1, round(holdout * len(units))), len(units) - 1)]] = True
        return np.flatnonzero(~held[unit]), np.flatnonzero(held[unit])

    def _units(self, holdout: float) -> np.ndarray:
        """int64 [E]: number of an episode's recording, if a share of the recordings of each kind is one or
        more; else that of its drive, if the same holds for these; else its own."""
        recording = np.unique(self.sources, return_inverse=True)[1].reshape(-1)
        if self._enough(recording, holdout):
            return recording
        return self.drives if self._enough(self.drives, holdout) else np.arange(len(recording))

    @cached_property
    def drives(self) -> np.ndarray:
        """int64 [E]: number of the drive that an episode is a piece of, since recordings are cut where they
        must be; its own in datasets that do not know."""
        number = [about.get("drive") for about in self.provenance]
        if len(number) != len(self.sources) or None in number:
            return np.arange(len(self.sources))
        recording = np.unique(self.sources, return_inverse=True)[1].reshape(-1)
        pair = np.stack([recording, np.array(number, np.int64)])
        return np.unique(pair, axis=1, return_inverse=True)[1].reshape(-1)

    def _enough(self, unit: np.ndarray, holdout: float) -> bool:
        labelled = np.bincount(unit, self.labelled) > 0
        counts = [(labelled == kind).sum() for kind in (True, False)]
        return all(not count or count * holdout >= 1 for count in counts)

    def of(self, recordings: str) -> np.ndarray:
        """Which episodes come from recordings whose name fits a pattern of the shell, bool [E]."""
        return np.array([fnmatch.fnmatchcase(name, recordings) for name in self.sources])

    def keep_labels(self, episodes: np.ndarray, share: float, recordings: str = "*", seed: int = 0) -> None:
        """Forget the commands of all but `share` of the labelled ones among `episodes` (ids).

        For measuring what labels are worth: a smaller share keeps a part of what a larger one keeps. Other
        episodes are untouched, so that held-out ones can still be measured on. Of `episodes` that come from
        other recordings than those that fit the pattern, none is kept.
        """
        is_kept = self.labelled & self.of(recordings)
        order = np.random.default_rng([seed, 1]).permutation(episodes[is_kept[episodes]])
        hidden = np.zeros(len(self.labelled), bool)
        hidden[episodes] = self.labelled[episodes]
        hidden[order[: round(share * len(order))]] = False
        if hidden.any():
            self.labelled = self.labelled & ~hidden
            self.action_mask = self.action_mask & ~np.repeat(hidden, self.episode_length)
            self._columns["action_mask"] = self.action_mask

    def sample_starts(
        self, rng: np.random.Generator, batch: int, length: int, episodes: np.ndarray
    ) -> np.ndarray:
        """Draw global start indices int64 [batch] of windows of `length` frames within `episodes` (ids).

        A frame is drawn uniformly over all frames of the episodes and put at a uniform place in its window;
        the window is then shifted into the episode. So long episodes count by their frames, and both the
        first and the last frames of an episode (where its task begins and where its reward falls) are seen
        about half as often as the rest, instead of almost never. Episodes shorter than `length` start at
        their first frame.
        """
        episodes = np.asarray(episodes, np.int64)
        if episodes.size == 0:
            raise UserError("no episodes to draw windows from; the dataset or its split is empty")
        ends = np.cumsum(self.episode_length[episodes])
        frame = rng.integers(0, ends[-1], batch)
        which = np.searchsorted(ends, frame, side="right")
        size = self.episode_length[episodes[which]]
        offset = frame - (ends[which] - size) - rng.integers(0, length, batch)
        return self.episode_start[episodes[which]] + np.clip(offset, 0, np.maximum(size - length, 0))

    def indices(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Expand starts [B] to (idx int64 [B, length], valid bool [B, length]).

        Past the end of the episode the last frame is repeated and `valid` is False: no window crosses a
        boundary.
        """
        starts = np.asarray(starts, np.int64)
        episode = np.searchsorted(self.episode_start, starts, side="right") - 1
        last = (self.episode_start[episode] + self.episode_length[episode] - 1)[:, None]
        idx = starts[:, None] + np.arange(length)
        return np.minimum(idx, last), idx <= last

    def batch(
        self, idx: np.ndarray, valid: np.ndarray, out: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Gather the frames `idx` [B, T] into arrays [B, T, ...]: fresh ones, or those of the same name in
        `out` (image.<camera>, latents), which may be pinned memory that is used again and again.

        Keys: image.<camera> uint8 [B, T, H, W, 3] or latents float16 [B, T, tokens, channels]; action,
        action_mask, reward, is_terminal, is_first, task_index, valid, vector.<name>. Where `valid` is False
        nothing is known and nothing is paid: masks and flags are False, action and reward are zero, and only
        what was seen (images, vectors, task) repeats.
        """
        columns, given = self._columns, out or {}
        bulk: dict[str, Frames] = {f"image.{name}": array for name, array in self._images.items()}
        if self.latents is not None:
            bulk["latents"] = self.latents.view(np.ndarray)
        out = {}
        for name, array in bulk.items():
            place = given[name] if name in given else np.empty((*idx.shape, *array.shape[1:]), array.dtype)
            out[name] = gather(array, idx, place)
        out |= {f"vector.{name}": columns[f"observation.{name}"][idx] for name in self.vectors}
        first = self.episode_start[columns["episode_index"][idx]] == idx
        out["action"] = columns["action"][idx] * valid[..., None]
        out["action_mask"] = columns["action_mask"][idx] & valid
        out["reward"] = columns["reward"][idx] * valid[..., None]
        out["is_terminal"] = columns["is_terminal"][idx] & valid
        out["is_first"] = first & valid
        out["task_index"] = columns["task_index"][idx]
        out["valid"] = np.array(valid, bool)
        return out


def _refuse_nonfinite(nonfinite: dict[tuple[str, int], int]) -> None:
    if nonfinite:
        (column, episode), count = next(iter(nonfinite.items()))
        raise UserError(
            f"column {column!r} has NaN or infinite values in {count} frames of episode {episode}; "
            "remove or repair the recording it came from (d4-audit lists all) and ingest again"
        )
