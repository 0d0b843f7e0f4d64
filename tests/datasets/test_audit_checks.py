"""Planted faults, in bags and in datasets: the audit reports what is true of them, and healthy data pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from d4_datasets.audit import Audit, audit
from d4_datasets.checks.base import Look, Part, longest_run, runs
from d4_datasets.checks.cameras import Camera
from d4_datasets.checks.rewards import Rewards
from d4_datasets.checks.times import Times
from d4_datasets.contract import Contract
from d4_datasets.ingest import ingest
from d4_datasets.scan import Scan
from d4_datasets.windows import Windows


def _audit(tmp_path: Path, episodes: list[synthetic.Episode], **spec: object) -> Audit:
    return audit(synthetic.write(tmp_path / "toy", episodes, planted.spec(**spec)))


def _ingested(tmp_path: Path, *recorded: planted.Bag) -> Audit:
    for number, bag in enumerate(recorded):
        bag.write(tmp_path / "bags" / f"bag{number}")
    ingest([tmp_path / "bags"], planted.contract(), tmp_path / "data")
    return audit(tmp_path / "data")


def _messages(result: Audit, level: str, check: str) -> list[str]:
    return [v.message for v in result.verdicts if (v.level, v.check) == (level, check)]


def _warned(result: Audit) -> set[str]:
    return {v.check for v in result.verdicts if v.level != "OK"}


# ---- healthy


def test_healthy_data_give_no_warning(tmp_path: Path) -> None:
    result = _audit(tmp_path, [planted.episode(seed=seed) for seed in range(3)])
    assert [v for v in result.verdicts if v.level != "OK"] == []


def test_a_healthy_bag_gives_no_warning_but_for_the_reward_that_it_lacks(tmp_path: Path) -> None:
    result = _ingested(tmp_path, planted.Bag())
    assert _warned(result) == {"tasks"}
    assert result.times["achieved_hz"] == 10
    assert result.times["first"] == "2023-11-14 22:13"
    assert [i for i, frames in enumerate(result.times["hours_utc"]) if frames] == [22]
    assert sum(result.times["hours_utc"]) == 300
    assert result.labels["recordings"] == 1


# ---- rates, gaps, clocks


@pytest.mark.parametrize("rate_hz", [8.0, 5.0])
def test_a_camera_that_is_slower_than_claimed(tmp_path: Path, rate_hz: float) -> None:
    bag = planted.Bag(240, round(1e9 / rate_hz))
    result = _ingested(tmp_path, bag)
    assert result.times["achieved_hz"] == pytest.approx(rate_hz, rel=0.03)
    assert result.cameras["cam"]["distinct_hz"] == pytest.approx(rate_hz, rel=0.03)
    (message,) = _messages(result, "WARN", "rate")
    assert message.endswith("the contract claims 10")


def test_a_camera_that_is_faster_than_claimed_is_no_fault(tmp_path: Path) -> None:
    result = _ingested(tmp_path, planted.Bag(600, 33_333_333))
    assert "rate" not in _warned(result)


def test_gaps_in_a_bag(tmp_path: Path) -> None:
    bag = planted.Bag(300)
    bag.keep[60:90] = False
    bag.keep[200:205] = False
    result = _ingested(tmp_path, bag)
    assert result.times["gaps"] == 2
    # A frame stands for its own tick and, within the tolerance, for one that is lost.
    assert result.times["longest_gap_s"] == pytest.approx(3.0, abs=0.2)
    assert result.times["gap_s"] == pytest.approx(3.5, abs=0.4)
    assert result.times["dropped"] == pytest.approx(35, abs=4)
    assert "2 gaps within recordings, the longest" in _messages(result, "WARN", "gaps")[0]


def test_a_clock_that_jumps_back_within_a_recording(tmp_path: Path) -> None:
    made = [planted.episode(30, seed=seed) for seed in range(3)]
    for number, start in enumerate((0, 3_000_000_000, 4_000_000_000)):
        made[number].provenance = {"source": "a", "start_ns": planted.T0 + start}
    result = _audit(tmp_path, made)
    assert result.times["overlaps"] == 1
    assert "first: episode 2 by 2.0 s" in _messages(result, "WARN", "clock")[0]


def test_a_clock_that_was_never_set(tmp_path: Path) -> None:
    result = _audit(tmp_path, [planted.episode(30, seed=seed) for seed in range(2)])
    assert "time of day is unknown" in _messages(result, "OK", "clock")[0]
    assert result.times["first"] is None


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 200_000)), min_size=1, max_size=5))
def test_frames_by_hour_add_up(episodes: list[tuple[int, int]]) -> None:
    contract = Contract.from_dict(planted.spec())
    times = Times(contract, 10)
    for start_s, frames in episodes:
        times._date(planted.T0 + start_s * 10**9, frames)
    assert times.hours.sum() == sum(frames for _, frames in episodes)


def test_what_ingest_warned_of_is_said_again(tmp_path: Path) -> None:
    contract = planted.contract().to_dict()
    contract["reward"] = {"topic": "/reward", "type": "std_msgs/msg/Float64", "select": "data"}
    planted.Bag(60).write(tmp_path / "bag")
    ingest([tmp_path / "bag"], Contract.from_dict(contract), tmp_path / "data")
    (message,) = _messages(audit(tmp_path / "data"), "WARN", "recordings")
    assert "has no topic /reward, which gives the reward" in message


# ---- labels


def test_commands_that_pause(tmp_path: Path) -> None:
    bag = planted.Bag(300)
    bag.keep_command[110:150] = False
    result = _ingested(tmp_path, bag)
    rows = [row.unlabelled_run for row in result.episodes]
    assert rows[1] == pytest.approx(38, abs=1)  # the tolerance covers two
    assert (rows[0], rows[2]) == (0, 0)
    assert result.labels["longest_hole"] == rows[1]
    assert "from frame 1" in _messages(result, "WARN", "labels")[0]


def test_a_recording_without_commands_is_counted(tmp_path: Path) -> None:
    silent = planted.Bag(100, seed=1)
    silent.keep_command[:] = False
    result = _ingested(tmp_path, planted.Bag(100), silent)
    assert result.labels["recordings"] == 0.5
    assert "1 of 2 recordings hold no command" in _messages(result, "OK", "labels")[0]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_those_of_a_plain_loop(flags: list[bool]) -> None:
    found, begin = [], None
    for i, flag in enumerate([*flags, False]):
        if flag and begin is None:
            begin = i
        elif not flag and begin is not None:
            found.append([begin, i])
            begin = None
    assert runs(np.array(flags, bool)).tolist() == found
    length, first = longest_run(np.array(flags, bool))
    assert length == max((end - start for start, end in found), default=0)
    assert all(flags[first : first + length])


# ---- commands


def test_saturated_commands(tmp_path: Path) -> None:
    made = [planted.episode(seed=seed) for seed in range(3)]
    for episode in made:
        episode.action[:, 0] = np.clip(3 * episode.action[:, 0], -1, 1)
    share = np.mean([abs(e.action[:, 0]) == 1 for e in made])
    result = _audit(tmp_path, made)
    assert result.actions["base.linear.x"]["at_limit"] == pytest.approx(share)
    assert _messages(result, "WARN", "actions") == [
        f"base.linear.x is saturated: at a limit in {share:.1%} of the frames"
    ]
    histogram = result.actions["base.linear.x"]["histogram"]
    assert histogram[0] + histogram[-1] >= share * 360
    assert sum(histogram) == 360


def test_used_range_and_held_commands(tmp_path: Path) -> None:
    made = [planted.episode(120, seed=seed) for seed in range(2)]
    for episode in made:
        episode.action[:, 1] = np.repeat(episode.action[::4, 1], 4) * 0.5
    a = _audit(tmp_path, made).actions["base.linear.y"]
    everything = np.concatenate([e.action[:, 1] for e in made])
    assert a["used"] == pytest.approx(np.ptp(everything) / 2, abs=1e-6)
    assert a["held"] == pytest.approx(90 / 119)


def test_episodes_in_which_nothing_is_commanded(tmp_path: Path) -> None:
    made = [planted.episode(seed=seed) for seed in range(4)]
    made[2].action[:] = 0
    result = _audit(tmp_path, made)
    assert "in 1 of 4 labelled episodes the command never changes" in _messages(result, "WARN", "actions")
    assert result.summary["longest_command_hold"] == 120


def test_classes_that_are_never_used(tmp_path: Path) -> None:
    raw = planted.spec()["actions"][0]
    keys = {key: raw[key] for key in ("topic", "type", "align")} | {"safety": "hold", "select": ["linear.x"]}
    channels = [{**keys, "name": "keys", "kind": "categorical", "classes": 5},
                {**keys, "name": "grip", "kind": "binary", "select": ["linear.y"]}]  # fmt: skip
    made = [planted.episode(seed=seed) for seed in range(2)]
    for episode in made:
        episode.action[:] = np.random.default_rng(3).choice([0, 1], (120, 2))
        episode.action[:, 0] *= 3
    result = _audit(tmp_path, made, actions=channels)
    assert result.actions["keys.linear.x"]["unused_classes"] == [1, 2, 4]
    assert _messages(result, "WARN", "actions") == ["keys.linear.x never takes 1, 2, 4 of its 5 classes"]


# ---- pictures


def test_frozen_frames_in_a_bag(tmp_path: Path) -> None:
    """A driver that sends the same picture again with new stamps."""
    bag = planted.Bag(300)
    bag.images[130:171] = bag.images[130]
    result = _ingested(tmp_path, bag)
    assert result.cameras["cam"]["longest_repeat"] == 41
    assert result.cameras["cam"]["longest_repeat_at"] == 130
    assert result.times["stale"] == 0
    assert "longest run 41 frames (4.1 s)" in _messages(result, "WARN", "camera")[0]


def test_episodes_with_one_picture(tmp_path: Path) -> None:
    made = [planted.episode(seed=seed) for seed in range(8)]
    made[5].images[:] = made[5].images[0]
    result = _audit(tmp_path, made)
    assert result.cameras["cam"]["first_frozen"] == [5]
    assert "camera cam shows one picture throughout 1 episodes: 5" in _messages(result, "WARN", "camera")


@pytest.mark.parametrize(
    ("level", "key", "text"),
    [(3, "dark", "are dark"), (252, "bright", "are overexposed"), (120, "flat", "show a single colour")],
)
def test_frames_that_show_nothing(tmp_path: Path, level: int, key: str, text: str) -> None:
    made = [planted.episode(seed=seed) for seed in range(2)]
    noise = np.random.default_rng(0).integers(-1, 2, made[1].images[40:52].shape)
    made[1].images[40:52] = level + noise
    result = _audit(tmp_path, made)
    assert result.cameras["cam"][key] == pytest.approx(12 / 240)
    assert result.cameras["cam"]["longest_blank"] == 12
    assert result.cameras["cam"]["examples"][key] == list(range(160, 168))
    assert _messages(result, "WARN", "camera") == [f"camera cam: 5.0% of the frames {text}"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=5))
def test_repeats_are_counted_over_episodes(episodes: list[list[bool]]) -> None:
    camera, first = Camera(), 0
    for number, still in enumerate(episodes):
        motion = np.where(still, 0, 1).astype(np.float32)
        ones = np.full(len(still) + 1, 100, np.float32)
        camera.add(Look(motion, ones, ones), number, first)
        first += len(ones)
    flat = [flag for still in episodes for flag in [*still, False]]
    table = camera.table(10)
    assert table["repeated"] == pytest.approx(sum(flat) / sum(map(len, episodes)))
    run = longest_run(np.array(flat))[0]
    assert table["longest_repeat"] == (run + 1 if run else 0)
    if run:
        at = table["longest_repeat_at"]
        assert all(flat[at : at + run])


# ---- rewards and ends


def test_a_constant_reward(tmp_path: Path) -> None:
    made = [planted.episode(seed=seed) for seed in range(2)]
    for episode in made:
        episode.reward[:] = 0.5
    messages = _messages(_audit(tmp_path, made), "WARN", "reward")
    assert messages == ["the reward for left is 0.5 in every frame: no behaviour is better than another"]


def test_a_reward_that_is_far_from_all_others(tmp_path: Path) -> None:
    made = [planted.episode(seed=seed) for seed in range(2)]
    for episode in made:
        episode.reward[:] = -0.01
    made[1].reward[7] = -1e6
    result = _audit(tmp_path, made)
    assert result.tasks["left"]["outliers"] == 1
    assert (
        "reaches -1e+06 in 1 frames, and at most 0.01 in all others" in _messages(result, "WARN", "reward")[0]
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 300), st.floats(0.5, 2), st.integers(0, 2**31))
def test_what_a_success_pays_is_no_outlier(episodes: int, pay: float, seed: int) -> None:
    contract = Contract.from_dict(planted.spec())
    rewards, rng = Rewards(contract, 1), np.random.default_rng(seed)
    zeros = np.zeros(10)
    for number in range(episodes):
        reward = np.full((10, 1), -0.001)
        reward[-1] = pay * rng.uniform(0.8, 1.2) * (number % 10 < 3)
        rewards.add(
            Part(contract, number, 10 * number, zeros, zeros > 0, reward, zeros > 0, zeros.astype(int))
        )
    assert rewards.table()["left"]["outliers"] == 0


def test_episodes_that_never_end(tmp_path: Path) -> None:
    signal = {"terminal": {"topic": "/end", "type": "std_msgs/msg/Bool", "select": "data"}}
    made = [planted.episode(seed=seed) for seed in range(2)]
    result = _audit(tmp_path / "a", made, episode=signal)
    assert "although the contract takes them from /end" in _messages(result, "WARN", "terminals")[0]
    made[1].terminal = True
    assert "terminals" not in _warned(_audit(tmp_path / "b", made, episode=signal))


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    """What the pass keeps of an episode does not depend on its length."""
    windows = Windows(synthetic.write(tmp_path / "toy", [planted.episode(800)], planted.spec()))
    scan = Scan(windows, [], 10)
    scan.run()
    assert len(scan.along.sums["labels"]) <= 200
    assert len(scan.rewards.top) <= 64
    kept = sum(s.motion.nbytes + s.action.nbytes for s in scan.lag.stretches["cam"])
    assert kept < 20_128 * 4 * (7 + 2 * len(scan.lag.lags))
