"""`d4-demo`: the main job from bags to a policy, as a chain of the public commands.

Every stage runs commands that a user could type, each a process of its own; they are printed. What has been
done is noted in <out>/stages.json with a key of its arguments, so that a second run reuses it, an interrupted
run goes on where it was, and changed arguments redo the stages that depend on them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from d4_core import threads
from d4_datasets.errors import UserError, run_cli

# the public commands and the modules behind them, run by this interpreter whatever PATH says
MODULES = {
    "d4-record": "d4_sim.record",
    "d4-ingest": "d4_datasets.ingest",
    "d4-audit": "d4_datasets.audit",
    "d4-train": "d4_core.train",
    "d4-rollout": "d4_core.rollout",
    "d4-eval": "d4_sim.evaluate",
}
WORLD = "yard"
BASELINES = ("random", "data", "bc_scratch", "wm_bc")
IMPROVED = ("imagination", "expert")
Command = tuple[str, ...]

_STATE = "stages.json"
_UNGATED = ("record", "ingest")  # nothing in these is measured, so --force changes nothing
_BYTES_PER_EPISODE = 1_000_000  # bags, dataset, frame cache and latents of one episode, with room to spare
_BYTES_OF_RUN = 300_000_000  # checkpoints, videos and the report
_MOST_PICTURES = 6  # named after a stage

# Seconds that a stage took at the default size (docs/results/demo.md): what any run pays, and what grows
# with its size. Only the proportions matter once something has been measured.
_TYPICAL_S = {
    "record": (2, 34), "ingest": (3, 16), "audit": (3, 7), "tokenizer": (45, 200),
    "dynamics": (45, 640), "agent": (20, 530), "baseline": (8, 72), "imagination": (13, 130),
    "evaluate": (6, 5), "report": (2, 1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args:
    """From bags to a policy in one command: record, ingest, audit, train four phases, evaluate, report.

    A second run reuses what is there. After Ctrl-C the same command continues.
    """

    out: Path = Path("runs/demo")
    """Folder for everything that is made: bags, dataset, run."""
    episodes: int = 3000
    """Episodes to record."""
    labelled: float = 0.2
    """Share of the bags that keep the commands; the others are video with rewards."""
    seed: int = 0
    """Decides recording, training and evaluation."""
    scale: float = 1.0
    """Multiplies the training steps of every phase."""
    eval_episodes: int = 100
    """Episodes per policy in the evaluation."""
    preset: Literal["nano", "small", "base", "large", "paper"] = "nano"
    """Model size and training settings that go with it."""
    jobs: Literal["auto"] | int = "auto"
    """Processes that record and ingest; auto takes the free cores."""
    force: bool = False
    """Go on although a gate failed."""


@dataclass(frozen=True)
class Stage:
    """One step of the demo.

    Attributes:
        name: key in stages.json.
        title: what it does, for the heading.
        commands: the public commands, each with its arguments.
        needs: stages whose results it uses; it is redone when one of them is.
        makes: folders that are cleared away when it is redone with other arguments.
        typical_s: seconds it takes on two idle cores at this size.
    """

    name: str
    title: str
    commands: tuple[Command, ...]
    needs: tuple[str, ...]
    makes: tuple[Path, ...]
    typical_s: float


def plan(args: Args, jobs: int) -> list[Stage]:
    """The stages of the demo in their order; the last one, the report, has no command."""
    out, dataset, run, bags = args.out, args.out / "dataset", args.out / "run", args.out / "bags"
    common: dict[str, Any] = {"seed": args.seed, "scale": args.scale, "force": args.force}
    train = partial(command, "d4-train", dataset, run=run, preset=args.preset, **common)
    drive = partial(command, "d4-eval", run, dataset=dataset, episodes=args.eval_episodes, **common)
    film = partial(command, "d4-rollout", run, dataset=dataset, seed=args.seed)

    def stage(name: str, needs: str, title: str, *commands: Command, makes: tuple[Path, ...] = ()) -> Stage:
        return Stage(name, title, commands, tuple(needs.split()), makes, _typical_s(name, args))

    def phase(name: str, needs: str, title: str, makes: tuple[Path, ...] = ()) -> Stage:
        return stage(name, needs, title, train(phases=name), film(phase=name), makes=makes)

    def evaluate(name: str, needs: str, title: str, *policies: str) -> Stage:
        return stage(name, needs, title, drive(policies=policies))

    size: dict[str, Any] = {"episodes": args.episodes, "labelled": args.labelled, "seed": args.seed}
    record = command("d4-record", world=WORLD, **size, out=bags, jobs=jobs)
    ingest = command("d4-ingest", bags, contract=out / "robot.yaml", out=dataset, jobs=jobs)
    audit = command("d4-audit", dataset, json=out / "audit.json", sheet=out / "audit.png")
    return [
        stage("record", "", "drive the simulated robot and log it to bags", record, makes=(bags,)),
        stage("ingest", "record", "turn the bags into a dataset", ingest, makes=(dataset,)),
        stage("audit", "ingest", "look through the dataset", audit),
        phase("tokenizer", "ingest", "learn to compress pictures", makes=(run,)),
        phase("dynamics", "tokenizer", "learn how the world answers to actions"),
        phase("agent", "dynamics", "learn to imitate and to recognise reward"),
        evaluate("baseline", "agent", "drive as cloned with and without a world model", *BASELINES),
        phase("imagination", "agent", "improve the policy in imagination"),
        evaluate("evaluate", "baseline imagination", "drive with the improved policy", *IMPROVED),
        stage("report", "evaluate", "write the report"),
    ]


def command(name: str, *positional: Path, **options: Any) -> Command:
    """A public command with its options; a tuple gives an option several values, False leaves it out."""
    words = [name, *map(str, positional)]
    for key, value in options.items():
        if value is not False:
            words.append("--" + key.replace("_", "-"))
        if not isinstance(value, bool):
            words += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return tuple(words)


def _typical_s(name: str, args: Args) -> float:
    if name in ("record", "ingest", "audit"):
        size = args.episodes / 3000
    elif name in ("baseline", "evaluate"):
        size = args.eval_episodes / 100
    else:
        size = args.scale
    fixed, growing = _TYPICAL_S[name]
    return fixed + growing * size


def keys(args: Args) -> dict[str, str]:
    """A key of every stage: equal keys mean equal results, wherever and however fast they were made."""
    out: dict[str, str] = {}
    for stage in plan(dataclasses.replace(args, out=Path("out"), force=False), 1):
        text = json.dumps([stage.commands, [out[name] for name in stage.needs]])
        out[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return out


class State:
    """What has been begun and done in an out folder, kept in stages.json.

    An entry holds `key`, `done`, `forced` (gates were allowed to fail) and `seconds` spent so far.
    """

    def __init__(self, args: Args, stages: list[Stage]) -> None:
        self._path, self._stages, self._args = args.out / _STATE, stages, args
        self._keys = keys(args)
        self._entries: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self._entries = json.loads(self._path.read_text())
            except ValueError:
                sentence = f"{self._path} is damaged: delete it, finished work is found anyway"
                raise UserError(sentence) from None

    def clear_stale(self) -> list[str]:
        """Remove what stages made from other arguments; returns their names.

        A run folder, in which training time lies, is kept once beside the new one as <name>.previous.
        """
        entries, own = self._entries, self._keys
        stale = [s for s in self._stages if s.name in entries and entries[s.name]["key"] != own[s.name]]
        for stage in stale:
            for path in stage.makes:
                _set_aside(path) if stage.name == "tokenizer" else shutil.rmtree(path, ignore_errors=True)
            del entries[stage.name]
        if stale:
            self._write()
        return [stage.name for stage in stale]

    def is_done(self, name: str) -> bool:
        """Whether the stage is finished; one whose gates were not in force counts with --force only."""
        entry = self._entries.get(name, {})
        return bool(entry.get("done")) and (self._args.force or not entry["forced"])

    def note(self, name: str, seconds: float, done: bool) -> None:
        """Add `seconds` of work on a stage, and whether that finished it."""
        spent = round(self.seconds(name) + seconds, 1)
        forced = self._args.force and name not in _UNGATED
        self._entries[name] = {"key": self._keys[name], "done": done, "forced": forced, "seconds": spent}
        self._write()

    def seconds(self, name: str) -> float:
        """Time spent on a stage so far, over all runs."""
        return float(self._entries.get(name, {}).get("seconds", 0.0))

    def left_s(self) -> float:
        """Estimated seconds to the end: typical times, corrected by what the finished stages took."""
        done = [s for s in self._stages if self.is_done(s.name)]
        typical = sum(s.typical_s for s in done)
        speed = sum(self.seconds(s.name) for s in done) / typical if typical else 1.0
        left = (max(s.typical_s * speed - self.seconds(s.name), 1.0) for s in self._stages if s not in done)
        return sum(left)

    def _write(self) -> None:
        aside = self._path.with_name(f".tmp-{_STATE}")
        aside.write_text(json.dumps(self._entries, indent=1) + "\n")
        os.replace(aside, self._path)


def _set_aside(path: Path) -> None:
    if path.exists():
        previous = path.with_name(path.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)


class Interrupted(Exception):
    """This process was told to stop, by the signal of this number; the child was, too, and has ended."""


def run_command(words: Command, env: Mapping[str, str]) -> int:
    """Run a public command and return its exit code (negative: the signal that killed it).

    The child leads a process group, so that Ctrl-C reaches it once, through us: a second signal would make it
    stop without saving.

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

    with _handled_by(pass_on):
        name, *arguments = words
        argv = [sys.executable, "-m", MODULES[name], *arguments]
        child = subprocess.Popen(argv, env=dict(env), process_group=0)
        if received:
            child.send_signal(signal.SIGINT)
        code = child.wait()
    if received:
        raise Interrupted(received[0])
    return code


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle signals that end a process, except those that are ignored (nohup)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class Demo:
    """Runs the stages and talks about them."""

    def __init__(self, args: Args) -> None:
        jobs = threads.free_cores() if args.jobs == "auto" else args.jobs
        self.args, self.stages = args, plan(args, jobs)
        self.console = Console(highlight=False, soft_wrap=True)
        self.began = time.monotonic()
        self.env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        args.out.mkdir(parents=True, exist_ok=True)
        contract = resources.files("d4_sim") / f"{WORLD}.yaml"
        (args.out / "robot.yaml").write_bytes(contract.read_bytes())
        self.state = State(args, self.stages)

    def run(self) -> int:
        """Run everything that is not done yet; returns the exit code."""
        stale = self.state.clear_stale()
        if stale:
            self.say(f"other arguments than last time: {', '.join(stale)} will be done again")
        _require_space(self.args)
        for number, stage in enumerate(self.stages, 1):
            code = self._stage(number, stage)
            if code:
                return code
        self._end()
        return 0

    def say(self, text: str) -> None:
        """Print one line now, before the output of the next child."""
        self.console.print(text, markup=False)
        self.console.file.flush()

    def _stage(self, number: int, stage: Stage) -> int:
        place = f"[{number}/{len(self.stages)}] {stage.name}"
        if stage.commands and self.state.is_done(stage.name):
            self.say(f"{place}: done before, in {clock(self.state.seconds(stage.name))}")
            return 0
        passed = clock(time.monotonic() - self.began)
        self.say("")
        self.console.print(f"{place}: {stage.title}", style="bold", markup=False)
        self.say(f"{passed} passed, about {clock(self.state.left_s())} left")
        began, since, code = time.monotonic(), time.time(), 1
        try:
            code = self._commands(stage)
        finally:
            self.state.note(stage.name, time.monotonic() - began, done=code == 0)
        if code == 0:
            self._show(stage, since)
        return code

    def _commands(self, stage: Stage) -> int:
        """Run the commands of a stage until one fails; returns its exit code, or 0."""
        for words in stage.commands:
            self.say(f"$ {shlex.join(words)}")
            code = run_command(words, self.env)
            if code < 0:
                self.say(f"{words[0]} was killed by signal {-code} (9 often means that memory ran out)")
                code = 128 - code
            if code == 1 and stage.name == "audit" and self.args.force:
                self.say("the audit found errors; going on because of --force")
                code = 0
            if code:
                self.say(
                    f"stopped in stage {stage.name}: {words[0]} ended with exit code {code} and says why "
                    "above; the same command goes on from here"
                )
                return code
        return 0

    def _show(self, stage: Stage, since: float) -> None:
        """Name the pictures made since a time (unix seconds), and bring the report up to date."""
        run = self.args.out / "run"
        found = [*self.args.out.glob("*.png"), *(run / "media").glob("*.png"), *(run / "media").glob("*.mp4")]
        new = sorted(path for path in found if path.stat().st_mtime >= since)
        for path in new[:_MOST_PICTURES]:
            self.say(f"look at {path}")
        if len(new) > _MOST_PICTURES:
            self.say(f"and {len(new) - _MOST_PICTURES} more in {run / 'media'}")
        if run.exists():
            from d4_core.report import write_report

            path = write_report(run)
            if stage.commands:
                self.say(f"report so far: {path}")

    def _end(self) -> None:
        from d4_core.report import summary_table

        run = self.args.out / "run"
        self.say("")
        self.console.print(summary_table(run), soft_wrap=False)
        self.say(f"all of it took {clock(sum(self.state.seconds(s.name) for s in self.stages))}")
        self.say(f"report: {run / 'report.html'}")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _check(args: Args) -> None:
    """Refuse what a later stage would refuse after minutes of work."""
    if args.episodes < 1 or args.eval_episodes < 1 or args.seed < 0:
        raise UserError("--episodes and --eval-episodes must be at least 1 and --seed at least 0")
    if not args.scale > 0:
        raise UserError(f"--scale {args.scale:g} must be above 0")
    if not 0 < args.labelled <= 1:
        raise UserError(f"--labelled {args.labelled:g} must be above 0, for cloning, and at most 1")
    if args.jobs != "auto" and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1, or auto")


def _require_space(args: Args) -> None:
    """Say that the disk is too small before the work; what is there already counts as free."""
    there = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    needed = args.episodes * _BYTES_PER_EPISODE + _BYTES_OF_RUN - there
    free = shutil.disk_usage(args.out).free
    if free < needed:
        raise UserError(
            f"about {needed / 1e9:.1f} GB are needed in {args.out} and {free / 1e9:.1f} GB are free: "
            "free some space, record fewer --episodes or choose another --out"
        )


def main() -> None:
    """Entry point of ``d4-demo``."""
    run_cli(_main)


def _main() -> int:
    args = tyro.cli(Args, prog="d4-demo")
    _check(args)
    try:
        return Demo(args).run()
    except (Interrupted, KeyboardInterrupt) as stop:
        print("stopped; what is done is kept and the same command continues", file=sys.stderr)
        return 128 + int(stop.args[0]) if isinstance(stop, Interrupted) else 130


if __name__ == "__main__":
    main()
