"""Milestones under a ladder of prompts, the plan of the experiment, and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets.errors import UserError
from d4_sim.crafter import experiment, page
from d4_sim.crafter.milestones import LADDER, MILESTONES, Prompted, Watched, crafter_score, first_ticks
from d4_sim.crafter.page import STARTS
from d4_sim.crafter.world import CHAIN, SURVIVAL
from d4_sim.driver import ScriptedPolicy
from d4_sim.evaluate import first_start
from d4_sim.minecraft.game import Rung
from d4_sim.stages import MODULES, keys
from d4_sim.vector import run_episodes

ARGS = experiment.Args(out=Path("somewhere"), seeds=3)


# ---- milestones


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=20), st.data())
def test_first_ticks_are_the_first_ones(rows: list[list[int]], data) -> None:
    length = data.draw(st.integers(1, len(rows)))
    found = first_ticks(np.array(rows, np.float32), length)
    for k, tick in enumerate(found):
        events = [t for t in range(length) if rows[t][k] > 0]
        assert tick == (events[0] if events else None)


class Spy:
    """A session that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def reset(self, n: int, tasks: np.ndarray) -> None:
        self.asked.append(tasks.tolist())

    def ask(self, tasks: np.ndarray) -> None:
        self.asked.append(tasks.tolist())

    def act(self, images: np.ndarray, vectors: dict, alive: np.ndarray) -> np.ndarray:
        return np.zeros((len(alive), 1), np.float32)


def test_the_next_task_is_asked_for_when_enough_was_done() -> None:
    worlds = [SimpleNamespace(tasks=("a", "b", "c"), rewards=np.zeros(3, np.float32)) for _ in range(2)]
    spy = Spy()
    prompted = Prompted(spy, (Rung("b", 2), Rung("a", 1), Rung("c", None)))
    prompted.bind(worlds)
    alive = np.ones(2, bool)

    def tick(*rewards: list[float]) -> None:
        for world, reward in zip(worlds, rewards, strict=True):
            world.rewards = np.array(reward, np.float32)
        prompted.act(np.empty(0), {}, alive)

    prompted.reset(2, np.zeros(2))
    tick([0, 9, 0], [0, 9, 0])  # what comes with the first frame is nobody's doing
    tick([0, 1, 0], [1, 0, 0])
    assert spy.asked == [[1, 1]]
    tick([0, 1, 0], [1, 0, 0])
    assert spy.asked[1:] == [[0, 1]]
    alive[1] = False  # what a world that has ended shows for ever counts no more
    tick([1, 0, 0], [0, 5, 0])
    tick([0, 0, 1], [0, 5, 0])
    assert spy.asked[2:] == [[2, 1]]
    prompted.reset(2, np.zeros(2))
    assert spy.asked[-1] == [1, 1]


def test_a_session_that_cannot_be_asked_plays_all_the_same() -> None:
    class Deaf:
        def reset(self, n: int, tasks: np.ndarray) -> None:
            self.n = n

        def act(self, images: np.ndarray, vectors: dict, alive: np.ndarray) -> np.ndarray:
            return np.zeros((self.n, 1), np.float32)

    prompted = Prompted(Deaf(), (Rung("a", 1), Rung("b", None)))
    prompted.bind([SimpleNamespace(tasks=("a", "b"), rewards=np.ones(2, np.float32))])
    prompted.reset(1, np.zeros(1))
    for _ in range(3):
        assert prompted.act(np.empty(0), {}, np.ones(1, bool)).shape == (1, 1)


def test_the_ladder_leads_to_the_diamond_and_takes_what_the_recipes_take() -> None:
    constants = pytest.importorskip("crafter.constants", reason="the package crafter is not installed")
    assert (*CHAIN, *SURVIVAL) == MILESTONES
    assert [rung.task for rung in LADDER] == list(CHAIN)
    counts = {rung.task: rung.count for rung in LADDER}
    assert counts["collect_diamond"] is None
    made = [constants.make[f"{kind}_pickaxe"]["uses"] for kind in ("wood", "stone", "iron")]
    placed = [constants.place[bench]["uses"] for bench in ("table", "furnace")]
    for thing in ("wood", "stone", "coal", "iron"):
        assert counts[f"collect_{thing}"] == sum(uses.get(thing, 0) for uses in [*made, *placed])


def test_the_score_is_that_of_crafters_paper() -> None:
    """A geometric mean of the rates in per cent, each plus one."""
    assert crafter_score([0.0] * 22) == 0
    assert crafter_score([1.0] * 22) == pytest.approx(100)
    assert crafter_score([1.0] * 11 + [0.0] * 11) == pytest.approx(101**0.5 - 1)


def test_all_achievements_are_counted_episode_by_episode() -> None:
    """Nine of the 22 were known to nobody."""
    pytest.importorskip("crafter", reason="the package crafter is not installed")
    watched = Watched(ScriptedPolicy("expert", 0))
    batch = run_episodes("crafter", [1, 2], [9, 9], watched, 60)
    counted = watched.achievements()
    assert len(counted) == 22
    assert {*MILESTONES} < {*counted}
    for task, name in enumerate(MILESTONES):
        assert counted[name] == batch.reward[:, 1:, task].sum(1).tolist()


# ---- the plan


def test_every_seed_is_trained_on_the_one_recording() -> None:
    stages = {stage.name: stage for stage in experiment.plan(ARGS, 2)}
    assert next(iter(stages)) == "data/data"
    assert len(stages) == 1 + 3 * 7
    assert stages["data/data"].weight == 2
    for seed in range(3):
        chain = [stage for name, stage in stages.items() if name.startswith(f"seed-{seed}/")]
        assert [s.name.split("/")[1] for s in chain] == [
            "tokenizer", "dynamics", "agent", "imagination", "baselines", "tasks", "milestones",
        ]  # fmt: skip
        assert chain[0].needs == ("data/data",)
        for stage in chain[:4]:
            (words,) = stage.commands
            assert words[words.index("--seed") + 1] == str(seed)
            assert words[1] == "somewhere/data/dataset"
    assert all(words[0] in MODULES for stage in stages.values() for words in stage.commands)
    given = [s.name for s in stages.values() if "expert" in s.commands[-1]]
    assert given == ["seed-0/milestones"]  # what does not depend on training is played once


def test_another_seed_redoes_nothing_and_another_scale_everything_but_the_recording() -> None:
    one = keys(experiment.plan(ARGS, 1))
    other = keys(experiment.plan(replace(ARGS, seeds=1), 1))
    assert {name: key for name, key in one.items() if name in other} == other
    changed = keys(experiment.plan(replace(ARGS, scale=0.5), 1))
    assert {name for name in one if one[name] == changed[name]} == {"data/data"}


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"scale": 0.0}, {"labelled": 0.0}, {"jobs": 0}])
def test_unusable_settings_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict) -> None:
    args = replace(ARGS, out=tmp_path / "out", **wrong)
    with pytest.raises(UserError):
        experiment.experiment(args)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_before_the_work(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("crafter", reason="the package crafter is not installed")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(UserError, match=r"about 8.6 GB are needed in .* and 1.0 GB are free"):
        experiment.experiment(replace(ARGS, out=tmp_path))


# ---- the page


def write_run(out: Path, seed: int, policies: dict[str, list[int]]) -> None:
    """A milestones.json in which each policy reaches so many milestones in each of its episodes."""
    run = out / f"seed-{seed}" / "run"
    run.mkdir(parents=True)
    rows = {
        name: {
            "return": counts, "success": [0] * len(counts), "fallen": [1] * len(counts),
            "ticks": [100] * len(counts),
            "achievements": {"collect_wood": counts, "defeat_zombie": [0] * len(counts)},
            "first": [[10 * k if k < n else None for k in range(len(MILESTONES))] for n in counts],
        }
        for name, counts in policies.items()
    }  # fmt: skip
    first, count = first_start(STARTS), len(next(iter(policies.values())))
    found = {"policies": rows, "world": "crafter", "seeds": [first, first + count - 1]}
    (run / "milestones.json").write_text(json.dumps(found))
    done = [f"seed-{s}/milestones" for s in range(seed + 1)]
    (out / "done.json").write_text(json.dumps(done))


def write(args: experiment.Args) -> Path | None:
    """The page of what lies there, as if it had been made with these arguments."""
    known = experiment.own_keys(args)
    done = json.loads(path.read_text()) if (path := args.out / "done.json").exists() else []
    entries = {s: {"done": True, "seconds": 9.0, "key": known[s]} for s in done}
    (args.out / "stages.json").write_text(json.dumps(entries))
    return page.write_page(args.out, args, known)


def test_the_page_has_the_papers_table(tmp_path: Path) -> None:
    args = replace(ARGS, out=tmp_path, eval_episodes=4)
    assert write(args) is None
    for seed in range(2):
        rows = {"wm_bc": [1, 3, 3, 1], "imagination": [3, 3, 3, 1 + 2 * seed]}
        write_run(tmp_path, seed, rows | ({"expert": [10] * 4} if not seed else {}))
    path = write(args)
    assert path is not None
    lines = path.read_text().splitlines()
    assert "| milestone | WM+BC | imagination RL | expert |" in lines
    wood = next(line for line in lines if line.startswith("| collect_wood | 100"))
    assert wood.count("100.0 [51.0, 100.0]") == 3
    pickaxe = next(line for line in lines if line.startswith("| make_wood_pickaxe | 50"))
    assert "| 87.5 [" in pickaxe
    assert any("1 of 3 seeds are missing" in line for line in lines)
    diamond = [line for line in lines if line.startswith("| collect_diamond")]
    assert diamond[0] == "| collect_diamond | 0.0 [0.0, 49.0] | 0.0 [0.0, 49.0] | 100.0 [51.0, 100.0] |"
    assert diamond[1] == "| collect_diamond | - | - | 90 |"
    # nobody got there: the starts leave as much open for the difference as for the rates
    assert diamond[2].startswith("| collect_diamond | +0.0 [-49.0, +49.0]")
    assert "| defeat_zombie | 0.0 | 0.0 | 0.0 |" in lines
    assert "| **score** | 9.0 (9.0, 9.0) | 9.0 (9.0, 9.0) | 9.0 |" in lines
    assert "+37.5 [" in next(line for line in lines if line.startswith("| make_wood_pickaxe | +"))
    assert json.loads((tmp_path / "results.json").read_text())["ladder"]["1"]["policies"]["wm_bc"]


def test_results_on_other_starts_are_not_on_the_page(tmp_path: Path) -> None:
    """After a --redo with fewer starts the old rows stood under the new heading, and hid the new ones."""
    write_run(tmp_path, 0, {"wm_bc": [1, 3, 3, 1]})
    assert write(replace(ARGS, out=tmp_path, eval_episodes=3)) is None
    assert write(replace(ARGS, out=tmp_path, eval_episodes=4, world="crafter_peaceful")) is None
    assert write(replace(ARGS, out=tmp_path, eval_episodes=4)) is not None


def test_what_nobody_is_asked_for_is_no_step(tmp_path: Path) -> None:
    """Random play had 1.32 of the way to the diamond, of which 1.02 were cows, water and sleep."""
    write_run(tmp_path, 0, {"wm_bc": [1, 12]})
    row = json.loads((tmp_path / "seed-0/run/milestones.json").read_text())["policies"]["wm_bc"]
    assert page.steps(row).tolist() == [1, 10]
    row["first"] = [[None] * 10 + [3, 4, 5]]
    assert page.steps(row).tolist() == [0]


def test_chains_of_other_settings_are_not_on_the_page(tmp_path: Path) -> None:
    """`--scale 2 --redo --only seed-0` wrote "training x 2" over all three seeds."""
    args = replace(ARGS, out=tmp_path, eval_episodes=4, seeds=2)
    for seed in range(2):
        write_run(tmp_path, seed, {"wm_bc": [1, 3, 3, 1]})
    twice = "2.00 [0.16, 3.84] | 2.00 [0.16, 3.84]"
    assert f"| WM+BC | {twice} | 100 | 100.0 | 4 + 4 |" in write(args).read_text()
    other = replace(args, scale=2.0)
    known = experiment.own_keys(other)
    entries = json.loads((tmp_path / "stages.json").read_text())
    entries["seed-0/milestones"]["key"] = known["seed-0/milestones"]
    (tmp_path / "stages.json").write_text(json.dumps(entries))
    text = page.write_page(tmp_path, other, known).read_text()
    assert "**Not complete**: milestones of 1 of 2 seeds are missing" in text
    assert f"| WM+BC | {twice} | 100 | 100.0 | 4 |" in text


def rows(*reached: list[int]) -> dict[str, dict]:
    """Chains in which each start reached the first milestone (1) or did not (0)."""
    return {
        str(s): {"policies": {"a": {"first": [[tick] if tick else [None] for tick in each]}}}
        for s, each in enumerate(reached)
    }


def paired(*pairs: tuple[list[int], list[int]]) -> dict[str, dict]:
    firsts = [rows(a)["0"]["policies"] | {"b": rows(b)["0"]["policies"]["a"]} for a, b in pairs]
    return {str(s): {"policies": policies} for s, policies in enumerate(firsts)}


@pytest.mark.parametrize("share", [0.0, 0.04, 1.0])
def test_few_differences_are_no_certainty(share: float) -> None:
    """The same four of a hundred starts in each of three seeds had an interval without width."""
    count = round(100 * share)
    won = [1] * count + [0] * (100 - count)
    for seeds in (1, 3):
        mean, low, high = page.gain(paired(*[(won, [0] * 100)] * seeds), "a", "b", 0)
        assert mean == pytest.approx(100 * share)
        assert low <= max(mean - 3.6, -100)
        assert high >= min(mean + 3.6, 100)
    found = page.gain(paired(*[(won, [0] * 100)] * 2, ([0] * 100, [0] * 100)), "a", "b", 0)
    assert found[1] < 100 * share - 3.6 or not share  # one seed of three does not


def test_seeds_that_take_long_widen_the_time_to_a_milestone() -> None:
    """Seeds on the same starts counted as so many episodes: 202 [192, 212] where one came 120 ticks later."""
    quick, late = [160 + k % 5 for k in range(100)], [280 + k % 5 for k in range(100)]
    mean, low, high = page.ticks(rows(quick, quick, late), "a", 0)
    assert mean == pytest.approx(202)
    assert low < 164
    assert high > 280
    assert page.ticks(rows([0] * 300, [0] * 299 + [77]), "a", 0) == (77.0, 77.0, 77.0)  # once is told, too
    assert page.ticks(rows([0] * 3), "a", 0) is None


def test_the_page_tells_what_clones_know_and_what_they_cost(tmp_path: Path) -> None:
    run, first = tmp_path / "seed-0" / "run", first_start(STARTS)
    known = {"train": {"frames": 9, "nats": 0.021, "accuracy": 0.99},
             "held_out": {"frames": 9, "nats": 4.16, "accuracy": 0.447}}  # fmt: skip
    counts = {"success": [1] * 13 + [0] * 13, "task": list(range(13)) * 2, "return": [1.0] * 26}
    policies = {"bc_scratch": counts | {"clone": {"steps": 48, **known}}, "random": counts}
    found = {"policies": policies, "world": "crafter", "seeds": [first, first + 25]}
    for name, cpu_s in (("bc_scratch", 4734.4), ("vpt_idm", 1.0)):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text(json.dumps({"metrics": {"cpu_s": cpu_s}}))
    (run / "eval.json").write_text(json.dumps(found))
    meta = tmp_path / "data" / "dataset" / "meta"
    meta.mkdir(parents=True)
    (meta / "d4.json").write_text(json.dumps({"episodes": [{"labelled": k < 3} for k in range(30)]}))
    text = write(replace(ARGS, out=tmp_path, eval_episodes=26)).read_text()
    assert "| 0 | BC | 48 | 0.02 | 99 | 4.16 | 45 |" in text
    assert "| BC | 4734 |" in text
    assert "| VPT style | - |" in text
    assert "(3 of 30 pieces, 10.0%)" in text
    assert "Of 2 to 2 starts per task and seed" in text
    assert "| collect_wood | 50.0 [" in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_a_recording_to_the_page_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("crafter", reason="the package crafter is not installed")
    args = experiment.Args(
        out=tmp_path / "out", world="crafter_peaceful", seeds=1, episodes=4, labelled=1.0, scale=0.0005,
        eval_episodes=2, jobs=1,
    )  # fmt: skip
    assert experiment.experiment(args) == 0
    text = (args.out / "page.md").read_text()
    header = " | ".join(page.COLUMNS.values())
    assert f"| milestone | {header} |" in text
    assert "Not complete" not in text
    done = json.loads((args.out / "stages.json").read_text())
    assert all(entry["done"] for entry in done.values())
    assert experiment.experiment(args) == 0  # nothing is left to do
    assert json.loads((args.out / "stages.json").read_text()) == done
