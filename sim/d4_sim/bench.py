"""`d4-sim bench SUITE`: from nothing to a table of policies on any registered worlds, over seeds.

Every world gets a reference (random and expert on the shared starts), and for every seed a recording of its
own, the four phases of training, the baselines and the policies in the simulator. Stages run side by side and
go on where they were; whatever is there at the end is on one page (`d4_sim.bench_page`).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from d4_core import threads
from d4_core.config import action_parts, override, preset
from d4_datasets import whole
from d4_datasets.errors import UserError, run_cli
from d4_sim.chains import DISTURBED, PHASES, STARTS, VERSIONS, Chains, scratch_steps
from d4_sim.crafter import experiment
from d4_sim.lanes import Runner
from d4_sim.stages import (
    Stage,
    command,
    ended,
    is_named,
    keys,
    require_recording,
    require_space,
    size_of,
)
from d4_sim.suite.disturb import MEASURED, contents, fitting, slug
from d4_sim.world import contract_of, make_world, world_class, world_names, write_contract

POLICIES = ("data", "bc_scratch", "bc_early", "vpt", "wm_bc", "imagination")
EQUAL_STEPS = 10_000  # of both networks of the VPT style take so many chains of `nano` in operations:
_EQUAL_CHAINS = 1.14

_REFERENCE_S = 2.1  # an episode at random or of the expert, most of which is planning
_BYTES_PER_FRAME = 19_000  # bags and unpacked frames, of 64x64 pixels
_KEPT_PER_FRAME = 2_000  # videos and tables of the dataset
_BYTES_OF_RUN = 250_000_000  # checkpoints, films and the report

# a measured latency lies in the repository, not in what pip may have made of it
_MEASURED = ("latency=measured",) if MEASURED.is_file() else ()

PresetName = Literal["night", "h200", "toy"]
_SMALL = ("push", "reacher_easy", "cartpole_swingup")


@dataclass(frozen=True)
class Suite:
    """Worlds that belong together, and the preset that fits them."""

    worlds: tuple[str, ...]
    preset: PresetName = "night"


SUITES: dict[str, Suite] = {
    "mujoco-small": Suite(_SMALL),
    "arms": Suite(("arm", "arm_push", "push", "fetch")),
    "dm-control": Suite((
        "cartpole_swingup", "reacher_easy", "ball_in_cup_catch", "finger_spin", "cheetah_run", "walker_walk",
    )),
    "h200": Suite(_SMALL, "h200"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    Attributes:
        seeds: chains per world.
        frames: recorded per chain; episodes are as long as the world's horizon.
        labelled: share of the bags that keep the commands.
        model: preset of the networks.
        scale: multiplies the training steps.
        scratch_steps: of each network of the VPT style, before `scale`; the one that is cloned from scratch
            gets twice as many. Claims against them are judged if that is what a chain takes (`is_equal`).
        eval_episodes: shared starts per policy and seed.
        expert_episodes: of them, those that the expert drives, once per world.
        planner_episodes: of them, those that the planner in the world model drives, for every seed; tasks
            take turns, so that 6 are as many of each task in all worlds here.
        set: settings of the networks' preset that every phase of training gets.
        disturb: disturbances (`d4_sim.suite.disturb`; joined by + where they come together) under which the
            policies of `DISTURBED` drive the shared starts again.
        minutes: nothing begins later, 0: no limit.
    """

    seeds: int = 3
    frames: int = 100_000
    labelled: float = 0.2
    model: str = "nano"
    scale: float = 1.0
    scratch_steps: int = EQUAL_STEPS
    eval_episodes: int = 60
    expert_episodes: int = 30
    planner_episodes: int = 6
    set: tuple[str, ...] = ()
    disturb: tuple[str, ...] = (*_MEASURED, "latency=100", "noise=0.1", "look=1")
    minutes: float = 0.0

    @property
    def is_equal(self) -> bool:
        """Whether what is cloned without a world model has the training operations of a chain, on pictures of
        64 x 64; on larger ones it has more than that, since nothing but pictures is its work.
        """
        from d4_core.estimate import work

        contract = contract_of("yard")  # worlds differ by less than a percent
        own, nano = (
            sum(phase.flops for phase in work(override(preset(model), list(settings)), contract).values())
            for model, settings in ((self.model, self.set), ("nano", ()))
        )
        return self.scratch_steps / EQUAL_STEPS * _EQUAL_CHAINS * nano >= own


# What moves in these worlds is a few pixels wide, and a patch that hides it leaves nothing to guess it from:
# `nano` as it is does not see the pusher in twice the time (docs/mujoco.md).
_SMALL_THINGS = ("motion_weight=4.0", "mask_max=0.5", "num_latents=16", "tokenizer_training.steps=3000")

PRESETS: dict[str, Size] = {
    "night": Size(labelled=0.4, scale=0.8, scratch_steps=11_000, set=_SMALL_THINGS),
    # few disturbances: they are three of four episodes that are driven, and 24 minutes are for all chains
    # and less compute for what is cloned without a world model, which no GPU helps
    "h200": Size(frames=30_000, scale=0.6, scratch_steps=1500, minutes=24, set=_SMALL_THINGS,
                 eval_episodes=40, expert_episodes=20, planner_episodes=6,
                 disturb=(*_MEASURED, "latency=100+noise=0.1")),
    "toy": Size(seeds=1, frames=400, labelled=0.5, scale=0.002, eval_episodes=4, expert_episodes=3,
                planner_episodes=1, disturb=("latency=100+noise=0.1",)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args:
    """Record, train and judge policies on simulated worlds, over seeds, and write one page with tables.

    The same command continues after an interruption; what is done again is the policy that was driving.
    """

    suite: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Suites or worlds; `d4-sim worlds` lists them."""
    out: Path = Path("runs/bench")
    """Folder for everything; the page is <out>/page.md."""
    preset: PresetName | None = None
    """Default is that of the first suite. night: two cores, one to three core-hours per world
    and seed; h200: one large GPU, nothing begins after 24 minutes; toy: does it run?"""
    seeds: int | None = None
    """Chains per world, instead of the preset's."""
    frames: int | None = None
    """Frames recorded per chain."""
    labelled: float | None = None
    """Share of the bags that keep the commands."""
    model: Literal["nano", "small", "base", "large", "paper"] | None = None
    """Size of the networks."""
    scale: float | None = None
    """Multiplies the training steps."""
    scratch_steps: int | None = None
    """Training steps, before --scale, of both networks of the VPT style; cloning from scratch gets twice as
    many. With 10000 each of the two takes the operations of 1.14 chains of `nano`."""
    eval_episodes: int | None = None
    """Episodes per policy and seed, on shared starts."""
    expert_episodes: int | None = None
    """Of these starts, those that the expert drives."""
    planner_episodes: int | None = None
    """Of these starts, those that the planner in the world model drives; 0: none."""
    set: tuple[str, ...] | None = None
    """Settings of the networks' preset to override, as in d4-train, for example motion_weight=2.0, instead of
    those that the preset of the bench overrides."""
    disturb: tuple[str, ...] | None = None
    """Disturbances under which cloned and improved policy drive again, each NAME=VALUE or some joined by +
    (docs/mujoco.md); none given after --disturb: none at all."""
    minutes: float | None = None
    """Stop after so many minutes with a page of what is there; 0: no limit."""
    jobs: Literal["auto"] | int = "auto"
    """Stages side by side; auto takes the free cores."""
    keep: bool = False
    """Keep the bags and the unpacked frames of finished chains, some gigabytes each."""
    only: tuple[str, ...] = ()
    """Stages by their names or the first parts of these, such as push-0; without it all that are not done."""
    redo: bool = False
    """Do again what was made with other arguments or settings, which clears it away."""

    @property
    def size(self) -> Size:
        """The preset with what was asked for instead."""
        asked = {f.name: getattr(self, f.name) for f in fields(Size) if getattr(self, f.name) is not None}
        suites = [SUITES[name].preset for name in self.suite if name in SUITES]
        return replace(PRESETS[self.preset or next(iter(suites), "night")], **asked)

    @property
    def worlds(self) -> tuple[str, ...]:
        """The worlds of all suites, each once. Raises UserError for an unknown name."""
        out: list[str] = []
        for name in self.suite:
            out += SUITES[name].worlds if name in SUITES else (_world(name),)
        return tuple(dict.fromkeys(out))


def _world(name: str) -> str:
    """The name of a world, which may say how large its pictures are, as in push_128."""
    world = name.replace("-", "_")
    if not {world, re.sub(r"_\d+$", "", world)} & set(world_names()):
        known = f"a suite ({', '.join(SUITES)}) nor a world ({', '.join(world_names())})"
        rest = ": what is done to a world goes into --disturb" if "+" in name else ""
        raise UserError(f"'{name}' is neither {known}{rest}")
    return world


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What `Chains` must know (`d4_sim.chains.Sizes`), and the slots of a stage."""

    out: Path
    size: Size
    jobs: int = 1
    recorders: int = 1  # processes of a recording
    trainers: int = 1  # slots of a training
    keep: bool = False  # bags and unpacked frames of finished chains

    @property
    def scale(self) -> float:
        """Multiplies the training steps."""
        return self.size.scale

    @property
    def preset(self) -> str:
        """Model size and training settings."""
        return self.size.model

    @property
    def eval_episodes(self) -> int:
        """Episodes per policy and seed."""
        return self.size.eval_episodes


class Plan(Chains):
    """The stages of a bench; seed by seed, so that an early end has something of every world."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.shape, self.size = shape, shape.size

    def reference(self, world: str) -> None:
        """Random and expert on the shared starts: what 0 and 1 are."""
        size, out = self.size, self.shape.out / "reference" / world
        work = command(
            "reference", world, out=out, episodes=size.eval_episodes,
            expert_episodes=size.expert_episodes, seed=STARTS, **self._many(),
        )  # fmt: skip
        typical_s = _REFERENCE_S * (size.eval_episodes + size.expert_episodes)
        self.add(
            f"{world}/reference", [], typical_s, work,
            makes=(out,), weight=self.shape.recorders, recipe=contract_of(world).hash,
        )  # fmt: skip

    def chain(self, world: str, horizon: int, seed: int) -> None:
        """A recording, the four phases, and all policies."""
        size, place = self.size, self.shape.out / f"{world}-{seed}"
        name, dataset, run = place.name, place / "dataset", place / "run"
        episodes = max(2, round(size.frames / horizon))
        typical_s = 0.01 * size.frames / self.shape.recorders
        recording = [(world, seed, size.labelled, episodes)]
        latest = self.data(place, recording, typical_s, self.shape.recorders)
        for phase, seconds in PHASES.items():
            makes = (run,) if phase == "tokenizer" else ()
            settings: dict[str, Any] = {"set": size.set} if size.set else {}
            work = self.train(run, dataset, phase, seed, 1.0, **settings)
            latest = self.add(
                f"{name}/{phase}", [latest], seconds * size.scale, work,
                makes=makes, recipe=self.recipe(phase), weight=self.shape.trainers,
            )  # fmt: skip
        # a world in other looks, or easier, has the contract of another one
        drive = partial(self.drive, run, dataset, world=world, seed=STARTS, missing=True)
        trained = self.drive_all(drive, size.scratch_steps, POLICIES)
        typical_s = 0.02 * size.eval_episodes * horizon * len(POLICIES)
        needs = [latest, self.baselines(name, run, dataset, size.scratch_steps)]
        found = (run / "eval.json",)
        latest = self.add(f"{name}/policies", needs, typical_s, *trained, makes=found)
        if size.planner_episodes and can_plan(world):
            typical_s = 0.4 * size.planner_episodes * horizon
            work = drive("planner", planner_episodes=size.planner_episodes)
            self.add(f"{name}/planner", [latest], typical_s, work)
        if disturb := fitting(world, size.disturb):
            typical_s = 0.02 * size.eval_episodes * horizon * len(DISTURBED) * len(disturb)
            parts = [tuple(each.split("+")) for each in disturb]
            steps = scratch_steps(size.scratch_steps)["vpt"]
            again = [drive(*DISTURBED, scratch_steps=steps, disturb=each) for each in parts]
            reports = " ".join(map(contents, parts)).strip()
            made = tuple(run / f"eval-{slug(each)}.json" for each in parts)
            self.add(f"{name}/disturbed", [latest], typical_s, *again, makes=made, recipe=reports)
        if not self.shape.keep:
            last = [stage.name for stage in self.stages if latest in stage.needs] or [latest]
            self.add(f"{name}/tidy", last, 1, command("measure", "tidy", place))

    def _many(self) -> dict[str, Any]:
        return {"jobs": self.shape.recorders} if self.shape.recorders > 1 else {}


def can_plan(world: str) -> bool:
    """Whether a planner in the world model can drive there: it searches among continuous commands only."""
    contract = contract_of(world)
    return all(part.kind == "continuous" for part in action_parts(contract))


def plan(shape: Shape, worlds: tuple[str, ...]) -> list[Stage]:
    """All stages; earlier ones matter more."""
    planned = Plan(shape)
    for seed in range(shape.size.seeds):
        for world in worlds:
            planned.chain(world, world_class(world).horizon, seed)
            if not seed:
                planned.reference(world)
    return planned.stages


def shape_of(args: Args, jobs: int) -> Shape:
    """How many processes a stage gets: with a GPU, several trainings share it and the cores beside it."""
    has_gpu = Path("/proc/driver/nvidia").exists()
    recorders = max(1, jobs // 4) if jobs >= 4 else 1
    return Shape(
        out=args.out, size=args.size, jobs=jobs, recorders=recorders,
        trainers=max(1, jobs // 5) if has_gpu else 1, keep=args.keep,
    )  # fmt: skip


def bench(args: Args) -> int:
    """Run what is missing and write the page; returns 1 if a stage failed, else 0."""
    from d4_sim.bench_page import write_page

    worlds = args.worlds
    _check(args, worlds)
    jobs = threads.free_cores() if args.jobs == "auto" else args.jobs
    shape, size = shape_of(args, jobs), args.size
    planned = plan(shape, worlds)

    def prepare() -> None:
        missing = [name for name in runner.missing if is_named(name, args.only)]
        _require_space(shape, missing)
        for world in worlds:
            write_contract(args.out / f"{world}.yaml", world)
        if missing:
            _note_versions(args.out)

    def report() -> None:
        path = write_page(args.out, worlds, size, own_keys(args))
        print(f"page: {path}" if path else "nothing for a page yet", flush=True)

    runner = Runner(
        args.out, planned, own_keys(args), jobs, args.only, size.minutes * 60 or None, args.redo,
        prepare, report,
    )  # fmt: skip
    return runner.run()


def own_keys(args: Args) -> dict[str, str]:
    """Keys of the stages, the same in every folder and on every machine."""
    return keys(plan(Shape(out=Path("out"), size=args.size, keep=args.keep), args.worlds))


def _check(args: Args, worlds: tuple[str, ...]) -> None:
    """Refuse what a later stage would refuse."""
    size = args.size
    if not worlds:
        raise UserError(f"name a suite ({', '.join(SUITES)}) or worlds; `d4-sim worlds` lists them")
    counts = (size.seeds, size.frames, size.eval_episodes, size.expert_episodes, size.scratch_steps)
    if min(counts) < 1 or size.planner_episodes < 0 or not 0 < size.scale < math.inf or size.minutes < 0:
        raise UserError("seeds, frames, episodes, steps and scale must be above 0, and minutes not below")
    require_recording(size.labelled, args.jobs)
    if max(size.expert_episodes, size.planner_episodes) > size.eval_episodes:
        raise UserError("expert and planner drive some of the shared starts: give them no more episodes")
    override(preset(size.model), list(size.set))
    for world in worlds:
        make_world(world)
        for each in fitting(world, size.disturb) if args.disturb is None else size.disturb:
            make_world(f"{world}+{each}")


def _note_versions(out: Path) -> None:
    """Keep the versions of MuJoCo and of d4 that a bench was made with, for its page; warn of several.

    Keys of stages know settings and contracts; what else a world is lies in the code.
    """
    from d4_core.checkpoint import origin

    path, here = out / VERSIONS, {"MuJoCo": version("mujoco"), "d4": origin()["commit"] or version("d4")}
    known = whole.read_json(path, dict)
    kept = {name: list(dict.fromkeys([*known.get(name, []), now])) for name, now in here.items()}
    whole.write(path, json.dumps(kept) + "\n")
    for name, now in here.items():
        if (begun := known.get(name, [now])[0]) != now:
            print(
                f"warning: {out} was begun with {name} {begun} and this is {now}: pictures and worlds may "
                "differ, see docs/mujoco.md",
                file=sys.stderr,
            )


def _require_space(shape: Shape, missing: Sequence[str]) -> None:
    """Say that the disk is too small before the work on these stages; what chains that are not finished have
    there already counts as free.
    """
    names = {name.partition("/")[0] for name in missing if not name.endswith("/reference")}
    areas = sorted((_area(name.rpartition("-")[0]) for name in names), reverse=True)
    unpacked = areas if shape.keep else areas[: shape.jobs + 1]
    frames = shape.size.frames * (sum(areas) * _KEPT_PER_FRAME + sum(unpacked) * _BYTES_PER_FRAME)
    there = size_of(*(shape.out / name for name in names))
    require_space(shape.out, frames + len(names) * _BYTES_OF_RUN - there, "--frames")


def _area(world: str) -> float:
    """Of its pictures, in those of 64 x 64."""
    return (getattr(world_class(world), "image_size", 64) / 64) ** 2


@dataclass(frozen=True, kw_only=True)
class WorldsArgs:
    """List suites and worlds, and what is missing here for those that cannot be made."""


def list_worlds(args: WorldsArgs) -> int:
    """Print every suite and every world with its clock, episode and tasks."""
    for name, suite in SUITES.items():
        print(f"suite {name} (preset {suite.preset}): {', '.join(suite.worlds)}")
    for name in world_names():
        try:
            made = make_world(name)
        except UserError as error:
            print(f"{name:20} not here: {error}")
            continue
        rate = made.contract.rate_hz
        length = f"{rate:g} Hz, {made.horizon} ticks ({made.horizon / rate:g} s)"
        print(f"{name:20} {length:26} {', '.join(made.tasks)}")
    return 0


def _main() -> int:
    args: Args | experiment.Args | WorldsArgs = tyro.cli(
        Annotated[Args, tyro.conf.subcommand("bench")]
        | Annotated[experiment.Args, tyro.conf.subcommand("crafter")]
        | Annotated[WorldsArgs, tyro.conf.subcommand("worlds")],
        prog="d4-sim",
    )
    if isinstance(args, WorldsArgs):
        return list_worlds(args)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(args, experiment.Args):
        return ended(partial(experiment.experiment, args))
    return ended(partial(bench, args))


def main() -> None:
    """Entry point of ``d4-sim``."""
    run_cli(_main)


if __name__ == "__main__":
    main()
