"""The benchmark's protocol with a game that misbehaves: watchdog, repetition, resuming, no process left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_game
import numpy as np
import pytest
import toy_run

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.locks import held, is_held
from d4_sim.minecraft import benchmark, cli, game
from d4_sim.minecraft.environment import Environment, Lost, Seen
from d4_sim.minecraft.episode import Episode, sight, world_seed
from d4_sim.minecraft.game import Rung
from d4_sim.minecraft.keeper import descendants
from d4_sim.minecraft.policies import load_policy
from d4_sim.minecraft.results import Results, ladder_key, read_episodes, rows, table, write_table
from d4_sim.minecraft.tasks import LADDER

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "minecraft.yaml"


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """The fake game among the engines, here and in the processes of its own."""
    monkeypatch.setitem(game._ENGINES, "fake", "fake_game:ENGINE")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def small() -> Contract:
    spec = Contract.load(EXAMPLE).to_dict()
    spec["observations"][0]["size"] = [16, 24]
    return Contract.from_dict(spec)


def play(out: Path, episodes: int = 2, jobs: int = 1, ticks: int = 40, lines: list | None = None, **options):
    """Results of the random policy; options are of the fake game."""
    engine = fake_game.ENGINE
    plan = benchmark.Plan(engine=engine, options=options, rungs=engine.ladder, ticks=ticks)
    policy = load_policy("random", jobs, "cpu", small())
    results = Results(out, about(ticks))
    tell = (lines if lines is not None else []).append
    done = {r["episode"] for r in results.episodes()}
    benchmark.Benchmark(plan, policy, results, tell).play([n for n in range(episodes) if n not in done], jobs)
    return results.episodes()


def about(ticks: int = 40) -> dict:
    return {
        "engine": "fake",
        "policy": "random",
        "ticks": ticks,
        "minutes": ticks / 1200,
        "prompts": "ladder",
        "ladder": ladder_key(LADDER),
        "seed": 0,
    }


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def family(children: Path) -> list[int]:
    return [int(word) for word in children.read_text().split()]


def assert_nothing_left(children: Path) -> None:
    deadline = time.monotonic() + 5
    while any(map(alive, family(children))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in family(children) if alive(pid)] == []


# ---- episodes


def test_episodes_say_what_was_reached_and_when(tmp_path) -> None:
    found = play(tmp_path, episodes=3, jobs=2, children=str(tmp_path / "children"))
    assert [e["episode"] for e in found] == [0, 1, 2]
    for e in found:
        assert (e["ticks"], e["ended"], e["crashes"], e["cut"]) == (40, "time", 0, False)
        assert e["seed"] == world_seed(0, e["episode"])
        assert 0 < e["reached"]["log"] <= 40
        assert 0 < e["reached"]["planks"] <= 40
        assert [task for _, task in e["prompts"]] == ["mine_log", "craft_planks", "mine_log"]
        assert len(e["policy_ms"]) == 3
    assert_nothing_left(tmp_path / "children")


def test_an_episode_depends_on_nothing_but_its_number(tmp_path) -> None:
    """Neither on how many play at a time nor on which process it gets."""
    one, three = play(tmp_path / "a", 4, jobs=1), play(tmp_path / "b", 4, jobs=3)
    for a, b in zip(one, three, strict=True):
        assert {k: a[k] for k in ("seed", "reached", "prompts")} == {
            k: b[k] for k in ("seed", "reached", "prompts")
        }


def test_death_ends_an_episode(tmp_path) -> None:
    (e,) = play(tmp_path, 1, dies_at="7")
    assert (e["ticks"], e["ended"]) == (7, "game")


def test_an_episode_that_begins_with_something_is_no_measurement(tmp_path) -> None:
    with pytest.raises(UserError, match="begins with an empty inventory, and this one with 1 diamond"):
        play(
            tmp_path, 1, begins_with="diamond", begins_in=str(world_seed(0, 0)),
            children=str(tmp_path / "children"),
        )  # fmt: skip
    assert_nothing_left(tmp_path / "children")


def test_a_bad_beginning_later_is_a_lost_environment(tmp_path) -> None:
    """One of a thousand worlds began with an item: that ended the benchmark, again whenever it went on."""
    lines: list[str] = []
    found = play(tmp_path, 3, lines=lines, begins_with="diamond", begins_in=str(world_seed(0, 1)))
    assert {e["episode"]: e["ended"] for e in found} == {0: "time", 1: "lost", 2: "time"}
    (bad,) = (e for e in found if e["cut"])
    assert (bad["episode"], bad["reached"]) == (1, {})
    assert any("empty inventory, and this one with 1 diamond" in line for line in lines)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_beginning_does_not_end_a_benchmark_that_goes_on(tmp_path, bad) -> None:
    """Every later run ended with the first view of that one episode, however many others were left."""
    wrong = {"begins_with": "diamond", "begins_in": str(world_seed(0, bad))}
    play(tmp_path, 2 - bad, **wrong)
    found = play(tmp_path, 3, **wrong)
    assert {e["episode"]: e["ended"] for e in found} == {n: "lost" if n == bad else "time" for n in range(3)}


def test_an_environment_that_is_slow_to_end_holds_up_no_other(tmp_path, monkeypatch) -> None:
    """While one that hung was ended, games in real time went on without their players, keys held."""
    end, results, waited = Environment.close, tmp_path / "out" / "episodes.jsonl", []

    def close(self, *grace) -> None:
        deadline = time.monotonic() + 30
        while not results.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        waited.append(results.exists())
        end(self, *grace)

    monkeypatch.setattr(Environment, "close", close)
    found = play(tmp_path / "out", 2, jobs=2, trouble="exit", at="9", once=str(tmp_path / "once"))
    assert sorted((e["crashes"], e["cut"]) for e in found) == [(0, False), (1, False)]
    assert waited == [True] * 3  # an episode was over before any of the three had ended


def test_a_game_that_plays_alone_has_ended_before_the_next_one_begins(tmp_path, monkeypatch) -> None:
    """With a display of its own number the next one would find that taken."""
    ended, made, end, begin = [], [], Environment.close, Environment.__init__

    def close(self, *grace) -> None:
        time.sleep(0.5)
        end(self, *grace)
        ended.append(self)

    def init(self, *args) -> None:
        made.append(len(ended))
        begin(self, *args)

    monkeypatch.setattr(Environment, "close", close)
    monkeypatch.setattr(Environment, "__init__", init)
    play(tmp_path / "out", 1, trouble="exit", at="9", once=str(tmp_path / "once"))
    assert made == [0, 1]


# ---- what environments do


@pytest.mark.parametrize("trouble", ["hang", "kill", "exit", "raise", "file", "user"])
def test_a_lost_environment_is_replaced_and_its_episode_repeated(tmp_path, trouble) -> None:
    """It hangs, is killed, ends, or fails in the middle of an episode: that is played again.

    What had a sentence for the user ended the benchmark, and with it all episodes of the other environments.
    """
    lines: list[str] = []
    whole = play(tmp_path / "whole", 2)
    found = play(
        tmp_path / "out", 2, lines=lines, trouble=trouble, at="20", once=str(tmp_path / "once"),
        children=str(tmp_path / "children"),
    )  # fmt: skip
    assert [e["crashes"] for e in found] == [1, 0]
    assert [e["reached"] for e in found] == [e["reached"] for e in whole]
    assert "is played again" in lines[0]
    assert_nothing_left(tmp_path / "children")


def test_an_episode_that_is_lost_again_and_again_counts_as_it_stood(tmp_path) -> None:
    found = play(tmp_path, 1, trouble="raise", at="30")
    assert [(e["cut"], e["crashes"], e["ended"], e["ticks"]) for e in found] == [(True, 3, "lost", 29)]
    assert "log" in found[0]["reached"]


def test_environments_are_started_anew_now_and_then(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "_RECYCLE", 2)
    whole = play(tmp_path / "whole", 5)
    found = play(tmp_path / "out", 5, children=str(tmp_path / "children"))
    assert [e["reached"] for e in found] == [e["reached"] for e in whole]
    assert len(family(tmp_path / "children")) == 3 * 3
    assert_nothing_left(tmp_path / "children")


def test_slowness_is_no_fault(tmp_path) -> None:
    (e,) = play(tmp_path, 1, trouble="slow", at="3")
    assert (e["crashes"], e["ticks"]) == (0, 40)


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ("refuse", "there is no display for this game: set DISPLAY"),
        ("no_start", r"Fake game does not start: RuntimeError: libGL is missing \(3 times\); see .*log"),
        ("kill", r"Fake game does not start: its process was killed by signal 9 .* \(3 times\)"),
    ],
)
def test_an_environment_that_does_not_start_ends_the_benchmark(tmp_path, trouble, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        play(tmp_path, 2, jobs=2, trouble=trouble)


def test_a_hanging_environment_ends_in_bounded_time(tmp_path) -> None:
    environment = Environment(fake_game.ENGINE, {"trouble": "hang", "at": "1"}, tmp_path / "log")
    try:
        assert environment.receive() is None
        environment.reset(1)
        environment.receive()
        began = time.monotonic()
        environment.step(np.zeros(25))
        with pytest.raises(Lost, match=r"no answer within 1\.5 s"):
            environment.receive()
        environment.close(0.0)
        assert time.monotonic() - began < 4
    finally:
        environment.close()


def test_killing_the_benchmark_leaves_no_process(tmp_path) -> None:
    """SIGKILL, which nobody can handle, while the game has children in sessions of their own."""
    children = tmp_path / "children"
    code = f"""
import pathlib
import fake_game
from d4_sim.minecraft.environment import Environment
options = {{"children": {str(children)!r}, "trouble": "hang", "at": "0"}}
e = Environment(fake_game.ENGINE, options, pathlib.Path({str(tmp_path / "log")!r}))
e.receive(); e.reset(1); print("up", flush=True); e.receive()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    assert all(map(alive, family(children)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing_left(children)


# ---- results


def test_the_same_command_continues(tmp_path) -> None:
    first = play(tmp_path, 1)
    both = play(tmp_path, 3)
    assert both[0] == first[0]
    assert len(both) == 3
    assert play(tmp_path, 3) == both  # nothing is played


def test_a_torn_line_is_played_again(tmp_path) -> None:
    whole = play(tmp_path, 2)
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_episodes(tmp_path)) == 1
    again = play(tmp_path, 2)
    assert [e["reached"] for e in again] == [e["reached"] for e in whole]
    assert path.read_text().count("\n") == 2


def test_a_folder_is_of_one_measurement(tmp_path) -> None:
    Results(tmp_path, about())
    Results(tmp_path, about()).add({"episode": 0, "reached": {}})
    with pytest.raises(UserError, match=r"is of another measurement \(policy differ\)"):
        Results(tmp_path, about() | {"policy": "agent 123"})
    (tmp_path / "benchmark.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        Results(tmp_path, about())
    (tmp_path / "benchmark.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="has format 0"):
        Results(tmp_path, about())


def test_a_folder_without_episodes_is_of_none_yet(tmp_path) -> None:
    """A benchmark whose option the game refused could not be repeated with the right one."""
    Results(tmp_path, about())
    Results(tmp_path, about() | {"policy": "agent 123"}).add({"episode": 0, "reached": {}})
    with pytest.raises(UserError, match="is of another measurement"):
        Results(tmp_path, about())


def test_a_folder_in_which_somebody_plays_is_of_that_measurement(tmp_path) -> None:
    """Until its first episode was over, which takes an hour, another one could begin beside it."""
    first = Results(tmp_path, about(), (0, 2))
    with first.alone():
        with pytest.raises(UserError, match=r"is of another measurement \(policy differ\)"):
            Results(tmp_path, about() | {"policy": "agent 123"}, (1, 2))
        with Results(tmp_path, about(), (1, 2)).alone():
            pass
        with pytest.raises(UserError, match="another d4-minecraft benchmark plays into"):
            Results(tmp_path, about(), (0, 2)).alone().__enter__()
        with pytest.raises(UserError, match=r"plays episodes-1of2 in .* the same n of --part i/n"):
            Results(tmp_path, about()).alone().__enter__()  # who played the same episodes, too
    other = Results(tmp_path, about() | {"policy": "agent 123"}, (1, 2))
    with other.alone(), pytest.raises(UserError, match="is of another measurement"), first.alone():
        pass


def test_a_look_at_a_lock_is_not_taken_for_its_holder(tmp_path, monkeypatch) -> None:
    """Of parts that began together one could be told that another process played it already."""
    first = Results(tmp_path, about(), (0, 2))
    with first.alone():
        pass
    looks = threading.Event()

    def slowly(path: Path) -> bool:
        if looks.is_set():
            return is_held(path)
        with held(path):
            looks.set()
            time.sleep(0.3)
        return False

    monkeypatch.setattr(sys.modules[Results.__module__], "is_held", slowly)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(Results, tmp_path, about(), (1, 2))
        assert looks.wait(20)
        with first.alone():
            pass
        second.result(20)


def test_what_cannot_be_done_there_is_not_asked_for(tmp_path) -> None:
    """A game without tables was asked for one for an hour an episode."""
    policy = load_policy("random", 1, "cpu", Contract.load(EXAMPLE))
    wild = game.engine("luanti_wild")
    plan = benchmark.Plan(engine=wild, options={}, rungs=(game.Rung("craft_crafting_table", None),), ticks=30)
    with pytest.raises(UserError, match=r"nobody can do craft_crafting_table in Luanti \(Minetest Game\)"):
        benchmark.require_ready(plan, policy)
    for name in ("luanti", "luanti_wild"):
        assert not {rung.task for rung in game.engine(name).ladder} & set(game.engine(name).impossible)


@pytest.mark.parametrize("line", ['{"episode": 20}', '{"episode": 20, "reached": {}}'])
def test_a_line_that_is_no_episode_is_one_sentence(tmp_path, line) -> None:
    (tmp_path / "episodes.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_episodes(tmp_path)


def test_a_table_of_somebody_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds results, and no benchmark\.json that says of what"):
        Results(tmp_path, about())
    assert (tmp_path / "table.md").read_text() == "mine"


def test_parts_share_a_folder(tmp_path) -> None:
    for part in (0, 1):
        results = Results(tmp_path, about(), (part, 2))
        results.add({"episode": part, "reached": {"log": 1200}, "ticks": 1300})
    assert [e["episode"] for e in read_episodes(tmp_path)] == [0, 1]
    (tmp_path / "episodes-1of2.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_episodes(tmp_path)


def test_the_table_has_published_columns_for_minecraft_only(tmp_path) -> None:
    episodes = [
        {"episode": n, "reached": {"log": 1200 * (n + 1), "planks": 2400}, "late_ms": [0.0, 12.0, 40.0 + n],
         "action_ms": [9.0, 14.0, 70.0], "missed": n, "ticks": 5000}
        for n in range(4)
    ]  # fmt: skip
    minecraft = table(game.engine("minerl"), about(72000), episodes)
    assert "WM+BC" in minecraft
    assert "arXiv:2509.24527" in minecraft
    assert "| log            | 100.0 [51.0, 100.0] | 84.3" in minecraft
    assert re.search(r"log +\| 2\.5 \[0\.4, 4\.2\] +\| 6\.3 ", minecraft)
    assert "taken 0.0 ms after its tick (median), 12.0 ms (95 %), at most 43 ms, and the action" in minecraft
    assert (
        "handed to the game 9.0 ms after its tick (median), 14.0 ms (95 %), at most 70 ms; 6 of 20000"
        in minecraft
    )
    other = table(fake_game.ENGINE, about(), episodes)
    assert "Dreamer" not in other
    assert "another game than Minecraft" in other
    assert other.startswith("# Fake game: 4 episodes of random")
    assert "Not complete" not in other
    partial = table(fake_game.ENGINE, about(), episodes, asked=12)
    assert "**Not complete**: 8 of 12 episodes are missing." in partial
    found = {row.milestone: row for row in rows(fake_game.ENGINE, episodes)}
    assert (found["log"].reached, found["diamond"].reached, found["diamond"].time) == (4, 0, None)
    with pytest.raises(UserError, match="no finished episode"):
        write_table(tmp_path, fake_game.ENGINE, about())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"minutes": 5.0}, "Episodes of at most 5 minutes"),
        (
            {"ladder": ladder_key([Rung("mine_log", None)]), "prompts": "mine_log throughout"},
            "mine_log throughout",
        ),
        ({"options": {"env": "MineRLOther-v0"}}, "Options of the game: env = MineRLOther-v0."),
    ],
)
def test_another_protocol_stands_beside_no_published_columns(change, says) -> None:
    """They stood beside five minutes of one prompt in another environment, which was named nowhere."""
    episodes = [{"episode": 0, "reached": {"log": 100}, "ticks": 6000}]
    assert "WM+BC" in table(game.engine("minerl"), about(72000), episodes)
    other = table(game.engine("minerl"), about(72000) | change, episodes)
    assert "WM+BC" not in other
    assert "arXiv" not in other
    assert "these compare with none of them" in other
    assert says in other


# ---- policies


def test_a_checkpoint_plays(tmp_path) -> None:
    """A world-model policy with a session per environment: tasks change on the way, results are its own."""
    toy_run.write_checkpoint(tmp_path / "run", "agent", small())
    policy = load_policy(str(tmp_path / "run"), 2, "cpu")
    assert policy.identity.startswith("agent ")
    engine = fake_game.ENGINE
    plan = benchmark.Plan(engine=engine, options={}, rungs=engine.ladder, ticks=30, keep=tmp_path / "kept")
    results = Results(tmp_path / "out", about())
    benchmark.Benchmark(plan, policy, results, lambda _: None).play(range(3), 2)
    found = results.episodes()
    assert len(found) == 3
    assert len(list((tmp_path / "kept").glob("*.jsonl"))) == 3
    again = Results(tmp_path / "again", about())
    benchmark.Benchmark(plan, load_policy(str(tmp_path / "run" / "agent"), 1, "cpu"), again, print).play(
        [2], 1
    )
    assert again.episodes()[0]["reached"] == found[2]["reached"]


def test_an_episode_that_is_played_again_leaves_no_parts_of_the_first_attempt(tmp_path) -> None:
    """A second part of a killed attempt stayed beside the shorter recording of the one that counts; what a
    person or another policy played in the folder stays.
    """
    engine, kept = fake_game.ENGINE, tmp_path / "kept"
    kept.mkdir()
    results = Results(tmp_path / "out", about(30))
    own = f"fake-random-seed0-{results.identity}-000000"  # others': with another prompt, of another policy
    stems = (f"{own}-001", "fake-random-seed0-0123ab-000000-001", "fake-agent-1f-seed0-000000-000")
    old = [kept / f"{stem}{end}" for stem in stems for end in (".mp4", ".jsonl")]
    for path in old:
        path.write_text("old")
    plan = benchmark.Plan(engine=engine, options={}, rungs=engine.ladder, ticks=30, keep=kept)
    policy = load_policy("random", 1, "cpu", small())
    benchmark.Benchmark(plan, policy, results, lambda _: None).play([0], 1)
    assert [path.exists() for path in old] == [False, False, True, True, True, True]
    assert (kept / f"{own}-000.jsonl").exists()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path) -> None:
    toy_run.write_checkpoint(tmp_path, "agent", toy_run.contract())
    policy = load_policy(str(tmp_path), 1, "cpu")
    plan = benchmark.Plan(engine=fake_game.ENGINE, options={}, rungs=fake_game.ENGINE.ladder, ticks=30)
    with pytest.raises(
        UserError, match=r"the checkpoint .*agent has another action space: 'base' is on /cmd_vel"
    ):
        benchmark.Benchmark(plan, policy, Results(tmp_path / "out", about()))
    crafter = pytest.importorskip("crafter", reason="crafter is not installed") and game.engine("crafter")
    with pytest.raises(UserError, match="is made for toy, not for crafter"):
        benchmark.require_fit(crafter, policy.contract, policy.name)
    toy_run.write_checkpoint(tmp_path / "only", "dynamics", small())
    with pytest.raises(UserError, match="no checkpoint that acts"):
        load_policy(str(tmp_path / "only"), 1, "cpu")
    with pytest.raises(UserError, match="of the phase dynamics, which does not act"):
        load_policy(str(tmp_path / "only" / "dynamics"), 1, "cpu")
    with pytest.raises(UserError, match="a random policy needs --contract"):
        load_policy("random", 1, "cpu")
    spec = small().to_dict()
    spec["tasks"]["names"] = ["mine_log"]
    few = load_policy("random", 1, "cpu", Contract.from_dict(spec))
    with pytest.raises(UserError, match="has no task 'craft_planks', which it is asked for"):
        benchmark.Benchmark(plan, few, Results(tmp_path / "few", about()))


def test_a_policy_sees_what_ingest_would_store() -> None:
    """The pointer is drawn where the game did not, then the picture is made smaller, as in recordings."""
    image = np.zeros((360, 640, 3), np.uint8)
    plain, _ = sight(fake_game.ENGINE, Contract.load(EXAMPLE), Seen(image, {}))
    pointed, _ = sight(fake_game.ENGINE, Contract.load(EXAMPLE), Seen(image, {"pointer": [640.0, 360.0]}))
    assert plain.shape == pointed.shape == (144, 256, 3)
    assert pointed[72:80, 128:134].max() > 100
    assert not plain.any()
    assert not image.any()


def test_crafter_is_played_under_its_own_name(tmp_path, capsys) -> None:
    """From nothing to a table with one command; another game, so no published columns."""
    pytest.importorskip("crafter", reason="crafter is not installed")
    args = cli.Benchmark(
        checkpoint="random", engine="crafter_peaceful", episodes=2, jobs=2, minutes=0.1, out=tmp_path / "out"
    )
    assert args.run() == 0
    said = capsys.readouterr().out
    assert "# Crafter without zombies and skeletons: 2 episodes of random" in said
    assert "Dreamer" not in said
    assert "All 22 achievements of the game" in said
    assert "| defeat skeleton" in said
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(numbers["achievements"]) == 22
    about = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert (about["ticks"], about["engine"]) == (60, "crafter_peaceful")


def test_ticks_that_passed_unseen_are_time() -> None:
    """A slow policy had longer minutes in a game that waits for nobody."""
    episode = Episode(fake_game.ENGINE, 0, 1, fake_game.ENGINE.ladder, 40)
    view = {"items": {}, "stats": {}, "more": {"action_ms": 1.0, "missed": 3}}
    for _ in range(11):
        assert not episode.ended
        episode.observe(Seen(np.zeros((2, 2, 3), np.uint8), view))
    assert (episode.ticks, episode.missed, episode.ended) == (40, 30, "time")


def test_what_comes_after_the_end_is_too_late() -> None:
    """Unseen ticks carried an episode past its end, and what was reached there counted."""
    episode = Episode(fake_game.ENGINE, 0, 1, fake_game.ENGINE.ladder, 10)
    image, key = np.zeros((2, 2, 3), np.uint8), "minecraft.mine_block:minecraft.oak_log"
    episode.observe(Seen(image, {"stats": {}, "items": {}}))
    episode.observe(Seen(image, {"stats": {key: 1}, "items": {"oak_log": 1}, "more": {"missed": 10}}))
    assert (episode.ticks, episode.ended, episode.reached, episode.events) == (11, "time", {}, [])


def test_an_episode_follows_its_ladder_from_the_first_view_on() -> None:
    episode = Episode(fake_game.ENGINE, 0, 1, fake_game.ENGINE.ladder, 10)
    image = np.zeros((4, 4, 3), np.uint8)
    key = "minecraft.mine_block:minecraft.oak_log"
    assert not episode.observe(Seen(image, {"stats": {key: 5}, "items": {}}))
    assert episode.observe(Seen(image, {"stats": {key: 8}, "items": {"oak_log": 3}}))
    assert (episode.task, episode.reached, episode.prompts) == (
        "craft_planks", {"log": 1}, [(0, "mine_log"), (1, "craft_planks")],
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_finished_and_the_same_command_continues(tmp_path, number) -> None:
    """SIGTERM ended it without a word and without a table."""
    pytest.importorskip("crafter", reason="crafter is not installed")
    words = [
        "benchmark",
        "random",
        "--engine",
        "crafter_peaceful",
        "--minutes",
        "0.1",
        "--out",
        str(tmp_path),
    ]
    command = [sys.executable, "-m", "d4_sim.minecraft.cli", *words, "--episodes"]
    process = subprocess.Popen([*command, "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("episode 0: ")
    below = descendants(process.pid)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert said == "stopped; what is done is kept and the same command continues\n"
    assert process.returncode == 128 + number
    assert (tmp_path / "table.md").exists()
    assert below
    assert not any(map(alive, below))
    finished = len(read_episodes(tmp_path))
    assert finished >= 1
    done = subprocess.run([*command, str(finished)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{finished} episode{'s' * (finished != 1)} there already" in done.stdout
