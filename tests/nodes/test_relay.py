"""The relay: whatever another policy sends, what goes out is inside the contract, and it never pauses."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_bench import CONTRACT, MS, PERIOD, SLACK_NS, Bench, recover, still

from d4_datasets.bags import new
from d4_datasets.errors import UserError
from d4_nodes.codec import Codec
from d4_nodes.guard import Guard, GuardConfig
from d4_nodes.health import ERROR, OK, WARN, Thresholds
from d4_nodes.inbox import Inbox
from d4_nodes.relay import Relay, RelayExaminer, read
from d4_nodes.report import Report
from d4_nodes.runner import Runner


def test_a_good_command_passes_at_once_and_as_it_is(bench) -> None:
    verdict = bench.command(0.1, -0.2, 2.5)
    np.testing.assert_allclose(verdict.values, [0.1, -0.2, 2.5], rtol=1e-6)
    assert not verdict.is_safe
    assert verdict.send.all()
    assert bench.relay.state == "driving"


def test_nothing_is_sent_twice(bench) -> None:
    bench.command(0.1, 0.0, 0.0)
    bench.spend(70)  # less than 1.5 periods
    assert len(bench.sent) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_makes_the_whole_command_the_safety_action(bench, bad) -> None:
    bench.command(0.1, 0.0, 2.0)
    bench.spend(50)
    verdict = bench.command(0.1, bad, 1.0)
    assert verdict.rules == ("not_finite",)
    assert verdict.values.tolist() == [0.0, 0.0, 2.0]  # zeros, zeros, hold
    bench.spend(50)
    recover(bench)


def test_commands_are_cut_to_limits_and_rates(bench) -> None:
    verdict = bench.command(5.0, -7.0, 99.0)
    assert verdict.values.tolist() == [1.0, -2.0, 3.0]
    assert verdict.rules == ("limit",)
    bench.spend(10)
    verdict = bench.command(0.0, -2.0, 3.0)  # 10 per second for 10 ms
    assert verdict.rules == ("slew",)
    assert verdict.values[0] == pytest.approx(0.9)


def test_silence_ends_in_the_safety_action_every_period(bench) -> None:
    bench.drive(200)
    since, count = bench.sent[-1][0], len(bench.sent)
    bench.spend(300)
    times = [t - since for t, _ in bench.sent[count:]]
    assert times == [75 * MS + i * PERIOD for i in range(len(times))]
    assert len(times) == 6
    assert all(v.rules == ("no_command",) for _, v in bench.sent[count:])
    assert "ms ago" in bench.last.reason
    assert bench.relay.report.counts["missed"] == 6
    assert bench.said[-1].startswith("safety action (no_command): the last command for /cmd_vel came")


def test_silence_from_the_start(bench) -> None:
    bench.spend(80)
    assert bench.last.rules == ("no_command",)
    assert bench.last.reason == "no command has come for /cmd_vel"
    assert bench.last.send.tolist() == [True, True, False]  # there is nothing to hold yet


def test_a_partial_command_is_none(bench) -> None:
    for _ in range(6):
        bench.base(0.1, 0.0)
        bench.spend(50)
    assert all(verdict.rules == ("no_command",) for _, verdict in bench.sent)
    assert bench.last.reason == "no command has come for /arm"


def test_a_channel_that_comes_more_rarely_is_held_for_two_periods(bench) -> None:
    for i in range(8):
        if i % 2 == 0:
            bench.arm(0.5)
        bench.base(0.1, 0.0)
        bench.spend(50)
    assert not any(verdict.is_safe for _, verdict in bench.sent)
    assert {round(float(v.values[2]), 3) for _, v in bench.sent} == {0.5}
    for _ in range(4):
        bench.base(0.1, 0.0)
        bench.spend(50)
    assert bench.last.rules == ("no_command",)
    assert "/arm came" in bench.last.reason


def test_a_rare_channel_and_one_that_comes_a_little_late_drive_smoothly(bench) -> None:
    """A safety action came between two good commands, and the robot began anew from a standstill."""
    for i in range(8):
        if i % 2 == 0:
            bench.arm(0.5)
        bench.base(0.1, 0.0)
        bench.spend(51)
    assert not any(verdict.is_safe for _, verdict in bench.sent)


def test_channels_that_come_together_are_one_command(bench) -> None:
    bench.drive(50)
    count = len(bench.sent)
    bench.base(0.1, 0.0)
    bench.spend(5)
    assert len(bench.sent) == count  # the other one is on its way
    bench.arm(0.5)
    bench.spend(1)
    assert len(bench.sent) == count + 1


def test_the_newest_command_wins(bench) -> None:
    bench.base(0.1, 0.0)
    bench.base(0.2, 0.0)
    bench.arm(0.5)
    bench.relay.round()
    assert [round(float(v.values[0]), 3) for _, v in bench.sent] == [0.2]


def test_a_stale_stream_stops_at_once_and_recovers(bench) -> None:
    bench.drive(200)
    bench.sees = False
    count = len(bench.sent)
    bench.drive(150)
    acted = next(t for t, v in bench.sent[count:] if v.rules == ("stale",))
    assert "the contract allows 75 ms" in bench.last.reason
    assert acted - bench.sent[count][0] <= 76 * MS  # not only with the next command
    bench.sees = True
    bench.see()
    recover(bench)


def test_a_frozen_camera_stops_and_recovers(bench) -> None:
    bench.drive(200)
    bench.moves = False
    bench.drive(200)
    assert bench.last.rules == ("frozen",)
    bench.moves = True
    bench.spend(50)
    recover(bench)


def test_a_camera_that_sends_every_picture_three_times_is_not_frozen(bench) -> None:
    bench.sees = False
    for _ in range(10):
        bench.see()
        bench.command(0.1, 0.0, 0.5)
        bench.moves = False
        for _ in range(2):
            bench.spend(16)
            bench.see()
        bench.moves = True
        bench.spend(18)
    assert not any(verdict.is_safe for _, verdict in bench.sent)


@pytest.mark.parametrize("ahead_ms", [-2000, 500])
def test_wrong_stamps_do_not_count(bench, ahead_ms) -> None:
    bench.drive(100)
    bench.sees = False
    for _ in range(3):
        bench.relay.put("eye", bench.mono + bench.shift + ahead_ms * MS)
        bench.relay.put("joints", bench.mono + bench.shift)
        bench.drive(50)
    assert bench.last.rules == ("stale",)
    assert ("ahead of the clock" if ahead_ms > 0 else "went back") in bench.last.reason
    assert bench.relay.report.counts["wrong stamps"] == 3


def test_an_emergency_stop_acts_at_once_and_stays(bench) -> None:
    bench.drive(100)
    bench.spend(10)
    bench.relay.tell(lambda guard: guard.stop("pressed"))
    count = len(bench.sent)
    bench.relay.round()
    assert [v.rules for _, v in bench.sent[count:]] == [("emergency_stop",)]
    bench.drive(500)
    assert bench.last.rules == ("emergency_stop",)
    bench.relay.tell(lambda guard: guard.reset_stop())
    assert not bench.command(0.1, 0.0, 0.5).is_safe


def test_the_dead_man_switch(monkeypatch) -> None:
    bench = Bench(GuardConfig(dead_man=True))
    still(monkeypatch, bench)
    bench.drive(100)
    assert bench.last.rules == ("dead_man",)

    def hold(held: bool) -> None:
        bench.relay.tell(lambda guard: guard.switch(held, bench.relay.now()))

    hold(True)
    bench.drive(100)
    assert not bench.last.is_safe
    bench.spend(5)
    hold(False)
    bench.relay.round()
    assert bench.last.rules == ("dead_man",)
    hold(True)
    bench.drive(700)  # and nothing more is heard of it
    assert "last seen" in bench.last.reason


def test_shadow_mode_sends_nothing_and_counts_all(monkeypatch) -> None:
    bench = Bench(GuardConfig(send=False))
    still(monkeypatch, bench)
    bench.drive(200)
    bench.spend(50)
    assert not any(verdict.send.any() for _, verdict in bench.sent)
    assert bench.relay.report.counts["commands"] == 5
    assert bench.guard.tally["no_command"].count == 1


def test_a_switched_off_guard_still_stops_and_still_fills_silence(monkeypatch) -> None:
    bench = Bench(GuardConfig(enabled=False))
    still(monkeypatch, bench)
    assert bench.command(5.0, 0.0, 0.0).values[0] == 5.0
    bench.spend(100)
    assert bench.last.rules == ("no_command",)
    bench.relay.tell(lambda guard: guard.stop(""))
    assert bench.command(5.0, 0.0, 0.0).rules == ("emergency_stop",)


def test_a_clock_that_jumps_begins_anew(bench) -> None:
    bench.drive(100)
    for jump in (3600_000, -7200_000):
        bench.base(0.1, 0.0)
        bench.arm(0.5)
        bench.shift += jump * MS
        bench.relay.round()
        assert bench.last.is_safe  # what came before the jump is not sent after it
        bench.see()
        recover(bench)
    assert bench.relay.report.reasons["the clock jumped"] == 2


def test_a_simulated_clock_that_begins_again() -> None:
    """Periods are measured by the simulation's clock there; when it goes back nothing must wait for it."""
    bench = Bench(is_simulated=True)
    real = time.monotonic_ns()
    bench.drive(100)
    bench.shift -= 4_000_000 * MS
    bench.relay.round()
    count = len(bench.sent)
    bench.spend(200)
    assert len(bench.sent) - count >= 3
    assert time.monotonic_ns() - real < 5e9


def test_held_up_it_does_not_catch_up(bench) -> None:
    bench.drive(100)
    bench.spend(100)
    count = len(bench.sent)
    bench.mono += 10 * PERIOD
    bench.relay.round()
    bench.relay.round()
    assert len(bench.sent) == count + 1


def test_what_it_says_for_diagnostics(bench) -> None:
    examiner = RelayExaminer(bench.relay, Thresholds())
    bench.drive(500)
    findings = {f.name: f for f in examiner.look()}
    assert set(findings) == {"commands", "eye", "joints", "guard"}
    assert findings["commands"].level == findings["guard"].level == OK
    assert findings["commands"].values["commands"] == "10"
    bench.drive(500)
    bench.spend(50)
    bench.drive(500)
    findings = {f.name: f for f in examiner.look()}
    assert findings["commands"].level == WARN
    assert "did not come in time" in findings["commands"].message
    assert "no_command 1 times" in findings["guard"].message
    bench.spend(300)
    [commands] = [f for f in examiner.look() if f.name == "commands"]
    assert commands.level == ERROR
    assert commands.message.startswith("safety action (no_command)")


number = st.one_of(st.floats(width=32), st.floats(-4, 4, width=32))
event = st.one_of(
    st.tuples(st.just("base"), number, number),
    st.tuples(st.just("arm"), number),
    st.tuples(st.just("see"), st.integers(-200, 60), st.booleans()),
    st.tuples(st.just("spend"), st.integers(1, 120)),
    st.tuples(st.just("stop")),
    st.tuples(st.just("reset")),
    st.tuples(st.just("jump"), st.integers(-1000, 1000)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(event, max_size=60))
def test_whatever_comes_in_what_goes_out_is_inside_the_contract(events) -> None:
    bench = Bench()
    with pytest.MonkeyPatch.context() as patch:
        still(patch, bench)
        for kind, *values in events:
            happen(bench, kind, values)
        bench.spend(100)
    judge(bench)


def happen(bench: Bench, kind: str, values: list) -> None:
    if kind == "base":
        bench.base(*values)
    elif kind == "arm":
        bench.arm(*values)
    elif kind == "see":
        bench.moves = values[1]
        bench.relay.put("eye", bench.mono + bench.shift + values[0] * MS)
    elif kind == "jump":
        bench.shift += values[0] * MS
    elif kind == "spend":
        bench.spend(values[0])
    else:
        bench.relay.tell(lambda guard: guard.stop("x") if kind == "stop" else guard.reset_stop())


def judge(bench: Bench) -> None:
    """Finite, within limits, within rates from what was sent before, and never two periods of silence."""
    before = None
    previous, dated_before = 10_000 * MS, 0
    for (time_ns, verdict), dated in zip(bench.sent, bench.dated, strict=True):
        assert np.isfinite(verdict.values).all()
        assert (verdict.values >= CONTRACT.action_low).all()
        assert (verdict.values <= CONTRACT.action_high).all()
        assert time_ns - previous < 2 * PERIOD
        if before is not None and not verdict.is_safe and not bench.relay.report.reasons["the clock jumped"]:
            allowed = np.array([10, 20]) * max(0, dated - dated_before) / 1e9 + 1e-5
            assert (np.abs(verdict.values[:2] - before[:2]) <= allowed).all()
        before, previous, dated_before = verdict.values, time_ns, dated


class Types:
    """Messages of rosbags in place of rclpy's."""

    def new(self, name):
        return new(name)

    def element(self, msg, attribute):
        pytest.fail("the contract has no array of messages")


def test_commands_are_read_by_the_path_that_writes_them() -> None:
    codec = Codec(CONTRACT, Types())
    values = np.array([0.5, -1.0, 2.0], np.float32)
    wanted = dict(codec.messages(values, np.ones(3, bool), 0))
    [base, arm] = codec.topics
    assert read(base, wanted["/cmd_vel"]).tolist() == [0.5, -1.0]
    assert read(arm, wanted["/arm"]).tolist() == [2.0]
    with pytest.raises(UserError, match="has only 0 elements"):
        read(arm, new("std_msgs/msg/Float64MultiArray"))


# -- with threads and real clocks --


@pytest.fixture
def live():
    """A relay that runs, and (monotonic time, verdict) of what it sends."""
    sent = []
    relay = Relay(
        CONTRACT, Guard(CONTRACT), Inbox(tuple(s.name for s in CONTRACT.observations)),
        lambda verdict, _: sent.append((time.monotonic_ns(), verdict)), time.time_ns,
        Report(CONTRACT.rate_hz, CONTRACT.latency_ms), lambda line: None,
    )  # fmt: skip
    runner = Runner(relay, log=lambda line: None)
    runner.start()
    yield relay, runner, sent
    if runner.is_running:
        runner.stop()


def push(relay: Relay, seconds: float, pauses: float = 0.0) -> None:
    """Pictures and commands every period, with pauses in a share of the periods."""
    end, rng = time.monotonic() + seconds, np.random.default_rng(0)
    while time.monotonic() < end:
        relay.put("joints", time.time_ns())
        relay.put("eye", time.time_ns(), SimpleNamespace(data=rng.bytes(96)))
        relay.command("/cmd_vel", np.zeros(2))
        relay.command("/arm", np.zeros(1))
        time.sleep(0.16 if rng.random() < pauses else 0.05)


def test_the_robot_never_waits_two_periods_and_the_safety_action_is_last(live) -> None:
    relay, runner, sent = live
    push(relay, 1.5, pauses=0.2)
    assert runner.stop()
    gaps = np.diff([t for t, _ in sent])
    assert gaps.max() < 2 * PERIOD + SLACK_NS
    assert {v.is_safe for _, v in sent} == {True, False}
    assert sent[-1][1].is_safe
    assert relay.report.stages["relay"].quantile_ms(0.5) < 5.0
    count = len(sent)
    time.sleep(0.1)
    assert len(sent) == count


def test_a_relay_that_stands_still_is_replaced_by_the_watchdog(live) -> None:
    relay, runner, sent = live
    real = relay.round

    def stuck() -> None:
        relay.round = real
        time.sleep(0.4)

    push(relay, 0.2)
    since, relay.round = time.monotonic_ns(), stuck
    time.sleep(0.35)
    assert any(v.is_safe and t > since for t, v in sent)
    assert runner._watchdog.count > 0


def test_an_error_in_the_relay_is_no_end(live) -> None:
    relay, _, sent = live
    real = relay.round

    def broken() -> None:
        relay.round = real
        raise ZeroDivisionError

    push(relay, 0.2)
    relay.round = broken
    push(relay, 0.3)
    assert relay.report.reasons["the relay failed"] == 1
    assert relay.state == "driving"
    assert any("ZeroDivisionError" in v.reason for _, v in sent)
