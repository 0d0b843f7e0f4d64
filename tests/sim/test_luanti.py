"""Luanti without the game: names, the channel, hands, clock, episodes, player, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import minecraft
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.luanti import channel, children, engine, hands, house, names, screen
from d4_sim.luanti.channel import Channel, Order, State, parse
from d4_sim.luanti.hands import Hands, Move, Press
from d4_sim.luanti.mouse import Mouse
from d4_sim.luanti.player import Chopper
from d4_sim.minecraft import game
from d4_sim.minecraft.game import GameTrouble, View
from d4_sim.minecraft.keys import ENV_KEYS, require_keyboard_and_mouse, to_action, to_row
from d4_sim.minecraft.tasks import TASKS, Watch

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "luanti.yaml"


def said(step: int = 1, number: int = 0, phase: str = "idle", **more) -> dict:
    """A state as the mod writes it."""
    player = {"yaw": 0.0, "pitch": 0.0, "x": 0.0, "y": 8.5, "z": 0.0, "slot": 0.0, "keys": 0.0, "items": None}
    return {"step": float(step), "number": number, "phase": phase, "why": "", "stats": None,
            "trunk": [[1.0, 9.0, 3.0]], "player": player | more.pop("player", {})} | more  # fmt: skip


# ---- names


def test_every_task_that_the_game_knows_has_its_counter_and_its_items() -> None:
    """What the mod counts is what the 20 tasks look for; this game has no crafting table."""
    found = {
        "dig": {"default:tree": 1, "default:stone": 1, "default:stone_with_iron": 1,
                "default:stone_with_coal": 1, "default:stone_with_diamond": 1},
        "craft": {"default:wood": 4, "default:stick": 4, "default:furnace": 1, "default:steel_ingot": 1,
                  "default:pick_wood": 1, "default:pick_stone": 1, "default:pick_steel": 1},
        "place": {"default:furnace": 1}, "open": {"default:furnace": 1},
        "use": {"default:pick_wood": 2, "default:pick_stone": 2, "default:pick_steel": 2},
    }  # fmt: skip
    watch = Watch([*game.engine("luanti_wild").milestones])
    watch.step({}, {})
    items = {"default:jungletree": 1, "default:wood": 3, "default:stick": 1, "default:cobble": 1,
             "default:furnace": 1, "default:iron_lump": 2, "default:steel_ingot": 1, "default:diamond": 1,
             "default:pick_wood": 1, "default:pick_stone": 1, "default:pick_steel": 1}  # fmt: skip
    told = watch.step(names.counters(found), names.items(items))
    assert set(told.amounts) == {task for task in TASKS if "crafting_table" not in task}
    assert told.amounts["craft_planks"] == 4
    assert told.reached == game.engine("luanti_wild").milestones


def test_things_without_a_counterpart_keep_their_names() -> None:
    assert names.name_of("default:mese") == "default:mese"
    assert names.name_of("flowers:rose") == "flowers:rose"
    assert names.items({"default:furnace": 1, "default:furnace_active": 2}) == {"furnace": 3}
    assert names.counters({"unknown": {"default:tree": 1}}) == {}


def test_names_are_those_of_the_game() -> None:
    """Each translated name is one that Minetest Game registers, where it is installed."""
    mods = Path("/usr/share/games/minetest/games/minetest_game/mods/default")
    if not mods.is_dir():
        pytest.skip("Minetest Game is not installed (Debian: minetest)")
    text = "".join(path.read_text() for path in mods.glob("*.lua"))
    assert [name for name in names._NAMES if f"default:{name}" not in text] == []


# ---- channel


def test_a_state_is_read_in_degrees_that_turn_right(tmp_path) -> None:
    player = {"yaw": math.radians(350), "pitch": 0.5, "items": {"default:tree": 2.0}}
    state = parse(json.dumps(said(7, player=player, stats={"dig": {"default:tree": 2.0}})))
    assert state is not None
    assert (state.step, state.joined, state.slot) == (7, True, 0)
    assert state.yaw == pytest.approx(10)
    assert state.pitch == pytest.approx(math.degrees(0.5))
    assert state.items == {"default:tree": 2}
    assert state.counters == {"dig": {"default:tree": 2}}
    assert state.trunk == ((1.0, 9.0, 3.0),)
    before = parse(json.dumps({"step": 1, "number": 0, "phase": "idle", "why": ""}))
    assert before == State(step=1)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"step": 1}', '{"step": null, "number": 1, "phase": ""}',
     '{"step":1,"number":1,"phase":"x","player":{"yaw":null}}', '{"step":1e999,"number":1,"phase":"x"}'],
)  # fmt: skip
def test_what_is_no_state_is_none(text) -> None:
    assert parse(text) is None


@given(st.floats(-1e6, 1e6))
def test_angles_are_wrapped(degrees) -> None:
    wrapped = channel.wrap(degrees)
    assert -180 <= wrapped <= 180
    assert math.cos(math.radians(wrapped - degrees)) == pytest.approx(1, abs=1e-6)


def test_a_channel_keeps_the_last_state_and_notices_a_server_that_stands_still(tmp_path) -> None:
    line = Channel(tmp_path)
    assert line.read(0.0) == State()
    assert line.read(1000.0) == State()  # not begun: whoever started it waits with a limit
    (tmp_path / "state.json").write_text(json.dumps(said(1)))
    assert line.read(1001.0).step == 1
    (tmp_path / "state.json").write_text("torn")
    assert line.read(1002.0).step == 1
    (tmp_path / "state.json").write_text(json.dumps(said(2)))
    assert line.read(1015.0).step == 2
    assert line.read(1015.0 + channel.HANGS_S).step == 2
    with pytest.raises(GameTrouble, match="hangs: its server has not made a step for 20 s"):
        line.read(1016.0 + channel.HANGS_S)


def test_orders_are_numbered_and_whole(tmp_path) -> None:
    line = Channel(tmp_path)
    assert (line.order("arena", yaw=1.0), line.order("wild", places=[[1, 2]])) == (1, 2)
    assert json.loads((tmp_path / "order.json").read_text()) == {
        "number": 2,
        "kind": "wild",
        "places": [[1, 2]],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["order.json"]


def test_an_order_is_followed_until_it_is_done() -> None:
    """States of an older order say nothing about this one, whatever their phase."""
    order = Order(3, since=100.0, limit_s=60.0)
    assert not order.done(State(number=2, phase="ready"), 101)
    assert not order.done(State(number=2, phase="failed", why="old"), 101)
    for phase in ("emerging", "built"):
        assert not order.done(State(number=3, phase=phase), 159)
    assert order.done(State(number=3, phase="ready"), 200)
    with pytest.raises(GameTrouble, match="does not emerge: 3 pieces of the world were not made"):
        order.done(State(number=3, phase="failed", why="3 pieces of the world were not made"), 101)
    with pytest.raises(GameTrouble, match=r"does not emerge within 60 s \(emerging\)"):
        order.done(State(number=3, phase="emerging"), 161)
    with pytest.raises(GameTrouble, match=r"within 60 s \(not begun\)"):
        order.done(State(number=2, phase="ready"), 161)


# ---- hands


def env(*down: str, pitch: float = 0, yaw: float = 0) -> dict:
    action = np.zeros(minecraft.SIZE)
    action[[minecraft.COLUMN[name] for name in down]] = 1
    action[-2:] = pitch, yaw
    return minecraft.to_env(action)


def test_every_key_of_an_action_has_its_place() -> None:
    assert {*hands.KEYS, *hands.BUTTONS, *hands.NOT_HERE, "camera"} == set(ENV_KEYS)
    assert len({*hands.KEYS.values()}) == len(hands.KEYS)


def test_keys_go_down_and_up_once() -> None:
    mine = Hands()
    assert mine.act(env("forward", "attack")) == [Press(key="w"), Press(button=1)]
    assert mine.act(env("forward", "attack")) == []
    assert mine.act(env("forward", "hotbar_2")) == [Press(key="2"), Press(button=1, down=False)]
    assert mine.release() == [Press(key="w", down=False), Press(key="2", down=False)]
    assert mine.release() == []
    assert mine.act(env("swapHands", "pickItem")) == []


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), max_size=60))
def test_turns_add_up(turns) -> None:
    """0.15 degrees a pixel, as people played; what is rounded off a tick is turned in the next."""
    mine, total = Hands(), np.zeros(2)
    for yaw, pitch in turns:
        for deed in mine.act(env(yaw=yaw, pitch=pitch)):
            assert isinstance(deed, Move)
            total += deed.right, deed.down
    wanted = np.sum(np.float32(turns), axis=0) if turns else np.zeros(2)
    np.testing.assert_allclose(total * 0.15, wanted, atol=0.0751 + 1e-4)


class Pointer:
    """A pointer that a game reads and puts back, once in a while; what comes in between is lost."""

    def __init__(self) -> None:
        self.at, self.seen = np.zeros(2, int), np.zeros(2, int)

    def move(self, right, down):
        self.at += right, down

    def is_centred(self):
        return not self.at.any()

    def read(self):
        self.seen += np.clip(self.at, (-319, -179), (319, 179))
        self.at[:] = 0


@given(st.lists(st.tuples(st.integers(-400, 400), st.integers(-60, 60), st.booleans()), max_size=40))
def test_no_movement_of_the_mouse_is_lost(moves) -> None:
    """Movements made between the game's look at the pointer and its putting it back were lost under load."""
    pointer, now, total = Pointer(), [0.0], np.zeros(2, int)
    mine = Mouse(pointer, lambda: now[0])
    for right, down, is_read in moves:
        now[0] += 0.02
        if abs(mine._right + right) <= 1200:
            mine.add(right, down)
            total += right, down
        mine.deliver(False)
        mine.deliver(False)  # the last is not read yet: it has to wait
        if is_read:
            pointer.read()
    for _ in range(20):
        pointer.read()
        mine.deliver(False)
    assert not mine.waits
    np.testing.assert_array_equal(pointer.seen, total)


def test_the_mouse_does_not_wait_for_ever_nor_in_windows() -> None:
    pointer, now = Pointer(), [0.0]
    mine = Mouse(pointer, lambda: now[0])
    pointer.move(5, 5)  # nobody puts it back
    mine.add(10, 0)
    mine.deliver(False)
    assert mine.waits
    mine.deliver(True)
    assert (pointer.at == [15, 5]).all()
    mine.add(10, 0)
    now[0] = 1.5
    mine.deliver(False)
    assert (pointer.at == [25, 5]).all()
    mine.add(10, 10_000)
    mine.clear()
    assert not mine.waits


def test_in_a_window_the_pointer_moves_as_in_recordings() -> None:
    """Recordings are of windows twice as large: a count is half a pixel."""
    mine = Hands()
    mine.see(True)
    moved = [mine.act(env(yaw=0.15)) for _ in range(4)]
    assert sum(deed.right for deeds in moved for deed in deeds) == 2


def test_esc_is_for_open_windows_only() -> None:
    """Its menu leads out of the game; a view is some ticks older than what a key has done since."""
    mine = Hands()
    assert mine.act(env("ESC")) == []
    assert mine.act(env()) == []
    assert mine.act(env("inventory")) == [Press(key="e")]
    mine.see(True)
    assert mine.act(env("ESC")) == [Press(key="e", down=False)]  # just opened, or just closed
    mine.act(env())
    for _ in range(5):
        mine.see(True)
        mine.act(env())
    assert mine.act(env("ESC")) == [Press(key="Escape")]
    assert mine.act(env()) == [Press(key="Escape", down=False)]
    assert mine.act(env("ESC")) == []


def test_keys_that_were_held_in_a_window_are_pressed_again() -> None:
    mine = Hands()
    mine.act(env("forward"))
    assert mine.see(True) == []
    assert mine.see(False) == [Press(key="w", down=False), Press(key="w")]
    assert mine.see(False) == []


# ---- clock


def clock(delays):
    """A clock whose caller comes so late, one after the other: (late, missed) of each tick."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    mine = engine.Clock(lambda: now[0], sleep)
    out = []
    for delay in delays:
        now[0] += delay
        out.append(tuple(round(x, 6) for x in mine.wait()))
    return out, now[0]


def test_ticks_are_absolute() -> None:
    found, end = clock([0.01, 0.02, 0.0, 0.049])
    assert found == [(0, 0)] * 4
    assert end == pytest.approx(0.2)


def test_who_comes_late_gets_the_view_at_once_and_the_next_in_time() -> None:
    assert clock([0.06, 0.01])[0] == [(0.01, 0), (0.0, 0)]
    found, end = clock([0.23, 0.01])
    assert found == [(0.18, 3), (0.0, 0)]  # due at 0.05; 0.10, 0.15, 0.20 passed unseen
    assert end == pytest.approx(0.25)


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=30))
def test_seen_and_missed_ticks_are_all_ticks(delays) -> None:
    found, end = clock(delays)
    ticks = sum(1 + missed for _, missed in found)
    assert ticks * 0.05 <= end + 1e-6 < (ticks + 1) * 0.05 + 1e-5


# ---- episodes


def test_arenas_belong_to_seeds_and_are_within_reach() -> None:
    assert engine.arena(5) == engine.arena(5)
    found = [engine.arena(seed) for seed in range(300)]
    assert len({json.dumps(each) for each in found}) == 300
    for each in found:
        trunk = each["trunk"]
        assert 3 <= math.hypot(trunk["x"], trunk["z"]) <= 10
        assert trunk["height"] in (3, 4, 5)
        turn = channel.wrap(math.degrees(math.atan2(-trunk["x"], trunk["z"]) - each["yaw"]))
        assert abs(turn) <= 75.1  # in the field of view, or a short turn away
    assert len(engine.wild(1)["places"]) == 64


class Arena:
    """The arena in a few lines: what is done shows some ticks later, and a log takes 70 ticks of hitting."""

    def __init__(self, seed: int) -> None:
        what = engine.arena(seed)
        trunk = what["trunk"]
        self.logs = [(trunk["x"], 9 + k, trunk["z"]) for k in range(trunk["height"])]
        self.pose = [-math.degrees(what["yaw"]), math.degrees(what["pitch"]), 0.0, 0.0]  # yaw, pitch, x, z
        self.past = [list(self.pose)] * 3
        self.late = [env()] * 2
        self.hit, self.hits = None, 0

    def view(self) -> View:
        yaw, pitch, x, z = self.past[0]
        more = {"yaw": channel.wrap(yaw), "pitch": pitch, "xpos": x, "ypos": 8.5, "zpos": z}
        return View(np.zeros((1, 1, 3), np.uint8), more=more | {"trunk": [list(log) for log in self.logs]})

    def aimed(self):
        """The log in the cross-hairs, by walking along the line of sight."""
        yaw, pitch, x, z = self.pose
        yaw, pitch = math.radians(yaw), math.radians(pitch)
        for far in np.arange(0.3, 4.0, 0.05):
            at = (x + far * math.cos(pitch) * math.sin(yaw), 8.5 + 1.47 - far * math.sin(pitch),
                  z + far * math.cos(pitch) * math.cos(yaw))  # fmt: skip
            for log in self.logs:
                if all(abs(a - b) < 0.5 for a, b in zip(at, log, strict=True)):
                    return log
        return None

    def step(self, action) -> None:
        self.late.append(action)
        action = self.late.pop(0)
        pitch, yaw = action["camera"]
        self.pose[0], self.pose[1] = self.pose[0] + yaw, float(np.clip(self.pose[1] + pitch, -90, 90))
        ahead = action["forward"] - action["back"]
        angle, pace = math.radians(self.pose[0]), 0.2
        x, z = self.pose[2] + ahead * pace * math.sin(angle), self.pose[3] + ahead * pace * math.cos(angle)
        if all(abs(x - log[0]) > 0.8 or abs(z - log[2]) > 0.8 for log in self.logs):
            self.pose[2:] = x, z
        target = self.aimed() if action["attack"] else None
        self.hits = self.hits + 1 if target is not None and target == self.hit else 0
        self.hit = target
        if self.hits >= 70:
            self.logs.remove(target)
        self.past = [*self.past[1:], list(self.pose)]


@pytest.mark.parametrize("seed", range(12))
def test_the_scripted_player_chops_the_tree(seed) -> None:
    arena, player, ticks = Arena(seed), Chopper(seed), 0
    while (action := player.act(arena.view())) is not None and ticks < 1200:
        assert set(action) == set(ENV_KEYS)
        assert np.abs(action["camera"]).max() <= 12
        arena.step(action)
        ticks += 1
    assert arena.logs == []
    assert ticks > 200


def test_the_scripted_player_gives_up() -> None:
    arena, player = Arena(0), Chopper(0)
    arena.step = lambda action: None  # nothing it does has an effect
    assert [player.act(arena.view()) for _ in range(1801)][-1] is None


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
    with pytest.raises(UserError, match=r"pip install 'd4\[luanti\]'"):
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
        "import sys, time; from pathlib import Path; from d4_sim.luanti import children\n"
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


# ---- as engines


def test_the_example_contract_plays_the_game() -> None:
    contract = Contract.load(EXAMPLE)
    require_keyboard_and_mouse(contract, "it")
    assert {rung.task for rung in game.engine("luanti").ladder} <= set(contract.task_names)
    action = np.zeros(minecraft.SIZE)
    action[[minecraft.COLUMN[name] for name in ("attack", "forward", "yaw")]] = 1, 1, 3.2154
    np.testing.assert_allclose(to_action(contract, to_row(contract, action)), action, atol=1e-3)


def test_both_engines_are_complete() -> None:
    for name in ("luanti", "luanti_wild"):
        found = game.engine(name)
        assert found.name == name
        assert "Minecraft" not in found.title
        assert not found.published
        assert callable(game.named(found.opens))
        assert all(rung.task in TASKS for rung in found.ladder)
    assert game.named(game.engine("luanti").player) is Chopper
