"""The fake game with worlds that do not emerge, whoever begins an episode in them."""

from __future__ import annotations

from dataclasses import replace

import fake_game

from d4_datasets.errors import UserError
from d4_sim.minecraft.game import View


class Stubborn(fake_game.Fake):
    """Args: bad: seeds of the worlds that do not emerge, with commas between them; all: none does;
    gone: neither does the game."""

    def __init__(self, bad: str = "") -> None:
        super().__init__()
        self.bad = bad.split(",")

    def reset(self, seed: int) -> View:
        if self.bad == ["gone"]:
            raise UserError("this game was uninstalled")
        if str(seed) in self.bad or self.bad == ["all"]:
            raise RuntimeError("this world does not emerge")
        return super().reset(seed)


ENGINE = replace(fake_game.ENGINE, opens="stubborn_game:Stubborn", options=("bad",))
