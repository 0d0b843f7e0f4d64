"""Recording in the contractors' format: what goes in comes out of their reader, from lines to a dataset."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_game
import minecraft_files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import contractor, minecraft, stepwise
from d4_datasets.errors import UserError
from d4_datasets.ingest import ingest
from d4_datasets.windows import Windows
from d4_sim.minecraft import cli, game, record
from d4_sim.minecraft.benchmark import Benchmark, Plan
from d4_sim.minecraft.environment import Seen
from d4_sim.minecraft.episode import world_seed
from d4_sim.minecraft.hands import Hands
from d4_sim.minecraft.policies import load_policy
from d4_sim.minecraft.record import Again, Person, Script, Settings, _End, make_player, play
from d4_sim.minecraft.recorder import Lines, Recorder
from d4_sim.minecraft.replay import read_recorded
from d4_sim.minecraft.results import Results

IMAGE = np.zeros((36, 64, 3), np.uint8)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(game._ENGINES, "fake", "fake_game:ENGINE")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def action(*down: str, pitch: float = 0, yaw: float = 0) -> np.ndarray:
    out = np.zeros(minecraft.SIZE)
    out[[minecraft.COLUMN[name] for name in down]] = 1
    out[-2:] = pitch, yaw
    return out


def back(lines: list[dict], esc_is_a_key: bool = True) -> list[np.ndarray | None]:
    """The actions that the reader of recordings makes of lines."""
    player = contractor.Player(esc_is_a_key=esc_is_a_key)
    return [player.step(json.loads(json.dumps(line))) for line in lines]


def written(actions: list, said: list[dict] | None = None) -> list[dict]:
    lines = Lines()
    out = []
    for number, what in enumerate(actions):
        out += lines.add(said[number] if said else {}, what)
    return out + lines.flush()


rows = st.lists(
    st.builds(
        lambda down, pitch, yaw: action(*down, pitch=pitch, yaw=yaw),
        st.sets(st.sampled_from(minecraft.KEYS), max_size=5), st.floats(-180, 180), st.floats(-180, 180),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@given(actions=rows, gui=st.booleans())
def test_actions_come_back_from_the_lines(actions, gui) -> None:
    """Every key and every turn, held or pressed at once, from the first line on."""
    said = [{"gui": gui, "pointer": [3.0, 4.0] if gui else None, "slot": None}] * len(actions)
    lines = written(actions, said)
    assert len(lines) == len(actions)
    for mine, its in zip(actions, back(lines), strict=True):
        np.testing.assert_array_equal(its[:23], mine[:23])
        np.testing.assert_allclose(its[23:], mine[23:], atol=1e-9)


def test_an_attack_from_the_first_line_on_is_not_stuck() -> None:
    """Readers take a first line with a fresh attack for the click that closed the start menu."""
    for its in back(written([action("attack")] * 5)):
        assert its[minecraft.COLUMN["attack"]] == 1


def test_a_slot_that_follows_its_key_is_no_second_key() -> None:
    """The game shows the slot some ticks after the key; the wheel, which has no key, becomes one."""
    keys = [action(), action("hotbar_3"), *[action()] * 10]
    slots = [0, 0, 0, 2, 2, 2, 2, 2, 5, 5, 5, 5]
    got = back(written(keys, [{"slot": slot} for slot in slots]))
    pressed = [(n, name) for n, a in enumerate(got) for name in minecraft.HOTBAR if a[minecraft.COLUMN[name]]]
    assert pressed == [(1, "hotbar_3"), (8, "hotbar_6")]


def test_a_key_that_the_game_ignores_changes_no_slot() -> None:
    got = back(written([action("hotbar_3"), *[action()] * 8], [{"slot": 0}] * 9))
    assert [a[minecraft.COLUMN["hotbar_3"]] for a in got] == [1] + [0] * 8
    assert not any(a[minecraft.COLUMN["hotbar_1"]] for a in got)


def test_lines_say_counters_items_and_the_rest() -> None:
    said = {
        "stats": {"a": 1},
        "items": {"oak_log": 2},
        "gui": True,
        "pointer": [640.0, 360.0],
        "more": {"yaw": 3.0},
    }
    (line,) = written([action("use", yaw=1.5)], [said])
    assert line["stats"] == {"a": 1}
    assert line["inventory"] == [{"type": "oak_log", "quantity": 2}]
    assert (line["isGuiOpen"], line["mouse"]["x"], line["mouse"]["dx"], line["yaw"]) == (
        True,
        640.0,
        10.0,
        3.0,
    )
    assert contractor.counters(line) == ({"a": 1}, {"oak_log": 2})
    (bare,) = written([None], [{"stats": None, "items": None}])
    assert "stats" not in bare
    assert contractor.counters(bare) == (None, None)
    assert back([bare]) == [None]


def test_a_session_is_cut_into_parts_and_late_ones_are_refused(tmp_path, monkeypatch) -> None:
    """Pictures that came half a tick late or more do not belong to their actions."""
    monkeypatch.setattr("d4_sim.minecraft.recorder.PART_TICKS", 10)
    recorder = Recorder(tmp_path, "luanti-000000", most_late=0.2)
    for n in range(25):
        recorder.add(IMAGE, {"late_ms": 30.0 if 10 <= n < 13 else 1.0}, action())
    assert [path.name for path in recorder.close()] == ["luanti-000000-000.jsonl", "luanti-000000-002.jsonl"]
    assert recorder.refused == 1
    left = {f"luanti-000000-{part}.{ending}" for part in ("000", "002") for ending in ("jsonl", "mp4")}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert stepwise.count_frames(tmp_path / "luanti-000000-002.mp4") == 5
    recorder.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_part_ends_where_a_tick_passed_unseen(tmp_path) -> None:
    """Its frames were written as neighbours: a key held for six ticks became one of a single tick."""
    recorder = Recorder(tmp_path, "luanti-000000")
    missed = {3: 5, 7: 1, 8: 2}  # the one before the last leaves a part of one picture
    for n in range(10):
        recorder.add(IMAGE, {"more": {"missed": missed.get(n, 0)}}, action("forward") if n < 9 else None)
    lines = [[json.loads(line) for line in path.open()] for path in recorder.close()]
    assert [len(part) for part in lines] == [3, 4, 2]
    assert [[a is None for a in back(part)] for part in lines] == [
        [False, False, True], [False, False, False, True], [False, True],
    ]  # fmt: skip
    assert recorder.refused == 0


def test_what_a_policy_plays_late_is_left_out_as_well(tmp_path) -> None:
    recorder = Recorder(tmp_path, "luanti-000000")
    for _ in range(20):
        recorder.add(IMAGE, {"late_ms": 30.0}, action())
    assert (recorder.close(), recorder.refused) == ([], 1)


def test_from_a_played_game_to_a_dataset(tmp_path, capsys) -> None:
    """`record` with the engine's script, then ingest: actions, rewards and frames are what was played."""
    args = cli.Record(
        out=tmp_path / "rec", engine="fake", player="scripted", minutes=60 / 1200, episode_minutes=40 / 1200
    )
    assert args.run() == 0
    assert "60 ticks in 2 episodes, 2 parts" in capsys.readouterr().out
    again = cli.Record(out=tmp_path / "rec", engine="fake", player="scripted", minutes=20 / 1200)
    again.run()
    parts = list((tmp_path / "rec").glob("fake-00000[012]-000.jsonl"))
    assert len(parts) == 3
    for part in parts:  # the name of the game, in the first line
        assert ["engine" in json.loads(line) for line in part.read_text().splitlines()[:2]] == [True, False]
        assert read_recorded(part).engine == "fake"
    ingest([tmp_path / "rec"], minecraft_files.contract(), tmp_path / "dataset", jobs=1)
    logs = Windows(tmp_path / "dataset")
    assert logs.num_frames == 41 + 21 + 21
    labelled = logs.action_mask.astype(bool)
    assert labelled.sum() == 80
    attack = logs.action[:, 0][labelled]
    assert attack[:8].tolist() == [1, 0, 0, 1, 1, 0, 0, 1]
    yaw = logs.action[:40, -1]
    np.testing.assert_allclose(yaw, np.minimum(0.15 * np.arange(1, 41), 10), rtol=1e-5)
    tasks = list(logs.contract.task_names)
    assert logs.reward[:41, tasks.index("mine_log")].sum() > 5
    assert logs.reward[:41, tasks.index("craft_planks")].sum() > 2
    levels = np.asarray(logs.images["pov"][:41]).mean((1, 2, 3))
    assert np.abs(np.diff(levels) % 256 - 1).max() < 1.5  # a frame a tick, none twice


def test_labels_of_a_recording_are_the_events_of_the_live_game(tmp_path) -> None:
    """The same play three times: as it was judged, as its recording is replayed, and as it is ingested."""
    engine, contract = fake_game.ENGINE, minecraft_files.contract()
    plan = Plan(engine=engine, options={}, rungs=engine.ladder, ticks=40, keep=tmp_path / "kept")
    results = Results(tmp_path / "out", {"seed": 0})
    Benchmark(plan, load_policy("random", 1, "cpu", contract), results, lambda _: None).play([0], 1)
    live = read_recorded(tmp_path / "out" / "events" / "000000.jsonl")
    (part,) = (tmp_path / "kept").glob("*.jsonl")
    replayed = read_recorded(part)
    done = {tick: dict(told.amounts) for tick, told in live.told if told.amounts}
    assert len(done) > 5
    assert done == {tick: dict(told.amounts) for tick, told in replayed.told if told.amounts}
    for name in ("log", "planks"):
        first = [next(tick for tick, told in each.told if name in told.reached) for each in (live, replayed)]
        assert first == [results.episodes()[0]["reached"][name]] * 2
    ingest([tmp_path / "kept"], contract, tmp_path / "dataset", jobs=1)
    logs = Windows(tmp_path / "dataset")
    names = logs.contract.task_names
    labels = {t: {names[k] for k in np.flatnonzero(row)} for t, row in enumerate(logs.reward) if row.any()}
    assert labels == {tick: {*amounts} for tick, amounts in done.items()}


def settings(tmp_path: Path, **changes) -> Settings:
    plain = {"out": tmp_path, "ticks": 30, "episode_ticks": 30, "episodes": 9, "seed": 0, "most_late": 1.0}
    return Settings(**plain | changes)


def test_a_recording_is_played_again(tmp_path) -> None:
    first = play(fake_game.ENGINE, {}, Script(fake_game.Scripted), settings(tmp_path / "a"))
    second = play(fake_game.ENGINE, {}, Again(first.parts[0]), settings(tmp_path / "b", episodes=1))
    mine, its = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (first.parts[0], second.parts[0])
    )
    assert [line["mouse"] for line in mine] == [line["mouse"] for line in its]
    assert [line["stats"] for line in mine] == [line["stats"] for line in its]


class Silent:
    """Scripts of which the first plays one tick, and the others nothing."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, seed: int) -> Silent:
        self.seeds.append(seed)
        self._acts = len(self.seeds) == 1
        return self

    def act(self, view) -> dict | None:
        acts, self._acts = self._acts, False
        return {"forward": 1} if acts else None


def test_a_script_that_never_plays_is_one_sentence(tmp_path) -> None:
    """It began episodes forever: only ticks were counted, and the world was the same each time."""
    silent = Silent()
    with pytest.raises(UserError, match="3 episodes in a row ended at their first view"):
        play(fake_game.ENGINE, {}, Script(silent), settings(tmp_path))
    assert len(silent.seeds) == len(set(silent.seeds)) == 4
    assert not set(silent.seeds) & {world_seed(0, number) for number in range(1000)}  # those that judge
    assert len(list(tmp_path.glob("*.jsonl"))) == 1  # what was played is kept


def test_what_was_recorded_stays_when_the_game_is_lost(tmp_path) -> None:
    said = "the server closed the connection; what was played is kept; see"
    with pytest.raises(UserError, match=f"Fake game was lost: RuntimeError: {said}"):
        play(
            fake_game.ENGINE, {"trouble": "raise", "at": "12"}, Script(fake_game.Scripted), settings(tmp_path)
        )
    (lines,) = tmp_path.glob("*.jsonl")
    assert len(lines.read_text().splitlines()) == 12


def test_a_signal_between_a_frame_and_its_line_ends_the_session_after_both() -> None:
    end, written = _End(), []

    def write() -> None:
        with end.after():
            end(signal.SIGTERM, None)
            end(signal.SIGTERM, None)
            written.append("line")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert written == ["line"]
    with pytest.raises(KeyboardInterrupt):
        _End()(signal.SIGTERM, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_was_recorded_stays_when_the_process_is_told_to_end(tmp_path, number) -> None:
    """SIGTERM killed it: up to five minutes were lost, and hidden files stayed for ever."""
    code = f"""
import pathlib, fake_game
from d4_sim.minecraft.record import Script, Settings, play
settings = Settings(out=pathlib.Path({str(tmp_path)!r}), ticks=10**6, episode_ticks=10**6, episodes=1, seed=0,
                    most_late=1.0)
print(play(fake_game.ENGINE, {{}}, Script(fake_game.Scripted), settings).ticks)
"""
    left = tmp_path / ".tmp-99999999-fake-000007-000.mp4"  # of a process that was killed
    left.touch()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup has SIGHUP ignored
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in tmp_path.glob(".tmp-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    (lines,) = tmp_path.glob("*.jsonl")
    assert len(lines.read_text().splitlines()) >= int(said) > 0
    assert stepwise.count_frames(lines.with_suffix(".mp4")) == len(lines.read_text().splitlines())
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_script_lies_where_one_is(tmp_path, monkeypatch) -> None:
    """It was only found with PYTHONPATH; something else than a player ended in a traceback."""
    script = "class make:\n    def __init__(self, seed): ...\n    def act(self, view): ..."
    (tmp_path / "my_player.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    make_player("my_player:make", fake_game.ENGINE, 1).begin(0)
    for other in ("os:getcwd", "builtins:str"):
        with pytest.raises(UserError, match="must return something with a method act"):
            make_player(other, fake_game.ENGINE, 1).begin(0)


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ({"foward": 1}, "the script presses 'foward'; keys are attack, use"),
        ({"hotbar_1": 1}, "the script presses 'hotbar_1'"),
        ({"camera": [1, 2, 3]}, "camera is not pitch and yaw from -180 to 180 degrees"),
        ({"camera": [400, 0]}, "camera is not pitch and yaw"),
        ({"camera": [float("nan"), 0]}, "camera is not pitch and yaw"),
        ({"attack": "yes"}, "what the script does is not in numbers"),
        ({"camera": [[1], 2]}, "what the script does is not in numbers"),
        ([0] * 25, "the script acts with list, not with a dictionary"),
    ],
)
def test_what_a_script_does_is_an_action(tmp_path, action, sentence) -> None:
    """A misspelt key was one that nobody pressed, and a turn of 400 degrees was read back as 180."""

    class Odd(fake_game.Scripted):
        def act(self, view):
            return action

    with pytest.raises(UserError, match=sentence):
        play(fake_game.ENGINE, {}, Script(Odd), settings(tmp_path))


def test_players_that_are_not_there(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="has no scripted player"):
        make_player("scripted", game.engine("minerl"), 1)
    with pytest.raises(UserError, match="neither person, scripted, module:function nor a file"):
        make_player("nobody", fake_game.ENGINE, 1)
    with pytest.raises(UserError, match="has no no_such_module:make"):
        make_player("no_such_module:make", fake_game.ENGINE, 1)
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="is no file of lines of a recording"):
        make_player(str(tmp_path / "x.jsonl"), fake_game.ENGINE, 1)
    monkeypatch.setenv("DISPLAY", ":931")
    with pytest.raises(UserError, match=r"there is no display to play on|has no Tk"):
        make_player("person", fake_game.ENGINE, 1)


def test_hands_make_actions_of_keys_and_mouse() -> None:
    hands = Hands()
    assert Hands.key("w") == Hands.key("W") == "forward"
    assert (Hands.key("Shift_L"), Hands.key("exclam", 10), Hands.key("F5")) == ("sneak", "hotbar_1", None)
    hands.press("forward")
    hands.press("attack")
    hands.lift("attack", now=0.0)  # a click that is over before the tick
    hands.move(10, -4)
    first = hands.tick(now=1.0)
    assert first[minecraft.COLUMN["forward"]] == first[minecraft.COLUMN["attack"]] == 1
    np.testing.assert_allclose(first[-2:], (-0.6, 1.5))
    second = hands.tick(now=1.05)
    assert second.tolist() == action("forward").tolist()
    hands.lift("forward", now=1.1)  # a held key is lifted and pressed by X11 at its repeat rate
    hands.press("forward")
    assert hands.tick(now=2.0)[minecraft.COLUMN["forward"]] == 1
    hands.scroll(-1)
    assert hands.tick(now=2.1)[minecraft.COLUMN["hotbar_9"]] == 1
    assert hands.tick(now=2.2)[minecraft.COLUMN["hotbar_9"]] == 0


@pytest.fixture
def display(monkeypatch):
    """A display of its own, without a monitor."""
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed")
    pytest.importorskip("tkinter", reason="this Python has no Tk")
    mine, its = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(its), "-screen", "0", "800x600x24", "-nolisten", "tcp"],
        pass_fds=(its,), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(its)
    with os.fdopen(mine) as answer:
        monkeypatch.setenv("DISPLAY", ":" + answer.readline().strip())
    yield
    server.kill()
    server.wait()


def test_a_game_that_was_slow_is_not_played_faster_afterwards(monkeypatch) -> None:
    """After a stall of a second the held keys played twenty ticks at once."""
    now, acted = [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def receive() -> Seen:
        now[0] += 1.0 if len(acted) == 5 else 0.004
        return Seen(IMAGE, {})

    monkeypatch.setattr(record, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(record, "Person", SimpleNamespace)
    environment = SimpleNamespace(
        realtime=False, reset=lambda seed: None, receive=receive, step=lambda action: acted.append(now[0])
    )
    person = SimpleNamespace(begin=lambda seed: None, act=lambda seen: action("forward"))
    session = SimpleNamespace(ticks=0, episodes=0, time=lambda said: None, tell=lambda: None)
    recorder = SimpleNamespace(add=lambda *parts: None)
    settings = SimpleNamespace(seed=0, episode_ticks=30, ticks=30)
    record._episode(environment, person, settings, session, recorder, 0, _End())
    apart = np.diff(acted)
    assert len(apart) == 29
    np.testing.assert_allclose(apart[[*range(4), *range(6, 29)]], 0.05, atol=1e-6)
    assert apart[4] == pytest.approx(1.0)
    assert apart[5] > 0.003


def test_a_person_plays_in_a_window(display) -> None:
    """Keys, buttons and the mouse of a real window, and the key that leaves."""
    person = Person("Fake game", zoom=2)
    seen = Seen(np.zeros((36, 64, 3), np.uint8), {"pointer": None})
    assert not person.act(seen).any()
    window = person._window
    for event in ("<KeyPress-w>", "<KeyPress-Shift_L>"):
        window._root.event_generate(event, when="tail")
    window._label.event_generate("<ButtonPress-1>", when="tail", x=64, y=36)
    window._label.event_generate("<Motion>", when="tail", x=74, y=30)
    turned = person.act(seen)[-2:]
    action = person.act(seen)
    np.testing.assert_allclose(turned + action[-2:], (-0.9, 1.5))  # and putting the mouse back is no turn
    down = {name for name in minecraft.KEYS if action[minecraft.COLUMN[name]]}
    assert down == {"forward", "sneak", "attack"}
    window._root.event_generate("<KeyPress-F10>", when="tail")
    assert person.act(seen) is None
    person.close()
    person.close()
