"""Steps of experiments that are no command of their own: forks, open-loop accuracy, space given back."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from d4_core import threads
from d4_datasets import whole
from d4_datasets.errors import UserError, run_cli

PHASES = ("tokenizer", "dynamics", "agent", "imagination")


@dataclass(kw_only=True)
class Fork:
    """Begin a run with the networks of another one; files are linked, so it costs no space."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    run: Annotated[Path, tyro.conf.Positional]
    """New run folder; what it holds of later phases is kept."""
    phase: Literal["tokenizer", "dynamics", "agent", "imagination"]
    """The last phase to take over."""


@dataclass(kw_only=True)
class OpenLoop:
    """Predict held-out clips from their first frames and commands, and write <run>/<file>.json."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder with a trained dynamics model."""
    dataset: Path
    """Dataset that it was trained on."""
    steps: tuple[int, ...] = (4,)
    """Sampling steps per frame; each is measured."""
    unknown: bool = False
    """Withhold the commands, from a model that never saw any."""
    file: str = "open_loop"
    """Name of the result."""
    bags: str = "*"
    """Recordings to measure on, as a pattern of bag names."""
    clips: int = 256
    """Number of clips."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(kw_only=True)
class Tidy:
    """Delete the bags and the unpacked frames of a finished chain; both can be made again."""

    place: Annotated[Path, tyro.conf.Positional]
    """Folder with bags/ and dataset/."""


def tidy(args: Tidy) -> None:
    """See `Tidy`."""
    for path in (args.place / "bags", args.place / "dataset" / "cache"):
        shutil.rmtree(path, ignore_errors=True)


def fork(args: Fork) -> None:
    """See `Fork`."""
    args.run.mkdir(parents=True, exist_ok=True)
    names = [*PHASES[: PHASES.index(args.phase) + 1], "latents"]
    for name in names:
        if (args.source / name).exists() and not (args.run / name).exists():
            # checkpoints and latents are replaced by renaming, never written into: links are safe
            aside = args.run / f".tmp-{name}"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(args.source / name, aside, copy_function=os.link)
            aside.rename(args.run / name)
    for name in ("config.yaml", "contract.yaml"):  # seed, labels and robot; d4-train writes its own over them
        if not (args.run / name).exists():
            shutil.copyfile(args.source / name, args.run / name)


def open_loop(args: OpenLoop) -> None:
    """See `OpenLoop`."""
    from d4_core.gates import fit_probe, frames_of
    from d4_core.models import load, weights_hash
    from d4_core.open_loop import CONTEXT, horizon_curves, open_loop, open_loop_clips
    from d4_core.pipeline import pick_device
    from d4_datasets.windows import Windows

    device = pick_device(args.device)
    logs = Windows(args.dataset)
    models = load(args.run / "dynamics", logs.contract, device)
    assert models.dynamics is not None
    train, held_out = logs.split()
    chosen = held_out[logs.of(args.bags)[held_out]]
    clips = open_loop_clips(logs, chosen, args.clips) if len(chosen) else chosen
    if not len(clips):
        raise UserError(f"no held-out episode of recordings {args.bags!r} is longer than {CONTEXT} frames")
    tag = weights_hash(args.run / "tokenizer")
    latents = np.load(args.run / "latents" / f"latents-{tag}.npy", mmap_mode="r")
    frames = frames_of(logs, train)
    names = [vector.name for vector in logs.contract.vectors("probe")]
    probes = {name: fit_probe(latents, logs.vectors[name], frames) for name in names}
    result: dict[str, Any] = {"unknown": args.unknown, "bags": args.bags, "by_steps": {}}
    for steps in args.steps:
        began = time.perf_counter()
        made = open_loop(models.dynamics, logs, latents, clips, seed=0, steps=steps,
                         unknown=args.unknown)  # fmt: skip
        seconds = time.perf_counter() - began
        curves = horizon_curves(models.tokenizer, logs, probes, made)
        predicted = made.predicted.shape[0] * made.predicted.shape[1]
        result["by_steps"][steps] = curves | {"frames_per_s": predicted / seconds}
        print(f"K = {steps}: {_line(curves)}, {predicted / seconds:.0f} frames/s", flush=True)
    path = args.run / f"{args.file}.json"
    whole.write(path, json.dumps(result, indent=1))


def _line(curves: dict[str, Any]) -> str:
    at = len(curves["horizons"]) - 1
    parts = [f"{curves['psnr']['model'][at]:.2f} dB", f"SSIM {curves['ssim']['model'][at]:.3f}"]
    if "position" in curves:
        parts.append(f"position error {curves['position']['model'][at]:.3f}")
    return f"{curves['horizons'][at]} frames ahead " + ", ".join(parts)


def _main() -> None:
    args: Fork | OpenLoop | Tidy = tyro.cli(
        Annotated[Fork, tyro.conf.subcommand("fork")]
        | Annotated[OpenLoop, tyro.conf.subcommand("open-loop")]
        | Annotated[Tidy, tyro.conf.subcommand("tidy")]
    )
    threads.configure()
    if isinstance(args, OpenLoop):
        open_loop(args)
    elif isinstance(args, Fork):
        fork(args)
    else:
        tidy(args)


def main() -> None:
    """Entry point of ``python -m d4_sim.measure``."""
    run_cli(_main)


if __name__ == "__main__":
    main()
