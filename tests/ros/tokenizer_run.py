"""What the tests of the tokenizer node need torch and the importer for, run by the Python that has them.

tokenizer_run.py make CONTRACT FOLDER FRAMES   an untrained run, two episodes, and the latents of training
tokenizer_run.py check DATASET FOLDER          largest difference of a dataset's latents from those
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from d4_core import checkpoint
from d4_core.config import Preset, to_dict
from d4_core.data import encode_episodes
from d4_core.models import CONTENTS, build
from d4_core.transformer import TransformerConfig
from d4_datasets.contract import Contract
from d4_datasets.windows import Windows

SHAPE = TransformerConfig(dim=16, depth=4, heads=2, kv_heads=1, mlp_ratio=2.0, time_every=2, context=4)
PRESET = Preset(patch=4, num_latents=4, latent_dim=6, num_tokens=2, tokenizer=SHAPE, dynamics=SHAPE)


def make(contract: Contract, folder: Path, frames: int) -> None:
    """<folder>/run and <folder>/episodes.npz: eye (2F, 8, 12, 3), joints (2F, 2), latents (2F, 4, 6)."""
    torch.manual_seed(0)
    models, rng = build(PRESET, contract, "tokenizer"), np.random.default_rng(0)
    checkpoint.save(
        folder / "run" / "tokenizer", modules=models.named(CONTENTS["tokenizer"]),
        config={"phase": "tokenizer", "config": {"preset": to_dict(PRESET)}, "step": 1, "status": "done"},
        contract=contract, metrics={}, train_state={},
    )  # fmt: skip
    eye = rng.integers(0, 256, (2 * frames, 8, 12, 3), np.uint8)
    joints = rng.normal(size=(2 * frames, 2)).astype(np.float32)
    logs: Any = SimpleNamespace(
        images={"eye": eye}, vectors={"joints": joints},
        episode_start=np.array([0, frames]), episode_length=np.array([frames, frames]),
    )  # fmt: skip
    latents = torch.cat(encode_episodes(models.tokenizer.eval(), logs, np.arange(2))).numpy()
    np.savez(folder / "episodes.npz", eye=eye, joints=joints, latents=latents)


def check(dataset: Path, folder: Path) -> None:
    """Print the number of episodes, whose latents they are, and the largest difference.

    The tick before the next episode's start may come once more, with the frame of that episode.
    """
    windows, wanted = Windows(dataset), np.load(folder / "episodes.npz")["latents"]
    assert windows.latents is not None
    rows = np.concatenate([start + np.arange(len(wanted) // 2) for start in windows.episode_start])
    difference = np.abs(windows.latents[rows].astype(np.float32) - wanted).max()
    print(len(windows.episode_start), windows.origin.weights, windows.origin.codec, difference)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Contract.load(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        check(Path(sys.argv[2]), Path(sys.argv[3]))
