"""The ladder over recorded events: a contractor's lines, or the events that a benchmark kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d4_datasets import contractor
from d4_datasets.errors import UserError
from d4_datasets.minecraft import RATE_HZ
from d4_sim.minecraft.episode import EVENTS_FORMAT, EVENTS_VERSION
from d4_sim.minecraft.game import Rung
from d4_sim.minecraft.tasks import MILESTONES, Ladder, Told, Watch


@dataclass(frozen=True)
class Recorded:
    """A recording as what happened in which tick, in order.

    Attributes:
        engine: the game, by name; recordings of contractors are of "minerl", the same game.
        ticks: of the whole recording.
        told: (tick, what happened) of every tick in which something did.
    """

    name: str
    engine: str
    rate_hz: float
    ticks: int
    told: tuple[tuple[int, Told], ...]


def read_recorded(path: Path) -> Recorded:
    """What happened in a recording of contractors, or in an episode of the benchmark.

    Raises:
        UserError: it is neither, of another version, damaged, or tells no events.
    """
    try:
        with path.open() as file:
            first = json.loads(file.readline())
    except (ValueError, UnicodeDecodeError):
        first = None
    if isinstance(first, dict) and first.get("format") == EVENTS_FORMAT:
        return _events(path, first)
    if not contractor.takes(path):
        raise UserError(f"{path} is neither a file of lines of a recording nor one of events of a benchmark")
    return _lines(path)


def _events(path: Path, head: Mapping[str, Any]) -> Recorded:
    if head.get("version") != EVENTS_VERSION:
        raise UserError(
            f"{path} holds events of version {head.get('version')}, this d4 reads {EVENTS_VERSION}: use the "
            "d4 that wrote it, or play the episode again"
        )
    told = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                continue
            try:
                event = json.loads(line)
                done = {str(task): float(amount) for task, amount in event["done"].items()}
                told.append((int(event["tick"]), Told(done, ())))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}: line {number} is damaged") from None
    try:
        return Recorded(
            str(path), str(head["engine"]), float(head["rate_hz"]), int(head["ticks"]), tuple(told)
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: line 1 is damaged ({error})") from None


def _lines(path: Path) -> Recorded:
    watch, told, ticks, tells = Watch(tuple(MILESTONES)), [], 0, False
    for ticks, line in enumerate(contractor.read_lines(path)):
        stats, items = contractor.counters(line)
        tells |= stats is not None or items is not None
        happened = watch.step(stats, items)
        if happened.amounts or happened.reached:
            told.append((ticks, happened))
    if not tells:
        raise UserError(f"{path} has neither counters nor an inventory in its lines: it tells no events")
    return Recorded(str(path), "minerl", RATE_HZ, ticks, tuple(told))


@dataclass(frozen=True)
class Climb:
    """A rung of a ladder over a recording: asked for from tick `begin` on, done at tick `end` if it was."""

    rung: Rung
    begin: int
    end: int | None
    done: float


def climb(rungs: Sequence[Rung], recorded: Recorded) -> Iterator[Climb]:
    """The rungs that a recording gets to, the one it ends on included."""
    ladder, begin = Ladder(rungs), 0
    for tick, told in recorded.told:
        at, before = ladder.rung, ladder.done
        ladder.step(told.amounts)
        if ladder.rung > at:
            rung = ladder.rungs[at]
            yield Climb(rung, begin, tick, before + told.amounts.get(rung.task, 0.0))
            begin = tick
    yield Climb(ladder.rungs[ladder.rung], begin, None, ladder.done)
