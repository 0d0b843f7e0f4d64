"""One episode of the benchmark: what is asked for, what was reached when, and what a policy sees of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import messages, minecraft, whole
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.minecraft.environment import Lost, Seen
from d4_sim.minecraft.game import Engine, Rung
from d4_sim.minecraft.tasks import Ladder, Told, Watch

EVENTS_FORMAT, EVENTS_VERSION = "d4-minecraft-events", 1
_SEEDS = 2**31 - 1


def world_seed(seed: int, number: int) -> int:
    """The seed of the world of an episode of the benchmark, the same whatever engine or policy."""
    return _hashed(f"d4-minecraft {seed} {number}")


def recording_seed(seed: int, number: int) -> int:
    """The seed of the world of a recorded episode: other ones than those of the benchmark."""
    return _hashed(f"d4-minecraft record {seed} {number}")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _SEEDS


@dataclass(frozen=True)
class Event:
    """What was done in a tick, by task, and the milestones that were there for the first time."""

    tick: int
    amounts: Mapping[str, float]
    reached: tuple[str, ...] = ()


class Episode:
    """Follows an episode from its first view on.

    Attributes:
        ticks: since it began, those that passed unseen in a game in real time included.
        reached: milestone to the tick at which it was first there.
        prompts: (tick, task) whenever another task was asked for.
        events: every tick in which a task was accomplished or a milestone reached.
        late_ms, action_ms, missed: as views say it (`View`): how late each view was, and each action, and how
            many ticks passed unseen.
        achievements: counts of a world that has more than its tasks; None of others.
        ended: why it is over: "time", "game" (the player died, or the game says so), "lost" (as often as it
            is repeated, its environment died), or empty.
    """

    def __init__(self, engine: Engine, number: int, seed: int, rungs: Sequence[Rung], limit: int) -> None:
        self.engine, self.number, self.seed, self.limit = engine, number, seed, limit
        self._ladder = Ladder(rungs)
        self._watch = Watch(engine.milestones) if engine.kind == "game" else None
        self.ticks = -1
        self.reached: dict[str, int] = {}
        self.prompts: list[tuple[int, str]] = [(0, self._ladder.task)]
        self.events: list[Event] = []
        self.ended = ""
        self.late_ms: list[float] = []
        self.action_ms: list[float] = []
        self.missed = 0
        self.achievements: dict[str, int] | None = None

    @property
    def task(self) -> str:
        """What is asked for now."""
        return self._ladder.task

    @property
    def rung(self) -> int:
        """The rung of the ladder, from 0."""
        return self._ladder.rung

    def observe(self, seen: Seen) -> bool:
        """Take what arrived at the next tick; returns whether another task is asked for now."""
        unseen = self._unseen(seen)
        self.ticks += 1 + unseen
        self.missed += unseen
        # unseen ticks may have carried it past its end: what came then is too late
        told = self._told(seen) if self.ticks <= self.limit else Told({}, ())
        fresh = tuple(name for name in told.reached if name not in self.reached)
        self.reached.update(dict.fromkeys(fresh, self.ticks))
        if told.amounts or fresh:
            self.events.append(Event(self.ticks, told.amounts, fresh))
        self._time(seen)
        self.achievements = seen.said.get("achievements", self.achievements)
        if seen.over or self.ticks >= self.limit:
            self.ended = "time" if self.ticks >= self.limit else "game"
        changed = self._ladder.step(told.amounts)
        if changed:
            self.prompts.append((self.ticks, self._ladder.task))
        return changed

    def _time(self, seen: Seen) -> None:
        """Note how late a game in real time was."""
        self.late_ms.append(float(seen.said.get("late_ms", 0.0)))
        more = seen.said.get("more", {})
        if self.ticks > 0 and "action_ms" in more:
            self.action_ms.append(float(more["action_ms"]))

    def _unseen(self, seen: Seen) -> int:
        """Ticks that passed since the view before."""
        return 0 if self.ticks < 0 else int(seen.said.get("more", {}).get("missed", 0))

    def _told(self, seen: Seen) -> Told:
        if self._watch is None:
            done = {str(name): float(amount) for name, amount in seen.said.get("done", {}).items()}
            return Told(done, tuple(name for name in self.engine.milestones if name in done))
        return self._watch.step(seen.said.get("stats"), seen.said.get("items"))

    def result(self) -> dict[str, Any]:
        """What is kept of it, JSON."""
        more = {} if self.achievements is None else {"achievements": self.achievements}
        return more | {
            "episode": self.number, "seed": self.seed, "ticks": self.ticks, "ended": self.ended,
            "reached": self.reached, "rung": self.rung, "prompts": self.prompts,
        }  # fmt: skip


def require_empty(engine: Engine, seen: Seen) -> None:
    """Check the first view of an episode.

    Raises:
        Lost: it begins with something in the inventory; other worlds may not.
    """
    items = seen.said.get("items") if engine.kind == "game" else None
    if items:
        had = ", ".join(f"{count} {name}" for name, count in sorted(items.items())[:5])
        raise Lost(f"an episode begins with an empty inventory, and this one with {had}")


def sight(engine: Engine, contract: Contract, seen: Seen) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What a policy gets of a view: the picture as ingest would make it, and proprioception.

    Raises:
        UserError: a world shows another picture than the contract says.
    """
    stream = contract.images[0]
    assert stream.size is not None
    if engine.kind == "world":
        if seen.image.shape[:2] != stream.size:
            raise UserError(
                f"{engine.name} shows pictures of {seen.image.shape[:2]}, the contract {stream.size}"
            )
        vectors = seen.said.get("vectors", {})
        return seen.image, {name: np.asarray(values, np.float32) for name, values in vectors.items()}
    image = seen.image
    if (pointer := seen.said.get("pointer")) is not None:
        image = image.copy()
        minecraft.draw_pointer(image, *pointer)
    return messages.resize(minecraft.resize(image, stream.topic, stream.size), stream.size), {}


# ---- events on disk ----


def write_events(path: Path, engine: Engine, episode: Episode) -> None:
    """Write the events of an episode, for `d4-minecraft ladder --replay`."""
    head = {
        "format": EVENTS_FORMAT, "version": EVENTS_VERSION, "engine": engine.name,
        "rate_hz": engine.rate_hz, "ticks": episode.ticks, "seed": episode.seed,
    }  # fmt: skip
    lines = [
        head,
        *({"tick": e.tick, "done": dict(e.amounts), "reached": e.reached} for e in episode.events),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write(path, "".join(json.dumps(line) + "\n" for line in lines))
