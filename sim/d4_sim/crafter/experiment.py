"""`d4-sim crafter`: the offline diamond experiment on Crafter, from a recording to a table of milestones.

One recording of scripted players of mixed quality, of which a tenth keeps its commands; for every seed the
four phases of training, the baselines, and every policy in the game. Stages run side by side and go on where
they were; whatever is there at the end is on one page (`d4_sim.crafter.page`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from d4_core import threads
from d4_datasets.errors import UserError
from d4_sim.chains import Chains
from d4_sim.crafter.page import EQUAL_STEPS, GIVEN, STARTS, write_page
from d4_sim.crafter.world import HORIZON
from d4_sim.lanes import Runner
from d4_sim.minecraft.recipe import EVENTS
from d4_sim.stages import Command, Stage, command, keys, require_recording, require_space, size_of
from d4_sim.world import make_world, write_contract

TRAINED = ("bc_scratch", "bc_early", "vpt", "wm_bc", "imagination")

# What differs from the presets, and from `nano` in size, and why, is in docs/crafter.md.
TASKS = (
    *EVENTS,
    "imagination_training.settings.discount=0.97",
    "imagination_training.settings.beta=0.3",
)
SIZES = (
    "num_latents=16",
    "num_tokens=16",
    "tokenizer_training.steps=10000",
    "dynamics_training.steps=20000",
    "agent_training.steps=5000",
    "imagination_training.steps=3200",
)
# seconds on one core at the default size
_TYPICAL_S = {"tokenizer": 2300.0, "dynamics": 4500.0, "agent": 1700.0, "imagination": 650.0}
_BYTES_PER_EPISODE = 4_700_000  # 215 frames in bags, dataset and frame cache
_BYTES_OF_RUN = 500_000_000  # checkpoints, latents, films


@dataclass(frozen=True, kw_only=True)
class Args:
    """Record, train and judge policies on Crafter over seeds, and write <out>/page.md with the milestones.

    The same command continues after an interruption; games of a stage that was at work are played again.
    """

    out: Path = Path("runs/crafter")
    """Folder for everything."""
    world: Literal["crafter", "crafter_peaceful"] = "crafter"
    """The true game, or one without zombies and skeletons."""
    seeds: int = 3
    """Chains of training, all on the same recording."""
    episodes: int = 1500
    """Episodes to record."""
    labelled: float = 0.1
    """Share of the bags that keep the commands; the others are video with rewards."""
    preset: Literal["nano", "small", "base", "large", "paper"] = "nano"
    """Size of the networks."""
    scale: float = 1.0
    """Multiplies the training steps of networks and baselines."""
    scratch_steps: int = EQUAL_STEPS
    """Training steps, before --scale, of both networks of the VPT style; cloning from scratch gets twice as
    many. With 60000 each of the two takes the operations of a whole chain of nano."""
    eval_episodes: int = 100
    """Episodes per policy and seed, on shared starts."""
    jobs: Literal["auto"] | int = "auto"
    """Stages side by side; auto takes the free cores."""
    only: tuple[str, ...] = ()
    """Stages by their names or the first parts of these, such as seed-0; without it all that are not done."""
    redo: bool = False
    """Do again what was made with other arguments or settings, which clears it away."""


class Plan(Chains):
    """The stages, seed by seed."""

    def __init__(self, args: Args, jobs: int) -> None:
        super().__init__(args)
        self.shape, self._jobs = args, jobs

    def recording(self) -> str:
        """The one dataset of all seeds."""
        args = self.shape
        recordings = [(args.world, 0, args.labelled, args.episodes)]
        return self.data(args.out / "data", recordings, 1.3 * args.episodes, self._jobs)

    def chain(self, seed: int, data: str) -> None:
        """The four phases and all policies of one seed."""
        args, latest, name = self.shape, data, f"seed-{seed}"
        run, dataset = args.out / name / "run", args.out / "data" / "dataset"
        settings = (*TASKS, *(SIZES if args.preset == "nano" else ()))
        for phase, seconds in _TYPICAL_S.items():
            makes = (run,) if phase == "tokenizer" else ()
            work = self.train(run, dataset, phase, seed, 1.0, set=settings)
            latest = self.add(
                f"{name}/{phase}", [latest], seconds * args.scale, work,
                makes=makes, recipe=self.recipe(phase),
            )  # fmt: skip
        needs = [latest, self.baselines(name, run, dataset, args.scratch_steps)]
        shared: dict[str, Any] = {"world": args.world, "seed": STARTS}
        typical_s = 0.008 * args.eval_episodes * HORIZON
        drive = partial(self.drive, run, dataset, **shared)
        latest = self.add(
            f"{name}/tasks",
            needs,
            typical_s,
            *self.drive_all(drive, args.scratch_steps, TRAINED),
            makes=(run / "eval.json",),
        )
        policies = (*TRAINED, *(GIVEN if not seed else ()))

        def climb(*policies: str, **options: Any) -> Command:
            size = {"episodes": args.eval_episodes, "scale": args.scale}
            return command("crafter", run, dataset=dataset, policies=policies, **size, **shared, **options)

        climbed = self.drive_all(climb, args.scratch_steps, policies)
        self.add(f"{name}/milestones", [latest], typical_s, *climbed, makes=(run / "milestones.json",))


def plan(args: Args, jobs: int) -> list[Stage]:
    """All stages; earlier ones matter more."""
    planned = Plan(args, jobs)
    data = planned.recording()
    for seed in range(args.seeds):
        planned.chain(seed, data)
    return planned.stages


def own_keys(args: Args) -> dict[str, str]:
    """Keys of the stages, the same in every folder and on every machine."""
    return keys(plan(replace(args, out=Path("out")), 1))


def experiment(args: Args) -> int:
    """Run what is missing and write the page; returns 1 if a stage failed, else 0."""
    _check(args)
    jobs = threads.free_cores() if args.jobs == "auto" else args.jobs
    own = own_keys(args)

    def prepare() -> None:
        needed = args.episodes * _BYTES_PER_EPISODE + args.seeds * _BYTES_OF_RUN
        require_space(args.out, needed - size_of(args.out), "--episodes")
        write_contract(args.out / f"{args.world}.yaml", args.world)

    def report() -> None:
        path = write_page(args.out, args, own)
        print(f"page: {path}" if path else "nothing for a page yet", flush=True)

    return Runner(
        args.out, plan(args, jobs), own, jobs, args.only,
        redo=args.redo, prepare=prepare, report=report,
    ).run()  # fmt: skip


def _check(args: Args) -> None:
    """Refuse what a later stage would refuse."""
    counts = (args.seeds, args.episodes, args.eval_episodes, args.scratch_steps)
    if min(counts) < 1 or not 0 < args.scale < math.inf:
        raise UserError("seeds, episodes, steps and the scale must be above 0")
    require_recording(args.labelled, args.jobs)
    make_world(args.world)
