"""d4-sim bench: its plan, its runner with commands that only pretend to work, its page on made-up results."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim import bench, bench_page, measure, reference, stages
from d4_sim.bench import PRESETS, SUITES, Args, Shape, Size, plan
from d4_sim.chains import PHASES
from d4_sim.lanes import Runner
from d4_sim.stages import Stage, keys
from d4_sim.world import world_names

OUT = Path("out")
SIZE = replace(PRESETS["toy"], seeds=2)
TASKS = ["push", "reach"]


def option(stage: Stage, flag: str) -> list[str]:
    return [c[c.index(flag) + 1] for c in stage.commands if flag in c]


# ---- plan


def test_suites_hold_worlds_that_exist_and_presets_too() -> None:
    for suite in SUITES.values():
        assert set(suite.worlds) <= set(world_names())
        assert suite.preset in PRESETS
    assert Args(suite=("h200",)).size == PRESETS["h200"]
    assert Args(suite=("push",)).size == PRESETS["night"]
    assert Args(suite=("h200",), preset="toy", seeds=2).size == SIZE
    assert PRESETS["h200"].minutes <= 25


def test_names_of_the_control_suite_may_have_hyphens_and_unknown_ones_are_one_sentence() -> None:
    assert Args(suite=("walker-walk", "push", "walker_walk")).worlds == ("walker_walk", "push")
    with pytest.raises(UserError, match=r"'walk' is neither a suite \(mujoco-small, .*\) nor a world \(yard"):
        _ = Args(suite=("walk",)).worlds


def test_every_stage_needs_only_what_is_planned_and_seeds_come_one_after_another() -> None:
    planned = plan(Shape(out=OUT, size=SIZE), ("push", "arm"))
    names = [s.name for s in planned]
    assert len(set(names)) == len(names)
    for i, stage in enumerate(planned):
        assert set(stage.needs) <= set(names[:i]), stage.name
    assert max(i for i, n in enumerate(names) if n.startswith(("push-0", "arm-0"))) < names.index(
        "push-1/data"
    )
    assert [n for n in names if n.endswith("/reference")] == ["push/reference", "arm/reference"]
    made = [path for s in planned for path in s.makes]
    assert len(set(made)) == len(made)


def test_a_chain_is_recorded_trained_and_judged_with_its_seed() -> None:
    planned = {s.name: s for s in plan(Shape(out=OUT, size=SIZE), ("push",))}
    for seed in (0, 1):
        data = planned[f"push-{seed}/data"]
        assert option(data, "--seed") == [str(seed)]
        assert option(data, "--episodes") == [str(round(SIZE.frames / 60))]
        phases = [option(planned[f"push-{seed}/{p}"], "--phases") for p in ("tokenizer", "imagination")]
        assert phases == [["tokenizer"], ["imagination"]]
        assert option(planned[f"push-{seed}/policies"], "--world") == ["push", "push"]
        again = planned[f"push-{seed}/disturbed"].commands
        assert [c[c.index("--disturb") + 1 : c.index("--disturb") + 3] for c in again] == [
            ("latency=100", "noise=0.1")
        ]
    assert option(planned["push/reference"], "--expert-episodes") == [str(SIZE.expert_episodes)]


def test_settings_reach_every_phase_and_are_a_part_of_its_key() -> None:
    size = replace(SIZE, set=("motion_weight=2.0",))
    planned = plan(Shape(out=OUT, size=size), ("push",))
    trained = [s for s in planned if s.commands[0][0] == "d4-train"]
    assert len(trained) == 4 * SIZE.seeds
    assert all(option(s, "--set") == ["motion_weight=2.0"] for s in trained)
    plain = keys(plan(Shape(out=OUT, size=SIZE), ("push",)))
    assert {n for n, k in keys(planned).items() if plain[n] == k} == {
        "push-0/data", "push-1/data", "push/reference",
    }  # fmt: skip


def test_keys_depend_on_sizes_and_neither_on_the_place_nor_on_the_machine() -> None:
    small, large = (
        Shape(out=OUT, size=SIZE, jobs=j, recorders=r, trainers=t) for j, r, t in ((1, 1, 1), (16, 4, 3))
    )
    a = keys(plan(Shape(out=OUT, size=SIZE), ("push",)))
    assert a != keys(plan(Shape(out=OUT, size=replace(SIZE, frames=800)), ("push",)))
    one, other = (plan(shape, ("push",)) for shape in (small, large))
    assert [s.name for s in one] == [s.name for s in other]
    assert {s.weight for s in one} == {1}
    assert {s.name: s.weight for s in other if s.weight > 1} == {
        "push/reference": 4, **{f"push-{k}/data": 4 for k in range(SIZE.seeds)},
        **{f"push-{k}/{phase}": 3 for k in range(SIZE.seeds) for phase in PHASES},
    }  # fmt: skip
    assert option(other[0], "--jobs") == ["4", "4"]


def test_bags_and_unpacked_frames_go_when_the_chain_is_done(tmp_path: Path) -> None:
    planned = {s.name: s for s in plan(Shape(out=OUT, size=SIZE), ("push",))}
    tidy = planned["push-0/tidy"]
    assert set(tidy.needs) == {"push-0/planner", "push-0/disturbed"}
    bare = replace(SIZE, planner_episodes=0, disturb=())
    planned = {s.name: s for s in plan(Shape(out=OUT, size=bare), ("push",))}
    assert planned["push-0/tidy"].needs == ("push-0/policies",)
    assert not any("tidy" in s.name for s in plan(Shape(out=OUT, size=SIZE, keep=True), ("push",)))
    for name in ("bags/a", "dataset/cache/b", "dataset/meta/c", "run/d"):
        (tmp_path / name).mkdir(parents=True)
    measure.tidy(measure.Tidy(place=tmp_path))
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert left == ["dataset", "dataset/meta", "dataset/meta/c", "run", "run/d"]


def test_a_disk_that_is_too_small_is_one_sentence_before_the_work(tmp_path: Path) -> None:
    args = Args(suite=("push",), preset="toy", frames=10**12, out=tmp_path)
    with pytest.raises(UserError, match=r"GB are needed in .* GB are free: free some space"):
        bench.bench(args)
    assert not (tmp_path / "stages.json").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"frames": 0}, "must be above 0"),
        ({"labelled": 0.0}, "--labelled 0 must be above 0"),
        ({"expert_episodes": 5}, "give them no more episodes"),
        ({"jobs": 0}, "--jobs 0 must be at least 1"),
        ({"suite": ()}, "name a suite"),
        ({"scratch_steps": 0}, "must be above 0"),
        ({"disturb": ("wind=3",)}, "'wind=3' is no disturbance"),
        ({"set": ("nonsense=3",)}, "nonsense"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_at_once(tmp_path, changes, sentence) -> None:
    args = Args(**{"suite": ("push",), "preset": "toy", "out": tmp_path / "out"} | changes)
    with pytest.raises(UserError, match=sentence):
        bench.bench(args)
    assert not (tmp_path / "out").exists()


def test_worlds_look_different_where_they_can() -> None:
    """No default row had other looks, which Crafter cannot have, or the latency of a measured run."""
    assert {"look=1", "latency=measured"} <= set(PRESETS["night"].disturb)
    assert "latency=measured" in PRESETS["h200"].disturb
    planned = {s.name: s for s in plan(Shape(out=OUT, size=Size(seeds=1)), ("push", "crafter"))}
    looks = {
        world: [c for c in planned[f"{world}-0/disturbed"].commands if "look=1" in c]
        for world in ("push", "crafter")
    }
    assert [len(found) for found in looks.values()] == [1, 0]
    assert len(planned["crafter-0/disturbed"].commands) == len(Size().disturb) - 1


# ---- runner


def test_a_name_that_begins_no_stage_is_said(tmp_path) -> None:
    """`--only zzz` ended with "nothing for a page yet" and without an error."""
    todo = works(1, 1)
    Runner(tmp_path / "out", todo, keys(todo), jobs=1, only=("s1",))
    with pytest.raises(UserError, match="--only zzz begins no stage: they are s0, s1"):
        Runner(tmp_path / "none", todo, keys(todo), jobs=1, only=("s1", "zzz"))
    assert not (tmp_path / "none").exists()


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (tmp_path / "fake_work.py").write_text(f"import os, signal, sys, time\nname = sys.argv[1]\n{code}\n")
    monkeypatch.setitem(stages.MODULES, "work", "fake_work")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def works(*weights: int) -> list[Stage]:
    return [
        Stage(f"s{i}", "work", (("work", f"s{i}"),), (), (), 1.0, weight=w) for i, w in enumerate(weights)
    ]


def test_heavy_stages_get_their_slots_and_too_heavy_ones_run_alone(tmp_path, monkeypatch) -> None:
    log = tmp_path / "log"
    fake(
        tmp_path,
        monkeypatch,
        f"""
def say(what):
    with open({str(log)!r}, "a") as f: f.write(what + name + chr(10))
say("+"); time.sleep(0.3); say("-")""",
    )
    todo = works(2, 1, 9)
    runner = Runner(tmp_path / "out", todo, keys(todo), jobs=3)
    assert runner.run() == 0
    lines = log.read_text().split()
    assert set(lines[:2]) == {"+s0", "+s1"}
    assert lines[-2:] == ["+s2", "-s2"]


def test_a_bench_stops_in_time_and_goes_on_later(tmp_path, monkeypatch) -> None:
    fake(tmp_path, monkeypatch, "time.sleep(30 if name == 's1' else 0)")
    todo = works(1, 1)
    began = time.monotonic()
    runner = Runner(tmp_path / "out", todo, keys(todo), jobs=1, seconds=3)
    assert runner.run() == 0
    assert time.monotonic() - began < 15
    assert runner.state.is_done("s0")
    assert not runner.state.is_done("s1")
    fake(tmp_path, monkeypatch, "")
    again = Runner(tmp_path / "out", todo, keys(todo), jobs=1)
    assert again.run() == 0
    assert again.state.is_done("s1")


def test_what_other_arguments_made_is_cleared_away_only_if_asked(tmp_path, monkeypatch) -> None:
    """A mistyped --frames after a night took the recordings of every chain, without a word."""
    fake(tmp_path, monkeypatch, "")
    made = tmp_path / "bags"
    todo = [replace(works(1)[0], makes=(made,))]
    assert Runner(tmp_path / "out", todo, keys(todo), jobs=1).run() == 0
    made.mkdir()
    other = [replace(todo[0], recipe="other")]
    with pytest.raises(UserError, match=r"made with other arguments or settings: s0\. Give another --out"):
        Runner(tmp_path / "out", other, keys(other), jobs=1).run()
    assert made.is_dir()
    assert Runner(tmp_path / "out", other, keys(other), jobs=1, redo=True).run() == 0
    assert not made.exists()


def test_a_stage_that_does_not_leave_is_ended(tmp_path, monkeypatch) -> None:
    """It was waited for without end, and the page and the other stages with it."""
    code = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(tmp_path)!r} + "/pid-" + name, "w").write(str(os.getpid()))
time.sleep(60)"""
    fake(tmp_path, monkeypatch, code)
    monkeypatch.setattr("d4_sim.lanes._LEAVE_S", 0.5)
    todo, began = works(1, 1), time.monotonic()
    assert Runner(tmp_path / "out", todo, keys(todo), jobs=2, seconds=3).run() == 0
    assert time.monotonic() - began < 15
    pids = [int((tmp_path / f"pid-s{k}").read_text()) for k in range(2)]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("trouble", ["another run", "other settings"])
def test_a_run_that_is_refused_writes_nothing(tmp_path, monkeypatch, trouble) -> None:
    """The page of the results that it refused to touch was overwritten."""
    fake(tmp_path, monkeypatch, "")
    out, todo, called = tmp_path / "out", works(1), []
    wraps = {"prepare": lambda: called.append("prepare"), "report": lambda: called.append("report")}
    assert Runner(out, todo, keys(todo), jobs=1, **wraps).run() == 0
    assert called == ["prepare", "report"]
    other = [replace(todo[0], recipe="other")] if trouble == "other settings" else todo
    hold = stages.alone(out) if trouble == "another run" else contextlib.nullcontext()
    with hold, pytest.raises(UserError):
        Runner(out, other, keys(other), jobs=1, **wraps).run()
    assert called == ["prepare", "report"]


def test_two_runs_in_one_folder_do_not_overwrite_each_others_notes(tmp_path) -> None:
    todo = works(1)
    runner = Runner(tmp_path, todo, keys(todo), jobs=1)
    with stages.alone(tmp_path), pytest.raises(UserError, match="another run works in"):
        runner.run()


# ---- page


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
    put(tmp_path / "reference" / "push" / "eval.json", {"policies": ends, "task_names": TASKS})
    for seed in range(2):
        run = tmp_path / f"push-{seed}" / "run"
        policies = {name: row(level + seed, seed) for name, level in LEVELS.items()}
        put(run / "eval.json", {"policies": policies | {"planner": row(25.0, seed, 4)}, "world": "push"})
        gate = {"name": "reward correlation", "value": 0.3, "op": ">=", "limit": 0.8, "ok": bool(seed)}
        put(run / "gates.json", {"agent": [gate]})
        late = {name: row(LEVELS[name] + seed - 4, seed) for name in bench_page.DISTURBED}
        put(run / "eval-latency-100.json", {"policies": late, "world": "push+latency=100"})
    stages = ("push-0/data", "push-0/policies", "push-1/policies")
    put(tmp_path / "stages.json", {s: {"done": True, "seconds": 60.0, "forced": True} for s in stages})
    return tmp_path


def test_scores_are_normalised_between_random_and_expert(out: Path) -> None:
    chains = bench_page.collect(out, ("push",), 2)["chains"]["push"]
    scores = bench_page.normalised(chains)
    assert scores["random"][0] == pytest.approx(0.0, abs=1e-9)
    assert scores["expert"][0] == pytest.approx(1.0, abs=1e-9)
    assert scores["imagination"][0] == pytest.approx(25.5 / 40, abs=0.03)
    low, high = scores["imagination"][1:]
    assert low < scores["imagination"][0] < high
    assert set(bench_page.normalised(chains, 1)) >= {"random", "wm_bc", "expert"}


def test_the_page_has_every_policy_and_says_what_is_missing(out: Path) -> None:
    path = bench_page.write_page(out, ("push", "arm"), replace(SIZE, seeds=3))
    assert path is not None
    text = path.read_text()
    assert "| after imagination training | 0.6" in text
    assert "chains of push (2 of 3), arm (0 of 3)" in text
    text = bench_page.write_page(
        out, ("push",), replace(SIZE, scratch_steps=10_000, model="nano")
    ).read_text()
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


def test_a_chain_that_is_not_finished_is_not_counted_as_one(out: Path) -> None:
    """Policies are written one by one, and a chain with two of them counted as complete."""
    stages = {f"push-{s}/policies": {"done": s == 0, "seconds": 9.0, "forced": True} for s in range(2)}
    put(out / "stages.json", stages)
    path = out / "push-1" / "run" / "eval.json"
    found = json.loads(path.read_text())
    del found["policies"]["imagination"]
    put(path, found)
    text = bench_page.write_page(out, ("push",), SIZE).read_text()
    assert "**Not complete**: chains of push (1 of 2)" in text
    cell = next(line for line in text.splitlines() if line.startswith("| after imagination training | 0."))
    assert "1 of 2 chains" in cell
    assert "**open**: after imagination training is better than cloned on the world model (1 of 2" in text
    assert "closes a third of the gap" not in text
    text = bench_page.write_page(out, ("push",), replace(SIZE, seeds=3)).read_text()
    assert "\n## push, 2 of 3 chains" in text
    assert "**holds**" not in text


def test_what_drove_other_starts_is_not_on_the_page(out: Path) -> None:
    """A folder of an older bench keeps its eval.json until every policy drove again."""
    path = out / "push-0" / "run" / "eval.json"
    put(path, json.loads(path.read_text()) | {"seeds": [1_000_000, 1_000_019]})
    assert set(bench_page.collect(out, ("push",), 2)["chains"]["push"]) == {"1"}
    put(path, json.loads(path.read_text()) | {"seeds": [bench_page.FIRST, bench_page.FIRST + 19]})
    assert set(bench_page.collect(out, ("push",), 2)["chains"]["push"]) == {"0", "1"}


def test_baselines_have_the_same_compute_and_are_driven_with_what_was_trained() -> None:
    planned = {s.name: s for s in plan(Shape(out=OUT, size=replace(SIZE, scale=0.5)), ("push",))}
    assert option(planned["push-0/baselines"], "--policies") == ["bc_scratch", "vpt"]
    assert option(planned["push-0/baselines"], "--steps") == ["10000", "5000"]
    assert option(planned["push-0/policies"], "--scratch-steps") == ["20000", "10000"]
    assert planned["push-0/baselines"].needs == ("push-0/tokenizer",)
    assert "push-0/baselines" in planned["push-0/policies"].needs


@pytest.mark.parametrize(("steps", "word"), [(10_000, "**holds**"), (1500, "**open**")])
def test_claims_against_baselines_with_less_compute_are_not_judged(out: Path, steps: int, word: str) -> None:
    text = bench_page.write_page(out, ("push",), replace(SIZE, scratch_steps=steps, model="nano")).read_text()
    assert f"{word}: cloned on the world model is better than VPT style" in text
    assert "**holds**: after imagination training is better than cloned on the world model" in text


def test_scores_know_how_few_seeds_are(out: Path) -> None:
    """Intervals of the first table were those of a bootstrap of two seeds."""
    chains = bench_page.collect(out, ("push",), 2)["chains"]["push"]
    mean, low, high = bench_page.normalised(chains)["imagination"]
    means = [np.mean(chains[s]["policies"]["imagination"]["return"]) / 40 for s in chains]
    assert high - low >= 0.99 * 12.7 * abs(means[0] - means[1])
    assert mean == pytest.approx(np.mean(means) - 5 / 40, abs=0.03)


def test_logs_that_are_the_same_in_every_chain_are_no_more_episodes(out: Path) -> None:
    """In worlds with events the log mix is driven on the shared starts, which three chains counted thrice."""
    chains = bench_page.collect(out, ("push",), 2)["chains"]["push"]
    one = bench_page.normalised({"0": chains["0"]})["data"]
    same = {s: run | {"policies": run["policies"] | {"data": chains["0"]["policies"]["data"]}}
            for s, run in chains.items()}  # fmt: skip
    many = bench_page.normalised(same)["data"]
    assert many[2] - many[1] == pytest.approx(one[2] - one[1], rel=0.15)


def test_the_page_names_the_versions_of_mujoco(out: Path, monkeypatch, capsys) -> None:
    """Pictures are not the same in all of them: record, train and judge with one."""
    for number in ("3.9.0", "3.9.0", "4.0.0"):
        monkeypatch.setattr(bench, "version", lambda name, number=number: number)
        assert "warning" not in capsys.readouterr().err
        bench._note_mujoco(out)
    assert "was begun with MuJoCo 3.9.0 and this is 4.0.0" in capsys.readouterr().err
    text = bench_page.write_page(out, ("push",), SIZE).read_text()
    assert "MuJoCo 3.9.0, 4.0.0." in text
    assert "**Several versions of MuJoCo**" in text


def test_nothing_is_written_without_results(tmp_path: Path) -> None:
    assert bench_page.write_page(tmp_path, ("push",), SIZE) is None
    assert list(tmp_path.iterdir()) == []


def test_an_expert_that_is_no_better_than_random_normalises_nothing(out: Path) -> None:
    ends = {"random": row(5.0, 9), "expert": row(4.0, 9, 8)}
    put(out / "reference" / "push" / "eval.json", {"policies": ends, "task_names": TASKS})
    path = bench_page.write_page(out, ("push",), SIZE)
    assert path is not None
    assert "Normalised scores" not in path.read_text()


# ---- reference


def test_the_reference_does_not_depend_on_the_processes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK", 2)
    rows = []
    for jobs in (1, 2):
        args = reference.Args(
            world="push", out=tmp_path / str(jobs), episodes=4, expert_episodes=3, jobs=jobs
        )
        reference.reference(args)
        rows.append(json.loads((args.out / "eval.json").read_text())["policies"])
        assert (args.out / "media" / "real_expert.mp4").exists()
    for kind, count in (("random", 4), ("expert", 3)):
        assert rows[0][kind]["return"] == rows[1][kind]["return"]
        assert len(rows[0][kind]["return"]) == count
    assert np.mean(rows[0]["expert"]["return"]) > 4 * np.mean(rows[0]["random"]["return"])


def test_size_and_arguments_agree() -> None:
    asked = {"seeds": 1, "frames": 7, "model": "small", "minutes": 3.0}
    assert Args(suite=("push",), **asked).size == replace(Size(), **asked)
