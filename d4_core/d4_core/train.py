"""``d4-train``: one command from a dataset to a checkpoint of every phase, with a gate after each."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from d4_core import threads
from d4_core.workers import follow_parent, launch
from d4_datasets.errors import UserError, run_cli
from d4_datasets.places import limit_bytes

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


def run(args: TrainArgs) -> None:
    """Run the phases in this process (one of several under torchrun or `launch`)."""
    from d4_core.pipeline import Pipeline

    pipeline = Pipeline(args)
    for phase in PHASES:
        if phase in args.phases:
            pipeline.run_phase(phase)
    pipeline.close()


def main() -> None:
    """Entry point of ``d4-train``."""
    run_cli(_main)


def _main() -> None:
    args = tyro.cli(TrainArgs, prog="d4-train")
    if args.scale <= 0:
        raise UserError(f"--scale {args.scale} must be positive")
    limit_bytes(args.cache_gb)
    if not 0 <= args.labels <= 1:
        raise UserError(f"--labels {args.labels} is a share: give a number from 0 to 1")
    inside = "RANK" in os.environ
    procs = 1 if inside else args.procs or unfinished_procs(args.run) or default_procs(args.device)
    if procs > 1:
        sys.exit(launch("d4_core.train", sys.argv[1:], procs, args.run))
    threads.configure(1 if inside else None)
    if "D4_RENDEZVOUS" in os.environ:
        follow_parent()
    run(args)


def unfinished_procs(run: Path) -> int:
    """Processes of a run that was interrupted inside a phase, else 0: batches depend on their number."""
    try:
        state = [json.loads(p.read_text())["status"] for p in run.glob("*/config.json")]
        known = next(
            line for line in (run / "config.yaml").read_text().splitlines() if line.startswith("procs: ")
        )
        return int(known.split()[1]) if "training" in state else 0
    except (OSError, ValueError, KeyError, StopIteration):
        return 0


def default_procs(device: str) -> int:
    """Processes for this machine: free cores (at most 4) on CPU, one on a GPU."""
    if device == "cuda" or (device == "auto" and Path("/proc/driver/nvidia").exists()):
        return 1
    return min(4, threads.free_cores())


def scaled(args: TrainArgs) -> Preset:
    """The preset of these arguments with overrides and step counts applied."""
    from d4_core.config import override, preset

    out = override(preset(args.preset), args.set)
    for name in ("tokenizer_training", "dynamics_training", "agent_training", "imagination_training"):
        part = getattr(out, name)
        reuse = getattr(part, "reuse", 1)
        steps = max(reuse, round(part.steps * args.scale / reuse) * reuse)
        out = dataclasses.replace(out, **{name: dataclasses.replace(part, steps=steps)})
    return out


if __name__ == "__main__":
    main()
    if "D4_RENDEZVOUS" in os.environ:
        # Everything is saved; the interpreter's teardown races with gloo's threads and sometimes aborts.
        sys.stdout.flush()
        os._exit(0)
