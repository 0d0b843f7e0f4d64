"""What 0 and 1 are in a world: random actions and the expert on the starts that all policies share."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from d4_core import threads
from d4_datasets import whole
from d4_datasets.errors import UserError, run_cli
from d4_sim.driver import worker_pool
from d4_sim.evaluate import first_start
from d4_sim.world import make_world

POLICIES = ("random", "expert")
_CHUNK = 4  # episodes per unit of parallel work


@dataclass(kw_only=True)
class Args:
    """Drive a world at random and by its expert, and write <out>/eval.json as d4-eval does."""

    world: Annotated[str, tyro.conf.Positional]
    """World to drive in."""
    out: Path
    """Folder of the result and its films."""
    episodes: int = 100
    """Shared starts, all of them for random actions."""
    expert_episodes: int = 100
    """Of these, those that the expert drives."""
    seed: int = 0
    """Decides the starts, as in d4-eval."""
    jobs: int = 1
    """Processes; the result does not depend on it."""


def starts(episodes: int, tasks: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Seeds and tasks of the first shared starts, int64 (episodes,) each; those of d4-eval with this seed."""
    return first_start(seed) + np.arange(episodes), np.arange(episodes) % tasks


def drive(world: str, kind: str, seeds: list[int], tasks: list[int]) -> Any:
    """One `EpisodeBatch` of a driver kind; the noise of its drivers follows from the first seed."""
    from d4_sim.driver import ScriptedPolicy
    from d4_sim.vector import run_episodes

    horizon = make_world(world).horizon
    policy = ScriptedPolicy(kind, seeds[0])
    return run_episodes(world, seeds, tasks, policy, horizon)


def reference(args: Args) -> None:
    """See `Args`."""
    made = make_world(args.world)
    args.out.mkdir(parents=True, exist_ok=True)
    first, _ = starts(1, 1, args.seed)
    seeds = [int(first[0]), int(first[0]) + args.episodes - 1]
    result: dict[str, Any] = {
        "world": args.world, "seeds": seeds, "task_names": list(made.tasks), "policies": {},
    }  # fmt: skip
    for kind in POLICIES:
        count = args.expert_episodes if kind == "expert" else args.episodes
        began = time.perf_counter()
        batches = _batches(args, kind, *starts(count, len(made.tasks), args.seed))
        row = {
            "return": np.concatenate([b.returns for b in batches]).tolist(),
            "success": np.concatenate([b.success for b in batches]).astype(int).tolist(),
            "fallen": np.concatenate([b.terminal.any(1) for b in batches]).astype(int).tolist(),
            "task": np.concatenate([b.task for b in batches]).tolist(),
            "seconds": time.perf_counter() - began,
        }
        result["policies"][kind] = row
        if kind == "expert":
            _film(args, made.contract.rate_hz, batches)
        mean, wins = float(np.mean(row["return"])), float(np.mean(row["success"]))
        per = row["seconds"] / count
        print(f"  {kind:8} return {mean:7.2f}  success {wins:.2f}  {per:.2f} s an episode", flush=True)
    whole.write(args.out / "eval.json", json.dumps(result))


def _batches(args: Args, kind: str, seeds: np.ndarray, tasks: np.ndarray) -> list[Any]:
    parts = [
        (args.world, kind, seeds[i : i + _CHUNK].tolist(), tasks[i : i + _CHUNK].tolist())
        for i in range(0, len(seeds), _CHUNK)
    ]
    if args.jobs == 1:
        return [drive(*part) for part in parts]
    with worker_pool(min(args.jobs, len(parts))) as pool:
        return list(pool.map(drive, *zip(*parts, strict=True)))


def _film(args: Args, fps: float, batches: list[Any]) -> None:
    """The expert's best and worst episodes."""
    from d4_sim.film import film_again
    from d4_sim.vector import join_batches

    batch = join_batches(batches)
    seeds, _ = starts(len(batch.length), 1, args.seed)
    film_again(args.out / "media", "expert", args.world, seeds, batch, fps)


def _main() -> None:
    args = tyro.cli(Args, prog="python -m d4_sim.reference")
    if not 1 <= args.expert_episodes <= args.episodes or args.jobs < 1:
        raise UserError("--jobs and --expert-episodes must be at least 1, --episodes as many as the expert's")
    threads.configure(1)
    reference(args)


def main() -> None:
    """Entry point of ``python -m d4_sim.reference``."""
    run_cli(_main)


if __name__ == "__main__":
    main()
