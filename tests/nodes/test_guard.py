"""The guard lets nothing through that the contract forbids, and says which rule acted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets.contract import Contract
from d4_nodes.guard import RULES, Guard, GuardConfig

ROBOT = Path(__file__).with_name("robot.yaml")
MS = 1_000_000
START = 10_000 * MS


def see(guard: Guard, now: int) -> None:
    for stream in ("eye", "joints"):
        guard.see(stream, now, now)


@pytest.fixture
def guard(contract) -> Guard:
    guard = Guard(contract)
    guard.begin(START)
    see(guard, START)
    return guard


def rule(verdict) -> str:
    return verdict.rules[0] if verdict.rules else ""


def test_a_good_command_passes_as_it_is(guard) -> None:
    verdict = guard.check(np.array([0.1, -0.2, 2.5]), START)
    assert np.allclose(verdict.values, [0.1, -0.2, 2.5])
    assert verdict.send.all()
    assert not verdict.is_safe
    assert not verdict.rules


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=20), st.data())
def test_whatever_comes_only_what_the_contract_allows_goes_out(commands, data) -> None:
    contract = Contract.from_dict(yaml.safe_load(ROBOT.read_text()))
    guard, now = Guard(contract), START
    guard.begin(now)
    last = None
    for command in commands:
        dt = data.draw(st.integers(0, 100)) * MS
        now += dt
        see(guard, now)
        verdict = guard.check(np.array(command), now)
        sent = verdict.values[verdict.send]
        assert np.isfinite(sent).all()
        assert (verdict.values >= contract.action_low).all()
        assert (verdict.values <= contract.action_high).all()
        if last is not None and not verdict.is_safe:
            allowed = np.array([10, 20]) * dt / 1e9 + 1e-6
            assert (np.abs(verdict.values[:2] - last[:2]) <= allowed).all()
        last = np.where(verdict.send, verdict.values, 0.0 if last is None else last)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_command_with_one_bad_number_is_replaced_whole(guard, bad) -> None:
    guard.check(np.array([0.0, 0.0, 2.0]), START)
    verdict = guard.check(np.array([0.1, bad, 1.0]), START + 50 * MS)
    assert rule(verdict) == "not_finite"
    assert verdict.values.tolist() == [0.0, 0.0, 2.0]  # zeros, zeros, hold


def test_hold_sends_nothing_before_there_was_a_command(guard) -> None:
    verdict = guard.check(None, START)
    assert rule(verdict) == "no_command"
    assert verdict.send.tolist() == [True, True, False]


def test_limits_and_slew_are_cut_and_named(guard) -> None:
    assert guard.check(np.array([5.0, 0.0, 0.0]), START).values[0] == 1.0
    verdict = guard.check(np.array([-1.0, 0.0, 0.0]), START + 50 * MS)
    assert verdict.rules == ("slew",)
    assert verdict.values[0] == pytest.approx(0.5)
    assert guard.tally["limit"].count == guard.tally["slew"].count == 1


def test_safety_is_not_slewed(guard) -> None:
    guard.check(np.array([1.0, 2.0, 0.0]), START)
    guard.stop("button")
    assert guard.check(np.array([1.0, 2.0, 0.0]), START + MS).values.tolist() == [0.0, 0.0, 0.0]


def test_a_stale_stream_stops_until_it_is_fresh(guard) -> None:
    late = START + 76 * MS
    verdict = guard.check(np.zeros(3), late)
    assert rule(verdict) == "stale"
    assert "eye is 76 ms old" in verdict.reason
    see(guard, late)
    assert not guard.check(np.zeros(3), late).is_safe


def test_every_watched_stream_counts(guard) -> None:
    guard.see("eye", START + 76 * MS, START + 76 * MS)
    assert "joints" in guard.check(np.zeros(3), START + 76 * MS).reason


def test_stamps_that_cannot_be_true_are_named(guard) -> None:
    now = START + 50 * MS
    assert not guard.see("eye", now + 3000 * MS, now)
    assert not guard.see("eye", START - 1, now)
    verdict = guard.check(np.zeros(3), START + 80 * MS)
    assert rule(verdict) == "stale"
    assert "went back" in verdict.reason
    assert guard.see("eye", START + 80 * MS, START + 80 * MS)


def test_a_frozen_camera_stops_at_the_second_repeat(guard) -> None:
    guard.look("eye", True)
    assert not guard.check(np.zeros(3), START).is_safe
    guard.look("eye", True)
    assert rule(guard.check(np.zeros(3), START)) == "frozen"
    guard.look("eye", False)
    assert not guard.check(np.zeros(3), START).is_safe


def test_frozen_can_be_switched_off_by_name(contract) -> None:
    guard = Guard(contract, GuardConfig(frozen_frames=0))
    guard.begin(START)
    for _ in range(100):
        guard.look("eye", True)
    assert not guard.check(np.zeros(3), START).is_safe


def test_a_silent_process_stops(guard) -> None:
    guard.alive("server", START)
    assert not guard.check(np.zeros(3), START + 70 * MS).is_safe
    see(guard, START + 101 * MS)
    assert rule(guard.check(np.zeros(3), START + 101 * MS)) == "watchdog"


def test_the_emergency_stop_is_latched(guard) -> None:
    guard.stop("red button")
    guard.begin(START)
    for _ in range(3):
        assert guard.check(np.zeros(3), START).reason == "red button"
    guard.reset_stop()
    assert not guard.check(np.zeros(3), START).is_safe


def test_the_emergency_stop_works_with_the_guard_switched_off(contract) -> None:
    guard = Guard(contract, GuardConfig(enabled=False))
    guard.begin(START)
    assert guard.check(np.array([9.0, 0, 0]), START + 10_000 * MS).values[0] == 9.0
    guard.stop("")
    assert rule(guard.check(np.zeros(3), START)) == "emergency_stop"


def test_dead_man(contract) -> None:
    guard = Guard(contract, GuardConfig(dead_man=True))
    guard.begin(START)
    assert rule(guard.check(np.zeros(3), START)) == "dead_man"
    guard.switch(True, START)
    assert not guard.check(np.zeros(3), START + 50 * MS).is_safe
    see(guard, START + 501 * MS)
    assert "last seen" in guard.check(np.zeros(3), START + 501 * MS).reason
    guard.switch(False, START + 501 * MS)
    assert "not held" in guard.check(np.zeros(3), START + 501 * MS).reason


def test_shadow_mode_computes_and_sends_nothing(contract) -> None:
    guard = Guard(contract, GuardConfig(send=False))
    guard.begin(START)
    verdict = guard.check(np.array([5.0, 0, 0]), START)
    assert not verdict.send.any()
    assert verdict.values[0] == 1.0
    assert guard.tally["limit"].count == 1


def test_the_tally_says_how_often_and_when(guard) -> None:
    for k in range(3):
        guard.check(None, START + k * MS)
    tally = guard.tally["no_command"]
    assert (tally.count, tally.first_ns, tally.last_ns) == (3, START, START + 2 * MS)
    assert set(guard.tally) == set(RULES)


def test_zeros_are_zeros_where_the_limits_leave_zero_out(contract) -> None:
    """The safety action of a throttle of 0.3 to 1 was clipped to 0.3: the emergency stop drove the car."""
    base = replace(contract.actions[0], low=(0.3, -2.0))
    guard = Guard(replace(contract, actions=(base, contract.actions[1])))
    guard.begin(START)
    guard.stop("pressed")
    assert guard.check(np.array([0.5, 0.0, 0.0]), START).values[0] == 0.0


def test_a_new_episode_does_not_free_the_rate(guard) -> None:
    guard.check(np.array([0.9, 0.0, 0.0]), START)
    guard.begin(START + 50 * MS)
    see(guard, START + 50 * MS)
    verdict = guard.check(np.array([-0.9, 0.0, 0.0]), START + 60 * MS)
    assert verdict.values[0] >= 0.0 - 1e-6 or abs(verdict.values[0]) <= 10 * 0.06
    assert "slew" in verdict.rules


def test_a_frame_from_before_the_begin_is_no_stamp_that_went_back(guard) -> None:
    """The first frame of an episode is captured before the message that starts it, and may come after it."""
    guard.begin(START)
    assert guard.see("eye", START - 14 * MS, START + MS)
    assert not guard.see("eye", START - 20 * MS, START + 2 * MS)


def test_a_clock_that_is_set_back_does_not_hold_the_dead_man_switch(contract) -> None:
    guard = Guard(contract, GuardConfig(dead_man=True))
    guard.switch(True, START)
    early = START - 3600 * 10**9
    guard.begin(early)
    see(guard, early)
    assert rule(guard.check(np.zeros(3), early)) == "dead_man"
