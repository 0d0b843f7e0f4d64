"""`d4-demo --study learning`: does imagination training beat cloning, over whole chains of seeds?

Several demos (every one with its own recording, tokenizer, dynamics, agent and imagination), their baselines,
and what changes when one thing is left out. Stages that do not need each other run side by side, one process
each; their output goes to <out>/logs. Whatever is interrupted goes on where it was. A failed gate stops
nothing here: the page shows it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from d4_sim import stages
from d4_sim.stages import Command, Interrupted, Stage, State, clock, command, handled_by, keys
from d4_sim.world import world_class

SEEDS = (0, 1, 2)  # full chains, and imagination seeds within the first of them
WORLDS = ("yard", "arm")
LOOKS = ("yard", "yard_dusk")  # the second is the first one's world in other colours
LABELS = (0.0, 0.01, 0.04, 0.1, 0.2, 1.0)
POLICIES = ("random", "data", "bc_scratch", "vpt", "wm_bc", "imagination", "expert")
ABLATION_SCALE = 0.5  # training steps of the arms that are only compared with each other

# seconds on one core at the default size
PHASES = {"tokenizer": 240.0, "dynamics": 700.0, "agent": 560.0, "imagination": 210.0}

_SETTINGS = "imagination_training.settings"
_BOOTSTRAP = "dynamics_training.bootstrap_rows=0.0"
SHORTCUT: dict[str, tuple[str, ...]] = {
    "with": ("grid.levels=64",),
    "without": ("grid.levels=64", _BOOTSTRAP),
}

# one change to `nano` each; "nano" itself is trained as long as they are
CASCADE: dict[str, tuple[str, ...]] = {
    "nano": (),
    "velocity": ("predict_velocity=true",),
    "velocity_loss": ("predict_velocity=true", "dynamics_training.velocity_loss=true"),
    "ramp": ("dynamics_training.ramp=true",),
    "one_time_layer": ("dynamics.time_every=4",),
    "no_registers": ("registers=0",),
    "no_committed": ("dynamics_training.committed=0.0",),
    "noisy_context": ("grid.context_signal=0.75",),
    "no_image_rows": ("dynamics_training.image_rows=0.0",),
    "more_image_rows": ("dynamics_training.image_rows=0.3",),
    "one_length": ("dynamics_training.long_share=0.0", "dynamics_training.long_final=0.0"),
    "labels_as_they_come": ("dynamics_training.labelled_share=0.0",),
    "no_bootstrap": (_BOOTSTRAP,),
}
IMPROVEMENT: dict[str, tuple[str, ...]] = {
    "beta_0.03": (f"{_SETTINGS}.beta=0.03",),
    "beta_0.3": (f"{_SETTINGS}.beta=0.3",),
    "beta_1": (f"{_SETTINGS}.beta=1.0",),
    "horizon_6": (f"{_SETTINGS}.horizon=6",),
    "horizon_18": (f"{_SETTINGS}.horizon=18",),
    "four_steps": (f"{_SETTINGS}.steps=4",),
    "quarter": ("imagination_training.steps=400",),
    "double": ("imagination_training.steps=3200",),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Sizes of a study.

    Attributes:
        out: folder of everything.
        episodes, labelled, scale, preset: of every chain, as in the demo.
        eval_episodes: episodes per policy and seed.
        jobs: stages that run side by side.
        only: beginnings of the names of stages to run; empty: all of them.
    """

    out: Path
    episodes: int = 6000
    labelled: float = 0.2
    scale: float = 1.0
    eval_episodes: int = 200
    preset: str = "nano"
    jobs: int = 1
    only: tuple[str, ...] = ()


class Plan:
    """Collects the stages of a study in the order in which they matter."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.stages: list[Stage] = []

    def add(
        self,
        name: str,
        needs: Sequence[str],
        typical_s: float,
        *commands: Command,
        makes: tuple[Path, ...] = (),
        recipe: str = "",
    ) -> str:
        """Add a stage; returns its name."""
        keeps = any(path.name == "run" for path in makes)
        title = " then ".join(words[0] for words in commands)
        stage = Stage(name, title, commands, tuple(needs), makes, typical_s, True, keeps, recipe)
        self.stages.append(stage)
        return name

    def train(self, run: Path, dataset: Path, phase: str, seed: int, scale: float, **options: Any) -> Command:
        """One phase of training, in one process, whatever its gates say."""
        return command(
            "d4-train", dataset, run=run, phases=phase, seed=seed, preset=self.args.preset,
            scale=self.args.scale * scale, procs=1, force=True, **options,
        )  # fmt: skip

    def recipe(self, phase: str) -> str:
        """The preset's settings as far as they shape a phase: other ones give other results."""
        from d4_core.config import preset

        return json.dumps(preset(self.args.preset).up_to(phase), sort_keys=True)

    def drive(self, run: Path, dataset: Path, *policies: str, **options: Any) -> Command:
        """Policies in the simulator, always on the same starts."""
        size = {"episodes": self.args.eval_episodes, "scale": self.args.scale, "force": True}
        return command("d4-eval", run, dataset=dataset, policies=policies, **size, **options)

    def driving(self, *policies: str) -> Callable[[Path, Path], Command]:
        """`drive` for a run that is yet to be named."""
        return lambda run, dataset: self.drive(run, dataset, *policies)

    def data(self, place: Path, recordings: Sequence[tuple[str, int, float, int]]) -> str:
        """Bags of (world, seed, share of labels, episodes), in one dataset with the first one's contract."""
        bags, dataset = place / "bags", place / "dataset"
        record = [
            command("d4-record", world=w, episodes=n, labelled=share, seed=s, out=bags / f"{w}-{s}")
            for w, s, share, n in recordings
        ]
        contract = self.args.out / f"{recordings[0][0]}.yaml"
        ingest = command(
            "d4-ingest", *(bags / f"{w}-{s}" for w, s, *_ in recordings), contract=contract, out=dataset
        )
        count = sum(n for *_, n in recordings)
        return self.add(f"{place.name}/data", [], 0.02 * count, *record, ingest, makes=(bags, dataset))

    def chain(self, world: str, seed: int) -> None:
        """A whole demo with all baselines."""
        args, place = self.args, self.args.out / f"{world}-{seed}"
        name, dataset, run = place.name, place / "dataset", place / "run"
        latest = self.data(place, [(world, seed, args.labelled, args.episodes)])
        for phase, typical_s in PHASES.items():
            makes = (run,) if phase == "tokenizer" else ()
            work = self.train(run, dataset, phase, seed, 1.0)
            recipe = self.recipe(phase)
            latest = self.add(
                f"{name}/{phase}", [latest], typical_s * args.scale, work, makes=makes, recipe=recipe
            )
        drive = partial(self.drive, run, dataset)
        latest = self.add(f"{name}/policies", [latest], 330, drive(*POLICIES))
        self.add(f"{name}/argmax", [latest], 40, drive("wm_bc", "imagination", argmax=True))
        self.add(f"{name}/planner", [latest], 1200, drive("planner"))

    def variant(
        self,
        name: str,
        of: str,
        kept: str,
        phases: Sequence[str],
        *measured: Callable[[Path, Path], Command],
        seed: int = 0,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        """Train `phases` anew on the networks up to `kept` of another run, and measure the result."""
        source, place = self.args.out / of, self.args.out / name
        run, dataset = place / "run", source / "dataset"
        trained = [self.train(run, dataset, phase, seed, scale, **options) for phase in phases]
        typical_s = sum(PHASES[phase] for phase in phases) * scale * self.args.scale + 60
        work = [command("measure", "fork", source / "run", run, phase=kept), *trained]
        work += [measure(run, dataset) for measure in measured]
        recipe = self.recipe(phases[-1])
        self.add(name, [f"{of}/{kept}"], typical_s, *work, makes=(run,), recipe=recipe)

    def tokenizer(self, place: Path, data: str) -> None:
        """The tokenizer that variants of a place share."""
        work = self.train(place / "run", place / "dataset", "tokenizer", 0, 1.0)
        typical_s, recipe = PHASES["tokenizer"] * self.args.scale, self.recipe("tokenizer")
        self.add(f"{place.name}/tokenizer", [data], typical_s, work, makes=(place / "run",), recipe=recipe)

    def labels(self) -> None:
        """What commands are worth: the same drives, with the commands of a share of them."""
        args, place = self.args, self.args.out / "labels"
        latest = self.data(place, [(WORLDS[0], SEEDS[0], 1.0, args.episodes)])
        self.tokenizer(place, latest)
        for share in LABELS:
            name = f"labels-{share:g}"
            options: dict[str, Any] = {"labels": share, "scale": ABLATION_SCALE}
            if share:
                drive = self.driving("wm_bc", "imagination")
                phases = ("dynamics", "agent", "imagination")
                self.variant(name, "labels", "tokenizer", phases, world_model(), drive, **options)
            else:
                blind = world_model(unknown=True)
                self.variant(name, "labels", "tokenizer", ("dynamics",), blind, **options)

    def looks(self) -> None:
        """Commands in one look of the world, video of another: what is known of the second?"""
        args, place = self.args, self.args.out / "looks"
        count = args.episodes // len(LOOKS)
        # a seed of its own for each look: the same drives twice would show one look's answers in the other
        latest = self.data(place, [(look, seed, 1.0, count) for seed, look in enumerate(LOOKS)])
        self.tokenizer(place, latest)
        arms: dict[str, dict[str, Any]] = {
            "none": {"labels": 0.0},
            "first": {"labels_from": f"{LOOKS[0]}-*"},
            "both": {},
        }
        for name, options in arms.items():
            measure = world_model(bags=f"{LOOKS[1]}-*", unknown=name == "none")
            self.variant(f"looks-{name}", "looks", "tokenizer", ("dynamics",), measure,
                         scale=ABLATION_SCALE, **options)  # fmt: skip

    def ablations(self) -> None:
        """One thing changed at a time, on the networks of the first chain."""
        first = f"{WORLDS[0]}-{SEEDS[0]}"
        drive = self.driving("imagination")
        for seed in SEEDS[1:]:
            self.variant(f"improve-seed_{seed}", first, "agent", ("imagination",), drive, seed=seed)
        for name, settings in IMPROVEMENT.items():
            self.variant(f"improve-{name}", first, "agent", ("imagination",), drive, set=settings)
        both = self.driving("wm_bc", "imagination")
        self.variant("heads-agent_only", first, "dynamics", ("agent", "imagination"), both,
                     set=("heads_read_world=false",))  # fmt: skip
        for name, settings in SHORTCUT.items():
            measure = world_model(steps=(1, 2, 4, 16, 64), finest=name == "without")
            self.variant(f"shortcut-{name}", first, "tokenizer", ("dynamics",), measure, set=settings)
        for name, settings in CASCADE.items():
            measure = world_model(finest=name == "no_bootstrap")
            options: dict[str, Any] = {"set": settings} if settings else {}
            self.variant(f"cascade-{name}", first, "tokenizer", ("dynamics",), measure,
                         scale=ABLATION_SCALE, **options)  # fmt: skip


def world_model(**options: Any) -> Callable[[Path, Path], Command]:
    """The measurement of a run's open-loop predictions, with options of `d4_sim.measure`."""
    return lambda run, dataset: command("measure", "open-loop", run, dataset=dataset, **options)


def plan(args: Args) -> list[Stage]:
    """All stages; earlier ones matter more."""
    planned = Plan(args)
    planned.add("ladder", [], 400, command("ladder", out=args.out / "ladder.json"))
    for world in WORLDS:
        for seed in SEEDS:
            planned.chain(world, seed)
    planned.ablations()
    planned.labels()
    planned.looks()
    return planned.stages


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
        name, *arguments = self._left.pop(0)
        argv = [sys.executable, "-m", stages.MODULES[name], *arguments]
        with self.log.open("ab") as file:
            file.write(f"$ {shlex.join([name, *arguments])}\n".encode())
            file.flush()
            # a process group of its own: Ctrl-C reaches it once, through us
            self._child = subprocess.Popen(
                argv, env=self._env, stdout=file, stderr=subprocess.STDOUT, process_group=0
            )
        return None

    def stop(self) -> None:
        """Let the command save and leave, and wait for that."""
        self._left.clear()
        if self._child is not None:
            # not SIGINT, which shells let background jobs ignore, and their children with them
            self._child.terminate()
            self._child.wait()


class Study:
    """Runs stages side by side and talks about them."""

    def __init__(self, args: Args) -> None:
        self.args, self.stages = args, plan(args)
        self.console = Console(highlight=False, soft_wrap=True)
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
        for world in WORLDS:
            (args.out / f"{world}.yaml").write_bytes(world_class(world).contract_path().read_bytes())
        self.state = State(args.out, self.stages, keys(plan(replace(args, out=Path("out")))), force=True)
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.lanes: list[Lane] = []
        self.failed: set[str] = set()

    def run(self) -> int:
        """Run everything that is not done yet; returns 1 if a stage failed, else 0.

        Raises:
            Interrupted: after SIGINT, SIGTERM or SIGHUP, once all commands have saved and left.
        """
        self.state.clear_stale()
        received: list[int] = []
        with handled_by(lambda number, _: received.append(number)):
            while not received:
                self._start()
                if not self.lanes:
                    break
                time.sleep(0.2)
                self._reap()
            for lane in self.lanes:
                lane.stop()
                self.state.note(lane.stage, time.monotonic() - lane.began, done=False)
        if received:
            raise Interrupted(received[0])
        return int(bool(self.failed))

    def _start(self) -> None:
        """Begin the most important stages that can begin."""
        busy = {lane.stage.name for lane in self.lanes}
        for stage in self.stages:
            if len(self.lanes) >= self.args.jobs:
                return
            is_open = stage.name not in busy | self.failed and not self.state.is_done(stage.name)
            is_wanted = not self.args.only or stage.name.startswith(self.args.only)
            if is_open and is_wanted and all(map(self.state.is_done, stage.needs)):
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
            left = clock(self.state.left_s() / self.args.jobs)
            self._say(f"{name} {verdict}; about {left} left in all")

    def _log(self, stage: Stage) -> Path:
        return self.args.out / "logs" / f"{stage.name.replace('/', '.')}.log"

    def _say(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)
        self.console.file.flush()
