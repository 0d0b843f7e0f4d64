"""Minecraft 1.16.5 through MineRL v1.0, which the user brings: it cannot be installed without the game."""

from __future__ import annotations

from pathlib import Path

from d4_sim.minecraft.game import Engine
from d4_sim.minecraft.tasks import LADDER, MILESTONES

SCRIPT = Path(__file__).with_name("minerl_worker.py")

ENGINE = Engine(
    name="minerl",
    title="Minecraft 1.16.5 (MineRL v1.0)",
    kind="game",
    options=("python", "env"),
    script=SCRIPT,
    milestones=tuple(MILESTONES),
    ladder=LADDER,
    minutes=60.0,
    published=True,
    start_s=900.0,  # Java, the game, and a new world, beside others that start
    step_s=120.0,
)
