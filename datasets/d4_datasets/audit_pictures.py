"""Pictures of an audit: a contact sheet of the dataset, and one of the frames that were found fault with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets.joined import Frames
from d4_datasets.pictures import GREEN, GREY, ORANGE, Color, Strip, contact_sheet
from d4_datasets.windows import Windows

_ROWS, _FRAMES = 16, 10
_LEGEND = [("action known", GREEN), ("action unknown", GREY), ("same picture as the frame before", ORANGE)]
_FAULTS = {
    "dark": "dark frames", "bright": "overexposed frames", "flat": "frames of one colour",
}  # fmt: skip


def sheet(windows: Windows, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Draw the contact sheet, uint8 [H, W, 3]: episodes as rows, frames across, a bar telling what is known
    of each.

    Args: rows: the episodes of the audit, as plain data.
    """
    shown = _spread(len(rows), _ROWS)
    strips = [_episode(windows, rows[number], camera) for number in shown for camera in windows.images]
    name, first, others = windows.contract.name, Path(windows.shown[0]).name, len(windows.shown) - 1
    first += f" and {others} more" if others else ""
    title = f"{first}: robot {name}, {len(rows)} episodes, {windows.num_frames} frames"
    if len(shown) < len(rows):
        title += f" ({len(shown)} episodes shown)"
    return contact_sheet(strips, title, _LEGEND)


def faults(windows: Windows, cameras: dict[str, dict[str, Any]]) -> np.ndarray | None:
    """Draw the frames that `cameras` (of the audit) names: the longest run of equal ones from before its
    begin to its end, and dark, overexposed or empty ones. None where there is nothing to show.
    """
    strips = []
    for name, c in cameras.items():
        images = windows.images[name]
        if c["longest_repeat"] > max(3, windows.contract.rate_hz / 2):
            begin, length = c["longest_repeat_at"], c["longest_repeat"]
            first = int(windows.episode_start[windows.episode_index[begin]])
            index = np.unique([max(begin - 2, first), max(begin - 1, first), *(begin + _spread(length, 8))])
            strips.append(_strip(windows, images, index, f"{name}\nlongest run of\nequal frames:\n{length}"))
        for key, text in _FAULTS.items():
            if c["examples"][key]:
                index = np.array(c["examples"][key])
                strips.append(_strip(windows, images, index, f"{name}\n{text}:\n{c[key]:.2%} of all"))
    return contact_sheet(strips, "", _LEGEND) if strips else None


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0..count-1, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _episode(windows: Windows, row: dict[str, Any], camera: str) -> Strip:
    caption = [f"episode {row['episode']}", f"{row['frames']} frames, {row['seconds']:.1f} s",
               f"labelled {row['labelled'] / row['frames']:.0%}", ", ".join(row["tasks"])]  # fmt: skip
    if any(row["returns"]):
        caption.append("return " + " ".join(f"{value:.3g}" for value in row["returns"]))
    if len(windows.images) > 1:
        caption.insert(1, camera)
    frames = _spread(row["frames"], _FRAMES)
    images = windows.images[camera]
    index = int(windows.episode_start[row["episode"]]) + frames
    bars = [_bar(windows, images, int(i)) for i in index]
    notes = [f"{frame / windows.contract.rate_hz:.1f} s" for frame in frames]
    return Strip(np.asarray(images[index]), "\n".join(caption), notes, bars)


def _strip(windows: Windows, images: Frames, index: np.ndarray, caption: str) -> Strip:
    """Frames of any episodes, each noted with its episode and its number in it."""
    episode = np.asarray(windows.episode_index[index])
    frame = index - windows.episode_start[episode]
    notes = [f"{e}: {f}" for e, f in zip(episode, frame, strict=True)]
    bars = [_bar(windows, images, int(i)) for i in index]
    return Strip(np.asarray(images[index]), caption, notes, bars)


def _bar(windows: Windows, images: Frames, frame: int) -> Color:
    first = windows.episode_start[windows.episode_index[frame]] == frame
    if not first and np.array_equal(images[frame], images[frame - 1]):
        return ORANGE
    return GREEN if windows.action_mask[frame] else GREY
