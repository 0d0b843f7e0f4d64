"""The worker of MineRL with a stand-in for its package: seeds, counters, a lost game, a missing display."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from d4_datasets import minecraft
from d4_datasets.errors import UserError
from d4_sim.minecraft import minerl_worker
from d4_sim.minecraft.benchmark import Plan, require_told
from d4_sim.minecraft.environment import Environment, Lost
from d4_sim.minecraft.game import Rung
from d4_sim.minecraft.keeper import descendants
from d4_sim.minecraft.minerl import ENGINE
from d4_sim.minecraft.tasks import LADDER, Watch

STAND_IN = '''
import os
import numpy as np

from types import SimpleNamespace as Space
KEYS = """ESC attack back camera drop forward inventory jump left pickItem right sneak sprint swapHands use
    hotbar.1 hotbar.2 hotbar.3 hotbar.4 hotbar.5 hotbar.6 hotbar.7 hotbar.8 hotbar.9""".split()
COUNTERS = ["mine_block", "craft_item", "use_item", "full_stats", "inventory", "location_stats"]

class Env:
    """As MineRL answers: numbers as arrays, a game that is lost only told in `info`."""
    def __init__(self, name):
        self.name, self.seeds, self.tick = name, [], 0
        self.unwrapped = self
        keys = KEYS[:9] if name == "Treechop" else KEYS
        self.action_space = Space(spaces=dict.fromkeys(keys))
        seen = {"pov": Space(shape=(64, 64, 3) if name == "Small" else (360, 640, 3))}
        if name != "Basalt":
            seen.update(dict.fromkeys(["inventory"] if name == "Shovel" else COUNTERS))
        self.observation_space = Space(spaces=seen)
        self.spec = Space(max_episode_steps=18000 if name == "Short" else None)
    def seed(self, seed, seed_spaces=True):
        assert isinstance(seed, int) and not seed_spaces
        self.seeds.append(seed)
    def seen(self, action=None):
        count = np.array(float(self.tick))
        return {
            "pov": np.full((360, 640, 3), self.tick, np.uint8),
            "inventory": {"oak_log": count, "air": np.array(30), "dirt": np.array(0)},
            "mine_block": {"oak_log": count, "stone": np.zeros(())}, "craft_item": {}, "use_item": {},
            "full_stats": {"interact_with_furnace": count, "jump": np.array(3.0)},
            "location_stats": {"yaw": np.array(12.5), "pitch": np.array(-3.0), "biome_id": np.array(1)},
        }
    def reset(self):
        if self.name == "Broken":
            raise EOFError("this Java is too new\\n\\nMinecraft process finished unexpectedly.\\n")
        self.tick = 0
        assert self.seeds.pop() == 7 and not self.seeds
        self.play()
        return self.seen()
    def play(self):
        """As the game leaves worlds in its folder, and MineRL its output where it is told to."""
        from minerl.env.malmo import InstanceManager
        self.worlds = getattr(self, "worlds", 0) + 1
        os.makedirs(os.path.join(InstanceManager.MINECRAFT_DIR, "saves", f"mcpworld{self.worlds}"))
        os.makedirs(os.path.join(".", "logs"), exist_ok=True)
        self.log = getattr(self, "log", None) or open(os.path.join(".", "logs", "mc_1.log"), "wb+")
        self.log.write(b"every counter at every tick" * 1000)
        self.log.flush()
    def step(self, action):
        self.tick += 1
        if self.tick == 3:
            return self.seen(), 0, True, {"error": "Connection timed out!"}
        assert action["camera"].dtype == np.float32
        return self.seen(), 0.0, False, {"isGuiOpen": bool(action["inventory"])}
    def close(self):
        if os.environ.get("STAND_IN_HANGS"):
            import time
            time.sleep(600)

def make(name):
    if name == "None-v0":
        raise KeyError("No registered env with id: None-v0")
    return Env(name)
'''


MALMO = """
class InstanceManager:
    MINECRAFT_DIR = __file__.replace("env/malmo.py", "env/../MCP-Reborn")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    (tmp_path / "gym.py").write_text(STAND_IN)
    game = tmp_path / "minerl" / "MCP-Reborn"
    for folder in (game / "build" / "libs", game / "saves" / "of-others", tmp_path / "minerl" / "env"):
        folder.mkdir(parents=True)
    for folder in (tmp_path / "minerl", tmp_path / "minerl" / "env"):
        (folder / "__init__.py").write_text("")
    (tmp_path / "minerl" / "env" / "malmo.py").write_text(MALMO)
    (game / "launchClient.sh").write_text("exit 0\n")
    (game / "build" / "libs" / "game.jar").write_text("a game")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("DISPLAY", ":0")
    return tmp_path


def start(tmp_path: Path, **options: str) -> Environment:
    return Environment(ENGINE, {"python": sys.executable} | options, tmp_path / "log")


def test_what_minerl_tells_becomes_counters_items_and_the_rest(stand_in) -> None:
    environment = start(stand_in)
    try:
        assert environment.receive() is None
        environment.reset(7)
        first = environment.receive()
        assert first.image.shape == (360, 640, 3)
        assert (first.said["items"], first.said["stats"]) == ({}, {})
        action = np.zeros(minecraft.SIZE)
        action[minecraft.COLUMN["inventory"]] = 1
        environment.step(action)
        second = environment.receive()
        assert second.image[0, 0, 0] == 1
        assert second.said["items"] == {"oak_log": 1}
        assert second.said["stats"] == {
            "minecraft.mine_block:minecraft.oak_log": 1,
            "minecraft.custom:minecraft.interact_with_furnace": 1,
        }  # fmt: skip
        assert second.said["gui"] is True
        assert second.said["pointer"] is None  # the picture shows it
        assert second.said["more"] == {"yaw": 12.5, "pitch": -3.0}
        watch = Watch(("log",))
        watch.step(first.said["stats"], first.said["items"])
        told = watch.step(second.said["stats"], second.said["items"])
        assert (told.amounts, told.reached) == ({"mine_log": 1.0, "open_furnace": 1.0}, ("log",))
    finally:
        environment.close()


def test_every_game_has_a_folder_of_its_own_and_one_world(stand_in, monkeypatch) -> None:
    """All games wrote their worlds into the package, under names that can be the same, and left them."""
    monkeypatch.setenv("TMPDIR", str(stand_in))
    environment = start(stand_in)
    try:
        environment.receive()
        for number in (1, 2):
            environment.reset(7)
            environment.receive()
            (game,) = stand_in.glob("d4-game-*/minerl-*/game")
            assert [path.name for path in (game / "saves").iterdir()] == [f"mcpworld{number}"]
            assert (game / "build" / "libs" / "game.jar").read_text() == "a game"
            assert (game / "launchClient.sh").exists()
            assert (game.parent / "logs" / "mc_1.log").stat().st_blocks == 0
    finally:
        environment.close()
    assert [path.name for path in (stand_in / "minerl/MCP-Reborn/saves").iterdir()] == ["of-others"]
    assert not list(stand_in.glob("d4-game-*"))
    assert (stand_in / "minerl/MCP-Reborn/build/libs/game.jar").exists()


def test_a_display_that_hangs_is_given_up(tmp_path, monkeypatch) -> None:
    """The limit was looked at only when it said something: a quarter of an hour, three times."""
    (tmp_path / "Xvfb").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "Xvfb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(minerl_worker, "_DISPLAY_S", 0.3)
    player = minerl_worker.Player.__new__(minerl_worker.Player)
    began = time.monotonic()
    with pytest.raises(SystemExit, match="Xvfb does not start"):
        player._start_display()
    assert time.monotonic() - began < 10
    player._display.kill()
    player._display.wait()


def test_a_lost_game_is_no_observation(stand_in) -> None:
    """MineRL answers with a made-up observation and says so in `info` only; that must not be played on."""
    environment = start(stand_in)
    try:
        environment.receive()
        environment.reset(7)
        for _ in range(3):
            environment.receive()
            environment.step(np.zeros(minecraft.SIZE))
        with pytest.raises(Lost, match="MineRL lost the game: Connection timed out!"):
            environment.receive()
    finally:
        environment.close()


def test_a_game_that_does_not_start_says_why(stand_in) -> None:
    """MineRL raises EOFError of its game, which was taken for the end of the benchmark."""
    environment = start(stand_in, env="Broken")
    try:
        environment.receive()
        environment.reset(7)
        with pytest.raises(Lost, match="EOFError: Minecraft process finished unexpectedly"):
            environment.receive()
    finally:
        environment.close()


def test_a_lost_game_is_told_before_it_is_closed(stand_in, monkeypatch) -> None:
    """Closing a game that hangs hangs, and the watchdog was all that ended it, minutes later."""
    monkeypatch.setenv("STAND_IN_HANGS", "1")
    environment = start(stand_in)
    try:
        environment.receive()
        environment.reset(7)
        for _ in range(3):
            environment.receive()
            environment.step(np.zeros(minecraft.SIZE))
        environment.deadline = time.monotonic() + 10
        with pytest.raises(Lost, match="MineRL lost the game"):
            environment.receive()
    finally:
        environment.close(0.0)


def test_an_interpreter_without_minerl_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    environment = start(tmp_path)
    try:
        with pytest.raises(UserError, match="cannot import MineRL"):
            environment.receive()
    finally:
        environment.close()
    environment = Environment(ENGINE, {"python": "/nowhere/python"}, tmp_path / "log")
    try:
        with pytest.raises(Lost, match="its process ended"):
            environment.receive()
    finally:
        environment.close()


def test_a_missing_display_is_said(stand_in, monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setenv("PATH", "/nowhere")
    environment = start(stand_in)
    try:
        with pytest.raises(
            UserError, match="there is no display for Minecraft: set DISPLAY, or apt-get install xvfb"
        ):
            environment.receive()
    finally:
        environment.close()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Treechop", "Treechop is not played with the 23 keys and the camera: it lacks, .* hotbar.1"),
        ("Small", r"Small shows pictures of \(64, 64, 3\), not of \(360, 640, 3\)"),
        ("None-v0", "MineRL makes no environment None-v0: 'No registered env"),
    ],
)
def test_environments_that_no_person_plays_are_refused(stand_in, name, sentence) -> None:
    """Any registered one was accepted."""
    environment = start(stand_in, env=name)
    try:
        with pytest.raises(UserError, match=sentence):
            environment.receive()
    finally:
        environment.close()


def plan(name: str, task: str | None = None, minutes: float = 60) -> Plan:
    rungs = LADDER if task is None else (Rung(task, None),)
    return Plan(engine=ENGINE, options={"env": name}, rungs=rungs, ticks=round(1200 * minutes))


def test_environments_that_do_not_tell_the_tasks_are_refused(stand_in) -> None:
    """Without counters the ladder would wait at placing a table for ever, and a limit ends it early."""
    ready = {}
    for name in ("Human", "Shovel", "Basalt", "Short"):
        ready[name] = start(stand_in, env=name)
    try:
        for environment in ready.values():
            assert environment.receive() is None
        require_told(plan("Human"), ready["Human"])
        with pytest.raises(UserError, match="Shovel has no counter that tells place_crafting_table"):
            require_told(plan("Shovel"), ready["Shovel"])
        require_told(plan("Shovel", "mine_log"), ready["Shovel"])
        with pytest.raises(UserError, match="Basalt has no counter that tells mine_log"):
            require_told(plan("Basalt", "mine_log"), ready["Basalt"])
        with pytest.raises(UserError, match="Short ends an episode after 15 minutes: give --minutes 15"):
            require_told(plan("Short"), ready["Short"])
        require_told(plan("Short", minutes=15), ready["Short"])
    finally:
        for environment in ready.values():
            environment.close()


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed")
def test_a_display_of_its_own_ends_with_the_game(stand_in, monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY")
    environment = start(stand_in)
    try:
        assert environment.receive() is None
        below = descendants(environment._keeper.pid)
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in below]
        assert "Xvfb" in names
    finally:
        environment.close(0.0)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)


def test_the_worker_does_not_take_our_modules_for_others(stand_in) -> None:
    """Its folder has a `minerl.py` of ours, and a file that is run is searched beside first."""
    (stand_in / "minerl" / "__init__.py").write_text(f"open({str(stand_in / 'imported')!r}, 'w').close()")
    environment = start(stand_in)
    try:
        assert environment.receive() is None
        assert (stand_in / "imported").exists()
    finally:
        environment.close()
