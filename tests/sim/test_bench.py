"""d4-sim bench: its plan, and its runner with commands that only pretend to work."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim import bench, chains, measure, reference, stages
from d4_sim.bench import PRESETS, SUITES, Args, Shape, Size, own_keys, plan
from d4_sim.chains import PHASES
from d4_sim.lanes import Runner
from d4_sim.stages import Stage, keys
from d4_sim.world import contract_of, world_names

OUT = Path("out")
SIZE = replace(PRESETS["toy"], seeds=2)


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
    assert Args(suite=("push-128", "push")).worlds == ("push_128", "push")
    with pytest.raises(UserError, match="pictures of 77 pixels"):
        own_keys(Args(suite=("push_77",)))
    with pytest.raises(UserError, match=r"'push\+noise=-1' is neither .*: what is done to a world"):
        _ = Args(suite=("push+noise=-1",)).worlds
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


def test_baselines_have_the_same_compute_and_are_driven_with_what_was_trained() -> None:
    planned = {s.name: s for s in plan(Shape(out=OUT, size=replace(SIZE, scale=0.5)), ("push",))}
    assert option(planned["push-0/baselines"], "--policies") == ["bc_scratch", "bc_early", "vpt"]
    assert option(planned["push-0/baselines"], "--steps") == ["10000", "10000", "5000"]
    assert option(planned["push-0/policies"], "--scratch-steps") == ["20000", "10000"]
    assert planned["push-0/baselines"].needs == ("push-0/tokenizer",)
    assert "push-0/baselines" in planned["push-0/policies"].needs


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


def test_a_finished_bench_needs_no_space(tmp_path: Path, monkeypatch) -> None:
    """It was refused on a disk that had become full, and its page could not be written again."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    shape = Shape(out=tmp_path, size=replace(SIZE, frames=10_000))
    bench._require_space(shape, [])
    bench._require_space(shape, ["push/reference"])
    with pytest.raises(UserError, match=r"about 0.5 GB are needed"):
        bench._require_space(shape, ["push-0/policies", "push-0/tidy"])
    (tmp_path / "push-0").mkdir()
    with (tmp_path / "push-0" / "bags").open("wb") as file:
        file.truncate(10**9)
    bench._require_space(shape, ["push-0/policies"])


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


def test_nothing_is_planned_in_the_world_model_where_commands_are_classes() -> None:
    """Every chain of Crafter would have failed at that stage, hours later, and kept its gigabytes."""
    names = {s.name for s in plan(Shape(out=OUT, size=Size(seeds=1)), ("push", "crafter"))}
    assert {"push-0/planner", "crafter-0/tidy"} <= names
    assert "crafter-0/planner" not in names


def test_a_bench_is_the_same_in_another_folder_and_on_more_cores(monkeypatch) -> None:
    """Or a finished night would be redone after its folder was moved."""
    args = Args(suite=("push",), out=Path("here"), jobs=2)
    found = own_keys(args)
    monkeypatch.setattr("d4_sim.bench.threads.free_cores", lambda: 16)
    assert own_keys(replace(args, out=Path("there/else"), jobs="auto")) == found
    other = own_keys(replace(args, frames=77))
    assert all(other[name] != key for name, key in found.items() if name != "push/reference")


def test_another_report_of_the_same_name_is_driven_anew(tmp_path) -> None:
    report = tmp_path / "latency.json"
    found = []
    for text in ("{}", "[]"):
        report.write_text(text)
        found.append(own_keys(Args(suite=("push",), disturb=(f"latency={report}",))))
    changed = {name for name in found[0] if found[0][name] != found[1][name]}
    assert {name.partition("/")[2] for name in changed} == {"disturbed", "tidy"}


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


def test_redoing_a_part_leaves_the_other_chains_alone(tmp_path, monkeypatch) -> None:
    """`--redo --only push-0` removed the recordings and runs of all chains and made push-0's again."""
    fake(tmp_path, monkeypatch, "")
    made = [tmp_path / "bags0", tmp_path / "bags1"]
    todo = [replace(stage, makes=(path,)) for stage, path in zip(works(1, 1), made, strict=True)]
    assert Runner(tmp_path / "out", todo, keys(todo), jobs=1).run() == 0
    for path in made:
        path.mkdir()
    other = [replace(stage, recipe="other") for stage in todo]
    runner = Runner(tmp_path / "out", other, keys(other), jobs=1, only=("s0",), redo=True)
    assert runner.run() == 0
    assert [path.is_dir() for path in made] == [False, True]
    assert [runner.state.is_done(name) for name in ("s0", "s1")] == [True, False]
    assert Runner(tmp_path / "out", todo, keys(todo), jobs=1, only=("s1",)).state.is_done("s1")


def test_what_needs_a_cleared_stage_is_not_done_with_the_old_settings_either(tmp_path, monkeypatch) -> None:
    """A run folder with a tokenizer alone counted as a whole chain after a change there and back."""
    fake(tmp_path, monkeypatch, "")
    first, second, other = works(1, 1, 1)
    todo = [first, replace(second, needs=("s0",)), other]
    changed = [replace(first, recipe="other"), *todo[1:]]
    assert Runner(tmp_path / "out", todo, keys(todo), jobs=1).run() == 0
    only = Runner(tmp_path / "out", changed, keys(changed), jobs=1, only=("s0",), redo=True)
    assert only.run() == 0
    assert only.missing == ["s1"]
    back = Runner(tmp_path / "out", todo, keys(todo), jobs=1, redo=True)
    assert back.missing == ["s0", "s1"]
    assert back.run() == 0
    assert (tmp_path / "out" / "logs" / "s1.log").read_text().count("$ work s1") == 2


def test_what_was_made_of_what_is_cleared_goes_with_it(tmp_path, monkeypatch) -> None:
    """After `--labelled 0.5 --only push-0/data --redo` the page showed policies of the old data."""
    fake(tmp_path, monkeypatch, "")
    run, found = tmp_path / "run", tmp_path / "eval.json"
    first, second, third = works(1, 1, 1)
    todo = [first, replace(second, needs=("s0",), makes=(run,), keeps=True),
            replace(third, needs=("s1",), makes=(found,))]  # fmt: skip
    assert Runner(tmp_path / "out", todo, keys(todo), jobs=1).run() == 0
    run.mkdir()
    found.write_text("{}")
    other = [replace(first, recipe="other"), *todo[1:]]
    assert Runner(tmp_path / "out", other, keys(other), jobs=1, only=("s0",), redo=True).run() == 0
    assert [path.exists() for path in (run, tmp_path / "run.previous", found)] == [False, True, False]


def test_a_part_of_a_name_is_no_other_world() -> None:
    """`--only arm --redo` cleared the recordings of arm_push away."""
    names = ["arm-0/data", "arm-1/run", "arm/reference", "arm_push-0/data", "push-10/data", "push-1/data"]
    assert [name for name in names if stages.is_named(name, ("arm",))] == names[:3]
    assert [name for name in names if stages.is_named(name, ("push-1", "arm-0/data"))] == [names[0], names[5]]
    assert [name for name in names if stages.is_named(name, ())] == names


def test_settings_that_cost_nothing_leave_the_compute_equal() -> None:
    """With the motion weight that a failed gate asks for, no claim against a baseline was judged."""
    assert Size(set=("motion_weight=4.0", "mask_max=0.5")).is_equal
    assert Size(set=("num_latents=16",)).is_equal  # 5 % more, and there are 14 to spare
    assert not Size(set=("dynamics_training.steps=6000",)).is_equal
    assert not Size(model="small").is_equal
    assert PRESETS["night"].is_equal
    assert not replace(PRESETS["night"], scratch_steps=10_000).is_equal


def test_a_stage_whose_needs_are_left_out_is_named(tmp_path, monkeypatch, capsys) -> None:
    """`--only push-0/policies` before there was a run ended at once, as if all were done."""
    fake(tmp_path, monkeypatch, "")
    first, second = works(1, 1)
    todo = [first, replace(second, needs=("s0",))]
    assert Runner(tmp_path / "out", todo, keys(todo), jobs=1, only=("s1",)).run() == 1
    assert "s1 needs s0, which --only leaves out" in capsys.readouterr().out
    assert Runner(tmp_path / "out", todo, keys(todo), jobs=1).run() == 0


def test_what_a_killed_run_had_begun_is_known_to_be_of_other_settings(tmp_path, monkeypatch) -> None:
    """Nothing was noted before a stage ended, so that d4-record met a recording of other settings."""
    fake(tmp_path, monkeypatch, "import pathlib; print(pathlib.Path('stages.json').read_text())")
    todo = works(1)
    monkeypatch.chdir(tmp_path)
    assert Runner(tmp_path, todo, keys(todo), jobs=1).run() == 0
    seen = json.loads((tmp_path / "logs" / "s0.log").read_text().partition("\n")[2])
    assert seen["s0"] == {"key": keys(todo)["s0"], "done": False, "forced": True, "seconds": 0.0}


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


def test_a_run_that_is_gone_is_said(tmp_path, monkeypatch) -> None:
    """Its page said that there was nothing yet, and the command that all was well."""
    run = tmp_path / "run"
    fake(tmp_path, monkeypatch, f"import os; os.makedirs({str(run)!r}, exist_ok=True)")
    todo = [replace(works(1)[0], makes=(run,), keeps=True)]
    assert Runner(tmp_path, todo, keys(todo), jobs=1).run() == 0
    run.rmdir()
    with pytest.raises(
        UserError, match=r"run is gone, though it was finished: restore it, or give another --"
    ):
        Runner(tmp_path, todo, keys(todo), jobs=1).run()


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
    assert Args(suite=("push",), **asked).size == replace(PRESETS["night"], **asked)


def test_another_contract_of_a_world_makes_its_stages_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A night went on, half in one world and half in another, after its latency had been edited."""
    before = keys(plan(Shape(out=OUT, size=SIZE), ("push", "arm")))
    slow = replace(contract_of("push"), latency_ms=80.0)
    for module in (bench, chains):
        monkeypatch.setattr(module, "contract_of", lambda name: slow if name == "push" else contract_of(name))
    after = keys(plan(Shape(out=OUT, size=SIZE), ("push", "arm")))
    changed = {name.split("-")[0].split("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"push"}
    assert all(before[name] != after[name] for name in before if name.startswith("push"))
