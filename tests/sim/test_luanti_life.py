"""Luanti's life without the game: it starts, does not start, dies, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from d4_datasets import minecraft
from d4_datasets.errors import UserError
from d4_sim import children
from d4_sim.luanti import engine, house, screen
from d4_sim.luanti.channel import Order
from d4_sim.minecraft import game
from d4_sim.minecraft.game import GameTrouble

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "luanti.yaml"


def said(step: int = 1, number: int = 0, phase: str = "idle", **more) -> dict:
    """A state as the mod writes it."""
    player = {"yaw": 0.0, "pitch": 0.0, "x": 0.0, "y": 8.5, "z": 0.0, "slot": 0.0, "keys": 0.0, "items": None}
    return {"step": float(step), "number": number, "phase": phase, "why": "", "stats": None,
            "trunk": [[1.0, 9.0, 3.0]], "player": player | more.pop("player", {})} | more  # fmt: skip


def env(*down: str, pitch: float = 0, yaw: float = 0) -> dict:
    action = np.zeros(minecraft.SIZE)
    action[[minecraft.COLUMN[name] for name in down]] = 1
    action[-2:] = pitch, yaw
    return minecraft.to_env(action)


# ---- the game's life, with a game that is none


class FakeScreen:
    """A display on which a game is played that does what `script` says."""

    alive, number = True, 7

    def __init__(self, folder, number) -> None:
        self.keys, self.gui, self.gone = set(), False, False
        FakeHouse.screen = self

    def look(self):
        if self.gone:
            raise ConnectionError("closed")
        return np.zeros((360, 640, 3), np.uint8), self.gui

    def focus(self):
        return True

    def key(self, symbol, down):
        (self.keys.add if down else self.keys.discard)(symbol)
        if symbol == "Escape" and down and FakeHouse.trouble != "stuck":
            self.gui = False

    def button(self, number, down):
        pass

    def move(self, right, down):
        pass

    def is_centred(self):
        return True

    def sync(self):
        pass

    def close(self):
        type(self).closed = True


class FakeHouse:
    """Writes states whenever it is looked at."""

    trouble, screen, step = "", None, 0

    def __init__(self, folder, display, look, wild) -> None:
        self.world = folder / "world"
        self.world.mkdir()
        self.folder, self.dead = folder, False
        type(self).last = self

    @property
    def alive(self):
        FakeHouse.step += 1
        order = self.world / "order.json"
        number = json.loads(order.read_text())["number"] if order.exists() else 0
        phase = {"fails": "failed", "slow": "emerging"}.get(self.trouble, "ready") if number else "idle"
        bits = 64 if "Shift_L" in self.screen.keys and self.trouble != "deaf" else 0
        if self.trouble != "absent":
            state = said(
                self.step, number, phase, why="2 pieces of the world were not made", player={"keys": bits}
            )
            (self.world / "state.json").write_text(json.dumps(state))
        return not self.dead

    def last_words(self):
        return "(code 1; out of memory)"

    def complaint(self):
        return ""

    def log(self):
        return "log of the game"

    def close(self):
        self.dead = True


@pytest.fixture
def luanti(monkeypatch, tmp_path):
    """Makes games that are none; their limits are short."""
    monkeypatch.setattr(engine, "Screen", FakeScreen)
    monkeypatch.setattr(engine, "House", FakeHouse)
    for name, value in {
        "_HEARS_S": 0.3,
        "START_S": 0.3,
        "_CLOSES_S": 0.1,
        "_POLL_S": 0.01,
        "_STILL_S": 0.05,
    }.items():
        monkeypatch.setattr(engine, name, value)
    real = Order.__init__
    monkeypatch.setattr(Order, "__init__", lambda self, number, since: real(self, number, since, 0.3))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(engine.tempfile, "tempdir", None)
    monkeypatch.setattr(FakeHouse, "trouble", "")
    made = []

    def make(trouble="", **options):
        FakeHouse.trouble = trouble
        made.append(engine.Luanti(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.close()  # twice is no mistake
    assert [path.name for path in tmp_path.iterdir()] == []


def test_an_episode_without_the_game(luanti) -> None:
    mine = luanti()
    assert isinstance(mine, game.Game)
    assert mine.realtime
    view = mine.reset(3)
    assert (view.pov.shape, view.items, view.stats, view.gui, view.slot) == ((360, 640, 3), {}, {}, False, 0)
    assert view.more["trunk"] == [[1.0, 9.0, 3.0]]
    began = time.monotonic()
    views = [mine.step(env("forward", yaw=1.5)) for _ in range(4)]
    assert time.monotonic() - began >= 0.19
    assert FakeHouse.screen.keys == {"w"}
    assert all(v.more["action_ms"] >= 0 and not v.over for v in views)
    FakeHouse.screen.gui = True
    assert mine.step(env()).gui
    mine.reset(4)  # closes the window
    assert FakeHouse.screen.keys == set()


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [("fails", "world does not emerge: 2 pieces of the world were not made"),
     ("slow", r"world does not emerge within 0.3 s \(emerging\): the machine is too busy"),
     ("deaf", "Luanti does not listen within 0.3 s"), ("stuck", "does not close its window")],
)  # fmt: skip
def test_an_episode_that_does_not_begin(luanti, trouble, sentence) -> None:
    mine = luanti()
    FakeHouse.trouble, FakeHouse.screen.gui = trouble, trouble == "stuck"
    with pytest.raises(GameTrouble, match=sentence):
        mine.reset(0)


def test_a_game_that_does_not_start_leaves_nothing(luanti, tmp_path, capsys) -> None:
    with pytest.raises(GameTrouble, match=r"Luanti does not start within 0.3 s"):
        luanti("absent")
    assert FakeHouse.last.dead
    assert FakeScreen.closed
    assert "log of the game" in capsys.readouterr().err


def test_a_game_that_dies_says_why(luanti) -> None:
    mine = luanti()
    mine.reset(0)
    FakeHouse.last.dead = True
    with pytest.raises(GameTrouble, match=r"^Luanti died \(code 1; out of memory\)$"):
        mine.step(env())
    other = luanti()
    other.reset(0)
    FakeHouse.screen.gone = True
    FakeHouse.screen.alive = False
    with pytest.raises(GameTrouble, match="Luanti's display died"):
        other.step(env())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"fps": "fast"}, "option fps is a whole number of 10 to 200, not 'fast'"),
     ({"view_range": "3"}, "option view_range is a whole number of 10"),
     ({"display": "0"}, "option display is")],
)  # fmt: skip
def test_options_that_make_no_sense(luanti, options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        luanti(**options)


# ---- what is missing


def test_what_is_not_installed_is_one_sentence(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(house.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(UserError, match="Luanti is not installed: apt-get install"):
        house.find_program()
    pytest.importorskip("Xlib", reason="python-xlib is not installed (d4[luanti])")
    with pytest.raises(UserError, match="Xvfb is not installed: apt-get install"):
        screen.Screen(tmp_path)
    monkeypatch.setitem(sys.modules, "Xlib.display", None)
    with pytest.raises(UserError, match=r"pip install 'python-xlib>=0.33"):
        screen.Screen(tmp_path)


def test_a_program_without_the_game(tmp_path) -> None:
    """Newer packages of Luanti bring no game."""
    program = tmp_path / "luanti"
    program.write_text("#!/bin/sh\necho devtest\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match="has no game 'minetest': install the package minetest-game"):
        house.require_game(str(program))
    with pytest.raises(UserError, match="does not start"):
        house.require_game(str(tmp_path / "nothing"))


def test_a_program_that_prints_no_text_is_a_sentence(tmp_path) -> None:
    """Bytes that are no UTF-8 came out of the question for its games as a traceback."""
    program = tmp_path / "luanti"
    program.write_text("#!/bin/sh\nprintf '\\377\\n'\n")
    program.chmod(0o755)
    assert house.version(str(program)) == "\ufffd"
    with pytest.raises(UserError, match="has no game 'minetest'"):
        house.require_game(str(program))


def test_a_display_that_leaves_traces_is_not_ours(tmp_path, monkeypatch) -> None:
    """A socket in the file system may lead to another machine's desktop, whose mouse is not ours to move."""
    pytest.importorskip("Xlib", reason="python-xlib is not installed (d4[luanti])")
    monkeypatch.setattr(screen, "_SOCKETS", tmp_path)
    monkeypatch.setattr(screen.shutil, "which", lambda name: "/bin/false")
    (tmp_path / "X4711").touch()
    assert screen.is_taken(4711)
    with pytest.raises(UserError, match="display :4711 is taken: choose another number"):
        screen.Screen(tmp_path, 4711)
    with pytest.raises(UserError, match="Xvfb does not start: it says nothing"):
        screen.Screen(tmp_path)


# ---- processes


def test_children_die_with_whoever_started_them(tmp_path) -> None:
    """Also when that is killed with no chance to clean up."""
    code = (
        "import sys, time; from pathlib import Path; from d4_sim import children\n"
        f"log = Path({str(tmp_path)!r}) / 'log'\n"
        "child = children.start(['sleep', '600'], {'PATH': '/usr/bin:/bin'}, log)\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and _is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_is_ended_with_its_group(tmp_path) -> None:
    child = children.start(["sh", "-c", "sleep 600 & wait"], dict(os.environ), tmp_path / "log")
    children.end(child)
    assert child.returncode == -signal.SIGKILL
    children.end(child)
    children.end(None)


def test_settings_listen_to_this_machine_only() -> None:
    text = house.settings(house.Look(fps=25), wild=False)
    assert "bind_address = 127.0.0.1\n" in text
    assert "server_announce = false\n" in text
    assert "mouse_sensitivity = 0.155642\n" in text  # 0.15 degrees a pixel at a field of view of 70
    assert "fps_max = 25\n" in text
    assert "mg_name = flat\n" in text
    assert "mg_name = v7\n" in house.settings(house.Look(), wild=True)


def test_the_last_complaint_is_what_a_death_is_explained_with(tmp_path) -> None:
    mine = object.__new__(house.House)
    mine._process, mine._log = None, tmp_path / "log"
    assert mine.complaint() == ""
    mine._log.write_text("2026-01-01 10:00:00: ACTION[Main]: fine\n"
                         "2026-01-01 10:00:01: ERROR[Main]: ModError: Failed to load mod\nbye\n")  # fmt: skip
    assert mine.complaint() == "ModError: Failed to load mod"
    assert mine.log().endswith("bye\n")
