"""A scripted player of the tree-chopping arena: it knows where the trunk is, and has hands like anybody."""

from __future__ import annotations

from typing import Any

import numpy as np

from d4_datasets import minecraft
from d4_datasets.minecraft import COLUMN, DEGREES_PER_COUNT, SIZE
from d4_sim.luanti.channel import wrap
from d4_sim.minecraft.game import View

_EYE = 1.47  # above the feet
_LONGEST = 1800  # ticks until it gives up
_STILL = 4  # ticks without a turn after which what the game tells is what is seen
_AIMED = (3.0, 3.5)  # degrees: yaw, pitch
_NEAR, _FAR = 0.8, 2.9  # nodes: too close, and as far as it hits
_HITS = 130  # ticks of hitting one log after which something is wrong
_STUCK = 12  # ticks of walking without getting anywhere


class Chopper:
    """Goes to the tree and chops it down, log by log, by keyboard and mouse.

    No two play alike: some are hasty, some look around first or stroll in between, up to the sky and down to
    their feet, and find back: who learns from them must know how to. What they see is what `View.more` has:
    their yaw, pitch and place, and the logs that are left.
    """

    def __init__(self, seed: int) -> None:
        rng = self._rng = np.random.default_rng((seed, 1))
        self._turn_most = rng.uniform(4, 9.5)  # degrees a tick
        self._gain = rng.uniform(0.25, 0.5)
        self._shake = rng.uniform(0.0, 0.25)
        self._stand = rng.uniform(1.6, 2.2)
        self._sprints = bool(rng.random() < 0.3)
        self._strolls = rng.uniform(0, 0.015)  # a tick
        self._stroll_until = int(rng.integers(10, 50)) if rng.random() < 0.5 else 0
        self._draw_stroll(120)
        self._tick, self._turned, self._hits = 0, 0, 0
        self._facing: np.ndarray | None = None  # yaw, pitch
        self._target: tuple[float, ...] | None = None
        self._off = np.zeros(2)  # degrees beside the middle of a log
        self._place, self._moved, self._arrived = np.zeros(2), 0, False

    def act(self, view: View) -> dict[str, Any] | None:
        """The action for what is seen; None when there is nothing left to do, or no hope."""
        logs, action = view.more.get("trunk") or [], np.zeros(SIZE)
        self._tick += 1
        if not logs or self._tick > _LONGEST:
            return None
        self._feel(view)
        if self._is_strolling():
            self._stroll(action)
        else:
            self._chop(view, [tuple(log) for log in logs], action)
        return minecraft.to_env(action)

    # ---- where it is, and how it turns ----

    def _feel(self, view: View) -> None:
        """What is told is a tick or two old: it counts after the mouse has been still for that long."""
        told = np.array([view.more["yaw"], view.more["pitch"]])
        if self._facing is None or self._tick - self._turned > _STILL:
            self._facing = told
        here = np.array([view.more["xpos"], view.more["zpos"]])
        if np.linalg.norm(here - self._place) > 0.05:
            self._place, self._moved = here, self._tick

    def _turn(self, action: np.ndarray, error: np.ndarray) -> None:
        """Turn by a share of an error (yaw, pitch), with a shaking hand, in whole counts of the mouse."""
        assert self._facing is not None
        wanted = np.clip(self._gain * error, -self._turn_most, self._turn_most)
        wanted += self._rng.normal(0, self._shake, 2) * (np.abs(error).max() > 1)
        wanted = np.round(wanted / DEGREES_PER_COUNT) * DEGREES_PER_COUNT
        if wanted.any():
            self._turned = self._tick
        pitch = np.clip(self._facing[1] + wanted[1], -89, 89)
        action[COLUMN["yaw"]], action[COLUMN["pitch"]] = wanted[0], pitch - self._facing[1]
        self._facing = np.array([wrap(self._facing[0] + wanted[0]), pitch])

    # ---- strolling ----

    def _is_strolling(self) -> bool:
        if self._tick <= self._stroll_until:
            return True
        if self._rng.random() < self._strolls * (0.3 if self._hits else 1.0):
            self._stroll_until = self._tick + int(self._rng.integers(8, 30))
            self._draw_stroll(90)
            return True
        return False

    def _draw_stroll(self, widest: float) -> None:
        """Where to look, degrees, and what to press."""
        self._stroll_yaw = self._rng.uniform(-widest, widest)
        self._stroll_pitch = self._rng.uniform(-89, 70) if self._rng.random() < 0.5 else 5.0
        keys = ["forward", "back", "left", "right", "jump", "sneak"]
        self._stroll_keys = [key for key, p in zip(keys, (0.5, 0.1, 0.2, 0.2, 0.15, 0.05), strict=True)
                             if self._rng.random() < p]  # fmt: skip

    def _stroll(self, action: np.ndarray) -> None:
        assert self._facing is not None
        left = np.clip(self._stroll_yaw, -3, 3) * self._turn_most / 6
        self._stroll_yaw -= left
        self._turn(
            action, np.array([left / self._gain, self._rng.normal(self._stroll_pitch - self._facing[1], 4)])
        )
        action[[COLUMN[key] for key in self._stroll_keys]] = 1

    # ---- chopping ----

    def _chop(self, view: View, logs: list[tuple[float, ...]], action: np.ndarray) -> None:
        assert self._facing is not None
        eye = np.array([view.more["xpos"], view.more["ypos"] + _EYE, view.more["zpos"]])
        if self._target not in logs:  # chopped, or there was none yet
            self._target = min(logs, key=lambda log: abs(log[1] - eye[1] + 0.3) + self._rng.uniform(0, 0.4))
            self._hits, self._off = 0, self._rng.normal(0, 1, 2)
        right, up, ahead = np.array(self._target) - eye
        far = float(np.hypot(right, ahead))
        aim = np.array([np.degrees(np.arctan2(right, ahead)), -np.degrees(np.arctan2(up, far))]) + self._off
        error = np.array([wrap(aim[0] - self._facing[0]), aim[1] - self._facing[1]])
        self._turn(action, error)
        is_aimed = bool((np.abs(error) < _AIMED).all())
        self._walk(action, far, abs(float(error[0])))
        if is_aimed and far < _FAR:
            self._hits += 1
            action[COLUMN["attack"]] = self._hits % _HITS > 3  # let go now and then, if it does not yield
            if self._hits % _HITS == 0:
                self._off = self._rng.normal(0, 2, 2)
        elif not is_aimed:
            self._hits = 0

    def _walk(self, action: np.ndarray, far: float, aside: float) -> None:
        """Towards the trunk, or back from it; a step aside where there is no getting on.

        Who has arrived stays: what is told is old, and walking to and fro after it would never end.
        """
        self._arrived = far < (_FAR if self._arrived else self._stand)
        if not self._arrived and aside < 30:
            action[COLUMN["forward"]] = 1
            action[COLUMN["sprint"]] = self._sprints and far > 3.5
            if self._tick - self._moved > _STUCK:
                action[COLUMN["jump"]] = action[COLUMN["left"]] = 1
        elif far < _NEAR:
            action[COLUMN["back"]] = 1
        else:
            self._moved = self._tick
