"""Worlds that the benchmark plays as they are: discrete commands, and milestones of their own."""

from __future__ import annotations

from d4_sim.crafter.world import CHAIN, HORIZON, SURVIVAL
from d4_sim.minecraft.game import Engine, Rung

# What the recipes take until a diamond: a table 2 wood, a furnace 4 stone, and each pickaxe its own.
_COUNTS = {"collect_wood": 5, "collect_stone": 5}
_LADDER = (*(Rung(task, _COUNTS.get(task, 1)) for task in CHAIN[:-1]), Rung(CHAIN[-1], None))


def _crafter(name: str, world: str, title: str) -> Engine:
    return Engine(
        name=name,
        title=title,
        kind="world",
        opens=f"d4_sim.crafter.world:{world}",
        milestones=(*CHAIN, *SURVIVAL),
        ladder=_LADDER,
        rate_hz=10,
        minutes=HORIZON / 10 / 60,
        start_s=120.0,
        step_s=30.0,
    )


CRAFTER = _crafter("crafter", "Crafter", "Crafter")
CRAFTER_PEACEFUL = _crafter("crafter_peaceful", "CrafterPeaceful", "Crafter without zombies and skeletons")
