"""The commands of d4-minecraft: one sentence for a mistake, nothing left behind, and what they print."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import fake_game
import minecraft_files
import numpy as np
import pytest

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.minecraft import check, cli, game, policies, wire
from d4_sim.minecraft.environment import Seen
from d4_sim.minecraft.episode import Episode, write_events
from d4_sim.minecraft.replay import climb, read_recorded
from d4_sim.minecraft.tasks import LADDER

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "minecraft.yaml"
CRAFTER = ROOT / "sim" / "d4_sim" / "crafter" / "crafter.yaml"


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


def test_events_of_a_game_tell_its_milestones(tmp_path, command) -> None:
    """They are items and not tasks, and were always "none"."""
    episode = Episode(game.engine("minerl"), 0, 1, LADDER, 2400)
    image, key = np.zeros((4, 4, 3), np.uint8), "minecraft.mine_block:minecraft.oak_log"
    for tick in range(1202):
        items = {"oak_log": 1} if tick > 1200 else {}
        episode.observe(Seen(image, {"stats": {key: int(tick >= 600)}, "items": items}))
    path = tmp_path / "000000.jsonl"
    write_events(path, game.engine("minerl"), episode)
    done = command("ladder", "--replay", path)
    assert done.returncode == 0, done.stderr
    assert "Minecraft 1.16.5" in done.stdout
    assert done.stdout.splitlines()[-1] == "milestones (minutes): log 1.00"
    head = path.read_text().splitlines()[0]
    path.write_text(f'{head}\n{{"tick": 600, "done": {{"mine_log": 1.0}}}}\n')  # as of the first version
    assert command("ladder", "--replay", path).stdout.endswith("milestones (minutes): log 0.50\n")


HEAD = {"format": "d4-minecraft-events", "version": 1, "engine": "minerl", "rate_hz": 20, "ticks": 9}


@pytest.mark.parametrize(
    ("head", "lines", "number"),
    [
        ({"rate_hz": 0}, [], 1),
        ({"rate_hz": float("nan")}, [], 1),
        ({"ticks": -1}, [], 1),
        ({}, [{"tick": 1, "done": {"mine_log": float("nan")}}], 2),
        ({}, [{"tick": 1, "done": {"mine_log": -1}}], 2),
        ({}, [{"tick": 1, "done": {"mine_log": 1}}, {"tick": 1, "done": {}}], 3),
        ({}, [{"tick": 10, "done": {"mine_log": 1}}], 2),
        ({}, [{"tick": 1, "done": {}, "reached": ["gold"]}], 2),
    ],
)
def test_damaged_events_are_one_sentence(tmp_path, command, head, lines, number) -> None:
    path = tmp_path / "000000.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (HEAD | head, *lines)))
    assert f"line {number} is damaged" in refused(command("ladder", "--replay", path))


def test_events_of_several_episodes_are_said(tmp_path, command) -> None:
    """The second episode was called a damaged line."""
    path = tmp_path / "000000.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (HEAD, HEAD)))
    odd = refused(command("ladder", "--replay", path))
    assert "line 2 begins another episode: give a file of one" in odd


def test_lines_that_could_not_be_read_are_counted(tmp_path, command) -> None:
    path = recording(tmp_path)
    assert "could not be read" not in command("ladder", "--replay", path).stdout
    path.write_text(path.read_text() + "garbage\n{\n")
    assert "2 lines could not be read" in command("ladder", "--replay", path).stdout


def test_events_that_are_no_text_are_one_sentence(tmp_path, command) -> None:
    """A byte that is no UTF-8, far behind the first lines, was a traceback."""
    path = tmp_path / "000000.jsonl"
    lines = [HEAD | {"ticks": 5000}, *({"tick": tick, "done": {"mine_log": 1}} for tick in range(1, 2001))]
    path.write_bytes("".join(json.dumps(x) + "\n" for x in lines).encode() + b"\xff\n")
    assert "line 2002 is damaged" in refused(command("ladder", "--replay", path))


def test_a_recording_is_headed_by_its_own_game(tmp_path, command) -> None:
    """Every recording in the contractors' format was headed Minecraft, our own of other games included."""
    path = recording(tmp_path)
    assert "Minecraft" in command("ladder", "--replay", path).stdout
    said = command("ladder", "--replay", path, "--engine", "luanti_wild").stdout
    assert "Luanti (Minetest Game)" in said
    assert "Minecraft" not in said
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"engine": "luanti"}), *rest, ""]))
    assert "Luanti tree chopping" in command("ladder", "--replay", path).stdout
    odd = refused(command("ladder", "--replay", path, "--engine", "minerl"))
    assert "is of Luanti tree chopping, not of Minecraft" in odd


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
    assert "MISSING Java 8: there is no Java on PATH: apt-get install openjdk-8-jdk" in done.stdout
    assert "MISSING MineRL v1.0: --python names no interpreter" in done.stdout
    assert "MISSING display: set DISPLAY, or apt-get install xvfb" in done.stdout
    done = command("check", "--engine", "minerl", "--python", "/nowhere/python", PATH="/nowhere")
    assert done.returncode == 1
    assert "/nowhere/python is no program" in done.stdout


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


def test_both_javas_are_looked_at(tmp_path, monkeypatch) -> None:
    """That of JAVA_HOME alone was, while the game is run by the one on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "bin").mkdir(parents=True)
    program(tmp_path, "java", 'openjdk version "17.0.15"')
    program(tmp_path / "home" / "bin", "java", 'openjdk version "1.8.0_402"')
    assert "this is Java 17.0.15 on PATH" in check.java().missing
    program(tmp_path, "java", 'openjdk version "1.8.0_402"')
    assert not check.java().missing
    (tmp_path / "home" / "bin" / "java").unlink()
    assert "there is no Java in JAVA_HOME" in check.java().missing


@pytest.mark.parametrize("built", [True, False])
def test_a_game_that_is_built_wants_no_java_to_build_it(tmp_path, monkeypatch, built) -> None:
    """A machine with Java 8 on PATH and another one in JAVA_HOME was refused, while the game runs there."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISPLAY", ":0")
    (tmp_path / "home" / "bin").mkdir(parents=True)
    program(tmp_path, "java", 'openjdk version "1.8.0_402"')
    program(tmp_path / "home" / "bin", "java", 'openjdk version "17.0.15"')
    parts = [
        check.Found("MineRL v1.0", "1.0.2"),
        check.Found("Minecraft 1.16.5", "", "" if built else "build"),
    ]
    monkeypatch.setattr(check, "mine_rl", lambda python: parts)
    assert bool(check.minecraft("python")[0].missing) is not built
    if built:
        check.require_minerl("python")


def test_what_minecraft_does_not_start_without(monkeypatch) -> None:
    """Said before anything is started: the game that was not built, the wrong Java, no display."""
    here = [check.Found("MineRL v1.0", "1.0.2"), check.Found("Minecraft 1.16.5", "built with MineRL")]
    monkeypatch.setattr(check, "mine_rl", lambda python: here)
    monkeypatch.setattr(check, "java", lambda builds: check.Found("Java 8", "17", "this is Java 17"))
    with pytest.raises(UserError, match="Java 8: this is Java 17"):
        check.require_minerl("python")
    monkeypatch.setattr(check, "java", lambda builds: check.Found("Java 8", "1.8"))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="display: set DISPLAY, or apt-get install xvfb"):
        check.require_minerl("python")
    monkeypatch.setenv("DISPLAY", ":0")
    check.require_minerl("python")


def test_a_missing_gpu_says_how_to_get_one(monkeypatch) -> None:
    monkeypatch.setattr(check, "ask", lambda *words: "")
    assert "install its driver" in check.gpu().value
    monkeypatch.setattr(check, "ask", lambda *words: "NVIDIA H100\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "NVIDIA H100, which this torch cannot use" in check.gpu().value
    assert "pip install --force-reinstall torch" in check.gpu().value


@pytest.mark.parametrize("name", game._ENGINES)
def test_every_engine_can_be_checked(command, name) -> None:
    """`luanti_wild` and `crafter_peaceful` were invalid choices."""
    done = command("check", "--engine", name, PATH="/nowhere")
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.startswith(game.engine(name).title + ":")


def test_parts_take_the_gpus_of_a_machine_in_turn(monkeypatch) -> None:
    """All of them took the first."""
    import torch

    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    found = [cli._device("auto", (part, 4)) for part in range(4)]
    assert [device.index for device in found] == [0, 1, 0, 1]
    assert taken[-1] == torch.device("cuda", 1)
    assert cli._device("cpu", (1, 4)).type == "cpu"


def test_a_program_that_hangs_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(check, "_ASK_S", 0.2)
    assert check.ask("sleep", "10") == ""


# ---- mistakes of the other commands


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["random", "--contract", EXAMPLE, "--part", "5/4"], "--part 5/4 is not like 1/4"),
        (["random", "--contract", EXAMPLE, "--episodes", "0"], "--episodes must be at least 1"),
        (["random", "--contract", EXAMPLE, "--minutes", "0"], "--minutes must be above 0"),
        (["random", "--engine", "crafter", "--minutes", "5"], "Crafter ends after 500 ticks: --minutes may"),
        (["random", "--contract", EXAMPLE, "--set", "fast"], "--set fast is not like name=value"),
        (
            ["random", "--contract", EXAMPLE, "--set", "fast=1"],
            "takes no option 'fast'; it takes python, env",
        ),
        (["random", "--contract", EXAMPLE, "--python", "/nowhere/python"], "/nowhere/python is no program"),
        (["random", "--engine", "minerl"], "a random policy needs --contract"),
        (["random", "--env", "MineRLOther-v0"], "a random policy needs --contract"),
        (["random", "--engine", "crafter", "--keep", "x"], "--keep records games of keyboard and mouse"),
        (["/nowhere"], "/nowhere does not exist"),
        (["/nowhere", "--contract", EXAMPLE], "--contract is for `random`"),
        (["random", "--engine", "luanti", "--jobs", "2", "--set", "display=7"], "all games the same display"),
    ],
)
def test_mistakes_of_benchmark(tmp_path, monkeypatch, command, words, sentence) -> None:
    if "crafter" in words:
        pytest.importorskip("crafter", reason="crafter is not installed")
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(command("benchmark", *words))
    assert list(tmp_path.iterdir()) == []  # nothing half-done


@pytest.mark.parametrize(
    ("checkpoint", "contract", "name"),
    [("random", None, "crafter"), ("random", EXAMPLE, "minerl"), ("run", EXAMPLE, "minerl"),
     ("run", CRAFTER, "crafter")],
)  # fmt: skip
def test_the_game_is_that_of_what_a_policy_acts_by(monkeypatch, checkpoint, contract, name) -> None:
    """On a machine without Minecraft every command asked for it unless another game was named."""
    given = contract and Contract.load(contract)
    monkeypatch.setattr(policies, "contract_of", lambda what: given)
    assert cli._game_for(cli.Benchmark(checkpoint=checkpoint), given) == name


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


# ---- engines and the wire


def test_engines_are_found_by_name() -> None:
    assert {"minerl", "luanti", "crafter", "crafter_peaceful"} <= set(game._ENGINES)
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
