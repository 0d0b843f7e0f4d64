"""Networks from presets and from checkpoint folders: what each phase holds, and what a load refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import toy_run

from d4_core.config import PRESETS
from d4_core.models import CONTENTS, build, load, weights_hash
from d4_datasets.errors import UserError


@pytest.mark.parametrize("phase", CONTENTS)
def test_every_phase_builds_what_its_checkpoint_holds(phase: str) -> None:
    models = build(toy_run.PRESET, toy_run.contract(), phase)
    held = {name for name in CONTENTS["imagination"] if getattr(models, name) is not None}
    assert held == set(CONTENTS[phase])
    assert models.named(CONTENTS[phase]).keys() == held


@pytest.mark.parametrize("phase", CONTENTS)
def test_what_was_saved_is_loaded_frozen(phase: str, tmp_path: Path) -> None:
    robot = toy_run.contract()
    saved = toy_run.write_checkpoint(tmp_path, phase, robot)
    loaded = load(tmp_path / phase, robot)
    assert loaded.preset == toy_run.PRESET
    assert loaded.contract == robot
    for name in CONTENTS[phase]:
        mine, theirs = getattr(loaded, name), getattr(saved, name).state_dict()
        assert not mine.training
        assert not any(p.requires_grad for p in mine.parameters())
        assert mine.state_dict().keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.state_dict().items())


def test_the_policy_in_force_is_the_one_trained_last(tmp_path: Path) -> None:
    robot = toy_run.contract()
    toy_run.write_checkpoint(tmp_path, "agent", robot)
    toy_run.write_checkpoint(tmp_path, "imagination", robot)
    cloned, improved = load(tmp_path / "agent"), load(tmp_path / "imagination")
    assert cloned.acting is cloned.agent.policy
    assert improved.acting is improved.policy
    assert improved.acting is not improved.agent.policy


def test_the_improved_policy_starts_as_the_cloned_one_without_sharing_weights() -> None:
    models = build(toy_run.PRESET, toy_run.contract())
    ours, theirs = models.policy.state_dict(), models.agent.policy.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not {p.data_ptr() for p in models.policy.parameters()} & {
        p.data_ptr() for p in models.agent.policy.parameters()
    }


# ---- refusals


def test_another_robot_is_refused_by_its_contract_not_by_a_shape(tmp_path: Path) -> None:
    robot = toy_run.contract()
    toy_run.write_checkpoint(tmp_path, "agent", robot)
    for other in (toy_run.contract(latency_ms=80), toy_run.contract(tasks=None, reward=None)):
        with pytest.raises(UserError, match=f"was trained for contract {robot.hash} but this is contract"):
            load(tmp_path / "agent", other)
    assert load(tmp_path / "agent").contract == robot  # its own contract is saved with it


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint in .*agent; train the phase 'agent' first"):
        load(tmp_path / "agent")
    toy_run.write_checkpoint(tmp_path, "agent", toy_run.contract())
    path = tmp_path / "agent" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "config": {}}))
    with pytest.raises(UserError, match=r"holds no d4 model .*: train the phase again"):
        load(tmp_path / "agent")
    preset = {**config["config"]["preset"], "from_the_future": 1}
    path.write_text(json.dumps({**config, "config": {**config["config"], "preset": preset}}))
    with pytest.raises(UserError, match=r"holds no d4 model .*from_the_future"):
        load(tmp_path / "agent")
    path.write_text("{")
    with pytest.raises(UserError, match="is not readable"):
        load(tmp_path / "agent")


def test_damaged_weights_say_which_file(tmp_path: Path) -> None:
    toy_run.write_checkpoint(tmp_path, "tokenizer", toy_run.contract())
    path = tmp_path / "tokenizer" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"weights\.safetensors is not readable"):
        load(tmp_path / "tokenizer")


def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(tmp_path: Path) -> None:
    robot = toy_run.contract()
    toy_run.write_checkpoint(tmp_path, "agent", robot)
    name = weights_hash(tmp_path / "agent")
    os.rename(tmp_path / "agent", tmp_path / ".old-agent")
    assert load(tmp_path / "agent", robot).agent is not None
    assert weights_hash(tmp_path / "agent") == name


# ---- names


def test_the_hash_names_the_weights_and_nothing_else(tmp_path: Path) -> None:
    robot = toy_run.contract()
    names = []
    for run, phase in (("a", "tokenizer"), ("b", "tokenizer"), ("b", "dynamics")):
        toy_run.write_checkpoint(tmp_path / run, phase, robot)
        names.append(weights_hash(tmp_path / run / phase))
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 12


# ---- sizes


def test_the_paper_preset_has_the_papers_sizes() -> None:
    """Counted on the meta device: nothing of its 8 GB is allocated."""
    robot = toy_run.contract(
        observations=[
            {
                "name": "screen", "topic": "/screen", "type": "sensor_msgs/msg/Image", "size": [352, 640],
                "align": {"strategy": "hold", "timeline": "receive", "tolerance_ms": 150},
            }
        ]
    )  # fmt: skip
    with torch.device("meta"):
        models = build(PRESETS["paper"], robot)
    millions = {
        name: sum(p.numel() for p in getattr(models, name).parameters()) / 1e6
        for name in CONTENTS["dynamics"]
    }
    assert millions["tokenizer"] == pytest.approx(400, rel=0.1)
    assert millions["dynamics"] == pytest.approx(1600, rel=0.1)
    assert all(p.device.type == "meta" for p in models.dynamics.parameters())
    assert models.dynamics.cfg.num_tokens * models.dynamics.cfg.token_dim == 512 * 16


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built_for_a_robot(name: str) -> None:
    cam = {
        "name": "cam", "topic": "/cam", "type": "sensor_msgs/msg/Image", "size": [64, 64],
        "align": {"strategy": "hold", "timeline": "receive", "tolerance_ms": 150},
    }  # fmt: skip
    with torch.device("meta"):
        models = build(PRESETS[name], toy_run.contract(observations=[cam]))
    assert models.policy.out.out_features == models.agent.cfg.leads * models.dynamics.space.num_params
