"""The commands of d4-minecraft: one sentence for a mistake, nothing left behind, and what they print."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "datasets"))
import fake_game
import minecraft_files

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.minecraft import check, cli, game, recipe, wire
from d4_sim.minecraft.replay import climb, read_recorded
from d4_sim.minecraft.tasks import LADDER

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "minecraft.yaml"


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(game._ENGINES, "fake", "fake_game:ENGINE")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process, as its entry point runs it."""

    def run(*words: object, **environment: str) -> Done:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["d4-minecraft", *map(str, words)])
            capsys.readouterr()
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def refused(done: Done) -> str:
    """The one sentence of a command that failed as it should."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


# ---- ladder


def stats(**counts: int) -> dict[str, int]:
    return {f"minecraft.{key.replace('__', ':minecraft.')}": n for key, n in counts.items()}


def recording(folder: Path) -> Path:
    """A contractor who mines 10 logs, crafts 20 planks and a table, and places it."""
    lines = [minecraft_files.line(stats=stats(mine_block__oak_log=90))]
    counts = {"mine_block__oak_log": 90}
    for _ in range(10):
        counts["mine_block__oak_log"] += 1
        lines.append(
            minecraft_files.line(stats=stats(**counts), inventory=[{"type": "oak_log", "quantity": 1}])
        )
    for craft in range(1, 6):
        lines.append(minecraft_files.line(stats=stats(**counts, craft_item__oak_planks=4 * craft)))
    counts |= {"craft_item__oak_planks": 20, "craft_item__crafting_table": 1}
    lines.append(minecraft_files.line(stats=stats(**counts)))
    lines.append(minecraft_files.line(stats=stats(**counts, use_item__crafting_table=1)))
    path = folder / "walk.jsonl"
    minecraft_files.write_lines(path, lines)
    return path


def test_the_ladder_over_a_recording(tmp_path, command) -> None:
    done = command("ladder", "--replay", recording(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "17 ticks" in lines[0]
    assert [line.split()[1] for line in lines[1:6]] == [rung.task for rung in LADDER[:5]]
    assert "10 of 10" in lines[1]
    assert "done at" in lines[4]
    assert "not done" in lines[5]
    assert lines[-1] == "milestones (minutes): log 0.00"


def test_climbing_says_when_each_rung_was_done(tmp_path) -> None:
    steps = list(climb(LADDER, read_recorded(recording(tmp_path))))
    assert [(s.rung.task, s.begin, s.end, s.done) for s in steps] == [
        ("mine_log", 0, 10, 10), ("craft_planks", 10, 15, 20), ("craft_crafting_table", 15, 16, 1),
        ("place_crafting_table", 16, 17, 1), ("craft_stick", 17, None, 0),
    ]  # fmt: skip


def test_the_ladder_over_events_of_a_benchmark(tmp_path, command) -> None:
    path = tmp_path / "000000.jsonl"
    head = {
        "format": "d4-minecraft-events",
        "version": 1,
        "engine": "crafter",
        "rate_hz": 10,
        "ticks": 99,
        "seed": 1,
    }
    pytest.importorskip("crafter", reason="crafter is not installed")
    path.write_text("".join(json.dumps(x) + "\n" for x in (head, {"tick": 7, "done": {"collect_wood": 5}})))
    done = command("ladder", "--replay", path)
    assert done.returncode == 0, done.stderr
    assert "Crafter" in done.stdout
    assert "5 of 5" in done.stdout
    path.write_text(json.dumps(head | {"version": 2}) + "\n")
    assert "holds events of version 2, this d4 reads 1" in refused(command("ladder", "--replay", path))
    path.write_text(json.dumps(head) + "\nnonsense\n")
    assert "line 2 is damaged" in refused(command("ladder", "--replay", path))


def test_files_that_tell_no_events(tmp_path, command) -> None:
    (tmp_path / "x.jsonl").write_text("hello\n")
    with pytest.raises(UserError, match="neither a file of lines of a recording nor one of events"):
        read_recorded(tmp_path / "x.jsonl")
    bare = minecraft_files.line()
    del bare["stats"], bare["inventory"]
    minecraft_files.write_lines(tmp_path / "basalt.jsonl", [bare] * 3)
    with pytest.raises(UserError, match="tells no events"):
        read_recorded(tmp_path / "basalt.jsonl")
    assert "cannot use" in refused(command("ladder", "--replay", tmp_path / "missing.jsonl"))


# ---- check


def test_check_says_what_is_missing_and_how_to_get_it(tmp_path, command) -> None:
    done = command("check", PATH="/nowhere", DISPLAY="", JAVA_HOME="")
    assert done.returncode == 0, done.stderr
    assert "MISSING Java 8: there is no Java: apt-get install openjdk-8-jdk" in done.stdout
    assert "MISSING MineRL v1.0: --python names no interpreter" in done.stdout
    assert "MISSING display: set DISPLAY, or apt-get install xvfb" in done.stdout
    done = command("check", "--engine", "minerl", "--python", "/nowhere/python", PATH="/nowhere")
    assert done.returncode == 1
    assert "/nowhere/python cannot import minerl" in done.stdout


def program(folder: Path, name: str, says: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END' >&2\n{says}\nEND\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("says", "value", "missing"),
    [
        ('openjdk version "1.8.0_402"', "1.8.0_402", ""),
        ('openjdk version "17.0.15" 2025-04-15', "17.0.15", "this is Java 17.0.15"),
        ("nonsense", "-", "there is no Java"),
    ],
)
def test_another_java_is_the_wrong_java(tmp_path, monkeypatch, says, value, missing) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    program(tmp_path, "java", says)
    found = check.java()
    assert (found.value, bool(found.missing)) == (value, bool(missing))
    assert missing in found.missing


def test_what_minecraft_does_not_start_without(monkeypatch) -> None:
    """Said before anything is started: the game that was not built, the wrong Java, no display."""
    here = [check.Found("MineRL v1.0", "1.0.2"), check.Found("Minecraft 1.16.5", "built with MineRL")]
    monkeypatch.setattr(check, "mine_rl", lambda python: here)
    monkeypatch.setattr(check, "java", lambda: check.Found("Java 8", "17", "this is Java 17"))
    with pytest.raises(UserError, match="Java 8: this is Java 17"):
        check.require_minerl("python")
    monkeypatch.setattr(check, "java", lambda: check.Found("Java 8", "1.8"))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="display: set DISPLAY, or apt-get install xvfb"):
        check.require_minerl("python")
    monkeypatch.setenv("DISPLAY", ":0")
    check.require_minerl("python")


def test_a_program_that_hangs_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(check, "_ASK_S", 0.2)
    assert check.ask("sleep", "10") == ""


# ---- mistakes of the other commands


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["random", "--contract", EXAMPLE, "--part", "5/4"], "--part 5/4 is not like 1/4"),
        (["random", "--contract", EXAMPLE, "--episodes", "0"], "--episodes must be at least 1"),
        (["random", "--contract", EXAMPLE, "--minutes", "0"], "must be above 0 minutes"),
        (["random", "--contract", EXAMPLE, "--set", "fast"], "--set fast is not like name=value"),
        (
            ["random", "--contract", EXAMPLE, "--set", "fast=1"],
            "takes no option 'fast'; it takes python, env",
        ),
        (["random", "--contract", EXAMPLE, "--python", "/nowhere/python"], "/nowhere/python is no program"),
        (["random"], "a random policy needs --contract"),
        (["random", "--engine", "crafter", "--keep", "x"], "--keep records games of keyboard and mouse"),
        (["/nowhere"], "/nowhere has no checkpoint that acts"),
    ],
)
def test_mistakes_of_benchmark(tmp_path, monkeypatch, command, words, sentence) -> None:
    if "crafter" in words:
        pytest.importorskip("crafter", reason="crafter is not installed")
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(command("benchmark", *words))
    assert list(tmp_path.iterdir()) == []  # nothing half-done


def test_a_missing_game_is_one_sentence(tmp_path, command) -> None:
    """MineRL is not in this interpreter: said once, no episode, no process."""
    done = command(
        "benchmark",
        "random",
        "--contract",
        EXAMPLE,
        "--out",
        tmp_path,
        "--episodes",
        1,
        "--python",
        sys.executable,
    )
    assert "MineRL v1.0: " in (said := refused(done))
    assert "cannot import minerl" in said
    assert not (tmp_path / "episodes.jsonl").exists()


# ---- train


def plain(tmp_path: Path, **changes) -> recipe.Recipe:
    settings = {
        "index": (), "recordings": tmp_path / "rec", "out": tmp_path / "out", "contract": EXAMPLE,
        "preset": "nano", "hours": 10.0, "gpus": 0, "jobs": 1, "scale": 1.0, "seed": 0,
    }  # fmt: skip
    return recipe.Recipe(**settings | changes)


def test_the_recipe_names_its_costs(tmp_path) -> None:
    """Everything over the paper's hours: frames, disk, parameters, steps, days per number of GPUs."""
    big = plain(tmp_path, index=("https://host/index.json",), hours=2541.0, preset="paper")
    lines = list(recipe.told(big, recipe.Stock(0, 0.0, 0), measure=False))
    assert "182,952,000 frames" in lines[0]
    assert "frame cache 20,2" in lines[1]
    assert "dynamics 1,6" in lines[2]
    assert "1 GPU" in lines[7]
    assert "256 GPUs" in lines[7]
    assert "once over the data takes --scale" in lines[8]
    words = [words for stage in recipe.plan(big) for words in stage.commands]
    assert [w[0] for w in words] == ["d4-fetch", "d4-ingest", "d4-audit", *["d4-train"] * 4]
    many = [w for stage in recipe.plan(plain(tmp_path, gpus=8)) for w in stage.commands]
    assert many[-1][:5] == ("torchrun", "--nproc-per-node", "8", "-m", "d4_core.train")


def test_recordings_that_are_there_are_measured(tmp_path) -> None:
    minecraft_files.write_recording(tmp_path / "rec", [minecraft_files.line()] * 40)
    here = recipe.stock(tmp_path / "rec")
    assert (here.recordings, round(here.hours * 72000)) == (1, 40)
    assert here.bytes > 1000
    assert any("measured" in name for name in recipe.disk(plain(tmp_path), here))


def test_the_recipe_runs_what_is_not_done_and_goes_on(tmp_path, monkeypatch) -> None:
    ran, fail = [], ["dynamics"]

    def run_command(words, env):
        ran.append(words[0] + ":" + words[words.index("--phases") + 1] if "--phases" in words else words[0])
        if words[0] == "d4-ingest":
            meta = tmp_path / "out" / "dataset" / "meta"
            meta.mkdir(parents=True)
            (meta / "d4.json").write_text('{"episodes": [{"labelled": 40}]}')
        return 1 if fail and ran[-1].endswith(fail[0]) else 0

    monkeypatch.setattr(recipe, "run_command", run_command)
    lines: list[str] = []
    assert recipe.run(plain(tmp_path), lines.append) == 1
    assert ran == ["d4-ingest", "d4-audit", "d4-train:tokenizer", "d4-train:dynamics"]
    fail.clear()
    ran.clear()
    assert recipe.run(plain(tmp_path), lines.append) == 0
    assert ran == ["d4-train:dynamics", "d4-train:agent", "d4-train:imagination"]


def test_zero_labelled_episodes_are_said_before_training(tmp_path, monkeypatch) -> None:
    meta = tmp_path / "dataset" / "meta"
    meta.mkdir(parents=True)
    (meta / "d4.json").write_text('{"episodes": [{"labelled": 0}, {"labelled": 0}]}')
    with pytest.raises(UserError, match="has 2 episodes and zero labelled ones"):
        recipe.require_labels(tmp_path / "dataset")


def test_what_the_recipe_refuses(tmp_path, command) -> None:
    none = recipe.Stock(0, 0.0, 0)
    with pytest.raises(UserError, match="has no recordings"):
        recipe.require_usable(plain(tmp_path), none)
    with pytest.raises(UserError, match="--gpus 99: this machine has"):
        recipe.require_usable(plain(tmp_path, index=("x",), gpus=99), none)
    with pytest.raises(UserError, match="GB are needed in"):
        recipe.require_space(plain(tmp_path, index=("x",), hours=1e6), none)
    other = tmp_path / "robot.yaml"
    spec = Contract.load(EXAMPLE).to_dict()
    spec["rate_hz"] = 10
    other.write_text(Contract.from_dict(spec).to_yaml())
    with pytest.raises(UserError, match="acts at 10 Hz"):
        recipe.require_usable(plain(tmp_path, contract=other, index=("x",)), none)
    assert "has no recordings" in refused(command("train", "--recordings", tmp_path / "none", "--dry-run"))


# ---- engines and the wire


def test_engines_are_found_by_name() -> None:
    assert {"minerl", "luanti", "crafter", "crafter_peaceful"} <= set(game.engine_names())
    assert game.engine("fake") is fake_game.ENGINE
    with pytest.raises(UserError, match="there is no engine 'chess': choose one of"):
        game.engine("chess")
    with pytest.raises(UserError, match="has no nothing_here:X"):
        game.named("nothing_here:X")


def test_only_minecraft_is_called_minecraft() -> None:
    for name in ("minerl", "crafter", "crafter_peaceful"):
        if name != "minerl":
            pytest.importorskip("crafter", reason="crafter is not installed")
        engine = game.engine(name)
        assert ("Minecraft" in engine.title) == engine.published == (name == "minerl")


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no message of this protocol"),
        (b"d4mc\x09\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "speaks version 9"),
        (b"d4mc\x01\x04\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00", "no message of this protocol"),
        (b"d4mc\x01\x04\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00[]", "no JSON object"),
        (b"d4mc\x01\x04\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00{x", "not JSON"),
    ],
)
def test_the_wire_refuses_what_is_no_message(raw, error) -> None:
    import socket

    mine, its = socket.socketpair()
    with mine, its:
        its.sendall(raw)
        with pytest.raises(wire.WireError, match=error):
            wire.Wire(mine).receive(1.0)


def test_the_wire_has_limits_of_time_and_notices_the_end() -> None:
    import socket

    mine, its = socket.socketpair()
    with mine, its:
        wire.Wire(its).send(wire.VIEW, {"a": [1, None, "x"]}, b"pixels")
        assert wire.Wire(mine).receive(1.0) == (wire.VIEW, {"a": [1, None, "x"]}, b"pixels")
        its.sendall(b"d4m")
        with pytest.raises(TimeoutError):
            wire.Wire(mine).receive(0.05)
        its.close()
        with pytest.raises(EOFError):
            wire.Wire(mine).receive(1.0)
