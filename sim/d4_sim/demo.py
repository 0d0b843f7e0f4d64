"""`d4-demo`: the main job from bags to a policy, as a chain of the public commands.

Every stage runs commands that a user could type, each a process of its own; they are printed. A second run
reuses what is there, and an interrupted run goes on where it was (`d4_sim.stages`).
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from d4_core import threads
from d4_datasets.errors import UserError, run_cli
from d4_sim.stages import (
    Command,
    Stage,
    State,
    alone,
    clock,
    command,
    ended,
    keys,
    require_recording,
    require_space,
    run_command,
    size_of,
)
from d4_sim.study import Args as StudyArgs
from d4_sim.study import Study
from d4_sim.world import world_class, write_contract

WORLD = "yard"
BASELINES = ("random", "data", "bc_scratch", "wm_bc")
IMPROVED = ("imagination", "expert")

_BYTES_PER_EPISODE = 1_000_000  # bags, dataset, frame cache and latents of one episode, with room to spare
_BYTES_OF_RUN = 300_000_000  # checkpoints, videos and the report
_MOST_PICTURES = 6  # named after a stage

# Seconds of a stage on two idle cores (docs/results/demo.md): what any run pays, and what grows with its size
# (per 3000 episodes where it is the recording). Only the proportions matter once something has been measured.
_TYPICAL_S = {
    "record": (2, 45), "ingest": (3, 20), "audit": (3, 9), "tokenizer": (97, 198),
    "dynamics": (45, 414), "agent": (20, 355), "baseline": (8, 85), "imagination": (15, 191),
    "evaluate": (4, 10), "report": (2, 1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args:
    """From bags to a policy in one command: record, ingest, audit, train four phases, evaluate, report.

    A second run reuses what is there. After Ctrl-C the same command continues.
    """

    study: Literal["learning"] | None = None
    """Instead of one run, the experiment of docs/results/learning.md, in <out>/learning: chains over several
    seeds and worlds, all baselines, ablations. Hours; --only picks."""
    only: tuple[str, ...] = ()
    """Stages of a study by their names or the first parts of these; without it all that are not done yet."""
    out: Path = Path("runs/demo")
    """Folder for everything that is made: bags, dataset, run."""
    episodes: int = 6000
    """Episodes to record."""
    labelled: float = 0.2
    """Share of the bags that keep the commands; the others are video with rewards."""
    seed: int = 0
    """Decides recording, training and evaluation."""
    scale: float = 1.0
    """Multiplies the training steps of every phase."""
    eval_episodes: int = 100
    """Episodes per policy in the evaluation; a study drives twice as many per seed."""
    preset: Literal["nano", "small", "base", "large", "paper"] = "nano"
    """Model size and training settings that go with it."""
    size: int | None = None
    """Side of the pictures in pixels, a multiple of 8; without it those of the robot's contract, 64."""
    jobs: Literal["auto"] | int = "auto"
    """Processes that record and ingest, or stages of a study side by side; auto takes the free cores."""
    force: bool = False
    """Go on although a gate failed."""
    redo: bool = False
    """Do again what a study made with other arguments or settings, which clears it away."""


def plan(args: Args, jobs: int) -> list[Stage]:
    """The stages of the demo in their order; the last one, the report, has no command."""
    out, dataset, run, bags = args.out, args.out / "dataset", args.out / "run", args.out / "bags"
    common: dict[str, Any] = {"seed": args.seed, "scale": args.scale, "force": args.force}
    train = partial(command, "d4-train", dataset, run=run, preset=args.preset, **common)
    drive = partial(command, "d4-eval", run, dataset=dataset, episodes=args.eval_episodes, **common)
    film = partial(command, "d4-rollout", run, dataset=dataset, seed=args.seed)

    def stage(name: str, needs: str, title: str, *commands: Command, makes: tuple[Path, ...] = ()) -> Stage:
        gated, keeps = name not in ("record", "ingest"), name == "tokenizer"
        return Stage(name, title, commands, tuple(needs.split()), makes, _typical_s(name, args), gated, keeps)

    def phase(name: str, needs: str, title: str, makes: tuple[Path, ...] = ()) -> Stage:
        return stage(name, needs, title, train(phases=name), film(phase=name), makes=makes)

    def evaluate(name: str, needs: str, title: str, *policies: str) -> Stage:
        return stage(name, needs, title, drive(policies=policies))

    size: dict[str, Any] = {"episodes": args.episodes, "labelled": args.labelled, "seed": args.seed}
    record = command("d4-record", world=_world(args), **size, out=bags, jobs=jobs)
    ingest = command("d4-ingest", bags, contract=out / "robot.yaml", out=dataset, jobs=jobs)
    pages = {"json": out / "audit.json", "html": out / "audit.html", "sheet": out / "audit.png"}
    audit = command("d4-audit", dataset, **pages)
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


def own_keys(args: Args) -> dict[str, str]:
    """Keys of the stages, which depend neither on the place nor on the number of processes."""
    return keys(plan(dataclasses.replace(args, out=Path("out"), force=False), 1))


def _world(args: Args) -> str:
    return WORLD if args.size is None else f"{WORLD}_{args.size}"


def _typical_s(name: str, args: Args) -> float:
    if name in ("record", "ingest", "audit"):
        size = args.episodes / 3000
    elif name in ("baseline", "evaluate"):
        size = args.eval_episodes / 100
    else:
        size = args.scale
    fixed, growing = _TYPICAL_S[name]
    return fixed + growing * size


class Demo:
    """Runs the stages and talks about them."""

    def __init__(self, args: Args) -> None:
        jobs = threads.free_cores() if args.jobs == "auto" else args.jobs
        self.args, self.stages = args, plan(args, jobs)
        self.console = Console(highlight=False, soft_wrap=True)
        self.began = time.monotonic()
        self.env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        args.out.mkdir(parents=True, exist_ok=True)
        self.state = State(args.out, self.stages, own_keys(args), args.force)

    def run(self) -> int:
        """Run everything that is not done yet; returns the exit code."""
        with alone(self.args.out):
            return self._run()

    def _run(self) -> int:
        needed = self.args.episodes * _BYTES_PER_EPISODE + _BYTES_OF_RUN
        require_space(self.args.out, needed - size_of(self.args.out), "--episodes")
        stale = self.state.clear_stale()
        if stale:
            self.say(f"other arguments than last time: {', '.join(stale)} will be done again")
        write_contract(self.args.out / "robot.yaml", _world(self.args))
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
            self.state.note(stage, time.monotonic() - began, done=code == 0)
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
        out, media = self.args.out, run / "media"
        found = [*out.glob("audit.html"), *out.glob("*.png"), *media.glob("*.png"), *media.glob("*.mp4")]
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


def _check(args: Args) -> None:
    """Refuse what a later stage would refuse after minutes of work."""
    if args.episodes < 1 or args.eval_episodes < 1 or args.seed < 0:
        raise UserError("--episodes and --eval-episodes must be at least 1 and --seed at least 0")
    if not args.scale > 0:
        raise UserError(f"--scale {args.scale:g} must be above 0")
    require_recording(args.labelled, args.jobs)
    world_class(_world(args))  # refuses a size that is none


def _study(args: Args) -> Study:
    jobs = threads.free_cores() if args.jobs == "auto" else args.jobs
    return Study(
        StudyArgs(
            out=args.out / str(args.study), episodes=args.episodes, labelled=args.labelled, scale=args.scale,
            eval_episodes=2 * args.eval_episodes, preset=args.preset, size=args.size, jobs=jobs,
            only=args.only, redo=args.redo,
        )
    )  # fmt: skip


def main() -> None:
    """Entry point of ``d4-demo``."""
    run_cli(_main)


def _main() -> int:
    args = tyro.cli(Args, prog="d4-demo")
    _check(args)
    return ended((_study(args) if args.study else Demo(args)).run)


if __name__ == "__main__":
    main()
