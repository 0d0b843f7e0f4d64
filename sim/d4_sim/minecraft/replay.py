"""The ladder over recorded events: a contractor's lines, or the events that a benchmark kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d4_datasets import contractor
from d4_datasets.errors import UserError
from d4_datasets.minecraft import RATE_HZ
from d4_sim.minecraft.episode import EVENTS_FORMAT, EVENTS_VERSION
from d4_sim.minecraft.game import Engine, Rung, engine
from d4_sim.minecraft.tasks import MILESTONES, Ladder, Told, Watch


@dataclass(frozen=True)
class Recorded:
    """A recording as what happened in which tick, in order.

    Attributes:
        engine: the game, by name: as the recording says, else "minerl", the game of contractors.
        ticks: of the whole recording.
        told: (tick, what happened) of every tick in which something did.
        had: milestones that were reached before it began.
        damaged: lines that could not be read, each a tick of which nothing is known.
    """

    name: str
    engine: str
    rate_hz: float
    ticks: int
    told: tuple[tuple[int, Told], ...]
    had: tuple[str, ...] = ()
    damaged: int = 0


def read_recorded(path: Path, game: str | None = None) -> Recorded:
    """What happened in a recording of contractors, or in an episode of the benchmark.

    Args: game: the engine of a recording that does not say it.

    Raises:
        UserError: it is neither, of another version or game, damaged, or tells no events.
    """
    try:
        with path.open() as file:
            first = json.loads(file.readline())
    except (ValueError, UnicodeDecodeError):
        first = None
    says = played(first)
    if game and says and game != says:
        raise UserError(f"{path} is of {engine(says).title}, not of {engine(game).title}: leave out --engine")
    if isinstance(first, dict) and first.get("format") == EVENTS_FORMAT:
        return _events(path, first)
    if not contractor.takes(path):
        raise UserError(f"{path} is neither a file of lines of a recording nor one of events of a benchmark")
    return _lines(path, engine(says or game or "minerl"))


def played(first: Any) -> str | None:
    """The engine that the first line of a file names, None if it names none."""
    says = first.get("engine") if isinstance(first, dict) else None
    return says if isinstance(says, str) else None


def _events(path: Path, head: Mapping[str, Any]) -> Recorded:
    if head.get("version") != EVENTS_VERSION:
        raise UserError(
            f"{path} holds events of version {head.get('version')}, this d4 reads {EVENTS_VERSION}: use the "
            "d4 that wrote it, or play the episode again"
        )
    try:
        name, rate_hz, ticks = str(head["engine"]), _positive(head["rate_hz"]), _tick(head["ticks"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: line 1 is damaged ({error})") from None
    game, told, last = engine(name), [], -1
    with path.open("rb") as file:  # decoded with each line, so that it can be named
        next(file)
        for number, line in enumerate(file, 2):
            try:
                event = json.loads(line)
                if isinstance(event, dict) and event.get("format") == EVENTS_FORMAT:
                    raise UserError(f"{path}: line {number} begins another episode: give a file of one")
                tick, happened = _tick(event["tick"]), _happened(game, event)
                if not last < tick <= ticks:
                    raise ValueError(tick)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}: line {number} is damaged") from None
            told.append((tick, happened))
            last = tick
    return Recorded(str(path), name, rate_hz, ticks, tuple(told))


def _happened(game: Engine, event: Mapping[str, Any]) -> Told:
    """What a line of events says; where it names no milestones, those of the tasks that were done."""
    done = {str(task): _amount(amount) for task, amount in event["done"].items()}
    if "reached" not in event:
        return Told(done, tuple(name for name in game.milestones if MILESTONES.get(name, name) in done))
    if not set(event["reached"]) <= set(game.milestones):
        raise ValueError(event["reached"])
    return Told(done, tuple(event["reached"]))


def _amount(value: Any) -> float:
    """A number from 0 on. Raises ValueError for anything else."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no amount")
    return float(value)


def _positive(value: Any) -> float:
    if not _amount(value) > 0:
        raise ValueError(f"{value!r} is not above 0")
    return float(value)


def _tick(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no tick")
    return int(value)


def _lines(path: Path, game: Engine) -> Recorded:
    if game.kind != "game":
        raise UserError(f"{path} names {game.title}, which is not played by keyboard and mouse")
    watch, told, ticks, damaged, tells = Watch(game.milestones), [], 0, 0, False
    for ticks, line in enumerate(contractor.read_lines(path)):
        damaged += line is None
        stats, items = contractor.counters(line)
        tells |= stats is not None or items is not None
        happened = watch.step(stats, items)
        if happened.amounts or happened.reached:
            told.append((ticks, happened))
    if not tells:
        raise UserError(f"{path} has neither counters nor an inventory in its lines: it tells no events")
    return Recorded(str(path), game.name, RATE_HZ, ticks, tuple(told), watch.had or (), damaged)


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
