"""Latents of every frame, made once by a frozen tokenizer and read by all later phases.

    <run>/latents/latents-<tag>.npy             float16 [N, tokens, channels], standardised
    <run>/latents/latents-<tag>/<piece>.npy     the same in pieces, for data that are not whole on this disk
    <run>/latents/latents-<tag>.json            what they are of: hash of the tokenizer, hash of the data,
                                                statistics

The note is written before the latents and each file of these is written aside and renamed, so what is there
and fits the note is whole. Latents of another tokenizer or other data are made again; what they replace is
removed. In pieces, work that was interrupted goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d4_core import distributed
from d4_core.data import Logs, chunk_frames, encode_episodes
from d4_core.tokenizer import Tokenizer
from d4_datasets import whole
from d4_datasets.course import owners
from d4_datasets.errors import UserError
from d4_datasets.joined import Frames, Joined

FORMAT = 1
_TELL_S = 10.0


def latent_cache(
    tokenizer: Tokenizer,
    logs: Logs,
    path: Path,
    tag: str,
    data: str = "",
    statistics: Callable[[], None] | None = None,
) -> Frames:
    """Packed, standardised tokens (N, Nz, Dz) float16 of every frame, computed once per tokenizer and data.

    All ranks share the work and have the same statistics afterwards.

    Args:
        path: folder of the files. tag: hash of the tokenizer. data: hash of the data.
        statistics: sets those of the tokenizer's latents; called if the cache does not know them.

    Raises:
        UserError: the disk is full.
    """
    files = _Files(path, tag, data, logs, tokenizer)
    is_there = files.note() is not None and not files.missing()
    if not distributed.all_agree(is_there, tokenizer.latents.device):
        _make(files, tokenizer, logs, statistics)
    note = files.note()
    assert note is not None
    for name in ("mean", "std"):
        target = getattr(tokenizer, f"latent_{name}")
        target.copy_(torch.tensor(note[name], dtype=torch.float32).view_as(target))
    return files.open()


def _make(files: _Files, tokenizer: Tokenizer, logs: Logs, statistics: Callable[[], None] | None) -> None:
    """Write what is missing."""
    known = files.note()
    if not distributed.all_agree(known is not None, tokenizer.latents.device):
        if statistics is not None:
            statistics()
        distributed.broadcast([tokenizer.latent_mean, tokenizer.latent_std])
        if distributed.rank() == 0:
            files.begin(tokenizer, logs)
    distributed.barrier()
    if files.bounds is None:
        _make_one(files, tokenizer, logs)
    else:
        _make_pieces(files, tokenizer, logs)
    distributed.barrier()
    if distributed.rank() == 0:
        files.tidy()
    distributed.barrier()


# ---- files


class _Files:
    """Where the latents of a tokenizer and a dataset are, and whether they are."""

    def __init__(self, folder: Path, tag: str, data: str, logs: Logs, tokenizer: Tokenizer) -> None:
        self.folder, self.tag = folder, tag
        self.row = (tokenizer.cfg.num_tokens, tokenizer.cfg.token_dim)
        self.about: dict[str, Any] = {
            "format": FORMAT, "weights": tag, "data": data, "frames": logs.num_frames, "row": list(self.row),
        }  # fmt: skip
        pieces: np.ndarray | None = getattr(logs, "piece_bounds", None)
        self.bounds: np.ndarray | None = None  # frames at which the files begin, and their number
        if pieces is not None:
            self.bounds = np.append(logs.episode_start, logs.num_frames)[pieces]
            self.about["pieces"] = hashlib.sha256(self.bounds.tobytes()).hexdigest()[:16]

    @property
    def note_path(self) -> Path:
        return self.folder / f"latents-{self.tag}.json"

    def path(self, piece: int) -> Path:
        """File of a piece; the only one is number 0."""
        if self.bounds is None:
            return self.folder / f"latents-{self.tag}.npy"
        return self.folder / f"latents-{self.tag}" / f"{piece:06d}.npy"

    def shape(self, piece: int) -> tuple[int, ...]:
        """Of the array in a file."""
        if self.bounds is None:
            return (int(self.about["frames"]), *self.row)
        return (int(self.bounds[piece + 1] - self.bounds[piece]), *self.row)

    def note(self) -> dict[str, Any] | None:
        """What the note says, None if there is none or it is of something else."""
        try:
            found: dict[str, Any] = json.loads(self.note_path.read_text())
        except (OSError, ValueError):
            return None
        return found if {key: found.get(key) for key in self.about} == self.about else None

    def missing(self) -> list[int]:
        """The files that are not there, or not whole."""
        return [piece for piece in range(self.count) if not self._is_whole(piece)]

    @property
    def count(self) -> int:
        return 1 if self.bounds is None else len(self.bounds) - 1

    def _is_whole(self, piece: int) -> bool:
        try:
            found = np.load(self.path(piece), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return found.shape == self.shape(piece) and found.dtype == np.float16

    def begin(self, tokenizer: Tokenizer, logs: Logs) -> None:
        """Note what will be written. Latents of other data are removed first; those without a note, as they
        were once left, only if they are wrong.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        there = self.path(0) if self.bounds is None else self.path(0).parent
        if there.exists() and (self.note_path.exists() or not self._is_right(tokenizer, logs)):
            print(f"{there} holds latents of other data: they are made again", flush=True)
            _remove(there)
        note = self.about | {
            "mean": tokenizer.latent_mean.flatten().tolist(),
            "std": tokenizer.latent_std.flatten().tolist(),
        }
        whole.write(self.note_path, json.dumps(note))

    def _is_right(self, tokenizer: Tokenizer, logs: Logs) -> bool:
        """Whether latents are those of the data, by a few episodes."""
        if self.bounds is not None or not self._is_whole(0):
            return False
        held = np.load(self.path(0), mmap_mode="r")
        for episode in {0, len(logs.episode_start) // 2, len(logs.episode_start) - 1}:
            (z,) = encode_episodes(tokenizer, logs, np.array([episode]))
            start = int(logs.episode_start[episode])
            made = tokenizer.pack(z).float().cpu().numpy()
            if not np.allclose(held[start : start + len(made)], made, rtol=0.01, atol=0.01):
                return False
        return True

    def tidy(self) -> None:
        """Remove latents of other tokenizers, and what was left half-written."""
        keep = {self.note_path.name, self.path(0).name, self.path(0).parent.name}
        for entry in [*self.folder.glob("latents-*"), *self.folder.rglob(".tmp-*")]:
            if entry.name not in keep:
                _remove(entry)

    def open(self) -> Frames:
        """All latents as one array."""
        if self.bounds is None:
            array: np.ndarray = np.load(self.path(0), mmap_mode="r")
            return array
        known: dict[int, np.ndarray] = {}

        def part(piece: int) -> np.ndarray:
            if piece not in known:
                known[piece] = np.load(self.path(piece), mmap_mode="r").view(np.ndarray)
            return known[piece]

        return Joined(self.bounds, part, self.row, np.float16)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---- encoding


def _make_one(files: _Files, tokenizer: Tokenizer, logs: Logs) -> None:
    """All frames in one file, which the ranks fill together."""
    file = files.path(0)
    if distributed.all_agree(not files.missing(), tokenizer.latents.device):
        return
    aside = file.with_name(f".tmp-{file.name}")
    if distributed.rank() == 0:
        _allocate(aside, files.shape(0))
    distributed.barrier()
    out = np.load(aside, mmap_mode="r+")
    order = np.argsort(logs.episode_length, kind="stable")[distributed.rank() :: distributed.world_size()]
    _fill(out, tokenizer, logs, order)
    out.flush()
    distributed.barrier()
    if distributed.rank() == 0:
        os.replace(aside, file)
    distributed.barrier()


def _allocate(path: Path, shape: tuple[int, ...]) -> None:
    """An empty float16 array with its blocks reserved: on a full disk, a sparse one would die by signal.

    Raises:
        UserError: the disk is full.
    """
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    size = path.stat().st_size
    del out
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink()
        raise _disk_full(path.parent, size) from error


def _disk_full(folder: Path, size: int) -> UserError:
    return UserError(f"disk full: {folder} needs {size / 2**20:.0f} MB more for the latents")


def _fill(
    out: np.ndarray, tokenizer: Tokenizer, logs: Logs, order: np.ndarray, longest: int = 0, first: int = 0
) -> None:
    """Encode episodes, in groups of similar length, into `out`, whose row 0 is frame `first`."""
    longest = longest or int(logs.episode_length.max())
    group_size = max(1, chunk_frames(tokenizer) // longest)
    for group in np.array_split(order, max(1, math.ceil(len(order) / group_size))):
        if not len(group):  # more ranks than episodes
            continue
        for episode, z in zip(group, encode_episodes(tokenizer, logs, group), strict=True):
            start = logs.episode_start[episode] - first
            out[start : start + len(z)] = tokenizer.pack(z).half().cpu().numpy()


def _make_pieces(files: _Files, tokenizer: Tokenizer, logs: Logs) -> None:
    """Each rank encodes the pieces that it reads, one file after the other."""
    assert files.bounds is not None
    missing = files.missing()
    distributed.barrier()  # all have looked before one writes
    if distributed.rank() == 0:
        files.path(0).parent.mkdir(exist_ok=True)
        need = sum(2 * math.prod(files.shape(piece)) for piece in missing)
        if need > shutil.disk_usage(files.folder).free:
            raise _disk_full(files.folder, need)
    distributed.barrier()
    owner = owners(np.diff(files.bounds), distributed.world_size())
    mine = [piece for piece in missing if owner[piece] == distributed.rank()]
    unpacked, told = getattr(logs, "pieces", None), time.monotonic()
    for number, piece in enumerate(mine):
        if unpacked is not None:  # the next one while this one is encoded
            for soon in mine[number : number + 2]:
                unpacked.prepare(soon)
        _make_piece(files, tokenizer, logs, piece)
        if distributed.rank() == 0 and time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            print(f"latents: {number + 1} of {len(mine)} parts encoded", flush=True)


def _make_piece(files: _Files, tokenizer: Tokenizer, logs: Logs, piece: int) -> None:
    """Encode the episodes of a piece and write its file."""
    bounds: np.ndarray = logs.piece_bounds  # type: ignore[attr-defined]
    episodes = np.arange(bounds[piece], bounds[piece + 1])
    length = logs.episode_length[episodes]
    out = np.zeros(files.shape(piece), np.float16)
    order = episodes[np.argsort(length, kind="stable")]
    _fill(out, tokenizer, logs, order, int(length.max()), int(logs.episode_start[episodes[0]]))
    file = files.path(piece)
    try:
        with whole.aside(file) as new:
            np.save(new, out)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _disk_full(file.parent, out.nbytes) from error
