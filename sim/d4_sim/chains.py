"""Parts of every experiment over seeds: recording, the four phases of training and drives, as stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from d4_sim.stages import Command, Stage, command
from d4_sim.world import contract_of

# seconds on one core at the default size
PHASES = {"tokenizer": 240.0, "dynamics": 700.0, "agent": 560.0, "imagination": 210.0}
_START_S = 8.0  # of every command, however little it does
_SCRATCH_S = 0.065  # a step of a network without a world model
VERSIONS = "versions.json"  # of what the worlds of a bench follow from, in its folder
DISTURBED = ("vpt", "wm_bc", "imagination")  # policies of a bench that drive under disturbances, too
STARTS = 22  # seed of a bench's starts, on which nothing was decided; its sizes were on those of 21


def scratch_steps(steps: int) -> dict[str, int]:
    """Steps of each network without a world model, before the scale: the same compute for bc_scratch and vpt,
    and bc_early takes at most an eighth of its own."""
    return {"bc_scratch": 2 * steps, "bc_early": 2 * steps, "vpt": steps}


def scaled(steps: int, scale: float) -> int:
    """Steps that are left of so many, as d4-eval counts them."""
    return max(1, round(steps * scale))


class Sizes(Protocol):
    """What every experiment must know."""

    @property
    def out(self) -> Path:
        """Folder of everything."""
        ...

    @property
    def scale(self) -> float:
        """Multiplies the training steps."""
        ...

    @property
    def preset(self) -> str:
        """Model size and training settings."""
        ...

    @property
    def eval_episodes(self) -> int:
        """Episodes per policy and seed."""
        ...


class Chains:
    """Collects the stages of an experiment in the order in which they matter."""

    def __init__(self, args: Sizes) -> None:
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
        weight: int = 1,
    ) -> str:
        """Add a stage; returns its name."""
        keeps = any(path.name == "run" for path in makes)
        title = " then ".join(words[0] for words in commands)
        typical_s += _START_S * len(commands)
        stage = Stage(name, title, commands, tuple(needs), makes, typical_s, True, keeps, recipe, weight)
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

    def baselines(self, name: str, run: Path, dataset: Path, steps: int) -> str:
        """Stage that trains what is cloned without a world model, beside the chain `name`, whose tokenizer
        made the run folder: both networks of the VPT style for so many steps, the one from scratch for twice
        as many, and for some shares of these (`EARLIER`).
        """
        from d4_core.baselines import EARLIER

        parts = [
            command("d4-clone", run, dataset=dataset, policies=(policy,), steps=scaled(each, self.args.scale))
            for policy, each in scratch_steps(steps).items()
        ]
        typical_s = (4 + 2 * sum(EARLIER)) * _SCRATCH_S * steps * self.args.scale
        return self.add(f"{name}/baselines", [f"{name}/tokenizer"], typical_s, *parts)

    def drive_all(self, drive: Callable[..., Command], steps: int, policies: Sequence[str]) -> list[Command]:
        """`drive(*policies, scratch_steps=...)` with the steps that `baselines` trained each of them for."""
        own, first = scratch_steps(steps), ("bc_scratch", "bc_early")
        rest = [policy for policy in policies if policy not in first]
        return [drive(*first, scratch_steps=own["bc_scratch"]), drive(*rest, scratch_steps=own["vpt"])]

    def driving(self, *policies: str, **options: Any) -> Callable[[Path, Path], Command]:
        """`drive` for a run that is yet to be named."""
        return lambda run, dataset: self.drive(run, dataset, *policies, **options)

    def data(
        self,
        place: Path,
        recordings: Sequence[tuple[str, int, float, int]],
        typical_s: float | None = None,
        jobs: int = 1,
    ) -> str:
        """Bags of (world, seed, share of labels, episodes), in one dataset with the first one's contract.

        `jobs` are processes that record and ingest; the stage then takes as many slots.
        """
        bags, dataset = place / "bags", place / "dataset"
        many: dict[str, Any] = {"jobs": jobs} if jobs > 1 else {}
        record = [
            command("d4-record", world=w, episodes=n, labelled=share, seed=s, out=bags / f"{w}-{s}", **many)
            for w, s, share, n in recordings
        ]
        sources = (bags / f"{w}-{s}" for w, s, *_ in recordings)
        contract = self.args.out / f"{recordings[0][0]}.yaml"
        ingest = command("d4-ingest", *sources, contract=contract, out=dataset, **many)
        if typical_s is None:
            typical_s = 0.02 * sum(n for *_, n in recordings)
        return self.add(
            f"{place.name}/data", [], typical_s, *record, ingest, makes=(bags, dataset), weight=jobs,
            recipe=" ".join(contract_of(world).hash for world, *_ in recordings),
        )  # fmt: skip
