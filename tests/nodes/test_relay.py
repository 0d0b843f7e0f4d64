"""The relay: whatever another policy sends, what goes out is inside the contract, and it never pauses."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d4_datasets.bags import new
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes import driver as driver_module
from d4_nodes import relay as relay_module
from d4_nodes.codec import Codec
from d4_nodes.guard import Guard, GuardConfig
from d4_nodes.health import ERROR, OK, WARN, Thresholds
from d4_nodes.inbox import Inbox
from d4_nodes.relay import Relay, RelayExaminer, read
from d4_nodes.report import Report
from d4_nodes.runner import Runner

CONTRACT = Contract.load(Path(__file__).with_name("robot.yaml"))
MS = 1_000_000
PERIOD = CONTRACT.period_ns
SLACK_NS = 25 * MS


class Bench:
    """A relay on clocks that stand still unless they are told: camera and joints deliver every period."""

    def __init__(
        self,
        config: GuardConfig = GuardConfig(),  # noqa: B008
        contract: Contract = CONTRACT,
        recover_after: int = 5,
        is_simulated: bool = False,
    ) -> None:
        self.mono, self.shift = 10_000 * MS, 5_000_000 * MS
        pace = (lambda: self.mono + self.shift) if is_simulated else None
        self.sent: list[tuple[int, object]] = []
        self.said: list[str] = []
        self.guard = Guard(contract, config)
        self.relay = Relay(
            contract, self.guard, Inbox(tuple(s.name for s in contract.observations)),
            lambda verdict, _: self.sent.append((self.mono, verdict)), lambda: self.mono + self.shift,
            Report(contract.rate_hz, contract.latency_ms), self.said.append, pace, 0.0, recover_after,
        )  # fmt: skip
        self.sees = self.moves = True
        self._number = 0
        self._next_frame = self.mono
        self.relay.begin()

    def see(self) -> None:
        """A frame and joints."""
        self._number += self.moves
        picture = SimpleNamespace(data=np.full(96, self._number % 256, np.uint8).tobytes())
        self.relay.put("joints", self.mono + self.shift)
        self.relay.put("eye", self.mono + self.shift, picture)

    def spend(self, ms: int) -> None:
        """Time goes by, looked at every millisecond."""
        for _ in range(ms):
            self.relay.round()
            self.mono += MS
            if self.mono >= self._next_frame:
                self._next_frame += PERIOD
                if self.sees:
                    self.see()
        self.relay.round()

    def base(self, *values: float) -> None:
        self.relay.command("/cmd_vel", np.array(values))

    def arm(self, value: float) -> None:
        self.relay.command("/arm", np.array([value]))

    def command(self, x: float, turn: float, arm: float) -> object:
        """A whole command; returns what the robot gets of it."""
        count = len(self.sent)
        self.base(x, turn)
        self.arm(arm)
        self.relay.round()
        assert len(self.sent) == count + 1
        return self.sent[-1][1]

    def drive(self, ms: int, x: float = 0.1, arm: float = 0.5) -> None:
        """Good commands every period."""
        for _ in range(ms // 50):
            self.command(x, 0.0, arm)
            self.spend(50)

    @property
    def last(self):
        return self.sent[-1][1]


@pytest.fixture
def bench(monkeypatch) -> Bench:
    bench = Bench()
    still(monkeypatch, bench)
    return bench


def still(monkeypatch, bench: Bench) -> None:
    """The relay's monotonic time is the bench's."""
    for module in (driver_module, relay_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic_ns=lambda: bench.mono))
    bench.relay.begin()


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


def recover(bench: Bench, count: int = 5) -> None:
    """So many good commands must come; the last of them passes."""
    for left in reversed(range(count)):
        verdict = bench.command(0.1, 0.0, 1.0)
        assert verdict.is_safe == (left > 0)
        if left:
            assert verdict.rules == ("fault",)
            assert f"; {left} good commands in a row are still missing" in verdict.reason
        bench.spend(50)
    assert bench.relay.state == "driving"


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


def test_after_silence_a_number_of_commands_must_come(bench) -> None:
    bench.drive(100)
    bench.spend(200)
    assert bench.relay.state == "no_command"
    recover(bench)
    assert not bench.command(0.1, 0.0, 0.5).is_safe


def test_the_first_command_passes_however_long_it_took(bench) -> None:
    bench.spend(500)
    assert not bench.command(0.1, 0.0, 0.5).is_safe


def test_a_camera_that_has_not_come_yet_is_no_reason_for_doubt(bench) -> None:
    bench.sees = False
    bench.spend(100)  # streams count as fresh at the beginning
    bench.drive(400)
    assert bench.last.rules == ("stale",)
    bench.sees = True
    bench.see()
    assert not bench.command(0.1, 0.0, 0.5).is_safe


def test_a_policy_that_is_late_every_other_time_never_drives_again(bench) -> None:
    bench.drive(100)
    count = len(bench.sent)
    for _ in range(20):
        bench.spend(35)  # 85 ms between two commands, 75 are allowed
        bench.command(0.1, 0.0, 0.5)
        bench.spend(50)
        bench.command(0.1, 0.0, 0.5)
        bench.spend(50)
    assert all(verdict.is_safe for _, verdict in bench.sent[count:])


@pytest.mark.parametrize("bad", ["nan", "stale", "frozen"])
def test_what_is_bad_again_while_it_recovers_begins_anew(bench, bad) -> None:
    bench.drive(200)
    bench.spend(200)
    for _ in range(4):
        assert bench.command(0.1, 0.0, 0.5).is_safe
        bench.spend(50)
    if bad == "nan":
        assert bench.command(np.nan, 0.0, 0.5).is_safe
    else:
        name = "sees" if bad == "stale" else "moves"
        setattr(bench, name, False)
        bench.spend(150)
        assert bench.last.rules == (bad,)
        setattr(bench, name, True)
    bench.spend(50)
    recover(bench)


def test_how_many_commands_it_takes_is_up_to_the_user(monkeypatch) -> None:
    bench = Bench(recover_after=1)
    still(monkeypatch, bench)
    bench.drive(100)
    bench.spend(200)
    recover(bench, 1)


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


def test_a_fast_simulation_is_no_jump() -> None:
    """Its clock went 200 ms further between two looks; that was a jump, again and again."""
    bench = Bench(is_simulated=True)
    for _ in range(20):
        bench.see()
        bench.command(0.1, 0.0, 0.5)
        bench.mono += 200 * MS
    assert not bench.relay.report.reasons


def test_a_relay_held_up_before_it_sends_does_not_send_an_old_command(bench) -> None:
    """The watchdog sent the safety action in its place, and the command of before came after that."""
    bench.drive(200)
    recover_ = bench.relay._recover

    def stall(values, now):
        bench.relay._recover = recover_
        bench.mono += 2000 * MS
        assert bench.relay.rest_from_outside(1)
        recover_(values, now)

    bench.relay._recover = stall
    count = len(bench.sent)
    bench.base(0.3, 0.0)
    bench.arm(0.5)
    bench.relay.round()
    assert len(bench.sent) > count
    assert all(verdict.is_safe for _, verdict in bench.sent[count:])
    bench.see()
    bench.spend(1)
    recover(bench)


def test_a_relay_that_stood_still_waits_for_good_commands(bench) -> None:
    bench.drive(200)
    bench.mono += 300 * MS
    bench.relay.rest_from_outside(1)
    bench.see()
    recover(bench)


def test_a_burst_is_not_a_number_of_good_commands(bench) -> None:
    """A process that was stopped says everything at once when it goes on."""
    bench.drive(200)
    bench.spend(1000)
    for _ in range(10):
        assert bench.command(0.1, 0.0, 0.5).is_safe
        bench.spend(1)
    bench.spend(40)
    recover(bench, 4)


def test_many_commands_and_a_camera_that_comes_and_goes_never_drive(bench) -> None:
    bench.drive(200)
    bench.sees = False
    bench.spend(200)
    count = len(bench.sent)
    for k in range(400):
        if k % 80 == 0:
            bench.see()
        bench.command(0.1, 0.0, 0.5)
        bench.spend(5)
    assert all(verdict.is_safe for _, verdict in bench.sent[count:])


def test_silence_while_it_recovers_is_named(bench) -> None:
    """The reason of before stood there for as long as nothing came."""
    bench.drive(200)
    bench.spend(200)
    bench.command(0.1, 0.0, 0.5)
    bench.spend(1000)
    assert bench.last.rules == ("no_command",)
    assert float(re.search(r"came (\d+) ms ago", bench.last.reason)[1]) > 900


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
    previous = 10_000 * MS
    for time_ns, verdict in bench.sent:
        assert np.isfinite(verdict.values).all()
        assert (verdict.values >= CONTRACT.action_low).all()
        assert (verdict.values <= CONTRACT.action_high).all()
        assert time_ns - previous < 2 * PERIOD
        if before is not None and not verdict.is_safe and not bench.relay.report.reasons["the clock jumped"]:
            allowed = np.array([10, 20]) * (time_ns - previous) / 1e9 + 1e-5
            assert (np.abs(verdict.values[:2] - before[:2]) <= allowed).all()
        before, previous = verdict.values, time_ns


class Types:
    """Messages of rosbags in place of rclpy's."""

    def new(self, name):
        return new(name)

    def element(self, msg, attribute):
        raise NotImplementedError


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
