"""Stages at work side by side: one process each, their output in files, resumable and interruptible."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from d4_datasets.errors import UserError
from d4_sim import children, stages
from d4_sim.stages import Interrupted, Stage, State, clock, handled_by, is_named

_LEAVE_S = 300.0  # for what is told to save and leave, after which it is killed
_LATE_S = 40.0  # the same, where the time is up


class Lane:
    """A stage at work: its commands one after another, their output in a file."""

    def __init__(self, stage: Stage, log: Path, env: dict[str, str]) -> None:
        self.stage, self.log, self._env = stage, log, env
        self.began = time.monotonic()
        self._left = list(stage.commands)
        self._child: subprocess.Popen[bytes] | None = None

    def poll(self) -> int | None:
        """None while at work, else the exit code: 0, or that of the command that failed."""
        if self._child is not None:
            code = self._child.poll()
            if code is None or code:
                return code
        if not self._left:
            return 0
        words = self._left.pop(0)
        with self.log.open("ab") as file:
            file.write(f"$ {shlex.join(words)}\n".encode())
            file.flush()
            self._child = stages.start(words, self._env, file)
        return None

    def stop(self) -> None:
        """Tell the command to save and leave."""
        self._left.clear()
        if self._child is not None:
            # not SIGINT, which shells let background jobs ignore, and their children with them
            self._child.terminate()

    def wait(self, seconds: float) -> None:
        """Wait until the command has left, at most so long; then end it, and what is in its group."""
        if self._child is None:
            return
        try:
            self._child.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            children.end(self._child)


class Runner:
    """Runs stages side by side and talks about them. A failed stage stops those that need it, no others.

    Args:
        out: folder of everything; output of the stages goes to <out>/logs.
        planned: the stages; earlier ones matter more.
        keys: theirs, see `d4_sim.stages.keys`.
        jobs: slots; a stage takes as many as its `weight` says, and at most all of them.
        only: stages to run, see `d4_sim.stages.is_named`; empty: all of them.
        seconds: nothing is begun later than this, and what is still at work then is told to save and leave.
        redo: do again what was made with other arguments, of the stages of `only`, which clears it away.
        prepare, report: called before anything is cleared away or begun, where it may refuse, and after the
            last stage, whatever happened to it; not at all where the run is refused.

    Raises:
        UserError: `only` names no stage.
    """

    def __init__(
        self,
        out: Path,
        planned: Sequence[Stage],
        keys: Mapping[str, str],
        jobs: int,
        only: tuple[str, ...] = (),
        seconds: float | None = None,
        redo: bool = False,
        prepare: Callable[[], None] = lambda: None,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        self.redo, self._prepare, self._report = redo, prepare, report
        self.out, self.stages, self.jobs, self.only, self.seconds = out, list(planned), jobs, only, seconds
        for name in only:
            if not any(is_named(stage.name, (name,)) for stage in planned):
                raise UserError(
                    f"--only {name} begins no stage: they are {', '.join(stage.name for stage in planned)}"
                )
        self.console = Console(highlight=False, soft_wrap=True)
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self._keys = keys
        self.state = State(out, self.stages, keys, force=True)
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.lanes: list[Lane] = []
        self.failed: set[str] = set()
        self.began = time.monotonic()

    def run(self) -> int:
        """Run everything that is not done yet; returns 1 if a stage failed, else 0.

        Raises:
            Interrupted: after SIGINT, SIGTERM or SIGHUP, once all commands have saved and left.
            UserError: another run works here, or stages were made with other arguments.
        """
        with stages.alone(self.out):
            self.state = State(self.out, self.stages, self._keys, force=True)  # as it is now that it is ours
            self._require_redo()
            self._require_made()
            self._prepare()
            self.state.clear_stale(self.only)
            if self.missing:
                self._say(
                    f"{len(self.missing)} stages, about {clock(self.state.left_s() / self.jobs)} in all"
                )
            try:
                return self._run()
            finally:
                self._report()

    def _require_redo(self) -> None:
        stale = [stage.name for stage in self.state.stale(self.only)]
        if stale and not self.redo:
            raise UserError(
                f"{self.out} holds what was made with other arguments or settings: {', '.join(stale)}. Give "
                "another --out, or --redo, which clears that away and does it again"
            )

    def _require_made(self) -> None:
        """What took hours must not be gone without a word, and a page be written without it."""
        kept = [stage for stage in self.stages if stage.keeps and self.state.is_done(stage.name)]
        if gone := [str(path) for stage in kept for path in stage.makes if not path.exists()]:
            raise UserError(f"{gone[0]} is gone, though it was finished: restore it, or give another --out")

    def _run(self) -> int:
        received: list[int] = []
        with handled_by(lambda number, _: received.append(number)):
            while not received and not self.is_late:
                self._start()
                if not self.lanes:
                    break
                time.sleep(0.2)
                self._reap()
            for lane in self.lanes:
                lane.stop()
            until = time.monotonic() + (_LEAVE_S if received else min(_LEAVE_S, _LATE_S))
            for lane in self.lanes:
                lane.wait(until - time.monotonic())
                self.state.note(lane.stage, time.monotonic() - lane.began, done=False)
        if received:
            raise Interrupted(received[0])
        if self.is_late and self.lanes:
            self._say("time is up: " + ", ".join(lane.stage.name for lane in self.lanes) + " not finished")
        elif not self.is_late:
            self._name_waiting()
        return int(bool(self.failed))

    def _name_waiting(self) -> None:
        """Say which of the stages that were asked for need others that were not."""
        for stage in self.stages:
            open_ = [name for name in stage.needs if not self.state.is_done(name)]
            needed = [name for name in open_ if not self._is_wanted(name)]
            if needed and self._is_wanted(stage.name):
                self.failed.add(stage.name)
                self._say(f"{stage.name} needs {', '.join(needed)}, which --only leaves out")

    def _is_wanted(self, name: str) -> bool:
        return is_named(name, self.only)

    @property
    def missing(self) -> list[str]:
        """Names of the stages that are not done."""
        return [stage.name for stage in self.stages if not self.state.is_done(stage.name)]

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and time.monotonic() - self.began > self.seconds

    def _start(self) -> None:
        """Begin the most important stages that can begin."""
        busy = {lane.stage.name for lane in self.lanes}
        for stage in self.stages:
            free = self.jobs - sum(lane.stage.weight for lane in self.lanes)
            if free <= 0:
                return
            is_open = stage.name not in busy | self.failed and not self.state.is_done(stage.name)
            fits = stage.weight <= free or not self.lanes
            if is_open and self._is_wanted(stage.name) and fits and all(map(self.state.is_done, stage.needs)):
                self.state.note(stage, 0.0, done=False)  # with its key, should this process be killed
                self.lanes.append(Lane(stage, self._log(stage), self.env))
                self._say(f"begin {stage.name} ({stage.title})")

    def _reap(self) -> None:
        for lane in list(self.lanes):
            code = lane.poll()
            if code is None:
                continue
            self.lanes.remove(lane)
            seconds, name = time.monotonic() - lane.began, lane.stage.name
            self.state.note(lane.stage, seconds, done=code == 0)
            if code:
                self.failed.add(name)
            verdict = f"failed with exit code {code}, see {lane.log}" if code else f"done in {clock(seconds)}"
            left = clock(self.state.left_s() / self.jobs)
            self._say(f"{name} {verdict}; about {left} left in all")

    def _log(self, stage: Stage) -> Path:
        return self.out / "logs" / f"{stage.name.replace('/', '.')}.log"

    def _say(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)
        self.console.file.flush()
