"""`d4-demo --study learning`: does imagination training beat cloning, over whole chains of seeds?

Several demos (every one with its own recording, tokenizer, dynamics, agent and imagination), their baselines,
and what changes when one thing is left out. Stages that do not need each other run side by side, one process
each; their output goes to <out>/logs. Whatever is interrupted goes on where it was. A failed gate stops
nothing here: the page shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from d4_sim.chains import PHASES, Chains
from d4_sim.lanes import Runner
from d4_sim.stages import Command, Stage, command, keys
from d4_sim.world import write_contract

SEEDS = (0, 1, 2)  # full chains, and imagination seeds within the first of them
WORLDS = ("yard", "arm")
LOOKS = ("yard", "yard_dusk")  # the second is the first one's world in other colours
OWN_LOOK = "open_loop_own_look"  # measurement in the first look, with whose commands a model was trained
LABELS = (0.0, 0.01, 0.04, 0.1, 0.2, 1.0)
POLICIES = ("random", "data", "bc_scratch", "vpt", "wm_bc", "imagination", "expert")
FRESH = (1, 2)  # recordings on which sparse commands are measured again; no setting was chosen on them
FRESH_LABELS = (0.0, 0.1, 1.0)
LONGER_AGENT = "agent_training.steps=3500"  # cloning for as long as cloning and imagination take
LONGER = ("bc_scratch", "vpt")  # cloning without a world model, where it may cost what a whole chain costs
BASELINE_STEPS = 10_000  # ... in so many steps
OTHER_STARTS = 11  # seed of starts on which nothing was decided, neither a setting nor what to show
ABLATION_SCALE = 0.5  # training steps of the arms that are only compared with each other
FRESH_SCALES = {"fresh": ABLATION_SCALE, "full": 1.0}

_SETTINGS = "imagination_training.settings"
# `nano` is trained without the shortcut loss; this is how it was trained with it
_SHORTCUT_LOSS = ("dynamics_training.bootstrap_rows=0.25",)
_AS_THEY_COME = ("dynamics_training.labelled_share=0.0",)
SHORTCUT: dict[str, tuple[str, ...]] = {
    "with": ("grid.levels=64", *_SHORTCUT_LOSS),
    "without": ("grid.levels=64",),
}

# one change each to `nano` with the shortcut loss, the paper's objective; it is trained as long as they are
_CHANGES: dict[str, tuple[str, ...]] = {
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
    "labels_as_they_come": _AS_THEY_COME,
}
CASCADE = {name: (*_SHORTCUT_LOSS, *change) for name, change in _CHANGES.items()} | {"no_bootstrap": ()}
# where the shortcut loss is tried through to a policy, on the tokenizers of these chains
POLICY_CHAINS = ("yard-0", "yard-2", "arm-0")
# every other clip of a batch is drawn from drives with commands, however few these are (`nano`: nine in ten)
HALF_LABELLED = ("dynamics_training.labelled_share=0.5",)
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
        size: side of the pictures, pixels; None: 64.
        jobs: stages that run side by side.
        only: stages to run, see `d4_sim.stages.is_named`; empty: all of them.
        redo: do again what was made with other arguments, which clears it away.
    """

    out: Path
    episodes: int = 6000
    labelled: float = 0.2
    scale: float = 1.0
    eval_episodes: int = 200
    preset: str = "nano"
    size: int | None = None
    jobs: int = 1
    only: tuple[str, ...] = ()
    redo: bool = False


def named(world: str, args: Args) -> str:
    """A world in pictures of the study's size."""
    return world if args.size is None else f"{world}_{args.size}"


class Plan(Chains):
    """Collects the stages of a study in the order in which they matter."""

    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.args: Args = args

    def chain(self, world: str, seed: int) -> None:
        """A whole demo with all baselines."""
        args, place = self.args, self.args.out / f"{world}-{seed}"
        name, dataset, run = place.name, place / "dataset", place / "run"
        latest = self.data(place, [(named(world, args), seed, args.labelled, args.episodes)])
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
        if seed == SEEDS[0]:  # for the page
            self.add(f"{name}/films", [latest], 90, command("d4-rollout", run, dataset=dataset, seed=seed))

    def variant(
        self,
        name: str,
        of: str,
        kept: str,
        phases: Sequence[str],
        *measured: Callable[[Path, Path], Command],
        seed: int = 0,
        scale: float = 1.0,
        typical_s: float = 60,
        **options: Any,
    ) -> None:
        """Train `phases` anew on the networks up to `kept` of another run, and measure the result.

        `typical_s` are the seconds of measuring at the default size.
        """
        source, place = self.args.out / of, self.args.out / name
        run, dataset = place / "run", source / "dataset"
        trained = [self.train(run, dataset, phase, seed, scale, **options) for phase in phases]
        typical_s += sum(PHASES[phase] for phase in phases) * scale * self.args.scale
        work = [command("measure", "fork", source / "run", run, phase=kept), *trained]
        work += [measure(run, dataset) for measure in measured]
        recipe = self.recipe(phases[-1] if phases else kept)
        self.add(name, [f"{of}/{kept}"], typical_s, *work, makes=(run,), recipe=recipe)

    def tokenizer(self, place: Path, data: str, seed: int = 0) -> None:
        """The tokenizer that variants of a place share."""
        work = self.train(place / "run", place / "dataset", "tokenizer", seed, 1.0)
        typical_s, recipe = PHASES["tokenizer"] * self.args.scale, self.recipe("tokenizer")
        self.add(f"{place.name}/tokenizer", [data], typical_s, work, makes=(place / "run",), recipe=recipe)

    def labels(self) -> None:
        """What commands are worth: the same drives, with the commands of a share of them."""
        args, place = self.args, self.args.out / "labels"
        latest = self.data(place, [(named(WORLDS[0], args), SEEDS[0], 1.0, args.episodes)])
        self.tokenizer(place, latest)
        drive = self.driving("wm_bc", "imagination")
        phases = ("dynamics", "agent", "imagination")
        blind = world_model(unknown=True)
        self.variant(
            "labels-0", "labels", "tokenizer", ("dynamics",), blind, labels=0.0, scale=ABLATION_SCALE
        )
        for share in LABELS[1:]:
            options: dict[str, Any] = {"labels": share, "scale": ABLATION_SCALE}
            self.variant(f"labels-{share:g}", "labels", "tokenizer", phases, world_model(), drive, **options)
        for share in LABELS[1:-1]:
            options = {"labels": share, "scale": ABLATION_SCALE, "set": HALF_LABELLED}
            self.variant(f"half-{share:g}", "labels", "tokenizer", phases, world_model(), drive, **options)

    def fresh(self, seed: int) -> None:
        """World models of sparse commands on a recording of its own, trained for half as long and in full."""
        args, place = self.args, self.args.out / f"fresh-{seed}"
        self.tokenizer(place, self.data(place, [(named(WORLDS[0], args), seed, 1.0, args.episodes)]), seed)
        for kind, scale in FRESH_SCALES.items():
            for share in FRESH_LABELS:
                self.variant(
                    f"{kind}-{seed}-{share:g}", place.name, "tokenizer", ("dynamics",),
                    world_model(unknown=not share), seed=seed, scale=scale, labels=share,
                )  # fmt: skip

    def compute(self) -> None:
        """Baselines with the compute of a whole chain, and the first clone with that of imagination, too."""
        args, longer = self.args, self.driving(*LONGER, scratch_steps=BASELINE_STEPS)
        for chain in (f"{world}-{seed}" for world in WORLDS for seed in SEEDS):
            self.variant(f"compute-{chain}", chain, "tokenizer", (), longer, typical_s=2600)
            run, dataset = args.out / f"compute-{chain}" / "run", args.out / chain / "dataset"
            likeliest = self.drive(run, dataset, *LONGER, argmax=True, scratch_steps=BASELINE_STEPS)
            self.add(f"compute-{chain}/argmax", [f"compute-{chain}"], 40, likeliest)
        first = f"{WORLDS[0]}-{SEEDS[0]}"
        self.variant("compute-clone", first, "dynamics", ("agent",), self.driving("wm_bc"),
                     set=(LONGER_AGENT,))  # fmt: skip

    def other_starts(self) -> None:
        """The policies of every chain once more, on other starts."""
        drive = self.driving("wm_bc", "imagination", "expert", seed=OTHER_STARTS)
        for chain in (f"{world}-{seed}" for world in WORLDS for seed in SEEDS):
            self.variant(f"starts-{chain}", chain, "imagination", (), drive, typical_s=90)

    def looks(self) -> None:
        """Commands in one look of the world, video of another: what is known of the second?"""
        args, place = self.args, self.args.out / "looks"
        looks = [named(look, args) for look in LOOKS]
        count = args.episodes // len(looks)
        # a seed of its own for each look: the same drives twice would show one look's answers in the other
        latest = self.data(place, [(look, seed, 1.0, count) for seed, look in enumerate(looks)])
        self.tokenizer(place, latest)
        arms: dict[str, dict[str, Any]] = {
            "none": {"labels": 0.0},
            "first": {"labels_from": f"{looks[0]}-*"},
            "both": {},
        }
        for name, options in arms.items():
            measures = [
                world_model(bags=f"{look}-*", unknown=name == "none", **into)
                for look, into in ((looks[1], {}), (looks[0], {"file": OWN_LOOK}))
            ]
            # drawn as they come, so that the second look is half of the clips whoever has commands; and in
            # full, because two looks are learned more slowly than one
            self.variant(f"looks-{name}", "looks", "tokenizer", ("dynamics",), *measures,
                         set=_AS_THEY_COME, **options)  # fmt: skip

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
        for chain in POLICY_CHAINS:
            self.variant(f"shortcut_loss-{chain}", chain, "tokenizer", ("dynamics", "agent", "imagination"),
                         both, seed=int(chain[-1]), set=_SHORTCUT_LOSS)  # fmt: skip
        for name, settings in SHORTCUT.items():
            measure = world_model(steps=(1, 2, 4, 16, 64))
            self.variant(f"shortcut-{name}", first, "tokenizer", ("dynamics",), measure, set=settings)
        for name, settings in CASCADE.items():
            measure = world_model()
            self.variant(f"cascade-{name}", first, "tokenizer", ("dynamics",), measure,
                         scale=ABLATION_SCALE, set=settings)  # fmt: skip


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
    planned.other_starts()
    planned.ablations()
    planned.compute()
    planned.labels()
    for seed in FRESH:
        planned.fresh(seed)
    planned.looks()
    return planned.stages


class Study(Runner):
    """Runs stages side by side and talks about them."""

    def __init__(self, args: Args) -> None:
        self.args = args
        own_keys = keys(plan(replace(args, out=Path("out"))))
        super().__init__(
            args.out, plan(args), own_keys, args.jobs, args.only, redo=args.redo, prepare=self._contracts
        )

    def _contracts(self) -> None:
        for world in (named(world, self.args) for world in WORLDS):
            write_contract(self.args.out / f"{world}.yaml", world)
