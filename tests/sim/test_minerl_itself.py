"""Our adapter against MineRL's own Python package, which needs no game for this.

D4_MINERL_PYTHON names an interpreter that can import minerl v1.0 and gym; where the package is only unpacked,
D4_MINERL_PATH names the folder that holds it. Skipped without.
"""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
from minerl_forms import CAMERA_SPACE, ENV_KEYS, is_in_space, wire_text

from d4_datasets import minecraft
from d4_datasets.errors import UserError
from d4_sim.minecraft.benchmark import Plan, require_told
from d4_sim.minecraft.check import mine_rl
from d4_sim.minecraft.environment import Environment
from d4_sim.minecraft.minerl import ENGINE, SCRIPT
from d4_sim.minecraft.tasks import LADDER

PYTHON = os.environ.get("D4_MINERL_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="D4_MINERL_PYTHON names no interpreter that has MineRL")


@pytest.fixture(autouse=True)
def where(monkeypatch) -> None:
    if path := os.environ.get("D4_MINERL_PATH"):
        monkeypatch.setenv("PYTHONPATH", path)


def ask(*arguments: str, text: str = ""):
    done = subprocess.run(
        [PYTHON, "-W", "ignore", str(SCRIPT), *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_spaces() -> None:
    """24 keys, degrees within half a turn, 640x360, and the counters that our tasks are made of."""
    said = ask("--spaces")
    assert tuple(sorted(said["actions"])) == ENV_KEYS
    camera = said["actions"].pop("camera")
    assert camera == {"shape": [2], "limits": [-CAMERA_SPACE, CAMERA_SPACE], "dtype": "float32"}
    assert all(part == {"n": 2} for part in said["actions"].values())
    assert said["pov"] == [360, 640, 3]
    known = {
        f"minecraft.{family}:minecraft.{name}" for family, names in said["known"].items() for name in names
    }
    known |= {f"minecraft.custom:minecraft.{name}" for name in said["known"]["full_stats"]}
    for task in minecraft.TASKS.values():
        assert set(task.stats) <= known
        # "log", "log2" and "planks" are older names, of MineRL 0.4
        assert {item for item in task.items if item not in ("log", "log2", "planks")} <= set(
            said["known"]["inventory"]
        )


def test_actions_are_contained_and_sent_as_ours() -> None:
    """A few hundred random actions: contained in the space, and the text is equal to the last character."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(0, 2, (300, 23)), rng.uniform(-180, 180, (300, 2))], 1)
    rows[:121, 23:] = minecraft.from_class(np.arange(121))
    for row, said in zip(rows, ask("--wire", text=json.dumps(rows.tolist())), strict=True):
        assert said["contained"]
        env = minecraft.to_env(row)
        assert is_in_space(env)
        assert said["text"] == wire_text(env)


LAUNCH = """
import importlib.util, json, os, sys, threading, time
script, theirs = sys.argv[1:3]
spec = importlib.util.spec_from_file_location("minerl_worker_", script)
worker = importlib.util.module_from_spec(spec)
sys.argv = [script]
spec.loader.exec_module(worker)
from minerl.env.malmo import InstanceManager, MinecraftInstance
InstanceManager.MINECRAFT_DIR = theirs
ours = worker.own_folder()
instance = MinecraftInstance(9000 + os.getpid() % 900)
threading.Thread(target=instance.launch, daemon=True).start()
deadline = time.monotonic() + 30
while not os.path.exists(os.path.join(ours, "saves", "mcpworld")) and time.monotonic() < deadline:
    time.sleep(0.05)
cwd = instance.minecraft_process.cwd()
instance.minecraft_process.kill()
print(json.dumps([ours, cwd, os.listdir(os.path.join(ours, "saves"))]), flush=True)
os._exit(0)
"""


def test_its_launcher_runs_the_game_in_our_folder(tmp_path) -> None:
    """With a script in place of the game: what that leaves behind is not in the package."""
    theirs = tmp_path / "MCP-Reborn"
    (theirs / "saves" / "old").mkdir(parents=True)
    script = theirs / "launchClient.sh"
    script.write_text('#!/bin/bash\ncd "$(dirname "$0")"\nmkdir -p saves/mcpworld\nexec sleep 60\n')
    script.chmod(0o755)
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", LAUNCH, str(SCRIPT), str(theirs)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    ours, where, worlds = json.loads(done.stdout.splitlines()[-1])
    assert ours == where != str(theirs)
    assert worlds == ["mcpworld"]
    assert [path.name for path in (theirs / "saves").iterdir()] == ["old"]


def test_check_knows_the_package() -> None:
    found = mine_rl(PYTHON)
    assert found[0].name == "MineRL v1.0"
    assert not found[0].missing
    assert found[1].name == "Minecraft 1.16.5"


def test_the_worker_opens_the_environment_without_the_game(tmp_path, monkeypatch) -> None:
    """Up to the game itself: the process starts, imports MineRL, makes the environment and says so."""
    monkeypatch.setenv("DISPLAY", os.environ.get("DISPLAY", ":0"))
    environment = Environment(ENGINE, {"python": PYTHON}, tmp_path / "log")
    try:
        assert environment.receive() is None
        assert not environment.realtime
        require_told(Plan(engine=ENGINE, options={}, rungs=LADDER, ticks=72_000), environment)
    finally:
        environment.close()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("MineRLObtainDiamondShovel-v0", "has no counter that tells place_crafting_table"),
        ("MineRLBasaltFindCave-v0", "has no counter that tells mine_log"),
        ("MineRLTreechop-v0", "is not played with the 23 keys"),
        ("MineRLNoSuchThing-v0", "MineRL makes no environment MineRLNoSuchThing-v0"),
    ],
)
def test_other_environments_of_the_package_are_refused(tmp_path, monkeypatch, name, sentence) -> None:
    """They have fewer keys, a smaller picture, or no counters, and would be played to no end."""
    monkeypatch.setenv("DISPLAY", os.environ.get("DISPLAY", ":0"))
    options = {"python": PYTHON, "env": name}
    plan = Plan(engine=ENGINE, options=options, rungs=LADDER, ticks=72_000)
    environment = Environment(ENGINE, options, tmp_path / "log")
    try:
        with pytest.raises(UserError, match=sentence):
            require_told(plan, environment) if environment.receive() is None else None
    finally:
        environment.close()
