"""``d4-clone``: baselines without a world model, on a run's data, labels and seed; needs no simulator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
import yaml

from d4_core import threads
from d4_datasets.errors import UserError, run_cli

if TYPE_CHECKING:
    from d4_core.baselines import BaselineTrainer
    from d4_datasets.windows import Windows


@dataclass(frozen=True, kw_only=True)
class CloneArgs:
    """Clone policies without a world model: small convolutional ones, for comparison, on the CPU.

    They see the data and the labels that the run was trained on. The same command continues.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of d4-train; gets the phases bc_scratch, bc_early, and vpt_idm and vpt."""
    dataset: Path
    """Dataset that the run was trained on."""
    policies: tuple[Literal["bc_scratch", "bc_early", "vpt"], ...] = ("bc_scratch", "vpt")
    """bc_scratch: from the known commands; bc_early: the same in an eighth of the steps, or less if held-out
    commands are known better then; vpt: also from commands that an inverse dynamics model infers."""
    steps: int = 1500
    """Training steps of each network; of bc_early those that it takes its share of."""


def about(run: Path) -> dict[str, Any]:
    """What d4-train noted about a run; empty for a folder that it did not make."""
    path = run / "config.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def open_logs(run: Path, dataset: Path) -> tuple[Windows, np.ndarray, np.ndarray]:
    """The data with the labels that a run was given, its training episodes and the held-out ones."""
    from d4_datasets.windows import Windows

    logs, noted = Windows(dataset), about(run)
    train, held_out = logs.split()
    logs.keep_labels(train, noted.get("labels", 1.0), noted.get("labels_from", "*"))
    return logs, train, held_out


def trainer(run: Path, logs: Windows, train: np.ndarray, steps: int) -> BaselineTrainer:
    """What trains or loads the baselines of a run.

    They have the run's own seed, and clone the episodes that its own clone did.
    """
    from d4_core.baselines import BaselineTrainer, InverseTraining, ScratchTraining
    from d4_core.pipeline import data_identity

    noted, scratch = about(run), ScratchTraining(steps=steps)
    relevant = noted.get("settings", {}).get("agent_training", {}).get("relevant_return")
    if relevant is not None:
        scratch = replace(scratch, relevant_return=relevant)
    return BaselineTrainer(
        run=run, contract=logs.contract, logs=logs, episodes=train, data=data_identity(logs),
        seed=int(noted.get("seed", 0)), scratch=scratch, inverse=InverseTraining(steps=steps),
    )  # fmt: skip


def main() -> None:
    """Entry point of ``d4-clone``."""
    run_cli(_main)


def require_run(run: Path) -> None:
    """Check that a folder is that of a run, before anything is written into it.

    Raises:
        UserError: it is not.
    """
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is no run of d4-train: train one, whose data and labels are used")


def _main() -> None:
    args = tyro.cli(CloneArgs, prog="d4-clone")
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    require_run(args.run)
    threads.configure()
    logs, train, held_out = open_logs(args.run, args.dataset)
    makes = trainer(args.run, logs, train, args.steps)
    work = {"bc_scratch": makes.clone, "bc_early": lambda: makes.early(held_out), "vpt": makes.vpt}
    for policy in args.policies:
        work[policy]()
        print(f"{policy}: {args.run / policy}")


if __name__ == "__main__":
    main()
