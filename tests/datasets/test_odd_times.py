"""Stamps that are wrong, absurd or far apart: frames that can be used are, and nothing takes all memory."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ingest import ARRAY, ROBOT, T0, TICK, drive, frames, robot, take

from d4_datasets import align, aligned, fields, signals
from d4_datasets.bags import new
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

HOUR = 3_600_000_000_000


def plain(**changes):
    """A camera alone, without start events."""
    raw = yaml.safe_load(ROBOT)
    spec = {key: raw[key] for key in ("name", "rate_hz", "latency_ms", "actions")}
    return Contract.from_dict(spec | {"observations": [raw["observations"][0] | changes]})


def test_a_clock_that_was_set_on_the_way_ends_an_episode(tmp_path):
    """A board without a battery begins in 1970 until it finds a time server."""
    log = drive(1)
    for item in drive(1, t0=100 * TICK, first=10).items:
        log.add(*item)
    dataset, summary = take(tmp_path, log, contract=plain())
    assert [frames(dataset, number) for number in range(2)] == [list(range(10, 16)), list(range(6))]
    assert any("has no frame for 472222.2 h (a clock that was set?)" in text for text in summary.warnings)


def test_with_start_events_each_side_of_the_jump_has_its_own(tmp_path):
    log = drive(2)
    for item in drive(1, t0=100 * TICK, first=20).items:
        log.add(*item)
    dataset, _ = take(tmp_path, log)
    assert [frames(dataset, number)[0] for number in range(3)] == [20, 0, 6]


def test_a_start_event_long_before_the_first_frame_begins_with_the_frame(tmp_path):
    log = drive(1, t0=T0)
    for item in log.items:
        if item[0] == "/episode":
            item[2] = T0 - 30 * HOUR
    dataset, _ = take(tmp_path, log)
    assert frames(dataset, 0) == list(range(6))


def test_years_of_ticks_are_refused_before_they_take_memory(tmp_path):
    log = drive(1)
    for k in range(600):  # a frame every 59 minutes
        log.frame(k % 40, T0 + k * 59 * 60 * 1_000_000_000)
    with pytest.raises(
        UserError, match=r"by the stamps of /cam it lasts 25 days, too long for one recording"
    ):
        take(tmp_path, log, contract=plain())


def test_stamps_before_1970_and_absurd_ones_are_no_stamps(tmp_path):
    log = drive(1)
    for number, item in enumerate(item for item in log.items if item[0] == "/cam"):
        if number % 2:
            item[3].header.stamp.sec = -5
    dataset, summary = take(tmp_path, log)
    assert any("3 messages of /cam have no stamp" in text for text in summary.warnings)
    assert set(frames(dataset, 0)) == {0, 2, 4}


def test_pictures_far_from_the_order_of_their_stamps_do_not_fill_the_memory(tmp_path, monkeypatch):
    log = drive(2, length=10)
    cameras = [item for item in log.items if item[0] == "/cam"]
    for item, other in zip(cameras, reversed([item[3] for item in cameras]), strict=True):
        item[3] = other
    monkeypatch.setattr(aligned, "_MOST_PENDING", 8 * 12 * 3 * 4)
    with pytest.raises(UserError, match="pictures of /cam come too far from the order of their stamps"):
        take(tmp_path, log, contract=plain())


def test_nanoseconds_beyond_a_second_are_added(tmp_path):
    log = drive(1)
    for item in log.items:
        if item[0] == "/cam":
            stamp = item[3].header.stamp
            stamp.sec, stamp.nanosec = stamp.sec - 3, stamp.nanosec + 3_000_000_000
    assert frames(take(tmp_path, log)[0], 0) == list(range(6))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3 * HOUR), min_size=1, max_size=12),
    st.lists(st.integers(-2 * HOUR, 20 * HOUR), max_size=6) | st.none(),
    st.sampled_from([HOUR // 50, HOUR // 3, 10 * TICK]),
)
def test_ticks_of_runs_cover_every_frame_that_ticks_of_all_would(steps, starts, period):
    stamps = np.cumsum(steps) + T0
    events = None if starts is None else np.sort(np.array(starts, np.int64)) + T0
    ticks = align.grid_of(stamps, period, events)
    assert (np.diff(ticks.group) >= 0).all()
    assert (np.diff(ticks.time)[~ticks.first[1:]] == period).all()
    if len(align.runs(stamps)) == 1 and (
        events is None or (stamps[0] - events <= align.LONGEST_GAP_NS).all()
    ):
        whole = align.grid(int(stamps[0]), int(stamps[-1]), period, events)
        np.testing.assert_array_equal(ticks.time, whole.time)
        return
    if events is None:  # every frame is near a tick
        index = np.searchsorted(ticks.time, stamps)
        near = ticks.time[np.minimum(index, len(ticks.time) - 1)] - stamps
        assert (near <= period).all()


# ---- fields that are not what a contract takes them for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": [yaml.safe_load(ROBOT)["actions"][0] | {"select": ["linear[0]", "angular.z"]}]},
         "linear is no array but"),
        ({"reward": {"topic": "/reward", "type": ARRAY, "select": "layout"}}, "a reward is no number but"),
        ({"episode": {"terminal": {"topic": "/reward", "type": ARRAY, "select": "data"}}},
         "a terminal is no truth value but ndarray; correct `episode.terminal.select`"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        take(tmp_path, drive(1), contract=robot(**changes))


def test_tasks_by_number():
    contract = robot(
        tasks={"topic": "/t", "type": "std_msgs/msg/Float64", "select": "data", "names": ["a", "b"]}
    )
    assert signals.task(contract, new("std_msgs/msg/Float64", data=1.0)) == 1
    for value in (float("nan"), float("inf"), 0.5, 2.0, -1.0):
        with pytest.raises(UserError, match="is not among the tasks"):
            signals.task(contract, new("std_msgs/msg/Float64", data=value))


def test_a_name_in_something_that_is_no_array():
    with pytest.raises(UserError, match="there is no array 'header'"):
        fields.get(new("sensor_msgs/msg/JointState"), "position[header=a]")
