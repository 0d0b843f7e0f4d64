"""`d4-minecraft record`: a person, a script or an old recording plays, written as data of contractors."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from d4_datasets import contractor, minecraft
from d4_datasets.errors import UserError
from d4_datasets.locks import held
from d4_sim.minecraft.environment import Environment, Lost, Seen
from d4_sim.minecraft.episode import recording_seed
from d4_sim.minecraft.game import PERIOD_S, Engine, View, named
from d4_sim.minecraft.hands import Window
from d4_sim.minecraft.recorder import Recorder, remove_orphans
from d4_sim.stages import handled_by

_TELL_S = 10.0
_NOTHING = minecraft.to_env(np.zeros(minecraft.SIZE))
_MOST_EMPTY = 3  # episodes in a row that a player ends before it plays
PERSON, SCRIPTED = "person", "scripted"


class Player(Protocol):
    """Who plays: an action float64 [25] for what is seen, None to stop."""

    def begin(self, seed: int) -> None:
        """An episode begins."""
        ...

    def act(self, seen: Seen) -> np.ndarray | None:
        """The action of this tick."""
        ...

    def close(self) -> None:
        """The session is over."""
        ...


class Person:
    """Whoever sits in front of the window."""

    def __init__(self, title: str, zoom: int) -> None:
        self._window = Window(title, zoom)

    def begin(self, seed: int) -> None:
        """Nothing to do."""

    def act(self, seen: Seen) -> np.ndarray | None:
        """Show the picture; what was done since the last one."""
        image = seen.image
        if (pointer := seen.said.get("pointer")) is not None:
            image = image.copy()
            minecraft.draw_pointer(image, *pointer)
        self._window.show(image)
        return self._window.hands.tick(time.monotonic()) if self._window.open else None

    def close(self) -> None:
        """Close the window."""
        self._window.close()


class Script:
    """A script: `make(seed)` returns something whose `act(View)` gives an action's dictionary, or None, which
    ends the episode.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make, self._script = make, None

    def begin(self, seed: int) -> None:
        """A fresh script. Raises UserError if it is none."""
        try:
            self._script = self._make(seed)
        except TypeError:
            self._script = None
        if not hasattr(self._script, "act"):
            raise UserError("--player: calling it with a seed must return something with a method act(view)")

    def act(self, seen: Seen) -> np.ndarray | None:
        """What the script does. Raises UserError if that is no action."""
        assert self._script is not None
        action = self._script.act(as_view(seen))
        return None if action is None else _checked(action)

    def close(self) -> None:
        """Nothing to do."""


def _checked(action: Any) -> np.ndarray:
    """A script's dictionary as an action [25]; a misspelt key would be one that is never pressed."""
    if not isinstance(action, Mapping):
        raise UserError(f"--player: the script acts with {type(action).__name__}, not with a dictionary")
    if odd := sorted(map(str, action.keys() - _NOTHING.keys())):
        raise UserError(f"--player: the script presses {odd[0]!r}; keys are {', '.join(_NOTHING)}")
    try:
        row = minecraft.from_env(action)
    except (TypeError, ValueError):
        raise UserError("--player: what the script does is not in numbers") from None
    if row.shape != (minecraft.SIZE,) or not (np.abs(row[len(minecraft.KEYS) :]) <= 180).all():
        raise UserError("--player: the script's camera is not pitch and yaw from -180 to 180 degrees")
    return row


class Again:
    """The actions of a recording, once more; where it does not know them, nothing is done."""

    def __init__(self, path: Path) -> None:
        if not contractor.takes(path):
            raise UserError(f"{path} is no file of lines of a recording (<name>.jsonl)")
        self._path = path

    def begin(self, seed: int) -> None:
        """From the first line on."""
        self._actions = self._read()

    def _read(self) -> Iterator[np.ndarray | None]:
        player = contractor.Player(contractor.version_of(self._path))
        for line in contractor.read_lines(self._path):
            yield player.step(line)

    def act(self, seen: Seen) -> np.ndarray | None:
        """The next line's action."""
        for action in self._actions:
            return np.zeros(minecraft.SIZE) if action is None else action
        return None

    def close(self) -> None:
        """Nothing to do."""


def as_view(seen: Seen) -> View:
    """What arrived as the `View` that a game gave."""
    said, pointer = seen.said, seen.said.get("pointer")
    return View(
        pov=seen.image, items=said.get("items"), stats=said.get("stats"), gui=bool(said.get("gui")),
        pointer=None if pointer is None else (float(pointer[0]), float(pointer[1])), slot=said.get("slot"),
        over=seen.over, late_ms=float(said.get("late_ms", 0.0)), more=said.get("more", {}),
    )  # fmt: skip


def make_player(who: str, engine: Engine, zoom: int) -> Player:
    """The player of this name: `person`, `scripted`, "module:function", or a file of lines.

    Raises:
        UserError: there is none, or no display for a person.
    """
    if who == PERSON:
        return Person(engine.title, zoom)
    if who == SCRIPTED:
        if not engine.player:
            raise UserError(f"{engine.title} has no scripted player: give --player person, or a recording")
        return Script(named(engine.player))
    path = Path(who)
    if path.exists():
        return Again(path)
    if ":" in who:
        sys.path.append(os.getcwd())  # a script of one's own lies where one is
        return Script(named(who))
    raise UserError(f"--player {who} is neither person, scripted, module:function nor a file of lines")


@dataclass
class Session:
    """What a session of recording came to."""

    ticks: int = 0
    episodes: int = 0
    parts: list[Path] = field(default_factory=list)
    refused: int = 0
    late_ms: list[float] = field(default_factory=list)
    action_ms: list[float] = field(default_factory=list)
    missed: int = 0
    told: float = field(default_factory=time.monotonic)

    def tell(self) -> None:
        """Say every few seconds how far it is."""
        if time.monotonic() - self.told > _TELL_S:
            self.told = time.monotonic()
            seconds = self.ticks * PERIOD_S
            print(f"{seconds:.0f} s played, {self.episodes} episodes finished", flush=True)

    def time(self, said: Mapping[str, Any]) -> None:
        """Note how late a view was, and, in a game in real time, the action before it."""
        self.late_ms.append(float(said.get("late_ms", 0.0)))
        if "action_ms" in (more := said.get("more", {})):
            self.action_ms.append(float(more["action_ms"]))
            self.missed += int(more.get("missed", 0))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long a session is: at most so many ticks in all, and of one episode; in worlds from `seed` on."""

    out: Path
    ticks: int
    episode_ticks: int
    episodes: int
    seed: int
    most_late: float


def play(engine: Engine, options: Mapping[str, Any], player: Player, settings: Settings) -> Session:
    """Record a session; every process has ended when this returns or fails.

    A signal that ends processes ends the session: what was played until then is kept.

    Raises:
        UserError: the game does not start, hangs or dies; what was finished before stays. Or another session
            records into the folder.
    """
    session, end = Session(), _End()
    settings.out.mkdir(parents=True, exist_ok=True)
    busy = f"another d4-minecraft record plays into {settings.out}: wait for it to end, or give another --out"
    with held(settings.out / ".record.lock", busy):
        remove_orphans(settings.out)
        with handled_by(end):
            _play(engine, options, player, settings, session, end)
    return session


class _End:
    """Ends a session at a signal, once, and not while something is half written."""

    def __init__(self) -> None:
        self._told = self._is_busy = False

    def __call__(self, number: int, frame: Any) -> None:
        is_first, self._told = not self._told, True
        if is_first and not self._is_busy:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def after(self) -> Iterator[None]:
        """What is written belongs together: a signal that comes in the middle ends the session at its end."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False
        if self._told:
            raise KeyboardInterrupt


def _play(
    engine: Engine,
    options: Mapping[str, Any],
    player: Player,
    settings: Settings,
    session: Session,
    end: _End,
) -> None:
    empty, number = 0, -1  # episodes in a row that were over at their first view
    log = settings.out / "logs" / "environment.log"
    environment = Environment(engine, options, log)
    try:
        _next(environment)
        while session.episodes < settings.episodes and session.ticks < settings.ticks:
            # an empty episode leaves no file that would take its number
            number = max(number + 1, _free_number(settings.out, engine.name))
            name = f"{engine.name}-{number:06d}"
            recorder, before = Recorder(settings.out, name, settings.most_late, engine.name), session.ticks
            try:
                goes_on = _episode(environment, player, settings, session, recorder, number, end)
            finally:  # what was played until then is data, too
                with end.after():
                    session.parts += recorder.close()
                    session.refused += recorder.refused
            if not goes_on:
                break
            empty = empty + 1 if session.ticks == before else 0
            if empty == _MOST_EMPTY:
                raise UserError(
                    f"{empty} episodes in a row ended at their first view: act(view) of --player must return "
                    f"an action (None ends one), and {engine.title} must go on; what was played is kept"
                )
    except KeyboardInterrupt:
        pass  # the session ends here
    except Lost as lost:
        raise UserError(f"{engine.title} was lost: {lost}; what was played is kept; see {log}") from None
    finally:
        environment.close()
        player.close()


def _episode(
    environment: Environment, player: Player, settings: Settings, session: Session, recorder: Recorder,
    number: int, end: _End,
) -> bool:  # fmt: skip
    """Play one; returns whether the player wants another."""
    seed = recording_seed(settings.seed, number)
    environment.reset(seed)
    player.begin(seed)
    seen, began, tick = _next(environment), time.monotonic(), 0
    assert seen is not None
    goes_on = True
    while not seen.over and tick < settings.episode_ticks and session.ticks < settings.ticks:
        if not environment.realtime and isinstance(player, Person):
            early = began + tick * PERIOD_S - time.monotonic()
            if early < -PERIOD_S:  # the game was slow: nobody can play what it missed at many times its pace
                began -= early
            time.sleep(max(0.0, early))
        action = player.act(seen)
        if action is None:
            goes_on = isinstance(player, Script)  # a script is done with the episode, a person with all
            break
        environment.step(action)
        with end.after():
            recorder.add(seen.image, seen.said, action)  # after the action is on its way
        arrived = _next(environment)
        assert arrived is not None
        seen, tick, session.ticks = arrived, tick + 1, session.ticks + 1
        session.time(seen.said)
        session.tell()
    with end.after():
        if tick:
            recorder.add(seen.image, seen.said, None)
        session.episodes += 1
    return goes_on


def _next(environment: Environment) -> Seen | None:
    return environment.receive()


def _free_number(out: Path, name: str) -> int:
    """The first number that no recording in the folder has."""
    used = [int(path.name.split("-")[1]) for path in out.glob(f"{name}-[0-9]*-[0-9]*.jsonl")]
    return max(used, default=-1) + 1
