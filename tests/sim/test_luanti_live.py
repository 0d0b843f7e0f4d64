"""The real game of Luanti under Xvfb: keyboard, mouse, pictures and state, where both are installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from d4_datasets import minecraft
from d4_datasets.errors import UserError
from d4_sim.luanti.engine import Luanti
from d4_sim.luanti.player import Chopper
from d4_sim.luanti.screen import Screen
from d4_sim.minecraft.game import View
from d4_sim.minecraft.keeper import descendants

MISSING = [
    what
    for what, there in (
        ("minetest", shutil.which("minetest", path=f"{os.environ.get('PATH')}:/usr/games")),
        ("Xvfb", shutil.which("Xvfb")),
    )
    if not there
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed (apt-get install minetest xvfb): {', '.join(MISSING)}"
)
pytest.importorskip("Xlib", reason="python-xlib is not installed (pip install 'd4[luanti]')")

PATIENCE = 400  # ticks that a busy machine may need for what takes a few


def env(*down: str, pitch: float = 0, yaw: float = 0) -> dict:
    action = np.zeros(minecraft.SIZE)
    action[[minecraft.COLUMN[name] for name in down]] = 1
    action[-2:] = pitch, yaw
    return minecraft.to_env(action)


def until(mine: Luanti, action: dict, reached) -> View:
    """Play on until a view is like that."""
    for _ in range(PATIENCE):
        view = mine.step(action)
        if reached(view):
            return view
    raise AssertionError("it does not come to that")


def rest(mine: Luanti) -> View:
    """Let go of everything until nothing moves any more."""
    before = mine.step(env())
    for _ in range(PATIENCE):
        for _ in range(6):
            view = mine.step(env())
        keys = ("yaw", "pitch", "xpos", "ypos", "zpos")
        if all(abs(view.more[key] - before.more[key]) < 0.01 for key in keys):
            return view
        before = view
    raise AssertionError("it does not come to rest")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("luanti")
    before, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), str(folder)
    import tempfile

    tempfile.tempdir = None
    started = set(descendants(os.getpid()))
    game = Luanti(fps=20)
    yield game
    game.close()
    assert set(descendants(os.getpid())) <= started
    assert list(folder.iterdir()) == []
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


def test_an_episode_begins_with_nothing_and_a_tree(mine) -> None:
    for seed in (1, 2):
        view = mine.reset(seed)
        assert (view.items, view.stats, view.gui, view.slot, view.over) == ({}, {}, False, 0, False)
        assert view.pov.shape == (360, 640, 3)
        assert view.pov.dtype == np.uint8
        red, green, blue = (view.pov[..., k].astype(int) for k in range(3))
        assert (blue[:150] > red[:150] + 40).mean() > 0.2  # the sky, unless leaves hide it
        assert (green[200:] > blue[200:] + 20).mean() > 0.2  # grass
        assert 3 <= len(view.more["trunk"]) <= 5
        assert (view.more["xpos"], view.more["zpos"]) == (0, 0)


def test_the_mouse_turns_as_in_recordings(mine) -> None:
    """0.15 degrees a count: fifty ticks of 3.3 degrees right and 0.45 down are that in the game."""
    mine.reset(1)
    before = rest(mine).more
    for _ in range(50):
        mine.step(env(yaw=3.3, pitch=0.45))
    after = rest(mine).more
    turned = (after["yaw"] - before["yaw"]) % 360
    assert turned == pytest.approx(165.0, abs=0.2)
    assert after["pitch"] - before["pitch"] == pytest.approx(22.5, abs=0.2)


def test_keys_move_the_player(mine) -> None:
    mine.reset(1)
    before = rest(mine).more

    def far(view: View) -> float:
        return float(np.hypot(view.more["xpos"] - before["xpos"], view.more["zpos"] - before["zpos"]))

    view = until(mine, env("back"), lambda view: far(view) > 1)
    facing = np.radians(before["yaw"])
    went = np.array([view.more["xpos"] - before["xpos"], view.more["zpos"] - before["zpos"]]) / far(view)
    np.testing.assert_allclose(went, [-np.sin(facing), -np.cos(facing)], atol=0.1)
    rest(mine)
    until(mine, env("jump"), lambda view: view.more["ypos"] > before["ypos"] + 0.3)
    until(mine, env("hotbar_3"), lambda view: view.slot == 2)


def test_a_window_opens_is_pointed_at_and_closes(mine) -> None:
    mine.reset(1)
    mine.step(env("inventory"))
    opened = until(mine, env(), lambda view: view.gui)
    for _ in range(20):
        mine.step(env(yaw=3.0))
    moved = until(mine, env(), lambda view: (view.pov != opened.pov).any())
    assert (moved.pov[160:200, 300:340] != opened.pov[160:200, 300:340]).any()  # it was in the middle
    until(mine, env(), lambda view: view.gui)
    mine.step(env("ESC"))
    assert not until(mine, env(), lambda view: not view.gui).gui
    mine.step(env("inventory"))
    until(mine, env(), lambda view: view.gui)
    assert not mine.reset(2).gui


def test_the_scripted_player_gets_a_log(mine) -> None:
    view, player = mine.reset(11), Chopper(11)
    while (action := player.act(view)) is not None and not view.items:
        view = mine.step(action)
    assert view.items == {"oak_log": 1}
    assert view.stats == {"minecraft.mine_block:minecraft.oak_log": 1}
    assert len(view.more["trunk"]) >= 2
    assert mine.reset(11).items == {}


def test_it_listens_to_this_machine_only(mine) -> None:
    inside = descendants(os.getpid())
    listening = subprocess.run(["ss", "-lntupH"], capture_output=True, text=True, check=False).stdout
    if not listening:
        pytest.skip("no ss (iproute2) to ask")
    ours = [line.split() for line in listening.splitlines() if any(f"pid={pid}," in line for pid in inside)]
    places = [fields[4] for fields in ours]
    assert any(place.startswith("127.0.0.1:") for place in places)
    # the client's end of its connection to that server has a port, too; nothing answers there
    assert sum(not place.startswith("127.0.0.1:") for place in places) <= 1
    assert not any(fields[0] == "tcp" for fields in ours)


def test_a_display_in_use_is_refused(mine, tmp_path) -> None:
    number = mine._screen.number
    with pytest.raises(UserError, match=f"display :{number} is taken: choose another number"):
        Screen(tmp_path, number)


@pytest.mark.slow
def test_two_at_a_time(mine) -> None:
    other = Luanti(fps=20)
    try:
        first, second = mine.reset(1), other.reset(2)
        assert first.more["trunk"] != second.more["trunk"]
        before = second.more["yaw"]
        for _ in range(10):
            mine.step(env(yaw=5.0))
        rest(mine)
        assert rest(other).more["yaw"] == pytest.approx(before, abs=0.01)
    finally:
        other.close()


@pytest.mark.slow
def test_nothing_is_left_when_a_recording_is_killed(tmp_path) -> None:
    """Killed with no chance to clean up: the game, its display and their folder go all the same."""
    command = [sys.executable, "-m", "d4_sim.minecraft.cli", "record", "--engine", "luanti",
               "--player", "scripted", "--out", str(tmp_path / "rec"), "--set", "fps=20"]  # fmt: skip
    held = tmp_path / "tmp"
    held.mkdir()
    record = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(held)})
    deadline = time.monotonic() + 200
    while not list((tmp_path / "rec").glob(".tmp-*.mp4")):
        assert record.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    below = descendants(record.pid)
    assert len(below) >= 4  # keeper, worker, display, game
    record.send_signal(signal.SIGKILL)
    record.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in below) or list(held.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
