"""``d4-train``: one command from a dataset to a checkpoint of every phase, with a gate after each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tyro

from d4_core import threads
from d4_core.arguments import PHASES, TrainArgs
from d4_core.workers import follow_parent, launch
from d4_datasets.errors import UserError, run_cli
from d4_datasets.places import limit_bytes


def run(args: TrainArgs) -> None:
    """Run the phases in this process (one of several under torchrun or `launch`)."""
    from d4_core.pipeline import Pipeline

    pipeline = Pipeline(args)
    with pipeline.alone():
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


if __name__ == "__main__":
    main()
    if "D4_RENDEZVOUS" in os.environ:
        # Everything is saved; the interpreter's teardown races with gloo's threads and sometimes aborts.
        sys.stdout.flush()
        os._exit(0)
