"""d4-eval on a toy world: every policy drives, and results follow the weights that they came from."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import toy_run
import yaml

from d4_core import checkpoint, clone
from d4_datasets.windows import Windows
from d4_sim import evaluate, vector, world
from d4_sim.driver import LOG_MIX
from d4_sim.evaluate import EvalArgs, Evaluation, first_start
from d4_sim.study_results import on_starts
from d4_sim.world import Observation

LEARNED = ("bc_scratch", "vpt", "wm_bc", "planner", "imagination")
EPISODES = 3


class Toy:
    """Four ticks of noise; the reward of each task is how far the command is to its side."""

    tasks = ("left", "right")
    action_low, action_high = np.array([-1.0, 0.0], np.float32), np.array([1.0, 3.0], np.float32)
    horizon, success_reward = 4, 0.5
    probes: ClassVar = {}
    rewards = np.zeros(2, np.float32)

    def reset(self, seed: int, task: int) -> Observation:
        self._rng, self._tick = np.random.default_rng([seed, task]), 0
        return self._look()

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, bool, bool]:
        self._tick += 1
        reward = np.array([-action[0], action[0]], np.float32)
        return self._look(), reward, False, self._tick == self.horizon

    def success(self) -> bool:
        return True

    def _look(self) -> Observation:
        return Observation(self._rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "dataset"
    toy_run.write_dataset(root, (6,) * 8)
    return root


@pytest.fixture
def evaluation(tmp_path: Path, dataset: Path, monkeypatch):
    """Factory of evaluations of one run folder with untrained networks."""
    for module in (world, vector):
        monkeypatch.setattr(module, "make_world", lambda name: Toy())
    monkeypatch.setattr(Evaluation, "_film", lambda self, name, batch: None)
    for phase in ("agent", "imagination"):
        toy_run.write_checkpoint(tmp_path, phase, toy_run.contract())

    def make(**changes) -> Evaluation:
        settings = {"episodes": EPISODES, "scratch_steps": 2, "device": "cpu"}
        return Evaluation(EvalArgs(run=tmp_path, dataset=dataset, **(settings | changes)))

    return make


def test_every_policy_leaves_its_episodes_and_what_is_known_about_its_heads(evaluation) -> None:
    first = evaluation()
    for name in ("random", "data", *LEARNED):
        first.policy(name)
        first.write()
    rows = json.loads((first.args.run / "eval.json").read_text())["policies"]
    for name in LEARNED:
        assert len(rows[name]["return"]) == EPISODES
        assert len(rows[name]["weights"]) == 12
        assert rows[name]["seconds"] > 0
    assert rows["random"]["weights"] is None
    assert rows["wm_bc"]["weights"] == rows["planner"]["weights"] != rows["imagination"]["weights"]
    assert len({rows[name]["weights"] for name in LEARNED}) == 4
    for name in ("wm_bc", "imagination"):
        assert sum(r["count"] for r in rows[name]["reward_calibration"]) == EPISODES * 3
        assert rows[name]["reward_bias"] == pytest.approx(
            np.mean([r["predicted"] - r["real"] for r in rows[name]["reward_calibration"]]), abs=1e-4
        )
    assert rows["wm_bc"]["kl_to_cloned"] == 0.0
    assert rows["imagination"]["kl_to_cloned"] > 0.0
    assert "value_bias" not in rows["wm_bc"]
    assert rows["imagination"]["value_calibration"]
    assert rows["vpt"]["idm"]["frames"] == 5
    assert rows["planner"]["planner"]["candidates"] > 1


def test_where_tasks_are_events_those_who_made_the_logs_drive_again(evaluation, monkeypatch) -> None:
    """Pieces of episodes, into which long recordings are cut, were judged as if they were whole."""
    kinds = []

    class Driver:
        def __init__(self, kind: str, rng: np.random.Generator) -> None:
            kinds.append(kind)

        def act(self, world: Toy) -> np.ndarray:
            return np.array([0.5, 1.0], np.float32)

    monkeypatch.setattr(Toy, "event_tasks", True, raising=False)
    monkeypatch.setattr(Toy, "driver", lambda self, kind, rng: Driver(kind, rng), raising=False)
    made = evaluation(episodes=12)
    made.policy("data")
    row = made._own["data"]
    assert row["return"] == [-2.0, 2.0] * 6
    assert row["success"] == [1] * 12
    assert set(kinds) == set(LOG_MIX)


def test_results_of_other_weights_are_dropped_when_eval_json_is_opened(evaluation, dataset) -> None:
    first = evaluation()
    names = ("random", "wm_bc", "planner", "imagination")
    for name in names:
        first.policy(name)
    first.write()
    kept = evaluation().result
    assert tuple(kept["policies"]) == names
    for name, row in kept["policies"].items():
        if name in ("wm_bc", "imagination"):
            assert [len(row["first_ticks"][kind]) for kind in ("imagined", "real")] == [EPISODES] * 2
    weights = first.args.run / "agent" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert tuple(evaluation().result["policies"]) == ("random", "imagination")
    (first.args.run / "imagination" / "config.json").unlink()
    left = evaluation().result
    assert tuple(left["policies"]) == ("random",)


def test_results_on_other_starts_are_kept_beside(evaluation) -> None:
    first = evaluation()
    for name in ("random", "wm_bc"):
        first.policy(name)
    first.write()
    rows, folder = json.loads(first.path.read_text())["policies"], first.args.run
    for options in ({"seed": 3}, {"seed": 3, "episodes": 2}):
        other = evaluation(**options)
        other.policy("random")
        assert tuple(other.result["policies"]) == ("random",)
        other.write()
    assert len(list(folder.glob("eval.on-*.json"))) == 2
    assert on_starts(first.path, first_start(0), EPISODES, "toy")["policies"] == rows
    for count in (EPISODES, 2):  # the fewer ones do not stand for the others, nor the other way round
        assert on_starts(first.path, first_start(3), count, "toy")["episodes"] == count
    for start, name in ((4, "toy"), (0, "yard")):
        assert on_starts(first.path, first_start(start), EPISODES, name) == {}
    again = evaluation()
    assert tuple(again.result["policies"]) == ("random", "wm_bc")
    again.policy("random")
    again.write()
    assert tuple(json.loads(first.path.read_text())["policies"]) == ("random", "wm_bc")
    assert len(list(folder.glob("eval.on-*.json"))) == 2


def test_what_is_there_is_not_driven_again_if_only_the_rest_is_asked_for(evaluation, capsys) -> None:
    """An interrupted bench drove all policies of a stage from the beginning."""
    first = evaluation()
    first.policy("random")
    first.write()
    row = first.result["policies"]["random"]
    again = evaluation(missing=True)
    again.policy("random")
    assert again._own["random"] == row  # with the seconds that it took then
    assert "was there" in capsys.readouterr().out
    other = evaluation(missing=True, seed=3)
    other.policy("random")
    assert "was there" not in capsys.readouterr().out
    assert other._own["random"]["return"] != row["return"]


def test_two_evaluations_on_other_starts_lose_nothing(evaluation) -> None:
    """Between reading and renaming one took what the other had just written for what was there before."""
    made = [evaluation(seed=seed) for seed in range(4)]
    for each in made:
        each.policy("random")
    with ThreadPoolExecutor() as pool:
        for _ in range(5):
            list(pool.map(lambda each: each.write(), made))
    for seed, each in enumerate(made):
        kept = on_starts(each.path, first_start(seed), EPISODES, "toy")
        assert kept["policies"]["random"] == each._own["random"]


def test_results_on_more_starts_stand_for_no_others(tmp_path) -> None:
    """One policy on more starts hid all others, and old ones what had been done again on fewer."""
    rows = {"world": "yard", "seeds": [5, 6], "episodes": 2, "policies": {"a": {}, "b": {}}}
    path = tmp_path / "eval-drop-0.json"
    path.write_text(json.dumps({**rows, "seeds": [5, 9], "episodes": 5, "policies": {"a": {}}}))
    evaluate.beside(path, rows).write_text(json.dumps(rows))
    (tmp_path / "eval-drop-0.1.json").write_text(json.dumps({**rows, "policies": {key: {} for key in "abc"}}))
    assert on_starts(path, 5, 2, "yard") == rows
    assert on_starts(path, 5, 5, "yard")["policies"] == {"a": {}}
    assert on_starts(path, 5, 3, "yard") == {}


def test_a_report_in_a_disturbance_is_no_folder(tmp_path) -> None:
    """`--disturb latency=FILE` ended in an error about a file's name."""
    disturbed = {"world": "yard+latency=docs/results/robot/latency-20hz.json", "seeds": [5, 6]}
    assert evaluate.beside(tmp_path / "eval-x.json", disturbed).parent == tmp_path


def test_baselines_of_the_run_are_taken_as_they_are(evaluation, monkeypatch) -> None:
    """d4-eval with its own number of steps once trained those of a bench anew."""
    made = evaluation(scratch_steps=3)
    made.policy("bc_scratch")
    before = (made.args.run / "bc_scratch" / "weights.safetensors").read_bytes()
    evaluation(scratch_steps=None, scale=7.0).policy("bc_scratch")
    assert (made.args.run / "bc_scratch" / "weights.safetensors").read_bytes() == before
    assert evaluation(scratch_steps=None, scale=0.001)._trainer("vpt").scratch.steps == 2  # not there yet


def test_practice_that_did_not_help_fails_its_gate(evaluation, monkeypatch) -> None:
    made = evaluation()
    for name in ("wm_bc", "imagination"):
        made.policy(name)
    metrics = {"kl": 0.1, "event_density": 0.5}
    monkeypatch.setattr(checkpoint, "load_config", lambda folder: {"metrics": metrics})
    rows = made.result["policies"]
    for change, fails in ((1.0, False), (0.0, True), (-1.0, True)):
        rows["imagination"]["return"] = [value + change for value in rows["wm_bc"]["return"]]
        assert any("gain over the cloned policy" in text for text in made.gates()) == fails


def test_evaluations_side_by_side_keep_each_others_rows(evaluation) -> None:
    one, other = evaluation(), evaluation(argmax=True)
    for each in (one, other):
        each.policy("wm_bc")
        each.write()
    kept = evaluation().result["policies"]
    assert set(kept) == {"wm_bc", "wm_bc_argmax"}
    assert kept["wm_bc"]["return"] != kept["wm_bc_argmax"]["return"]
    assert kept["wm_bc"]["weights"] == kept["wm_bc_argmax"]["weights"]
    assert other.gates() == []  # they are about samples


def test_a_row_of_a_time_before_hashes_is_not_trusted(evaluation) -> None:
    first = evaluation()
    for name in ("random", "wm_bc"):
        first.policy(name)
        del first._own[name]["weights"]
    first.write()
    assert tuple(evaluation().result["policies"]) == ("random",)
    assert evaluation(episodes=2).result["policies"] == {}


def test_baselines_get_the_labels_that_the_run_got(evaluation, dataset) -> None:
    full = evaluation()
    all_labels = int(Windows(dataset).action_mask.sum())
    assert int(full.logs.action_mask.sum()) == all_labels
    (full.args.run / "config.yaml").write_text(yaml.safe_dump({"labels": 0.34}))
    few = evaluation()
    held = int(full.logs.action_mask[np.isin(full.logs.episode_index, full.held_out)].sum())
    assert int(few.logs.action_mask.sum()) == held + 6 * round(
        0.34 * int(full.logs.labelled[full.train].sum())
    )
    assert few._trainer("bc_scratch").data != full._trainer("bc_scratch").data
    assert np.array_equal(few._trainer("bc_scratch").episodes, full.train)


def test_starts_are_shared_between_runs_and_the_training_of_baselines_is_not(evaluation) -> None:
    plain = evaluation()
    seed = plain._trainer("bc_scratch").seed
    (plain.args.run / "config.yaml").write_text(yaml.safe_dump({"seed": 7}))
    other = evaluation()
    assert other.seeds.tolist() == plain.seeds.tolist()
    assert (seed, other._trainer("bc_scratch").seed) == (0, 7)


def test_baselines_without_a_simulator_are_those_of_the_evaluation(evaluation, dataset, monkeypatch) -> None:
    """For games there was no way to them at all."""
    first = evaluation()
    run = first.args.run
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "labels": 0.5}))
    monkeypatch.setattr(sys, "argv", ["d4-clone", str(run), "--dataset", str(dataset), "--steps", "2"])
    clone.main()
    made = {p: (run / p / "weights.safetensors").stat().st_mtime_ns for p in ("bc_scratch", "vpt_idm", "vpt")}
    again = evaluation()
    for name in ("bc_scratch", "vpt"):
        again.policy(name)
    assert made == {p: (run / p / "weights.safetensors").stat().st_mtime_ns for p in made}


@pytest.mark.parametrize("command", [clone, evaluate])
def test_what_is_no_run_is_left_alone(dataset, monkeypatch, capsys, command) -> None:
    """d4-eval trained its baselines inside a dataset that was given in place of a run."""
    before = sorted(dataset.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["command", str(dataset), "--dataset", str(dataset)])
    with pytest.raises(SystemExit):
        command.main()
    assert "is no run of d4-train" in capsys.readouterr().err
    assert sorted(dataset.rglob("*")) == before


@pytest.mark.parametrize(
    "words", [["--episodes", "0"], ["--episodes", "-3"], ["--seed", "-1"], ["--planner-episodes", "0"]]
)
def test_numbers_of_d4_eval_that_make_no_sense_are_a_sentence(tmp_path, monkeypatch, capsys, words) -> None:
    """They were three different tracebacks."""
    monkeypatch.setattr(sys, "argv", ["d4-eval", str(tmp_path), "--dataset", str(tmp_path), *words])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "--episodes and --planner-episodes must be above 0" in capsys.readouterr().err


def test_a_drive_that_lost_frames_is_one_episode_of_the_data() -> None:
    """Its pieces counted as episodes, with half of the return each and a success in the middle."""
    reward = np.array([[9, 0], [1, 0], [2, 0], [9, 9], [0, 1], [3, 0], [1, 0]], np.float32)
    logs = SimpleNamespace(
        reward=reward, drives=np.array([0, 1, 0]), episode_start=np.array([0, 3, 5]),
        episode_length=np.array([3, 2, 2]), task_index=np.array([0, 0, 0, 1, 1, 0, 0]),
    )  # fmt: skip
    found = Evaluation._data(SimpleNamespace(logs=logs, success_reward=1.0))
    assert found == {"return": [1.0 + 2 + 3 + 1, 1.0], "success": [1, 1], "task": [0, 1]}
