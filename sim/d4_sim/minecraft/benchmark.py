"""The benchmark: many episodes in parallel environments, whatever happens to those, into a folder of results.

Every environment is a process of its own. One that gives no answer in time, dies, or fails after anything was
played, whatever it says of itself, is ended and started again; its episode is played again from its beginning
in the same world, and after `repeats` such repetitions counts as it stood when its environment was lost. One
that did not begin waits until the others were played, and counts as one without milestones if it never does,
until a later run of the same benchmark begins it. If no episode has ever begun, or many in a row do not, it
is not the episode: that ends the benchmark.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.minecraft.environment import Environment, Lost, Seen
from d4_sim.minecraft.episode import Episode, require_empty, sight, world_seed, write_events
from d4_sim.minecraft.game import MOST_LATE, Engine, Rung
from d4_sim.minecraft.keys import require_keyboard_and_mouse, to_action
from d4_sim.minecraft.policies import Policy
from d4_sim.minecraft.recorder import Recorder, remove_orphans, remove_parts
from d4_sim.minecraft.results import Results, versions
from d4_sim.minecraft.tasks import is_told

REPEATS = 2
_FALSE_STARTS = 3  # in a row, when no episode has ever begun
_RECYCLE = 50  # episodes in one environment: games, their maps and their memory grow
_STUCK = 10  # episodes in a row that do not begin, when others did


@dataclass(kw_only=True)
class Plan:
    """What a benchmark plays.

    Attributes:
        rungs: the prompts; one rung without a count is one task throughout.
        ticks: of the longest episode.
        seed: decides the worlds and all sampling.
        repeats: how often an episode whose environment was lost is played again.
        keep: folder for recordings of the episodes in the format of contractors; None for none.
    """

    engine: Engine
    options: Mapping[str, Any]
    rungs: tuple[Rung, ...]
    ticks: int
    seed: int = 0
    repeats: int = REPEATS
    keep: Path | None = None


@dataclass
class _Place:
    """One of the parallel environments, and what is played in it."""

    number: int
    environment: Environment | None = None
    todo: int | None = None  # the episode that is to be played, or is
    episode: Episode | None = None  # that, as soon as its first view is there
    recorder: Recorder | None = None
    policy_ms: list[float] = field(default_factory=list)
    began: float = 0.0
    played: int = 0  # episodes in this environment


class Benchmark:
    """Plays episodes and keeps their results.

    Args:
        tell: takes a line for a person.

    Raises:
        UserError: the policy acts on another kind of robot, or does not know a task of the ladder.
    """

    def __init__(
        self, plan: Plan, policy: Policy, results: Results, tell: Callable[[str], None] = print
    ) -> None:
        self.plan, self.policy, self.results, self.tell = plan, policy, results, tell
        require_ready(plan, policy)
        self._crashes: dict[int, int] = {}
        self._closing: list[threading.Thread] = []
        self._is_alone, there = True, results.episodes()
        self._has_begun = any(each.get("ticks", 0) > 0 for each in there)
        self._versions = set(versions(there))  # of the game so far, until it was told that this is another
        self._has_acted = False  # today: what worked before may be gone from this machine
        self._false_starts: list[int] = []  # episodes that did not begin, since the last one that did

    def play(self, numbers: Iterable[int], jobs: int) -> None:
        """Play these episodes, so many at a time. Every process has ended when this returns or fails."""
        self._ahead = list(numbers)
        self._total, self._finished, self._since = len(self._ahead), 0, time.monotonic()
        self._is_alone = min(jobs, len(self._ahead)) <= 1
        if self._ahead:
            self.policy.warm_up()
        if self.plan.keep is not None:
            remove_orphans(self.plan.keep)
        places = [_Place(number) for number in range(min(jobs, len(self._ahead)))]
        try:
            while self._assign(places):
                self._attend(places)
        finally:
            for place in places:
                self._end(place)
            for each in self._closing:
                each.join()

    def _assign(self, places: list[_Place]) -> bool:
        """Give idle places something to do; False when all is done."""
        for place in places:
            if place.todo is None and self._ahead:
                place.todo = self._ahead.pop(0)
                self._begin(place)
            elif place.todo is None:
                self._end(place)
        return bool(self._ahead) or any(place.todo is not None for place in places)

    def _begin(self, place: _Place) -> None:
        """Ask for the first view of what is to be played."""
        place.episode, place.policy_ms, place.began = None, [], time.monotonic()
        if place.environment is None:
            log = self.results.out / "logs" / f"environment-{place.number}.log"
            place.environment, place.played = Environment(self.plan.engine, self.plan.options, log), 0
            return  # it says when it is ready
        assert place.todo is not None
        try:
            place.environment.reset(world_seed(self.plan.seed, place.todo))
        except Lost as lost:
            self._lose(place, lost)

    def _attend(self, places: list[_Place]) -> None:
        """Wait for the next answers and deal with them, and with those that did not come."""
        busy = [(p, p.environment) for p in places if p.environment is not None and p.todo is not None]
        patience = min((e.deadline for _, e in busy), default=0.0) - time.monotonic()
        ready = set(select.select([e.fileno() for _, e in busy], [], [], max(0.0, patience))[0])
        now = time.monotonic()
        for place, environment in busy:
            # others go on meanwhile: of an answer a half may come, and nothing more
            if (environment.fileno() in ready and environment.has_answered()) or environment.deadline <= now:
                try:
                    self._answer(place, environment)
                except Lost as lost:
                    self._lose(place, lost)

    def _compare(self, version: str) -> None:
        """Say it, once, if what is to be added to was played in another version of the game."""
        if version and (odd := self._versions - {version}):
            self.tell(f"warning: played in {', '.join(sorted(odd))} so far, and this is {version}")
            self._versions = set()

    @contextmanager
    def _on_the_way(self) -> Iterator[None]:
        """For the user is what never worked; what fails later is another environment that was lost."""
        try:
            yield
        except UserError as error:
            if not self._has_acted:
                raise
            raise Lost(" ".join(str(error).split()).rstrip(".")) from None

    def _answer(self, place: _Place, environment: Environment) -> None:
        first = place.episode is None
        with self._on_the_way():
            seen = environment.receive()
        if seen is not None and first:
            require_empty(self.plan.engine, seen)
        if seen is None:  # the word that it is ready
            require_told(self.plan, environment)
            self._compare(environment.version)
            self._begin(place)
            return
        assert place.todo is not None
        if first:
            self._open(place)
        assert place.episode is not None
        changed = place.episode.observe(seen)
        if place.episode.ended:
            self._finish(place, seen)
            return
        if changed and not first:
            self.policy.ask(place.number, place.episode.task)
        action = self._act(place, seen)
        environment.step(action)
        self._has_acted = True
        if place.recorder is not None:  # after the action is on its way
            place.recorder.add(seen.image, seen.said, action)

    def _open(self, place: _Place) -> None:
        self._has_begun, self._false_starts = True, []
        place.episode = self._episode(place)
        self.policy.begin(place.number, place.episode.seed, place.episode.task)
        if self.plan.keep is not None:
            name = self.plan.engine.name
            who = self.policy.identity.replace(" ", "-")  # others' recordings may lie there, too
            stem = f"{name}-{who}-seed{self.plan.seed}-{self.results.identity}-{place.todo:06d}"
            remove_parts(self.plan.keep, stem)  # of this episode in a run that was killed
            place.recorder = Recorder(self.plan.keep, stem, engine=name)

    def _episode(self, place: _Place) -> Episode:
        assert place.todo is not None
        seed = world_seed(self.plan.seed, place.todo)
        return Episode(self.plan.engine, place.todo, seed, self.plan.rungs, self.plan.ticks)

    def _act(self, place: _Place, seen: Seen) -> np.ndarray:
        """The numbers for the environment: an action [25] of a game, a row [A] of a world."""
        engine, contract, began = self.plan.engine, self.policy.contract, time.perf_counter()
        row = self.policy.act(place.number, *sight(engine, contract, seen))
        place.policy_ms.append(1e3 * (time.perf_counter() - began))
        return row if engine.kind == "world" else to_action(contract, row)

    # ---- ends ----

    def _finish(self, place: _Place, seen: Seen) -> None:
        """Keep what was played, and be free for the next."""
        episode = place.episode
        assert episode is not None
        if place.recorder is not None:
            place.recorder.add(seen.image, seen.said, None)
        self._keep(place, cut=False)
        place.todo, place.episode = None, None
        place.played += 1
        if place.played >= _RECYCLE:
            self._end(place)

    def _keep(self, place: _Place, cut: bool) -> None:
        episode = place.episode
        assert episode is not None
        if place.recorder is not None:
            place.recorder.close()
            if place.recorder.refused:
                left_out = f"{place.recorder.refused} parts of its recording left out"
                self.tell(
                    f"episode {episode.number}: {left_out}, over {MOST_LATE:.0%} of their pictures late"
                )
            place.recorder = None
        write_events(self.results.out / "events" / f"{episode.number:06d}.jsonl", self.plan.engine, episode)
        seconds = time.monotonic() - place.began
        version = place.environment.version if place.environment else ""
        self.results.add(
            episode.result()
            | {"crashes": self._crashes.get(episode.number, 0), "cut": cut, "seconds": round(seconds, 2)}
            | {"policy_ms": _spread(place.policy_ms), "late_ms": _spread(episode.late_ms)}
            | {"action_ms": _spread(episode.action_ms), "missed": episode.missed, "version": version}
        )
        self._finished += 1
        rate = (time.monotonic() - self._since) / self._finished
        left = rate * (self._total - self._finished)
        got = len(episode.reached)
        last = f", last {list(episode.reached)[-1]}" if got else ""
        self.tell(
            f"episode {episode.number}: {got} milestone{'s' * (got != 1)}{last}, {episode.ticks} ticks in "
            f"{seconds:.0f} s; {self._finished}/{self._total}, about {_clock(left)} left"
        )

    def _lose(self, place: _Place, lost: Lost) -> None:
        """An environment hangs or died: end it, and decide what becomes of its episode."""
        number = place.todo
        assert number is not None
        log = place.environment.log if place.environment is not None else None
        self._end(place, orderly=False)
        if place.episode is None:
            self._count_false_start(number, lost, log)
        self._crashes[number] = self._crashes.get(number, 0) + 1
        if self._crashes[number] > self.plan.repeats and self._has_begun:
            self._give_up(place, lost)
            return
        if place.recorder is not None:
            place.recorder.discard()
            place.recorder = None
        if place.episode is None:
            self.tell(f"episode {number}: the environment does not start ({lost}); once more later")
            self._ahead.append(number)  # whether it is the episode shows when others are tried
            place.todo = None
            return
        self.tell(f"episode {number}: the environment was lost ({lost}); it is played again")
        self._begin(place)

    def _count_false_start(self, number: int, lost: Lost, log: Path | None) -> None:
        """Note that an episode did not begin.

        Raises:
            UserError: that cannot be for the episode alone.
        """
        self._false_starts.append(number)
        times = len(self._false_starts)
        if (times >= _FALSE_STARTS and not self._has_begun) or len(set(self._false_starts)) >= _STUCK:
            raise UserError(f"{self.plan.engine.title} does not start: {lost} ({times} times); see {log}")

    def _give_up(self, place: _Place, lost: Lost) -> None:
        """An episode whose environment was lost too often counts as it stood."""
        self.tell(f"episode {place.todo}: the environment was lost ({lost}); it counts as it stood")
        if place.episode is None:
            place.episode = self._episode(place)
            place.episode.ticks = 0
        place.episode.ended = "lost"
        self._keep(place, cut=True)
        place.todo, place.episode = None, None

    def _end(self, place: _Place, orderly: bool = True) -> None:
        """End an environment; aside where there are others, which in real time go on while this waits."""
        if place.environment is not None:
            grace = () if orderly else (0.0,)
            closing = threading.Thread(target=place.environment.close, args=grace)
            closing.start()
            place.environment = None
            if self._is_alone:  # the next one may want the same display
                closing.join()
            else:
                self._closing.append(closing)
        if orderly and place.recorder is not None:
            place.recorder.discard()
            place.recorder = None


def require_ready(plan: Plan, policy: Policy) -> None:
    """Check that a policy can play what is planned.

    Raises:
        UserError: its contract does not fit, or it does not know a task that will be asked for, or nobody can
            do that there.
    """
    require_fit(plan.engine, policy.contract, policy.name)
    for rung in plan.rungs:
        if rung.task in plan.engine.impossible:
            raise UserError(f"nobody can do {rung.task} in {plan.engine.title}: give another --prompt")
        policy.task_number(rung.task)


def require_told(plan: Plan, environment: Environment) -> None:
    """Check that an environment that is ready tells of all tasks, and plays as long as an episode is.

    Raises:
        UserError: a task would be asked for for ever, or episodes would end early.
    """
    name = plan.options.get("env", plan.engine.title)
    if environment.tells is not None:
        for rung in plan.rungs:
            if not is_told(rung.task, environment.tells):
                raise UserError(
                    f"{name} has no counter that tells {rung.task}, which would be asked for for ever: "
                    "leave out --env, or, if it shows the inventory, --prompt a task that leaves an item"
                )
    if environment.most_ticks is not None and environment.most_ticks < plan.ticks:
        minutes = environment.most_ticks / 60 / plan.engine.rate_hz
        raise UserError(f"{name} ends an episode after {minutes:g} minutes: give --minutes {minutes:g}")


def require_fit(engine: Engine, contract: Contract, name: str) -> None:
    """Check that a policy's contract is for what an engine is played with.

    Raises:
        UserError: it has another action space, or other observations.
    """
    if engine.kind == "game":
        require_keyboard_and_mouse(contract, name)
        return
    from d4_sim.world import world_class

    its = Contract.load(world_class(engine.name).contract_path())
    if its.hash != contract.hash:
        raise UserError(
            f"{name} is made for {contract.name}, not for {engine.name}: its "
            f"actions are {', '.join(contract.action_names)}, the game's {', '.join(its.action_names)}"
        )


def _spread(values: list[float]) -> list[float]:
    """Median, 95th percentile, maximum."""
    if not values:
        return []
    return [round(float(x), 2) for x in (*np.percentile(values, [50, 95]), max(values))]


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
