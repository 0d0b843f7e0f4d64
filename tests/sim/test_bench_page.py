"""d4-sim bench: its page on made-up results."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim import bench, bench_page, stages
from d4_sim.bench import PRESETS, Shape, Size, plan
from d4_sim.stages import keys

OUT = Path("out")
SIZE = replace(PRESETS["toy"], seeds=2)
FOUND = replace(SIZE, eval_episodes=20, expert_episodes=8, disturb=("latency=100",))  # what `out` holds
STARTS = [bench_page.FIRST, bench_page.FIRST + 19]
TASKS = ["push", "reach"]


def row(mean: float, seed: int, count: int = 20) -> dict[str, Any]:
    noise = np.random.default_rng([seed, int(10 * mean)]).normal(0, 0.5, count)
    task = (np.arange(count) % 2).tolist()
    returns = (mean + np.linspace(-2, 2, count) + noise).tolist()
    return {"return": returns, "success": [0, 1] * (count // 2), "fallen": [0] * count, "task": task}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


LEVELS = {"data": 15.0, "bc_scratch": 12.0, "vpt": 13.0, "wm_bc": 20.0, "imagination": 30.0}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    ends = {"random": row(5.0, 9), "expert": row(45.0, 9, 8)}
    put(tmp_path / "reference/push/eval.json", {"policies": ends, "task_names": TASKS, "seeds": STARTS})
    for seed in range(2):
        run = tmp_path / f"push-{seed}" / "run"
        policies = {name: row(level + seed, seed) for name, level in LEVELS.items()}
        found = {"policies": policies | {"planner": row(25.0, seed, 4)}, "world": "push", "seeds": STARTS}
        put(run / "eval.json", found)
        gate = {"name": "reward correlation", "value": 0.3, "op": ">=", "limit": 0.8, "ok": bool(seed)}
        put(run / "gates.json", {"agent": [gate]})
        late = {name: row(LEVELS[name] + seed - 4, seed) for name in bench_page.DISTURBED}
        found = {"policies": late, "world": "push+latency=100", "seeds": STARTS}
        put(run / "eval-latency-100.json", found)
    stages = ("push-0/data", "push-0/policies", "push-1/policies")
    note(tmp_path, stages)
    return tmp_path


def note(out: Path, done: Sequence[str], size: Size = FOUND, worlds: tuple[str, ...] = ("push",)) -> None:
    """As if these stages, and no others, had been done at this size."""
    known = keys_of(size, worlds)
    entries = {s: {"done": True, "seconds": 60.0, "forced": True, "key": known[s]} for s in done}
    put(out / "stages.json", entries)


def keys_of(size: Size, worlds: tuple[str, ...] = ("push",)) -> dict[str, str]:
    return keys(plan(Shape(out=OUT, size=size), worlds))


def write(out: Path, size: Size = FOUND, worlds: tuple[str, ...] = ("push",)) -> Path | None:
    """The page of what lies there, as if it had been made at this size."""
    note(out, list(json.loads((out / "stages.json").read_text())), size, worlds)
    return bench_page.write_page(out, worlds, size, keys_of(size, worlds))


def chains_of(out: Path) -> dict[str, Any]:
    done = stages.read_done(out, keys_of(FOUND))
    return bench_page.collect(out, ("push",), FOUND, done)["chains"]["push"]


def test_scores_are_normalised_between_random_and_expert(out: Path) -> None:
    chains = chains_of(out)
    scores = bench_page.normalised(chains)
    assert scores["random"][0] == pytest.approx(0.0, abs=1e-9)
    assert scores["expert"][0] == pytest.approx(1.0, abs=1e-9)
    assert scores["imagination"][0] == pytest.approx(25.5 / 40, abs=0.03)
    low, high = scores["imagination"][1:]
    assert low < scores["imagination"][0] < high
    assert set(bench_page.normalised(chains, 1)) >= {"random", "wm_bc", "expert"}


def test_the_page_has_every_policy_and_says_what_is_missing(out: Path) -> None:
    path = write(out, replace(FOUND, seeds=3), ("push", "arm"))
    assert path is not None
    text = path.read_text()
    assert "| after imagination training | 0.6" in text
    assert "chains of push (2 of 3), arm (0 of 3)" in text
    text = write(out, replace(FOUND, scratch_steps=10_000, model="nano")).read_text()
    assert "one agent, chosen by task" in text
    assert "`latency=100`" in text
    line = next(line for line in text.splitlines() if "`latency=100`" in line)
    assert "-4.0" in line or "-3.9" in line or "-4.1" in line
    assert "CEM planning in the world model" in text
    assert "1 of 2 runs failed one" in text
    assert "| push-0 | agent | reward correlation | 0.3 | >= 0.8 |" in text
    assert "**holds**: after imagination training is better than cloned on the world model" in text
    assert "\n## push, 2 full chains" in text
    kept = json.loads((out / "page" / "results.json").read_text())
    assert kept["chains"]["push"]["0"]["policies"]["random"]["return"]


def test_what_is_not_asked_for_any_more_is_not_on_the_page(out: Path) -> None:
    """After a --redo, rows of other disturbances and of more starts stood under the new heading."""
    text = write(out, replace(FOUND, disturb=("noise=0.1",))).read_text()
    assert "latency=100" not in text
    assert write(out, replace(FOUND, eval_episodes=10)) is None


def test_chains_of_other_settings_are_not_on_the_page(out: Path) -> None:
    """A fourth seed at twice the training made a page of four full chains at twice the training."""
    note(out, ["push-0/data", "push-0/policies"])
    old = json.loads((out / "stages.json").read_text())
    note(out, ["push-1/data", "push-1/policies"], larger := replace(FOUND, scale=1.0))
    put(out / "stages.json", old | json.loads((out / "stages.json").read_text()))
    text = bench_page.write_page(out, ("push",), larger, keys_of(larger)).read_text()
    assert "\n## push, 1 of 2 chains" in text
    assert "**Not complete**: chains of push (1 of 2)" in text
    assert "**holds**" not in text
    assert "| push-1/policies | 1:00 |" in text
    assert "push-0/policies" not in text


def test_the_page_says_of_how_many_chains_a_disturbance_is(out: Path) -> None:
    """A row of one chain of three stood under a caption that promised an interval over seeds."""
    (out / "push-1" / "run" / "eval-latency-100.json").unlink()
    left = {"push-1/disturbed", "push-1/tidy", "push-0/planner", "push-1/planner"}
    note(out, [name for name in keys_of(FOUND) if name not in left])
    text = write(out).read_text()
    line = next(line for line in text.splitlines() if "`latency=100`" in line)
    assert line.count(", 1 of 2 chains") == 3
    assert "**Not complete**: of the stages are left 2 x planner, 1 x disturbed." in text


def test_a_chain_that_is_not_finished_is_not_counted_as_one(out: Path) -> None:
    """Policies are written one by one, and a chain with two of them counted as complete."""
    note(out, ["push-0/policies"])
    path = out / "push-1" / "run" / "eval.json"
    found = json.loads(path.read_text())
    del found["policies"]["imagination"]
    put(path, found)
    text = write(out).read_text()
    assert "**Not complete**: chains of push (1 of 2)" in text
    cell = next(line for line in text.splitlines() if line.startswith("| after imagination training | 0."))
    assert "1 of 2 chains" in cell
    assert "**open**: after imagination training is better than cloned on the world model (1 of 2" in text
    assert "closes a third of the gap" not in text
    text = write(out, replace(FOUND, seeds=3)).read_text()
    assert "\n## push, 2 of 3 chains" in text
    assert "**holds**" not in text


def test_what_drove_other_starts_is_not_on_the_page(out: Path) -> None:
    """A folder of an older bench keeps its eval.json until every policy drove again."""
    path = out / "push-0" / "run" / "eval.json"
    put(path, json.loads(path.read_text()) | {"seeds": [1_000_000, 1_000_019]})
    assert set(chains_of(out)) == {"1"}
    put(path, json.loads(path.read_text()) | {"seeds": [bench_page.FIRST, bench_page.FIRST + 19]})
    assert set(chains_of(out)) == {"0", "1"}


@pytest.mark.parametrize(("steps", "word"), [(10_000, "**holds**"), (1500, "**open**")])
def test_claims_against_baselines_with_less_compute_are_not_judged(out: Path, steps: int, word: str) -> None:
    text = write(out, replace(FOUND, scratch_steps=steps, model="nano")).read_text()
    assert f"{word}: cloned on the world model is better than VPT style" in text
    assert "**holds**: after imagination training is better than cloned on the world model" in text


def test_a_task_that_the_expert_did_not_get_has_no_scores(out: Path) -> None:
    """With more tasks than episodes of the expert the page was made of warnings and nan."""
    chains = chains_of(out)
    assert bench_page.normalised(chains, 2) == {}
    assert PRESETS["toy"].expert_episodes >= 3  # of the walker's tasks


def test_scores_know_how_few_seeds_are(out: Path) -> None:
    """Intervals of the first table were those of a bootstrap of two seeds."""
    chains = chains_of(out)
    mean, low, high = bench_page.normalised(chains)["imagination"]
    means = [np.mean(chains[s]["policies"]["imagination"]["return"]) / 40 for s in chains]
    assert high - low >= 0.99 * 12.7 * abs(means[0] - means[1])
    assert mean == pytest.approx(np.mean(means) - 5 / 40, abs=0.03)


def test_logs_that_are_the_same_in_every_chain_are_no_more_episodes(out: Path) -> None:
    """In worlds with events the log mix is driven on the shared starts, which three chains counted thrice."""
    chains = chains_of(out)
    one = bench_page.normalised({"0": chains["0"]})["data"]
    same = {s: run | {"policies": run["policies"] | {"data": chains["0"]["policies"]["data"]}}
            for s, run in chains.items()}  # fmt: skip
    many = bench_page.normalised(same)["data"]
    assert many[2] - many[1] == pytest.approx(one[2] - one[1], rel=0.15)


def test_the_page_names_the_versions_that_it_was_made_with(out: Path, monkeypatch, capsys) -> None:
    """Pictures are not the same in all of MuJoCo's, and of d4 in between nobody knew."""
    monkeypatch.setattr("d4_core.checkpoint.origin", lambda: {"commit": "abc"})
    for number in ("3.9.0", "3.9.0", "4.0.0"):
        monkeypatch.setattr(bench, "version", lambda name, number=number: number)
        assert "warning" not in capsys.readouterr().err
        bench._note_versions(out)
    said = capsys.readouterr().err
    assert "was begun with MuJoCo 3.9.0 and this is 4.0.0" in said
    assert "d4" not in said.replace(str(out), "")
    text = write(out).read_text()
    assert "**Several versions**: worlds may have changed. MuJoCo 3.9.0, 4.0.0." in text
    assert "\nd4 abc.\n" in text


def test_nothing_is_written_without_results(tmp_path: Path) -> None:
    assert bench_page.write_page(tmp_path, ("push",), FOUND, {}) is None
    assert list(tmp_path.iterdir()) == []


def test_an_expert_that_is_no_better_than_random_normalises_nothing(out: Path) -> None:
    ends = {"random": row(5.0, 9), "expert": row(4.0, 9, 8)}
    put(out / "reference" / "push" / "eval.json", {"policies": ends, "task_names": TASKS})
    path = write(out)
    assert path is not None
    assert "Normalised scores" not in path.read_text()
    assert f"**Not normalised**: in {', '.join(TASKS)} the expert drove no start" in path.read_text()


def test_a_task_without_an_expert_costs_the_others_nothing(out: Path) -> None:
    """One task in which the expert was no better than random took the scores of the whole world."""
    ends = {"random": row(5.0, 9), "expert": row(45.0, 9, 8)}
    expert = ends["expert"]
    expert["return"] = [r if t else 0.0 for r, t in zip(expert["return"], expert["task"], strict=True)]
    put(out / "reference" / "push" / "eval.json", {"policies": ends, "task_names": TASKS, "seeds": STARTS})
    text = write(out).read_text()
    assert f"**Not normalised**: in {TASKS[0]} the expert drove no start" in text
    chains = chains_of(out)
    assert bench_page.normalised(chains, 0) == {}
    assert bench_page.normalised(chains)["expert"][0] == pytest.approx(1.0, abs=1e-9)
    assert bench_page.normalised(chains)["wm_bc"] == bench_page.normalised(chains, 1)["wm_bc"]


def test_a_planner_with_another_mix_of_tasks_is_scored_between_the_ends_of_each(out: Path) -> None:
    """The expert's own returns came out above 1 where it had driven the easy task more often."""
    ends = {"random": row(5.0, 9), "expert": row(45.0, 9, 8)}
    for kind in ends.values():  # task 1 pays ten times as much
        kind["return"] = [r * (10 if t else 1) for r, t in zip(kind["return"], kind["task"], strict=True)]
    put(out / "reference/push/eval.json", {"policies": ends, "task_names": TASKS, "seeds": STARTS})
    path = out / "push-0" / "run" / "eval.json"
    found = json.loads(path.read_text())
    returns, task = (np.array(ends["expert"][key]) for key in ("return", "task"))
    best = [float(returns[task == t].mean()) for t in (0, 1, 0)]
    low = float(np.mean([r for r, t in zip(ends["random"]["return"], task, strict=False) if t == 0]))
    for third in (best[2], low):  # the third start would make the first task count twice
        three = {"success": [1] * 3, "fallen": [0] * 3, "task": [0, 1, 0]}
        found["policies"]["planner"] = three | {"return": [*best[:2], third]}
        put(path, found)
        np.testing.assert_allclose(bench_page.scores(chains_of(out), "planner")["0"], 1.0)
        assert bench_page.normalised({"0": chains_of(out)["0"]})["planner"][0] == pytest.approx(1.0)


def test_world_models_that_failed_gates_are_named_beside_the_claims(out: Path) -> None:
    gate = {"name": "probe of puck", "value": 0.9, "op": "<=", "limit": 0.2, "ok": False}
    put(out / "push-1" / "run" / "gates.json", {"tokenizer": [gate]})
    text = write(out).read_text()
    assert (
        "**World models that failed gates** are behind 1 of these 2 chains (seed 1: probe of puck)." in text
    )


def test_a_planner_that_met_one_of_two_tasks_is_no_warning(out: Path) -> None:
    """Its score in the other one was the mean of nothing, which NumPy said at every page."""
    path = out / "push-0" / "run" / "eval.json"
    found = json.loads(path.read_text())
    for seed in range(2):
        found["policies"]["planner"] = row(25.0, seed, 2) | {"task": [0], "return": [25.0], "success": [0]}
        put(out / f"push-{seed}" / "run" / "eval.json", found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = Path(write(out) or "").read_text()
    assert "one agent, chosen by task" in text


def test_results_that_were_damaged_on_disk_are_one_sentence(out: Path) -> None:
    (out / "push-0" / "run" / "gates.json").write_text("{")
    with pytest.raises(UserError, match=r"push-0/run/gates\.json is damaged"):
        write(out)
