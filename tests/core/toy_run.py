"""A tiny dataset and a run folder with untrained checkpoints, for the tests of commands that read both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from d4_core import checkpoint
from d4_core.config import Preset, to_dict
from d4_core.imagination import ImaginationConfig
from d4_core.models import CONTENTS, Models, build
from d4_core.phases import ImaginationTraining
from d4_core.transformer import TransformerConfig
from d4_datasets.contract import Contract
from d4_datasets.lerobot import Episode, LeRobotWriter

_SHAPE = TransformerConfig(dim=16, depth=2, heads=2, kv_heads=1, mlp_ratio=2.0, time_every=2, context=4)
PRESET = Preset(
    patch=8, num_latents=4, latent_dim=4, num_tokens=2, tokenizer=_SHAPE, dynamics=_SHAPE, registers=1,
    agent_tokens=2, leads=2, hidden=16, reward_bins=9, value_bins=9,
    imagination_training=ImaginationTraining(settings=ImaginationConfig(steps=2)),
)  # fmt: skip


def contract(**changes) -> Contract:
    """One 16x24 camera, two continuous actions, two tasks and their rewards."""
    align = {"strategy": "hold", "timeline": "receive", "tolerance_ms": 150}
    base = {"topic": "/cmd_vel", "type": "geometry_msgs/msg/Twist", "select": ["linear.x", "angular.z"]}
    spec = {
        "name": "toy",
        "rate_hz": 10,
        "latency_ms": 40,
        "observations": [
            {
                "name": "cam",
                "topic": "/cam",
                "type": "sensor_msgs/msg/Image",
                "size": [16, 24],
                "align": align,
            }
        ],
        "actions": [
            {
                "name": "base",
                **base,
                "low": [-1.0, 0.0],
                "high": [1.0, 3.0],
                "safety": "zeros",
                "align": align,
            }
        ],
        "tasks": {
            "topic": "/task",
            "type": "std_msgs/msg/String",
            "select": "data",
            "names": ["left", "right"],
        },
        "reward": {"topic": "/reward", "type": "std_msgs/msg/Float64MultiArray", "select": "data"},
    }
    return Contract.from_dict({k: v for k, v in {**spec, **changes}.items() if v is not None})


def write_dataset(
    root: Path, lengths: tuple[int, ...] = (12, 12, 12, 12), labels: bool = True, **changes
) -> Contract:
    """A dataset of noise; the even episodes are labelled, or none."""
    toy, rng = contract(**changes), np.random.default_rng(0)
    tasks = len(toy.task_names)
    with LeRobotWriter(root, toy) as writer:
        for number, length in enumerate(lengths):
            labelled = np.full(length, labels and number % 2 == 0)
            action = rng.uniform(toy.action_low, toy.action_high, (length, toy.action_dim)).astype(np.float32)
            reward = np.zeros((length, tasks), np.float32)
            reward[-1] = 2.0 * (toy.reward is not None)
            episode = Episode(
                images={"cam": rng.integers(0, 256, (length, 16, 24, 3), dtype=np.uint8)},
                action=action * labelled[:, None], action_mask=labelled, reward=reward,
                task_index=np.zeros(length, np.int64), is_terminal=np.arange(length) == length - 1,
                source=f"bag-{number}",
            )  # fmt: skip
            writer.add_episode(episode)
    return toy


def write_checkpoint(run: Path, phase: str, toy: Contract) -> Models:
    """An untrained checkpoint of a phase, with zero-initialised layers made alive."""
    torch.manual_seed(0)
    models = build(PRESET, toy, phase)
    networks = models.named(CONTENTS[phase])
    for network in networks.values():
        for p in network.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.1)
    config = {
        "phase": phase, "status": "done", "step": 7, "total_steps": 7, "seed": 0,
        "config": {"phase": phase, "preset": to_dict(PRESET), "data": "a toy"}, "preset": to_dict(PRESET),
    }  # fmt: skip
    checkpoint.save(
        run / phase, modules=networks, config=config, contract=toy, metrics={"loss": 1.5}, train_state={}
    )
    return models
