"""Training as child processes: the stages of a goal, their progress, and an orderly end at any moment.

What runs is d4-ingest and d4-train themselves, with a Python that has torch. This process needs none of it:
it reads what they write, passes on when they are to stop, and takes them with it when it dies.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from d4_datasets.errors import UserError

PHASES = ("tokenizer", "dynamics", "agent", "imagination")
DATASET = "dataset"  # folder in the run folder for what is made of bags

_COMMANDS = {"d4-ingest": "d4_datasets.ingest", "d4-train": "d4_core.train"}
_OWN_OPTIONS = ("--run", "--phases", "--preset")
_POLL_S = 0.25
_TAIL_BYTES = 1 << 16  # of metrics.jsonl: many lines
_KEPT_LINES = 60  # of what a child says on stderr, to tell why it ended

# The child asks the kernel to kill it when the thread that started it is gone: nothing else holds if this
# process gets SIGKILL. A request to stop must reach it even where SIGINT was ignored (`&`, nohup).
_START = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):
    sys.exit("error: server_python must be a Python itself, not a script that starts one")
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *command])
"""


@dataclass(frozen=True)
class Goal:
    """What to train, as in Train.action; `phase` is one of PHASES, or empty or "all" for all of them."""

    dataset: str = ""
    bags: tuple[str, ...] = ()
    contract: str = ""
    out: str = ""
    phase: str = ""
    preset: str = ""
    overrides: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UserError if something is missing or contradicts itself."""
        if not self.out:
            raise UserError("`out` is empty: name the run folder that the training writes to")
        if bool(self.dataset) == bool(self.bags):
            raise UserError("give either `dataset`, or `bags` and `contract`")
        if self.bags and not self.contract:
            raise UserError("`bags` need a `contract`: the robot.yaml that says what is in them")
        if self.phase not in ("", "all", *PHASES):
            raise UserError(f"`phase` {self.phase!r} is none: choose {', '.join(PHASES)} or all")
        for word in self.overrides:
            if word.split("=")[0] in _OWN_OPTIONS:
                raise UserError(f"{word} does not belong into `overrides`: the goal has a field for it")


@dataclass(frozen=True)
class Progress:
    """Where the training is: `step` of `steps` of this stage (of ingest: percent of the bags)."""

    stage: str
    step: int
    steps: int
    seconds_left: float = -1.0  # of this stage; negative: unknown
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How it ended: `message` says what went wrong or what to do next; no `checkpoint` is an empty one."""

    success: bool
    message: str
    checkpoint: str = ""
    stopped: bool = False  # as it was asked to


class _Stopped(Exception):
    """The child ended because it was asked to."""


class Training:
    """One goal from its first stage to its outcome.

    Args:
        goal: what to train.
        python: the interpreter that has d4 installed.
        say: takes every line that the children write.
        stop_s: how long a child may take to save and leave before it is killed, s.
    """

    def __init__(
        self, goal: Goal, python: str, say: Callable[[str], None] = print, stop_s: float = 60.0
    ) -> None:
        self.goal, self.outcome = goal, Outcome(False, "it has not run")
        self._python, self._say, self._stop_s = os.path.expanduser(python), say, stop_s
        self._out = _absolute(goal.out)
        self._stopping = threading.Event()
        self._was_killed = False

    def stop(self) -> None:
        """Ask for the end, from any thread: a checkpoint is left from which the same goal goes on."""
        self._stopping.set()

    def run(self) -> Generator[Progress, None, None]:
        """Run all stages, in this thread, to `outcome`; closing the iterator kills what runs."""
        try:
            self.goal.check()
            if self.goal.bags:
                yield Progress("ingest", 0, 100)
                yield from self._run("d4-ingest", self._ingest_words(), _read_ingest)
            yield from self._run("d4-train", self._train_words(), _TrainReader(Path(self._out)))
            self.outcome = self._success()
        except UserError as error:
            self.outcome = Outcome(False, str(error), self._newest())
        except _Stopped:
            self.outcome = self._stopped()

    # -- commands --

    @property
    def _dataset(self) -> str:
        return _absolute(self.goal.dataset) if self.goal.dataset else os.path.join(self._out, DATASET)

    def _ingest_words(self) -> list[str]:
        bags = [_absolute(bag) for bag in self.goal.bags]
        return [*bags, "--contract", _absolute(self.goal.contract), "--out", self._dataset]

    def _train_words(self) -> list[str]:
        words = [self._dataset, "--run", self._out]
        words += ["--preset", self.goal.preset] if self.goal.preset else []
        words += ["--phases", self.goal.phase] if self.goal.phase in PHASES else []
        return [*words, *self.goal.overrides]

    def _run(
        self, name: str, words: Sequence[str], read: Callable[[Sequence[str]], Progress | None]
    ) -> Iterator[Progress]:
        """Run a command to its end; raises UserError with its own sentence, or _Stopped."""
        if self._stopping.is_set():
            raise _Stopped
        self._say(f"$ {shlex.join([name, *words])}")
        child = _Child(self._python, _COMMANDS[name], words)
        try:
            yield from self._follow(child, read)
        finally:
            child.kill()
        if child.code and self._stopping.is_set():
            raise _Stopped
        if child.code:
            raise UserError(_reason(name, self._python, child.code, child.errors))

    def _follow(self, child: _Child, read: Callable[[Sequence[str]], Progress | None]) -> Iterator[Progress]:
        until = math.inf
        while True:
            is_over = child.is_over()
            if self._stopping.is_set() and until == math.inf:
                child.interrupt()
                until = time.monotonic() + self._stop_s
            if time.monotonic() > until and not is_over:
                self._was_killed = True
                child.kill()
            lines = child.lines(_POLL_S)
            for line in lines:
                self._say(line)
            progress = read(lines)
            if progress is not None:
                yield progress
            if is_over:
                return

    # -- outcomes --

    def _newest(self) -> str:
        folder = newest_checkpoint(Path(self._out)) if self.goal.out else None
        return "" if folder is None else str(folder)

    def _success(self) -> Outcome:
        last = self.goal.phase if self.goal.phase in PHASES else PHASES[-1]
        folder = Path(self._out) / last
        if not (folder / "config.json").exists():  # such as after --help
            return Outcome(False, f"d4-train ended without {last}: see `overrides`", self._newest())
        if last in PHASES[:2]:
            following = PHASES[PHASES.index(last) + 1]
            message = f"{last} is trained; next: the same goal with phase {following}"
        else:
            run = shlex.quote(self._out)
            message = (
                f"the policy is trained; next: ros2 launch d4_bringup policy.launch.py checkpoint:={run}"
            )
            if last == "agent":
                message += ", or first improve it with the same goal and phase imagination"
        return Outcome(True, message, str(folder))

    def _stopped(self) -> Outcome:
        newest = self._newest()
        late = f"it did not stop within {self._stop_s:g} s and was killed; " if self._was_killed else ""
        if not newest:
            text = "stopped before the first checkpoint; the same goal goes on with what is there"
            return Outcome(False, late + text, stopped=True)
        config = json.loads((Path(newest) / "config.json").read_text())
        where = f"{config['phase']} is saved at step {config['step']} of {config['total_steps']}"
        return Outcome(
            False, f"{late}stopped; {where}, the same goal goes on from there", newest, stopped=True
        )


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint folder of a run that was written last; None if there is none."""
    found = [run / phase for phase in PHASES if (run / phase / "config.json").exists()]
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime_ns, default=None)


# -- what the commands write --


class _TrainReader:
    """Progress of d4-train: the newest line of metrics.jsonl that this run of it has written."""

    def __init__(self, run: Path) -> None:
        self._run, self._since = run, time.time()
        self._shown: tuple[str, int] | None = None

    def __call__(self, lines: Sequence[str]) -> Progress | None:
        entry = _last_line(self._run / "metrics.jsonl")
        if entry is None or entry["time"] < self._since or (entry["phase"], entry["step"]) == self._shown:
            return None
        stage, step = self._shown = entry["phase"], entry["step"]
        settings = yaml.safe_load((self._run / "config.yaml").read_text())["settings"]
        steps = settings[f"{stage}_training"]["steps"]
        values = {k: float(v) for k, v in entry.items() if k not in ("phase", "step", "time")}
        return Progress(stage, step, steps, values["step_s_mean"] * (steps - step), values)


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last complete line of a file of JSON lines."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    except OSError:
        return None
    return json.loads(lines[-1]) if lines else None


def _read_ingest(lines: Sequence[str]) -> Progress | None:
    """Progress of d4-ingest, from lines such as `37%, 12000 frames, 40 s left`."""
    found = [match for line in lines if (match := re.match(r"(\d+)%, (\d+) frames, (\d+) s left", line))]
    if not found:
        return None
    percent, frames, left = map(int, found[-1].groups())
    return Progress("ingest", percent, 100, float(left), {"frames": float(frames)})


def _reason(name: str, python: str, code: int, errors: Sequence[str]) -> str:
    """Why a command ended with `code`, in one sentence: its own, if it has said one."""
    own = [line[len("error: ") :] for line in errors if line.startswith("error: ")]
    if code == 2 and own:
        return own[-1]
    box = [line.strip("│ ") for line in errors if line.startswith("│")]  # how options are complained about
    if code == 2 and box:
        return f"{name}: " + " ".join(line for line in box if line.strip("─"))
    if code < 0:
        return f"{name} was killed by signal {-code} (9 often means that memory ran out)"
    last = errors[-1] if errors else "it did not say why"
    if "No module named" in last:
        return (
            f"{python} cannot run {name} ({last.strip()}): set the parameter server_python, or the "
            "environment variable D4_PYTHON, to the Python that has d4 installed"
        )
    return f"{name} ended with exit code {code}: {last}"


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


# -- the child --


class _Child:
    """A command of d4 as a process in a session of its own, so that a terminal's Ctrl-C does not reach it:
    a second SIGINT would mean to leave without saving.

    Raises:
        UserError: the interpreter cannot be started.
    """

    def __init__(self, python: str, module: str, words: Sequence[str]) -> None:
        command = [python, "-c", _START, str(os.getpid()), "-m", module, *words]
        # its Python has its own packages; those of ROS would only shadow them
        environment = {**os.environ, "PYTHONPATH": "", "OMP_WAIT_POLICY": "PASSIVE"}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=environment, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"{python} cannot be started ({error.strerror}): set the parameter server_python, or the "
                "environment variable D4_PYTHON, to the Python that has d4 installed"
            ) from None
        self.errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        streams = ((self._process.stdout, False), (self._process.stderr, True))
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()

    @property
    def code(self) -> int | None:
        """Its exit code, negative for the signal that killed it; None while it runs."""
        return self._process.poll()

    def is_over(self) -> bool:
        """Whether it has ended and all it said can be read."""
        if self._process.poll() is None:
            return False
        for reader in self._readers:
            reader.join(5.0)  # its own children may hold its output a moment longer
        return True

    def lines(self, wait_s: float) -> list[str]:
        """What it has said since the last call; waits for the first line."""
        found: list[str] = []
        try:
            found.append(self._lines.get(timeout=wait_s))
            while True:
                found.append(self._lines.get_nowait())
        except queue.Empty:
            return found

    def interrupt(self) -> None:
        """Ask it to save and leave."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self._process.kill()
        self._process.wait()

    def _read(self, stream: IO[str], is_error: bool) -> None:
        with stream:
            for line in stream:
                text = line.rstrip()
                if is_error and text:
                    self.errors.append(text)
                if text:
                    self._lines.put(text)
