"""Minecraft as paid players played it (VPT, BASALT): `<name>.mp4` and `<name>.jsonl`, a line a frame.

A file is one recording and one episode: parts of a session are missing, so neighbours are never joined. What
is odd about these data, and what is done about it, stands in docs/minecraft-data.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import minecraft, stepwise
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Episode
from d4_datasets.minecraft import COLUMN
from d4_datasets.stepwise import Steps

KIND = "contractor"

_OFFERS = (
    minecraft.POV, minecraft.POV_LINEAR, minecraft.KEYS_TOPIC, minecraft.CAMERA_TOPIC, minecraft.TASK,
    minecraft.EVENT, minecraft.ESC_PRESSED,
)  # fmt: skip
_LONGEST_LINE = 4 * 2**20
_HEAD = 2**16
_VERSION = re.compile(r"(\d{1,3})\.(\d{1,3})")
# Mouse counts while a window is open, by recorder; the others' are right.
_GUI_SCALE = {(5, 7): 0.5, (5, 8): 0.5, (6, 7): 2.0, (6, 8): 2.0, (6, 9): 2.0}
_NOTES_SPRINT = (6, 13)  # the first recorder that notes the keys of sprinting and swapping hands


# ---- lines ----


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of a file as JSON objects, None for one that is none; memory does not grow with the file."""
    with path.open("rb") as file:
        while raw := file.readline(_LONGEST_LINE):
            if len(raw) == _LONGEST_LINE and not raw.endswith(b"\n"):
                while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield None
            elif raw.strip():
                yield _object(raw)


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _number(value: Any) -> float:
    """A sane number; a ValueError for NaN, true, text and numbers that no mouse gives."""
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise ValueError(value)
    return float(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(value)
    return value


def version_of(path: Path) -> tuple[int, int] | None:
    """The recorder's version, which is the name of the folder; None if it is none."""
    match = _VERSION.fullmatch(path.absolute().parent.name)
    return None if match is None else (int(match[1]), int(match[2]))


# ---- what the player did ----


class Player:
    """Actions out of the lines of one recording, which are given in order, from the first one on.

    Args: version: of the recorder. esc_is_a_key: else ESC becomes the key of the inventory where that has
        the same effect, in an open window, and is left out elsewhere.
    """

    def __init__(self, version: tuple[int, int] | None = None, esc_is_a_key: bool = True) -> None:
        self._gui_scale = 1.0 if version is None else _GUI_SCALE.get(version, 1.0)
        self._esc_is_a_key = esc_is_a_key
        self._is_first = True
        self._is_stuck = self._was_esc = False
        self._slot: int | None = None
        self.pointer: tuple[float, float] | None = None  # in an open window, in pixels of the recorder's
        self.quits = False  # ESC where no window is open

    def step(self, line: Mapping[str, Any] | None) -> np.ndarray | None:
        """The action of the next line, float64 [25]; None if it is not known. Sets `pointer` and `quits`."""
        self.pointer, self.quits = None, False
        action = None
        is_first, self._is_first = self._is_first, False
        if line is None:
            return None
        gui = line.get("isGuiOpen") is True
        try:
            if gui:
                self.pointer = _number(line["mouse"]["x"]), _number(line["mouse"]["y"])
        except (KeyError, TypeError, ValueError):
            pass
        slot = self._changed_slot(line.get("hotbar"))  # of every line: the next one is compared with it
        try:
            action = self._action(line, gui, is_first)
        except (KeyError, TypeError, ValueError):
            return None
        if slot is not None:
            action[COLUMN[minecraft.HOTBAR[slot]]] = 1
        self._escape(action, gui)
        return action

    def _action(self, line: Mapping[str, Any], gui: bool, is_first: bool) -> np.ndarray:
        """Keys, buttons and camera as the line has them, but for an attack that is stuck."""
        mouse, action = line["mouse"], np.zeros(minecraft.SIZE)
        for key in _list(line["keyboard"]["keys"]):
            if key in minecraft.KEYBOARD:
                action[COLUMN[minecraft.KEYBOARD[key]]] = 1
        buttons = _list(mouse["buttons"])
        for number, name in enumerate(minecraft.BUTTONS):
            action[COLUMN[name]] = number in buttons
        # The click that closed the start menu stays down for the recorder until it is pressed again.
        fresh = mouse.get("newButtons")
        if is_first:
            self._is_stuck = fresh == [0]
        elif isinstance(fresh, list) and 0 in fresh:
            self._is_stuck = False
        if self._is_stuck:
            action[COLUMN["attack"]] = 0
        scale = self._gui_scale if gui else 1.0
        turn = minecraft.camera_degrees(_number(mouse["dx"]), _number(mouse["dy"]), scale)
        action[[COLUMN[name] for name in minecraft.ANGLES]] = turn
        return action

    def _changed_slot(self, slot: Any) -> int | None:
        """The slot of the hotbar (0 .. 8) if another one was chosen: the wheel leaves no other trace."""
        if type(slot) is not int or not 0 <= slot < len(minecraft.HOTBAR):
            return None
        before, self._slot = self._slot, slot
        return slot if before not in (None, slot) else None

    def _escape(self, action: np.ndarray, gui: bool) -> None:
        is_down = bool(action[COLUMN["ESC"]])
        self.quits = is_down and not self._was_esc and not gui
        self._was_esc = is_down
        if is_down and gui and not self._esc_is_a_key:
            action[COLUMN["ESC"]], action[COLUMN["inventory"]] = 0, 1


# ---- one recording ----


@dataclass
class Script:
    """What N lines say: actions [25] or None, events bool [K], where the pointer was, whether ESC quit."""

    lines: int = 0
    actions: list[np.ndarray | None] = field(default_factory=list)
    pointers: list[tuple[float, float] | None] = field(default_factory=list)
    quits: list[bool] = field(default_factory=list)
    events: list[np.ndarray] = field(default_factory=list)
    tells_events: bool = False


def read_script(path: Path, most: int, tasks: Sequence[str], player: Player) -> Script:
    """The first `most` lines of a file; the rest is only counted."""
    script, events = Script(), minecraft.Events(tasks)
    for line in read_lines(path):
        script.lines += 1
        if script.lines > most:
            continue
        script.actions.append(player.step(line))
        script.pointers.append(player.pointer)
        script.quits.append(player.quits)
        stats, items = counters(line)
        script.tells_events |= stats is not None or items is not None
        script.events.append(events.step(stats, items))
    return script


def counters(line: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(statistics, item counts) of a line, None where it has none."""
    line = line or {}
    stats, inventory = line.get("stats"), line.get("inventory")
    items: dict[str, Any] | None = None
    if isinstance(inventory, list):
        items = {}
        for stack in inventory:
            if isinstance(stack, dict) and isinstance(stack.get("type"), str):
                quantity = stack.get("quantity")
                items[stack["type"]] = items.get(stack["type"], 0) + (
                    quantity if type(quantity) is int else 0
                )
    return (stats if isinstance(stats, dict) else None), items


def _steps(script: Script, contract: Contract) -> Steps:
    known = np.array([action is not None for action in script.actions])
    nothing = np.zeros(minecraft.SIZE)
    actions = np.stack([nothing if action is None else action for action in script.actions])
    return Steps(
        actions={c.name: minecraft.channel_values(c, actions) for c in contract.actions},
        known=known,
        reward=np.stack(script.events).astype(np.float64) if script.tells_events else None,
        terminal=np.array(script.quits),
    )


def _remarks(path: Path, script: Script, frames: int, contract: Contract) -> list[str]:
    """What a person should know of a recording."""
    remarks = []
    if script.lines != frames:
        remarks.append(
            f"{path}: {script.lines} lines for {frames} frames; the first {len(script.actions)} are used"
        )
    unknown = [number for number, action in enumerate(script.actions, 1) if action is None]
    if unknown and unknown != [len(script.actions)]:  # at the last frame nothing more was done
        remarks.append(
            f"{path}: {len(unknown)} lines (the first is number {unknown[0]}) do not say what mouse and "
            "keyboard did; their frames have no known action"
        )
    version = version_of(path)
    lacking = {"sprint", "swapHands"} & {name for c in contract.actions for name in c.select}
    if lacking and version is not None and version < _NOTES_SPRINT:
        remarks.append(
            f"{path}: recorder {version[0]}.{version[1]} did not note {' and '.join(sorted(lacking))}"
        )
    return remarks


# ---- as a reader of `sources` ----


def takes(path: Path) -> bool:
    """Whether this is the file of lines of a recording: mouse and keyboard stand in it."""
    try:
        if path.suffix != ".jsonl" or not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return b'"mouse"' in head and b'"keyboard"' in head


def files(path: Path) -> list[Path]:
    """The lines and the video."""
    return [file for file in (path, path.with_suffix(".mp4")) if file.is_file()]


def fill(
    path: Path, contract: Contract, folder: Path, clip: Sequence[str]
) -> tuple[list[Episode], list[str]]:
    """(episodes, warnings) of a recording; their videos are in `folder`.

    Raises:
        UserError: the contract asks for what such recordings lack, or the video or every line is damaged.
    """
    video = path.with_suffix(".mp4")
    stepwise.require(str(path), contract, _OFFERS, minecraft.RATE_HZ)
    if not video.is_file():
        return [], [f"{path} has no {video.name} beside it and is left out"]
    frames = stepwise.count_frames(video)
    keys = {name for channel in contract.actions for name in channel.select}
    player = Player(version_of(path), esc_is_a_key="ESC" in keys)
    tasks = () if contract.reward is None else contract.task_names
    script = read_script(path, frames, tasks, player)
    if not script.actions:
        return [], [f"{path}: {script.lines} lines for {frames} frames; it is left out"]
    if all(action is None for action in script.actions):
        raise UserError(
            f"{path}: none of its {script.lines} lines says what mouse and keyboard did; fetch it again, or "
            "leave it out with --skip"
        )
    warnings = _remarks(path, script, frames, contract)
    recording = stepwise.align(str(path), contract, _steps(script, contract), clip, warnings)
    outside = 0

    def paint(number: int, rgb: np.ndarray) -> None:
        nonlocal outside
        if (pointer := script.pointers[number]) is not None:
            outside += not minecraft.draw_pointer(rgb, *pointer)

    videos = stepwise.encode(recording, video, folder, paint=paint)
    if outside:
        warnings.append(f"{path}: in {outside} frames with an open window the pointer is outside the picture")
    return recording.all_episodes(videos, path.name), warnings
