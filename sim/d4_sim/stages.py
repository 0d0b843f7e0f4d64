"""Long work as a chain of stages: public commands, what each needs, and what has been done already.

What is begun and done is noted in <out>/stages.json with a key of its commands, so that a second run reuses
it, an interrupted run goes on where it was, and changed arguments redo the stages that depend on them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from d4_datasets import whole
from d4_datasets.errors import UserError
from d4_datasets.locks import held
from d4_sim.children import following

# the public commands and the modules behind them, run by this interpreter whatever PATH says
MODULES = {
    "d4-record": "d4_sim.record",
    "d4-fetch": "d4_datasets.fetch",
    "d4-ingest": "d4_datasets.ingest",
    "d4-audit": "d4_datasets.audit",
    "d4-train": "d4_core.train",
    "d4-rollout": "d4_core.rollout",
    "d4-clone": "d4_core.clone",
    "d4-eval": "d4_sim.evaluate",
    "torchrun": "torch.distributed.run",  # d4-train on several GPUs
    # steps of a study that are no command of their own
    "measure": "d4_sim.measure",
    "ladder": "d4_sim.ladder",
    "crafter": "d4_sim.crafter.benchmark",
    "reference": "d4_sim.reference",
}
Command = tuple[str, ...]

_STATE = "stages.json"
_held: set[int] = set()  # locks of this process, which what it starts holds as well


@dataclass(frozen=True)
class Stage:
    """One step of a demo, a study, a bench or a recipe.

    Attributes:
        name: key in stages.json.
        title: what it does, for the heading.
        commands: the public commands, each with its arguments.
        needs: stages whose results it uses; it is redone when one of them is.
        makes: folders and files that are cleared away when it is redone with other arguments.
        typical_s: seconds it takes on two idle cores at this size.
        gated: a gate may fail in it, so that a result made with --force is not one made without.
        keeps: what it makes holds training time, and is set aside instead of cleared away.
        recipe: what shapes its result besides the commands, such as the settings of a preset.
        weight: slots that it takes among stages that run side by side.
    """

    name: str
    title: str
    commands: tuple[Command, ...]
    needs: tuple[str, ...]
    makes: tuple[Path, ...]
    typical_s: float
    gated: bool = True
    keeps: bool = False
    recipe: str = ""
    weight: int = 1


def command(name: str, *positional: Path | str, **options: Any) -> Command:
    """A public command with its options; a tuple gives an option several values, False leaves it out."""
    words = [name, *map(str, positional)]
    for key, value in options.items():
        if value is not False:
            words.append("--" + key.replace("_", "-"))
        if not isinstance(value, bool):
            words += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return tuple(words)


def keys(stages: Sequence[Stage]) -> dict[str, str]:
    """A key of every stage: equal keys mean equal results, wherever and however fast they were made.

    The stages must be planned for one folder and one number of processes whatever the real ones are.
    """
    out: dict[str, str] = {}
    for stage in stages:
        text = json.dumps([stage.commands, [out[name] for name in stage.needs]]) + stage.recipe
        out[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return out


def is_named(name: str, only: Sequence[str]) -> bool:
    """Whether a stage is one of those that --only names: by their names, or by the first parts of these, so
    that `arm` is all of arm-0 and arm-1, and nothing of arm_push-0. Nothing names all of them.
    """
    return not only or any(name == each or name.startswith((f"{each}/", f"{each}-")) for each in only)


class State:
    """What has been begun and done in an out folder, kept in stages.json.

    An entry holds `key`, `done`, `forced` (gates were allowed to fail) and `seconds` spent so far.
    """

    def __init__(self, out: Path, stages: Sequence[Stage], keys: Mapping[str, str], force: bool) -> None:
        self._path, self._stages, self._keys, self._force = out / _STATE, stages, keys, force
        self._entries: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self._entries = json.loads(self._path.read_text())
                if not all("key" in entry for entry in self._entries.values()):
                    raise ValueError
            except (ValueError, AttributeError, TypeError):
                raise UserError(f"{self._path} is damaged: restore it, or give another --out") from None

    def stale(self, only: tuple[str, ...] = ()) -> list[Stage]:
        """Stages that were begun with other arguments; of those that `only` names (`is_named`)."""
        begun = [s for s in self._stages if s.name in self._entries and is_named(s.name, only)]
        return [s for s in begun if not self._is_current(s.name)]

    def _is_current(self, name: str) -> bool:
        return bool(self._entries[name]["key"] == self._keys[name])

    def clear_stale(self, only: tuple[str, ...] = ()) -> list[str]:
        """Remove what stages made from other arguments, see `stale`; returns their names.

        A run folder, in which training time lies, is kept once beside the new one as <name>.previous. What
        was made of such results goes with them, whatever arguments come next.
        """
        stale = self.stale(only)
        for stage in stale:
            self._clear(stage)
        if stale:
            self._write()
        return [stage.name for stage in stale]

    def _clear(self, stage: Stage) -> None:
        if self._entries.pop(stage.name, None) is None:
            return
        for path in stage.makes:
            if stage.keeps:
                _set_aside(path)
            elif path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        for later in self._stages:
            if stage.name in later.needs:
                self._clear(later)

    def is_done(self, name: str) -> bool:
        """Whether the stage is finished, with these arguments; one whose gates were not in force counts with
        --force only.
        """
        entry = self._entries.get(name, {})
        return bool(entry.get("done")) and self._is_current(name) and (self._force or not entry["forced"])

    def note(self, stage: Stage, seconds: float, done: bool) -> None:
        """Add `seconds` of work on a stage, and whether that finished it."""
        name, forced = stage.name, self._force and stage.gated
        spent = round(self.seconds(name) + seconds, 1)
        self._entries[name] = {"key": self._keys[name], "done": done, "forced": forced, "seconds": spent}
        self._write()

    def seconds(self, name: str) -> float:
        """Time spent on a stage so far, over all runs."""
        return float(self._entries.get(name, {}).get("seconds", 0.0))

    def left_s(self) -> float:
        """Estimated seconds to the end: typical times, corrected by what the finished stages took; a few
        percent of the work tell little of the rest."""
        done = [s for s in self._stages if self.is_done(s.name)]
        typical, all_s = (sum(s.typical_s for s in some) for some in (done, self._stages))
        unknown = max(0.0, 0.05 * all_s - typical)
        speed = (sum(self.seconds(s.name) for s in done) + unknown) / (typical + unknown)
        left = (max(s.typical_s * speed - self.seconds(s.name), 1.0) for s in self._stages if s not in done)
        return sum(left)

    def _write(self) -> None:
        whole.write(self._path, json.dumps(self._entries, indent=1) + "\n")


@dataclass(frozen=True)
class Done:
    """What stages.json says of the stages that are planned now.

    Attributes:
        seconds: of each that is finished.
        missing: those that are not.
        stale: first parts of the names of those that were begun with other arguments, so that what lies
            there is of another run.
    """

    seconds: dict[str, float]
    missing: tuple[str, ...]
    stale: frozenset[str]


def read_done(out: Path, keys: Mapping[str, str]) -> Done:
    """The state of a folder, for pages; `keys` are those of its stages as they are planned."""
    entries = whole.read_json(out / _STATE, dict)
    found = {name: entries[name] for name in keys if name in entries}
    current = {name: entry for name, entry in found.items() if entry["key"] == keys[name]}
    seconds = {name: entry["seconds"] for name, entry in current.items() if entry["done"]}
    return Done(
        seconds,
        tuple(name for name in keys if name not in seconds),
        frozenset(name.partition("/")[0] for name in found if name not in current),
    )


def _set_aside(path: Path) -> None:
    if path.exists():
        previous = path.with_name(path.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold a folder of stages against a second run in it, whose notes would overwrite those of the first.

    Raises:
        UserError: another process holds it.
    """
    with held(out / ".lock", f"another run works in {out}: wait for it, or give another --out") as lock:
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


def start(words: Command, env: Mapping[str, str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a public command, with its output in a file or here.

    It leads a process group, so that Ctrl-C reaches it once, through us: a second signal would make it stop
    without saving. If this process is killed it is told to save and leave, and until then the folder that
    `alone` holds stays held. Only to be called by the main thread, whose end it follows.
    """
    name, *arguments = words
    return subprocess.Popen(
        [sys.executable, "-m", MODULES[name], *arguments], env=dict(env), stdout=output,
        stderr=None if output is None else subprocess.STDOUT, process_group=0,
        preexec_fn=following(signal.SIGTERM), pass_fds=tuple(_held),
    )  # fmt: skip


class Interrupted(Exception):
    """This process was told to stop, by the signal of this number; the child was, too, and has ended."""


def run_command(words: Command, env: Mapping[str, str]) -> int:
    """Run a public command and return its exit code (negative: the signal that killed it).

    Raises:
        Interrupted: after SIGINT, SIGTERM or SIGHUP, once the child has saved and left.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        if child is not None:
            # a closed terminal is a reason to save and leave, as Ctrl-C is
            child.send_signal(signal.SIGINT if number == signal.SIGHUP else number)

    with handled_by(pass_on):
        child = start(words, env)
        if received:
            child.send_signal(signal.SIGINT)
        code = child.wait()
    if received:
        raise Interrupted(received[0])
    return code


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle signals that end a process, except those that are ignored (nohup)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def ended(run: Callable[[], int]) -> int:
    """Exit code of work in stages: Ctrl-C is an end like any other."""
    try:
        return run()
    except (Interrupted, KeyboardInterrupt) as stop:
        print("stopped; what is done is kept and the same command continues", file=sys.stderr)
        return 128 + int(stop.args[0]) if isinstance(stop, Interrupted) else 130


def require_space(out: Path, needed: float, fewer: str) -> None:
    """Say that the disk is too small before the work.

    Args:
        needed: bytes, without what is there already.
        fewer: the option that makes it less.

    Raises:
        UserError: `out` has less space.
    """
    if (free := shutil.disk_usage(out).free) < needed:
        raise UserError(
            f"about {needed / 1e9:.1f} GB are needed in {out} and {free / 1e9:.1f} GB are free: "
            f"free some space, record fewer {fewer} or choose another --out"
        )


def size_of(*places: Path) -> int:
    """Bytes of all files below these folders."""
    return sum(p.stat().st_size for place in places for p in place.rglob("*") if p.is_file())


def require_recording(labelled: float, jobs: int | str) -> None:
    """Refuse what a recording, or the lanes, would refuse later. Raises UserError."""
    if not 0 < labelled <= 1:
        raise UserError(f"--labelled {labelled:g} must be above 0, for cloning, and at most 1")
    if isinstance(jobs, int) and jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1, or auto")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
