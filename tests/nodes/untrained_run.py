"""A run folder with an untrained policy, made in a second. Usage: untrained_run.py CONTRACT FOLDER"""

import sys
from pathlib import Path

from d4_core import checkpoint
from d4_core.config import Preset, to_dict
from d4_core.models import CONTENTS, build
from d4_core.transformer import TransformerConfig
from d4_datasets.contract import Contract

SHAPE = TransformerConfig(dim=16, depth=2, heads=2, kv_heads=1, mlp_ratio=2.0, time_every=2, context=4)
PRESET = Preset(
    patch=4, num_latents=4, latent_dim=4, num_tokens=2, tokenizer=SHAPE, dynamics=SHAPE, registers=1,
    agent_tokens=2, leads=3, hidden=16, reward_bins=9, value_bins=9,
)  # fmt: skip


def save(contract: Contract, run: Path) -> Path:
    """Save it as the checkpoint of phase imagination; returns the run folder."""
    checkpoint.save(
        run / "imagination", modules=build(PRESET, contract).named(CONTENTS["imagination"]),
        config={"phase": "imagination", "config": {"preset": to_dict(PRESET)}, "step": 1, "status": "done"},
        contract=contract, metrics={}, train_state={},
    )  # fmt: skip
    return run


if __name__ == "__main__":
    save(Contract.load(sys.argv[1]), Path(sys.argv[2]))
