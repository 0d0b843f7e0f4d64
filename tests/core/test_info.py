"""What d4-info says about machines, datasets, bags, runs, checkpoints and presets."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run

from d4_core import info
from d4_core.config import PHASES, PRESETS, preset
from d4_datasets.bags import BagWriter, new
from d4_datasets.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a dataset `data` and a run `run` of two phases."""
    root = tmp_path_factory.mktemp("info")
    toy = toy_run.write_dataset(root / "data", (6, 10))
    for phase in ("tokenizer", "agent"):
        toy_run.write_checkpoint(root / "run", phase, toy)
    gate = {"name": "PSNR", "value": 1.0, "limit": 3.0, "op": ">=", "ok": False, "hint": "", "detail": {}}
    good = {**gate, "name": "spread", "ok": True}
    (root / "run" / "gates.json").write_text(json.dumps({"tokenizer": [gate, good], "agent": [good]}))
    return root


def as_dict(facts: list[info.Fact]) -> dict[str, str]:
    return {fact.name: fact.value for fact in facts}


def call(monkeypatch, capsys, *line: str) -> str:
    monkeypatch.setattr(sys, "argv", ["d4-info", *line])
    info.main()
    return capsys.readouterr().out


def test_the_installation_is_described_and_whole_where_the_tests_run(monkeypatch, capsys):
    facts = as_dict(info.installation())
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] == np.__version__
    assert facts["libx264rgb"] == "yes"
    assert "free now" in facts["cores"]
    assert "GiB" in facts["memory"]
    assert "torch" in call(monkeypatch, capsys)


def test_what_is_missing_comes_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(info, "_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(info, "_CODECS", {"no_such_codec": "videos need it"})
    monkeypatch.setattr(info, "find_library", lambda name: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    out = call(monkeypatch, capsys)
    assert "MISSING no-such-package: install it with" in out
    assert "MISSING no_such_codec: videos need it" in out
    assert "MISSING OpenGL: rendering without a display needs: apt-get install" in out


@pytest.mark.parametrize("chosen", ["osmesa", "egl"])
def test_a_chosen_gl_library_that_is_not_there_is_named(monkeypatch, chosen):
    monkeypatch.setenv("MUJOCO_GL", chosen)
    monkeypatch.setattr(info, "find_library", lambda name: "libGL.so" if name == "GL" else None)
    fact = info._gl()
    assert fact.value == f"MUJOCO_GL={chosen}"
    assert f"lib{chosen}" in fact.missing


def test_the_gl_library_that_is_there_is_enough(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(info, "find_library", lambda name: "libEGL.so" if name == "EGL" else None)
    assert info._gl().missing == ""
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    assert "mujoco" in info._gl().missing


def test_a_gpu_is_named_and_a_torch_that_cannot_use_it_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Model T")
    assert "Model T" in info._gpu().value
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert "without CUDA" in info._gpu().missing


def test_a_dataset(place, monkeypatch, capsys):
    facts = as_dict(info.dataset_facts(place / "data"))
    assert facts["episodes"].startswith("2 (6 to 10 frames, median 8); 2 end in a terminal")
    assert facts["frames"].startswith("16, 0.000444 h at 10 Hz")
    assert facts["labelled"] == "37.5% of the frames, in 1 episodes"
    assert facts["observes"] == "cam 16x24"
    assert facts["acts"] == "base.linear.x -1..1, base.angular.z 0..3"
    assert facts["tasks"] == "left, right"
    assert facts["reward"] == "/reward"
    assert "2 (6 to 10 frames" in call(monkeypatch, capsys, str(place / "data"))


def test_datasets_of_two_robots_are_refused(place):
    toy_run.write_dataset(place / "other", (6,), name="else")
    with pytest.raises(
        UserError, match=r"other was made with another contract \(else, .*data \(toy, .* of one"
    ):
        info.dataset_facts([place / "data", place / "other"])


def test_a_damaged_dataset_is_one_sentence(tmp_path):
    (tmp_path / "meta").mkdir()
    for content in ("{", "{}"):
        (tmp_path / "meta" / "d4.json").write_text(content)
        with pytest.raises(UserError, match="write the dataset again"):
            info.path_facts(tmp_path)


def test_a_checkpoint(place):
    facts = as_dict(info.path_facts(place / "run" / "agent"))
    assert facts["phase"] == "agent, done, step 7 of 7"
    assert facts["metrics"] == "loss 1.5"
    assert facts["trained on"] == "a toy"
    assert facts["contract"].startswith("toy, ")
    models = toy_run.build(toy_run.PRESET, toy_run.contract(), "agent")
    stored = sum(v.numel() for v in models.tokenizer.state_dict().values())
    assert facts["tokenizer network"].startswith(f"{info._si(stored)}parameters")
    assert "FLOPs per frame" in facts["dynamics network"]


def test_a_checkpoint_of_another_version_is_one_sentence(place, tmp_path):
    """`d4-info` showed the traceback of a KeyError."""
    shutil.copytree(place / "run", tmp_path / "run")
    path = tmp_path / "run" / "agent" / "config.json"
    config = json.loads(path.read_text())
    config["config"]["preset"]["from_the_future"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"agent holds no d4 model .*from_the_future"):
        info.path_facts(tmp_path / "run" / "agent")


def test_a_run(place, monkeypatch, capsys):
    facts = as_dict(info.path_facts(place / "run"))
    assert facts["tokenizer"] == "done, step 7 of 7; 1 of 2 gates FAILED: PSNR"
    assert facts["dynamics"] == "not run"
    assert facts["agent"] == "done, step 7 of 7; gates passed"
    assert facts["phase"] == "agent, done, step 7 of 7"
    assert "1 of 2 gates FAILED: PSNR" in call(monkeypatch, capsys, str(place / "run"))


def test_a_bag_shows_what_a_contract_can_name(tmp_path):
    text, flag = "std_msgs/msg/String", "std_msgs/msg/Bool"
    with BagWriter(tmp_path / "bag") as writer:
        for k in range(11):
            writer.write("/task", text, k * 100_000_000, new(text, data="go"))
        writer.write("/end", flag, 1_500_000_000, new(flag, data=True))
    facts = as_dict(info.path_facts(tmp_path / "bag"))
    assert facts["/task"] == "std_msgs/msg/String, 11 messages, 10.0 Hz"
    assert facts["/end"] == "std_msgs/msg/Bool, 1 messages"
    assert facts["bag"].endswith("1.5 s")
    with BagWriter(tmp_path / "other") as writer:
        writer.write("/end", flag, 0, new(flag, data=True))
    listed = as_dict(info.path_facts(tmp_path))
    assert listed["bags"] == "2"
    assert listed[str(tmp_path / "other")] == "/end"


def test_a_path_that_is_nothing_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no dataset, run, checkpoint or bag"):
            info.path_facts(path)


def test_a_preset_is_counted_without_being_allocated(tmp_path, monkeypatch, capsys):
    camera = {**toy_run.contract().to_dict()["observations"][0], "size": [32, 48]}
    toy = toy_run.contract(observations=[camera])
    counted = as_dict(info.preset_facts(preset("paper"), toy))
    assert counted["tokenizer"].startswith("40")
    assert "M parameters" in counted["tokenizer"]
    assert counted["dynamics"].startswith("1.")
    assert "G parameters" in counted["dynamics"]
    (tmp_path / "robot.yaml").write_text(toy.to_yaml())
    monkeypatch.setattr(info, "training_seconds", lambda *_: dict.fromkeys(PHASES, 1.0))
    out = call(monkeypatch, capsys, "--preset", "paper", "--contract", str(tmp_path / "robot.yaml"))
    assert "GiB to train" in out
    assert "python" not in out


def test_a_preset_needs_a_contract_and_the_other_way_round(monkeypatch, capsys):
    for line in (["--preset", "nano"], ["--contract", "robot.yaml"]):
        monkeypatch.setattr(sys, "argv", ["d4-info", *line])
        with pytest.raises(SystemExit) as caught:
            info.main()
        assert caught.value.code == 2
        assert "belong together" in capsys.readouterr().err


def test_numbers_read_well():
    said = [info._si(v).strip() for v in (12, 1500, 2.5e6, 1.6e9, 3e12)]
    assert said == ["12", "1.5 k", "2.5 M", "1.6 G", "3 T"]
    assert info._bytes(5 * 2**20) == "5 MiB"
    assert info._bytes(3 * 2**30) == "3.0 GiB"


def test_a_preset_is_timed_for_a_dataset(place, monkeypatch, capsys):
    monkeypatch.setattr(info, "training_seconds", lambda *_: dict.fromkeys(PHASES, 3600.0))
    camera = {**toy_run.contract().to_dict()["observations"][0], "size": [32, 48]}
    root = toy_run.write_dataset(place / "timed", (6, 10))
    meta = json.loads((place / "timed/meta/d4.json").read_text())
    meta["contract"]["observations"][0] = camera
    (place / "timed/meta/d4.json").write_text(json.dumps(meta))
    out = call(monkeypatch, capsys, str(place / "timed"), "--preset", "nano")
    assert re.search(r"tokenizer time +about 60 min for 1500 steps, each frame 6e\+03 times", out)
    assert re.search(r"total time +about 4 h on this machine's", out)
    assert re.search(r"episodes +2 ", out)
    assert root is not None
    lines = call(monkeypatch, capsys, str(place / "timed"), "--preset", "all").splitlines()
    assert [line.split()[0] for line in lines[:5]] == list(PRESETS)
    assert all("parameters" in line for line in lines[:5])


def test_a_preset_that_does_not_fit_the_cameras_is_said_among_all(tmp_path, monkeypatch, capsys):
    (tmp_path / "robot.yaml").write_text(toy_run.contract().to_yaml())  # 16 x 24: no multiple of 16
    monkeypatch.setattr(info, "training_seconds", lambda *_: dict.fromkeys(PHASES, 1.0))
    out = call(monkeypatch, capsys, "--preset", "all", "--contract", str(tmp_path / "robot.yaml"))
    assert re.search(r"^nano +does not fit: camera 'cam' is 16x24", out, re.MULTILINE)
    assert re.search(r"^small .* about 4 s here$", out, re.MULTILINE)
