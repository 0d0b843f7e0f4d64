"""Minecraft by keyboard and mouse: keys, camera and events, as recorders and environments say them.

An action of one tick (50 ms) is a vector float64 [25]: the 23 keys of `KEYS` as 0 or 1, then what the view
turned by, (pitch, yaw) in degrees; +pitch looks down, +yaw turns right. Both pass for the recordings that
people made (`contractor`, `minerl_streams`) and for MineRL environments (`to_env`, `from_env`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from d4_datasets.contract import Action
from d4_datasets.errors import UserError

RATE_HZ = 20

# What a contract calls the streams of a recording. There are no ROS messages behind these names.
POV, POV_LINEAR = "/minecraft/pov", "/minecraft/pov_linear"
ESC_PRESSED = "/minecraft/esc"
KEYS_TOPIC, CAMERA_TOPIC, ABSTRACT_TOPIC = "/minecraft/keys", "/minecraft/camera", "/minecraft/abstract"
TASK, EVENT, REWARD = "/minecraft/task", "/minecraft/event", "/minecraft/reward"

HOTBAR = tuple(f"hotbar_{slot}" for slot in range(1, 10))
KEYS = (
    "attack", "use", "forward", "back", "left", "right", "jump", "sneak", "sprint", "drop", "swapHands",
    "pickItem", "inventory", "ESC", *HOTBAR,
)  # fmt: skip
ANGLES = ("pitch", "yaw")
FOVEATED = "foveated"  # the camera as one class of `CAMERA_CLASSES`
COLUMN = {name: column for column, name in enumerate((*KEYS, *ANGLES))}
SIZE = len(COLUMN)

_KEYBOARD = {
    "w": "forward", "s": "back", "a": "left", "d": "right", "space": "jump", "left.shift": "sneak",
    "left.control": "sprint", "e": "inventory", "q": "drop", "f": "swapHands", "escape": "ESC",
    **{str(slot): f"hotbar_{slot}" for slot in range(1, 10)},
}  # fmt: skip
KEYBOARD = {f"key.keyboard.{key}": name for key, name in _KEYBOARD.items()}
BUTTONS = ("attack", "use", "pickItem")  # of the mouse, by number


# ---- MineRL's action dictionaries ----


def _env(key: str) -> str:
    """A key as MineRL writes it; a dot would end the name in a contract's field path."""
    return key.replace("hotbar_", "hotbar.")


def to_env(action: np.ndarray) -> dict[str, Any]:
    """An action [25] as MineRL's dictionary: a whole number per key, `camera` float32 [2] in degrees."""
    keys: dict[str, Any] = {_env(name): int(action[COLUMN[name]] > 0.5) for name in KEYS}
    return keys | {"camera": np.asarray(action[len(KEYS) :], np.float32)}


def from_env(action: Mapping[str, Any]) -> np.ndarray:
    """MineRL's dictionary as an action [25]; keys that it lacks are up."""
    keys = [float(action.get(_env(name), 0)) for name in KEYS]
    return np.array([*keys, *np.asarray(action.get("camera", (0, 0)), np.float64)])


# ---- camera ----

DEGREES_PER_COUNT = 360 / 2400  # of the mouse, as recorders count; the sensitivity that everyone played with
CAMERA_LIMIT = 10.0  # degrees a tick; what turns faster falls into the outer bins
CAMERA_BINS = 11
CAMERA_CLASSES = CAMERA_BINS**2
_MU, _STEP = 10.0, 2.0


def camera_degrees(dx: float, dy: float, scale: float = 1.0) -> tuple[float, float]:
    """(pitch, yaw) in degrees of a mouse movement in counts, at most half a turn.

    Recorders write absurd movements when the game grabs the pointer, so the limit comes after the scaling.
    """
    pitch, yaw = (max(-180.0, min(180.0, count * scale * DEGREES_PER_COUNT)) for count in (dy, dx))
    return pitch, yaw


def to_bins(degrees: np.ndarray) -> np.ndarray:
    """Angles (..) to bins 0 .. 10 by VPT's mu-law: fine near zero, where people aim; 5 is no movement."""
    unit = np.clip(np.asarray(degrees, np.float64) / CAMERA_LIMIT, -1, 1)
    curved = np.sign(unit) * np.log1p(_MU * np.abs(unit)) / np.log1p(_MU) * CAMERA_LIMIT
    return np.round((curved + CAMERA_LIMIT) / _STEP).astype(np.int64)


def to_degrees(bins: np.ndarray) -> np.ndarray:
    """Bins (..) to the angles at their centres, float64; fractions lie between two centres."""
    curved = np.asarray(bins, np.float64) * _STEP / CAMERA_LIMIT - 1
    return np.sign(curved) * ((1 + _MU) ** np.abs(curved) - 1) / _MU * CAMERA_LIMIT


def to_class(degrees: np.ndarray) -> np.ndarray:
    """(pitch, yaw) in degrees (.., 2) to one of 121 classes (..): 11 * pitch bin + yaw bin."""
    bins = to_bins(degrees)
    return CAMERA_BINS * bins[..., 0] + bins[..., 1]


def from_class(index: np.ndarray) -> np.ndarray:
    """One of 121 classes (..) to (pitch, yaw) in degrees (.., 2)."""
    return to_degrees(np.stack(np.divmod(np.asarray(index, np.int64), CAMERA_BINS), -1))


# ---- actions as a contract names them ----


def channel_values(channel: Action, actions: np.ndarray) -> np.ndarray:
    """The columns of actions [N, 25] that a channel of a contract selects, float64 [N, dim].

    Raises:
        UserError: the channel selects what is not there, or in another kind.
    """
    if channel.topic == KEYS_TOPIC:
        _require(channel, KEYS, "binary")
    elif channel.kind == "categorical":
        _require(channel, (FOVEATED,), "categorical")
        if channel.classes != CAMERA_CLASSES:
            raise UserError(
                f"the camera of action {channel.name!r} has {CAMERA_CLASSES} classes, not {channel.classes}"
            )
        return to_class(actions[:, len(KEYS) :])[:, None].astype(np.float64)
    else:
        _require(channel, ANGLES, "continuous")
    return actions[:, [COLUMN[name] for name in channel.select]]


def _require(channel: Action, names: Sequence[str], kind: str) -> None:
    for name in channel.select:
        if name not in names:
            raise UserError(
                f"{channel.topic} has no {name!r}, which action {channel.name!r} of the contract selects; it "
                f"has {', '.join(names)}"
            )
    if channel.kind != kind:
        raise UserError(
            f"{channel.topic} is {kind}; action {channel.name!r} of the contract says {channel.kind}"
        )


# ---- events ----

_WOODS = ("oak", "spruce", "birch", "jungle", "acacia", "dark_oak")
_LOGS = tuple(f"{wood}_log" for wood in _WOODS)
_PLANKS = tuple(f"{wood}_planks" for wood in _WOODS)
_STAT = {
    "mine": "minecraft.mine_block:minecraft.",
    "craft": "minecraft.craft_item:minecraft.",  # what is taken out of a furnace counts as crafted
    "use": "minecraft.use_item:minecraft.",
    "place": "minecraft.use_item:minecraft.",
    "open": "minecraft.custom:minecraft.interact_with_",
}


class _Task(NamedTuple):
    """What counts for a task: counters of the game's statistics, and else items in the inventory."""

    stats: tuple[str, ...]
    items: tuple[str, ...]


def _task(name: str, things: Sequence[str] = (), items: Sequence[str] = ()) -> _Task:
    verb, _, thing = name.partition("_")
    stats = tuple(_STAT[verb] + each for each in things or (thing,))
    # Where something was placed, opened or used the inventory does not tell.
    return _Task(stats, tuple(items or things or (thing,)) if verb in ("mine", "craft") else ())


TASKS: dict[str, _Task] = {
    "mine_log": _task("mine_log", _LOGS, (*_LOGS, "log", "log2")),  # "log", "planks": Minecraft 1.11
    "mine_cobblestone": _task("mine_cobblestone", ("stone", "cobblestone"), ("cobblestone",)),
    "mine_iron_ore": _task("mine_iron_ore"),
    "mine_coal": _task("mine_coal", ("coal_ore",), ("coal",)),
    "mine_diamond": _task("mine_diamond", ("diamond_ore",), ("diamond",)),
    "craft_planks": _task("craft_planks", _PLANKS, (*_PLANKS, "planks")),
    **{
        name: _task(name)
        for name in (
            "craft_stick", "craft_crafting_table", "craft_furnace", "craft_iron_ingot",
            "craft_wooden_pickaxe", "craft_stone_pickaxe", "craft_iron_pickaxe", "open_crafting_table",
            "open_furnace", "place_crafting_table", "place_furnace", "use_wooden_pickaxe",
            "use_stone_pickaxe", "use_iron_pickaxe",
        )
    },
}  # fmt: skip


class Events:
    """Finds, tick by tick, which of the tasks `names` were accomplished.

    Counters are of the whole life of a world and recordings begin anywhere in it, so the first tick only sets
    what later ones are compared with. Without counters an item counts when the inventory holds more of it
    than ever before: what lies under the pointer in an open window has left the inventory and comes back.

    Raises:
        UserError: a name is not among `TASKS`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in TASKS:
                raise UserError(
                    f"there is no task {name!r} in Minecraft recordings; tasks: {', '.join(TASKS)}"
                )
        self._tasks = [TASKS[name] for name in names]
        self._counters: np.ndarray | None = None
        self._most: np.ndarray | None = None

    def step(self, stats: Mapping[str, Any] | None, items: Mapping[str, Any] | None) -> np.ndarray:
        """Tasks accomplished in the tick that ended with these counters and item counts, bool [K]."""
        return self.amounts(stats, items) > 0

    def amounts(self, stats: Mapping[str, Any] | None, items: Mapping[str, Any] | None) -> np.ndarray:
        """How much of each task was accomplished in that tick, float64 [K]: planks come four at a time."""
        nothing = np.zeros(len(self._tasks))
        if stats is not None:
            now = np.array([sum(_count(stats.get(key)) for key in task.stats) for task in self._tasks])
            before, self._counters = self._counters, now
        elif items is not None and self._counters is None:
            now = np.array([sum(_count(items.get(key)) for key in task.items) for task in self._tasks])
            before = self._most
            self._most = now if before is None else np.maximum(before, now)
        else:
            return nothing
        return nothing if before is None else np.maximum(now - before, 0)


def _count(value: Any) -> float:
    """A count, 0 for what is none."""
    return value if type(value) in (int, float) and 0 <= value < 1e12 else 0


# ---- pictures ----


def resize(rgb: np.ndarray, topic: str, size: tuple[int, int]) -> np.ndarray:
    """A picture as the stream `topic` has it: of `POV_LINEAR` at `size` (height, width) already.

    Networks of VPT expect pictures that were made smaller by linear interpolation, which skips pixels; other
    streams are left to the one resize of everything else, which averages them.
    """
    if topic != POV_LINEAR:
        return rgb
    return cv2.resize(rgb, size[::-1], interpolation=cv2.INTER_LINEAR)


_RECORDED_HEIGHT = 720  # of the window that pointer positions refer to
_POINTER = 16  # pixels
_ARROW = np.array([[1, 0], [1, 12], [4, 9], [6, 14], [8, 13], [6, 8], [10, 8]])


def _pointer() -> np.ndarray:
    """An arrow that points to its upper left corner: RGBA uint8 [16, 16, 4], white with a dark rim."""
    picture = np.zeros((_POINTER, _POINTER, 4), np.uint8)
    cv2.fillPoly(picture, [_ARROW], (255, 255, 255, 255))
    cv2.polylines(picture, [_ARROW], True, (20, 20, 20, 255))
    return picture


_POINTER_PICTURE = _pointer()


def draw_pointer(rgb: np.ndarray, x: float, y: float) -> bool:
    """Draw the pointer into a picture [H, W, 3] at a position in the recorder's window; False if outside.

    Recorders took pictures without it, and no policy could learn to click on what it cannot see.
    """
    height, width = rgb.shape[:2]
    left, top = (math.floor(place * height / _RECORDED_HEIGHT) for place in (x, y))
    if not (0 <= left < width and 0 <= top < height):
        return False
    place = rgb[top : top + _POINTER, left : left + _POINTER]
    pointer = _POINTER_PICTURE[: place.shape[0], : place.shape[1]]
    alpha = pointer[..., 3:] / 255
    place[...] = np.round(place * (1 - alpha) + pointer[..., :3] * alpha)
    return True
