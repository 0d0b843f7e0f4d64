"""A game for tests of the benchmark's protocol: it can be told to hang, crash, be slow, refuse to start.

Attack mines a log every other tick, use makes four planks of one. Options say what goes wrong and at which
tick of an episode; with `once`, a file, only the first time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from d4_datasets.errors import UserError
from d4_sim.minecraft.game import Engine, Rung, View
from d4_sim.minecraft.tasks import MILESTONES

OPTIONS = ("trouble", "at", "once", "children", "begins_with", "begins_in", "dies_at", "late")


class Fake:
    realtime = False
    version = "Fake 1.0"

    def __init__(
        self, trouble="", at="0", once="", children="", begins_with="", begins_in="", dies_at="", late="0"
    ) -> None:
        self.begins_in = list(map(int, begins_in.split()))  # the seeds of worlds with something in hand
        self.trouble, self.at, self.once, self.begins_with = trouble, int(at), once, begins_with
        self.dies_at, self.late = int(dies_at or 10**9), float(late)
        if trouble == "refuse":
            raise UserError("there is no display for this game: set DISPLAY")
        if trouble == "no_start":
            raise RuntimeError("libGL is missing")
        if children:  # a child in a session of its own, as games have them
            child = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
            )
            with Path(children).open("a") as file:
                file.write(f"{child.pid} {os.getpid()} {os.getppid()}\n")

    def _troubled(self) -> bool:
        if not self.trouble or self.tick != self.at:
            return False
        if self.once:
            try:
                Path(self.once).touch(exist_ok=False)  # of several at a time, one
            except FileExistsError:
                return False
        return True

    def reset(self, seed: int) -> View:
        self.tick, self.logs, self.planks, self.seed = 0, 0, 0, seed
        self.mined = self.made = 0
        self._act_up()
        return self.view()

    def step(self, action) -> View:
        assert set(action) >= {"attack", "camera"}
        self.tick += 1
        self._act_up()
        if action["attack"] and self.tick % 2:
            self.logs, self.mined = self.logs + 1, self.mined + 1
        if action["use"] and self.logs:
            self.logs, self.planks, self.made = self.logs - 1, self.planks + 4, self.made + 4
        return self.view()

    def _act_up(self) -> None:
        if not self._troubled():
            return
        if self.trouble == "hang":
            time.sleep(600)
        elif self.trouble == "kill":
            os.kill(os.getpid(), 9)
        elif self.trouble == "exit":
            os._exit(3)
        elif self.trouble == "file":
            raise FileNotFoundError(2, "No such file or directory", "/tmp/screen0")
        elif self.trouble == "user":
            raise UserError("the display does not start: try again")
        elif self.trouble == "raise":
            raise RuntimeError("the server closed the connection")
        elif self.trouble == "slow":
            time.sleep(0.2)

    def view(self) -> View:
        pov = np.full((36, 64, 3), (self.seed + self.tick) % 256, np.uint8)
        items = {"oak_log": self.logs, "oak_planks": self.planks}
        if self.begins_with and self.seed in self.begins_in:
            items[self.begins_with] = 1
        stats = {
            "minecraft.mine_block:minecraft.oak_log": self.mined,
            "minecraft.craft_item:minecraft.oak_planks": self.made,
        }
        return View(
            pov, items, stats, slot=0, over=self.tick >= self.dies_at, late_ms=self.late, more={"yaw": 1.5}
        )

    def close(self) -> None:
        pass


class Scripted:
    """Attacks and uses in turn."""

    def __init__(self, seed: int) -> None:
        self.tick = 0

    def act(self, view: View):
        from d4_datasets import minecraft

        self.tick += 1
        action = np.zeros(minecraft.SIZE)
        action[minecraft.COLUMN["attack" if self.tick % 4 < 2 else "use"]] = 1
        action[minecraft.COLUMN["yaw"]] = 0.15 * self.tick
        return minecraft.to_env(action)


ENGINE = Engine(
    name="fake", title="Fake game", kind="game", opens="fake_game:Fake", options=OPTIONS,
    milestones=tuple(MILESTONES),
    ladder=(Rung("mine_log", 3), Rung("craft_planks", 8), Rung("mine_log", None)),
    minutes=40 / 1200, player="fake_game:Scripted", start_s=30.0, step_s=1.5,
)  # fmt: skip
