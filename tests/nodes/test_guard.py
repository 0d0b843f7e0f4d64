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


def drive(guard: Guard, command, now: int = START):
    """Check a command and carry the verdict out."""
    verdict = guard.check(None if command is None else np.array(command, float), now)
    guard.sent(now)
    return verdict


@pytest.fixture
def guard(contract) -> Guard:
    guard = Guard(contract)
    guard.start(START)
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
        verdict = drive(guard, command, now)
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
    drive(guard, [0.0, 0.0, 2.0])
    verdict = drive(guard, [0.1, bad, 1.0], START + 50 * MS)
    assert rule(verdict) == "not_finite"
    assert verdict.values.tolist() == [0.0, 0.0, 2.0]  # zeros, zeros, hold


def test_hold_sends_nothing_before_there_was_a_command(guard) -> None:
    """The second safety action sent an arm that had never been commanded to zero."""
    for k in range(3):
        verdict = drive(guard, None, START + k * MS)
        assert rule(verdict) == "no_command"
        assert verdict.send.tolist() == [True, True, False]


def test_hold_does_not_outlive_the_run(guard) -> None:
    """Between two runs others may have moved the arm: the pose of the last one was commanded again."""
    drive(guard, [0.0, 0.0, 2.0])
    guard.start(START + 10_000 * MS)
    assert drive(guard, None, START + 10_000 * MS).send.tolist() == [True, True, False]


def test_hold_outlives_a_new_clock(guard) -> None:
    drive(guard, [0.0, 0.0, 2.0])
    guard.begin(0)
    verdict = drive(guard, None, MS)
    assert verdict.send.all()
    assert verdict.values.tolist() == [0.0, 0.0, 2.0]


def test_what_was_not_sent_is_nothing_to_start_from(guard) -> None:
    """A command that the middleware lost counted as sent: the next one was slewed from it."""
    drive(guard, [-0.9, 0.0, 0.0])
    guard.check(np.array([0.5, 0.0, 2.0]), START + 50 * MS)  # is not carried out
    assert drive(guard, [0.9, 0.0, 0.0], START + 60 * MS).values[0] == pytest.approx(-0.3)
    assert guard.check(None, START + 60 * MS).values[2] == 0.0  # what `hold` holds


def test_limits_hold_in_the_precision_of_commands(contract) -> None:
    """0.1 as float32 is 0.10000000149, which a strict controller refuses."""
    base = replace(contract.actions[0], low=(-0.1, -0.7), high=(0.1, 0.7))
    guard = Guard(replace(contract, actions=(base, contract.actions[1])))
    guard.start(START)
    for sign in (1, -1):
        values = guard.check(np.array([5.0, 5.0, 0.0]) * sign, START).values
        assert (np.abs(values[:2].astype(np.float64)) <= [0.1, 0.7]).all()
        assert values[:2] == pytest.approx([0.1 * sign, 0.7 * sign])
    assert not guard.check(np.array([0.1, 0.7, 0.0], np.float32), START).rules


def test_limits_and_slew_are_cut_and_named(guard) -> None:
    assert drive(guard, [5.0, 0.0, 0.0]).values[0] == 1.0
    verdict = drive(guard, [-1.0, 0.0, 0.0], START + 50 * MS)
    assert verdict.rules == ("slew",)
    assert verdict.values[0] == pytest.approx(0.5)
    assert guard.tally["limit"].count == guard.tally["slew"].count == 1


def test_safety_is_not_slewed(guard) -> None:
    drive(guard, [1.0, 2.0, 0.0])
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
    """By default after 1.5 periods, so that the safety action goes out within two."""
    guard.alive("server", START)
    assert not guard.check(np.zeros(3), START + 74 * MS).is_safe
    see(guard, START + 76 * MS)
    assert rule(guard.check(np.zeros(3), START + 76 * MS)) == guard.forbids(START + 76 * MS) == "watchdog"
    guard.config = GuardConfig(watchdog_ms=100.0)
    assert not guard.check(np.zeros(3), START + 76 * MS).is_safe


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


def test_a_new_clock_does_not_free_the_rate(guard) -> None:
    drive(guard, [0.9, 0.0, 0.0])
    guard.begin(START + 50 * MS)
    see(guard, START + 50 * MS)
    verdict = guard.check(np.array([-0.9, 0.0, 0.0]), START + 60 * MS)
    assert verdict.values[0] == pytest.approx(0.8)
    assert verdict.rules == ("slew",)


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
