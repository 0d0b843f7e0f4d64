"""Policies of a run on the way to the diamond: episodes with the ladder of prompts, as milestones.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import tyro

from d4_core import threads
from d4_datasets.errors import UserError, run_cli
from d4_sim.crafter.milestones import LADDER, MILESTONES, Prompted, Watched, first_ticks
from d4_sim.evaluate import EvalArgs, Evaluation

SCRIPTED = ("data", "expert")


class Benchmark(Evaluation):
    """See `d4_sim.evaluate.Evaluation`; a row's `return` is the number of milestones that were reached.

    Rows hold `first`, the tick of every milestone in every episode (None: never), `ticks`, how long the
    episodes were, `fallen`, whether the player died, and `achievements`, how often each of the game's 22
    happened. What scripted players are asked for is theirs: the
    expert goes for the diamond, those of the log mix for what they would in a recording.
    """

    file = "milestones.json"

    def _episodes(self, name: str) -> dict[str, Any]:
        from d4_sim.vector import run_episodes

        session, _ = self._session(name)
        tasks = self.tasks if name == "data" else np.full(len(self.seeds), MILESTONES.index(LADDER[-1].task))
        policy = Watched(session if name in SCRIPTED else Prompted(session))
        batch = run_episodes(self.world, self.seeds.tolist(), tasks.tolist(), policy, self.horizon)
        first = [first_ticks(r, n) for r, n in zip(batch.reward, batch.length.tolist(), strict=True)]
        return {
            "return": [sum(tick is not None for tick in row) for row in first],
            "success": batch.success.astype(int).tolist() if name != "data" else _last(first),
            "fallen": batch.terminal.any(1).astype(int).tolist(),
            "ticks": (batch.length - 1).tolist(),
            "first": first,
            "achievements": policy.achievements(),
        }


def _last(first: list[list[int | None]]) -> list[int]:
    """Whether the ladder's last task was done."""
    last = MILESTONES.index(LADDER[-1].task)
    return [int(row[last] is not None) for row in first]


def _main() -> None:
    args = tyro.cli(EvalArgs, prog="python -m d4_sim.crafter.benchmark")
    if args.argmax:
        raise UserError("--argmax has no place here: milestones are of sampling policies")
    threads.configure()
    benchmark = Benchmark(args)
    for name in args.policies:
        benchmark.policy(name)
        benchmark.write()


def main() -> None:
    """Entry point of ``python -m d4_sim.crafter.benchmark``."""
    run_cli(_main)


if __name__ == "__main__":
    main()
