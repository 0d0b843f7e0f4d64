"""d4-train from a dataset to four checkpoints on a tiny robot, and every way in which it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run
import yaml
from safetensors.torch import load_file

from d4_core import memory, pipeline, train, transformer
from d4_core.arguments import TrainArgs, scaled
from d4_core.gates import Gate
from d4_core.models import CONTENTS, load, weights_hash
from d4_core.phases import DynamicsPhase
from d4_core.pipeline import Pipeline, pick_device
from d4_core.train import default_procs, unfinished_procs
from d4_datasets.errors import UserError

PHASES = ("tokenizer", "dynamics", "agent", "imagination")
AGAIN = ("tokenizer.recompute=true", "dynamics.recompute=true")
# `nano` for a 16x24 picture, a few steps of each phase
TINY = [
    "patch=8", "num_tokens=2", "num_latents=4", "latent_dim=4", "registers=1", "agent_tokens=2", "leads=2",
    "hidden=16", "reward_bins=9", "value_bins=9",
    "tokenizer.time_every=2", "tokenizer.depth=2", "tokenizer.dim=16", "tokenizer.context=4",
    "dynamics.depth=2", "dynamics.dim=16", "dynamics.context=4",
    "tokenizer_training.steps=4", "tokenizer_training.batch=8", "tokenizer_training.length=4",
    "dynamics_training.steps=4", "dynamics_training.batch=4", "dynamics_training.length=4",
    "dynamics_training.long_length=8",
    "agent_training.steps=4", "agent_training.batch=4", "agent_training.long_length=8",
    "imagination_training.steps=4", "imagination_training.batch=4", "imagination_training.reuse=2",
    "imagination_training.settings.horizon=3", "imagination_training.settings.contexts=[1, 2]",
]  # fmt: skip


def args(dataset: Path, run: Path, *settings: str, **changes) -> TrainArgs:
    options = {"force": True, "device": "cpu", "set": [*TINY, *settings]} | changes
    return TrainArgs(dataset=dataset, run=run, **options)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "toy"
    toy_run.write_dataset(root, (24,) * 8)
    return root


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    """A run of all four phases; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train.run(args(dataset, run))
    return run


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def hashes(run: Path) -> dict[str, str]:
    return {phase: weights_hash(run / phase) for phase in PHASES if (run / phase).exists()}


def steps_of(run: Path) -> list[tuple[str, int]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["phase"], line["step"]) for line in lines]


def call(monkeypatch, *line: str) -> int:
    """Exit code of d4-train with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["d4-train", *line])
    monkeypatch.setattr(train.threads, "configure", lambda number: None)
    try:
        train.main()
    except SystemExit as stop:
        return stop.code
    return 0


def on_the_line(settings: list[str]) -> list[str]:
    return ["--set", *settings]


# ---- the whole run


def test_all_four_phases_leave_complete_checkpoints(finished, dataset) -> None:
    robot = toy_run.contract()
    for phase in PHASES:
        models = load(finished / phase, robot)
        assert {name for name in CONTENTS["imagination"] if getattr(models, name) is not None} == set(
            CONTENTS[phase]
        )
        card = (finished / phase / "card.md").read_text()
        assert "192 frames, 8 episodes, 96 labelled frames" in card
    assert set(steps_of(finished)) >= {(phase, 4) for phase in PHASES}
    about = yaml.safe_load((finished / "config.yaml").read_text())
    assert about["settings"]["dynamics_training"]["steps"] == 4
    assert (about["preset"], about["seed"], about["procs"], about["frames"]) == ("nano", 0, 1, 192)
    assert about["labelled_share"] == 0.5
    assert (finished / "contract.yaml").read_text() == robot.to_yaml()
    assert "LPIPS was not used" in json.loads((finished / "notes.json").read_text())[0]
    curves = json.loads((finished / "media" / "open_loop.json").read_text())
    assert curves["horizons"] == [1, 2, 4, 8, 16]
    gates = json.loads((finished / "gates.json").read_text())
    assert all(gates[phase] for phase in ("tokenizer", "dynamics", "agent"))
    tag = weights_hash(finished / "tokenizer")
    assert {p.name for p in (finished / "latents").iterdir()} == {f"latents-{tag}.npy", f"latents-{tag}.json"}
    assert np.load(finished / "latents" / f"latents-{tag}.npy").shape == (192, 2, 8)
    assert not [p for p in finished.rglob("*") if p.name.startswith((".tmp", ".old"))]


def test_each_phase_changes_its_own_networks(finished) -> None:
    weights = {phase: load_file(finished / phase / "weights.safetensors") for phase in PHASES}

    def same(network: str, before: str, after: str) -> bool:
        keys = [k for k in weights[before] if k.startswith(network + ".")]
        assert keys
        return all(torch.equal(weights[before][k], weights[after][k]) for k in keys)

    trained = {
        key: value for key, value in weights["tokenizer"].items() if "latent_" not in key.split(".")[1]
    }
    assert all(torch.equal(value, weights["dynamics"][key]) for key, value in trained.items())
    assert same("tokenizer", "dynamics", "agent")
    assert same("tokenizer", "agent", "imagination")
    assert not same("dynamics", "dynamics", "agent")  # finetuning
    assert same("dynamics", "agent", "imagination")
    assert same("agent", "agent", "imagination")
    policy = {
        k.removeprefix("policy."): v for k, v in weights["imagination"].items() if k.startswith("policy.")
    }
    assert any(not torch.equal(v, weights["agent"][f"agent.policy.{k}"]) for k, v in policy.items())


def test_the_latent_statistics_travel_with_every_later_checkpoint(finished) -> None:
    """A robot loads the last checkpoint alone, and its tokens must be standardised as in training."""
    tokens = torch.from_numpy(np.load(next((finished / "latents").glob("*.npy"))).astype(np.float32))
    for phase in ("dynamics", "agent", "imagination"):
        tokenizer = load(finished / phase).tokenizer
        raw = tokenizer.unpack(tokens)
        torch.testing.assert_close(tokenizer.pack(raw), tokens, rtol=1e-2, atol=1e-2)
        assert tokenizer.latent_std.std() > 0


def test_two_trainings_in_one_folder_would_write_the_same_checkpoints(dataset, tmp_path) -> None:
    first, second = (Pipeline(args(dataset, tmp_path / "run")) for _ in range(2))
    refused = pytest.raises(UserError, match=r"another d4-train works in .*run: wait for it")
    with first.alone(), refused, second.alone():
        pass
    with second.alone():
        pass


def test_what_was_trained_on_training_episodes_only(dataset, tmp_path, monkeypatch) -> None:
    run = Pipeline(args(dataset, tmp_path / "run"))
    assert set(run.train) | set(run.held_out) == set(range(8))
    assert not set(run.train) & set(run.held_out)
    phase = run._prepare("tokenizer")
    assert np.array_equal(phase.episodes, run.train)
    frames = pipeline.frames_of(run.logs, run.train)
    mean = (run.logs.images["cam"][frames] / 255).mean(0)
    torch.testing.assert_close(phase.tokenizer.mean_cam, torch.from_numpy(mean).float(), rtol=0, atol=1e-3)


# ---- running it again


def test_a_finished_run_is_not_trained_again(copy, dataset) -> None:
    before, lines = hashes(copy), steps_of(copy)
    gates = json.loads((copy / "gates.json").read_text())
    gates["agent"].append({"name": "measured by d4-eval", "value": 1.0, "ok": True})
    (copy / "gates.json").write_text(json.dumps(gates))
    train.run(args(dataset, copy))
    assert hashes(copy) == before
    assert steps_of(copy) == lines
    names = [row["name"] for row in json.loads((copy / "gates.json").read_text())["agent"]]
    assert "measured by d4-eval" in names  # the weights are the same, so it still holds


def test_later_settings_leave_earlier_phases_alone(copy, dataset) -> None:
    before = hashes(copy)
    train.run(args(dataset, copy, "imagination_training.settings.beta=1.5"))
    after = hashes(copy)
    assert {phase for phase in PHASES if before[phase] != after[phase]} == {"imagination"}
    assert [p.name for p in copy.glob("*.previous")] == ["imagination.previous"]
    train.run(args(dataset, copy, "agent_training.dynamics_weight=0.5"))
    assert {phase for phase in PHASES if after[phase] != hashes(copy)[phase]} == {"agent", "imagination"}
    assert {p.name for p in copy.glob("*.previous")} == {"agent.previous", "imagination.previous"}


def test_a_retrained_tokenizer_retrains_all_that_builds_on_it(copy, dataset) -> None:
    before = hashes(copy)
    gates = json.loads((copy / "gates.json").read_text())
    gates["agent"].append({"name": "measured by d4-eval", "value": 1.0, "ok": True})
    (copy / "gates.json").write_text(json.dumps(gates))
    train.run(args(dataset, copy, "tokenizer_training.steps=5"))
    assert not set(before.values()) & set(hashes(copy).values())
    tag = weights_hash(copy / "tokenizer")  # none was read by the wrong one, and the old ones are gone
    assert {p.name for p in (copy / "latents").iterdir()} == {f"latents-{tag}.npy", f"latents-{tag}.json"}
    names = [row["name"] for row in json.loads((copy / "gates.json").read_text())["agent"]]
    assert "measured by d4-eval" not in names  # it was another policy's


def test_a_phase_notices_that_its_input_was_retrained_behind_its_back(copy, dataset) -> None:
    """Its own settings are as they were, and its weights fit another tokenizer's latents."""
    before = hashes(copy)
    train.run(args(dataset, copy, "tokenizer_training.steps=5", phases=("tokenizer",)))
    train.run(args(dataset, copy, phases=("dynamics",)))
    assert hashes(copy)["dynamics"] != before["dynamics"]
    assert hashes(copy)["agent"] == before["agent"]


def test_every_phase_that_trains_a_transformer_runs_its_layers_again(dataset, tmp_path, monkeypatch) -> None:
    """The agent phase took the network from a checkpoint, which does not say so, and kept everything."""
    phases, plain = [], transformer.checkpoint

    def counted(*inputs, **options):
        phases.append(current[0])
        return plain(*inputs, **options)

    current, run_phase = [""], Pipeline.run_phase

    def noted(self, phase):
        current[0] = phase
        run_phase(self, phase)

    monkeypatch.setattr(transformer, "checkpoint", counted)
    monkeypatch.setattr(Pipeline, "run_phase", noted)
    train.run(args(dataset, tmp_path / "run", *AGAIN))
    assert set(phases) == {"tokenizer", "dynamics", "agent"}


@pytest.mark.parametrize("settings", [(), AGAIN])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    finished, dataset, tmp_path, monkeypatch, capsys, settings: tuple[str, ...]
) -> None:
    """Also if it keeps less in memory from there on."""
    forward = DynamicsPhase.forward

    def interrupted(self, batch, gen, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, gen, step)

    monkeypatch.setattr(DynamicsPhase, "forward", interrupted)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        train.run(args(dataset, run))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "dynamics: stopped and saved at step 2 of 4; the same command continues" in capsys.readouterr().err
    assert set(hashes(run)) == {"tokenizer", "dynamics"}
    assert unfinished_procs(run) == 1
    monkeypatch.undo()
    train.run(args(dataset, run, *settings))
    assert hashes(run) == hashes(finished)
    assert unfinished_procs(run) == 0
    assert steps_of(run) == sorted(set(steps_of(run)), key=steps_of(run).index)  # no step was logged twice


def test_the_number_of_processes_of_an_interrupted_run_is_kept(tmp_path) -> None:
    """Batches depend on it: other processes would draw others, and resuming would not equal going through."""
    assert unfinished_procs(tmp_path / "nothing") == 0
    (tmp_path / "config.yaml").write_text("preset: nano\nprocs: 3\n")
    assert unfinished_procs(tmp_path) == 0
    (tmp_path / "dynamics").mkdir()
    (tmp_path / "dynamics" / "config.json").write_text('{"status": "training"}')
    assert unfinished_procs(tmp_path) == 3
    (tmp_path / "dynamics" / "config.json").write_text('{"status": "done"}')
    assert unfinished_procs(tmp_path) == 0
    (tmp_path / "dynamics" / "config.json").write_text("{")
    assert unfinished_procs(tmp_path) == 0


# ---- several processes


def test_two_processes_leave_the_same_kind_of_run(finished, dataset, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    run = tmp_path / "run"
    line = [str(dataset), "--run", str(run), "--procs", "2", "--device", "cpu", "--force"]
    assert call(monkeypatch, *line, *on_the_line(TINY)) == 0
    for phase in PHASES:
        for name in ("weights.safetensors", "train.safetensors"):
            alone, shared = (load_file(folder / phase / name) for folder in (finished, run))
            assert {k: (v.shape, v.dtype) for k, v in alone.items()} == {
                k: (v.shape, v.dtype) for k, v in shared.items()
            }
        a, b = (json.loads((folder / phase / "config.json").read_text()) for folder in (finished, run))
        assert a.keys() == b.keys()
        assert (a["config"]["preset"], a["status"]) == (b["config"]["preset"], b["status"])
        assert {p.name for p in (run / phase).iterdir()} == {p.name for p in (finished / phase).iterdir()}
    assert steps_of(run) == steps_of(finished)  # one writer
    assert yaml.safe_load((run / "config.yaml").read_text())["procs"] == 2
    assert (run / "rank-1.log").read_text() == ""
    assert hashes(run)["dynamics"] != hashes(finished)["dynamics"]  # two half batches are no whole one
    load(run / "imagination", toy_run.contract())


def test_processes_are_launched_from_the_command_line(dataset, tmp_path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(train, "launch", lambda *given: calls.append(given) or 7)
    monkeypatch.delenv("RANK", raising=False)
    line = [str(dataset), "--run", str(tmp_path / "run"), "--procs", "3"]
    assert call(monkeypatch, *line) == 7
    assert calls == [("d4_core.train", line, 3, tmp_path / "run")]
    monkeypatch.setattr(train.threads, "free_cores", lambda: 9)
    assert call(monkeypatch, *line[:-2], "--device", "cpu") == 7
    assert calls[-1][2] == 4  # more than a few processes gain nothing
    (tmp_path / "run" / "agent").mkdir(parents=True)
    (tmp_path / "run" / "agent" / "config.json").write_text('{"status": "training"}')
    (tmp_path / "run" / "config.yaml").write_text("procs: 2\n")
    assert call(monkeypatch, *line[:-2]) == 7
    assert calls[-1][2] == 2  # an interrupted run goes on with as many as it began with
    ran = []
    monkeypatch.setattr(train, "run", ran.append)
    monkeypatch.setattr(train, "follow_parent", lambda: ran.append("follows"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("D4_RENDEZVOUS", "file:///nowhere")
    assert call(monkeypatch, *line) == 0  # a launched process launches none
    assert ran[0] == "follows"
    assert ran[1].procs == 3
    assert len(calls) == 3


def test_a_gpu_gets_one_process() -> None:
    assert default_procs("cuda") == 1
    assert 1 <= default_procs("cpu") <= 4


# ---- gates


def test_a_failed_gate_stops_the_command_with_code_2_and_one_sentence(
    dataset, tmp_path, monkeypatch, capsys
) -> None:
    run = tmp_path / "run"
    line = [str(dataset), "--run", str(run), "--procs", "1", "--device", "cpu"]
    assert call(monkeypatch, *line, *on_the_line(TINY)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: tokenizer: ")
    assert "gate(s) failed, --force goes on: FAILED PSNR above the mean image (dB)" in err[-1]
    assert hashes(run).keys() == {"tokenizer"}  # nothing was built on it
    rows = json.loads((run / "gates.json").read_text())["tokenizer"]
    assert not all(row["ok"] for row in rows)


def test_gates_that_hold_let_the_run_go_on(dataset, tmp_path, monkeypatch, capsys) -> None:
    good = Gate("fine", 1.0, ">=", 0.5, "never shown")
    monkeypatch.setattr(pipeline, "tokenizer_gates", lambda *given: [good])
    train.run(args(dataset, tmp_path / "run", force=False, phases=("tokenizer",)))
    out = capsys.readouterr().out
    assert "ok     fine: 1 (must be >= 0.5)" in out
    assert "never shown" not in out


# ---- refusals


def refused(*given, **changes) -> str:
    with pytest.raises(UserError) as caught:
        train.run(args(*given, **changes))
    return str(caught.value)


def test_a_dataset_without_labels_trains_the_world_and_says_why_no_agent(tmp_path) -> None:
    toy_run.write_dataset(tmp_path / "data", (24,) * 4, labels=False)
    text = refused(tmp_path / "data", tmp_path / "run")
    assert text.startswith(
        "no frame of this dataset has a known action, so the agent phase has nothing to clone"
    )
    assert "/cmd_vel" in text
    assert hashes(tmp_path / "run").keys() == {"tokenizer", "dynamics"}
    gates = json.loads((tmp_path / "run" / "gates.json").read_text())["dynamics"]
    assert any("PSNR above copy-last" in row["name"] for row in gates)  # the world itself is measured
    assert any("not measured" in row["name"] for row in gates)


def test_imagination_without_a_reward_says_so(tmp_path) -> None:
    toy_run.write_dataset(tmp_path / "data", (24,) * 4, reward=None)
    text = refused(tmp_path / "data", tmp_path / "run")
    assert text.startswith("imagination training needs a reward: name its topic in the contract")
    assert hashes(tmp_path / "run").keys() == {"tokenizer", "dynamics", "agent"}


def test_step_sizes_that_were_never_trained_are_not_sampled(copy, dataset) -> None:
    settings = ["dynamics_training.bootstrap_rows=0.0"]
    train.run(args(dataset, copy, *settings))
    for phase in ("dynamics", "agent", "imagination"):
        dynamics = load(copy / phase).dynamics
        assert dynamics is not None
        assert not dynamics.cfg.shortcut


def test_a_phase_needs_the_one_before(dataset, tmp_path) -> None:
    text = refused(dataset, tmp_path / "run", phases=("agent",))
    assert text == f"agent needs {tmp_path / 'run' / 'dynamics'}, which does not exist: train dynamics first"


def test_a_run_of_another_robot_is_refused(copy, tmp_path) -> None:
    toy_run.write_dataset(tmp_path / "other", (24,) * 4, latency_ms=80)
    before = hashes(copy)
    text = refused(tmp_path / "other", copy)
    assert f"was trained for contract {toy_run.contract().hash}" in text
    assert hashes(copy) == before


def test_a_preset_that_does_not_fit_is_refused_before_any_training(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000.0)
    assert "tokenizer of this preset needs about" in refused(dataset, tmp_path / "run")
    assert hashes(tmp_path / "run") == {}


def test_the_perceptual_loss_needs_its_files_and_the_run_notes_it(dataset, tmp_path) -> None:
    missing = f"tokenizer_training.lpips_features={tmp_path / 'vgg16.pth'}"
    assert "cannot read the LPIPS weights" in refused(dataset, tmp_path / "run", missing)
    assert f"weights in {tmp_path / 'vgg16.pth'}" in (tmp_path / "run" / "notes.json").read_text()


def test_one_episode_is_too_few(tmp_path) -> None:
    toy_run.write_dataset(tmp_path / "data", (24,))
    assert "too few episodes to hold one out for the gates" in refused(tmp_path / "data", tmp_path / "run")


def test_devices(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(
        UserError, match="--device cuda, but torch sees no CUDA device here; use --device cpu"
    ):
        pick_device("cuda")
    with pytest.raises(UserError, match="--device tpu: choose auto, cpu or cuda"):
        pick_device("tpu")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)] * 2
    assert pick_device("cpu") == torch.device("cpu")


def test_the_command_says_what_it_cannot_use(tmp_path, monkeypatch, capsys) -> None:
    line = [str(tmp_path / "missing"), "--run", str(tmp_path / "run"), "--procs", "1"]
    monkeypatch.delenv("RANK", raising=False)
    for extra, why in (
        (["--scale", "0"], "--scale 0.0 must be positive"),
        (["--set", "depth=3"], "--set depth=3: there is no 'depth'; there is patch, "),
        ([], str(tmp_path / "missing")),
    ):
        assert call(monkeypatch, *line, *extra) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert len(err) == 1
        assert err[0].startswith("error: ")
        assert why in err[0]


# ---- step counts


def test_scale_multiplies_steps_and_keeps_whole_rollouts() -> None:
    base = scaled(TrainArgs(dataset=Path("d"), run=Path("r")))
    half = scaled(TrainArgs(dataset=Path("d"), run=Path("r"), scale=0.5))
    least = scaled(TrainArgs(dataset=Path("d"), run=Path("r"), scale=1e-6))
    for name in PHASES:
        parts = [getattr(preset, f"{name}_training") for preset in (base, half, least)]
        reuse = getattr(parts[0], "reuse", 1)
        assert abs(parts[1].steps - parts[0].steps / 2) <= reuse
        assert parts[2].steps == reuse
        assert all(part.steps % reuse == 0 for part in parts)


def test_what_the_heads_read_is_decided_in_the_agent_phase(copy, dataset) -> None:
    before = hashes(copy)
    train.run(args(dataset, copy, "heads_read_world=false", phases=("agent", "imagination")))
    after, models = hashes(copy), load(copy / "imagination")
    assert after["dynamics"] == before["dynamics"]
    assert models.policy.inputs == models.critic.head.inputs == 2 * 16
    assert load(copy / "dynamics").dynamics.cfg.heads_read_world
    assert not models.dynamics.cfg.heads_read_world
