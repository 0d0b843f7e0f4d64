"""Streams of the MineRL data set (v0.4): folders with `recording.mp4`, `rendered.npz` and `metadata.json`.

N actions and rewards belong to N + 1 frames, the last ones of the video: what comes before them was recorded
while the game loaded. The reward of action k arrives with frame k + 1. The camera is (pitch, yaw) in degrees
with the signs of the environments, unlike the files that streams were made from, where both are negated.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import minecraft, stepwise
from d4_datasets.contract import Action, Contract
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Episode
from d4_datasets.packed import read_json
from d4_datasets.stepwise import Steps

KIND = "minerl"

_VIDEO, _ARRAYS, _META = "recording.mp4", "rendered.npz", "metadata.json"
_OFFERS = (
    minecraft.POV, minecraft.POV_LINEAR, minecraft.KEYS_TOPIC, minecraft.CAMERA_TOPIC,
    minecraft.ABSTRACT_TOPIC, minecraft.TASK, minecraft.EVENT, minecraft.REWARD,
)  # fmt: skip
# What zipfile, the decompressors and NumPy raise for damaged bytes; for a version that zipfile does not know,
# or a password, a RuntimeError.
_DAMAGE = (
    OSError, ValueError, EOFError, MemoryError, RuntimeError, struct.error, lzma.LZMAError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
_LARGEST_ARRAY = 2**28  # bytes; an hour at 20 Hz is far below
_INVENTORY = "observation$inventory$"
_TOOLS = ("wooden_axe", "wooden_pickaxe", "stone_axe", "stone_pickaxe", "iron_axe", "iron_pickaxe")
# What streams do in one action where a player opens a window and clicks.
ABSTRACT: dict[str, tuple[str, ...]] = {
    "place": ("none", "dirt", "stone", "cobblestone", "crafting_table", "furnace", "torch", "other"),
    "equip": ("none", "air", *_TOOLS, "other"),
    "craft": ("none", "torch", "stick", "planks", "crafting_table", "other"),
    "nearbyCraft": ("none", *_TOOLS, "furnace", "other"),
    "nearbySmelt": ("none", "iron_ingot", "coal", "other"),
}


class _Arrays(Mapping[str, np.ndarray]):
    """The arrays of an .npz file, read when asked for; none with Python objects in it.

    Raises:
        UserError: the file or an array of it is damaged, too large, or pickled.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as file:
            self._sizes = {info.filename.removesuffix(".npy"): info.file_size for info in file.zip.infolist()}

    def _opened(self) -> Any:
        try:
            with self.path.open("rb") as file:  # a path alone hides why it cannot be opened
                is_archive = zipfile.is_zipfile(file)
            if not is_archive:  # NumPy would take a single array, and all of it
                raise ValueError("it is no .npz file")
            return np.load(self.path, allow_pickle=False)
        except _DAMAGE as error:
            raise self.error("the file", error) from None

    def error(self, what: str, reason: object) -> UserError:
        """The sentence about something in the file."""
        return UserError(
            f"{self.path}: {what} cannot be read ({reason}); fetch it again, or leave it out with --skip"
        )

    def __getitem__(self, name: str) -> np.ndarray:
        if self._sizes[name] > _LARGEST_ARRAY:
            raise self.error(name, f"{self._sizes[name]} bytes are too many")
        with self._opened() as file:
            try:
                return file[name]
            except _DAMAGE as error:
                raise self.error(name, error) from None

    def numbers(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array of finite numbers, float64, whose first `shape[0]` rows are taken."""
        values = self[name]
        fits = values.ndim == len(shape) and values.shape[1:] == shape[1:] and len(values) >= shape[0]
        if values.dtype.kind not in "biuf" or not fits:
            raise self.error(name, f"{values.dtype} {values.shape} instead of numbers {shape}")
        values = values[: shape[0]].astype(np.float64)
        if not np.isfinite(values).all():
            raise self.error(name, "NaN")
        return values

    def __contains__(self, name: object) -> bool:
        return name in self._sizes  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def _actions(arrays: _Arrays, contract: Contract, count: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """(values of every channel [count, dim], names of what the stream lacks)."""
    table = np.zeros((count, minecraft.SIZE))
    lacking: list[str] = []
    for name in (*minecraft.KEYS, "camera"):
        key = f"action${name.replace('hotbar_', 'hotbar.')}"
        if key not in arrays:
            lacking.append(name)
        elif name == "camera":
            table[:, len(minecraft.KEYS) :] = np.clip(arrays.numbers(key, (count, 2)), -180, 180)
        else:
            table[:, minecraft.COLUMN[name]] = arrays.numbers(key, (count,)) != 0
    values: dict[str, np.ndarray] = {}
    missing: list[str] = []
    for channel in contract.actions:
        if channel.topic == minecraft.ABSTRACT_TOPIC:
            values[channel.name] = _abstract(arrays, channel, count)
            missing += [name for name in channel.select if f"action${name}" not in arrays]
        else:
            values[channel.name] = minecraft.channel_values(channel, table)
            used = ("camera",) if channel.topic == minecraft.CAMERA_TOPIC else channel.select
            missing += [name for name in used if name in lacking]
    return values, missing


def _abstract(arrays: _Arrays, channel: Action, count: int) -> np.ndarray:
    """Actions by name or number, as class numbers [count, 1]; zeros if the stream lacks them."""
    name = channel.select[0]
    if channel.kind != "categorical" or name not in ABSTRACT or len(channel.select) != 1:
        raise UserError(
            f"action {channel.name!r}: {channel.topic} is categorical and has {', '.join(ABSTRACT)}; "
            "select one"
        )
    known = ABSTRACT[name]
    if channel.classes != len(known):
        raise UserError(f"action {channel.name!r}: {name} has {len(known)} classes, not {channel.classes}")
    if f"action${name}" not in arrays:
        return np.zeros((count, 1))
    values = arrays[f"action${name}"][:count]
    if values.dtype.kind == "U":
        numbers = {text: number for number, text in enumerate(known)}
        values = np.array([numbers.get(text, numbers["other"]) for text in values.reshape(-1).tolist()])
    else:
        values = arrays.numbers(f"action${name}", (count,))
    if values.shape != (count,) or not ((values >= 0) & (values < len(known))).all():
        raise arrays.error(f"action${name}", f"it is none of {', '.join(known)}")
    return values[:, None].astype(np.float64)


def _reward(arrays: _Arrays, contract: Contract, reward: np.ndarray) -> np.ndarray | None:
    """What arrives with each of the N + 1 frames, float64 [N + 1, K]."""
    frames, tasks = len(reward) + 1, contract.task_names
    if contract.reward is None:
        return None
    if contract.reward.topic == minecraft.REWARD:
        return np.repeat(np.append(0.0, reward)[:, None], len(tasks), axis=1)
    events = minecraft.Events(tasks)
    items = {
        key.removeprefix(_INVENTORY): arrays.numbers(key, (frames,))
        for key in arrays
        if key.startswith(_INVENTORY)
    }
    if not items:
        return None
    rows = [{item: float(counts[k]) for item, counts in items.items()} for k in range(frames)]
    return np.stack([events.step(None, row) for row in rows]).astype(np.float64)


def _first_frame(path: Path, states: int) -> tuple[int, int]:
    """(how many frames of the video come before the stream's, how many of the stream's are there)."""
    try:
        total = read_json(path / _META)["true_video_frame_count"]
    except (OSError, ValueError, KeyError, TypeError):
        total = None
    if type(total) is not int:
        raise UserError(
            f"{path / _META} does not give true_video_frame_count, without which frames and actions cannot "
            "be put together; fetch it again, or leave the stream out with --skip"
        )
    held = stepwise.count_frames(path / _VIDEO)
    first = total - states
    if first < 0 or held - first < 2:
        raise UserError(
            f"{path}: {states} states do not fit a video of {total} frames, of which {held} are there; leave "
            "it out with --skip"
        )
    return first, min(states, held - first)


# ---- as a reader of `sources` ----


def takes(path: Path) -> bool:
    """Whether this is the folder of a stream."""
    return (path / _ARRAYS).is_file() and (path / _VIDEO).is_file()


def files(path: Path) -> list[Path]:
    """The files of a stream."""
    return [file for name in (_VIDEO, _ARRAYS, _META) if (file := path / name).is_file()]


def fill(
    path: Path, contract: Contract, folder: Path, clip: Sequence[str]
) -> tuple[list[Episode], list[str]]:
    """(episodes, warnings) of a stream; their videos are in `folder`.

    Raises:
        UserError: the contract asks for what streams lack, or a file is missing or damaged.
    """
    stepwise.require(str(path), contract, _OFFERS, minecraft.RATE_HZ)
    arrays = _Arrays(path / _ARRAYS)
    if "reward" not in arrays:
        raise UserError(
            f"{path / _ARRAYS} has no reward; it is no stream of MineRL: leave it out with --skip"
        )
    reward = arrays.numbers("reward", (max(1, arrays["reward"].size),))
    states = len(reward) + 1
    first, frames = _first_frame(path, states)
    values, missing = _actions(arrays, contract, len(reward))
    known = np.arange(states) < (0 if missing else len(reward))
    warnings = []
    if missing:
        warnings.append(
            f"{path} has no {', '.join(missing)}, which the contract's actions select: it is taken as video "
            "without commands"
        )
    if frames < states:
        warnings.append(f"{path}: {states} states for {frames} frames; the first {frames} are used")
    arrived = _reward(arrays, contract, reward)
    steps = Steps(
        {name: np.concatenate([rows, rows[-1:]])[:frames] for name, rows in values.items()},
        known[:frames],
        None if arrived is None else arrived[:frames],
        np.zeros(frames, bool),
    )
    recording = stepwise.align(str(path), contract, steps, clip, warnings)
    videos = stepwise.encode(recording, path / _VIDEO, folder, first)
    return recording.all_episodes(videos, path.name), warnings
