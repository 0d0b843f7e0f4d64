"""Policies that play: checkpoints of every phase that acts, with and without a world model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run

from d4_core import checkpoint
from d4_core.baselines import ScratchPolicy, ScratchTraining
from d4_core.config import action_parts
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.minecraft import cli
from d4_sim.minecraft.policies import load_policy

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "minecraft.yaml"


def small() -> Contract:
    spec = Contract.load(EXAMPLE).to_dict()
    spec["observations"][0]["size"] = [16, 24]
    return Contract.from_dict(spec)


def write_scratch(run: Path, phase: str, contract: Contract) -> None:
    """A policy without a world model, as the trainer of baselines keeps it."""
    torch.manual_seed(0)
    cfg = ScratchTraining(frames=2)
    size = contract.images[0].size
    policy = ScratchPolicy(action_parts(contract), cfg.bins, len(contract.task_names), size, cfg.frames, ())
    noted = asdict(cfg) | ({"labels": "1234"} if phase == "vpt" else {})
    config = {"phase": phase, "status": "done", "step": 1, "total_steps": 1, "config": {"training": noted}}
    checkpoint.save(
        run / phase, modules={"policy": policy}, config=config, contract=contract, metrics={}, train_state={}
    )


def rows(policy, place: int, seed: int, task: str, ticks: int = 4) -> np.ndarray:
    rng = np.random.default_rng(1)
    policy.begin(place, seed, task)
    pictures = rng.integers(0, 255, (ticks, 16, 24, 3), np.uint8)
    return np.stack([policy.act(place, picture, {}) for picture in pictures])


@pytest.mark.parametrize("phase", ["agent", "imagination", "bc_scratch", "vpt"])
def test_every_phase_that_acts_plays(tmp_path, phase) -> None:
    """Rows of the contract, sampled, the same for the same episode in whatever environment."""
    contract = small()
    if phase in ("agent", "imagination"):
        toy_run.write_checkpoint(tmp_path, phase, contract)
    else:
        write_scratch(tmp_path, phase, contract)
    policy = load_policy(str(tmp_path), 2, "cpu")
    policy.warm_up()
    assert policy.identity.split()[0] == phase
    first = rows(policy, 0, 5, "mine_log")
    assert first.shape == (4, 24)
    assert set(np.unique(first[:, :23])) <= {0.0, 1.0}
    assert set(np.unique(first[:, 23])) <= set(range(121))
    np.testing.assert_array_equal(first, rows(policy, 1, 5, "mine_log"))
    np.testing.assert_array_equal(first, rows(policy, 0, 5, "mine_log"))
    assert (first != rows(policy, 0, 6, "mine_log")).any()
    policy.ask(0, "mine_diamond")
    policy.act(0, np.zeros((16, 24, 3), np.uint8), {})


def test_a_run_plays_by_its_best_phase(tmp_path) -> None:
    for phase in ("agent", "imagination"):
        toy_run.write_checkpoint(tmp_path, phase, small())
    assert load_policy(str(tmp_path), 1, "cpu").identity.startswith("imagination")
    assert load_policy(str(tmp_path / "agent"), 1, "cpu").identity.startswith("agent")


def test_a_phase_that_is_still_trained_plays_only_if_it_is_named(tmp_path) -> None:
    """A table of half-trained imagination stood under the name of the finished run."""
    for phase in ("agent", "imagination"):
        toy_run.write_checkpoint(tmp_path, phase, small())
    under_way(tmp_path / "imagination")
    assert load_policy(str(tmp_path), 1, "cpu").identity.startswith("agent")
    named = load_policy(str(tmp_path / "imagination"), 1, "cpu").identity
    assert named.startswith("imagination at step 7 ")
    under_way(tmp_path / "agent")
    with pytest.raises(UserError, match="has only imagination, which is not trained to its end"):
        load_policy(str(tmp_path), 1, "cpu")


def under_way(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "training"}))


def test_a_checkpoint_of_crafter_plays_crafter(tmp_path, capsys) -> None:
    pytest.importorskip("crafter", reason="crafter is not installed")
    from d4_sim.crafter.world import Crafter

    toy_run.write_checkpoint(tmp_path / "run", "agent", Contract.load(Crafter.contract_path()))
    words = {"checkpoint": str(tmp_path / "run"), "engine": "crafter", "out": tmp_path / "out"}
    assert cli.Benchmark(**words, episodes=2, minutes=0.05).run() == 0
    assert "Crafter: 2 episodes of agent" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no task 'mine_log', which it is asked for"):
        cli.Benchmark(**words, episodes=2, minutes=0.05, prompt="mine_log").run()
    with pytest.raises(UserError, match="has another action space"):
        cli.Benchmark(**words | {"engine": "minerl"}, episodes=1).run()
