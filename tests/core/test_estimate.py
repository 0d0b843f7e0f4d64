"""Training time: the work that is counted is the work that is done, and the speed is measured."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace

import pytest
import torch
import toy_run

from d4_core import estimate
from d4_core.config import PHASES, PRESETS
from d4_core.memory import costs
from d4_datasets.contract import Contract


def test_work_grows_with_steps_and_batches() -> None:
    contract, preset = toy_run.contract(), toy_run.PRESET
    before = estimate.work(preset, contract)
    t = preset.tokenizer_training
    after = estimate.work(
        replace(preset, tokenizer_training=replace(t, steps=2 * t.steps, batch=3 * t.batch)), contract
    )
    assert list(before) == list(PHASES)
    assert after["tokenizer"].steps == 2 * before["tokenizer"].steps
    assert after["tokenizer"].frames == 6 * before["tokenizer"].frames
    assert after["tokenizer"].flops == pytest.approx(6 * before["tokenizer"].flops)
    assert after["dynamics"] == before["dynamics"]
    per_frame = before["tokenizer"].flops / before["tokenizer"].frames
    assert per_frame == 3 * costs(preset, contract)["tokenizer"].flops
    again = estimate.work(replace(preset, tokenizer=replace(preset.tokenizer, recompute=True)), contract)
    assert again["tokenizer"].flops == pytest.approx(4 / 3 * before["tokenizer"].flops)


def test_without_the_shortcut_loss_no_phase_pays_a_teacher() -> None:
    contract, cost = toy_run.contract(), costs(toy_run.PRESET, toy_run.contract())
    d = replace(toy_run.PRESET.dynamics_training, bootstrap_rows=0.0)
    after = estimate.work(replace(toy_run.PRESET, dynamics_training=d), contract)
    per_frame = {name: found.flops / found.frames for name, found in after.items()}
    assert per_frame["dynamics"] == 3 * cost["dynamics"].flops
    assert per_frame["agent"] == 3 * (cost["dynamics"].flops + cost["agent"].flops)
    assert toy_run.PRESET.agent_training.dynamics.bootstrap_rows > 0


def test_speed_is_what_the_layers_take(monkeypatch) -> None:
    """A clock that says one second per pass makes the speed of a core the operations of one pass."""
    clock = iter(range(100))
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(estimate, "cgroup_quota", lambda: math.inf)
    threads = torch.get_num_threads()
    cfg = toy_run.PRESET.dynamics
    monkeypatch.setattr(
        estimate, "_PROBE_BYTES", 160 * cfg.dim * cfg.time_every * 5 * 4
    )  # 4 frames of 5 slots
    found = estimate.speed(cfg, 5, torch.device("cpu"))
    assert torch.get_num_threads() == threads
    assert found == pytest.approx(3 * 3 * 4 * 5 * estimate.layer_flops(cfg, 5) * cfg.time_every)


def test_every_phase_takes_time() -> None:
    seconds = estimate.training_seconds(toy_run.PRESET, toy_run.contract(), torch.device("cpu"))
    assert list(seconds) == list(PHASES)
    assert all(value > 0 for value in seconds.values())


def test_large_presets_are_not_measured_on_a_cpu(monkeypatch) -> None:
    """An audit of a second took half a minute, most of it in layers of `paper`."""
    measured = []
    monkeypatch.setattr(estimate, "speed", lambda cfg, width, device: measured.append(cfg.dim) or 1e12)
    spec = toy_run.contract().to_dict()
    spec["observations"][0]["size"] = [64, 64]
    contract = Contract.from_dict(spec)
    for name in ("paper", "base", "nano"):
        estimate.training_seconds(PRESETS[name], contract, torch.device("cpu"))
    base, nano = PRESETS["base"], PRESETS["nano"]
    assert measured == [base.tokenizer.dim, base.dynamics.dim] * 2 + [nano.tokenizer.dim, nano.dynamics.dim]


def test_facts_of_a_preset_count_what_training_leaves_on_the_disk() -> None:
    contract, preset = toy_run.contract(), toy_run.PRESET
    facts = estimate.facts("toy", preset, contract, 500)
    tokenizer = preset.tokenizer_config(contract)
    assert facts["latents_bytes"] == 2 * 500 * tokenizer.num_tokens * tokenizer.token_dim
    assert facts["total_seconds"] == pytest.approx(sum(facts["seconds"].values()))
    assert facts["seen"] == estimate.work(preset, contract)["dynamics"].frames / 500
    cost = costs(preset, contract)
    assert facts["parameters"] == sum(c.parameters for c in cost.values())
    assert 28 * facts["parameters"] <= facts["checkpoints_bytes"] <= 36 * facts["parameters"]


def test_a_preset_that_does_not_fit_the_contract_says_why() -> None:
    spec = toy_run.contract().to_dict()
    spec["observations"][0]["size"] = [17, 17]
    facts = estimate.facts("toy", toy_run.PRESET, Contract.from_dict(spec), 500)
    assert facts.keys() == {"preset", "reason"}
    assert "17" in facts["reason"]
