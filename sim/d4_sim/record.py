"""`d4-record`: drives of scripted drivers as rosbag2 bags, as a robot would have logged them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from d4_datasets import whole
from d4_datasets.bags import BagWriter, compressed_image, float64_array, header, new
from d4_datasets.contract import Action, Contract, Observation
from d4_datasets.errors import UserError, run_cli
from d4_datasets.fields import write
from d4_datasets.locks import held
from d4_sim.driver import Episode, drive, end_pool, episode_seed, worker_pool
from d4_sim.mujoco_world import MujocoWorld
from d4_sim.suite.disturb import file_name
from d4_sim.world import make_world, world_class, write_contract

EPISODES_PER_BAG = 25
DROPPED_FRAMES = 0.01

_MS = 1_000_000
_EPOCH_NS = 1_767_225_600 * 10**9  # sessions are dated from 2026-01-01 on, one an hour
_SESSION_NS = 3600 * 10**9
_CAPTURE_LEAD_NS = 12 * _MS  # frame k is captured this long before tick k ...
_JITTER_NS = 2 * _MS  # ... give or take (standard deviation, at most four of them)
# From the last tick of an episode to tick 0 of the next it is so much less than a period: no tick between,
# and what came with the last tick does not come with tick 0 as well.
_EARLY_START_NS = _MS

_SETTINGS = "recording.json"


@dataclass(frozen=True)
class Args:
    """Records drives of a simulated world as rosbag2 bags (MCAP), one folder per session of 25 episodes.

    Run the same command again to continue an interrupted recording: finished bags are kept.
    """

    out: Path
    """Folder for the bags."""
    world: str = "yard"
    """World to drive in."""
    episodes: int = 1500
    """Episodes in all."""
    labelled: float = 0.15
    """Share of the bags that keep the command topic; the others are video with rewards."""
    seed: int = 0
    """Same seed, same bags."""
    jobs: int = 1
    """Processes, one bag each at a time."""


@dataclass(frozen=True)
class Session:
    """What one bag holds; enough to record it in any process, in any order."""

    path: Path
    world: str
    seed: int
    index: int
    first: int
    episodes: int
    labelled: bool


def plan_sessions(args: Args) -> list[Session]:
    """The bags of a recording; which of them keep the commands is drawn from the seed."""
    count, name = -(-args.episodes // EPISODES_PER_BAG), file_name(args.world)
    keep = round(args.labelled * count)
    if args.labelled > 0:
        keep = max(keep, 1)
    labelled = set(np.random.default_rng([args.seed, 3]).permutation(count)[:keep].tolist())
    return [
        Session(
            path=args.out / f"{name}-{i:04d}",
            world=args.world,
            seed=args.seed,
            index=i,
            first=i * EPISODES_PER_BAG,
            episodes=min(EPISODES_PER_BAG, args.episodes - i * EPISODES_PER_BAG),
            labelled=i in labelled,
        )
        for i in range(count)
    ]


class _Source(Protocol):
    """Anything in a contract that comes from a topic."""

    @property
    def topic(self) -> str: ...

    @property
    def type(self) -> str: ...


@dataclass(frozen=True)
class Event:
    """One message of a bag: receive stamp, topic, type, message."""

    stamp_ns: int
    topic: str
    type: str
    msg: Any


class SessionLog:
    """Turns driven episodes into the messages of one session, by the topics and fields of a contract.

    Raises UserError if the contract leaves out something that a drive has.
    """

    def __init__(self, contract: Contract, labelled: bool, rng: np.random.Generator) -> None:
        start, self._terminal = contract.episode.start, contract.episode.terminal
        if start is None or contract.tasks is None or contract.reward is None:
            raise UserError(
                f"the contract {contract.name} must name episode start, tasks and reward "
                "before drives can be recorded with it."
            )
        self._contract, self._labelled, self._rng = contract, labelled, rng
        self._start, self._tasks, self._reward = start, contract.tasks, contract.reward
        self._camera, self._action = contract.images[0], contract.actions[0]

    def events(self, episode: Episode, number: int, start_ns: int) -> list[Event]:
        """One episode's messages in receive order; tick 0 and the start message are at `start_ns`."""
        period, last = self._contract.period_ns, len(episode.frames) - 1
        name = self._contract.task_names[episode.task]
        events = [
            _event(start_ns - 6 * _MS, self._tasks, new(self._tasks.type, data=name)),
            _event(start_ns, self._start, new(self._start.type, data=number)),
        ]
        for k in range(last + 1):
            # Never the first one: a recorder starts an episode on a picture.
            dropped = bool(self._rng.random() < DROPPED_FRAMES) and k > 0
            events += self._tick(episode, k, start_ns + k * period, dropped)
        if self._terminal is not None:  # a robot that cannot fail has none
            over = new(self._terminal.type, data=bool(episode.is_terminal[-1]))
            events.append(_event(start_ns + last * period - 2 * _MS, self._terminal, over))
        return sorted(events, key=lambda event: event.stamp_ns)

    def _tick(self, episode: Episode, k: int, tick: int, dropped: bool) -> list[Event]:
        jitter = np.clip(self._rng.normal(0.0, _JITTER_NS), -4 * _JITTER_NS, 4 * _JITTER_NS)
        captured = tick - _CAPTURE_LEAD_NS + int(jitter)
        steady = tick - _CAPTURE_LEAD_NS - 4 * _JITTER_NS  # clocks that do not wait for the camera
        delay = int((2.0 + min(self._rng.exponential(1.5), 20.0)) * _MS)
        # What arrives with tick 0 must not come before the start message, or it belongs to no episode.
        early = 3 * _MS if k > 0 else 0
        events = [
            _event(steady + _MS, source, _vector(source, episode.vectors[source.name][k], steady))
            for source in self._contract.vectors()
        ]
        events.append(_event(tick - early, self._reward, float64_array(episode.reward[k])))
        if not dropped:
            picture = compressed_image(episode.frames[k], captured)
            events.append(_event(captured + delay, self._camera, picture))
        if self._labelled:
            # In force at capture + latency, so it leaves the driver a moment earlier. The last one is a stop.
            sent = steady + self._contract.latency_ns - int(self._rng.uniform(0, 2) * _MS)
            events.append(_event(sent, self._action, _vector(self._action, episode.action[k], sent)))
        return events


def _event(stamp_ns: int, source: _Source, msg: Any) -> Event:
    return Event(stamp_ns, source.topic, source.type, msg)


def _vector(source: Observation | Action, values: np.ndarray, stamp_ns: int) -> Any:
    """A message with `values` at the field paths of `source`, stamped if its type has a header."""
    msg = new(source.type)
    if hasattr(msg, "header"):
        msg.header = header(stamp_ns, "map")
    write(msg, source.select, values)
    return msg


def record_session(session: Session) -> int:
    """Drives and writes one bag, which gets its name once it is complete; returns its frames."""
    world = make_world(session.world)
    contract = world.contract
    log = SessionLog(contract, session.labelled, np.random.default_rng([session.seed, session.index, 2]))
    start_ns = _EPOCH_NS + session.index * _SESSION_NS
    custom = {"world": session.world, "seed": str(session.seed), "first_episode": str(session.first)}
    if issubclass(world_class(session.world), MujocoWorld):  # other versions draw other pictures
        custom["mujoco"] = version("mujoco")
    frames = 0
    with BagWriter(session.path, custom) as bag:
        for number in range(session.first, session.first + session.episodes):
            episode = drive(world, episode_seed(session.seed, number))
            for event in log.events(episode, number, start_ns):
                bag.write(event.topic, event.type, event.stamp_ns, event.msg)
            frames += len(episode.frames)
            start_ns += len(episode.frames) * contract.period_ns - _EARLY_START_NS
    return frames


def record(args: Args) -> None:
    """Records all sessions that are not there yet, with progress. Raises UserError for unusable settings."""
    _check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with held(args.out / ".lock", f"another d4-record writes to {args.out}: wait for it to end"):
        _record(args)


def _record(args: Args) -> None:
    _same_settings(args)
    write_contract(args.out / "robot.yaml", args.world)
    sessions = plan_sessions(args)
    todo = [s for s in sessions if not s.path.exists()]
    if len(todo) < len(sessions):
        print(f"{len(sessions) - len(todo)} of {len(sessions)} bags are there already")
    start, frames = time.perf_counter(), 0
    with _progress(len(todo)) as advance:
        for count in _run(todo, args.jobs):
            frames += count
            advance()
    seconds = time.perf_counter() - start
    labelled = sum(s.labelled for s in sessions)
    if todo:
        print(f"{frames} frames in {seconds:.0f} s ({frames / seconds:.0f} frames/s)")
    print(f"{args.out}: {len(sessions)} bags, {args.episodes} episodes, {labelled} bags with commands")
    print(f"next: d4-ingest {args.out} --contract {args.out / 'robot.yaml'} --out <dataset>")


def _run(todo: list[Session], jobs: int) -> Iterator[int]:
    if jobs == 1 or len(todo) < 2:
        yield from map(record_session, todo)
        return
    with worker_pool(min(jobs, len(todo))) as pool:
        futures: list[Future[int]] = [pool.submit(record_session, s) for s in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:  # a bag is whole or not there, and a planner's takes minutes
            end_pool(pool)
            raise


def _check(args: Args) -> None:
    make_world(args.world)
    if args.episodes < 1 or args.jobs < 1 or args.seed < 0:
        raise UserError("--episodes and --jobs must be at least 1 and --seed at least 0.")
    if not 0.0 <= args.labelled <= 1.0:
        raise UserError(f"--labelled {args.labelled} is a share: give a number from 0 to 1.")


def _same_settings(args: Args) -> None:
    """Refuses to continue a recording that was begun with other settings."""
    wanted = {k: v for k, v in asdict(args).items() if k not in ("out", "jobs")}
    path = args.out / _SETTINGS
    if path.exists():
        try:
            begun = json.loads(path.read_text())
        except json.JSONDecodeError:
            begun = None
        if begun != wanted:
            raise UserError(
                f"{args.out} holds a recording with other settings ({path.name}: {begun}): "
                "repeat those or choose another --out."
            )
        return
    whole.write(path, json.dumps(wanted, indent=1) + "\n")


class _Advance(Protocol):
    def __call__(self) -> None: ...


@contextmanager
def _progress(total: int) -> Iterator[_Advance]:
    """A bar with an estimate on a terminal, a line every tenth of the way elsewhere."""
    if sys.stdout.isatty():
        from rich.progress import Progress

        with Progress() as bar:
            task = bar.add_task("bags", total=total)
            yield lambda: bar.advance(task)
        return
    done, start = 0, time.perf_counter()

    def line() -> None:
        nonlocal done
        done += 1
        if done == total or done % max(1, total // 10) == 0:
            left = (time.perf_counter() - start) / done * (total - done)
            print(f"{done}/{total} bags, about {left:.0f} s left", flush=True)

    yield line


def cli() -> None:
    """The command `d4-record`."""
    import tyro

    record(tyro.cli(Args, prog="d4-record"))


def main() -> None:
    """Entry point with one-sentence errors."""
    run_cli(cli)


if __name__ == "__main__":
    main()
