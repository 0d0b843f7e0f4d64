"""Actions as MineRL has them: what its space contains, and the text that it sends to the game."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from d4_datasets import minecraft

# The 24 keys of an action, in the order of MineRL's space, and the limits of its camera.
ENV_KEYS = tuple(sorted(minecraft.to_env(np.zeros(minecraft.SIZE))))
CAMERA_SPACE = 180.0

# In the order in which MineRL writes them.
_WIRE = (
    "forward", "left", "back", "right", "jump", "inventory", "drop", "swapHands", "sneak", "sprint", "attack",
    "use", "pickItem", *(f"hotbar.{slot}" for slot in range(1, 10)), "ESC",
)  # fmt: skip


def is_in_space(action: Mapping[str, Any]) -> bool:
    """Whether a dictionary is contained in MineRL's action space."""
    keys = [value for key, value in action.items() if key != "camera"]
    camera = np.asarray(action.get("camera"))
    return (
        tuple(sorted(action)) == ENV_KEYS
        and all(isinstance(k, int | np.integer) and not isinstance(k, bool) and k in (0, 1) for k in keys)
        and (camera.shape, camera.dtype) == ((2,), np.float32)
        and bool((np.abs(camera) <= CAMERA_SPACE).all())
    )


def wire_text(action: Mapping[str, Any]) -> str:
    """What MineRL sends to the game for a dictionary, a line a key."""
    lines = [f"{key} {int(action[key])}" for key in _WIRE]
    pitch, yaw = (float(angle) for angle in action["camera"])
    return "\n".join([*lines, f"camera {pitch} {yaw}"])
