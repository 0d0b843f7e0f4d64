"""The recipe of d4-minecraft train: what it costs, what it runs and goes on from, what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import minecraft_files
import pytest

from d4_core.config import PHASES
from d4_core.estimate import on_ranks
from d4_core.memory import costs
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.minecraft import cli, recipe

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "minecraft.yaml"
NONE = recipe.Stock(0, 0.0, 0)


def refused(capsys, monkeypatch, *words: object) -> str:
    """The one sentence of a command that fails as it should."""
    monkeypatch.setattr(sys, "argv", ["d4-minecraft", "train", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    (line,) = said.strip().splitlines()
    return line


def plain(tmp_path: Path, **changes) -> recipe.Recipe:
    settings = {
        "index": (), "recordings": tmp_path / "rec", "out": tmp_path / "out", "contract": EXAMPLE,
        "preset": "nano", "hours": 10.0, "gpus": 0, "jobs": 1, "scale": 1.0, "seed": 0,
    }  # fmt: skip
    return recipe.Recipe(**settings | changes)


def test_the_recipe_names_its_costs(tmp_path) -> None:
    """Everything over the paper's hours: frames, disk, parameters, steps, days per number of GPUs."""
    big = plain(tmp_path, index=("https://host/index.json",), hours=2541.0, preset="paper")
    lines = list(recipe.told(big, NONE, measure=False))
    assert "182,952,000 frames" in lines[0]
    assert "frame cache 20,2" in lines[1]
    assert "dynamics 1,6" in lines[2]
    assert "encoding: 182,952,000 frames to latents, once, 5.1e+19 operations" in lines[4]
    assert "1 GPU" in lines[8]
    assert "256 GPUs" in lines[8]
    assert "once over the data takes --set dynamics_training.steps=" in lines[9]
    assert lines[10].startswith("memory, counted, on each of 1 GPU ")
    assert "ingest: 7.1 days with --jobs 1" in lines[12]
    words = [words for stage in recipe.plan(big, NONE) for words in stage.commands]
    assert [w[0] for w in words] == ["d4-fetch", "d4-ingest", "d4-audit", *["d4-train"] * 4, "d4-clone"]
    many = [w for stage in recipe.plan(plain(tmp_path, gpus=8), NONE) for w in stage.commands]
    assert many[-2][:5] == ("torchrun", "--nproc-per-node", "8", "-m", "d4_core.train")


def test_recordings_that_are_there_are_measured(tmp_path) -> None:
    minecraft_files.write_recording(tmp_path / "rec", [minecraft_files.line()] * 40)
    here = recipe.stock(tmp_path / "rec")
    assert (here.recordings, round(here.hours * 72000)) == (1, 40)
    assert here.bytes > 1000
    assert any("measured" in name for name in recipe.disk(plain(tmp_path), here))


def test_days_are_told_of_models_that_keep_a_gpu_busy(tmp_path) -> None:
    """The speed of a large model says nothing about `nano`."""
    for preset, is_told in (("nano", False), ("base", True)):
        lines = list(recipe.told(plain(tmp_path, index=("x",), preset=preset), NONE, measure=False))
        assert any("256 GPUs" in line for line in lines) == is_told


def test_a_gpu_takes_one_clip_at_least(tmp_path) -> None:
    """A batch of 16 clips trains no faster on 256 GPUs than on 64, nor in less memory."""
    base = plain(tmp_path, index=("x",), preset="base")
    settings, contract = recipe.training(base), Contract.load(EXAMPLE)
    share = {n: on_ranks(settings, n) for n in (1, 4, 16, 256)}
    assert set(share[1].values()) == {1.0}
    assert share[4]["dynamics"] == 1 / 4
    assert share[16]["dynamics"] == share[256]["dynamics"] == 1 / 16
    memory = [costs(settings, contract, n)["dynamics"].train_bytes for n in (1, 16, 256)]
    assert memory[0] > memory[1] == memory[2]


def test_what_fits_no_gpu_says_so(tmp_path) -> None:
    """`paper` was told to take 4.5 days on a GPU that has a twentieth of the memory."""
    keep_all = ("tokenizer.recompute=false", "dynamics.recompute=false")
    said = {}
    for name, settings in (("base", ()), ("large", ()), ("paper", ()), ("paper", keep_all)):
        planned = plain(tmp_path, index=("x",), preset=name, set=settings)
        (said[name, settings],) = (
            line for line in recipe.told(planned, NONE, measure=False) if line.startswith("memory")
        )
    assert "141" not in said["base", ()]
    assert "141" not in said["large", ()]
    assert "an H200 has 141 GB, so 4 are needed" in said["paper", ()]
    assert "none has so much" in said["paper", keep_all]


def test_memory_is_looked_at_before_anything_is_fetched(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("d4_core.memory.available_bytes", lambda device: 1e9)
    words = ("--index", "x", "--out", tmp_path / "out", "--hours", 0.01, "--gpus", 0)
    assert "tokenizer of this preset needs about" in refused(capsys, monkeypatch, *words)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_this_machine_would_stop_at(tmp_path, capsys, monkeypatch) -> None:
    """It named only the memory of GPUs, and passed an index that was not there."""
    monkeypatch.setattr("d4_core.memory.available_bytes", lambda device: 1e9)
    words = ("--index", "x", "--out", tmp_path / "out", "--hours", 1e6, "--preset", "small", "--dry-run")
    monkeypatch.setattr(recipe, "training_seconds", lambda *_: dict.fromkeys(PHASES, 1.0))
    monkeypatch.setattr(sys, "argv", ["d4-minecraft", "train", *map(str, words), "--gpus", "0"])
    cli.main()
    said = capsys.readouterr().out
    stops = [line for line in said.splitlines() if line.startswith("this machine stops it: ")]
    for part in ("--index x", "GB are needed", "needs about"):
        assert any(part in line for line in stops), part
    recipe.require_index(plain(tmp_path, index=("https://host/index.json",)), NONE)
    recipe.require_index(plain(tmp_path, index=("x",)), recipe.Stock(3, 1.0, 10**9))  # it was there once


@pytest.mark.parametrize(("gpus", "says"), [(0, "it has 0 GPUs"), (2, "it has 2 GPUs"), (8, "needs about")])
def test_a_dry_run_counts_the_gpus_before_their_memory(tmp_path, monkeypatch, gpus, says) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("d4_core.memory.available_bytes", lambda device: 1e6)
    monkeypatch.setattr(recipe, "require_space", lambda *_: None)
    (stop,) = recipe.refusals(plain(tmp_path, gpus=8), recipe.Stock(3, 1.0, 10**9))
    assert says in stop


def test_an_event_counts_however_often_it_happened(tmp_path) -> None:
    """With 0.4 of the best return only the pieces with most of them were cloned."""
    changed = plain(tmp_path, set=("agent_training.relevant_return=0.2",))
    assert recipe.training(plain(tmp_path)).agent_training.relevant_return == 0.01
    assert recipe.training(changed).agent_training.relevant_return == 0.2
    words = next(w for stage in recipe.plan(changed, NONE) for w in stage.commands if "agent" in w)
    assert words[words.index("--set") + 1 :] == (*recipe.EVENTS, "agent_training.relevant_return=0.2")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Commands that only pretend to work: `ran` has them, `fail` what is to fail, `labelled` the dataset."""
    told = {"ran": [], "fail": [], "labelled": 40}

    def run_command(words, env):
        ran = told["ran"]
        ran.append(words[0] + ":" + words[words.index("--phases") + 1] if "--phases" in words else words[0])
        if words[0] == "d4-ingest":
            meta = tmp_path / "out" / "dataset" / "meta"
            meta.mkdir(parents=True, exist_ok=True)
            (meta / "d4.json").write_text(json.dumps({"episodes": [{"labelled": told["labelled"]}] * 2}))
        return 1 if told["fail"] and ran[-1].endswith(told["fail"][0]) else 0

    monkeypatch.setattr(recipe, "run_command", run_command)
    return told


def go(made: recipe.Recipe, runs) -> list[str]:
    """What is run; also where it ends with a sentence."""
    runs["ran"].clear()
    assert recipe.run(made, recipe.stock(made.recordings), lambda _: None) == bool(runs["fail"])
    return list(runs["ran"])


ALL = ["d4-ingest", "d4-audit", *(f"d4-train:{p}" for p in ("tokenizer", "dynamics", "agent", "imagination")),
       "d4-clone"]  # fmt: skip


def test_the_recipe_runs_what_is_not_done_and_goes_on(tmp_path, runs) -> None:
    runs["fail"].append("dynamics")
    assert go(plain(tmp_path), runs) == ALL[:4]
    runs["fail"].clear()
    assert go(plain(tmp_path), runs) == ALL[3:]
    assert go(plain(tmp_path), runs) == []


def test_zero_labelled_episodes_are_said_again_and_again(tmp_path, runs) -> None:
    """Said once, the same command went on to audit and training, and added recordings were ignored."""
    runs["labelled"] = 0
    minecraft_files.write_recording(tmp_path / "rec", [minecraft_files.line()] * 4, name="a")
    for ran in (["d4-ingest"], []):
        with pytest.raises(UserError, match="has 2 episodes and zero labelled ones"):
            go(plain(tmp_path), runs)
        assert runs["ran"] == ran
    runs["labelled"] = 40
    minecraft_files.write_recording(tmp_path / "rec", [minecraft_files.line()] * 4, name="b")
    assert go(plain(tmp_path), runs) == ALL


def test_recordings_that_are_added_later_are_ingested(tmp_path, runs) -> None:
    minecraft_files.write_recording(tmp_path / "rec", [minecraft_files.line()] * 4, name="a")
    assert go(plain(tmp_path), runs) == ALL
    minecraft_files.write_recording(tmp_path / "rec", [minecraft_files.line()] * 4, name="b")
    assert go(plain(tmp_path), runs) == ALL
    (tmp_path / "rec" / "logs").mkdir()
    (tmp_path / "rec" / "logs" / "environment.log").write_text("no recording")
    assert go(plain(tmp_path), runs) == []


def test_what_was_fetched_is_ingested_once(tmp_path, runs, monkeypatch) -> None:
    """The list of recordings is that after fetching, and a measured size of an hour fetches nothing again."""
    plain_command = recipe.run_command

    def run_command(words, env):
        if words[0] == "d4-fetch":
            minecraft_files.write_recording(tmp_path / "rec", [minecraft_files.line()] * 4)
        return plain_command(words, env)

    monkeypatch.setattr(recipe, "run_command", run_command)
    made = plain(tmp_path, index=("x",))
    assert go(made, runs) == ["d4-fetch", *ALL]
    assert go(made, runs) == []
    runs["ran"].clear()
    here = recipe.stock(made.recordings)
    (fetch,) = recipe.plan(made, here)[0].commands
    limit = float(fetch[fetch.index("--limit-gb") + 1])
    assert limit == pytest.approx(made.hours * here.bytes / 1e9 / here.hours, rel=1e-4)


def test_only_what_will_be_written_needs_room(tmp_path) -> None:
    """Recordings that are there already need none, wherever they are; those to be fetched do."""
    there = recipe.Stock(100, 1e-3, int(4e15))
    recipe.require_space(plain(tmp_path, recordings=Path("/other")), there)
    with pytest.raises(UserError, match="GB are needed in"):
        recipe.require_space(plain(tmp_path, index=("x",), hours=1.0), there)


def test_what_the_recipe_refuses(tmp_path, capsys, monkeypatch) -> None:
    none = NONE
    with pytest.raises(UserError, match="has no recordings"):
        recipe.require_usable(plain(tmp_path), none)
    with pytest.raises(UserError, match="--gpus 99: this machine has"):
        recipe.require_usable(plain(tmp_path, index=("x",), gpus=99), none)
    recipe.require_usable(plain(tmp_path, index=("x",), gpus=99), none, dry_run=True)
    with pytest.raises(UserError, match="GB are needed in"):
        recipe.require_space(plain(tmp_path, index=("x",), hours=1e6), none)
    other = tmp_path / "robot.yaml"
    spec = Contract.load(EXAMPLE).to_dict()
    spec["rate_hz"] = 10
    other.write_text(Contract.from_dict(spec).to_yaml())
    with pytest.raises(UserError, match="acts at 10 Hz"):
        recipe.require_usable(plain(tmp_path, contract=other, index=("x",)), none)
    asked = ("--recordings", tmp_path / "none", "--dry-run")
    assert "has no recordings" in refused(capsys, monkeypatch, *asked)


def test_recordings_that_nobody_wants_can_be_left_out(tmp_path) -> None:
    """d4-ingest said to name them with --skip, which the recipe did not have."""
    here = recipe.stock(tmp_path)
    assert not any("--skip" in words for words in recipe.plan(plain(tmp_path), here)[0].commands)
    stages = {s.name: s for s in recipe.plan(plain(tmp_path, skip=tmp_path / "bad.txt"), here)}
    assert stages["ingest"].commands[0][-2:] == ("--skip", str(tmp_path / "bad.txt"))


def test_what_files_say_counts_and_not_where_they_are(tmp_path, monkeypatch) -> None:
    """An edited list or contract changed nothing, and the same command from elsewhere began again."""
    skip, contract = tmp_path / "bad.txt", tmp_path / "game.yaml"
    skip.write_text("one\n")
    contract.write_text(EXAMPLE.read_text())
    told = plain(tmp_path, skip=skip, contract=contract)
    before = recipe._keys(told)
    monkeypatch.chdir(tmp_path)
    assert recipe._keys(replace(told, skip=Path("bad.txt"), contract=Path("game.yaml"))) == before
    skip.write_text("one\ntwo\n")
    assert recipe._keys(told)["ingest"] != before["ingest"]
    skip.write_text("one\n")
    spec = Contract.load(EXAMPLE).to_dict()
    spec["observations"][0]["size"] = [72, 128]
    contract.write_text(Contract.from_dict(spec).to_yaml())
    changed = recipe._keys(told)
    assert changed["ingest"] != before["ingest"]
    assert changed["agent"] != before["agent"]


def test_what_comes_next_is_the_game_of_the_recordings(tmp_path) -> None:
    """Policies from recordings of Luanti were to be played in Minecraft."""
    assert recipe.played_in(tmp_path / "none") == "minerl"
    minecraft_files.write_recording(tmp_path / "rec", [minecraft_files.line()] * 4)
    assert recipe.played_in(tmp_path / "rec") == "minerl"
    minecraft_files.write_recording(tmp_path / "ours", [minecraft_files.line(engine="luanti")] * 4)
    assert recipe.played_in(tmp_path / "ours") == "luanti"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--hours", "nan"), "--hours and --scale must be above 0, and finite"),
        (("--scale", "inf"), "--hours and --scale must be above 0, and finite"),
        (("--gpus", "-3"), "--gpus must be at least 0"),
    ],
)
def test_numbers_that_make_no_sense(capsys, monkeypatch, words, sentence) -> None:
    assert sentence in refused(capsys, monkeypatch, "--index", "x", *words)


def test_the_example_contract_is_found_from_anywhere(tmp_path, monkeypatch) -> None:
    """From another folder than the repository's the recipe had no contract."""
    monkeypatch.chdir(tmp_path)
    assert cli.example("minecraft.yaml").exists()
    assert cli.example("luanti.yaml").exists()
