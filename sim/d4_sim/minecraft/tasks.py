"""What is asked for and what is counted: tasks, milestones, the ladder of prompts, and the published figures.

Which counters and items stand for the 20 tasks is said in one place, `d4_datasets.minecraft.TASKS`: labels of
recordings and events of live games come out of the same table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d4_datasets import minecraft
from d4_sim.minecraft.game import Rung

TASKS = tuple(minecraft.TASKS)

# The items whose first appearance is measured, easiest first, and the task whose items these are.
MILESTONES = {
    "log": "mine_log", "planks": "craft_planks", "crafting_table": "craft_crafting_table",
    "stick": "craft_stick", "wooden_pickaxe": "craft_wooden_pickaxe", "cobblestone": "mine_cobblestone",
    "stone_pickaxe": "craft_stone_pickaxe", "iron_ore": "mine_iron_ore", "furnace": "craft_furnace",
    "iron_ingot": "craft_iron_ingot", "iron_pickaxe": "craft_iron_pickaxe", "diamond": "mine_diamond",
}  # fmt: skip

# The paper's prompts in their order. Counts are of items: 20 planks are five crafts.
LADDER = tuple(
    Rung(task, count)
    for task, count in (
        ("mine_log", 10), ("craft_planks", 20), ("craft_crafting_table", 1), ("place_crafting_table", 1),
        ("craft_stick", 4), ("craft_wooden_pickaxe", 1), ("use_wooden_pickaxe", 1), ("mine_cobblestone", 3),
        ("craft_planks", 4), ("craft_crafting_table", 1), ("place_crafting_table", 1), ("craft_stick", 4),
        ("craft_stone_pickaxe", 1), ("use_stone_pickaxe", 1), ("mine_iron_ore", 3), ("mine_cobblestone", 8),
        ("craft_planks", 4), ("craft_crafting_table", 1), ("place_crafting_table", 1), ("craft_furnace", 1),
        ("craft_iron_ingot", 3), ("craft_stick", 2), ("craft_iron_pickaxe", 1), ("use_iron_pickaxe", 1),
        ("mine_diamond", None),
    )
)  # fmt: skip


class Ladder:
    """Which task is asked for, tick by tick: the next one as soon as enough of the present one was done.

    What was done beyond the count of a rung, or before it was asked for, does not count for later rungs, and
    at most one rung is climbed in a tick: nobody was asked for the next one yet. The last rung stays.

    Args: rungs: at least one; those behind one without a count are never reached.
    """

    def __init__(self, rungs: Sequence[Rung]) -> None:
        if not rungs:
            raise ValueError("a ladder needs at least one rung")
        self.rungs = tuple(rungs)
        self.rung, self.done = 0, 0.0

    @property
    def task(self) -> str:
        """What is asked for now."""
        return self.rungs[self.rung].task

    def step(self, amounts: Mapping[str, float]) -> bool:
        """Count what was done in a tick, by task; returns whether another task is asked for now."""
        count = self.rungs[self.rung].count
        self.done += amounts.get(self.task, 0.0)
        if count is None or self.done < count or self.rung == len(self.rungs) - 1:
            return False
        before = self.task
        self.rung, self.done = self.rung + 1, 0.0
        return self.task != before


@dataclass(frozen=True)
class Told:
    """What happened in a tick: amounts of tasks that were accomplished, and milestones in hand."""

    amounts: Mapping[str, float]
    reached: tuple[str, ...]


class Watch:
    """Tasks and milestones of one episode, from the counters and items that a game tells.

    A milestone is reached when the inventory holds its item; where a game tells no inventory, when the
    counter of its task grows. The first tick is what later ones are compared with.

    Attributes: had: milestones whose items were there in the first inventory, which nobody reaches any more.
    """

    def __init__(self, milestones: Sequence[str]) -> None:
        self._events = minecraft.Events(TASKS)
        self._milestones = {name: MILESTONES[name] for name in milestones}
        self.had: tuple[str, ...] | None = None

    def step(self, stats: Mapping[str, Any] | None, items: Mapping[str, Any] | None) -> Told:
        """What the tick that ended with these counters and items brought."""
        amounts = self._events.amounts(stats, items)
        done = {TASKS[k]: float(amounts[k]) for k in np.flatnonzero(amounts)}
        reached = tuple(
            name
            for name, task in self._milestones.items()
            if (task in done if items is None else _holds(items, task))
        )
        if self.had is None and items is not None:
            self.had = reached
        return Told(done, tuple(name for name in reached if name not in (self.had or ())))


def is_told(task: str, tells: Collection[str]) -> bool:
    """Whether a game tells when a task is done.

    Args: tells: families of its counters ("mine_block", ...), and "inventory" if it shows that. Without any
        counters of blocks and items the inventory counts.
    """
    if not {"mine_block", "craft_item", "use_item"} & set(tells):
        return "inventory" in tells and bool(minecraft.TASKS[task].items)
    return all(key.split(":")[0].removeprefix("minecraft.") in tells for key in minecraft.TASKS[task].stats)


def _holds(items: Mapping[str, Any], task: str) -> bool:
    return any(items.get(item, 0) > 0 for item in minecraft.TASKS[task].items)


# ---- what others reached ----


@dataclass(frozen=True)
class Published:
    """Figures of one agent in Minecraft by milestone, as published; None where the paper has none.

    Attributes:
        name: heading of its column.
        success: per cent of 1000 episodes.
        minutes: mean time in the episodes that got there.
    """

    name: str
    success: Mapping[str, float]
    minutes: Mapping[str, float | None]


PUBLISHED_MINUTES = 60  # length of an episode
PUBLISHED_ENV = "MineRLHumanSurvival-v0"
SOURCE = (
    f"Dreamer 4 (arXiv:2509.24527), Tables 7 and 8: 1000 episodes of {PUBLISHED_MINUTES} minutes with an "
    "empty inventory, minutes over successful episodes, where the paper has them"
)


def _published(name: str, success: Sequence[float], minutes: Sequence[float | None]) -> Published:
    left_out: list[float | None] = [None] * (len(MILESTONES) - len(minutes))
    return Published(
        name,
        dict(zip(MILESTONES, success, strict=True)),
        dict(zip(MILESTONES, [*minutes, *left_out], strict=True)),
    )


PUBLISHED = (
    _published(  # cloned from 270,000 h of web video, then from early-game recordings
        "VPT (finetuned)",
        (84.3, 65.3, 4.7, 52.6, 0.0, 6.9, 0.0, 0.1, 0.0, 0.1, 0.0, 0.0),
        (6.3, 14.2, 27.5, 24.0),
    ),
    _published(
        "BC",
        (97.3, 95.7, 93.5, 95.0, 86.5, 83.9, 53.8, 26.5, 16.2, 4.3, 0.6, 0.0),
        (1.8, 4.3, 9.5, 6.4, 11.4, 13.3, 15.8, 20.9, 24.5, 28.8, 29.1),
    ),
    _published(  # Gemma 3
        "VLA",
        (98.5, 98.3, 97.2, 97.7, 94.1, 91.6, 76.7, 46.3, 42.4, 22.5, 11.2, 0.0),
        (2.2, 3.4, 7.2, 5.0, 9.8, 12.1, 14.5, 23.5, 24.7, 30.8, 31.1),
    ),
    _published(
        "WM+BC",
        (99.6, 99.6, 99.1, 98.9, 97.3, 97.2, 89.4, 62.9, 51.1, 27.8, 16.9, 0.0),
        (1.2, 2.1, 4.6, 3.1, 5.7, 6.7, 8.9, 14.3, 16.1, 17.2, 17.0),
    ),
    _published(
        "Dreamer 4",
        (99.1, 98.9, 98.5, 98.7, 96.6, 95.9, 90.1, 66.7, 58.1, 39.5, 29.0, 0.7),
        (0.9, 2.0, 4.4, 2.9, 5.0, 5.6, 6.7, 9.9, 11.0, 12.4, 13.3, 20.7),
    ),
)
