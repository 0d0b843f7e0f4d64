"""Every fault ends in the safety action within two periods, for a named reason, and in recovery if it can."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from d4_nodes.bench import ServerProcess, image
from d4_nodes.guard import Guard
from d4_nodes.inbox import Inbox, Sample
from d4_nodes.link import Link
from d4_nodes.loop import Loop, LoopConfig
from d4_nodes.report import Report
from d4_nodes.runner import Runner
from d4_nodes.wire import WireError

PERIOD_S = 0.05
TWO_PERIODS_S = 2 * PERIOD_S
SLACK_S = 0.035  # of a machine that is busy with other tests


def test_it_drives_at_its_rate_and_latency(rig) -> None:
    time.sleep(1.0)
    assert not any(is_safe for _, is_safe, _ in rig.motors.commands[-10:])
    assert rig.report.achieved_hz == pytest.approx(20, rel=0.1)
    latency = rig.report.stages["latency"]
    assert latency.smallest >= 30e6
    assert latency.quantile_ms(0.5) < 33


def test_decisions_that_take_too_long_leave_frames_the_time_to_arrive(contract, tmp_path) -> None:
    """Every tick took the frame before its own, which came when nothing was left of the latency."""
    config = LoopConfig(decision_ms=40.0)
    loop = Loop(
        contract, Guard(contract), Inbox(("eye", "joints")), lambda *_: None, lambda: None, time.time_ns,
        Report(20.0, 30.0), config,
    )  # fmt: skip
    loop._ticker.frame(1_000_000_000)
    assert loop._ticker.next(1_000_000_000) is not None
    assert loop._ticker.next(1_055_000_000) is None  # its own frame is on its way
    loop._ticker.frame(1_050_000_000)
    tick = loop._ticker.next(1_056_000_000)
    assert tick is not None
    assert tick.is_fresh


def test_a_frame_in_time_is_answered_by_its_own_plan(rig) -> None:
    time.sleep(0.5)
    assert rig.report.counts["missed"] <= 2
    assert rig.motors.commands[-1][2] == ()


def fault_is_safe(rig, since: int) -> str:
    rule = rig.until_safe()
    assert rig.safe_after_s(since) < TWO_PERIODS_S + SLACK_S
    return rule


def test_server_killed_and_started_again(rig) -> None:
    since = time.time_ns()
    os.kill(rig.server.process.pid, signal.SIGKILL)
    assert fault_is_safe(rig, since) == "fault"
    rig.server.process.wait()
    rig.server = ServerProcess(rig.command)  # its socket file was left by the crash
    rig.until_driving()


def test_server_stopped_and_continued(rig) -> None:
    since = time.time_ns()
    os.kill(rig.server.process.pid, signal.SIGSTOP)
    try:
        assert fault_is_safe(rig, since) in ("watchdog", "fault")
    finally:
        os.kill(rig.server.process.pid, signal.SIGCONT)
    rig.until_driving()


def test_camera_stops_and_comes_back(rig) -> None:
    since = time.time_ns()
    rig.camera.pause = True
    assert fault_is_safe(rig, since) in ("stale", "fault")
    rig.until(lambda: rig.motors.commands[-1][2] == ("stale",), 2)
    forgotten = rig.report.counts["times the past was forgotten"]
    time.sleep(0.15)
    rig.camera.pause = False
    rig.until_driving()
    # for the importer too a gap ends an episode: the model begins anew with what comes after it
    assert rig.report.counts["times the past was forgotten"] == forgotten + 1


def test_begin_of_an_episode_takes_up_the_frame_before_it(rig) -> None:
    """The message that starts an episode mostly comes after the frame of its first tick."""
    missed = rig.report.counts["missed"]
    for _ in range(4):
        time.sleep(0.1)
        newest = rig.loop.inbox.newest("eye").stamp_ns
        rig.until(lambda n=newest: rig.loop.inbox.newest("eye").stamp_ns > n, 1)
        before, first = rig.report.counts["times the past was forgotten"], len(rig.motors.commands)
        start = rig.loop.inbox.newest("eye").stamp_ns + 8_000_000
        rig.loop.begin(start)
        rig.until(lambda n=first: len(rig.motors.commands) > n + 2, 2)
        assert rig.report.counts["times the past was forgotten"] == before + 1
        late = rig.motors.commands[first][0] - (start - 8_000_000) - 30_000_000
        assert -1_000_000 < late < SLACK_S * 1e9  # the command of tick 0 answers the frame before the start
    assert rig.report.counts["missed"] <= missed + 1


def test_silence_is_filled_with_safety_actions(rig) -> None:
    """Without frames an episode that has begun has no ticks; the robot must hear from us all the same."""
    rig.camera.pause = True
    time.sleep(0.1)
    rig.loop.begin(None)
    time.sleep(0.5)
    assert rig.motors.gaps.largest < 1e9 * (TWO_PERIODS_S + SLACK_S)
    assert rig.motors.commands[-1][1]


def test_camera_freezes_and_thaws(rig) -> None:
    rig.camera.freeze = True
    since = time.time_ns()
    assert rig.until_safe() == "frozen"
    assert (
        rig.safe_after_s(since) < 3 * TWO_PERIODS_S / 2 + 0.05 + SLACK_S
    )  # two repeats after the first picture
    rig.camera.freeze = False
    rig.until_driving()


@pytest.mark.parametrize("shift_s", [-5, 5])
def test_stamps_jump_and_come_back(rig, shift_s) -> None:
    since = time.time_ns()
    rig.camera.shift_ns = shift_s * 10**9
    assert fault_is_safe(rig, since) in ("stale", "fault")
    rig.until(lambda: rig.motors.commands[-1][2] == ("stale",), 2)
    rig.camera.shift_ns = 0
    rig.until_driving()
    assert rig.report.counts["wrong stamps"]


@pytest.mark.parametrize(("fault", "rule"), [("nan", "not_finite"), ("raise", "fault")])
def test_a_failing_model(rig, fault, rule) -> None:
    since = time.time_ns()
    rig.faults.write_text(fault)
    assert fault_is_safe(rig, since) == rule
    rig.faults.unlink()
    rig.until_driving()


def test_a_model_that_asks_for_too_much_is_cut(rig) -> None:
    rig.faults.write_text("huge")
    rig.until(lambda: rig.guard.tally["limit"].count > 3, 3)
    assert rig.loop.state == "driving"


def test_a_slow_model_is_bridged_then_stopped_then_trusted_again(rig) -> None:
    since = time.time_ns()
    before = rig.report.counts["missed"]
    rig.faults.write_text("sleep 0.3")
    assert fault_is_safe(rig, since) == "fault"
    assert rig.report.counts["missed"] - before >= 2  # the first was bridged by the plan
    rig.faults.unlink()
    rig.until_driving()
    good = [not is_safe for _, is_safe, _ in rig.motors.commands]
    assert good[-1]


@pytest.mark.parametrize(
    "change",
    [{"encoding": "what8"}, {"data": b"too short"}, {"step": 1}, {"height": 0}, {"data": None}],
    ids=["encoding", "data", "step", "height", "none"],
)
def test_pictures_that_are_none(rig, change) -> None:
    broken = image(np.zeros((8, 12, 3), np.uint8))
    for name, value in change.items():
        setattr(broken, name, value)
    good, rig.camera._pictures = rig.camera._pictures, [broken]
    since = time.time_ns()
    assert fault_is_safe(rig, since) in ("fault", "frozen")
    rig.camera._pictures = good
    rig.until_driving()


def test_emergency_stop_during_motion(rig) -> None:
    since = time.time_ns()
    with rig.loop.lock:
        rig.guard.stop("button")
    assert fault_is_safe(rig, since) == "emergency_stop"
    time.sleep(0.3)
    assert rig.motors.commands[-1][1]
    with rig.loop.lock:
        rig.guard.reset_stop()
    rig.until_driving()


@pytest.mark.parametrize("shift_s", [3600, -3600])
def test_the_clock_jumps(rig, shift_s) -> None:
    """Everything is dated an hour later or earlier from one moment to the next."""
    shift, since = shift_s * 10**9, time.time_ns()
    rig.camera.shift_ns = shift
    rig.loop._clock = lambda: time.time_ns() + shift
    rig.until(lambda: rig.report.reasons["the clock was set"] == 1, 2)
    rig.until(lambda: len(commands_after(rig, since + shift, shift_s)) > 7, 2)
    first = commands_after(rig, since + shift, shift_s)
    assert first[0][0] - since - shift < 1e9 * (TWO_PERIODS_S + SLACK_S)
    assert [is_safe for _, is_safe, _ in first[:4]] == [True] * 4  # until enough good ticks have come
    rig.until_driving()


def commands_after(rig, since: int, shift_s: int) -> list:
    """Commands dated by the new clock."""
    half = abs(shift_s) * 10**9 // 2
    return [c for c in rig.motors.commands if c[0] >= since and c[0] < since + half]


def test_the_clock_jumps_as_an_episode_begins(rig) -> None:
    """The jump was overlooked: no command went out for as long as the old clock was ahead."""
    shift = -30 * 10**9
    with rig.loop.lock:  # the loop sees both at once
        rig.loop.begin(time.time_ns())
        rig.camera.shift_ns = shift
        rig.loop._clock = lambda: time.time_ns() + shift
    longest, end = 0.0, time.monotonic() + 1.0
    while time.monotonic() < end:
        longest = max(longest, rig.loop.silence_s())
        time.sleep(0.005)
    assert longest < TWO_PERIODS_S + SLACK_S
    rig.until_driving()


def test_stopping_during_a_tick_sends_the_safety_action_last(rig) -> None:
    rig.loop.stop()
    rig.until(lambda: not rig._thread.is_alive(), 2)
    assert rig.motors.commands[-1][1]
    count = len(rig.motors.commands)
    time.sleep(0.15)
    assert len(rig.motors.commands) == count


def test_a_loop_that_stands_still_is_replaced_by_the_watchdog(rig) -> None:
    real, since = rig.loop._round, time.time_ns()

    def stuck() -> None:
        rig.loop._round = real
        time.sleep(0.5)

    rig.loop._round = stuck
    rig.until(lambda: rig.watchdog.count > 0, 2)
    assert rig.safe_after_s(since) < TWO_PERIODS_S + SLACK_S
    rig.until_driving()
    assert rig.report.counts["safety actions of the watchdog"] == rig.watchdog.count


def test_a_loop_that_hangs_right_before_it_sends_leaves_no_longer_pause(rig) -> None:
    """The watchdog counted from the last round, and a command may have been due a moment later."""
    check, hung = rig.guard.check, []

    def stuck(values, now_ns):
        if not hung:
            hung.append(now_ns)
            rig.loop.lock.release()  # it hangs before it has the lock
            time.sleep(0.5)
            rig.loop.lock.acquire()
        return check(values, now_ns)

    rig.motors.gaps = type(rig.motors.gaps)()
    rig.guard.check = stuck
    rig.until(lambda: rig.watchdog.count > 0, 2)
    rig.until_driving()
    assert rig.motors.gaps.largest < 1e9 * (TWO_PERIODS_S + SLACK_S)


def test_what_a_loop_sends_after_it_was_given_up_goes_nowhere(rig, monkeypatch) -> None:
    """A loop that woke up after the node was deactivated sent its command behind the last safety action."""
    monkeypatch.setattr("d4_nodes.runner._PATIENCE_S", 0.2)
    runner = Runner(rig.loop)
    runner._thread, real = rig._thread, rig.loop._round

    def stuck() -> None:
        time.sleep(0.8)
        rig.loop._round = real
        real()

    rig.loop._round = stuck
    time.sleep(0.1)
    runner._watchdog.start()
    assert not runner.stop()
    count = len(rig.motors.commands)
    assert rig.motors.commands[-1][1]
    rig._thread.join(5)
    assert len(rig.motors.commands) == count
    assert runner.rules()


def test_a_report_is_written_although_a_loop_holds_its_lock(rig, monkeypatch) -> None:
    monkeypatch.setattr("d4_nodes.runner._PATIENCE_S", 0.1)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with rig.loop.lock:
            held.set()
            release.wait(5)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(5)
    try:
        assert "limit" in Runner(rig.loop).rules()
    finally:
        release.set()
        holder.join()


def test_a_server_that_lives_but_never_answers_is_lost_and_found_again(rig, monkeypatch) -> None:
    """Its heartbeat went on, and the loop waited for its answer for ever."""
    monkeypatch.setattr("d4_nodes.link._PATIENCE_S", 0.4)
    rig.faults.write_text("sleep 1.5")
    assert rig.until_safe() == "fault"
    rig.faults.unlink()
    rig.until(lambda: rig.report.reasons["the server was lost"] > 0, 5)
    rig.until_driving()


def test_a_vector_that_comes_after_its_picture_is_waited_for(rig) -> None:
    """The sample before was taken, the importer took this one."""
    seen = []
    submit = Link.submit

    def note(link, task, reset, previous):
        seen.append(float(link.vectors["joints"][0]))
        return submit(link, task, reset, previous)

    def late(stamp, number):
        rig.loop.put("eye", stamp, rig.camera._pictures[number % 8])
        time.sleep(0.004)
        rig.loop.put("joints", stamp, np.array([number, 0.0], np.float32))
        sent.append(number)

    sent: list[int] = []
    rig.camera._take = late
    time.sleep(0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "submit", note)
        time.sleep(0.6)
    assert len(seen) > 6
    assert np.all(np.diff(seen) >= 1)
    assert abs(seen[-1] - sent[-1]) <= 1
    assert seen[0] in sent


def test_a_vector_that_holds_for_ever_holds_over_a_jump_of_the_clock(contract) -> None:
    inbox = Inbox(("goal", "eye"))
    for name in inbox.names:
        inbox.keep(name, Sample(5 * 10**9, 5 * 10**9, name))
    inbox.clear(held=("goal",))
    assert inbox.at("goal", 1).message == "goal"
    assert inbox.newest("eye") is None


def test_an_error_in_the_loop_is_no_end(rig) -> None:
    real = rig.loop._round

    def broken() -> None:
        rig.loop._round = real
        raise ZeroDivisionError

    rig.loop._round, since = broken, time.time_ns()
    rig.until(lambda: rig.report.reasons["the loop failed"] == 1, 2)
    assert rig.until_safe() == "fault"
    assert "ZeroDivisionError" in rig.guard.tally["fault"].reason
    rig.until(lambda: len([c for c in rig.motors.commands if c[0] >= since]) > 5, 2)
    assert sum(is_safe for t, is_safe, _ in rig.motors.commands if t >= since) >= 4
    rig.until_driving()


def test_a_second_robot_is_refused_with_the_reason(rig) -> None:
    with pytest.raises(WireError, match="another robot is connected"):
        Link(rig.socket, rig.contract)


def test_another_contract_is_refused(rig, contract) -> None:
    from dataclasses import replace

    with pytest.raises(WireError, match="another"):
        Link(rig.socket, replace(contract, rate_hz=21.0))


def test_commands_never_pause_longer_than_two_periods(rig) -> None:
    rng = np.random.default_rng(0)
    for fault in rng.permutation(["nan", "raise", "sleep 0.2", "huge"]):
        rig.faults.write_text(fault)
        time.sleep(0.3)
        rig.faults.unlink()
        time.sleep(0.3)
    assert rig.motors.gaps.largest < 1e9 * (TWO_PERIODS_S + SLACK_S)


def test_a_middleware_that_fails_for_a_while_ends_neither_loop_nor_watchdog(rig) -> None:
    """Two failed publishes in a row ended the thread, and nobody noticed."""
    send, failing = rig.loop._send, True

    def unreliable(verdict, now_ns):
        if failing:
            raise RuntimeError("no middleware")
        send(verdict, now_ns)

    rig.loop._send = unreliable
    time.sleep(0.4)
    failing = False
    rig.until_driving()
    count = len(rig.motors.commands)
    rig.until(lambda: len(rig.motors.commands) > count + 5, 2)
    rig.motors.gaps = type(rig.motors.gaps)()
