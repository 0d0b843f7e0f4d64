"""Each disturbance does what it says, the same for the same seed, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim import world as world_module
from d4_sim.driver import ScriptedPolicy
from d4_sim.suite.disturb import Disturbance, Lateness, contents, slug
from d4_sim.vector import run_episodes
from d4_sim.world import Observation, make_world, world_class

REPORT = Path(__file__).parents[2] / "docs" / "results" / "robot" / "latency-20hz.json"
PUSH = np.array([1.0, -0.5], np.float32)


def poses(name: str, seed: int = 0, ticks: int = 8) -> np.ndarray:
    """Where the yard's robot is, tick by tick, under one command from the start."""
    world = make_world(name)
    world.reset(seed, 0)
    return np.stack([world.step(PUSH)[0] and world.probes["pose"] for _ in range(ticks)])


def pictures(name: str, seed: int = 0, ticks: int = 12) -> np.ndarray:
    world = make_world(name)
    first = world.reset(seed, 0).image
    return np.stack([first, *(world.step(PUSH)[0].image for _ in range(ticks))])


# ---- names


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("speed=3", "'speed=3' is no disturbance: give NAME=VALUE with latency, jitter, noise"),
        ("noise", "'noise' is no disturbance"),
        ("latency=/a/b", r"latency=/a/b: a latency report is a \.json file without a \+ in its path"),
        ("noise=0.1+noise=0.2", "'noise=0.2': noise is given twice"),
        ("noise=loud", "noise=loud: give a number from 0 to 1"),
        ("noise=2", "noise=2: give a number from 0 to 1"),
        ("drop=1", "drop=1: give a number from 0 to 0.95"),
        ("latency=-5", "latency=-5: give a number from 0 to 1000"),
        ("look=1.5", r"look=1.5: give a whole number"),
        ("latency=/no/such.json", "latency report /no/such.json cannot be read"),
    ],
)
def test_what_does_not_exist_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_world(f"yard+{text}")


@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"stages_ms": {"lateness": {}}, "counts": {}}'])
def test_another_file_is_no_latency_report(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is no latency report of d4"):
        Lateness.load(path)


def test_a_disturbed_world_has_the_contract_of_the_plain_one() -> None:
    assert world_class("yard+noise=0.1").contract_path() == world_class("yard").contract_path()
    assert make_world("yard+noise=0.1").contract.hash == make_world("yard").contract.hash


def test_reports_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    """Results under the second car's latency took the place of those under the first one's."""
    paths = [tmp_path / car / "latency.json" for car in ("a", "b")]
    for path, text in zip(paths, ("{}", "[]"), strict=True):
        path.parent.mkdir()
        path.write_text(text)
    names = [slug([f"latency={path}", "noise=0.1"]) for path in paths]
    assert [re.fullmatch(r"latency-latency-[0-9a-f]{6}-noise-0\.1", name) is not None for name in names] == [
        True, True
    ]  # fmt: skip
    assert names[0] != names[1]
    keys = [contents([f"latency={path}"]) for path in paths]
    assert "" not in keys
    assert keys[0] != keys[1]
    assert contents(["latency=100", "noise=0.1"]) == ""


# ---- each of them


def test_the_contracts_own_latency_changes_nothing() -> None:
    np.testing.assert_array_equal(poses("yard"), poses("yard+latency=40"))


def test_late_commands_are_late_by_so_much() -> None:
    soon, plain, late = (poses(f"yard{how}") for how in ("+latency=0", "", "+latency=140"))
    # 140 ms are the contract's 40 and one tick: the robot is where it would have been a tick before
    np.testing.assert_allclose(late[1:], plain[:-1], atol=1e-5)
    gone = np.linalg.norm(soon - plain, axis=1)
    assert gone[2] == pytest.approx(0.04 * np.linalg.norm(PUSH), rel=0.05)


def test_commands_come_in_the_order_in_which_they_were_sent() -> None:
    world: Any = make_world("yard+jitter=400")
    world.reset(1, 0)
    in_force = []
    for i in range(30):
        world.step(np.full(2, 0.01 * i, np.float32))
        in_force.append(float(world.in_force[0]))
        assert in_force[-1] <= 0.01 * i + 1e-6
    assert in_force == sorted(in_force)
    assert 0 < in_force[-1] < 0.29  # something has arrived, and the last one has not


def test_a_measured_report_is_replayed() -> None:
    late = Lateness.load(REPORT)
    report = json.loads(REPORT.read_text())
    rng = np.random.default_rng(0)
    drawn = np.array([late.draw(rng) for _ in range(20_000)])
    stage = report["stages_ms"]["lateness"]
    drawn -= report["latency_ms"]
    assert np.median(drawn) == pytest.approx(stage["p50"], abs=0.01)
    assert np.quantile(drawn, 0.99) == pytest.approx(stage["p99"], rel=0.15)
    assert drawn.max() <= stage["max"]
    lost = report["counts"]["ticks without a frame of their own"]
    assert late.lost == lost / report["counts"]["ticks"]
    seen = report["counts"]["ticks"] - lost
    assert late.missed == (report["counts"]["missed"] - lost) / seen  # not twice, and of those that it can be
    plain, replayed = poses("yard"), poses(f"yard+latency={REPORT}")
    assert np.abs(plain - replayed).max() < 0.02  # a good loop: hardly any difference
    np.testing.assert_array_equal(poses("yard+latency=measured"), replayed)


def test_each_command_is_late_by_a_draw_of_its_own(tmp_path: Path) -> None:
    """The shipped report is so good that a replay of its promise alone passed for one of its lateness."""
    report = json.loads(REPORT.read_text())
    report["counts"] = {"ticks": 100}
    report["stages_ms"]["lateness"] |= {"p50": 0.0, "p99": 60.0, "p99.9": 60.0, "max": 60.0}
    (tmp_path / "bad.json").write_text(json.dumps(report))
    world: Any = make_world(f"yard+latency={tmp_path / 'bad.json'}")
    world.reset(0, 0)
    shares = []  # of each tick, the part in which the new command was in force
    for i in range(60):
        action = np.full(2, 1.0 if i % 2 else -1.0, np.float32)
        in_force = []
        advance = world._world.advance
        world._world.advance = lambda n, do=advance, seen=in_force: (seen.append(world.in_force[0]), do(n))
        world.step(action)
        world._world.advance = advance
        shares.append(np.mean(np.array(in_force) == action[0]))
    assert max(shares) == pytest.approx(0.6, abs=0.1)  # promised: 40 of 100 ms
    assert min(shares) < 0.3
    assert len(set(shares)) > 3


def test_a_measured_latency_takes_the_place_of_the_worlds_own(tmp_path: Path) -> None:
    """On worlds with less latency than the measured robot the report brought next to no lateness."""
    report = json.loads(REPORT.read_text())
    report["latency_ms"], report["counts"] = 90.0, {"ticks": 100}
    (tmp_path / "slow.json").write_text(json.dumps(report))
    np.testing.assert_array_equal(poses(f"yard+latency={tmp_path / 'slow.json'}"), poses("yard+latency=90"))


def test_missed_commands_leave_the_last_one_in_force() -> None:
    how = Disturbance(latency=Lateness((0.0,) * 5, missed=1.0, lost=0.0))
    world: Any = make_world("yard+drop=0")
    world._how = how
    world.reset(0, 0)
    start = world.probes["pose"]
    for _ in range(5):
        world.step(PUSH)
    np.testing.assert_array_equal(world.probes["pose"], start)


def test_a_lost_frame_takes_its_command_with_it() -> None:
    """The node sends none of its own then, and the world got one all the same."""
    world: Any = make_world("yard+drop=0")
    world._how = Disturbance(latency=Lateness((0.0,) * 5, missed=0.0, lost=1.0))
    first = world.reset(0, 0)
    world.step(PUSH)  # the first frame always arrives
    for _ in range(4):
        seen, *_ = world.step(np.full(2, 0.5, np.float32))
        np.testing.assert_array_equal(world.in_force, PUSH)
    np.testing.assert_array_equal(seen.image, first.image)


def test_noise_is_so_strong_and_changes_no_physics() -> None:
    clean, noisy = pictures("yard"), pictures("yard+noise=0.05")
    middle = (clean > 60) & (clean < 195)  # nothing is clipped there
    error = (noisy.astype(float) - clean)[middle]
    assert error.std() == pytest.approx(0.05 * 255, rel=0.05)
    assert abs(error.mean()) < 0.5
    np.testing.assert_array_equal(poses("yard"), poses("yard+noise=0.05"))


def test_lost_frames_repeat_the_ones_before() -> None:
    clean, lossy = (pictures(f"push{how}", ticks=40) for how in ("", "+drop=0.4"))
    kept = [i for i in range(41) if np.array_equal(lossy[i], clean[i])]
    assert 0 in kept
    for i in set(range(41)) - set(kept):
        assert np.array_equal(lossy[i], lossy[i - 1])
    changed = [i for i in range(1, 41) if not np.array_equal(clean[i], clean[i - 1])]
    lost = [i for i in changed if not np.array_equal(lossy[i], clean[i])]
    assert 0.15 < len(lost) / len(changed) < 0.7


def test_looks_are_other_pictures_of_the_same_things() -> None:
    plain, one, two, again = (pictures(f"yard{how}") for how in ("", "+look=1", "+look=2", "+look=1"))
    np.testing.assert_array_equal(one, again)
    for a, b in ((plain, one), (plain, two), (one, two)):
        assert np.abs(a.astype(float) - b).mean() > 5
    np.testing.assert_array_equal(poses("yard"), poses("yard+look=1"))
    np.testing.assert_array_equal(pictures("yard"), plain)  # looks are not catching
    with pytest.raises(UserError, match="look= needs a MuJoCo world"):
        make_ticker("look=1")


def test_light_scales_the_picture() -> None:
    plain, dark = pictures("yard"), pictures("yard+light=0.5")
    np.testing.assert_allclose(dark, plain * 0.5, atol=0.51)


@pytest.mark.parametrize("how", ["latency=90", "jitter=60", "noise=0.1", "drop=0.3", f"latency={REPORT}"])
def test_the_same_seed_brings_the_same_disturbance(how: str) -> None:
    name = f"yard+{how}"
    seeds, tasks = [5, 6], [0, 1]
    batches = [run_episodes(name, seeds, tasks, ScriptedPolicy("expert"), 8, keep_frames=True) for _ in "ab"]
    np.testing.assert_array_equal(batches[0].frames, batches[1].frames)
    np.testing.assert_array_equal(batches[0].reward, batches[1].reward)


def test_an_expert_suffers_from_lateness_and_copes_with_what_it_does_not_see() -> None:
    def mean(how: str) -> float:
        policy = ScriptedPolicy("expert")
        return float(run_episodes(f"yard{how}", list(range(6)), [0, 1] * 3, policy, 30).returns.mean())

    plain = mean("")
    assert mean("+noise=0.2+drop=0.3") == plain  # it knows the state
    assert mean("+latency=300") < plain - 2


# ---- worlds without a clock


class Ticker:
    """Shows the last command; 10 Hz, no substeps."""

    tasks = ("go",)
    action_low, action_high = np.zeros(1, np.float32), np.full(1, 99.0, np.float32)
    horizon, success_reward = 50, 1.0
    probes: dict[str, np.ndarray] = {}  # noqa: RUF012
    rewards = np.zeros(1, np.float32)

    def __init__(self) -> None:
        self.contract: Any = make_world("yard").contract
        self.done: list[float] = []

    def reset(self, seed: int, task: int) -> Observation:
        self.done = []
        return Observation(np.full((8, 8, 3), 100, np.uint8))

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, bool, bool]:
        self.done.append(float(action[0]))
        return Observation(np.full((8, 8, 3), 100, np.uint8)), self.rewards, False, False


def make_ticker(*parts: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(world_module._WORLDS, "ticker", f"{__name__}:Ticker")
        patch.setitem(__import__("sys").modules, __name__, __import__("sys").modules[__name__])
        return make_world("+".join(["ticker", *parts]))


@pytest.mark.parametrize(("latency", "behind"), [(40, 0), (99, 0), (100, 1), (250, 2)])
def test_without_a_clock_lateness_counts_in_ticks(latency: int, behind: int) -> None:
    world = make_ticker(f"latency={latency}")
    world.reset(0, 0)
    for i in range(1, 7):
        world.step(np.array([i], np.float32))
    assert world.done == [0.0] * behind + list(range(1, 7 - behind))
