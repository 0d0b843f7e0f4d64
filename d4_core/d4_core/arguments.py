"""What ``d4-train`` is told on its command line. Knows no torch, which is imported once threads are set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from d4_core.config import Preset

PhaseName = Literal["tokenizer", "dynamics", "agent", "imagination"]
PHASES: tuple[PhaseName, ...] = ("tokenizer", "dynamics", "agent", "imagination")


@dataclass(kw_only=True)
class TrainArgs:
    """Train tokenizer, dynamics, agent and imagination on a dataset; rerun the same command to continue."""

    dataset: Annotated[tuple[str, ...], tyro.conf.Positional]
    """LeRobot v3 dataset made by d4-ingest: a folder, a URL, or a text file that lists such. Several are used
    as one."""
    run: Path
    """Run folder; checkpoints, metrics, gates and pictures go there."""
    preset: Literal["nano", "small", "base", "large", "paper"] = "nano"
    """Model size and training settings that go with it."""
    phases: tuple[PhaseName, ...] = PHASES
    """Phases to run, in their order."""
    seed: int = 0
    """Decides initialisation, batches and sampling."""
    scale: float = 1.0
    """Multiplies the number of steps of every phase."""
    labels: float = 1.0
    """Share of the labelled training episodes whose commands are used; the others count as plain video."""
    labels_from: str = "*"
    """Recordings whose commands are used, as a pattern of bag names; those of others count as plain video."""
    set: list[str] = field(default_factory=list)
    """Override preset fields, for example dynamics_training.ramp=false."""
    device: str = "auto"
    """auto, cpu or cuda."""
    procs: int = 0
    """Data-parallel processes; 0: one per free core on CPU (at most 4), one GPU. torchrun works, too."""
    tokenizer: Path | None = None
    """Run folder whose tokenizer made the latents of a dataset that holds those instead of pictures."""
    force: bool = False
    """Go on although a gate failed."""
    save_every_s: float = 60.0
    """Seconds between checkpoints."""
    cache: Path | None = None
    """Folder for what is fetched and unpacked; default: the dataset's own, for URLs ~/.cache/d4."""
    cache_gb: float | None = None
    """Keep no more than so many gigabytes of frames unpacked at a time, for datasets that do not fit."""


def scaled(args: TrainArgs) -> Preset:
    """The preset of these arguments with overrides and step counts applied."""
    from d4_core import config

    return config.scaled(config.override(config.preset(args.preset), args.set), args.scale)
