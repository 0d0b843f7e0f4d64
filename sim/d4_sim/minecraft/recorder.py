"""Writes what is played in the format of contractors' recordings, which `d4-ingest` reads (KIND contractor).

`<name>-<part>.mp4` at 20 Hz and `<name>-<part>.jsonl`, a line a frame: what mouse and keyboard did at it, and
the counters and the inventory that came with it. Parts last five minutes, as theirs do, and end where a tick
passed unseen. The reader `d4_datasets.contractor` gets back exactly the actions that were put in.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import numpy as np

from d4_datasets import minecraft
from d4_datasets.minecraft import BUTTONS, COLUMN, DEGREES_PER_COUNT, HOTBAR, KEYBOARD, KEYS, RATE_HZ
from d4_sim.minecraft.game import MOST_LATE

PART_TICKS = 5 * 60 * RATE_HZ
_KEY_OF = {name: key for key, name in KEYBOARD.items()}
_SLOT_TICKS = 5  # so long after its key a slot may change
_HALF_TICK_MS = 500 / RATE_HZ
_CODEC = {"crf": "20", "preset": "veryfast"}


class Lines:
    """Turns actions into lines, in order; knows what was down before.

    Lines are held back for a few ticks: the slot of the hotbar changes some time after the key that chose it,
    and readers would take that for a second key.

    Args: engine: the game, for the first line; recordings of contractors name none.
    """

    def __init__(self, engine: str = "") -> None:
        self._engine = engine
        self._keys: list[str] = []
        self._buttons: list[int] = []
        self._slot: int | None = None
        self._held: list[dict[str, Any]] = []
        self.number = 0

    def add(self, said: Mapping[str, Any], action: np.ndarray | None) -> list[dict[str, Any]]:
        """Take a frame; the lines that are finished.

        Args:
            said: what a game tells beside the picture (`Seen.said`).
            action: float64 [25] done at it; None where nobody knows, as at the last frame.
        """
        line: dict[str, Any] = {"mouse": None, "keyboard": None}
        if action is not None:
            line = {"mouse": self._mouse(said, action), "keyboard": self._keyboard(action)}
        line |= {
            "isGuiOpen": bool(said.get("gui")), "tick": self.number,
            "milli": round(1000 * self.number / RATE_HZ),
        }  # fmt: skip
        if self._engine and not self.number:
            line["engine"] = self._engine
        if said.get("stats") is not None:
            line["stats"] = said["stats"]
        if said.get("items") is not None:
            line["inventory"] = [{"type": name, "quantity": n} for name, n in sorted(said["items"].items())]
        line |= {name: value for name, value in said.get("more", {}).items() if name not in line}
        self.number += 1
        self._held.append(line)
        self._choose(said.get("slot"))
        ready, self._held = self._held[:-_SLOT_TICKS], self._held[-_SLOT_TICKS:]
        return ready

    def forget(self) -> None:
        """Nobody knows what was done at the newest frame."""
        self._held[-1] |= {"mouse": None, "keyboard": None}

    def flush(self) -> list[dict[str, Any]]:
        """The lines that are left."""
        ready, self._held = self._held, []
        return ready

    def _choose(self, slot: Any) -> None:
        """Note the chosen slot in the newest line, and in those since the key that chose it."""
        if type(slot) is not int or not 0 <= slot < len(HOTBAR):
            return
        before, self._slot = self._slot, slot
        since = len(self._held) - 1
        if before not in (None, slot):
            pressed = [i for i, line in enumerate(self._held) if _presses(line, slot)]
            since = pressed[-1] if pressed else since
        for line in self._held[since:]:
            line["hotbar"] = slot

    def _keyboard(self, action: np.ndarray) -> dict[str, Any]:
        down = [_KEY_OF[name] for name in KEYS if name in _KEY_OF and action[COLUMN[name]] > 0.5]
        fresh = [key for key in down if key not in self._keys]
        self._keys = down
        return {"keys": down, "newKeys": fresh, "chars": ""}

    def _mouse(self, said: Mapping[str, Any], action: np.ndarray) -> dict[str, Any]:
        down = [number for number, name in enumerate(BUTTONS) if action[COLUMN[name]] > 0.5]
        # A first line that says attack was only just pressed means that it is stuck, to readers.
        fresh = [number for number in down if number not in self._buttons] if self.number else []
        self._buttons = down
        pitch, yaw = (float(action[COLUMN[name]]) / DEGREES_PER_COUNT for name in minecraft.ANGLES)
        out = {"dx": yaw, "dy": pitch, "dwheel": 0.0, "buttons": down, "newButtons": fresh}
        # Without a place nothing is drawn: the picture shows the pointer already.
        place = said.get("pointer")
        return out if place is None else {"x": float(place[0]), "y": float(place[1]), **out}


def _presses(line: Mapping[str, Any], slot: int) -> bool:
    """Whether the key of a slot is down in a line."""
    keyboard = line["keyboard"]
    return keyboard is not None and _KEY_OF[HOTBAR[slot]] in keyboard["keys"]


class Recorder:
    """Videos and lines of one session; each part gets its name when it is whole.

    Args:
        folder: gets `<name>-000.mp4`, `<name>-000.jsonl` and so on.
        most_late: a part is left out if a larger share of its pictures came half a tick late or more: then
            actions and pictures do not belong together.
        engine: name of the game, which the first line of every part says.

    Attributes:
        parts: files of lines that were written.
        refused: parts that were left out.
    """

    def __init__(self, folder: Path, name: str, most_late: float = MOST_LATE, engine: str = "") -> None:
        self.folder, self.name, self.most_late, self.engine = folder, name, most_late, engine
        folder.mkdir(parents=True, exist_ok=True)
        self.parts: list[Path] = []
        self.refused = self._part = self._late = 0
        self._container: Any = None
        self._stream: Any = None
        self._file: IO[str] | None = None
        self._lines = Lines()

    def add(self, image: np.ndarray, said: Mapping[str, Any], action: np.ndarray | None) -> None:
        """Take a frame uint8 [H, W, 3], and what was done at it.

        If ticks passed unseen before it, a new part begins: what was done before them took hold for longer
        than a tick, and no frame shows what it did in one.
        """
        if self._file is not None and said.get("more", {}).get("missed"):
            self._lines.forget()
            self.close()
        if self._file is None:
            self._open(image.shape[:2])
        assert self._file is not None
        self._write(self._lines.add(said, action))
        self._late += float(said.get("late_ms", 0.0)) >= _HALF_TICK_MS
        for packet in self._stream.encode(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        ):
            self._container.mux(packet)
        if self._lines.number == PART_TICKS:
            self.close()

    def _open(self, size: tuple[int, ...]) -> None:
        video, lines = (_aside(self._path(ending)) for ending in (".mp4", ".jsonl"))
        self._lines, self._late = Lines(self.engine), 0
        self._file = lines.open("w")
        self._container = av.open(str(video), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=Fraction(RATE_HZ), options=_CODEC)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.thread_count = 1  # the game wants the other cores

    def _write(self, lines: list[dict[str, Any]]) -> None:
        assert self._file is not None
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.name}-{self._part:03d}{ending}"

    def _shut(self) -> None:
        assert self._file is not None
        self._write(self._lines.flush())
        self._file.close()
        for packet in self._stream.encode():
            self._container.mux(packet)
        self._container.close()
        self._file = self._container = self._stream = None

    def close(self) -> list[Path]:
        """Finish the part that is being written; the files of lines of all parts."""
        if self._file is not None:
            self._shut()
            if self._lines.number < 2:  # a picture and nothing done
                self._remove_aside()
            elif self._late > self.most_late * self._lines.number:
                self.refused += 1
                self._remove_aside()
            else:
                for path in map(self._path, (".mp4", ".jsonl")):  # a reader looks for the lines
                    os.replace(_aside(path), path)
                self.parts.append(self._path(".jsonl"))
            self._part += 1
        return self.parts

    def _remove_aside(self) -> None:
        for ending in (".mp4", ".jsonl"):
            _aside(self._path(ending)).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything of this session."""
        if self._file is not None:
            self._shut()
            self._remove_aside()
        for path in self.parts:
            path.unlink(missing_ok=True)
            path.with_suffix(".mp4").unlink(missing_ok=True)
        self.parts = []


def _aside(path: Path) -> Path:
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")


def remove_parts(folder: Path, stem: str) -> None:
    """Remove the recordings of an episode, of which another attempt may have fewer or shorter parts."""
    for path in folder.glob(f"{glob.escape(stem)}-[0-9]*"):
        path.unlink(missing_ok=True)


def remove_orphans(folder: Path) -> None:
    """Remove what processes that are gone were writing: nobody will finish it."""
    for path in folder.glob(".tmp-[0-9]*-*"):
        process = path.name.split("-")[1]
        if path.suffix in (".mp4", ".jsonl") and process.isdigit() and not Path(f"/proc/{process}").exists():
            path.unlink(missing_ok=True)
