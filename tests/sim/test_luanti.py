"""Luanti without the game: names, the channel, hands, clock, episodes, player, and what goes wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import minecraft
from d4_datasets.contract import Contract
from d4_sim.luanti import channel, engine, hands, names
from d4_sim.luanti.channel import Channel, Order, State, parse
from d4_sim.luanti.hands import Hands, Move, Press
from d4_sim.luanti.mouse import Mouse
from d4_sim.luanti.player import Chopper
from d4_sim.minecraft import game
from d4_sim.minecraft.game import GameTrouble, View
from d4_sim.minecraft.keys import require_keyboard_and_mouse, to_action, to_row
from d4_sim.minecraft.tasks import TASKS, Watch

EVERY_KEY = set(minecraft.to_env(np.zeros(minecraft.SIZE)))
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
    assert {*hands.KEYS, *hands.BUTTONS, "swapHands", "pickItem", "camera"} == EVERY_KEY
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


def test_after_missed_ticks_the_clock_is_in_the_one_that_is_on() -> None:
    """An action was measured as late by all of them, and the mouse did not move in that tick."""
    now = [0.0]
    mine = engine.Clock(lambda: now[0], lambda seconds: None)
    now[0] = 0.23
    mine.wait()
    now[0] = 0.24
    assert mine.since_tick() == pytest.approx(0.04)
    assert mine.left() == pytest.approx(0.01)


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
        assert set(action) == EVERY_KEY
        assert np.abs(action["camera"]).max() <= 12
        arena.step(action)
        ticks += 1
    assert arena.logs == []
    assert ticks > 200


def test_the_scripted_player_gives_up() -> None:
    arena, player = Arena(0), Chopper(0)
    arena.step = lambda action: None  # nothing it does has an effect
    assert [player.act(arena.view()) for _ in range(1801)][-1] is None


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


def test_a_player_who_has_left_has_chopped_no_tree(monkeypatch) -> None:
    """Without a player there is no trunk either, which ended the episode as if the tree were down."""
    left = engine.Luanti.__new__(engine.Luanti)
    left._wild, left._gui = False, False
    monkeypatch.setattr(left, "_look", lambda: np.zeros((360, 640, 3), np.uint8))
    monkeypatch.setattr(left, "_read", State)
    with pytest.raises(GameTrouble, match="the player has left the game"):
        left._view(0.0, 0.0, 0)
    monkeypatch.setattr(left, "_read", lambda: State(joined=True))
    assert left._view(0.0, 0.0, 0).over
